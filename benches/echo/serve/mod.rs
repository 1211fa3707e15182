//! The servers: each prints `listening on ADDRESS` once it listens, and runs until a signal ends it.
//!
//! What cannot be done in a combination of options is one line `cannot: REASON` on standard error and the exit code 2.
#![allow(unsafe_code)]

mod epoll;
mod raw_multi;
mod raw_single;
mod ring;

use std::io::{self, Write};
use std::net::TcpListener;
use std::os::fd::{IntoRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};

use crate::sys::check;

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
    /// Epoll.
    Epoll(epoll::EpollArgs),
}

/// Serves until a signal ends the process, or something fails.
pub fn serve(args: ServeArgs) -> ExitCode {
    let outcome = match args.contender {
        Contender::RawSingle(args) => raw_single::serve(&args),
        Contender::RawMulti(args) => raw_multi::serve(&args),
        Contender::Epoll(args) => epoll::serve(&args),
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
#[derive(Args)]
pub struct ListenArgs {
    /// TCP address to listen on; port 0 takes a free one.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    bind: String,
    /// Unix socket to listen on instead; an existing file there is removed.
    #[arg(long, value_name = "PATH", conflicts_with = "bind")]
    unix: Option<PathBuf>,
    /// UDP address to receive datagrams at instead.
    #[arg(long, value_name = "HOST:PORT", conflicts_with_all = ["bind", "unix"])]
    udp: Option<String>,
    /// Size of a receive buffer.
    #[arg(long, value_name = "BYTES", default_value_t = 4096,
          value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    buffer: u32,
    /// Close a connection that sends nothing for this long.
    #[arg(long, value_name = "SECONDS", value_parser = positive_seconds)]
    timeout: Option<Duration>,
}

pub fn positive_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if !(0.001..=1e9).contains(&seconds) {
        return Err("must be between 0.001 and 1e9".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// A listening socket, kept for the life of the process.
pub struct Listening {
    fd: RawFd,
    tcp: bool,
    announcement: String,
}

impl Listening {
    fn open(args: &ListenArgs) -> io::Result<Self> {
        if args.udp.is_some() {
            return Err(cannot("no UDP"));
        }
        // The standard library sets SO_REUSEADDR on TCP listeners and chooses a
        // backlog of its own; a second listen() replaces the backlog.
        let (fd, tcp, address) = if let Some(path) = &args.unix {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            (listener.into_raw_fd(), false, path.display().to_string())
        } else {
            let listener = TcpListener::bind(&args.bind)?;
            let address = listener.local_addr()?.to_string();
            (listener.into_raw_fd(), true, address)
        };
        // SAFETY: plain system call on a descriptor just opened.
        check(unsafe { libc::listen(fd, 1024) })?;
        Ok(Self {
            fd,
            tcp,
            announcement: format!("listening on {address}\n"),
        })
    }

    /// Says where clients can connect, once the server is ready for them.
    fn announce(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(self.announcement.as_bytes())?;
        out.flush()
    }

    /// Sets the options every server sets on an accepted connection.
    fn prepare(&self, fd: RawFd) {
        if self.tcp {
            let on: libc::c_int = 1;
            // SAFETY: the option value is a live c_int of the length given. A failure
            // (the peer is gone already) shows at the first receive.
            unsafe {
                libc::setsockopt(
                    fd,
                    libc::IPPROTO_TCP,
                    libc::TCP_NODELAY,
                    (&raw const on).cast(),
                    size_of::<libc::c_int>() as libc::socklen_t,
                );
            }
        }
    }
}

/// Whether accepting can be tried again at once after this error (a positive
/// error number), rather than only when a descriptor has been given back.
pub fn accept_again(error: i32) -> bool {
    matches!(
        error,
        libc::ECONNABORTED | libc::EINTR | libc::EAGAIN | libc::EPROTO | libc::EPERM
    )
}

/// Whether accepting failed for want of something a closed connection gives back.
pub fn accept_exhausted(error: i32) -> bool {
    matches!(
        error,
        libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM
    )
}

/// Coarse time for idle connections: this many ticks make the timeout.
pub const TICKS: u32 = 8;
