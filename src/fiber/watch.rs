//! Sockets that are watched: receives by plain calls, in between waits for events of a standing poll (`driver/watch.rs`).
//!
//! A receive that has to wait, time and again, on the same worker, is cheaper this way: an event costs the kernel less than arming
//! an operation, completing it and disarming it. So after some such waits a worker begins to watch a stream, where that pays ([`events_pay`]). Its receives then
//! go like this:
//!
//! ```text
//!            ┌── events were told ──▶ plain receive ──▶ all that was there: return
//!   events ──┤        ▲                    │ │
//!            │        │                    │ └──▶ perhaps not all (the buffer is full, or the events say more): keep them, return
//!            └── none: wait for one ◀──────┘ EAGAIN
//! ```
//!
//! Events tell of changes only, so a receive may let them go only if it has taken all that was there. A short one has, on TCP and
//! AF_UNIX, unless something divides the stream: an end or an error that was told with the data (`POLLRDHUP`, `POLLHUP`,
//! `POLLERR`), or control data on AF_UNIX (`MSG_CTRUNC`). Then the events are kept, and the next receive looks first.
//!
//! Of urgent data on TCP, behind which a receive stops as well, nothing can be told: the kernel names POLLPRI with all data. So
//! no wait relies on a short receive for long: after a *second look* (`driver/watch.rs`, 100 to 200 ms later) the fiber tries
//! once. Where that finds something the stream is a divided one, and is not watched any more. Nor are sockets whose urgent data
//! somebody reads, or that have a protocol on top (kTLS).
//!
//! A watch is the socket's worker's, the one that owns it (`fiber/inflight.rs`). Whatever cannot use it (flags, another worker, an
//! enclosing deadline, to which an operation is linked) goes the usual way, beside it. It holds the file, so closing, dropping and
//! detaching end it first.

use std::os::fd::RawFd;

use super::inflight::{Direction, InFlight};
use super::scheduler::Worker;
use super::{FiberRef, State, current, interrupted, outcome, yield_fiber};
use crate::driver::{Key, Limit, SECOND_LOOK, Told, WatchId};

/// After so many receives that waited on the ring a socket is watched: connections that come for one request and go are not.
const WAITS_MIN: u8 = 4;

/// So many receives while events do not pay, and the watch is ended.
const BUSY_MAX: u8 = 64;

/// Events after which a short receive need not have taken all.
const DIVIDED: u32 = (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) as u32;

/// A socket's watch, in the hands of a fiber of the worker that has it.
pub(crate) struct Watched<'a> {
    worker: &'static Worker,
    fiber: FiberRef,
    inflight: &'a InFlight,
    id: WatchId,
}

/// Why there are no events.
pub(crate) enum NoEvents {
    /// The watch has ended, or another fiber waits for it: the ring does without.
    Unwatched,
    /// The wait ended early: a code as of [`suspend`](super::suspend).
    Ended(i32),
}

impl<'a> Watched<'a> {
    /// The socket's watch; `None` where there is none that the caller can use.
    #[inline(always)]
    pub(crate) fn of(inflight: &'a InFlight) -> Option<Watched<'a>> {
        let id = inflight.watch()?;
        let (worker, fiber) = current()?;
        let is_free = fiber.interrupt.get() == 0 && !std::thread::panicking();
        (is_free && inflight.is_owned_by(worker) && inflight.is_watchable()).then_some(Watched {
            worker,
            fiber,
            inflight,
            id,
        })
    }

    /// [`of`](Watched::of), of a socket on which a receive waits, with a new watch if that has happened often enough while events
    /// paid.
    #[inline(never)]
    pub(crate) fn begin_if_it_pays(inflight: &'a InFlight, fd: RawFd) -> Option<Watched<'a>> {
        let (worker, _) = current()?;
        if !events_pay(worker) {
            return None;
        }
        Watched::begin(inflight, fd)
    }

    /// [`of`](Watched::of), with a new watch if receives have waited often enough.
    pub(crate) fn begin(inflight: &'a InFlight, fd: RawFd) -> Option<Watched<'a>> {
        let (worker, fiber) = current()?;
        let may_use = fiber.interrupt.get() == 0 && !std::thread::panicking();
        if !may_use
            || !inflight.is_owned_by(worker)
            || inflight.is_closed()
            || !inflight.is_watchable()
        {
            return None;
        }
        if let Some(id) = inflight.watch() {
            let is_over = worker.driver.with(|driver| driver.forget_watch_if_over(id));
            if !is_over {
                return Watched::of(inflight);
            }
            // The kernel has ended it, or an end took its time: another one begins as the first did.
            inflight.set_watch(None);
            inflight.set_waits(0);
        }
        if inflight.count_wait() < WAITS_MIN {
            return None;
        }
        let id = worker.driver.with(|driver| driver.watch(fd))?;
        inflight.set_watch(Some(id));
        inflight.set_waits(BUSY_MAX);
        Watched::of(inflight)
    }

    /// Whether a receive is better off with the watch. After many that are not, it is ended.
    #[inline(always)]
    pub(crate) fn pays(&self) -> bool {
        events_pay(self.worker) || self.pays_still()
    }

    #[inline(never)]
    fn pays_still(&self) -> bool {
        if self.inflight.count_busy() > 0 {
            return true;
        }
        end_here(self.inflight);
        false
    }

    /// Waits, no longer than `limit`, until there may be something to receive: what was told.
    #[inline(always)]
    pub(crate) fn events(&self, limit: &mut Limit) -> Result<u32, NoEvents> {
        match self.told(limit) {
            Told::Waits(key) => self.wait(key),
            Told::Events(events) if self.worker.may_call_again() => Ok(events),
            Told::Events(events) => self.in_turn(events, limit),
            Told::Unwatched => Err(NoEvents::Unwatched),
        }
    }

    #[inline(always)]
    fn told(&self, limit: &mut Limit) -> Told {
        self.worker
            .driver
            .with(|driver| driver.events_or_wait(self.id, self.fiber.slot, limit))
    }

    /// Lets the others go first, after many calls in a row. What was told is theirs, too: one that begins to wait meanwhile would
    /// not hear of it.
    #[cold]
    #[inline(never)]
    fn in_turn(&self, events: u32, limit: &mut Limit) -> Result<u32, NoEvents> {
        self.keep(events);
        self.fiber.roused.set(false);
        yield_fiber(self.worker, self.fiber);
        if self.fiber.roused.get() {
            return Err(NoEvents::Ended(-libc::ECANCELED));
        }
        if self.fiber.interrupt.get() != 0 {
            return Err(NoEvents::Unwatched);
        }
        self.events(limit)
    }

    #[inline(always)]
    fn wait(&self, key: Key) -> Result<u32, NoEvents> {
        let (worker, fiber) = (self.worker, self.fiber);
        fiber.key.set(key);
        fiber.state.set(State::Watching);
        let place = self.inflight.enter(worker, key, Direction::In);
        fiber.switch_out();
        self.inflight.leave(worker, place, key, Direction::In);
        let told = fiber.completion.get().res;
        if told < 0 {
            worker
                .driver
                .with(|driver| driver.forgo_event(self.id, key));
            return Err(NoEvents::Ended(self.ended_early(told)));
        }
        Ok(told as u32)
    }

    /// Who ended the wait.
    #[cold]
    #[inline(never)]
    fn ended_early(&self, code: i32) -> i32 {
        if self.inflight.is_closed() {
            return -libc::EBADF;
        }
        match interrupted(self.worker, self.fiber) {
            Some(code) => code,
            None if code == -libc::ETIME => outcome::TIMED_OUT,
            None => -libc::ECANCELED,
        }
    }

    /// After a receive: keeps the events, unless it has taken all that was there. `is_short`: it could have taken more.
    #[inline(always)]
    pub(crate) fn received(&self, events: u32, is_short: bool) {
        if !is_short || is_divided(events) {
            self.keep(events);
        }
        if events == SECOND_LOOK {
            found_untold(self.inflight);
        }
    }

    /// After a receive that found nothing: the wait that follows needs no second look. False if there must not be one: whoever
    /// interrupted the fiber between the end of its last wait and its turn has not been answered yet.
    #[inline]
    pub(crate) fn found_nothing(&self) -> bool {
        self.worker
            .driver
            .with(|driver| driver.found_nothing(self.id));
        self.fiber.interrupt.get() == 0
    }

    /// The events are true still.
    #[inline]
    fn keep(&self, events: u32) {
        self.worker
            .driver
            .with(|driver| driver.keep_events(self.id, events));
    }
}

/// After a receive that found something at a second look: where nothing had been told of it, and nothing is about to be, the socket
/// is not watched any more.
#[cold]
#[inline(never)]
pub(crate) fn found_untold(inflight: &InFlight) {
    // A worker that is busy may come to look after something has come and before it was told.
    if current().is_some_and(|(worker, _)| !worker.driver.with(|driver| driver.has_completions())) {
        inflight.never_watch();
    }
}

/// For a stream that is received from no longer, with something perhaps left: the next receive looks first.
pub(crate) fn keep_for_the_next(inflight: &InFlight) {
    if let (Some(id), Some(worker)) = (inflight.watch(), super::worker())
        && inflight.is_owned_by(worker)
    {
        let events = libc::POLLIN as u32;
        worker.driver.with(|driver| driver.keep_events(id, events));
    }
}

/// Whether receives had better wait for events just now.
///
/// With little to do, a plain try before would find nothing; in a crowd, events bring a few fibers at a time, in the order in which
/// their data came: with 1,024 connections of 64 bytes in bursts TCP costs 1.07 × what epoll does, Unix sockets 1.11, through the ring
/// 1.15 and 1.29. (Where thousands are busy without pause, the ring, which does one kind of work at a time, is cheaper by an eighth, and p99
/// with it longer by half: `benches/GAINS.md`.) In between a worker comes round when its peers have answered, and the try that finds
/// something is cheaper (64 connections: 0.99 × against 1.02 ×).
#[inline(always)]
fn events_pay(worker: &Worker) -> bool {
    worker.is_quiet() || worker.is_crowded()
}

/// Whether a short receive after these events need not have taken all.
#[inline(always)]
pub(crate) fn is_divided(events: u32) -> bool {
    events & DIVIDED != 0
}

/// Ends the watch of a socket whose last handle goes: at once on its worker, else as soon as that comes round.
#[inline]
pub(crate) fn end(inflight: &InFlight) {
    if inflight.watch().is_some() {
        end_somewhere(inflight);
    }
}

#[cold]
#[inline(never)]
fn end_somewhere(inflight: &InFlight) {
    if end_here(inflight) {
        return;
    }
    if let (Some(id), Some(owner)) = (inflight.watch(), inflight.owner_remote()) {
        // A worker that has ended has ended its watches.
        let _ = owner.send(super::remote::Control::Run(Box::new(move |worker| {
            worker.end_watch(id);
        })));
    }
}

/// Whether the socket is not watched any more: ended just now, on its worker, or before.
pub(crate) fn end_here(inflight: &InFlight) -> bool {
    let Some(id) = inflight.watch() else {
        return true;
    };
    match super::worker() {
        Some(worker) if inflight.is_owned_by(worker) => {
            if worker.end_watch(id) {
                inflight.set_watch(None);
            }
            inflight.watch().is_none()
        }
        _ => false,
    }
}
