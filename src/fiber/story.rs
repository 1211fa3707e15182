//! A story of socket calls that bytes choose, over the scripted driver: what the fuzz target `socket_calls` plays, and a unit test
//! with random bytes.
//!
//! Up to four fibers, the players, share up to three streams and a listener. Each makes its calls one after the other, while the
//! others make theirs, and may be cancelled at any time. In the end the main fiber cancels who is left, or just returns, so that
//! the shutdown ends them, or it waits: then no call is made that could wait for ever. What must hold, whatever is called and whatever the kernel chooses:
//!
//! - each byte that came is in one place: received, arrived or to come, in order (between two receives at once, each byte once);
//! - what was sent is what the peer gets, in order, and as much as the call said;
//! - a call ends with what it could do, or an error for which there was a reason;
//! - a connection is accepted once, or is still in the backlog;
//! - every fiber ends, no operation is left, every descriptor is closed once, with nothing in flight, and every lease comes home.
//!
//! # The bytes
//!
//! ```text
//!  0     bits 0-1: streams; 2: faults; 3: the main fiber returns early; 4-6: connections that will come
//!  1     how long the players have; 255: as long as it takes
//!  2-4   how many bytes the streams' peers send
//!  5     the seed of the kernel's choices beyond the bytes
//!  6     how many calls
//!        three bytes a call: who and what, on which stream and how, how much
//!        the rest: the kernel's choices
//! ```

use std::cell::{Cell, RefCell};
use std::ops::Deref;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::time::Duration;

use super::join::{JoinError, JoinHandle, spawn};
use super::ready::{wait_readable, wait_writable};
use super::{simulated, sleep, timeout, yield_now};
use crate::buf::Buf;
use crate::constants::{MSG_DONTWAIT, MSG_PEEK, MSG_WAITALL};
use crate::driver::scripted::{Peer, Random, World};
use crate::error::{Error, Result};
use crate::socket::Socket;

const PLAYERS: usize = 4;
const CALLS_MAX: usize = 32;

/// The second byte for as long as it takes.
pub(crate) const PATIENT: u8 = 255;

/// How a story ends.
#[derive(Clone, Copy)]
enum End {
    /// All players have made their calls.
    Awaited,
    /// Those who are left after so long are cancelled.
    Cancel(Duration),
    /// The runtime ends after so long.
    Shutdown(Duration),
}

/// What ended calls, other than success: how often a story saw each.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ending {
    Timeout,
    WouldBlock,
    Closed,
    Cancelled,
    Shutdown,
    Broken,
    NotAccepted,
}

/// How many endings there are.
pub(crate) const ENDINGS: usize = Ending::NotAccepted as usize + 1;

/// Plays the story of these bytes, and panics if it goes wrong: how often each [`Ending`] was seen, and how many operations there
/// were.
pub(crate) fn socket_calls(data: &[u8]) -> ([u64; ENDINGS], u64) {
    let Some((head, rest)) = data.split_first_chunk::<7>() else {
        return ([0; ENDINGS], 0);
    };
    let [shape, patience, lengths @ .., seed, count] = *head;
    let (calls, _) = rest.as_chunks::<3>();
    let calls = &calls[..calls.len().min(usize::from(count) % (CALLS_MAX + 1))];
    let choices = rest[calls.len() * 3..].to_vec();
    let world = World::new(Random::given(choices, u64::from(seed)));
    world.borrow_mut().has_faults = shape & 4 != 0;
    let connections = usize::from(shape >> 4 & 7);
    let streams = lengths[..1 + usize::from(shape & 3).min(2)].iter();
    let stage = Rc::new(Stage {
        streams: streams
            .enumerate()
            .map(|(index, len)| Stream::new(&world, index as u8, *len))
            .collect(),
        listener: Listener::new(&world, connections),
        players: Default::default(),
        is_cancelled: Default::default(),
        is_ending: Cell::new(false),
        has_leased: Cell::new(false),
        began: Cell::new(0),
        ended: Cell::new(0),
        seen: Default::default(),
        world: world.clone(),
    });
    let mut parts: [Vec<[u8; 3]>; PLAYERS] = Default::default();
    for call in calls {
        parts[usize::from(call[0] >> 6)].push(*call);
    }
    let on_stage = stage.clone();
    let end = match patience {
        PATIENT => End::Awaited,
        _ if shape & 8 != 0 => End::Shutdown(Duration::from_nanos(square(patience))),
        _ => End::Cancel(Duration::from_nanos(square(patience))),
    };
    let ((), operations) =
        simulated::run(&world, "this story", move |_| on_stage.direct(parts, end));
    let Ok(stage) = Rc::try_unwrap(stage) else {
        panic!("somebody is still on the stage");
    };
    (stage.check(connections), operations)
}

/// Small numbers in small steps, up to 65,025.
fn square(byte: u8) -> u64 {
    u64::from(byte) * u64::from(byte)
}

/// What all players share.
struct Stage {
    world: Rc<RefCell<World>>,
    streams: Vec<Stream>,
    listener: Listener,
    players: RefCell<[Option<JoinHandle<()>>; PLAYERS]>,
    is_cancelled: [Rc<Cell<bool>>; PLAYERS],
    /// The main fiber returns, so that calls end with `Shutdown`.
    is_ending: Cell<bool>,
    has_leased: Cell<bool>,
    began: Cell<usize>,
    ended: Cell<usize>,
    seen: [Cell<u64>; ENDINGS],
}

/// What may end the calls of a socket beside success.
struct Modes {
    fd: RawFd,
    socket: Socket,
    was_timed: Cell<bool>,
    was_nonblocking: Cell<bool>,
    is_closed: Cell<bool>,
    is_shut: Cell<bool>,
}

struct Stream {
    modes: Modes,
    /// The peer's n-th byte is n ^ key.
    key: u8,
    len: usize,
    /// By place in the stream.
    received: RefCell<[bool; 256]>,
    received_count: Cell<usize>,
    /// Receives under way, and that there ever were.
    receiving: Cell<usize>,
    receives: Cell<u64>,
    /// By player.
    sent: [Cell<usize>; PLAYERS],
}

struct Listener {
    modes: Modes,
    accepted: RefCell<Vec<RawFd>>,
}

impl Modes {
    fn new(fd: RawFd) -> Modes {
        Modes::of(Socket::simulated(fd))
    }

    fn of(socket: Socket) -> Modes {
        Modes {
            fd: socket.fileno(),
            socket,
            was_timed: Cell::new(false),
            was_nonblocking: Cell::new(false),
            is_closed: Cell::new(false),
            is_shut: Cell::new(false),
        }
    }

    fn close(&self) {
        self.is_closed.set(true);
        assert_eq!(self.socket.close(), Ok(()));
    }
}

impl Stream {
    fn new(world: &RefCell<World>, index: u8, len: u8) -> Stream {
        let key = index * 0x55;
        let bytes: Vec<u8> = (0..len).map(|n| n ^ key).collect();
        Stream {
            modes: Modes::new(world.borrow_mut().stream(&bytes)),
            key,
            len: bytes.len(),
            received: RefCell::new([false; 256]),
            received_count: Cell::new(0),
            receiving: Cell::new(0),
            receives: Cell::new(0),
            sent: Default::default(),
        }
    }

    /// The places of what came, in one piece if nobody else was receiving.
    fn check_order(&self, bytes: &[u8], is_alone: bool) {
        let mut next = is_alone.then(|| self.received_count.get());
        let mut last = None;
        for byte in bytes {
            let place = usize::from(byte ^ self.key);
            assert!(place < self.len, "a byte that nobody sent");
            assert!(last.is_none_or(|last| last < place), "out of order");
            if let Some(next) = &mut next {
                assert_eq!(place, *next, "not what comes next");
                *next += 1;
            }
            last = Some(place);
        }
    }

    fn take(&self, bytes: &[u8]) {
        let mut received = self.received.borrow_mut();
        for byte in bytes {
            let place = &mut received[usize::from(byte ^ self.key)];
            assert!(!std::mem::replace(place, true), "a byte came twice");
        }
        self.received_count
            .set(self.received_count.get() + bytes.len());
    }

    /// Once all is over.
    fn check(&self, peer: &Peer) {
        let rest = [&peer.arrived, &peer.to_come, &peer.unsent];
        let rest: Vec<u8> = rest.into_iter().flatten().map(|n| n ^ self.key).collect();
        let received = self.received_count.get();
        let expected: Vec<u8> = (received..self.len).map(|n| n as u8).collect();
        assert_eq!(rest, expected, "the bytes that were not received");
        let received = &self.received.borrow()[..received];
        assert!(received.iter().all(|is| *is), "a byte was lost");
        let mut counts = [0usize; PLAYERS];
        for byte in &peer.taken {
            let count = &mut counts[usize::from(byte >> 6)];
            assert_eq!(usize::from(byte & 63), *count & 63, "sent out of order");
            *count += 1;
        }
        assert_eq!(counts, self.sent.each_ref().map(Cell::get), "sent");
    }
}

impl Listener {
    fn new(world: &RefCell<World>, connections: usize) -> Listener {
        Listener {
            modes: Modes::new(world.borrow_mut().listener(connections)),
            accepted: RefCell::new(Vec::new()),
        }
    }
}

impl Stage {
    /// The main fiber: has the players play for a while, and then no longer.
    fn direct(self: &Rc<Self>, parts: [Vec<[u8; 3]>; PLAYERS], end: End) {
        for (number, calls) in parts.into_iter().enumerate() {
            if calls.is_empty() {
                continue;
            }
            self.began.set(self.began.get() + 1);
            let mut player = Player {
                stage: self.clone(),
                number,
                is_awaited: matches!(end, End::Awaited),
                is_cancelled: self.is_cancelled[number].clone(),
                leases: Vec::new(),
                connections: Vec::new(),
            };
            let handle = spawn(move || player.play(&calls));
            self.players.borrow_mut()[number] = Some(handle);
        }
        if let End::Cancel(patience) | End::Shutdown(patience) = end {
            sleep(patience).unwrap();
        }
        if !matches!(end, End::Shutdown(_)) {
            for number in 0..PLAYERS {
                if let End::Cancel(_) = end {
                    self.cancel(number);
                }
                let handle = self.players.borrow_mut()[number].take();
                if let Some(handle) = handle {
                    handle.join().unwrap();
                }
            }
            // The first look would map them.
            if self.has_leased.get() {
                let buffers = &super::worker().unwrap().buffers;
                let all: Vec<_> = std::iter::from_fn(|| buffers.take()).collect();
                assert_eq!(all.len(), simulated::BUFFERS.0, "a lease did not come home");
            }
        }
        // Whoever is left goes on without a handle, until the shutdown.
        self.players.take();
        self.is_ending.set(true);
    }

    fn cancel(&self, number: usize) {
        if let Some(handle) = &self.players.borrow()[number]
            && !handle.is_finished()
        {
            self.is_cancelled[number].set(true);
            handle.cancel();
        }
    }

    fn check(self, connections: usize) -> [u64; ENDINGS] {
        assert_eq!(self.ended.get(), self.began.get(), "a player did not end");
        let Stage {
            world,
            streams,
            listener,
            seen,
            ..
        } = self;
        {
            let world = world.borrow();
            for stream in &streams {
                stream.check(&world.peers[&stream.modes.fd]);
            }
            let mut accepted = listener.accepted.take();
            accepted.sort_unstable();
            accepted.dedup();
            let peer = &world.peers[&listener.modes.fd];
            assert_eq!(peer.accepted, accepted.len(), "accepted, not returned");
            let left = peer.connections_to_come + peer.backlog + peer.given_up;
            assert_eq!(accepted.len() + left, connections, "a connection was lost");
        }
        drop((streams, listener));
        let world = world.borrow();
        let is_closed = |peer: &Peer| peer.is_closed;
        assert!(world.peers.values().all(is_closed), "a descriptor was left");
        seen.map(Cell::into_inner)
    }
}

/// What a call's arguments allow.
#[derive(Clone, Copy, Default)]
struct Terms {
    /// It is made inside a `timeout` of so many nanoseconds.
    limit_ns: Option<u64>,
    /// MSG_DONTWAIT.
    dont_wait: bool,
    /// MSG_PEEK.
    peeks: bool,
}

struct Player {
    stage: Rc<Stage>,
    number: usize,
    /// It is to make no call that may wait for ever.
    is_awaited: bool,
    is_cancelled: Rc<Cell<bool>>,
    leases: Vec<(Vec<u8>, Buf)>,
    connections: Vec<Modes>,
}

impl Player {
    fn play(&mut self, calls: &[[u8; 3]]) {
        for call in calls {
            self.call(*call);
        }
        self.release_leases();
        self.stage.ended.set(self.stage.ended.get() + 1);
    }

    /// A fiber beside this player, which makes its calls for it.
    fn fellow(&self) -> Player {
        Player {
            stage: self.stage.clone(),
            number: self.number,
            is_awaited: self.is_awaited,
            is_cancelled: Rc::new(Cell::new(false)),
            leases: Vec::new(),
            connections: Vec::new(),
        }
    }

    fn call(&mut self, [what, how, amount]: [u8; 3]) {
        let stage = self.stage.clone();
        let which = usize::from(how & 3) % stage.streams.len();
        let modes = &stage.streams[which].modes;
        let size = usize::from(amount);
        let plain = Terms::default();
        let timed = Terms {
            limit_ns: Some(square(how >> 2)),
            ..plain
        };
        let dont_wait = Terms {
            dont_wait: true,
            ..plain
        };
        let limit = Duration::from_nanos(square(how >> 2));
        match what & 0x3f {
            0..4 => self.send(which, size, plain, |socket, bytes| socket.send(bytes)),
            4..7 => self.sendall(which, size, plain, |socket, bytes| socket.sendall(bytes)),
            7 => self.sendall(which, size, timed, |socket, bytes| {
                timeout(limit, || socket.sendall(bytes))
            }),
            8 => self.send(which, size, timed, |socket, bytes| {
                timeout(limit, || socket.send(bytes))
            }),
            9 => {
                self.send(which, size, dont_wait, |socket, bytes| {
                    socket.send_with(bytes, MSG_DONTWAIT)
                });
            }
            10..14 => self.receive_lease(which, size),
            14..18 => self.receive_into(which, size, plain),
            18 => self.receive_into(which, size, timed),
            19 => {
                self.receive(which, size, timed, |socket| {
                    timeout(limit, || socket.recv(size))
                });
            }
            20 => {
                let peeks = Terms {
                    peeks: true,
                    ..plain
                };
                self.receive(which, size, peeks, |socket| {
                    socket.recv_with(size, MSG_PEEK)
                });
            }
            21 => {
                self.receive(which, size, plain, |socket| {
                    socket.recv_with(size, MSG_WAITALL)
                });
            }
            22 => {
                self.receive(which, size, timed, |socket| {
                    timeout(limit, || socket.recv_with(size, MSG_WAITALL))
                });
            }
            23 => {
                self.receive(which, size, dont_wait, |socket| {
                    socket.recv_with(size, MSG_DONTWAIT)
                });
            }
            24 => self.receive_beside(which, size, |fellow, is_cancelled| {
                yield_now();
                is_cancelled.set(true);
                fellow.cancel();
            }),
            25 => self.receive_beside(which, size, |_, _| modes.close()),
            26 => self.receive_beside(which, size, |_, _| self.receive_into(which, size, plain)),
            27 => {
                // The join ends before the fiber does, which goes on by itself.
                let fellow = self.fellow();
                let fellow = spawn(move || fellow.receive_into(which, size, plain));
                match timeout(limit, || Ok(fellow.join())) {
                    Ok(Err(JoinError::Interrupted(error))) => {
                        self.check_error(&error, modes, timed);
                    }
                    other => other.unwrap().unwrap(),
                }
            }
            28..31 if !self.is_awaited => self.accept(plain, |socket| socket.accept()),
            28..32 => self.accept(timed, |socket| timeout(limit, || socket.accept())),
            32 => {
                let modes = self.modes_of(how);
                modes.was_timed.set(true);
                let result = modes
                    .socket
                    .settimeout(Duration::from_nanos(1 + square(amount)));
                self.check_unit(result, modes, plain);
            }
            33 => {
                let modes = self.modes_of(how);
                self.check_unit(modes.socket.setblocking(true), modes, plain);
            }
            34 => {
                let modes = self.modes_of(how);
                modes.was_nonblocking.set(true);
                self.check_unit(modes.socket.setblocking(false), modes, plain);
            }
            35 | 36 => self.check_unit(
                sleep(Duration::from_nanos(square(amount))),
                modes,
                Terms::default(),
            ),
            37 => self.check_unit(timeout(limit, || sleep(None)), modes, timed),
            38..41 => yield_now(),
            41 => stage.cancel(usize::from(amount) % PLAYERS),
            42 => {
                modes.is_shut.set(true);
                let result = modes.socket.shutdown(i32::from(amount % 3));
                self.check_unit(result, modes, plain);
            }
            43 => self.modes_of(how).close(),
            44 => self.release_leases(),
            45 => drop(self.connections.pop()),
            46 => {
                // The peer of an accepted connection has nothing to say.
                if let Some(connection) = self.connections.last() {
                    let mut buffer = [0; 16];
                    match connection.socket.recv_into(&mut buffer) {
                        Ok(count) => assert_eq!(count, 0, "bytes from nowhere"),
                        Err(error) => self.check_error(&error, connection, plain),
                    }
                }
            }
            47 => self.check_unit(wait_readable(&modes.socket), modes, plain),
            48 => self.check_unit(wait_writable(&modes.socket), modes, plain),
            49 => {
                self.receive(which, 1, plain, |socket| {
                    let next = socket.chunks().next();
                    next.unwrap_or_else(|| Ok(Buf::default()))
                });
            }
            50..53 => self.close_silence(amount),
            _ => self.receive_lease(which, 1 + size % simulated::BUFFERS.1),
        }
    }

    /// A stream's socket or the listener.
    fn modes_of(&self, how: u8) -> &Modes {
        match self.stage.streams.get(usize::from(how & 3)) {
            Some(stream) => &stream.modes,
            None => &self.stage.listener.modes,
        }
    }

    fn send(
        &self,
        which: usize,
        size: usize,
        terms: Terms,
        call: impl FnOnce(&Socket, &[u8]) -> Result<usize>,
    ) {
        let (result, taken) = self.sending(which, size, |socket, bytes| call(socket, bytes));
        let modes = &self.stage.streams[which].modes;
        match result {
            Ok(count) => {
                assert_eq!(count, taken, "what send reported");
                if !self.is_disturbed(modes, terms) {
                    assert_eq!(count, size, "a send in blocking mode ends with the whole");
                }
            }
            Err(error) => {
                assert_eq!(taken, 0, "{error}, and some were taken");
                self.check_error(&error, modes, terms);
            }
        }
    }

    fn sendall(
        &self,
        which: usize,
        size: usize,
        terms: Terms,
        call: impl FnOnce(&Socket, &[u8]) -> Result<()>,
    ) {
        let (result, taken) = self.sending(which, size, call);
        match result {
            Ok(()) => assert_eq!(taken, size, "sendall"),
            Err(error) => {
                assert!(taken <= size);
                self.check_error(&error, &self.stage.streams[which].modes, terms);
            }
        }
    }

    /// A send of this player's next bytes, which bear its number: the result, and how many of them the peer got.
    fn sending<T>(
        &self,
        which: usize,
        size: usize,
        call: impl FnOnce(&Socket, &[u8]) -> T,
    ) -> (T, usize) {
        let stream = &self.stage.streams[which];
        let before = stream.sent[self.number].get();
        let mark = (self.number as u8) << 6;
        let bytes: Vec<u8> = (before..before + size)
            .map(|n| mark | n as u8 & 63)
            .collect();
        let result = call(&stream.modes.socket, &bytes);
        let world = self.stage.world.borrow();
        let taken = world.peers[&stream.modes.fd].taken.iter();
        let after = taken
            .filter(|byte| **byte >> 6 == self.number as u8)
            .count();
        stream.sent[self.number].set(after);
        (result, after - before)
    }

    fn receive_lease(&mut self, which: usize, size: usize) {
        let received = self.receive(which, size, Terms::default(), |socket| socket.recv(size));
        if let Some(buf) = received {
            self.stage.has_leased.set(true);
            self.leases.push((buf.to_vec(), buf));
        }
        if self.leases.len() > 2 {
            self.release_leases();
        }
    }

    /// Nobody has touched what was held.
    fn release_leases(&mut self) {
        for (was, is) in self.leases.drain(..) {
            assert_eq!(is, was, "a lease changed");
        }
    }

    fn receive_into(&self, which: usize, size: usize, terms: Terms) {
        self.receive(which, size, terms, |socket| {
            let mut buffer = vec![0; size];
            let count = match terms.limit_ns {
                Some(ns) => timeout(Duration::from_nanos(ns), || socket.recv_into(&mut buffer))?,
                None => socket.recv_into(&mut buffer)?,
            };
            buffer.truncate(count);
            Ok(buffer)
        });
    }

    /// A receive by another fiber, beside which this one does something.
    fn receive_beside(
        &self,
        which: usize,
        size: usize,
        beside: impl FnOnce(&JoinHandle<()>, &Cell<bool>),
    ) {
        let fellow = self.fellow();
        let is_cancelled = fellow.is_cancelled.clone();
        let handle = spawn(move || fellow.receive_into(which, size, Terms::default()));
        beside(&handle, &is_cancelled);
        self.join(handle, &self.stage.streams[which].modes);
    }

    /// Closes a socket while another fiber receives, or will receive, from a peer that says nothing: both end.
    fn close_silence(&self, amount: u8) {
        let fd = self.stage.world.borrow_mut().silence();
        let modes = Rc::new(Modes::new(fd));
        let fellow = self.fellow();
        let handle = spawn({
            let modes = modes.clone();
            move || {
                let mut buffer = [0; 8];
                match modes.socket.recv_into(&mut buffer) {
                    Ok(_) => panic!("something from a silent peer"),
                    Err(error) => fellow.check_error(&error, &modes, Terms::default()),
                }
            }
        });
        for _ in 0..amount % 4 {
            yield_now();
        }
        modes.close();
        self.join(handle, &modes);
    }

    /// Waits for a fellow, who calls this socket.
    fn join(&self, fellow: JoinHandle<()>, modes: &Modes) {
        match fellow.join() {
            Err(JoinError::Interrupted(error)) => {
                self.check_error(&error, modes, Terms::default());
            }
            other => other.unwrap(),
        }
    }

    fn receive<B: Deref<Target = [u8]>>(
        &self,
        which: usize,
        size: usize,
        terms: Terms,
        call: impl FnOnce(&Socket) -> Result<B>,
    ) -> Option<B> {
        let stream = &self.stage.streams[which];
        stream.receiving.set(stream.receiving.get() + 1);
        stream.receives.set(stream.receives.get() + 1);
        let (receiving, receives) = (stream.receiving.get(), stream.receives.get());
        let result = call(&stream.modes.socket);
        stream.receiving.set(stream.receiving.get() - 1);
        let is_alone = receiving == 1 && receives == stream.receives.get();
        let bytes = match result {
            Ok(bytes) => bytes,
            Err(error) => {
                self.check_error(&error, &stream.modes, terms);
                return None;
            }
        };
        assert!(bytes.len() <= size.max(simulated::BUFFERS.1), "too many");
        stream.check_order(&bytes, is_alone);
        if !terms.peeks {
            stream.take(&bytes);
        }
        if bytes.is_empty() && size > 0 && !stream.modes.is_closed.get() {
            let world = self.stage.world.borrow();
            let peer = &world.peers[&stream.modes.fd];
            let is_over = peer.to_come.is_empty() || stream.modes.is_shut.get();
            assert!(peer.arrived.is_empty() && is_over, "not the end");
        }
        Some(bytes)
    }

    fn accept(
        &mut self,
        terms: Terms,
        call: impl FnOnce(&Socket) -> Result<(Socket, crate::Address)>,
    ) {
        let listener = &self.stage.listener;
        match call(&listener.modes.socket) {
            Ok((connection, _)) => {
                let connection = Modes::of(connection);
                listener.accepted.borrow_mut().push(connection.fd);
                self.connections.push(connection);
            }
            Err(error) => self.check_error(&error, &listener.modes, terms),
        }
    }

    fn check_unit(&self, result: Result<()>, modes: &Modes, terms: Terms) {
        if let Err(error) = result {
            self.check_error(&error, modes, terms);
        }
    }

    /// Whether anything may have ended a call of the socket that waits, other than success.
    fn is_disturbed(&self, modes: &Modes, terms: Terms) -> bool {
        terms.limit_ns.is_some()
            || terms.dont_wait
            || modes.was_timed.get()
            || modes.was_nonblocking.get()
            || modes.is_closed.get()
            || modes.is_shut.get()
            || self.is_cancelled.get()
            || self.stage.is_ending.get()
            || self.stage.world.borrow().has_faults
    }

    /// There was a reason for the error.
    fn check_error(&self, error: &Error, modes: &Modes, terms: Terms) {
        let world = self.stage.world.borrow();
        let (ending, has_reason) = match error {
            Error::Timeout => (
                Ending::Timeout,
                terms.limit_ns.is_some() || modes.was_timed.get(),
            ),
            Error::Cancelled => (Ending::Cancelled, self.is_cancelled.get()),
            Error::Shutdown => (Ending::Shutdown, self.stage.is_ending.get()),
            error if error.is_would_block() => (
                Ending::WouldBlock,
                terms.dont_wait || modes.was_nonblocking.get(),
            ),
            error if error.is_closed() => (Ending::Closed, modes.is_closed.get()),
            error => match error.errno() {
                Some(libc::EPIPE | libc::ECONNRESET) => (
                    Ending::Broken,
                    modes.is_shut.get() || world.peers[&modes.fd].is_reset,
                ),
                Some(libc::EMFILE) => (Ending::NotAccepted, world.has_faults),
                _ => panic!("{error}"),
            },
        };
        assert!(has_reason, "{error}, for no reason");
        let seen = &self.stage.seen[ending as usize];
        seen.set(seen.get() + 1);
    }
}
