//! Crates written against `std::io::{Read, Write}`, unchanged over a `Socket`: rustls and tungstenite, as servers of peers that
//! know nothing of this crate (OpenSSL's command, Python's ssl, Python's websockets), and at both ends within a runtime.

#![allow(unsafe_code)]

mod support;

use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ringsock::Socket;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use rustls::{StreamOwned, SupportedProtocolVersion};
use support::{
    EchoServer, Endpoint, Family, Process, Random, Stream, TempDir, eventually, has_python, run,
    run_example, seed,
};
use tungstenite::Message;

const MIB: usize = 1 << 20;

const TLS: &str = "tls_echo_server";
const WEBSOCKET: &str = "websocket_echo";

/// Waits until the server has only so many sockets, its listeners included, and kills it. It ran to the end and said no more on
/// standard output: what it said of its clients, line by line.
fn reports(mut server: EchoServer, program: &str, sockets: usize) -> Vec<String> {
    let pid = server.process.pid();
    eventually("the connections are closed", || sockets_of(pid) == sockets);
    server.process.signal(libc::SIGKILL);
    let finished = server.process.wait();
    assert_eq!(finished.status.signal(), Some(libc::SIGKILL));
    assert!(finished.stdout.is_empty(), "{finished:?}");
    let lines: Vec<_> = finished.stderr.lines().map(str::to_owned).collect();
    for line in &lines {
        assert!(line.starts_with(&format!("{program}: ")), "{finished:?}");
    }
    lines
}

/// How many sockets the process has open.
fn sockets_of(pid: u32) -> usize {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).expect("a running process");
    open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter(|link| link.to_string_lossy().starts_with("socket:"))
        .count()
}

/// Where a server over IPv4 or IPv6 listens, as two arguments of a client.
fn host_and_port(server: &EchoServer) -> [String; 2] {
    let Endpoint::Tcp(address) = &server.endpoint else {
        unreachable!("a TCP server");
    };
    [address.ip().to_string(), address.port().to_string()]
}

/// Runs a Python client to its end, and expects it to print `all well`.
fn python(script: &str, args: &[String], modules: Option<&Path>) {
    let mut client = Command::new("python3");
    client.arg("-").args(args);
    if let Some(modules) = modules {
        client.env("PYTHONPATH", modules);
    }
    let finished = run(&mut client, script.as_bytes());
    assert!(finished.status.success(), "{finished:?}");
    assert_eq!(finished.stdout, b"all well\n", "{finished:?}");
}

// TLS.

/// A running `tls_echo_server` and the certificate that it made.
struct TlsServer {
    server: EchoServer,
    certificate: PathBuf,
    _dir: TempDir,
}

impl TlsServer {
    fn start(family: Family, args: &[&str]) -> Option<TlsServer> {
        let dir = TempDir::new();
        let certificate = dir.path().join("cert.pem");
        let server = EchoServer::start_program(TLS, family, args, |command| {
            command.arg("--write-cert").arg(&certificate);
        })?;
        Some(TlsServer {
            server,
            certificate,
            _dir: dir,
        })
    }

    fn v4(args: &[&str]) -> TlsServer {
        TlsServer::start(Family::V4, args).expect("IPv4")
    }

    fn python_args(&self) -> Vec<String> {
        let [host, port] = host_and_port(&self.server);
        let pid = self.server.process.pid().to_string();
        vec![host, port, self.certificate.display().to_string(), pid]
    }

    /// A client that trusts the server's certificate, and nothing else.
    fn client(&self, versions: &[&'static SupportedProtocolVersion]) -> ClientConnection {
        let certificate = CertificateDer::from_pem_file(&self.certificate).expect("PEM");
        client(certificate, versions)
    }

    fn connect(&self) -> StreamOwned<ClientConnection, Stream> {
        StreamOwned::new(self.client(rustls::ALL_VERSIONS), self.server.connect())
    }

    fn finish(self) {
        self.server.finish();
    }
}

fn client(
    certificate: CertificateDer<'_>,
    versions: &[&'static SupportedProtocolVersion],
) -> ClientConnection {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.into_owned()).expect("a certificate");
    let config = ClientConfig::builder_with_protocol_versions(versions)
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST).into());
    ClientConnection::new(Arc::new(config), name).expect("a client")
}

fn round_trip(stream: &mut (impl Read + Write), bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    stream.flush()?;
    let mut back = vec![0; bytes.len()];
    stream.read_exact(&mut back)?;
    assert!(back == bytes, "other bytes came back");
    Ok(())
}

fn has_openssl() -> bool {
    let there = Command::new("openssl").arg("version").output().is_ok();
    if !there {
        println!("skipped: there is no openssl");
    }
    there
}

fn openssl_verifies_and_gets_its_bytes_back(family: Family) {
    if !has_openssl() {
        return;
    }
    let Some(server) = TlsServer::start(family, &[]) else {
        return;
    };
    for (option, version) in [("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")] {
        let mut command = Command::new("openssl");
        command.args(["s_client", "-brief", "-no_ign_eof", "-nocommands", option]);
        command.args(["-verify_return_error", "-x509_strict", "-CAfile"]);
        command.arg(&server.certificate);
        match &server.server.endpoint {
            Endpoint::Tcp(address) => {
                let ip = address.ip().to_string();
                command.args(["-connect", &address.to_string(), "-verify_ip", &ip])
            }
            Endpoint::Unix(path) => command
                .args(["-verify_hostname", "localhost", "-unix"])
                .arg(path),
        };
        let (mut process, mut stdin) = Process::interactive(&mut command).expect("openssl starts");
        // Each line is awaited before the next is sent: at the end of its input s_client leaves at once.
        for length in [1, 100, 20_000] {
            let line = "x".repeat(length);
            writeln!(stdin, "{line}").expect("openssl reads");
            assert_eq!(process.line(), line);
        }
        drop(stdin);
        let finished = process.wait();
        assert!(finished.status.success(), "{finished:?}");
        assert!(finished.stdout.is_empty(), "{finished:?}");
        let protocol = format!("Protocol version: {version}\n");
        assert!(finished.stderr.contains(&protocol), "{finished:?}");
        let verified = "Verification: OK\n";
        assert!(finished.stderr.contains(verified), "{finished:?}");
    }
    server.finish();
}

#[test]
fn openssl_verifies_and_gets_its_bytes_back_over_ipv4() {
    openssl_verifies_and_gets_its_bytes_back(Family::V4);
}

#[test]
fn openssl_verifies_and_gets_its_bytes_back_over_ipv6() {
    openssl_verifies_and_gets_its_bytes_back(Family::V6);
}

#[test]
fn openssl_verifies_and_gets_its_bytes_back_over_unix() {
    openssl_verifies_and_gets_its_bytes_back(Family::Unix);
}

/// What the Python clients of the TLS server start with.
const PYTHON_TLS: &str = r#"
import hashlib, os, random, select, socket, ssl, sys, time

host, port, certificate, pid = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
trusting = ssl.create_default_context(cafile=certificate)

def connect(context=trusting, name='localhost', handshake=True):
    raw = socket.create_connection((host, port), timeout=60)
    return context.wrap_socket(raw, server_hostname=name, do_handshake_on_connect=handshake)
"#;

#[test]
fn python_verifies_and_gets_every_byte_back() {
    const SCRIPT: &str = r#"
def exchange(s, size, numbers):
    """Sends and receives at once; a TLS object does that in one thread only."""
    sent, received, left, missing, chunk = hashlib.sha256(), hashlib.sha256(), size, size, b''
    s.setblocking(False)
    while missing:
        if not chunk and left:
            chunk = numbers.randbytes(min(left, numbers.randint(1, 2 ** numbers.randint(0, 18))))
            left -= len(chunk)
            sent.update(chunk)
        moved = 0
        try:
            if chunk:
                moved = s.send(chunk)
                chunk = chunk[moved:]
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        try:
            data = s.recv(65536)
            assert data, 'the end, %d bytes too early' % missing
            received.update(data)
            missing -= len(data)
            moved += len(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        if not moved:
            ready = select.select([s], [s] if chunk else [], [], 60)
            assert ready[0] or ready[1], 'stuck, %d bytes missing' % missing
    s.settimeout(60)
    assert sent.digest() == received.digest(), 'changed'

for version in ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3:
    context = ssl.create_default_context(cafile=certificate)
    context.minimum_version = context.maximum_version = version
    for name, size in ('localhost', 1), ('127.0.0.1', 3 << 20), ('::1', (1 << 20) + 1):
        with connect(context, name) as s:
            exchange(s, size, random.Random('%s/%d' % (name, size)))
            # unwrap returns once the server's close_notify has come as well. Nothing follows it.
            raw = s.unwrap()
            assert raw.recv(1) == b'', 'more than TLS'

def refused(context, name):
    try:
        connect(context, name).close()
    except ssl.SSLCertVerificationError:
        return True

assert refused(trusting, 'example.org'), 'the certificate is not for every name'
assert refused(ssl.create_default_context(), 'localhost'), 'nobody else vouches for it'
print('all well')
"#;
    if !has_python() {
        return;
    }
    for (workers, listeners) in [("1", 1), ("2", 2)] {
        let server = TlsServer::v4(&["--workers", workers]);
        let script = [PYTHON_TLS, SCRIPT].concat();
        python(&script, &server.python_args(), None);
        let reports = reports(server.server, TLS, listeners);
        // The two that did not trust the certificate said so.
        assert_eq!(reports.len(), 2, "{reports:?}");
        for report in reports {
            assert!(
                report.contains(": handshake: received fatal alert: "),
                "{report}"
            );
        }
    }
}

#[test]
fn five_hundred_sessions_at_once_on_one_worker() {
    const SCRIPT: &str = r#"
COUNT = 500

def open_at_the_server():
    """Its sockets, the listener apart."""
    links = (os.readlink('/proc/%s/fd/%s' % (pid, fd)) for fd in os.listdir('/proc/%s/fd' % pid))
    return sum(link.startswith('socket:') for link in links) - 1

all = [connect(handshake=False) for _ in range(COUNT)]
# All begin the handshake before any can finish it.
for s in all:
    s.setblocking(False)
    try:
        s.do_handshake()
        assert False, 'done before the answer was read'
    except ssl.SSLWantReadError:
        s.settimeout(120)
deadline = time.monotonic() + 60
while open_at_the_server() < COUNT:
    assert time.monotonic() < deadline, 'the server has %d' % open_at_the_server()
    time.sleep(0.01)
for s in all:
    s.do_handshake()
# All have shaken hands before the first echo is sent.
for length in 1, 3000:
    for number, s in enumerate(all):
        s.sendall(b'%0*d' % (length, number))
    for number, s in enumerate(all):
        expected, back = b'%0*d' % (length, number), b''
        while len(back) < len(expected):
            data = s.recv(4096)
            assert data, 'the end'
            back += data
        assert back == expected, 'not its own bytes'
assert open_at_the_server() == COUNT, 'the server has %d' % open_at_the_server()
for s in all:
    s.unwrap().close()
print('all well')
"#;
    if !has_python() {
        return;
    }
    let server = TlsServer::v4(&["--workers", "1", "--timeout", "120"]);
    let script = [PYTHON_TLS, SCRIPT].concat();
    python(&script, &server.python_args(), None);
    server.finish();
}

/// Sends `bytes` and ends its side with `end`; everything comes back all the same, then the server's close_notify.
fn half_closed(
    server: &TlsServer,
    version: &'static SupportedProtocolVersion,
    end: impl Fn(&mut StreamOwned<ClientConnection, Stream>),
) {
    let connection = server.client(&[version]);
    let mut stream = StreamOwned::new(connection, server.server.connect());
    let bytes = Random::new(seed()).bytes(100_000);
    stream.write_all(&bytes).expect("sending");
    stream.flush().expect("sending");
    end(&mut stream);
    let mut back = Vec::new();
    // An end without close_notify would be an error.
    stream.read_to_end(&mut back).expect("a whole session");
    assert!(back == bytes, "other bytes came back");
}

#[test]
fn a_session_whose_client_ends_its_side_gets_its_echo_and_close_notify() {
    let server = TlsServer::v4(&[]);
    for version in rustls::ALL_VERSIONS {
        half_closed(&server, version, |stream| {
            stream.conn.send_close_notify();
            stream.flush().expect("sending");
        });
    }
    server.finish();
}

#[test]
fn a_tcp_end_without_close_notify_gets_its_echo_and_is_reported() {
    let server = TlsServer::v4(&[]);
    for version in rustls::ALL_VERSIONS {
        half_closed(&server, version, |stream| {
            stream.sock.half_close().expect("shutdown");
        });
    }
    let reports = reports(server.server, TLS, 1);
    assert_eq!(reports.len(), 2, "{reports:?}");
    for report in reports {
        assert!(report.ends_with(": no close_notify"), "{report}");
    }
}

#[test]
fn whoever_does_not_speak_tls_disturbs_no_session() {
    let server = TlsServer::v4(&["--workers", "1"]);
    let mut live = server.connect();
    round_trip(&mut live, b"before").expect("one echo");
    let garbage = Random::new(seed()).bytes(10_000);
    let others: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        &garbage,
        // Half a record of a handshake.
        b"\x16\x03\x01\x02\x00\x01",
        b"",
    ];
    for other in others {
        let mut stream = server.server.connect();
        stream.write_all(other).expect("sending");
        // A reset is an end, too, already here or later: not everything was read.
        let _ = stream.half_close();
        let mut answer = Vec::new();
        if let Err(error) = stream.read_to_end(&mut answer) {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
        // At most an alert: content type 21.
        assert!(matches!(answer.first(), None | Some(21)), "{answer:?}");
        round_trip(&mut live, b"between").expect("one echo");
    }
    // The HTTP client waits for an answer and gets one.
    let mut stream = server.server.connect();
    stream.write_all(others[0]).expect("sending");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer");
    assert_eq!(answer[..3], [21, 3, 3], "no alert");

    let mut reset = server.connect();
    round_trip(&mut reset, b"one").expect("one echo");
    reset.sock.reset();
    let reset = server.server.connect();
    (&reset).write_all(others[2]).expect("sending");
    reset.reset();
    round_trip(&mut live, b"after").expect("one echo");
    round_trip(&mut server.connect(), b"new").expect("one echo");
    drop(live);
    // One line for each that broke off, the two sessions of the end included.
    let reports = reports(server.server, TLS, 1);
    assert_eq!(reports.len(), 9, "{reports:#?}");
    let handshakes = reports.iter().filter(|line| line.contains("handshake: "));
    assert_eq!(handshakes.count(), 6, "{reports:#?}");
}

/// Connects and sends a byte of `head` about every 20 ms, then its last byte again and again, with a round trip of `live` after
/// each, until the server closes: after how long, and what it said before.
fn dribble(server: &EchoServer, head: &[u8], mut live: impl FnMut()) -> (Duration, Vec<u8>) {
    let started = Instant::now();
    let mut stream = server.connect();
    let mut answer = Vec::new();
    let Stream::Tcp(socket) = &stream else {
        unreachable!("a TCP client");
    };
    socket.set_nodelay(true).expect("TCP_NODELAY");
    let pause = Some(Duration::from_millis(20));
    socket.set_read_timeout(pause).expect("a timeout");
    let last = head.last().expect("a beginning");
    let mut bytes = head.iter().chain(std::iter::repeat(last));
    while started.elapsed() < Duration::from_secs(30) {
        let byte = bytes.next().expect("endless");
        let sent = stream.write_all(&[*byte]);
        live();
        let mut buffer = [0; 1024];
        match stream.read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => sent.expect("sending"),
            Ok(0) | Err(_) => return (started.elapsed(), answer),
            Ok(n) => answer.extend_from_slice(&buffer[..n]),
        }
    }
    panic!("still open after half a minute");
}

#[test]
fn a_tls_handshake_that_stalls_or_dribbles_ends_while_others_are_served() {
    let server = TlsServer::v4(&["--workers", "1", "--timeout", "1"]);
    let mut silent = server.server.connect();
    let mut live = server.connect();
    let echo = || round_trip(&mut live, b"still there").expect("one echo");
    // The head of a record of 16,384 bytes, and of a ClientHello.
    let head = b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03";
    let (after, _) = dribble(&server.server, head, echo);
    assert!(after >= Duration::from_millis(999), "after {after:?}");
    assert!(after < Duration::from_secs(10), "after {after:?}");
    assert_eq!(silent.read(&mut [0; 16]).expect("the end"), 0);
    live.conn.send_close_notify();
    live.flush().expect("sending");
    let reports = reports(server.server, TLS, 1);
    assert_eq!(reports.len(), 2, "{reports:?}");
    for report in reports {
        assert!(report.ends_with("handshake: timed out"), "{report}");
    }
}

/// Writes one byte with each call, in a packet of its own.
struct OneByOne(Stream);

impl Read for OneByOne {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for OneByOne {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(&bytes[..bytes.len().min(1)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_tls_session_works_byte_by_byte() {
    let server = TlsServer::v4(&[]);
    for version in rustls::ALL_VERSIONS {
        let stream = server.server.connect();
        let Stream::Tcp(socket) = &stream else {
            unreachable!("a TCP client");
        };
        socket.set_nodelay(true).expect("TCP_NODELAY");
        let connection = server.client(&[version]);
        let mut stream = StreamOwned::new(connection, OneByOne(stream));
        round_trip(&mut stream, b"byte by byte").expect("one echo");
        stream.conn.send_close_notify();
        stream.flush().expect("sending");
        assert_eq!(stream.read(&mut [0; 16]).expect("the end"), 0);
    }
    server.finish();
}

#[test]
fn a_silent_tls_session_ends_with_close_notify() {
    let server = TlsServer::v4(&["--timeout", "0.5"]);
    let mut stream = server.connect();
    let started = Instant::now();
    round_trip(&mut stream, b"hello").expect("one echo");
    assert_eq!(stream.read(&mut [0; 16]).expect("close_notify"), 0);
    let after = started.elapsed();
    assert!(after >= Duration::from_millis(499), "after {after:?}");
    assert!(after < Duration::from_secs(10), "after {after:?}");
    let reports = reports(server.server, TLS, 1);
    assert_eq!(reports.len(), 1, "{reports:?}");
    assert!(reports[0].ends_with(": timed out"), "{reports:?}");
}

#[test]
fn a_certificate_of_ones_own_is_served() {
    let dir = TempDir::new();
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let names = ["127.0.0.1".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).expect("a certificate");
    fs::write(&cert, made.cert.pem()).expect("a file");
    fs::write(&key, made.signing_key.serialize_pem()).expect("a file");
    let server = EchoServer::start_program(TLS, Family::V4, &[], |command| {
        command.arg("--cert").arg(&cert).arg("--key").arg(&key);
    });
    let server = server.expect("IPv4");
    let connection = client(made.cert.der().clone(), rustls::ALL_VERSIONS);
    let mut stream = StreamOwned::new(connection, server.connect());
    round_trip(&mut stream, b"hello").expect("one echo");
    stream.conn.send_close_notify();
    stream.flush().expect("sending");
    assert_eq!(stream.read(&mut [0; 16]).expect("the end"), 0);
    server.finish();
}

// WebSocket.

fn websocket_server(args: &[&str]) -> EchoServer {
    let server = EchoServer::start_program(WEBSOCKET, Family::V4, args, |_| ());
    server.expect("IPv4")
}

/// Where Python finds its `websockets` package, which is installed on first use; `None` (said on standard output) without it.
fn websockets() -> Option<&'static Path> {
    static MODULES: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let modules = MODULES.get_or_init(|| {
        let modules = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python-websockets");
        let usable = |modules: &Path| {
            let mut probe = Command::new("python3");
            probe.args([
                "-c",
                "import websockets.sync.client, websockets.asyncio.client",
            ]);
            let finished = run(probe.env("PYTHONPATH", modules), b"");
            finished.status.success()
        };
        if usable(&modules) {
            return Ok(modules);
        }
        // Another test run may install at the same time: each into a directory of its own, and the first one's stays.
        let own = modules.with_extension(std::process::id().to_string());
        let mut pip = Command::new("python3");
        pip.args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]);
        pip.args(["--no-deps", "--timeout", "20", "--retries", "1", "--target"]);
        let finished = run(pip.arg(&own).arg("websockets>=14"), b"");
        if finished.status.success() {
            let _ = fs::rename(&own, &modules);
        }
        let _ = fs::remove_dir_all(&own);
        if usable(&modules) {
            return Ok(modules);
        }
        let reason = finished.stderr.lines().last();
        Err(reason.unwrap_or("it cannot be imported").to_owned())
    });
    match modules {
        Ok(modules) => Some(modules),
        Err(reason) => {
            println!("skipped: there is no websockets package for Python: {reason}");
            None
        }
    }
}

/// Runs a Python client of the server: whether it can (it says so if not).
fn python_websockets(server: &EchoServer, script: &str) -> bool {
    const PRELUDE: &str = r#"
import asyncio, hashlib, random, sys
import websockets
from websockets.asyncio.client import connect as connect_async
from websockets.sync.client import connect as connect_sync
uri = 'ws://%s:%s/' % (sys.argv[1], sys.argv[2])

def connect():
    return connect_sync(uri, max_size=None, open_timeout=60, close_timeout=60, ping_interval=None)

def closed_by_server(s, code, reason):
    """The server began to close the connection, so."""
    try:
        s.recv(60)
        assert False, 'still open'
    except websockets.ConnectionClosed as error:
        assert error.rcvd.code == code, error
        assert reason in error.rcvd.reason, error
        assert error.rcvd_then_sent is True, error
"#;
    if !has_python() {
        return false;
    }
    let Some(modules) = websockets() else {
        return false;
    };
    let script = [PRELUDE, script, "\nprint('all well')\n"].concat();
    python(&script, &host_and_port(server), Some(modules));
    true
}

#[test]
fn python_gets_its_messages_back() {
    let server = websocket_server(&[]);
    let script = r#"
with connect() as s:
    for message in 'text', b'binary', '', b'', 'Grüße, 世界 🌍', bytes(range(256)), 'x' * 126, b'y' * 65536:
        s.send(message)
        back = s.recv(60)
        assert type(back) is type(message) and back == message, (message[:80], back[:80])
    # Several frames become one message again.
    s.send(['one ', '', 'twö ', 'three'])
    assert s.recv(60) == 'one twö three'
    s.send(bytes([n]) * 1000 for n in range(200))
    assert s.recv(60) == b''.join(bytes([n]) * 1000 for n in range(200))
    numbers = random.Random(1)
    for size in (4 << 20) - 1, 4 << 20, (15 << 20) + 7:
        message = numbers.randbytes(size)
        s.send(message)
        back = s.recv(60)
        assert hashlib.sha256(back).digest() == hashlib.sha256(message).digest(), size
    text = 'äbc' * (4 << 18)
    s.send(text)
    assert s.recv(60) == text
    # Pings between messages, the answers in order.
    pongs = []
    for n in range(10):
        pongs.append(s.ping('ping %d' % n))
        s.send('message %d' % n)
    for n in range(10):
        assert s.recv(60) == 'message %d' % n
    # A later pong answers earlier pings, too; the last needs its own.
    assert all(pong.wait(60) for pong in pongs), 'no pong'
"#;
    python_websockets(&server, script);
    server.finish();
}

#[test]
fn python_closes_with_a_code_and_a_reason_and_gets_them_back() {
    let server = websocket_server(&[]);
    let script = r#"
for code, reason in (1000, ''), (1001, 'going'), (3000, 'Grüße'), (4999, 'x' * 123):
    with connect() as s:
        s.send('hello')
        assert s.recv(60) == 'hello'
        s.close(code, reason)
        received = s.protocol.close_rcvd
        assert (received.code, received.reason) == (code, reason), received
        assert s.protocol.close_rcvd_then_sent is False
"#;
    python_websockets(&server, script);
    server.finish();
}

#[test]
fn what_a_message_may_not_be_is_closed_with_the_code_that_says_so() {
    let limits = ["--max-frame", "1048576", "--max-message", "3145728"];
    let server = websocket_server(&limits);
    let script = r#"
MIB = 1 << 20

def refused(parts, code, reason):
    with connect() as s:
        try:
            if code == 1007:
                s.send(iter(parts), text=True)
            else:
                s.send(iter(parts))
        except websockets.ConnectionClosed:
            pass
        closed_by_server(s, code, reason)

with connect() as live:
    for parts, code, reason in (
        ([b'\xff\xfe'], 1007, 'UTF-8'),
        ([b'fine', b'\xff'], 1007, 'UTF-8'),
        ([bytes(MIB + 1)], 1009, 'too long'),
        ([bytes(8 * MIB)], 1009, 'too long'),
        ([bytes(MIB)] * 4, 1009, 'too long'),
    ):
        refused(parts, code, reason)
        live.send('still there')
        assert live.recv(60) == 'still there'
    for parts in [bytes(MIB)], [bytes(MIB)] * 3:
        live.send(iter(parts))
        assert live.recv(60) == b''.join(parts)
"#;
    if python_websockets(&server, script) {
        let reports = reports(server, WEBSOCKET, 1);
        let codes = |what: &str| reports.iter().filter(|line| line.contains(what)).count();
        assert_eq!(reports.len(), 5, "{reports:#?}");
        assert_eq!(codes("UTF-8 encoding error"), 2, "{reports:#?}");
        assert_eq!(codes("Message too long"), 3, "{reports:#?}");
    }
}

#[test]
fn two_hundred_websockets_at_once() {
    for workers in ["1", "2"] {
        let server = websocket_server(&["--workers", workers, "--timeout", "120"]);
        let script = r#"
COUNT = 200

async def main():
    connecting = (connect_async(uri, open_timeout=120, ping_interval=None) for _ in range(COUNT))
    all = await asyncio.gather(*connecting)
    # All are open before the first message is sent.
    async def talk(number, s):
        for round in range(5):
            message = '%d/%d' % (number, round) * (1 + number * 10)
            await s.send(message)
            assert await asyncio.wait_for(s.recv(), 120) == message
            await asyncio.wait_for(await s.ping(), 120)
    await asyncio.gather(*(talk(number, s) for number, s in enumerate(all)))
    await asyncio.gather(*(s.close() for s in all))
    assert all[-1].close_code == 1000

asyncio.run(main())
"#;
        python_websockets(&server, script);
        server.finish();
    }
}

/// A request that RFC 6455 gives as its example, with the example's answer.
const REQUEST: &[u8] =
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
    Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// A frame as a client sends it, with a mask that changes nothing. `head` is the first byte: the final flag and the opcode.
fn frame(head: u8, payload: &[u8]) -> Vec<u8> {
    assert!(payload.len() < 126, "a short frame");
    [&[head, 0x80 | payload.len() as u8, 0, 0, 0, 0], payload].concat()
}

/// Reads the server's next frame, a short one: its first byte and its payload.
fn next_frame(stream: &mut impl Read) -> (u8, Vec<u8>) {
    let mut head = [0; 2];
    stream.read_exact(&mut head).expect("a frame");
    let mut payload = vec![0; head[1].into()];
    assert!(payload.len() < 126, "a short frame");
    stream.read_exact(&mut payload).expect("a payload");
    (head[0], payload)
}

/// Reads the answer to a request as far as the empty line after it, and not a byte more.
fn answer(stream: &mut impl Read) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("an answer");
        text.push(byte[0]);
    }
    String::from_utf8(text).expect("text")
}

/// A WebSocket of nothing but bytes.
fn open(server: &EchoServer) -> Stream {
    let mut stream = server.connect();
    stream.write_all(REQUEST).expect("sending");
    let answer = answer(&mut stream);
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    assert!(answer.contains(ACCEPT), "{answer}");
    stream
}

/// The connection ends with this close frame.
fn assert_closed(stream: &mut Stream, code: u16) {
    let (head, payload) = next_frame(stream);
    assert_eq!(head, 0x88, "no close frame");
    assert_eq!(payload[..2], code.to_be_bytes());
    assert_eq!(stream.read(&mut [0; 16]).expect("the end"), 0);
}

#[test]
fn frames_on_the_wire_are_as_the_rfc_says() {
    let server = websocket_server(&[]);
    let mut stream = open(&server);
    // A ping within a message is answered at once, and a character may be spread over frames.
    let parts = [
        frame(0x01, b"a\xf0\x9f"),
        frame(0x89, b"ping"),
        frame(0x80, b"\x8c\x8d"),
    ];
    stream.write_all(&parts.concat()).expect("sending");
    assert_eq!(next_frame(&mut stream), (0x8a, b"ping".to_vec()));
    assert_eq!(next_frame(&mut stream), (0x81, "a🌍".into()));
    // A pong that nobody asked for is no news.
    stream.write_all(&frame(0x8a, b"pong")).expect("sending");
    stream.write_all(&frame(0x82, b"")).expect("sending");
    assert_eq!(next_frame(&mut stream), (0x82, Vec::new()));
    let close = [&4000_u16.to_be_bytes()[..], b"bye"].concat();
    stream.write_all(&frame(0x88, &close)).expect("sending");
    assert_eq!(next_frame(&mut stream), (0x88, close));
    assert_eq!(stream.read(&mut [0; 16]).expect("the end"), 0);
    // Without a code, the answer has none.
    let mut stream = open(&server);
    stream.write_all(&frame(0x88, b"")).expect("sending");
    assert_eq!(next_frame(&mut stream), (0x88, Vec::new()));
    assert_eq!(stream.read(&mut [0; 16]).expect("the end"), 0);
    server.finish();
}

#[test]
fn what_breaks_the_protocol_is_closed_with_1002_and_disturbs_nobody() {
    let server = websocket_server(&["--workers", "1"]);
    let mut live = open(&server);
    let mut others_are_served = || {
        live.write_all(&frame(0x81, b"live")).expect("sending");
        assert_eq!(next_frame(&mut live), (0x81, b"live".to_vec()));
    };
    let unmasked = b"\x81\x02hi".to_vec();
    // Reserved bits, an unknown opcode, a continuation of nothing, a ping in pieces.
    for broken in [
        unmasked,
        frame(0xf1, b"hi"),
        frame(0x83, b"hi"),
        frame(0x80, b"hi"),
        frame(0x09, b"hi"),
    ] {
        let mut stream = open(&server);
        stream.write_all(&broken).expect("sending");
        assert_closed(&mut stream, 1002);
        others_are_served();
    }
    // One that says it has 2^62 bytes gets no memory for them.
    let mut stream = open(&server);
    let head = [&[0x82, 0xff, 0x40][..], &[0; 11]].concat();
    stream.write_all(&head).expect("sending");
    assert_closed(&mut stream, 1009);
    drop(stream);
    // No close frame, no end: the connection just breaks.
    let mut stream = open(&server);
    stream.write_all(&frame(0x01, b"part")).expect("sending");
    stream.reset();
    open(&server).half_close().expect("shutdown");
    others_are_served();
    assert_eq!(reports(server, WEBSOCKET, 2).len(), 8);
}

#[test]
fn what_is_no_websocket_handshake_gets_a_400() {
    let server = websocket_server(&[]);
    let requests: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nhi",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\0\0\0\0\r\n\r\n",
    ];
    for request in requests {
        let mut stream = server.connect();
        stream.write_all(request).expect("sending");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let start = "HTTP/1.1 400 Bad Request\r\n";
        assert!(answer.starts_with(start), "{answer:?} to {request:?}");
    }
    drop(open(&server));
    let reports = reports(server, WEBSOCKET, 1);
    let handshakes = reports.iter().filter(|line| line.contains("handshake: "));
    assert_eq!(handshakes.count(), 4, "{reports:#?}");
}

/// Sends the request in `pieces`, the server taking each before the next is sent: the answer.
fn handshake_in_pieces(server: &EchoServer, live: &mut Stream, pieces: usize) -> String {
    let mut stream = server.connect();
    let Stream::Tcp(socket) = &stream else {
        unreachable!("a TCP client");
    };
    socket.set_nodelay(true).expect("TCP_NODELAY");
    for piece in REQUEST.chunks(REQUEST.len().div_ceil(pieces)) {
        if stream.write_all(piece).is_err() {
            break;
        }
        // The worker has one ring, and takes what arrived first before what arrived later.
        live.write_all(&frame(0x81, b"live")).expect("sending");
        assert_eq!(next_frame(live), (0x81, b"live".to_vec()));
    }
    answer(&mut stream)
}

#[test]
fn a_websocket_handshake_may_come_in_many_pieces() {
    let server = websocket_server(&["--workers", "1"]);
    let mut live = open(&server);
    let answer = handshake_in_pieces(&server, &mut live, 60);
    assert!(answer.contains(ACCEPT), "{answer}");
    // Past 64 pieces tungstenite expects 128 bytes in each, on any stream.
    let answer = handshake_in_pieces(&server, &mut live, REQUEST.len());
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    live.write_all(&frame(0x81, b"live")).expect("sending");
    assert_eq!(next_frame(&mut live), (0x81, b"live".to_vec()));
}

#[test]
fn a_websocket_handshake_that_stalls_or_dribbles_ends_while_others_are_served() {
    let server = websocket_server(&["--workers", "1", "--timeout", "0.5"]);
    let mut silent = server.connect();
    let mut live = open(&server);
    let echo = || {
        live.write_all(&frame(0x81, b"live")).expect("sending");
        assert_eq!(next_frame(&mut live), (0x81, b"live".to_vec()));
    };
    let (after, answer) = dribble(&server, b"GET /", echo);
    assert!(after >= Duration::from_millis(499), "after {after:?}");
    assert!(after < Duration::from_secs(10), "after {after:?}");
    assert!(answer.is_empty(), "{answer:?}");
    assert_eq!(silent.read(&mut [0; 16]).expect("the end"), 0);
}

#[test]
fn a_silent_websocket_is_closed_with_1001() {
    let server = websocket_server(&["--timeout", "0.5"]);
    let started = Instant::now();
    let mut stream = open(&server);
    assert_closed(&mut stream, 1001);
    let after = started.elapsed();
    assert!(after >= Duration::from_millis(499), "after {after:?}");
    assert!(after < Duration::from_secs(10), "after {after:?}");
    drop(stream);
    let reports = reports(server, WEBSOCKET, 1);
    assert_eq!(reports.len(), 1, "{reports:?}");
    assert!(reports[0].ends_with("timed out"), "{reports:?}");
}

// Both ends within a runtime.

/// A certificate made for this, and a server's configuration with it.
fn tls_server_config() -> (CertificateDer<'static>, Arc<ServerConfig>) {
    let names = ["127.0.0.1".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).expect("a certificate");
    let certificate = made.cert.der().clone();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).expect("a key");
    let config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key)
        .expect("a certificate and its key");
    (certificate, Arc::new(config))
}

/// tungstenite over rustls over a socket, client and server in two fibers of one thread.
#[test]
fn a_websocket_over_tls_works_between_two_fibers() {
    let (certificate, config) = tls_server_config();
    ringsock::run(move || {
        let (left, right) = ringsock::socketpair().expect("a pair");
        left.settimeout(60).expect("a timeout");
        right.settimeout(60).expect("a timeout");
        let server = ringsock::spawn(move || {
            let connection = ServerConnection::new(config).expect("a server");
            let stream = StreamOwned::new(connection, right);
            let mut websocket = tungstenite::accept(stream).expect("a handshake");
            loop {
                match websocket.read() {
                    Ok(Message::Close(_)) => {}
                    Ok(message) => websocket.send(message).expect("sending"),
                    Err(tungstenite::Error::ConnectionClosed) => return,
                    Err(error) => panic!("{error}"),
                }
            }
        });
        let stream = StreamOwned::new(client(certificate, rustls::ALL_VERSIONS), left);
        let (mut websocket, _) =
            tungstenite::client("ws://127.0.0.1/", stream).expect("a handshake");
        let mut numbers = Random::new(seed());
        for size in [1, 70_000, 3 * MIB] {
            let message = Message::binary(numbers.bytes(size));
            websocket.send(message.clone()).expect("sending");
            assert!(websocket.read().expect("a message") == message, "changed");
        }
        websocket.close(None).expect("sending");
        while websocket.read().is_ok() {}
        server.join().expect("the server's fiber");
    });
}

/// Lines through std's buffered reader and writer, copied back by `std::io::copy`.
#[test]
fn the_adapters_of_std_work_between_two_fibers() {
    let lines: Vec<_> = (0..20_000).map(|n| format!("line {n}")).collect();
    let back = ringsock::run({
        let lines = lines.clone();
        move || {
            let (left, right) = ringsock::socketpair().expect("a pair");
            let copied = ringsock::spawn(move || io::copy(&mut &right, &mut &right));
            let sender = ringsock::spawn({
                let left: Socket = left.clone();
                move || {
                    let mut writer = io::BufWriter::new(&left);
                    for line in &lines {
                        writeln!(writer, "{line}")?;
                    }
                    writer.flush()?;
                    Ok::<(), io::Error>(left.shutdown(ringsock::SHUT_WR)?)
                }
            });
            let lines: io::Result<Vec<String>> =
                BufReader::new(&left).lines().take(20_000).collect();
            sender.join().expect("a fiber").expect("sending");
            let copied = copied.join().expect("a fiber").expect("copying");
            (lines.expect("receiving"), copied)
        }
    });
    assert!(back.0 == lines, "other lines came back");
    let bytes: usize = lines.iter().map(|line| line.len() + 1).sum();
    assert_eq!(back.1, bytes as u64);
}

// As programs.

#[test]
fn help_exits_with_0() {
    for program in [TLS, WEBSOCKET] {
        let finished = run_example(program, ["--help"]);
        assert_eq!(finished.status.code(), Some(0), "{finished:?}");
        let text = String::from_utf8_lossy(&finished.stdout);
        assert!(text.contains(&format!("Usage: {program}")), "{finished:?}");
        for option in ["--bind", "--unix", "--workers", "--timeout"] {
            assert!(text.contains(option), "{finished:?}");
        }
        assert!(finished.stderr.is_empty(), "{finished:?}");
    }
}

#[test]
fn bad_arguments_exit_with_2_and_show_the_way() {
    let both: [&[&str]; 8] = [
        &["--nonsense"],
        &["surplus"],
        &["--bind", "nowhere"],
        &["--bind", "127.0.0.1:0", "--unix", "path"],
        &["--workers", "0"],
        &["--timeout", "0"],
        &["--timeout", "1e300"],
        &["--timeout", "soon"],
    ];
    let tls: [&[&str]; 3] = [
        &["--cert", "cert.pem"],
        &["--key", "key.pem"],
        &["--cert", "a", "--key", "b", "--write-cert", "c"],
    ];
    let websocket: [&[&str]; 3] = [
        &["--max-frame", "0"],
        &["--max-message", "much"],
        &["--max-message", "-1"],
    ];
    for (program, own) in [(TLS, tls), (WEBSOCKET, websocket)] {
        for args in both.iter().chain(&own) {
            let finished = run_example(program, *args);
            assert_eq!(finished.status.code(), Some(2), "{args:?}: {finished:?}");
            assert!(finished.stdout.is_empty(), "{args:?}: {finished:?}");
            assert!(finished.stderr.contains("--help"), "{args:?}: {finished:?}");
        }
    }
}

/// The program with these arguments says one line that starts like this, and exits with 1.
fn assert_refused(program: &str, args: &[&str], start: &str) {
    let finished = run_example(program, args);
    assert_eq!(finished.status.code(), Some(1), "{finished:?}");
    assert!(finished.stdout.is_empty(), "{finished:?}");
    let start = format!("{program}: {start}");
    assert!(finished.stderr.starts_with(&start), "{finished:?}");
    assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
}

#[test]
fn an_address_in_use_is_errno_98() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    for program in [TLS, WEBSOCKET] {
        for workers in ["1", "2"] {
            let args = ["--bind", &address, "--workers", workers];
            assert_refused(program, &args, "[Errno 98] ");
        }
        let server = EchoServer::start_program(program, Family::Unix, &[], |_| ());
        let server = server.expect("Unix sockets");
        let Endpoint::Unix(path) = &server.endpoint else {
            unreachable!("a Unix server");
        };
        let path = path.to_str().expect("text");
        assert_refused(program, &["--unix", path], "[Errno 98] ");
        // The connection that found the server there ended without a word.
        server.connect();
    }
}

#[test]
fn a_certificate_that_cannot_be_used_is_one_sentence() {
    let dir = TempDir::new();
    let path = |name: &str| dir.path().join(name).to_str().expect("text").to_owned();
    let (cert, key, other) = (path("cert.pem"), path("key.pem"), path("other.pem"));
    let (missing, empty) = (path("missing.pem"), path("empty.pem"));
    let made = |path: &str, key: &str| {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]);
        let made = made.expect("a certificate");
        fs::write(path, made.cert.pem()).expect("a file");
        fs::write(key, made.signing_key.serialize_pem()).expect("a file");
    };
    made(&path("unused.pem"), &other);
    made(&cert, &key);
    fs::write(&empty, "").expect("a file");
    let refused = |cert: &str, key: &str, start: &str| {
        let args = ["--bind", "127.0.0.1:0", "--cert", cert, "--key", key];
        assert_refused(TLS, &args, start);
    };
    refused(&missing, &key, &missing);
    refused(&cert, &missing, &missing);
    refused(&empty, &key, &empty);
    refused(&cert, &empty, &empty);
    refused(&cert, &cert, &cert);
    refused(&cert, &other, "");
    let nowhere = dir.path().join("no/cert.pem");
    let nowhere = nowhere.to_str().expect("text");
    let args = ["--bind", "127.0.0.1:0", "--write-cert", nowhere];
    assert_refused(TLS, &args, nowhere);
}
