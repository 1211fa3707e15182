//! One worker: the thread that runs fibers, their ready queue, its ring and its mailbox.
//!
//! # One turn
//!
//! ```text
//!  mail ──▶ the fibers that were ready at the turn's start ──▶ one enter: submit everything, wait if nothing is ready
//!    ▲                                                              │
//!    └───────── completions, each resuming its fiber on the spot ◀──┘
//! ```
//!
//! - A fiber that makes itself ready again goes behind all that were ready, and behind the completions at hand.
//! - A completion resumes its fiber straight from the loop: no queue stands between.
//! - Fibers run inside `turn`, so no field may stay borrowed across [`resume`](Worker::resume).
//!
//! # Ending
//!
//! ```text
//!  Running ──stop──▶ Stopping: operations cancelled, calls answer Shutdown ──grace over──▶ Unwinding: suspensions unwind
//!                        │ no fiber left                                                      │ no fiber left, or the rest
//!                        ▼                                                                    ▼ has had the grace twice
//!                      ended ◀───────────────────────────────────────────── ended: survivors leaked, counted, logged
//! ```

use std::cell::{Cell, RefCell, RefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::park::Waker;
use super::pin::Pins;
use super::remote::{Control, Mailbox, Remote};
use super::route::ZeroCopy;
use super::spin::Spin;
use super::stack::{STACK_BYTES_MIN, StackPool};
use super::{AbortOnUnwind, DriverCell, FiberRef, State, interrupt};
use crate::buf::lease::Pool;
use crate::driver::features::Features;
use crate::driver::{Bell, Completion, Driver, DriverKind, Full, Key, Op, Waiter, WatchId};
use crate::error::{Error, Result};
use crate::log::log;
use crate::metrics::Counts;
use crate::sys;

/// How many plain sends a fiber may make before it has to go through the ring, so that the others get a turn.
const DIRECT_CALLS_MAX: u32 = 16;

/// A turn that serves more fibers than this is crowded: then operations go through the ring, or wait for events of it
/// (`watch.rs`), which brings a few at a time, in the order in which their data came, and so while it is in a cache. Going round
/// the fibers with plain calls finds none of it there any more: 1,024 connections of 64 bytes cost 6,499 ns an echo that way on
/// TCP and 2,554 on Unix sockets, through the ring 5,808 and 2,472, and 64 connections as much one way as the other.
const CROWD: u64 = 128;

/// A turn that serves no more fibers than this is quiet: whoever lets the others go first comes back too soon to find anything.
const QUIET: u64 = 8;

/// How many values a fiber may pass through channels before it lets the others go first.
const UNWAITED_CALLS_MAX: u32 = 128;

/// A worker that never waits publishes its counters once in so many turns.
const PUBLISH_TURNS: u64 = 64;

/// The limits a worker is made with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) stack_bytes: usize,
    pub(crate) fibers_max: usize,
    pub(crate) spawns_max: usize,
    pub(crate) grace: Duration,
    /// How long to spin before a wait.
    pub(crate) spin: Duration,
    /// Receive buffers, and bytes of each.
    pub(crate) buffers: (usize, usize),
    pub(crate) zero_copy: ZeroCopy,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Running,
    Stopping { unwind_at_ns: i64 },
    Unwinding { give_up_at_ns: i64 },
}

/// Fibers in the order they became ready, linked through their control blocks, which resuming them reads anyway.
#[derive(Default)]
struct ReadyQueue {
    first: Cell<Option<FiberRef>>,
    /// Meaningful while there is a first.
    last: Cell<Option<FiberRef>>,
}

impl ReadyQueue {
    #[inline]
    fn is_empty(&self) -> bool {
        self.first.get().is_none()
    }

    #[inline]
    fn push(&self, fiber: FiberRef) {
        fiber.next_ready.set(None);
        match self.first.get() {
            None => self.first.set(Some(fiber)),
            Some(_) => {
                if let Some(last) = self.last.get() {
                    last.next_ready.set(Some(fiber));
                }
            }
        }
        self.last.set(Some(fiber));
    }

    /// Fetches what resuming the first will read, and the block of the second: with a thousand fibers, none of it is in a cache.
    #[inline(always)]
    fn prefetch(&self) {
        if let Some(first) = self.first.get() {
            first.prefetch_frames();
            if let Some(second) = first.next_ready.get() {
                second.prefetch_block();
            }
        }
    }

    #[inline]
    fn pop(&self) -> Option<FiberRef> {
        let fiber = self.first.get()?;
        self.first.set(fiber.next_ready.get());
        Some(fiber)
    }
}

type Ending = (WatchId, Box<dyn FnOnce()>);

/// See the module's documentation.
pub(crate) struct Worker {
    pub(super) driver: DriverCell,
    current: Cell<Option<FiberRef>>,
    ready: ReadyQueue,
    /// Cancels that found the submission queue full.
    cancels: RefCell<Vec<Key>>,
    /// Watches that did not end at once, and what is to be done when they have. Mostly empty.
    ending: RefCell<Vec<Ending>>,
    stacks: RefCell<StackPool>,
    pub(super) buffers: Pool,
    pub(super) pins: Pins,
    remote: Arc<Remote>,
    mailbox: Mailbox,
    counts: Arc<Counts>,
    limits: Limits,
    phase: Cell<Phase>,
    /// The end of the phase is on the ring.
    ticking: Cell<bool>,
    /// There was no room for the spawns in the mailbox, or for more of them.
    spawns_waiting: Cell<bool>,
    /// Fibers that wait for room to spawn another.
    waiting_for_room: RefCell<Vec<Waker>>,
    live: Cell<usize>,
    lost: Cell<usize>,
    spin: Spin,
    turns: Cell<u64>,
    switches: Cell<u64>,
    spawned: Cell<u64>,
    /// The last turn served more than [`CROWD`] fibers, and there is a ring to go through.
    crowded: Cell<bool>,
    /// It served no more than [`QUIET`].
    quiet: Cell<bool>,
    crowd: u64,
    direct_calls: Cell<u32>,
    unwaited_calls: Cell<u32>,
    fork_mark: &'static AtomicU32,
    fork_epoch: u32,
}

impl Worker {
    /// A worker for the calling thread.
    pub(crate) fn new(mut driver: Driver, limits: Limits, counts: Arc<Counts>) -> Result<Worker> {
        let bell = driver.bell()?;
        let (remote, mailbox) = Remote::new(bell, limits.spawns_max);
        let crowd = match driver.kind() {
            DriverKind::Uring => CROWD,
            DriverKind::Epoll => u64::MAX,
        };
        Ok(Worker {
            driver: DriverCell::new(driver),
            current: Cell::new(None),
            ready: ReadyQueue::default(),
            cancels: RefCell::new(Vec::new()),
            ending: RefCell::new(Vec::new()),
            stacks: RefCell::new(StackPool::new(limits.stack_bytes)),
            buffers: Pool::new(limits.buffers.0, limits.buffers.1),
            pins: Pins::new(limits.zero_copy),
            remote,
            mailbox,
            counts,
            limits,
            phase: Cell::new(Phase::Running),
            ticking: Cell::new(false),
            spawns_waiting: Cell::new(false),
            waiting_for_room: RefCell::new(Vec::new()),
            live: Cell::new(0),
            lost: Cell::new(0),
            spin: Spin::new(limits.spin),
            turns: Cell::new(0),
            switches: Cell::new(0),
            spawned: Cell::new(0),
            crowded: Cell::new(false),
            quiet: Cell::new(true),
            crowd,
            direct_calls: Cell::new(0),
            unwaited_calls: Cell::new(0),
            fork_mark: sys::fork_mark(),
            fork_epoch: sys::fork_epoch(),
        })
    }

    #[inline]
    pub(crate) fn id(&self) -> u32 {
        self.remote.id()
    }

    #[inline]
    pub(crate) fn remote(&self) -> &Arc<Remote> {
        &self.remote
    }

    #[inline]
    pub(super) fn current(&self) -> Option<FiberRef> {
        self.current.get()
    }

    pub(super) fn stacks(&self) -> RefMut<'_, StackPool> {
        self.stacks.borrow_mut()
    }

    /// Puts another pool of stacks, of the same size, in the place of the one it has.
    #[cfg(any(test, fuzzing))]
    pub(super) fn replace_stacks(&self, stacks: StackPool) -> StackPool {
        assert!(self.live.get() == 0, "a fiber has one of the stacks");
        self.stacks.replace(stacks)
    }

    /// What the worker's driver found the kernel to offer.
    pub(crate) fn features(&self) -> Features {
        self.driver.with(|driver| driver.features().clone())
    }

    /// Whether this process made the worker, rather than inheriting it by fork(2).
    #[inline]
    pub(super) fn is_ours(&self) -> bool {
        self.fork_mark.load(Ordering::Relaxed) == self.fork_epoch
    }

    pub(crate) fn now_ns(&self) -> i64 {
        self.driver.with(|driver| driver.now_ns())
    }

    /// Runs `op` without waiting.
    #[inline(always)]
    pub(super) fn attempt(&self, op: &mut Op<'_>) -> i32 {
        self.driver.with(|driver| driver.attempt(op))
    }

    /// Runs `op` as a plain call that does not wait; `None` if it would have to, if the fiber has made so many of them since it
    /// was switched in that the others should get a turn, or, not being `timed`, is in a crowd.
    #[inline(always)]
    pub(crate) fn attempt_directly(&self, op: &mut Op<'_>, timed: bool) -> Option<i32> {
        let calls = self.direct_calls.get();
        if calls >= DIRECT_CALLS_MAX || (self.crowded.get() && !timed) {
            return None;
        }
        self.direct_calls.set(calls + 1);
        match self.attempt(op) {
            sent if sent >= 0 => Some(sent),
            // What is to be repeated is repeated by the ring.
            code if matches!(-code, libc::EAGAIN | libc::EINTR) => None,
            code => Some(code),
        }
    }

    /// Counts a plain call of the current fiber: false if it has made so many since it was switched in that the others should
    /// get a turn.
    #[inline(always)]
    pub(super) fn may_call_again(&self) -> bool {
        let calls = self.direct_calls.get();
        self.direct_calls.set(calls + 1);
        calls < DIRECT_CALLS_MAX
    }

    /// Ends a watch of this worker's: whether it holds its file no longer.
    pub(super) fn end_watch(&self, id: WatchId) -> bool {
        self.driver.with(|driver| driver.end_watch(id))
    }

    /// Runs `then` once a watch that did not end at once is gone.
    pub(super) fn when_watch_gone(&self, id: WatchId, then: impl FnOnce() + 'static) {
        self.ending.borrow_mut().push((id, Box::new(then)));
    }

    /// Whether the last turn served very few fibers.
    #[inline]
    pub(super) fn is_quiet(&self) -> bool {
        self.quiet.get()
    }

    /// Whether the last turn served very many fibers.
    #[inline]
    pub(super) fn is_crowded(&self) -> bool {
        self.crowded.get()
    }

    /// Counts a call of the current fiber that did not wait: whether there were many since it was switched in.
    #[inline]
    pub(super) fn has_run_long(&self) -> bool {
        let calls = self.unwaited_calls.get() + 1;
        self.unwaited_calls.set(calls);
        calls >= UNWAITED_CALLS_MAX
    }

    // Fibers.

    pub(super) fn register(&self, fiber: FiberRef) -> u32 {
        self.live.set(self.live.get() + 1);
        self.driver
            .with(|driver| driver.slots().register(fiber.waiter()))
    }

    pub(super) fn next_fiber_id(&self) -> u64 {
        self.spawned.set(self.spawned.get() + 1);
        self.spawned.get()
    }

    /// A fiber born during the shutdown is told at its first call.
    pub(super) fn interrupts_of_new_fibers(&self) -> u8 {
        match self.phase.get() {
            Phase::Running => 0,
            Phase::Stopping { .. } => interrupt::SHUTDOWN,
            Phase::Unwinding { .. } => interrupt::SHUTDOWN | interrupt::UNWIND,
        }
    }

    /// Whether the worker may have another fiber.
    pub(super) fn has_room(&self) -> bool {
        self.live.get() < self.limits.fibers_max
    }

    #[inline]
    pub(super) fn make_ready(&self, fiber: FiberRef) {
        fiber.state.set(State::Ready);
        self.ready.push(fiber);
    }

    /// The fiber will never run again and keeps what it has.
    pub(super) fn lose(&self, fiber: FiberRef) {
        self.lost.set(self.lost.get() + 1);
        if let Some(packet) = &fiber.packet {
            packet.abandon();
        }
    }

    #[inline(always)]
    fn resume(&self, fiber: FiberRef) {
        fiber.state.set(State::Running);
        self.current.set(Some(fiber));
        self.direct_calls.set(0);
        self.unwaited_calls.set(0);
        self.switches.set(self.switches.get() + 1);
        let ended = fiber.resume();
        self.current.set(None);
        if ended {
            self.retire(fiber);
        }
    }

    #[inline(never)]
    fn retire(&self, fiber: FiberRef) {
        self.driver
            .with(|driver| driver.slots().unregister(fiber.slot));
        let stack = super::destroy(fiber);
        self.stacks.borrow_mut().give(stack);
        self.live.set(self.live.get() - 1);
        if !self.waiting_for_room.borrow().is_empty() {
            let waiting = std::mem::take(&mut *self.waiting_for_room.borrow_mut());
            waiting.into_iter().for_each(Waker::wake);
        }
    }

    /// Wakes `waker` when a fiber has ended.
    pub(super) fn wait_for_room(&self, waker: Waker) {
        self.waiting_for_room.borrow_mut().push(waker);
    }

    /// Hands a completion to its fiber and runs it.
    #[inline(always)]
    pub(super) fn deliver(&self, waiter: Waiter, completion: Completion) {
        let fiber = FiberRef::from_waiter(waiter);
        debug_assert!(matches!(
            fiber.state.get(),
            State::InOperation | State::Watching
        ));
        fiber.completion.set(completion);
        self.resume(fiber);
    }

    // Waits for a wake, under a key of the fiber's slot.

    pub(super) fn begin_wait(&self, fiber: FiberRef) -> Key {
        fiber.woken.set(false);
        self.driver.with(|driver| driver.slots().begin(fiber.slot))
    }

    pub(super) fn end_wait(&self, key: Key) {
        self.driver.with(|driver| {
            if driver.slots().is_waiting(key) {
                driver.slots().abandon(key);
            }
        });
    }

    pub(super) fn is_waiting(&self, key: Key) -> bool {
        self.driver.with(|driver| driver.slots().is_waiting(key))
    }

    /// Wakes the fiber that waits under `key`, or will.
    pub(super) fn wake(&self, key: Key) {
        let waiter = self.driver.with(|driver| driver.slots().waiter_of(key));
        let Some(waiter) = waiter else {
            return;
        };
        let fiber = FiberRef::from_waiter(waiter);
        fiber.woken.set(true);
        match fiber.state.get() {
            // Its timer is on the ring: the timer's CQE resumes it.
            State::InOperation => self.cancel(key),
            State::Parked => {
                self.end_wait(key);
                self.make_ready(fiber);
            }
            // Not parked yet: `park` finds the key taken back and does not wait.
            State::Ready | State::Running | State::Watching | State::Lost => self.end_wait(key),
        }
    }

    /// Lets finished operations that had timers let go of their files now, rather than at the end of the turn.
    pub(super) fn settle_timers(&self) {
        self.driver.with(|driver| driver.settle_timers());
    }

    /// Lets finished operations let go of their files now, rather than at the end of the turn.
    pub(super) fn settle(&self) {
        self.driver.with(|driver| driver.settle());
    }

    /// Cancels the operation `key` of this worker.
    pub(super) fn cancel(&self, key: Key) {
        let waiter = self.driver.with(|driver| driver.slots().waiter_of(key));
        if let Some(waiter) = waiter
            && let fiber = FiberRef::from_waiter(waiter)
            && fiber.state.get() == State::Watching
        {
            // It is no operation of the kernel's.
            self.end_wait(key);
            fiber.completion.set(Completion {
                res: -libc::ECANCELED,
                flags: 0,
            });
            self.make_ready(fiber);
            return;
        }
        if let Err(Full) = self.driver.with(|driver| driver.cancel(key)) {
            self.cancels.borrow_mut().push(key);
        }
    }

    /// Interrupts a fiber for a reason of `interrupt`.
    pub(super) fn interrupt(&self, fiber: FiberRef, reasons: u8) {
        fiber.interrupt.set(fiber.interrupt.get() | reasons);
        match fiber.state.get() {
            State::InOperation | State::Watching => self.cancel(fiber.key.get()),
            State::Parked => {
                self.end_wait(fiber.key.get());
                self.make_ready(fiber);
            }
            State::Ready | State::Running | State::Lost => {}
        }
    }

    /// The fiber `id`, if it still lives in `slot`.
    pub(super) fn fiber(&self, slot: u32, id: u64) -> Option<FiberRef> {
        let waiter = self.driver.with(|driver| driver.slots().waiter(slot))?;
        let fiber = FiberRef::from_waiter(waiter);
        (fiber.id == id).then_some(fiber)
    }

    /// Cancels the fiber `id` if it still lives in `slot`.
    pub(super) fn cancel_fiber(&self, slot: u32, id: u64) {
        if let Some(fiber) = self.fiber(slot, id) {
            self.interrupt(fiber, interrupt::CANCEL);
        }
    }

    /// Rings another's bell by a message from this worker's ring: false if that did not work.
    pub(super) fn ring(&self, bell: &Arc<Bell>) -> bool {
        self.driver.with(|driver| driver.ring(bell))
    }

    // The loop.

    /// Runs until stopped and all fibers have ended. The calling thread is the worker's from now on until then.
    pub(crate) fn run(&self) {
        let _worker = super::enter_worker(self);
        let _buffers = self.buffers.enter();
        let abort = AbortOnUnwind;
        while !self.finished() {
            self.turn();
        }
        self.end();
        std::mem::forget(abort);
    }

    /// Starts the shutdown; [`run`](Worker::run) returns when it is over.
    pub(crate) fn stop(&self) {
        if self.phase.get() != Phase::Running {
            return;
        }
        let unwind_at_ns = self.now_ns().saturating_add(self.grace_ns());
        self.phase.set(Phase::Stopping { unwind_at_ns });
        self.interrupt_all(interrupt::SHUTDOWN);
    }

    fn grace_ns(&self) -> i64 {
        i64::try_from(self.limits.grace.as_nanos()).unwrap_or(i64::MAX / 4)
    }

    fn interrupt_all(&self, reasons: u8) {
        let waiters: Vec<Waiter> = self.waiters();
        for waiter in waiters {
            self.interrupt(FiberRef::from_waiter(waiter), reasons);
        }
    }

    /// Moves the shutdown on; true when it is over.
    fn finished(&self) -> bool {
        let next_ns = match self.phase.get() {
            Phase::Running => return false,
            Phase::Stopping { unwind_at_ns } => unwind_at_ns,
            Phase::Unwinding { give_up_at_ns } => give_up_at_ns,
        };
        if self.live.get() == self.lost.get() {
            return true;
        }
        let left_ns = next_ns - self.now_ns();
        if left_ns > 0 {
            if !self.ticking.replace(true) {
                self.driver.with(|driver| driver.tick(left_ns));
            }
            return false;
        }
        self.ticking.set(false);
        match self.phase.get() {
            Phase::Unwinding { .. } => true,
            _ => {
                let give_up_at_ns = self
                    .now_ns()
                    .saturating_add(self.grace_ns().max(1_000_000_000));
                self.phase.set(Phase::Unwinding { give_up_at_ns });
                self.interrupt_all(interrupt::SHUTDOWN | interrupt::UNWIND);
                false
            }
        }
    }

    fn turn(&self) {
        let served_before = self.switches.get();
        if self.remote.take_mail() || (self.spawns_waiting.get() && self.has_room()) {
            self.read_mail();
        }
        let last = self.ready.last.get();
        while let Some(fiber) = self.ready.pop() {
            self.ready.prefetch();
            self.resume(fiber);
            if Some(fiber) == last {
                break;
            }
        }
        self.retry_cancels();
        let idle = self.ready.is_empty()
            && self.cancels.borrow().is_empty()
            && !(self.spawns_waiting.get() && self.has_room())
            && !self.is_over();
        if idle && !self.spin() && self.remote.fall_asleep() {
            self.publish();
            self.driver.with(|driver| driver.enter(true));
            self.remote.wake_up();
        } else {
            self.driver.with(|driver| {
                if driver.has_work() {
                    driver.enter(false);
                }
            });
        }
        self.reap();
        for (waiter, res) in self.driver.with(|driver| driver.overdue()) {
            let fiber = FiberRef::from_waiter(waiter);
            fiber.completion.set(Completion { res, flags: 0 });
            self.make_ready(fiber);
        }
        self.tell_of_ended();
        self.release_pins();
        let served = self.switches.get() - served_before;
        self.crowded.set(served > self.crowd);
        self.quiet.set(served <= QUIET);
        self.turns.set(self.turns.get() + 1);
        if self.turns.get().is_multiple_of(PUBLISH_TURNS) {
            self.publish();
        }
    }

    /// Resumes the fibers whose operations have completed.
    ///
    /// One enter brings no more than some twenty completions (Linux 6.13; all before), however many are due. Beside hundreds of
    /// fibers that are ready at every turn those on the ring would wait for many turns, so it goes on until all that were due have
    /// had theirs.
    fn reap(&self) {
        // No more than one for each fiber, however many come meanwhile.
        let mut left = self.live.get();
        let many = left as u64 > CROWD;
        loop {
            while let Some((waiter, completion)) = self.driver.with(|driver| driver.next()) {
                if many {
                    self.prefetch_ahead();
                }
                self.deliver(waiter, completion);
                left = left.saturating_sub(1);
            }
            if left == 0 || !self.driver.with(|driver| driver.has_completions()) {
                return;
            }
            self.driver.with(|driver| driver.enter(false));
            left -= 1;
        }
    }

    /// Fetches what resuming the fiber of the next completion will read, and the block of the one behind it.
    #[inline(always)]
    fn prefetch_ahead(&self) {
        let (next, second) = self
            .driver
            .with(|driver| (driver.ahead(0), driver.ahead(1)));
        if let Some(next) = next {
            FiberRef::from_waiter(next).prefetch_frames();
        }
        if let Some(second) = second {
            FiberRef::from_waiter(second).prefetch_block();
        }
    }

    /// Looks for work before a wait, if that is asked for and promising: whether there is some.
    #[inline]
    fn spin(&self) -> bool {
        if !self.spin.is_due() {
            return false;
        }
        self.driver.with(|driver| {
            if driver.has_work() {
                driver.enter(false);
            }
        });
        self.spin
            .until(|| self.remote.has_mail() || self.driver.with(|driver| driver.has_arrivals()))
    }

    fn is_over(&self) -> bool {
        self.phase.get() != Phase::Running && self.live.get() == self.lost.get()
    }

    #[cold]
    fn read_mail(&self) {
        while let Ok(control) = self.mailbox.controls.try_recv() {
            match control {
                Control::Wake(key) => self.wake(key),
                Control::CancelOperation(key) => self.cancel(key),
                Control::CancelFiber { slot, id } => self.cancel_fiber(slot, id),
                Control::Run(run) => run(self),
                Control::Stop => self.stop(),
            }
        }
        let mut taken = false;
        while self.has_room()
            && let Ok(spawn) = self.mailbox.spawns.try_recv()
        {
            // It panics only where a closure is dropped for want of a stack; its fiber's handle has been told.
            if catch_unwind(AssertUnwindSafe(|| spawn(self))).is_err() {
                log(format_args!("dropping a fiber's closure panicked"));
            }
            taken = true;
        }
        self.spawns_waiting.set(!self.has_room());
        if taken {
            self.remote.made_room();
        }
    }

    /// Says of which watches the end has come.
    fn tell_of_ended(&self) {
        if self.ending.borrow().is_empty() {
            return;
        }
        let ending = std::mem::take(&mut *self.ending.borrow_mut());
        for (id, then) in ending {
            if self.driver.with(|driver| driver.is_watch_gone(id)) {
                then();
            } else {
                self.ending.borrow_mut().push((id, then));
            }
        }
    }

    fn retry_cancels(&self) {
        if self.cancels.borrow().is_empty() {
            return;
        }
        let cancels = std::mem::take(&mut *self.cancels.borrow_mut());
        cancels.into_iter().for_each(|key| self.cancel(key));
    }

    /// Copies the counters to where other threads read them.
    fn publish(&self) {
        let (counters, now) = self.driver.with(|driver| {
            let (counters, watches) = (driver.counters(), driver.watches());
            let slots = driver.slots();
            let now = [slots.waiting() as u64, watches as u64, slots.unknown()];
            (counters, now)
        });
        self.counts.publish(
            &counters,
            self.switches.get(),
            self.spawned.get(),
            self.live.get(),
            now,
        );
        self.counts.publish_pins(&self.pins.counts());
    }

    fn waiters(&self) -> Vec<Waiter> {
        self.driver
            .with(|driver| driver.slots().waiters().collect())
    }

    /// The last steps: no fiber runs any more.
    fn end(&self) {
        self.remote.retire(&self.mailbox);
        let lost = self.live.get();
        if lost > 0 {
            super::keep_thread_locals();
            log(format_args!(
                "{lost} fibers could not be ended at shutdown; they keep their stacks until the process ends"
            ));
            let waiters: Vec<Waiter> = self.waiters();
            for waiter in waiters {
                let fiber = FiberRef::from_waiter(waiter);
                if fiber.state.get() != State::Lost {
                    fiber.state.set(State::Lost);
                    self.lose(fiber);
                }
            }
        }
        self.drain_pins(self.grace_ns());
        self.driver.with(|driver| {
            driver.end_watches();
            driver.close_bell();
        });
        self.tell_of_ended();
        self.counts.lost(lost);
        self.publish();
    }
}

/// The error of a spawn at the limit of fibers.
pub(super) fn no_room(limit: usize) -> Error {
    Error::Os {
        errno: libc::EAGAIN,
        message: Some(format!("all {limit} fibers of this worker are taken").into()),
    }
}

impl Worker {
    /// How many fibers were given up.
    pub(crate) fn lost(&self) -> usize {
        self.lost.get()
    }

    /// Bytes of a fiber's stack, as asked for.
    pub(super) fn stack_bytes(&self) -> usize {
        self.limits.stack_bytes.max(STACK_BYTES_MIN)
    }

    /// The most fibers this worker may have.
    pub(super) fn fibers_max(&self) -> usize {
        self.limits.fibers_max
    }
}
