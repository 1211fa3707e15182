//! Datagrams with io_uring: one multishot RECVMSG into a provided buffer ring, and a SENDMSG through the ring for each.
#![allow(unsafe_code)]

use std::io;
use std::mem::zeroed;

use io_uring::{cqueue, opcode, types};

use super::buffers::{Buffers, GROUP};
use super::raw_multi::MultiArgs;
use super::ring::{KIND, RECV, Ring, SEND};
use super::{Listening, cannot};

/// Bytes before the datagram: the header and a name with room for IPv6.
const NAME_BYTES: u32 = size_of::<libc::sockaddr_in6>() as u32;
const HEADER_BYTES: u32 = 16;

/// What a buffer is sent with: the header points to the vector beside it.
struct Reply {
    header: libc::msghdr,
    vector: libc::iovec,
}

struct Server {
    ring: Ring,
    listening: Listening,
    buffers: Buffers,
    replies: Box<[Reply]>,
    /// What RECVMSG is told of names; it must live as long as the operation.
    template: &'static libc::msghdr,
}

/// Serves until a signal ends the process.
pub fn serve(args: &MultiArgs) -> io::Result<()> {
    if args.listen.fanout.is_some() {
        return Err(cannot("no fan-out of datagrams"));
    }
    if args.listen.timeout.is_some() {
        return Err(cannot(
            "a socket that serves everybody has nobody to time out",
        ));
    }
    let ring = Ring::open(&args.ring)?;
    let size = (HEADER_BYTES + NAME_BYTES + args.listen.buffer).next_multiple_of(64);
    let buffers = Buffers::new(args.buffers, size, ring.fd)?;
    // SAFETY: all-zero is a valid value.
    let mut template: libc::msghdr = unsafe { zeroed() };
    template.msg_namelen = NAME_BYTES;
    let replies = (0..args.buffers)
        .map(|_| Reply {
            // SAFETY: as above.
            header: unsafe { zeroed() },
            // SAFETY: as above.
            vector: unsafe { zeroed() },
        })
        .collect();
    let mut server = Server {
        ring,
        listening: Listening::open(&args.listen)?,
        buffers,
        replies,
        template: Box::leak(Box::new(template)),
    };
    server.receive()?;
    server.listening.announce()?;
    server.run()
}

impl Server {
    #[inline(never)]
    fn run(&mut self) -> io::Result<()> {
        let mut starved = false;
        loop {
            // While all buffers are being sent from, only those sends are waited for.
            self.ring.enter(1)?;
            while let Some(cqe) = self.ring.next() {
                if cqe.user_data & KIND == SEND {
                    // A datagram that cannot be sent is lost.
                    self.buffers.give_back((cqe.user_data >> 2) as u16);
                    continue;
                }
                if let (Some(id), true) = (cqueue::buffer_select(cqe.flags), cqe.result >= 0) {
                    self.buffers.taken();
                    self.reply(id, cqe.result as u32)?;
                }
                if !cqueue::more(cqe.flags) {
                    if cqe.result == -libc::ENOBUFS {
                        self.buffers.ran_out();
                    }
                    starved = true;
                }
            }
            self.buffers.publish();
            if starved && self.buffers.available() > 0 {
                starved = false;
                self.receive()?;
            }
        }
    }

    fn receive(&mut self) -> io::Result<()> {
        let entry = opcode::RecvMsgMulti::new(types::Fd(self.listening.fd), self.template, GROUP)
            .build()
            .user_data(RECV);
        self.ring.push(entry)
    }

    /// Queues the echo of a buffer, which is the kernel's again until that has completed.
    #[inline(always)]
    fn reply(&mut self, id: u16, length: u32) -> io::Result<()> {
        let start = self.buffers.address(id);
        // SAFETY: the kernel has written its header, the name and the datagram to this buffer; the name's length is the header's
        // first word. The reply belongs to the buffer, and neither moves.
        unsafe {
            let name_bytes = start.cast::<u32>().read_unaligned();
            let reply = &mut self.replies[usize::from(id)];
            reply.vector.iov_base = start.add((HEADER_BYTES + NAME_BYTES) as usize).cast();
            reply.vector.iov_len = (length - HEADER_BYTES - NAME_BYTES) as usize;
            reply.header.msg_name = start.add(HEADER_BYTES as usize).cast();
            reply.header.msg_namelen = name_bytes.min(NAME_BYTES);
            reply.header.msg_iov = &raw mut reply.vector;
            reply.header.msg_iovlen = 1;
            let entry = opcode::SendMsg::new(types::Fd(self.listening.fd), &raw const reply.header)
                .build()
                .user_data(u64::from(id) << 2 | SEND);
            self.ring.push(entry)
        }
    }
}
