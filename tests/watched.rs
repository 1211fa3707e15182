//! Sockets with a standing poll: that one begins where receives wait time and again, that no byte and no end is missed with it,
//! and that closing, dropping and detaching leave nothing of it.
#![allow(unsafe_code)] // of the tests' support, and of fork

mod support;

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::*;
use ringsock::{DriverKind, Handle, Runtime, send_fds, sleep, socketpair, spawn};

use support::{Beside, Random, beside, checked, errno, seed, tcp_pair};

/// Standing polls of the calling fiber's worker.
fn watches() -> u64 {
    // Counters are published when the worker waits.
    sleep(0.001).unwrap();
    Handle::current().unwrap().metrics()[0].watches
}

/// Whether the calling fiber's worker can watch: the epoll driver has no standing polls, and there the tests are of the usual way.
fn can_watch() -> bool {
    Handle::current().unwrap().driver() == DriverKind::Uring
}

/// Has `right` wait for what `left` sends until it is watched.
fn have_watched(left: &Socket, right: &Socket) {
    if !can_watch() {
        println!("not watched: the epoll driver has no standing polls");
        return;
    }
    let before = watches();
    for n in 0..100u8 {
        if watches() > before {
            return;
        }
        let sender = left.clone();
        let sending = spawn(move || {
            sleep(0.001)?;
            sender.sendall(&[n])
        });
        let mut byte = [0];
        assert_eq!(right.recv_into(&mut byte).unwrap(), 1);
        assert_eq!(byte, [n]);
        sending.join().unwrap().unwrap();
    }
    panic!("it does not come to be watched");
}

/// Runs `test` with a watched pair of each family.
fn with_pairs(test: fn(Socket, Socket)) {
    checked(move || {
        for pair in [tcp_pair, || socketpair().unwrap()] {
            ringsock::run(move || {
                let (left, right) = pair();
                have_watched(&left, &right);
                test(left, right);
                assert_eq!(watches(), 0, "nothing is left");
            });
        }
    });
}

fn wait_in_fiber(socket: &Socket) -> ringsock::JoinHandle<ringsock::Result<Buf>> {
    let socket = socket.clone();
    let waiting = spawn(move || socket.recv(100));
    sleep(0.002).unwrap();
    waiting
}

/// A thread that reads to the end of a stream.
fn reading(socket: Socket) -> Beside<Vec<u8>> {
    let mut stream = UnixStream::from(socket.detach().unwrap());
    beside(move || {
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        got
    })
}

#[test]
fn a_lone_connection_is_watched_and_one_that_comes_and_goes_is_not() {
    checked(|| {
        ringsock::run(|| {
            let (left, right) = tcp_pair();
            let sending = left.clone();
            let once = wait_in_fiber(&right);
            sending.sendall(b"x").unwrap();
            once.join().unwrap().unwrap();
            assert_eq!(watches(), 0);
            have_watched(&left, &right);
            if !can_watch() {
                return;
            }
            let before = Handle::current().unwrap().metrics()[0];
            for _ in 0..100 {
                let waiting = wait_in_fiber(&right);
                sending.sendall(b"ping").unwrap();
                assert_eq!(waiting.join().unwrap().unwrap(), b"ping");
            }
            sleep(0.001).unwrap();
            let after = Handle::current().unwrap().metrics()[0];
            // The sleeps are operations; the receives are not.
            let operations = after.operations - before.operations;
            assert!((100..150).contains(&operations), "{operations}");
        });
    });
}

#[test]
fn every_byte_arrives_in_order_whatever_the_sizes_and_pauses() {
    with_pairs(|left, right| {
        let mut random = Random::new(seed());
        let mut sent = random.bytes(1 << 20);
        let expected = sent.clone();
        let mut sizes = random.fork();
        let sender = beside(move || {
            let left = left;
            let mut rest = &mut sent[..];
            while !rest.is_empty() {
                let most = 1 << sizes.below(17);
                let at = sizes.up_to(most).min(rest.len());
                let (chunk, others) = rest.split_at_mut(at);
                left.sendall(chunk).unwrap();
                rest = others;
                if sizes.below(4) == 0 {
                    thread::sleep(Duration::from_micros(sizes.below(300)));
                }
            }
        });
        let mut got = Vec::new();
        let mut buffer = vec![0; 70_000];
        loop {
            let most = 1 << random.below(17);
            let most = random.up_to(most);
            let received = if random.below(2) == 0 {
                right.recv_into(&mut buffer[..most]).unwrap()
            } else {
                let received = right.recv(most).unwrap();
                buffer[..received.len()].copy_from_slice(&received);
                received.len()
            };
            if received == 0 {
                break;
            }
            got.extend_from_slice(&buffer[..received]);
        }
        sender.join();
        assert_eq!(got.len(), expected.len());
        assert!(got == expected, "other bytes arrived");
        assert!(right.recv(10).unwrap().is_empty(), "the end stays");
    });
}

#[test]
fn an_end_that_comes_with_the_data_is_not_missed() {
    with_pairs(|left, right| {
        let waiting = wait_in_fiber(&right);
        left.sendall(b"last").unwrap();
        left.shutdown(SHUT_WR).unwrap();
        assert_eq!(waiting.join().unwrap().unwrap(), b"last");
        assert!(right.recv(100).unwrap().is_empty());
        right.sendall(b"answer").unwrap();
        assert_eq!(left.recv(100).unwrap(), b"answer");
    });
}

#[test]
fn a_reset_reaches_who_waits() {
    checked(|| {
        ringsock::run(|| {
            let (left, right) = tcp_pair();
            have_watched(&left, &right);
            let waiting = wait_in_fiber(&right);
            left.setsockopt(SOL_SOCKET, SO_LINGER, &[1, 0, 0, 0, 0, 0, 0, 0])
                .unwrap();
            drop(left);
            assert_eq!(errno(waiting.join().unwrap()), Some(libc::ECONNRESET));
        });
    });
}

/// A receive stops behind descriptors, which recv(2) throws away.
#[test]
fn what_follows_on_descriptors_is_not_left_lying() {
    checked(|| {
        ringsock::run(|| {
            let (left, right) = socketpair().unwrap();
            have_watched(&left, &right);
            let waiting = wait_in_fiber(&right);
            let own = left.as_raw_fd();
            // SAFETY: `left` outlives the borrow.
            let own = unsafe { BorrowedFd::borrow_raw(own) };
            left.sendall(b"abc").unwrap();
            send_fds(&left, &[std::io::IoSlice::new(b"def")], &[own]).unwrap();
            left.sendall(b"ghi").unwrap();
            let mut got = Vec::from(waiting.join().unwrap().unwrap());
            let start = Instant::now();
            while got.len() < 9 {
                got.extend_from_slice(&right.recv(100).unwrap());
            }
            assert_eq!(got, b"abcdefghi");
            assert!(
                start.elapsed() < Duration::from_millis(90),
                "it was looked for late"
            );
        });
    });
}

/// A receive stops in front of urgent data, and no event tells of what lies behind it.
#[test]
fn what_follows_on_urgent_data_comes_at_the_second_look() {
    checked(|| {
        ringsock::run(|| {
            let (left, right) = tcp_pair();
            have_watched(&left, &right);
            left.sendall(b"abc").unwrap();
            left.send_with(b"!", MSG_OOB).unwrap();
            left.sendall(b"def").unwrap();
            // All of it is there before the first receive.
            sleep(0.02).unwrap();
            let start = Instant::now();
            let mut got = Vec::new();
            while got.len() < 6 {
                got.extend_from_slice(&right.recv(100).unwrap());
            }
            assert_eq!(got, b"abcdef");
            assert!(start.elapsed() < Duration::from_millis(900));
        });
    });
}

#[test]
fn urgent_data_that_is_read_ends_the_use_of_the_watch() {
    checked(|| {
        ringsock::run(|| {
            let (left, right) = tcp_pair();
            have_watched(&left, &right);
            left.sendall(b"abc").unwrap();
            left.send_with(b"!", MSG_OOB).unwrap();
            left.sendall(b"def").unwrap();
            sleep(0.02).unwrap();
            assert_eq!(right.recv_with(1, MSG_OOB).unwrap(), b"!");
            let start = Instant::now();
            assert_eq!(right.recv(100).unwrap(), b"abc");
            assert_eq!(right.recv(100).unwrap(), b"def");
            assert!(start.elapsed() < Duration::from_millis(90));
        });
    });
}

#[test]
fn closing_wakes_who_waits_and_tells_the_peer() {
    with_pairs(|left, right| {
        let waiting = wait_in_fiber(&right);
        right.close().unwrap();
        assert_eq!(errno(waiting.join().unwrap()), Some(libc::EBADF));
        assert_eq!(errno(right.recv(1)), Some(libc::EBADF));
        left.settimeout(60).unwrap();
        assert!(left.recv(10).unwrap().is_empty(), "the peer sees the end");
    });
}

#[test]
fn closing_on_another_thread_wakes_who_waits_and_tells_the_peer() {
    with_pairs(|left, right| {
        for waits in [true, false] {
            let (left, right) = if waits {
                (left.clone(), right.clone())
            } else {
                let (left, right) = tcp_pair();
                have_watched(&left, &right);
                (left, right)
            };
            let waiting = waits.then(|| wait_in_fiber(&right));
            let closer = right.clone();
            beside(move || {
                closer.close().unwrap();
                left.settimeout(60).unwrap();
                assert!(left.recv(10).unwrap().is_empty(), "the peer sees the end");
            })
            .join();
            if let Some(waiting) = waiting {
                assert_eq!(errno(waiting.join().unwrap()), Some(libc::EBADF));
            }
        }
    });
}

#[test]
fn dropping_the_last_handle_tells_the_peer_on_any_thread() {
    with_pairs(|left, right| {
        drop(right);
        left.settimeout(60).unwrap();
        assert!(left.recv(10).unwrap().is_empty());
        let (left, right) = socketpair().unwrap();
        have_watched(&left, &right);
        beside(move || drop(right)).join();
        left.settimeout(60).unwrap();
        assert!(left.recv(10).unwrap().is_empty());
    });
}

#[test]
fn a_detached_descriptor_is_not_watched_any_more() {
    with_pairs(|left, right| {
        let other = right.clone();
        let fd = right.detach().unwrap();
        assert_eq!(errno(other.recv(1)), Some(libc::EBADF));
        drop(fd);
        left.settimeout(60).unwrap();
        assert!(left.recv(10).unwrap().is_empty());
        let (left, right) = socketpair().unwrap();
        have_watched(&left, &right);
        let got = reading(right);
        left.sendall(b"all").unwrap();
        drop(left);
        assert_eq!(got.join(), b"all");
        let (left, right) = socketpair().unwrap();
        have_watched(&left, &right);
        let got = beside(move || reading(right).join());
        left.sendall(b"all").unwrap();
        drop(left);
        assert_eq!(got.join(), b"all");
    });
}

#[test]
fn a_socket_outlives_the_worker_that_watched_it() {
    checked(|| {
        for pair in [tcp_pair, || socketpair().unwrap()] {
            let (left, right) = ringsock::run(move || {
                let (left, right) = pair();
                have_watched(&left, &right);
                (left, right)
            });
            left.sendall(b"one").unwrap();
            assert_eq!(right.recv(100).unwrap(), b"one");
            let (left, right) = ringsock::run(move || {
                let waiting = wait_in_fiber(&right);
                left.sendall(b"two").unwrap();
                assert_eq!(waiting.join().unwrap().unwrap(), b"two");
                (left, right)
            });
            drop(right);
            left.settimeout(60).unwrap();
            assert!(left.recv(10).unwrap().is_empty());
        }
    });
}

#[test]
fn cancel_deadline_timeout_and_shutdown_end_the_wait() {
    with_pairs(|left, right| {
        let waiting = wait_in_fiber(&right);
        waiting.cancel();
        assert_eq!(waiting.join().unwrap(), Err(Error::Cancelled));
        let start = Instant::now();
        assert_eq!(
            ringsock::timeout(0.03, || right.recv(10)),
            Err(Error::Timeout)
        );
        right.settimeout(0.03).unwrap();
        assert_eq!(right.recv(10), Err(Error::Timeout));
        assert!(start.elapsed() >= Duration::from_millis(58));
        right.setblocking(false).unwrap();
        assert!(right.recv(10).unwrap_err().is_would_block());
        left.sendall(b"late").unwrap();
        sleep(0.002).unwrap();
        right.settimeout(None).unwrap();
        assert_eq!(right.recv(10).unwrap(), b"late");
    });
    checked(|| {
        let runtime = Runtime::builder().workers(1);
        let waiting = runtime
            .run(|| {
                let (left, right) = socketpair().unwrap();
                have_watched(&left, &right);
                let waiting = spawn(move || (right.recv(10), left));
                sleep(0.002).unwrap();
                waiting
            })
            .unwrap();
        assert_eq!(waiting.join().unwrap().0, Err(Error::Shutdown));
    });
}

/// What nobody asks for wakes the worker no longer, is there for who comes late, and the stream is watched anew.
#[test]
fn a_watch_nobody_listens_to_is_ended() {
    with_pairs(|left, right| {
        if left.family() != AF_UNIX {
            // What is held back until the peer has acknowledged more makes no event.
            left.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1).unwrap();
        }
        for _ in 0..3 {
            let mut bytes = 0;
            while watches() > 0 {
                left.sendall(b"x").unwrap();
                bytes += 1;
                assert!(bytes < 1000, "it is still watched");
            }
            assert!(!can_watch() || bytes >= 64, "ended after {bytes}");
            let mut got = 0;
            while got < bytes {
                got += right.recv(7).unwrap().len();
            }
            let waiting = wait_in_fiber(&right);
            left.sendall(b"on").unwrap();
            assert_eq!(waiting.join().unwrap().unwrap(), b"on");
            // The receives so far may have been enough.
            if watches() == 0 {
                have_watched(&left, &right);
            }
        }
        // Closing does not wait for what has ended already, nor does it miss what is about to.
        for _ in 0..70 {
            left.sendall(b"x").unwrap();
            ringsock::yield_now();
        }
        right.close().unwrap();
        let refused = errno(left.sendall(b"x")).expect("an errno");
        assert!(
            [libc::EPIPE, libc::ECONNRESET].contains(&refused),
            "{refused}"
        );
    });
}

/// SO_RCVTIMEO limits a receive also where the socket is watched, or was before the option was set.
#[test]
fn the_option_of_a_receive_timeout_counts() {
    with_pairs(|left, right| {
        let second_fifth = [0i64, 200_000].map(i64::to_ne_bytes).concat();
        right
            .setsockopt(SOL_SOCKET, SO_RCVTIMEO, &second_fifth[..])
            .unwrap();
        for _ in 0..2 {
            let start = Instant::now();
            let ended = ringsock::timeout(20.0, || right.recv_into(&mut [0; 9]));
            assert_eq!(errno(ended), Some(libc::EAGAIN));
            assert!(start.elapsed() >= Duration::from_millis(199));
            let ended = ringsock::timeout(20.0, || right.recv(9));
            assert_eq!(errno(ended), Some(libc::EAGAIN));
            left.sendall(b"in time").unwrap();
            assert_eq!(right.recv(9).unwrap(), b"in time");
        }
    });
}

/// An operation's timer could not be linked to a watch, so none begins beside a deadline.
#[test]
fn receives_beside_a_deadline_begin_no_watch() {
    checked(|| {
        ringsock::run(|| {
            let (left, right) = socketpair().unwrap();
            for n in 0..20 {
                let sender = left.clone();
                let sending = spawn(move || {
                    sleep(0.001)?;
                    sender.sendall(&[n])
                });
                let received = ringsock::timeout(20.0, || right.recv(1)).unwrap();
                assert_eq!(received, [n]);
                sending.join().unwrap().unwrap();
                assert_eq!(watches(), 0);
            }
        });
    });
}

/// A fiber that lets others go first, having been told of something, and then does not take all of it, leaves the rest to who came
/// to wait meanwhile.
#[test]
fn what_one_leaves_another_gets_at_once() {
    /// The longest of a few pauses between the end of one who takes a part and another's receive.
    fn longest_pause() -> Duration {
        let (left, right) = tcp_pair();
        have_watched(&left, &right);
        let pauses = (0..3).map(|_| {
            left.sendall(&[7; 100]).unwrap();
            let (first, second) = (right.clone(), right.clone());
            let taking = spawn(move || {
                for _ in 0..50 {
                    first.recv_into(&mut [0]).unwrap();
                }
            });
            let taking_one = spawn(move || {
                second.recv_into(&mut [0]).unwrap();
                Instant::now()
            });
            taking.join().unwrap();
            let ended = Instant::now();
            let next = taking_one.join().unwrap();
            assert_eq!(right.recv(100).unwrap().len(), 49);
            next.saturating_duration_since(ended)
        });
        pauses.max().expect("there are three")
    }
    checked(|| {
        // A second look is 100 ms later at least; a busy machine may pause for other reasons, but hardly every time.
        let least = ringsock::run(|| (0..5).map(|_| longest_pause()).min()).unwrap();
        assert!(least < Duration::from_millis(90), "{least:?}");
    });
}

/// Two look a second time in one turn. The first finds something, which its watch did not tell of, and cancels the other, which has
/// not had its turn yet.
#[test]
fn a_cancel_between_a_second_look_and_its_turn_is_not_lost() {
    checked(|| {
        ringsock::run(|| {
            for _ in 0..3 {
                let (urgent, first) = tcp_pair();
                have_watched(&urgent, &first);
                let (left, right) = socketpair().unwrap();
                have_watched(&left, &right);
                for (text, flags) in [(&b"abc"[..], MsgFlags::default()), (b"!", MSG_OOB)] {
                    urgent.send_with(text, flags).unwrap();
                }
                urgent.sendall(b"def").unwrap();
                left.sendall(b"x").unwrap();
                sleep(0.02).unwrap();
                let second = right.clone();
                let waiting = spawn(move || {
                    // Shorter than it could be, so that the wait needs a second look.
                    assert_eq!(second.recv(100)?, b"x");
                    second.recv(100)
                });
                let cancelling = spawn(move || {
                    let mut got = Vec::new();
                    while got.len() < 6 {
                        got.extend_from_slice(&first.recv(100).unwrap());
                    }
                    assert_eq!(got, b"abcdef");
                    waiting.cancel();
                    waiting
                });
                let waiting = cancelling.join().unwrap();
                let ended = ringsock::timeout(20.0, || Ok(waiting.join()))
                    .unwrap()
                    .expect("it ends");
                assert_eq!(ended, Err(Error::Cancelled));
            }
        });
    });
}

/// Receives with a timeout wait by the watch, too, and no operation with a timer is left on the ring.
#[test]
fn timeouts_are_kept_without_operations() {
    with_pairs(|left, right| {
        let watches_before = watches();
        let before = Handle::current().unwrap().metrics()[0];
        right.settimeout(60.0).unwrap();
        for _ in 0..50 {
            let waiting = wait_in_fiber(&right);
            left.sendall(b"ping").unwrap();
            assert_eq!(waiting.join().unwrap().unwrap(), b"ping");
        }
        assert_eq!(watches(), watches_before);
        let after = Handle::current().unwrap().metrics()[0];
        // The sleeps are operations.
        let operations = after.operations - before.operations;
        assert!(
            !can_watch() || (50..80).contains(&operations),
            "{operations}"
        );
        // A sooner one beside the one of a minute, several of them close together, and one after another.
        let mut buffer = [0; 8];
        for timeout in [0.03, 0.001, 0.0301, 0.05, 0.002] {
            right.settimeout(timeout).unwrap();
            let start = Instant::now();
            let received = right.recv_into(&mut buffer);
            let seconds = start.elapsed().as_secs_f64();
            assert_eq!(received, Err(Error::Timeout));
            assert!(seconds > timeout - 0.001, "{seconds} of {timeout}");
            assert!(seconds < timeout + 0.5, "{seconds} of {timeout}");
        }
        // What has come is received, whatever the time.
        right.settimeout(0.001).unwrap();
        left.sendall(b"there").unwrap();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(right.recv(10).unwrap(), b"there");
        assert_eq!(right.recv(10), Err(Error::Timeout));
    });
}

/// A wait whose watch the kernel ends (the completion queue is full) goes on in the ring, for what is left of its time.
#[test]
fn a_timeout_goes_on_where_a_watch_ends() {
    const TIMEOUT: f64 = 1.0;
    checked(|| {
        let runtime = Runtime::builder().ring_entries(2, 2);
        runtime
            .run(|| {
                let pairs: Vec<_> = (0..64).map(|_| socketpair().unwrap()).collect();
                for (left, right) in &pairs {
                    have_watched(left, right);
                    right.settimeout(TIMEOUT).unwrap();
                }
                let waiting: Vec<_> = (pairs.iter())
                    .map(|(_, right)| {
                        let right = right.clone();
                        let others: Vec<_> = pairs.iter().map(|(_, right)| right.clone()).collect();
                        spawn(move || {
                            let start = Instant::now();
                            let received = right.recv_into(&mut [0]);
                            if received.is_ok() {
                                // What the others have been told of, and are about to receive.
                                for other in others {
                                    let _ = other.recv_with(1, MSG_DONTWAIT);
                                }
                            }
                            (received, start.elapsed().as_secs_f64())
                        })
                    })
                    .collect();
                sleep(TIMEOUT * 0.8).unwrap();
                for (left, _) in &pairs {
                    left.sendall(b"x").unwrap();
                }
                let mut timeouts = 0;
                for waiting in waiting {
                    let (received, seconds) = waiting.join().unwrap();
                    if received.is_ok() {
                        continue;
                    }
                    assert_eq!(received, Err(Error::Timeout));
                    assert!(seconds > TIMEOUT - 0.001, "{seconds}");
                    assert!(seconds < TIMEOUT + 0.6, "{seconds}");
                    timeouts += 1;
                }
                assert!(timeouts > 0);
            })
            .unwrap();
    });
}

/// One enter brings some twenty events, so that a worker that comes late hears of the end of a wait, and looks for others that are over,
/// before it has heard of all that came meanwhile.
#[test]
fn what_came_in_time_is_no_timeout_however_late_the_worker_is() {
    checked(|| {
        ringsock::run(|| {
            let pairs: Vec<(Socket, Socket)> = (0..200)
                .map(|_| {
                    let (left, right) = socketpair().unwrap();
                    have_watched(&left, &right);
                    right.settimeout(0.3).unwrap();
                    (left, right)
                })
                .collect();
            pairs[0].1.settimeout(0.05).unwrap();
            let mut waiting: Vec<_> = (pairs.iter())
                .map(|(_, right)| {
                    let right = right.clone();
                    spawn(move || right.recv(100))
                })
                .collect();
            sleep(0.002).unwrap();
            // Nothing of this worker's moves until all is over, the first wait before anything comes.
            thread::sleep(Duration::from_millis(100));
            for (left, _) in &pairs[1..] {
                left.sendall(b"in time").unwrap();
            }
            thread::sleep(Duration::from_millis(400));
            let first = waiting.remove(0);
            assert_eq!(first.join().unwrap(), Err(Error::Timeout));
            for waiting in waiting {
                assert_eq!(waiting.join().unwrap().unwrap(), b"in time");
            }
        });
    });
}

/// Many timeouts of many connections, each after its own time and none before.
#[test]
fn each_connection_times_out_on_its_own() {
    checked(|| {
        ringsock::run(|| {
            let pairs: Vec<_> = (0..50).map(|_| socketpair().unwrap()).collect();
            for (left, right) in pairs.iter().take(3) {
                have_watched(left, right);
            }
            let waits: Vec<_> = (pairs.iter().enumerate())
                .map(|(n, (_, right))| {
                    let right = right.clone();
                    spawn(move || {
                        let timeout = 0.005 + 0.002 * ((n * 7) % 20) as f64;
                        right.settimeout(timeout).unwrap();
                        // With these, every connection comes to be watched, unless too many run at once.
                        for _ in 0..6 {
                            let start = Instant::now();
                            assert_eq!(right.recv(1), Err(Error::Timeout));
                            let seconds = start.elapsed().as_secs_f64();
                            assert!(seconds > timeout - 0.001, "{seconds} of {timeout}");
                            assert!(seconds < timeout + 0.5, "{seconds} of {timeout}");
                        }
                    })
                })
                .collect();
            for wait in waits {
                wait.join().unwrap();
            }
            // Traffic and timeouts by turns: the sender's pauses lie around the receiver's limit, and no byte is lost.
            let (left, right) = &pairs[0];
            let (left, right) = (left.clone(), right.clone());
            let sender = spawn(move || {
                let mut random = Random::new(seed());
                for n in 0..500u32 {
                    sleep(0.0001 * random.below(20) as f64).unwrap();
                    left.sendall(&n.to_be_bytes()).unwrap();
                }
                left.close().unwrap();
            });
            right.settimeout(0.001).unwrap();
            let (mut got, mut timeouts) = (Vec::new(), 0);
            loop {
                match right.recv(64) {
                    Ok(end) if end.is_empty() => break,
                    Ok(part) => got.extend_from_slice(&part),
                    Err(Error::Timeout) => timeouts += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            sender.join().unwrap();
            let sent: Vec<u8> = (0..500u32).flat_map(u32::to_be_bytes).collect();
            assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
            assert!(timeouts > 0);
        });
    });
}

#[test]
fn two_fibers_two_workers_and_a_thread_share_what_comes() {
    checked(|| {
        let runtime = Runtime::builder().workers(2);
        runtime
            .run(|| {
                let (left, right) = tcp_pair();
                have_watched(&left, &right);
                let handle = Handle::current().unwrap();
                let receive = |socket: Socket| {
                    move || {
                        let mut count = 0;
                        loop {
                            match socket.recv(7).unwrap().len() {
                                0 => return count,
                                received => count += received,
                            }
                        }
                    }
                };
                let fibers = [0, 0, 1].map(|worker| {
                    let receive = receive(right.clone());
                    handle.spawn_on(worker, receive).unwrap()
                });
                let thread = beside(receive(right.clone()));
                for n in 0..2000 {
                    left.sendall(&[n as u8; 10]).unwrap();
                    if n % 50 == 0 {
                        sleep(0.001).unwrap();
                    }
                }
                left.shutdown(SHUT_WR).unwrap();
                let counts = fibers.map(|fiber| fiber.join().unwrap());
                let count: usize = counts.iter().sum();
                assert_eq!(count + thread.join(), 20_000, "{counts:?}");
            })
            .unwrap();
    });
}

#[test]
fn watches_survive_overflows_of_the_completion_queue() {
    checked(|| {
        let runtime = Runtime::builder().ring_entries(2, 2);
        runtime
            .run(|| {
                let pairs: Vec<_> = (0..64).map(|_| socketpair().unwrap()).collect();
                for (left, right) in &pairs {
                    have_watched(left, right);
                }
                for round in 0..50u8 {
                    let waiting: Vec<_> = pairs
                        .iter()
                        .map(|(_, right)| {
                            let right = right.clone();
                            spawn(move || right.recv(10))
                        })
                        .collect();
                    sleep(0.0005).unwrap();
                    // All are told at once.
                    for (left, _) in &pairs {
                        left.sendall(&[round]).unwrap();
                    }
                    for waiting in waiting {
                        assert_eq!(waiting.join().unwrap().unwrap(), [round]);
                    }
                }
                // Those that ended by it begin anew, so that receives that wait are no operations again.
                let ping = |(left, right): &(Socket, Socket)| {
                    let waiting = wait_in_fiber(right);
                    left.sendall(b"ping").unwrap();
                    assert_eq!(waiting.join().unwrap().unwrap(), b"ping");
                };
                for pair in &pairs {
                    (0..8).for_each(|_| ping(pair));
                }
                let metrics = || {
                    sleep(0.001).unwrap();
                    Handle::current().unwrap().metrics()[0]
                };
                let before = metrics();
                pairs.iter().for_each(ping);
                let after = metrics();
                if can_watch() {
                    let operations = after.operations - before.operations;
                    // A sleep each.
                    assert!((64..96).contains(&operations), "{operations}");
                }
                assert_eq!(after.cqes_unknown, 0);
            })
            .unwrap();
    });
}

#[test]
fn a_forked_child_receives_what_its_parent_watches_and_leaves_the_watch_alone() {
    checked(|| {
        ringsock::run(|| {
            let (left, right) = socketpair().unwrap();
            have_watched(&left, &right);
            // SAFETY: the child calls this crate, which is made for it, and ends by _exit.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let got = std::panic::catch_unwind(|| {
                    let right = right.clone();
                    let in_fiber = right.clone();
                    let first = right.recv(3).unwrap();
                    let second = ringsock::run(move || in_fiber.recv(3)).unwrap();
                    drop(right);
                    (first, second)
                });
                let fine = got.is_ok_and(|(first, second)| first == b"one" && second == b"two");
                // SAFETY: it only ends the process.
                unsafe { libc::_exit(if fine { 0 } else { 1 }) };
            }
            left.sendall(b"onetwo").unwrap();
            let mut status = 0;
            let status = beside(move || {
                // SAFETY: `status` lives through the call; the child is ours.
                assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
                status
            })
            .join();
            assert_eq!(status, 0);
            let waiting = wait_in_fiber(&right);
            left.sendall(b"three").unwrap();
            assert_eq!(waiting.join().unwrap().unwrap(), b"three");
        });
    });
}

/// Closes, drops and detaches at every moment of a message's way.
#[test]
fn races_of_data_and_closers_lose_nothing_and_leave_nothing() {
    checked(|| {
        let mut random = Random::new(seed());
        for _ in 0..300 {
            let mut random = random.fork();
            ringsock::run(move || {
                let (left, right) = if random.below(2) == 0 {
                    tcp_pair()
                } else {
                    socketpair().unwrap()
                };
                have_watched(&left, &right);
                let waiting = (random.below(2) == 0).then(|| wait_in_fiber(&right));
                let pause = Duration::from_micros(random.below(60));
                let how = random.below(3);
                let closer = right.clone();
                let closing = beside(move || {
                    thread::sleep(pause);
                    match how {
                        0 => closer.close().unwrap(),
                        1 => drop(closer),
                        _ => drop(closer.detach()),
                    }
                });
                // On a busy machine the closer may come first.
                if let Err(error) = left.sendall(b"data") {
                    let errno = error.errno().expect("an errno");
                    assert!([libc::EPIPE, libc::ECONNRESET].contains(&errno), "{error}");
                }
                if let Some(waiting) = waiting {
                    match waiting.join().unwrap() {
                        Ok(data) => assert_eq!(data, b"data"),
                        Err(error) => assert!(error.is_closed(), "{error}"),
                    }
                }
                drop(right);
                closing.join();
                left.settimeout(60).unwrap();
                // The end, or a reset where data was left.
                match left.recv(10) {
                    Ok(end) => assert!(end.is_empty()),
                    Err(error) => assert_eq!(error.errno(), Some(libc::ECONNRESET)),
                }
                assert_eq!(watches(), 0);
            });
        }
    });
}

/// What a peer that is no part of this process sees.
#[test]
fn a_plain_peer_talks_with_a_watched_server() {
    checked(|| {
        ringsock::run(|| {
            let (left, right) = socketpair().unwrap();
            have_watched(&left, &right);
            let mut peer = UnixStream::from(left.detach().unwrap());
            let client = beside(move || {
                let mut got = [0; 16];
                for n in 0..500u32 {
                    peer.write_all(format!("{n:16}").as_bytes()).unwrap();
                    peer.read_exact(&mut got).unwrap();
                    assert_eq!(got, format!("{n:16}").as_bytes());
                }
            });
            let mut buffer = [0; 100];
            loop {
                match right.recv_into(&mut buffer).unwrap() {
                    0 => break,
                    n => right.sendall(&buffer[..n]).unwrap(),
                }
            }
            client.join();
        });
    });
}
