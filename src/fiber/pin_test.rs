//! Sends without a copy, forced on loopback. Free buffers are filled with a pattern (`POISON` of `buf/pool.rs`), so a buffer that went home
//! before the kernel was done with it would show in what the peer receives, and one that is written while free fails the next `take`.
#![allow(unsafe_code)]

use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::route::ZeroCopy;
use crate::{
    Buf, BufferPool, BufferPoolBuilder, Error, Handle, Metrics, PoolBuf, Runtime, Socket, spawn,
};

const PIECE: usize = 64 << 10;

/// A connection from this worker to a plain thread, over an address of the test's own: routes are remembered by it.
fn connect(host: u8) -> (Socket, TcpStream) {
    let address = SocketAddr::from(([127, 77, 0, host], 0));
    let listener = TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    let socket = Socket::new(crate::AF_INET, crate::SOCK_STREAM, 0).unwrap();
    socket
        .bind((format!("127.77.0.{host}").as_str(), 0))
        .unwrap();
    socket.connect(address).unwrap();
    (socket, listener.accept().unwrap().0)
}

fn run<T: 'static>(mode: ZeroCopy, main: impl FnOnce() -> T + 'static) -> (T, Metrics) {
    let runtime = Runtime::builder().zero_copy(mode);
    let main = move || (main(), Handle::current().unwrap());
    let (result, handle) = runtime
        .shutdown_grace(Duration::from_millis(100))
        .run(main)
        .unwrap();
    (result, handle.metrics()[0])
}

fn has_zero_copy() -> bool {
    let has = crate::Features::probe().unwrap().is_on("SEND_ZC");
    if !has {
        println!("skipped: this kernel has no zero-copy sends that report");
    }
    has
}

/// The byte at `at` of every test's stream; never what free buffers are filled with.
fn pattern(at: usize) -> u8 {
    (at % 211) as u8
}

fn filled(pool: &BufferPool, at: usize, len: usize) -> PoolBuf {
    let mut buf = pool.take(len).unwrap();
    buf.truncate(len);
    (at..)
        .zip(buf.iter_mut())
        .for_each(|(at, byte)| *byte = pattern(at));
    buf
}

/// Reads to the end of the stream and checks every byte: how many.
fn read_all(mut stream: TcpStream) -> usize {
    let mut chunk = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        let n = match stream.read(&mut chunk) {
            Ok(0) => return total,
            Ok(n) => n,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return total,
            Err(error) => panic!("{error}"),
        };
        for (at, byte) in (total..).zip(&chunk[..n]) {
            assert_eq!(*byte, pattern(at), "at {at}");
        }
        total += n;
    }
}

/// Runs what blocks a thread, of which fibers have only one.
fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    crate::spawn_blocking(work).unwrap().join().unwrap()
}

/// Registrations count for the whole process, and the tests of it run side by side.
fn builder(count: usize, bytes: usize) -> BufferPoolBuilder {
    let builder = BufferPool::builder().buffers(count, bytes);
    builder.locked_bytes_max(1 << 30)
}

fn pool_of(count: usize, bytes: usize) -> BufferPool {
    builder(count, bytes).build().unwrap()
}

fn assert_registered(pool: &BufferPool) {
    match pool.unregistered() {
        Some(why) if why.contains("RLIMIT_MEMLOCK") => println!("not registered: {why}"),
        other => assert_eq!((pool.registrations(), other), (1, None)),
    }
}

/// Waits until all `count` buffers are home.
fn wait_for_all(pool: &BufferPool, count: usize) {
    let all = crate::timeout(20, || {
        (0..count)
            .map(|_| pool.take(1))
            .collect::<Result<Vec<_>, _>>()
    });
    assert!(all.is_ok(), "{all:?}");
}

#[test]
fn the_constants_are_the_kernels() {
    // include/uapi/linux/io_uring.h: IORING_NOTIF_USAGE_ZC_COPIED is 1U << 31.
    assert_eq!(super::pin::NOTIF_USAGE_COPIED as u32, 1 << 31);
}

#[test]
fn a_route_on_which_the_kernel_copies_switches_itself_off() {
    if !has_zero_copy() {
        return;
    }
    const SENDS: usize = 100;
    let (total, metrics) = run(ZeroCopy::AlsoLocal, || {
        let pool = pool_of(24, PIECE);
        let (socket, peer) = connect(1);
        let reader = thread::spawn(move || read_all(peer));
        for n in 0..SENDS {
            let buf = filled(&pool, n * PIECE, PIECE);
            socket.sendall_buf(buf.into()).unwrap();
            crate::sleep(0.0005).unwrap();
        }
        drop(socket);
        wait_for_all(&pool, 24);
        assert_registered(&pool);
        aside(move || reader.join().unwrap())
    });
    assert_eq!(total, SENDS * PIECE);
    // Three reports end it for messages of this size; some were under way meanwhile.
    assert!((3..=11).contains(&metrics.zero_copy_sends), "{metrics:?}");
    assert_eq!(metrics.zero_copy_copied, metrics.zero_copy_sends);
    assert_eq!((metrics.buffers_pinned, metrics.buffers_leaked), (0, 0));
}

#[test]
fn unix_sockets_and_loopback_are_not_tried() {
    let ((), metrics) = run(ZeroCopy::Adaptive, || {
        let pool = BufferPool::new().unwrap();
        let (tcp, peer) = connect(2);
        let reader = thread::spawn(move || read_all(peer));
        tcp.sendall_buf(filled(&pool, 0, PIECE).into()).unwrap();
        drop(tcp);
        aside(move || reader.join().unwrap());
    });
    assert_eq!(metrics.zero_copy_sends, 0);
    let ((), metrics) = run(ZeroCopy::Always, || {
        let pool = BufferPool::new().unwrap();
        let (left, right) = crate::socketpair().unwrap();
        let buf = filled(&pool, 0, PIECE);
        let sender = spawn(move || left.sendall_buf(buf.into()));
        let mut received = 0;
        while received < PIECE {
            received += right.recv(PIECE).unwrap().len();
        }
        sender.join().unwrap().unwrap();
        assert_eq!(pool.available(PIECE), 24);
    });
    assert_eq!(metrics.zero_copy_sends, 0);
}

#[test]
fn every_byte_arrives_from_a_pool_of_four_buffers() {
    if !has_zero_copy() {
        return;
    }
    const SENDS: usize = 150;
    for register in [true, false] {
        let (pool, metrics) = run(ZeroCopy::Always, move || {
            let pool = builder(4, PIECE).register(register).build().unwrap();
            let fibers: Vec<_> = (0..3)
                .map(|_| {
                    let pool = pool.clone();
                    spawn(move || {
                        let (socket, peer) = connect(3);
                        socket.settimeout(20).unwrap();
                        let reader = thread::spawn(move || read_all(peer));
                        let mut at = 0;
                        for n in 0..SENDS {
                            let len = (16 << 10) + n * 7919 % (48 << 10);
                            let mut buf = Buf::from(filled(&pool, at, len));
                            if n % 5 == 0 {
                                // Parts of one buffer, sent one by one.
                                socket.sendall_buf(buf.split_to(len / 3)).unwrap();
                            }
                            socket.sendall_buf(buf).unwrap();
                            at += len;
                        }
                        drop(socket);
                        assert_eq!(aside(move || reader.join().unwrap()), at);
                    })
                })
                .collect();
            fibers.into_iter().for_each(|fiber| fiber.join().unwrap());
            wait_for_all(&pool, 4);
            if register {
                assert_registered(&pool);
            } else {
                assert_eq!(pool.registrations(), 0);
            }
            pool
        });
        assert_eq!(pool.available(1), 4);
        assert_eq!(pool.registrations(), 0, "the ring is gone");
        assert!(metrics.zero_copy_sends > 0, "{metrics:?}");
        assert_eq!((metrics.buffers_pinned, metrics.buffers_leaked), (0, 0));
    }
}

#[test]
fn leases_are_sent_without_a_copy_too() {
    if !has_zero_copy() {
        return;
    }
    let ((), metrics) = run(ZeroCopy::Always, || {
        let (left, right) = crate::socketpair().unwrap();
        let (socket, peer) = connect(4);
        let reader = thread::spawn(move || read_all(peer));
        let feeder = spawn(move || {
            let bytes: Vec<u8> = (0..20 * PIECE).map(pattern).collect();
            left.sendall(&bytes)
        });
        while let Ok(chunk) = right.recv(PIECE)
            && !chunk.is_empty()
        {
            socket.sendall_buf(chunk).unwrap();
        }
        feeder.join().unwrap().unwrap();
        drop(socket);
        assert_eq!(aside(move || reader.join().unwrap()), 20 * PIECE);
    });
    assert!(metrics.zero_copy_sends > 0, "{metrics:?}");
}

#[test]
fn a_stalled_peer_pins_no_more_than_its_share_and_no_buffer_early() {
    if !has_zero_copy() {
        return;
    }
    let ((), metrics) = run(ZeroCopy::Always, || {
        let pool = pool_of(16, PIECE);
        let (stalled, peer) = connect(5);
        let sender = spawn({
            let pool = pool.clone();
            move || {
                let mut at = 0;
                stalled.settimeout(3).unwrap();
                loop {
                    let buf = filled(&pool, at, PIECE);
                    if let Err(error) = stalled.sendall_buf(buf.into()) {
                        assert_eq!(error, Error::Timeout);
                        return (at, stalled);
                    }
                    at += PIECE;
                }
            }
        });
        // For the three seconds in which nothing moves there, another connection has all it needs.
        let (lively, other) = connect(6);
        let reader = thread::spawn(move || read_all(other));
        let mut at = 0;
        while !sender.is_finished() {
            lively.sendall_buf(filled(&pool, at, PIECE).into()).unwrap();
            at += PIECE;
            assert!(pool.available(1) >= 16 / 2 - 2, "{pool:?}");
            crate::sleep(0.002).unwrap();
        }
        drop(lively);
        assert_eq!(aside(move || reader.join().unwrap()), at);
        let (sent, stalled) = sender.join().unwrap();
        // Two (an eighth of 16) are the kernel's, and stay so while the peer stalls and after the socket is gone.
        let held = 16 - pool.available(1);
        assert!((1..=2).contains(&held), "{held}");
        drop(stalled);
        assert_eq!(16 - pool.available(1), held);
        assert!(aside(move || read_all(peer)) >= sent);
        wait_for_all(&pool, 16);
    });
    assert_eq!((metrics.buffers_pinned, metrics.buffers_leaked), (0, 0));
}

/// Ends a send in the middle in each way there is. What the peer reads afterwards is a part of the stream, unspoilt, and the buffer comes
/// home when it has been read.
#[test]
fn a_send_that_is_ended_early_keeps_its_buffer_until_the_kernel_is_done() {
    if !has_zero_copy() {
        return;
    }
    const BYTES: usize = 8 << 20;
    for way in ["timeout", "deadline", "cancel", "close"] {
        let ((), metrics) = run(ZeroCopy::Always, move || {
            let pool = pool_of(2, BYTES);
            let (socket, peer) = connect(7);
            let sender = spawn({
                let (pool, socket) = (pool.clone(), socket.clone());
                move || {
                    let buf = Buf::from(filled(&pool, 0, BYTES));
                    match way {
                        "timeout" => socket.settimeout(0.1).unwrap(),
                        "deadline" => return crate::timeout(0.1, || socket.sendall_buf(buf)),
                        _ => {}
                    }
                    socket.sendall_buf(buf)
                }
            });
            crate::sleep(0.1).unwrap();
            match way {
                "cancel" => sender.cancel(),
                "close" => socket.close().unwrap(),
                _ => {}
            }
            let error = sender.join().unwrap().unwrap_err();
            match way {
                "cancel" => assert_eq!(error, Error::Cancelled),
                "close" => assert!(error.is_closed(), "{error}"),
                _ => assert_eq!(error, Error::Timeout),
            }
            assert_eq!(pool.available(1), 1, "{way}: it is still being read");
            drop(socket);
            let read = aside(move || read_all(peer));
            assert!(read > 0 && read < BYTES, "{way}: {read}");
            wait_for_all(&pool, 2);
        });
        assert_eq!(metrics.zero_copy_sends, 1, "{way}");
        assert_eq!((metrics.buffers_pinned, metrics.buffers_leaked), (0, 0));
    }
}

#[test]
fn a_runtime_that_ends_leaks_what_the_kernel_still_reads_and_counts_it() {
    if !has_zero_copy() {
        return;
    }
    let ((pool, peer), metrics) = run(ZeroCopy::Always, || {
        let pool = pool_of(16, PIECE);
        let (socket, peer) = connect(8);
        socket.settimeout(0.1).unwrap();
        let mut at = 0;
        while socket.sendall_buf(filled(&pool, at, PIECE).into()).is_ok() {
            at += PIECE;
        }
        (pool, peer)
    });
    assert!((1..=2).contains(&metrics.buffers_leaked), "{metrics:?}");
    assert_eq!(metrics.buffers_pinned, 0);
    assert_eq!(pool.available(1) as u64, 16 - metrics.buffers_leaked);
    // The ring is gone and the data is whole.
    assert!(read_all(peer) > PIECE);
}

#[test]
fn a_runtime_that_ends_waits_for_a_peer_that_reads() {
    if !has_zero_copy() {
        return;
    }
    let (go, went) = mpsc::channel();
    let (pool, metrics) = run(ZeroCopy::Always, move || {
        let pool = pool_of(16, PIECE);
        let (socket, peer) = connect(9);
        let reader = thread::spawn(move || {
            let () = went.recv().unwrap();
            read_all(peer)
        });
        socket.settimeout(0.05).unwrap();
        let mut at = 0;
        while socket.sendall_buf(filled(&pool, at, PIECE).into()).is_ok() {
            at += PIECE;
        }
        assert!(pool.available(1) < 16);
        go.send(()).unwrap();
        drop(reader);
        pool
    });
    assert_eq!((metrics.buffers_pinned, metrics.buffers_leaked), (0, 0));
    assert_eq!(pool.available(1), 16);
}

#[test]
fn a_pool_that_may_lock_nothing_sends_unregistered_and_says_why() {
    if !has_zero_copy() {
        return;
    }
    let ((), metrics) = run(ZeroCopy::Always, || {
        let pool = builder(4, PIECE).locked_bytes_max(0).build().unwrap();
        let (socket, peer) = connect(10);
        let reader = thread::spawn(move || read_all(peer));
        socket.sendall_buf(filled(&pool, 0, PIECE).into()).unwrap();
        drop(socket);
        let why = pool.unregistered().unwrap();
        assert!(why.contains("locked_bytes_max"), "{why}");
        assert_eq!(aside(move || reader.join().unwrap()), PIECE);
        wait_for_all(&pool, 4);
    });
    assert_eq!(metrics.zero_copy_sends, 1);
}

#[test]
fn registrations_of_pools_that_are_gone_make_room() {
    if !has_zero_copy() {
        return;
    }
    let ((), metrics) = run(ZeroCopy::Always, || {
        let (socket, peer) = connect(11);
        let reader = thread::spawn(move || read_all(peer));
        for n in 0..100 {
            let pool = pool_of(8, PIECE);
            socket
                .sendall_buf(filled(&pool, n * PIECE, PIECE).into())
                .unwrap();
            assert_registered(&pool);
            wait_for_all(&pool, 8);
        }
        drop(socket);
        assert_eq!(aside(move || reader.join().unwrap()), 100 * PIECE);
    });
    assert_eq!(metrics.zero_copy_sends, 100);
}
