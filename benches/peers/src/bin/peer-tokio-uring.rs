//! Echo by tokio-uring: its default runtime, a task for each connection, buffers lent to the operation.

use std::io;
use std::net::Shutdown;
use std::time::Duration;

use peers::{Address, Options};
use tokio_uring::BufResult;
use tokio_uring::buf::{BoundedBuf, Slice};
use tokio_uring::net::{TcpListener, TcpStream, UdpSocket, UnixStream};

fn main() -> io::Result<()> {
    let options = peers::options();
    tokio_uring::start(serve(options))
}

async fn serve(options: &'static Options) -> io::Result<()> {
    match &options.address {
        Address::Tcp(address) => {
            let listener = TcpListener::bind(*address)?;
            peers::listening(listener.local_addr()?)?;
            loop {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                tokio_uring::spawn(echo(stream, options));
            }
        }
        Address::Unix(path) => {
            // tokio-uring's own listener sets SO_REUSEPORT, which is an error on a Unix socket since Linux 6.13.
            // Its runtime is tokio's too, so tokio's listener does; the streams are tokio-uring's.
            let listener = tokio::net::UnixListener::bind(path)?;
            peers::listening(path.display())?;
            loop {
                let (stream, _) = listener.accept().await?;
                let stream = stream.into_std()?;
                // On a non-blocking socket the ring's operations would fail where they should wait.
                stream.set_nonblocking(false)?;
                tokio_uring::spawn(echo(UnixStream::from_std(stream), options));
            }
        }
        Address::Udp(address) => {
            let socket = UdpSocket::bind(*address).await?;
            peers::listening(socket.local_addr()?)?;
            let mut buffer = vec![0; options.buffer];
            loop {
                let received;
                (received, buffer) = match limit(options.timeout, socket.recv_from(buffer)).await {
                    Ok(outcome) => outcome,
                    // The operation that took too long kept the buffer.
                    Err(_) => {
                        buffer = vec![0; options.buffer];
                        continue;
                    }
                };
                if let Ok((n, peer)) = received {
                    buffer = match limit(options.timeout, socket.send_to(buffer.slice(..n), peer))
                        .await
                    {
                        Ok((_, slice)) => slice.into_inner(),
                        Err(_) => vec![0; options.buffer],
                    };
                }
            }
        }
    }
}

/// The two kinds of stream, which share no trait.
trait Stream {
    async fn read(&self, buffer: Vec<u8>) -> BufResult<usize, Vec<u8>>;
    async fn write_all(&self, slice: Slice<Vec<u8>>) -> BufResult<(), Slice<Vec<u8>>>;
    fn shutdown(&self) -> io::Result<()>;
}

impl Stream for TcpStream {
    async fn read(&self, buffer: Vec<u8>) -> BufResult<usize, Vec<u8>> {
        self.read(buffer).await
    }
    async fn write_all(&self, slice: Slice<Vec<u8>>) -> BufResult<(), Slice<Vec<u8>>> {
        self.write_all(slice).await
    }
    fn shutdown(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Both)
    }
}

impl Stream for UnixStream {
    async fn read(&self, buffer: Vec<u8>) -> BufResult<usize, Vec<u8>> {
        self.read(buffer).await
    }
    async fn write_all(&self, slice: Slice<Vec<u8>>) -> BufResult<(), Slice<Vec<u8>>> {
        self.write_all(slice).await
    }
    fn shutdown(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Both)
    }
}

/// Echoes on the stream and closes it.
async fn echo(stream: impl Stream, options: &'static Options) -> io::Result<()> {
    let outcome = exchange(&stream, options).await;
    if outcome.is_err() {
        // An operation that took too long is not cancelled by tokio-uring: it keeps the socket open until it is done.
        let _ = stream.shutdown();
    }
    outcome
}

/// Sends back what arrives until the peer has sent everything; an error or a timeout ends it too.
async fn exchange(stream: &impl Stream, options: &'static Options) -> io::Result<()> {
    let mut buffer = vec![0; options.buffer];
    loop {
        let (received, filled) = limit(options.timeout, stream.read(buffer)).await?;
        let n = received?;
        if n == 0 {
            return Ok(());
        }
        let (sent, slice) = limit(options.timeout, stream.write_all(filled.slice(..n))).await?;
        sent?;
        buffer = slice.into_inner();
    }
}

/// Gives the operation this long, or any time at all.
async fn limit<T>(timeout: Option<Duration>, operation: impl Future<Output = T>) -> io::Result<T> {
    match timeout {
        Some(timeout) => Ok(tokio::time::timeout(timeout, operation).await?),
        None => Ok(operation.await),
    }
}
