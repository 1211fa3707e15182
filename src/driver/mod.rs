//! The driver: operations in, completions out.
//!
//! A [`Driver`] belongs to one thread (a worker, or one plain thread) and runs operations for waiters it knows only as numbers.
//! Nothing above this folder names io_uring; nothing in it knows fibers or sockets.
//!
//! # The life of an operation
//!
//! ```text
//!              prepare                enter                       final CQE, next
//!   begin ───▶ queued in the SQ ───▶ the kernel's ─────────────▶ delivered to its waiter ───▶ slot idle
//!     │                                 │     ▲
//!     │ abandon (nothing submitted)     │     │ deadline: LINK_TIMEOUT cancels it
//!     ▼                                 │     │ prepare_cancel: ASYNC_CANCEL by key
//!   slot idle                           └─────┘ either way its own CQE still comes and is the verdict
//! ```
//!
//! From `prepare` to the final CQE the memory the operation names belongs to the kernel. A deadline or a cancel asks for an
//! early end; only the operation's own CQE says what happened, so bytes that arrived and connections that were accepted are
//! never lost. Timer and cancel CQEs bear tags and never decide: they are ignored, or tell that a cancel missed, or that the
//! kernel has let go of a finished operation's file.
//!
//! # Two backends
//!
//! `uring.rs` gives operations to the kernel's ring. Where that is forbidden or too old, `epoll.rs` does the same by readiness and
//! calls that do not wait. `choice.rs` says which. Above this folder nothing depends on it; in it, what is about SQEs and CQEs
//! (messages between rings, cancels that miss, timers to be waited for) is the ring's alone.
//!
//! # Waking a driver from another thread
//!
//! A driver that is about to wait is woken through its [`Bell`]: by a message from the ringing thread's own ring
//! (`IORING_OP_MSG_RING`), or by an eventfd that the driver watches. Who rings first makes sure there is something to find
//! (`fiber/remote.rs` has the protocol that loses no wake).

mod attempt;
pub(crate) mod choice;
mod epoll;
pub(crate) mod features;
pub(crate) mod op;
mod queues;
#[cfg(any(test, fuzzing))]
pub(crate) mod scripted;
pub(crate) mod slab;
mod timers;
pub(crate) mod uring;
pub(crate) mod watch;

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(crate) use attempt::Attempt;
pub use choice::DriverKind;
pub(crate) use op::{Op, Timespec};
pub(crate) use slab::{Completion, Key, Waiter};
pub(crate) use uring::Full;
pub(crate) use watch::{Limit, SECOND_LOOK, Told, WatchId};

use crate::error::Result;
use crate::sys;
use ::slab::Slab;
use epoll::Epoll;
use features::Features;
use slab::{
    Slots, TAG_CANCEL, TAG_CHECK, TAG_EVENTFD, TAG_FIRST, TAG_LINKED, TAG_LOOK, TAG_MESSAGE,
    TAG_RETRY, TAG_TIMER,
};
use uring::Uring;
use watch::{WATCH_FIRST, Watches};

/// The size of a ring.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    pub(crate) sq_entries: u32,
    /// Completion-queue entries for each submission-queue entry.
    pub(crate) cq_per_sq: u32,
    /// A timer that fires just as its operation ends holds the operation's file until the ring is entered again. A worker
    /// enters all the time; a ring that is left alone after each operation waits for the timer's CQE, too.
    pub(crate) awaits_timers: bool,
}

impl Config {
    /// A worker's ring: 256 SQEs (16 KiB) stay in the first-level cache, and 2,048 CQEs take a burst without overflowing.
    pub(crate) fn worker() -> Config {
        Config {
            sq_entries: 256,
            cq_per_sq: 8,
            awaits_timers: false,
        }
    }

    /// What a worker is left with where memory is short.
    pub(crate) fn smallest() -> Config {
        Config {
            sq_entries: 2,
            ..Config::worker()
        }
    }

    /// A plain thread's ring: one operation, its timer and a cancel at a time.
    pub(crate) fn thread() -> Config {
        Config {
            sq_entries: 8,
            cq_per_sq: 2,
            awaits_timers: true,
        }
    }
}

/// What a driver counts. Plain numbers: only its own thread touches them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) operations: u64,
    pub(crate) enters: u64,
    pub(crate) enters_interrupted: u64,
    pub(crate) enters_refused: u64,
    pub(crate) sqes: u64,
    pub(crate) cqes: u64,
    pub(crate) sq_full: u64,
    pub(crate) cq_overflows: u64,
    pub(crate) messages_failed: u64,
}

/// How other threads wake a driver.
pub(crate) struct Bell {
    fds: Mutex<BellFds>,
}

struct BellFds {
    /// The ring's descriptor, while the ring lives. The lock is held while a message to it is submitted, so the number cannot
    /// be reused in between.
    ring: Option<RawFd>,
    eventfd: Option<OwnedFd>,
}

impl Bell {
    fn lock(&self) -> MutexGuard<'_, BellFds> {
        self.fds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rings by the eventfd, unless the driver is gone.
    pub(crate) fn ring_by_eventfd(&self) {
        if let Some(eventfd) = &self.lock().eventfd {
            sys::ring_eventfd(eventfd.as_raw_fd());
        }
    }

    /// The driver is going: nobody can ring it any more.
    pub(crate) fn retire(&self) {
        let mut fds = self.lock();
        fds.ring = None;
        fds.eventfd = None;
    }
}

/// One thread's driver.
pub(crate) struct Driver {
    slots: Slots,
    watches: Watches,
    counters: Counters,
    backend: Backend,
    /// The eventfd this driver watches.
    eventfd: Option<RawFd>,
    /// The watch ended (an overflow of the CQ ends a multishot poll) and is to be set up again.
    eventfd_unwatched: bool,
    /// Bells rung by message whose outcome is not known yet.
    messages: Slab<Arc<Bell>>,
    /// Cancel requests whose outcome is not known yet.
    cancels: Slab<Key>,
    /// Operations that a cancel (or a connect's timer) did not find, though they go on: to be asked for again.
    missed: Vec<Key>,
    /// The tick that will ask is on its way.
    retry_armed: bool,
    /// The timer of the next look at the waits for events is on its way, or has fired.
    look_armed: bool,
    look_due: bool,
    /// When the timer of the next check for waits whose time is over fires (`i64::MAX`: it is not set), and whether it has.
    check_ns: i64,
    check_due: bool,
    /// What the check's timer lends to the kernel.
    check: Box<Timespec>,
    /// What `tick` lends to the kernel.
    tick: Box<Timespec>,
    /// The CQEs of linked timers are wanted (see `Config::awaits_timers`), and so many are on their way.
    awaits_timers: bool,
    timers: u32,
    /// There was a linked timer, ever.
    has_timed: bool,
}

/// Enters in a row that may be needed to have the kernel do what it deferred: each does some twenty pieces of it.
const ENTERS_TO_SETTLE: u32 = 256;

/// How long a cancel that missed waits before it is repeated.
static CANCEL_RETRY: Timespec = Timespec::new().nsec(1_000_000);

/// The time from one look at the waits for events to the next.
static LOOK: Timespec = Timespec::new().nsec(100_000_000);

// The large variant is the one that counts; a box would cost every operation a step.
#[expect(clippy::large_enum_variant)]
enum Backend {
    Uring(Uring),
    Epoll(Box<Epoll>),
    #[cfg(any(test, fuzzing))]
    Scripted(scripted::Scripted),
}

impl Driver {
    /// A driver on a ring of its own.
    pub(crate) fn uring(config: Config) -> Result<Driver> {
        let uring = Backend::Uring(Uring::new(config)?);
        Ok(Driver::over(uring, config.awaits_timers))
    }

    /// A driver on an epoll instance of its own. `features` says why, if it was not asked for.
    pub(crate) fn epoll(config: Config, features: Features) -> Result<Driver> {
        let epoll = Backend::Epoll(Box::new(Epoll::new(config, features)?));
        Ok(Driver::over(epoll, config.awaits_timers))
    }

    fn over(backend: Backend, awaits_timers: bool) -> Driver {
        Driver {
            slots: Slots::new(),
            watches: Watches::new(matches!(backend, Backend::Uring(_))),
            counters: Counters::default(),
            backend,
            eventfd: None,
            eventfd_unwatched: false,
            messages: Slab::new(),
            cancels: Slab::new(),
            missed: Vec::new(),
            retry_armed: false,
            look_armed: false,
            look_due: false,
            check_ns: i64::MAX,
            check_due: false,
            check: Box::new(Timespec::new()),
            tick: Box::new(Timespec::new()),
            awaits_timers,
            timers: 0,
            has_timed: false,
        }
    }

    /// A driver that plays a script.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn scripted(script: scripted::Scripted) -> Driver {
        Driver::over(Backend::Scripted(script), false)
    }

    /// The bell other threads wake this driver by.
    pub(crate) fn bell(&mut self) -> Result<Bell> {
        let mut fds = BellFds {
            ring: None,
            eventfd: None,
        };
        match &mut self.backend {
            Backend::Uring(uring) => {
                let eventfd = sys::eventfd()?;
                let watched = uring.prepare_eventfd(eventfd.as_raw_fd(), &mut self.counters);
                assert!(watched.is_ok(), "a new ring has room");
                fds.ring = Some(uring.ring_fd());
                self.eventfd = Some(eventfd.as_raw_fd());
                fds.eventfd = Some(eventfd);
            }
            Backend::Epoll(epoll) => {
                let eventfd = sys::eventfd()?;
                epoll.watch_bell(eventfd.as_raw_fd())?;
                fds.eventfd = Some(eventfd);
            }
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(_) => {}
        }
        Ok(Bell {
            fds: Mutex::new(fds),
        })
    }

    /// Rings another driver's bell through this one, at once: by a message between the rings. False where the other is gone,
    /// or the message could not be submitted. A message the other ring refuses is followed by its eventfd.
    pub(crate) fn ring(&mut self, bell: &Arc<Bell>) -> bool {
        match &mut self.backend {
            Backend::Uring(uring) => {
                if !uring.is_ours() {
                    return false;
                }
                let fds = bell.lock();
                let Some(ring_fd) = fds.ring else {
                    return false;
                };
                let index = self.messages.insert(bell.clone());
                let tag = TAG_MESSAGE | (index as u64) << 32;
                if uring
                    .prepare_message(ring_fd, tag, &mut self.counters)
                    .is_err()
                {
                    self.messages.remove(index);
                    return false;
                }
                // Submitted under the lock: see BellFds.
                uring.enter(false, &mut self.counters);
                !uring.has_unsubmitted()
            }
            Backend::Epoll(_) => false,
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(_) => false,
        }
    }

    pub(crate) fn features(&self) -> &Features {
        match &self.backend {
            Backend::Uring(uring) => uring.features(),
            Backend::Epoll(epoll) => epoll.features(),
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(script) => script.features(),
        }
    }

    /// Whether [`Op::SendZeroCopy`] can be submitted.
    pub(crate) fn has_zero_copy(&self) -> bool {
        match &self.backend {
            Backend::Uring(uring) => uring.has_zero_copy(),
            Backend::Epoll(_) => false,
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(_) => false,
        }
    }

    /// Registers memory with the ring: the index that operations name it by, or an errno.
    ///
    /// # Safety
    ///
    /// An operation that names the index names memory of this region, which is still mapped.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn register_buffer(
        &mut self,
        start: *mut u8,
        bytes: usize,
    ) -> std::result::Result<u16, i32> {
        match &mut self.backend {
            // SAFETY: the caller's promise.
            Backend::Uring(uring) => unsafe { uring.register_buffer(start, bytes) },
            Backend::Epoll(_) => Err(libc::EOPNOTSUPP),
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(_) => Err(libc::EOPNOTSUPP),
        }
    }

    /// Gives an index of [`register_buffer`](Driver::register_buffer) back.
    pub(crate) fn unregister_buffer(&mut self, index: u16) {
        match &mut self.backend {
            Backend::Uring(uring) => uring.unregister_buffer(index),
            Backend::Epoll(_) => {}
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(_) => {}
        }
    }

    pub(crate) fn counters(&self) -> Counters {
        self.counters
    }

    pub(crate) fn slots(&mut self) -> &mut Slots {
        &mut self.slots
    }

    /// Whether this process made the driver, rather than inheriting it by fork(2).
    #[inline]
    pub(crate) fn is_ours(&self) -> bool {
        match &self.backend {
            Backend::Uring(uring) => uring.is_ours(),
            Backend::Epoll(epoll) => epoll.is_ours(),
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(_) => true,
        }
    }

    /// Starts `op` as `key`, which [`Slots::begin`] made. `timeout` counts from its submission.
    ///
    /// # Errors
    ///
    /// [`Full`]: nothing was started; reap and try again.
    ///
    /// # Safety
    ///
    /// The memory that `op` borrows and `*timeout` must stay valid and, where the operation writes, unaliased until the
    /// completion of the key has been returned by [`next`](Driver::next), whatever happens to the borrowing frame. The same holds
    /// for `*op`, unless it is known that this driver is a ring: without one, the operation is tried where it is.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(crate) unsafe fn submit(
        &mut self,
        op: &mut Op<'_>,
        key: Key,
        timeout: Option<&Timespec>,
    ) -> std::result::Result<(), Full> {
        match &mut self.backend {
            // SAFETY: the caller's promise.
            Backend::Uring(uring) => unsafe {
                // A connect that the kernel keeps retrying can be missed by its timer as by a cancel (see `cancel`), so that
                // timer's outcome is looked at.
                let watch = matches!(op, Op::Connect { .. }) && timeout.is_some();
                let tag = if watch {
                    TAG_CANCEL | (self.cancels.insert(key) as u64) << 32
                } else if self.awaits_timers && timeout.is_some() {
                    self.timers += 1;
                    TAG_LINKED
                } else {
                    TAG_TIMER
                };
                self.has_timed |= timeout.is_some();
                let prepared = uring.prepare(op, key, timeout, tag, &mut self.counters);
                if prepared.is_err() {
                    if watch {
                        self.cancels.remove((tag >> 32) as usize);
                    }
                    self.timers -= u32::from(tag == TAG_LINKED);
                }
                prepared
            },
            // SAFETY: the caller's promise.
            Backend::Epoll(epoll) => unsafe {
                epoll.prepare(op, key, timeout);
                Ok(())
            },
            #[cfg(any(test, fuzzing))]
            // SAFETY: the caller's promise.
            Backend::Scripted(script) => unsafe { script.prepare(op, key, timeout) },
        }?;
        self.counters.operations += 1;
        Ok(())
    }

    /// Asks for an early end of the operation `key`; its completion still comes.
    ///
    /// The kernel can miss an operation that it is just retrying (seen with connect on AF_UNIX: `-ENOENT`, and the operation
    /// waited on), so the request is repeated until the operation has completed.
    ///
    /// # Errors
    ///
    /// [`Full`]: not asked; reap and try again.
    pub(crate) fn cancel(&mut self, key: Key) -> std::result::Result<(), Full> {
        if !self.slots.is_waiting(key) {
            return Ok(());
        }
        match &mut self.backend {
            Backend::Uring(uring) => {
                let index = self.cancels.insert(key);
                let tag = TAG_CANCEL | (index as u64) << 32;
                let prepared = uring.prepare_cancel(key, tag, &mut self.counters);
                if prepared.is_err() {
                    self.cancels.remove(index);
                }
                prepared
            }
            Backend::Epoll(epoll) => {
                epoll.cancel(key);
                Ok(())
            }
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(script) => {
                script.cancel(key);
                Ok(())
            }
        }
    }

    /// Begins to watch a descriptor for something to receive; `None` where the driver cannot, or not now.
    pub(crate) fn watch(&mut self, fd: RawFd) -> Option<WatchId> {
        match &mut self.backend {
            Backend::Uring(uring) => {
                let id = self.watches.begin()?;
                if uring.prepare_watch(fd, id, &mut self.counters).is_err() {
                    self.watches.abandon(id);
                    return None;
                }
                Some(id)
            }
            // A receive that waits is a registration already, and no more.
            Backend::Epoll(_) => None,
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(_) => None,
        }
    }

    /// What a watch told is there still.
    #[inline(always)]
    pub(crate) fn keep_events(&mut self, id: WatchId, events: u32) {
        self.watches.keep_events(id, events);
    }

    /// What a watch has told since the last time, or else a wait of the slot that ends with the watch's next event, or with
    /// `limit`.
    #[inline(always)]
    pub(crate) fn events_or_wait(&mut self, id: WatchId, slot: u32, limit: &mut Limit) -> Told {
        let begin = || self.slots.begin(slot);
        self.watches.events_or_wait(id, limit, begin)
    }

    /// Somebody has seen that there is nothing of what the watch tells of.
    #[inline]
    pub(crate) fn found_nothing(&mut self, id: WatchId) {
        self.watches.found_nothing(id);
    }

    /// Who waits for an event and is not to wait any longer: for a second look, or (`-ETIME`) since its time is over. Mostly nobody.
    #[inline(always)]
    pub(crate) fn overdue(&mut self) -> Vec<(Waiter, i32)> {
        if !self.look_due && !self.check_due {
            return Vec::new();
        }
        self.look_and_check()
    }

    #[cold]
    #[inline(never)]
    fn look_and_check(&mut self) -> Vec<(Waiter, i32)> {
        const LOOK_AGAIN: i32 = SECOND_LOOK as i32;
        let mut due = Vec::new();
        if std::mem::take(&mut self.look_due) {
            self.look_armed = false;
            due.extend(self.watches.look().into_iter().map(|key| (key, LOOK_AGAIN)));
        }
        if std::mem::take(&mut self.check_due) {
            let over = self.watches.check(sys::monotonic_ns()).into_iter();
            due.extend(over.map(|(key, seen_empty)| {
                let code = if seen_empty { -libc::ETIME } else { LOOK_AGAIN };
                (key, code)
            }));
        }
        // One that ended otherwise has a fiber that has not come to say so.
        due.into_iter()
            .filter_map(|(key, code)| Some((self.slots.end_wait(key)?, code)))
            .collect()
    }

    /// The wait `key` for an event has ended otherwise.
    pub(crate) fn forgo_event(&mut self, id: WatchId, key: Key) {
        self.watches.detach(id, key);
    }

    /// Forgets a watch that the kernel has ended, once what it told was taken: whether it is no more.
    pub(crate) fn forget_watch_if_over(&mut self, id: WatchId) -> bool {
        self.watches.forget_if_over(id)
    }

    /// Ends a watch, at once where that is possible: whether it holds its file no longer.
    pub(crate) fn end_watch(&mut self, id: WatchId) -> bool {
        if !self.watches.begin_end(id) {
            return true;
        }
        match &mut self.backend {
            Backend::Uring(uring) => {
                // A cancel by key cannot miss a poll: it is found wherever it stands, or has posted its last CQE. Each enter runs
                // a part of what the kernel has deferred.
                while uring
                    .prepare_cancel(Key(id.0), TAG_TIMER, &mut self.counters)
                    .is_err()
                {
                    uring.enter(false, &mut self.counters);
                }
                for _ in 0..ENTERS_TO_SETTLE {
                    uring.enter(false, &mut self.counters);
                    if uring.has_last(id.0) || !uring.has_deferred() {
                        break;
                    }
                }
                uring.has_last(id.0)
            }
            Backend::Epoll(_) => true,
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(_) => true,
        }
    }

    /// How many watches there are.
    pub(crate) fn watches(&self) -> usize {
        self.watches.count()
    }

    /// Whether a watch that was ended, or its last CQE, is gone.
    pub(crate) fn is_watch_gone(&mut self, id: WatchId) -> bool {
        self.watches.is_gone(id)
    }

    /// Ends all watches, at the end of the driver: their files outlive it.
    pub(crate) fn end_watches(&mut self) {
        for id in self.watches.armed() {
            self.end_watch(id);
        }
        for _ in 0..ENTERS_TO_SETTLE {
            while self.next().is_some() {}
            if !self.watches.any() {
                return;
            }
            self.enter(false);
        }
    }

    /// Ends the watch of the eventfd, so that nothing of the ring is in flight any more.
    pub(crate) fn close_bell(&mut self) {
        if self.eventfd.take().is_some() {
            match &mut self.backend {
                // A full queue keeps the watch: it borrows no memory, and closing the ring ends it too.
                Backend::Uring(uring) => {
                    let _ = uring.prepare_cancel(Key(TAG_EVENTFD), TAG_TIMER, &mut self.counters);
                    uring.enter(false, &mut self.counters);
                }
                // A registration goes with its eventfd.
                Backend::Epoll(_) => {}
                #[cfg(any(test, fuzzing))]
                Backend::Scripted(_) => {}
            }
        }
    }

    /// Makes a waiting [`enter`](Driver::enter) return after `ns` at the latest, once.
    #[allow(unsafe_code)]
    pub(crate) fn tick(&mut self, ns: i64) {
        *self.tick = op::timespec_from_ns(ns.max(0));
        match &mut self.backend {
            // SAFETY: the box lives as long as the ring. A full queue leaves no room after an enter only if the kernel takes
            // nothing, and then enter does not wait either.
            Backend::Uring(uring) => unsafe {
                let _ = uring.prepare_tick(&self.tick, TAG_TIMER, &mut self.counters);
            },
            Backend::Epoll(epoll) => epoll.tick(ns.max(0)),
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(_) => {}
        }
    }

    /// Submits what was prepared and, with `wait`, blocks until something completes or somebody rings.
    pub(crate) fn enter(&mut self, wait: bool) {
        match &mut self.backend {
            Backend::Uring(uring) => {
                if self.eventfd_unwatched
                    && let Some(eventfd) = self.eventfd
                {
                    let watched = uring.prepare_eventfd(eventfd, &mut self.counters);
                    self.eventfd_unwatched = watched.is_err();
                }
                if !self.missed.is_empty() && !self.retry_armed {
                    // SAFETY: the duration is a static.
                    #[allow(unsafe_code)]
                    let armed =
                        unsafe { uring.prepare_tick(&CANCEL_RETRY, TAG_RETRY, &mut self.counters) };
                    self.retry_armed = armed.is_ok();
                }
                if self.watches.wants_look() && !self.look_armed {
                    // SAFETY: the duration is a static.
                    #[allow(unsafe_code)]
                    let armed = unsafe { uring.prepare_tick(&LOOK, TAG_LOOK, &mut self.counters) };
                    self.look_armed = armed.is_ok();
                }
                if self.watches.soonest_ns() < self.check_ns {
                    let soonest_ns = self.watches.soonest_ns();
                    let left_ns = soonest_ns.saturating_sub(sys::monotonic_ns());
                    *self.check = op::timespec_from_ns(left_ns.max(0));
                    let is_set = self.check_ns != i64::MAX;
                    // SAFETY: the box lives as long as the ring. It is written again before the next enter only if this one
                    // submitted nothing, and then with a time that is as soon or sooner.
                    #[allow(unsafe_code)]
                    let set =
                        unsafe { uring.prepare_check(&self.check, is_set, &mut self.counters) };
                    if set.is_ok() {
                        self.check_ns = soonest_ns;
                    }
                }
                uring.enter(wait, &mut self.counters);
            }
            Backend::Epoll(epoll) => epoll.enter(wait, &mut self.counters),
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(script) => script.enter(wait),
        }
    }

    /// The next completion at hand and its waiter.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> Option<(Waiter, Completion)> {
        loop {
            let (user_data, completion) = match &mut self.backend {
                Backend::Uring(uring) => uring.next(&mut self.counters)?,
                Backend::Epoll(epoll) => epoll.next(&mut self.counters)?,
                #[cfg(any(test, fuzzing))]
                Backend::Scripted(script) => script.next()?,
            };
            let delivered = if user_data as u32 >= WATCH_FIRST {
                self.told(user_data, completion)
            } else {
                self.slots.complete(user_data, completion)
            };
            if delivered.is_some() {
                return delivered;
            }
        }
    }

    /// Of the completions at hand, whom the one so many behind the next is likely for. Nothing is settled by it.
    #[inline(always)]
    pub(crate) fn ahead(&mut self, behind: u32) -> Option<Waiter> {
        let Backend::Uring(uring) = &self.backend else {
            return None;
        };
        let mut key = Key(uring.ahead(behind)?);
        if key.0 as u32 >= WATCH_FIRST {
            key = self.watches.waiting(WatchId(key.0))?;
        }
        self.slots.waiter(key.0 as u32)
    }

    /// A CQE that is no operation's of a slot: of a watch, it may end a wait.
    #[inline(always)]
    fn told(&mut self, user_data: u64, completion: Completion) -> Option<(Waiter, Completion)> {
        if user_data as u32 >= TAG_FIRST {
            self.notice(user_data, completion);
            return None;
        }
        let Some((key, events)) = self.watches.complete(user_data, completion) else {
            self.end_watch_if_unheard(WatchId(user_data));
            return None;
        };
        match self.slots.end_wait(key) {
            Some(waiter) => {
                let told = Completion {
                    res: events as i32,
                    flags: 0,
                };
                Some((waiter, told))
            }
            None => {
                // It ended otherwise, and its fiber has not come to say so.
                self.watches.keep_events(WatchId(user_data), events);
                None
            }
        }
    }

    #[inline(always)]
    fn end_watch_if_unheard(&mut self, id: WatchId) {
        if self.watches.begin_end_if_unheard(id)
            && let Backend::Uring(uring) = &mut self.backend
            && uring
                .prepare_cancel(Key(id.0), TAG_TIMER, &mut self.counters)
                .is_err()
        {
            self.watches.go_on(id);
        }
    }

    /// A CQE no slot waits for. Timers need nothing further; a cancel that missed is repeated; a bell that could not be rung by
    /// message is rung by eventfd; a watch that ended is set up again.
    #[cold]
    #[inline(never)]
    fn notice(&mut self, user_data: u64, completion: Completion) {
        match user_data & 0xffff_ffff {
            TAG_EVENTFD => {
                self.eventfd_unwatched =
                    completion.flags & slab::CQE_F_MORE == 0 && completion.res != -libc::ECANCELED;
            }
            TAG_CANCEL => {
                if let Some(key) = self.cancels.try_remove((user_data >> 32) as usize)
                    && matches!(-completion.res, libc::ENOENT | libc::EALREADY)
                    && self.slots.is_waiting(key)
                {
                    self.missed.push(key);
                }
            }
            TAG_LINKED => self.timers -= 1,
            TAG_LOOK => self.look_due = true,
            TAG_CHECK => {
                self.check_due = true;
                self.check_ns = i64::MAX;
            }
            TAG_RETRY => {
                self.retry_armed = false;
                for key in std::mem::take(&mut self.missed) {
                    if self.cancel(key).is_err() {
                        self.missed.push(key);
                    }
                }
            }
            TAG_MESSAGE => {
                if let Some(bell) = self.messages.try_remove((user_data >> 32) as usize)
                    && completion.res < 0
                {
                    self.counters.messages_failed += 1;
                    bell.ring_by_eventfd();
                }
            }
            _ => {}
        }
    }

    /// Whether no request about finished operations (their timers, cancels) is the kernel's any more.
    pub(crate) fn is_settled(&self) -> bool {
        self.timers == 0 && self.cancels.is_empty()
    }

    /// [`settle`](Driver::settle), where there were timers: an operation without one holds its file no longer than its completion.
    pub(crate) fn settle_timers(&mut self) {
        if self.has_timed {
            self.settle();
        }
    }

    /// Runs what the kernel has deferred, so that finished operations let go of their files.
    pub(crate) fn settle(&mut self) {
        match &mut self.backend {
            Backend::Uring(uring) => {
                // A timer that fired late posts its CQE in one round and lets go of its operation in the next.
                for _ in 0..4 {
                    if !uring.has_deferred() {
                        return;
                    }
                    uring.enter(false, &mut self.counters);
                }
            }
            // Here an operation holds no file.
            Backend::Epoll(_) => {}
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(_) => {}
        }
    }

    /// Whether something is at hand or queued that makes the next enter worth while without waiting: SQEs to submit, timers to set,
    /// completions to post.
    #[inline]
    pub(crate) fn has_work(&self) -> bool {
        match &self.backend {
            Backend::Uring(uring) => {
                let wants_look = self.watches.wants_look() && !self.look_armed;
                let wants_check = self.watches.soonest_ns() < self.check_ns;
                uring.has_unsubmitted() || uring.has_deferred() || wants_look || wants_check
            }
            Backend::Epoll(epoll) => epoll.has_work(),
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(script) => script.has_work(),
        }
    }

    /// Whether there are completions at hand, or some that the next enter would post.
    #[inline]
    pub(crate) fn has_completions(&self) -> bool {
        match &self.backend {
            Backend::Uring(uring) => uring.has_completions(),
            Backend::Epoll(epoll) => epoll.has_completions(),
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(script) => script.has_work(),
        }
    }

    /// Whether the next enter would bring completions, as far as can be seen without entering.
    pub(crate) fn has_arrivals(&self) -> bool {
        match &self.backend {
            Backend::Epoll(epoll) => epoll.has_arrivals(),
            _ => self.has_completions(),
        }
    }

    /// Which backend this is.
    pub(crate) fn kind(&self) -> DriverKind {
        match &self.backend {
            Backend::Epoll(_) => DriverKind::Epoll,
            _ => DriverKind::Uring,
        }
    }

    /// The driver's clock in nanoseconds.
    pub(crate) fn now_ns(&self) -> i64 {
        match &self.backend {
            Backend::Uring(_) | Backend::Epoll(_) => sys::monotonic_ns(),
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(script) => script.now_ns(),
        }
    }

    /// Runs `op` as one call that does not wait: `-EAGAIN` where it would.
    #[inline(always)]
    pub(crate) fn attempt(&mut self, op: &mut Op<'_>) -> i32 {
        match &mut self.backend {
            Backend::Uring(_) | Backend::Epoll(_) => op.attempt(),
            #[cfg(any(test, fuzzing))]
            Backend::Scripted(script) => script.attempt(op),
        }
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::*;

    fn driver(sq_entries: u32, cq_per_sq: u32) -> Driver {
        Driver::uring(Config {
            sq_entries,
            cq_per_sq,
            awaits_timers: false,
        })
        .unwrap()
    }

    /// Starts an operation for a new waiter of this number, reaping whatever has to go first: its key.
    ///
    /// # Safety
    ///
    /// As for [`Driver::submit`].
    unsafe fn start(
        driver: &mut Driver,
        number: usize,
        op: &mut Op<'_>,
        reaped: &mut Vec<(Waiter, Completion)>,
    ) -> Key {
        let slot = driver.slots().register(Waiter::new(number).unwrap());
        let key = driver.slots().begin(slot);
        // SAFETY: the caller's promise.
        while unsafe { driver.submit(op, key, None) } == Err(Full) {
            driver.enter(false);
            reaped.extend(std::iter::from_fn(|| driver.next()));
        }
        key
    }

    #[test]
    fn a_completion_queue_of_eight_delivers_ten_thousand_completions_once_each() {
        const OPERATIONS: usize = 10_000;
        for (sq_entries, cq_per_sq) in [(4, 2), (2, 4), (2, 2)] {
            let eventfd = sys::eventfd().unwrap();
            let mut driver = driver(sq_entries, cq_per_sq);
            let mut reaped = Vec::new();
            for number in 1..=OPERATIONS {
                let mut op = Op::Poll {
                    fd: eventfd.as_raw_fd(),
                    events: libc::POLLIN,
                };
                // SAFETY: a poll names no memory.
                unsafe { start(&mut driver, number, &mut op, &mut reaped) };
            }
            driver.enter(false);
            assert!(reaped.is_empty() && driver.next().is_none());
            assert_eq!(driver.slots().waiting(), OPERATIONS);
            // All at once.
            sys::ring_eventfd(eventfd.as_raw_fd());
            while driver.slots().waiting() > 0 {
                driver.enter(true);
                reaped.extend(std::iter::from_fn(|| driver.next()));
            }
            let mut waiters: Vec<usize> = reaped.iter().map(|(waiter, _)| waiter.get()).collect();
            waiters.sort_unstable();
            assert_eq!(waiters, (1..=OPERATIONS).collect::<Vec<_>>());
            let counters = driver.counters();
            assert!(counters.cq_overflows > 0, "{counters:?}");
            assert!(counters.sq_full > 0, "{counters:?}");
            assert_eq!(driver.slots().unknown(), 0);
        }
    }

    #[test]
    fn cancels_of_a_thousand_operations_on_the_smallest_ring_reach_each() {
        const OPERATIONS: usize = 1000;
        let eventfd = sys::eventfd().unwrap();
        let mut driver = driver(2, 2);
        let mut reaped = Vec::new();
        let keys: Vec<Key> = (1..=OPERATIONS)
            .map(|number| {
                let mut op = Op::Poll {
                    fd: eventfd.as_raw_fd(),
                    events: libc::POLLIN,
                };
                // SAFETY: a poll names no memory.
                unsafe { start(&mut driver, number, &mut op, &mut reaped) }
            })
            .collect();
        for key in keys {
            while driver.cancel(key) == Err(Full) {
                driver.enter(false);
                reaped.extend(std::iter::from_fn(|| driver.next()));
            }
        }
        while driver.slots().waiting() > 0 || !driver.is_settled() {
            driver.enter(true);
            reaped.extend(std::iter::from_fn(|| driver.next()));
        }
        assert_eq!(reaped.len(), OPERATIONS);
        assert!(
            reaped
                .iter()
                .all(|(_, completion)| completion.res == -libc::ECANCELED)
        );
        assert_eq!(driver.slots().unknown(), 0);
    }

    #[test]
    fn a_bell_survives_overflows_of_the_completion_queue() {
        let eventfd = sys::eventfd().unwrap();
        let mut driver = driver(4, 2);
        let bell = driver.bell().unwrap();
        let mut reaped = Vec::new();
        for number in 1..=100 {
            let mut op = Op::Poll {
                fd: eventfd.as_raw_fd(),
                events: libc::POLLIN,
            };
            // SAFETY: a poll names no memory.
            unsafe { start(&mut driver, number, &mut op, &mut reaped) };
        }
        driver.enter(false);
        sys::ring_eventfd(eventfd.as_raw_fd());
        // Rung while the queue is full, the watch ends; the next enter sets it up again.
        bell.ring_by_eventfd();
        while driver.slots().waiting() > 0 {
            driver.enter(true);
            reaped.extend(std::iter::from_fn(|| driver.next()));
        }
        assert_eq!(reaped.len(), 100);
        while driver.has_work() || driver.eventfd_unwatched {
            driver.enter(false);
            while driver.next().is_some() {}
        }
        // From now on only the bell can end the wait, long before the tick.
        let start = std::time::Instant::now();
        driver.tick(20_000_000_000);
        for _ in 0..3 {
            bell.ring_by_eventfd();
            driver.enter(true);
            while driver.next().is_some() {}
            assert!(start.elapsed().as_secs() < 15);
        }
    }
}
