//! How other threads reach a worker, or a plain thread blocked in a call: a mailbox and a bell.
//!
//! No wake is lost: `wake.rs` has the protocol.
//!
//! # Bounds
//!
//! Spawns wait in a bounded channel; senders wait while it is full. All other messages are bounded by what exists: a fiber or
//! thread has at most one wake and one cancel on its way, and a closer waits for its close.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, TrySendError};

use super::park::{Parking, Waker};
use super::scheduler::Worker;
use super::wake::WakeFlags;
use crate::driver::{Bell, Key};
use crate::error::Error;
use crate::log::log;
use crate::sys;

/// What can be asked of a thread that runs a driver.
pub(crate) enum Control {
    /// Wake the fiber that parked under this key.
    Wake(Key),
    /// Cancel this operation; its waiter learns why from the object it worked on.
    CancelOperation(Key),
    /// Cancel this fiber, if it still is the one in the slot.
    CancelFiber { slot: u32, id: u64 },
    /// Run this on the worker's thread, outside any fiber. It must not block.
    Run(Box<dyn FnOnce(&Worker) + Send>),
    /// End: see `scheduler.rs`.
    Stop,
}

/// A fiber to be: makes it on its worker.
pub(crate) type Spawn = Box<dyn FnOnce(&Worker) + Send>;

/// The thread has ended, and its mailbox with it.
#[derive(Debug)]
pub(crate) struct Gone;

/// The address of a thread that runs a driver.
pub(crate) struct Remote {
    id: u32,
    controls: Sender<Control>,
    /// Workers only.
    spawns: Option<Sender<Spawn>>,
    /// Those waiting for room in `spawns`.
    waiting: Mutex<Vec<Waker>>,
    flags: WakeFlags,
    /// The owner reads no more mail.
    ended: AtomicBool,
    bell: Arc<Bell>,
    fork_epoch: u32,
}

/// The owner's end of a [`Remote`].
pub(crate) struct Mailbox {
    pub(crate) controls: Receiver<Control>,
    pub(crate) spawns: Receiver<Spawn>,
}

impl Remote {
    /// A mailbox and its address. `spawns_max` is how many spawns may wait (0 for a plain thread, which takes none).
    pub(crate) fn new(bell: Bell, spawns_max: usize) -> (Arc<Remote>, Mailbox) {
        static LAST_ID: AtomicU32 = AtomicU32::new(0);
        let (controls, controls_received) = crossbeam_channel::unbounded();
        let (spawns, spawns_received) = crossbeam_channel::bounded(spawns_max);
        let id = LAST_ID.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let remote = Remote {
            id,
            controls,
            spawns: (spawns_max > 0).then_some(spawns),
            waiting: Mutex::new(Vec::new()),
            flags: WakeFlags::new(),
            ended: AtomicBool::new(false),
            bell: Arc::new(bell),
            fork_epoch: sys::fork_epoch(),
        };
        let mailbox = Mailbox {
            controls: controls_received,
            spawns: spawns_received,
        };
        (Arc::new(remote), mailbox)
    }

    /// Unlike any other's in this process. Never 0 (unless 2^32 threads came and went).
    #[inline]
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Whether the thread is one of this process, rather than of the parent that forked it.
    pub(crate) fn is_ours(&self) -> bool {
        sys::fork_mark().load(Ordering::Relaxed) == self.fork_epoch
    }

    /// Puts a message into the mailbox and wakes its owner.
    pub(crate) fn send(&self, control: Control) -> Result<(), Gone> {
        if !self.is_ours() || self.ended.load(Ordering::SeqCst) {
            return Err(Gone);
        }
        self.controls.send(control).map_err(|_| Gone)?;
        self.wake();
        Ok(())
    }

    /// Asks for a fiber. While the channel is full, the calling fiber or thread waits.
    ///
    /// # Errors
    ///
    /// `Shutdown` when the worker has ended; `Cancelled` or `Shutdown` when the caller was interrupted while it waited.
    pub(crate) fn spawn(&self, spawn: Spawn) -> Result<(), Error> {
        let Some(spawns) = &self.spawns else {
            return Err(Error::Shutdown);
        };
        let mut spawn = spawn;
        loop {
            if !self.is_ours() || self.ended.load(Ordering::SeqCst) {
                return Err(Error::Shutdown);
            }
            spawn = match spawns.try_send(spawn) {
                Ok(()) => {
                    self.wake();
                    return Ok(());
                }
                Err(TrySendError::Disconnected(_)) => return Err(Error::Shutdown),
                Err(TrySendError::Full(spawn)) => spawn,
            };
            let parking = Parking::new();
            self.waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(parking.waker());
            // Room made between the try and the registration rang for nobody, and neither did the owner's end.
            if spawns.is_full() && !self.ended.load(Ordering::SeqCst) {
                parking.park()?;
            }
        }
    }

    /// The owner took spawns out: those who wait for room may try again.
    pub(crate) fn made_room(&self) {
        let waiting = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.is_empty() {
                return;
            }
            std::mem::take(&mut *waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Whether something was put into the mailbox since the last call. One flag for both channels: looking into them costs 60
    /// instructions each.
    #[inline]
    pub(crate) fn take_mail(&self) -> bool {
        self.flags.take_mail()
    }

    /// Whether [`take_mail`](Remote::take_mail) would say so.
    #[inline]
    pub(crate) fn has_mail(&self) -> bool {
        self.flags.has_mail()
    }

    /// The owner is about to wait on its ring: true if it may, false if there is mail.
    #[inline]
    pub(crate) fn fall_asleep(&self) -> bool {
        self.flags.fall_asleep()
    }

    /// The owner is awake again.
    #[inline]
    pub(crate) fn wake_up(&self) {
        self.flags.wake_up();
    }

    fn wake(&self) {
        if self.flags.announce() {
            super::ring_bell(&self.bell);
        }
    }

    /// The owner is going: nobody can wake it any more, and what was sent too late is dropped, which its senders notice.
    pub(crate) fn retire(&self, mailbox: &Mailbox) {
        self.ended.store(true, Ordering::SeqCst);
        self.bell.retire();
        // A sender that looked before `ended` was set may put one more message in; the channel drops that with its last sender,
        // and a spawn's own handle does not count on it (`join.rs` looks at `ended`, too).
        while mailbox.controls.try_recv().is_ok() {}
        while let Ok(spawn) = mailbox.spawns.try_recv() {
            // Whatever a closure that never ran does when it is dropped, the others are dropped too.
            if catch_unwind(AssertUnwindSafe(|| drop(spawn))).is_err() {
                log(format_args!("dropping a fiber's closure panicked"));
            }
        }
        self.made_room();
    }

    /// Whether the owner reads no more mail.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }
}
