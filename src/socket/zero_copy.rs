//! Sends of large buffers that were given away: without a copy where the peer is another machine.
//!
//! What a socket knows of its peer is found once, at the first such send. Whether a send then goes without a copy, and what becomes of its
//! buffer, is decided in `fiber/pin.rs`; here are the mode, the deadline, and what is left to the ordinary way.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use super::{BY_OPTION, NON_BLOCKING, Socket, transferred};
use crate::buf::Buf;
use crate::constants::{AF_INET, AF_INET6};
use crate::error::{Error, Result};
use crate::fiber;
use crate::fiber::inflight::Direction;
use crate::fiber::pin::{self, Connection};
use crate::fiber::route::{Route, ZeroCopy};

/// What a socket's sends without a copy have in common.
pub(super) struct Peer {
    /// On this machine, where everything is copied.
    is_local: bool,
    connection: Arc<Connection>,
}

/// Whether packets between the two addresses never leave this machine.
fn is_local(from: IpAddr, to: IpAddr) -> bool {
    let (from, to) = (from.to_canonical(), to.to_canonical());
    // 127/8 and ::1, an address of this machine on both ends, and the one that stands for it.
    to.is_loopback() || from.is_loopback() || from == to || to == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
}

impl Socket {
    /// `None` while it is not connected, or is of a family that has no such sends.
    fn zero_copy_peer(&self) -> Option<&Peer> {
        if let Some(peer) = self.0.zero_copy.get() {
            return Some(peer);
        }
        if ![AF_INET, AF_INET6].contains(&self.0.family) {
            return None;
        }
        let to = self.getpeername().ok()?.ip()?;
        let from = self.getsockname().ok()?.ip()?;
        let peer = self.0.zero_copy.get_or_init(|| {
            let route = Route::from(from.to_canonical());
            Box::new(Peer {
                is_local: is_local(from, to),
                connection: Arc::new(Connection::new(route)),
            })
        });
        Some(peer)
    }

    /// [`sendall`](Socket::sendall) of a large buffer that was given away.
    pub(super) fn sendall_large(&self, mut buf: Buf) -> Result<()> {
        let peer = match pin::zero_copy_mode() {
            None => None,
            Some(mode) => self
                .zero_copy_peer()
                .filter(|peer| !peer.is_local || mode != ZeroCopy::Adaptive),
        };
        let timeout_ns = self.timeout_ns();
        let Some(peer) = peer.filter(|_| ![NON_BLOCKING, BY_OPTION].contains(&timeout_ns)) else {
            return self.sendall(&buf);
        };
        self.send_behind_queue(0)?;
        let deadline_ns = fiber::now_ns().saturating_add(timeout_ns);
        let mut left_ns = timeout_ns;
        loop {
            let target = (&self.0.inflight, Direction::Out);
            let flags = libc::MSG_WAITALL;
            let sent = pin::send_zero_copy(
                self.0.fd,
                &mut buf,
                flags,
                left_ns,
                target,
                &peer.connection,
            );
            let Some(code) = sent else {
                return self.sendall_waiting(&buf, 0, left_ns);
            };
            buf.advance(transferred(code)?);
            if buf.is_empty() {
                return Ok(());
            }
            if timeout_ns > 0 {
                left_ns = deadline_ns - fiber::now_ns();
                if left_ns <= 0 {
                    return Err(Error::Timeout);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_between_a_machines_own_addresses_do_not_leave_it() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let local = |from, to| is_local(address(from), address(to));
        assert!(local("127.0.0.1", "127.0.0.1"));
        assert!(local("127.0.0.1", "127.3.2.1"));
        assert!(local("::1", "::1"));
        assert!(local("::ffff:127.0.0.1", "::ffff:127.0.0.1"));
        assert!(local("192.0.2.1", "192.0.2.1"));
        assert!(local("2001:db8::1", "2001:db8::1"));
        assert!(local("::ffff:192.0.2.1", "192.0.2.1"));
        assert!(!local("192.0.2.1", "192.0.2.2"));
        assert!(!local("2001:db8::1", "2001:db8::2"));
    }
}
