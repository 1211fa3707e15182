//! Echo with the standard library: a thread for each connection, blocking calls.
#![allow(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::fd::FromRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::fanout::Fanout;
use super::{ListenArgs, Listening};

/// Stack of a connection's thread; its buffer is on the heap.
const STACK_BYTES: usize = 64 * 1024;

/// Serves until a signal ends the process.
pub fn serve(args: &ListenArgs) -> io::Result<()> {
    serve_changed(args, Arc::new(|_: &mut [u8]| {}))
}

/// Serves, with `change` applied to all that is sent back.
pub fn serve_changed<C>(args: &ListenArgs, change: Arc<C>) -> io::Result<()>
where
    C: Fn(&mut [u8]) + Send + Sync + 'static,
{
    let listening = Listening::open(args)?;
    if args.udp.is_some() {
        return datagrams(&listening, args, &*change);
    }
    listening.announce()?;
    if args.unix.is_some() {
        // SAFETY: the descriptor is the listener's, and nothing else uses it.
        let listener = unsafe { UnixListener::from_raw_fd(listening.fd) };
        accept(args, change, || Ok(listener.accept()?.0))
    } else {
        // SAFETY: as above.
        let listener = unsafe { TcpListener::from_raw_fd(listening.fd) };
        accept(args, change, || Ok(listener.accept()?.0))
    }
}

/// What the two families have in common.
trait Stream: Read + Write + Send + Sized + 'static {
    fn limit(&self, timeout: Duration) -> io::Result<()>;
    fn again(&self) -> io::Result<Self>;
    fn end(&self);
}

impl Stream for TcpStream {
    fn limit(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }

    fn again(&self) -> io::Result<Self> {
        self.try_clone()
    }

    fn end(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

impl Stream for UnixStream {
    fn limit(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }

    fn again(&self) -> io::Result<Self> {
        self.try_clone()
    }

    fn end(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

/// Fan-out's connections, by number, and its publisher.
struct Everyone<S> {
    streams: Mutex<Vec<S>>,
    fanout: Mutex<Fanout>,
}

fn accept<S: Stream, C>(
    args: &ListenArgs,
    change: Arc<C>,
    next: impl Fn() -> io::Result<S>,
) -> io::Result<()>
where
    C: Fn(&mut [u8]) + Send + Sync + 'static,
{
    let everyone = args.fanout.map(|size| {
        Arc::new(Everyone {
            streams: Mutex::new(Vec::new()),
            fanout: Mutex::new(Fanout::new(size)),
        })
    });
    loop {
        let stream = match next() {
            Ok(stream) => stream,
            // The peer is gone again, or descriptors ran out: they come back when connections end.
            Err(error) if error.raw_os_error().is_some_and(super::accept_again) => continue,
            Err(error) if error.raw_os_error().is_some_and(super::accept_exhausted) => {
                thread::sleep(Duration::from_millis(10));
                continue;
            }
            Err(error) => return Err(error),
        };
        if let Some(timeout) = args.timeout {
            stream.limit(timeout)?;
        }
        let buffer = vec![0; args.buffer as usize];
        let builder = thread::Builder::new().stack_size(STACK_BYTES);
        if let Some(everyone) = &everyone {
            let index = {
                let mut streams = everyone.streams.lock().expect("no thread panics");
                streams.push(stream.again()?);
                streams.len() as u32 - 1
            };
            let everyone = everyone.clone();
            builder.spawn(move || publish(stream, buffer, index, &everyone))?;
        } else {
            let change = change.clone();
            builder.spawn(move || echo(stream, buffer, &*change))?;
        }
    }
}

/// One connection: what breaks it ends it, and is nobody's business.
fn echo<S: Stream>(
    mut stream: S,
    mut buffer: Vec<u8>,
    change: &impl Fn(&mut [u8]),
) -> io::Result<()> {
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        change(&mut buffer[..count]);
        stream.write_all(&buffer[..count])?;
    }
}

/// One connection of a fan-out: the publisher writes to all others, whose threads wait for their ends.
fn publish<S: Stream>(
    mut stream: S,
    mut buffer: Vec<u8>,
    index: u32,
    everyone: &Everyone<S>,
) -> io::Result<()> {
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            everyone.streams.lock().expect("no thread panics")[index as usize].end();
            return Ok(());
        }
        let mut fanout = everyone.fanout.lock().expect("no thread panics");
        if !fanout.is_publisher(index) {
            continue;
        }
        fanout.take(&buffer[..count], |message| {
            let mut streams = everyone.streams.lock().expect("no thread panics");
            for (other, stream) in streams.iter_mut().enumerate() {
                if other != index as usize && stream.write_all(message).is_err() {
                    stream.end();
                }
            }
            Ok::<(), io::Error>(())
        })?;
    }
}

fn datagrams(
    listening: &Listening,
    args: &ListenArgs,
    change: &impl Fn(&mut [u8]),
) -> io::Result<()> {
    if args.fanout.is_some() {
        return Err(super::cannot("no fan-out of datagrams"));
    }
    // SAFETY: the descriptor is the socket's, and nothing else uses it.
    let socket = unsafe { UdpSocket::from_raw_fd(listening.fd) };
    socket.set_read_timeout(args.timeout)?;
    socket.set_write_timeout(args.timeout)?;
    listening.announce()?;
    let mut buffer = vec![0; args.buffer as usize];
    loop {
        // A datagram that could not be received or sent, or not in time, is lost, as datagrams may be.
        if let Ok((count, peer)) = socket.recv_from(&mut buffer) {
            change(&mut buffer[..count]);
            let _ = socket.send_to(&buffer[..count], peer);
        }
    }
}
