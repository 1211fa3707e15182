//! The harness: runs contenders and loads against one another and reports.
//!
//! A run is rounds of cells of contenders: each round goes through all cells, and in each cell all contenders are alive at once, with
//! a fresh server each, all on one processor, and a load each on another, and take turns ([`runner`]). So a cell's contenders are
//! neighbours in time, and its rounds are spread over the whole run. After the timed rounds come runs that are not timed: paced ones
//! for latency, and such as count system calls, which would slow a timed run. What came of it all is a [`json::Run`], from which
//! [`report`] and [`plot`] make everything a person reads.

mod callgrind;
mod cells;
mod contenders;
mod costs;
mod counters;
mod json;
mod machine;
mod plot;
mod process;
mod proxy;
mod report;
mod runner;
mod stats;
mod verdicts;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use cells::{Cell, Kind};
use contenders::Contender;
use json::{CellResult, ContenderResult, Run};
use process::Failure;
use runner::Runner;

/// Options of the harness.
#[derive(Args)]
pub struct HarnessArgs {
    /// The whole grid of cells.
    #[arg(long, conflicts_with = "quick")]
    all: bool,
    /// Few cells, few contenders, two rounds: finds what is broken, in under a minute.
    #[arg(long)]
    quick: bool,
    /// Only cells of these names, in which * stands for anything; taken from the whole grid.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    cells: Vec<String>,
    /// Only contenders of these names.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    contenders: Vec<String>,
    /// One more contender: a command that takes the options of `serve`.
    #[arg(long, value_name = "NAME=COMMAND", value_parser = Contender::also)]
    also: Vec<Contender>,
    /// Timed rounds [default: 8, with --quick 2, and up to 8 more of those whose ratio to epoll is not known to 1.2 %].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// List cells and contenders, and run nothing.
    #[arg(long)]
    list: bool,
    /// Where JSON, Markdown and plots go [default: a directory in Cargo's].
    #[arg(long, value_name = "DIRECTORY")]
    out: Option<PathBuf>,
    /// Where the peers' programs are, or `none` [default: benches/peers/target/release].
    #[arg(long, value_name = "DIRECTORY")]
    peers: Option<PathBuf>,
    /// Count user instructions of a message under callgrind too, of the contenders in this program.
    #[arg(long)]
    callgrind: bool,
    /// Keep callgrind's files here, for callgrind_annotate.
    #[arg(long, value_name = "DIRECTORY", requires = "callgrind")]
    keep: Option<PathBuf>,
    /// No timed rounds, only the counts.
    #[arg(long)]
    untimed: bool,
    /// Leave out the runs at a fixed rate, from which latencies come.
    #[arg(long)]
    no_latency: bool,
    /// Write benches/RESULTS.md and benches/results.
    #[arg(long, conflicts_with = "out")]
    record: bool,
    /// Report an earlier run again, instead of a new one.
    #[arg(long, value_name = "JSON")]
    from: Option<PathBuf>,
    /// Compare the ratios with an earlier run's, and fail above 5 %.
    #[arg(long, value_name = "JSON")]
    agree: Option<PathBuf>,
    /// The processor servers run on.
    #[arg(long, value_name = "CPU", default_value_t = 0)]
    server_cpu: usize,
    /// The processor loads run on.
    #[arg(long, value_name = "CPU", default_value_t = 1)]
    load_cpu: usize,
    /// Become a command on a processor: how the harness starts its processes.
    #[arg(long, value_name = "CPU", hide = true, requires = "command")]
    pin: Option<usize>,
    #[arg(last = true, hide = true, requires = "pin")]
    command: Vec<OsString>,
}

/// How often each contender has its turn in a timed round, and in one of a quick run.
const PASSES: usize = 20;
const QUICK_PASSES: usize = 4;
/// Timed rounds, unless another number is asked for, and in a quick run. Each has new processes.
const ROUNDS: usize = 8;
const QUICK_ROUNDS: usize = 2;
/// At most so many more rounds of those whose ratio to epoll is not known well enough.
const FURTHER_ROUNDS: usize = 8;

/// Runs the comparison.
pub fn run(args: HarnessArgs) -> ExitCode {
    if let Some(cpu) = args.pin {
        eprintln!("echo: {}", process::pin(cpu, &args.command));
        return ExitCode::FAILURE;
    }
    match compare(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("echo: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs or reads a run and reports it; whether all is well with it.
fn compare(args: &HarnessArgs) -> io::Result<bool> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let earlier = args.agree.as_deref().map(Run::read).transpose()?;
    let run = match &args.from {
        Some(path) => Run::read(path)?,
        None => match measure(args, root)? {
            Some(run) => run,
            None => return Ok(true),
        },
    };
    print!("{}", report::terminal(&run));
    let out = if args.record {
        root.join("benches/results")
    } else {
        let default = || Path::new(env!("CARGO_TARGET_TMPDIR")).join("echo");
        args.out.clone().unwrap_or_else(default)
    };
    fs::create_dir_all(&out)?;
    run.write(&out.join("echo.json"))?;
    let plots = plot::all(&run, &out)?;
    let (markdown, prefix) = if args.record {
        (root.join("benches/RESULTS.md"), "results/")
    } else {
        (out.join("echo.md"), "")
    };
    fs::write(&markdown, report::markdown(&run, &plots, prefix))?;
    println!(
        "\nWritten: {}, and JSON and plots in {}",
        markdown.display(),
        out.display()
    );
    let mut well = true;
    for (cell, contender, how) in verdicts::broken(&run) {
        eprintln!("echo: {contender} failed in {cell}: {how}");
        well = false;
    }
    if let Some(earlier) = earlier {
        let agreement = verdicts::agreement(&run, &earlier)?;
        println!("\n{}", agreement.sentences);
        well &= agreement.difference <= verdicts::AGREEMENT;
    }
    Ok(well)
}

/// The cells asked for.
fn chosen_cells(args: &HarnessArgs) -> io::Result<Vec<Cell>> {
    if args.cells.is_empty() {
        return Ok(if args.quick {
            cells::quick_set()
        } else if args.all {
            cells::grid()
        } else {
            cells::default_set()
        });
    }
    let mut chosen = cells::grid();
    chosen.retain(|cell| {
        let mut patterns = args.cells.iter();
        patterns.any(|pattern| matches(&cell.name, pattern))
    });
    if chosen.is_empty() {
        return Err(io::Error::other(
            "no cell has such a name; --all --list lists them",
        ));
    }
    Ok(chosen)
}

/// Whether a name is what a pattern with at most one * says.
fn matches(name: &str, pattern: &str) -> bool {
    match pattern.split_once('*') {
        None => name == pattern,
        Some((start, end)) => {
            name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
        }
    }
}

/// The contenders asked for, and a sentence about each that is missing.
fn chosen_contenders(args: &HarnessArgs, root: &Path) -> io::Result<(Vec<Contender>, Vec<String>)> {
    let built = root.join("benches/peers/target/release");
    let peers = match args.peers.as_deref() {
        Some(directory) if directory == Path::new("none") => None,
        Some(directory) => Some(directory),
        // A quick run is about this package; and whoever has not built the peers does not want them.
        None => Some(built.as_path()).filter(|built| built.exists() && !args.quick),
    };
    let (mut contenders, missing) = contenders::all(root, peers)?;
    contenders.extend(args.also.iter().cloned());
    for name in &args.contenders {
        if !contenders.iter().any(|contender| contender.name == *name) {
            return Err(io::Error::other(format!(
                "no contender is called {name}; --list lists them"
            )));
        }
    }
    contenders.retain(|contender| match args.contenders.as_slice() {
        [] if args.quick => contenders::QUICK.contains(&contender.name.as_str()),
        [] => contender.name != contenders::CORRUPT,
        names => {
            names.contains(&contender.name)
                || args.also.iter().any(|also| also.name == contender.name)
        }
    });
    Ok((contenders, missing))
}

/// Makes a run; `None` if only a list was asked for.
fn measure(args: &HarnessArgs, root: &Path) -> io::Result<Option<Run>> {
    let cells = chosen_cells(args)?;
    let (contenders, missing) = chosen_contenders(args, root)?;
    for missing in missing {
        println!("left out: {missing}");
    }
    let turns: Vec<(Cell, Vec<&Contender>)> = (cells.into_iter())
        .map(|cell| {
            let part = contenders
                .iter()
                .filter(|contender| contender.takes_part(&cell))
                .collect();
            (cell, part)
        })
        .filter(|(_, part): &(Cell, Vec<&Contender>)| !part.is_empty())
        .collect();
    if args.list {
        for (cell, part) in &turns {
            println!(
                "{:24} {}, {} messages",
                cell.name,
                cell.title(),
                cell.messages
            );
            let names: Vec<&str> = part
                .iter()
                .map(|contender| contender.name.as_str())
                .collect();
            println!("{:24}   {}", "", names.join(", "));
        }
        return Ok(None);
    }
    let (rounds, further) = match args.rounds {
        _ if args.untimed => (0, 0),
        Some(rounds) => (rounds as usize, 0),
        None if args.quick => (QUICK_ROUNDS, 0),
        None => (ROUNDS, FURTHER_ROUNDS),
    };
    let passes = if args.quick { QUICK_PASSES } else { PASSES };
    let start = Instant::now();
    let runner = Runner::new(args.server_cpu, args.load_cpu)?;
    let mut results: Vec<CellResult> = (turns.iter())
        .map(|(cell, part)| CellResult {
            cell: cell.clone(),
            offered: None,
            contenders: part.iter().map(|contender| result_of(contender)).collect(),
        })
        .collect();
    let paced_rounds = match (args.no_latency, args.quick) {
        (true, _) => 0,
        (false, true) => rounds.min(1),
        (false, false) => rounds.min(3),
    };
    let progress = progress(&turns, rounds, paced_rounds, args.callgrind);

    for round in 0..rounds {
        for (turn, result) in turns.iter().zip(&mut results) {
            let (cell, part) = turn;
            if cell.kind == Kind::Idle && round > 0 {
                progress.inc(part.len() as u64);
                continue; // Memory does not vary.
            }
            let all = vec![true; part.len()];
            round_of(&runner, &progress, turn, result, &all, round, passes);
        }
    }
    for round in rounds..rounds + further {
        for (turn, result) in turns.iter().zip(&mut results) {
            let (cell, part) = turn;
            if cell.takes_turns() {
                let open = verdicts::uncertain(result);
                progress.inc_length(part.len() as u64);
                round_of(&runner, &progress, turn, result, &open, round, passes);
            }
        }
    }
    for ((cell, part), result) in turns
        .iter()
        .zip(&mut results)
        .filter(|((cell, _), _)| paced_rounds > 0 && cell.paced())
    {
        result.offered = verdicts::offered(result);
        for round in 0..paced_rounds {
            for turn in 0..part.len() {
                let which = (turn + round) % part.len();
                let offered = result.offered;
                step(
                    &progress,
                    cell,
                    part[which],
                    &mut result.contenders[which],
                    |into| {
                        if let Some(rate) = offered {
                            into.paced.push(runner.paced(cell, part[which], rate)?);
                        }
                        Ok(())
                    },
                );
            }
        }
    }
    let uncounted = runner.uncounted();
    for ((cell, part), result) in turns.iter().zip(&mut results) {
        for (contender, into) in part.iter().zip(&mut result.contenders) {
            step(&progress, cell, contender, into, |into| {
                if uncounted.is_none() && cell.kind != Kind::Idle {
                    let (calls, switches) = runner.counted(cell, contender)?;
                    into.calls = Some(calls);
                    into.switches = Some(switches);
                }
                Ok(())
            });
            if args.callgrind && callgrind::can(cell, contender) {
                step(&progress, cell, contender, into, |into| {
                    let keep = args.keep.as_deref();
                    into.instructions_user =
                        Some(callgrind::count(&runner, cell, contender, keep)?);
                    Ok(())
                });
            }
        }
    }
    progress.set_message("spawn and switch");
    let costs = if args.cells.is_empty() && args.contenders.is_empty() && !args.untimed {
        let figures = costs::figures(if args.quick { 1 } else { rounds.max(5) });
        figures
            .into_iter()
            .map(|(name, ns)| (name.to_owned(), ns))
            .collect()
    } else {
        Vec::new()
    };
    progress.finish_and_clear();
    Ok(Some(Run {
        machine: machine::Machine::here(root),
        measure: runner.measure,
        rounds,
        uncounted,
        seconds: start.elapsed().as_secs_f64(),
        cells: results,
        costs,
    }))
}

/// A timed round of a cell, of those contenders that `open` names, by index, and that have not failed before.
fn round_of(
    runner: &Runner,
    progress: &ProgressBar,
    (cell, part): &(Cell, Vec<&Contender>),
    result: &mut CellResult,
    open: &[bool],
    round: usize,
    passes: usize,
) {
    progress.set_message(cell.name.clone());
    let start = Instant::now();
    let (able, into): (Vec<&Contender>, Vec<&mut ContenderResult>) = (part.iter())
        .zip(&mut result.contenders)
        .zip(open)
        .filter(|((_, into), open)| **open && into.has_not_failed())
        .map(|((contender, into), _)| (*contender, into))
        .unzip();
    let rounds = runner.timed(cell, &able, round, passes);
    for (into, outcome) in into.into_iter().zip(rounds) {
        let outcome = outcome.map(|timed| into.rounds.push(timed));
        tell(progress, cell, into, start, outcome);
    }
    progress.inc(part.len() as u64);
}

fn result_of(contender: &Contender) -> ContenderResult {
    ContenderResult {
        name: contender.name.clone(),
        ..ContenderResult::default()
    }
}

/// One turn of a contender, unless it has failed before; what fails stays failed, and is told at the end.
fn step(
    progress: &ProgressBar,
    cell: &Cell,
    contender: &Contender,
    result: &mut ContenderResult,
    turn: impl FnOnce(&mut ContenderResult) -> Result<(), Failure>,
) {
    if result.has_not_failed() {
        progress.set_message(format!("{}: {}", cell.name, contender.name));
        let start = Instant::now();
        let outcome = turn(result);
        tell(progress, cell, result, start, outcome);
    }
    progress.inc(1);
}

/// Keeps a failure, and tells a log of the turn where no bar can be drawn.
fn tell(
    progress: &ProgressBar,
    cell: &Cell,
    result: &mut ContenderResult,
    start: Instant,
    outcome: Result<(), Failure>,
) {
    if progress.is_hidden() {
        let seconds = start.elapsed().as_secs_f64();
        let how = outcome.as_ref().err();
        let how = how.map_or_else(String::new, |how| format!(": {how:?}"));
        eprintln!("{seconds:6.2} s  {}: {}{how}", cell.name, result.name);
    }
    match outcome {
        Ok(()) => {}
        Err(Failure::Cannot(reason)) => result.cannot = Some(reason),
        Err(Failure::Broken(how)) => result.broken = Some(how),
    }
}

/// The bar is drawn between runs only: a timer would wake up beside them.
fn progress(
    turns: &[(Cell, Vec<&Contender>)],
    rounds: usize,
    paced_rounds: usize,
    callgrind: bool,
) -> ProgressBar {
    let steps: usize = (turns.iter())
        .map(|(cell, part)| {
            let paced = if cell.paced() { paced_rounds } else { 0 };
            let counted = part
                .iter()
                .filter(|contender| callgrind && callgrind::can(cell, contender))
                .count();
            part.len() * (rounds + paced + 1) + counted
        })
        .sum();
    let style =
        ProgressStyle::with_template("{bar:40} {pos}/{len} {elapsed_precise} (left {eta}) {msg}")
            .expect("a template of known keys");
    ProgressBar::new(steps as u64).with_style(style)
}
