//! AF_NETLINK: `sockaddr_nl`.

use super::{Address, SockAddr, ToAddress, take, wire_family};
use crate::constants::{AF_NETLINK, Family};
use crate::error::Result;
use std::fmt;

/// The address of an `AF_NETLINK` socket: Python's `(pid, groups)`.
///
/// # Source
///
/// [netlink(7)](https://man7.org/linux/man-pages/man7/netlink.7.html), `struct sockaddr_nl`.
///
/// # Example
///
/// ```
/// use ringsock::{Address, NetlinkAddr, prelude::*};
///
/// let socket = Socket::new(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE)?;
/// socket.bind((0, 0))?; // The kernel chooses the port.
/// assert!(matches!(socket.getsockname()?, Address::Netlink(NetlinkAddr { pid: 1.., groups: 0 })));
/// # Ok::<(), ringsock::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct NetlinkAddr {
    /// The port: 0 is the kernel as a peer, and in `bind()` lets the kernel choose.
    pub pid: u32,
    /// The multicast groups, one bit each.
    pub groups: u32,
}

// sockaddr_nl of linux/netlink.h: family 2 | zeros 2 | pid 4 | groups 4, in the machine's order.
const LEN: usize = size_of::<libc::sockaddr_nl>();
const _: () = assert!(LEN == 12);

impl NetlinkAddr {
    pub(super) fn encode(self) -> Result<SockAddr> {
        let mut bytes = [0; LEN];
        bytes[..2].copy_from_slice(&wire_family(AF_NETLINK)?);
        bytes[4..8].copy_from_slice(&self.pid.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.groups.to_ne_bytes());
        Ok(SockAddr::new(&bytes))
    }

    pub(super) fn decode(mut data: &[u8]) -> Option<Address> {
        take::<2>(&mut data)?;
        Some(Address::Netlink(Self {
            pid: u32::from_ne_bytes(take(&mut data)?),
            groups: u32::from_ne_bytes(take(&mut data)?),
        }))
    }
}

impl fmt::Display for NetlinkAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "netlink:{}:{:#x}", self.pid, self.groups)
    }
}

impl From<NetlinkAddr> for Address {
    fn from(address: NetlinkAddr) -> Self {
        Self::Netlink(address)
    }
}

impl ToAddress for NetlinkAddr {
    fn to_address(&self, family: Family) -> Result<Address> {
        Address::from(*self).for_family(family)
    }
}
