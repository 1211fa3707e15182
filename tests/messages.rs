//! Messages: recvmsg, sendmsg, ancillary data and descriptors, in fibers and on plain threads, between processes and beside
//! Python's sockets.
//!
//! Whether a descriptor is still open anywhere is asked of a pipe: its reader sees the end once no writer is left.
#![allow(unsafe_code)]

mod support;

use std::io::{IoSlice, IoSliceMut, PipeReader, PipeWriter, Read, Write, pipe};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use ringsock::prelude::*;
use ringsock::{
    Afalg, Ancillary, AncillaryToSend, CMSG_LEN, CMSG_SPACE, Credentials, SendMsg, recv_fds,
    recv_fds_with, run, send_fds, send_fds_with, socketpair, socketpair_with, spawn, yield_now,
};
use support::{beside, errno, on_both};

/// Longer than any wait of a test that goes well, in seconds.
const LONG: f64 = 60.0;

fn none() -> MsgFlags {
    MsgFlags::default()
}

/// Whether no writer of the pipe is left anywhere.
fn is_ended(reader: &PipeReader) -> bool {
    let mut poll = libc::pollfd {
        fd: reader.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid entry; the kernel fills `revents`.
    unsafe { libc::poll(&mut poll, 1, 0) };
    poll.revents & libc::POLLHUP != 0
}

/// As `is_ended`, waiting a little: other tests of this process fork children, which hold every descriptor until they exec.
fn ends(reader: &PipeReader) -> bool {
    let limit = Instant::now() + Duration::from_secs(20);
    while !is_ended(reader) && Instant::now() < limit {
        ringsock::sleep(0.001).unwrap();
    }
    is_ended(reader)
}

fn rights(ancdata: Vec<Ancillary>) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    for item in ancdata {
        match item {
            Ancillary::Rights(rights) => fds.extend(rights),
            other => panic!("not descriptors: {other:?}"),
        }
    }
    fds
}

fn random_numbers() -> impl FnMut() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let mut state = now.map_or(1, |now| now.as_nanos() as u64) | 1;
    println!("seed {state}");
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

fn spin(delay: Duration) {
    let start = Instant::now();
    while start.elapsed() < delay {
        std::hint::spin_loop();
    }
}

// Descriptors.

#[test]
fn descriptors_arrive_usable_and_not_inheritable() {
    on_both(|| {
        for kind in [SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET] {
            let (left, right) = socketpair_with(AF_UNIX, kind, 0).unwrap();
            for timeout in [None, Some(LONG), Some(0.0)] {
                left.settimeout(timeout).unwrap();
                right.settimeout(timeout).unwrap();
                let (mut reader, writer) = pipe().unwrap();
                let fds = [writer.as_fd(), reader.as_fd()];
                assert_eq!(send_fds(&left, &[IoSlice::new(b"two")], &fds).unwrap(), 3);
                drop(writer);
                let (data, mut fds, flags, address) = recv_fds(&right, 16, 2).unwrap();
                assert_eq!((&data[..], fds.len(), address), (&b"two"[..], 2, None));
                assert_eq!(flags.bits() & !libc::MSG_EOR, 0);
                for fd in &fds {
                    // SAFETY: no memory is passed.
                    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) };
                    assert_eq!(flags, libc::FD_CLOEXEC);
                }
                fds.truncate(1);
                let mut writer = PipeWriter::from(fds.remove(0));
                writer.write_all(b"through").unwrap();
                drop(writer);
                let mut text = String::new();
                reader.read_to_string(&mut text).unwrap();
                assert_eq!(text, "through");
            }
        }
    });
}

#[test]
fn descriptors_that_nobody_takes_are_closed() {
    on_both(|| {
        let send = |socket: &Socket, count| {
            let (reader, writer) = pipe().unwrap();
            let fds: Vec<BorrowedFd<'_>> = vec![writer.as_fd(); count];
            assert_eq!(send_fds(socket, &[IoSlice::new(b"data")], &fds).unwrap(), 4);
            reader
        };
        let room = CMSG_SPACE(12).unwrap();
        // Received and dropped.
        let (left, right) = socketpair().unwrap();
        let reader = send(&left, 3);
        assert!(!is_ended(&reader), "they are under way");
        let message = right.recvmsg_with(16, room, none()).unwrap();
        assert!(!is_ended(&reader), "they have arrived");
        drop(message);
        assert!(ends(&reader));
        // No room at all; room for one of three; room for a header only.
        for (ancbufsize, count) in [(0, 0), (CMSG_LEN(4).unwrap(), 1), (16, 0), (15, 0)] {
            let reader = send(&left, 3);
            let message = right.recvmsg_with(16, ancbufsize, none()).unwrap();
            assert_eq!(message.data, b"data");
            assert_eq!(message.flags, MSG_CTRUNC);
            assert_eq!(
                rights(message.ancdata).len(),
                count,
                "in {ancbufsize} bytes"
            );
            assert!(ends(&reader), "in {ancbufsize} bytes");
        }
        // Taken by a call that has no place for them.
        let reader = send(&left, 1);
        assert_eq!(right.recv(16).unwrap(), b"data");
        assert!(ends(&reader));
        // Looked at, twice: each look makes new ones.
        let reader = send(&left, 1);
        for flags in [MSG_PEEK, MSG_PEEK, none()] {
            let (data, fds, ..) = recv_fds_with(&right, 16, 1, flags).unwrap();
            assert_eq!((&data[..], fds.len()), (&b"data"[..], 1));
            assert!(!is_ended(&reader));
        }
        assert!(ends(&reader));
        // Left in the queue of a socket that closes.
        let reader = send(&left, 1);
        right.close().unwrap();
        drop((left, right));
        assert!(ends(&reader));
    });
}

#[test]
fn descriptors_of_the_sender_have_an_owner() {
    // linux/socket.h, Linux 6.5; the libc crate lacks it.
    const SO_PASSPIDFD: i32 = 76;
    let open = || {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap();
        let links = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        links
            .filter(|link| link.to_string_lossy().contains("[pidfd]"))
            .count()
    };
    let (left, right) = socketpair().unwrap();
    if let Err(error) = right.setsockopt(SOL_SOCKET, SO_PASSPIDFD, 1) {
        println!("skipped: no SO_PASSPIDFD: {error}");
        return;
    }
    left.sendall(b"mine").unwrap();
    let room = CMSG_SPACE(4).unwrap();
    let message = right.recvmsg_with(16, room, none()).unwrap();
    let [Ancillary::PidFd(fd)] = &message.ancdata[..] else {
        panic!("{:?}", message.ancdata);
    };
    let info = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let info = std::fs::read_to_string(info).unwrap();
    let pid = format!("Pid:\t{}\n", std::process::id());
    assert!(info.contains(&pid), "{info}");
    assert_eq!(open(), 1);
    drop(message);
    assert_eq!(open(), 0);
    // It takes the place of a descriptor that was not sent.
    left.sendall(b"mine").unwrap();
    assert_eq!(recv_fds(&right, 16, 1).unwrap().1.len(), 0);
    assert_eq!(open(), 0);
}

#[test]
fn waiting_for_all_ends_at_descriptors_and_loses_none() {
    on_both(|| {
        for timeout in [None, Some(LONG)] {
            let (left, right) = socketpair().unwrap();
            right.settimeout(timeout).unwrap();
            let (reader, writer) = pipe().unwrap();
            let sending = beside(move || {
                let sender = left.clone();
                left.sendall(b"12").unwrap();
                thread::sleep(Duration::from_millis(5));
                send_fds(&left, &[IoSlice::new(b"34")], &[writer.as_fd()]).unwrap();
                thread::sleep(Duration::from_millis(5));
                send_fds(&left, &[IoSlice::new(b"56")], &[writer.as_fd()]).unwrap();
                left.sendall(b"789abc").unwrap();
                sender.shutdown(SHUT_WR).unwrap();
            });
            let room = CMSG_SPACE(4).unwrap();
            let message = right.recvmsg_with(8, room, MSG_WAITALL).unwrap();
            assert_eq!(
                message.data, b"1234",
                "as the kernel: up to the descriptors"
            );
            assert_eq!(rights(message.ancdata).len(), 1);
            let (mut a, mut b) = ([0; 1], [0; 1]);
            let mut buffers = [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)];
            let message = right
                .recvmsg_into_with(&mut buffers, room, MSG_WAITALL)
                .unwrap();
            assert_eq!((message.nbytes, a, b), (2, *b"5", *b"6"));
            assert_eq!(rights(message.ancdata).len(), 1);
            let message = right.recvmsg_with(100, room, MSG_WAITALL).unwrap();
            assert_eq!(message.data, b"789abc", "the end of the stream ends it");
            sending.join();
            assert!(ends(&reader));
        }
    });
}

#[test]
fn waiting_for_all_tells_of_descriptors_that_had_no_room() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        let (reader, writer) = pipe().unwrap();
        send_fds(&left, &[IoSlice::new(b"12")], &[writer.as_fd()]).unwrap();
        left.sendall(b"34").unwrap();
        drop(writer);
        let message = right.recvmsg_with(4, 0, MSG_WAITALL).unwrap();
        assert_eq!((&message.data[..], message.flags), (&b"12"[..], MSG_CTRUNC));
        let message = right.recvmsg_with(2, 0, MSG_WAITALL).unwrap();
        assert_eq!((&message.data[..], message.flags), (&b"34"[..], none()));
        assert!(ends(&reader));
    });
}

#[test]
fn waiting_for_all_returns_at_its_deadline_what_came() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        left.sendall(b"half").unwrap();
        right.settimeout(0.05).unwrap();
        let room = CMSG_SPACE(4).unwrap();
        let start = Instant::now();
        let message = right.recvmsg_with(8, room, MSG_WAITALL).unwrap();
        assert_eq!(message.data, b"half");
        assert!(start.elapsed() >= Duration::from_millis(49));
        let nothing = right.recvmsg_with(8, room, MSG_WAITALL);
        assert_eq!(nothing.unwrap_err(), Error::Timeout);
    });
}

/// A cancelled fiber either returns the message or leaves it in the socket.
#[test]
fn descriptors_of_a_cancelled_receive_do_not_leak() {
    run(|| {
        const TRIALS: usize = 2000;
        let mut random = random_numbers();
        let (left, right) = socketpair_with(AF_UNIX, SOCK_DGRAM, 0).unwrap();
        let (turn, turns) = mpsc::channel::<(PipeWriter, Duration)>();
        let sending = beside(move || {
            for (writer, delay) in turns {
                spin(delay);
                send_fds(&left, &[IoSlice::new(b"fd")], &[writer.as_fd()]).unwrap();
            }
            left
        });
        let (mut returned, mut left_behind) = (0, 0);
        let limit = Instant::now() + Duration::from_secs(40);
        for trial in 0..TRIALS {
            let (reader, writer) = pipe().unwrap();
            let receiver = right.clone();
            let receiving = spawn(move || recv_fds(&receiver, 16, 1));
            yield_now();
            let delay = Duration::from_micros(random() % 60);
            turn.send((writer, delay)).unwrap();
            spin(Duration::from_micros(random() % 90));
            if trial % 3 == 0 {
                // Completions are looked for in between.
                yield_now();
            }
            receiving.cancel();
            let received = match receiving.join().unwrap() {
                Ok(received) => {
                    returned += 1;
                    received
                }
                Err(error) => {
                    assert_eq!(error, Error::Cancelled);
                    left_behind += 1;
                    right.settimeout(LONG).unwrap();
                    let received = recv_fds(&right, 16, 1).unwrap();
                    right.settimeout(None).unwrap();
                    received
                }
            };
            assert_eq!((&received.0[..], received.1.len()), (&b"fd"[..], 1));
            drop(received);
            assert!(ends(&reader), "leaked in trial {trial}");
            if Instant::now() > limit {
                break;
            }
        }
        println!("{returned} returned, {left_behind} left behind");
        assert!(returned > 0 && left_behind > 0, "no race");
        drop(turn);
        sending.join();
    });
}

/// The message has been received, and the fiber is cancelled before it hears of that: by a fiber that woke just before it.
#[test]
fn descriptors_of_a_receive_that_completed_before_its_cancel_are_returned() {
    run(|| {
        let (left, right) = socketpair_with(AF_UNIX, SOCK_DGRAM, 0).unwrap();
        let (bell, ear) = socketpair().unwrap();
        right.settimeout(LONG).unwrap();
        let (go, turns) = mpsc::channel::<PipeWriter>();
        let (sent, gone) = mpsc::channel::<()>();
        let sending = beside(move || {
            for writer in turns {
                bell.sendall(b"!").unwrap();
                send_fds(&left, &[IoSlice::new(b"fd")], &[writer.as_fd()]).unwrap();
                sent.send(()).unwrap();
            }
        });
        let gone = std::rc::Rc::new(gone);
        let mut returned = 0;
        for _ in 0..200 {
            let (reader, writer) = pipe().unwrap();
            let receiver = right.clone();
            let receiving = spawn(move || recv_fds(&receiver, 16, 1));
            let (go, gone) = (go.clone(), gone.clone());
            let holding = spawn(move || {
                for _ in 0..4 {
                    yield_now();
                }
                // Both wait now. It holds the thread until both messages are there.
                go.send(writer).unwrap();
                gone.recv().unwrap();
            });
            assert_eq!(ear.recv(1).unwrap(), b"!");
            receiving.cancel();
            let received = match receiving.join().unwrap() {
                Ok(received) => {
                    returned += 1;
                    received
                }
                Err(error) => {
                    assert_eq!(error, Error::Cancelled);
                    recv_fds(&right, 16, 1).unwrap()
                }
            };
            assert_eq!(received.1.len(), 1);
            holding.join().unwrap();
            drop(received);
            assert!(ends(&reader));
        }
        // On epoll nothing is received before the worker looks, and the cancel is first.
        assert!(
            returned > 0 || support::on_epoll(),
            "no cancel came late enough"
        );
        drop(go);
        sending.join();
    });
}

/// Every message is either returned in time or still there afterwards, whole, in order, with its descriptor.
#[test]
fn a_deadline_and_a_message_in_a_race_lose_nothing() {
    on_both(|| {
        const TRIALS: u64 = 2000;
        let mut random = random_numbers();
        let (left, right) = socketpair_with(AF_UNIX, SOCK_SEQPACKET, 0).unwrap();
        let (turn, turns) = mpsc::channel::<(u64, PipeWriter, Duration)>();
        let sending = beside(move || {
            for (number, writer, delay) in turns {
                spin(delay);
                let data = number.to_ne_bytes();
                send_fds(&left, &[IoSlice::new(&data)], &[writer.as_fd()]).unwrap();
            }
            left
        });
        let (mut in_time, mut late) = (0, 0);
        let limit = Instant::now() + Duration::from_secs(60);
        for number in 0..TRIALS {
            let (reader, writer) = pipe().unwrap();
            let timeout = Duration::from_micros(20 + random() % 150);
            right.settimeout(timeout).unwrap();
            let delay = Duration::from_micros(random() % 170);
            turn.send((number, writer, delay)).unwrap();
            let received = match recv_fds(&right, 16, 1) {
                Err(error) => {
                    assert_eq!(error, Error::Timeout);
                    late += 1;
                    right.settimeout(LONG).unwrap();
                    recv_fds(&right, 16, 1).unwrap()
                }
                Ok(received) => {
                    in_time += 1;
                    received
                }
            };
            assert_eq!(received.0, number.to_ne_bytes());
            assert_eq!(received.1.len(), 1);
            drop(received);
            assert!(ends(&reader), "leaked in trial {number}");
            if Instant::now() > limit {
                break;
            }
        }
        println!("{in_time} in time, {late} late");
        drop(turn);
        let left = sending.join();
        assert!(
            recv_fds_with(&right, 16, 1, MSG_DONTWAIT)
                .unwrap_err()
                .is_would_block()
        );
        drop(left);
    });
}

#[test]
fn close_ends_a_recvmsg_and_a_sendmsg_that_wait() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        let other = right.clone();
        let closing = beside(move || {
            thread::sleep(Duration::from_millis(20));
            other.close().unwrap();
        });
        let waited = right.recvmsg_with(16, CMSG_SPACE(4).unwrap(), none());
        assert_eq!(errno(waited), Some(libc::EBADF));
        closing.join();
        assert_eq!(errno(right.recvmsg(16)), Some(libc::EBADF));
        assert_eq!(
            errno(right.sendmsg(&[IoSlice::new(b"x")])),
            Some(libc::EBADF)
        );
        drop(left);

        for kind in [SOCK_STREAM, SOCK_DGRAM] {
            let (left, right) = socketpair_with(AF_UNIX, kind, 0).unwrap();
            while left.send_with(&[0; 512], MSG_DONTWAIT).is_ok() {}
            let other = left.clone();
            let closing = beside(move || {
                thread::sleep(Duration::from_millis(20));
                other.close().unwrap();
            });
            let waited = left.sendmsg(&[IoSlice::new(&[1; 512])]);
            assert_eq!(errno(waited), Some(libc::EBADF), "{kind:?}");
            closing.join();
            drop(right);
        }
    });
}

// Between processes.

/// Not a test of its own: what the next one starts as a child.
#[test]
fn child_that_answers_through_a_received_descriptor() {
    if std::env::var_os("RINGSOCK_MESSAGES_CHILD").is_none() {
        return;
    }
    let socket = Socket::from_fd(std::io::stdin().as_fd().try_clone_to_owned().unwrap()).unwrap();
    let (data, mut fds, ..) = recv_fds(&socket, 1024, 1).unwrap();
    let mut writer = PipeWriter::from(fds.remove(0));
    writer.write_all(b"got ").unwrap();
    writer.write_all(&data).unwrap();
    let (reader, mut back) = pipe().unwrap();
    send_fds(&socket, &[IoSlice::new(b"a reader")], &[reader.as_fd()]).unwrap();
    back.write_all(b"from the child").unwrap();
}

#[test]
fn descriptors_pass_between_processes() {
    on_both(|| {
        let (ours, theirs) = socketpair().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "child_that_answers_through_a_received_descriptor",
            ])
            .env("RINGSOCK_MESSAGES_CHILD", "1")
            .stdin(Stdio::from(theirs.detach().unwrap()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        ours.settimeout(LONG).unwrap();
        let (mut reader, writer) = pipe().unwrap();
        send_fds(&ours, &[IoSlice::new(b"this")], &[writer.as_fd()]).unwrap();
        drop(writer);
        let (data, mut fds, ..) = recv_fds(&ours, 1024, 1).unwrap();
        assert_eq!(data, b"a reader");
        let mut text = String::new();
        PipeReader::from(fds.remove(0))
            .read_to_string(&mut text)
            .unwrap();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "from the childgot this");
        assert!(child.wait().unwrap().success());
    });
}

#[test]
fn descriptors_and_control_data_pass_to_and_from_python() {
    on_both(|| {
        let script = "import signal, socket, os
signal.alarm(120)
s = socket.socket(fileno=0)
data, fds, flags, addr = socket.recv_fds(s, 1024, 4)
assert (data, len(fds), flags) == (b'from rust', 3, 0), (data, fds, flags)
for fd in fds: os.write(fd, b'x')
for fd in fds: os.close(fd)
r, w = os.pipe()
socket.send_fds(s, [b'from', b' python'], [r, w])
os.write(w, b'to rust')
os.close(r); os.close(w)
s.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
s.send(b'ready')
data, anc, flags, addr = s.recvmsg(1024, socket.CMSG_SPACE(12))
assert anc[0][1] == socket.SCM_CREDENTIALS, anc
s.send(anc[0][2])
";
        let (ours, theirs) = socketpair().unwrap();
        let child = Command::new("python3")
            .args(["-c", script])
            .stdin(Stdio::from(theirs.detach().unwrap()))
            .spawn();
        let mut child = match child {
            Ok(child) => child,
            Err(error) => {
                println!("skipped: python3 cannot be run here: {error}");
                return;
            }
        };
        ours.settimeout(LONG).unwrap();
        let (mut reader, writer) = pipe().unwrap();
        send_fds(&ours, &[IoSlice::new(b"from rust")], &[writer.as_fd(); 3]).unwrap();
        drop(writer);
        let (data, mut fds, ..) = recv_fds(&ours, 1024, 4).unwrap();
        assert_eq!((&data[..], fds.len()), (&b"from python"[..], 2));
        fds.truncate(1);
        let mut text = [0; 7];
        PipeReader::from(fds.remove(0))
            .read_exact(&mut text)
            .unwrap();
        assert_eq!(&text, b"to rust");
        let mut marks = String::new();
        reader.read_to_string(&mut marks).unwrap();
        assert_eq!(marks, "xxx", "Python closed all three");
        assert_eq!(ours.recv(16).unwrap(), b"ready");
        // SAFETY: no memory is passed.
        let (pid, uid, gid) = unsafe { (libc::getpid(), libc::getuid(), libc::getgid()) };
        let ancdata = &[AncillaryToSend::Credentials(Credentials { pid, uid, gid })];
        let options = SendMsg {
            ancdata,
            ..Default::default()
        };
        ours.sendmsg_with(&[IoSlice::new(b"it is me")], options)
            .unwrap();
        let seen = [pid.to_ne_bytes(), uid.to_ne_bytes(), gid.to_ne_bytes()].concat();
        assert_eq!(ours.recv(16).unwrap(), seen);
        assert!(child.wait().unwrap().success());
    });
}

// Other ancillary data.

#[test]
fn credentials_tell_the_sender() {
    on_both(|| {
        let (left, right) = socketpair_with(AF_UNIX, SOCK_DGRAM, 0).unwrap();
        right.setsockopt(SOL_SOCKET, SO_PASSCRED, 1).unwrap();
        let (reader, writer) = pipe().unwrap();
        send_fds(&left, &[IoSlice::new(b"me")], &[writer.as_fd()]).unwrap();
        drop(writer);
        let room = CMSG_SPACE(12).unwrap() + CMSG_SPACE(4).unwrap();
        let message = right.recvmsg_with(16, room, none()).unwrap();
        let [Ancillary::Credentials(sender), Ancillary::Rights(fds)] = &message.ancdata[..] else {
            panic!("{message:?}");
        };
        // SAFETY: no memory is passed.
        let (pid, uid, gid) = unsafe { (libc::getpid(), libc::getuid(), libc::getgid()) };
        assert_eq!(*sender, Credentials { pid, uid, gid });
        assert_eq!(fds.len(), 1);
        drop(message);
        assert!(ends(&reader));
        // Cut in the middle.
        left.send(b"me").unwrap();
        let message = right
            .recvmsg_with(16, CMSG_LEN(5).unwrap(), none())
            .unwrap();
        assert_eq!(message.flags, MSG_CTRUNC);
        assert!(
            matches!(&message.ancdata[..], [Ancillary::Raw { kind: libc::SCM_CREDENTIALS, data, .. }] if data.len() == 5),
            "{message:?}"
        );
    });
}

#[test]
fn datagrams_tell_where_they_were_sent_and_when() {
    on_both(|| {
        let receiver = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
        receiver.bind(("", 0)).unwrap();
        let port = receiver.getsockname().unwrap().port().unwrap();
        let set = |level, option| receiver.setsockopt(level, option, 1).unwrap();
        set(IPPROTO_IP, libc::IP_PKTINFO);
        set(IPPROTO_IP, libc::IP_RECVTTL);
        set(SOL_SOCKET, libc::SO_TIMESTAMPNS);
        let sender = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
        let source = Ipv4Addr::new(127, 0, 0, 5);
        let interface = 0;
        let options = SendMsg {
            ancdata: &[
                AncillaryToSend::PktInfo4 { interface, source },
                AncillaryToSend::Ttl(42),
            ],
            address: Some(&("127.0.0.3", port)),
            ..Default::default()
        };
        let before = SystemTime::now();
        sender
            .sendmsg_with(&[IoSlice::new(b"hello")], options)
            .unwrap();
        let message = receiver.recvmsg_with(16, 256, none()).unwrap();
        let after = SystemTime::now();
        assert_eq!(message.address.unwrap().ip(), Some(source.into()));
        assert_eq!(message.ancdata.len(), 3);
        for item in &message.ancdata {
            match *item {
                Ancillary::PktInfo4 {
                    interface,
                    local,
                    destination,
                } => {
                    assert!(interface > 0);
                    assert_eq!(local, Ipv4Addr::new(127, 0, 0, 3));
                    assert_eq!(destination, local);
                }
                Ancillary::Ttl(ttl) => assert_eq!(ttl, 42),
                Ancillary::Timestamp(time) => {
                    // The kernel's clock for packets may be a tick behind.
                    let slack = Duration::from_millis(20);
                    assert!(before - slack <= time && time <= after + slack);
                }
                ref other => panic!("{other:?}"),
            }
        }
        // Microseconds instead.
        receiver
            .setsockopt(SOL_SOCKET, libc::SO_TIMESTAMPNS, 0)
            .unwrap();
        set(SOL_SOCKET, libc::SO_TIMESTAMP);
        sender.sendto(b"hello", ("127.0.0.1", port)).unwrap();
        let message = receiver.recvmsg_with(16, 256, none()).unwrap();
        let times = message.ancdata.iter().filter_map(|item| match item {
            Ancillary::Timestamp(time) => Some(*time),
            _ => None,
        });
        let times: Vec<SystemTime> = times.collect();
        assert_eq!(times.len(), 1);
        assert!(
            times[0] + Duration::from_secs(60) > after
                && times[0] < after + Duration::from_secs(60)
        );
    });
}

#[test]
fn ipv6_datagrams_tell_where_they_were_sent() {
    on_both(|| {
        let receiver = Socket::new(AF_INET6, SOCK_DGRAM, 0).and_then(|socket| {
            socket.bind(("::1", 0))?;
            Ok(socket)
        });
        let receiver = match receiver {
            Ok(receiver) => receiver,
            Err(error) => {
                println!("skipped: no IPv6 here: {error}");
                return;
            }
        };
        let address = receiver.getsockname().unwrap();
        receiver
            .setsockopt(IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
            .unwrap();
        receiver
            .setsockopt(IPPROTO_IPV6, IPV6_RECVHOPLIMIT, 1)
            .unwrap();
        let sender = Socket::new(AF_INET6, SOCK_DGRAM, 0).unwrap();
        let source = Ipv6Addr::LOCALHOST;
        let options = SendMsg {
            ancdata: &[
                AncillaryToSend::PktInfo6 {
                    interface: 0,
                    source,
                },
                AncillaryToSend::HopLimit(33),
            ],
            address: Some(&address),
            ..Default::default()
        };
        sender
            .sendmsg_with(&[IoSlice::new(b"hello")], options)
            .unwrap();
        let message = receiver.recvmsg_with(16, 256, none()).unwrap();
        assert_eq!(message.ancdata.len(), 2);
        for item in &message.ancdata {
            match *item {
                Ancillary::PktInfo6 {
                    interface,
                    destination,
                } => {
                    assert!(interface > 0);
                    assert_eq!(destination, Ipv6Addr::LOCALHOST);
                }
                Ancillary::HopLimit(limit) => assert_eq!(limit, 33),
                ref other => panic!("{other:?}"),
            }
        }
    });
}

// Data.

#[test]
fn buffers_are_gathered_and_scattered_in_order() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        let parts = [&b"ab"[..], b"", b"cdefg", b"h"].map(IoSlice::new);
        assert_eq!(left.sendmsg(&parts).unwrap(), 8);
        let (mut a, mut b, mut c, mut d) = ([0; 1], [0; 0], [0; 4], [9; 8]);
        let mut room = [
            IoSliceMut::new(&mut a),
            IoSliceMut::new(&mut b),
            IoSliceMut::new(&mut c),
            IoSliceMut::new(&mut d),
        ];
        let message = right.recvmsg_into(&mut room).unwrap();
        assert_eq!((message.nbytes, message.flags), (8, none()));
        assert_eq!((&a, &c, &d), (b"a", b"bcde", b"fgh\x09\x09\x09\x09\x09"));
        // More pieces than the kernel takes, and as many as it takes.
        let many = vec![IoSlice::new(b"x"); 1025];
        assert_eq!(errno(left.sendmsg(&many)), Some(libc::EMSGSIZE));
        assert_eq!(left.sendmsg(&many[..1024]).unwrap(), 1024);
        let mut bytes = vec![0; 1025];
        let mut room: Vec<IoSliceMut<'_>> = bytes.chunks_mut(1).map(IoSliceMut::new).collect();
        assert_eq!(errno(right.recvmsg_into(&mut room)), Some(libc::EMSGSIZE));
        assert_eq!(right.recvmsg_into(&mut room[..1024]).unwrap().nbytes, 1024);
        assert_eq!(&bytes[1020..], b"xxxx\0");
        // None at all.
        assert_eq!(left.sendmsg(&[]).unwrap(), 0);
        left.sendall(b"rest").unwrap();
        assert_eq!(right.recvmsg_into(&mut []).unwrap().nbytes, 0);
        assert_eq!(right.recv(16).unwrap(), b"rest");
    });
}

#[test]
fn what_is_cut_is_told() {
    on_both(|| {
        let (left, right) = socketpair_with(AF_UNIX, SOCK_DGRAM, 0).unwrap();
        let send = || left.send(b"hello").unwrap();
        send();
        let message = right.recvmsg(2).unwrap();
        assert_eq!((&message.data[..], message.flags), (&b"he"[..], MSG_TRUNC));
        send();
        let message = right.recvmsg_with(2, 0, MSG_TRUNC).unwrap();
        assert_eq!((&message.data[..], message.flags), (&b"he"[..], MSG_TRUNC));
        send();
        let mut buffer = [0; 2];
        let mut room = [IoSliceMut::new(&mut buffer)];
        let message = right.recvmsg_into_with(&mut room, 0, MSG_TRUNC).unwrap();
        assert_eq!(
            (message.nbytes, message.flags, buffer),
            (5, MSG_TRUNC, *b"he")
        );
        // Nothing wanted: the datagram is taken all the same.
        send();
        let message = right.recvmsg(0).unwrap();
        assert_eq!((message.data.len(), message.flags), (0, MSG_TRUNC));
        assert!(
            right
                .recvmsg_with(16, 0, MSG_DONTWAIT)
                .unwrap_err()
                .is_would_block()
        );
        // An empty datagram is data.
        left.send(b"").unwrap();
        let message = right.recvmsg(16).unwrap();
        assert_eq!((message.data.len(), message.flags), (0, none()));
        let too_much = right.recvmsg_with(16, 1 << 31, none());
        assert!(matches!(too_much, Err(Error::Value(_))));
    });
}

#[test]
fn recvmsg_waits_as_the_mode_says() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        right.settimeout(0.03).unwrap();
        let start = Instant::now();
        assert_eq!(right.recvmsg(16).unwrap_err(), Error::Timeout);
        assert!(start.elapsed() >= Duration::from_millis(29));
        right.settimeout(0).unwrap();
        assert_eq!(errno(right.recvmsg(16)), Some(libc::EAGAIN));
        right.settimeout(None).unwrap();
        let flags = [MSG_DONTWAIT, MSG_ERRQUEUE, MSG_ERRQUEUE | MSG_DONTWAIT];
        for flags in flags {
            assert_eq!(
                errno(right.recvmsg_with(16, 64, flags)),
                Some(libc::EAGAIN),
                "{flags:?}"
            );
        }
        let sending = beside(move || {
            thread::sleep(Duration::from_millis(10));
            left.sendall(b"at last").unwrap();
            thread::sleep(Duration::from_millis(10));
        });
        assert_eq!(right.recvmsg(16).unwrap().data, b"at last");
        let end = right.recvmsg(16).unwrap();
        assert!(end.data.is_empty(), "the end of the stream");
        sending.join();
    });
}

#[test]
fn the_error_queue_tells_of_a_refused_datagram() {
    on_both(|| {
        let gone = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
        gone.bind(("127.0.0.1", 0)).unwrap();
        let address = gone.getsockname().unwrap();
        drop(gone);
        let sender = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
        sender.setsockopt(IPPROTO_IP, libc::IP_RECVERR, 1).unwrap();
        sender.sendto(b"hello?", &address).unwrap();
        let limit = Instant::now() + Duration::from_secs(20);
        let message = loop {
            match sender.recvmsg_with(64, 256, MSG_ERRQUEUE) {
                Ok(message) => break message,
                Err(error) => {
                    assert!(error.is_would_block() || error.errno() == Some(libc::ECONNREFUSED))
                }
            }
            assert!(Instant::now() < limit, "no error came");
            ringsock::sleep(0.001).unwrap();
        };
        assert_eq!(message.data, b"hello?");
        assert_eq!(message.flags, MSG_ERRQUEUE);
        assert_eq!(message.address, Some(address));
        assert!(
            matches!(&message.ancdata[..], [Ancillary::Raw { level: libc::IPPROTO_IP, kind: libc::IP_RECVERR, data }]
                if data[..4] == libc::ECONNREFUSED.to_ne_bytes()),
            "{:?}",
            message.ancdata
        );
    });
}

#[test]
fn packets_keep_their_boundaries_and_mark_their_end() {
    on_both(|| {
        let (left, right) = socketpair_with(AF_UNIX, SOCK_SEQPACKET, 0).unwrap();
        left.sendmsg(&[IoSlice::new(b"one "), IoSlice::new(b"packet")])
            .unwrap();
        left.sendmsg(&[IoSlice::new(b"another")]).unwrap();
        drop(left);
        let without_eor = |flags: MsgFlags| MsgFlags::new(flags.bits() & !libc::MSG_EOR);
        let message = right.recvmsg(64).unwrap();
        assert_eq!(message.data, b"one packet");
        assert_eq!(without_eor(message.flags), none());
        let message = right.recvmsg(3).unwrap();
        assert_eq!(message.data, b"ano");
        assert_eq!(without_eor(message.flags), MSG_TRUNC);
        assert!(right.recvmsg(64).unwrap().data.is_empty());
    });
}

#[test]
fn messages_that_waited_for_room_arrive_once_and_whole() {
    on_both(|| {
        for (kind, connected) in [
            (SOCK_DGRAM, true),
            (SOCK_DGRAM, false),
            (SOCK_SEQPACKET, true),
        ] {
            let (left, right) = socketpair_with(AF_UNIX, kind, 0).unwrap();
            let (left, right, address) = if connected {
                (left, right, None)
            } else {
                right.close().unwrap();
                let right = Socket::new(AF_UNIX, kind, 0).unwrap();
                right.bind("").unwrap();
                let address = right.getsockname().unwrap();
                (Socket::new(AF_UNIX, kind, 0).unwrap(), right, Some(address))
            };
            left.settimeout(LONG).unwrap();
            const MESSAGES: u32 = 400;
            let receiving = beside(move || {
                // Let the queue fill first.
                thread::sleep(Duration::from_millis(20));
                for number in 0..MESSAGES {
                    let (data, fds, ..) = recv_fds(&right, 4096, 1).unwrap();
                    assert_eq!(data.len(), 1004);
                    assert_eq!(data[..4], number.to_ne_bytes());
                    assert_eq!(fds.len(), 1, "message {number}");
                }
                right
            });
            let (reader, writer) = pipe().unwrap();
            for number in 0..MESSAGES {
                let header = number.to_ne_bytes();
                let parts = [IoSlice::new(&header), IoSlice::new(&[7; 1000])];
                let to = address.as_ref().map(|address| address as &dyn ToAddress);
                let sent = send_fds_with(&left, &parts, &[writer.as_fd()], none(), to).unwrap();
                assert_eq!(sent, 1004);
            }
            drop(writer);
            receiving.join();
            assert!(ends(&reader));
        }
    });
}

#[test]
fn a_sendmsg_without_room_times_out_as_the_mode_says() {
    on_both(|| {
        for kind in [SOCK_STREAM, SOCK_DGRAM] {
            let (left, right) = socketpair_with(AF_UNIX, kind, 0).unwrap();
            while left.send_with(&[0; 512], MSG_DONTWAIT).is_ok() {}
            let send = || left.sendmsg(&[IoSlice::new(&[1; 512])]);
            left.settimeout(0.03).unwrap();
            let start = Instant::now();
            assert_eq!(send().unwrap_err(), Error::Timeout);
            assert!(start.elapsed() >= Duration::from_millis(29));
            left.settimeout(0).unwrap();
            assert_eq!(errno(send()), Some(libc::EAGAIN));
            drop(right);
            assert!(matches!(
                errno(send()),
                Some(libc::EPIPE | libc::ECONNRESET | libc::ECONNREFUSED)
            ));
        }
    });
}

#[test]
fn a_blocking_stream_takes_all_and_the_descriptors_once() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        let (reader, writer) = pipe().unwrap();
        let blocks: Vec<Vec<u8>> = (0..40u8).map(|index| vec![index; 50_000]).collect();
        let size = 40 * 50_000;
        let receiving = beside(move || {
            let (mut bytes, mut descriptors) = (Vec::new(), 0);
            while bytes.len() < size {
                let (data, fds, flags, _) = recv_fds(&right, 70_000, 8).unwrap();
                assert!(!data.is_empty());
                assert_eq!(flags, none());
                bytes.extend_from_slice(&data);
                descriptors += fds.len();
            }
            (bytes, descriptors)
        });
        let parts: Vec<IoSlice<'_>> = blocks.iter().map(|block| IoSlice::new(block)).collect();
        let sent = send_fds(&left, &parts, &[writer.as_fd()]).unwrap();
        assert_eq!(sent, size);
        let (bytes, descriptors) = receiving.join();
        assert!(bytes == blocks.concat());
        assert_eq!(descriptors, 1);
        drop(writer);
        assert!(ends(&reader));
        // With a timeout, what there is room for.
        let (left, _right) = socketpair().unwrap();
        left.settimeout(LONG).unwrap();
        let sent = left.sendmsg(&parts).unwrap();
        assert!(sent > 0 && sent < size, "{sent} bytes");
    });
}

#[test]
fn mistakes_are_told_by_errno() {
    on_both(|| {
        let (left, _right) = socketpair().unwrap();
        let one = [IoSlice::new(b"x")];
        let send = |ancdata: &[AncillaryToSend<'_>]| {
            let options = SendMsg {
                ancdata,
                ..Default::default()
            };
            errno(left.sendmsg_with(&one, options))
        };
        let fds = vec![left.as_fd(); 254];
        assert_eq!(send(&[AncillaryToSend::Rights(&fds)]), Some(libc::EINVAL));
        let short = AncillaryToSend::Raw {
            level: SOL_SOCKET,
            kind: libc::SCM_CREDENTIALS,
            data: b"short",
        };
        assert_eq!(send(&[short]), Some(libc::EINVAL));
        let unknown = AncillaryToSend::Raw {
            level: SOL_SOCKET,
            kind: 99,
            data: b"",
        };
        assert_eq!(send(&[unknown]), Some(libc::EINVAL));
        let closed = left.dup().unwrap();
        closed.close().unwrap();
        // What lies under its number can be sent, as any descriptor; the socket itself is closed.
        assert_eq!(errno(send_fds(&closed, &one, &[])), Some(libc::EBADF));
        let options = SendMsg {
            address: Some(&("127.0.0.1", 9)),
            ..Default::default()
        };
        assert!(matches!(
            left.sendmsg_with(&one, options),
            Err(Error::Type(_))
        ));
        assert!(matches!(
            recv_fds(&left, 1, usize::MAX),
            Err(Error::Overflow(_))
        ));
    });
}

/// The vector of RFC 3602, case 1.
#[test]
fn the_kernels_cryptography_takes_its_parameters() {
    on_both(|| {
        let bytes = |hex: &str| -> Vec<u8> {
            let digits = hex.as_bytes().chunks(2);
            let byte = |digits| u8::from_str_radix(str::from_utf8(digits).unwrap(), 16).unwrap();
            digits.map(byte).collect()
        };
        // struct sockaddr_alg behind its family: type, feat, mask, name.
        let mut data = [0; 86];
        data[..8].copy_from_slice(b"skcipher");
        data[22..30].copy_from_slice(b"cbc(aes)");
        let family = ringsock::Family::new(libc::AF_ALG);
        let bound = Socket::new(family, SOCK_SEQPACKET, 0).and_then(|algorithm| {
            let data = data.to_vec();
            algorithm.bind(Address::Raw { family, data })?;
            Ok(algorithm)
        });
        let algorithm = match bound {
            Ok(algorithm) => algorithm,
            Err(error) => {
                println!("skipped: no AF_ALG with cbc(aes) here: {error}");
                return;
            }
        };
        let key = bytes("06a9214036b8a15b512e03d534120006");
        algorithm
            .setsockopt(libc::SOL_ALG, libc::ALG_SET_KEY, &key[..])
            .unwrap();
        let null = std::ptr::null_mut();
        // SAFETY: no address is asked for; the new descriptor is owned by nobody else.
        let fd = unsafe {
            let fd = libc::accept4(algorithm.as_raw_fd(), null, null.cast(), libc::SOCK_CLOEXEC);
            assert!(fd >= 0, "{}", std::io::Error::last_os_error());
            <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd)
        };
        let cipher = Socket::from_fd(fd).unwrap();
        let iv = bytes("3dafba429d9eb430b422da802c9fac41");
        let (plain, encrypted) = (
            b"Single block msg",
            bytes("e353779c1079aeb82708942dbe77181a"),
        );
        for (op, from, to) in [(1, &plain[..], &encrypted[..]), (0, &encrypted, plain)] {
            let options = Afalg {
                op,
                iv: Some(&iv),
                ..Default::default()
            };
            assert_eq!(
                cipher
                    .sendmsg_afalg(&[IoSlice::new(from)], options)
                    .unwrap(),
                16
            );
            assert_eq!(cipher.recv(16).unwrap(), to);
        }
        let short = Afalg {
            op: 1,
            iv: Some(&iv[..8]),
            ..Default::default()
        };
        let refused = cipher.sendmsg_afalg(&[IoSlice::new(plain)], short);
        assert_eq!(errno(refused), Some(libc::EINVAL));
    });
}
