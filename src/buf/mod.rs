//! Received bytes.

pub(crate) mod lease;
pub(crate) mod pool;

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use lease::Lease;
use pool::{Class, PoolBuf};

/// The bytes one `recv` brought. It reads and writes like a `[u8]`, may be sent to another thread, and converts into a `Vec<u8>`.
///
/// In a fiber, of a stream, it mostly is a *lease* of one of the worker's receive buffers
/// ([`RuntimeBuilder::buffers`](crate::RuntimeBuilder::buffers)): nothing is allocated or copied, and the buffer goes back when the
/// `Buf` is dropped, on whatever thread, also after the socket and the runtime are gone. While all buffers are out, receives
/// allocate instead. Nothing waits for a buffer and nothing fails for want of one, so holding on to a few is harmless; what is
/// kept for long is better kept as a `Vec` (or a clone, which is never a lease).
///
/// ```
/// # ringsock::run(|| {
/// let (left, right) = ringsock::socketpair()?;
/// left.sendall(b"hello")?;
/// let received = right.recv(1024)?;
/// assert_eq!(received, b"hello");
/// assert_eq!(received.len(), 5);
/// let owned: Vec<u8> = received.into();
/// # assert_eq!(owned, b"hello"); Ok::<(), ringsock::Error>(()) })?;
/// # Ok::<(), ringsock::Error>(())
/// ```
///
/// A buffer of a [`BufferPool`](crate::BufferPool) becomes one too, to be given to [`sendall_buf`](crate::Socket::sendall_buf).
///
/// With the feature `bytes` it converts into a `bytes::Bytes` without a copy.
#[derive(Default)]
pub struct Buf(Memory);

enum Memory {
    /// The bytes from `start` on.
    Heap {
        bytes: Vec<u8>,
        start: usize,
    },
    Lease(Lease),
    Pool(PoolBuf),
}

impl Default for Memory {
    fn default() -> Memory {
        Memory::Heap {
            bytes: Vec::new(),
            start: 0,
        }
    }
}

const _: () = assert!(size_of::<Buf>() <= 32);

/// Counts one more part of a buffer. Parts that were forgotten count, too: before the number wraps round, and a buffer that is in
/// use looks like one that is not, the process ends (as `Arc` has it).
fn count_part(others: &AtomicU32) {
    if others.fetch_add(1, Ordering::Relaxed) > i32::MAX as u32 {
        std::process::abort();
    }
}

impl Buf {
    /// Wraps bytes that were received.
    pub(crate) fn from_vec(bytes: Vec<u8>) -> Buf {
        Buf(Memory::Heap { bytes, start: 0 })
    }

    /// Wraps what was received into a pool's buffer.
    #[inline(always)]
    pub(crate) fn from_lease(lease: Lease) -> Buf {
        Buf(Memory::Lease(lease))
    }

    /// Keeps the first `len` bytes only; nothing happens if there are no more.
    ///
    /// ```
    /// # ringsock::run(|| {
    /// # let (left, right) = ringsock::socketpair()?;
    /// left.sendall(b"line\n")?;
    /// let mut line = right.recv(1024)?;
    /// line.truncate(4);
    /// assert_eq!(line, b"line");
    /// # Ok::<(), ringsock::Error>(()) })?;
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn truncate(&mut self, len: usize) {
        match &mut self.0 {
            Memory::Heap { bytes, start } => bytes.truncate(start.saturating_add(len)),
            Memory::Lease(lease) => lease.truncate(len),
            Memory::Pool(part) => part.truncate(len),
        }
    }

    /// Drops the first `count` bytes. It moves no byte.
    ///
    /// # Panics
    ///
    /// If there are fewer.
    ///
    /// ```
    /// # ringsock::run(|| {
    /// # let (left, right) = ringsock::socketpair()?;
    /// left.sendall(b"GET /")?;
    /// let mut request = right.recv(1024)?;
    /// request.advance(4);
    /// assert_eq!(request, b"/");
    /// # Ok::<(), ringsock::Error>(()) })?;
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn advance(&mut self, count: usize) {
        match &mut self.0 {
            Memory::Heap { bytes, start } => {
                assert!(count <= bytes.len() - *start, "past the end");
                *start += count;
            }
            Memory::Lease(lease) => lease.advance(count),
            Memory::Pool(part) => part.advance(count),
        }
    }

    /// Divides it in two: the first `at` bytes are returned, the rest stays. Both parts of a lease (or of a
    /// pool's buffer) share its buffer, which goes back with the last of them; of heap memory the first part is a copy.
    ///
    /// # Panics
    ///
    /// If there are fewer than `at` bytes.
    ///
    /// ```
    /// # ringsock::run(|| {
    /// # let (left, right) = ringsock::socketpair()?;
    /// left.sendall(b"headbody")?;
    /// let mut rest = right.recv(1024)?;
    /// let head = rest.split_to(4);
    /// assert_eq!((head, rest), (b"head".into(), b"body".into()));
    /// # Ok::<(), ringsock::Error>(()) })?;
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn split_to(&mut self, at: usize) -> Buf {
        match &mut self.0 {
            Memory::Lease(lease) => Buf(Memory::Lease(lease.split_to(at))),
            Memory::Pool(part) => Buf(Memory::Pool(part.split_to(at))),
            Memory::Heap { .. } => {
                let head = Buf::from(&self[..at]);
                self.advance(at);
                head
            }
        }
    }

    /// Whether it is a lease of a receive buffer rather than memory of its own.
    ///
    /// ```
    /// # ringsock::run(|| {
    /// # let (left, right) = ringsock::socketpair()?;
    /// left.sendall(b"hello")?;
    /// let received = right.recv(1024)?;
    /// assert!(received.is_lease());
    /// assert!(!received.clone().is_lease());
    /// # Ok::<(), ringsock::Error>(()) })?;
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn is_lease(&self) -> bool {
        matches!(self.0, Memory::Lease(_))
    }

    /// A part without bytes, which keeps the buffer from going home; `None` for heap memory, which is nobody's to keep.
    pub(crate) fn hold(&mut self) -> Option<Buf> {
        match &self.0 {
            Memory::Heap { .. } => None,
            Memory::Lease(_) | Memory::Pool(_) => Some(self.split_to(0)),
        }
    }

    /// What it is a part of, if that is a [`BufferPool`](crate::BufferPool)'s.
    pub(crate) fn class(&self) -> Option<&Arc<Class>> {
        match &self.0 {
            Memory::Pool(part) => Some(part.class()),
            Memory::Heap { .. } | Memory::Lease(_) => None,
        }
    }
}

/// Without a copy: the buffer goes back to its pool with the last part of the `Buf`.
impl From<PoolBuf> for Buf {
    fn from(buf: PoolBuf) -> Buf {
        Buf(Memory::Pool(buf))
    }
}

/// A copy on the heap.
impl Clone for Buf {
    fn clone(&self) -> Buf {
        Buf::from(&**self)
    }
}

impl Deref for Buf {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        match &self.0 {
            Memory::Heap { bytes, start } => &bytes[*start..],
            Memory::Lease(lease) => lease,
            Memory::Pool(part) => part,
        }
    }
}

/// The bytes are its own, also where it shares a buffer with other parts.
impl DerefMut for Buf {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Heap { bytes, start } => &mut bytes[*start..],
            Memory::Lease(lease) => lease,
            Memory::Pool(part) => part,
        }
    }
}

impl AsRef<[u8]> for Buf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for Buf {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

/// Without a copy, unless it is a lease or a pool's buffer.
impl From<Buf> for Vec<u8> {
    fn from(buf: Buf) -> Vec<u8> {
        match buf.0 {
            Memory::Heap { mut bytes, start } => {
                bytes.drain(..start);
                bytes
            }
            Memory::Lease(lease) => lease.to_vec(),
            Memory::Pool(part) => part.to_vec(),
        }
    }
}

impl From<Vec<u8>> for Buf {
    fn from(bytes: Vec<u8>) -> Buf {
        Buf::from_vec(bytes)
    }
}

/// A copy.
impl From<&[u8]> for Buf {
    fn from(bytes: &[u8]) -> Buf {
        Buf::from_vec(bytes.to_vec())
    }
}

/// A copy.
impl<const N: usize> From<&[u8; N]> for Buf {
    fn from(bytes: &[u8; N]) -> Buf {
        Buf::from_vec(bytes.to_vec())
    }
}

/// Without a copy: a lease stays one until the last `Bytes` of it is dropped.
#[cfg(feature = "bytes")]
impl From<Buf> for bytes::Bytes {
    fn from(buf: Buf) -> bytes::Bytes {
        match buf.0 {
            Memory::Heap { .. } => Vec::from(buf).into(),
            Memory::Lease(_) | Memory::Pool(_) => bytes::Bytes::from_owner(buf),
        }
    }
}

impl<T: AsRef<[u8]> + ?Sized> PartialEq<T> for Buf {
    fn eq(&self, other: &T) -> bool {
        **self == *other.as_ref()
    }
}

/// As a byte string: `b"GET /\r\n"`.
impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b\"{}\"", self.escape_ascii())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lease::Pool;

    #[derive(Clone, Copy, PartialEq, Debug)]
    enum Kind {
        Heap,
        Lease,
        Pool,
    }

    fn buf(bytes: &[u8], kind: Kind) -> Buf {
        let mut buf = match kind {
            Kind::Heap => return Buf::from(bytes),
            Kind::Lease => Buf::from_lease(Pool::new(1, 64).take().unwrap()),
            Kind::Pool => {
                let pool = pool::BufferPool::builder().buffers(1, 64).build().unwrap();
                pool.take(64).unwrap().into()
            }
        };
        buf[..bytes.len()].copy_from_slice(bytes);
        buf.truncate(bytes.len());
        buf
    }

    #[test]
    fn leases_pool_buffers_and_heap_memory_behave_alike() {
        for kind in [Kind::Heap, Kind::Lease, Kind::Pool] {
            let mut rest = buf(b"one two three", kind);
            assert_eq!(rest.is_lease(), kind == Kind::Lease);
            let mut one = rest.split_to(3);
            rest.advance(1);
            let two = rest.split_to(3);
            one.make_ascii_uppercase();
            rest.truncate(100);
            assert_eq!(
                (&*one, &*two, &*rest),
                (&b"ONE"[..], &b"two"[..], &b" three"[..])
            );
            rest.truncate(3);
            rest.advance(1);
            assert_eq!(format!("{rest:?}"), "b\"th\"");
            assert_eq!(rest.clone(), rest);
            assert!(!rest.clone().is_lease());
            assert_eq!(Vec::from(rest), b"th");
            let mut empty = two;
            empty.advance(3);
            assert!(empty.is_empty() && empty.split_to(0).is_empty());
        }
    }

    #[test]
    #[should_panic(expected = "past the end")]
    fn a_lease_does_not_advance_beyond_its_end() {
        buf(b"abc", Kind::Lease).advance(4);
    }

    #[test]
    #[should_panic(expected = "past the end")]
    fn heap_memory_does_not_advance_beyond_its_end() {
        buf(b"abc", Kind::Heap).advance(4);
    }

    #[cfg(feature = "bytes")]
    #[test]
    fn bytes_share_the_lease() {
        let lease = buf(b"hello", Kind::Lease);
        let at = lease.as_ptr();
        let bytes = bytes::Bytes::from(lease);
        assert_eq!((bytes.as_ptr(), &bytes[..]), (at, &b"hello"[..]));
        assert_eq!(bytes.slice(1..3), &b"el"[..]);
    }
}
