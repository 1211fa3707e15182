//! Deadlines: a timeout is neither early nor late, and it loses nothing that arrives just then.
#![allow(unsafe_code)]

mod support;

use std::os::fd::AsRawFd;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::*;
use ringsock::{JoinError, JoinHandle, Result, Runtime, sleep, socketpair, spawn};
use support::{Random, checked, listener, seed, tcp_pair};

/// What a clock may differ from another: no timeout is earlier than this.
const EARLY: Duration = Duration::from_millis(1);

/// Long enough to say that a wait did not end when it had to.
const LATE: Duration = Duration::from_secs(20);

/// How many trial loops run at once in a runtime.
const LOOPS: usize = 16;

fn trials() -> usize {
    let given = std::env::var("RINGSOCK_TRIALS").ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(20_000)
}

/// Runs `body` on a plain thread, and in a fiber.
fn in_both_worlds(body: fn(&'static str)) {
    checked(move || {
        body("on a plain thread");
        ringsock::run(move || body("in a fiber"));
    });
}

/// Sends until nothing more fits, without waiting: how many bytes fitted.
fn fill(socket: &Socket, bytes: &[u8]) -> usize {
    let mut sent = 0;
    while sent < bytes.len() {
        match socket.send_with(&bytes[sent..], MSG_DONTWAIT) {
            Ok(count) => sent += count,
            Err(error) if error.is_would_block() => return sent,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("{sent} bytes fitted");
}

/// Fills the queue of a listener that was given a backlog of 0: the next connection waits.
fn fill_backlog(address: &Address) -> Vec<Socket> {
    (0..4)
        .map(|_| {
            let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
            client.setblocking(false).unwrap();
            let under_way = client.connect(address).unwrap_err();
            assert_eq!(under_way.errno(), Some(libc::EINPROGRESS));
            client
        })
        .collect()
}

// Around the deadline.

/// Finds the delay at which a peer meets the deadline: later after a success, earlier after a timeout.
struct Aim {
    timeout_us: u64,
    delay_us: u64,
    random: Random,
}

impl Aim {
    fn new(seed: u64) -> Aim {
        let mut random = Random::new(seed);
        let timeout_us = 99 + random.up_to(201) as u64;
        Aim {
            timeout_us,
            delay_us: timeout_us / 2,
            random,
        }
    }

    fn timeout(&self) -> Duration {
        Duration::from_micros(self.timeout_us)
    }

    /// The delay of this trial: tens of µs around the aim.
    fn delay(&mut self) -> Duration {
        let delay_us = self.delay_us + self.random.up_to(40) as u64;
        Duration::from_micros(delay_us.saturating_sub(20))
    }

    fn learn(&mut self, timed_out: bool) {
        let step_us = self.random.up_to(8) as u64;
        if !timed_out {
            self.delay_us += step_us;
        } else if self.delay_us > 20 {
            self.delay_us = self.delay_us.saturating_sub(step_us);
        } else if self.timeout_us < 20_000 {
            // A machine so busy that nothing is fast enough: more time.
            self.timeout_us += 50;
        }
    }
}

/// How the trials came out.
#[derive(Default)]
struct Tally {
    in_time: AtomicUsize,
    timed_out: AtomicUsize,
}

impl Tally {
    fn count(&self, timed_out: bool) {
        let which = if timed_out {
            &self.timed_out
        } else {
            &self.in_time
        };
        which.fetch_add(1, Ordering::Relaxed);
    }

    /// Every trial counted, and at least one in a hundred came out either way.
    fn assert_both(&self, trials: usize, seed: u64) {
        let in_time = self.in_time.load(Ordering::SeqCst);
        let timed_out = self.timed_out.load(Ordering::SeqCst);
        println!("{in_time} in time, {timed_out} timed out");
        assert_eq!(in_time + timed_out, trials, "seed {seed}");
        assert!(
            in_time * 100 >= trials && timed_out * 100 >= trials,
            "seed {seed}: {in_time} in time, {timed_out} timed out: the deadline was not met"
        );
    }
}

/// One of the loops: its share of the trials, its own random numbers, the common tally.
struct Share {
    index: usize,
    trials: usize,
    seed: u64,
    tally: Arc<Tally>,
}

/// The trials, shared out over loops that run at once.
fn shares(loops: usize) -> (Vec<Share>, impl FnOnce()) {
    let (trials, seed, tally) = (trials(), seed(), Arc::new(Tally::default()));
    let shares = (0..loops)
        .map(|index| Share {
            index,
            trials: trials / loops + usize::from(index < trials % loops),
            seed: seed.wrapping_add(index as u64),
            tally: tally.clone(),
        })
        .collect();
    (shares, move || tally.assert_both(trials, seed))
}

/// Runs the trials as fibers of one worker.
fn trials_in_fibers(run_share: fn(Share)) {
    checked(move || {
        ringsock::run(move || {
            let (shares, check) = shares(LOOPS);
            let fibers: Vec<_> = shares
                .into_iter()
                .map(|share| ringsock::spawn(move || run_share(share)))
                .collect();
            for fiber in fibers {
                fiber.join().unwrap();
            }
            check();
        });
    });
}

/// The number at `offset` of a stream whose bytes tell a gap from a repetition.
fn pattern(offset: usize) -> u8 {
    (offset % 251) as u8
}

/// Told to by a delay in µs and a count, sends so many bytes that much later; until its peer is gone.
fn write_when_told(socket: &Socket) {
    let mut offset = 0;
    let mut order = [0; 5];
    loop {
        let mut have = 0;
        while have < order.len() {
            match socket.recv_into(&mut order[have..]).unwrap() {
                0 => return,
                count => have += count,
            }
        }
        let delay_us = u32::from_le_bytes(order[..4].try_into().unwrap());
        let count = usize::from(order[4]);
        ringsock::sleep(Duration::from_micros(delay_us.into())).unwrap();
        let bytes: Vec<u8> = (offset..offset + count).map(pattern).collect();
        socket.sendall(&bytes).unwrap();
        offset += count;
    }
}

/// Receives with a timeout what the peer, told to, sends around that time.
fn receive_around_the_deadline(socket: &Socket, share: &Share) {
    let mut aim = Aim::new(share.seed);
    let mut buffer = [0; 128];
    let mut received = 0;
    let take = |count: usize, received: &mut usize, bytes: &[u8], trial: usize| {
        assert!(count > 0, "seed {}, trial {trial}: the end", share.seed);
        for byte in &bytes[..count] {
            let expected = pattern(*received);
            assert_eq!(*byte, expected, "seed {}, trial {trial}", share.seed);
            *received += 1;
        }
    };
    let mut sent = 0;
    for trial in 0..share.trials {
        let count = aim.random.up_to(64);
        let mut order = [0; 5];
        let delay_us = aim.delay().as_micros() as u32;
        order[..4].copy_from_slice(&delay_us.to_le_bytes());
        order[4] = count as u8;
        socket.settimeout(aim.timeout()).unwrap();
        socket.sendall(&order).unwrap();
        sent += count;
        // A short buffer now and then: the rest is the next call's.
        let most = aim.random.up_to(buffer.len());
        let timed_out = match socket.recv_into(&mut buffer[..most]) {
            Ok(count) => {
                take(count, &mut received, &buffer, trial);
                false
            }
            Err(Error::Timeout) => true,
            Err(error) => panic!("seed {}, trial {trial}: {error}", share.seed),
        };
        share.tally.count(timed_out);
        aim.learn(timed_out);
        socket.settimeout(60).unwrap();
        while received < sent {
            let count = socket.recv_into(&mut buffer).unwrap_or_else(|error| {
                panic!(
                    "seed {}, trial {trial}: {} bytes lost: {error}",
                    share.seed,
                    sent - received
                )
            });
            take(count, &mut received, &buffer, trial);
        }
        assert_eq!(received, sent, "seed {}, trial {trial}", share.seed);
    }
}

fn pair_for(share: &Share) -> (Socket, Socket) {
    if share.index.is_multiple_of(2) {
        socketpair().unwrap()
    } else {
        tcp_pair()
    }
}

#[test]
fn bytes_that_arrive_around_the_deadline_are_never_lost_in_fibers() {
    trials_in_fibers(|share| {
        let (socket, peer) = pair_for(&share);
        let writer = ringsock::spawn(move || write_when_told(&peer));
        receive_around_the_deadline(&socket, &share);
        drop(socket);
        writer.join().unwrap();
    });
}

#[test]
fn bytes_from_a_thread_around_the_deadline_are_never_lost_in_fibers() {
    checked(|| {
        let (shares, check) = shares(4);
        let mut writers = Vec::new();
        let mut readers = Vec::new();
        for share in shares {
            let (socket, peer) = pair_for(&share);
            writers.push(thread::spawn(move || write_when_told(&peer)));
            readers.push(move || receive_around_the_deadline(&socket, &share));
        }
        ringsock::run(|| {
            let readers: Vec<_> = readers.into_iter().map(ringsock::spawn).collect();
            for reader in readers {
                reader.join().unwrap();
            }
        });
        for writer in writers {
            writer.join().unwrap();
        }
        check();
    });
}

#[test]
fn bytes_that_arrive_around_the_deadline_are_never_lost_on_plain_threads() {
    checked(|| {
        let (shares, check) = shares(4);
        let mut threads = Vec::new();
        for share in shares {
            let (socket, peer) = pair_for(&share);
            threads.push(thread::spawn(move || write_when_told(&peer)));
            threads.push(thread::spawn(move || {
                receive_around_the_deadline(&socket, &share);
            }));
        }
        for thread in threads {
            thread.join().unwrap();
        }
        check();
    });
}

/// Receives around the deadline, closes, and then keeps its thread off the ring: the peer has to see the end all the same.
fn close_after_a_receive_around_the_deadline(by_dropping: bool) {
    let seed = seed();
    let mut aim = Aim::new(seed);
    let (give, take) = mpsc::channel::<(Socket, Duration)>();
    let (answer, answered) = mpsc::channel();
    let peers = thread::spawn(move || {
        for (peer, delay) in take {
            let start = Instant::now();
            while start.elapsed() < delay {
                std::hint::spin_loop();
            }
            peer.sendall(b"x").unwrap();
            peer.settimeout(5).unwrap();
            // A byte that was not received makes the end a reset.
            let end = peer.recv(1).map(|bytes| bytes.len());
            answer.send(end).unwrap();
        }
    });
    for trial in 0..trials() / 4 {
        let (socket, peer) = socketpair().unwrap();
        socket.settimeout(aim.timeout()).unwrap();
        give.send((peer, aim.delay())).unwrap();
        let result = socket.recv(1);
        let timed_out = result == Err(Error::Timeout);
        aim.learn(timed_out);
        if timed_out {
            // The byte is on its way: nothing may be left in the queue.
            socket.settimeout(60).unwrap();
            socket.recv(1).unwrap();
        }
        if !by_dropping {
            socket.close().unwrap();
        }
        drop(socket);
        let end = answered.recv().unwrap();
        assert_eq!(
            end,
            Ok(0),
            "seed {seed}, trial {trial}, timed out {timed_out}: the peer was not told"
        );
    }
    drop(give);
    peers.join().unwrap();
}

#[test]
fn a_close_after_a_receive_around_the_deadline_tells_the_peer_on_a_plain_thread() {
    checked(|| close_after_a_receive_around_the_deadline(false));
}

#[test]
fn a_drop_after_a_receive_around_the_deadline_tells_the_peer_on_a_plain_thread() {
    checked(|| close_after_a_receive_around_the_deadline(true));
}

#[test]
fn a_close_after_a_receive_around_the_deadline_tells_the_peer_in_a_fiber() {
    checked(|| ringsock::run(|| close_after_a_receive_around_the_deadline(false)));
}

/// Reads to the end, beginning that much later: how many bytes of the pattern came.
fn drain(socket: &Socket, delay: Duration) -> usize {
    ringsock::sleep(delay).unwrap();
    let mut chunk = vec![0; 16_384];
    let mut received = 0;
    loop {
        let count = socket.recv_into(&mut chunk).unwrap();
        if count == 0 {
            return received;
        }
        for byte in &chunk[..count] {
            assert_eq!(*byte, pattern(received), "byte {received}");
            received += 1;
        }
    }
}

fn small_pair() -> (Socket, Socket) {
    let (left, right) = socketpair().unwrap();
    left.setsockopt(SOL_SOCKET, SO_SNDBUF, 4096).unwrap();
    (left, right)
}

#[test]
fn sendall_to_a_peer_that_drains_around_the_deadline_delivers_a_prefix_or_all() {
    trials_in_fibers(|share| {
        let mut aim = Aim::new(share.seed);
        let data: Vec<u8> = (0..24_000).map(pattern).collect();
        for trial in 0..share.trials {
            let (socket, peer) = small_pair();
            let delay = aim.delay();
            let drainer = ringsock::spawn(move || drain(&peer, delay));
            socket.settimeout(aim.timeout()).unwrap();
            let result = socket.sendall(&data);
            drop(socket);
            let received = drainer.join().unwrap();
            let timed_out = match result {
                Ok(()) => {
                    assert_eq!(received, data.len(), "seed {}, trial {trial}", share.seed);
                    false
                }
                Err(Error::Timeout) => {
                    assert!(received <= data.len(), "seed {}, trial {trial}", share.seed);
                    true
                }
                Err(error) => panic!("seed {}, trial {trial}: {error}", share.seed),
            };
            share.tally.count(timed_out);
            aim.learn(timed_out);
        }
    });
}

#[test]
fn send_around_the_deadline_reports_what_the_peer_gets() {
    trials_in_fibers(|share| {
        let mut aim = Aim::new(share.seed);
        let data: Vec<u8> = (0..1 << 20).map(pattern).collect();
        for trial in 0..share.trials {
            let (socket, peer) = small_pair();
            let before = fill(&socket, &data);
            let delay = aim.delay();
            let drainer = ringsock::spawn(move || drain(&peer, delay));
            socket.settimeout(aim.timeout()).unwrap();
            let end = before + aim.random.up_to(8_000);
            let result = socket.send(&data[before..end]);
            drop(socket);
            let received = drainer.join().unwrap();
            let (sent, timed_out) = match result {
                Ok(sent) => (sent, false),
                Err(Error::Timeout) => (0, true),
                Err(error) => panic!("seed {}, trial {trial}: {error}", share.seed),
            };
            assert!(timed_out || sent > 0);
            assert_eq!(
                received,
                before + sent,
                "seed {}, trial {trial}",
                share.seed
            );
            share.tally.count(timed_out);
            aim.learn(timed_out);
        }
    });
}

/// Connects that much later and says its number: the socket, so that it lives as long as the trial.
fn connect_later(family: Family, address: &Address, delay: Duration, number: u32) -> Socket {
    ringsock::sleep(delay).unwrap();
    let client = Socket::new(family, SOCK_STREAM, 0).unwrap();
    if family != AF_UNIX {
        // Closed with a reset, it leaves no port in TIME_WAIT.
        let at_once = [1i32, 0].map(i32::to_ne_bytes).concat();
        client
            .setsockopt(SOL_SOCKET, libc::SO_LINGER, at_once.as_slice())
            .unwrap();
    }
    client.connect(address).unwrap();
    client.sendall(&number.to_le_bytes()).unwrap();
    client
}

#[test]
fn connections_around_the_deadline_are_all_accepted() {
    trials_in_fibers(|share| {
        let mut aim = Aim::new(share.seed);
        let (family, listener) = if share.index.is_multiple_of(2) {
            (AF_INET, listener(8))
        } else {
            let name = format!("\0ringsock-deadlines-{}-{}", std::process::id(), share.seed);
            let listener = Socket::new(AF_UNIX, SOCK_STREAM, 0).unwrap();
            listener.bind(name.as_bytes()).unwrap();
            listener.listen(8).unwrap();
            (AF_UNIX, listener)
        };
        let address = listener.getsockname().unwrap();
        for trial in 0..share.trials {
            let (address, delay) = (address.clone(), aim.delay());
            let client =
                ringsock::spawn(move || connect_later(family, &address, delay, trial as u32));
            listener.settimeout(aim.timeout()).unwrap();
            let first = listener.accept();
            let timed_out = first.is_err();
            let conn = match first {
                Ok((conn, _)) => conn,
                Err(Error::Timeout) => {
                    listener.settimeout(60).unwrap();
                    listener
                        .accept()
                        .unwrap_or_else(|error| {
                            panic!("seed {}, trial {trial}: {error}", share.seed)
                        })
                        .0
                }
                Err(error) => panic!("seed {}, trial {trial}: {error}", share.seed),
            };
            let number = conn.recv_with(4, MSG_WAITALL).unwrap();
            assert_eq!(
                number,
                &(trial as u32).to_le_bytes(),
                "seed {}, trial {trial}: another trial's connection",
                share.seed
            );
            // The client's reset comes first.
            drop(client.join().unwrap());
            drop(conn);
            share.tally.count(timed_out);
            aim.learn(timed_out);
        }
        listener.setblocking(false).unwrap();
        assert!(listener.accept().unwrap_err().is_would_block());
    });
}

// Neither early nor for ever.

/// `call` ends with a timeout, not before this long.
fn assert_times_out<T>(what: &str, after: Duration, call: impl FnOnce() -> Result<T>) {
    let start = Instant::now();
    let result = call().map(drop);
    let took = start.elapsed();
    assert_eq!(result, Err(Error::Timeout), "{what}, after {took:?}");
    assert!(
        took + EARLY >= after,
        "{what}: {took:?} is early for {after:?}"
    );
    assert!(took < LATE, "{what}: {took:?} is late for {after:?}");
}

#[test]
fn no_timeout_is_early() {
    in_both_worlds(|world| {
        let what = |call: &str| format!("{call} {world}");
        let (socket, _peer) = socketpair().unwrap();
        let (tcp, _tcp_peer) = tcp_pair();
        let listener = listener(0);
        let address = listener.getsockname().unwrap();
        let _queued = fill_backlog(&address);
        let waiting = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
        waiting.listen(1).unwrap();
        let mut byte = [0];
        let megabytes = vec![7; 16 << 20];
        for milliseconds in [2, 5, 17, 60] {
            let after = Duration::from_millis(milliseconds);
            for socket in [&socket, &tcp, &waiting] {
                socket.settimeout(after).unwrap();
            }
            assert_times_out(&what("recv"), after, || socket.recv(1));
            assert_times_out(&what("recv_into"), after, || tcp.recv_into(&mut byte));
            assert_times_out(&what("recv_with"), after, || {
                socket.recv_with(8, MSG_WAITALL)
            });
            assert_times_out(&what("accept"), after, || waiting.accept());
            assert_times_out(&what("sendall"), after, || socket.sendall(&megabytes));
            assert_times_out(&what("sendall"), after, || tcp.sendall(&megabytes));
            assert_times_out(&what("send"), after, || socket.send(b"x"));
            let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
            client.settimeout(after).unwrap();
            assert_times_out(&what("connect"), after, || client.connect(&address));

            let start = Instant::now();
            assert_eq!(ringsock::sleep(after), Ok(()));
            let took = start.elapsed();
            assert!(
                took + EARLY >= after,
                "sleep {world}: {took:?} for {after:?}"
            );
        }
    });
}

/// A receive into much memory waits for readiness rather than for itself. It ends as any other does.
#[test]
fn a_receive_of_much_ends_as_any_other() {
    const MUCH: usize = 64 * 1024;
    fn receive(socket: &Socket) -> JoinHandle<(Result<usize>, Duration)> {
        let socket = socket.clone();
        spawn(move || {
            let start = Instant::now();
            let received = socket.recv_into(&mut vec![0; MUCH]);
            (received, start.elapsed())
        })
    }
    checked(|| {
        for pair in [tcp_pair, || socketpair().unwrap()] {
            ringsock::run(move || {
                let (left, right) = pair();
                right.settimeout(0.05).unwrap();
                assert_times_out("alone", Duration::from_millis(50), || {
                    right.recv_into(&mut vec![0; MUCH])
                });
                // Both are told of the byte, and one finds nothing any more: its time goes on.
                let timeout = Duration::from_secs(1);
                right.settimeout(timeout).unwrap();
                let both = [receive(&right), receive(&right)];
                sleep(0.8).unwrap();
                left.sendall(b"x").unwrap();
                let mut both = both.map(|receiving| receiving.join().unwrap());
                both.sort_by_key(|(received, _)| received.is_err());
                assert_eq!(both[0].0, Ok(1));
                assert_eq!(both[1].0, Err(Error::Timeout));
                let elapsed = both[1].1;
                assert!(elapsed > timeout - EARLY, "{elapsed:?}");
                assert!(
                    elapsed < timeout + Duration::from_millis(600),
                    "{elapsed:?}"
                );

                right.settimeout(None).unwrap();
                let ended = ringsock::timeout(0.05, || right.recv_into(&mut vec![0; MUCH]));
                assert_eq!(ended, Err(Error::Timeout));
                let receiving = receive(&right);
                sleep(0.005).unwrap();
                receiving.cancel();
                assert_eq!(receiving.join().unwrap().0, Err(Error::Cancelled));
                let receiving = receive(&right);
                sleep(0.005).unwrap();
                left.sendall(b"all there is").unwrap();
                assert_eq!(receiving.join().unwrap().0, Ok(12));
                let receiving = receive(&right);
                sleep(0.005).unwrap();
                left.shutdown(SHUT_WR).unwrap();
                assert_eq!(receiving.join().unwrap().0, Ok(0));
                let receiving = receive(&left);
                sleep(0.005).unwrap();
                left.close().unwrap();
                let closed = receiving.join().unwrap().0.unwrap_err();
                assert_eq!(closed.errno(), Some(libc::EBADF));
            });
        }
        ringsock::run(|| {
            let received = listener(1).recv_into(&mut vec![0; MUCH]);
            assert_eq!(received.unwrap_err().errno(), Some(libc::ENOTCONN));
        });
    });
}

#[test]
fn a_timeout_block_bounds_every_call_in_it() {
    in_both_worlds(|world| {
        let after = Duration::from_millis(30);
        let what = |call: &str| format!("{call} {world}");
        let bounded = |call: &str, body: &dyn Fn() -> Result<()>| {
            assert_times_out(&what(call), after, || ringsock::timeout(after, body));
        };
        let (socket, peer) = socketpair().unwrap();
        let waiting = listener(1);
        let full = listener(0);
        let address = full.getsockname().unwrap();
        let _queued = fill_backlog(&address);
        let megabytes = vec![7; 4 << 20];
        bounded("sleep", &|| ringsock::sleep(60));
        bounded("recv", &|| socket.recv(1).map(drop));
        bounded("accept", &|| waiting.accept().map(drop));
        bounded("connect", &|| {
            Socket::new(AF_INET, SOCK_STREAM, 0)?.connect(&address)
        });
        bounded("many sleeps", &|| {
            loop {
                ringsock::sleep(0.004)?;
            }
        });
        bounded("many exchanges", &|| {
            loop {
                peer.sendall(b"x")?;
                socket.recv(1)?;
            }
        });
        // What was sent just before the end is still there.
        let _ = socket.recv_with(1, MSG_DONTWAIT);
        // The socket's own longer timeout does not matter; a shorter one does.
        socket.settimeout(60).unwrap();
        bounded("recv of a patient socket", &|| socket.recv(1).map(drop));
        bounded("sendall", &|| socket.sendall(&megabytes));
        socket.settimeout(after).unwrap();
        assert_times_out(&what("recv"), after, || {
            ringsock::timeout(60, || socket.recv(1))
        });
        // Afterwards nothing is bounded any more.
        socket.settimeout(None).unwrap();
        peer.sendall(b"y").unwrap();
        assert_eq!(socket.recv(1).unwrap(), b"y");
        assert_eq!(ringsock::timeout(None, || Ok(7)), Ok(7));
        assert_eq!(ringsock::timeout(60, || ringsock::sleep(0.001)), Ok(()));
    });
}

#[test]
fn of_nested_deadlines_the_earliest_counts() {
    in_both_worlds(|world| {
        let after = Duration::from_millis(30);
        assert_times_out(&format!("the inner one, {world}"), after, || {
            ringsock::timeout(60, || ringsock::timeout(after, || ringsock::sleep(60)))
        });
        assert_times_out(&format!("the outer one, {world}"), after, || {
            ringsock::timeout(after, || ringsock::timeout(60, || ringsock::sleep(60)))
        });
        // The inner one's end gives the outer one back: it still counts, from its own beginning.
        let whole = Duration::from_millis(60);
        assert_times_out(&format!("the outer one again, {world}"), whole, || {
            ringsock::timeout(whole, || {
                let inner = ringsock::timeout(after / 2, || ringsock::sleep(60));
                assert_eq!(inner, Err(Error::Timeout));
                ringsock::sleep(0.001)?;
                ringsock::timeout(None, || ringsock::sleep(60))
            })
        });
    });
}

#[test]
fn a_deadline_bounds_join_and_the_fiber_goes_on() {
    in_both_worlds(|world| {
        let runtime = Runtime::builder().build().unwrap();
        let (socket, peer) = socketpair().unwrap();
        let reading = runtime
            .handle()
            .spawn(move || socket.sendall(&socket.recv(16)?))
            .unwrap();
        let after = Duration::from_millis(30);
        assert_times_out(&format!("join {world}"), after, || {
            ringsock::timeout(after, || match reading.join() {
                Err(JoinError::Interrupted(error)) => Err::<(), _>(error),
                other => panic!("{world}: {other:?}"),
            })
        });
        // Detached, it is still there.
        peer.sendall(b"echo").unwrap();
        assert_eq!(peer.recv(16).unwrap(), b"echo");
        // A fiber that ends in time is joined.
        let ending = runtime.handle().spawn(|| 7).unwrap();
        let joined = ringsock::timeout(60, || Ok(ending.join().unwrap()));
        assert_eq!(joined, Ok(7));
    });
}

// Non-blocking mode.

/// Whether the open file has O_NONBLOCK.
fn is_nonblocking(socket: &Socket) -> bool {
    // SAFETY: no memory is passed; the socket keeps the number open.
    let flags = unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_GETFL) };
    assert!(flags >= 0);
    flags & libc::O_NONBLOCK != 0
}

#[test]
fn a_timeout_of_zero_never_waits() {
    in_both_worlds(|world| {
        for by_settimeout in [false, true] {
            let set = |socket: &Socket| {
                if by_settimeout {
                    socket.settimeout(0).unwrap();
                } else {
                    socket.setblocking(false).unwrap();
                }
                assert!(is_nonblocking(socket), "{world}");
                assert!(!socket.getblocking());
                assert_eq!(socket.gettimeout(), Some(0.0));
            };
            let again = |call: &str, result: Result<()>| {
                let errno = result.as_ref().err().and_then(Error::errno);
                assert_eq!(errno, Some(libc::EAGAIN), "{call} {world}: {result:?}");
            };
            let (socket, peer) = socketpair().unwrap();
            set(&socket);
            let start = Instant::now();
            again("recv", socket.recv(1).map(drop));
            again("recv_into", socket.recv_into(&mut [0; 4]).map(drop));
            again("recv_with", socket.recv_with(1, MSG_WAITALL).map(drop));
            again("sendall", socket.sendall(&vec![7; 8 << 20]));
            again("send", socket.send(b"x").map(drop));
            let listener = listener(1);
            set(&listener);
            again("accept", listener.accept().map(drop));
            let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
            set(&client);
            // Nobody answers there: a full queue.
            let full = self::listener(0);
            let address = full.getsockname().unwrap();
            let _queued = fill_backlog(&address);
            let under_way = client.connect(&address).unwrap_err();
            assert_eq!(under_way.errno(), Some(libc::EINPROGRESS), "{world}");
            assert!(start.elapsed() < LATE);
            // What is there comes at once, also in this mode.
            peer.sendall(b"there").unwrap();
            assert_eq!(socket.recv(16).unwrap(), b"there");
        }
    });
}

#[test]
fn the_descriptors_flag_follows_the_timeout() {
    in_both_worlds(|world| {
        let (socket, peer) = socketpair().unwrap();
        assert!(!is_nonblocking(&socket));
        for (timeout, expected) in [
            (Some(5.0), true),
            (None, false),
            (Some(0.0), true),
            (Some(0.5), true),
            (None, false),
        ] {
            socket.settimeout(timeout).unwrap();
            assert_eq!(is_nonblocking(&socket), expected, "{timeout:?} {world}");
            assert_eq!(socket.gettimeout(), timeout);
            assert_eq!(socket.getblocking(), timeout != Some(0.0));
        }
        socket.setblocking(false).unwrap();
        assert!(is_nonblocking(&socket));
        socket.setblocking(true).unwrap();
        assert!(!is_nonblocking(&socket));
        // With the flag set and a timeout, a call waits all the same.
        socket.settimeout(60).unwrap();
        let later = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            peer.sendall(b"later")
        });
        assert_eq!(socket.recv(16).unwrap(), b"later", "{world}");
        later.join().unwrap().unwrap();
        // An accepted socket is in blocking mode whatever its listener is in.
        let listener = listener(1);
        listener.settimeout(60).unwrap();
        let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
        client.connect(listener.getsockname().unwrap()).unwrap();
        let (conn, _) = listener.accept().unwrap();
        assert!(!is_nonblocking(&conn));
        assert_eq!(conn.gettimeout(), None);
    });
}

// Signals.

static SIGNALS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count_signal(_signal: i32) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// SIGUSR1 interrupts system calls from here on, as it does without SA_RESTART.
fn install_handler() {
    // SAFETY: all zeroes is a valid sigaction: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = count_signal as extern "C" fn(i32) as usize;
    // SAFETY: the action lives through the call; its handler only adds to an atomic.
    let installed = unsafe { libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()) };
    assert_eq!(installed, 0);
}

/// Signals the thread until `enough`, or its end.
fn pester<T>(thread: &thread::JoinHandle<T>, mut enough: impl FnMut(usize) -> bool) {
    let before = SIGNALS.load(Ordering::Relaxed);
    let start = Instant::now();
    while !thread.is_finished() && !enough(SIGNALS.load(Ordering::Relaxed) - before) {
        assert!(start.elapsed() < LATE, "the thread does not end");
        // SAFETY: the thread is not joined yet, so its id is valid.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGUSR1) };
        thread::sleep(Duration::from_micros(100));
    }
}

/// Runs `body` on a thread, in a fiber of it or not.
fn on_a_thread<T: Send + 'static>(
    in_fiber: bool,
    body: impl FnOnce() -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    thread::spawn(move || {
        if in_fiber {
            ringsock::run(body)
        } else {
            body()
        }
    })
}

#[test]
fn a_call_that_signals_interrupt_still_receives_its_data() {
    checked(|| {
        install_handler();
        for in_fiber in [false, true] {
            for timeout in [None, Some(60.0)] {
                for round in 0..5 {
                    let case =
                        format!("in a fiber: {in_fiber}, timeout {timeout:?}, round {round}");
                    let (socket, peer) = socketpair().unwrap();
                    let reader = on_a_thread(in_fiber, move || {
                        socket.settimeout(timeout)?;
                        socket.recv_with(64, MSG_WAITALL)
                    });
                    pester(&reader, |signals| signals >= 50);
                    assert!(!reader.is_finished(), "{case}: it ended without data");
                    peer.sendall(&[b'a'; 40]).unwrap();
                    pester(&reader, |signals| signals >= 50);
                    peer.sendall(&[b'b'; 24]).unwrap();
                    let received = reader.join().unwrap().unwrap();
                    let expected = [vec![b'a'; 40], vec![b'b'; 24]].concat();
                    assert_eq!(received, expected.as_slice(), "{case}");
                }
            }
        }
    });
}

#[test]
fn a_timeout_that_signals_interrupt_ends_in_time() {
    checked(|| {
        install_handler();
        let after = Duration::from_millis(200);
        for in_fiber in [false, true] {
            for call in ["recv", "accept", "sendall", "sleep", "timeout"] {
                let waiting = on_a_thread(in_fiber, move || {
                    let (socket, _peer) = socketpair().unwrap();
                    let listener = listener(1);
                    socket.settimeout(after).unwrap();
                    listener.settimeout(after).unwrap();
                    let what = format!("{call}, in a fiber: {in_fiber}");
                    assert_times_out(&what, after, || match call {
                        "recv" => socket.recv(1).map(drop),
                        "accept" => listener.accept().map(drop),
                        "sendall" => socket.sendall(&vec![7; 8 << 20]),
                        "sleep" => ringsock::sleep(after).and(Err(Error::Timeout)),
                        _ => ringsock::timeout(after, || ringsock::sleep(60)),
                    });
                });
                pester(&waiting, |_| false);
                waiting.join().unwrap();
            }
        }
    });
}

#[test]
fn every_connection_and_transfer_survives_signals() {
    checked(|| {
        install_handler();
        for in_fiber in [false, true] {
            let listener = listener(8);
            let address = listener.getsockname().unwrap();
            let server = on_a_thread(in_fiber, move || {
                for _ in 0..100 {
                    let (conn, _) = listener.accept().unwrap();
                    let bytes = conn.recv_with(1 << 16, MSG_WAITALL).unwrap();
                    conn.sendall(&bytes).unwrap();
                }
            });
            let client = on_a_thread(in_fiber, move || {
                let bytes: Vec<u8> = (0..1 << 16).map(pattern).collect();
                for _ in 0..100 {
                    let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
                    client.connect(&address).unwrap();
                    client.sendall(&bytes).unwrap();
                    let back = client.recv_with(bytes.len(), MSG_WAITALL).unwrap();
                    assert_eq!(back, bytes.as_slice());
                }
            });
            pester(&server, |signals| signals >= 200);
            pester(&client, |signals| signals >= 200);
            pester(&server, |_| false);
            client.join().unwrap();
            server.join().unwrap();
        }
    });
}
