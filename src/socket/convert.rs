//! From descriptors and std's sockets to [`Socket`] and back, and what else concerns the descriptor: duplicates, inheritance.

use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::{NON_BLOCKING, Socket};
use crate::constants::{
    AF_INET, AF_INET6, AF_UNIX, Family, Kind, SO_ACCEPTCONN, SO_DOMAIN, SO_PROTOCOL, SO_TYPE,
    SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET,
};
use crate::error::{Error, Result};
use crate::fiber::{inflight, ready, watch};
use crate::sys;

impl Socket {
    /// A socket object around a descriptor, which it owns from now on. The kernel says of what family, type and protocol it is.
    ///
    /// The object is in blocking mode, as Python's, or has the timeout of [`setdefaulttimeout`](crate::setdefaulttimeout). In
    /// blocking mode `O_NONBLOCK` stays as it is; where it is set, calls of this object wait all the same (Python's would fail
    /// with `EAGAIN`). `settimeout` makes both agree.
    ///
    /// # Errors
    ///
    /// The descriptor is closed then. `ENOTSOCK`: not a socket. `EBADF`: an `O_PATH` descriptor.
    ///
    /// # Source
    ///
    /// Python `socket.socket(fileno=fd)`; `getsockopt(2)` (`SO_DOMAIN`, `SO_TYPE`, `SO_PROTOCOL`).
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// use std::os::fd::OwnedFd;
    /// let udp = std::net::UdpSocket::bind("127.0.0.1:0")?;
    /// let socket = Socket::from_fd(OwnedFd::from(udp))?;
    /// assert_eq!((socket.family(), socket.kind(), socket.proto()), (AF_INET, SOCK_DGRAM, IPPROTO_UDP));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_fd(fd: OwnedFd) -> Result<Socket> {
        let get = |option| -> Result<i32> {
            let mut value = [0; 4];
            sys::check(sys::getsockopt(
                fd.as_raw_fd(),
                SOL_SOCKET,
                option,
                &mut value,
            ))?;
            Ok(i32::from_ne_bytes(value))
        };
        let family = Family::new(get(SO_DOMAIN)?);
        let kind = Kind::new(get(SO_TYPE)?);
        let proto = get(SO_PROTOCOL)?;
        Socket::from_fd_with(fd, family, kind, proto)
    }

    /// [`from_fd`](Socket::from_fd) with family, type and protocol as given: none of it is checked, only trusted.
    ///
    /// With `SOCK_NONBLOCK` in `kind` the object is in non-blocking mode.
    ///
    /// # Errors
    ///
    /// The descriptor is closed then. `EMFILE`, `ENFILE`: the first socket of a process needs one more descriptor.
    ///
    /// # Source
    ///
    /// Python `socket.socket(family, type, proto, fileno=fd)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// use std::os::fd::OwnedFd;
    /// let udp = std::net::UdpSocket::bind("127.0.0.1:0")?;
    /// let socket = Socket::from_fd_with(OwnedFd::from(udp), AF_INET, SOCK_DGRAM, 0)?;
    /// assert_eq!(socket.proto(), 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_fd_with(fd: OwnedFd, family: Family, kind: Kind, proto: i32) -> Result<Socket> {
        let socket = Socket::adopt(fd, family, kind, proto)?;
        socket.look_for_option_timeouts();
        Ok(socket)
    }

    /// Another object for the same connection, with a descriptor of its own: closing one leaves the other open.
    ///
    /// It starts with this object's timeout and has its own from then on. The descriptors share one open file, and with it
    /// `O_NONBLOCK` and all options: `settimeout` on one changes that flag for both, as in Python. (Calls of this crate wait as
    /// their own object says.)
    ///
    /// # Errors
    ///
    /// `EBADF`: closed. `EMFILE`: no free descriptor.
    ///
    /// # Source
    ///
    /// Python `socket.dup()`; `fcntl(2)` (`F_DUPFD_CLOEXEC`).
    ///
    /// ```
    /// let (left, right) = ringsock::socketpair()?;
    /// let other = left.dup()?;
    /// left.close()?;
    /// other.sendall(b"still open")?;
    /// assert_eq!(right.recv(1024)?, b"still open");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn dup(&self) -> Result<Socket> {
        let fd = self.duplicate_fd()?;
        let timeout_ns = self.timeout_ns();
        let (family, kind, proto) = (self.0.family, self.0.kind, self.0.proto);
        let socket = Socket::adopt_as(fd, family, kind, proto, timeout_ns)?;
        let has_option_timeouts = self.0.has_option_timeouts.load(Ordering::SeqCst);
        let known = &socket.0.has_option_timeouts;
        known.store(has_option_timeouts, Ordering::SeqCst);
        Ok(socket)
    }

    /// A duplicate of the descriptor, never of what `close` puts in its place.
    fn duplicate_fd(&self) -> Result<OwnedFd> {
        let duplicate = sys::duplicate(self.0.fd)?;
        // `close` marks the object before it replaces the file, so what was duplicated before the mark is the socket.
        fence(Ordering::SeqCst);
        self.check_open()?;
        Ok(duplicate)
    }

    /// Gives the descriptor away: the caller owns it, and closing is no longer this crate's.
    ///
    /// From the only handle it is the very descriptor of [`fileno`](Socket::fileno). If there are other handles (clones), it is
    /// a duplicate, and for those the socket is closed as by [`close`](Socket::close): calls that wait fail with `EBADF`, and have
    /// ended when this returns; `fileno` is -1; the old number stays taken until the last handle goes. Nothing is shut down: the
    /// peer sees no end. `O_NONBLOCK` stays as the mode left it: set, if there was a timeout.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed, or detached through another handle (Python answers -1). `EMFILE`: no descriptor free for the duplicate;
    /// the other handles stay open then.
    ///
    /// # Source
    ///
    /// Python `socket.detach()`; `fcntl(2)` (`F_DUPFD_CLOEXEC`).
    ///
    /// ```
    /// use std::io::Read;
    /// let (left, right) = ringsock::socketpair()?;
    /// let mut stream = std::os::unix::net::UnixStream::from(right.detach()?);
    /// left.sendall(b"hello")?;
    /// let mut buffer = [0; 5];
    /// stream.read_exact(&mut buffer)?;
    /// assert_eq!(&buffer, b"hello");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn detach(mut self) -> Result<OwnedFd> {
        self.check_open()?;
        if let Some(inner) = Arc::get_mut(&mut self.0)
            && watch::end_here(&inner.inflight)
        {
            // The handle that went last may have closed the object just now.
            if inner.inflight.is_closed() {
                return Err(Error::from_errno(libc::EBADF));
            }
            return Ok(sys::own(std::mem::replace(&mut inner.fd, -1)));
        }
        let duplicate = self.duplicate_fd()?;
        if !self.close_object() {
            return Err(Error::from_errno(libc::EBADF));
        }
        Ok(duplicate)
    }

    /// Closes the object for all its handles; false if it was closed before.
    pub(super) fn close_object(&self) -> bool {
        let fd = self.0.fd;
        inflight::close(&self.0, || {
            if let Ok(tombstone) = sys::tombstone() {
                ready::keep_for_waits(fd);
                sys::bury(fd, tombstone);
            }
        })
    }

    /// Whether programs started with `exec` inherit the descriptor.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// Python `socket.get_inheritable()`; `fcntl(2)` (`FD_CLOEXEC`).
    ///
    /// ```
    /// let (left, _right) = ringsock::socketpair()?;
    /// assert!(!left.get_inheritable()?);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn get_inheritable(&self) -> Result<bool> {
        let flags = sys::check(sys::descriptor_flags(self.0.fd))?;
        // What lies under the number of a closed socket has flags, too.
        self.check_open()?;
        Ok(flags & libc::FD_CLOEXEC == 0)
    }

    /// Sets whether programs started with `exec` inherit the descriptor. At first they do not.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// Python `socket.set_inheritable(flag)`; `fcntl(2)` (`FD_CLOEXEC`).
    ///
    /// ```
    /// let (left, _right) = ringsock::socketpair()?;
    /// left.set_inheritable(true)?;
    /// assert!(left.get_inheritable()?);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn set_inheritable(&self, inheritable: bool) -> Result<()> {
        self.check_open()?;
        let flags = if inheritable { 0 } else { libc::FD_CLOEXEC };
        sys::check(sys::set_descriptor_flags(self.0.fd, flags))?;
        self.check_open().inspect_err(|_| {
            // Closed meanwhile: the number may be a stand-in by now, which nobody shall inherit.
            sys::set_descriptor_flags(self.0.fd, libc::FD_CLOEXEC);
        })
    }

    /// A socket of std as a socket object: non-blocking mode where `O_NONBLOCK` says so, else the mode of new sockets.
    fn from_std(fd: OwnedFd) -> Result<Socket> {
        let nonblocking = sys::check(sys::status_flags(fd.as_raw_fd()))? & libc::O_NONBLOCK != 0;
        let socket = Socket::from_fd(fd)?;
        if nonblocking {
            let timeout = &socket.0.timeout_ns;
            timeout.store(NON_BLOCKING, Ordering::SeqCst);
        }
        Ok(socket)
    }

    /// The descriptor for a socket of std called `name`, if this is such a socket.
    fn into_std(
        self,
        name: &str,
        families: &[Family],
        kind: Kind,
        listens: Option<bool>,
    ) -> Result<OwnedFd> {
        if !families.contains(&self.0.family) || self.0.kind != kind {
            let (family, kind) = (self.0.family, self.0.kind);
            let text = format!("{name} cannot be a socket of {family:?}, {kind:?}");
            return Err(Error::Type(text.into()));
        }
        if let Some(listens) = listens
            && listens != (self.getsockopt(SOL_SOCKET, SO_ACCEPTCONN)? != 0)
        {
            let state = if listens {
                "does not listen"
            } else {
                "listens"
            };
            let text = format!("{name} cannot be a socket that {state}");
            return Err(Error::Value(text.into()));
        }
        let nonblocking = self.timeout_ns() == NON_BLOCKING;
        let fd = self.detach()?;
        sys::check(sys::set_nonblocking(fd.as_raw_fd(), nonblocking))?;
        Ok(fd)
    }
}

/// As [`Socket::from_fd`].
impl TryFrom<OwnedFd> for Socket {
    type Error = Error;

    fn try_from(fd: OwnedFd) -> Result<Socket> {
        Socket::from_fd(fd)
    }
}

/// As [`Socket::detach`].
impl TryFrom<Socket> for OwnedFd {
    type Error = Error;

    fn try_from(socket: Socket) -> Result<OwnedFd> {
        socket.detach()
    }
}

/// Conversions from and into a socket of std. They can fail, as [`Socket::from_fd`] and [`Socket::detach`] can.
macro_rules! std_socket {
    ($name:ident, $families:expr, $kind:expr, $listens:expr) => {
        /// In non-blocking mode if the socket was, else in that of a new socket; a read or write timeout stays in force (`EAGAIN`).
        impl TryFrom<$name> for Socket {
            type Error = Error;

            fn try_from(socket: $name) -> Result<Socket> {
                Socket::from_std(socket.into())
            }
        }

        /// As [`Socket::detach`], after a look at what it is: `Type` for another family or type, `Value` where one of the two
        /// listens and the other does not. The result is non-blocking if this was; a timeout is forgotten. After an error this
        /// handle is gone all the same: keep a clone to go on.
        impl TryFrom<Socket> for $name {
            type Error = Error;

            fn try_from(socket: Socket) -> Result<$name> {
                let fd = socket.into_std(stringify!($name), &$families, $kind, $listens)?;
                Ok(fd.into())
            }
        }
    };
}
std_socket!(TcpStream, [AF_INET, AF_INET6], SOCK_STREAM, Some(false));
std_socket!(TcpListener, [AF_INET, AF_INET6], SOCK_STREAM, Some(true));
std_socket!(UdpSocket, [AF_INET, AF_INET6], SOCK_DGRAM, None);
std_socket!(UnixStream, [AF_UNIX], SOCK_STREAM, Some(false));
std_socket!(UnixListener, [AF_UNIX], SOCK_STREAM, Some(true));
std_socket!(UnixDatagram, [AF_UNIX], SOCK_DGRAM, None);
