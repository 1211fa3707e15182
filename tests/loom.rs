//! The protocols that every wait in this crate rests on, against each interleaving of their steps (loom).
//!
//! The files are the crate's own, included as they are; `atomics` puts loom's types under them. A wake that is lost shows as a
//! deadlock, a lock that two have as a causality violation. Two preemptions per execution at most, beside those that a wait makes.

#![allow(
    unsafe_code,
    clippy::undocumented_unsafe_blocks,
    reason = "whether they are sound is what the model checks"
)]

mod atomics {
    pub(crate) use loom::sync::Mutex;
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU8, Ordering, fence};
}
#[allow(dead_code)]
#[path = "../src/fiber/raw_mutex.rs"]
mod raw_mutex;
#[allow(dead_code)]
#[path = "../src/fiber/wait_queue.rs"]
mod wait_queue;
#[allow(dead_code)]
#[path = "../src/fiber/wake.rs"]
mod wake;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread::{self, Thread};

use raw_mutex::{FREE, RawMutex};
use wait_queue::WaitQueue;
use wake::{WakeFlags, Woken};

fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(model);
}

/// A ring that waits and a bell that ends the wait: a ring keeps the message until it is read.
struct Bell {
    rung: Mutex<bool>,
    ringing: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.ringing.notify_one();
    }

    fn wait(&self) {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.ringing.wait(rung).unwrap();
        }
        *rung = false;
    }
}

/// The owner takes turns as a worker does, with an empty ready queue, until it has read one message of each sender.
fn mail_arrives(senders: usize) {
    check(move || {
        let flags = Arc::new(WakeFlags::new());
        let bell = Arc::new(Bell {
            rung: Mutex::new(false),
            ringing: Condvar::new(),
        });
        let messages: Arc<Vec<AtomicUsize>> =
            Arc::new((0..senders).map(|_| AtomicUsize::new(0)).collect());
        let threads: Vec<_> = (0..senders)
            .map(|sender| {
                let (flags, bell, messages) = (flags.clone(), bell.clone(), messages.clone());
                thread::spawn(move || {
                    // Relaxed: the protocol alone makes it visible.
                    messages[sender].store(1, Ordering::Relaxed);
                    if flags.announce() {
                        bell.ring();
                    }
                })
            })
            .collect();
        let mut read = vec![false; senders];
        loop {
            if flags.take_mail() {
                for (read, message) in read.iter_mut().zip(messages.iter()) {
                    *read |= message.load(Ordering::Relaxed) == 1;
                }
            }
            if read.iter().all(|read| *read) {
                break;
            }
            if flags.fall_asleep() {
                bell.wait();
                flags.wake_up();
            }
        }
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

#[test]
fn a_message_wakes_the_sleeping_owner() {
    mail_arrives(1);
}

#[test]
fn messages_of_two_senders_both_wake_the_owner() {
    mail_arrives(2);
}

/// A plain thread waits by `park` for one that calls `unpark` with its handle.
fn a_wake_arrives(park: fn(), unpark: fn(Thread)) {
    check(move || {
        let woken = Arc::new(Woken::new());
        let data = Arc::new(UnsafeCell::new(0));
        let (theirs, their_data, waiter) = (woken.clone(), data.clone(), thread::current());
        let waker = thread::spawn(move || {
            their_data.with_mut(|data| unsafe { *data = 7 });
            theirs.wake(|| unpark(waiter));
        });
        assert!(woken.wait(|| {
            park();
            true
        }));
        data.with(|data| assert_eq!(unsafe { *data }, 7));
        waker.join().unwrap();
    });
}

#[test]
fn a_plain_thread_sees_its_wake() {
    a_wake_arrives(thread::park, |waiter| waiter.unpark());
}

/// Parks that return for no reason, as they may: the flag alone has to carry what came before it.
#[test]
fn a_plain_thread_sees_what_came_before_its_wake() {
    a_wake_arrives(thread::yield_now, drop);
}

/// A mutex over a counter, with plain threads as waiters, as `sync/mutex.rs` has them.
struct Counter {
    raw: RawMutex<(Thread, Arc<Woken>)>,
    count: UnsafeCell<usize>,
}

// What the model is to find out.
unsafe impl Send for Counter {}
unsafe impl Sync for Counter {}

impl Counter {
    fn new() -> Arc<Counter> {
        Arc::new(Counter {
            raw: RawMutex::new(AtomicU8::new(FREE), Mutex::new(WaitQueue::new())),
            count: UnsafeCell::new(0),
        })
    }

    /// False if the waiter was interrupted, before it began to wait, and did not get the lock.
    fn lock(&self, interrupted: bool) -> bool {
        if self.raw.try_lock() {
            return true;
        }
        let woken = Arc::new(Woken::new());
        let Some(ticket) = self.raw.enqueue((thread::current(), woken.clone())) else {
            return true;
        };
        woken.wait(|| {
            if !interrupted {
                thread::park();
            }
            !interrupted
        });
        self.raw.settle(ticket)
    }

    fn add(&self) {
        self.count.with_mut(|count| unsafe { *count += 1 });
    }

    fn unlock(&self) {
        if !self.raw.unlock()
            && let Some((thread, woken)) = self.raw.hand_over()
        {
            woken.wake(|| thread.unpark());
        }
    }
}

#[test]
fn a_mutex_has_one_holder_and_forgets_no_waiter() {
    check(|| {
        let counter = Counter::new();
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let counter = counter.clone();
                thread::spawn(move || {
                    assert!(counter.lock(false));
                    counter.add();
                    counter.unlock();
                })
            })
            .collect();
        assert!(counter.lock(false));
        counter.add();
        counter.unlock();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(counter.raw.try_lock(), "it is free in the end");
        counter.count.with(|count| assert_eq!(unsafe { *count }, 3));
    });
}

#[test]
fn a_lock_given_to_an_interrupted_waiter_is_not_lost() {
    check(|| {
        let counter = Counter::new();
        let (theirs, others) = (counter.clone(), counter.clone());
        let interrupted = thread::spawn(move || {
            let locked = theirs.lock(true);
            if locked {
                theirs.add();
                theirs.unlock();
            }
            usize::from(locked)
        });
        let waiter = thread::spawn(move || {
            assert!(others.lock(false));
            others.add();
            others.unlock();
        });
        assert!(counter.lock(false));
        counter.add();
        counter.unlock();
        waiter.join().unwrap();
        let locked = interrupted.join().unwrap();
        assert!(counter.raw.try_lock(), "it is free in the end");
        counter
            .count
            .with(|count| assert_eq!(unsafe { *count }, 2 + locked));
    });
}
