//! Connections that do nothing: each has one message echoed, and then they are only held.

use std::io;
use std::time::Instant;

use clap::Args;

use super::stream::{Common, Stream};
use super::{Report, Stall, Target, Window, WindowArgs, latencies};
use crate::sys::{EVENTS, epoll_wait};

/// Options of this load.
#[derive(Args)]
pub struct IdleArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    window: WindowArgs,
    /// Connections.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    connections: u32,
    /// Bytes in the message.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    size: u32,
}

/// Connections whose messages are in flight at once, so that the backlog is never full.
const AT_ONCE: usize = 256;

/// Runs the load: after its report, the connections are held until standard input ends.
pub fn load(args: &IdleArgs) -> io::Result<()> {
    let mut common = Common::new(args.size, 1)?;
    let mut latencies = latencies();
    let mut streams: Vec<Stream> = Vec::with_capacity(args.connections as usize);
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
    let window = Window::begin(&args.window)?;
    let start = Instant::now();
    let total = args.connections as usize;
    while streams.len() < total {
        let mut unechoed = 0;
        let opened = start.elapsed().as_nanos() as u64;
        for _ in 0..AT_ONCE.min(total - streams.len()) {
            let mut stream = Stream::open(&common, &args.target, streams.len(), streams.len())?;
            stream.issue(&common, 1)?;
            streams.push(stream);
            unechoed += 1;
        }
        let mut stall = Stall::new();
        while unechoed > 0 {
            let count = epoll_wait(common.poll, &mut events, 1000)?;
            stall.check(count, AT_ONCE as u64, unechoed)?;
            for event in &events[..count] {
                let stream = &mut streams[event.u64 as usize];
                stream.flush(&common)?;
                let count = stream.receive(&mut common)?;
                if count > 0 {
                    latencies.saturating_record(start.elapsed().as_nanos() as u64 - opened);
                    unechoed -= 1;
                }
            }
        }
    }
    let measured = window.end(&args.window)?;
    Report {
        kind: "idle",
        messages: u64::from(args.connections),
        warmup: 0,
        measured,
        latencies,
        more: vec![],
    }
    .print(&args.window)?;
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}
