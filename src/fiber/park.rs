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
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Thread;
use std::time::Duration;

use super::remote::{Control, Remote};
use super::{current, thread};
use crate::driver::Key;
use crate::error::{Error, Result};
use crate::sys;

/// Wakes one waiter, once.
#[derive(Clone)]
pub(crate) enum Waker {
    Fiber {
        remote: Arc<Remote>,
        key: Key,
    },
    Thread {
        thread: Thread,
        woken: Arc<AtomicBool>,
    },
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
                woken.store(true, Ordering::Release);
                thread.unpark();
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
                    woken: Arc::new(AtomicBool::new(false)),
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
    /// `Cancelled` and `Shutdown` when the fiber was interrupted, `Timeout` when the deadline of an enclosing
    /// [`timeout`](crate::timeout) passed.
    pub(crate) fn park(self) -> Result<()> {
        match &self.waker {
            Waker::Fiber { key, .. } => {
                let (worker, fiber) = current().expect("a fiber parks on its own thread");
                super::park(worker, fiber, *key)
            }
            Waker::Thread { woken, .. } => park_thread(woken),
        }
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

fn park_thread(woken: &AtomicBool) -> Result<()> {
    let deadline_ns = thread::deadline_ns();
    while !woken.load(Ordering::Acquire) {
        if deadline_ns == i64::MAX {
            std::thread::park();
            continue;
        }
        let left_ns = deadline_ns - sys::monotonic_ns();
        if left_ns <= 0 {
            return Err(Error::Timeout);
        }
        std::thread::park_timeout(Duration::from_nanos(left_ns as u64));
    }
    Ok(())
}
