use ringsock::prelude::*;

fn main() -> ringsock::Result<()> {
    ringsock::run(|| {
        let server = Socket::new(AF_INET, SOCK_STREAM, 0)?;
        server.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)?;
        server.bind(("", 50007))?;
        server.listen(1024)?;
        loop {
            let (conn, _peer) = server.accept()?;
            ringsock::spawn(move || {
                conn.settimeout(30.0)?;
                let mut buf = [0u8; 4096];
                loop {
                    let n = conn.recv_into(&mut buf)?;
                    if n == 0 {
                        return Ok::<(), Error>(());
                    }
                    conn.sendall(&buf[..n])?;
                }
            });
        }
    })
}
