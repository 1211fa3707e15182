//! An echo server: one fiber for each connection, in straight-line blocking code.
//!
//!     cargo run --release --example echo_server -- --bind 127.0.0.1:50007
//!     nc 127.0.0.1 50007

mod common;

use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use ringsock::prelude::*;

use common::{Listen, seconds};

/// Sends back what it receives, on every connection at once.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    listen: Listen,
    /// How to receive
    #[arg(long, value_enum, default_value = "into")]
    mode: Mode,
    /// Close a connection that is silent, or does not read, for so long
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true)]
    timeout: Option<f64>,
    /// Bytes of each connection's buffer, or of one receive
    #[arg(long, value_name = "BYTES", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    buffer: u32,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Mode {
    /// recv_into a buffer of the connection's own
    Into,
    /// recv into a buffer of the worker's pool, taken when data is there
    Lease,
}

/// One connection: receive, send back, until the peer shuts down its side.
fn echo(conn: &Socket, buffer: &mut [u8]) -> ringsock::Result<()> {
    loop {
        let n = conn.recv_into(buffer)?;
        if n == 0 {
            return Ok(());
        }
        conn.sendall(&buffer[..n])?;
    }
}

/// With a buffer of the connection's own. (Inlined, it would make room for that on the stack in the other mode too.)
#[inline(never)]
fn echo_into(conn: &Socket, buffer_bytes: usize) -> ringsock::Result<()> {
    if buffer_bytes <= 4096 {
        // On the fiber's own stack, as one would write it for a thread.
        echo(conn, &mut [0; 4096][..buffer_bytes])
    } else {
        echo(conn, &mut vec![0; buffer_bytes])
    }
}

/// With buffers of the worker's pool: an idle connection holds none.
fn echo_leases(conn: &Socket, buffer_bytes: usize) -> ringsock::Result<()> {
    loop {
        let data = conn.recv(buffer_bytes)?;
        if data.is_empty() {
            return Ok(());
        }
        conn.sendall(&data)?;
    }
}

fn serve(args: &Args) -> ringsock::Result<()> {
    let mode = args.mode;
    let timeout = args.timeout;
    let buffer_bytes = args.buffer as usize;
    args.listen.serve(move |conn: Socket, _peer: Address| {
        if timeout.is_some() {
            conn.settimeout(timeout)?;
        }
        match mode {
            Mode::Into => echo_into(&conn, buffer_bytes),
            Mode::Lease => echo_leases(&conn, buffer_bytes),
        }
    })
}

fn main() -> ExitCode {
    match serve(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("echo_server: {error}");
            ExitCode::FAILURE
        }
    }
}
