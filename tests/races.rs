//! Seven races of an operation against its end: by a deadline or by a cancel, just as data or a connection comes.
//!
//! Whatever wins, each byte and each connection comes exactly once and in order, and no descriptor is left ([`checked`] counts). Two workers run against
//! each other: one calls, the other one delivers a delay later, which is aimed at the end. RINGSOCK_TRIALS says how often each race
//! is run (20,000 times if not said; the long form is in `tests/README.md`).
#![allow(unsafe_code)]

mod support;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use ringsock::prelude::*;
use ringsock::{
    Receiver, Result, Runtime, Sender, channel, create_server, sleep, socketpair, spawn, yield_now,
};
use support::{Random, checked, seed};

/// Trials that run at once, each on a connection of its own.
const LOOPS: usize = 4;

/// Longer than anything here takes; whoever waits so long has lost something.
const LATE: Duration = Duration::from_secs(60);

fn trials() -> usize {
    let given = std::env::var("RINGSOCK_TRIALS").ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(20_000)
}

/// Finds the delay at which what comes meets the end of the wait for it.
struct Aim {
    random: Random,
    end_us: u64,
    delay_us: u64,
    /// How often each came first: what was waited for, the end.
    won: [usize; 2],
}

impl Aim {
    fn new(seed: u64) -> Aim {
        Aim {
            random: Random::new(seed),
            end_us: 150,
            delay_us: 100,
            won: [0; 2],
        }
    }

    fn end(&self) -> Duration {
        Duration::from_micros(self.end_us)
    }

    fn delay(&mut self) -> Duration {
        let delay_us = self.delay_us + self.random.below(60);
        Duration::from_micros(delay_us.saturating_sub(30))
    }

    fn learn(&mut self, ended: bool) {
        self.won[usize::from(ended)] += 1;
        let step_us = self.random.below(10);
        if !ended {
            self.delay_us += step_us;
        } else if self.delay_us > 30 {
            self.delay_us -= step_us;
        } else if self.end_us < 20_000 {
            // Nothing is fast enough on this machine just now: more time.
            self.end_us += 20;
        }
    }
}

fn pattern(offset: usize) -> u8 {
    (offset % 251) as u8
}

/// On the other worker: sends so many bytes that much later, in two pieces.
fn write_when_told(socket: &Socket, told: &Receiver<(Duration, usize)>) {
    let mut offset = 0;
    while let Ok((delay, count)) = told.recv() {
        sleep(delay).unwrap();
        let bytes: Vec<u8> = (offset..offset + count).map(pattern).collect();
        socket.sendall(&bytes[..count / 2]).unwrap();
        socket.sendall(&bytes[count / 2..]).unwrap();
        offset += count;
    }
}

/// On the other worker: connects that much later, and says which connection it is. The end is a reset, which leaves no TIME_WAIT.
fn connect_when_told(address: &Address, told: &Receiver<(Duration, usize)>) {
    let mut last = None;
    while let Ok((delay, number)) = told.recv() {
        sleep(delay).unwrap();
        let unix = matches!(address, Address::Unix(_));
        let family = if unix { AF_UNIX } else { AF_INET };
        let client = Socket::new(family, SOCK_STREAM, 0).unwrap();
        let linger: Vec<u8> = [1i32, 0].iter().flat_map(|n| n.to_ne_bytes()).collect();
        client
            .setsockopt(SOL_SOCKET, SO_LINGER, &linger[..])
            .unwrap();
        client.connect(address).unwrap();
        client.sendall(&(number as u32).to_le_bytes()).unwrap();
        // The one before has been read by now: its number was answered by this order.
        last = Some(client);
    }
    drop(last);
}

/// Runs `trial` in loops on one worker, each with a fiber of the other worker that is told what to do.
fn race(
    other_side: fn(Side, &Receiver<(Duration, usize)>),
    run_trials: fn(Side, &Sender<(Duration, usize)>, &mut Aim, usize),
    sides: fn(usize) -> (Side, Side),
) {
    let (seed, trials) = (seed(), trials());
    checked(move || {
        let runtime = Runtime::builder().workers(2).build().unwrap();
        let handle = runtime.handle();
        let loops: Vec<_> = (0..LOOPS)
            .map(|index| {
                let (near, far) = sides(index);
                let (tell, told) = channel(1);
                let far = handle.spawn_on(1, move || other_side(far, &told)).unwrap();
                let near = handle.spawn_on(0, move || {
                    let mut aim = Aim::new(seed ^ index as u64);
                    run_trials(near, &tell, &mut aim, trials / LOOPS);
                    aim.won
                });
                (near.unwrap(), far)
            })
            .collect();
        let mut won = [0; 2];
        for (near, far) in loops {
            let one = near.join().unwrap();
            far.join().unwrap();
            won = [won[0] + one[0], won[1] + one[1]];
        }
        println!("it came first {} times, its end {} times", won[0], won[1]);
        assert!(
            won.iter().all(|count| *count * 100 >= trials),
            "seed {seed}: {won:?}: the end was not met"
        );
    });
}

/// What one side of a race works on.
enum Side {
    Stream(Socket),
    Listener(Socket),
    Address(Address),
}

fn streams(index: usize) -> (Side, Side) {
    let (near, far) = if index.is_multiple_of(2) {
        socketpair().unwrap()
    } else {
        support::tcp_pair()
    };
    (Side::Stream(near), Side::Stream(far))
}

fn listeners(index: usize) -> (Side, Side) {
    let listener = if index.is_multiple_of(2) {
        let listener = Socket::new(AF_UNIX, SOCK_STREAM, 0).unwrap();
        listener.bind("").unwrap();
        listener.listen(16).unwrap();
        listener
    } else {
        create_server(("127.0.0.1", 0)).unwrap()
    };
    let address = listener.getsockname().unwrap();
    (Side::Listener(listener), Side::Address(address))
}

fn write_side(side: Side, told: &Receiver<(Duration, usize)>) {
    let Side::Stream(socket) = side else {
        unreachable!("races of receives are between streams")
    };
    write_when_told(&socket, told);
}

fn connect_side(side: Side, told: &Receiver<(Duration, usize)>) {
    let Side::Address(address) = side else {
        unreachable!("races of accepts have an address to connect to")
    };
    connect_when_told(&address, told);
}

/// The bytes of one connection, as they come.
#[derive(Default)]
struct Stream {
    received: Cell<usize>,
}

impl Stream {
    fn take(&self, bytes: &[u8]) {
        for byte in bytes {
            let at = self.received.get();
            assert_eq!(*byte, pattern(at), "byte {at}: lost, doubled or moved");
            self.received.set(at + 1);
        }
    }
}

/// One race after the other: `attempt` waits for bytes until its end and says whether the end came first.
fn receive_trials(
    side: Side,
    tell: &Sender<(Duration, usize)>,
    aim: &mut Aim,
    trials: usize,
    attempt: fn(&Socket, &Rc<Stream>, Duration, usize) -> bool,
) {
    let Side::Stream(socket) = side else {
        unreachable!("races of receives are between streams")
    };
    let stream = Rc::new(Stream::default());
    let mut sent = 0;
    for trial in 0..trials {
        let count = 1 + aim.random.up_to(64);
        tell.send((aim.delay(), count)).unwrap();
        sent += count;
        let ended = attempt(&socket, &stream, aim.end(), sent - stream.received.get());
        aim.learn(ended);
        socket.settimeout(LATE).unwrap();
        while stream.received.get() < sent {
            let left = sent - stream.received.get();
            let rest = socket.recv(left);
            let rest = rest.unwrap_or_else(|error| panic!("trial {trial}: {left} bytes: {error}"));
            assert!(!rest.is_empty(), "trial {trial}: the end");
            stream.take(&rest);
        }
        assert_eq!(stream.received.get(), sent, "trial {trial}");
    }
}

/// What a call that a deadline or a cancel may end has come to: whether it was ended.
fn was_ended<T>(result: Result<T>, by: Error, take: impl FnOnce(T)) -> bool {
    match result {
        Ok(value) => {
            take(value);
            false
        }
        Err(error) => {
            assert_eq!(error, by);
            true
        }
    }
}

#[test]
fn a_receive_against_its_deadline() {
    race(
        write_side,
        |side, tell, aim, trials| {
            receive_trials(side, tell, aim, trials, |socket, stream, end, _| {
                let mut buffer = [0; 40];
                socket.settimeout(end).unwrap();
                let result = socket.recv_into(&mut buffer);
                was_ended(result, Error::Timeout, |n| stream.take(&buffer[..n]))
            });
        },
        streams,
    );
}

#[test]
fn a_receive_of_all_against_its_deadline() {
    race(
        write_side,
        |side, tell, aim, trials| {
            receive_trials(side, tell, aim, trials, |socket, stream, end, wanted| {
                let mut buffer = [0; 128];
                socket.settimeout(end).unwrap();
                let result = socket.recv_into_with(&mut buffer, wanted, MSG_WAITALL);
                // A part is what the deadline has left.
                let short = result.as_ref().is_ok_and(|n| *n < wanted);
                was_ended(result, Error::Timeout, |n| stream.take(&buffer[..n])) || short
            });
        },
        streams,
    );
}

/// Starts `call` in a fiber, cancels it `end` later, and says whether the cancel came first.
fn cancel_later<T: 'static>(
    call: impl FnOnce() -> Result<T> + 'static,
    end: Duration,
    take: impl FnOnce(T),
) -> bool {
    let fiber = spawn(call);
    yield_now();
    sleep(end).unwrap();
    fiber.cancel();
    was_ended(fiber.join().unwrap(), Error::Cancelled, take)
}

#[test]
fn a_receive_against_a_cancel() {
    race(
        write_side,
        |side, tell, aim, trials| {
            receive_trials(side, tell, aim, trials, |socket, stream, end, _| {
                let receiver = socket.clone();
                let receive = move || {
                    receiver.settimeout(None)?;
                    let mut buffer = [0; 40];
                    let n = receiver.recv_into(&mut buffer)?;
                    Ok(buffer[..n].to_vec())
                };
                cancel_later(receive, end, |bytes| stream.take(&bytes))
            });
        },
        streams,
    );
}

#[test]
fn a_stream_of_leases_against_a_cancel() {
    race(
        write_side,
        |side, tell, aim, trials| {
            receive_trials(side, tell, aim, trials, |socket, stream, end, _| {
                let (receiver, taken) = (socket.clone(), stream.clone());
                let before = stream.received.get();
                let receive = move || -> Result<()> {
                    receiver.settimeout(None)?;
                    for chunk in receiver.chunks() {
                        taken.take(&chunk?);
                    }
                    panic!("the stream ended");
                };
                cancel_later(receive, end, drop);
                stream.received.get() == before
            });
        },
        streams,
    );
}

/// One race after the other: `attempt` waits for a connection until its end and hands over what came.
fn accept_trials(
    side: Side,
    tell: &Sender<(Duration, usize)>,
    aim: &mut Aim,
    trials: usize,
    attempt: fn(&Socket, Duration) -> Vec<Socket>,
) {
    let Side::Listener(listener) = side else {
        unreachable!("races of accepts have a listener")
    };
    for trial in 0..trials {
        tell.send((aim.delay(), trial)).unwrap();
        let mut accepted = attempt(&listener, aim.end());
        aim.learn(accepted.is_empty());
        if accepted.is_empty() {
            listener.settimeout(LATE).unwrap();
            let late = listener.accept();
            accepted.push(
                late.unwrap_or_else(|error| panic!("trial {trial}: {error}"))
                    .0,
            );
        }
        assert_eq!(accepted.len(), 1, "trial {trial}: one came");
        accepted[0].settimeout(LATE).unwrap();
        let number = accepted[0].recv_with(4, MSG_WAITALL).unwrap();
        assert_eq!(number, (trial as u32).to_le_bytes(), "another connection");
    }
    listener.setblocking(false).unwrap();
    assert!(listener.accept().unwrap_err().is_would_block());
}

#[test]
fn an_accept_against_its_deadline() {
    race(
        connect_side,
        |side, tell, aim, trials| {
            accept_trials(side, tell, aim, trials, |listener, end| {
                let mut accepted = Vec::new();
                listener.settimeout(end).unwrap();
                was_ended(listener.accept(), Error::Timeout, |(conn, _)| {
                    accepted.push(conn);
                });
                accepted
            });
        },
        listeners,
    );
}

#[test]
fn an_accept_against_a_cancel() {
    race(
        connect_side,
        |side, tell, aim, trials| {
            accept_trials(side, tell, aim, trials, |listener, end| {
                let mut accepted = Vec::new();
                let acceptor = listener.clone();
                let accept = move || {
                    acceptor.settimeout(None)?;
                    acceptor.accept()
                };
                cancel_later(accept, end, |(conn, _)| accepted.push(conn));
                accepted
            });
        },
        listeners,
    );
}

#[test]
fn incoming_against_a_cancel() {
    race(
        connect_side,
        |side, tell, aim, trials| {
            accept_trials(side, tell, aim, trials, |listener, end| {
                let accepted = Rc::new(RefCell::new(Vec::new()));
                let (acceptor, kept) = (listener.clone(), accepted.clone());
                let accept = move || -> Result<()> {
                    acceptor.settimeout(None)?;
                    for conn in acceptor.incoming() {
                        kept.borrow_mut().push(conn?.0);
                    }
                    panic!("the listener ended");
                };
                cancel_later(accept, end, drop);
                accepted.take()
            });
        },
        listeners,
    );
}
