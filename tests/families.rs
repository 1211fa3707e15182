//! Sockets of the families beyond the Internet and Unix, as far as the kernel here has them.
#![allow(unsafe_code)]

mod support;

use std::collections::BTreeSet;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::{fs, io, process};

use ringsock::prelude::*;
use ringsock::{AlgAddr, NetlinkAddr, PacketAddr, VMADDR_CID_LOCAL, VsockAddr};
use support::checked;

/// A socket of this family, or `None`, with the reason said, where the kernel has none or this user may have none.
fn socket(family: Family, kind: Kind, proto: i32) -> Option<Socket> {
    match Socket::new(family, kind, proto) {
        Ok(socket) => {
            socket.settimeout(10).unwrap();
            Some(socket)
        }
        Err(error) => {
            println!("skipped: no socket of {family:?} here: {error}");
            None
        }
    }
}

#[test]
fn a_family_that_the_kernel_lacks_fails_with_its_errno() {
    checked(|| {
        let families = [
            AF_NETLINK,
            AF_PACKET,
            AF_VSOCK,
            AF_TIPC,
            AF_CAN,
            AF_ALG,
            AF_RDS,
            AF_QIPCRTR,
            AF_BLUETOOTH,
            Family::new(99),
        ];
        for family in families {
            for kind in [SOCK_RAW, SOCK_DGRAM, SOCK_STREAM, SOCK_SEQPACKET] {
                // SAFETY: socket(2) takes three numbers; the descriptor is closed below, once.
                let fd =
                    unsafe { libc::socket(family.bits(), kind.bits() | libc::SOCK_CLOEXEC, 0) };
                let expected = match fd {
                    -1 => io::Error::last_os_error().raw_os_error(),
                    // SAFETY: the descriptor is ours and nobody else's.
                    fd => (unsafe { libc::close(fd) } != 0).then_some(0),
                };
                let ours = Socket::new(family, kind, 0).err();
                assert_eq!(
                    ours.and_then(|error| error.errno()),
                    expected,
                    "{family:?} {kind:?}"
                );
            }
        }
    });
}

/// A request of linux/rtnetlink.h: `nlmsghdr` (length 4, type 2, flags 2, sequence 4, port 4), then `rtgenmsg` padded to 4.
fn link_request() -> [u8; 20] {
    const RTM_GETLINK: u16 = 18;
    const NLM_F_REQUEST_DUMP: u16 = 1 | 0x300;
    let mut request = [0; 20];
    request[..4].copy_from_slice(&20_u32.to_ne_bytes());
    request[4..6].copy_from_slice(&RTM_GETLINK.to_ne_bytes());
    request[6..8].copy_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    request[8..12].copy_from_slice(&7_u32.to_ne_bytes());
    request
}

fn u16_at(bytes: &[u8], at: usize) -> usize {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]]).into()
}

/// The name in a message RTM_NEWLINK: after `ifinfomsg` (16) come attributes, each a length, a type and the value, padded to 4.
fn link_name(mut attributes: &[u8]) -> String {
    const IFLA_IFNAME: usize = 3;
    loop {
        let (len, kind) = (u16_at(attributes, 0), u16_at(attributes, 2));
        if kind == IFLA_IFNAME {
            return String::from_utf8(attributes[4..len - 1].to_vec()).unwrap();
        }
        attributes = &attributes[len.next_multiple_of(4)..];
    }
}

fn interfaces() -> Option<BTreeSet<String>> {
    const NLMSG_DONE: usize = 3;
    const RTM_NEWLINK: usize = 16;
    let netlink = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE)?;
    netlink.bind((0, 0)).unwrap();
    let Address::Netlink(own) = netlink.getsockname().unwrap() else {
        panic!("an address of another family");
    };
    assert!(own.pid != 0 && own.groups == 0, "{own:?}");
    let request = link_request();
    assert_eq!(netlink.sendto(&request, (0, 0)).unwrap(), request.len());
    let mut names = BTreeSet::new();
    loop {
        let (data, from) = netlink.recvfrom(1 << 16).unwrap();
        // The kernel's own port is 0.
        assert_eq!(from, Some(NetlinkAddr::default().into()));
        let mut messages = &data[..];
        while messages.len() >= 16 {
            let len = u32::from_ne_bytes(messages[..4].try_into().unwrap()) as usize;
            assert_eq!(messages[8..12], 7_u32.to_ne_bytes());
            match u16_at(messages, 4) {
                NLMSG_DONE => return Some(names),
                RTM_NEWLINK => assert!(names.insert(link_name(&messages[32..len]))),
                other => panic!("a message of type {other}"),
            }
            messages = &messages[len.next_multiple_of(4).min(messages.len())..];
        }
    }
}

/// From a thread and from a fiber.
#[test]
fn netlink_lists_the_interfaces() {
    checked(|| {
        let Some(names) = interfaces() else {
            return;
        };
        assert_eq!(ringsock::run(interfaces).as_ref(), Some(&names));
        // /proc shows the network namespace of who reads it, /sys that of who mounted it.
        let table = match fs::read_to_string("/proc/self/net/dev") {
            Ok(table) => table,
            Err(error) => {
                println!("skipped: the comparison with /proc/self/net/dev: {error}");
                return;
            }
        };
        let lines = table.lines().skip(2);
        let proc: BTreeSet<String> = lines
            .map(|line| line.split_once(':').unwrap().0.trim().to_owned())
            .collect();
        assert_eq!(names, proc);
        match fs::read_dir("/sys/class/net") {
            Ok(directory) => {
                let entries = directory.map(|entry| entry.unwrap());
                let sys: BTreeSet<String> = entries
                    .filter(|entry| entry.path().join("ifindex").exists())
                    .map(|entry| entry.file_name().into_string().unwrap())
                    .collect();
                if sys != names {
                    println!("skipped: /sys/class/net is another network namespace's: {sys:?}");
                }
            }
            Err(error) => println!("skipped: the comparison with /sys/class/net: {error}"),
        }
    });
}

#[test]
fn a_packet_socket_receives_what_passes() {
    checked(|| {
        const ETH_P_IP: u16 = 0x0800;
        const ARPHRD_LOOPBACK: u16 = 772;
        let Some(sniffer) = socket(AF_PACKET, SOCK_DGRAM, 0) else {
            return;
        };
        sniffer.bind(("lo", ETH_P_IP)).unwrap();
        let Address::Packet(bound) = sniffer.getsockname().unwrap() else {
            panic!("an address of another family");
        };
        let expected = PacketAddr::new("lo", ETH_P_IP).unwrap();
        assert_eq!(
            (bound.interface, bound.proto),
            (expected.interface, ETH_P_IP)
        );
        assert_eq!((bound.hatype, bound.addr()), (ARPHRD_LOOPBACK, &[0; 6][..]));

        sniffer.settimeout(0.5).unwrap();
        let marker = format!("{}: a packet of our own", process::id());
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        let receive = move |sniffer: &Socket| {
            // Other programs' packets pass here too, and where there are many, ours may find no room.
            for _ in 0..60 {
                let sent = sender.send_to(marker.as_bytes(), receiver.local_addr().unwrap());
                assert_eq!(sent.unwrap(), marker.len());
                for _ in 0..2_000 {
                    let (data, from) = match sniffer.recvfrom(65536) {
                        Err(Error::Timeout) => break,
                        other => other.unwrap(),
                    };
                    if !data.ends_with(marker.as_bytes()) {
                        continue;
                    }
                    // The IP header, then UDP's.
                    assert_eq!((data[0], data[9]), (0x45, IPPROTO_UDP as u8));
                    assert_eq!(data.len(), 20 + 8 + marker.len());
                    let Some(Address::Packet(from)) = from else {
                        panic!("from {from:?}");
                    };
                    assert!([PACKET_HOST, PACKET_OUTGOING].contains(&from.pkttype));
                    assert_eq!((from.interface, from.proto), (bound.interface, ETH_P_IP));
                    assert_eq!((from.hatype, from.addr()), (ARPHRD_LOOPBACK, &[0; 6][..]));
                    return;
                }
            }
            panic!("our packet did not pass");
        };
        receive(&sniffer);
        ringsock::run(move || receive(&sniffer));
    });
}

/// The known digest of "abc", from FIPS 180-4.
#[test]
fn the_kernel_hashes() {
    checked(|| {
        let Some(algorithm) = socket(AF_ALG, SOCK_SEQPACKET, 0) else {
            return;
        };
        if let Err(error) = algorithm.bind(AlgAddr::new("hash", "sha256")) {
            println!("skipped: the kernel has no sha256: {error}");
            return;
        }
        let (operation, _) = algorithm.accept().unwrap();
        operation.sendall(b"abc").unwrap();
        let digest = operation.recv(64).unwrap();
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    });
}

/// In 64 bits, as Python sets and gets them; an integer is widened.
#[test]
fn options_of_vsock_have_64_bits() {
    checked(|| {
        let Some(vsock) = socket(AF_VSOCK, SOCK_STREAM, 0) else {
            return;
        };
        let level = AF_VSOCK.bits();
        let get = |option| vsock.getsockopt_u64(level, option).unwrap();
        let huge = 1_u64 << 33;
        vsock
            .setsockopt(level, SO_VM_SOCKETS_BUFFER_MAX_SIZE, huge)
            .unwrap();
        assert_eq!(get(SO_VM_SOCKETS_BUFFER_MAX_SIZE), huge);
        vsock
            .setsockopt(level, SO_VM_SOCKETS_BUFFER_SIZE, 65536)
            .unwrap();
        assert_eq!(get(SO_VM_SOCKETS_BUFFER_SIZE), 65536);
        let short = vsock.getsockopt(level, SO_VM_SOCKETS_BUFFER_SIZE);
        assert_eq!(short.unwrap_err().errno(), Some(libc::EINVAL));
        // Other levels keep the integers of their own.
        assert_eq!(vsock.getsockopt(SOL_SOCKET, SO_TYPE).unwrap(), 1);
        vsock.set_send_buffer_size(10_000).unwrap();
    });
}

#[test]
fn vsock_echoes_over_its_loopback() {
    checked(|| {
        let Some(server) = socket(AF_VSOCK, SOCK_STREAM, 0) else {
            return;
        };
        let unbound = server.getsockname().unwrap();
        let any = VsockAddr {
            cid: VMADDR_CID_ANY,
            port: VMADDR_PORT_ANY,
        };
        assert_eq!(unbound, any.into());
        if let Err(error) = server.bind((VMADDR_CID_LOCAL, VMADDR_PORT_ANY)) {
            println!("skipped: no loopback of AF_VSOCK here: {error}");
            return;
        }
        server.listen(1).unwrap();
        let address = server.getsockname().unwrap();
        let client = socket(AF_VSOCK, SOCK_STREAM, 0).unwrap();
        client.connect(&address).unwrap();
        let (conn, peer) = server.accept().unwrap();
        assert_eq!(peer, client.getsockname().unwrap());
        client.sendall(b"Hello, world").unwrap();
        conn.sendall(&conn.recv(1024).unwrap()).unwrap();
        assert_eq!(&client.recv(1024).unwrap()[..], b"Hello, world");
    });
}

/// The kernel refuses to accept on AF_ALG where the caller asks for an address. Seen here on a listener that only goes by that
/// family, so that it needs no AF_ALG: an address asked for would be that of the TCP peer.
#[test]
fn accept_on_alg_asks_for_no_address() {
    checked(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let algorithm = Socket::from_fd_with(listener.into(), AF_ALG, SOCK_SEQPACKET, 0).unwrap();
        let (operation, peer) = algorithm.accept().unwrap();
        let nothing = Address::Raw {
            family: AF_ALG,
            data: Vec::new(),
        };
        assert_eq!(peer, nothing);
        drop(client);
        assert!(operation.recv(1).unwrap().is_empty());
    });
}
