//! User instructions per message, counted by valgrind's callgrind: exact to a part in a thousand and free of the machine's noise.
//!
//! A server is run twice, with two numbers of messages, and the difference in instructions divided by the difference in messages, so
//! that start-up and connections cancel out. Under callgrind a server is slow beside the load, so that it finds as many events
//! at once as connections and depth allow: counts are of large batches, unless there is one connection. The kernel's
//! instructions are not in it.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::cells::{Cell, Family, Kind, Lineup};
use super::contenders::{self, Contender};
use super::process::{self, Failure, Process};
use super::proxy;
use super::runner::{Runner, fresh};

/// Messages of the shorter and the longer run, of short messages; fewer of long ones.
const MESSAGES: [u64; 2] = [4_000, 16_000];
/// How long callgrind may take to write its totals.
const DUMP_TIMEOUT: Duration = Duration::from_secs(30);

/// Whether the instructions of this contender are counted in this cell: one thread, and no peer, of whose runtimes valgrind does not
/// know every system call; and no datagrams, some of which a slow server loses.
pub fn can(cell: &Cell, contender: &Contender) -> bool {
    let name = contender.name.as_str();
    let threads = name == "threads" || name == contenders::CORRUPT;
    let counted = match cell.lineup {
        Lineup::Main => true,
        Lineup::Proxy => proxy::is_ours_to_count(name),
        _ => false,
    };
    cell.kind == Kind::Echo
        && counted
        && cell.family != Family::Udp
        && !threads
        && name != contenders::AGAIN
        && !contenders::PEERS.contains(&name)
}

/// User instructions per message. `keep` is a directory for callgrind's files.
pub fn count(
    runner: &Runner,
    cell: &Cell,
    contender: &Contender,
    keep: Option<&Path>,
) -> Result<f64, Failure> {
    // The slowest part is the load's copying; connections need a few messages each.
    let scale = if cell.size > 4096 { 4 } else { 1 };
    let messages = MESSAGES.map(|messages| messages / scale + 4 * u64::from(cell.connections));
    let mut totals = [0.0; 2];
    for (messages, total) in messages.iter().zip(&mut totals) {
        let file = total_of(runner, cell, contender, *messages, total)?;
        if let Some(keep) = keep {
            fs::create_dir_all(keep)?;
            let name = format!(
                "callgrind.{}.{}.{messages}",
                cell.name,
                contender.name.replace(' ', "-")
            );
            fs::copy(file, keep.join(name))?;
        }
    }
    Ok((totals[1] - totals[0]) / (messages[1] - messages[0]) as f64)
}

/// Runs a server under callgrind for so many messages; sets the total and returns the file it is in.
fn total_of(
    runner: &Runner,
    cell: &Cell,
    contender: &Contender,
    messages: u64,
    total: &mut f64,
) -> Result<PathBuf, Failure> {
    let out = runner.scratch.join("callgrind");
    // A dump asked for comes in a file of its own.
    let dump = fresh(&runner.scratch, "callgrind.1")?;
    let prefix = runner.scratch.join("vgdb");
    let mut command: Vec<OsString> = vec![
        "valgrind".into(),
        "--tool=callgrind".into(),
        "--vgdb=yes".into(),
    ];
    command.push(joined("--callgrind-out-file=", &out));
    command.push(joined("--vgdb-prefix=", &prefix));
    let backend = runner.backend(cell)?;
    command.extend(runner.command(cell, contender, &backend, 0));
    let mut server = Process::hold(runner.server_cpu(), &command)?;
    let address = process::listen(&mut server)?;
    runner.load_all(cell, &address, messages)?;
    let asked = Command::new("vgdb")
        .arg(joined("--vgdb-prefix=", &prefix))
        .arg(format!("--pid={}", server.pid()))
        .arg("dump")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    if !asked.success() {
        return Err(Failure::Broken("vgdb did not reach callgrind".to_owned()));
    }
    let deadline = Instant::now() + DUMP_TIMEOUT;
    loop {
        let text = fs::read_to_string(&dump).unwrap_or_default();
        let found = text.lines().find_map(|line| line.strip_prefix("totals: "));
        if let Some(found) = found.and_then(|found| found.trim().parse().ok()) {
            *total = found;
            // Dropping the server kills it outright: its totals are written, and valgrind does not see a SIGTERM while a server waits in
            // io_uring_enter.
            return Ok(dump);
        }
        if Instant::now() >= deadline {
            return Err(Failure::Broken("callgrind wrote no totals".to_owned()));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn joined(option: &str, path: &Path) -> OsString {
    let mut joined = OsString::from(option);
    joined.push(path);
    joined
}
