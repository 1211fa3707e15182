//! Name resolution: against Python result by result, in addresses, and while name servers are slow or dead.
//!
//! Most tests run in a process with a mount and a network namespace of its own: its `/etc/hosts` and the like are theirs, and its
//! name server is a thread of theirs. Only root may make those; others see the tests skipped.
#![allow(unsafe_code)]

mod support;

use std::cell::Cell;
use std::collections::HashSet;
use std::fs;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::rc::Rc;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use ringsock::prelude::*;
use ringsock::{
    AddrInfo, CreateConnection, Kind, Result, create_connection, create_connection_with,
    create_server, getaddrinfo, getaddrinfo_with, getdefaulttimeout, getfqdn, gethostbyaddr,
    gethostbyname, gethostbyname_ex, gethostname, getnameinfo, getprotobyname, getservbyname,
    getservbyport, has_ipv6, htonl, htons, if_indextoname, if_nameindex, if_nametoindex, inet_aton,
    inet_ntoa, inet_ntop, inet_pton, ntohl, ntohs, run, set_lookup_threads, setdefaulttimeout,
    sleep, socketpair, spawn, timeout,
};
use support::{TempDir, alone, eventually, fork, has_python, turn};

const HOSTS: &str = "\
127.0.0.1 localhost
127.0.0.2 two.example.test two deux
127.0.0.3 drei three.example.test three
127.0.0.4 many.test
127.0.0.5 many.test
::1 six.test ip6-localhost
127.0.0.6 both.test
::1 both.test
127.0.0.7 xn--bcher-kva.test
127.0.0.8 strasse.test
";

/// The above, and a host whose entry is longer than the room that is made for one at first.
fn hosts_file() -> String {
    let aliases: Vec<_> = (0..300).map(|n| format!("alias{n}.big.test")).collect();
    format!("{HOSTS}127.0.0.10 big.test {}\n", aliases.join(" "))
}

/// Runs `body` in a process of its own that has these hosts and the name server `127.0.0.1`, which the C library waits for as
/// many seconds as said.
fn with_own_names(test: &str, name_server_timeout_s: u32, body: impl FnOnce()) {
    const VARIABLE: &str = "RINGSOCK_TEST_NAMES";
    if std::env::var(VARIABLE).as_deref() == Ok(test) {
        // SAFETY: no memory is passed. A test that hangs ends by the signal.
        unsafe { libc::alarm(170) };
        body();
        println!("{test} came to its end");
        return;
    }
    let _turn = turn();
    let directory = TempDir::new();
    let resolver =
        format!("nameserver 127.0.0.1\noptions timeout:{name_server_timeout_s} attempts:1\n");
    for (name, text) in [
        ("hosts", hosts_file().as_str()),
        ("resolv.conf", &resolver),
        (
            "nsswitch.conf",
            "hosts: files dns\nservices: files\nprotocols: files\n",
        ),
    ] {
        fs::write(directory.path().join(name), text).unwrap();
    }
    let script = "ip link set lo up && cd \"$0\" && for name in *; do mount --bind $name /etc/$name || exit; done && exec \"$@\"";
    let isolated = |program: &str| {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--net", "sh", "-c", script])
            .arg(directory.path())
            .arg(program);
        command
    };
    match isolated("true").output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let reason = String::from_utf8_lossy(&output.stderr);
            println!("skipped: no names of its own: {}", reason.trim());
            return;
        }
        Err(error) => {
            println!("skipped: no names of its own: unshare: {error}");
            return;
        }
    }
    let program = std::env::current_exe().unwrap();
    let output = isolated(program.to_str().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(VARIABLE, test)
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && stdout.contains("came to its end"),
        "{:?}\n{stdout}\n{stderr}",
        output.status
    );
}

/// A name server that knows `*.quick.test`, at once, `*.slow.test`, after [`SLOW`], and `*.gated.test`, when told; it never answers
/// for `*.dead.test`. Each has the address 127.0.0.9.
#[derive(Clone)]
struct NameServer(Arc<NameServerState>);

/// A query and who asked.
type Query = (Vec<u8>, std::net::SocketAddr);

struct NameServerState {
    socket: UdpSocket,
    /// What waits behind the gate; `None` once it is open.
    gated: Mutex<Option<Vec<Query>>>,
}

const SLOW: Duration = Duration::from_millis(1500);

impl NameServer {
    fn start() -> NameServer {
        let socket = UdpSocket::bind("127.0.0.1:53").unwrap();
        let server = NameServer(Arc::new(NameServerState {
            socket,
            gated: Mutex::new(Some(Vec::new())),
        }));
        let theirs = server.clone();
        thread::spawn(move || theirs.serve());
        server
    }

    fn serve(self) {
        let mut buffer = [0; 1500];
        loop {
            let (len, from) = self.0.socket.recv_from(&mut buffer).unwrap();
            let query = buffer[..len].to_vec();
            let (name, _) = question(&query);
            if name.ends_with("dead.test") {
                continue;
            }
            if name.ends_with("slow.test") {
                let server = self.clone();
                thread::spawn(move || {
                    thread::sleep(SLOW);
                    server.answer(&query, from);
                });
                continue;
            }
            if name.ends_with("gated.test")
                && let Some(gated) = self.0.gated.lock().unwrap().as_mut()
            {
                gated.push((query, from));
                continue;
            }
            self.answer(&query, from);
        }
    }

    fn answer(&self, query: &[u8], to: std::net::SocketAddr) {
        let (name, end) = question(query);
        let is_known = ["quick.test", "slow.test", "gated.test"]
            .iter()
            .any(|known| name.ends_with(known));
        let is_v4 = query[end - 4..end - 2] == [0, 1];
        let mut answer = query[..end].to_vec();
        answer[2..4].copy_from_slice(&[0x81, if is_known { 0x80 } else { 0x83 }]);
        answer[6..12].copy_from_slice(&[0, u8::from(is_known && is_v4), 0, 0, 0, 0]);
        if is_known && is_v4 {
            answer.extend([0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 9]);
        }
        self.0.socket.send_to(&answer, to).unwrap();
    }

    /// How many lookups wait behind the gate.
    fn waiting(&self) -> usize {
        let gated = self.0.gated.lock().unwrap();
        let names: HashSet<_> = gated
            .iter()
            .flatten()
            .map(|(query, _)| question(query).0)
            .collect();
        names.len()
    }

    fn open(&self) {
        for (query, from) in self.0.gated.lock().unwrap().take().unwrap() {
            self.answer(&query, from);
        }
    }
}

/// The name that a query asks for, and where the question ends.
fn question(query: &[u8]) -> (String, usize) {
    let mut labels = Vec::new();
    let mut at = 12;
    while query[at] != 0 {
        let end = at + 1 + usize::from(query[at]);
        labels.push(String::from_utf8_lossy(&query[at + 1..end]).to_lowercase());
        at = end;
    }
    (labels.join("."), at + 5)
}

fn lookup_threads() -> usize {
    let names = fs::read_dir("/proc/self/task").unwrap().filter_map(|task| {
        // A thread may end while the list is read.
        fs::read_to_string(task.ok()?.path().join("comm")).ok()
    });
    names
        .filter(|name| name.trim() == "ringsock-lookup")
        .count()
}

fn v4(host: &str) -> Result<Vec<AddrInfo>> {
    getaddrinfo_with(host, 80, AF_INET, SOCK_STREAM, 0, 0)
}

fn hosts(found: Result<Vec<AddrInfo>>) -> Vec<String> {
    let ip = |info: AddrInfo| info.sockaddr.ip().unwrap().to_string();
    found.unwrap().into_iter().map(ip).collect()
}

fn gai(code: i32) -> Error {
    Error::Gaierror { code }
}

// Against Python.

/// A result as the Python side of the comparison prints it.
trait Show {
    fn show(&self) -> String;
}

impl Show for str {
    fn show(&self) -> String {
        self.into()
    }
}

impl Show for String {
    fn show(&self) -> String {
        self.clone()
    }
}

impl Show for u8 {
    fn show(&self) -> String {
        self.to_string()
    }
}

impl Show for u16 {
    fn show(&self) -> String {
        self.to_string()
    }
}

impl Show for u32 {
    fn show(&self) -> String {
        self.to_string()
    }
}

impl Show for i32 {
    fn show(&self) -> String {
        self.to_string()
    }
}

impl Show for bool {
    fn show(&self) -> String {
        u8::from(*self).to_string()
    }
}

impl Show for () {
    fn show(&self) -> String {
        "None".into()
    }
}

impl<T: Show> Show for Vec<T> {
    fn show(&self) -> String {
        let items: Vec<_> = self.iter().map(Show::show).collect();
        format!("[{}]", items.join(","))
    }
}

impl<const N: usize> Show for [u8; N] {
    fn show(&self) -> String {
        self.to_vec().show()
    }
}

impl<A: Show, B: Show> Show for (A, B) {
    fn show(&self) -> String {
        format!("[{},{}]", self.0.show(), self.1.show())
    }
}

impl<A: Show, B: Show, C: Show> Show for (A, B, C) {
    fn show(&self) -> String {
        format!("[{},{},{}]", self.0.show(), self.1.show(), self.2.show())
    }
}

impl Show for AddrInfo {
    fn show(&self) -> String {
        let address = match &self.sockaddr {
            Address::V4(v4) => format!("[{},{}]", v4.ip(), v4.port()),
            Address::V6(v6) => {
                let (port, flow, scope) = (v6.port(), v6.flowinfo(), v6.scope_id());
                format!("[{},{port},{flow},{scope}]", v6.ip())
            }
            other => panic!("{other:?}"),
        };
        let (family, kind) = (self.family.bits(), self.kind.bits());
        format!(
            "[{family},{kind},{},{},{address}]",
            self.proto, self.canonname
        )
    }
}

fn shown<T: Show>(result: Result<T>) -> String {
    match result {
        Ok(value) => value.show(),
        Err(error) => {
            let class = match error {
                Error::Os { .. } | Error::Message(_) => "OSError",
                Error::Gaierror { .. } => "gaierror",
                Error::Herror { .. } => "herror",
                Error::Value(_) => "ValueError",
                Error::Overflow(_) => "OverflowError",
                Error::Type(_) => "TypeError",
                _ => "another",
            };
            format!("{class}: {error}")
        }
    }
}

/// A Python expression and what is to give the same here.
type Case = (&'static str, fn() -> String);

fn long() -> String {
    "x".repeat(64)
}

const CASES: &[Case] = &[
    // getaddrinfo: what may be left out, and odd services.
    ("getaddrinfo(None, None)", || shown(getaddrinfo(None, None))),
    ("getaddrinfo(None, 80)", || shown(getaddrinfo(None, 80))),
    (
        "getaddrinfo(None, 0, 0, SOCK_STREAM, 0, AI_PASSIVE)",
        || {
            shown(getaddrinfo_with(
                None,
                0,
                AF_UNSPEC,
                SOCK_STREAM,
                0,
                AI_PASSIVE,
            ))
        },
    ),
    ("getaddrinfo('', 80)", || shown(getaddrinfo("", 80))),
    ("getaddrinfo('', 'http')", || shown(getaddrinfo("", "http"))),
    ("getaddrinfo('localhost', None)", || {
        shown(getaddrinfo("localhost", None))
    }),
    ("getaddrinfo('localhost', 'http')", || {
        shown(getaddrinfo("localhost", "http"))
    }),
    ("getaddrinfo('localhost', 'nosuch')", || {
        shown(getaddrinfo("localhost", "nosuch"))
    }),
    ("getaddrinfo('127.0.0.1', 'http')", || {
        shown(getaddrinfo("127.0.0.1", "http"))
    }),
    ("getaddrinfo('127.0.0.1', '80')", || {
        shown(getaddrinfo("127.0.0.1", "80"))
    }),
    ("getaddrinfo('127.0.0.1', '')", || {
        shown(getaddrinfo("127.0.0.1", ""))
    }),
    ("getaddrinfo('127.0.0.1', 'ü')", || {
        shown(getaddrinfo("127.0.0.1", "ü"))
    }),
    ("getaddrinfo('127.0.0.1', 'a\\0b')", || {
        shown(getaddrinfo("127.0.0.1", "a\0b"))
    }),
    ("getaddrinfo('localhost', 65536)", || {
        shown(getaddrinfo("localhost", 65536))
    }),
    ("getaddrinfo('127.0.0.1', 65616)", || {
        shown(getaddrinfo("127.0.0.1", 65616))
    }),
    ("getaddrinfo('127.0.0.1', 2**32 + 80)", || {
        shown(getaddrinfo("127.0.0.1", (1i64 << 32) + 80))
    }),
    ("getaddrinfo('127.0.0.1', -1)", || {
        shown(getaddrinfo("127.0.0.1", -1))
    }),
    ("getaddrinfo('localhost', -2**63)", || {
        shown(getaddrinfo("localhost", i64::MIN))
    }),
    // Hosts.
    ("getaddrinfo('two', 1)", || shown(getaddrinfo("two", 1))),
    ("getaddrinfo('many.test', 1)", || {
        shown(getaddrinfo("many.test", 1))
    }),
    ("getaddrinfo('six.test', 1)", || {
        shown(getaddrinfo("six.test", 1))
    }),
    ("getaddrinfo('both.test', 1)", || {
        shown(getaddrinfo("both.test", 1))
    }),
    ("getaddrinfo('a.quick.test', 1)", || {
        shown(getaddrinfo("a.quick.test", 1))
    }),
    ("getaddrinfo('nosuch.test', 1)", || {
        shown(getaddrinfo("nosuch.test", 1))
    }),
    ("getaddrinfo('b.quick.test', 1, AF_INET6)", || {
        shown(getaddrinfo_with(
            "b.quick.test",
            1,
            AF_INET6,
            Kind::new(0),
            0,
            0,
        ))
    }),
    ("getaddrinfo('bücher.test', 1)", || {
        shown(getaddrinfo("bücher.test", 1))
    }),
    ("getaddrinfo('BÜCHER。test', 1)", || {
        shown(getaddrinfo("BÜCHER。test", 1))
    }),
    ("getaddrinfo('straße.test', 1)", || {
        shown(getaddrinfo("straße.test", 1))
    }),
    ("getaddrinfo('x' * 64, 80)", || {
        shown(getaddrinfo(long().as_str(), 80))
    }),
    ("getaddrinfo('ü' * 64, 80)", || {
        shown(getaddrinfo("ü".repeat(64).as_str(), 80))
    }),
    ("getaddrinfo('a..b', 80)", || shown(getaddrinfo("a..b", 80))),
    ("getaddrinfo('127.1', 80)", || {
        shown(getaddrinfo("127.1", 80))
    }),
    ("getaddrinfo('0x7f000001', 80)", || {
        shown(getaddrinfo("0x7f000001", 80))
    }),
    ("getaddrinfo(' 127.0.0.1', 80)", || {
        shown(getaddrinfo(" 127.0.0.1", 80))
    }),
    ("getaddrinfo('<broadcast>', 80)", || {
        shown(getaddrinfo("<broadcast>", 80))
    }),
    ("getaddrinfo('fe80::1%lo', 0)", || {
        shown(getaddrinfo("fe80::1%lo", 0))
    }),
    ("getaddrinfo('::1%lo', 0)", || {
        shown(getaddrinfo("::1%lo", 0))
    }),
    ("getaddrinfo('::1%1', 0)", || shown(getaddrinfo("::1%1", 0))),
    // Families, types, flags.
    ("getaddrinfo('localhost', 0, 99)", || {
        shown(getaddrinfo_with("localhost", 0, 99.into(), 0.into(), 0, 0))
    }),
    ("getaddrinfo('localhost', 0, AF_UNIX)", || {
        shown(getaddrinfo_with("localhost", 0, AF_UNIX, 0.into(), 0, 0))
    }),
    ("getaddrinfo('localhost', 0, 0, 99)", || {
        shown(getaddrinfo_with("localhost", 0, AF_UNSPEC, 99.into(), 0, 0))
    }),
    ("getaddrinfo('localhost', 0, 0, 0, 0, 1 << 20)", || {
        shown(getaddrinfo_with(
            "localhost",
            0,
            AF_UNSPEC,
            0.into(),
            0,
            1 << 20,
        ))
    }),
    (
        "getaddrinfo('localhost', 0, 0, 0, 0, AI_NUMERICHOST)",
        || {
            shown(getaddrinfo_with(
                "localhost",
                0,
                AF_UNSPEC,
                0.into(),
                0,
                AI_NUMERICHOST,
            ))
        },
    ),
    (
        "getaddrinfo('two', 0, AF_INET, SOCK_STREAM, 0, AI_CANONNAME)",
        || {
            shown(getaddrinfo_with(
                "two",
                0,
                AF_INET,
                SOCK_STREAM,
                0,
                AI_CANONNAME,
            ))
        },
    ),
    ("getaddrinfo('127.0.0.1', 0, 0, 0, 0, AI_CANONNAME)", || {
        shown(getaddrinfo_with(
            "127.0.0.1",
            0,
            AF_UNSPEC,
            0.into(),
            0,
            AI_CANONNAME,
        ))
    }),
    ("getaddrinfo('127.0.0.1', 80, AF_INET6)", || {
        shown(getaddrinfo_with("127.0.0.1", 80, AF_INET6, 0.into(), 0, 0))
    }),
    (
        "getaddrinfo('127.0.0.1', 80, AF_INET6, 0, 0, AI_V4MAPPED)",
        || {
            shown(getaddrinfo_with(
                "127.0.0.1",
                80,
                AF_INET6,
                0.into(),
                0,
                AI_V4MAPPED,
            ))
        },
    ),
    (
        "getaddrinfo('127.0.0.1', 'http', AF_INET, 0, 0, AI_NUMERICSERV)",
        || {
            shown(getaddrinfo_with(
                "127.0.0.1",
                "http",
                AF_INET,
                0.into(),
                0,
                AI_NUMERICSERV,
            ))
        },
    ),
    (
        "getaddrinfo('localhost', 'domain', AF_INET, 0, IPPROTO_UDP)",
        || {
            shown(getaddrinfo_with(
                "localhost",
                "domain",
                AF_INET,
                0.into(),
                IPPROTO_UDP,
                0,
            ))
        },
    ),
    (
        "getaddrinfo('127.0.0.1', 1, AF_INET, SOCK_RAW, IPPROTO_UDP)",
        || {
            shown(getaddrinfo_with(
                "127.0.0.1",
                1,
                AF_INET,
                SOCK_RAW,
                IPPROTO_UDP,
                0,
            ))
        },
    ),
    // getnameinfo.
    ("getnameinfo(('127.0.0.2', 80), 0)", || {
        shown(getnameinfo(("127.0.0.2", 80), 0))
    }),
    ("getnameinfo(('127.0.0.77', 80), 0)", || {
        shown(getnameinfo(("127.0.0.77", 80), 0))
    }),
    ("getnameinfo(('127.0.0.77', 80), NI_NAMEREQD)", || {
        shown(getnameinfo(("127.0.0.77", 80), NI_NAMEREQD))
    }),
    ("getnameinfo(('127.1', 80), 3)", || {
        shown(getnameinfo(("127.1", 80), 3))
    }),
    ("getnameinfo(('127.0.0.1', 514), NI_DGRAM)", || {
        shown(getnameinfo(("127.0.0.1", 514), NI_DGRAM))
    }),
    ("getnameinfo(('127.0.0.1', 514), NI_NUMERICHOST)", || {
        shown(getnameinfo(("127.0.0.1", 514), NI_NUMERICHOST))
    }),
    ("getnameinfo(('127.0.0.1', 80), -1)", || {
        shown(getnameinfo(("127.0.0.1", 80), -1))
    }),
    ("getnameinfo(('localhost', 80), 0)", || {
        shown(getnameinfo(("localhost", 80), 0))
    }),
    ("getnameinfo(('a.quick.test', 80), 0)", || {
        shown(getnameinfo(("a.quick.test", 80), 0))
    }),
    ("getnameinfo(('', 80), 0)", || {
        shown(getnameinfo(("", 80), 0))
    }),
    ("getnameinfo(('::1', 80, 0, 0), 0)", || {
        shown(getnameinfo(("::1", 80, 0, 0), 0))
    }),
    ("getnameinfo(('fe80::1', 80, 0, 1), 3)", || {
        shown(getnameinfo(("fe80::1", 80, 0, 1), 3))
    }),
    ("getnameinfo(('127.0.0.1', 80, 0, 0), 0)", || {
        shown(getnameinfo(("127.0.0.1", 80, 0, 0), 0))
    }),
    // gethostby...
    ("gethostbyname('')", || shown(gethostbyname(""))),
    ("gethostbyname('<broadcast>')", || {
        shown(gethostbyname("<broadcast>"))
    }),
    ("gethostbyname('255.255.255.255')", || {
        shown(gethostbyname("255.255.255.255"))
    }),
    ("gethostbyname('127.1')", || shown(gethostbyname("127.1"))),
    ("gethostbyname('two')", || shown(gethostbyname("two"))),
    ("gethostbyname('six.test')", || {
        shown(gethostbyname("six.test"))
    }),
    ("gethostbyname('c.quick.test')", || {
        shown(gethostbyname("c.quick.test"))
    }),
    ("gethostbyname('nosuch.test')", || {
        shown(gethostbyname("nosuch.test"))
    }),
    ("gethostbyname('::1')", || shown(gethostbyname("::1"))),
    ("gethostbyname('256.1.1.1')", || {
        shown(gethostbyname("256.1.1.1"))
    }),
    ("gethostbyname('bücher.test')", || {
        shown(gethostbyname("bücher.test"))
    }),
    ("gethostbyname('a\\0b')", || shown(gethostbyname("a\0b"))),
    ("gethostbyname('x' * 64)", || shown(gethostbyname(&long()))),
    ("gethostbyname('a..b')", || shown(gethostbyname("a..b"))),
    ("gethostbyname_ex('')", || shown(gethostbyname_ex(""))),
    ("gethostbyname_ex('two')", || shown(gethostbyname_ex("two"))),
    ("gethostbyname_ex('many.test')", || {
        shown(gethostbyname_ex("many.test"))
    }),
    ("gethostbyname_ex('big.test')", || {
        shown(gethostbyname_ex("big.test"))
    }),
    ("gethostbyname_ex('127.0.0.1')", || {
        shown(gethostbyname_ex("127.0.0.1"))
    }),
    ("gethostbyname_ex('<broadcast>')", || {
        shown(gethostbyname_ex("<broadcast>"))
    }),
    ("gethostbyname_ex('d.quick.test')", || {
        shown(gethostbyname_ex("d.quick.test"))
    }),
    ("gethostbyname_ex('nosuch.test')", || {
        shown(gethostbyname_ex("nosuch.test"))
    }),
    ("gethostbyname_ex('a\\0b')", || {
        shown(gethostbyname_ex("a\0b"))
    }),
    ("gethostbyaddr('127.0.0.2')", || {
        shown(gethostbyaddr("127.0.0.2"))
    }),
    ("gethostbyaddr('127.0.0.77')", || {
        shown(gethostbyaddr("127.0.0.77"))
    }),
    ("gethostbyaddr('::1')", || shown(gethostbyaddr("::1"))),
    ("gethostbyaddr('two')", || shown(gethostbyaddr("two"))),
    ("gethostbyaddr('127.1')", || shown(gethostbyaddr("127.1"))),
    ("gethostbyaddr('')", || shown(gethostbyaddr(""))),
    ("gethostbyaddr('nosuch.test')", || {
        shown(gethostbyaddr("nosuch.test"))
    }),
    ("gethostbyaddr('a\\0b')", || shown(gethostbyaddr("a\0b"))),
    ("getfqdn()", || shown(getfqdn(None))),
    ("getfqdn('')", || shown(getfqdn(""))),
    ("getfqdn('0.0.0.0')", || shown(getfqdn("0.0.0.0"))),
    ("getfqdn(' two ')", || shown(getfqdn(" two "))),
    ("getfqdn('drei')", || shown(getfqdn("drei"))),
    ("getfqdn('127.0.0.3')", || shown(getfqdn("127.0.0.3"))),
    ("getfqdn('::1')", || shown(getfqdn("::1"))),
    ("getfqdn('nosuch.test')", || shown(getfqdn("nosuch.test"))),
    ("getfqdn('<broadcast>')", || shown(getfqdn("<broadcast>"))),
    ("getfqdn('x' * 64)", || shown(getfqdn(long().as_str()))),
    ("gethostname()", || shown(gethostname())),
    ("sethostname('x' * 100)", || {
        shown(ringsock::sethostname(long() + &long()))
    }),
    // Services and protocols.
    ("getservbyname('http')", || {
        shown(getservbyname("http", None))
    }),
    ("getservbyname('domain', 'udp')", || {
        shown(getservbyname("domain", "udp"))
    }),
    ("getservbyname('http', 'xxx')", || {
        shown(getservbyname("http", "xxx"))
    }),
    ("getservbyname('80')", || shown(getservbyname("80", None))),
    ("getservbyname('')", || shown(getservbyname("", None))),
    ("getservbyname('a\\0b')", || {
        shown(getservbyname("a\0b", None))
    }),
    ("getservbyport(80)", || shown(getservbyport(80, None))),
    ("getservbyport(514, 'udp')", || {
        shown(getservbyport(514, "udp"))
    }),
    ("getservbyport(514, 'tcp')", || {
        shown(getservbyport(514, "tcp"))
    }),
    ("getservbyport(0)", || shown(getservbyport(0, None))),
    ("getprotobyname('tcp')", || shown(getprotobyname("tcp"))),
    ("getprotobyname('TCP')", || shown(getprotobyname("TCP"))),
    ("getprotobyname('icmp')", || shown(getprotobyname("icmp"))),
    ("getprotobyname('6')", || shown(getprotobyname("6"))),
    ("getprotobyname('')", || shown(getprotobyname(""))),
    // Numbers.
    ("inet_aton('1')", || shown(inet_aton("1"))),
    ("inet_aton('1.2')", || shown(inet_aton("1.2"))),
    ("inet_aton('1.2.3')", || shown(inet_aton("1.2.3"))),
    ("inet_aton('0x7f.1')", || shown(inet_aton("0x7f.1"))),
    ("inet_aton('010.1.1.1')", || shown(inet_aton("010.1.1.1"))),
    ("inet_aton('4294967295')", || shown(inet_aton("4294967295"))),
    ("inet_aton('4294967296')", || shown(inet_aton("4294967296"))),
    ("inet_aton('1.2.3.4 x')", || shown(inet_aton("1.2.3.4 x"))),
    ("inet_aton(' 1.2.3.4')", || shown(inet_aton(" 1.2.3.4"))),
    ("inet_aton('')", || shown(inet_aton(""))),
    ("inet_aton('256.1.1.1')", || shown(inet_aton("256.1.1.1"))),
    ("inet_aton('1.2.3.4\\0')", || shown(inet_aton("1.2.3.4\0"))),
    ("inet_ntoa(b'abcd')", || shown(inet_ntoa(b"abcd"))),
    ("inet_ntoa(b'abc')", || shown(inet_ntoa(b"abc"))),
    ("inet_pton(AF_INET, '1.2.3.4')", || {
        shown(inet_pton(AF_INET, "1.2.3.4"))
    }),
    ("inet_pton(AF_INET, '1.2.3')", || {
        shown(inet_pton(AF_INET, "1.2.3"))
    }),
    ("inet_pton(AF_INET, '01.2.3.4')", || {
        shown(inet_pton(AF_INET, "01.2.3.4"))
    }),
    ("inet_pton(AF_INET, '1.2.3.4\\0')", || {
        shown(inet_pton(AF_INET, "1.2.3.4\0"))
    }),
    ("inet_pton(AF_INET6, '::ffff:1.2.3.4')", || {
        shown(inet_pton(AF_INET6, "::ffff:1.2.3.4"))
    }),
    ("inet_pton(AF_INET6, '1::')", || {
        shown(inet_pton(AF_INET6, "1::"))
    }),
    ("inet_pton(AF_INET6, '::1%lo')", || {
        shown(inet_pton(AF_INET6, "::1%lo"))
    }),
    ("inet_pton(AF_INET6, '1:::2')", || {
        shown(inet_pton(AF_INET6, "1:::2"))
    }),
    ("inet_pton(AF_UNIX, 'x')", || shown(inet_pton(AF_UNIX, "x"))),
    ("inet_ntop(AF_INET, b'abcd')", || {
        shown(inet_ntop(AF_INET, b"abcd"))
    }),
    ("inet_ntop(AF_INET, b'abc')", || {
        shown(inet_ntop(AF_INET, b"abc"))
    }),
    ("inet_ntop(AF_INET6, b'a' * 16)", || {
        shown(inet_ntop(AF_INET6, &[b'a'; 16]))
    }),
    ("inet_ntop(AF_INET6, b'a' * 15)", || {
        shown(inet_ntop(AF_INET6, &[b'a'; 15]))
    }),
    ("inet_ntop(AF_INET6, bytes(12) + b'abcd')", || {
        shown(inet_ntop(AF_INET6, b"\0\0\0\0\0\0\0\0\0\0\0\0abcd"))
    }),
    ("inet_ntop(AF_UNIX, b'abcd')", || {
        shown(inet_ntop(AF_UNIX, b"abcd"))
    }),
    (
        "[htons(1), htonl(1), ntohs(258), ntohl(258), has_ipv6]",
        || {
            let numbers = format!("{},{},{},{}", htons(1), htonl(1), ntohs(258), ntohl(258));
            format!("[{numbers},{}]", has_ipv6.show())
        },
    ),
    ("if_nameindex()", || shown(if_nameindex())),
    ("if_nametoindex('lo')", || shown(if_nametoindex("lo"))),
    ("if_nametoindex('nosuch')", || {
        shown(if_nametoindex("nosuch"))
    }),
    ("if_nametoindex('x' * 64)", || {
        shown(if_nametoindex(&long()))
    }),
    ("if_nametoindex('a\\0')", || shown(if_nametoindex("a\0"))),
    ("if_indextoname(1)", || shown(if_indextoname(1))),
    ("if_indextoname(0)", || shown(if_indextoname(0))),
    ("if_indextoname(99999)", || shown(if_indextoname(99999))),
    ("setdefaulttimeout(-1)", || shown(setdefaulttimeout(-1))),
    ("setdefaulttimeout(float('nan'))", || {
        shown(setdefaulttimeout(f64::NAN))
    }),
];

const PYTHON: &str = r"
import sys
from socket import *
import socket
def show(value):
    if isinstance(value, (list, tuple, bytes)):
        return '[' + ','.join(map(show, value)) + ']'
    return str(int(value)) if isinstance(value, int) else str(value)
names = {k: v for k, v in vars(socket).items()}
for expression in sys.argv[1:]:
    try:
        result = show(eval(expression, names))
    except (gaierror, herror, TypeError, OverflowError) as error:
        result = f'{type(error).__name__}: {error}'
    except ValueError as error:
        result = f'ValueError: {error}'
    except OSError as error:
        result = f'OSError: {error}'
    print(result)
";

#[test]
fn results_are_pythons() {
    with_own_names("results_are_pythons", 2, || {
        if !has_python() {
            return;
        }
        let _server = NameServer::start();
        let output = Command::new("python3")
            .args(["-X", "utf8", "-c", PYTHON])
            .args(CASES.iter().map(|(expression, _)| expression))
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        let python = String::from_utf8(output.stdout).unwrap();
        let python: Vec<_> = python.lines().collect();
        assert_eq!(python.len(), CASES.len());
        let compare = || {
            let compared = CASES
                .iter()
                .zip(&python)
                .filter_map(|((name, ours), python)| {
                    let ours = ours();
                    (ours != *python)
                        .then(|| format!("{name}\n    here:   {ours}\n    Python: {python}"))
                });
            compared.collect::<Vec<_>>().join("\n")
        };
        let different = compare();
        assert!(different.is_empty(), "on a plain thread:\n{different}");
        let expected: Vec<String> = python.iter().map(|&line| line.to_owned()).collect();
        let different = run(move || {
            CASES
                .iter()
                .zip(expected)
                .filter(|((_, ours), python)| ours() != *python)
                .map(|((name, _), _)| *name)
                .collect::<Vec<_>>()
        });
        assert!(different.is_empty(), "in a fiber: {different:?}");
    });
}

// Names in addresses.

#[test]
fn addresses_may_have_names() {
    with_own_names("addresses_may_have_names", 2, || {
        let _server = NameServer::start();
        for in_fiber in [false, true] {
            if in_fiber {
                run(use_names);
            } else {
                use_names();
            }
        }
    });
}

fn use_names() {
    let listener = create_server(("two", 0)).unwrap();
    let address = listener.getsockname().unwrap();
    let port = address.port().unwrap();
    assert_eq!(address.to_string(), format!("127.0.0.2:{port}"));

    let client = ringsock::socket(AF_INET, SOCK_STREAM).unwrap();
    client.bind(("three", 0)).unwrap();
    client.connect(("two.example.test", port)).unwrap();
    let (_, peer) = listener.accept().unwrap();
    assert_eq!(peer.ip().unwrap().to_string(), "127.0.0.3");
    let client = ringsock::socket(AF_INET, SOCK_STREAM).unwrap();
    assert_eq!(client.connect_ex(("deux", port)).unwrap(), 0);
    assert_eq!(
        client.connect_ex(("nosuch.test", port)),
        Err(gai(EAI_NONAME))
    );

    let server = ringsock::socket(AF_INET, SOCK_DGRAM).unwrap();
    server.bind(("e.quick.test", 0)).unwrap();
    let to = server.getsockname().unwrap().port().unwrap();
    let client = ringsock::socket(AF_INET, SOCK_DGRAM).unwrap();
    client.sendto(b"by name", ("f.quick.test", to)).unwrap();
    assert_eq!(server.recv(16).unwrap(), b"by name");

    // The first of a name's addresses, or all in turn.
    let second = create_server(("127.0.0.5", 0)).unwrap();
    let port = second.getsockname().unwrap().port().unwrap();
    let found = hosts(v4("many.test"));
    assert_eq!(found, ["127.0.0.4", "127.0.0.5"]);
    let client = ringsock::socket(AF_INET, SOCK_STREAM).unwrap();
    assert_eq!(client.connect_ex(("many.test", port)).unwrap(), 111);
    for happy_eyeballs_delay in [None, Some(Duration::from_millis(250))] {
        let options = CreateConnection {
            happy_eyeballs_delay,
            ..Default::default()
        };
        let client = create_connection_with(("many.test", port), options).unwrap();
        assert_eq!(client.getpeername().unwrap(), second.getsockname().unwrap());
    }
    let client = create_connection((String::from("many.test"), port)).unwrap();
    assert_eq!(client.getpeername().unwrap().port(), Some(port));
    drop(second);
    for happy_eyeballs_delay in [None, Some(Duration::from_millis(250))] {
        let options = CreateConnection {
            all_errors: true,
            happy_eyeballs_delay,
            ..Default::default()
        };
        let Err(Error::Group(errors)) = create_connection_with(("many.test", port), options) else {
            panic!("not a group");
        };
        assert_eq!(*errors, [Error::from_errno(111), Error::from_errno(111)]);
    }
    let unknown = create_connection(("nosuch.test", port)).unwrap_err();
    assert_eq!(unknown, gai(EAI_NONAME));
    assert_eq!(create_connection(("", port)).unwrap_err(), gai(EAI_NONAME));
}

// While name servers are slow.

/// The longest time between two ticks of 5 ms in a fiber beside `work`, and how many there were.
fn ticks_beside(work: impl FnOnce() + 'static) -> (Duration, usize) {
    let working = spawn(work);
    let (mut longest, mut ticks, mut last) = (Duration::ZERO, 0, Instant::now());
    while !working.is_finished() {
        sleep(0.005).unwrap();
        longest = longest.max(last.elapsed());
        last = Instant::now();
        ticks += 1;
    }
    working.join().unwrap();
    (longest, ticks)
}

#[test]
fn other_fibers_run_while_a_name_server_is_slow() {
    with_own_names("other_fibers_run_while_a_name_server_is_slow", 20, || {
        let _server = NameServer::start();
        run(|| {
            let lookups: [fn(); 4] = [
                || assert_eq!(hosts(getaddrinfo("a.slow.test", 80))[0], "127.0.0.9"),
                || assert_eq!(gethostbyname("b.slow.test").unwrap(), "127.0.0.9"),
                || assert_eq!(gethostbyname_ex("c.slow.test").unwrap().2, ["127.0.0.9"]),
                || {
                    let client = ringsock::socket(AF_INET, SOCK_DGRAM).unwrap();
                    client.connect(("d.slow.test", 1)).unwrap();
                },
            ];
            for lookup in lookups {
                let start = Instant::now();
                let (longest, ticks) = ticks_beside(lookup);
                assert!(start.elapsed() >= SLOW);
                assert!(longest < SLOW / 2, "a pause of {longest:?}");
                assert!(ticks > 20, "{ticks} ticks");
            }
        });
        // On a plain thread the caller waits.
        let start = Instant::now();
        assert_eq!(hosts(v4("e.slow.test")), ["127.0.0.9"]);
        assert!(start.elapsed() >= SLOW);
    });
}

#[test]
fn a_dead_name_server_holds_up_its_fiber_only() {
    with_own_names("a_dead_name_server_holds_up_its_fiber_only", 2, || {
        let _server = NameServer::start();
        run(|| {
            let (longest, ticks) = ticks_beside(|| {
                assert_eq!(v4("a.dead.test"), Err(gai(EAI_AGAIN)));
            });
            assert!(longest < Duration::from_secs(1), "a pause of {longest:?}");
            assert!(ticks > 20, "{ticks} ticks");
        });
        assert_eq!(v4("b.dead.test"), Err(gai(EAI_AGAIN)));
    });
}

#[test]
fn a_timeout_ends_the_wait_for_a_name() {
    with_own_names("a_timeout_ends_the_wait_for_a_name", 10, || {
        let _server = NameServer::start();
        let test = || {
            let start = Instant::now();
            let waited = timeout(0.1, || v4("a.dead.test"));
            assert_eq!(waited, Err(Error::Timeout));
            let client = ringsock::socket(AF_INET, SOCK_STREAM)?;
            let waited = timeout(0.1, || client.connect(("b.dead.test", 80)));
            assert_eq!(waited, Err(Error::Timeout));
            let elapsed = start.elapsed();
            assert!(elapsed >= Duration::from_millis(199), "{elapsed:?}");
            assert!(elapsed < Duration::from_secs(5), "{elapsed:?}");
            // The lookups go on, and leave room for others.
            assert_eq!(gethostbyname("a.quick.test")?, "127.0.0.9");
            Ok::<(), Error>(())
        };
        test().unwrap();
        // The four threads are taken now: a lookup waits in the queue, too, no longer than its timeout.
        run(move || {
            let waiting = [spawn(|| v4("c.dead.test")), spawn(|| v4("d.dead.test"))];
            ringsock::yield_now();
            let queued = timeout(0.1, || v4("e.quick.test"));
            assert_eq!(queued, Err(Error::Timeout));
            // A numeric host and what has a name here in the kernel need no thread.
            assert_eq!(hosts(v4("127.0.0.1")), ["127.0.0.1"]);
            for waiting in waiting {
                waiting.cancel();
                assert_eq!(waiting.join().unwrap(), Err(Error::Cancelled));
            }
        });
    });
}

#[test]
fn lookups_have_four_threads_and_a_queue_that_refuses() {
    with_own_names(
        "lookups_have_four_threads_and_a_queue_that_refuses",
        30,
        || {
            let server = NameServer::start();
            run(move || {
                let ask = |n| spawn(move || v4(&format!("n{n}.gated.test")));
                let mut lookups: Vec<_> = (0..4).map(ask).collect();
                while server.waiting() < 4 {
                    sleep(0.001).unwrap();
                }
                assert_eq!(lookup_threads(), 4);
                let asked = Rc::new(Cell::new(0));
                lookups.extend((0..1024).map(|n| {
                    let asked = asked.clone();
                    spawn(move || {
                        // Nothing suspends this fiber between here and the queue.
                        asked.set(asked.get() + 1);
                        v4(&format!("queued{n}.gated.test"))
                    })
                }));
                while asked.get() < 1024 {
                    ringsock::yield_now();
                }
                // One too many.
                let late = timeout(5, || v4("late.gated.test"));
                assert_eq!(late, Err(gai(EAI_AGAIN)));
                assert_eq!(getservbyname("http", None), Err(gai(EAI_AGAIN)));
                assert!(lookups.iter().all(|lookup| !lookup.is_finished()));
                sleep(0.1).unwrap();
                assert_eq!(server.waiting(), 4, "one lookup at a time per thread");
                server.open();
                for lookup in lookups {
                    assert_eq!(hosts(lookup.join().unwrap()), ["127.0.0.9"]);
                }
                assert_eq!(lookup_threads(), 4);
                assert_eq!(hosts(v4("late.gated.test")), ["127.0.0.9"]);
            });
        },
    );
}

#[test]
fn more_threads_run_more_lookups() {
    with_own_names("more_threads_run_more_lookups", 30, || {
        let server = NameServer::start();
        set_lookup_threads(7);
        run(move || {
            let lookups: Vec<_> = (0..10)
                .map(|n| spawn(move || v4(&format!("n{n}.gated.test"))))
                .collect();
            while server.waiting() < 7 {
                sleep(0.001).unwrap();
            }
            assert_eq!(lookup_threads(), 7);
            server.open();
            for lookup in lookups {
                assert_eq!(hosts(lookup.join().unwrap()), ["127.0.0.9"]);
            }
        });
    });
}

#[test]
fn cancelling_a_fiber_ends_its_wait_for_a_name() {
    with_own_names("cancelling_a_fiber_ends_its_wait_for_a_name", 10, || {
        let server = NameServer::start();
        let start = Instant::now();
        run(move || {
            let waiting = spawn(|| v4("a.gated.test"));
            let detached = spawn(|| v4("b.gated.test"));
            while server.waiting() < 2 {
                sleep(0.001).unwrap();
            }
            waiting.cancel();
            assert_eq!(waiting.join().unwrap(), Err(Error::Cancelled));
            // The runtime does not wait for the other's lookup.
            detached.cancel();
        });
        assert!(start.elapsed() < Duration::from_secs(8));
    });
}

#[test]
fn numbers_are_not_looked_up() {
    alone("numbers_are_not_looked_up", || {
        let numbers = || {
            for host in [
                "127.0.0.1",
                "::1",
                "127.1",
                "fe80::1%lo",
                "::ffff:127.0.0.1",
            ] {
                assert_eq!(getaddrinfo(host, 80).unwrap().len(), 3);
                assert_eq!(getaddrinfo(host, "80").unwrap().len(), 3);
            }
            assert!(getaddrinfo(None, 80).is_ok());
            assert_eq!(getaddrinfo("", 80), Err(gai(EAI_NONAME)));
            assert_eq!(gethostbyname("127.1").unwrap(), "127.0.0.1");
            assert!(getnameinfo(("::1", 80), NI_NUMERICHOST | NI_NUMERICSERV).is_ok());
            let socket = ringsock::socket(AF_INET, SOCK_DGRAM).unwrap();
            socket.bind(("", 0)).unwrap();
            socket.connect(("127.1", 9)).unwrap();
            let server = create_server(("127.0.0.1", 0)).unwrap();
            create_connection(("127.0.0.1", server.getsockname().unwrap().port().unwrap()))
                .unwrap();
        };
        numbers();
        run(numbers);
        assert_eq!(lookup_threads(), 0);
        assert_eq!(gethostbyname("localhost").unwrap(), "127.0.0.1");
        assert_eq!(lookup_threads(), 1);
    });
}

#[test]
fn a_forked_child_looks_up_names_itself() {
    alone("a_forked_child_looks_up_names_itself", || {
        assert_eq!(gethostbyname("localhost").unwrap(), "127.0.0.1");
        eventually("its thread waits", || lookup_threads() == 1);
        let code = fork(|| {
            let there = gethostbyname("localhost").as_deref() == Ok("127.0.0.1");
            let in_fiber = run(|| gethostbyname("localhost").is_ok());
            i32::from(!there || !in_fiber)
        });
        assert_eq!(code, 0);
        assert_eq!(gethostbyname("localhost").unwrap(), "127.0.0.1");
    });
}

#[test]
fn a_lookup_in_a_destructor_of_a_panicking_fiber_does_not_wait() {
    alone(
        "a_lookup_in_a_destructor_of_a_panicking_fiber_does_not_wait",
        || {
            struct Looks(mpsc::Sender<Result<String>>);
            impl Drop for Looks {
                fn drop(&mut self) {
                    self.0.send(gethostbyname("localhost")).unwrap();
                }
            }
            let (sender, results) = mpsc::channel();
            run(move || {
                let panics = spawn(move || {
                    let _looks = Looks(sender);
                    panic!("on purpose");
                });
                assert!(panics.join().is_err());
            });
            // Found, if the thread was faster.
            let result = results.recv().unwrap();
            assert!(
                result.is_ok() || result == Err(gai(EAI_AGAIN)),
                "{result:?}"
            );
        },
    );
}

// Module functions.

#[test]
fn new_sockets_start_with_the_default_timeout() {
    alone("new_sockets_start_with_the_default_timeout", || {
        let nonblocking = |fd: &dyn AsRawFd| {
            // SAFETY: no memory is passed.
            unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) & libc::O_NONBLOCK != 0 }
        };
        assert_eq!(getdefaulttimeout(), None);
        let server = create_server(("127.0.0.1", 0)).unwrap();
        let address = server.getsockname().unwrap();
        let old = ringsock::socket(AF_INET, SOCK_STREAM).unwrap();
        for default in [Some(5.5), Some(0.0), None] {
            setdefaulttimeout(default).unwrap();
            assert_eq!(getdefaulttimeout(), default);
            let is_as_default = |socket: &Socket| {
                assert_eq!(socket.gettimeout(), default, "{socket:?}");
                assert_eq!(nonblocking(socket), default.is_some(), "{socket:?}");
            };
            let socket = ringsock::socket(AF_INET, SOCK_STREAM).unwrap();
            is_as_default(&socket);
            let (left, right) = socketpair().unwrap();
            is_as_default(&left);
            is_as_default(&right);
            let client = ringsock::socket(AF_INET, SOCK_STREAM).unwrap();
            client.settimeout(None).unwrap();
            client.connect(&address).unwrap();
            is_as_default(&server.accept().unwrap().0);
            let other = ringsock::socket(AF_INET, SOCK_DGRAM).unwrap();
            other.settimeout(None).unwrap();
            is_as_default(&ringsock::fromfd(&other, AF_INET, SOCK_DGRAM, 0).unwrap());
            other.settimeout(None).unwrap();
            // A duplicate object takes its original's timeout, and leaves the file they share alone.
            assert_eq!(other.dup().unwrap().gettimeout(), None);
            assert!(!nonblocking(&other));
            is_as_default(&Socket::from_fd(other.detach().unwrap()).unwrap());
            let kind = SOCK_STREAM | SOCK_NONBLOCK;
            let socket = ringsock::socket(AF_INET, kind).unwrap();
            assert_eq!(socket.gettimeout(), Some(0.0));
            assert!(nonblocking(&socket));
            assert_eq!(old.gettimeout(), None);
        }
        for wrong in [-1.0, f64::NAN, f64::INFINITY] {
            setdefaulttimeout(wrong).unwrap_err();
        }
        assert_eq!(getdefaulttimeout(), None);
        setdefaulttimeout(0.01).unwrap();
        let (left, _right) = socketpair().unwrap();
        assert_eq!(left.recv(1), Err(Error::Timeout));
    });
}

#[test]
fn descriptors_are_checked_duplicated_and_closed() {
    let (reader, _writer) = std::io::pipe().unwrap();
    let error = ringsock::fromfd(&reader, AF_UNIX, SOCK_STREAM, 0).unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENOTSOCK));
    let (left, right) = socketpair().unwrap();
    let other: ringsock::SocketType = ringsock::fromfd(&left, AF_UNIX, SOCK_STREAM, 0).unwrap();
    assert_ne!(other.fileno(), left.fileno());
    let third: OwnedFd = ringsock::dup(&left).unwrap();
    drop((left, other));
    ringsock::close(third).unwrap();
    assert_eq!(right.recv(1).unwrap(), b"");
}
