//! One connection of a load: what it still has to send, and the check of what it receives.

use std::io;
use std::os::fd::RawFd;

use super::{Pattern, Target};
use crate::sys::{epoll_set, other, recv, send};

/// The most that is sent or received with one call.
pub const CHUNK: usize = 256 * 1024;

/// What the connections of a load have in common.
pub struct Common {
    pub poll: RawFd,
    pub pattern: Pattern,
    pub buffer: Box<[u8]>,
    pub size: usize,
}

impl Common {
    /// For messages of `size` bytes, `depth` of which are in flight on a connection.
    pub fn new(size: u32, depth: u32) -> io::Result<Self> {
        let size = size as usize;
        let chunk = (size * depth as usize).clamp(4096, CHUNK);
        Ok(Self {
            poll: crate::sys::epoll_open()?,
            pattern: Pattern::new(size, chunk),
            buffer: vec![0; chunk].into_boxed_slice(),
            size,
        })
    }
}

/// A connection, in an epoll set under its number.
pub struct Stream {
    pub fd: RawFd,
    index: usize,
    /// Where in the pattern the next byte to send and to receive are.
    send_at: usize,
    receive_at: usize,
    /// Bytes allowed out and not sent yet.
    pub unsent: usize,
    /// Messages issued and not echoed yet, and bytes received of the first.
    pub flying: u32,
    partial: usize,
    /// The connection waits for room to send.
    waiting: bool,
}

impl Stream {
    /// Connects; the stream of bytes is that of the connection `stream`, which need not be this one.
    pub fn open(common: &Common, target: &Target, index: usize, stream: usize) -> io::Result<Self> {
        let fd = target.open()?;
        epoll_set(
            common.poll,
            libc::EPOLL_CTL_ADD,
            fd,
            libc::EPOLLIN as u32,
            index as u64,
        )?;
        let start = common.pattern.start(stream);
        Ok(Self {
            fd,
            index,
            send_at: start,
            receive_at: start,
            unsent: 0,
            flying: 0,
            partial: 0,
            waiting: false,
        })
    }

    /// Lets so many more messages out, and sends what it can.
    #[inline(always)]
    pub fn issue(&mut self, common: &Common, count: u32) -> io::Result<()> {
        self.flying += count;
        self.unsent += common.size * count as usize;
        if self.waiting {
            Ok(())
        } else {
            self.flush(common)
        }
    }

    /// Sends what it can of what is allowed out.
    #[inline(always)]
    pub fn flush(&mut self, common: &Common) -> io::Result<()> {
        while self.unsent > 0 {
            let length = self.unsent.min(common.buffer.len());
            let sent = send(self.fd, common.pattern.at(self.send_at, length));
            if sent < 0 {
                match -sent as i32 {
                    libc::EAGAIN => return self.wait_for_room(common, true),
                    libc::EINTR => continue,
                    error => return Err(io::Error::from_raw_os_error(error)),
                }
            }
            self.unsent -= sent as usize;
            self.send_at = common.pattern.after(self.send_at, sent as usize);
        }
        if self.waiting {
            return self.wait_for_room(common, false);
        }
        Ok(())
    }

    #[cold]
    fn wait_for_room(&mut self, common: &Common, on: bool) -> io::Result<()> {
        if self.waiting == on {
            return Ok(());
        }
        self.waiting = on;
        let out = if on { libc::EPOLLOUT } else { 0 };
        let events = (libc::EPOLLIN | out) as u32;
        epoll_set(
            common.poll,
            libc::EPOLL_CTL_MOD,
            self.fd,
            events,
            self.index as u64,
        )
    }

    /// Receives once and checks every byte; how many messages that completes.
    #[inline(always)]
    pub fn receive(&mut self, common: &mut Common) -> io::Result<u32> {
        let received = recv(self.fd, &mut common.buffer);
        if received <= 0 {
            return self.receive_failed(received);
        }
        let received = received as usize;
        if common.buffer[..received] != *common.pattern.at(self.receive_at, received) {
            return Err(other(format!(
                "connection {} echoed wrong bytes",
                self.index
            )));
        }
        self.receive_at = common.pattern.after(self.receive_at, received);
        self.partial += received;
        if self.partial < common.size {
            return Ok(0);
        }
        let count = (self.partial / common.size) as u32;
        self.partial %= common.size;
        if count > self.flying {
            return Err(other(format!("connection {} echoed too much", self.index)));
        }
        self.flying -= count;
        Ok(count)
    }

    #[cold]
    fn receive_failed(&self, result: isize) -> io::Result<u32> {
        match -result as i32 {
            libc::EAGAIN | libc::EINTR => Ok(0),
            0 => Err(other(format!("connection {} was closed", self.index))),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Closes the connection, which leaves the epoll set with that.
    pub fn close(self) {
        crate::sys::close(self.fd);
    }
}
