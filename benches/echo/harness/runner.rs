//! Turns: servers on one processor, loads on the other, and a server's counters exactly around the measured messages.
//!
//! In a timed round all contenders of a cell are alive at once, and take turns of some 30 ms ([`Runner::together`]): one works
//! while the others sleep.

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
/// How many slices make up a cell's messages: of the 0.4 s that these take, one has some 30 ms, long enough for the connections
/// to be busy, short enough for two in a row to see the same machine.
const SLICES: u64 = 12;
/// The share of a slice's messages that goes before it unmeasured, to warm up what others have cooled; a connection has two at least.
const LEAD_IN: u64 = 8;
/// After how long a datagram is lost, in milliseconds: a slice with a loss takes so much longer.
const LOSS_AFTER_MS: u64 = 50;
/// How long a paced run is, in seconds.
const PACED_SECONDS: f64 = 0.5;

/// Starts processes and reads counters; keeps what is the same for all turns.
pub struct Runner {
    pub measure: Measure,
    cpus: [usize; 2],
    /// For Unix sockets and callgrind's files.
    pub scratch: PathBuf,
}

/// A server and the load on it, between two slices. `T` is what is read before and after each.
struct Seat<'a, T> {
    server: Process,
    load: Process,
    /// What a proxy stands in front of.
    _backend: Option<(Process, String)>,
    read: Box<dyn FnMut() -> io::Result<T> + 'a>,
    slices: Vec<(T, T)>,
}

/// What was read before and after the measured messages, slice by slice, and what the load found.
struct Window<T> {
    slices: Vec<(T, T)>,
    load: Value,
    peak_rss_kib: f64,
}

/// What is read around the slices of a timed round.
type Cost = (f64, Option<Hard>);

impl<T> Seat<'_, T> {
    /// Has a slice's messages sent. The load has said that it begins; it says the end.
    fn slice(&mut self) -> Result<(), Failure> {
        let before = self.read_at_rest()?;
        self.load.go()?;
        expect(&mut self.load, "end")?;
        let after = self.read_at_rest()?;
        self.slices.push((before, after));
        Ok(())
    }

    /// A server may still be busy after its last echo, and what it uses while it runs is not in its clock yet.
    fn read_at_rest(&mut self) -> io::Result<T> {
        counters::settle(self.server.pid());
        (self.read)()
    }

    /// Ends a pause: the load leads in to the next slice and says that it begins.
    fn resume(&mut self) -> Result<(), Failure> {
        self.load.go()?;
        expect(&mut self.load, "begin")
    }

    /// Ends it all, after the last slice.
    fn close(mut self) -> Result<Window<T>, Failure> {
        self.load.go()?;
        let report = parse(&self.load.line(LOAD_TIMEOUT)?)?;
        self.load.finish(LOAD_TIMEOUT)?;
        let peak_rss_kib = counters::memory_kib(self.server.pid(), "VmHWM")?;
        self.server.stop();
        Ok(Window {
            slices: self.slices,
            load: report,
            peak_rss_kib,
        })
    }
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

    /// A timed round of a cell: what each contender did, in their order. Where the load can pause, they take turns of a slice,
    /// `passes` each; where it cannot, a whole run each.
    pub fn timed(
        &self,
        cell: &Cell,
        contenders: &[&Contender],
        round: usize,
        passes: usize,
    ) -> Vec<Result<Round, Failure>> {
        let stolen = counters::stolen_ticks(&self.cpus).ok();
        let mut rounds = match cell.kind {
            Kind::Idle => (contenders.iter())
                .map(|contender| self.idle(cell, contender))
                .collect(),
            Kind::Stalled => (contenders.iter())
                .map(|contender| self.alone(cell, contender))
                .collect(),
            Kind::Echo | Kind::Churn | Kind::Fanout => {
                self.together(cell, contenders, round, passes)
            }
        };
        let after = counters::stolen_ticks(&self.cpus).ok();
        let stolen = stolen.zip(after);
        let stolen = stolen.map_or(0.0, |(before, after)| {
            counters::stolen_share(&before, &after)
        });
        for result in rounds.iter_mut().flatten() {
            result.round = round;
            result.stolen = stolen;
        }
        rounds
    }

    /// A round in which all take turns.
    fn together(
        &self,
        cell: &Cell,
        contenders: &[&Contender],
        round: usize,
        passes: usize,
    ) -> Vec<Result<Round, Failure>> {
        let slice = (cell.messages / SLICES).max(1);
        let least = match cell.kind {
            Kind::Echo => 2 * u64::from(cell.connections * cell.depth),
            _ => 1,
        };
        let lead_in = (slice / LEAD_IN).max(least);
        let options = || {
            // One slice more than there are passes: the first one is not measured.
            let mut options = load_options(cell, slice * (passes as u64 + 1));
            let mut put = |name: &str, value: u64| {
                options.extend([name.into(), value.to_string().into()]);
            };
            put("--slices", passes as u64 + 1);
            put("--lead-in", lead_in);
            put("--warmup", slice);
            options
        };
        let mut seats: Vec<Result<Seat<'_, Cost>, Failure>> = (contenders.iter().enumerate())
            .map(|(index, contender)| {
                let mut seat = self.timed_seat(cell, contender, options(), index)?;
                seat.slice()?;
                seat.slices.clear();
                Ok(seat)
            })
            .collect();
        let count = seats.len();
        for pass in 0..passes {
            for turn in 0..count {
                let turn = if pass % 2 == 0 {
                    turn
                } else {
                    count - 1 - turn
                };
                let seat = &mut seats[(turn + pass + round) % count];
                if let Ok(taken) = seat
                    && let Err(failure) = taken.resume().and_then(|()| taken.slice())
                {
                    *seat = Err(failure);
                }
            }
        }
        seats
            .into_iter()
            .map(|seat| self.round_of(seat?.close()?))
            .collect()
    }

    /// A round in which a contender has the machine to itself, for loads that cannot pause.
    fn alone(&self, cell: &Cell, contender: &Contender) -> Result<Round, Failure> {
        let options = load_options(cell, cell.messages);
        let mut seat = self.timed_seat(cell, contender, options, 0)?;
        seat.slice()?;
        self.round_of(seat.close()?)
    }

    /// What the slices of a timed round come to.
    fn round_of(&self, window: Window<Cost>) -> Result<Round, Failure> {
        let report = &window.load;
        // The report is of the slice that was not measured, too.
        let per_slice = field(report, "messages")? / field(report, "slices")?;
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
            costs.push(cost / per_slice);
        }
        let messages = per_slice * window.slices.len() as f64;
        let hardware = match self.measure {
            Measure::Cycles => Some(hardware.over(messages)),
            Measure::CpuTime => None,
        };
        Ok(Round {
            seconds: field(report, "seconds")?,
            messages_per_second: field(report, "messages_per_second")?,
            cpu_ns: cpu_ns / messages,
            slices: costs,
            hardware,
            p50_us: field(report, "p50_us")?,
            p99_us: field(report, "p99_us")?,
            p999_us: field(report, "p999_us")?,
            peak_rss_kib: window.peak_rss_kib,
            lost: report
                .get("lost")
                .and_then(Value::as_f64)
                .unwrap_or_default(),
            calm_p99_us: report.get("calm_p99_us").and_then(Value::as_f64),
            ..Round::default()
        })
    }

    /// A run at a fixed rate.
    pub fn paced(&self, cell: &Cell, contender: &Contender, rate: f64) -> Result<Paced, Failure> {
        let messages = (rate * PACED_SECONDS).ceil() as u64;
        let mut options = options_of("paced", cell, messages.max(1));
        options.extend(["--rate".into(), rate.to_string().into()]);
        let mut seat = self.seat(cell, contender, options, 0, |_| Ok(Box::new(|| Ok(()))))?;
        seat.slice()?;
        let load = seat.close()?.load;
        Ok(Paced {
            messages_per_second: field(&load, "messages_per_second")?,
            p50_us: field(&load, "p50_us")?,
            p99_us: field(&load, "p99_us")?,
            p999_us: field(&load, "p999_us")?,
        })
    }

    /// System calls and context switches per message, in a run of its own.
    pub fn counted(&self, cell: &Cell, contender: &Contender) -> Result<(f64, f64), Failure> {
        let options = load_options(cell, (cell.messages / 8).max(1));
        let mut seat = self.seat(cell, contender, options, 0, |pid| {
            let mut counters = CallCounters::attach(pid)?;
            Ok(Box::new(move || counters.read()))
        })?;
        seat.slice()?;
        let window = seat.close()?;
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
        let command = self.command(cell, contender, &backend, 0);
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
            idle: Some(IdleMemory {
                server: per_connection(after.0 - before.0),
                machine: per_connection(before.1 - after.1),
            }),
            ..Round::default()
        })
    }

    /// A seat for a timed round.
    fn timed_seat(
        &self,
        cell: &Cell,
        contender: &Contender,
        options: Vec<OsString>,
        index: usize,
    ) -> Result<Seat<'_, Cost>, Failure> {
        self.seat(cell, contender, options, index, |pid| {
            let mut hard = match self.measure {
                Measure::Cycles => Some(HardCounters::attach(pid)?),
                Measure::CpuTime => None,
            };
            Ok(Box::new(move || {
                let hard = hard.as_mut().map(HardCounters::read).transpose()?;
                Ok((counters::cpu_time_ns(pid)?, hard))
            }))
        })
    }

    /// Starts a server and a load, up to where the load begins. `attach` is called before the server's program starts, and what it
    /// returns around the slices; of seats that there are at once, each has another `index`.
    fn seat<'a, T>(
        &self,
        cell: &Cell,
        contender: &Contender,
        options: Vec<OsString>,
        index: usize,
        attach: impl FnOnce(libc::pid_t) -> io::Result<Box<dyn FnMut() -> io::Result<T> + 'a>>,
    ) -> Result<Seat<'a, T>, Failure> {
        let backend = self.backend(cell)?;
        let command = self.command(cell, contender, &backend, index);
        let mut server = Process::hold(self.cpus[0], &command)?;
        let read = attach(server.pid())?;
        let address = process::listen(&mut server)?;
        let mut load = Process::hold(self.cpus[1], &self.load(cell, &address, options)?)?;
        load.go()?;
        expect(&mut load, "begin")?;
        Ok(Seat {
            server,
            load,
            _backend: backend,
            read,
            slices: Vec::new(),
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
        index: usize,
    ) -> Vec<OsString> {
        let mut command = contender.command(cell, &self.socket(index));
        if let Some((_, address)) = backend {
            command.extend(["--upstream".into(), address.into()]);
        }
        command
    }

    /// Where the server of a seat may make its Unix socket.
    fn socket(&self, index: usize) -> PathBuf {
        self.scratch.join(format!("socket-{index}"))
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
            put("--loss-after", LOSS_AFTER_MS);
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
