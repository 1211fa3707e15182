//! The header by which a proxy tells who the client is: the PROXY protocol, version 2.

use std::net::{IpAddr, SocketAddr};

use ringsock::Address;

/// The header of the PROXY protocol, version 2: who connected to what.
///
/// Source: The PROXY protocol, versions 1 & 2, section 2.2.
pub fn proxy_header(source: &Address, destination: &Address) -> Vec<u8> {
    const STREAM: u8 = 0x1;
    // The signature, then version 2 and the command PROXY.
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec();
    let addresses = [source, destination].map(Address::as_socket_addr);
    let mut body = Vec::new();
    let family = match addresses.map(|address| address.map(unmapped)) {
        [Some(source), Some(destination)] => {
            let family = match (source.ip(), destination.ip()) {
                (IpAddr::V4(source), IpAddr::V4(destination)) => {
                    body.extend(source.octets());
                    body.extend(destination.octets());
                    0x10
                }
                (source, destination) => {
                    for ip in [source, destination] {
                        body.extend(match ip {
                            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                            IpAddr::V6(ip) => ip.octets(),
                        });
                    }
                    0x20
                }
            };
            body.extend(source.port().to_be_bytes());
            body.extend(destination.port().to_be_bytes());
            family
        }
        // AF_UNIX: two paths of 108 bytes, padded with zeros.
        _ => {
            for address in [source, destination] {
                let mut path = match address {
                    Address::Unix(path) => path.to_string().into_bytes(),
                    _ => Vec::new(),
                };
                path.resize(108, 0);
                body.extend(path);
            }
            0x30
        }
    };
    header.push(family | STREAM);
    header.extend((body.len() as u16).to_be_bytes());
    header.extend(body);
    header
}

/// An IPv4 address that came in IPv6's form, as IPv4.
fn unmapped(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
