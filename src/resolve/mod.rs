//! Names and numbers: hosts, services, protocols and interfaces, with the C library's answers and Python's rules.
//!
//! A lookup may read files or wait for a name server, so it runs on a thread of a pool, and only the calling fiber (or plain
//! thread) waits for it. What needs no lookup, such as a numeric host, is answered on the calling thread.
//!
//! ```text
//!  getaddrinfo ──▶ with AI_NUMERICHOST, here ──▶ found, or an error about the arguments: the result
//!                                          └──▶ a name ──▶ queue (1,024, then EAI_AGAIN) ──▶ 4 threads ──▶ the same call without it
//! ```
//!
//! The pool is not that of `spawn_blocking`: a dead name server holds a thread for seconds, and enough of such lookups would keep
//! everybody's files waiting, and the other way round. The pool's threads have stacks that the C library's modules can rely on.
//!
//! This module owns the rules and the pool; `raw` calls the C library, `idna` encodes names, `number` and `database` hold the
//! functions that look up no hosts. None of them knows sockets.

mod database;
mod idna;
mod number;
mod raw;

use std::ffi::CString;
use std::net::IpAddr;

use self::raw::Hints;
use crate::address::{self, Address, ToAddress};
use crate::constants::{
    AF_INET, AF_UNSPEC, AI_NUMERICHOST, EAI_AGAIN, EAI_NONAME, EAI_SERVICE, Family, Kind,
    NI_NUMERICHOST, NI_NUMERICSERV, SOCK_STREAM,
};
use crate::error::{Error, Result};
use crate::fiber::blocking::{self, Settings, WhenFull};
use crate::fiber::join::JoinError;

pub use database::{getprotobyname, getservbyname, getservbyport};
pub use number::{
    has_ipv6, htonl, htons, if_indextoname, if_nameindex, if_nametoindex, inet_aton, inet_ntoa,
    inet_ntop, inet_pton, ntohl, ntohs,
};

static LOOKUPS: Settings = Settings::new("ringsock-lookup", 4, WhenFull::Refuse);

/// Sets how many threads name lookups may use, at least 1: 4 if not said. Each runs one lookup at a time.
///
/// A lookup at a dead name server takes the C library's time (`resolv.conf(5)`: two attempts of 5 seconds) and holds its thread
/// that long, whether or not somebody still waits for it.
///
/// ```
/// ringsock::set_lookup_threads(16);
/// ```
pub fn set_lookup_threads(threads: usize) {
    LOOKUPS.set_threads_max(threads);
}

/// The result of `lookup`, which runs on the pool.
fn on_pool<T: Send + 'static>(lookup: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    // The queue is full, no thread could be started, or nothing waits here (a destructor of a fiber that panics): another time.
    let busy = Error::Gaierror { code: EAI_AGAIN };
    let handle = blocking::spawn_on(&LOOKUPS, lookup);
    let Ok(handle) = handle else {
        return Err(busy);
    };
    match handle.join() {
        Ok(result) => Ok(result),
        Err(JoinError::Interrupted(error)) if error.errno() != Some(libc::EAGAIN) => Err(error),
        Err(JoinError::Interrupted(_) | JoinError::NotStarted(_)) => Err(busy),
        // In a child that was forked by another thread meanwhile.
        Err(JoinError::Shutdown) => Err(Error::Shutdown),
        Err(JoinError::Panic(payload)) => std::panic::resume_unwind(payload),
    }
}

/// A service as [`getaddrinfo`] takes it: none, a port number, or a name (which may be a decimal number, too).
///
/// It converts from integers, `&str` and `Option<&str>`, so that `None` is no service.
///
/// ```
/// use ringsock::Service;
/// let services: [Service; 4] = [80.into(), "http".into(), "80".into(), None.into()];
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Service<'a>(ServiceForm<'a>);

#[derive(Clone, Copy, Debug)]
enum ServiceForm<'a> {
    None,
    Number(i64),
    Name(&'a str),
}

impl<'a> From<&'a str> for Service<'a> {
    fn from(name: &'a str) -> Service<'a> {
        Service(ServiceForm::Name(name))
    }
}

impl<'a> From<&'a String> for Service<'a> {
    fn from(name: &'a String) -> Service<'a> {
        Service(ServiceForm::Name(name))
    }
}

impl<'a> From<Option<&'a str>> for Service<'a> {
    fn from(name: Option<&'a str>) -> Service<'a> {
        Service(name.map_or(ServiceForm::None, ServiceForm::Name))
    }
}

impl From<i32> for Service<'_> {
    fn from(port: i32) -> Self {
        Service(ServiceForm::Number(port.into()))
    }
}

impl From<u16> for Service<'_> {
    fn from(port: u16) -> Self {
        Service(ServiceForm::Number(port.into()))
    }
}

impl From<i64> for Service<'_> {
    fn from(port: i64) -> Self {
        Service(ServiceForm::Number(port))
    }
}

impl Service<'_> {
    /// As the C library takes it.
    fn text(self) -> Result<Option<CString>> {
        let text = match self.0 {
            ServiceForm::None => return Ok(None),
            ServiceForm::Number(port) => port.to_string(),
            ServiceForm::Name(name) => name.to_owned(),
        };
        CString::new(text)
            .map(Some)
            .map_err(|_| Error::Gaierror { code: EAI_SERVICE })
    }

    /// Whether it has to be looked up. A negative number is looked up as a name.
    fn is_name(self) -> bool {
        match self.0 {
            ServiceForm::None => false,
            ServiceForm::Number(port) => port < 0,
            ServiceForm::Name(name) => !name.bytes().all(|byte| byte.is_ascii_digit()),
        }
    }
}

/// One of the addresses that [`getaddrinfo`] found, with what [`Socket::new`](crate::Socket::new) wants to know.
///
/// ```
/// use ringsock::prelude::*;
/// for info in ringsock::getaddrinfo("127.0.0.1", 80)? {
///     let _socket = Socket::new(info.family, SOCK_DGRAM, 0)?;
///     assert_eq!(info.sockaddr.to_string(), "127.0.0.1:80");
/// }
/// # Ok::<(), ringsock::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddrInfo {
    /// AF_INET or AF_INET6.
    pub family: Family,
    /// SOCK_STREAM and so on.
    pub kind: Kind,
    /// IPPROTO_TCP and so on; 0 for SOCK_RAW.
    pub proto: i32,
    /// With `AI_CANONNAME` the host's canonical name, in the first result only; else empty.
    pub canonname: String,
    /// The address, to connect or bind to.
    pub sockaddr: Address,
}

/// The addresses of a host and service, in the order in which to try them, once per socket type.
///
/// A host is a name, an IP address, or `None`: this machine's loopback addresses. A service is a port, a name of `services(5)`, or
/// `None` (port 0); one of the two must be given. Of a port only the lower 16 bits count, and -1 is no service, as in Python.
///
/// A name is looked up on a pool of 4 threads ([`set_lookup_threads`]): only the calling fiber waits, in the order of the C library
/// (`/etc/hosts`, then the name servers, by nsswitch.conf(5)) and as long as it takes; an enclosing [`timeout`](crate::timeout) ends
/// the wait (the lookup itself goes on). Up to 1,024 lookups wait for a thread. A numeric host is answered at once.
///
/// A name that is not ASCII is encoded by Python's `idna` (IDNA 2003).
///
/// # Errors
///
/// - `Gaierror`: `EAI_NONAME`: no such host, or neither host nor service, or an empty host. `EAI_SERVICE`: no such service.
///   `EAI_AGAIN`: the name servers do not answer, or 1,024 lookups are waiting already. `EAI_FAIL`: a name server refused.
///   `EAI_NODATA`: the host has no address of the family. `EAI_FAMILY`, `EAI_SOCKTYPE`, `EAI_BADFLAGS`: a wrong argument.
///   `EAI_ADDRFAMILY`: a numeric host of another family. `EAI_MEMORY`.
/// - `Value`: a label of the name is empty, above 63 bytes, or cannot be encoded (Python's `UnicodeError`).
/// - `Os`: what the system said (`EAI_SYSTEM`).
/// - `Timeout` (of an enclosing [`timeout`](crate::timeout)), `Cancelled`, `Shutdown`.
///
/// # Source
///
/// Python [`socket.getaddrinfo(host, port)`](https://docs.python.org/3/library/socket.html#socket.getaddrinfo);
/// [getaddrinfo(3)](https://man7.org/linux/man-pages/man3/getaddrinfo.3.html). It differs in a host with a NUL, which is `EAI_NONAME`
/// here and cut in Python.
///
/// ```
/// use ringsock::prelude::*;
/// let found = ringsock::getaddrinfo("localhost", "http")?;
/// assert!(found.iter().all(|info| info.sockaddr.port() == Some(80)));
/// assert!(ringsock::getaddrinfo(None, None).is_err());
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn getaddrinfo<'a>(
    host: impl Into<Option<&'a str>>,
    service: impl Into<Service<'a>>,
) -> Result<Vec<AddrInfo>> {
    getaddrinfo_with(host, service, AF_UNSPEC, Kind::new(0), 0, 0)
}

/// [`getaddrinfo`] of one family, socket type or protocol (`AF_UNSPEC`, 0 and 0 for any), or with flags (`AI_PASSIVE` and so on).
///
/// # Errors
///
/// Those of [`getaddrinfo`]; `EAI_SERVICE` also where the service is not for this type.
///
/// # Source
///
/// Python [`socket.getaddrinfo(host, port, family, type, proto, flags)`](https://docs.python.org/3/library/socket.html#socket.getaddrinfo);
/// [getaddrinfo(3)](https://man7.org/linux/man-pages/man3/getaddrinfo.3.html).
///
/// ```
/// use ringsock::prelude::*;
/// let found = ringsock::getaddrinfo_with(None, 8080, AF_INET, SOCK_STREAM, 0, AI_PASSIVE)?;
/// assert_eq!(found.len(), 1);
/// assert_eq!(found[0].sockaddr.to_string(), "0.0.0.0:8080");
/// assert_eq!(found[0].proto, IPPROTO_TCP);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn getaddrinfo_with<'a>(
    host: impl Into<Option<&'a str>>,
    service: impl Into<Service<'a>>,
    family: Family,
    kind: Kind,
    proto: i32,
    flags: i32,
) -> Result<Vec<AddrInfo>> {
    let service = service.into();
    let host = match host.into() {
        Some(host) => {
            let name = idna::encode(host).map_err(codec_error)?;
            Some(CString::new(name).map_err(|_| Error::Gaierror { code: EAI_NONAME })?)
        }
        None => None,
    };
    let hints = Hints {
        family,
        kind,
        proto,
        flags,
    };
    lookup(host, service.text()?, service.is_name(), hints)
}

/// A host name that cannot be encoded, with Python's text.
fn codec_error(reason: String) -> Error {
    let text = format!("encoding with 'idna' codec failed (UnicodeError: {reason})");
    Error::Value(text.into())
}

/// getaddrinfo here, if nothing has to be looked up, else on the pool.
fn lookup(
    host: Option<CString>,
    service: Option<CString>,
    service_is_name: bool,
    hints: Hints,
) -> Result<Vec<AddrInfo>> {
    if !service_is_name {
        let numeric = Hints {
            flags: hints.flags | AI_NUMERICHOST,
            ..hints
        };
        let result = raw::getaddrinfo(host.as_deref(), service.as_deref(), numeric);
        let is_name = result == Err(Error::Gaierror { code: EAI_NONAME })
            && hints.flags & AI_NUMERICHOST == 0
            && host.as_deref().is_some_and(|host| !host.is_empty());
        if !is_name {
            return result;
        }
    }
    on_pool(move || raw::getaddrinfo(host.as_deref(), service.as_deref(), hints))?
}

/// The first address of a host that is no literal, and its scope: what a host in an address stands for.
pub(crate) fn first_address(host: &str, family: Family, numeric: bool) -> Result<(IpAddr, u32)> {
    // Python does not look at the labels of an ASCII name here, only at what it has to encode.
    let name = if host.is_ascii() {
        host.to_owned()
    } else {
        idna::encode(host).map_err(|_| Error::Type("encoding of hostname failed".into()))?
    };
    let no_name = Error::Gaierror { code: EAI_NONAME };
    let name = CString::new(name).map_err(|_| no_name.clone())?;
    let hints = Hints {
        family,
        kind: Kind::new(0),
        proto: 0,
        flags: if numeric { AI_NUMERICHOST } else { 0 },
    };
    let found = lookup(Some(name), None, false, hints)?;
    match found.first().map(|info| &info.sockaddr) {
        Some(Address::V4(address)) => Ok(((*address.ip()).into(), 0)),
        Some(Address::V6(address)) => Ok(((*address.ip()).into(), address.scope_id())),
        _ => Err(no_name),
    }
}

/// All addresses of a host for a connection.
pub(crate) fn stream_addresses(host: &str, port: u16) -> Result<Vec<Address>> {
    let found = getaddrinfo_with(host, port, AF_UNSPEC, SOCK_STREAM, 0, 0)?;
    Ok(found.into_iter().map(|info| info.sockaddr).collect())
}

/// The host's name and the service's name of an address, or their numbers: as `flags` (`NI_NUMERICHOST` and so on) say, and
/// numbers where no name is known.
///
/// The address has a numeric host. The lookup waits as that of [`getaddrinfo`]; with both numeric flags there is none.
///
/// # Errors
///
/// - `Gaierror`: `EAI_NONAME`: the host of the address is a name, or has none and `NI_NAMEREQD` is set. `EAI_BADFLAGS`.
///   `EAI_AGAIN`: the name servers do not answer (with `NI_NAMEREQD`), or too many lookups are waiting.
/// - `Type`: no IP address. `Message`, `Overflow`: see [`ToAddress`].
/// - `Timeout` (of an enclosing [`timeout`](crate::timeout)), `Cancelled`, `Shutdown`.
///
/// # Source
///
/// Python [`socket.getnameinfo(sockaddr, flags)`](https://docs.python.org/3/library/socket.html#socket.getnameinfo);
/// [getnameinfo(3)](https://man7.org/linux/man-pages/man3/getnameinfo.3.html). It differs as [`ToAddress`] does: a scope in the host
/// is kept, and `<broadcast>` is an address.
///
/// ```
/// use ringsock::prelude::*;
/// let numbers = ringsock::getnameinfo(("::1", 80), NI_NUMERICHOST | NI_NUMERICSERV)?;
/// assert_eq!(numbers, ("::1".into(), "80".into()));
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn getnameinfo(sockaddr: impl ToAddress, flags: i32) -> Result<(String, String)> {
    let address = match sockaddr.to_address(AF_UNSPEC) {
        Err(Error::Message(text)) if &*text == address::WILDCARD_OF_MANY => {
            return Err(Error::Gaierror { code: EAI_NONAME });
        }
        address => address?,
    };
    if address.ip().is_none() {
        let text = "getnameinfo() argument 1 must be an IP address";
        return Err(Error::Type(text.into()));
    }
    let sockaddr = address.encode()?;
    const NUMERIC: i32 = NI_NUMERICHOST | NI_NUMERICSERV;
    if flags & NUMERIC == NUMERIC {
        return raw::getnameinfo(&sockaddr, flags);
    }
    on_pool(move || raw::getnameinfo(&sockaddr, flags))?
}

/// What the lookups of a host's names come to: its name, its other names, its addresses.
pub(crate) type HostEntry = (String, Vec<String>, Vec<String>);

/// A host as the functions called gethostby... take it: encoded, without a NUL.
fn host_argument(function: &str, host: &str) -> Result<CString> {
    let name = idna::encode(host).map_err(codec_error)?;
    CString::new(name).map_err(|_| {
        let text =
            format!("{function}() argument 1 must be encoded string without null bytes, not str");
        Error::Type(text.into())
    })
}

/// The IPv4 address of a host, as a string; a numeric address is its own.
///
/// `""` is `0.0.0.0` and `"<broadcast>"` is `255.255.255.255`. The lookup waits as that of [`getaddrinfo`], which knows IPv6, too.
///
/// # Errors
///
/// `Gaierror`: `EAI_NONAME`: no such host. `EAI_ADDRFAMILY`: an IPv6 address. The others as for [`getaddrinfo`]; `Type`: a NUL in the
/// name.
///
/// # Source
///
/// Python [`socket.gethostbyname(hostname)`](https://docs.python.org/3/library/socket.html#socket.gethostbyname);
/// [getaddrinfo(3)](https://man7.org/linux/man-pages/man3/getaddrinfo.3.html), which it calls.
///
/// ```
/// assert_eq!(ringsock::gethostbyname("127.1")?, "127.0.0.1");
/// assert_eq!(ringsock::gethostbyname("localhost")?, "127.0.0.1");
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn gethostbyname(hostname: &str) -> Result<String> {
    host_argument("gethostbyname", hostname)?;
    let (ip, _) = address::host_ip(hostname, AF_INET)?;
    Ok(raw::presentation(ip))
}

/// The host's name, its other names, and its IPv4 addresses.
///
/// The host is resolved as by [`gethostbyname`] first. The lookups wait as that of [`getaddrinfo`].
///
/// # Errors
///
/// Those of [`gethostbyname`]; `Herror`: its address is known, its entry is not.
///
/// # Source
///
/// Python [`socket.gethostbyname_ex(hostname)`](https://docs.python.org/3/library/socket.html#socket.gethostbyname_ex);
/// [gethostbyname_r(3)](https://man7.org/linux/man-pages/man3/gethostbyname.3.html).
///
/// ```
/// let (name, _aliases, addresses) = ringsock::gethostbyname_ex("127.0.0.1")?;
/// assert_eq!((name, addresses), ("127.0.0.1".into(), vec!["127.0.0.1".into()]));
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn gethostbyname_ex(hostname: &str) -> Result<(String, Vec<String>, Vec<String>)> {
    let name = host_argument("gethostbyname_ex", hostname)?;
    address::host_ip(hostname, AF_INET)?;
    on_pool(move || raw::gethostbyname(&name))?
}

/// The name of the host that has this address, its other names, and its addresses.
///
/// The address is IPv4 or IPv6; the name of a host is resolved first. The lookups wait as that of [`getaddrinfo`].
///
/// # Errors
///
/// - `Herror`: 1 (host not found), 2 (try again), 3 (no recovery), 4 (no address): nobody knows a name for the address.
/// - `Gaierror`, `Type`, `Value` and the rest: as for [`gethostbyname`]. `Message`: an empty host.
///
/// # Source
///
/// Python [`socket.gethostbyaddr(ip_address)`](https://docs.python.org/3/library/socket.html#socket.gethostbyaddr);
/// [gethostbyaddr_r(3)](https://man7.org/linux/man-pages/man3/gethostbyaddr.3.html).
///
/// ```
/// let (_name, _aliases, addresses) = ringsock::gethostbyaddr("127.0.0.1")?;
/// assert_eq!(addresses, ["127.0.0.1"]);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn gethostbyaddr(ip_address: &str) -> Result<(String, Vec<String>, Vec<String>)> {
    host_argument("gethostbyaddr", ip_address)?;
    let (ip, _) = match address::host_ip(ip_address, AF_UNSPEC) {
        Err(Error::Gaierror { code: EAI_NONAME }) => first_address(ip_address, AF_UNSPEC, false)?,
        numeric => numeric?,
    };
    on_pool(move || raw::gethostbyaddr(ip))?
}

/// The fully qualified name of a host: of its name and its other names the first one with a dot, else its name. `None` and an
/// empty name mean this machine.
///
/// If nothing is known about the host, the result is the name as it was given (of this machine, [`gethostname`]).
///
/// # Errors
///
/// Not that the host is unknown. `Value`: a name that cannot be encoded; `Type`: a NUL in it. `Timeout` (of an enclosing
/// [`timeout`](crate::timeout)), `Cancelled`, `Shutdown`.
///
/// # Source
///
/// Python [`socket.getfqdn(name)`](https://docs.python.org/3/library/socket.html#socket.getfqdn).
///
/// ```
/// assert!(!ringsock::getfqdn(None)?.is_empty());
/// assert!(ringsock::getfqdn("localhost")?.starts_with("localhost"));
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn getfqdn<'a>(name: impl Into<Option<&'a str>>) -> Result<String> {
    let name = match name.into().unwrap_or_default().trim() {
        "" | "0.0.0.0" | "::" => gethostname()?,
        name => name.to_owned(),
    };
    match gethostbyaddr(&name) {
        Ok((hostname, aliases, _)) => {
            let full = aliases.into_iter().find(|alias| alias.contains('.'));
            match full {
                Some(full) if !hostname.contains('.') => Ok(full),
                _ => Ok(hostname),
            }
        }
        // Python's OSError.
        Err(
            Error::Os { .. } | Error::Message(_) | Error::Gaierror { .. } | Error::Herror { .. },
        ) => Ok(name),
        Err(error) => Err(error),
    }
}

/// This machine's name, as the kernel has it: not always a fully qualified one (see [`getfqdn`]).
///
/// # Errors
///
/// None on Linux; the result leaves room for one.
///
/// # Source
///
/// Python [`socket.gethostname()`](https://docs.python.org/3/library/socket.html#socket.gethostname);
/// [gethostname(2)](https://man7.org/linux/man-pages/man2/gethostname.2.html).
///
/// ```
/// println!("this is {}", ringsock::gethostname()?);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn gethostname() -> Result<String> {
    raw::gethostname()
}

/// Sets this machine's name (that of the UTS namespace), at most 64 bytes.
///
/// # Errors
///
/// `EPERM`: that needs `CAP_SYS_ADMIN`. `EINVAL`: too long.
///
/// # Source
///
/// Python [`socket.sethostname(name)`](https://docs.python.org/3/library/socket.html#socket.sethostname) (3.3);
/// [sethostname(2)](https://man7.org/linux/man-pages/man2/sethostname.2.html).
///
/// ```
/// let error = ringsock::sethostname("x".repeat(100)).unwrap_err();
/// assert!(matches!(error.errno(), Some(1 | 22))); // EPERM, EINVAL
/// ```
pub fn sethostname(name: impl AsRef<[u8]>) -> Result<()> {
    raw::sethostname(name.as_ref())
}
