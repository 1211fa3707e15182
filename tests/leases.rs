//! Receive buffers that are lent: who gets one, that each comes home from wherever it went, that nobody waits or starves for
//! want of one, and that nothing is received or accepted ahead.
#![allow(unsafe_code)] // of the tests' support

mod support;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::*;
use ringsock::{Runtime, create_connection, create_server, socketpair, spawn};

use support::{Random, beside, checked, errno, seed, tcp_pair};

/// Runs `main` with one worker and so many buffers.
fn run_with<T: 'static>(buffers: usize, bytes: usize, main: impl FnOnce() -> T + 'static) -> T {
    let runtime = Runtime::builder().buffers(buffers, bytes);
    runtime.run(main).unwrap()
}

#[test]
fn a_receive_is_lent_a_buffer_only_where_that_changes_no_result() {
    checked(|| {
        run_with(2, 4096, || {
            let (left, right) = socketpair().unwrap();
            let receive = |bufsize, flags| {
                left.sendall(b"hello").unwrap();
                let received = right.recv_with(bufsize, flags).unwrap();
                assert_eq!(received, b"hello"[..received.len()]);
                if flags == MSG_PEEK {
                    assert_eq!(right.recv_with(100, MSG_DONTWAIT).unwrap(), b"hello");
                }
                received
            };
            assert!(receive(4096, MsgFlags::default()).is_lease());
            assert!(!receive(4097, MsgFlags::default()).is_lease());
            assert!(!receive(5, MSG_WAITALL).is_lease());
            assert!(!receive(4096, MSG_PEEK).is_lease());
            let held = [(); 3].map(|()| receive(4096, MsgFlags::default()));
            assert_eq!(held.each_ref().map(Buf::is_lease), [true, true, false]);
            drop(held);
            assert!(receive(4096, MsgFlags::default()).is_lease());
            // As long as the buffer and no longer.
            left.sendall(&[7; 5000]).unwrap();
            assert_eq!(right.recv(4096).unwrap(), [7; 4096][..]);
            assert_eq!(right.recv(4096).unwrap(), [7; 904][..]);
            drop(left);
            assert!(
                !right.recv(4096).unwrap().is_lease(),
                "the end needs no buffer"
            );
        });
        let (left, right) = socketpair().unwrap();
        left.sendall(b"hello").unwrap();
        assert!(
            !right.recv(4096).unwrap().is_lease(),
            "a plain thread has no pool"
        );
    });
}

#[test]
fn a_receive_of_a_listening_socket_fails_at_once_in_any_fiber() {
    checked(|| {
        ringsock::run(|| {
            let server = create_server(("127.0.0.1", 0)).unwrap();
            let (_left, right) = socketpair().unwrap();
            right.settimeout(0.001).unwrap();
            // A fiber whose receives were in vain is not one that tries first.
            for _ in 0..10 {
                assert_eq!(right.recv(16).unwrap_err(), Error::Timeout);
                assert_eq!(errno(server.recv(16)), Some(107));
            }
        });
    });
}

#[test]
fn who_finds_that_another_was_faster_waits_for_the_rest_of_its_time() {
    checked(|| {
        ringsock::run(|| {
            let (left, right) = socketpair().unwrap();
            right.settimeout(0.3).unwrap();
            let receivers: Vec<_> = (0..8)
                .map(|_| {
                    let right = right.clone();
                    spawn(move || {
                        let start = Instant::now();
                        (right.recv(1), start.elapsed())
                    })
                })
                .collect();
            // All of them wait for readiness, and one byte is there for all.
            ringsock::sleep(0.15).unwrap();
            left.sendall(b"x").unwrap();
            let mut received = 0;
            for receiver in receivers {
                match receiver.join().unwrap() {
                    (Ok(byte), _) => {
                        assert_eq!(byte, b"x");
                        received += 1;
                    }
                    (Err(error), took) => {
                        assert_eq!(error, Error::Timeout);
                        let expected = Duration::from_millis(299)..Duration::from_millis(440);
                        assert!(expected.contains(&took), "{took:?}");
                    }
                }
            }
            assert_eq!(received, 1);
        });
    });
}

#[test]
fn leases_outlive_their_socket_their_fiber_and_their_runtime_on_any_thread() {
    checked(|| {
        for keepers in [1, 3] {
            let leases: Vec<(Vec<u8>, Buf)> = run_with(8, 4096, || {
                (0..8u8)
                    .map(|n| {
                        let (left, right) = socketpair().unwrap();
                        let sent = vec![n; 1 + 500 * usize::from(n)];
                        left.sendall(&sent).unwrap();
                        let received = spawn(move || right.recv(4096).unwrap()).join().unwrap();
                        assert!(received.is_lease());
                        (sent, received)
                    })
                    .collect()
            });
            let mut hands: Vec<Vec<_>> = (0..keepers).map(|_| Vec::new()).collect();
            for (n, (sent, mut lease)) in leases.into_iter().enumerate() {
                let head = lease.split_to(sent.len() / 2);
                hands[n % keepers].push((sent[..sent.len() / 2].to_vec(), head));
                hands[(n + 1) % keepers].push((sent[sent.len() / 2..].to_vec(), lease));
            }
            let threads: Vec<_> = hands
                .into_iter()
                .map(|hand| {
                    thread::spawn(move || {
                        for (sent, mut lease) in hand {
                            assert_eq!(lease, sent);
                            lease.fill(0xee);
                        }
                    })
                })
                .collect();
            threads
                .into_iter()
                .for_each(|thread| thread.join().unwrap());
        }
    });
}

#[test]
fn leases_dropped_on_other_threads_are_lent_again() {
    checked(|| {
        run_with(4, 64, || {
            let (left, right) = socketpair().unwrap();
            let (give, given) = std::sync::mpsc::sync_channel::<Buf>(1);
            let dropper = thread::spawn(move || given.into_iter().for_each(drop));
            let mut lent = 0;
            for n in 0..1000u32 {
                left.sendall(&n.to_le_bytes()).unwrap();
                let received = right.recv(64).unwrap();
                assert_eq!(received, n.to_le_bytes());
                lent += u32::from(received.is_lease());
                give.send(received).unwrap();
            }
            drop(give);
            dropper.join().unwrap();
            // At most two are on their way at a time.
            assert_eq!(lent, 1000);
        });
    });
}

/// 1,000 connections, of which each fiber holds its lease while it sends; 8 of them never let go of theirs.
#[test]
fn four_buffers_serve_a_thousand_connections_evenly_and_rest_when_they_do() {
    const CONNECTIONS: usize = 1000;
    const MESSAGE: usize = 128;
    checked(|| {
        ringsock::raise_descriptor_limit();
        let (ours, theirs): (Vec<_>, Vec<_>) = (0..CONNECTIONS)
            .map(|_| UnixStream::pair().unwrap())
            .unzip();
        let server = Runtime::builder().buffers(4, MESSAGE).build().unwrap();
        let leases = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let counted = leases.clone();
        let serving = server.handle().spawn(move || {
            for (n, conn) in theirs.into_iter().enumerate() {
                let conn = Socket::try_from(conn).unwrap();
                let counted = counted.clone();
                spawn(move || {
                    let mut hoard = Vec::new();
                    loop {
                        let message = conn.recv(MESSAGE)?;
                        if message.is_empty() {
                            return Ok::<(), Error>(());
                        }
                        counted[usize::from(message.is_lease())].fetch_add(1, Ordering::Relaxed);
                        conn.sendall(&message)?;
                        if n % 125 == 0 && hoard.is_empty() {
                            hoard.push(message);
                        }
                    }
                });
            }
        });
        serving.unwrap().join().unwrap();
        let client = Runtime::builder().build().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let echoes = client.handle().spawn(move || {
            let fibers: Vec<_> = ours
                .into_iter()
                .enumerate()
                .map(|(n, conn)| {
                    let stop = stopping.clone();
                    let conn = Socket::try_from(conn).unwrap();
                    spawn(move || {
                        let mut echoes = 0u64;
                        let mut buffer = [0; MESSAGE];
                        while !stop.load(Ordering::Relaxed) {
                            let message = [(n as u64 + echoes) as u8; MESSAGE];
                            conn.sendall(&message).unwrap();
                            let mut back = 0;
                            while back < MESSAGE {
                                back += conn.recv_into(&mut buffer[back..]).unwrap();
                            }
                            assert_eq!(buffer, message);
                            echoes += 1;
                        }
                        (echoes, conn)
                    })
                })
                .collect();
            fibers
                .into_iter()
                .map(|fiber| fiber.join().unwrap())
                .collect::<Vec<_>>()
        });
        thread::sleep(Duration::from_secs(2));
        stop.store(true, Ordering::Relaxed);
        let (echoes, conns): (Vec<u64>, Vec<Socket>) =
            echoes.unwrap().join().unwrap().into_iter().unzip();
        let mean = echoes.iter().sum::<u64>() / CONNECTIONS as u64;
        let slowest = *echoes.iter().min().unwrap();
        println!("{mean} echoes on average, {slowest} at least");
        assert!(slowest >= 1 && slowest * 4 >= mean);
        // Four of the eight hoard all buffers after a while, and nobody noticed.
        assert!(leases.iter().all(|count| count.load(Ordering::Relaxed) > 0));
        let before = (cpu_time(), server.handle().metrics()[0].enters);
        thread::sleep(Duration::from_millis(500));
        let (used, enters) = (cpu_time() - before.0, server.handle().metrics()[0].enters);
        assert!(used < Duration::from_millis(100), "idle, they use {used:?}");
        assert!(enters - before.1 < 50, "idle, the server enters its ring");
        drop(conns);
    });
}

/// What this process has used of the processors so far.
fn cpu_time() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let each =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok());
    let ns = each.filter_map(|text| text.split(' ').next()?.parse::<u64>().ok());
    Duration::from_nanos(ns.sum())
}

#[test]
fn chunks_end_with_the_stream_and_leave_the_rest_to_the_next_call() {
    checked(|| {
        let seed = seed();
        run_with(3, 1000, move || {
            for round in 0..30 {
                let mut random = Random::new(seed + round);
                let sent = random.bytes(100_000);
                let (left, right) = if round % 2 == 0 {
                    socketpair().unwrap()
                } else {
                    tcp_pair()
                };
                let sender = beside({
                    let (sent, mut random) = (sent.clone(), random.fork());
                    move || {
                        let mut rest = &sent[..];
                        while !rest.is_empty() {
                            let n = (1 + random.below(3000) as usize).min(rest.len());
                            left.sendall(&rest[..n]).unwrap();
                            rest = &rest[n..];
                        }
                    }
                });
                let mut received = Vec::new();
                let mut held = Vec::new();
                let mut ended = false;
                while !ended {
                    if random.below(2) == 0 {
                        let chunks = right.chunks().take(random.below(6) as usize);
                        for chunk in chunks {
                            let chunk = chunk.unwrap();
                            assert!(!chunk.is_empty() && chunk.len() <= 1000);
                            received.extend_from_slice(&chunk);
                            held.push(chunk);
                        }
                    } else {
                        let mut buffer = [0; 300];
                        let n = 1 + random.below(300) as usize;
                        let n = right.recv_into(&mut buffer[..n]).unwrap();
                        received.extend_from_slice(&buffer[..n]);
                    }
                    held.truncate(random.below(5) as usize);
                    ended = received.len() == sent.len();
                }
                assert!(received == sent, "seed {}", seed + round);
                sender.join();
                let mut chunks = right.chunks();
                assert!(chunks.next().is_none() && chunks.next().is_none());
            }
        });
    });
}

#[test]
fn chunks_go_on_after_a_timeout_and_end_after_other_errors() {
    checked(|| {
        ringsock::run(|| {
            let (left, right) = socketpair().unwrap();
            right.settimeout(0.01).unwrap();
            let mut chunks = right.chunks();
            assert_eq!(chunks.next(), Some(Err(Error::Timeout)));
            left.sendall(b"later").unwrap();
            assert_eq!(chunks.next().unwrap().unwrap(), b"later");
            let closer = spawn({
                let right = right.clone();
                move || right.close()
            });
            right.settimeout(None).unwrap();
            assert!(chunks.next().unwrap().unwrap_err().is_closed());
            assert!(chunks.next().is_none());
            closer.join().unwrap().unwrap();
        });
    });
}

#[test]
fn incoming_gives_every_connection_and_leaves_the_others_in_the_backlog() {
    checked(|| {
        support::on_both(|| {
            let server = create_server(("127.0.0.1", 0)).unwrap();
            let address = server.getsockname().unwrap();
            let clients: Vec<Socket> = (0..6)
                .map(|_| create_connection(&address).unwrap())
                .collect();
            let mut accepted = Vec::new();
            for connection in server.incoming().take(2) {
                accepted.push(connection.unwrap());
            }
            accepted.push(server.accept().unwrap());
            accepted.extend(server.incoming().take(3).map(Result::unwrap));
            for (client, (conn, peer)) in clients.iter().zip(&accepted) {
                assert_eq!(*peer, client.getsockname().unwrap());
                client.sendall(b"hi").unwrap();
                assert_eq!(conn.recv(16).unwrap(), b"hi");
            }
            server.settimeout(0.01).unwrap();
            let mut incoming = server.incoming();
            assert_eq!(incoming.next().unwrap().unwrap_err(), Error::Timeout);
            assert_eq!(incoming.next().unwrap().unwrap_err(), Error::Timeout);
            server.close().unwrap();
            assert!(incoming.next().unwrap().unwrap_err().is_closed());
            assert!(incoming.next().is_none());
        });
    });
}
