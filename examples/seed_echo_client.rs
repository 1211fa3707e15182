//! The second example of Python's socket page, line for line:
//!
//! ```python
//! # Echo client program
//! import socket
//!
//! HOST = 'daring.cwi.nl'    # The remote host
//! PORT = 50007              # The same port as used by the server
//! s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
//! s.connect((HOST, PORT))
//! s.sendall('Hello, world')
//! data = s.recv(1024)
//! s.close()
//! print 'Received', repr(data)
//! ```

// Echo client program
use ringsock::prelude::*;

const HOST: &str = "127.0.0.1"; // The remote host
const PORT: u16 = 50007; // The same port as used by the server

fn main() -> ringsock::Result<()> {
    let s = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    s.connect((HOST, PORT))?;
    s.sendall(b"Hello, world")?;
    let data = s.recv(1024)?;
    s.close()?;
    println!("Received {data:?}");
    Ok(())
}
