//! Workers that spin before they sleep, as asked for with `RuntimeBuilder::spin`.
#![allow(unsafe_code)]

use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::{Handle, Runtime, Socket, sleep, spawn};

/// Of the calling thread: how often it went to sleep.
fn sleeps() -> i64 {
    // SAFETY: all zeros is a value of the struct, which the kernel fills.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_THREAD, &mut usage), 0);
        usage.ru_nvcsw
    }
}

fn thread_cpu() -> Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel fills the struct.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// How often a worker slept while it answered 200 messages of a thread that sent each a millisecond after the answer to the last.
fn sleeps_of_an_exchange(spin: Duration) -> i64 {
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let peer = thread::spawn(move || {
        let mut answer = [0; 5];
        for _ in 0..200 {
            thread::sleep(Duration::from_millis(1));
            ours.write_all(b"hello").unwrap();
            ours.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"hello");
        }
    });
    let slept = Runtime::builder()
        .spin(spin)
        .run(move || {
            let conn = Socket::try_from(theirs).unwrap();
            let before = sleeps();
            let mut buffer = [0; 64];
            loop {
                let n = conn.recv_into(&mut buffer).unwrap();
                if n == 0 {
                    return sleeps() - before;
                }
                conn.sendall(&buffer[..n]).unwrap();
            }
        })
        .unwrap();
    peer.join().unwrap();
    slept
}

#[test]
fn a_spinning_worker_answers_without_falling_asleep() {
    let without = sleeps_of_an_exchange(Duration::ZERO);
    let with = sleeps_of_an_exchange(Duration::from_millis(500));
    assert!(
        without > 150 && with < 50,
        "{without} sleeps in 200 waits without a spin, {with} with one"
    );
}

#[test]
fn a_worker_that_waits_longer_than_it_may_spin_stops_spinning() {
    let spent = Runtime::builder()
        .spin(Duration::from_millis(4))
        .run(|| {
            let before = thread_cpu();
            for _ in 0..60 {
                sleep(0.008).unwrap();
            }
            thread_cpu() - before
        })
        .unwrap();
    // Waits 1, 3, 7, 15 and 31 are preceded by a spin; all of them would be 240 ms.
    assert!(
        (Duration::from_millis(19)..Duration::from_millis(100)).contains(&spent),
        "{spent:?}"
    );
}

#[test]
fn a_spawn_from_outside_ends_a_spin() {
    let runtime = Runtime::builder()
        .spin(Duration::from_secs(100))
        .build()
        .unwrap();
    let start = Instant::now();
    for number in 0..1000 {
        let fiber = runtime.handle().spawn(move || number).unwrap();
        assert_eq!(fiber.join().unwrap(), number);
    }
    drop(runtime);
    assert!(start.elapsed() < Duration::from_secs(50));
}

#[test]
fn workers_that_spin_wake_each_other() {
    let sum = Runtime::builder()
        .workers(2)
        .spin(Duration::from_millis(1))
        .run(|| {
            let handle = Handle::current().unwrap();
            let fibers: Vec<_> = (0..500)
                .map(|number| {
                    let handle = handle.clone();
                    spawn(move || {
                        let there = handle.spawn_on(1, move || number).unwrap();
                        there.join().unwrap()
                    })
                })
                .collect();
            fibers
                .into_iter()
                .map(|fiber| fiber.join().unwrap())
                .sum::<usize>()
        })
        .unwrap();
    assert_eq!(sum, 499 * 500 / 2);
}
