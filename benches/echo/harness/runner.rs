//! One turn: a fresh server on one processor, a load on the other, and the server's counters exactly around the measured messages.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::cells::{Cell, Family, Kind, Lineup};
use super::contenders::Contender;
use super::counters::{self, CallCounters, Hard, HardCounters, Measure};
use super::json::{IdleMemory, Paced, Round};
use super::process::{self, Failure, Process};

/// The longest a load may say nothing; it gives up by itself before, on a server that does nothing.
const LOAD_TIMEOUT: Duration = Duration::from_secs(30);
/// A run is repeated if the hypervisor took more than this share of either processor…
const STOLEN_MAX: f64 = 0.02;
/// …but not more often than this.
const REPEATS_MAX: u32 = 3;
/// Parts of a timed run, each short enough to fall between two disturbances of the machine now and then.
const SLICES: u64 = 8;
/// How long a paced run is, in seconds.
const PACED_SECONDS: f64 = 0.5;

/// Starts processes and reads counters; keeps what is the same for all turns.
pub struct Runner {
    pub measure: Measure,
    cpus: [usize; 2],
    /// For Unix sockets and callgrind's files.
    pub scratch: PathBuf,
}

/// What was read before and after the measured messages, slice by slice, and what the load found.
struct Window<T> {
    slices: Vec<(T, T)>,
    load: Value,
    peak_rss_kib: f64,
    stolen: f64,
}

impl Runner {
    pub fn new(server_cpu: usize, load_cpu: usize) -> io::Result<Self> {
        let scratch = std::env::temp_dir().join(format!("ringsock-echo-{}", std::process::id()));
        fs::create_dir_all(&scratch)?;
        Ok(Self {
            measure: Measure::here(),
            cpus: [server_cpu, load_cpu],
            scratch,
        })
    }

    /// Why system calls cannot be counted here, if they cannot.
    pub fn uncounted(&self) -> Option<String> {
        let error = CallCounters::attach(std::process::id() as libc::pid_t).err()?;
        Some(format!(
            "System calls and context switches were not counted, which needs perf_event_open and the tracepoint \
             raw_syscalls:sys_enter: {error}."
        ))
    }

    /// A timed run, again if too much of its time was stolen: then the one that lost least counts.
    pub fn timed(
        &self,
        cell: &Cell,
        contender: &Contender,
        round: usize,
    ) -> Result<Round, Failure> {
        let mut best: Option<Round> = None;
        for repeats in 0..=REPEATS_MAX {
            let once = match cell.kind {
                Kind::Idle => self.idle(cell, contender)?,
                _ => self.timed_once(cell, contender)?,
            };
            let stolen = once.stolen;
            if best.as_ref().is_none_or(|best| stolen < best.stolen) {
                best = Some(Round { round, ..once });
            }
            if let Some(best) = &mut best {
                best.repeats = repeats;
            }
            if stolen <= STOLEN_MAX {
                break;
            }
        }
        Ok(best.expect("one run at least"))
    }

    fn timed_once(&self, cell: &Cell, contender: &Contender) -> Result<Round, Failure> {
        let attach = |pid| match self.measure {
            Measure::Cycles => HardCounters::attach(pid).map(Some),
            Measure::CpuTime => Ok(None),
        };
        let read = |hard: &mut Option<HardCounters>, pid| -> io::Result<(f64, Option<Hard>)> {
            let hard = hard.as_mut().map(HardCounters::read).transpose()?;
            Ok((counters::cpu_time_ns(pid)?, hard))
        };
        let mut options = load_options(cell, cell.messages);
        let slices = slices_of(cell);
        options.extend(["--slices".into(), slices.to_string().into()]);
        let window = self.window(cell, contender, options, attach, read)?;
        let messages = field(&window.load, "messages")?;
        let (mut cpu_ns, mut hardware) = (0.0, Hard::default());
        let mut costs = Vec::new();
        for ((cpu_before, before), (cpu_after, after)) in &window.slices {
            let slice_ns = cpu_after - cpu_before;
            cpu_ns += slice_ns;
            let mut cost = slice_ns;
            if let (Some(before), Some(after)) = (before, after) {
                let slice = after.since(before);
                hardware = hardware.plus(&slice);
                cost = slice.cycles_user + slice.cycles_kernel;
            }
            costs.push(cost / (messages / window.slices.len() as f64));
        }
        let hardware = match self.measure {
            Measure::Cycles => Some(hardware.over(messages)),
            Measure::CpuTime => None,
        };
        Ok(Round {
            seconds: field(&window.load, "seconds")?,
            messages_per_second: field(&window.load, "messages_per_second")?,
            cpu_ns: cpu_ns / messages,
            slices: costs,
            hardware,
            p50_us: field(&window.load, "p50_us")?,
            p99_us: field(&window.load, "p99_us")?,
            p999_us: field(&window.load, "p999_us")?,
            peak_rss_kib: window.peak_rss_kib,
            lost: window
                .load
                .get("lost")
                .and_then(Value::as_f64)
                .unwrap_or_default(),
            calm_p99_us: window.load.get("calm_p99_us").and_then(Value::as_f64),
            stolen: window.stolen,
            ..Round::default()
        })
    }

    /// A run at a fixed rate.
    pub fn paced(&self, cell: &Cell, contender: &Contender, rate: f64) -> Result<Paced, Failure> {
        let messages = (rate * PACED_SECONDS).ceil() as u64;
        let mut options = options_of("paced", cell, messages.max(1));
        options.extend(["--rate".into(), rate.to_string().into()]);
        let window = self.window(cell, contender, options, |_| Ok(()), |(), _| Ok(()))?;
        Ok(Paced {
            messages_per_second: field(&window.load, "messages_per_second")?,
            p50_us: field(&window.load, "p50_us")?,
            p99_us: field(&window.load, "p99_us")?,
            p999_us: field(&window.load, "p999_us")?,
        })
    }

    /// System calls and context switches per message, in a run of its own.
    pub fn counted(&self, cell: &Cell, contender: &Contender) -> Result<(f64, f64), Failure> {
        let messages = (cell.messages / 8).max(1);
        let options = load_options(cell, messages);
        let read = |counters: &mut CallCounters, _| counters.read();
        let window = self.window(cell, contender, options, CallCounters::attach, read)?;
        let messages = field(&window.load, "messages")?;
        let all = |pick: fn(&(f64, f64)) -> f64| -> f64 {
            let each = window.slices.iter();
            each.map(|(before, after)| pick(after) - pick(before)).sum()
        };
        Ok((all(|read| read.0) / messages, all(|read| read.1) / messages))
    }

    /// Bytes per idle connection, from the memory before they come and while they are there.
    fn idle(&self, cell: &Cell, contender: &Contender) -> Result<Round, Failure> {
        let backend = self.backend(cell)?;
        let command = self.command(cell, contender, &backend);
        let mut server = Process::hold(self.cpus[0], &command)?;
        let address = process::listen(&mut server)?;
        let pid = server.pid();
        let memory = || -> io::Result<(f64, f64)> {
            Ok((
                counters::memory_kib(pid, "VmRSS")?,
                counters::available_kib()?,
            ))
        };
        let before = memory()?;
        let stolen = counters::stolen_ticks(&self.cpus)?;
        let mut load = Process::hold(
            self.cpus[1],
            &self.load(cell, &address, load_options(cell, 0))?,
        )?;
        load.go()?;
        let report = loop {
            match load.line(LOAD_TIMEOUT)?.as_str() {
                "begin" | "end" => load.go()?,
                line => break parse(line)?,
            }
        };
        let after = memory()?;
        let stolen = counters::stolen_share(&stolen, &counters::stolen_ticks(&self.cpus)?);
        let peak_rss_kib = counters::memory_kib(pid, "VmHWM")?;
        load.finish(LOAD_TIMEOUT)?;
        server.stop();
        let per_connection = |kib: f64| kib * 1024.0 / f64::from(cell.connections);
        Ok(Round {
            seconds: report
                .get("seconds")
                .and_then(Value::as_f64)
                .unwrap_or_default(),
            peak_rss_kib,
            stolen,
            idle: Some(IdleMemory {
                server: per_connection(after.0 - before.0),
                machine: per_connection(before.1 - after.1),
            }),
            ..Round::default()
        })
    }

    /// Runs a server and a load. `attach` is called before the server's program starts, `read` around the measured messages.
    fn window<A, T>(
        &self,
        cell: &Cell,
        contender: &Contender,
        options: Vec<OsString>,
        attach: impl FnOnce(libc::pid_t) -> io::Result<A>,
        read: impl Fn(&mut A, libc::pid_t) -> io::Result<T>,
    ) -> Result<Window<T>, Failure> {
        let backend = self.backend(cell)?;
        let command = self.command(cell, contender, &backend);
        let mut server = Process::hold(self.cpus[0], &command)?;
        let pid = server.pid();
        let mut attached = attach(pid)?;
        let address = process::listen(&mut server)?;
        let mut load = Process::hold(self.cpus[1], &self.load(cell, &address, options)?)?;
        load.go()?;
        expect(&mut load, "begin")?;
        let stolen = counters::stolen_ticks(&self.cpus)?;
        let mut slices = Vec::new();
        let report = loop {
            let before = read(&mut attached, pid)?;
            load.go()?;
            expect(&mut load, "end")?;
            slices.push((before, read(&mut attached, pid)?));
            load.go()?;
            match load.line(LOAD_TIMEOUT)?.as_str() {
                "begin" => {}
                line => break parse(line)?,
            }
        };
        let stolen = counters::stolen_share(&stolen, &counters::stolen_ticks(&self.cpus)?);
        load.finish(LOAD_TIMEOUT)?;
        let peak_rss_kib = counters::memory_kib(pid, "VmHWM")?;
        server.stop();
        Ok(Window {
            slices,
            load: report,
            peak_rss_kib,
            stolen,
        })
    }

    /// Runs a load without a window, for whoever counts a whole server.
    pub fn load_all(&self, cell: &Cell, address: &str, messages: u64) -> Result<(), Failure> {
        let mut options = load_options(cell, messages);
        options.extend(["--warmup".into(), "0".into()]);
        let mut load = Process::hold(self.cpus[1], &self.load(cell, address, options)?)?;
        load.go()?;
        expect(&mut load, "begin")?;
        load.go()?;
        expect(&mut load, "end")?;
        load.go()?;
        load.line(LOAD_TIMEOUT)?;
        load.finish(LOAD_TIMEOUT)
    }

    /// The processor of servers.
    pub fn server_cpu(&self) -> usize {
        self.cpus[0]
    }

    /// What a proxy stands in front of, on the load's processor, and its address; nothing in other cells.
    pub fn backend(&self, cell: &Cell) -> Result<Option<(Process, String)>, Failure> {
        if cell.lineup != Lineup::Proxy {
            return Ok(None);
        }
        let mut command: Vec<OsString> = vec![std::env::current_exe()?.into()];
        command.extend(["serve", "epoll", "--buffer"].map(OsString::from));
        command.push(cell.buffer().to_string().into());
        let mut backend = Process::hold(self.cpus[1], &command)?;
        let address = process::listen(&mut backend)?;
        Ok(Some((backend, address)))
    }

    /// A contender's command line.
    pub fn command(
        &self,
        cell: &Cell,
        contender: &Contender,
        backend: &Option<(Process, String)>,
    ) -> Vec<OsString> {
        let mut command = contender.command(cell, &self.socket());
        if let Some((_, address)) = backend {
            command.extend(["--upstream".into(), address.into()]);
        }
        command
    }

    pub fn socket(&self) -> PathBuf {
        self.scratch.join("socket")
    }

    /// The command line of a load.
    fn load(
        &self,
        cell: &Cell,
        address: &str,
        options: Vec<OsString>,
    ) -> io::Result<Vec<OsString>> {
        let mut command = vec![std::env::current_exe()?.into(), "load".into()];
        let mut options = options.into_iter();
        command.extend(options.next());
        command.push(match cell.family {
            Family::Tcp | Family::Udp => "--connect".into(),
            Family::Unix => "--unix".into(),
        });
        command.push(address.into());
        command.extend(options);
        Ok(command)
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.scratch);
    }
}

/// In how many parts a timed run of a cell is measured: more than one where the load can stop and go on.
fn slices_of(cell: &Cell) -> u64 {
    match (cell.kind, cell.family) {
        (Kind::Echo, Family::Tcp | Family::Unix) | (Kind::Churn, _) => SLICES,
        _ => 1,
    }
}

/// The load of a cell and its options, but for where the server is.
fn load_options(cell: &Cell, messages: u64) -> Vec<OsString> {
    let load = match (cell.kind, cell.family) {
        (Kind::Echo, Family::Udp) => "udp",
        (Kind::Echo, _) => "echo",
        (Kind::Churn, _) => "churn",
        (Kind::Idle, _) => "idle",
        (Kind::Fanout, _) => "fanout",
        (Kind::Stalled, _) => "stalled",
    };
    options_of(load, cell, messages)
}

/// A load's name and its options.
fn options_of(kind: &str, cell: &Cell, messages: u64) -> Vec<OsString> {
    let mut options: Vec<OsString> = vec![kind.into(), "--json".into(), "--wait".into()];
    let mut put = |name: &str, value: u64| {
        options.push(name.into());
        options.push(value.to_string().into());
    };
    let (connections, size, depth) = (cell.connections.into(), cell.size.into(), cell.depth.into());
    put("--size", size);
    match kind {
        "udp" => {
            put("--flows", connections);
            put("--window", depth);
        }
        "churn" => put("--at-once", connections),
        "echo" => {
            put("--connections", connections);
            put("--depth", depth);
        }
        _ => put("--connections", connections),
    }
    if cell.kind != Kind::Idle {
        put("--messages", messages);
    }
    if cell.segmented {
        options.push("--segmented".into());
    }
    if kind == "echo" && cell.is_ping_pong() {
        options.push("--busy".into());
    }
    options
}

fn expect(load: &mut Process, word: &str) -> Result<(), Failure> {
    let line = load.line(LOAD_TIMEOUT)?;
    if line == word {
        Ok(())
    } else {
        Err(Failure::Broken(format!(
            "the load said {line:?} instead of {word:?}"
        )))
    }
}

fn parse(line: &str) -> Result<Value, Failure> {
    serde_json::from_str(line)
        .map_err(|error| Failure::Broken(format!("the load said {line:?}: {error}")))
}

fn field(report: &Value, name: &str) -> Result<f64, Failure> {
    let value = report.get(name).and_then(Value::as_f64);
    value.ok_or_else(|| Failure::Broken(format!("the load's report has no {name}: {report}")))
}

/// A path in the scratch directory that nothing is at.
pub fn fresh(scratch: &Path, name: &str) -> io::Result<PathBuf> {
    let path = scratch.join(name);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(path),
    }
}
