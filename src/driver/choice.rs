//! Which backend drives: chosen when a driver is made, by what was asked for and by what the kernel grants.
//!
//! ```text
//!  RuntimeBuilder::driver, else RINGSOCK_DRIVER:
//!    uring ──▶ a ring, or the error that says what to change
//!    epoll ──▶ epoll
//!    neither ──▶ a ring; where it is forbidden, or the kernel too old: epoll, and one line in the log says so
//!                (no memory, no descriptor: an error all the same, for epoll would only hide what is to be changed)
//! ```

use std::fmt;
use std::sync::OnceLock;

use super::features::Features;
use super::{Config, Driver};
use crate::error::{Error, Result};
use crate::log::log;

/// The variable by which the environment chooses.
const VARIABLE: &str = "RINGSOCK_DRIVER";

/// What carries out the operations of a runtime, or of a plain thread.
///
/// Both do the same; the ring does more with one system call. Where io_uring is forbidden to the process, or the kernel is older
/// than 6.1, epoll is used, and one line in the log says so. [`RuntimeBuilder::driver`](crate::RuntimeBuilder::driver) asks for
/// one of them, and so does the environment variable `RINGSOCK_DRIVER`, with `uring` or `epoll`, for the runtimes that do not and
/// for plain threads.
///
/// ```
/// use ringsock::{DriverKind, Runtime};
///
/// let runtime = Runtime::builder().driver(DriverKind::Epoll).build()?;
/// assert_eq!(runtime.driver(), DriverKind::Epoll);
/// assert_eq!(runtime.driver().to_string(), "epoll");
/// # Ok::<(), ringsock::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DriverKind {
    /// io_uring (Linux 6.1).
    #[default]
    Uring,
    /// Readiness by epoll, and calls that do not wait.
    Epoll,
}

impl DriverKind {
    /// The kernel's name for it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            DriverKind::Uring => "io_uring",
            DriverKind::Epoll => "epoll",
        }
    }
}

/// The kernel's name: `io_uring` or `epoll`.
impl fmt::Display for DriverKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The environment's choice, read once.
fn environment() -> Result<Option<DriverKind>> {
    static CHOICE: OnceLock<std::result::Result<Option<DriverKind>, String>> = OnceLock::new();
    let choice = CHOICE.get_or_init(|| match std::env::var_os(VARIABLE) {
        None => Ok(None),
        Some(value) => parse(&value.to_string_lossy()),
    });
    choice
        .clone()
        .map_err(|message| Error::Value(message.into()))
}

fn parse(value: &str) -> std::result::Result<Option<DriverKind>, String> {
    match value {
        "" => Ok(None),
        "uring" => Ok(Some(DriverKind::Uring)),
        "epoll" => Ok(Some(DriverKind::Epoll)),
        other => Err(format!(
            "{VARIABLE} is {other:?}: it may be \"uring\" or \"epoll\", or not set"
        )),
    }
}

impl Driver {
    /// A driver of the kind that was `wanted`, or that the environment wants, or that can be had.
    ///
    /// # Errors
    ///
    /// `Value`: the environment wants what there is not. Else those of the setup.
    pub(crate) fn new(config: Config, wanted: Option<DriverKind>) -> Result<Driver> {
        let wanted = match wanted {
            None => environment()?,
            wanted => wanted,
        };
        match wanted {
            Some(DriverKind::Uring) => Driver::uring(config),
            Some(DriverKind::Epoll) => {
                let mut features = Features::default();
                let why = "epoll was asked for".to_owned();
                features.off(
                    DriverKind::Uring.name(),
                    why,
                    "ask for \"uring\", or for nothing",
                );
                Driver::epoll(config, features)
            }
            None => Driver::uring(config).or_else(|error| fall_back(config, error)),
        }
    }
}

/// A driver on epoll, where the ring was refused for good; else the `error` again.
#[cold]
fn fall_back(config: Config, error: Error) -> Result<Driver> {
    if matches!(
        error.errno(),
        None | Some(libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::EAGAIN)
    ) {
        return Err(error);
    }
    static REPORTED: OnceLock<()> = OnceLock::new();
    REPORTED.get_or_init(|| log(format_args!("running on epoll, not on io_uring: {error}")));
    let mut features = Features::default();
    features.off(DriverKind::Uring.name(), error.to_string(), "");
    Driver::epoll(config, features)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_may_say_one_of_two_words() {
        assert_eq!(parse("uring"), Ok(Some(DriverKind::Uring)));
        assert_eq!(parse("epoll"), Ok(Some(DriverKind::Epoll)));
        assert_eq!(parse(""), Ok(None));
        let error = parse("select").unwrap_err();
        assert!(
            error.contains("select") && error.contains("uring"),
            "{error}"
        );
    }

    #[test]
    fn what_only_more_memory_or_descriptors_can_help_is_no_reason_for_epoll() {
        let kind = |errno| {
            let refused = crate::driver::features::setup_error(errno);
            fall_back(Config::thread(), refused).map(|driver| driver.kind())
        };
        for errno in [libc::EPERM, libc::ENOSYS, libc::EINVAL] {
            assert_eq!(kind(errno), Ok(DriverKind::Epoll));
        }
        for errno in [libc::ENOMEM, libc::EMFILE, libc::ENFILE] {
            assert_eq!(kind(errno).unwrap_err().errno(), Some(errno));
        }
    }
}
