//! An echo server: one fiber for each connection, in straight-line blocking code.
//!
//!     cargo run --release --example echo_server -- --bind 127.0.0.1:50007
//!     nc 127.0.0.1 50007

use std::io::{ErrorKind, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use ringsock::prelude::*;
use ringsock::{Handle, Runtime, Server, Timeout};

/// Sends back what it receives, on every connection at once.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Where to listen; port 0 lets the kernel choose
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:50007")]
    bind: SocketAddr,
    /// Listen on a Unix socket instead; a socket left there by an earlier run is removed
    #[arg(long, value_name = "PATH", conflicts_with = "bind")]
    unix: Option<PathBuf>,
    /// Worker threads
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: u16,
    /// How to receive
    #[arg(long, value_enum, default_value = "into")]
    mode: Mode,
    /// Close a connection that is silent, or does not read, for so long
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<f64>,
    /// Bytes of each connection's buffer
    #[arg(long, value_name = "BYTES", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    buffer: u32,
}

/// How long a taken address is tried again. The kernel takes a killed process's ring apart in the background, and the accept on
/// it keeps the listener open for some milliseconds after the process is gone.
const RESTART: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Mode {
    /// recv_into a buffer of the connection's own
    Into,
    /// a pool buffer that the kernel picks when data arrives
    Lease,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    match Timeout::from(seconds).seconds() {
        Ok(_) if seconds > 0.0 => Ok(seconds),
        Ok(_) => Err("not above 0".to_owned()),
        Err(error) => Err(error.to_string()),
    }
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

fn start(args: &Args) -> ringsock::Result<Server> {
    let handle = Handle::current().expect("in a fiber");
    let timeout = args.timeout;
    let buffer_bytes = args.buffer as usize;
    let handler = move |conn: Socket, _peer: Address| {
        if conn.family() != AF_UNIX {
            conn.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)?;
        }
        if timeout.is_some() {
            conn.settimeout(timeout)?;
        }
        if buffer_bytes <= 4096 {
            // On the fiber's own stack, as one would write it for a thread.
            echo(&conn, &mut [0; 4096][..buffer_bytes])
        } else {
            echo(&conn, &mut vec![0; buffer_bytes])
        }
    };
    let give_up = Instant::now() + RESTART;
    loop {
        let server = match &args.unix {
            Some(path) => {
                remove_stale(path);
                handle.serve(path.as_path(), handler)
            }
            None => handle.serve(args.bind, handler),
        };
        match server {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < give_up => {
                ringsock::sleep(0.05)?;
            }
            result => return result,
        }
    }
}

/// Removes a socket that nobody listens on any more; anything else stays, and bind reports it.
fn remove_stale(path: &std::path::Path) {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
        let _ = std::fs::remove_file(path);
    }
}

fn serve(args: &Args) -> ringsock::Result<()> {
    if args.mode == Mode::Lease {
        return Err(Error::Message(
            "--mode lease is not there yet: this version receives into each connection's own buffer (--mode into)".into(),
        ));
    }
    let server = start(args)?;
    // A closed standard output is no reason not to serve.
    let mut out = std::io::stdout();
    let _ = writeln!(out, "listening on {}", server.address()).and_then(|()| out.flush());
    server.wait();
    Ok(())
}

fn main() -> ExitCode {
    let args = Args::parse();
    ringsock::raise_descriptor_limit();
    // The main thread is the first worker: with one, the process has one thread.
    let runtime = Runtime::builder().workers(args.workers.into());
    match runtime.run(move || serve(&args)).and_then(|served| served) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("echo_server: {error}");
            ExitCode::FAILURE
        }
    }
}
