//! Echo with io_uring: one RECV and then one SEND at a time per connection.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;

use clap::Args;
use io_uring::{cqueue, opcode, squeue, types};

use super::ring::{
    ACCEPT, KIND, RECV, RECVSEND_POLL_FIRST, Ring, RingArgs, SEND, SEND_FLAGS, TIMER,
};
use super::{ListenArgs, Listening, accept_again, accept_exhausted};
use crate::sys::close;

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
    /// Have RECV wait for readiness first, as it mostly has to in the end.
    #[arg(long)]
    poll_first: bool,
}

struct SingleConn {
    buffer: *mut u8,
    fd: RawFd,
    /// How many bytes the buffer holds, and how many of them have been sent.
    length: u32,
    sent: u32,
}

/// What the options choose is fixed when compiled, to cost nothing per echo.
struct Single<const LINKED: bool, const TIMED: bool> {
    ring: Ring,
    listening: Listening,
    connections: Vec<SingleConn>,
    free: Vec<u32>,
    accepting: bool,
    size: u32,
    recv_ioprio: u16,
    timeout: &'static types::Timespec,
}

pub fn serve(args: &SingleArgs) -> io::Result<()> {
    match (args.linked, args.listen.timeout.is_some()) {
        (false, false) => Single::<false, false>::serve(args),
        (false, true) => Single::<false, true>::serve(args),
        (true, false) => Single::<true, false>::serve(args),
        (true, true) => Single::<true, true>::serve(args),
    }
}

/// The single-shot server: what each connection does next is always exactly
/// one operation (or one linked chain), so a closed slot has nothing in flight.
impl<const LINKED: bool, const TIMED: bool> Single<LINKED, TIMED> {
    fn serve(args: &SingleArgs) -> io::Result<()> {
        let listening = Listening::open(&args.listen)?;
        let ring = Ring::open(&args.ring)?;
        let timeout = types::Timespec::from(args.listen.timeout.unwrap_or_default());
        let mut server = Self {
            ring,
            listening,
            connections: Vec::new(),
            free: Vec::new(),
            accepting: false,
            size: args.listen.buffer,
            recv_ioprio: if args.poll_first {
                RECVSEND_POLL_FIRST
            } else {
                0
            },
            timeout: Box::leak(Box::new(timeout)),
        };
        server.accept()?;
        server.listening.announce()?;
        server.run()
    }

    #[inline(never)]
    fn run(&mut self) -> io::Result<()> {
        loop {
            self.ring.enter(1)?;
            while let Some(cqe) = self.ring.next() {
                let (kind, index) = (cqe.user_data & KIND, (cqe.user_data >> 2) as u32);
                if kind == RECV {
                    self.received(index, cqe.result, cqe.flags)?;
                } else if kind == SEND {
                    self.sent(index, cqe.result)?;
                } else if kind == ACCEPT {
                    self.accepted(cqe.result)?;
                }
            }
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        self.accepting = true;
        let fd = types::Fd(self.listening.fd);
        let entry = opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut())
            .flags(libc::SOCK_CLOEXEC)
            .build()
            .user_data(ACCEPT);
        self.ring.push(entry)
    }

    #[cold]
    fn accepted(&mut self, result: i32) -> io::Result<()> {
        if result < 0 {
            self.accepting = false;
            return if accept_again(-result) {
                self.accept()
            } else if accept_exhausted(-result) {
                Ok(()) // accepting goes on when a connection closes
            } else {
                Err(io::Error::from_raw_os_error(-result))
            };
        }
        self.listening.prepare(result);
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let buffer = vec![0u8; self.size as usize].into_boxed_slice();
                self.connections.push(SingleConn {
                    buffer: Box::leak(buffer).as_mut_ptr(),
                    fd: -1,
                    length: 0,
                    sent: 0,
                });
                self.connections.len() as u32 - 1
            }
        };
        self.connections[index as usize].fd = result;
        self.receive_again(index)?;
        self.accept()
    }

    /// Queues a RECV, for which there is room if it is part of a chain.
    #[inline(always)]
    fn receive(&mut self, index: u32, fd: RawFd, buffer: *mut u8, ioprio: u16) -> io::Result<()> {
        if TIMED && !LINKED {
            self.room_for(2)?;
        }
        let entry = opcode::Recv::new(types::Fd(fd), buffer, self.size)
            .ioprio(ioprio)
            .build()
            .user_data(u64::from(index) << 2 | RECV);
        if !TIMED {
            return self.ring.push(entry);
        }
        self.ring.push(entry.flags(squeue::Flags::IO_LINK))?;
        let timer = opcode::LinkTimeout::new(self.timeout)
            .build()
            .flags(squeue::Flags::SKIP_SUCCESS)
            .user_data(TIMER);
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
        let connection = &mut self.connections[index as usize];
        let (fd, buffer) = (connection.fd, connection.buffer);
        connection.length = result as u32;
        connection.sent = 0;
        let start: *const u8 = buffer;
        self.send(index, fd, buffer, start, result as u32, flags)
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

    /// Queues a SEND of what the buffer holds from `start` on, and in linked
    /// mode the RECV thereafter; `flags` are those of the last RECV's completion.
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
        if LINKED {
            self.room_for(3)?;
        }
        let entry = opcode::Send::new(types::Fd(fd), start, length)
            .flags(SEND_FLAGS)
            .build()
            .user_data(u64::from(index) << 2 | SEND);
        if !LINKED {
            return self.ring.push(entry);
        }
        // A SEND that fails or falls short breaks the chain and only then
        // completes visibly; the RECV behind it is then cancelled silently.
        let chained = squeue::Flags::IO_LINK | squeue::Flags::SKIP_SUCCESS;
        self.ring.push(entry.flags(chained))?;
        let ioprio = if cqueue::sock_nonempty(flags) {
            0
        } else {
            self.recv_ioprio
        };
        self.receive(index, fd, buffer, ioprio)
    }

    #[inline(always)]
    fn sent(&mut self, index: u32, result: i32) -> io::Result<()> {
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
        let (fd, buffer) = (connection.fd, connection.buffer);
        let length = connection.length - connection.sent;
        // SAFETY: `sent` never exceeds the length of what the buffer holds.
        let start = unsafe { buffer.add(connection.sent as usize) };
        self.send(index, fd, buffer, start, length, 0)
    }

    #[cold]
    fn close(&mut self, index: u32) -> io::Result<()> {
        close(std::mem::replace(
            &mut self.connections[index as usize].fd,
            -1,
        ));
        self.free.push(index);
        if !self.accepting {
            self.accept()?;
        }
        Ok(())
    }
}
