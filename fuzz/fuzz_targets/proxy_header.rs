//! The PROXY header that `examples/proxy` sends, of any two addresses: a reader who follows the protocol's text finds them again.
#![no_main]

#[path = "../../examples/common/proxy_header.rs"]
mod proxy_header;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use libfuzzer_sys::fuzz_target;
use ringsock::{Address, UnixAddr};

fuzz_target!(|data: &[u8]| {
    let mut data = data;
    let (source, destination) = (address(&mut data), address(&mut data));
    let header = proxy_header::proxy_header(&source, &destination);
    let read = read(&header).unwrap_or_else(|| panic!("not understood: {header:?}"));
    let expected = match [&source, &destination].map(Address::as_socket_addr) {
        [Some(source), Some(destination)] => {
            let plain = |a: SocketAddr| (a.ip().to_canonical(), a.port());
            Peers::Ip(plain(source), plain(destination))
        }
        _ => Peers::Unix(path(&source), path(&destination)),
    };
    assert_eq!(read, expected, "{source:?} to {destination:?}");
});

#[derive(Debug, PartialEq)]
enum Peers {
    Ip((IpAddr, u16), (IpAddr, u16)),
    Unix(Vec<u8>, Vec<u8>),
}

/// What the header has room for: 108 bytes, padded.
fn path(address: &Address) -> Vec<u8> {
    let mut path = match address {
        Address::Unix(path) => path.to_string().into_bytes(),
        _ => Vec::new(),
    };
    path.resize(108, 0);
    path
}

/// An address of the bytes: a choice, and what it takes.
fn address(data: &mut &[u8]) -> Address {
    let Some((choice, rest)) = data.split_first() else {
        return UnixAddr::Unnamed.into();
    };
    *data = rest;
    let mut take = |count: usize| {
        let (bytes, rest) = data.split_at(count.min(data.len()));
        *data = rest;
        bytes.to_vec()
    };
    let fixed = |bytes: Vec<u8>| {
        let mut all = [0; 18];
        all[..bytes.len()].copy_from_slice(&bytes);
        all
    };
    match choice % 4 {
        0 => {
            let bytes = fixed(take(6));
            let ip = Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]);
            (ip, u16::from_be_bytes([bytes[4], bytes[5]])).into()
        }
        1 => {
            let bytes = fixed(take(18));
            let (ip, port) = bytes.split_first_chunk::<16>().expect("18 bytes");
            (Ipv6Addr::from(*ip), u16::from_be_bytes([port[0], port[1]])).into()
        }
        2 => {
            let path = take(usize::from(choice / 2)).into_iter();
            let text: String = path.filter(|byte| *byte != 0).map(char::from).collect();
            UnixAddr::Path(text.into()).into()
        }
        _ => UnixAddr::Abstract(take(usize::from(choice / 4))).into(),
    }
}

/// Reads a header of version 2, as section 2.2 of the protocol's text has it; `None` where it is not one, or has a byte too many.
fn read(header: &[u8]) -> Option<Peers> {
    let rest = header.strip_prefix(b"\r\n\r\n\0\r\nQUIT\n")?;
    let ([version_command, family, high, low], body) = rest.split_first_chunk::<4>()?;
    let len = usize::from(u16::from_be_bytes([*high, *low]));
    if *version_command != 0x21 || body.len() != len || family & 0xf != 1 {
        return None;
    }
    let port = |at: usize| Some(u16::from_be_bytes(body.get(at..at + 2)?.try_into().ok()?));
    match (family >> 4, len) {
        (1, 12) => {
            let ip = |at: usize| {
                Some(Ipv4Addr::from(
                    <[u8; 4]>::try_from(body.get(at..at + 4)?).ok()?,
                ))
            };
            Some(Peers::Ip(
                (ip(0)?.into(), port(8)?),
                (ip(4)?.into(), port(10)?),
            ))
        }
        (2, 36) => {
            let ip = |at: usize| {
                let ip = Ipv6Addr::from(<[u8; 16]>::try_from(body.get(at..at + 16)?).ok()?);
                Some(IpAddr::V6(ip).to_canonical())
            };
            Some(Peers::Ip((ip(0)?, port(32)?), (ip(16)?, port(34)?)))
        }
        (3, 216) => Some(Peers::Unix(body[..108].to_vec(), body[108..].to_vec())),
        _ => None,
    }
}
