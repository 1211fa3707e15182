//! Sending to an address and receiving with the sender's: sendto and recvfrom.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};

use super::udp::Limit;
use super::{Socket, first, receive_buf};
use crate::address::{Address, SockAddr, ToAddress};
use crate::buf::Buf;
use crate::constants::{AF_INET, AF_INET6, AF_UNIX, MsgFlags, SOCK_SEQPACKET, SOCK_STREAM};
use crate::driver::Op;
use crate::error::Result;
use crate::fiber::inflight::Direction;
use crate::fiber::{self, error_from_outcome, outcome};
use crate::sys::{self, Incoming, Piece, Scatter};

/// How long a send waits on another descriptor than its own before it looks whether its socket was closed: 0.1 s.
const STAND_IN_SLICE_NS: i64 = 100_000_000;

impl Socket {
    /// Sends bytes to an address: how many the kernel took. For a datagram that is all of them; empty data is an empty datagram.
    ///
    /// A connected datagram socket sends to the given address all the same. A stream socket ignores the address on TCP, once
    /// connected; on AF_UNIX it refuses one.
    ///
    /// # Errors
    ///
    /// Those of [`send`](Socket::send). `EMSGSIZE`: too long for one datagram. `EACCES`: a broadcast address without
    /// `SO_BROADCAST`. `EMFILE`: no free descriptor, by which to wait for an AF_UNIX receiver without room. `ECONNREFUSED`: an earlier datagram of a connected socket was refused, or nobody is at the AF_UNIX
    /// address. `ENETUNREACH`, `EHOSTUNREACH`: no way there. `EPIPE`: a TCP socket that is not connected. `EISCONN`: a connected
    /// AF_UNIX stream. Address errors: see [`ToAddress`].
    ///
    /// # Source
    ///
    /// Python `socket.sendto(bytes, address)`; `sendto(2)`; `IORING_OP_SEND` with an address (Linux 6.1).
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let receiver = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// receiver.bind(("127.0.0.1", 0))?;
    /// let sender = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// assert_eq!(sender.sendto(b"hello", receiver.getsockname()?)?, 5);
    /// assert_eq!(receiver.recv(1024)?, b"hello");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn sendto(&self, bytes: &[u8], address: impl ToAddress) -> Result<usize> {
        self.sendto_with(bytes, MsgFlags::default(), address)
    }

    /// [`sendto`](Socket::sendto) with flags: `MSG_DONTWAIT`, `MSG_DONTROUTE`, `MSG_CONFIRM`, …
    ///
    /// With `MSG_FASTOPEN` a TCP socket connects and sends in one; with a timeout, or in non-blocking mode, the answer is
    /// `EINPROGRESS` where nothing could be sent along.
    ///
    /// # Errors
    ///
    /// Those of [`sendto`](Socket::sendto); `EAGAIN` with `MSG_DONTWAIT`.
    ///
    /// # Source
    ///
    /// Python `socket.sendto(bytes, flags, address)`; `sendto(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let receiver = Socket::new(AF_UNIX, SOCK_DGRAM, 0)?;
    /// receiver.bind("")?; // an abstract name of the kernel's choice
    /// let sender = Socket::new(AF_UNIX, SOCK_DGRAM, 0)?;
    /// sender.sendto_with(b"hello", MSG_DONTWAIT, receiver.getsockname()?)?;
    /// assert_eq!(receiver.recv(1024)?, b"hello");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn sendto_with(
        &self,
        bytes: &[u8],
        flags: MsgFlags,
        address: impl ToAddress,
    ) -> Result<usize> {
        let address = address.to_address(self.0.family)?.encode()?;
        let flags = flags.bits();
        let sent = match self.send_raw(bytes, flags, Some(&address)) {
            Err(error)
                if error.errno() == Some(libc::EINPROGRESS)
                    && flags & libc::MSG_FASTOPEN != 0
                    && flags & libc::MSG_DONTWAIT == 0
                    && self.timeout_ns() < 0 =>
            {
                self.send_once_connected(bytes, flags & !libc::MSG_FASTOPEN, &address)
            }
            other => other,
        };
        self.traced("sendto", sent)
    }

    /// In blocking mode sendto(2) waits for a connection that MSG_FASTOPEN began; an attempt that must not wait leaves that to us.
    #[cold]
    fn send_once_connected(&self, bytes: &[u8], flags: i32, address: &SockAddr) -> Result<usize> {
        let events = libc::POLLOUT;
        let fd = self.0.fd;
        self.run(Op::Poll { fd, events }, Direction::Out)?;
        sys::check(sys::connect_outcome(fd))?;
        self.send_raw(bytes, flags, Some(address))
    }

    /// One send of an AF_UNIX datagram or packet that may wait: by readiness, not as a SEND or SENDMSG on the ring.
    ///
    /// unix(7) takes the data before it finds the receiver's queue full, and the ring (Linux 6.18 at least) tries again with what
    /// is then left of it: an empty datagram arrives instead, and the call succeeds with 0.
    #[inline(never)]
    pub(super) fn send_when_ready(
        &self,
        op: &mut Op<'_>,
        to: Option<&SockAddr>,
        timeout_ns: i64,
    ) -> Result<usize> {
        let limit = Limit::new(self, timeout_ns, Direction::Out)?;
        let mut stand_in: Option<OwnedFd> = None;
        loop {
            let left_ns = limit.left_ns();
            let (fd, wait_ns) = match &stand_in {
                None => (self.0.fd, left_ns),
                // Nobody buries this descriptor, so a close that has looked for calls in flight just before is noticed by looking.
                Some(fd) if left_ns < 0 => (fd.as_raw_fd(), STAND_IN_SLICE_NS),
                Some(fd) => (fd.as_raw_fd(), left_ns.min(STAND_IN_SLICE_NS)),
            };
            let events = libc::POLLOUT;
            let target = Some((&self.0.inflight, Direction::Out));
            match fiber::suspend(&mut Op::Poll { fd, events }, wait_ns, target) {
                outcome::TIMED_OUT if limit.is_over() => return Err(limit.expired()),
                outcome::TIMED_OUT if stand_in.is_some() => {}
                code if code < 0 => return Err(error_from_outcome(code)),
                _ => {}
            }
            match (op.attempt_despite_signals(), to) {
                // (A SOCK_SEQPACKET's address means nothing.)
                (code, Some(address))
                    if code == -libc::EAGAIN
                        && stand_in.is_none()
                        && self.0.kind != SOCK_SEQPACKET =>
                {
                    // This socket has room, the receiver has not. Only a socket that is connected to it hears when it has.
                    let connected = sys::socket(AF_UNIX.bits(), self.0.kind.bits(), 0)?;
                    match sys::connect(connected.as_raw_fd(), address) {
                        // The receiver is connected, and hears its peer only. If that is this socket, another call took the room.
                        code if code == -libc::EPERM => {}
                        code => stand_in = sys::check(code).map(|_| Some(connected))?,
                    }
                }
                (code, _) if code == -libc::EAGAIN => stand_in = None,
                (result, _) => return sys::check(result).map(|sent| sent as usize),
            }
        }
    }

    /// Receives at most `bufsize` bytes and the sender's address: `None` where the kernel gives none (connected streams,
    /// AF_UNIX senders without a name).
    ///
    /// What of a datagram does not fit is lost. An empty result is an empty datagram, or the end of a stream. Unlike
    /// [`recv`](Socket::recv), with `bufsize` 0 it still waits, and takes a datagram off the queue.
    ///
    /// # Errors
    ///
    /// Those of [`recv`](Socket::recv). `ECONNREFUSED`: an earlier datagram of a connected UDP socket was refused.
    ///
    /// # Source
    ///
    /// Python `socket.recvfrom(bufsize)`; `recvmsg(2)`; `IORING_OP_RECVMSG`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let receiver = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// receiver.bind(("127.0.0.1", 0))?;
    /// let sender = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// sender.bind(("127.0.0.1", 0))?;
    /// sender.sendto(b"hello", receiver.getsockname()?)?;
    /// let (data, from) = receiver.recvfrom(1024)?;
    /// assert_eq!(data, b"hello");
    /// assert_eq!(from, Some(sender.getsockname()?));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recvfrom(&self, bufsize: usize) -> Result<(Buf, Option<Address>)> {
        self.recvfrom_with(bufsize, MsgFlags::default())
    }

    /// [`recvfrom`](Socket::recvfrom) with flags: `MSG_PEEK`, `MSG_DONTWAIT`, `MSG_ERRQUEUE`, …
    ///
    /// `MSG_ERRQUEUE` and `MSG_OOB` never wait, as for the kernel. `MSG_TRUNC` makes no difference here: the result is cut to
    /// `bufsize` (see [`recvfrom_into_with`](Socket::recvfrom_into_with) for the length).
    ///
    /// # Errors
    ///
    /// Those of [`recvfrom`](Socket::recvfrom); `EAGAIN` with `MSG_DONTWAIT`, or `MSG_ERRQUEUE` and an empty queue.
    ///
    /// # Source
    ///
    /// Python `socket.recvfrom(bufsize, flags)`; `recvmsg(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let (left, right) = ringsock::socketpair_with(AF_UNIX, SOCK_DGRAM, 0)?;
    /// left.send(b"hello")?;
    /// assert_eq!(right.recvfrom_with(1024, MSG_PEEK)?.0, b"hello");
    /// assert_eq!(right.recvfrom(1024)?.0, b"hello");
    /// assert!(right.recvfrom_with(1024, MSG_ERRQUEUE).is_err());
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recvfrom_with(&self, bufsize: usize, flags: MsgFlags) -> Result<(Buf, Option<Address>)> {
        let mut address = None;
        let bytes = receive_buf(bufsize, flags, |buffer| {
            let (received, from) = self.traced("recvfrom", self.recvfrom_raw(buffer, flags))?;
            address = from;
            Ok(received)
        })?;
        Ok((bytes, address))
    }

    /// Receives into `buffer`: how many bytes arrived, and the sender's address as in [`recvfrom`](Socket::recvfrom).
    ///
    /// With an empty buffer it still waits, and takes a datagram off the queue.
    ///
    /// # Errors
    ///
    /// Those of [`recvfrom`](Socket::recvfrom).
    ///
    /// # Source
    ///
    /// Python `socket.recvfrom_into(buffer)`; `recvmsg(2)`; `IORING_OP_RECVMSG` straight into the buffer.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let (left, right) = ringsock::socketpair_with(AF_UNIX, SOCK_DGRAM, 0)?;
    /// left.send(b"hello")?;
    /// let mut buffer = [0u8; 16];
    /// assert_eq!(right.recvfrom_into(&mut buffer)?, (5, None)); // a pair has no names
    /// assert_eq!(&buffer[..5], b"hello");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recvfrom_into(&self, buffer: &mut [u8]) -> Result<(usize, Option<Address>)> {
        let received = self.recvfrom_raw(sys::as_uninit(buffer), MsgFlags::default());
        self.traced("recvfrom", received)
    }

    /// [`recvfrom_into`](Socket::recvfrom_into) of at most `nbytes` bytes (0: as many as fit), with flags.
    ///
    /// With `MSG_TRUNC` the result is the length of the whole datagram, which may be more than the buffer holds.
    ///
    /// # Errors
    ///
    /// Those of [`recvfrom_with`](Socket::recvfrom_with); `Value`: the buffer is smaller than `nbytes`.
    ///
    /// # Source
    ///
    /// Python `socket.recvfrom_into(buffer, nbytes, flags)`; `recvmsg(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let (left, right) = ringsock::socketpair_with(AF_UNIX, SOCK_DGRAM, 0)?;
    /// left.send(b"hello")?;
    /// let mut buffer = [0u8; 2];
    /// let (length, _from) = right.recvfrom_into_with(&mut buffer, 0, MSG_TRUNC)?;
    /// assert_eq!((length, &buffer), (5, b"he"));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recvfrom_into_with(
        &self,
        buffer: &mut [u8],
        nbytes: usize,
        flags: MsgFlags,
    ) -> Result<(usize, Option<Address>)> {
        let text = "nbytes is greater than the length of the buffer";
        let room = first(buffer, nbytes, text)?;
        self.traced("recvfrom", self.recvfrom_raw(sys::as_uninit(room), flags))
    }

    fn recvfrom_raw(
        &self,
        buffer: &mut [MaybeUninit<u8>],
        flags: MsgFlags,
    ) -> Result<(usize, Option<Address>)> {
        let mut message = Incoming::new();
        let mut piece = Piece::NONE;
        let flags = self.flags_for_ring(flags);
        // For no bytes recvfrom(2) does not wait on TCP; the ring would.
        let waits_in_vain = buffer.is_empty()
            && self.timeout_ns() < 0
            && self.0.kind == SOCK_STREAM
            && matches!(self.0.family, AF_INET | AF_INET6);
        let op = Op::RecvMsg {
            fd: self.0.fd,
            room: Scatter::one(buffer, &mut piece),
            message: &mut message,
            flags,
        };
        let received = if waits_in_vain {
            self.attempt(op)?
        } else {
            self.receive(op, flags, self.timeout_ns())?
        };
        Ok((received, message.address()))
    }
}
