#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

#[cfg(not(target_os = "linux"))]
compile_error!("ringsock runs on Linux only: it is built on io_uring");

mod address;
mod buf;
#[cfg(doctest)]
mod compile_fail;
mod constants;
mod driver;
mod error;
mod fiber;
/// The examples in the page for Python's users.
#[cfg(doctest)]
#[doc = include_str!("../docs/from-python.md")]
mod from_python {}
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod log;
mod metrics;
mod relay;
mod resolve;
mod runtime;
pub mod signal;
mod socket;
mod sys;
mod timeout;

pub use address::{
    Address, AlgAddr, CanAddr, NetlinkAddr, PacketAddr, TipcAddr, ToAddress, UnixAddr, VsockAddr,
};
pub use buf::Buf;
pub use buf::pool::{BufferPool, BufferPoolBuilder, PoolBuf};
pub use constants::*;
pub use driver::DriverKind;
pub use driver::features::{Feature, Features};
pub use error::{Error, Result, Text};
pub use fiber::blocking::{BlockingHandle, set_blocking_threads, spawn_blocking};
pub use fiber::join::{Builder, JoinError, JoinHandle, spawn};
pub use fiber::ready::{wait_readable, wait_writable};
pub use fiber::route::ZeroCopy;
pub use fiber::sync::channel::{
    IntoIter, Iter, Receiver, RecvError, SendError, Sender, TryRecvError, TrySendError, channel,
};
pub use fiber::sync::condvar::Condvar;
pub use fiber::sync::mutex::{Mutex, MutexGuard};
pub use fiber::thread::calls_without_ring;
pub use fiber::{sleep, timeout, yield_now};
pub use log::set_log_hook;
pub use metrics::Metrics;
pub use relay::{RelayEnd, RelayMode, RelayOptions, RelaySide, Relayed, relay};
pub use resolve::{
    AddrInfo, Service, getaddrinfo, getaddrinfo_with, getfqdn, gethostbyaddr, gethostbyname,
    gethostbyname_ex, gethostname, getnameinfo, getprotobyname, getservbyname, getservbyport,
    has_ipv6, htonl, htons, if_indextoname, if_nameindex, if_nametoindex, inet_aton, inet_ntoa,
    inet_ntop, inet_pton, ntohl, ntohs, set_lookup_threads, sethostname,
};
pub use runtime::{
    Handle, Runtime, RuntimeBuilder, ServeOptions, Server, raise_descriptor_limit, run, serve,
    serve_with,
};
pub use socket::{
    Afalg, Ancillary, AncillaryToSend, CMSG_LEN, CMSG_SPACE, Chunks, CreateConnection,
    CreateServer, Credentials, Datagrams, Incoming, Keepalive, MakeFile, OptionValue, RecvMsg,
    RecvMsgInto, Segments, SegmentsIter, SendMsg, Socket, SocketFile, SocketType, close,
    create_connection, create_connection_with, create_server, create_server_with, dup, fromfd,
    getdefaulttimeout, has_dualstack_ipv6, recv_fds, recv_fds_with, send_fds, send_fds_with,
    setdefaulttimeout, socket, socket_with, socketpair, socketpair_with,
};
pub use timeout::Timeout;

/// What most programs need: the socket, its error, and Python's constants.
pub mod prelude {
    pub use crate::constants::*;
    pub use crate::{Address, Buf, Error, Socket, ToAddress};
}
