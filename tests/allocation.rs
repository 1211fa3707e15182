//! What a steady exchange costs: no allocation, and on a plain thread one system call for each call that waits.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use ringsock::prelude::*;
use ringsock::{Datagrams, run, socketpair, spawn};

/// Says that this process is a child made for one test.
const CHILD: &str = "RINGSOCK_TEST_CHILD";

/// No child process lives longer, in seconds.
const CHILD_LIMIT_S: u32 = 100;

const ROUNDS: usize = 10_000;
const WARM_UP: usize = 200;

struct Counting;

thread_local! {
    /// Allocations and reallocations of this thread.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count_one() {
    // The key has no destructor and needs no allocation, so this works at any moment of a thread's life.
    ALLOCATIONS.set(ALLOCATIONS.get() + 1);
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count_one();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count_one();
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count_one();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// How often `work` allocates on this thread.
fn allocations(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

fn connected() -> (Socket, Socket) {
    let listener = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    listener.bind(("127.0.0.1", 0)).unwrap();
    listener.listen(1).unwrap();
    let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    client.connect(listener.getsockname().unwrap()).unwrap();
    client
        .setsockopt(ringsock::IPPROTO_TCP, ringsock::TCP_NODELAY, 1)
        .unwrap();
    let (conn, _peer) = listener.accept().unwrap();
    conn.setsockopt(ringsock::IPPROTO_TCP, ringsock::TCP_NODELAY, 1)
        .unwrap();
    (client, conn)
}

fn echo(conn: &Socket) {
    let mut buffer = [0; 256];
    loop {
        match conn.recv_into(&mut buffer).unwrap() {
            0 => return,
            n => conn.sendall(&buffer[..n]).unwrap(),
        }
    }
}

fn exchange(conn: &Socket, rounds: usize) {
    let mut buffer = [0; 64];
    for _ in 0..rounds {
        conn.sendall(&[7; 64]).unwrap();
        let mut got = 0;
        while got < buffer.len() {
            match conn.recv_into(&mut buffer[got..]).unwrap() {
                0 => panic!("the echo ended early"),
                n => got += n,
            }
        }
    }
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(7)))), 1);
    assert_eq!(allocations(|| ()), 0);
}

/// Echoes between two fibers; the worker is this thread.
fn check_fibers(pair: fn() -> (Socket, Socket), timeout: Option<f64>) {
    check_fibers_with(pair, timeout, echo);
}

fn check_fibers_with(pair: fn() -> (Socket, Socket), timeout: Option<f64>, echo: fn(&Socket)) {
    run(move || {
        let (left, right) = pair();
        left.settimeout(timeout).unwrap();
        right.settimeout(timeout).unwrap();
        let echoing = spawn(move || echo(&right));
        exchange(&left, WARM_UP);
        let count = allocations(|| exchange(&left, ROUNDS));
        assert_eq!(
            count, 0,
            "allocations in {ROUNDS} echoes, timeout {timeout:?}"
        );
        left.shutdown(SHUT_WR).unwrap();
        echoing.join().unwrap();
    });
}

#[test]
fn echoes_between_fibers_over_a_socketpair_allocate_nothing() {
    check_fibers(|| socketpair().unwrap(), None);
    check_fibers(|| socketpair().unwrap(), Some(30.0));
}

#[test]
fn echoes_between_fibers_over_tcp_allocate_nothing() {
    check_fibers(connected, None);
    check_fibers(connected, Some(30.0));
}

#[test]
fn echoes_of_leases_allocate_nothing() {
    fn echo(conn: &Socket) {
        for chunk in conn.chunks() {
            let chunk = chunk.unwrap();
            assert!(chunk.is_lease());
            conn.sendall_buf(chunk).unwrap();
        }
    }
    check_fibers_with(|| socketpair().unwrap(), None, echo);
    check_fibers_with(|| socketpair().unwrap(), Some(30.0), echo);
    check_fibers_with(connected, None, echo);
}

#[test]
fn batches_and_segments_of_datagrams_allocate_nothing() {
    fn udp() -> Socket {
        let socket = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
        socket.bind(("127.0.0.1", 0)).unwrap();
        socket.set_udp_gro(true).unwrap();
        socket.settimeout(30.0).unwrap();
        socket
    }
    run(|| {
        let (server, client) = (udp(), udp());
        let to = server.getsockname().unwrap();
        let echoing = server.clone();
        spawn(move || {
            let mut batch = Datagrams::new(8, 65_535);
            while echoing.recv_many(&mut batch).is_ok() {
                echoing.send_many(&batch).unwrap();
            }
        });
        let mut buffer = vec![0; 65_535];
        let mut exchange = |rounds| {
            for _ in 0..rounds {
                client.sendto_segmented(&[7; 1_000], 90, &to).unwrap();
                let mut received = 0;
                while received < 12 {
                    received += client.recv_segments(&mut buffer).unwrap().len();
                }
            }
        };
        exchange(WARM_UP);
        assert_eq!(allocations(|| exchange(1_000)), 0);
        server.close().unwrap();
    });
}

#[test]
fn many_fibers_at_once_allocate_nothing() {
    run(|| {
        let pairs: Vec<_> = (0..50).map(|_| socketpair().unwrap()).collect();
        let mut clients = Vec::new();
        let warm = std::rc::Rc::new(Cell::new(0));
        let counted = std::rc::Rc::new(Cell::new(None));
        for (left, right) in pairs {
            spawn(move || echo(&right));
            let (warm, counted) = (warm.clone(), counted.clone());
            clients.push(spawn(move || {
                exchange(&left, 100);
                warm.set(warm.get() + 1);
                while warm.get() < 50 {
                    ringsock::yield_now();
                }
                // From the first that goes on to the first that ends, all fifty do nothing but echo.
                let before = ALLOCATIONS.get();
                exchange(&left, 200);
                if counted.get().is_none() {
                    counted.set(Some(ALLOCATIONS.get() - before));
                }
            }));
        }
        for client in clients {
            client.join().unwrap();
        }
        assert_eq!(counted.get(), Some(0));
    });
}

#[test]
fn failed_calls_allocate_nothing() {
    fn fail() {
        let (left, right) = socketpair().unwrap();
        right.settimeout(1e-6).unwrap();
        left.setblocking(false).unwrap();
        let mut buffer = [0; 16];
        let mut fail = |rounds| {
            for _ in 0..rounds {
                assert_eq!(right.recv_into(&mut buffer), Err(Error::Timeout));
                assert!(left.recv_into(&mut buffer).unwrap_err().is_would_block());
            }
        };
        fail(100);
        assert_eq!(allocations(|| fail(1000)), 0);
    }
    fail();
    run(fail);
}

/// Echoes between plain threads; the counted one is this.
fn check_threads(pair: fn() -> (Socket, Socket), timeout: Option<f64>) {
    let (left, right) = pair();
    left.settimeout(timeout).unwrap();
    right.settimeout(timeout).unwrap();
    let (counted, count) = mpsc::channel();
    let echoing = thread::spawn(move || {
        exchange(&right, WARM_UP);
        counted
            .send(allocations(|| exchange(&right, ROUNDS)))
            .unwrap();
    });
    let other = left.clone();
    let answering = thread::spawn(move || echo(&other));
    let count = count
        .recv_timeout(Duration::from_secs(100))
        .expect("the echoes come to an end");
    assert_eq!(
        count, 0,
        "allocations in {ROUNDS} echoes, timeout {timeout:?}"
    );
    left.shutdown(SHUT_RDWR).unwrap();
    echoing.join().unwrap();
    answering.join().unwrap();
}

#[test]
fn echoes_between_threads_allocate_nothing() {
    check_threads(|| socketpair().unwrap(), None);
    check_threads(|| socketpair().unwrap(), Some(30.0));
    check_threads(connected, Some(30.0));
}

// System calls.

const CALLS: usize = 1000;

/// A system call that nothing else here makes.
fn mark() {
    // SAFETY: it has no arguments and no effect.
    unsafe { libc::syscall(libc::SYS_getppid) };
}

#[test]
#[ignore = "run by a_waiting_receive_on_a_thread_is_one_system_call"]
fn child_receives_between_marks() {
    let Ok(part) = std::env::var(CHILD) else {
        return;
    };
    // SAFETY: it concerns this process only.
    unsafe { libc::alarm(CHILD_LIMIT_S) };
    let (left, right) = match part.contains("tcp") {
        true => connected(),
        false => socketpair().unwrap(),
    };
    let timeout = part.contains("timed").then_some(30.0);
    left.settimeout(timeout).unwrap();
    right.settimeout(timeout).unwrap();
    let mut buffer = [0; 16];
    left.sendall(&[7; 16 * (CALLS + 1)]).unwrap();
    assert_eq!(right.recv_into(&mut buffer).unwrap(), 16);
    if part.contains("send") {
        mark();
        for _ in 0..CALLS {
            left.sendall(&buffer).unwrap();
        }
        mark();
        return;
    }
    mark();
    for _ in 0..CALLS {
        assert_eq!(right.recv_into(&mut buffer).unwrap(), 16);
    }
    mark();
}

fn strace() -> Option<&'static Path> {
    ["/usr/bin/strace", "/bin/strace", "/usr/local/bin/strace"]
        .into_iter()
        .map(Path::new)
        .find(|path| path.is_file())
}

/// The names of the system calls between the two marks, in the trace of the thread that made them.
fn between_marks(trace: &str) -> Vec<&str> {
    let mark = trace
        .lines()
        .find(|line| line.contains("getppid("))
        .expect("the trace has a mark");
    let thread = mark.split_whitespace().next();
    let mut lines = trace
        .lines()
        .filter(|line| line.split_whitespace().next() == thread)
        .filter(|line| !line.contains(" resumed>"))
        .skip_while(|line| !line.contains("getppid("))
        .skip(1);
    let mut calls = Vec::new();
    for line in lines.by_ref() {
        let call = line.split_whitespace().nth(1).unwrap_or_default();
        let name = call.split('(').next().unwrap_or_default();
        if name == "getppid" {
            return calls;
        }
        calls.push(name);
    }
    panic!("the trace has no second mark");
}

/// `None` where there is no strace, or it may not trace.
fn trace(strace: &Path, part: &str) -> Option<String> {
    let file: PathBuf =
        std::env::temp_dir().join(format!("ringsock-trace-{}-{part}", std::process::id()));
    let output = Command::new(strace)
        .args(["-f", "-e", "trace=all", "-o"])
        .arg(&file)
        .arg(std::env::current_exe().expect("a running program has a path"))
        .args([
            "--exact",
            "child_receives_between_marks",
            "--ignored",
            "--nocapture",
        ])
        .env(CHILD, part)
        .output()
        .expect("strace starts");
    let trace = std::fs::read_to_string(&file).unwrap_or_default();
    let _ = std::fs::remove_file(&file);
    let stderr = String::from_utf8_lossy(&output.stderr);
    if stderr.contains("ptrace") && stderr.contains("Operation not permitted") {
        return None;
    }
    assert!(output.status.success(), "{:?}\n{stderr}", output.status);
    Some(trace)
}

#[test]
fn a_waiting_receive_on_a_thread_is_one_system_call() {
    if std::env::var("RINGSOCK_DRIVER").is_ok_and(|driver| driver == "epoll") {
        println!("skipped: RINGSOCK_DRIVER=epoll: there it is four: try, arm, wait, receive");
        return;
    }
    let Some(strace) = strace() else {
        println!("skipped: strace is not installed");
        return;
    };
    for part in [
        "timed",
        "blocking",
        "timed-tcp",
        "timed-send-tcp",
        "blocking-send-tcp",
    ] {
        let Some(trace) = trace(strace, part) else {
            println!("skipped: strace may not trace here");
            return;
        };
        let calls = between_marks(&trace);
        let enters = calls
            .iter()
            .filter(|call| **call == "io_uring_enter")
            .count();
        let others: Vec<_> = calls
            .iter()
            .filter(|call| **call != "io_uring_enter")
            .collect();
        assert!(others.is_empty(), "{part}: {others:?}");
        assert_eq!(enters, CALLS, "{part}");
    }
}
