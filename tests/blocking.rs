//! Blocking calls on the pool, and waiting for the readiness of any descriptor.
//!
//! The pool and the descriptors are the process's, so these tests run one after the other.
#![allow(unsafe_code)]

use std::fs;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::*;
use ringsock::{
    BlockingHandle, JoinError, Runtime, run, set_blocking_threads, set_log_hook, sleep, socketpair,
    spawn, spawn_blocking, timeout, wait_readable, wait_writable, yield_now,
};

/// Far above what anything here takes: a test that gets there hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// How many calls may wait for a thread of the pool.
const JOBS_MAX: usize = 1024;

/// Runs `body` on a thread of its own while no other test runs, and fails if it hangs.
fn bounded(body: impl FnOnce() + Send + 'static) {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let (done, ended) = mpsc::channel();
    let test = thread::spawn(move || {
        let _done = done;
        body()
    });
    let hangs = ended.recv_timeout(LIMIT) == Err::<(), _>(mpsc::RecvTimeoutError::Timeout);
    assert!(!hangs, "the test hangs");
    test.join()
        .unwrap_or_else(|payload| std::panic::resume_unwind(payload));
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn pool_threads() -> usize {
    let names = fs::read_dir("/proc/self/task").unwrap().filter_map(|task| {
        // A thread may end while the list is read.
        fs::read_to_string(task.ok()?.path().join("comm")).ok()
    });
    names
        .filter(|name| name.starts_with("ringsock-blocki"))
        .count()
}

/// A gate that blocks threads until it is opened.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.0.0.lock().unwrap()
    }

    fn pass(&self) {
        let mut open = self.lock();
        while !*open {
            open = self.0.1.wait(open).unwrap();
        }
    }

    fn open(&self) {
        *self.lock() = true;
        self.0.1.notify_all();
    }
}

#[test]
fn a_blocking_call_suspends_only_the_fiber_that_joins() {
    bounded(|| {
        run(|| {
            let gate = Gate::default();
            let theirs = gate.clone();
            let joiner = spawn(move || {
                let call = spawn_blocking(move || {
                    theirs.pass();
                    thread::current().name().map(str::to_owned)
                });
                call.unwrap().join().unwrap()
            });
            // This fiber goes on meanwhile, or nobody would open the gate.
            sleep(0.01).unwrap();
            assert!(!joiner.is_finished());
            gate.open();
            assert_eq!(joiner.join().unwrap().as_deref(), Some("ringsock-blocking"));
        });
        let call = spawn_blocking(|| 6 * 7).unwrap();
        assert_eq!(call.join().unwrap(), 42, "from a plain thread");
    });
}

#[test]
fn panics_go_to_the_handle_or_to_the_log() {
    bounded(|| {
        let call = spawn_blocking(|| panic!("in a call")).unwrap();
        let error: JoinError = call.join().unwrap_err();
        let payload = error.into_panic().expect("a panic");
        assert_eq!(payload.downcast_ref(), Some(&"in a call"));
        let lines = Arc::new(Mutex::new(Vec::new()));
        let theirs = lines.clone();
        set_log_hook(move |line| theirs.lock().unwrap().push(line.to_owned()));
        let gate = Gate::default();
        let theirs = gate.clone();
        // Detached before it ends, and after.
        drop(spawn_blocking(move || {
            theirs.pass();
            panic!("nobody waits");
        }));
        gate.open();
        let late: BlockingHandle<()> = spawn_blocking(|| panic!("nobody looks")).unwrap();
        until("it ends", || late.is_finished());
        drop(late);
        until("both are logged", || {
            let lines = lines.lock().unwrap();
            ["nobody waits", "nobody looks"]
                .iter()
                .all(|text| lines.iter().any(|line| line.contains(text)))
        });
        // A result whose destructor panics ends no thread.
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("in a destructor");
            }
        }
        let gate = Gate::default();
        let theirs = gate.clone();
        drop(spawn_blocking(move || {
            theirs.pass();
            Bomb
        }));
        gate.open();
        until("it is logged", || {
            lines
                .lock()
                .unwrap()
                .iter()
                .any(|line| line.contains("in a destructor"))
        });
        assert_eq!(spawn_blocking(|| 1).unwrap().join().unwrap(), 1);
    });
}

#[test]
fn the_pool_is_bounded_and_so_is_its_queue() {
    bounded(|| {
        const THREADS: usize = 3;
        set_blocking_threads(THREADS);
        let gate = Gate::default();
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let start = |gate: &Gate| {
            let (gate, running, most) = (gate.clone(), running.clone(), most.clone());
            spawn_blocking(move || {
                let now = running.fetch_add(1, Ordering::SeqCst) + 1;
                most.fetch_max(now, Ordering::SeqCst);
                gate.pass();
                running.fetch_sub(1, Ordering::SeqCst);
            })
        };
        let idle_before = pool_threads();
        let mut calls: Vec<_> = (0..THREADS.max(idle_before))
            .map(|_| start(&gate).unwrap())
            .collect();
        let threads = calls.len();
        until("all threads are taken", || {
            running.load(Ordering::SeqCst) == threads
        });
        calls.extend((0..JOBS_MAX).map(|_| start(&gate).unwrap()));
        assert_eq!(pool_threads(), threads, "no thread above the limit");
        // The queue is full: fibers and threads wait for room, each as long as it wants.
        assert_eq!(
            timeout(0.02, || start(&gate).map(drop)),
            Err(Error::Timeout)
        );
        let theirs = gate.clone();
        let in_fiber = move || timeout(0.02, || spawn_blocking(move || theirs.pass()).map(drop));
        assert_eq!(run(in_fiber), Err(Error::Timeout));
        let waited = Arc::new(AtomicBool::new(false));
        let theirs = waited.clone();
        let waiter = thread::spawn(move || {
            let call = spawn_blocking(|| ()).unwrap();
            theirs.store(true, Ordering::SeqCst);
            call.join().unwrap();
        });
        thread::sleep(Duration::from_millis(20));
        assert!(!waited.load(Ordering::SeqCst));
        gate.open();
        waiter.join().unwrap();
        calls.into_iter().for_each(|call| call.join().unwrap());
        assert_eq!(most.load(Ordering::SeqCst), threads);
        set_blocking_threads(64);
    });
}

#[test]
fn a_joiner_that_is_interrupted_leaves_the_call_running() {
    bounded(|| {
        run(|| {
            let gate = Gate::default();
            let (theirs, ran) = (gate.clone(), Arc::new(AtomicBool::new(false)));
            let their_ran = ran.clone();
            let call = spawn_blocking(move || {
                theirs.pass();
                their_ran.store(true, Ordering::SeqCst);
            })
            .unwrap();
            let joiner = spawn(move || call.join());
            yield_now();
            joiner.cancel();
            let result = joiner.join().unwrap();
            assert!(matches!(
                result,
                Err(JoinError::Interrupted(Error::Cancelled))
            ));
            gate.open();
            until("it goes on", || ran.load(Ordering::SeqCst));
        });
    });
}

#[test]
fn a_runtime_does_not_wait_for_blocking_calls() {
    bounded(|| {
        let gate = Gate::default();
        let theirs = gate.clone();
        run(|| {
            spawn(move || {
                let call = spawn_blocking(move || theirs.pass()).unwrap();
                assert!(matches!(
                    call.join(),
                    Err(JoinError::Interrupted(Error::Shutdown))
                ));
            });
            sleep(0.01).unwrap();
        });
        gate.open();
    });
}

#[test]
fn many_calls_from_everywhere_all_return() {
    bounded(|| {
        let runtime = Runtime::builder().workers(2).build().unwrap();
        let fibers: Vec<_> = (0..200)
            .map(|n: usize| {
                let fiber = runtime.handle().spawn(move || {
                    (0..10)
                        .map(|k| spawn_blocking(move || n * 10 + k).unwrap().join().unwrap())
                        .sum::<usize>()
                });
                fiber.unwrap()
            })
            .collect();
        let sum: usize = fibers.into_iter().map(|fiber| fiber.join().unwrap()).sum();
        assert_eq!(sum, 2000 * 1999 / 2);
    });
}

#[test]
fn a_forked_child_has_a_pool_of_its_own() {
    bounded(|| {
        assert_eq!(spawn_blocking(|| 1).unwrap().join().unwrap(), 1);
        let gate = Gate::default();
        let theirs = gate.clone();
        let parents = spawn_blocking(move || theirs.pass()).unwrap();
        // SAFETY: the child uses what a forked child of a process with threads may in practice (glibc and musl keep malloc
        // and threads usable), and leaves by _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: no memory is passed. A child that hangs ends by the signal.
            unsafe { libc::alarm(60) };
            let parents = matches!(parents.join(), Err(JoinError::Shutdown));
            let own = spawn_blocking(|| 2).is_ok_and(|call| matches!(call.join(), Ok(2)));
            // SAFETY: _exit only ends the process.
            unsafe { libc::_exit(i32::from(parents) + 2 * i32::from(own)) };
        }
        let mut status = 0;
        // SAFETY: `status` lives through the call; the child is ours.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert!(libc::WIFEXITED(status), "status {status:#x}");
        assert_eq!(libc::WEXITSTATUS(status), 3);
        gate.open();
        parents.join().unwrap();
    });
}

/// It takes the ten seconds that an idle thread waits.
#[test]
fn idle_threads_end_and_others_take_their_place() {
    bounded(|| {
        assert_eq!(spawn_blocking(|| 1).unwrap().join().unwrap(), 1);
        assert!(pool_threads() > 0);
        until("idle threads end", || pool_threads() == 0);
        // There is room for one only if none of those that ended is counted.
        set_blocking_threads(1);
        assert_eq!(spawn_blocking(|| 2).unwrap().join().unwrap(), 2);
        set_blocking_threads(64);
    });
}

// Readiness.

fn eventfd(count: u32) -> fs::File {
    // SAFETY: no memory is passed; the descriptor is new and owned here.
    unsafe {
        let fd = libc::eventfd(count, libc::EFD_CLOEXEC);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd).into()
    }
}

/// Fills the pipe, and leaves it in non-blocking mode.
fn fill(writer: &mut PipeWriter) {
    let fd = writer.as_raw_fd();
    // SAFETY: no memory is passed.
    let set = unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK) };
    assert_eq!(set, 0);
    while writer.write(&[0; 4096]).is_ok() {}
    let result = timeout(0.01, || wait_writable(&*writer));
    assert_eq!(result, Err(Error::Timeout), "it is full");
}

fn drain(reader: &mut PipeReader, bytes: usize) {
    reader.read_exact(&mut vec![0; bytes]).unwrap();
}

/// Runs `check` in a fiber and on this thread.
fn in_both(check: fn()) {
    bounded(move || {
        check();
        run(check);
    });
}

#[test]
fn readiness_of_pipes_sockets_eventfds_and_files_is_seen() {
    in_both(|| {
        let (reader, mut writer) = pipe().unwrap();
        assert_eq!(
            timeout(0.01, || wait_readable(&reader)),
            Err(Error::Timeout)
        );
        wait_writable(&writer).unwrap();
        writer.write_all(b"x").unwrap();
        wait_readable(&reader).unwrap();
        let (left, right) = socketpair().unwrap();
        assert_eq!(timeout(0.01, || wait_readable(&left)), Err(Error::Timeout));
        right.sendall(b"x").unwrap();
        wait_readable(&left).unwrap();
        wait_writable(left.as_fd()).unwrap();
        let event = eventfd(0);
        assert_eq!(timeout(0.01, || wait_readable(&event)), Err(Error::Timeout));
        (&event).write_all(&1u64.to_ne_bytes()).unwrap();
        wait_readable(&event).unwrap();
        let file = fs::File::open("/proc/self/exe").unwrap();
        wait_readable(&file).unwrap();
    });
}

#[test]
fn hangups_and_errors_count_as_ready() {
    in_both(|| {
        let (reader, writer) = pipe().unwrap();
        drop(writer);
        wait_readable(&reader).unwrap();
        let (reader, mut writer) = pipe().unwrap();
        fill(&mut writer);
        drop(reader);
        wait_writable(&writer).unwrap();
        let (left, right) = socketpair().unwrap();
        drop(right);
        wait_readable(&left).unwrap();
    });
}

#[test]
fn a_wait_for_readiness_ends_when_it_comes() {
    bounded(|| {
        run(|| {
            let (reader, mut writer) = pipe().unwrap();
            let waiting = spawn(move || wait_readable(&reader));
            sleep(0.01).unwrap();
            assert!(!waiting.is_finished());
            writer.write_all(b"x").unwrap();
            waiting.join().unwrap().unwrap();
            let (mut reader, mut writer) = pipe().unwrap();
            fill(&mut writer);
            let waiting = spawn(move || wait_writable(&writer).map(|()| writer));
            sleep(0.01).unwrap();
            assert!(!waiting.is_finished());
            drain(&mut reader, 8192);
            waiting.join().unwrap().unwrap();
        });
    });
}

#[test]
fn a_wait_for_readiness_is_interrupted() {
    bounded(|| {
        run(|| {
            let (reader, _writer) = pipe().unwrap();
            let waiting = spawn(move || wait_readable(&reader));
            yield_now();
            waiting.cancel();
            assert_eq!(waiting.join().unwrap(), Err(Error::Cancelled));
        });
        let (reader, _writer) = pipe().unwrap();
        let seen = Arc::new(Mutex::new(None));
        let theirs = seen.clone();
        run(move || {
            spawn(move || *theirs.lock().unwrap() = Some(wait_readable(&reader)));
            yield_now();
        });
        assert_eq!(*seen.lock().unwrap(), Some(Err(Error::Shutdown)));
    });
}

/// What the documentation says of closing a shared socket: the wait goes on for the old file.
#[test]
fn closing_the_socket_does_not_end_the_wait_and_a_closed_one_is_ebadf() {
    bounded(|| {
        run(|| {
            let (left, right) = socketpair().unwrap();
            let theirs = left.clone();
            let waiting = spawn(move || wait_readable(&theirs));
            // So that the kernel has the operation before the close.
            sleep(0.01).unwrap();
            left.close().unwrap();
            sleep(0.01).unwrap();
            assert!(!waiting.is_finished());
            right.sendall(b"x").unwrap();
            waiting.join().unwrap().unwrap();
            assert_eq!(wait_readable(&left).unwrap_err().errno(), Some(libc::EBADF));
        });
    });
}

#[test]
fn waiting_leaves_no_descriptor_behind() {
    bounded(|| {
        let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
        let attempt = || {
            run(|| {
                let (reader, mut writer) = pipe().unwrap();
                let waiting = spawn(move || wait_readable(&reader));
                yield_now();
                writer.write_all(b"x").unwrap();
                waiting.join().unwrap().unwrap();
                spawn_blocking(|| ()).unwrap().join().unwrap();
            });
        };
        // What the crate keeps as long as the process and its pool live.
        attempt();
        until("the rings are closed", || {
            let before = descriptors();
            (0..20).for_each(|_| attempt());
            descriptors() <= before
        });
    });
}
