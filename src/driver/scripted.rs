//! A driver without a kernel: sockets, timers and cancels simulated from a seed and a virtual clock, for tests.
//!
//! It stands under the real scheduler and the real socket methods, and does what a kernel may do at its worst moments: short
//! results, data exactly at a deadline, cancels that come too late, completions out of order, timer and cancel CQEs before or
//! after the operation's own, a submission queue that is full. The same seed plays the same story again.
//!
//! What a [`World`] keeps is what the tests check against: every byte and every connection is in one place at a time.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::RawFd;
use std::rc::Rc;

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

/// xorshift64*: a seed's stream of numbers.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number from 0 to `bound` - 1.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
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
    /// How much more the socket's send buffer takes now.
    pub(crate) room: usize,
    /// Everything the socket took to send.
    pub(crate) taken: Vec<u8>,
    /// Connections that will come, and those in the backlog.
    pub(crate) connections_to_come: usize,
    pub(crate) backlog: usize,
    /// Connections handed out.
    pub(crate) accepted: usize,
    listens: bool,
}

/// Everything outside the program.
pub(crate) struct World {
    pub(crate) random: Random,
    pub(crate) now_ns: i64,
    pub(crate) peers: BTreeMap<RawFd, Peer>,
    next_fd: RawFd,
}

impl World {
    pub(crate) fn new(seed: u64) -> Rc<RefCell<World>> {
        Rc::new(RefCell::new(World {
            random: Random::new(seed),
            now_ns: 1,
            peers: BTreeMap::new(),
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

    /// Something happens to one of the sockets: bytes arrive, the peer reads, a connection comes.
    fn happen(&mut self) {
        if self.peers.is_empty() {
            return;
        }
        let index = self.random.below(self.peers.len());
        let amount = 1 + self.random.below(64);
        let Some(peer) = self.peers.values_mut().nth(index) else {
            return;
        };
        if peer.listens {
            if peer.connections_to_come > 0 {
                peer.connections_to_come -= 1;
                peer.backlog += 1;
            }
            return;
        }
        for _ in 0..amount.min(peer.to_come.len()) {
            peer.arrived.extend(peer.to_come.pop_front());
        }
        peer.room = (peer.room + amount).min(128);
    }
}

/// What a pending operation does, with the memory it was lent.
#[derive(Clone, Copy)]
enum Action {
    Recv {
        fd: RawFd,
        buffer: *mut u8,
        len: usize,
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
    PollIn {
        fd: RawFd,
    },
    Ready,
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
    pub(crate) fn new(world: Rc<RefCell<World>>) -> Scripted {
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
        if self.world.borrow_mut().random.one_in(16) {
            return Err(Full);
        }
        self.prepared.push(Pending {
            key: key.0,
            action: action(op),
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
        if let Action::Send { all, .. } = &mut action {
            *all = false;
        }
        if self.world.borrow_mut().random.one_in(3) {
            return -libc::EAGAIN;
        }
        self.perform(&mut action).unwrap_or(-libc::EAGAIN)
    }

    pub(crate) fn enter(&mut self, wait: bool) {
        let now_ns = self.now_ns();
        for mut pending in self.prepared.drain(..) {
            pending.deadline_ns = pending.deadline_ns.map(|ns| now_ns + ns);
            if let Action::Sleep { at_ns } = &mut pending.action {
                *at_ns += now_ns;
            }
            self.pending.push(pending);
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
        let mut action = self.pending[index].action;
        let result = self.perform(&mut action);
        self.pending[index].action = action;
        if let Some(res) = result {
            self.finish(index, res);
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
        let lucky = self.world.borrow_mut().random.one_in(2);
        let res = match lucky.then(|| self.perform(&mut action)).flatten() {
            Some(res) => res,
            None => match action {
                Action::Send { done, .. } if done > 0 => done as i32,
                _ => -libc::ECANCELED,
            },
        };
        self.finish(index, res);
    }

    fn finish(&mut self, index: usize, res: i32) {
        let pending = self.pending.swap_remove(index);
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

    /// Does what can be done now; the result if that ends the operation.
    fn perform(&mut self, action: &mut Action) -> Option<i32> {
        let world = &mut *self.world.borrow_mut();
        match action {
            Action::Recv { fd, buffer, len } => {
                let peer = world.peers.get_mut(fd)?;
                if peer.arrived.is_empty() {
                    return peer.to_come.is_empty().then_some(0);
                }
                let most = peer.arrived.len().min(*len);
                let count = 1 + world.random.below(most);
                for at in 0..count {
                    let byte = peer.arrived.pop_front()?;
                    // SAFETY: `prepare`'s caller lent `len` bytes until this operation's completion is read, and count <= len.
                    unsafe { buffer.add(at).write(byte) };
                }
                Some(count as i32)
            }
            Action::Send {
                fd,
                buffer,
                len,
                all,
                done,
            } => {
                let peer = world.peers.get_mut(fd)?;
                if *len == 0 {
                    return Some(0);
                }
                let most = peer.room.min(*len - *done);
                if most == 0 {
                    return None;
                }
                let count = 1 + world.random.below(most);
                // SAFETY: `prepare`'s caller lent `len` bytes until this operation's completion is read; done + count <= len.
                let bytes = unsafe { std::slice::from_raw_parts(buffer.add(*done), count) };
                peer.taken.extend_from_slice(bytes);
                peer.room -= count;
                *done += count;
                (!*all || *done == *len).then_some(*done as i32)
            }
            Action::Accept { fd } => {
                let peer = world.peers.get_mut(fd)?;
                if peer.backlog == 0 {
                    return None;
                }
                peer.backlog -= 1;
                peer.accepted += 1;
                Some(world.add(Peer::default()))
            }
            Action::Sleep { at_ns } => (*at_ns <= world.now_ns).then_some(-libc::ETIME),
            Action::PollIn { fd } => {
                let peer = world.peers.get(fd)?;
                // Now and then there is readiness and nothing to receive.
                let ready = !peer.arrived.is_empty() || peer.to_come.is_empty();
                (ready || world.random.one_in(16)).then_some(i32::from(libc::POLLIN))
            }
            Action::Ready => Some(0),
        }
    }
}

fn action(op: &mut Op<'_>) -> Action {
    match op {
        Op::Recv { fd, buffer, .. } => Action::Recv {
            fd: *fd,
            buffer: buffer.as_mut_ptr().cast(),
            len: buffer.len(),
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
        Op::Poll { fd, events } if *events == libc::POLLIN => Action::PollIn { fd: *fd },
        Op::Connect { .. } | Op::Poll { .. } => Action::Ready,
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
