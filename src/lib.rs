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
mod log;
mod metrics;
mod runtime;
pub mod signal;
mod socket;
mod sys;
mod timeout;

pub use address::{
    Address, AlgAddr, CanAddr, NetlinkAddr, PacketAddr, TipcAddr, ToAddress, UnixAddr, VsockAddr,
};
pub use buf::Buf;
pub use constants::*;
pub use driver::features::{Feature, Features};
pub use error::{Error, Result, Text};
pub use fiber::blocking::{BlockingHandle, set_blocking_threads, spawn_blocking};
pub use fiber::join::{Builder, JoinError, JoinHandle, spawn};
pub use fiber::ready::{wait_readable, wait_writable};
pub use fiber::sync::channel::{
    IntoIter, Iter, Receiver, RecvError, SendError, Sender, TryRecvError, TrySendError, channel,
};
pub use fiber::sync::condvar::Condvar;
pub use fiber::sync::mutex::{Mutex, MutexGuard};
pub use fiber::thread::calls_without_ring;
pub use fiber::{sleep, timeout, yield_now};
pub use log::set_log_hook;
pub use metrics::Metrics;
pub use runtime::{Handle, Runtime, RuntimeBuilder, Server, raise_descriptor_limit, run, serve};
pub use socket::{
    CreateConnection, CreateServer, Keepalive, OptionValue, Socket, create_connection,
    create_connection_with, create_server, create_server_with, has_dualstack_ipv6, socketpair,
    socketpair_with,
};
pub use timeout::Timeout;

/// What most programs need: the socket, its error, and Python's constants.
pub mod prelude {
    pub use crate::constants::*;
    pub use crate::{Address, Buf, Error, Socket, ToAddress};
}
