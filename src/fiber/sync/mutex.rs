//! The mutex: `raw_mutex.rs` with data, and with fibers and threads that wait.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use crate::error::Result;
use crate::fiber::atomics;
use crate::fiber::park::{Ended, Parking, Waker};
use crate::fiber::raw_mutex::{FREE, RawMutex};
use crate::fiber::wait_queue::WaitQueue;

/// A lock that suspends only the fiber that waits for it, and blocks a plain thread as a thread.
///
/// It may be held across socket calls and every other wait, which a [`std::sync::Mutex`] must not be: there the second fiber
/// would block the worker that the first one needs to go on.
///
/// - **Fair.** Those who wait get the lock in the order they came: [`lock`](Mutex::lock) and [`try_lock`](Mutex::try_lock) of
///   others fail or queue meanwhile. Handed from worker to worker that costs a wake each time, so keep contended sections short.
/// - **No poisoning.** A panic while the lock is held unlocks it, as a shutdown does that unwinds a fiber. Data that must not be
///   seen half changed needs a guard of its own.
/// - Locking it twice in one fiber or thread waits for ever (or until interrupted).
/// - A fiber given up at shutdown ([`fibers_lost`](crate::Metrics::fibers_lost)) keeps the locks it holds.
/// - While nobody waits, nothing is allocated.
/// - In a forked child those who waited in the parent are not there, though it would hand the lock to them: use one made in the child.
///
/// # Source
///
/// [`std::sync::Mutex`]; Python `threading.Lock`.
///
/// ```
/// use ringsock::Mutex;
///
/// static TOTAL: Mutex<u32> = Mutex::new(0);
///
/// ringsock::run(|| {
///     let fibers: Vec<_> = (1..=10)
///         .map(|n| {
///             ringsock::spawn(move || {
///                 let mut total = TOTAL.lock()?;
///                 ringsock::sleep(0.001)?;
///                 *total += n;
///                 Ok::<(), ringsock::Error>(())
///             })
///         })
///         .collect();
///     fibers.into_iter().try_for_each(|fiber| fiber.join().unwrap())
/// })?;
/// assert_eq!(*TOTAL.lock()?, 55);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub struct Mutex<T: ?Sized> {
    raw: RawMutex<Waker>,
    data: UnsafeCell<T>,
}

// SAFETY: the mutex owns its data, and wakers are Send.
unsafe impl<T: ?Sized + Send> Send for Mutex<T> {}
// SAFETY: `raw` gives the data to one guard at a time, so sharing the mutex moves the data between threads, no more.
unsafe impl<T: ?Sized + Send> Sync for Mutex<T> {}

impl<T> Mutex<T> {
    /// An unlocked mutex.
    pub const fn new(data: T) -> Mutex<T> {
        let queue = atomics::Mutex::new(WaitQueue::new());
        Mutex {
            raw: RawMutex::new(atomics::AtomicU8::new(FREE), queue),
            data: UnsafeCell::new(data),
        }
    }

    /// The data, without the mutex.
    pub fn into_inner(self) -> T {
        self.data.into_inner()
    }
}

impl<T: ?Sized> Mutex<T> {
    /// Waits for the lock and takes it, until the guard is dropped.
    ///
    /// A lock that is free is taken at once, whatever the state of the fiber: also by a cancelled one that cleans up, after a
    /// deadline, and during a shutdown.
    ///
    /// # Errors
    ///
    /// Only where it would have to wait, and always without the lock:
    /// - `Cancelled`, `Shutdown`: the fiber was cancelled, or its runtime is ending.
    /// - `Timeout`: the deadline of an enclosing [`timeout`](crate::timeout) passed.
    /// - `EAGAIN`: in a destructor that runs because the fiber panics, where nothing waits. (A plain thread waits there too.)
    ///
    /// ```
    /// let mutex = ringsock::Mutex::new(1);
    /// *mutex.lock()? += 1;
    /// assert_eq!(mutex.into_inner(), 2);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    #[inline]
    pub fn lock(&self) -> Result<MutexGuard<'_, T>> {
        if !self.raw.try_lock() {
            self.wait_for_lock().map_err(Ended::error)?;
        }
        Ok(MutexGuard::new(self))
    }

    /// [`lock`](Mutex::lock), for whoever has something to undo before an interrupted fiber lets others go first.
    pub(super) fn lock_or_ended(&self) -> std::result::Result<MutexGuard<'_, T>, Ended> {
        if !self.raw.try_lock() {
            self.wait_for_lock()?;
        }
        Ok(MutexGuard::new(self))
    }

    /// Takes the lock if it is free; `None` if not. It never waits.
    ///
    /// ```
    /// let mutex = ringsock::Mutex::new(1);
    /// let guard = mutex.try_lock().expect("nobody has it");
    /// assert!(mutex.try_lock().is_none());
    /// ```
    #[inline]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.raw.try_lock().then(|| MutexGuard::new(self))
    }

    /// The data; nobody else can have it, so nothing is locked.
    ///
    /// ```
    /// let mut mutex = ringsock::Mutex::new(1);
    /// *mutex.get_mut() = 2;
    /// assert_eq!(mutex.into_inner(), 2);
    /// ```
    pub fn get_mut(&mut self) -> &mut T {
        self.data.get_mut()
    }

    #[cold]
    #[inline(never)]
    fn wait_for_lock(&self) -> std::result::Result<(), Ended> {
        loop {
            let parking = Parking::new();
            let Some(ticket) = self.raw.enqueue(parking.waker()) else {
                return Ok(());
            };
            let ended = parking.wait();
            if self.raw.settle(ticket) {
                return Ok(());
            }
            if ended != Ended::Woken {
                return Err(ended);
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn hand_over(&self) {
        if let Some(waker) = self.raw.hand_over() {
            waker.wake();
        }
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Mutex<T> {
        Mutex::new(T::default())
    }
}

impl<T> From<T> for Mutex<T> {
    fn from(data: T) -> Mutex<T> {
        Mutex::new(data)
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Mutex");
        match self.try_lock() {
            Some(guard) => debug.field("data", &&*guard),
            None => debug.field("data", &format_args!("<locked>")),
        };
        debug.finish()
    }
}

/// The lock of a [`Mutex`], and the way to its data; dropping it unlocks. It stays with the fiber or thread that locked.
#[must_use = "dropping the guard unlocks at once"]
pub struct MutexGuard<'a, T: ?Sized> {
    mutex: &'a Mutex<T>,
    /// Not Send, as std's: what a fiber or thread has locked it unlocks, so that "who holds it" has an answer.
    not_send: PhantomData<*const ()>,
}

// SAFETY: a shared guard only gives out `&T`.
unsafe impl<T: ?Sized + Sync> Sync for MutexGuard<'_, T> {}

impl<'a, T: ?Sized> MutexGuard<'a, T> {
    /// For whoever has just locked `mutex`.
    #[inline(always)]
    fn new(mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        MutexGuard {
            mutex,
            not_send: PhantomData,
        }
    }

    /// Unlocks, and gives back what it locked.
    pub(super) fn unlock(self) -> &'a Mutex<T> {
        self.mutex
    }
}

impl<T: ?Sized> Drop for MutexGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        if !self.mutex.raw.unlock() {
            self.mutex.hand_over();
        }
    }
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the guard has the lock, so nobody else reaches the data while it is borrowed.
        unsafe { &*self.mutex.data.get() }
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and the guard is borrowed exclusively.
        unsafe { &mut *self.mutex.data.get() }
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for MutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: ?Sized + fmt::Display> fmt::Display for MutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
