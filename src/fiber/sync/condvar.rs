//! The condition variable: a queue of those who wait for a notification.

use std::fmt;
use std::sync::{self, PoisonError};

use super::mutex::MutexGuard;
use crate::error::Result;
use crate::fiber::park::{Ended, Parking, Waker, deadline_ns};
use crate::fiber::{self, wait_queue::WaitQueue};
use crate::timeout::Timeout;

/// Waits for what another fiber or thread changes under a [`Mutex`](crate::Mutex).
///
/// A waiter can be woken without a notification meant for it, so wait in a loop, or with [`wait_while`](Condvar::wait_while).
///
/// **An interrupted wait ends without the lock**: taking it again could mean waiting, which an interrupted fiber no longer
/// does. Where the error is handled, [`lock`](crate::Mutex::lock) gets it if it is free. A notification that reached an
/// interrupted waiter goes on to the next one.
///
/// In a forked child those who waited in the parent are not there, though they are still counted: use one made in the child.
///
/// # Source
///
/// [`std::sync::Condvar`]; Python `threading.Condition`.
///
/// ```
/// use std::sync::Arc;
/// use ringsock::{Condvar, Mutex};
///
/// let answer = ringsock::run(|| {
///     let shared = Arc::new((Mutex::new(0), Condvar::new()));
///     let theirs = shared.clone();
///     ringsock::spawn(move || {
///         *theirs.0.lock()? = 42;
///         theirs.1.notify_one();
///         Ok::<(), ringsock::Error>(())
///     });
///     let guard = shared.1.wait_while(shared.0.lock()?, |answer| *answer == 0)?;
///     Ok::<i32, ringsock::Error>(*guard)
/// })?;
/// assert_eq!(answer, 42);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub struct Condvar {
    queue: sync::Mutex<WaitQueue<Waker>>,
}

impl Condvar {
    /// A condition variable that nobody waits for. Unlike std's it may be used with any number of mutexes.
    pub const fn new() -> Condvar {
        Condvar {
            queue: sync::Mutex::new(WaitQueue::new()),
        }
    }

    fn queue(&self) -> sync::MutexGuard<'_, WaitQueue<Waker>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unlocks, waits for a notification, and locks again. No notification between the two is missed.
    ///
    /// # Errors
    ///
    /// Without the lock:
    /// - `Cancelled`, `Shutdown`: the fiber was cancelled, or its runtime is ending.
    /// - `Timeout`: the deadline of an enclosing [`timeout`](crate::timeout) passed.
    /// - `EAGAIN`: in a destructor that runs because the fiber panics, where nothing waits.
    ///
    /// ```
    /// use std::sync::Arc;
    ///
    /// let told = ringsock::run(|| {
    ///     let shared = Arc::new((ringsock::Mutex::new(false), ringsock::Condvar::new()));
    ///     let theirs = shared.clone();
    ///     ringsock::spawn(move || {
    ///         *theirs.0.lock()? = true;
    ///         theirs.1.notify_all();
    ///         Ok::<(), ringsock::Error>(())
    ///     });
    ///     let mut told = shared.0.lock()?;
    ///     while !*told {
    ///         told = shared.1.wait(told)?;
    ///     }
    ///     Ok::<bool, ringsock::Error>(*told)
    /// })?;
    /// assert!(told);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn wait<'a, T: ?Sized>(&self, guard: MutexGuard<'a, T>) -> Result<MutexGuard<'a, T>> {
        Ok(self.wait_timeout(guard, Timeout::NONE)?.0)
    }

    /// [`wait`](Condvar::wait) for at most `duration`: the lock, and whether the time passed without a notification. Locking
    /// again may take longer.
    ///
    /// The duration takes the forms of [`settimeout`](crate::Socket::settimeout).
    ///
    /// # Errors
    ///
    /// Those of [`wait`](Condvar::wait), without the lock; `Value`, `Overflow`: a duration that is negative, NaN or too long.
    ///
    /// ```
    /// let (mutex, condvar) = (ringsock::Mutex::new(()), ringsock::Condvar::new());
    /// let (_guard, timed_out) = condvar.wait_timeout(mutex.lock()?, 0.01)?;
    /// assert!(timed_out);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn wait_timeout<'a, T: ?Sized>(
        &self,
        guard: MutexGuard<'a, T>,
        duration: impl Into<Timeout>,
    ) -> Result<(MutexGuard<'a, T>, bool)> {
        let duration = duration.into();
        duration.as_ns()?;
        let parking = Parking::new();
        let ticket = self.queue().push(parking.waker());
        let mutex = guard.unlock();
        let ended = fiber::timeout(duration, || Ok(parking.wait()))?;
        let notified = self.queue().remove(ticket).is_none();
        let timed_out = !notified && ended == Ended::TimedOut && deadline_ns() > fiber::now_ns();
        if !notified && !timed_out {
            ended.check()?;
        }
        match mutex.lock_or_ended() {
            Ok(guard) => Ok((guard, timed_out)),
            Err(ended) => {
                if notified {
                    self.notify_one();
                }
                Err(ended.error())
            }
        }
    }

    /// [`wait`](Condvar::wait) for as long as `condition` holds.
    ///
    /// # Errors
    ///
    /// Those of [`wait`](Condvar::wait), without the lock.
    pub fn wait_while<'a, T: ?Sized>(
        &self,
        guard: MutexGuard<'a, T>,
        mut condition: impl FnMut(&mut T) -> bool,
    ) -> Result<MutexGuard<'a, T>> {
        let mut guard = guard;
        while condition(&mut guard) {
            guard = self.wait(guard)?;
        }
        Ok(guard)
    }

    /// Wakes the one that has waited longest, if anybody waits.
    pub fn notify_one(&self) {
        let next = self.queue().pop();
        if let Some((_, waker)) = next {
            waker.wake();
        }
    }

    /// Wakes all that wait now. They get the lock one after the other.
    pub fn notify_all(&self) {
        let all = self.queue().take();
        all.for_each(Waker::wake);
    }
}

impl Default for Condvar {
    fn default() -> Condvar {
        Condvar::new()
    }
}

impl fmt::Debug for Condvar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Condvar").finish_non_exhaustive()
    }
}
