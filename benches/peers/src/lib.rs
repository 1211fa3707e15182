//! What the peers share: their command line, the line that says where they listen, and the list of who takes part in a fan-out.
//!
//! Everything else is written out in each program, as that runtime's own users would write it.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::{self, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser};

/// Where to listen, and for what.
#[derive(Clone, Debug)]
pub enum Address {
    /// A TCP listener; port 0 takes a free one.
    Tcp(SocketAddr),
    /// A Unix stream listener.
    Unix(PathBuf),
    /// A UDP socket; port 0 takes a free one.
    Udp(SocketAddr),
}

/// What a peer was asked to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen.
    pub address: Address,
    /// Bytes of the receive buffer each connection (or the UDP socket) has.
    pub buffer: usize,
    /// How long any receive and any send may take.
    pub timeout: Option<Duration>,
    /// Not an echo server: each message of this many bytes from the first connection that sends goes to all the others.
    pub fanout: Option<usize>,
}

/// An echo server on one thread, for ringsock's benchmark.
#[derive(Parser)]
struct CommandLine {
    #[command(flatten)]
    target: Target,
    /// Size of the receive buffer of a connection.
    #[arg(long, value_name = "BYTES", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    buffer: u32,
    /// Give each receive and each send this long: a connection that takes longer is closed.
    #[arg(long, value_name = "SECONDS", value_parser = positive_seconds)]
    timeout: Option<Duration>,
    /// Send each message of the first connection that sends to all other connections, instead of echoing.
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    fanout: Option<u32>,
}

#[derive(Args)]
#[group(multiple = false)]
struct Target {
    /// TCP address to listen on; port 0 takes a free one.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0", value_parser = resolve)]
    bind: SocketAddr,
    /// Unix stream socket to listen on instead; a socket that is there already is removed.
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
    /// UDP address to receive on instead.
    #[arg(long, value_name = "HOST:PORT", value_parser = resolve)]
    udp: Option<SocketAddr>,
}

fn resolve(text: &str) -> Result<SocketAddr, String> {
    let mut found = text.to_socket_addrs().map_err(|error| error.to_string())?;
    found.next().ok_or_else(|| "no address".to_owned())
}

fn positive_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if !(0.001..=1e9).contains(&seconds) {
        return Err("must be between 0.001 and 1e9".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Reads the command line, raises the limit on open files and removes a socket left at the path of `--unix`.
///
/// The options live as long as the program, so that every connection's task can refer to them.
/// Ends the program with status 2 and a sentence on stderr where the command line is wrong.
pub fn options() -> &'static Options {
    let line = CommandLine::parse();
    let address = match (line.target.unix, line.target.udp) {
        (Some(path), _) => Address::Unix(path),
        (_, Some(address)) => Address::Udp(address),
        _ => Address::Tcp(line.target.bind),
    };
    if line.fanout.is_some() && matches!(address, Address::Udp(_)) {
        cannot("a fan-out goes over connections, which UDP has none of");
    }
    if line.fanout.is_some() && line.timeout.is_some() {
        cannot("a subscriber of a fan-out sends nothing, so that a timeout would close it");
    }
    if let Address::Unix(path) = &address
        && std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
    {
        // Whatever goes wrong here, the bind that follows says it better.
        let _ = std::fs::remove_file(path);
    }
    // Where it cannot be raised, the limit that is there has to do.
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    let fanout = line.fanout.map(|bytes| bytes as usize);
    Box::leak(Box::new(Options {
        address,
        buffer: line.buffer as usize,
        timeout: line.timeout,
        fanout,
    }))
}

/// Says that the server listens now, and where.
///
/// # Errors
///
/// What writing to stdout gives.
pub fn listening(address: impl Display) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "listening on {address}")?;
    out.flush()
}

/// Gives a datagram socket the room that ringsock's own servers have: with privilege as much as is asked for, else what is allowed.
pub fn widen_buffers(socket: &impl AsRawFd) {
    let bytes: libc::c_int = 4 << 20;
    let set = |option| {
        // SAFETY: the option's value is an int that lives through the call.
        let done = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                (&raw const bytes).cast(),
                size_of_val(&bytes) as libc::socklen_t,
            )
        };
        done == 0
    };
    // What is not granted shows as loss.
    let _ = set(libc::SO_RCVBUFFORCE) || set(libc::SO_RCVBUF);
    let _ = set(libc::SO_SNDBUFFORCE) || set(libc::SO_SNDBUF);
}

/// Ends the program with status 2, for a combination these servers do not offer.
fn cannot(reason: &str) -> ! {
    eprintln!("cannot: {reason}");
    std::process::exit(2)
}

/// The connections of a fan-out, each with what it takes to send to it, and which of them is the publisher.
pub struct Hub<S> {
    next: u64,
    publisher: Option<u64>,
    members: BTreeMap<u64, S>,
}

impl<S> Default for Hub<S> {
    fn default() -> Self {
        Hub {
            next: 0,
            publisher: None,
            members: BTreeMap::new(),
        }
    }
}

impl<S: Clone> Hub<S> {
    /// Takes a connection in; the result is its number.
    pub fn join(&mut self, sender: S) -> u64 {
        self.next += 1;
        self.members.insert(self.next, sender);
        self.next
    }

    /// Whether this connection, which has sent a message, is the publisher: the first to ask is, until it leaves.
    pub fn publishes(&mut self, number: u64) -> bool {
        *self.publisher.get_or_insert(number) == number
    }

    /// What it takes to send to every connection but this one.
    pub fn others(&self, number: u64) -> Vec<S> {
        let others = self.members.iter().filter(|(member, _)| **member != number);
        others.map(|(_, sender)| sender.clone()).collect()
    }

    /// Drops a connection; where it was the publisher, another can be.
    pub fn leave(&mut self, number: u64) {
        self.members.remove(&number);
        self.publisher.take_if(|publisher| *publisher == number);
    }
}
