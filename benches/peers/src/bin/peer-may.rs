//! Echo by may: one worker, a coroutine for each connection, calls as std has them.

use std::io::{self, Read, Write};

use may::go;
use may::net::{TcpListener, UdpSocket};
use may::os::unix::net::UnixListener;
use peers::{Address, Options};

fn main() -> io::Result<()> {
    let options = peers::options();
    may::config().set_workers(1);
    // All of it in coroutines, as may's echo example has it: the calls of other threads would block these.
    go!(move || serve(options))
        .join()
        .expect("the server does not panic")
}

fn serve(options: &'static Options) -> io::Result<()> {
    match &options.address {
        Address::Tcp(address) => {
            let listener = TcpListener::bind(address)?;
            peers::listening(listener.local_addr()?)?;
            loop {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(options.timeout)?;
                stream.set_write_timeout(options.timeout)?;
                go!(move || echo(stream, options));
            }
        }
        Address::Unix(path) => {
            let listener = UnixListener::bind(path)?;
            peers::listening(path.display())?;
            loop {
                let (stream, _) = listener.accept()?;
                stream.set_read_timeout(options.timeout)?;
                stream.set_write_timeout(options.timeout)?;
                go!(move || echo(stream, options));
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
