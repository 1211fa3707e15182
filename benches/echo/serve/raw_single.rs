//! Echo with io_uring: one RECV and then one SEND at a time per connection.
//!
//! What a connection does next is always exactly one operation (or one linked chain), so that a closed slot has nothing in
//! flight. Where a plain call does better than an operation, the options say when it takes its place.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use clap::Args;
use io_uring::squeue::Flags;
use io_uring::{cqueue, opcode, types};

use super::ring::{
    ACCEPT, DIRECT_FILES, KIND, RECV, RECVSEND_POLL_FIRST, Ring, RingArgs, SEND, SEND_FLAGS, TIMER,
    When,
};
use super::{ListenArgs, Listening, TICKS, accepts_again, cannot, positive_seconds};
use crate::sys::{close, send_now};

/// Options of this server.
#[derive(Args)]
pub struct SingleArgs {
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    ring: RingArgs,
    /// Submit each SEND linked to the RECV that follows it, without a completion of its own.
    #[arg(long)]
    linked: bool,
    /// When RECV waits for readiness at once, as it mostly has to in the end.
    #[arg(long, value_enum, default_value_t = When::Lone)]
    poll_first: When,
    /// When to try send(2) before a SEND through the ring, which long ones do unless it is never.
    #[arg(long, value_enum, default_value_t = When::Lone)]
    plain_send: When,
    /// A timeout on every receive and send, kept in a coarse list that the ring's wait is limited by, rather than in timers of
    /// the kernel's.
    #[arg(long, value_name = "SECONDS", value_parser = positive_seconds, conflicts_with = "timeout")]
    wheel: Option<Duration>,
    /// Use descriptors of the ring's own.
    #[arg(long)]
    direct: bool,
}

// How operations are timed, fixed when compiled to cost nothing where there is no timeout.
const UNTIMED: u8 = 0;
const TIMERS: u8 = 1;
const WHEEL: u8 = 2;

/// User data of what needs no answer.
const OTHER: u64 = TIMER;

struct Connection {
    buffer: *mut u8,
    fd: RawFd,
    /// How many bytes the buffer holds, and how many of them have been sent.
    length: u32,
    sent: u32,
    /// The tick of the last receive or send.
    seen: u32,
}

/// A fan-out: the publisher, and how many SENDs of its message are in flight.
struct Publishing {
    publisher: Option<u32>,
    unsent: u32,
}

/// What the options choose is fixed when compiled, to cost nothing per echo.
struct Server<const LINKED: bool, const TIMING: u8, const FANOUT: bool> {
    ring: Ring,
    listening: Listening,
    connections: Vec<Connection>,
    free: Vec<u32>,
    size: u32,
    poll_first: When,
    plain_send: When,
    /// What the two come to now: the flags of a RECV, and from which length on a SEND is tried as a plain call first.
    recv_ioprio: u16,
    plain_from: i32,
    accepting: bool,
    direct: bool,
    fd_flags: Flags,
    fanout: Option<Publishing>,
    timeout: &'static types::Timespec,
    /// The wheel: how long a tick is, when the next one is due, and how many have been.
    tick_ns: u64,
    next_tick: u64,
    tick: u32,
}

/// Serves until a signal ends the process.
pub fn serve(args: &SingleArgs) -> io::Result<()> {
    if args.listen.udp.is_some() {
        return Err(cannot(
            "receives that wait on one socket all wake for every datagram; raw-multi has one",
        ));
    }
    if args.direct && args.plain_send == When::Always {
        return Err(cannot("a descriptor of the ring's own has no plain calls"));
    }
    let timing = match (args.listen.timeout, args.wheel) {
        (Some(_), _) => TIMERS,
        (None, Some(_)) => WHEEL,
        (None, None) => UNTIMED,
    };
    match (args.linked, timing, args.listen.fanout.is_some()) {
        (false, UNTIMED, true) => Server::<false, UNTIMED, true>::serve(args),
        (_, _, true) => Err(cannot("a fan-out with --linked, --timeout or --wheel")),
        (false, UNTIMED, false) => Server::<false, UNTIMED, false>::serve(args),
        (false, TIMERS, false) => Server::<false, TIMERS, false>::serve(args),
        (false, _, false) => Server::<false, WHEEL, false>::serve(args),
        (true, UNTIMED, false) => Server::<true, UNTIMED, false>::serve(args),
        (true, TIMERS, false) => Err(cannot("a linked SEND has no timer of its own")),
        (true, _, false) => Server::<true, WHEEL, false>::serve(args),
    }
}

/// Monotonic nanoseconds, to a few milliseconds, for next to nothing.
fn coarse_now() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the timespec is valid for writes.
    unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &mut time);
    }
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

impl<const LINKED: bool, const TIMING: u8, const FANOUT: bool> Server<LINKED, TIMING, FANOUT> {
    fn serve(args: &SingleArgs) -> io::Result<()> {
        let listening = Listening::open(&args.listen)?;
        let ring = Ring::open(&args.ring)?;
        if args.direct {
            ring.table(DIRECT_FILES)?;
        }
        let timeout = types::Timespec::from(args.listen.timeout.unwrap_or_default());
        let tick_ns = (args.wheel.unwrap_or_default() / TICKS).as_nanos() as u64;
        let mut server = Self {
            ring,
            listening,
            connections: Vec::new(),
            free: Vec::new(),
            // Each receive of a fan-out waits for one whole message.
            size: args.listen.fanout.unwrap_or(args.listen.buffer),
            poll_first: args.poll_first,
            plain_send: if args.direct {
                When::Never
            } else {
                args.plain_send
            },
            recv_ioprio: 0,
            plain_from: i32::MAX,
            accepting: false,
            direct: args.direct,
            fd_flags: if args.direct {
                Flags::FIXED_FILE
            } else {
                Flags::empty()
            },
            fanout: args.listen.fanout.map(|_| Publishing {
                publisher: None,
                unsent: 0,
            }),
            timeout: Box::leak(Box::new(timeout)),
            tick_ns,
            next_tick: coarse_now() + tick_ns,
            tick: 0,
        };
        server.accept()?;
        server.listening.announce()?;
        server.run()
    }

    #[inline(never)]
    fn run(&mut self) -> io::Result<()> {
        loop {
            if TIMING == WHEEL {
                let now = coarse_now();
                if now >= self.next_tick {
                    self.ticked(now)?;
                }
                self.ring.enter_for(1, self.next_tick.saturating_sub(now))?;
            } else {
                self.ring.enter(1)?;
            }
            let ready = self.ring.ready();
            self.plain_from = self.plain_send.plain_from(ready);
            self.recv_ioprio = if self.poll_first.applies(ready) {
                RECVSEND_POLL_FIRST
            } else {
                0
            };
            while let Some(cqe) = self.ring.next() {
                let (kind, index) = (cqe.user_data & KIND, (cqe.user_data >> 2) as u32);
                if kind == RECV {
                    self.received(index, cqe.result, cqe.flags)?;
                } else if kind == SEND {
                    self.sent(index, cqe.result)?;
                } else if kind == ACCEPT {
                    self.accepted(cqe.result, cqueue::more(cqe.flags))?;
                }
            }
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        self.accepting = true;
        self.ring.accept(self.listening.fd, self.direct)
    }

    #[cold]
    fn accepted(&mut self, result: i32, more: bool) -> io::Result<()> {
        self.accepting = more;
        if result < 0 {
            return match accepts_again(-result, more)? {
                true => self.accept(),
                false => Ok(()), // accepting goes on when a connection closes
            };
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let buffer = vec![0u8; self.size as usize].into_boxed_slice();
                self.connections.push(Connection {
                    buffer: Box::leak(buffer).as_mut_ptr(),
                    fd: -1,
                    length: 0,
                    sent: 0,
                    seen: 0,
                });
                self.connections.len() as u32 - 1
            }
        };
        self.connections[index as usize].fd = result;
        self.receive_again(index)?;
        if !more {
            self.accept()?;
        }
        Ok(())
    }

    /// Queues a RECV, for which there is room if it is part of a chain.
    #[inline(always)]
    fn receive(&mut self, index: u32, fd: RawFd, buffer: *mut u8, ioprio: u16) -> io::Result<()> {
        if TIMING == WHEEL {
            self.connections[index as usize].seen = self.tick;
        }
        let entry = opcode::Recv::new(types::Fd(fd), buffer, self.size)
            .ioprio(ioprio)
            .flags(if FANOUT { libc::MSG_WAITALL } else { 0 })
            .build()
            .flags(self.fd_flags)
            .user_data(u64::from(index) << 2 | RECV);
        if TIMING != TIMERS {
            return self.ring.push(entry);
        }
        self.room_for(2)?;
        self.ring.push(entry.flags(Flags::IO_LINK))?;
        self.timer()
    }

    /// Queues the timer of the operation queued last.
    #[inline(always)]
    fn timer(&mut self) -> io::Result<()> {
        let timer = opcode::LinkTimeout::new(self.timeout)
            .build()
            .flags(Flags::SKIP_SUCCESS)
            .user_data(OTHER);
        self.ring.push(timer)
    }

    #[cold]
    fn receive_again(&mut self, index: u32) -> io::Result<()> {
        self.room_for(2)?;
        let connection = &self.connections[index as usize];
        self.receive(index, connection.fd, connection.buffer, 0)
    }

    #[inline(always)]
    fn room_for(&mut self, count: u32) -> io::Result<()> {
        if self.ring.room() < count {
            self.ring.make_room(count)?;
        }
        Ok(())
    }

    #[inline(always)]
    fn received(&mut self, index: u32, result: i32, flags: u32) -> io::Result<()> {
        if result <= 0 {
            return self.receive_failed(index, result);
        }
        if FANOUT {
            return self.publish(index, result);
        }
        let connection = &mut self.connections[index as usize];
        let (fd, buffer) = (connection.fd, connection.buffer);
        connection.length = result as u32;
        connection.sent = 0;
        if result >= self.plain_from {
            // SAFETY: the kernel has filled so many bytes of the buffer, and has given it up.
            let bytes = unsafe { std::slice::from_raw_parts(buffer, result as usize) };
            let sent = send_now(fd, bytes);
            if sent == result as isize {
                return self.receive(index, fd, buffer, self.recv_ioprio);
            }
            if sent > 0 {
                return self.sent_short(index, sent as i32);
            }
        }
        self.send(index, fd, buffer, buffer, result as u32, flags)
    }

    #[cold]
    fn receive_failed(&mut self, index: u32, result: i32) -> io::Result<()> {
        if matches!(-result, libc::EINTR | libc::EAGAIN) {
            self.receive_again(index)
        } else {
            // The end of the stream, the timeout (ECANCELED) or an error.
            self.close(index)
        }
    }

    /// Queues a SEND of what the buffer holds from `start` on, and in linked mode the RECV thereafter; `flags` are those of the
    /// last RECV's completion.
    #[inline(always)]
    fn send(
        &mut self,
        index: u32,
        fd: RawFd,
        buffer: *mut u8,
        start: *const u8,
        length: u32,
        flags: u32,
    ) -> io::Result<()> {
        if TIMING == WHEEL {
            self.connections[index as usize].seen = self.tick;
        }
        let entry = opcode::Send::new(types::Fd(fd), start, length)
            .flags(SEND_FLAGS)
            .build()
            .flags(self.fd_flags)
            .user_data(u64::from(index) << 2 | SEND);
        if !LINKED && TIMING == TIMERS {
            self.room_for(2)?;
            self.ring.push(entry.flags(Flags::IO_LINK))?;
            return self.timer();
        }
        if !LINKED {
            return self.ring.push(entry);
        }
        self.room_for(3)?;
        // A SEND that fails or falls short breaks the chain and only then completes visibly; the RECV behind it is then
        // cancelled silently.
        self.ring
            .push(entry.flags(Flags::IO_LINK | Flags::SKIP_SUCCESS))?;
        let ioprio = if cqueue::sock_nonempty(flags) {
            0
        } else {
            self.recv_ioprio
        };
        self.receive(index, fd, buffer, ioprio)
    }

    #[inline(always)]
    fn sent(&mut self, index: u32, result: i32) -> io::Result<()> {
        if FANOUT {
            return self.passed_on();
        }
        let connection = &self.connections[index as usize];
        if LINKED || result as u32 != connection.length - connection.sent {
            return self.sent_short(index, result);
        }
        let (fd, buffer) = (connection.fd, connection.buffer);
        self.receive(index, fd, buffer, self.recv_ioprio)
    }

    #[cold]
    fn sent_short(&mut self, index: u32, result: i32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        if result > 0 {
            connection.sent += result as u32;
            if connection.sent == connection.length {
                return self.receive_again(index);
            }
        } else if !matches!(-result, libc::EINTR | libc::EAGAIN) {
            return self.close(index);
        }
        self.send_rest(index)
    }

    #[cold]
    fn send_rest(&mut self, index: u32) -> io::Result<()> {
        let connection = &self.connections[index as usize];
        let (fd, buffer) = (connection.fd, connection.buffer);
        let length = connection.length - connection.sent;
        // SAFETY: `sent` never exceeds the length of what the buffer holds.
        let start = unsafe { buffer.add(connection.sent as usize) };
        self.send(index, fd, buffer, start, length, 0)
    }

    /// Sends the publisher's message to all others; its next receive waits for that.
    fn publish(&mut self, index: u32, length: i32) -> io::Result<()> {
        let Some(publishing) = &mut self.fanout else {
            return Ok(());
        };
        if *publishing.publisher.get_or_insert(index) != index {
            return self.receive_again(index);
        }
        let message: *const u8 = self.connections[index as usize].buffer;
        for other in 0..self.connections.len() as u32 {
            let fd = self.connections[other as usize].fd;
            if other == index || fd < 0 {
                continue;
            }
            let entry = opcode::Send::new(types::Fd(fd), message, length as u32)
                .flags(SEND_FLAGS)
                .build()
                .flags(self.fd_flags)
                .user_data(u64::from(other) << 2 | SEND);
            self.ring.push(entry)?;
            if let Some(publishing) = &mut self.fanout {
                publishing.unsent += 1;
            }
        }
        Ok(())
    }

    /// One of the SENDs of a message has completed; a subscriber that cannot be sent to is reported by its RECV.
    #[inline(always)]
    fn passed_on(&mut self) -> io::Result<()> {
        if let Some(publishing) = &mut self.fanout {
            publishing.unsent -= 1;
            if let (0, Some(publisher)) = (publishing.unsent, publishing.publisher) {
                return self.receive_again(publisher);
            }
        }
        Ok(())
    }

    #[cold]
    fn close(&mut self, index: u32) -> io::Result<()> {
        let fd = std::mem::replace(&mut self.connections[index as usize].fd, -1);
        if self.direct {
            let entry = opcode::Close::new(types::Fixed(fd as u32))
                .build()
                .flags(Flags::SKIP_SUCCESS)
                .user_data(OTHER);
            self.ring.push(entry)?;
        } else {
            close(fd);
        }
        self.free.push(index);
        if !self.accepting {
            self.accept()?;
        }
        Ok(())
    }

    /// Ends what the wheel finds too old: its operation fails, and with that it closes.
    #[cold]
    fn ticked(&mut self, now: u64) -> io::Result<()> {
        self.next_tick = now + self.tick_ns;
        self.tick = self.tick.wrapping_add(1);
        for index in 0..self.connections.len() {
            let connection = &self.connections[index];
            if connection.fd >= 0 && self.tick.wrapping_sub(connection.seen) > TICKS {
                let entry = opcode::Shutdown::new(types::Fd(connection.fd), libc::SHUT_RDWR)
                    .build()
                    .flags(self.fd_flags | Flags::SKIP_SUCCESS)
                    .user_data(OTHER);
                self.ring.push(entry)?;
            }
        }
        Ok(())
    }
}
