//! What every peer's echo server has to do, seen from its clients.
//!
//! Each test starts each of the programs, so that one which misbehaves is named by the message of the failure.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const PEERS: [(&str, &str); 6] = [
    ("tokio", env!("CARGO_BIN_EXE_peer-tokio")),
    ("monoio", env!("CARGO_BIN_EXE_peer-monoio")),
    ("compio", env!("CARGO_BIN_EXE_peer-compio")),
    ("glommio", env!("CARGO_BIN_EXE_peer-glommio")),
    ("tokio-uring", env!("CARGO_BIN_EXE_peer-tokio-uring")),
    ("may", env!("CARGO_BIN_EXE_peer-may")),
];

/// No wait of these tests lasts longer.
const PATIENCE: Duration = Duration::from_secs(30);

// -------------------------------------------------------------------- servers

/// A running server, ended when dropped.
struct Server {
    child: Child,
    address: String,
    name: String,
}

impl Server {
    fn start(peer: &(&str, &str), arguments: &[&str]) -> Server {
        let (name, program) = peer;
        let name = format!("{name} {}", arguments.join(" "));
        let mut child = Command::new(program)
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut line = String::new();
        let out = child.stdout.take().expect("stdout is piped");
        BufReader::new(out)
            .read_line(&mut line)
            .expect("stdout is text");
        let Some(address) = line.strip_prefix("listening on ") else {
            let status = child.wait();
            panic!("{name}: first line {line:?}, {status:?}");
        };
        let address = address.trim_end().to_owned();
        Server {
            child,
            address,
            name,
        }
    }

    /// Starts the server once for TCP and once for a Unix socket, and hands each to `check`.
    fn each_stream(arguments: &[&str], check: impl Fn(&Server)) {
        for peer in &PEERS {
            check(&Server::start(
                peer,
                &[&["--bind", "127.0.0.1:0"], arguments].concat(),
            ));
            let path = socket_path(peer.0);
            check(&Server::start(
                peer,
                &[&["--unix", &path], arguments].concat(),
            ));
            std::fs::remove_file(&path).expect("the server leaves its socket");
        }
    }

    fn connect(&self) -> Stream {
        let stream = if self.address.starts_with('/') {
            UnixStream::connect(&self.address).map(Stream::Unix)
        } else {
            TcpStream::connect(&self.address).map(Stream::Tcp)
        };
        let stream = stream.unwrap_or_else(|error| panic!("{}: connect: {error}", self.name));
        stream.limit(PATIENCE, PATIENCE);
        stream
    }

    fn send(&self, stream: &mut Stream, bytes: &[u8]) {
        stream
            .write_all(bytes)
            .unwrap_or_else(|error| panic!("{}: send: {error}", self.name));
    }

    fn expect(&self, stream: &mut Stream, bytes: &[u8]) {
        let mut got = vec![0; bytes.len()];
        stream
            .read_exact(&mut got)
            .unwrap_or_else(|error| panic!("{}: receive: {error}", self.name));
        assert!(
            got == bytes,
            "{}: {} bytes came back changed",
            self.name,
            bytes.len()
        );
    }

    fn expect_end(&self, stream: &mut Stream) {
        let n = stream
            .read(&mut [0])
            .unwrap_or_else(|error| panic!("{}: end: {error}", self.name));
        assert_eq!(n, 0, "{}: a byte too many", self.name);
    }

    /// A number of kibibytes the kernel says of the server's process.
    fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .expect("a process has a status");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .expect("which tells the resident size");
        line.trim().trim_end_matches(" kB").parse().expect("in KiB")
    }

    fn open_files(&self) -> usize {
        let files = std::fs::read_dir(format!("/proc/{}/fd", self.child.id()));
        files.expect("a process has its files").count()
    }

    /// Waits until the server has no more than this many files open.
    fn await_open_files(&self, most: usize) {
        let start = Instant::now();
        while self.open_files() > most {
            assert!(
                start.elapsed() < PATIENCE,
                "{}: {} files open",
                self.name,
                self.open_files()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Where it has ended by itself, the test has failed already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn socket_path(name: &str) -> String {
    let number = std::thread::current().id();
    let file = format!("peers-{}-{name}-{number:?}", std::process::id());
    let path: PathBuf = std::env::temp_dir().join(file.replace(['(', ')'], ""));
    path.into_os_string()
        .into_string()
        .expect("the name is text")
}

// -------------------------------------------------------------------- clients

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Bounds each receive and each send.
    fn limit(&self, receive: Duration, send: Duration) {
        match self {
            Stream::Tcp(stream) => stream
                .set_read_timeout(Some(receive))
                .and(stream.set_write_timeout(Some(send))),
            Stream::Unix(stream) => stream
                .set_read_timeout(Some(receive))
                .and(stream.set_write_timeout(Some(send))),
        }
        .expect("timeouts can be set");
    }

    fn end_sending(&self) {
        match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
        .expect("the connection is open");
    }

    fn duplicate(&self) -> Stream {
        match self {
            Stream::Tcp(stream) => stream.try_clone().map(Stream::Tcp),
            Stream::Unix(stream) => stream.try_clone().map(Stream::Unix),
        }
        .expect("a descriptor is free")
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(buffer),
            Stream::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write(bytes),
            Stream::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes that do not repeat within any length used here (a xorshift generator's).
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..length).map(|_| next()).collect()
}

// ---------------------------------------------------------------------- tests

#[test]
fn every_byte_comes_back_as_it_was_sent() {
    Server::each_stream(&[], |server| {
        let mut stream = server.connect();
        for (seed, size) in [1, 2, 64, 1000, 4095, 4096, 4097, 16384, 65536]
            .into_iter()
            .enumerate()
        {
            let message = noise(size, seed as u64);
            server.send(&mut stream, &message);
            server.expect(&mut stream, &message);
        }
    });
}

#[test]
fn a_small_and_a_large_receive_buffer_echo_alike() {
    for buffer in ["1", "7", "65536"] {
        Server::each_stream(&["--buffer", buffer], |server| {
            let mut stream = server.connect();
            let message = noise(3000, 3);
            server.send(&mut stream, &message);
            server.expect(&mut stream, &message);
        });
    }
}

#[test]
fn what_was_sent_before_the_half_close_comes_back_and_then_the_end() {
    Server::each_stream(&[], |server| {
        let mut stream = server.connect();
        let message = noise(50_000, 4);
        server.send(&mut stream, &message);
        stream.end_sending();
        server.expect(&mut stream, &message);
        server.expect_end(&mut stream);
    });
}

#[test]
fn a_thousand_connections_are_served_at_once_and_leave_nothing_behind() {
    Server::each_stream(&[], |server| {
        let before = server.open_files();
        let mut resident = Vec::new();
        for round in 0..3 {
            let mut streams: Vec<Stream> = (0..1000).map(|_| server.connect()).collect();
            // All of them have a message on its way before the first is read, and the last is read first.
            for (i, stream) in streams.iter_mut().enumerate() {
                server.send(stream, &noise(64, round * 1000 + i as u64));
            }
            for (i, stream) in streams.iter_mut().enumerate().rev() {
                server.expect(stream, &noise(64, round * 1000 + i as u64));
            }
            drop(streams);
            server.await_open_files(before);
            resident.push(server.resident_kib());
        }
        assert!(
            resident[2] < resident[0] + 4096,
            "{}: grows: {resident:?} KiB",
            server.name
        );
    });
}

#[test]
fn a_client_that_reads_only_at_the_end_gets_every_byte_and_costs_no_memory() {
    Server::each_stream(&[], |server| {
        let before = server.resident_kib();
        let mut stream = server.connect();
        // 1 MiB, and then as much more as fits: on the way, not in the server.
        let message = noise(16 << 20, 5);
        stream.limit(PATIENCE, Duration::from_millis(300));
        let mut sent = 0;
        while sent < message.len() {
            match stream.write(&message[sent..]) {
                Ok(n) => sent += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{}: send: {error}", server.name),
            }
        }
        assert!(
            sent > 0 && sent < message.len(),
            "{}: {sent} bytes taken",
            server.name
        );
        let grown = server.resident_kib().saturating_sub(before);
        assert!(grown < 1024, "{}: {grown} KiB more", server.name);
        // Another connection is served meanwhile.
        let mut other = server.connect();
        server.send(&mut other, b"meanwhile");
        server.expect(&mut other, b"meanwhile");
        // Up to 1 MiB in all is sent by a thread, since it may not fit before something is read.
        let end = sent.max(1 << 20);
        std::thread::scope(|scope| {
            let mut sender = stream.duplicate();
            let rest = &message[sent..end];
            sender.limit(PATIENCE, PATIENCE);
            scope.spawn(move || {
                server.send(&mut sender, rest);
                sender.end_sending();
            });
            server.expect(&mut stream, &message[..end]);
            server.expect_end(&mut stream);
        });
    });
}

#[test]
fn a_connection_the_client_resets_ends_alone() {
    Server::each_stream(&[], |server| {
        let before = server.open_files();
        let mut kept = server.connect();
        for _ in 0..20 {
            // Closing with the echo unread resets the connection.
            let mut stream = server.connect();
            server.send(&mut stream, &noise(100_000, 6));
        }
        server.send(&mut kept, b"still here");
        server.expect(&mut kept, b"still here");
        drop(kept);
        server.await_open_files(before);
    });
}

#[test]
fn a_receive_that_takes_too_long_closes_the_connection() {
    Server::each_stream(&["--timeout", "0.2"], |server| {
        let before = server.open_files();
        let start = Instant::now();
        let mut idle = server.connect();
        server.expect_end(&mut idle);
        let elapsed = start.elapsed();
        assert!(
            elapsed >= Duration::from_millis(199),
            "{}: {elapsed:?}",
            server.name
        );
        drop(idle);
        server.await_open_files(before);
    });
}

#[test]
fn a_send_that_takes_too_long_closes_the_connection() {
    Server::each_stream(&["--timeout", "0.2"], |server| {
        let before = server.open_files();
        // The bytes are there before the connection is: waiting for them must not be what takes too long.
        let message = vec![7; 64 << 20];
        let mut stream = server.connect();
        let outcome = stream.write_all(&message);
        let kind = outcome
            .expect_err("nothing is read, so not all can be taken")
            .kind();
        assert!(
            matches!(kind, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset),
            "{}: {kind:?}",
            server.name
        );
        drop(stream);
        server.await_open_files(before);
    });
}

#[test]
fn a_timeout_that_is_not_reached_changes_nothing() {
    Server::each_stream(&["--timeout", "20"], |server| {
        let mut streams: Vec<Stream> = (0..100).map(|_| server.connect()).collect();
        for round in 0..20 {
            let message = noise(5000, round);
            for stream in &mut streams {
                server.send(stream, &message);
            }
            for stream in &mut streams {
                server.expect(stream, &message);
            }
        }
    });
}

#[test]
fn datagrams_come_back_whole_to_the_one_who_sent_them() {
    for timeout in [&[][..], &["--timeout", "0.1"]] {
        for peer in &PEERS {
            let server = Server::start(
                peer,
                &[&["--udp", "127.0.0.1:0", "--buffer", "65536"], timeout].concat(),
            );
            let clients = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").expect("a port is free"));
            for client in &clients {
                client
                    .connect(&server.address)
                    .expect("the address is right");
                client
                    .set_read_timeout(Some(PATIENCE))
                    .expect("a timeout can be set");
            }
            if !timeout.is_empty() {
                // Nothing arrives for longer than the server's receive may take.
                clients[0]
                    .set_read_timeout(Some(Duration::from_millis(250)))
                    .expect("a timeout can be set");
                let nothing = clients[0]
                    .recv(&mut [0])
                    .expect_err("nothing was sent")
                    .kind();
                assert_eq!(nothing, ErrorKind::WouldBlock);
                clients[0]
                    .set_read_timeout(Some(PATIENCE))
                    .expect("a timeout can be set");
            }
            for (seed, size) in [1, 0, 64, 1472, 16384, 60_000].into_iter().enumerate() {
                let messages = [noise(size, seed as u64), noise(size, 100 + seed as u64)];
                for (client, message) in clients.iter().zip(&messages) {
                    client
                        .send(message)
                        .unwrap_or_else(|error| panic!("{}: send: {error}", server.name));
                }
                for (client, message) in clients.iter().zip(&messages) {
                    let mut got = vec![0; 65536];
                    let n = client
                        .recv(&mut got)
                        .unwrap_or_else(|error| panic!("{}: {size} bytes: {error}", server.name));
                    assert!(
                        &got[..n] == message,
                        "{}: {size} bytes came back changed",
                        server.name
                    );
                }
            }
        }
    }
}

#[test]
fn a_socket_left_by_an_ended_server_is_taken_over_and_another_file_is_not() {
    for peer in &PEERS {
        let path = socket_path(peer.0);
        drop(Server::start(peer, &["--unix", &path]));
        let server = Server::start(peer, &["--unix", &path]);
        assert_eq!(server.address, path);
        let mut stream = server.connect();
        server.send(&mut stream, b"again");
        server.expect(&mut stream, b"again");
        drop(server);
        std::fs::remove_file(&path).expect("the server leaves its socket");

        std::fs::write(&path, "precious").expect("the directory can be written to");
        let output = run(peer, &["--unix", &path]);
        assert!(!output.status.success(), "{}", peer.0);
        assert_eq!(
            std::fs::read(&path).expect("the file is there"),
            b"precious"
        );
        std::fs::remove_file(&path).expect("the file is there");
    }
}

#[test]
fn a_wrong_command_line_is_refused_with_status_2() {
    for peer in &PEERS {
        for wrong in [
            &["--bind", "127.0.0.1"][..],
            &["--buffer", "0"],
            &["--timeout", "0"],
            &["--bind", "127.0.0.1:0", "--unix", "/nowhere"],
            &["--fanout"],
        ] {
            let output = run(peer, wrong);
            assert_eq!(output.status.code(), Some(2), "{} {wrong:?}", peer.0);
            assert!(
                !output.stderr.is_empty() && output.stdout.is_empty(),
                "{} {wrong:?}",
                peer.0
            );
        }
    }
}

#[test]
fn what_cannot_be_done_is_said_in_one_line_with_status_2() {
    for peer in &PEERS {
        for impossible in [&["--udp", "127.0.0.1:0"][..], &["--timeout", "1"]] {
            let output = run(peer, &[impossible, &["--fanout", "64"]].concat());
            assert_eq!(output.status.code(), Some(2), "{} {impossible:?}", peer.0);
            let error = String::from_utf8(output.stderr).expect("the reason is text");
            assert!(
                error.starts_with("cannot: ") && error.lines().count() == 1,
                "{}: {error}",
                peer.0
            );
        }
    }
}

#[test]
fn a_fanout_sends_each_message_of_the_first_to_send_to_all_others() {
    Server::each_stream(&["--fanout", "1000"], |server| {
        let before = server.open_files();
        let mut subscribers: Vec<Stream> = (0..100).map(|_| server.connect()).collect();
        // Connections are taken in as they came, so all the others take part before this one sends.
        let mut publisher = server.connect();
        let messages = noise(50_000, 8);
        std::thread::scope(|scope| {
            let mut sender = publisher.duplicate();
            let messages = &messages;
            scope.spawn(move || server.send(&mut sender, messages));
            for subscriber in &mut subscribers {
                server.expect(subscriber, messages);
            }
        });
        // What others send goes nowhere, and nobody gets his own.
        server.send(&mut subscribers[0], &noise(1000, 9));
        server.send(&mut publisher, &messages[..1000]);
        for subscriber in &mut subscribers {
            server.expect(subscriber, &messages[..1000]);
        }
        // A subscriber that leaves does not hold up the rest.
        drop(subscribers.pop());
        server.send(&mut publisher, &messages[1000..3000]);
        for subscriber in &mut subscribers {
            server.expect(subscriber, &messages[1000..3000]);
        }
        publisher.end_sending();
        server.expect_end(&mut publisher);
        drop((subscribers, publisher));
        server.await_open_files(before);
    });
}

/// Runs a program that has to end by itself.
fn run(peer: &(&str, &str), arguments: &[&str]) -> Output {
    let mut child = Command::new(peer.1)
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", peer.0));
    let start = Instant::now();
    while child.try_wait().expect("it is our child").is_none() {
        if start.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("{} {arguments:?}: still running", peer.0);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().expect("its output can be read")
}
