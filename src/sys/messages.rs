//! Many messages a call: recvmmsg(2) and sendmmsg(2), and the control data of segments.
//!
//! The headers that the kernel reads live on the stack of one call, so what outlives it holds no pointer.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;

use super::{ControlWord, result};
use crate::address::SockAddr;

/// The most messages of one call. (32 reach what more reach, and their headers fit into a page.)
pub(crate) const MESSAGES_MAX: usize = 32;

/// Room for control data, in words. The kernel writes its own (timestamps, drop counts, marks: some 200 bytes at the most) before
/// the size of segments, which must not be cut: without it the datagrams' boundaries are lost.
const CONTROL_WORDS: usize = 32;

/// What recvmmsg(2) leaves beside the bytes of one message.
pub(crate) struct Arrival {
    /// The sender.
    pub(crate) address: SockAddr,
    /// Bytes received.
    pub(crate) len: usize,
    /// Bytes of each datagram in it, for whoever reads the control data; `usize::MAX` for one datagram.
    pub(crate) segment_bytes: usize,
    /// `MSG_TRUNC`, `MSG_CTRUNC`.
    pub(crate) flags: i32,
    control_len: usize,
    control: [ControlWord; CONTROL_WORDS],
}

impl Arrival {
    /// Nothing yet.
    pub(crate) fn none() -> Arrival {
        Arrival {
            address: SockAddr::empty(),
            len: 0,
            segment_bytes: usize::MAX,
            flags: 0,
            control_len: 0,
            control: [0; CONTROL_WORDS],
        }
    }

    /// The control data.
    pub(crate) fn control(&self) -> &[u8] {
        let len = self.control_len.min(size_of_val(&self.control));
        // SAFETY: the array is initialised and at least as long.
        unsafe { std::slice::from_raw_parts(self.control.as_ptr().cast(), len) }
    }
}

/// Where the bytes of messages go: those of message `i` to `room` bytes from `i * pitch` on.
pub(crate) struct Rooms<'a> {
    pub(crate) memory: &'a mut [u8],
    pub(crate) pitch: usize,
    pub(crate) room: usize,
}

/// Receives messages without waiting: how many, one into each room and arrival. Without `with_control` there is no room for control
/// data: on AF_UNIX it could be descriptors, which somebody would have to own.
pub(crate) fn recvmmsg(
    fd: RawFd,
    rooms: Rooms<'_>,
    with_control: bool,
    arrivals: &mut [Arrival],
) -> i32 {
    let Rooms {
        memory,
        pitch,
        room,
    } = rooms;
    let count = arrivals.len();
    assert!((1..=MESSAGES_MAX).contains(&count) && pitch >= room);
    let wanted = (count - 1).checked_mul(pitch);
    let wanted = wanted.and_then(|bytes| bytes.checked_add(room));
    assert!(wanted.is_some_and(|bytes| memory.len() >= bytes));
    let mut pieces = [const { MaybeUninit::<libc::iovec>::uninit() }; MESSAGES_MAX];
    let mut headers = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; MESSAGES_MAX];
    let start = memory.as_mut_ptr();
    for (index, arrival) in arrivals.iter_mut().enumerate() {
        let piece = pieces[index].write(libc::iovec {
            iov_base: start.wrapping_add(index * pitch).cast(),
            iov_len: room,
        });
        let (name, name_len) = arrival.address.as_mut_parts();
        // SAFETY: mmsghdr is pointers and integers, for all of which zero is a value.
        let header = headers[index].write(unsafe { std::mem::zeroed() });
        header.msg_hdr.msg_name = name.cast();
        header.msg_hdr.msg_namelen = SockAddr::empty().len();
        // SAFETY: `name_len` points into the arrival. (The address is that of no message until one has come.)
        unsafe { name_len.write(0) };
        header.msg_hdr.msg_iov = piece;
        header.msg_hdr.msg_iovlen = 1;
        if with_control {
            header.msg_hdr.msg_control = arrival.control.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = size_of_val(&arrival.control) as _;
        }
    }
    // SAFETY: the first `count` headers are initialised; they name memory that is borrowed exclusively (`memory` is long enough, as
    // asserted), and which the kernel writes during the call only. A raw call, as those of one message are.
    let received = unsafe {
        libc::syscall(
            libc::SYS_recvmmsg,
            fd,
            headers.as_mut_ptr(),
            count,
            libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
            std::ptr::null_mut::<libc::timespec>(),
        )
    };
    let received = result(received as i32);
    for (header, arrival) in headers.iter().zip(arrivals).take(received.max(0) as usize) {
        // SAFETY: initialised above.
        let header = unsafe { header.assume_init_ref() };
        let (_, name_len) = arrival.address.as_mut_parts();
        // SAFETY: `name_len` points into the arrival. The kernel wrote an address of that length, or none and 0.
        unsafe { name_len.write(header.msg_hdr.msg_namelen) };
        arrival.len = header.msg_len as usize;
        arrival.flags = header.msg_hdr.msg_flags;
        #[allow(clippy::unnecessary_cast, reason = "not a usize on musl")]
        let control_len = header.msg_hdr.msg_controllen as usize;
        arrival.control_len = control_len;
    }
    received
}

/// One message for sendmmsg(2).
#[derive(Clone, Copy)]
pub(crate) struct Departure<'a> {
    /// Where to; `None`: to whom the socket is connected.
    pub(crate) address: Option<&'a SockAddr>,
    /// Where its bytes begin among the pieces.
    pub(crate) first_piece: usize,
    /// How many of the pieces are its bytes.
    pub(crate) pieces: usize,
    /// Bytes of each datagram that the kernel is to cut it into (`UDP_SEGMENT`); 0 for one datagram.
    pub(crate) segment_bytes: u16,
}

/// The words of a control message that names a segment size: its length, its level and kind, a `u16`.
type SegmentControl = [ControlWord; 3];
const SEGMENT_CONTROL_LEN: u64 = (size_of::<libc::cmsghdr>() + size_of::<u16>()) as u64;
const _: () = assert!(size_of::<libc::cmsghdr>() == 16 && size_of::<usize>() == 8);

fn segment_control(segment_bytes: u16) -> SegmentControl {
    let [l0, l1, l2, l3] = libc::SOL_UDP.to_ne_bytes();
    let [k0, k1, k2, k3] = libc::UDP_SEGMENT.to_ne_bytes();
    let [s0, s1] = segment_bytes.to_ne_bytes();
    [
        SEGMENT_CONTROL_LEN,
        ControlWord::from_ne_bytes([l0, l1, l2, l3, k0, k1, k2, k3]),
        ControlWord::from_ne_bytes([s0, s1, 0, 0, 0, 0, 0, 0]),
    ]
}

/// Sends messages without waiting: how many the kernel took. Fewer than all: the next one failed, and would say why.
pub(crate) fn sendmmsg(fd: RawFd, departures: &[Departure<'_>], pieces: &[IoSlice<'_>]) -> i32 {
    let mut controls = [const { MaybeUninit::<SegmentControl>::uninit() }; MESSAGES_MAX];
    let mut headers = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; MESSAGES_MAX];
    assert!(departures.len() <= MESSAGES_MAX);
    for (index, departure) in departures.iter().enumerate() {
        let pieces = &pieces[departure.first_piece..][..departure.pieces];
        // SAFETY: as in `recvmmsg`.
        let header = headers[index].write(unsafe { std::mem::zeroed() });
        // The kernel only reads what these pointers lead to. std promises that an `IoSlice` is laid out as an iovec.
        header.msg_hdr.msg_iov = pieces.as_ptr().cast_mut().cast();
        header.msg_hdr.msg_iovlen = pieces.len() as _;
        if let Some(address) = departure.address {
            header.msg_hdr.msg_name = address.as_ptr().cast_mut().cast();
            header.msg_hdr.msg_namelen = address.len();
        }
        if departure.segment_bytes > 0 {
            let control = controls[index].write(segment_control(departure.segment_bytes));
            header.msg_hdr.msg_control = control.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = size_of_val(control) as _;
        }
    }
    // SAFETY: as many headers as are passed are initialised; they name borrowed memory, which the kernel reads during the call only.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_sendmmsg,
            fd,
            headers.as_mut_ptr(),
            departures.len(),
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    result(sent as i32)
}
