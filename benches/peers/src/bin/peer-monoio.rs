//! Echo by monoio: its io_uring driver, a task for each connection, buffers lent to the operation.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use local_sync::mpsc::bounded;
use monoio::io::{AsyncReadRent, AsyncReadRentExt, AsyncWriteRent, AsyncWriteRentExt, Splitable};
use monoio::net::udp::UdpSocket;
use monoio::net::{ListenerOpts, TcpListener, UnixListener};
use monoio::{IoUringDriver, RuntimeBuilder};
use peers::{Address, Hub, Options};

/// Messages that may wait for one subscriber; the publisher waits for a slower one.
const WAITING: usize = 16;

type Members = Rc<RefCell<Hub<bounded::Tx<Bytes>>>>;

fn main() -> io::Result<()> {
    let options = peers::options();
    // The fusion driver of monoio's examples would fall back to epoll without a word.
    let builder = RuntimeBuilder::<IoUringDriver>::new();
    match options.timeout {
        Some(_) => builder.enable_timer().build()?.block_on(serve(options)),
        None => builder.build()?.block_on(serve(options)),
    }
}

async fn serve(options: &'static Options) -> io::Result<()> {
    let hub = Members::default();
    match &options.address {
        Address::Tcp(address) => {
            let listener = TcpListener::bind(address)?;
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
                        monoio::spawn(echo(stream, options));
                    }
                }
            }
        }
        Address::Unix(path) => {
            // Since Linux 6.13 SO_REUSEPORT, on by default, is an error on a Unix socket.
            let listener =
                UnixListener::bind_with_config(path, &ListenerOpts::new().reuse_port(false))?;
            peers::listening(path.display())?;
            loop {
                let (stream, _) = listener.accept().await?;
                match options.fanout {
                    Some(size) => {
                        let (reader, writer) = stream.into_split();
                        fanout(reader, writer, hub.clone(), size);
                    }
                    None => {
                        monoio::spawn(echo(stream, options));
                    }
                }
            }
        }
        Address::Udp(address) => {
            let socket = UdpSocket::bind(address)?;
            peers::widen_buffers(&socket);
            peers::listening(socket.local_addr()?)?;
            let mut buffer = Vec::with_capacity(options.buffer);
            loop {
                let received;
                (received, buffer) = match limit(options.timeout, socket.recv_from(buffer)).await {
                    Ok(outcome) => outcome,
                    // The operation that took too long kept the buffer.
                    Err(_) => {
                        buffer = Vec::with_capacity(options.buffer);
                        continue;
                    }
                };
                if let Ok((_, peer)) = received {
                    buffer = match limit(options.timeout, socket.send_to(buffer, peer)).await {
                        Ok((_, buffer)) => buffer,
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
    mut stream: impl AsyncReadRent + AsyncWriteRent,
    options: &'static Options,
) -> io::Result<()> {
    let mut buffer: Vec<u8> = Vec::with_capacity(options.buffer);
    loop {
        let (received, filled) = limit(options.timeout, stream.read(buffer)).await?;
        if received? == 0 {
            return Ok(());
        }
        let (sent, used) = limit(options.timeout, stream.write_all(filled)).await?;
        sent?;
        buffer = used;
        buffer.clear();
    }
}

/// Gives the operation this long, or any time at all.
async fn limit<T>(timeout: Option<Duration>, operation: impl Future<Output = T>) -> io::Result<T> {
    match timeout {
        Some(timeout) => Ok(monoio::time::timeout(timeout, operation).await?),
        None => Ok(operation.await),
    }
}

/// Takes the connection into the fan-out: one task writes what the publisher sends, the other reads.
fn fanout(
    mut reader: impl AsyncReadRent + 'static,
    mut writer: impl AsyncWriteRent + 'static,
    hub: Members,
    size: usize,
) {
    let (sender, mut receiver) = bounded::channel::<Bytes>(WAITING);
    let number = hub.borrow_mut().join(sender);
    monoio::spawn(async move {
        while let Some(message) = receiver.recv().await {
            if writer.write_all(message).await.0.is_err() {
                break;
            }
        }
    });
    monoio::spawn(async move {
        let mut buffer = Vec::with_capacity(size);
        loop {
            let received;
            (received, buffer) = reader.read_exact(buffer).await;
            if received.is_err() {
                break;
            }
            if hub.borrow_mut().publishes(number) {
                let message = Bytes::copy_from_slice(&buffer);
                let others = hub.borrow().others(number);
                for other in others {
                    // One that is gone is sent nothing.
                    let _ = other.send(message.clone()).await;
                }
            }
            buffer.clear();
        }
        hub.borrow_mut().leave(number);
    });
}
