//! What needs no lookup: addresses as text and bytes, byte order, and the machine's own interfaces.

use std::ffi::CString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::raw;
use crate::constants::{AF_INET, AF_INET6, Family};
use crate::error::{Error, Result};

/// Whether IPv6 addresses are supported: always, as in Python on Linux. Whether the machine has IPv6 is another question.
///
/// # Source
///
/// Python [`socket.has_ipv6`](https://docs.python.org/3/library/socket.html#socket.has_ipv6).
#[allow(non_upper_case_globals, reason = "Python's name")]
pub const has_ipv6: bool = true;

/// A 16-bit number from network byte order (big-endian) to this machine's.
///
/// # Source
///
/// Python [`socket.ntohs(x)`](https://docs.python.org/3/library/socket.html#socket.ntohs);
/// [ntohs(3)](https://man7.org/linux/man-pages/man3/byteorder.3.html).
///
/// ```
/// assert_eq!(ringsock::ntohs(u16::from_ne_bytes([0, 80])), 80);
/// ```
#[must_use]
pub const fn ntohs(x: u16) -> u16 {
    u16::from_be(x)
}

/// A 32-bit number from network byte order (big-endian) to this machine's.
///
/// # Source
///
/// Python [`socket.ntohl(x)`](https://docs.python.org/3/library/socket.html#socket.ntohl);
/// [ntohl(3)](https://man7.org/linux/man-pages/man3/byteorder.3.html).
///
/// ```
/// assert_eq!(ringsock::ntohl(u32::from_ne_bytes([127, 0, 0, 1])), ringsock::INADDR_LOOPBACK);
/// ```
#[must_use]
pub const fn ntohl(x: u32) -> u32 {
    u32::from_be(x)
}

/// A 16-bit number from this machine's byte order to network byte order (big-endian).
///
/// # Source
///
/// Python [`socket.htons(x)`](https://docs.python.org/3/library/socket.html#socket.htons);
/// [htons(3)](https://man7.org/linux/man-pages/man3/byteorder.3.html).
///
/// ```
/// assert_eq!(ringsock::htons(80).to_ne_bytes(), [0, 80]);
/// ```
#[must_use]
pub const fn htons(x: u16) -> u16 {
    x.to_be()
}

/// A 32-bit number from this machine's byte order to network byte order (big-endian).
///
/// # Source
///
/// Python [`socket.htonl(x)`](https://docs.python.org/3/library/socket.html#socket.htonl);
/// [htonl(3)](https://man7.org/linux/man-pages/man3/byteorder.3.html).
///
/// ```
/// assert_eq!(ringsock::htonl(ringsock::INADDR_LOOPBACK).to_ne_bytes(), [127, 0, 0, 1]);
/// ```
#[must_use]
pub const fn htonl(x: u32) -> u32 {
    x.to_be()
}

fn argument(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Value("embedded null character".into()))
}

/// The four bytes of an IPv4 address, in the C library's forms: `1.2.3.4`, but also `1`, `1.2` and `1.2.3` (the last number fills
/// the remaining bytes), octal and hexadecimal numbers, and anything after a space. [`inet_pton`] is strict.
///
/// # Errors
///
/// `Message`: `illegal IP address string passed to inet_aton`. `Value`: a NUL in the text.
///
/// # Source
///
/// Python [`socket.inet_aton(ip_string)`](https://docs.python.org/3/library/socket.html#socket.inet_aton);
/// [inet_aton(3)](https://man7.org/linux/man-pages/man3/inet_aton.3.html).
///
/// ```
/// assert_eq!(ringsock::inet_aton("127.1")?, [127, 0, 0, 1]);
/// assert!(ringsock::inet_aton("256.1.1.1").is_err());
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn inet_aton(ip_string: &str) -> Result<[u8; 4]> {
    raw::aton(&argument(ip_string)?)
        .map(|ip| ip.octets())
        .ok_or_else(|| Error::Message("illegal IP address string passed to inet_aton".into()))
}

/// An IPv4 address of four bytes as text.
///
/// # Errors
///
/// `Message`: `packed IP wrong length for inet_ntoa`.
///
/// # Source
///
/// Python [`socket.inet_ntoa(packed_ip)`](https://docs.python.org/3/library/socket.html#socket.inet_ntoa);
/// [inet_ntoa(3)](https://man7.org/linux/man-pages/man3/inet_ntoa.3.html).
///
/// ```
/// assert_eq!(ringsock::inet_ntoa(&[127, 0, 0, 1])?, "127.0.0.1");
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn inet_ntoa(packed_ip: &[u8]) -> Result<String> {
    match <[u8; 4]>::try_from(packed_ip) {
        Ok(octets) => Ok(Ipv4Addr::from(octets).to_string()),
        Err(_) => Err(Error::Message(
            "packed IP wrong length for inet_ntoa".into(),
        )),
    }
}

/// The bytes of an address: 4 for AF_INET, 16 for AF_INET6. Of IPv4 it takes four decimal numbers only, and no scope (`%lo`).
///
/// # Errors
///
/// `Message`: `illegal IP address string passed to inet_pton`. `EAFNOSUPPORT`: another family. `Value`: a NUL in the text.
///
/// # Source
///
/// Python [`socket.inet_pton(address_family, ip_string)`](https://docs.python.org/3/library/socket.html#socket.inet_pton);
/// [inet_pton(3)](https://man7.org/linux/man-pages/man3/inet_pton.3.html).
///
/// ```
/// use ringsock::{AF_INET, AF_INET6};
/// assert_eq!(ringsock::inet_pton(AF_INET, "127.0.0.1")?, [127, 0, 0, 1]);
/// assert_eq!(ringsock::inet_pton(AF_INET6, "::1")?.len(), 16);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn inet_pton(address_family: Family, ip_string: &str) -> Result<Vec<u8>> {
    let len = if address_family == AF_INET { 4 } else { 16 };
    match raw::pton(address_family, &argument(ip_string)?)? {
        Some(bytes) => Ok(bytes[..len].to_vec()),
        None => Err(Error::Message(
            "illegal IP address string passed to inet_pton".into(),
        )),
    }
}

/// An address of 4 bytes (AF_INET) or 16 bytes (AF_INET6) as text.
///
/// # Errors
///
/// `Value`: `invalid length of packed IP address string`, `unknown address family 1`.
///
/// # Source
///
/// Python [`socket.inet_ntop(address_family, packed_ip)`](https://docs.python.org/3/library/socket.html#socket.inet_ntop);
/// [inet_ntop(3)](https://man7.org/linux/man-pages/man3/inet_ntop.3.html).
///
/// ```
/// use ringsock::AF_INET6;
/// assert_eq!(ringsock::inet_ntop(AF_INET6, &[0; 16])?, "::");
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn inet_ntop(address_family: Family, packed_ip: &[u8]) -> Result<String> {
    let ip = match address_family {
        AF_INET => <[u8; 4]>::try_from(packed_ip)
            .map(|octets| IpAddr::V4(Ipv4Addr::from(octets)))
            .ok(),
        AF_INET6 => <[u8; 16]>::try_from(packed_ip)
            .map(|octets| IpAddr::V6(Ipv6Addr::from(octets)))
            .ok(),
        other => {
            let text = format!("unknown address family {}", other.bits());
            return Err(Error::Value(text.into()));
        }
    };
    ip.map(raw::presentation)
        .ok_or_else(|| Error::Value("invalid length of packed IP address string".into()))
}

/// The indices and names of this machine's network interfaces (those of its network namespace).
///
/// # Errors
///
/// `EMFILE`, `ENFILE`, `ENOBUFS`: asking the kernel takes a socket.
///
/// # Source
///
/// Python [`socket.if_nameindex()`](https://docs.python.org/3/library/socket.html#socket.if_nameindex);
/// [if_nameindex(3)](https://man7.org/linux/man-pages/man3/if_nameindex.3.html).
///
/// ```
/// assert!(ringsock::if_nameindex()?.contains(&(1, "lo".into())));
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn if_nameindex() -> Result<Vec<(u32, String)>> {
    raw::interfaces()
}

/// The index of the interface of this name.
///
/// # Errors
///
/// `Message`: `no interface with this name`. `Value`: a NUL in the name.
///
/// # Source
///
/// Python [`socket.if_nametoindex(if_name)`](https://docs.python.org/3/library/socket.html#socket.if_nametoindex);
/// [if_nametoindex(3)](https://man7.org/linux/man-pages/man3/if_nametoindex.3.html).
///
/// ```
/// assert_eq!(ringsock::if_nametoindex("lo")?, 1);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn if_nametoindex(if_name: &str) -> Result<u32> {
    let name = CString::new(if_name).map_err(|_| Error::Value("embedded null byte".into()))?;
    match raw::interface_index(&name) {
        0 => Err(Error::Message("no interface with this name".into())),
        index => Ok(index),
    }
}

/// The name of the interface that has this index.
///
/// # Errors
///
/// `ENXIO`: no interface has it.
///
/// # Source
///
/// Python [`socket.if_indextoname(if_index)`](https://docs.python.org/3/library/socket.html#socket.if_indextoname);
/// [if_indextoname(3)](https://man7.org/linux/man-pages/man3/if_indextoname.3.html).
///
/// ```
/// assert_eq!(ringsock::if_indextoname(1)?, "lo");
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn if_indextoname(if_index: u32) -> Result<String> {
    raw::interface_name(if_index)
}
