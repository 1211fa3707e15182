//! Echo with io_uring as a source of readiness only: one multishot poll for each connection, and plain calls on one buffer for
//! all of them. Only what would block goes through the ring.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;

use clap::Args;
use io_uring::{cqueue, opcode, types};

use super::ring::{ACCEPT, KIND, RECV, Ring, RingArgs, SEND, SEND_FLAGS};
use super::{ListenArgs, Listening, accepts_again, cannot, put};
use crate::sys::{close, recv_now, send_now};

/// Options of this server.
#[derive(Args)]
pub struct PollArgs {
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    ring: RingArgs,
}

/// Completion of a POLL_REMOVE.
const REMOVE: u64 = 3;

struct Connection {
    fd: RawFd,
    /// A poll is in flight; it holds the file, so that the connection closes when it has ended.
    polling: bool,
    /// What a plain send left over: a SEND of it is in flight.
    pending: Vec<u8>,
    sent: usize,
    /// An event came while a SEND was in flight.
    ready: bool,
    ending: bool,
}

struct Server {
    ring: Ring,
    listening: Listening,
    connections: Vec<Connection>,
    free: Vec<u32>,
    buffer: Box<[u8]>,
    accepting: bool,
}

/// Serves until a signal ends the process.
pub fn serve(args: &PollArgs) -> io::Result<()> {
    args.listen.streams_only()?;
    if args.listen.timeout.is_some() {
        return Err(cannot("no timeout"));
    }
    let mut server = Server {
        ring: Ring::open(&args.ring)?,
        listening: Listening::open(&args.listen)?,
        connections: Vec::new(),
        free: Vec::new(),
        buffer: vec![0; args.listen.buffer as usize].into_boxed_slice(),
        accepting: false,
    };
    server.accept()?;
    server.listening.announce()?;
    server.run()
}

impl Server {
    #[inline(never)]
    fn run(&mut self) -> io::Result<()> {
        loop {
            self.ring.enter(1)?;
            while let Some(cqe) = self.ring.next() {
                let (kind, index) = (cqe.user_data & KIND, (cqe.user_data >> 2) as u32);
                if kind == RECV {
                    self.polled(index, cqe.result, cqe.flags)?;
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
        self.ring.accept(self.listening.fd, false)
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
        let connection = Connection {
            fd: result,
            polling: false,
            pending: Vec::new(),
            sent: 0,
            ready: false,
            ending: false,
        };
        let index = put(&mut self.connections, &mut self.free, connection);
        self.poll(index)?;
        if !more {
            self.accept()?;
        }
        Ok(())
    }

    fn poll(&mut self, index: u32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        connection.polling = true;
        let events = (libc::POLLIN | libc::POLLRDHUP) as u32;
        let entry = opcode::PollAdd::new(types::Fd(connection.fd), events)
            .multi(true)
            .build()
            .user_data(u64::from(index) << 2 | RECV);
        self.ring.push(entry)
    }

    #[inline(always)]
    fn polled(&mut self, index: u32, events: i32, flags: u32) -> io::Result<()> {
        if !cqueue::more(flags) {
            return self.poll_ended(index, events);
        }
        // The end may follow on what it was announced with, and brings no event of its own then.
        let ending = events & i32::from(libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0;
        self.receive(index, ending)
    }

    /// Receives and sends back until nothing is left: a short receive shows that, except of an end that was announced.
    #[inline(always)]
    fn receive(&mut self, index: u32, ending: bool) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        if !connection.pending.is_empty() || connection.ending {
            connection.ready = true;
            return Ok(());
        }
        let fd = connection.fd;
        loop {
            let received = recv_now(fd, &mut self.buffer);
            if received <= 0 {
                return self.receive_failed(index, received);
            }
            let received = received as usize;
            let sent = send_now(fd, &self.buffer[..received]);
            if sent != received as isize {
                return self.sent_short(index, received, sent);
            }
            if received < self.buffer.len() && !ending {
                return Ok(());
            }
        }
    }

    #[cold]
    fn receive_failed(&mut self, index: u32, result: isize) -> io::Result<()> {
        match -result as i32 {
            libc::EAGAIN => Ok(()),
            libc::EINTR => self.receive(index, true),
            _ => self.end(index),
        }
    }

    #[cold]
    fn sent_short(&mut self, index: u32, received: usize, sent: isize) -> io::Result<()> {
        let sent = match -sent as i32 {
            libc::EAGAIN | libc::EINTR => 0,
            _ if sent < 0 => return self.end(index),
            _ => sent as usize,
        };
        let connection = &mut self.connections[index as usize];
        connection
            .pending
            .extend_from_slice(&self.buffer[sent..received]);
        connection.sent = 0;
        // Whether the short send or the receive used up the event, there may be more to receive.
        connection.ready = true;
        self.send_rest(index)
    }

    #[cold]
    fn send_rest(&mut self, index: u32) -> io::Result<()> {
        let connection = &self.connections[index as usize];
        let rest = &connection.pending[connection.sent..];
        let entry = opcode::Send::new(types::Fd(connection.fd), rest.as_ptr(), rest.len() as u32)
            .flags(SEND_FLAGS)
            .build()
            .user_data(u64::from(index) << 2 | SEND);
        self.ring.push(entry)
    }

    #[cold]
    fn sent(&mut self, index: u32, result: i32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        if result < 0 && !matches!(-result, libc::EINTR | libc::EAGAIN) {
            connection.pending.clear();
            return self.end(index);
        }
        connection.sent += result.max(0) as usize;
        if connection.sent < connection.pending.len() {
            return self.send_rest(index);
        }
        connection.pending.clear();
        if connection.ending {
            return self.close_if_done(index);
        }
        if std::mem::take(&mut connection.ready) {
            return self.receive(index, true);
        }
        Ok(())
    }

    /// Has the poll end, after which the connection can close.
    #[cold]
    fn end(&mut self, index: u32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        if connection.ending {
            return self.close_if_done(index);
        }
        connection.ending = true;
        if connection.polling {
            let entry = opcode::PollRemove::new(u64::from(index) << 2 | RECV)
                .build()
                .flags(io_uring::squeue::Flags::SKIP_SUCCESS)
                .user_data(REMOVE);
            return self.ring.push(entry);
        }
        self.close_if_done(index)
    }

    #[cold]
    fn poll_ended(&mut self, index: u32, events: i32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        connection.polling = false;
        if connection.ending {
            return self.close_if_done(index);
        }
        if events < 0 && events != -libc::ECANCELED {
            return self.end(index);
        }
        // The kernel ends a multishot poll when the completion queue is full: whatever it had to say is asked for again.
        self.poll(index)?;
        self.receive(index, true)
    }

    #[cold]
    fn close_if_done(&mut self, index: u32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        if connection.polling || !connection.pending.is_empty() || connection.fd < 0 {
            return Ok(());
        }
        close(std::mem::replace(&mut connection.fd, -1));
        self.free.push(index);
        if !self.accepting {
            self.accept()?;
        }
        Ok(())
    }
}
