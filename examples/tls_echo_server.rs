//! A TLS echo server: rustls, unchanged, over a `Socket`, one fiber for each connection.
//!
//!     cargo run --release --example tls_echo_server -- --bind 127.0.0.1:50007 --write-cert cert.pem
//!     openssl s_client -connect 127.0.0.1:50007 -CAfile cert.pem -verify_return_error -quiet

mod common;

use std::error::Error;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use common::{Listen, seconds};
use ringsock::Socket;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// Sends back what it receives over TLS 1.2 or 1.3, on every connection at once.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    listen: Listen,
    /// Close a connection that is silent, does not read, or has not shaken hands, for so long
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds, allow_negative_numbers = true)]
    timeout: f64,
    /// The certificate chain, its own certificate first; without it, one for localhost is made at start
    #[arg(long, value_name = "PEM", requires = "key")]
    cert: Option<PathBuf>,
    /// The certificate's private key
    #[arg(long, value_name = "PEM", requires = "cert")]
    key: Option<PathBuf>,
    /// Where to write the certificate that is made at start, for clients to trust
    #[arg(long, value_name = "PATH", conflicts_with = "cert")]
    write_cert: Option<PathBuf>,
}

/// One connection: a handshake, then receive and send back until the peer ends its side.
///
/// The smallest stack on which all of this works was 52 KiB in a debug build and 28 KiB in a release build (TLS 1.3, with
/// P-256, P-384 or RSA-4096 keys, 16 KiB of it the buffer), so the 256 KiB of every fiber are plenty.
fn echo(conn: Socket, config: Arc<ServerConfig>, timeout: f64) -> Result<(), Box<dyn Error>> {
    let mut stream = StreamOwned::new(ServerConnection::new(config)?, conn);
    // The socket's timeout bounds each wait. A handshake of one byte now and then would go on for ever: this bounds all of it.
    ringsock::timeout(timeout, || Ok(stream.conn.complete_io(&mut stream.sock)?))
        .map_err(|error| format!("handshake: {error}"))?;
    let echoed = send_back(&mut stream);
    // Whatever ended it, the peer learns that nothing is missing from what it got.
    stream.conn.send_close_notify();
    let ended = stream.flush();
    match echoed.and(ended) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err("no close_notify".into()),
        result => Ok(result?),
    }
}

fn send_back(stream: &mut (impl Read + Write)) -> io::Result<()> {
    let mut buffer = [0; 16 * 1024];
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..n])?;
        stream.flush()?;
    }
}

fn config(args: &Args) -> Result<ServerConfig, Box<dyn Error>> {
    let (chain, key) = match (&args.cert, &args.key) {
        (Some(cert), Some(key)) => (certificates(cert)?, private_key(key)?),
        _ => {
            let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
            let made = rcgen::generate_simple_self_signed(names)?;
            if let Some(path) = &args.write_cert {
                fs::write(path, made.cert.pem()).map_err(|error| about(path, error))?;
            }
            let key = PrivateKeyDer::try_from(made.signing_key.serialize_der())?;
            (vec![made.cert.der().clone()], key)
        }
    };
    let config = ServerConfig::builder().with_no_client_auth();
    Ok(config.with_single_cert(chain, key)?)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    match chain {
        Ok(chain) if chain.is_empty() => Err(about(path, "no certificate in it")),
        chain => chain.map_err(|error| about(path, error)),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| match error {
        pem::Error::NoItemsFound => about(path, "no private key in it"),
        error => about(path, error),
    })
}

fn about(path: &Path, error: impl std::fmt::Display) -> String {
    format!("{}: {error}", path.display())
}

fn serve(args: &Args) -> Result<(), Box<dyn Error>> {
    let config = Arc::new(config(args)?);
    let timeout = args.timeout;
    let handler = move |conn| echo(conn, config.clone(), timeout);
    Ok(args
        .listen
        .serve_and_report("tls_echo_server", timeout, handler)?)
}

fn main() -> ExitCode {
    match serve(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tls_echo_server: {error}");
            ExitCode::FAILURE
        }
    }
}
