//! The same calls on a plain thread: a small ring of the thread's own, made with its first call and closed with the thread.
//!
//! Between calls that ring is idle: every call waits for its operation's final CQE. One system call submits the operation (and
//! its deadline) and waits for it. Where io_uring is forbidden or too old, or the environment says so, the thread has an epoll
//! instance instead (`driver/choice.rs`). Where neither can be had (during the thread's teardown, out of memory or
//! descriptors) the call waits by poll(2), and is counted.
#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::inflight::{Direction, InFlight};
use super::outcome;
use super::remote::{Control, Mailbox, Remote};
use crate::driver::op::timespec_from_ns;
use crate::driver::{Attempt, Completion, Config, Driver, DriverKind, Full, Op, Waiter};
use crate::error::Result;
use crate::sys;

/// Without a ring, nobody can interrupt a wait: it looks about itself so often.
const POLL_SLICE_MS: i64 = 50;

/// How soon a connect is tried again that found a backlog full.
const RETRY_MS: i64 = 5;

/// Failed enters in a row after which a call whose operation never reached the kernel goes without the ring.
const ENTERS_REFUSED_MAX: u64 = 16;

/// For so long a thread whose ring took nothing does without one.
const REFUSED_PAUSE_NS: i64 = 1_000_000_000;

static CALLS_WITHOUT_RING: AtomicU64 = AtomicU64::new(0);

/// How many calls on plain threads had to do without a ring (or, where epoll is the driver, without an epoll instance) since the
/// process started: out of memory or of descriptors, in the thread's teardown, or in a process where
/// [`DriverKind::Uring`](crate::DriverKind) was asked for and is refused. They waited by poll(2).
///
/// ```
/// let before = ringsock::calls_without_ring();
/// let (left, right) = ringsock::socketpair()?;
/// left.sendall(b"hello")?;
/// assert_eq!(right.recv(16)?, b"hello");
/// assert_eq!(ringsock::calls_without_ring(), before);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn calls_without_ring() -> u64 {
    CALLS_WITHOUT_RING.load(Ordering::Relaxed)
}

struct ThreadRing {
    driver: Driver,
    slot: u32,
    remote: Arc<Remote>,
    mailbox: Mailbox,
}

thread_local! {
    static RING: RefCell<Option<Box<ThreadRing>>> = const { RefCell::new(None) };
    /// Until then, by the monotonic clock, the kernel takes nothing from this thread's ring; 0 if it does.
    static REFUSED_UNTIL_NS: Cell<i64> = const { Cell::new(0) };
    /// The deadline of an enclosing `timeout`, by the monotonic clock; `i64::MAX` without one.
    static DEADLINE_NS: Cell<i64> = const { Cell::new(i64::MAX) };
}

pub(super) fn deadline_ns() -> i64 {
    DEADLINE_NS.get()
}

pub(super) fn set_deadline_ns(deadline_ns: i64) {
    DEADLINE_NS.set(deadline_ns);
}

impl ThreadRing {
    fn new() -> Result<Box<ThreadRing>> {
        let mut driver = Driver::new(Config::thread(), None)?;
        let bell = driver.bell()?;
        let (remote, mailbox) = Remote::new(bell, 0);
        let slot = driver.slots().register(Waiter::MIN);
        Ok(Box::new(ThreadRing {
            driver,
            slot,
            remote,
            mailbox,
        }))
    }

    /// Runs one operation to its final CQE: its result. `None` if it never reached the kernel.
    fn run(
        &mut self,
        op: &mut Op<'_>,
        timeout_ns: i64,
        target: Option<(&InFlight, Direction)>,
    ) -> Option<i32> {
        let timer = timespec_from_ns(timeout_ns.max(0));
        let timeout = (timeout_ns >= 0).then_some(&timer);
        let submitted_before = self.driver.counters().sqes;
        let key = self.driver.slots().begin(self.slot);
        // SAFETY: `op`'s memory and `timer` stay borrowed by this frame, which ends only after the key's final CQE; or, where the
        // kernel took nothing, `block` drops the ring with the queued entries before anything enters it again.
        while let Err(Full) = unsafe { self.driver.submit(op, key, timeout) } {
            self.driver.enter(false);
            while self.driver.next().is_some() {}
        }
        let abort = super::AbortOnUnwind;
        if let Some((inflight, _)) = target {
            inflight.enter_other(&self.remote, key);
        }
        let completion = self.wait(submitted_before);
        if let Some((inflight, _)) = target {
            inflight.leave_other(&self.remote, key);
        }
        std::mem::forget(abort);
        completion.map(|completion| completion.res)
    }

    /// Waits for the completion of the only operation; `None` if the kernel takes none.
    fn wait(&mut self, submitted_before: u64) -> Option<Completion> {
        let refused_before = self.driver.counters().enters_refused;
        let mut completed = None;
        loop {
            // The slot has one operation at a time, so whatever is delivered is its completion.
            while let Some((_, completion)) = self.driver.next() {
                completed = Some(completion);
            }
            if completed.is_some() && self.driver.is_settled() {
                self.driver.settle();
                return completed;
            }
            if self.remote.take_mail() {
                self.read_mail();
            }
            if self.remote.fall_asleep() {
                self.driver.enter(true);
                self.remote.wake_up();
            }
            let refused = self.driver.counters().enters_refused - refused_before;
            if refused >= ENTERS_REFUSED_MAX && self.driver.counters().sqes == submitted_before {
                return None;
            }
        }
    }

    #[cold]
    fn read_mail(&mut self) {
        while let Ok(control) = self.mailbox.controls.try_recv() {
            if let Control::CancelOperation(cancelled) = control
                && let Err(Full) = self.driver.cancel(cancelled)
            {
                // Nothing else is queued here, so the next enter makes room; ask again then.
                let _ = self.remote.send(Control::CancelOperation(cancelled));
                return;
            }
        }
    }
}

impl Drop for ThreadRing {
    fn drop(&mut self) {
        self.remote.retire(&self.mailbox);
    }
}

/// Gives `use_ring` this thread's ring; `None` where there is none to be had.
fn with_ring<R>(use_ring: impl FnOnce(&mut ThreadRing) -> R) -> Option<R> {
    let refused_until_ns = REFUSED_UNTIL_NS.get();
    if refused_until_ns != 0 {
        if sys::monotonic_ns() < refused_until_ns {
            return None;
        }
        REFUSED_UNTIL_NS.set(0);
    }
    let used = RING.try_with(|ring| {
        // A borrow is under way only if a signal handler calls in; it does without.
        let mut ring = ring.try_borrow_mut().ok()?;
        if ring.as_ref().is_none_or(|ring| !ring.driver.is_ours()) {
            // After a fork the parent's ring is dropped without touching what it shares with the parent.
            *ring = ThreadRing::new().ok();
        }
        ring.as_mut().map(|ring| use_ring(ring))
    });
    used.ok().flatten()
}

/// What drives this thread's calls; `None` where it is poll(2).
pub(super) fn driver() -> Option<DriverKind> {
    with_ring(|ring| ring.driver.kind())
}

/// Drops this thread's ring and what it never submitted.
fn discard_ring() {
    REFUSED_UNTIL_NS.set(sys::monotonic_ns().saturating_add(REFUSED_PAUSE_NS));
    let _ = RING.try_with(|ring| ring.try_borrow_mut().map(|mut ring| *ring = None));
}

/// Runs `op` on this thread: see [`suspend`](super::suspend).
#[cold]
#[inline(never)]
pub(super) fn block(
    op: &mut Op<'_>,
    timeout_ns: i64,
    target: Option<(&InFlight, Direction)>,
) -> i32 {
    let mut timeout_ns = timeout_ns;
    let deadline_ns = DEADLINE_NS.get();
    if deadline_ns != i64::MAX {
        let left_ns = deadline_ns - sys::monotonic_ns();
        if left_ns <= 0 {
            return outcome::TIMED_OUT;
        }
        timeout_ns = super::sooner(timeout_ns, left_ns);
    }
    let res = match with_ring(|ring| ring.run(op, timeout_ns, target)) {
        Some(Some(res)) => res,
        Some(None) => {
            discard_ring();
            by_readiness(op, timeout_ns, target)
        }
        None => by_readiness(op, timeout_ns, target),
    };
    if res >= 0 {
        return res;
    }
    super::failed(op, res, timeout_ns, target)
}

/// Runs `op` by trying and by poll(2).
#[cold]
fn by_readiness(op: &mut Op<'_>, timeout_ns: i64, target: Option<(&InFlight, Direction)>) -> i32 {
    CALLS_WITHOUT_RING.fetch_add(1, Ordering::Relaxed);
    let deadline_ns = match timeout_ns {
        ns if ns < 0 => i64::MAX,
        ns => sys::monotonic_ns().saturating_add(ns),
    };
    let mut attempt = Attempt::NEW;
    let mut is_ready = false;
    loop {
        if let Some(res) = attempt.step(op) {
            return res;
        }
        if is_ready && let Some(res) = attempt.at_end(op) {
            return res;
        }
        if super::is_closed(target) {
            return attempt.ended(-libc::EBADF);
        }
        let left_ns = deadline_ns.saturating_sub(sys::monotonic_ns());
        if left_ns <= 0 {
            return attempt.ended(outcome::TIMED_OUT);
        }
        let slice_ms = (left_ns / 1_000_000 + 1).min(POLL_SLICE_MS);
        match op.readiness() {
            Some((fd, events)) if !attempt.waits_for_time(op) => {
                is_ready = sys::poll(fd, events, slice_ms as i32) > 0;
            }
            Some(_) => std::thread::sleep(Duration::from_millis(slice_ms.min(RETRY_MS) as u64)),
            None => std::thread::sleep(Duration::from_millis(slice_ms as u64)),
        }
    }
}
