//! What can go wrong, with Python's classes and the kernel's numbers.
//!
//! This file owns [`Error`], its texts and its conversions from and into [`std::io::Error`]. It
//! knows nothing of sockets or rings: who fails decides which variant it is.
//!
//! An error is a result of ordinary operation here (EAGAIN arrives per message), so it is two
//! machine words, and an errno without a text of its own allocates nothing. Texts are made only
//! when somebody prints them.

use std::borrow::Cow;
use std::ffi::CStr;
use std::fmt;
use std::io;
use std::ops::Deref;

/// The result of every fallible call of this crate.
///
/// # Source
///
/// Python's [exceptions](https://docs.python.org/3/library/socket.html#exceptions).
///
/// # Example
///
/// ```
/// fn first(bytes: &[u8]) -> ringsock::Result<u8> {
///     bytes.first().copied().ok_or(ringsock::Error::Value("no bytes".into()))
/// }
///
/// assert_eq!(first(b"x"), Ok(b'x'));
/// assert!(first(b"").is_err());
/// ```
pub type Result<T> = std::result::Result<T, Error>;

/// An error, as Python's `socket` module would raise it.
///
/// `Display` prints what Python's `str()` prints: `[Errno 111] Connection refused`, `timed out`.
/// Converts into [`std::io::Error`] and back without loss.
///
/// # Source
///
/// Python's [exceptions](https://docs.python.org/3/library/socket.html#exceptions) and
/// [PEP 3151](https://peps.python.org/pep-3151/);
/// [errno(3)](https://man7.org/linux/man-pages/man3/errno.3.html).
///
/// # Example
///
/// ```
/// use ringsock::Error;
///
/// let refused = Error::from_errno(111);
/// assert_eq!(refused.errno(), Some(111));
/// assert_eq!(refused.to_string(), "[Errno 111] Connection refused");
/// assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
///
/// assert_eq!(Error::Timeout.to_string(), "timed out");
/// assert_eq!(Error::Timeout.errno(), None);
/// ```
#[non_exhaustive]
#[derive(Clone, PartialEq, Eq)]
pub enum Error {
    /// The kernel refused: Python's `OSError(errno, …)`.
    Os {
        /// The positive number of [errno(3)](https://man7.org/linux/man-pages/man3/errno.3.html).
        errno: i32,
        /// The text; `None` means the system's own text for this number, and costs nothing.
        message: Option<Text>,
    },
    /// Python's `OSError` without an errno (`AF_UNIX path too long`).
    Message(Text),
    /// The socket's timeout passed: Python's `TimeoutError('timed out')`, which has no errno.
    Timeout,
    /// The runtime is ending: calls in flight are cancelled and new ones are refused.
    Shutdown,
    /// The fiber that made the call was cancelled through its `JoinHandle`.
    Cancelled,
    /// Python's `herror`, from the lookups by address.
    Herror {
        /// The `h_errno` of
        /// [gethostbyaddr(3)](https://man7.org/linux/man-pages/man3/gethostbyaddr.3.html).
        code: i32,
    },
    /// Python's `gaierror`: a name could not be resolved.
    Gaierror {
        /// One of the `EAI_*` constants.
        code: i32,
    },
    /// Python's `ValueError`: an argument has the right type and a wrong value.
    Value(Text),
    /// Python's `OverflowError`: a number is out of range.
    Overflow(Text),
    /// Python's `TypeError`: an argument has the wrong form, such as a path for `AF_INET`.
    Type(Text),
    /// Python's `ExceptionGroup`: one error per address that was tried, in that order.
    #[allow(
        clippy::box_collection,
        reason = "a boxed slice would need a word more than we have"
    )]
    Group(Box<Vec<Error>>),
}

// Results travel in registers, and an error must not make every Result<usize> bigger than need be.
const _: () = assert!(size_of::<Error>() <= 16);

impl Error {
    /// The error of a bare errno (positive), with the system's own text. Allocates nothing.
    ///
    /// # Source
    ///
    /// [errno(3)](https://man7.org/linux/man-pages/man3/errno.3.html).
    ///
    /// # Example
    ///
    /// ```
    /// const AGAIN: ringsock::Error = ringsock::Error::from_errno(11);
    /// assert!(AGAIN.is_would_block());
    /// ```
    #[must_use]
    pub const fn from_errno(errno: i32) -> Self {
        Self::Os {
            errno,
            message: None,
        }
    }

    /// The errno, where the kernel gave one. `None` for every variant but [`Error::Os`]: the codes
    /// of `Gaierror` and `Herror` are other numbers, and a socket timeout has none in Python.
    ///
    /// # Example
    ///
    /// ```
    /// use ringsock::{EAI_NONAME, Error};
    ///
    /// assert_eq!(Error::from_errno(32).errno(), Some(32));
    /// assert_eq!(Error::Gaierror { code: EAI_NONAME }.errno(), None);
    /// ```
    #[must_use]
    pub const fn errno(&self) -> Option<i32> {
        match self {
            Self::Os { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Whether Python would raise `TimeoutError`: the socket's timeout passed
    /// ([`Error::Timeout`]), or the kernel gave up with ETIMEDOUT (a peer that stopped answering).
    ///
    /// # Source
    ///
    /// Python's [`TimeoutError`](https://docs.python.org/3/library/exceptions.html#TimeoutError).
    ///
    /// # Example
    ///
    /// ```
    /// use ringsock::Error;
    ///
    /// assert!(Error::Timeout.is_timeout());
    /// assert!(Error::from_errno(110).is_timeout());
    /// ```
    #[must_use]
    pub const fn is_timeout(&self) -> bool {
        matches!(
            self,
            Self::Timeout
                | Self::Os {
                    errno: libc::ETIMEDOUT,
                    ..
                }
        )
    }

    /// Whether Python would raise `BlockingIOError`: EAGAIN (which is EWOULDBLOCK on Linux),
    /// EINPROGRESS or EALREADY. A non-blocking call could not finish now.
    ///
    /// # Source
    ///
    /// Python's
    /// [`BlockingIOError`](https://docs.python.org/3/library/exceptions.html#BlockingIOError).
    ///
    /// # Example
    ///
    /// ```
    /// assert!(ringsock::Error::from_errno(11).is_would_block());
    /// assert!(!ringsock::Error::from_errno(9).is_would_block());
    /// ```
    #[must_use]
    pub const fn is_would_block(&self) -> bool {
        // EWOULDBLOCK is the same number on every Linux target, so it needs no arm of its own.
        matches!(
            self.errno(),
            Some(libc::EAGAIN | libc::EINPROGRESS | libc::EALREADY)
        )
    }

    /// Whether the socket was already closed, or was closed during the call (EBADF).
    ///
    /// # Example
    ///
    /// ```
    /// assert!(ringsock::Error::from_errno(9).is_closed());
    /// ```
    #[must_use]
    pub const fn is_closed(&self) -> bool {
        matches!(self.errno(), Some(libc::EBADF))
    }

    /// The kind that the same error has as a [`std::io::Error`].
    ///
    /// # Example
    ///
    /// ```
    /// use std::io::ErrorKind;
    ///
    /// assert_eq!(ringsock::Error::Timeout.kind(), ErrorKind::TimedOut);
    /// assert_eq!(ringsock::Error::from_errno(32).kind(), ErrorKind::BrokenPipe);
    /// ```
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Os { errno, .. } => io::Error::from_raw_os_error(*errno).kind(),
            Self::Timeout => io::ErrorKind::TimedOut,
            Self::Value(_) | Self::Overflow(_) | Self::Type(_) => io::ErrorKind::InvalidInput,
            // Shutdown and Cancelled are not ErrorKind::Interrupted: std's loops (read_to_end,
            // write_all) retry that kind for ever.
            _ => io::ErrorKind::Other,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Os {
                errno,
                message: Some(message),
            } => write!(f, "[Errno {errno}] {message}"),
            Self::Os {
                errno,
                message: None,
            } => {
                write!(f, "[Errno {errno}] {}", system_text(*errno))
            }
            Self::Message(text) | Self::Value(text) | Self::Overflow(text) | Self::Type(text) => {
                f.write_str(text)
            }
            Self::Timeout => f.write_str("timed out"),
            Self::Shutdown => f.write_str("the runtime is shutting down"),
            Self::Cancelled => f.write_str("the fiber was cancelled"),
            Self::Herror { code } => write!(f, "[Errno {code}] {}", host_text(*code)),
            Self::Gaierror { code } => write!(f, "[Errno {code}] {}", resolver_text(*code)),
            Self::Group(errors) => {
                let plural = if errors.len() == 1 { "" } else { "s" };
                write!(f, "{} error{plural}", errors.len())?;
                let mut separator = ": ";
                for error in errors.iter() {
                    write!(f, "{separator}{error}")?;
                    separator = "; ";
                }
                Ok(())
            }
        }
    }
}

/// With the text also where it is the system's own, since this is what a `main` that returns the error prints.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text =
            |f: &mut fmt::Formatter<'_>, name, text| f.debug_tuple(name).field(text).finish();
        match self {
            Self::Os { errno, message } => {
                let mut fields = f.debug_struct("Os");
                fields.field("errno", errno);
                match message {
                    Some(message) => fields.field("message", message),
                    None => fields.field("message", &system_text(*errno)),
                };
                fields.finish()
            }
            Self::Message(message) => text(f, "Message", message),
            Self::Value(message) => text(f, "Value", message),
            Self::Overflow(message) => text(f, "Overflow", message),
            Self::Type(message) => text(f, "Type", message),
            Self::Timeout => f.write_str("Timeout"),
            Self::Shutdown => f.write_str("Shutdown"),
            Self::Cancelled => f.write_str("Cancelled"),
            Self::Herror { code } => f.debug_struct("Herror").field("code", code).finish(),
            Self::Gaierror { code } => f
                .debug_struct("Gaierror")
                .field("code", code)
                .field("message", &resolver_text(*code))
                .finish(),
            Self::Group(errors) => f.debug_tuple("Group").field(errors).finish(),
        }
    }
}

impl std::error::Error for Error {}

impl From<Error> for io::Error {
    /// A bare errno becomes that errno; everything else keeps the [`Error`] inside, where
    /// [`io::Error::get_ref`] and the conversion back find it.
    fn from(error: Error) -> Self {
        match error {
            Error::Os {
                errno,
                message: None,
            } => io::Error::from_raw_os_error(errno),
            error => io::Error::new(error.kind(), error),
        }
    }
}

impl From<io::Error> for Error {
    /// Takes the errno, or the [`Error`] inside; a `TimedOut` without either is
    /// [`Error::Timeout`], and what remains keeps its text only.
    fn from(error: io::Error) -> Self {
        if let Some(errno) = error.raw_os_error() {
            return Self::from_errno(errno);
        }
        match error.downcast::<Self>() {
            Ok(inner) => inner,
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Self::Timeout,
            Err(error) => Self::Message(Text::from(error.to_string())),
        }
    }
}

/// The text of an error, one pointer wide so that [`Error`] stays two words.
///
/// Made from a `&'static str` or a `String`; reads as a `str`.
///
/// # Example
///
/// ```
/// use ringsock::Text;
///
/// let text = Text::from("bad family");
/// assert!(text.starts_with("bad"));
/// assert_eq!(text.to_string(), "bad family");
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Text(Box<Cow<'static, str>>);

impl From<&'static str> for Text {
    fn from(text: &'static str) -> Self {
        Self(Box::new(Cow::Borrowed(text)))
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self(Box::new(Cow::Owned(text)))
    }
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self)
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

/// strerror(3) without its thread trouble: std asks strerror_r and appends the number, which
/// Python prints in front instead.
fn system_text(errno: i32) -> String {
    let mut text = io::Error::from_raw_os_error(errno).to_string();
    let suffix = format!(" (os error {errno})");
    if text.ends_with(&suffix) {
        text.truncate(text.len() - suffix.len());
    }
    text
}

/// The texts of glibc's hstrerror(3), which libc does not bind.
fn host_text(code: i32) -> &'static str {
    match code {
        i32::MIN..0 => "Resolver internal error",
        0 => "Resolver Error 0 (no error)",
        1 => "Unknown host",
        2 => "Host name lookup failure",
        3 => "Unknown server error",
        4 => "No address associated with name",
        _ => "Unknown resolver error",
    }
}

#[allow(unsafe_code)]
fn resolver_text(code: i32) -> Cow<'static, str> {
    // SAFETY: gai_strerror takes any number and answers with a NUL-terminated string constant of
    // the C library (translated or not), never freed and never written to. glibc and musl keep
    // that promise; null, which neither returns, is caught before it is read.
    let text = unsafe {
        let text = libc::gai_strerror(code);
        if text.is_null() {
            return Cow::Borrowed("Unknown error");
        }
        CStr::from_ptr(text)
    };
    text.to_string_lossy()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn display_is_pythons_str() {
        let cases = [
            (Error::from_errno(111), "[Errno 111] Connection refused"),
            (
                Error::Os {
                    errno: 98,
                    message: Some("Address already in use (while …)".into()),
                },
                "[Errno 98] Address already in use (while …)",
            ),
            (
                Error::Message("AF_UNIX path too long".into()),
                "AF_UNIX path too long",
            ),
            (Error::Timeout, "timed out"),
            (Error::Herror { code: 1 }, "[Errno 1] Unknown host"),
            (
                Error::Value(String::from("negative file descriptor").into()),
                "negative file descriptor",
            ),
            (
                Error::Group(Box::new(vec![Error::Timeout, Error::from_errno(111)])),
                "2 errors: timed out; [Errno 111] Connection refused",
            ),
            (Error::Group(Box::default()), "0 errors"),
        ];
        for (error, expected) in cases {
            assert_eq!(error.to_string(), expected);
        }
        let unknown = Error::from_errno(9999).to_string();
        assert!(
            unknown.starts_with("[Errno 9999] ") && !unknown.contains("os error"),
            "{unknown}"
        );
        if cfg!(target_env = "gnu") {
            assert_eq!(
                Error::Gaierror { code: -2 }.to_string(),
                "[Errno -2] Name or service not known"
            );
        }
        assert!(
            Error::Gaierror { code: 12345 }
                .to_string()
                .starts_with("[Errno 12345] ")
        );
    }

    #[test]
    fn debug_says_what_happened() {
        assert_eq!(
            format!("{:?}", Error::from_errno(libc::EMFILE)),
            "Os { errno: 24, message: \"Too many open files\" }"
        );
        assert_eq!(format!("{:?}", Error::Value("v".into())), "Value(\"v\")");
    }

    #[test]
    fn classes_follow_python() {
        assert!(Error::Timeout.is_timeout());
        assert!(Error::from_errno(libc::ETIMEDOUT).is_timeout());
        assert!(!Error::from_errno(libc::EAGAIN).is_timeout());
        for errno in [
            libc::EAGAIN,
            libc::EWOULDBLOCK,
            libc::EINPROGRESS,
            libc::EALREADY,
        ] {
            assert!(Error::from_errno(errno).is_would_block());
        }
        assert!(!Error::Timeout.is_would_block());
        assert!(Error::from_errno(libc::EBADF).is_closed());
        for error in [
            Error::Timeout,
            Error::Shutdown,
            Error::Cancelled,
            Error::Gaierror { code: -2 },
            Error::Herror { code: 1 },
        ] {
            assert_eq!(error.errno(), None, "{error}");
            assert!(!error.is_closed());
        }
    }

    #[test]
    fn every_error_survives_io_error() {
        let errors = [
            Error::from_errno(libc::EAGAIN),
            Error::Os {
                errno: libc::EADDRINUSE,
                message: Some("taken".into()),
            },
            Error::Message("bad family".into()),
            Error::Timeout,
            Error::Shutdown,
            Error::Cancelled,
            Error::Herror { code: 2 },
            Error::Gaierror { code: -5 },
            Error::Value("v".into()),
            Error::Overflow("o".into()),
            Error::Type("t".into()),
            Error::Group(Box::new(vec![Error::Timeout])),
        ];
        for error in errors {
            let io = io::Error::from(error.clone());
            assert_eq!(io.kind(), error.kind(), "{error}");
            assert_eq!(Error::from(io), error);
        }
    }

    #[test]
    fn io_errors_keep_what_they_know() {
        let plain = io::Error::from(Error::from_errno(libc::ECONNREFUSED));
        assert_eq!(plain.raw_os_error(), Some(libc::ECONNREFUSED));
        assert_eq!(plain.kind(), io::ErrorKind::ConnectionRefused);

        let timeout = io::Error::from(Error::Timeout);
        assert_eq!(timeout.kind(), io::ErrorKind::TimedOut);
        assert_eq!(timeout.get_ref().unwrap().to_string(), "timed out");

        assert_eq!(
            Error::from(io::Error::from(io::ErrorKind::TimedOut)),
            Error::Timeout
        );
        let other = io::Error::new(io::ErrorKind::UnexpectedEof, "cut");
        assert_eq!(Error::from(other), Error::Message("cut".into()));
        assert!(Error::Timeout.source().is_none());
    }

    #[test]
    fn errors_are_two_words_and_cross_threads() {
        fn crosses<T: Send + Sync + 'static>() {}
        crosses::<Error>();
        assert_eq!(size_of::<Text>(), size_of::<usize>());
        assert!(size_of::<Result<usize>>() <= 24);
    }
}
