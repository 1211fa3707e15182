//! What a socket brings, one after another: the chunks of a stream, the connections of a listener.
//!
//! Both are loops around [`Socket::recv`] and [`Socket::accept`] and read nothing ahead, so one that is dropped midway leaves
//! everything to the next call on the socket, and the kernel never holds a buffer that no call waits for.
//!
//! Operations with many results would. A hand-written ring with a multishot receive and no fibers takes 2 % less processor time
//! for an echo than this on TCP, on AF_UNIX 6 to 9 % less at 64 bytes and as much or up to 10 % more at 16 and 64 KiB, where its
//! buffers come from the cold end of a queue: a fiber's share of that gain is small. A multishot accept has no room for the
//! peers' addresses, so each connection would take one more call.

use std::fmt;
use std::iter::FusedIterator;
use std::marker::PhantomData;
use std::time::Duration;

use super::Socket;
use super::back_off::BackOff;
use crate::address::Address;
use crate::buf::Buf;
use crate::error::{Error, Result};
use crate::fiber;

/// Bytes of a chunk where no receive buffers are lent.
const CHUNK_BYTES: usize = 64 * 1024;

/// The bytes of a stream in chunks, as they arrive: see [`Socket::chunks`].
pub struct Chunks<'a> {
    socket: &'a Socket,
    ended: bool,
    /// It is one fiber's or thread's, should it ever read ahead.
    not_send: PhantomData<*const ()>,
}

/// The connections of a listening socket: see [`Socket::incoming`].
pub struct Incoming<'a> {
    socket: &'a Socket,
    ended: bool,
    back_off: BackOff,
    not_send: PhantomData<*const ()>,
}

impl Socket {
    /// The bytes of a stream in chunks, as they arrive, until its end.
    ///
    /// Each item is what one [`recv`](Socket::recv) brings that asks for as much as a receive buffer holds
    /// ([`RuntimeBuilder::buffers`](crate::RuntimeBuilder::buffers): 64 KiB if not said, as on plain threads), in a fiber without
    /// a copy or an allocation. Nothing is received ahead of the items that are taken: after a `break`, the next call on the
    /// socket goes on where the last chunk ended. (Of datagrams each is a chunk, and an empty one looks like the end.)
    ///
    /// # Errors
    ///
    /// An item is an error of [`recv`](Socket::recv). `Timeout` (each item has the whole time) and `EAGAIN` can be followed by
    /// more; after another error there is none.
    ///
    /// # Source
    ///
    /// `recv(2)`; `IORING_OP_POLL_ADD` while there is nothing.
    ///
    /// ```
    /// # ringsock::run(|| {
    /// let (left, right) = ringsock::socketpair()?;
    /// left.sendall(b"hello")?;
    /// drop(left);
    /// for chunk in right.chunks() {
    ///     assert_eq!(chunk?, b"hello");
    /// }
    /// # Ok::<(), ringsock::Error>(()) })?;
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn chunks(&self) -> Chunks<'_> {
        Chunks {
            socket: self,
            ended: false,
            not_send: PhantomData,
        }
    }

    /// The connections that come to a listening socket, with their peers' addresses, as [`accept`](Socket::accept) gives them.
    ///
    /// Nothing is accepted ahead of the items that are taken. When descriptors or memory run out, that error is an item, and the
    /// next one is waited for 10 ms first, twice as long each time up to half a second, while connections stay in the backlog:
    /// so a loop that goes on after errors serves them all and does not spin. [`serve`](crate::serve) does that and more.
    ///
    /// # Errors
    ///
    /// An item is an error of [`accept`](Socket::accept). After `EBADF` (closed), `EINVAL`, `EOPNOTSUPP`, `ENOTSOCK`,
    /// [`Error::Cancelled`] and [`Error::Shutdown`] there is no other; in non-blocking mode each is `EAGAIN` while none is there.
    ///
    /// # Source
    ///
    /// `std::net::TcpListener::incoming`; `accept4(2)`; `IORING_OP_ACCEPT`.
    ///
    /// ```
    /// # ringsock::run(|| {
    /// let server = ringsock::create_server(("127.0.0.1", 0))?;
    /// let client = ringsock::create_connection(server.getsockname()?)?;
    /// for conn in server.incoming() {
    ///     let (conn, peer) = conn?;
    ///     assert_eq!(peer, client.getsockname()?);
    ///     conn.sendall(b"welcome")?;
    ///     break;
    /// }
    /// assert_eq!(client.recv(16)?, b"welcome");
    /// # Ok::<(), ringsock::Error>(()) })?;
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn incoming(&self) -> Incoming<'_> {
        Incoming {
            socket: self,
            ended: false,
            back_off: BackOff::default(),
            not_send: PhantomData,
        }
    }
}

impl Iterator for Chunks<'_> {
    type Item = Result<Buf>;

    #[inline]
    fn next(&mut self) -> Option<Result<Buf>> {
        if self.ended {
            return None;
        }
        let bufsize = match fiber::lent_bytes() {
            0 => CHUNK_BYTES,
            lent => lent,
        };
        match self.socket.recv(bufsize) {
            Ok(chunk) if chunk.is_empty() => {
                self.ended = true;
                None
            }
            Ok(chunk) => Some(Ok(chunk)),
            Err(error) => {
                self.ended = !(error == Error::Timeout || error.is_would_block());
                Some(Err(error))
            }
        }
    }
}

impl FusedIterator for Chunks<'_> {}

impl Iterator for Incoming<'_> {
    type Item = Result<(Socket, Address)>;

    fn next(&mut self) -> Option<Result<(Socket, Address)>> {
        if self.ended {
            return None;
        }
        let paused = match self.back_off.wait() {
            Duration::ZERO => Ok(()),
            pause => fiber::sleep(pause),
        };
        let accepted = paused.and_then(|()| self.socket.accept());
        let errno = accepted.as_ref().err().and_then(Error::errno);
        match errno {
            Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                self.back_off.grow();
            }
            _ => self.back_off = BackOff::default(),
        }
        self.ended = match errno {
            Some(errno) => matches!(
                errno,
                libc::EBADF | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOTSOCK
            ),
            None => matches!(accepted, Err(Error::Cancelled | Error::Shutdown)),
        };
        Some(accepted)
    }
}

impl FusedIterator for Incoming<'_> {}

impl fmt::Debug for Chunks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Chunks").field(self.socket).finish()
    }
}

impl fmt::Debug for Incoming<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Incoming").field(self.socket).finish()
    }
}
