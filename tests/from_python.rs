//! `docs/from-python.md` against the names of Python's page and against this crate: a row for each name, and in it only what exists.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use ringsock::TipcAddr;
use ringsock::prelude::*;

const PAGE: &str = include_str!("../docs/from-python.md");

/// The names on the socket page of Python 2.7: `s.` before those of a socket object, `*` for a group.
const NAMES: &str = include_str!("python/names27.txt");

/// The constants that `tests/constants.rs` finds in this crate.
const CONSTANTS: &str = include_str!("python/constants.txt");

/// Names with a row that this crate does not have yet. The change that adds one moves it to a list below.
const NOT_YET: &[&str] = &[];

/// Functions, types and constants by their names: one that vanishes stops the compiler.
macro_rules! items {
    ($($name:ident)+) => {{
        #[allow(unused_imports)]
        mod exist {
            $(use ringsock::$name as _;)+
        }
        [$(stringify!($name)),+]
    }};
}

/// Methods of `Socket` with arguments of theirs: one that vanishes stops the compiler. Nothing is called.
macro_rules! methods {
    ($socket:ident: $($name:ident($($argument:expr),*))+) => {{
        $(let _ = |$socket: Socket| { let _ = $socket.$name($($argument),*); };)+
        [$(concat!("Socket::", stringify!($name))),+]
    }};
}

/// Variants of enums: one that vanishes stops the compiler.
macro_rules! variants {
    ($($enum:ident::$name:ident)+) => {{
        $(let _ = |value: &$enum| matches!(value, $enum::$name { .. });)+
        [$(concat!(stringify!($enum), "::", stringify!($name))),+]
    }};
}

fn existing() -> BTreeSet<&'static str> {
    let items = items! {
        Address AlgAddr Buf CanAddr CreateConnection CreateServer Error Family Kind MsgFlags NetlinkAddr OptionValue PacketAddr
        Socket Timeout TipcAddr ToAddress VsockAddr
        create_connection create_connection_with create_server create_server_with has_dualstack_ipv6 has_ipv6 socketpair
        socketpair_with
        AddrInfo SocketType fromfd socket socket_with getaddrinfo getaddrinfo_with getnameinfo getfqdn gethostbyname gethostbyname_ex
        gethostbyaddr gethostname getprotobyname getservbyname getservbyport ntohl ntohs htonl htons inet_aton inet_ntoa inet_pton
        inet_ntop getdefaulttimeout setdefaulttimeout send_fds send_fds_with recv_fds recv_fds_with
        CMSG_LEN CMSG_SPACE dup if_nameindex if_nametoindex if_indextoname sethostname
        PACKET_ADD_MEMBERSHIP PACKET_DROP_MEMBERSHIP PACKET_MR_PROMISC SOL_PACKET
    };
    let buffer = || [0_u8; 8];
    let _ = || Socket::new(AF_INET, SOCK_STREAM, 0);
    let _ = |fd: OwnedFd| Socket::from_fd(fd);
    let _ = |fd: OwnedFd| Socket::from_fd_with(fd, AF_INET, SOCK_STREAM, 0);
    let constructors = ["Socket::new", "Socket::from_fd", "Socket::from_fd_with"];
    let flags = MsgFlags::default();
    let methods = methods! { socket:
        accept() bind(("", 0)) close() connect(("", 0)) connect_ex(("", 0)) detach() dup() fileno() getpeername() getsockname()
        getsockopt(0, 0) getsockopt_buf(0, 0, 8) getsockopt_u64(0, 0) listen(1)
        recv(8) recv_with(8, flags) recvfrom(8) recvfrom_with(8, flags)
        recvfrom_into(&mut buffer()) recvfrom_into_with(&mut buffer(), 8, flags)
        recv_into(&mut buffer()) recv_into_with(&mut buffer(), 8, flags)
        send(b"") send_with(b"", flags) sendall(b"") sendall_with(b"", flags)
        sendto(b"", ("", 0)) sendto_with(b"", flags, ("", 0))
        makefile("r") makefile_with("r", Default::default()) recvmsg(8) recvmsg_with(8, 0, flags) recvmsg_into(&mut [])
        recvmsg_into_with(&mut [], 0, flags) sendfile(std::io::stdin(), 0, None) sendmsg(&[]) sendmsg_with(&[], Default::default())
        setblocking(true) getblocking() settimeout(1) gettimeout() setsockopt(0, 0, 1) set_nodelay(true)
        shutdown(SHUT_WR) family() kind() proto() get_inheritable() set_inheritable(true)
    };
    // A keyword in the code, a name on the page.
    let _ = |socket: Socket| socket.r#type();
    let variants = variants! {
        Error::Os Error::Message Error::Herror Error::Gaierror Error::Timeout Error::Value Error::Overflow Error::Type Error::Group
        Error::Cancelled Error::Shutdown
        TipcAddr::NameSeq TipcAddr::Name TipcAddr::Id
    };
    let mut all = BTreeSet::from(["Socket::type"]);
    all.extend(items);
    all.extend(constructors);
    all.extend(methods);
    all.extend(variants);
    all.extend(constants());
    all
}

fn constants() -> impl Iterator<Item = &'static str> {
    CONSTANTS
        .lines()
        .map(|line| line.split_once(" = ").unwrap().0)
}

/// The cells of the tables' rows.
fn rows() -> Vec<Vec<&'static str>> {
    let rows = PAGE.lines().filter(|line| line.starts_with("| `"));
    let cells = |row: &'static str| row.trim_matches('|').split(" | ").map(str::trim).collect();
    rows.map(cells).collect()
}

/// What stands in backticks.
fn code(cell: &'static str) -> impl Iterator<Item = &'static str> {
    cell.split('`').skip(1).step_by(2)
}

#[test]
fn every_name_of_pythons_page_has_a_row() {
    let mut named = BTreeSet::new();
    for row in rows() {
        assert_eq!(row.len(), 3, "{row:?}");
        let names: Vec<_> = code(row[0]).collect();
        assert_eq!(names.len(), 1, "{row:?}");
        assert!(named.insert(names[0]), "two rows for {}", names[0]);
    }
    assert!(NAMES.lines().count() >= 90, "the list of names shrank");
    let missing: Vec<_> = NAMES.lines().filter(|name| !named.contains(name)).collect();
    assert!(missing.is_empty(), "no row for {missing:?}");
}

#[test]
fn every_counterpart_exists() {
    let existing = existing();
    let mut not_yet: BTreeSet<_> = NOT_YET.iter().copied().collect();
    for row in rows() {
        if row[1].starts_with("none: ") {
            assert!(row[2].len() > 40, "{row:?} says too little");
            continue;
        }
        assert!(code(row[1]).next().is_some(), "{row:?} names nothing");
        for name in code(row[1]) {
            let there = match name.strip_suffix('*') {
                Some(prefix) => constants().any(|constant| constant.starts_with(prefix)),
                None => existing.contains(name) || not_yet.remove(name),
            };
            assert!(there, "{name}, in the row of {}, does not exist", row[0]);
        }
    }
    assert!(not_yet.is_empty(), "without a row: {not_yet:?}");
    for name in NOT_YET {
        assert!(
            !existing.contains(name),
            "{name} has come: drop it from NOT_YET"
        );
    }
}

/// The third column names constants and methods too.
#[test]
fn what_the_text_names_exists() {
    let existing = existing();
    let is_constant = |name: &str| {
        let in_name = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
        name.chars().all(in_name) && !name.starts_with("SIO_")
    };
    for row in rows() {
        for name in code(row[2]).filter(|name| is_constant(name) || name.starts_with("Socket::")) {
            assert!(existing.contains(name), "{name} in {row:?}");
        }
    }
}
