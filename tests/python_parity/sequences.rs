//! Random steps on ringsock and on a CPython that runs beside, in lock-step: after each step the outcomes are compared.
//!
//! The steps are of the table's language, over a few sockets that never wait long: non-blocking, with a timeout of 1 ms, or
//! blocking with SO_RCVTIMEO and SO_SNDTIMEO of 1 ms.

use std::cell::RefCell;
use std::io::Write;
use std::process::{ChildStdin, Command};

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

use crate::interpreter::Environment;
use crate::support::{Process, checked, seed};
use crate::{RECORDER, python};

/// Per setting.
const SEQUENCES: u32 = 1_100;
const STEPS_MAX: usize = 12;

/// A CPython that executes steps.
struct Python {
    process: Process,
    stdin: ChildStdin,
}

impl Python {
    fn start(program: &str) -> Python {
        let command = &mut Command::new(program);
        let (process, stdin) = Process::interactive(command.arg(RECORDER).arg("--serve")).unwrap();
        Python { process, stdin }
    }

    fn outcome(&mut self, step: &str) -> String {
        writeln!(self.stdin, "{step}").unwrap();
        self.process.line()
    }

    /// Forgets all variables.
    fn reset(&mut self) {
        writeln!(self.stdin).unwrap();
    }
}

/// Sockets to begin with: `s` and `t`, and `a`, an address to send or to connect to.
const SETUPS: &[&[&str]] = &[
    &["s, t = socketpair()", "a = NAME"],
    &["s, t = socketpair(AF_UNIX, SOCK_DGRAM)", "a = NAME"],
    &["s, t = socketpair(AF_UNIX, SOCK_SEQPACKET)", "a = NAME"],
    &[
        "s, t = tcp_pair()",
        "s.getsockname()",
        "a = t.getsockname()",
    ],
    &[
        "s, t = tcp_pair(AF_INET6)",
        "s.getsockname()",
        "a = t.getsockname()",
    ],
    &[
        "s = socket(AF_INET, SOCK_DGRAM)",
        "t = socket(AF_INET, SOCK_DGRAM)",
        "s.bind((\"127.0.0.1\", 0))",
        "t.bind((\"127.0.0.1\", 0))",
        "s.getsockname()",
        "a = t.getsockname()",
    ],
    &[
        "s = socket(AF_INET6, SOCK_DGRAM)",
        "t = socket(AF_INET6, SOCK_DGRAM)",
        "t.bind((\"::1\", 0))",
        "a = t.getsockname()",
        "s.connect(a)",
        "t.connect(s.getsockname())",
        "t.getpeername()",
    ],
    &[
        "s = socket(AF_UNIX, SOCK_DGRAM)",
        "t = socket(AF_UNIX, SOCK_DGRAM)",
        "t.bind(NAME)",
        "a = NAME",
    ],
    &[
        "t = create_server((\"127.0.0.1\", 0))",
        "s = socket(AF_INET, SOCK_STREAM)",
        "a = t.getsockname()",
    ],
    &[
        "t = socket(AF_UNIX, SOCK_STREAM)",
        "s = socket(AF_UNIX, SOCK_STREAM)",
        "t.bind(NAME)",
        "t.listen(5)",
        "a = NAME",
    ],
];

/// How the sockets wait.
const MODES: &[&[&str]] = &[
    &["settimeout(0)"],
    &["settimeout(0.001)"],
    &[
        r#"setsockopt(SOL_SOCKET, SO_RCVTIMEO, b"\0\0\0\0\0\0\0\0\xe8\x03\0\0\0\0\0\0")"#,
        r#"setsockopt(SOL_SOCKET, SO_SNDTIMEO, b"\0\0\0\0\0\0\0\0\xe8\x03\0\0\0\0\0\0")"#,
    ],
];

/// What is done with each of the sockets. `connect` comes in non-blocking mode only: deviations.txt tells what is different
/// after it in the others.
const CALLS: &[&str] = &[
    "recv(SIZE)",
    "recv(SIZE)",
    "recv(SIZE, MSG_PEEK)",
    "recv(SIZE, MSG_DONTWAIT)",
    "recv(SIZE, MSG_PEEK | MSG_DONTWAIT)",
    "recv_into(bytearray(SIZE))",
    "recv_into(bytearray(SIZE), 3)",
    "recvfrom(SIZE)",
    "recvfrom(SIZE, MSG_PEEK)",
    "recvfrom_into(bytearray(SIZE))",
    "recvfrom_into(bytearray(5), SIZE)",
    "send(DATA)",
    "send(DATA)",
    "send(DATA, MSG_DONTWAIT)",
    "sendall(DATA)",
    "sendall(DATA)",
    "sendto(DATA, a)",
    "sendto(DATA, MSG_DONTWAIT, a)",
    "shutdown(HOW)",
    "close()",
    "accept()",
    "listen(1)",
    "bind(a)",
    "getsockname()",
    "getpeername()",
    "gettimeout()",
    "getblocking()",
    "family",
    "settimeout(-1)",
    "set_inheritable(False)",
    "get_inheritable()",
    "getsockopt(SOL_SOCKET, SO_TYPE)",
    "getsockopt(SOL_SOCKET, SO_ERROR)",
    "getsockopt(SOL_SOCKET, SO_ACCEPTCONN)",
    "setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)",
    "connect(a)",
    "connect_ex(a)",
    "dup()",
];

const SIZES: &[&str] = &["0", "1", "3", "100", "70000"];
const DATA: &[&str] = &[r#"b"""#, r#"b"a""#, r#"b"hello world""#, r#"b"x" * 5000"#];
const HOWS: &[&str] = &["SHUT_RD", "SHUT_WR", "SHUT_RDWR", "7"];

#[derive(Clone, Debug)]
struct Sequence {
    setup: Vec<String>,
    steps: Vec<String>,
}

fn steps(names: &'static [&'static str], mode: usize) -> impl Strategy<Value = Vec<String>> {
    let (may_connect, by_option) = (mode == 0, mode == 2);
    let calls = CALLS.iter().copied();
    let calls: Vec<_> = calls
        .filter(|call| may_connect || !call.starts_with("connect"))
        .collect();
    let parts = (
        select(names),
        select(calls),
        select(SIZES),
        select(DATA),
        select(HOWS),
    );
    let step = parts.prop_map(move |(name, call, size, data, how)| {
        // In blocking mode, TCP has nothing to wait for when nothing is asked of it; ringsock waits. See deviations.txt.
        let is_zero = size == "0" && by_option && call.starts_with("recvfrom");
        let size = if is_zero { "1" } else { size };
        let call = call.replace("SIZE", size).replace("DATA", data);
        format!("{name}.{}", call.replace("HOW", how))
    });
    prop::collection::vec(step, 1..=STEPS_MAX)
}

fn sequences() -> impl Strategy<Value = Sequence> {
    // Waiting takes time, so most of the sockets do not.
    let mode = select(vec![0_usize, 0, 0, 0, 0, 1, 1, 2]);
    (select(SETUPS), mode, any::<bool>()).prop_flat_map(|(setup, mode, duplicated)| {
        let mut lines: Vec<_> = setup.iter().map(|line| line.to_string()).collect();
        for name in ["s", "t"] {
            lines.extend(MODES[mode].iter().map(|line| format!("{name}.{line}")));
        }
        let names: &[&str] = if duplicated {
            lines.push("d = s.dup()".to_string());
            &["s", "t", "d"]
        } else {
            &["s", "t"]
        };
        steps(names, mode).prop_map(move |steps| Sequence {
            setup: lines.clone(),
            steps,
        })
    })
}

/// In timeout mode CPython waits for readiness before it calls: what can only fail times out there. See deviations.txt.
fn told_at_once(python: &str, ringsock: &str) -> bool {
    let received_nothing = ["b''", "0", "(b'', None)", "(0, None)"].contains(&ringsock);
    python == "TimeoutError -: timed out" && (ringsock.contains("[Errno ") || received_nothing)
}

fn compare(sequence: &Sequence, python: &mut Python) -> Result<(), TestCaseError> {
    python.reset();
    let mut ringsock = Environment::new();
    for step in sequence.setup.iter().chain(&sequence.steps) {
        let expected = python.outcome(step);
        let outcome = ringsock.outcome(step);
        let same = outcome == expected || told_at_once(&expected, &outcome);
        prop_assert!(
            same,
            "{step}\n  CPython:  {expected}\n  ringsock: {outcome}"
        );
    }
    Ok(())
}

fn run_sequences() {
    let Some(program) = python() else { return };
    let python = RefCell::new(Python::start(program));
    let seed = seed();
    let mut seed_bytes = [0; 32];
    seed_bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config {
        cases: SEQUENCES,
        failure_persistence: None,
        max_shrink_iters: 300,
        ..Config::default()
    };
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &seed_bytes);
    let mut runner = TestRunner::new_with_rng(config, random);
    let result = runner.run(&sequences(), |sequence| {
        compare(&sequence, &mut python.borrow_mut())
    });
    if let Err(TestError::Fail(reason, sequence)) = &result {
        let lines = [&sequence.setup[..], &sequence.steps[..]]
            .concat()
            .join("\n");
        panic!("RINGSOCK_TEST_SEED={seed}: {reason}\nin\n{lines}");
    }
    result.unwrap();
}

#[test]
fn random_steps_on_a_thread_as_cpython() {
    checked(run_sequences);
}

#[test]
fn random_steps_in_a_fiber_as_cpython() {
    checked(|| ringsock::run(run_sequences));
}
