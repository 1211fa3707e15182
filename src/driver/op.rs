//! The operations a driver can run, and the one table that describes them.
//!
//! An [`Op`] borrows the memory the kernel will touch, so its lifetime *is* the time that memory must stay put. It knows no
//! ring: `driver/uring.rs` turns it into an SQE, and [`Op::attempt`] into one system call that does not block.
//!
//! To add an operation: a variant here, a row in [`OPS`], the `match` arms the compiler then asks for.

use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::sync::Mutex;

use crate::address::SockAddr;
use crate::sys::{self, Incoming, Outgoing, Scatter};

/// The most bytes one transfer can move: the kernel's `MAX_RW_COUNT` (`INT_MAX` rounded down to a page). Longer buffers are
/// cut to it, as `recv(2)` and `send(2)` do.
pub(crate) const TRANSFER_BYTES_MAX: usize = 0x7fff_f000;

/// A span of time for the kernel: seconds and nanoseconds, as in `struct __kernel_timespec`.
pub(crate) use io_uring::types::Timespec;

/// The nanoseconds (0 or more) as a [`Timespec`].
#[inline]
pub(crate) fn timespec_from_ns(ns: i64) -> Timespec {
    debug_assert!(ns >= 0);
    const NS_PER_S: i64 = 1_000_000_000;
    Timespec::new()
        .sec((ns / NS_PER_S) as u64)
        .nsec((ns % NS_PER_S) as u32)
}

/// One operation and the memory it lends to the kernel until its final CQE.
pub(crate) enum Op<'a> {
    /// recv(2). The result is the number of bytes, 0 at the end of the stream.
    Recv {
        fd: RawFd,
        buffer: &'a mut [MaybeUninit<u8>],
        flags: i32,
        /// Nothing is there to receive, or hardly, so the ring need not look before it waits.
        found_nothing: bool,
    },
    /// send(2). The result is the number of bytes the kernel took.
    Send {
        fd: RawFd,
        buffer: &'a [u8],
        flags: i32,
    },
    /// send(2) that lets the network read the memory itself (`IORING_OP_SEND_ZC`). The memory is the kernel's beyond the result, until
    /// a notification: see `driver/slab.rs`. `fixed` is the registered buffer that it is a part of.
    SendZeroCopy {
        fd: RawFd,
        buffer: &'a [u8],
        flags: i32,
        fixed: Option<u16>,
    },
    /// sendto(2). The result is the number of bytes the kernel took. (Not a field of `Send`, which is to stay small.)
    SendTo {
        fd: RawFd,
        buffer: &'a [u8],
        address: &'a SockAddr,
        flags: i32,
    },
    /// recvmsg(2). The result is the number of bytes, which with `MSG_TRUNC` may be more than there was room for.
    RecvMsg {
        fd: RawFd,
        room: Scatter<'a>,
        message: &'a mut Incoming,
        flags: i32,
    },
    /// sendmsg(2). The result is the number of bytes the kernel took.
    SendMsg {
        fd: RawFd,
        message: &'a Outgoing<'a>,
        flags: i32,
    },
    /// accept4(2) with `SOCK_CLOEXEC`. The result is the new descriptor.
    Accept {
        fd: RawFd,
        address: &'a mut SockAddr,
    },
    /// connect(2). The result is 0.
    Connect { fd: RawFd, address: &'a SockAddr },
    /// poll(2) of one descriptor, one shot. The result is the ready events.
    Poll { fd: RawFd, events: i16 },
    /// A timer. The result is `-ETIME` when it fires.
    Sleep { duration: Timespec },
}

/// What the table says about one operation.
pub(crate) struct OpInfo {
    /// The kernel's name without `IORING_OP_`.
    pub(crate) name: &'static str,
    /// `IORING_OP_*`.
    pub(crate) opcode: u8,
    /// The first Linux release that has it.
    pub(crate) since: &'static str,
}

/// One row per opcode that an [`Op`] becomes: what the kernel is asked to have. (A SEND takes an address since 6.1, the oldest
/// release that is supported at all.)
pub(crate) const OPS: [OpInfo; 8] = [
    row("RECV", io_uring::opcode::Recv::CODE, "5.6"),
    row("SEND", io_uring::opcode::Send::CODE, "5.6"),
    row("RECVMSG", io_uring::opcode::RecvMsg::CODE, "5.3"),
    row("SENDMSG", io_uring::opcode::SendMsg::CODE, "5.3"),
    row("ACCEPT", io_uring::opcode::Accept::CODE, "5.5"),
    row("CONNECT", io_uring::opcode::Connect::CODE, "5.5"),
    row("POLL_ADD", io_uring::opcode::PollAdd::CODE, "5.1"),
    row("TIMEOUT", io_uring::opcode::Timeout::CODE, "5.4"),
];

const fn row(name: &'static str, opcode: u8, since: &'static str) -> OpInfo {
    OpInfo {
        name,
        opcode,
        since,
    }
}

impl Op<'_> {
    /// [`attempt`](Op::attempt), made again where a signal came between.
    pub(crate) fn attempt_despite_signals(&mut self) -> i32 {
        loop {
            match self.attempt() {
                code if code == -libc::EINTR => {}
                result => return result,
            }
        }
    }

    /// Runs the operation as one system call that does not wait, whatever the descriptor's `O_NONBLOCK` says: 0 or more as
    /// the operation's own result, `-EAGAIN` when it would have to wait, another negative errno when it failed.
    ///
    /// accept4(2) and connect(2) know no `MSG_DONTWAIT`: on a descriptor in blocking mode `O_NONBLOCK` is set around the call.
    #[inline(always)]
    pub(crate) fn attempt(&mut self) -> i32 {
        match self {
            Op::Recv {
                fd, buffer, flags, ..
            } => sys::recv(*fd, buffer, *flags | libc::MSG_DONTWAIT),
            Op::Send { fd, buffer, flags }
            | Op::SendZeroCopy {
                fd, buffer, flags, ..
            } => sys::send(
                *fd,
                buffer,
                (*flags & !libc::MSG_WAITALL) | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            ),
            Op::SendTo {
                fd,
                buffer,
                address,
                flags,
            } => sys::sendto(
                *fd,
                buffer,
                (*flags & !libc::MSG_WAITALL) | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                address,
            ),
            Op::RecvMsg {
                fd,
                room,
                message,
                flags,
            } => sys::recvmsg(*fd, room, message, *flags | libc::MSG_DONTWAIT),
            Op::SendMsg { fd, message, flags } => sys::sendmsg(
                *fd,
                message,
                (*flags & !libc::MSG_WAITALL) | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            ),
            Op::Accept { fd, address } => accept(*fd, address),
            Op::Connect { fd, address } => without_waiting(*fd, || sys::connect(*fd, address)),
            Op::Poll { fd, events } => match sys::poll(*fd, *events, 0) {
                0 => -libc::EAGAIN,
                other => other,
            },
            Op::Sleep { .. } => -libc::EAGAIN,
        }
    }

    /// A plain call has just found nothing, or would hardly find anything.
    #[inline(always)]
    pub(crate) fn found_nothing(&mut self) {
        if let Op::Recv { found_nothing, .. } = self {
            *found_nothing = true;
        }
    }

    /// The descriptor and the events that make another [`attempt`](Op::attempt) worth while; `None` for a pure timer.
    pub(crate) fn readiness(&self) -> Option<(RawFd, i16)> {
        match self {
            Op::Recv { fd, .. } | Op::RecvMsg { fd, .. } | Op::Accept { fd, .. } => {
                Some((*fd, libc::POLLIN))
            }
            Op::Send { fd, .. }
            | Op::SendZeroCopy { fd, .. }
            | Op::SendTo { fd, .. }
            | Op::SendMsg { fd, .. }
            | Op::Connect { fd, .. } => Some((*fd, libc::POLLOUT)),
            Op::Poll { fd, events } => Some((*fd, *events)),
            Op::Sleep { .. } => None,
        }
    }
}

/// Held while a call goes by `O_NONBLOCK` and while anybody in this process sets or clears it. (Another process with the same file
/// could do so all the same.)
static GOES_BY_FLAG: Mutex<()> = Mutex::new(());

/// Makes a call under `O_NONBLOCK`, which ring operations of others on the same file do not mind.
#[cold]
pub(crate) fn without_waiting(fd: RawFd, call: impl FnOnce() -> i32) -> i32 {
    let _guard = sys::lock_after_fork(&GOES_BY_FLAG);
    let flags = sys::status_flags(fd);
    if flags < 0 || flags & libc::O_NONBLOCK != 0 {
        return call();
    }
    sys::set_nonblocking(fd, true);
    let result = call();
    sys::set_nonblocking(fd, false);
    result
}

/// Sets or clears `O_NONBLOCK`, as a socket's mode asks for.
pub(crate) fn set_nonblocking(fd: RawFd, nonblocking: bool) -> i32 {
    // Set beside such a call, the flag would go with the call's end.
    let _guard = sys::lock_after_fork(&GOES_BY_FLAG);
    sys::set_nonblocking(fd, nonblocking)
}

/// accept4(2) that does not wait.
fn accept(fd: RawFd, address: &mut SockAddr) -> i32 {
    {
        let _guard = sys::lock_after_fork(&GOES_BY_FLAG);
        let flags = sys::status_flags(fd);
        if flags < 0 || flags & libc::O_NONBLOCK != 0 {
            return sys::accept4(fd, address);
        }
    }
    // Most tries of a listener are in vain, and need not touch the flag. (Nor does that leave a process that shares the listener
    // much time to clear the flag and take the connection, between the call's look and its own.)
    if sys::poll(fd, libc::POLLIN, 0) == 0 && sys::is_listening(fd) {
        return -libc::EAGAIN;
    }
    without_waiting(fd, || sys::accept4(fd, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nanoseconds_split_into_seconds() {
        assert_eq!(
            format!("{:?}", timespec_from_ns(2_000_000_007)),
            format!("{:?}", Timespec::new().sec(2).nsec(7))
        );
    }
}
