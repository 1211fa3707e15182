//! Threads for calls that block whatever runs them: files, name lookups, long computations, other people's libraries.
//!
//! One pool serves the process's calls, another one its name lookups ([`Settings`]). A pool's queue is a [`channel`], which gives a
//! job straight to a thread that waits for one: a job left in the buffer found all threads busy, and starts another up to the
//! limit. A thread that waits too long for a job ends. The threads are detached: nothing waits for them when the process ends.
//!
//! ```text
//!  caller: send the job (waits while full) ──▶ lock; jobs in the buffer, and threads < limit? start one
//!  thread: recv ──▶ run ──▶ recv ──(idle too long)──▶ lock; buffer empty? threads -= 1, end
//! ```
//!
//! Under that lock either the thread sees the job or the caller sees that the thread is gone.
//!
//! A forked child has none of its parent's threads: it makes a pool of its own.
#![allow(unsafe_code)]

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{ptr, thread};

use super::join::{JoinError, panic_text};
use super::sync::channel::{Receiver, RecvError, Sender, TrySendError, channel};
use crate::error::{Error, Result};
use crate::log::log;
use crate::sys;

/// How many calls may wait for a thread.
const JOBS_MAX: usize = 1024;

/// How long a thread waits for another call.
const IDLE: Duration = Duration::from_secs(10);

/// What tells one pool of the process from another, and where it is.
pub(crate) struct Settings {
    thread_name: &'static str,
    threads_max: AtomicUsize,
    when_full: WhenFull,
    current: AtomicPtr<Pool>,
}

/// What becomes of a call when the queue is full.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum WhenFull {
    /// Its caller waits.
    Wait,
    /// It fails with EAGAIN.
    Refuse,
}

impl Settings {
    pub(crate) const fn new(
        thread_name: &'static str,
        threads_max: usize,
        when_full: WhenFull,
    ) -> Settings {
        Settings {
            thread_name,
            threads_max: AtomicUsize::new(threads_max),
            when_full,
            current: AtomicPtr::new(ptr::null_mut()),
        }
    }

    pub(crate) fn set_threads_max(&self, threads: usize) {
        self.threads_max.store(threads.max(1), Ordering::Relaxed);
    }
}

/// The pool of [`spawn_blocking`].
static CALLS: Settings = Settings::new("ringsock-blocking", 64, WhenFull::Wait);

type Job = Box<dyn FnOnce() + Send>;

/// What a closure came to, or its panic.
type Outcome<T> = std::result::Result<T, Box<dyn Any + Send>>;

/// The pool of one process. It is never freed: its threads may outlive everything else.
struct Pool {
    settings: &'static Settings,
    jobs: (Sender<Job>, Receiver<Job>),
    threads: Mutex<usize>,
    epoch: u32,
}

impl Pool {
    /// The pool of this process, rather than of the parent that forked it. Without a lock, which the parent could have held.
    fn current(settings: &'static Settings) -> &'static Pool {
        let current = &settings.current;
        let epoch = sys::fork_epoch();
        loop {
            let known = current.load(Ordering::Acquire);
            // SAFETY: null, or a pool stored below, which is never freed.
            if let Some(pool) = unsafe { known.as_ref() }
                && pool.epoch == epoch
            {
                return pool;
            }
            let pool = Box::into_raw(Box::new(Pool {
                settings,
                jobs: channel(JOBS_MAX),
                threads: Mutex::new(0),
                epoch,
            }));
            let stored = current.compare_exchange(known, pool, Ordering::AcqRel, Ordering::Relaxed);
            if stored.is_err() {
                // SAFETY: made above, and seen by nobody else.
                drop(unsafe { Box::from_raw(pool) });
            }
        }
    }

    fn threads(&self) -> MutexGuard<'_, usize> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&'static self, job: Job) -> Result<()> {
        let (jobs, _) = &self.jobs;
        if let Err(error) = jobs.try_send(job) {
            // There may be a higher limit than when the others came.
            self.start_if_wanted();
            match (error, self.settings.when_full) {
                (TrySendError::Full(job), WhenFull::Wait) => jobs.send(job)?,
                _ => return Err(Error::from_errno(libc::EAGAIN)),
            }
        }
        self.start_if_wanted();
        Ok(())
    }

    /// Starts a thread, if none waits for a job and there may be another.
    fn start_if_wanted(&'static self) {
        let (_, waiting) = &self.jobs;
        let mut threads = self.threads();
        let threads_max = self.settings.threads_max.load(Ordering::Relaxed);
        if waiting.is_pending() || *threads >= threads_max {
            return;
        }
        let started = thread::Builder::new()
            .name(self.settings.thread_name.into())
            .spawn(|| self.work());
        match started {
            Ok(_) => *threads += 1,
            // The other threads get to it.
            Err(_) if *threads > 0 => {}
            // Nobody would: their handles learn it from the jobs' being dropped.
            Err(_) => {
                drop(threads);
                while waiting.try_recv().is_ok() {}
            }
        }
    }

    /// The life of a thread.
    fn work(&self) {
        let (_, waiting) = &self.jobs;
        loop {
            if let Ok(job) = super::timeout(IDLE, || Ok(waiting.recv()?)) {
                job();
                continue;
            }
            let mut threads = self.threads();
            if waiting.is_pending() {
                *threads -= 1;
                return;
            }
        }
    }
}

/// Runs `call` on a thread of a pool, where it may block: the calling fiber goes on, and
/// [`join`](BlockingHandle::join) suspends only that fiber.
///
/// The pool belongs to the process and works in fibers and on plain threads. It has up to 64 threads
/// ([`set_blocking_threads`] changes that), started as needed; idle ones end after ten seconds. Up to 1,024 calls wait for a
/// thread; beyond that the caller waits. Calls that wait for each other can so wait for ever: let none depend on a later one.
///
/// A call that has begun cannot be interrupted. Nothing waits for it when the process ends, and a runtime that ends does not
/// either. A forked child has a pool of its own; its parent's calls go on in the parent only.
///
/// # Errors
///
/// Only where it would have to wait; `call` then never runs:
/// - `Cancelled`, `Shutdown`: the fiber was cancelled, or its runtime is ending.
/// - `Timeout`: the deadline of an enclosing [`timeout`](crate::timeout) passed.
/// - `EAGAIN`: in a destructor that runs because the fiber panics, where nothing waits.
///
/// # Source
///
/// Python `asyncio.to_thread`.
///
/// ```
/// let text = ringsock::run(|| {
///     let call = ringsock::spawn_blocking(|| std::fs::read_to_string("/proc/version"))?;
///     Ok::<_, ringsock::Error>(call.join().unwrap()?)
/// })?;
/// assert!(text.starts_with("Linux"));
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn spawn_blocking<F, T>(call: F) -> Result<BlockingHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    spawn_on(&CALLS, call)
}

/// [`spawn_blocking`] on the pool of these settings.
pub(crate) fn spawn_on<F, T>(settings: &'static Settings, call: F) -> Result<BlockingHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    let (sender, outcome) = channel::<Outcome<T>>(1);
    let pool = Pool::current(settings);
    pool.run(Box::new(move || {
        let outcome = catch_unwind(AssertUnwindSafe(call));
        // Dropping a result nobody wants may panic as well; that must not end the thread.
        let delivered = catch_unwind(AssertUnwindSafe(|| {
            if let Err(TrySendError::Disconnected(Err(payload))) = sender.try_send(outcome) {
                log_panic(&*payload);
            }
        }));
        if let Err(payload) = delivered {
            log_panic(&*payload);
        }
    }))?;
    Ok(BlockingHandle {
        outcome,
        epoch: pool.epoch,
    })
}

/// Sets how many threads [`spawn_blocking`] may use, at least 1: 64 if not said. Those above a lower limit end when they are
/// idle.
///
/// ```
/// ringsock::set_blocking_threads(8);
/// ```
pub fn set_blocking_threads(threads: usize) {
    CALLS.set_threads_max(threads);
}

#[cold]
fn log_panic(payload: &(dyn Any + Send)) {
    log(format_args!(
        "a blocking call that nobody joins panicked: {}",
        panic_text(payload)
    ));
}

/// The handle of a call on the pool. Dropping it detaches the call: it goes on, and its result is dropped when it ends.
///
/// A handle works in any fiber and on any thread.
#[must_use = "dropping the handle detaches the call"]
pub struct BlockingHandle<T> {
    outcome: Receiver<Outcome<T>>,
    epoch: u32,
}

impl<T> BlockingHandle<T> {
    /// Waits for the call to end: its result. A fiber is suspended meanwhile, a plain thread blocks.
    ///
    /// # Errors
    ///
    /// - [`JoinError::Panic`]: the call panicked.
    /// - [`JoinError::NotStarted`] with EAGAIN: no thread could be started, and there was none.
    /// - [`JoinError::Interrupted`]: the *joining* fiber was cancelled, its runtime is ending, or the deadline of an enclosing
    ///   [`timeout`](crate::timeout) passed. The call goes on, detached.
    /// - [`JoinError::Shutdown`]: in a forked child, of a call of its parent.
    ///
    /// ```
    /// let call = ringsock::spawn_blocking(|| 6 * 7)?;
    /// assert_eq!(call.join().unwrap(), 42);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn join(self) -> std::result::Result<T, JoinError> {
        if self.epoch != sys::fork_epoch() {
            return Err(JoinError::Shutdown);
        }
        match self.outcome.recv() {
            Ok(outcome) => outcome.map_err(JoinError::Panic),
            Err(RecvError::Interrupted(error)) => Err(JoinError::Interrupted(error)),
            Err(RecvError::Disconnected) => {
                Err(JoinError::NotStarted(Error::from_errno(libc::EAGAIN)))
            }
        }
    }

    /// Whether the call has ended.
    ///
    /// ```
    /// let call = ringsock::spawn_blocking(|| ())?;
    /// while !call.is_finished() {
    ///     ringsock::sleep(0.001)?;
    /// }
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn is_finished(&self) -> bool {
        !self.outcome.is_pending()
    }
}

impl<T> Drop for BlockingHandle<T> {
    fn drop(&mut self) {
        if let Ok(Err(payload)) = self.outcome.try_recv() {
            log_panic(&*payload);
        }
    }
}

impl<T> fmt::Debug for BlockingHandle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockingHandle")
            .field("finished", &self.is_finished())
            .finish_non_exhaustive()
    }
}
