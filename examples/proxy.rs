//! A TCP and Unix proxy: each connection is joined to one of the upstreams, in turn, by `ringsock::relay`.
//!
//!     cargo run --release --example proxy -- --listen 127.0.0.1:8080 --upstream 127.0.0.1:80 --upstream unix:/run/app.socket
//!
//! `--metrics 127.0.0.1:9100` has it count for Prometheus (`proxy/metrics.rs`): what it served, and what its runtime did.
//!
//! SIGTERM and SIGINT stop it: what waits in the backlog is still served, connections may go on for `--drain` seconds, and the
//! exit code is 0. A second signal cuts the connections at once.

mod common;
#[path = "proxy/metrics.rs"]
mod metrics;

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use ringsock::prelude::*;
use ringsock::signal::{SIGINT, SIGTERM, Signals};
use ringsock::{
    CreateServer, Handle, JoinHandle, Receiver, RelayEnd, RelayMode, RelayOptions, RelaySide,
    Relayed, Runtime, Sender, UnixAddr, channel, create_connection, create_server_with, relay,
    sleep, wait_readable,
};

use common::proxy_header::proxy_header;
use common::{about, remove_stale, seconds};
use metrics::{Kind, Page};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Connections at the most, unless the command line says otherwise.
const CONNECTIONS_MAX: usize = 10_000;

/// Descriptors that are not for connections: the standard ones, rings, listeners; and for each worker its pipes.
const OTHER_DESCRIPTORS: u64 = 64;
const PIPE_DESCRIPTORS: u64 = 128;

/// How long accepting pauses when descriptors or memory are short: first, and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// How long an upstream that did not connect is left out: first, and at most.
const DOWN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// How long a taken address is tried again: a killed process's listener goes some milliseconds after it.
const RESTART: Duration = Duration::from_secs(1);

/// How long a client whose upstream broke may take to read what the upstream had sent, at the most.
const LINGER: f64 = 2.0;

/// Lines of the log that may wait to be written. More are dropped: a standard error that nobody reads holds up nothing.
const LOG_LINES: usize = 1024;

/// Joins each connection to one of the upstreams.
#[derive(Parser, Clone)]
#[command(version)]
struct Args {
    /// Where to listen: HOST:PORT, [IPV6]:PORT or unix:PATH; port 0 lets the kernel choose
    #[arg(long, value_name = "ADDRESS")]
    listen: Endpoint,
    /// Where connections go, each in turn; one that is down is left out and tried again later
    #[arg(long, value_name = "ADDRESS", required = true, num_args = 1..)]
    upstream: Vec<Endpoint>,
    /// Worker threads
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: u16,
    /// Give up an attempt to connect to an upstream after so long
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds, allow_negative_numbers = true)]
    connect_timeout: f64,
    /// Close a connection on which nothing has moved, either way, for so long
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds, allow_negative_numbers = true)]
    idle_timeout: f64,
    /// Connections at the most, of two descriptors each; further ones wait in the backlog [default: 10000, or what the limit of open
    /// files allows]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    max_connections: Option<u32>,
    /// Print a line of counters on standard error so often
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true)]
    stats: Option<f64>,
    /// Serve counters for Prometheus at http://ADDRESS/metrics, to whoever can connect
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<Endpoint>,
    /// After SIGTERM or SIGINT, let connections go on for so long
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds, allow_negative_numbers = true)]
    drain: f64,
    /// Tell upstreams who the client is, by a header of the PROXY protocol
    #[arg(long, value_enum, value_name = "VERSION")]
    proxy_protocol: Option<ProxyProtocol>,
    /// How to move bytes
    #[arg(long, value_enum, default_value = "auto")]
    mode: Mode,
    /// Bytes that may be on their way each way of each connection, 4096 to 1048576
    #[arg(long, value_name = "BYTES", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(4096..=1_048_576))]
    in_flight: u32,
}

#[derive(Clone, Copy, ValueEnum)]
enum ProxyProtocol {
    /// Version 2, the binary one
    V2,
}

#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    /// Whatever suits what comes
    Auto,
    /// recv and send
    Copy,
    /// splice
    Splice,
}

/// Where a proxy listens or connects to.
#[derive(Clone, Debug, PartialEq)]
enum Endpoint {
    Host(String, u16),
    Unix(PathBuf),
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Endpoint, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err("no path".into()),
                path => Ok(Endpoint::Unix(path.into())),
            };
        }
        let (host, port) = text.rsplit_once(':').ok_or("no port")?;
        let port = port.parse().map_err(|_| "not a port".to_owned())?;
        let bracketed = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        match bracketed {
            Some(host) => Ok(Endpoint::Host(host.into(), port)),
            None if host.contains(':') => Err("an IPv6 address goes into brackets".into()),
            None => Ok(Endpoint::Host(host.into(), port)),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Host(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Endpoint::Host(host, port) => write!(f, "{host}:{port}"),
            Endpoint::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Endpoint {
    /// One listener for each worker: of a port each its own, of a path the same.
    fn listen(&self, workers: usize) -> ringsock::Result<Vec<Socket>> {
        match self {
            Endpoint::Unix(path) => {
                remove_stale(path);
                let listener = Socket::new(AF_UNIX, SOCK_STREAM, 0)?;
                listener.bind(path.as_path())?;
                listener.listen(BACKLOG)?;
                Ok(vec![listener; workers])
            }
            Endpoint::Host(host, port) => {
                let options = CreateServer {
                    family: if host.contains(':') {
                        AF_INET6
                    } else {
                        AF_INET
                    },
                    backlog: Some(BACKLOG),
                    reuse_port: workers > 1,
                    ..Default::default()
                };
                let first = create_server_with((host.as_str(), *port), options)?;
                let address = first.getsockname()?;
                let mut listeners = vec![first];
                while listeners.len() < workers {
                    listeners.push(create_server_with(&address, options)?);
                }
                Ok(listeners)
            }
        }
    }

    /// What a listener of this endpoint listens on: port 0 has become the real one.
    fn address(&self, listener: &Socket) -> ringsock::Result<String> {
        match self {
            Endpoint::Unix(_) => Ok(self.to_string()),
            Endpoint::Host(..) => Ok(listener.getsockname()?.to_string()),
        }
    }

    fn connect(&self) -> ringsock::Result<Socket> {
        match self {
            Endpoint::Host(host, port) => create_connection((host.as_str(), *port)),
            Endpoint::Unix(path) => create_connection(Address::Unix(UnixAddr::Path(path.clone()))),
        }
    }
}

/// The addresses connections go to, and which of them are down.
struct Upstreams {
    list: Vec<Upstream>,
    next: AtomicUsize,
    start: Instant,
}

struct Upstream {
    endpoint: Endpoint,
    /// Left out until then, in milliseconds since the start; 0 while it is up.
    down_until_ms: AtomicU64,
    down_ms: AtomicU64,
}

impl Upstreams {
    fn new(endpoints: Vec<Endpoint>) -> Upstreams {
        let upstream = |endpoint| Upstream {
            endpoint,
            down_until_ms: AtomicU64::new(0),
            down_ms: AtomicU64::new(0),
        };
        Upstreams {
            list: endpoints.into_iter().map(upstream).collect(),
            next: AtomicUsize::new(0),
            start: Instant::now(),
        }
    }

    fn now_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    /// A connection to the next of them that has one to offer, and its address.
    fn connect(&self, proxy: &Proxy) -> ringsock::Result<(Socket, &Endpoint)> {
        let count = self.list.len();
        let first = self.next.fetch_add(1, Relaxed) % count;
        let in_turn = || (0..count).map(|index| &self.list[(first + index) % count]);
        let mut tried = false;
        let mut last = Error::from_errno(libc::ECONNREFUSED);
        for upstream in in_turn() {
            if upstream.is_worth_a_try(self.now_ms()) {
                tried = true;
                match self.try_one(upstream, proxy) {
                    Ok(socket) => return Ok((socket, &upstream.endpoint)),
                    Err(error @ (Error::Cancelled | Error::Shutdown)) => return Err(error),
                    Err(error) => last = error,
                }
            }
        }
        // All are down, so one that is left out is no worse than none.
        if !tried && let Some(upstream) = in_turn().next() {
            return Ok((self.try_one(upstream, proxy)?, &upstream.endpoint));
        }
        Err(last)
    }

    fn try_one(&self, upstream: &Upstream, proxy: &Proxy) -> ringsock::Result<Socket> {
        let connected = ringsock::timeout(proxy.connect_timeout, || upstream.endpoint.connect());
        match &connected {
            Ok(_) => {
                if upstream.down_ms.swap(0, Relaxed) != 0 {
                    proxy.log(format_args!("upstream {} is back", upstream.endpoint));
                }
                upstream.down_until_ms.store(0, Relaxed);
            }
            Err(Error::Cancelled | Error::Shutdown) => {}
            Err(error) if is_own_shortage(error) => {}
            Err(error) => {
                proxy.stats.upstream_failures.fetch_add(1, Relaxed);
                let limit = DOWN.1.as_millis() as u64;
                let before = upstream.down_ms.load(Relaxed);
                let down_ms = (before * 2).clamp(DOWN.0.as_millis() as u64, limit);
                upstream.down_ms.store(down_ms, Relaxed);
                upstream
                    .down_until_ms
                    .store(self.now_ms() + down_ms, Relaxed);
                if before == 0 {
                    proxy.log(format_args!(
                        "upstream {} is down: {error}",
                        upstream.endpoint
                    ));
                }
            }
        }
        connected
    }
}

impl Upstream {
    /// Whether it is up, or has been down for long enough. Of those who ask then, one tries; for the others it stays down.
    fn is_worth_a_try(&self, now_ms: u64) -> bool {
        let until_ms = self.down_until_ms.load(Relaxed);
        if until_ms == 0 {
            return true;
        }
        let longer_ms = now_ms + self.down_ms.load(Relaxed);
        let down = &self.down_until_ms;
        now_ms >= until_ms
            && down
                .compare_exchange(until_ms, longer_ms, Relaxed, Relaxed)
                .is_ok()
    }
}

/// Whether the error says nothing of the peer: descriptors, memory or ports are short here.
fn is_own_shortage(error: &Error) -> bool {
    matches!(
        error.errno(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS | libc::EADDRNOTAVAIL)
    )
}

/// What has happened so far.
#[derive(Default)]
struct Stats {
    accepted: AtomicU64,
    active: AtomicU64,
    to_upstream: AtomicU64,
    to_client: AtomicU64,
    spliced: AtomicU64,
    stranded: AtomicU64,
    closed: AtomicU64,
    idle: AtomicU64,
    client_errors: AtomicU64,
    upstream_errors: AtomicU64,
    /// Attempts to connect that failed, and connections for which all did.
    upstream_failures: AtomicU64,
    unserved: AtomicU64,
    cut: AtomicU64,
    log_dropped: AtomicU64,
}

impl Stats {
    fn add(&self, relayed: &Relayed) {
        self.to_upstream.fetch_add(relayed.a_to_b, Relaxed);
        self.to_client.fetch_add(relayed.b_to_a, Relaxed);
        let spliced = relayed.a_to_b_spliced + relayed.b_to_a_spliced;
        self.spliced.fetch_add(spliced, Relaxed);
        self.stranded.fetch_add(relayed.stranded, Relaxed);
        let counter = match &relayed.ended {
            RelayEnd::Closed => &self.closed,
            RelayEnd::IdleTimeout | RelayEnd::Deadline => &self.idle,
            RelayEnd::Failed { side, .. } => match side {
                RelaySide::A => &self.client_errors,
                RelaySide::B => &self.upstream_errors,
            },
            _ => &self.cut,
        };
        counter.fetch_add(1, Relaxed);
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fields = [
            ("active", &self.active),
            ("accepted", &self.accepted),
            ("to_upstream_bytes", &self.to_upstream),
            ("to_client_bytes", &self.to_client),
            ("spliced_bytes", &self.spliced),
            ("stranded_bytes", &self.stranded),
            ("closed", &self.closed),
            ("idle_timeouts", &self.idle),
            ("client_errors", &self.client_errors),
            ("upstream_errors", &self.upstream_errors),
            ("upstream_failures", &self.upstream_failures),
            ("unserved", &self.unserved),
            ("cut", &self.cut),
            ("log_lines_dropped", &self.log_dropped),
        ];
        write!(f, "stats")?;
        for (name, value) in fields {
            write!(f, " {name}={}", value.load(Relaxed))?;
        }
        Ok(())
    }
}

struct Proxy {
    upstreams: Upstreams,
    stats: Stats,
    connect_timeout: f64,
    proxy_protocol: bool,
    options: RelayOptions,
    /// It has been said that all places are taken. (Once is enough: the metrics show how long.)
    told_full: AtomicBool,
    /// To the thread that writes the log.
    lines: mpsc::SyncSender<String>,
}

impl Proxy {
    /// A page of all there is to count.
    fn metrics(&self, handle: &Handle, limit: usize) -> String {
        use Kind::{Counter, Gauge};
        let stats = &self.stats;
        let value = |counter: &AtomicU64| counter.load(Relaxed);
        let mut page = Page::default();
        let (name, help) = (
            "ringsock_proxy_connections_active",
            "Connections that are open.",
        );
        page.value(name, Gauge, help, value(&stats.active));
        let (name, help) = (
            "ringsock_proxy_connections_max",
            "Connections that may be open.",
        );
        page.value(name, Gauge, help, limit as u64);
        let (name, help) = (
            "ringsock_proxy_connections_accepted_total",
            "Connections accepted.",
        );
        page.value(name, Counter, help, value(&stats.accepted));

        let name = "ringsock_proxy_connections_ended_total";
        page.family(name, Counter, "Connections that have ended, by why.");
        for (reason, counter) in [
            ("closed", &stats.closed),
            ("idle", &stats.idle),
            ("client_error", &stats.client_errors),
            ("upstream_error", &stats.upstream_errors),
            ("cut", &stats.cut),
            ("unserved", &stats.unserved),
        ] {
            page.sample(name, Some(("reason", reason)), value(counter));
        }
        let name = "ringsock_proxy_bytes_total";
        page.family(
            name,
            Counter,
            "Bytes passed on by connections that have ended.",
        );
        for (direction, counter) in [
            ("to_upstream", &stats.to_upstream),
            ("to_client", &stats.to_client),
        ] {
            page.sample(name, Some(("direction", direction)), value(counter));
        }
        let help = "Of these, bytes that went by splice.";
        page.value(
            "ringsock_proxy_spliced_bytes_total",
            Counter,
            help,
            value(&stats.spliced),
        );
        let help = "Bytes received that could not be passed on.";
        page.value(
            "ringsock_proxy_stranded_bytes_total",
            Counter,
            help,
            value(&stats.stranded),
        );
        let help = "Attempts to connect to an upstream that failed.";
        let name = "ringsock_proxy_upstream_failures_total";
        page.value(name, Counter, help, value(&stats.upstream_failures));
        let name = "ringsock_proxy_upstream_up";
        page.family(
            name,
            Gauge,
            "Whether an upstream is in turn (1) or left out for now (0).",
        );
        for (index, upstream) in self.upstreams.list.iter().enumerate() {
            // The number tells two of the same address apart.
            let label = format!("{index} {}", upstream.endpoint);
            let is_up = upstream.down_until_ms.load(Relaxed) == 0;
            page.sample(name, Some(("upstream", &label)), is_up.into());
        }
        let help = "Lines of the log that were dropped.";
        let name = "ringsock_proxy_log_lines_dropped_total";
        page.value(name, Counter, help, value(&stats.log_dropped));
        page.runtime(handle);
        page.text()
    }
}

impl Proxy {
    /// One line on standard error, some time.
    fn log(&self, text: fmt::Arguments<'_>) {
        if self.lines.try_send(format!("proxy: {text}\n")).is_err() {
            self.stats.log_dropped.fetch_add(1, Relaxed);
        }
    }

    /// One connection, from its accept to its end.
    fn serve(&self, client: &Socket, peer: &Address) {
        self.stats.active.fetch_add(1, Relaxed);
        let ended = self.relay(client, peer);
        self.stats.active.fetch_sub(1, Relaxed);
        if let Err(error) = ended {
            self.stats.unserved.fetch_add(1, Relaxed);
            self.log(format_args!("{}: not served: {error}", name(peer)));
        }
    }

    fn relay(&self, client: &Socket, peer: &Address) -> ringsock::Result<()> {
        let (upstream, endpoint) = self.upstreams.connect(self)?;
        for socket in [client, &upstream] {
            if socket.family() != AF_UNIX {
                socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)?;
            }
        }
        if self.proxy_protocol {
            let header = proxy_header(peer, &client.getsockname()?);
            ringsock::timeout(self.connect_timeout, || upstream.sendall(&header))?;
        }
        let relayed = relay(client, &upstream, &self.options)?;
        self.stats.add(&relayed);
        if let RelayEnd::Failed {
            side: RelaySide::B, ..
        } = relayed.ended
        {
            drop(upstream);
            linger(client);
        }
        let why = match &relayed.ended {
            RelayEnd::Closed => return Ok(()),
            RelayEnd::IdleTimeout | RelayEnd::Deadline => "nothing moved for too long".to_owned(),
            RelayEnd::Failed { side, error } => match side {
                RelaySide::A => format!("client: {error}"),
                RelaySide::B => format!("upstream: {error}"),
            },
            _ => "cut at the end of the drain".to_owned(),
        };
        self.log(format_args!(
            "{} to {endpoint}: {why} ({} bytes to the upstream, {} to the client, {} lost)",
            name(peer),
            relayed.a_to_b,
            relayed.b_to_a,
            relayed.stranded
        ));
        Ok(())
    }
}

/// Lets the client read its last bytes. Closing while some of the client's are unread would be a reset, which destroys what is on its
/// way to the client.
fn linger(client: &Socket) {
    let _ = ringsock::timeout(LINGER, || {
        client.shutdown(SHUT_WR)?;
        while client.recv_into(&mut [0; 4096])? > 0 {}
        Ok(())
    });
}

/// A client in the log.
fn name(peer: &Address) -> String {
    match peer.port() {
        Some(_) => peer.to_string(),
        None => "a client".to_owned(),
    }
}

/// What a connection holds: its place among those that may be, and a sign that it is there.
struct Permit {
    places: Sender<()>,
    _alive: Sender<()>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        // There is room for all places.
        let _ = self.places.try_send(());
    }
}

/// The places that are free. To take one is to receive.
struct Places {
    free: Receiver<()>,
    back: Sender<()>,
    limit: usize,
}

impl Places {
    /// Takes one, as soon as there is one.
    fn take(&self, proxy: &Proxy) -> bool {
        if self.free.try_recv().is_ok() {
            return true;
        }
        if !proxy.told_full.swap(true, Relaxed) {
            proxy.log(format_args!(
                "all {} places are taken: further connections wait in the backlog (see --max-connections and `ulimit -n`)",
                self.limit
            ));
        }
        self.free.recv().is_ok()
    }
}

/// Accepts until cancelled, and then what is left in the backlog, as far as there are places.
fn accept_all(listener: &Socket, proxy: &Arc<Proxy>, places: &Places, alive: &Sender<()>) {
    let serve_next = || -> ringsock::Result<()> {
        let permit = Permit {
            places: places.back.clone(),
            _alive: alive.clone(),
        };
        // The place goes back with the permit, also if nothing is accepted.
        let (client, peer) = listener.accept()?;
        proxy.stats.accepted.fetch_add(1, Relaxed);
        let proxy = proxy.clone();
        ringsock::spawn(move || {
            proxy.serve(&client, &peer);
            // The connection is closed before its place is free.
            drop(client);
            drop(permit);
        });
        Ok(())
    };
    let mut pause = Duration::ZERO;
    loop {
        // First the connection, then the place: a worker that nobody connects to keeps none.
        if wait_readable(listener).is_err() || !places.take(proxy) {
            break;
        }
        let error = match serve_next() {
            Ok(()) => {
                pause = Duration::ZERO;
                continue;
            }
            Err(error) => error,
        };
        match error.errno() {
            // Another worker was faster, or the client has gone.
            Some(libc::EAGAIN | libc::ECONNABORTED) => continue,
            Some(libc::EBADF | libc::EINVAL) => return,
            _ => {}
        }
        if pause.is_zero() {
            proxy.log(format_args!("connections wait in the backlog: {error}"));
        }
        pause = (pause * 2).clamp(PAUSE.0, PAUSE.1);
        if sleep(pause).is_err() {
            break;
        }
    }
    for _ in 0..BACKLOG {
        if places.free.try_recv().is_err() || serve_next().is_err() {
            break;
        }
    }
}

/// Connections at the most.
fn connections_max(args: &Args) -> usize {
    let soft = ringsock::raise_descriptor_limit().map_or(1024, |(_, after)| after);
    let others = OTHER_DESCRIPTORS + PIPE_DESCRIPTORS * u64::from(args.workers);
    if soft < others + 2 {
        eprintln!(
            "proxy: {soft} open files are hardly enough for one connection at a time (raise `ulimit -n`)"
        );
    }
    // Each takes two descriptors.
    let possible = (soft.saturating_sub(others) / 2).max(1);
    let possible = usize::try_from(possible).unwrap_or(usize::MAX);
    match args.max_connections {
        None => possible.min(CONNECTIONS_MAX),
        Some(wanted) if wanted as usize > possible => {
            eprintln!(
                "proxy: --max-connections {wanted} is more than {soft} open files allow; {possible} it is (raise `ulimit -n`)"
            );
            possible
        }
        Some(wanted) => wanted as usize,
    }
}

fn listen(endpoint: &Endpoint, workers: usize) -> ringsock::Result<Vec<Socket>> {
    let give_up = Instant::now() + RESTART;
    let listeners = loop {
        match endpoint.listen(workers) {
            Err(error) if error.errno() == Some(libc::EADDRINUSE) && Instant::now() < give_up => {
                sleep(0.05)?;
            }
            other => break other,
        }
    };
    let listeners = listeners.map_err(|error| about(error, &endpoint.to_string()))?;
    for listener in &listeners {
        listener.setblocking(false)?;
    }
    Ok(listeners)
}

fn run(args: &Args, proxy: &Arc<Proxy>, limit: usize, signals: Signals) -> ringsock::Result<()> {
    let handle = Handle::current().expect("in a fiber");
    let listeners = listen(&args.listen, handle.workers())?;
    let address = args.listen.address(&listeners[0])?;
    let (back, free) = channel(limit);
    for _ in 0..limit {
        let _ = back.try_send(());
    }
    let (alive, gone) = channel(1);
    let mut accepting: Vec<JoinHandle<()>> = Vec::new();
    for (worker, listener) in listeners.into_iter().enumerate() {
        let (proxy, alive) = (proxy.clone(), alive.clone());
        let places = Places {
            free: free.clone(),
            back: back.clone(),
            limit,
        };
        let accept = move || accept_all(&listener, &proxy, &places, &alive);
        accepting.push(handle.spawn_on(worker, accept)?);
    }
    if let Some(every) = args.stats {
        let proxy = proxy.clone();
        ringsock::spawn(move || {
            while sleep(every).is_ok() {
                proxy.log(format_args!("{}", proxy.stats));
            }
        });
    }
    let metrics = match &args.metrics {
        None => String::new(),
        Some(endpoint) => {
            let listener = endpoint
                .listen(1)
                .map_err(|error| about(error, &endpoint.to_string()))?;
            let listener = listener.into_iter().next().expect("one for each worker");
            let address = endpoint.address(&listener)?;
            for _ in 0..metrics::CONNECTIONS {
                let (listener, proxy, handle) = (listener.clone(), proxy.clone(), handle.clone());
                ringsock::spawn(move || {
                    metrics::serve(&listener, || proxy.metrics(&handle, limit));
                });
            }
            format!("metrics on {address}\n")
        }
    };
    // A closed standard output is no reason not to serve.
    let mut out = io::stdout();
    let _ = write!(out, "listening on {address}\n{metrics}").and_then(|()| out.flush());

    signals.wait()?;
    accepting.iter().for_each(JoinHandle::cancel);
    for fiber in accepting {
        let _ = fiber.join();
    }
    let left = proxy.stats.active.load(Relaxed);
    proxy.log(format_args!(
        "stopped accepting; {left} connections may go on for {} s",
        args.drain
    ));
    // The end of the drain: the last connection is gone, there is another signal, or the time is over.
    drop(alive);
    let (ended, end) = channel(2);
    let impatient = ended.clone();
    ringsock::spawn(move || {
        let _ = gone.recv();
        let _ = ended.try_send(());
    });
    ringsock::spawn(move || {
        let _ = signals.wait();
        let _ = impatient.try_send(());
    });
    let _ = ringsock::timeout(args.drain, || {
        let _ = end.recv();
        Ok(())
    });
    Ok(())
}

fn start(args: &Args) -> ringsock::Result<()> {
    let signals = Signals::new(&[SIGTERM, SIGINT])?;
    let limit = connections_max(args);
    let (lines, log) = mpsc::sync_channel::<String>(LOG_LINES);
    let (written, all_written) = mpsc::channel::<()>();
    thread::Builder::new().name("log".into()).spawn(move || {
        for line in log {
            // A closed standard error is no reason not to serve.
            let _ = io::stderr().write_all(line.as_bytes());
        }
        drop(written);
    })?;
    let proxy = Arc::new(Proxy {
        upstreams: Upstreams::new(args.upstream.clone()),
        stats: Stats::default(),
        told_full: AtomicBool::new(false),
        connect_timeout: args.connect_timeout,
        proxy_protocol: args.proxy_protocol.is_some(),
        options: RelayOptions {
            idle_timeout: args.idle_timeout.into(),
            in_flight: args.in_flight as usize,
            mode: match args.mode {
                Mode::Auto => RelayMode::Auto,
                Mode::Copy => RelayMode::Copy,
                Mode::Splice => RelayMode::Splice,
            },
            ..Default::default()
        },
        lines,
    });
    let runtime = Runtime::builder().workers(args.workers.into());
    let served = runtime.run({
        let proxy = proxy.clone();
        let args = args.clone();
        move || run(&args, &proxy, limit, signals)
    });
    if args.stats.is_some() {
        proxy.log(format_args!("{}", proxy.stats));
    }
    // The log's last lines are written, unless nobody reads them.
    drop(proxy);
    let _ = all_written.recv_timeout(Duration::from_secs(1));
    served.and_then(|served| served)
}

fn main() -> ExitCode {
    match start(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("proxy: {error}");
            ExitCode::FAILURE
        }
    }
}
