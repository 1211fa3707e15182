//! Fan-out: one connection publishes, and each message comes to all others, which check it like an echo of their own.

use std::io;
use std::time::Instant;

use clap::Args;
use hdrhistogram::Histogram;

use super::stream::{Common, Stream};
use super::{Report, Stall, Target, WindowArgs, latencies};
use crate::sys::{EVENTS, epoll_wait};

/// Options of this load.
#[derive(Args)]
pub struct FanoutArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    window: WindowArgs,
    /// Subscribers.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    connections: u32,
    /// Bytes in a message; the server must be told the same.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    size: u32,
    /// Messages published and not received by all yet.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    depth: u32,
    /// Messages to publish.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    messages: u64,
    /// Messages to publish before the measurement [default: a tenth of --messages, at least one].
    #[arg(long)]
    warmup: Option<u64>,
}

struct Load {
    common: Common,
    publisher: Stream,
    /// Each with how many messages it has received.
    subscribers: Vec<(Stream, u64)>,
    depth: u64,
    /// Messages published so far; of the last few, when that was and how many subscribers still wait: circles of `depth`.
    published: u64,
    times: Box<[u64]>,
    missing: Box<[u32]>,
    start: Instant,
    latencies: Histogram<u64>,
}

/// Runs the load.
pub fn load(args: &FanoutArgs) -> io::Result<()> {
    let warmup = args.warmup.unwrap_or((args.messages / 10).max(1));
    let common = Common::new(args.size, args.depth)?;
    let count = args.connections as usize;
    let mut subscribers = Vec::with_capacity(count);
    for index in 0..count {
        // They all receive the publisher's stream.
        subscribers.push((Stream::open(&common, &args.target, index, 0)?, 0));
    }
    // The publisher comes last, so that the server has accepted all others when it hears of it.
    let publisher = Stream::open(&common, &args.target, count, 0)?;
    let mut load = Load {
        common,
        publisher,
        subscribers,
        depth: u64::from(args.depth),
        published: 0,
        times: vec![0; args.depth as usize].into_boxed_slice(),
        missing: vec![0; args.depth as usize].into_boxed_slice(),
        start: Instant::now(),
        latencies: latencies(),
    };
    load.run(warmup)?;
    load.latencies.reset();
    let measured = args
        .window
        .measure(args.messages, |messages| load.run(messages))?;
    let deliveries = args.messages * u64::from(args.connections);
    Report {
        kind: "fanout",
        messages: args.messages,
        warmup,
        measured,
        latencies: load.latencies,
        more: vec![("deliveries", deliveries.into())],
    }
    .print(&args.window)
}

impl Load {
    /// Publishes so many messages and waits until all have received them.
    fn run(&mut self, messages: u64) -> io::Result<()> {
        let last = self.published + messages;
        let mut unreceived = messages * self.subscribers.len() as u64;
        let deliveries = unreceived;
        for _ in 0..self.depth.min(messages) {
            self.publish()?;
        }
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        let mut stall = Stall::new();
        while unreceived > 0 {
            let count = epoll_wait(self.common.poll, &mut events, 1000)?;
            stall.check(count, deliveries, unreceived)?;
            for event in &events[..count] {
                let index = event.u64 as usize;
                let Some((stream, received)) = self.subscribers.get_mut(index) else {
                    // The publisher has room again, or has been closed.
                    self.publisher.flush(&self.common)?;
                    if event.events & !(libc::EPOLLOUT as u32) != 0 {
                        self.publisher.receive(&mut self.common)?;
                    }
                    continue;
                };
                let count = stream.receive(&mut self.common)?;
                let now = self.start.elapsed().as_nanos() as u64;
                for _ in 0..count {
                    let slot = (*received % self.depth) as usize;
                    *received += 1;
                    unreceived -= 1;
                    self.latencies.saturating_record(now - self.times[slot]);
                    self.missing[slot] -= 1;
                }
                // A place is free again only when the oldest message has come to all.
                while self.published < last
                    && self.missing[(self.published % self.depth) as usize] == 0
                {
                    self.publish()?;
                }
            }
        }
        Ok(())
    }

    fn publish(&mut self) -> io::Result<()> {
        let slot = (self.published % self.depth) as usize;
        self.times[slot] = self.start.elapsed().as_nanos() as u64;
        self.missing[slot] = self.subscribers.len() as u32;
        self.published += 1;
        // Each subscriber is owed it: what comes without having been published is too much.
        for (stream, _) in &mut self.subscribers {
            stream.flying += 1;
        }
        self.publisher.issue(&self.common, 1)
    }
}
