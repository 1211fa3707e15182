//! Echo with io_uring: a multishot RECV per connection into a provided buffer ring.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;

use clap::Args;
use io_uring::squeue::Flags;
use io_uring::{cqueue, opcode, types};

use super::buffers::{Buffers, GROUP};
use super::ring::{
    ACCEPT, DIRECT_FILES, KIND, RECV, Ring, RingArgs, SEND, SEND_FLAGS, TIMER, When,
};
use super::{ListenArgs, Listening, TICKS, accepts_again, cannot, put, raw_udp};
use crate::sys::{close, send_now};

/// Options of this server.
#[derive(Args)]
pub struct MultiArgs {
    #[command(flatten)]
    pub(super) listen: ListenArgs,
    #[command(flatten)]
    pub(super) ring: RingArgs,
    /// Buffers in the provided buffer ring, a power of two.
    #[arg(long, default_value_t = 1024, value_parser = buffer_count)]
    pub(super) buffers: u16,
    /// When to try send(2) before a SEND through the ring, which long ones do unless it is never.
    #[arg(long, value_enum, default_value_t = When::Lone)]
    plain_send: When,
    /// Use descriptors of the ring's own.
    #[arg(long)]
    direct: bool,
}

fn buffer_count(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(count) if count.is_power_of_two() && count <= 1 << 15 => Ok(count),
        _ => Err("must be a power of two up to 32768".to_owned()),
    }
}

/// User data of what needs no answer: of the timer's kind, with an index.
const OTHER: u64 = 1 << 2 | TIMER;
/// The end of a list of buffers.
const NO_BUFFER: u16 = u16::MAX;

/// What a buffer holds, and which one is to be sent after it.
#[derive(Clone, Copy)]
struct Held {
    length: u32,
    next: u16,
}

struct MultiConn {
    fd: RawFd,
    /// How much of the first buffer has been sent.
    sent: u32,
    /// The tick of the last receive.
    seen: u32,
    /// Buffers to send, in order; a SEND of the first one is always in flight.
    first: u16,
    last: u16,
    /// A multishot RECV is in flight.
    receiving: bool,
    /// Listed as waiting for a buffer.
    starved: bool,
    /// Nothing more is received, and the connection closes when all is sent.
    ending: bool,
}

struct Multi {
    ring: Ring,
    listening: Listening,
    buffers: Buffers,
    held: Box<[Held]>,
    connections: Vec<MultiConn>,
    free: Vec<u32>,
    starved: VecDeque<u32>,
    accepting: bool,
    tick: u32,
    timer: Option<&'static types::Timespec>,
    plain_send: When,
    /// From which length on a SEND is tried as a plain call first.
    plain_from: i32,
    direct: bool,
    fd_flags: Flags,
}

/// The multishot server. SENDs of one connection follow one another, since two
/// in flight could be reordered; the buffers waiting form a list per connection.
pub fn serve(args: &MultiArgs) -> io::Result<()> {
    if args.listen.udp.is_some() {
        return raw_udp::serve(args);
    }
    args.listen.streams_only()?;
    if args.direct && args.plain_send == When::Always {
        return Err(cannot("a descriptor of the ring's own has no plain calls"));
    }
    let listening = Listening::open(&args.listen)?;
    let ring = Ring::open(&args.ring)?;
    if args.direct {
        ring.table(DIRECT_FILES)?;
    }
    let buffers = Buffers::new(args.buffers, args.listen.buffer, ring.fd)?;
    let mut server = Multi {
        ring,
        listening,
        buffers,
        held: vec![
            Held {
                length: 0,
                next: NO_BUFFER
            };
            usize::from(args.buffers)
        ]
        .into_boxed_slice(),
        connections: Vec::new(),
        free: Vec::new(),
        starved: VecDeque::new(),
        accepting: false,
        tick: 0,
        timer: args
            .listen
            .timeout
            .map(|timeout| &*Box::leak(Box::new(types::Timespec::from(timeout / TICKS)))),
        plain_send: if args.direct {
            When::Never
        } else {
            args.plain_send
        },
        plain_from: i32::MAX,
        direct: args.direct,
        fd_flags: if args.direct {
            Flags::FIXED_FILE
        } else {
            Flags::empty()
        },
    };
    server.accept()?;
    server.start_timer()?;
    server.listening.announce()?;
    server.run()
}

impl Multi {
    #[inline(never)]
    fn run(&mut self) -> io::Result<()> {
        let mut want = 1;
        loop {
            self.ring.enter(want)?;
            want = 1;
            self.plain_from = self.plain_send.plain_from(self.ring.ready());
            while let Some(cqe) = self.ring.next() {
                let (kind, index) = (cqe.user_data & KIND, (cqe.user_data >> 2) as u32);
                if kind == RECV {
                    self.received(index, cqe.result, cqe.flags)?;
                } else if kind == SEND {
                    self.sent(index, cqe.result)?;
                } else if kind == ACCEPT {
                    self.accepted(cqe.result, cqueue::more(cqe.flags))?;
                } else if cqe.user_data == TIMER {
                    self.ticked()?;
                }
            }
            self.buffers.publish();
            if !self.starved.is_empty() && self.buffers.available() > 0 {
                want = self.feed()?;
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
        let connection = MultiConn {
            fd: result,
            sent: 0,
            seen: self.tick,
            first: NO_BUFFER,
            last: NO_BUFFER,
            receiving: false,
            starved: false,
            ending: false,
        };
        let index = put(&mut self.connections, &mut self.free, connection);
        self.receive(index)?;
        if !more {
            self.accept()?;
        }
        Ok(())
    }

    fn receive(&mut self, index: u32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        connection.receiving = true;
        let entry = opcode::RecvMulti::new(types::Fd(connection.fd), GROUP)
            .build()
            .flags(self.fd_flags)
            .user_data(u64::from(index) << 2 | RECV);
        self.ring.push(entry)
    }

    #[inline(always)]
    fn received(&mut self, index: u32, result: i32, flags: u32) -> io::Result<()> {
        let (Some(id), true) = (cqueue::buffer_select(flags), result > 0) else {
            return self.receive_failed(index, result, flags);
        };
        let connection = &mut self.connections[index as usize];
        connection.seen = self.tick;
        self.buffers.taken();
        let mut already = 0;
        if result >= self.plain_from && connection.first == NO_BUFFER {
            // SAFETY: the kernel has filled so many bytes of this buffer, and has given it up.
            let bytes =
                unsafe { std::slice::from_raw_parts(self.buffers.address(id), result as usize) };
            let sent = send_now(connection.fd, bytes);
            if sent == result as isize {
                self.buffers.give_back(id);
                return if cqueue::more(flags) {
                    Ok(())
                } else {
                    self.receive_ended(index)
                };
            }
            // What failed fails again through the ring, or waits there.
            already = sent.max(0) as u32;
        }
        let held = &mut self.held[usize::from(id)];
        held.length = result as u32;
        held.next = NO_BUFFER;
        let idle = connection.first == NO_BUFFER;
        if idle {
            connection.first = id;
            connection.last = id;
            connection.sent = already;
        } else {
            self.held[usize::from(connection.last)].next = id;
            connection.last = id;
        }
        let more = cqueue::more(flags);
        if idle {
            let fd = connection.fd;
            self.send(index, fd, id, already, result as u32)?;
        }
        if more {
            Ok(())
        } else {
            self.receive_ended(index)
        }
    }

    /// A multishot RECV ended after a receive that succeeded: start another.
    #[cold]
    fn receive_ended(&mut self, index: u32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        connection.receiving = false;
        if connection.ending {
            return self.close_if_done(index);
        }
        self.receive(index)
    }

    #[cold]
    fn receive_failed(&mut self, index: u32, result: i32, flags: u32) -> io::Result<()> {
        if let Some(id) = cqueue::buffer_select(flags) {
            self.buffers.taken();
            self.buffers.give_back(id);
        }
        if cqueue::more(flags) {
            return Ok(());
        }
        let connection = &mut self.connections[index as usize];
        connection.receiving = false;
        match -result {
            _ if connection.ending => {}
            libc::ENOBUFS => {
                self.buffers.ran_out();
                connection.starved = true;
                self.starved.push_back(index);
                return Ok(());
            }
            libc::EINTR | libc::EAGAIN => return self.receive(index),
            _ => connection.ending = true,
        }
        self.close_if_done(index)
    }

    /// Receives again on connections that found no buffer, one for each that is
    /// back. A connection takes a buffer only if its data is there, so those
    /// left over must be tried without waiting; returns how much to wait for.
    #[cold]
    fn feed(&mut self) -> io::Result<u32> {
        for _ in 0..self.buffers.available() {
            let Some(index) = self.starved.pop_front() else {
                break;
            };
            let connection = &mut self.connections[index as usize];
            connection.starved = false;
            if connection.ending {
                self.close_if_done(index)?;
            } else {
                self.receive(index)?;
            }
        }
        Ok(u32::from(self.starved.is_empty()))
    }

    /// Queues a SEND of a buffer's bytes from `sent` to `length`.
    #[inline(always)]
    fn send(&mut self, index: u32, fd: RawFd, id: u16, sent: u32, length: u32) -> io::Result<()> {
        // SAFETY: `sent` never exceeds the length of what the buffer holds.
        let start = unsafe { self.buffers.address(id).add(sent as usize) };
        let entry = opcode::Send::new(types::Fd(fd), start, length - sent)
            .flags(SEND_FLAGS)
            .build()
            .flags(self.fd_flags)
            .user_data(u64::from(index) << 2 | SEND);
        self.ring.push(entry)
    }

    #[inline(always)]
    fn sent(&mut self, index: u32, result: i32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        let id = connection.first;
        let Held { length, next } = self.held[usize::from(id)];
        if result as u32 != length - connection.sent {
            return self.sent_short(index, result);
        }
        connection.first = next;
        connection.sent = 0;
        let (fd, ending) = (connection.fd, connection.ending);
        self.buffers.give_back(id);
        if next != NO_BUFFER {
            let length = self.held[usize::from(next)].length;
            self.send(index, fd, next, 0, length)
        } else if ending {
            self.close_if_done(index)
        } else {
            Ok(())
        }
    }

    #[cold]
    fn sent_short(&mut self, index: u32, result: i32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        if result > 0 || matches!(-result, libc::EINTR | libc::EAGAIN) {
            connection.sent += result.max(0) as u32;
            let (fd, id, sent) = (connection.fd, connection.first, connection.sent);
            let length = self.held[usize::from(id)].length;
            return self.send(index, fd, id, sent, length);
        }
        while connection.first != NO_BUFFER {
            let id = connection.first;
            connection.first = self.held[usize::from(id)].next;
            self.buffers.give_back(id);
        }
        self.end(index)?;
        self.close_if_done(index)
    }

    /// Makes the operations in flight on a connection come to their end.
    #[cold]
    fn end(&mut self, index: u32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        connection.ending = true;
        let entry = opcode::Shutdown::new(types::Fd(connection.fd), libc::SHUT_RDWR)
            .build()
            .flags(self.fd_flags | Flags::SKIP_SUCCESS)
            .user_data(OTHER);
        self.ring.push(entry)
    }

    #[cold]
    fn close_if_done(&mut self, index: u32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        let done = connection.ending
            && !connection.receiving
            && !connection.starved
            && connection.first == NO_BUFFER;
        if done && connection.fd >= 0 {
            let fd = std::mem::replace(&mut connection.fd, -1);
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
        }
        Ok(())
    }

    fn start_timer(&mut self) -> io::Result<()> {
        let Some(period) = self.timer else {
            return Ok(());
        };
        let entry = opcode::Timeout::new(period).build().user_data(TIMER);
        self.ring.push(entry)
    }

    #[cold]
    fn ticked(&mut self) -> io::Result<()> {
        self.tick = self.tick.wrapping_add(1);
        for index in 0..self.connections.len() {
            let connection = &self.connections[index];
            if connection.fd >= 0
                && !connection.ending
                && self.tick.wrapping_sub(connection.seen) > TICKS
            {
                self.end(index as u32)?;
                self.close_if_done(index as u32)?;
            }
        }
        self.start_timer()
    }
}
