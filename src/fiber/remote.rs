//! How other threads reach a worker, or a plain thread blocked in a call: a mailbox and a bell.
//!
//! # No wake is lost
//!
//! ```text
//!  sender                              owner
//!  1. put the message                  a. asleep = true
//!  2. fence                            b. fence
//!  3. asleep? then asleep = false      c. mailbox empty? then wait on the ring, else asleep = false and read it
//!     and ring the bell
//! ```
//!
//! The fences order 1 before 3 and a before c for both sides, so either the sender sees `asleep` or the owner sees the
//! message. Of several senders one takes `asleep` down and rings.
//!
//! # Bounds
//!
//! Spawns wait in a bounded channel; senders wait while it is full. All other messages are bounded by what exists: a fiber or
//! thread has at most one wake and one cancel on its way, and a closer waits for its close.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, TrySendError};

use super::park::{Parking, Waker};
use super::scheduler::Worker;
use crate::driver::{Bell, Key};
use crate::error::Error;

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
    asleep: AtomicBool,
    bell: Arc<Bell>,
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
            asleep: AtomicBool::new(false),
            bell: Arc::new(bell),
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

    /// Puts a message into the mailbox and wakes its owner.
    pub(crate) fn send(&self, control: Control) -> Result<(), Gone> {
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
            // Room made between the try and the registration rang for nobody.
            if spawns.is_full() {
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

    /// The owner is about to wait on its ring: true if it may, false if there is mail. Spawns count only where they can be
    /// taken.
    pub(crate) fn fall_asleep(&self, mailbox: &Mailbox, takes_spawns: bool) -> bool {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if mailbox.controls.is_empty() && (!takes_spawns || mailbox.spawns.is_empty()) {
            return true;
        }
        self.wake_up();
        false
    }

    /// The owner is awake again.
    pub(crate) fn wake_up(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }

    fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
            super::ring_bell(&self.bell);
        }
    }

    /// The owner is going: nobody can wake it any more.
    pub(crate) fn retire(&self) {
        self.bell.retire();
        self.made_room();
    }
}
