//! The programs of Python's socket page that need more than an echo: dual stack, the sniffer, the address in TIME_WAIT. Each
//! against Python's own program, both ways. (The first two programs of the page are in `tests/examples.rs`.)
#![allow(unsafe_code)]

mod support;

use std::process::Command;

use ringsock::prelude::*;
use support::{Network, Process, eventually, example, has_python};

const PORT: u16 = 50007;

/// States of TCP sockets, as the kernel numbers them.
const LISTEN: u8 = 10;
const TIME_WAIT: u8 = 6;

/// A program of the page, ours or Python's.
#[derive(Clone, Copy, PartialEq)]
enum By {
    Ringsock,
    Python,
}

fn command(network: &Network, name: &str, by: By) -> Command {
    match by {
        By::Ringsock => network.command(example(name)),
        By::Python => {
            let mut command = network.command("python3");
            command.arg(format!(
                "{}/tests/python/{name}.py",
                env!("CARGO_MANIFEST_DIR")
            ));
            command
        }
    }
}

fn start(network: &Network, name: &str, by: By) -> Process {
    Process::start(&mut command(network, name, by), b"").expect("the program starts")
}

/// The server listens on 0.0.0.0, the first address the name resolution has for it; the client tries ::1 first, is refused, and
/// goes on to the next address.
fn the_dual_stack_programs_meet(server: By, client: By) {
    if (server == By::Python || client == By::Python) && !has_python() {
        return;
    }
    let Some(network) = Network::new() else {
        return;
    };
    let mut server_process = start(&network, "dual_stack_server", server);
    eventually("the server listens", || {
        assert!(server_process.is_running(), "the server ended early");
        network.sockets(PORT, LISTEN) == 1
    });
    // The port is taken in both families now, so that no address is left for a second server.
    let second = start(&network, "dual_stack_server", server).wait();
    assert_eq!(second.status.code(), Some(1), "{second:?}");
    assert_eq!(second.stdout, b"could not open socket\n");

    let finished = start(&network, "dual_stack_client", client).wait();
    assert!(finished.status.success(), "{finished:?}");
    let received: &[u8] = match client {
        By::Ringsock => b"Received b\"Hello, world\"\n",
        By::Python => b"Received b'Hello, world'\n",
    };
    assert_eq!(finished.stdout, received, "{finished:?}");
    let finished = server_process.wait();
    assert!(finished.status.success(), "{finished:?}");
    let connected: &[u8] = match server {
        By::Ringsock => b"Connected by 127.0.0.1:",
        By::Python => b"Connected by ('127.0.0.1', ",
    };
    assert!(finished.stdout.starts_with(connected), "{finished:?}");
    assert!(finished.stderr.is_empty(), "{finished:?}");
}

#[test]
fn the_dual_stack_programs_work_with_each_other() {
    the_dual_stack_programs_meet(By::Ringsock, By::Ringsock);
}

#[test]
fn the_dual_stack_server_works_with_pythons_client() {
    the_dual_stack_programs_meet(By::Ringsock, By::Python);
}

#[test]
fn the_dual_stack_client_works_with_pythons_server() {
    the_dual_stack_programs_meet(By::Python, By::Ringsock);
}

#[test]
fn the_dual_stack_client_gives_up_where_nobody_listens() {
    let Some(network) = Network::new() else {
        return;
    };
    let finished = start(&network, "dual_stack_client", By::Ringsock).wait();
    assert_eq!(finished.status.code(), Some(1), "{finished:?}");
    assert_eq!(finished.stdout, b"could not open socket\n");
}

/// The loopback shows every packet twice, on its way out and on its way in. Both sniffers listen at once, to the same packets.
#[test]
fn the_sniffer_sees_what_pythons_sees() {
    let Some(network) = Network::new() else {
        return;
    };
    let mut ours = command(&network, "sniffer", By::Ringsock);
    let ours = Process::start(ours.args(["--interface", "lo", "--count", "2"]), b"");
    let mut sniffers = vec![(By::Ringsock, ours.expect("the program starts"))];
    if has_python() {
        sniffers.push((By::Python, start(&network, "sniffer", By::Python)));
    }
    for (_, sniffer) in &mut sniffers {
        assert_eq!(sniffer.line().trim_end(), "sniffing on lo");
    }
    let datagram = "printf 'sniff me' > /dev/udp/127.0.0.1/9";
    let sent = network.command("bash").args(["-c", datagram]).status();
    assert!(sent.expect("bash").success());
    for (by, sniffer) in sniffers {
        let finished = sniffer.wait();
        assert!(finished.status.success(), "{finished:?}");
        let text = String::from_utf8_lossy(&finished.stdout).into_owned();
        let is_packet = |line: &&str| !line.starts_with("sniffing on");
        let packets: Vec<_> = text.lines().filter(is_packet).collect();
        assert_eq!(packets.len(), 2, "{finished:?}");
        // Ethernet's header, of zeros on the loopback, IPv4's protocol number, and the start of IPv4's header.
        let (header, payload, way) = match by {
            By::Ringsock => (
                format!("(b\"{}\\x08\\x00E\\x00\\x00$", "\\x00".repeat(12)),
                "sniff me\", packet:1:0x0800:00:00:00:00:00:00)",
                ["", ""],
            ),
            By::Python => (
                format!("(b'{}\\x08\\x00E\\x00\\x00$", "\\x00".repeat(12)),
                "sniff me', ('lo', 2048, ",
                ["4, 772", "0, 772"],
            ),
        };
        for (packet, way) in packets.iter().zip(way) {
            // Python quotes otherwise if one of the bytes, of the port or of a checksum, is a quotation mark.
            let packet = match by {
                By::Ringsock => (*packet).to_owned(),
                By::Python => packet.replace('"', "'"),
            };
            assert!(packet.starts_with(&header), "{packet}");
            assert!(packet.contains(&format!("{payload}{way}")), "{packet}");
        }
    }
}

/// In a user namespace of its own a program has every privilege, but none over the network outside.
#[test]
fn the_sniffer_says_what_it_lacks() {
    let mut command = Command::new("unshare");
    command.args(["--user", "true"]);
    match command.output() {
        Ok(output) if output.status.success() => {}
        other => {
            println!("skipped: no user namespace of its own: {other:?}");
            return;
        }
    }
    let mut command = Command::new("unshare");
    command.arg("--user").arg(example("sniffer"));
    let finished = support::run(&mut command, b"");
    assert_eq!(finished.status.code(), Some(1), "{finished:?}");
    assert_eq!(
        finished.stderr,
        "sniffer: lo: [Errno 1] Operation not permitted: it takes root, or the privilege CAP_NET_RAW\n"
    );
}

#[test]
fn the_sniffer_names_an_interface_that_is_not_there() {
    let finished = support::run_example("sniffer", ["--interface", "no such if"]);
    assert_eq!(finished.status.code(), Some(1), "{finished:?}");
    assert_eq!(
        finished.stderr,
        "sniffer: no such if: [Errno 19] No such device\n"
    );
}

/// The page's last words: an address whose connection lingers in TIME_WAIT is refused, but not under SO_REUSEADDR. The earlier
/// run must have had the flag too: Linux asks both sides.
#[test]
fn an_address_in_time_wait_is_free_under_so_reuseaddr() {
    let server = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    server.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1).unwrap();
    server.bind(("127.0.0.1", 0)).unwrap();
    server.listen(1).unwrap();
    let address = server.getsockname().unwrap();
    let client = std::net::TcpStream::connect(address.as_socket_addr().unwrap()).unwrap();
    let (conn, _) = server.accept().unwrap();
    server.close().unwrap();
    // Who closes first lingers.
    conn.close().unwrap();
    drop(client);
    let port = format!(":{:04X}", address.port().unwrap());
    eventually("the connection is in TIME_WAIT", || {
        let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
        table.lines().skip(1).any(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            fields[1].ends_with(&port) && fields[3] == format!("{TIME_WAIT:02X}")
        })
    });
    let again = Socket::new(AF_INET, SOCK_STREAM, 0).unwrap();
    assert_eq!(again.bind(&address).unwrap_err().errno(), Some(98));
    again.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1).unwrap();
    again.bind(&address).unwrap();
    again.listen(1).unwrap();
}
