//! Files and sockets: sendfile, and makefile beside Python's, in fibers and on plain threads.
#![allow(unsafe_code)]

mod support;

use std::fs::File;
use std::io::{self, BufRead, ErrorKind, IoSlice, Read, Seek, Write, pipe};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::*;
use ringsock::{MakeFile, SocketFile, run, socketpair, socketpair_with, spawn, yield_now};
use support::{beside, on_both};

/// Longer than any wait of a test that goes well, in seconds.
const LONG: f64 = 60.0;

/// A file of these bytes, without a name.
fn file(bytes: &[u8]) -> File {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("ringsock-files-{}-{number}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let options = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&path);
    let mut file = options.unwrap();
    std::fs::remove_file(&path).unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

fn bytes(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_ne_bytes());
    }
    bytes.truncate(count);
    bytes
}

/// The digest in hexadecimal, by the command that every system has.
fn sha256(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap()[..64].to_owned()
}

/// A connected pair of TCP sockets.
fn tcp() -> (Socket, Socket) {
    let server = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    server.bind(("127.0.0.1", 0)).unwrap();
    server.listen(1).unwrap();
    let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    client.connect(server.getsockname().unwrap()).unwrap();
    (client, server.accept().unwrap().0)
}

fn receive_all(socket: &Socket) -> Vec<u8> {
    let mut received = Vec::new();
    loop {
        let data = socket.recv(1 << 20).unwrap();
        if data.is_empty() {
            return received;
        }
        received.extend_from_slice(&data);
    }
}

fn text(error: io::Error) -> String {
    error.to_string()
}

// sendfile.

#[test]
fn sendfile_sends_files_of_every_size_whole() {
    on_both(|| {
        for size in [0, 1, 10 << 20] {
            for timeout in [None, Some(LONG)] {
                for (left, right) in [tcp(), socketpair().unwrap()] {
                    let sent = bytes(size);
                    let digest = sha256(&sent);
                    let mut file = file(&sent);
                    left.settimeout(timeout).unwrap();
                    let nonblocking = |socket: &Socket| {
                        // SAFETY: no memory is passed.
                        let flags = unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_GETFL) };
                        flags & libc::O_NONBLOCK != 0
                    };
                    let receiving = beside(move || receive_all(&right));
                    assert_eq!(left.sendfile(&file, 0, None).unwrap(), size as u64);
                    assert_eq!(nonblocking(&left), timeout.is_some(), "as the mode says");
                    drop(left);
                    let received = receiving.join();
                    assert_eq!(sha256(&received), digest, "{size} bytes");
                    assert_eq!(file.stream_position().unwrap(), size as u64);
                }
            }
        }
    });
}

#[test]
fn sendfile_sends_the_part_that_is_asked_for() {
    on_both(|| {
        let sent = bytes(300_000);
        let mut file = file(&sent);
        // From, how many, how many there are.
        for (offset, count, there) in [
            (0, Some(1), 1),
            (7, Some(200_000), 200_000),
            (299_999, None, 1),
            (299_990, Some(100), 10),
            (100, None, 299_900),
            (300_000, None, 0),
            (400_000, Some(5), 0),
        ] {
            let (left, right) = tcp();
            let receiving = beside(move || receive_all(&right));
            file.seek(io::SeekFrom::Start(12)).unwrap();
            assert_eq!(left.sendfile(&file, offset, count).unwrap(), there);
            let position = if there == 0 { 12 } else { offset + there };
            assert_eq!(file.stream_position().unwrap(), position);
            drop(left);
            let end = (offset + there).min(300_000) as usize;
            assert!(receiving.join() == sent[(offset as usize).min(end)..end]);
        }
    });
}

#[test]
fn sendfile_waits_for_a_slow_reader_and_the_file_tells_how_far_it_came() {
    on_both(|| {
        let sent = bytes(3 << 20);
        let mut file = file(&sent);
        let (left, right) = tcp();
        // Each wait is shorter than the timeout, all of them together are longer.
        left.settimeout(1).unwrap();
        let start = Instant::now();
        let receiving = beside(move || {
            let mut received = Vec::new();
            while received.len() < 3 << 20 {
                if received.len() < 1 << 20 {
                    thread::sleep(Duration::from_millis(40));
                }
                received.extend_from_slice(&right.recv(30_000).unwrap());
            }
            (received, right)
        });
        assert_eq!(left.sendfile(&file, 0, None).unwrap(), 3 << 20);
        let (received, right) = receiving.join();
        assert!(received == sent);
        assert!(start.elapsed() > Duration::from_secs(1));

        // Nobody reads any more.
        left.settimeout(0.05).unwrap();
        let start = Instant::now();
        let mut position = 0;
        let error = loop {
            match left.sendfile(&file, 0, None) {
                Ok(_) => position += 3 << 20,
                Err(error) => break error,
            }
        };
        assert_eq!(error, Error::Timeout);
        assert!(start.elapsed() >= Duration::from_millis(49));
        position += file.stream_position().unwrap();
        drop(left);
        assert_eq!(
            receive_all(&right).len() as u64,
            position,
            "what the position says"
        );
    });
}

#[test]
fn sendfile_reads_pipes_and_sockets_until_their_end() {
    on_both(|| {
        let sent = bytes(500_000);
        let (reader, mut writer) = pipe().unwrap();
        let (left, right) = tcp();
        let receiving = beside(move || receive_all(&right));
        let to_write = sent.clone();
        let writing = beside(move || {
            for chunk in to_write.chunks(100_000) {
                thread::sleep(Duration::from_millis(2));
                writer.write_all(chunk).unwrap();
            }
        });
        assert_eq!(left.sendfile(&reader, 0, Some(123_456)).unwrap(), 123_456);
        assert_eq!(left.sendfile(&reader, 0, None).unwrap(), 500_000 - 123_456);
        writing.join();
        let (a, b) = socketpair().unwrap();
        a.sendall(b"from a socket").unwrap();
        drop(a);
        assert_eq!(left.sendfile(&b, 0, None).unwrap(), 13);
        assert_eq!(
            left.sendfile(&reader, 5, None).unwrap_err().errno(),
            Some(libc::ESPIPE)
        );
        // A file whose size is said to be 0.
        let version = File::open("/proc/version").unwrap();
        let length = std::fs::read("/proc/version").unwrap();
        assert_eq!(
            left.sendfile(&version, 0, None).unwrap(),
            length.len() as u64
        );
        drop(left);
        assert!(receiving.join() == [&sent[..], b"from a socket", &length].concat());
    });
}

#[test]
fn sendfile_refuses_what_python_refuses() {
    on_both(|| {
        let file = file(b"data");
        let value = |result: ringsock::Result<u64>| match result {
            Err(Error::Value(text)) => text.to_string(),
            other => panic!("{other:?}"),
        };
        let (left, right) = socketpair().unwrap();
        assert_eq!(
            value(left.sendfile(&file, 0, Some(0))),
            "count must be a positive integer (got 0)"
        );
        left.settimeout(0).unwrap();
        assert_eq!(
            value(left.sendfile(&file, 0, None)),
            "non-blocking sockets are not supported"
        );
        left.settimeout(None).unwrap();
        let datagrams = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
        assert_eq!(
            value(datagrams.sendfile(&file, 0, None)),
            "only SOCK_STREAM type sockets are supported"
        );
        let too_far = left.sendfile(&file, u64::MAX, None);
        assert!(matches!(too_far, Err(Error::Overflow(_))));
        let for_writing = File::options().write(true).open("/dev/null").unwrap();
        let unreadable = left.sendfile(&for_writing, 0, None);
        assert_eq!(unreadable.unwrap_err().errno(), Some(libc::EBADF));
        drop(right);
        let broken = left.sendfile(&file, 0, None);
        assert_eq!(broken.unwrap_err().errno(), Some(libc::EPIPE));
        left.close().unwrap();
        assert!(left.sendfile(&file, 0, None).unwrap_err().is_closed());
    });
}

#[test]
fn sendfile_raises_no_sigpipe() {
    static RAISED: AtomicU32 = AtomicU32::new(0);
    extern "C" fn count(_: i32) {
        RAISED.fetch_add(1, Ordering::SeqCst);
    }
    // SAFETY: the handler only adds to an atomic. Nothing else in this process cares about the signal.
    unsafe { libc::signal(libc::SIGPIPE, count as *const () as libc::sighandler_t) };
    on_both(|| {
        let file = file(b"data");
        for (left, right) in [socketpair().unwrap(), tcp()] {
            drop(right);
            let limit = Instant::now() + Duration::from_secs(20);
            // TCP learns of it by the answer to the first bytes.
            while left.sendfile(&file, 0, None).is_ok() {
                assert!(Instant::now() < limit);
                yield_now();
            }
            let again = left.sendfile(&file, 0, None);
            assert_eq!(again.unwrap_err().errno(), Some(libc::EPIPE));
        }
    });
    assert_eq!(RAISED.load(Ordering::SeqCst), 0);
    // SAFETY: no memory is passed.
    unsafe { libc::raise(libc::SIGPIPE) };
    assert_eq!(RAISED.load(Ordering::SeqCst), 1, "the handler does count");
    // SAFETY: as it was when the process began.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

#[test]
fn close_ends_a_sendfile_that_waits_for_room_or_for_its_source() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        let (reader, writer) = pipe().unwrap();
        let large = file(&bytes(4 << 20));
        for waits_for_source in [false, true] {
            let left = left.dup().unwrap();
            let other = left.clone();
            let closing = beside(move || {
                thread::sleep(Duration::from_millis(30));
                other.close().unwrap();
            });
            let result = if waits_for_source {
                left.sendfile(&reader, 0, None)
            } else {
                left.sendfile(&large, 0, None)
            };
            assert!(result.unwrap_err().is_closed());
            closing.join();
        }
        drop((right, writer));
    });
}

#[test]
fn sendfile_ends_by_cancel_and_deadline_though_it_need_not_wait() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        let source = file(b"short");
        let sent = ringsock::timeout(0, || left.sendfile(&source, 0, None));
        assert_eq!(sent, Err(Error::Timeout));
        assert_eq!(
            ringsock::timeout(LONG, || left.sendfile(&source, 0, None)),
            Ok(5)
        );
        assert_eq!(right.recv(100).unwrap(), b"short");
    });
    run(|| {
        let (left, _right) = socketpair().unwrap();
        let sending = spawn(move || left.sendfile(file(b"short"), 0, None));
        sending.cancel();
        assert_eq!(sending.join().unwrap(), Err(Error::Cancelled));
    });
}

#[test]
fn a_mode_that_is_set_beside_a_sendfile_stays() {
    let (left, right) = socketpair().unwrap();
    let (sender, other) = (left.clone(), left.clone());
    let is_over = Arc::new(AtomicBool::new(false));
    let told = is_over.clone();
    let sending = thread::spawn(move || {
        let source = file(&bytes(4096));
        while !told.load(Ordering::SeqCst) {
            match sender.sendfile(&source, 0, None) {
                Ok(sent) => assert_eq!(sent, 4096),
                Err(error) => panic!("{error}"),
            }
        }
        sender.shutdown(SHUT_WR).unwrap();
    });
    let receiving = thread::spawn(move || while !right.recv(1 << 16).unwrap().is_empty() {});
    let mut lost = 0;
    for _ in 0..20_000 {
        other.settimeout(LONG).unwrap();
        thread::yield_now();
        // SAFETY: no memory is passed.
        let flags = unsafe { libc::fcntl(other.as_raw_fd(), libc::F_GETFL) };
        lost += u32::from(flags & libc::O_NONBLOCK == 0);
        other.settimeout(None).unwrap();
    }
    is_over.store(true, Ordering::SeqCst);
    sending.join().unwrap();
    receiving.join().unwrap();
    assert_eq!(lost, 0);
    // SAFETY: no memory is passed.
    let flags = unsafe { libc::fcntl(left.as_raw_fd(), libc::F_GETFL) };
    assert_eq!(flags & libc::O_NONBLOCK, 0);
}

/// Each needs O_NONBLOCK only during its calls, and takes it from none of the others.
#[test]
fn many_sendfiles_of_one_socket_all_keep_their_deadlines() {
    let (left, right) = socketpair().unwrap();
    let source = Arc::new(File::open("/dev/zero").unwrap());
    let is_over = Arc::new(AtomicBool::new(false));
    let calls = [(); 2].map(|()| Arc::new(AtomicU32::new(0)));
    let sending = calls.clone().map(|calls| {
        let (left, source, is_over) = (left.clone(), source.clone(), is_over.clone());
        thread::spawn(move || {
            while !is_over.load(Ordering::SeqCst) {
                // Nobody receives.
                let sent = ringsock::timeout(0.0002, || left.sendfile(&*source, 0, Some(1 << 30)));
                assert_eq!(sent, Err(Error::Timeout));
                calls.fetch_add(1, Ordering::SeqCst);
            }
        })
    });
    let give_up = Instant::now() + Duration::from_secs(60);
    while calls
        .iter()
        .any(|calls| calls.load(Ordering::SeqCst) < 3000)
    {
        assert!(Instant::now() < give_up, "one waits for ever: {calls:?}");
        thread::sleep(Duration::from_millis(5));
    }
    is_over.store(true, Ordering::SeqCst);
    for sending in sending {
        sending.join().unwrap();
    }
    assert_eq!(left.gettimeout(), None);
    // SAFETY: no memory is passed.
    let flags = unsafe { libc::fcntl(left.as_raw_fd(), libc::F_GETFL) };
    assert_eq!(flags & libc::O_NONBLOCK, 0);
    drop(right);
}

/// Of two that wait for one pipe only one gets what comes; the other goes on waiting, without its worker.
#[test]
fn two_sendfiles_of_one_pipe_hold_up_nobody() {
    run(|| {
        let (source, mut writer) = pipe().unwrap();
        let source = Arc::new(source);
        let pairs = [(); 2].map(|()| socketpair().unwrap());
        let sending = pairs.each_ref().map(|(left, _)| {
            let (left, source) = (left.clone(), source.clone());
            spawn(move || left.sendfile(&*source, 0, None))
        });
        for _ in 0..20 {
            ringsock::sleep(0.002).unwrap();
            writer.write_all(b"data").unwrap();
        }
        ringsock::sleep(0.01).unwrap();
        drop(writer);
        let sent = sending.map(|sending| sending.join().unwrap().unwrap());
        assert_eq!(sent[0] + sent[1], 80);
    });
}

/// With room for all of it there is nothing to wait for, and still the others have their turns.
#[test]
fn other_fibers_run_beside_a_sendfile() {
    run(|| {
        let (left, right) = socketpair().unwrap();
        let room = left.setsockopt(SOL_SOCKET, libc::SO_SNDBUFFORCE, 64 << 20);
        if let Err(error) = room {
            println!("skipped: no right to a large send buffer: {error}");
            return;
        }
        let sent = 16 << 20;
        let source = file(&[]);
        source.set_len(sent).unwrap();
        let sending = spawn(move || left.sendfile(&source, 0, None));
        let mut turns = 0;
        while !sending.is_finished() {
            turns += 1;
            yield_now();
        }
        assert_eq!(sending.join().unwrap().unwrap(), sent);
        assert_eq!(receive_all(&right).len() as u64, sent);
        assert!(turns >= 16, "{turns} turns only");
    });
}

// makefile.

#[test]
fn a_file_reads_lines_and_bytes() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        right.sendall(b"one\r\ntwo\n\nrest of it\rno end").unwrap();
        right.shutdown(SHUT_WR).unwrap();
        let mut file = left.makefile("rb").unwrap();
        assert_eq!(file.readline().unwrap(), "one\r\n");
        assert_eq!(file.readline().unwrap(), "two\n");
        assert_eq!(file.readline().unwrap(), "\n");
        let mut five = [0; 5];
        file.read_exact(&mut five).unwrap();
        assert_eq!(&five, b"rest ");
        let rest: Vec<String> = Read::by_ref(&mut file)
            .lines()
            .map(Result::unwrap)
            .collect();
        assert_eq!(rest, ["of it\rno end"]);
        assert_eq!(file.readline().unwrap(), "");
        assert_eq!(file.read(&mut five).unwrap(), 0);

        let (left, right) = socketpair().unwrap();
        right.sendall(b"text\r\n\xff\xfe\nok\r\n").unwrap();
        let mut file = left.makefile("").unwrap();
        assert_eq!(file.readline().unwrap(), "text\n");
        let error = file.readline().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        assert_eq!(file.readline().unwrap(), "ok\n", "the bad line was taken");
    });
}

#[test]
fn a_file_writes_when_its_buffer_is_full_or_flushed() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        right.settimeout(0).unwrap();
        let options = MakeFile {
            buffering: Some(10),
            ..Default::default()
        };
        let mut file = left.makefile_with("wb", options).unwrap();
        file.write_all(b"1234567").unwrap();
        assert!(right.recv(64).unwrap_err().is_would_block());
        file.write_all(b"89ab").unwrap();
        assert_eq!(right.recv(64).unwrap(), b"1234567");
        file.flush().unwrap();
        assert_eq!(right.recv(64).unwrap(), b"89ab");
        file.write_all(b"more than the buffer holds").unwrap();
        assert_eq!(right.recv(64).unwrap(), b"more than the buffer holds");
        file.write_all(b"dropped").unwrap();
        drop(file);
        assert_eq!(right.recv(64).unwrap(), b"dropped");

        let mut lines = left
            .makefile_with(
                "w",
                MakeFile {
                    line_buffering: true,
                    ..Default::default()
                },
            )
            .unwrap();
        write!(lines, "no end").unwrap();
        assert!(right.recv(64).unwrap_err().is_would_block());
        writeln!(lines, " yet").unwrap();
        assert_eq!(right.recv(64).unwrap(), b"no end yet\n");

        let unbuffered = MakeFile {
            buffering: Some(0),
            ..Default::default()
        };
        let mut raw = left.makefile_with("rwb", unbuffered).unwrap();
        raw.write_all(b"at once").unwrap();
        assert_eq!(right.recv(64).unwrap(), b"at once");
        right.sendall(b"line\nnot read ahead").unwrap();
        assert_eq!(raw.readline().unwrap(), "line\n");
        assert_eq!(left.recv(64).unwrap(), b"not read ahead");
    });
}

#[test]
fn files_keep_the_descriptor_of_a_closed_socket() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        let fd = left.fileno();
        let mut one = left.makefile("rb").unwrap();
        let mut two = left.makefile("wb").unwrap();
        left.close().unwrap();
        left.close().unwrap();
        assert_eq!((left.fileno(), one.fileno(), two.fileno()), (fd, fd, fd));
        assert!(format!("{left:?}").starts_with("<ringsock.Socket [closed] fd="));
        two.write_all(b"still open").unwrap();
        two.close().unwrap();
        assert_eq!((two.fileno(), two.closed()), (-1, true));
        two.close().unwrap();
        assert_eq!(left.fileno(), fd, "one is left");
        assert_eq!(right.recv(64).unwrap(), b"still open");
        right.sendall(b"answer\n").unwrap();
        assert_eq!(one.readline().unwrap(), "answer\n");
        // As long as one is open, there may be more.
        let three = left.makefile("rb").unwrap();
        drop(one);
        assert_eq!(left.fileno(), fd);
        drop(three);
        assert_eq!(left.fileno(), -1, "the last is gone");
        assert!(right.recv(64).unwrap().is_empty(), "the peer sees the end");
        assert!(left.recv(1).unwrap_err().is_closed());
        assert!(left.makefile("rb").unwrap_err().is_closed());

        // Closing files never closes an open socket, however many come and go.
        let (left, right) = socketpair().unwrap();
        for _ in 0..3 {
            left.makefile("rw").unwrap().close().unwrap();
            drop(left.makefile("rw").unwrap());
        }
        left.sendall(b"open").unwrap();
        assert_eq!(right.recv(64).unwrap(), b"open");
        // Without a handle of the socket, the file is all there is.
        let mut file = left.makefile("rw").unwrap();
        drop(left);
        file.write_all(b"alone").unwrap();
        drop(file);
        assert_eq!(receive_all(&right), b"alone");
    });
}

#[test]
fn of_a_closing_socket_and_a_closing_file_exactly_one_is_the_last() {
    on_both(|| {
        for _ in 0..500 {
            let (left, right) = socketpair().unwrap();
            let file = left.makefile("rb").unwrap();
            let other = left.clone();
            let closing = beside(move || other.close().unwrap());
            drop(file);
            closing.join();
            assert_eq!(left.fileno(), -1);
            assert!(right.recv(1).unwrap().is_empty());
        }
    });
}

#[test]
fn closing_the_last_file_ends_a_call_on_the_closed_socket() {
    on_both(|| {
        let (left, _right) = socketpair().unwrap();
        let file = left.makefile("rb").unwrap();
        left.close().unwrap();
        let closing = beside(move || {
            thread::sleep(Duration::from_millis(20));
            drop(file);
        });
        assert!(left.recv(1).unwrap_err().is_closed());
        closing.join();
    });
}

#[test]
fn detach_leaves_files_without_a_socket() {
    on_both(|| {
        let (left, _right) = socketpair().unwrap();
        let mut file = left.makefile("rb").unwrap();
        let _fd = left.detach().unwrap();
        let error = file.readline().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        assert_eq!(file.fileno(), -1);
    });
}

#[test]
fn a_file_that_timed_out_is_read_no_more_but_written() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        left.settimeout(0.02).unwrap();
        let mut file = left.makefile("rw").unwrap();
        assert_eq!(
            file.read(&mut []).unwrap(),
            0,
            "for nothing it need not wait"
        );
        right.sendall(b"whole\nha").unwrap();
        assert_eq!(file.readline().unwrap(), "whole\n");
        assert_eq!(file.readline().unwrap_err().kind(), ErrorKind::TimedOut);
        right.sendall(b"lf\n").unwrap();
        assert_eq!(
            text(file.readline().unwrap_err()),
            "cannot read from timed out object"
        );
        file.write_all(b"still").unwrap();
        file.flush().unwrap();
        assert_eq!(right.recv(64).unwrap(), b"still");
        assert_eq!(left.recv(64).unwrap(), b"lf\n", "the socket goes on");
    });
}

#[test]
fn a_file_of_a_non_blocking_socket_would_block_and_loses_nothing() {
    on_both(|| {
        let (left, right) = socketpair().unwrap();
        left.settimeout(0).unwrap();
        let mut file = left.makefile("rwb").unwrap();
        assert_eq!(file.readline().unwrap_err().kind(), ErrorKind::WouldBlock);
        right.sendall(b"now\n").unwrap();
        assert_eq!(file.readline().unwrap(), "now\n");
        let sent = bytes(1 << 20);
        let receiving = beside(move || receive_all(&right));
        let mut at = 0;
        let limit = Instant::now() + Duration::from_secs(60);
        while at < sent.len() {
            match file.write(&sent[at..sent.len().min(at + 1000)]) {
                Ok(written) => at += written,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            assert!(Instant::now() < limit);
        }
        while let Err(error) = file.flush() {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            assert!(Instant::now() < limit);
            ringsock::sleep(0.001).unwrap();
        }
        drop((file, left));
        assert!(receiving.join() == sent);
    });
}

#[test]
fn a_file_says_what_it_cannot_do() {
    on_both(|| {
        let (left, _right) = socketpair().unwrap();
        let mut reading = left.makefile("r").unwrap();
        let mut writing = left.makefile("w").unwrap();
        assert!(reading.readable() && !reading.writable() && !reading.seekable());
        assert!(!writing.readable() && writing.writable());
        assert_eq!(text(reading.write(b"x").unwrap_err()), "not writable");
        let error = writing.readline().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert_eq!(text(error), "not readable");
        for file in [&mut reading, &mut writing] {
            file.close().unwrap();
            let closed = "I/O operation on closed file.";
            assert_eq!(text(file.readline().unwrap_err()), closed);
            assert_eq!(text(file.write(b"x").unwrap_err()), closed);
            assert_eq!(text(file.flush().unwrap_err()), closed);
        }
        // Closing tells what could not be sent, and closes.
        let (left, right) = socketpair().unwrap();
        let mut file = left.makefile("w").unwrap();
        file.write_all(b"nobody hears").unwrap();
        drop(right);
        assert_eq!(file.close().unwrap_err().kind(), ErrorKind::BrokenPipe);
        assert!(file.closed());
        left.close().unwrap();
        assert_eq!(left.fileno(), -1);
    });
}

#[test]
fn a_panicking_fiber_flushes_its_files() {
    run(|| {
        let (left, right) = socketpair().unwrap();
        let writer = left.clone();
        let panicking = spawn(move || {
            let mut file: SocketFile = writer.makefile("w").unwrap();
            file.write_all(b"last words").unwrap();
            std::panic::resume_unwind(Box::new("on purpose"));
        });
        assert!(panicking.join().is_err());
        assert_eq!(right.recv(64).unwrap(), b"last words");
    });
}

#[test]
fn files_at_both_ends_hold_a_conversation() {
    run(|| {
        let (left, right) = tcp();
        let answering = spawn(move || {
            let mut file = right.makefile("rw").unwrap();
            loop {
                let line = file.readline().unwrap();
                if line.is_empty() {
                    return;
                }
                write!(file, "you said {line}").unwrap();
                file.flush().unwrap();
            }
        });
        let mut file = left.makefile("rw").unwrap();
        for number in 0..200 {
            writeln!(file, "{number}").unwrap();
            file.flush().unwrap();
            assert_eq!(file.readline().unwrap(), format!("you said {number}\n"));
        }
        drop(left);
        drop(file);
        answering.join().unwrap();
    });
}

/// The same calls in Python and here, one line for each result.
#[test]
fn results_are_pythons_one_by_one() {
    let script = r"
import signal; signal.alarm(120)
import io
from socket import *
def show(call, *args):
    try:
        result = call(*args)
    except ValueError as e:
        result = str(e)
    except OSError as e:
        result = e.errno or str(e)
    print(result.decode() if isinstance(result, bytes) else result)
for mode in ('x', 'r+', 'rt', 'a'):
    a, b = socketpair(); show(a.makefile, mode)
for mode in ('', 'b', 'r', 'w', 'rw', 'rwb', 'wr', 'rr', 'bw'):
    a, b = socketpair(); f = a.makefile(mode); show(f.readable); show(f.writable); show(f.seekable)
for mode in ('r', 'w', 'rw'):
    a, b = socketpair(); show(a.makefile, mode, 0)
a, b = socketpair()
f = a.makefile('rb'); g = a.makefile('rwb')
a.close()
show(lambda: a.fileno() >= 0); show(lambda: '[closed]' in repr(a)); show(lambda: f.fileno() == a.fileno())
f.close(); show(lambda: a.fileno() >= 0); show(f.read, 1)
g.write(b'last'); g.close(); show(lambda: a.fileno()); show(b.recv, 64); show(b.recv, 64); show(a.recv, 1)
a, b = socketpair(); f = a.makefile('r'); f.close(); show(lambda: a.fileno() >= 0)
a.settimeout(0.01); f = a.makefile('rb', 0)
show(f.read, 1); show(f.read, 1); b.send(b'x'); show(f.read, 1); show(a.recv, 1)
show(CMSG_LEN, 5); show(CMSG_SPACE, 5)
a, b = socketpair(AF_UNIX, SOCK_DGRAM)
a.send(b'hello'); show(lambda: b.recvmsg(2)[0]); a.send(b'hello'); show(lambda: b.recvmsg(2)[2])
send_fds(a, [b'fd'], [0, 0, 0]); show(lambda: recv_fds(b, 9, 1)[2]); send_fds(a, [b'fd'], [0]); show(lambda: recv_fds(b, 9, 1)[2])
show(a.sendmsg, [b'x'], [(SOL_SOCKET, 99, b'')]); show(a.sendmsg, [b'x'] * 1025)
show(b.sendfile, io.BytesIO(b'x'))
";
    let child = Command::new("python3")
        .args(["-c", script])
        .stdout(Stdio::piped())
        .spawn();
    let child = match child {
        Ok(child) => child,
        Err(error) => {
            println!("skipped: python3 cannot be run here: {error}");
            return;
        }
    };
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let pythons = String::from_utf8(output.stdout).unwrap();
    let pythons: Vec<&str> = pythons.lines().collect();
    let ours = same_calls();
    assert_eq!(ours, pythons, "on a plain thread");
    assert_eq!(run(same_calls), pythons, "in a fiber");
    assert!(ours.len() > 50, "only {} results", ours.len());
}

fn same_calls() -> Vec<String> {
    let mut shown: Vec<String> = Vec::new();
    let mut show = |text: String| shown.push(text);
    let flag = |flag: bool| String::from(if flag { "True" } else { "False" });
    let problem = |error: Error| match error {
        Error::Value(text) | Error::Message(text) => text.to_string(),
        Error::Timeout => "timed out".into(),
        error => error.errno().unwrap().to_string(),
    };
    let io_problem = |error: io::Error| match error.raw_os_error() {
        Some(errno) => errno.to_string(),
        None => error.to_string(),
    };
    let read = |file: &mut SocketFile| {
        let mut byte = [0];
        match file.read(&mut byte) {
            Ok(count) => String::from_utf8_lossy(&byte[..count]).into_owned(),
            Err(error) => io_problem(error),
        }
    };
    let pair = || socketpair().unwrap();
    for mode in ["x", "r+", "rt", "a"] {
        show(problem(pair().0.makefile(mode).unwrap_err()));
    }
    for mode in ["", "b", "r", "w", "rw", "rwb", "wr", "rr", "bw"] {
        let file = pair().0.makefile(mode).unwrap();
        show(flag(file.readable()));
        show(flag(file.writable()));
        show(flag(file.seekable()));
    }
    let unbuffered = MakeFile {
        buffering: Some(0),
        ..Default::default()
    };
    for mode in ["r", "w", "rw"] {
        show(problem(
            pair().0.makefile_with(mode, unbuffered).unwrap_err(),
        ));
    }
    let received = |result: ringsock::Result<ringsock::Buf>| match result {
        Ok(data) => String::from_utf8_lossy(&data).into_owned(),
        Err(error) => problem(error),
    };
    let (a, b) = pair();
    let (mut f, mut g) = (a.makefile("rb").unwrap(), a.makefile("rwb").unwrap());
    a.close().unwrap();
    show(flag(a.fileno() >= 0));
    show(flag(format!("{a:?}").contains("[closed]")));
    show(flag(f.fileno() == a.fileno()));
    f.close().unwrap();
    show(flag(a.fileno() >= 0));
    // Python says so of buffered files.
    show(read(&mut f).replace("I/O operation on closed file.", "read of closed file"));
    g.write_all(b"last").unwrap();
    g.close().unwrap();
    show(a.fileno().to_string());
    show(received(b.recv(64)));
    show(received(b.recv(64)));
    show(received(a.recv(1)));
    let (a, b) = pair();
    a.makefile("r").unwrap().close().unwrap();
    show(flag(a.fileno() >= 0));
    a.settimeout(0.01).unwrap();
    let mut f = a.makefile_with("rb", unbuffered).unwrap();
    show(read(&mut f));
    show(read(&mut f));
    b.send(b"x").unwrap();
    show(read(&mut f));
    show(received(a.recv(1)));
    show(ringsock::CMSG_LEN(5).unwrap().to_string());
    show(ringsock::CMSG_SPACE(5).unwrap().to_string());
    let (a, b) = socketpair_with(AF_UNIX, SOCK_DGRAM, 0).unwrap();
    a.send(b"hello").unwrap();
    show(String::from_utf8_lossy(&b.recvmsg(2).unwrap().data).into_owned());
    a.send(b"hello").unwrap();
    show(b.recvmsg(2).unwrap().flags.bits().to_string());
    let stdin = io::stdin();
    let fd = std::os::fd::AsFd::as_fd(&stdin);
    for fds in [&[fd; 3][..], &[fd]] {
        ringsock::send_fds(&a, &[IoSlice::new(b"fd")], fds).unwrap();
        show(ringsock::recv_fds(&b, 9, 1).unwrap().2.bits().to_string());
    }
    let unknown = ringsock::AncillaryToSend::Raw {
        level: SOL_SOCKET,
        kind: 99,
        data: b"",
    };
    let options = ringsock::SendMsg {
        ancdata: &[unknown],
        ..Default::default()
    };
    let one = [IoSlice::new(b"x")];
    show(problem(a.sendmsg_with(&one, options).unwrap_err()));
    show(problem(a.sendmsg(&[one[0]; 1025]).unwrap_err()));
    show(problem(b.sendfile(file(b"x"), 0, None).unwrap_err()));
    shown
}
