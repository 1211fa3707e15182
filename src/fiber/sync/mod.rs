//! Mutex, condition variable and channel, between fibers of one worker, of several, and plain threads.
//!
//! All three keep those who wait in a [`WaitQueue`](super::wait_queue) under a lock of their own, held for a few instructions and
//! never across a wait, and serve them in order. What is due to a waiter (the lock, a notification, a value, room) is given to it
//! while it is taken out of the queue, under that lock. So a waiter that was interrupted at that moment finds either its place,
//! and leaves, or what it waited for, and then keeps it or passes it on: nothing is lost in between.

pub(crate) mod channel;
pub(crate) mod condvar;
pub(crate) mod mutex;
