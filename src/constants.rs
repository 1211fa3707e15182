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

        /// What the comparison with Python walks over.
        #[cfg(test)]
        const NUMBERS: &[(&str, i64)] = &[$($((stringify!($name), $name as i64),)+)+];
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
        // linux/socket.h; libc lacks it.
        AF_QIPCRTR = 42,
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
    use std::collections::BTreeMap;
    use std::process::Command;

    /// The families this file claims to cover completely.
    const PYTHON: &str = r"
import socket
families = ('AF_', 'SOCK_', 'MSG_', 'SHUT_', 'SOL_', 'SO_', 'IPPROTO_', 'TCP_', 'IP_', 'IPV6_',
            'SOMAXCONN', 'INADDR_', 'EAI_', 'AI_', 'NI_')
for name in dir(socket):
    value = getattr(socket, name)
    if name.startswith(families) and isinstance(value, int):
        print(f'{name}={int(value)}')
";

    fn all() -> BTreeMap<&'static str, i64> {
        let typed = [Family::NAMES, Kind::NAMES, MsgFlags::NAMES].concat();
        let typed = typed
            .into_iter()
            .map(|(name, value)| (name, i64::from(value)));
        typed.chain(NUMBERS.iter().copied()).collect()
    }

    /// Every value equals Python's. Names that only one side has are accepted from a Python that
    /// is not 3.11 (a later one exports more), refused otherwise.
    #[test]
    fn values_match_python() {
        let script = format!("{PYTHON}import sys\nprint('version=%d%02d' % sys.version_info[:2])");
        let output = match Command::new("python3").args(["-c", &script]).output() {
            Ok(output) => output,
            Err(error) => {
                println!("skipped: python3 cannot be run here: {error}");
                return;
            }
        };
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let text = String::from_utf8(output.stdout).unwrap();
        let mut python: BTreeMap<&str, i64> = BTreeMap::new();
        for line in text.lines() {
            let (name, value) = line.split_once('=').unwrap();
            python.insert(name, value.parse().unwrap());
        }
        let version = python.remove("version").unwrap();
        let ours = all();
        for (name, value) in &ours {
            if let Some(expected) = python.get(name) {
                assert_eq!(value, expected, "{name}");
            }
        }
        if version == 311 {
            let missing: Vec<_> = python
                .keys()
                .filter(|name| !ours.contains_key(*name))
                .collect();
            assert!(
                missing.is_empty(),
                "Python has these, we lack them: {missing:?}"
            );
            assert!(ours.len() >= 200, "the tables shrank to {}", ours.len());
        } else {
            println!("names not compared: this is Python {version}, the tables follow 3.11");
        }
    }

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
