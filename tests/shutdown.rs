//! How runtimes end: what becomes of fibers, descriptors, threads, memory, servers and joiners.
#![allow(unsafe_code)]

use std::io::Read;
use std::net::TcpStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::*;
use ringsock::{
    Handle, JoinError, JoinHandle, Runtime, run, serve, sleep, socketpair, spawn, yield_now,
};

/// Says that this process is a child made for one test.
const CHILD: &str = "RINGSOCK_TEST_CHILD";

/// No child process lives longer, in seconds.
const CHILD_LIMIT_S: u32 = 100;

/// Descriptors, the log hook and the processor are the whole process's: tests take turns.
fn turn() -> Turn {
    static TURN: Mutex<()> = Mutex::new(());
    static HOOK: Once = Once::new();
    let guard = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    HOOK.call_once(|| {
        ringsock::set_log_hook(|line| LOGGED.lock().unwrap().push(line.to_owned()));
    });
    let done = Arc::new(AtomicBool::new(false));
    let seen = done.clone();
    let watchdog = thread::spawn(move || {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(120) {
            if seen.load(Ordering::SeqCst) {
                return;
            }
            thread::park_timeout(Duration::from_millis(500));
        }
        eprintln!("a test hangs");
        std::process::abort();
    });
    Turn {
        done,
        watchdog: Some(watchdog),
        _guard: guard,
    }
}

struct Turn {
    done: Arc<AtomicBool>,
    watchdog: Option<thread::JoinHandle<()>>,
    _guard: MutexGuard<'static, ()>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.done.store(true, Ordering::SeqCst);
        if let Some(watchdog) = self.watchdog.take() {
            watchdog.thread().unpark();
            let _ = watchdog.join();
        }
    }
}

static LOGGED: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn logged(text: &str) -> usize {
    let lines = LOGGED.lock().unwrap();
    lines.iter().filter(|line| line.contains(text)).count()
}

/// Counts how often it is dropped.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn count(directory: &str) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

fn descriptors() -> usize {
    count("/proc/self/fd")
}

fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().count()
}

/// Runs one ignored test of this program in a process of its own, and demands that it passes.
fn child(test: &str) -> Output {
    let output = Command::new(std::env::current_exe().expect("a running program has a path"))
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .expect("the test program starts");
    assert!(
        output.status.success(),
        "{:?}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Whether this is a child, rather than a test started by hand.
fn is_child() -> bool {
    if std::env::var_os(CHILD).is_none() {
        return false;
    }
    // SAFETY: it concerns this process only.
    unsafe { libc::alarm(CHILD_LIMIT_S) };
    true
}

fn listener() -> Socket {
    let listener = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    listener.bind(("127.0.0.1", 0)).unwrap();
    listener.listen(16).unwrap();
    listener
}

/// Waits for as many messages as are expected.
fn await_all(received: &mpsc::Receiver<()>, expected: usize) {
    for n in 0..expected {
        received
            .recv_timeout(Duration::from_secs(60))
            .unwrap_or_else(|_| panic!("{n} of {expected} came"));
    }
}

// Blocked fibers.

/// On each worker, fibers that wait in every way there is: how many.
fn block_everywhere(
    handle: &Handle,
    workers: usize,
    per_worker: usize,
    dropped: &Arc<AtomicUsize>,
) -> usize {
    let (blocked, ready) = mpsc::channel();
    for worker in 0..workers {
        let (dropped, blocked) = (dropped.clone(), blocked.clone());
        let fiber = handle.spawn_on(worker, move || {
            for n in 0..per_worker {
                let counted = Counted(dropped.clone());
                match n % 5 {
                    0 => drop(spawn(move || {
                        let _counted = counted;
                        let (_left, right) = socketpair().unwrap();
                        assert_eq!(right.recv(1), Err(Error::Shutdown));
                    })),
                    1 => drop(spawn(move || {
                        let _counted = counted;
                        let (_left, right) = socketpair().unwrap();
                        right.settimeout(1000).unwrap();
                        assert_eq!(right.recv(1), Err(Error::Shutdown));
                        // New calls answer alike.
                        assert_eq!(right.recv(1), Err(Error::Shutdown));
                        assert_eq!(sleep(1000), Err(Error::Shutdown));
                    })),
                    2 => drop(spawn(move || {
                        let _counted = counted;
                        assert_eq!(listener().accept().map(drop), Err(Error::Shutdown));
                    })),
                    3 => drop(spawn(move || {
                        let _counted = counted;
                        assert_eq!(sleep(None), Err(Error::Shutdown));
                    })),
                    _ => {
                        let other = spawn(|| sleep(None));
                        drop(spawn(move || {
                            let _counted = counted;
                            let joined = other.join();
                            assert!(
                                matches!(
                                    joined,
                                    Err(JoinError::Interrupted(Error::Shutdown))
                                        | Ok(Err(Error::Shutdown))
                                ),
                                "{joined:?}"
                            );
                        }));
                    }
                }
            }
            yield_now();
            blocked.send(()).unwrap();
        });
        drop(fiber.unwrap());
    }
    await_all(&ready, workers);
    workers * per_worker
}

#[test]
fn a_dropped_runtime_ends_a_thousand_blocked_fibers() {
    let _turn = turn();
    child("child_drops_a_runtime_with_blocked_fibers");
}

#[test]
#[ignore = "run by a_dropped_runtime_ends_a_thousand_blocked_fibers"]
fn child_drops_a_runtime_with_blocked_fibers() {
    if !is_child() {
        return;
    }
    let _turn = turn();
    let before_warm_up = Runtime::builder().build().unwrap();
    drop(before_warm_up);
    drop(listener());
    let descriptors_before = descriptors();
    let panics_before = logged("panicked");

    let runtime = Runtime::builder().workers(2).build().unwrap();
    let handle = runtime.handle();
    let dropped = Arc::new(AtomicUsize::new(0));
    let blocked = block_everywhere(&handle, 2, 500, &dropped);
    assert_eq!(blocked, 1000);
    assert_eq!(dropped.load(Ordering::SeqCst), 0);
    let before = Instant::now();
    drop(runtime);
    let took = before.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert_eq!(dropped.load(Ordering::SeqCst), blocked);
    for metrics in handle.metrics() {
        assert_eq!(metrics.fibers_live, 0);
        assert_eq!(metrics.fibers_lost, 0);
        assert_eq!(metrics.in_flight, 0);
    }
    assert_eq!(
        logged("panicked"),
        panics_before,
        "no fiber's assertion failed"
    );
    assert_eq!(descriptors(), descriptors_before);
}

#[test]
fn run_ends_the_other_fibers_before_it_returns() {
    let _turn = turn();
    child("child_runs_with_other_fibers");
}

#[test]
#[ignore = "run by run_ends_the_other_fibers_before_it_returns"]
fn child_runs_with_other_fibers() {
    if !is_child() {
        return;
    }
    let _turn = turn();
    // Descriptors that the process keeps are there after the first socket.
    drop(run(|| socketpair().unwrap()));
    let descriptors_before = descriptors();
    let dropped = Arc::new(AtomicUsize::new(0));
    let theirs = dropped.clone();
    let (result, handle) = Runtime::builder()
        .workers(2)
        .run(move || {
            let handle = Handle::current().unwrap();
            for n in 0..100 {
                let counted = Counted(theirs.clone());
                let wait = move || {
                    let _counted = counted;
                    let (_left, right) = socketpair().unwrap();
                    right.recv(1).map(drop)
                };
                drop(handle.spawn_on(n % 2, wait).unwrap());
            }
            yield_now();
            (7, handle)
        })
        .unwrap();
    assert_eq!(result, 7);
    assert_eq!(dropped.load(Ordering::SeqCst), 100);
    assert_eq!(
        handle
            .metrics()
            .iter()
            .map(|worker| worker.fibers_live)
            .sum::<u64>(),
        0
    );
    assert_eq!(descriptors(), descriptors_before);
}

#[test]
fn a_panic_in_run_ends_the_other_fibers_too() {
    let _turn = turn();
    let dropped = Arc::new(AtomicUsize::new(0));
    let theirs = dropped.clone();
    let payload = catch_unwind(AssertUnwindSafe(|| {
        run(move || {
            let counted = Counted(theirs);
            spawn(move || {
                let _counted = counted;
                sleep(None)
            });
            yield_now();
            panic!("in main");
        });
    }));
    assert_eq!(
        payload.unwrap_err().downcast_ref::<&str>(),
        Some(&"in main")
    );
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
}

#[test]
fn a_fiber_may_end_in_its_own_time_within_the_grace() {
    let _turn = turn();
    let finished = Arc::new(AtomicBool::new(false));
    let theirs = finished.clone();
    run(move || {
        spawn(move || {
            assert_eq!(sleep(None), Err(Error::Shutdown));
            // Plain work and non-blocking calls go on.
            let (left, right) = socketpair().unwrap();
            left.setblocking(false).unwrap();
            right.setblocking(false).unwrap();
            left.send(b"bye").unwrap();
            assert_eq!(right.recv(8).unwrap(), b"bye");
            for _ in 0..100 {
                yield_now();
            }
            theirs.store(true, Ordering::SeqCst);
        });
        yield_now();
    });
    assert!(finished.load(Ordering::SeqCst));
}

// Fibers that will not end.

#[test]
fn a_fiber_that_ignores_errors_is_unwound_after_the_grace() {
    let _turn = turn();
    let runtime = Runtime::builder()
        .shutdown_grace(Duration::from_millis(100))
        .build()
        .unwrap();
    let handle = runtime.handle();
    let dropped = Arc::new(AtomicUsize::new(0));
    let (started, ready) = mpsc::channel();
    let mut fibers: Vec<JoinHandle<()>> = Vec::new();
    for n in 0..4 {
        let (counted, started) = (Counted(dropped.clone()), started.clone());
        let fiber = handle.spawn(move || {
            let _counted = counted;
            let (_left, right) = socketpair().unwrap();
            started.send(()).unwrap();
            loop {
                match n {
                    0 => drop(right.recv(1)),
                    1 => drop(sleep(None)),
                    2 => drop(spawn(|| sleep(None)).join()),
                    _ => yield_now(),
                }
            }
        });
        fibers.push(fiber.unwrap());
    }
    await_all(&ready, 4);
    let before = Instant::now();
    drop(runtime);
    assert!(
        before.elapsed() >= Duration::from_millis(100),
        "they had the grace"
    );
    assert!(before.elapsed() < Duration::from_secs(20));
    for fiber in fibers {
        assert!(matches!(fiber.join(), Err(JoinError::Shutdown)));
    }
    assert_eq!(
        dropped.load(Ordering::SeqCst),
        4,
        "unwinding runs destructors"
    );
    assert_eq!(handle.metrics()[0].fibers_lost, 0);
    assert_eq!(handle.metrics()[0].fibers_live, 0);
}

#[test]
fn a_fiber_that_ignores_errors_does_not_flood_the_ring() {
    let _turn = turn();
    let runtime = Runtime::builder()
        .shutdown_grace(Duration::from_secs(1))
        .build()
        .unwrap();
    let handle = runtime.handle();
    let (started, ready) = mpsc::channel();
    let fiber = handle.spawn(move || {
        let (_left, right) = socketpair().unwrap();
        started.send(()).unwrap();
        while right.recv(1).is_err() {}
    });
    await_all(&ready, 1);
    let before = handle.metrics()[0];
    drop(runtime);
    let after = handle.metrics()[0];
    assert!(matches!(fiber.unwrap().join(), Err(JoinError::Shutdown)));
    assert!(
        after.switches - before.switches > 1000,
        "it did go on: {after:?}"
    );
    assert!(after.sqes - before.sqes < 100, "{after:?}");
}

#[test]
#[ignore = "run by a_fiber_that_catches_every_unwind_is_given_up"]
fn child_catches_every_unwind() {
    if !is_child() {
        return;
    }
    let _turn = turn();
    let runtime = Runtime::builder()
        .shutdown_grace(Duration::from_millis(100))
        .build()
        .unwrap();
    let handle = runtime.handle();
    let (started, ready) = mpsc::channel();
    let stubborn = handle
        .spawn(move || {
            started.send(()).unwrap();
            loop {
                let _ = catch_unwind(|| {
                    loop {
                        let _ = sleep(None);
                    }
                });
            }
        })
        .unwrap();
    await_all(&ready, 1);
    let joiner = thread::spawn(move || stubborn.join());
    let before = Instant::now();
    drop(runtime);
    assert!(before.elapsed() < Duration::from_secs(20));
    assert!(matches!(joiner.join().unwrap(), Err(JoinError::Shutdown)));
    assert_eq!(handle.metrics()[0].fibers_lost, 1);
    assert_eq!(logged("1 fibers could not be ended at shutdown"), 1);
    // The process goes on unharmed.
    assert_eq!(run(|| spawn(|| 7).join().unwrap()), 7);
}

#[test]
fn a_fiber_that_catches_every_unwind_is_given_up() {
    let _turn = turn();
    child("child_catches_every_unwind");
}

#[test]
#[ignore = "run by a_fiber_given_up_keeps_its_buffer_safe"]
fn child_keeps_a_buffer() {
    if !is_child() {
        return;
    }
    let _turn = turn();
    for _ in 0..20 {
        let runtime = Runtime::builder()
            .shutdown_grace(Duration::ZERO)
            .build()
            .unwrap();
        let (left, right) = socketpair().unwrap();
        let (started, ready) = mpsc::channel();
        let stubborn = runtime.handle().spawn(move || {
            let mut buffer = [0; 4096];
            started.send(()).unwrap();
            loop {
                let _ = catch_unwind(AssertUnwindSafe(|| {
                    loop {
                        let _ = right.recv_into(&mut buffer);
                    }
                }));
            }
        });
        drop(stubborn.unwrap());
        await_all(&ready, 1);
        drop(runtime);
        // The socket lives on in the fiber's frames, and nothing of the kernel writes to them.
        left.sendall(&[7; 4096]).unwrap();
    }
    run(|| {
        for _ in 0..100 {
            let fiber = spawn(|| {
                [7_u8; 4096]
                    .iter()
                    .map(|byte| u64::from(*byte))
                    .sum::<u64>()
            });
            assert_eq!(fiber.join().unwrap(), 7 * 4096);
        }
    });
}

#[test]
fn a_fiber_given_up_keeps_its_buffer_safe() {
    let _turn = turn();
    child("child_keeps_a_buffer");
}

/// Its destructor shows that it ran.
struct Lent(Arc<AtomicUsize>);

impl Drop for Lent {
    fn drop(&mut self) {
        self.0.store(0, Ordering::SeqCst);
    }
}

thread_local!(static LENT: Lent = Lent(Arc::new(AtomicUsize::new(7))));

#[test]
#[ignore = "run by a_fiber_given_up_keeps_its_threads_locals"]
fn child_keeps_thread_locals() {
    if !is_child() {
        return;
    }
    let _turn = turn();
    let runtime = Runtime::builder()
        .shutdown_grace(Duration::ZERO)
        .build()
        .unwrap();
    let (started, ready) = mpsc::channel();
    // A fiber that borrows a thread-local for as long as it lives, and does not end.
    let stubborn = runtime.handle().spawn(move || {
        LENT.with(|lent| {
            started.send(lent.0.clone()).unwrap();
            loop {
                let _ = catch_unwind(|| {
                    let _ = sleep(1);
                    ringsock::yield_now();
                });
            }
        })
    });
    drop(stubborn.unwrap());
    let lent = ready.recv_timeout(Duration::from_secs(60)).unwrap();
    drop(runtime);
    // Nothing tells that a destructor will not come; one that comes does so while the thread ends, at once.
    for _ in 0..100 {
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(
            lent.load(Ordering::SeqCst),
            7,
            "a borrowed thread-local was dropped"
        );
    }
}

#[test]
fn a_fiber_given_up_keeps_its_threads_locals() {
    let _turn = turn();
    child("child_keeps_thread_locals");
}

// Dropped inside, spawned too late.

#[test]
fn a_runtime_dropped_in_its_own_fiber_ends_all_the_same() {
    let _turn = turn();
    let runtime = Runtime::builder().workers(2).build().unwrap();
    let handle = runtime.handle();
    let other = handle.spawn_on(1, || sleep(None)).unwrap();
    let (give, given) = mpsc::channel::<Runtime>();
    let fiber = handle.spawn_on(0, move || {
        drop(given.recv().unwrap());
        sleep(None)
    });
    give.send(runtime).unwrap();
    assert_eq!(fiber.unwrap().join().unwrap(), Err(Error::Shutdown));
    assert_eq!(other.join().unwrap(), Err(Error::Shutdown));
    assert!(matches!(handle.spawn(|| ()), Err(Error::Shutdown)));
}

#[test]
fn a_runtime_dropped_in_a_fiber_of_another_ends() {
    let _turn = turn();
    run(|| {
        let inner = Runtime::builder().build().unwrap();
        let fiber = inner.handle().spawn(|| sleep(None)).unwrap();
        drop(inner);
        assert_eq!(fiber.join().unwrap(), Err(Error::Shutdown));
    });
}

#[test]
fn spawn_after_the_end_is_shutdown() {
    let _turn = turn();
    let handle = run(|| Handle::current().unwrap());
    assert!(matches!(handle.spawn(|| ()), Err(Error::Shutdown)));
    let runtime = Runtime::builder().workers(2).build().unwrap();
    let handle = runtime.handle();
    drop(runtime);
    for worker in 0..2 {
        assert!(matches!(
            handle.spawn_on(worker, || ()),
            Err(Error::Shutdown)
        ));
    }
    assert!(handle.serve(("127.0.0.1", 0), |_, _| ()).is_err());
    // A handle of an ended runtime still reports.
    assert_eq!(handle.metrics().len(), 2);
}

#[test]
fn a_fiber_born_during_the_shutdown_is_told_at_its_first_call() {
    let _turn = turn();
    let told = Arc::new(AtomicUsize::new(0));
    let theirs = told.clone();
    run(move || {
        spawn(move || {
            assert_eq!(sleep(None), Err(Error::Shutdown));
            spawn(move || {
                assert_eq!(sleep(None), Err(Error::Shutdown));
                theirs.fetch_add(1, Ordering::SeqCst);
            });
        });
        yield_now();
    });
    assert_eq!(told.load(Ordering::SeqCst), 1);
}

#[test]
fn what_was_never_started_is_dropped_and_its_joiner_told() {
    /// Panics when it is dropped.
    struct Panics {
        _counted: Counted,
    }
    impl Drop for Panics {
        fn drop(&mut self) {
            if !thread::panicking() {
                panic!("in a destructor");
            }
        }
    }

    let _turn = turn();
    let dropped = Arc::new(AtomicUsize::new(0));
    let runtime = Runtime::builder().max_fibers(1).build().unwrap();
    let handle = runtime.handle();
    let (started, ready) = mpsc::channel();
    let first = handle.spawn(move || {
        started.send(()).unwrap();
        sleep(None)
    });
    await_all(&ready, 1);
    let waiting: Vec<JoinHandle<()>> = (0..5)
        .map(|_| {
            let panics = Panics {
                _counted: Counted(dropped.clone()),
            };
            handle.spawn(move || drop(panics)).unwrap()
        })
        .collect();
    drop(runtime);
    assert_eq!(first.unwrap().join().unwrap(), Err(Error::Shutdown));
    for fiber in waiting {
        // Started at the very end, or not at all.
        assert!(fiber.join().is_err());
    }
    assert_eq!(dropped.load(Ordering::SeqCst), 5);
}

#[test]
fn spawners_that_wait_for_room_are_told_of_the_end() {
    let _turn = turn();
    for _ in 0..100 {
        let runtime = Runtime::builder().inbox(1).max_fibers(1).build().unwrap();
        let handle = runtime.handle();
        let (started, ready) = mpsc::channel();
        let first = handle.spawn(move || {
            started.send(()).unwrap();
            sleep(None)
        });
        await_all(&ready, 1);
        let (done, ended) = mpsc::channel();
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let (handle, done) = (handle.clone(), done.clone());
                thread::spawn(move || {
                    if let Ok(fiber) = handle.spawn(|| ()) {
                        let _ = fiber.join();
                    }
                    done.send(()).unwrap();
                })
            })
            .collect();
        thread::yield_now();
        drop(runtime);
        assert_eq!(first.unwrap().join().unwrap(), Err(Error::Shutdown));
        await_all(&ended, 8);
        for thread in threads {
            thread.join().unwrap();
        }
    }
}

#[test]
fn spawns_that_race_with_the_end_leave_no_joiner_behind() {
    let _turn = turn();
    for _ in 0..100 {
        let runtime = Runtime::builder().build().unwrap();
        let ran = Arc::new(AtomicUsize::new(0));
        let (done, ended) = mpsc::channel();
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (handle, ran, done) = (runtime.handle(), ran.clone(), done.clone());
                thread::spawn(move || {
                    while let Ok(fiber) = handle.spawn(|| ()) {
                        if fiber.join().is_err() {
                            break;
                        }
                        ran.fetch_add(1, Ordering::SeqCst);
                    }
                    done.send(()).unwrap();
                })
            })
            .collect();
        while ran.load(Ordering::SeqCst) < 20 {
            thread::yield_now();
        }
        drop(runtime);
        await_all(&ended, 4);
        for thread in threads {
            thread.join().unwrap();
        }
    }
}

// Servers.

#[test]
fn stopping_a_server_serves_its_backlog_first() {
    let _turn = turn();
    for workers in [1, 2] {
        let served = Arc::new(AtomicUsize::new(0));
        let runtime = Runtime::builder().workers(workers).build().unwrap();
        let theirs = served.clone();
        let server = runtime
            .handle()
            .serve(("127.0.0.1", 0), move |conn, peer| {
                assert_eq!(conn.getpeername()?, peer);
                theirs.fetch_add(1, Ordering::SeqCst);
                conn.sendall(b"served")
            })
            .unwrap();
        let address = server.address().as_socket_addr().unwrap();
        let clients: Vec<TcpStream> = (0..50)
            .map(|_| TcpStream::connect(address).unwrap())
            .collect();
        server.stop();
        for mut client in clients {
            client
                .set_read_timeout(Some(Duration::from_secs(60)))
                .unwrap();
            let mut text = String::new();
            client.read_to_string(&mut text).unwrap();
            assert_eq!(text, "served");
        }
        assert_eq!(served.load(Ordering::SeqCst), 50);
        let refused = TcpStream::connect(address).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ECONNREFUSED));
    }
}

#[test]
fn a_unix_server_with_two_workers_serves_its_backlog_first() {
    let _turn = turn();
    let runtime = Runtime::builder().workers(2).build().unwrap();
    let name = format!("\0ringsock-shutdown-{}", std::process::id());
    let server = runtime
        .handle()
        .serve(&name, |conn, _peer| conn.sendall(b"served"))
        .unwrap();
    let clients: Vec<Socket> = (0..50)
        .map(|_| {
            let client = Socket::new(AF_UNIX, SOCK_STREAM, 0).unwrap();
            client.connect(server.address()).unwrap();
            client.settimeout(60).unwrap();
            client
        })
        .collect();
    server.stop();
    for client in clients {
        assert_eq!(client.recv_with(6, MSG_WAITALL).unwrap(), b"served");
        assert!(client.recv(1).unwrap().is_empty());
    }
}

#[test]
fn a_server_with_two_workers_uses_both() {
    let _turn = turn();
    let runtime = Runtime::builder().workers(2).build().unwrap();
    let server = runtime
        .handle()
        .serve(("127.0.0.1", 0), |conn, _peer| {
            let name = thread::current().name().unwrap().to_owned();
            conn.sendall(name.as_bytes())
        })
        .unwrap();
    let mut by_worker = [0; 2];
    for _ in 0..200 {
        let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
        client.connect(server.address()).unwrap();
        client.settimeout(60).unwrap();
        match &*client.recv_with(10, MSG_WAITALL).unwrap() {
            b"ringsock-0" => by_worker[0] += 1,
            b"ringsock-1" => by_worker[1] += 1,
            other => panic!("{}", other.escape_ascii()),
        }
    }
    println!("connections by worker: {by_worker:?}");
    assert!(by_worker[0] > 0 && by_worker[1] > 0, "{by_worker:?}");
    server.stop();
}

#[test]
fn a_panic_in_a_handler_ends_one_connection_only() {
    let _turn = turn();
    let before = logged("a handler panics on purpose");
    let runtime = Runtime::builder().build().unwrap();
    let server = runtime
        .handle()
        .serve(("127.0.0.1", 0), |conn, _peer| {
            if conn.recv(1)? == b"p" {
                panic!("a handler panics on purpose");
            }
            conn.sendall(b"fine")
        })
        .unwrap();
    for (request, expected) in [
        (b"p", &b""[..]),
        (b"q", b"fine"),
        (b"p", b""),
        (b"q", b"fine"),
    ] {
        let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
        client.connect(server.address()).unwrap();
        client.settimeout(60).unwrap();
        client.sendall(request).unwrap();
        assert_eq!(client.recv_with(4, MSG_WAITALL).unwrap(), expected);
    }
    server.stop();
    drop(runtime);
    assert_eq!(logged("a handler panics on purpose") - before, 2);
}

#[test]
fn a_server_ends_with_its_runtime() {
    let _turn = turn();
    let runtime = Runtime::builder().workers(2).build().unwrap();
    let server = runtime.handle().serve(("127.0.0.1", 0), |_, _| ()).unwrap();
    let address = server.address().as_socket_addr().unwrap();
    let waiter = thread::spawn(move || server.wait());
    drop(runtime);
    waiter.join().unwrap();
    assert!(TcpStream::connect(address).is_err());

    // And a server that nobody holds goes on until then.
    let address = run(|| {
        let server = serve(("127.0.0.1", 0), |conn, _| conn.sendall(b"x")).unwrap();
        let address = server.address().clone();
        drop(server);
        let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
        client.connect(&address).unwrap();
        assert_eq!(client.recv(1).unwrap(), b"x");
        address
    });
    let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    assert_eq!(
        client.connect(address).unwrap_err().errno(),
        Some(libc::ECONNREFUSED)
    );
}

#[test]
#[ignore = "run by a_server_out_of_descriptors_waits_and_goes_on"]
fn child_runs_out_of_descriptors() {
    if !is_child() {
        return;
    }
    let _turn = turn();
    let runtime = Runtime::builder().build().unwrap();
    let server = runtime
        .handle()
        .serve(("127.0.0.1", 0), |conn, _peer| {
            conn.sendall(b"hello")?;
            conn.recv(1).map(drop)
        })
        .unwrap();
    let clients: Vec<Socket> = (0..20)
        .map(|_| Socket::new(AF_INET, SOCK_STREAM, 0).unwrap())
        .collect();
    for client in &clients {
        client.settimeout(60).unwrap();
    }
    clients[0].connect(server.address()).unwrap();
    assert_eq!(clients[0].recv(5).unwrap(), b"hello");
    // Room for five more descriptors.
    let highest = clients.iter().map(Socket::fileno).max().unwrap();
    let limit = libc::rlimit {
        rlim_cur: highest as u64 + 6,
        rlim_max: highest as u64 + 6,
    };
    // SAFETY: it concerns this process only.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
    for client in &clients[1..] {
        client.connect(server.address()).unwrap();
    }
    let handle = runtime.handle();
    let enters_before = handle.metrics()[0].enters;
    let start = Instant::now();
    while logged("connections wait in the backlog") == 0 {
        assert!(start.elapsed() < Duration::from_secs(60));
        thread::yield_now();
    }
    // It pauses rather than spins, and as connections end, those that wait are served.
    for client in &clients[1..] {
        assert_eq!(client.recv(5).unwrap(), b"hello");
        client.close().unwrap();
    }
    let enters = handle.metrics()[0].enters - enters_before;
    assert!(enters < 5000, "{enters} enters");
    assert_eq!(logged("connections wait in the backlog"), 1);
    server.stop();
}

#[test]
fn a_server_out_of_descriptors_waits_and_goes_on() {
    let _turn = turn();
    child("child_runs_out_of_descriptors");
}

// Nothing is left behind.

#[test]
#[ignore = "run by runtimes_leave_nothing_behind"]
fn child_makes_200_runtimes() {
    if !is_child() {
        return;
    }
    let cycle = |n: usize| {
        if n.is_multiple_of(2) {
            let runtime = Runtime::builder().workers(2).build().unwrap();
            let handle = runtime.handle();
            let sleeping = handle.spawn(|| sleep(None)).unwrap();
            assert_eq!(handle.spawn(|| 7).unwrap().join().unwrap(), 7);
            drop(runtime);
            assert_eq!(sleeping.join().unwrap(), Err(Error::Shutdown));
        } else {
            let received = run(|| {
                let (left, right) = socketpair().unwrap();
                spawn(|| sleep(None));
                spawn(move || left.sendall(b"x"));
                right.recv(1).unwrap()
            });
            assert_eq!(received, b"x");
        }
    };
    (0..20).for_each(cycle);
    let before = (descriptors(), count("/proc/self/task"), mappings());
    (0..200).for_each(cycle);
    // A thread that was joined may need a moment to leave the list of tasks.
    let start = Instant::now();
    while count("/proc/self/task") > before.1 && start.elapsed() < Duration::from_secs(30) {
        thread::yield_now();
    }
    let after = (descriptors(), count("/proc/self/task"), mappings());
    println!("descriptors, threads, mappings: {before:?}, then {after:?}");
    assert_eq!(after.0, before.0);
    assert!(after.1 <= before.1);
    assert!(after.2 < before.2 + 40);
}

#[test]
fn runtimes_leave_nothing_behind() {
    let _turn = turn();
    child("child_makes_200_runtimes");
}
