//! A proxy that misbehaves: to each connection it does one thing that networks do.
//!
//! It is made of plain threads and `std::net`, so that it shares nothing with what it tests.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use ringsock::Socket;
use ringsock::prelude::{SO_LINGER, SOL_SOCKET};

use crate::random::Random;

/// Two threads a connection: they hold a buffer and little else.
const STACK_BYTES: usize = 128 * 1024;

const BUFFER_BYTES: usize = 16 * 1024;

/// Only so many bytes of a connection go in slices: a system call a byte takes its time.
const SLICED_BYTES: usize = 4096;

/// How many kinds of [`Fault`] there are.
pub const KINDS: usize = 8;

/// What is done to a connection.
#[derive(Clone, Copy)]
enum Fault {
    None,
    /// Each piece comes later.
    Latency(Duration),
    /// The first bytes come few at a time.
    Slices(usize),
    /// After so many bytes nothing is read for a while.
    Stall(usize, Duration),
    /// So many bytes every millisecond.
    Bandwidth(usize),
    /// The end comes later.
    SlowClose(Duration),
    /// After so many bytes one side hears the end, and the rest is never read.
    HalfClose(usize),
    /// After so many bytes both sides are reset.
    Reset(usize),
}

impl Fault {
    fn choose(random: &mut Random) -> Fault {
        let after = 1 << random.below(20);
        match random.below(16) {
            0..3 => Fault::Latency(Duration::from_micros(random.below(20_000) as u64)),
            3..6 => Fault::Slices(1 + random.below(64)),
            6..9 => Fault::Stall(
                after,
                Duration::from_millis(200 + random.below(1_300) as u64),
            ),
            9..11 => Fault::Bandwidth(256 << random.below(6)),
            11 => Fault::SlowClose(Duration::from_millis(random.below(500) as u64)),
            12 => Fault::HalfClose(after),
            13 => Fault::Reset(after),
            _ => Fault::None,
        }
    }

    fn index(self) -> usize {
        match self {
            Fault::None => 0,
            Fault::Latency(_) => 1,
            Fault::Slices(_) => 2,
            Fault::Stall(..) => 3,
            Fault::Bandwidth(_) => 4,
            Fault::SlowClose(_) => 5,
            Fault::HalfClose(_) => 6,
            Fault::Reset(_) => 7,
        }
    }
}

/// What the proxies have done so far.
#[derive(Default)]
pub struct Counts {
    kinds: [AtomicU64; KINDS],
    /// Connections that a half-close or a reset really cut (others ended before it was due).
    cut: AtomicU64,
}

impl Counts {
    pub fn cut(&self) -> u64 {
        self.cut.load(Ordering::SeqCst)
    }

    /// "3 none, 4 latency, …"
    pub fn describe(&self) -> String {
        let names = [
            "none",
            "latency",
            "slices",
            "stall",
            "bandwidth",
            "slow close",
            "half-close",
            "reset",
        ];
        let each = names.iter().zip(&self.kinds);
        let texts: Vec<_> = each
            .map(|(name, count)| format!("{} {name}", count.load(Ordering::Relaxed)))
            .collect();
        texts.join(", ")
    }
}

/// Starts a proxy whose connections go on to one of `upstreams`, once these are known: its address.
pub fn start(
    upstreams: Arc<OnceLock<Vec<SocketAddr>>>,
    seed: u64,
    counts: Arc<Counts>,
) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let address = listener.local_addr()?;
    let mut random = Random::new(seed);
    thread::Builder::new()
        .name("faults".to_owned())
        .spawn(move || {
            for client in listener.incoming().flatten() {
                let Some(upstreams) = upstreams.get() else {
                    continue;
                };
                let upstream = upstreams[random.below(upstreams.len())];
                let fault = Fault::choose(&mut random);
                // Which way it is done.
                let there = random.below(2) == 0;
                let counts = counts.clone();
                counts.kinds[fault.index()].fetch_add(1, Ordering::Relaxed);
                let _ = thread::Builder::new()
                    .stack_size(STACK_BYTES)
                    .spawn(move || carry(client, upstream, fault, there, &counts));
            }
        })?;
    Ok(address)
}

/// One connection, to its end.
fn carry(client: TcpStream, upstream: SocketAddr, fault: Fault, there: bool, counts: &Arc<Counts>) {
    let Ok(server) = TcpStream::connect(upstream) else {
        return;
    };
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let (Ok(client_too), Ok(server_too)) = (client.try_clone(), server.try_clone()) else {
        return;
    };
    let cut = Arc::new(AtomicBool::new(false));
    let way = |faulty| Way {
        fault: if faulty { fault } else { Fault::None },
        cut: cut.clone(),
        counts: counts.clone(),
    };
    let (there, back) = (way(there), way(!there));
    let other = thread::Builder::new()
        .stack_size(STACK_BYTES)
        .spawn(move || back.pump(&server_too, &client_too));
    there.pump(&client, &server);
    if let Ok(other) = other {
        let _ = other.join();
    }
}

struct Way {
    fault: Fault,
    /// The connection was reset: nobody is told of an end any more.
    cut: Arc<AtomicBool>,
    counts: Arc<Counts>,
}

impl Way {
    fn pump(&self, from: &TcpStream, to: &TcpStream) {
        match self.copy(from, to) {
            Ok(true) => {
                let _ = to.shutdown(Shutdown::Write);
            }
            Ok(false) => {}
            // One side is gone; the other one shall not wait for it.
            Err(_) => {
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
            }
        }
    }

    /// Whether the end is to be passed on.
    fn copy(&self, mut from: &TcpStream, mut to: &TcpStream) -> io::Result<bool> {
        let mut buffer = [0; BUFFER_BYTES];
        let mut passed = 0;
        loop {
            let count = from.read(&mut buffer)?;
            if count == 0 {
                if let Fault::SlowClose(pause) = self.fault {
                    thread::sleep(pause);
                }
                return Ok(!self.cut.load(Ordering::SeqCst));
            }
            let mut bytes = &buffer[..count];
            let reached = |after: usize| (passed..passed + count).contains(&after);
            match self.fault {
                Fault::Latency(pause) => thread::sleep(pause),
                Fault::Stall(after, pause) if reached(after) => thread::sleep(pause),
                Fault::Bandwidth(per_ms) => {
                    thread::sleep(Duration::from_micros((count * 1000 / per_ms) as u64));
                }
                Fault::Slices(each) if passed < SLICED_BYTES => {
                    for slice in bytes[..count.min(SLICED_BYTES)].chunks(each) {
                        to.write_all(slice)?;
                    }
                    bytes = &bytes[count.min(SLICED_BYTES)..];
                }
                Fault::HalfClose(after) if reached(after) => {
                    self.counts.cut.fetch_add(1, Ordering::SeqCst);
                    to.write_all(&bytes[..after - passed])?;
                    return Ok(true);
                }
                Fault::Reset(after) if reached(after) => {
                    self.counts.cut.fetch_add(1, Ordering::SeqCst);
                    to.write_all(&bytes[..after - passed])?;
                    self.cut.store(true, Ordering::SeqCst);
                    reset_when_closed(from)?;
                    reset_when_closed(to)?;
                    // The other way ends, so that the last descriptors go.
                    let _ = from.shutdown(Shutdown::Both);
                    let _ = to.shutdown(Shutdown::Both);
                    return Ok(false);
                }
                _ => {}
            }
            to.write_all(bytes)?;
            passed += count;
        }
    }
}

/// Makes the last close a reset.
fn reset_when_closed(stream: &TcpStream) -> io::Result<()> {
    let double = Socket::from_fd(OwnedFd::from(stream.try_clone()?))?;
    // struct linger: on, 0 seconds.
    let linger: Vec<u8> = [1i32, 0].iter().flat_map(|n| n.to_ne_bytes()).collect();
    double.setsockopt(SOL_SOCKET, SO_LINGER, &linger[..])?;
    Ok(())
}
