//! An echo server that receives into buffers of one bounded pool: the `recv_into` buffer-pool pattern.
//!
//!     cargo run --release --example buffer_pool -- --bind 127.0.0.1:50007 --buffers 64
//!     nc 127.0.0.1 50007
//!
//! A connection takes a buffer when something is there to be received, and gives it away to be sent back. So an idle connection holds
//! none, memory is bounded by the pool however many connections there are, and while all buffers are out, connections wait for one
//! instead of failing. Large messages of other machines are sent back without a copy.

mod common;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use ringsock::prelude::*;
use ringsock::signal::{SIGINT, SIGTERM, Signals};
use ringsock::{BufferPool, Handle, Runtime, ZeroCopy, raise_descriptor_limit, wait_readable};

use common::{about, seconds};

/// Sends back what it receives, through buffers of a pool.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Where to listen; port 0 lets the kernel choose
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50007")]
    bind: std::net::SocketAddr,
    /// Worker threads
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: u16,
    /// Buffers of the pool, which all workers share
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    buffers: u32,
    /// Bytes of each buffer
    #[arg(long, value_name = "BYTES", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    buffer: u32,
    /// Close a connection that is silent, or does not read, for so long
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "60", allow_negative_numbers = true)]
    timeout: f64,
    /// When to send large buffers without a copy
    #[arg(long, value_enum, default_value = "adaptive")]
    zero_copy: When,
}

#[derive(Clone, Copy, ValueEnum)]
enum When {
    /// To other machines, where it pays
    Adaptive,
    /// Whatever the kernel reports, to this machine too
    Always,
    Never,
}

/// One connection, until the peer shuts down its side.
fn echo(
    conn: &Socket,
    pool: &BufferPool,
    buffer_bytes: usize,
    timeout: f64,
) -> ringsock::Result<()> {
    loop {
        // No buffer is held while nothing is there.
        ringsock::timeout(timeout, || wait_readable(conn))?;
        let mut buf = pool.take(buffer_bytes)?;
        let n = conn.recv_into(&mut buf)?;
        if n == 0 {
            return Ok(());
        }
        buf.truncate(n);
        // Given away: it goes home when the kernel is done with it.
        conn.sendall_buf(buf.into())?;
    }
}

fn serve(args: Args) -> ringsock::Result<()> {
    raise_descriptor_limit();
    let buffer_bytes = args.buffer as usize;
    let pool = BufferPool::builder()
        .buffers(args.buffers as usize, buffer_bytes)
        .build()?;
    let runtime = Runtime::builder()
        .workers(args.workers.into())
        .zero_copy(match args.zero_copy {
            When::Adaptive => ZeroCopy::Adaptive,
            When::Always => ZeroCopy::Always,
            When::Never => ZeroCopy::Never,
        });
    // Before the first line tells anybody that they may come.
    let signals = Signals::new(&[SIGTERM, SIGINT])?;
    let home = pool.clone();
    let served: ringsock::Result<ringsock::Result<Handle>> = runtime.run(move || {
        let handle = Handle::current().expect("in a fiber");
        let handler = move |conn: Socket, _peer: Address| {
            conn.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)?;
            conn.settimeout(args.timeout)?;
            echo(&conn, &pool, buffer_bytes, args.timeout)
        };
        let server = handle
            .serve(args.bind, handler)
            .map_err(|error| about(error, &args.bind.to_string()))?;
        // A closed standard output is no reason not to serve.
        let mut out = io::stdout();
        let _ = writeln!(out, "listening on {}", server.address()).and_then(|()| out.flush());
        signals.wait()?;
        server.stop();
        Ok(handle)
    });
    let handle = served??;
    let total =
        |count: fn(&ringsock::Metrics) -> u64| handle.metrics().iter().map(count).sum::<u64>();
    eprintln!(
        "buffer_pool: {} of {} buffers are home; {} sends without a copy, {} of them copied after all",
        home.available(buffer_bytes),
        args.buffers,
        total(|metrics| metrics.zero_copy_sends),
        total(|metrics| metrics.zero_copy_copied),
    );
    if let Some(why) = home.unregistered() {
        eprintln!("buffer_pool: unregistered: {why}");
    }
    Ok(())
}

fn main() -> ExitCode {
    match serve(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("buffer_pool: {error}");
            ExitCode::FAILURE
        }
    }
}
