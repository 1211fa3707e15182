//! The proxy's counters and its runtime's, for Prometheus: `GET /metrics` over HTTP/1.1, one request a connection.
//!
//! Whoever asks is not trusted: a connection has [`TOTAL`] for all it does, a request has [`REQUEST_BYTES`], and there are as many
//! connections at a time as there are fibers here. Others wait in the backlog.

use std::fmt::Write;

use ringsock::prelude::*;
use ringsock::{Handle, Metrics, sleep};

/// Connections at a time.
pub const CONNECTIONS: usize = 8;

/// Seconds from a connection's accept to its end.
const TOTAL: f64 = 5.0;

/// The longest request, with its headers.
const REQUEST_BYTES: usize = 8192;

/// How many bytes more than its request a client may have sent and still be sure to get its answer.
const SURPLUS_BYTES: usize = 64 << 10;

/// Seconds until the next try when there are no descriptors.
const PAUSE: f64 = 0.1;

/// The text format's version that a page is in.
const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Serves one connection after the other, each with what `page` makes then, until the runtime ends.
pub fn serve(listener: &Socket, page: impl Fn() -> String) {
    loop {
        match listener.accept() {
            // A client that broke is its own affair.
            Ok((client, _)) => {
                let _ = ringsock::timeout(TOTAL, || answer(&client, &page));
            }
            Err(Error::Cancelled | Error::Shutdown) => return,
            Err(error) if error.errno() == Some(libc::ECONNABORTED) => {}
            Err(_) => {
                if sleep(PAUSE).is_err() {
                    return;
                }
            }
        }
    }
}

fn answer(client: &Socket, page: &impl Fn() -> String) -> ringsock::Result<()> {
    let mut request = [0; REQUEST_BYTES];
    let length = receive_request(client, &mut request)?;
    let response = response(&request[..length], page);
    client.sendall(response.as_bytes())?;
    client.shutdown(SHUT_WR)?;
    // Closing while some of the client's bytes are unread would be a reset, which destroys what is on its way to the client.
    let mut left = SURPLUS_BYTES;
    while left > 0 {
        match client.recv_into(&mut request)? {
            0 => break,
            n => left = left.saturating_sub(n),
        }
    }
    Ok(())
}

/// Receives to the end of the headers, or of what there is room for, or of the stream: how much that was.
fn receive_request(client: &Socket, request: &mut [u8]) -> ringsock::Result<usize> {
    let mut length = 0;
    while length < request.len() && !is_whole(&request[..length]) {
        match client.recv_into(&mut request[length..])? {
            0 => break,
            n => length += n,
        }
    }
    Ok(length)
}

fn is_whole(request: &[u8]) -> bool {
    let ends_at = |end: &[u8]| request.windows(end.len()).any(|window| window == end);
    ends_at(b"\r\n\r\n") || ends_at(b"\n\n")
}

/// The answer to a request, with its body unless only the head was asked for.
fn response(request: &[u8], page: &impl Fn() -> String) -> String {
    let line = request.split(|&byte| byte == b'\n').next();
    let line = std::str::from_utf8(line.unwrap_or_default()).unwrap_or_default();
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let (status, body, head_only) = match words[..] {
        _ if !is_whole(request) && request.len() >= REQUEST_BYTES => {
            ("431 Request Header Fields Too Large", String::new(), false)
        }
        _ if !is_whole(request) => ("400 Bad Request", String::new(), false),
        [method, target, version] if version.starts_with("HTTP/1.") => {
            let path = target.split('?').next().unwrap_or_default();
            match (method, path) {
                ("GET", "/metrics") => ("200 OK", page(), false),
                ("HEAD", "/metrics") => ("200 OK", page(), true),
                ("GET" | "HEAD", _) => ("404 Not Found", String::new(), false),
                _ => ("405 Method Not Allowed", String::new(), false),
            }
        }
        _ => ("400 Bad Request", String::new(), false),
    };
    let mut text = format!("HTTP/1.1 {status}\r\n");
    if status.starts_with("405") {
        text += "Allow: GET, HEAD\r\n";
    }
    let _ = write!(
        text,
        "Content-Type: {CONTENT_TYPE}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    if !head_only {
        text += &body;
    }
    text
}

/// Whether a value can fall.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    Counter,
    Gauge,
}

/// A page in the text format.
///
/// Source: Prometheus, "Exposition formats", the text-based format.
#[derive(Default)]
pub struct Page(String);

impl Page {
    /// Begins a family. A counter's name ends in `_total`.
    pub fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// One value of the family, and the label that tells it from the others.
    pub fn sample(&mut self, name: &str, label: Option<(&str, &str)>, value: u64) {
        let _ = match label {
            None => writeln!(self.0, "{name} {value}"),
            Some((key, text)) => {
                let text = text
                    .replace('\\', "\\\\")
                    .replace('"', "\\\"")
                    .replace('\n', "\\n");
                writeln!(self.0, "{name}{{{key}=\"{text}\"}} {value}")
            }
        };
    }

    /// A family of one value.
    pub fn value(&mut self, name: &str, kind: Kind, help: &str, value: u64) {
        self.family(name, kind, help);
        self.sample(name, None, value);
    }

    /// What each worker of the runtime counts.
    pub fn runtime(&mut self, handle: &Handle) {
        let workers = handle.metrics();
        for (name, kind, help, pick) in RUNTIME {
            let total = if kind == Kind::Counter { "_total" } else { "" };
            let name = format!("ringsock_{name}{total}");
            self.family(&name, kind, help);
            for (worker, metrics) in workers.iter().enumerate() {
                let worker = worker.to_string();
                self.sample(&name, Some(("worker", &worker)), pick(metrics));
            }
        }
    }

    pub fn text(self) -> String {
        self.0
    }
}

type Pick = fn(&Metrics) -> u64;

/// The fields of [`Metrics`].
const RUNTIME: [(&str, Kind, &str, Pick); 15] = {
    use self::Kind::{Counter, Gauge};
    [
        (
            "operations",
            Counter,
            "Operations given to the ring.",
            |m| m.operations,
        ),
        ("enters", Counter, "Calls of io_uring_enter.", |m| m.enters),
        (
            "enters_interrupted",
            Counter,
            "Calls of io_uring_enter that a signal interrupted.",
            |m| m.enters_interrupted,
        ),
        (
            "enters_refused",
            Counter,
            "Calls of io_uring_enter that were refused for want of memory or room.",
            |m| m.enters_refused,
        ),
        ("sqes", Counter, "Submission queue entries written.", |m| {
            m.sqes
        }),
        ("cqes", Counter, "Completion queue entries read.", |m| {
            m.cqes
        }),
        (
            "sq_full",
            Counter,
            "Times the submission queue was full.",
            |m| m.sq_full,
        ),
        (
            "cq_overflows",
            Counter,
            "Times the completion queue overflowed.",
            |m| m.cq_overflows,
        ),
        (
            "cqes_unknown",
            Counter,
            "Completions that nobody waited for.",
            |m| m.cqes_unknown,
        ),
        (
            "messages_failed",
            Counter,
            "Messages to other rings replaced by an eventfd.",
            |m| m.messages_failed,
        ),
        ("switches", Counter, "Times a fiber was switched in.", |m| {
            m.switches
        }),
        ("fibers_spawned", Counter, "Fibers ever made.", |m| {
            m.fibers_spawned
        }),
        ("fibers_live", Gauge, "Fibers that have not ended.", |m| {
            m.fibers_live
        }),
        (
            "fibers_lost",
            Gauge,
            "Fibers that could not be ended at shutdown.",
            |m| m.fibers_lost,
        ),
        ("in_flight", Gauge, "Operations and waits under way.", |m| {
            m.in_flight
        }),
    ]
};
