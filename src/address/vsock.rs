//! AF_VSOCK: `sockaddr_vm`.

use super::{Address, SockAddr, ToAddress, take, wire_family};
use crate::constants::{AF_VSOCK, Family};
use crate::error::Result;
use std::fmt;

/// The address of an `AF_VSOCK` socket, between a host and its virtual machines: Python's
/// `(cid, port)`.
///
/// # Source
///
/// [vsock(7)](https://man7.org/linux/man-pages/man7/vsock.7.html), `struct sockaddr_vm`.
///
/// # Example
///
/// ```
/// use ringsock::{AF_VSOCK, Address, ToAddress, VMADDR_CID_HOST, VsockAddr};
///
/// let address = (VMADDR_CID_HOST, 1024).to_address(AF_VSOCK)?;
/// assert_eq!(address, Address::from(VsockAddr { cid: 2, port: 1024 }));
/// assert_eq!(address.to_string(), "vsock:2:1024");
/// # Ok::<(), ringsock::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VsockAddr {
    /// The machine: `VMADDR_CID_HOST`, a guest's number, or `VMADDR_CID_ANY`.
    pub cid: u32,
    /// The port; `VMADDR_PORT_ANY` lets the kernel choose.
    pub port: u32,
}

// sockaddr_vm of linux/vm_sockets.h: family 2 | zeros 2 | port 4 | cid 4 | flags and zeros 4, in
// the machine's order.
const LEN: usize = size_of::<libc::sockaddr_vm>();
const _: () = assert!(LEN == 16);

impl VsockAddr {
    pub(super) fn encode(self) -> Result<SockAddr> {
        let mut bytes = [0; LEN];
        bytes[..2].copy_from_slice(&wire_family(AF_VSOCK)?);
        bytes[4..8].copy_from_slice(&self.port.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.cid.to_ne_bytes());
        Ok(SockAddr::new(&bytes))
    }

    pub(super) fn decode(mut data: &[u8]) -> Option<Address> {
        take::<2>(&mut data)?;
        let port = u32::from_ne_bytes(take(&mut data)?);
        let cid = u32::from_ne_bytes(take(&mut data)?);
        Some(Address::Vsock(Self { cid, port }))
    }
}

impl fmt::Display for VsockAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vsock:{}:{}", self.cid, self.port)
    }
}

impl From<VsockAddr> for Address {
    fn from(address: VsockAddr) -> Self {
        Self::Vsock(address)
    }
}

impl ToAddress for VsockAddr {
    fn to_address(&self, family: Family) -> Result<Address> {
        Address::from(*self).for_family(family)
    }
}
