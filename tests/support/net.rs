//! Endpoints and streams of any family, and sockets of the crate itself.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ringsock::prelude::{AF_INET, SOCK_STREAM, Socket};

use super::{Process, TempDir, example};

/// No read, write or connect of a test waits longer than this.
const STREAM_LIMIT: Duration = Duration::from_secs(120);

/// A TCP socket that listens on a free port.
pub fn listener(backlog: i32) -> Socket {
    let listener = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    listener.bind(("127.0.0.1", 0)).unwrap();
    listener.listen(backlog).unwrap();
    listener
}

/// Two ends of a TCP connection.
pub fn tcp_pair() -> (Socket, Socket) {
    let listener = listener(1);
    let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    client.connect(listener.getsockname().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    (client, server)
}

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Endpoint {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
    Unix,
}

/// A running `echo_server`, or a server with its options, and where it listens.
pub struct EchoServer {
    pub process: Process,
    pub endpoint: Endpoint,
    _dir: TempDir,
}

impl EchoServer {
    /// Starts one on a free port or path, with further arguments; `None` (said on standard output) without IPv6.
    pub fn start(family: Family, args: &[&str]) -> Option<EchoServer> {
        EchoServer::start_with(family, args, |_| ())
    }

    /// As [`start`](EchoServer::start), the command changed by `prepare`.
    pub fn start_with(
        family: Family,
        args: &[&str],
        prepare: impl FnOnce(&mut Command),
    ) -> Option<EchoServer> {
        EchoServer::start_program("echo_server", family, args, prepare)
    }

    /// As [`start_with`](EchoServer::start_with), another program.
    pub fn start_program(
        program: &str,
        family: Family,
        args: &[&str],
        prepare: impl FnOnce(&mut Command),
    ) -> Option<EchoServer> {
        let dir = TempDir::new();
        let path = dir.path().join("echo.socket");
        let mut command = Command::new(example(program));
        match family {
            Family::V4 => command.args(["--bind", "127.0.0.1:0"]),
            Family::V6 if std::net::TcpListener::bind("[::1]:0").is_err() => {
                println!("skipped: there is no IPv6");
                return None;
            }
            Family::V6 => command.args(["--bind", "[::1]:0"]),
            Family::Unix => command.arg("--unix").arg(&path),
        };
        command.args(args);
        prepare(&mut command);
        let mut process = Process::start(&mut command, b"").expect("a server starts");
        let line = process.line();
        let address = line.strip_prefix("listening on ");
        let address = address.unwrap_or_else(|| panic!("the first line is {line:?}"));
        let endpoint = if family == Family::Unix {
            assert_eq!(Path::new(address), path);
            Endpoint::Unix(path)
        } else {
            let address: SocketAddr = address.parse().expect("an address and a port");
            assert!(address.ip().is_loopback() && address.port() != 0);
            assert_eq!(address.is_ipv6(), family == Family::V6);
            Endpoint::Tcp(address)
        };
        Some(EchoServer {
            process,
            endpoint,
            _dir: dir,
        })
    }

    /// One that was started by other means.
    pub fn adopt(process: Process, address: SocketAddr) -> EchoServer {
        EchoServer {
            process,
            endpoint: Endpoint::Tcp(address),
            _dir: TempDir::new(),
        }
    }

    pub fn connect(&self) -> Stream {
        Stream::connect(&self.endpoint).unwrap_or_else(|error| panic!("connect: {error}"))
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> usize {
        self.process.descriptors()
    }

    /// What it has used of the processors so far.
    pub fn cpu_time(&self) -> Duration {
        self.process.cpu_time()
    }

    /// VmRSS in KiB.
    pub fn resident_kib(&self) -> u64 {
        self.process.resident_kib()
    }

    /// Kills it, having made sure that it was well to the end: it ran, and had nothing more to say.
    pub fn finish(mut self) {
        self.process.signal(libc::SIGKILL);
        let finished = self.process.wait();
        assert!(finished.stdout.is_empty(), "{finished:?}");
        assert!(finished.stderr.is_empty(), "{finished:?}");
    }
}

/// A client's end of a connection.
#[derive(Debug)]
pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    pub fn connect(endpoint: &Endpoint) -> io::Result<Stream> {
        let limit = Some(STREAM_LIMIT);
        Ok(match endpoint {
            Endpoint::Tcp(address) => {
                let stream = TcpStream::connect_timeout(address, STREAM_LIMIT)?;
                stream.set_read_timeout(limit)?;
                stream.set_write_timeout(limit)?;
                Stream::Tcp(stream)
            }
            Endpoint::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(limit)?;
                stream.set_write_timeout(limit)?;
                Stream::Unix(stream)
            }
        })
    }

    /// Ends the sending side.
    pub fn half_close(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
    }

    /// Closes with a reset rather than an end (TCP), which leaves nothing in TIME_WAIT either.
    pub fn reset(self) {
        if let Stream::Tcp(stream) = &self {
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
            assert_eq!(set, 0, "SO_LINGER: {}", io::Error::last_os_error());
        }
    }

    /// Sends `bytes` and expects exactly them back.
    pub fn round_trip(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)?;
        let mut back = vec![0; bytes.len()];
        self.read_exact(&mut back)?;
        assert!(back == bytes, "other bytes came back");
        Ok(())
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => { stream }.read(buffer),
            Stream::Unix(stream) => { stream }.read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => { stream }.write(buffer),
            Stream::Unix(stream) => { stream }.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        (&*self).write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
