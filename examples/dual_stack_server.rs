//! The third example of Python's socket page, line for line:
//!
//! ```python
//! # Echo server program
//! import socket
//! import sys
//!
//! HOST = None               # Symbolic name meaning all available interfaces
//! PORT = 50007              # Arbitrary non-privileged port
//! s = None
//! for res in socket.getaddrinfo(HOST, PORT, socket.AF_UNSPEC,
//!                               socket.SOCK_STREAM, 0, socket.AI_PASSIVE):
//!     af, socktype, proto, canonname, sa = res
//!     try:
//!         s = socket.socket(af, socktype, proto)
//!     except socket.error as msg:
//!         s = None
//!         continue
//!     try:
//!         s.bind(sa)
//!         s.listen(1)
//!     except socket.error as msg:
//!         s.close()
//!         s = None
//!         continue
//!     break
//! if s is None:
//!     print 'could not open socket'
//!     sys.exit(1)
//! conn, addr = s.accept()
//! print 'Connected by', addr
//! while 1:
//!     data = conn.recv(1024)
//!     if not data: break
//!     conn.send(data)
//! conn.close()
//! ```
//!
//! As the page says, it listens on the first family that works, not on both: `create_server_with(address, CreateServer {
//! dualstack_ipv6: true, .. })` does.

// Echo server program
use ringsock::prelude::*;

const PORT: u16 = 50007; // Arbitrary non-privileged port

/// What the name resolution answers for the host `None`: all available interfaces.
fn addresses() -> Vec<(Family, Kind, i32, Address)> {
    let any = |family, host| {
        let sa = (host, PORT).to_address(family).expect("a numeric address");
        (family, SOCK_STREAM, IPPROTO_TCP, sa)
    };
    vec![any(AF_INET, "0.0.0.0"), any(AF_INET6, "::")]
}

fn main() -> ringsock::Result<()> {
    let mut s = None;
    for (af, socktype, proto, sa) in addresses() {
        let Ok(socket) = Socket::new(af, socktype, proto) else {
            continue;
        };
        if socket.bind(sa).and_then(|()| socket.listen(1)).is_err() {
            socket.close()?;
            continue;
        }
        s = Some(socket);
        break;
    }
    let Some(s) = s else {
        println!("could not open socket");
        std::process::exit(1);
    };
    let (conn, addr) = s.accept()?;
    println!("Connected by {addr}");
    loop {
        let data = conn.recv(1024)?;
        if data.is_empty() {
            break;
        }
        conn.send(&data)?;
    }
    conn.close()
}
