//! Processes of a run: a server and a load, each on a processor of its own. Knows how they speak, not what they do.
//!
//! Each is started through this program itself (`--pin`), which waits until the counters are attached, takes its processor, asks to
//! be killed if the harness dies, and becomes the command. So nothing has to happen between fork and exec in the harness, and
//! a counter sees every thread the command ever starts.
#![allow(unsafe_code)]

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a server may take to listen; a debug build under valgrind has been seen to take seconds.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a process may take to end once it has closed its output.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a process did not do its part.
#[derive(Debug, PartialEq, Eq)]
pub enum Failure {
    /// It says it cannot do this combination.
    Cannot(String),
    /// It broke.
    Broken(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Broken(error.to_string())
    }
}

/// Becomes `command` on processor `cpu`, once a byte comes on standard input. Returns only if that fails.
pub fn pin(cpu: usize, command: &[OsString]) -> io::Error {
    if let Err(error) = io::stdin().read_exact(&mut [0]) {
        return error;
    }
    // SAFETY: prctl with PR_SET_PDEATHSIG takes a signal number and touches no memory of ours.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // SAFETY: a cpu_set_t is plain bits, for which all zero is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if cpu >= libc::CPU_SETSIZE as usize {
        return io::Error::from_raw_os_error(libc::EINVAL);
    }
    // SAFETY: the processor was checked to be within the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the set is valid for reads of its size; 0 is the calling thread, the only one there is.
    if unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } != 0 {
        return io::Error::last_os_error();
    }
    Command::new(&command[0]).args(&command[1..]).exec()
}

/// A process started on a processor; killed if dropped.
pub struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    stderr: Option<JoinHandle<String>>,
}

impl Process {
    /// Starts `command`, held back until [`Process::go`].
    pub fn hold(cpu: usize, command: &[OsString]) -> io::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("--pin")
            .arg(cpu.to_string())
            .arg("--")
            .args(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (sender, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut stderr = child.stderr.take().expect("piped");
        let stderr = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Ok(Self {
            stdin: child.stdin.take(),
            child,
            lines,
            stderr: Some(stderr),
        })
    }

    pub fn pid(&self) -> libc::pid_t {
        self.child.id() as libc::pid_t
    }

    /// Lets the process go on: it waits for a line at the start, and a load around its measured window.
    pub fn go(&mut self) -> io::Result<()> {
        self.stdin.as_mut().expect("not closed").write_all(b"\n")
    }

    /// Closes its standard input: the end for a load that holds connections.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// The next line of its standard output.
    ///
    /// # Errors
    /// What it said on standard error, if it ended or took longer than `timeout`.
    pub fn line(&mut self, timeout: Duration) -> Result<String, Failure> {
        match self.lines.recv_timeout(timeout) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Disconnected) => Err(self.failure()),
            Err(RecvTimeoutError::Timeout) => {
                let _ = self.child.kill();
                let said = self.said();
                let said = if said.is_empty() {
                    said
                } else {
                    format!(": {said}")
                };
                Err(Failure::Broken(format!(
                    "nothing came for {} s{said}",
                    timeout.as_secs()
                )))
            }
        }
    }

    /// Its standard error, which ends with it.
    fn said(&mut self) -> String {
        let text = self.stderr.take().and_then(|reader| reader.join().ok());
        text.unwrap_or_default().trim().to_owned()
    }

    fn failure(&mut self) -> Failure {
        let status = match self.end(END_TIMEOUT) {
            Ok(status) => status,
            Err(error) => return error.into(),
        };
        failure(status, &self.said())
    }

    /// Waits for the end of a process that is about to end by itself, and kills it if it does not.
    fn end(&mut self, timeout: Duration) -> io::Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                self.child.kill()?;
                return self.child.wait();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for a load to end, which succeeds only if every byte was right.
    pub fn finish(mut self, timeout: Duration) -> Result<(), Failure> {
        self.close_stdin();
        let status = self.end(timeout)?;
        if status.success() {
            Ok(())
        } else {
            Err(failure(status, &self.said()))
        }
    }

    /// Ends a server, which has nothing to lose: some runtimes take seconds to end, or want no signal at all.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail if it has been waited for, and then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the end of a process means, given its standard error: 2 and `cannot: REASON` is an answer, anything else a defect.
fn failure(status: ExitStatus, stderr: &str) -> Failure {
    if status.code() == Some(2) {
        let mut lines = stderr.lines();
        if let Some(reason) = lines.find_map(|line| line.strip_prefix("cannot: ")) {
            return Failure::Cannot(reason.to_owned());
        }
        // So says an argument parser that does not know of what others can.
        let unknown = stderr
            .lines()
            .find_map(|line| line.strip_prefix("error: unexpected argument '"));
        if let Some(option) = unknown.and_then(|rest| rest.split('\'').next()) {
            return Failure::Cannot(format!("has no option {option}"));
        }
    }
    let how = match status.signal() {
        Some(signal) => format!("ended by signal {signal}"),
        None => format!("ended with status {}", status.code().unwrap_or(-1)),
    };
    let error = stderr.lines().find(|line| line.starts_with("error: "));
    match error.or_else(|| stderr.lines().rfind(|line| !line.trim().is_empty())) {
        Some(line) => Failure::Broken(format!("{line} ({how})")),
        None => Failure::Broken(how),
    }
}

/// Lets a server go, and waits until it listens. Returns the address it says.
pub fn listen(server: &mut Process) -> Result<String, Failure> {
    server.go()?;
    let deadline = Instant::now() + LISTEN_TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let line = server.line(left)?;
        if let Some(address) = line.strip_prefix("listening on ") {
            return Ok(address.to_owned());
        }
    }
}
