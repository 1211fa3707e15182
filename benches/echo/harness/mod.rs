//! The harness: runs contenders and loads against one another and reports.

use std::process::ExitCode;

use clap::Args;

/// Options of the harness.
#[derive(Args)]
pub struct HarnessArgs {}

/// Runs the comparison.
pub fn run(_args: HarnessArgs) -> ExitCode {
    ExitCode::SUCCESS
}
