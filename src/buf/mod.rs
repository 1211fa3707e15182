//! Received bytes.

use std::fmt;
use std::ops::Deref;

/// The bytes one `recv` brought. It reads like a `[u8]`, may be sent to another thread, and converts into a `Vec<u8>`.
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
#[derive(Clone, Default)]
pub struct Buf(Vec<u8>);

impl Buf {
    /// Wraps bytes that were received.
    pub(crate) fn from_vec(bytes: Vec<u8>) -> Buf {
        Buf(bytes)
    }
}

impl Deref for Buf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for Buf {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl From<Buf> for Vec<u8> {
    fn from(buf: Buf) -> Vec<u8> {
        buf.0
    }
}

impl<T: AsRef<[u8]> + ?Sized> PartialEq<T> for Buf {
    fn eq(&self, other: &T) -> bool {
        self.0 == other.as_ref()
    }
}

/// As a byte string: `b"GET /\r\n"`.
impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b\"{}\"", self.0.escape_ascii())
    }
}
