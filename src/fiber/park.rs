//! Waiting for another fiber or thread, rather than for the kernel.
//!
//! Whoever wants to wait makes a [`Parking`], hands its [`Waker`] to whoever will wake it, checks its condition once more, and
//! parks. A wake that comes before the park is kept. Both kinds of waiter, fiber and plain thread, look alike.
//!
//! ```text
//!  Parking::new ──▶ waker() given away ──▶ condition already true? ──yes──▶ dropped: a late wake finds nobody
//!                                                   │ no
//!                                                   ▼
//!                                                 park ──▶ woken, or interrupted (cancel, shutdown, deadline)
//! ```

use std::sync::Arc;
use std::thread::Thread;
use std::time::Duration;

use super::remote::{Control, Remote};
use super::wake::Woken;
use super::{current, error_from_outcome, interrupted, outcome, thread, yield_fiber};
use crate::driver::Key;
use crate::error::{Error, Result};
use crate::sys;

/// Wakes one waiter, once.
#[derive(Clone)]
pub(crate) enum Waker {
    Fiber { remote: Arc<Remote>, key: Key },
    Thread { thread: Thread, woken: Arc<Woken> },
}

impl Waker {
    /// Wakes the waiter; nothing happens if it no longer waits.
    pub(crate) fn wake(self) {
        match self {
            Waker::Fiber { remote, key } => match super::worker() {
                Some(worker) if worker.id() == remote.id() => worker.wake(key),
                // A worker that has ended has no waiters left.
                _ => drop(remote.send(Control::Wake(key))),
            },
            Waker::Thread { thread, woken } => {
                woken.wake(|| thread.unpark());
            }
        }
    }
}

/// One intended wait of the calling fiber or thread. Between its making and its end the fiber must not start an operation.
pub(crate) struct Parking {
    waker: Waker,
}

impl Parking {
    pub(crate) fn new() -> Parking {
        Parking {
            waker: match current() {
                Some((worker, fiber)) => Waker::Fiber {
                    remote: worker.remote().clone(),
                    key: worker.begin_wait(fiber),
                },
                None => Waker::Thread {
                    thread: std::thread::current(),
                    woken: Arc::new(Woken::new()),
                },
            },
        }
    }

    /// What wakes this wait.
    pub(crate) fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Waits until woken.
    ///
    /// # Errors
    ///
    /// Those of [`Ended::error`].
    pub(crate) fn park(self) -> Result<()> {
        self.wait().check()
    }

    /// Waits until woken or interrupted. Where that leaves something to undo (a place in a queue), it is undone before
    /// [`Ended::error`] is asked.
    pub(crate) fn wait(self) -> Ended {
        let parked = match &self.waker {
            // Nothing suspends while panicking: whoever waits there goes on without what it waited for.
            Waker::Fiber { .. } if std::thread::panicking() => return Ended::Panicking,
            Waker::Fiber { key, .. } => {
                let (worker, fiber) = current().expect("a fiber parks on its own thread");
                super::park(worker, fiber, *key)
            }
            Waker::Thread { woken, .. } => park_thread(woken),
        };
        match parked {
            Ok(()) => Ended::Woken,
            Err(Error::Timeout) => Ended::TimedOut,
            Err(_) => Ended::Interrupted,
        }
    }
}

/// How a wait ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ended {
    Woken,
    /// The fiber was cancelled, or its runtime is ending.
    Interrupted,
    /// The deadline of an enclosing [`timeout`](crate::timeout) passed.
    TimedOut,
    /// There was no wait, because the fiber is panicking.
    Panicking,
}

impl Ended {
    /// Nothing if it was woken, else [`error`](Ended::error).
    pub(crate) fn check(self) -> Result<()> {
        match self {
            Ended::Woken => Ok(()),
            other => Err(other.error()),
        }
    }

    /// What the caller is told of a wait that was not ended by a wake: `Cancelled`, `Shutdown`, `Timeout`, or `EAGAIN` in a fiber
    /// that panics.
    ///
    /// The others go first, so that a fiber that ignores the answer holds up nobody; and once its runtime's grace is over, the
    /// fiber is unwound here.
    #[cold]
    pub(crate) fn error(self) -> Error {
        let Some((worker, fiber)) = current() else {
            return Error::Timeout;
        };
        match self {
            Ended::Panicking => Error::from_errno(libc::EAGAIN),
            Ended::TimedOut => {
                yield_fiber(worker, fiber);
                Error::Timeout
            }
            Ended::Woken | Ended::Interrupted => {
                let code = interrupted(worker, fiber).unwrap_or(outcome::CANCELLED);
                error_from_outcome(code)
            }
        }
    }
}

/// When the deadline of the enclosing [`timeout`](crate::timeout) passes, by the monotonic clock; `i64::MAX` without one.
pub(crate) fn deadline_ns() -> i64 {
    match current() {
        Some((_, fiber)) => fiber.deadline_ns.get(),
        None => thread::deadline_ns(),
    }
}

impl Drop for Parking {
    fn drop(&mut self) {
        if let Waker::Fiber { key, .. } = self.waker
            && let Some((worker, _)) = current()
        {
            worker.end_wait(key);
        }
    }
}

fn park_thread(woken: &Woken) -> Result<()> {
    let deadline_ns = thread::deadline_ns();
    let woken = woken.wait(|| {
        if deadline_ns == i64::MAX {
            std::thread::park();
            return true;
        }
        let left_ns = deadline_ns - sys::monotonic_ns();
        if left_ns > 0 {
            std::thread::park_timeout(Duration::from_nanos(left_ns as u64));
        }
        left_ns > 0
    });
    if woken { Ok(()) } else { Err(Error::Timeout) }
}
