//! Datagrams: sendto and recvfrom over UDP and AF_UNIX, in fibers and on plain threads, and beside Python's sockets.
#![allow(unsafe_code)]

mod support;

use std::io::{BufRead, BufReader};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use ringsock::prelude::*;
use ringsock::{UnixAddr, run, socketpair, socketpair_with, spawn, yield_now};
use support::{beside, errno, on_both};

/// Longer than any wait of a test that goes well, in seconds.
const LONG: f64 = 60.0;

/// A UDP socket bound to the loopback address of `family`; `None`, said on a line, where there is no IPv6.
fn try_udp(family: ringsock::Family) -> Option<(Socket, Address)> {
    let host = if family == AF_INET {
        "127.0.0.1"
    } else {
        "::1"
    };
    let bound = Socket::new(family, SOCK_DGRAM, 0).and_then(|socket| {
        socket.bind((host, 0))?;
        let address = socket.getsockname()?;
        Ok((socket, address))
    });
    match bound {
        Err(error) if family == AF_INET6 => {
            println!("skipped: no IPv6 here: {error}");
            None
        }
        bound => Some(bound.unwrap()),
    }
}

fn udp() -> (Socket, Address) {
    try_udp(AF_INET).unwrap()
}

fn unix() -> Socket {
    Socket::new(AF_UNIX, SOCK_DGRAM, 0).unwrap()
}

fn fresh_path() -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!(
        "ringsock-datagrams-{}-{number}",
        std::process::id()
    ))
}

/// Waits until there is something for a call that does not wait.
fn readable(socket: &Socket) {
    let mut poll = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid entry; the kernel fills `revents`.
    assert_eq!(unsafe { libc::poll(&mut poll, 1, 60_000) }, 1);
}

/// Each mode in turn, with data at hand where the mode does not wait.
fn in_each_mode(socket: &Socket, mut test: impl FnMut()) {
    for timeout in [None, Some(LONG), Some(0.0)] {
        socket.settimeout(timeout).unwrap();
        test();
    }
    socket.settimeout(None).unwrap();
}

// UDP.

#[test]
fn datagrams_keep_their_boundaries_and_their_senders() {
    on_both(|| {
        for family in [AF_INET, AF_INET6] {
            let Some((receiver, to)) = try_udp(family) else {
                return;
            };
            let (sender, from) = try_udp(family).unwrap();
            in_each_mode(&receiver, || {
                in_each_mode(&sender, || {
                    assert_eq!(sender.sendto(b"first", &to).unwrap(), 5);
                    assert_eq!(sender.sendto_with(b"second", MSG_DONTWAIT, &to).unwrap(), 6);
                    readable(&receiver);
                    let (data, peer) = receiver.recvfrom(1024).unwrap();
                    assert_eq!((&data[..], peer.as_ref()), (&b"first"[..], Some(&from)));
                    readable(&receiver);
                    let mut buffer = [0xaa; 16];
                    let (length, peer) = receiver.recvfrom_into(&mut buffer).unwrap();
                    assert_eq!((length, peer), (6, Some(from.clone())));
                    assert_eq!(&buffer[..7], b"second\xaa");
                });
            });
            assert_eq!(sender.getsockname().unwrap(), from);
        }
    });
}

#[test]
fn recvfrom_waits_as_the_mode_says() {
    on_both(|| {
        let (receiver, to) = udp();
        receiver.setblocking(false).unwrap();
        assert_eq!(errno(receiver.recvfrom(16)), Some(libc::EAGAIN));
        receiver.settimeout(0.03).unwrap();
        let before = Instant::now();
        assert_eq!(receiver.recvfrom(16).unwrap_err(), Error::Timeout);
        assert!(before.elapsed() >= Duration::from_millis(29));
        let before = Instant::now();
        let dontwait = receiver.recvfrom_with(16, MSG_DONTWAIT);
        assert_eq!(errno(dontwait), Some(libc::EAGAIN));
        assert!(before.elapsed() < Duration::from_secs(30));
        for timeout in [None, Some(LONG)] {
            receiver.settimeout(timeout).unwrap();
            let (sender, from) = udp();
            let to = to.clone();
            let sending = beside(move || {
                thread::sleep(Duration::from_millis(20));
                sender.sendto(b"late", to).unwrap()
            });
            let (data, peer) = receiver.recvfrom(16).unwrap();
            assert_eq!((&data[..], peer), (&b"late"[..], Some(from)));
            assert_eq!(sending.join(), 4);
        }
    });
}

#[test]
fn what_does_not_fit_is_cut_and_msg_trunc_tells_the_length() {
    on_both(|| {
        let (receiver, to) = udp();
        let (sender, _) = udp();
        in_each_mode(&receiver, || {
            let next = || {
                sender.sendto(b"hello", &to).unwrap();
                readable(&receiver);
            };
            next();
            assert_eq!(receiver.recvfrom(2).unwrap().0, b"he");
            next();
            assert_eq!(receiver.recv(2).unwrap(), b"he");
            next();
            let mut buffer = [0xaa; 4];
            assert_eq!(receiver.recvfrom_into(&mut buffer[..3]).unwrap().0, 3);
            assert_eq!(&buffer, b"hel\xaa");

            next();
            let cut = receiver.recvfrom_with(2, MSG_TRUNC).unwrap();
            assert_eq!(cut.0, b"he");
            next();
            let mut buffer = [0xaa; 4];
            let cut = receiver.recvfrom_into_with(&mut buffer, 3, MSG_TRUNC);
            assert_eq!((cut.unwrap().0, &buffer), (5, b"hel\xaa"));
            next();
            let mut buffer = [0xaa; 4];
            let cut = receiver.recv_into_with(&mut buffer, 3, MSG_TRUNC);
            assert_eq!((cut.unwrap(), &buffer), (5, b"hel\xaa"));
            next();
            let mut uninit = [MaybeUninit::uninit(); 4];
            let filled = receiver.recv_uninit_with(&mut uninit, MSG_TRUNC);
            assert_eq!(filled.unwrap(), b"hell");
            next();
            // Longer than the datagram: only what arrived.
            let mut uninit = [MaybeUninit::uninit(); 16];
            assert_eq!(receiver.recv_uninit(&mut uninit).unwrap(), b"hello");
            let none = receiver.recvfrom_with(16, MSG_DONTWAIT);
            assert_eq!(errno(none), Some(libc::EAGAIN), "nothing may be left");
        });
    });
}

/// On TCP the kernel counts the bytes that MSG_TRUNC discards, and writes none of them.
#[test]
fn discarded_bytes_read_as_zeros_where_memory_was_not_initialised() {
    on_both(|| {
        let server = ringsock::create_server(("127.0.0.1", 0)).unwrap();
        let client = ringsock::create_connection(server.getsockname().unwrap()).unwrap();
        let (conn, _) = server.accept().unwrap();
        client.sendall(b"abcdefgh").unwrap();
        let flags = MSG_TRUNC | MSG_WAITALL;
        let mut buffer = [MaybeUninit::new(0xaa); 4];
        let discarded = conn.recv_uninit_with(&mut buffer, flags).unwrap();
        assert_eq!(discarded, [0; 4]);
        assert_eq!(conn.recvfrom_with(2, flags).unwrap().0, [0; 2]);
        assert_eq!(conn.recv(16).unwrap(), b"gh");
    });
}

#[test]
fn nbytes_beyond_the_buffer_is_a_value_error() {
    on_both(|| {
        let (receiver, _) = udp();
        let mut buffer = [0; 4];
        assert_eq!(
            receiver.recvfrom_into_with(&mut buffer, 5, MSG_DONTWAIT),
            Err(Error::Value(
                "nbytes is greater than the length of the buffer".into()
            ))
        );
    });
}

#[test]
fn an_empty_datagram_is_data() {
    on_both(|| {
        let (receiver, to) = udp();
        let (sender, from) = udp();
        in_each_mode(&receiver, || {
            in_each_mode(&sender, || {
                assert_eq!(sender.sendto(b"", &to).unwrap(), 0);
                readable(&receiver);
                let (data, peer) = receiver.recvfrom(16).unwrap();
                assert_eq!((data.len(), peer.as_ref()), (0, Some(&from)));
            });
        });
        sender.connect(&to).unwrap();
        sender.sendall(b"").unwrap();
        assert_eq!(sender.send(b"").unwrap(), 0);
        for _ in 0..2 {
            let (data, peer) = receiver.recvfrom(16).unwrap();
            assert_eq!((data.len(), peer.as_ref()), (0, Some(&from)));
        }
    });
}

#[test]
fn recvfrom_of_nothing_takes_a_datagram_and_recv_of_nothing_does_not() {
    on_both(|| {
        let (receiver, to) = udp();
        let (sender, from) = udp();
        in_each_mode(&receiver, || {
            for data in [b"one", b"two", b"six"] {
                sender.sendto(data, &to).unwrap();
            }
            readable(&receiver);
            assert_eq!(receiver.recv(0).unwrap(), b"");
            assert_eq!(receiver.recv_into(&mut []).unwrap(), 0);
            assert_eq!(receiver.recv_uninit(&mut []).unwrap(), b"");
            let (data, peer) = receiver.recvfrom(0).unwrap();
            assert_eq!((data.len(), peer), (0, Some(from.clone())));
            let (length, peer) = receiver.recvfrom_into(&mut []).unwrap();
            assert_eq!((length, peer), (0, Some(from.clone())));
            assert_eq!(receiver.recvfrom(16).unwrap().0, b"six");
        });
    });
}

#[test]
fn a_connected_datagram_socket_hears_its_peer_and_may_send_elsewhere() {
    on_both(|| {
        for family in [AF_INET, AF_INET6] {
            let Some((peer, peer_address)) = try_udp(family) else {
                return;
            };
            let (other, other_address) = try_udp(family).unwrap();
            let (socket, address) = try_udp(family).unwrap();
            socket.connect(&peer_address).unwrap();
            assert_eq!(socket.getpeername().unwrap(), peer_address);
            assert_eq!(socket.sendto(b"elsewhere", &other_address).unwrap(), 9);
            assert_eq!(
                other.recvfrom(16).unwrap(),
                (b"elsewhere".to_vec().into_buf(), Some(address.clone()))
            );
            socket.send(b"to the peer").unwrap();
            assert_eq!(peer.recvfrom(16).unwrap().0, b"to the peer");
            // What others send is not for it.
            other.sendto(b"stranger", &address).unwrap();
            peer.sendto(b"peer", &address).unwrap();
            let (data, from) = socket.recvfrom(16).unwrap();
            assert_eq!((&data[..], from), (&b"peer"[..], Some(peer_address)));
        }
    });
}

/// For comparing what `recvfrom` returns as one value.
trait IntoBuf {
    fn into_buf(self) -> Buf;
}

impl IntoBuf for Vec<u8> {
    fn into_buf(self) -> Buf {
        let (left, right) = socketpair_with(AF_UNIX, SOCK_DGRAM, 0).unwrap();
        left.send(&self).unwrap();
        right.recv(self.len().max(1)).unwrap()
    }
}

#[test]
fn a_refused_datagram_is_told_to_its_connected_sender() {
    on_both(|| {
        for timeout in [None, Some(LONG)] {
            let nobody = udp().1;
            let (sender, _) = udp();
            sender.settimeout(timeout).unwrap();
            sender.connect(&nobody).unwrap();
            sender.send(b"hello").unwrap();
            assert_eq!(errno(sender.recvfrom(16)), Some(libc::ECONNREFUSED));
            // A call that waits already is woken by the refusal.
            let other = sender.dup().unwrap();
            let sending = beside(move || {
                thread::sleep(Duration::from_millis(20));
                other.send(b"hello").unwrap()
            });
            assert_eq!(errno(sender.recvfrom(16)), Some(libc::ECONNREFUSED));
            sending.join();
            // To whoever did not connect it is not told.
            let (stranger, _) = udp();
            stranger.sendto(b"hello", &nobody).unwrap();
            let told = stranger.recvfrom_with(16, MSG_DONTWAIT);
            assert_eq!(errno(told), Some(libc::EAGAIN));
        }
    });
}

#[test]
fn the_error_queue_is_read_without_waiting() {
    on_both(|| {
        let nobody = udp().1;
        let (sender, _) = udp();
        // linux/in.h.
        const IP_RECVERR: i32 = 11;
        sender.setsockopt(IPPROTO_IP, IP_RECVERR, 1).unwrap();
        in_each_mode(&sender, || {
            let empty = sender.recvfrom_with(16, MSG_ERRQUEUE);
            assert_eq!(errno(empty), Some(libc::EAGAIN));
            sender.sendto(b"hello", &nobody).unwrap();
            readable(&sender);
            // The datagram that came back, and where it was sent to.
            let (data, to) = sender.recvfrom_with(16, MSG_ERRQUEUE).unwrap();
            assert_eq!((&data[..], to), (&b"hello"[..], Some(nobody.clone())));
            let empty = sender.recv_with(16, MSG_ERRQUEUE);
            assert_eq!(errno(empty), Some(libc::EAGAIN));
            // The same refusal is the socket's pending error, too.
            let pending = sender.getsockopt(SOL_SOCKET, SO_ERROR).unwrap();
            assert!([0, libc::ECONNREFUSED].contains(&pending));
        });
    });
}

#[test]
fn urgent_data_is_there_or_not() {
    on_both(|| {
        let server = ringsock::create_server(("127.0.0.1", 0)).unwrap();
        let client = ringsock::create_connection(server.getsockname().unwrap()).unwrap();
        let (conn, _) = server.accept().unwrap();
        in_each_mode(&conn, || {
            assert_eq!(errno(conn.recv_with(1, MSG_OOB)), Some(libc::EINVAL));
            assert_eq!(client.send_with(b"!", MSG_OOB).unwrap(), 1);
            let mut poll = libc::pollfd {
                fd: conn.as_raw_fd(),
                events: libc::POLLPRI,
                revents: 0,
            };
            // SAFETY: one valid entry; the kernel fills `revents`.
            assert_eq!(unsafe { libc::poll(&mut poll, 1, 60_000) }, 1);
            assert_eq!(conn.recvfrom_with(1, MSG_OOB).unwrap().0, b"!");
            assert_eq!(errno(conn.recv_with(1, MSG_OOB)), Some(libc::EINVAL));
            // Ordinary bytes on both sides of the mark, for the next round.
            client.sendall(b"x").unwrap();
            readable(&conn);
            assert_eq!(conn.recv(16).unwrap(), b"x");
        });
    });
}

#[test]
fn a_datagram_that_is_too_long_is_emsgsize() {
    on_both(|| {
        let (receiver, to) = udp();
        let (sender, _) = udp();
        in_each_mode(&sender, || {
            assert_eq!(
                errno(sender.sendto(&[1; 65_508], &to)),
                Some(libc::EMSGSIZE)
            );
            assert_eq!(sender.sendto(&[1; 65_507], &to).unwrap(), 65_507);
            readable(&receiver);
            let (data, _) = receiver.recvfrom(100_000).unwrap();
            assert!(data == vec![1; 65_507]);
        });
    });
}

#[test]
fn a_broadcast_needs_the_option() {
    on_both(|| {
        let (receiver, _) = udp();
        receiver.set_broadcast(true).unwrap();
        let (sender, _) = udp();
        let everybody = ("127.255.255.255", 9);
        in_each_mode(&sender, || {
            sender.set_broadcast(false).unwrap();
            let refused = sender.sendto(b"hello", everybody);
            assert_eq!(errno(refused), Some(libc::EACCES));
            sender.set_broadcast(true).unwrap();
            assert_eq!(sender.sendto(b"hello", everybody).unwrap(), 5);
        });
    });
}

#[test]
fn a_multicast_group_hears_what_is_sent_to_it() {
    on_both(|| {
        let group = Ipv4Addr::new(239, 255, 83, 41);
        let lo = Ipv4Addr::LOCALHOST;
        let receiver = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
        receiver.bind(("", 0)).unwrap();
        receiver.settimeout(LONG).unwrap();
        let port = receiver.getsockname().unwrap().port().unwrap();
        let (sender, from) = udp();
        let interface = lo.octets();
        sender
            .setsockopt(IPPROTO_IP, IP_MULTICAST_IF, &interface)
            .unwrap();
        assert_eq!(
            sender
                .getsockopt_buf(IPPROTO_IP, IP_MULTICAST_IF, 4)
                .unwrap(),
            interface
        );
        let mut membership = [0; 8];
        membership[..4].copy_from_slice(&group.octets());
        membership[4..].copy_from_slice(&interface);
        // As in Python, by the bytes of a struct ip_mreq.
        if let Err(error) = receiver.setsockopt(IPPROTO_IP, IP_ADD_MEMBERSHIP, &membership) {
            println!("skipped: no multicast on the loopback interface: {error}");
            return;
        }
        let again = receiver.join_multicast_v4(group, lo);
        assert_eq!(errno(again), Some(libc::EADDRINUSE), "joined already");
        if let Err(error) = sender.sendto(b"all", (group, port)) {
            println!("skipped: no multicast on the loopback interface: {error}");
            return;
        }
        let (data, peer) = receiver.recvfrom(16).unwrap();
        assert_eq!((&data[..], peer), (&b"all"[..], Some(from.clone())));
        // The loopback interface brings back what it is given, so this can only be set and read here.
        for on in [0, 1] {
            sender
                .setsockopt(IPPROTO_IP, IP_MULTICAST_LOOP, on)
                .unwrap();
            let read = sender.getsockopt(IPPROTO_IP, IP_MULTICAST_LOOP).unwrap();
            assert_eq!(read, on);
        }
        // No longer: what is sent straight comes first.
        receiver.leave_multicast_v4(group, lo).unwrap();
        let left = receiver.leave_multicast_v4(group, lo);
        assert_eq!(errno(left), Some(libc::EADDRNOTAVAIL));
        receiver
            .setsockopt(IPPROTO_IP, IP_MULTICAST_ALL, 0)
            .unwrap();
        sender.sendto(b"unheard", (group, port)).unwrap();
        sender.sendto(b"straight", (lo, port)).unwrap();
        assert_eq!(receiver.recvfrom(16).unwrap().0, b"straight");
    });
}

/// linux/in.h: whether groups that others joined are heard.
const IP_MULTICAST_ALL: i32 = 49;

#[test]
fn a_multicast_group_of_ipv6_hears_what_is_sent_to_it() {
    on_both(|| {
        if try_udp(AF_INET6).is_none() {
            return;
        }
        // Interface-local, so that it stays on the loopback interface, which is number 1 everywhere.
        let group: Ipv6Addr = "ff01::5341".parse().unwrap();
        let receiver = Socket::new(AF_INET6, SOCK_DGRAM, 0).unwrap();
        receiver.bind(("", 0)).unwrap();
        receiver.settimeout(LONG).unwrap();
        let port = receiver.getsockname().unwrap().port().unwrap();
        let sender = Socket::new(AF_INET6, SOCK_DGRAM, 0).unwrap();
        sender
            .setsockopt(IPPROTO_IPV6, IPV6_MULTICAST_IF, 1)
            .unwrap();
        let sent = receiver
            .join_multicast_v6(group, 1)
            .and_then(|()| sender.sendto(b"all", (group, port)));
        if let Err(error) = sent {
            println!("skipped: no IPv6 multicast on the loopback interface: {error}");
            return;
        }
        assert_eq!(receiver.recvfrom(16).unwrap().0, b"all");
        receiver.leave_multicast_v6(group, 1).unwrap();
        let left = receiver.leave_multicast_v6(group, 1);
        assert_eq!(errno(left), Some(libc::EADDRNOTAVAIL));
    });
}

// Streams.

#[test]
fn a_stream_gives_no_sender() {
    on_both(|| {
        let server = ringsock::create_server(("127.0.0.1", 0)).unwrap();
        let client = ringsock::create_connection(server.getsockname().unwrap()).unwrap();
        let (conn, _) = server.accept().unwrap();
        // Once connected, TCP ignores the address.
        assert_eq!(client.sendto(b"hello", ("127.0.0.1", 1)).unwrap(), 5);
        assert_eq!(
            conn.recvfrom(3).unwrap(),
            (b"hel".to_vec().into_buf(), None)
        );
        let mut buffer = [0; 8];
        assert_eq!(conn.recvfrom_into(&mut buffer).unwrap(), (2, None));
        client.close().unwrap();
        assert_eq!(conn.recvfrom(3).unwrap().0, b"", "the end of the stream");

        let (left, right) = socketpair().unwrap();
        left.sendall(b"hello").unwrap();
        assert_eq!(right.recvfrom(16).unwrap().1, None);
        assert_eq!(errno(left.sendto(b"x", "/tmp/x")), Some(libc::EISCONN));
    });
}

/// It would be SIGPIPE for plain sendto(2).
#[test]
fn sendto_on_an_unconnected_stream_is_epipe() {
    on_both(|| {
        let socket = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
        in_each_mode(&socket, || {
            let refused = socket.sendto(b"x", ("127.0.0.1", 1));
            assert_eq!(errno(refused), Some(libc::EPIPE));
        });
    });
}

#[test]
fn sendto_on_a_blocking_stream_sends_all() {
    on_both(|| {
        let server = ringsock::create_server(("127.0.0.1", 0)).unwrap();
        let address = server.getsockname().unwrap();
        let client = ringsock::create_connection(&address).unwrap();
        let (conn, _) = server.accept().unwrap();
        const LEN: usize = 8 << 20;
        let reading = beside(move || {
            let mut received = 0;
            while received < LEN {
                let (data, from) = conn.recvfrom(1 << 16).unwrap();
                assert!(!data.is_empty() && from.is_none());
                assert!(data.iter().all(|byte| *byte == 7));
                received += data.len();
            }
            received
        });
        assert_eq!(client.sendto(&vec![7; LEN], &address).unwrap(), LEN);
        assert_eq!(reading.join(), LEN);
    });
}

#[test]
fn fast_open_connects_and_sends() {
    on_both(|| {
        let server = ringsock::create_server(("127.0.0.1", 0)).unwrap();
        let address = server.getsockname().unwrap();
        for _ in 0..2 {
            let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
            match client.sendto_with(b"hello", MSG_FASTOPEN, &address) {
                Ok(sent) => assert_eq!(sent, 5),
                Err(error) => {
                    assert_eq!(error.errno(), Some(libc::EOPNOTSUPP));
                    println!("skipped: no TCP Fast Open here");
                    return;
                }
            }
            assert_eq!(client.getpeername().unwrap(), address);
            let (conn, _) = server.accept().unwrap();
            assert_eq!(conn.recv(16).unwrap(), b"hello");
        }
    });
}

// Errors and ends.

#[test]
fn address_errors_come_before_ebadf() {
    on_both(|| {
        let (socket, to) = udp();
        socket.close().unwrap();
        assert!(matches!(socket.sendto(b"x", "/tmp/x"), Err(Error::Type(_))));
        assert_eq!(errno(socket.sendto(b"x", &to)), Some(libc::EBADF));
        assert_eq!(errno(socket.recvfrom(16)), Some(libc::EBADF));
        assert_eq!(errno(socket.recvfrom_into(&mut [])), Some(libc::EBADF));
        assert_eq!(socket.recv(0).unwrap(), b"");
        let unbound = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
        assert_eq!(errno(unbound.send(b"x")), Some(libc::EDESTADDRREQ));
    });
}

#[test]
fn close_ends_a_recvfrom_that_waits() {
    let (receiver, _) = udp();
    let other = receiver.clone();
    let closing = beside(move || {
        thread::sleep(Duration::from_millis(30));
        other.close().unwrap();
    });
    assert_eq!(errno(receiver.recvfrom(16)), Some(libc::EBADF));
    closing.join();
    run(|| {
        let (receiver, _) = udp();
        let waiting = receiver.clone();
        let waiting = spawn(move || waiting.recvfrom(16));
        yield_now();
        receiver.close().unwrap();
        assert_eq!(errno(waiting.join().unwrap()), Some(libc::EBADF));
    });
}

/// Every datagram is either returned in time or still there afterwards, whole and in order.
#[test]
fn a_deadline_and_a_datagram_in_a_race_lose_nothing() {
    on_both(|| {
        const TRIALS: u64 = 3000;
        let mut state = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(1, |now| now.as_nanos() as u64)
            | 1;
        println!("seed {state}");
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let (receiver, to) = udp();
        let (sender, from) = udp();
        let (turn, turns) = mpsc::channel::<(u64, Duration)>();
        let sending = beside(move || {
            for (number, delay) in turns {
                let start = Instant::now();
                while start.elapsed() < delay {
                    std::hint::spin_loop();
                }
                sender.sendto(&number.to_ne_bytes(), &to).unwrap();
            }
        });
        let (mut in_time, mut late) = (0, 0);
        let limit = Instant::now() + Duration::from_secs(60);
        for number in 0..TRIALS {
            let timeout = Duration::from_micros(20 + random() % 150);
            let delay = Duration::from_micros(random() % 170);
            receiver.settimeout(timeout).unwrap();
            turn.send((number, delay)).unwrap();
            let mut buffer = [0; 16];
            let received = match receiver.recvfrom_into(&mut buffer) {
                Err(error) => {
                    assert_eq!(error, Error::Timeout);
                    late += 1;
                    receiver.settimeout(LONG).unwrap();
                    receiver.recvfrom_into(&mut buffer)
                }
                received => {
                    in_time += 1;
                    received
                }
            };
            assert_eq!(received.unwrap(), (8, Some(from.clone())));
            assert_eq!(buffer[..8], number.to_ne_bytes());
            if Instant::now() > limit {
                break;
            }
        }
        println!("{in_time} in time, {late} late");
        drop(turn);
        sending.join();
        let none = receiver.recvfrom_with(16, MSG_DONTWAIT);
        assert_eq!(errno(none), Some(libc::EAGAIN));
    });
}

#[test]
fn many_fibers_receive_on_one_socket() {
    run(|| {
        let (receiver, to) = udp();
        let (sender, from) = udp();
        let waiting: Vec<_> = (0..50)
            .map(|_| {
                let (receiver, from) = (receiver.clone(), from.clone());
                spawn(move || {
                    let (data, peer) = receiver.recvfrom(16).unwrap();
                    assert_eq!(peer, Some(from));
                    data[0]
                })
            })
            .collect();
        yield_now();
        for number in 0..50 {
            sender.sendto(&[number], &to).unwrap();
        }
        let mut numbers: Vec<u8> = waiting
            .into_iter()
            .map(|fiber| fiber.join().unwrap())
            .collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..50).collect::<Vec<u8>>());
    });
}

// AF_UNIX.

#[test]
fn unix_datagrams_have_named_abstract_and_nameless_senders() {
    on_both(|| {
        let receiver = unix();
        let path = fresh_path();
        receiver.bind(&*path).unwrap();
        let to = receiver.getsockname().unwrap();
        assert_eq!(to, UnixAddr::Path(path.clone()).into());

        let nameless = unix();
        nameless.sendto(b"nobody", &*path).unwrap();
        let (data, from) = receiver.recvfrom(16).unwrap();
        assert_eq!((&data[..], from), (&b"nobody"[..], None));

        let chosen = unix();
        chosen.bind("").unwrap();
        let name = chosen.getsockname().unwrap();
        assert!(
            matches!(&name, Address::Unix(UnixAddr::Abstract(name)) if name.len() == 5),
            "{name:?}"
        );
        chosen.sendto(b"abstract", &to).unwrap();
        assert_eq!(receiver.recvfrom(16).unwrap().1, Some(name.clone()));
        // There and back, by what recvfrom said.
        receiver.sendto(b"back", &name).unwrap();
        let (data, from) = chosen.recvfrom(16).unwrap();
        assert_eq!((&data[..], from), (&b"back"[..], Some(to)));

        let given = unix();
        let name = UnixAddr::Abstract(format!("ringsock \0 {}", path.display()).into_bytes());
        given.bind(&name).unwrap();
        given.sendto(b"given", &*path).unwrap();
        assert_eq!(receiver.recvfrom(16).unwrap().1, Some(name.into()));

        receiver.close().unwrap();
        let refused = given.sendto(b"x", &*path);
        assert_eq!(errno(refused), Some(libc::ECONNREFUSED));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(errno(given.sendto(b"x", &*path)), Some(libc::ENOENT));
    });
}

#[test]
fn a_full_unix_queue_makes_senders_wait_as_their_mode_says() {
    on_both(|| {
        let receiver = unix();
        receiver.bind("").unwrap();
        let to = receiver.getsockname().unwrap();
        let sender = unix();
        sender.setblocking(false).unwrap();
        let mut queued = 0;
        while sender.sendto(b"x", &to).is_ok() {
            queued += 1;
            assert!(queued < 100_000);
        }
        assert_eq!(errno(sender.sendto(b"x", &to)), Some(libc::EAGAIN));
        sender.settimeout(0.03).unwrap();
        let before = Instant::now();
        assert_eq!(sender.sendto(b"x", &to), Err(Error::Timeout));
        assert!(before.elapsed() >= Duration::from_millis(29));
        for timeout in [None, Some(LONG)] {
            sender.settimeout(timeout).unwrap();
            let draining = receiver.clone();
            let reading = beside(move || {
                thread::sleep(Duration::from_millis(20));
                for _ in 0..queued {
                    assert_eq!(draining.recv(16).unwrap(), b"x");
                }
            });
            assert_eq!(sender.sendto(b"last", &to).unwrap(), 4);
            reading.join();
            assert_eq!(receiver.recv(16).unwrap(), b"last");
            sender.setblocking(false).unwrap();
            for _ in 0..queued {
                sender.sendto(b"x", &to).unwrap();
            }
        }
    });
}

/// A send that had to wait arrives whole and once, however often the kernel found no room for it.
#[test]
fn packets_that_waited_for_room_arrive_once_and_whole() {
    on_both(|| {
        for kind in [SOCK_DGRAM, SOCK_SEQPACKET] {
            for timeout in [None, Some(LONG)] {
                const COUNT: u32 = 2000;
                // Connected one way, datagrams wait for room at the receiver; both ways, for room at the sender.
                let (left, right) = if kind == SOCK_DGRAM {
                    let (left, right) = (unix(), unix());
                    right.bind("").unwrap();
                    left.connect(right.getsockname().unwrap()).unwrap();
                    (left, right)
                } else {
                    let pair = socketpair_with(AF_UNIX, kind, 0).unwrap();
                    pair.0.set_send_buffer_size(4096).unwrap();
                    pair
                };
                left.settimeout(timeout).unwrap();
                let reading = beside(move || {
                    let mut buffer = [0; 16];
                    for number in 0..COUNT {
                        if number % 500 == 0 {
                            thread::sleep(Duration::from_millis(20));
                        }
                        assert_eq!(right.recv_into(&mut buffer).unwrap(), 4);
                        assert_eq!(buffer[..4], number.to_ne_bytes());
                    }
                });
                for number in 0..COUNT {
                    if number % 2 == 0 {
                        assert_eq!(left.send(&number.to_ne_bytes()).unwrap(), 4);
                    } else {
                        left.sendall(&number.to_ne_bytes()).unwrap();
                    }
                }
                reading.join();
            }
        }
    });
}

#[test]
fn close_ends_a_send_that_waits_for_room() {
    on_both(|| {
        let receiver = unix();
        receiver.bind("").unwrap();
        let to = receiver.getsockname().unwrap();
        let sender = unix();
        let fill = || while sender.sendto_with(b"x", MSG_DONTWAIT, &to).is_ok() {};
        fill();
        let other = sender.clone();
        let closing = beside(move || {
            thread::sleep(Duration::from_millis(30));
            other.close().unwrap();
        });
        assert_eq!(errno(sender.sendto(b"x", &to)), Some(libc::EBADF));
        closing.join();
        // So does the end of the receiver, which leaves nobody to wait for.
        let sender = unix();
        let closing = beside(move || {
            thread::sleep(Duration::from_millis(30));
            receiver.close().unwrap();
        });
        assert_eq!(errno(sender.sendto(b"x", &to)), Some(libc::ECONNREFUSED));
        closing.join();
    });
}

/// The wait is on a stand-in for the socket then, which `close` does not know.
#[test]
fn a_close_in_a_race_with_a_send_that_waits_for_room_ends_it() {
    on_both(|| {
        let receiver = unix();
        receiver.bind("").unwrap();
        let to = receiver.getsockname().unwrap();
        let filler = unix();
        while filler.sendto_with(b"x", MSG_DONTWAIT, &to).is_ok() {}
        for trial in 0..300 {
            let sender = unix();
            let other = sender.clone();
            let (go, start) = mpsc::sync_channel(0);
            let closing = beside(move || {
                start.recv().unwrap();
                let before = Instant::now();
                while before.elapsed() < Duration::from_micros(trial) {
                    std::hint::spin_loop();
                }
                other.close().unwrap();
            });
            go.send(()).unwrap();
            assert_eq!(errno(sender.sendto(b"x", &to)), Some(libc::EBADF));
            closing.join();
        }
    });
}

/// Many in a row: some as calls of their own, some through the ring.
#[test]
fn a_burst_of_sends_keeps_its_addresses() {
    on_both(|| {
        for family in [AF_INET, AF_INET6] {
            let Some((even, even_address)) = try_udp(family) else {
                return;
            };
            let (odd, odd_address) = try_udp(family).unwrap();
            let (sender, from) = try_udp(family).unwrap();
            for number in 0..200_u8 {
                let to = if number % 2 == 0 {
                    &even_address
                } else {
                    &odd_address
                };
                assert_eq!(sender.sendto(&[number; 3], to).unwrap(), 3);
            }
            for number in 0..200_u8 {
                let receiver = if number % 2 == 0 { &even } else { &odd };
                let (data, peer) = receiver.recvfrom(16).unwrap();
                assert_eq!((&data[..], peer), (&[number; 3][..], Some(from.clone())));
            }
        }
    });
}

#[test]
fn seqpackets_keep_boundaries_and_end() {
    on_both(|| {
        let listener = Socket::new(AF_UNIX, SOCK_SEQPACKET, 0).unwrap();
        listener.bind("").unwrap();
        listener.listen(1).unwrap();
        let address = listener.getsockname().unwrap();
        let connecting = beside(move || {
            let client = Socket::new(AF_UNIX, SOCK_SEQPACKET, 0).unwrap();
            client.connect(&address).unwrap();
            client
        });
        let (conn, _) = listener.accept().unwrap();
        let client = connecting.join();
        assert_eq!(conn.kind(), SOCK_SEQPACKET);
        in_each_mode(&conn, || {
            assert_eq!(client.send(b"one").unwrap(), 3);
            client.sendall(b"three").unwrap();
            assert_eq!(conn.recv(16).unwrap(), b"one");
            assert_eq!(conn.recvfrom(2).unwrap(), (b"th".to_vec().into_buf(), None));
            client.send(b"whole").unwrap();
            let mut buffer = [0; 2];
            assert_eq!(conn.recv_into_with(&mut buffer, 0, MSG_TRUNC).unwrap(), 5);
        });
        client.shutdown(SHUT_WR).unwrap();
        assert_eq!(conn.recv(16).unwrap(), b"");
        conn.send(b"back").unwrap();
        assert_eq!(client.recv(16).unwrap(), b"back");
        conn.close().unwrap();
        assert_eq!(client.recvfrom(16).unwrap(), (Buf::default(), None));
        assert_eq!(errno(client.send(b"x")), Some(libc::EPIPE));
    });
}

/// Room is there when all look, and for the first one only when they send. That is not the receiver's.
#[test]
fn senders_that_share_a_socket_wait_for_its_room_in_turn() {
    run(|| {
        let sender = unix();
        sender.bind("").unwrap();
        let receiver = unix();
        receiver.bind("").unwrap();
        // It hears nobody else, and nobody else may connect to it.
        receiver.connect(sender.getsockname().unwrap()).unwrap();
        let pair = socketpair_with(AF_UNIX, SOCK_SEQPACKET, 0).unwrap();
        let address = receiver.getsockname().unwrap();
        let nowhere = Address::from(UnixAddr::Path("/nonexistent/socket".into()));
        for (sender, receiver, address) in [(sender, receiver, address), (pair.0, pair.1, nowhere)]
        {
            const EACH: usize = 20;
            // Room for one message of 4,000 bytes.
            sender.setsockopt(SOL_SOCKET, SO_SNDBUF, 4096).unwrap();
            let senders: Vec<_> = (0..4)
                .map(|_| {
                    let (sender, address) = (sender.clone(), address.clone());
                    spawn(move || {
                        for _ in 0..EACH {
                            assert_eq!(sender.sendto(&[7; 4000], &address)?, 4000);
                        }
                        Ok::<(), Error>(())
                    })
                })
                .collect();
            // Ended by a sender that fails.
            receiver.settimeout(10.0).unwrap();
            let mut received = 0;
            while let Ok(message) = receiver.recv(5000) {
                assert_eq!(message, [7; 4000]);
                received += 1;
                if received == senders.len() * EACH {
                    break;
                }
            }
            for sender in senders {
                sender.join().unwrap().unwrap();
            }
        }
    });
}

/// As for recv(2), MSG_WAITALL means nothing here: a packet is all there is to wait for.
#[test]
fn waiting_for_all_ends_with_the_packet() {
    on_both(|| {
        for timeout in [None, Some(LONG)] {
            let (left, right) = socketpair_with(AF_UNIX, SOCK_SEQPACKET, 0).unwrap();
            right.settimeout(timeout).unwrap();
            for packet in ["one", "two", "three", "four"] {
                left.send(packet.as_bytes()).unwrap();
            }
            // So that a receive which goes on ends as well.
            left.shutdown(SHUT_WR).unwrap();
            assert_eq!(right.recv_with(16, MSG_WAITALL).unwrap(), b"one");
            assert_eq!(right.recvfrom_with(16, MSG_WAITALL).unwrap().0, b"two");
            let message = right.recvmsg_with(16, 64, MSG_WAITALL).unwrap();
            assert_eq!(message.data, b"three");
            assert_eq!(right.recv_with(16, MSG_WAITALL).unwrap(), b"four");
        }
    });
}

// Beside Python.

/// A python3 that runs `script`, or `None`, said on a line.
fn python(script: &str) -> Option<std::process::Child> {
    let limited = format!("import signal\nsignal.alarm(120)\n{script}");
    let child = Command::new("python3")
        .args(["-c", &limited])
        .stdout(Stdio::piped())
        .spawn();
    match child {
        Ok(child) => Some(child),
        Err(error) => {
            println!("skipped: python3 cannot be run here: {error}");
            None
        }
    }
}

#[test]
fn python_echoes_datagrams_of_every_size() {
    on_both(|| {
        for (family, host) in [(AF_INET, "127.0.0.1"), (AF_INET6, "::1")] {
            if try_udp(family).is_none() {
                return;
            }
            let script = format!(
                "import socket
s = socket.socket(socket.{family:?}, socket.SOCK_DGRAM)
s.bind(('{host}', 0))
print(s.getsockname()[1], flush=True)
while True:
    data, peer = s.recvfrom(70000)
    if data == b'end': break
    s.sendto(data, peer)
"
            );
            let Some(mut child) = python(&script) else {
                return;
            };
            let mut line = String::new();
            let stdout = child.stdout.take().unwrap();
            BufReader::new(stdout).read_line(&mut line).unwrap();
            let port: u16 = line.trim().parse().unwrap();
            let (socket, _) = try_udp(family).unwrap();
            socket.settimeout(LONG).unwrap();
            for len in [0, 1, 2, 1500, 9000, 65_507] {
                let data: Vec<u8> = (0..len).map(|index: u32| (index * 31) as u8).collect();
                socket.sendto(&data, (host, port)).unwrap();
                let (back, peer) = socket.recvfrom(70_000).unwrap();
                assert!(back == data, "{len} bytes");
                assert_eq!(peer.unwrap().port(), Some(port));
            }
            socket.sendto(b"end", (host, port)).unwrap();
            assert!(child.wait().unwrap().success());
        }
    });
}

/// The same calls in Python and here, one line for each result.
#[test]
fn results_are_pythons_one_by_one() {
    let script = r"
import socket, errno
from socket import *
def show(call, *args):
    try:
        result = call(*args)
    except OSError as e:
        result = 'timed out' if e.errno is None else e.errno
    except ValueError as e:
        result = str(e)
    if isinstance(result, tuple) and isinstance(result[1], tuple):
        result = (result[0], 'address')
    if isinstance(result, tuple):
        print('%s from %s' % result)
    else:
        print(result)
for timeout in (None, 0.01, 0):
    r = socket(AF_INET, SOCK_DGRAM); r.bind(('127.0.0.1', 0))
    s = socket(AF_INET, SOCK_DGRAM)
    r.settimeout(timeout)
    to = r.getsockname()
    b = bytearray(4)
    show(s.sendto, b'hello', to); show(r.recvfrom_into, b)
    show(s.sendto, b'hello', to); show(r.recvfrom_into, b, 3, MSG_TRUNC)
    show(s.sendto, b'hello', to); show(r.recv_into, b, 3, MSG_TRUNC)
    show(r.recvfrom_into, b, 5)
    show(s.sendto, b'', to); show(r.recvfrom_into, b)
    show(s.sendto, b'hello', to); show(r.recvfrom_into, bytearray())
    show(s.sendto, b'hello', to); show(r.recvfrom_into, b, 0, MSG_PEEK)
    show(r.recvfrom_into, b, 0, MSG_PEEK | MSG_TRUNC); show(r.recvfrom_into, b, 1)
    show(r.recvfrom_into, b, 0, MSG_ERRQUEUE | MSG_DONTWAIT)
    if timeout is not None: show(r.recvfrom_into, b)
    show(s.sendto, b'x' * 65508, to)
    show(s.sendto, b'hello', ('255.255.255.255', 9))
    show(r.connect_ex, to); show(s.connect_ex, to); show(s.sendto, b'hello', to)
    show(s.connect_ex, ('255.255.255.255', 9))
    t = socket(AF_INET, SOCK_STREAM); t.settimeout(timeout)
    show(t.sendto, b'x', to)
    u, v = socketpair(AF_UNIX, SOCK_DGRAM); v.settimeout(timeout)
    show(u.send, b'hello'); show(v.recvfrom_into, b)
    w = socket(AF_UNIX, SOCK_DGRAM); w.bind('')
    show(w.sendto, b'hello', w.getsockname())
    show(u.sendto, b'hello', '/nonexistent/socket')
    u.close()
    show(u.sendto, b'hello', w.getsockname()); show(u.recvfrom_into, b)
    show(v.sendto, b'x', w.getsockname()); show(v.send, b'x')
";
    let Some(child) = python(script) else {
        return;
    };
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let pythons = String::from_utf8(output.stdout).unwrap();
    let pythons: Vec<&str> = pythons.lines().collect();
    let ours = same_calls();
    assert_eq!(ours, pythons, "on a plain thread");
    assert_eq!(run(same_calls), pythons, "in a fiber");
    assert!(ours.len() > 90, "only {} results", ours.len());
}

fn same_calls() -> Vec<String> {
    let mut shown = Vec::new();
    let number = |result: ringsock::Result<usize>| match result {
        Ok(number) => number.to_string(),
        Err(Error::Timeout) => "timed out".into(),
        Err(Error::Value(text)) => text.to_string(),
        Err(error) => error.errno().unwrap().to_string(),
    };
    let from = |result: ringsock::Result<(usize, Option<Address>)>| match result {
        Ok((length, Some(Address::Unix(_)) | None)) => format!("{length} from None"),
        Ok((length, Some(_))) => format!("{length} from address"),
        Err(error) => number(Err(error)),
    };
    for timeout in [None, Some(0.01), Some(0.0)] {
        let (r, to) = udp();
        let s = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
        r.settimeout(timeout).unwrap();
        let mut b = [0; 4];
        let none = MsgFlags::default();
        let mut show = |text: String| shown.push(text);
        let ex = |result: ringsock::Result<i32>| result.unwrap().to_string();
        show(number(s.sendto(b"hello", &to)));
        show(from(r.recvfrom_into(&mut b)));
        show(number(s.sendto(b"hello", &to)));
        show(from(r.recvfrom_into_with(&mut b, 3, MSG_TRUNC)));
        show(number(s.sendto(b"hello", &to)));
        show(number(r.recv_into_with(&mut b, 3, MSG_TRUNC)));
        show(from(r.recvfrom_into_with(&mut b, 5, none)));
        show(number(s.sendto(b"", &to)));
        show(from(r.recvfrom_into(&mut b)));
        show(number(s.sendto(b"hello", &to)));
        show(from(r.recvfrom_into(&mut [])));
        show(number(s.sendto(b"hello", &to)));
        show(from(r.recvfrom_into_with(&mut b, 0, MSG_PEEK)));
        show(from(r.recvfrom_into_with(&mut b, 0, MSG_PEEK | MSG_TRUNC)));
        show(from(r.recvfrom_into_with(&mut b, 1, none)));
        if timeout == Some(0.01) {
            // Python looks for readiness first, for as long as the timeout; here the error queue never waits.
            let empty = r.recvfrom_into_with(&mut b, 0, MSG_ERRQUEUE);
            assert_eq!(errno(empty), Some(libc::EAGAIN));
            show("timed out".into());
        } else {
            show(from(r.recvfrom_into_with(
                &mut b,
                0,
                MSG_ERRQUEUE | MSG_DONTWAIT,
            )));
        }
        if timeout.is_some() {
            show(from(r.recvfrom_into(&mut b)));
        }
        show(number(s.sendto(&[b'x'; 65_508], &to)));
        show(number(s.sendto(b"hello", ("255.255.255.255", 9))));
        show(ex(r.connect_ex(&to)));
        show(ex(s.connect_ex(&to)));
        show(number(s.sendto(b"hello", &to)));
        show(ex(s.connect_ex(("255.255.255.255", 9))));
        let t = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
        t.settimeout(timeout).unwrap();
        show(number(t.sendto(b"x", &to)));
        let (u, v) = socketpair_with(AF_UNIX, SOCK_DGRAM, 0).unwrap();
        v.settimeout(timeout).unwrap();
        show(number(u.send(b"hello")));
        show(from(v.recvfrom_into(&mut b)));
        let w = unix();
        w.bind("").unwrap();
        let name = w.getsockname().unwrap();
        show(number(w.sendto(b"hello", &name)));
        show(number(u.sendto(b"hello", "/nonexistent/socket")));
        u.close().unwrap();
        show(number(u.sendto(b"hello", &name)));
        show(from(u.recvfrom_into(&mut b)));
        show(number(v.sendto(b"x", &name)));
        show(number(v.send(b"x")));
    }
    shown
}
