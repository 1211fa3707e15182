//! Limits: what happens when descriptors, locked memory, queue entries, fibers or address space run out. Nothing is lost, nothing
//! spins, and what cannot be had is an error that says so.
#![allow(unsafe_code)]

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::*;
use ringsock::{
    Builder, Handle, JoinError, Result, Runtime, calls_without_ring, run, sleep, socketpair, spawn,
    timeout, yield_now,
};
use support::{
    EchoServer, Endpoint, Family as Net, Process, Stream, alone, descriptors, drop_privileges,
    eventually, example, limit_descriptors, limit_locked_memory, listener, on_epoll, set_limit,
    skipped_on_epoll, tcp_pair, turn,
};

const KIB: u64 = 1024;

fn is_errno<T>(result: &Result<T>, errno: i32) -> bool {
    result
        .as_ref()
        .err()
        .is_some_and(|error| error.errno() == Some(errno))
}

/// Takes every descriptor that is left below `limit`.
fn take_descriptors(limit: u64) -> Vec<File> {
    set_limit(libc::RLIMIT_NOFILE, limit).unwrap();
    let mut taken = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        taken.push(file);
    }
    taken
}

/// The links in /proc/self/fd that name a ring, or what stands for it.
fn rings() -> usize {
    let name = if on_epoll() {
        "[eventpoll]"
    } else {
        "[io_uring]"
    };
    fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter(|link| link.to_string_lossy().contains(name))
        .count()
}

// Descriptors.

#[test]
fn a_server_out_of_descriptors_rests_and_serves_everybody_in_the_end() {
    const CLIENTS: usize = 200;
    let _turn = turn();
    let window_s: u64 = std::env::var("RINGSOCK_STARVED_S").map_or(3, |text| text.parse().unwrap());
    let server = EchoServer::start_with(Net::V4, &[], |command| {
        limit_descriptors(command, 64, 64);
    });
    let server = server.expect("IPv4");
    let mut streams: Vec<Stream> = (0..CLIENTS).map(|_| server.connect()).collect();
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&[number as u8; 8]).unwrap();
    }
    eventually("the server has no descriptor left", || {
        server.descriptors() >= 64
    });
    let (before, start) = (server.cpu_time(), Instant::now());
    thread::sleep(Duration::from_secs(window_s));
    let share = (server.cpu_time() - before).as_secs_f64() / start.elapsed().as_secs_f64();
    println!("{:.2} % of a processor in {window_s} s", share * 100.0);
    assert!(share < 0.05, "{:.1} % of a processor", share * 100.0);
    for (number, mut stream) in streams.into_iter().enumerate() {
        let mut back = [0; 8];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(back, [number as u8; 8], "connection {number}");
    }
}

/// Without a free descriptor every `accept` says so, the connection waits, and the next `accept` with one gets it.
fn accept_when_there_is_room(warm: bool) {
    let listener = listener(8);
    listener.settimeout(60).unwrap();
    if warm {
        // The thread has its ring from now on.
        assert_eq!(
            timeout(0.001, || listener.accept()).unwrap_err(),
            Error::Timeout
        );
    }
    let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    client.connect(listener.getsockname().unwrap()).unwrap();
    client.sendall(b"first in the queue").unwrap();
    let mut taken = take_descriptors(64);
    for _ in 0..5 {
        let refused = listener.accept();
        assert!(is_errno(&refused, libc::EMFILE), "{refused:?}");
    }
    taken.pop();
    let (conn, peer) = listener.accept().unwrap();
    assert_eq!(peer, client.getsockname().unwrap());
    let refused = listener.accept();
    assert!(is_errno(&refused, libc::EMFILE), "{refused:?}");
    drop(taken);
    assert_eq!(conn.recv(100).unwrap(), b"first in the queue");
}

#[test]
fn accept_without_a_descriptor_is_emfile_each_time_and_loses_no_connection() {
    alone(
        "accept_without_a_descriptor_is_emfile_each_time_and_loses_no_connection",
        || {
            run(|| accept_when_there_is_room(true));
            for warm in [true, false] {
                thread::spawn(move || accept_when_there_is_room(warm))
                    .join()
                    .unwrap();
            }
        },
    );
}

#[test]
fn a_call_that_finds_no_descriptor_is_emfile_and_leaves_none_behind() {
    alone(
        "a_call_that_finds_no_descriptor_is_emfile_and_leaves_none_behind",
        || {
            let socket = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
            let mut taken = take_descriptors(64);
            assert!(is_errno(
                &Socket::new(AF_INET, SOCK_STREAM, 0),
                libc::EMFILE
            ));
            assert!(is_errno(&socketpair(), libc::EMFILE));
            // One is not enough for a pair, and is not lost either.
            taken.pop();
            assert!(is_errno(&socketpair(), libc::EMFILE));
            let copy = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
            assert!(is_errno(
                &Socket::new(AF_INET, SOCK_STREAM, 0),
                libc::EMFILE
            ));
            drop(copy);
            assert!(Socket::new(AF_INET, SOCK_STREAM, 0).is_ok());
            drop(socket);
        },
    );
}

#[test]
fn a_runtime_that_finds_too_few_descriptors_says_so_and_leaves_none_behind() {
    alone(
        "a_runtime_that_finds_too_few_descriptors_says_so_and_leaves_none_behind",
        || {
            for workers in 1..=3 {
                let mut taken = take_descriptors(64);
                let mut refused = 0;
                let runtime = loop {
                    match Runtime::builder().workers(workers).build() {
                        Ok(runtime) => break runtime,
                        Err(error) => assert_eq!(error.errno(), Some(libc::EMFILE), "{error}"),
                    }
                    // Workers that had all they need end when they hear that another had not.
                    eventually("the descriptors are back", || descriptors_left() == refused);
                    refused += 1;
                    taken.pop();
                };
                // Each worker takes a ring and an eventfd.
                assert_eq!(refused, 2 * workers);
                assert_eq!(runtime.handle().spawn(|| 7).unwrap().join().unwrap(), 7);
            }
        },
    );
}

/// How many descriptors could be opened now.
fn descriptors_left() -> usize {
    let mut opened = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        opened.push(file);
    }
    opened.len()
}

/// Sends and receives on a plain thread, so that each direction has to wait, and bounds a receive.
fn exchange() {
    let (left, right) = socketpair().unwrap();
    let reader = right.clone();
    let sent: Vec<u8> = (0..400_000).map(|n| (n % 251) as u8).collect();
    let expected = sent.clone();
    let peer = thread::spawn(move || {
        let mut received = vec![0; expected.len()];
        let mut got = 0;
        while got < received.len() {
            got += reader.recv_into(&mut received[got..]).unwrap();
        }
        assert!(received == expected);
    });
    left.sendall(&sent).unwrap();
    peer.join().unwrap();
    left.settimeout(0.01).unwrap();
    assert_eq!(left.recv(1).unwrap_err(), Error::Timeout);
    right.sendall(b"x").unwrap();
    assert_eq!(left.recv(1).unwrap(), b"x");
}

#[test]
fn without_a_descriptor_for_its_ring_a_thread_waits_by_readiness() {
    alone(
        "without_a_descriptor_for_its_ring_a_thread_waits_by_readiness",
        || {
            let (left, right) = socketpair().unwrap();
            let taken = take_descriptors(64);
            let writer = thread::spawn(move || {
                thread::sleep(Duration::from_millis(20));
                left.sendall(b"without a ring").unwrap();
                left
            });
            let reader = thread::spawn(move || {
                assert_eq!(right.recv(100).unwrap(), b"without a ring");
                right.settimeout(0.01).unwrap();
                assert_eq!(right.recv(1).unwrap_err(), Error::Timeout);
                right
            });
            let left = writer.join().unwrap();
            let right = reader.join().unwrap();
            assert!(calls_without_ring() >= 2, "{}", calls_without_ring());
            drop(taken);
            assert_eq!(rings(), 0);
            // And with descriptors again, with a ring again.
            let before = calls_without_ring();
            thread::spawn(move || {
                left.settimeout(0.01).unwrap();
                assert_eq!(left.recv(1).unwrap_err(), Error::Timeout);
                assert_eq!(rings(), 1);
            })
            .join()
            .unwrap();
            assert_eq!(calls_without_ring(), before);
            drop(right);
        },
    );
}

// Locked memory.

#[test]
fn under_any_locked_memory_limit_a_server_serves_or_says_what_to_change() {
    let _turn = turn();
    if skipped_on_epoll("epoll locks no memory") {
        return;
    }
    for limit_kib in [0, 8, 16, 64, 1024, 8192] {
        for workers in [1, 2, 8, 64] {
            let mut command = Command::new(example("echo_server"));
            command.args(["--bind", "127.0.0.1:0", "--workers"]);
            command.arg(workers.to_string());
            limit_locked_memory(&mut command, limit_kib * KIB);
            let mut process = Process::start(&mut command, b"").unwrap();
            let case = format!("{limit_kib} KiB, {workers} workers");
            let Some(line) = process.try_line() else {
                let finished = process.wait();
                assert_eq!(finished.status.code(), Some(1), "{case}: {finished:?}");
                assert_eq!(finished.stderr.lines().count(), 1, "{case}: {finished:?}");
                for part in [
                    format!("limit (RLIMIT_MEMLOCK) of {limit_kib} KiB"),
                    "a worker's ring takes 52 KiB, the smallest 8 KiB".to_owned(),
                    "ulimit -l".to_owned(),
                ] {
                    assert!(finished.stderr.contains(&part), "{case}: {finished:?}");
                }
                // The smallest rings take 8 KiB each: it ends only where not even those fit.
                assert!(limit_kib < 8 * workers, "{case}: {finished:?}");
                continue;
            };
            let address = line.strip_prefix("listening on ").expect("an address");
            let endpoint = Endpoint::Tcp(address.parse().unwrap());
            let mut streams: Vec<Stream> = (0..20)
                .map(|_| Stream::connect(&endpoint).unwrap())
                .collect();
            for stream in &mut streams {
                stream.round_trip(&[7; 10_000]).unwrap();
            }
            process.signal(libc::SIGKILL);
            assert!(process.wait().stderr.is_empty(), "{case}");
        }
    }
}

#[test]
fn doctor_tells_what_the_locked_memory_limit_holds() {
    let _turn = turn();
    if skipped_on_epoll("epoll locks no memory") {
        return;
    }
    for (limit_kib, code, text) in [
        (0, 1, "limit (RLIMIT_MEMLOCK) of 0 KiB"),
        (
            8,
            0,
            "of 8 KiB, which all rings of a user share, holds the 52-KiB rings of 0 workers",
        ),
        (
            64,
            0,
            "of 64 KiB, which all rings of a user share, holds the 52-KiB rings of 1 workers",
        ),
        (
            8192,
            0,
            "of 8192 KiB, which all rings of a user share, holds the 52-KiB rings of 157 workers",
        ),
    ] {
        let mut command = Command::new(example("doctor"));
        limit_locked_memory(&mut command, limit_kib * KIB);
        let finished = support::run(&mut command, b"");
        let printed = String::from_utf8_lossy(&finished.stdout) + &*finished.stderr;
        assert!(printed.contains(text), "{limit_kib} KiB: {finished:?}");
        // A kernel that counts no rings works at any limit.
        let code_is = finished.status.code();
        assert!(code_is == Some(code) || code_is == Some(0), "{finished:?}");
    }
}

#[test]
fn a_hundred_threads_work_under_a_limit_that_holds_eight_rings() {
    if skipped_on_epoll("epoll locks no memory") {
        return;
    }
    alone(
        "a_hundred_threads_work_under_a_limit_that_holds_eight_rings",
        || {
            set_limit(libc::RLIMIT_MEMLOCK, 64 * KIB).unwrap();
            drop_privileges().unwrap();
            let barrier = Arc::new(Barrier::new(100));
            let threads: Vec<_> = (0..100)
                .map(|_| {
                    let barrier = barrier.clone();
                    thread::spawn(move || {
                        let (left, right) = tcp_pair();
                        left.settimeout(0.001).unwrap();
                        assert_eq!(left.recv(1).unwrap_err(), Error::Timeout);
                        // All rings that there will be are there.
                        barrier.wait();
                        exchange();
                        right.sendall(b"x").unwrap();
                        left.settimeout(60).unwrap();
                        assert_eq!(left.recv(1).unwrap(), b"x");
                        rings()
                    })
                })
                .collect();
            let rings: Vec<usize> = threads.into_iter().map(|t| t.join().unwrap()).collect();
            let most = rings.into_iter().max().unwrap();
            println!("{most} rings, {} calls without", calls_without_ring());
            if most <= 8 {
                assert!(calls_without_ring() > 0);
            } else {
                println!("skipped: this kernel does not count rings against the limit");
            }
        },
    );
}

// Queue entries.

#[test]
fn ten_thousand_receives_in_flight_on_a_ring_of_eight_all_complete() {
    const SOCKETS: usize = 100;
    const EACH: usize = 100;
    let _turn = turn();
    let metrics = Runtime::builder()
        .ring_entries(4, 2)
        .stack_size(16 * 1024)
        .run(|| {
            let received = Arc::new(AtomicUsize::new(0));
            let mut fibers = Vec::new();
            let mut peers = Vec::new();
            for _ in 0..SOCKETS {
                let (left, right) = socketpair().unwrap();
                for _ in 0..EACH {
                    let (left, received) = (left.clone(), received.clone());
                    fibers.push(spawn(move || {
                        let mut byte = [0];
                        // Each gets a byte of its own, then the end.
                        while left.recv_into(&mut byte).unwrap() == 1 {
                            received.fetch_add(usize::from(byte[0]), Ordering::Relaxed);
                        }
                    }));
                }
                peers.push(right);
            }
            let handle = Handle::current().unwrap();
            while handle.metrics()[0].in_flight < (SOCKETS * EACH) as u64 {
                sleep(0.01).unwrap();
            }
            let before = handle.metrics()[0];
            for peer in &peers {
                peer.sendall(&[3; EACH]).unwrap();
            }
            drop(peers);
            for fiber in fibers {
                fiber.join().unwrap();
            }
            assert_eq!(received.load(Ordering::Relaxed), 3 * SOCKETS * EACH);
            (before, handle)
        })
        .map(|(before, handle)| (before, handle.metrics()[0]))
        .unwrap();
    println!("{metrics:?}");
    let (before, after) = metrics;
    // Without a ring nothing is full, and nothing overflows.
    assert!(after.sq_full > 0 || on_epoll());
    assert!(
        after.cq_overflows > before.cq_overflows || on_epoll(),
        "no overflow seen"
    );
    assert_eq!(after.cqes_unknown, 0);
    assert_eq!(after.in_flight, 0);
}

// The inbox.

#[test]
fn spawns_wait_for_room_in_the_inbox_and_start_in_their_order() {
    const ROOM: usize = 4;
    const SPAWNS: usize = 40;
    let _turn = turn();
    let runtime = Runtime::builder().inbox(ROOM).build().unwrap();
    let handle = runtime.handle();
    // The worker reads no mail while this fiber holds its thread.
    let (entered, in_it) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let busy = handle
        .spawn(move || {
            entered.send(()).unwrap();
            released.recv().unwrap();
        })
        .unwrap();
    in_it.recv().unwrap();
    let accepted = Arc::new(AtomicUsize::new(0));
    let (ran, order) = mpsc::channel();
    let spawner = {
        let (handle, accepted) = (handle.clone(), accepted.clone());
        thread::spawn(move || {
            for n in 0..SPAWNS {
                let ran = ran.clone();
                drop(handle.spawn(move || ran.send(n).unwrap()).unwrap());
                accepted.fetch_add(1, Ordering::SeqCst);
            }
        })
    };
    eventually("the inbox is full", || {
        accepted.load(Ordering::SeqCst) == ROOM
    });
    // Nothing tells that a spawn goes on waiting; one that does not comes at once.
    thread::sleep(Duration::from_millis(50));
    assert_eq!(accepted.load(Ordering::SeqCst), ROOM);

    // A fiber elsewhere that waits for room can be cancelled, and what it wanted to start is not started.
    let elsewhere = handle.clone();
    run(move || {
        let waiting = spawn(move || elsewhere.spawn(|| unreachable!()).map(drop));
        yield_now();
        waiting.cancel();
        assert_eq!(waiting.join().unwrap(), Err(Error::Cancelled));
    });

    release.send(()).unwrap();
    busy.join().unwrap();
    spawner.join().unwrap();
    let order: Vec<usize> = order.iter().collect();
    assert_eq!(order, (0..SPAWNS).collect::<Vec<_>>());
    drop(runtime);
}

// Fibers.

#[test]
fn a_server_with_all_its_fibers_taken_goes_on_when_one_ends() {
    const FIBERS: usize = 5;
    let _turn = turn();
    let runtime = Runtime::builder().max_fibers(FIBERS).build().unwrap();
    let live = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    let (l, m) = (live.clone(), most.clone());
    let server = runtime
        .handle()
        .serve(("127.0.0.1", 0), move |conn, _peer| {
            m.fetch_max(l.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let served = conn.recv(8).and_then(|data| conn.sendall(&data));
            l.fetch_sub(1, Ordering::SeqCst);
            served
        })
        .unwrap();
    let clients: Vec<Socket> = (0..50)
        .map(|_| {
            let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
            client.connect(server.address()).unwrap();
            client.settimeout(60).unwrap();
            client
        })
        .collect();
    // All but the accepting fiber serve; the others wait in the backlog and burn nothing.
    eventually("all fibers are taken", || {
        live.load(Ordering::SeqCst) == FIBERS - 1
    });
    let before = runtime.handle().metrics()[0];
    thread::sleep(Duration::from_millis(200));
    let after = runtime.handle().metrics()[0];
    assert!(after.enters - before.enters < 50, "{before:?} {after:?}");
    for client in clients {
        client.sendall(b"request!").unwrap();
        assert_eq!(client.recv_with(8, MSG_WAITALL).unwrap(), b"request!");
    }
    assert_eq!(most.load(Ordering::SeqCst), FIBERS - 1);
    server.stop();
}

#[test]
fn handle_spawn_waits_in_the_inbox_while_all_fibers_are_taken() {
    let _turn = turn();
    let runtime = Runtime::builder().max_fibers(2).build().unwrap();
    let handle = runtime.handle();
    let (release, released) = mpsc::channel::<Socket>();
    let (left, right) = socketpair().unwrap();
    let other = right.clone();
    let holders = [
        handle.spawn(move || right.recv(1).map(drop)).unwrap(),
        handle.spawn(move || other.recv(1).map(drop)).unwrap(),
    ];
    let waiting: Vec<_> = (0..10).map(|n| handle.spawn(move || n).unwrap()).collect();
    thread::sleep(Duration::from_millis(20));
    assert!(waiting.iter().all(|fiber| !fiber.is_finished()));
    drop((release, released));
    left.sendall(b"go").unwrap();
    for holder in holders {
        holder.join().unwrap().unwrap();
    }
    for (n, fiber) in waiting.into_iter().enumerate() {
        assert_eq!(fiber.join().unwrap(), n);
    }
}

// Threads.

#[test]
fn ten_thousand_threads_leave_no_ring_and_no_memory_behind() {
    fn resident_kib() -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.unwrap().parse().unwrap()
    }
    fn churn(threads: usize) {
        for _ in 0..threads / 10 {
            let (left, right) = socketpair().unwrap();
            let threads: Vec<_> = (0..10)
                .map(|n| {
                    let socket = if n % 2 == 0 {
                        left.clone()
                    } else {
                        right.clone()
                    };
                    thread::spawn(move || {
                        // It waits for the byte of one of the other side.
                        socket.sendall(&[n]).unwrap();
                        assert_eq!(socket.recv(1).unwrap().len(), 1);
                    })
                })
                .collect();
            for thread in threads {
                thread.join().unwrap();
            }
        }
    }
    alone(
        "ten_thousand_threads_leave_no_ring_and_no_memory_behind",
        || {
            churn(1000);
            let before = (descriptors(), resident_kib());
            churn(10_000);
            let after = (descriptors(), resident_kib());
            println!("descriptors and KiB: {before:?}, then {after:?}");
            assert_eq!(rings(), 0);
            assert_eq!(after.0, before.0);
            assert!(after.1 < before.1 + 4096, "{before:?} {after:?}");
            assert_eq!(calls_without_ring(), 0);
        },
    );
}

// Address space.

#[test]
fn without_room_for_a_stack_a_spawn_is_enomem_and_the_process_lives() {
    alone(
        "without_room_for_a_stack_a_spawn_is_enomem_and_the_process_lives",
        || {
            let size = || {
                let statm = fs::read_to_string("/proc/self/statm").unwrap();
                let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
                pages * 4 * KIB
            };
            // A worker reserves 16 stacks at a time: the second time 32, of 1 GiB each.
            let runtime = Runtime::builder().stack_size(1 << 30).build().unwrap();
            let handle = runtime.handle();
            handle.spawn(|| ()).unwrap().join().unwrap();
            set_limit(libc::RLIMIT_AS, size() + (64 << 20)).unwrap();
            let (release, released) = socketpair().unwrap();
            let holders: Vec<_> = (0..16)
                .map(|_| {
                    let released = released.clone();
                    handle.spawn(move || released.recv(1).map(drop)).unwrap()
                })
                .collect();
            match handle.spawn(|| ()).unwrap().join() {
                Err(JoinError::NotStarted(error)) => {
                    assert_eq!(error.errno(), Some(libc::ENOMEM), "{error}");
                }
                other => panic!("{other:?}"),
            }
            drop(release);
            for holder in holders {
                holder.join().unwrap().unwrap();
            }
            // A stack that came back serves the next.
            let in_fiber = || {
                let fibers: Vec<_> = (0..15)
                    .map(|_| Builder::new().spawn(|| sleep(0.01)).unwrap())
                    .collect();
                let refused = Builder::new().spawn(|| ());
                for fiber in fibers {
                    fiber.join().unwrap().unwrap();
                }
                assert!(is_errno(&refused, libc::ENOMEM), "{refused:?}");
            };
            handle.spawn(in_fiber).unwrap().join().unwrap();
            assert_eq!(handle.spawn(|| 7).unwrap().join().unwrap(), 7);
        },
    );
}
