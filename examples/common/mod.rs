//! What the examples have in common: where a server listens, how a connection's error is told. Each uses a part of it.
#![allow(dead_code)]

pub mod proxy_header;

use std::error::Error;
use std::io::{self, ErrorKind, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use ringsock::prelude::{Address, Socket};
use ringsock::{Handle, Runtime, ServeOptions, Server, Timeout};

/// How long a taken address is tried again. The kernel takes a killed process's ring apart in the background, and the accept on
/// it keeps the listener open for some milliseconds after the process is gone.
const RESTART: Duration = Duration::from_secs(1);

/// Where a server listens.
#[derive(Args, Clone)]
pub struct Listen {
    /// Where to listen; port 0 lets the kernel choose
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:50007")]
    bind: SocketAddr,
    /// Listen on a Unix socket instead; a socket left there by an earlier run is removed
    #[arg(long, value_name = "PATH", conflicts_with = "bind")]
    unix: Option<PathBuf>,
    /// Worker threads
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: u16,
    /// Let a worker with nothing to do look for completions so long before it sleeps
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    spin: u64,
}

/// The error, with what it is about.
pub fn about(error: ringsock::Error, what: &str) -> ringsock::Error {
    match error.errno() {
        Some(errno) => {
            let text = ringsock::Error::from_errno(errno).to_string();
            let text = text.split_once("] ").map_or(&*text, |(_, text)| text);
            ringsock::Error::Os {
                errno,
                message: Some(format!("{text}: {what}").into()),
            }
        }
        None => ringsock::Error::Message(format!("{error}: {what}").into()),
    }
}

/// A timeout on the command line.
pub fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    match Timeout::from(seconds).seconds() {
        Ok(_) if seconds > 0.0 => Ok(seconds),
        Ok(_) => Err("not above 0".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

impl Listen {
    /// Runs `handler` with each connection, in a fiber of its own, for as long as the process lives.
    pub fn serve<R: 'static>(
        &self,
        handler: impl Fn(Socket, Address) -> R + Send + Sync + 'static,
    ) -> ringsock::Result<()> {
        ringsock::raise_descriptor_limit();
        let listen = self.clone();
        let handler = Arc::new(handler);
        // The main thread is the first worker: with one, the process has one thread.
        let runtime = Runtime::builder()
            .workers(self.workers.into())
            .spin(Duration::from_micros(self.spin));
        let served = runtime.run(move || {
            let server = listen.start(&handler)?;
            // A closed standard output is no reason not to serve.
            let mut out = io::stdout();
            let _ = writeln!(out, "listening on {}", server.address()).and_then(|()| out.flush());
            server.wait();
            Ok(())
        });
        served.and_then(|served| served)
    }

    /// As [`serve`](Listen::serve), each connection with a timeout. What `handler` fails with is a line on standard error and the
    /// end of its connection only.
    pub fn serve_and_report(
        &self,
        program: &'static str,
        timeout: f64,
        handler: impl Fn(Socket) -> Result<(), Box<dyn Error>> + Send + Sync + 'static,
    ) -> ringsock::Result<()> {
        self.serve(move |conn: Socket, peer: Address| {
            // This handle of the socket goes last: whoever sees the connection closed finds the reason reported.
            let served = conn.settimeout(timeout).map_err(Box::from);
            if let Err(error) = served.and_then(|()| handler(conn.clone())) {
                let peer = match peer.port() {
                    Some(_) => peer.to_string(),
                    None => "a client".to_owned(),
                };
                // One write for the whole line. A closed standard error is no reason not to serve.
                let line = format!("{program}: {peer}: {error}\n");
                let _ = io::stderr().write_all(line.as_bytes());
            }
        })
    }

    /// The error, and where it happened.
    fn with_address(&self, error: ringsock::Error) -> ringsock::Error {
        let address = match &self.unix {
            Some(path) => path.display().to_string(),
            None => self.bind.to_string(),
        };
        about(error, &address)
    }

    fn start<H, R>(&self, handler: &Arc<H>) -> ringsock::Result<Server>
    where
        H: Fn(Socket, Address) -> R + Send + Sync + 'static,
        R: 'static,
    {
        let handle = Handle::current().expect("in a fiber");
        let options = ServeOptions {
            nodelay: true,
            ..Default::default()
        };
        let give_up = Instant::now() + RESTART;
        loop {
            let handler = handler.clone();
            let handler = move |conn, peer| handler(conn, peer);
            let server = match &self.unix {
                Some(path) => {
                    remove_stale(path);
                    handle.serve_with(path.as_path(), options, handler)
                }
                None => handle.serve_with(self.bind, options, handler),
            };
            match server {
                Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < give_up => {
                    ringsock::sleep(0.05)?;
                }
                result => return result.map_err(|error| self.with_address(error)),
            }
        }
    }
}

/// Removes a socket that nobody listens on any more; anything else stays, and bind reports it.
pub fn remove_stale(path: &Path) {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
        let _ = std::fs::remove_file(path);
    }
}
