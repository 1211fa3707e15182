//! Echo with the crate under test, as its example `echo_server` has it.

use std::cell::RefCell;
use std::io::{self, Write};
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::{Args, ValueEnum};
use ringsock::prelude::*;
use ringsock::{CreateServer, Datagrams, DriverKind, Runtime, ServeOptions};

use super::fanout::Fanout;
use super::{ListenArgs, cannot};

/// Receives of one call.
const BATCH: usize = 32;

/// Options of this server.
#[derive(Args)]
pub struct RingsockArgs {
    #[command(flatten)]
    listen: ListenArgs,
    /// Look for completions for so long before sleeping.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    spin: u64,
    /// What carries out the operations.
    #[arg(long, value_name = "uring|epoll", default_value = "uring")]
    driver: DriverName,
}

#[derive(Clone, Copy, ValueEnum)]
enum DriverName {
    Uring,
    Epoll,
}

/// Serves until a signal ends the process: a fiber for each connection, all on one worker, which is the main thread.
pub fn serve(args: RingsockArgs) -> io::Result<()> {
    let driver = match args.driver {
        DriverName::Uring => DriverKind::Uring,
        DriverName::Epoll => DriverKind::Epoll,
    };
    let runtime = Runtime::builder()
        .workers(1)
        .driver(driver)
        .spin(Duration::from_micros(args.spin));
    let args = args.listen;
    let served = runtime.run(move || match (args.udp, args.fanout) {
        (Some(_), Some(_)) => Err(cannot("no fan-out of datagrams")),
        (Some(_), None) => datagrams(&args),
        (None, Some(size)) => fanout(&args, size),
        (None, None) => serve_streams(args, echo_into),
    });
    served.map_err(io::Error::from).and_then(|served| served)
}

/// As [`serve`], each receive into a buffer of the worker's pool.
pub fn serve_leases(args: ListenArgs) -> io::Result<()> {
    args.streams_only()?;
    let runtime = Runtime::builder().buffers(64, args.buffer.max(65_536) as usize);
    let served = runtime.run(move || serve_streams(args, echo_leases));
    served.map_err(io::Error::from).and_then(|served| served)
}

/// Serves until a signal ends the process: a thread for each connection, and no fiber.
pub fn serve_threads(args: ListenArgs) -> io::Result<()> {
    args.streams_only()?;
    let listener = listen(&args)?;
    let args = Arc::new(args);
    loop {
        let (conn, _) = listener.accept()?;
        let args = args.clone();
        let main = move || {
            prepare(&conn, &args).and_then(|()| echo(&conn, &mut vec![0; args.buffer as usize]))
        };
        thread::Builder::new().stack_size(256 * 1024).spawn(main)?;
    }
}

/// What every connection gets.
fn prepare(conn: &Socket, args: &ListenArgs) -> ringsock::Result<()> {
    if args.timeout.is_some() {
        conn.settimeout(args.timeout.map(|timeout| timeout.as_secs_f64()))?;
    }
    Ok(())
}

/// One connection: receive, send back, until the peer shuts down its side.
fn echo(conn: &Socket, buffer: &mut [u8]) -> ringsock::Result<()> {
    loop {
        let n = conn.recv_into(buffer)?;
        if n == 0 {
            return Ok(());
        }
        conn.sendall(&buffer[..n])?;
    }
}

/// The same with leases.
fn echo_leases(conn: &Socket, buffer_bytes: usize) -> ringsock::Result<()> {
    loop {
        let data = conn.recv(buffer_bytes)?;
        if data.is_empty() {
            return Ok(());
        }
        conn.sendall(&data)?;
    }
}

/// The same with a buffer of the connection's own.
fn echo_into(conn: &Socket, buffer_bytes: usize) -> ringsock::Result<()> {
    if buffer_bytes <= 4096 {
        // On the fiber's own stack, as one would write it for a thread.
        echo(conn, &mut [0; 4096][..buffer_bytes])
    } else {
        echo(conn, &mut vec![0; buffer_bytes])
    }
}

fn announce(address: &Address) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "listening on {address}")?;
    out.flush()
}

fn serve_streams(
    args: ListenArgs,
    echo: fn(&Socket, usize) -> ringsock::Result<()>,
) -> io::Result<()> {
    if let Some(path) = &args.unix {
        let _ = std::fs::remove_file(path);
    }
    let unix = args.unix.clone();
    let bind = args.bind;
    let handler = move |conn: Socket, _peer: Address| {
        prepare(&conn, &args)?;
        echo(&conn, args.buffer as usize)
    };
    let options = ServeOptions {
        backlog: 4096,
        nodelay: true,
    };
    let server = match unix {
        Some(path) => ringsock::serve_with(path.as_path(), options, handler)?,
        None => ringsock::serve_with(bind, options, handler)?,
    };
    announce(server.address())?;
    server.wait();
    Ok(())
}

/// A listener of one's own.
fn listen(args: &ListenArgs) -> io::Result<Socket> {
    let listener = if let Some(path) = &args.unix {
        let _ = std::fs::remove_file(path);
        let listener = Socket::new(AF_UNIX, SOCK_STREAM, 0)?;
        listener.bind(path.as_path())?;
        listener.listen(4096)?;
        listener
    } else {
        let options = CreateServer {
            backlog: Some(4096),
            ..CreateServer::default()
        };
        let listener = ringsock::create_server_with(args.bind, options)?;
        // Connections inherit it, which saves a call for each.
        listener.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)?;
        listener
    };
    announce(&listener.getsockname()?)?;
    Ok(listener)
}

/// The first connection that sends is the publisher; its fiber sends to all others.
fn fanout(args: &ListenArgs, size: u32) -> io::Result<()> {
    let listener = listen(args)?;
    let everyone: Rc<RefCell<Vec<Socket>>> = Rc::default();
    let publisher = Rc::new(RefCell::new(Fanout::new(size)));
    for index in 0.. {
        let (conn, _) = listener.accept()?;
        prepare(&conn, args)?;
        everyone.borrow_mut().push(conn.clone());
        let (everyone, publisher) = (everyone.clone(), publisher.clone());
        let mut buffer = vec![0; args.buffer as usize];
        ringsock::spawn(move || {
            loop {
                let n = conn.recv_into(&mut buffer)?;
                if n == 0 {
                    return conn.shutdown(SHUT_RDWR);
                }
                // The publisher's fiber keeps the borrow while it sends: who meets it there is not the publisher.
                let publishes = publisher
                    .try_borrow_mut()
                    .is_ok_and(|mut publisher| publisher.is_publisher(index));
                if !publishes {
                    continue;
                }
                publisher.borrow_mut().take(&buffer[..n], |message| {
                    for other in 0..everyone.borrow().len() {
                        let subscriber = everyone.borrow()[other].clone();
                        if other != index as usize && subscriber.sendall(message).is_err() {
                            let _ = subscriber.shutdown(SHUT_RDWR);
                        }
                    }
                    Ok::<(), Error>(())
                })?;
            }
        });
    }
    Ok(())
}

fn datagrams(args: &ListenArgs) -> io::Result<()> {
    let socket = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    // Room for what a load has in flight, as the other servers have it; what is not granted shows as loss.
    let _ = socket.setsockopt(SOL_SOCKET, SO_RCVBUF, 4 << 20);
    socket.bind(args.udp.expect("an address for datagrams"))?;
    socket.settimeout(args.timeout.map(|timeout| timeout.as_secs_f64()))?;
    announce(&socket.getsockname()?)?;
    // As the example `udp_echo` has it.
    let _ = socket.set_udp_gro(true);
    let mut batch = Datagrams::new(BATCH, 65_535);
    loop {
        // Datagrams that could not be received or sent, or not in time, are lost, as datagrams may be.
        if socket.recv_many(&mut batch).is_ok() {
            let _ = socket.send_many(&batch);
        }
    }
}
