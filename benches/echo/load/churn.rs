//! Connections that come and go: each connects, has one message echoed and closes.

use std::io;
use std::time::Instant;

use clap::Args;
use hdrhistogram::Histogram;

use super::stream::{Common, Stream};
use super::{Report, Stall, Target, WindowArgs, latencies};
use crate::sys::{EVENTS, epoll_wait};

/// Options of this load.
#[derive(Args)]
pub struct ChurnArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    window: WindowArgs,
    /// Connections at once.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    at_once: u32,
    /// Bytes in the message.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    size: u32,
    /// Connections to measure, of one message each.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..))]
    messages: u64,
    /// Connections before the measurement [default: a tenth of --messages].
    #[arg(long)]
    warmup: Option<u64>,
}

/// Runs the load.
pub fn load(args: &ChurnArgs) -> io::Result<()> {
    let warmup = args.warmup.unwrap_or(args.messages / 10);
    let mut common = Common::new(args.size, 1)?;
    let mut latencies = latencies();
    run(args, &mut common, warmup, &mut latencies)?;
    latencies.reset();
    let measured = args.window.measure(args.messages, |messages| {
        run(args, &mut common, messages, &mut latencies)
    })?;
    Report {
        kind: "churn",
        messages: args.messages,
        warmup,
        measured,
        latencies,
        more: vec![],
    }
    .print(&args.window)
}

/// Has so many connections come and go. Connecting waits for no more than a place in the server's backlog.
fn run(
    args: &ChurnArgs,
    common: &mut Common,
    messages: u64,
    latencies: &mut Histogram<u64>,
) -> io::Result<()> {
    let start = Instant::now();
    let mut unopened = messages;
    let mut unechoed = messages;
    let mut open = |common: &Common, slot: usize| -> io::Result<Option<(Stream, u64)>> {
        if unopened == 0 {
            return Ok(None);
        }
        unopened -= 1;
        let now = start.elapsed().as_nanos() as u64;
        let mut stream = Stream::open(common, &args.target, slot, unopened as usize)?;
        stream.issue(common, 1)?;
        Ok(Some((stream, now)))
    };
    let mut slots = Vec::with_capacity(args.at_once as usize);
    for slot in 0..args.at_once as usize {
        slots.push(open(common, slot)?);
    }
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
    let mut stall = Stall::new();
    while unechoed > 0 {
        let count = epoll_wait(common.poll, &mut events, 1000)?;
        stall.check(count, messages, unechoed)?;
        for event in &events[..count] {
            let slot = event.u64 as usize;
            let Some((stream, opened)) = &mut slots[slot] else {
                continue;
            };
            if event.events & libc::EPOLLOUT as u32 != 0 {
                stream.flush(common)?;
            }
            if event.events & !(libc::EPOLLOUT as u32) == 0 || stream.receive(common)? == 0 {
                continue;
            }
            latencies.saturating_record(start.elapsed().as_nanos() as u64 - *opened);
            unechoed -= 1;
            let next = open(common, slot)?;
            if let Some((stream, _)) = std::mem::replace(&mut slots[slot], next) {
                stream.close();
            }
        }
    }
    Ok(())
}
