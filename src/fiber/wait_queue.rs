//! Those who wait, first come first served. It knows nothing of what they wait for or how they are woken.
//!
//! Each has a ticket. Whoever finds its ticket gone has been served: the one who took it out gave it what it waited for. Whoever
//! stops waiting takes its own ticket out, under the same lock, and so knows for certain that nothing was given to it.

use std::collections::VecDeque;

/// See the module's documentation.
pub(crate) struct WaitQueue<W> {
    next: u64,
    /// In the order of the tickets.
    waiting: VecDeque<(Ticket, W)>,
}

impl<W> Default for WaitQueue<W> {
    fn default() -> WaitQueue<W> {
        WaitQueue::new()
    }
}

/// A place in a [`WaitQueue`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Ticket(u64);

impl<W> WaitQueue<W> {
    pub(crate) const fn new() -> WaitQueue<W> {
        WaitQueue {
            next: 0,
            waiting: VecDeque::new(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Puts one at the end.
    pub(crate) fn push(&mut self, waiter: W) -> Ticket {
        let ticket = Ticket(self.next);
        self.next += 1;
        self.waiting.push_back((ticket, waiter));
        ticket
    }

    /// Takes out the one that has waited longest.
    pub(crate) fn pop(&mut self) -> Option<(Ticket, W)> {
        self.waiting.pop_front()
    }

    /// Takes out the one with this ticket, if it still waits.
    pub(crate) fn remove(&mut self, ticket: Ticket) -> Option<W> {
        let index = self
            .waiting
            .binary_search_by_key(&ticket, |(ticket, _)| *ticket);
        let (_, waiter) = self.waiting.remove(index.ok()?)?;
        Some(waiter)
    }

    /// Takes out all that wait now.
    pub(crate) fn take(&mut self) -> impl Iterator<Item = W> + use<W> {
        let waiting = std::mem::take(&mut self.waiting);
        waiting.into_iter().map(|(_, waiter)| waiter)
    }

    /// All of them, where they are.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &W> {
        self.waiting.iter().map(|(_, waiter)| waiter)
    }
}
