//! Closing: whoever waits is woken, the peer is told, and no call ever reaches another socket's descriptor.
#![allow(unsafe_code)]

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::*;
use ringsock::{Handle, JoinHandle, Result, Runtime, socketpair};
use support::{Random, alone, checked, descriptors, eventually, fork, listener, seed};

/// What a closed socket answers.
fn is_ebadf<T>(result: &Result<T>) -> bool {
    result
        .as_ref()
        .err()
        .is_some_and(|error| error.errno() == Some(libc::EBADF))
}

fn thread_id() -> i32 {
    // SAFETY: no memory is passed.
    unsafe { libc::gettid() }
}

/// Waits until the thread sleeps in the kernel (or has ended).
fn await_asleep(thread: i32) {
    eventually("the thread sleeps", || {
        fs::read_to_string(format!("/proc/self/task/{thread}/stat")).map_or(true, |stat| {
            stat.rsplit(')')
                .next()
                .is_some_and(|rest| rest.starts_with(" S"))
        })
    });
}

/// Waits until `id` has been set, and that thread sleeps.
fn await_blocked(id: &AtomicI32) {
    eventually("the call begins", || id.load(Ordering::SeqCst) != 0);
    await_asleep(id.load(Ordering::SeqCst));
}

/// With buffers that fill soon.
fn small_tcp_pair() -> (Socket, Socket) {
    let listener = listener(8);
    // Before connecting, so that the window is small as well.
    listener.setsockopt(SOL_SOCKET, SO_RCVBUF, 16_384).unwrap();
    let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    client.setsockopt(SOL_SOCKET, SO_RCVBUF, 16_384).unwrap();
    client.connect(listener.getsockname().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    for socket in [&client, &server] {
        socket.setsockopt(SOL_SOCKET, SO_SNDBUF, 16_384).unwrap();
    }
    (client, server)
}

fn pair(family: Family) -> (Socket, Socket) {
    if family == AF_UNIX {
        socketpair().unwrap()
    } else {
        small_tcp_pair()
    }
}

/// Busy for about so long, so that two sides meet at ever different points.
fn spin(microseconds: u64) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_micros(microseconds) {
        std::hint::spin_loop();
    }
}

/// Something that runs in a fiber or on a thread.
enum Running<T> {
    Fiber(JoinHandle<T>),
    Thread(thread::JoinHandle<T>),
}

impl<T: Send + 'static> Running<T> {
    fn fiber(runtime: &Handle, worker: usize, body: impl FnOnce() -> T + Send + 'static) -> Self {
        Running::Fiber(runtime.spawn_on(worker, body).unwrap())
    }

    fn thread(body: impl FnOnce() -> T + Send + 'static) -> Self {
        Running::Thread(thread::spawn(body))
    }

    fn join(self) -> T {
        match self {
            Running::Fiber(fiber) => fiber.join().unwrap(),
            Running::Thread(thread) => thread.join().unwrap(),
        }
    }
}

// Who waits is woken.

#[derive(Clone, Copy, Debug)]
enum Call {
    Recv,
    Accept,
    Sendall,
}

impl Call {
    /// Waits on the socket until something ends it.
    fn run(self, socket: &Socket) -> Result<()> {
        match self {
            Call::Recv => socket.recv_into(&mut [0; 16]).map(drop),
            Call::Accept => socket.accept().map(drop),
            Call::Sendall => socket.sendall(&vec![7; 1 << 20]),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Caller {
    Fiber,
    Thread,
}

#[derive(Clone, Copy, Debug)]
enum Closer {
    SameWorker,
    OtherWorker,
    Thread,
}

/// The other side sees the end, now that `close` has returned.
fn assert_peer_was_told(call: Call, peer: Option<&Socket>, address: Option<&Address>, case: &str) {
    if let Some(address) = address {
        let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
        let error = client.connect(address).unwrap_err();
        assert_eq!(error.errno(), Some(libc::ECONNREFUSED), "{case}");
    }
    let Some(peer) = peer else {
        return;
    };
    if peer.family() == AF_UNIX && matches!(call, Call::Recv) {
        let end = peer.recv_with(1, MSG_DONTWAIT);
        assert!(
            end.as_ref().is_ok_and(|end| end.is_empty()),
            "{case}: {end:?}"
        );
    }
    peer.settimeout(60).unwrap();
    let mut chunk = [0; 65_536];
    loop {
        match peer.recv_into(&mut chunk) {
            Ok(0) => return,
            Ok(count) => assert!(chunk[..count].iter().all(|byte| *byte == 7), "{case}"),
            Err(error) => panic!("{case}: instead of the end: {error}"),
        }
    }
}

fn close_wakes(
    runtime: &Handle,
    call: Call,
    caller: Caller,
    closer: Closer,
    family: Family,
    round: usize,
) {
    let (used_before, race) = (round & 1 != 0, round & 2 != 0);
    let case = format!(
        "{call:?} on {family:?}, waiting {caller:?}, closing {closer:?}, used before {used_before}, race {race}"
    );
    let (socket, peer, address) = match call {
        Call::Accept => {
            let listener = listener(8);
            let address = listener.getsockname().unwrap();
            (listener, None, Some(address))
        }
        _ => {
            let (socket, peer) = pair(family);
            (socket, Some(peer), None)
        }
    };
    if used_before {
        // The first worker that waits on it is the one that closing asks first.
        let socket = socket.clone();
        let first = move || {
            socket.settimeout(0.000_1).unwrap();
            let nothing = match call {
                Call::Accept => socket.accept().map(drop),
                _ => socket.recv(1).map(drop),
            };
            assert_eq!(nothing, Err(Error::Timeout));
            socket.settimeout(None).unwrap();
        };
        runtime.spawn_on(0, first).unwrap().join().unwrap();
    }
    let id = Arc::new(AtomicI32::new(0));
    let waiting = {
        let (socket, id) = (socket.clone(), id.clone());
        let wait = move || {
            id.store(thread_id(), Ordering::SeqCst);
            call.run(&socket)
        };
        match caller {
            Caller::Fiber => Running::fiber(runtime, 0, wait),
            Caller::Thread => Running::thread(wait),
        }
    };
    if !race {
        await_blocked(&id);
    }
    let closing = {
        let (socket, case) = (socket.clone(), case.clone());
        let close = move || {
            assert_eq!(socket.close(), Ok(()), "{case}");
            assert_eq!(socket.fileno(), -1, "{case}");
            assert_peer_was_told(call, peer.as_ref(), address.as_ref(), &case);
        };
        match closer {
            Closer::SameWorker => Running::fiber(runtime, 0, close),
            Closer::OtherWorker => Running::fiber(runtime, 1, close),
            Closer::Thread => Running::thread(close),
        }
    };
    closing.join();
    let result = waiting.join();
    assert!(is_ebadf(&result), "{case}: {result:?}");
}

#[test]
fn close_from_anywhere_wakes_every_blocked_call() {
    checked(|| {
        let runtime = Runtime::builder().workers(2).build().unwrap();
        for call in [Call::Recv, Call::Accept, Call::Sendall] {
            for caller in [Caller::Fiber, Caller::Thread] {
                for closer in [Closer::SameWorker, Closer::OtherWorker, Closer::Thread] {
                    for family in [AF_UNIX, AF_INET] {
                        for round in 0..8 {
                            close_wakes(&runtime.handle(), call, caller, closer, family, round);
                        }
                    }
                }
            }
        }
    });
}

#[test]
fn one_close_wakes_many_waiters_of_both_directions() {
    checked(|| {
        let runtime = Runtime::builder().workers(2).build().unwrap();
        let handle = runtime.handle();
        for round in 0..20 {
            let (socket, peer) = socketpair().unwrap();
            let mut waiting = Vec::new();
            for place in 0..9 {
                let (socket, id) = (socket.clone(), Arc::new(AtomicI32::new(0)));
                let set = id.clone();
                let wait = move || {
                    set.store(thread_id(), Ordering::SeqCst);
                    match place % 2 {
                        0 => socket.recv(16).map(drop),
                        _ => socket.sendall(&vec![7; 1 << 22]),
                    }
                };
                waiting.push((
                    match place / 3 {
                        2 => Running::thread(wait),
                        worker => Running::fiber(&handle, worker, wait),
                    },
                    id,
                ));
            }
            for (_, id) in &waiting {
                await_blocked(id);
            }
            socket.close().unwrap();
            for (place, (waiting, _)) in waiting.into_iter().enumerate() {
                let result = waiting.join();
                assert!(is_ebadf(&result), "round {round}, {place}: {result:?}");
            }
            drop(peer);
        }
    });
}

#[test]
fn a_duplicate_keeps_the_connection_open() {
    fn try_it(family: Family) {
        let (socket, peer) = pair(family);
        let mut duplicate = File::from(socket.as_fd().try_clone_to_owned().unwrap());
        // SAFETY: no memory is passed; the number is used by `FromRawFd` below and nowhere else.
        let second = unsafe { libc::dup(socket.as_raw_fd()) };
        assert!(second >= 0);
        // SAFETY: dup just made it, and nothing else owns it.
        let second: File = unsafe { std::os::fd::FromRawFd::from_raw_fd(second) };
        let id = Arc::new(AtomicI32::new(0));
        let reader = {
            let (socket, id) = (socket.clone(), id.clone());
            thread::spawn(move || {
                id.store(thread_id(), Ordering::SeqCst);
                socket.recv(16)
            })
        };
        await_blocked(&id);
        socket.close().unwrap();
        let read = reader.join().unwrap();
        assert!(is_ebadf(&read), "{family:?}: {read:?}");

        let nothing = peer.recv_with(1, MSG_DONTWAIT);
        assert!(
            nothing.as_ref().is_err_and(Error::is_would_block),
            "{family:?}: the peer got {nothing:?}"
        );
        duplicate.write_all(b"from the duplicate").unwrap();
        assert_eq!(peer.recv(64).unwrap(), b"from the duplicate");
        peer.sendall(b"to it").unwrap();
        let mut five = [0; 5];
        duplicate.read_exact(&mut five).unwrap();
        assert_eq!(&five, b"to it");
        drop(duplicate);
        let nothing = peer.recv_with(1, MSG_DONTWAIT);
        assert!(nothing.is_err_and(|error| error.is_would_block()));
        drop(second);
        assert!(peer.recv(1).unwrap().is_empty());
    }
    checked(|| {
        for family in [AF_UNIX, AF_INET] {
            try_it(family);
            ringsock::run(move || try_it(family));
        }
    });
}

// A closed socket.

fn assert_every_method_answers_ebadf(socket: &Socket, case: &str) {
    let mut buffer = [0; 8];
    let timeout = socket.gettimeout();
    let host = if socket.family() == AF_INET6 {
        "::1"
    } else {
        "127.0.0.1"
    };
    let address = (host, 9);
    let bytes = &b"bytes"[..];
    let results: Vec<(&str, Result<()>)> = vec![
        ("bind", socket.bind(address)),
        ("listen", socket.listen(1)),
        ("accept", socket.accept().map(drop)),
        ("connect", socket.connect(address)),
        ("recv", socket.recv(8).map(drop)),
        ("recv_with", socket.recv_with(8, MSG_PEEK).map(drop)),
        ("DONTWAIT", socket.recv_with(8, MSG_DONTWAIT).map(drop)),
        ("recv_into", socket.recv_into(&mut buffer).map(drop)),
        (
            "recv_into_with",
            socket.recv_into_with(&mut buffer, 4, MSG_PEEK).map(drop),
        ),
        ("send", socket.send(bytes).map(drop)),
        ("send_with", socket.send_with(bytes, MSG_MORE).map(drop)),
        ("sendall", socket.sendall(bytes)),
        ("sendall_with", socket.sendall_with(bytes, MSG_MORE)),
        ("sendall nothing", socket.sendall(b"")),
        ("shutdown", socket.shutdown(SHUT_RDWR)),
        ("getsockname", socket.getsockname().map(drop)),
        ("getpeername", socket.getpeername().map(drop)),
        (
            "getsockopt",
            socket.getsockopt(SOL_SOCKET, SO_RCVBUF).map(drop),
        ),
        (
            "getsockopt_buf",
            socket.getsockopt_buf(SOL_SOCKET, SO_RCVBUF, 4).map(drop),
        ),
        (
            "setsockopt",
            socket.setsockopt(SOL_SOCKET, SO_RCVBUF, 65_536),
        ),
        (
            "Read",
            (&*socket).read(&mut buffer).map(drop).map_err(Error::from),
        ),
        ("Write", (&*socket).write_all(bytes).map_err(Error::from)),
        // The value is kept all the same, so the old one comes last.
        ("setblocking", socket.setblocking(true)),
        ("settimeout", socket.settimeout(timeout)),
    ];
    for (method, result) in results {
        assert!(is_ebadf(&result), "{case}, {method}: {result:?}");
    }
}

#[test]
fn a_closed_socket_answers_ebadf_to_every_method() {
    fn try_all(place: &str) {
        for family in [AF_INET, AF_INET6, AF_UNIX] {
            for kind in [SOCK_STREAM, SOCK_DGRAM] {
                for timeout in [None, Some(0.0), Some(5.0)] {
                    let case = format!("{place}, {family:?}, {kind:?}, timeout {timeout:?}");
                    let socket = Socket::new(family, kind, 0).unwrap();
                    socket.settimeout(timeout).unwrap();
                    assert!(socket.fileno() >= 0);
                    assert_eq!(socket.close(), Ok(()));
                    assert_eq!(socket.fileno(), -1);
                    assert_eq!(socket.close(), Ok(()), "{case}: again");
                    // An AF_UNIX socket cannot parse an internet address: its address calls fail before the descriptor.
                    if family != AF_UNIX {
                        assert_every_method_answers_ebadf(&socket, &case);
                    }
                    assert!(is_ebadf(&socket.recv(1)), "{case}");
                    assert!(is_ebadf(&socket.sendall(b"x")), "{case}");
                    assert_eq!(socket.gettimeout(), timeout, "{case}");
                    assert_eq!((socket.family(), socket.kind()), (family, kind));
                    assert!(format!("{socket:?}").contains("[closed]"));
                    assert!(is_ebadf(&socket.clone().accept()), "{case}");
                }
            }
        }
    }
    checked(|| {
        try_all("thread");
        ringsock::run(|| try_all("fiber"));
    });
}

/// Whether the number names an open file.
fn is_taken(fd: RawFd) -> bool {
    // SAFETY: no memory is passed.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

#[test]
fn the_number_stays_taken_until_the_last_handle_drops() {
    fn try_it() {
        let (socket, peer) = socketpair().unwrap();
        let fd = socket.fileno();
        let handle = socket.clone();
        socket.close().unwrap();
        drop(socket);
        let others: Vec<Socket> = (0..400)
            .map(|_| Socket::new(AF_INET, SOCK_STREAM, 0).unwrap())
            .collect();
        assert!(others.iter().all(|other| other.fileno() != fd));
        assert!(is_taken(fd));
        drop(others);
        assert!(is_ebadf(&handle.recv(1)));
        assert_eq!(handle.as_raw_fd(), fd);
        drop(handle);
        assert!(!is_taken(fd), "{fd} is still taken");
        drop(peer);
    }
    checked(|| {
        try_it();
        ringsock::run(try_it);
    });
}

/// Closes sockets that a worker reads from, and drops their last handle: `check` gets the number then.
fn close_and_drop(rounds: usize, check: fn(RawFd)) {
    let runtime = Runtime::builder().workers(2).build().unwrap();
    for round in 0..rounds {
        let (socket, _peer) = socketpair().unwrap();
        let fd = socket.fileno();
        let reader = socket.clone();
        let reading = runtime
            .handle()
            .spawn_on(0, move || reader.recv(1))
            .unwrap();
        if round % 2 == 0 {
            thread::yield_now();
        }
        socket.close().unwrap();
        assert!(is_ebadf(&reading.join().unwrap()));
        drop(socket);
        check(fd);
    }
}

#[test]
fn the_number_is_free_soon_after_the_last_handle_of_a_workers_socket_drops() {
    checked(|| close_and_drop(500, |fd| eventually("the number is free", || !is_taken(fd))));
}

// Races.

fn races() -> usize {
    let given = std::env::var("RINGSOCK_RACES").ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(100_000)
}

const OWN: u8 = b'o';
const MARKER: u8 = b'!';

/// Works on a socket until it is closed under it: only bytes of its own connection may come, and not its end.
fn operate(socket: &Socket, way: usize, seed: u64) -> usize {
    let mut buffer = [0; 8];
    let mut calls = 0;
    loop {
        calls += 1;
        let received = match way % 3 {
            0 => socket.recv_into(&mut buffer),
            _ => socket.recv_into_with(&mut buffer, 0, MSG_DONTWAIT),
        };
        match received {
            Ok(count) => assert!(
                count > 0 && buffer[..count].iter().all(|byte| *byte == OWN),
                "seed {seed}, way {way}: from another connection: {:?}",
                &buffer[..count]
            ),
            Err(error) if error.is_closed() => return calls,
            Err(error) => assert!(
                error.is_would_block() || error == Error::Timeout,
                "seed {seed}: {error}"
            ),
        }
    }
}

/// Closes the socket, and at once opens others with a byte to receive.
fn close_and_reopen(socket: &Socket, kept: &mut Vec<(Socket, Socket)>) {
    socket.close().unwrap();
    let fresh = socketpair().unwrap();
    fresh.1.send(&[MARKER; 4]).unwrap();
    fresh.0.send(&[MARKER; 4]).unwrap();
    kept.push(fresh);
    if kept.len() > 3 {
        kept.remove(0);
    }
}

fn race_threads(rounds: usize, seed: u64) {
    let (give, take) = mpsc::sync_channel::<(Socket, Socket, usize)>(1);
    let operator = thread::spawn(move || {
        take.into_iter()
            .map(|(socket, peer, way)| {
                let calls = operate(&socket, way, seed);
                // The peer lives as long as the calls, so the end of its stream is not what they got.
                drop(peer);
                calls
            })
            .sum::<usize>()
    });
    let mut random = Random::new(seed);
    let mut kept = Vec::new();
    for round in 0..rounds {
        let (socket, peer) = socketpair().unwrap();
        give.send((socket.clone(), peer.clone(), round)).unwrap();
        if round % 2 == 0 {
            peer.send(&[OWN]).unwrap();
        }
        spin(random.up_to(12) as u64);
        close_and_reopen(&socket, &mut kept);
    }
    drop(give);
    assert!(operator.join().unwrap() >= rounds);
}

/// In a fiber of worker 1; the other side is on worker 0, or on this one.
fn race_fibers(runtime: &Handle, rounds: usize, seed: u64) {
    let mut random = Random::new(seed);
    let mut kept = Vec::new();
    for round in 0..rounds {
        let (socket, peer) = socketpair().unwrap();
        let other = socket.clone();
        let (worker, way) = if random.up_to(4) == 1 {
            // On this worker only what waits lets the closer come.
            (1, 0)
        } else {
            (0, round)
        };
        let operator = runtime
            .spawn_on(worker, move || operate(&other, way, seed))
            .unwrap();
        if round % 2 == 0 {
            peer.send(&[OWN]).unwrap();
        }
        if worker == 1 {
            ringsock::yield_now();
        }
        spin(random.up_to(12) as u64);
        close_and_reopen(&socket, &mut kept);
        operator.join().unwrap();
    }
}

#[test]
fn no_call_reaches_another_connection_while_its_socket_is_closed() {
    checked(|| {
        let (seed, rounds) = (seed(), races() / 2);
        let threads = thread::spawn(move || race_threads(rounds, seed));
        let runtime = Runtime::builder().workers(2).build().unwrap();
        let handle = runtime.handle();
        let fibers = runtime
            .handle()
            .spawn_on(1, move || race_fibers(&handle, rounds, seed))
            .unwrap();
        fibers.join().unwrap();
        threads.join().unwrap();
    });
}

#[test]
fn close_of_an_idle_socket_and_close_twice_at_once_both_return() {
    checked(|| {
        let runtime = Runtime::builder().workers(2).build().unwrap();
        let handle = runtime.handle();
        for round in 0..400 {
            let (socket, peer) = socketpair().unwrap();
            let reading = (round % 2 == 0).then(|| {
                let socket = socket.clone();
                Running::fiber(&handle, 0, move || socket.recv(1))
            });
            let start = Arc::new(Barrier::new(2));
            let closers: Vec<_> = (0..2)
                .map(|number| {
                    let (socket, start) = (socket.clone(), start.clone());
                    let close = move || {
                        start.wait();
                        (socket.close(), socket.fileno())
                    };
                    // Two fibers that wait for each other need a worker each.
                    match round % 4 {
                        0 | 1 => Running::fiber(&handle, number, close),
                        _ => Running::thread(close),
                    }
                })
                .collect();
            for closer in closers {
                assert_eq!(closer.join(), (Ok(()), -1));
            }
            if let Some(reading) = reading {
                assert!(is_ebadf(&reading.join()));
            }
            assert!(peer.recv(1).unwrap().is_empty());
        }
    });
}

/// Several fibers and threads work on shared sockets; others close them: everybody comes back.
fn close_at_random(ring_entries: (u32, u32), rounds: usize) {
    let seed = seed();
    let mut random = Random::new(seed);
    let runtime = Runtime::builder()
        .workers(2)
        .ring_entries(ring_entries.0, ring_entries.1)
        .build()
        .unwrap();
    let handle = runtime.handle();
    for round in 0..rounds {
        let (stream, peer) = socketpair().unwrap();
        let listener = listener(8);
        if random.up_to(2) == 1 {
            stream.settimeout(100).unwrap();
            listener.settimeout(100).unwrap();
        }
        let mut running = Vec::new();
        let mut start = |place: usize, body: Box<dyn FnOnce() -> Result<()> + Send>| {
            running.push(match place {
                1 | 2 => Running::fiber(&handle, place - 1, body),
                _ => Running::thread(body),
            });
        };
        for _ in 0..6 {
            let (stream, listener) = (stream.clone(), listener.clone());
            let body: Box<dyn FnOnce() -> Result<()> + Send> = match random.up_to(4) {
                1 => Box::new(move || stream.sendall(&vec![1; 4 << 20])),
                2 => Box::new(move || listener.accept().map(drop)),
                3 => Box::new(move || stream.recv(10).map(drop)),
                // One that goes on until it is told.
                _ => Box::new(move || {
                    loop {
                        stream.recv(1)?;
                    }
                }),
            };
            start(random.up_to(3), body);
        }
        let sender = {
            let peer = peer.clone();
            thread::spawn(move || while peer.send_with(b"abc", MSG_DONTWAIT).is_ok() {})
        };
        spin(random.up_to(400) as u64 - 1);
        for socket in [&stream, &listener] {
            let socket = socket.clone();
            start(random.up_to(3), Box::new(move || socket.close()));
        }
        for (index, running) in running.into_iter().enumerate() {
            let result = running.join();
            assert!(
                result.is_ok() || is_ebadf(&result),
                "seed {seed}, round {round}, {index}: {result:?}"
            );
        }
        sender.join().unwrap();
    }
}

#[test]
fn shared_sockets_closed_at_random_release_everybody() {
    checked(|| close_at_random((256, 8), 250));
}

#[test]
fn shared_sockets_closed_at_random_release_everybody_on_tiny_rings() {
    checked(|| close_at_random((2, 2), 250));
}

#[test]
fn close_ends_a_pending_unix_connect_to_a_full_backlog() {
    checked(|| {
        let seed = seed();
        let mut random = Random::new(seed);
        let address = format!("\0ringsock-close-{}-{seed}", std::process::id()).into_bytes();
        let listener = Socket::new(AF_UNIX, SOCK_STREAM, 0).unwrap();
        listener.bind(address.as_slice()).unwrap();
        listener.listen(0).unwrap();
        let mut queued = Vec::new();
        loop {
            let client = Socket::new(AF_UNIX, SOCK_STREAM, 0).unwrap();
            client.setblocking(false).unwrap();
            if let Err(error) = client.connect(address.as_slice()) {
                assert!(error.is_would_block(), "{error}");
                break;
            }
            queued.push(client);
        }
        for round in 0..200 {
            let client = Socket::new(AF_UNIX, SOCK_STREAM, 0).unwrap();
            let id = Arc::new(AtomicI32::new(0));
            let connecting = {
                let (client, id, address) = (client.clone(), id.clone(), address.clone());
                thread::spawn(move || {
                    let connect = move || {
                        id.store(thread_id(), Ordering::SeqCst);
                        client.connect(address.as_slice())
                    };
                    if round % 2 == 0 {
                        ringsock::run(connect)
                    } else {
                        connect()
                    }
                })
            };
            if round % 4 < 2 {
                await_blocked(&id);
            } else {
                spin(random.up_to(2_000) as u64);
            }
            client.close().unwrap();
            let result = connecting.join().unwrap();
            assert!(is_ebadf(&result), "seed {seed}, round {round}: {result:?}");
        }
        assert!(!queued.is_empty());
    });
}

#[test]
fn close_returns_when_the_owning_worker_ends_meanwhile() {
    checked(|| {
        for round in 0..20 {
            let runtime = Runtime::builder().workers(1).build().unwrap();
            let (socket, peer) = socketpair().unwrap();
            let (id, closer_id) = (Arc::new(AtomicI32::new(0)), Arc::new(AtomicI32::new(0)));
            let closing = Arc::new(AtomicBool::new(false));
            let fiber = {
                let (socket, id) = (socket.clone(), id.clone());
                let (closer_id, closing) = (closer_id.clone(), closing.clone());
                let body = move || {
                    id.store(thread_id(), Ordering::SeqCst);
                    let result = socket.recv(1);
                    // The runtime is ending; its worker is busy until the other thread waits in `close`.
                    closing.store(true, Ordering::SeqCst);
                    if round % 2 == 0 {
                        await_blocked(&closer_id);
                    }
                    result
                };
                runtime.handle().spawn(body).unwrap()
            };
            await_blocked(&id);
            let closer = thread::spawn(move || {
                eventually("the runtime ends", || closing.load(Ordering::SeqCst));
                closer_id.store(thread_id(), Ordering::SeqCst);
                socket.close()
            });
            drop(runtime);
            assert!(matches!(fiber.join(), Ok(Err(Error::Shutdown))));
            assert_eq!(closer.join().unwrap(), Ok(()), "round {round}");
            assert!(peer.recv(1).unwrap().is_empty());
        }
    });
}

#[test]
fn close_after_the_owning_worker_has_ended_returns_at_once() {
    checked(|| {
        for _ in 0..20 {
            let (socket, peer) = socketpair().unwrap();
            let used = socket.clone();
            let runtime = Runtime::builder().build().unwrap();
            let fiber = runtime.handle().spawn(move || used.recv(1)).unwrap();
            drop(runtime);
            // It may not have begun.
            let _ = fiber.join();
            socket.close().unwrap();
            assert!(peer.recv(1).unwrap().is_empty());
        }
    });
}

#[test]
fn close_works_with_no_free_descriptor() {
    alone("close_works_with_no_free_descriptor", || {
        for in_fiber in [false, true] {
            let (socket, peer) = socketpair().unwrap();
            let id = Arc::new(AtomicI32::new(0));
            let reader = {
                let (socket, id) = (socket.clone(), id.clone());
                let read = move || {
                    id.store(thread_id(), Ordering::SeqCst);
                    socket.recv(1)
                };
                thread::spawn(move || {
                    if in_fiber {
                        ringsock::run(read)
                    } else {
                        read()
                    }
                })
            };
            await_blocked(&id);
            let before = descriptors();
            let limit = libc::rlimit {
                rlim_cur: 64,
                rlim_max: 64,
            };
            // SAFETY: the limit lives through the call.
            let limited = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
            assert_eq!(limited, 0);
            let mut hogs = Vec::new();
            while let Ok(hog) = File::open("/dev/null") {
                hogs.push(hog);
            }
            let closer = socket.clone();
            let closed = thread::spawn(move || closer.close()).join().unwrap();
            let read = reader.join().unwrap();
            // The reader's ring gave some back.
            let refused = Socket::new(AF_INET, SOCK_STREAM, 0);
            drop(hogs);
            assert_eq!(closed, Ok(()));
            assert!(is_ebadf(&read), "{read:?}");
            drop(refused);
            assert!(peer.recv(1).unwrap().is_empty());
            assert!(descriptors() <= before);
        }
    });
}

// Forks.

#[test]
fn a_close_in_a_forked_child_leaves_the_parents_accept_waiting() {
    alone(
        "a_close_in_a_forked_child_leaves_the_parents_accept_waiting",
        || {
            for in_fiber in [false, true] {
                let listener = listener(8);
                let address = listener.getsockname().unwrap();
                let id = Arc::new(AtomicI32::new(0));
                let accepting = {
                    let (listener, id) = (listener.clone(), id.clone());
                    let accept = move || {
                        id.store(thread_id(), Ordering::SeqCst);
                        listener
                            .accept()
                            .map(|(conn, _)| conn.recv(16).unwrap().to_vec())
                    };
                    thread::spawn(move || {
                        if in_fiber {
                            ringsock::run(accept)
                        } else {
                            accept()
                        }
                    })
                };
                await_blocked(&id);
                let code = fork(|| {
                    let closed = listener.close();
                    i32::from(closed.is_err() || listener.fileno() != -1)
                });
                assert_eq!(code, 0, "in a fiber: {in_fiber}");
                assert!(listener.fileno() >= 0);
                let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
                client.connect(&address).unwrap();
                client.sendall(b"still there").unwrap();
                assert_eq!(accepting.join().unwrap().unwrap(), b"still there");
            }
        },
    );
}

#[test]
fn a_child_forked_by_a_plain_thread_works_with_its_sockets() {
    alone(
        "a_child_forked_by_a_plain_thread_works_with_its_sockets",
        || {
            let (left, right) = socketpair().unwrap();
            // This thread has a ring from here on.
            left.sendall(b"x").unwrap();
            right.recv(1).unwrap();
            let before = descriptors();
            let used = fork(|| {
                left.sendall(b"y").unwrap();
                let byte = right.recv(1).unwrap();
                right.settimeout(0.001).unwrap();
                let timed_out = right.recv(1) == Err(Error::Timeout);
                i32::from(byte != b"y" || !timed_out)
            });
            assert_eq!(used, 0, "the child uses a socket");
            let closed = fork(|| {
                right.close().unwrap();
                i32::from(!is_ebadf(&right.recv(1)))
            });
            assert_eq!(closed, 0, "the child closes a socket");
            assert_eq!(fork(|| std::process::exit(0)), 0, "the child exits");
            assert_eq!(
                fork(|| ringsock::run(|| 7)),
                7,
                "the child has its own runtime"
            );
            // O_NONBLOCK is the open file's, shared with the child.
            right.settimeout(None).unwrap();
            left.sendall(b"z").unwrap();
            assert_eq!(right.recv(1).unwrap(), b"z");
            assert_eq!(descriptors(), before);
        },
    );
}

#[test]
fn a_child_forked_by_a_fiber_leaves_the_parents_operations_alone() {
    alone(
        "a_child_forked_by_a_fiber_leaves_the_parents_operations_alone",
        || {
            for deed in ["close", "yield", "recv", "send", "cancel", "sleep", "end"] {
                ringsock::run(move || {
                    let (left, right) = socketpair().unwrap();
                    let waiting = right.clone();
                    let waiting = ringsock::spawn(move || waiting.recv(1));
                    // Until the operation is the kernel's.
                    ringsock::sleep(0.001).unwrap();
                    let code = fork(|| {
                        match deed {
                            "close" => right.close().unwrap(),
                            "yield" => ringsock::yield_now(),
                            "recv" => {
                                left.settimeout(0.01).unwrap();
                                assert_eq!(left.recv(1), Err(Error::Timeout));
                                left.settimeout(None).unwrap();
                            }
                            "send" => assert_eq!(left.send(b"q"), Ok(1)),
                            "cancel" => waiting.cancel(),
                            "sleep" => ringsock::sleep(0.01).unwrap(),
                            _ => {}
                        }
                        0
                    });
                    assert_eq!(code, 0, "the child: {deed}");
                    if deed != "send" {
                        left.sendall(b"z").unwrap();
                    }
                    let expected = if deed == "send" { b"q" } else { b"z" };
                    assert_eq!(waiting.join().unwrap().unwrap(), expected, "{deed}");
                });
            }
        },
    );
}

#[test]
fn a_forked_child_never_writes_into_memory_that_took_the_rings_place() {
    alone(
        "a_forked_child_never_writes_into_memory_that_took_the_rings_place",
        || {
            let (left, right) = socketpair().unwrap();
            for _ in 0..5 {
                left.sendall(b"x").unwrap();
                right.recv(1).unwrap();
            }
            let code = fork(|| {
                let page = || {
                    // SAFETY: a new anonymous mapping, at an address of the kernel's choice.
                    let page = unsafe {
                        libc::mmap(
                            std::ptr::null_mut(),
                            4096,
                            libc::PROT_READ | libc::PROT_WRITE,
                            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                            -1,
                            0,
                        )
                    };
                    assert_ne!(page, libc::MAP_FAILED);
                    // SAFETY: the mapping is 4096 bytes, writable, and nobody else's.
                    unsafe { std::ptr::write_bytes(page.cast::<u8>(), 0xAA, 4096) };
                    page.cast::<u8>().cast_const()
                };
                let pages: Vec<*const u8> = (0..64).map(|_| page()).collect();
                left.sendall(b"y").unwrap();
                right.recv(1).unwrap();
                let changed = pages.iter().any(|page| {
                    // SAFETY: the mapping stays to the child's end.
                    let bytes = unsafe { std::slice::from_raw_parts(*page, 4096) };
                    bytes.iter().any(|byte| *byte != 0xAA)
                });
                i32::from(changed)
            });
            assert_eq!(code, 0);
        },
    );
}

#[test]
fn every_round_of_opening_and_closing_gives_its_descriptors_back() {
    checked(|| {
        static CLOSED: AtomicUsize = AtomicUsize::new(0);
        let runtime = Runtime::builder().workers(2).build().unwrap();
        let before = descriptors();
        for worker in 0..2 {
            let work = || {
                for round in 0..300 {
                    let (left, right) = socketpair().unwrap();
                    let listener = listener(8);
                    if round % 3 == 0 {
                        left.close().unwrap();
                    }
                    if round % 3 == 1 {
                        let clones = (left.clone(), right.clone(), listener.clone());
                        right.close().unwrap();
                        listener.close().unwrap();
                        drop(clones);
                    }
                    CLOSED.fetch_add(3, Ordering::Relaxed);
                }
            };
            runtime
                .handle()
                .spawn_on(worker, work)
                .unwrap()
                .join()
                .unwrap();
        }
        assert_eq!(CLOSED.load(Ordering::Relaxed), 1800);
        eventually("all are closed", || descriptors() == before);
    });
}

/// A listener that is shut down accepts nothing more, and says so to who waits, on either driver and in any mode.
#[test]
fn a_listener_that_is_shut_down_ends_accepts() {
    checked(|| {
        for timeout in [None, Some(20.0)] {
            let accept = move || {
                let listener = Socket::new(AF_UNIX, SOCK_STREAM, 0).unwrap();
                listener.bind("").unwrap();
                listener.listen(1).unwrap();
                listener.settimeout(timeout).unwrap();
                let other = listener.clone();
                let shutting = thread::spawn(move || {
                    thread::sleep(Duration::from_millis(20));
                    other.shutdown(SHUT_RDWR).unwrap();
                });
                let refused = listener.accept().unwrap_err();
                assert_eq!(refused.errno(), Some(libc::EINVAL), "{timeout:?}");
                shutting.join().unwrap();
            };
            accept();
            ringsock::run(accept);
        }
    });
}
