//! Echo by may: one worker, a coroutine for each connection, calls as std has them.

use std::io::{self, Read, Write};
use std::sync::Arc;

use may::go;
use may::net::{TcpListener, UdpSocket};
use may::os::unix::net::UnixListener;
use may::sync::Mutex;
use peers::{Address, Hub, Options};

/// A connection of the fan-out: a second handle to its socket, for writing.
type Writer = Arc<Mutex<dyn Write + Send>>;
type Members = Arc<Mutex<Hub<Writer>>>;

fn main() -> io::Result<()> {
    let options = peers::options();
    may::config().set_workers(1);
    // All of it in coroutines, as may's echo example has it: the calls of other threads would block these.
    go!(move || serve(options))
        .join()
        .expect("the server does not panic")
}

fn serve(options: &'static Options) -> io::Result<()> {
    let hub = Members::default();
    match &options.address {
        Address::Tcp(address) => {
            let listener = TcpListener::bind(address)?;
            peers::listening(listener.local_addr()?)?;
            loop {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(options.timeout)?;
                stream.set_write_timeout(options.timeout)?;
                match options.fanout {
                    Some(size) => {
                        let writer = Arc::new(Mutex::new(stream.try_clone()?));
                        fanout(stream, writer, hub.clone(), size);
                    }
                    None => {
                        go!(move || echo(stream, options));
                    }
                }
            }
        }
        Address::Unix(path) => {
            let listener = UnixListener::bind(path)?;
            peers::listening(path.display())?;
            loop {
                let (stream, _) = listener.accept()?;
                stream.set_read_timeout(options.timeout)?;
                stream.set_write_timeout(options.timeout)?;
                match options.fanout {
                    Some(size) => {
                        let writer = Arc::new(Mutex::new(stream.try_clone()?));
                        fanout(stream, writer, hub.clone(), size);
                    }
                    None => {
                        go!(move || echo(stream, options));
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
                if let Ok((n, peer)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&buffer[..n], peer);
                }
            }
        }
    }
}

/// Sends back what arrives until the peer has sent everything; an error or a timeout ends the connection too.
fn echo(mut stream: impl Read + Write, options: &'static Options) -> io::Result<()> {
    let mut buffer = vec![0; options.buffer];
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..n])?;
    }
}

/// Takes the connection into the fan-out: the publisher's coroutine writes to all the others in turn.
fn fanout(mut reader: impl Read + Send + 'static, writer: Writer, hub: Members, size: usize) {
    let number = hub.lock().expect("nothing panics with it").join(writer);
    go!(move || {
        let mut message = vec![0; size];
        while reader.read_exact(&mut message).is_ok() {
            if !hub
                .lock()
                .expect("nothing panics with it")
                .publishes(number)
            {
                continue;
            }
            let others = hub.lock().expect("nothing panics with it").others(number);
            for other in others {
                // One that is gone is sent nothing.
                let _ = other
                    .lock()
                    .expect("nothing panics with it")
                    .write_all(&message);
            }
        }
        hub.lock().expect("nothing panics with it").leave(number);
    });
}
