//! The open loop: messages are due at a fixed rate, whatever the server does, and latency counts from when a message was due.
//! So a server that stalls is charged for every message it held up, not just for the one it was at (coordinated omission).

use std::collections::VecDeque;
use std::io;

use clap::Args;
use hdrhistogram::Histogram;

use super::stream::{Common, Stream};
use super::{Report, Stall, Target, Window, WindowArgs, latencies};
use crate::sys::{EVENTS, epoll_wait};

/// Options of this load.
#[derive(Args)]
pub struct PacedArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    window: WindowArgs,
    /// Connections, which take turns.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    connections: u32,
    /// Bytes in a message.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    size: u32,
    /// Messages a second, over all connections.
    #[arg(long, value_name = "MESSAGES_PER_SECOND", value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    rate: u64,
    /// Messages to measure, over all connections.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    messages: u64,
    /// Messages to send before the measurement, at the same rate [default: a tenth of --messages].
    #[arg(long)]
    warmup: Option<u64>,
}

/// Messages taken to be in flight at most, for the size of the buffer.
const DEPTH: u32 = 16;

/// A connection, and when the messages in flight were due.
struct Connection {
    stream: Stream,
    due: VecDeque<u64>,
}

/// Runs the load.
pub fn load(args: &PacedArgs) -> io::Result<()> {
    let warmup = args.warmup.unwrap_or(args.messages / 10);
    let mut common = Common::new(args.size, DEPTH)?;
    let mut connections = Vec::with_capacity(args.connections as usize);
    for index in 0..args.connections as usize {
        connections.push(Connection {
            stream: Stream::open(&common, &args.target, index, index)?,
            due: VecDeque::with_capacity(DEPTH as usize),
        });
    }
    let mut latencies = latencies();
    run(
        &mut common,
        &mut connections,
        args.rate,
        warmup,
        &mut latencies,
    )?;
    latencies.reset();
    let window = Window::begin(&args.window)?;
    run(
        &mut common,
        &mut connections,
        args.rate,
        args.messages,
        &mut latencies,
    )?;
    let measured = window.end(&args.window)?;
    Report {
        kind: "paced",
        messages: args.messages,
        warmup,
        measured,
        latencies,
        more: vec![("rate", args.rate.into())],
    }
    .print(&args.window)
}

/// Sends so many messages, each when it is due or as soon after as possible, and waits for all echoes. It never sleeps: a
/// wake-up of this process would be part of the latency it measures.
fn run(
    common: &mut Common,
    connections: &mut [Connection],
    rate: u64,
    messages: u64,
    latencies: &mut Histogram<u64>,
) -> io::Result<()> {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
    let mut stall = Stall::new();
    let due = |message: u64| (u128::from(message) * 1_000_000_000 / u128::from(rate)) as u64;
    let mut issued = 0;
    let mut unechoed = messages;
    while unechoed > 0 {
        let now = stall.start.elapsed().as_nanos() as u64;
        while issued < messages && due(issued) <= now {
            let connection = &mut connections[(issued % connections.len() as u64) as usize];
            connection.due.push_back(due(issued));
            connection.stream.issue(common, 1)?;
            issued += 1;
        }
        let count = epoll_wait(common.poll, &mut events, 0)?;
        for event in &events[..count] {
            let connection = &mut connections[event.u64 as usize];
            if event.events & libc::EPOLLOUT as u32 != 0 {
                connection.stream.flush(common)?;
            }
            if event.events & !(libc::EPOLLOUT as u32) == 0 {
                continue;
            }
            let count = connection.stream.receive(common)?;
            let now = stall.start.elapsed().as_nanos() as u64;
            for due in connection.due.drain(..count as usize) {
                latencies.saturating_record(now - due);
            }
            unechoed -= u64::from(count);
        }
        // Between messages that are seldom there is nothing to echo, which is no stall.
        stall.check(
            count + usize::from(issued < messages && unechoed == messages - issued),
            messages,
            unechoed,
        )?;
    }
    Ok(())
}
