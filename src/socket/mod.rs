//! The socket object: Python's names and meaning over operations on the ring.
//!
//! A [`Socket`] is a handle of a shared object, like a reference to Python's. Each call looks at the object's timeout and then
//! takes one of two ways:
//!
//! ```text
//!  timeout 0 (non-blocking)   ──▶ one system call that does not wait: result, or EAGAIN at once
//!  None, or > 0 s             ──▶ fiber::suspend: one operation on the ring, with a linked deadline if > 0
//!                                 (in a fiber it suspends the fiber, on a plain thread it blocks the thread)
//! ```
//!
//! In blocking mode the kernel's own limits, SO_RCVTIMEO and SO_SNDTIMEO, hold for system calls but not for the ring. A socket
//! that has one is marked by a timeout of its own ([`BY_OPTION`]), so that others pay nothing for it.
//!
//! Calls that never wait (bind, listen, getsockname, options, shutdown) are system calls in every mode.
//!
//! # The life of a socket object
//!
//! ```text
//!   new, accept, socketpair          close()                                      last handle dropped
//!  ───────────────────────▶ open ──────────────▶ closed: the number holds an ─────────────────────────▶ number free
//!                             │                  O_PATH descriptor, calls                                   ▲
//!                             │                  answer EBADF, fileno() is -1                               │
//!                             └─────────────────────────────────────────────────────────────────────────────┘
//!                                        last handle dropped: nothing is in flight (calls borrow a handle)
//! ```
//!
//! What `close` does with calls that are under way is drawn in `fiber/inflight.rs`. This module knows no SQE and no CQE.

pub(crate) mod back_off;
mod convert;
mod create;
mod datagram;
mod file;
mod iterators;
mod message;
mod module;
mod options;
mod queue;
mod sendfile;
mod trace;
mod udp;
mod watched;
mod zero_copy;

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use crate::address::{Address, SockAddr, ToAddress};
use crate::buf::Buf;
use crate::constants::{
    AF_ALG, AF_INET, AF_INET6, AF_UNIX, AF_UNSPEC, Family, Kind, MsgFlags, SOCK_CLOEXEC,
    SOCK_NONBLOCK, SOCK_STREAM,
};
use crate::driver::Op;
use crate::driver::op::{self, timespec_from_ns};
use crate::error::{Error, Result};
use crate::fiber::inflight::{Direction, InFlight};
use crate::fiber::{self, Borrower, error_from_outcome, outcome};
use crate::sys;
use crate::timeout::Timeout;
use watched::StillToWait;

pub use create::{
    CreateConnection, CreateServer, create_connection, create_connection_with, create_server,
    create_server_with, has_dualstack_ipv6,
};
pub use file::{MakeFile, SocketFile};
pub use iterators::{Chunks, Incoming};
#[cfg(fuzzing)]
pub use message::fuzzing_control_messages;
pub use message::{
    Afalg, Ancillary, AncillaryToSend, CMSG_LEN, CMSG_SPACE, Credentials, RecvMsg, RecvMsgInto,
    SendMsg, recv_fds, recv_fds_with, send_fds, send_fds_with,
};
pub use module::{
    SocketType, close, dup, fromfd, getdefaulttimeout, setdefaulttimeout, socket, socket_with,
};
pub use options::{Keepalive, OptionValue};
pub use udp::{Datagrams, Segments, SegmentsIter};

/// `timeout_ns` of a socket in blocking mode.
const BLOCKING: i64 = -1;
/// `timeout_ns` of a socket in non-blocking mode.
const NON_BLOCKING: i64 = 0;
/// `timeout_ns` of a socket in blocking mode that has SO_RCVTIMEO or SO_SNDTIMEO. Of all timeouts, this and `NON_BLOCKING` are
/// the ones without a bit below the sign.
const BY_OPTION: i64 = i64::MIN;

/// `timeout_ns` of new sockets.
static DEFAULT_TIMEOUT_NS: AtomicI64 = AtomicI64::new(BLOCKING);

/// A receive into so many bytes waits for readiness, and then is a plain call. (With 64 KiB 0.95 × the cost of one that the ring makes, with
/// 16 KiB no less.)
const LARGE_RECEIVE: usize = 32 << 10;

/// Receive flags with which the kernel never waits: the error queue and urgent data are there or not. (On a ring it would.)
const FLAGS_THAT_NEVER_WAIT: i32 = libc::MSG_DONTWAIT | libc::MSG_ERRQUEUE | libc::MSG_OOB;

/// Receive flags with which the kernel writes every byte it reports.
const FLAGS_THAT_WRITE: i32 =
    libc::MSG_PEEK | libc::MSG_WAITALL | libc::MSG_OOB | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

/// A network socket with the face of Python's `socket.socket`.
///
/// Every method takes `&self`: any number of fibers and threads may use one socket at once, also to receive and send at the
/// same time. [`Clone`] gives another handle of the same socket (Python's second reference), not a duplicate descriptor.
/// Dropping the last handle closes the descriptor.
///
/// In a fiber a call that has to wait suspends the fiber only; on a plain thread it blocks the thread.
///
/// # Modes
///
/// [`settimeout`](Socket::settimeout) chooses: `None` waits for ever (the default, see
/// [`setdefaulttimeout`](crate::setdefaulttimeout)), more than 0 waits that many seconds and then
/// fails with [`Error::Timeout`], 0 never waits and fails with `EAGAIN`. A timeout loses nothing: bytes that arrived in time are
/// returned, a connection that was accepted is returned.
///
/// # Errors of every call
///
/// - `EBADF`: the socket was closed, also while the call waited.
/// - [`Error::Cancelled`], [`Error::Shutdown`]: the calling fiber was cancelled, or its runtime is ending.
/// - `EAGAIN` in any mode: the call would have to wait, in a destructor that runs because its fiber panics. Such a fiber is
///   never suspended (the others would seem to panic), so there each call makes one attempt, and `close` does not wait.
///
/// # Deadlocks to avoid
///
/// Another fiber of the same thread may run while a call waits. A `std::sync::MutexGuard`, a `RefCell` borrow or a thread-local
/// borrow held across a call can therefore deadlock or panic in that other fiber (it never corrupts anything): end it before
/// the call.
///
/// # Source
///
/// Python `socket` (2.7 and 3.11), `socket(7)`, `ip(7)`, `unix(7)`.
///
/// ```
/// use ringsock::prelude::*;
///
/// ringsock::run(|| {
///     let server = Socket::new(AF_INET, SOCK_STREAM, 0)?;
///     server.bind(("127.0.0.1", 0))?;
///     server.listen(1)?;
///     let address = server.getsockname()?;
///     let client = ringsock::spawn(move || {
///         let client = Socket::new(AF_INET, SOCK_STREAM, 0)?;
///         client.connect(&address)?;
///         client.sendall(b"Hello, world")?;
///         client.recv(1024)
///     });
///     let (conn, _peer) = server.accept()?;
///     let data = conn.recv(1024)?;
///     conn.sendall(&data)?;
///     assert_eq!(client.join().unwrap()?, b"Hello, world");
///     Ok::<(), ringsock::Error>(())
/// })?;
/// # Ok::<(), ringsock::Error>(())
/// ```
#[derive(Clone)]
pub struct Socket(Arc<Inner>);

// In this order, so that what a send and a receive look at lies in two cache lines, next to the count of handles.
#[repr(C)]
struct Inner {
    fd: RawFd,
    family: Family,
    kind: Kind,
    proto: i32,
    timeout_ns: AtomicI64,
    /// What `sendall_later` queued, once it has.
    queue: OnceLock<Box<queue::SendQueue>>,
    /// The socket has SO_RCVTIMEO or SO_SNDTIMEO, as far as this object knows.
    has_option_timeouts: AtomicBool,
    /// A plain receive has found nothing, so the socket is one that can receive.
    receives: AtomicBool,
    /// Who needs `O_NONBLOCK` in whatever mode: see [`force_nonblocking`](Socket::force_nonblocking).
    forced: Forced,
    inflight: InFlight,
    /// The files of `makefile`, and whether `close` waits for the last of them.
    files: file::Files,
    /// Which segments the kernel may be given to cut.
    segmentation: udp::Segmentation,
    /// What its sends without a copy have in common, once there was one to think of.
    zero_copy: OnceLock<Box<zero_copy::Peer>>,
}

/// How many need `O_NONBLOCK` to be set. All of it under [`InFlight::exclusively`].
#[derive(Default)]
struct Forced(AtomicU32);

impl Forced {
    /// It was set before, in a mode without it, by somebody outside.
    const KEPT: u32 = 1 << 31;

    /// Whether this one is the first.
    fn begin(&self) -> bool {
        self.0.fetch_add(1, Ordering::Relaxed) == 0
    }

    /// The flag is not ours to clear.
    fn keep(&self) {
        self.0.fetch_or(Self::KEPT, Ordering::Relaxed);
    }

    /// Whether this one was the last, and the flag is to follow the mode.
    fn end(&self) -> bool {
        match self.0.fetch_sub(1, Ordering::Relaxed) {
            1 => true,
            last if last == Self::KEPT + 1 => {
                self.0.store(0, Ordering::Relaxed);
                false
            }
            _ => false,
        }
    }

    fn is_needed(&self) -> bool {
        self.0.load(Ordering::Relaxed) & !Self::KEPT != 0
    }

    /// The mode has been set since.
    fn forget_kept(&self) {
        self.0.fetch_and(!Self::KEPT, Ordering::Relaxed);
    }
}

impl AsRef<InFlight> for Inner {
    fn as_ref(&self) -> &InFlight {
        &self.inflight
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The last handle is gone, and with it every call. Open or closed, the number is ours, unless `detach` gave it away.
        if self.fd >= 0 {
            fiber::watch::end(&self.inflight);
            sys::close(self.fd);
        }
        fiber::settle();
    }
}

/// Two connected sockets of the family AF_UNIX and the type SOCK_STREAM, both in blocking mode.
///
/// # Errors
///
/// `EMFILE`, `ENFILE`: no free descriptor. `ENOMEM`.
///
/// # Source
///
/// Python `socket.socketpair()`; `socketpair(2)`.
///
/// ```
/// let (left, right) = ringsock::socketpair()?;
/// left.sendall(b"ping")?;
/// assert_eq!(right.recv(16)?, b"ping");
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn socketpair() -> Result<(Socket, Socket)> {
    socketpair_with(AF_UNIX, SOCK_STREAM, 0)
}

/// [`socketpair`] of another family, type or protocol. Linux knows pairs of AF_UNIX (and AF_TIPC) only.
///
/// # Errors
///
/// Those of [`socketpair`]; `EOPNOTSUPP`: the family has no pairs; `EAFNOSUPPORT`, `EPROTONOSUPPORT`, `EINVAL`: as for
/// [`Socket::new`].
///
/// # Source
///
/// Python `socket.socketpair(family, type, proto)`; `socketpair(2)`.
///
/// ```
/// use ringsock::prelude::*;
/// let (left, right) = ringsock::socketpair_with(AF_UNIX, SOCK_SEQPACKET, 0)?;
/// left.send(b"one")?;
/// left.send(b"two")?;
/// assert_eq!(right.recv(1024)?, b"one");
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn socketpair_with(family: Family, kind: Kind, proto: i32) -> Result<(Socket, Socket)> {
    let (left, right) = sys::socketpair(family.bits(), kind.bits(), proto)?;
    Ok((
        Socket::adopt(left, family, kind, proto)?,
        Socket::adopt(right, family, kind, proto)?,
    ))
}

/// A new buffer of at most `bufsize` bytes, filled by `receive`.
#[inline(always)]
fn receive_buf(
    bufsize: usize,
    flags: MsgFlags,
    receive: impl FnOnce(&mut [MaybeUninit<u8>]) -> Result<usize>,
) -> Result<Buf> {
    let mut bytes: Vec<u8> = Vec::new();
    bytes
        .try_reserve_exact(bufsize)
        .map_err(|_| Error::from_errno(libc::ENOMEM))?;
    let spare = &mut bytes.spare_capacity_mut()[..bufsize];
    prepare_uninit(spare, flags);
    let received = receive(spare)?.min(bufsize);
    sys::set_received(&mut bytes, received);
    // Python's result owns no more than it shows; a mostly empty buffer is given back.
    if received < bufsize / 2 {
        bytes.shrink_to_fit();
    }
    Ok(Buf::from_vec(bytes))
}

/// Clears the buffer where the kernel may report bytes that it did not write: with MSG_TRUNC and whatever else is not known.
#[inline(always)]
fn prepare_uninit(buffer: &mut [MaybeUninit<u8>], flags: MsgFlags) {
    if flags.bits() & !FLAGS_THAT_WRITE != 0 {
        buffer.fill(MaybeUninit::new(0));
    }
}

impl Socket {
    /// Creates a socket. It is in blocking mode (non-blocking with `SOCK_NONBLOCK`), or has the timeout of
    /// [`setdefaulttimeout`](crate::setdefaulttimeout), and is not inherited by programs started with `exec`.
    ///
    /// `proto` is usually 0: the family's usual protocol for the type.
    ///
    /// # Errors
    ///
    /// `EAFNOSUPPORT`: no such family here. `EINVAL`: no such type. `EPROTONOSUPPORT`: the family has no such protocol.
    /// `EACCES`, `EPERM`: raw and packet sockets need a privilege. `EMFILE`, `ENFILE`: no free descriptor. `ENOMEM`, `ENOBUFS`.
    ///
    /// # Source
    ///
    /// Python `socket.socket(family, type, proto)`; `socket(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET6, SOCK_STREAM, 0)?;
    /// assert_eq!(socket.family(), AF_INET6);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn new(family: Family, kind: Kind, proto: i32) -> Result<Socket> {
        let fd = sys::socket(family.bits(), kind.bits(), proto)?;
        Socket::adopt(fd, family, kind, proto)
    }

    /// A socket object around a new descriptor, in the mode of new sockets.
    fn adopt(fd: OwnedFd, family: Family, kind: Kind, proto: i32) -> Result<Socket> {
        if kind.bits() & SOCK_NONBLOCK.bits() != 0 {
            return Socket::adopt_as(fd, family, kind, proto, NON_BLOCKING);
        }
        let timeout_ns = DEFAULT_TIMEOUT_NS.load(Ordering::Relaxed);
        if timeout_ns != BLOCKING {
            sys::check(sys::set_nonblocking(fd.as_raw_fd(), true))?;
        }
        Socket::adopt_as(fd, family, kind, proto, timeout_ns)
    }

    /// A socket object around a descriptor whose `O_NONBLOCK` is as the timeout wants it.
    fn adopt_as(
        fd: OwnedFd,
        family: Family,
        kind: Kind,
        proto: i32,
        timeout_ns: i64,
    ) -> Result<Socket> {
        // What `close` will need must not depend on a free descriptor then.
        sys::tombstone()?;
        Ok(Socket(Arc::new(Inner {
            fd: fd.into_raw_fd(),
            family,
            kind: Kind::new(kind.bits() & !(SOCK_NONBLOCK.bits() | SOCK_CLOEXEC.bits())),
            proto,
            timeout_ns: AtomicI64::new(timeout_ns),
            has_option_timeouts: AtomicBool::new(false),
            receives: AtomicBool::new(false),
            forced: Forced::default(),
            files: file::Files::new(),
            queue: OnceLock::new(),
            segmentation: udp::Segmentation::new(),
            zero_copy: OnceLock::new(),
            inflight: InFlight::new(),
        })))
    }

    // Connecting and accepting.

    /// Binds the socket to a local address.
    ///
    /// # Errors
    ///
    /// `EADDRINUSE`: taken (see `SO_REUSEADDR`). `EADDRNOTAVAIL`: no such address here. `EACCES`: a privileged port, or no right
    /// to create the path. `EINVAL`: bound already. Address errors: see [`ToAddress`].
    ///
    /// # Source
    ///
    /// Python `socket.bind(address)`; `bind(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// socket.bind(("", 0))?; // any interface, a port of the kernel's choice
    /// assert_ne!(socket.getsockname()?.port(), Some(0));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn bind(&self, address: impl ToAddress) -> Result<()> {
        let address = address.to_address(self.0.family)?.encode()?;
        sys::check(sys::bind(self.0.fd, &address)).map(drop)
    }

    /// Lets the socket accept connections. `backlog` is how many may wait to be accepted, at most `net.core.somaxconn`;
    /// a negative number counts as 0.
    ///
    /// # Errors
    ///
    /// `EADDRINUSE`: another socket listens on the port. `EOPNOTSUPP`: not for this type. `EINVAL`: an AF_UNIX socket that is not bound.
    ///
    /// # Source
    ///
    /// Python `socket.listen(backlog)`; `listen(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// socket.listen(128)?; // without bind, the kernel picks a port
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn listen(&self, backlog: i32) -> Result<()> {
        self.0.receives.store(false, Ordering::Relaxed);
        sys::check(sys::listen(self.0.fd, backlog.max(0))).map(drop)
    }

    /// Waits for a connection: the new socket and the peer's address. Whatever mode this socket is in, the new one is in
    /// blocking mode (or has the timeout of [`setdefaulttimeout`](crate::setdefaulttimeout)), and it is not inherited by programs
    /// started with `exec`.
    ///
    /// # Errors
    ///
    /// `Timeout`; `EAGAIN` in non-blocking mode. `EINVAL`: not listening. `EMFILE`, `ENFILE`: no free descriptor (the connection
    /// stays in the backlog: free some, or wait, before calling again). `ECONNABORTED`: the peer gave up meanwhile. `EOPNOTSUPP`:
    /// not for this type.
    ///
    /// # Source
    ///
    /// Python `socket.accept()`; `accept4(2)`; `IORING_OP_ACCEPT`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// # let server = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// # server.bind(("127.0.0.1", 0))?;
    /// # server.listen(1)?;
    /// server.settimeout(0.01)?;
    /// assert_eq!(server.accept().unwrap_err(), Error::Timeout);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn accept(&self) -> Result<(Socket, Address)> {
        self.traced("accept", self.accept_by_mode())
    }

    fn accept_by_mode(&self) -> Result<(Socket, Address)> {
        let mut address = SockAddr::empty();
        if self.0.family == AF_ALG {
            // It never waits, and where an address is asked for the kernel refuses: these sockets have none.
            let fd = sys::check(sys::accept4_without_address(self.0.fd))?;
            return self.accepted(fd, &address);
        }
        if self.timeout_ns() == NON_BLOCKING {
            return self.accept_now();
        }
        let op = Op::Accept {
            fd: self.0.fd,
            address: &mut address,
        };
        let fd = self.run(op, Direction::In)?;
        self.accepted(fd, &address)
    }

    /// [`accept`](Socket::accept) without waiting, in any mode: `EAGAIN` if no connection is there.
    pub(crate) fn accept_now(&self) -> Result<(Socket, Address)> {
        let mut address = SockAddr::empty();
        let mut op = Op::Accept {
            fd: self.0.fd,
            address: &mut address,
        };
        let attempt = || op.attempt_despite_signals();
        let fd = sys::check(self.0.inflight.exclusively(attempt))?;
        self.accepted(fd, &address)
    }

    /// [`accept_now`](Socket::accept_now), after [`force_nonblocking`](Socket::force_nonblocking).
    pub(crate) fn accept_by_flag(&self) -> Result<(Socket, Address)> {
        let mut address = SockAddr::empty();
        let fd = sys::check(sys::accept4(self.0.fd, &mut address))?;
        self.accepted(fd, &address)
    }

    fn accepted(&self, fd: RawFd, address: &SockAddr) -> Result<(Socket, Address)> {
        let fd = sys::own(fd);
        let socket = Socket::adopt(fd, self.0.family, self.0.kind, self.0.proto)?;
        if self.0.has_option_timeouts.load(Ordering::SeqCst) {
            // The new socket has inherited them, on TCP.
            socket.look_for_option_timeouts();
        }
        let peer = address
            .decode()
            .unwrap_or_else(|| Address::unspecified(self.0.family));
        Ok((socket, peer))
    }

    /// Connects to a remote address.
    ///
    /// # Errors
    ///
    /// `ECONNREFUSED`, `ENETUNREACH`, `EHOSTUNREACH`, `ETIMEDOUT` (the kernel's own limit): as they are. `Timeout`: the socket's timeout
    /// passed; the socket goes on connecting, so close it, or expect `EALREADY` or `EISCONN` from another `connect`.
    /// `EINPROGRESS` in non-blocking mode: the connection is under way. `EISCONN`: connected already. `EAGAIN`: the backlog of an
    /// AF_UNIX listener is full, and the socket has a timeout (as in Python). Address errors: see [`ToAddress`].
    ///
    /// # Source
    ///
    /// Python `socket.connect(address)`; `connect(2)`; `IORING_OP_CONNECT`.
    ///
    /// ```no_run
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// socket.settimeout(5)?;
    /// socket.connect(("127.0.0.1", 50007))?;
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn connect(&self, address: impl ToAddress) -> Result<()> {
        let address = address.to_address(self.0.family)?.encode()?;
        self.traced("connect", self.connect_to(&address))
    }

    /// [`connect`](Socket::connect) with the errno as the result: 0 once connected, `EAGAIN` (11) when the timeout passed,
    /// `EINPROGRESS` (115) in non-blocking mode, `ECONNREFUSED` (111), `EBADF` (9) when closed, and so on.
    ///
    /// A connection in progress is established, or has failed, once the descriptor is writable; `getsockopt(SOL_SOCKET,
    /// SO_ERROR)` then says which: 0, or the errno.
    ///
    /// # Errors
    ///
    /// Only what has no errno: address errors (see [`ToAddress`]), `Cancelled`, `Shutdown`.
    ///
    /// # Source
    ///
    /// Python `socket.connect_ex(address)`; `connect(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let server = ringsock::create_server(("127.0.0.1", 0))?;
    /// let client = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// assert_eq!(client.connect_ex(server.getsockname()?)?, 0);
    /// assert_eq!(client.connect_ex(server.getsockname()?)?, 106); // EISCONN
    /// client.close()?;
    /// assert_eq!(client.connect_ex(server.getsockname()?)?, 9); // EBADF
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn connect_ex(&self, address: impl ToAddress) -> Result<i32> {
        let address = address.to_address(self.0.family)?.encode()?;
        match self.traced("connect", self.connect_to(&address)) {
            Ok(()) => Ok(0),
            Err(Error::Timeout) => Ok(libc::EAGAIN),
            Err(Error::Os { errno, .. }) => Ok(errno),
            Err(error) => Err(error),
        }
    }

    fn connect_to(&self, address: &SockAddr) -> Result<()> {
        let timeout_ns = self.timeout_ns();
        // On AF_UNIX only a full backlog makes connect wait, and Python does not wait for that once there is a timeout.
        if timeout_ns == NON_BLOCKING || (timeout_ns > 0 && self.0.family == AF_UNIX) {
            let fd = self.0.fd;
            let attempt = || Op::Connect { fd, address }.attempt();
            return sys::check(self.0.inflight.exclusively(attempt)).map(drop);
        }
        if timeout_ns == BY_OPTION && self.0.family == AF_UNIX {
            return self.connect_unix_by_option(address);
        }
        let op = Op::Connect {
            fd: self.0.fd,
            address,
        };
        match self.run(op, Direction::Out) {
            // An earlier connect timed out and goes on. In blocking mode connect(2) waits for it.
            Err(error) if error.errno() == Some(libc::EALREADY) && timeout_ns < 0 => {
                let op = Op::Poll {
                    fd: self.0.fd,
                    events: libc::POLLOUT,
                };
                match self.run(op, Direction::Out) {
                    // SO_SNDTIMEO: it goes on still.
                    Err(error) if error.errno() == Some(libc::EAGAIN) => {
                        return Err(Error::from_errno(libc::EALREADY));
                    }
                    ready => ready?,
                };
                sys::check(sys::connect_outcome(self.0.fd)).map(drop)
            }
            Err(error)
                if timeout_ns < 0
                    && matches!(self.0.family, AF_INET | AF_INET6)
                    && matches!(
                        error.errno(),
                        Some(
                            libc::ECONNREFUSED
                                | libc::ETIMEDOUT
                                | libc::EHOSTUNREACH
                                | libc::ENETUNREACH
                        )
                    ) =>
            {
                // connect(2) that waited and failed leaves the socket as it was before; the ring's leaves it half connected.
                let _ = sys::connect(self.0.fd, &Address::unspecified(AF_UNSPEC).encode()?);
                Err(error)
            }
            other => other.map(drop),
        }
    }

    /// On AF_UNIX with SO_SNDTIMEO: by attempts. On the ring a kernel thread would wait, which ends by that option as well, in a
    /// race with our deadline for it; and there is nothing to poll for while a backlog is full.
    #[cold]
    fn connect_unix_by_option(&self, address: &SockAddr) -> Result<()> {
        const PAUSE_NS: i64 = 5_000_000;
        let fd = self.0.fd;
        let limit_ns = match sys::option_timeout_ns(fd, libc::SO_SNDTIMEO) {
            Ok(limit_ns) => limit_ns.unwrap_or(i64::MAX),
            Err(errno) => return Err(Error::from_errno(errno)),
        };
        let deadline_ns = fiber::now_ns().saturating_add(limit_ns);
        loop {
            let connected = Op::Connect { fd, address }.attempt();
            let now_ns = fiber::now_ns();
            let left_ns = deadline_ns - now_ns;
            if connected != -libc::EAGAIN || left_ns <= 0 {
                return sys::check(connected).map(drop);
            }
            let mut pause = Op::Sleep {
                duration: timespec_from_ns(PAUSE_NS * 100),
            };
            let target = Some((&self.0.inflight, Direction::Out));
            let pause_ns = left_ns.min(PAUSE_NS);
            match fiber::suspend(&mut pause, pause_ns, target) {
                // Sooner, it is the end of an enclosing `timeout`.
                outcome::TIMED_OUT if fiber::now_ns() >= now_ns + pause_ns => {}
                code => return Err(error_from_outcome(code)),
            }
        }
    }

    // Receiving.

    /// Receives at most `bufsize` bytes: what has arrived, as soon as there is any. An empty result is the end of the stream.
    /// With `bufsize` 0 the result is empty at once.
    ///
    /// In a fiber, the bytes of a stream come in a buffer that the worker lends once they are there (see [`Buf`]), so a
    /// connection that waits holds none.
    ///
    /// # Errors
    ///
    /// `Timeout`; `EAGAIN` in non-blocking mode. `ECONNRESET`: the peer is gone. `ENOTCONN`: not connected.
    ///
    /// # Source
    ///
    /// Python `socket.recv(bufsize)`; `recv(2)`; `IORING_OP_RECV`, with a lent buffer `IORING_OP_POLL_ADD`.
    ///
    /// ```
    /// let (left, right) = ringsock::socketpair()?;
    /// left.sendall(b"hello")?;
    /// drop(left);
    /// assert_eq!(right.recv(3)?, b"hel");
    /// assert_eq!(right.recv(3)?, b"lo");
    /// assert!(right.recv(3)?.is_empty());
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recv(&self, bufsize: usize) -> Result<Buf> {
        self.recv_with(bufsize, MsgFlags::default())
    }

    /// [`recv`](Socket::recv) with flags: `MSG_PEEK`, `MSG_WAITALL`, `MSG_DONTWAIT`, …
    ///
    /// With `MSG_WAITALL` on a stream it waits until `bufsize` bytes are there; with `MSG_PEEK` as well it does not wait for more
    /// than the first.
    /// `MSG_OOB` and `MSG_ERRQUEUE` never wait, as for the kernel. With `MSG_TRUNC` the result is cut to `bufsize` (see
    /// [`recv_into_with`](Socket::recv_into_with) for the length), and bytes that the kernel discarded read as zeros.
    ///
    /// # Errors
    ///
    /// Those of [`recv`](Socket::recv); `EAGAIN` with `MSG_DONTWAIT`.
    ///
    /// # Source
    ///
    /// Python `socket.recv(bufsize, flags)`; `recv(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let (left, right) = ringsock::socketpair()?;
    /// left.sendall(b"hello")?;
    /// assert_eq!(right.recv_with(2, MSG_PEEK)?, b"he");
    /// assert_eq!(right.recv(2)?, b"he");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recv_with(&self, bufsize: usize, flags: MsgFlags) -> Result<Buf> {
        if bufsize == 0 {
            return Ok(Buf::default());
        }
        let timeout_ns = self.timeout_ns();
        if self.0.kind == SOCK_STREAM
            && flags == MsgFlags::default()
            && timeout_ns != NON_BLOCKING
            && let Some(borrower) = fiber::Borrower::of(bufsize)
        {
            let mut received = Buf::default();
            let result = match self.recv_lease(borrower, timeout_ns, &mut received) {
                code @ ..0 => Err(error_from_outcome(code)),
                _ => Ok(received),
            };
            return self.traced("recv", result);
        }
        receive_buf(bufsize, flags, |buffer| self.recv_raw(buffer, flags))
    }

    /// A receive in a fiber, into a buffer that is taken once there is something to put into it: the bytes or a code.
    #[inline(always)]
    fn recv_lease(&self, borrower: Borrower, mut timeout_ns: i64, out: &mut Buf) -> i32 {
        if self.0.inflight.watch().is_some() {
            match self.recv_lease_watched(borrower, timeout_ns, out) {
                Ok(code) => return code,
                Err(StillToWait(left_ns)) => timeout_ns = left_ns,
            }
        }
        match borrower.receive_in_turn(self.0.fd, out) {
            Some(code) => code,
            None => self.recv_lease_later(borrower, timeout_ns, out),
        }
    }

    /// Waits for readiness rather than for the receive itself: the ring would have to be lent a buffer for all that time.
    ///
    /// `timeout_ns` is that of the call's start: another fiber, which had its turn meanwhile, may have changed the mode.
    #[inline(never)]
    fn recv_lease_later(&self, borrower: Borrower, timeout_ns: i64, out: &mut Buf) -> i32 {
        match self.recv_lease_newly_watched(borrower, timeout_ns, out) {
            Ok(code) => code,
            Err(StillToWait(left_ns)) => {
                self.wait_and_receive(left_ns, || borrower.receive_now(self.0.fd, out))
            }
        }
    }

    /// Waits for readiness of a stream and has `receive` receive by a plain call, until there was something: the bytes or a code. (Of
    /// datagrams that is not the same as waiting for the receive: after SHUT_RD, AF_UNIX tells the end to a receive that waits, but is
    /// not ready.)
    ///
    /// A socket with reports in its error queue (time stamps of what was sent, say) is always ready with POLLERR. They are its owner's
    /// to read, so there the wait is a look at the first byte.
    #[inline(always)]
    fn wait_and_receive(&self, timeout_ns: i64, mut receive: impl FnMut() -> i32) -> i32 {
        let fd = self.0.fd;
        let deadline_ns = match timeout_ns {
            1.. => fiber::now_ns().saturating_add(timeout_ns),
            _ => i64::MAX,
        };
        let mut left_ns = timeout_ns;
        let mut has_reports = false;
        // Where a receive would fail at once, a poll may wait all the same (a listening socket), so a first one goes before it.
        let mut ready = !self.0.receives.load(Ordering::Relaxed);
        if ready && let Some(code) = fiber::outcome_so_far() {
            return code;
        }
        loop {
            if ready {
                match receive() {
                    code if matches!(-code, libc::EAGAIN | libc::EINTR) => {
                        self.0.receives.store(true, Ordering::Relaxed);
                    }
                    code => return code,
                }
                if timeout_ns > 0 {
                    left_ns = deadline_ns - fiber::now_ns();
                    if left_ns <= 0 {
                        return outcome::TIMED_OUT;
                    }
                }
            }
            let events = libc::POLLIN;
            let code = if has_reports {
                self.wait_for_first_byte(left_ns)
            } else {
                self.wait(&mut Op::Poll { fd, events }, Direction::In, left_ns)
            };
            if code < 0 {
                return code;
            }
            has_reports |= code == i32::from(libc::POLLERR);
            ready = true;
        }
    }

    #[cold]
    #[inline(never)]
    fn wait_for_first_byte(&self, timeout_ns: i64) -> i32 {
        let mut first = Op::Recv {
            fd: self.0.fd,
            buffer: &mut [MaybeUninit::uninit()],
            flags: libc::MSG_PEEK,
            found_nothing: false,
        };
        self.wait(&mut first, Direction::In, timeout_ns)
    }

    /// Receives into memory that need not be initialised: the part of `buffer` that was filled, empty at the end of the stream
    /// (or, at once, for an empty buffer).
    ///
    /// # Errors
    ///
    /// Those of [`recv`](Socket::recv).
    ///
    /// # Source
    ///
    /// `recv(2)`; `IORING_OP_RECV` straight into the buffer.
    ///
    /// ```
    /// use std::mem::MaybeUninit;
    /// let (left, right) = ringsock::socketpair()?;
    /// left.sendall(b"hello")?;
    /// let mut buffer = [MaybeUninit::uninit(); 16];
    /// assert_eq!(right.recv_uninit(&mut buffer)?, b"hello");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recv_uninit<'a>(&self, buffer: &'a mut [MaybeUninit<u8>]) -> Result<&'a mut [u8]> {
        self.recv_uninit_with(buffer, MsgFlags::default())
    }

    /// [`recv_uninit`](Socket::recv_uninit) with flags. Where the kernel may count bytes that it did not write (`MSG_TRUNC`), the
    /// buffer is cleared first, and the result is no longer than the buffer.
    ///
    /// # Errors
    ///
    /// Those of [`recv_with`](Socket::recv_with).
    ///
    /// # Source
    ///
    /// `recv(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// use std::mem::MaybeUninit;
    /// let (left, right) = ringsock::socketpair()?;
    /// left.sendall(b"hello")?;
    /// let mut buffer = [MaybeUninit::uninit(); 2];
    /// assert_eq!(right.recv_uninit_with(&mut buffer, MSG_PEEK)?, b"he");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recv_uninit_with<'a>(
        &self,
        buffer: &'a mut [MaybeUninit<u8>],
        flags: MsgFlags,
    ) -> Result<&'a mut [u8]> {
        prepare_uninit(buffer, flags);
        let received = self.recv_raw(buffer, flags)?.min(buffer.len());
        Ok(sys::received(buffer, received))
    }

    /// Receives into `buffer`: how many bytes arrived, 0 at the end of the stream (or, at once, for an empty buffer).
    ///
    /// # Errors
    ///
    /// Those of [`recv`](Socket::recv).
    ///
    /// # Source
    ///
    /// Python `socket.recv_into(buffer)`; `recv(2)`; `IORING_OP_RECV` straight into the buffer.
    ///
    /// ```
    /// let (left, right) = ringsock::socketpair()?;
    /// left.sendall(b"hello")?;
    /// let mut buffer = [0u8; 16];
    /// let n = right.recv_into(&mut buffer)?;
    /// assert_eq!(&buffer[..n], b"hello");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    #[inline]
    pub fn recv_into(&self, buffer: &mut [u8]) -> Result<usize> {
        self.recv_raw(sys::as_uninit(buffer), MsgFlags::default())
    }

    /// [`recv_into`](Socket::recv_into) of at most `nbytes` bytes (0: as many as fit), with flags.
    ///
    /// With `MSG_TRUNC` the result is the length of the whole datagram, which may be more than the buffer holds; on TCP that
    /// flag discards the bytes.
    ///
    /// # Errors
    ///
    /// Those of [`recv`](Socket::recv); `Value`: the buffer is smaller than `nbytes`.
    ///
    /// # Source
    ///
    /// Python `socket.recv_into(buffer, nbytes, flags)`; `recv(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let (left, right) = ringsock::socketpair()?;
    /// left.sendall(b"hello")?;
    /// let mut buffer = [0u8; 16];
    /// assert_eq!(right.recv_into_with(&mut buffer, 4, MSG_PEEK)?, 4);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recv_into_with(
        &self,
        buffer: &mut [u8],
        nbytes: usize,
        flags: MsgFlags,
    ) -> Result<usize> {
        let room = first(buffer, nbytes, "buffer too small for requested bytes")?;
        self.recv_raw(sys::as_uninit(room), flags)
    }

    // Inlined into its caller, the switches are a call and a return to the processor's predictor.
    #[inline]
    fn recv_raw(&self, buffer: &mut [MaybeUninit<u8>], flags: MsgFlags) -> Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let flags = self.flags_for_ring(flags);
        let mut timeout_ns = self.timeout_ns();
        if self.0.inflight.watch().is_some() && flags == 0 {
            match self.recv_if_watched(buffer, timeout_ns) {
                Ok(code) => return self.traced("recv", transferred(code)),
                Err(StillToWait(left_ns)) => timeout_ns = left_ns,
            }
        }
        let received = self.receive(
            Op::Recv {
                fd: self.0.fd,
                buffer,
                flags,
                found_nothing: false,
            },
            flags,
            timeout_ns,
        );
        self.traced("recv", received)
    }

    /// A receive's flags, without MSG_WAITALL where the ring goes on after a part though recv(2) would not: it puts packets of a
    /// SOCK_SEQPACKET together, and with MSG_PEEK it looks at the same bytes again and again.
    #[inline(always)]
    fn flags_for_ring(&self, flags: MsgFlags) -> i32 {
        let flags = flags.bits();
        if flags & libc::MSG_WAITALL != 0
            && (self.0.kind != SOCK_STREAM || flags & libc::MSG_PEEK != 0)
        {
            return flags & !libc::MSG_WAITALL;
        }
        flags
    }

    /// The bytes that a receive, with these flags, brings that may wait for so long (as a socket's timeout).
    #[inline(always)]
    fn receive(&self, mut op: Op<'_>, flags: i32, timeout_ns: i64) -> Result<usize> {
        if timeout_ns == NON_BLOCKING || flags & FLAGS_THAT_NEVER_WAIT != 0 {
            if flags & libc::MSG_OOB != 0 {
                // Once it is read, nothing shows any more that receives stop where it was.
                self.0.inflight.never_watch();
            }
            return self.attempt(op);
        }
        // A plain call would be satisfied with less than MSG_WAITALL asks for.
        if flags & libc::MSG_WAITALL == 0
            && let Some(code) = self.attempt_in_turn(&mut op, timeout_ns)
        {
            return transferred(code);
        }
        transferred(self.receive_later(&mut op, timeout_ns))
    }

    #[inline(always)]
    fn attempt_in_turn(&self, op: &mut Op<'_>, timeout_ns: i64) -> Option<i32> {
        let receives = self.0.receives.load(Ordering::Relaxed);
        fiber::attempt_in_turn(op, timeout_ns >= 0, receives)
    }

    #[inline(never)]
    fn receive_later(&self, op: &mut Op<'_>, mut timeout_ns: i64) -> i32 {
        if let Op::Recv {
            buffer, flags: 0, ..
        } = op
            && let Some(watched) = self.begin_watch(timeout_ns)
        {
            match self.recv_watched(&watched, buffer, timeout_ns) {
                Ok(code) => return code,
                Err(StillToWait(left_ns)) => timeout_ns = left_ns,
            }
        }
        if let Op::Recv {
            buffer, flags: 0, ..
        } = op
            && buffer.len() >= LARGE_RECEIVE
            && self.0.kind == SOCK_STREAM
            && fiber::worker().is_some()
        {
            return self.receive_large(buffer, timeout_ns);
        }
        let code = self.wait(op, Direction::In, timeout_ns);
        if code > 0 {
            self.0.receives.store(true, Ordering::Relaxed);
        }
        code
    }

    /// A receive of much: the kernel makes the receives of a turn in a row, so what came first is out of the cache when its fiber
    /// has its turn; by a plain call then, it is not.
    #[inline(never)]
    fn receive_large(&self, buffer: &mut [MaybeUninit<u8>], timeout_ns: i64) -> i32 {
        self.wait_and_receive(timeout_ns, || {
            sys::recv(self.0.fd, buffer, libc::MSG_DONTWAIT)
        })
    }

    // Sending.

    /// Sends bytes: how many the kernel took. In blocking mode a stream socket takes them all; with a timeout, or in
    /// non-blocking mode, the rest is the caller's to send.
    ///
    /// # Errors
    ///
    /// `Timeout`, `EAGAIN`: nothing was sent. `EPIPE`: the connection is shut down for sending (no SIGPIPE is raised).
    /// `ECONNRESET`: the peer is gone. `ENOTCONN`, `EDESTADDRREQ`: not connected. `EMSGSIZE`: too long for one datagram.
    ///
    /// # Source
    ///
    /// Python `socket.send(bytes)`; `send(2)`; `IORING_OP_SEND`.
    ///
    /// ```
    /// let (left, right) = ringsock::socketpair()?;
    /// assert_eq!(left.send(b"hello")?, 5);
    /// # assert_eq!(right.recv(16)?, b"hello");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn send(&self, bytes: &[u8]) -> Result<usize> {
        self.send_with(bytes, MsgFlags::default())
    }

    /// [`send`](Socket::send) with flags: `MSG_OOB`, `MSG_MORE`, `MSG_DONTWAIT`, …
    ///
    /// # Errors
    ///
    /// Those of [`send`](Socket::send); `EAGAIN` with `MSG_DONTWAIT`.
    ///
    /// # Source
    ///
    /// Python `socket.send(bytes, flags)`; `send(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let (left, right) = ringsock::socketpair()?;
    /// assert_eq!(left.send_with(b"hello", MSG_DONTWAIT)?, 5);
    /// # assert_eq!(right.recv(16)?, b"hello");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn send_with(&self, bytes: &[u8], flags: MsgFlags) -> Result<usize> {
        self.traced("send", self.send_raw(bytes, flags.bits(), None))
    }

    /// `send`, or with an address `sendto`.
    #[inline(always)]
    fn send_raw(&self, bytes: &[u8], flags: i32, to: Option<&SockAddr>) -> Result<usize> {
        self.send_behind_queue(flags)?;
        let timeout_ns = self.timeout_ns();
        let mut op = self.send_op(bytes, flags, to);
        if timeout_ns == NON_BLOCKING || flags & libc::MSG_DONTWAIT != 0 {
            return self.attempt(op);
        }
        let mut sent = match fiber::attempt_directly(&mut op, self.sends_plainly()) {
            None if timeout_ns > 0 => return self.send_some(bytes, flags, to, timeout_ns),
            None => 0,
            Some(code) if code < 0 => return Err(error_from_outcome(code)),
            Some(sent) if timeout_ns > 0 || sent as usize == bytes.len() => {
                return Ok(sent as usize);
            }
            Some(sent) => sent as usize,
        };
        // Blocking mode: send(2) returns when all is queued, or with what was queued before an error.
        loop {
            match self.send_some(&bytes[sent..], flags | libc::MSG_WAITALL, to, timeout_ns) {
                Ok(n) => sent += n,
                Err(error) if sent == 0 => return Err(error),
                Err(_) => return Ok(sent),
            }
            // SO_SNDTIMEO bounds the whole call, so what is missing then timed out.
            if sent >= bytes.len() || timeout_ns == BY_OPTION {
                return Ok(sent);
            }
        }
    }

    /// Sends all of `bytes`, in as many pieces as it takes.
    ///
    /// # Errors
    ///
    /// Those of [`send`](Socket::send). The timeout bounds the whole call. After an error it is unknown to the caller how much was
    /// sent.
    ///
    /// # Source
    ///
    /// Python `socket.sendall(bytes)`; `send(2)`; `IORING_OP_SEND` with `MSG_WAITALL`.
    ///
    /// ```
    /// let (left, right) = ringsock::socketpair()?;
    /// left.sendall(b"hello")?;
    /// # assert_eq!(right.recv(16)?, b"hello");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    #[inline]
    pub fn sendall(&self, bytes: &[u8]) -> Result<()> {
        self.sendall_with(bytes, MsgFlags::default())
    }

    /// [`sendall`](Socket::sendall) with flags.
    ///
    /// # Errors
    ///
    /// Those of [`sendall`](Socket::sendall).
    ///
    /// # Source
    ///
    /// Python `socket.sendall(bytes, flags)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let (left, right) = ringsock::socketpair()?;
    /// left.sendall_with(b"hello", MSG_MORE)?;
    /// # assert_eq!(right.recv(16)?, b"hello");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    // With the call inlined an echo takes 27 instructions less.
    #[inline(always)]
    pub fn sendall_with(&self, bytes: &[u8], flags: MsgFlags) -> Result<()> {
        let flags = flags.bits();
        self.send_behind_queue(flags)?;
        let mut op = Op::Send {
            fd: self.0.fd,
            buffer: bytes,
            flags,
        };
        // In any mode, what can be sent at once needs no waiting.
        let result = match fiber::attempt_directly(&mut op, self.sends_plainly()) {
            Some(sent) if sent as usize == bytes.len() => Ok(()),
            Some(code) if code < 0 => Err(error_from_outcome(code)),
            sent => self.sendall_rest(&bytes[sent.unwrap_or(0) as usize..], flags),
        };
        self.traced_whole("sendall", bytes.len(), result)
    }

    #[inline(never)]
    fn sendall_rest(&self, bytes: &[u8], flags: i32) -> Result<()> {
        let timeout_ns = self.timeout_ns();
        if timeout_ns == NON_BLOCKING || flags & libc::MSG_DONTWAIT != 0 {
            return self.sendall_non_blocking(bytes, flags);
        }
        self.sendall_waiting(bytes, flags, timeout_ns)
    }

    fn sendall_waiting(&self, bytes: &[u8], flags: i32, timeout_ns: i64) -> Result<()> {
        if timeout_ns > 0 {
            return self.sendall_timed(bytes, flags, timeout_ns);
        }
        let mut sent = 0;
        loop {
            // Empty data makes one send: an empty datagram.
            sent += self.send_some(&bytes[sent..], flags | libc::MSG_WAITALL, None, timeout_ns)?;
            if sent >= bytes.len() {
                return Ok(());
            }
        }
    }

    fn sendall_timed(&self, bytes: &[u8], flags: i32, timeout_ns: i64) -> Result<()> {
        let deadline_ns = fiber::now_ns().saturating_add(timeout_ns);
        let mut left_ns = timeout_ns;
        let mut sent = 0;
        loop {
            sent += self.send_some(&bytes[sent..], flags | libc::MSG_WAITALL, None, left_ns)?;
            if sent >= bytes.len() {
                return Ok(());
            }
            left_ns = deadline_ns - fiber::now_ns();
            if left_ns <= 0 {
                return Err(Error::Timeout);
            }
        }
    }

    fn sendall_non_blocking(&self, bytes: &[u8], flags: i32) -> Result<()> {
        let mut sent = 0;
        loop {
            sent += self.attempt(Op::Send {
                fd: self.0.fd,
                buffer: &bytes[sent..],
                flags,
            })?;
            if sent >= bytes.len() {
                return Ok(());
            }
        }
    }

    /// Whether sends are plain calls also in a crowd.
    #[inline(always)]
    fn sends_plainly(&self) -> bool {
        self.timeout_ns() >= 0 || self.0.inflight.watch().is_some()
    }

    /// One send that waits: the bytes the kernel took.
    #[inline(always)]
    fn send_some(
        &self,
        bytes: &[u8],
        flags: i32,
        to: Option<&SockAddr>,
        timeout_ns: i64,
    ) -> Result<usize> {
        self.wait_to_send(&mut self.send_op(bytes, flags, to), to, timeout_ns)
    }

    /// A send that waits, of an operation with the address `to`: the bytes the kernel took.
    #[inline(always)]
    fn wait_to_send(
        &self,
        op: &mut Op<'_>,
        to: Option<&SockAddr>,
        timeout_ns: i64,
    ) -> Result<usize> {
        if self.0.family == AF_UNIX && self.0.kind != SOCK_STREAM {
            return self.send_when_ready(op, to, timeout_ns);
        }
        transferred(self.wait(op, Direction::Out, timeout_ns))
    }

    #[inline(always)]
    fn send_op<'a>(&self, buffer: &'a [u8], flags: i32, to: Option<&'a SockAddr>) -> Op<'a> {
        let fd = self.0.fd;
        match to {
            None => Op::Send { fd, buffer, flags },
            Some(address) => Op::SendTo {
                fd,
                buffer,
                address,
                flags,
            },
        }
    }

    // Ending.

    /// Shuts down one or both halves of the connection: `SHUT_RD`, `SHUT_WR` or `SHUT_RDWR`. Calls that wait to receive wake with
    /// the end of the stream.
    ///
    /// # Errors
    ///
    /// `ENOTCONN`: not connected. `EINVAL`: no such `how`.
    ///
    /// # Source
    ///
    /// Python `socket.shutdown(how)`; `shutdown(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let (left, right) = ringsock::socketpair()?;
    /// left.shutdown(SHUT_WR)?;
    /// assert!(right.recv(16)?.is_empty());
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn shutdown(&self, how: i32) -> Result<()> {
        if how != libc::SHUT_RD {
            self.send_behind_queue(0)?;
        }
        let result = sys::check(sys::shutdown(self.0.fd, how)).map(drop);
        self.traced("shutdown", result)
    }

    /// Closes the socket for all its handles. Calls that wait on it, in any fiber or thread, fail with `EBADF`; calls on it
    /// from now on do, too. When `close` returns, those calls have ended and the connection's peer has been told (unless a
    /// descriptor made by `dup` or `fork` is still open). Closing again does nothing.
    ///
    /// While files of [`makefile`](Socket::makefile) are open, the socket is only marked: it is closed with the last of them.
    ///
    /// The worker whose fibers use the socket is asked to look, so it has to come round: a fiber that holds its thread up until
    /// the closer is done (on a std channel, say) makes both wait for ever.
    ///
    /// The descriptor's number stays taken until the last handle is dropped (a moment longer where another worker was told to
    /// end its calls), so it cannot come to name something else in between. Dropping the last handle closes as well; `close` is for the moment when others still hold one. Of several
    /// closers only the first waits, and a fiber that is cancelled meanwhile does not. Calls that never wait (non-blocking mode,
    /// `MSG_DONTWAIT`) are not waited for.
    ///
    /// With `SO_LINGER` and a time above 0 the kernel makes closing wait for unsent data, by `close` and by dropping alike, and
    /// that holds up the whole thread: let a thread of its own do it, or leave lingering to the kernel (the default).
    ///
    /// # Errors
    ///
    /// None today; the result leaves room for one.
    ///
    /// # Source
    ///
    /// Python `socket.close()`; `dup3(2)`, `open(2)` (`O_PATH`), `IORING_OP_ASYNC_CANCEL`.
    ///
    /// ```
    /// ringsock::run(|| {
    ///     let (left, right) = ringsock::socketpair()?;
    ///     let reader = right.clone();
    ///     let waiting = ringsock::spawn(move || reader.recv(16));
    ///     ringsock::yield_now();
    ///     right.close()?;
    ///     assert!(waiting.join().unwrap().unwrap_err().is_closed());
    ///     assert_eq!(right.fileno(), -1);
    ///     # assert!(left.recv(16)?.is_empty());
    ///     Ok::<(), ringsock::Error>(())
    /// })?;
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn close(&self) -> Result<()> {
        if self.0.files.close_socket() {
            self.close_object();
        }
        self.traced("close", Ok(()))
    }

    // Modes.

    /// Sets the timeout of all calls that wait: seconds as a float or an integer, a [`Duration`](std::time::Duration), or `None`.
    ///
    /// `None` waits for ever, 0 never waits (non-blocking mode), more waits that long. It takes effect with the next call, and
    /// `O_NONBLOCK` of the descriptor follows as in Python: set for 0 and more, clear for `None`. In a fiber a receive may let the
    /// others go first; its time counts from then on.
    ///
    /// # Errors
    ///
    /// `Value`: negative or NaN. `Overflow`: too large. `EBADF`: closed (the value is kept all the same).
    ///
    /// # Source
    ///
    /// Python `socket.settimeout(value)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let (left, right) = ringsock::socketpair()?;
    /// right.settimeout(0.01)?;
    /// assert_eq!(right.recv(16), Err(Error::Timeout));
    /// right.settimeout(None)?;
    /// assert_eq!(right.gettimeout(), None);
    /// # drop(left); Ok::<(), ringsock::Error>(())
    /// ```
    pub fn settimeout(&self, timeout: impl Into<Timeout>) -> Result<()> {
        let timeout_ns = timeout.into().as_ns()?.unwrap_or(BLOCKING);
        let store = || self.0.timeout_ns.store(timeout_ns, Ordering::SeqCst);
        // A call in another thread must never find "do not wait" on a descriptor that still waits.
        if timeout_ns == BLOCKING {
            store();
        }
        // With the flag, so that whoever sets the flag back for a while sees what it is to be.
        let set_flag = || {
            let result = match timeout_ns {
                // The last of those who need it lets it follow.
                BLOCKING if self.0.forced.is_needed() => {
                    self.0.forced.forget_kept();
                    0
                }
                _ => op::set_nonblocking(self.0.fd, timeout_ns != BLOCKING),
            };
            store();
            result
        };
        let result = self
            .check_open()
            .inspect_err(|_| store())
            .and_then(|()| sys::check(self.0.inflight.exclusively(set_flag)));
        if timeout_ns == BLOCKING && self.0.has_option_timeouts.load(Ordering::SeqCst) {
            self.replace_timeout(BLOCKING, BY_OPTION);
        }
        result.map(drop)
    }

    /// The timeout in seconds; `None` waits for ever. It works on a closed socket, too.
    ///
    /// # Source
    ///
    /// Python `socket.gettimeout()`.
    ///
    /// ```
    /// let (left, _right) = ringsock::socketpair()?;
    /// left.settimeout(2.5)?;
    /// assert_eq!(left.gettimeout(), Some(2.5));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn gettimeout(&self) -> Option<f64> {
        match self.timeout_ns() {
            ns if ns < 0 => None,
            ns => Some(ns as f64 / 1e9),
        }
    }

    /// `true` is `settimeout(None)`, `false` is `settimeout(0)`.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// Python `socket.setblocking(flag)`.
    ///
    /// ```
    /// let (left, _right) = ringsock::socketpair()?;
    /// left.setblocking(false)?;
    /// assert!(left.recv(16).unwrap_err().is_would_block());
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn setblocking(&self, flag: bool) -> Result<()> {
        self.settimeout(if flag { Timeout::NONE } else { 0.into() })
    }

    /// Whether calls wait: true in blocking mode and with a timeout.
    ///
    /// # Source
    ///
    /// Python `socket.getblocking()` (3.7).
    ///
    /// ```
    /// let (left, _right) = ringsock::socketpair()?;
    /// assert!(left.getblocking());
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn getblocking(&self) -> bool {
        self.timeout_ns() != NON_BLOCKING
    }

    // What it is.

    /// The descriptor's number; -1 once closed.
    ///
    /// # Source
    ///
    /// Python `socket.fileno()`.
    ///
    /// ```
    /// let (left, _right) = ringsock::socketpair()?;
    /// assert!(left.fileno() >= 0);
    /// left.close()?;
    /// assert_eq!(left.fileno(), -1);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn fileno(&self) -> RawFd {
        if self.0.inflight.is_closed() {
            -1
        } else {
            self.0.fd
        }
    }

    /// The socket's own address.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// Python `socket.getsockname()`; `getsockname(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// assert_eq!(socket.getsockname()?.to_string(), "0.0.0.0:0");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn getsockname(&self) -> Result<Address> {
        let mut address = SockAddr::empty();
        sys::check(sys::getsockname(self.0.fd, &mut address))?;
        Ok(address
            .decode()
            .unwrap_or_else(|| Address::unspecified(self.0.family)))
    }

    /// The peer's address.
    ///
    /// # Errors
    ///
    /// `ENOTCONN`: not connected. `EBADF`: closed.
    ///
    /// # Source
    ///
    /// Python `socket.getpeername()`; `getpeername(2)`.
    ///
    /// ```
    /// let (left, _right) = ringsock::socketpair()?;
    /// assert_eq!(left.getpeername()?.to_string(), ""); // an AF_UNIX socket without a name
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn getpeername(&self) -> Result<Address> {
        let mut address = SockAddr::empty();
        sys::check(sys::getpeername(self.0.fd, &mut address))?;
        Ok(address
            .decode()
            .unwrap_or_else(|| Address::unspecified(self.0.family)))
    }

    /// The address family the socket was made with.
    ///
    /// # Source
    ///
    /// Python `socket.family`.
    ///
    /// ```
    /// let (left, _right) = ringsock::socketpair()?;
    /// assert_eq!(left.family(), ringsock::AF_UNIX);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn family(&self) -> Family {
        self.0.family
    }

    /// The type the socket was made with, without `SOCK_NONBLOCK` and `SOCK_CLOEXEC`.
    ///
    /// # Source
    ///
    /// Python `socket.type`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0)?;
    /// assert_eq!(socket.kind(), SOCK_DGRAM);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The type the socket was made with: [`kind`](Socket::kind) under Python's name.
    ///
    /// # Source
    ///
    /// Python `socket.type`.
    ///
    /// ```
    /// let (left, _right) = ringsock::socketpair()?;
    /// assert_eq!(left.r#type(), ringsock::SOCK_STREAM);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn r#type(&self) -> Kind {
        self.0.kind
    }

    /// The protocol the socket was made with.
    ///
    /// # Source
    ///
    /// Python `socket.proto`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, IPPROTO_TCP)?;
    /// assert_eq!(socket.proto(), IPPROTO_TCP);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn proto(&self) -> i32 {
        self.0.proto
    }

    // The two ways of the module's documentation.

    #[inline]
    fn timeout_ns(&self) -> i64 {
        self.0.timeout_ns.load(Ordering::Relaxed)
    }

    /// The operations under way through this socket.
    pub(crate) fn inflight(&self) -> &InFlight {
        &self.0.inflight
    }

    /// Sets `O_NONBLOCK` in any mode, for calls that only it keeps from waiting, until as many [`unforce_nonblocking`]. Operations on the
    /// ring do not mind.
    ///
    /// [`unforce_nonblocking`]: Socket::unforce_nonblocking
    pub(crate) fn force_nonblocking(&self) {
        // A closed socket has no flags any more, and whatever is tried next says so.
        self.0.inflight.exclusively(|| {
            if self.0.forced.begin() {
                let flags = sys::status_flags(self.0.fd);
                let is_set = flags >= 0 && flags & libc::O_NONBLOCK != 0;
                if !is_set {
                    op::set_nonblocking(self.0.fd, true);
                } else if self.timeout_ns() < NON_BLOCKING {
                    self.0.forced.keep();
                }
            }
        });
    }

    /// Lets `O_NONBLOCK` follow the mode again, as it is by now, if nobody else needs it.
    pub(crate) fn unforce_nonblocking(&self) {
        self.0.inflight.exclusively(|| {
            if self.0.forced.end() {
                op::set_nonblocking(self.0.fd, self.timeout_ns() >= NON_BLOCKING);
            }
        });
    }

    fn check_open(&self) -> Result<()> {
        if self.0.inflight.is_closed() {
            return Err(Error::from_errno(libc::EBADF));
        }
        Ok(())
    }

    /// The operation's result, waited for as the socket's mode says.
    #[inline(always)]
    fn run(&self, mut op: Op<'_>, direction: Direction) -> Result<i32> {
        let timeout_ns = self.timeout_ns();
        let code = if timeout_ns & i64::MAX == 0 {
            self.run_specially(&mut op, direction, timeout_ns)
        } else {
            fiber::suspend(&mut op, timeout_ns, Some((&self.0.inflight, direction)))
        };
        if code >= 0 {
            return Ok(code);
        }
        Err(error_from_outcome(code))
    }

    #[inline(never)]
    fn run_specially(&self, op: &mut Op<'_>, direction: Direction, timeout_ns: i64) -> i32 {
        if timeout_ns == NON_BLOCKING {
            return self.0.inflight.exclusively(|| op.attempt_despite_signals());
        }
        self.wait_by_option(op, direction)
    }

    /// The operation's result or an outcome, waited for in blocking mode or as long as `timeout_ns` says.
    #[inline(always)]
    fn wait(&self, op: &mut Op<'_>, direction: Direction, timeout_ns: i64) -> i32 {
        if timeout_ns == BY_OPTION {
            return self.wait_by_option(op, direction);
        }
        fiber::suspend(op, timeout_ns, Some((&self.0.inflight, direction)))
    }

    /// Waits in blocking mode, at most as long as SO_RCVTIMEO or SO_SNDTIMEO say: their end is an errno, not a `Timeout`.
    #[cold]
    #[inline(never)]
    fn wait_by_option(&self, op: &mut Op<'_>, direction: Direction) -> i32 {
        // Asked for each time: it may have been set through a duplicate of the descriptor.
        let limit_ns = match direction {
            Direction::In => sys::option_timeout_ns(self.0.fd, libc::SO_RCVTIMEO),
            Direction::Out => sys::option_timeout_ns(self.0.fd, libc::SO_SNDTIMEO),
        };
        let limit_ns = match limit_ns {
            Ok(limit_ns) => limit_ns.unwrap_or(BLOCKING),
            Err(errno) => return -errno,
        };
        let expired = match op {
            Op::Connect { .. } => -libc::EINPROGRESS,
            _ => -libc::EAGAIN,
        };
        let deadline_ns = fiber::now_ns().saturating_add(limit_ns);
        match fiber::suspend(op, limit_ns, Some((&self.0.inflight, direction))) {
            // Else an enclosing `timeout` came first.
            outcome::TIMED_OUT if limit_ns > 0 && fiber::now_ns() >= deadline_ns => expired,
            code => code,
        }
    }

    /// Learns whether the kernel's own timeouts are set: after somebody may have set one.
    fn look_for_option_timeouts(&self) {
        let is_set = |option| matches!(sys::option_timeout_ns(self.0.fd, option), Ok(Some(_)));
        let has_any = is_set(libc::SO_RCVTIMEO) || is_set(libc::SO_SNDTIMEO);
        // Flag first here, mode first in `settimeout`: whoever is second sees what the other one did.
        self.0.has_option_timeouts.store(has_any, Ordering::SeqCst);
        if has_any {
            self.replace_timeout(BLOCKING, BY_OPTION);
        } else {
            self.replace_timeout(BY_OPTION, BLOCKING);
        }
    }

    /// From one blocking mode into the other, if it is still in the first.
    fn replace_timeout(&self, from: i64, to: i64) {
        let order = Ordering::SeqCst;
        let _ = self.0.timeout_ns.compare_exchange(from, to, order, order);
    }

    /// The operation's result without waiting, in any mode.
    fn attempt(&self, mut op: Op<'_>) -> Result<usize> {
        sys::check(op.attempt_despite_signals()).map(|count| count as usize)
    }
}

/// The first `nbytes` of a buffer, all of it for 0; the error's text where it has fewer.
fn first<'b>(buffer: &'b mut [u8], nbytes: usize, too_few: &'static str) -> Result<&'b mut [u8]> {
    match nbytes {
        0 => Ok(buffer),
        nbytes => buffer
            .get_mut(..nbytes)
            .ok_or_else(|| Error::Value(too_few.into())),
    }
}

/// The bytes that a transfer moved, or why it failed.
#[inline(always)]
fn transferred(code: i32) -> Result<usize> {
    if code >= 0 {
        return Ok(code as usize);
    }
    Err(error_from_outcome(code))
}

#[cfg(any(test, fuzzing))]
impl Socket {
    /// A socket over a descriptor of the scripted driver.
    pub(crate) fn simulated(fd: RawFd) -> Socket {
        Socket(Arc::new(Inner {
            fd,
            family: AF_UNIX,
            kind: SOCK_STREAM,
            proto: 0,
            timeout_ns: AtomicI64::new(BLOCKING),
            has_option_timeouts: AtomicBool::new(false),
            receives: AtomicBool::new(false),
            forced: Forced::default(),
            files: file::Files::new(),
            queue: OnceLock::new(),
            segmentation: udp::Segmentation::new(),
            zero_copy: OnceLock::new(),
            inflight: InFlight::new(),
        }))
    }

    /// `settimeout` without the descriptor's flag.
    #[cfg(test)]
    pub(crate) fn set_timeout_ns(&self, timeout_ns: i64) {
        self.0.timeout_ns.store(timeout_ns, Ordering::Relaxed);
    }
}

impl AsFd for Socket {
    /// The descriptor. After [`close`](Socket::close) it is one that answers `EBADF` to every use as a socket.
    fn as_fd(&self) -> BorrowedFd<'_> {
        sys::borrow(&self.0.fd)
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.fd
    }
}

impl io::Read for &Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(self.recv_into(buffer)?)
    }
}

impl io::Write for &Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(self.send(bytes)?)
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        Ok(self.sendall(bytes)?)
    }

    /// Waits until what [`sendall_later`](Socket::sendall_later) has queued is sent. Nothing else is buffered.
    fn flush(&mut self) -> io::Result<()> {
        Ok(self.send_behind_queue(0)?)
    }
}

impl io::Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        io::Read::read(&mut &*self, buffer)
    }
}

impl io::Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::Write::write(&mut &*self, bytes)
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        io::Write::write_all(&mut &*self, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::Write::flush(&mut &*self)
    }
}

/// Much as Python's repr: descriptor, family, type, protocol and, where there are any, addresses.
impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let closed = if self.0.inflight.is_closed() || self.0.files.is_socket_closed() {
            " [closed]"
        } else {
            ""
        };
        write!(
            f,
            "<ringsock.Socket{closed} fd={}, family={:?}, type={:?}, proto={}",
            self.fileno(),
            self.0.family,
            self.0.kind,
            self.0.proto
        )?;
        if self.fileno() >= 0 {
            if let Ok(address) = self.getsockname() {
                write!(f, ", laddr={address}")?;
            }
            if let Ok(address) = self.getpeername() {
                write!(f, ", raddr={address}")?;
            }
        }
        f.write_str(">")
    }
}
