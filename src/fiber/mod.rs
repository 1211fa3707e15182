//! Fibers: straight-line code that waits without holding its thread.
//!
//! A fiber runs on a stack of its own, on one worker thread, for life. A call that has to wait becomes one operation on the
//! worker's ring; the fiber switches out and the worker runs others until the completion resumes it, straight from the
//! completion loop. On a plain thread the same call drives the thread's own small ring and blocks the thread (`thread.rs`).
//!
//! # The life of a fiber
//!
//! ```text
//!            spawn                 switched in                  returns, or unwinds to its root
//!  (new) ───────────▶ Ready ─────────────────────▶ Running ──────────────────────────▶ (gone: stack to the pool)
//!                       ▲                           │ │ │
//!                       │ yield_now                 │ │ │ suspend(op)              final CQE of its key
//!                       ├───────────────────────────┘ │ └──────────▶ InOperation ───────────────────▶ Running
//!                       │ wake, or interrupt          │ park, or a wait for an event of a watch
//!                       └── Parked, Watching ◀────────┘
//! ```
//!
//! - `InOperation` is left by the final CQE and by nothing else: not by a cancel, a deadline, a close or a shutdown. Those ask
//!   the kernel to end the operation early, and its CQE says what came of it.
//! - A fiber that will not end at shutdown becomes `Lost`: it is never resumed and keeps its stack, so whatever its frames
//!   hold stays valid for the rest of the process.
//!
//! # The safety proof of borrowed buffers
//!
//! [`suspend`] is where memory borrowed from a caller meets the ring. It returns only after the final CQE of its operation, so
//! the borrowing frame cannot end before the kernel is done with its memory. What keeps that true:
//!
//! 1. the scheduler never drops a suspended fiber, and resumes one that is `InOperation` only with its final CQE
//!    ([`Worker::deliver`](scheduler::Worker)); a fiber that cannot be ended is leaked with its stack and its thread's locals
//!    (`keep_thread_locals`);
//! 2. between submission and completion nothing in `suspend` can unwind, and an abort guard stands there in case;
//! 3. a fiber stays on its thread: nothing of it is `Send`, and its worker's ring is that thread's alone;
//! 4. a fiber's panic is caught at its root, after its frames are gone; one escaping there aborts the process;
//! 5. outside a fiber `suspend` drives the thread's ring until the operation's own CQE has come.
#![allow(unsafe_code)]

mod atomics;
pub(crate) mod blocking;
pub(crate) mod fellow;
pub(crate) mod inflight;
pub(crate) mod join;
pub(crate) mod overflow;
pub(crate) mod park;
pub(crate) mod pin;
#[cfg(test)]
mod pin_test;
mod raw_mutex;
pub(crate) mod ready;
pub(crate) mod remote;
pub(crate) mod route;
pub(crate) mod scheduler;
#[cfg(any(test, fuzzing))]
mod simulated;
#[cfg(test)]
mod simulation;
mod spin;
pub(crate) mod stack;
#[cfg(any(test, fuzzing))]
pub(crate) mod story;
pub(crate) mod sync;
pub(crate) mod thread;
pub(crate) mod wait_queue;
mod wake;
pub(crate) mod watch;

use std::cell::{Cell, UnsafeCell};
use std::mem::{ManuallyDrop, MaybeUninit};
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::RawFd;
use std::panic::resume_unwind;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::Duration;

use corosensei::{Coroutine, CoroutineResult, Yielder};

use crate::buf::Buf;
use crate::driver::op::timespec_from_ns;
use crate::driver::{Bell, Completion, Driver, DriverKind, Full, Key, Op, Timespec, Waiter};
use crate::error::{Error, Result};
use crate::timeout::Timeout;
use inflight::{Direction, InFlight};
use scheduler::Worker;
use stack::FiberStack;

/// Results of [`suspend`] beside the kernel's own: below every errno.
pub(crate) mod outcome {
    /// The deadline passed and nothing was transferred.
    pub(crate) const TIMED_OUT: i32 = -10_000;
    /// The fiber was cancelled through its handle.
    pub(crate) const CANCELLED: i32 = -10_001;
    /// The runtime is ending.
    pub(crate) const SHUTDOWN: i32 = -10_002;
}

/// A result of [`suspend`] below 0 as an error.
#[cold]
pub(crate) fn error_from_outcome(code: i32) -> Error {
    match code {
        outcome::TIMED_OUT => Error::Timeout,
        outcome::CANCELLED => Error::Cancelled,
        outcome::SHUTDOWN => Error::Shutdown,
        errno => Error::from_errno(-errno),
    }
}

/// What a fiber is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// In the ready queue.
    Ready,
    Running,
    /// The kernel has an operation of it.
    InOperation,
    /// Waits for a wake; a deadline would make it `InOperation`, on a timer.
    Parked,
    /// Waits for an event of a watch.
    Watching,
    /// Never to be resumed.
    Lost,
}

/// Reasons to look twice before waiting, one bit each.
mod interrupt {
    /// `JoinHandle::cancel` was called.
    pub(super) const CANCEL: u8 = 1;
    /// The runtime is ending: calls answer `Shutdown`.
    pub(super) const SHUTDOWN: u8 = 2;
    /// The grace period is over: the next suspension unwinds.
    pub(super) const UNWIND: u8 = 4;
    /// A deadline of `timeout` applies.
    pub(super) const DEADLINE: u8 = 8;
}

/// How often a fiber that catches the runtime's unwind is unwound again.
const UNWINDS_MAX: u8 = 3;

/// The panic payload that ends a fiber at shutdown.
struct FiberUnwind;

/// A fiber's control block. It lies at the top of the fiber's own stack, in the page its first frames touch anyway. Switching
/// touches the first cache line of it, an operation the second.
#[repr(C)]
pub(crate) struct Fiber {
    coroutine: UnsafeCell<ManuallyDrop<Coroutine<(), (), (), FiberStack>>>,
    yielder: Cell<*const Yielder<(), ()>>,
    /// The one behind it in the ready queue.
    next_ready: Cell<Option<FiberRef>>,
    state: Cell<State>,
    interrupt: Cell<u8>,
    forecast: Forecast,
    woken: Cell<bool>,
    /// Somebody has asked for the end of the wait that it is about to begin.
    roused: Cell<bool>,
    unwinds: Cell<u8>,

    completion: Cell<Completion>,
    key: Cell<Key>,
    /// An address in its innermost frame, when it was last switched out.
    frame: Cell<*const u8>,
    slot: u32,
    deadline_ns: Cell<i64>,
    id: u64,
    /// Told if the fiber is given up.
    packet: Option<Arc<dyn join::Abandon>>,
    name: Option<Box<str>>,
    limit: usize,
    stack_bytes: usize,
}

#[cfg(not(fuzzing))] // corosensei's coroutine is larger for a sanitizer
const _: () = assert!(std::mem::offset_of!(Fiber, unwinds) < 64);
const _: () = assert!(std::mem::offset_of!(Fiber, slot) < 128);

/// Whether trying first is likely to find something, as a fiber's plain receive, a listener's plain accept or a worker's spin: after
/// a try in vain 1, 3, 7, … waits are not preceded by one, until one finds something again.
pub(crate) struct Forecast {
    /// Waits that are not worth a try.
    skip: Cell<u8>,
    /// The last value of `skip`.
    skipped: Cell<u8>,
}

/// One wait in so many is preceded by a try at the least.
const SKIP_MAX: u8 = 63;

impl Forecast {
    pub(crate) fn new() -> Forecast {
        Forecast {
            skip: Cell::new(0),
            skipped: Cell::new(0),
        }
    }

    /// Whether to try now.
    #[inline(always)]
    pub(crate) fn is_good(&self) -> bool {
        let skip = self.skip.get();
        if skip == 0 {
            return true;
        }
        self.skip.set(skip - 1);
        false
    }

    #[inline(always)]
    pub(crate) fn found(&self) {
        self.skipped.set(0);
    }

    pub(crate) fn found_nothing(&self) {
        let skipped = (self.skipped.get() * 2 + 1).min(SKIP_MAX);
        self.skip.set(skipped);
        self.skipped.set(skipped);
    }
}

/// Points to a live fiber. The worker's code makes and ends fibers and holds no `FiberRef` beyond `destroy`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct FiberRef(NonNull<Fiber>);

impl Deref for FiberRef {
    type Target = Fiber;

    #[inline]
    fn deref(&self) -> &Fiber {
        // SAFETY: `create` wrote the block, `destroy` alone ends it, and the worker forgets every FiberRef of it before.
        unsafe { self.0.as_ref() }
    }
}

impl FiberRef {
    #[inline]
    fn waiter(self) -> Waiter {
        let address = NonZeroUsize::new(self.0.as_ptr().expose_provenance());
        address.expect("stacks are not at address 0")
    }

    /// The fiber behind a waiter of this worker's driver.
    #[inline]
    fn from_waiter(waiter: Waiter) -> FiberRef {
        // A worker registers nothing but the addresses of its live fibers, and unregisters before `destroy`.
        let address = ptr::with_exposed_provenance_mut(waiter.get());
        FiberRef(NonNull::new(address).expect("a waiter is not 0"))
    }

    /// Runs the fiber until it switches out (false) or ends (true).
    #[inline]
    fn resume(self) -> bool {
        // SAFETY: only the scheduler resumes, never while the fiber runs, so this is the only reference to the coroutine.
        let coroutine = unsafe { &mut *self.coroutine.get() };
        matches!(coroutine.resume(()), CoroutineResult::Return(()))
    }

    /// Has the cache fetch what a switch to the fiber reads of its block.
    #[inline(always)]
    fn prefetch_block(self) {
        stack::prefetch::<2>(self.0.as_ptr().cast());
    }

    /// Has the cache fetch the innermost frames, which a switch to the fiber reads first.
    #[inline(always)]
    fn prefetch_frames(self) {
        stack::prefetch::<10>(self.frame.get().wrapping_sub(128));
    }

    /// Back to the scheduler; returns when the scheduler resumes this fiber.
    #[inline]
    fn switch_out(self) {
        let frame = 0;
        self.frame.set(std::hint::black_box(&raw const frame));
        // SAFETY: the fiber runs, so its root set the yielder, which lives as long as the fiber's stack.
        unsafe { (*self.yielder.get()).suspend(()) }
    }

    pub(crate) fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }
}

thread_local! {
    /// The worker whose thread this is; null on a plain thread.
    static WORKER: Cell<*const Worker> = const { Cell::new(ptr::null()) };
}

/// The worker whose thread this is, in a fiber or between fibers.
#[inline(always)]
pub(crate) fn worker() -> Option<&'static Worker> {
    // SAFETY: `Worker::run` sets the pointer for the time it runs and the worker outlives that; the reference does not leave
    // the calls made from there. (A thread that is being torn down has no worker: the key has no destructor.)
    let worker = unsafe { WORKER.get().as_ref() }?;
    // A child forked by a fiber is a plain thread: the worker's ring, and its other fibers, are the parent's.
    worker.is_ours().then_some(worker)
}

/// The worker and the fiber that runs now; `None` on a plain thread.
#[inline(always)]
fn current() -> Option<(&'static Worker, FiberRef)> {
    let worker = worker()?;
    Some((worker, worker.current()?))
}

/// After the last handle of a socket has closed its descriptor: operations of this thread that ended before hold the file no
/// longer.
pub(crate) fn settle() {
    if let Some(worker) = worker() {
        worker.settle_timers();
    }
}

/// Whether the file of an operation stays open as long as the operation is under way: on the ring it does.
fn holds_files() -> bool {
    let kind = match worker() {
        Some(worker) => Some(worker.driver.with(|driver| driver.kind())),
        None => thread::driver(),
    };
    kind == Some(DriverKind::Uring)
}

/// The clock that deadlines are measured by, in nanoseconds.
pub(crate) fn now_ns() -> i64 {
    match worker() {
        Some(worker) => worker.now_ns(),
        None => crate::sys::monotonic_ns(),
    }
}

/// Whether the caller is in a fiber.
pub(crate) fn in_fiber() -> bool {
    current().is_some()
}

/// Makes `worker` the one of this thread until the guard goes. In a child that a fiber forked it takes the place of the parent's.
fn enter_worker(worker: &Worker) -> impl Drop {
    struct Leave(*const Worker);
    impl Drop for Leave {
        fn drop(&mut self) {
            WORKER.set(self.0);
        }
    }
    assert!(self::worker().is_none(), "a runtime inside a runtime");
    Leave(WORKER.replace(worker))
}

/// Closures above this size start on the heap rather than on the fiber's stack: corosensei moves at most 1,024 bytes there, and
/// `create` adds the fiber's address.
const CLOSURE_BYTES_MAX: usize = 1024 - size_of::<FiberRef>();

/// Makes a fiber that will run `main`, which catches its own panics.
fn create<F: FnOnce() + 'static>(
    worker: &Worker,
    name: Option<Box<str>>,
    packet: Option<Arc<dyn join::Abandon>>,
    main: F,
) -> Result<FiberRef> {
    if size_of::<F>() > CLOSURE_BYTES_MAX {
        let main: Box<dyn FnOnce()> = Box::new(main);
        return create(worker, name, packet, main);
    }
    let mut stack = worker.stacks().take()?;
    let limit = stack.limit();
    let address = stack.reserve(size_of::<Fiber>()) as *mut Fiber;
    let fiber = FiberRef(NonNull::new(address).expect("stacks are not at address 0"));
    let coroutine = Coroutine::with_stack(stack, move |yielder: &Yielder<(), ()>, ()| {
        fiber.yielder.set(yielder);
        let abort = AbortOnUnwind;
        main();
        std::mem::forget(abort);
        end_forked_child();
    });
    let slot = worker.register(fiber);
    let block = Fiber {
        coroutine: UnsafeCell::new(ManuallyDrop::new(coroutine)),
        yielder: Cell::new(ptr::null()),
        frame: Cell::new(ptr::null()),
        completion: Cell::new(Completion { res: 0, flags: 0 }),
        key: Cell::new(Key::NONE),
        deadline_ns: Cell::new(i64::MAX),
        next_ready: Cell::new(None),
        forecast: Forecast::new(),
        id: worker.next_fiber_id(),
        slot,
        state: Cell::new(State::Ready),
        interrupt: Cell::new(worker.interrupts_of_new_fibers()),
        unwinds: Cell::new(0),
        woken: Cell::new(false),
        roused: Cell::new(false),
        packet,
        name,
        limit,
        stack_bytes: worker.stack_bytes(),
    };
    // SAFETY: `reserve` kept this block, aligned to 64, above what the coroutine uses; the stack is ours alone.
    unsafe { address.write(block) };
    Ok(fiber)
}

/// Lets the calling thread, once it ends, wait for ever before its thread-locals go: frames of fibers that were given up on it
/// may have lent those to other threads. The main thread goes on: with it the process ends.
fn keep_thread_locals() {
    struct Keep;
    impl Drop for Keep {
        fn drop(&mut self) {
            // SAFETY: no memory is passed.
            let thread_id = unsafe { libc::syscall(libc::SYS_gettid) };
            if thread_id == libc::c_long::from(std::process::id() as i32) {
                return;
            }
            loop {
                std::thread::park();
            }
        }
    }
    // Destructors of thread-locals run last registered first, so this one, registered now, comes before those of the fibers.
    thread_local!(static KEEP: Keep = const { Keep });
    KEEP.with(|_| {});
}

/// In a child that a fiber forked, the fiber's end is the process's: the worker it would go back to is the parent's.
fn end_forked_child() {
    // SAFETY: as in `worker`; the fiber runs on that worker's thread, or a copy of it.
    let worker = unsafe { WORKER.get().as_ref() };
    if worker.is_some_and(|worker| !worker.is_ours()) {
        eprintln!(
            "ringsock: a forked child returned from the fiber that forked it; call std::process::exit in the child"
        );
        // SAFETY: _exit only ends the process, without the parent's exit handlers.
        unsafe { libc::_exit(1) };
    }
}

/// Takes an ended fiber apart: its stack.
fn destroy(fiber: FiberRef) -> FiberStack {
    // SAFETY: the fiber ended and its worker has forgotten every FiberRef but this one; the block is read out once, and its
    // memory is the stack's again afterwards.
    let block = unsafe { fiber.0.as_ptr().read() };
    let coroutine = ManuallyDrop::into_inner(block.coroutine.into_inner());
    let mut stack = coroutine.into_stack();
    stack.restore(size_of::<Fiber>());
    stack
}

/// A worker's driver, reached by its own thread only.
///
/// Like a `RefCell` without the check: what `with` runs is code of `driver/`, which knows no worker and runs no fiber, so it
/// cannot come back here while the driver is borrowed. Debug builds check it.
struct DriverCell {
    driver: UnsafeCell<Driver>,
    borrowed: Cell<bool>,
}

impl DriverCell {
    fn new(driver: Driver) -> DriverCell {
        DriverCell {
            driver: UnsafeCell::new(driver),
            borrowed: Cell::new(false),
        }
    }

    #[inline(always)]
    fn with<R>(&self, use_driver: impl FnOnce(&mut Driver) -> R) -> R {
        debug_assert!(!self.borrowed.replace(true), "the driver is borrowed");
        // SAFETY: the cell is not Sync, so this is the worker's thread; `use_driver` does not come back here (see the type).
        let result = use_driver(unsafe { &mut *self.driver.get() });
        debug_assert!(self.borrowed.replace(false));
        result
    }
}

impl Worker {
    /// Starts `op` for `fiber`, which then has to switch out.
    ///
    /// # Safety
    ///
    /// As for [`Driver::submit`]: the memory stays put until the fiber is resumed.
    #[inline(always)]
    unsafe fn submit(
        &self,
        fiber: FiberRef,
        op: &mut Op<'_>,
        timeout: Option<&Timespec>,
    ) -> std::result::Result<(), Full> {
        // SAFETY: as in `DriverCell::with`; spelled out, because the compiler does not inline the closure.
        let driver = unsafe { &mut *self.driver.driver.get() };
        let key = driver.slots().begin(fiber.slot);
        // SAFETY: the caller's promise.
        match unsafe { driver.submit(op, key, timeout) } {
            Ok(()) => {
                fiber.key.set(key);
                fiber.state.set(State::InOperation);
                Ok(())
            }
            Err(Full) => {
                driver.slots().abandon(key);
                Err(Full)
            }
        }
    }

    /// Starts `op` as an operation that [`begin_wait`](Worker::begin_wait) named.
    ///
    /// # Safety
    ///
    /// As for [`submit`](Worker::submit).
    unsafe fn submit_as(
        &self,
        fiber: FiberRef,
        key: Key,
        op: &mut Op<'_>,
    ) -> std::result::Result<(), Full> {
        self.driver.with(|driver| {
            // SAFETY: the caller's promise.
            unsafe { driver.submit(op, key, None) }
        })?;
        fiber.key.set(key);
        fiber.state.set(State::InOperation);
        Ok(())
    }
}

/// Ends the process where going on would be unsound: between a submission and its completion, and at a fiber's root.
struct AbortOnUnwind;

impl Drop for AbortOnUnwind {
    #[cold]
    fn drop(&mut self) {
        eprintln!(
            "ringsock: a panic where none may pass (a fiber's root, or memory lent to the kernel); ending the process"
        );
        std::process::abort();
    }
}

/// Runs `op` and returns its result: 0 or more, a negative errno, or one of [`outcome`].
///
/// `timeout_ns` counts from now; below 0 it waits for ever. `target` is the socket's list of operations in flight, by which
/// `close` finds this one.
///
/// The operation's memory is the kernel's from here until this returns. See the module's documentation for why that holds.
#[inline(always)]
pub(crate) fn suspend(
    op: &mut Op<'_>,
    timeout_ns: i64,
    target: Option<(&InFlight, Direction)>,
) -> i32 {
    match current() {
        Some((worker, fiber)) => {
            if fiber.interrupt.get() != 0 || std::thread::panicking() {
                suspend_interrupted(worker, fiber, op, timeout_ns, target)
            } else {
                suspend_fiber(worker, fiber, op, timeout_ns, target)
            }
        }
        None => thread::block(op, timeout_ns, target),
    }
}

/// In a fiber: runs `op` as a plain call that does not wait. `None` if it would have to, if the fiber has done so often enough
/// to let others go first, and outside fibers.
///
/// For sends, which almost never have to wait: the call costs about what the operation would cost on the ring, and saves the
/// switch out and in. Through the ring, an echo takes 460 user instructions, this way 270, for the same CPU time (64 connections
/// of 64 bytes, within the 2 % that two runs of one server differ by).
#[inline(always)]
pub(crate) fn attempt_directly(op: &mut Op<'_>, timed: bool) -> Option<i32> {
    let (worker, fiber) = current()?;
    if fiber.interrupt.get() != 0 {
        return None;
    }
    worker.attempt_directly(op, timed)
}

/// In a fiber, behind all others that are ready: runs a receive as a plain call that does not wait. `None` if there is nothing
/// to receive, if there hardly will be, and outside fibers.
///
/// A worker with much to do comes round so late that its peers have answered: then the plain call saves the operation, its
/// timer (550 ns in the kernel, by itself) and its completion. A worker with little to do would try in vain, so each fiber learns
/// from its own tries. After a try in vain, or none, the ring waits without looking (again), which pays for half of it. In a
/// crowd the ring is better, unless the receive is timed. (Only a socket that `receives` can go without a look: another, say one
/// that listens, fails at once, but may not be ready for long.)
#[inline(always)]
pub(crate) fn attempt_in_turn(op: &mut Op<'_>, timed: bool, receives: bool) -> Option<i32> {
    let turn = match await_turn(timed) {
        Ok(turn) => turn,
        Err(NoTurn::Hopeless) => {
            if receives {
                op.found_nothing();
            }
            return None;
        }
        Err(NoTurn::Unwanted) => return None,
    };
    let result = turn.worker.attempt(op);
    if result >= 0 {
        turn.fiber.forecast.found();
        return Some(result);
    }
    attempt_failed(turn, op, result)
}

#[cold]
#[inline(never)]
fn attempt_failed(turn: Turn, op: &mut Op<'_>, result: i32) -> Option<i32> {
    match -result {
        libc::EAGAIN => {}
        // The driver makes it again.
        libc::EINTR => return None,
        _ => return Some(result),
    }
    turn.fiber.forecast.found_nothing();
    op.found_nothing();
    None
}

/// The moment of a fiber for a receive that does not wait: see [`attempt_in_turn`].
#[derive(Clone, Copy)]
struct Turn {
    worker: &'static Worker,
    fiber: FiberRef,
}

/// Why there is none.
enum NoTurn {
    /// There hardly will be anything to receive.
    Hopeless,
    /// No fiber, a crowd, an interruption.
    Unwanted,
}

/// In a fiber, lets all others that are ready go first.
#[inline(always)]
fn await_turn(timed: bool) -> std::result::Result<Turn, NoTurn> {
    let (worker, fiber) = current().ok_or(NoTurn::Unwanted)?;
    if worker.is_crowded() && !timed {
        return Err(NoTurn::Unwanted);
    }
    await_turn_of(Turn { worker, fiber })
}

#[inline(always)]
fn await_turn_of(turn: Turn) -> std::result::Result<Turn, NoTurn> {
    let Turn { worker, fiber } = turn;
    if fiber.interrupt.get() != 0 || std::thread::panicking() {
        return Err(NoTurn::Unwanted);
    }
    if !fiber.forecast.is_good() {
        return Err(NoTurn::Hopeless);
    }
    worker.make_ready(fiber);
    fiber.switch_out();
    if fiber.interrupt.get() != 0 {
        return Err(NoTurn::Unwanted);
    }
    Ok(turn)
}

/// In a fiber: bytes of each receive buffer that its worker lends; 0 where there is none.
#[inline(always)]
pub(crate) fn lent_bytes() -> usize {
    current().map_or(0, |(worker, _)| worker.buffers.buffer_bytes())
}

/// A fiber that receives at most so many bytes, into a buffer of its worker's that is taken only when there is something to receive.
///
/// What it receives goes into a `Buf` of the caller's, which is empty before; the result is a number of bytes, or a code as of
/// [`suspend`]. (A `Result<Buf, _>`, handed from function to function, is copied each time.)
#[derive(Clone, Copy)]
pub(crate) struct Borrower {
    turn: Turn,
    bufsize: usize,
}

impl Borrower {
    /// The calling fiber, if its worker has buffers of that size.
    #[inline(always)]
    pub(crate) fn of(bufsize: usize) -> Option<Borrower> {
        let (worker, fiber) = current()?;
        (bufsize <= worker.buffers.buffer_bytes()).then_some(Borrower {
            turn: Turn { worker, fiber },
            bufsize,
        })
    }

    /// As [`attempt_in_turn`].
    #[inline(always)]
    pub(crate) fn receive_in_turn(&self, fd: RawFd, out: &mut Buf) -> Option<i32> {
        // A lease waits by readiness first and is received by a plain call in any case, so a crowd changes nothing.
        let turn = await_turn_of(self.turn).ok()?;
        let received = self.receive_now(fd, out);
        match -received {
            libc::EAGAIN => {
                turn.fiber.forecast.found_nothing();
                None
            }
            // Made again, when the socket is readable.
            libc::EINTR => None,
            _ => {
                turn.fiber.forecast.found();
                Some(received)
            }
        }
    }

    /// Receives without waiting.
    #[inline(always)]
    pub(crate) fn receive_now(&self, fd: RawFd, out: &mut Buf) -> i32 {
        self.receive_by(out, |buffer| {
            self.turn.worker.attempt(&mut Op::Recv {
                fd,
                buffer,
                flags: 0,
                found_nothing: false,
            })
        })
    }

    /// Has `call` receive.
    #[inline(always)]
    pub(crate) fn receive_by(
        &self,
        out: &mut Buf,
        call: impl FnOnce(&mut [MaybeUninit<u8>]) -> i32,
    ) -> i32 {
        let Some(mut lease) = self.turn.worker.buffers.take() else {
            return receive_to_heap(self.bufsize, out, call);
        };
        let received = call(crate::sys::as_uninit(&mut lease[..self.bufsize]));
        if received > 0 {
            lease.truncate(received as usize);
            *out = Buf::from_lease(lease);
        }
        received
    }
}

/// [`Borrower::receive_by`] while all buffers are out.
#[cold]
#[inline(never)]
fn receive_to_heap(
    bufsize: usize,
    out: &mut Buf,
    call: impl FnOnce(&mut [MaybeUninit<u8>]) -> i32,
) -> i32 {
    let mut bytes = Vec::new();
    if bytes.try_reserve_exact(bufsize).is_err() {
        return -libc::ENOMEM;
    }
    let received = call(&mut bytes.spare_capacity_mut()[..bufsize]);
    if received > 0 {
        crate::sys::set_received(&mut bytes, received as usize);
        bytes.shrink_to_fit();
        *out = Buf::from_vec(bytes);
    }
    received
}

/// After a call that a fiber had no need to wait in: lets the others go first, once it has made many of them in a row.
#[inline]
pub(crate) fn count_unwaited_call() {
    if let Some((worker, fiber)) = current()
        && worker.has_run_long()
    {
        yield_fiber(worker, fiber);
    }
}

#[inline(always)]
fn suspend_fiber(
    worker: &Worker,
    fiber: FiberRef,
    op: &mut Op<'_>,
    timeout_ns: i64,
    target: Option<(&InFlight, Direction)>,
) -> i32 {
    let timer: Timespec;
    let timeout = if timeout_ns >= 0 {
        timer = timespec_from_ns(timeout_ns);
        Some(&timer)
    } else {
        None
    };
    // SAFETY: `op`'s memory and `timer` stay borrowed by this frame, which ends only after `deliver` has resumed the fiber with
    // the final CQE of the key (the module's points 1 to 4).
    if let Err(Full) = unsafe { worker.submit(fiber, op, timeout) } {
        // SAFETY: as above.
        if let Some(code) = unsafe { submit_later(worker, fiber, op, timeout) } {
            return code;
        }
    }
    let abort = AbortOnUnwind;
    let completion = match target {
        Some((inflight, direction)) => {
            let key = fiber.key.get();
            let place = inflight.enter(worker, key, direction);
            fiber.switch_out();
            inflight.leave(worker, place, key, direction);
            fiber.completion.get()
        }
        None => {
            fiber.switch_out();
            fiber.completion.get()
        }
    };
    std::mem::forget(abort);
    if completion.res >= 0 {
        return completion.res;
    }
    failed_in_fiber(worker, fiber, op, completion.res, timeout_ns, target)
}

/// Submits once the others have reaped: nothing of `op` is in flight before. A code if the fiber was interrupted meanwhile, or its
/// wait is to end ([`Fellow`](fellow::Fellow)), and nothing was submitted.
///
/// # Safety
///
/// As for [`Worker::submit`].
#[cold]
#[inline(never)]
unsafe fn submit_later(
    worker: &Worker,
    fiber: FiberRef,
    op: &mut Op<'_>,
    timeout: Option<&Timespec>,
) -> Option<i32> {
    fiber.roused.set(false);
    loop {
        yield_fiber(worker, fiber);
        if let Some(code) = interrupted(worker, fiber) {
            return Some(code);
        }
        if fiber.roused.get() {
            return Some(-libc::ECANCELED);
        }
        // SAFETY: the caller's promise.
        if unsafe { worker.submit(fiber, op, timeout) }.is_ok() {
            return None;
        }
    }
}

/// [`suspend`], out of line.
#[inline(never)]
fn again(op: &mut Op<'_>, timeout_ns: i64, target: Option<(&InFlight, Direction)>) -> i32 {
    suspend(op, timeout_ns, target)
}

/// For a kernel that honours O_NONBLOCK on the ring: waits for readiness and tries, until it works or the time is over.
#[cold]
#[inline(never)]
fn when_ready(op: &mut Op<'_>, timeout_ns: i64, target: Option<(&InFlight, Direction)>) -> i32 {
    let Some((fd, events)) = op.readiness() else {
        return -libc::EAGAIN;
    };
    let deadline_ns = now_ns().saturating_add(timeout_ns);
    loop {
        let left_ns = match timeout_ns {
            ns if ns < 0 => ns,
            _ => (deadline_ns - now_ns()).max(0),
        };
        let ready = again(&mut Op::Poll { fd, events }, left_ns, target);
        if ready < 0 {
            return ready;
        }
        match op.attempt_despite_signals() {
            // Readiness need not mean success, so an end of time must be seen here, too.
            code if code == -libc::EAGAIN && left_ns == 0 => return outcome::TIMED_OUT,
            code if code == -libc::EAGAIN => {
                // Ready for ever, and never done.
                if let Op::Accept { .. } = op
                    && let Some(end) = op.end_of_what_is_shut()
                {
                    return end;
                }
            }
            result => return result,
        }
    }
}

/// What an operation that failed in a fiber means.
#[cold]
#[inline(never)]
fn failed_in_fiber(
    worker: &Worker,
    fiber: FiberRef,
    op: &mut Op<'_>,
    res: i32,
    timeout_ns: i64,
    target: Option<(&InFlight, Direction)>,
) -> i32 {
    let ended_early = matches!(-res, libc::ECANCELED | libc::EINTR);
    if ended_early && !is_closed(target) && fiber.interrupt.get() & !interrupt::DEADLINE != 0 {
        return interrupted(worker, fiber).unwrap_or(-libc::EINTR);
    }
    failed(op, res, timeout_ns, target)
}

/// What a failed operation means, if its fiber was not interrupted: who ended it, or whether it is to be tried again.
fn failed(
    op: &mut Op<'_>,
    res: i32,
    timeout_ns: i64,
    target: Option<(&InFlight, Direction)>,
) -> i32 {
    match -res {
        libc::ECANCELED | libc::EINTR if is_closed(target) => -libc::EBADF,
        // An operation that a kernel worker thread runs (connect on AF_UNIX) ends in EINTR when its timer fires.
        libc::ECANCELED | libc::EINTR if timeout_ns >= 0 => outcome::TIMED_OUT,
        libc::EINTR => again(op, timeout_ns, target),
        libc::EAGAIN => when_ready(op, timeout_ns, target),
        _ => res,
    }
}

fn is_closed(target: Option<(&InFlight, Direction)>) -> bool {
    target.is_some_and(|(inflight, _)| inflight.is_closed())
}

/// For a call that may wait and has not had to yet: the outcome if it may not go on, because of a cancel, a shutdown, or the
/// deadline of an enclosing [`timeout`].
pub(crate) fn outcome_so_far() -> Option<i32> {
    let deadline_passed = match current() {
        Some((_, fiber)) if fiber.interrupt.get() == 0 || std::thread::panicking() => false,
        Some((worker, fiber)) => {
            if let Some(code) = interrupted(worker, fiber) {
                return Some(code);
            }
            fiber.deadline_ns.get() <= worker.now_ns()
        }
        None => thread::deadline_ns() <= crate::sys::monotonic_ns(),
    };
    deadline_passed.then_some(outcome::TIMED_OUT)
}

/// The shorter of a call's timeout (below 0: none) and what is left of an enclosing deadline.
fn sooner(timeout_ns: i64, left_ns: i64) -> i64 {
    if timeout_ns < 0 || left_ns < timeout_ns {
        left_ns
    } else {
        timeout_ns
    }
}

/// The way in for a fiber that is interrupted, has a deadline, or is panicking.
#[cold]
#[inline(never)]
fn suspend_interrupted(
    worker: &Worker,
    fiber: FiberRef,
    op: &mut Op<'_>,
    timeout_ns: i64,
    target: Option<(&InFlight, Direction)>,
) -> i32 {
    if std::thread::panicking() {
        return worker.attempt(op);
    }
    if let Some(code) = interrupted(worker, fiber) {
        return code;
    }
    let mut timeout_ns = timeout_ns;
    if fiber.interrupt.get() & interrupt::DEADLINE != 0 {
        let left_ns = fiber.deadline_ns.get() - worker.now_ns();
        if left_ns <= 0 {
            yield_fiber(worker, fiber);
            return interrupted(worker, fiber).unwrap_or(outcome::TIMED_OUT);
        }
        timeout_ns = sooner(timeout_ns, left_ns);
    }
    suspend_fiber(worker, fiber, op, timeout_ns, target)
}

/// The code a cancelled or shut-down fiber's call answers, after the others had a turn, so that a fiber that ignores the answer
/// holds up nobody. Once the grace period is over it does not return but unwinds.
fn interrupted(worker: &Worker, fiber: FiberRef) -> Option<i32> {
    if !is_interrupted(fiber) {
        return None;
    }
    yield_fiber(worker, fiber);
    if fiber.interrupt.get() & interrupt::UNWIND != 0 {
        unwind(worker, fiber);
    }
    Some(if fiber.interrupt.get() & interrupt::SHUTDOWN != 0 {
        outcome::SHUTDOWN
    } else {
        outcome::CANCELLED
    })
}

fn is_interrupted(fiber: FiberRef) -> bool {
    fiber.interrupt.get() & !interrupt::DEADLINE != 0
}

/// Ends the fiber from inside: unwinds it, or, when it has caught that too often or cannot unwind, stops it for good.
#[cold]
#[inline(never)]
fn unwind(worker: &Worker, fiber: FiberRef) {
    if std::thread::panicking() {
        return;
    }
    if fiber.unwinds.get() >= UNWINDS_MAX || cfg!(panic = "abort") {
        fiber.state.set(State::Lost);
        worker.lose(fiber);
        loop {
            fiber.switch_out();
        }
    }
    fiber.unwinds.set(fiber.unwinds.get() + 1);
    resume_unwind(Box::new(FiberUnwind));
}

/// Lets the other ready fibers and the completions at hand go first.
#[inline]
fn yield_fiber(worker: &Worker, fiber: FiberRef) {
    if std::thread::panicking() {
        return;
    }
    worker.make_ready(fiber);
    fiber.switch_out();
}

/// In a fiber that finds more to do than is fair: lets the others go first. 0, or one of [`outcome`] if the fiber was interrupted.
pub(crate) fn give_way() -> i32 {
    let Some((worker, fiber)) = current() else {
        return 0;
    };
    if let Some(code) = interrupted(worker, fiber) {
        return code;
    }
    yield_fiber(worker, fiber);
    0
}

/// Waits for a wake of `key`; see [`park::Parking`]. `Cancelled` stands for every interruption: what it was, and the unwinding,
/// are left to [`interrupted`], once the caller has taken itself out of whatever it waited in.
fn park(worker: &Worker, fiber: FiberRef, key: Key) -> Result<()> {
    let interrupted_error = || is_interrupted(fiber).then_some(Error::Cancelled);
    if !worker.is_waiting(key) {
        return Ok(());
    }
    if let Some(error) = interrupted_error() {
        return Err(error);
    }
    if !worker.is_waiting(key) {
        return Ok(());
    }
    let mut res = 0;
    if fiber.deadline_ns.get() == i64::MAX {
        fiber.key.set(key);
        fiber.state.set(State::Parked);
        fiber.switch_out();
    } else {
        // With a deadline the wait is a timer on the ring, which a wake cancels.
        let left_ns = fiber.deadline_ns.get() - worker.now_ns();
        if left_ns <= 0 {
            // The others go first all the same: one of them may be who is waited for.
            yield_fiber(worker, fiber);
            if !worker.is_waiting(key) {
                return Ok(());
            }
            return Err(interrupted_error().unwrap_or(Error::Timeout));
        }
        let mut op = Op::Sleep {
            duration: timespec_from_ns(left_ns),
        };
        // SAFETY: `op` stays in this frame until the timer's final CQE has resumed the fiber.
        while let Err(Full) = unsafe { worker.submit_as(fiber, key, &mut op) } {
            yield_fiber(worker, fiber);
            if !worker.is_waiting(key) {
                return Ok(());
            }
            if let Some(error) = interrupted_error() {
                return Err(error);
            }
        }
        let abort = AbortOnUnwind;
        fiber.switch_out();
        std::mem::forget(abort);
        res = fiber.completion.get().res;
    }
    if fiber.woken.replace(false) {
        return Ok(());
    }
    match interrupted_error() {
        Some(error) => Err(error),
        None if res == -libc::ETIME => Err(Error::Timeout),
        None => Ok(()),
    }
}

/// Rings another thread's bell with what this thread has.
fn ring_bell(bell: &Arc<Bell>) {
    if let Some(worker) = worker()
        && worker.ring(bell)
    {
        return;
    }
    bell.ring_by_eventfd();
}

/// Suspends the calling fiber (or blocks the calling thread) for a duration.
///
/// The duration takes the forms of [`settimeout`](crate::Socket::settimeout): seconds as a float or an integer, or a
/// [`Duration`]; `None` sleeps until interrupted. It is one timer on the worker's ring.
///
/// # Errors
///
/// - `Cancelled`: the fiber's [`JoinHandle`](crate::JoinHandle) was cancelled.
/// - `Shutdown`: the runtime is ending.
/// - `Timeout`: the deadline of an enclosing [`timeout`] passed first.
/// - `EAGAIN`: in a destructor that runs because the fiber panics, where nothing waits.
/// - `Value`, `Overflow`: a duration that is negative, NaN or too long.
///
/// # Source
///
/// Python `time.sleep`; `IORING_OP_TIMEOUT` (Linux 5.4).
///
/// ```
/// ringsock::run(|| ringsock::sleep(0.01))?;
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn sleep(duration: impl Into<Timeout>) -> Result<()> {
    let duration_ns = duration.into().as_ns()?.unwrap_or(i64::MAX);
    if in_fiber() {
        // The ring adds the timer to its own clock: far deadlines must not overflow it.
        let duration = timespec_from_ns(duration_ns.min(i64::MAX / 4));
        return match suspend(&mut Op::Sleep { duration }, -1, None) {
            code if code == -libc::ETIME => Ok(()),
            code => Err(error_from_outcome(code)),
        };
    }
    let left_ns = match thread::deadline_ns() {
        i64::MAX => i64::MAX,
        deadline_ns => deadline_ns - crate::sys::monotonic_ns(),
    };
    std::thread::sleep(Duration::from_nanos(duration_ns.min(left_ns).max(0) as u64));
    if left_ns < duration_ns {
        Err(Error::Timeout)
    } else {
        Ok(())
    }
}

/// Lets the other fibers of this worker go first. On a plain thread it is [`std::thread::yield_now`].
///
/// At shutdown, when the grace period is over, it unwinds the fiber like any other suspension.
///
/// ```
/// ringsock::run(|| {
///     let other = ringsock::spawn(|| 7);
///     ringsock::yield_now();
///     assert!(other.is_finished());
/// });
/// ```
#[inline]
pub fn yield_now() {
    // Inlined into its caller, the switch out and the switch in are a call and a return to the processor's predictor.
    match current() {
        Some((worker, fiber)) => {
            yield_fiber(worker, fiber);
            if fiber.interrupt.get() & interrupt::UNWIND != 0 {
                unwind(worker, fiber);
            }
        }
        None => std::thread::yield_now(),
    }
}

/// Bounds everything `block` waits for by one deadline.
///
/// `duration` takes the forms of [`settimeout`](crate::Socket::settimeout); `None` sets no deadline. While `block` runs, each
/// call of it that waits (socket calls, [`sleep`], [`join`](crate::JoinHandle::join)) fails with `Timeout` at the deadline at
/// the latest, and at once afterwards, even if it need not have waited; what a call has already transferred is reported as
/// always. (A [`Mutex`](crate::Mutex) or a [`channel`](crate::channel) that has no need to wait does not look at the deadline.)
/// Code that does not wait is not interrupted. Of nested deadlines the earliest counts. It works on plain threads too.
///
/// # Errors
///
/// Those of `block`, unchanged; `Value` or `Overflow` for a duration that is negative, NaN or too long.
///
/// # Source
///
/// Python `asyncio.timeout`, in blocking form.
///
/// ```
/// use std::time::{Duration, Instant};
///
/// let before = Instant::now();
/// let result = ringsock::run(|| ringsock::timeout(0.02, || ringsock::sleep(60)));
/// assert_eq!(result, Err(ringsock::Error::Timeout));
/// assert!(before.elapsed() < Duration::from_secs(30));
/// ```
pub fn timeout<T>(duration: impl Into<Timeout>, block: impl FnOnce() -> Result<T>) -> Result<T> {
    let Some(duration_ns) = duration.into().as_ns()? else {
        return block();
    };
    match current() {
        Some((worker, fiber)) => {
            let outer_ns = fiber.deadline_ns.get();
            let deadline_ns = worker.now_ns().saturating_add(duration_ns).min(outer_ns);
            set_deadline(fiber, deadline_ns);
            let _restore = OnDrop(|| set_deadline(fiber, outer_ns));
            block()
        }
        None => {
            let outer_ns = thread::deadline_ns();
            let deadline_ns = crate::sys::monotonic_ns()
                .saturating_add(duration_ns)
                .min(outer_ns);
            thread::set_deadline_ns(deadline_ns);
            let _restore = OnDrop(|| thread::set_deadline_ns(outer_ns));
            block()
        }
    }
}

fn set_deadline(fiber: FiberRef, deadline_ns: i64) {
    fiber.deadline_ns.set(deadline_ns);
    let others = fiber.interrupt.get() & !interrupt::DEADLINE;
    fiber.interrupt.set(if deadline_ns == i64::MAX {
        others
    } else {
        others | interrupt::DEADLINE
    });
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn receives_that_find_nothing_are_tried_ever_more_rarely() {
        let forecast = Forecast::new();
        let mut tried_at = Vec::new();
        for receive in 0..200 {
            if forecast.is_good() {
                tried_at.push(receive);
                forecast.found_nothing();
            }
        }
        assert_eq!(tried_at, [0, 2, 6, 14, 30, 62, 126, 190]);
        while !forecast.is_good() {}
        forecast.found();
        assert!(
            forecast.is_good() && forecast.is_good(),
            "worth trying again"
        );
    }
}
