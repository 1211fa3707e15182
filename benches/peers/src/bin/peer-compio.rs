//! Echo by compio: its default runtime, a task for each connection, buffers lent to the operation.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use compio::BufResult;
use compio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use compio::net::{TcpListener, UdpSocket, UnixListener};
use compio::runtime::Runtime;
use peers::{Address, Hub, Options};

/// Messages that may wait for one subscriber; the publisher waits for a slower one.
const WAITING: usize = 16;

type Members = Rc<RefCell<Hub<flume::Sender<Bytes>>>>;

fn main() -> io::Result<()> {
    let options = peers::options();
    Runtime::new()?.block_on(serve(options))
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
                    None => compio::runtime::spawn(echo(stream, options)).detach(),
                }
            }
        }
        Address::Unix(path) => {
            let listener = UnixListener::bind(path).await?;
            peers::listening(path.display())?;
            loop {
                let (stream, _) = listener.accept().await?;
                match options.fanout {
                    Some(size) => {
                        let (reader, writer) = stream.into_split();
                        fanout(reader, writer, hub.clone(), size);
                    }
                    None => compio::runtime::spawn(echo(stream, options)).detach(),
                }
            }
        }
        Address::Udp(address) => {
            let socket = UdpSocket::bind(address).await?;
            peers::widen_buffers(&socket);
            peers::listening(socket.local_addr()?)?;
            let mut buffer = Vec::with_capacity(options.buffer);
            loop {
                let received;
                BufResult(received, buffer) =
                    match limit(options.timeout, socket.recv_from(buffer)).await {
                        Ok(outcome) => outcome,
                        // The operation that took too long kept the buffer.
                        Err(_) => {
                            buffer = Vec::with_capacity(options.buffer);
                            continue;
                        }
                    };
                if let Ok((_, peer)) = received {
                    buffer = match limit(options.timeout, socket.send_to(buffer, peer)).await {
                        Ok(BufResult(_, buffer)) => buffer,
                        Err(_) => Vec::with_capacity(options.buffer),
                    };
                }
                buffer.clear();
            }
        }
    }
}

/// Sends back what arrives until the peer has sent everything; an error or a timeout ends the connection too.
async fn echo(
    mut stream: impl AsyncRead + AsyncWrite,
    options: &'static Options,
) -> io::Result<()> {
    let mut buffer: Vec<u8> = Vec::with_capacity(options.buffer);
    loop {
        let BufResult(received, filled) = limit(options.timeout, stream.read(buffer)).await?;
        if received? == 0 {
            return Ok(());
        }
        let BufResult(sent, used) = limit(options.timeout, stream.write_all(filled)).await?;
        sent?;
        buffer = used;
        buffer.clear();
    }
}

/// Gives the operation this long, or any time at all.
async fn limit<T>(timeout: Option<Duration>, operation: impl Future<Output = T>) -> io::Result<T> {
    match timeout {
        Some(timeout) => (compio::time::timeout(timeout, operation).await)
            .map_err(|_| io::ErrorKind::TimedOut.into()),
        None => Ok(operation.await),
    }
}

/// Takes the connection into the fan-out: one task writes what the publisher sends, the other reads.
fn fanout(
    mut reader: impl AsyncRead + 'static,
    mut writer: impl AsyncWrite + 'static,
    hub: Members,
    size: usize,
) {
    let (sender, receiver) = flume::bounded::<Bytes>(WAITING);
    let number = hub.borrow_mut().join(sender);
    let writing = compio::runtime::spawn(async move {
        while let Ok(message) = receiver.recv_async().await {
            if writer.write_all(message).await.0.is_err() {
                break;
            }
        }
    });
    writing.detach();
    let reading = compio::runtime::spawn(async move {
        let mut buffer = Vec::with_capacity(size);
        loop {
            let BufResult(received, filled) = reader.read_exact(buffer).await;
            if received.is_err() {
                break;
            }
            if hub.borrow_mut().publishes(number) {
                let message = Bytes::copy_from_slice(&filled);
                let others = hub.borrow().others(number);
                for other in others {
                    // One that is gone is sent nothing.
                    let _ = other.send_async(message.clone()).await;
                }
            }
            buffer = filled;
            buffer.clear();
        }
        hub.borrow_mut().leave(number);
    });
    reading.detach();
}
