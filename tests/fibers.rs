//! Fibers through the public API: starting, joining, cancelling, panics, limits, fairness, stack overflow.
#![allow(unsafe_code)]

mod support;

use std::cell::{Cell, RefCell};
use std::hint::black_box;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::*;
use ringsock::{
    Builder, Handle, JoinError, JoinHandle, Runtime, Timeout, run, sleep, socketpair, spawn,
    timeout, yield_now,
};
use support::{Random, child, child_part, listener, seed};

/// Ends the process if a test hangs, so that the others are not waited for in vain.
struct Watchdog(Arc<AtomicBool>);

impl Watchdog {
    fn start(test: &'static str) -> Watchdog {
        let done = Arc::new(AtomicBool::new(false));
        let seen = done.clone();
        thread::spawn(move || {
            let start = Instant::now();
            while start.elapsed() < Duration::from_secs(120) {
                if seen.load(Ordering::SeqCst) {
                    return;
                }
                thread::park_timeout(Duration::from_millis(500));
            }
            eprintln!("{test} hangs");
            std::process::abort();
        });
        Watchdog(done)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Echoes until the end of the stream.
fn echo(conn: &Socket) -> ringsock::Result<()> {
    let mut buffer = [0; 2048];
    loop {
        let n = conn.recv_into(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        conn.sendall(&buffer[..n])?;
    }
}

/// Sends messages of random bytes and lengths, and demands each back byte for byte.
fn check_echo(conn: &Socket, messages: usize, random: &mut Random) {
    let mut buffer = [0; 3000];
    for _ in 0..messages {
        let len = 1 + random.below(2999) as usize;
        let sent: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        conn.sendall(&sent).unwrap();
        let mut got = 0;
        while got < len {
            let n = conn.recv_into(&mut buffer[got..len]).unwrap();
            assert_ne!(n, 0, "the echo ended early");
            got += n;
        }
        assert_eq!(buffer[..len], sent[..], "the echo is not what was sent");
    }
}

fn panic_text(error: JoinError) -> String {
    let payload = error.into_panic().expect("the fiber panicked");
    match payload.downcast::<String>() {
        Ok(text) => *text,
        Err(payload) => (*payload.downcast::<&str>().expect("a text")).to_owned(),
    }
}

fn thread_cpu() -> Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel fills the struct.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

// Starting, joining, detaching.

#[test]
fn join_gives_the_result_in_any_order() {
    run(|| {
        let mut fibers: Vec<_> = (0..100).map(|n| (n, spawn(move || n * n))).collect();
        fibers.reverse();
        for (n, fiber) in fibers {
            assert_eq!(fiber.join().unwrap(), n * n);
        }
    });
}

#[test]
fn a_spawned_fiber_runs_when_the_caller_first_waits() {
    run(|| {
        let started = Rc::new(Cell::new(false));
        let theirs = started.clone();
        let fiber = spawn(move || theirs.set(true));
        assert!(!started.get() && !fiber.is_finished());
        yield_now();
        assert!(started.get() && fiber.is_finished());
    });
}

#[test]
fn a_detached_fiber_goes_on() {
    run(|| {
        let (left, right) = socketpair().unwrap();
        drop(spawn(move || {
            yield_now();
            left.sendall(b"still here").unwrap();
        }));
        assert_eq!(right.recv(32).unwrap(), b"still here");
    });
}

#[test]
fn closures_and_results_need_not_be_send() {
    let text = run(|| {
        let shared = Rc::new(RefCell::new(String::new()));
        let fibers: Vec<JoinHandle<Rc<RefCell<String>>>> = ["a", "b", "c"]
            .into_iter()
            .map(|letter| {
                let shared = shared.clone();
                spawn(move || {
                    shared.borrow_mut().push_str(letter);
                    shared
                })
            })
            .collect();
        for fiber in fibers {
            assert!(Rc::ptr_eq(&fiber.join().unwrap(), &shared));
        }
        shared.take()
    });
    assert_eq!(text, "abc");
}

#[test]
fn a_large_closure_arrives_whole() {
    run(|| {
        let large = [7u8; 20_000];
        let fiber = spawn(move || large.iter().map(|byte| usize::from(*byte)).sum::<usize>());
        assert_eq!(fiber.join().unwrap(), 140_000);
    });
}

#[test]
fn closures_of_every_size_arrive_whole() {
    fn check<const N: usize>() {
        let bytes = std::array::from_fn::<u8, N, _>(|index| index as u8);
        let fiber = spawn(move || bytes.iter().map(|byte| usize::from(*byte)).sum::<usize>());
        let expected: usize = (0..N).map(|index| index % 256).sum();
        assert_eq!(fiber.join().unwrap(), expected, "{N} bytes");
    }
    // What fits on the fiber's stack ends somewhere here.
    run(|| {
        check::<0>();
        check::<960>();
        check::<992>();
        check::<1000>();
        check::<1008>();
        check::<1016>();
        check::<1024>();
        check::<1032>();
        check::<1500>();
        check::<2048>();
        check::<2056>();
    });
}

#[test]
fn many_fibers_wait_for_one_after_another() {
    let sum = run(|| {
        let mut last = spawn(|| 0);
        for _ in 0..1000 {
            last = spawn(move || last.join().unwrap() + 1);
        }
        last.join().unwrap()
    });
    assert_eq!(sum, 1000);
}

// Cancelling.

#[test]
fn cancel_interrupts_every_kind_of_wait() {
    run(|| {
        let (_peer, receiver) = socketpair().unwrap();
        let (_timed_peer, timed) = socketpair().unwrap();
        timed.settimeout(1000).unwrap();
        let (_full_peer, full) = socketpair().unwrap();
        full.setblocking(false).unwrap();
        assert!(
            full.sendall(&vec![0; 1 << 20])
                .unwrap_err()
                .is_would_block()
        );
        full.setblocking(true).unwrap();
        let listener = listener(16);
        let sleeper = spawn(|| sleep(None));
        let joined = spawn(|| sleep(None));
        let timed_joined = spawn(|| sleep(None));
        let join = |fiber: JoinHandle<ringsock::Result<()>>| match fiber.join() {
            Err(JoinError::Interrupted(error)) => Err(error),
            other => panic!("{other:?}"),
        };
        let fibers = [
            ("recv", spawn(move || receiver.recv(1).map(drop))),
            ("timed recv", spawn(move || timed.recv(1).map(drop))),
            ("sendall", spawn(move || full.sendall(&[0; 100_000]))),
            ("accept", spawn(move || listener.accept().map(drop))),
            ("sleep", sleeper),
            ("join", spawn(move || join(joined))),
            (
                "join with a deadline",
                spawn(move || timeout(1000, move || join(timed_joined))),
            ),
        ];
        yield_now();
        for (what, fiber) in fibers {
            assert!(!fiber.is_finished(), "{what} does not wait");
            fiber.cancel();
            assert_eq!(fiber.join().unwrap(), Err(Error::Cancelled), "{what}");
        }
    });
}

#[test]
fn cancel_before_the_start_counts_and_stays() {
    run(|| {
        let fiber = spawn(|| {
            let (left, right) = socketpair().unwrap();
            for _ in 0..3 {
                assert_eq!(sleep(1000), Err(Error::Cancelled));
                assert_eq!(right.recv(1), Err(Error::Cancelled));
            }
            // What does not wait is not interrupted.
            left.setblocking(false).unwrap();
            right.setblocking(false).unwrap();
            left.send(b"x").unwrap();
            assert_eq!(right.recv(1).unwrap(), b"x");
            7
        });
        fiber.cancel();
        fiber.cancel();
        assert_eq!(fiber.join().unwrap(), 7);
    });
}

#[test]
fn cancel_works_from_a_plain_thread_and_from_another_worker() {
    let runtime = Runtime::builder().workers(2).build().unwrap();
    let handle = runtime.handle();
    for _ in 0..50 {
        let fiber = handle.spawn_on(0, || sleep(None)).unwrap();
        fiber.cancel();
        assert_eq!(fiber.join().unwrap(), Err(Error::Cancelled));
        let fiber = handle.spawn_on(0, || sleep(None)).unwrap();
        let joiner = handle
            .spawn_on(1, move || {
                fiber.cancel();
                fiber.join().unwrap()
            })
            .unwrap();
        assert_eq!(joiner.join().unwrap(), Err(Error::Cancelled));
    }
}

#[test]
fn cancel_of_an_ended_fiber_hurts_none_that_took_its_place() {
    run(|| {
        for _ in 0..100 {
            let ended = spawn(|| ());
            yield_now();
            assert!(ended.is_finished());
            let next = spawn(|| sleep(0.0001));
            yield_now();
            ended.cancel();
            assert_eq!(next.join().unwrap(), Ok(()));
        }
    });
}

#[test]
fn cancel_keeps_what_has_arrived() {
    run(|| {
        for _ in 0..200 {
            let (left, right) = socketpair().unwrap();
            let reader = right.clone();
            let fiber = spawn(move || reader.recv(16));
            yield_now();
            left.sendall(b"data").unwrap();
            fiber.cancel();
            match fiber.join().unwrap() {
                Ok(bytes) => assert_eq!(bytes, b"data"),
                Err(error) => {
                    assert_eq!(error, Error::Cancelled);
                    assert_eq!(right.recv(16).unwrap(), b"data", "the bytes are not lost");
                }
            }
        }
    });
}

// Panics.

#[test]
fn a_panic_reaches_join_and_hurts_nobody_else() {
    run(|| {
        let fibers: Vec<_> = (0..20)
            .map(|n| {
                spawn(move || {
                    for _ in 0..10 {
                        sleep(0.0001).unwrap();
                        assert!(!thread::panicking());
                    }
                    if n % 2 == 1 {
                        panic!("fiber {n}");
                    }
                    n
                })
            })
            .collect();
        for (n, fiber) in fibers.into_iter().enumerate() {
            match fiber.join() {
                Ok(result) => assert_eq!(result, n),
                Err(error) => {
                    assert_eq!(n % 2, 1);
                    assert_eq!(panic_text(error), format!("fiber {n}"));
                }
            }
        }
        let payload = spawn(|| panic_any(42_u64)).join().unwrap_err().into_panic();
        assert_eq!(payload.unwrap().downcast_ref::<u64>(), Some(&42));
    });
}

#[test]
fn a_panic_on_a_worker_reaches_a_plain_thread() {
    let runtime = Runtime::builder().build().unwrap();
    let handle = runtime.handle();
    let fiber = handle.spawn(|| panic!("over there")).unwrap();
    let error: JoinError = fiber.join().unwrap_err();
    assert_eq!(panic_text(error), "over there");
    assert_eq!(handle.spawn(|| 7).unwrap().join().unwrap(), 7);
}

static LOGGED: Mutex<Vec<String>> = Mutex::new(Vec::new());
static LOG_USERS: Mutex<()> = Mutex::new(());

/// The log hook is the whole process's: tests that look at it take turns.
fn log_is_ours() -> MutexGuard<'static, ()> {
    static INSTALLED: Once = Once::new();
    let turn = LOG_USERS.lock().unwrap_or_else(PoisonError::into_inner);
    INSTALLED.call_once(|| {
        ringsock::set_log_hook(|line| LOGGED.lock().unwrap().push(line.to_owned()));
    });
    turn
}

fn logged(text: &str) -> usize {
    let lines = LOGGED.lock().unwrap();
    lines.iter().filter(|line| line.contains(text)).count()
}

#[test]
fn a_panic_that_nobody_joins_reaches_the_log_hook_once() {
    let _turn = log_is_ours();
    run(|| {
        let before_the_end = Builder::new()
            .name("left alone")
            .spawn(|| panic!("nobody-joins-1"))
            .unwrap();
        drop::<JoinHandle<()>>(before_the_end);
        let after_the_end: JoinHandle<()> = spawn(|| panic!("nobody-joins-2"));
        let joined: JoinHandle<()> = spawn(|| panic!("somebody-joins"));
        yield_now();
        assert!(after_the_end.is_finished());
        drop(after_the_end);
        assert_eq!(panic_text(joined.join().unwrap_err()), "somebody-joins");
    });
    assert_eq!(logged("nobody-joins-1"), 1);
    assert_eq!(logged("left alone"), 1, "the message names the fiber");
    assert_eq!(logged("nobody-joins-2"), 1);
    assert_eq!(logged("somebody-joins"), 0);
}

#[test]
fn calls_in_destructors_of_a_panicking_fiber_do_not_suspend() {
    /// Talks on its sockets while the fiber unwinds.
    struct Talks {
        empty: Socket,
        busy: Socket,
        peer: Socket,
        full: ringsock::Address,
        talking: Rc<Cell<bool>>,
        done: Rc<Cell<usize>>,
    }
    impl Drop for Talks {
        fn drop(&mut self) {
            assert!(thread::panicking());
            self.talking.set(true);
            for _ in 0..20 {
                let _ = self.busy.sendall(b"in a destructor");
                let mut buffer = [0; 15];
                let _ = self.peer.recv_into(&mut buffer);
                let nothing = self.empty.recv(16);
                let wrong = !matches!(&nothing, Err(error) if error.is_would_block());
                if wrong || &buffer != b"in a destructor" {
                    self.done.set(1_000_000);
                }
                let _ = sleep(10);
                yield_now();
                let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
                let _ = client.connect(&self.full);
            }
            self.talking.set(false);
            self.done.set(self.done.get() + 1);
        }
    }

    let _watchdog = Watchdog::start("calls_in_destructors_of_a_panicking_fiber_do_not_suspend");
    let mut random = Random::new(seed());
    run(move || {
        // A backlog that is full: connecting to it would wait for long.
        let full = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
        full.bind(("127.0.0.1", 0)).unwrap();
        full.listen(0).unwrap();
        let address = full.getsockname().unwrap();
        let mut filling = Vec::new();
        for _ in 0..3 {
            let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
            client.settimeout(0.1).unwrap();
            let _ = client.connect(&address);
            filling.push(client);
        }

        let talking = Rc::new(Cell::new(false));
        let done = Rc::new(Cell::new(0));
        let mut others = Vec::new();
        for _ in 0..50 {
            let (left, right) = socketpair().unwrap();
            let (mut random, seen) = (random.fork(), talking.clone());
            others.push(spawn(move || {
                for _ in 0..10 {
                    check_echo(&left, 4, &mut random);
                    assert!(!seen.get(), "a panicking fiber was switched out");
                    assert!(!thread::panicking());
                }
            }));
            let seen = talking.clone();
            spawn(move || {
                echo(&right).unwrap();
                assert!(!seen.get());
            });
        }
        let mut panicking = Vec::new();
        for _ in 0..20 {
            let (busy, peer) = socketpair().unwrap();
            let (empty, silent) = socketpair().unwrap();
            let talks = Talks {
                empty,
                busy,
                peer,
                full: address.clone(),
                talking: talking.clone(),
                done: done.clone(),
            };
            panicking.push(spawn(move || {
                let _silent = silent;
                let _talks = talks;
                panic!("on purpose");
            }));
            sleep(0.0005).unwrap();
        }
        for fiber in panicking {
            let error: JoinError = fiber.join().unwrap_err();
            assert_eq!(panic_text(error), "on purpose");
        }
        for fiber in others {
            fiber.join().unwrap();
        }
        assert_eq!(done.get(), 20, "each destructor ran to its end");
    });
}

#[test]
fn captures_and_results_are_dropped_in_the_fiber() {
    /// Waits, spawns and joins while it is dropped, which works in a fiber only.
    struct Waits(Arc<AtomicUsize>);
    impl Drop for Waits {
        fn drop(&mut self) {
            assert!(Handle::current().is_some());
            yield_now();
            assert_eq!(spawn(|| 7).join().unwrap(), 7);
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    let dropped = Arc::new(AtomicUsize::new(0));
    let waits = || Waits(dropped.clone());
    let (a, b, c, d, e) = (waits(), waits(), waits(), waits(), waits());
    run(move || {
        let capture = spawn(move || {
            let _ = &a;
        });
        let detached_result = spawn(move || b);
        drop(detached_result);
        let panicked: JoinHandle<()> = spawn(move || {
            let _c = &c;
            catch_unwind(|| panic!("caught")).unwrap_err();
        });
        let cancelled = spawn(move || {
            let _d = &d;
            sleep(None)
        });
        cancelled.cancel();
        capture.join().unwrap();
        panicked.join().unwrap();
        cancelled.join().unwrap().unwrap_err();
        let returned = spawn(move || e).join().unwrap();
        drop(returned);
        // The detached fiber's destructor needs a few turns.
        for _ in 0..10 {
            yield_now();
        }
    });
    assert_eq!(dropped.load(Ordering::SeqCst), 5);

    let runtime = Runtime::builder().build().unwrap();
    let waits = Waits(dropped.clone());
    let fiber = runtime.handle().spawn(move || {
        let _ = &waits;
    });
    fiber.unwrap().join().unwrap();
    assert_eq!(dropped.load(Ordering::SeqCst), 6);
}

#[test]
fn run_in_a_fiber_panics_and_says_so() {
    run(|| {
        let error = spawn(|| run(|| ())).join().unwrap_err();
        let text = panic_text(error);
        assert!(
            text.contains("ringsock::run was called in a fiber"),
            "{text}"
        );
        // The fiber's runtime has taken no harm.
        sleep(0.001).unwrap();
    });
}

#[test]
fn the_panic_of_run_goes_on_in_its_caller() {
    let payload = catch_unwind(|| run(|| panic!("in main"))).unwrap_err();
    assert_eq!(payload.downcast_ref::<&str>(), Some(&"in main"));
    assert_eq!(run(|| 7), 7, "the thread can run another runtime");
}

#[test]
fn spawn_outside_a_fiber_panics_and_says_so() {
    let payload = catch_unwind(|| drop(spawn(|| ()))).unwrap_err();
    let text = payload
        .downcast_ref::<String>()
        .cloned()
        .unwrap_or_else(|| (*payload.downcast_ref::<&str>().expect("a text")).to_owned());
    assert!(text.contains("in a fiber only"), "{text}");
}

// Several workers.

#[test]
fn spawns_from_plain_threads_are_all_run() {
    let _watchdog = Watchdog::start("spawns_from_plain_threads_are_all_run");
    let runtime = Runtime::builder().workers(2).build().unwrap();
    let ran = Arc::new(AtomicUsize::new(0));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let (handle, ran) = (runtime.handle(), ran.clone());
            thread::spawn(move || {
                let fibers: Vec<_> = (0..2500)
                    .map(|n| {
                        let ran = ran.clone();
                        let fiber = handle.spawn(move || {
                            ran.fetch_add(1, Ordering::Relaxed);
                            n
                        });
                        fiber.unwrap()
                    })
                    .collect();
                for (n, fiber) in fibers.into_iter().enumerate() {
                    assert_eq!(fiber.join().unwrap(), n);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(ran.load(Ordering::Relaxed), 10_000);
}

#[test]
fn spawns_that_ping_pong_between_workers_are_all_run() {
    fn hop(handle: &Handle, left: usize, hops: &Arc<AtomicUsize>, done: mpsc::Sender<()>) {
        hops.fetch_add(1, Ordering::Relaxed);
        if left == 0 {
            done.send(()).unwrap();
            return;
        }
        let (next, hops) = (handle.clone(), hops.clone());
        let fiber = handle.spawn_on(left % 2, move || hop(&next, left - 1, &hops, done));
        drop(fiber.unwrap());
    }

    let _watchdog = Watchdog::start("spawns_that_ping_pong_between_workers_are_all_run");
    let runtime = Runtime::builder().workers(2).build().unwrap();
    let hops = Arc::new(AtomicUsize::new(0));
    let (done, ended) = mpsc::channel();
    for _ in 0..4 {
        hop(&runtime.handle(), 2499, &hops, done.clone());
    }
    for _ in 0..4 {
        ended
            .recv_timeout(Duration::from_secs(60))
            .expect("a chain of spawns ends");
    }
    assert_eq!(hops.load(Ordering::Relaxed), 10_000);
}

#[test]
fn workers_join_fibers_of_each_other() {
    let _watchdog = Watchdog::start("workers_join_fibers_of_each_other");
    let runtime = Runtime::builder().workers(2).build().unwrap();
    let handle = runtime.handle();
    let mains: Vec<_> = (0..2)
        .map(|worker| {
            let theirs = handle.clone();
            let main = handle.spawn_on(worker, move || {
                (0..2000_usize)
                    .map(|n| {
                        theirs
                            .spawn_on(1 - worker, move || n)
                            .unwrap()
                            .join()
                            .unwrap()
                    })
                    .sum::<usize>()
            });
            main.unwrap()
        })
        .collect();
    for main in mains {
        assert_eq!(main.join().unwrap(), 1999 * 1000);
    }
}

#[test]
fn spawn_on_a_worker_that_is_not_there_is_an_error() {
    let runtime = Runtime::builder().workers(2).build().unwrap();
    let error = runtime.handle().spawn_on(2, || ()).unwrap_err();
    assert_eq!(error, Error::Value("no worker 2".into()));
}

#[test]
fn timed_joins_wakes_and_cancels_at_once_lose_nothing() {
    for ring_entries in [(256, 8), (2, 2)] {
        let _watchdog = Watchdog::start("timed_joins_wakes_and_cancels_at_once_lose_nothing");
        let mut random = Random::new(seed());
        let runtime = Runtime::builder()
            .workers(2)
            .ring_entries(ring_entries.0, ring_entries.1)
            .build()
            .unwrap();
        let handle = runtime.handle();
        let mains: Vec<_> = (0..2)
            .map(|worker| {
                let (theirs, mut random) = (handle.clone(), random.fork());
                let main = handle.spawn_on(worker, move || {
                    let mut outcomes = [0; 3];
                    for _ in 0..1500 {
                        let nap = Duration::from_micros(random.below(400));
                        let target = match random.below(2) {
                            0 => theirs.spawn_on(1 - worker, move || sleep(nap)).unwrap(),
                            _ => spawn(move || sleep(nap)),
                        };
                        let wait = Duration::from_micros(random.below(400));
                        let joiner = spawn(move || {
                            timeout(wait, move || match target.join() {
                                Ok(result) => result,
                                Err(JoinError::Interrupted(error)) => Err(error),
                                Err(error) => panic!("{error}"),
                            })
                        });
                        if random.below(2) == 0 {
                            sleep(Duration::from_micros(random.below(400))).unwrap();
                            joiner.cancel();
                        }
                        outcomes[match joiner.join().unwrap() {
                            Ok(()) => 0,
                            Err(Error::Timeout) => 1,
                            Err(Error::Cancelled) => 2,
                            Err(error) => panic!("{error}"),
                        }] += 1;
                    }
                    outcomes
                });
                main.unwrap()
            })
            .collect();
        for main in mains {
            println!("joined, timed out, cancelled: {:?}", main.join().unwrap());
        }
    }
}

// Limits.

#[test]
fn an_inbox_of_one_serves_eight_spawners() {
    let _watchdog = Watchdog::start("an_inbox_of_one_serves_eight_spawners");
    let runtime = Runtime::builder().inbox(1).build().unwrap();
    let threads: Vec<_> = (0..8)
        .map(|thread_number| {
            let handle = runtime.handle();
            thread::spawn(move || {
                for n in 0..250 {
                    let fiber = handle.spawn(move || thread_number * 1000 + n).unwrap();
                    assert_eq!(fiber.join().unwrap(), thread_number * 1000 + n);
                }
                // And without waiting in between.
                let fibers: Vec<_> = (0..250).map(|n| handle.spawn(move || n).unwrap()).collect();
                for (n, fiber) in fibers.into_iter().enumerate() {
                    assert_eq!(fiber.join().unwrap(), n);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn spawn_waits_at_the_limit_of_fibers() {
    Runtime::builder()
        .max_fibers(4)
        .run(|| {
            let (live, most) = (Rc::new(Cell::new(1)), Rc::new(Cell::new(0)));
            let fibers: Vec<_> = (0..100)
                .map(|n| {
                    let (live, most) = (live.clone(), most.clone());
                    spawn(move || {
                        live.set(live.get() + 1);
                        most.set(most.get().max(live.get()));
                        sleep(0.0005).unwrap();
                        live.set(live.get() - 1);
                        n
                    })
                })
                .collect();
            for (n, fiber) in fibers.into_iter().enumerate() {
                assert_eq!(fiber.join().unwrap(), n);
            }
            assert_eq!(most.get(), 4);
        })
        .unwrap();
}

#[test]
fn spawn_at_the_limit_waits_without_spinning() {
    Runtime::builder()
        .max_fibers(2)
        .run(|| {
            let other = spawn(|| sleep(1));
            let cpu = thread_cpu();
            let waited_for = spawn(|| 7);
            let burnt = thread_cpu() - cpu;
            assert!(other.is_finished());
            assert!(
                burnt < Duration::from_millis(300),
                "burnt {burnt:?} of a second"
            );
            assert_eq!(waited_for.join().unwrap(), 7);
        })
        .unwrap();
}

#[test]
fn a_spawn_from_outside_at_the_limit_waits_without_spinning() {
    Runtime::builder()
        .max_fibers(1)
        .run(|| {
            let handle = Handle::current().unwrap();
            let outside = thread::spawn(move || handle.spawn(|| 7).map(JoinHandle::join));
            let cpu = thread_cpu();
            sleep(1).unwrap();
            let burnt = thread_cpu() - cpu;
            assert!(
                burnt < Duration::from_millis(300),
                "burnt {burnt:?} of a second"
            );
            outside
        })
        .map(|outside| {
            // The only fiber was the main one, so there never was room.
            match outside.join().unwrap() {
                Err(error) => assert_eq!(error, Error::Shutdown),
                Ok(joined) => assert!(matches!(joined, Err(JoinError::Shutdown) | Ok(7))),
            }
        })
        .unwrap();
}

#[test]
fn builder_spawn_at_the_limit_is_eagain() {
    Runtime::builder()
        .max_fibers(2)
        .run(|| {
            let other = Builder::new().spawn(|| sleep(0.001)).unwrap();
            let error = Builder::new().spawn(|| ()).unwrap_err();
            assert_eq!(error.errno(), Some(libc::EAGAIN));
            assert!(error.to_string().contains("all 2 fibers"), "{error}");
            other.join().unwrap().unwrap();
            Builder::new().spawn(|| ()).unwrap().join().unwrap();
        })
        .unwrap();
}

#[test]
fn a_cancelled_fiber_stops_waiting_for_room() {
    Runtime::builder()
        .max_fibers(2)
        .run(|| {
            let waiting = spawn(|| {
                let inner = spawn(|| 7);
                (sleep(None), inner.join().ok())
            });
            yield_now();
            assert!(!waiting.is_finished());
            waiting.cancel();
            assert_eq!(waiting.join().unwrap(), (Err(Error::Cancelled), Some(7)));
        })
        .unwrap();
}

#[test]
fn the_smallest_ring_serves_500_fibers() {
    let _watchdog = Watchdog::start("the_smallest_ring_serves_500_fibers");
    let mut random = Random::new(seed());
    let handle = Runtime::builder()
        .ring_entries(2, 2)
        .run(move || {
            let clients: Vec<_> = (0..250)
                .map(|n| {
                    let (left, right) = socketpair().unwrap();
                    if n % 2 == 0 {
                        left.settimeout(100).unwrap();
                        right.settimeout(100).unwrap();
                    }
                    spawn(move || echo(&right).unwrap());
                    let mut random = random.fork();
                    spawn(move || {
                        // Two entries for so many timers at once.
                        sleep(0.001).unwrap();
                        check_echo(&left, 20, &mut random)
                    })
                })
                .collect();
            for client in clients {
                client.join().unwrap();
            }
            Handle::current().unwrap()
        })
        .unwrap();
    let metrics = handle.metrics()[0];
    println!("{metrics:?}");
    // Without a ring nothing is full.
    assert!(metrics.sq_full > 0 || support::on_epoll());
    assert_eq!(metrics.cqes_unknown, 0);
    assert_eq!(metrics.fibers_live, 0);
    assert_eq!(metrics.in_flight, 0);
}

#[test]
fn ten_thousand_fibers_sleep_at_once() {
    let _watchdog = Watchdog::start("ten_thousand_fibers_sleep_at_once");
    for ring_entries in [(256, 8), (2, 2)] {
        Runtime::builder()
            .ring_entries(ring_entries.0, ring_entries.1)
            .run(|| {
                let fibers: Vec<_> = (0..10_000).map(|_| spawn(|| sleep(0.05))).collect();
                for fiber in fibers {
                    assert_eq!(fiber.join().unwrap(), Ok(()));
                }
            })
            .unwrap();
    }
}

// Fairness.

#[test]
fn busy_fibers_starve_nobody() {
    let _watchdog = Watchdog::start("busy_fibers_starve_nobody");
    run(|| {
        let stop = Rc::new(Cell::new(false));
        let mut busy = Vec::new();
        let seen = stop.clone();
        busy.push(spawn(move || {
            while !seen.get() {
                yield_now();
            }
        }));
        // Both ends in one fiber: there is always something to do.
        let (left, right) = socketpair().unwrap();
        let seen = stop.clone();
        busy.push(spawn(move || {
            let mut buffer = [0; 1024];
            while !seen.get() {
                left.sendall(&[7; 1024]).unwrap();
                assert_ne!(right.recv_into(&mut buffer).unwrap(), 0);
            }
        }));
        // A sender that never waits for long, and its receiver.
        let (left, right) = socketpair().unwrap();
        let seen = stop.clone();
        busy.push(spawn(move || {
            while !seen.get() {
                left.sendall(b"x").unwrap();
            }
        }));
        busy.push(spawn(move || {
            let mut buffer = [0; 65_536];
            while right.recv_into(&mut buffer).unwrap() > 0 {}
        }));
        let before = Instant::now();
        for _ in 0..100 {
            sleep(0.001).unwrap();
        }
        let took = before.elapsed();
        stop.set(true);
        for fiber in busy {
            fiber.join().unwrap();
        }
        assert!(
            took < Duration::from_secs(10),
            "100 sleeps of 1 ms took {took:?}"
        );
    });
}

#[test]
fn spawns_from_outside_reach_a_busy_worker() {
    let _watchdog = Watchdog::start("spawns_from_outside_reach_a_busy_worker");
    let runtime = Runtime::builder().build().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let seen = stop.clone();
    let busy = runtime.handle().spawn(move || {
        while !seen.load(Ordering::Relaxed) {
            yield_now();
        }
    });
    for n in 0..100 {
        let fiber = runtime.handle().spawn(move || n).unwrap();
        assert_eq!(fiber.join().unwrap(), n);
    }
    stop.store(true, Ordering::Relaxed);
    busy.unwrap().join().unwrap();
}

// Deadlines.

#[test]
fn a_deadline_bounds_a_connect_that_finds_a_full_backlog() {
    let _watchdog = Watchdog::start("a_deadline_bounds_a_connect_that_finds_a_full_backlog");
    let name = format!("\0ringsock-fibers-{}", std::process::id());
    let listener = Socket::new(AF_UNIX, SOCK_STREAM, 0).unwrap();
    listener.bind(&name).unwrap();
    listener.listen(0).unwrap();
    let mut filling = Vec::new();
    loop {
        let client = Socket::new(AF_UNIX, SOCK_STREAM, 0).unwrap();
        client.setblocking(false).unwrap();
        match client.connect(&name) {
            Ok(()) => filling.push(client),
            Err(error) => {
                assert!(error.is_would_block(), "{error}");
                break;
            }
        }
    }
    let connect = move || {
        for _ in 0..10 {
            let client = Socket::new(AF_UNIX, SOCK_STREAM, 0).unwrap();
            let before = Instant::now();
            let result = timeout(0.02, || client.connect(&name));
            assert_eq!(result, Err(Error::Timeout));
            assert!(before.elapsed() < Duration::from_secs(5));
        }
    };
    connect.clone()();
    run(connect);
}

#[test]
fn of_nested_deadlines_the_earliest_counts() {
    fn nested() {
        let before = Instant::now();
        let result = timeout(0.02, || timeout(1000, || sleep(1000)));
        assert_eq!(result, Err(Error::Timeout));
        let result = timeout(1000, || {
            assert_eq!(timeout(0.02, || sleep(1000)), Err(Error::Timeout));
            // The inner deadline is gone with its block.
            sleep(0.001)
        });
        assert_eq!(result, Ok(()));
        assert_eq!(timeout(Timeout::NONE, || sleep(0)), Ok(()));
        assert!(matches!(timeout(-1, || Ok(())), Err(Error::Value(_))));
        assert!(before.elapsed() < Duration::from_secs(30));
    }
    nested();
    run(nested);
}

// Stack overflow, in processes of their own.

fn recurse(depth: u64) -> u64 {
    let frame = black_box([depth; 16]);
    if depth == u64::MAX {
        return 0;
    }
    recurse(black_box(depth + 1)) + frame[3]
}

fn recurse_in_large_frames(depth: u64) -> u64 {
    let mut frame = [0_u8; 48 * 1024];
    black_box(&mut frame);
    if depth == u64::MAX {
        return 0;
    }
    recurse_in_large_frames(black_box(depth + 1)) + u64::from(frame[depth as usize % frame.len()])
}

#[test]
#[ignore = "run by an_overflow_ends_the_process_and_names_the_fiber"]
fn child_overflows() {
    let Some(part) = child_part() else {
        return;
    };
    let overflow: fn(u64) -> u64 = match part.contains("large") {
        true => recurse_in_large_frames,
        false => recurse,
    };
    let deep = move || {
        let fiber = Builder::new()
            .name("deep")
            .spawn(move || overflow(black_box(0)));
        drop(fiber.unwrap().join());
    };
    match part.contains("worker") {
        true => {
            let runtime = Runtime::builder().build().unwrap();
            runtime.handle().spawn(deep).unwrap().join().unwrap();
        }
        false => run(deep),
    }
}

fn check_overflows(message: &str) {
    for part in ["run", "run-large", "worker", "worker-large"] {
        let output = child("child_overflows", part);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            output.status.signal(),
            Some(libc::SIGABRT),
            "{part}: {:?}\n{stderr}",
            output.status
        );
        assert!(stderr.contains(message), "{part}:\n{stderr}");
    }
}

#[test]
fn an_overflow_ends_the_process_and_names_the_fiber() {
    check_overflows("fiber 'deep' overflowed its stack of ");
}

#[test]
fn the_message_of_an_overflow_gives_the_size_asked_for() {
    check_overflows("fiber 'deep' overflowed its stack of 256 KiB");
}

#[test]
#[ignore = "run by another_segmentation_fault_is_left_alone"]
fn child_reads_a_null_pointer() {
    let Some(part) = child_part() else {
        return;
    };
    let read = || {
        // The first page is never mapped.
        let address = black_box(std::ptr::without_provenance::<u8>(64));
        // SAFETY: none, on purpose: the process ends here.
        black_box(unsafe { address.read_volatile() });
    };
    match &*part {
        "fiber" => run(read),
        "worker" => {
            let runtime = Runtime::builder().build().unwrap();
            runtime.handle().spawn(read).unwrap().join().unwrap();
        }
        _ => {
            run(|| ());
            read();
        }
    }
}

#[test]
fn another_segmentation_fault_is_left_alone() {
    for part in ["fiber", "worker", "thread"] {
        let output = child("child_reads_a_null_pointer", part);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            output.status.signal(),
            Some(libc::SIGSEGV),
            "{part}: {:?}\n{stderr}",
            output.status
        );
        assert!(!stderr.contains("overflowed"), "{part}:\n{stderr}");
    }
}

#[test]
fn a_larger_stack_holds_what_overflows_the_usual_one() {
    fn deep(levels: usize) -> usize {
        let mut frame = [1_u8; 48 * 1024];
        black_box(&mut frame);
        match levels {
            0 => 0,
            _ => deep(levels - 1) + usize::from(frame[levels]),
        }
    }
    let depth = Runtime::builder()
        .stack_size(4 << 20)
        .run(|| spawn(|| deep(20)).join().unwrap());
    assert_eq!(depth.unwrap(), 20);
}

#[test]
fn a_fiber_catches_its_own_panics() {
    run(|| {
        let fibers: Vec<_> = (0..50)
            .map(|n| {
                spawn(move || {
                    let caught = catch_unwind(AssertUnwindSafe(|| {
                        sleep(0.0001).unwrap();
                        panic_any(n);
                    }));
                    sleep(0.0001).unwrap();
                    *caught.unwrap_err().downcast::<i32>().unwrap()
                })
            })
            .collect();
        for (n, fiber) in (0..).zip(fibers) {
            assert_eq!(fiber.join().unwrap(), n);
        }
    });
}

#[test]
fn operations_that_completed_together_are_served_together_beside_ready_fibers() {
    const WAITING: usize = 200;
    run(|| {
        let received = Rc::new(Cell::new(0));
        let mut peers = Vec::new();
        for _ in 0..WAITING {
            let (peer, conn) = std::os::unix::net::UnixStream::pair().unwrap();
            let conn = Socket::try_from(conn).unwrap();
            // Kept, because closing a descriptor looks after completions, too.
            peers.push((peer, conn.clone()));
            let received = received.clone();
            spawn(move || {
                assert_eq!(conn.recv(1).unwrap(), b"x");
                received.set(received.get() + 1);
            });
        }
        // All of them wait on the ring.
        for _ in 0..10 {
            yield_now();
        }
        for (peer, _) in &mut peers {
            peer.write_all(b"x").unwrap();
        }
        let mut turns = 0;
        while received.get() < WAITING {
            yield_now();
            turns += 1;
            assert!(turns < 1000, "{} of {WAITING} served", received.get());
        }
        // The kernel posts twenty at a time; ten turns would be as many times the work of all ready fibers.
        assert!(turns <= 3, "{turns} turns");
    });
}

/// So many pairs of fibers echo a hundred times each: the operations on the ring for each echo, and how many of the sockets were
/// watched in the end.
fn echoes(pairs: usize, timeout: Option<f64>) -> (f64, u64) {
    run(move || {
        // The counters are published now and then, and whenever the worker waits.
        let metrics = || {
            sleep(0.001).unwrap();
            Handle::current().unwrap().metrics()[0]
        };
        let before = metrics().operations;
        let sockets: Vec<_> = (0..pairs).map(|_| socketpair().unwrap()).collect();
        let fibers: Vec<_> = (sockets.iter().cloned())
            .map(|(left, right)| {
                left.settimeout(timeout).unwrap();
                right.settimeout(timeout).unwrap();
                spawn(move || echo(&right));
                spawn(move || {
                    check_echo(&left, 100, &mut Random::new(1));
                    left.shutdown(SHUT_WR).unwrap();
                })
            })
            .collect();
        fibers.into_iter().for_each(|fiber| fiber.join().unwrap());
        let after = metrics();
        let operations = after.operations - before;
        (operations as f64 / pairs as f64 / 100.0, after.watches)
    })
}

#[test]
fn a_crowd_waits_for_events_rather_than_on_operations() {
    if support::skipped_on_epoll("plain calls are all there is") {
        return;
    }
    let (few, _) = echoes(20, None);
    let (many, watched) = echoes(200, None);
    let (timed, _) = echoes(200, Some(60.0));
    assert!(
        few < 1.0 && many < 1.0 && timed < 1.0,
        "operations an echo: {few} of 20 pairs, {many} of 200, {timed} of 200 with a timeout"
    );
    // A socket that waited four times, and most wait more often.
    assert!(watched > 200, "{watched} of 400 sockets were watched");
}

#[test]
fn a_receive_that_fails_at_once_does_so_however_little_its_fiber_received_before() {
    run(|| {
        let (left, right) = socketpair().unwrap();
        right.settimeout(0.001).unwrap();
        let listener = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
        listener.bind(("127.0.0.1", 0)).unwrap();
        listener.listen(1).unwrap();
        listener.settimeout(10).unwrap();
        // After each of these the fiber expects less, and the socket has waited once more.
        for _ in 0..10 {
            assert_eq!(right.recv_into(&mut [0; 8]), Err(Error::Timeout));
            let received = listener.recv_into(&mut [0; 8]);
            assert_eq!(received.unwrap_err().errno(), Some(libc::ENOTCONN));
            let received = listener.recv(8);
            assert_eq!(received.unwrap_err().errno(), Some(libc::ENOTCONN));
        }
        drop(left);
    });
}
