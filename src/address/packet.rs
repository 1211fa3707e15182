//! AF_PACKET: `sockaddr_ll`.

use super::{Address, SockAddr, ToAddress, raw, take, wire_family};
use crate::constants::{AF_PACKET, Family};
use crate::error::{Error, Result};
use std::fmt;

/// The address of an `AF_PACKET` socket, below the network protocols: Python's
/// `(ifname, proto, pkttype, hatype, addr)`.
///
/// The interface is held by its index, as the kernel gives it: receiving a packet then asks the
/// kernel for no name, and the address survives a renaming. [`PacketAddr::new`] takes the name.
///
/// # Source
///
/// [packet(7)](https://man7.org/linux/man-pages/man7/packet.7.html), `struct sockaddr_ll`.
///
/// # Example
///
/// ```
/// use ringsock::{ETH_P_ALL, PACKET_HOST, PacketAddr};
///
/// # if std::path::Path::new("/sys/class/net/lo").exists() {
/// let address = PacketAddr::new("lo", ETH_P_ALL)?;
/// assert_eq!((address.pkttype, address.hatype, address.addr()), (PACKET_HOST, 0, &[][..]));
/// # }
/// # Ok::<(), ringsock::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PacketAddr {
    /// The index of the network interface; 0 is every interface.
    pub interface: u32,
    /// The protocol (`ETH_P_*`) in host byte order.
    pub proto: u16,
    /// Whom the packet is for: `PACKET_HOST` and its like.
    pub pkttype: u8,
    /// The kind of hardware (`ARPHRD_*`).
    pub hatype: u16,
    addr_len: u8,
    // Zero from addr_len on, so that equal addresses compare equal.
    addr: [u8; ADDR_LEN_MAX],
}

// sockaddr_ll of linux/if_packet.h: family 2 | proto 2, big-endian | interface 4 | hatype 2 |
// pkttype 1 | length of the hardware address 1 | hardware address 8.
const LEN: usize = size_of::<libc::sockaddr_ll>();
const ADDR_LEN_MAX: usize = 8;
const _: () = assert!(LEN == 20);

impl PacketAddr {
    /// The address of this protocol (in host byte order) on the interface of this name.
    ///
    /// # Errors
    ///
    /// `ENODEV`: no such interface.
    ///
    /// # Source
    ///
    /// [netdevice(7)](https://man7.org/linux/man-pages/man7/netdevice.7.html), `SIOCGIFINDEX`.
    ///
    /// # Example
    ///
    /// ```
    /// use ringsock::{ETH_P_ALL, PacketAddr};
    ///
    /// let error = PacketAddr::new("no such name", ETH_P_ALL).unwrap_err();
    /// assert_eq!(error.to_string(), "[Errno 19] No such device");
    /// ```
    pub fn new(interface: &str, proto: u16) -> Result<Self> {
        let interface = raw::interface_index(interface).ok_or(Error::from_errno(libc::ENODEV))?;
        Ok(Self {
            interface,
            proto,
            pkttype: crate::constants::PACKET_HOST,
            hatype: 0,
            addr_len: 0,
            addr: [0; ADDR_LEN_MAX],
        })
    }

    /// The same with this hardware address.
    ///
    /// # Errors
    ///
    /// [`Error::Value`]: more than 8 bytes.
    ///
    /// # Example
    ///
    /// ```
    /// use ringsock::{Error, PacketAddr};
    ///
    /// # if std::path::Path::new("/sys/class/net/lo").exists() {
    /// let address = PacketAddr::new("lo", 0x0800)?;
    /// assert_eq!(address.with_addr(&[2, 0, 0, 0, 0, 1])?.addr(), [2, 0, 0, 0, 0, 1]);
    /// assert!(matches!(address.with_addr(&[0; 9]), Err(Error::Value(_))));
    /// # }
    /// # Ok::<(), Error>(())
    /// ```
    pub fn with_addr(self, addr: &[u8]) -> Result<Self> {
        self.with_hardware(addr).ok_or(Error::Value(
            "Hardware address must be 8 bytes or less".into(),
        ))
    }

    fn with_hardware(mut self, addr: &[u8]) -> Option<Self> {
        self.addr = [0; ADDR_LEN_MAX];
        self.addr.get_mut(..addr.len())?.copy_from_slice(addr);
        self.addr_len = addr.len() as u8;
        Some(self)
    }

    /// The hardware address: 6 bytes on Ethernet and the loopback, at most 8.
    ///
    /// # Example
    ///
    /// ```
    /// # if std::path::Path::new("/sys/class/net/lo").exists() {
    /// let address = ringsock::PacketAddr::new("lo", ringsock::ETH_P_ALL)?;
    /// assert!(address.addr().is_empty()); // What getsockname() gives has one.
    /// # }
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    #[must_use]
    pub fn addr(&self) -> &[u8] {
        &self.addr[..usize::from(self.addr_len)]
    }

    pub(super) fn encode(self) -> Result<SockAddr> {
        let mut bytes = [0; LEN];
        bytes[..2].copy_from_slice(&wire_family(AF_PACKET)?);
        bytes[2..4].copy_from_slice(&self.proto.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.interface.to_ne_bytes());
        bytes[8..10].copy_from_slice(&self.hatype.to_ne_bytes());
        bytes[10] = self.pkttype;
        bytes[11] = self.addr_len;
        bytes[12..].copy_from_slice(&self.addr);
        Ok(SockAddr::new(&bytes))
    }

    /// Hardware addresses over 8 bytes (InfiniBand has 20) have no room here: `None`.
    pub(super) fn decode(mut data: &[u8]) -> Option<Address> {
        let proto = u16::from_be_bytes(take(&mut data)?);
        let interface = u32::from_ne_bytes(take(&mut data)?);
        let hatype = u16::from_ne_bytes(take(&mut data)?);
        let [pkttype, addr_len] = take(&mut data)?;
        let address = Self {
            interface,
            proto,
            pkttype,
            hatype,
            addr_len: 0,
            addr: [0; ADDR_LEN_MAX],
        };
        let addr = data.get(..usize::from(addr_len))?;
        Some(Address::Packet(address.with_hardware(addr)?))
    }
}

impl fmt::Display for PacketAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "packet:{}:{:#06x}", self.interface, self.proto)?;
        self.addr()
            .iter()
            .try_for_each(|byte| write!(f, ":{byte:02x}"))
    }
}

impl From<PacketAddr> for Address {
    fn from(address: PacketAddr) -> Self {
        Self::Packet(address)
    }
}

impl ToAddress for PacketAddr {
    fn to_address(&self, family: Family) -> Result<Address> {
        Address::from(*self).for_family(family)
    }
}
