//! What the tests of the example programs share: processes that end, endpoints, streams, sandboxes.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// No process that a test starts lives longer than this, so whatever waits for one ends.
const PROCESS_LIMIT: Duration = Duration::from_secs(180);

/// No read, write or connect of a test waits longer than this.
const STREAM_LIMIT: Duration = Duration::from_secs(120);

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
    stderr: Option<thread::JoinHandle<String>>,
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
        let mut stderr = child.stderr.take().expect("piped");
        let watchdog = watch(&child).inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        let process = Process {
            name,
            child,
            stdout,
            stderr: Some(thread::spawn(move || {
                let mut text = Vec::new();
                let _ = stderr.read_to_end(&mut text);
                String::from_utf8_lossy(&text).into_owned()
            })),
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
        let finished = Finished {
            status,
            stdout,
            stderr: join(&mut self.stderr),
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
        if thread::panicking() && self.stderr.is_some() {
            let stderr = join(&mut self.stderr);
            eprintln!("standard error of {}:\n{stderr}", self.name);
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

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Endpoint {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
    Unix,
}

/// A running `echo_server`, or a server with its options, and where it listens.
pub struct EchoServer {
    pub process: Process,
    pub endpoint: Endpoint,
    _dir: TempDir,
}

impl EchoServer {
    /// Starts one on a free port or path, with further arguments; `None` (said on standard output) without IPv6.
    pub fn start(family: Family, args: &[&str]) -> Option<EchoServer> {
        EchoServer::start_with(family, args, |_| ())
    }

    /// As [`start`](EchoServer::start), the command changed by `prepare`.
    pub fn start_with(
        family: Family,
        args: &[&str],
        prepare: impl FnOnce(&mut Command),
    ) -> Option<EchoServer> {
        EchoServer::start_program("echo_server", family, args, prepare)
    }

    /// As [`start_with`](EchoServer::start_with), another program.
    pub fn start_program(
        program: &str,
        family: Family,
        args: &[&str],
        prepare: impl FnOnce(&mut Command),
    ) -> Option<EchoServer> {
        let dir = TempDir::new();
        let path = dir.path().join("echo.socket");
        let mut command = Command::new(example(program));
        match family {
            Family::V4 => command.args(["--bind", "127.0.0.1:0"]),
            Family::V6 if std::net::TcpListener::bind("[::1]:0").is_err() => {
                println!("skipped: there is no IPv6");
                return None;
            }
            Family::V6 => command.args(["--bind", "[::1]:0"]),
            Family::Unix => command.arg("--unix").arg(&path),
        };
        command.args(args);
        prepare(&mut command);
        let mut process = Process::start(&mut command, b"").expect("a server starts");
        let line = process.line();
        let address = line.strip_prefix("listening on ");
        let address = address.unwrap_or_else(|| panic!("the first line is {line:?}"));
        let endpoint = if family == Family::Unix {
            assert_eq!(Path::new(address), path);
            Endpoint::Unix(path)
        } else {
            let address: SocketAddr = address.parse().expect("an address and a port");
            assert!(address.ip().is_loopback() && address.port() != 0);
            assert_eq!(address.is_ipv6(), family == Family::V6);
            Endpoint::Tcp(address)
        };
        Some(EchoServer {
            process,
            endpoint,
            _dir: dir,
        })
    }

    pub fn connect(&self) -> Stream {
        Stream::connect(&self.endpoint).unwrap_or_else(|error| panic!("connect: {error}"))
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> usize {
        let open = fs::read_dir(format!("/proc/{}/fd", self.process.pid()));
        open.expect("a running process").count()
    }

    /// VmRSS in KiB.
    pub fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.pid()));
        let status = status.expect("a running process");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.and_then(|kib| kib.parse().ok()).expect("a VmRSS")
    }

    /// Kills it, having made sure that it was well to the end: it ran, and had nothing more to say.
    pub fn finish(mut self) {
        self.process.signal(libc::SIGKILL);
        let finished = self.process.wait();
        assert!(finished.stdout.is_empty(), "{finished:?}");
        assert!(finished.stderr.is_empty(), "{finished:?}");
    }
}

/// A client's end of a connection.
#[derive(Debug)]
pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    pub fn connect(endpoint: &Endpoint) -> io::Result<Stream> {
        let limit = Some(STREAM_LIMIT);
        Ok(match endpoint {
            Endpoint::Tcp(address) => {
                let stream = TcpStream::connect_timeout(address, STREAM_LIMIT)?;
                stream.set_read_timeout(limit)?;
                stream.set_write_timeout(limit)?;
                Stream::Tcp(stream)
            }
            Endpoint::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(limit)?;
                stream.set_write_timeout(limit)?;
                Stream::Unix(stream)
            }
        })
    }

    /// Ends the sending side.
    pub fn half_close(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
    }

    /// Closes with a reset rather than an end (TCP), which leaves nothing in TIME_WAIT either.
    pub fn reset(self) {
        if let Stream::Tcp(stream) = &self {
            let linger = libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            // SAFETY: the option's value is one `struct linger` that lives through the call.
            let set = unsafe {
                libc::setsockopt(
                    stream.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_LINGER,
                    (&raw const linger).cast(),
                    size_of::<libc::linger>() as libc::socklen_t,
                )
            };
            assert_eq!(set, 0, "SO_LINGER: {}", io::Error::last_os_error());
        }
    }

    /// Sends `bytes` and expects exactly them back.
    pub fn round_trip(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)?;
        let mut back = vec![0; bytes.len()];
        self.read_exact(&mut back)?;
        assert!(back == bytes, "other bytes came back");
        Ok(())
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => { stream }.read(buffer),
            Stream::Unix(stream) => { stream }.read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => { stream }.write(buffer),
            Stream::Unix(stream) => { stream }.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        (&*self).write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Random numbers that a seed repeats (splitmix64).
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 1 to `most`.
    pub fn up_to(&mut self, most: usize) -> usize {
        1 + (self.next() % most as u64) as usize
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// A seed, printed: a new one in every run, or RINGSOCK_TEST_SEED.
pub fn seed() -> u64 {
    let given = std::env::var("RINGSOCK_TEST_SEED").ok();
    let seed = given.and_then(|text| text.parse().ok()).unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        now.map_or(1, |now| now.as_nanos() as u64 % 1_000_000_000)
    });
    println!("seed {seed} (RINGSOCK_TEST_SEED={seed} repeats it)");
    seed
}

/// Tests with thousands of connections take turns: their descriptors do not fit side by side.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until `reached`, at most a minute. For what the kernel announces to nobody.
pub fn eventually(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !reached() {
        assert!(
            Instant::now() < deadline,
            "after a minute still not: {what}"
        );
        thread::sleep(Duration::from_millis(10));
    }
}

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

/// Starts the command under a seccomp filter that makes io_uring_setup fail with `errno`, as container profiles do.
pub fn forbid_io_uring(command: &mut Command, errno: i32) {
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
        instruction(jump_if_equal, 0, 1, libc::SYS_io_uring_setup as u32),
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
