//! The loads: each drives an echo server and verifies every byte that comes back.
//!
//! A load prints `begin` after its warm-up and `end` after its last measured message, each time waiting for a line on standard
//! input if told to `--wait`, so that whoever runs it can read the server's counters exactly around the measured messages. With
//! `--slices` it does so several times; who waits with the line that follows `end` makes a pause between them.
#![allow(unsafe_code)]

mod churn;
mod echo;
mod fanout;
mod idle;
mod paced;
mod stalled;
mod stream;
mod udp;

use std::io::{self, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{IntoRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use hdrhistogram::Histogram;
use serde_json::{Map, Value};

use crate::sys::other;

/// How long a load waits for a server that does nothing.
const STALL: Duration = Duration::from_secs(10);

/// One load of one kind.
#[derive(Args)]
pub struct LoadArgs {
    #[command(subcommand)]
    kind: Kind,
}

#[derive(Subcommand)]
enum Kind {
    /// Keep a number of messages in flight on every connection.
    Echo(echo::EchoArgs),
    /// Send messages at a fixed rate.
    Paced(paced::PacedArgs),
    /// Keep a number of datagrams in flight on every flow.
    Udp(udp::UdpArgs),
    /// Connect, have one message echoed, close, over and over.
    Churn(churn::ChurnArgs),
    /// Open connections and hold them.
    Idle(idle::IdleArgs),
    /// Keep a message in flight on every connection, alone and beside others that never read.
    Stalled(stalled::StalledArgs),
    /// Publish messages to many connections.
    Fanout(fanout::FanoutArgs),
}

/// Runs a load to its end.
pub fn load(args: LoadArgs) -> ExitCode {
    let outcome = match args.kind {
        Kind::Echo(args) => echo::load(&args),
        Kind::Paced(args) => paced::load(&args),
        Kind::Udp(args) => udp::load(&args),
        Kind::Churn(args) => churn::load(&args),
        Kind::Idle(args) => idle::load(&args),
        Kind::Stalled(args) => stalled::load(&args),
        Kind::Fanout(args) => fanout::load(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("echo load: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The server that a load is put on.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub struct Target {
    /// TCP address to connect to.
    #[arg(long, value_name = "HOST:PORT")]
    connect: Option<String>,
    /// Unix socket to connect to.
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
}

impl Target {
    /// A new connection, whose calls do not block.
    fn open(&self) -> io::Result<RawFd> {
        if let Some(path) = &self.unix {
            let stream = UnixStream::connect(path)?;
            stream.set_nonblocking(true)?;
            return Ok(stream.into_raw_fd());
        }
        let name = self.connect.as_deref().unwrap_or_default();
        let address = name
            .to_socket_addrs()?
            .next()
            .ok_or_else(|| other(format!("{name} has no address")))?;
        let stream = TcpStream::connect_timeout(&address, STALL)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(stream.into_raw_fd())
    }
}

/// How a load tells of its measured window.
#[derive(Args)]
pub struct WindowArgs {
    /// Print the result as one line of JSON.
    #[arg(long)]
    json: bool,
    /// Wait for a line on standard input after `begin` and after `end`.
    #[arg(long)]
    wait: bool,
    /// Measure the messages in so many parts, each with a `begin` and an `end`, where the load can.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000))]
    slices: u64,
    /// Messages right before each slice but the first, which are not measured except for their latency: they warm up what a pause
    /// let cool.
    #[arg(long, value_name = "MESSAGES", default_value_t = 0)]
    lead_in: u64,
}

/// The measured window: from `begin` to `end`.
struct Window {
    start: Instant,
    cpu: f64,
}

impl Window {
    /// Announces that what follows is measured.
    fn begin(args: &WindowArgs) -> io::Result<Self> {
        announce("begin", args.wait)?;
        Ok(Self {
            start: Instant::now(),
            cpu: cpu_seconds(),
        })
    }

    /// Announces that what was measured is over.
    fn end(self, args: &WindowArgs) -> io::Result<Measured> {
        let measured = Measured {
            seconds: self.start.elapsed().as_secs_f64(),
            cpu_seconds: cpu_seconds() - self.cpu,
        };
        announce("end", args.wait)?;
        Ok(measured)
    }
}

impl WindowArgs {
    /// Has so many messages sent in slices, each announced for itself: how long they took together.
    fn measure(
        &self,
        messages: u64,
        mut send: impl FnMut(u64) -> io::Result<()>,
    ) -> io::Result<Measured> {
        let slices = self.slices.min(messages);
        let mut all = Measured::default();
        for slice in 0..slices {
            let from = messages * slice / slices;
            let to = messages * (slice + 1) / slices;
            if slice > 0 && self.lead_in > 0 {
                send(self.lead_in)?;
            }
            let window = Window::begin(self)?;
            send(to - from)?;
            let measured = window.end(self)?;
            all.seconds += measured.seconds;
            all.cpu_seconds += measured.cpu_seconds;
        }
        Ok(all)
    }
}

/// How long a window was, and how much of it the load was busy.
#[derive(Default)]
struct Measured {
    seconds: f64,
    cpu_seconds: f64,
}

/// One line to whoever runs the load, and if told to, one line back.
fn announce(line: &str, wait: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()?;
    if wait && io::stdin().read_line(&mut String::new())? == 0 {
        return Err(other("standard input ended before the load did"));
    }
    Ok(())
}

/// Notices when nothing comes back any more.
struct Stall {
    start: Instant,
    looked: Duration,
    quiet: Duration,
}

impl Stall {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            looked: Duration::ZERO,
            quiet: Duration::ZERO,
        }
    }

    /// Fails if there have been no events for too long; `missing` of `messages` have not come back.
    #[inline(always)]
    fn check(&mut self, events: usize, messages: u64, missing: u64) -> io::Result<()> {
        let now = self.start.elapsed();
        let since = now - self.looked;
        self.looked = now;
        if events > 0 {
            self.quiet = Duration::ZERO;
            return Ok(());
        }
        // No look takes longer than a second: if it did, this process was stopped, and the server perhaps with it.
        self.quiet += since.min(Duration::from_secs(1));
        if self.quiet < STALL {
            return Ok(());
        }
        let echoed = messages - missing;
        Err(other(format!(
            "stalled: {echoed} of {messages} messages came back"
        )))
    }
}

/// What a load found out.
struct Report {
    kind: &'static str,
    messages: u64,
    warmup: u64,
    measured: Measured,
    /// Nanoseconds.
    latencies: Histogram<u64>,
    /// What only this kind of load has.
    more: Vec<(&'static str, Value)>,
}

/// Latencies to three digits.
fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds that are in order")
}

impl Report {
    fn print(self, args: &WindowArgs) -> io::Result<()> {
        let seconds = self.measured.seconds;
        let rate = self.messages as f64 / seconds;
        let quantile = |q: f64| self.latencies.value_at_quantile(q) as f64 / 1e3;
        let mut out = io::stdout().lock();
        if args.json {
            let mut object = Map::new();
            let mut put = |name: &str, value: Value| object.insert(name.to_owned(), value);
            put("kind", self.kind.into());
            put("messages", self.messages.into());
            put("slices", args.slices.into());
            put("warmup", self.warmup.into());
            put("seconds", seconds.into());
            put("messages_per_second", rate.into());
            put("p50_us", quantile(0.50).into());
            put("p99_us", quantile(0.99).into());
            put("p999_us", quantile(0.999).into());
            put("max_us", quantile(1.0).into());
            put("load_cpu_seconds", self.measured.cpu_seconds.into());
            for (name, value) in self.more {
                put(name, value);
            }
            writeln!(out, "{}", Value::Object(object))?;
        } else {
            write!(
                out,
                "{} messages in {seconds:.3} s: {rate:.0} messages/s, p50 {:.1} us, p99 {:.1} us, p99.9 {:.1} us, \
                 load busy {:.0} %",
                self.messages,
                quantile(0.50),
                quantile(0.99),
                quantile(0.999),
                100.0 * self.measured.cpu_seconds / seconds
            )?;
            for (name, value) in self.more {
                write!(out, ", {name} {value}")?;
            }
            writeln!(out)?;
        }
        out.flush()
    }
}

/// Processor time of this process so far.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the timespec is valid for writes.
    unsafe {
        libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time);
    }
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Bytes that look random and repeat after a prime number of them, a stream of which each connection sends from a place of its
/// own: no two messages near one another are alike, so that stale, reordered and foreign bytes all differ from those expected.
pub struct Pattern {
    /// One period and the longest chunk, so that what follows any place in the period is contiguous.
    bytes: Box<[u8]>,
    period: usize,
}

impl Pattern {
    /// For messages of `size` bytes, sent and received at most `chunk` bytes at once.
    pub fn new(size: usize, chunk: usize) -> Self {
        // Small, to leave the processor's cache to the sockets; messages as long as the period would all be alike.
        let period = if size.is_multiple_of(16_381) {
            16_369
        } else {
            16_381
        };
        let mut bytes = Vec::with_capacity(period + chunk);
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..period {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.push((state >> 32) as u8);
        }
        while bytes.len() < period + chunk {
            let more = (period + chunk - bytes.len()).min(period);
            bytes.extend_from_within(..more);
        }
        Self {
            bytes: bytes.into_boxed_slice(),
            period,
        }
    }

    /// Where the stream of a connection starts.
    pub fn start(&self, index: usize) -> usize {
        index * 7919 % self.period
    }

    /// The bytes of the stream from a place in it.
    #[inline(always)]
    pub fn at(&self, place: usize, length: usize) -> &[u8] {
        &self.bytes[place..place + length]
    }

    /// The place so many bytes further on.
    #[inline(always)]
    pub fn after(&self, place: usize, length: usize) -> usize {
        (place + length) % self.period
    }
}
