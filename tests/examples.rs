//! The example programs, as their users run them: against Python, netcat and plain Rust sockets.
#![allow(unsafe_code)]

mod support;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::{AF_INET, SOCK_STREAM, Socket};
use support::{
    EchoServer, Endpoint, Family, Finished, Network, Process, Random, Stream, TempDir, eventually,
    example, has_python, limit_descriptors, run, run_example, seed, skipped_on_epoll, turn,
};

const MIB: usize = 1 << 20;

/// The arguments of `echo_server` for so many workers.
fn workers(count: usize) -> [&'static str; 2] {
    ["--workers", ["1", "2"][count - 1]]
}

/// It ended with this code, and said one line that starts like this on standard error.
fn assert_refused(finished: &Finished, code: i32, start: &str) {
    assert_eq!(finished.status.code(), Some(code), "{finished:?}");
    assert!(finished.stdout.is_empty(), "{finished:?}");
    assert!(finished.stderr.starts_with(start), "{finished:?}");
    assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
}

// Every byte comes back.

/// Several connections at once send random chunks, end their side, and read to the end.
const PYTHON_CLIENT: &str = r#"
import hashlib, random, socket, sys, threading

family, host, port, seed, connections, size = sys.argv[1:]
connections, size = int(connections), int(size)
failures = []
everyone = threading.Barrier(connections)

def connect():
    if family == 'Unix':
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address = host
    else:
        s = socket.socket(socket.AF_INET6 if family == 'V6' else socket.AF_INET, socket.SOCK_STREAM)
        address = (host, int(port))
    s.settimeout(120)
    s.connect(address)
    return s

def send(s, numbers, sent):
    left = size
    while left:
        # Small chunks as often as large ones: 1 B to 1 MiB.
        n = min(left, numbers.randint(1, 2 ** numbers.randint(0, 20)))
        chunk = numbers.randbytes(n)
        sent.update(chunk)
        s.sendall(chunk)
        left -= n
    s.shutdown(socket.SHUT_WR)

def talk(number):
    try:
        s = connect()
        everyone.wait(120)
        sent, received, total = hashlib.sha256(), hashlib.sha256(), 0
        numbers = random.Random('%s/%d' % (seed, number))
        sender = threading.Thread(target=send, args=(s, numbers, sent))
        sender.start()
        while True:
            data = s.recv(65536)
            if not data:
                break
            received.update(data)
            total += len(data)
        sender.join()
        if total != size or sent.digest() != received.digest():
            failures.append('connection %d: %d bytes of %d came back, %s' % (
                number, total, size, 'changed' if total == size else 'not all'))
        s.close()
    except Exception as error:
        failures.append('connection %d: %r' % (number, error))

threads = [threading.Thread(target=talk, args=(n,)) for n in range(connections)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print('\n'.join(failures) or 'all came back')
sys.exit(bool(failures))
"#;

fn python_gets_every_byte_back(family: Family, count: usize) {
    if !has_python() {
        return;
    }
    let Some(server) = EchoServer::start(family, &workers(count)) else {
        return;
    };
    let (host, port) = match &server.endpoint {
        Endpoint::Tcp(address) => (address.ip().to_string(), address.port()),
        Endpoint::Unix(path) => (path.display().to_string(), 0),
    };
    let mut client = Command::new("python3");
    client
        .args(["-", &format!("{family:?}"), &host])
        .args([port.to_string(), seed().to_string()])
        .args(["8", &(3 * MIB).to_string()]);
    let finished = run(&mut client, PYTHON_CLIENT.as_bytes());
    assert!(finished.status.success(), "{finished:?}");
    assert_eq!(finished.stdout, b"all came back\n");
    server.finish();
}

#[test]
fn python_gets_every_byte_back_over_ipv4_from_one_worker() {
    python_gets_every_byte_back(Family::V4, 1);
}

#[test]
fn python_gets_every_byte_back_over_ipv4_from_two_workers() {
    python_gets_every_byte_back(Family::V4, 2);
}

#[test]
fn python_gets_every_byte_back_over_ipv6_from_one_worker() {
    python_gets_every_byte_back(Family::V6, 1);
}

#[test]
fn python_gets_every_byte_back_over_ipv6_from_two_workers() {
    python_gets_every_byte_back(Family::V6, 2);
}

#[test]
fn python_gets_every_byte_back_over_unix_from_one_worker() {
    python_gets_every_byte_back(Family::Unix, 1);
}

#[test]
fn python_gets_every_byte_back_over_unix_from_two_workers() {
    python_gets_every_byte_back(Family::Unix, 2);
}

/// Sends `size` random bytes while it reads, and compares what comes back with the same random bytes made anew.
fn exchange(stream: &Stream, mut numbers: Random, size: usize) {
    const STEP: usize = 64 * 1024;
    let mut expected = numbers.clone();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut stream = stream;
            let mut left = size;
            while left > 0 {
                let chunk = numbers.bytes(left.min(STEP));
                stream.write_all(&chunk).expect("sending");
                left -= chunk.len();
            }
            stream.half_close().expect("shutdown");
        });
        let mut stream = stream;
        let mut left = size;
        while left > 0 {
            let chunk = expected.bytes(left.min(STEP));
            let mut back = vec![0; chunk.len()];
            stream.read_exact(&mut back).expect("receiving");
            assert!(
                back == chunk,
                "other bytes came back, {left} bytes before the end"
            );
            left -= chunk.len();
        }
        assert_eq!(
            stream.read(&mut [0; 16]).expect("the end"),
            0,
            "more than was sent came back"
        );
    });
}

fn two_hundred_connections_get_every_byte_back(family: Family, count: usize) {
    let Some(server) = EchoServer::start(family, &workers(count)) else {
        return;
    };
    let seed = seed();
    let mut numbers = Random::new(seed);
    // Half of the sizes spread evenly, half over the powers of two.
    let sizes = (0..200).map(|index| match index % 2 {
        0 => numbers.up_to(MIB),
        _ => {
            let most = 1 << numbers.up_to(20);
            numbers.up_to(most)
        }
    });
    let mut budget = 64 * MIB;
    let connections: Vec<_> = sizes
        .map(|size| {
            let size = size.min(budget.max(1));
            budget = budget.saturating_sub(size);
            (server.connect(), size)
        })
        .collect();
    let everyone = Barrier::new(connections.len());
    thread::scope(|scope| {
        for (number, (stream, size)) in connections.iter().enumerate() {
            let everyone = &everyone;
            let numbers = Random::new(seed ^ ((number as u64 + 1) << 40));
            scope.spawn(move || {
                everyone.wait();
                exchange(stream, numbers, *size);
            });
        }
    });
    server.finish();
}

#[test]
fn two_hundred_connections_get_every_byte_back_from_one_worker() {
    two_hundred_connections_get_every_byte_back(Family::V4, 1);
}

#[test]
fn two_hundred_connections_get_every_byte_back_from_two_workers() {
    two_hundred_connections_get_every_byte_back(Family::V4, 2);
}

#[test]
fn two_hundred_connections_get_every_byte_back_over_unix() {
    two_hundred_connections_get_every_byte_back(Family::Unix, 2);
}

#[test]
fn a_buffer_of_any_size_gives_every_byte_back() {
    for bytes in ["1", "4095", "4096", "4097", "1000000"] {
        let server = EchoServer::start(Family::V4, &["--buffer", bytes]).expect("IPv4");
        // A buffer of one byte takes two operations a byte.
        let size = if bytes == "1" { 20_000 } else { 2 * MIB };
        exchange(&server.connect(), Random::new(seed()), size);
        server.finish();
    }
}

#[test]
fn netcat_gets_its_input_back_and_ends() {
    let help = Command::new("nc").arg("-h").output();
    let text = help.map_or(Vec::new(), |output| [output.stdout, output.stderr].concat());
    if !String::from_utf8_lossy(&text).contains("OpenBSD netcat") {
        println!("skipped: there is no OpenBSD netcat");
        return;
    }
    let input = Random::new(seed()).bytes(MIB);
    for family in [Family::V4, Family::V6, Family::Unix] {
        let Some(server) = EchoServer::start(family, &[]) else {
            continue;
        };
        let mut client = Command::new("nc");
        match &server.endpoint {
            Endpoint::Tcp(address) => client
                .args(["-N", &address.ip().to_string()])
                .arg(address.port().to_string()),
            Endpoint::Unix(path) => client.arg("-NU").arg(path),
        };
        let finished = run(&mut client, &input);
        assert!(finished.status.success(), "{finished:?}");
        assert!(
            finished.stdout == input,
            "other bytes came back: {finished:?}"
        );
        server.finish();
    }
}

// Ten thousand connections.

/// How many connections at once this process may have, at most 10,000. It raises the limit as far as it may.
fn connections_at_once() -> usize {
    const WANTED: usize = 10_000;
    let (_, limit) = ringsock::raise_descriptor_limit().expect("a limit of open descriptors");
    // As much again stays for the tests beside this one.
    let count = WANTED.min(limit as usize / 2);
    if count < WANTED {
        println!("{count} connections rather than {WANTED}: the hard limit is {limit} descriptors");
    }
    count
}

fn message(number: usize) -> [u8; 64] {
    let mut message = [b'.'; 64];
    message[..8].copy_from_slice(&(number as u64).to_le_bytes());
    message
}

/// Opens `count` connections, writes 64 bytes on each, then reads them back on each.
fn echo_once_on_each_of(server: &EchoServer, count: usize) -> Vec<Stream> {
    let mut streams: Vec<Stream> = (0..count).map(|_| server.connect()).collect();
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&message(number)).expect("sending");
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        let mut back = [0; 64];
        stream.read_exact(&mut back).expect("receiving");
        assert_eq!(back, message(number), "connection {number}");
    }
    streams
}

fn ten_thousand_connections_at_once(family: Family, workers: &[&str]) {
    let _turn = turn();
    let count = connections_at_once();
    // The usual soft limit: the server has to raise it.
    let server = EchoServer::start_with(family, workers, |command| {
        limit_descriptors(command, 1024, u64::MAX)
    });
    let server = server.expect("IPv4 and Unix sockets are always there");
    let started = Instant::now();
    let streams = echo_once_on_each_of(&server, count);
    println!(
        "{count} connections connected and echoed in {:.2?}",
        started.elapsed()
    );
    assert!(server.descriptors() >= count);
    streams.into_iter().for_each(Stream::reset);
    eventually("the connections are closed", || server.descriptors() < 64);
    server
        .connect()
        .round_trip(b"still there")
        .expect("one echo");
    server.finish();
}

#[test]
fn ten_thousand_connections_at_once_on_one_worker() {
    ten_thousand_connections_at_once(Family::V4, &workers(1));
}

#[test]
fn ten_thousand_connections_at_once_on_two_workers() {
    ten_thousand_connections_at_once(Family::V4, &workers(2));
}

#[test]
fn ten_thousand_connections_at_once_over_unix_on_one_worker() {
    ten_thousand_connections_at_once(Family::Unix, &workers(1));
}

#[test]
fn ten_thousand_connections_at_once_over_unix_on_two_workers() {
    ten_thousand_connections_at_once(Family::Unix, &workers(2));
}

#[test]
fn an_idle_connection_takes_at_most_twelve_kib() {
    // Unoptimised code has larger frames, which take a page or two more.
    let most = if cfg!(debug_assertions) { 20.0 } else { 12.0 };
    idle_connections_take(most, "into");
}

/// Its fiber's one page, and what the fiber and the socket have on the heap.
#[test]
fn an_idle_connection_without_a_buffer_takes_at_most_five_kib() {
    // Unoptimised code calls deeper: three pages more, and four where the worker's buffers are all out and it allocates instead.
    let most = if cfg!(debug_assertions) { 21.0 } else { 5.0 };
    idle_connections_take(most, "lease");
}

fn idle_connections_take(most: f64, mode: &str) {
    let _turn = turn();
    let count = connections_at_once();
    let server = EchoServer::start(Family::V4, &["--mode", mode]).expect("IPv4");
    let before = server.resident_kib();
    let streams = echo_once_on_each_of(&server, count);
    let after = server.resident_kib();
    let each = after.saturating_sub(before) as f64 / count as f64;
    println!("{each:.2} KiB for each of {count} connections ({before} before, {after} after)");
    streams.into_iter().for_each(Stream::reset);
    assert!(each <= most, "{each:.2} KiB for each idle connection");
    server.finish();
}

#[test]
fn connections_beyond_the_descriptor_limit_wait_for_their_turn() {
    const LIMIT: usize = 64;
    let server = EchoServer::start_with(Family::V4, &[], |command| {
        limit_descriptors(command, LIMIT as u64, LIMIT as u64);
    });
    let server = server.expect("IPv4");
    let mut streams: Vec<Stream> = (0..2 * LIMIT).map(|_| server.connect()).collect();
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&message(number)).expect("sending");
    }
    // Only what is left open takes room, so nothing is read before there is none.
    let open = format!("/proc/{}/fd", server.process.pid());
    let is_below = |name: &std::ffi::OsStr| {
        let number = name.to_str().and_then(|name| name.parse().ok());
        number.is_some_and(|number: usize| number < LIMIT)
    };
    eventually("every descriptor is taken", || {
        let names = std::fs::read_dir(&open).expect("a running process");
        let names = names.filter_map(|entry| Some(entry.ok()?.file_name()));
        names.filter(|name| is_below(name)).count() == LIMIT
    });
    // The first in the queue are the first served, and each makes room for another.
    for (number, mut stream) in streams.into_iter().enumerate() {
        let mut back = [0; 64];
        stream.read_exact(&mut back).expect("receiving");
        assert_eq!(back, message(number), "connection {number}");
    }
    let mut process = server.process;
    process.signal(libc::SIGKILL);
    let finished = process.wait();
    assert!(finished.stderr.contains("[Errno 24]"), "{finished:?}");
    assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
}

// Ends, resets, timeouts.

#[test]
fn a_client_that_ends_at_once_gets_the_end() {
    for family in [Family::V4, Family::V6, Family::Unix] {
        let Some(server) = EchoServer::start(family, &[]) else {
            continue;
        };
        let mut stream = server.connect();
        stream.half_close().expect("shutdown");
        assert_eq!(stream.read(&mut [0; 16]).expect("the end"), 0);
        server.finish();
    }
}

#[test]
fn a_client_that_resets_disturbs_no_other() {
    for count in [1, 2] {
        let server = EchoServer::start(Family::V4, &workers(count)).expect("IPv4");
        let mut others: Vec<Stream> = (0..8).map(|_| server.connect()).collect();
        for other in &mut others {
            other.round_trip(b"before").expect("one echo");
        }
        let before = server.descriptors();
        let blob = Random::new(seed()).bytes(MIB);
        for turn in 0..20 {
            let mut rude = server.connect();
            match turn % 3 {
                // While the server receives, after an echo, and while it sends.
                0 => {}
                1 => rude.round_trip(b"hello").expect("one echo"),
                _ => {
                    let Stream::Tcp(socket) = &rude else {
                        unreachable!("a TCP server");
                    };
                    let short = Some(Duration::from_millis(100));
                    socket.set_write_timeout(short).expect("a timeout");
                    // Nobody reads, so what is written runs into full buffers.
                    while rude.write(&blob).is_ok() {}
                }
            }
            rude.reset();
            for other in &mut others {
                other.round_trip(b"meanwhile").expect("one echo");
            }
        }
        eventually("the reset connections are closed", || {
            server.descriptors() <= before
        });
        server.finish();
    }
}

#[test]
fn a_silent_connection_is_closed_after_the_timeout() {
    for family in [Family::V4, Family::Unix] {
        let server = EchoServer::start(family, &["--timeout", "0.3"]).expect("IPv4 and Unix");
        let started = Instant::now();
        let mut silent = server.connect();
        assert_eq!(silent.read(&mut [0; 16]).expect("the end"), 0);
        let after = started.elapsed();
        assert!(
            after >= Duration::from_millis(299),
            "closed after {after:?}"
        );
        assert!(after < Duration::from_secs(10), "closed after {after:?}");
        server.finish();
    }
}

#[test]
fn a_connection_that_keeps_talking_outlives_the_timeout() {
    let server = EchoServer::start(Family::V4, &["--timeout", "0.3"]).expect("IPv4");
    // On a machine so loaded that this test itself falls silent for too long, a closed connection proves nothing.
    for _ in 0..10 {
        let mut talker = server.connect();
        let started = Instant::now();
        let mut last = started;
        let mut silence = Duration::ZERO;
        let outcome = (0..30).try_for_each(|_| {
            thread::sleep(Duration::from_millis(50));
            let echoed = talker.round_trip(b"still talking");
            silence = silence.max(last.elapsed());
            last = Instant::now();
            echoed
        });
        if outcome.is_ok() {
            assert!(started.elapsed() > Duration::from_secs(1));
            server.finish();
            return;
        }
        assert!(
            silence > Duration::from_millis(290),
            "closed ({outcome:?}) though never silent for more than {silence:?}"
        );
    }
    println!("skipped: this machine is too loaded to talk every 0.3 s");
}

#[test]
fn a_connection_that_does_not_read_is_closed_after_the_timeout() {
    let server = EchoServer::start(Family::V4, &["--timeout", "0.3"]).expect("IPv4");
    let before = server.descriptors();
    let mut greedy = server.connect();
    let blob = vec![1; MIB];
    let started = Instant::now();
    // Ends with a reset once the server has closed; it never reads.
    let error = loop {
        if let Err(error) = greedy.write_all(&blob) {
            break error;
        }
    };
    assert!(started.elapsed() >= Duration::from_millis(299));
    let errno = error.raw_os_error();
    assert!(
        matches!(errno, Some(libc::ECONNRESET | libc::EPIPE)),
        "{error}"
    );
    eventually("the connection is closed", || {
        server.descriptors() <= before
    });
    server.finish();
}

// What echo_server refuses.

#[test]
fn a_port_in_use_is_errno_98() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    for count in [1, 2] {
        let workers = workers(count);
        let args = ["--bind", &address, workers[0], workers[1]];
        let finished = run_example("echo_server", args);
        assert_refused(&finished, 1, "echo_server: [Errno 98] ");
    }
}

#[test]
fn a_port_of_another_server_with_several_workers_is_errno_98() {
    let server = EchoServer::start(Family::V4, &workers(2)).expect("IPv4");
    let [_, address] = way_to(&server.endpoint);
    // Should it start after all, it listens until it is killed.
    let mut second = Process::example("echo_server", ["--bind", &address, "--workers", "2"]);
    let line = second.try_line();
    assert_eq!(line, None, "two servers share a port");
    assert_refused(&second.wait(), 1, "echo_server: [Errno 98] ");
    server.finish();
}

#[test]
fn a_path_in_use_is_errno_98_and_stays() {
    let server = EchoServer::start(Family::Unix, &[]).expect("Unix sockets");
    let Endpoint::Unix(path) = &server.endpoint else {
        unreachable!("a Unix server");
    };
    let args = ["--unix".as_ref(), path.as_os_str()];
    assert_refused(
        &run_example("echo_server", args),
        1,
        "echo_server: [Errno 98] ",
    );
    server
        .connect()
        .round_trip(b"still there")
        .expect("one echo");
    server.finish();

    let dir = TempDir::new();
    let file = dir.path().join("file");
    fs::write(&file, "precious").expect("a file");
    let args = ["--unix".as_ref(), file.as_os_str()];
    assert_refused(
        &run_example("echo_server", args),
        1,
        "echo_server: [Errno 98] ",
    );
    assert_eq!(fs::read(&file).expect("the file"), b"precious");
}

#[test]
fn a_socket_left_by_an_earlier_run_is_replaced() {
    let dir = TempDir::new();
    let path = dir.path().join("echo.socket");
    let args = ["--unix".as_ref(), path.as_os_str()];
    for _ in 0..3 {
        let mut server = Process::example("echo_server", args);
        assert_eq!(server.line(), format!("listening on {}", path.display()));
        let mut stream = Stream::connect(&Endpoint::Unix(path.clone())).expect("connect");
        stream.round_trip(b"hello").expect("one echo");
        server.signal(libc::SIGKILL);
        server.wait();
        assert!(path.exists());
        // The kernel tears down the ring of a dead process a little later, and with it the accept that holds the listener.
        let endpoint = Endpoint::Unix(path.clone());
        eventually("nobody listens", || Stream::connect(&endpoint).is_err());
    }
}

#[test]
fn bad_arguments_exit_with_2_and_show_the_way() {
    let unknown: [&[&str]; 4] = [
        &["--nonsense"],
        &["surplus"],
        &["--bind", "127.0.0.1:0", "--unix", "path"],
        &["--workers", "1", "--workers", "2"],
    ];
    for args in unknown {
        let finished = run_example("echo_server", args);
        assert_eq!(finished.status.code(), Some(2), "{args:?}: {finished:?}");
        assert!(
            finished.stderr.contains("Usage: echo_server"),
            "{finished:?}"
        );
    }
    let out_of_range = [
        ["--workers", "0"],
        ["--workers", "1025"],
        ["--mode", "sideways"],
        ["--timeout", "0"],
        ["--timeout", "inf"],
        ["--timeout", "soon"],
        ["--buffer", "0"],
        ["--bind", "nowhere"],
    ];
    for args in out_of_range {
        let finished = run_example("echo_server", args);
        assert_eq!(finished.status.code(), Some(2), "{args:?}: {finished:?}");
        assert!(finished.stderr.contains(args[0]), "{finished:?}");
        assert!(finished.stderr.contains("--help"), "{finished:?}");
    }
    for program in ["doctor", "echo_client"] {
        let finished = run_example(program, ["--nonsense"]);
        assert_eq!(finished.status.code(), Some(2), "{finished:?}");
        assert!(
            finished.stderr.contains(&format!("Usage: {program}")),
            "{finished:?}"
        );
    }
}

#[test]
fn a_timeout_beyond_what_a_socket_takes_is_a_bad_argument() {
    let args = ["--bind", "127.0.0.1:0", "--timeout", "1e300"];
    let mut server = Process::example("echo_server", args);
    assert_eq!(server.try_line(), None, "it serves");
    let finished = server.wait();
    assert_eq!(finished.status.code(), Some(2), "{finished:?}");
}

#[test]
fn a_closed_standard_output_is_no_reason_not_to_serve() {
    let dir = TempDir::new();
    let path = dir.path().join("echo.socket");
    let mut command = Command::new("sh");
    command
        .args(["-c", r#"exec "$@" >/dev/full"#, "sh"])
        .arg(example("echo_server"))
        .args(["--unix".as_ref(), path.as_os_str()]);
    let mut server = Process::start(&mut command, b"").expect("sh starts");
    let endpoint = Endpoint::Unix(path);
    eventually("it listens", || {
        assert!(server.is_running(), "the server ended");
        Stream::connect(&endpoint).is_ok()
    });
    let mut stream = Stream::connect(&endpoint).expect("connect");
    stream.round_trip(b"hello").expect("one echo");
    let Stream::Unix(socket) = &stream else {
        unreachable!("a Unix socket");
    };
    let half_a_second = Some(Duration::from_millis(500));
    socket.set_read_timeout(half_a_second).expect("a timeout");
    let error = stream.read(&mut [0; 16]).expect_err("the server ended");
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    server.signal(libc::SIGKILL);
    let finished = server.wait();
    assert!(finished.stderr.is_empty(), "{finished:?}");
}

#[test]
fn help_exits_with_0() {
    for program in ["doctor", "echo_client", "echo_server"] {
        let finished = run_example(program, ["--help"]);
        assert_eq!(finished.status.code(), Some(0), "{finished:?}");
        let text = String::from_utf8_lossy(&finished.stdout);
        assert!(text.contains(&format!("Usage: {program}")), "{finished:?}");
        assert!(finished.stderr.is_empty(), "{finished:?}");
    }
}

#[test]
fn sigterm_ends_the_server() {
    for family in [Family::V4, Family::Unix] {
        for count in [1, 2] {
            let mut server = EchoServer::start(family, &workers(count)).expect("IPv4 and Unix");
            let mut busy = server.connect();
            busy.round_trip(b"hello").expect("one echo");
            let started = Instant::now();
            server.process.signal(libc::SIGTERM);
            let finished = server.process.wait();
            let after = started.elapsed();
            assert_eq!(
                finished.status.signal(),
                Some(libc::SIGTERM),
                "{finished:?}"
            );
            assert!(finished.stderr.is_empty(), "{finished:?}");
            assert!(after < Duration::from_secs(5), "it took {after:?}");
            assert_eq!(busy.read(&mut [0; 16]).expect("the end"), 0);
        }
    }
}

// echo_client.

/// The arguments that lead `echo_client` to the server.
fn way_to(endpoint: &Endpoint) -> [String; 2] {
    match endpoint {
        Endpoint::Tcp(address) => ["--connect".to_owned(), address.to_string()],
        Endpoint::Unix(path) => ["--unix".to_owned(), path.display().to_string()],
    }
}

#[test]
fn echo_client_prints_what_comes_back() {
    // An argument has at most 128 KiB.
    let large = "0123456789abcdef".repeat(100 * 1024 / 16);
    for family in [Family::V4, Family::V6, Family::Unix] {
        let Some(server) = EchoServer::start(family, &[]) else {
            continue;
        };
        for message in ["Hello, world", "", "käse \u{1f9c0}", &large] {
            let [way, address] = way_to(&server.endpoint);
            let finished = run_example("echo_client", [&way, &address, "--", message]);
            assert_eq!(finished.status.code(), Some(0), "{finished:?}");
            assert!(
                finished.stdout == format!("{message}\n").as_bytes(),
                "{finished:?}"
            );
            assert!(finished.stderr.is_empty(), "{finished:?}");
        }
        let finished = run_example("echo_client", way_to(&server.endpoint));
        assert_eq!(finished.stdout, b"Hello, world\n");
        server.finish();
    }
}

#[test]
fn echo_client_at_a_closed_port_is_errno_111() {
    // Bound, but not listening: nobody else gets the port meanwhile.
    let closed = Socket::new(AF_INET, SOCK_STREAM, 0).expect("a socket");
    closed.bind(("127.0.0.1", 0)).expect("a port");
    let address = closed.getsockname().expect("an address").to_string();
    let finished = run_example("echo_client", ["--connect", &address]);
    assert_refused(&finished, 1, "echo_client: [Errno 111] ");
}

#[test]
fn echo_client_gives_up_on_a_silent_server() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = silent.local_addr().expect("an address").to_string();
    let started = Instant::now();
    let finished = run_example("echo_client", ["--connect", &address, "--timeout", "0.3"]);
    assert!(started.elapsed() >= Duration::from_millis(299));
    assert_refused(&finished, 1, "echo_client: timed out");
}

#[test]
fn echo_client_tells_a_wrong_echo() {
    let liar = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = liar.local_addr().expect("an address").to_string();
    let client = Process::example("echo_client", ["--connect", &address, "truth"]);
    let (mut stream, _peer) = liar.accept().expect("the client");
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).expect("the message");
    assert_eq!(heard, b"truth");
    stream.write_all(b"lie").expect("sending");
    drop(stream);
    let finished = client.wait();
    assert_eq!(finished.status.code(), Some(1), "{finished:?}");
    assert_eq!(finished.stdout, b"lie\n");
    assert!(finished.stderr.starts_with("echo_client: "), "{finished:?}");
}

// The two programs of Python's socket page, and their counterparts here.

const SEED_PORT: u16 = 50007;

/// As quoted in examples/seed_echo_server.rs, in Python 3.
const PYTHON_SEED_SERVER: &str = r#"
# Echo server program
import socket

HOST = ''                 # Symbolic name meaning all available interfaces
PORT = 50007              # Arbitrary non-privileged port
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
s.bind((HOST, PORT))
s.listen(1)
conn, addr = s.accept()
print('Connected by', addr)
while 1:
    data = conn.recv(1024)
    if not data: break
    conn.sendall(data)
conn.close()
"#;

/// As quoted in examples/seed_echo_client.rs, in Python 3.
const PYTHON_SEED_CLIENT: &str = r#"
# Echo client program
import socket

HOST = '127.0.0.1'        # The remote host
PORT = 50007              # The same port as used by the server
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
s.connect((HOST, PORT))
s.sendall(b'Hello, world')
data = s.recv(1024)
s.close()
print('Received', repr(data))
"#;

/// `python` is the Python program to run instead of the example.
fn seed_program(network: &Network, name: &str, python: Option<&str>) -> Process {
    let started = match python {
        Some(script) => Process::start(network.command("python3").arg("-"), script.as_bytes()),
        None => Process::start(&mut network.command(example(name)), b""),
    };
    started.expect("the program starts")
}

/// Runs the two programs against each other. The port is fixed, so they get a network of their own, where no other program has
/// it, and no earlier run has left it in TIME_WAIT.
fn the_seed_programs_meet(python_server: Option<&str>, python_client: Option<&str>) {
    const LISTEN: u8 = 10;
    if (python_server.is_some() || python_client.is_some()) && !has_python() {
        return;
    }
    let Some(network) = Network::new() else {
        return;
    };
    let mut server = seed_program(&network, "seed_echo_server", python_server);
    // The server does not say when it listens.
    eventually("the server listens", || {
        assert!(server.is_running(), "the server ended before it listened");
        network.sockets(SEED_PORT, LISTEN) == 1
    });
    let client = seed_program(&network, "seed_echo_client", python_client).wait();
    assert!(client.status.success(), "{client:?}");
    let received = match python_client {
        Some(_) => "Received b'Hello, world'\n",
        None => "Received b\"Hello, world\"\n",
    };
    assert_eq!(String::from_utf8_lossy(&client.stdout), received);
    let server = server.wait();
    assert!(server.status.success(), "{server:?}");
    let start = match python_server {
        Some(_) => "Connected by ('127.0.0.1', ",
        None => "Connected by 127.0.0.1:",
    };
    let stdout = String::from_utf8_lossy(&server.stdout).into_owned();
    assert!(stdout.starts_with(start), "{server:?}");
    assert_eq!(stdout.lines().count(), 1, "{server:?}");
    assert!(server.stderr.is_empty() && client.stderr.is_empty());
}

#[test]
fn the_seed_programs_work_with_each_other() {
    the_seed_programs_meet(None, None);
}

#[test]
fn the_seed_server_works_with_pythons_client() {
    the_seed_programs_meet(None, Some(PYTHON_SEED_CLIENT));
}

#[test]
fn the_seed_client_works_with_pythons_server() {
    the_seed_programs_meet(Some(PYTHON_SEED_SERVER), None);
}

// io_uring_enter fails.

/// Every fourth io_uring_enter from the third on fails, before it submitted anything: nothing may be lost, repeated or reordered.
#[test]
fn refused_and_interrupted_enters_lose_nothing() {
    let _turn = turn();
    if skipped_on_epoll("nothing enters a ring") {
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        println!("skipped: strace is not installed");
        return;
    }
    let seed = seed();
    for error in ["EINTR", "EAGAIN", "EBUSY", "ENOMEM"] {
        let mut command = Command::new("strace");
        command
            .args([
                "-f",
                "-qq",
                "-o",
                "/dev/null",
                "-e",
                "trace=io_uring_enter",
                "-e",
            ])
            .arg(format!("inject=io_uring_enter:error={error}:when=3+4"))
            .arg(example("echo_server"))
            .args(["--bind", "127.0.0.1:0", "--timeout", "60"]);
        let mut strace = Process::start(&mut command, b"").unwrap();
        let Some(line) = strace.try_line() else {
            println!("skipped: strace may not trace here ({:?})", strace.wait());
            return;
        };
        let address = line.trim().trim_start_matches("listening on ").to_owned();
        thread::scope(|scope| {
            for client in 0..8 {
                let address = &address;
                scope.spawn(move || {
                    let mut random = Random::new(seed + client);
                    let mut stream = std::net::TcpStream::connect(address).unwrap();
                    stream
                        .set_read_timeout(Some(Duration::from_secs(60)))
                        .unwrap();
                    for _ in 0..20 {
                        let len = 1 + random.up_to(20_000);
                        let sent = random.bytes(len);
                        stream.write_all(&sent).unwrap();
                        let mut echoed = vec![0; sent.len()];
                        stream.read_exact(&mut echoed).unwrap();
                        assert!(sent == echoed, "{error}, seed {seed}, client {client}");
                    }
                });
            }
        });
        // The server is strace's child, and would go on without it.
        let children = format!("/proc/{pid}/task/{pid}/children", pid = strace.pid());
        for child in fs::read_to_string(children).unwrap().split_whitespace() {
            // SAFETY: no memory is passed; the process is one that this test started.
            unsafe { libc::kill(child.parse().unwrap(), libc::SIGKILL) };
        }
        strace.wait();
    }
}

// Many fibers.

#[test]
fn thousands_of_parked_fibers_wake_answer_and_end() {
    let finished = run_example("million", ["--fibers", "20000"]);
    assert!(finished.status.success(), "{finished:?}");
    let stdout = String::from_utf8_lossy(&finished.stdout);
    assert!(stdout.starts_with("20000 fibers parked"), "{finished:?}");
    assert!(
        stdout.contains("all woke, answered and ended"),
        "{finished:?}"
    );
    let mappings: usize = stdout
        .lines()
        .find_map(|line| line.strip_prefix("mappings: ")?.parse().ok())
        .expect("the number of mappings");
    // A kernel without guard markers (before 6.13) needs two mappings a stack.
    assert!(mappings <= 50 || mappings > 40_000, "{finished:?}");
}
