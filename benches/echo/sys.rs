//! System calls that servers and loads share, with errors one can match on.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;

/// Turns the -1 of a system call into the error it stands for.
pub fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

pub fn other(message: impl Into<String>) -> io::Error {
    io::Error::other(message.into())
}

pub fn raise_file_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: both calls are given a valid rlimit.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

pub fn close(fd: RawFd) {
    // SAFETY: the callers own the descriptor and forget it here.
    unsafe {
        libc::close(fd);
    }
}

/// recv(2), a negative error number on failure.
#[inline(always)]
pub fn recv(fd: RawFd, buffer: &mut [u8]) -> isize {
    // SAFETY: the buffer is valid for writes of its length.
    let result = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    if result < 0 { -errno() } else { result }
}

/// recv(2) that does not wait even on a blocking socket.
#[inline(always)]
pub fn recv_now(fd: RawFd, buffer: &mut [u8]) -> isize {
    // SAFETY: the buffer is valid for writes of its length.
    let result = unsafe {
        libc::recv(
            fd,
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            libc::MSG_DONTWAIT,
        )
    };
    if result < 0 { -errno() } else { result }
}

/// send(2) without SIGPIPE, a negative error number on failure.
#[inline(always)]
pub fn send(fd: RawFd, buffer: &[u8]) -> isize {
    // SAFETY: the buffer is valid for reads of its length.
    let result =
        unsafe { libc::send(fd, buffer.as_ptr().cast(), buffer.len(), libc::MSG_NOSIGNAL) };
    if result < 0 { -errno() } else { result }
}

/// send(2) that does not wait even on a blocking socket.
#[inline(always)]
pub fn send_now(fd: RawFd, buffer: &[u8]) -> isize {
    // SAFETY: the buffer is valid for reads of its length.
    let result = unsafe {
        libc::send(
            fd,
            buffer.as_ptr().cast(),
            buffer.len(),
            libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
        )
    };
    if result < 0 { -errno() } else { result }
}

/// The error number of the last failed call.
pub fn errno() -> isize {
    // SAFETY: the location is always valid for the calling thread.
    unsafe { *libc::__errno_location() as isize }
}

pub const EVENTS: usize = 256;

pub fn epoll_open() -> io::Result<RawFd> {
    // SAFETY: plain system call.
    check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })
}

pub fn epoll_set(poll: RawFd, operation: i32, fd: RawFd, events: u32, data: u64) -> io::Result<()> {
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: the event is valid for the call.
    check(unsafe { libc::epoll_ctl(poll, operation, fd, &mut event) }).map(drop)
}

/// epoll_wait(2); an interruption counts as no events.
#[inline(always)]
pub fn epoll_wait(
    poll: RawFd,
    events: &mut [libc::epoll_event; EVENTS],
    timeout: i32,
) -> io::Result<usize> {
    // SAFETY: the array is valid for as many events as are asked for.
    let count = unsafe { libc::epoll_wait(poll, events.as_mut_ptr(), EVENTS as i32, timeout) };
    if count < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::Interrupted => Ok(0),
            _ => Err(error),
        };
    }
    Ok(count as usize)
}

/// Sets an option whose value is an int.
pub fn set_option(fd: RawFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option value is a live c_int of the length given.
    check(unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), length) }).map(drop)
}

/// Room for the control message that names the size of segments, on the way in and on the way out.
#[repr(C, align(8))]
#[derive(Clone, Copy, Default)]
pub struct SegmentControl([u8; 24]);

impl SegmentControl {
    /// Has the kernel cut what is sent into datagrams of so many bytes.
    pub fn cutting(bytes: u16) -> Self {
        let mut control = Self::default();
        control.0[..8].copy_from_slice(&18usize.to_ne_bytes());
        control.0[8..12].copy_from_slice(&libc::SOL_UDP.to_ne_bytes());
        control.0[12..16].copy_from_slice(&libc::UDP_SEGMENT.to_ne_bytes());
        control.0[16..18].copy_from_slice(&bytes.to_ne_bytes());
        control
    }

    /// Makes it the control data of a message.
    pub fn lend(&mut self, header: &mut libc::msghdr) {
        header.msg_control = self.0.as_mut_ptr().cast();
        header.msg_controllen = self.0.len() as _;
    }
}

/// Of a received message: the bytes of each datagram in it, if the kernel put several together.
pub fn segment_bytes(header: &libc::msghdr) -> Option<usize> {
    // SAFETY: the kernel has left the header and its control data valid; the message's data is an int.
    unsafe {
        let control = libc::CMSG_FIRSTHDR(header);
        if control.is_null() || (*control).cmsg_type != libc::UDP_GRO {
            return None;
        }
        let bytes = libc::CMSG_DATA(control).cast::<libc::c_int>();
        Some(bytes.read_unaligned() as usize)
    }
}

/// Gives a datagram socket room for what a load has in flight: with privilege as much as is asked for, else what is allowed.
pub fn widen_buffers(fd: RawFd) {
    let forced = [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE];
    for (force, allowed) in forced.into_iter().zip([libc::SO_RCVBUF, libc::SO_SNDBUF]) {
        let bytes = 4 << 20;
        // What is not granted shows as loss.
        let _ = set_option(fd, libc::SOL_SOCKET, force, bytes)
            .or_else(|_| set_option(fd, libc::SOL_SOCKET, allowed, bytes));
    }
}
