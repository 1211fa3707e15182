//! The fourth example of Python's socket page, line for line:
//!
//! ```python
//! # Echo client program
//! import socket
//! import sys
//!
//! HOST = 'daring.cwi.nl'    # The remote host
//! PORT = 50007              # The same port as used by the server
//! s = None
//! for res in socket.getaddrinfo(HOST, PORT, socket.AF_UNSPEC, socket.SOCK_STREAM):
//!     af, socktype, proto, canonname, sa = res
//!     try:
//!         s = socket.socket(af, socktype, proto)
//!     except socket.error as msg:
//!         s = None
//!         continue
//!     try:
//!         s.connect(sa)
//!     except socket.error as msg:
//!         s.close()
//!         s = None
//!         continue
//!     break
//! if s is None:
//!     print 'could not open socket'
//!     sys.exit(1)
//! s.sendall('Hello, world')
//! data = s.recv(1024)
//! s.close()
//! print 'Received', repr(data)
//! ```

// Echo client program
use ringsock::prelude::*;

const PORT: u16 = 50007; // The same port as used by the server

/// What the name resolution answers for this host, and it is the remote host: `localhost`.
fn addresses() -> Vec<(Family, Kind, i32, Address)> {
    let local = |family, host| {
        let sa = (host, PORT).to_address(family).expect("a numeric address");
        (family, SOCK_STREAM, IPPROTO_TCP, sa)
    };
    vec![local(AF_INET6, "::1"), local(AF_INET, "127.0.0.1")]
}

fn main() -> ringsock::Result<()> {
    let mut s = None;
    for (af, socktype, proto, sa) in addresses() {
        let Ok(socket) = Socket::new(af, socktype, proto) else {
            continue;
        };
        if socket.connect(sa).is_err() {
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
    s.sendall(b"Hello, world")?;
    let data = s.recv(1024)?;
    s.close()?;
    println!("Received {data:?}");
    Ok(())
}
