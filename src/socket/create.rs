//! Connected and listening sockets in one call: create_connection and create_server.

use super::Socket;
use crate::address::{Address, ToAddress, UnixAddr};
use crate::constants::{
    AF_INET, AF_INET6, AF_UNSPEC, EAI_NONAME, Family, IPPROTO_IPV6, IPPROTO_TCP, IPV6_V6ONLY,
    SO_REUSEADDR, SO_REUSEPORT, SOCK_STREAM, SOL_SOCKET, SOMAXCONN,
};
use crate::error::{Error, Result};
use crate::timeout::Timeout;

/// Python's default backlog.
const BACKLOG: i32 = if SOMAXCONN < 128 { SOMAXCONN } else { 128 };

/// What [`create_connection_with`] may be told, by Python's names. The default is that of [`create_connection`].
///
/// ```
/// use ringsock::CreateConnection;
/// let options = CreateConnection { timeout: Some(2.5.into()), ..Default::default() };
/// assert!(!options.all_errors);
/// ```
#[derive(Clone, Copy, Default)]
pub struct CreateConnection<'a> {
    /// The new socket's timeout, which bounds the attempt at each address. `None`: as a new socket has it.
    pub timeout: Option<Timeout>,
    /// Where the connection comes from. `None`: the kernel's choice.
    pub source_address: Option<&'a dyn ToAddress>,
    /// Whether a failure tells of all addresses that were tried ([`Error::Group`]), or of the last one only.
    pub all_errors: bool,
}

/// What [`create_server_with`] may be told, by Python's names. The default is that of [`create_server`].
///
/// ```
/// use ringsock::{AF_INET6, CreateServer};
/// let options = CreateServer { family: AF_INET6, reuse_port: true, ..Default::default() };
/// assert_eq!(options.backlog, None);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct CreateServer {
    /// AF_INET (the default), AF_INET6, or another family with streams.
    pub family: Family,
    /// How many connections may wait to be accepted; `None`: 128.
    pub backlog: Option<i32>,
    /// Sets `SO_REUSEPORT`: several listeners share the port, and the kernel spreads connections.
    pub reuse_port: bool,
    /// For AF_INET6: accepts IPv4 connections as well.
    pub dualstack_ipv6: bool,
}

impl Default for CreateServer {
    fn default() -> CreateServer {
        CreateServer {
            family: AF_INET,
            backlog: None,
            reuse_port: false,
            dualstack_ipv6: false,
        }
    }
}

/// A TCP connection to an address, in blocking mode. Only numeric hosts so far; any [`Address`] of a family with streams will do.
///
/// # Errors
///
/// Those of [`Socket::new`] and [`Socket::connect`], of the last address that was tried. `Gaierror`: not a numeric host.
///
/// # Source
///
/// Python `socket.create_connection(address)`.
///
/// ```
/// let server = ringsock::create_server(("127.0.0.1", 0))?;
/// let client = ringsock::create_connection(server.getsockname()?)?;
/// assert_eq!(client.getpeername()?, server.getsockname()?);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn create_connection(address: impl ToAddress) -> Result<Socket> {
    create_connection_with(address, CreateConnection::default())
}

/// [`create_connection`] with a timeout, a source address, and a say in which errors are told.
///
/// A socket that did not connect is closed before the call returns, so a timeout leaves nothing behind.
///
/// # Errors
///
/// Those of [`create_connection`] and of [`Socket::bind`]; `Timeout`. With `all_errors` a `Group` of them all, in the order of the
/// addresses. `Value`, `Overflow` (of the timeout), `Type`, `Cancelled` and `Shutdown` end the call at once.
///
/// # Source
///
/// Python `socket.create_connection(address, timeout, source_address, all_errors=…)`.
///
/// ```
/// use ringsock::CreateConnection;
/// let server = ringsock::create_server(("127.0.0.1", 0))?;
/// let options = CreateConnection {
///     timeout: Some(30.into()),
///     source_address: Some(&("127.0.0.2", 0)),
///     ..Default::default()
/// };
/// let client = ringsock::create_connection_with(server.getsockname()?, options)?;
/// assert_eq!(client.gettimeout(), Some(30.0));
/// assert_eq!(server.accept()?.1, client.getsockname()?);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn create_connection_with(
    address: impl ToAddress,
    options: CreateConnection<'_>,
) -> Result<Socket> {
    connect_first(&addresses(&address)?, options)
}

/// The addresses to try, in order. One so far: a numeric host means itself.
fn addresses(address: &impl ToAddress) -> Result<Vec<Address>> {
    match address.to_address(AF_UNSPEC) {
        // The empty host is no wildcard where it is to be connected to.
        Err(Error::Message(_)) => Err(Error::Gaierror { code: EAI_NONAME }),
        address => Ok(vec![address?]),
    }
}

/// A connection to the first of the addresses that has one to offer.
fn connect_first(addresses: &[Address], options: CreateConnection<'_>) -> Result<Socket> {
    let mut errors = Vec::new();
    for address in addresses {
        match connect(address, options) {
            Err(
                error @ (Error::Os { .. }
                | Error::Message(_)
                | Error::Timeout
                | Error::Gaierror { .. }
                | Error::Herror { .. }),
            ) => errors.push(error),
            connected_or_hopeless => return connected_or_hopeless,
        }
    }
    if options.all_errors && !errors.is_empty() {
        return Err(Error::Group(Box::new(errors)));
    }
    let none = "getaddrinfo returns an empty list";
    Err(errors.pop().unwrap_or(Error::Message(none.into())))
}

fn connect(address: &Address, options: CreateConnection<'_>) -> Result<Socket> {
    let family = address.family();
    // What getaddrinfo says of streams, and with it Python's `proto`.
    let proto = match family {
        AF_INET | AF_INET6 => IPPROTO_TCP,
        _ => 0,
    };
    let socket = Socket::new(family, SOCK_STREAM, proto)?;
    if let Some(timeout) = options.timeout {
        socket.settimeout(timeout)?;
    }
    if let Some(source) = options.source_address {
        socket.bind(source)?;
    }
    socket.connect(address)?;
    Ok(socket)
}

/// A listening TCP socket over IPv4, with `SO_REUSEADDR` and a backlog of 128.
///
/// # Errors
///
/// Those of [`create_server_with`].
///
/// # Source
///
/// Python `socket.create_server(address)`.
///
/// ```
/// let server = ringsock::create_server(("", 0))?;
/// assert_ne!(server.getsockname()?.port(), Some(0));
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn create_server(address: impl ToAddress) -> Result<Socket> {
    create_server_with(address, CreateServer::default())
}

/// [`create_server`] of another family, with another backlog, sharing its port, or for IPv6 and IPv4 at once.
///
/// An IPv6 socket accepts IPv4 connections only with `dualstack_ipv6`, whatever the system's default.
///
/// # Errors
///
/// Those of [`Socket::new`], [`Socket::bind`] (the text names the address) and [`Socket::listen`]. `Value`: `dualstack_ipv6` with
/// another family than AF_INET6, or where the system cannot do it.
///
/// # Source
///
/// Python `socket.create_server(address, family=…, backlog=…, reuse_port=…, dualstack_ipv6=…)`.
///
/// ```
/// use ringsock::CreateServer;
/// let options = CreateServer { reuse_port: true, ..Default::default() };
/// let first = ringsock::create_server_with(("127.0.0.1", 0), options)?;
/// let second = ringsock::create_server_with(first.getsockname()?, options)?;
/// assert_eq!(first.getsockname()?, second.getsockname()?);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn create_server_with(address: impl ToAddress, options: CreateServer) -> Result<Socket> {
    if options.dualstack_ipv6 {
        if !has_dualstack_ipv6() {
            let text = "dualstack_ipv6 not supported on this platform";
            return Err(Error::Value(text.into()));
        }
        if options.family != AF_INET6 {
            let text = "dualstack_ipv6 requires AF_INET6 family";
            return Err(Error::Value(text.into()));
        }
    }
    let socket = Socket::new(options.family, SOCK_STREAM, 0)?;
    // Where there is no such option, bind tells.
    let _ = socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, true);
    if options.reuse_port {
        socket.setsockopt(SOL_SOCKET, SO_REUSEPORT, true)?;
    }
    if options.family == AF_INET6 {
        socket.setsockopt(IPPROTO_IPV6, IPV6_V6ONLY, !options.dualstack_ipv6)?;
    }
    let address = address.to_address(options.family)?;
    socket
        .bind(&address)
        .map_err(|error| naming_address(error, &address))?;
    socket.listen(options.backlog.unwrap_or(BACKLOG))?;
    Ok(socket)
}

/// An error of bind with Python's text.
fn naming_address(error: Error, address: &Address) -> Error {
    let Some(errno) = error.errno() else {
        return error;
    };
    let address = match address {
        Address::V4(address) => format!("('{}', {})", address.ip(), address.port()),
        Address::V6(v6) if v6.flowinfo() == 0 && v6.scope_id() == 0 => {
            format!("('{}', {})", v6.ip(), v6.port())
        }
        Address::V6(v6) => {
            let (flowinfo, scope_id) = (v6.flowinfo(), v6.scope_id());
            format!("('{}', {}, {flowinfo}, {scope_id})", v6.ip(), v6.port())
        }
        Address::Unix(UnixAddr::Path(path)) => format!("'{}'", path.display()),
        other => other.to_string(),
    };
    let text = error.to_string();
    let text = text
        .strip_prefix(&format!("[Errno {errno}] "))
        .unwrap_or(&text);
    let message = format!("{text} (while attempting to bind on address {address})");
    Error::Os {
        errno,
        message: Some(message.into()),
    }
}

/// Whether an IPv6 socket can accept IPv4 connections here.
///
/// # Source
///
/// Python `socket.has_dualstack_ipv6()`; `ipv6(7)` (`IPV6_V6ONLY`).
///
/// ```
/// use ringsock::{AF_INET6, CreateServer};
/// if ringsock::has_dualstack_ipv6() {
///     let options = CreateServer { family: AF_INET6, dualstack_ipv6: true, ..Default::default() };
///     let server = ringsock::create_server_with(("", 0), options)?;
///     ringsock::create_connection(("127.0.0.1", server.getsockname()?.port().unwrap()))?;
/// }
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn has_dualstack_ipv6() -> bool {
    Socket::new(AF_INET6, SOCK_STREAM, 0)
        .and_then(|socket| socket.setsockopt(IPPROTO_IPV6, IPV6_V6ONLY, false))
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusing() -> (Socket, Address) {
        let bound = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
        bound.bind(("127.0.0.1", 0)).unwrap();
        let address = bound.getsockname().unwrap();
        (bound, address)
    }

    #[test]
    fn the_first_address_that_answers_wins() {
        let (_bound, refusing) = refusing();
        let server = create_server(("127.0.0.1", 0)).unwrap();
        let address = server.getsockname().unwrap();
        let options = CreateConnection {
            all_errors: true,
            ..Default::default()
        };
        let socket = connect_first(&[refusing, address.clone()], options).unwrap();
        assert_eq!(socket.getpeername().unwrap(), address);
        assert_eq!(socket.proto(), IPPROTO_TCP);
    }

    #[test]
    fn the_last_error_or_all_of_them() {
        let (_bound, refusing) = refusing();
        let unreachable = Address::from(UnixAddr::Path("/nonexistent/socket".into()));
        let both = [unreachable, refusing];
        let last = connect_first(&both, CreateConnection::default());
        assert_eq!(last.unwrap_err().errno(), Some(libc::ECONNREFUSED));
        let options = CreateConnection {
            all_errors: true,
            ..Default::default()
        };
        let Err(Error::Group(errors)) = connect_first(&both, options) else {
            panic!("not a group");
        };
        let errnos: Vec<_> = errors.iter().map(Error::errno).collect();
        assert_eq!(errnos, [Some(libc::ENOENT), Some(libc::ECONNREFUSED)]);
        let none = connect_first(&[], options).unwrap_err();
        assert_eq!(none.to_string(), "getaddrinfo returns an empty list");
    }

    #[test]
    fn an_argument_error_ends_the_search() {
        let (_bound, refusing) = refusing();
        let options = CreateConnection {
            timeout: Some((-1).into()),
            all_errors: true,
            ..Default::default()
        };
        let error = connect_first(&[refusing.clone(), refusing], options);
        assert!(matches!(error, Err(Error::Value(_))));
    }
}
