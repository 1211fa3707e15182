//! `relay`: what it moves, how it ends, and what it leaves behind. The peers are plain std sockets on threads of their own.
#![allow(unsafe_code)]

mod support;

use std::cell::Cell;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::*;
use ringsock::{
    JoinHandle, RelayEnd, RelayMode, RelayOptions, RelaySide, Relayed, Runtime, relay, sleep,
    socketpair, spawn, timeout,
};
use support::{Random, alone, checked, eventually, fork, seed, tcp_pair};

/// No read or write of a test's peer waits longer.
const PEER_LIMIT: Duration = Duration::from_secs(60);

const MODES: [RelayMode; 3] = [RelayMode::Auto, RelayMode::Copy, RelayMode::Splice];

/// A peer's end of a connection, as a std socket. (`UnixStream` reads and writes any stream socket.)
fn peer(socket: Socket) -> UnixStream {
    let fd = socket.as_fd().try_clone_to_owned().unwrap();
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PEER_LIMIT)).unwrap();
    stream.set_write_timeout(Some(PEER_LIMIT)).unwrap();
    stream
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    V4,
    V6,
    Unix,
}

/// A connection: the peer's end and the relay's. `None` without IPv6.
fn connection(kind: Kind) -> Option<(UnixStream, Socket)> {
    let (theirs, ours) = match kind {
        Kind::Unix => socketpair().unwrap(),
        Kind::V4 => tcp_pair(),
        Kind::V6 => {
            let listener = Socket::new(AF_INET6, SOCK_STREAM, 0).unwrap();
            if listener.bind(("::1", 0)).is_err() {
                println!("skipped: there is no IPv6");
                return None;
            }
            listener.listen(1).unwrap();
            let client = Socket::new(AF_INET6, SOCK_STREAM, 0).unwrap();
            client.connect(listener.getsockname().unwrap()).unwrap();
            let (server, _) = listener.accept().unwrap();
            (client, server)
        }
    };
    Some((peer(theirs), ours))
}

fn tcp() -> (UnixStream, Socket) {
    connection(Kind::V4).expect("IPv4 is there")
}

/// Closes with a reset.
fn reset(stream: UnixStream) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // SAFETY: the option's value is one `struct linger` that lives through the call.
    let set = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of::<libc::linger>() as libc::socklen_t,
        )
    };
    assert_eq!(set, 0);
}

fn failed(side: RelaySide, errno: i32) -> RelayEnd {
    RelayEnd::Failed {
        side,
        error: Error::from_errno(errno),
    }
}

/// Starts a relay in a fiber of the calling fiber's worker.
fn start(a: &Socket, b: &Socket, options: RelayOptions) -> JoinHandle<Relayed> {
    let (a, b) = (a.clone(), b.clone());
    ringsock::spawn(move || relay(&a, &b, &options).unwrap())
}

/// Runs a relay on a runtime of its own while `body` plays its peers.
fn with_relay<T: Send + 'static>(
    a: Socket,
    b: Socket,
    options: RelayOptions,
    body: impl FnOnce() -> T + Send + 'static,
) -> (Relayed, T) {
    let peers = thread::spawn(body);
    let relayed = ringsock::run(move || relay(&a, &b, &options).unwrap());
    (relayed, peers.join().unwrap())
}

/// Sends `size` random bytes in chunks of random sizes and ends its side.
fn send_random(mut stream: &UnixStream, seed: u64, size: usize) {
    let mut random = Random::new(seed);
    let mut sizes = random.fork();
    let mut left = size;
    while left > 0 {
        let most = 1 << sizes.below(18);
        let chunk = random.bytes(sizes.up_to(most).next_multiple_of(8).min(left));
        stream.write_all(&chunk).unwrap();
        left -= chunk.len();
    }
    stream.shutdown(Shutdown::Write).unwrap();
}

/// Reads to the end and compares with what `send_random` sends.
fn expect_random(mut stream: &UnixStream, seed: u64, size: usize) {
    let mut random = Random::new(seed);
    let _sizes = random.fork();
    let expected = random.bytes(size);
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    assert_eq!(got.len(), size, "the number of bytes");
    assert!(got == expected, "other bytes arrived");
}

#[test]
fn every_byte_arrives_both_ways_between_all_families_and_in_all_modes() {
    checked(|| {
        let mut random = Random::new(seed());
        let kinds = [Kind::V4, Kind::V6, Kind::Unix];
        for workers in [1, 2] {
            let runtime = Runtime::builder().workers(workers).build().unwrap();
            let mut relays = Vec::new();
            let mut peers = Vec::new();
            for mode in MODES {
                for (kind_a, kind_b) in kinds.iter().flat_map(|a| kinds.map(|b| (*a, b))) {
                    let Some((client, a)) = connection(kind_a) else {
                        continue;
                    };
                    let Some((server, b)) = connection(kind_b) else {
                        continue;
                    };
                    let in_flight = 4096 << random.below(6);
                    let sizes = [(); 2].map(|()| {
                        let most = 1 << random.below(22);
                        random.up_to(most)
                    });
                    let seeds = [random.next(), random.next()];
                    let options = RelayOptions {
                        mode,
                        in_flight,
                        idle_timeout: 60.into(),
                        ..Default::default()
                    };
                    relays.push((
                        sizes,
                        runtime
                            .handle()
                            .spawn(move || relay(&a, &b, &options).unwrap())
                            .unwrap(),
                    ));
                    peers.push(thread::spawn(move || {
                        thread::scope(|scope| {
                            scope.spawn(|| send_random(&client, seeds[0], sizes[0]));
                            scope.spawn(|| send_random(&server, seeds[1], sizes[1]));
                            scope.spawn(|| expect_random(&server, seeds[0], sizes[0]));
                            expect_random(&client, seeds[1], sizes[1]);
                        });
                    }));
                }
            }
            for peer in peers {
                peer.join().unwrap();
            }
            for (sizes, relay) in relays {
                let relayed = relay.join().unwrap();
                assert_eq!(relayed.ended, RelayEnd::Closed);
                assert_eq!(relayed.a_to_b, sizes[0] as u64);
                assert_eq!(relayed.b_to_a, sizes[1] as u64);
                assert_eq!(relayed.stranded, 0);
            }
        }
    });
}

#[test]
fn the_end_of_one_way_leaves_the_other_way_open() {
    checked(|| {
        for mode in MODES {
            for first in [RelaySide::A, RelaySide::B] {
                let (client, a) = tcp();
                let (server, b) = connection(Kind::Unix).unwrap();
                let options = RelayOptions {
                    mode,
                    ..Default::default()
                };
                let (relayed, ()) = with_relay(a, b, options, move || {
                    let (mut early, mut late) = match first {
                        RelaySide::A => (client, server),
                        RelaySide::B => (server, client),
                    };
                    early.write_all(b"question").unwrap();
                    early.shutdown(Shutdown::Write).unwrap();
                    let mut got = Vec::new();
                    late.read_to_end(&mut got).unwrap();
                    assert_eq!(got, b"question");
                    for _ in 0..3 {
                        late.write_all(b"answer").unwrap();
                        let mut got = [0; 6];
                        early.read_exact(&mut got).unwrap();
                        assert_eq!(&got, b"answer");
                    }
                    drop(late);
                    assert_eq!(early.read(&mut [0; 1]).unwrap(), 0);
                });
                let counts = (relayed.a_to_b, relayed.b_to_a);
                match first {
                    RelaySide::A => assert_eq!(counts, (8, 18)),
                    RelaySide::B => assert_eq!(counts, (18, 8)),
                }
                assert_eq!(relayed.ended, RelayEnd::Closed);
            }
        }
    });
}

/// One way: `count` chunks of `bytes`, each acknowledged by one byte.
fn chunks(client: &mut UnixStream, server: &mut UnixStream, bytes: usize, count: usize) {
    let chunk = vec![7; bytes];
    let mut got = vec![0; bytes];
    for _ in 0..count {
        let mut half = client.try_clone().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| half.write_all(&chunk).unwrap());
            server.read_exact(&mut got).unwrap();
        });
        server.write_all(b"k").unwrap();
        client.read_exact(&mut [0; 1]).unwrap();
    }
}

#[test]
fn each_way_takes_what_suits_what_comes_and_says_so() {
    checked(|| {
        for (mode, bytes, count) in [
            (RelayMode::Copy, 1 << 20, 4),
            (RelayMode::Splice, 1 << 20, 4),
            (RelayMode::Splice, 100, 20),
            (RelayMode::Auto, 8 << 20, 4),
            (RelayMode::Auto, 100, 50),
        ] {
            let (mut client, a) = tcp();
            let (mut server, b) = tcp();
            let options = RelayOptions {
                mode,
                ..Default::default()
            };
            let (relayed, ()) = with_relay(a, b, options, move || {
                chunks(&mut client, &mut server, bytes, count);
            });
            let total = (bytes * count) as u64;
            assert_eq!(relayed.a_to_b, total);
            match (mode, bytes) {
                (RelayMode::Copy, _) | (RelayMode::Auto, 100) => {
                    assert_eq!((relayed.a_to_b_spliced, relayed.b_to_a_spliced), (0, 0));
                }
                (RelayMode::Splice, _) => {
                    assert_eq!(relayed.a_to_b_spliced, total);
                    assert_eq!(relayed.b_to_a_spliced, relayed.b_to_a);
                }
                _ => {
                    let spliced = relayed.a_to_b_spliced;
                    assert!(spliced > total / 4, "{spliced} of {total}");
                    assert_eq!(relayed.b_to_a_spliced, 0, "its bytes came one by one");
                }
            }
        }
    });
}

#[test]
fn a_way_goes_back_to_copying_when_little_comes() {
    checked(|| {
        let (mut client, a) = tcp();
        let (mut server, b) = tcp();
        let small = 10_000;
        let (relayed, ()) = with_relay(a, b, RelayOptions::default(), move || {
            chunks(&mut client, &mut server, 8 << 20, 2);
            chunks(&mut client, &mut server, small, 400);
        });
        let copied = relayed.a_to_b - relayed.a_to_b_spliced;
        assert!(relayed.a_to_b_spliced > 0);
        // More than is copied until it changes over to the pipe.
        assert!(copied > 350 * small as u64, "only {copied} were copied");
    });
}

#[test]
fn sockets_of_any_mode_are_relayed_and_keep_their_mode() {
    checked(|| {
        let nonblocking = |socket: &Socket| {
            // SAFETY: no memory is passed.
            let flags = unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_GETFL) };
            flags & libc::O_NONBLOCK != 0
        };
        for (timeout_a, timeout_b) in [(None, Some(0.0)), (Some(0.001), None)] {
            let (client, a) = tcp();
            let (server, b) = connection(Kind::Unix).unwrap();
            a.settimeout(timeout_a).unwrap();
            b.settimeout(timeout_b).unwrap();
            let options = RelayOptions {
                mode: RelayMode::Splice,
                ..Default::default()
            };
            let (relayed, ()) = with_relay(a.clone(), b.clone(), options, move || {
                // Longer than any of the timeouts.
                thread::sleep(Duration::from_millis(50));
                thread::scope(|scope| {
                    scope.spawn(|| send_random(&client, 1, 1 << 20));
                    expect_random(&server, 1, 1 << 20);
                });
            });
            assert_eq!(relayed.ended, RelayEnd::Closed);
            assert_eq!(relayed.a_to_b_spliced, 1 << 20);
            assert_eq!((a.gettimeout(), b.gettimeout()), (timeout_a, timeout_b));
            assert_eq!(nonblocking(&a), timeout_a.is_some());
            assert_eq!(nonblocking(&b), timeout_b.is_some());
        }
    });
}

#[test]
fn a_reset_is_told_with_its_side() {
    checked(|| {
        for mode in MODES {
            for side in [RelaySide::A, RelaySide::B] {
                let (client, a) = tcp();
                let (server, b) = tcp();
                let options = RelayOptions {
                    mode,
                    ..Default::default()
                };
                let (relayed, _rest) = with_relay(a, b, options, move || {
                    let (mut dying, mut other) = match side {
                        RelaySide::A => (client, server),
                        RelaySide::B => (server, client),
                    };
                    dying.write_all(b"last words").unwrap();
                    other.read_exact(&mut [0; 10]).unwrap();
                    reset(dying);
                    other
                });
                assert_eq!(relayed.ended, failed(side, libc::ECONNRESET), "{mode:?}");
                assert_eq!(relayed.a_to_b + relayed.b_to_a, 10);
            }
        }
    });
}

/// Sends until there is no room for half a second: how much was taken.
fn send_until_stalled(stream: &mut UnixStream) -> usize {
    stream
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let chunk = vec![1; 1 << 16];
    let mut sent = 0;
    loop {
        match stream.write(&chunk) {
            Ok(n) => sent += n,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return sent,
            // The relay has ended meanwhile.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return sent,
            Err(error) => panic!("{error}"),
        }
        assert!(sent < 1 << 30, "nobody holds back the sender");
    }
}

#[test]
fn a_receiver_that_dies_in_mid_transfer_ends_the_relay() {
    checked(|| {
        for mode in MODES {
            let (mut client, a) = tcp();
            let (server, b) = tcp();
            let options = RelayOptions {
                mode,
                ..Default::default()
            };
            let (relayed, sent) = with_relay(a, b, options, move || {
                let sent = send_until_stalled(&mut client);
                reset(server);
                // The relay's end closes nothing; it is its caller who does.
                (sent, client)
            });
            let RelayEnd::Failed { side, error } = &relayed.ended else {
                panic!("{relayed:?}");
            };
            assert_eq!(*side, RelaySide::B);
            assert!(
                matches!(error.errno(), Some(libc::ECONNRESET | libc::EPIPE)),
                "{error}"
            );
            assert!(relayed.a_to_b + relayed.stranded <= sent.0 as u64);
            assert!(relayed.stranded <= 1 << 16, "{relayed:?}");
        }
    });
}

#[test]
fn what_a_side_sent_before_it_broke_is_passed_on() {
    checked(|| {
        for mode in MODES {
            let (mut client, a) = tcp();
            let (mut server, b) = tcp();
            let options = RelayOptions {
                mode,
                ..Default::default()
            };
            // It fits into the relay's receive buffer: the reset destroys what is still in the server's.
            const ANSWER: usize = 50_000;
            // An answer before the question is read, and an end: the unread question makes it a reset.
            client.write_all(&[1; 50_000]).unwrap();
            server.write_all(&[2; ANSWER]).unwrap();
            // Open to the end: closing it with unread bytes would be a reset, which destroys what is on its way.
            let _open = a.clone();
            let (relayed, got) = with_relay(a, b, options, move || {
                eventually("the question arrives", || {
                    let mut got = [0; 1];
                    // SAFETY: one byte is written to the array at most.
                    let peeked = unsafe {
                        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
                        libc::recv(server.as_raw_fd(), got.as_mut_ptr().cast(), 1, flags)
                    };
                    peeked == 1
                });
                drop(server);
                // More of the question finds nobody.
                client.write_all(b"more").unwrap();
                let mut got = vec![0; ANSWER];
                client.read_exact(&mut got).unwrap();
                got
            });
            assert!(got.iter().all(|byte| *byte == 2), "{mode:?}: {relayed:?}");
            assert_eq!(relayed.b_to_a, ANSWER as u64);
            assert!(
                matches!(
                    &relayed.ended,
                    RelayEnd::Failed {
                        side: RelaySide::B,
                        ..
                    }
                ),
                "{relayed:?}"
            );
        }
    });
}

#[test]
fn a_side_that_reads_no_more_is_still_heard_to_the_end() {
    checked(|| {
        for mode in MODES {
            let (mut client, a) = connection(Kind::Unix).unwrap();
            let (mut server, b) = connection(Kind::Unix).unwrap();
            let options = RelayOptions {
                mode,
                ..Default::default()
            };
            // More than the client's socket holds, so a part is still the relay's, or at the server, when the relay hears EPIPE.
            const ANSWER: usize = 400_000;
            let (relayed, got) = with_relay(a, b, options, move || {
                server.write_all(&[2; ANSWER]).unwrap();
                server.shutdown(Shutdown::Read).unwrap();
                client.write_all(b"for nobody").unwrap();
                thread::sleep(Duration::from_millis(100));
                let mut got = Vec::new();
                let _ = client.read_to_end(&mut got);
                drop(server);
                got.len()
            });
            assert_eq!(got, ANSWER, "{mode:?}: {relayed:?}");
            assert_eq!(relayed.b_to_a, ANSWER as u64);
            assert_eq!(relayed.ended, failed(RelaySide::B, libc::EPIPE));
            assert_eq!(relayed.stranded, 10);
        }
    });
}

/// How long a relay of two silent connections takes to end, and how it does.
fn silent(options: RelayOptions) -> (Relayed, Duration) {
    let (_client, a) = tcp();
    let (_server, b) = tcp();
    let start = Instant::now();
    let relayed = ringsock::run(move || relay(&a, &b, &options).unwrap());
    (relayed, start.elapsed())
}

#[test]
fn the_idle_timeout_ends_a_silent_relay() {
    checked(|| {
        let options = RelayOptions {
            idle_timeout: 0.2.into(),
            ..Default::default()
        };
        let (relayed, took) = silent(options);
        assert_eq!(relayed.ended, RelayEnd::IdleTimeout);
        assert!(took >= Duration::from_millis(199), "{took:?}");
        assert!(took < Duration::from_millis(225 + 600), "{took:?}");
    });
}

#[test]
fn the_deadline_ends_a_relay_whatever_moves() {
    checked(|| {
        let options = RelayOptions {
            deadline: 0.2.into(),
            ..Default::default()
        };
        let (relayed, took) = silent(options);
        assert_eq!(relayed.ended, RelayEnd::Deadline);
        assert!(took >= Duration::from_millis(199), "{took:?}");
        assert!(took < Duration::from_millis(200 + 600), "{took:?}");

        let (mut client, a) = tcp();
        let (mut server, b) = tcp();
        let start = Instant::now();
        let (relayed, _streams) = with_relay(a, b, options, move || {
            let mut sink = server.try_clone().unwrap();
            server
                .set_write_timeout(Some(Duration::from_millis(10)))
                .unwrap();
            client
                .set_write_timeout(Some(Duration::from_millis(10)))
                .unwrap();
            sink.set_read_timeout(Some(Duration::from_millis(10)))
                .unwrap();
            while start.elapsed() < Duration::from_millis(500) {
                let _ = client.write(&[1; 100_000]);
                let _ = sink.read(&mut [0; 200_000]);
                let _ = server.write(&[0; 1]);
            }
            (client, server)
        });
        assert_eq!(relayed.ended, RelayEnd::Deadline);
        assert!(relayed.a_to_b > 0);
    });
}

#[test]
fn the_deadline_of_an_enclosing_timeout_counts() {
    checked(|| {
        let (_client, a) = tcp();
        let (_server, b) = tcp();
        let start = Instant::now();
        let on_thread = timeout(0.1, || relay(&a, &b, &RelayOptions::default())).unwrap();
        assert_eq!(on_thread.ended, RelayEnd::Deadline);
        let in_fiber = ringsock::run(move || {
            timeout(0.1, || {
                relay(
                    &a,
                    &b,
                    &RelayOptions {
                        deadline: 60.into(),
                        ..Default::default()
                    },
                )
            })
        });
        assert_eq!(in_fiber.unwrap().ended, RelayEnd::Deadline);
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(199), "{took:?}");
        assert!(took < Duration::from_millis(200 + 1000), "{took:?}");
    });
}

#[test]
fn a_relay_on_which_something_moves_is_not_idle() {
    checked(|| {
        let (mut client, a) = tcp();
        let (mut server, b) = tcp();
        let options = RelayOptions {
            idle_timeout: 1.into(),
            ..Default::default()
        };
        let start = Instant::now();
        let (relayed, ()) = with_relay(a, b, options, move || {
            // One way only, for longer than the timeout.
            for n in 0..15 {
                thread::sleep(Duration::from_millis(100));
                server.write_all(b"x").unwrap();
                if client.read_exact(&mut [0; 1]).is_err() {
                    println!("ended at {n}, after {:?}", start.elapsed());
                    break;
                }
            }
        });
        assert_eq!(
            relayed.ended,
            RelayEnd::Closed,
            "after {:?}",
            start.elapsed()
        );
        assert_eq!(relayed.b_to_a, 15);
    });
}

#[test]
fn a_stalled_relay_is_idle_and_says_what_was_lost() {
    checked(|| {
        for mode in MODES {
            let (mut client, a) = tcp();
            let (server, b) = tcp();
            let options = RelayOptions {
                mode,
                idle_timeout: 1.into(),
                ..Default::default()
            };
            let (relayed, mut server) = with_relay(a, b, options, move || {
                send_until_stalled(&mut client);
                server
            });
            assert_eq!(relayed.ended, RelayEnd::IdleTimeout);
            assert!((1..=1 << 16).contains(&relayed.stranded), "{relayed:?}");
            // What was counted as moved is there.
            let mut got = Vec::new();
            server.read_to_end(&mut got).unwrap();
            assert_eq!(got.len() as u64, relayed.a_to_b, "{mode:?}");
        }
    });
}

#[test]
fn limits_of_several_relays_are_kept_side_by_side() {
    checked(|| {
        ringsock::run(|| {
            let mut streams = Vec::new();
            let mut relays = Vec::new();
            let start = Instant::now();
            // The later they come, the sooner they end.
            for index in (0..10u64).rev() {
                let (client, a) = tcp();
                let (server, b) = tcp();
                streams.push((client, server));
                let ms = 100 + index * 100;
                let limit = Duration::from_millis(ms).into();
                let options = match index % 2 {
                    0 => RelayOptions {
                        idle_timeout: limit,
                        ..Default::default()
                    },
                    _ => RelayOptions {
                        deadline: limit,
                        ..Default::default()
                    },
                };
                let took = start_timed(a, b, options, start);
                relays.push((ms, took));
            }
            for (ms, relay) in relays {
                let (relayed, took) = relay.join().unwrap();
                let expected = match (ms / 100) % 2 {
                    1 => RelayEnd::IdleTimeout,
                    _ => RelayEnd::Deadline,
                };
                assert_eq!(relayed.ended, expected);
                let took = took.as_millis() as u64;
                assert!(
                    (ms - 1..ms + ms / 8 + 600).contains(&took),
                    "{took} ms for {ms} ms"
                );
            }
            assert_eq!(ringsock::Handle::current().unwrap().workers(), 1);
        });
    });
}

fn start_timed(
    a: Socket,
    b: Socket,
    options: RelayOptions,
    start: Instant,
) -> JoinHandle<(Relayed, Duration)> {
    ringsock::spawn(move || {
        let relayed = relay(&a, &b, &options).unwrap();
        (relayed, start.elapsed())
    })
}

/// Fibers of this worker that live now, the caller among them.
fn fibers() -> u64 {
    // The counters are published when the worker waits.
    sleep(0.01).unwrap();
    ringsock::Handle::current().unwrap().metrics()[0].fibers_live
}

#[test]
fn cancelling_ends_a_relay_and_both_of_its_fibers() {
    checked(|| {
        ringsock::run(|| {
            for mode in MODES {
                for busy in [false, true] {
                    let (mut client, a) = tcp();
                    let (server, b) = tcp();
                    let options = RelayOptions {
                        mode,
                        idle_timeout: 60.into(),
                        ..Default::default()
                    };
                    let relay = start(&a, &b, options);
                    drop((a, b));
                    if busy {
                        // Stalled with bytes on their way.
                        let stalled = ringsock::spawn_blocking(move || {
                            send_until_stalled(&mut client);
                            client
                        });
                        client = stalled.unwrap().join().unwrap();
                    } else {
                        sleep(0.01).unwrap();
                    }
                    relay.cancel();
                    let relayed = relay.join().unwrap();
                    assert_eq!(relayed.ended, RelayEnd::Cancelled);
                    assert_eq!(relayed.stranded > 0, busy, "{relayed:?}");
                    assert_eq!(fibers(), 1);
                    // Nobody holds the sockets any more: the peers see it.
                    let end = ringsock::spawn_blocking(move || {
                        drop(server);
                        let _ = client.read(&mut [0; 1]);
                    });
                    end.unwrap().join().unwrap();
                }
            }
        });
    });
}

#[test]
fn a_busy_relay_can_be_cancelled_and_does_not_hold_up_others() {
    checked(|| {
        let stop = Arc::new(AtomicBool::new(false));
        let mut pumps = Vec::new();
        let arrived = Arc::new(AtomicU64::new(0));
        let mut pump = |mut from: UnixStream, mut to: UnixStream| {
            let stopped = stop.clone();
            let arrived = arrived.clone();
            pumps.push(thread::spawn(move || {
                let chunk = vec![1; 1 << 18];
                while !stopped.load(Ordering::Relaxed) && from.write_all(&chunk).is_ok() {}
            }));
            pumps.push(thread::spawn(move || {
                let mut chunk = vec![0; 1 << 18];
                while let Ok(n) = to.read(&mut chunk)
                    && n > 0
                {
                    arrived.fetch_add(n as u64, Ordering::Relaxed);
                }
            }));
        };
        for mode in MODES {
            let arrived = arrived.clone();
            arrived.store(0, Ordering::Relaxed);
            // AF_UNIX: the peers are faster than the relay, so it always finds something.
            let (client, a) = connection(Kind::Unix).unwrap();
            let (server, b) = connection(Kind::Unix).unwrap();
            pump(client, server);
            let moved = ringsock::run(move || {
                let options = RelayOptions {
                    mode,
                    ..Default::default()
                };
                let relay = start(&a, &b, options);
                drop((a, b));
                let (left, right) = socketpair().unwrap();
                let echo = ringsock::spawn(move || {
                    while let Ok(bytes) = right.recv(16)
                        && !bytes.is_empty()
                    {
                        right.sendall(&bytes).unwrap();
                    }
                });
                let before = Instant::now();
                for _ in 0..50 {
                    left.sendall(b"ping").unwrap();
                    assert_eq!(left.recv(16).unwrap(), b"ping");
                }
                let took = before.elapsed();
                assert!(
                    took < Duration::from_secs(20),
                    "50 round trips took {took:?}"
                );
                drop(left);
                echo.join().unwrap();
                // On a busy machine the peers take their time.
                let give_up = Instant::now() + PEER_LIMIT;
                while arrived.load(Ordering::Relaxed) <= 1 << 20 {
                    assert!(Instant::now() < give_up, "too little arrives");
                    sleep(0.01).unwrap();
                }
                relay.cancel();
                let relayed = relay.join().unwrap();
                assert_eq!(relayed.ended, RelayEnd::Cancelled);
                relayed.a_to_b
            });
            assert!(moved > 1 << 20, "{moved}");
        }
        stop.store(true, Ordering::Relaxed);
        for pump in pumps {
            pump.join().unwrap();
        }
    });
}

#[test]
fn a_relay_that_need_not_wait_lets_others_have_their_turn() {
    checked(|| {
        const BYTES: usize = 100_000;
        for mode in MODES {
            ringsock::run(move || {
                let (client, a) = socketpair().unwrap();
                let (b, server) = socketpair().unwrap();
                for sender in [&client, &b] {
                    sender.setsockopt(SOL_SOCKET, SO_SNDBUF, 1 << 20).unwrap();
                }
                client.sendall(&[3; BYTES]).unwrap();
                let options = RelayOptions {
                    mode,
                    in_flight: 4096,
                    ..Default::default()
                };
                let relay = start(&a, &b, options);
                // What has arrived each time that this fiber has its turn.
                let mut seen = Vec::new();
                while seen.last() != Some(&BYTES) {
                    ringsock::yield_now();
                    let peeked = server.recv_with(BYTES, MSG_PEEK | MSG_DONTWAIT);
                    seen.push(peeked.map_or(0, |bytes| bytes.len()));
                    assert!(seen.len() < 100_000, "not all arrives");
                }
                let between = |bytes: &&usize| (1..BYTES).contains(*bytes);
                let turns = seen.iter().filter(between).count();
                assert!(turns > 0, "{mode:?}: it moved all in one go");
                relay.cancel();
                assert_eq!(relay.join().unwrap().a_to_b, BYTES as u64);
            });
        }
    });
}

#[test]
fn the_end_of_the_runtime_ends_its_relays() {
    checked(|| {
        for mode in MODES {
            let (mut client, a) = tcp();
            let (server, b) = tcp();
            let (told, hear) = std::sync::mpsc::channel();
            let options = RelayOptions {
                mode,
                idle_timeout: 60.into(),
                ..Default::default()
            };
            let sent = thread::spawn(move || (send_until_stalled(&mut client), client));
            ringsock::run(move || {
                let (a, b) = (a, b);
                ringsock::spawn(move || {
                    told.send(relay(&a, &b, &options).unwrap()).unwrap();
                });
                sleep(0.1).unwrap();
            });
            let relayed = hear.recv().unwrap();
            assert_eq!(relayed.ended, RelayEnd::Shutdown);
            let mut got = Vec::new();
            let mut server = server;
            server.read_to_end(&mut got).unwrap();
            assert_eq!(got.len() as u64, relayed.a_to_b, "{mode:?}");
            // The sender's connection was closed with unread bytes: its send fails, or it had stalled before.
            let _ = sent.join();
        }
    });
}

#[test]
fn closing_a_socket_ends_its_relay() {
    checked(|| {
        ringsock::run(|| {
            for side in [RelaySide::A, RelaySide::B] {
                let (_client, a) = tcp();
                let (_server, b) = tcp();
                let relay = start(&a, &b, RelayOptions::default());
                sleep(0.01).unwrap();
                match side {
                    RelaySide::A => a.close().unwrap(),
                    RelaySide::B => b.close().unwrap(),
                }
                let relayed = relay.join().unwrap();
                assert_eq!(relayed.ended, failed(side, libc::EBADF));
                assert_eq!(fibers(), 1);
            }
        });
    });
}

#[test]
fn it_works_on_a_plain_thread() {
    checked(|| {
        for mode in MODES {
            let (client, a) = tcp();
            let (server, b) = tcp();
            let options = RelayOptions {
                mode,
                ..Default::default()
            };
            let peers = thread::spawn(move || {
                thread::scope(|scope| {
                    scope.spawn(|| send_random(&client, 3, 1 << 20));
                    scope.spawn(|| send_random(&server, 4, 1 << 20));
                    scope.spawn(|| expect_random(&client, 4, 1 << 20));
                    expect_random(&server, 3, 1 << 20);
                });
            });
            let relayed = relay(&a, &b, &options).unwrap();
            peers.join().unwrap();
            assert_eq!(relayed.ended, RelayEnd::Closed);
            assert_eq!((relayed.a_to_b, relayed.b_to_a), (1 << 20, 1 << 20));
        }
        // And is ended there by a close in another thread.
        let (_client, a) = tcp();
        let (_server, b) = tcp();
        let theirs = b.clone();
        let closer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            theirs.close().unwrap();
        });
        let relayed = relay(&a, &b, &RelayOptions::default()).unwrap();
        assert_eq!(relayed.ended, failed(RelaySide::B, libc::EBADF));
        closer.join().unwrap();
    });
}

#[test]
fn a_forked_child_relays_with_vessels_of_its_own() {
    alone("a_forked_child_relays_with_vessels_of_its_own", || {
        ringsock::run(|| {
            // The parent has pipes and buffers, and a relay that keeps its times.
            let (mut client, a) = tcp();
            let (mut server, b) = tcp();
            let options = RelayOptions {
                mode: RelayMode::Splice,
                idle_timeout: 60.into(),
                ..Default::default()
            };
            let parents = start(&a, &b, options);
            drop((a, b));
            client.write_all(b"before").unwrap();
            sleep(0.05).unwrap();
            server.read_exact(&mut [0; 6]).unwrap();
            let code = fork(move || {
                let (mut client, a) = tcp();
                let (mut server, b) = tcp();
                let peers = thread::spawn(move || {
                    client.write_all(b"in the child").unwrap();
                    let mut got = [0; 12];
                    server.read_exact(&mut got).unwrap();
                    got
                });
                let relayed = relay(&a, &b, &options).unwrap();
                let right = peers.join().unwrap() == *b"in the child"
                    && relayed.ended == RelayEnd::Closed
                    && relayed.a_to_b_spliced == 12;
                // The times of the child's relays are kept, too.
                let (_client, a) = tcp();
                let (_server, b) = tcp();
                let silent = RelayOptions {
                    idle_timeout: 0.1.into(),
                    ..Default::default()
                };
                let timed = relay(&a, &b, &silent).unwrap().ended == RelayEnd::IdleTimeout;
                i32::from(!(right && timed))
            });
            assert_eq!(code, 0);
            client.write_all(b"after").unwrap();
            sleep(0.05).unwrap();
            let mut got = [0; 5];
            server.read_exact(&mut got).unwrap();
            assert_eq!(&got, b"after");
            drop((client, server));
            assert_eq!(parents.join().unwrap().ended, RelayEnd::Closed);
        });
    });
}

#[test]
fn what_cannot_be_relayed_is_refused() {
    checked(|| {
        let (a, b) = socketpair().unwrap();
        let udp = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
        let default = RelayOptions::default();
        let refused = |result: ringsock::Result<Relayed>| {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::Value(_)), "{error:?}");
        };
        refused(relay(&a, &udp, &default));
        refused(relay(&udp, &b, &default));
        refused(relay(&a, &a.clone(), &default));
        for in_flight in [0, 4095, (1 << 20) + 1] {
            refused(relay(
                &a,
                &b,
                &RelayOptions {
                    in_flight,
                    ..default
                },
            ));
        }
        for limit in [0.0, -1.0, f64::NAN] {
            refused(relay(
                &a,
                &b,
                &RelayOptions {
                    idle_timeout: limit.into(),
                    ..default
                },
            ));
            refused(relay(
                &a,
                &b,
                &RelayOptions {
                    deadline: limit.into(),
                    ..default
                },
            ));
        }
        // Not connected: the kernel says so.
        let lonely = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
        let relayed = relay(&lonely, &b, &default).unwrap();
        assert_eq!(relayed.ended, failed(RelaySide::A, libc::ENOTCONN));
    });
}

#[test]
fn without_room_for_its_fibers_it_is_refused() {
    checked(|| {
        for fibers in [1, 2] {
            let options = RelayOptions {
                idle_timeout: 60.into(),
                ..Default::default()
            };
            let runtime = Runtime::builder().max_fibers(fibers);
            let result = runtime.run(move || {
                let (a, b) = socketpair().unwrap();
                relay(&a, &b, &options)
            });
            assert_eq!(result.unwrap().unwrap_err().errno(), Some(libc::EAGAIN));
        }
    });
}

#[test]
fn a_destructor_of_a_panicking_fiber_does_not_wait_for_a_relay() {
    checked(|| {
        struct RelayWhenDropped(Rc<Cell<Option<i32>>>);
        impl Drop for RelayWhenDropped {
            fn drop(&mut self) {
                let (a, _client) = socketpair().unwrap();
                let (b, _server) = socketpair().unwrap();
                let result = relay(&a, &b, &RelayOptions::default());
                self.0.set(result.unwrap_err().errno());
            }
        }
        ringsock::run(|| {
            let errno = Rc::new(Cell::new(None));
            let theirs = errno.clone();
            let fiber = ringsock::spawn(move || {
                let _relay = RelayWhenDropped(theirs);
                panic!("on purpose");
            });
            assert!(fiber.join().is_err());
            assert_eq!(errno.get(), Some(libc::EAGAIN));
        });
    });
}

#[test]
fn more_relays_stall_than_there_are_pipes_and_all_go_on() {
    checked(|| {
        const RELAYS: usize = 150;
        let options = RelayOptions {
            mode: RelayMode::Splice,
            in_flight: 4096,
            ..Default::default()
        };
        let mut peers = Vec::new();
        let mut ours = Vec::new();
        for _ in 0..RELAYS {
            let (client, a) = connection(Kind::Unix).unwrap();
            let (server, b) = connection(Kind::Unix).unwrap();
            peers.push((client, server));
            ours.push((a, b));
        }
        let player = thread::spawn(move || {
            let mut all = Vec::new();
            for (client, server) in peers {
                client.set_nonblocking(true).unwrap();
                all.push((client, server, 0));
            }
            // Until all are stalled.
            for _ in 0..20 {
                for (client, _, sent) in &mut all {
                    while let Ok(n) = client.write(&[5; 8192]) {
                        *sent += n;
                    }
                }
                thread::sleep(Duration::from_millis(10));
            }
            for (client, mut server, sent) in all {
                drop(client);
                let mut got = Vec::new();
                server.read_to_end(&mut got).unwrap();
                assert_eq!(got.len(), sent);
            }
        });
        ringsock::run(move || {
            let before = support::descriptors();
            let relays: Vec<_> = ours.iter().map(|(a, b)| start(a, b, options)).collect();
            sleep(0.15).unwrap();
            let pipes = (support::descriptors() - before) / 2;
            assert!((1..=64).contains(&pipes), "{pipes} pipes");
            drop(ours);
            let mut spliced = 0;
            for relay in relays {
                let relayed = relay.join().unwrap();
                assert_eq!(relayed.ended, RelayEnd::Closed);
                spliced += u64::from(relayed.a_to_b_spliced > 0);
            }
            assert!(spliced > 0);
        });
        player.join().unwrap();
    });
}

#[test]
fn what_is_stranded_in_a_pipe_is_in_nobody_elses_way() {
    checked(|| {
        ringsock::run(|| {
            let options = RelayOptions {
                mode: RelayMode::Splice,
                ..Default::default()
            };
            let (keeper, a) = socketpair().unwrap();
            let (b, _kept) = socketpair().unwrap();
            let keeping = start(&a, &b, options);
            // More often than there may be pipes: those that were lost are not counted for ever.
            for _ in 0..70 {
                let (client, a) = socketpair().unwrap();
                let (b, server) = socketpair().unwrap();
                let relay = start(&a, &b, options);
                client.settimeout(0).unwrap();
                // The relay has its turn while this fiber sleeps: it is stalled when there is still no room afterwards.
                let mut full = 0;
                while full < 3 {
                    match client.send(&[1; 1 << 16]) {
                        Ok(_) => full = 0,
                        Err(_) => full += 1,
                    }
                    sleep(0.001).unwrap();
                }
                relay.cancel();
                assert!(relay.join().unwrap().stranded > 0);
                drop((a, b, client, server));

                let (client, a) = socketpair().unwrap();
                let (b, server) = socketpair().unwrap();
                let relay = start(&a, &b, options);
                client.sendall(b"mine").unwrap();
                drop(client);
                server.settimeout(30).unwrap();
                assert_eq!(server.recv(1 << 16).unwrap(), b"mine");
                drop((a, b, server));
                assert_eq!(relay.join().unwrap().a_to_b_spliced, 4);
            }
            keeper.close().unwrap();
            keeping.cancel();
            keeping.join().unwrap();
        });
    });
}

/// VmRSS of this process in KiB.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap()
}

#[test]
fn a_thousand_stalled_readers_hold_no_more_than_their_share_and_no_processor() {
    alone(
        "a_thousand_stalled_readers_hold_no_more_than_their_share_and_no_processor",
        || {
            const RELAYS: u64 = 1000;
            const IN_FLIGHT: usize = 16 << 10;
            ringsock::raise_descriptor_limit();
            ringsock::run(|| {
                let options = RelayOptions {
                    mode: RelayMode::Copy,
                    in_flight: IN_FLIGHT,
                    idle_timeout: 600.into(),
                    ..Default::default()
                };
                let mut ends = Vec::new();
                let mut relays = Vec::new();
                for _ in 0..RELAYS {
                    let (client, a) = socketpair().unwrap();
                    let (b, server) = socketpair().unwrap();
                    relays.push(start(&a, &b, options));
                    client.settimeout(0).unwrap();
                    ends.push((client, server));
                }
                sleep(0.1).unwrap();
                let before_kib = resident_kib();
                let mut last = u64::MAX;
                let mut sent = 0;
                while sent != last {
                    last = sent;
                    for (client, _) in &ends {
                        while let Ok(n) = client.send(&[9; 4096]) {
                            sent += n as u64;
                        }
                    }
                    sleep(0.02).unwrap();
                }
                let grown_kib = resident_kib().saturating_sub(before_kib);
                // Each holds one buffer at the most; the allocator and the fibers' stacks take a little more.
                let share_kib = RELAYS * (IN_FLIGHT as u64 >> 10);
                println!("{grown_kib} KiB for {RELAYS} stalled relays of {share_kib} KiB");
                assert!(
                    grown_kib < share_kib * 5 / 4 + 12 * RELAYS,
                    "{grown_kib} KiB"
                );
                assert!(
                    grown_kib > share_kib / 2,
                    "they are not stalled: {grown_kib} KiB"
                );
                // Stalled, they do nothing.
                let metrics = || ringsock::Handle::current().unwrap().metrics()[0];
                let before = metrics();
                sleep(0.5).unwrap();
                let after = metrics();
                let operations = after.operations - before.operations;
                assert!(operations < 50, "{operations} operations for nothing");
                for relay in &relays {
                    relay.cancel();
                }
                for relay in relays {
                    assert_eq!(relay.join().unwrap().ended, RelayEnd::Cancelled);
                }
                assert_eq!(fibers(), 1);
            });
        },
    );
}

#[test]
fn an_idle_relay_holds_no_pipe_and_no_buffer() {
    checked(|| {
        ringsock::run(|| {
            let options = RelayOptions {
                mode: RelayMode::Splice,
                ..Default::default()
            };
            let before = support::descriptors();
            let mut ends = Vec::new();
            let mut relays = Vec::new();
            for _ in 0..20 {
                let (client, a) = socketpair().unwrap();
                let (b, server) = socketpair().unwrap();
                relays.push(start(&a, &b, options));
                ends.push((client, server));
            }
            for (client, server) in &ends {
                client.sendall(b"hello").unwrap();
                assert_eq!(server.recv(16).unwrap(), b"hello");
            }
            // One after the other they had the same pipe.
            assert_eq!(support::descriptors() - before, 20 * 4 + 2);
            drop(ends);
            for relay in relays {
                let relayed = relay.join().unwrap();
                assert_eq!(
                    (relayed.ended, relayed.a_to_b_spliced),
                    (RelayEnd::Closed, 5)
                );
            }
            assert_eq!(support::descriptors(), before);
            assert_eq!(fibers(), 1);
        });
    });
}

#[test]
fn a_dead_receiver_raises_no_sigpipe() {
    alone("a_dead_receiver_raises_no_sigpipe", || {
        // SAFETY: the default action, for this process only.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        for mode in MODES {
            let (mut client, a) = connection(Kind::Unix).unwrap();
            let (server, b) = connection(Kind::Unix).unwrap();
            let options = RelayOptions {
                mode,
                ..Default::default()
            };
            client.write_all(b"for nobody").unwrap();
            // Its receiving side only: the relay's send fails with EPIPE.
            server.shutdown(Shutdown::Read).unwrap();
            let relayed = relay(&a, &b, &options).unwrap();
            assert_eq!(relayed.ended, failed(RelaySide::B, libc::EPIPE), "{mode:?}");
            assert_eq!(relayed.stranded, 10);
        }
    });
}

#[test]
fn a_socket_of_another_owner_is_relayed() {
    checked(|| {
        // From a descriptor, blocking, used before by a thread's ring.
        let (client, a) = tcp();
        let (server, b) = tcp();
        // SAFETY: a descriptor that dup just made.
        let copy = unsafe { OwnedFd::from_raw_fd(libc::dup(a.as_raw_fd())) };
        let a2 = Socket::from_fd(copy).unwrap();
        drop(a);
        let (relayed, ()) = with_relay(a2, b, RelayOptions::default(), move || {
            send_random(&client, 9, 100_000);
            expect_random(&server, 9, 100_000);
        });
        assert_eq!(relayed.a_to_b, 100_000);
    });
}

/// Time stamps of what is sent come by the socket's error queue, which recv(2) does not empty: poll(2) says POLLERR for as long as
/// there is one.
#[test]
fn what_lies_in_an_error_queue_keeps_no_relay_busy() {
    alone("what_lies_in_an_error_queue_keeps_no_relay_busy", || {
        ringsock::run(|| {
            for mode in MODES {
                let (client, a) = tcp();
                let (server, b) = tcp();
                let software = libc::SOF_TIMESTAMPING_TX_SOFTWARE | libc::SOF_TIMESTAMPING_SOFTWARE;
                for socket in [&a, &b] {
                    socket
                        .setsockopt(SOL_SOCKET, libc::SO_TIMESTAMPING, software as i32)
                        .unwrap();
                }
                let options = RelayOptions {
                    mode,
                    ..Default::default()
                };
                let relay = start(&a, &b, options);
                let peers = thread::spawn(move || {
                    for n in 0..200 {
                        for (mut from, mut to) in [(&client, &server), (&server, &client)] {
                            from.write_all(&[n; 100]).unwrap();
                            let mut got = [0; 100];
                            to.read_exact(&mut got).unwrap();
                            assert_eq!(got, [n; 100]);
                        }
                    }
                    (client, server)
                });
                while !peers.is_finished() {
                    sleep(0.01).unwrap();
                }
                let (client, server) = peers.join().unwrap();
                let has_reports = |socket: &Socket| {
                    let mut poll = libc::pollfd {
                        fd: socket.as_raw_fd(),
                        events: 0,
                        revents: 0,
                    };
                    // SAFETY: one pollfd, which lives through the call.
                    assert!(unsafe { libc::poll(&mut poll, 1, 0) } >= 0);
                    poll.revents & libc::POLLERR != 0
                };
                let operations = || ringsock::Handle::current().unwrap().metrics()[0].operations;
                sleep(0.05).unwrap();
                let before = operations();
                sleep(0.3).unwrap();
                let idle = operations() - before;
                assert!(idle < 20, "{idle} operations for nothing, {mode:?}");
                assert!(!has_reports(&a) && !has_reports(&b), "{mode:?}");
                // And it goes on as before, with what is sent while one way has no room too.
                let sender = thread::spawn(move || {
                    thread::scope(|scope| {
                        scope.spawn(|| send_random(&client, 5, 4 << 20));
                        scope.spawn(|| send_random(&server, 6, 4 << 20));
                        scope.spawn(|| expect_random(&client, 6, 4 << 20));
                        expect_random(&server, 5, 4 << 20);
                    });
                });
                assert_eq!(relay.join().unwrap().ended, RelayEnd::Closed);
                while !sender.is_finished() {
                    sleep(0.01).unwrap();
                }
                sender.join().unwrap();
            }
        });
    });
}

/// Sends these bytes before urgent data, the urgent byte, and those behind it.
fn send_urgently(mut stream: &UnixStream, before: &[u8], behind: &[u8]) {
    stream.write_all(before).unwrap();
    let urgent = b"!";
    // SAFETY: one byte, which lives through the call.
    let sent = unsafe {
        libc::send(
            stream.as_raw_fd(),
            urgent.as_ptr().cast(),
            urgent.len(),
            libc::MSG_OOB | libc::MSG_NOSIGNAL,
        )
    };
    assert_eq!(sent, 1);
    stream.write_all(behind).unwrap();
}

/// splice(2) stops at the mark of urgent data for good, and takes it for the end once the stream has ended.
#[test]
fn what_is_behind_urgent_data_arrives_in_all_modes() {
    checked(|| {
        for mode in MODES {
            let options = RelayOptions {
                mode,
                idle_timeout: 30.into(),
                ..Default::default()
            };
            ringsock::run(move || {
                let (client, a) = tcp();
                let (mut server, b) = tcp();
                let relay = start(&a, &b, options);
                let peers = thread::spawn(move || {
                    // So much that a way which may will splice.
                    let bulk = vec![7; 4 << 20];
                    let mut got = vec![0; bulk.len()];
                    thread::scope(|scope| {
                        scope.spawn(|| (&client).write_all(&bulk).unwrap());
                        server.read_exact(&mut got).unwrap();
                    });
                    assert!(got == bulk);
                    for n in 0..20 {
                        send_urgently(&client, b"before", b"behind");
                        let mut got = [0; 12];
                        server.read_exact(&mut got).unwrap();
                        assert_eq!(&got, b"beforebehind", "{mode:?}, round {n}");
                    }
                    send_urgently(&client, b"last", b"words");
                    client.shutdown(Shutdown::Write).unwrap();
                    let mut rest = Vec::new();
                    server.read_to_end(&mut rest).unwrap();
                    assert_eq!(rest, b"lastwords", "{mode:?}");
                });
                while !peers.is_finished() {
                    sleep(0.01).unwrap();
                }
                peers.join().unwrap();
                let relayed = relay.join().unwrap();
                assert_eq!(relayed.ended, RelayEnd::Closed);
                assert_eq!(relayed.a_to_b, (4 << 20) + 20 * 12 + 9);
                assert_eq!(relayed.stranded, 0);
            });
        }
    });
}

/// Their modes play no part while they are relayed, and neither does another relay of one of them.
#[test]
fn a_mode_that_is_set_during_a_relay_holds_up_nobody() {
    /// A relay by splice(2), which only O_NONBLOCK keeps from waiting; then `change`, and another piece.
    fn relay_on(mode: RelayMode, change: fn(&Socket)) {
        let (client, a) = tcp_pair();
        let (b, server) = tcp_pair();
        let (sides, options) = (
            (a.clone(), b),
            RelayOptions {
                mode,
                ..Default::default()
            },
        );
        let relaying = spawn(move || relay(&sides.0, &sides.1, &options));
        let piece = vec![7; 40_000];
        let pass_on = || {
            client.sendall(&piece).unwrap();
            let mut got = 0;
            while got < piece.len() {
                got += server.recv(1 << 16).unwrap().len();
            }
        };
        (0..10).for_each(|_| pass_on());
        change(&a);
        pass_on();
        // The relay looks for more, and waits, but not the worker.
        let slept = timeout(20.0, || sleep(0.02));
        assert_eq!(slept, Ok(()));
        relaying.cancel();
        let relayed = relaying.join().unwrap().unwrap();
        assert_eq!(relayed.ended, RelayEnd::Cancelled);
        assert!(relayed.a_to_b_spliced > 0, "{relayed:?}");
    }
    checked(|| {
        ringsock::run(|| {
            for mode in [RelayMode::Splice, RelayMode::Auto] {
                relay_on(mode, |_| ());
                relay_on(mode, |a| a.settimeout(None).unwrap());
                relay_on(mode, |a| a.setblocking(true).unwrap());
                relay_on(mode, |a| {
                    let (other, peer) = tcp_pair();
                    peer.sendall(&[1; 10]).unwrap();
                    let mode = RelayMode::Splice;
                    let deadline = 0.02.into();
                    let options = RelayOptions {
                        mode,
                        deadline,
                        ..Default::default()
                    };
                    relay(&other, a, &options).unwrap();
                });
            }
        });
    });
}

/// What a relay leaves is there for the next receive at once, whatever it was told before.
#[test]
fn what_a_relay_leaves_is_received_at_once() {
    fn pause_of(end: bool) -> Duration {
        let (client, a) = tcp_pair();
        let (b, server) = tcp_pair();
        let options = RelayOptions {
            mode: RelayMode::Copy,
            ..Default::default()
        };
        let sides = (a.clone(), b);
        let relaying = spawn(move || relay(&sides.0, &sides.1, &options));
        for _ in 0..8 {
            client.sendall(b"x").unwrap();
            assert_eq!(server.recv(9).unwrap(), b"x");
            sleep(0.001).unwrap();
        }
        if end {
            client.shutdown(SHUT_WR).unwrap();
            assert_eq!(server.recv(9).unwrap(), b"");
        }
        relaying.cancel();
        relaying.join().unwrap().unwrap();
        let start = Instant::now();
        if !end {
            client.sendall(b"more").unwrap();
        }
        let left = if end { 0 } else { 4 };
        assert_eq!(a.recv(9).unwrap().len(), left);
        start.elapsed()
    }
    checked(|| {
        ringsock::run(|| {
            for end in [true, false] {
                // A busy machine may pause for other reasons, but hardly every time.
                let least = (0..5).map(|_| pause_of(end)).min().unwrap();
                assert!(least < Duration::from_millis(90), "{least:?}");
            }
        });
    });
}
