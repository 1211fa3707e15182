//! Echo by tokio-uring: its default runtime, a task for each connection, buffers lent to the operation.

use std::cell::RefCell;
use std::io;
use std::net::Shutdown;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use peers::{Address, Hub, Options};
use tokio::sync::mpsc;
use tokio_uring::BufResult;
use tokio_uring::buf::{BoundedBuf, BoundedBufMut};
use tokio_uring::net::{TcpListener, TcpStream, UdpSocket, UnixStream};

/// Messages that may wait for one subscriber; the publisher waits for a slower one.
const WAITING: usize = 16;

type Members = Rc<RefCell<Hub<mpsc::Sender<Bytes>>>>;

fn main() -> io::Result<()> {
    let options = peers::options();
    tokio_uring::start(serve(options))
}

async fn serve(options: &'static Options) -> io::Result<()> {
    let hub = Members::default();
    match &options.address {
        Address::Tcp(address) => {
            let listener = TcpListener::bind(*address)?;
            peers::listening(listener.local_addr()?)?;
            loop {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                match options.fanout {
                    Some(size) => fanout(stream, hub.clone(), size),
                    None => {
                        tokio_uring::spawn(echo(stream, options));
                    }
                }
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
                let stream = UnixStream::from_std(stream);
                match options.fanout {
                    Some(size) => fanout(stream, hub.clone(), size),
                    None => {
                        tokio_uring::spawn(echo(stream, options));
                    }
                }
            }
        }
        Address::Udp(address) => {
            let socket = UdpSocket::bind(*address).await?;
            peers::widen_buffers(&socket);
            peers::listening(socket.local_addr()?)?;
            let mut buffer = vec![0; options.buffer];
            loop {
                // An operation that is dropped goes on and would swallow a datagram, so the same one is waited for again.
                let mut receive = pin!(socket.recv_from(buffer));
                let received;
                (received, buffer) = loop {
                    if let Ok(outcome) = limit(options.timeout, receive.as_mut()).await {
                        break outcome;
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
    async fn read<B: BoundedBufMut>(&self, buffer: B) -> BufResult<usize, B>;
    async fn write_all<B: BoundedBuf>(&self, buffer: B) -> BufResult<(), B>;
    fn shutdown(&self) -> io::Result<()>;
}

impl Stream for TcpStream {
    async fn read<B: BoundedBufMut>(&self, buffer: B) -> BufResult<usize, B> {
        self.read(buffer).await
    }
    async fn write_all<B: BoundedBuf>(&self, buffer: B) -> BufResult<(), B> {
        self.write_all(buffer).await
    }
    fn shutdown(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Both)
    }
}

impl Stream for UnixStream {
    async fn read<B: BoundedBufMut>(&self, buffer: B) -> BufResult<usize, B> {
        self.read(buffer).await
    }
    async fn write_all<B: BoundedBuf>(&self, buffer: B) -> BufResult<(), B> {
        self.write_all(buffer).await
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

/// Takes the connection into the fan-out: one task writes what the publisher sends, the other reads.
fn fanout(stream: impl Stream + 'static, hub: Members, size: usize) {
    let stream = Rc::new(stream);
    let writer = stream.clone();
    let (sender, mut receiver) = mpsc::channel::<Bytes>(WAITING);
    let number = hub.borrow_mut().join(sender);
    tokio_uring::spawn(async move {
        while let Some(message) = receiver.recv().await {
            if writer.write_all(message).await.0.is_err() {
                break;
            }
        }
    });
    tokio_uring::spawn(async move {
        let mut buffer = vec![0; size];
        let mut filled = 0;
        loop {
            let (received, slice) = stream.read(buffer.slice(filled..)).await;
            buffer = slice.into_inner();
            match received {
                Err(_) | Ok(0) => break,
                Ok(n) => filled += n,
            }
            if filled < size {
                continue;
            }
            filled = 0;
            if hub.borrow_mut().publishes(number) {
                let message = Bytes::copy_from_slice(&buffer);
                let others = hub.borrow().others(number);
                for other in others {
                    // One that is gone is sent nothing.
                    let _ = other.send(message.clone()).await;
                }
            }
        }
        hub.borrow_mut().leave(number);
    });
}
