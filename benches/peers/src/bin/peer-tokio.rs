//! Echo by tokio: the current-thread runtime, a task for each connection, buffers borrowed.

use std::io;
use std::time::Duration;

use peers::{Address, Options};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket, UnixListener};

fn main() -> io::Result<()> {
    let options = peers::options();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(options))
}

async fn serve(options: &'static Options) -> io::Result<()> {
    match &options.address {
        Address::Tcp(address) => {
            let listener = TcpListener::bind(address).await?;
            peers::listening(listener.local_addr()?)?;
            loop {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                tokio::spawn(echo(stream, options));
            }
        }
        Address::Unix(path) => {
            let listener = UnixListener::bind(path)?;
            peers::listening(path.display())?;
            loop {
                let (stream, _) = listener.accept().await?;
                tokio::spawn(echo(stream, options));
            }
        }
        Address::Udp(address) => {
            let socket = UdpSocket::bind(address).await?;
            peers::listening(socket.local_addr()?)?;
            let mut buffer = vec![0; options.buffer];
            loop {
                // Where it took too long there is nothing to answer, so the next one is waited for.
                if let Ok((n, peer)) = limit(options.timeout, socket.recv_from(&mut buffer)).await {
                    let _ = limit(options.timeout, socket.send_to(&buffer[..n], peer)).await;
                }
            }
        }
    }
}

/// Sends back what arrives until the peer has sent everything; an error or a timeout ends the connection too.
async fn echo(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    options: &'static Options,
) -> io::Result<()> {
    let mut buffer = vec![0; options.buffer];
    loop {
        let n = limit(options.timeout, stream.read(&mut buffer)).await?;
        if n == 0 {
            return Ok(());
        }
        limit(options.timeout, stream.write_all(&buffer[..n])).await?;
    }
}

/// Gives the operation this long, or any time at all.
async fn limit<T>(
    timeout: Option<Duration>,
    operation: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    match timeout {
        Some(timeout) => tokio::time::timeout(timeout, operation).await?,
        None => operation.await,
    }
}
