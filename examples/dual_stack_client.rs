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
use ringsock::getaddrinfo_with;
use ringsock::prelude::*;

const HOST: &str = "localhost"; // The remote host
const PORT: u16 = 50007; // The same port as used by the server

fn main() -> ringsock::Result<()> {
    let mut s = None;
    for res in getaddrinfo_with(HOST, PORT, AF_UNSPEC, SOCK_STREAM, 0, 0)? {
        let Ok(socket) = Socket::new(res.family, res.kind, res.proto) else {
            continue;
        };
        if socket.connect(res.sockaddr).is_err() {
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
