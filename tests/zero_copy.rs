//! Buffer pools and sends without a copy as programs use them: `examples/buffer_pool.rs` against Python and netcat, and routes that are
//! not loopback, in networks that the tests make for themselves.
#![allow(unsafe_code)]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use ringsock::prelude::*;
use ringsock::{BufferPool, Handle, Metrics, Runtime, ZeroCopy};

use support::{EchoServer, Endpoint, Family, Finished, has_python, on_epoll, run};

const PYTHON_CLIENT: &str = r#"
import hashlib, random, socket, sys, threading
host, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
s = socket.create_connection((host, port), 60)
sent, received = hashlib.sha256(), hashlib.sha256()
def send():
    numbers, left = random.Random(size), size
    while left:
        chunk = numbers.randbytes(min(left, numbers.randint(1, 200000)))
        sent.update(chunk)
        s.sendall(chunk)
        left -= len(chunk)
    s.shutdown(socket.SHUT_WR)
sender = threading.Thread(target=send)
sender.start()
total = 0
while True:
    data = s.recv(262144)
    if not data:
        break
    received.update(data)
    total += len(data)
sender.join()
print(total, sent.digest() == received.digest())
"#;

fn python(server: &EchoServer, bytes: usize) -> Finished {
    let Endpoint::Tcp(address) = &server.endpoint else {
        unreachable!("it listens on TCP")
    };
    let mut client = Command::new("python3");
    client.args(["-", &address.ip().to_string(), &address.port().to_string()]);
    run(client.arg(bytes.to_string()), PYTHON_CLIENT.as_bytes())
}

fn start(args: &[&str]) -> EchoServer {
    EchoServer::start_program("buffer_pool", Family::V4, args, |_| ()).expect("IPv4")
}

/// Ends it by SIGTERM: its last words.
fn stop(mut server: EchoServer) -> String {
    server.process.signal(libc::SIGTERM);
    let finished = server.process.wait();
    assert!(finished.status.success(), "{finished:?}");
    finished.stderr
}

#[test]
fn python_gets_every_byte_back_through_a_pool() {
    if !has_python() {
        return;
    }
    for args in [
        &["--buffers", "4"][..],
        &["--buffers", "4", "--zero-copy", "always"],
        &["--buffers", "4", "--zero-copy", "always", "--workers", "2"],
        &["--buffers", "1", "--buffer", "1000", "--zero-copy", "never"],
    ] {
        let server = start(args);
        let bytes = 3_000_000;
        let clients: Vec<Finished> = thread::scope(|scope| {
            let clients = [(); 3].map(|()| scope.spawn(|| python(&server, bytes)));
            clients.map(|client| client.join().unwrap()).into()
        });
        for client in clients {
            assert_eq!(client.stdout, b"3000000 True\n", "{args:?}: {client:?}");
        }
        let said = stop(server);
        let count = args[1];
        assert!(
            said.contains(&format!("{count} of {count} buffers are home")),
            "{said}"
        );
        let without = !args.contains(&"always") || on_epoll();
        assert_eq!(said.contains("; 0 sends without a copy"), without, "{said}");
    }
}

#[test]
fn netcat_gets_its_line_back() {
    let server = start(&[]);
    let Endpoint::Tcp(address) = server.endpoint else {
        unreachable!("it listens on TCP")
    };
    let mut netcat = Command::new("nc");
    netcat.args(["-N", "127.0.0.1", &address.port().to_string()]);
    if Command::new("nc").arg("-h").output().is_err() {
        println!("skipped: there is no nc");
        return;
    }
    assert_eq!(run(&mut netcat, b"a line\n").stdout, b"a line\n");
    stop(server);
}

#[test]
fn idle_connections_hold_no_buffer_and_one_that_does_not_read_holds_up_no_other() {
    let server = start(&["--buffers", "2", "--buffer", "4096"]);
    let _idle: Vec<_> = (0..50).map(|_| server.connect()).collect();
    let Endpoint::Tcp(address) = server.endpoint else {
        unreachable!("it listens on TCP")
    };
    let mut stalled = TcpStream::connect(address).unwrap();
    stalled
        .set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    // Until the server cannot send back any more.
    while stalled.write(&[7; 65_536]).is_ok() {}
    let mut lively = server.connect();
    for n in 0..100u8 {
        lively.round_trip(&[n; 1000]).unwrap();
    }
    drop(stalled);
    server.finish();
}

// Networks of the tests' own.

/// Runs `ip` in the calling thread's network.
fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.unwrap_or_else(|error| panic!("ip: {error}"));
    assert!(output.status.success(), "ip {arguments}: {output:?}");
}

/// Gives the calling thread a network of its own; false, with the reason said, where this user may make none.
fn unshare() -> bool {
    if let Err(error) = Command::new("ip").arg("-V").output() {
        println!("skipped: no iproute2: {error}");
        return false;
    }
    // SAFETY: no memory is passed; only this thread moves.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        println!(
            "skipped: no network of its own: {}",
            std::io::Error::last_os_error()
        );
        return false;
    }
    ip("link set lo up");
    true
}

fn thread_id() -> i32 {
    // SAFETY: no memory is passed.
    unsafe { libc::gettid() }
}

/// Runs `main` in a runtime on this thread: its result and what the worker counted.
fn run_with<T: 'static>(mode: ZeroCopy, main: impl FnOnce() -> T + 'static) -> (T, Metrics) {
    let main = move || (main(), Handle::current().unwrap());
    let (result, handle) = Runtime::builder().zero_copy(mode).run(main).unwrap();
    (result, handle.metrics()[0])
}

fn has_zero_copy() -> bool {
    let features = ringsock::Features::probe().unwrap();
    let has = features
        .iter()
        .any(|feature| feature.name == "SEND_ZC" && feature.on);
    if !has {
        println!("skipped: this kernel has no zero-copy sends that report");
    }
    has
}

fn pattern(at: usize) -> u8 {
    (at % 251) as u8
}

/// Two networks joined by a pair of virtual cables: the route is not loopback, so it is tried, and every byte arrives. (What crosses such a
/// pair is copied when it is received, so the route also learns that.)
#[test]
fn another_network_gets_every_byte_and_the_route_learns_what_it_is_like() {
    const SENDS: usize = 300;
    const PIECE: usize = 64 << 10;
    if !has_zero_copy() {
        return;
    }
    thread::spawn(|| {
        if !unshare() {
            return;
        }
        let (tell_id, id) = mpsc::channel();
        let (go, went) = mpsc::channel::<()>();
        let (tell_ready, ready) = mpsc::channel();
        let receiver = thread::spawn(move || {
            assert!(unshare());
            tell_id.send(thread_id()).unwrap();
            let () = went.recv().unwrap();
            ip("addr add 10.77.0.2/24 dev ringsock1");
            ip("link set ringsock1 up");
            let listener = std::net::TcpListener::bind("10.77.0.2:7000").unwrap();
            tell_ready.send(()).unwrap();
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            bytes
        });
        let id = id.recv().unwrap();
        ip("link add ringsock0 type veth peer name ringsock1");
        ip(&format!("link set ringsock1 netns {id}"));
        ip("addr add 10.77.0.1/24 dev ringsock0");
        ip("link set ringsock0 up");
        go.send(()).unwrap();
        ready.recv().unwrap();
        let ((), metrics) = run_with(ZeroCopy::Adaptive, || {
            let pool = BufferPool::builder().buffers(16, PIECE).build().unwrap();
            let socket = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
            socket.settimeout(30).unwrap();
            socket.connect(("10.77.0.2", 7000)).unwrap();
            for n in 0..SENDS {
                let mut buf = pool.take(PIECE).unwrap();
                (n * PIECE..)
                    .zip(buf.iter_mut())
                    .for_each(|(at, byte)| *byte = pattern(at));
                socket.sendall_buf(buf.into()).unwrap();
            }
            drop(socket);
            let all: Result<Vec<_>, _> = (0..16).map(|_| pool.take(1)).collect();
            assert!(all.is_ok());
        });
        let bytes = receiver.join().unwrap();
        assert_eq!(bytes.len(), SENDS * PIECE);
        assert!(
            bytes
                .iter()
                .enumerate()
                .all(|(at, byte)| *byte == pattern(at))
        );
        println!("{metrics:?}");
        assert!(metrics.zero_copy_sends >= 1, "{metrics:?}");
        assert_eq!((metrics.buffers_pinned, metrics.buffers_leaked), (0, 0));
        if metrics.zero_copy_copied > 3 + 2 {
            // Reported as copied, message after message, it is not tried much longer.
            assert!(metrics.zero_copy_sends < SENDS as u64 / 4, "{metrics:?}");
        }
    })
    .join()
    .unwrap();
}

/// Where nothing copies on the way, the kernel says so, and the route stays on.
#[test]
fn a_route_on_which_nothing_copies_stays_on() {
    const SENDS: u64 = 200;
    const PIECE: usize = 32 << 10;
    if !has_zero_copy() {
        return;
    }
    thread::spawn(|| {
        if !unshare() {
            return;
        }
        // The other end of the cable stays down, so whatever is sent ends in front of it.
        ip("link add ringsock2 type veth peer name ringsock3");
        ip("addr add 10.78.0.1/24 dev ringsock2");
        // A datagram in fragments is copied into them.
        ip("link set ringsock2 mtu 65535 up");
        ip("neigh add 10.78.0.2 lladdr 02:00:00:00:00:01 dev ringsock2 nud permanent");
        let ((), metrics) = run_with(ZeroCopy::Adaptive, || {
            let pool = BufferPool::builder().buffers(16, PIECE).build().unwrap();
            let socket = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
            socket.connect(("10.78.0.2", 9)).unwrap();
            for _ in 0..SENDS {
                socket
                    .sendall_buf(pool.take(PIECE).unwrap().into())
                    .unwrap();
                ringsock::yield_now();
            }
            let all: Result<Vec<_>, _> = (0..16).map(|_| pool.take(1)).collect();
            assert!(all.is_ok());
        });
        println!("{metrics:?}");
        assert!(metrics.zero_copy_sends > SENDS / 2, "{metrics:?}");
        assert_eq!(metrics.zero_copy_copied, 0, "{metrics:?}");
        assert_eq!((metrics.buffers_pinned, metrics.buffers_leaked), (0, 0));
    })
    .join()
    .unwrap();
}
