//! The feature `tracing`: one event for each operation of a socket, with its name, descriptor, bytes and outcome; in a fiber the
//! events of one never land inside a span of another.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use ringsock::prelude::*;
use ringsock::{run, socketpair, spawn, yield_now};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Keeps the fields of each event of this crate.
#[derive(Clone, Default)]
struct Listener(Arc<Mutex<Vec<BTreeMap<&'static str, String>>>>);

struct Fields(BTreeMap<&'static str, String>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }
}

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "ringsock" && *metadata.level() == Level::TRACE
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        panic!("a span: it would be entered on a thread that runs other fibers")
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields(BTreeMap::new());
        event.record(&mut fields);
        self.0.lock().unwrap().push(fields.0);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// What is told while `body` runs: operation, descriptor, bytes and outcome of each.
fn told(body: impl FnOnce()) -> Vec<(String, String, String, String)> {
    let listener = Listener::default();
    tracing::subscriber::with_default(listener.clone(), body);
    let events = listener.0.lock().unwrap().clone();
    let field = |event: &BTreeMap<_, String>, name| event.get(name).cloned().unwrap_or_default();
    events
        .iter()
        .map(|event| {
            let field = |name| field(event, name);
            (
                field("operation"),
                field("fd"),
                field("bytes"),
                field("outcome"),
            )
        })
        .collect()
}

fn row(operation: &str, fd: i32, bytes: &str, outcome: &str) -> (String, String, String, String) {
    let text = str::to_owned;
    (text(operation), fd.to_string(), text(bytes), text(outcome))
}

fn operations() {
    let (left, right) = socketpair().unwrap();
    let (l, r) = (left.fileno(), right.fileno());
    let events = told(|| {
        left.sendall(b"hello").unwrap();
        right.recv_into(&mut [0; 3]).unwrap();
        right.recv(3).unwrap();
        right.send(b"ok").unwrap();
        left.recvfrom(8).unwrap();
        right.setblocking(false).unwrap();
        right.recv(3).unwrap_err();
        left.shutdown(SHUT_WR).unwrap();
        left.close().unwrap();
        left.recv(1).unwrap_err();
    });
    let expected = [
        row("sendall", l, "5", "ok"),
        row("recv", r, "3", "ok"),
        row("recv", r, "2", "ok"),
        row("send", r, "2", "ok"),
        row("recvfrom", l, "2", "ok"),
        row("recv", r, "", "[Errno 11] Resource temporarily unavailable"),
        row("shutdown", l, "", "ok"),
        row("close", l, "", "ok"),
        row("recv", l, "", "[Errno 9] Bad file descriptor"),
    ];
    assert_eq!(events, expected);
}

#[test]
fn each_operation_is_told_once_with_its_outcome() {
    operations();
    run(operations);
}

#[test]
fn a_connection_is_told_from_both_sides() {
    let server = ringsock::create_server(("127.0.0.1", 0)).unwrap();
    let client = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    let (s, c) = (server.fileno(), client.fileno());
    let events = told(|| {
        client.connect(server.getsockname().unwrap()).unwrap();
        server.accept().unwrap();
        server.settimeout(0.001).unwrap();
        server.accept().unwrap_err();
    });
    let expected = [
        row("connect", c, "", "ok"),
        row("accept", s, "", "ok"),
        row("accept", s, "", "timed out"),
    ];
    assert_eq!(events, expected);
}

#[test]
fn an_operation_that_waits_is_told_when_it_ends() {
    run(|| {
        let (left, right) = socketpair().unwrap();
        let (l, r) = (left.fileno(), right.fileno());
        let events = told(|| {
            let receiver = spawn(move || right.recv(16).unwrap());
            yield_now();
            left.sendall(b"late").unwrap();
            assert_eq!(receiver.join().unwrap(), b"late");
        });
        let expected = [row("sendall", l, "4", "ok"), row("recv", r, "4", "ok")];
        assert_eq!(events, expected);
    });
}
