//! Both settings a call can be made in, and the other side of it.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Runs a test in both settings: on a plain thread, and in a fiber.
pub fn on_both(test: fn()) {
    test();
    ringsock::run(test);
}

/// Whether the environment has everything run on epoll.
pub fn on_epoll() -> bool {
    std::env::var("RINGSOCK_DRIVER").is_ok_and(|driver| driver == "epoll")
}

/// Whether a test, or a part of one, is to be left out because it is about the ring: says so, and why.
pub fn skipped_on_epoll(why: &str) -> bool {
    if on_epoll() {
        println!("skipped: RINGSOCK_DRIVER=epoll: {why}");
    }
    on_epoll()
}

/// Starts what the test talks with: on a thread of its own, so that it runs whatever the test does.
pub fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Beside<T> {
    let (result, results) = mpsc::channel();
    thread::spawn(move || result.send(work()));
    Beside(results)
}

pub struct Beside<T>(mpsc::Receiver<T>);

impl<T> Beside<T> {
    /// In a fiber it must not hold up the worker: the other side may wait for that very worker to end a call.
    pub fn join(self) -> T {
        let limit = Instant::now() + Duration::from_secs(120);
        loop {
            match self.0.try_recv() {
                Ok(result) => return result,
                Err(mpsc::TryRecvError::Disconnected) => panic!("the other side panicked"),
                Err(mpsc::TryRecvError::Empty) => {}
            }
            assert!(Instant::now() < limit, "the other side does not end");
            ringsock::sleep(0.0005).unwrap();
        }
    }
}

pub fn errno<T: std::fmt::Debug>(result: ringsock::Result<T>) -> Option<i32> {
    result.unwrap_err().errno()
}
