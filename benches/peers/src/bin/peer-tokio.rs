//! Echo by tokio: the current-thread runtime, a task for each connection, buffers borrowed.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use peers::{Address, Hub, Options};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket, UnixListener};
use tokio::sync::mpsc;

/// Messages that may wait for one subscriber; the publisher waits for a slower one.
const WAITING: usize = 16;

type Members = Arc<Mutex<Hub<mpsc::Sender<Arc<[u8]>>>>>;

fn main() -> io::Result<()> {
    let options = peers::options();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(options))
}

async fn serve(options: &'static Options) -> io::Result<()> {
    let hub = Members::default();
    match &options.address {
        Address::Tcp(address) => {
            let listener = TcpListener::bind(address).await?;
            peers::listening(listener.local_addr()?)?;
            loop {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                match options.fanout {
                    Some(size) => {
                        let (reader, writer) = stream.into_split();
                        fanout(reader, writer, hub.clone(), size);
                    }
                    None => {
                        tokio::spawn(echo(stream, options));
                    }
                }
            }
        }
        Address::Unix(path) => {
            let listener = UnixListener::bind(path)?;
            peers::listening(path.display())?;
            loop {
                let (stream, _) = listener.accept().await?;
                match options.fanout {
                    Some(size) => {
                        let (reader, writer) = stream.into_split();
                        fanout(reader, writer, hub.clone(), size);
                    }
                    None => {
                        tokio::spawn(echo(stream, options));
                    }
                }
            }
        }
        Address::Udp(address) => {
            let socket = UdpSocket::bind(address).await?;
            peers::widen_buffers(&socket);
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

/// Takes the connection into the fan-out: one task writes what the publisher sends, the other reads.
fn fanout(
    mut reader: impl AsyncRead + Unpin + Send + 'static,
    mut writer: impl AsyncWrite + Unpin + Send + 'static,
    hub: Members,
    size: usize,
) {
    let (sender, mut receiver) = mpsc::channel::<Arc<[u8]>>(WAITING);
    let number = hub.lock().expect("nothing panics with it").join(sender);
    tokio::spawn(async move {
        while let Some(message) = receiver.recv().await {
            if writer.write_all(&message).await.is_err() {
                break;
            }
        }
    });
    tokio::spawn(async move {
        let mut buffer = vec![0; size];
        while reader.read_exact(&mut buffer).await.is_ok() {
            if !hub
                .lock()
                .expect("nothing panics with it")
                .publishes(number)
            {
                continue;
            }
            let message: Arc<[u8]> = buffer.as_slice().into();
            let others = hub.lock().expect("nothing panics with it").others(number);
            for other in others {
                // One that is gone is sent nothing.
                let _ = other.send(message.clone()).await;
            }
        }
        hub.lock().expect("nothing panics with it").leave(number);
    });
}
