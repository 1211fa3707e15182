//! Messages: several buffers at once and data beside the data. recvmsg, sendmsg, and descriptors by send_fds and recv_fds.
//!
//! ```text
//!  control data:  ┌ cmsghdr: len, level, type ┬ data ┬ padding ┐┌ cmsghdr …
//!                 └ 16 bytes ─────────────────┴ n ───┴ to 8 ───┘└
//!                 ◀────── CMSG_LEN(n) ──────────────▶
//!                 ◀────── CMSG_SPACE(n) ──────────────────────▶
//! ```
//!
//! Received control data is taken apart at once, so that every descriptor in it has an owner before anything can fail.

use std::io::{IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{BY_OPTION, NON_BLOCKING, Socket, receive_buf, transferred};
use crate::address::{Address, SockAddr, ToAddress};
use crate::buf::Buf;
use crate::constants::{AF_UNIX, MsgFlags, SOCK_STREAM};
use crate::driver::Op;
use crate::error::{Error, Result};
use crate::fiber::inflight::Direction;
use crate::fiber::{self, error_from_outcome};
use crate::sys::{self, ControlWord, Incoming, Outgoing, Piece, Scatter};

/// The size of `struct cmsghdr`: a size, a level, a type.
const HEADER: usize = size_of::<libc::cmsghdr>();
/// What control data is padded to.
const ALIGNMENT: usize = size_of::<usize>();
const _: () = assert!(HEADER == ALIGNMENT + 8 && ALIGNMENT <= size_of::<ControlWord>());

/// `SCM_PIDFD` of linux/socket.h, which the libc crate lacks.
const SCM_PIDFD: i32 = 4;

/// The most bytes of control data, Python's limit.
const CONTROL_BYTES_MAX: usize = i32::MAX as usize;

/// The length of a control message with `length` bytes of data, without padding behind it: what its header says, and the least room
/// in which [`recvmsg_with`](Socket::recvmsg_with) receives it whole.
///
/// # Errors
///
/// `Overflow`: `length` is too large (near 2 GiB).
///
/// # Source
///
/// Python `socket.CMSG_LEN(length)`; `cmsg(3)`, RFC 3542.
///
/// ```
/// assert_eq!(ringsock::CMSG_LEN(4)?, 20);
/// assert!(ringsock::CMSG_LEN(usize::MAX).is_err());
/// # Ok::<(), ringsock::Error>(())
/// ```
#[allow(non_snake_case, reason = "the name in Python and in C")]
#[doc(alias = "cmsg_len")]
pub fn CMSG_LEN(length: usize) -> Result<usize> {
    if length > CONTROL_BYTES_MAX - HEADER {
        return Err(Error::Overflow("CMSG_LEN() argument out of range".into()));
    }
    Ok(HEADER + length)
}

/// The room that a control message with `length` bytes of data takes, padding included: for several, add these up.
///
/// # Errors
///
/// `Overflow`: `length` is too large (near 2 GiB).
///
/// # Source
///
/// Python `socket.CMSG_SPACE(length)`; `cmsg(3)`, RFC 3542.
///
/// ```
/// assert_eq!(ringsock::CMSG_SPACE(4)?, 24);
/// # Ok::<(), ringsock::Error>(())
/// ```
#[allow(non_snake_case, reason = "the name in Python and in C")]
#[doc(alias = "cmsg_space")]
pub fn CMSG_SPACE(length: usize) -> Result<usize> {
    if length > CONTROL_BYTES_MAX - padded(HEADER + 1) {
        return Err(Error::Overflow("CMSG_SPACE() argument out of range".into()));
    }
    Ok(padded(HEADER + length))
}

fn padded(length: usize) -> usize {
    length.next_multiple_of(ALIGNMENT)
}

/// Who sent a message: `struct ucred`.
///
/// A process may send its own numbers; others need a privilege (`CAP_SYS_ADMIN`, `CAP_SETUID`, `CAP_SETGID`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// The process.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// One piece of received ancillary data.
#[non_exhaustive]
#[derive(Debug)]
pub enum Ancillary {
    /// Descriptors (`SCM_RIGHTS`), not inherited by programs started with `exec`. Dropping closes them.
    Rights(Vec<OwnedFd>),
    /// The sender (`SCM_CREDENTIALS`), with `SO_PASSCRED` set on the receiver.
    Credentials(Credentials),
    /// A descriptor of the sender (`SCM_PIDFD`, Linux 6.5), with `SO_PASSPIDFD` set on the receiver; see `pidfd_open(2)`. Dropping
    /// closes it.
    PidFd(OwnedFd),
    /// When the message arrived, with `SO_TIMESTAMP` (microseconds) or `SO_TIMESTAMPNS` (nanoseconds) set.
    Timestamp(SystemTime),
    /// Where an IPv4 datagram was sent to (`IP_PKTINFO`).
    PktInfo4 {
        /// The interface that it came in by.
        interface: u32,
        /// The local address it is for: the one to answer from.
        local: Ipv4Addr,
        /// The destination in its header; a group for multicast.
        destination: Ipv4Addr,
    },
    /// Where an IPv6 datagram was sent to (`IPV6_PKTINFO`, with `IPV6_RECVPKTINFO` set).
    PktInfo6 {
        /// The interface that it came in by.
        interface: u32,
        /// The destination in its header.
        destination: Ipv6Addr,
    },
    /// The time to live of an IPv4 datagram (`IP_TTL`, with `IP_RECVTTL` set).
    Ttl(i32),
    /// The hop limit of an IPv6 datagram (`IPV6_HOPLIMIT`, with `IPV6_RECVHOPLIMIT` set).
    HopLimit(i32),
    /// Anything else, also what was cut (`MSG_CTRUNC`).
    Raw {
        /// `SOL_SOCKET`, `IPPROTO_IP`, …
        level: i32,
        /// `SCM_*`, `IP_*`, …
        kind: i32,
        /// As the kernel wrote it.
        data: Vec<u8>,
    },
}

/// One piece of ancillary data to send, by [`SendMsg`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug)]
pub enum AncillaryToSend<'a> {
    /// Descriptors, at most 253 (`SCM_RIGHTS`, AF_UNIX only). The receiver gets duplicates. On a stream, send at least one byte with them.
    Rights(&'a [BorrowedFd<'a>]),
    /// Who sends (`SCM_CREDENTIALS`, AF_UNIX only).
    Credentials(Credentials),
    /// Where an IPv4 datagram goes out (`IP_PKTINFO`).
    PktInfo4 {
        /// The interface to send by; 0 leaves it to the routes.
        interface: u32,
        /// The source address; 0.0.0.0 leaves it to the kernel.
        source: Ipv4Addr,
    },
    /// Where an IPv6 datagram goes out (`IPV6_PKTINFO`).
    PktInfo6 {
        /// The interface to send by; 0 leaves it to the routes.
        interface: u32,
        /// The source address; `::` leaves it to the kernel.
        source: Ipv6Addr,
    },
    /// The time to live of an IPv4 datagram, 1 to 255 (`IP_TTL`).
    Ttl(i32),
    /// The hop limit of an IPv6 datagram, 0 to 255, or -1 for the default (`IPV6_HOPLIMIT`).
    HopLimit(i32),
    /// Anything else.
    Raw {
        /// `SOL_SOCKET`, `IPPROTO_IP`, …
        level: i32,
        /// `SCM_*`, `IP_*`, …
        kind: i32,
        /// As the kernel reads it.
        data: &'a [u8],
    },
}

/// What [`Socket::recvmsg`] received.
#[non_exhaustive]
#[derive(Debug)]
pub struct RecvMsg {
    /// The bytes.
    pub data: Buf,
    /// What came beside them, in the kernel's order.
    pub ancdata: Vec<Ancillary>,
    /// `MSG_TRUNC`: the datagram was longer. `MSG_CTRUNC`: there was more ancillary data. `MSG_EOR`, `MSG_OOB`, `MSG_ERRQUEUE`.
    pub flags: MsgFlags,
    /// The sender; `None` where the kernel gives none.
    pub address: Option<Address>,
}

/// What [`Socket::recvmsg_into`] received.
#[non_exhaustive]
#[derive(Debug)]
pub struct RecvMsgInto {
    /// How many bytes.
    pub nbytes: usize,
    /// What came beside them, in the kernel's order.
    pub ancdata: Vec<Ancillary>,
    /// As in [`RecvMsg`].
    pub flags: MsgFlags,
    /// The sender; `None` where the kernel gives none.
    pub address: Option<Address>,
}

/// What [`Socket::sendmsg_with`] may be told, by Python's names. The default is that of [`Socket::sendmsg`].
///
/// ```
/// use ringsock::{MSG_DONTWAIT, SendMsg};
/// let options = SendMsg { flags: MSG_DONTWAIT, ..Default::default() };
/// assert!(options.ancdata.is_empty());
/// ```
#[derive(Clone, Copy, Default)]
pub struct SendMsg<'a> {
    /// What goes beside the data.
    pub ancdata: &'a [AncillaryToSend<'a>],
    /// `MSG_DONTWAIT`, `MSG_MORE`, …
    pub flags: MsgFlags,
    /// Where to; `None`: to whom the socket is connected.
    pub address: Option<&'a dyn ToAddress>,
}

/// What [`Socket::sendmsg_afalg`] tells the kernel's cryptography, by Python's names.
#[derive(Clone, Copy, Debug, Default)]
pub struct Afalg<'a> {
    /// 0 decrypts (`ALG_OP_DECRYPT`), 1 encrypts (`ALG_OP_ENCRYPT`).
    pub op: u32,
    /// The initialisation vector, if the algorithm takes one.
    pub iv: Option<&'a [u8]>,
    /// How many bytes at the start are authenticated only (AEAD).
    pub assoclen: Option<u32>,
    /// `MSG_MORE`, …
    pub flags: MsgFlags,
}

/// Sends bytes and descriptors over an AF_UNIX socket: how many bytes the kernel took.
///
/// # Errors
///
/// Those of [`Socket::sendmsg_with`]. `EINVAL`: more than 253 descriptors. `EBADF`: one of them, or the socket, is closed.
/// `ETOOMANYREFS`: too many are under way already.
///
/// # Source
///
/// Python `socket.send_fds(sock, buffers, fds)`; `unix(7)` (`SCM_RIGHTS`).
///
/// ```
/// use std::io::{IoSlice, Read, Write};
/// use std::os::fd::AsFd;
/// let (left, right) = ringsock::socketpair()?;
/// let (mut reader, writer) = std::io::pipe()?;
/// ringsock::send_fds(&left, &[IoSlice::new(b"a pipe")], &[writer.as_fd()])?;
/// drop(writer);
/// let (data, mut fds, _flags, _address) = ringsock::recv_fds(&right, 1024, 1)?;
/// assert_eq!(data, b"a pipe");
/// let mut writer = std::io::PipeWriter::from(fds.remove(0));
/// writer.write_all(b"hello")?;
/// drop(writer);
/// let mut text = String::new();
/// reader.read_to_string(&mut text)?;
/// assert_eq!(text, "hello");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn send_fds(sock: &Socket, buffers: &[IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> Result<usize> {
    send_fds_with(sock, buffers, fds, MsgFlags::default(), None)
}

/// [`send_fds`] with flags, and an address for a socket that is not connected. (Python 3.11 ignores both.)
///
/// # Errors
///
/// Those of [`send_fds`].
///
/// # Source
///
/// Python `socket.send_fds(sock, buffers, fds, flags, address)`.
///
/// ```
/// use ringsock::prelude::*;
/// use std::io::IoSlice;
/// use std::os::fd::AsFd;
/// let receiver = Socket::new(AF_UNIX, SOCK_DGRAM, 0)?;
/// receiver.bind("")?;
/// let sender = Socket::new(AF_UNIX, SOCK_DGRAM, 0)?;
/// let (fds, address) = ([sender.as_fd()], receiver.getsockname()?);
/// ringsock::send_fds_with(&sender, &[IoSlice::new(b"me")], &fds, MSG_DONTWAIT, Some(&address))?;
/// assert_eq!(ringsock::recv_fds(&receiver, 16, 1)?.1.len(), 1);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn send_fds_with(
    sock: &Socket,
    buffers: &[IoSlice<'_>],
    fds: &[BorrowedFd<'_>],
    flags: MsgFlags,
    address: Option<&dyn ToAddress>,
) -> Result<usize> {
    let ancdata = &[AncillaryToSend::Rights(fds)];
    let options = SendMsg {
        ancdata,
        flags,
        address,
    };
    sock.sendmsg_with(buffers, options)
}

/// Receives at most `bufsize` bytes and `maxfds` descriptors over an AF_UNIX socket: the bytes, the descriptors, the message's flags
/// and the sender's address.
///
/// Descriptors beyond `maxfds` are not received at all, and `MSG_CTRUNC` is among the flags.
///
/// # Errors
///
/// Those of [`Socket::recvmsg_with`]; `Overflow`: `maxfds` is too large.
///
/// # Source
///
/// Python `socket.recv_fds(sock, bufsize, maxfds)`; `unix(7)` (`SCM_RIGHTS`).
///
/// ```
/// let (left, right) = ringsock::socketpair()?;
/// left.sendall(b"no descriptors")?;
/// let (data, fds, _flags, _address) = ringsock::recv_fds(&right, 1024, 4)?;
/// assert_eq!(data, b"no descriptors");
/// assert!(fds.is_empty());
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn recv_fds(
    sock: &Socket,
    bufsize: usize,
    maxfds: usize,
) -> Result<(Buf, Vec<OwnedFd>, MsgFlags, Option<Address>)> {
    recv_fds_with(sock, bufsize, maxfds, MsgFlags::default())
}

/// [`recv_fds`] with flags. (Python 3.11 ignores them.) With `MSG_PEEK` each call makes new descriptors.
///
/// # Errors
///
/// Those of [`recv_fds`].
///
/// # Source
///
/// Python `socket.recv_fds(sock, bufsize, maxfds, flags)`.
///
/// ```
/// use ringsock::prelude::*;
/// let (_left, right) = ringsock::socketpair()?;
/// assert!(ringsock::recv_fds_with(&right, 1024, 4, MSG_DONTWAIT).unwrap_err().is_would_block());
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn recv_fds_with(
    sock: &Socket,
    bufsize: usize,
    maxfds: usize,
    flags: MsgFlags,
) -> Result<(Buf, Vec<OwnedFd>, MsgFlags, Option<Address>)> {
    let room = CMSG_LEN(maxfds.saturating_mul(size_of::<RawFd>()))?;
    let message = sock.recvmsg_with(bufsize, room, flags)?;
    let mut fds = Vec::new();
    for item in message.ancdata {
        if let Ancillary::Rights(rights) = item {
            fds.extend(rights);
        }
    }
    Ok((message.data, fds, message.flags, message.address))
}

impl Socket {
    /// Receives at most `bufsize` bytes with the message's flags and the sender's address, and no ancillary data
    /// ([`recvmsg_with`](Socket::recvmsg_with) has room for it).
    ///
    /// An empty result is the end of a stream, or an empty datagram. With `bufsize` 0 it waits all the same, and takes a datagram off
    /// the queue.
    ///
    /// # Errors
    ///
    /// Those of [`recvfrom`](Socket::recvfrom).
    ///
    /// # Source
    ///
    /// Python `socket.recvmsg(bufsize)`; `recvmsg(2)`; `IORING_OP_RECVMSG`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let (left, right) = ringsock::socketpair_with(AF_UNIX, SOCK_DGRAM, 0)?;
    /// left.send(b"hello")?;
    /// let message = right.recvmsg(2)?;
    /// assert_eq!(message.data, b"he");
    /// assert_eq!(message.flags, MSG_TRUNC);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recvmsg(&self, bufsize: usize) -> Result<RecvMsg> {
        self.recvmsg_with(bufsize, 0, MsgFlags::default())
    }

    /// [`recvmsg`](Socket::recvmsg) with `ancbufsize` bytes of room for ancillary data (see [`CMSG_SPACE`]), and flags.
    ///
    /// What ancillary data does not fit is lost, and `MSG_CTRUNC` is among the result's flags; descriptors among it are closed by the
    /// kernel. Received descriptors are never inherited by programs started with `exec`. `MSG_ERRQUEUE` and `MSG_OOB` never wait.
    ///
    /// With `MSG_WAITALL` on an AF_UNIX stream the call waits until `bufsize` bytes are there, or ancillary data came with those
    /// that are (with `MSG_PEEK`, it does not wait for more).
    ///
    /// # Errors
    ///
    /// Those of [`recvfrom_with`](Socket::recvfrom_with); `Value`: `ancbufsize` is above 2 GiB; `ENOMEM`.
    ///
    /// # Source
    ///
    /// Python `socket.recvmsg(bufsize, ancbufsize, flags)`; `recvmsg(2)`, `cmsg(3)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// use ringsock::{Ancillary, CMSG_SPACE};
    /// let (left, right) = ringsock::socketpair()?;
    /// right.setsockopt(SOL_SOCKET, SO_PASSCRED, 1)?;
    /// left.sendall(b"who am I?")?;
    /// let message = right.recvmsg_with(1024, CMSG_SPACE(12)?, MsgFlags::default())?;
    /// let [Ancillary::Credentials(sender)] = message.ancdata[..] else { panic!() };
    /// assert_eq!(sender.pid, std::process::id() as i32);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recvmsg_with(
        &self,
        bufsize: usize,
        ancbufsize: usize,
        flags: MsgFlags,
    ) -> Result<RecvMsg> {
        let mut rest = None;
        let data = receive_buf(bufsize, flags, |buffer| {
            let mut piece = Piece::NONE;
            let room = Scatter::one(buffer, &mut piece);
            let message = self.recvmsg_raw(room, bufsize, ancbufsize, flags);
            let message = self.traced("recvmsg", message)?;
            Ok(rest.insert(message).nbytes)
        })?;
        let rest = rest.expect("a message was received");
        Ok(RecvMsg {
            data,
            ancdata: rest.ancdata,
            flags: rest.flags,
            address: rest.address,
        })
    }

    /// Receives into several buffers, filling one after the other: [`recvmsg`](Socket::recvmsg) into memory of the caller's.
    ///
    /// # Errors
    ///
    /// Those of [`recvmsg`](Socket::recvmsg). `EMSGSIZE`: more than 1,024 buffers.
    ///
    /// # Source
    ///
    /// Python `socket.recvmsg_into(buffers)`; `recvmsg(2)`; `IORING_OP_RECVMSG` straight into the buffers.
    ///
    /// ```
    /// use std::io::IoSliceMut;
    /// let (left, right) = ringsock::socketpair()?;
    /// left.sendall(b"headbody")?;
    /// let (mut head, mut body) = ([0; 4], [0; 16]);
    /// let message = right.recvmsg_into(&mut [IoSliceMut::new(&mut head), IoSliceMut::new(&mut body)])?;
    /// assert_eq!(message.nbytes, 8);
    /// assert_eq!((&head, &body[..4]), (b"head", &b"body"[..]));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recvmsg_into(&self, buffers: &mut [IoSliceMut<'_>]) -> Result<RecvMsgInto> {
        self.recvmsg_into_with(buffers, 0, MsgFlags::default())
    }

    /// [`recvmsg_into`](Socket::recvmsg_into) with room for ancillary data, and flags, as in
    /// [`recvmsg_with`](Socket::recvmsg_with).
    ///
    /// With `MSG_TRUNC` the result is the length of the whole datagram, which may be more than the buffers hold.
    ///
    /// # Errors
    ///
    /// Those of [`recvmsg_into`](Socket::recvmsg_into) and [`recvmsg_with`](Socket::recvmsg_with).
    ///
    /// # Source
    ///
    /// Python `socket.recvmsg_into(buffers, ancbufsize, flags)`; `recvmsg(2)`, `cmsg(3)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// use std::io::IoSliceMut;
    /// let (left, right) = ringsock::socketpair()?;
    /// left.sendall(b"hello")?;
    /// let mut buffer = [0; 4];
    /// let message = right.recvmsg_into_with(&mut [IoSliceMut::new(&mut buffer)], 0, MSG_PEEK)?;
    /// assert_eq!((message.nbytes, &buffer), (4, b"hell"));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recvmsg_into_with(
        &self,
        buffers: &mut [IoSliceMut<'_>],
        ancbufsize: usize,
        flags: MsgFlags,
    ) -> Result<RecvMsgInto> {
        let size = buffers.iter().map(|buffer| buffer.len()).sum();
        let message = self.recvmsg_raw(Scatter::many(buffers), size, ancbufsize, flags);
        self.traced("recvmsg", message)
    }

    fn recvmsg_raw(
        &self,
        mut room: Scatter<'_>,
        size: usize,
        ancbufsize: usize,
        flags: MsgFlags,
    ) -> Result<RecvMsgInto> {
        if ancbufsize > CONTROL_BYTES_MAX {
            let text = "invalid ancillary data buffer length";
            return Err(Error::Value(text.into()));
        }
        let mut message = Incoming::with_control(ancbufsize)?;
        let flags = self.flags_for_ring(flags) | libc::MSG_CMSG_CLOEXEC;
        if flags & libc::MSG_WAITALL != 0 && self.0.family == AF_UNIX && self.0.kind == SOCK_STREAM
        {
            return self.recvmsg_all(&mut room, size, &mut message, flags & !libc::MSG_WAITALL);
        }
        let op = Op::RecvMsg {
            fd: self.0.fd,
            room,
            message: &mut message,
            flags,
        };
        let nbytes = self.receive(op, flags, self.timeout_ns())?;
        Ok(taken_apart(nbytes, &mut message))
    }

    /// MSG_WAITALL on an AF_UNIX stream: piece by piece, until it is all there or control data came.
    ///
    /// The ring does not stop at control data as recvmsg(2) does: it goes on and reports the last piece's, so that descriptors that
    /// came before would be lost, and stay open; and where there is no room for them, nothing would tell of them.
    fn recvmsg_all(
        &self,
        room: &mut Scatter<'_>,
        size: usize,
        message: &mut Incoming,
        flags: i32,
    ) -> Result<RecvMsgInto> {
        let timeout_ns = self.timeout_ns();
        let deadline_ns = fiber::now_ns().saturating_add(timeout_ns.max(0));
        let mut pieces = Vec::new();
        let mut whole: Option<RecvMsgInto> = None;
        loop {
            let done = whole.as_ref().map_or(0, |whole| whole.nbytes);
            let mut op = Op::RecvMsg {
                fd: self.0.fd,
                room: room.rest(done, &mut pieces),
                message,
                flags,
            };
            let result = if timeout_ns <= 0 {
                self.receive(op, flags, timeout_ns)
            } else {
                let left_ns = (deadline_ns - fiber::now_ns()).max(0);
                transferred(self.wait(&mut op, Direction::In, left_ns))
            };
            let nbytes = match (result, whole) {
                (Ok(0), Some(whole)) | (Err(_), Some(whole)) => return Ok(whole),
                (result, _) => result?,
            };
            let part = taken_apart(done + nbytes, message);
            let is_last = nbytes == 0
                || part.nbytes >= size
                || !part.ancdata.is_empty()
                || part.flags != MsgFlags::default();
            if is_last {
                return Ok(part);
            }
            whole = Some(part);
        }
    }

    /// Sends the bytes of several buffers as one message: how many the kernel took. As for [`send`](Socket::send), in blocking mode a
    /// stream socket takes them all.
    ///
    /// # Errors
    ///
    /// Those of [`send`](Socket::send). `EMSGSIZE`: more than 1,024 buffers, or too long for one datagram.
    ///
    /// # Source
    ///
    /// Python `socket.sendmsg(buffers)`; `sendmsg(2)`; `IORING_OP_SENDMSG`.
    ///
    /// ```
    /// use std::io::IoSlice;
    /// let (left, right) = ringsock::socketpair()?;
    /// assert_eq!(left.sendmsg(&[IoSlice::new(b"head"), IoSlice::new(b"body")])?, 8);
    /// assert_eq!(right.recv(1024)?, b"headbody");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn sendmsg(&self, buffers: &[IoSlice<'_>]) -> Result<usize> {
        self.sendmsg_with(buffers, SendMsg::default())
    }

    /// [`sendmsg`](Socket::sendmsg) with ancillary data, flags and an address.
    ///
    /// Ancillary data goes with the first bytes that the kernel takes, once.
    ///
    /// # Errors
    ///
    /// Those of [`sendmsg`](Socket::sendmsg) and, with an address, [`sendto`](Socket::sendto); `EAGAIN` with `MSG_DONTWAIT`.
    /// `EINVAL`: the family does not know this ancillary data. `EPERM`: credentials of somebody else. `ENOBUFS`: too much of it
    /// (`net.core.optmem_max`). `Message`: an item is near 2 GiB.
    ///
    /// # Source
    ///
    /// Python `socket.sendmsg(buffers, ancdata, flags, address)`; `sendmsg(2)`, `cmsg(3)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// use ringsock::{AncillaryToSend, SendMsg};
    /// use std::io::IoSlice;
    /// let receiver = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// receiver.bind(("127.0.0.1", 0))?;
    /// let address = receiver.getsockname()?;
    /// let sender = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// let options = SendMsg {
    ///     ancdata: &[AncillaryToSend::Ttl(7)],
    ///     address: Some(&address),
    ///     ..Default::default()
    /// };
    /// assert_eq!(sender.sendmsg_with(&[IoSlice::new(b"hello")], options)?, 5);
    /// assert_eq!(receiver.recv(1024)?, b"hello");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn sendmsg_with(&self, buffers: &[IoSlice<'_>], options: SendMsg<'_>) -> Result<usize> {
        let address = match options.address {
            Some(address) => Some(address.to_address(self.0.family)?.encode()?),
            None => None,
        };
        let control = control_data(options.ancdata)?;
        let sent = self.sendmsg_raw(buffers, &control, options.flags.bits(), address.as_ref());
        self.traced("sendmsg", sent)
    }

    /// [`sendmsg`](Socket::sendmsg) to the kernel's cryptography, on a socket that was accepted from one bound to an algorithm
    /// (AF_ALG).
    ///
    /// # Errors
    ///
    /// Those of [`sendmsg_with`](Socket::sendmsg_with). `EINVAL`: not an AF_ALG socket, or a wrong length of the vector.
    ///
    /// # Source
    ///
    /// Python `socket.sendmsg_afalg(msg, op=…, iv=…, assoclen=…, flags=…)`; the kernel's "User Space Interface" of the crypto API.
    ///
    /// ```no_run
    /// use ringsock::{Afalg, Socket};
    /// use std::io::IoSlice;
    /// # fn example(cipher: &Socket, iv: &[u8; 16]) -> ringsock::Result<()> {
    /// let encrypt = Afalg { op: 1, iv: Some(iv), ..Default::default() };
    /// cipher.sendmsg_afalg(&[IoSlice::new(&[0; 16])], encrypt)?;
    /// let encrypted = cipher.recv(16)?;
    /// # Ok(()) }
    /// ```
    pub fn sendmsg_afalg(&self, buffers: &[IoSlice<'_>], options: Afalg<'_>) -> Result<usize> {
        // struct af_alg_iv: a length and the bytes.
        let iv = options.iv.map(|iv| {
            let length = (iv.len() as u32).to_ne_bytes();
            [&length[..], iv].concat()
        });
        let (op, assoclen) = (
            options.op.to_ne_bytes(),
            options.assoclen.map(u32::to_ne_bytes),
        );
        let item = |kind, data| AncillaryToSend::Raw {
            level: libc::SOL_ALG,
            kind,
            data,
        };
        let mut ancdata = vec![item(libc::ALG_SET_OP, &op)];
        ancdata.extend(iv.as_ref().map(|iv| item(libc::ALG_SET_IV, iv)));
        let kind = libc::ALG_SET_AEAD_ASSOCLEN;
        ancdata.extend(assoclen.as_ref().map(|length| item(kind, length)));
        let control = control_data(&ancdata)?;
        let sent = self.sendmsg_raw(buffers, &control, options.flags.bits(), None);
        self.traced("sendmsg", sent)
    }

    fn sendmsg_raw(
        &self,
        buffers: &[IoSlice<'_>],
        control: &[ControlWord],
        flags: i32,
        to: Option<&SockAddr>,
    ) -> Result<usize> {
        self.send_behind_queue(flags)?;
        let timeout_ns = self.timeout_ns();
        let fd = self.0.fd;
        let message = &Outgoing::new(buffers, control, to);
        let mut op = Op::SendMsg { fd, message, flags };
        if timeout_ns == NON_BLOCKING || flags & libc::MSG_DONTWAIT != 0 {
            return self.attempt(op);
        }
        let mut sent = match fiber::attempt_directly(&mut op, timeout_ns >= 0) {
            None => self.wait_to_send(&mut op, to, timeout_ns)?,
            Some(code) if code < 0 => return Err(error_from_outcome(code)),
            Some(sent) => sent as usize,
        };
        let size: usize = buffers.iter().map(|buffer| buffer.len()).sum();
        if sent >= size || timeout_ns > 0 {
            return Ok(sent);
        }
        // Blocking mode: sendmsg(2) returns when all is queued, or with what was queued before an error. The control data has
        // gone with the first part. (With MSG_WAITALL in the first place, some kernels send it again with each.)
        let flags = flags | libc::MSG_WAITALL;
        loop {
            let mut rest = buffers.to_vec();
            let mut rest = &mut rest[..];
            IoSlice::advance_slices(&mut rest, sent);
            let message = &Outgoing::new(rest, &[], to);
            match self.wait_to_send(&mut Op::SendMsg { fd, message, flags }, to, timeout_ns) {
                Ok(n) => sent += n,
                Err(_) => return Ok(sent),
            }
            // SO_SNDTIMEO bounds the call, so what is missing then timed out.
            if sent >= size || timeout_ns == BY_OPTION {
                return Ok(sent);
            }
        }
    }
}

/// The message that a successful call has left.
fn taken_apart(nbytes: usize, message: &mut Incoming) -> RecvMsgInto {
    RecvMsgInto {
        nbytes,
        ancdata: Items(message.control())
            .map(|item| item.decode(sys::own))
            .collect(),
        // The kernel reports the flag that we added; Python's callers do not see it.
        flags: MsgFlags::new(message.flags() & !libc::MSG_CMSG_CLOEXEC),
        address: message.address(),
    }
}

/// One control message as it lies in the buffer.
pub(super) struct Item<'a> {
    pub(super) level: i32,
    pub(super) kind: i32,
    pub(super) data: &'a [u8],
}

/// Control data of any bytes, for `fuzz/`: each piece lies within them and is decoded without a panic. No descriptor in it is made
/// anybody's: the numbers are made up.
#[cfg(fuzzing)]
pub fn fuzzing_control_messages(bytes: &[u8]) {
    let range = bytes.as_ptr_range();
    for item in Items(bytes) {
        assert!(item.data.is_empty() || range.contains(&item.data.as_ptr()));
        assert!(item.data.as_ptr_range().end <= range.end);
        if !matches!(item.kind, libc::SCM_RIGHTS | SCM_PIDFD) {
            let _ = item.decode(|_| unreachable!("only these two have descriptors"));
        }
        // What was received can be sent again, and comes out the same.
        let (level, kind, data) = (item.level, item.kind, item.data);
        let words = control_data(&[AncillaryToSend::Raw { level, kind, data }]).expect("it fits");
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let again: Vec<_> = Items(&bytes)
            .map(|i| (i.level, i.kind, i.data.to_vec()))
            .collect();
        assert_eq!(again, [(level, kind, data.to_vec())]);
    }
}

/// Goes through control data. It believes no length: what does not fit ends it.
pub(super) struct Items<'a>(pub(super) &'a [u8]);

impl<'a> Iterator for Items<'a> {
    type Item = Item<'a>;

    fn next(&mut self) -> Option<Item<'a>> {
        let (length, rest) = self.0.split_first_chunk()?;
        let length = usize::from_ne_bytes(*length);
        let (level, rest) = rest.split_first_chunk()?;
        let (kind, rest) = rest.split_first_chunk()?;
        let data = rest.get(..length.checked_sub(HEADER)?)?;
        self.0 = self.0.get(padded(length)..).unwrap_or_default();
        Some(Item {
            level: i32::from_ne_bytes(*level),
            kind: i32::from_ne_bytes(*kind),
            data,
        })
    }
}

impl Item<'_> {
    /// By its meaning, if it has the right length for it. `own` makes owners of the descriptors.
    fn decode(&self, mut own: impl FnMut(RawFd) -> OwnedFd) -> Ancillary {
        let decoded = match (self.level, self.kind) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                let fds = self
                    .data
                    .as_chunks()
                    .0
                    .iter()
                    .map(|fd| i32::from_ne_bytes(*fd));
                Some(Ancillary::Rights(
                    fds.filter(|fd| *fd >= 0).map(own).collect(),
                ))
            }
            // Negative: the errno for which there is none.
            (libc::SOL_SOCKET, SCM_PIDFD) => {
                let fd = self.int().filter(|fd| *fd >= 0);
                fd.map(|fd| Ancillary::PidFd(own(fd)))
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => self.credentials(),
            (libc::SOL_SOCKET, libc::SCM_TIMESTAMP) => self.timestamp(1_000),
            (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) => self.timestamp(1),
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => self.pktinfo4(),
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => self.pktinfo6(),
            (libc::IPPROTO_IP, libc::IP_TTL) => self.int().map(Ancillary::Ttl),
            (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => self.int().map(Ancillary::HopLimit),
            _ => None,
        };
        decoded.unwrap_or_else(|| Ancillary::Raw {
            level: self.level,
            kind: self.kind,
            data: self.data.to_vec(),
        })
    }

    fn int(&self) -> Option<i32> {
        Some(i32::from_ne_bytes(self.data.try_into().ok()?))
    }

    /// The data as words of four bytes, if they are so many.
    fn words<const COUNT: usize>(&self) -> Option<[[u8; 4]; COUNT]> {
        let (words, rest) = self.data.as_chunks();
        rest.is_empty().then_some(words)?.try_into().ok()
    }

    /// struct ucred.
    fn credentials(&self) -> Option<Ancillary> {
        let [pid, uid, gid] = self.words()?;
        Some(Ancillary::Credentials(Credentials {
            pid: i32::from_ne_bytes(pid),
            uid: u32::from_ne_bytes(uid),
            gid: u32::from_ne_bytes(gid),
        }))
    }

    /// struct timeval or struct timespec: seconds and a fraction in units of `unit_ns`.
    fn timestamp(&self, unit_ns: i64) -> Option<Ancillary> {
        let (fields, rest) = self.data.as_chunks();
        let [seconds, fraction] = <[[u8; 8]; 2]>::try_from(fields)
            .ok()?
            .map(i64::from_ne_bytes);
        let seconds = Duration::from_secs(seconds.try_into().ok()?);
        let fraction = Duration::from_nanos(fraction.checked_mul(unit_ns)?.try_into().ok()?);
        let since_epoch = seconds.checked_add(fraction)?;
        let time = UNIX_EPOCH.checked_add(since_epoch)?;
        rest.is_empty().then_some(Ancillary::Timestamp(time))
    }

    /// struct in_pktinfo.
    fn pktinfo4(&self) -> Option<Ancillary> {
        let [interface, local, destination] = self.words()?;
        Some(Ancillary::PktInfo4 {
            interface: u32::from_ne_bytes(interface),
            local: local.into(),
            destination: destination.into(),
        })
    }

    /// struct in6_pktinfo.
    fn pktinfo6(&self) -> Option<Ancillary> {
        let (destination, interface) = self.data.split_first_chunk::<16>()?;
        Some(Ancillary::PktInfo6 {
            interface: u32::from_ne_bytes(interface.try_into().ok()?),
            destination: (*destination).into(),
        })
    }
}

/// The control data for sendmsg(2), aligned and padded.
fn control_data(items: &[AncillaryToSend<'_>]) -> Result<Vec<ControlWord>> {
    let mut bytes = Vec::new();
    for item in items {
        match *item {
            AncillaryToSend::Rights(fds) => {
                let fds = fds.iter().flat_map(|fd| fd.as_raw_fd().to_ne_bytes());
                let data: Vec<u8> = fds.collect();
                append(&mut bytes, libc::SOL_SOCKET, libc::SCM_RIGHTS, &data)?;
            }
            AncillaryToSend::Credentials(Credentials { pid, uid, gid }) => {
                let data = [pid.to_ne_bytes(), uid.to_ne_bytes(), gid.to_ne_bytes()];
                let kind = libc::SCM_CREDENTIALS;
                append(&mut bytes, libc::SOL_SOCKET, kind, data.as_flattened())?;
            }
            AncillaryToSend::PktInfo4 { interface, source } => {
                let data = [interface.to_ne_bytes(), source.octets(), [0; 4]];
                let kind = libc::IP_PKTINFO;
                append(&mut bytes, libc::IPPROTO_IP, kind, data.as_flattened())?;
            }
            AncillaryToSend::PktInfo6 { interface, source } => {
                let data = [&source.octets()[..], &interface.to_ne_bytes()].concat();
                append(&mut bytes, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &data)?;
            }
            AncillaryToSend::Ttl(ttl) => {
                append(
                    &mut bytes,
                    libc::IPPROTO_IP,
                    libc::IP_TTL,
                    &ttl.to_ne_bytes(),
                )?;
            }
            AncillaryToSend::HopLimit(limit) => {
                let data = limit.to_ne_bytes();
                append(&mut bytes, libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT, &data)?;
            }
            AncillaryToSend::Raw { level, kind, data } => append(&mut bytes, level, kind, data)?,
        }
    }
    bytes.resize(bytes.len().next_multiple_of(size_of::<ControlWord>()), 0);
    let words = bytes.as_chunks().0.iter();
    Ok(words
        .map(|word| ControlWord::from_ne_bytes(*word))
        .collect())
}

/// Appends one control message and its padding.
fn append(bytes: &mut Vec<u8>, level: i32, kind: i32, data: &[u8]) -> Result<()> {
    let length = CMSG_LEN(data.len())
        .and_then(|length| CMSG_SPACE(data.len()).map(|_| length))
        .map_err(|_| Error::Message("ancillary data item too large".into()))?;
    if bytes.len() + padded(length) > CONTROL_BYTES_MAX {
        return Err(Error::Message("too much ancillary data".into()));
    }
    bytes.extend(length.to_ne_bytes());
    bytes.extend(level.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(data);
    bytes.resize(padded(bytes.len()), 0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// xorshift64*, for data that is random and the same every time.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }
    }

    fn as_bytes(words: &[ControlWord]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    /// A descriptor for every number, so that made-up numbers harm nobody.
    fn stand_in(_: RawFd) -> OwnedFd {
        sys::eventfd().unwrap()
    }

    #[test]
    fn control_data_of_random_bytes_neither_panics_nor_reaches_beyond_its_end() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut items = 0;
        for round in 0..200_000 {
            let mut bytes: Vec<u8> = (0..random.next() % 96)
                .map(|_| random.next() as u8)
                .collect();
            // Half of the rounds have lengths, levels and kinds that make sense.
            if round % 2 == 0 && bytes.len() >= HEADER {
                let length = HEADER + (random.next() % 40) as usize;
                bytes[..8].copy_from_slice(&length.to_ne_bytes());
                bytes[8..12]
                    .copy_from_slice(&[0i32, 1, 41][random.next() as usize % 3].to_ne_bytes());
                bytes[12..16].copy_from_slice(&(random.next() as i32 & 63).to_ne_bytes());
            }
            let range = bytes.as_ptr_range();
            for item in Items(&bytes) {
                assert!(item.data.is_empty() || range.contains(&item.data.as_ptr()));
                assert!(item.data.as_ptr_range().end <= range.end);
                drop(item.decode(stand_in));
                items += 1;
            }
        }
        assert!(items > 10_000, "{items} items only");
    }

    #[test]
    fn what_is_encoded_is_decoded_again() {
        let credentials = Credentials {
            pid: 1,
            uid: 2,
            gid: 3,
        };
        let words = control_data(&[
            AncillaryToSend::Raw {
                level: 7,
                kind: 8,
                data: b"abc",
            },
            AncillaryToSend::Credentials(credentials),
            AncillaryToSend::Ttl(64),
            AncillaryToSend::HopLimit(-1),
            AncillaryToSend::PktInfo6 {
                interface: 9,
                source: Ipv6Addr::LOCALHOST,
            },
            AncillaryToSend::PktInfo4 {
                interface: 9,
                source: Ipv4Addr::LOCALHOST,
            },
        ])
        .unwrap();
        let bytes = as_bytes(&words);
        let decoded: Vec<Ancillary> = Items(&bytes).map(|item| item.decode(stand_in)).collect();
        assert_eq!(
            format!("{decoded:?}"),
            "[Raw { level: 7, kind: 8, data: [97, 98, 99] }, Credentials(Credentials { pid: 1, uid: 2, gid: 3 }), Ttl(64), \
             HopLimit(-1), PktInfo6 { interface: 9, destination: ::1 }, \
             PktInfo4 { interface: 9, local: 127.0.0.1, destination: 0.0.0.0 }]"
        );
    }

    #[test]
    fn lengths_that_lie_end_the_data() {
        let words = control_data(&[AncillaryToSend::Ttl(64), AncillaryToSend::Ttl(65)]).unwrap();
        let good = as_bytes(&words);
        assert_eq!(Items(&good).count(), 2);
        for (length, count) in [
            (0, 0),
            (15, 0),
            (16, 1),
            (20, 2),
            (48, 1),
            (49, 0),
            (usize::MAX, 0),
        ] {
            let mut bytes = good.clone();
            bytes[..8].copy_from_slice(&length.to_ne_bytes());
            // At 16, the data of the first is taken for the second's header, whose length 64 is beyond the end.
            assert_eq!(Items(&bytes).count(), count, "length {length}");
        }
        for end in 0..good.len() {
            let whole = usize::from(end >= 20) + usize::from(end >= 44);
            assert_eq!(Items(&good[..end]).count(), whole, "cut to {end} bytes");
        }
    }

    #[test]
    fn a_cut_item_is_raw() {
        for len in [0, 4, 11, 13] {
            let item = Item {
                level: libc::SOL_SOCKET,
                kind: libc::SCM_CREDENTIALS,
                data: &[0; 13][..len],
            };
            assert!(
                matches!(item.decode(stand_in), Ancillary::Raw { data, .. } if data.len() == len)
            );
        }
    }

    #[test]
    fn lengths_and_limits_are_pythons() {
        assert_eq!([0, 1, 8, 9].map(|n| CMSG_LEN(n).unwrap()), [16, 17, 24, 25]);
        assert_eq!(
            [0, 1, 8, 9].map(|n| CMSG_SPACE(n).unwrap()),
            [16, 24, 24, 32]
        );
        // CPython 3.11: the largest arguments that are taken.
        assert!(CMSG_LEN(0x7fff_ffff - 16).is_ok() && CMSG_LEN(0x7fff_ffff - 15).is_err());
        assert!(CMSG_SPACE(0x7fff_ffff - 24).is_ok() && CMSG_SPACE(0x7fff_ffff - 23).is_err());
    }
}
