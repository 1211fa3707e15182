//! Two connected sockets joined: what comes from one goes to the other, both ways at once.
//!
//! Each way has a fiber: the caller's carries from `a` to `b`, a second one of the same worker from `b` to `a`. On a plain thread a
//! runtime of that call's own runs the two.
//!
//! # One way
//!
//! ```text
//!          ┌──────── all sent, and it filled the vessel ────────┐
//!          ▼                                                    │
//!  receive into a vessel ──▶ send from the vessel ──────────────┤
//!   │  ▲                       │  ▲                             │ all sent, and there was no more
//!   │  │ readable (ring)       │  │ writable (ring)             ▼
//!   └──┴─────── nothing there ─┘  └── no room          wait until readable (ring)
//!   │
//!   └─ end of the stream ──▶ shutdown(SHUT_WR) of the other side: this way is done
//! ```
//!
//! The ring says when, plain calls that do not wait move the bytes: of all ways that were measured this is the cheapest, for the
//! bytes stay in one *hot* vessel that the whole worker shares, and that never leaves the second-level cache. A way takes it,
//! fills it, empties it and gives it back before anybody else runs. Only a way whose receiver has no room keeps its vessel while it waits,
//! and the others go on with another; so the memory of a relay is one vessel each way at the most, and none while it is idle.
//!
//! A vessel is a buffer (recv(2), send(2): two copies) or a pipe (splice(2): none). A pipe costs more calls, so it pays for large
//! amounts only: a way learns from what it receives ([`Habit`]).
//!
//! # The end
//!
//! ```text
//!            one side cannot be sent to           what it has sent is passed on
//!  Going ──────────────────────────────▶ Draining ─────────────────────────────▶ both fibers end
//!    │  cancelled, shut down, timed out,     │ timed out, …                       ▲
//!    │  a side cannot be received from       ▼                                    │
//!    ├──────────────────────────────────▶ Stopped ────────────────────────────────┤
//!    └── both ways are done ──────────────────────────────────────────────────────┘
//! ```
//!
//! Whoever stops the relay ends what the other fiber waits in ([`Fellow`]). The times are kept by one fiber for all relays of a
//! worker (`relay/watch.rs`), so that no wait has a timer of its own.

mod vessel;
mod watch;

use std::cell::{Cell, OnceCell};
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::resume_unwind;
use std::rc::Rc;

use crate::constants::{AF_INET, AF_INET6, SHUT_WR, SOCK_STREAM};
use crate::driver::{Limit, Op, SECOND_LOOK};
use crate::error::{Error, Result};
use crate::fiber::fellow::Fellow;
use crate::fiber::inflight::Direction;
use crate::fiber::join::{Builder, JoinError};
use crate::fiber::watch::{self as standing, NoEvents};
use crate::fiber::{self, error_from_outcome, outcome, park};
use crate::runtime::Runtime;
use crate::socket::Socket;
use crate::sys;
use crate::timeout::Timeout;
use vessel::Pipe;
use watch::Bench;

/// Calls in a row, without a wait, after which a way lets the other fibers go first.
const TURN_CALLS: u32 = 16;

/// The fewest bytes a vessel holds: a page.
const IN_FLIGHT_MIN: usize = 4 << 10;

/// The most.
const IN_FLIGHT_MAX: usize = 1 << 20;

/// So much at a time is worth a pipe. (Of 16 KiB copying is a tenth cheaper, of 64 KiB splicing a quarter.)
const SPLICE_BYTES_MIN: usize = 24 << 10;

/// So often in a row it must have come, or must have failed to come, before a way changes over.
const HABIT: u8 = 4;

/// How often a relay that was interrupted lets its other fiber run, to end before the call returns.
const PATIENCE: u32 = 64;

const SEND_FLAGS: i32 = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

/// Of a socket's error queue, how much is discarded at a time.
const REPORTS_MAX: u32 = 64;

/// How a [`relay`] moves bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum RelayMode {
    /// Each way copies, and changes over to a pipe when 24 KiB or more come at a time, several times in a row, and back.
    #[default]
    Auto,
    /// By recv(2) and send(2) through a buffer.
    Copy,
    /// By splice(2) through a pipe, where there is one to be had (no more than 64 are in use on each worker) and the sockets can.
    Splice,
}

/// What [`relay`] may be told.
///
/// ```
/// use ringsock::RelayOptions;
/// let options = RelayOptions { idle_timeout: 60.into(), ..Default::default() };
/// assert_eq!(options.in_flight, 64 * 1024);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct RelayOptions {
    /// Ends the relay when for so long not one byte has moved, either way. It may take an eighth longer. Default: never.
    pub idle_timeout: Timeout,
    /// Ends the relay so long after its start. Default: never. The deadline of an enclosing [`timeout`](crate::timeout) counts too.
    pub deadline: Timeout,
    /// Bytes that may be received and not yet sent, each way; from 4,096 to 1,048,576. Default: 65,536. While there are so many, no
    /// more is received, so the sender is held back.
    pub in_flight: usize,
    /// How bytes are moved. Default: as it suits what comes.
    pub mode: RelayMode,
}

impl Default for RelayOptions {
    fn default() -> RelayOptions {
        RelayOptions {
            idle_timeout: Timeout::NONE,
            deadline: Timeout::NONE,
            in_flight: 64 << 10,
            mode: RelayMode::Auto,
        }
    }
}

/// One of the two sockets of a [`relay`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RelaySide {
    /// The first.
    A,
    /// The second.
    B,
}

const SIDES: [RelaySide; 2] = [RelaySide::A, RelaySide::B];

/// Why a [`relay`] ended.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum RelayEnd {
    /// Both sides ended their streams, and all they sent was passed on.
    Closed,
    /// Nothing moved for as long as `idle_timeout` says.
    IdleTimeout,
    /// The `deadline`, or that of an enclosing [`timeout`](crate::timeout), passed.
    Deadline,
    /// One side failed: `ECONNRESET`, `EPIPE`, `ETIMEDOUT`, … by its peer, `EBADF` if it was closed here.
    Failed {
        /// The side that failed.
        side: RelaySide,
        /// What it failed with.
        error: Error,
    },
    /// The calling fiber was cancelled.
    Cancelled,
    /// The runtime is ending.
    Shutdown,
}

/// What a [`relay`] came to.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Relayed {
    /// Bytes that came from `a` and that `b`'s kernel has taken.
    pub a_to_b: u64,
    /// Bytes that came from `b` and that `a`'s kernel has taken.
    pub b_to_a: u64,
    /// Of `a_to_b`, those that went by splice(2).
    pub a_to_b_spliced: u64,
    /// Of `b_to_a`, those that went by splice(2).
    pub b_to_a_spliced: u64,
    /// Bytes that were received, from either side, and could not be passed on before the end. 0 where it ended with `Closed`.
    pub stranded: u64,
    /// Why it ended.
    pub ended: RelayEnd,
}

/// Joins two connected stream sockets: what comes from `a` is sent to `b` and what comes from `b` to `a`, at the same time, until both
/// have ended their streams, or something else ends it ([`RelayEnd`]).
///
/// The end of one side's stream is passed on once all before it has been sent (`shutdown(SHUT_WR)`), and the other way goes on. A
/// side that does not read holds back the other one: at most [`in_flight`](RelayOptions::in_flight) bytes each way are received and
/// not yet sent, and a relay with nothing to do holds no buffer. When one side cannot be sent to any more, what it had sent before is still passed on.
///
/// The sockets may be of different families (TCP, AF_UNIX, …). Their modes and timeouts play no part. They stay open: close them (or
/// drop their handles) afterwards. Another fiber may [`close`](Socket::close) one to end the relay. Control data of AF_UNIX
/// (descriptors) and urgent data are not passed on.
///
/// It takes one fiber more, on the caller's worker. On a plain thread it runs on a [`Runtime`](crate::Runtime) of its own, which ends with it. While
/// bytes go through a pipe, both descriptors have `O_NONBLOCK` set.
///
/// # Errors
///
/// Nothing has been moved then. `Value`: not stream sockets, twice the same one, `in_flight` out of range, a timeout that is negative,
/// NaN or 0. `Overflow`: one that is too long. `EAGAIN`: the worker has as many fibers as it may
/// ([`max_fibers`](crate::RuntimeBuilder::max_fibers)); also in a destructor that runs because the fiber panics, where nothing waits.
/// `ENOMEM`. On a plain thread also those of [`RuntimeBuilder::build`](crate::RuntimeBuilder::build).
///
/// # Source
///
/// recv(2), send(2), splice(2); `IORING_OP_POLL_ADD` (Linux 5.1).
///
/// ```
/// use ringsock::prelude::*;
/// use ringsock::{RelayEnd, RelayOptions, relay, socketpair};
///
/// ringsock::run(|| {
///     let (client, a) = socketpair()?;
///     let (b, server) = socketpair()?;
///     let relay = ringsock::spawn(move || relay(&a, &b, &RelayOptions::default()));
///     client.sendall(b"ping")?;
///     assert_eq!(server.recv(16)?, b"ping");
///     server.sendall(b"pong!")?;
///     drop(server);
///     assert_eq!(client.recv(16)?, b"pong!");
///     drop(client);
///     let relayed = relay.join()??;
///     assert_eq!((relayed.a_to_b, relayed.b_to_a), (4, 5));
///     assert_eq!(relayed.ended, RelayEnd::Closed);
///     Ok::<(), Error>(())
/// })?;
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn relay(a: &Socket, b: &Socket, options: &RelayOptions) -> Result<Relayed> {
    let limits = Limits::new(options)?;
    for socket in [a, b] {
        if socket.kind() != SOCK_STREAM {
            return Err(Error::Value(
                "only SOCK_STREAM type sockets are supported".into(),
            ));
        }
    }
    if a.as_raw_fd() == b.as_raw_fd() {
        return Err(Error::Value("twice the same socket".into()));
    }
    if std::thread::panicking() {
        return Err(Error::from_errno(libc::EAGAIN));
    }
    let sockets = [a.clone(), b.clone()];
    if fiber::in_fiber() {
        return relay_in_fiber(sockets, limits);
    }
    let runtime = Runtime::builder().ring_entries(16, 8);
    runtime.run(move || relay_in_fiber(sockets, limits))?
}

/// The options, as they are worked with.
#[derive(Clone, Copy)]
struct Limits {
    idle_ns: Option<i64>,
    /// By the worker's clock; `i64::MAX` without one.
    deadline_ns: i64,
    in_flight: usize,
    mode: RelayMode,
}

impl Limits {
    fn new(options: &RelayOptions) -> Result<Limits> {
        let above_0 = |timeout: Timeout| match timeout.as_ns()? {
            Some(0) => Err(Error::Value("a timeout of 0".into())),
            other => Ok(other),
        };
        let in_flight = options.in_flight;
        if !(IN_FLIGHT_MIN..=IN_FLIGHT_MAX).contains(&in_flight) {
            let text = format!("in_flight is {in_flight}, not {IN_FLIGHT_MIN} to {IN_FLIGHT_MAX}");
            return Err(Error::Value(text.into()));
        }
        let deadline_ns = above_0(options.deadline)?
            .map_or(i64::MAX, |left_ns| fiber::now_ns().saturating_add(left_ns));
        Ok(Limits {
            idle_ns: above_0(options.idle_timeout)?,
            deadline_ns: deadline_ns.min(park::deadline_ns()),
            in_flight,
            mode: options.mode,
        })
    }
}

/// See the module's drawing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Going,
    Draining,
    Stopped,
}

/// One relay. Side 0 is `a`, way 0 leads from it.
struct Pair {
    sockets: [Socket; 2],
    limits: Limits,
    bench: Rc<Bench>,
    stage: Cell<Stage>,
    end: OnceCell<RelayEnd>,
    /// The fibers of the two ways, while they are at it.
    fibers: [Cell<Option<Fellow>>; 2],
    moved: [Cell<u64>; 2],
    spliced: [Cell<u64>; 2],
    stranded: Cell<u64>,
    /// `O_NONBLOCK` was set, for splice(2).
    forced: Cell<bool>,
}

fn relay_in_fiber(sockets: [Socket; 2], limits: Limits) -> Result<Relayed> {
    let pair = Rc::new(Pair {
        sockets,
        limits,
        bench: Bench::of_this_worker(),
        stage: Cell::new(Stage::Going),
        end: OnceCell::new(),
        fibers: [Cell::new(Fellow::this()), Cell::new(None)],
        moved: Default::default(),
        spliced: Default::default(),
        stranded: Cell::new(0),
        forced: Cell::new(false),
    });
    let _ended = EndWhenDropped(&pair);
    let _watched = watch::watch(&pair)?;
    let other = pair.clone();
    let other = Builder::new().spawn(move || {
        let _left = LeaveWhenDropped(&other, 1);
        Way::new(&other, 1).carry();
    })?;
    pair.fibers[1].set(Some(other.fellow()));
    Way::new(&pair, 0).carry();
    match other.join() {
        Ok(()) => {}
        Err(JoinError::Panic(payload)) => resume_unwind(payload),
        Err(JoinError::Interrupted(error)) => pair.stop(interruption(&error)),
        Err(JoinError::Shutdown | JoinError::NotStarted(_)) => pair.stop(RelayEnd::Shutdown),
    }
    // Interrupted, this fiber can wait for nothing more; but the other one needs no more than the others' turn to end.
    for _ in 0..PATIENCE {
        if pair.fibers[1].get().is_none() {
            break;
        }
        fiber::yield_now();
    }
    Ok(Relayed {
        a_to_b: pair.moved[0].get(),
        b_to_a: pair.moved[1].get(),
        a_to_b_spliced: pair.spliced[0].get(),
        b_to_a_spliced: pair.spliced[1].get(),
        stranded: pair.stranded.get(),
        ended: pair.end.get().cloned().unwrap_or(RelayEnd::Closed),
    })
}

/// What an interruption of a fiber means for its relay.
#[cold]
fn interruption(error: &Error) -> RelayEnd {
    match error {
        Error::Timeout => RelayEnd::Deadline,
        Error::Shutdown => RelayEnd::Shutdown,
        _ => RelayEnd::Cancelled,
    }
}

/// The call is over, also by a panic: nothing of it goes on.
struct EndWhenDropped<'a>(&'a Pair);

impl Drop for EndWhenDropped<'_> {
    fn drop(&mut self) {
        let pair = self.0;
        pair.fibers[0].set(None);
        pair.halt();
        for socket in &pair.sockets {
            standing::keep_for_the_next(socket.inflight());
        }
        if pair.forced.get() {
            pair.sockets.iter().for_each(Socket::unforce_nonblocking);
        }
    }
}

/// A way's fiber has ended.
struct LeaveWhenDropped<'a>(&'a Pair, usize);

impl Drop for LeaveWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.fibers[self.1].set(None);
    }
}

impl Pair {
    /// Ends the relay for this reason, unless there is one already. No byte moves any more.
    #[cold]
    fn stop(&self, end: RelayEnd) {
        // The first reason counts.
        let _ = self.end.set(end);
        self.halt();
    }

    #[cold]
    fn halt(&self) {
        self.stage.set(Stage::Stopped);
        self.rouse();
    }

    /// A side failed, with this errno.
    #[cold]
    fn fail(&self, side: usize, errno: i32) {
        self.stop(failed(side, errno));
    }

    /// The side that `way` leads to cannot be sent to any more. What it has sent itself is there to be received, also after a reset.
    #[cold]
    fn fail_to_send(&self, way: usize, errno: i32) {
        if self.end.set(failed(1 - way, errno)).is_ok() {
            self.stage.set(Stage::Draining);
        }
        self.rouse();
    }

    /// Lets both fibers look at the stage.
    fn rouse(&self) {
        let this = Fellow::this();
        for fiber in self.fibers.iter().filter_map(Cell::get) {
            if Some(fiber) != this {
                fiber.end_wait();
            }
        }
    }

    /// Waits until there may be something to receive from a side, or until there is another reason to look: what its watch told;
    /// `None` without one.
    fn wait_to_receive(&self, side: usize, found_nothing: bool) -> Option<u32> {
        if let Some(watched) = self.sockets[side].begin_watch_of_relay() {
            if found_nothing {
                // Whether it was interrupted was asked for just now.
                watched.found_nothing();
            }
            match watched.events(&mut Limit::none()) {
                Ok(events) => {
                    if events & libc::POLLERR as u32 != 0 {
                        self.discard_reports(side);
                    }
                    return Some(events);
                }
                Err(NoEvents::Ended(code)) => {
                    self.wait_failed(side, code);
                    return None;
                }
                Err(NoEvents::Unwatched) => {}
            }
        }
        self.wait(side, Direction::In);
        None
    }

    /// Waits until a side is ready, or until there is another reason to look.
    fn wait(&self, side: usize, direction: Direction) {
        let socket = &self.sockets[side];
        let fd = socket.as_raw_fd();
        let events = match direction {
            Direction::In => libc::POLLIN,
            Direction::Out => libc::POLLOUT,
        };
        let target = Some((socket.inflight(), direction));
        let code = fiber::suspend(&mut Op::Poll { fd, events }, -1, target);
        if code < 0 {
            self.wait_failed(side, code);
        } else if code & i32::from(libc::POLLERR) != 0 {
            self.discard_reports(side);
        }
    }

    /// Empties a socket's error queue. What is in there (a time stamp of what was sent, an ICMP message, the end of a zero-copy send)
    /// is no error of the stream, so that receiving and sending do not end it; but as long as there is some, each poll ends at once.
    #[cold]
    fn discard_reports(&self, side: usize) {
        let socket = &self.sockets[side];
        // Others have no such queue, and would take this for a receive of the stream.
        if !matches!(socket.family(), AF_INET | AF_INET6) {
            return;
        }
        let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
        for _ in 0..REPORTS_MAX {
            if sys::recv(socket.as_raw_fd(), &mut [], flags) < 0 {
                break;
            }
        }
    }

    #[cold]
    fn wait_failed(&self, side: usize, code: i32) {
        match -code {
            // Roused.
            libc::ECANCELED | libc::EINTR => {}
            // Roused as well, in a fiber whose waits have a deadline.
            _ if code == outcome::TIMED_OUT && fiber::now_ns() < self.limits.deadline_ns => {}
            errno if code > outcome::TIMED_OUT => self.fail(side, errno),
            _ => self.stop(interruption(&error_from_outcome(code))),
        }
    }

    /// Lets others go first.
    #[cold]
    fn give_way(&self) {
        let code = fiber::give_way();
        if code < 0 {
            self.stop(interruption(&error_from_outcome(code)));
        }
    }

    fn bytes_moved(&self) -> u64 {
        self.moved[0].get() + self.moved[1].get()
    }
}

fn failed(side: usize, errno: i32) -> RelayEnd {
    RelayEnd::Failed {
        side: SIDES[side],
        error: Error::from_errno(errno),
    }
}

/// What a way has learnt from the sizes of what it received.
struct Habit {
    splices: bool,
    /// How often in a row the other way of moving bytes would have been better.
    contrary: u8,
}

impl Habit {
    /// So many bytes came at a time.
    #[inline]
    fn saw(&mut self, bytes: usize) {
        if (bytes >= SPLICE_BYTES_MIN) == self.splices {
            self.contrary = 0;
            return;
        }
        self.contrary += 1;
        if self.contrary == HABIT {
            self.splices = !self.splices;
            self.contrary = 0;
        }
    }
}

/// What one round of receiving and sending came to.
enum Round {
    /// There may be more.
    More,
    /// It was less than asked for, so that was all, most likely. (If not, the wait ends at once.)
    Short,
    /// There is no more, for now.
    Drained,
    /// The stream ended.
    End,
    /// It failed, or the relay was stopped; whoever noticed has said so.
    Over,
    /// Not by splice(2).
    CannotSplice,
}

/// One way of a relay, at work.
struct Way<'a> {
    pair: &'a Pair,
    way: usize,
    from: RawFd,
    to: RawFd,
    habit: Habit,
    can_splice: bool,
    /// What the watch of the side it receives from told last; `None` without one.
    told: Option<u32>,
}

impl<'a> Way<'a> {
    fn new(pair: &'a Pair, way: usize) -> Way<'a> {
        let mode = pair.limits.mode;
        Way {
            pair,
            way,
            from: pair.sockets[way].as_raw_fd(),
            to: pair.sockets[1 - way].as_raw_fd(),
            habit: Habit {
                splices: mode == RelayMode::Splice,
                contrary: 0,
            },
            can_splice: mode != RelayMode::Copy,
            told: None,
        }
    }

    /// Moves bytes until the end of the stream, or of the relay.
    fn carry(&mut self) {
        let mut calls = 0;
        loop {
            if self.pair.stage.get() == Stage::Stopped {
                return;
            }
            let round = self.round();
            let is_going = self.pair.stage.get() == Stage::Going;
            match round {
                Round::Short | Round::Drained if is_going => {
                    calls = 0;
                    let found_nothing = matches!(round, Round::Drained);
                    self.told = self.pair.wait_to_receive(self.way, found_nothing);
                }
                Round::Drained => return,
                Round::Short | Round::More => {
                    calls += 1;
                    if calls == TURN_CALLS {
                        calls = 0;
                        self.pair.give_way();
                    }
                }
                Round::End => {
                    let shut = sys::shutdown(self.to, SHUT_WR);
                    // A side that is gone is no longer connected. What it sent before is the other way's.
                    if shut < 0 && shut != -libc::ENOTCONN {
                        self.pair.fail(1 - self.way, -shut);
                    }
                    return;
                }
                Round::Over => return,
                Round::CannotSplice => self.can_splice = false,
            }
        }
    }

    #[inline]
    fn round(&mut self) -> Round {
        if self.can_splice
            && self.habit.splices
            && let Some(pipe) = self
                .pair
                .bench
                .vessels
                .take_pipe(self.pair.limits.in_flight)
        {
            self.splice(pipe)
        } else {
            self.copy()
        }
    }

    /// Receives into a buffer, and sends all of it: at once from the hot one, if there is room.
    fn copy(&mut self) -> Round {
        let vessels = &self.pair.bench.vessels;
        let limit = self.pair.limits.in_flight;
        let Some(mut buffer) = vessels.hot_buffer(limit) else {
            self.pair.fail(self.way, libc::ENOMEM);
            return Round::Over;
        };
        let room = &mut buffer.spare_capacity_mut()[..limit];
        let socket = &self.pair.sockets[self.way];
        let (received, is_whole) = socket.recv_told(room);
        if received <= 0 {
            return self.received_none(received);
        }
        let bytes = received as usize;
        let sent = sys::send(self.to, sys::received(room, bytes), SEND_FLAGS);
        if sent == received {
            self.count(sent as u64);
        } else {
            // Others run before it is empty, so it is this way's alone until then.
            let kept = mem::take(&mut *buffer);
            drop(buffer);
            if !self.send_rest(kept, bytes, sent) {
                return Round::Over;
            }
        }
        if self.pair.limits.mode == RelayMode::Auto {
            self.habit.saw(bytes);
        }
        if is_whole && self.told_all() {
            Round::Short
        } else {
            Round::More
        }
    }

    /// After a send that came to `code`: sends the rest of what was received, waiting for room. False at the end of the relay.
    #[cold]
    fn send_rest(&self, mut buffer: Vec<u8>, received: usize, mut code: i32) -> bool {
        let vessels = &self.pair.bench.vessels;
        let bytes = sys::received(&mut buffer.spare_capacity_mut()[..received], received);
        let mut sent = 0;
        let is_sent = loop {
            if code > 0 {
                sent += code as usize;
                self.count(code as u64);
                if sent == bytes.len() {
                    break true;
                }
            }
            if !self.may_send_on(code) {
                self.strand(bytes.len() - sent);
                break false;
            }
            code = sys::send(self.to, &bytes[sent..], SEND_FLAGS);
        };
        vessels.give_buffer(buffer);
        is_sent
    }

    /// After a send that did not take all: waits for room, as the case may be. False at the end of the relay.
    #[cold]
    fn may_send_on(&self, code: i32) -> bool {
        match -code {
            libc::EINTR => {}
            // Less than all: there is no more room.
            ..=0 | libc::EAGAIN => self.pair.wait(1 - self.way, Direction::Out),
            errno => {
                self.pair.fail_to_send(self.way, errno);
                return false;
            }
        }
        self.pair.stage.get() != Stage::Stopped
    }

    fn received_none(&self, code: i32) -> Round {
        match -code {
            0 => Round::End,
            libc::EAGAIN => Round::Drained,
            libc::EINTR => Round::More,
            errno => {
                self.pair.fail(self.way, errno);
                Round::Over
            }
        }
    }

    /// Receives into a pipe, and sends all that is in it.
    fn splice(&mut self, pipe: Pipe) -> Round {
        let pair = self.pair;
        if !pair.forced.replace(true) {
            pair.sockets.iter().for_each(Socket::force_nonblocking);
        }
        let limit = pair.limits.in_flight;
        let received = sys::splice_in(self.from, pipe.writer(), limit);
        if received <= 0 {
            pair.bench.vessels.give_pipe(pipe);
            return match -received {
                libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP => Round::CannotSplice,
                // It does not get past the mark of urgent data: what is behind looks to it like nothing there, or like the end.
                0 | libc::EAGAIN if sys::is_at_mark(self.from) => self.copy(),
                _ => self.received_none(received),
            };
        }
        let bytes = received as usize;
        let mut left = bytes;
        while left > 0 {
            let code = sys::splice_out(pipe.reader(), self.to, left);
            if code > 0 {
                left -= code as usize;
                self.count(code as u64);
                let spliced = &pair.spliced[self.way];
                spliced.set(spliced.get() + code as u64);
            }
            if left > 0 && !self.may_send_on(code) {
                // What is in the pipe goes with it.
                self.strand(left);
                pair.bench.vessels.lose_pipe(pipe);
                return Round::Over;
            }
        }
        pair.bench.vessels.give_pipe(pipe);
        if pair.limits.mode == RelayMode::Auto {
            self.habit.saw(bytes);
        }
        // A pipe may be full of small pieces, so only a call that finds nothing shows that there is none. A poll would show it too.
        if bytes < limit && self.told.is_none() {
            Round::Short
        } else {
            Round::More
        }
    }

    /// After a receive: whether there would have been another event if there were more.
    #[inline]
    fn told_all(&self) -> bool {
        let Some(events) = self.told else {
            return true;
        };
        if events == SECOND_LOOK {
            standing::found_untold(self.pair.sockets[self.way].inflight());
        }
        !standing::is_divided(events)
    }

    #[inline]
    fn count(&self, bytes: u64) {
        let moved = &self.pair.moved[self.way];
        moved.set(moved.get() + bytes);
    }

    #[cold]
    fn strand(&self, bytes: usize) {
        let stranded = &self.pair.stranded;
        stranded.set(stranded.get() + bytes as u64);
    }
}
