//! What a run leaves behind: every raw round, and what is needed to make sense of it. Written as JSON, and read back to be
//! reported again or to be compared with.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::cells::Cell;
use super::counters::{Hard, Measure};
use super::machine::Machine;

/// A whole run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    pub machine: Machine,
    pub measure: Measure,
    pub rounds: usize,
    /// Why system calls and context switches were not counted, if they were not.
    pub uncounted: Option<String>,
    pub seconds: f64,
    pub cells: Vec<CellResult>,
    /// What spawn, switch and the like cost: a name and nanoseconds.
    pub costs: Vec<(String, f64)>,
}

/// A cell, and what each contender did in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CellResult {
    pub cell: Cell,
    /// Messages a second that the paced runs offered to every contender.
    pub offered: Option<f64>,
    pub contenders: Vec<ContenderResult>,
}

/// What a contender did in a cell.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ContenderResult {
    pub name: String,
    /// Why it cannot do the cell.
    pub cannot: Option<String>,
    /// How it failed.
    pub broken: Option<String>,
    pub rounds: Vec<Round>,
    pub paced: Vec<Paced>,
    /// System calls and context switches per message.
    pub calls: Option<f64>,
    pub switches: Option<f64>,
    /// User instructions per message, counted by callgrind.
    pub instructions_user: Option<f64>,
}

/// One timed run. What is used is the server's, per message.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    pub round: usize,
    pub seconds: f64,
    pub messages_per_second: f64,
    pub cpu_ns: f64,
    /// What a message cost in each slice of the round, in the run's measure. The slices of a pass are one place in the rounds of
    /// all contenders.
    pub slices: Vec<f64>,
    pub hardware: Option<Hard>,
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
    pub peak_rss_kib: f64,
    /// Datagrams that did not come back in time.
    pub lost: f64,
    /// Where something disturbs the messages: their p99 before it.
    pub calm_p99_us: Option<f64>,
    /// The share of a processor that the hypervisor took away.
    pub stolen: f64,
    pub idle: Option<IdleMemory>,
}

/// Bytes per idle connection.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct IdleMemory {
    /// The server's resident memory.
    pub server: f64,
    /// The whole machine's: the server, the kernel for both ends, the load.
    pub machine: f64,
}

/// One run at a fixed rate; latency counts from when a message should have been sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Paced {
    pub messages_per_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
}

impl Run {
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let text = serde_json::to_string(self).map_err(io::Error::other)?;
        fs::write(path, text + "\n")
    }

    pub fn read(path: &Path) -> io::Result<Self> {
        let with_path = |error: String| io::Error::other(format!("{}: {error}", path.display()));
        let text = fs::read_to_string(path).map_err(|error| with_path(error.to_string()))?;
        serde_json::from_str(&text).map_err(|error| with_path(error.to_string()))
    }
}

impl CellResult {
    pub fn contender(&self, name: &str) -> Option<&ContenderResult> {
        self.contenders.iter().find(|each| each.name == name)
    }
}

impl ContenderResult {
    pub fn has_not_failed(&self) -> bool {
        self.cannot.is_none() && self.broken.is_none()
    }

    /// What a message cost in each slice, pass by pass over all rounds.
    pub fn slices(&self) -> Vec<f64> {
        let slices = self.rounds.iter().flat_map(|round| &round.slices);
        slices.copied().collect()
    }

    /// Instructions of a message, user and kernel, in each round that has them.
    pub fn instructions(&self) -> Vec<f64> {
        (self.rounds.iter())
            .filter_map(|round| round.hardware)
            .map(|hard| hard.instructions_user + hard.instructions_kernel)
            .collect()
    }

    pub fn each(&self, pick: fn(&Round) -> f64) -> Vec<f64> {
        self.rounds.iter().map(pick).collect()
    }

    pub fn each_paced(&self, pick: fn(&Paced) -> f64) -> Vec<f64> {
        self.paced.iter().map(pick).collect()
    }
}
