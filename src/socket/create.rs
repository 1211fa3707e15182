//! Connected and listening sockets in one call: create_connection and create_server.

use std::os::fd::AsRawFd;
use std::time::Duration;

use super::{BLOCKING, NON_BLOCKING, Socket};
use crate::address::{Address, ToAddress, UnixAddr};
use crate::constants::{
    AF_INET, AF_INET6, Family, IPPROTO_IPV6, IPPROTO_TCP, IPV6_V6ONLY, SO_REUSEADDR, SO_REUSEPORT,
    SOCK_STREAM, SOL_SOCKET, SOMAXCONN,
};
use crate::driver::Op;
use crate::error::{Error, Result};
use crate::fiber::{self, error_from_outcome, outcome};
use crate::sys;
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
    /// Tries the addresses of a name in a race (Happy Eyeballs): IPv6 and IPv4 in turn, each this much later than the one before, or
    /// as soon as one has failed; the first to connect wins, and the others are closed. RFC 8305 recommends 250 ms. `None`: one after
    /// the other, each for as long as it takes. (Python has it in `asyncio`.)
    pub happy_eyeballs_delay: Option<Duration>,
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

/// A TCP connection to a host and port, in blocking mode. Of a name all addresses are tried, one after the other, until one
/// connects. Any [`Address`] of a family with streams will do, too.
///
/// # Errors
///
/// Those of [`Socket::new`] and [`Socket::connect`], of the last address that was tried. Those of
/// [`getaddrinfo`](crate::getaddrinfo), where the host is a name.
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
/// A socket that did not connect is closed before the call returns, so a timeout leaves nothing behind. The timeout is that of
/// each attempt: the lookup of a name takes the time it takes, as in Python. To bound it all, use [`timeout`](crate::timeout).
///
/// # Errors
///
/// Those of [`create_connection`] and of [`Socket::bind`]; `Timeout`. With `all_errors` a `Group` of them all, in the order of the
/// addresses. `Value`, `Overflow` (of the timeout), `Type`, `Cancelled` and `Shutdown` end the call at once.
///
/// # Source
///
/// Python `socket.create_connection(address, timeout, source_address, all_errors=…)`; RFC 8305, `asyncio`'s `happy_eyeballs_delay`.
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
    let addresses = address.to_stream_addresses()?;
    match options.happy_eyeballs_delay {
        Some(delay) if addresses.len() > 1 => {
            connect_racing(&interleaved(addresses), options, delay)
        }
        _ => connect_first(&addresses, options),
    }
}

/// A connection to the first of the addresses that has one to offer.
fn connect_first(addresses: &[Address], options: CreateConnection<'_>) -> Result<Socket> {
    let mut errors = Vec::new();
    for address in addresses {
        match connect(address, options) {
            Err(error) if is_of_address(&error) => errors.push(error),
            connected_or_hopeless => return connected_or_hopeless,
        }
    }
    Err(failure(errors, options))
}

/// Whether another address may do better: Python's OSError.
fn is_of_address(error: &Error) -> bool {
    matches!(
        error,
        Error::Os { .. }
            | Error::Message(_)
            | Error::Timeout
            | Error::Gaierror { .. }
            | Error::Herror { .. }
    )
}

/// What the errors of all addresses come to.
fn failure(mut errors: Vec<Error>, options: CreateConnection<'_>) -> Error {
    if options.all_errors && !errors.is_empty() {
        return Error::Group(Box::new(errors));
    }
    let none = "getaddrinfo returns an empty list";
    errors.pop().unwrap_or(Error::Message(none.into()))
}

fn connect(address: &Address, options: CreateConnection<'_>) -> Result<Socket> {
    let socket = unconnected(address.family(), options)?;
    socket.connect(address)?;
    Ok(socket)
}

/// A socket as the options want it.
fn unconnected(family: Family, options: CreateConnection<'_>) -> Result<Socket> {
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
    Ok(socket)
}

/// RFC 8305: a connection to the address that answers first. The next address is tried when `delay` has passed since the last
/// one was, or at once when an attempt has failed. Attempts under way go on, all watched by one epoll instance.
fn connect_racing(
    addresses: &[Address],
    options: CreateConnection<'_>,
    delay: Duration,
) -> Result<Socket> {
    let delay_ns = i64::try_from(delay.as_nanos()).unwrap_or(i64::MAX);
    let epoll = sys::epoll()?;
    // One of each per address that was tried: the socket and its deadline while it is under way, then its error.
    let mut attempts: Vec<Option<(Socket, i64)>> = Vec::new();
    let mut errors: Vec<Option<Error>> = Vec::new();
    let mut start_at_ns = i64::MIN;
    loop {
        let now_ns = fiber::now_ns();
        for (attempt, error) in attempts.iter_mut().zip(&mut errors) {
            if attempt
                .take_if(|(_, deadline_ns)| *deadline_ns <= now_ns)
                .is_some()
            {
                *error = Some(Error::Timeout);
                start_at_ns = i64::MIN;
            }
        }
        let index = attempts.len();
        if index < addresses.len() && start_at_ns <= now_ns {
            match begin(&addresses[index], options) {
                Ok((socket, true)) => return connected(socket),
                Ok((socket, false)) => {
                    sys::check(sys::epoll_add(epoll.as_raw_fd(), socket.0.fd, index))?;
                    let deadline_ns = match socket.timeout_ns() {
                        timeout_ns if timeout_ns > 0 => now_ns.saturating_add(timeout_ns),
                        _ => i64::MAX,
                    };
                    attempts.push(Some((socket, deadline_ns)));
                    errors.push(None);
                    start_at_ns = now_ns.saturating_add(delay_ns);
                }
                Err(error) if is_of_address(&error) => {
                    attempts.push(None);
                    errors.push(Some(error));
                }
                Err(hopeless) => return Err(hopeless),
            }
            continue;
        }
        let deadlines = attempts.iter().flatten().map(|&(_, deadline)| deadline);
        let Some(mut wake_at_ns) = deadlines.min() else {
            return Err(failure(errors.into_iter().flatten().collect(), options));
        };
        if index < addresses.len() {
            wake_at_ns = wake_at_ns.min(start_at_ns);
        }
        let limit_ns = match wake_at_ns {
            i64::MAX => BLOCKING,
            _ => wake_at_ns - now_ns,
        };
        let mut ready = Op::Poll {
            fd: epoll.as_raw_fd(),
            events: libc::POLLIN,
        };
        match fiber::suspend(&mut ready, limit_ns, None) {
            // Else an enclosing `timeout` came first.
            outcome::TIMED_OUT if fiber::now_ns() >= wake_at_ns => {}
            code if code < 0 => return Err(error_from_outcome(code)),
            _ => {}
        }
        while let Some(index) = sys::epoll_next(epoll.as_raw_fd()) {
            // Without one, it was given up just now.
            let Some((socket, _)) = attempts[index].take() else {
                continue;
            };
            match sys::check(sys::connect_outcome(socket.0.fd)) {
                Ok(_) => return connected(socket),
                Err(error) => errors[index] = Some(error),
            }
            start_at_ns = i64::MIN;
        }
    }
}

/// A connection that is under way, or (true) there already.
fn begin(address: &Address, options: CreateConnection<'_>) -> Result<(Socket, bool)> {
    let socket = unconnected(address.family(), options)?;
    let address = address.encode()?;
    sys::check(sys::set_nonblocking(socket.0.fd, true))?;
    match sys::connect(socket.0.fd, &address) {
        code if code == -libc::EINPROGRESS && socket.timeout_ns() != NON_BLOCKING => {
            Ok((socket, false))
        }
        code => sys::check(code).map(|_| (socket, true)),
    }
}

/// The winner, with `O_NONBLOCK` as its timeout wants it.
fn connected(socket: Socket) -> Result<Socket> {
    let nonblocking = socket.timeout_ns() != BLOCKING;
    sys::check(sys::set_nonblocking(socket.0.fd, nonblocking))?;
    Ok(socket)
}

/// The addresses with the families in turn, the first one's first.
fn interleaved(addresses: Vec<Address>) -> Vec<Address> {
    let first_family = addresses.first().map(Address::family);
    let (first, others): (Vec<_>, Vec<_>) = addresses
        .into_iter()
        .partition(|address| Some(address.family()) == first_family);
    let mut others = others.into_iter();
    let mut in_turn = Vec::new();
    for address in first {
        in_turn.push(address);
        in_turn.extend(others.next());
    }
    in_turn.extend(others);
    in_turn
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
    use std::net::SocketAddr;
    use std::time::Instant;

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

    // Races.

    const DELAY: Duration = Duration::from_millis(100);

    fn racing() -> CreateConnection<'static> {
        CreateConnection {
            all_errors: true,
            ..Default::default()
        }
    }

    /// An address that answers nothing: a listener whose backlog is full. The sockets keep it so.
    fn silent() -> (Vec<Socket>, Address) {
        let listener = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
        listener.bind(("127.0.0.1", 0)).unwrap();
        listener.listen(0).unwrap();
        let address = listener.getsockname().unwrap();
        let mut sockets = vec![listener];
        // The backlog holds one more than said.
        for _ in 0..2 {
            let filler = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
            filler.setblocking(false).unwrap();
            assert_eq!(filler.connect_ex(&address).unwrap(), libc::EINPROGRESS);
            sockets.push(filler);
        }
        (sockets, address)
    }

    fn on_both(test: fn()) {
        test();
        crate::run(test);
    }

    #[test]
    fn a_race_goes_past_an_address_that_is_silent() {
        on_both(|| {
            let (_sockets, silent) = silent();
            let server = create_server(("127.0.0.1", 0)).unwrap();
            let address = server.getsockname().unwrap();
            let start = Instant::now();
            let order = [silent.clone(), address.clone(), silent];
            let socket = crate::timeout(30, || connect_racing(&order, racing(), DELAY)).unwrap();
            assert!(start.elapsed() >= DELAY);
            assert!(start.elapsed() < Duration::from_secs(30));
            assert_eq!(socket.getpeername().unwrap(), address);
            assert_eq!(socket.gettimeout(), None);
            let flags = sys::check(sys::status_flags(socket.fileno())).unwrap();
            assert_eq!(flags & libc::O_NONBLOCK, 0);
        });
    }

    #[test]
    fn a_race_does_not_wait_after_a_failure() {
        on_both(|| {
            let (_bound, refusing) = refusing();
            let server = create_server(("127.0.0.1", 0)).unwrap();
            let address = server.getsockname().unwrap();
            let hour = Duration::from_secs(3600);
            let order = [refusing.clone(), refusing, address.clone()];
            let socket = crate::timeout(30, || connect_racing(&order, racing(), hour)).unwrap();
            assert_eq!(socket.getpeername().unwrap(), address);
        });
    }

    #[test]
    fn a_lost_race_tells_what_each_address_said() {
        on_both(|| {
            let (_sockets, silent) = silent();
            let (_bound, refusing) = refusing();
            let options = CreateConnection {
                timeout: Some(0.3.into()),
                ..racing()
            };
            let order = [silent.clone(), refusing, silent];
            let start = Instant::now();
            let lost = crate::timeout(30, || connect_racing(&order, options, DELAY));
            let Err(Error::Group(errors)) = lost else {
                panic!("not a group");
            };
            let refused = Error::from_errno(libc::ECONNREFUSED);
            assert_eq!(*errors, [Error::Timeout, refused, Error::Timeout]);
            // Side by side: the last began 100 ms after the first.
            assert!(start.elapsed() >= Duration::from_millis(399));
            assert!(start.elapsed() < Duration::from_secs(30));
        });
    }

    #[test]
    fn a_timeout_around_a_race_ends_it() {
        on_both(|| {
            let (_sockets, silent) = silent();
            let order = [silent.clone(), silent];
            let result = crate::timeout(0.2, || connect_racing(&order, racing(), DELAY));
            assert_eq!(result.unwrap_err(), Error::Timeout);
        });
    }

    #[test]
    fn families_take_turns_in_a_race() {
        let addresses = ["[::1]:1", "[::2]:1", "[::3]:1", "1.1.1.1:1", "2.2.2.2:1"];
        let parsed = addresses.map(|text| Address::from(text.parse::<SocketAddr>().unwrap()));
        let in_turn = interleaved(parsed.to_vec());
        let shown: Vec<_> = in_turn.iter().map(Address::to_string).collect();
        let expected = ["[::1]:1", "1.1.1.1:1", "[::2]:1", "2.2.2.2:1", "[::3]:1"];
        assert_eq!(shown, expected);
        assert!(interleaved(Vec::new()).is_empty());
    }
}
