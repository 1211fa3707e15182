//! Mutex, Condvar and channel between fibers of one worker, of several, and plain threads: nobody is forgotten, nothing is lost,
//! and an interrupted waiter leaves no trace.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::{
    Condvar, Error, JoinHandle, Mutex, Receiver, RecvError, Result, Runtime, SendError, Sender,
    TryRecvError, TrySendError, channel, run, sleep, spawn, timeout, yield_now,
};

/// Far above what anything here takes: a test that gets there hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs `body` on a thread of its own, and fails if it hangs.
fn bounded<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, ended) = mpsc::channel();
    let test = thread::spawn(move || {
        let _done = done;
        body()
    });
    let hangs = ended.recv_timeout(LIMIT) == Err::<(), _>(mpsc::RecvTimeoutError::Timeout);
    assert!(!hangs, "the test hangs");
    test.join()
        .unwrap_or_else(|payload| std::panic::resume_unwind(payload))
}

/// Where a piece of work runs.
#[derive(Clone, Copy, Debug)]
enum Place {
    Worker(usize),
    Thread,
}

/// One worker; two; threads; and everybody together.
const PLACES: [&[Place]; 4] = [
    &[Place::Worker(0)],
    &[Place::Worker(0), Place::Worker(1)],
    &[Place::Thread],
    &[Place::Worker(0), Place::Thread, Place::Worker(1)],
];

enum Work<T> {
    Fiber(JoinHandle<T>),
    Thread(thread::JoinHandle<T>),
}

impl<T: Send + 'static> Work<T> {
    fn start(
        runtime: &Runtime,
        place: Place,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Work<T> {
        match place {
            Place::Worker(worker) => Work::Fiber(runtime.handle().spawn_on(worker, work).unwrap()),
            Place::Thread => Work::Thread(thread::spawn(work)),
        }
    }

    fn join(self) -> T {
        match self {
            Work::Fiber(fiber) => fiber.join().unwrap(),
            Work::Thread(thread) => thread.join().unwrap(),
        }
    }
}

fn two_workers() -> Runtime {
    Runtime::builder().workers(2).build().unwrap()
}

/// Waits, as the fiber or thread one is, until `condition` holds.
fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "{what}");
        yield_now();
    }
}

// Mutex.

#[test]
fn a_mutex_excludes_fibers_of_all_workers_and_threads() {
    const ROUNDS: usize = 4000;
    bounded(|| {
        for places in PLACES {
            let runtime = two_workers();
            let shared = Arc::new((Mutex::new(0usize), AtomicBool::new(false)));
            let work: Vec<_> = (0..6)
                .map(|index| {
                    let shared = shared.clone();
                    Work::start(&runtime, places[index % places.len()], move || {
                        for round in 0..ROUNDS {
                            let mut count = shared.0.lock().unwrap();
                            assert!(!shared.1.swap(true, Ordering::Relaxed), "two have it");
                            *count += 1;
                            if round % 7 == index {
                                yield_now();
                            }
                            shared.1.store(false, Ordering::Relaxed);
                        }
                    })
                })
                .collect();
            work.into_iter().for_each(Work::join);
            assert_eq!(
                *shared.0.try_lock().expect("free"),
                6 * ROUNDS,
                "{places:?}"
            );
        }
    });
}

#[test]
fn a_mutex_is_given_in_the_order_of_asking() {
    bounded(|| {
        run(|| {
            let order = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
            let mutex = Arc::new(Mutex::new(()));
            let held = mutex.lock().unwrap();
            let fibers: Vec<_> = (0..20)
                .map(|index| {
                    let (mutex, order) = (mutex.clone(), order.clone());
                    spawn(move || {
                        let _guard = mutex.lock().unwrap();
                        order.borrow_mut().push(index);
                        yield_now();
                    })
                })
                .collect();
            yield_now();
            drop(held);
            assert!(
                mutex.try_lock().is_none(),
                "nobody overtakes those who wait"
            );
            fibers.into_iter().for_each(|fiber| fiber.join().unwrap());
            assert_eq!(*order.borrow(), (0..20).collect::<Vec<_>>());
        });
    });
}

#[test]
fn a_waiting_fiber_leaves_its_worker_to_others() {
    bounded(|| {
        run(|| {
            let mutex = Arc::new(Mutex::new(1));
            let held = mutex.lock().unwrap();
            let theirs = mutex.clone();
            let waiter = spawn(move || *theirs.lock().unwrap());
            sleep(0.01).unwrap();
            assert!(!waiter.is_finished());
            drop(held);
            assert_eq!(waiter.join().unwrap(), 1);
        });
    });
}

#[test]
fn a_deadline_ends_the_wait_for_a_mutex_and_leaves_the_queue_intact() {
    bounded(|| {
        let attempt = || {
            let mutex = Arc::new(Mutex::new(()));
            let held = mutex.lock().unwrap();
            for _ in 0..3 {
                let result = timeout(0.01, || mutex.lock().map(drop));
                assert_eq!(result, Err(Error::Timeout));
            }
            drop(held);
            // A free lock is taken even when the time is over.
            timeout(0, || mutex.lock().map(drop)).unwrap();
        };
        attempt();
        run(attempt);
    });
}

#[test]
fn a_cancelled_waiter_of_a_mutex_is_passed_over() {
    bounded(|| {
        run(|| {
            let mutex = Arc::new(Mutex::new(0));
            let held = mutex.lock().unwrap();
            let lock = |mutex: &Arc<Mutex<i32>>| {
                let mutex = mutex.clone();
                spawn(move || -> Result<()> {
                    *mutex.lock()? += 1;
                    Ok(())
                })
            };
            let (first, second, third) = (lock(&mutex), lock(&mutex), lock(&mutex));
            yield_now();
            second.cancel();
            assert_eq!(second.join().unwrap(), Err(Error::Cancelled));
            drop(held);
            first.join().unwrap().unwrap();
            third.join().unwrap().unwrap();
            assert_eq!(*mutex.lock().unwrap(), 2);
        });
    });
}

/// Given and interrupted in the same turn: the waiter has the lock and must not leave it locked.
#[test]
fn a_lock_given_to_a_fiber_that_is_being_cancelled_is_not_lost() {
    bounded(|| {
        run(|| {
            let mutex = Arc::new(Mutex::new(()));
            for cancel_first in [true, false] {
                let held = mutex.lock().unwrap();
                let theirs = mutex.clone();
                let fiber = spawn(move || theirs.lock().map(drop));
                yield_now();
                if cancel_first {
                    fiber.cancel();
                    drop(held);
                } else {
                    drop(held);
                    fiber.cancel();
                }
                assert_eq!(fiber.join().unwrap(), Ok(()), "it has got it");
                assert!(mutex.try_lock().is_some());
            }
        });
    });
}

#[test]
fn locks_given_while_waiters_give_up_are_never_lost() {
    bounded(|| {
        for places in PLACES {
            let runtime = two_workers();
            let mutex = Arc::new(Mutex::new(0usize));
            let work: Vec<_> = (0..6)
                .map(|index| {
                    let mutex = mutex.clone();
                    Work::start(&runtime, places[index % places.len()], move || {
                        let mut got = 0;
                        for round in 0..400 {
                            let patience = Duration::from_micros((round * 7 + index as u64) % 60);
                            let locked = timeout(patience, || {
                                let mut count = mutex.lock()?;
                                *count += 1;
                                got += 1;
                                if round % 5 == 0 {
                                    yield_now();
                                }
                                Ok(())
                            });
                            assert!(matches!(locked, Ok(()) | Err(Error::Timeout)));
                        }
                        got
                    })
                })
                .collect();
            let got: usize = work.into_iter().map(Work::join).sum();
            assert_eq!(*mutex.try_lock().expect("free"), got, "{places:?}");
        }
    });
}

#[test]
fn a_panic_unlocks_and_waits_for_no_lock() {
    struct LockInDrop(Arc<Mutex<i32>>, Arc<Mutex<Option<Result<()>>>>);
    impl Drop for LockInDrop {
        fn drop(&mut self) {
            *self.1.lock().unwrap() = Some(self.0.lock().map(drop));
        }
    }
    bounded(|| {
        run(|| {
            let (mutex, seen) = (Arc::new(Mutex::new(0)), Arc::new(Mutex::new(None)));
            let (theirs, held) = (mutex.clone(), mutex.lock().unwrap());
            let in_drop = LockInDrop(mutex.clone(), seen.clone());
            let fiber = spawn(move || {
                let _in_drop = in_drop;
                panic!("while somebody else has it");
            });
            assert!(fiber.join().is_err());
            let result = seen.lock().unwrap().take();
            assert_eq!(result, Some(Err(Error::from_errno(libc::EAGAIN))));
            drop(held);
            let fiber = spawn(move || {
                let mut guard = theirs.lock().unwrap();
                *guard = 5;
                panic!("with the lock");
            });
            assert!(fiber.join().is_err());
            assert_eq!(*mutex.lock().unwrap(), 5, "no poison");
        });
    });
}

#[test]
fn a_shutdown_ends_every_wait_and_its_unwinding_leaves_the_queues() {
    bounded(|| {
        let mutex = Arc::new(Mutex::new(()));
        let condvar = Arc::new((Mutex::new(()), Condvar::new()));
        let (sender, receiver) = channel::<i32>(0);
        let (full, kept) = channel(1);
        full.send(0).unwrap();
        // Not the crate's own: a lock that has to wait fails during the shutdown, too.
        let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
        let held = mutex.lock().unwrap();
        let runtime = two_workers();
        let note = |name: &'static str, wait: Box<dyn Fn() -> Result<()> + Send>| {
            let seen = seen.clone();
            runtime.handle().spawn(move || {
                let result = wait();
                seen.lock().unwrap().push((name, result));
                // It goes on as if nothing had happened, until it is unwound in the middle of a wait.
                loop {
                    let _ = wait();
                }
            })
        };
        let theirs = mutex.clone();
        note("lock", Box::new(move || theirs.lock().map(drop))).unwrap();
        let theirs = condvar.clone();
        note(
            "condvar",
            Box::new(move || theirs.1.wait(theirs.0.lock()?).map(drop)),
        )
        .unwrap();
        note("recv", Box::new(move || Ok(receiver.recv().map(drop)?))).unwrap();
        note("send", Box::new(move || Ok(full.send(1)?))).unwrap();
        sleep(0.02).unwrap();
        drop(runtime);
        let mut seen = std::mem::take(&mut *seen.lock().unwrap());
        seen.sort_by_key(|(name, _)| *name);
        let shutdown = || Err(Error::Shutdown);
        assert_eq!(
            seen,
            [
                ("condvar", shutdown()),
                ("lock", shutdown()),
                ("recv", shutdown()),
                ("send", shutdown())
            ]
        );
        drop(held);
        assert!(mutex.try_lock().is_some(), "given to nobody who is gone");
        condvar.1.notify_one();
        assert!(matches!(sender.send(1), Err(SendError::Disconnected(1))));
        assert_eq!(kept.recv(), Ok(0));
        assert_eq!(kept.recv(), Err(RecvError::Disconnected));
    });
}

// Condvar.

#[test]
fn a_condvar_hands_turns_around_between_all_kinds_of_waiters() {
    const ROUNDS: usize = 3000;
    bounded(|| {
        for places in PLACES {
            let runtime = two_workers();
            let players = 3;
            let table = Arc::new((Mutex::new(0usize), Condvar::new()));
            let work: Vec<_> = (0..players)
                .map(|index| {
                    let table = table.clone();
                    Work::start(&runtime, places[index % places.len()], move || {
                        for _ in 0..ROUNDS {
                            let guard = table.0.lock().unwrap();
                            let not_mine = |turn: &mut usize| *turn % players != index;
                            let mut turn = table.1.wait_while(guard, not_mine).unwrap();
                            *turn += 1;
                            table.1.notify_all();
                        }
                    })
                })
                .collect();
            work.into_iter().for_each(Work::join);
            assert_eq!(*table.0.lock().unwrap(), players * ROUNDS);
        }
    });
}

#[test]
fn notify_one_wakes_one_and_notify_all_wakes_all() {
    bounded(|| {
        run(|| {
            let shared = Arc::new((Mutex::new(0), Condvar::new()));
            let fibers: Vec<_> = (0..5)
                .map(|_| {
                    let shared = shared.clone();
                    spawn(move || {
                        let mut woken = shared.1.wait(shared.0.lock().unwrap()).unwrap();
                        *woken += 1;
                    })
                })
                .collect();
            let woken = || *shared.0.lock().unwrap();
            shared.1.notify_one();
            for _ in 0..10 {
                yield_now();
            }
            // The notification came before anybody waited.
            assert_eq!(woken(), 0);
            shared.1.notify_one();
            until("one is woken", || woken() == 1);
            for _ in 0..10 {
                yield_now();
            }
            assert_eq!(woken(), 1);
            shared.1.notify_all();
            fibers.into_iter().for_each(|fiber| fiber.join().unwrap());
            assert_eq!(woken(), 5);
        });
    });
}

#[test]
fn a_condvar_timeout_has_the_lock_and_a_deadline_does_not() {
    bounded(|| {
        let attempt = || {
            let (mutex, condvar) = (Mutex::new(()), Condvar::new());
            let (guard, timed_out) = condvar.wait_timeout(mutex.lock().unwrap(), 0.01).unwrap();
            assert!(timed_out && mutex.try_lock().is_none());
            drop(guard);
            let result = timeout(0.01, || {
                condvar.wait_timeout(mutex.lock()?, 100.0).map(|_| ())
            });
            assert_eq!(result, Err(Error::Timeout));
            assert!(
                mutex.try_lock().is_some(),
                "the lock is gone with the error"
            );
            let result = condvar.wait_timeout(mutex.lock().unwrap(), -1.0);
            assert!(matches!(result, Err(Error::Value(_))));
        };
        attempt();
        run(attempt);
    });
}

/// The notified waiter is cancelled before it has run: the notification goes on to the other one.
#[test]
fn a_notification_that_reached_a_cancelled_waiter_goes_to_the_next() {
    bounded(|| {
        run(|| {
            let shared = Arc::new((Mutex::new(0), Condvar::new()));
            let wait = || {
                let shared = shared.clone();
                spawn(move || -> Result<()> {
                    *shared.1.wait(shared.0.lock()?)? += 1;
                    Ok(())
                })
            };
            let (first, second) = (wait(), wait());
            yield_now();
            let held = shared.0.lock().unwrap();
            shared.1.notify_one();
            first.cancel();
            yield_now();
            // Notified and cancelled, the first cannot wait for the lock.
            assert_eq!(first.join().unwrap(), Err(Error::Cancelled));
            drop(held);
            second.join().unwrap().unwrap();
            assert_eq!(*shared.0.lock().unwrap(), 1);
        });
    });
}

// Channel.

#[test]
fn every_value_arrives_once_and_in_order() {
    const VALUES: usize = 20_000;
    bounded(|| {
        for places in PLACES {
            for capacity in [0, 1, 16] {
                let runtime = two_workers();
                let (sender, receiver) = channel::<(usize, usize)>(capacity);
                let senders: Vec<_> = (0..3)
                    .map(|index| {
                        let sender = sender.clone();
                        Work::start(&runtime, places[index % places.len()], move || {
                            (0..VALUES / 3).for_each(|n| sender.send((index, n)).unwrap());
                        })
                    })
                    .collect();
                let receivers: Vec<_> = (0..2)
                    .map(|index| {
                        let receiver = receiver.clone();
                        Work::start(&runtime, places[(index + 1) % places.len()], move || {
                            receiver.iter().collect::<Vec<_>>()
                        })
                    })
                    .collect();
                drop((sender, receiver));
                senders.into_iter().for_each(Work::join);
                let mut seen = HashSet::new();
                for receiver in receivers {
                    let values = receiver.join();
                    for index in 0..3 {
                        let from_one: Vec<_> =
                            values.iter().filter(|(from, _)| *from == index).collect();
                        assert!(from_one.is_sorted(), "each sender's values stay in order");
                    }
                    seen.extend(values);
                }
                assert_eq!(seen.len(), VALUES / 3 * 3, "{places:?} {capacity}");
            }
        }
    });
}

#[test]
fn a_full_channel_makes_its_senders_wait_and_an_empty_one_its_receivers() {
    bounded(|| {
        run(|| {
            let (sender, receiver) = channel(2);
            sender.try_send(1).unwrap();
            sender.try_send(2).unwrap();
            assert_eq!(sender.try_send(3), Err(TrySendError::Full(3)));
            let blocked = spawn(move || sender.send(3));
            yield_now();
            assert!(!blocked.is_finished());
            assert_eq!(receiver.recv(), Ok(1));
            blocked.join().unwrap().unwrap();
            assert_eq!((receiver.recv(), receiver.recv()), (Ok(2), Ok(3)));
            assert_eq!(receiver.try_recv(), Err(TryRecvError::Disconnected));
            let (sender, receiver) = channel(2);
            assert_eq!(receiver.try_recv(), Err(TryRecvError::Empty));
            let waiting = spawn(move || receiver.recv());
            yield_now();
            assert!(!waiting.is_finished());
            sender.send(7).unwrap();
            assert_eq!(waiting.join().unwrap(), Ok(7));
        });
    });
}

#[test]
fn a_rendezvous_needs_both_sides() {
    bounded(|| {
        run(|| {
            let (sender, receiver) = channel(0);
            assert_eq!(sender.try_send(1), Err(TrySendError::Full(1)));
            assert_eq!(receiver.try_recv(), Err(TryRecvError::Empty));
            let theirs = sender.clone();
            let sending = spawn(move || theirs.send(2));
            yield_now();
            assert!(!sending.is_finished());
            assert_eq!(receiver.try_recv(), Ok(2));
            sending.join().unwrap().unwrap();
            let receiving = spawn(move || receiver.recv());
            yield_now();
            sender.try_send(3).unwrap();
            assert_eq!(receiving.join().unwrap(), Ok(3));
        });
    });
}

#[test]
fn disconnecting_wakes_both_sides() {
    bounded(|| {
        run(|| {
            let (sender, receiver) = channel::<i32>(0);
            let receivers: Vec<_> = (0..3)
                .map(|_| {
                    let receiver = receiver.clone();
                    spawn(move || receiver.recv())
                })
                .collect();
            yield_now();
            drop(sender);
            for receiver in receivers {
                assert_eq!(receiver.join().unwrap(), Err(RecvError::Disconnected));
            }
            let (sender, receiver) = channel(0);
            let senders: Vec<_> = (0..3)
                .map(|n| {
                    let sender = sender.clone();
                    spawn(move || sender.send(n))
                })
                .collect();
            yield_now();
            drop(receiver);
            for (n, sending) in senders.into_iter().enumerate() {
                assert_eq!(sending.join().unwrap(), Err(SendError::Disconnected(n)));
            }
            assert_eq!(sender.try_send(9), Err(TrySendError::Disconnected(9)));
        });
    });
}

/// Counts how often it was dropped.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn every_value_of_a_channel_is_dropped_once() {
    bounded(|| {
        run(|| {
            let dropped = Arc::new(AtomicUsize::new(0));
            let count = || dropped.load(Ordering::SeqCst);
            let value = || Counted(dropped.clone());
            let (sender, receiver) = channel(3);
            for _ in 0..3 {
                sender.send(value()).unwrap();
            }
            // Left in the buffer, and in the hands of one that waits for room.
            let theirs = (sender.clone(), value());
            let blocked = spawn(move || theirs.0.send(theirs.1).is_err());
            yield_now();
            drop(receiver.recv());
            assert_eq!(count(), 1);
            assert!(!blocked.join().unwrap());
            let theirs = (sender.clone(), value());
            let blocked = spawn(move || theirs.0.send(theirs.1).is_err());
            yield_now();
            drop(receiver);
            assert_eq!(count(), 4, "what nobody can receive any more");
            assert!(blocked.join().unwrap());
            assert_eq!(count(), 5);
            // Senders gone first.
            let (sender, receiver) = channel(3);
            sender.send(value()).unwrap();
            drop(sender);
            assert_eq!(count(), 5);
            drop(receiver);
            assert_eq!(count(), 6);
        });
    });
}

#[test]
fn an_interrupted_send_gives_its_value_back_and_an_interrupted_recv_takes_none() {
    bounded(|| {
        let deadlines = || {
            let (sender, receiver) = channel(1);
            sender.send(1).unwrap();
            let mut result = Ok(());
            let _ = timeout(0.01, || {
                result = sender.send(2);
                Ok(())
            });
            assert_eq!(result, Err(SendError::Interrupted(2, Error::Timeout)));
            assert_eq!(receiver.recv(), Ok(1));
            let result = timeout(0.01, || Ok(receiver.recv()));
            assert_eq!(result, Ok(Err(RecvError::Interrupted(Error::Timeout))));
            sender.send(3).unwrap();
            assert_eq!(receiver.recv(), Ok(3));
        };
        deadlines();
        run(deadlines);
        run(|| {
            let (sender, receiver) = channel(1);
            let theirs = receiver.clone();
            let waiting = spawn(move || theirs.recv());
            yield_now();
            waiting.cancel();
            assert_eq!(
                waiting.join().unwrap(),
                Err(RecvError::Interrupted(Error::Cancelled))
            );
            sender.send(1).unwrap();
            let theirs = sender.clone();
            let sending = spawn(move || theirs.send(2));
            yield_now();
            sending.cancel();
            let result = sending.join().unwrap();
            assert_eq!(result, Err(SendError::Interrupted(2, Error::Cancelled)));
            assert_eq!(receiver.recv(), Ok(1));
            assert_eq!(receiver.try_recv(), Err(TryRecvError::Empty));
            // Given and cancelled in the same turn: the value is received, not lost.
            let theirs = receiver.clone();
            let waiting = spawn(move || theirs.recv());
            yield_now();
            sender.send(4).unwrap();
            waiting.cancel();
            assert_eq!(waiting.join().unwrap(), Ok(4));
        });
    });
}

#[test]
fn values_given_to_receivers_that_give_up_are_never_lost() {
    const VALUES: u64 = 3000;
    bounded(|| {
        for places in PLACES {
            let runtime = two_workers();
            let (sender, receiver) = channel(2);
            let receivers: Vec<_> = (0..3)
                .map(|index: usize| {
                    let receiver: Receiver<u64> = receiver.clone();
                    Work::start(&runtime, places[index % places.len()], move || {
                        let mut sum = 0;
                        for round in 0.. {
                            let patience = Duration::from_micros((round * 13 + index as u64) % 70);
                            match timeout(patience, || Ok(receiver.recv())).unwrap() {
                                Ok(value) => sum += value,
                                Err(RecvError::Disconnected) => break,
                                Err(error) => {
                                    assert_eq!(error, RecvError::Interrupted(Error::Timeout));
                                }
                            }
                        }
                        sum
                    })
                })
                .collect();
            drop(receiver);
            let senders: Vec<_> = (0..2)
                .map(|index: usize| {
                    let sender: Sender<u64> = sender.clone();
                    Work::start(&runtime, places[(index + 1) % places.len()], move || {
                        for n in 1..=VALUES {
                            let mut value = n;
                            let mut patience = Duration::from_micros(n % 50);
                            while let Err(error) =
                                timeout(patience, || Ok(sender.send(value))).unwrap()
                            {
                                value = error.into_inner();
                                assert_eq!(value, n);
                                patience += Duration::from_micros(20);
                            }
                        }
                    })
                })
                .collect();
            drop(sender);
            senders.into_iter().for_each(Work::join);
            let sum: u64 = receivers.into_iter().map(Work::join).sum();
            assert_eq!(sum, VALUES * (VALUES + 1), "{places:?}");
        }
    });
}

// Wakes.

/// One value goes back and forth: each hop is a wake, and a lost one hangs.
fn ping_pong(runtime: &Runtime, there: Place, here: Place, rounds: usize) {
    let (to, from_us) = channel(1);
    let (back, from_them) = channel(1);
    let echo = Work::start(runtime, there, move || {
        from_us
            .iter()
            .for_each(|value: usize| back.send(value).unwrap());
    });
    let caller = Work::start(runtime, here, move || {
        for round in 0..rounds {
            to.send(round).unwrap();
            assert_eq!(from_them.recv(), Ok(round));
        }
    });
    caller.join();
    echo.join();
}

#[test]
fn no_wake_is_lost_in_a_hundred_thousand() {
    bounded(|| {
        let runtime = two_workers();
        let (zero, one) = (Place::Worker(0), Place::Worker(1));
        ping_pong(&runtime, zero, zero, 40_000);
        ping_pong(&runtime, zero, one, 20_000);
        ping_pong(&runtime, one, Place::Thread, 10_000);
        ping_pong(&runtime, Place::Thread, Place::Thread, 10_000);
    });
}

/// Without a buffer each value needs both sides at once: a side that queues without a last look waits for ever.
#[test]
fn every_rendezvous_of_two_takes_place() {
    const ROUNDS: usize = 30_000;
    bounded(|| {
        let runtime = two_workers();
        for there in [Place::Worker(1), Place::Thread] {
            let (sender, receiver) = channel(0);
            let sending = Work::start(&runtime, there, move || {
                (0..ROUNDS).for_each(|n| sender.send(n).unwrap());
            });
            let receiving = Work::start(&runtime, Place::Worker(0), move || {
                assert!(receiver.iter().eq(0..ROUNDS));
            });
            sending.join();
            receiving.join();
        }
    });
}

#[test]
fn a_chain_of_hand_offs_goes_through_all_fibers() {
    bounded(|| {
        let runtime = two_workers();
        let (first, mut last) = channel(1);
        let mut links = Vec::new();
        for index in 0..500 {
            let (sender, receiver) = channel(1);
            let before = std::mem::replace(&mut last, receiver);
            let place = [Place::Worker(0), Place::Worker(1)][index % 2];
            links.push(Work::start(&runtime, place, move || {
                before
                    .into_iter()
                    .for_each(|n: usize| sender.send(n + 1).unwrap());
            }));
        }
        first.send(0).unwrap();
        assert_eq!(last.recv(), Ok(500));
        drop(first);
        links.into_iter().for_each(Work::join);
        assert_eq!(last.recv(), Err(RecvError::Disconnected));
    });
}

// The rest of the surface.

#[test]
fn guards_and_errors_behave_like_the_standard_ones() {
    let mut mutex = Mutex::new(1);
    *mutex.get_mut() += 1;
    assert_eq!(format!("{mutex:?}"), "Mutex { data: 2 }");
    let guard = mutex.lock().unwrap();
    assert_eq!(format!("{guard} {mutex:?}"), "2 Mutex { data: <locked> }");
    drop(guard);
    assert_eq!(mutex.into_inner(), 2);
    let shared: Arc<Mutex<[u8]>> = Arc::new(Mutex::new([1, 2, 3]));
    assert_eq!(shared.lock().unwrap().len(), 3);
    let errno = |error: Error| error.errno();
    assert_eq!(errno(SendError::Disconnected(()).into()), Some(libc::EPIPE));
    assert_eq!(errno(TrySendError::Full(()).into()), Some(libc::EAGAIN));
    assert_eq!(errno(RecvError::Disconnected.into()), Some(libc::EPIPE));
    assert_eq!(errno(TryRecvError::Empty.into()), Some(libc::EAGAIN));
    fn crosses<T: Send + Sync>() {}
    crosses::<Mutex<std::cell::Cell<i32>>>();
    crosses::<Condvar>();
    crosses::<Sender<i32>>();
    crosses::<Receiver<i32>>();
}

#[test]
fn a_condvar_wait_of_no_time_lets_the_others_go_first() {
    bounded(|| {
        run(|| {
            let shared = Arc::new((Mutex::new(false), Condvar::new()));
            let theirs = shared.clone();
            let setter = spawn(move || *theirs.0.lock().unwrap() = true);
            let mut set = shared.0.lock().unwrap();
            while !*set {
                set = shared.1.wait_timeout(set, 0).unwrap().0;
            }
            drop(set);
            setter.join().unwrap();
        });
    });
}

#[test]
fn a_fiber_that_passes_values_without_waiting_starves_nobody() {
    bounded(|| {
        run(|| {
            let done = std::rc::Rc::new(std::cell::Cell::new(false));
            let seen = done.clone();
            let passing = spawn(move || {
                let (sender, receiver) = channel(1);
                while !seen.get() {
                    sender.send(()).unwrap();
                    receiver.recv().unwrap();
                }
            });
            sleep(0.01).unwrap();
            done.set(true);
            passing.join().unwrap();
        });
    });
}
