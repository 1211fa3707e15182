//! Processes that end, and what they printed.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{
    Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Output, Stdio,
};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::turn;

/// No process that a test starts lives longer than this, so whatever waits for one ends.
const PROCESS_LIMIT: Duration = Duration::from_secs(180);

/// The example program `name`, as built beside this test.
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a running program has a path");
    let deps = test.parent().expect("the test lies in a directory");
    let path = deps.join("../examples").join(name);
    assert!(path.is_file(), "{} is not built", path.display());
    path
}

/// A process of a test. It is killed when dropped, and after [`PROCESS_LIMIT`].
pub struct Process {
    name: String,
    child: Child,
    stdout: BufReader<ChildStdout>,
    stderr: Arc<Mutex<Vec<u8>>>,
    stderr_reader: Option<thread::JoinHandle<()>>,
    watchdog: Option<thread::JoinHandle<bool>>,
}

/// How a process ended, and what it printed.
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl fmt::Debug for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = &self.stdout[..self.stdout.len().min(2000)];
        write!(f, "{}\n--- standard output ", self.status)?;
        writeln!(f, "({} bytes)", self.stdout.len())?;
        writeln!(f, "{}", String::from_utf8_lossy(shown))?;
        write!(f, "--- standard error\n{}", self.stderr)
    }
}

impl Process {
    /// Starts `command` with its output piped, and `input` as its standard input.
    pub fn start(command: &mut Command, input: &[u8]) -> io::Result<Process> {
        let (process, mut stdin) = Process::interactive(command)?;
        let input = input.to_vec();
        // A process that ends early does not read everything.
        thread::spawn(move || drop(stdin.write_all(&input)));
        Ok(process)
    }

    /// Starts `command` with its output piped: also its standard input, which ends when dropped.
    pub fn interactive(command: &mut Command) -> io::Result<(Process, ChildStdin)> {
        let name = format!("{command:?}").chars().take(300).collect();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take().expect("piped");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let from = child.stderr.take().expect("piped");
        let stderr = Arc::new(Mutex::new(Vec::new()));
        let watchdog = watch(&child).inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        let process = Process {
            name,
            child,
            stdout,
            stderr: stderr.clone(),
            stderr_reader: Some(thread::spawn(move || collect(from, &stderr))),
            watchdog: Some(watchdog),
        };
        Ok((process, stdin))
    }

    /// Starts an example.
    pub fn example<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> Process {
        Process::start(Command::new(example(name)).args(args), b"").expect("an example starts")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has used of the processors so far.
    pub fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid()));
        let stat = stat.expect("a running process");
        let after_name = stat.rsplit(')').next().expect("a name");
        // utime and stime are the fields 14 and 15; after the name comes the third.
        let ticks = after_name.split_whitespace().skip(11).take(2);
        let ticks: u64 = ticks.map(|field| field.parse::<u64>().unwrap()).sum();
        // SAFETY: no memory is passed.
        let each_s = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
        Duration::from_secs_f64(ticks as f64 / each_s)
    }

    /// VmRSS in KiB.
    pub fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("a running process");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.and_then(|kib| kib.parse().ok()).expect("a VmRSS")
    }

    /// How many descriptors it has open. A worker that maps its first stacks has one of the process itself (a pidfd) for a moment;
    /// that one does not count.
    pub fn descriptors(&self) -> usize {
        let open = fs::read_dir(format!("/proc/{}/fd", self.pid()));
        open.expect("a running process")
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .filter(|file| file.as_os_str() != "anon_inode:[pidfd]")
            .count()
    }

    /// The next line of its standard output, without its end.
    pub fn line(&mut self) -> String {
        let line = self.try_line();
        line.unwrap_or_else(|| panic!("{} printed no whole line", self.name))
    }

    /// As [`line`](Process::line); `None` once there is none.
    pub fn try_line(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = self.stdout.read_line(&mut line);
        let whole = read.is_ok() && line.pop() == Some('\n');
        whole.then_some(line)
    }

    /// What it has printed on standard error so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr.lock().unwrap()).into_owned()
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal. It must be running.
    pub fn signal(&mut self, signal: i32) {
        assert!(self.is_running(), "{} ended by itself", self.name);
        // SAFETY: no memory is passed; the child was not reaped above, so the number is still its own.
        let sent = unsafe { libc::kill(self.pid() as libc::pid_t, signal) };
        assert_eq!(sent, 0, "kill: {}", io::Error::last_os_error());
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Finished {
        let mut stdout = Vec::new();
        let read = self.stdout.read_to_end(&mut stdout);
        let status = self.child.wait().expect("a child can be waited for");
        join(&mut self.stderr_reader);
        let finished = Finished {
            status,
            stdout,
            stderr: self.stderr(),
        };
        read.unwrap_or_else(|error| panic!("{}: {error}\n{finished:?}", self.name));
        let killed = join(&mut self.watchdog);
        assert!(!killed, "{} did not end: {finished:?}", self.name);
        finished
    }
}

fn join<T: Default>(thread: &mut Option<thread::JoinHandle<T>>) -> T {
    let thread = thread.take();
    thread
        .and_then(|thread| thread.join().ok())
        .unwrap_or_default()
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() && self.stderr_reader.is_some() {
            join(&mut self.stderr_reader);
            eprintln!("standard error of {}:\n{}", self.name, self.stderr());
        }
    }
}

/// Reads until the end of the file into a place where it can be looked at before.
fn collect(mut from: ChildStderr, into: &Mutex<Vec<u8>>) {
    let mut piece = [0; 4096];
    loop {
        match from.read(&mut piece) {
            Ok(length @ 1..) => into.lock().unwrap().extend_from_slice(&piece[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => break,
        }
    }
}

/// Kills the child after [`PROCESS_LIMIT`]: whether it had to.
fn watch(child: &Child) -> io::Result<thread::JoinHandle<bool>> {
    // SAFETY: no memory is passed; the child was just started and is not reaped yet.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    if pidfd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that the kernel just made for us.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as i32) };
    let deadline = Instant::now() + PROCESS_LIMIT;
    Ok(thread::spawn(move || {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut poll = libc::pollfd {
                fd: pidfd.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd that lives through the call.
            if unsafe { libc::poll(&mut poll, 1, left.as_millis() as i32) } > 0 {
                return false;
            }
            if left.is_zero() {
                let none = std::ptr::null::<libc::siginfo_t>();
                let fd = pidfd.as_raw_fd();
                // SAFETY: a null siginfo is allowed; the descriptor is a pidfd.
                unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, none, 0) };
                return true;
            }
        }
    }))
}

/// Runs `command` to its end, with `input` as its standard input.
pub fn run(command: &mut Command, input: &[u8]) -> Finished {
    let name = format!("{command:?}");
    match Process::start(command, input) {
        Ok(process) => process.wait(),
        Err(error) => panic!("{name}: {error}"),
    }
}

/// Runs an example to its end.
pub fn run_example<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> Finished {
    Process::example(name, args).wait()
}

/// Whether python3 is there; says so if not.
pub fn has_python() -> bool {
    let probe = Command::new("python3").arg("--version").output();
    let there = probe.is_ok_and(|output| output.status.success());
    if !there {
        println!("skipped: there is no python3");
    }
    there
}

/// Runs `body` in a process of its own, this very test run again: what it does to its process hurts nobody.
pub fn alone(test: &str, body: impl FnOnce()) {
    const VARIABLE: &str = "RINGSOCK_TEST_ALONE";
    if std::env::var(VARIABLE).as_deref() == Ok(test) {
        // SAFETY: no memory is passed. A test that hangs ends by the signal.
        unsafe { libc::alarm(PROCESS_LIMIT.as_secs() as u32) };
        body();
        println!("{test} came to its end");
        return;
    }
    let _turn = turn();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(VARIABLE, test)
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && stdout.contains("came to its end"),
        "{:?}\n{stdout}\n{stderr}",
        output.status
    );
}

/// Names the part of a child test that is to run.
pub const CHILD: &str = "RINGSOCK_TEST_CHILD";

/// No child process lives longer, in seconds.
const CHILD_LIMIT_S: u32 = 60;

/// A command that runs `program` while strace makes system calls fail: `faults` are its options. Its process is the program's.
pub fn traced(faults: &[&str], program: &Path) -> Command {
    let mut command = Command::new("strace");
    command.args(["-D", "-f", "-qq", "-o", "/dev/null"]);
    command.args(faults).arg(program);
    command
}

/// Whether strace is there and may trace; says so if not.
pub fn has_strace() -> bool {
    let probe = traced(&["-e", "trace=none"], Path::new("true")).output();
    let there = probe.is_ok_and(|output| output.status.success());
    if !there {
        println!("skipped: strace is not there, or may not trace");
    }
    there
}

/// Runs one ignored test of this program in a process of its own.
pub fn child(test: &str, part: &str) -> Output {
    Command::new(std::env::current_exe().expect("a running program has a path"))
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env(CHILD, part)
        .output()
        .expect("the test program starts")
}

/// In a child: which part of it is to run. `None` if the test was started by hand.
pub fn child_part() -> Option<String> {
    let part = std::env::var(CHILD).ok()?;
    let no_core = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: both calls concern this process only and read what they are given.
    unsafe {
        libc::setrlimit(libc::RLIMIT_CORE, &no_core);
        libc::alarm(CHILD_LIMIT_S);
    }
    Some(part)
}

/// Forks; the child runs `child` and ends with its result: the child's code, or 1000 and the signal that killed it.
pub fn fork(child: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the process is this test's own, with no other thread that holds a lock the child needs.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        // SAFETY: no memory is passed. A child that hangs ends by the signal.
        unsafe { libc::alarm(20) };
        let code = child();
        // SAFETY: it only ends the child.
        unsafe { libc::_exit(code) }
    }
    let mut status = 0;
    loop {
        // SAFETY: `status` lives through the call; the child is ours.
        let waited = unsafe { libc::waitpid(pid, &mut status, 0) };
        if waited == pid {
            break;
        }
    }
    if libc::WIFSIGNALED(status) {
        1000 + libc::WTERMSIG(status)
    } else {
        libc::WEXITSTATUS(status)
    }
}
