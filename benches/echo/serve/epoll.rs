//! Echo with epoll, level- or edge-triggered, with one receive buffer for all connections, or one for each.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use clap::Args;

use super::fanout::Fanout;
use super::{ListenArgs, Listening, TICKS, accept_again, accept_exhausted, cannot, epoll_udp, put};
use crate::sys::{EVENTS, check, close, epoll_open, epoll_set, epoll_wait, errno, recv, send};

/// Options of this server.
#[derive(Args)]
pub struct EpollArgs {
    #[command(flatten)]
    pub(super) listen: ListenArgs,
    /// Edge-triggered rather than level-triggered.
    #[arg(long)]
    edge: bool,
    /// Ask again for so long before sleeping.
    #[arg(long, value_name = "MICROSECONDS", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(super) spin: Option<u64>,
    /// A receive buffer for each connection, as who keeps a part of a message has to have it.
    #[arg(long)]
    own: bool,
    /// Datagrams to receive, and to send, with one call.
    #[arg(long, value_name = "DATAGRAMS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(super) batch: u32,
    /// Receive and send the datagrams of one flow as one, where the peer does (UDP_GRO, UDP_SEGMENT).
    #[arg(long)]
    pub(super) segments: bool,
}

/// Data of the listener and the timer; anything less is a connection's index.
const LISTENER: u64 = u64::MAX;
const CLOCK: u64 = u64::MAX - 1;

struct EpollConn {
    fd: RawFd,
    seen: u32,
    /// What a partial send left over, from `sent` on; while there is any, the
    /// connection waits for EPOLLOUT alone.
    pending: Vec<u8>,
    sent: usize,
    /// Its receive buffer, if each connection has one.
    own: Box<[u8]>,
}

struct Epoll {
    poll: RawFd,
    clock: RawFd,
    listening: Listening,
    connections: Vec<EpollConn>,
    free: Vec<u32>,
    buffer: Box<[u8]>,
    own: bool,
    interest: u32,
    edge: bool,
    spin: Option<Duration>,
    fanout: Option<Fanout>,
    accepting: bool,
    tick: u32,
}

pub fn serve(args: &EpollArgs) -> io::Result<()> {
    if args.listen.udp.is_some() {
        return epoll_udp::serve(args);
    }
    if args.batch > 1 || args.segments {
        return Err(cannot("only datagrams come in batches"));
    }
    let listening = Listening::open(&args.listen)?;
    // SAFETY: plain system call on a descriptor just opened.
    check(unsafe { libc::fcntl(listening.fd, libc::F_SETFL, libc::O_NONBLOCK) })?;
    let poll = epoll_open()?;
    let clock = match args.listen.timeout {
        Some(timeout) => start_clock(poll, timeout / TICKS)?,
        None => -1,
    };
    let edge = if args.edge {
        (libc::EPOLLET | libc::EPOLLRDHUP) as u32
    } else {
        0
    };
    let mut server = Epoll {
        poll,
        clock,
        listening,
        connections: Vec::new(),
        free: Vec::new(),
        buffer: vec![0u8; args.listen.buffer as usize].into_boxed_slice(),
        own: args.own,
        interest: libc::EPOLLIN as u32 | edge,
        edge: args.edge,
        spin: args.spin.map(Duration::from_micros),
        fanout: args.listen.fanout.map(Fanout::new),
        accepting: false,
        tick: 0,
    };
    server.listen(true)?;
    server.listening.announce()?;
    server.run()
}

/// Has a periodic timer report to the epoll set.
fn start_clock(poll: RawFd, period: Duration) -> io::Result<RawFd> {
    let flags = libc::TFD_NONBLOCK | libc::TFD_CLOEXEC;
    // SAFETY: plain system call.
    let clock = check(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) })?;
    let period = libc::timespec {
        tv_sec: period.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(period.subsec_nanos() as i32),
    };
    let setting = libc::itimerspec {
        it_interval: period,
        it_value: period,
    };
    // SAFETY: the setting is valid, and the old one is not asked for.
    check(unsafe { libc::timerfd_settime(clock, 0, &setting, std::ptr::null_mut()) })?;
    epoll_set(
        poll,
        libc::EPOLL_CTL_ADD,
        clock,
        libc::EPOLLIN as u32,
        CLOCK,
    )?;
    Ok(clock)
}

/// Asks again and again for so long, and only then sleeps.
pub(super) fn epoll_spin(
    poll: RawFd,
    events: &mut [libc::epoll_event; EVENTS],
    spin: Duration,
) -> io::Result<usize> {
    let start = Instant::now();
    loop {
        let count = epoll_wait(poll, events, 0)?;
        if count > 0 {
            return Ok(count);
        }
        if start.elapsed() >= spin {
            return epoll_wait(poll, events, -1);
        }
    }
}

impl Epoll {
    #[inline(never)]
    fn run(&mut self) -> io::Result<()> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        loop {
            let count = match self.spin {
                None => epoll_wait(self.poll, &mut events, -1)?,
                Some(spin) => epoll_spin(self.poll, &mut events, spin)?,
            };
            for event in &events[..count] {
                match event.u64 {
                    LISTENER => self.accept()?,
                    CLOCK => self.ticked()?,
                    index => self.ready(index as u32, event.events)?,
                }
            }
        }
    }

    /// Starts or stops watching for new connections.
    fn listen(&mut self, on: bool) -> io::Result<()> {
        if self.accepting == on {
            return Ok(());
        }
        self.accepting = on;
        let (operation, events) = if on {
            (libc::EPOLL_CTL_ADD, libc::EPOLLIN as u32)
        } else {
            (libc::EPOLL_CTL_DEL, 0)
        };
        epoll_set(self.poll, operation, self.listening.fd, events, LISTENER)
    }

    #[cold]
    fn accept(&mut self) -> io::Result<()> {
        loop {
            // SAFETY: the peer's address is not asked for.
            let fd = unsafe {
                libc::accept4(
                    self.listening.fd,
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                    libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
                )
            };
            if fd < 0 {
                let error = errno() as i32;
                return match error {
                    libc::EAGAIN => Ok(()),
                    _ if accept_again(error) => continue,
                    // Watching goes on when a connection closes.
                    _ if accept_exhausted(error) => self.listen(false),
                    _ => Err(io::Error::from_raw_os_error(error)),
                };
            }
            let bytes = if self.own { self.buffer.len() } else { 0 };
            let connection = EpollConn {
                fd,
                seen: self.tick,
                pending: Vec::new(),
                sent: 0,
                own: vec![0; bytes].into_boxed_slice(),
            };
            let index = put(&mut self.connections, &mut self.free, connection);
            self.watch(libc::EPOLL_CTL_ADD, index, self.interest)?;
        }
    }

    fn watch(&self, operation: i32, index: u32, events: u32) -> io::Result<()> {
        let fd = self.connections[index as usize].fd;
        epoll_set(self.poll, operation, fd, events, u64::from(index))
    }

    #[inline(always)]
    fn ready(&mut self, index: u32, events: u32) -> io::Result<()> {
        if !self.own {
            return self.echo(index, events);
        }
        self.change_buffer(index);
        let echoed = self.echo(index, events);
        self.change_buffer(index);
        echoed
    }

    fn change_buffer(&mut self, index: u32) {
        let own = &mut self.connections[index as usize].own;
        std::mem::swap(&mut self.buffer, own);
    }

    #[inline(always)]
    fn echo(&mut self, index: u32, events: u32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        if !connection.pending.is_empty() {
            return self.flush(index);
        }
        connection.seen = self.tick;
        let fd = connection.fd;
        // An edge is consumed only when nothing is left to receive: a short
        // receive shows that, except of the end that the event has announced.
        let ending = events & (libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) as u32 != 0;
        loop {
            let received = recv(fd, &mut self.buffer);
            if received <= 0 {
                return self.receive_failed(index, received);
            }
            let received = received as usize;
            if self.fanout.is_some() {
                return self.publish(index, received);
            }
            let sent = send(fd, &self.buffer[..received]);
            if sent != received as isize {
                return self.sent_short(index, received, sent);
            }
            if !self.edge || (received < self.buffer.len() && !ending) {
                return Ok(());
            }
        }
    }

    #[cold]
    fn receive_failed(&mut self, index: u32, result: isize) -> io::Result<()> {
        match -result as i32 {
            libc::EAGAIN => Ok(()),
            // Rearming brings the event again where it is edge-triggered.
            libc::EINTR => self.watch(libc::EPOLL_CTL_MOD, index, self.interest),
            _ => self.close(index),
        }
    }

    #[cold]
    fn sent_short(&mut self, index: u32, received: usize, sent: isize) -> io::Result<()> {
        let sent = match -sent as i32 {
            libc::EAGAIN | libc::EINTR => 0,
            _ if sent < 0 => return self.close(index),
            _ => sent as usize,
        };
        let connection = &mut self.connections[index as usize];
        connection
            .pending
            .extend_from_slice(&self.buffer[sent..received]);
        connection.sent = 0;
        let edge = self.interest & libc::EPOLLET as u32;
        self.watch(libc::EPOLL_CTL_MOD, index, libc::EPOLLOUT as u32 | edge)
    }

    /// Sends the messages that a receive completes to all connections but the publisher.
    fn publish(&mut self, index: u32, received: usize) -> io::Result<()> {
        let Some(mut fanout) = self.fanout.take() else {
            return Ok(());
        };
        if fanout.is_publisher(index) {
            let buffer = std::mem::take(&mut self.buffer);
            fanout.take(&buffer[..received], |message| {
                for other in 0..self.connections.len() as u32 {
                    if other != index && self.connections[other as usize].fd >= 0 {
                        self.pass_on(other, message)?;
                    }
                }
                Ok::<(), io::Error>(())
            })?;
            self.buffer = buffer;
        }
        self.fanout = Some(fanout);
        if self.edge {
            // Whatever an edge has announced is received, if need be with another event.
            self.watch(libc::EPOLL_CTL_MOD, index, self.interest)?;
        }
        Ok(())
    }

    /// Sends a message to a subscriber, what it has no room for later.
    #[inline(always)]
    fn pass_on(&mut self, index: u32, message: &[u8]) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        let waiting = !connection.pending.is_empty();
        let sent = if waiting {
            0
        } else {
            send(connection.fd, message)
        };
        if sent == message.len() as isize {
            return Ok(());
        }
        let sent = match -sent as i32 {
            libc::EAGAIN | libc::EINTR => 0,
            _ if sent < 0 => return self.close(index),
            _ => sent as usize,
        };
        connection.pending.extend_from_slice(&message[sent..]);
        if waiting {
            return Ok(());
        }
        connection.sent = 0;
        let edge = self.interest & libc::EPOLLET as u32;
        self.watch(libc::EPOLL_CTL_MOD, index, libc::EPOLLOUT as u32 | edge)
    }

    #[cold]
    fn flush(&mut self, index: u32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        // Edge-triggered, only EAGAIN brings another event.
        loop {
            let sent = send(connection.fd, &connection.pending[connection.sent..]);
            match -sent as i32 {
                libc::EAGAIN => return Ok(()),
                libc::EINTR => continue,
                _ if sent < 0 => return self.close(index),
                _ => connection.sent += sent as usize,
            }
            if connection.sent == connection.pending.len() {
                connection.pending.clear();
                connection.sent = 0;
                return self.watch(libc::EPOLL_CTL_MOD, index, self.interest);
            }
        }
    }

    #[cold]
    fn close(&mut self, index: u32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        close(std::mem::replace(&mut connection.fd, -1));
        connection.pending = Vec::new();
        self.free.push(index);
        self.listen(true)
    }

    #[cold]
    fn ticked(&mut self) -> io::Result<()> {
        let mut expirations = 0u64;
        // SAFETY: the count is valid for writes of its eight bytes.
        unsafe {
            libc::read(self.clock, (&raw mut expirations).cast(), 8);
        }
        self.tick = self.tick.wrapping_add(1);
        for index in 0..self.connections.len() {
            let connection = &self.connections[index];
            if connection.fd >= 0 && self.tick.wrapping_sub(connection.seen) > TICKS {
                // The end shows as an event, in its turn: another event for this
                // connection may be in the batch at hand.
                // SAFETY: plain system call on a descriptor the connection owns.
                unsafe {
                    libc::shutdown(connection.fd, libc::SHUT_RDWR);
                }
            }
        }
        Ok(())
    }
}
