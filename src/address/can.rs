//! AF_CAN: `sockaddr_can`.

use super::{Address, SockAddr, ToAddress, expect_family, raw, take, wire_family};
use crate::constants::{AF_CAN, Family};
use crate::error::{Error, Result};
use std::fmt;

/// The address of an `AF_CAN` socket: Python's `(interface,)` for `CAN_RAW` and `CAN_BCM`,
/// `(interface, rx_addr, tx_addr)` for `CAN_ISOTP`, `(interface, name, pgn, addr)` for
/// `CAN_J1939`.
///
/// Which of the three it is only the socket's protocol tells, not the address: the kernel keeps
/// them in a union, and so does this type. Build it with the function and read it with the method
/// of the protocol. The interface is held by its index; 0 is every interface.
///
/// # Source
///
/// [SocketCAN](https://docs.kernel.org/networking/can.html), `struct sockaddr_can`.
///
/// # Example
///
/// ```
/// use ringsock::CanAddr;
///
/// let address = CanAddr::isotp("", 0x123, 0x321)?;
/// assert_eq!((address.interface(), address.as_isotp()), (0, (0x123, 0x321)));
/// # Ok::<(), ringsock::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CanAddr {
    interface: u32,
    /// `can_addr` of `sockaddr_can`.
    union: [u8; UNION_LEN],
}

// sockaddr_can of linux/can.h: family 2 | zeros 2 | interface 4 | a union of 16, by protocol
//
//   CAN_ISOTP   rx_id 4 | tx_id 4
//   CAN_J1939   name 8 | pgn 4 | addr 1
//
// in the machine's order.
const UNION_LEN: usize = 16;
const LEN: usize = size_of::<libc::sockaddr_can>();
const _: () = assert!(LEN == 8 + UNION_LEN);

impl CanAddr {
    /// The address for `CAN_RAW` and `CAN_BCM`; the empty name is every interface.
    ///
    /// # Errors
    ///
    /// `ENODEV`: no such interface. [`Error::Message`]: `AF_CAN interface name too long` (16 bytes
    /// or more).
    ///
    /// # Source
    ///
    /// [netdevice(7)](https://man7.org/linux/man-pages/man7/netdevice.7.html) (`SIOCGIFINDEX`), `struct sockaddr_can`.
    ///
    /// # Example
    ///
    /// ```
    /// use ringsock::CanAddr;
    ///
    /// assert_eq!(CanAddr::raw("")?.interface(), 0);
    /// assert_eq!(CanAddr::raw("no such name").unwrap_err().errno(), Some(19)); // ENODEV
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn raw(interface: &str) -> Result<Self> {
        let interface = match interface {
            "" => 0,
            name if name.len() >= libc::IFNAMSIZ => {
                return Err(Error::Message("AF_CAN interface name too long".into()));
            }
            name => raw::interface_index(name).ok_or(Error::from_errno(libc::ENODEV))?,
        };
        Ok(Self {
            interface,
            union: [0; UNION_LEN],
        })
    }

    /// The address for `CAN_ISOTP`: the identifiers to receive and to send with.
    ///
    /// # Errors
    ///
    /// As [`raw`](CanAddr::raw).
    ///
    /// # Source
    ///
    /// [netdevice(7)](https://man7.org/linux/man-pages/man7/netdevice.7.html) (`SIOCGIFINDEX`), `struct sockaddr_can`.
    ///
    /// # Example
    ///
    /// ```
    /// use ringsock::CanAddr;
    ///
    /// assert_eq!(CanAddr::isotp("", 0x123, 0x321)?.as_isotp(), (0x123, 0x321));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn isotp(interface: &str, rx_addr: u32, tx_addr: u32) -> Result<Self> {
        let mut address = Self::raw(interface)?;
        address.union[..4].copy_from_slice(&rx_addr.to_ne_bytes());
        address.union[4..8].copy_from_slice(&tx_addr.to_ne_bytes());
        Ok(address)
    }

    /// The address for `CAN_J1939`: the 64-bit name (or `J1939_NO_NAME`), the parameter group
    /// number (or `J1939_NO_PGN`), the address (or `J1939_NO_ADDR`).
    ///
    /// # Errors
    ///
    /// As [`raw`](CanAddr::raw).
    ///
    /// # Source
    ///
    /// [netdevice(7)](https://man7.org/linux/man-pages/man7/netdevice.7.html) (`SIOCGIFINDEX`), `struct sockaddr_can`.
    ///
    /// # Example
    ///
    /// ```
    /// use ringsock::CanAddr;
    ///
    /// let anybody = CanAddr::j1939("", ringsock::J1939_NO_NAME, ringsock::J1939_NO_PGN, 0x20)?;
    /// assert_eq!(anybody.as_j1939(), (0, 0x40000, 0x20));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn j1939(interface: &str, name: u64, pgn: u32, addr: u8) -> Result<Self> {
        let mut address = Self::raw(interface)?;
        address.union[..8].copy_from_slice(&name.to_ne_bytes());
        address.union[8..12].copy_from_slice(&pgn.to_ne_bytes());
        address.union[12] = addr;
        Ok(address)
    }

    /// The index of the network interface; 0 is every interface.
    ///
    /// # Example
    ///
    /// ```
    /// assert_eq!(ringsock::CanAddr::raw("")?.interface(), 0);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    #[must_use]
    pub fn interface(&self) -> u32 {
        self.interface
    }

    /// `(rx_addr, tx_addr)` of an address of `CAN_ISOTP`.
    ///
    /// # Example
    ///
    /// ```
    /// assert_eq!(ringsock::CanAddr::isotp("", 1, 2)?.as_isotp(), (1, 2));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    #[must_use]
    pub fn as_isotp(&self) -> (u32, u32) {
        let [a, b, c, d, e, f, g, h, ..] = self.union;
        (
            u32::from_ne_bytes([a, b, c, d]),
            u32::from_ne_bytes([e, f, g, h]),
        )
    }

    /// `(name, pgn, addr)` of an address of `CAN_J1939`.
    ///
    /// # Example
    ///
    /// ```
    /// assert_eq!(ringsock::CanAddr::j1939("", 1, 2, 3)?.as_j1939(), (1, 2, 3));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    #[must_use]
    pub fn as_j1939(&self) -> (u64, u32, u8) {
        let [a, b, c, d, e, f, g, h, i, j, k, l, addr, ..] = self.union;
        (
            u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
            u32::from_ne_bytes([i, j, k, l]),
            addr,
        )
    }

    pub(super) fn encode(self) -> Result<SockAddr> {
        let mut bytes = [0; LEN];
        bytes[..2].copy_from_slice(&wire_family(AF_CAN)?);
        bytes[4..8].copy_from_slice(&self.interface.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.union);
        Ok(SockAddr::new(&bytes))
    }

    /// The kernel leaves out the part of the union that the protocol does not use.
    pub(super) fn decode(mut data: &[u8]) -> Option<Address> {
        take::<2>(&mut data)?;
        let interface = u32::from_ne_bytes(take(&mut data)?);
        let mut union = [0; UNION_LEN];
        let len = data.len().min(UNION_LEN);
        union[..len].copy_from_slice(&data[..len]);
        Some(Address::Can(Self { interface, union }))
    }
}

impl fmt::Display for CanAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "can:{}:", self.interface)?;
        self.union
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl From<CanAddr> for Address {
    fn from(address: CanAddr) -> Self {
        Self::Can(address)
    }
}

impl ToAddress for CanAddr {
    fn to_address(&self, family: Family) -> Result<Address> {
        Address::from(*self).for_family(family)
    }
}

/// Python's `(interface,)`.
impl ToAddress for (&str,) {
    fn to_address(&self, family: Family) -> Result<Address> {
        expect_family(family, AF_CAN)?;
        Ok(CanAddr::raw(self.0)?.into())
    }
}
