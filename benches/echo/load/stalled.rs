//! The closed loop twice: alone, and beside connections that send and never read what comes back.

use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use clap::Args;

use super::echo::Load;
use super::stream::{Common, Stream};
use super::{Report, Target, Window, WindowArgs};
use crate::sys::{close, other, send, set_option};

/// Options of this load.
#[derive(Args)]
pub struct StalledArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    window: WindowArgs,
    /// Connections that are measured.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    connections: u32,
    /// Connections that never read.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    stalled: u32,
    /// Bytes in a message.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    size: u32,
    /// Messages to measure, over all connections, each time.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    messages: u64,
    /// Messages to echo before each measurement [default: a tenth of --messages].
    #[arg(long)]
    warmup: Option<u64>,
}

/// The receive buffer of a stalled connection: small, for what they all hold is the kernel's memory.
const RECEIVE_BYTES: i32 = 4096;
/// As much as stalls a reader behind a proxy: the kernel keeps some 450 KiB of a connection on one machine. Not all that each would
/// take: that is so much that the kernel runs short of memory for TCP, which slows down everyone.
const SEND_MAX: usize = 640 << 10;
/// A round in which all of them together send no more is the last but so many.
const QUIET_ROUNDS: u32 = 10;
/// The longest they may go on sending.
const FILL: Duration = Duration::from_secs(20);

/// Runs the load.
pub fn load(args: &StalledArgs) -> io::Result<()> {
    let warmup = args.warmup.unwrap_or(args.messages / 10);
    let common = Common::new(args.size, 1)?;
    let mut streams = Vec::new();
    for index in 0..args.connections as usize {
        streams.push(Stream::open(&common, &args.target, index, index)?);
    }
    let mut load = Load::new(common, streams, 1, 1000);
    load.run(warmup)?;
    load.latencies.reset();
    load.run(args.messages)?;
    let calm = load.latencies.clone();

    let mut stalled = Vec::new();
    for _ in 0..args.stalled {
        let fd = args.target.open()?;
        set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, RECEIVE_BYTES)?;
        stalled.push(fd);
    }
    let sent = fill(&stalled)?;
    load.run(warmup)?;
    load.latencies.reset();
    let window = Window::begin(&args.window)?;
    load.run(args.messages)?;
    let measured = window.end(&args.window)?;
    stalled.into_iter().for_each(close);
    let calm_p99_us = calm.value_at_quantile(0.99) as f64 / 1e3;
    Report {
        kind: "stalled",
        messages: args.messages,
        warmup,
        measured,
        more: vec![
            ("calm_p99_us", calm_p99_us.into()),
            (
                "p99_ratio",
                (load.latencies.value_at_quantile(0.99) as f64 / 1e3 / calm_p99_us).into(),
            ),
            ("stalled_bytes", sent.into()),
        ],
        latencies: load.latencies,
    }
    .print(&args.window)
}

/// Sends on all of them, as much as they take: how much that was.
fn fill(stalled: &[RawFd]) -> io::Result<u64> {
    let give_up = Instant::now() + FILL;
    let bytes = vec![0x55; 64 << 10];
    let mut left = vec![SEND_MAX; stalled.len()];
    let (mut sent, mut quiet) = (0, 0);
    while quiet < QUIET_ROUNDS {
        let before = sent;
        for (&fd, left) in stalled.iter().zip(&mut left).filter(|(_, left)| **left > 0) {
            match send(fd, &bytes[..bytes.len().min(*left)]) {
                taken if taken >= 0 => {
                    *left -= taken as usize;
                    sent += taken as u64;
                }
                error if -error as i32 == libc::EAGAIN => {}
                error => return Err(io::Error::from_raw_os_error(-error as i32)),
            }
        }
        if sent == before {
            quiet += 1;
            std::thread::sleep(Duration::from_millis(10));
        } else {
            quiet = 0;
        }
        if Instant::now() > give_up {
            return Err(other("the stalled connections can always send more"));
        }
    }
    Ok(sent)
}
