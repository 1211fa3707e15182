//! Where a program under test runs: a directory, a network, limits of its own.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use super::Process;

/// A new directory, removed when dropped.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> TempDir {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        loop {
            let name = format!(
                "ringsock-{}-{}",
                std::process::id(),
                NEXT.fetch_add(1, Ordering::Relaxed)
            );
            let path = std::env::temp_dir().join(name);
            match fs::create_dir(&path) {
                Ok(()) => return TempDir(path),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => panic!("{}: {error}", path.display()),
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Starts the command with these limits of open descriptors, as far as they are below the present ones.
pub fn limit_descriptors(command: &mut Command, soft: u64, hard: u64) {
    let set = move || {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: getrlimit writes and setrlimit reads one `struct rlimit` that lives through both calls.
        let done = unsafe {
            libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && {
                limit.rlim_max = hard.min(limit.rlim_max);
                limit.rlim_cur = soft.min(limit.rlim_max);
                libc::setrlimit(libc::RLIMIT_NOFILE, &limit) == 0
            }
        };
        if done {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    // SAFETY: the closure makes two async-signal-safe system calls and allocates nothing.
    unsafe { command.pre_exec(set) };
}

/// Limits a resource of this process, for good.
pub fn set_limit(resource: libc::__rlimit_resource_t, value: u64) -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: value,
        rlim_max: value,
    };
    // SAFETY: one `struct rlimit` that lives through the call.
    match unsafe { libc::setrlimit(resource, &limit) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes root a user that nobody else is: what the kernel counts for each user starts at 0, and limits hold.
pub fn drop_privileges() -> io::Result<()> {
    // SAFETY: no memory is passed; an empty list of groups needs none.
    let done = unsafe {
        libc::geteuid() != 0 || {
            let id = 700_000 + libc::getpid() as libc::uid_t;
            libc::setgroups(0, std::ptr::null()) == 0
                && libc::setresgid(id, id, id) == 0
                && libc::setresuid(id, id, id) == 0
        }
    };
    if done {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Starts the command as an ordinary user with this limit of locked memory.
pub fn limit_locked_memory(command: &mut Command, bytes: u64) {
    let set = move || set_limit(libc::RLIMIT_MEMLOCK, bytes).and_then(|()| drop_privileges());
    // SAFETY: the closure makes async-signal-safe system calls and allocates nothing.
    unsafe { command.pre_exec(set) };
}

/// Starts the command under a seccomp filter that makes io_uring_setup fail with `errno`, as container profiles do.
pub fn forbid_io_uring(command: &mut Command, errno: i32) {
    forbid_call(command, libc::SYS_io_uring_setup, errno);
}

/// Starts the command under a seccomp filter that makes the system call of this number fail with `errno`.
pub fn forbid_call(command: &mut Command, number: libc::c_long, errno: i32) {
    let load_number = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let jump_if_equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let answer = libc::BPF_RET | libc::BPF_K;
    let instruction = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let mut filter = [
        instruction(load_number, 0, 0, 0),
        instruction(jump_if_equal, 0, 1, number as u32),
        instruction(answer, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        instruction(answer, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        let program = libc::sock_fprog {
            len: filter.len() as u16,
            filter: filter.as_mut_ptr(),
        };
        // SAFETY: the program and its four instructions live through the calls; the kernel copies them.
        let done = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::syscall(
                    libc::SYS_seccomp,
                    libc::SECCOMP_SET_MODE_FILTER,
                    0,
                    &raw const program,
                ) == 0
        };
        if done {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    // SAFETY: the closure makes two async-signal-safe system calls and allocates nothing.
    unsafe { command.pre_exec(install) };
}

/// A network of its own, with nothing but a loopback interface, for programs with a fixed port.
pub struct Network {
    holder: Process,
}

impl Network {
    /// `None`, with the reason said, where this user may make none.
    pub fn new() -> Option<Network> {
        let script = "ip link set lo up && echo up && exec sleep 600";
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--net", "sh", "-c", script]);
        let mut holder = match Process::start(&mut command, b"") {
            Ok(holder) => holder,
            Err(error) => {
                println!("skipped: no network of its own: unshare: {error}");
                return None;
            }
        };
        if holder.try_line().as_deref() != Some("up") {
            let stderr = holder.wait().stderr;
            println!("skipped: no network of its own: {}", stderr.trim());
            return None;
        }
        let network = Network { holder };
        match network.command("true").output() {
            Ok(output) if output.status.success() => Some(network),
            other => {
                println!("skipped: no network of its own: nsenter: {other:?}");
                None
            }
        }
    }

    /// A command that will run in it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--preserve-credentials", "--user", "--net", "--target"])
            .arg(self.holder.pid().to_string())
            .arg("--")
            .arg(program);
        command
    }

    /// The sockets of state `state` (as the kernel numbers them) on the local port `port`.
    pub fn sockets(&self, port: u16, state: u8) -> usize {
        let table = fs::read_to_string(format!("/proc/{}/net/tcp", self.holder.pid()));
        let (port, state) = (format!(":{port:04X}"), format!("{state:02X}"));
        table
            .expect("a running process")
            .lines()
            .filter(|line| {
                let mut fields = line.split_whitespace().skip(1);
                fields.next().is_some_and(|local| local.ends_with(&port))
                    && fields.nth(1) == Some(&state)
            })
            .count()
    }
}
