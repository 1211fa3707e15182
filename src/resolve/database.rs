//! Services and protocols by name and number: `services(5)`, `protocols(5)`.
//!
//! The lookups run on the pool, as those of hosts do: `nsswitch.conf(5)` decides where the C library reads them.

use std::ffi::CString;

use super::{on_pool, raw};
use crate::error::{Error, Result};

fn argument(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Value("embedded null character".into()))
}

/// The port of a service by its name and, if given, its protocol (`"tcp"`, `"udp"`).
///
/// # Errors
///
/// `Message`: `service/proto not found`. `Value`: a NUL in a name. `Gaierror` (`EAI_AGAIN`): too many lookups are waiting. `Timeout` (of
/// an enclosing [`timeout`](crate::timeout)), `Cancelled`, `Shutdown`.
///
/// # Source
///
/// Python [`socket.getservbyname(servicename, protocolname)`](https://docs.python.org/3/library/socket.html#socket.getservbyname);
/// [getservbyname_r(3)](https://man7.org/linux/man-pages/man3/getservbyname_r.3.html).
///
/// ```
/// # if std::path::Path::new("/etc/services").exists() {
/// assert_eq!(ringsock::getservbyname("http", "tcp")?, 80);
/// # }
/// assert_eq!(ringsock::getservbyname("?", None).unwrap_err().to_string(), "service/proto not found");
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn getservbyname<'a>(
    servicename: &str,
    protocolname: impl Into<Option<&'a str>>,
) -> Result<u16> {
    let name = argument(servicename)?;
    let proto = protocolname.into().map(argument).transpose()?;
    let port = on_pool(move || raw::getservbyname(&name, proto.as_deref()))?;
    port.ok_or_else(|| Error::Message("service/proto not found".into()))
}

/// The name of the service that has this port and, if given, this protocol (`"tcp"`, `"udp"`).
///
/// # Errors
///
/// `Message`: `port/proto not found`. The others as for [`getservbyname`].
///
/// # Source
///
/// Python [`socket.getservbyport(port, protocolname)`](https://docs.python.org/3/library/socket.html#socket.getservbyport);
/// [getservbyport_r(3)](https://man7.org/linux/man-pages/man3/getservbyport_r.3.html).
///
/// ```
/// # if std::path::Path::new("/etc/services").exists() {
/// assert_eq!(ringsock::getservbyport(53, "udp")?, "domain");
/// # }
/// assert_eq!(ringsock::getservbyport(0, None).unwrap_err().to_string(), "port/proto not found");
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn getservbyport<'a>(port: u16, protocolname: impl Into<Option<&'a str>>) -> Result<String> {
    let proto = protocolname.into().map(argument).transpose()?;
    let name = on_pool(move || raw::getservbyport(port, proto.as_deref()))?;
    name.ok_or_else(|| Error::Message("port/proto not found".into()))
}

/// The number of a protocol by its name (`"icmp"`), for the third argument of [`Socket::new`](crate::Socket::new).
///
/// # Errors
///
/// `Message`: `protocol not found`. The others as for [`getservbyname`].
///
/// # Source
///
/// Python [`socket.getprotobyname(protocolname)`](https://docs.python.org/3/library/socket.html#socket.getprotobyname);
/// [getprotobyname_r(3)](https://man7.org/linux/man-pages/man3/getprotobyname_r.3.html).
///
/// ```
/// # if std::path::Path::new("/etc/protocols").exists() {
/// assert_eq!(ringsock::getprotobyname("icmp")?, ringsock::IPPROTO_ICMP);
/// # }
/// assert_eq!(ringsock::getprotobyname("?").unwrap_err().to_string(), "protocol not found");
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn getprotobyname(protocolname: &str) -> Result<i32> {
    let name = argument(protocolname)?;
    let number = on_pool(move || raw::getprotobyname(&name))?;
    number.ok_or_else(|| Error::Message("protocol not found".into()))
}
