//! Datagrams with epoll: one call for each, or one for a batch (recvmmsg, sendmmsg), and on request many that came as one, or one
//! after the other from one peer, go back as one (UDP_GRO, UDP_SEGMENT).
#![allow(unsafe_code)]

use std::io;
use std::mem::zeroed;
use std::os::fd::RawFd;
use std::time::Duration;

use super::epoll::{EpollArgs, epoll_spin};
use super::{Listening, cannot};
use crate::sys::{
    EVENTS, SegmentControl, epoll_open, epoll_set, epoll_wait, segment_bytes, set_option,
};

/// How many calls find datagrams before another look at the events.
const TURNS: usize = 64;
/// The most segments of one send that every kernel takes, and the most bytes, over IPv6 too.
const SEGMENTS_MAX: usize = 64;
const SEND_BYTES_MAX: u32 = 65_487;

/// Serves until a signal ends the process.
pub fn serve(args: &EpollArgs) -> io::Result<()> {
    if args.listen.fanout.is_some() {
        return Err(cannot("no fan-out of datagrams"));
    }
    if args.listen.timeout.is_some() {
        return Err(cannot(
            "a socket that serves everybody has nobody to time out",
        ));
    }
    let listening = Listening::open(&args.listen)?;
    let poll = epoll_open()?;
    epoll_set(
        poll,
        libc::EPOLL_CTL_ADD,
        listening.fd,
        libc::EPOLLIN as u32,
        0,
    )?;
    listening.announce()?;
    let spin = args.spin.map(Duration::from_micros);
    let size = if args.segments {
        set_option(listening.fd, libc::SOL_UDP, libc::UDP_GRO, 1)?;
        // One receive may bring so much. Another cache line, so that not all begin in one set of the cache.
        65_536 + 64
    } else {
        args.listen.buffer as usize
    };
    let mut batch = Batch::new(args.batch as usize, size, args.segments);
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
    loop {
        let count = match spin {
            None => epoll_wait(poll, &mut events, -1)?,
            Some(spin) => epoll_spin(poll, &mut events, spin)?,
        };
        if count > 0 {
            for _ in 0..TURNS {
                let more = if args.batch > 1 || args.segments {
                    batch.many(listening.fd)
                } else {
                    batch.one(listening.fd)
                };
                if !more {
                    break;
                }
            }
        }
    }
}

/// Room for datagrams and where they came from; the pointers are into memory that stays where it is.
struct Batch {
    messages: Vec<libc::mmsghdr>,
    /// What is sent for them, where that is not the same.
    outgoing: Vec<libc::mmsghdr>,
    /// One for each message, in a row.
    _vectors: Vec<libc::iovec>,
    names: Vec<libc::sockaddr_storage>,
    buffers: Vec<Box<[u8]>>,
    /// For the sizes of segments, on the way in and then on the way out.
    controls: Option<Vec<SegmentControl>>,
}

const NAME_BYTES: libc::socklen_t = size_of::<libc::sockaddr_storage>() as libc::socklen_t;

impl Batch {
    fn new(count: usize, size: usize, segments: bool) -> Self {
        let mut buffers: Vec<Box<[u8]>> = (0..count).map(|_| vec![0; size].into()).collect();
        // SAFETY: all-zero is a valid value of both.
        let (mut names, mut messages) = unsafe {
            let names: Vec<libc::sockaddr_storage> = vec![zeroed(); count];
            let messages: Vec<libc::mmsghdr> = vec![zeroed(); count];
            (names, messages)
        };
        let mut vectors: Vec<libc::iovec> = buffers
            .iter_mut()
            .map(|buffer| libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: size,
            })
            .collect();
        for index in 0..count {
            let header = &mut messages[index].msg_hdr;
            header.msg_name = (&raw mut names[index]).cast();
            header.msg_iov = &raw mut vectors[index];
            header.msg_iovlen = 1;
        }
        Self {
            outgoing: if segments {
                messages.clone()
            } else {
                Vec::new()
            },
            messages,
            _vectors: vectors,
            names,
            buffers,
            controls: segments.then(|| vec![SegmentControl::default(); count]),
        }
    }

    /// Echoes one datagram; whether there was one. Sending waits for room.
    #[inline(always)]
    fn one(&mut self, fd: RawFd) -> bool {
        let buffer = &mut self.buffers[0];
        let name = (&raw mut self.names[0]).cast();
        let mut length = NAME_BYTES;
        // SAFETY: buffer and name are valid for the lengths given. A datagram that cannot be sent is lost.
        unsafe {
            let received = libc::recvfrom(
                fd,
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                libc::MSG_DONTWAIT,
                name,
                &mut length,
            );
            if received < 0 {
                return false;
            }
            libc::sendto(
                fd,
                buffer.as_ptr().cast(),
                received as usize,
                0,
                name,
                length,
            );
        }
        true
    }

    /// Echoes a batch; whether it was full, so that there may be more.
    #[inline(always)]
    fn many(&mut self, fd: RawFd) -> bool {
        let size = self.buffers[0].len();
        let full = self.messages.len();
        for message in &mut self.messages {
            message.msg_hdr.msg_namelen = NAME_BYTES;
            // SAFETY: the vector belongs to this batch.
            unsafe { (*message.msg_hdr.msg_iov).iov_len = size };
        }
        if let Some(controls) = &mut self.controls {
            for (message, control) in self.messages.iter_mut().zip(controls) {
                control.lend(&mut message.msg_hdr);
            }
        }
        // SAFETY: the headers point to memory of this batch, of the lengths they say.
        let count = unsafe {
            libc::recvmmsg(
                fd,
                self.messages.as_mut_ptr(),
                full as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let count = count.max(0) as usize;
        for message in &mut self.messages[..count] {
            // SAFETY: as above.
            unsafe { (*message.msg_hdr.msg_iov).iov_len = message.msg_len as usize };
        }
        let outgoing = match self.controls {
            Some(_) => self.gather(count),
            None => &mut self.messages[..count],
        };
        let mut sent = 0;
        while sent < outgoing.len() {
            // SAFETY: as above.
            let now = unsafe {
                libc::sendmmsg(
                    fd,
                    outgoing[sent..].as_mut_ptr(),
                    (outgoing.len() - sent) as u32,
                    0,
                )
            };
            // A datagram that cannot be sent is lost.
            sent += now.max(1) as usize;
        }
        count == full
    }

    /// What to send for the first `count` messages: each as it came, and those that came singly, one after the other from one peer
    /// and of one size (the last may be shorter), as one.
    fn gather(&mut self, count: usize) -> &mut [libc::mmsghdr] {
        let controls = self.controls.as_mut().expect("asked for segments");
        let (mut first, mut sends) = (0, 0);
        while first < count {
            let head = self.messages[first];
            let came = segment_bytes(&head.msg_hdr);
            let size = came.map_or(head.msg_len, |bytes| bytes as u32);
            let (mut end, mut last, mut bytes) = (first + 1, size, size);
            while came.is_none() && end < count && end - first < SEGMENTS_MAX {
                let next = &self.messages[end];
                let fits = last == size
                    && (1..=size).contains(&next.msg_len)
                    && bytes + next.msg_len <= SEND_BYTES_MAX;
                if !fits
                    || segment_bytes(&next.msg_hdr).is_some()
                    || !same_name(&head.msg_hdr, &next.msg_hdr)
                {
                    break;
                }
                last = next.msg_len;
                bytes += last;
                end += 1;
            }
            let header = &mut self.outgoing[sends].msg_hdr;
            *header = head.msg_hdr;
            header.msg_iovlen = end - first;
            if came.is_some() || end - first > 1 {
                controls[first] = SegmentControl::cutting(size as u16);
                controls[first].lend(header);
            } else {
                header.msg_controllen = 0;
            }
            sends += 1;
            first = end;
        }
        &mut self.outgoing[..sends]
    }
}

/// Whether two datagrams came from one address.
fn same_name(one: &libc::msghdr, other: &libc::msghdr) -> bool {
    let bytes = |header: &libc::msghdr| {
        // SAFETY: the kernel wrote so many bytes of a name of this batch.
        unsafe {
            std::slice::from_raw_parts(header.msg_name.cast::<u8>(), header.msg_namelen as usize)
        }
    };
    bytes(one) == bytes(other)
}
