//! Receives of a stream that its worker watches: see `fiber/watch.rs`.

use std::mem::MaybeUninit;

use super::{BLOCKING, Socket};
use crate::buf::Buf;
use crate::constants::{AF_INET, AF_INET6, AF_UNIX, IPPROTO_TCP, SOCK_STREAM};
use crate::error::Result;
use crate::fiber::watch::{NoEvents, Watched};
use crate::fiber::{self, error_from_outcome};
use crate::sys;

impl Socket {
    /// The watch by which a receive without flags may go, if there is one.
    #[inline(always)]
    pub(super) fn watched(&self) -> Option<Watched<'_>> {
        self.0.inflight.watch()?;
        if self.timeout_ns() != BLOCKING {
            return None;
        }
        Watched::of(&self.0.inflight).filter(Watched::pays)
    }

    /// [`watched`](Socket::watched), for a receive that has to wait: with a new watch if it is not the first.
    pub(super) fn begin_watch(&self, timeout_ns: i64) -> Option<Watched<'_>> {
        if timeout_ns != BLOCKING || !self.is_plain_stream() {
            return None;
        }
        Watched::begin_if_quiet(&self.0.inflight, self.0.fd)
    }

    /// [`begin_watch`](Socket::begin_watch), for one who receives by plain calls, whatever the socket's timeout is.
    pub(crate) fn begin_watch_of_relay(&self) -> Option<Watched<'_>> {
        if !self.is_plain_stream() {
            return None;
        }
        Watched::begin(&self.0.inflight, self.0.fd)
    }

    /// Whether a short receive takes all there is, unless events or control data say otherwise.
    fn is_plain_stream(&self) -> bool {
        let inner = &self.0;
        let is_tcp =
            [AF_INET, AF_INET6].contains(&inner.family) && [0, IPPROTO_TCP].contains(&inner.proto);
        inner.kind == SOCK_STREAM && (is_tcp || inner.family == AF_UNIX)
    }

    /// Receives into `buffer` if the socket is watched: the bytes or a code.
    // Out of line, so that receives of sockets that are not are as short as ever.
    #[inline(never)]
    pub(super) fn recv_if_watched(&self, buffer: &mut [MaybeUninit<u8>]) -> Option<i32> {
        self.recv_watched(&self.watched()?, buffer)
    }

    /// Receives into `buffer`: the bytes or a code; `None` if the ring has to do it.
    #[inline]
    pub(super) fn recv_watched(
        &self,
        watched: &Watched<'_>,
        buffer: &mut [MaybeUninit<u8>],
    ) -> Option<i32> {
        loop {
            let events = match watched.events() {
                Ok(events) => events,
                Err(NoEvents::Unwatched) => return None,
                Err(NoEvents::Ended(code)) => return Some(code),
            };
            let (code, is_whole) = self.recv_told(buffer);
            if code == -libc::EAGAIN {
                watched.found_nothing();
                continue;
            }
            watched.received(events, is_whole);
            return Some(code);
        }
    }

    /// Receives at most `bufsize` bytes into a buffer that is taken once there are any; `None` if the ring has to do it.
    // Functions of their own, so that a fiber that waits otherwise has none of this on its stack.
    #[inline(never)]
    pub(super) fn recv_lease_watched(&self, bufsize: usize) -> Option<Result<Buf>> {
        self.recv_lease_by(&self.watched()?, bufsize)
    }

    /// [`recv_lease_watched`](Socket::recv_lease_watched), as in [`begin_watch`](Socket::begin_watch).
    #[inline(never)]
    pub(super) fn recv_lease_newly_watched(
        &self,
        bufsize: usize,
        timeout_ns: i64,
    ) -> Option<Result<Buf>> {
        self.recv_lease_by(&self.begin_watch(timeout_ns)?, bufsize)
    }

    #[inline(always)]
    fn recv_lease_by(&self, watched: &Watched<'_>, bufsize: usize) -> Option<Result<Buf>> {
        loop {
            let events = match watched.events() {
                Ok(events) => events,
                Err(NoEvents::Unwatched) => return None,
                Err(NoEvents::Ended(code)) => return Some(Err(error_from_outcome(code))),
            };
            let mut is_whole = false;
            let received = fiber::receive_by(bufsize, |buffer| {
                let code;
                (code, is_whole) = self.recv_told(buffer);
                code
            });
            if let Err(code) = received
                && code == -libc::EAGAIN
            {
                watched.found_nothing();
                continue;
            }
            watched.received(events, is_whole);
            return Some(received.map_err(error_from_outcome));
        }
    }

    /// One plain receive: its result, and whether it may be taken for all there was.
    #[inline(always)]
    pub(crate) fn recv_told(&self, buffer: &mut [MaybeUninit<u8>]) -> (i32, bool) {
        let len = buffer.len();
        let (code, divided) = loop {
            let told = if self.0.family == AF_UNIX {
                // A receive stops behind descriptors, and between senders where credentials are asked for; both leave a trace.
                let (code, flags) = sys::recv_with_flags(self.0.fd, buffer, libc::MSG_DONTWAIT);
                (code, flags & libc::MSG_CTRUNC != 0)
            } else {
                (sys::recv(self.0.fd, buffer, libc::MSG_DONTWAIT), false)
            };
            if told.0 != -libc::EINTR {
                break told;
            }
        };
        (code, code > 0 && (code as usize) < len && !divided)
    }
}
