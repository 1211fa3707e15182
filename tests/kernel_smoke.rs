//! The engine's essentials in one static program: what `tests/kernel_matrix.py` boots on other kernels, as the only process of a
//! virtual machine. `cargo test` runs it on this kernel.
//!
//! ```text
//!   driver: io_uring                              or   refused: one sentence that says what to change
//!   ok    echo over TCP
//!   FAIL  relay: …                                     (a check that panics, or that does not end within its time)
//!   verdict: pass | fail | refused
//! ```
//!
//! Where the ring is refused and a runtime starts all the same, it runs on another driver, and the checks have to pass there:
//! `driver: epoll`. Exit code 0 for `pass`, 1 for `fail`, 2 for `refused`.
#![allow(unsafe_code)]

use std::fs;
use std::io::{IoSlice, Write};
use std::os::fd::AsFd;
use std::panic::catch_unwind;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::*;
use ringsock::{
    RelayMode, RelayOptions, Runtime, create_server, recv_fds, relay, send_fds, sleep, socketpair,
    spawn, timeout, yield_now,
};

/// A check that has not ended by then hangs. (An emulated processor is some 20 times slower than a real one.)
const CHECK_LIMIT: Duration = Duration::from_secs(90);

/// What a clock may differ from another.
const EARLY: Duration = Duration::from_millis(1);

/// Trials of each race, if RINGSOCK_TRIALS does not say: enough to see what 5.10 does (25 of 300 receives lost data).
const TRIALS: usize = 300;

const CHECKS: &[(&str, fn())] = &[
    ("echo over TCP", echo_over_tcp),
    ("echo over Unix", echo_over_unix),
    ("echo on plain threads", echo_on_plain_threads),
    ("datagrams", datagrams),
    ("connect and accept", connect_and_accept),
    (
        "timeouts are neither early nor lossy",
        timeouts_are_not_early,
    ),
    ("receives around the deadline", receives_around_the_deadline),
    (
        "MSG_WAITALL around the deadline",
        waitall_around_the_deadline,
    ),
    ("sends around the deadline", sends_around_the_deadline),
    ("accepts around the deadline", accepts_around_the_deadline),
    ("close races", close_races),
    ("cancel", cancel),
    ("shutdown", shutdown),
    ("messages with descriptors", messages_with_descriptors),
    ("leases", leases),
    ("relay by copying", || relays(RelayMode::Copy)),
    ("relay by splicing", || relays(RelayMode::Splice)),
    ("two workers", two_workers),
];

fn main() -> ExitCode {
    let is_init = std::process::id() == 1;
    if is_init {
        prepare_machine();
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    say(&format!("kernel: {}", release.trim()));
    let code = run_checks();
    if is_init {
        end_machine();
    }
    ExitCode::from(code)
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // Nobody is left to tell if that fails.
    let _ = writeln!(out, "kernel_smoke: {line}");
    let _ = out.flush();
}

fn run_checks() -> u8 {
    match Runtime::builder().build() {
        Ok(runtime) => say(&format!("driver: {}", runtime.driver())),
        Err(error) => {
            say(&format!("refused: {error}"));
            say("verdict: refused");
            return 2;
        }
    }
    let before = descriptors();
    let mut failures = 0;
    for (name, check) in CHECKS {
        let start = Instant::now();
        match within(CHECK_LIMIT, *check) {
            Ok(()) => say(&format!(
                "ok    {name} ({} ms)",
                start.elapsed().as_millis()
            )),
            Err(why) => {
                failures += 1;
                say(&format!("FAIL  {name}: {why}"));
            }
        }
    }
    // Threads that have ended give their rings back a moment later.
    let start = Instant::now();
    while descriptors() > before + 1 && start.elapsed() < Duration::from_secs(10) {
        thread::sleep(Duration::from_millis(10));
    }
    // One more may stay: the descriptor that closed sockets' numbers are covered with.
    let left = descriptors().saturating_sub(before + 1);
    if failures == 0 && left > 0 {
        failures += 1;
        say(&format!("FAIL  {left} descriptors were not given back"));
    }
    say(&format!(
        "{} of {} checks passed",
        CHECKS.len() - failures.min(CHECKS.len()),
        CHECKS.len()
    ));
    say(if failures == 0 {
        "verdict: pass"
    } else {
        "verdict: fail"
    });
    u8::from(failures > 0)
}

/// Runs a check in a thread of its own: what it panicked with, or that it hangs.
fn within(limit: Duration, check: fn()) -> Result<(), String> {
    let (tell, told) = mpsc::channel();
    let thread = thread::spawn(move || {
        let result = catch_unwind(check).map_err(|payload| {
            let text = payload.downcast_ref::<String>().cloned();
            text.or_else(|| payload.downcast_ref::<&str>().map(|text| text.to_string()))
                .unwrap_or_else(|| "it panicked".to_owned())
        });
        let _ = tell.send(result);
    });
    match told.recv_timeout(limit) {
        Ok(result) => {
            let _ = thread.join();
            result
        }
        Err(_) => Err(format!("it has not ended within {} s", limit.as_secs())),
    }
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

fn trials() -> usize {
    let given = std::env::var("RINGSOCK_TRIALS").ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(TRIALS)
}

// The machine, where this is its first process.

fn prepare_machine() {
    for (kind, target) in [
        (c"proc", c"/proc"),
        (c"devtmpfs", c"/dev"),
        (c"tmpfs", c"/tmp"),
    ] {
        let _ = fs::create_dir_all(target.to_str().unwrap_or_default());
        // SAFETY: three strings that end with a zero and outlive the call.
        let mounted = unsafe {
            libc::mount(
                kind.as_ptr(),
                target.as_ptr(),
                kind.as_ptr(),
                0,
                std::ptr::null(),
            )
        };
        if mounted != 0 {
            say(&format!(
                "cannot mount {}: {}",
                target.to_string_lossy(),
                std::io::Error::last_os_error()
            ));
        }
    }
    // The loopback interface is down at first.
    // SAFETY: an ifreq of zeros is a valid one; its name and flags are filled in before the kernel reads them, and the descriptor is
    // this function's own.
    let up = unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        let up = libc::ioctl(fd, libc::SIOCSIFFLAGS as _, &raw const request);
        libc::close(fd);
        up
    };
    if up != 0 {
        say(&format!("no loopback: {}", std::io::Error::last_os_error()));
    }
}

fn end_machine() {
    // Whoever waits for the virtual machine has to see the last line.
    // SAFETY: no memory is passed; only the first process of a machine comes here.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_AUTOBOOT);
    }
}

// The checks. Each panics where something is wrong.

/// The byte at `offset` of a stream whose bytes tell a gap from a repetition.
fn pattern(offset: usize) -> u8 {
    (offset % 251) as u8
}

fn bytes_from(offset: usize, count: usize) -> Vec<u8> {
    (offset..offset + count).map(pattern).collect()
}

fn tcp_pair() -> (Socket, Socket) {
    let server = create_server(("127.0.0.1", 0)).unwrap();
    let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    client.connect(server.getsockname().unwrap()).unwrap();
    (client, server.accept().unwrap().0)
}

fn echo(socket: &Socket) {
    let mut buffer = [0; 4096];
    loop {
        match socket.recv_into(&mut buffer).unwrap() {
            0 => return,
            count => socket.sendall(&buffer[..count]).unwrap(),
        }
    }
}

/// Sends pieces of all sizes and expects each back.
fn converse(socket: &Socket, pieces: usize) {
    let mut offset = 0;
    let mut back = vec![0; 20_000];
    for piece in 0..pieces {
        let count = 1 + (piece * 7_919) % 20_000;
        socket.sendall(&bytes_from(offset, count)).unwrap();
        let mut received = 0;
        while received < count {
            let n = socket.recv_into(&mut back[..count - received]).unwrap();
            assert!(n > 0, "the end came early");
            assert_eq!(back[..n], bytes_from(offset + received, n)[..]);
            received += n;
        }
        offset += count;
    }
}

fn echo_between_fibers(pair: fn() -> (Socket, Socket), timeout_s: Option<f64>) {
    ringsock::run(move || {
        let fibers: Vec<_> = (0..16)
            .map(|_| {
                let (client, server) = pair();
                client.settimeout(timeout_s).unwrap();
                server.settimeout(timeout_s).unwrap();
                (
                    spawn(move || echo(&server)),
                    spawn(move || converse(&client, 20)),
                )
            })
            .collect();
        for (echo, client) in fibers {
            client.join().unwrap();
            echo.join().unwrap();
        }
    });
}

fn echo_over_tcp() {
    echo_between_fibers(tcp_pair, None);
    echo_between_fibers(tcp_pair, Some(60.0));
}

fn echo_over_unix() {
    echo_between_fibers(|| socketpair().unwrap(), None);
    echo_between_fibers(|| socketpair().unwrap(), Some(60.0));
}

fn echo_on_plain_threads() {
    for timeout_s in [None, Some(60.0)] {
        let (client, server) = tcp_pair();
        client.settimeout(timeout_s).unwrap();
        server.settimeout(timeout_s).unwrap();
        let server = thread::spawn(move || echo(&server));
        converse(&client, 20);
        drop(client);
        server.join().unwrap();
    }
}

fn datagrams() {
    ringsock::run(|| {
        let server = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
        server.bind(("127.0.0.1", 0)).unwrap();
        let address = server.getsockname().unwrap();
        let echo = spawn(move || {
            for _ in 0..100 {
                let (data, from) = server.recvfrom(2048).unwrap();
                server.sendto(&data, from.unwrap()).unwrap();
            }
        });
        let client = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
        client.settimeout(60).unwrap();
        for count in 0..100 {
            client
                .sendto(&bytes_from(count, count * 13), &address)
                .unwrap();
            let (data, from) = client.recvfrom(2048).unwrap();
            assert_eq!(data, bytes_from(count, count * 13));
            assert_eq!(from.as_ref(), Some(&address));
        }
        echo.join().unwrap();
    });
}

fn connect_and_accept() {
    ringsock::run(|| {
        let server = create_server(("127.0.0.1", 0)).unwrap();
        let address = server.getsockname().unwrap();
        let clients: Vec<_> = (0..100)
            .map(|_| {
                let address = address.clone();
                spawn(move || {
                    let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
                    client.settimeout(60).unwrap();
                    client.connect(&address).unwrap();
                    assert_eq!(client.recv(16).unwrap(), b"hello");
                })
            })
            .collect();
        for _ in 0..100 {
            let (conn, peer) = server.accept().unwrap();
            assert_eq!(conn.getpeername().unwrap(), peer);
            conn.sendall(b"hello").unwrap();
        }
        for client in clients {
            client.join().unwrap();
        }
        drop(server);
        let late = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
        let refused = late.connect(&address).unwrap_err();
        assert_eq!(refused.errno(), Some(libc::ECONNREFUSED), "{refused}");
    });
}

fn assert_times_out<T>(what: &str, call: impl FnOnce() -> ringsock::Result<T>) {
    let start = Instant::now();
    match call() {
        Err(Error::Timeout) => {}
        Err(error) => panic!("{what}: {error}"),
        Ok(_) => panic!("{what} did not time out"),
    }
    let took = start.elapsed();
    assert!(
        took + EARLY >= Duration::from_millis(50),
        "{what}: after {took:?}"
    );
}

fn timeouts_are_not_early() {
    fn in_one_world() {
        let (left, right) = socketpair().unwrap();
        right.settimeout(0.05).unwrap();
        assert_times_out("recv", || right.recv(16));
        assert_times_out("recv_into", || right.recv_into(&mut [0; 16]));
        left.sendall(b"x").unwrap();
        assert_eq!(right.recv(16).unwrap(), b"x");
        let chunk = vec![1; 1 << 20];
        left.settimeout(0.05).unwrap();
        assert_times_out("sendall", || left.sendall(&chunk));
        let server = create_server(("127.0.0.1", 0)).unwrap();
        server.settimeout(0.05).unwrap();
        assert_times_out("accept", || server.accept());
    }
    in_one_world();
    ringsock::run(|| {
        in_one_world();
        let (_left, right) = socketpair().unwrap();
        assert_times_out("timeout", || timeout(0.05, || right.recv(16)));
        let start = Instant::now();
        sleep(0.05).unwrap();
        assert!(start.elapsed() + EARLY >= Duration::from_millis(50));
    });
}

/// Both outcomes of a race, and the delay that meets the deadline.
struct Aim {
    delay_us: u64,
    state: u64,
}

const AIM_TIMEOUT_US: u64 = 3_000;

impl Aim {
    fn new() -> Aim {
        Aim {
            delay_us: AIM_TIMEOUT_US / 2,
            state: 0x9e37_79b9_7f4a_7c15,
        }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % bound
    }

    fn delay(&mut self) -> Duration {
        Duration::from_micros(self.delay_us.saturating_sub(100) + self.below(200))
    }

    fn learn(&mut self, timed_out: bool) {
        let step_us = self.below(120);
        self.delay_us = if timed_out {
            self.delay_us.saturating_sub(step_us)
        } else {
            (self.delay_us + step_us).min(2 * AIM_TIMEOUT_US)
        };
    }
}

/// Told to by a delay, a thread writes so many bytes of the pattern that much later.
fn writer(socket: Socket) -> (mpsc::Sender<(Duration, usize)>, thread::JoinHandle<()>) {
    let (tell, told) = mpsc::channel::<(Duration, usize)>();
    let thread = thread::spawn(move || {
        let mut offset = 0;
        for (delay, count) in told {
            let start = Instant::now();
            while start.elapsed() < delay {
                thread::yield_now();
            }
            // In two pieces, so that a receive of all of them is satisfied with a part at its deadline.
            let bytes = bytes_from(offset, count);
            socket.sendall(&bytes[..count / 2]).unwrap();
            socket.sendall(&bytes[count / 2..]).unwrap();
            offset += count;
        }
    });
    (tell, thread)
}

fn receives_race(flags: MsgFlags, in_fiber: bool) {
    let (socket, peer) = tcp_pair();
    let body = move || {
        let (tell, writer) = writer(peer);
        let mut aim = Aim::new();
        let (mut sent, mut received) = (0, 0);
        let mut buffer = [0; 64];
        for trial in 0..trials() {
            let count = 2 + aim.below(60) as usize;
            socket
                .settimeout(Duration::from_micros(AIM_TIMEOUT_US))
                .unwrap();
            tell.send((aim.delay(), count)).unwrap();
            sent += count;
            let mut timed_out = false;
            while received < sent {
                match socket.recv_into_with(&mut buffer, sent - received, flags) {
                    Ok(0) => panic!("trial {trial}: the end"),
                    Ok(n) => {
                        assert_eq!(
                            buffer[..n],
                            bytes_from(received, n)[..],
                            "trial {trial}: lost, doubled or out of order"
                        );
                        received += n;
                    }
                    Err(Error::Timeout) => {
                        assert!(!timed_out, "trial {trial}: {} bytes lost", sent - received);
                        timed_out = true;
                        socket.settimeout(30).unwrap();
                    }
                    Err(error) => panic!("trial {trial}: {error}"),
                }
            }
            aim.learn(timed_out);
        }
        drop(tell);
        writer.join().unwrap();
    };
    if in_fiber {
        ringsock::run(body);
    } else {
        body();
    }
}

fn receives_around_the_deadline() {
    receives_race(MsgFlags::default(), false);
    receives_race(MsgFlags::default(), true);
}

fn waitall_around_the_deadline() {
    receives_race(MSG_WAITALL, false);
    receives_race(MSG_WAITALL, true);
}

fn sends_around_the_deadline() {
    ringsock::run(|| {
        let mut aim = Aim::new();
        let data = bytes_from(0, 200_000);
        for trial in 0..trials() / 3 {
            let (socket, peer) = socketpair().unwrap();
            socket.setsockopt(SOL_SOCKET, SO_SNDBUF, 4096).unwrap();
            let delay = aim.delay();
            let drainer = spawn(move || {
                sleep(delay).unwrap();
                let mut received = Vec::new();
                let mut buffer = [0; 16_384];
                loop {
                    match peer.recv_into(&mut buffer).unwrap() {
                        0 => return received,
                        n => received.extend_from_slice(&buffer[..n]),
                    }
                }
            });
            socket
                .settimeout(Duration::from_micros(AIM_TIMEOUT_US))
                .unwrap();
            let mut sent = 0;
            let mut timed_out = false;
            while sent < data.len() && !timed_out {
                match socket.send(&data[sent..]) {
                    Ok(n) => sent += n,
                    Err(Error::Timeout) => timed_out = true,
                    Err(error) => panic!("trial {trial}: {error}"),
                }
            }
            drop(socket);
            let received = drainer.join().unwrap();
            assert!(
                received == data[..sent],
                "trial {trial}: {sent} bytes reported, {} received",
                received.len()
            );
            aim.learn(timed_out);
        }
    });
}

fn accepts_around_the_deadline() {
    ringsock::run(|| {
        let server = create_server(("127.0.0.1", 0)).unwrap();
        let address = server.getsockname().unwrap();
        let mut aim = Aim::new();
        for trial in 0..trials() / 3 {
            let address = address.clone();
            let delay = aim.delay();
            let client = spawn(move || {
                sleep(delay).unwrap();
                let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
                client.connect(&address).unwrap();
                client.sendall(&(trial as u32).to_le_bytes()).unwrap();
                client
            });
            server
                .settimeout(Duration::from_micros(AIM_TIMEOUT_US))
                .unwrap();
            let first = server.accept();
            let timed_out = first.is_err();
            let (conn, _) = first.unwrap_or_else(|error| {
                assert_eq!(error, Error::Timeout, "trial {trial}");
                server.settimeout(30).unwrap();
                server.accept().expect("no connection is lost")
            });
            assert_eq!(conn.recv(4).unwrap(), (trial as u32).to_le_bytes());
            drop(client.join().unwrap());
            aim.learn(timed_out);
        }
    });
}

fn close_races() {
    // A thread's close ends the receive of another, whatever is first; the peer sees the end, and a duplicate works on.
    for trial in 0..trials() / 3 {
        let (socket, peer) = tcp_pair();
        let reader = socket.clone();
        let reader = thread::spawn(move || reader.recv(16));
        if trial % 2 == 0 {
            thread::yield_now();
        } else {
            thread::sleep(Duration::from_micros(200));
        }
        socket.close().unwrap();
        let ended = reader.join().unwrap();
        assert!(
            ended.as_ref().is_err_and(|error| error.is_closed()),
            "trial {trial}: {ended:?}"
        );
        peer.settimeout(30).unwrap();
        assert!(peer.recv(16).unwrap().is_empty(), "trial {trial}: no end");
    }
    ringsock::run(|| {
        for trial in 0..trials() / 3 {
            let (socket, peer) = tcp_pair();
            let double = socket.dup().unwrap();
            let reader = socket.clone();
            let reader = spawn(move || reader.recv(16));
            if trial % 2 == 0 {
                yield_now();
            }
            socket.close().unwrap();
            assert!(reader.join().unwrap().unwrap_err().is_closed());
            assert_eq!(socket.fileno(), -1);
            peer.sendall(b"still there").unwrap();
            assert_eq!(double.recv(16).unwrap(), b"still there");
        }
    });
}

fn cancel() {
    ringsock::run(|| {
        let (left, right) = tcp_pair();
        for _ in 0..trials() / 3 {
            let reader = right.clone();
            let fiber = spawn(move || reader.recv(16));
            yield_now();
            fiber.cancel();
            assert_eq!(fiber.join().unwrap().unwrap_err(), Error::Cancelled);
        }
        // What is sent afterwards is the next receive's.
        left.sendall(b"kept").unwrap();
        assert_eq!(right.recv(16).unwrap(), b"kept");
        let sleeper = spawn(|| sleep(None));
        yield_now();
        sleeper.cancel();
        assert_eq!(sleeper.join().unwrap(), Err(Error::Cancelled));
    });
}

fn shutdown() {
    let (tell, told) = mpsc::channel();
    ringsock::run(move || {
        let (left, right) = tcp_pair();
        let reader = right.clone();
        let reader = spawn(move || reader.recv(16));
        yield_now();
        right.shutdown(SHUT_RDWR).unwrap();
        assert!(reader.join().unwrap().unwrap().is_empty());
        assert!(left.recv(16).unwrap().is_empty());
        // The runtime ends with fibers that wait.
        for _ in 0..50 {
            let tell = tell.clone();
            spawn(move || {
                let (_left, right) = socketpair().unwrap();
                tell.send(right.recv(16).unwrap_err()).unwrap();
            });
        }
        yield_now();
    });
    let ends: Vec<Error> = told.iter().collect();
    assert_eq!(ends, vec![Error::Shutdown; 50]);
}

fn messages_with_descriptors() {
    ringsock::run(|| {
        let (left, right) = socketpair().unwrap();
        let (inner, outer) = socketpair().unwrap();
        let receiver = spawn(move || recv_fds(&right, 16, 1).unwrap());
        yield_now();
        send_fds(&left, &[IoSlice::new(b"take this")], &[inner.as_fd()]).unwrap();
        let (data, mut fds, ..) = receiver.join().unwrap();
        assert_eq!(&data[..], b"take this");
        let inner = Socket::from_fd(fds.pop().expect("a descriptor")).unwrap();
        inner.sendall(b"passed on").unwrap();
        assert_eq!(outer.recv(16).unwrap(), b"passed on");
    });
}

fn leases() {
    ringsock::run(|| {
        let (left, right) = tcp_pair();
        let writer = spawn(move || {
            for piece in 0..50 {
                left.sendall(&bytes_from(piece * 1_000, 1_000)).unwrap();
            }
        });
        let mut received = 0;
        let mut held = Vec::new();
        while received < 20_000 {
            let data = right.recv(777).unwrap();
            assert_eq!(data[..], bytes_from(received, data.len())[..]);
            received += data.len();
            held.push(data);
        }
        for chunk in right.chunks() {
            let chunk = chunk.unwrap();
            assert_eq!(chunk[..], bytes_from(received, chunk.len())[..]);
            received += chunk.len();
        }
        assert_eq!(received, 50_000);
        writer.join().unwrap();
        // A lease given away uncopied.
        let (left, right) = tcp_pair();
        for data in held {
            let expected = data.to_vec();
            left.sendall_buf(data).unwrap();
            let back = right.recv_with(expected.len(), MSG_WAITALL).unwrap();
            assert_eq!(back[..], expected[..]);
        }
        let server = create_server(("127.0.0.1", 0)).unwrap();
        let address = server.getsockname().unwrap();
        let clients = spawn(move || {
            (0..20)
                .map(|_| {
                    let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
                    client.connect(&address).unwrap();
                    client
                })
                .collect::<Vec<_>>()
        });
        let accepted: Vec<_> = server.incoming().take(20).map(Result::unwrap).collect();
        assert_eq!(accepted.len(), 20);
        drop(clients.join().unwrap());
    });
}

fn relays(mode: RelayMode) {
    ringsock::run(move || {
        let (client, a) = tcp_pair();
        let (b, server) = tcp_pair();
        let bytes = 2 << 20;
        let relayed = spawn(move || {
            let options = RelayOptions {
                mode,
                ..Default::default()
            };
            relay(&a, &b, &options).unwrap()
        });
        let echo = spawn(move || {
            echo(&server);
            server.shutdown(SHUT_WR).unwrap();
        });
        let sender = client.clone();
        let sender = spawn(move || {
            sender.sendall(&bytes_from(0, bytes)).unwrap();
            sender.shutdown(SHUT_WR).unwrap();
        });
        let mut received = 0;
        let mut buffer = vec![0; 65_536];
        loop {
            let n = client.recv_into(&mut buffer).unwrap();
            if n == 0 {
                break;
            }
            assert!(buffer[..n] == bytes_from(received, n)[..], "at {received}");
            received += n;
        }
        assert_eq!(received, bytes);
        sender.join().unwrap();
        echo.join().unwrap();
        let relayed = relayed.join().unwrap();
        assert_eq!(
            (relayed.a_to_b, relayed.b_to_a),
            (bytes as u64, bytes as u64)
        );
    });
}

fn two_workers() {
    let runtime = Runtime::builder().workers(2).build().unwrap();
    let handle = runtime.handle();
    let server = create_server(("127.0.0.1", 0)).unwrap();
    let address = server.getsockname().unwrap();
    let echoes = handle
        .spawn_on(0, move || {
            let echoes: Vec<_> = (0..10)
                .map(|_| {
                    let (conn, _) = server.accept().unwrap();
                    spawn(move || echo(&conn))
                })
                .collect();
            for echo in echoes {
                echo.join().unwrap();
            }
        })
        .unwrap();
    let clients: Vec<_> = (0..10)
        .map(|_| {
            let address = address.clone();
            let talk = move || {
                let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
                client.connect(&address).unwrap();
                converse(&client, 5);
            };
            handle.spawn_on(1, talk).unwrap()
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    echoes.join().unwrap();
    // Closed from one worker while the other one receives.
    let (socket, _peer) = socketpair().unwrap();
    let reader = socket.clone();
    let reader = handle.spawn_on(0, move || reader.recv(16)).unwrap();
    let closer = handle
        .spawn_on(1, move || {
            sleep(0.01).unwrap();
            socket.close().unwrap();
        })
        .unwrap();
    closer.join().unwrap();
    assert!(reader.join().unwrap().unwrap_err().is_closed());
}
