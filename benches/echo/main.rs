//! The echo benchmark: servers to compare, loads to put on them, and the harness that runs whole comparisons.
//!
//! ```text
//! cargo bench --bench echo                    the harness
//! cargo bench --bench echo -- serve …         one server
//! cargo bench --bench echo -- load …          one load
//! ```
//!
//! `serve` has the crate under test beside what one would write by hand for exactly this job: raw io_uring, epoll and
//! blocking threads. `load` drives any echo server and verifies every byte. The harness is the only part that knows both.

mod harness;
mod load;
mod serve;
mod sys;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Compares echo servers; without a subcommand, runs the comparison.
#[derive(Parser)]
#[command(name = "echo", args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    harness: harness::HarnessArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Run one server.
    Serve(serve::ServeArgs),
    /// Drive a server and measure it.
    Load(load::LoadArgs),
}

fn main() -> ExitCode {
    // `cargo bench` adds `--bench` to the arguments of every benchmark.
    let cli = Cli::parse_from(std::env::args_os().filter(|argument| argument != "--bench"));
    sys::raise_file_limit();
    match cli.command {
        None => harness::run(cli.harness),
        Some(Command::Serve(args)) => serve::serve(args),
        Some(Command::Load(args)) => load::load(args),
    }
}
