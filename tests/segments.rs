//! Many datagrams a call: segments (UDP_GRO, UDP_SEGMENT) and batches, in fibers and on plain threads, beside std's and Python's
//! sockets, and the example that echoes them.
#![allow(unsafe_code)]

mod support;

use std::cell::Cell;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::*;
use ringsock::{Datagrams, Family, socketpair, socketpair_with, spawn};
use support::{Process, Random, beside, errno, has_python, on_both, run};

/// Longer than any wait of a test that goes well, in seconds.
const LONG: f64 = 60.0;
/// The most that one receive brings.
const ROOM: usize = 65_535;
/// Of `SOL_SOCKET`: no checksums on what is sent, so that the kernel refuses to cut it.
const SO_NO_CHECK: i32 = 11;

/// A UDP socket on the loopback address of the family, with a timeout; `None`, said on a line, where there is no IPv6.
fn try_udp(family: Family) -> Option<(Socket, Address)> {
    let host = if family == AF_INET {
        "127.0.0.1"
    } else {
        "::1"
    };
    let socket = Socket::new(family, SOCK_DGRAM, 0).unwrap();
    if let Err(error) = socket.bind((host, 0)) {
        assert_eq!(family, AF_INET6, "{error}");
        println!("skipped: no IPv6 here: {error}");
        return None;
    }
    socket.settimeout(LONG).unwrap();
    socket.set_recv_buffer_size(4 << 20).unwrap();
    let address = socket.getsockname().unwrap();
    Some((socket, address))
}

fn udp() -> (Socket, Address) {
    try_udp(AF_INET).unwrap()
}

fn std_udp() -> (UdpSocket, Address) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let address = socket.local_addr().unwrap().into();
    (socket, address)
}

/// Bytes that differ from place to place.
fn bytes(len: usize) -> Vec<u8> {
    (0..len)
        .map(|index| (index * 31 + index / 251) as u8)
        .collect()
}

fn cut(bytes: &[u8], each: usize) -> Vec<Vec<u8>> {
    match bytes {
        [] => vec![Vec::new()],
        bytes => bytes.chunks(each).map(<[u8]>::to_vec).collect(),
    }
}

/// So many datagrams as `recv_segments` brings them.
fn receive(socket: &Socket, count: usize) -> Vec<Vec<u8>> {
    let mut buffer = vec![0; ROOM];
    let mut datagrams: Vec<Vec<u8>> = Vec::new();
    while datagrams.len() < count {
        let segments = socket.recv_segments(&mut buffer).unwrap();
        assert!(!segments.is_truncated());
        assert_eq!(segments.len(), segments.iter().len());
        assert_eq!(segments.len(), segments.iter().count());
        datagrams.extend(segments.iter().map(<[u8]>::to_vec));
    }
    datagrams
}

/// The same by `recv_many`, with their senders.
fn receive_many(socket: &Socket, count: usize) -> Vec<(Vec<u8>, Option<Address>)> {
    let mut batch = Datagrams::new(40, ROOM);
    let mut datagrams = Vec::new();
    while datagrams.len() < count {
        let received = socket.recv_many(&mut batch).unwrap();
        assert!(received >= batch.len() && !batch.is_empty());
        let before = datagrams.len();
        for (segments, peer) in batch.iter() {
            let with_peer = |datagram: &[u8]| (datagram.to_vec(), peer.clone());
            datagrams.extend(segments.iter().map(with_peer));
        }
        assert_eq!(datagrams.len() - before, received);
    }
    datagrams
}

// Segments.

#[test]
fn what_a_segmenting_sender_sends_keeps_its_boundaries() {
    on_both(|| {
        for family in [AF_INET, AF_INET6] {
            for gro in [true, false] {
                let Some((receiver, to)) = try_udp(family) else {
                    return;
                };
                if gro {
                    assert!(receiver.set_udp_gro(true).unwrap());
                }
                let (sender, _) = try_udp(family).unwrap();
                // One segment, several, a short last one; more than a kernel cuts at once, more than a send can hold.
                for (len, each) in [
                    (1, 1),
                    (7, 3),
                    (64, 64),
                    (64 * 64, 64),
                    (65 * 64 + 1, 64),
                    (50_000, 1_472),
                    (150_000, 1_200),
                    (300, 1),
                    (100_000, 30_000),
                    (65_507, 65_507),
                    (9, 65_535),
                ] {
                    let data = bytes(len);
                    assert_eq!(sender.sendto_segmented(&data, each, &to).unwrap(), len);
                    let expected = cut(&data, each);
                    let received = receive(&receiver, expected.len());
                    assert!(received == expected, "{len} bytes by {each}, GRO {gro}");
                }
            }
        }
    });
}

#[test]
fn gro_brings_many_datagrams_in_one_receive() {
    on_both(|| {
        let (receiver, to) = udp();
        assert!(receiver.set_udp_gro(true).unwrap());
        let (sender, from) = udp();
        sender.sendto_segmented(&bytes(3_100), 100, &to).unwrap();
        let mut buffer = vec![0; ROOM];
        let (segments, peer) = receiver.recvfrom_segments(&mut buffer).unwrap();
        assert_eq!((segments.len(), segments.segment_bytes()), (31, 100));
        assert_eq!(segments.as_bytes(), bytes(3_100));
        assert_eq!(peer, Some(from));
        // And no longer.
        assert!(!receiver.set_udp_gro(false).unwrap());
        sender.sendto_segmented(&bytes(3_100), 100, &to).unwrap();
        let segments = receiver.recv_segments(&mut buffer).unwrap();
        assert_eq!((segments.len(), segments.segment_bytes()), (1, 100));
    });
}

#[test]
fn other_control_data_does_not_hide_the_boundaries() {
    on_both(|| {
        let (receiver, to) = udp();
        receiver.set_udp_gro(true).unwrap();
        receiver
            .setsockopt(SOL_SOCKET, libc::SO_TIMESTAMPNS, 1)
            .unwrap();
        receiver
            .setsockopt(SOL_SOCKET, libc::SO_RXQ_OVFL, 1)
            .unwrap();
        receiver
            .setsockopt(IPPROTO_IP, libc::IP_PKTINFO, 1)
            .unwrap();
        receiver
            .setsockopt(IPPROTO_IP, libc::IP_RECVTTL, 1)
            .unwrap();
        let (sender, _) = udp();
        sender.sendto_segmented(&bytes(1_000), 100, &to).unwrap();
        assert_eq!(receive(&receiver, 10), cut(&bytes(1_000), 100));
    });
}

#[test]
fn an_empty_datagram_is_one_datagram() {
    on_both(|| {
        let (receiver, to) = udp();
        receiver.set_udp_gro(true).unwrap();
        let (sender, from) = udp();
        assert_eq!(sender.sendto_segmented(b"", 10, &to).unwrap(), 0);
        let mut buffer = [0; 16];
        let (segments, peer) = receiver.recvfrom_segments(&mut buffer).unwrap();
        assert_eq!(
            (segments.len(), segments.as_bytes(), peer),
            (1, &b""[..], Some(from))
        );
        assert_eq!(segments.iter().collect::<Vec<_>>(), [b""]);
        // Between others of one size they stay where they are.
        let mut batch = Datagrams::new(8, 16);
        for datagram in [&b"ab"[..], b"", b"", b"cd", b"e", b"fg"] {
            batch.push(datagram, &to).unwrap();
        }
        assert_eq!(sender.send_many(&batch).unwrap(), 6);
        let received = receive(&receiver, 6);
        assert_eq!(received, [&b"ab"[..], b"", b"", b"cd", b"e", b"fg"]);
    });
}

#[test]
fn what_does_not_fit_is_told() {
    on_both(|| {
        let (receiver, to) = udp();
        receiver.set_udp_gro(true).unwrap();
        let (sender, _) = udp();
        sender.sendto_segmented(&bytes(1_000), 100, &to).unwrap();
        sender.sendto(b"behind", &to).unwrap();
        let mut buffer = [0; 250];
        let segments = receiver.recv_segments(&mut buffer).unwrap();
        assert!(segments.is_truncated());
        let lens: Vec<usize> = segments.iter().map(<[u8]>::len).collect();
        assert_eq!(lens, [100, 100, 50]);
        assert_eq!(segments.as_bytes(), &bytes(1_000)[..250]);
        let segments = receiver.recv_segments(&mut buffer).unwrap();
        assert_eq!(
            (segments.as_bytes(), segments.is_truncated()),
            (&b"behind"[..], false)
        );
        // The same in a batch; and without room at all a datagram is taken all the same.
        sender.sendto_segmented(&bytes(1_000), 100, &to).unwrap();
        let mut batch = Datagrams::new(2, 250);
        assert_eq!(receiver.recv_many(&mut batch).unwrap(), 3);
        assert!(batch.iter().all(|(segments, _)| segments.is_truncated()));
        sender.sendto(b"gone", &to).unwrap();
        let segments = receiver.recv_segments(&mut []).unwrap();
        assert_eq!((segments.len(), segments.is_truncated()), (1, true));
    });
}

#[test]
fn std_receives_segments_as_datagrams_and_cuts_for_us() {
    on_both(|| {
        let (peer, peer_address) = std_udp();
        let (socket, address) = udp();
        let data = bytes(40_001);
        assert_eq!(
            socket
                .sendto_segmented(&data, 1_000, &peer_address)
                .unwrap(),
            40_001
        );
        let mut buffer = [0; 2048];
        for expected in cut(&data, 1_000) {
            let (len, from) = peer.recv_from(&mut buffer).unwrap();
            assert_eq!(
                (&buffer[..len], Address::from(from)),
                (&expected[..], address.clone())
            );
        }
        // A send of std's on a socket that cuts whatever it sends.
        let each = 500;
        // SAFETY: the option's value is an int that lives through the call.
        let set = unsafe {
            let value = &raw const each;
            libc::setsockopt(
                peer.as_raw_fd(),
                libc::SOL_UDP,
                libc::UDP_SEGMENT,
                value.cast(),
                4,
            )
        };
        assert_eq!(set, 0);
        socket.set_udp_gro(true).unwrap();
        let to = address.to_string().parse::<std::net::SocketAddr>().unwrap();
        assert_eq!(peer.send_to(&data[..10_250], to).unwrap(), 10_250);
        assert_eq!(receive(&socket, 21), cut(&data[..10_250], 500));
    });
}

#[test]
fn what_cannot_cut_sends_one_by_one() {
    on_both(|| {
        // No checksums: the kernel refuses.
        let (receiver, to) = udp();
        let (sender, from) = udp();
        sender.setsockopt(SOL_SOCKET, SO_NO_CHECK, 1).unwrap();
        for _ in 0..3 {
            let data = bytes(2_050);
            assert_eq!(sender.sendto_segmented(&data, 100, &to).unwrap(), 2_050);
            assert_eq!(receive(&receiver, 21), cut(&data, 100));
        }
        // Datagrams of one size to one address in a batch, too.
        let mut batch = Datagrams::new(64, 64);
        for index in 0..64 {
            batch.push(&[index; 64], &to).unwrap();
        }
        assert_eq!(sender.send_many(&batch).unwrap(), 64);
        let received = receive_many(&receiver, 64);
        for (index, (datagram, peer)) in received.into_iter().enumerate() {
            assert_eq!(
                (datagram, peer.as_ref()),
                (vec![index as u8; 64], Some(&from))
            );
        }
    });
}

#[test]
fn unix_sockets_have_neither_option_and_keep_the_boundaries() {
    on_both(|| {
        let receiver = Socket::new(AF_UNIX, SOCK_DGRAM, 0).unwrap();
        receiver.bind("").unwrap();
        let to = receiver.getsockname().unwrap();
        let sender = Socket::new(AF_UNIX, SOCK_DGRAM, 0).unwrap();
        assert!(!receiver.set_udp_gro(true).unwrap());
        assert!(!receiver.set_udp_gro(false).unwrap());
        assert_eq!(sender.sendto_segmented(&bytes(25), 10, &to).unwrap(), 25);
        assert_eq!(receive(&receiver, 3), cut(&bytes(25), 10));
        let mut batch = Datagrams::new(4, 64);
        batch.push_segmented(&bytes(25), 10, &to).unwrap();
        batch.push(b"", &to).unwrap();
        assert_eq!(sender.send_many(&batch).unwrap(), 4);
        let received: Vec<_> = receive_many(&receiver, 4)
            .into_iter()
            .map(|each| each.0)
            .collect();
        assert_eq!(
            received,
            [&bytes(25)[..10], &bytes(25)[10..20], &bytes(25)[20..], b""]
        );
    });
}

#[test]
fn descriptors_beside_a_datagram_are_not_left_behind() {
    // Others open descriptors at the same time.
    support::alone("descriptors_beside_a_datagram_are_not_left_behind", || {
        use std::io::IoSlice;
        use std::os::fd::AsFd;
        let (left, right) = socketpair_with(AF_UNIX, SOCK_DGRAM, 0).unwrap();
        let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let mut batch = Datagrams::new(2, 16);
        let mut receive = || {
            ringsock::send_fds(&left, &[IoSlice::new(b"fd")], &[left.as_fd()]).unwrap();
            assert_eq!(right.recv_many(&mut batch).unwrap(), 1);
        };
        receive();
        let before = count();
        receive();
        assert_eq!(count(), before);
    });
}

#[test]
fn a_stream_has_no_datagrams() {
    on_both(|| {
        let (stream, _other) = socketpair().unwrap();
        let refused = Some(libc::EOPNOTSUPP);
        assert_eq!(errno(stream.recv_segments(&mut [0; 16])), refused);
        assert_eq!(errno(stream.recv_many(&mut Datagrams::new(1, 16))), refused);
        assert_eq!(errno(stream.send_many(&Datagrams::new(1, 16))), refused);
        assert_eq!(errno(stream.send_segmented(b"abc", 1)), refused);
        assert!(
            !Socket::new(AF_INET, SOCK_STREAM, 0)
                .unwrap()
                .set_udp_gro(true)
                .unwrap()
        );
    });
}

#[test]
fn mistakes_of_the_caller_are_value_errors() {
    let (socket, to) = udp();
    let is_value = |result: ringsock::Result<()>| matches!(result, Err(Error::Value(_)));
    assert!(is_value(socket.sendto_segmented(b"abc", 0, &to).map(drop)));
    let mut batch = Datagrams::new(1, 4);
    assert!(is_value(batch.push_segmented(b"abc", 0, &to)));
    assert!(is_value(batch.push(b"abcde", &to)));
    batch.push(b"abcd", &to).unwrap();
    assert!(is_value(batch.push(b"abcd", &to)));
    batch.clear();
    batch.push(b"abcd", &to).unwrap();
    assert_eq!(
        format!("{:?}", batch.iter().next().unwrap().0.as_bytes()),
        "[97, 98, 99, 100]"
    );
}

// Waiting.

#[test]
fn receives_wait_as_the_mode_says() {
    on_both(|| {
        let (receiver, to) = udp();
        let mut batch = Datagrams::new(4, 64);
        receiver.setblocking(false).unwrap();
        assert_eq!(
            errno(receiver.recv_segments(&mut [0; 16])),
            Some(libc::EAGAIN)
        );
        assert_eq!(errno(receiver.recv_many(&mut batch)), Some(libc::EAGAIN));
        receiver.settimeout(0.03).unwrap();
        for _ in 0..2 {
            let before = Instant::now();
            assert_eq!(receiver.recv_many(&mut batch).unwrap_err(), Error::Timeout);
            assert_eq!(
                receiver.recv_segments(&mut [0; 16]).unwrap_err(),
                Error::Timeout
            );
            assert!(before.elapsed() >= Duration::from_millis(58));
            let bounded = ringsock::timeout(0.01, || receiver.recv_many(&mut batch));
            assert_eq!(bounded.unwrap_err(), Error::Timeout);
        }
        // The kernel's own limit is an errno.
        receiver.settimeout(None).unwrap();
        let limit = [0i64.to_ne_bytes(), 30_000i64.to_ne_bytes()].concat();
        receiver
            .setsockopt(SOL_SOCKET, libc::SO_RCVTIMEO, &limit[..])
            .unwrap();
        assert_eq!(errno(receiver.recv_many(&mut batch)), Some(libc::EAGAIN));
        receiver
            .setsockopt(SOL_SOCKET, libc::SO_RCVTIMEO, &[0u8; 16][..])
            .unwrap();
        for timeout in [None, Some(LONG)] {
            receiver.settimeout(timeout).unwrap();
            let to = to.clone();
            let sending = beside(move || {
                thread::sleep(Duration::from_millis(20));
                udp().0.sendto_segmented(b"late", 4, to).unwrap()
            });
            assert_eq!(receiver.recv_many(&mut batch).unwrap(), 1);
            assert_eq!(sending.join(), 4);
        }
    });
}

#[test]
fn a_deadline_that_has_passed_holds_for_what_need_not_wait() {
    on_both(|| {
        let (socket, to) = udp();
        socket.sendto(b"here", &to).unwrap();
        let mut batch = Datagrams::new(1, 64);
        let late = ringsock::timeout(0.001, || {
            ringsock::sleep(1.0).unwrap_err();
            assert_eq!(socket.recv_many(&mut batch).unwrap_err(), Error::Timeout);
            assert_eq!(
                socket.sendto_segmented(b"late", 1, &to).unwrap_err(),
                Error::Timeout
            );
            Ok(())
        });
        assert_eq!(late, Ok(()));
        assert_eq!(socket.recv_many(&mut batch).unwrap(), 1);
    });
}

#[test]
fn close_ends_a_receive_that_waits() {
    on_both(|| {
        for many in [false, true] {
            let (receiver, _) = udp();
            receiver.settimeout(None).unwrap();
            let other = receiver.clone();
            let closing = beside(move || {
                thread::sleep(Duration::from_millis(20));
                other.close().unwrap();
            });
            let result = if many {
                receiver.recv_many(&mut Datagrams::new(4, 64))
            } else {
                receiver
                    .recv_segments(&mut [0; 64])
                    .map(|segments| segments.len())
            };
            assert_eq!(errno(result), Some(libc::EBADF));
            closing.join();
            assert_eq!(
                errno(receiver.recv_many(&mut Datagrams::new(4, 64))),
                Some(libc::EBADF)
            );
            assert_eq!(errno(receiver.send_segmented(b"abc", 1)), Some(libc::EBADF));
            assert_eq!(errno(receiver.set_udp_gro(true)), Some(libc::EBADF));
        }
    });
}

#[test]
fn a_socket_that_is_shut_down_ends_its_receives() {
    on_both(|| {
        let (socket, to) = udp();
        socket.connect(&to).unwrap();
        socket.send(b"before").unwrap();
        socket.shutdown(SHUT_RD).unwrap();
        let mut batch = Datagrams::new(4, 64);
        assert_eq!(socket.recv_many(&mut batch).unwrap(), 1);
        assert_eq!(socket.recv_many(&mut batch).unwrap(), 0);
        let mut buffer = [0; 16];
        let (segments, peer) = socket.recvfrom_segments(&mut buffer).unwrap();
        assert_eq!((segments.as_bytes(), peer), (&b""[..], None));
    });
}

#[test]
fn a_refused_datagram_is_told_to_its_connected_sender() {
    on_both(|| {
        let (gone, nobody) = udp();
        drop(gone);
        let (socket, _) = udp();
        socket.connect(&nobody).unwrap();
        socket.send_segmented(b"abc", 1).unwrap();
        let result = socket.recv_many(&mut Datagrams::new(4, 64));
        assert_eq!(errno(result), Some(libc::ECONNREFUSED));
    });
}

#[test]
fn a_full_unix_queue_makes_batches_wait_as_their_mode_says() {
    on_both(|| {
        let (left, right) = socketpair_with(AF_UNIX, SOCK_DGRAM, 0).unwrap();
        left.settimeout(0.05).unwrap();
        // The timeout bounds the call, not each datagram.
        let before = Instant::now();
        let sent = left.send_segmented(&bytes(100_000), 1).unwrap();
        assert!(sent > 0 && sent < 100_000);
        assert!(before.elapsed() >= Duration::from_millis(49));
        assert_eq!(left.send_segmented(b"abc", 1).unwrap_err(), Error::Timeout);
        left.settimeout(LONG).unwrap();
        let receiving = beside(move || {
            let mut received = Vec::new();
            while received.len() < sent + 1_000 {
                received.extend_from_slice(&right.recv(16).unwrap());
            }
            received
        });
        assert_eq!(left.send_segmented(&bytes(1_000), 1).unwrap(), 1_000);
        assert_eq!(
            receiving.join(),
            [&bytes(100_000)[..sent], &bytes(1_000)].concat()
        );
    });
}

#[test]
fn a_fiber_that_has_no_need_to_wait_lets_others_go_first() {
    ringsock::run(|| {
        let (socket, to) = udp();
        let turns = Rc::new(Cell::new(0));
        let (other, its_turns) = (socket.clone(), turns.clone());
        let counting = spawn(move || {
            while other.fileno() >= 0 {
                its_turns.set(its_turns.get() + 1);
                ringsock::yield_now();
            }
        });
        let mut batch = Datagrams::new(4, 64);
        for _ in 0..10_000 {
            socket.sendto_segmented(b"abcd", 1, &to).unwrap();
            if turns.get() >= 3 {
                break;
            }
        }
        assert!(turns.get() >= 3, "sends: {} turns", turns.get());
        let before = turns.get();
        for _ in 0..10_000 {
            socket.sendto(b"one", &to).unwrap();
            socket.recv_many(&mut batch).unwrap();
            if turns.get() >= before + 3 {
                break;
            }
        }
        assert!(turns.get() >= before + 3, "receives: {} turns", turns.get());
        socket.close().unwrap();
        counting.join().unwrap();
    });
}

#[test]
fn a_cancelled_fiber_neither_receives_nor_sends() {
    ringsock::run(|| {
        let (socket, _) = udp();
        let waiting = spawn(move || {
            let mut batch = Datagrams::new(4, 64);
            let received = socket.recv_many(&mut batch);
            let to = socket.getsockname().unwrap();
            (received, socket.sendto_segmented(b"abc", 1, to))
        });
        ringsock::yield_now();
        waiting.cancel();
        let (received, sent) = waiting.join().unwrap();
        assert_eq!(
            (received, sent),
            (Err(Error::Cancelled), Err(Error::Cancelled))
        );
    });
}

// Batches.

#[test]
fn a_batch_is_sent_back_as_it_came() {
    on_both(|| {
        for family in [AF_INET, AF_INET6] {
            let Some((server, to)) = try_udp(family) else {
                return;
            };
            server.set_udp_gro(true).unwrap();
            let clients: Vec<Socket> = (0..5).map(|_| try_udp(family).unwrap().0).collect();
            let mut random = Random::new(support::seed());
            let mut below = |limit: usize| random.below(limit as u64) as usize;
            let mut batch = Datagrams::new(33, ROOM);
            let mut number = 0u8;
            for _ in 0..20 {
                let mut expected = vec![Vec::new(); clients.len()];
                // What is under way fits into the sockets' buffers.
                for _ in 0..1 + below(12) {
                    let client = below(clients.len());
                    let len = [0, 1, 64, 64, 64, 1_200, 1_200, 9_000][below(8)];
                    number = number.wrapping_add(1);
                    let data: Vec<u8> = bytes(len).iter().map(|byte| byte ^ number).collect();
                    if below(2) == 0 {
                        clients[client].sendto(&data, &to).unwrap();
                        expected[client].push(data);
                    } else {
                        let each = 100 + below(1_200);
                        clients[client].sendto_segmented(&data, each, &to).unwrap();
                        expected[client].extend(cut(&data, each));
                    }
                }
                let mut left: usize = expected.iter().map(Vec::len).sum();
                while left > 0 {
                    let received = server.recv_many(&mut batch).unwrap();
                    assert_eq!(server.send_many(&batch).unwrap(), received);
                    left -= received;
                }
                for (client, expected) in clients.iter().zip(expected) {
                    assert!(receive(client, expected.len()) == expected, "{family:?}");
                }
            }
        }
    });
}

#[test]
fn datagrams_of_the_greatest_length_go_in_batches_too() {
    on_both(|| {
        let (receiver, to) = udp();
        let (sender, from) = udp();
        let mut batch = Datagrams::new(3, ROOM);
        for len in [65_507, 65_507, 65_506] {
            batch.push(&bytes(len), &to).unwrap();
        }
        assert_eq!(sender.send_many(&batch).unwrap(), 3);
        let received = receive_many(&receiver, 3);
        for ((datagram, peer), len) in received.into_iter().zip([65_507, 65_507, 65_506]) {
            assert!(datagram == bytes(len) && peer.as_ref() == Some(&from));
        }
    });
}

#[test]
fn a_datagram_that_cannot_be_sent_holds_up_none_behind_it() {
    on_both(|| {
        let (receiver, to) = udp();
        let (sender, _) = udp();
        let mut batch = Datagrams::new(8, ROOM);
        batch.push(b"one", &to).unwrap();
        batch.push(&bytes(ROOM), &to).unwrap();
        batch
            .push(b"two", &(std::net::Ipv4Addr::BROADCAST, 9).into())
            .unwrap();
        batch.push_segmented(b"three", 2, &to).unwrap();
        assert_eq!(sender.send_many(&batch).unwrap(), 4);
        assert_eq!(receive(&receiver, 4), [&b"one"[..], b"th", b"re", b"e"]);
        // The first reason, where none was sent.
        batch.clear();
        assert_eq!(sender.send_many(&batch).unwrap(), 0);
        batch.push(&bytes(ROOM), &to).unwrap();
        batch
            .push(b"two", &(std::net::Ipv4Addr::BROADCAST, 9).into())
            .unwrap();
        assert_eq!(errno(sender.send_many(&batch)), Some(libc::EMSGSIZE));
        // A send to one address ends at the first that cannot be sent.
        let result = sender.sendto_segmented(&bytes(ROOM), ROOM, &to);
        assert_eq!(errno(result), Some(libc::EMSGSIZE));
        assert_eq!(
            errno(sender.sendto_segmented(b"abc", 1, ("255.255.255.255", 9))),
            Some(libc::EACCES)
        );
        // That was no refusal to cut: the next send is cut by the kernel, as GRO shows.
        receiver.set_udp_gro(true).unwrap();
        sender.sendto_segmented(b"abc", 1, &to).unwrap();
        let mut buffer = [0; 16];
        assert_eq!(receiver.recv_segments(&mut buffer).unwrap().len(), 3);
    });
}

#[test]
fn datagrams_that_follow_each_other_to_one_address_leave_as_one_send() {
    on_both(|| {
        let (receiver, to) = udp();
        receiver.set_udp_gro(true).unwrap();
        let (sender, _) = udp();
        let mut batch = Datagrams::new(100, 64);
        for index in 0..100 {
            batch.push(&[index; 10], &to).unwrap();
        }
        assert_eq!(sender.send_many(&batch).unwrap(), 100);
        let mut received = Datagrams::new(100, ROOM);
        assert_eq!(receiver.recv_many(&mut received).unwrap(), 100);
        let lens: Vec<usize> = received
            .iter()
            .map(|(segments, _)| segments.len())
            .collect();
        assert_eq!(lens, [64, 36]);
        let all: Vec<u8> = received
            .iter()
            .flat_map(|(segments, _)| segments.as_bytes().to_vec())
            .collect();
        assert_eq!(
            all,
            (0..100).flat_map(|index| [index; 10]).collect::<Vec<u8>>()
        );
    });
}

#[test]
fn a_batch_may_go_to_another_thread() {
    fn sendable<T: Send + Sync>(_: &T) {}
    let batch = Datagrams::new(1, 16);
    sendable(&batch);
}

// Beside Python, and the example.

/// Sends segments (option 103) to the port given, and checks what comes back, put together (option 104) or not.
const PYTHON_CLIENT: &str = "
import signal, socket, sys
signal.alarm(120)
family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET
to = (sys.argv[1], int(sys.argv[2]))
for gro in 0, 1:
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.settimeout(60)
    s.setsockopt(17, 104, gro)
    for each, size in (1200, 12001), (64, 4096), (7, 7), (700, 1399), (1, 64):
        data = bytes((i * 7 + i // 256) % 256 for i in range(size))
        s.setsockopt(17, 103, each)
        assert s.sendto(data, to) == size
        expected = [data[i:i + each] for i in range(0, size, each)]
        back = []
        while len(back) < len(expected):
            data, control, flags, peer = s.recvmsg(65535, 256)
            assert peer[1] == to[1], peer
            unit = len(data)
            for level, kind, value in control:
                if (level, kind) == (17, 104):
                    unit = int.from_bytes(value, sys.byteorder)
            back += [data[i:i + unit] for i in range(0, len(data), unit)]
        assert back == expected, (gro, each, size)
    s.setsockopt(17, 103, 0)
    s.sendto(b'', to)
    assert s.recvfrom(16)[0] == b''
    s.sendto(b'x' * 65507, to) if family == socket.AF_INET else s.sendto(b'x' * 65500, to)
    assert len(s.recv(70000)) >= 65500
print('ok')
";

fn python_client(host: &str, port: u16) {
    let mut command = Command::new("python3");
    command.args(["-c", PYTHON_CLIENT, host, &port.to_string()]);
    let finished = run(&mut command, b"");
    assert!(finished.status.success(), "{finished:?}");
    assert_eq!(finished.stdout, b"ok\n", "{finished:?}");
}

#[test]
fn python_gets_back_what_it_sent_in_segments() {
    if !has_python() {
        return;
    }
    on_both(|| {
        for (family, host) in [(AF_INET, "127.0.0.1"), (AF_INET6, "::1")] {
            let Some((server, address)) = try_udp(family) else {
                return;
            };
            server.set_udp_gro(true).unwrap();
            let port = address.port().unwrap();
            let (stop, stopped) = (server.clone(), beside(move || python_client(host, port)));
            let closing = beside(move || {
                stopped.join();
                stop.close().unwrap();
            });
            let mut batch = Datagrams::new(32, ROOM);
            loop {
                match server.recv_many(&mut batch) {
                    Ok(count) => assert_eq!(server.send_many(&batch).unwrap(), count),
                    Err(error) => break assert_eq!(error.errno(), Some(libc::EBADF)),
                }
            }
            closing.join();
        }
    });
}

/// The example, and where it listens.
fn udp_echo(args: &[&str]) -> (Process, std::net::SocketAddr) {
    let mut process = Process::example("udp_echo", args);
    let line = process.line();
    let address = line.strip_prefix("listening on ");
    let address = address.unwrap_or_else(|| panic!("the first line is {line:?}"));
    let address = address.parse().unwrap();
    (process, address)
}

#[test]
fn udp_echo_sends_every_datagram_back_and_ends_by_sigterm() {
    for bind in ["127.0.0.1:0", "[::1]:0"] {
        if UdpSocket::bind(bind).is_err() {
            println!("skipped: no IPv6 here");
            continue;
        }
        for args in [
            &["--workers", "1"][..],
            &["--workers", "2", "--batch", "1"],
            &["--gro", "off"],
            &["--gro", "on", "--workers", "2"],
        ] {
            let (mut server, address) = udp_echo(&[&["--bind", bind], args].concat());
            // Several senders, so that every worker has some.
            for index in 0..8u8 {
                let client = UdpSocket::bind((address.ip(), 0)).unwrap();
                client
                    .set_read_timeout(Some(Duration::from_secs(60)))
                    .unwrap();
                client.connect(address).unwrap();
                let sizes = [0, 1, 64, 64, 1_200, 1_200, 65_507 - 20];
                for size in sizes {
                    client.send(&vec![index; size]).unwrap();
                }
                let mut buffer = vec![0; 70_000];
                for size in sizes {
                    let len = client.recv(&mut buffer).unwrap();
                    assert_eq!(len, size, "{args:?}");
                    assert!(buffer[..len].iter().all(|byte| *byte == index));
                }
            }
            if has_python() {
                python_client(&address.ip().to_string(), address.port());
            }
            server.signal(libc::SIGTERM);
            let finished = server.wait();
            assert!(finished.status.success(), "{finished:?}");
            assert!(
                finished.stdout.is_empty() && finished.stderr.is_empty(),
                "{finished:?}"
            );
        }
    }
}

#[test]
fn udp_echo_says_why_it_cannot_listen() {
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let finished = support::run_example("udp_echo", ["--bind", &address]);
    assert_eq!(finished.status.code(), Some(1), "{finished:?}");
    let text = String::from_utf8_lossy(finished.stderr.as_bytes()).into_owned();
    assert!(
        text.starts_with("udp_echo: [Errno 98] ") && text.contains(&address),
        "{text}"
    );
}

#[test]
fn a_batch_that_memory_cannot_hold_is_refused() {
    for bytes in [1 << 62, usize::MAX] {
        let made = std::panic::catch_unwind(|| Datagrams::new(4, bytes));
        assert!(made.is_err(), "{bytes}");
    }
}
