//! sendfile: a file's bytes to a stream, without passing through this process where the kernel can do that.
//!
//! By sendfile(2) and readiness, not by SPLICE on the ring: the ring gives each SPLICE to a kernel thread, which holds two of them
//! (file to pipe, pipe to socket) for every 64 KiB, obeys `O_NONBLOCK`, and ends in a signal when it is cancelled. And not in the
//! blocking pool: a slow reader would hold one of its threads, and close could not end the call.
//!
//! Measured on Linux 6.18, 256 MiB from the page cache over TCP on loopback, time of the sending thread: 70 to 85 ms; by reading
//! and sending 64 KiB each, 104 to 130 ms; by splice(2) through a pipe of 1 MiB, 33 to 68 ms, for two descriptors per call and
//! bytes that are stranded in the pipe when the call fails. All three take the same 120 ms by the clock.

use std::os::fd::{AsFd, AsRawFd, RawFd};

use super::{NON_BLOCKING, Socket};
use crate::constants::SOCK_STREAM;
use crate::driver::Op;
use crate::error::{Error, Result};
use crate::fiber::inflight::Direction;
use crate::fiber::{self, error_from_outcome};
use crate::sys;

/// The most that one call moves before others have their turn. The socket's send buffer sets a limit below it, as a rule.
const TURN_BYTES: u64 = 1 << 20;

/// What a source that sendfile(2) cannot read is read by.
const READ_BYTES: u64 = 64 << 10;

/// One transfer under way.
struct Transfer {
    file: RawFd,
    offset: u64,
    count: Option<u64>,
    sent: u64,
}

impl Transfer {
    /// Where the next bytes are.
    fn position(&self) -> Result<i64> {
        i64::try_from(self.offset.saturating_add(self.sent))
            .map_err(|_| Error::Overflow("offset is too large".into()))
    }

    /// How much is wanted next, at most `most`.
    fn wanted(&self, most: u64) -> usize {
        self.count.map_or(most, |count| most.min(count - self.sent)) as usize
    }
}

impl Socket {
    /// Sends a file from `offset` on, `count` bytes or (`None`) to its end: how many bytes were sent, fewer than `count` if the
    /// file ends before, 0 for an empty one.
    ///
    /// The file's position plays no part, and afterwards it is behind the last byte that was sent, after an error too: that tells
    /// how far the call came. A source without positions (a pipe, a socket, a terminal) is read until its end, and must have
    /// `offset` 0; from such a source, an error loses what was read and not sent.
    ///
    /// The timeout bounds each wait for the peer, not the whole call, and not the waiting for a source. Reading a regular file from
    /// disk holds up the thread, as any read of a file does.
    ///
    /// # Errors
    ///
    /// Those of [`send`](Socket::send). `Value`: not a stream socket, in non-blocking mode, or `count` is 0. `Overflow`: `offset` is above the
    /// largest file. `EBADF`: the file is not open for reading. `ESPIPE`: an offset into a source without positions. `EIO` and whatever
    /// else reading the file comes to.
    ///
    /// # Source
    ///
    /// Python `socket.sendfile(file, offset, count)` (which sends nothing of pipes and of files in `/proc`, whose size is 0);
    /// `sendfile(2)`, where it cannot read the source `pread(2)` or `read(2)`.
    ///
    /// ```
    /// use std::io::{Seek, Write};
    /// # let path = std::env::temp_dir().join(format!("ringsock-sendfile-{}", std::process::id()));
    /// # let mut file = std::fs::File::options().create(true).truncate(true).read(true).write(true).open(&path)?;
    /// # std::fs::remove_file(path)?;
    /// file.write_all(b"hello, world")?;
    /// let (left, right) = ringsock::socketpair()?;
    /// assert_eq!(left.sendfile(&file, 7, Some(3))?, 3);
    /// assert_eq!(right.recv(1024)?, b"wor");
    /// assert_eq!(file.stream_position()?, 10);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn sendfile(&self, file: impl AsFd, offset: u64, count: Option<u64>) -> Result<u64> {
        if self.0.kind != SOCK_STREAM {
            let text = "only SOCK_STREAM type sockets are supported";
            return Err(Error::Value(text.into()));
        }
        if count == Some(0) {
            let text = "count must be a positive integer (got 0)";
            return Err(Error::Value(text.into()));
        }
        if self.timeout_ns() == NON_BLOCKING {
            let text = "non-blocking sockets are not supported";
            return Err(Error::Value(text.into()));
        }
        self.send_behind_queue(0)?;
        let mut transfer = Transfer {
            file: file.as_fd().as_raw_fd(),
            offset,
            count,
            sent: 0,
        };
        let result = self.sendfile_by_kernel(&mut transfer);
        if transfer.sent > 0
            && let Ok(position) = transfer.position()
        {
            sys::seek(transfer.file, position);
        }
        result.map(|()| transfer.sent)
    }

    fn sendfile_by_kernel(&self, transfer: &mut Transfer) -> Result<()> {
        loop {
            let wanted = transfer.wanted(TURN_BYTES);
            if wanted == 0 {
                return Ok(());
            }
            if let Some(code) = fiber::outcome_so_far() {
                return Err(error_from_outcome(code));
            }
            let position = transfer.position()?;
            let sent =
                self.without_waiting(|| sys::sendfile(self.0.fd, transfer.file, position, wanted));
            match -sent {
                0 => return Ok(()),
                ..0 => {
                    transfer.sent += sent as u64;
                    // The socket may have room for ever; the other fibers want to run as well.
                    fiber::yield_now();
                }
                libc::EAGAIN => self.wait_for_room()?,
                libc::EINTR => {}
                libc::EINVAL | libc::ESPIPE | libc::ENOSYS if transfer.sent == 0 => {
                    return self.sendfile_by_reading(transfer);
                }
                errno => return Err(Error::from_errno(errno)),
            }
        }
    }

    /// Nothing but O_NONBLOCK keeps sendfile(2) from waiting. (The call may read from a disk, too long for `exclusively`.)
    fn without_waiting(&self, call: impl FnOnce() -> i32) -> i32 {
        self.force_nonblocking();
        let result = call();
        self.unforce_nonblocking();
        result
    }

    fn wait_for_room(&self) -> Result<()> {
        let op = Op::Poll {
            fd: self.0.fd,
            events: libc::POLLOUT,
        };
        self.run(op, Direction::Out).map(drop)
    }

    /// For what sendfile(2) cannot read.
    fn sendfile_by_reading(&self, transfer: &mut Transfer) -> Result<()> {
        let mut buffer = vec![0; READ_BYTES as usize];
        let mut has_positions = true;
        loop {
            let wanted = transfer.wanted(READ_BYTES);
            if wanted == 0 {
                return Ok(());
            }
            let read = if has_positions {
                sys::pread(transfer.file, &mut buffer[..wanted], transfer.position()?)
            } else {
                self.wait_for_source(transfer.file)?;
                sys::read_at_once(transfer.file, &mut buffer[..wanted])
            };
            let read = match -read {
                0 => return Ok(()),
                ..0 => read as usize,
                libc::ESPIPE if has_positions && transfer.offset == 0 => {
                    has_positions = false;
                    continue;
                }
                libc::EINTR => continue,
                libc::EAGAIN if !has_positions => continue,
                errno => return Err(Error::from_errno(errno)),
            };
            let mut sent = 0;
            while sent < read {
                let n = self.send(&buffer[sent..read])?;
                sent += n;
                transfer.sent += n as u64;
            }
        }
    }

    /// Waits until a source without positions has something. Closing this socket ends it.
    fn wait_for_source(&self, fd: RawFd) -> Result<()> {
        let events = libc::POLLIN;
        let target = Some((&self.0.inflight, Direction::In));
        match fiber::suspend(&mut Op::Poll { fd, events }, -1, target) {
            code if code < 0 => Err(error_from_outcome(code)),
            _ => Ok(()),
        }
    }
}
