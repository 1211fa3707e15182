//! What a server used: processor time, cycles, instructions, system calls, context switches, memory. Knows processes, not why.
//!
//! Hardware counters are attached before the server's program starts and inherited by every thread it starts, so that threads which
//! have ended are counted too. Where there are none, the process's CPU clock stands in: it is the sum over all threads, ended ones
//! included, in nanoseconds, and costs the server nothing to keep. (`/proc/PID/task/*/schedstat` would lose the threads that
//! ended, which under churn are all of a thread-per-connection server; `/proc/PID/schedstat` is the first thread's alone;
//! `/proc/PID/stat` counts in ticks; a cgroup's `cpu.stat` is as good but needs rights.) As this kernel accounts it, neither
//! includes the time the hypervisor took away.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use perf_event::events::{Hardware, Software, Tracepoint};
use perf_event::{Builder, Counter};
use serde::{Deserialize, Serialize};

/// How long a look at a process waits for it to sleep, and the longest it does.
const SETTLE_STEP: Duration = Duration::from_micros(50);
const SETTLE_MAX: Duration = Duration::from_millis(20);

/// What verdicts rest on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// Hardware cycles, user and kernel.
    Cycles,
    /// Processor time in nanoseconds.
    CpuTime,
}

impl Measure {
    /// What this machine has.
    pub fn here() -> Self {
        let cycles = Builder::new(Hardware::CPU_CYCLES).include_kernel().build();
        match cycles {
            Ok(_) => Self::Cycles,
            Err(_) => Self::CpuTime,
        }
    }

    pub fn unit(self) -> &'static str {
        match self {
            Self::Cycles => "cycles",
            Self::CpuTime => "ns",
        }
    }

    pub fn sentence(self) -> &'static str {
        match self {
            Self::Cycles => "Cost is hardware cycles of the server process, user and kernel.",
            Self::CpuTime => {
                "This machine has no hardware counters (or does not let them be read), so cost is processor time of the server \
                 process, user and kernel, in nanoseconds."
            }
        }
    }
}

/// Hardware counters at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Hard {
    pub cycles_user: f64,
    pub cycles_kernel: f64,
    pub instructions_user: f64,
    pub instructions_kernel: f64,
}

impl Hard {
    fn each(&self, other: &Hard, with: fn(f64, f64) -> f64) -> Hard {
        Hard {
            cycles_user: with(self.cycles_user, other.cycles_user),
            cycles_kernel: with(self.cycles_kernel, other.cycles_kernel),
            instructions_user: with(self.instructions_user, other.instructions_user),
            instructions_kernel: with(self.instructions_kernel, other.instructions_kernel),
        }
    }

    pub fn since(&self, before: &Hard) -> Hard {
        self.each(before, |now, before| now - before)
    }

    pub fn plus(&self, more: &Hard) -> Hard {
        self.each(more, |one, other| one + other)
    }

    /// For each of so many messages.
    pub fn over(&self, messages: f64) -> Hard {
        let messages = Hard {
            cycles_user: messages,
            cycles_kernel: messages,
            instructions_user: messages,
            instructions_kernel: messages,
        };
        self.each(&messages, |all, messages| all / messages)
    }
}

/// The hardware counters of a process and all threads it starts.
pub struct HardCounters([Counter; 4]);

impl HardCounters {
    /// Attaches to a process that is held back; they count from its exec on.
    pub fn attach(pid: libc::pid_t) -> io::Result<Self> {
        let open = |event: Hardware, user: bool| {
            Builder::new(event)
                .observe_pid(pid)
                .any_cpu()
                .inherit(true)
                .enable_on_exec(true)
                .exclude_user(!user)
                .exclude_kernel(user)
                .build()
        };
        Ok(Self([
            open(Hardware::CPU_CYCLES, true)?,
            open(Hardware::CPU_CYCLES, false)?,
            open(Hardware::INSTRUCTIONS, true)?,
            open(Hardware::INSTRUCTIONS, false)?,
        ]))
    }

    pub fn read(&mut self) -> io::Result<Hard> {
        let mut values = [0.0; 4];
        for (counter, value) in self.0.iter_mut().zip(&mut values) {
            *value = scaled(counter)?;
        }
        let [
            cycles_user,
            cycles_kernel,
            instructions_user,
            instructions_kernel,
        ] = values;
        Ok(Hard {
            cycles_user,
            cycles_kernel,
            instructions_user,
            instructions_kernel,
        })
    }
}

/// A counter's value, extrapolated if it had to share the hardware.
fn scaled(counter: &mut Counter) -> io::Result<f64> {
    let data = counter.read_full()?;
    let value = data.count() as f64;
    match (data.time_enabled(), data.time_running()) {
        (Some(enabled), Some(running)) if !running.is_zero() && enabled > running => {
            Ok(value * enabled.as_secs_f64() / running.as_secs_f64())
        }
        _ => Ok(value),
    }
}

/// Counts system calls and context switches of a process and all threads it starts. Each system call is slower for it, so that runs
/// counted like this are not timed.
pub struct CallCounters {
    calls: Counter,
    switches: Counter,
}

impl CallCounters {
    /// Attaches to a process that is held back; they count from its exec on.
    pub fn attach(pid: libc::pid_t) -> io::Result<Self> {
        let id = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"]
            .iter()
            .find_map(|root| {
                fs::read_to_string(format!("{root}/events/raw_syscalls/sys_enter/id")).ok()
            })
            .and_then(|id| id.trim().parse().ok())
            .ok_or_else(|| io::Error::other("no tracepoint raw_syscalls:sys_enter"))?;
        Ok(Self {
            calls: inherited(Builder::new(Tracepoint::with_id(id)), pid)?,
            switches: inherited(Builder::new(Software::CONTEXT_SWITCHES), pid)?,
        })
    }

    /// System calls and context switches so far.
    pub fn read(&mut self) -> io::Result<(f64, f64)> {
        Ok((self.calls.read()? as f64, self.switches.read()? as f64))
    }
}

fn inherited(mut builder: Builder<'_>, pid: libc::pid_t) -> io::Result<Counter> {
    builder
        .observe_pid(pid)
        .any_cpu()
        .inherit(true)
        .enable_on_exec(true)
        .include_kernel()
        .build()
}

/// Processor time of a process and its children, in nanoseconds. (A contender that is other people's program is a child.)
pub fn cpu_time_ns(pid: libc::pid_t) -> io::Result<f64> {
    let children = children(pid).into_iter().map(own_cpu_time_ns);
    Ok(own_cpu_time_ns(pid)? + children.sum::<io::Result<f64>>()?)
}

/// Waits until a process and its children sleep, for a while at most: one that never sleeps is read as it runs.
///
/// The clock of a process that runs on another processor is as of the last tick or switch there, some milliseconds ago at worst
/// (read_sum_exec_runtime in kernel/sched/cputime.c is exact for one's own threads only). Who still works after its last echo would have
/// that taken off.
pub fn settle(pid: libc::pid_t) {
    let start = Instant::now();
    loop {
        // Before the first look, too: a thread that is about to sleep says that it does a moment before its time is counted.
        std::thread::sleep(SETTLE_STEP);
        let mut all = std::iter::once(pid).chain(children(pid));
        if !all.any(runs) || start.elapsed() > SETTLE_MAX {
            return;
        }
    }
}

/// Whether any thread of a process runs or wants to.
fn runs(pid: libc::pid_t) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter();
    threads.flatten().flatten().any(|thread| {
        // A thread that has ended in the meantime does not run.
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        state_of(&stat) == Some('R')
    })
}

/// The state in a thread's `stat`, which follows its name in parentheses.
fn state_of(stat: &str) -> Option<char> {
    stat.rsplit_once(") ")?.1.chars().next()
}

/// The children that a process's first thread has started and that have not ended.
fn children(pid: libc::pid_t) -> Vec<libc::pid_t> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let text = text.unwrap_or_default();
    text.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

/// Processor time of all threads a process ever had, in nanoseconds.
fn own_cpu_time_ns(pid: libc::pid_t) -> io::Result<f64> {
    let mut clock = 0;
    // SAFETY: the clock's id is written to a live local.
    let error = unsafe { libc::clock_getcpuclockid(pid, &mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the time is written to a live local.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(time.tv_sec as f64 * 1e9 + time.tv_nsec as f64)
}

/// A line of a process's status and its children's, in KiB: `VmRSS`, or `VmHWM` for its peak.
pub fn memory_kib(pid: libc::pid_t, line: &str) -> io::Result<f64> {
    let children = children(pid)
        .into_iter()
        .map(|child| own_memory_kib(child, line));
    Ok(own_memory_kib(pid, line)? + children.sum::<io::Result<f64>>()?)
}

fn own_memory_kib(pid: libc::pid_t, line: &str) -> io::Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    kib(&status, line).ok_or_else(|| io::Error::other(format!("no {line} of the server")))
}

/// What the machine could still give to programs, in KiB: this sees the kernel's share too.
pub fn available_kib() -> io::Result<f64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    kib(&text, "MemAvailable").ok_or_else(|| io::Error::other("no MemAvailable"))
}

fn kib(text: &str, line: &str) -> Option<f64> {
    let rest = (text.lines()).find_map(|each| each.strip_prefix(line)?.strip_prefix(':'))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// Ticks the hypervisor took from each of `cpus`, and all ticks of each.
pub fn stolen_ticks(cpus: &[usize]) -> io::Result<Vec<(f64, f64)>> {
    let text = fs::read_to_string("/proc/stat")?;
    Ok(cpus
        .iter()
        .map(|cpu| stolen_of(&text, *cpu).unwrap_or_default())
        .collect())
}

fn stolen_of(text: &str, cpu: usize) -> Option<(f64, f64)> {
    let line = text
        .lines()
        .find(|line| line.split(' ').next() == Some(&format!("cpu{cpu}")))?;
    let ticks: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .map_while(|word| word.parse().ok())
        .collect();
    // user nice system idle iowait irq softirq steal; guest time is in user time already.
    Some((*ticks.get(7)?, ticks[..8].iter().sum()))
}

/// The largest share of a processor's time that was stolen between two readings.
pub fn stolen_share(before: &[(f64, f64)], after: &[(f64, f64)]) -> f64 {
    (before.iter().zip(after))
        .map(|(before, after)| (after.0 - before.0) / (after.1 - before.1).max(1.0))
        .fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    // A bench is built with cfg(test) but without its tests, which `tests/echo_bench.rs` runs.
    #[allow(unused_imports)]
    use super::*;

    #[test]
    fn stolen_time_is_the_worst_processor_s_share() {
        let stat = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 10 0 10 70 0 0 5 5 0 0\ncpu1 1 1 1 1 1 1 1 93 0 0\ncpu10 0 0 0 0 0 0 0 0\n";
        assert_eq!(stolen_of(stat, 0), Some((5.0, 100.0)));
        assert_eq!(stolen_of(stat, 1), Some((93.0, 100.0)));
        assert_eq!(stolen_of(stat, 7), None);
        let share = stolen_share(
            &[(5.0, 100.0), (93.0, 100.0)],
            &[(6.0, 200.0), (97.0, 200.0)],
        );
        assert_eq!(share, 0.04);
        assert_eq!(stolen_share(&[(5.0, 100.0)], &[(5.0, 100.0)]), 0.0);
    }

    #[test]
    fn cpu_time_includes_threads_that_ended() {
        let pid = std::process::id() as libc::pid_t;
        let before = cpu_time_ns(pid).unwrap();
        let worked = std::thread::spawn(|| {
            let thread_ns = || {
                let mut time = libc::timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                };
                // SAFETY: the time is written to a live local.
                unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
                time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
            };
            while thread_ns() < 20e6 {}
            thread_ns()
        });
        let worked = worked.join().unwrap();
        assert!(cpu_time_ns(pid).unwrap() - before >= worked);
    }

    #[test]
    fn a_process_at_rest_has_all_of_its_time_in_its_clock() {
        let stat = "17 (a) R (b) S 1 17 17 0 -1";
        assert_eq!(state_of(stat), Some('S'));
        // It works for less than a tick, and sleeps then.
        let script =
            "while read line; do n=0; while [ $n -lt 2000 ]; do n=$((n + 1)); done; echo; done";
        let mut child = std::process::Command::new("sh")
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id() as libc::pid_t;
        let (mut go, mut done) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        for _ in 0..20 {
            use std::io::{Read, Write};
            go.write_all(b"\n").unwrap();
            done.read_exact(&mut [0]).unwrap();
            settle(pid);
            let at_rest = cpu_time_ns(pid).unwrap();
            std::thread::sleep(Duration::from_millis(10));
            assert_eq!(cpu_time_ns(pid).unwrap(), at_rest);
        }
        drop(go);
        child.wait().unwrap();
    }

    #[test]
    fn memory_is_read_from_its_own_line() {
        let status = "VmPeak:\t  10 kB\nVmHWM:\t 2048 kB\nVmRSS:\t 1024 kB\n";
        assert_eq!(kib(status, "VmHWM"), Some(2048.0));
        assert_eq!(kib(status, "VmRSS"), Some(1024.0));
        assert_eq!(kib(status, "Vm"), None);
    }
}
