//! The socket object: what each method does in a fiber and on a plain thread, and beside the sockets of std.
#![allow(unsafe_code)]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::*;
use ringsock::{
    OptionValue, Runtime, UnixAddr, run, sleep, socketpair, socketpair_with, spawn, yield_now,
};
use support::{Beside, Random, beside, child, child_part, errno, on_both, seed};

fn tcp() -> Socket {
    Socket::new(AF_INET, SOCK_STREAM, 0).unwrap()
}

fn listening() -> (Socket, Address) {
    let listener = tcp();
    listener.bind(("127.0.0.1", 0)).unwrap();
    listener.listen(128).unwrap();
    let address = listener.getsockname().unwrap();
    (listener, address)
}

/// Two ends of a TCP connection.
fn connected() -> (Socket, Socket) {
    let (listener, address) = listening();
    let client = tcp();
    client.connect(&address).unwrap();
    let (conn, peer) = listener.accept().unwrap();
    assert_eq!(peer, client.getsockname().unwrap());
    (client, conn)
}

/// Two UDP sockets, the first connected to the second.
fn datagrams() -> (Socket, Socket) {
    let receiver = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
    receiver.bind(("127.0.0.1", 0)).unwrap();
    let sender = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
    sender.connect(receiver.getsockname().unwrap()).unwrap();
    (sender, receiver)
}

fn fresh_path() -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("ringsock-{}-{number}", std::process::id()))
}

fn poll(socket: &Socket, events: i16) -> i16 {
    let mut poll = libc::pollfd {
        fd: socket.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one valid entry; the kernel fills `revents`.
    let ready = unsafe { libc::poll(&mut poll, 1, 30_000) };
    assert_eq!(ready, 1);
    poll.revents
}

fn status_flags(socket: &Socket) -> i32 {
    // SAFETY: it reads a flag of an open descriptor.
    unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_GETFL) }
}

fn descriptor_flags(socket: &Socket) -> i32 {
    // SAFETY: it reads a flag of an open descriptor.
    unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_GETFD) }
}

/// Fills a socket's way to its peer.
fn fill(socket: &Socket) {
    let timeout = socket.gettimeout();
    socket.setblocking(false).unwrap();
    while socket.send(&[0; 65_536]).is_ok() {}
    while socket.send(&[0; 1]).is_ok() {}
    socket.settimeout(timeout).unwrap();
}

// Making, binding, listening.

#[test]
fn new_refuses_what_the_kernel_refuses() {
    on_both(|| {
        let bad_family = Socket::new(ringsock::Family::new(999), SOCK_STREAM, 0);
        assert_eq!(errno(bad_family), Some(libc::EAFNOSUPPORT));
        let bad_type = Socket::new(AF_INET, ringsock::Kind::new(99), 0);
        assert_eq!(errno(bad_type), Some(libc::EINVAL));
        let mismatched = Socket::new(AF_INET, SOCK_STREAM, ringsock::IPPROTO_UDP);
        assert_eq!(errno(mismatched), Some(libc::EPROTONOSUPPORT));
        let pair = socketpair_with(AF_INET, SOCK_STREAM, 0);
        assert_eq!(errno(pair), Some(libc::EOPNOTSUPP));
    });
}

#[test]
fn a_new_socket_says_what_it_was_made_with() {
    on_both(|| {
        let socket = Socket::new(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, ringsock::IPPROTO_TCP);
        let socket = socket.unwrap();
        assert_eq!(socket.family(), AF_INET6);
        assert_eq!(socket.kind(), SOCK_STREAM);
        assert_eq!(socket.r#type(), SOCK_STREAM);
        assert_eq!(socket.proto(), ringsock::IPPROTO_TCP);
        assert_eq!(socket.gettimeout(), None);
        assert!(socket.getblocking());
        assert!(socket.fileno() > 2);
        assert_eq!(socket.fileno(), socket.as_raw_fd());
    });
}

#[test]
fn binding_twice_is_einval_and_a_taken_address_eaddrinuse() {
    on_both(|| {
        let (listener, address) = listening();
        assert_eq!(errno(listener.bind(("127.0.0.1", 0))), Some(libc::EINVAL));
        assert_eq!(errno(tcp().bind(&address)), Some(libc::EADDRINUSE));
        let elsewhere = tcp().bind(("192.0.2.1", 0));
        assert_eq!(errno(elsewhere), Some(libc::EADDRNOTAVAIL));
    });
}

#[test]
fn listening_takes_any_backlog_and_streams_only() {
    on_both(|| {
        for backlog in [-1, 0, 1, i32::MAX, i32::MIN] {
            let socket = tcp();
            socket.listen(backlog).unwrap();
            assert_eq!(socket.getsockopt(SOL_SOCKET, SO_ACCEPTCONN).unwrap(), 1);
            // Without bind the kernel picks the port.
            assert_ne!(socket.getsockname().unwrap().port(), Some(0));
        }
        let datagram = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
        assert_eq!(errno(datagram.listen(1)), Some(libc::EOPNOTSUPP));
    });
}

#[test]
fn an_address_of_another_family_is_a_type_error_before_all_else() {
    on_both(|| {
        let socket = tcp();
        assert!(matches!(socket.bind("/tmp/path"), Err(Error::Type(_))));
        let v6: std::net::SocketAddr = "[::1]:1".parse().unwrap();
        assert!(matches!(socket.connect(v6), Err(Error::Type(_))));
        let unix = Socket::new(AF_UNIX, SOCK_STREAM, 0).unwrap();
        let long = vec![b'x'; 108];
        assert_eq!(
            unix.bind(&long),
            Err(Error::Message("AF_UNIX path too long".into()))
        );
        // Also on a closed socket.
        socket.close().unwrap();
        assert!(matches!(socket.connect("/tmp/path"), Err(Error::Type(_))));
    });
}

// Accepting and connecting.

#[test]
fn accept_on_a_socket_that_does_not_listen_is_einval() {
    on_both(|| {
        for timeout in [None, Some(10.0), Some(0.0)] {
            let socket = tcp();
            socket.settimeout(timeout).unwrap();
            assert_eq!(errno(socket.accept()), Some(libc::EINVAL));
        }
        let (_sender, receiver) = datagrams();
        assert_eq!(errno(receiver.accept()), Some(libc::EOPNOTSUPP));
    });
}

#[test]
fn accept_waits_as_the_mode_says() {
    on_both(|| {
        let (listener, address) = listening();
        listener.setblocking(false).unwrap();
        assert_eq!(errno(listener.accept()), Some(libc::EAGAIN));
        listener.settimeout(0.02).unwrap();
        let before = Instant::now();
        assert_eq!(listener.accept().unwrap_err(), Error::Timeout);
        assert!(before.elapsed() >= Duration::from_millis(20));
        listener.settimeout(None).unwrap();
        let std_address = address.as_socket_addr().unwrap();
        let client = beside(move || TcpStream::connect(std_address).unwrap());
        let (conn, peer) = listener.accept().unwrap();
        let client = client.join();
        assert_eq!(peer.as_socket_addr(), Some(client.local_addr().unwrap()));
        assert_eq!(conn.getpeername().unwrap(), peer);
        assert_eq!(conn.getsockname().unwrap(), address);
    });
}

#[test]
fn an_accepted_socket_is_in_blocking_mode_whatever_the_listeners() {
    on_both(|| {
        for timeout in [None, Some(10.0), Some(0.0)] {
            let (listener, address) = listening();
            listener.settimeout(timeout).unwrap();
            let client = tcp();
            client.connect(&address).unwrap();
            if timeout == Some(0.0) {
                poll(&listener, libc::POLLIN);
            }
            let (conn, _peer) = listener.accept().unwrap();
            assert_eq!(conn.gettimeout(), None);
            assert_eq!(status_flags(&conn) & libc::O_NONBLOCK, 0);
            assert_eq!(descriptor_flags(&conn), libc::FD_CLOEXEC);
            assert_eq!(
                (conn.family(), conn.kind(), conn.proto()),
                (AF_INET, SOCK_STREAM, 0)
            );
        }
    });
}

#[test]
fn a_refused_connect_is_errno_111_in_every_waiting_mode() {
    on_both(|| {
        let closed = tcp();
        closed.bind(("127.0.0.1", 0)).unwrap();
        let address = closed.getsockname().unwrap();
        for timeout in [None, Some(10.0)] {
            let client = tcp();
            client.settimeout(timeout).unwrap();
            let error = client.connect(&address).unwrap_err();
            assert_eq!(error.errno(), Some(111));
            assert_eq!(error.to_string(), "[Errno 111] Connection refused");
        }
        let nowhere = fresh_path();
        let client = Socket::new(AF_UNIX, SOCK_STREAM, 0).unwrap();
        assert_eq!(errno(client.connect(&*nowhere)), Some(libc::ENOENT));
    });
}

#[test]
fn a_non_blocking_connect_is_in_progress_then_writable() {
    on_both(|| {
        let (listener, address) = listening();
        let client = tcp();
        client.setblocking(false).unwrap();
        assert_eq!(errno(client.connect(&address)), Some(libc::EINPROGRESS));
        assert_ne!(poll(&client, libc::POLLOUT) & libc::POLLOUT, 0);
        assert_eq!(client.getsockopt(SOL_SOCKET, SO_ERROR).unwrap(), 0);
        let (_conn, peer) = listener.accept().unwrap();
        assert_eq!(peer, client.getsockname().unwrap());
        // One more call tells success, and the next that it is connected.
        let _ = client.connect(&address);
        assert_eq!(errno(client.connect(&address)), Some(libc::EISCONN));
    });
}

#[test]
fn a_connect_that_times_out_goes_on_connecting() {
    on_both(|| {
        // A backlog that is full: the kernel drops further requests.
        let (listener, address) = listening();
        listener.listen(0).unwrap();
        let mut filling = Vec::new();
        let waiting = loop {
            let client = tcp();
            client.settimeout(0.05).unwrap();
            match client.connect(&address) {
                Ok(()) => filling.push(client),
                Err(error) => {
                    assert_eq!(error, Error::Timeout);
                    break client;
                }
            }
            assert!(filling.len() < 100);
        };
        assert_eq!(errno(waiting.connect(&address)), Some(libc::EALREADY));
        // With room in the backlog, the kernel's next attempt succeeds, and a blocking connect waits for it.
        for _ in 0..filling.len() {
            listener.accept().unwrap();
        }
        waiting.settimeout(None).unwrap();
        waiting.connect(&address).unwrap();
        assert_eq!(waiting.getpeername().unwrap(), address);
    });
}

#[test]
fn a_full_unix_backlog_is_eagain_once_there_is_a_timeout() {
    on_both(|| {
        let listener = Socket::new(AF_UNIX, SOCK_STREAM, 0).unwrap();
        listener.bind("").unwrap();
        listener.listen(0).unwrap();
        let address = listener.getsockname().unwrap();
        let client = || Socket::new(AF_UNIX, SOCK_STREAM, 0).unwrap();
        let first = client();
        first.connect(&address).unwrap();
        for timeout in [0.0, 10.0] {
            let next = client();
            next.settimeout(timeout).unwrap();
            assert_eq!(errno(next.connect(&address)), Some(libc::EAGAIN));
        }
        // In blocking mode it waits.
        let (done, finished) = mpsc::channel();
        let there = address.clone();
        thread::spawn(move || {
            let client = client();
            done.send(client.connect(&there).map(|()| client)).unwrap();
        });
        listener.accept().unwrap();
        listener.accept().unwrap();
        finished
            .recv_timeout(Duration::from_secs(60))
            .unwrap()
            .unwrap();
    });
}

// Receiving.

#[test]
fn recv_of_nothing_is_empty_at_once() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        assert!(right.recv(0).unwrap().is_empty());
        assert_eq!(right.recv_into(&mut []).unwrap(), 0);
        assert_eq!(right.recv_into_with(&mut [], 0, MSG_PEEK).unwrap(), 0);
        left.sendall(b"data").unwrap();
        assert!(right.recv(0).unwrap().is_empty());
        assert_eq!(right.recv_into(&mut []).unwrap(), 0);
        assert_eq!(right.recv(16).unwrap(), b"data");
        // No call of the kernel's is made: a datagram stays, and a closed socket does not mind.
        let (left, right) = socketpair_with(AF_UNIX, SOCK_DGRAM, 0).unwrap();
        left.send(b"datagram").unwrap();
        assert!(right.recv(0).unwrap().is_empty());
        assert_eq!(right.recv(16).unwrap(), b"datagram");
        right.close().unwrap();
        assert!(right.recv(0).unwrap().is_empty());
        assert_eq!(errno(right.recv(1)), Some(libc::EBADF));
    });
}

#[test]
fn recv_returns_what_is_there_and_then_the_end() {
    on_both(|| {
        for (left, right) in [socketpair().unwrap(), connected()] {
            left.sendall(b"hello").unwrap();
            assert_eq!(right.recv(3).unwrap(), b"hel");
            let mut buffer = [b'.'; 8];
            assert_eq!(right.recv_into(&mut buffer).unwrap(), 2);
            assert_eq!(&buffer, b"lo......");
            left.shutdown(SHUT_WR).unwrap();
            assert!(right.recv(16).unwrap().is_empty());
            assert_eq!(right.recv_into(&mut buffer).unwrap(), 0);
        }
    });
}

#[test]
fn recv_waits_as_the_mode_says() {
    on_both(|| {
        let (left, right) = connected();
        right.setblocking(false).unwrap();
        assert!(right.recv(1).unwrap_err().is_would_block());
        right.settimeout(0.02).unwrap();
        let before = Instant::now();
        assert_eq!(right.recv(1), Err(Error::Timeout));
        assert!(before.elapsed() >= Duration::from_millis(20));
        for timeout in [None, Some(60.0)] {
            right.settimeout(timeout).unwrap();
            let sender = left.clone();
            let sender = beside(move || sender.sendall(b"x"));
            assert_eq!(right.recv(16).unwrap(), b"x");
            sender.join().unwrap();
        }
        assert_eq!(errno(tcp().recv(1)), Some(libc::ENOTCONN));
    });
}

#[test]
fn recv_into_with_takes_a_length_that_fits_only() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        left.sendall(b"hello").unwrap();
        let mut buffer = [b'.'; 4];
        assert_eq!(
            right.recv_into_with(&mut buffer, 5, MSG_PEEK),
            Err(Error::Value("buffer too small for requested bytes".into()))
        );
        let peek = |buffer: &mut [u8], nbytes| right.recv_into_with(buffer, nbytes, MSG_PEEK);
        assert_eq!(peek(&mut buffer, 2).unwrap(), 2);
        assert_eq!(&buffer, b"he..");
        assert_eq!(peek(&mut buffer, 0).unwrap(), 4);
        assert_eq!(&buffer, b"hell");
        assert_eq!(right.recv(16).unwrap(), b"hello");
    });
}

#[test]
fn receive_flags_do_what_the_kernel_says() {
    on_both(|| {
        for (left, right) in [socketpair().unwrap(), connected()] {
            assert!(
                right
                    .recv_with(1, MSG_DONTWAIT)
                    .unwrap_err()
                    .is_would_block()
            );
            left.sendall(b"ab").unwrap();
            assert_eq!(right.recv_with(9, MSG_PEEK).unwrap(), b"ab");
            assert_eq!(right.recv_with(9, MSG_PEEK | MSG_DONTWAIT).unwrap(), b"ab");
            let sender = beside(move || {
                for byte in b"cdef" {
                    left.sendall(&[*byte]).unwrap();
                    thread::yield_now();
                }
                left
            });
            assert_eq!(right.recv_with(6, MSG_WAITALL).unwrap(), b"abcdef");
            let left = sender.join();
            // The end of the stream ends the wait for all.
            left.sendall(b"gh").unwrap();
            left.shutdown(SHUT_WR).unwrap();
            assert_eq!(right.recv_with(6, MSG_WAITALL).unwrap(), b"gh");
        }
    });
}

#[test]
fn a_look_at_all_shows_each_byte_once() {
    on_both(|| {
        for (left, right) in [socketpair().unwrap(), connected()] {
            left.sendall(b"hello").unwrap();
            let flags = MSG_PEEK | MSG_WAITALL;
            assert_eq!(right.recv_with(10, flags).unwrap(), b"hello");
            assert_eq!(right.recvfrom_with(10, flags).unwrap().0, b"hello");
            for room in [0, 64] {
                let message = right.recvmsg_with(10, room, flags).unwrap();
                assert_eq!(message.data, b"hello");
            }
            assert_eq!(right.recv(10).unwrap(), b"hello");
        }
    });
}

#[test]
fn waiting_for_all_with_a_timeout_loses_nothing() {
    on_both(|| {
        let (left, right) = connected();
        left.sendall(b"partial").unwrap();
        right.settimeout(0.05).unwrap();
        let mut got = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(30);
        while got.len() < 7 {
            match right.recv_with(100, MSG_WAITALL) {
                Ok(bytes) => got.extend_from_slice(&bytes),
                Err(error) => assert_eq!(error, Error::Timeout),
            }
            assert!(Instant::now() < deadline, "lost: {got:?}");
        }
        assert_eq!(got, b"partial");
    });
}

#[test]
fn truncation_shows_no_foreign_memory() {
    on_both(|| {
        for _ in 0..20 {
            // Memory that the next allocation of this size is likely to be given.
            drop(std::hint::black_box(vec![b'S'; 64]));
            let (left, right) = connected();
            left.sendall(&[b'.'; 64]).unwrap();
            // On TCP the flag discards the bytes: the kernel writes none of them.
            let got = right.recv_with(64, MSG_TRUNC).unwrap();
            assert!(!got.contains(&b'S'), "{got:?}");
            let (sender, receiver) = datagrams();
            sender.send(&[b'.'; 100]).unwrap();
            drop(std::hint::black_box(vec![b'S'; 10]));
            assert_eq!(receiver.recv_with(10, MSG_TRUNC).unwrap(), [b'.'; 10]);
            // Into the caller's own memory the length of the whole datagram is told.
            sender.send(&[b'.'; 100]).unwrap();
            let mut buffer = [0; 10];
            let whole = receiver.recv_into_with(&mut buffer, 0, MSG_TRUNC).unwrap();
            assert_eq!((whole, buffer), (100, [b'.'; 10]));
        }
    });
}

#[test]
fn a_buffer_larger_than_memory_is_an_error() {
    on_both(|| {
        let (_left, right) = socketpair().unwrap();
        assert_eq!(errno(right.recv(usize::MAX)), Some(libc::ENOMEM));
    });
}

// Sending.

#[test]
fn a_blocking_send_returns_when_all_is_taken() {
    on_both(|| {
        for (left, right) in [socketpair().unwrap(), connected()] {
            let drain = beside(move || {
                let mut buffer = vec![0; 50_000];
                let mut sum = 0;
                loop {
                    match right.recv_into(&mut buffer).unwrap() {
                        0 => return sum,
                        n => sum += n,
                    }
                    thread::yield_now();
                }
            });
            let bytes = vec![7; 8 << 20];
            assert_eq!(left.send(&bytes).unwrap(), 8 << 20);
            left.sendall(&bytes).unwrap();
            left.shutdown(SHUT_WR).unwrap();
            assert_eq!(drain.join(), 16 << 20);
        }
    });
}

#[test]
fn a_timed_send_returns_what_it_could_send() {
    on_both(|| {
        for (left, right) in [socketpair().unwrap(), connected()] {
            left.settimeout(0.1).unwrap();
            let bytes = vec![7; 64 << 20];
            let sent = left.send(&bytes).unwrap();
            assert!(sent > 0 && sent < bytes.len(), "{sent}");
            // Until there is no room left for a time.
            let error = loop {
                if let Err(error) = left.send(&bytes) {
                    break error;
                }
            };
            assert_eq!(error, Error::Timeout);
            assert_eq!(left.sendall(&bytes), Err(Error::Timeout));
            drop(right);
        }
    });
}

#[test]
fn a_timed_send_sends_no_more_and_no_less_than_it_says() {
    on_both(|| {
        let (left, right) = connected();
        left.settimeout(0.05).unwrap();
        let bytes: Vec<u8> = (0..32 << 20).map(|n| (n / 251) as u8).collect();
        let sent = left.send(&bytes).unwrap();
        assert!(sent > 0 && sent < bytes.len(), "{sent}");
        let drain = beside(move || {
            let mut got = Vec::new();
            (&right).read_to_end(&mut got).unwrap();
            got
        });
        left.shutdown(SHUT_WR).unwrap();
        assert!(
            drain.join() == bytes[..sent],
            "the bytes are not the first {sent}"
        );
    });
}

#[test]
fn sendall_bounds_all_its_pieces_by_one_deadline() {
    on_both(|| {
        let (left, right) = connected();
        left.settimeout(0.3).unwrap();
        // A peer that takes a little again and again: no single wait is long.
        let drain = beside(move || {
            let mut buffer = vec![0; 1000];
            while let Ok(1..) = right.recv_into(&mut buffer) {
                thread::sleep(Duration::from_millis(1));
            }
        });
        let before = Instant::now();
        assert_eq!(left.sendall(&vec![7; 256 << 20]), Err(Error::Timeout));
        assert!(before.elapsed() >= Duration::from_millis(300));
        assert!(before.elapsed() < Duration::from_secs(20));
        // With linger 0 the peer's receives end at once.
        left.setsockopt(SOL_SOCKET, SO_LINGER, &[1, 0, 0, 0, 0, 0, 0, 0])
            .unwrap();
        drop(left);
        drain.join();
    });
}

#[test]
fn a_non_blocking_sendall_ends_in_eagain_after_a_part() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        left.setblocking(false).unwrap();
        let error = left.sendall(&vec![7; 64 << 20]).unwrap_err();
        assert_eq!(error.errno(), Some(libc::EAGAIN));
        right.setblocking(false).unwrap();
        assert!(!right.recv(1 << 20).unwrap().is_empty(), "a part was sent");
        let error = left
            .sendall_with(&vec![7; 64 << 20], MSG_DONTWAIT)
            .unwrap_err();
        assert!(error.is_would_block());
    });
}

#[test]
fn send_flags_do_what_the_kernel_says() {
    on_both(|| {
        let (left, right) = connected();
        assert_eq!(left.send_with(b"oob", MSG_OOB).unwrap(), 3);
        // The last byte is the urgent one.
        assert_eq!(right.recv_with(2, MSG_WAITALL).unwrap(), b"oo");
        assert_eq!(right.recv_with(1, MSG_OOB).unwrap(), b"b");
        left.sendall_with(b"more", MSG_MORE).unwrap();
        left.sendall(b" and all").unwrap();
        assert_eq!(right.recv_with(12, MSG_WAITALL).unwrap(), b"more and all");
        fill(&left);
        assert!(
            left.send_with(b"x", MSG_DONTWAIT)
                .unwrap_err()
                .is_would_block()
        );
    });
}

#[test]
fn sendall_of_nothing_is_one_empty_datagram() {
    on_both(|| {
        for timeout in [None, Some(60.0), Some(0.0)] {
            let (left, right) = socketpair_with(AF_UNIX, SOCK_DGRAM, 0).unwrap();
            left.settimeout(timeout).unwrap();
            left.sendall(b"").unwrap();
            left.sendall(b"next").unwrap();
            right.settimeout(30).unwrap();
            assert!(right.recv(8).unwrap().is_empty());
            assert_eq!(right.recv(8).unwrap(), b"next");
        }
    });
}

fn check_send_of_nothing() {
    for timeout in [None, Some(60.0), Some(0.0)] {
        let (left, right) = socketpair_with(AF_UNIX, SOCK_DGRAM, 0).unwrap();
        left.settimeout(timeout).unwrap();
        assert_eq!(left.send(b"").unwrap(), 0);
        left.send(b"next").unwrap();
        right.settimeout(30).unwrap();
        assert!(right.recv(8).unwrap().is_empty());
        assert_eq!(right.recv(8).unwrap(), b"next", "timeout {timeout:?}");
    }
}

#[test]
fn send_of_nothing_is_one_empty_datagram_on_a_thread() {
    check_send_of_nothing();
}

#[test]
fn send_of_nothing_is_one_empty_datagram_in_a_fiber() {
    run(check_send_of_nothing);
}

#[test]
fn sending_nothing_on_a_stream_sends_nothing() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        assert_eq!(left.send(b"").unwrap(), 0);
        left.sendall(b"").unwrap();
        right.setblocking(false).unwrap();
        assert!(right.recv(8).unwrap_err().is_would_block());
    });
}

#[test]
#[ignore = "run by a_broken_pipe_is_an_error_without_a_signal"]
fn child_breaks_pipes() {
    if child_part().is_none() {
        return;
    }
    // SAFETY: it concerns this process only. Rust's runtime ignores SIGPIPE; here it would end the process.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    on_both(|| {
        for timeout in [None, Some(10.0), Some(0.0)] {
            for (left, right) in [socketpair().unwrap(), connected()] {
                left.shutdown(SHUT_WR).unwrap();
                left.settimeout(timeout).unwrap();
                assert_eq!(errno(left.send(b"x")), Some(libc::EPIPE));
                assert_eq!(errno(left.sendall(b"x")), Some(libc::EPIPE));
                assert_eq!(errno(left.send_with(b"x", MSG_DONTWAIT)), Some(libc::EPIPE));
                assert_eq!(
                    errno(left.sendall_with(b"x", MSG_DONTWAIT)),
                    Some(libc::EPIPE)
                );
                let error = (&left).write_all(b"x").unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
                drop(right);
            }
            let (left, right) = socketpair().unwrap();
            drop(right);
            left.settimeout(timeout).unwrap();
            assert_eq!(errno(left.sendall(&[0; 100_000])), Some(libc::EPIPE));
            assert_eq!(errno(tcp().send(b"x")), Some(libc::EPIPE));
        }
        // One that breaks while a send waits.
        let (left, right) = socketpair().unwrap();
        fill(&left);
        let closer = beside(move || {
            thread::sleep(Duration::from_millis(20));
            drop(right);
        });
        let error = left.sendall(&[0; 1 << 20]).unwrap_err();
        assert!(
            matches!(error.errno(), Some(libc::EPIPE | libc::ECONNRESET)),
            "{error}"
        );
        closer.join();
    });
}

#[test]
fn a_broken_pipe_is_an_error_without_a_signal() {
    let output = child("child_breaks_pipes", "all");
    assert!(
        output.status.success(),
        "signal {:?}\n{}\n{}",
        output.status.signal(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

// Ending.

#[test]
fn shutdown_wakes_a_blocked_recv_with_the_end() {
    on_both(|| {
        for timeout in [None, Some(60.0)] {
            for (left, right) in [socketpair().unwrap(), connected()] {
                right.settimeout(timeout).unwrap();
                let reader = right.clone();
                let (started, ready) = mpsc::channel();
                let reading = beside(move || {
                    started.send(()).unwrap();
                    reader.recv(16)
                });
                ready.recv_timeout(Duration::from_secs(60)).unwrap();
                right.shutdown(SHUT_RDWR).unwrap();
                assert!(reading.join().unwrap().is_empty());
                drop(left);
            }
        }
    });
}

#[test]
fn shutdown_by_another_fiber_wakes_a_blocked_recv() {
    run(|| {
        let (_left, right) = connected();
        let reader = right.clone();
        let reading = spawn(move || reader.recv(16));
        yield_now();
        assert!(!reading.is_finished());
        right.shutdown(SHUT_RD).unwrap();
        assert!(reading.join().unwrap().unwrap().is_empty());
    });
}

#[test]
fn half_a_connection_can_be_shut_down() {
    on_both(|| {
        for (left, right) in [socketpair().unwrap(), connected()] {
            left.sendall(b"request").unwrap();
            left.shutdown(SHUT_WR).unwrap();
            assert_eq!(right.recv(16).unwrap(), b"request");
            assert!(right.recv(16).unwrap().is_empty());
            right.sendall(b"reply").unwrap();
            assert_eq!(left.recv(16).unwrap(), b"reply");
            right.shutdown(SHUT_WR).unwrap();
            assert!(left.recv(16).unwrap().is_empty());
        }
        assert_eq!(errno(tcp().shutdown(SHUT_WR)), Some(libc::ENOTCONN));
        let (left, _right) = socketpair().unwrap();
        assert_eq!(errno(left.shutdown(77)), Some(libc::EINVAL));
    });
}

#[test]
fn every_call_on_a_closed_socket_is_ebadf_except_some() {
    on_both(|| {
        let (left, right) = connected();
        let address = right.getsockname().unwrap();
        left.settimeout(2.5).unwrap();
        left.close().unwrap();
        left.close().unwrap();
        assert!(right.recv(1).unwrap().is_empty(), "the peer has been told");
        let mut buffer = [0; 4];
        let closed = |code| assert_eq!(code, Some(libc::EBADF));
        closed(errno(left.accept()));
        closed(errno(left.bind(&address)));
        closed(errno(left.connect(&address)));
        closed(errno(left.listen(1)));
        closed(errno(left.recv(1)));
        closed(errno(left.recv_into(&mut buffer)));
        closed(errno(left.recv_with(1, MSG_DONTWAIT)));
        closed(errno(left.send(b"x")));
        closed(errno(left.sendall(b"x")));
        closed(errno(left.shutdown(SHUT_WR)));
        closed(errno(left.getsockname()));
        closed(errno(left.getpeername()));
        closed(errno(left.getsockopt(SOL_SOCKET, SO_TYPE)));
        closed(errno(left.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)));
        assert_eq!(left.gettimeout(), Some(2.5));
        closed(errno(left.settimeout(3)));
        assert_eq!(
            left.gettimeout(),
            Some(3.0),
            "the value is kept all the same"
        );
        closed(errno(left.setblocking(true)));
        assert_eq!(left.fileno(), -1);
        assert_eq!(
            (left.family(), left.kind(), left.proto()),
            (AF_INET, SOCK_STREAM, 0)
        );
    });
}

// Modes.

#[test]
fn the_mode_and_the_descriptors_flag_agree() {
    on_both(|| {
        let (left, _right) = socketpair().unwrap();
        let flag = || status_flags(&left) & libc::O_NONBLOCK != 0;
        assert!(!flag());
        for (timeout, expected) in [(Some(2.5), true), (Some(0.0), true), (None, false)] {
            left.settimeout(timeout).unwrap();
            assert_eq!(left.gettimeout(), timeout);
            assert_eq!(left.getblocking(), timeout != Some(0.0));
            assert_eq!(flag(), expected);
        }
        left.setblocking(false).unwrap();
        assert_eq!((left.gettimeout(), flag()), (Some(0.0), true));
        left.setblocking(true).unwrap();
        assert_eq!((left.gettimeout(), flag()), (None, false));
        let wrong = left.settimeout(-1);
        assert_eq!(
            wrong,
            Err(Error::Value("Timeout value out of range".into()))
        );
        assert!(matches!(left.settimeout(f64::NAN), Err(Error::Value(_))));
        assert!(matches!(
            left.settimeout(f64::INFINITY),
            Err(Error::Overflow(_))
        ));
        assert_eq!(left.gettimeout(), None);
        left.settimeout(1e-10).unwrap();
        assert_eq!(
            left.gettimeout(),
            Some(1e-9),
            "rounded up, not to \"do not wait\""
        );
    });
}

#[test]
fn sock_nonblock_gives_timeout_0() {
    on_both(|| {
        let socket = Socket::new(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0).unwrap();
        assert_eq!(socket.gettimeout(), Some(0.0));
        assert_ne!(status_flags(&socket) & libc::O_NONBLOCK, 0);
        assert_eq!(socket.kind(), SOCK_STREAM);
        let (_left, right) = socketpair_with(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0).unwrap();
        assert!(right.recv(1).unwrap_err().is_would_block());
        right.settimeout(None).unwrap();
        assert_eq!(status_flags(&right) & libc::O_NONBLOCK, 0);
    });
}

#[test]
fn every_descriptor_is_closed_on_exec() {
    on_both(|| {
        let (listener, address) = listening();
        let client = tcp();
        client.connect(&address).unwrap();
        let (conn, _) = listener.accept().unwrap();
        listener.setblocking(false).unwrap();
        let other = tcp();
        other.connect(&address).unwrap();
        poll(&listener, libc::POLLIN);
        let (non_blocking, _) = listener.accept().unwrap();
        let (left, right) = socketpair().unwrap();
        for socket in [&listener, &client, &conn, &non_blocking, &left, &right] {
            assert_eq!(descriptor_flags(socket), libc::FD_CLOEXEC, "{socket:?}");
        }
        // A closed one's placeholder too.
        left.close().unwrap();
        assert_eq!(descriptor_flags(&left), libc::FD_CLOEXEC);
    });
}

// Addresses.

#[test]
fn names_of_internet_sockets() {
    on_both(|| {
        assert_eq!(tcp().getsockname().unwrap().to_string(), "0.0.0.0:0");
        assert_eq!(errno(tcp().getpeername()), Some(libc::ENOTCONN));
        let v6 = || Socket::new(AF_INET6, SOCK_STREAM, 0).unwrap();
        assert_eq!(v6().getsockname().unwrap().to_string(), "[::]:0");
        let (client, conn) = connected();
        assert_eq!(client.getpeername().unwrap(), conn.getsockname().unwrap());
        assert_eq!(conn.getpeername().unwrap(), client.getsockname().unwrap());

        let listener = v6();
        if let Err(error) = listener.bind(("::1", 0)) {
            println!("skipped: no ::1 here: {error}");
            return;
        }
        listener.listen(1).unwrap();
        let address = listener.getsockname().unwrap();
        assert_eq!(address.ip(), Some(std::net::Ipv6Addr::LOCALHOST.into()));
        let client = v6();
        client
            .connect(("::1", address.port().unwrap(), 0, 0))
            .unwrap();
        let (conn, peer) = listener.accept().unwrap();
        assert_eq!(peer, client.getsockname().unwrap());
        assert_eq!(client.getpeername().unwrap(), address);
        client.sendall(b"six").unwrap();
        assert_eq!(conn.recv(8).unwrap(), b"six");
    });
}

#[test]
fn names_of_unix_sockets() {
    on_both(|| {
        let new = || Socket::new(AF_UNIX, SOCK_STREAM, 0).unwrap();
        let unnamed = Address::from(UnixAddr::Unnamed);
        assert_eq!(new().getsockname().unwrap(), unnamed);
        assert_eq!(errno(new().getpeername()), Some(libc::ENOTCONN));
        let (left, _right) = socketpair().unwrap();
        assert_eq!(left.getsockname().unwrap(), unnamed);
        assert_eq!(left.getpeername().unwrap(), unnamed);

        let path = fresh_path();
        let name = format!(
            "ringsock-{:?}-{}",
            thread::current().id(),
            std::process::id()
        );
        let mut with_nul = vec![0, b'a', 0, b'b'];
        with_nul.extend_from_slice(format!("{path:?}").as_bytes());
        let abstract_name = |bytes: &[u8]| Address::from(UnixAddr::Abstract(bytes.to_vec()));
        type Bind<'a> = &'a dyn Fn(&Socket);
        let bound: [(Bind<'_>, Address); 3] = [
            (
                &|socket| socket.bind(&*path).unwrap(),
                UnixAddr::Path(path.clone()).into(),
            ),
            (
                &|socket| socket.bind(format!("\0{name}")).unwrap(),
                abstract_name(name.as_bytes()),
            ),
            (
                &|socket| socket.bind(&with_nul).unwrap(),
                abstract_name(&with_nul[1..]),
            ),
        ];
        for (bind, expected) in bound {
            let listener = new();
            bind(&listener);
            assert_eq!(listener.getsockname().unwrap(), expected);
            listener.listen(4).unwrap();
            let client = new();
            client.connect(&expected).unwrap();
            assert_eq!(client.getpeername().unwrap(), expected);
            let (conn, peer) = listener.accept().unwrap();
            assert_eq!(peer, unnamed);
            assert_eq!(conn.getsockname().unwrap(), expected);
            assert_eq!(errno(new().bind(&expected)), Some(libc::EADDRINUSE));
        }
        std::fs::remove_file(&path).unwrap();

        // The kernel chooses a name, which shows at the other side too.
        let (listener, client) = (new(), new());
        listener.bind("").unwrap();
        client.bind(UnixAddr::Unnamed).map_or_else(
            |error| panic!("{error}"),
            |()| {
                assert_ne!(
                    client.getsockname().unwrap(),
                    listener.getsockname().unwrap()
                )
            },
        );
        let chosen = listener.getsockname().unwrap();
        assert!(
            matches!(&chosen, Address::Unix(UnixAddr::Abstract(name)) if name.len() == 5),
            "{chosen:?}"
        );
        listener.listen(1).unwrap();
        client.connect(&chosen).unwrap();
        let (_conn, peer) = listener.accept().unwrap();
        assert_eq!(peer, client.getsockname().unwrap());
    });
}

// Options.

#[test]
fn options_are_integers_bytes_or_nothing() {
    on_both(|| {
        let socket = tcp();
        socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1).unwrap();
        assert_eq!(socket.getsockopt(SOL_SOCKET, SO_REUSEADDR).unwrap(), 1);
        socket.setsockopt(SOL_SOCKET, SO_KEEPALIVE, true).unwrap();
        assert_eq!(socket.getsockopt(SOL_SOCKET, SO_KEEPALIVE).unwrap(), 1);
        socket
            .setsockopt(SOL_SOCKET, SO_KEEPALIVE, OptionValue::Int(0))
            .unwrap();
        assert_eq!(socket.getsockopt(SOL_SOCKET, SO_KEEPALIVE).unwrap(), 0);
        let linger = [1, 0, 0, 0, 7, 0, 0, 0];
        socket.setsockopt(SOL_SOCKET, SO_LINGER, &linger).unwrap();
        assert_eq!(
            socket.getsockopt_buf(SOL_SOCKET, SO_LINGER, 64).unwrap(),
            linger
        );
        let off: &[u8] = &[0; 8];
        socket.setsockopt(SOL_SOCKET, SO_LINGER, off).unwrap();
        // The kernel keeps the time.
        assert_eq!(
            socket.getsockopt_buf(SOL_SOCKET, SO_LINGER, 4).unwrap(),
            [0; 4]
        );
        // A result is cut to what the kernel gave, or to what was asked for.
        assert_eq!(
            socket
                .getsockopt_buf(SOL_SOCKET, SO_TYPE, 1024)
                .unwrap()
                .len(),
            4
        );
        assert_eq!(socket.getsockopt_buf(SOL_SOCKET, SO_TYPE, 1).unwrap(), [1]);
        for buflen in [0, 1025, usize::MAX] {
            assert_eq!(
                socket.getsockopt_buf(SOL_SOCKET, SO_TYPE, buflen),
                Err(Error::Message("getsockopt buflen out of range".into()))
            );
        }
        let unknown = socket.getsockopt(SOL_SOCKET, 9999);
        assert_eq!(errno(unknown), Some(libc::ENOPROTOOPT));
        let unknown = socket.setsockopt(SOL_SOCKET, 9999, 1);
        assert_eq!(errno(unknown), Some(libc::ENOPROTOOPT));
        let short = socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, &[1]);
        assert_eq!(errno(short), Some(libc::EINVAL));
        // A null pointer is handed on as it is.
        let null = socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, OptionValue::Null(4));
        assert_eq!(errno(null), Some(libc::EFAULT));
    });
}

// Other types of sockets.

#[test]
fn datagrams_and_packets_keep_their_bounds() {
    on_both(|| {
        for kind in [SOCK_DGRAM, SOCK_SEQPACKET] {
            let (left, right) = socketpair_with(AF_UNIX, kind, 0).unwrap();
            assert_eq!(left.kind(), kind);
            for message in [&b"one"[..], b"three", b"7 bytes"] {
                assert_eq!(left.send(message).unwrap(), message.len());
            }
            assert_eq!(right.recv(1024).unwrap(), b"one");
            assert_eq!(right.recv(2).unwrap(), b"th", "the rest is cut off");
            let mut buffer = [0; 7];
            assert_eq!(right.recv_into(&mut buffer).unwrap(), 7);
            assert_eq!(&buffer, b"7 bytes");
            assert_eq!(errno(left.send(&vec![0; 16 << 20])), Some(libc::EMSGSIZE));
        }
        let (left, right) = socketpair_with(AF_UNIX, SOCK_SEQPACKET, 0).unwrap();
        drop(left);
        assert!(right.recv(1).unwrap().is_empty());
    });
}

#[test]
fn a_refused_datagram_is_told_at_the_next_call() {
    on_both(|| {
        let (sender, receiver) = datagrams();
        sender.settimeout(30).unwrap();
        drop(receiver);
        sender.send(b"nobody there").unwrap();
        assert_eq!(errno(sender.recv(16)), Some(libc::ECONNREFUSED));
    });
}

// Several users of one socket.

/// Sends `total` bytes that count up, in pieces of random lengths.
fn send_counted(socket: &Socket, total: usize, seed: u64) {
    let bytes: Vec<u8> = (0..total).map(|n| (n % 251) as u8).collect();
    let mut rest = &bytes[..];
    let mut random = Random::new(seed);
    while !rest.is_empty() {
        let n = rest.len().min(random.up_to(20_000));
        socket.sendall(&rest[..n]).unwrap();
        rest = &rest[n..];
    }
}

/// Receives bytes that count up.
fn receive_counted(socket: &Socket, total: usize, seed: u64) {
    let mut buffer = vec![0; 20_000];
    let mut got = 0;
    let mut random = Random::new(seed);
    while got < total {
        let most = random.up_to(buffer.len());
        let n = socket.recv_into(&mut buffer[..most]).unwrap();
        assert_ne!(n, 0);
        for byte in &buffer[..n] {
            assert_eq!(*byte, (got % 251) as u8, "at {got}");
            got += 1;
        }
    }
}

const DUPLEX_BYTES: usize = 4 << 20;

#[test]
fn two_fibers_send_and_receive_at_once_on_one_socket() {
    let seed = seed();
    run(move || {
        for timeout in [None, Some(60.0)] {
            for (left, right) in [socketpair().unwrap(), connected()] {
                let mut fibers = Vec::new();
                for (n, socket) in (1..).zip([left, right]) {
                    socket.settimeout(timeout).unwrap();
                    let other = socket.clone();
                    fibers.push(spawn(move || send_counted(&socket, DUPLEX_BYTES, seed ^ n)));
                    let receive = move || receive_counted(&other, DUPLEX_BYTES, seed + n);
                    fibers.push(spawn(receive));
                }
                for fiber in fibers {
                    fiber.join().unwrap();
                }
            }
        }
    });
}

#[test]
fn two_threads_send_and_receive_at_once_on_one_socket() {
    let seed = seed();
    for timeout in [None, Some(60.0)] {
        for (left, right) in [socketpair().unwrap(), connected()] {
            let mut threads = Vec::new();
            for (n, socket) in (1..).zip([left, right]) {
                socket.settimeout(timeout).unwrap();
                let other = socket.clone();
                threads.push(beside(move || {
                    send_counted(&socket, DUPLEX_BYTES, seed ^ n)
                }));
                let receive = move || receive_counted(&other, DUPLEX_BYTES, seed + n);
                threads.push(beside(receive));
            }
            threads.into_iter().for_each(Beside::join);
        }
    }
}

/// What four receivers of one socket saw: how many bytes, and how often each value.
#[derive(Default)]
struct Tally {
    bytes: AtomicU64,
    sum: AtomicU64,
}

impl Tally {
    fn receive(&self, socket: &Socket) {
        let mut buffer = [0; 3000];
        loop {
            let n = socket.recv_into(&mut buffer).unwrap();
            if n == 0 {
                return;
            }
            let sum = buffer[..n].iter().map(|byte| u64::from(*byte)).sum();
            self.bytes.fetch_add(n as u64, Ordering::Relaxed);
            self.sum.fetch_add(sum, Ordering::Relaxed);
        }
    }

    fn check(&self) {
        let expected: u64 = (0..DUPLEX_BYTES).map(|n| (n % 251) as u64).sum();
        assert_eq!(self.bytes.load(Ordering::Relaxed), DUPLEX_BYTES as u64);
        assert_eq!(self.sum.load(Ordering::Relaxed), expected);
    }
}

#[test]
fn four_fibers_receive_each_byte_once() {
    let seed = seed();
    run(move || {
        for (left, right) in [socketpair().unwrap(), connected()] {
            let tally = Arc::new(Tally::default());
            let receivers: Vec<_> = (0..4)
                .map(|_| {
                    let (socket, tally) = (right.clone(), tally.clone());
                    spawn(move || tally.receive(&socket))
                })
                .collect();
            send_counted(&left, DUPLEX_BYTES, seed);
            left.shutdown(SHUT_WR).unwrap();
            for receiver in receivers {
                receiver.join().unwrap();
            }
            tally.check();
        }
    });
}

#[test]
fn four_threads_receive_each_byte_once() {
    let seed = seed();
    for (left, right) in [socketpair().unwrap(), connected()] {
        let tally = Arc::new(Tally::default());
        let receivers: Vec<_> = (0..4)
            .map(|_| {
                let (socket, tally) = (right.clone(), tally.clone());
                beside(move || tally.receive(&socket))
            })
            .collect();
        send_counted(&left, DUPLEX_BYTES, seed);
        left.shutdown(SHUT_WR).unwrap();
        receivers.into_iter().for_each(Beside::join);
        tally.check();
    }
}

#[test]
fn datagrams_to_four_fibers_arrive_once_each() {
    run(|| {
        let (left, right) = socketpair_with(AF_UNIX, SOCK_SEQPACKET, 0).unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let receivers: Vec<_> = (0..4)
            .map(|_| {
                let (socket, seen) = (right.clone(), seen.clone());
                spawn(move || {
                    loop {
                        let message = socket.recv(16).unwrap();
                        if message.is_empty() {
                            return;
                        }
                        let number = u32::from_le_bytes((*message).try_into().unwrap());
                        seen.lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push(number);
                    }
                })
            })
            .collect();
        for number in 0..2000_u32 {
            left.send(&number.to_le_bytes()).unwrap();
        }
        drop(left);
        for receiver in receivers {
            receiver.join().unwrap();
        }
        let mut seen = std::mem::take(&mut *seen.lock().unwrap());
        seen.sort_unstable();
        assert_eq!(seen, (0..2000).collect::<Vec<_>>());
    });
}

#[test]
fn sockets_go_from_thread_to_worker_to_worker() {
    let runtime = Runtime::builder().workers(2).build().unwrap();
    let handle = runtime.handle();
    let (left, right) = connected();
    left.sendall(b"from a thread,").unwrap();
    let hop = right.clone();
    let theirs = handle.clone();
    let fiber = handle.spawn_on(0, move || {
        assert_eq!(hop.recv_with(14, MSG_WAITALL).unwrap(), b"from a thread,");
        hop.sendall(b"worker 0,").unwrap();
        let next = theirs.spawn_on(1, move || {
            hop.sendall(b"worker 1").unwrap();
            hop
        });
        next.unwrap().join().unwrap()
    });
    let back = fiber.unwrap().join().unwrap();
    assert_eq!(back.fileno(), right.fileno());
    assert_eq!(
        left.recv_with(17, MSG_WAITALL).unwrap(),
        b"worker 0,worker 1"
    );
    // Both workers and this thread wait on one socket: each message wakes one of them.
    let fibers: Vec<_> = (0..2)
        .map(|worker| {
            let socket = right.clone();
            handle.spawn_on(worker, move || socket.recv(1)).unwrap()
        })
        .collect();
    let socket = right.clone();
    let thread = beside(move || socket.recv(1));
    for _ in 0..3 {
        left.sendall(b"x").unwrap();
    }
    for fiber in fibers {
        assert_eq!(fiber.join().unwrap().unwrap(), b"x");
    }
    assert_eq!(thread.join().unwrap(), b"x");
}

#[test]
fn a_clone_is_the_same_object() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        let clone = left.clone();
        assert_eq!(clone.fileno(), left.fileno());
        left.settimeout(2.5).unwrap();
        assert_eq!(clone.gettimeout(), Some(2.5));
        drop(left);
        clone.sendall(b"still open").unwrap();
        assert_eq!(right.recv(16).unwrap(), b"still open");
        let other = clone.clone();
        clone.close().unwrap();
        assert_eq!(other.fileno(), -1);
        assert_eq!(errno(other.send(b"x")), Some(libc::EBADF));
        assert!(right.recv(1).unwrap().is_empty());
    });
}

#[test]
fn debug_looks_like_pythons_repr() {
    on_both(|| {
        let (client, conn) = connected();
        let (mine, theirs) = (client.getsockname().unwrap(), conn.getsockname().unwrap());
        assert_eq!(
            format!("{client:?}"),
            format!(
                "<ringsock.Socket fd={}, family=AF_INET, type=SOCK_STREAM, proto=0, laddr={mine}, raddr={theirs}>",
                client.fileno()
            )
        );
        let fresh = tcp();
        assert_eq!(
            format!("{fresh:?}"),
            format!(
                "<ringsock.Socket fd={}, family=AF_INET, type=SOCK_STREAM, proto=0, laddr=0.0.0.0:0>",
                fresh.fileno()
            )
        );
        client.close().unwrap();
        assert_eq!(
            format!("{client:?}"),
            "<ringsock.Socket [closed] fd=-1, family=AF_INET, type=SOCK_STREAM, proto=0>"
        );
    });
}

// Beside std.

#[test]
fn read_and_write_work_with_std_io() {
    on_both(|| {
        let (left, right) = connected();
        let lines = beside(move || {
            let mut lines = Vec::new();
            for line in BufReader::new(&right).lines() {
                let line = line.unwrap();
                writeln!(&right, "got {line}").unwrap();
                lines.push(line);
            }
            right.shutdown(SHUT_WR).unwrap();
            lines
        });
        let mut writer = left.clone();
        writer.write_all(b"one\ntwo\n").unwrap();
        writer.write_all(b"").unwrap();
        write!(writer, "thr").unwrap();
        writer.flush().unwrap();
        writeln!(writer, "ee").unwrap();
        left.shutdown(SHUT_WR).unwrap();
        let mut replies = String::new();
        (&left).read_to_string(&mut replies).unwrap();
        assert_eq!(replies, "got one\ngot two\ngot three\n");
        assert_eq!(lines.join(), ["one", "two", "three"]);

        // Copied through two connections, from one socket to another.
        let ((source, mut copy_from), (mut copy_to, sink)) = (connected(), socketpair().unwrap());
        let seed = seed();
        let sender = beside(move || send_counted(&source, DUPLEX_BYTES, seed));
        let receiver = beside(move || receive_counted(&sink, DUPLEX_BYTES, seed));
        let copied = std::io::copy(&mut copy_from, &mut copy_to).unwrap();
        assert_eq!(copied, DUPLEX_BYTES as u64);
        sender.join();
        receiver.join();

        // A timeout is an error of std's too.
        let (left, _right) = socketpair().unwrap();
        left.settimeout(0.01).unwrap();
        let error = (&left).read(&mut [0; 4]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
        left.setblocking(false).unwrap();
        let error = (&left).read(&mut [0; 4]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    });
}

#[test]
fn std_peers_see_a_socket_like_any_other() {
    on_both(|| {
        // A server of std's.
        let server = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = server.local_addr().unwrap();
        let echo = beside(move || {
            let (mut conn, peer) = server.accept().unwrap();
            let mut reader = conn.try_clone().unwrap();
            std::io::copy(&mut reader, &mut conn).unwrap();
            conn.shutdown(std::net::Shutdown::Both).unwrap();
            peer
        });
        let client = tcp();
        client.connect(address).unwrap();
        client.sendall(b"hello std").unwrap();
        assert_eq!(client.recv_with(9, MSG_WAITALL).unwrap(), b"hello std");
        client.shutdown(SHUT_WR).unwrap();
        assert!(client.recv(1).unwrap().is_empty());
        assert_eq!(
            client.getsockname().unwrap().as_socket_addr(),
            Some(echo.join())
        );

        // A client of std's.
        let (listener, address) = listening();
        let address = address.as_socket_addr().unwrap();
        let client = beside(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"hello ringsock").unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut reply = Vec::new();
            stream.read_to_end(&mut reply).unwrap();
            reply
        });
        let (conn, _peer) = listener.accept().unwrap();
        let mut request = Vec::new();
        (&conn).read_to_end(&mut request).unwrap();
        assert_eq!(request, b"hello ringsock");
        conn.sendall(b"hello back").unwrap();
        drop(conn);
        assert_eq!(client.join(), b"hello back");
    });
}

#[test]
fn a_reset_by_the_peer_is_econnreset() {
    on_both(|| {
        let (listener, address) = listening();
        let address = address.as_socket_addr().unwrap();
        let client = beside(move || TcpStream::connect(address).unwrap());
        let (conn, _peer) = listener.accept().unwrap();
        conn.sendall(b"unread").unwrap();
        let client = client.join();
        // Closing with bytes unread resets the connection.
        let mut first = [0];
        client.peek(&mut first).unwrap();
        drop(client);
        conn.settimeout(30).unwrap();
        assert_eq!(errno(conn.recv(1)), Some(libc::ECONNRESET));
    });
}

#[test]
fn the_descriptor_works_with_poll() {
    on_both(|| {
        let (left, right) = connected();
        assert_ne!(poll(&left, libc::POLLIN | libc::POLLOUT) & libc::POLLOUT, 0);
        left.sendall(b"x").unwrap();
        assert_ne!(poll(&right, libc::POLLIN) & libc::POLLIN, 0);
        assert_eq!(right.recv(1).unwrap(), b"x");
    });
}

/// A fiber that receives lets the others go first. What they do to the mode meanwhile holds for the next call.
#[test]
fn a_receive_goes_by_the_mode_in_which_it_began() {
    run(|| {
        let (left, right) = socketpair().unwrap();
        let reader = spawn({
            let right = right.clone();
            move || right.recv(16)
        });
        let switcher = spawn(move || right.setblocking(false));
        switcher.join().unwrap().unwrap();
        sleep(0.01).unwrap();
        assert!(!reader.is_finished(), "it waits");
        left.sendall(b"late").unwrap();
        assert_eq!(reader.join().unwrap().unwrap(), b"late");
    });
}
