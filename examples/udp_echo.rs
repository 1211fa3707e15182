//! A UDP echo server: many datagrams a call, and as one where the sender or the network card put them together.
//!
//!     cargo run --release --example udp_echo -- --bind 127.0.0.1:50007
//!     nc -u 127.0.0.1 50007

mod common;

use std::io::{self, Write};
use std::net::SocketAddr;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use ringsock::prelude::*;
use ringsock::signal::{SIGINT, SIGTERM, Signals};
use ringsock::{Datagrams, Handle, Runtime};

use common::about;

/// Sends every datagram back to who sent it.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Where to receive; port 0 lets the kernel choose
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:50007")]
    bind: SocketAddr,
    /// Worker threads, each with a socket of its own (SO_REUSEPORT): the kernel gives each sender to one of them
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: u16,
    /// Whether one receive may bring many datagrams of one sender (UDP_GRO)
    #[arg(long, value_enum, default_value = "auto")]
    gro: Gro,
    /// How many receives, and sends, one call makes at the most
    #[arg(long, value_name = "RECEIVES", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,
    /// Room for datagrams that wait to be received; the system may grant less
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 20, value_parser = clap::value_parser!(u32).range(2048..=1 << 30))]
    receive_buffer: u32,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Gro {
    /// Where the kernel can
    Auto,
    /// Or else do not start
    On,
    /// One receive, one datagram
    Off,
}

/// The longest UDP payload, and the most that one receive brings.
const BYTES_MAX: usize = 65_535;

/// Until the socket is closed: receive what is there, send it back.
fn echo(socket: &Socket, batch: usize) {
    let mut batch = Datagrams::new(batch, BYTES_MAX);
    loop {
        match socket.recv_many(&mut batch) {
            // What cannot be sent is lost, as datagrams may be.
            Ok(_) => drop(socket.send_many(&batch)),
            Err(error) if ends(&error) => return,
            // The machine is short of something, which others may give back.
            Err(error) => {
                let _ = writeln!(io::stderr(), "udp_echo: {error}");
                if ringsock::sleep(0.1).is_err() {
                    return;
                }
            }
        }
    }
}

/// Whether nothing more can be received.
fn ends(error: &Error) -> bool {
    matches!(error, Error::Cancelled | Error::Shutdown) || error.errno() == Some(libc::EBADF)
}

fn bind(args: &Args, address: SocketAddr) -> ringsock::Result<Socket> {
    let family = if address.is_ipv4() { AF_INET } else { AF_INET6 };
    let socket = Socket::new(family, SOCK_DGRAM, 0)?;
    socket.set_reuse_port(args.workers > 1)?;
    let _ = socket.set_recv_buffer_size(args.receive_buffer as usize);
    let has_gro = args.gro != Gro::Off && socket.set_udp_gro(true)?;
    if args.gro == Gro::On && !has_gro {
        return Err(Error::Value("this kernel has no UDP_GRO".into()));
    }
    socket
        .bind(address)
        .map_err(|error| about(error, &address.to_string()))?;
    Ok(socket)
}

fn serve(args: &Args) -> ringsock::Result<()> {
    // Watched from the start, so that a signal right after the first line ends it cleanly, too.
    let signals = Signals::new(&[SIGTERM, SIGINT])?;
    let mut sockets = vec![bind(args, args.bind)?];
    let address = sockets[0].getsockname()?;
    let taken: SocketAddr = match &address {
        Address::V4(address) => (*address).into(),
        Address::V6(address) => (*address).into(),
        other => unreachable!("{other} is no address of UDP"),
    };
    for _ in 1..args.workers {
        sockets.push(bind(args, taken)?);
    }
    let handle = Handle::current().expect("in a fiber");
    let batch = usize::from(args.batch);
    let mut echoes = Vec::new();
    for (worker, socket) in sockets.iter().cloned().enumerate() {
        echoes.push(handle.spawn_on(worker, move || echo(&socket, batch))?);
    }
    // A closed standard output is no reason not to serve.
    let mut out = io::stdout();
    let _ = writeln!(out, "listening on {address}").and_then(|()| out.flush());
    let _ = signals.wait();
    for socket in sockets {
        socket.close()?;
    }
    for echo in echoes {
        let _ = echo.join();
    }
    Ok(())
}

fn main() -> ExitCode {
    let args = Args::parse();
    // The main thread is the first worker: with one, the process has one thread.
    let runtime = Runtime::builder().workers(args.workers.into());
    match runtime.run(move || serve(&args)).and_then(|served| served) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("udp_echo: {error}");
            ExitCode::FAILURE
        }
    }
}
