//! The servers: each prints `listening on ADDRESS` once it listens, and runs until a signal ends it.
//!
//! What cannot be done in a combination of options is one line `cannot: REASON` on standard error and the exit code 2.
#![allow(unsafe_code)]

mod buffers;
mod corrupt;
mod epoll;
mod epoll_proxy;
mod epoll_udp;
mod fanout;
mod other_proxy;
mod poll_ring;
mod raw_multi;
mod raw_single;
mod raw_udp;
mod ring;
mod ringsock;
mod ringsock_proxy;
mod threads;

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{IntoRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};

use crate::sys::{check, set_option, widen_buffers};

/// One server of one kind.
#[derive(Args)]
pub struct ServeArgs {
    #[command(subcommand)]
    contender: Contender,
}

#[derive(Subcommand)]
enum Contender {
    /// Raw io_uring, single-shot operations.
    RawSingle(raw_single::SingleArgs),
    /// Raw io_uring, multishot receives and a provided buffer ring.
    RawMulti(raw_multi::MultiArgs),
    /// Raw io_uring as a source of readiness: a multishot poll for each connection, plain calls for the rest.
    PollRing(poll_ring::PollArgs),
    /// Epoll.
    Epoll(epoll::EpollArgs),
    /// The standard library: a thread for each connection.
    #[command(alias = "std-thread")]
    Threads(ListenArgs),
    /// The crate: a fiber for each connection, one worker.
    Ringsock(ringsock::RingsockArgs),
    /// The crate, receiving into buffers of the worker's pool.
    RingsockLease(ListenArgs),
    /// The crate without fibers: a thread for each connection.
    RingsockThread(ListenArgs),
    /// A proxy with epoll.
    EpollProxy(epoll_proxy::EpollProxyArgs),
    /// A proxy with the crate.
    RingsockProxy(ringsock_proxy::RingsockProxyArgs),
    /// A proxy of other people's.
    OtherProxy(other_proxy::OtherProxyArgs),
    /// An echo that goes wrong, to test what judges the others.
    Corrupt(corrupt::CorruptArgs),
}

/// Serves until a signal ends the process, or something fails.
pub fn serve(args: ServeArgs) -> ExitCode {
    let outcome = match args.contender {
        Contender::RawSingle(args) => raw_single::serve(&args),
        Contender::RawMulti(args) => raw_multi::serve(&args),
        Contender::PollRing(args) => poll_ring::serve(&args),
        Contender::Epoll(args) => epoll::serve(&args),
        Contender::Threads(args) => threads::serve(&args),
        Contender::Ringsock(args) => ringsock::serve(args),
        Contender::RingsockLease(args) => ringsock::serve_leases(args),
        Contender::RingsockThread(args) => ringsock::serve_threads(args),
        Contender::EpollProxy(args) => epoll_proxy::serve(&args),
        Contender::RingsockProxy(args) => ringsock_proxy::serve(&args),
        Contender::OtherProxy(args) => other_proxy::serve(&args),
        Contender::Corrupt(args) => corrupt::serve(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {
            eprintln!("cannot: {error}");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("echo serve: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What a contender cannot do, and why.
fn cannot(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, reason)
}

/// Where a server listens, and what every server takes.
#[derive(Args, Clone)]
pub struct ListenArgs {
    /// TCP address to listen on; port 0 takes a free one.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    bind: SocketAddr,
    /// Unix socket to listen on instead; an existing file there is removed.
    #[arg(long, value_name = "PATH", conflicts_with = "bind")]
    unix: Option<PathBuf>,
    /// UDP address to receive datagrams at instead.
    #[arg(long, value_name = "HOST:PORT", conflicts_with_all = ["bind", "unix"])]
    udp: Option<SocketAddr>,
    /// Bytes of a receive buffer.
    #[arg(long, value_name = "BYTES", default_value_t = 4096,
          value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    buffer: u32,
    /// A timeout on every receive and send; the connection ends if it runs out.
    #[arg(long, value_name = "SECONDS", value_parser = positive_seconds)]
    timeout: Option<Duration>,
    /// Send each message of so many bytes that the first connection to send sends to all others instead.
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    fanout: Option<u32>,
}

impl ListenArgs {
    /// Refuses what a server has no code for.
    fn streams_only(&self) -> io::Result<()> {
        match (&self.udp, self.fanout) {
            (Some(_), _) => Err(cannot("no datagrams")),
            (_, Some(_)) => Err(cannot("no fan-out")),
            (None, None) => Ok(()),
        }
    }
}

fn positive_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if !(0.001..=1e9).contains(&seconds) {
        return Err("must be between 0.001 and 1e9".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// A listening socket (or one that receives datagrams), kept for the life of the process.
struct Listening {
    fd: RawFd,
    address: String,
}

impl Listening {
    fn open(args: &ListenArgs) -> io::Result<Self> {
        if let Some(address) = args.udp {
            let socket = UdpSocket::bind(address)?;
            let address = socket.local_addr()?.to_string();
            let fd = socket.into_raw_fd();
            widen_buffers(fd);
            return Ok(Self { fd, address });
        }
        // The standard library sets SO_REUSEADDR on TCP listeners and chooses a backlog of its own; a second listen()
        // replaces the backlog.
        let (fd, address) = if let Some(path) = &args.unix {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            (listener.into_raw_fd(), path.display().to_string())
        } else {
            let listener = TcpListener::bind(args.bind)?;
            let address = listener.local_addr()?.to_string();
            let fd = listener.into_raw_fd();
            // Connections inherit it, which saves a call for each.
            set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
            (fd, address)
        };
        // SAFETY: plain system call on a descriptor just opened.
        check(unsafe { libc::listen(fd, 4096) })?;
        Ok(Self { fd, address })
    }

    /// Says where clients can connect, once the server is ready for them.
    fn announce(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        writeln!(out, "listening on {}", self.address)?;
        out.flush()
    }
}

/// Whether accepting can be tried again at once after this error (a positive
/// error number), rather than only when a descriptor has been given back.
fn accept_again(error: i32) -> bool {
    matches!(
        error,
        libc::ECONNABORTED | libc::EINTR | libc::EAGAIN | libc::EPROTO | libc::EPERM
    )
}

/// Whether accepting failed for want of something a closed connection gives back.
fn accept_exhausted(error: i32) -> bool {
    matches!(
        error,
        libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM
    )
}

/// Whether a ring that accepts is to start again at once after this error (a positive error number), its accept going on by itself
/// if there are `more`; an error if it never can.
fn accepts_again(error: i32, more: bool) -> io::Result<bool> {
    if more || accept_exhausted(error) {
        Ok(false)
    } else if accept_again(error) {
        Ok(true)
    } else {
        Err(io::Error::from_raw_os_error(error))
    }
}

/// Puts a connection where there is room: its index.
fn put<T>(connections: &mut Vec<T>, free: &mut Vec<u32>, connection: T) -> u32 {
    match free.pop() {
        Some(index) => {
            connections[index as usize] = connection;
            index
        }
        None => {
            connections.push(connection);
            connections.len() as u32 - 1
        }
    }
}

/// Coarse time for idle connections: this many ticks make the timeout.
const TICKS: u32 = 8;
