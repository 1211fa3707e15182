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
use ringsock::getaddrinfo_with;
use ringsock::prelude::*;

const HOST: Option<&str> = None; // Symbolic name meaning all available interfaces
const PORT: u16 = 50007; // Arbitrary non-privileged port

fn main() -> ringsock::Result<()> {
    let mut s = None;
    for res in getaddrinfo_with(HOST, PORT, AF_UNSPEC, SOCK_STREAM, 0, AI_PASSIVE)? {
        let Ok(socket) = Socket::new(res.family, res.kind, res.proto) else {
            continue;
        };
        if socket
            .bind(res.sockaddr)
            .and_then(|()| socket.listen(1))
            .is_err()
        {
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
