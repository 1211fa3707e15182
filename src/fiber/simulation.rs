//! Whole programs of fibers and sockets over the scripted driver: the same seed, the same story. A failing seed is in the
//! message; `simulate(seed, …)` plays it again.
//!
//! RINGSOCK_SEEDS says how many seeds each story is played with (20,000 if not said), RINGSOCK_FIRST_SEED from which on. The long
//! form is in `tests/README.md`.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use super::join::{Builder, spawn};
use super::story::{ENDINGS, PATIENT, socket_calls};
use super::{State, simulated, sleep, suspend, timeout, worker, yield_now};
use crate::driver::Op;
use crate::driver::op::timespec_from_ns;
use crate::driver::scripted::{Random, World};
use crate::error::{Error, Result};
use crate::socket::Socket;

/// [`simulated::run`] in the world of a seed: the story's result, and what the world is at its end.
fn simulate<T: 'static>(
    seed: u64,
    main: impl FnOnce(Rc<RefCell<World>>) -> T + 'static,
) -> (T, Rc<RefCell<World>>) {
    let world = World::new(Random::new(seed));
    let (result, operations) = simulated::run(&world, format_args!("seed {seed}"), main);
    OPERATIONS.with(|count| count.set(count.get() + operations));
    (result, world)
}

thread_local! {
    /// Operations of the stories that this test has played.
    static OPERATIONS: Cell<u64> = const { Cell::new(0) };
}

/// What a test says at its end.
fn say_how_much() {
    println!(
        "{} stories, {} operations",
        seeds().count(),
        OPERATIONS.get()
    );
}

/// Seeds of each story, if RINGSOCK_SEEDS does not say.
const SEEDS: u64 = 20_000;

/// The seeds that each story is played with.
fn seeds() -> std::ops::Range<u64> {
    let given = |name| -> Option<u64> { std::env::var(name).ok()?.parse().ok() };
    let first = given("RINGSOCK_FIRST_SEED").unwrap_or(1);
    first..first + given("RINGSOCK_SEEDS").unwrap_or(SEEDS)
}

/// How many of so many seeds have to show what is rare, for the story to be told. A few seeds alone say nothing about that.
fn one_in_twenty() -> u64 {
    let seeds = seeds().count() as u64;
    if seeds < 1_000 { 0 } else { seeds / 20 }
}

fn bytes(random: &mut Random, most: usize) -> Vec<u8> {
    let len = random.below(most + 1);
    (0..len).map(|_| random.next() as u8).collect()
}

/// Receives with random buffers and deadlines until the end of the stream, whatever times out or is cut short.
fn receive_all(
    socket: &Socket,
    random: &mut Random,
    timeout_ns: &mut dyn FnMut() -> i64,
) -> Result<Vec<u8>> {
    let mut received = Vec::new();
    loop {
        socket.set_timeout_ns(timeout_ns());
        let mut buffer = vec![0; 1 + random.below(40)];
        match socket.recv_into(&mut buffer) {
            Ok(0) => return Ok(received),
            Ok(n) => received.extend_from_slice(&buffer[..n]),
            Err(Error::Timeout) => {}
            Err(error) => return Err(error),
        }
    }
}

#[test]
fn data_at_the_deadline_is_received_whole_and_in_order() {
    let mut timeouts = 0u64;
    for seed in seeds() {
        let (timed_out, _) = simulate(seed, move |world| {
            let mut random = Random::new(seed ^ 0x5eed);
            let sent = bytes(&mut random, 300);
            let fd = world.borrow_mut().stream(&sent);
            let socket = Socket::simulated(fd);
            let mut timeouts = 0;
            let mut deadline_random = Random::new(seed ^ 0xdead);
            let received = receive_all(&socket, &mut random, &mut || {
                timeouts += 1;
                1 + deadline_random.below(2_000) as i64
            });
            assert_eq!(received, Ok(sent), "seed {seed}");
            timeouts
        });
        timeouts += timed_out;
    }
    assert!(
        timeouts >= one_in_twenty() * 20,
        "the deadlines were part of the story"
    );
    say_how_much();
}

/// Whose wait is ended by a fellow, before it has begun for want of room, does not wait.
#[test]
fn who_is_roused_before_there_is_room_for_its_wait_does_not_wait() {
    let mut had_no_room = 0u64;
    for seed in seeds() {
        let (has_no_room, _) = simulate(seed, move |_| {
            let waiting = Builder::new().spawn(|| {
                let duration = timespec_from_ns(1_000_000_000_000);
                suspend(&mut Op::Sleep { duration }, -1, None)
            });
            let waiting = waiting.unwrap();
            let fellow = waiting.fellow();
            yield_now();
            let fiber = worker().unwrap().fiber(fellow.slot, fellow.id).unwrap();
            let has_no_room = fiber.state.get() == State::Ready;
            fellow.end_wait();
            let code = waiting.join().unwrap();
            // One that has begun may be over when it is to end.
            assert!(
                code == -libc::ECANCELED || !has_no_room && code == -libc::ETIME,
                "seed {seed}: {code}"
            );
            has_no_room
        });
        had_no_room += u64::from(has_no_room);
    }
    assert!(had_no_room >= one_in_twenty(), "there was no room");
    say_how_much();
}

#[test]
fn a_timed_send_reports_exactly_what_the_peer_gets() {
    for seed in seeds() {
        simulate(seed, move |world| {
            let mut random = Random::new(seed ^ 0x5eed);
            let data = bytes(&mut random, 400);
            let fd = world.borrow_mut().stream(&[]);
            let socket = Socket::simulated(fd);
            let mut sent = 0;
            while sent < data.len() {
                socket.set_timeout_ns(1 + random.below(2_000) as i64);
                match socket.send(&data[sent..]) {
                    Ok(n) => sent += n,
                    Err(error) => assert_eq!(error, Error::Timeout, "seed {seed}"),
                }
                assert_eq!(world.borrow().peers[&fd].taken, data[..sent], "seed {seed}");
            }
        });
    }
    say_how_much();
}

#[test]
fn sendall_sends_all_or_a_prefix_by_its_deadline() {
    let mut outcomes = [0u64; 2];
    for seed in seeds() {
        let (timed_out, _) = simulate(seed, move |world| {
            let mut random = Random::new(seed ^ 0x5eed);
            let data = bytes(&mut random, 400);
            let fd = world.borrow_mut().stream(&[]);
            let socket = Socket::simulated(fd);
            let blocking = random.one_in(3);
            let limit_ns = if blocking {
                -1
            } else {
                1 + random.below(60_000) as i64
            };
            socket.set_timeout_ns(limit_ns);
            if random.one_in(2) {
                // There may be room for a part by then, which the first attempt takes.
                sleep(Duration::from_nanos(random.below(2_000) as u64)).unwrap();
            }
            let before_ns = world.borrow().now_ns;
            let result = socket.sendall(&data);
            let world = world.borrow();
            let taken = &world.peers[&fd].taken;
            match &result {
                Ok(()) => assert_eq!(*taken, data, "seed {seed}"),
                Err(error) => {
                    assert!(
                        *error == Error::Timeout && !blocking,
                        "seed {seed}: {error}"
                    );
                    assert!(
                        world.now_ns - before_ns >= limit_ns,
                        "seed {seed}: too early"
                    );
                    assert!(
                        data.starts_with(taken),
                        "seed {seed}: a hole in what was sent"
                    );
                }
            }
            usize::from(result.is_err())
        });
        outcomes[timed_out] += 1;
    }
    assert!(
        outcomes.iter().all(|count| *count >= one_in_twenty()),
        "both outcomes occur: {outcomes:?}"
    );
    say_how_much();
}

#[test]
fn every_connection_at_the_deadline_is_accepted_once() {
    for seed in seeds() {
        let (_, world) = simulate(seed, move |world| {
            let mut random = Random::new(seed ^ 0x5eed);
            let connections = random.below(12);
            let fd = world.borrow_mut().listener(connections);
            let socket = Socket::simulated(fd);
            let mut accepted = Vec::new();
            while accepted.len() < connections {
                socket.set_timeout_ns(1 + random.below(2_000) as i64);
                match socket.accept() {
                    Ok((conn, _)) => accepted.push(conn.fileno()),
                    Err(error) => assert_eq!(error, Error::Timeout, "seed {seed}"),
                }
            }
            accepted.sort_unstable();
            accepted.dedup();
            assert_eq!(
                accepted.len(),
                connections,
                "seed {seed}: a descriptor came twice"
            );
            let world = world.borrow();
            assert_eq!(world.peers[&fd].accepted, connections, "seed {seed}");
        });
        drop(world);
    }
    say_how_much();
}

/// Echo servers, sleepers, cancels, nested deadlines and joins at once, ended in the middle by the shutdown.
#[test]
fn a_busy_worker_keeps_every_promise() {
    for seed in seeds() {
        simulate(seed, move |world| {
            let mut random = Random::new(seed ^ 0x5eed);
            let mut echoes = Vec::new();
            for n in 0..1 + random.below(4) as u64 {
                let sent = bytes(&mut random, 200);
                let fd = world.borrow_mut().stream(&sent);
                let fiber = spawn(move || {
                    let socket = Socket::simulated(fd);
                    let mut random = Random::new(seed ^ n);
                    let mut buffer = [0; 32];
                    loop {
                        if random.one_in(4) {
                            yield_now();
                        }
                        let n = match timeout(1e-6, || socket.recv_into(&mut buffer)) {
                            Err(Error::Timeout) => continue,
                            other => other?,
                        };
                        if n == 0 {
                            return Ok::<(), Error>(());
                        }
                        socket.sendall(&buffer[..n])?;
                    }
                });
                echoes.push((fd, sent, fiber, random.one_in(4)));
            }
            let nap_ns = random.below(5_000) as u64;
            let sleeper = spawn(move || sleep(Duration::from_nanos(nap_ns)));
            let forever = spawn(|| sleep(None));
            sleeper.join().unwrap().unwrap();
            for (fd, sent, fiber, cancel) in echoes {
                if cancel {
                    fiber.cancel();
                }
                let result = fiber.join().unwrap();
                let world = world.borrow();
                let taken = &world.peers[&fd].taken;
                match result {
                    Ok(()) => assert_eq!(*taken, sent, "seed {seed}"),
                    Err(error) => {
                        assert!(cancel && error == Error::Cancelled, "seed {seed}: {error}");
                        assert!(sent.starts_with(taken), "seed {seed}");
                    }
                }
            }
            // A deadline on a join, and a fiber that only the shutdown ends.
            let waited = timeout(1e-7, || {
                forever
                    .join()
                    .map_err(|_| Error::Timeout)
                    .and_then(|slept| slept)
            });
            assert_eq!(waited, Err(Error::Timeout), "seed {seed}");
            spawn(|| assert_eq!(sleep(None), Err(Error::Shutdown)));
        });
    }
    say_how_much();
}

/// Leases of a pool of three, held for a while by receivers with deadlines, some of which are cancelled or find their socket
/// closed: every byte comes once and in order, no free buffer is written to (`Pool::take` looks), and all come home.
#[test]
fn leases_bring_every_byte_whatever_ends_their_receives() {
    let mut seen = [0u64; 4];
    for seed in seeds() {
        let (counts, _) = simulate(seed, move |world| {
            let mut random = Random::new(seed ^ 0x5eed);
            let mut receivers = Vec::new();
            for n in 0..1 + random.below(4) as u64 {
                let sent = bytes(&mut random, 200);
                let fd = world.borrow_mut().stream(&sent);
                let socket = Socket::simulated(fd);
                let receiver = spawn({
                    let socket = socket.clone();
                    move || receive_leases(&socket, &mut Random::new(seed ^ n << 32))
                });
                let ending = random.below(6);
                receivers.push((fd, sent, socket, receiver, ending));
            }
            let mut counts = [0u64; 4];
            for (fd, sent, socket, receiver, ending) in receivers {
                sleep(Duration::from_nanos(random.below(3_000) as u64)).unwrap();
                match ending {
                    0 => receiver.cancel(),
                    1 => socket.close().unwrap(),
                    _ => {}
                }
                let (received, end, [timeouts, heap]) = receiver.join().unwrap();
                counts[0] += timeouts;
                counts[1] += heap;
                match end {
                    Ok(()) => assert_eq!(received, sent, "seed {seed}"),
                    Err(error) => {
                        let expected = match ending {
                            0 => error == Error::Cancelled,
                            1 => error.is_closed(),
                            _ => false,
                        };
                        assert!(expected, "seed {seed}: {error}");
                        counts[2 + ending] += 1;
                        // What was not received is still there.
                        let world = world.borrow();
                        let peer = &world.peers[&fd];
                        let rest = peer.arrived.iter().chain(&peer.to_come);
                        let all: Vec<u8> = received.iter().chain(rest).copied().collect();
                        assert_eq!(all, sent, "seed {seed}");
                    }
                }
            }
            let worker = super::worker().unwrap();
            let all: Vec<_> = std::iter::from_fn(|| worker.buffers.take()).collect();
            assert_eq!(all.len(), 3, "seed {seed}: a buffer did not come home");
            counts
        });
        seen.iter_mut().zip(counts).for_each(|(sum, n)| *sum += n);
    }
    assert!(
        seen.iter().all(|count| *count >= one_in_twenty()),
        "timeouts, heap memory, cancels and closes occur: {seen:?}"
    );
    say_how_much();
}

/// Receives leases, and holds on to some, until the end of the stream or of patience: the bytes, how it ended, and how often
/// there was a timeout and heap memory.
fn receive_leases(socket: &Socket, random: &mut Random) -> (Vec<u8>, Result<()>, [u64; 2]) {
    let (mut received, mut counts) = (Vec::new(), [0; 2]);
    let mut held = Vec::new();
    let end = loop {
        socket.set_timeout_ns(match random.below(3) {
            0 => -1,
            _ => 1 + random.below(2_000) as i64,
        });
        match socket.recv(1 + random.below(24)) {
            Ok(data) if data.is_empty() => break Ok(()),
            Ok(data) => {
                counts[1] += u64::from(!data.is_lease());
                held.push((data.to_vec(), data));
                received.extend_from_slice(&held[held.len() - 1].0);
            }
            Err(Error::Timeout) => counts[0] += 1,
            Err(error) => break Err(error),
        }
        if held.len() > 2 || random.one_in(3) {
            // Nobody has touched what is held.
            for (was, is) in held.drain(..) {
                assert_eq!(is, was);
            }
        }
        if random.one_in(4) {
            yield_now();
        }
    };
    (received, end, counts)
}

/// Stories of random bytes: see `story.rs`, which has what must hold.
#[test]
fn any_calls_keep_every_byte_and_end_for_a_reason() {
    let mut seen = [0u64; ENDINGS];
    for seed in seeds() {
        let mut random = Random::new(seed ^ 0x5eed);
        let mut data: Vec<u8> = (0..random.below(256))
            .map(|_| random.next() as u8)
            .collect();
        if let Some(patience) = data.get_mut(1)
            && random.one_in(4)
        {
            *patience = PATIENT;
        }
        let played = std::panic::catch_unwind(|| socket_calls(&data));
        let (counts, operations) = played.unwrap_or_else(|_| panic!("seed {seed}: {data:?}"));
        OPERATIONS.with(|count| count.set(count.get() + operations));
        seen.iter_mut().zip(counts).for_each(|(sum, n)| *sum += n);
    }
    assert!(
        seen.iter().all(|count| *count >= one_in_twenty() / 20),
        "all endings occur: {seen:?}"
    );
    say_how_much();
}
