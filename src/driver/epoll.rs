//! The epoll backend: readiness and calls that do not wait, for where io_uring is forbidden or too old.
//!
//! One [`Epoll`] belongs to one thread. It takes the operations that the ring takes and completes them in the same way, one
//! completion each; it knows neither who waits for one nor what a fiber is. It needs nothing newer than Linux 5.10.
//!
//! # The life of an operation
//!
//! ```text
//!  prepare          enter: a first try (not of a poll, nor where nothing was found just before)
//!  ───────▶ Prepared ──────────────────────────────────────────────────────────────▶ Done: completion queued, slot idle
//!              │         would wait: joins its descriptor's list, which is armed         ▲
//!              └─────────────────────▶ Waiting ──────────────────────────────────────────┘
//!                                       │   ▲     event: try again (a poll: the event is the result)
//!                                       └───┘     time over: one last try;  cancel: none
//!                                   would wait still
//! ```
//!
//! `prepare` only takes note, as the ring only queues: the calls are made by `enter`, when the operation is listed where a close
//! finds it (`fiber/inflight.rs`). Until `next` has returned the completion, the operation is tried in the caller's memory.
//!
//! # The life of a registration
//!
//! epoll knows a registration by its open file *and* its number. We know the number only; somebody may close it, or put another
//! file there, without our hearing of it. So nothing is believed for longer than one event: each registration is one-shot, and
//! each wait arms it anew.
//!
//! ```text
//!   unknown ──ADD──▶ armed ──event──▶ unarmed ──MOD: another wait, or some still wait──▶ armed
//!                      │                  │
//!                      │ nobody waits any more (cancelled, timed out): left as it is. At most one event comes, and finds nobody
//!                      ▼                  ▼
//!           the number is closed and taken by another file: MOD answers ENOENT, so ADD, with a new generation
//!           the number is buried (closed through its Socket): MOD answers EBADF, and so do those who still wait
//! ```
//!
//! - A file that lives on by a duplicate after its number was closed keeps its registration. It fires once at most, with data
//!   whose generation is not the number's any more, or finds nobody. It goes with the file; a registration keeps no file open.
//! - Arming looks at the file again, so what became ready between the try and the arming is reported.
//! - Who joins a list arms as well, even if the list's interest covers it: that is what tells of a number buried meanwhile.
//! - An event after which nobody has got on (another process was faster; an error is pending that a receive does not report) would
//!   come again at once, and again. From the second in a row on, arming waits for 1 to 32 ms.
//! - What epoll refuses (EPERM: regular files, directories) is always ready. Where its own limits are exhausted (ENOSPC, ENOMEM),
//!   operations are tried again by the clock.
//!
//! # One turn
//!
//! `enter` tries what was prepared and makes one epoll_wait; `next` goes through its events, one descriptor at a time, so that what
//! is received is handled while it is in the cache; then come the timers that were due, so that at its deadline an operation has
//! what there is.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::attempt::Attempt;
use super::features::Features;
use super::op::{Op, Timespec};
use super::slab::{Completion, Key};
use super::{Config, Counters, DriverKind};
use crate::error::Result;
use crate::sys;

/// How many events one epoll_wait brings at most. The rest comes with the next, behind those who have been served.
const EVENTS_MAX: usize = 256;

/// A worker has room for so many waits from the start on.
const SLOTS_AT_FIRST: usize = 256;

/// What the bell's events bear: no descriptor's, whose numbers are not negative.
const BELL: u64 = u64::MAX;

/// No slot.
const NOBODY: u32 = u32::MAX;

/// How soon a connect is tried again that found a backlog full, and what epoll had no room for.
const RETRY_NS: i64 = 5_000_000;

/// The pause after an epoll_wait that was refused for want of something.
const REFUSED_NAP: Duration = Duration::from_millis(1);

/// The longest pause before a descriptor is armed again whose events help nobody: 1 ms doubled so often.
const VAIN_DOUBLINGS_MAX: u8 = 5;

/// One slot's operation.
struct Wait {
    key: Key,
    op: *mut Op<'static>,
    attempt: Attempt,
    /// Its end, by the monotonic clock. While it is prepared: counted from its submission.
    deadline_ns: i64,
    /// When to try again, or when a sleep is over; `i64::MAX` where events tell.
    again_ns: i64,
    /// The descriptor in whose list it is, and for which events; -1 while it is in none.
    fd: RawFd,
    events: u32,
    before: u32,
    behind: u32,
}

impl Wait {
    const IDLE: Wait = Wait {
        key: Key::NONE,
        op: ptr::null_mut(),
        attempt: Attempt::NEW,
        deadline_ns: i64::MAX,
        again_ns: i64::MAX,
        fd: -1,
        events: 0,
        before: NOBODY,
        behind: NOBODY,
    };
}

/// What is known of one descriptor number.
#[derive(Clone, Copy)]
struct Watched {
    first: u32,
    last: u32,
    /// Told apart by it: events of another file that had the number before.
    generation: u32,
    /// A file was registered under the number once.
    is_known: bool,
    /// Events in a row that helped nobody.
    vain: u8,
}

impl Watched {
    const UNKNOWN: Watched = Watched {
        first: NOBODY,
        last: NOBODY,
        generation: 0,
        is_known: false,
        vain: 0,
    };
}

/// See the module's documentation.
pub(crate) struct Epoll {
    epoll: OwnedFd,
    /// Of each slot.
    waits: Vec<Wait>,
    /// Of each descriptor number.
    watched: Vec<Watched>,
    timers: super::timers::Timers,
    /// Submitted, and not yet tried.
    prepared: Vec<Key>,
    /// Operations in lists: while there are none, there is nothing to ask epoll for.
    listed: usize,
    completed: VecDeque<(u64, Completion)>,
    events: Box<[libc::epoll_event; EVENTS_MAX]>,
    /// The events that `next` has not looked at yet.
    events_left: std::ops::Range<usize>,
    /// Timers up to here are due.
    due_ns: i64,
    /// Somebody wants to be woken then.
    tick_ns: i64,
    /// Timeouts are exact to the nanosecond (Linux 5.11), else to the millisecond.
    is_precise: bool,
    /// One operation at a time: once it has completed, nothing else is to be looked for.
    is_alone: bool,
    fork_mark: &'static AtomicU32,
    fork_epoch: u32,
    features: Features,
}

impl Epoll {
    pub(crate) fn new(config: Config, mut features: Features) -> Result<Epoll> {
        let epoll = sys::epoll()?;
        features.set_driver(DriverKind::Epoll);
        features.on("epoll", "readiness, and calls that do not wait");
        let none = libc::epoll_event { events: 0, u64: 0 };
        let mut events = Box::new([none; EVENTS_MAX]);
        let is_precise = sys::epoll_wait_ns(epoll.as_raw_fd(), &mut events[..], 0) == 0;
        if is_precise {
            features.on("EPOLL_PWAIT2", "timeouts exact to the nanosecond");
        } else {
            features.off(
                "EPOLL_PWAIT2",
                "timeouts are rounded up to milliseconds".to_owned(),
                "Linux 5.11 has it, unless a seccomp filter hides it",
            );
        }
        let mut driver = Epoll {
            epoll,
            waits: Vec::new(),
            watched: Vec::new(),
            timers: super::timers::Timers::default(),
            prepared: Vec::new(),
            listed: 0,
            completed: VecDeque::new(),
            events,
            events_left: 0..0,
            due_ns: i64::MIN,
            tick_ns: i64::MAX,
            is_precise,
            is_alone: config.awaits_timers,
            fork_mark: sys::fork_mark(),
            fork_epoch: sys::fork_epoch(),
            features,
        };
        let slots = if driver.is_alone { 1 } else { SLOTS_AT_FIRST };
        driver.make_room(slots);
        driver.watched.reserve(slots);
        Ok(driver)
    }

    pub(crate) fn features(&self) -> &Features {
        &self.features
    }

    /// Whether this process made the instance, rather than inheriting it by fork(2): parent and child would share its
    /// registrations.
    #[inline]
    pub(crate) fn is_ours(&self) -> bool {
        self.fork_mark.load(Ordering::Relaxed) == self.fork_epoch
    }

    /// Watches the bell's eventfd. Edge-triggered: each ring is an event of its own, and nobody has to read the counter.
    pub(crate) fn watch_bell(&mut self, eventfd: RawFd) -> Result<()> {
        let events = (libc::EPOLLIN | libc::EPOLLET) as u32;
        let epoll = self.epoll.as_raw_fd();
        sys::check(sys::epoll_ctl(
            epoll,
            libc::EPOLL_CTL_ADD,
            eventfd,
            events,
            BELL,
        ))?;
        Ok(())
    }

    /// Takes the operation, with a deadline `timeout` from its submission on if given.
    ///
    /// # Safety
    ///
    /// `*op` and the memory that it borrows must stay valid and unaliased until [`next`](Epoll::next) has returned the completion
    /// of `key`, whatever happens to the borrowing frame.
    #[inline(never)]
    pub(crate) unsafe fn prepare(&mut self, op: &mut Op<'_>, key: Key, timeout: Option<&Timespec>) {
        let slot = key.index();
        if slot >= self.waits.len() {
            self.make_room(slot + 1);
        }
        let wait = &mut self.waits[slot];
        debug_assert_eq!(wait.key, Key::NONE, "one operation at a time");
        *wait = Wait {
            key,
            op: ptr::from_mut(op).cast(),
            deadline_ns: timeout.map_or(i64::MAX, timespec_ns),
            ..Wait::IDLE
        };
        self.prepared.push(key);
    }

    /// Makes room for so many slots, in everything that holds one entry of a slot at most.
    #[cold]
    fn make_room(&mut self, slots: usize) {
        let slots = slots.next_power_of_two();
        self.waits.resize_with(slots, || Wait::IDLE);
        // Those that are cancelled before they are tried stay in it until then.
        self.prepared.reserve(slots);
        self.completed.reserve(slots - self.completed.len());
        self.timers.reserve(slots);
    }

    /// Ends the operation, if it is under way: with what it has moved, or `-ECANCELED`.
    pub(crate) fn cancel(&mut self, key: Key) {
        if let Some(wait) = self.waits.get(key.index())
            && wait.key == key
        {
            let slot = key.index() as u32;
            let res = wait.attempt.ended(-libc::ECANCELED);
            self.leave(slot);
            self.complete(slot, res);
        }
    }

    /// Makes a waiting [`enter`](Epoll::enter) return after `ns` at the latest, once.
    pub(crate) fn tick(&mut self, ns: i64) {
        self.tick_ns = sys::monotonic_ns().saturating_add(ns);
    }

    /// Whether an enter that does not wait may bring something.
    #[inline]
    pub(crate) fn has_work(&self) -> bool {
        self.listed > 0
            || !self.prepared.is_empty()
            || self.has_completions()
            || self.timers.first_ns() != i64::MAX
    }

    /// Whether [`next`](Epoll::next) may have something.
    #[inline]
    pub(crate) fn has_completions(&self) -> bool {
        !self.completed.is_empty()
            || !self.events_left.is_empty()
            || self.timers.first_ns() <= self.due_ns
    }

    /// Whether there is something to come for, without entering: events, completions.
    pub(crate) fn has_arrivals(&self) -> bool {
        self.has_completions() || sys::poll(self.epoll.as_raw_fd(), libc::POLLIN, 0) > 0
    }

    /// Tries what was prepared, and looks for events: with `wait` until there is one, or a timer is due, or somebody rings.
    pub(crate) fn enter(&mut self, wait: bool, counters: &mut Counters) {
        self.start_prepared(counters);
        loop {
            let ready = self.has_completions();
            let waits = wait && !ready;
            if !self.events_left.is_empty() || (ready && self.is_alone) {
                return;
            }
            if waits || self.listed > 0 {
                let first_ns = self.timers.first_ns().min(self.tick_ns);
                let count = self.ask(waits, first_ns);
                counters.enters += 1;
                match -count {
                    ..=0 => self.events_left = 0..count as usize,
                    libc::EINTR => {
                        counters.enters_interrupted += 1;
                        if waits {
                            continue;
                        }
                    }
                    // A seccomp filter that came after the start hides the newer call: the older one does.
                    libc::ENOSYS | libc::EPERM if self.is_precise => {
                        self.is_precise = false;
                        continue;
                    }
                    // Only time helps. Whoever waits comes again, once the timers that are due have been looked at.
                    libc::EAGAIN | libc::ENOMEM => {
                        counters.enters_refused += 1;
                        std::thread::sleep(REFUSED_NAP);
                    }
                    // The instance is not what we made. Going on would leave operations waiting for ever.
                    errno => {
                        eprintln!(
                            "ringsock: epoll_wait failed with {}; the driver is unusable, ending the process",
                            std::io::Error::from_raw_os_error(errno)
                        );
                        std::process::abort();
                    }
                }
            }
            if self.timers.first_ns().min(self.tick_ns) != i64::MAX {
                self.due_ns = sys::monotonic_ns();
                if self.tick_ns <= self.due_ns {
                    self.tick_ns = i64::MAX;
                }
            }
            return;
        }
    }

    /// epoll_wait, until `first_ns` if it `waits`.
    fn ask(&mut self, waits: bool, first_ns: i64) -> i32 {
        let epoll = self.epoll.as_raw_fd();
        let events = &mut self.events[..];
        if !waits {
            return sys::epoll_wait(epoll, events, 0);
        }
        if first_ns == i64::MAX {
            return sys::epoll_wait(epoll, events, -1);
        }
        let left_ns = (first_ns - sys::monotonic_ns()).max(0);
        if self.is_precise {
            return sys::epoll_wait_ns(epoll, events, left_ns);
        }
        // A day is as good as for ever, and fits.
        let left_ms = (left_ns as u64).div_ceil(1_000_000).min(86_400_000);
        sys::epoll_wait(epoll, events, left_ms as i32)
    }

    /// The next completion: its `user_data` and its result.
    #[inline(never)]
    pub(crate) fn next(&mut self, counters: &mut Counters) -> Option<(u64, Completion)> {
        loop {
            if let Some(completed) = self.completed.pop_front() {
                counters.cqes += 1;
                return Some(completed);
            }
            if let Some(index) = self.events_left.next() {
                let event = self.events[index];
                self.serve(event.u64, event.events, counters);
            } else if let Some(slot) = self.timers.due(self.due_ns) {
                self.look_at(slot, counters);
            } else {
                return None;
            }
        }
    }

    fn start_prepared(&mut self, counters: &mut Counters) {
        let mut now_ns = None;
        for index in 0..self.prepared.len() {
            let key = self.prepared[index];
            let slot = key.index() as u32;
            // Cancelled meanwhile, it is not the slot's any more.
            if self.waits[slot as usize].key == key {
                self.start(slot, &mut now_ns, counters);
            }
        }
        self.prepared.clear();
    }

    fn start(&mut self, slot: u32, now_ns: &mut Option<i64>, counters: &mut Counters) {
        let mut now_ns = || *now_ns.get_or_insert_with(sys::monotonic_ns);
        let wait = &mut self.waits[slot as usize];
        if wait.deadline_ns != i64::MAX {
            wait.deadline_ns = now_ns().saturating_add(wait.deadline_ns);
        }
        // SAFETY: `prepare`'s caller keeps it until the completion.
        match unsafe { &*wait.op } {
            Op::Sleep { duration } => {
                wait.again_ns = now_ns().saturating_add(timespec_ns(duration));
                return self.set_timer(slot);
            }
            // Arming looks at the file as well.
            Op::Poll { .. }
            | Op::Recv {
                found_nothing: true,
                ..
            } => {}
            _ => {
                if let Some(res) = self.step(slot) {
                    return self.complete(slot, res);
                }
            }
        }
        self.set_timer(slot);
        self.join(slot, counters);
    }

    /// Has the operation get as far as it can: its result if that ends it.
    fn step(&mut self, slot: u32) -> Option<i32> {
        let wait = &mut self.waits[slot as usize];
        // SAFETY: `prepare`'s caller keeps the operation and its memory until the completion, and does not touch them.
        wait.attempt.step(unsafe { &mut *wait.op })
    }

    /// What an operation comes to whose descriptor is ready although it would wait, if that is its end.
    #[cold]
    fn at_end(&mut self, slot: u32) -> Option<i32> {
        let wait = &mut self.waits[slot as usize];
        // SAFETY: `prepare`'s caller keeps the operation and its memory until the completion, and does not touch them.
        wait.attempt.at_end(unsafe { &mut *wait.op })
    }

    fn set_timer(&mut self, slot: u32) {
        let wait = &self.waits[slot as usize];
        self.timers.set(slot, wait.deadline_ns.min(wait.again_ns));
    }

    /// The slot's time has come: its sleep or its operation is over, or it is to be tried again.
    #[cold]
    fn look_at(&mut self, slot: u32, counters: &mut Counters) {
        let wait = &self.waits[slot as usize];
        let (is_over, is_again) = (
            wait.deadline_ns <= self.due_ns,
            wait.again_ns <= self.due_ns,
        );
        // SAFETY: `prepare`'s caller keeps it until the completion.
        if let Op::Sleep { .. } = unsafe { &*wait.op } {
            let res = if is_again {
                -libc::ETIME
            } else {
                -libc::ECANCELED
            };
            return self.complete(slot, res);
        }
        // What is there by now counts, also at the end.
        let stepped = self.step(slot);
        let wait = &self.waits[slot as usize];
        let ended = || wait.attempt.ended(-libc::ECANCELED);
        match stepped.or_else(|| is_over.then(ended)) {
            Some(res) => {
                self.leave(slot);
                self.complete(slot, res);
            }
            None => {
                let fd = wait.fd;
                self.waits[slot as usize].again_ns = i64::MAX;
                self.set_timer(slot);
                match fd {
                    -1 => self.join(slot, counters),
                    fd => self.arm(fd, counters),
                }
            }
        }
    }

    /// Queues the completion of a slot that is in no list.
    #[inline]
    fn complete(&mut self, slot: u32, res: i32) {
        self.timers.remove(slot);
        let wait = &mut self.waits[slot as usize];
        debug_assert_eq!(wait.fd, -1, "still in a list");
        let key = std::mem::replace(&mut wait.key, Key::NONE);
        wait.op = ptr::null_mut();
        self.completed
            .push_back((key.0, Completion { res, flags: 0 }));
    }

    // The lists.

    /// Puts the slot behind all others that wait for its descriptor, and arms that.
    fn join(&mut self, slot: u32, counters: &mut Counters) {
        let wait = &mut self.waits[slot as usize];
        // SAFETY: `prepare`'s caller keeps it until the completion.
        let op = unsafe { &*wait.op };
        if wait.attempt.waits_for_time(op) {
            return self.retry_later(slot, RETRY_NS);
        }
        let Some((fd, events)) = op.readiness() else {
            return;
        };
        let Ok(index) = usize::try_from(fd) else {
            return self.complete(slot, -libc::EBADF);
        };
        if index >= self.watched.len() {
            // An absurd number has no file, and gets no memory.
            if sys::descriptor_flags(fd) < 0 {
                return self.complete(slot, -libc::EBADF);
            }
            self.watched.resize(index + 1, Watched::UNKNOWN);
        }
        let watched = &mut self.watched[index];
        wait.fd = fd;
        wait.events = u32::from(events as u16);
        wait.before = watched.last;
        wait.behind = NOBODY;
        let before = std::mem::replace(&mut watched.last, slot);
        match before {
            NOBODY => {
                watched.first = slot;
                watched.vain = 0;
            }
            before => self.waits[before as usize].behind = slot,
        }
        self.listed += 1;
        self.arm(fd, counters);
    }

    /// Takes the slot out of its list, if it is in one. Those who stay are still armed for.
    fn leave(&mut self, slot: u32) {
        let wait = &self.waits[slot as usize];
        let fd = wait.fd;
        if fd < 0 {
            return;
        }
        let retried = wait.again_ns != i64::MAX;
        self.unlink(slot);
        let first = self.watched[fd as usize].first;
        if retried && first != NOBODY {
            // It had taken upon itself to arm the descriptor later.
            self.retry_later(first, RETRY_NS);
        }
    }

    fn unlink(&mut self, slot: u32) {
        let wait = &mut self.waits[slot as usize];
        let (fd, before, behind) = (wait.fd, wait.before, wait.behind);
        wait.fd = -1;
        let watched = &mut self.watched[fd as usize];
        match before {
            NOBODY => watched.first = behind,
            before => self.waits[before as usize].behind = behind,
        }
        match behind {
            NOBODY => watched.last = before,
            behind => self.waits[behind as usize].before = before,
        }
        self.listed -= 1;
    }

    /// Has the slot tried again, and its descriptor armed, after `pause_ns`.
    #[cold]
    fn retry_later(&mut self, slot: u32, pause_ns: i64) {
        let wait = &mut self.waits[slot as usize];
        wait.again_ns = sys::monotonic_ns().saturating_add(pause_ns);
        self.set_timer(slot);
    }

    // The registrations.

    /// Asks for the next event that somebody in the descriptor's list waits for.
    fn arm(&mut self, fd: RawFd, counters: &mut Counters) {
        let watched = &self.watched[fd as usize];
        let mut interest = 0;
        let mut slot = watched.first;
        while slot != NOBODY {
            let wait = &self.waits[slot as usize];
            interest |= wait.events;
            slot = wait.behind;
        }
        counters.sqes += 1;
        let events = interest | libc::EPOLLONESHOT as u32;
        let data = |generation| u64::from(generation) << 32 | fd as u64;
        let epoll = self.epoll.as_raw_fd();
        let mut answer = -libc::ENOENT;
        if watched.is_known {
            let data = data(watched.generation);
            answer = sys::epoll_ctl(epoll, libc::EPOLL_CTL_MOD, fd, events, data);
        }
        if answer == -libc::ENOENT {
            // Another file than before, or the first.
            let watched = &mut self.watched[fd as usize];
            // The bell's data has this as its generation.
            watched.generation = (watched.generation + 1) % u32::MAX;
            watched.is_known = true;
            let data = data(watched.generation);
            answer = sys::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, events, data);
            if answer == -libc::EEXIST {
                // The file that was here before the last one has come back.
                answer = sys::epoll_ctl(epoll, libc::EPOLL_CTL_MOD, fd, events, data);
            }
        }
        if answer < 0 {
            self.arming_failed(fd, answer);
        }
    }

    #[cold]
    fn arming_failed(&mut self, fd: RawFd, answer: i32) {
        match -answer {
            libc::ENOSPC | libc::ENOMEM | libc::EAGAIN | libc::EINTR => {
                let mut slot = self.watched[fd as usize].first;
                while slot != NOBODY {
                    // Those who are to be tried again have their time already.
                    if self.waits[slot as usize].again_ns == i64::MAX {
                        self.retry_later(slot, RETRY_NS);
                    }
                    slot = self.waits[slot as usize].behind;
                }
            }
            _ => {
                let mut slot = self.watched[fd as usize].first;
                while slot != NOBODY {
                    self.unlink(slot);
                    let res = self.refused(slot, answer);
                    self.complete(slot, res);
                    slot = self.watched[fd as usize].first;
                }
            }
        }
    }

    /// What an operation comes to whose descriptor epoll refuses: `answer`, but a file without readiness (EPERM) is always ready.
    fn refused(&mut self, slot: u32, answer: i32) -> i32 {
        let wait = &mut self.waits[slot as usize];
        if answer != -libc::EPERM {
            return wait.attempt.ended(answer);
        }
        // SAFETY: `prepare`'s caller keeps it until the completion.
        if let Op::Poll { fd, events } = unsafe { &*wait.op } {
            return match sys::poll(*fd, *events, 0) {
                0 => i32::from(*events),
                result => result,
            };
        }
        self.step(slot).unwrap_or(answer)
    }

    /// An event: those who wait for it try again.
    fn serve(&mut self, data: u64, happened: u32, counters: &mut Counters) {
        // Nothing to do for the bell: that enter has returned is all.
        let Some(watched) = self.watched.get(data as u32 as usize) else {
            return;
        };
        if watched.generation != (data >> 32) as u32 || watched.first == NOBODY {
            return;
        }
        let fd = data as u32 as RawFd;
        let broken = (libc::EPOLLERR | libc::EPOLLHUP) as u32;
        let (mut in_vain, mut got_on, mut none_left) = (false, false, false);
        let mut slot = watched.first;
        while slot != NOBODY {
            let wait = &self.waits[slot as usize];
            let (this, behind) = (slot, wait.behind);
            slot = behind;
            let events = happened & (wait.events | broken);
            if events == 0 {
                continue;
            }
            // SAFETY: `prepare`'s caller keeps it until the completion.
            let op = unsafe { &*wait.op };
            let is_poll = matches!(op, Op::Poll { .. });
            let is_accept = matches!(op, Op::Accept { .. });
            if is_accept && none_left {
                continue;
            }
            let result = if is_poll {
                Some(events as i32)
            } else {
                let before = wait.attempt;
                let stepped = self.step(this);
                // A part of all that was asked for, a connect that began: no result, but not in vain.
                got_on |= self.waits[this as usize].attempt != before;
                stepped.or_else(|| self.at_end(this))
            };
            match result {
                Some(res) => {
                    got_on = true;
                    self.unlink(this);
                    self.complete(this, res);
                }
                // Another process or worker was faster, so all others that accept here would find nothing either; and nothing
                // is left that would be an event at once.
                None if is_accept => none_left = true,
                None => in_vain = true,
            }
        }
        if self.watched[fd as usize].first == NOBODY {
            return;
        }
        let watched = &mut self.watched[fd as usize];
        if got_on || !in_vain {
            watched.vain = 0;
            return self.arm(fd, counters);
        }
        let vain = watched.vain;
        watched.vain = (vain + 1).min(VAIN_DOUBLINGS_MAX + 1);
        if vain == 0 {
            return self.arm(fd, counters);
        }
        let first = watched.first;
        self.retry_later(first, 1_000_000 << (vain - 1));
    }
}

/// The span in nanoseconds.
fn timespec_ns(timespec: &Timespec) -> i64 {
    // SAFETY: Timespec is `struct __kernel_timespec`, two 64-bit integers.
    let [sec, nsec] = unsafe { std::mem::transmute::<Timespec, [i64; 2]>(*timespec) };
    sec.saturating_mul(1_000_000_000).saturating_add(nsec)
}

#[cfg(test)]
mod tests {
    use super::super::{Driver, Waiter};
    use super::*;
    use std::collections::HashMap;
    use std::io::Write;
    use std::mem::MaybeUninit;
    use std::net::UdpSocket;
    use std::os::fd::{FromRawFd, IntoRawFd};
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    /// A driver, and the operations it was given, which stay where they are.
    struct Bench {
        driver: Driver,
        #[expect(clippy::vec_box, reason = "a growing vector would move them")]
        ops: Vec<Box<Op<'static>>>,
        results: HashMap<usize, i32>,
        /// The waiters that have results, in the order in which they got them.
        order: Vec<usize>,
    }

    impl Bench {
        fn new() -> Bench {
            let driver = Driver::epoll(Config::worker(), Features::default()).unwrap();
            Bench {
                driver,
                ops: Vec::new(),
                results: HashMap::new(),
                order: Vec::new(),
            }
        }

        /// Submits an operation for a waiter of this number.
        fn start(&mut self, number: usize, op: Op<'static>, timeout_ms: Option<u64>) -> Key {
            let mut op = Box::new(op);
            let slot = self.driver.slots().register(Waiter::new(number).unwrap());
            let key = self.driver.slots().begin(slot);
            let timeout = timeout_ms.map(|ms| {
                Timespec::new()
                    .sec(ms / 1000)
                    .nsec((ms % 1000 * 1_000_000) as u32)
            });
            // SAFETY: the operation is kept in a box, and its memory was leaked.
            unsafe { self.driver.submit(&mut op, key, timeout.as_ref()) }.unwrap();
            self.ops.push(op);
            key
        }

        fn receive(&mut self, number: usize, fd: RawFd, timeout_ms: Option<u64>) -> Key {
            let op = Op::Recv {
                fd,
                buffer: Box::leak(Box::new([MaybeUninit::uninit(); 16])),
                flags: 0,
                found_nothing: false,
            };
            self.start(number, op, timeout_ms)
        }

        fn poll(&mut self, number: usize, fd: RawFd) -> Key {
            let events = libc::POLLIN;
            self.start(number, Op::Poll { fd, events }, None)
        }

        fn turn(&mut self, wait: bool) {
            self.driver.enter(wait);
            while let Some((waiter, completion)) = self.driver.next() {
                self.results.insert(waiter.get(), completion.res);
                self.order.push(waiter.get());
            }
        }

        /// Waits until this waiter has its result.
        fn result(&mut self, number: usize) -> i32 {
            loop {
                if let Some(res) = self.results.get(&number) {
                    return *res;
                }
                self.turn(true);
            }
        }
    }

    #[test]
    fn a_number_whose_file_was_replaced_is_watched_anew() {
        let (left, right) = UnixStream::pair().unwrap();
        let mut bench = Bench::new();
        let fd = left.as_raw_fd();
        bench.receive(1, fd, Some(1));
        assert_eq!(bench.result(1), -libc::ECANCELED);
        // Its registration is still armed, and lives on with the file.
        let duplicate = left.try_clone().unwrap();
        let (other, mut peer) = UnixStream::pair().unwrap();
        let number = left.into_raw_fd();
        assert_eq!(number, fd);
        // SAFETY: the number is this test's, and is given to the new file at once.
        assert_eq!(unsafe { libc::dup2(other.as_raw_fd(), number) }, number);
        // SAFETY: the number just taken.
        let replaced = unsafe { UnixStream::from_raw_fd(number) };

        bench.receive(2, fd, None);
        bench.turn(false);
        // What happens to the old file is nobody's business any more.
        (&right).write_all(b"old").unwrap();
        for _ in 0..3 {
            bench.turn(false);
        }
        assert!(!bench.results.contains_key(&2));
        peer.write_all(b"new!").unwrap();
        assert_eq!(bench.result(2), 4);
        drop((duplicate, replaced));
    }

    #[test]
    fn a_file_that_lives_on_wakes_nobody_twice() {
        let (left, mut right) = UnixStream::pair().unwrap();
        let mut bench = Bench::new();
        let key = bench.receive(1, left.as_raw_fd(), None);
        bench.turn(false);
        let duplicate = left.try_clone().unwrap();
        let tombstone = sys::tombstone().unwrap();
        assert_eq!(sys::bury(left.as_raw_fd(), tombstone), left.as_raw_fd());
        bench.driver.cancel(key).unwrap();
        assert_eq!(bench.result(1), -libc::ECANCELED);
        let enters = |bench: &Bench| bench.driver.counters().enters;
        for _ in 0..10 {
            right.write_all(b"x").unwrap();
        }
        // One event of the old registration, then none: the tick ends the wait.
        let (start, before) = (Instant::now(), enters(&bench));
        bench.driver.tick(50_000_000);
        while start.elapsed() < Duration::from_millis(50) {
            bench.turn(true);
        }
        assert!(enters(&bench) - before <= 3);
        drop(duplicate);
    }

    #[test]
    fn a_buried_number_answers_ebadf_to_old_and_new_waits() {
        let (left, mut right) = UnixStream::pair().unwrap();
        let fd = left.as_raw_fd();
        let duplicate = left.try_clone().unwrap();
        let mut bench = Bench::new();
        // The second one has to be armed for again when the first has its event.
        bench.receive(1, fd, None);
        bench.receive(2, fd, None);
        bench.turn(false);
        sys::bury(fd, sys::tombstone().unwrap());
        bench.poll(3, fd);
        bench.receive(4, fd, None);
        assert_eq!(bench.result(4), -libc::EBADF);
        assert_eq!(bench.result(3), -libc::EBADF);
        right.write_all(b"x").unwrap();
        assert_eq!(bench.result(1), -libc::EBADF);
        assert_eq!(bench.result(2), -libc::EBADF);
        assert_eq!(bench.driver.slots().waiting(), 0);
        drop(duplicate);
    }

    #[test]
    fn several_readers_of_one_descriptor_are_served_in_turn() {
        const READERS: usize = 100;
        let (left, right) = UnixStream::pair().unwrap();
        let mut bench = Bench::new();
        for number in 1..=READERS {
            bench.receive(number, left.as_raw_fd(), None);
        }
        let out = Op::Poll {
            fd: left.as_raw_fd(),
            events: libc::POLLOUT,
        };
        bench.start(READERS + 1, out, None);
        assert_eq!(bench.result(READERS + 1), i32::from(libc::POLLOUT));
        assert!(bench.results.len() == 1, "nobody has anything to read");
        for number in 1..=READERS {
            (&right).write_all(b"x").unwrap();
            assert_eq!(bench.result(number), 1);
            assert_eq!(bench.results.len(), number + 1);
        }
    }

    #[test]
    fn cancels_in_any_order_leave_the_others_waiting() {
        const OPERATIONS: usize = 1000;
        let eventfd = sys::eventfd().unwrap();
        let mut bench = Bench::new();
        let keys: Vec<Key> = (1..=OPERATIONS)
            .map(|number| bench.poll(number, eventfd.as_raw_fd()))
            .collect();
        bench.turn(false);
        for number in (1..=OPERATIONS).filter(|number| number % 3 != 0).rev() {
            bench.driver.cancel(keys[number - 1]).unwrap();
        }
        bench.turn(false);
        sys::ring_eventfd(eventfd.as_raw_fd());
        for number in 1..=OPERATIONS {
            let expected = match number % 3 {
                0 => i32::from(libc::POLLIN),
                _ => -libc::ECANCELED,
            };
            assert_eq!(bench.result(number), expected);
        }
        assert_eq!(bench.driver.slots().unknown(), 0);
    }

    #[test]
    fn what_epoll_refuses_is_always_ready() {
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let mut bench = Bench::new();
        bench.poll(1, file.as_raw_fd());
        assert_eq!(bench.result(1), i32::from(libc::POLLIN));
        bench.poll(2, 1 << 30);
        assert_eq!(bench.result(2), -libc::EBADF);
    }

    /// With IP_RECVERR, an error nobody reads keeps the socket "ready", though there is nothing to receive.
    #[test]
    fn an_event_that_helps_nobody_is_not_asked_for_again_at_once() {
        let closed = UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let fd = socket.as_raw_fd();
        let on = 1i32.to_ne_bytes();
        assert!(sys::setsockopt(fd, libc::SOL_IP, libc::IP_RECVERR, &on) >= 0);
        socket.connect(closed).unwrap();
        socket.send(b"x").unwrap();
        assert_eq!(
            socket.recv(&mut [0; 16]).unwrap_err().raw_os_error(),
            Some(libc::ECONNREFUSED)
        );
        assert_ne!(sys::poll(fd, libc::POLLIN, 0), 0);
        let mut bench = Bench::new();
        let before = bench.driver.counters().enters;
        let start = Instant::now();
        bench.receive(1, fd, Some(200));
        assert_eq!(bench.result(1), -libc::ECANCELED);
        assert!(start.elapsed() >= Duration::from_millis(199));
        assert!(bench.driver.counters().enters - before < 30);
    }

    /// A transfer of all that goes on piece by piece gets on with each, though it has no result.
    #[test]
    fn pieces_of_a_whole_are_not_in_vain() {
        const PIECES: usize = 16;
        let (left, mut right) = UnixStream::pair().unwrap();
        let fd = left.as_raw_fd();
        let mut bench = Bench::new();
        let op = Op::Recv {
            fd,
            buffer: Box::leak(Box::new([MaybeUninit::uninit(); PIECES])),
            flags: libc::MSG_WAITALL,
            found_nothing: false,
        };
        bench.start(1, op, None);
        bench.turn(false);
        for piece in 1..=PIECES {
            right.write_all(b"x").unwrap();
            // There at once, whoever looks: no pause was put before it.
            bench.turn(false);
            let is_whole = piece == PIECES;
            assert_eq!(bench.results.contains_key(&1), is_whole, "{piece}");
        }
        assert_eq!(bench.result(1), PIECES as i32);
    }

    #[test]
    fn deadlines_and_sleeps_end_in_order_and_data_at_the_deadline_counts() {
        let (left, mut right) = UnixStream::pair().unwrap();
        let mut bench = Bench::new();
        let start = Instant::now();
        let duration = Timespec::new().nsec(20_000_000);
        bench.start(1, Op::Sleep { duration }, None);
        bench.receive(2, left.as_raw_fd(), Some(10));
        let duration = Timespec::new().sec(1 << 40);
        bench.start(3, Op::Sleep { duration }, Some(30));
        assert_eq!(bench.result(2), -libc::ECANCELED);
        assert!(start.elapsed() >= Duration::from_millis(9));
        assert_eq!(bench.result(1), -libc::ETIME);
        assert_eq!(bench.result(3), -libc::ECANCELED);
        assert_eq!(bench.order, [2, 1, 3]);
        right.write_all(b"late").unwrap();
        bench.receive(4, left.as_raw_fd(), Some(0));
        assert_eq!(bench.result(4), 4);
    }

    #[test]
    fn a_connect_to_a_full_backlog_waits_for_room() {
        let name = format!("\0ringsock-epoll-{}", std::process::id());
        let address =
            crate::address::Address::Unix(crate::UnixAddr::Abstract(name.as_bytes()[1..].to_vec()));
        let address: &'static _ = Box::leak(Box::new(address.encode().unwrap()));
        let socket = || sys::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0).unwrap();
        let listener = socket();
        assert_eq!(sys::bind(listener.as_raw_fd(), address), 0);
        assert_eq!(sys::listen(listener.as_raw_fd(), 0), 0);
        let (first, second) = (socket(), socket());
        let mut bench = Bench::new();
        for (number, socket) in [(1, &first), (2, &second)] {
            let fd = socket.as_raw_fd();
            bench.start(number, Op::Connect { fd, address }, Some(10_000));
        }
        assert_eq!(bench.result(1), 0);
        bench.driver.tick(20_000_000);
        bench.turn(true);
        assert!(!bench.results.contains_key(&2), "{:?}", bench.results);
        let mut peer = crate::address::SockAddr::empty();
        let accepted = sys::accept4(listener.as_raw_fd(), &mut peer);
        assert!(accepted >= 0);
        assert_eq!(bench.result(2), 0);
        sys::close(accepted);
    }

    #[test]
    fn a_bell_ends_every_wait() {
        let mut bench = Bench::new();
        let bell = bench.driver.bell().unwrap();
        let start = Instant::now();
        bench.driver.tick(20_000_000_000);
        for _ in 0..3 {
            bell.ring_by_eventfd();
            bench.turn(true);
            assert!(start.elapsed().as_secs() < 15);
        }
    }
}
