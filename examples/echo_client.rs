//! An echo client: sends a message, prints what comes back.
//!
//!     cargo run --release --example echo_client -- --connect 127.0.0.1:50007 "Hello, world"

mod common;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use common::{about, seconds};
use ringsock::prelude::*;

/// Sends MESSAGE to an echo server and prints what comes back.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The server's address
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:50007")]
    connect: SocketAddr,
    /// Connect to a Unix socket instead
    #[arg(long, value_name = "PATH", conflicts_with = "connect")]
    unix: Option<PathBuf>,
    /// Give up after so many seconds without progress
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds, allow_negative_numbers = true)]
    timeout: f64,
    /// What to send
    #[arg(default_value = "Hello, world")]
    message: String,
}

/// Everything the server sends back before it ends its side.
///
/// A plain thread calls here: the same calls block it, one system call each.
fn echo(args: &Args) -> ringsock::Result<Vec<u8>> {
    let family = match (&args.unix, args.connect) {
        (Some(_), _) => AF_UNIX,
        (None, SocketAddr::V4(_)) => AF_INET,
        (None, SocketAddr::V6(_)) => AF_INET6,
    };
    let socket = Socket::new(family, SOCK_STREAM, 0)?;
    socket.settimeout(args.timeout)?;
    match &args.unix {
        Some(path) => socket
            .connect(path.as_path())
            .map_err(|error| about(error, &path.display().to_string()))?,
        None => socket
            .connect(args.connect)
            .map_err(|error| about(error, &args.connect.to_string()))?,
    }
    // A second thread sends, so that a message larger than the buffers on the way cannot block both ends.
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            socket.sendall(args.message.as_bytes())?;
            socket.shutdown(SHUT_WR)
        });
        let mut echoed = Vec::new();
        loop {
            let data = socket.recv(65_536)?;
            if data.is_empty() {
                break;
            }
            echoed.extend_from_slice(&data);
        }
        sender
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(echoed)
    })
}

fn main() -> ExitCode {
    let args = Args::parse();
    let echoed = match echo(&args) {
        Ok(echoed) => echoed,
        Err(error) => {
            eprintln!("echo_client: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut out = std::io::stdout().lock();
    if out
        .write_all(&echoed)
        .and_then(|()| out.write_all(b"\n"))
        .is_err()
    {
        return ExitCode::FAILURE;
    }
    if echoed != args.message.as_bytes() {
        eprintln!("echo_client: what came back is not what was sent");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
