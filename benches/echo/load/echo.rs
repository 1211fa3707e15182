//! The closed loop: every connection keeps its depth in flight until all messages are echoed.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use clap::Args;
use hdrhistogram::Histogram;

use super::stream::{Common, Stream};
use super::{Report, Stall, Target, WindowArgs, latencies};
use crate::sys::{EVENTS, epoll_wait};

/// Options of this load.
#[derive(Args)]
pub struct EchoArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    window: WindowArgs,
    /// Connections.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    connections: u32,
    /// Bytes in a message.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    size: u32,
    /// Messages in flight on each connection.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    depth: u32,
    /// Messages to measure, over all connections.
    #[arg(long, default_value_t = 400_000, value_parser = clap::value_parser!(u64).range(1..))]
    messages: u64,
    /// Messages to echo before the measurement [default: a tenth of --messages].
    #[arg(long)]
    warmup: Option<u64>,
    /// Never sleep, so that latencies have no wake-up of the load's in them.
    #[arg(long)]
    busy: bool,
}

struct Connection {
    stream: Stream,
    /// When the messages in flight were issued.
    times: VecDeque<u64>,
}

/// Connections that keep their depth in flight.
pub(super) struct Load {
    common: Common,
    connections: Vec<Connection>,
    depth: u32,
    /// Milliseconds to wait for an event.
    patience: i32,
    /// Messages still to be issued, and still to be echoed.
    unissued: u64,
    unechoed: u64,
    start: Instant,
    /// Nanoseconds.
    pub(super) latencies: Histogram<u64>,
}

/// Runs the load.
pub fn load(args: &EchoArgs) -> io::Result<()> {
    let warmup = args.warmup.unwrap_or(args.messages / 10);
    let common = Common::new(args.size, args.depth)?;
    let mut streams = Vec::with_capacity(args.connections as usize);
    for index in 0..args.connections as usize {
        streams.push(Stream::open(&common, &args.target, index, index)?);
    }
    let patience_ms = if args.busy { 0 } else { 1000 };
    let mut load = Load::new(common, streams, args.depth, patience_ms);
    load.run(warmup)?;
    load.latencies.reset();
    let measured = args
        .window
        .measure(args.messages, |messages| load.run(messages))?;
    Report {
        kind: "echo",
        messages: args.messages,
        warmup,
        measured,
        latencies: load.latencies,
        more: vec![],
    }
    .print(&args.window)
}

impl Load {
    /// With `depth` messages in flight on each connection, sleeping for at most `patience_ms` at a time.
    pub(super) fn new(common: Common, streams: Vec<Stream>, depth: u32, patience_ms: i32) -> Load {
        let connection = |stream| Connection {
            stream,
            times: VecDeque::with_capacity(depth as usize),
        };
        Load {
            common,
            connections: streams.into_iter().map(connection).collect(),
            depth,
            patience: patience_ms,
            unissued: 0,
            unechoed: 0,
            start: Instant::now(),
            latencies: latencies(),
        }
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// Issues so many messages and waits for all their echoes.
    pub(super) fn run(&mut self, messages: u64) -> io::Result<()> {
        self.unissued = messages;
        self.unechoed = messages;
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        for index in 0..self.connections.len() {
            let now = self.now();
            self.issue(index, self.depth, now)?;
        }
        let mut stall = Stall::new();
        while self.unechoed > 0 {
            let count = epoll_wait(self.common.poll, &mut events, self.patience)?;
            stall.check(count, messages, self.unechoed)?;
            for event in &events[..count] {
                let index = event.u64 as usize;
                if event.events & libc::EPOLLOUT as u32 != 0 {
                    self.connections[index].stream.flush(&self.common)?;
                }
                if event.events & !(libc::EPOLLOUT as u32) != 0 {
                    self.receive(index)?;
                }
            }
        }
        Ok(())
    }

    /// Issues up to `count` messages on a connection and sends what it can.
    #[inline(always)]
    fn issue(&mut self, index: usize, count: u32, now: u64) -> io::Result<()> {
        let count = u64::from(count).min(self.unissued) as u32;
        if count == 0 {
            return Ok(());
        }
        self.unissued -= u64::from(count);
        let connection = &mut self.connections[index];
        for _ in 0..count {
            connection.times.push_back(now);
        }
        connection.stream.issue(&self.common, count)
    }

    #[inline(always)]
    fn receive(&mut self, index: usize) -> io::Result<()> {
        let connection = &mut self.connections[index];
        let count = connection.stream.receive(&mut self.common)?;
        if count == 0 {
            return Ok(());
        }
        let now = self.start.elapsed().as_nanos() as u64;
        for issued in connection.times.drain(..count as usize) {
            self.latencies.saturating_record(now - issued);
        }
        self.unechoed -= u64::from(count);
        self.issue(index, count, now)
    }
}
