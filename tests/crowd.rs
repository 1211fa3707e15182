//! A crowd beside the few who are measured: connections that are silent, that send and never read, that send a byte now and then
//! (slow-loris). The others are served about as fast as without it, and each of the crowd gets its own bytes back in the end.
//!
//! RINGSOCK_CROWD is how many are silent; of each of the other kinds there is a tenth of it. With it set, the 99th percentile of the
//! others' latency must stay below twice of what it is without a crowd (in a release build, on a machine that is not overloaded):
//!
//!     cargo build --release --examples
//!     RINGSOCK_CROWD=10000 cargo test --release --test crowd -- --nocapture
//!
//! 10,000 take 12,100 descriptors on either side (`ulimit -n`). Without it a few hundred, and a bound that only a stall exceeds.
#![allow(unsafe_code)]

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::*;
use support::{EchoServer, Endpoint, Family, Stream, eventually};

/// Connections that are measured, one message each at a time.
const MEASURED: usize = 16;

const MESSAGE_BYTES: usize = 64;

/// The buffers and the segments of a connection that never reads: small, for what they all hold is the kernel's memory.
const BUFFER_BYTES: i32 = 8192;
const SEGMENT_BYTES: i32 = 1000;

/// More than the kernel keeps of such a connection; those who are stuck have sent less.
const SEND_MAX: usize = 4 << 20;

/// Of those that never read: how many do in the end, to see what comes.
const READ_BACK: usize = 16;

/// Parts of a measurement.
const SLICES: u32 = 11;

/// Each slow-loris connection sends a byte so often.
const DRIP: Duration = Duration::from_secs(1);

/// The byte that a connection sends at an offset.
fn byte_at(connection: usize, offset: usize) -> u8 {
    (connection.wrapping_mul(31).wrapping_add(offset) % 251) as u8
}

fn bytes_of(connection: usize, range: std::ops::Range<usize>) -> Vec<u8> {
    range.map(|offset| byte_at(connection, offset)).collect()
}

/// The 99th percentile of a message's way there and back, in microseconds: the median of several slices of the window, so that
/// something else that the machine does for a moment is not taken for the server's doing.
fn p99_us(streams: &mut [Stream], window: Duration) -> f64 {
    median((0..SLICES).map(|_| slice_p99_us(streams, window / SLICES)))
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn slice_p99_us(streams: &mut [Stream], window: Duration) -> f64 {
    let message = [0x5a; MESSAGE_BYTES];
    let mut latencies = Vec::new();
    let end = Instant::now() + window;
    loop {
        let start = Instant::now();
        if start > end {
            break;
        }
        for stream in &mut *streams {
            stream.write_all(&message).unwrap();
        }
        for stream in &mut *streams {
            let mut back = [0; MESSAGE_BYTES];
            stream.read_exact(&mut back).unwrap();
            assert_eq!(back, message);
            latencies.push(start.elapsed().as_nanos() as u64);
        }
    }
    latencies.sort_unstable();
    latencies[latencies.len() * 99 / 100] as f64 / 1e3
}

/// A connection with small buffers and small segments, whose far end's buffers stay small as well: the kernel fits them to what it
/// can have in flight.
fn connect_small(server: &EchoServer) -> TcpStream {
    let Endpoint::Tcp(address) = &server.endpoint else {
        unreachable!("the server is a TCP one")
    };
    let socket = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    socket
        .setsockopt(SOL_SOCKET, SO_RCVBUF, BUFFER_BYTES)
        .unwrap();
    socket
        .setsockopt(SOL_SOCKET, SO_SNDBUF, BUFFER_BYTES)
        .unwrap();
    socket
        .setsockopt(IPPROTO_TCP, libc::TCP_MAXSEG, SEGMENT_BYTES)
        .unwrap();
    socket.connect(*address).unwrap();
    let stream = TcpStream::from(OwnedFd::try_from(socket).unwrap());
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    stream.set_nonblocking(true).unwrap();
    stream
}

/// Connections that send as much as they may and never read: each with how much it has sent.
fn stall(server: &EchoServer, count: usize) -> Vec<(TcpStream, usize)> {
    let mut stalled: Vec<_> = (0..count).map(|_| (connect_small(server), 0)).collect();
    // Until nobody could send any more for a while.
    let mut quiet = 0;
    while quiet < 10 {
        let mut sent = 0;
        for (connection, (stream, offset)) in stalled.iter_mut().enumerate() {
            let most = (*offset + (64 << 10)).min(SEND_MAX);
            if *offset == most {
                continue;
            }
            match stream.write(&bytes_of(connection, *offset..most)) {
                Ok(n) => {
                    *offset += n;
                    sent += n;
                }
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
            }
        }
        if sent > 0 {
            quiet = 0;
        } else {
            quiet += 1;
            thread::sleep(Duration::from_millis(10));
        }
    }
    stalled
}

/// Sends a byte on each of them in every [`DRIP`], one after the other, until told to stop: how many each has sent.
fn drip(streams: &mut [Stream], stop: &AtomicBool) -> Vec<usize> {
    let mut sent = vec![0; streams.len()];
    let start = Instant::now();
    let mut next = 0;
    while !stop.load(Ordering::Relaxed) {
        let due = start.elapsed().as_secs_f64() / DRIP.as_secs_f64() * streams.len() as f64;
        while (next as f64) < due {
            let connection = next % streams.len();
            let byte = byte_at(connection, sent[connection]);
            streams[connection].write_all(&[byte]).unwrap();
            sent[connection] += 1;
            next += 1;
        }
        thread::sleep(Duration::from_millis(5));
    }
    sent
}

fn expect_back(stream: &mut impl Read, connection: usize, bytes: usize) {
    let mut back = vec![0; bytes];
    stream.read_exact(&mut back).unwrap();
    assert!(
        back == bytes_of(connection, 0..bytes),
        "other bytes came back"
    );
}

/// One measurement on a server of its own, without a crowd and beside it: both 99th percentiles.
fn round(silent: usize, window: Duration) -> (f64, f64) {
    let others = silent / 10;
    let server = EchoServer::start(Family::V4, &[]).unwrap();
    let mut measured: Vec<Stream> = (0..MEASURED).map(|_| server.connect()).collect();
    p99_us(&mut measured, window / 4);
    let before = p99_us(&mut measured, window);
    let (descriptors, resident) = (server.descriptors(), server.resident_kib());

    let mut idle: Vec<Stream> = (0..silent).map(|_| server.connect()).collect();
    let mut stalled = stall(&server, others);
    let mut slow: Vec<Stream> = (0..others).map(|_| server.connect()).collect();
    let crowd = silent + 2 * others;
    eventually("all of the crowd are accepted", || {
        server.descriptors() == descriptors + crowd
    });
    let grown = server.resident_kib().saturating_sub(resident);
    let stop = AtomicBool::new(false);
    let (beside, dripped) = thread::scope(|scope| {
        let dripping = scope.spawn(|| drip(&mut slow, &stop));
        p99_us(&mut measured, window / 4);
        let beside = p99_us(&mut measured, window);
        stop.store(true, Ordering::Relaxed);
        (beside, dripping.join().unwrap())
    });

    // Whoever was neglected still has what is its own.
    for (connection, stream) in idle.iter_mut().enumerate() {
        stream
            .round_trip(&bytes_of(connection, 0..MESSAGE_BYTES))
            .unwrap();
    }
    for (connection, (stream, sent)) in slow.iter_mut().zip(&dripped).enumerate() {
        expect_back(stream, connection, *sent);
    }
    let stalled_bytes: usize = stalled.iter().map(|(_, sent)| sent).sum();
    assert!(stalled.iter().all(|(_, sent)| (1..SEND_MAX).contains(sent)));
    for (connection, (stream, sent)) in stalled.iter_mut().enumerate().take(READ_BACK) {
        stream.set_nonblocking(false).unwrap();
        expect_back(stream, connection, *sent);
    }

    let stalled = stalled.into_iter().map(|(stream, _)| Stream::Tcp(stream));
    idle.into_iter()
        .chain(stalled)
        .chain(slow)
        .for_each(Stream::reset);
    eventually("all of the crowd are gone", || {
        server.descriptors() == descriptors
    });
    let after = p99_us(&mut measured, window);
    drop(measured);
    server.finish();
    println!(
        "p99 {before:.0} µs before, {beside:.0} µs beside {silent} silent, {others} stalled ({stalled_bytes} bytes), {others} slow \
         ({} bytes); {after:.0} µs after; the server grew by {grown} KiB",
        dripped.iter().sum::<usize>()
    );
    ((before + after) / 2.0, beside)
}

#[test]
fn a_crowd_does_not_hold_up_the_others() {
    let asked = std::env::var("RINGSOCK_CROWD").ok();
    let asked: Option<usize> = asked.map(|text| text.parse().expect("a number"));
    let (silent, rounds, window, most) = match asked {
        Some(silent) => (silent, 5, Duration::from_millis(3300), 2.0),
        None => (500, 3, Duration::from_millis(330), 20.0),
    };
    let ratios: Vec<f64> = (0..rounds)
        .map(|_| {
            let (calm, beside) = round(silent, window);
            beside / calm
        })
        .collect();
    let ratio = median(ratios.iter().copied());
    println!("p99 beside the crowd is {ratio:.2} of that without it (median of {ratios:.2?})");
    assert!(ratio < most, "{ratio:.2}, not below {most}: {ratios:.2?}");
}
