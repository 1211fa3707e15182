//! Which driver runs, and who is told: by default, by force, and where the kernel refuses the ring. The rest of the suite is about
//! what it then does: `RINGSOCK_DRIVER=epoll cargo test` runs all of it on epoll.
#![allow(unsafe_code)]

mod support;

use std::io::{Read, Write};
use std::process::Command;
use std::thread;
use std::time::Duration;

use ringsock::prelude::*;
use ringsock::{DriverKind, Features, Handle, Runtime, run as run_fibers, socketpair, spawn};
use support::{
    CHILD, EchoServer, Endpoint, Family, Finished, Process, Stream, alone, child_part, eventually,
    example, forbid_call, forbid_io_uring, limit_descriptors, run, turn,
};

const VARIABLE: &str = "RINGSOCK_DRIVER";

/// The variable is not set, or is this.
fn choose(command: &mut Command, driver: Option<&str>) {
    command.env_remove(VARIABLE);
    command.envs(driver.map(|driver| (VARIABLE, driver)));
}

fn doctor(prepare: impl FnOnce(&mut Command)) -> (Finished, String) {
    let mut command = Command::new(example("doctor"));
    prepare(&mut command);
    let finished = run(&mut command, b"");
    let text = String::from_utf8_lossy(&finished.stdout).into_owned();
    (finished, text)
}

/// The rest of the table's row for a feature.
fn row(text: &str, name: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let line = line.unwrap_or_else(|| panic!("no row {name} in\n{text}"));
    line.trim().to_owned()
}

// Who chooses.

#[test]
fn doctor_names_the_driver_and_its_features() {
    let (finished, text) = doctor(|command| choose(command, None));
    assert_eq!(finished.status.code(), Some(0), "{finished:?}");
    assert!(finished.stderr.is_empty(), "{finished:?}");
    assert!(text.contains("\ndriver: io_uring\n"), "{text}");
    assert!(row(&text, "RECV ").starts_with("on"), "{text}");
    let (finished, text) = doctor(|command| choose(command, Some("epoll")));
    assert_eq!(finished.status.code(), Some(0), "{finished:?}");
    // Nobody needs to be told what he asked for.
    assert!(finished.stderr.is_empty(), "{finished:?}");
    assert!(text.contains("\ndriver: epoll\n"), "{text}");
    assert!(row(&text, "epoll ").starts_with("on"), "{text}");
    assert!(
        row(&text, "io_uring ").starts_with("off  epoll was asked for"),
        "{text}"
    );
}

#[test]
fn a_driver_that_there_is_not_is_refused_in_one_line() {
    for program in ["doctor", "echo_server"] {
        let mut command = Command::new(example(program));
        if program == "echo_server" {
            command.args(["--bind", "127.0.0.1:0"]);
        }
        choose(&mut command, Some("select"));
        let finished = run(&mut command, b"");
        assert_eq!(finished.status.code(), Some(1), "{finished:?}");
        assert_eq!(
            finished.stderr,
            format!(
                "{program}: RINGSOCK_DRIVER is \"select\": it may be \"uring\" or \"epoll\", or not set\n"
            )
        );
    }
}

#[test]
fn a_builder_chooses_over_the_environment() {
    for kind in [DriverKind::Uring, DriverKind::Epoll] {
        let runtime = Runtime::builder().driver(kind).workers(2).build().unwrap();
        assert_eq!(runtime.driver(), kind);
        assert_eq!(runtime.handle().driver(), kind);
        for features in runtime.handle().features() {
            assert_eq!(features.driver(), kind);
        }
        let inside = Runtime::builder()
            .driver(kind)
            .run(|| Handle::current().unwrap().driver());
        assert_eq!(inside, Ok(kind));
    }
    let expected = if support::on_epoll() {
        DriverKind::Epoll
    } else {
        DriverKind::Uring
    };
    assert_eq!(Features::probe().unwrap().driver(), expected);
    let runtime = Runtime::builder().build().unwrap();
    assert_eq!(runtime.driver(), expected);
}

/// Workers of both drivers, and plain threads, reach each other: wakes and closes go across.
#[test]
fn runtimes_of_both_drivers_and_threads_work_together() {
    let _turn = turn();
    let runtimes = [DriverKind::Uring, DriverKind::Epoll]
        .map(|kind| Runtime::builder().driver(kind).build().unwrap());
    for (one, other) in [(0, 1), (1, 0)] {
        let (left, right) = socketpair().unwrap();
        let (sender, receiver) = ringsock::channel(1);
        let reader = right.clone();
        let reading = runtimes[one].handle().spawn(move || {
            sender.send(()).unwrap();
            let first = reader.recv(16).unwrap();
            assert_eq!(first, b"across");
            sender.send(()).unwrap();
            reader.recv(16).map(drop)
        });
        let closing = runtimes[other].handle().spawn(move || {
            receiver.recv().unwrap();
            left.sendall(b"across").unwrap();
            receiver.recv().unwrap();
            ringsock::sleep(0.02).unwrap();
            right.close().unwrap();
            assert!(left.recv(1).unwrap().is_empty(), "its FIN");
            left
        });
        let left = closing.unwrap().join().unwrap();
        let closed = reading.unwrap().join().unwrap();
        assert_eq!(closed.unwrap_err().errno(), Some(libc::EBADF));
        // And a thread, woken by a worker's close.
        let (_peer, waiting) = socketpair().unwrap();
        let shared = waiting.clone();
        let thread = thread::spawn(move || shared.recv(1).map(drop));
        let closer = runtimes[other].handle().spawn(move || {
            ringsock::sleep(0.02).unwrap();
            waiting.close().unwrap();
        });
        closer.unwrap().join().unwrap();
        let woken = thread.join().unwrap();
        assert_eq!(woken.unwrap_err().errno(), Some(libc::EBADF));
        drop(left);
    }
}

// Where the kernel refuses the ring.

#[test]
fn without_io_uring_everything_works_and_says_what_it_runs_on() {
    let _turn = turn();
    for errno in [libc::EPERM, libc::ENOSYS] {
        let (finished, text) = doctor(|command| {
            choose(command, None);
            forbid_io_uring(command, errno);
        });
        assert_eq!(finished.status.code(), Some(0), "{finished:?}");
        assert!(text.contains("\ndriver: epoll\n"), "{text}");
        let row = row(&text, "io_uring ");
        assert!(row.starts_with("off") && row.contains("seccomp"), "{text}");
        for workers in ["1", "2"] {
            let mut server =
                EchoServer::start_with(Family::V4, &["--workers", workers], |command| {
                    choose(command, None);
                    forbid_io_uring(command, errno);
                })
                .expect("IPv4");
            let mut streams: Vec<Stream> = (0..50).map(|_| server.connect()).collect();
            for stream in &mut streams {
                stream.round_trip(&[7; 10_000]).unwrap();
            }
            server.process.signal(libc::SIGKILL);
            let finished = server.process.wait();
            let start = format!("ringsock: running on epoll, not on io_uring: [Errno {errno}] ");
            assert!(finished.stderr.starts_with(&start), "{finished:?}");
            assert!(finished.stderr.contains("seccomp"), "{finished:?}");
            assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
        }
    }
}

#[test]
fn a_ring_that_was_asked_for_and_is_refused_is_an_error_that_names_the_remedy() {
    for errno in [libc::EPERM, libc::ENOSYS] {
        let programs: [(&str, &[&str]); 3] = [
            ("doctor", &[]),
            ("echo_server", &["--bind", "127.0.0.1:0"]),
            ("echo_server", &["--bind", "127.0.0.1:0", "--workers", "2"]),
        ];
        for (program, args) in programs {
            let mut command = Command::new(example(program));
            command.args(args);
            choose(&mut command, Some("uring"));
            forbid_io_uring(&mut command, errno);
            let finished = run(&mut command, b"");
            assert_eq!(finished.status.code(), Some(1), "{finished:?}");
            let start = format!("{program}: [Errno {errno}] ");
            assert!(finished.stderr.starts_with(&start), "{finished:?}");
            // What a filter has to let through.
            for remedy in [
                "seccomp",
                "io_uring_setup, io_uring_enter and io_uring_register",
            ] {
                assert!(finished.stderr.contains(remedy), "{finished:?}");
            }
            assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
        }
    }
}

/// A filter that allows the setup of a ring and forbids its use is found before anything depends on the ring.
#[test]
fn a_ring_that_may_be_made_but_not_used_is_no_ring() {
    let calls = [
        ("io_uring_enter", libc::SYS_io_uring_enter),
        ("io_uring_register", libc::SYS_io_uring_register),
    ];
    for (name, number) in calls {
        for errno in [libc::EPERM, libc::ENOSYS] {
            let (finished, text) = doctor(|command| {
                choose(command, None);
                forbid_call(command, number, errno);
            });
            assert_eq!(finished.status.code(), Some(0), "{finished:?}");
            assert!(text.contains("\ndriver: epoll\n"), "{text}");
            let why = row(&text, "io_uring ");
            assert!(why.contains(name) && why.contains("seccomp"), "{text}");
            let mut server = EchoServer::start_with(Family::V4, &[], |command| {
                choose(command, None);
                forbid_call(command, number, errno);
            })
            .expect("IPv4");
            server.connect().round_trip(&[7; 10_000]).unwrap();
            server.process.signal(libc::SIGKILL);
            let finished = server.process.wait();
            assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
            assert!(finished.stderr.contains(name), "{finished:?}");
        }
    }
}

/// In a process without io_uring: fibers, threads, and a forced ring.
#[test]
#[ignore = "run by fibers_and_threads_work_where_io_uring_is_forbidden"]
fn child_without_io_uring() {
    if child_part().is_none() {
        return;
    }
    let exchange = || {
        let (left, right) = socketpair().unwrap();
        left.sendall(b"hello").unwrap();
        assert_eq!(right.recv(16).unwrap(), b"hello");
        right.settimeout(0.01).unwrap();
        assert_eq!(right.recv(16).unwrap_err(), Error::Timeout);
    };
    exchange();
    thread::spawn(exchange).join().unwrap();
    run_fibers(move || {
        assert_eq!(Handle::current().unwrap().driver(), DriverKind::Epoll);
        spawn(exchange).join().unwrap();
    });
    assert_eq!(ringsock::calls_without_ring(), 0);
    let forced = Runtime::builder().driver(DriverKind::Uring).build();
    assert_eq!(forced.unwrap_err().errno(), Some(libc::EPERM));
    println!("all of it worked");
}

#[test]
fn fibers_and_threads_work_where_io_uring_is_forbidden() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--exact",
            "child_without_io_uring",
            "--ignored",
            "--nocapture",
        ])
        .env(CHILD, "all");
    choose(&mut command, None);
    forbid_io_uring(&mut command, libc::EPERM);
    let finished = run(&mut command, b"");
    let text = String::from_utf8_lossy(&finished.stdout).into_owned();
    assert!(text.contains("all of it worked"), "{finished:?}");
    let told = |line: &&str| line.starts_with("ringsock: running on epoll");
    assert_eq!(
        finished.stderr.lines().filter(told).count(),
        1,
        "{finished:?}"
    );
}

// What a child of fork(2) inherits.

#[test]
fn a_forked_child_leaves_the_parents_epoll_alone() {
    alone("a_forked_child_leaves_the_parents_epoll_alone", || {
        let runtime = Runtime::builder()
            .driver(DriverKind::Epoll)
            .build()
            .unwrap();
        let main = runtime.handle().spawn(|| {
            let (left, right) = socketpair().unwrap();
            let reader = right.clone();
            let waiting = spawn(move || reader.recv(16).unwrap());
            ringsock::sleep(0.01).unwrap();
            let code = support::fork(|| {
                // As on a plain thread, and on what the parent's fiber waits for.
                let (mine, yours) = socketpair().unwrap();
                mine.sendall(b"child").unwrap();
                let heard = yours.recv(16).is_ok_and(|heard| heard == b"child");
                right.settimeout(0.01).unwrap();
                let timed_out = right.recv(1) == Err(Error::Timeout);
                i32::from(!heard) + 2 * i32::from(!timed_out)
            });
            assert_eq!(code, 0);
            left.sendall(b"parent").unwrap();
            assert_eq!(waiting.join().unwrap(), b"parent");
        });
        main.unwrap().join().unwrap();
    });
}

// A listener that processes share.

#[test]
fn two_runtimes_accept_from_one_blocking_listener() {
    let _turn = turn();
    const CLIENTS: usize = 200;
    let listener = support::listener(CLIENTS as i32);
    let address = listener.getsockname().unwrap();
    let runtimes: Vec<Runtime> = (0..2)
        .map(|_| {
            Runtime::builder()
                .driver(DriverKind::Epoll)
                .build()
                .unwrap()
        })
        .collect();
    let accepting: Vec<_> = runtimes
        .iter()
        .flat_map(|runtime| (0..4).map(|_| runtime.handle()))
        .map(|handle| {
            let listener = listener.clone();
            let accept = move || {
                let mut accepted = 0;
                while let Ok((conn, _)) = listener.accept() {
                    conn.sendall(b"hello").unwrap();
                    accepted += 1;
                }
                accepted
            };
            handle.spawn(accept).unwrap()
        })
        .collect();
    for _ in 0..CLIENTS {
        let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
        client.settimeout(60).unwrap();
        client.connect(&address).unwrap();
        assert_eq!(client.recv_with(5, MSG_WAITALL).unwrap(), b"hello");
    }
    // No worker waits in accept(2): each still runs its other fibers.
    for runtime in &runtimes {
        let answer = runtime.handle().spawn(|| ringsock::sleep(0.001));
        answer.unwrap().join().unwrap().unwrap();
    }
    listener.close().unwrap();
    let accepted: usize = accepting
        .into_iter()
        .map(|fiber| fiber.join().unwrap())
        .sum();
    assert_eq!(accepted, CLIENTS);
}

// Ten thousand connections.

/// How many connections this process may have at once, 10,000 if the limit of descriptors holds them.
fn connections() -> usize {
    const WANTED: usize = 10_000;
    let (_, limit) = ringsock::raise_descriptor_limit().expect("a limit of open descriptors");
    let count = WANTED.min(limit as usize - 500);
    if count < WANTED {
        println!("{count} connections rather than {WANTED}: the limit is {limit} descriptors");
    }
    count
}

/// Opens `count` connections, writes on each, then reads back on each.
fn echo_once_on_each(endpoint: &Endpoint, count: usize) -> Vec<Stream> {
    let connect = || Stream::connect(endpoint).expect("a connection");
    let mut streams: Vec<Stream> = (0..count).map(|_| connect()).collect();
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&(number as u64).to_le_bytes()).unwrap();
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        let mut back = [0; 8];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(back, (number as u64).to_le_bytes(), "connection {number}");
    }
    streams
}

#[test]
fn on_epoll_an_echo_server_serves_ten_thousand_connections() {
    let _turn = turn();
    let count = connections();
    let server = EchoServer::start_with(Family::V4, &[], |command| {
        choose(command, Some("epoll"));
        limit_descriptors(command, 1024, u64::MAX);
    })
    .expect("IPv4");
    let streams = echo_once_on_each(&server.endpoint, count);
    assert!(server.descriptors() >= count);
    // Idle, they cost nothing.
    thread::sleep(Duration::from_millis(200));
    let before = server.cpu_time();
    thread::sleep(Duration::from_millis(500));
    assert!(server.cpu_time() - before <= Duration::from_millis(50));
    streams.into_iter().for_each(Stream::reset);
    eventually("the connections are closed", || server.descriptors() < 64);
    server.connect().round_trip(b"still there").unwrap();
    server.finish();
}

#[test]
fn on_epoll_a_proxy_serves_ten_thousand_connections() {
    let _turn = turn();
    // Each connection takes two descriptors of the proxy, so its limit is raised as far as this user may.
    let wanted = libc::rlimit {
        rlim_cur: 21_000,
        rlim_max: 21_000,
    };
    let raise = |command: &mut Command| {
        use std::os::unix::process::CommandExt;
        let raise = move || {
            let mut limit = wanted;
            // SAFETY: each reads or writes one `struct rlimit` that lives through the call.
            unsafe {
                if libc::setrlimit(libc::RLIMIT_NOFILE, &limit) != 0 {
                    libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
                    limit.rlim_cur = limit.rlim_max;
                    libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
                }
            }
            Ok(())
        };
        // SAFETY: the closure makes async-signal-safe system calls and allocates nothing.
        unsafe { command.pre_exec(raise) };
    };
    let server = EchoServer::start_with(Family::V4, &[], |command| {
        choose(command, Some("epoll"));
        raise(command);
    })
    .expect("IPv4");
    let Endpoint::Tcp(upstream) = &server.endpoint else {
        panic!("not TCP");
    };
    let mut command = Command::new(example("proxy"));
    choose(&mut command, Some("epoll"));
    raise(&mut command);
    command.args([
        "--listen",
        "127.0.0.1:0",
        "--idle-timeout",
        "3600",
        "--upstream",
        &upstream.to_string(),
    ]);
    let mut proxy = Process::start(&mut command, b"").expect("the proxy starts");
    let line = proxy.line();
    let address = line.strip_prefix("listening on ").expect("an address");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", proxy.pid())).unwrap();
    let files = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    let files: usize = files
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap();
    // A connect that is under way takes a few more.
    let count = connections().min((files - 1000) / 2);
    println!("{count} connections, {files} descriptors for the proxy");
    assert!(count == 10_000 || files < 21_000);
    let endpoint = Endpoint::Tcp(address.parse().unwrap());
    let streams = echo_once_on_each(&endpoint, count);
    assert!(proxy.descriptors() >= 2 * count);
    streams.into_iter().for_each(Stream::reset);
    eventually("the connections are closed", || proxy.descriptors() < 64);
    Stream::connect(&endpoint)
        .unwrap()
        .round_trip(b"still there")
        .unwrap();
    proxy.signal(libc::SIGTERM);
    assert_eq!(proxy.wait().status.code(), Some(0));
    server.finish();
}
