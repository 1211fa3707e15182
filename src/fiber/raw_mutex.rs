//! Who holds a mutex and who waits for it, without the data and without the waiting itself.
//!
//! ```text
//!            lock                     a waiter queues
//!   FREE ───────────▶ LOCKED ────────────────────────▶ LOCKED | QUEUED ◀─┐ unlock hands the lock to the first of
//!    ▲                  │ ▲                                │  │  └────────┘ several waiters
//!    └──────────────────┘ └────────────────────────────────┘  │
//!        unlock                 unlock hands it to the last   │ unlock, all waiters having left
//!    ▲                          waiter, or that one left      │
//!    └────────────────────────────────────────────────────────┘
//! ```
//!
//! The lock is handed over: while somebody waits the word never becomes free, so nobody overtakes and nobody starves, and there
//! is no wake that an interrupted waiter could swallow: either it finds its ticket in the queue, then it has not got the lock, or it
//! does not, then it has. With `QUEUED` the word changes under the queue's lock only.
//!
//! `tests/loom.rs` runs this file against every interleaving.

use std::sync::PoisonError;

use super::atomics::{AtomicU8, Mutex, Ordering};
use super::wait_queue::{Ticket, WaitQueue};

pub(crate) const FREE: u8 = 0;
const LOCKED: u8 = 1;
const QUEUED: u8 = 2;

/// See the module's documentation. `W` is what wakes a waiter.
pub(crate) struct RawMutex<W> {
    word: AtomicU8,
    queue: Mutex<WaitQueue<W>>,
}

impl<W> RawMutex<W> {
    /// A mutex of its parts: a word that is `FREE`, an empty queue. (Loom's cannot be made by a `const fn`.)
    pub(crate) const fn new(word: AtomicU8, queue: Mutex<WaitQueue<W>>) -> RawMutex<W> {
        RawMutex { word, queue }
    }

    #[inline(always)]
    pub(crate) fn try_lock(&self) -> bool {
        self.word
            .compare_exchange(FREE, LOCKED, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    /// Takes the lock if it has become free (`None`), else a place in the queue.
    pub(crate) fn enqueue(&self, waiter: W) -> Option<Ticket> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if self.try_lock() {
                return None;
            }
            let mark = self.word.compare_exchange(
                LOCKED,
                LOCKED | QUEUED,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            if matches!(mark, Ok(_) | Err(QUEUED..)) {
                return Some(queue.push(waiter));
            }
        }
    }

    /// Ends a wait: true if the caller has the lock, false if it waits no longer and has not got it.
    pub(crate) fn settle(&self, ticket: Ticket) -> bool {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.remove(ticket).is_none() {
            return true;
        }
        if queue.is_empty() {
            self.word.store(LOCKED, Ordering::Relaxed);
        }
        false
    }

    /// Gives the lock back, if nobody waits for it; else [`hand_over`](RawMutex::hand_over) is due.
    #[inline(always)]
    pub(crate) fn unlock(&self) -> bool {
        self.word
            .compare_exchange(LOCKED, FREE, Ordering::Release, Ordering::Relaxed)
            .is_ok()
    }

    /// Gives the lock to the one that has waited longest, which the caller is to wake; or back, if all have left.
    pub(crate) fn hand_over(&self) -> Option<W> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let next = queue.pop();
        if queue.is_empty() {
            let word = if next.is_some() { LOCKED } else { FREE };
            self.word.store(word, Ordering::Release);
        }
        next.map(|(_, waiter)| waiter)
    }
}
