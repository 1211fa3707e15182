//! The first example of Python's socket page, line for line:
//!
//! ```python
//! # Echo server program
//! import socket
//!
//! HOST = ''                 # Symbolic name meaning all available interfaces
//! PORT = 50007              # Arbitrary non-privileged port
//! s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
//! s.bind((HOST, PORT))
//! s.listen(1)
//! conn, addr = s.accept()
//! print 'Connected by', addr
//! while 1:
//!     data = conn.recv(1024)
//!     if not data: break
//!     conn.sendall(data)
//! conn.close()
//! ```

// Echo server program
use ringsock::prelude::*;

const HOST: &str = ""; // Symbolic name meaning all available interfaces
const PORT: u16 = 50007; // Arbitrary non-privileged port

fn main() -> ringsock::Result<()> {
    let s = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    s.bind((HOST, PORT))?;
    s.listen(1)?;
    let (conn, addr) = s.accept()?;
    println!("Connected by {addr}");
    loop {
        let data = conn.recv(1024)?;
        if data.is_empty() {
            break;
        }
        conn.sendall(&data)?;
    }
    conn.close()
}
