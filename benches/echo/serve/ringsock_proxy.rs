//! A proxy with the crate under test, as its example `proxy` has it: `relay` in a fiber for each connection.

use std::io::{self, Write};
use std::net::SocketAddr;

use clap::{Args, ValueEnum};
use ringsock::prelude::*;
use ringsock::{
    CreateServer, RelayMode, RelayOptions, Runtime, create_connection, create_server_with, relay,
};

use super::ListenArgs;

/// Options of this server.
#[derive(Args)]
pub struct RingsockProxyArgs {
    #[command(flatten)]
    listen: ListenArgs,
    /// Where connections go.
    #[arg(long, value_name = "HOST:PORT")]
    upstream: SocketAddr,
    /// How bytes are moved.
    #[arg(long, value_enum, default_value = "auto")]
    mode: Mode,
}

#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    Auto,
    Copy,
    Splice,
}

/// Seconds after which a silent connection ends: the example's.
const IDLE_TIMEOUT: f64 = 60.0;

pub fn serve(args: &RingsockProxyArgs) -> io::Result<()> {
    args.listen.streams_only()?;
    let options = RelayOptions {
        idle_timeout: IDLE_TIMEOUT.into(),
        in_flight: args.listen.buffer as usize,
        mode: match args.mode {
            Mode::Auto => RelayMode::Auto,
            Mode::Copy => RelayMode::Copy,
            Mode::Splice => RelayMode::Splice,
        },
        ..Default::default()
    };
    let (bind, upstream) = (args.listen.bind, args.upstream);
    let served = Runtime::builder()
        .workers(1)
        .run(move || accept(bind, upstream, options));
    Ok(served??)
}

fn accept(bind: SocketAddr, upstream: SocketAddr, options: RelayOptions) -> ringsock::Result<()> {
    let create = CreateServer {
        backlog: Some(4096),
        ..Default::default()
    };
    let listener = create_server_with(bind, create)?;
    let mut out = io::stdout().lock();
    writeln!(out, "listening on {}", listener.getsockname()?)?;
    out.flush()?;
    drop(out);
    loop {
        let (client, _) = listener.accept()?;
        ringsock::spawn(move || {
            let server = create_connection(upstream)?;
            for socket in [&client, &server] {
                socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)?;
            }
            relay(&client, &server, &options)
        });
    }
}
