//! Traffic for minutes or hours through a server, a proxy and a network that misbehaves. Every byte is checked.
//!
//! ```sh
//! cargo run --release --example soak                                      # 10 minutes
//! cargo run --release --example soak -- --minutes 480 --plot soak.svg
//! ```
//!
//! ```text
//!   sessions ──┬──────────────────────▶ echo (TCP, Unix)
//!   (fibers)   ├─────────────▶ proxy ─▶ echo                 echo and proxy: a process of their own, whose memory and
//!              ├──▶ faults ───────────▶ echo                 descriptors are watched
//!              ├──▶ faults ──▶ proxy ─▶ echo                 faults: plain threads (faults.rs)
//!              └──▶ proxy ──▶ faults ─▶ echo
//! ```
//!
//! A session connects, sends up to 1 MiB that only it can have sent, expects it back, and ends; now and then it gives up in the
//! middle, by closing under its own writer or by cancelling it. What comes back has to be the beginning of what was sent, whatever
//! happened, and all of it where no fault was on the way. Sessions may be broken by resets and half-closes only, so there are no more
//! broken ones than cuts.
//!
//! Exits with 1 after a wrong byte, an error that nothing explains, a descriptor that was not given back or, from 30 minutes on,
//! memory that grows.

mod faults;
mod random;
mod watch;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use ringsock::prelude::*;
use ringsock::{
    RelayOptions, Result, Runtime, create_connection, raise_descriptor_limit, relay, spawn,
    timeout, yield_now,
};

use random::{Random, Text};
use watch::{Sample, descriptors, plot, sample, slope_mib_per_hour};

/// Soaks an echo server and a proxy in checked traffic, through a network that misbehaves.
#[derive(Parser, Clone)]
#[command(version)]
struct Args {
    /// How long
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Sessions at a time
    #[arg(long, default_value_t = 64)]
    sessions: usize,
    /// Workers of the server's process
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// What the sessions and the faults do; their interleaving is the machine's
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The most that memory may grow after the first fifth of the run, in MiB an hour; judged from 30 minutes on
    #[arg(long, default_value_t = 1.0)]
    slope_max: f64,
    /// Where to draw the server's memory and descriptors, as SVG
    #[arg(long, value_name = "PATH")]
    plot: Option<PathBuf>,
    /// The server's part: serves until its standard input ends
    #[arg(long, hide = true, num_args = 2, value_names = ["FAULTS", "UNIX"])]
    serve: Option<Vec<String>>,
}

/// A receive that is still without a byte after so long is stuck: no fault takes that long.
const STUCK: Duration = Duration::from_secs(60);

/// Runs as long as this, and longer, are long enough to judge the memory's growth.
const JUDGED_MINUTES: f64 = 30.0;

/// Pipes that each worker's relays may keep.
const PIPES_KEPT: usize = 64;

fn main() -> ExitCode {
    let args = Args::parse();
    let _ = raise_descriptor_limit();
    let result = match &args.serve {
        Some(places) => serve(&args, &places[0], &places[1]).map(|()| true),
        None => soak(&args),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error}");
            ExitCode::FAILURE
        }
    }
}

type Fallible<T> = std::result::Result<T, Box<dyn std::error::Error>>;

// The server's process.

fn serve(args: &Args, faults: &str, unix: &str) -> Fallible<()> {
    let faults: SocketAddr = faults.parse()?;
    let runtime = Runtime::builder().workers(args.workers).build()?;
    let handle = runtime.handle();
    let echo = handle.serve(("127.0.0.1", 0), |conn, _| echo(&conn))?;
    let unix = handle.serve(unix, |conn, _| echo_in_turn(&conn))?;
    let to_echo = echo.address().clone();
    let proxy = handle.serve(("127.0.0.1", 0), move |conn, _| pass_on(&conn, &to_echo))?;
    let to_faults = (faults.ip().to_string(), faults.port());
    let far_proxy = handle.serve(("127.0.0.1", 0), move |conn, _| {
        let (host, port) = &to_faults;
        let upstream = create_connection((host.as_str(), *port))?;
        relay(&conn, &upstream, &RelayOptions::default()).map(drop)
    })?;
    println!(
        "{} {} {}",
        echo.address(),
        proxy.address(),
        far_proxy.address()
    );
    std::io::stdin().read_to_end(&mut Vec::new())?;
    drop(unix);
    Ok(())
}

fn echo(conn: &Socket) -> Result<()> {
    thread_local! {
        static TURN: Cell<u32> = const { Cell::new(0) };
    }
    match TURN.replace(TURN.get().wrapping_add(1)) % 3 {
        0 => echo_in_turn(conn),
        1 => {
            // Leases, given away again.
            conn.settimeout(STUCK)?;
            loop {
                let data = conn.recv(32 * 1024)?;
                if data.is_empty() {
                    return Ok(());
                }
                conn.sendall_buf(data)?;
            }
        }
        _ => {
            for chunk in conn.chunks() {
                conn.sendall(&chunk?)?;
            }
            Ok(())
        }
    }
}

fn echo_in_turn(conn: &Socket) -> Result<()> {
    let mut buffer = [0; 16 * 1024];
    loop {
        match conn.recv_into(&mut buffer)? {
            0 => return Ok(()),
            count => conn.sendall(&buffer[..count])?,
        }
    }
}

fn pass_on(conn: &Socket, to: &Address) -> Result<()> {
    let upstream = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    upstream.settimeout(STUCK)?;
    upstream.connect(to)?;
    relay(conn, &upstream, &RelayOptions::default()).map(drop)
}

/// The server's process, and where its parts listen. It ends with its standard input, or when this is dropped.
struct Server {
    child: Child,
    echo: SocketAddr,
    proxy: SocketAddr,
    far_proxy: SocketAddr,
    unix: PathBuf,
}

impl Server {
    fn start(args: &Args, faults: SocketAddr) -> Fallible<Server> {
        let unix = std::env::temp_dir().join(format!("ringsock-soak-{}", std::process::id()));
        let mut child = Command::new(std::env::current_exe()?)
            .args([
                "--workers",
                &args.workers.to_string(),
                "--serve",
                &faults.to_string(),
            ])
            .arg(&unix)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let stdout = child.stdout.take().ok_or("no standard output")?;
        BufReader::new(stdout).read_line(&mut line)?;
        let mut places = line.split_whitespace().map(str::parse);
        let mut next = || places.next().ok_or("the server did not start");
        Ok(Server {
            child,
            echo: next()??,
            proxy: next()??,
            far_proxy: next()??,
            unix,
        })
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.unix);
    }
}

// The sessions.

/// Where a session goes, and whether a fault may be on the way.
#[derive(Clone)]
struct Route {
    address: Address,
    faulty: bool,
}

/// How a session ended.
enum Outcome {
    /// All came back.
    Complete,
    /// It gave up, as it meant to.
    GivenUp,
    /// The connection ended early; what had come back was right.
    Broken,
}

#[derive(Default)]
struct Tally {
    complete: u64,
    given_up: u64,
    broken: u64,
    bytes: u64,
    timeouts: u64,
    /// Errors that nothing explains, and wrong bytes, by their texts.
    wrong: BTreeMap<String, u64>,
}

fn may_be_a_cut(error: &Error) -> bool {
    matches!(
        error.errno(),
        Some(libc::ECONNRESET | libc::EPIPE | libc::ENOTCONN)
    )
}

/// One connection, from connect to close.
fn session(
    route: &Route,
    random: &mut Random,
    tally: &RefCell<Tally>,
) -> std::result::Result<Outcome, String> {
    let seed = random.next();
    let magnitude = random.below(21);
    let len = 1 + random.below(1 << magnitude) as u64;
    let family = if route.address.port().is_some() {
        AF_INET
    } else {
        AF_UNIX
    };
    let socket = Socket::new(family, SOCK_STREAM, 0).map_err(|error| format!("socket: {error}"))?;
    if family == AF_INET {
        socket
            .settimeout(STUCK)
            .map_err(|error| format!("settimeout: {error}"))?;
    }
    socket
        .connect(&route.address)
        .map_err(|error| format!("connect: {error}"))?;
    // An object of its own, so that each side has its own timeout and its own close.
    let sender = socket.dup().map_err(|error| format!("dup: {error}"))?;
    sender
        .settimeout(None)
        .map_err(|error| format!("settimeout: {error}"))?;
    let for_writer = sender.clone();
    let writer_seed = random.next();
    let writer = spawn(move || write(&for_writer, seed, len, &mut Random::new(writer_seed)));
    let gives_up_at = random.one_in(12).then(|| random.below(len as usize) as u64);
    let read = read(&socket, seed, len, gives_up_at, random, tally);
    let early = !matches!(read, Ok(Ending::All));
    if early && random.one_in(2) {
        writer.cancel();
    } else if early {
        sender.close().map_err(|error| format!("close: {error}"))?;
    }
    let written = writer
        .join()
        .map_err(|error| format!("the writer: {error}"))?;
    drop((sender, socket));
    match written {
        Ok(()) => {}
        Err(error) if early && (error == Error::Cancelled || error.is_closed()) => {}
        Err(error) if may_be_a_cut(&error) && (route.faulty || early) => {}
        Err(error) => return Err(format!("send: {error}")),
    }
    match read? {
        Ending::All => Ok(Outcome::Complete),
        Ending::GaveUp => Ok(Outcome::GivenUp),
        Ending::Cut if route.faulty => Ok(Outcome::Broken),
        Ending::Cut => Err("the connection ended early, without a fault on the way".to_owned()),
    }
}

fn write(socket: &Socket, seed: u64, len: u64, random: &mut Random) -> Result<()> {
    let mut text = Text::new(seed);
    let mut piece = vec![0; 1 + random.below(64 * 1024)];
    while text.offset() < len {
        let count = (len - text.offset()).min(1 + random.below(piece.len()) as u64) as usize;
        text.fill(&mut piece[..count]);
        if random.one_in(2) {
            socket.sendall(&piece[..count])?;
        } else {
            let mut sent = 0;
            while sent < count {
                sent += socket.send(&piece[sent..count])?;
            }
        }
        if random.one_in(8) {
            yield_now();
        }
    }
    socket.shutdown(SHUT_WR)
}

enum Ending {
    All,
    GaveUp,
    Cut,
}

fn read(
    socket: &Socket,
    seed: u64,
    len: u64,
    gives_up_at: Option<u64>,
    random: &mut Random,
    tally: &RefCell<Tally>,
) -> std::result::Result<Ending, String> {
    let mut text = Text::new(seed);
    let mut buffer = vec![0; 1 + random.below(64 * 1024)];
    let mut progress = Instant::now();
    loop {
        if gives_up_at.is_some_and(|at| text.offset() >= at) {
            return Ok(Ending::GaveUp);
        }
        let limit = Duration::from_micros(200 + random.below(20_000) as u64);
        let result = match random.below(4) {
            0 => {
                // A deadline of the call's own, which the data may meet.
                let _ = socket.settimeout(limit);
                let result = socket.recv_into(&mut buffer);
                let _ = socket.settimeout(STUCK);
                result
            }
            1 => timeout(limit, || socket.recv_into(&mut buffer)),
            2 => {
                let most = 1 + random.below(buffer.len());
                socket.recv(most).map(|data| {
                    buffer[..data.len()].copy_from_slice(&data);
                    data.len()
                })
            }
            _ => socket.recv_into(&mut buffer),
        };
        match result {
            Ok(0) if text.offset() == len => return Ok(Ending::All),
            Ok(0) => return Ok(Ending::Cut),
            Ok(count) => {
                let at = text.offset();
                if at + count as u64 > len || !text.matches(&buffer[..count]) {
                    return Err("wrong bytes came back".to_owned());
                }
                tally.borrow_mut().bytes += count as u64;
                progress = Instant::now();
            }
            Err(Error::Timeout) if progress.elapsed() < STUCK => {
                tally.borrow_mut().timeouts += 1;
            }
            Err(Error::Timeout) => return Err("stuck: no byte within a minute".to_owned()),
            Err(error) if may_be_a_cut(&error) => return Ok(Ending::Cut),
            Err(error) => return Err(format!("recv: {error}")),
        }
    }
}

/// Sessions one after the other, until the time is over.
fn sessions(routes: &[Route], mut random: Random, until: Instant, tally: &RefCell<Tally>) {
    while Instant::now() < until {
        let route = &routes[random.below(routes.len())];
        let outcome = session(route, &mut random, tally);
        let mut tally = tally.borrow_mut();
        match outcome {
            Ok(Outcome::Complete) => tally.complete += 1,
            Ok(Outcome::GivenUp) => tally.given_up += 1,
            Ok(Outcome::Broken) => tally.broken += 1,
            Err(text) => *tally.wrong.entry(text).or_default() += 1,
        }
    }
}

// The run.

fn ip_address(address: SocketAddr) -> Result<Address> {
    (address.ip().to_string().as_str(), address.port()).to_address(AF_INET)
}

fn soak(args: &Args) -> Fallible<bool> {
    let length = Duration::from_secs_f64(args.minutes * 60.0);
    let counts = Arc::new(faults::Counts::default());
    let (near_upstreams, far_upstreams) = (Arc::new(OnceLock::new()), Arc::new(OnceLock::new()));
    let near = faults::start(near_upstreams.clone(), args.seed ^ 1, counts.clone())?;
    let far = faults::start(far_upstreams.clone(), args.seed ^ 2, counts.clone())?;
    let server = Server::start(args, far)?;
    let _ = near_upstreams.set(vec![server.echo, server.proxy]);
    let _ = far_upstreams.set(vec![server.echo]);
    let unix = server.unix.to_string_lossy().into_owned();
    let route = |address, faulty| Route { address, faulty };
    let routes = vec![
        route(ip_address(server.echo)?, false),
        route(unix.as_str().to_address(AF_UNIX)?, false),
        route(ip_address(server.proxy)?, false),
        route(ip_address(near)?, true),
        route(ip_address(near)?, true),
        route(ip_address(server.far_proxy)?, true),
    ];
    println!(
        "soak: {} minutes, {} sessions at a time, seed {}",
        args.minutes, args.sessions, args.seed
    );

    let pid = server.pid();
    let sockets_before = descriptors(pid, "socket:");
    let start = Instant::now();
    let over = Arc::new(AtomicBool::new(false));
    let watcher = thread::spawn({
        let over = over.clone();
        let pause = Duration::from_secs(1).min(length / 40);
        move || {
            let (mut server, mut own) = (Vec::new(), Vec::new());
            while !over.load(Ordering::Relaxed) {
                server.push(sample(pid, start.elapsed()));
                own.push(sample(std::process::id(), start.elapsed()));
                thread::sleep(pause);
            }
            (server, own)
        }
    });
    let (count, seed) = (args.sessions, args.seed);
    let tally = Runtime::builder().run(move || {
        let tally = Rc::new(RefCell::new(Tally::default()));
        let fibers: Vec<_> = (0..count as u64)
            .map(|n| {
                let (routes, tally) = (routes.clone(), tally.clone());
                let random = Random::new(seed.wrapping_mul(1_000_003) ^ n);
                spawn(move || sessions(&routes, random, start + length, &tally))
            })
            .collect();
        for fiber in fibers {
            if let Err(error) = fiber.join() {
                let text = format!("a session: {error}");
                *tally.borrow_mut().wrong.entry(text).or_default() += 1;
            }
        }
        tally.take()
    })?;
    over.store(true, Ordering::Relaxed);
    let (samples, own) = watcher.join().map_err(|_| "the watcher panicked")?;
    // Connections whose client is gone end a moment later.
    let patience = Instant::now();
    while descriptors(pid, "socket:") > sockets_before && patience.elapsed() < STUCK {
        thread::sleep(Duration::from_millis(20));
    }
    let left = descriptors(pid, "socket:").saturating_sub(sockets_before);
    report(
        args,
        &tally,
        &counts,
        &samples,
        &own,
        left,
        descriptors(pid, "pipe:"),
    )
}

fn report(
    args: &Args,
    tally: &Tally,
    counts: &faults::Counts,
    samples: &[Sample],
    own: &[Sample],
    sockets_left: usize,
    pipes: usize,
) -> Fallible<bool> {
    let mut out = std::io::stdout().lock();
    let mut good = true;
    let mut fail = |out: &mut dyn Write, text: String| {
        good = false;
        writeln!(out, "FAIL: {text}")
    };
    writeln!(
        out,
        "sessions: {} complete, {} given up, {} broken by {} cuts; {} timeouts survived",
        tally.complete,
        tally.given_up,
        tally.broken,
        counts.cut(),
        tally.timeouts
    )?;
    writeln!(out, "faults: {}", counts.describe())?;
    writeln!(
        out,
        "bytes: {:.3} GB came back, each compared",
        tally.bytes as f64 / 1e9
    )?;
    for (text, count) in &tally.wrong {
        fail(&mut out, format!("{count} × {text}"))?;
    }
    if tally.broken > counts.cut() {
        fail(
            &mut out,
            "more sessions were broken than connections cut".to_owned(),
        )?;
    }
    if tally.complete == 0 {
        fail(&mut out, "no session was completed".to_owned())?;
    }
    let warm_s = args.minutes * 60.0 / 5.0;
    let mib = |samples: &[Sample], index: Option<usize>| {
        index.map_or(0.0, |index| samples[index].rss_kib as f64 / 1024.0)
    };
    for (name, samples) in [("server", samples), ("sessions and faults", own)] {
        let warm = samples.iter().position(|s| s.at_s >= warm_s);
        let slope = slope_mib_per_hour(&samples[warm.unwrap_or(samples.len())..]);
        let slope = slope.unwrap_or(f64::NAN);
        writeln!(
            out,
            "{name}: RSS {:.1} MiB when warm, {:.1} at the end: {slope:+.2} MiB/h; at most {} descriptors",
            mib(samples, warm),
            mib(samples, samples.len().checked_sub(1)),
            samples.iter().map(|s| s.descriptors).max().unwrap_or(0),
        )?;
        if name == "server"
            && args.minutes >= JUDGED_MINUTES
            && (slope.is_nan() || slope > args.slope_max)
        {
            fail(
                &mut out,
                format!(
                    "the server's memory grows by more than {} MiB/h",
                    args.slope_max
                ),
            )?;
        }
    }
    writeln!(
        out,
        "server, at rest: {sockets_left} sockets left, {pipes} ends of pipes kept"
    )?;
    if sockets_left > 0 {
        fail(
            &mut out,
            format!("{sockets_left} sockets were not given back"),
        )?;
    }
    if pipes > 2 * PIPES_KEPT * args.workers + 4 {
        fail(&mut out, format!("{pipes} ends of pipes are open"))?;
    }
    if let Some(path) = &args.plot {
        let title = format!(
            "soak: {} minutes, {} sessions at a time",
            args.minutes, args.sessions
        );
        plot(samples, warm_s, &title, path)?;
        writeln!(out, "plot: {}", path.display())?;
    }
    writeln!(
        out,
        "{}",
        if good { "soak: passed" } else { "soak: failed" }
    )?;
    Ok(good)
}
