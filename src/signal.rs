//! Waiting for signals, in fibers and threads.
//!
//! A handler notes the signal in every [`Signals`] object that asked for it and wakes it by its eventfd. The handler is there from
//! the first object that asks for a signal to the last: then the action that was there before is put back.
//!
//! Not signalfd(2): that needs the signal blocked in every thread of the process, which a library cannot see to.
//!
//! # What the handler may touch
//!
//! Only statics: a table of places, one for each live object, and the previous actions. An object that goes empties its place and
//! then waits until no handler is in it (`inside`), so no handler ever writes to a descriptor that was closed.
//!
//! # After fork
//!
//! The child has the objects of its parent and shares their eventfds. The place says whose it is (`epoch`): in a child the handler
//! only notes the signal, and the first wait puts an eventfd of the child's own under the number.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::fiber::ready::wait_readable;
use crate::sys;

pub use libc::{
    SIGALRM, SIGCHLD, SIGCONT, SIGHUP, SIGINT, SIGPIPE, SIGQUIT, SIGTERM, SIGTSTP, SIGUSR1,
    SIGUSR2, SIGWINCH,
};

/// How many [`Signals`] objects a process may have at a time.
const PLACES: usize = 64;

/// The highest signal number of Linux, on the architectures we know.
const SIGNAL_MAX: i32 = 64;

/// Raised by faulty instructions, which a handler that returns would only run again; and `overflow.rs` has the first two.
const FAULTS: [i32; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE];

/// What the handler knows of one object.
struct Place {
    /// The signals it asked for, one bit each; 0 while the place is empty.
    wanted: AtomicU64,
    /// Those that came and have not been taken.
    pending: AtomicU64,
    eventfd: AtomicI32,
    /// The process that has the eventfd.
    epoch: AtomicU32,
    /// How many handlers are looking at this.
    inside: AtomicU32,
}

static TABLE: [Place; PLACES] = [const {
    Place {
        wanted: AtomicU64::new(0),
        pending: AtomicU64::new(0),
        eventfd: AtomicI32::new(-1),
        epoch: AtomicU32::new(0),
        inside: AtomicU32::new(0),
    }
}; PLACES];

/// The handlers that were there before ours, which are called after it. `SIG_DFL` and `SIG_IGN` are not called.
static PREVIOUS: [AtomicUsize; SIGNAL_MAX as usize + 1] =
    [const { AtomicUsize::new(libc::SIG_DFL) }; SIGNAL_MAX as usize + 1];

/// The signals that some object asked for.
static INSTALLED: AtomicU64 = AtomicU64::new(0);

/// The signals that no object asks for any more, whose action was not ours then: somebody else's handler lies over ours, and may
/// call it.
static OVERLAID: AtomicU64 = AtomicU64::new(0);

/// Who has which place, and what to put back.
struct Registry {
    taken: [bool; PLACES],
    /// By signal: how many objects want it, and the action before ours.
    installed: [Option<(usize, libc::sigaction)>; SIGNAL_MAX as usize + 1],
}

fn registry() -> MutexGuard<'static, Registry> {
    static REGISTRY: Mutex<Registry> = Mutex::new(Registry {
        taken: [false; PLACES],
        installed: [None; SIGNAL_MAX as usize + 1],
    });
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// The signals of a mask, from 1 on.
fn numbers(mask: u64) -> impl Iterator<Item = i32> {
    (1..=SIGNAL_MAX).filter(move |signal| mask & bit(*signal) != 0)
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    thread_local! {
        /// The signals whose handler runs on this thread: another library's handler may call ours, and ours it.
        static HANDLING: Cell<u64> = const { Cell::new(0) };
    }
    let handling = HANDLING.get();
    if handling & bit(signal) != 0 {
        return;
    }
    HANDLING.set(handling | bit(signal));
    let errno = sys::errno();
    // A forked child has not asked for an epoch yet: it reads 0.
    let epoch = sys::fork_mark().load(Ordering::Relaxed);
    let mut taken = false;
    for place in &TABLE {
        place.inside.fetch_add(1, Ordering::SeqCst);
        if place.wanted.load(Ordering::SeqCst) & bit(signal) != 0 {
            taken = true;
            place.pending.fetch_or(bit(signal), Ordering::SeqCst);
            if place.epoch.load(Ordering::SeqCst) == epoch {
                sys::ring_eventfd(place.eventfd.load(Ordering::SeqCst));
            }
        }
        place.inside.fetch_sub(1, Ordering::SeqCst);
    }
    let previous = PREVIOUS[signal as usize].load(Ordering::SeqCst);
    if chains(signal) {
        // SAFETY: the address was in the process's sigaction, so it is a handler. The kernel passes these three arguments to
        // every handler, also to those that take the first only.
        let previous: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
            unsafe { std::mem::transmute(previous) };
        previous(signal, info, context);
    } else if !taken {
        give_back(signal);
    }
    // SAFETY: this thread's own errno, which the interrupted code may be about to read.
    unsafe { *libc::__errno_location() = errno };
    HANDLING.set(handling);
}

/// In the handler: nobody wants the signal, since the last object went while it was on its way, or somebody put our handler back
/// after that. It is sent again, to have its ordinary effect (or to reach an object that has come meanwhile).
fn give_back(signal: i32) {
    if OVERLAID.load(Ordering::SeqCst) & bit(signal) != 0 {
        // Whoever called us has dealt with it, and would call us again.
        return;
    }
    let ours = action(signal, None).is_ok_and(|now| now.sa_sigaction == our_action().sa_sigaction);
    if ours && INSTALLED.load(Ordering::SeqCst) & bit(signal) == 0 {
        // SAFETY: zeroed is a valid sigaction, for `SIG_DFL` or, stored below, `SIG_IGN`.
        let mut before = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
        before.sa_sigaction = PREVIOUS[signal as usize].load(Ordering::SeqCst);
        // It cannot fail: the signal has a handler.
        let _ = action(signal, Some(&before));
    }
    // SAFETY: no memory is passed; kill is async-signal-safe.
    unsafe { libc::kill(libc::getpid(), signal) };
}

/// Whether somebody else's handler is called for the signal as well.
fn chains(signal: i32) -> bool {
    let previous = PREVIOUS[signal as usize].load(Ordering::SeqCst);
    previous != libc::SIG_DFL && previous != libc::SIG_IGN
}

/// The action of a signal, or what it was before `new` replaced it.
fn action(signal: i32, new: Option<&libc::sigaction>) -> Result<libc::sigaction> {
    let mut old = MaybeUninit::<libc::sigaction>::zeroed();
    let new = new.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: `new` is null or a whole action; `old` has room for one, and zeroed is valid for it.
    unsafe {
        if libc::sigaction(signal, new, old.as_mut_ptr()) != 0 {
            return Err(Error::from_errno(sys::errno()));
        }
        Ok(old.assume_init())
    }
}

fn our_action() -> libc::sigaction {
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = handle;
    // SAFETY: zeroed is a valid sigaction; sigfillset fills its mask.
    let mut action = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
    action.sa_sigaction = handler as usize;
    // On the alternate stack where there is one: a fiber's may be nearly full.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK;
    // SAFETY: the mask is ours.
    unsafe { libc::sigfillset(&mut action.sa_mask) };
    action
}

impl Registry {
    /// Sees to it that the handler runs for `signal`.
    fn install(&mut self, signal: i32) -> Result<()> {
        let ours = our_action();
        let installed = &mut self.installed[signal as usize];
        match installed {
            Some((users, _)) if *users > 0 => *users += 1,
            _ => {
                let now = action(signal, None)?;
                let before = match *installed {
                    // Somebody who had replaced ours put it back later.
                    Some((_, before)) if now.sa_sigaction == ours.sa_sigaction => before,
                    _ => now,
                };
                PREVIOUS[signal as usize].store(before.sa_sigaction, Ordering::SeqCst);
                INSTALLED.fetch_or(bit(signal), Ordering::SeqCst);
                if let Err(error) = action(signal, Some(&ours)) {
                    INSTALLED.fetch_and(!bit(signal), Ordering::SeqCst);
                    return Err(error);
                }
                OVERLAID.fetch_and(!bit(signal), Ordering::SeqCst);
                *installed = Some((1, before));
            }
        }
        Ok(())
    }

    /// One object less wants `signal`; after the last the old action is back, unless somebody else has replaced ours.
    fn uninstall(&mut self, signal: i32) {
        let Some((users, before)) = &mut self.installed[signal as usize] else {
            return;
        };
        *users -= 1;
        if *users > 0 {
            return;
        }
        INSTALLED.fetch_and(!bit(signal), Ordering::SeqCst);
        let now = action(signal, None);
        if now.is_ok_and(|now| now.sa_sigaction == our_action().sa_sigaction) {
            // It is valid: it was in force before.
            let _ = action(signal, Some(before));
        } else {
            OVERLAID.fetch_or(bit(signal), Ordering::SeqCst);
        }
    }

    fn is_wanted(&self, signal: i32) -> bool {
        matches!(self.installed[signal as usize], Some((users, _)) if users > 0)
    }
}

/// Signals to wait for. From its making until it is dropped the signals go here instead of having their ordinary effect, so none that
/// comes between two waits is lost.
///
/// - Several objects may ask for the same signal: each gets it. Of several fibers or threads that wait on one object, one gets it.
/// - A signal that comes again before it was taken is one signal, as in the kernel.
/// - A handler that was installed before (not `SIG_DFL` or `SIG_IGN`) is called as well. After the last object for a signal, the
///   action from before is back. What came and was not taken is gone with the object.
/// - The signals must not be blocked in all threads (`pthread_sigmask`).
/// - A forked child has the object too, and gets the signals that are sent to it. exec(2) puts the default action back.
///
/// # Source
///
/// sigaction(2), signal(7); Python `signal.set_wakeup_fd`.
///
/// ```
/// use ringsock::signal::{SIGINT, SIGTERM, Signals};
///
/// let signals = Signals::new(&[SIGTERM, SIGINT])?;
/// ringsock::run(move || {
///     let server = ringsock::serve(("127.0.0.1", 0), |conn, _| conn.sendall(b"hello"))?;
///     # ringsock::spawn(|| std::process::Command::new("kill").arg(std::process::id().to_string()).status());
///     let signal = signals.wait()?;
///     assert_eq!(signal, SIGTERM);
///     server.stop();
///     Ok::<(), ringsock::Error>(())
/// })?;
/// # Ok::<(), ringsock::Error>(())
/// ```
pub struct Signals {
    index: usize,
    wanted: u64,
    eventfd: OwnedFd,
    made_in: u32,
    released: bool,
}

impl Signals {
    /// Asks for these signals from now on.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: no signals; a number that is no signal; `SIGKILL` and `SIGSTOP`, which nobody can catch; `SIGSEGV`, `SIGBUS`,
    ///   `SIGILL` and `SIGFPE`, which report faults of the very code that runs (the first two also a fiber's stack overflow).
    /// - `EMFILE`, `ENFILE`: no free descriptor (it takes one).
    /// - `EAGAIN`: there are 64 of these objects already.
    pub fn new(signals: &[i32]) -> Result<Signals> {
        let mut wanted = 0;
        for signal in signals {
            let number = (1..=SIGNAL_MAX).contains(signal);
            if !number || FAULTS.contains(signal) {
                return Err(invalid(format!("signal {signal} cannot be waited for")));
            }
            wanted |= bit(*signal);
        }
        if wanted == 0 {
            return Err(invalid("no signal to wait for".into()));
        }
        let eventfd = sys::eventfd()?;
        // The handler reads the mark: it is made here, not there.
        let epoch = sys::fork_epoch();
        let mut registry = registry();
        let Some(index) = registry.taken.iter().position(|taken| !taken) else {
            return Err(Error::Os {
                errno: libc::EAGAIN,
                message: Some(format!("{PLACES} Signals objects are all there can be").into()),
            });
        };
        let place = &TABLE[index];
        place.eventfd.store(eventfd.as_raw_fd(), Ordering::SeqCst);
        place.epoch.store(epoch, Ordering::SeqCst);
        place.pending.store(0, Ordering::SeqCst);
        place.wanted.store(wanted, Ordering::SeqCst);
        registry.taken[index] = true;
        let mut object = Signals {
            index,
            wanted: 0,
            eventfd,
            made_in: epoch,
            released: false,
        };
        for signal in numbers(wanted) {
            if let Err(error) = registry.install(signal) {
                // What was installed so far goes with the object.
                drop(registry);
                return Err(error);
            }
            object.wanted |= bit(signal);
        }
        Ok(object)
    }

    /// Waits for the next of the signals: its number. One that came before is returned at once; of several the lowest first.
    ///
    /// It works in a fiber, which is suspended, and on a plain thread, which blocks.
    ///
    /// # Errors
    ///
    /// Only where it has to wait:
    /// - `Cancelled`, `Shutdown`: the fiber was cancelled, or its runtime is ending.
    /// - `Timeout`: the deadline of an enclosing [`timeout`](crate::timeout) passed.
    /// - `EAGAIN`: in a destructor that runs because the fiber panics, where nothing waits.
    ///
    /// ```
    /// use ringsock::signal::{SIGUSR1, Signals};
    ///
    /// let signals = Signals::new(&[SIGUSR1])?;
    /// assert_eq!(
    ///     ringsock::timeout(0.01, || signals.wait()),
    ///     Err(ringsock::Error::Timeout)
    /// );
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn wait(&self) -> Result<i32> {
        self.own_eventfd()?;
        loop {
            if let Some(signal) = self.take() {
                return Ok(signal);
            }
            if let Err(error) = wait_readable(&self.eventfd) {
                return self.take().ok_or(error);
            }
            // Emptied before the next look at `pending`: what comes later rings again.
            let mut count = [0u8; 8];
            // SAFETY: eight bytes are written to the array at most; the descriptor is in non-blocking mode.
            unsafe { libc::read(self.eventfd.as_raw_fd(), count.as_mut_ptr().cast(), 8) };
        }
    }

    fn take(&self) -> Option<i32> {
        let pending = &TABLE[self.index].pending;
        loop {
            let now = pending.load(Ordering::SeqCst);
            let signal = numbers(now).next()?;
            if pending.fetch_and(!bit(signal), Ordering::SeqCst) & bit(signal) == 0 {
                continue;
            }
            if now != bit(signal) {
                // Another waiter may sleep, with the eventfd emptied by this one.
                sys::ring_eventfd(self.eventfd.as_raw_fd());
            }
            return Some(signal);
        }
    }

    /// In a forked child, before its first wait: an eventfd that the parent does not share.
    fn own_eventfd(&self) -> Result<()> {
        let place = &TABLE[self.index];
        let epoch = sys::fork_epoch();
        if place.epoch.load(Ordering::SeqCst) == epoch {
            return Ok(());
        }
        // Of several that wait for the first time, one does it: the others would take away what it waits for by then.
        static FIRST: Mutex<()> = Mutex::new(());
        let _first = sys::lock_after_fork(&FIRST);
        if place.epoch.load(Ordering::SeqCst) != epoch {
            let fresh = sys::eventfd()?;
            sys::check(sys::bury(self.eventfd.as_raw_fd(), fresh.as_raw_fd()))?;
            place.epoch.store(epoch, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Gives up the signals: those that had come, were not taken, and have had no effect elsewhere.
    fn release(&mut self) -> u64 {
        if std::mem::replace(&mut self.released, true) {
            return 0;
        }
        // Not all that the place says, if one of them could not be installed.
        let wanted = std::mem::take(&mut self.wanted);
        let place = &TABLE[self.index];
        let mut registry = registry();
        numbers(wanted).for_each(|signal| registry.uninstall(signal));
        place.wanted.store(0, Ordering::SeqCst);
        // A forked child may have been made while a handler of its parent was in there, which never leaves in the child.
        let mut patience = if self.made_in == sys::fork_epoch() {
            u32::MAX
        } else {
            10_000
        };
        while place.inside.load(Ordering::SeqCst) != 0 && patience > 0 {
            std::thread::yield_now();
            patience -= 1;
        }
        registry.taken[self.index] = false;
        let left = place.pending.swap(0, Ordering::SeqCst);
        numbers(left)
            .filter(|signal| !registry.is_wanted(*signal) && !chains(*signal))
            .fold(0, |mask, signal| mask | bit(signal))
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.release();
    }
}

impl fmt::Debug for Signals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let signals: Vec<i32> = numbers(self.wanted).collect();
        f.debug_struct("Signals")
            .field("signals", &signals)
            .finish_non_exhaustive()
    }
}

fn invalid(message: String) -> Error {
    Error::Os {
        errno: libc::EINVAL,
        message: Some(message.into()),
    }
}

/// Waits for one of these signals, once: its number.
///
/// Before and after the call the signals have their ordinary effect, so `SIGTERM` between two calls ends the process. Whoever waits
/// more than once makes a [`Signals`] object. Of several signals that come at the same time one is returned, and the others have their
/// ordinary effect when it returns.
///
/// # Errors
///
/// Those of [`Signals::new`] and [`Signals::wait`].
///
/// # Source
///
/// Python `signal.sigwait`.
///
/// ```
/// use ringsock::signal::{self, SIGINT, SIGTERM};
///
/// let result = ringsock::run(|| ringsock::timeout(0.01, || signal::wait(&[SIGTERM, SIGINT])));
/// assert_eq!(result, Err(ringsock::Error::Timeout));
/// ```
pub fn wait(signals: &[i32]) -> Result<i32> {
    let mut signals = Signals::new(signals)?;
    let result = signals.wait();
    let left = signals.release();
    for signal in numbers(left) {
        // SAFETY: no memory is passed.
        unsafe { libc::kill(libc::getpid(), signal) };
    }
    result
}
