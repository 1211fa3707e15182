//! What this kernel offers the ring, found by asking it: never from a version number.
//!
//! A [`Features`] is made with each ring. `doctor` prints one, and an error that keeps a ring from starting becomes one sentence
//! that says what to change. It knows the kernel's answers, not how a ring is set up (`driver/uring.rs`).

use std::fmt;

use super::{Config, DriverKind};
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

/// What one driver found at its setup: the table `doctor` prints.
///
/// ```
/// let features = ringsock::Features::probe()?;
/// assert!(features.iter().any(|feature| feature.on));
/// # Ok::<(), ringsock::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Features {
    rows: Vec<Feature>,
    driver: DriverKind,
    /// Entries of the submission and the completion queue.
    pub(crate) entries: (u32, u32),
}

impl Features {
    /// Sets up a small driver as a runtime would, asks what it can do, and closes it again.
    ///
    /// Where io_uring cannot be had, because it is forbidden (by sysctl or by a seccomp filter) or the kernel is older than 6.1, it is
    /// epoll's ([`driver`](Features::driver)), and the row `io_uring` says why in one sentence that names the cause and the remedy.
    ///
    /// # Errors
    ///
    /// `ENOMEM` (locked-memory limit), `EMFILE`, `ENFILE` (no descriptor): again one sentence. Where the environment variable
    /// `RINGSOCK_DRIVER` asks for `uring`, also `EPERM` and `ENOSYS`. `Value`: it asks for what there is not.
    ///
    /// # Source
    ///
    /// `io_uring_setup(2)`, `io_uring_register(2)` (`IORING_REGISTER_PROBE`).
    ///
    /// ```
    /// let features = ringsock::Features::probe()?;
    /// println!("{features}");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn probe() -> crate::Result<Features> {
        let mut features = super::Driver::new(Config::thread(), None)?
            .features()
            .clone();
        if features.driver == DriverKind::Uring {
            features.add_locked_memory(locked_memory_limit());
        }
        Ok(features)
    }

    /// Whether this machine's workers get rings of full size, as far as the locked-memory limit goes.
    fn add_locked_memory(&mut self, limit_bytes: Option<u64>) {
        const NAME: &str = "full-size rings";
        let Some(limit_bytes) = limit_bytes else {
            return self.on(NAME, "no limit of locked memory holds for this process");
        };
        let worker_bytes = ring_bytes(Config::worker());
        let smallest_bytes = ring_bytes(Config::smallest());
        let what = format!(
            "the locked-memory limit of {} KiB, which all rings of a user share, holds the {}-KiB rings of {} workers",
            limit_bytes / 1024,
            worker_bytes / 1024,
            limit_bytes / worker_bytes,
        );
        let workers = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
        if limit_bytes / worker_bytes >= workers {
            self.on(NAME, &what);
        } else {
            self.off(
                NAME,
                format!(
                    "{what}; where there are more, all get smaller ones, of {} KiB at least",
                    smallest_bytes / 1024
                ),
                "raise RLIMIT_MEMLOCK (`ulimit -l 8192`)",
            );
        }
    }

    /// Which driver this is.
    ///
    /// ```
    /// let features = ringsock::Features::probe()?;
    /// println!("running on {}", features.driver());
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn driver(&self) -> DriverKind {
        self.driver
    }

    pub(super) fn set_driver(&mut self, driver: DriverKind) {
        self.driver = driver;
    }

    /// The features, in the order in which they were asked for.
    ///
    /// ```
    /// let features = ringsock::Features::probe()?;
    /// assert!(features.iter().any(|feature| feature.on));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
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
        for (index, row) in self.rows.iter().enumerate() {
            let state = if row.on { "on" } else { "off" };
            let end = if index > 0 { "\n" } else { "" };
            write!(f, "{end}{:<18} {:<4} {}", row.name, state, row.why)?;
            if !row.remedy.is_empty() {
                write!(f, "; {}", row.remedy)?;
            }
        }
        if self.driver == DriverKind::Epoll {
            return Ok(());
        }
        write!(
            f,
            "\n{:<18} {:<4} submission queue {} entries, completion queue {} entries",
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
            // Whoever has this capability may all the same.
            Some(1) if !has_capability(CAP_SYS_ADMIN) => "io_uring is kept from this user (kernel.io_uring_disabled = 1): \
                        run `sysctl -w kernel.io_uring_disabled=0` as root, or set kernel.io_uring_group to a group that the \
                        user is in"
                .to_owned(),
            _ => "io_uring_setup is forbidden to this process, most likely by a seccomp filter such as Docker's \
                  default profile: allow io_uring_setup, io_uring_enter and io_uring_register there, for example \
                  with `docker run --security-opt seccomp=PROFILE.json`"
                .to_owned(),
        },
        libc::EACCES => "io_uring_setup is forbidden to this process by a security module (SELinux, AppArmor) or a \
                         seccomp filter: allow io_uring there"
            .to_owned(),
        libc::ENOSYS => "this kernel has no io_uring, or a seccomp filter hides it: ringsock needs Linux 6.1 or newer \
                         with CONFIG_IO_URING, and a filter that allows io_uring_setup, io_uring_enter and \
                         io_uring_register"
            .to_owned(),
        libc::ENOMEM => no_memory(locked_memory_limit()),
        libc::EMFILE | libc::ENFILE => {
            let limit = sys::rlimit(sys::Resource::OpenFiles).map_or(0, |(soft, _)| soft);
            format!(
                "no free file descriptor for a ring (RLIMIT_NOFILE, {limit} now): close some, or raise the limit with \
                 `ulimit -n`"
            )
        }
        _ => format!(
            "io_uring_setup failed on Linux {}: ringsock needs 6.1 or newer, and a seccomp filter that does not answer for it",
            release()
        ),
    };
    Error::Os {
        errno,
        message: Some(Text::from(text)),
    }
}

/// Why `call` failed with `errno` on a ring that was set up, as one sentence with the remedy.
pub(crate) fn use_error(call: &str, errno: i32) -> Error {
    let message = matches!(errno, libc::EPERM | libc::EACCES | libc::ENOSYS).then(|| {
        Text::from(format!(
            "{call} is forbidden to this process though io_uring_setup is not, most likely by a seccomp filter: allow \
             io_uring_setup, io_uring_enter and io_uring_register there, or forbid all three"
        ))
    });
    Error::Os { errno, message }
}

fn no_memory(limit_bytes: Option<u64>) -> String {
    match limit_bytes {
        Some(bytes) => format!(
            "not enough memory for another ring: all rings of this user share the locked-memory limit (RLIMIT_MEMLOCK) of \
             {} KiB, and a worker's ring takes {} KiB, the smallest {} KiB: raise the limit to 8 MiB or more with \
             `ulimit -l 8192`, LimitMEMLOCK= in the systemd unit, or `docker run --ulimit memlock=8388608`, use fewer workers, or \
             choose epoll, which locks no memory (RINGSOCK_DRIVER=epoll). A ring that was just closed counts a moment longer",
            bytes / 1024,
            ring_bytes(Config::worker()) / 1024,
            ring_bytes(Config::smallest()) / 1024
        ),
        None => format!(
            "not enough memory for another ring, though the smallest takes only {} KiB and no locked-memory limit holds: \
             raise the limit of address space (`ulimit -v`) or of the control group's memory, or end other programs",
            ring_bytes(Config::smallest()) / 1024
        ),
    }
}

/// Bytes of locked memory that a ring takes: its two mappings, each in whole pages. Linux 6.18 counts them against the limit; 6.12
/// did not yet.
fn ring_bytes(config: Config) -> u64 {
    const SQE_BYTES: u64 = 64;
    const CQE_BYTES: u64 = 16;
    // The positions of both queues.
    const HEAD_BYTES: u64 = 64;
    let page = sys::page_size() as u64;
    let entries = u64::from(config.sq_entries);
    let cq_entries = entries * u64::from(config.cq_per_sq);
    (entries * SQE_BYTES).next_multiple_of(page)
        + (HEAD_BYTES + cq_entries * CQE_BYTES).next_multiple_of(page)
}

/// The ring that each of `rings` gets where the locked-memory limit does not hold so many of the size asked for. Without this the
/// first would take all and leave nothing for the last.
pub(crate) fn share_locked_memory(config: Config, rings: usize) -> Config {
    match locked_memory_limit() {
        Some(limit_bytes) => shrink(config, limit_bytes / rings as u64),
        None => config,
    }
}

fn shrink(mut config: Config, bytes_max: u64) -> Config {
    while ring_bytes(config) > bytes_max && config.sq_entries > Config::smallest().sq_entries {
        config.sq_entries /= 2;
    }
    config
}

/// RLIMIT_MEMLOCK in bytes; `None` where it does not hold for this process.
fn locked_memory_limit() -> Option<u64> {
    let (bytes, _) = sys::rlimit(sys::Resource::LockedMemory)?;
    (bytes != libc::RLIM_INFINITY && !has_capability(CAP_IPC_LOCK)).then_some(bytes)
}

// Of capabilities(7).
const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_ADMIN: u32 = 21;

/// Whether this process has a capability.
fn has_capability(number: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    effective.is_some_and(|bits| bits >> number & 1 == 1)
}

/// The error for a kernel that has io_uring but is too old.
pub(crate) fn too_old(missing: &str) -> Error {
    Error::Os {
        errno: libc::ENOSYS,
        message: Some(Text::from(format!(
            "this kernel ({}) lacks {missing}: ringsock needs Linux 6.1 or newer",
            release()
        ))),
    }
}

/// The kernel's release.
fn release() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
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
            (libc::ENOMEM, "memory"),
            (libc::EMFILE, "ulimit -n"),
            (libc::EACCES, "SELinux"),
            (libc::EINVAL, "6.1"),
        ] {
            let error = setup_error(errno);
            assert_eq!(error.errno(), Some(errno));
            assert!(error.to_string().contains(word), "{error}");
            assert!(!error.to_string().contains('\n'), "one sentence: {error}");
        }
    }

    #[test]
    fn out_of_memory_names_limit_need_and_remedy() {
        let text = no_memory(Some(64 << 10));
        for word in [
            "RLIMIT_MEMLOCK",
            "of 64 KiB",
            "takes 52 KiB",
            "8 KiB",
            "ulimit -l",
        ] {
            assert!(text.contains(word), "{word}: {text}");
        }
        // What no locked-memory limit caused, none cures.
        assert!(!no_memory(None).contains("ulimit -l"));
    }

    #[test]
    fn a_ring_takes_what_the_kernel_charges() {
        // The worker's: 16 KiB of submissions, 32 KiB of completions and the page with the positions.
        assert_eq!(ring_bytes(Config::worker()), 52 << 10);
        assert_eq!(ring_bytes(Config::thread()), 8 << 10);
        assert_eq!(ring_bytes(Config::smallest()), 8 << 10);
    }

    #[test]
    fn rings_share_a_limit_that_does_not_hold_all() {
        let entries = |bytes_max| shrink(Config::worker(), bytes_max).sq_entries;
        assert_eq!(entries(u64::MAX), 256);
        assert_eq!(entries(52 << 10), 256);
        assert_eq!(entries(51 << 10), 128);
        assert_eq!(entries(8 << 10), 16);
        assert_eq!(entries(0), 2);
    }

    #[test]
    fn the_table_says_how_many_rings_the_limit_holds() {
        for (limit_bytes, on) in [(None, true), (Some(u64::MAX / 2), true), (Some(0), false)] {
            let mut features = Features::default();
            features.add_locked_memory(limit_bytes);
            assert_eq!(features.is_on("full-size rings"), on, "{features}");
        }
    }
}
