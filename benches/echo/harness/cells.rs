//! The cells: what is measured. One is a load of fixed size and the line-up of contenders it is put to.

use serde::{Deserialize, Serialize};

use super::proxy;

/// How server and load are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    Tcp,
    Unix,
    Udp,
}

impl Family {
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Unix => "Unix",
            Self::Udp => "UDP",
        }
    }
}

/// What the load does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Messages are echoed, so many in flight on each connection.
    Echo,
    /// Connect, one echo, close; the connections are how many at once.
    Churn,
    /// Connections that do nothing, for the memory they take.
    Idle,
    /// One message goes to all connections.
    Fanout,
    /// Messages are echoed, before and while a thousand other connections send and never read.
    Stalled,
}

/// Who takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lineup {
    /// Everyone.
    Main,
    /// With a timeout on every operation, and without.
    Timeouts,
    /// Spinning before sleeping, and not.
    Spin,
    /// Blocking calls on plain threads.
    Threads,
    /// Proxies, in front of an epoll server.
    Proxy,
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cell {
    pub name: String,
    pub kind: Kind,
    pub lineup: Lineup,
    pub family: Family,
    pub connections: u32,
    /// Bytes in a message.
    pub size: u32,
    /// Messages in flight on each connection.
    pub depth: u32,
    /// The peer sends and receives many datagrams as one (UDP_SEGMENT, UDP_GRO).
    #[serde(default)]
    pub segmented: bool,
    /// Messages of a run: the same for every contender and every run, so that all do the same work.
    pub messages: u64,
}

/// Most bytes in flight at once, over all connections.
const IN_FLIGHT_MAX: u64 = 64 << 20;
/// The largest datagram of the grid; larger ones are fragments over any real network.
const DATAGRAM_MAX: u32 = 16 << 10;

impl Cell {
    pub fn echo(family: Family, connections: u32, size: u32, depth: u32) -> Self {
        let mut name = format!(
            "{}-{connections}x{}",
            family.name().to_lowercase(),
            bytes(size)
        );
        if depth > 1 {
            name += &format!("-d{depth}");
        }
        Self {
            name,
            kind: Kind::Echo,
            lineup: Lineup::Main,
            family,
            connections,
            size,
            depth,
            segmented: false,
            messages: messages(family, connections, size, depth),
        }
    }

    /// Bursts of datagrams from a few peers, who segment or do not.
    fn bursts(size: u32, segmented: bool) -> Self {
        let cell = Self::echo(Family::Udp, 4, size, 32);
        if !segmented {
            return cell;
        }
        Self {
            name: format!("{}-gso", cell.name),
            segmented,
            // What takes one server a tenth of the time is still to be measured.
            messages: 9 * cell.messages,
            ..cell
        }
    }

    /// Whether datagrams come in bursts, so that many can be received at once.
    pub fn is_bursts(&self) -> bool {
        self.family == Family::Udp && self.depth > 1
    }

    pub fn in_lineup(self, lineup: Lineup, prefix: &str) -> Self {
        Self {
            name: format!("{prefix}-{}", self.name),
            lineup,
            ..self
        }
    }

    fn special(kind: Kind, family: Family, connections: u32, messages: u64) -> Self {
        let what = match kind {
            Kind::Echo => "echo",
            Kind::Churn => "churn",
            Kind::Idle => "idle",
            Kind::Fanout => "fanout",
            Kind::Stalled => "stalled",
        };
        Self {
            name: format!("{what}-{}-{connections}", family.name().to_lowercase()),
            kind,
            lineup: Lineup::Main,
            family,
            connections,
            size: 64,
            depth: 1,
            segmented: false,
            messages,
        }
    }

    /// The receive buffer every server of the cell is told to use.
    pub fn buffer(&self) -> u32 {
        if self.lineup == Lineup::Proxy {
            return proxy::BUFFER;
        }
        (self.size.saturating_mul(self.depth)).clamp(4096, 65536)
    }

    /// Whether the cell is run open-loop too, for its latency at a rate that all can keep up with. Datagrams may be lost, a
    /// thread has one connection, and the other kinds have no rate.
    pub fn paced(&self) -> bool {
        self.kind == Kind::Echo
            && matches!(self.lineup, Lineup::Main | Lineup::Proxy)
            && self.family != Family::Udp
            && self.depth == 1
    }

    /// Whether the load can pause, so that contenders take turns.
    pub fn takes_turns(&self) -> bool {
        matches!(self.kind, Kind::Echo | Kind::Churn | Kind::Fanout)
    }

    /// Whether one message goes to and fro. The load never sleeps then: its wake-ups, the server's business when it sends, would
    /// cost more than the echo and vary more than servers differ.
    pub fn is_ping_pong(&self) -> bool {
        self.connections * self.depth == 1
    }

    /// Two short lines for the head of a column: the transport, and the load.
    pub fn head(&self) -> (String, String) {
        let family = self.family.name();
        match self.kind {
            Kind::Echo => {
                let mut load = format!("{}×{}", self.connections, bytes(self.size));
                if self.depth > 1 {
                    load += &format!(" ×{}", self.depth);
                }
                if self.segmented {
                    load += " GSO";
                }
                (family.to_owned(), load)
            }
            Kind::Churn => (family.to_owned(), "churn".to_owned()),
            Kind::Idle => (family.to_owned(), format!("{} idle", self.connections)),
            Kind::Fanout => (family.to_owned(), format!("1 to {}", self.connections)),
            Kind::Stalled => (family.to_owned(), "stalled".to_owned()),
        }
    }

    /// The cell in words.
    pub fn title(&self) -> String {
        let (family, connections) = (self.family.name(), self.connections);
        let what = match self.kind {
            Kind::Echo => {
                let s = if connections == 1 { "" } else { "s" };
                let connected = if self.family == Family::Udp {
                    "flow"
                } else {
                    "connection"
                };
                let mut what = format!(
                    "{family}, {connections} {connected}{s} × {}",
                    bytes(self.size)
                );
                if self.depth > 1 {
                    what += &format!(", {} in flight each", self.depth);
                }
                if self.segmented {
                    what += ", from peers that segment (GSO)";
                }
                what
            }
            Kind::Churn => format!("{family}, connect, one echo, close; {connections} at once"),
            Kind::Idle => format!("{family}, {connections} idle connections"),
            Kind::Fanout => format!("{family}, one message to {connections} connections"),
            Kind::Stalled => format!(
                "{family}, {connections} connections × {} beside 1,000 that never read",
                bytes(self.size)
            ),
        };
        match self.lineup {
            Lineup::Main => what,
            Lineup::Timeouts => format!("Cost of a timeout on every operation: {what}"),
            Lineup::Spin => format!("Spinning before sleeping: {what}"),
            Lineup::Threads => format!("Blocking calls on a plain thread: {what}"),
            Lineup::Proxy => format!("Through a proxy: {what}"),
        }
    }
}

/// `64B`, `1K`, `16K`.
fn bytes(size: u32) -> String {
    if size >= 1024 && size.is_multiple_of(1024) {
        format!("{}K", size / 1024)
    } else {
        format!("{size}B")
    }
}

/// As many messages as `epoll` echoes in some 0.4 s, to two digits: estimated once, on two cores of an EPYC of 2.6 GHz, and a
/// formula rather than a calibration so that every run everywhere does the same work.
fn messages(family: Family, connections: u32, size: u32, depth: u32) -> u64 {
    // One message in flight alone waits for a wake-up.
    if connections * depth == 1 {
        return 12_000;
    }
    let (base_ns, per_byte_ns) = match family {
        Family::Tcp => (8_000.0, 0.55),
        Family::Unix => (4_200.0, 0.45),
        Family::Udp => (7_000.0, 0.5),
    };
    // A batch is received and sent at once, while it fits into the buffer.
    let batch = f64::from(depth.min((65536 / size).max(1)));
    let cold = if connections > 512 { 1.5 } else { 1.0 };
    let batched = if family == Family::Udp { 1.0 } else { batch };
    let ns = base_ns * cold / batched + f64::from(size) * per_byte_ns + 300.0;
    let count = 0.4e9 / ns;
    let scale = 10f64.powi(count.log10() as i32 - 1);
    ((count / scale).round() * scale) as u64
}

/// The default set: what tells the story, in the order of the report.
pub fn default_set() -> Vec<Cell> {
    use Family::{Tcp, Udp, Unix};
    let mut cells = vec![
        Cell::echo(Tcp, 1, 64, 1),
        Cell::echo(Tcp, 64, 64, 1),
        Cell::echo(Tcp, 1024, 64, 1),
        Cell::echo(Tcp, 64, 64, 16),
        Cell::echo(Tcp, 64, 16 << 10, 1),
        Cell::echo(Tcp, 64, 64 << 10, 1),
        Cell::echo(Unix, 1, 64, 1),
        Cell::echo(Unix, 64, 64, 1),
        Cell::echo(Unix, 64, 64, 16),
        Cell::echo(Unix, 64, 16 << 10, 1),
        Cell::echo(Unix, 64, 64 << 10, 1),
        Cell::echo(Udp, 64, 64, 1),
        Cell::bursts(64, false),
        Cell::bursts(1200, false),
        Cell::bursts(64, true),
        Cell::bursts(1200, true),
    ];
    cells.extend(special_set());
    cells.extend(proxy::cells());
    cells
}

fn special_set() -> Vec<Cell> {
    use Family::{Tcp, Unix};
    vec![
        Cell::special(Kind::Churn, Tcp, 32, 6_000),
        Cell::special(Kind::Churn, Unix, 32, 40_000),
        Cell::special(Kind::Fanout, Tcp, 1_000, 100),
        Cell::special(Kind::Idle, Tcp, 10_000, 10_000),
        Cell::echo(Tcp, 64, 64, 1).in_lineup(Lineup::Timeouts, "timeout"),
        Cell::echo(Unix, 64, 64, 1).in_lineup(Lineup::Timeouts, "timeout"),
        Cell::echo(Tcp, 1, 64, 1).in_lineup(Lineup::Spin, "spin"),
        Cell::echo(Unix, 1, 64, 1).in_lineup(Lineup::Spin, "spin"),
        Cell::echo(Tcp, 1, 64, 1).in_lineup(Lineup::Threads, "thread"),
        Cell::echo(Tcp, 1, 16 << 10, 1).in_lineup(Lineup::Threads, "thread"),
    ]
}

/// A handful that finds what is broken, not what is slow.
pub fn quick_set() -> Vec<Cell> {
    use Family::{Tcp, Udp, Unix};
    let mut cells = vec![
        Cell::echo(Tcp, 64, 64, 1),
        Cell::echo(Unix, 64, 64, 16),
        Cell::echo(Unix, 64, 16 << 10, 1),
        Cell::echo(Udp, 64, 64, 1),
        Cell::bursts(1200, true),
        Cell::special(Kind::Churn, Tcp, 32, 6_000),
    ];
    for cell in &mut cells {
        cell.messages /= 3;
    }
    cells
}

/// The whole grid, then the special cells.
pub fn grid() -> Vec<Cell> {
    let mut cells = Vec::new();
    for family in [Family::Tcp, Family::Unix, Family::Udp] {
        for connections in [1, 64, 1024] {
            for size in [64, 1 << 10, 16 << 10, 64 << 10] {
                for depth in [1, 16] {
                    let in_flight = u64::from(connections) * u64::from(size) * u64::from(depth);
                    let too_large = family == Family::Udp && size > DATAGRAM_MAX;
                    if in_flight <= IN_FLIGHT_MAX && !too_large {
                        cells.push(Cell::echo(family, connections, size, depth));
                    }
                }
            }
        }
    }
    for segmented in [false, true] {
        cells.extend([64, 1200].map(|size| Cell::bursts(size, segmented)));
    }
    cells.extend(special_set());
    cells.extend(proxy::cells());
    cells
}
