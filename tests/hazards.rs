//! The hazards of completion-based input and output: memory that the kernel still owns, results that come late, descriptors that
//! nobody holds, forks, signals. What `close.rs`, `deadlines.rs`, `shutdown.rs` and `fibers.rs` test of them is not repeated here.
#![allow(unsafe_code)]

mod support;

use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::*;
use ringsock::{
    Handle, Result, Runtime, calls_without_ring, run, sleep, socketpair, spawn, timeout, yield_now,
};
use support::{
    Random, alone, checked, child, child_part, descriptors, eventually, listener, seed, set_limit,
    tcp_pair, turn,
};

fn is_errno<T>(result: &Result<T>, errnos: &[i32]) -> bool {
    let errno = result.as_ref().err().and_then(|error| error.errno());
    errno.is_some_and(|errno| errnos.contains(&errno))
}

// 1: a buffer is the caller's again when its call has returned.

const POISON: u8 = 0xA5;
const LENT_BYTES: usize = 4096;

/// Buffers that calls have given back, poisoned, and never freed: what the kernel writes later shows.
#[derive(Clone, Default)]
struct Quarantine(Arc<Mutex<Vec<Vec<u8>>>>);

impl Quarantine {
    fn lend(&self) -> Lent {
        Lent {
            bytes: vec![0; LENT_BYTES],
            quarantine: self.clone(),
        }
    }

    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn assert_untouched(&self, case: &str) {
        for bytes in &*self.0.lock().unwrap() {
            let touched = bytes.iter().position(|byte| *byte != POISON);
            assert_eq!(touched, None, "{case}: a buffer was written after its call");
        }
    }
}

/// A buffer that goes into quarantine when its frame ends, also by unwinding.
struct Lent {
    bytes: Vec<u8>,
    quarantine: Quarantine,
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.bytes.fill(POISON);
        let bytes = std::mem::take(&mut self.bytes);
        self.quarantine.0.lock().unwrap().push(bytes);
    }
}

/// A receive with a buffer of its own.
fn receive(socket: &Socket, quarantine: &Quarantine) -> Result<Vec<u8>> {
    let mut lent = quarantine.lend();
    let n = socket.recv_into(&mut lent.bytes)?;
    Ok(lent.bytes[..n].to_vec())
}

/// The peer sends more than the buffer that was lent would hold, and this thread's ring goes round: whoever still waits gets it.
fn send_to_whoever_waits(peer: &Socket) {
    // A closed socket does not take it.
    let _ = peer.sendall(&[0x5A; LENT_BYTES]);
    sleep(0.002).unwrap();
    let (left, right) = socketpair().unwrap();
    right.settimeout(0.001).unwrap();
    assert_eq!(right.recv(1).unwrap_err(), Error::Timeout);
    drop(left);
}

fn assert_all_there(socket: &Socket, case: &str) {
    socket.settimeout(60).unwrap();
    let all = socket.recv_with(LENT_BYTES, MSG_WAITALL).unwrap();
    assert_eq!(all, [0x5A; LENT_BYTES], "{case}: the next receive");
}

fn end_receives(quarantine: &Quarantine) {
    let (socket, peer) = socketpair().unwrap();
    socket.settimeout(0.003).unwrap();
    assert_eq!(receive(&socket, quarantine), Err(Error::Timeout));
    send_to_whoever_waits(&peer);
    assert_all_there(&socket, "after its timeout");

    socket.settimeout(None).unwrap();
    let bounded = timeout(0.003, || receive(&socket, quarantine));
    assert_eq!(bounded, Err(Error::Timeout));
    send_to_whoever_waits(&peer);
    assert_all_there(&socket, "after a timeout around it");
}

#[test]
fn a_receive_that_ended_never_writes_into_its_buffer() {
    checked(|| {
        let quarantine = Quarantine::default();
        for _ in 0..20 {
            let theirs = quarantine.clone();
            thread::spawn(move || end_receives(&theirs)).join().unwrap();
            let theirs = quarantine.clone();
            run(move || {
                end_receives(&theirs);

                let (socket, peer) = socketpair().unwrap();
                let (waiting, lender) = (socket.clone(), theirs.clone());
                let fiber = spawn(move || receive(&waiting, &lender));
                sleep(0.001).unwrap();
                fiber.cancel();
                assert_eq!(fiber.join().unwrap(), Err(Error::Cancelled));
                send_to_whoever_waits(&peer);
                assert_all_there(&socket, "after its fiber was cancelled");

                let (waiting, lender) = (socket.clone(), theirs.clone());
                let fiber = spawn(move || receive(&waiting, &lender));
                sleep(0.001).unwrap();
                socket.close().unwrap();
                assert!(is_errno(&fiber.join().unwrap(), &[libc::EBADF]));
                send_to_whoever_waits(&peer);
            });
            quarantine.assert_untouched("timeout, cancel or close");
        }
        assert_eq!(quarantine.len(), 120);
    });
}

#[test]
fn a_receive_that_a_shutdown_ended_never_writes_into_its_buffer() {
    checked(|| {
        let quarantine = Quarantine::default();
        for unwinds in [false, true].repeat(10) {
            let (socket, peer) = socketpair().unwrap();
            let (waiting, lender) = (socket.clone(), quarantine.clone());
            let runtime = Runtime::builder()
                .shutdown_grace(Duration::from_secs(if unwinds { 0 } else { 60 }))
                .build()
                .unwrap();
            let handle = runtime.handle();
            let fiber = handle.spawn(move || {
                // One that goes on is unwound out of its next receive, the buffer with it.
                while receive(&waiting, &lender).is_err() && unwinds {}
            });
            eventually("the receive is in flight", || {
                handle.metrics()[0].in_flight == 1
            });
            drop(runtime);
            assert_eq!(fiber.unwrap().join().is_err(), unwinds);
            send_to_whoever_waits(&peer);
            assert_all_there(&socket, "after a shutdown");
            quarantine.assert_untouched("shutdown");
        }
        assert!(quarantine.len() >= 20);
    });
}

/// Receives that end in every way at random moments, while data comes at random moments.
#[test]
fn buffers_stay_untouched_however_and_whenever_their_calls_end() {
    let seed = seed();
    checked(move || {
        let quarantine = Quarantine::default();
        let lender = quarantine.clone();
        run(move || {
            let mut random = Random::new(seed);
            for round in 0..300 {
                let (socket, peer) = socketpair().unwrap();
                let way = random.below(5);
                let (waiting, lender) = (socket.clone(), lender.clone());
                let receiver = spawn(move || {
                    let mut all = Vec::new();
                    loop {
                        if way == 0 {
                            waiting.settimeout(0.000_2).unwrap();
                        }
                        let received = match way {
                            1 => timeout(0.000_2, || receive(&waiting, &lender)),
                            _ => receive(&waiting, &lender),
                        };
                        match received {
                            Ok(bytes) if bytes.is_empty() => return all,
                            Ok(bytes) => all.extend_from_slice(&bytes),
                            Err(Error::Timeout) => {}
                            Err(_) if way == 4 => panic!("at random"),
                            Err(_) => return all,
                        }
                    }
                });
                let mut writer_random = random.fork();
                let total = 20_000;
                let writer = thread::spawn(move || {
                    let mut sent = 0;
                    while sent < total {
                        let n = writer_random.up_to(3000).min(total - sent);
                        let bytes: Vec<u8> = (sent..sent + n).map(|at| (at % 241) as u8).collect();
                        if peer.sendall(&bytes).is_err() {
                            break;
                        }
                        sent += n;
                        thread::sleep(Duration::from_micros(writer_random.below(100)));
                    }
                });
                sleep(Duration::from_micros(random.below(600))).unwrap();
                match way {
                    2 | 4 => receiver.cancel(),
                    3 => socket.close().unwrap(),
                    _ => {}
                }
                let ended = receiver.join();
                // The writer of a receiver that went would wait for ever.
                socket.close().unwrap();
                writer.join().unwrap();
                match ended {
                    Ok(all) => {
                        assert!(
                            all.iter()
                                .enumerate()
                                .all(|(at, byte)| *byte == (at % 241) as u8)
                        );
                        assert!(way > 1 || all.len() == total, "seed {seed}, round {round}");
                    }
                    Err(error) => assert!(way == 4 && error.into_panic().is_some()),
                }
                quarantine.assert_untouched(&format!("seed {seed}, round {round}"));
            }
        });
    });
}

// 2: the operation's own result decides, not the timer's.

#[test]
fn a_receive_of_all_around_its_deadline_loses_nothing() {
    fn receive_all(socket: &Socket, mut random: Random, total: usize) -> (usize, usize) {
        let (mut got, mut short) = (0, 0);
        while got < total {
            let timeout_us = 200 + random.below(300);
            socket
                .settimeout(Duration::from_micros(timeout_us))
                .unwrap();
            let wanted = random.up_to(900).min(total - got);
            match socket.recv_with(wanted, MSG_WAITALL) {
                Ok(bytes) => {
                    assert!(!bytes.is_empty(), "the end after {got} bytes");
                    for byte in &*bytes {
                        assert_eq!(*byte, (got % 251) as u8, "at {got}");
                        got += 1;
                    }
                    short += usize::from(bytes.len() < wanted);
                }
                Err(error) => assert_eq!(error, Error::Timeout),
            }
        }
        (got, short)
    }
    const TOTAL: usize = 100_000;
    let seed = seed();
    checked(move || {
        for in_fiber in [false, true] {
            for tcp in [false, true] {
                let (left, right) = if tcp {
                    tcp_pair()
                } else {
                    socketpair().unwrap()
                };
                let sender = thread::spawn(move || {
                    let mut random = Random::new(seed);
                    let mut sent = 0;
                    while sent < TOTAL {
                        let n = random.up_to(500).min(TOTAL - sent);
                        let bytes: Vec<u8> = (sent..sent + n).map(|at| (at % 251) as u8).collect();
                        left.sendall(&bytes).unwrap();
                        sent += n;
                        thread::sleep(Duration::from_micros(random.below(400)));
                    }
                    left
                });
                let random = Random::new(!seed);
                let receive = move || receive_all(&right, random, TOTAL);
                let (got, short) = if in_fiber { run(receive) } else { receive() };
                assert_eq!(got, TOTAL);
                assert!(short > 0, "no deadline fell into a receive");
                sender.join().unwrap();
            }
        }
    });
}

// 3: what a timed send reports is what it sent.

/// Sends long pieces under short timeouts to a peer that reads slowly: how many bytes, as reported, and how many sends were short.
fn send_timed(socket: &Socket, mut random: Random) -> (usize, usize) {
    let data: Vec<u8> = (0..200_000).map(|at| (at % 251) as u8).collect();
    let (mut sent, mut short) = (0, 0);
    while sent < 2_000_000 {
        let timeout_us = 200 + random.below(2000);
        socket
            .settimeout(Duration::from_micros(timeout_us))
            .unwrap();
        let start = sent % 251;
        let piece = &data[start..start + random.up_to(150_000)];
        match socket.send(piece) {
            Ok(n) => {
                assert!(n > 0 && n <= piece.len());
                sent += n;
                short += usize::from(n < piece.len());
            }
            Err(error) => assert_eq!(error, Error::Timeout),
        }
    }
    (sent, short)
}

#[test]
fn a_timed_send_that_is_short_reports_what_the_peer_gets() {
    let seed = seed();
    checked(move || {
        for in_fiber in [false, true] {
            for tcp in [false, true] {
                let (left, right) = if tcp {
                    tcp_pair()
                } else {
                    socketpair().unwrap()
                };
                left.setsockopt(SOL_SOCKET, SO_SNDBUF, 16_384).unwrap();
                if !tcp {
                    // A TCP window so small would be probed only every 200 ms.
                    right.setsockopt(SOL_SOCKET, SO_RCVBUF, 16_384).unwrap();
                }
                let peer = thread::spawn(move || {
                    let mut random = Random::new(!seed);
                    let mut got = 0;
                    loop {
                        let received = right.recv(random.up_to(60_000)).unwrap();
                        if received.is_empty() {
                            return got;
                        }
                        for byte in &*received {
                            assert_eq!(*byte, (got % 251) as u8, "at {got}, seed {seed}");
                            got += 1;
                        }
                        thread::sleep(Duration::from_micros(random.below(300)));
                    }
                });
                let random = Random::new(seed);
                let send = move || send_timed(&left, random);
                let (sent, short) = if in_fiber { run(send) } else { send() };
                assert!(
                    short > 0,
                    "no send was short; in a fiber: {in_fiber}, TCP: {tcp}"
                );
                assert_eq!(peer.join().unwrap(), sent, "seed {seed}");
            }
        }
    });
}

// 4: a connection that was accepted has an owner.

/// Busy for so long.
fn spin(microseconds: u64) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_micros(microseconds) {
        std::hint::spin_loop();
    }
}

#[test]
fn accepts_cancelled_just_as_a_client_comes_leak_and_lose_nothing() {
    const TRIALS: usize = 2000;
    let seed = seed();
    checked(move || {
        run(move || {
            let mut random = Random::new(seed);
            let listener = listener(64);
            let address = listener.getsockname().unwrap().as_socket_addr().unwrap();
            let before = descriptors();
            let (ask, asked) = mpsc::channel::<u64>();
            let (tell, told) = socketpair().unwrap();
            let connector = thread::spawn(move || {
                for delay_us in asked {
                    spin(delay_us);
                    let client = TcpStream::connect(address).unwrap();
                    tell.sendall(b"c").unwrap();
                    // Both ends go at once: no TIME_WAIT is left behind.
                    support::Stream::Tcp(client).reset();
                }
            });
            let mut cancelled = 0;
            for trial in 0..TRIALS {
                let accepting = listener.clone();
                let fiber = spawn(move || accepting.accept().map(drop));
                yield_now();
                ask.send(random.below(60)).unwrap();
                let delay_us = random.below(60);
                if trial % 2 == 0 {
                    // The connection comes while the worker does not look: the kernel has accepted it when the cancel follows.
                    spin(delay_us);
                } else {
                    sleep(Duration::from_micros(delay_us)).unwrap();
                }
                fiber.cancel();
                match fiber.join().unwrap() {
                    Ok(()) => {}
                    Err(Error::Cancelled) => {
                        cancelled += 1;
                        listener.settimeout(60).unwrap();
                        let waited = listener.accept();
                        assert!(waited.is_ok(), "trial {trial}, seed {seed}: {waited:?}");
                        listener.settimeout(None).unwrap();
                    }
                    Err(error) => panic!("trial {trial}, seed {seed}: {error}"),
                }
                assert_eq!(told.recv(1).unwrap(), b"c");
            }
            drop(ask);
            connector.join().unwrap();
            println!("{cancelled} of {TRIALS} accepts were cancelled");
            assert!(cancelled > 0 && cancelled < TRIALS);
            drop(told);
            eventually("no descriptor is left", || descriptors() <= before);
            listener.setblocking(false).unwrap();
            assert!(listener.accept().unwrap_err().is_would_block());
        });
    });
}

// 8: a connect that timed out.

#[test]
fn a_connect_that_timed_out_can_be_closed_or_asked_again() {
    fn try_it() {
        let full = listener(0);
        let address = full.getsockname().unwrap();
        let mut waiting = Vec::new();
        let timed_out = loop {
            let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
            client.settimeout(0.02).unwrap();
            match client.connect(&address) {
                Ok(()) => waiting.push(client),
                Err(error) => {
                    assert_eq!(error, Error::Timeout);
                    break client;
                }
            }
            assert!(waiting.len() < 100);
        };
        // It goes on, in each mode.
        assert!(is_errno(&timed_out.connect(&address), &[libc::EALREADY]));
        timed_out.setblocking(false).unwrap();
        assert!(is_errno(&timed_out.connect(&address), &[libc::EALREADY]));
        // Closed, it does not: its number is free, and nobody comes out of the backlog for it.
        let before = descriptors();
        timed_out.close().unwrap();
        assert!(is_errno(&timed_out.connect(&address), &[libc::EBADF]));
        drop(timed_out);
        assert_eq!(descriptors(), before - 1);
        for client in &waiting {
            let (conn, peer) = full.accept().unwrap();
            assert_eq!(peer, client.getsockname().unwrap());
            drop(conn);
            client.settimeout(1).unwrap();
            assert!(is_errno(&client.connect(&address), &[libc::EISCONN]));
        }
        full.settimeout(0.01).unwrap();
        assert_eq!(full.accept().unwrap_err(), Error::Timeout);
    }
    checked(|| {
        try_it();
        run(try_it);
    });
}

// 9: whoever goes leaves nothing in flight.

#[test]
fn fibers_that_panic_anywhere_leave_no_descriptor_and_no_operation() {
    let seed = seed();
    checked(move || {
        let runtime = Runtime::builder().workers(2).build().unwrap();
        let handle = runtime.handle();
        let mut random = Random::new(seed);
        let round = |random: &mut Random| {
            let fibers: Vec<_> = (0..100)
                .map(|n| {
                    let mut random = random.fork();
                    let panics = move |random: &mut Random| {
                        if random.below(60) == 0 {
                            // Not panic!, whose message would fill the log.
                            std::panic::resume_unwind(Box::new("at random"));
                        }
                    };
                    let body = move || {
                        let (left, right) = socketpair().unwrap();
                        let echo = spawn(move || {
                            let mut buffer = [0; 512];
                            while let Ok(n @ 1..) = right.recv_into(&mut buffer) {
                                right.sendall(&buffer[..n])?;
                            }
                            Ok::<(), Error>(())
                        });
                        for _ in 0..20 {
                            panics(&mut random);
                            left.settimeout([None, Some(60.0)][random.below(2) as usize])?;
                            left.sendall(&[7; 100])?;
                            panics(&mut random);
                            assert_eq!(left.recv_with(100, MSG_WAITALL)?, [7; 100]);
                        }
                        drop(left);
                        echo.join().unwrap()
                    };
                    handle.spawn_on(n % 2, body).unwrap()
                })
                .collect();
            let ended: Vec<_> = fibers.into_iter().map(|fiber| fiber.join()).collect();
            let panicked = ended.iter().filter(|result| result.is_err()).count();
            assert!(panicked > 0 && panicked < 100, "seed {seed}: {panicked}");
        };
        round(&mut random);
        let idle = || {
            let metrics = handle.metrics();
            metrics
                .iter()
                .all(|m| m.in_flight == 0 && m.fibers_live == 0)
        };
        eventually("the fibers are gone", idle);
        let before = descriptors();
        for _ in 0..20 {
            round(&mut random);
        }
        eventually("the fibers are gone", idle);
        assert_eq!(descriptors(), before, "seed {seed}");
        for metrics in handle.metrics() {
            assert_eq!(metrics.cqes_unknown, 0, "seed {seed}");
        }
    });
}

/// Exchanges bytes when it is dropped, and tells how that went.
struct LastWords {
    pair: (Socket, Socket),
    result: mpsc::Sender<Result<()>>,
}

impl Drop for LastWords {
    fn drop(&mut self) {
        let (left, right) = &self.pair;
        let exchange = || {
            left.sendall(b"last words")?;
            assert_eq!(right.recv(100)?, b"last words");
            left.sendall(b"in ")?;
            let sender = left.clone();
            let sending = thread::spawn(move || {
                let mut pieces = ["some ", "pieces"].iter();
                pieces.try_for_each(|piece| sender.sendall(piece.as_bytes()))
            });
            assert_eq!(right.recv_with(14, MSG_WAITALL)?, b"in some pieces");
            sending.join().unwrap()?;
            left.sendall(b"half")?;
            right.settimeout(0.01)?;
            let start = Instant::now();
            assert_eq!(right.recv_with(8, MSG_WAITALL)?, b"half");
            assert!(start.elapsed() >= Duration::from_millis(9));
            assert_eq!(right.recv(1), Err(Error::Timeout));
            left.close()?;
            assert!(right.recv(1)?.is_empty());
            Ok(())
        };
        self.result.send(exchange()).unwrap();
    }
}

#[test]
fn calls_in_destructors_of_thread_locals_work_before_and_after_the_ring_went() {
    thread_local!(static LAST_WORDS: RefCell<Option<LastWords>> = const { RefCell::new(None) });
    checked(|| {
        for ring_goes_first in [true, false] {
            let (result, results) = mpsc::channel();
            let before = calls_without_ring();
            thread::spawn(move || {
                let wait = || {
                    let (left, _right) = socketpair().unwrap();
                    left.settimeout(0.001).unwrap();
                    assert_eq!(left.recv(1), Err(Error::Timeout));
                };
                // Destructors run in the opposite order of first use.
                if !ring_goes_first {
                    wait();
                }
                let pair = socketpair().unwrap();
                LAST_WORDS.set(Some(LastWords { pair, result }));
                wait();
            })
            .join()
            .unwrap();
            assert_eq!(results.recv().unwrap(), Ok(()));
            let without = calls_without_ring() - before;
            assert_eq!(without > 0, ring_goes_first, "{without} calls without ring");
        }
    });
}

// 10: fork.

#[test]
fn a_program_started_from_a_fiber_inherits_no_descriptor() {
    fn inherited() -> String {
        let listed = Command::new("ls").arg("/proc/self/fd").output().unwrap();
        assert!(listed.status.success());
        String::from_utf8(listed.stdout).unwrap()
    }
    let _turn = turn();
    let before = inherited();
    let during = Runtime::builder()
        .workers(2)
        .run(|| {
            let (left, right) = socketpair().unwrap();
            let waiting = right.clone();
            let waiting = spawn(move || waiting.recv(1));
            let on_a_thread = right.clone();
            let thread = thread::spawn(move || on_a_thread.recv(1));
            left.close().unwrap();
            let _closed = left;
            sleep(0.001).unwrap();
            let during = inherited();
            waiting.join().unwrap().unwrap();
            thread.join().unwrap().unwrap();
            during
        })
        .unwrap();
    assert_eq!(before, during);
}

#[test]
#[ignore = "run by a_child_that_returns_from_its_fiber_is_told_and_ends"]
fn child_forks_and_returns() {
    if child_part().is_none() {
        return;
    }
    let pids = run(|| {
        // SAFETY: the child only returns from the fiber.
        unsafe { libc::fork() }
    });
    assert!(pids > 0, "the child went on past its fiber");
    let mut status = 0;
    // SAFETY: `status` lives through the call; the child is ours.
    assert_eq!(unsafe { libc::waitpid(pids, &mut status, 0) }, pids);
    assert!(libc::WIFEXITED(status));
    println!("the child's code is {}", libc::WEXITSTATUS(status));
}

#[test]
fn a_child_that_returns_from_its_fiber_is_told_and_ends() {
    let _turn = turn();
    let output = child("child_forks_and_returns", "all");
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{stdout}\n{stderr}");
    assert!(stdout.contains("the child's code is 1"), "{stdout}");
    assert!(
        stderr.contains("call std::process::exit in the child"),
        "{stderr}"
    );
}

#[test]
fn a_child_forked_by_a_fiber_runs_fibers_of_its_own() {
    let _turn = turn();
    run(|| {
        let (parents, childs) = socketpair().unwrap();
        // SAFETY: the child calls this crate, which is made for it, and ends by _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let sum = std::panic::catch_unwind(|| {
                assert!(ringsock::Handle::current().is_none());
                run(|| {
                    let fibers: Vec<_> = (1..=10)
                        .map(|n| {
                            spawn(move || {
                                sleep(0.001).unwrap();
                                n
                            })
                        })
                        .collect();
                    fibers
                        .into_iter()
                        .map(|fiber| fiber.join().unwrap())
                        .sum::<u8>()
                })
            });
            let _ = childs.sendall(&[sum.unwrap_or(0)]);
            // SAFETY: it only ends the process.
            unsafe { libc::_exit(0) };
        }
        assert!(child > 0);
        parents.settimeout(60).unwrap();
        assert_eq!(parents.recv(1).unwrap(), [55]);
        let mut status = 0;
        // SAFETY: `status` lives through the call; the child is ours.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(spawn(|| 7).join().unwrap(), 7, "the parent goes on");
    });
}

// 14: one busy side does not hold up the others.

#[test]
fn a_server_that_stops_under_a_flood_takes_no_more_than_its_backlog() {
    let _turn = turn();
    const BACKLOG: usize = 1024;
    static ACCEPTED: AtomicUsize = AtomicUsize::new(0);
    let flooding = Arc::new(AtomicBool::new(true));
    run(move || {
        let server = ringsock::serve(("127.0.0.1", 0), |_conn, _peer| {
            ACCEPTED.fetch_add(1, Ordering::SeqCst);
        })
        .unwrap();
        let port = server.address().port().unwrap();
        let clients: Vec<_> = (0..4)
            .map(|_| {
                let flooding = flooding.clone();
                thread::spawn(move || {
                    while flooding.load(Ordering::SeqCst) {
                        let _ = std::net::TcpStream::connect(("127.0.0.1", port));
                    }
                })
            })
            .collect();
        while ACCEPTED.load(Ordering::SeqCst) < 1000 {
            sleep(0.001).unwrap();
        }
        let before = ACCEPTED.load(Ordering::SeqCst);
        server.stop();
        let more = ACCEPTED.load(Ordering::SeqCst) - before;
        flooding.store(false, Ordering::SeqCst);
        // Some are accepted, but not counted yet, when the server is told to stop.
        assert!(more <= 2 * BACKLOG, "{more}");
        for client in clients {
            client.join().unwrap();
        }
    });
}

// 18: SIGPIPE.

/// Every way to send, to a peer that is gone or goes meanwhile.
fn send_to_broken_peers(in_fiber: bool) {
    const GONE: [i32; 2] = [libc::EPIPE, libc::ECONNRESET];
    type Way = fn(&Socket) -> Result<()>;
    let ways: [(&str, Way); 6] = [
        ("send", |socket| socket.send(&[0; 100]).map(drop)),
        ("sendall", |socket| socket.sendall(&[0; 100_000])),
        ("send MSG_DONTWAIT", |socket| {
            socket.send_with(&[0; 100], MSG_DONTWAIT).map(drop)
        }),
        ("sendall MSG_DONTWAIT", |socket| {
            socket.sendall_with(&[0; 100], MSG_DONTWAIT)
        }),
        ("write", |mut socket| Ok(socket.write_all(&[0; 100])?)),
        // More than a fiber may send directly in a row: the last of them go through the ring.
        ("many sends", |socket| {
            let results: Vec<_> = (0..40).map(|_| socket.send(b"x").map(drop)).collect();
            results.into_iter().last().unwrap()
        }),
    ];
    for (name, way) in ways {
        for timeout in [None, Some(30.0), Some(0.0)] {
            let (unix, gone) = socketpair().unwrap();
            drop(gone);
            unix.settimeout(timeout).unwrap();
            let result = way(&unix);
            assert!(
                is_errno(&result, &GONE),
                "{name}, Unix, {timeout:?}: {result:?}"
            );

            let tcp = reset_connection();
            tcp.settimeout(timeout).unwrap();
            for _ in 0..3 {
                let result = way(&tcp);
                assert!(
                    is_errno(&result, &GONE),
                    "{name}, TCP, {timeout:?}: {result:?}"
                );
            }
        }
    }
    // While the send waits.
    for timeout in [None, Some(30.0)] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
        client
            .connect(Address::from(listener.local_addr().unwrap()))
            .unwrap();
        let (peer, _) = listener.accept().unwrap();
        client.settimeout(timeout).unwrap();
        let sent = Arc::new(AtomicUsize::new(0));
        let (sending, counted) = (client.clone(), sent.clone());
        let send = move || {
            loop {
                match sending.send(&[0; 1 << 20]) {
                    Ok(n) => drop(counted.fetch_add(n, Ordering::SeqCst)),
                    Err(error) => return Err::<(), Error>(error),
                }
            }
        };
        let resetter = thread::spawn(move || {
            thread::sleep(Duration::from_millis(30));
            support::Stream::Tcp(peer).reset();
        });
        let result = if in_fiber {
            spawn(send).join().unwrap()
        } else {
            send()
        };
        assert!(is_errno(&result, &GONE), "while it waits: {result:?}");
        resetter.join().unwrap();
    }
}

/// A connection that the peer has reset.
fn reset_connection() -> Socket {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    client
        .connect(Address::from(listener.local_addr().unwrap()))
        .unwrap();
    let (peer, _) = listener.accept().unwrap();
    support::Stream::Tcp(peer).reset();
    let mut poll = libc::pollfd {
        fd: client.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid entry; the kernel fills `revents`.
    assert_eq!(unsafe { libc::poll(&mut poll, 1, 30_000) }, 1);
    client
}

#[test]
fn no_way_to_send_raises_sigpipe() {
    alone("no_way_to_send_raises_sigpipe", || {
        // SAFETY: it concerns this process only. Rust's runtime ignores SIGPIPE; now it would end the process.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        send_to_broken_peers(false);
        run(|| send_to_broken_peers(true));
        // And by readiness: a thread whose ring finds no descriptor.
        let (left, right) = socketpair().unwrap();
        drop(right);
        set_limit(libc::RLIMIT_NOFILE, 0).unwrap();
        let before = calls_without_ring();
        thread::spawn(move || {
            assert!(is_errno(&left.sendall(b"x"), &[libc::EPIPE]));
            assert!(is_errno(&left.send(b"x"), &[libc::EPIPE]));
        })
        .join()
        .unwrap();
        assert!(calls_without_ring() > before);
    });
}

// 20: what a thread or a borrow holds across a wait.

#[test]
fn a_borrow_held_across_a_wait_panics_in_the_other_fiber_and_corrupts_nothing() {
    let _turn = turn();
    run(|| {
        let shared = std::rc::Rc::new(RefCell::new(vec![1]));
        let (left, right) = socketpair().unwrap();
        let theirs = shared.clone();
        let holder = spawn(move || {
            let mut held = theirs.borrow_mut();
            right.recv(1).unwrap();
            held.push(2);
        });
        yield_now();
        let caught = catch_unwind(AssertUnwindSafe(|| shared.borrow().len()));
        assert!(caught.is_err());
        left.sendall(b"x").unwrap();
        holder.join().unwrap();
        assert_eq!(*shared.borrow(), [1, 2]);
    });
}

#[test]
fn a_fiber_never_leaves_its_thread() {
    thread_local!(static HERE: Cell<u64> = const { Cell::new(0) });
    let _turn = turn();
    let runtime = Runtime::builder().workers(2).build().unwrap();
    let fibers: Vec<_> = (1..=40)
        .map(|n| {
            let body = move || {
                let id = thread::current().id();
                let (left, right) = socketpair().unwrap();
                spawn(move || (&left).write_all(&[1; 50]).unwrap());
                for _ in 0..50 {
                    HERE.set(n);
                    (&right).read_exact(&mut [0]).unwrap();
                    sleep(0.000_1).unwrap();
                    Handle::current()
                        .unwrap()
                        .spawn(|| ())
                        .unwrap()
                        .join()
                        .unwrap();
                    assert_eq!(thread::current().id(), id);
                }
            };
            runtime.handle().spawn(body).unwrap()
        })
        .collect();
    for fiber in fibers {
        fiber.join().unwrap();
    }
}
