//! Echo by glommio: one executor, a task for each connection, buffers borrowed.

use std::io;
use std::time::Duration;

use futures_lite::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use glommio::net::{TcpListener, UdpSocket, UnixListener};
use glommio::{GlommioError, LocalExecutorBuilder, Placement};
use peers::{Address, Options};

fn main() -> io::Result<()> {
    let options = peers::options();
    // Not pinned here: whoever starts the program says on which core it runs.
    let executor = LocalExecutorBuilder::new(Placement::Unbound).make()?;
    executor.run(serve(options))
}

async fn serve(options: &'static Options) -> io::Result<()> {
    match &options.address {
        Address::Tcp(address) => {
            let listener = TcpListener::bind(address)?;
            peers::listening(listener.local_addr()?)?;
            loop {
                let stream = listener.accept().await?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(options.timeout)?;
                stream.set_write_timeout(options.timeout)?;
                glommio::spawn_local(echo(stream, options, None)).detach();
            }
        }
        Address::Unix(path) => {
            let listener = UnixListener::bind(path)?;
            peers::listening(path.display())?;
            loop {
                let stream = listener.accept().await?;
                // Only TCP and UDP have timeouts of their own.
                glommio::spawn_local(echo(stream, options, options.timeout)).detach();
            }
        }
        Address::Udp(address) => {
            let socket = UdpSocket::bind(address)?;
            socket.set_read_timeout(options.timeout)?;
            socket.set_write_timeout(options.timeout)?;
            peers::listening(socket.local_addr()?)?;
            let mut buffer = vec![0; options.buffer];
            loop {
                // Where it took too long there is nothing to answer, so the next one is waited for.
                if let Ok((n, peer)) = socket.recv_from(&mut buffer).await {
                    let _ = socket.send_to(&buffer[..n], peer).await;
                }
            }
        }
    }
}

/// Sends back what arrives until the peer has sent everything; an error or a timeout ends the connection too.
///
/// `timeout` is for streams that have none of their own.
async fn echo(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    options: &'static Options,
    timeout: Option<Duration>,
) -> io::Result<()> {
    let mut buffer = vec![0; options.buffer];
    loop {
        let n = limit(timeout, stream.read(&mut buffer)).await?;
        if n == 0 {
            return Ok(());
        }
        limit(timeout, stream.write_all(&buffer[..n])).await?;
    }
}

/// Gives the operation this long, or any time at all.
async fn limit<T>(
    timeout: Option<Duration>,
    operation: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    match timeout {
        Some(timeout) => {
            let operation = async { operation.await.map_err(GlommioError::from) };
            Ok(glommio::timer::timeout(timeout, operation).await?)
        }
        None => operation.await,
    }
}
