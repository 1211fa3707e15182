//! The addresses of the families beyond the Internet and Unix: CPython's bytes, its errors, and whatever else may come from the
//! kernel.

use super::*;
use crate::constants::*;

/// What `tests/python/addresses.py` printed: the bytes that CPython passes to bind(2). `__` is padding, zero here.
const RECORDED: &str = include_str!("../../tests/python/addresses.txt");

fn wire(address: &Address) -> Vec<u8> {
    address.encode().unwrap().bytes().to_vec()
}

fn there_is_lo() -> bool {
    raw::interface_index("lo") == Some(1)
}

/// An address of every case of the record, made as a caller would.
fn cases() -> Vec<(&'static str, Address)> {
    let mut cases = vec![
        ("netlink", (0x0102_0304, 0x0A0B_0C0D).to_address(AF_NETLINK)),
        ("vsock", (0x0102_0304, 0x0A0B_0C0D).to_address(AF_VSOCK)),
        (
            "vsock_any",
            (VMADDR_CID_ANY, VMADDR_PORT_ANY).to_address(AF_VSOCK),
        ),
        (
            "tipc_nameseq",
            (TIPC_ADDR_NAMESEQ, 0x0102_0304, 5, 6, TIPC_ZONE_SCOPE).to_address(AF_TIPC),
        ),
        (
            "tipc_name",
            (TIPC_ADDR_NAME, 0x0102_0304, 5, 0).to_address(AF_TIPC),
        ),
        (
            "tipc_id",
            (TIPC_ADDR_ID, 0x0102_0304, 5, 0, TIPC_NODE_SCOPE).to_address(AF_TIPC),
        ),
        ("can_all", ("",).to_address(AF_CAN)),
        ("alg", AlgAddr::new("hash", "sha256").to_address(AF_ALG)),
        (
            "alg_longest",
            AlgAddr {
                r#type: "t".repeat(13),
                name: "n".repeat(63),
                feat: 0x0102,
                mask: 0x0A0B,
            }
            .to_address(AF_ALG),
        ),
    ];
    if there_is_lo() {
        let packet = |proto, pkttype, hatype, addr| {
            let mut address = PacketAddr::new("lo", proto)?.with_addr(addr)?;
            (address.pkttype, address.hatype) = (pkttype, hatype);
            Ok(address.into())
        };
        cases.extend([
            ("packet", ("lo", 0x0806).to_address(AF_PACKET)),
            (
                "packet_full",
                packet(0x1234, PACKET_OTHERHOST, 772, &[2, 3, 4, 5, 6, 7]),
            ),
            (
                "packet_eight",
                packet(3, PACKET_BROADCAST, 1, &[1, 2, 3, 4, 5, 6, 7, 8]),
            ),
            ("can_raw", ("lo",).to_address(AF_CAN)),
            (
                "can_isotp",
                CanAddr::isotp("lo", 0x0102_0304, 0x0A0B_0C0D).map(Address::from),
            ),
            (
                "can_j1939",
                CanAddr::j1939("lo", 0x0102_0304_0506_0708, 0x0A0B_0C0D, 0x7F).map(Address::from),
            ),
        ]);
    } else {
        println!("addresses with an interface skipped: there is no lo here");
    }
    cases
        .into_iter()
        .map(|(name, address)| (name, address.unwrap()))
        .collect()
}

/// The record is little-endian, as the machine was that made it.
#[test]
#[cfg(target_endian = "little")]
fn encodings_are_cpythons() {
    let recorded: Vec<_> = RECORDED
        .lines()
        .map(|line| line.split_once(" = ").unwrap())
        .collect();
    let cases = cases();
    if there_is_lo() {
        assert_eq!(cases.len(), recorded.len());
    }
    for (name, address) in cases {
        let (_, expected) = recorded.iter().find(|(case, _)| *case == name).unwrap();
        let hex: String = wire(&address)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(hex, expected.replace('_', "0"), "{name}");
    }
}

#[test]
fn what_went_in_comes_out() {
    for (name, address) in cases() {
        assert_eq!(
            address.encode().unwrap().decode().as_ref(),
            Some(&address),
            "{name}"
        );
        assert_eq!(address.to_address(AF_UNSPEC).as_ref(), Ok(&address));
    }
    let address = CanAddr::j1939("", 7, 8, 9).unwrap();
    assert_eq!(address.as_j1939(), (7, 8, 9));
    let address = CanAddr::isotp("", 7, 8).unwrap();
    assert_eq!((address.interface(), address.as_isotp()), (0, (7, 8)));
}

/// Texts and kinds of the errors are CPython's, but for what the types rule out.
#[test]
fn errors_are_cpythons() {
    let no_device = Error::from_errno(libc::ENODEV);
    for name in ["no such if", "", "n2345678901234567890"] {
        assert_eq!(
            (name, 1).to_address(AF_PACKET),
            Err(no_device.clone()),
            "{name:?}"
        );
    }
    assert_eq!(("no such if",).to_address(AF_CAN), Err(no_device.clone()));
    assert_eq!(("nul\0",).to_address(AF_CAN), Err(no_device));
    assert_eq!(
        ("n234567890123456",).to_address(AF_CAN),
        Err(Error::Message("AF_CAN interface name too long".into()))
    );
    assert_eq!(
        (9, 1, 1, 1).to_address(AF_TIPC),
        Err(Error::Type("Invalid address type".into()))
    );
    for (kind, name, text) in [
        ("t".repeat(14), String::from("n"), "AF_ALG type too long."),
        (String::from("t"), "n".repeat(64), "AF_ALG name too long."),
        (
            String::from("t\0"),
            String::from("n"),
            "embedded null character",
        ),
        (
            String::from("t"),
            String::from("n\0"),
            "embedded null character",
        ),
    ] {
        let address = AlgAddr::new(&kind, &name);
        let expected = Err(Error::Value(text.into()));
        assert_eq!(address.to_address(AF_ALG), expected);
        assert_eq!(
            Address::from(address).encode().map(|_| ()).err(),
            expected.err()
        );
    }
    for (result, text) in [
        (
            (1, 2).to_address(AF_INET),
            "AF_INET address expected, not two numbers",
        ),
        (
            (1, 2).to_address(AF_UNSPEC),
            "AF_UNSPEC address expected, not two numbers",
        ),
        (
            ("lo",).to_address(AF_PACKET),
            "AF_PACKET address expected, not AF_CAN",
        ),
        (
            (TIPC_ADDR_ID, 1, 1, 1).to_address(AF_VSOCK),
            "AF_VSOCK address expected, not AF_TIPC",
        ),
        (
            AlgAddr::new("hash", "sha256").to_address(AF_CAN),
            "AF_CAN address expected, not AF_ALG",
        ),
        (
            NetlinkAddr::default().to_address(AF_VSOCK),
            "AF_VSOCK address expected, not AF_NETLINK",
        ),
    ] {
        assert_eq!(result, Err(Error::Type(text.into())));
    }
}

#[test]
fn display_begins_with_the_family() {
    let tipc = |address: TipcAddr| Address::from(address).to_string();
    assert_eq!(
        Address::from(NetlinkAddr { pid: 7, groups: 17 }).to_string(),
        "netlink:7:0x11"
    );
    assert_eq!(
        Address::from(VsockAddr { cid: 2, port: 80 }).to_string(),
        "vsock:2:80"
    );
    assert_eq!(
        tipc(TipcAddr::NameSeq {
            service: 70,
            lower: 1,
            upper: 2,
            scope: 2
        }),
        "tipc:{70,1,2}"
    );
    assert_eq!(
        tipc(TipcAddr::Name {
            service: 70,
            instance: 1,
            scope: 2
        }),
        "tipc:{70,1}"
    );
    assert_eq!(
        tipc(TipcAddr::Id {
            node: 3,
            reference: 4,
            scope: 0
        }),
        "tipc:<3:4>"
    );
    assert_eq!(
        Address::from(CanAddr::isotp("", 1, 0).unwrap())
            .to_string()
            .len(),
        "can:0:".len() + 32
    );
    assert_eq!(
        Address::from(AlgAddr::new("hash", "sha1")).to_string(),
        "alg:hash:sha1"
    );
    let mut data = vec![8, 0, 2, 0, 0, 0, 4, 3, 4, 2, 0xAB, 0xCD];
    if cfg!(target_endian = "big") {
        data[2..6].reverse();
    }
    assert_eq!(
        PacketAddr::decode(&data).unwrap().to_string(),
        "packet:2:0x0800:ab:cd"
    );
}

/// Whatever the kernel or a stranger hands over: no panic, no byte made up, and what is understood goes back as the same bytes,
/// up to the padding. Set RINGSOCK_SEED to the printed number to repeat a failure.
#[test]
fn any_bytes_decode() {
    let seed: u64 = match std::env::var("RINGSOCK_SEED") {
        Ok(seed) => seed.parse().expect("RINGSOCK_SEED is a number"),
        Err(_) => 0x5EED_0000_2026,
    };
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let families = [
        AF_NETLINK, AF_PACKET, AF_VSOCK, AF_TIPC, AF_CAN, AF_ALG, AF_INET, AF_INET6, AF_UNIX,
    ];
    let (mut typed, mut undecoded) = (0, 0);
    for case in 0..200_000 {
        let family = families[next() as usize % families.len()];
        let len = match next() % 2 {
            0 => next() as usize % 127,
            _ => next() as usize % 27,
        };
        let mut data: Vec<u8> = (0..len).map(|_| (next() >> 24) as u8).collect();
        // Half of them nearly right, so that both sides of every check are met.
        if next() % 2 == 0 {
            match (family, data.len()) {
                (AF_PACKET, 10..) => data[9] %= 10,
                (AF_TIPC, 1..) => data[0] %= 5,
                (AF_ALG, _) => {
                    data.resize(86, 0);
                    data.iter_mut().for_each(|byte| *byte &= 0x7F);
                    (data[13], data[85]) = (0, 0);
                }
                _ => {}
            }
        }
        let mut bytes = wire_family(family).unwrap().to_vec();
        bytes.extend_from_slice(&data);
        let address = SockAddr::new(&bytes).decode().unwrap();
        assert_eq!(address.family(), family, "case {case} of seed {seed}");
        assert!(!address.to_string().contains('\0') || family == AF_UNIX || family == AF_ALG);
        match &address {
            Address::Raw { data: kept, .. } => {
                undecoded += 1;
                assert_eq!(*kept, data, "case {case} of seed {seed}");
            }
            _ => typed += 1,
        }
        // A path that others bound may be longer than one we may bind.
        if !(family == AF_UNIX && data.len() > 107) {
            let again = address.encode().unwrap().decode();
            assert_eq!(again, Some(address), "case {case} of seed {seed}");
        }
    }
    assert!(
        typed > 60_000 && undecoded > 20_000,
        "{typed} typed, {undecoded} not"
    );
}

/// Every number and every string of a typed address survives the kernel's form. The seed as above.
#[test]
fn random_addresses_of_the_families_survive() {
    let mut state = 0x2026_5EED_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for case in 0..20_000 {
        let scope = next() as i8;
        let mut number = || next() as u32;
        let (a, b, c) = (number(), number(), number());
        let address: Address = match case % 6 {
            0 => NetlinkAddr { pid: a, groups: b }.into(),
            1 => VsockAddr { cid: a, port: b }.into(),
            2 => TipcAddr::NameSeq {
                service: a,
                lower: b,
                upper: c,
                scope,
            }
            .into(),
            3 => TipcAddr::Id {
                node: a,
                reference: b,
                scope,
            }
            .into(),
            4 => CanAddr::j1939("", u64::from(a) << 32 | u64::from(b), c, scope as u8)
                .unwrap()
                .into(),
            _ => AlgAddr {
                r#type: "ü".repeat(a as usize % 7),
                name: "a(b)".repeat(b as usize % 16),
                feat: b,
                mask: c,
            }
            .into(),
        };
        assert_eq!(
            address.encode().unwrap().decode().as_ref(),
            Some(&address),
            "case {case}"
        );
    }
}
