//! Python's `socket` object on io_uring: blocking-style calls in fibers, at event-loop speed.
//!
//! A program reads like the examples of Python's socket page; under it every call that waits is one operation on the core's
//! ring. In a fiber it suspends that fiber only, so thousands of plain blocking loops share one thread. On a plain thread the
//! same call blocks the thread. Any code written against [`std::io::Read`] and [`std::io::Write`] works on a [`Socket`].
//!
//! ```no_run
#![doc = include_str!("../examples/readme.rs")]
//! ```
//!
//! # Where to look
//!
//! - [`Socket`]: the object; [`socketpair`]; [`Address`] and [`ToAddress`]: addresses; [`Error`]: Python's exceptions.
//! - [`run`], [`spawn`], [`JoinHandle`], [`sleep`], [`timeout`]: fibers. [`Runtime`], [`Handle`], [`serve`]: several workers.
//! - [`Features`]: what the kernel offers; the example `doctor` prints it.
//!
//! # What it needs
//!
//! Linux 6.1 or newer, with io_uring allowed to the process. Where it is not, the error says what to change.
#![deny(unsafe_code)]

#[cfg(not(target_os = "linux"))]
compile_error!("ringsock runs on Linux only: it is built on io_uring");

mod address;
mod buf;
mod constants;
mod driver;
mod error;
mod fiber;
mod log;
mod metrics;
mod runtime;
mod socket;
mod sys;
mod timeout;

pub use address::{Address, ToAddress, UnixAddr};
pub use buf::Buf;
pub use constants::*;
pub use driver::features::{Feature, Features};
pub use error::{Error, Result, Text};
pub use fiber::join::{Builder, JoinError, JoinHandle, spawn};
pub use fiber::thread::calls_without_ring;
pub use fiber::{sleep, timeout, yield_now};
pub use log::set_log_hook;
pub use metrics::Metrics;
pub use runtime::{Handle, Runtime, RuntimeBuilder, Server, raise_descriptor_limit, run, serve};
pub use socket::{OptionValue, Socket, socketpair, socketpair_with};
pub use timeout::Timeout;

/// What most programs need: the socket, its error, and Python's constants.
pub mod prelude {
    pub use crate::constants::*;
    pub use crate::{Address, Buf, Error, Socket, ToAddress};
}
