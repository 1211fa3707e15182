//! `examples/proxy`, as it would be deployed: in front of real servers, and of peers that break, stall, or are not there.
#![allow(unsafe_code)]

mod support;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use support::{
    EchoServer, Endpoint, Family, Finished, Process, Random, Stream, TempDir, eventually, example,
    has_python, has_strace, limit_descriptors, run, run_example, seed, traced,
};

const MIB: usize = 1 << 20;

/// A running proxy.
struct Proxy {
    process: Process,
    endpoint: Endpoint,
    _dir: TempDir,
}

/// An address as the proxy's command line has it.
fn written(endpoint: &Endpoint) -> String {
    match endpoint {
        Endpoint::Tcp(address) => address.to_string(),
        Endpoint::Unix(path) => format!("unix:{}", path.display()),
    }
}

impl Proxy {
    fn start(listen: Family, upstreams: &[&Endpoint], args: &[&str]) -> Proxy {
        let command = Command::new(example("proxy"));
        Proxy::start_as(command, listen, upstreams, args)
    }

    fn start_as(
        mut command: Command,
        listen: Family,
        upstreams: &[&Endpoint],
        args: &[&str],
    ) -> Proxy {
        let dir = TempDir::new();
        let path = dir.path().join("proxy.socket");
        let listen = match listen {
            Family::V4 => "127.0.0.1:0".to_owned(),
            Family::V6 => "[::1]:0".to_owned(),
            Family::Unix => format!("unix:{}", path.display()),
        };
        command.args(["--listen", &listen]);
        for upstream in upstreams {
            command.args(["--upstream", &written(upstream)]);
        }
        command.args(args);
        let mut process = Process::start(&mut command, b"").expect("the proxy starts");
        let line = process.line();
        let address = line.strip_prefix("listening on ");
        let address = address.unwrap_or_else(|| panic!("the first line is {line:?}"));
        let endpoint = match address.strip_prefix("unix:") {
            Some(path) => Endpoint::Unix(path.into()),
            None => {
                let address: SocketAddr = address.parse().expect("an address and a port");
                assert_ne!(address.port(), 0);
                Endpoint::Tcp(address)
            }
        };
        Proxy {
            process,
            endpoint,
            _dir: dir,
        }
    }

    fn connect(&self) -> Stream {
        Stream::connect(&self.endpoint).unwrap_or_else(|error| panic!("connect: {error}"))
    }

    fn address(&self) -> SocketAddr {
        match &self.endpoint {
            Endpoint::Tcp(address) => *address,
            Endpoint::Unix(_) => panic!("it listens on a path"),
        }
    }

    fn descriptors(&self) -> usize {
        self.process.descriptors()
    }

    /// Ends it by SIGTERM: what it printed, having exited with 0.
    fn stop(mut self) -> Finished {
        self.process.signal(libc::SIGTERM);
        let finished = self.process.wait();
        assert_eq!(finished.status.code(), Some(0), "{finished:?}");
        assert!(finished.stdout.is_empty(), "{finished:?}");
        finished
    }
}

fn echo(family: Family) -> Option<EchoServer> {
    EchoServer::start(family, &[])
}

/// An upstream of this test's own.
fn listen() -> (TcpListener, Endpoint) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = Endpoint::Tcp(listener.local_addr().unwrap());
    (listener, endpoint)
}

/// An address where nobody listens.
fn nobody() -> Endpoint {
    listen().1
}

/// Serves each connection to `listener` with one byte, `name`, until the process ends.
fn serve_name(listener: TcpListener, name: u8) {
    thread::spawn(move || {
        for connection in listener.incoming() {
            let _ = connection.and_then(|mut connection| connection.write_all(&[name]));
        }
    });
}

/// The byte a connection is served with; 0 if it is closed without one.
fn name_of_upstream(proxy: &Proxy) -> u8 {
    let mut got = Vec::new();
    let _ = proxy.connect().read_to_end(&mut got);
    got.first().copied().unwrap_or(0)
}

/// Sends `size` random bytes in random chunks, ends its side, and expects them all back.
fn echo_random(stream: &Stream, mut random: Random, size: usize) {
    let bytes = random.bytes(size);
    let mut got = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut left = &bytes[..];
            while !left.is_empty() {
                let most = 1 << random.below(18);
                let (chunk, rest) = left.split_at(random.up_to(most).min(left.len()));
                { stream }.write_all(chunk).unwrap();
                left = rest;
            }
            stream.half_close().unwrap();
        });
        { stream }.read_to_end(&mut got).unwrap();
    });
    assert_eq!(got.len(), size, "the number of bytes");
    assert!(got == bytes, "other bytes came back");
}

#[test]
fn every_byte_comes_back_through_it_between_all_families() {
    let mut random = Random::new(seed());
    for upstream in [Family::V4, Family::V6, Family::Unix] {
        let Some(server) = echo(upstream) else {
            continue;
        };
        for (listen, workers, mode) in [
            (Family::V4, "1", "auto"),
            (Family::V4, "2", "auto"),
            (Family::Unix, "1", "auto"),
            (Family::Unix, "2", "splice"),
            (Family::V4, "1", "splice"),
            (Family::V4, "1", "copy"),
            (Family::V6, "2", "auto"),
        ] {
            if listen == Family::V6 && TcpListener::bind("[::1]:0").is_err() {
                println!("skipped: there is no IPv6");
                continue;
            }
            let args = ["--workers", workers, "--mode", mode];
            let proxy = Proxy::start(listen, &[&server.endpoint], &args);
            let before = proxy.descriptors();
            thread::scope(|scope| {
                for number in 0..6 {
                    let (proxy, random) = (&proxy, random.fork());
                    let size = if number == 0 {
                        3 * MIB
                    } else {
                        1 << (3 * number)
                    };
                    scope.spawn(move || echo_random(&proxy.connect(), random, size));
                }
            });
            eventually("all descriptors are closed", || {
                proxy.descriptors() == before
            });
            let finished = proxy.stop();
            assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
        }
        server.finish();
    }
}

#[test]
fn a_killed_client_or_upstream_hurts_nobody_else() {
    let (listener, endpoint) = listen();
    let proxy = Proxy::start(Family::V4, &[&endpoint], &[]);
    let before = proxy.descriptors();
    let pair = || {
        let client = proxy.connect();
        let (upstream, _) = listener.accept().unwrap();
        (client, upstream)
    };
    let (mut steady, mut steady_upstream) = pair();
    let mut exchange = || {
        steady.write_all(b"ping").unwrap();
        let mut got = [0; 4];
        steady_upstream.read_exact(&mut got).unwrap();
        steady_upstream.write_all(&got).unwrap();
        steady.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"ping");
    };
    for round in 0..3 {
        let (client, mut upstream) = pair();
        upstream
            .write_all(&vec![1; 3 * MIB][..round * MIB / 8])
            .unwrap();
        client.reset();
        exchange();
        let mut rest = Vec::new();
        // The upstream sees the end, or a reset.
        let _ = upstream.read_to_end(&mut rest);
        assert!(rest.is_empty());

        let (mut client, upstream) = pair();
        client.write_all(b"unread").unwrap();
        exchange();
        Stream::Tcp(upstream).reset();
        let _ = client.read_to_end(&mut rest);
        assert!(rest.is_empty());
        exchange();
    }
    drop((steady, steady_upstream));
    eventually("all descriptors are closed", || {
        proxy.descriptors() == before
    });
    let stderr = proxy.stop().stderr;
    let told = |what: &str| stderr.lines().filter(|line| line.contains(what)).count();
    assert_eq!(told("client: [Errno"), 3, "{stderr}");
    assert_eq!(told("upstream: [Errno"), 3, "{stderr}");
}

#[test]
fn upstreams_take_turns_and_a_dead_one_is_left_out_until_it_is_back() {
    for workers in ["1", "2"] {
        let (first, first_endpoint) = listen();
        let (second, second_endpoint) = listen();
        let address = second.local_addr().unwrap();
        serve_name(first, b'1');
        // One that does not listen: connections to it are refused.
        drop(second);
        let upstreams = [&first_endpoint, &second_endpoint];
        let proxy = Proxy::start(Family::V4, &upstreams, &["--workers", workers]);
        for _ in 0..10 {
            assert_eq!(name_of_upstream(&proxy), b'1');
        }
        serve_name(TcpListener::bind(address).unwrap(), b'2');
        eventually("the second is back", || name_of_upstream(&proxy) == b'2');
        let names: Vec<u8> = (0..8).map(|_| name_of_upstream(&proxy)).collect();
        assert!(names == *b"12121212" || names == *b"21212121", "{names:?}");
        let stderr = proxy.stop().stderr;
        assert!(
            stderr.contains(&format!("upstream {address} is down: ")),
            "{stderr}"
        );
        assert!(
            stderr.contains(&format!("upstream {address} is back")),
            "{stderr}"
        );
    }
}

#[test]
fn without_any_upstream_clients_are_turned_away_and_later_served() {
    let (listener, endpoint) = listen();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let proxy = Proxy::start(Family::V4, &[&endpoint, &nobody()], &[]);
    for _ in 0..5 {
        assert_eq!(name_of_upstream(&proxy), 0);
    }
    serve_name(TcpListener::bind(address).unwrap(), b'1');
    eventually("clients are served", || name_of_upstream(&proxy) == b'1');
    let stderr = proxy.stop().stderr;
    assert!(
        stderr
            .lines()
            .filter(|line| line.contains("not served"))
            .count()
            >= 5,
        "{stderr}"
    );
}

#[test]
fn an_upstream_that_does_not_answer_is_given_up() {
    // The backlog holds one: the next connections get no answer at all.
    let full = ringsock::Socket::new(ringsock::AF_INET, ringsock::SOCK_STREAM, 0).unwrap();
    full.bind(("127.0.0.1", 0)).unwrap();
    full.listen(0).unwrap();
    let address = full.getsockname().unwrap().as_socket_addr().unwrap();
    let _queued: Vec<_> = (0..4)
        .map(|_| {
            let socket =
                ringsock::Socket::new(ringsock::AF_INET, ringsock::SOCK_STREAM, 0).unwrap();
            socket.setblocking(false).unwrap();
            let _ = socket.connect_ex(address);
            socket
        })
        .collect();
    let (other, other_endpoint) = listen();
    serve_name(other, b'1');
    let upstreams = [&Endpoint::Tcp(address), &other_endpoint];
    let proxy = Proxy::start(Family::V4, &upstreams, &["--connect-timeout", "0.3"]);
    let start = Instant::now();
    for _ in 0..4 {
        assert_eq!(name_of_upstream(&proxy), b'1');
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(299), "{took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    let stderr = proxy.stop().stderr;
    assert!(
        stderr.contains(&format!("upstream {address} is down: timed out")),
        "{stderr}"
    );
}

#[test]
fn connections_beyond_the_limit_wait_in_the_backlog() {
    for workers in ["1", "2"] {
        let server = echo(Family::V4).expect("IPv4");
        let args = ["--max-connections", "3", "--workers", workers];
        let proxy = Proxy::start(Family::V4, &[&server.endpoint], &args);
        let mut streams: Vec<Stream> = (0..9).map(|_| proxy.connect()).collect();
        for stream in &mut streams {
            stream.write_all(b"me too").unwrap();
        }
        let mut left = streams;
        let mut answered = 0;
        while !left.is_empty() {
            // Those who have an answer, and hold their places.
            let mut served = Vec::new();
            eventually("somebody is served", || {
                let mut index = 0;
                while index < left.len() {
                    if has_bytes(&left[index]) {
                        served.push(left.swap_remove(index));
                    } else {
                        index += 1;
                    }
                }
                served.len() == 3
            });
            thread::sleep(Duration::from_millis(50));
            assert!(
                !left.iter().any(has_bytes),
                "more than the limit are served"
            );
            answered += served.len();
        }
        assert_eq!(answered, 9);
        proxy.stop();
        server.finish();
    }
}

/// Whether there is something to read.
fn has_bytes(stream: &Stream) -> bool {
    let Stream::Tcp(stream) = stream else {
        panic!("a TCP connection");
    };
    stream.set_nonblocking(true).unwrap();
    let there = stream.peek(&mut [0; 1]).is_ok();
    stream.set_nonblocking(false).unwrap();
    there
}

#[test]
fn an_idle_connection_is_closed_and_counted() {
    let server = echo(Family::V4).expect("IPv4");
    let args = ["--idle-timeout", "0.3", "--stats", "0.1"];
    let proxy = Proxy::start(Family::V4, &[&server.endpoint], &args);
    let mut stream = proxy.connect();
    stream.round_trip(b"hello").unwrap();
    let start = Instant::now();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(250), "{took:?}");
    let stderr = proxy.stop().stderr;
    assert!(
        stderr.contains("nothing moved for too long (5 bytes to the upstream, 5 to the client"),
        "{stderr}"
    );
    let last = stderr.lines().rfind(|line| line.contains("stats")).unwrap();
    assert!(
        last.contains(" idle_timeouts=1 ") && last.contains(" active=0 "),
        "{last}"
    );
    assert!(
        last.contains(" accepted=1 to_upstream_bytes=5 to_client_bytes=5 "),
        "{last}"
    );
    assert!(
        stderr.lines().filter(|line| line.contains("stats")).count() >= 3,
        "{stderr}"
    );
    server.finish();
}

#[test]
fn sigterm_lets_transfers_finish_and_refuses_new_connections() {
    for (workers, signal) in [("1", libc::SIGTERM), ("2", libc::SIGINT)] {
        let server = echo(Family::V4).expect("IPv4");
        let mut proxy = Proxy::start(
            Family::V4,
            &[&server.endpoint],
            &["--workers", workers, "--drain", "60"],
        );
        let mut stream = proxy.connect();
        stream.round_trip(b"before").unwrap();
        proxy.process.signal(signal);
        let address = proxy.address();
        eventually("new connections are refused", || {
            TcpStream::connect(address).is_err()
        });
        let mut random = Random::new(seed());
        echo_random(&stream, random.fork(), 3 * MIB);
        drop(stream);
        let start = Instant::now();
        let finished = proxy.process.wait();
        assert_eq!(finished.status.code(), Some(0), "{finished:?}");
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "it waited although all had gone"
        );
        assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
        server.finish();
    }
}

#[test]
fn the_drain_is_bounded_and_a_second_signal_ends_it() {
    for second in [false, true] {
        let (listener, endpoint) = listen();
        let drain = if second { "120" } else { "0.5" };
        let mut proxy = Proxy::start(Family::V4, &[&endpoint], &["--drain", drain]);
        let mut client = proxy.connect();
        let (upstream, _) = listener.accept().unwrap();
        // Stalled with bytes under way.
        if let Stream::Tcp(stream) = &client {
            stream
                .set_write_timeout(Some(Duration::from_millis(200)))
                .unwrap();
        }
        while client.write(&[1; 65536]).is_ok() {}
        let start = Instant::now();
        proxy.process.signal(libc::SIGTERM);
        if second {
            let address = proxy.address();
            eventually("it drains", || TcpStream::connect(address).is_err());
            proxy.process.signal(libc::SIGTERM);
        }
        let finished = proxy.process.wait();
        let took = start.elapsed();
        assert_eq!(finished.status.code(), Some(0), "{finished:?}");
        assert!(
            finished.stderr.contains("cut at the end of the drain"),
            "{finished:?}"
        );
        assert!(took < Duration::from_secs(20), "{took:?}");
        assert!(second || took >= Duration::from_millis(499), "{took:?}");
        drop(upstream);
    }
}

#[test]
fn what_waits_in_the_backlog_at_sigterm_is_served() {
    let (listener, endpoint) = listen();
    let mut proxy = Proxy::start(Family::V4, &[&endpoint], &["--drain", "60"]);
    // The proxy stands still while they queue and the signal comes.
    proxy.process.signal(libc::SIGSTOP);
    let clients: Vec<Stream> = (0..10).map(|_| proxy.connect()).collect();
    proxy.process.signal(libc::SIGTERM);
    proxy.process.signal(libc::SIGCONT);
    serve_name(listener, b'1');
    for mut client in clients {
        let mut got = Vec::new();
        client.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"1");
    }
    let finished = proxy.process.wait();
    assert_eq!(finished.status.code(), Some(0), "{finished:?}");
}

/// Reads one header of version 2 and prints what it says, then what follows.
const PYTHON_UPSTREAM: &str = r#"
import ipaddress, os, socket, struct, sys

listener = socket.socket()
listener.bind(('127.0.0.1', 0))
listener.listen(8)
print(listener.getsockname()[1], flush=True)
for _ in range(int(sys.argv[1])):
    conn, _ = listener.accept()
    conn.settimeout(60)
    data = conn.makefile('rb')
    assert data.read(12) == b'\r\n\r\n\x00\r\nQUIT\n', 'signature'
    version, family, length = struct.unpack('!BBH', data.read(4))
    assert version == 0x21, 'version and command'
    body = data.read(length)
    if family == 0x11:
        source, target, sport, dport = struct.unpack('!4s4sHH', body)
        said = '%s:%d %s:%d' % (ipaddress.ip_address(source), sport, ipaddress.ip_address(target), dport)
    elif family == 0x21:
        source, target, sport, dport = struct.unpack('!16s16sHH', body)
        said = '[%s]:%d [%s]:%d' % (ipaddress.ip_address(source), sport, ipaddress.ip_address(target), dport)
    elif family == 0x31:
        source, target = struct.unpack('108s108s', body)
        said = 'unix:%s unix:%s' % (source.rstrip(b'\0').decode(), target.rstrip(b'\0').decode())
    else:
        said = 'family %#x' % family
    print(said, data.read().decode(), flush=True)
    data.close()
    conn.close()
"#;

#[test]
fn the_upstream_learns_who_the_client_is() {
    if !has_python() {
        return;
    }
    let mut families = vec![Family::V4, Family::Unix];
    if TcpListener::bind("[::1]:0").is_ok() {
        families.push(Family::V6);
    } else {
        println!("skipped: there is no IPv6");
    }
    let mut command = Command::new("python3");
    command.args(["-c", PYTHON_UPSTREAM, &families.len().to_string()]);
    let mut python = Process::start(&mut command, b"").unwrap();
    let port: u16 = python.line().parse().unwrap();
    let upstream = Endpoint::Tcp(([127, 0, 0, 1], port).into());
    for family in families {
        let proxy = Proxy::start(family, &[&upstream], &["--proxy-protocol", "v2"]);
        let mut client = proxy.connect();
        client.write_all(b"payload").unwrap();
        client.half_close().unwrap();
        let expected = match (&client, &proxy.endpoint) {
            (Stream::Tcp(stream), Endpoint::Tcp(address)) => {
                format!("{} {address} payload", stream.local_addr().unwrap())
            }
            _ => format!("unix: {} payload", written(&proxy.endpoint)),
        };
        assert_eq!(python.line(), expected);
        client.read_to_end(&mut Vec::new()).unwrap();
        proxy.stop();
    }
    assert!(python.wait().status.success());
}

#[test]
fn few_descriptors_mean_few_connections_at_a_time() {
    let server = echo(Family::V4).expect("IPv4");
    let mut command = Command::new(example("proxy"));
    limit_descriptors(&mut command, 256, 256);
    let proxy = Proxy::start_as(
        command,
        Family::V4,
        &[&server.endpoint],
        &["--mode", "splice"],
    );
    let mut streams: Vec<Stream> = (0..100).map(|_| proxy.connect()).collect();
    for stream in &mut streams {
        stream.write_all(b"me too").unwrap();
    }
    // Nobody has left so far, so the places are taken one after the other.
    eventually("all places are taken", || {
        proxy.process.stderr().contains("all 32 places are taken")
    });
    for mut stream in streams {
        let mut got = [0; 6];
        stream.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"me too");
    }
    // Why some have to wait is said, once; no error is.
    let stderr = proxy.stop().stderr;
    let lines: Vec<&str> = stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{stderr}");
    assert!(lines[1].contains("stopped accepting"), "{stderr}");
    server.finish();
}

#[test]
fn short_of_descriptors_it_pauses_and_goes_on() {
    if !has_strace() {
        return;
    }
    let server = echo(Family::V4).expect("IPv4");
    let faults = [
        "-e",
        "trace=accept4",
        "-e",
        "inject=accept4:error=EMFILE:when=1..5",
    ];
    let command = traced(&faults, &example("proxy"));
    let proxy = Proxy::start_as(command, Family::V4, &[&server.endpoint], &[]);
    let start = Instant::now();
    proxy.connect().round_trip(b"hello").unwrap();
    // 10, 20, 40, 80 and 160 ms.
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(309), "{took:?}");
    let stderr = proxy.stop().stderr;
    let told = stderr
        .lines()
        .filter(|line| line.contains("wait in the backlog"))
        .count();
    assert_eq!(told, 1, "{stderr}");
    server.finish();
}

#[test]
fn a_wrong_command_line_is_refused() {
    let refused = |args: &[&str], code: i32, what: &str| {
        let finished = run_example("proxy", args);
        assert_eq!(finished.status.code(), Some(code), "{finished:?}");
        assert!(finished.stdout.is_empty(), "{finished:?}");
        assert!(finished.stderr.contains(what), "{finished:?}");
    };
    let to = ["--listen", "127.0.0.1:0"];
    refused(&to, 2, "--upstream");
    let upstream = ["--upstream", "127.0.0.1:1"];
    refused(&upstream, 2, "--listen");
    for (address, what) in [
        ("127.0.0.1", "no port"),
        ("127.0.0.1:x", "not a port"),
        ("127.0.0.1:65536", "not a port"),
        ("::1:80", "an IPv6 address goes into brackets"),
        ("unix:", "no path"),
    ] {
        refused(&[&to[..], &["--upstream", address]].concat(), 2, what);
        refused(&[&upstream[..], &["--listen", address]].concat(), 2, what);
    }
    for wrong in [
        ["--idle-timeout", "0"],
        ["--connect-timeout", "never"],
        ["--max-connections", "0"],
        ["--workers", "0"],
        ["--stats", "0"],
        ["--in-flight", "1"],
        ["--proxy-protocol", "v1"],
    ] {
        refused(&[&to[..], &upstream, &wrong].concat(), 2, wrong[0]);
    }
    let (taken, endpoint) = listen();
    let address = written(&endpoint);
    refused(
        &[&["--listen", &address][..], &upstream].concat(),
        1,
        &format!("proxy: [Errno 98] Address already in use: {address}"),
    );
    drop(taken);
}

#[test]
fn an_answer_that_comes_before_the_question_is_read_arrives_whole() {
    let (listener, endpoint) = listen();
    let proxy = Proxy::start(Family::V4, &[&endpoint], &[]);
    let answer = Random::new(seed()).bytes(MIB);
    let sent = answer.clone();
    let upstream = thread::spawn(move || {
        for _ in 0..5 {
            let (mut upstream, _) = listener.accept().unwrap();
            upstream.read_exact(&mut [0; 1]).unwrap();
            upstream.write_all(&sent).unwrap();
            eventually("all has reached the proxy's machine", || {
                let mut unsent: libc::c_int = -1;
                // SAFETY: the kernel writes one int, which lives through the call.
                unsafe { libc::ioctl(upstream.as_raw_fd(), libc::TIOCOUTQ, &mut unsent) };
                unsent == 0
            });
            // Unread bytes make it a reset.
            drop(upstream);
        }
    });
    for _ in 0..5 {
        let client = proxy.connect();
        thread::scope(|scope| {
            // An upload that goes on until nobody takes it.
            scope.spawn(|| while { &client }.write(&[1; 65536]).is_ok() {});
            let mut got = vec![0; MIB];
            let mut read = 0;
            while read < MIB {
                // A slow reader.
                let end = MIB.min(read + 50_000);
                match { &client }.read(&mut got[read..end]) {
                    Ok(0) | Err(_) => break,
                    Ok(n) => read += n,
                }
            }
            assert_eq!(read, MIB);
            assert!(got == answer, "another answer came");
            let _ = client.half_close();
        });
    }
    upstream.join().unwrap();
    proxy.stop();
}

/// A value of a line of the statistics.
fn stat(line: &str, name: &str) -> u64 {
    let mut fields = line
        .split_whitespace()
        .filter_map(|field| field.split_once('='));
    let (_, value) = fields
        .find(|(field, _)| *field == name)
        .unwrap_or_else(|| panic!("no {name} in {line}"));
    value.parse().unwrap()
}

#[test]
fn a_stalled_side_ends_its_connection_in_time_and_is_reported() {
    for client_stalls in [true, false] {
        let (listener, endpoint) = listen();
        let args = [
            "--idle-timeout",
            "0.5",
            "--stats",
            "600",
            "--in-flight",
            "8192",
        ];
        let proxy = Proxy::start(Family::V4, &[&endpoint], &args);
        let before = proxy.descriptors();
        let client = proxy.connect();
        let upstream = Stream::Tcp(listener.accept().unwrap().0);
        let (stalled, mut sender) = if client_stalls {
            (client, upstream)
        } else {
            (upstream, client)
        };
        // Another connection of the same proxy is served meanwhile.
        let mut other = proxy.connect();
        let mut others_upstream = listener.accept().unwrap().0;
        // It sends until nobody takes any more, which ends with the connection.
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let serving = thread::spawn(move || {
            let mut rounds = 0;
            while !stopping.load(Relaxed) {
                other.write_all(b"ping").unwrap();
                others_upstream.read_exact(&mut [0; 4]).unwrap();
                rounds += 1;
                thread::sleep(Duration::from_millis(10));
            }
            rounds
        });
        let start = Instant::now();
        let mut sent = 0;
        while let Ok(n) = sender.write(&[1; 65536]) {
            sent += n;
        }
        let took = start.elapsed();
        assert!(took < Duration::from_secs(30), "{took:?} for {sent} bytes");
        stop.store(true, Relaxed);
        assert!(
            serving.join().unwrap() > 10,
            "the other connection stood still"
        );
        eventually("all descriptors are closed", || {
            proxy.descriptors() == before
        });
        drop((stalled, sender));
        let stderr = proxy.stop().stderr;
        assert!(stderr.contains("nothing moved for too long"), "{stderr}");
        let last = stderr.lines().rfind(|line| line.contains("stats")).unwrap();
        assert_eq!(stat(last, "idle_timeouts"), 1, "{last}");
        // What the proxy had taken and could not pass on is said, and is no more than what may be on its way.
        let stranded = stat(last, "stranded_bytes");
        assert!((1..=8192).contains(&stranded), "{last}");
    }
}

#[test]
fn a_reset_is_reported_with_its_side_and_what_came_before() {
    for client_resets in [true, false] {
        let (listener, endpoint) = listen();
        let proxy = Proxy::start(Family::V4, &[&endpoint], &["--stats", "600"]);
        let before = proxy.descriptors();
        let client = proxy.connect();
        let upstream = Stream::Tcp(listener.accept().unwrap().0);
        let (mut broken, mut whole) = if client_resets {
            (client, upstream)
        } else {
            (upstream, client)
        };
        broken.write_all(b"last words").unwrap();
        let mut got = [0; 10];
        whole.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"last words");
        broken.reset();
        // The other side is not left waiting.
        match whole.read(&mut [0; 1]) {
            Ok(0) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("{other:?}"),
        }
        drop(whole);
        eventually("all descriptors are closed", || {
            proxy.descriptors() == before
        });
        let stderr = proxy.stop().stderr;
        let (side, bytes) = match client_resets {
            true => (
                "client",
                "(10 bytes to the upstream, 0 to the client, 0 lost)",
            ),
            false => (
                "upstream",
                "(0 bytes to the upstream, 10 to the client, 0 lost)",
            ),
        };
        let line = stderr
            .lines()
            .find(|line| line.contains(bytes))
            .unwrap_or_else(|| panic!("{stderr}"));
        assert!(line.contains(&format!("{side}: [Errno 104]")), "{line}");
        let last = stderr.lines().rfind(|line| line.contains("stats")).unwrap();
        assert_eq!(stat(last, &format!("{side}_errors")), 1, "{last}");
    }
}

/// What the receiver has is an unbroken piece of what the sender sent, up to the moment of the cut, and all that the proxy counted.
#[test]
fn a_transfer_cut_by_sigterm_arrives_as_far_as_it_was_counted() {
    let (listener, endpoint) = listen();
    for mode in ["copy", "splice"] {
        let args = ["--drain", "0.3", "--mode", mode];
        let mut proxy = Proxy::start(Family::V4, &[&endpoint], &args);
        let client = proxy.connect();
        let mut upstream = listener.accept().unwrap().0;
        let bytes = Random::new(seed()).bytes(MIB);
        let sent = bytes.clone();
        let sender = thread::spawn(move || while { &client }.write_all(&sent).is_ok() {});
        let mut got = vec![0; MIB / 2];
        upstream.read_exact(&mut got).unwrap();
        proxy.process.signal(libc::SIGTERM);
        let finished = proxy.process.wait();
        assert_eq!(finished.status.code(), Some(0), "{finished:?}");
        // All that the proxy's kernel had taken for the upstream comes, though the proxy is gone; or a reset, where it could not.
        let rest = upstream.read_to_end(&mut got);
        sender.join().unwrap();
        for (index, chunk) in got.chunks(MIB).enumerate() {
            assert!(
                chunk == &bytes[..chunk.len()],
                "MiB {index} is not what was sent"
            );
        }
        let line = finished
            .stderr
            .lines()
            .find(|line| line.contains("cut at the end of the drain"));
        let line = line.unwrap_or_else(|| panic!("{finished:?}"));
        let words = line.split_once('(').unwrap().1;
        let counted: usize = words.split(' ').next().unwrap().parse().unwrap();
        match rest {
            Ok(_) => assert_eq!(got.len(), counted, "{line}"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionReset);
                assert!(got.len() <= counted, "{line}");
            }
        }
    }
}

/// An upstream that echoes what comes on connections that begin with `e`, and leaves those that begin with `s` to the test.
fn echo_or_stall(listener: UnixListener) -> mpsc::Receiver<UnixStream> {
    let (sender, stalled) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut kind = [0];
            if { &stream }.read_exact(&mut kind).is_err() {
                continue;
            }
            if kind == *b"s" {
                let _ = sender.send(stream);
            } else {
                thread::spawn(move || {
                    let mut bytes = [0; 64];
                    while { &stream }.read_exact(&mut bytes).is_ok() {
                        let _ = { &stream }.write_all(&bytes);
                    }
                });
            }
        }
    });
    stalled
}

/// Has the kernel keep little of what is sent, so that what stalls is soon held up by the proxy.
fn send_little_ahead(stream: &UnixStream) {
    let bytes: libc::c_int = 4096;
    // SAFETY: the option's value is one int that lives through the call.
    let set = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_SNDBUF,
            (&raw const bytes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(set, 0);
}

/// The 99th percentile of round trips on 16 connections in turn.
fn p99(streams: &mut [Stream]) -> Duration {
    let mut times: Vec<Duration> = (0..1600)
        .map(|n| {
            let start = Instant::now();
            streams[n % 16].round_trip(&[n as u8; 64]).unwrap();
            start.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() * 99 / 100]
}

#[test]
fn a_thousand_stalled_readers_take_their_share_of_memory_and_hardly_any_time_of_others() {
    const STALLED: u64 = 1000;
    const IN_FLIGHT_KIB: u64 = 16;
    ringsock::raise_descriptor_limit();
    let dir = TempDir::new();
    let path = dir.path().join("upstream.socket");
    let stalling = echo_or_stall(UnixListener::bind(&path).unwrap());
    // Of a Unix connection the kernel keeps some 200 KiB; a thousand of TCP might fill all it has for TCP, and slow down everyone.
    let proxy = Proxy::start(
        Family::Unix,
        &[&Endpoint::Unix(path)],
        &[
            "--in-flight",
            "16384",
            "--mode",
            "copy",
            "--idle-timeout",
            "600",
        ],
    );
    let mut streams: Vec<Stream> = (0..16).map(|_| proxy.connect()).collect();
    for stream in &mut streams {
        stream.write_all(b"e").unwrap();
    }
    let calm = p99(&mut streams);
    let readers: Vec<Stream> = (0..STALLED)
        .map(|_| {
            let mut reader = proxy.connect();
            reader.write_all(b"s").unwrap();
            reader
        })
        .collect();
    let senders: Vec<UnixStream> = (0..STALLED)
        .map(|_| stalling.recv().expect("the upstream runs"))
        .collect();
    for sender in &senders {
        send_little_ahead(sender);
        sender.set_nonblocking(true).unwrap();
    }
    let before_kib = proxy.process.resident_kib();
    let (mut sent, mut last_sent) = (0, Instant::now());
    while last_sent.elapsed() < Duration::from_millis(500) {
        for mut sender in &senders {
            while let Ok(n) = sender.write(&[7; 4096]) {
                sent += n;
                last_sent = Instant::now();
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    let grown_kib = proxy.process.resident_kib().saturating_sub(before_kib);
    // One buffer each way at the most; the allocator takes a little more, and so does what is deeper in the fibers' stacks.
    let most_kib = STALLED * (2 * IN_FLIGHT_KIB + 2 * 8) + 4096;
    println!("{grown_kib} KiB for {sent} bytes sent and not read, {most_kib} KiB at the most");
    assert!(grown_kib <= most_kib, "{grown_kib} KiB, not {most_kib}");
    assert!(
        grown_kib >= STALLED * IN_FLIGHT_KIB / 2,
        "they are not stalled: {grown_kib} KiB"
    );
    let beside = p99(&mut streams);
    let ratio = beside.as_secs_f64() / calm.as_secs_f64();
    println!("p99 {calm:?} alone, {beside:?} beside the stalled: {ratio:.2} times");
    // It is under 2 on a quiet machine, which the benchmark's cell proxy-stalled judges.
    assert!(
        ratio < 10.0 || beside < Duration::from_millis(50),
        "{calm:?}, {beside:?}"
    );
    // They are held up, not busy.
    let used = proxy.process.cpu_time();
    thread::sleep(Duration::from_millis(500));
    let used = proxy.process.cpu_time() - used;
    assert!(
        used < Duration::from_millis(150),
        "stalled, they take {used:?}"
    );
    drop((readers, senders, streams));
    proxy.stop();
}

/// Everything that comes back from the metrics' listener after `request`.
fn asked(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    stream.write_all(request).unwrap();
    let mut got = String::new();
    stream.read_to_string(&mut got).unwrap();
    got
}

/// The value of a sample on a page of metrics.
fn sample(page: &str, name: &str) -> u64 {
    let line = page
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {page}"))
        .parse()
        .unwrap()
}

/// A proxy that tells its metrics, and where.
fn start_with_metrics(upstream: &Endpoint, args: &[&str]) -> (Proxy, SocketAddr) {
    let args = [&["--metrics", "127.0.0.1:0"], args].concat();
    let mut proxy = Proxy::start(Family::V4, &[upstream], &args);
    let line = proxy.process.line();
    let address = line.strip_prefix("metrics on ").expect("the second line");
    (proxy, address.parse().unwrap())
}

#[test]
fn metrics_are_told_in_prometheus_form() {
    const GET: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n";
    let server = echo(Family::V4).expect("IPv4");
    let (proxy, address) = start_with_metrics(&server.endpoint, &["--workers", "2"]);
    let mut open = proxy.connect();
    open.round_trip(b"hello").unwrap();
    for _ in 0..3 {
        proxy.connect().round_trip(&[1; 1000]).unwrap();
    }
    let closed = "ringsock_proxy_connections_ended_total{reason=\"closed\"}";
    eventually("the three are counted", || {
        sample(&asked(address, GET), closed) == 3
    });
    let answer = asked(address, GET);
    let (head, page) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(
        head.contains("\r\nContent-Type: text/plain; version=0.0.4"),
        "{head}"
    );
    assert!(
        head.contains(&format!("\r\nContent-Length: {}", page.len())),
        "{head}"
    );
    assert_eq!(sample(page, "ringsock_proxy_connections_active"), 1);
    assert_eq!(sample(page, "ringsock_proxy_connections_accepted_total"), 4);
    for direction in ["to_upstream", "to_client"] {
        let name = format!("ringsock_proxy_bytes_total{{direction=\"{direction}\"}}");
        assert_eq!(sample(page, &name), 3000);
    }
    let upstream = format!(
        "ringsock_proxy_upstream_up{{upstream=\"0 {}\"}}",
        written(&server.endpoint)
    );
    assert_eq!(sample(page, &upstream), 1);
    for worker in 0..2 {
        assert!(
            sample(
                page,
                &format!("ringsock_enters_total{{worker=\"{worker}\"}}")
            ) > 0
        );
    }
    // Every sample follows its family's help and type, and counters are called so.
    let mut family = ("", "");
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            family = rest.split_once(' ').unwrap();
            assert_eq!(
                family.1 == "counter",
                family.0.ends_with("_total"),
                "{line}"
            );
            assert!(page.contains(&format!("# HELP {} ", family.0)), "{line}");
        } else if !line.starts_with("# HELP ") {
            let name = line.split([' ', '{']).next().unwrap();
            assert_eq!(name, family.0, "{line}");
        }
    }
    if has("curl", "curl") {
        let url = format!("http://{address}/metrics");
        let args = [
            "-sSf",
            "--max-time",
            "60",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code} %{content_type}",
            &url,
        ];
        let finished = run(Command::new("curl").args(args), b"");
        let said = String::from_utf8_lossy(&finished.stdout).into_owned();
        assert!(
            said.starts_with("200 text/plain; version=0.0.4"),
            "{finished:?}"
        );
    }
    if has_python() {
        let script = "import sys\ntry:\n    from prometheus_client.parser import text_string_to_metric_families as parse\n\
            except ImportError:\n    sys.exit(77)\nprint(sum(len(family.samples) for family in parse(sys.stdin.read())))\n";
        let finished = run(
            Command::new("python3").args(["-c", script]),
            page.as_bytes(),
        );
        if finished.status.code() == Some(77) {
            println!("skipped: Python has no module prometheus_client");
        } else {
            let parsed = String::from_utf8_lossy(&finished.stdout).into_owned();
            let samples = page.lines().filter(|line| !line.starts_with('#')).count();
            assert_eq!(parsed.trim(), samples.to_string(), "{finished:?}");
        }
    }
    drop(open);
    proxy.stop();
    server.finish();
}

#[test]
fn whoever_asks_for_metrics_badly_is_answered_or_cut_and_holds_up_nobody() {
    let server = echo(Family::V4).expect("IPv4");
    let (proxy, address) = start_with_metrics(&server.endpoint, &[]);
    let before = proxy.descriptors();
    for (request, status) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"\x16\x03\x01\x00\xff\n\n", "400"),
        (b"GET /metrics SPDY\r\n\r\n", "400"),
        (b"GET /metrics HTTP/1.0\n\n", "200"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", "200"),
    ] {
        let answer = asked(address, request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
    }
    let head = asked(address, b"HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(head.ends_with("\r\n\r\n"), "{head}");
    let long = [b"GET /metrics HTTP/1.1\r\nX: ".as_slice(), &[b'x'; 20_000]].concat();
    assert!(asked(address, &long).starts_with("HTTP/1.1 431 "));
    eventually("all descriptors are closed", || {
        proxy.descriptors() == before
    });
    // More clients that say nothing than are served at a time: each is cut in time, and then others are served.
    let silent: Vec<TcpStream> = (0..12)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    eventually("they are accepted, as many as may be", || {
        proxy.descriptors() == before + 8
    });
    let mut stream = proxy.connect();
    stream.round_trip(b"the proxy itself goes on").unwrap();
    let start = Instant::now();
    assert!(asked(address, b"GET /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200 "));
    let took = start.elapsed();
    assert!(took < Duration::from_secs(30), "{took:?}");
    drop((silent, stream));
    eventually("all descriptors are closed", || {
        proxy.descriptors() == before
    });
    proxy.stop();
    server.finish();
}

// Real peers.

/// Whether a program of Debian's package `package` is there; says so if not.
fn has(program: &str, package: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    let there = path
        .split(':')
        .chain(["/usr/sbin", "/sbin"])
        .any(|dir| Path::new(dir).join(program).is_file());
    if !there {
        println!("skipped: there is no {program} (package {package})");
    }
    there
}

/// A port that was free just now.
fn free_port() -> u16 {
    listen().0.local_addr().unwrap().port()
}

/// Waits until somebody listens there.
fn wait_for(address: SocketAddr) {
    eventually("the server listens", || TcpStream::connect(address).is_ok());
}

/// A command of an administrator's directory, run quietly.
fn daemon(program: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command.stdin(Stdio::null());
    command
}

struct Nginx {
    process: Process,
    address: SocketAddr,
    dir: TempDir,
}

impl Nginx {
    fn start() -> Nginx {
        let dir = TempDir::new();
        let root = dir.path().display();
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let config = format!(
            "daemon off; master_process off; worker_processes 1; pid {root}/pid; error_log {root}/error;
            events {{ worker_connections 1024; }}
            http {{ access_log off; client_body_temp_path {root}/1; proxy_temp_path {root}/2; fastcgi_temp_path {root}/3;
            uwsgi_temp_path {root}/4; scgi_temp_path {root}/5; keepalive_requests 1000000;
            server {{ listen {address}; root {root}; location = /hello {{ return 200 hello; }} }} }}"
        );
        let file = dir.path().join("nginx.conf");
        fs::write(&file, config).unwrap();
        let mut command = daemon("nginx");
        command
            .args([
                "-e",
                &format!("{root}/error"),
                "-p",
                &root.to_string(),
                "-c",
            ])
            .arg(&file);
        let process = Process::start(&mut command, b"").unwrap();
        wait_for(address);
        Nginx {
            process,
            address,
            dir,
        }
    }
}

#[test]
fn nginx_behind_it_serves_wrk_and_curl() {
    if !has("nginx", "nginx") {
        return;
    }
    let nginx = Nginx::start();
    let bytes = Random::new(seed()).bytes(20 * MIB);
    fs::write(nginx.dir.path().join("large"), &bytes).unwrap();
    // As a worker of nginx, which is another user where it is started by root, it has to be allowed in.
    let _ = Command::new("chmod")
        .args(["-R", "a+rX"])
        .arg(nginx.dir.path())
        .status();
    for workers in ["1", "2"] {
        let proxy = Proxy::start(
            Family::V4,
            &[&Endpoint::Tcp(nginx.address)],
            &["--workers", workers],
        );
        let url = format!("http://{}", proxy.address());
        if has("curl", "curl") {
            let args = ["-sS", "--max-time", "60", &format!("{url}/large")];
            let finished = run(Command::new("curl").args(args), b"");
            assert!(finished.status.success(), "{finished:?}");
            assert!(
                finished.stdout == bytes,
                "{} bytes came",
                finished.stdout.len()
            );
        }
        if has("wrk", "wrk") {
            let args = ["-t1", "-c32", "-d1s", &format!("{url}/hello")];
            let finished = run(Command::new("wrk").args(args), b"");
            let out = String::from_utf8_lossy(&finished.stdout).into_owned();
            assert!(finished.status.success(), "{finished:?}");
            assert!(
                out.contains("requests in") && !out.contains("Non-2xx"),
                "{out}"
            );
            assert!(!out.contains("Socket errors"), "{out}");
        }
        proxy.stop();
    }
    drop(nginx.process);
}

#[test]
fn redis_behind_it_passes_its_benchmark() {
    if !has("redis-server", "redis-server") || !has("redis-benchmark", "redis-tools") {
        return;
    }
    let dir = TempDir::new();
    let port = free_port();
    let mut command = daemon("redis-server");
    command.args([
        "--port",
        &port.to_string(),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
    ]);
    command
        .args(["--appendonly", "no", "--dir"])
        .arg(dir.path());
    let redis = Process::start(&mut command, b"").unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    wait_for(address);
    for workers in ["1", "2"] {
        let proxy = Proxy::start(
            Family::V4,
            &[&Endpoint::Tcp(address)],
            &["--workers", workers],
        );
        let port = proxy.address().port().to_string();
        for args in [
            &["-n", "20000", "-c", "50", "-d", "64"][..],
            &["-n", "1000", "-c", "10", "-d", "100000"],
            &["-n", "50000", "-c", "20", "-P", "16"],
        ] {
            let mut command = Command::new("redis-benchmark");
            command
                .args(["-h", "127.0.0.1", "-p", &port, "-q", "-e", "-t", "set,get"])
                .args(args);
            let finished = run(&mut command, b"");
            assert!(finished.status.success(), "{finished:?}");
            let out = String::from_utf8_lossy(&finished.stdout).into_owned();
            assert!(!out.contains("Error"), "{out}");
            assert_eq!(out.matches("requests per second").count(), 2, "{out}");
        }
        proxy.stop();
    }
    drop(redis);
}

#[test]
fn iperf_behind_it_moves_bulk_both_ways() {
    if !has("iperf3", "iperf3") {
        return;
    }
    let port = free_port();
    let mut command = Command::new("iperf3");
    command.args(["-s", "-B", "127.0.0.1", "-p", &port.to_string()]);
    let iperf = Process::start(&mut command, b"").unwrap();
    thread::sleep(Duration::from_millis(200));
    for workers in ["1", "2"] {
        let upstream = Endpoint::Tcp(([127, 0, 0, 1], port).into());
        let proxy = Proxy::start(Family::V4, &[&upstream], &["--workers", workers]);
        let port = proxy.address().port().to_string();
        for direction in [
            &["-n", "200M"][..],
            &["-n", "200M", "-R"],
            &["-t", "1", "--bidir"],
        ] {
            let mut command = Command::new("iperf3");
            command
                .args(["-c", "127.0.0.1", "-p", &port, "-P", "2", "-J"])
                .args(direction);
            let finished = run(&mut command, b"");
            assert!(finished.status.success(), "{finished:?}");
        }
        proxy.stop();
    }
    drop(iperf);
}

#[test]
fn netcat_that_closes_its_side_gets_its_answer() {
    if !has("nc", "netcat-openbsd") {
        return;
    }
    let server = echo(Family::V4).expect("IPv4");
    let proxy = Proxy::start(Family::V4, &[&server.endpoint], &[]);
    let bytes = Random::new(seed()).bytes(MIB);
    let port = proxy.address().port().to_string();
    let mut command = Command::new("nc");
    command.args(["-N", "-w", "60", "127.0.0.1", &port]);
    let finished = run(&mut command, &bytes);
    assert!(finished.status.success(), "{finished:?}");
    assert!(
        finished.stdout == bytes,
        "{} bytes came back",
        finished.stdout.len()
    );
    let finished = proxy.stop();
    assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
    server.finish();
}

#[test]
fn an_upstream_that_dies_in_mid_transfer_ends_its_connections_only() {
    let (listener, endpoint) = listen();
    let proxy = Proxy::start(Family::V4, &[&endpoint], &[]);
    let before = proxy.descriptors();
    let mut clients = Vec::new();
    for _ in 0..8 {
        let mut client = proxy.connect();
        let (mut upstream, _) = listener.accept().unwrap();
        clients.push(thread::spawn(move || {
            // It sends for as long as somebody takes it.
            while client.write(&[1; 65536]).is_ok() {}
            let mut got = Vec::new();
            match client.read_to_end(&mut got) {
                Ok(_) => {}
                Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
            }
        }));
        upstream.read_exact(&mut vec![0; MIB]).unwrap();
        Stream::Tcp(upstream).reset();
    }
    for client in clients {
        client.join().unwrap();
    }
    let mut client = proxy.connect();
    let (mut upstream, _) = listener.accept().unwrap();
    client.write_all(b"still there").unwrap();
    client.half_close().unwrap();
    let mut got = Vec::new();
    upstream.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"still there");
    upstream.shutdown(Shutdown::Both).unwrap();
    drop((client, upstream));
    eventually("all descriptors are closed", || {
        proxy.descriptors() <= before
    });
    proxy.stop();
}
