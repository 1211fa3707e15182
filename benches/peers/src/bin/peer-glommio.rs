//! Echo by glommio: one executor, a task for each connection, buffers borrowed.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use futures_lite::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use glommio::channels::local_channel::{self, LocalSender};
use glommio::net::{TcpListener, UdpSocket, UnixListener};
use glommio::{GlommioError, LocalExecutorBuilder, Placement};
use peers::{Address, Hub, Options};

/// Messages that may wait for one subscriber; the publisher waits for a slower one.
const WAITING: usize = 16;

type Members = Rc<RefCell<Hub<Rc<LocalSender<Rc<[u8]>>>>>>;

fn main() -> io::Result<()> {
    let options = peers::options();
    // Not pinned here: whoever starts the program says on which core it runs.
    let executor = LocalExecutorBuilder::new(Placement::Unbound).make()?;
    executor.run(serve(options))
}

async fn serve(options: &'static Options) -> io::Result<()> {
    let hub = Members::default();
    match &options.address {
        Address::Tcp(address) => {
            let listener = TcpListener::bind(address)?;
            peers::listening(listener.local_addr()?)?;
            loop {
                let stream = listener.accept().await?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(options.timeout)?;
                stream.set_write_timeout(options.timeout)?;
                match options.fanout {
                    Some(size) => fanout(stream, hub.clone(), size),
                    None => {
                        glommio::spawn_local(echo(stream, options, None)).detach();
                    }
                }
            }
        }
        Address::Unix(path) => {
            let listener = UnixListener::bind(path)?;
            peers::listening(path.display())?;
            loop {
                let stream = listener.accept().await?;
                match options.fanout {
                    Some(size) => fanout(stream, hub.clone(), size),
                    None => {
                        // Only TCP and UDP have timeouts of their own.
                        glommio::spawn_local(echo(stream, options, options.timeout)).detach();
                    }
                }
            }
        }
        Address::Udp(address) => {
            let socket = UdpSocket::bind(address)?;
            peers::widen_buffers(&socket);
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

/// Takes the connection into the fan-out: one task writes what the publisher sends, the other reads.
fn fanout(stream: impl AsyncRead + AsyncWrite + Unpin + 'static, hub: Members, size: usize) {
    let (mut reader, mut writer) = futures_lite::io::split(stream);
    let (sender, receiver) = local_channel::new_bounded::<Rc<[u8]>>(WAITING);
    let number = hub.borrow_mut().join(Rc::new(sender));
    let writing = glommio::spawn_local(async move {
        while let Some(message) = receiver.recv().await {
            if writer.write_all(&message).await.is_err() {
                break;
            }
        }
    });
    writing.detach();
    let reading = glommio::spawn_local(async move {
        let mut buffer = vec![0; size];
        while reader.read_exact(&mut buffer).await.is_ok() {
            if !hub.borrow_mut().publishes(number) {
                continue;
            }
            let message: Rc<[u8]> = buffer.as_slice().into();
            let others = hub.borrow().others(number);
            for other in others {
                // One that is gone is sent nothing.
                let _ = other.send(message.clone()).await;
            }
        }
        hub.borrow_mut().leave(number);
    });
    reading.detach();
}
