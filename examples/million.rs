//! Parks a million fibers in a timed receive, then wakes them all, and says what that took.
//!
//! Each fiber waits for a number on a socket that it shares with others (there are not a million descriptors), sends it back and
//! ends. The main fiber holds the other ends: it sends as many numbers as there are fibers and checks that each comes back once.
//!
//! ```sh
//! cargo run --release --example million
//! cargo run --release --example million -- --fibers 200000
//! ```

use std::cell::Cell;
use std::fs;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use clap::Parser;
use ringsock::prelude::*;
use ringsock::{Handle, Runtime};

/// Parks fibers in a timed receive, wakes them all, and says what that took.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// How many fibers.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1..=4_000_000))]
    fibers: u32,

    /// The most pairs of sockets to share; fewer if the descriptor limit says so.
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..))]
    sockets: u32,

    /// The timeout of each receive, in seconds.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..))]
    timeout: u32,

    /// A fiber's stack in bytes. Smaller stacks share more page tables.
    #[arg(long, default_value_t = 16 * 1024, value_parser = clap::value_parser!(u32).range(16 * 1024..=1 << 30))]
    stack: u32,
}

/// Descriptors kept free for everything but the sockets.
const DESCRIPTORS_KEPT: u64 = 64;

/// A number in a file like /proc/self/status, in KiB.
fn kib(path: &str, name: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// What the process and the machine use.
struct Usage {
    rss_kib: u64,
    page_tables_kib: u64,
    available_kib: u64,
    vmas: usize,
}

impl Usage {
    fn now() -> Usage {
        Usage {
            rss_kib: kib("/proc/self/status", "VmRSS:"),
            page_tables_kib: kib("/proc/self/status", "VmPTE:"),
            available_kib: kib("/proc/meminfo", "MemAvailable:"),
            vmas: fs::read_to_string("/proc/self/maps").map_or(0, |maps| maps.lines().count()),
        }
    }
}

/// What one fiber does: waits for its number, sends it back, ends.
fn answer(socket: &Socket) -> ringsock::Result<()> {
    // Numbers are sent whole and received whole, so nobody gets half of one.
    let mut number = [0; 4];
    let received = socket.recv_into(&mut number)?;
    socket.sendall(&number[..received])
}

fn park_and_wake(args: &Args) -> ringsock::Result<()> {
    let descriptors = ringsock::raise_descriptor_limit().map_or(1024, |(_, raised)| raised);
    let pairs = u64::from(args.sockets.min(args.fibers))
        .min(descriptors.saturating_sub(DESCRIPTORS_KEPT) / 2)
        .max(1) as u32;
    let sockets = (0..pairs)
        .map(|_| {
            let pair = ringsock::socketpair()?;
            pair.0.settimeout(f64::from(args.timeout))?;
            Ok(pair)
        })
        .collect::<ringsock::Result<Vec<_>>>()?;
    let handle = Handle::current().expect("in a fiber");

    let before = Usage::now();
    let start = Instant::now();
    let failed: Rc<Cell<Option<Error>>> = Rc::default();
    let mut fibers = Vec::with_capacity(args.fibers as usize);
    for number in 0..args.fibers {
        let socket = sockets[(number % pairs) as usize].0.clone();
        let failed = failed.clone();
        fibers.push(ringsock::spawn(move || {
            if let Err(error) = answer(&socket) {
                failed.set(Some(error));
            }
        }));
        // Let them run in batches, so that the last one's stack is still in the cache when it starts.
        if number % 1024 == 1023 {
            ringsock::yield_now();
        }
    }
    // A parked fiber is an operation in flight.
    while handle.metrics()[0].in_flight < u64::from(args.fibers) {
        if let Some(error) = failed.take() {
            return Err(error);
        }
        ringsock::sleep(0.001)?;
    }
    let parked = start.elapsed();
    let after = Usage::now();
    report(args, pairs, parked, &before, &after);

    let start = Instant::now();
    // All numbers of one socket at once: each wakes every fiber that waits there.
    for (index, (_, ours)) in sockets.iter().enumerate() {
        let numbers: Vec<u8> = (index as u32..args.fibers)
            .step_by(pairs as usize)
            .flat_map(u32::to_ne_bytes)
            .collect();
        ours.sendall(&numbers)?;
    }
    let mut answered = vec![false; fibers.len()];
    for (index, (_, ours)) in sockets.iter().enumerate() {
        for _ in (index as u32..args.fibers).step_by(pairs as usize) {
            let mut number = [0; 4];
            ours.recv_into(&mut number)?;
            let answer = &mut answered[u32::from_ne_bytes(number) as usize];
            assert!(!std::mem::replace(answer, true), "a number came twice");
        }
    }
    assert!(
        answered.iter().all(|answered| *answered),
        "a number is missing"
    );
    for fiber in fibers {
        fiber.join().expect("no fiber panics");
    }
    println!(
        "all woke, answered and ended in {:.2} s",
        start.elapsed().as_secs_f64()
    );
    match failed.take() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn report(args: &Args, pairs: u32, parked: Duration, before: &Usage, after: &Usage) {
    let each = |kib: u64| (kib * 1024) as f64 / f64::from(args.fibers);
    let rss = after.rss_kib.saturating_sub(before.rss_kib);
    let tables = after.page_tables_kib.saturating_sub(before.page_tables_kib);
    let taken = before.available_kib.saturating_sub(after.available_kib);
    println!(
        "{} fibers parked in a receive with a timeout of {} s on {pairs} socket pairs in {:.2} s",
        args.fibers,
        args.timeout,
        parked.as_secs_f64()
    );
    println!(
        "resident memory: {:.0} bytes each, {:.2} GB in all",
        each(rss),
        after.rss_kib as f64 * 1024.0 / 1e9
    );
    println!("page tables: {:.0} bytes each", each(tables));
    println!(
        "taken from the machine, kernel included: {:.0} bytes each",
        each(taken)
    );
    println!("mappings: {}", after.vmas);
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = Runtime::builder()
        .stack_size(args.stack as usize)
        .max_fibers(args.fibers as usize + 1)
        .run(move || park_and_wake(&args))
        .and_then(|result| result);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("million: {error}");
            ExitCode::FAILURE
        }
    }
}
