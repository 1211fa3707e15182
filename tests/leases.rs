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
use ringsock::{Runtime, create_connection, create_server, socketpair, spawn, yield_now};

use support::{Random, alone, beside, checked, errno, seed, set_limit, tcp_pair};

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
            let first = receive(4096, MsgFlags::default());
            assert!(first.is_lease());
            let at = first.as_ptr();
            drop(first);
            // The one that came back last is lent first.
            assert_eq!(receive(4096, MsgFlags::default()).as_ptr(), at);
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
                server.settimeout(1).unwrap();
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

#[test]
fn incoming_rests_while_there_is_no_descriptor_and_then_gives_every_connection() {
    alone(
        "incoming_rests_while_there_is_no_descriptor_and_then_gives_every_connection",
        || {
            ringsock::run(|| {
                set_limit(libc::RLIMIT_NOFILE, 64).unwrap();
                let server = create_server(("127.0.0.1", 0)).unwrap();
                let address = server.getsockname().unwrap();
                let _clients = [(); 3].map(|()| create_connection(&address).unwrap());
                let mut taken = Vec::new();
                while let Ok(file) = std::fs::File::open("/dev/null") {
                    taken.push(file);
                }
                let mut incoming = server.incoming();
                let start = Instant::now();
                for _ in 0..5 {
                    assert_eq!(errno(incoming.next().unwrap()), Some(24));
                }
                // 10, 20, 40 and 80 ms between them.
                assert!(start.elapsed() >= Duration::from_millis(149));
                drop(taken);
                let accepted: Vec<_> = incoming.take(3).map(Result::unwrap).collect();
                assert_eq!(accepted.len(), 3);
            });
        },
    );
}

// Sending later.

/// Receives to the end of the stream.
fn receive_all(conn: &Socket) -> Vec<u8> {
    conn.chunks()
        .flat_map(|chunk| chunk.unwrap().to_vec())
        .collect()
}

#[test]
fn a_lease_is_sent_and_goes_home() {
    checked(|| {
        run_with(1, 4096, || {
            let (left, right) = socketpair().unwrap();
            for n in 0..100u32 {
                left.sendall(&n.to_le_bytes()).unwrap();
                let lease = right.recv(4096).unwrap();
                assert!(lease.is_lease());
                right.sendall_buf(lease).unwrap();
                assert_eq!(left.recv_into(&mut [0; 8]).unwrap(), 4);
            }
        });
    });
}

/// Whatever is sent now, later, as a message or a file arrives in the order of the calls, with leases among it.
#[test]
fn what_is_sent_later_keeps_its_place() {
    checked(|| {
        let seed = seed();
        run_with(4, 65_536, move || {
            for round in 0..20 {
                let mut random = Random::new(seed + round);
                let (left, right) = if round % 2 == 0 {
                    socketpair().unwrap()
                } else {
                    tcp_pair()
                };
                let receiver = beside(move || {
                    thread::sleep(Duration::from_millis(5));
                    receive_all(&right)
                });
                let (feed, fed) = socketpair().unwrap();
                let mut sent = Vec::new();
                for _ in 0..100 {
                    let len = match random.below(4) {
                        0 => random.below(100_000),
                        _ => 1 + random.below(10_000),
                    };
                    let bytes = random.bytes(len as usize);
                    sent.extend_from_slice(&bytes);
                    match random.below(6) {
                        0 => left.sendall(&bytes).unwrap(),
                        1 => assert_eq!(left.send(&bytes).unwrap(), bytes.len()),
                        2 => assert_eq!(
                            left.sendmsg(&[std::io::IoSlice::new(&bytes)]).unwrap(),
                            bytes.len()
                        ),
                        3 if !bytes.is_empty() => {
                            let half = bytes.len().min(4096);
                            feed.sendall(&bytes[..half]).unwrap();
                            let mut lease = fed.recv(65_536).unwrap();
                            assert_eq!(lease.len(), half);
                            let head = lease.split_to(half / 2);
                            left.sendall_later(head).unwrap();
                            left.sendall_later(lease).unwrap();
                            left.sendall_later(bytes[half..].into()).unwrap();
                        }
                        _ => left.sendall_later(bytes.into()).unwrap(),
                    }
                    if random.below(10) == 0 {
                        yield_now();
                    }
                }
                match round % 4 {
                    0 | 1 => left.shutdown(SHUT_WR).unwrap(),
                    _ => drop(left),
                }
                assert!(receiver.join() == sent, "seed {}", seed + round);
            }
        });
    });
}

/// Reports in a socket's error queue make it ready for ever, but they are not what a receive waits for.
#[test]
fn a_receive_beside_reports_waits() {
    const SOFTWARE_STAMPS: i32 = 1 << 1 | 1 << 4;
    checked(|| {
        ringsock::run(|| {
            for (bytes, lease) in [(100, true), (65_536, true), (100, false), (65_536, false)] {
                let (left, right) = tcp_pair();
                right
                    .setsockopt(SOL_SOCKET, libc::SO_TIMESTAMPING, SOFTWARE_STAMPS)
                    .unwrap();
                right.sendall(b"stamped").unwrap();
                let receiver = right.clone();
                let waiting = spawn(move || match lease {
                    true => receiver.recv(bytes).map(|data| data.len()),
                    false => receiver.recv_into(&mut vec![0; bytes]),
                });
                // Counters are published when the worker waits.
                let operations = || {
                    ringsock::sleep(0.05).unwrap();
                    ringsock::Handle::current().unwrap().metrics()[0].operations
                };
                let before = operations();
                let after = operations();
                assert!(after - before < 20, "{} for {bytes} bytes", after - before);
                left.sendall(b"data").unwrap();
                assert_eq!(waiting.join().unwrap(), Ok(4));
            }
        });
    });
}

/// What may wait fails in a fiber that was cancelled, and an empty datagram is one.
#[test]
fn what_is_sent_later_is_sent_or_fails() {
    checked(|| {
        ringsock::run(|| {
            let (left, right) = ringsock::socketpair_with(AF_UNIX, SOCK_DGRAM, 0).unwrap();
            let sender = left.clone();
            ringsock::timeout(20.0, || sender.sendall_later(Buf::default())).unwrap();
            left.sendall(b"next").unwrap();
            assert_eq!(right.recv(9).unwrap(), b"");
            assert_eq!(right.recv(9).unwrap(), b"next");
            let cancelled = spawn(move || {
                let slept = ringsock::sleep(20.0);
                (slept, left.sendall_later(b"too late".into()))
            });
            yield_now();
            cancelled.cancel();
            let ended = cancelled.join().unwrap();
            assert_eq!(ended, (Err(Error::Cancelled), Err(Error::Cancelled)));
            let nothing = right.recv_with(9, MSG_DONTWAIT).unwrap_err();
            assert!(nothing.is_would_block());
        });
    });
}

#[test]
fn what_waits_to_be_sent_is_bounded_and_others_wait_no_longer_than_their_timeout() {
    checked(|| {
        ringsock::run(|| {
            for len in [1, 70_000] {
                let (left, right) = socketpair().unwrap();
                left.setsockopt(SOL_SOCKET, SO_SNDBUF, 4096).unwrap();
                left.setblocking(false).unwrap();
                while left.send(&[0; 100_000]).is_ok() {}
                let mut queued = 0;
                let full = loop {
                    match left.sendall_later(vec![1; len].into()) {
                        Ok(()) => queued += 1,
                        Err(error) => break error,
                    }
                };
                assert!(full.is_would_block());
                // One of them is being sent.
                assert_eq!(queued, if len == 1 { 16 } else { 3 });
                yield_now();
                assert!(left.sendall(b"x").unwrap_err().is_would_block());
                assert!(
                    left.send_with(b"x", MSG_DONTWAIT)
                        .unwrap_err()
                        .is_would_block()
                );
                left.settimeout(0.05).unwrap();
                let start = Instant::now();
                assert_eq!(left.sendall(b"x"), Err(Error::Timeout));
                assert!(start.elapsed() >= Duration::from_millis(49));
                left.settimeout(None).unwrap();
                let receiver = spawn(move || receive_all(&right));
                left.sendall(b"x").unwrap();
                drop(left);
                let received = receiver.join().unwrap();
                assert_eq!(received.last(), Some(&b'x'));
                let ones = received.iter().filter(|byte| **byte == 1).count();
                assert!(ones == queued * len || ones == (queued + 1) * len, "{ones}");
            }
        });
    });
}

#[test]
fn an_error_of_what_was_queued_comes_with_the_next_send_once() {
    checked(|| {
        ringsock::run(|| {
            let (left, right) = socketpair().unwrap();
            left.sendall_later(vec![1; 10_000_000].into()).unwrap();
            yield_now();
            left.sendall_later(vec![1; 100_000].into()).unwrap();
            drop(right);
            let waiting = left.sendall(b"x").unwrap_err();
            assert!(matches!(waiting.errno(), Some(32 | 104)), "{waiting}");
            assert_eq!(errno(left.sendall_later(b"x".into())), Some(32));
            assert_eq!(errno(left.send(b"x")), Some(32));

            // A timeout holds for what is queued, and its error keeps until the next call that sends.
            let (left, right) = socketpair().unwrap();
            left.settimeout(0.02).unwrap();
            left.sendall_later(vec![1; 10_000_000].into()).unwrap();
            ringsock::sleep(0.1).unwrap();
            assert!(!right.recv(10).unwrap().is_empty());
            assert_eq!(left.shutdown(SHUT_WR), Err(Error::Timeout));
            left.shutdown(SHUT_WR).unwrap();

            // Closing ends it.
            let (left, right) = socketpair().unwrap();
            left.sendall_later(vec![1; 10_000_000].into()).unwrap();
            let other = left.clone();
            let waiting = spawn(move || other.sendall(b"x"));
            yield_now();
            left.close().unwrap();
            assert!(waiting.join().unwrap().unwrap_err().is_closed());
            assert!(receive_all(&right).len() < 10_000_000);
            assert!(left.sendall_later(b"x".into()).unwrap_err().is_closed());
        });
    });
}

#[test]
fn a_queue_ends_with_its_runtime() {
    checked(|| {
        // Without grace the fiber that sends is unwound.
        for grace in [Duration::from_secs(1), Duration::ZERO] {
            let (left, right) = socketpair().unwrap();
            let kept = left.clone();
            let runtime = Runtime::builder().shutdown_grace(grace);
            runtime
                .run(move || {
                    left.sendall_later(vec![1; 10_000_000].into()).unwrap();
                    yield_now();
                })
                .unwrap();
            kept.settimeout(5).unwrap();
            assert_eq!(kept.sendall(b"x"), Err(Error::Shutdown));
            drop(kept);
            assert!(receive_all(&right).len() < 10_000_000);
        }
    });
}
