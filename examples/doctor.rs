//! Tells what ringsock finds on this machine, and what to change where something is missing.
//!
//!     cargo run --release --example doctor

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use ringsock::Features;

/// Prints which driver ringsock uses here, io_uring or epoll, which features the kernel offers for it, and what would turn on the
/// others. Exits with 1 if ringsock cannot run here.
#[derive(Parser)]
#[command(version)]
struct Args {}

fn main() -> ExitCode {
    let Args {} = Args::parse();
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut out = std::io::stdout();
    // A closed standard output changes nothing about the verdict, which is the exit code.
    let _ = writeln!(
        out,
        "ringsock {} on Linux {}",
        env!("CARGO_PKG_VERSION"),
        release.trim()
    );
    match Features::probe() {
        Ok(features) => {
            let _ = writeln!(
                out,
                "driver: {}\n\n{:<18} {:<4} what it is for, or why it is off\n{features}",
                features.driver(),
                "feature",
                ""
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("doctor: {error}");
            ExitCode::FAILURE
        }
    }
}
