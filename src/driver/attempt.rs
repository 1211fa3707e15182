//! An operation done by calls that do not wait, as often as it takes: what the ring does with one submission.
//!
//! ```text
//!           step                                             step, once the descriptor is ready
//!   new ──────────▶ would wait (a connect: under way; with MSG_WAITALL: a part is there) ───┐
//!                      │                     ▲                                              │
//!                      │ time over, cancel   └──────────────── would wait still ────────────┤
//!                      ▼                                                                    ▼
//!                   ended: the part, if there is one, else why                           its result
//! ```
//!
//! It waits for nothing itself. Who does (`epoll.rs`, and a plain thread by poll(2)) calls [`step`](Attempt::step) again.

use std::os::fd::RawFd;

use super::op::{Op, TRANSFER_BYTES_MAX};
use crate::sys;

/// How far an operation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attempt {
    /// A connect is under way.
    connecting: bool,
    /// What an earlier connect left has been cleared away.
    cleared: bool,
    /// Bytes moved so far, where MSG_WAITALL asks for more.
    moved: u32,
}

impl Attempt {
    pub(crate) const NEW: Attempt = Attempt {
        connecting: false,
        cleared: false,
        moved: 0,
    };

    /// Whether there is no readiness to wait for: a connect that found a backlog full (AF_UNIX), where only time helps.
    pub(crate) fn waits_for_time(&self, op: &Op<'_>) -> bool {
        matches!(op, Op::Connect { .. }) && !self.connecting
    }

    /// Goes on as far as is possible without waiting: the operation's result, `None` if it would have to wait.
    #[inline]
    pub(crate) fn step(&mut self, op: &mut Op<'_>) -> Option<i32> {
        loop {
            let result = match *op {
                Op::Connect { fd, .. } if self.connecting => connected(op, fd),
                _ if self.moved > 0 => op.attempt_rest(self.moved as usize),
                _ => op.attempt(),
            };
            match -result {
                libc::EAGAIN => return None,
                libc::EINPROGRESS if matches!(op, Op::Connect { .. }) => {
                    self.connecting = true;
                    return None;
                }
                // What is left of an earlier connect that failed: this call has cleared it away, and the next one starts anew. (The
                // ring's does both.)
                libc::ECONNABORTED if matches!(op, Op::Connect { .. }) && !self.cleared => {
                    self.cleared = true;
                }
                libc::EINTR => {}
                ..0 if op.wants_more_than(self.moved as usize + result as usize) => {
                    self.moved += result as u32;
                }
                ..=0 => return Some(self.moved as i32 + result),
                _ => return Some(self.ended(result)),
            }
        }
    }

    /// For an operation whose descriptor is ready although it would wait: its result if it is at its end all the same.
    ///
    /// A datagram socket that was shut down for receiving is readable and answers `EAGAIN`; only a recv(2) that waits is told 0. So is
    /// an AF_UNIX listener, where an accept(2) that waits is told `EINVAL`.
    #[cold]
    pub(crate) fn at_end(&mut self, op: &mut Op<'_>) -> Option<i32> {
        let end = op.end_of_what_is_shut()?;
        // The stream's last bytes may have come with its end, since the step that found nothing. No more come after them.
        let last = self.step(op);
        Some(last.unwrap_or_else(|| self.ended(end)))
    }

    /// The result of an operation that ends here, without one of its own: the bytes that it has moved, or else `code`.
    pub(crate) fn ended(&self, code: i32) -> i32 {
        if self.moved > 0 {
            self.moved as i32
        } else {
            code
        }
    }
}

/// What a connect under way has come to; `-EAGAIN` if it goes on.
///
/// A failure is in `SO_ERROR`, and the socket stays as it left it; without one another connect(2) has the socket know that it is
/// connected (the next one is told `EISCONN`).
fn connected(op: &mut Op<'_>, fd: RawFd) -> i32 {
    match sys::poll(fd, libc::POLLOUT, 0) {
        0 => return -libc::EAGAIN,
        error if error < 0 => return error,
        _ => {}
    }
    let outcome = sys::connect_outcome(fd);
    if outcome < 0 {
        return outcome;
    }
    match op.attempt() {
        again if matches!(-again, libc::EALREADY | libc::EINPROGRESS) => -libc::EAGAIN,
        already if already == -libc::EISCONN => 0,
        result => result,
    }
}

impl Op<'_> {
    /// What it comes to if its socket was shut down for receiving, and there is nothing left.
    #[cold]
    pub(crate) fn end_of_what_is_shut(&self) -> Option<i32> {
        let (fd, end) = match self {
            Op::Recv { fd, .. } | Op::RecvMsg { fd, .. } => (*fd, 0),
            Op::Accept { fd, .. } => (*fd, -libc::EINVAL),
            _ => return None,
        };
        let told = sys::poll(fd, libc::POLLRDHUP, 0);
        // A signal makes it an error, which has every bit.
        (told > 0 && told & i32::from(libc::POLLRDHUP) != 0).then_some(end)
    }

    /// The flags and the bytes of a transfer.
    fn transfer(&self) -> Option<(i32, usize)> {
        match self {
            Op::Recv { buffer, flags, .. } => Some((*flags, buffer.len())),
            Op::Send { buffer, flags, .. }
            | Op::SendZeroCopy { buffer, flags, .. }
            | Op::SendTo { buffer, flags, .. } => Some((*flags, buffer.len())),
            Op::RecvMsg { room, flags, .. } => Some((*flags, room.bytes())),
            Op::SendMsg { message, flags, .. } => Some((*flags, message.bytes())),
            Op::Accept { .. } | Op::Connect { .. } | Op::Poll { .. } | Op::Sleep { .. } => None,
        }
    }

    /// Whether the operation is not done with `moved` bytes, because MSG_WAITALL asks for all.
    #[inline]
    fn wants_more_than(&self, moved: usize) -> bool {
        self.transfer().is_some_and(|(flags, bytes)| {
            flags & libc::MSG_WAITALL != 0 && moved < bytes.min(TRANSFER_BYTES_MAX)
        })
    }

    /// [`attempt`](Op::attempt), of what is left of a transfer behind its first `moved` bytes.
    #[cold]
    fn attempt_rest(&mut self, moved: usize) -> i32 {
        match self {
            Op::Recv {
                fd, buffer, flags, ..
            } => {
                let wanted = buffer.len().min(TRANSFER_BYTES_MAX);
                Op::Recv {
                    fd: *fd,
                    buffer: &mut buffer[moved..wanted],
                    flags: *flags,
                    found_nothing: false,
                }
                .attempt()
            }
            // Of a datagram nothing is left, so the address says nothing new.
            Op::Send { fd, buffer, flags }
            | Op::SendZeroCopy {
                fd, buffer, flags, ..
            }
            | Op::SendTo {
                fd, buffer, flags, ..
            } => {
                let wanted = buffer.len().min(TRANSFER_BYTES_MAX);
                Op::Send {
                    fd: *fd,
                    buffer: &buffer[moved..wanted],
                    flags: *flags,
                }
                .attempt()
            }
            Op::RecvMsg {
                fd,
                room,
                message,
                flags,
            } => {
                let mut pieces = Vec::new();
                Op::RecvMsg {
                    fd: *fd,
                    room: room.rest(moved, &mut pieces),
                    message,
                    flags: *flags,
                }
                .attempt()
            }
            // The control data has gone with the first part.
            Op::SendMsg { fd, message, flags } => {
                let mut pieces = Vec::new();
                Op::SendMsg {
                    fd: *fd,
                    message: &message.rest(moved, &mut pieces),
                    flags: *flags,
                }
                .attempt()
            }
            Op::Accept { .. } | Op::Connect { .. } | Op::Poll { .. } | Op::Sleep { .. } => {
                self.attempt()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{Incoming, Outgoing, Scatter};
    use std::io::{IoSlice, IoSliceMut, Read, Write};
    use std::mem::MaybeUninit;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_receive_of_all_goes_on_where_it_was_and_ends_with_its_part() {
        let (left, mut right) = UnixStream::pair().unwrap();
        let mut buffer = [MaybeUninit::new(0); 8];
        let mut op = Op::Recv {
            fd: left.as_raw_fd(),
            buffer: &mut buffer,
            flags: libc::MSG_WAITALL,
            found_nothing: false,
        };
        let mut attempt = Attempt::NEW;
        assert_eq!(attempt.step(&mut op), None);
        right.write_all(b"abc").unwrap();
        assert_eq!(attempt.step(&mut op), None);
        assert_eq!(attempt.ended(-libc::ECANCELED), 3);
        right.write_all(b"defghij").unwrap();
        assert_eq!(attempt.step(&mut op), Some(8));
        assert_eq!(sys::received(&mut buffer, 8), b"abcdefgh");
    }

    #[test]
    fn a_receive_of_all_ends_with_the_stream() {
        let (left, mut right) = UnixStream::pair().unwrap();
        right.write_all(b"abc").unwrap();
        drop(right);
        let mut op = Op::Recv {
            fd: left.as_raw_fd(),
            buffer: &mut [MaybeUninit::uninit(); 8],
            flags: libc::MSG_WAITALL,
            found_nothing: false,
        };
        let mut attempt = Attempt::NEW;
        assert_eq!(attempt.step(&mut op), Some(3));
    }

    #[test]
    fn what_comes_with_the_end_of_a_stream_is_received_before_it() {
        let (left, mut right) = UnixStream::pair().unwrap();
        let mut buffer = [MaybeUninit::uninit(); 8];
        let mut op = Op::Recv {
            fd: left.as_raw_fd(),
            buffer: &mut buffer,
            flags: 0,
            found_nothing: false,
        };
        let mut attempt = Attempt::NEW;
        assert_eq!(attempt.step(&mut op), None);
        assert_eq!(attempt.at_end(&mut op), None);
        // Between the step and the look at the end.
        right.write_all(b"last").unwrap();
        drop(right);
        assert_eq!(attempt.at_end(&mut op), Some(4));
        assert_eq!(attempt.at_end(&mut op), Some(0));
    }

    #[test]
    fn messages_of_several_pieces_go_on_where_they_were() {
        let (left, mut right) = UnixStream::pair().unwrap();
        let bytes: Vec<u8> = (0..1 << 20).map(|n| (n % 251) as u8).collect();
        let (head, tail) = bytes.split_at(1000);
        let slices = [IoSlice::new(head), IoSlice::new(tail)];
        let mut send = Op::SendMsg {
            fd: left.as_raw_fd(),
            message: &Outgoing::new(&slices, &[], None),
            flags: libc::MSG_WAITALL,
        };
        let (mut sending, mut receiving) = (Attempt::NEW, Attempt::NEW);
        assert_eq!(sending.step(&mut send), None, "more than there is room for");

        let mut buffers = (vec![0; 3], vec![0; 1 << 19]);
        let mut room = [
            IoSliceMut::new(&mut buffers.0),
            IoSliceMut::new(&mut buffers.1),
        ];
        let mut message = Incoming::new();
        right.set_nonblocking(true).unwrap();
        let mut receive = Op::RecvMsg {
            fd: right.as_raw_fd(),
            room: Scatter::many(&mut room),
            message: &mut message,
            flags: libc::MSG_WAITALL,
        };
        let received = loop {
            if let Some(received) = receiving.step(&mut receive) {
                break received;
            }
            assert_eq!(sending.step(&mut send), None);
        };
        assert_eq!(received, 3 + (1 << 19));
        let mut all = [buffers.0, buffers.1].concat();
        let sent = loop {
            let mut buffer = vec![0; 1 << 16];
            if let Ok(n) = right.read(&mut buffer) {
                all.extend_from_slice(&buffer[..n]);
            }
            if let Some(sent) = sending.step(&mut send) {
                break sent;
            }
        };
        assert_eq!(sent as usize, bytes.len());
        drop(left);
        right.read_to_end(&mut all).unwrap();
        assert!(all == bytes);
    }
}
