//! Faults: strace makes system calls fail, one after the other, under a server and under plain threads. What can be repeated
//! costs nothing; what cannot is an error or a fallback. Nothing panics, hangs, or comes back changed.
//!
//! RINGSOCK_FAULT_RUNS is how many runs each sweep may take (a good day's: 300); without it a few of each kind.
#![allow(unsafe_code)]

mod support;

use std::io::{IoSlice, Read, Write};
use std::process::Command;
use std::thread;

use ringsock::prelude::*;
use ringsock::{Result, Runtime, calls_without_ring, socketpair};
use support::{
    CHILD, EchoServer, Finished, Process, Random, Stream, child_part, example, has_strace, seed,
    skipped_on_epoll, traced, turn,
};

/// How many runs a sweep takes: of `all` of them about `few`, evenly spread, unless more are asked for.
fn spread<T: Clone>(all: &[T], few: usize) -> Vec<T> {
    let asked = std::env::var("RINGSOCK_FAULT_RUNS").ok();
    let runs = asked.map_or(few, |text| text.parse().expect("a number"));
    let step = all.len().div_ceil(runs.max(1)).max(1);
    all.iter().step_by(step).cloned().collect()
}

/// Every error with every place in the sequence of calls: the `first` of a thread fails, and then each `step`th.
fn sweep(call: &str, errors: &[&str], firsts: &[u32], steps: &[u32]) -> Vec<String> {
    let mut faults = Vec::new();
    for first in firsts {
        for step in steps {
            for error in errors {
                faults.push(format!("inject={call}:error={error}:when={first}+{step}"));
            }
        }
    }
    faults
}

/// The descriptor that a fault is about, for calls that have many uses.
const OF_RINGS: [&str; 2] = ["-P", "anon_inode:[io_uring]"];

// A server.

/// Starts the server under a fault. `None` if it ended, which it may do with one line that says why.
fn start_server(fault: &str, options: &[&str]) -> Option<EchoServer> {
    let trace = format!("trace={}", call_of(fault));
    let mut faults = vec!["-e", &trace, "-e", fault];
    faults.extend_from_slice(options);
    let mut command = traced(&faults, &example("echo_server"));
    command.args(["--bind", "127.0.0.1:0", "--timeout", "60"]);
    let mut process = Process::start(&mut command, b"").unwrap();
    let Some(line) = process.try_line() else {
        let finished = process.wait();
        assert_eq!(finished.status.code(), Some(1), "{fault}: {finished:?}");
        assert_quiet(fault, &finished, 1);
        return None;
    };
    let address = line.strip_prefix("listening on ").expect("an address");
    Some(EchoServer::adopt(process, address.parse().unwrap()))
}

fn call_of(fault: &str) -> &str {
    let rest = fault.strip_prefix("inject=").expect("a fault");
    rest.split(':').next().expect("a call")
}

fn assert_quiet(fault: &str, finished: &Finished, lines_max: usize) {
    assert!(
        !finished.stderr.contains("panicked"),
        "{fault}: {finished:?}"
    );
    assert!(
        finished.stderr.lines().count() <= lines_max,
        "{fault}: {finished:?}"
    );
}

/// Exchanges random messages: how many bytes came back unchanged before an error.
fn echo(stream: &mut Stream, random: &mut Random, messages: usize) -> std::io::Result<()> {
    for _ in 0..messages {
        let len = random.up_to(20_000);
        let sent = random.bytes(len);
        stream.write_all(&sent)?;
        let mut back = vec![0; len];
        let mut got = 0;
        while got < len {
            match stream.read(&mut back[got..])? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                n => got += n,
            }
            assert!(back[..got] == sent[..got], "other bytes came back");
        }
    }
    Ok(())
}

/// Exchanges with the server on several connections at once, and ends it: how many connections failed.
fn exchange_with(server: EchoServer, fault: &str, seed: u64) -> usize {
    let failed: usize = thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|client| {
                let mut stream = server.connect();
                let mut random = Random::new(seed + client);
                scope.spawn(move || echo(&mut stream, &mut random, 8).is_err())
            })
            .collect();
        clients
            .into_iter()
            .map(|client| usize::from(client.join().expect("what came back is what was sent")))
            .sum()
    });
    let mut process = server.process;
    assert!(process.is_running(), "{fault}: the server ended");
    process.signal(libc::SIGKILL);
    assert_quiet(fault, &process.wait(), 1);
    failed
}

#[test]
fn a_server_loses_nothing_when_enters_fail() {
    let _turn = turn();
    if skipped_on_epoll("nothing enters a ring; epoll's calls have a test of their own") {
        return;
    }
    if !has_strace() {
        return;
    }
    let seed = seed();
    let errors = ["EINTR", "EAGAIN", "EBUSY", "ENOMEM"];
    let firsts: Vec<u32> = (1..=25).collect();
    let all = sweep("io_uring_enter", &errors, &firsts, &[2, 3, 7]);
    for fault in spread(&all, 24) {
        let server = start_server(&fault, &[]).unwrap_or_else(|| panic!("{fault}: no server"));
        assert_eq!(
            exchange_with(server, &fault, seed),
            0,
            "{fault}, seed {seed}"
        );
    }
}

#[test]
fn a_server_survives_failing_calls_of_its_connections() {
    let _turn = turn();
    if !has_strace() {
        return;
    }
    let seed = seed();
    // What the kernel asks to repeat is repeated; what it refuses costs one connection.
    for (call, errors, transparent) in [
        ("sendto", &["EINTR", "EAGAIN"][..], true),
        (
            "sendto",
            &["ENOBUFS", "ENOMEM", "EPIPE", "ECONNRESET"],
            false,
        ),
        ("setsockopt", &["ENOMEM", "ENOPROTOOPT"], false),
        ("close", &["EINTR", "EIO"], true),
        ("munmap", &["ENOMEM"], true),
    ] {
        // The first closes are the loader's, which gives up at an error.
        let firsts: &[u32] = if call == "close" {
            &[20, 21, 22]
        } else {
            &[1, 2, 3, 5, 8]
        };
        for fault in spread(&sweep(call, errors, firsts, &[3, 5]), 3) {
            let Some(server) = start_server(&fault, &[]) else {
                assert!(!transparent, "{fault}: no server");
                continue;
            };
            let failed = exchange_with(server, &fault, seed);
            assert!(
                !transparent || failed == 0,
                "{fault}, seed {seed}: {failed} failed"
            );
        }
    }
}

#[test]
fn a_server_that_cannot_start_says_why_in_one_line() {
    let _turn = turn();
    if !has_strace() {
        return;
    }
    let mut refused = 0;
    for (call, errors, options) in [
        (
            "io_uring_setup",
            &["ENOMEM", "EMFILE", "EPERM"][..],
            &[][..],
        ),
        ("io_uring_register", &["EINVAL", "ENOMEM", "EPERM"], &[]),
        ("eventfd2", &["EMFILE", "ENOMEM"], &[]),
        ("mmap", &["ENOMEM", "EPERM", "EAGAIN"], &OF_RINGS),
        ("socket", &["EMFILE", "ENOBUFS"], &[]),
        ("bind", &["EACCES", "ENOMEM"], &[]),
        ("listen", &["EADDRINUSE"], &[]),
        ("getsockname", &["ENOBUFS"], &[]),
    ] {
        // Each of its calls alone, and all from one on.
        let mut all = Vec::new();
        for first in 1..=4 {
            for error in errors {
                all.push(format!("inject={call}:error={error}:when={first}"));
                all.push(format!("inject={call}:error={error}:when={first}+"));
            }
        }
        // Without being asked for, a ring that is refused is no reason not to start.
        let options = [options, &["-E", "RINGSOCK_DRIVER=uring"]].concat();
        for fault in spread(&all, 5) {
            match start_server(&fault, &options) {
                Some(server) => assert_eq!(exchange_with(server, &fault, 1), 0, "{fault}"),
                None => refused += 1,
            }
        }
    }
    println!("{refused} servers said why not");
    assert!(refused > 8);
}

// Plain threads.

/// What a client and a server on plain threads exchange; the first error ends it.
fn exchange_on_threads(rounds: usize) -> Result<()> {
    let listener = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    listener.bind(("127.0.0.1", 0))?;
    listener.listen(4)?;
    let address = listener.getsockname()?;
    let server = thread::spawn(move || {
        listener.settimeout(20)?;
        let (conn, _peer) = listener.accept()?;
        conn.settimeout(20)?;
        let mut buffer = [0; 3000];
        loop {
            let n = conn.recv_into(&mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            conn.sendall(&buffer[..n])?;
        }
    });
    let exchange = || {
        let client = Socket::new(AF_INET, SOCK_STREAM, 0)?;
        client.settimeout(20)?;
        client.connect(&address)?;
        let mut random = Random::new(7);
        for round in 0..rounds {
            client.settimeout([Some(20.0), None][round % 2])?;
            let sent = random.bytes(rounds * 1000);
            client.sendall(&sent)?;
            let mut back = Vec::new();
            while back.len() < sent.len() {
                let received = client.recv(4096)?;
                if received.is_empty() {
                    return Err(Error::from_errno(libc::ECONNRESET));
                }
                back.extend_from_slice(&received);
                assert!(sent.starts_with(&back), "other bytes came back");
            }
        }
        client.setblocking(false)?;
        assert!(client.recv(1).unwrap_err().errno().is_some());
        client.settimeout(0.01)?;
        assert!(client.recv(1).is_err());
        client.close()
    };
    let exchanged = exchange();
    let served: Result<()> = server.join().expect("the server does not panic");
    exchanged.and(served)
}

#[test]
#[ignore = "run by threads_survive_failing_calls"]
fn child_exchanges_on_threads() {
    let Some(rounds) = child_part() else {
        return;
    };
    match exchange_on_threads(rounds.parse().unwrap()) {
        Ok(()) => println!("intact, {} without ring", calls_without_ring()),
        Err(error) => println!("refused: {error}"),
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let left = maps.lines().filter(|line| line.contains("[io_uring]"));
    println!("{} mappings of rings", left.count());
}

fn run_threads(fault: &str, options: &[&str], rounds: usize) -> Finished {
    let trace = format!("trace={}", call_of(fault));
    let mut faults = vec!["-e", &trace, "-e", fault];
    faults.extend_from_slice(options);
    let mut command: Command = traced(&faults, &std::env::current_exe().unwrap());
    command
        .args([
            "--exact",
            "child_exchanges_on_threads",
            "--ignored",
            "--nocapture",
        ])
        .env(CHILD, rounds.to_string());
    support::run(&mut command, b"")
}

#[test]
fn threads_survive_failing_calls() {
    let _turn = turn();
    if !has_strace() {
        return;
    }
    let transient = ["EINTR", "EAGAIN", "EBUSY", "ENOMEM"];
    let some: Vec<u32> = (1..=12).collect();
    let mut refused = 0;
    for (call, errors, options, transparent, few) in [
        ("io_uring_enter", &transient[..], &[][..], true, 12),
        // Without a ring, or with half of one, a thread waits by readiness.
        (
            "io_uring_setup",
            &["ENOMEM", "EPERM", "ENOSYS"],
            &[],
            true,
            3,
        ),
        ("io_uring_register", &["EINVAL", "ENOMEM"], &[], true, 3),
        ("eventfd2", &["EMFILE"], &[], true, 2),
        ("mmap", &["ENOMEM"], &OF_RINGS, true, 4),
        ("poll", &["EINTR", "ENOMEM"], &[], true, 2),
        ("sendto", &["EINTR", "EAGAIN"], &[], true, 3),
        ("recvfrom", &["EINTR", "EAGAIN"], &[], true, 3),
        ("accept4", &["EINTR", "EAGAIN"], &[], true, 2),
        ("dup3", &["EINTR", "EBUSY"], &[], true, 2),
        ("sendto", &["ENOBUFS", "ECONNRESET"], &[], false, 2),
        ("recvfrom", &["ENOMEM", "ECONNRESET"], &[], false, 2),
        ("socket", &["EMFILE", "ENOBUFS"], &[], false, 2),
        ("accept4", &["EMFILE", "ECONNABORTED"], &[], false, 2),
        ("connect", &["ECONNREFUSED", "ENETUNREACH"], &[], false, 2),
        ("ioctl", &["EIO"], &[], false, 1),
        ("dup3", &["EMFILE"], &[], false, 1),
    ] {
        if call == "mmap" && skipped_on_epoll("there are no rings to map") {
            continue;
        }
        for fault in spread(&sweep(call, errors, &some, &[2, 3, 7]), few) {
            let finished = run_threads(&fault, options, 10);
            assert_eq!(finished.status.code(), Some(0), "{fault}: {finished:?}");
            assert!(
                !finished.stderr.contains("panicked"),
                "{fault}: {finished:?}"
            );
            let text = String::from_utf8_lossy(&finished.stdout).into_owned();
            if transparent {
                assert!(text.contains("intact"), "{fault}: {finished:?}");
            } else {
                assert!(
                    text.contains("intact") || text.contains("refused: "),
                    "{fault}: {finished:?}"
                );
                refused += usize::from(text.contains("refused: "));
            }
        }
    }
    println!("{refused} runs ended with an error");
}

#[test]
fn threads_without_any_ring_lose_nothing() {
    let _turn = turn();
    if !has_strace() {
        return;
    }
    // Where the ring is refused there is epoll; where it takes nothing, or there is neither, poll(2).
    for (fault, on_epoll) in [
        ("inject=io_uring_setup:error=ENOSYS", true),
        ("inject=io_uring_register:error=EINVAL", true),
        ("inject=io_uring_enter:error=ENOMEM", support::on_epoll()),
        ("inject=io_uring_enter:error=EAGAIN", support::on_epoll()),
        ("inject=eventfd2:error=ENFILE", false),
    ] {
        let finished = run_threads(fault, &[], 1);
        let text = String::from_utf8_lossy(&finished.stdout).into_owned();
        assert!(text.contains("intact, "), "{fault}: {finished:?}");
        let without = !text.contains("intact, 0 without");
        assert_eq!(without, !on_epoll, "{fault}: {finished:?}");
    }
}

#[test]
fn threads_and_servers_on_epoll_survive_failing_calls() {
    let _turn = turn();
    if !has_strace() {
        return;
    }
    let seed = seed();
    let some: Vec<u32> = (1..=12).collect();
    for (call, errors) in [
        ("epoll_wait", &["EINTR"][..]),
        ("epoll_pwait2", &["EINTR"]),
        // Out of memory, out of watches: tried again by the clock.
        ("epoll_ctl", &["ENOMEM", "ENOSPC"]),
        // The setup: poll(2) for a thread, and a server says why not.
        ("epoll_create1", &["EMFILE", "ENOMEM"]),
    ] {
        for fault in spread(&sweep(call, errors, &some, &[2, 3, 7]), 3) {
            let epoll = ["-E", "RINGSOCK_DRIVER=epoll"];
            let finished = run_threads(&fault, &epoll, 10);
            let text = String::from_utf8_lossy(&finished.stdout).into_owned();
            assert!(text.contains("intact"), "{fault}: {finished:?}");
            if let Some(server) = start_server(&fault, &epoll) {
                assert_eq!(exchange_with(server, &fault, seed), 0, "{fault}, {seed}");
            }
        }
    }
}

// Every call of the epoll driver.

/// What one side does.
type Work = Box<dyn FnOnce() -> Result<()> + Send>;

/// What two workers exchange, with all kinds of calls. Each side checks what it gets; its error ends it, and is returned.
fn exchange_between_workers() -> Vec<Error> {
    let exchange = || -> Result<Vec<Error>> {
        let runtime = Runtime::builder().workers(2).build()?;
        let handle = runtime.handle();
        let listener = Socket::new(AF_INET, SOCK_STREAM, 0)?;
        listener.bind(("127.0.0.1", 0))?;
        listener.listen(4)?;
        let address = listener.getsockname()?;
        let (left, right) = socketpair()?;
        let ends = (datagram_end()?, datagram_end()?);
        let (here, there) = (ends.0.getsockname()?, ends.1.getsockname()?);
        let work: Vec<(usize, Work)> = vec![
            (0, Box::new(move || serve_stream(&listener))),
            (1, Box::new(move || talk_on_stream(&address))),
            (0, Box::new(move || send_messages(&left))),
            (1, Box::new(move || receive_messages(&right))),
            (0, Box::new(move || pass_datagrams(&ends.0, &there, true))),
            (1, Box::new(move || pass_datagrams(&ends.1, &here, false))),
        ];
        let fibers: Vec<_> = work
            .into_iter()
            .map(|(worker, work)| handle.spawn_on(worker, work))
            .collect::<Result<_>>()?;
        let ends = fibers.into_iter().map(|fiber| fiber.join().unwrap());
        Ok(ends.filter_map(Result::err).collect())
    };
    exchange().unwrap_or_else(|error| vec![error])
}

/// The other side ended early: not the error that is looked for, but what comes of it.
fn cut() -> Error {
    Error::from_errno(libc::ECONNRESET)
}

const STREAM_BYTES: usize = 100_000;

fn serve_stream(listener: &Socket) -> Result<()> {
    listener.settimeout(20)?;
    let (conn, _peer) = listener.accept()?;
    conn.settimeout(20)?;
    let mut buffer = [0; 3000];
    loop {
        match conn.recv_into(&mut buffer)? {
            0 => return conn.shutdown(SHUT_WR),
            n => conn.sendall(&buffer[..n])?,
        }
    }
}

fn talk_on_stream(address: &Address) -> Result<()> {
    let client = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    client.settimeout(20)?;
    client.connect(address)?;
    let sent = Random::new(7).bytes(STREAM_BYTES);
    let (writer, bytes) = (client.clone(), sent.clone());
    let writer = ringsock::spawn(move || {
        for piece in bytes.chunks(7_000) {
            writer.sendall(piece)?;
        }
        writer.shutdown(SHUT_WR)
    });
    let mut got = 0;
    let read = loop {
        match client.recv(4096) {
            Ok(data) if data.is_empty() => break Ok(()),
            Ok(data) => {
                assert!(
                    sent[got..].starts_with(&data),
                    "other bytes came back at {got}"
                );
                got += data.len();
            }
            Err(error) => break Err(error),
        }
    };
    // A writer whose reader has given up would wait for room.
    if read.is_err() {
        writer.cancel();
    }
    let written = writer.join().unwrap();
    read?;
    written?;
    if got < sent.len() { Err(cut()) } else { Ok(()) }
}

fn send_messages(socket: &Socket) -> Result<()> {
    socket.settimeout(20)?;
    let bytes = Random::new(8).bytes(STREAM_BYTES);
    let mut sent = 0;
    while sent < bytes.len() {
        let rest = &bytes[sent..bytes.len().min(sent + 6000)];
        let (head, tail) = rest.split_at(rest.len() / 3);
        sent += socket.sendmsg(&[IoSlice::new(head), IoSlice::new(tail)])?;
    }
    socket.shutdown(SHUT_WR)
}

fn receive_messages(socket: &Socket) -> Result<()> {
    socket.settimeout(20)?;
    let bytes = Random::new(8).bytes(STREAM_BYTES);
    let mut got = 0;
    loop {
        let received = socket.recvmsg(5000)?;
        if received.data.is_empty() {
            return if got < bytes.len() {
                Err(cut())
            } else {
                Ok(())
            };
        }
        assert!(
            bytes[got..].starts_with(&received.data),
            "other bytes came at {got}"
        );
        got += received.data.len();
    }
}

fn datagram_end() -> Result<Socket> {
    let socket = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    socket.bind(("127.0.0.1", 0))?;
    // Whose other side gave up waits so long.
    socket.settimeout(2)?;
    Ok(socket)
}

fn pass_datagrams(socket: &Socket, peer: &Address, begins: bool) -> Result<()> {
    for number in 0..20u8 {
        let bytes = [number; 300];
        if begins {
            socket.sendto(&bytes, peer)?;
        }
        let (data, from) = socket.recvfrom(1000)?;
        assert_eq!((&data[..], from.as_ref()), (&bytes[..], Some(peer)));
        if !begins {
            socket.sendto(&bytes, peer)?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "run by every_call_of_the_epoll_driver_may_fail"]
fn child_exchanges_between_workers() {
    if child_part().is_none() {
        return;
    }
    let errors = exchange_between_workers();
    if errors.is_empty() {
        println!("intact");
    }
    for error in errors {
        println!("errno {}: {error}", error.errno().unwrap_or(0));
    }
}

/// What a failing call may do.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Effect {
    /// It is made again, or done without.
    Nothing,
    /// Somebody gets this very error; for the others their peer is gone.
    Told,
    /// The driver cannot go on: the process ends, with a line that names the error.
    Ends,
}

/// Runs the exchange under a fault: whether somebody was told, or the process ended.
fn run_workers(fault: &str, error: &str, effect: Effect) -> bool {
    let trace = format!("trace={}", call_of(fault));
    let options = ["-e", &trace, "-e", fault, "-E", "RINGSOCK_DRIVER=epoll"];
    let mut command = traced(&options, &std::env::current_exe().unwrap());
    let child = [
        "--exact",
        "child_exchanges_between_workers",
        "--ignored",
        "--nocapture",
    ];
    command.args(child).env(CHILD, "all");
    let finished = support::run(&mut command, b"");
    assert!(
        !finished.stderr.contains("panicked"),
        "{fault}: {finished:?}"
    );
    if finished.status.code() != Some(0) {
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(effect, Effect::Ends, "{fault}: {finished:?}");
        assert_eq!(finished.status.signal(), Some(libc::SIGABRT), "{fault}");
        let said = format!(
            "failed with {}",
            std::io::Error::from_raw_os_error(number(error))
        );
        assert!(finished.stderr.contains(&said), "{fault}: {finished:?}");
        return true;
    }
    let text = String::from_utf8_lossy(&finished.stdout).into_owned();
    if text.contains("intact") {
        return false;
    }
    let this = format!("errno {}: ", number(error));
    assert_eq!(effect, Effect::Told, "{fault}: {finished:?}");
    assert!(text.contains(&this), "{fault}: {finished:?}");
    // The others: a peer that is gone, a datagram that does not come (0: a timeout, a cancel).
    let gone = [
        number(error),
        0,
        libc::ECONNRESET,
        libc::EPIPE,
        libc::ECONNREFUSED,
    ];
    for line in text.lines().filter(|line| line.starts_with("errno ")) {
        let told = gone
            .iter()
            .any(|errno| line.starts_with(&format!("errno {errno}: ")));
        assert!(told, "{fault}: {line}");
    }
    true
}

fn number(error: &str) -> i32 {
    match error {
        "EINTR" => libc::EINTR,
        "EAGAIN" => libc::EAGAIN,
        "ENOMEM" => libc::ENOMEM,
        "ENOSPC" => libc::ENOSPC,
        "EMFILE" => libc::EMFILE,
        "ECONNRESET" => libc::ECONNRESET,
        "EIO" => libc::EIO,
        "ENOSYS" => libc::ENOSYS,
        "EPERM" => libc::EPERM,
        _ => panic!("{error} has no number here"),
    }
}

/// RINGSOCK_FAULT_RUNS counts for each call and error: 10 are some 700 runs.
#[test]
fn every_call_of_the_epoll_driver_may_fail() {
    let _turn = turn();
    if !has_strace() {
        return;
    }
    let again = &["EINTR", "EAGAIN"][..];
    let others = &["ENOMEM", "EMFILE", "ECONNRESET", "EIO"][..];
    let strange = &["EMFILE", "ECONNRESET", "EIO"][..];
    let mut rows = vec![
        (
            "epoll_wait",
            &["EINTR", "EAGAIN", "ENOMEM"][..],
            Effect::Nothing,
        ),
        ("epoll_wait", strange, Effect::Ends),
        // Where it is not to be had, the older call does.
        (
            "epoll_pwait2",
            &["EINTR", "EAGAIN", "ENOMEM", "ENOSYS", "EPERM"],
            Effect::Nothing,
        ),
        ("epoll_pwait2", strange, Effect::Ends),
        (
            "epoll_ctl",
            &["EINTR", "EAGAIN", "ENOMEM", "ENOSPC"],
            Effect::Nothing,
        ),
        ("epoll_ctl", strange, Effect::Told),
        ("epoll_create1", others, Effect::Told),
        ("eventfd2", others, Effect::Told),
        // The bell. (Its EAGAIN says that the sleeper has been woken already.)
        ("write", &["EINTR"], Effect::Nothing),
        ("poll", &["EINTR"], Effect::Nothing),
        ("getsockopt", others, Effect::Told),
    ];
    for call in [
        "accept4", "connect", "recvfrom", "recvmsg", "sendto", "sendmsg",
    ] {
        rows.push((call, again, Effect::Nothing));
        rows.push((call, others, Effect::Told));
    }
    // A thread's first epoll_ctl are of the setup, which is not tried again.
    let (from_first, from_third): (Vec<u32>, Vec<u32>) = ((1..=12).collect(), (3..=14).collect());
    let (mut runs, mut told) = (0, 0);
    for (call, errors, effect) in rows {
        let is_late = call == "epoll_ctl" && effect == Effect::Nothing;
        let firsts = if is_late { &from_third } else { &from_first };
        for (index, error) in errors.iter().enumerate() {
            let mut all = sweep(call, &[error], firsts, &[2, 3, 7]);
            // Not the same places for each error.
            let places = all.len();
            all.rotate_left(index * 4 % places);
            for fault in spread(&all, 1) {
                runs += 1;
                told += usize::from(run_workers(&fault, error, effect));
            }
        }
    }
    println!("{told} of {runs} runs were told");
    assert!(told > runs / 6);
}

#[test]
fn a_ring_that_is_not_to_be_had_leaves_no_mapping_behind() {
    let _turn = turn();
    if skipped_on_epoll("there are no rings") {
        return;
    }
    if !has_strace() {
        return;
    }
    // A ring takes four mappings: each of them fails, every time.
    for which in 1..=4 {
        let fault = format!("inject=mmap:error=ENOMEM:when={which}+{which}");
        let finished = run_threads(&fault, &OF_RINGS, 10);
        let text = String::from_utf8_lossy(&finished.stdout).into_owned();
        assert!(text.contains("intact, "), "{fault}: {finished:?}");
        assert!(!text.contains("intact, 0 without"), "{fault}: {finished:?}");
        assert!(
            text.contains("\n0 mappings of rings"),
            "{fault}: {finished:?}"
        );
    }
}
