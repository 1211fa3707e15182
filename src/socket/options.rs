//! Socket options: getsockopt and setsockopt.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use super::Socket;
use crate::constants::{
    AF_INET6, AF_VSOCK, IP_ADD_MEMBERSHIP, IP_DROP_MEMBERSHIP, IP_TTL, IPPROTO_IP, IPPROTO_IPV6,
    IPPROTO_TCP, IPV6_JOIN_GROUP, IPV6_LEAVE_GROUP, IPV6_UNICAST_HOPS, IPV6_V6ONLY, SO_BROADCAST,
    SO_KEEPALIVE, SO_LINGER, SO_RCVBUF, SO_REUSEADDR, SO_REUSEPORT, SO_SNDBUF, SOL_SOCKET,
    TCP_KEEPCNT, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_NODELAY,
};
use crate::error::{Error, Result};
use crate::sys;

/// The longest option value `getsockopt_buf` reads, as in Python.
const OPTION_BYTES_MAX: usize = 1024;

/// SO_RCVTIMEO and SO_SNDTIMEO, by their old and their new numbers (the new ones' value is 64-bit everywhere).
const TIMEOUT_OPTIONS: [i32; 4] = [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO, 66, 67];

/// The value of an option: an integer, a 64-bit integer, bytes (a C struct), or no value but a length.
///
/// ```
/// use ringsock::OptionValue;
/// let values: [OptionValue; 4] = [1.into(), true.into(), 1_u64.into(), (&[0u8, 1][..]).into()];
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionValue<'a> {
    /// A C `int`; on a socket of `AF_VSOCK` the same number in the 64 bits that its options have.
    Int(i32),
    /// A 64-bit number: the options of `AF_VSOCK` at its own level.
    U64(u64),
    /// The bytes of a C struct.
    Bytes(&'a [u8]),
    /// A null pointer and this length (Python's `setsockopt(level, optname, None, optlen)`).
    Null(u32),
}

impl From<i32> for OptionValue<'_> {
    fn from(value: i32) -> Self {
        OptionValue::Int(value)
    }
}

impl From<u64> for OptionValue<'_> {
    fn from(value: u64) -> Self {
        OptionValue::U64(value)
    }
}

impl From<bool> for OptionValue<'_> {
    fn from(value: bool) -> Self {
        OptionValue::Int(value.into())
    }
}

impl<'a> From<&'a [u8]> for OptionValue<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        OptionValue::Bytes(bytes)
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for OptionValue<'a> {
    fn from(bytes: &'a [u8; N]) -> Self {
        OptionValue::Bytes(bytes)
    }
}

/// The times of keepalive probes, for [`Socket::set_tcp_keepalive`]. What is `None` stays as the system has it.
///
/// ```
/// use ringsock::Keepalive;
/// use std::time::Duration;
/// let keepalive = Keepalive { time: Some(Duration::from_secs(60)), ..Default::default() };
/// assert_eq!(keepalive.retries, None);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keepalive {
    /// How long a connection is idle before the first probe. In whole seconds, rounded up.
    pub time: Option<Duration>,
    /// The time between probes. In whole seconds, rounded up.
    pub interval: Option<Duration>,
    /// After how many unanswered probes the connection ends.
    pub retries: Option<u32>,
}

fn whole_seconds(time: Duration) -> i32 {
    let part = u64::from(time.subsec_nanos() > 0);
    let rounded_up = time.as_secs().saturating_add(part);
    i32::try_from(rounded_up).unwrap_or(i32::MAX)
}

fn i32_at_most(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// `struct ip_mreq`.
fn membership_v4(group: Ipv4Addr, interface: Ipv4Addr) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&group.octets());
    bytes[4..].copy_from_slice(&interface.octets());
    bytes
}

/// `struct ipv6_mreq`.
fn membership_v6(group: Ipv6Addr, interface: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..16].copy_from_slice(&group.octets());
    bytes[16..].copy_from_slice(&interface.to_ne_bytes());
    bytes
}

impl Socket {
    /// Sets an option: an integer, or the bytes of a C struct.
    ///
    /// `SO_RCVTIMEO` and `SO_SNDTIMEO` (a `struct timeval`) mean what they mean to the kernel: in blocking mode a call that has
    /// waited that long fails with `EAGAIN` (connect with `EINPROGRESS`). [`settimeout`](Socket::settimeout) is the better way.
    /// Set them through the object that is to obey, not behind its back.
    ///
    /// Of `SO_RCVLOWAT` a receive that waits takes no notice: it returns what is there.
    ///
    /// # Errors
    ///
    /// `ENOPROTOOPT`: no such option at this level. `EINVAL`: not such a value. `EPERM`, `EACCES`: needs a privilege.
    ///
    /// # Source
    ///
    /// Python `socket.setsockopt(level, optname, value)`; `setsockopt(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)?;
    /// assert_ne!(socket.getsockopt(SOL_SOCKET, SO_REUSEADDR)?, 0);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn setsockopt<'a>(
        &self,
        level: i32,
        optname: i32,
        value: impl Into<OptionValue<'a>>,
    ) -> Result<()> {
        let fd = self.0.fd;
        if matches!(
            (level, optname),
            (libc::SOL_SOCKET, libc::SO_OOBINLINE) | (libc::IPPROTO_TCP, libc::TCP_ULP)
        ) {
            // Receives stop at urgent data, and where the protocol on top says.
            self.0.inflight.never_watch();
        }
        let result = sys::check(match value.into() {
            // What is negative wraps, as in Python.
            OptionValue::Int(value) if level == AF_VSOCK.bits() && self.0.family == AF_VSOCK => {
                sys::setsockopt(fd, level, optname, &(i64::from(value)).to_ne_bytes())
            }
            OptionValue::Int(value) => sys::setsockopt(fd, level, optname, &value.to_ne_bytes()),
            OptionValue::U64(value) => sys::setsockopt(fd, level, optname, &value.to_ne_bytes()),
            OptionValue::Bytes(bytes) => sys::setsockopt(fd, level, optname, bytes),
            OptionValue::Null(len) => sys::setsockopt_null(fd, level, optname, len),
        });
        if level == libc::SOL_SOCKET && TIMEOUT_OPTIONS.contains(&optname) {
            self.look_for_option_timeouts();
        }
        result.map(drop)
    }

    /// The integer value of an option. Those of `AF_VSOCK` have 64 bits: see [`getsockopt_u64`](Socket::getsockopt_u64).
    ///
    /// # Errors
    ///
    /// `ENOPROTOOPT`: no such option at this level. `EINVAL`: the option has more than an integer's 32 bits.
    ///
    /// # Source
    ///
    /// Python `socket.getsockopt(level, optname)`; `getsockopt(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// assert_eq!(socket.getsockopt(SOL_SOCKET, SO_TYPE)?, SOCK_STREAM.bits());
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn getsockopt(&self, level: i32, optname: i32) -> Result<i32> {
        let mut value = [0; 4];
        sys::check(sys::getsockopt(self.0.fd, level, optname, &mut value))?;
        Ok(i32::from_ne_bytes(value))
    }

    /// The value of an option that is a 64-bit integer, as those of `AF_VSOCK` at its own level are.
    ///
    /// # Errors
    ///
    /// `ENOPROTOOPT`: no such option at this level. `EOPNOTSUPP`, `EINVAL`: no socket of this family.
    ///
    /// # Source
    ///
    /// Python `socket.getsockopt(level, optname)` on a socket of `AF_VSOCK`;
    /// [vsock(7)](https://man7.org/linux/man-pages/man7/vsock.7.html).
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let Ok(socket) = Socket::new(AF_VSOCK, SOCK_STREAM, 0) else {
    ///     return Ok(()); // This kernel lacks the family.
    /// };
    /// socket.setsockopt(AF_VSOCK.bits(), SO_VM_SOCKETS_BUFFER_SIZE, 65536_u64)?;
    /// assert_eq!(socket.getsockopt_u64(AF_VSOCK.bits(), SO_VM_SOCKETS_BUFFER_SIZE)?, 65536);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn getsockopt_u64(&self, level: i32, optname: i32) -> Result<u64> {
        let mut value = [0; 8];
        sys::check(sys::getsockopt(self.0.fd, level, optname, &mut value))?;
        Ok(u64::from_ne_bytes(value))
    }

    /// The value of an option as bytes, at most `buflen` (1 to 1024) of them.
    ///
    /// # Errors
    ///
    /// `Message`: `buflen` out of range. `ENOPROTOOPT`: no such option at this level.
    ///
    /// # Source
    ///
    /// Python `socket.getsockopt(level, optname, buflen)`; `getsockopt(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// assert_eq!(socket.getsockopt_buf(SOL_SOCKET, SO_LINGER, 64)?, [0; 8]);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn getsockopt_buf(&self, level: i32, optname: i32, buflen: usize) -> Result<Vec<u8>> {
        if !(1..=OPTION_BYTES_MAX).contains(&buflen) {
            return Err(Error::Message("getsockopt buflen out of range".into()));
        }
        let mut value = vec![0; buflen];
        let len = sys::check(sys::getsockopt(self.0.fd, level, optname, &mut value))?;
        value.truncate(len as usize);
        Ok(value)
    }
}

/// Options under names of their own, for those that most programs meet. Python has none of these: the names are std's and
/// socket2's. Everything else goes through [`setsockopt`](Socket::setsockopt).
impl Socket {
    // SOL_SOCKET.

    /// Whether a listener may take an address that connections of an earlier one still linger on.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `SO_REUSEADDR`, `socket(7)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// assert!(!socket.reuse_address()?);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn reuse_address(&self) -> Result<bool> {
        Ok(self.getsockopt(SOL_SOCKET, SO_REUSEADDR)? != 0)
    }

    /// Sets [`reuse_address`](Socket::reuse_address), before `bind`.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `SO_REUSEADDR`, `socket(7)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// socket.set_reuse_address(true)?;
    /// assert!(socket.reuse_address()?);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn set_reuse_address(&self, on: bool) -> Result<()> {
        self.setsockopt(SOL_SOCKET, SO_REUSEADDR, on)
    }

    /// Whether several sockets may be bound to one port, to share what arrives.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed. `EOPNOTSUPP`: not for this family.
    ///
    /// # Source
    ///
    /// `SO_REUSEPORT`, `socket(7)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// assert!(!socket.reuse_port()?);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn reuse_port(&self) -> Result<bool> {
        Ok(self.getsockopt(SOL_SOCKET, SO_REUSEPORT)? != 0)
    }

    /// Sets [`reuse_port`](Socket::reuse_port), before `bind`, on each of them.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed. `EOPNOTSUPP`: not for this family.
    ///
    /// # Source
    ///
    /// `SO_REUSEPORT`, `socket(7)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// socket.set_reuse_port(true)?;
    /// assert!(socket.reuse_port()?);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn set_reuse_port(&self, on: bool) -> Result<()> {
        self.setsockopt(SOL_SOCKET, SO_REUSEPORT, on)
    }

    /// Whether datagrams may go to a broadcast address (else `EACCES`).
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `SO_BROADCAST`, `socket(7)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// assert!(!socket.broadcast()?);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn broadcast(&self) -> Result<bool> {
        Ok(self.getsockopt(SOL_SOCKET, SO_BROADCAST)? != 0)
    }

    /// Sets [`broadcast`](Socket::broadcast).
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `SO_BROADCAST`, `socket(7)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// socket.set_broadcast(true)?;
    /// assert!(socket.broadcast()?);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn set_broadcast(&self, on: bool) -> Result<()> {
        self.setsockopt(SOL_SOCKET, SO_BROADCAST, on)
    }

    /// Whether an idle connection is probed, so that a peer that is gone is noticed.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `SO_KEEPALIVE`, `socket(7)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// assert!(!socket.keepalive()?);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn keepalive(&self) -> Result<bool> {
        Ok(self.getsockopt(SOL_SOCKET, SO_KEEPALIVE)? != 0)
    }

    /// Sets [`keepalive`](Socket::keepalive), with the system's times. [`set_tcp_keepalive`](Socket::set_tcp_keepalive) sets the times, too.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `SO_KEEPALIVE`, `socket(7)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// socket.set_keepalive(true)?;
    /// assert!(socket.keepalive()?);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn set_keepalive(&self, on: bool) -> Result<()> {
        self.setsockopt(SOL_SOCKET, SO_KEEPALIVE, on)
    }

    /// The size of the receive buffer in bytes: twice what was set, as the kernel keeps its own records in it.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `SO_RCVBUF`, `socket(7)`.
    ///
    /// ```
    /// let (left, _right) = ringsock::socketpair()?;
    /// assert!(left.recv_buffer_size()? > 0);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recv_buffer_size(&self) -> Result<usize> {
        Ok(self.getsockopt(SOL_SOCKET, SO_RCVBUF)? as usize)
    }

    /// Sets the size of the receive buffer in bytes, within the system's limits.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `SO_RCVBUF`, `socket(7)`.
    ///
    /// ```
    /// let (left, _right) = ringsock::socketpair()?;
    /// left.set_recv_buffer_size(16_384)?;
    /// assert_eq!(left.recv_buffer_size()?, 32_768);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn set_recv_buffer_size(&self, bytes: usize) -> Result<()> {
        self.setsockopt(SOL_SOCKET, SO_RCVBUF, i32_at_most(bytes))
    }

    /// The size of the send buffer in bytes: twice what was set, as the kernel keeps its own records in it.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `SO_SNDBUF`, `socket(7)`.
    ///
    /// ```
    /// let (left, _right) = ringsock::socketpair()?;
    /// assert!(left.send_buffer_size()? > 0);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn send_buffer_size(&self) -> Result<usize> {
        Ok(self.getsockopt(SOL_SOCKET, SO_SNDBUF)? as usize)
    }

    /// Sets the size of the send buffer in bytes, within the system's limits.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `SO_SNDBUF`, `socket(7)`.
    ///
    /// ```
    /// let (left, _right) = ringsock::socketpair()?;
    /// left.set_send_buffer_size(16_384)?;
    /// assert_eq!(left.send_buffer_size()?, 32_768);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn set_send_buffer_size(&self, bytes: usize) -> Result<()> {
        self.setsockopt(SOL_SOCKET, SO_SNDBUF, i32_at_most(bytes))
    }

    /// How long closing waits for data that is not sent yet; `None`: it does not wait, and the kernel goes on sending.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `SO_LINGER`, `socket(7)`.
    ///
    /// ```
    /// let (left, _right) = ringsock::socketpair()?;
    /// assert_eq!(left.linger()?, None);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn linger(&self) -> Result<Option<Duration>> {
        let linger = self.getsockopt_buf(SOL_SOCKET, SO_LINGER, 8)?;
        let field = |index| u32::from_ne_bytes(std::array::from_fn(|byte| linger[index + byte]));
        Ok((field(0) != 0).then(|| Duration::from_secs(field(4).into())))
    }

    /// Sets [`linger`](Socket::linger), in whole seconds, rounded up. With a time of 0 closing throws unsent data away and resets
    /// a TCP connection. (A longer time holds up the thread: see [`close`](Socket::close).)
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `SO_LINGER`, `socket(7)`.
    ///
    /// ```
    /// use std::time::Duration;
    /// let (left, _right) = ringsock::socketpair()?;
    /// left.set_linger(Some(Duration::ZERO))?;
    /// assert_eq!(left.linger()?, Some(Duration::ZERO));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn set_linger(&self, time: Option<Duration>) -> Result<()> {
        let mut linger = [0; 8];
        linger[..4].copy_from_slice(&i32::from(time.is_some()).to_ne_bytes());
        linger[4..].copy_from_slice(&whole_seconds(time.unwrap_or_default()).to_ne_bytes());
        self.setsockopt(SOL_SOCKET, SO_LINGER, &linger)
    }

    // IPPROTO_TCP.

    /// Whether small pieces are sent at once, rather than collected while earlier ones are unacknowledged (Nagle).
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP`, `ENOPROTOOPT`: not TCP. `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `TCP_NODELAY`, `tcp(7)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// assert!(!socket.nodelay()?);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn nodelay(&self) -> Result<bool> {
        Ok(self.getsockopt(IPPROTO_TCP, TCP_NODELAY)? != 0)
    }

    /// Sets [`nodelay`](Socket::nodelay).
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP`, `ENOPROTOOPT`: not TCP. `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `TCP_NODELAY`, `tcp(7)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// socket.set_nodelay(true)?;
    /// assert!(socket.nodelay()?);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn set_nodelay(&self, on: bool) -> Result<()> {
        self.setsockopt(IPPROTO_TCP, TCP_NODELAY, on)
    }

    /// Switches keepalive on, with these times.
    ///
    /// # Errors
    ///
    /// `EINVAL`: a time of 0, or out of the system's range. `EOPNOTSUPP`, `ENOPROTOOPT`: not TCP. `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `SO_KEEPALIVE`, `socket(7)`; `TCP_KEEPIDLE`, `TCP_KEEPINTVL`, `TCP_KEEPCNT`, `tcp(7)`.
    ///
    /// ```
    /// use ringsock::{Keepalive, prelude::*};
    /// use std::time::Duration;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// let time = Some(Duration::from_secs(60));
    /// socket.set_tcp_keepalive(Keepalive { time, retries: Some(3), ..Default::default() })?;
    /// assert!(socket.keepalive()?);
    /// assert_eq!(socket.getsockopt(IPPROTO_TCP, TCP_KEEPIDLE)?, 60);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn set_tcp_keepalive(&self, keepalive: Keepalive) -> Result<()> {
        self.set_keepalive(true)?;
        if let Some(time) = keepalive.time {
            self.setsockopt(IPPROTO_TCP, TCP_KEEPIDLE, whole_seconds(time))?;
        }
        if let Some(interval) = keepalive.interval {
            self.setsockopt(IPPROTO_TCP, TCP_KEEPINTVL, whole_seconds(interval))?;
        }
        if let Some(retries) = keepalive.retries {
            self.setsockopt(IPPROTO_TCP, TCP_KEEPCNT, i32_at_most(retries as usize))?;
        }
        Ok(())
    }

    // IPPROTO_IP and IPPROTO_IPV6.

    /// How many routers a packet may pass: the time to live of IPv4, the hop limit of IPv6.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP`, `ENOPROTOOPT`: not an IP socket. `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `IP_TTL`, `ip(7)`; `IPV6_UNICAST_HOPS`, `ipv6(7)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// assert!(socket.ttl()? > 0);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn ttl(&self) -> Result<u32> {
        let (level, option) = self.ttl_option();
        Ok(self.getsockopt(level, option)? as u32)
    }

    /// Sets [`ttl`](Socket::ttl): 1 to 255 (for IPv6 from 0).
    ///
    /// # Errors
    ///
    /// `EINVAL`: out of range. `EOPNOTSUPP`, `ENOPROTOOPT`: not an IP socket. `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `IP_TTL`, `ip(7)`; `IPV6_UNICAST_HOPS`, `ipv6(7)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET6, SOCK_DGRAM, 0)?;
    /// socket.set_ttl(3)?;
    /// assert_eq!(socket.ttl()?, 3);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn set_ttl(&self, ttl: u32) -> Result<()> {
        let (level, option) = self.ttl_option();
        self.setsockopt(level, option, i32_at_most(ttl as usize))
    }

    fn ttl_option(&self) -> (i32, i32) {
        if self.family() == AF_INET6 {
            (IPPROTO_IPV6, IPV6_UNICAST_HOPS)
        } else {
            (IPPROTO_IP, IP_TTL)
        }
    }

    /// Whether an IPv6 socket is for IPv6 only, rather than for IPv4 as well.
    ///
    /// # Errors
    ///
    /// `EINVAL`: bound already. `EOPNOTSUPP`, `ENOPROTOOPT`: not an IPv6 socket. `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `IPV6_V6ONLY`, `ipv6(7)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET6, SOCK_STREAM, 0)?;
    /// socket.set_only_v6(false)?;
    /// assert!(!socket.only_v6()?);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn only_v6(&self) -> Result<bool> {
        Ok(self.getsockopt(IPPROTO_IPV6, IPV6_V6ONLY)? != 0)
    }

    /// Sets [`only_v6`](Socket::only_v6), before `bind`.
    ///
    /// # Errors
    ///
    /// `EINVAL`: bound already. `EOPNOTSUPP`, `ENOPROTOOPT`: not an IPv6 socket. `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `IPV6_V6ONLY`, `ipv6(7)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET6, SOCK_STREAM, 0)?;
    /// socket.set_only_v6(true)?;
    /// assert!(socket.only_v6()?);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn set_only_v6(&self, on: bool) -> Result<()> {
        self.setsockopt(IPPROTO_IPV6, IPV6_V6ONLY, on)
    }

    /// Receives what is sent to an IPv4 multicast group on the interface with that address (0.0.0.0: the system's choice).
    ///
    /// # Errors
    ///
    /// `ENODEV`: no such interface, or none for multicast. `EADDRINUSE`: joined already. `EINVAL`: not a multicast address.
    ///
    /// # Source
    ///
    /// `IP_ADD_MEMBERSHIP`, `ip(7)`.
    ///
    /// ```no_run
    /// use ringsock::prelude::*;
    /// let group = std::net::Ipv4Addr::new(239, 1, 2, 3);
    /// let (all, lo) = (std::net::Ipv4Addr::UNSPECIFIED, std::net::Ipv4Addr::LOCALHOST);
    /// let socket = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// socket.bind((all, 0))?;
    /// socket.join_multicast_v4(group, lo)?;
    /// socket.leave_multicast_v4(group, lo)?;
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn join_multicast_v4(&self, group: Ipv4Addr, interface: Ipv4Addr) -> Result<()> {
        self.setsockopt(
            IPPROTO_IP,
            IP_ADD_MEMBERSHIP,
            &membership_v4(group, interface),
        )
    }

    /// Receives no longer what is sent to an IPv4 multicast group on the interface with that address (0.0.0.0: the system's choice).
    ///
    /// # Errors
    ///
    /// `EADDRNOTAVAIL`: not joined there. `ENODEV`: no such interface.
    ///
    /// # Source
    ///
    /// `IP_DROP_MEMBERSHIP`, `ip(7)`.
    ///
    /// ```no_run
    /// use ringsock::prelude::*;
    /// let group = std::net::Ipv4Addr::new(239, 1, 2, 3);
    /// let (all, lo) = (std::net::Ipv4Addr::UNSPECIFIED, std::net::Ipv4Addr::LOCALHOST);
    /// let socket = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// socket.bind((all, 0))?;
    /// socket.join_multicast_v4(group, lo)?;
    /// socket.leave_multicast_v4(group, lo)?;
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn leave_multicast_v4(&self, group: Ipv4Addr, interface: Ipv4Addr) -> Result<()> {
        self.setsockopt(
            IPPROTO_IP,
            IP_DROP_MEMBERSHIP,
            &membership_v4(group, interface),
        )
    }

    /// Receives what is sent to an IPv6 multicast group on the interface with that index (0: the system's choice).
    ///
    /// # Errors
    ///
    /// `ENODEV`: no such interface, or none for multicast. `EADDRINUSE`: joined already. `EINVAL`: not a multicast address.
    ///
    /// # Source
    ///
    /// `IPV6_JOIN_GROUP`, `ipv6(7)`.
    ///
    /// ```no_run
    /// use ringsock::prelude::*;
    /// let group = "ff01::1234".parse().expect("an address");
    /// let socket = Socket::new(AF_INET6, SOCK_DGRAM, 0)?;
    /// socket.join_multicast_v6(group, 1)?; // 1 is the loopback interface
    /// socket.leave_multicast_v6(group, 1)?;
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn join_multicast_v6(&self, group: Ipv6Addr, interface: u32) -> Result<()> {
        self.setsockopt(
            IPPROTO_IPV6,
            IPV6_JOIN_GROUP,
            &membership_v6(group, interface),
        )
    }

    /// Receives no longer what is sent to an IPv6 multicast group on the interface with that index (0: the system's choice).
    ///
    /// # Errors
    ///
    /// `EADDRNOTAVAIL`: not joined there. `ENODEV`: no such interface.
    ///
    /// # Source
    ///
    /// `IPV6_LEAVE_GROUP`, `ipv6(7)`.
    ///
    /// ```no_run
    /// use ringsock::prelude::*;
    /// let group = "ff01::1234".parse().expect("an address");
    /// let socket = Socket::new(AF_INET6, SOCK_DGRAM, 0)?;
    /// socket.join_multicast_v6(group, 1)?; // 1 is the loopback interface
    /// socket.leave_multicast_v6(group, 1)?;
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn leave_multicast_v6(&self, group: Ipv6Addr, interface: u32) -> Result<()> {
        self.setsockopt(
            IPPROTO_IPV6,
            IPV6_LEAVE_GROUP,
            &membership_v6(group, interface),
        )
    }
}
