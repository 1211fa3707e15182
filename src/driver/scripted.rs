//! A driver without a kernel: sockets, timers and cancels simulated from a seed and a virtual clock, for tests and fuzzing.
//!
//! It stands under the real scheduler and the real socket methods, and does what a kernel may do at its worst moments: short
//! results, data exactly at a deadline, cancels that come too late, completions out of order, timer and cancel CQEs before or
//! after the operation's own, a submission queue that is full. The same seed plays the same story again.
//!
//! Plain calls on its descriptors (what `sys.rs` does) are answered here as well, see [`call`], so a socket in non-blocking mode,
//! one that is closed and one that is shut down behave as over a real kernel.
//!
//! What a [`World`] keeps is what the tests check against: every byte and every connection is in one place at a time.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::rc::{Rc, Weak};

use super::features::Features;
use super::op::{Op, Timespec};
use super::slab::{Completion, Key, TAG_CANCEL, TAG_TIMER};
use super::uring::Full;

/// Simulated descriptors start here, far above the limit of real ones, so that closing one closes nothing real.
const FD_FIRST: RawFd = 1 << 28;

/// More steps than any story needs: whoever still waits then has been forgotten.
const STEPS_MAX: usize = 100_000;

/// Deadlines so far away mean "never"; jumping there would end a sleep without end.
const NEVER_NS: i64 = i64::MAX / 8;

/// A stream of numbers: those of the bytes it is given, if any, and then those of a seed (xorshift64*).
pub(crate) struct Random {
    given: std::vec::IntoIter<u8>,
    state: u64,
}

impl Random {
    #[cfg(test)]
    pub(crate) fn new(seed: u64) -> Random {
        Random::given(Vec::new(), seed)
    }

    pub(crate) fn given(bytes: Vec<u8>, seed: u64) -> Random {
        Random {
            given: bytes.into_iter(),
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
        }
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number from 0 to `bound` - 1.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        match self.given.next() {
            Some(byte) if bound <= 256 => usize::from(byte) % bound,
            Some(byte) => {
                let more = self.given.next().unwrap_or(0);
                usize::from(u16::from_le_bytes([byte, more])) % bound
            }
            None => (self.next() % bound as u64) as usize,
        }
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// One simulated socket.
#[derive(Default)]
pub(crate) struct Peer {
    /// What the peer will send, in order, and then end the stream.
    pub(crate) to_come: VecDeque<u8>,
    /// What has arrived and was not received.
    pub(crate) arrived: VecDeque<u8>,
    /// What the peer would have sent, had it not reset the connection.
    pub(crate) unsent: VecDeque<u8>,
    /// How much more the socket's send buffer takes now.
    pub(crate) room: usize,
    /// Everything the socket took to send.
    pub(crate) taken: Vec<u8>,
    /// Connections that will come, those in the backlog, and those whose peer gave up.
    pub(crate) connections_to_come: usize,
    pub(crate) backlog: usize,
    pub(crate) given_up: usize,
    /// Connections handed out.
    pub(crate) accepted: usize,
    /// The peer has reset the connection.
    pub(crate) is_reset: bool,
    /// The descriptor was given back.
    pub(crate) is_closed: bool,
    reset_is_told: bool,
    /// Something else lies under the descriptor: see `sys::bury`.
    is_buried: bool,
    /// The peer sends nothing more, and does not end the stream.
    is_silent: bool,
    is_shut_in: bool,
    is_shut_out: bool,
    is_nonblocking: bool,
    listens: bool,
    /// Operations that were prepared and whose completion was not posted.
    in_flight: usize,
}

impl Peer {
    /// Whether nothing more will arrive.
    fn is_over(&self) -> bool {
        self.to_come.is_empty() && !self.is_silent || self.is_shut_in
    }

    fn readiness(&self) -> i16 {
        let can_receive = !self.arrived.is_empty() || self.is_over() && !self.listens;
        let mut events = 0;
        if can_receive || self.backlog > 0 {
            events |= libc::POLLIN;
        }
        if self.room > 0 || self.is_reset || self.is_shut_out {
            events |= libc::POLLOUT;
        }
        events
    }
}

/// Everything outside the program.
pub(crate) struct World {
    pub(crate) random: Random,
    pub(crate) now_ns: i64,
    pub(crate) peers: BTreeMap<RawFd, Peer>,
    /// Peers reset connections and give up waiting for an accept, descriptors run out, signals come between.
    pub(crate) has_faults: bool,
    next_fd: RawFd,
}

impl World {
    pub(crate) fn new(random: Random) -> Rc<RefCell<World>> {
        Rc::new(RefCell::new(World {
            random,
            now_ns: 1,
            peers: BTreeMap::new(),
            has_faults: false,
            next_fd: FD_FIRST,
        }))
    }

    /// A connected socket whose peer will send `to_come`: its descriptor.
    pub(crate) fn stream(&mut self, to_come: &[u8]) -> RawFd {
        self.add(Peer {
            to_come: to_come.iter().copied().collect(),
            ..Peer::default()
        })
    }

    /// A connected socket whose peer says nothing and stays: its descriptor.
    pub(crate) fn silence(&mut self) -> RawFd {
        self.add(Peer {
            is_silent: true,
            ..Peer::default()
        })
    }

    /// A listening socket to which so many connections will come: its descriptor.
    pub(crate) fn listener(&mut self, connections: usize) -> RawFd {
        self.add(Peer {
            connections_to_come: connections,
            listens: true,
            ..Peer::default()
        })
    }

    fn add(&mut self, peer: Peer) -> RawFd {
        let fd = self.next_fd;
        self.next_fd += 1;
        self.peers.insert(fd, peer);
        fd
    }

    /// Whether there is no socket under the descriptor.
    fn is_bad(&self, fd: RawFd) -> bool {
        let peer = self.peers.get(&fd);
        peer.is_none_or(|peer| peer.is_buried || peer.is_closed)
    }

    /// Something happens to one of the sockets: bytes arrive, the peer reads, a connection comes.
    fn happen(&mut self) {
        if self.peers.is_empty() {
            return;
        }
        let index = self.random.below(self.peers.len());
        let amount = 1 + self.random.below(64);
        let breaks = self.has_faults && self.random.one_in(64);
        let Some(peer) = self.peers.values_mut().nth(index) else {
            return;
        };
        if peer.listens {
            if breaks && peer.backlog > 0 {
                peer.backlog -= 1;
                peer.given_up += 1;
            } else if peer.connections_to_come > 0 {
                peer.connections_to_come -= 1;
                peer.backlog += 1;
            }
            return;
        }
        if breaks && !peer.is_reset && !peer.is_silent {
            peer.is_reset = true;
            peer.unsent.append(&mut peer.to_come);
        }
        if !peer.is_shut_in {
            for _ in 0..amount.min(peer.to_come.len()) {
                peer.arrived.extend(peer.to_come.pop_front());
            }
        }
        peer.room = (peer.room + amount).min(128);
    }

    /// An operation as a call that does not wait.
    fn attempt(&mut self, action: &mut Action) -> i32 {
        if self.random.one_in(3) {
            return -libc::EAGAIN;
        }
        if self.has_faults && self.random.one_in(64) {
            return -libc::EINTR;
        }
        action.forget_waitall();
        self.perform(action).unwrap_or(-libc::EAGAIN)
    }

    /// Does what can be done now; the result if that ends the operation.
    fn perform(&mut self, action: &mut Action) -> Option<i32> {
        let peer = match action.fd() {
            Some(fd) => self.peers.get_mut(&fd)?,
            None => &mut Peer::default(),
        };
        match action {
            Action::Recv {
                buffer,
                len,
                flags,
                done,
                ..
            } => {
                if peer.arrived.is_empty() {
                    if !peer.is_over() {
                        return None;
                    }
                    if *done == 0 && peer.is_reset && !peer.reset_is_told {
                        peer.reset_is_told = true;
                        return Some(-libc::ECONNRESET);
                    }
                    return Some(*done as i32);
                }
                let peeks = *flags & libc::MSG_PEEK != 0;
                let most = peer.arrived.len().min(*len - *done);
                let count = 1 + self.random.below(most);
                for at in 0..count {
                    let byte = match peeks {
                        true => peer.arrived[at],
                        false => peer.arrived.pop_front()?,
                    };
                    // SAFETY: `prepare`'s caller lent `len` bytes until this operation's completion is read (that of a call,
                    // for the call); done + count <= len.
                    unsafe { buffer.add(*done + at).write(byte) };
                }
                *done += count;
                let is_enough = peeks || *flags & libc::MSG_WAITALL == 0 || done == len;
                is_enough.then_some(*done as i32)
            }
            Action::Send {
                buffer,
                len,
                all,
                done,
                ..
            } => {
                if peer.is_reset || peer.is_shut_out {
                    return Some(match done {
                        0 => -libc::EPIPE,
                        done => *done as i32,
                    });
                }
                if *len == 0 {
                    return Some(0);
                }
                let most = peer.room.min(*len - *done);
                if most == 0 {
                    return None;
                }
                let count = 1 + self.random.below(most);
                // SAFETY: `prepare`'s caller lent `len` bytes until this operation's completion is read (that of a call, for the
                // call); done + count <= len.
                let bytes = unsafe { std::slice::from_raw_parts(buffer.add(*done), count) };
                peer.taken.extend_from_slice(bytes);
                peer.room -= count;
                *done += count;
                (!*all || done == len).then_some(*done as i32)
            }
            Action::Accept { .. } => {
                if peer.backlog == 0 {
                    return None;
                }
                if self.has_faults && self.random.one_in(32) {
                    return Some(-libc::EMFILE);
                }
                peer.backlog -= 1;
                peer.accepted += 1;
                Some(self.add(Peer::default()))
            }
            Action::Sleep { at_ns } => (*at_ns <= self.now_ns).then_some(-libc::ETIME),
            Action::Poll { events, .. } => {
                let ready = peer.readiness() & *events;
                // Now and then there is readiness and nothing to receive.
                if ready != 0 || self.random.one_in(16) {
                    return Some(i32::from(*events));
                }
                None
            }
            Action::Ready => Some(0),
        }
    }
}

thread_local! {
    /// The world of this thread's simulation.
    static WORLD: RefCell<Weak<RefCell<World>>> = const { RefCell::new(Weak::new()) };
}

/// A plain call on a descriptor of this thread's simulation; `None` for any other descriptor.
pub(crate) fn call(fd: RawFd, call: Call<'_>) -> Option<i32> {
    if fd < FD_FIRST {
        return None;
    }
    let world = WORLD.try_with(|world| world.borrow().upgrade()).ok()??;
    let world = &mut *world.borrow_mut();
    let peer = world.peers.get_mut(&fd)?;
    if let Call::Close = call {
        assert!(!peer.is_closed, "a descriptor was closed twice");
        assert_eq!(peer.in_flight, 0, "closed under an operation");
        peer.is_closed = true;
        return Some(0);
    }
    if peer.is_buried || peer.is_closed {
        return Some(-libc::EBADF);
    }
    let mut action = match call {
        Call::Recv(buffer, flags) => Action::Recv {
            fd,
            buffer: buffer.as_mut_ptr().cast(),
            len: buffer.len(),
            flags,
            done: 0,
        },
        Call::Send(buffer) => Action::Send {
            fd,
            buffer: buffer.as_ptr(),
            len: buffer.len(),
            all: false,
            done: 0,
        },
        Call::Accept => Action::Accept { fd },
        Call::Poll(events) => return Some(i32::from(peer.readiness() & events)),
        Call::Shutdown(how) => {
            peer.is_shut_in |= how != libc::SHUT_WR;
            peer.is_shut_out |= how != libc::SHUT_RD;
            return Some(0);
        }
        Call::SetNonblocking(nonblocking) => {
            peer.is_nonblocking = nonblocking;
            return Some(0);
        }
        Call::StatusFlags => {
            return Some(i32::from(peer.is_nonblocking) * libc::O_NONBLOCK);
        }
        Call::IsListening => return Some(i32::from(peer.listens)),
        Call::Bury => {
            peer.is_buried = true;
            return Some(fd);
        }
        Call::Close => unreachable!("answered above"),
    };
    Some(world.attempt(&mut action))
}

/// What `sys.rs` may be asked to do with a simulated descriptor.
pub(crate) enum Call<'a> {
    Recv(&'a mut [MaybeUninit<u8>], i32),
    Send(&'a [u8]),
    Accept,
    Poll(i16),
    Shutdown(i32),
    SetNonblocking(bool),
    StatusFlags,
    IsListening,
    Bury,
    Close,
}

/// What a pending operation does, with the memory it was lent.
#[derive(Clone, Copy)]
enum Action {
    Recv {
        fd: RawFd,
        buffer: *mut u8,
        len: usize,
        flags: i32,
        done: usize,
    },
    Send {
        fd: RawFd,
        buffer: *const u8,
        len: usize,
        all: bool,
        done: usize,
    },
    Accept {
        fd: RawFd,
    },
    Sleep {
        at_ns: i64,
    },
    Poll {
        fd: RawFd,
        events: i16,
    },
    Ready,
}

impl Action {
    fn fd(&self) -> Option<RawFd> {
        match self {
            Action::Recv { fd, .. }
            | Action::Send { fd, .. }
            | Action::Accept { fd }
            | Action::Poll { fd, .. } => Some(*fd),
            Action::Sleep { .. } | Action::Ready => None,
        }
    }

    /// How much of a transfer is done, which an early end reports.
    fn done(&self) -> usize {
        match self {
            Action::Recv { done, .. } | Action::Send { done, .. } => *done,
            _ => 0,
        }
    }

    fn forget_waitall(&mut self) {
        match self {
            Action::Recv { flags, .. } => *flags &= !libc::MSG_WAITALL,
            Action::Send { all, .. } => *all = false,
            _ => {}
        }
    }
}

struct Pending {
    key: u64,
    action: Action,
    /// Before it is submitted: a duration.
    deadline_ns: Option<i64>,
    cancelled: bool,
}

/// See the module's documentation.
pub(crate) struct Scripted {
    world: Rc<RefCell<World>>,
    prepared: Vec<Pending>,
    pending: Vec<Pending>,
    completions: VecDeque<(u64, Completion)>,
    features: Features,
}

impl Scripted {
    /// The driver of this thread's simulation, which takes the place of an earlier one.
    pub(crate) fn new(world: Rc<RefCell<World>>) -> Scripted {
        WORLD.set(Rc::downgrade(&world));
        Scripted {
            world,
            prepared: Vec::new(),
            pending: Vec::new(),
            completions: VecDeque::new(),
            features: Features::default(),
        }
    }

    pub(crate) fn features(&self) -> &Features {
        &self.features
    }

    pub(crate) fn now_ns(&self) -> i64 {
        self.world.borrow().now_ns
    }

    pub(crate) fn has_work(&self) -> bool {
        !self.prepared.is_empty() || !self.completions.is_empty()
    }

    /// # Safety
    ///
    /// As for [`Driver::submit`](super::Driver::submit).
    pub(crate) unsafe fn prepare(
        &mut self,
        op: &mut Op<'_>,
        key: Key,
        timeout: Option<&Timespec>,
    ) -> Result<(), Full> {
        let world = &mut *self.world.borrow_mut();
        if world.random.one_in(16) {
            return Err(Full);
        }
        let action = action(op);
        if let Some(peer) = action.fd().and_then(|fd| world.peers.get_mut(&fd)) {
            peer.in_flight += 1;
        }
        self.prepared.push(Pending {
            key: key.0,
            action,
            deadline_ns: timeout.map(duration_ns),
            cancelled: false,
        });
        Ok(())
    }

    pub(crate) fn cancel(&mut self, key: Key) {
        let all = self.pending.iter_mut().chain(&mut self.prepared);
        let mut found = false;
        for pending in all.filter(|pending| pending.key == key.0) {
            pending.cancelled = true;
            found = true;
        }
        let res = if found { 0 } else { -libc::ENOENT };
        self.post(TAG_CANCEL, res);
    }

    /// Runs `op` at once, as far as it goes.
    pub(crate) fn attempt(&mut self, op: &mut Op<'_>) -> i32 {
        let mut action = action(op);
        let world = &mut *self.world.borrow_mut();
        if action.fd().is_some_and(|fd| world.is_bad(fd)) {
            return -libc::EBADF;
        }
        world.attempt(&mut action)
    }

    pub(crate) fn enter(&mut self, wait: bool) {
        let now_ns = self.now_ns();
        for mut pending in std::mem::take(&mut self.prepared) {
            pending.deadline_ns = pending.deadline_ns.map(|ns| now_ns + ns);
            if let Action::Sleep { at_ns } = &mut pending.action {
                *at_ns += now_ns;
            }
            // The descriptor is looked up now; what is in flight holds the file.
            let fd = pending.action.fd();
            self.pending.push(pending);
            if fd.is_some_and(|fd| self.world.borrow().is_bad(fd)) {
                self.finish(self.pending.len() - 1, -libc::EBADF);
            }
        }
        let steps = self.world.borrow_mut().random.below(6);
        for _ in 0..steps {
            self.step();
        }
        let mut waited = 0;
        while wait && self.completions.is_empty() {
            self.step();
            waited += 1;
            assert!(
                waited < STEPS_MAX,
                "nothing will ever happen: {} operations pending",
                self.pending.len()
            );
        }
    }

    pub(crate) fn next(&mut self) -> Option<(u64, Completion)> {
        self.completions.pop_front()
    }

    fn step(&mut self) {
        let (choice, index) = {
            let mut world = self.world.borrow_mut();
            let choice = world.random.below(8);
            (choice, world.random.below(self.pending.len().max(1)))
        };
        match choice {
            0..3 => self.world.borrow_mut().happen(),
            3..6 => self.try_one(index),
            6 => self.pass_time(),
            _ => self.end_one_early(index),
        }
    }

    /// One operation gets as far as it can.
    fn try_one(&mut self, index: usize) {
        if index >= self.pending.len() {
            return;
        }
        if let Some(code) = self.interruption(index) {
            return self.finish(index, code);
        }
        let mut action = self.pending[index].action;
        let result = self.world.borrow_mut().perform(&mut action);
        self.pending[index].action = action;
        if let Some(res) = result {
            self.finish(index, res);
        }
    }

    /// Now and then, in a world with faults: an operation ends for no reason of its own, and is to be tried again.
    fn interruption(&self, index: usize) -> Option<i32> {
        let world = &mut *self.world.borrow_mut();
        let pending = &self.pending[index];
        let is_transfer = matches!(
            pending.action,
            Action::Recv { .. } | Action::Send { .. } | Action::Accept { .. }
        );
        if !world.has_faults || !is_transfer || pending.action.done() > 0 {
            return None;
        }
        match world.random.below(64) {
            // Some kernels honour O_NONBLOCK on the ring.
            0 => Some(-libc::EAGAIN),
            // With a timer, it would be the timer's.
            1 if pending.deadline_ns.is_none() => Some(-libc::EINTR),
            _ => None,
        }
    }

    /// Time passes: a little, or exactly up to the next deadline, where something may just happen as well.
    fn pass_time(&mut self) {
        let deadlines = self.pending.iter().flat_map(|pending| {
            let sleep_ns = match pending.action {
                Action::Sleep { at_ns } => Some(at_ns),
                _ => None,
            };
            pending.deadline_ns.into_iter().chain(sleep_ns)
        });
        let next_ns = deadlines.filter(|ns| *ns < NEVER_NS).min();
        let mut world = self.world.borrow_mut();
        let little_ns = world.now_ns + world.random.below(1_000) as i64;
        world.now_ns = match next_ns {
            Some(next_ns) if world.random.one_in(2) => next_ns.max(world.now_ns),
            _ => little_ns,
        };
        if world.random.one_in(2) {
            world.happen();
        }
    }

    /// An operation whose deadline has passed, or that was cancelled, ends: with what it has, or may still get.
    fn end_one_early(&mut self, index: usize) {
        let Some(pending) = self.pending.get(index) else {
            return;
        };
        let timed_out = pending
            .deadline_ns
            .is_some_and(|deadline_ns| deadline_ns <= self.now_ns());
        if !timed_out && !pending.cancelled {
            return;
        }
        if timed_out {
            // The timer's CQE, whose word means nothing, sometimes before and sometimes after the operation's own.
            self.post(TAG_TIMER, -libc::ETIME);
        }
        let mut action = self.pending[index].action;
        let mut world = self.world.borrow_mut();
        let lucky = world.random.one_in(2);
        let result = lucky.then(|| world.perform(&mut action)).flatten();
        drop(world);
        let res = result.unwrap_or(match action.done() {
            0 => -libc::ECANCELED,
            done => done as i32,
        });
        self.finish(index, res);
    }

    fn finish(&mut self, index: usize, res: i32) {
        let pending = self.pending.swap_remove(index);
        if let Some(fd) = pending.action.fd()
            && let Some(peer) = self.world.borrow_mut().peers.get_mut(&fd)
        {
            peer.in_flight -= 1;
        }
        self.post(pending.key, res);
    }

    /// Posts a CQE somewhere among those not yet read.
    fn post(&mut self, user_data: u64, res: i32) {
        let place = self
            .world
            .borrow_mut()
            .random
            .below(self.completions.len() + 1);
        self.completions
            .insert(place, (user_data, Completion { res, flags: 0 }));
    }
}

fn action(op: &mut Op<'_>) -> Action {
    match op {
        Op::Recv {
            fd, buffer, flags, ..
        } => Action::Recv {
            fd: *fd,
            buffer: buffer.as_mut_ptr().cast(),
            len: buffer.len(),
            flags: *flags,
            done: 0,
        },
        Op::Send { fd, buffer, flags } => Action::Send {
            fd: *fd,
            buffer: buffer.as_ptr(),
            len: buffer.len(),
            all: *flags & libc::MSG_WAITALL != 0,
            done: 0,
        },
        Op::Accept { fd, .. } => Action::Accept { fd: *fd },
        Op::Sleep { duration } => Action::Sleep {
            at_ns: duration_ns(duration),
        },
        Op::Poll { fd, events } => Action::Poll {
            fd: *fd,
            events: *events,
        },
        Op::Connect { .. } => Action::Ready,
        // The script's peers are streams.
        Op::SendZeroCopy { .. } | Op::SendTo { .. } | Op::SendMsg { .. } | Op::RecvMsg { .. } => {
            Action::Ready
        }
    }
}

fn duration_ns(timespec: &Timespec) -> i64 {
    // SAFETY: Timespec is `struct __kernel_timespec`, two 64-bit integers.
    let [sec, nsec] = unsafe { std::mem::transmute::<Timespec, [i64; 2]>(*timespec) };
    sec * 1_000_000_000 + nsec
}
