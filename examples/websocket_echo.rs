//! A WebSocket echo server: tungstenite, unchanged, over a `Socket`, one fiber for each connection.
//!
//!     cargo run --release --example websocket_echo -- --bind 127.0.0.1:50007
//!     python3 -m websockets ws://127.0.0.1:50007

mod common;

use std::error::Error as StdError;
use std::io::{self, ErrorKind};
use std::process::ExitCode;

use clap::Parser;
use common::{Listen, seconds};
use ringsock::Socket;
use ringsock::prelude::SHUT_WR;
use tungstenite::error::ProtocolError;
use tungstenite::handshake::HandshakeError;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tungstenite::{Error, Message, WebSocket};

/// Sends back each text and binary message it receives, and answers pings.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    listen: Listen,
    /// Close a connection that is silent, does not read, or has not shaken hands, for so long
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds, allow_negative_numbers = true)]
    timeout: f64,
    /// The longest message to take
    #[arg(long, value_name = "BYTES", default_value_t = 64 << 20, value_parser = clap::value_parser!(u32).range(1..))]
    max_message: u32,
    /// The longest frame to take; a message may have several
    #[arg(long, value_name = "BYTES", default_value_t = 16 << 20, value_parser = clap::value_parser!(u32).range(1..))]
    max_frame: u32,
}

/// Bytes received at once. Every connection has as many; tungstenite's own 128 KiB suit few connections.
const READ_BYTES: usize = 16 * 1024;

/// One connection: a handshake, then messages until either side closes. It works on 20 KiB of stack in a debug build, so the
/// 256 KiB of every fiber are plenty.
fn serve_connection(
    conn: Socket,
    config: WebSocketConfig,
    timeout: f64,
) -> Result<(), Box<dyn StdError>> {
    // The socket's timeout bounds each wait. A request of one byte now and then would go on for ever: this bounds all of it.
    let accepted = ringsock::timeout(timeout, || {
        Ok(tungstenite::accept_with_config(conn.clone(), Some(config)))
    })?;
    let mut websocket = match accepted {
        Ok(websocket) => websocket,
        Err(HandshakeError::Failure(error)) => {
            if !matches!(error, Error::Io(_)) {
                refuse(&conn, timeout);
            }
            return Err(format!("handshake: {error}").into());
        }
        Err(HandshakeError::Interrupted(_)) => {
            return Err(io::Error::from(ErrorKind::WouldBlock).into());
        }
    };
    let Err(error) = echo(&mut websocket) else {
        return Ok(());
    };
    if let Some(code) = close_code(&error) {
        let reason = error.to_string().into();
        // Why the connection ends is what the caller gets to know, not whether the peer listened to it.
        let _ = websocket.close(Some(CloseFrame { code, reason }));
        let _ = hang_up(&conn, timeout);
    }
    Err(error.into())
}

/// Answers what is no WebSocket handshake.
fn refuse(conn: &Socket, timeout: f64) {
    let response = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    let _ = conn
        .sendall(response.as_bytes())
        .and_then(|()| hang_up(conn, timeout));
}

/// Returns when the closing handshake is done.
fn echo(websocket: &mut WebSocket<Socket>) -> Result<(), Error> {
    loop {
        match websocket.read() {
            Ok(message @ (Message::Text(_) | Message::Binary(_))) => websocket.send(message)?,
            // The answers to a ping and to a close are sent by the next read.
            Ok(_) => {}
            Err(Error::ConnectionClosed) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// What to tell the peer about the error, if it can still be told: RFC 6455, section 7.4.1.
fn close_code(error: &Error) -> Option<CloseCode> {
    match error {
        Error::Utf8(_) => Some(CloseCode::Invalid),
        Error::Capacity(_) => Some(CloseCode::Size),
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => None,
        Error::Protocol(_) => Some(CloseCode::Protocol),
        Error::Io(error) if error.kind() == ErrorKind::TimedOut => Some(CloseCode::Away),
        _ => None,
    }
}

/// Ends the sending side and lets the peer finish: closing a socket with unread data would reset the connection, and the peer
/// might never read why.
fn hang_up(conn: &Socket, timeout: f64) -> ringsock::Result<()> {
    conn.shutdown(SHUT_WR)?;
    let mut rest = [0; 4096];
    ringsock::timeout(timeout, || {
        while conn.recv_into(&mut rest)? > 0 {}
        Ok(())
    })
}

fn serve(args: &Args) -> ringsock::Result<()> {
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BYTES)
        .max_message_size(Some(args.max_message as usize))
        .max_frame_size(Some(args.max_frame as usize));
    let timeout = args.timeout;
    let handler = move |conn| serve_connection(conn, config, timeout);
    args.listen
        .serve_and_report("websocket_echo", timeout, handler)
}

fn main() -> ExitCode {
    match serve(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("websocket_echo: {error}");
            ExitCode::FAILURE
        }
    }
}
