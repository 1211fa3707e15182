//! Every constant of Python's `socket` module, with Python's (and C's) name and the kernel's value.
//!
//! This file owns the tables: address families, socket types, `MSG_*` flags, options, protocol
//! numbers and the codes of name resolution. Families, types and message flags are newtypes that
//! print their C names; everything else is a plain number, as `setsockopt` takes it. It knows
//! nothing of sockets, addresses or errors.
//!
//! An unknown number is never refused here: the kernel may know families and options that this
//! table does not.

use std::fmt;
use std::ops::{BitOr, BitOrAssign};

/// The value of one table row: the number written beside the name, or else what `libc` says.
macro_rules! value {
    ($type:ty, $name:ident) => {
        libc::$name as $type
    };
    ($type:ty, $name:ident, $value:expr) => {
        $value
    };
}

/// A number newtype and its table of names, so that a name and its value stand once.
///
/// `flags` are the bits that combine freely; the others together form one number, so that
/// `SOCK_RAW` (3) is not taken for `SOCK_STREAM | SOCK_DGRAM` (1 | 2).
macro_rules! number {
    (
        $(#[$meta:meta])*
        $type:ident, flags: $flags:expr, source: $source:literal {
            $($name:ident $(= $value:expr)?,)+
        }
    ) => {
        $(#[$meta])*
        #[repr(transparent)]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(i32);

        $(
            #[doc = concat!("`", stringify!($name), "`: see ", $source, ".")]
            #[allow(non_upper_case_globals, reason = "AF_DECnet keeps C's spelling")]
            pub const $name: $type = $type(value!(i32, $name $(, $value)?));
        )+

        impl $type {
            /// Bits that are flags of their own, whatever the other bits say.
            const FLAGS: i32 = $flags;

            /// Of two names with one value, the first is the one printed.
            const NAMES: &[(&str, i32)] = &[$((stringify!($name), $name.0),)+];

            /// Takes any number, known to this crate or not.
            #[must_use]
            pub const fn new(bits: i32) -> Self {
                Self(bits)
            }

            /// The number, as the kernel takes it.
            #[must_use]
            pub const fn bits(self) -> i32 {
                self.0
            }

            /// Whether `self` has every flag of `other` and, where `other` also has a number
            /// (a family, a socket type), the same number. Zero is contained in everything.
            #[must_use]
            pub const fn contains(self, other: Self) -> bool {
                let flags = other.0 & Self::FLAGS;
                let number = other.0 & !Self::FLAGS;
                self.0 & flags == flags && (number == 0 || self.0 & !Self::FLAGS == number)
            }
        }

        impl From<i32> for $type {
            fn from(bits: i32) -> Self {
                Self(bits)
            }
        }

        impl From<$type> for i32 {
            fn from(value: $type) -> Self {
                value.0
            }
        }

        impl BitOr for $type {
            type Output = Self;

            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }

        impl BitOrAssign for $type {
            fn bitor_assign(&mut self, other: Self) {
                self.0 |= other.0;
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_names(f, stringify!($type), Self::NAMES, Self::FLAGS, self.0)
            }
        }
    };
}

/// Groups of plain numbers, each with the page that documents it and a type.
macro_rules! numbers {
    ($($source:literal $type:ident { $($name:ident $(= $value:expr)?,)+ })+) => {
        $($(
            #[doc = concat!("`", stringify!($name), "`: see ", $source, ".")]
            pub const $name: $type = value!($type, $name $(, $value)?);
        )+)+
    };
}

number! {
    /// An address family (`AF_INET`), the first argument of `socket()`.
    ///
    /// Any number may be wrapped; `Debug` prints the C name, or `Family(99)`.
    ///
    /// # Source
    ///
    /// [address_families(7)](https://man7.org/linux/man-pages/man7/address_families.7.html),
    /// Python's `socket.AddressFamily`.
    ///
    /// # Example
    ///
    /// ```
    /// use ringsock::{AF_INET6, Family};
    ///
    /// assert_eq!(format!("{AF_INET6:?}"), "AF_INET6");
    /// assert_eq!(format!("{:?}", Family::new(99)), "Family(99)");
    /// ```
    Family, flags: 0,
    source: "[address_families(7)](https://man7.org/linux/man-pages/man7/address_families.7.html)" {
        AF_UNSPEC, AF_UNIX, AF_INET, AF_AX25, AF_IPX, AF_APPLETALK, AF_NETROM, AF_BRIDGE, AF_ATMPVC,
        AF_X25, AF_INET6, AF_ROSE, AF_DECnet, AF_NETBEUI, AF_SECURITY, AF_KEY, AF_NETLINK, AF_ROUTE,
        AF_PACKET, AF_ASH, AF_ECONET, AF_ATMSVC, AF_RDS, AF_SNA, AF_IRDA, AF_PPPOX, AF_WANPIPE,
        AF_LLC, AF_CAN, AF_TIPC, AF_ALG, AF_VSOCK,
        // Beyond what a CPython built without Bluetooth headers exports.
        AF_BLUETOOTH,
        // linux/socket.h; libc lacks it.
        AF_QIPCRTR = 42,
        // C's second names for the same numbers; the first ones above are printed.
        PF_CAN, PF_PACKET, PF_RDS,
    }
}

number! {
    /// A socket type (`SOCK_STREAM`), the second argument of `socket()`, with the creation flags
    /// `SOCK_NONBLOCK` and `SOCK_CLOEXEC` where they are or-ed in.
    ///
    /// # Source
    ///
    /// [socket(2)](https://man7.org/linux/man-pages/man2/socket.2.html), Python's
    /// `socket.SocketKind`.
    ///
    /// # Example
    ///
    /// ```
    /// use ringsock::{SOCK_DGRAM, SOCK_NONBLOCK, SOCK_RAW};
    ///
    /// let kind = SOCK_DGRAM | SOCK_NONBLOCK;
    /// assert!(kind.contains(SOCK_DGRAM));
    /// assert!(!SOCK_RAW.contains(SOCK_DGRAM)); // Types are numbers, not bits.
    /// assert_eq!(format!("{kind:?}"), "SOCK_DGRAM | SOCK_NONBLOCK");
    /// ```
    Kind, flags: libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
    source: "[socket(2)](https://man7.org/linux/man-pages/man2/socket.2.html)" {
        SOCK_STREAM, SOCK_DGRAM, SOCK_RAW, SOCK_RDM, SOCK_SEQPACKET, SOCK_NONBLOCK, SOCK_CLOEXEC,
    }
}

number! {
    /// Flags of one receive or send (`MSG_PEEK`), and the flags that `recvmsg()` returns. The
    /// default is none.
    ///
    /// # Source
    ///
    /// [recv(2)](https://man7.org/linux/man-pages/man2/recv.2.html),
    /// [send(2)](https://man7.org/linux/man-pages/man2/send.2.html), Python's `socket.MsgFlag`.
    ///
    /// # Example
    ///
    /// ```
    /// use ringsock::{MSG_DONTWAIT, MSG_PEEK, MsgFlags};
    ///
    /// let mut flags = MsgFlags::default();
    /// flags |= MSG_PEEK | MSG_DONTWAIT;
    /// assert_eq!(format!("{flags:?}"), "MSG_PEEK | MSG_DONTWAIT");
    /// ```
    #[derive(Default)]
    MsgFlags, flags: -1,
    source: "[recv(2)](https://man7.org/linux/man-pages/man2/recv.2.html) and \
             [send(2)](https://man7.org/linux/man-pages/man2/send.2.html)" {
        MSG_OOB, MSG_PEEK, MSG_DONTROUTE, MSG_CTRUNC, MSG_TRUNC, MSG_DONTWAIT, MSG_EOR, MSG_WAITALL,
        MSG_CONFIRM, MSG_ERRQUEUE, MSG_NOSIGNAL, MSG_MORE, MSG_FASTOPEN, MSG_CMSG_CLOEXEC,
    }
}

numbers! {
    // How much of a connection shutdown() closes.
    "[shutdown(2)](https://man7.org/linux/man-pages/man2/shutdown.2.html)" i32 {
        SHUT_RD, SHUT_WR, SHUT_RDWR,
    }
    // Backlog of listen().
    "[listen(2)](https://man7.org/linux/man-pages/man2/listen.2.html)" i32 {
        // The kernel's value since Linux 5.4; libc still says 128 for musl.
        SOMAXCONN = 4096,
    }
    // Levels of getsockopt() and setsockopt().
    "[getsockopt(2)](https://man7.org/linux/man-pages/man2/getsockopt.2.html)" i32 {
        SOL_IP, SOL_SOCKET, SOL_TCP, SOL_UDP, SOL_CAN_BASE, SOL_CAN_RAW, SOL_TIPC, SOL_ALG,
        SOL_PACKET,
        // linux/socket.h; libc has it for glibc targets only.
        SOL_RDS = 276,
    }
    // Options of the SO_VM_SOCKETS family, at level AF_VSOCK.
    "[vsock(7)](https://man7.org/linux/man-pages/man7/vsock.7.html)" i32 {
        // linux/vm_sockets.h; libc lacks them.
        SO_VM_SOCKETS_BUFFER_SIZE = 0,
        SO_VM_SOCKETS_BUFFER_MIN_SIZE = 1,
        SO_VM_SOCKETS_BUFFER_MAX_SIZE = 2,
    }
    // Options of SAE J1939 on CAN.
    "[J1939](https://docs.kernel.org/networking/j1939.html)" i32 {
        SO_J1939_FILTER, SO_J1939_PROMISC, SO_J1939_SEND_PRIO, SO_J1939_ERRQUEUE,
    }
    // Options at level SOL_SOCKET.
    "[socket(7)](https://man7.org/linux/man-pages/man7/socket.7.html)" i32 {
        SO_DEBUG, SO_REUSEADDR, SO_TYPE, SO_ERROR, SO_DONTROUTE, SO_BROADCAST, SO_SNDBUF, SO_RCVBUF,
        SO_KEEPALIVE, SO_OOBINLINE, SO_PRIORITY, SO_LINGER, SO_REUSEPORT, SO_PASSCRED, SO_PEERCRED,
        SO_RCVLOWAT, SO_SNDLOWAT, SO_RCVTIMEO, SO_SNDTIMEO, SO_BINDTODEVICE, SO_ACCEPTCONN,
        SO_PEERSEC, SO_PASSSEC, SO_MARK, SO_PROTOCOL, SO_DOMAIN, SO_INCOMING_CPU,
    }
    // Protocol numbers; those of socket() and the levels of their options.
    "[protocols(5)](https://man7.org/linux/man-pages/man5/protocols.5.html)" i32 {
        IPPROTO_HOPOPTS, IPPROTO_IP, IPPROTO_ICMP, IPPROTO_IGMP, IPPROTO_IPIP, IPPROTO_TCP,
        IPPROTO_EGP, IPPROTO_PUP, IPPROTO_UDP, IPPROTO_IDP, IPPROTO_TP, IPPROTO_IPV6,
        IPPROTO_ROUTING, IPPROTO_FRAGMENT, IPPROTO_RSVP, IPPROTO_GRE, IPPROTO_ESP, IPPROTO_AH,
        IPPROTO_ICMPV6, IPPROTO_NONE, IPPROTO_DSTOPTS, IPPROTO_PIM, IPPROTO_SCTP, IPPROTO_UDPLITE,
        IPPROTO_RAW, IPPROTO_MPTCP,
    }
    // Options at level IPPROTO_TCP.
    "[tcp(7)](https://man7.org/linux/man-pages/man7/tcp.7.html)" i32 {
        TCP_NODELAY, TCP_MAXSEG, TCP_CORK, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_SYNCNT,
        TCP_LINGER2, TCP_DEFER_ACCEPT, TCP_WINDOW_CLAMP, TCP_INFO, TCP_QUICKACK, TCP_CONGESTION,
        TCP_USER_TIMEOUT, TCP_FASTOPEN, TCP_NOTSENT_LOWAT,
    }
    // Options at level IPPROTO_IP.
    "[ip(7)](https://man7.org/linux/man-pages/man7/ip.7.html)" i32 {
        IP_DEFAULT_MULTICAST_LOOP, IP_DEFAULT_MULTICAST_TTL, IP_TOS, IP_TTL, IP_HDRINCL, IP_OPTIONS,
        IP_RECVOPTS, IP_RETOPTS, IP_RECVTOS, IP_TRANSPARENT, IP_BIND_ADDRESS_NO_PORT,
        IP_MULTICAST_IF, IP_MULTICAST_TTL, IP_MULTICAST_LOOP, IP_ADD_MEMBERSHIP, IP_DROP_MEMBERSHIP,
        // linux/in.h; libc lacks it.
        IP_MAX_MEMBERSHIPS = 20,
        // Same number as IP_RETOPTS in bits/in.h; libc lacks this name.
        IP_RECVRETOPTS = libc::IP_RETOPTS,
    }
    // Options at level IPPROTO_IPV6.
    "[ipv6(7)](https://man7.org/linux/man-pages/man7/ipv6.7.html)" i32 {
        IPV6_CHECKSUM, IPV6_NEXTHOP, IPV6_UNICAST_HOPS, IPV6_MULTICAST_IF, IPV6_MULTICAST_HOPS,
        IPV6_MULTICAST_LOOP, IPV6_V6ONLY, IPV6_RECVPKTINFO, IPV6_PKTINFO, IPV6_RECVHOPLIMIT,
        IPV6_HOPLIMIT, IPV6_RECVHOPOPTS, IPV6_HOPOPTS, IPV6_RTHDRDSTOPTS, IPV6_RECVRTHDR,
        IPV6_RTHDR, IPV6_RECVDSTOPTS, IPV6_DSTOPTS, IPV6_RECVPATHMTU, IPV6_PATHMTU, IPV6_DONTFRAG,
        IPV6_RECVTCLASS, IPV6_TCLASS,
        // The RFC 3493 names of what libc calls IPV6_ADD_MEMBERSHIP and IPV6_DROP_MEMBERSHIP.
        IPV6_JOIN_GROUP = libc::IPV6_ADD_MEMBERSHIP,
        IPV6_LEAVE_GROUP = libc::IPV6_DROP_MEMBERSHIP,
        // netinet/in.h (RFC 3542); libc lacks it.
        IPV6_RTHDR_TYPE_0 = 0,
    }
    // IPv4 addresses, in host byte order.
    "[ip(7)](https://man7.org/linux/man-pages/man7/ip.7.html)" u32 {
        INADDR_ANY, INADDR_LOOPBACK, INADDR_BROADCAST, INADDR_NONE,
        // linux/in.h: 224.0.0.0, its first group and the end of its local block; libc lacks them.
        INADDR_UNSPEC_GROUP = 0xe000_0000,
        INADDR_ALLHOSTS_GROUP = 0xe000_0001,
        INADDR_MAX_LOCAL_GROUP = 0xe000_00ff,
    }
    // Codes of a failed name resolution, found in `Error::Gaierror`.
    "[getaddrinfo(3)](https://man7.org/linux/man-pages/man3/getaddrinfo.3.html)" i32 {
        EAI_BADFLAGS, EAI_NONAME, EAI_AGAIN, EAI_FAIL, EAI_NODATA, EAI_FAMILY, EAI_SOCKTYPE,
        EAI_SERVICE, EAI_MEMORY, EAI_SYSTEM, EAI_OVERFLOW,
        // netdb.h of glibc (under _GNU_SOURCE); libc lacks it.
        EAI_ADDRFAMILY = -9,
    }
    // Flags of getaddrinfo().
    "[getaddrinfo(3)](https://man7.org/linux/man-pages/man3/getaddrinfo.3.html)" i32 {
        AI_PASSIVE, AI_CANONNAME, AI_NUMERICHOST, AI_V4MAPPED, AI_ALL, AI_ADDRCONFIG,
        AI_NUMERICSERV,
    }
    // Flags and sizes of getnameinfo().
    "[getnameinfo(3)](https://man7.org/linux/man-pages/man3/getnameinfo.3.html)" i32 {
        NI_NUMERICHOST, NI_NUMERICSERV, NI_NOFQDN, NI_NAMEREQD, NI_DGRAM,
        // netdb.h; libc lacks it.
        NI_MAXSERV = 32,
        // What glibc and the kernel headers allow; libc says 255 for musl.
        NI_MAXHOST = 1025,
    }
    // Types of ancillary data at level SOL_SOCKET.
    "[unix(7)](https://man7.org/linux/man-pages/man7/unix.7.html)" i32 {
        SCM_RIGHTS, SCM_CREDENTIALS,
    }
    // Options at level IPPROTO_UDPLITE.
    "[udplite(7)](https://man7.org/linux/man-pages/man7/udplite.7.html)" i32 {
        // linux/udp.h (net/udplite.h before); libc lacks them.
        UDPLITE_SEND_CSCOV = 10,
        UDPLITE_RECV_CSCOV = 11,
    }
    // Bounds of the reserved ports.
    "[ip(7)](https://man7.org/linux/man-pages/man7/ip.7.html)" i32 {
        // netinet/in.h; libc lacks them.
        IPPORT_RESERVED = 1024,
        IPPORT_USERRESERVED = 5000,
    }
    // Addresses of AF_VSOCK, as unsigned as its fields.
    "[vsock(7)](https://man7.org/linux/man-pages/man7/vsock.7.html)" u32 {
        VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_PORT_ANY,
        // linux/vm_sockets.h, for the loopback of Linux 5.6; Python has it from 3.14.
        VMADDR_CID_LOCAL,
        // linux/vm_sockets.h; libc lacks it.
        VM_SOCKETS_INVALID_VERSION = u32::MAX,
    }
    // A request of ioctl() on /dev/vsock.
    "[vsock(7)](https://man7.org/linux/man-pages/man7/vsock.7.html)" i32 {
        // linux/vm_sockets.h: _IO(7, 0xb9); libc lacks it.
        IOCTL_VM_SOCKETS_GET_LOCAL_CID = 0x7b9,
    }
    // Protocols of AF_NETLINK.
    "[netlink(7)](https://man7.org/linux/man-pages/man7/netlink.7.html)" i32 {
        NETLINK_ROUTE, NETLINK_USERSOCK, NETLINK_FIREWALL, NETLINK_NFLOG, NETLINK_XFRM,
        NETLINK_IP6_FW, NETLINK_DNRTMSG, NETLINK_CRYPTO,
    }
    // Whom a packet of AF_PACKET was for: the third part of its address.
    "[packet(7)](https://man7.org/linux/man-pages/man7/packet.7.html)" u8 {
        // linux/if_packet.h; libc has them for some targets only.
        PACKET_HOST = 0,
        PACKET_BROADCAST = 1,
        PACKET_MULTICAST = 2,
        PACKET_OTHERHOST = 3,
        PACKET_OUTGOING = 4,
        PACKET_LOOPBACK = 5,
        PACKET_FASTROUTE = 6,
    }
    // Options at level SOL_PACKET, which Python does not name.
    "[packet(7)](https://man7.org/linux/man-pages/man7/packet.7.html)" i32 {
        PACKET_ADD_MEMBERSHIP, PACKET_DROP_MEMBERSHIP, PACKET_MR_PROMISC,
    }
    // The protocol of AF_PACKET that means every packet, in host byte order.
    "[packet(7)](https://man7.org/linux/man-pages/man7/packet.7.html)" u16 {
        ETH_P_ALL,
    }
    // Kinds of TIPC addresses.
    "[TIPC](https://docs.kernel.org/networking/tipc.html)" u32 {
        // linux/tipc.h, like everything of TIPC; libc lacks them.
        TIPC_ADDR_NAMESEQ = 1,
        TIPC_ADDR_NAME = 2,
        TIPC_ADDR_ID = 3,
    }
    // How far a TIPC name is visible.
    "[TIPC](https://docs.kernel.org/networking/tipc.html)" i8 {
        TIPC_ZONE_SCOPE = 1,
        TIPC_CLUSTER_SCOPE = 2,
        TIPC_NODE_SCOPE = 3,
    }
    // Options, service types, events and importances of TIPC.
    "[TIPC](https://docs.kernel.org/networking/tipc.html)" i32 {
        TIPC_IMPORTANCE = 127,
        TIPC_SRC_DROPPABLE = 128,
        TIPC_DEST_DROPPABLE = 129,
        TIPC_CONN_TIMEOUT = 130,
        TIPC_LOW_IMPORTANCE = 0,
        TIPC_MEDIUM_IMPORTANCE = 1,
        TIPC_HIGH_IMPORTANCE = 2,
        TIPC_CRITICAL_IMPORTANCE = 3,
        TIPC_CFG_SRV = 0,
        TIPC_TOP_SRV = 1,
        TIPC_SUB_PORTS = 1,
        TIPC_SUB_SERVICE = 2,
        TIPC_SUB_CANCEL = 4,
        TIPC_PUBLISHED = 1,
        TIPC_WITHDRAWN = 2,
        TIPC_SUBSCR_TIMEOUT = 3,
        TIPC_WAIT_FOREVER = -1,
    }
    // Options and operations of the kernel's cryptography.
    "[AF_ALG](https://docs.kernel.org/crypto/userspace-if.html)" i32 {
        ALG_SET_KEY, ALG_SET_IV, ALG_SET_OP, ALG_SET_AEAD_ASSOCLEN, ALG_SET_AEAD_AUTHSIZE,
        ALG_OP_DECRYPT, ALG_OP_ENCRYPT,
        // Never in the kernel's headers: CPython defines them for a patch that was not merged.
        ALG_SET_PUBKEY = 6,
        ALG_OP_SIGN = 2,
        ALG_OP_VERIFY = 3,
    }
    // Protocols of AF_CAN, and options of CAN_RAW.
    "[SocketCAN](https://docs.kernel.org/networking/can.html)" i32 {
        CAN_RAW, CAN_BCM, CAN_ISOTP, CAN_J1939,
        CAN_RAW_FILTER, CAN_RAW_LOOPBACK, CAN_RAW_RECV_OWN_MSGS, CAN_RAW_FD_FRAMES,
        CAN_RAW_JOIN_FILTERS,
        // linux/can/raw.h; CPython exports it only where the header makes it a macro.
        CAN_RAW_ERR_FILTER,
    }
    // Flags and masks in a CAN identifier.
    "[SocketCAN](https://docs.kernel.org/networking/can.html)" u32 {
        CAN_EFF_FLAG, CAN_RTR_FLAG, CAN_ERR_FLAG, CAN_SFF_MASK, CAN_EFF_MASK, CAN_ERR_MASK,
    }
    // Operations and flags of the CAN broadcast manager.
    "[SocketCAN](https://docs.kernel.org/networking/can.html)" i32 {
        // linux/can/bcm.h; libc lacks them.
        CAN_BCM_TX_SETUP = 1,
        CAN_BCM_TX_DELETE = 2,
        CAN_BCM_TX_READ = 3,
        CAN_BCM_TX_SEND = 4,
        CAN_BCM_RX_SETUP = 5,
        CAN_BCM_RX_DELETE = 6,
        CAN_BCM_RX_READ = 7,
        CAN_BCM_TX_STATUS = 8,
        CAN_BCM_TX_EXPIRED = 9,
        CAN_BCM_RX_STATUS = 10,
        CAN_BCM_RX_TIMEOUT = 11,
        CAN_BCM_RX_CHANGED = 12,
        CAN_BCM_SETTIMER = 0x1,
        CAN_BCM_STARTTIMER = 0x2,
        CAN_BCM_TX_COUNTEVT = 0x4,
        CAN_BCM_TX_ANNOUNCE = 0x8,
        CAN_BCM_TX_CP_CAN_ID = 0x10,
        CAN_BCM_RX_FILTER_ID = 0x20,
        CAN_BCM_RX_CHECK_DLC = 0x40,
        CAN_BCM_RX_NO_AUTOTIMER = 0x80,
        CAN_BCM_RX_ANNOUNCE_RESUME = 0x100,
        CAN_BCM_TX_RESET_MULTI_IDX = 0x200,
        CAN_BCM_RX_RTR_FRAME = 0x400,
        CAN_BCM_CAN_FD_FRAME = 0x800,
    }
    // Addresses of SAE J1939 on CAN.
    "[J1939](https://docs.kernel.org/networking/j1939.html)" u8 {
        J1939_MAX_UNICAST_ADDR, J1939_IDLE_ADDR, J1939_NO_ADDR,
    }
    // The absent name of SAE J1939.
    "[J1939](https://docs.kernel.org/networking/j1939.html)" u64 {
        J1939_NO_NAME,
    }
    // Parameter group numbers of SAE J1939.
    "[J1939](https://docs.kernel.org/networking/j1939.html)" u32 {
        J1939_PGN_REQUEST, J1939_PGN_ADDRESS_CLAIMED, J1939_PGN_ADDRESS_COMMANDED,
        J1939_PGN_PDU1_MAX, J1939_PGN_MAX, J1939_NO_PGN,
    }
    // Filters, error queue and ancillary data of SAE J1939.
    "[J1939](https://docs.kernel.org/networking/j1939.html)" i32 {
        J1939_FILTER_MAX, J1939_EE_INFO_NONE, J1939_EE_INFO_TX_ABORT, J1939_NLA_PAD,
        J1939_NLA_BYTES_ACKED, SCM_J1939_DEST_ADDR, SCM_J1939_DEST_NAME, SCM_J1939_PRIO,
        SCM_J1939_ERRQUEUE,
    }
    // Protocols of AF_BLUETOOTH, and options at level SOL_HCI.
    "[Bluetooth](https://docs.kernel.org/networking/index.html)" i32 {
        // bluetooth/bluetooth.h and bluetooth/hci.h of BlueZ; libc has some of them only.
        BTPROTO_L2CAP = 0,
        BTPROTO_HCI = 1,
        BTPROTO_SCO = 2,
        BTPROTO_RFCOMM = 3,
        SOL_HCI = 0,
        HCI_DATA_DIR = 1,
        HCI_FILTER = 2,
        HCI_TIME_STAMP = 3,
    }
}

/// `Debug` of the newtypes: the name of the number, then of each flag, joined as C would write
/// them; what no table row covers is printed as `Family(99)`.
fn write_names(
    f: &mut fmt::Formatter<'_>,
    type_name: &str,
    names: &[(&str, i32)],
    flags: i32,
    bits: i32,
) -> fmt::Result {
    let mut separator = "";
    let number = bits & !flags;
    // Zero is a name of its own (AF_UNSPEC) only where it is the whole value.
    if number != 0 || bits == 0 {
        match names.iter().find(|&&(_, value)| value == number) {
            Some((name, _)) => f.write_str(name)?,
            None => write!(f, "{type_name}({number})")?,
        }
        separator = " | ";
    }
    let mut rest = bits & flags;
    for &(name, value) in names {
        if value & flags != 0 && rest & value == value {
            write!(f, "{separator}{name}")?;
            separator = " | ";
            rest &= !value;
        }
    }
    if rest != 0 {
        write!(f, "{separator}{type_name}({rest})")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_prints_c_names() {
        let cases = [
            (format!("{AF_INET:?}"), "AF_INET"),
            (format!("{AF_UNSPEC:?}"), "AF_UNSPEC"),
            (format!("{AF_NETLINK:?}"), "AF_NETLINK"),
            (format!("{AF_ROUTE:?}"), "AF_NETLINK"),
            (format!("{:?}", Family::new(99)), "Family(99)"),
            (format!("{:?}", Family::new(-5)), "Family(-5)"),
            (format!("{SOCK_STREAM:?}"), "SOCK_STREAM"),
            (
                format!("{:?}", SOCK_RAW | SOCK_CLOEXEC),
                "SOCK_RAW | SOCK_CLOEXEC",
            ),
            (format!("{SOCK_NONBLOCK:?}"), "SOCK_NONBLOCK"),
            (format!("{:?}", Kind::new(99)), "Kind(99)"),
            (format!("{:?}", Kind::new(0)), "Kind(0)"),
            (
                format!("{:?}", MSG_DONTWAIT | MSG_PEEK),
                "MSG_PEEK | MSG_DONTWAIT",
            ),
            (
                format!("{:?}", MSG_PEEK | MsgFlags::new(0x1000)),
                "MSG_PEEK | MsgFlags(4096)",
            ),
            (format!("{:?}", MsgFlags::default()), "MsgFlags(0)"),
        ];
        for (printed, expected) in cases {
            assert_eq!(printed, expected);
        }
    }

    #[test]
    fn contains_treats_numbers_and_flags_apart() {
        assert!((SOCK_STREAM | SOCK_CLOEXEC).contains(SOCK_STREAM));
        assert!((SOCK_STREAM | SOCK_CLOEXEC).contains(SOCK_CLOEXEC));
        assert!(!(SOCK_STREAM | SOCK_CLOEXEC).contains(SOCK_NONBLOCK));
        assert!(!SOCK_RAW.contains(SOCK_STREAM));
        assert!((MSG_PEEK | MSG_OOB).contains(MSG_OOB));
        assert!(!MSG_PEEK.contains(MSG_PEEK | MSG_OOB));
        assert!(!AF_UNIX.contains(AF_INET));
        assert!(AF_UNIX.contains(AF_UNIX));
    }

    #[test]
    fn any_number_survives() {
        assert_eq!(i32::from(Family::from(12345)), 12345);
        assert_eq!(Kind::new(-1).bits(), -1);
        let mut flags = MSG_PEEK;
        flags |= MsgFlags::from(1 << 30);
        assert_eq!(flags.bits(), 2 | 1 << 30);
    }
}
