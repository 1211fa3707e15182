//! The closed loop: every connection keeps its depth in flight until all messages are echoed.

use std::io;
use std::os::fd::RawFd;
use std::time::Instant;

use clap::Args;
use hdrhistogram::Histogram;

use super::{Pattern, Report, STALL, Target, Window, WindowArgs, latencies};
use crate::sys::{EVENTS, epoll_open, epoll_set, epoll_wait, other, recv, send};

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
}

/// The most that is sent or received with one call.
const CHUNK: usize = 256 * 1024;

struct Connection {
    fd: RawFd,
    /// Where in the pattern the next byte to send and to receive are.
    send_at: usize,
    receive_at: usize,
    /// Bytes allowed out and not sent yet.
    unsent: usize,
    /// Messages issued and not echoed yet, and bytes received of the first.
    flying: u32,
    partial: usize,
    /// When the messages in flight were issued: a circle of `depth` times.
    times: Box<[u64]>,
    oldest: u32,
    waiting: bool,
}

struct Load {
    poll: RawFd,
    connections: Vec<Connection>,
    pattern: Pattern,
    buffer: Box<[u8]>,
    size: usize,
    depth: u32,
    /// Messages still to be issued, and still to be echoed.
    unissued: u64,
    unechoed: u64,
    start: Instant,
    latencies: Histogram<u64>,
}

/// Runs the load.
pub fn load(args: &EchoArgs) -> io::Result<()> {
    let warmup = args.warmup.unwrap_or(args.messages / 10);
    let size = args.size as usize;
    let chunk = (size * args.depth as usize).clamp(4096, CHUNK);
    let pattern = Pattern::new(size, chunk);
    let poll = epoll_open()?;
    let mut connections = Vec::with_capacity(args.connections as usize);
    for index in 0..args.connections as usize {
        let fd = args.target.open()?;
        epoll_set(
            poll,
            libc::EPOLL_CTL_ADD,
            fd,
            libc::EPOLLIN as u32,
            index as u64,
        )?;
        connections.push(Connection {
            fd,
            send_at: pattern.start(index),
            receive_at: pattern.start(index),
            unsent: 0,
            flying: 0,
            partial: 0,
            times: vec![0; args.depth as usize].into_boxed_slice(),
            oldest: 0,
            waiting: false,
        });
    }
    let mut load = Load {
        poll,
        connections,
        pattern,
        buffer: vec![0; chunk].into_boxed_slice(),
        size,
        depth: args.depth,
        unissued: 0,
        unechoed: 0,
        start: Instant::now(),
        latencies: latencies(),
    };
    load.run(warmup)?;
    load.latencies.reset();
    let window = Window::begin(&args.window)?;
    load.run(args.messages)?;
    let measured = window.end(&args.window)?;
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
    #[inline(always)]
    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// Issues so many messages and waits for all their echoes.
    fn run(&mut self, messages: u64) -> io::Result<()> {
        self.unissued = messages;
        self.unechoed = messages;
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        for index in 0..self.connections.len() {
            let now = self.now();
            self.issue(index, self.depth, now)?;
        }
        let mut progress = self.now();
        while self.unechoed > 0 {
            let count = epoll_wait(self.poll, &mut events, 1000)?;
            if count == 0 {
                if self.now() - progress > STALL.as_nanos() as u64 {
                    let echoed = messages - self.unechoed;
                    return Err(other(format!(
                        "stalled: {echoed} of {messages} messages echoed"
                    )));
                }
                continue;
            }
            for event in &events[..count] {
                let index = event.u64 as usize;
                if event.events & libc::EPOLLOUT as u32 != 0 {
                    self.flush(index)?;
                }
                if event.events & !(libc::EPOLLOUT as u32) != 0 {
                    self.receive(index)?;
                }
            }
            progress = self.now();
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
        let mut slot = connection.oldest + connection.flying;
        for _ in 0..count {
            if slot >= self.depth {
                slot -= self.depth;
            }
            connection.times[slot as usize] = now;
            slot += 1;
        }
        connection.flying += count;
        connection.unsent += self.size * count as usize;
        if connection.waiting {
            return Ok(());
        }
        self.flush(index)
    }

    #[inline(always)]
    fn flush(&mut self, index: usize) -> io::Result<()> {
        let connection = &mut self.connections[index];
        while connection.unsent > 0 {
            let length = connection.unsent.min(self.buffer.len());
            let sent = send(connection.fd, self.pattern.at(connection.send_at, length));
            if sent < 0 {
                match -sent as i32 {
                    libc::EAGAIN => return self.wait_for_room(index, true),
                    libc::EINTR => continue,
                    error => return Err(io::Error::from_raw_os_error(error)),
                }
            }
            connection.unsent -= sent as usize;
            connection.send_at = self.pattern.after(connection.send_at, sent as usize);
        }
        if connection.waiting {
            return self.wait_for_room(index, false);
        }
        Ok(())
    }

    #[cold]
    fn wait_for_room(&mut self, index: usize, on: bool) -> io::Result<()> {
        let connection = &mut self.connections[index];
        if connection.waiting == on {
            return Ok(());
        }
        connection.waiting = on;
        let out = if on { libc::EPOLLOUT } else { 0 };
        epoll_set(
            self.poll,
            libc::EPOLL_CTL_MOD,
            connection.fd,
            (libc::EPOLLIN | out) as u32,
            index as u64,
        )
    }

    #[inline(always)]
    fn receive(&mut self, index: usize) -> io::Result<()> {
        let connection = &mut self.connections[index];
        let received = recv(connection.fd, &mut self.buffer);
        if received <= 0 {
            return match -received as i32 {
                libc::EAGAIN | libc::EINTR => Ok(()),
                0 => Err(other(format!("connection {index} was closed"))),
                error => Err(io::Error::from_raw_os_error(error)),
            };
        }
        let received = received as usize;
        if self.buffer[..received] != *self.pattern.at(connection.receive_at, received) {
            return Err(other(format!("connection {index} echoed wrong bytes")));
        }
        connection.receive_at = self.pattern.after(connection.receive_at, received);
        connection.partial += received;
        if connection.partial < self.size {
            return Ok(());
        }
        let count = (connection.partial / self.size) as u32;
        connection.partial %= self.size;
        if count > connection.flying {
            return Err(other(format!("connection {index} echoed too much")));
        }
        let now = self.start.elapsed().as_nanos() as u64;
        for _ in 0..count {
            self.latencies
                .saturating_record(now - connection.times[connection.oldest as usize]);
            connection.oldest += 1;
            if connection.oldest == self.depth {
                connection.oldest = 0;
            }
        }
        self.unechoed -= u64::from(count);
        connection.flying -= count;
        self.issue(index, count, now)
    }
}
