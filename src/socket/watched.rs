//! Receives of a stream that its worker watches: see `fiber/watch.rs`.

use std::mem::MaybeUninit;
use std::sync::atomic::Ordering;

use super::{BY_OPTION, NON_BLOCKING, Socket};
use crate::buf::Buf;
use crate::constants::{AF_INET, AF_INET6, AF_UNIX, IPPROTO_TCP, SOCK_STREAM};
use crate::driver::Limit;
use crate::fiber::watch::{NoEvents, Watched};
use crate::fiber::{Borrower, outcome};
use crate::sys;

/// The ring has to do it, and may wait for so long (as a socket's timeout).
pub(super) struct StillToWait(pub(super) i64);

/// Whether a receive with this timeout may wait by a watch: SO_RCVTIMEO, which is asked for at each wait, limits operations only.
#[inline(always)]
fn may_be_watched(timeout_ns: i64) -> bool {
    timeout_ns != NON_BLOCKING && timeout_ns != BY_OPTION
}

impl Socket {
    /// The watch by which a receive without flags may go that waits for so long, if there is one.
    #[inline(always)]
    pub(super) fn watched(&self, timeout_ns: i64) -> Option<Watched<'_>> {
        self.0.inflight.watch()?;
        if !may_be_watched(timeout_ns) {
            return None;
        }
        Watched::of(&self.0.inflight).filter(Watched::pays)
    }

    /// [`watched`](Socket::watched), for a receive that has to wait: with a new watch if it is not the first.
    pub(super) fn begin_watch(&self, timeout_ns: i64) -> Option<Watched<'_>> {
        // Where a receive fails at once, there may be nothing to wait for (a listening socket).
        if !may_be_watched(timeout_ns)
            || !self.0.receives.load(Ordering::Relaxed)
            || !self.is_plain_stream()
        {
            return None;
        }
        Watched::begin_if_it_pays(&self.0.inflight, self.0.fd)
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
    pub(super) fn recv_if_watched(
        &self,
        buffer: &mut [MaybeUninit<u8>],
        timeout_ns: i64,
    ) -> Result<i32, StillToWait> {
        match self.watched(timeout_ns) {
            Some(watched) => self.recv_watched(&watched, buffer, timeout_ns),
            None => Err(StillToWait(timeout_ns)),
        }
    }

    /// Receives into `buffer`: the bytes or a code.
    #[inline]
    pub(super) fn recv_watched(
        &self,
        watched: &Watched<'_>,
        buffer: &mut [MaybeUninit<u8>],
        timeout_ns: i64,
    ) -> Result<i32, StillToWait> {
        self.recv_as_told(watched, timeout_ns, || self.recv_told(buffer))
    }

    /// Waits for events and has `receive` receive, until there was something. An interrupt that came meanwhile is the ring's to tell.
    #[inline(always)]
    fn recv_as_told(
        &self,
        watched: &Watched<'_>,
        timeout_ns: i64,
        mut receive: impl FnMut() -> (i32, bool),
    ) -> Result<i32, StillToWait> {
        let mut limit = Limit::of(timeout_ns);
        loop {
            let events = match watched.events(&mut limit) {
                Ok(events) => events,
                Err(NoEvents::Unwatched) => return Err(StillToWait(limit.left_ns())),
                // What came in time may not have been told yet, by a worker that is late.
                Err(NoEvents::Ended(outcome::TIMED_OUT)) => {
                    let (code, is_whole) = receive();
                    if code == -libc::EAGAIN {
                        return Ok(outcome::TIMED_OUT);
                    }
                    watched.received(libc::POLLIN as u32, is_whole);
                    return Ok(code);
                }
                Err(NoEvents::Ended(code)) => return Ok(code),
            };
            let (code, is_whole) = receive();
            if code == -libc::EAGAIN {
                if watched.found_nothing() {
                    continue;
                }
                return Err(StillToWait(limit.left_ns()));
            }
            watched.received(events, is_whole);
            return Ok(code);
        }
    }

    /// Receives into a buffer that is taken once there is something to put into it: the bytes or a code.
    // Functions of their own, so that a fiber that waits otherwise has none of this on its stack.
    #[inline(never)]
    pub(super) fn recv_lease_watched(
        &self,
        borrower: Borrower,
        timeout_ns: i64,
        out: &mut Buf,
    ) -> Result<i32, StillToWait> {
        match self.watched(timeout_ns) {
            Some(watched) => self.recv_lease_by(&watched, borrower, timeout_ns, out),
            None => Err(StillToWait(timeout_ns)),
        }
    }

    /// [`recv_lease_watched`](Socket::recv_lease_watched), as in [`begin_watch`](Socket::begin_watch).
    #[inline(never)]
    pub(super) fn recv_lease_newly_watched(
        &self,
        borrower: Borrower,
        timeout_ns: i64,
        out: &mut Buf,
    ) -> Result<i32, StillToWait> {
        match self.begin_watch(timeout_ns) {
            Some(watched) => self.recv_lease_by(&watched, borrower, timeout_ns, out),
            None => Err(StillToWait(timeout_ns)),
        }
    }

    #[inline(always)]
    fn recv_lease_by(
        &self,
        watched: &Watched<'_>,
        borrower: Borrower,
        timeout_ns: i64,
        out: &mut Buf,
    ) -> Result<i32, StillToWait> {
        self.recv_as_told(watched, timeout_ns, || {
            let mut is_whole = false;
            let code = borrower.receive_by(out, |buffer| {
                let code;
                (code, is_whole) = self.recv_told(buffer);
                code
            });
            (code, is_whole)
        })
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
