//! What this kernel offers the ring, found by asking it: never from a version number.
//!
//! A [`Features`] is made with each ring. `doctor` prints one, and an error that keeps a ring from starting becomes one sentence
//! that says what to change. It knows the kernel's answers, not how a ring is set up (`driver/uring.rs`).

use std::fmt;

use crate::error::{Error, Text};
use crate::sys;

/// One thing the kernel may offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// The kernel's name for it.
    pub name: &'static str,
    /// Whether this ring uses it.
    pub on: bool,
    /// What it is for or, where it is off, why it is off.
    pub why: String,
    /// What would turn it on; empty where it is on.
    pub remedy: String,
}

/// What one ring found at its setup: the table `doctor` prints.
///
/// ```
/// let features = ringsock::Features::probe()?;
/// assert!(features.iter().any(|feature| feature.name == "RECV" && feature.on));
/// # Ok::<(), ringsock::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Features {
    rows: Vec<Feature>,
    /// Entries of the submission and the completion queue.
    pub(crate) entries: (u32, u32),
}

impl Features {
    /// Sets up a small ring, asks what it can do, and closes it again.
    ///
    /// # Errors
    ///
    /// Where no ring can be set up, the error's text is one sentence that names the cause and the remedy: `EPERM` (disabled by
    /// sysctl or by a seccomp filter), `ENOSYS` (no io_uring), `ENOMEM` (locked-memory limit), or a kernel older than 6.1.
    ///
    /// # Source
    ///
    /// `io_uring_setup(2)`, `io_uring_register(2)` (`IORING_REGISTER_PROBE`).
    pub fn probe() -> crate::Result<Features> {
        super::Driver::uring(super::Config::thread()).map(|driver| driver.features().clone())
    }

    /// The features, in the order in which they were asked for.
    pub fn iter(&self) -> impl Iterator<Item = &Feature> {
        self.rows.iter()
    }

    #[cfg(test)]
    pub(crate) fn is_on(&self, name: &str) -> bool {
        self.rows.iter().any(|row| row.name == name && row.on)
    }

    pub(crate) fn on(&mut self, name: &'static str, what: &str) {
        self.rows.push(Feature {
            name,
            on: true,
            why: what.to_owned(),
            remedy: String::new(),
        });
    }

    pub(crate) fn off(&mut self, name: &'static str, why: String, remedy: &str) {
        self.rows.push(Feature {
            name,
            on: false,
            why,
            remedy: remedy.to_owned(),
        });
    }
}

/// One line a feature: name, on or off, the reason and the remedy.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in &self.rows {
            let state = if row.on { "on" } else { "off" };
            write!(f, "{:<18} {:<4} {}", row.name, state, row.why)?;
            if !row.remedy.is_empty() {
                write!(f, "; {}", row.remedy)?;
            }
            writeln!(f)?;
        }
        write!(
            f,
            "{:<18} {:<4} submission queue {} entries, completion queue {} entries",
            "rings", "on", self.entries.0, self.entries.1
        )
    }
}

/// Why io_uring_setup(2) failed with `errno`, as one sentence with the remedy.
pub(crate) fn setup_error(errno: i32) -> Error {
    let text = match errno {
        libc::EPERM => match sysctl_io_uring_disabled() {
            Some(2) => "io_uring is switched off on this machine (kernel.io_uring_disabled = 2): \
                        run `sysctl -w kernel.io_uring_disabled=0` as root"
                .to_owned(),
            Some(1) => "io_uring is kept from this user (kernel.io_uring_disabled = 1): \
                        run `sysctl -w kernel.io_uring_disabled=0` as root, or add the user to the group in \
                        kernel.io_uring_group"
                .to_owned(),
            _ => "io_uring_setup is forbidden to this process, most likely by a seccomp filter such as Docker's \
                  default profile: allow io_uring_setup, io_uring_enter and io_uring_register there, for example \
                  with `docker run --security-opt seccomp=PROFILE.json`"
                .to_owned(),
        },
        libc::ENOSYS => "this kernel has no io_uring, or a seccomp filter hides it: ringsock needs Linux 6.1 or newer \
                         with CONFIG_IO_URING, and a filter that allows io_uring_setup, io_uring_enter and \
                         io_uring_register"
            .to_owned(),
        libc::ENOMEM => {
            let limit = sys::rlimit(libc::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft / 1024);
            format!(
                "not enough memory for even the smallest ring, which counts against the locked-memory limit \
                 (RLIMIT_MEMLOCK, {limit} KiB now): raise it to 8 MiB or more with `ulimit -l 8192`, LimitMEMLOCK= in the \
                 systemd unit, or `docker run --ulimit memlock=8388608`"
            )
        }
        libc::EMFILE | libc::ENFILE => {
            let limit = sys::rlimit(libc::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
            format!(
                "no free file descriptor for a ring (RLIMIT_NOFILE, {limit} now): close some, or raise the limit with \
                 `ulimit -n`"
            )
        }
        _ => "io_uring_setup failed: ringsock needs Linux 6.1 or newer".to_owned(),
    };
    Error::Os {
        errno,
        message: Some(Text::from(text)),
    }
}

/// The error for a kernel that has io_uring but is too old.
pub(crate) fn too_old(missing: &str) -> Error {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Error::Os {
        errno: libc::ENOSYS,
        message: Some(Text::from(format!(
            "this kernel ({}) lacks {missing}: ringsock needs Linux 6.1 or newer",
            release.trim()
        ))),
    }
}

fn sysctl_io_uring_disabled() -> Option<i32> {
    std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
        .ok()?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setup_failure_says_what_to_change() {
        for (errno, word) in [
            (libc::EPERM, "seccomp"),
            (libc::ENOSYS, "6.1"),
            (libc::ENOMEM, "ulimit -l"),
            (libc::EMFILE, "ulimit -n"),
            (libc::EINVAL, "6.1"),
        ] {
            let error = setup_error(errno);
            assert_eq!(error.errno(), Some(errno));
            assert!(error.to_string().contains(word), "{error}");
            assert!(!error.to_string().contains('\n'), "one sentence: {error}");
        }
    }
}
