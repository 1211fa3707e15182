//! Taking turns, waiting, and leaving nothing behind.

use std::fs;
use std::panic::resume_unwind;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::socketpair;

/// Tests with thousands of connections take turns: their descriptors do not fit side by side.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until `reached`, at most a minute. For what the kernel announces to nobody.
pub fn eventually(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !reached() {
        assert!(
            Instant::now() < deadline,
            "after a minute still not: {what}"
        );
        thread::sleep(Duration::from_millis(10));
    }
}

/// How many descriptors this process has open.
pub fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Far above what any test takes: one that gets there hangs.
const TEST_LIMIT: Duration = Duration::from_secs(300);

/// Runs `body` on a thread of its own while no other test runs: it ends, and leaves no descriptor behind.
pub fn checked(body: impl FnOnce() + Send + 'static) {
    let _turn = turn();
    // What the crate keeps as long as the process lives is there before the count.
    thread::spawn(|| ringsock::run(|| drop(socketpair())))
        .join()
        .unwrap();
    let before = descriptors();
    let start = Instant::now();
    let test = thread::spawn(body);
    while !test.is_finished() {
        assert!(start.elapsed() < TEST_LIMIT, "the test hangs");
        thread::sleep(Duration::from_millis(1));
    }
    if let Err(panic) = test.join() {
        resume_unwind(panic);
    }
    eventually("all descriptors are closed", || descriptors() == before);
}
