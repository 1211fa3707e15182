//! Signals in fibers and threads. Handlers are the process's, so each test runs in a process of its own: this very test run
//! again, with one test only.
#![allow(unsafe_code)]

mod support;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::signal::{self, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, Signals};
use ringsock::{Error, Result, Runtime, run, sleep, spawn, timeout, yield_now};
use support::{Finished, Process};

const VARIABLE: &str = "RINGSOCK_TEST_ALONE";

/// Runs `body` in a process of its own: how that ended. In that process it does not return.
fn in_child(test: &str, body: impl FnOnce()) -> Finished {
    if std::env::var(VARIABLE).as_deref() == Ok(test) {
        // SAFETY: no memory is passed. A test that hangs ends by the signal.
        unsafe { libc::alarm(90) };
        body();
        std::process::exit(0);
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([test, "--exact", "--nocapture"])
        .env(VARIABLE, test);
    Process::start(&mut command, b"").unwrap().wait()
}

/// Runs `body` in a process of its own, which has to succeed.
fn alone(test: &str, body: impl FnOnce()) {
    let finished = in_child(test, body);
    assert!(finished.status.success(), "{finished:?}");
}

/// Sends a signal to this process; any of its threads may get it, now or a little later.
fn send(signal: i32) {
    // SAFETY: no memory is passed.
    assert_eq!(unsafe { libc::kill(libc::getpid(), signal) }, 0);
}

/// Sends a signal to this thread: it has been handled when this returns.
fn raise(signal: i32) {
    // SAFETY: no memory is passed.
    assert_eq!(unsafe { libc::raise(signal) }, 0);
}

/// The action of a signal: its handler's address.
fn action(signal: i32) -> usize {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: the kernel fills the struct; zeroed is valid for it anyway.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init().sa_sigaction
    }
}

static HANDLED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count(_: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

fn install(signal: i32, handler: usize) {
    // SAFETY: a function of this program, or one of the C library's constants.
    assert_ne!(unsafe { libc::signal(signal, handler) }, libc::SIG_ERR);
}

#[test]
fn a_signal_resumes_the_fiber_that_waits_for_it() {
    alone("a_signal_resumes_the_fiber_that_waits_for_it", || {
        run(|| {
            let waiting = spawn(|| signal::wait(&[SIGUSR1, SIGUSR2]));
            for _ in 0..3 {
                yield_now();
            }
            assert!(!waiting.is_finished());
            send(SIGUSR2);
            assert_eq!(waiting.join().unwrap(), Ok(SIGUSR2));
        });
    });
}

#[test]
fn a_signal_ends_the_wait_of_a_plain_thread() {
    alone("a_signal_ends_the_wait_of_a_plain_thread", || {
        let signals = Arc::new(Signals::new(&[SIGTERM]).unwrap());
        let theirs = signals.clone();
        let waiting = thread::spawn(move || theirs.wait());
        thread::sleep(Duration::from_millis(20));
        assert!(!waiting.is_finished());
        send(SIGTERM);
        assert_eq!(waiting.join().unwrap(), Ok(SIGTERM));
    });
}

#[test]
fn signals_between_two_waits_are_kept() {
    alone("signals_between_two_waits_are_kept", || {
        let signals = Signals::new(&[SIGUSR1, SIGTERM]).unwrap();
        raise(SIGTERM);
        raise(SIGUSR1);
        raise(SIGUSR1);
        run(move || {
            assert_eq!(signals.wait(), Ok(SIGUSR1), "twice is once");
            assert_eq!(signals.wait(), Ok(SIGTERM));
            let none = timeout(0.02, || signals.wait());
            assert_eq!(none, Err(Error::Timeout));
            raise(SIGTERM);
            // What came already is not waited for, so no deadline stands in its way.
            assert_eq!(timeout(0, || signals.wait()), Ok(SIGTERM));
        });
    });
}

#[test]
fn many_signals_one_after_the_other_all_arrive() {
    alone("many_signals_one_after_the_other_all_arrive", || {
        let runtime = Runtime::builder().workers(2).build().unwrap();
        let (ping, pong) = (
            Signals::new(&[SIGUSR1]).unwrap(),
            Signals::new(&[SIGUSR2]).unwrap(),
        );
        let there = runtime.handle().spawn_on(0, move || -> Result<()> {
            for _ in 0..2000 {
                ping.wait()?;
                send(SIGUSR2);
            }
            Ok(())
        });
        let back = runtime.handle().spawn_on(1, move || -> Result<()> {
            for _ in 0..2000 {
                send(SIGUSR1);
                pong.wait()?;
            }
            Ok(())
        });
        back.unwrap().join().unwrap().unwrap();
        there.unwrap().join().unwrap().unwrap();
    });
}

#[test]
fn every_object_gets_the_signal_and_one_waiter_of_each() {
    alone(
        "every_object_gets_the_signal_and_one_waiter_of_each",
        || {
            run(|| {
                let (one, two) = (
                    Arc::new(Signals::new(&[SIGUSR1, SIGUSR2]).unwrap()),
                    Arc::new(Signals::new(&[SIGUSR1]).unwrap()),
                );
                let wait = |signals: &Arc<Signals>| {
                    let signals = signals.clone();
                    spawn(move || signals.wait())
                };
                let (first, second, third) = (wait(&one), wait(&one), wait(&two));
                sleep(0.01).unwrap();
                raise(SIGUSR1);
                assert_eq!(third.join().unwrap(), Ok(SIGUSR1));
                let start = Instant::now();
                while !first.is_finished() && !second.is_finished() {
                    assert!(start.elapsed() < Duration::from_secs(60));
                    sleep(0.001).unwrap();
                }
                sleep(0.01).unwrap();
                assert!(
                    first.is_finished() != second.is_finished(),
                    "one of the two"
                );
                raise(SIGUSR2);
                let mut got = [first.join().unwrap(), second.join().unwrap()];
                got.sort_by_key(|signal| signal.clone().ok());
                assert_eq!(got, [Ok(SIGUSR1), Ok(SIGUSR2)]);
                // Two signals while two wait: each gets one.
                let (first, second) = (wait(&one), wait(&one));
                sleep(0.01).unwrap();
                raise(SIGUSR1);
                raise(SIGUSR2);
                let mut got = [first.join().unwrap(), second.join().unwrap()];
                got.sort_by_key(|signal| signal.clone().ok());
                assert_eq!(got, [Ok(SIGUSR1), Ok(SIGUSR2)]);
            });
        },
    );
}

/// One waiter may empty the eventfd before the kernel has looked at it for the other.
#[test]
fn of_two_signals_at_once_each_wakes_a_waiter() {
    alone("of_two_signals_at_once_each_wakes_a_waiter", || {
        let signals = Arc::new(Signals::new(&[SIGUSR1, SIGUSR2]).unwrap());
        let (report, reports) = std::sync::mpsc::channel();
        let next_round = Arc::new(Barrier::new(3));
        for _ in 0..2 {
            let (signals, report) = (signals.clone(), report.clone());
            let next_round = next_round.clone();
            thread::spawn(move || {
                loop {
                    next_round.wait();
                    report.send(signals.wait().unwrap()).unwrap();
                }
            });
        }
        for round in 0..3000 {
            next_round.wait();
            // Not always, so that they are found at all stages of their way to sleep.
            (0..round % 16 * 8).for_each(|_| thread::yield_now());
            raise(SIGUSR1);
            raise(SIGUSR2);
            let mut both = 0;
            for _ in 0..2 {
                match reports.recv_timeout(Duration::from_secs(20)) {
                    Ok(signal) => both += signal,
                    Err(_) => panic!("round {round}: a signal is left with nobody awake"),
                }
            }
            assert_eq!(both, SIGUSR1 + SIGUSR2);
        }
    });
}

#[test]
fn a_wait_for_signals_is_interrupted() {
    alone("a_wait_for_signals_is_interrupted", || {
        run(|| {
            let waiting = spawn(|| signal::wait(&[SIGUSR1]));
            sleep(0.01).unwrap();
            waiting.cancel();
            assert_eq!(waiting.join().unwrap(), Err(Error::Cancelled));
        });
        let seen = Arc::new(std::sync::Mutex::new(None));
        let theirs = seen.clone();
        run(move || {
            spawn(move || *theirs.lock().unwrap() = Some(signal::wait(&[SIGUSR1])));
            sleep(0.01)
        })
        .unwrap();
        assert_eq!(*seen.lock().unwrap(), Some(Err(Error::Shutdown)));
        assert_eq!(action(SIGUSR1), libc::SIG_DFL);
    });
}

#[test]
fn the_old_action_is_back_after_the_last_object() {
    alone("the_old_action_is_back_after_the_last_object", || {
        let handler: extern "C" fn(libc::c_int) = count;
        install(SIGUSR1, handler as usize);
        install(SIGUSR2, libc::SIG_IGN);
        let one = Signals::new(&[SIGUSR1, SIGUSR2, SIGTERM]).unwrap();
        let two = Signals::new(&[SIGUSR1]).unwrap();
        raise(SIGUSR1);
        assert_eq!(HANDLED.load(Ordering::SeqCst), 1, "called as well");
        assert_eq!((one.wait(), two.wait()), (Ok(SIGUSR1), Ok(SIGUSR1)));
        drop(one);
        assert_ne!(action(SIGUSR1), handler as usize);
        assert_eq!(action(SIGUSR2), libc::SIG_IGN);
        assert_eq!(action(SIGTERM), libc::SIG_DFL);
        drop(two);
        assert_eq!(action(SIGUSR1), handler as usize);
        raise(SIGUSR1);
        assert_eq!(HANDLED.load(Ordering::SeqCst), 2);
        // Somebody else's handler over ours is left alone.
        let three = Signals::new(&[SIGUSR2]).unwrap();
        install(SIGUSR2, handler as usize);
        drop(three);
        assert_eq!(action(SIGUSR2), handler as usize);
    });
}

#[test]
fn a_signal_nobody_waits_for_has_its_ordinary_effect() {
    let test = "a_signal_nobody_waits_for_has_its_ordinary_effect";
    let finished = in_child(test, || {
        let _ = timeout(0.01, || signal::wait(&[SIGTERM]));
        let _other = Signals::new(&[SIGINT]).unwrap();
        send(SIGTERM);
        thread::sleep(Duration::from_secs(30));
    });
    assert_eq!(finished.status.signal(), Some(SIGTERM), "{finished:?}");
}

/// Another library saves our handler, and puts it back when nobody wants the signal any more.
#[test]
fn a_handler_put_back_after_the_last_object_eats_no_signal() {
    let test = "a_handler_put_back_after_the_last_object_eats_no_signal";
    let finished = in_child(test, || {
        let handler: extern "C" fn(libc::c_int) = count;
        let signals = Signals::new(&[SIGUSR1]).unwrap();
        let mut saved = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: the kernel fills the struct.
        unsafe { libc::sigaction(SIGUSR1, std::ptr::null(), saved.as_mut_ptr()) };
        install(SIGUSR1, handler as usize);
        drop(signals);
        // SAFETY: filled above.
        unsafe { libc::sigaction(SIGUSR1, saved.as_ptr(), std::ptr::null_mut()) };
        // It works again for a new object, whose end brings the default back.
        let signals = Signals::new(&[SIGUSR1]).unwrap();
        raise(SIGUSR1);
        assert_eq!(signals.wait(), Ok(SIGUSR1));
        drop(signals);
        assert_eq!(action(SIGUSR1), libc::SIG_DFL);
        // SAFETY: as above.
        unsafe { libc::sigaction(SIGUSR1, saved.as_ptr(), std::ptr::null_mut()) };
        raise(SIGUSR1);
        thread::sleep(Duration::from_secs(30));
    });
    assert_eq!(finished.status.signal(), Some(SIGUSR1), "{finished:?}");
}

#[test]
fn what_a_single_wait_leaves_over_has_its_ordinary_effect() {
    let test = "what_a_single_wait_leaves_over_has_its_ordinary_effect";
    let finished = in_child(test, || {
        // Both come before the wait looks: blocked here, they are delivered together when it is in place.
        let waiting = thread::spawn(|| signal::wait(&[SIGINT, SIGTERM]));
        let start = Instant::now();
        while action(SIGTERM) == libc::SIG_DFL || action(SIGINT) == libc::SIG_DFL {
            assert!(start.elapsed() < Duration::from_secs(60));
            thread::yield_now();
        }
        let mut set = std::mem::MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: the C library fills the set; this thread's mask is its own.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), SIGINT);
            libc::sigaddset(set.as_mut_ptr(), SIGTERM);
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            libc::pthread_kill(libc::pthread_self(), SIGTERM);
            libc::pthread_kill(libc::pthread_self(), SIGINT);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut());
        }
        let _ = waiting.join();
        // One was returned; the other ends the process, at the latest here.
        thread::sleep(Duration::from_secs(30));
    });
    let signal = finished.status.signal();
    assert!(matches!(signal, Some(SIGTERM | SIGINT)), "{finished:?}");
}

#[test]
fn signals_that_cannot_be_waited_for_are_einval() {
    alone("signals_that_cannot_be_waited_for_are_einval", || {
        let segv = action(libc::SIGSEGV);
        let fatal = [libc::SIGKILL, libc::SIGSTOP, libc::SIGSEGV, libc::SIGBUS];
        for bad in fatal
            .into_iter()
            .chain([libc::SIGILL, libc::SIGFPE, 0, -1, 65, 1000])
        {
            for signals in [vec![bad], vec![SIGUSR1, bad]] {
                let error = Signals::new(&signals).unwrap_err();
                assert_eq!(error.errno(), Some(libc::EINVAL), "{signals:?}");
                let error = signal::wait(&signals).unwrap_err();
                assert_eq!(error.errno(), Some(libc::EINVAL), "{signals:?}");
            }
        }
        assert_eq!(signal::wait(&[]).unwrap_err().errno(), Some(libc::EINVAL));
        assert_eq!(action(SIGUSR1), libc::SIG_DFL, "nothing is left behind");
        assert_eq!(action(libc::SIGSEGV), segv);
    });
}

#[test]
fn there_may_be_64_objects_and_they_leave_no_descriptor() {
    alone(
        "there_may_be_64_objects_and_they_leave_no_descriptor",
        || {
            let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
            let before = descriptors();
            for _ in 0..3 {
                let all: Vec<_> = (0..64)
                    .map(|_| Signals::new(&[SIGUSR1, SIGTERM]).unwrap())
                    .collect();
                let error = Signals::new(&[SIGUSR1]).unwrap_err();
                assert_eq!(error.errno(), Some(libc::EAGAIN));
                raise(SIGTERM);
                assert!(all.iter().all(|signals| signals.wait() == Ok(SIGTERM)));
            }
            let mut after = descriptors();
            // The ring of this thread.
            after -= usize::from(after > before);
            assert_eq!(after, before);
        },
    );
}

#[test]
fn objects_come_and_go_under_a_storm_of_signals() {
    alone("objects_come_and_go_under_a_storm_of_signals", || {
        let keep = Signals::new(&[SIGUSR1]).unwrap();
        let stop = Arc::new(AtomicUsize::new(0));
        let theirs = stop.clone();
        let storm = thread::spawn(move || {
            while theirs.load(Ordering::SeqCst) == 0 {
                send(SIGUSR1);
            }
        });
        let start = Instant::now();
        let mut seen = 0;
        for _ in 0..3000 {
            let signals = Signals::new(&[SIGUSR1]).unwrap();
            // Its number is the first to be used again: what a late handler wrote would be read here.
            seen += usize::from(timeout(0.001, || signals.wait()).is_ok());
            drop(signals);
            let (reader, writer) = std::io::pipe().unwrap();
            assert_eq!(
                timeout(0, || ringsock::wait_readable(&reader)),
                Err(Error::Timeout)
            );
            drop(writer);
            if start.elapsed() > Duration::from_secs(20) {
                break;
            }
        }
        stop.store(1, Ordering::SeqCst);
        storm.join().unwrap();
        assert!(seen > 0);
        assert_eq!(keep.wait(), Ok(SIGUSR1));
        // One may still be on its way to another thread, and must not find the default action.
        std::mem::forget(keep);
    });
}

#[test]
fn a_forked_child_waits_for_its_own_signals() {
    alone("a_forked_child_waits_for_its_own_signals", || {
        let signals = Signals::new(&[SIGUSR1]).unwrap();
        // SAFETY: one thread that matters, and the child leaves by _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: no memory is passed. A child that hangs ends by the signal.
            unsafe { libc::alarm(60) };
            let start = Instant::now();
            let first = timeout(20, || signals.wait());
            let second = timeout(20, || signals.wait());
            // What is only seen when the time is over did not end the wait.
            let in_time = start.elapsed() < Duration::from_secs(15);
            let both = first == Ok(SIGUSR1) && second == Ok(SIGUSR1) && in_time;
            // SAFETY: _exit only ends the process.
            unsafe { libc::_exit(i32::from(both)) };
        }
        let mut status = 0;
        let start = Instant::now();
        // One may come before the child waits, or two as one: it is sent until the child has had enough.
        loop {
            // SAFETY: `status` lives through the call; the child is ours.
            match unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } {
                0 => {
                    // SAFETY: no memory is passed; the child is not reaped.
                    unsafe { libc::kill(child, SIGUSR1) };
                }
                ended => {
                    assert_eq!(ended, child);
                    break;
                }
            }
            assert!(start.elapsed() < Duration::from_secs(60));
            thread::sleep(Duration::from_millis(5));
        }
        assert!(
            libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 1,
            "{status:#x}"
        );
        // The parent got none of them, and still gets its own.
        assert_eq!(timeout(0.02, || signals.wait()), Err(Error::Timeout));
        raise(SIGUSR1);
        assert_eq!(signals.wait(), Ok(SIGUSR1));
    });
}

#[test]
fn signals_that_could_not_be_asked_for_leave_nothing_behind() {
    alone(
        "signals_that_could_not_be_asked_for_leave_nothing_behind",
        || {
            for _ in 0..100 {
                assert!(Signals::new(&[SIGUSR1, libc::SIGKILL]).is_err());
                assert!(Signals::new(&[libc::SIGKILL, SIGUSR1]).is_err());
            }
            // The descriptors of the failed ones are free, and their numbers nobody's to write to.
            let (left, right) = ringsock::socketpair().unwrap();
            let signals = Signals::new(&[SIGUSR1]).unwrap();
            raise(SIGUSR1);
            assert_eq!(signals.wait(), Ok(SIGUSR1));
            for socket in [&left, &right] {
                socket.settimeout(0).unwrap();
                assert!(socket.recv(64).unwrap_err().is_would_block());
            }
        },
    );
}

static BELOW: AtomicUsize = AtomicUsize::new(0);

/// As another library's: calls the handler that was there before it.
extern "C" fn count_and_chain(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
    let below = BELOW.load(Ordering::SeqCst);
    // SAFETY: the address is that of the crate's handler, which takes these.
    let below: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
        unsafe { std::mem::transmute(below) };
    below(signal, info, context);
}

#[test]
fn a_handler_over_ours_that_chains_is_called_once_a_signal() {
    alone(
        "a_handler_over_ours_that_chains_is_called_once_a_signal",
        || {
            let signals = Signals::new(&[SIGUSR1]).unwrap();
            BELOW.store(action(SIGUSR1), Ordering::SeqCst);
            // SAFETY: zeroed is a valid action; the handler takes what SA_SIGINFO passes.
            unsafe {
                let mut theirs: libc::sigaction = std::mem::zeroed();
                let handler: extern "C" fn(_, _, _) = count_and_chain;
                theirs.sa_sigaction = handler as usize;
                theirs.sa_flags = libc::SA_SIGINFO;
                assert_eq!(libc::sigaction(SIGUSR1, &theirs, std::ptr::null_mut()), 0);
            }
            raise(SIGUSR1);
            assert_eq!(signals.wait(), Ok(SIGUSR1));
            drop(signals);
            for _ in 0..3 {
                raise(SIGUSR1);
            }
            assert_eq!(HANDLED.load(Ordering::SeqCst), 4);
        },
    );
}
