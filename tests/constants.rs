//! The constants against Python's: every name that CPython 3.11's `socket` exports on Linux is public here, with its value.

use std::collections::BTreeMap;
use std::process::Command;

use ringsock::*;

/// What `tests/python/constants.py` printed under CPython 3.11.
const RECORDED: &str = include_str!("python/constants.txt");

/// Every type a constant has.
trait Number: Copy {
    fn number(self) -> i64;
}

impl Number for Family {
    fn number(self) -> i64 {
        self.bits().into()
    }
}

impl Number for Kind {
    fn number(self) -> i64 {
        self.bits().into()
    }
}

impl Number for MsgFlags {
    fn number(self) -> i64 {
        self.bits().into()
    }
}

impl Number for i8 {
    fn number(self) -> i64 {
        self.into()
    }
}

impl Number for u8 {
    fn number(self) -> i64 {
        self.into()
    }
}

impl Number for i32 {
    fn number(self) -> i64 {
        self.into()
    }
}

impl Number for u32 {
    fn number(self) -> i64 {
        self.into()
    }
}

impl Number for u64 {
    fn number(self) -> i64 {
        self.try_into().unwrap()
    }
}

/// A name and what it stands for, so that a constant that vanishes stops the compiler.
macro_rules! table {
    ($value:ident => $show:expr; $($name:ident,)+) => {
        vec![$({
            let $value = $name;
            (stringify!($name), $show)
        },)+]
    };
}

/// The newtypes' constants, with what `Debug` prints.
fn typed() -> Vec<(&'static str, (i64, String))> {
    table! { value => (value.number(), format!("{value:?}"));
        AF_ALG, AF_APPLETALK, AF_ASH, AF_ATMPVC, AF_ATMSVC, AF_AX25, AF_BLUETOOTH, AF_BRIDGE,
        AF_CAN, AF_DECnet, AF_ECONET, AF_INET, AF_INET6, AF_IPX, AF_IRDA, AF_KEY, AF_LLC,
        AF_NETBEUI, AF_NETLINK, AF_NETROM, AF_PACKET, AF_PPPOX, AF_QIPCRTR, AF_RDS, AF_ROSE,
        AF_ROUTE, AF_SECURITY, AF_SNA, AF_TIPC, AF_UNIX, AF_UNSPEC, AF_VSOCK, AF_WANPIPE,
        AF_X25, MSG_CMSG_CLOEXEC, MSG_CONFIRM, MSG_CTRUNC, MSG_DONTROUTE, MSG_DONTWAIT, MSG_EOR,
        MSG_ERRQUEUE, MSG_FASTOPEN, MSG_MORE, MSG_NOSIGNAL, MSG_OOB, MSG_PEEK, MSG_TRUNC,
        MSG_WAITALL, PF_CAN, PF_PACKET, PF_RDS, SOCK_CLOEXEC, SOCK_DGRAM, SOCK_NONBLOCK,
        SOCK_RAW, SOCK_RDM, SOCK_SEQPACKET, SOCK_STREAM,
    }
}

/// The plain numbers.
fn plain() -> Vec<(&'static str, i64)> {
    table! { value => value.number();
        AI_ADDRCONFIG, AI_ALL, AI_CANONNAME, AI_NUMERICHOST, AI_NUMERICSERV, AI_PASSIVE,
        AI_V4MAPPED, ALG_OP_DECRYPT, ALG_OP_ENCRYPT, ALG_OP_SIGN, ALG_OP_VERIFY,
        ALG_SET_AEAD_ASSOCLEN, ALG_SET_AEAD_AUTHSIZE, ALG_SET_IV, ALG_SET_KEY, ALG_SET_OP,
        ALG_SET_PUBKEY, BTPROTO_HCI, BTPROTO_L2CAP, BTPROTO_RFCOMM, BTPROTO_SCO, CAN_BCM,
        CAN_BCM_CAN_FD_FRAME, CAN_BCM_RX_ANNOUNCE_RESUME, CAN_BCM_RX_CHANGED,
        CAN_BCM_RX_CHECK_DLC, CAN_BCM_RX_DELETE, CAN_BCM_RX_FILTER_ID, CAN_BCM_RX_NO_AUTOTIMER,
        CAN_BCM_RX_READ, CAN_BCM_RX_RTR_FRAME, CAN_BCM_RX_SETUP, CAN_BCM_RX_STATUS,
        CAN_BCM_RX_TIMEOUT, CAN_BCM_SETTIMER, CAN_BCM_STARTTIMER, CAN_BCM_TX_ANNOUNCE,
        CAN_BCM_TX_COUNTEVT, CAN_BCM_TX_CP_CAN_ID, CAN_BCM_TX_DELETE, CAN_BCM_TX_EXPIRED,
        CAN_BCM_TX_READ, CAN_BCM_TX_RESET_MULTI_IDX, CAN_BCM_TX_SEND, CAN_BCM_TX_SETUP,
        CAN_BCM_TX_STATUS, CAN_EFF_FLAG, CAN_EFF_MASK, CAN_ERR_FLAG, CAN_ERR_MASK, CAN_ISOTP,
        CAN_J1939, CAN_RAW, CAN_RAW_FD_FRAMES, CAN_RAW_FILTER, CAN_RAW_JOIN_FILTERS,
        CAN_RAW_LOOPBACK, CAN_RAW_RECV_OWN_MSGS, CAN_RTR_FLAG, CAN_SFF_MASK, EAI_ADDRFAMILY,
        EAI_AGAIN, EAI_BADFLAGS, EAI_FAIL, EAI_FAMILY, EAI_MEMORY, EAI_NODATA, EAI_NONAME,
        EAI_OVERFLOW, EAI_SERVICE, EAI_SOCKTYPE, EAI_SYSTEM, HCI_DATA_DIR, HCI_FILTER,
        HCI_TIME_STAMP, INADDR_ALLHOSTS_GROUP, INADDR_ANY, INADDR_BROADCAST, INADDR_LOOPBACK,
        INADDR_MAX_LOCAL_GROUP, INADDR_NONE, INADDR_UNSPEC_GROUP,
        IOCTL_VM_SOCKETS_GET_LOCAL_CID, IPPORT_RESERVED, IPPORT_USERRESERVED, IPPROTO_AH,
        IPPROTO_DSTOPTS, IPPROTO_EGP, IPPROTO_ESP, IPPROTO_FRAGMENT, IPPROTO_GRE,
        IPPROTO_HOPOPTS, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_IDP, IPPROTO_IGMP, IPPROTO_IP,
        IPPROTO_IPIP, IPPROTO_IPV6, IPPROTO_MPTCP, IPPROTO_NONE, IPPROTO_PIM, IPPROTO_PUP,
        IPPROTO_RAW, IPPROTO_ROUTING, IPPROTO_RSVP, IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_TP,
        IPPROTO_UDP, IPPROTO_UDPLITE, IPV6_CHECKSUM, IPV6_DONTFRAG, IPV6_DSTOPTS, IPV6_HOPLIMIT,
        IPV6_HOPOPTS, IPV6_JOIN_GROUP, IPV6_LEAVE_GROUP, IPV6_MULTICAST_HOPS, IPV6_MULTICAST_IF,
        IPV6_MULTICAST_LOOP, IPV6_NEXTHOP, IPV6_PATHMTU, IPV6_PKTINFO, IPV6_RECVDSTOPTS,
        IPV6_RECVHOPLIMIT, IPV6_RECVHOPOPTS, IPV6_RECVPATHMTU, IPV6_RECVPKTINFO, IPV6_RECVRTHDR,
        IPV6_RECVTCLASS, IPV6_RTHDR, IPV6_RTHDRDSTOPTS, IPV6_RTHDR_TYPE_0, IPV6_TCLASS,
        IPV6_UNICAST_HOPS, IPV6_V6ONLY, IP_ADD_MEMBERSHIP, IP_BIND_ADDRESS_NO_PORT,
        IP_DEFAULT_MULTICAST_LOOP, IP_DEFAULT_MULTICAST_TTL, IP_DROP_MEMBERSHIP, IP_HDRINCL,
        IP_MAX_MEMBERSHIPS, IP_MULTICAST_IF, IP_MULTICAST_LOOP, IP_MULTICAST_TTL, IP_OPTIONS,
        IP_RECVOPTS, IP_RECVRETOPTS, IP_RECVTOS, IP_RETOPTS, IP_TOS, IP_TRANSPARENT, IP_TTL,
        J1939_EE_INFO_NONE, J1939_EE_INFO_TX_ABORT, J1939_FILTER_MAX, J1939_IDLE_ADDR,
        J1939_MAX_UNICAST_ADDR, J1939_NLA_BYTES_ACKED, J1939_NLA_PAD, J1939_NO_ADDR,
        J1939_NO_NAME, J1939_NO_PGN, J1939_PGN_ADDRESS_CLAIMED, J1939_PGN_ADDRESS_COMMANDED,
        J1939_PGN_MAX, J1939_PGN_PDU1_MAX, J1939_PGN_REQUEST, NETLINK_CRYPTO, NETLINK_DNRTMSG,
        NETLINK_FIREWALL, NETLINK_IP6_FW, NETLINK_NFLOG, NETLINK_ROUTE, NETLINK_USERSOCK,
        NETLINK_XFRM, NI_DGRAM, NI_MAXHOST, NI_MAXSERV, NI_NAMEREQD, NI_NOFQDN, NI_NUMERICHOST,
        NI_NUMERICSERV, PACKET_BROADCAST, PACKET_FASTROUTE, PACKET_HOST, PACKET_LOOPBACK,
        PACKET_MULTICAST, PACKET_OTHERHOST, PACKET_OUTGOING, SCM_CREDENTIALS,
        SCM_J1939_DEST_ADDR, SCM_J1939_DEST_NAME, SCM_J1939_ERRQUEUE, SCM_J1939_PRIO,
        SCM_RIGHTS, SHUT_RD, SHUT_RDWR, SHUT_WR, SOL_ALG, SOL_CAN_BASE, SOL_CAN_RAW, SOL_HCI,
        SOL_IP, SOL_RDS, SOL_SOCKET, SOL_TCP, SOL_TIPC, SOL_UDP, SOMAXCONN, SO_ACCEPTCONN,
        SO_BINDTODEVICE, SO_BROADCAST, SO_DEBUG, SO_DOMAIN, SO_DONTROUTE, SO_ERROR,
        SO_INCOMING_CPU, SO_J1939_ERRQUEUE, SO_J1939_FILTER, SO_J1939_PROMISC,
        SO_J1939_SEND_PRIO, SO_KEEPALIVE, SO_LINGER, SO_MARK, SO_OOBINLINE, SO_PASSCRED,
        SO_PASSSEC, SO_PEERCRED, SO_PEERSEC, SO_PRIORITY, SO_PROTOCOL, SO_RCVBUF, SO_RCVLOWAT,
        SO_RCVTIMEO, SO_REUSEADDR, SO_REUSEPORT, SO_SNDBUF, SO_SNDLOWAT, SO_SNDTIMEO, SO_TYPE,
        SO_VM_SOCKETS_BUFFER_MAX_SIZE, SO_VM_SOCKETS_BUFFER_MIN_SIZE, SO_VM_SOCKETS_BUFFER_SIZE,
        TCP_CONGESTION, TCP_CORK, TCP_DEFER_ACCEPT, TCP_FASTOPEN, TCP_INFO, TCP_KEEPCNT,
        TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_LINGER2, TCP_MAXSEG, TCP_NODELAY, TCP_NOTSENT_LOWAT,
        TCP_QUICKACK, TCP_SYNCNT, TCP_USER_TIMEOUT, TCP_WINDOW_CLAMP, TIPC_ADDR_ID,
        TIPC_ADDR_NAME, TIPC_ADDR_NAMESEQ, TIPC_CFG_SRV, TIPC_CLUSTER_SCOPE, TIPC_CONN_TIMEOUT,
        TIPC_CRITICAL_IMPORTANCE, TIPC_DEST_DROPPABLE, TIPC_HIGH_IMPORTANCE, TIPC_IMPORTANCE,
        TIPC_LOW_IMPORTANCE, TIPC_MEDIUM_IMPORTANCE, TIPC_NODE_SCOPE, TIPC_PUBLISHED,
        TIPC_SRC_DROPPABLE, TIPC_SUBSCR_TIMEOUT, TIPC_SUB_CANCEL, TIPC_SUB_PORTS,
        TIPC_SUB_SERVICE, TIPC_TOP_SRV, TIPC_WAIT_FOREVER, TIPC_WITHDRAWN, TIPC_ZONE_SCOPE,
        UDPLITE_RECV_CSCOV, UDPLITE_SEND_CSCOV, VMADDR_CID_ANY, VMADDR_CID_HOST,
        VMADDR_PORT_ANY, VM_SOCKETS_INVALID_VERSION,
    }
}

fn ours() -> BTreeMap<&'static str, i64> {
    let typed = typed()
        .into_iter()
        .map(|(name, (number, _))| (name, number));
    let mut all: BTreeMap<_, _> = typed.chain(plain()).collect();
    all.insert("has_ipv6", has_ipv6.into());
    all
}

/// The lines `NAME = VALUE` as pairs.
fn parsed(text: &str) -> BTreeMap<&str, i64> {
    let pair = |line| str::split_once(line, " = ").expect("NAME = VALUE");
    let number = |(name, value): (_, &str)| (name, value.parse().expect("a number"));
    text.lines().map(|line| number(pair(line))).collect()
}

fn compare(python: &BTreeMap<&str, i64>) {
    let ours = ours();
    let missing: Vec<_> = python
        .keys()
        .filter(|name| !ours.contains_key(*name))
        .collect();
    assert!(
        missing.is_empty(),
        "Python has these, we lack them: {missing:?}"
    );
    for (name, value) in python {
        assert_eq!(ours[name], *value, "{name}");
    }
}

#[test]
fn constants_equal_the_recorded_ones() {
    let recorded = parsed(RECORDED);
    assert!(
        recorded.len() > 330,
        "the record shrank to {}",
        recorded.len()
    );
    compare(&recorded);
    assert_eq!(
        ours().len(),
        recorded.len(),
        "a name here that the record lacks"
    );
}

/// Another version of Python exports other names, which is not our concern, and the same values.
#[test]
fn constants_equal_this_machines_python() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/constants.py");
    let version = "import sys; print('%d.%d' % sys.version_info[:2])";
    let run = |arguments: &[&str]| Command::new("python3").args(arguments).output();
    let output = match run(&["-c", version]) {
        Ok(output) => output,
        Err(error) => {
            println!("skipped: python3 cannot be run here: {error}");
            return;
        }
    };
    let version = String::from_utf8(output.stdout).unwrap();
    if version.trim() != "3.11" {
        println!(
            "skipped: this is Python {}, the constants follow 3.11",
            version.trim()
        );
        return;
    }
    let output = run(&[script]).unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    compare(&parsed(std::str::from_utf8(&output.stdout).unwrap()));
}

#[test]
fn newtypes_print_their_c_names() {
    for (name, (_, printed)) in typed() {
        let expected = match name {
            "AF_ROUTE" => "AF_NETLINK",
            "PF_CAN" => "AF_CAN",
            "PF_PACKET" => "AF_PACKET",
            "PF_RDS" => "AF_RDS",
            name => name,
        };
        assert_eq!(printed, expected);
    }
}
