//! Telling a thread that there is something for it, without losing a wake: the two protocols that everything else waits by.
//!
//! # A thread that runs a driver
//!
//! ```text
//!  sender                              owner
//!  1. put the message, swap mail true  a. asleep = true
//!  2. fence                            b. fence
//!  3. asleep? then asleep = false      c. no mail? then wait on the ring, else asleep = false, mail = false, and read
//!     and ring the bell
//! ```
//!
//! The fences order 1 before 3 and a before c for both sides, so either the sender sees `asleep` or the owner sees the
//! message. Of several senders one takes `asleep` down and rings.
//!
//! # A plain thread
//!
//! It has one wait at a time, with a flag of its own: set, then unpark; and looked at again after each return of park.
//!
//! `tests/loom.rs` runs this file against every interleaving and every value the memory model allows.

use super::atomics::{AtomicBool, Ordering, fence};

/// The flags between the owner of a mailbox and its senders.
pub(crate) struct WakeFlags {
    /// There is something in the mailbox, or was.
    mail: AtomicBool,
    asleep: AtomicBool,
}

impl WakeFlags {
    pub(crate) fn new() -> WakeFlags {
        WakeFlags {
            mail: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
        }
    }

    /// A sender has put a message into the mailbox: true if it has to ring the bell.
    #[inline]
    pub(crate) fn announce(&self) -> bool {
        // A swap, not a store: the owner that takes the mail of a later sender has to see the message of this one as well, and only
        // a read-modify-write lets its release reach through the later one's. (The model finds the difference.)
        self.mail.swap(true, Ordering::Release);
        fence(Ordering::SeqCst);
        self.asleep.load(Ordering::Relaxed)
            && self
                .asleep
                .compare_exchange(true, false, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// Whether something was put into the mailbox since the last call.
    #[inline]
    pub(crate) fn take_mail(&self) -> bool {
        self.has_mail() && self.mail.swap(false, Ordering::Acquire)
    }

    /// Whether [`take_mail`](WakeFlags::take_mail) would say so.
    #[inline]
    pub(crate) fn has_mail(&self) -> bool {
        self.mail.load(Ordering::Relaxed)
    }

    /// The owner is about to wait on its ring: true if it may, false if there is mail.
    #[inline]
    pub(crate) fn fall_asleep(&self) -> bool {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !self.has_mail() {
            return true;
        }
        self.wake_up();
        false
    }

    /// The owner is awake again.
    #[inline]
    pub(crate) fn wake_up(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }
}

/// One wait of a plain thread.
pub(crate) struct Woken(AtomicBool);

impl Woken {
    pub(crate) fn new() -> Woken {
        Woken(AtomicBool::new(false))
    }

    /// Ends the wait, with `unpark` for a thread that is in it.
    pub(crate) fn wake(&self, unpark: impl FnOnce()) {
        self.0.store(true, Ordering::Release);
        unpark();
    }

    /// Waits for the wake: calls `park`, which may return for no reason, until it has come. False if `park` gave up.
    pub(crate) fn wait(&self, mut park: impl FnMut() -> bool) -> bool {
        while !self.0.load(Ordering::Acquire) {
            if !park() {
                return false;
            }
        }
        true
    }
}
