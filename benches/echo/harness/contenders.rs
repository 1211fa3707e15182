//! The contenders: what each is called and how its server is started.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use super::cells::{Cell, Family, Kind, Lineup};
use super::proxy;

/// Ours.
pub const OURS: &str = "ringsock";
/// Ours, receiving into buffers that the worker lends.
pub const OUR_LEASES: &str = "ringsock lease";
/// Ours, over its epoll driver: what it differs by from ours is what the ring itself buys.
pub const OUR_EPOLL: &str = "ringsock epoll-driver";
/// Epoll as one would write it by hand: level-triggered, edge-triggered, and for datagrams with recvmmsg and sendmmsg, without and
/// with UDP_GRO and UDP_SEGMENT. The best of them in a cell is what others are compared to.
pub const EPOLLS: [&str; 4] = ["epoll", "epoll edge", "epoll mmsg", "epoll gro"];
/// The first of [`EPOLLS`] once more: what it differs by from itself is chance.
pub const AGAIN: &str = "epoll again";
/// Epoll with a receive buffer for each connection: what of others' costs comes from theirs. Takes part where these fill a cache.
pub const OWN_BUFFERS: &str = "epoll own buffers";
/// The hand-written rings, which are limits and no rivals.
pub const LIMITS: [&str; 4] = ["raw-single", "raw-multi", "raw-multi direct", "poll-ring"];
/// Other people's runtimes; each is a program `peer-NAME` of the package `benches/peers`.
pub const PEERS: [&str; 6] = ["tokio", "monoio", "compio", "glommio", "tokio-uring", "may"];
/// A thread for each connection, with std.
const THREADS: &str = "threads";
/// Those of a quick run.
pub const QUICK: [&str; 5] = [OURS, EPOLLS[0], AGAIN, "raw-single", "raw-multi"];
/// Echoes wrong bytes now and then, and takes part only if named: the harness must find it out.
pub const CORRUPT: &str = "corrupt";

/// Seconds of the timeout that every operation has in its cells: one that never comes.
const TIMEOUT: &str = "30";
/// Datagrams of one recvmmsg.
const BATCH: &str = "32";
/// Microseconds to spin before sleeping.
const SPIN: &str = "50";

/// Buffers of this many bytes together are more than a processor's own cache has room for beside what else it needs.
const CACHE: u64 = 1 << 20;

/// A server that takes part.
#[derive(Clone, Debug)]
pub struct Contender {
    pub name: String,
    lineup: Lineup,
    command: Vec<OsString>,
}

impl Contender {
    pub fn new(lineup: Lineup, name: &str, command: &[&str]) -> io::Result<Self> {
        let mut words = vec![std::env::current_exe()?.into(), OsString::from("serve")];
        words.extend(command.iter().map(OsString::from));
        Ok(Self {
            name: name.to_owned(),
            lineup,
            command: words,
        })
    }

    /// A contender from `NAME=COMMAND`, whose words are split at spaces.
    pub fn also(text: &str) -> Result<Self, String> {
        let (name, command) = text.split_once('=').ok_or("not NAME=COMMAND")?;
        let command: Vec<OsString> = command.split_whitespace().map(OsString::from).collect();
        if name.is_empty() || command.is_empty() {
            return Err("not NAME=COMMAND".to_owned());
        }
        Ok(Self {
            name: name.to_owned(),
            lineup: Lineup::Main,
            command,
        })
    }

    pub fn takes_part(&self, cell: &Cell) -> bool {
        let idle = cell.kind == Kind::Idle;
        // Memory differs by no chance that a second row would show, and edges are no matter to idle connections.
        let same = idle && (self.name == AGAIN || self.name == EPOLLS[1]);
        // Only datagrams come several to a call.
        let unlike = EPOLLS[2..].contains(&&*self.name) && cell.family != Family::Udp;
        let fits = u64::from(cell.connections) * u64::from(cell.buffer()) < CACHE;
        let small = self.name == OWN_BUFFERS
            && (fits || cell.family == Family::Udp || cell.kind != Kind::Echo);
        // Who takes one by one what comes as one needs ten times as long: the plain epolls show it.
        let one_by_one = cell.segmented
            && (LIMITS.contains(&&*self.name)
                || PEERS.contains(&&*self.name)
                || self.name == THREADS);
        let shows = cell.lineup != Lineup::Proxy || proxy::takes_part(&self.name, cell);
        self.lineup == cell.lineup && !same && !unlike && !small && !one_by_one && shows
    }

    /// The server's command line; `socket` is where a Unix socket may be made.
    pub fn command(&self, cell: &Cell, socket: &Path) -> Vec<OsString> {
        let mut command = self.command.clone();
        command.extend(match cell.family {
            Family::Tcp => ["--bind".into(), "127.0.0.1:0".into()],
            Family::Udp => ["--udp".into(), "127.0.0.1:0".into()],
            Family::Unix => ["--unix".into(), socket.into()],
        });
        command.extend(["--buffer".into(), cell.buffer().to_string().into()]);
        if cell.kind == Kind::Fanout {
            command.extend(["--fanout".into(), cell.size.to_string().into()]);
        }
        command
    }
}

/// Everyone who can take part, and a sentence about each who is missing.
pub fn all(root: &Path, peers: Option<&Path>) -> io::Result<(Vec<Contender>, Vec<String>)> {
    use Lineup::{Main, Spin, Threads, Timeouts};
    let [epoll, edge, mmsg, gro] = EPOLLS;
    let mut contenders = vec![
        Contender::new(Main, OURS, &["ringsock"])?,
        Contender::new(Main, OUR_LEASES, &["ringsock-lease"])?,
        Contender::new(Main, OUR_EPOLL, &["ringsock", "--driver", "epoll"])?,
        Contender::new(Main, epoll, &["epoll"])?,
        Contender::new(Main, AGAIN, &["epoll"])?,
        Contender::new(Main, edge, &["epoll", "--edge"])?,
        Contender::new(Main, OWN_BUFFERS, &["epoll", "--own"])?,
        Contender::new(Main, mmsg, &["epoll", "--batch", BATCH])?,
        Contender::new(Main, gro, &["epoll", "--batch", BATCH, "--segments"])?,
        Contender::new(Main, "raw-single", &["raw-single"])?,
        Contender::new(Main, "raw-multi", &["raw-multi"])?,
        Contender::new(Main, "raw-multi direct", &["raw-multi", "--direct"])?,
        Contender::new(Main, "poll-ring", &["poll-ring"])?,
        Contender::new(Main, THREADS, &["threads"])?,
        Contender::new(Main, CORRUPT, &["corrupt"])?,
        Contender::new(Timeouts, OURS, &["ringsock"])?,
        Contender::new(
            Timeouts,
            "ringsock timeout",
            &["ringsock", "--timeout", TIMEOUT],
        )?,
        Contender::new(Timeouts, "raw-single", &["raw-single"])?,
        Contender::new(
            Timeouts,
            "raw-single timeout",
            &["raw-single", "--timeout", TIMEOUT],
        )?,
        Contender::new(
            Timeouts,
            "raw-single wheel",
            &["raw-single", "--wheel", TIMEOUT],
        )?,
        Contender::new(Timeouts, epoll, &["epoll"])?,
        Contender::new(Spin, OURS, &["ringsock"])?,
        Contender::new(Spin, "ringsock spin", &["ringsock", "--spin", SPIN])?,
        Contender::new(Spin, epoll, &["epoll"])?,
        Contender::new(Spin, "epoll spin", &["epoll", "--spin", SPIN])?,
        Contender::new(Threads, "ringsock-thread", &["ringsock-thread"])?,
        Contender::new(Threads, "std-thread", &["threads"])?,
    ];
    contenders.extend(proxy::contenders()?);
    let mut missing = Vec::new();
    let script = root.join("benches/echo/echo.py");
    if script.exists() {
        contenders.push(Contender {
            name: "CPython".to_owned(),
            lineup: Threads,
            command: vec!["python3".into(), script.into()],
        });
    } else {
        missing.push(format!("CPython ({} does not exist)", script.display()));
    }
    if let Some(directory) = peers {
        for name in PEERS {
            let program: PathBuf = directory.join(format!("peer-{name}"));
            if program.exists() {
                contenders.push(Contender {
                    name: name.to_owned(),
                    lineup: Main,
                    command: vec![program.into()],
                });
            } else {
                missing.push(format!("{name} ({} does not exist)", program.display()));
            }
        }
    }
    Ok((contenders, missing))
}
