//! An event for each operation of a socket, with the feature `tracing`; without it, nothing.
//!
//! An event at the end rather than a span around the call: while a fiber waits its thread runs others, and an entered span is the
//! thread's, so theirs would seem to happen inside.
//!
//! The events have the target `ringsock`, the level TRACE, and the fields `operation` (Python's name), `fd`, `bytes` (of transfers) and
//! `outcome` ("ok", or the error's text).

use super::Socket;
use crate::error::Result;

impl Socket {
    /// Tells of an operation that has ended: its result, unchanged.
    #[inline(always)]
    pub(super) fn traced<T: Outcome>(
        &self,
        operation: &'static str,
        result: Result<T>,
    ) -> Result<T> {
        #[cfg(feature = "tracing")]
        tell(self, operation, result.as_ref().map(Outcome::bytes));
        #[cfg(not(feature = "tracing"))]
        let _ = operation;
        result
    }

    /// [`traced`](Socket::traced), of a transfer that moves all of `bytes` or fails.
    #[inline(always)]
    pub(super) fn traced_whole(
        &self,
        operation: &'static str,
        bytes: usize,
        result: Result<()>,
    ) -> Result<()> {
        #[cfg(feature = "tracing")]
        tell(self, operation, result.as_ref().map(|()| Some(bytes)));
        #[cfg(not(feature = "tracing"))]
        let _ = (operation, bytes);
        result
    }
}

/// What an operation brings.
pub(super) trait Outcome {
    /// How many bytes, if it is a transfer.
    #[cfg(feature = "tracing")]
    fn bytes(&self) -> Option<usize>;
}

macro_rules! outcomes {
    ($($type:ty: |$value:pat_param| $bytes:expr;)*) => {
        $(impl Outcome for $type {
            #[cfg(feature = "tracing")]
            fn bytes(&self) -> Option<usize> {
                let $value = self;
                $bytes
            }
        })*
    };
}

outcomes! {
    (): |()| None;
    usize: |bytes| Some(*bytes);
    crate::buf::Buf: |buf| Some(buf.len());
    (Socket, crate::address::Address): |_| None;
    (usize, Option<crate::address::Address>): |(bytes, _)| Some(*bytes);
    super::RecvMsgInto: |message| Some(message.nbytes);
}

#[cfg(feature = "tracing")]
#[inline]
fn tell(
    socket: &Socket,
    operation: &'static str,
    result: std::result::Result<Option<usize>, &crate::error::Error>,
) {
    // One load where nobody listens.
    if tracing::enabled!(target: "ringsock", tracing::Level::TRACE) {
        tell_listeners(socket, operation, result);
    }
}

#[cfg(feature = "tracing")]
#[cold]
#[inline(never)]
fn tell_listeners(
    socket: &Socket,
    operation: &'static str,
    result: std::result::Result<Option<usize>, &crate::error::Error>,
) {
    let fd = socket.0.fd;
    match result {
        Ok(bytes) => {
            tracing::event!(target: "ringsock", tracing::Level::TRACE, operation, fd, bytes, outcome = "ok");
        }
        Err(error) => {
            tracing::event!(target: "ringsock", tracing::Level::TRACE, operation, fd, outcome = %error);
        }
    }
}
