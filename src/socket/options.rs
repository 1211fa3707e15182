//! Socket options: getsockopt and setsockopt.

use super::Socket;
use crate::error::{Error, Result};
use crate::sys;

/// The longest option value `getsockopt_buf` reads, as in Python.
const OPTION_BYTES_MAX: usize = 1024;

/// The value of an option: an integer, bytes (a C struct), or no value but a length.
///
/// ```
/// use ringsock::OptionValue;
/// let values: [OptionValue; 3] = [1.into(), true.into(), (&[0u8, 1][..]).into()];
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionValue<'a> {
    /// A C `int`.
    Int(i32),
    /// The bytes of a C struct.
    Bytes(&'a [u8]),
    /// A null pointer and this length (Python's `setsockopt(level, optname, None, optlen)`).
    Null(u32),
}

impl From<i32> for OptionValue<'_> {
    fn from(value: i32) -> Self {
        OptionValue::Int(value)
    }
}

impl From<bool> for OptionValue<'_> {
    fn from(value: bool) -> Self {
        OptionValue::Int(value.into())
    }
}

impl<'a> From<&'a [u8]> for OptionValue<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        OptionValue::Bytes(bytes)
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for OptionValue<'a> {
    fn from(bytes: &'a [u8; N]) -> Self {
        OptionValue::Bytes(bytes)
    }
}

impl Socket {
    /// Sets an option: an integer, or the bytes of a C struct.
    ///
    /// # Errors
    ///
    /// `ENOPROTOOPT`: no such option at this level. `EINVAL`: not such a value. `EPERM`, `EACCES`: needs a privilege.
    ///
    /// # Source
    ///
    /// Python `socket.setsockopt(level, optname, value)`; `setsockopt(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)?;
    /// assert_ne!(socket.getsockopt(SOL_SOCKET, SO_REUSEADDR)?, 0);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn setsockopt<'a>(
        &self,
        level: i32,
        optname: i32,
        value: impl Into<OptionValue<'a>>,
    ) -> Result<()> {
        let fd = self.0.fd;
        sys::check(match value.into() {
            OptionValue::Int(value) => sys::setsockopt(fd, level, optname, &value.to_ne_bytes()),
            OptionValue::Bytes(bytes) => sys::setsockopt(fd, level, optname, bytes),
            OptionValue::Null(len) => sys::setsockopt_null(fd, level, optname, len),
        })
        .map(drop)
    }

    /// The integer value of an option.
    ///
    /// # Errors
    ///
    /// `ENOPROTOOPT`: no such option at this level.
    ///
    /// # Source
    ///
    /// Python `socket.getsockopt(level, optname)`; `getsockopt(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// assert_eq!(socket.getsockopt(SOL_SOCKET, SO_TYPE)?, SOCK_STREAM.bits());
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn getsockopt(&self, level: i32, optname: i32) -> Result<i32> {
        let mut value = [0; 4];
        sys::check(sys::getsockopt(self.0.fd, level, optname, &mut value))?;
        Ok(i32::from_ne_bytes(value))
    }

    /// The value of an option as bytes, at most `buflen` (1 to 1024) of them.
    ///
    /// # Errors
    ///
    /// `Message`: `buflen` out of range. `ENOPROTOOPT`: no such option at this level.
    ///
    /// # Source
    ///
    /// Python `socket.getsockopt(level, optname, buflen)`; `getsockopt(2)`.
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let socket = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// assert_eq!(socket.getsockopt_buf(SOL_SOCKET, SO_LINGER, 64)?, [0; 8]);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn getsockopt_buf(&self, level: i32, optname: i32, buflen: usize) -> Result<Vec<u8>> {
        if !(1..=OPTION_BYTES_MAX).contains(&buflen) {
            return Err(Error::Message("getsockopt buflen out of range".into()));
        }
        let mut value = vec![0; buflen];
        let len = sys::check(sys::getsockopt(self.0.fd, level, optname, &mut value))?;
        value.truncate(len as usize);
        Ok(value)
    }
}
