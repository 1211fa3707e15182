//! Functions of Python's module that make sockets of the usual kind, or concern descriptors that are no socket object.

use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::Ordering;

use super::{BLOCKING, DEFAULT_TIMEOUT_NS, Socket};
use crate::constants::{Family, Kind};
use crate::error::Result;
use crate::sys;
use crate::timeout::Timeout;

/// The type of sockets, under Python's name.
///
/// # Source
///
/// Python [`socket.SocketType`](https://docs.python.org/3/library/socket.html#socket.SocketType).
pub type SocketType = Socket;

/// Creates a socket with the family's usual protocol for the type: [`Socket::new`] under Python's name.
///
/// # Errors
///
/// Those of [`Socket::new`].
///
/// # Source
///
/// Python [`socket.socket(family, type)`](https://docs.python.org/3/library/socket.html#socket.socket);
/// [socket(2)](https://man7.org/linux/man-pages/man2/socket.2.html).
///
/// ```
/// use ringsock::{AF_INET, SOCK_STREAM};
/// let socket = ringsock::socket(AF_INET, SOCK_STREAM)?;
/// assert_eq!(socket.proto(), 0);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn socket(family: Family, kind: Kind) -> Result<Socket> {
    Socket::new(family, kind, 0)
}

/// [`socket`] with a protocol: [`Socket::new`].
///
/// # Errors
///
/// Those of [`Socket::new`].
///
/// # Source
///
/// Python [`socket.socket(family, type, proto)`](https://docs.python.org/3/library/socket.html#socket.socket);
/// [socket(2)](https://man7.org/linux/man-pages/man2/socket.2.html).
///
/// ```
/// use ringsock::{AF_INET, IPPROTO_UDP, SOCK_DGRAM};
/// let socket = ringsock::socket_with(AF_INET, SOCK_DGRAM, IPPROTO_UDP)?;
/// assert_eq!(socket.proto(), IPPROTO_UDP);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn socket_with(family: Family, kind: Kind, proto: i32) -> Result<Socket> {
    Socket::new(family, kind, proto)
}

/// A socket object around a duplicate of a descriptor, which stays the caller's.
///
/// Family, type and protocol are trusted, that it is a socket is checked. The duplicate shares `O_NONBLOCK` and all options with the
/// original. The object is in blocking mode, or has the timeout of [`setdefaulttimeout`]. [`Socket::from_fd`] takes a descriptor over
/// instead, and asks the kernel what it is.
///
/// # Errors
///
/// `ENOTSOCK`: not a socket. `EMFILE`: no free descriptor. `EBADF`: an `O_PATH` descriptor.
///
/// # Source
///
/// Python [`socket.fromfd(fd, family, type, proto)`](https://docs.python.org/3/library/socket.html#socket.fromfd);
/// [fcntl(2)](https://man7.org/linux/man-pages/man2/fcntl.2.html) (`F_DUPFD_CLOEXEC`).
///
/// ```
/// use ringsock::prelude::*;
/// let udp = std::net::UdpSocket::bind("127.0.0.1:0")?;
/// let socket = ringsock::fromfd(&udp, AF_INET, SOCK_DGRAM, 0)?;
/// assert_eq!(socket.getsockname()?, udp.local_addr()?.into());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn fromfd(fd: impl AsFd, family: Family, kind: Kind, proto: i32) -> Result<Socket> {
    let fd = dup(fd)?;
    let mut address = crate::address::SockAddr::empty();
    sys::check(sys::getsockname(fd.as_raw_fd(), &mut address))?;
    Socket::from_fd_with(fd, family, kind, proto)
}

/// A duplicate of a descriptor, not inherited by programs started with `exec`. ([`Socket::dup`] makes a socket object.)
///
/// # Errors
///
/// `EMFILE`: no free descriptor.
///
/// # Source
///
/// Python `socket.dup(fd)`; [fcntl(2)](https://man7.org/linux/man-pages/man2/fcntl.2.html) (`F_DUPFD_CLOEXEC`).
///
/// ```
/// use std::os::fd::AsRawFd;
/// let (left, _right) = ringsock::socketpair()?;
/// assert_ne!(ringsock::dup(&left)?.as_raw_fd(), left.fileno());
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn dup(fd: impl AsFd) -> Result<OwnedFd> {
    sys::duplicate(fd.as_fd().as_raw_fd())
}

/// Closes a descriptor, and says what dropping it would not: an error of the file behind it.
///
/// A connection that the peer has reset counts as closed well. The descriptor is gone in any case. ([`Socket::close`] closes a
/// socket object, which ends its calls first.)
///
/// # Errors
///
/// `EIO`, `ENOSPC`, `EDQUOT`: of files, what an earlier write came to.
///
/// # Source
///
/// Python [`socket.close(fd)`](https://docs.python.org/3/library/socket.html#socket.close) (3.7);
/// [close(2)](https://man7.org/linux/man-pages/man2/close.2.html).
///
/// ```
/// let (left, right) = ringsock::socketpair()?;
/// ringsock::close(left.detach()?)?;
/// assert!(right.recv(1)?.is_empty());
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn close(fd: OwnedFd) -> Result<()> {
    match sys::check(sys::close(fd.into_raw_fd())) {
        // The descriptor is gone, interrupted or not.
        Err(error) if !matches!(error.errno(), Some(libc::ECONNRESET | libc::EINTR)) => Err(error),
        _ => Ok(()),
    }
}

/// Sets the timeout that new sockets start with, in the whole process: those of [`Socket::new`], [`accept`](Socket::accept),
/// [`socketpair`](crate::socketpair), [`fromfd`], [`from_fd`](Socket::from_fd) and of what makes sockets by these.
///
/// It takes the forms of [`settimeout`](Socket::settimeout); at first it is `None`. Sockets that exist keep theirs, and
/// `SOCK_NONBLOCK` still makes a non-blocking one.
///
/// # Errors
///
/// `Value`: negative or NaN. `Overflow`: too large.
///
/// # Source
///
/// Python [`socket.setdefaulttimeout(timeout)`](https://docs.python.org/3/library/socket.html#socket.setdefaulttimeout).
///
/// ```standalone_crate
/// ringsock::setdefaulttimeout(2.5)?;
/// let (left, _right) = ringsock::socketpair()?;
/// assert_eq!(left.gettimeout(), Some(2.5));
/// ringsock::setdefaulttimeout(None)?;
/// assert_eq!(left.gettimeout(), Some(2.5));
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn setdefaulttimeout(timeout: impl Into<Timeout>) -> Result<()> {
    let timeout_ns = timeout.into().as_ns()?.unwrap_or(BLOCKING);
    DEFAULT_TIMEOUT_NS.store(timeout_ns, Ordering::Relaxed);
    Ok(())
}

/// The timeout that new sockets start with, in seconds; `None`: they wait for ever.
///
/// # Source
///
/// Python [`socket.getdefaulttimeout()`](https://docs.python.org/3/library/socket.html#socket.getdefaulttimeout).
///
/// ```
/// assert_eq!(ringsock::getdefaulttimeout(), None);
/// ```
#[must_use]
pub fn getdefaulttimeout() -> Option<f64> {
    match DEFAULT_TIMEOUT_NS.load(Ordering::Relaxed) {
        BLOCKING => None,
        ns => Some(ns as f64 / 1e9),
    }
}
