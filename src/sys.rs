//! System calls outside the ring, each a thin function over one call.
//!
//! Results follow the ring's convention: 0 or more is the call's own result, a negative number is `-errno`. That way an
//! operation answers alike whether a CQE or a call answered. It knows no sockets as objects and no fibers.
#![allow(unsafe_code)]

pub(crate) mod messages;

use std::io::{IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};

use crate::address::{Address, SockAddr};
use crate::driver::op::TRANSFER_BYTES_MAX;
#[cfg(any(test, fuzzing))]
use crate::driver::scripted;
use crate::error::{Error, Result};

/// The calling thread's errno.
#[cold]
pub(crate) fn errno() -> i32 {
    // SAFETY: the C library returns the address of this thread's own errno.
    unsafe { *libc::__errno_location() }
}

/// `-errno` where a call returned -1, else its result.
fn result(returned: i32) -> i32 {
    if returned < 0 { -errno() } else { returned }
}

/// `-errno` where a transfer returned -1, else its byte count (at most `TRANSFER_BYTES_MAX`, so it fits).
#[inline(always)]
fn count(returned: isize) -> i32 {
    if returned < 0 {
        -errno()
    } else {
        returned as i32
    }
}

/// Lets a simulation (`driver/scripted.rs`) answer a call on one of its descriptors. Only tests and fuzz targets have any.
macro_rules! simulated {
    ($fd:expr, $call:ident $(($($argument:expr),*))?) => {
        #[cfg(any(test, fuzzing))]
        if let Some(code) = scripted::call($fd, scripted::Call::$call $(($($argument),*))?) {
            return code;
        }
    };
}

/// A negative result as an [`Error`].
pub(crate) fn check(returned: i32) -> Result<i32> {
    if returned < 0 {
        Err(Error::from_errno(-returned))
    } else {
        Ok(returned)
    }
}

// The two transfers are raw system calls: in a process with threads, glibc wraps its own in thread cancellation (85 instructions
// around recv, 31 around send).

#[inline(always)]
pub(crate) fn recv(fd: RawFd, buffer: &mut [MaybeUninit<u8>], flags: i32) -> i32 {
    simulated!(fd, Recv(buffer, flags));
    // SAFETY: the kernel writes at most `len` bytes into the exclusively borrowed buffer, during the call only; no address is
    // asked for.
    let received = unsafe {
        libc::syscall(
            libc::SYS_recvfrom,
            fd,
            buffer.as_mut_ptr(),
            buffer.len(),
            flags,
            std::ptr::null_mut::<libc::sockaddr>(),
            std::ptr::null_mut::<libc::socklen_t>(),
        )
    };
    count(received as isize)
}

/// recv(2) that also tells the flags of what was received.
#[inline(always)]
pub(crate) fn recv_with_flags(fd: RawFd, buffer: &mut [MaybeUninit<u8>], flags: i32) -> (i32, i32) {
    let mut piece = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all zeros is a header without address and control data.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut piece;
    header.msg_iovlen = 1;
    // SAFETY: the header names one piece, the exclusively borrowed buffer, which the kernel writes during the call only.
    let received = unsafe { libc::syscall(libc::SYS_recvmsg, fd, &mut header, flags) };
    (count(received as isize), header.msg_flags)
}

#[inline(always)]
pub(crate) fn send(fd: RawFd, buffer: &[u8], flags: i32) -> i32 {
    simulated!(fd, Send(buffer));
    // SAFETY: the kernel reads at most `len` bytes of the borrowed buffer, during the call only; no address is passed.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_sendto,
            fd,
            buffer.as_ptr(),
            buffer.len(),
            flags,
            std::ptr::null::<libc::sockaddr>(),
            0usize,
        )
    };
    count(sent as isize)
}

pub(crate) fn sendto(fd: RawFd, buffer: &[u8], flags: i32, address: &SockAddr) -> i32 {
    // SAFETY: the kernel reads at most `len` bytes of the borrowed buffer and the initialised address, during the call only.
    count(unsafe {
        libc::sendto(
            fd,
            buffer.as_ptr().cast(),
            buffer.len(),
            flags,
            address.as_ptr(),
            address.len(),
        )
    })
}

pub(crate) fn recvmsg(
    fd: RawFd,
    room: &mut Scatter<'_>,
    message: &mut Incoming,
    flags: i32,
) -> i32 {
    // SAFETY: the header names memory that is borrowed exclusively, and which the kernel writes during the call only.
    count(unsafe { libc::recvmsg(fd, message.header(room), flags) })
}

pub(crate) fn sendmsg(fd: RawFd, message: &Outgoing<'_>, flags: i32) -> i32 {
    // SAFETY: the header names borrowed memory (see the type), which the kernel reads during the call only.
    count(unsafe { libc::sendmsg(fd, message.header(), flags) })
}

/// One piece of memory for the kernel to fill.
#[derive(Clone, Copy)]
pub(crate) struct Piece(libc::iovec);

impl Piece {
    pub(crate) const NONE: Piece = Piece(libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    });
}

/// The memory that one recvmsg(2) fills, piece by piece; borrowed exclusively.
pub(crate) struct Scatter<'a> {
    pieces: *mut libc::iovec,
    count: usize,
    memory: PhantomData<&'a mut [u8]>,
}

impl<'a> Scatter<'a> {
    /// One buffer, described in `piece`.
    pub(crate) fn one(buffer: &'a mut [MaybeUninit<u8>], piece: &'a mut Piece) -> Scatter<'a> {
        piece.0.iov_base = buffer.as_mut_ptr().cast();
        piece.0.iov_len = buffer.len().min(TRANSFER_BYTES_MAX);
        Scatter {
            pieces: &raw mut piece.0,
            count: 1,
            memory: PhantomData,
        }
    }

    /// Several buffers. (std promises that an `IoSliceMut` is laid out as an iovec.)
    pub(crate) fn many(buffers: &'a mut [IoSliceMut<'_>]) -> Scatter<'a> {
        Scatter {
            pieces: buffers.as_mut_ptr().cast(),
            count: buffers.len(),
            memory: PhantomData,
        }
    }

    /// Bytes of all pieces.
    pub(crate) fn bytes(&self) -> usize {
        // SAFETY: `pieces` points to `count` initialised iovecs, borrowed as long as self.
        (0..self.count)
            .map(|index| unsafe { (*self.pieces.add(index)).iov_len })
            .sum()
    }

    /// The same memory behind its first `done` bytes, described in `pieces`.
    pub(crate) fn rest<'b>(&'b mut self, done: usize, pieces: &'b mut Vec<Piece>) -> Scatter<'b> {
        pieces.clear();
        let mut skip = done;
        for index in 0..self.count {
            // SAFETY: `pieces` points to `count` initialised iovecs, borrowed as long as self.
            let iovec = unsafe { self.pieces.add(index).read() };
            let skipped = skip.min(iovec.iov_len);
            skip -= skipped;
            pieces.push(Piece(libc::iovec {
                iov_base: iovec.iov_base.wrapping_byte_add(skipped),
                iov_len: iovec.iov_len - skipped,
            }));
        }
        Scatter {
            pieces: pieces.as_mut_ptr().cast(),
            count: pieces.len(),
            memory: PhantomData,
        }
    }
}

/// A word of control data: as large as its alignment.
pub(crate) type ControlWord = u64;
const _: () = assert!(align_of::<ControlWord>() >= align_of::<libc::cmsghdr>());

/// What recvmsg(2) fills beside the buffers: the address of the sender and control data.
///
/// The header points into this struct, so it is written when the struct is where it will stay for the call.
pub(crate) struct Incoming {
    header: libc::msghdr,
    address: SockAddr,
    control: Vec<ControlWord>,
    control_len: usize,
}

impl Incoming {
    /// Without room for control data.
    pub(crate) fn new() -> Incoming {
        Incoming {
            // SAFETY: msghdr is pointers and integers, for all of which zero is a value.
            header: unsafe { std::mem::zeroed() },
            address: SockAddr::empty(),
            control: Vec::new(),
            control_len: 0,
        }
    }

    /// With room for `control_len` bytes of control data.
    pub(crate) fn with_control(control_len: usize) -> Result<Incoming> {
        let mut incoming = Incoming::new();
        let words = control_len.div_ceil(size_of::<ControlWord>());
        incoming
            .control
            .try_reserve_exact(words)
            .map_err(|_| Error::from_errno(libc::ENOMEM))?;
        incoming.control.resize(words, 0);
        incoming.control_len = control_len;
        Ok(incoming)
    }

    /// The header for a call into `room`. Valid until self moves or the borrow of that memory ends.
    pub(crate) fn header(&mut self, room: &mut Scatter<'_>) -> *mut libc::msghdr {
        let (storage, len) = self.address.as_mut_parts();
        self.header.msg_name = storage.cast();
        self.header.msg_namelen = SockAddr::empty().len();
        // SAFETY: `len` points into `self.address`.
        unsafe { len.write(self.header.msg_namelen) };
        self.header.msg_iov = room.pieces;
        self.header.msg_iovlen = room.count as _;
        self.header.msg_control = match self.control_len {
            0 => std::ptr::null_mut(),
            _ => self.control.as_mut_ptr().cast(),
        };
        self.header.msg_controllen = self.control_len as _;
        self.header.msg_flags = 0;
        &raw mut self.header
    }

    /// The sender's address, once the call has succeeded; `None` where the kernel gave none.
    pub(crate) fn address(&mut self) -> Option<Address> {
        let (_, len) = self.address.as_mut_parts();
        // SAFETY: `len` points into `self.address`. The kernel wrote an address of that length, or none and 0.
        unsafe { len.write(self.header.msg_namelen) };
        self.address.decode()
    }

    /// The control data, once the call has succeeded.
    pub(crate) fn control(&self) -> &[u8] {
        #[allow(clippy::unnecessary_cast, reason = "not a usize on musl")]
        let len = self.control_len.min(self.header.msg_controllen as usize);
        // SAFETY: the vector holds at least `control_len` bytes, all initialised when it was made.
        unsafe { std::slice::from_raw_parts(self.control.as_ptr().cast(), len) }
    }

    /// What the kernel says of the message, once the call has succeeded: `MSG_TRUNC`, `MSG_CTRUNC`, …
    pub(crate) fn flags(&self) -> i32 {
        self.header.msg_flags
    }
}

/// What sendmsg(2) reads: the header, and through it borrowed buffers, control data and an address.
pub(crate) struct Outgoing<'a> {
    header: libc::msghdr,
    memory: PhantomData<&'a [u8]>,
}

impl<'a> Outgoing<'a> {
    pub(crate) fn new(
        buffers: &'a [IoSlice<'_>],
        control: &'a [ControlWord],
        address: Option<&'a SockAddr>,
    ) -> Outgoing<'a> {
        // SAFETY: msghdr is pointers and integers, for all of which zero is a value.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        // std promises that an `IoSlice` is laid out as an iovec. The kernel only reads what the pointers lead to.
        header.msg_iov = buffers.as_ptr().cast_mut().cast();
        header.msg_iovlen = buffers.len() as _;
        if !control.is_empty() {
            header.msg_control = control.as_ptr().cast_mut().cast();
            header.msg_controllen = size_of_val(control) as _;
        }
        if let Some(address) = address {
            header.msg_name = address.as_ptr().cast_mut().cast();
            header.msg_namelen = address.len();
        }
        Outgoing {
            header,
            memory: PhantomData,
        }
    }

    /// The header, whose memory is borrowed as long as self.
    pub(crate) fn header(&self) -> *const libc::msghdr {
        &raw const self.header
    }

    /// Bytes of all buffers.
    pub(crate) fn bytes(&self) -> usize {
        self.iovecs().map(|iovec| iovec.iov_len).sum()
    }

    /// The same buffers behind their first `done` bytes, described in `pieces`, without control data.
    pub(crate) fn rest<'b>(&'b self, done: usize, pieces: &'b mut Vec<Piece>) -> Outgoing<'b> {
        pieces.clear();
        let mut skip = done;
        for iovec in self.iovecs() {
            let skipped = skip.min(iovec.iov_len);
            skip -= skipped;
            pieces.push(Piece(libc::iovec {
                iov_base: iovec.iov_base.wrapping_byte_add(skipped),
                iov_len: iovec.iov_len - skipped,
            }));
        }
        let mut header = self.header;
        header.msg_iov = pieces.as_mut_ptr().cast();
        header.msg_control = std::ptr::null_mut();
        header.msg_controllen = 0;
        Outgoing {
            header,
            memory: PhantomData,
        }
    }

    fn iovecs(&self) -> impl Iterator<Item = libc::iovec> {
        #[allow(clippy::unnecessary_cast, reason = "not a usize on musl")]
        let (iovecs, count) = (self.header.msg_iov, self.header.msg_iovlen as usize);
        // SAFETY: `new` and `rest` put `count` initialised iovecs there, borrowed as long as self.
        (0..count).map(move |index| unsafe { iovecs.add(index).read() })
    }
}

/// sendfile(2) of at most `len` bytes from `offset` on. It raises no SIGPIPE: the kernel would, for it takes no flags here.
pub(crate) fn sendfile(out: RawFd, file: RawFd, offset: i64, len: usize) -> i32 {
    without_sigpipe(|| {
        let mut offset: libc::off_t = offset;
        // SAFETY: `offset` lives through the call; no other memory is passed.
        count(unsafe { libc::sendfile(out, file, &mut offset, len.min(TRANSFER_BYTES_MAX)) })
    })
}

/// A pipe for [`splice_in`] and [`splice_out`], which holds `bytes` (more where the kernel rounds up, less where it refuses):
/// where to read and where to write. Neither end ever waits.
pub(crate) fn pipe(bytes: usize) -> Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: the kernel writes two descriptors into the array of two.
    check(result(unsafe {
        libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK)
    }))?;
    let (reader, writer) = (own(fds[0]), own(fds[1]));
    // Where the user's pipes hold much already the kernel refuses, and the pipe stays as it is.
    // SAFETY: no memory is passed.
    unsafe { libc::fcntl(fds[1], libc::F_SETPIPE_SZ, bytes as libc::c_int) };
    Ok((reader, writer))
}

/// splice(2) of at most `len` bytes from a socket into a pipe. Only `O_NONBLOCK` keeps it from waiting for the socket.
pub(crate) fn splice_in(socket: RawFd, pipe: RawFd, len: usize) -> i32 {
    splice(socket, pipe, len)
}

/// splice(2) of at most `len` bytes from a pipe into a socket. It raises no SIGPIPE: the kernel would, for it takes no flags for
/// the socket here. Only `O_NONBLOCK` keeps it from waiting for the socket.
pub(crate) fn splice_out(pipe: RawFd, socket: RawFd, len: usize) -> i32 {
    without_sigpipe(|| splice(pipe, socket, len))
}

fn splice(from: RawFd, to: RawFd, len: usize) -> i32 {
    let none = std::ptr::null_mut();
    let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    // SAFETY: no memory is passed: the offsets are null, as they must be for pipes and sockets.
    count(unsafe { libc::splice(from, none, to, none, len.min(TRANSFER_BYTES_MAX), flags) })
}

/// Makes a call under which this thread gets no SIGPIPE, whatever the process does about that signal.
fn without_sigpipe(call: impl FnOnce() -> i32) -> i32 {
    // SAFETY: all sets are locals that live through the calls and are filled by sigemptyset, pthread_sigmask or sigpending.
    unsafe {
        let mut sigpipe: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut sigpipe);
        libc::sigaddset(&mut sigpipe, libc::SIGPIPE);
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_BLOCK, &sigpipe, &mut before);
        // One that was pending before is not ours; it can be only where the signal was blocked already.
        let mut pending: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut pending);
        if libc::sigismember(&before, libc::SIGPIPE) == 1 {
            libc::sigpending(&mut pending);
        }
        let result = call();
        if result == -libc::EPIPE && libc::sigismember(&pending, libc::SIGPIPE) == 0 {
            // Ours: taken off before it can be delivered.
            let now = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            while libc::sigtimedwait(&sigpipe, std::ptr::null_mut(), &now) < 0
                && errno() == libc::EINTR
            {}
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        result
    }
}

pub(crate) fn read(fd: RawFd, buffer: &mut [u8]) -> i32 {
    // SAFETY: the kernel writes at most `len` bytes into the exclusively borrowed buffer, during the call only.
    count(unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) })
}

/// read(2) that does not wait (EAGAIN), where the kernel can do that (of pipes since Linux 6.5).
pub(crate) fn read_at_once(fd: RawFd, buffer: &mut [u8]) -> i32 {
    const AT_THE_POSITION: libc::c_long = -1;
    let piece = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: the kernel writes at most `len` bytes into the exclusively borrowed buffer, during the call only.
    let code = count(unsafe {
        libc::syscall(
            libc::SYS_preadv2,
            fd,
            &raw const piece,
            1,
            AT_THE_POSITION,
            AT_THE_POSITION,
            libc::RWF_NOWAIT,
        ) as isize
    });
    match -code {
        libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL => read(fd, buffer),
        _ => code,
    }
}

pub(crate) fn pread(fd: RawFd, buffer: &mut [u8], offset: i64) -> i32 {
    // SAFETY: the kernel writes at most `len` bytes into the exclusively borrowed buffer, during the call only.
    count(unsafe { libc::pread(fd, buffer.as_mut_ptr().cast(), buffer.len(), offset) })
}

/// Sets a file's position. What has none (a pipe) keeps having none.
pub(crate) fn seek(fd: RawFd, position: i64) {
    // SAFETY: no memory is passed.
    unsafe { libc::lseek(fd, position, libc::SEEK_SET) };
}

pub(crate) fn accept4(fd: RawFd, address: &mut SockAddr) -> i32 {
    simulated!(fd, Accept);
    let (storage, len) = address.as_mut_parts();
    // SAFETY: `len` holds the size of `storage`; both live through the call.
    result(unsafe { libc::accept4(fd, storage, len, libc::SOCK_CLOEXEC) })
}

/// accept4(2) on a socket whose connections have no address.
pub(crate) fn accept4_without_address(fd: RawFd) -> i32 {
    let (storage, len) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: null pointers ask for no address, so that nothing is written.
    result(unsafe { libc::accept4(fd, storage, len, libc::SOCK_CLOEXEC) })
}

pub(crate) fn connect(fd: RawFd, address: &SockAddr) -> i32 {
    // SAFETY: pointer and length describe one initialised address that lives through the call.
    result(unsafe { libc::connect(fd, address.as_ptr(), address.len()) })
}

pub(crate) fn bind(fd: RawFd, address: &SockAddr) -> i32 {
    // SAFETY: pointer and length describe one initialised address that lives through the call.
    result(unsafe { libc::bind(fd, address.as_ptr(), address.len()) })
}

pub(crate) fn listen(fd: RawFd, backlog: i32) -> i32 {
    // SAFETY: no memory is passed.
    result(unsafe { libc::listen(fd, backlog) })
}

pub(crate) fn shutdown(fd: RawFd, how: i32) -> i32 {
    simulated!(fd, Shutdown(how));
    // SAFETY: no memory is passed.
    result(unsafe { libc::shutdown(fd, how) })
}

pub(crate) fn getsockname(fd: RawFd, address: &mut SockAddr) -> i32 {
    let (storage, len) = address.as_mut_parts();
    // SAFETY: `len` holds the size of `storage`; both live through the call.
    result(unsafe { libc::getsockname(fd, storage, len) })
}

pub(crate) fn getpeername(fd: RawFd, address: &mut SockAddr) -> i32 {
    let (storage, len) = address.as_mut_parts();
    // SAFETY: `len` holds the size of `storage`; both live through the call.
    result(unsafe { libc::getpeername(fd, storage, len) })
}

/// poll(2) of one descriptor: the ready events, 0 when `timeout_ms` (-1: for ever) passed.
pub(crate) fn poll(fd: RawFd, events: i16, timeout_ms: i32) -> i32 {
    simulated!(fd, Poll(events));
    let mut entry = libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    // SAFETY: one entry is passed and its count is 1; it lives through the call.
    match result(unsafe { libc::poll(&mut entry, 1, timeout_ms) }) {
        1 if entry.revents & libc::POLLNVAL != 0 => -libc::EBADF,
        1 => i32::from(entry.revents),
        other => other,
    }
}

pub(crate) fn socket(family: i32, kind: i32, proto: i32) -> Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = check(result(unsafe {
        libc::socket(family, kind | libc::SOCK_CLOEXEC, proto)
    }))?;
    Ok(own(fd))
}

pub(crate) fn socketpair(family: i32, kind: i32, proto: i32) -> Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: the kernel writes two descriptors into the array of two.
    check(result(unsafe {
        libc::socketpair(family, kind | libc::SOCK_CLOEXEC, proto, fds.as_mut_ptr())
    }))?;
    Ok((own(fds[0]), own(fds[1])))
}

/// Takes ownership of a descriptor the kernel just made.
pub(crate) fn own(fd: RawFd) -> OwnedFd {
    assert!(fd >= 0, "not a descriptor");
    // SAFETY: callers pass a descriptor that a call just returned to them and to nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The descriptor of an object that keeps it open while borrowed.
pub(crate) fn borrow(fd: &RawFd) -> BorrowedFd<'_> {
    // SAFETY: callers pass a field of the object that owns the number and frees it last, so it outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(*fd) }
}

/// Initialised bytes as a place to receive into.
#[inline(always)]
pub(crate) fn as_uninit(buffer: &mut [u8]) -> &mut [MaybeUninit<u8>] {
    let len = buffer.len();
    // SAFETY: same layout, same borrow. Receiving only ever writes initialised bytes, so the caller's slice stays initialised.
    unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast(), len) }
}

/// Makes the first `received` bytes of the spare capacity part of an empty vector.
pub(crate) fn set_received(bytes: &mut Vec<u8>, received: usize) {
    assert!(bytes.is_empty() && received <= bytes.capacity());
    // SAFETY: the kernel reported that it wrote so many bytes from the start of the spare capacity.
    unsafe { bytes.set_len(received) };
}

/// Bytes that the kernel reported to have written at the start of `buffer`.
pub(crate) fn received(buffer: &mut [MaybeUninit<u8>], received: usize) -> &mut [u8] {
    let written = &mut buffer[..received];
    // SAFETY: callers pass a count that a receive reported for this buffer, with flags under which the kernel writes what it
    // reports, or else with a buffer that was filled before.
    unsafe { &mut *(&raw mut *written as *mut [u8]) }
}

/// Another descriptor of the same open file, not inherited by programs started with `exec`.
pub(crate) fn duplicate(fd: RawFd) -> Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let duplicate = check(result(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) }))?;
    Ok(own(duplicate))
}

/// The descriptor's own flags (`F_GETFD`).
pub(crate) fn descriptor_flags(fd: RawFd) -> i32 {
    // SAFETY: no memory is passed.
    result(unsafe { libc::fcntl(fd, libc::F_GETFD) })
}

/// Sets the descriptor's own flags (`F_SETFD`).
pub(crate) fn set_descriptor_flags(fd: RawFd, flags: i32) -> i32 {
    // SAFETY: no memory is passed.
    result(unsafe { libc::fcntl(fd, libc::F_SETFD, flags) })
}

/// Closes a descriptor the caller owns. On Linux the number is free whatever close(2) says.
pub(crate) fn close(fd: RawFd) -> i32 {
    simulated!(fd, Close);
    // SAFETY: the caller owns `fd` and gives it up; no memory is passed.
    result(unsafe { libc::close(fd) })
}

/// Reads an option into `value`: the number of bytes the kernel wrote.
pub(crate) fn getsockopt(fd: RawFd, level: i32, option: i32, value: &mut [u8]) -> i32 {
    if level == libc::SOL_SOCKET && option == libc::SO_GET_FILTER {
        return socket_filter(fd, value);
    }
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: `len` holds the size of `value`; both live through the call.
    let returned =
        unsafe { libc::getsockopt(fd, level, option, value.as_mut_ptr().cast(), &mut len) };
    if returned < 0 { -errno() } else { len as i32 }
}

/// SO_GET_FILTER, whose lengths count instructions where those of all others count bytes: with the size of `value` in bytes the
/// kernel would write eight times as much.
#[cold]
fn socket_filter(fd: RawFd, value: &mut [u8]) -> i32 {
    const INSTRUCTION: usize = size_of::<libc::sock_filter>();
    let room = value.len() / INSTRUCTION;
    let mut count = room as libc::socklen_t;
    // SAFETY: the kernel writes at most `count` instructions, which fit in `value`; both live through the call.
    let returned = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            value.as_mut_ptr().cast(),
            &mut count,
        )
    };
    match count as usize {
        _ if returned < 0 => -errno(),
        // Asked for none, the kernel only counts them.
        count if count > room => -libc::EINVAL,
        count => (count * INSTRUCTION) as i32,
    }
}

/// What became of a connect that was under way (`SO_ERROR`): 0, or why it failed.
pub(crate) fn connect_outcome(fd: RawFd) -> i32 {
    let mut value = [0u8; 4];
    match getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, &mut value) {
        error if error < 0 => error,
        _ => -i32::from_ne_bytes(value),
    }
}

/// Whether the descriptor is that of a socket that accepts connections.
pub(crate) fn is_listening(fd: RawFd) -> bool {
    #[cfg(any(test, fuzzing))]
    if let Some(code) = scripted::call(fd, scripted::Call::IsListening) {
        return code != 0;
    }
    let mut value = [0u8; 4];
    getsockopt(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN, &mut value) >= 0 && value != [0; 4]
}

/// SO_RCVTIMEO or SO_SNDTIMEO in nanoseconds, `None` where there is none; or an errno.
pub(crate) fn option_timeout_ns(fd: RawFd, option: i32) -> std::result::Result<Option<i64>, i32> {
    // A timeval: seconds and microseconds.
    let mut value = [0u8; 16];
    const _: () = assert!(size_of::<libc::timeval>() == 16);
    let len = getsockopt(fd, libc::SOL_SOCKET, option, &mut value);
    if len < 0 {
        return Err(-len);
    }
    let field = |index| i64::from_ne_bytes(std::array::from_fn(|byte| value[index + byte]));
    let ns = field(0)
        .saturating_mul(1_000_000_000)
        .saturating_add(field(8) * 1_000);
    Ok((ns > 0).then_some(ns))
}

/// Sets an option from bytes.
pub(crate) fn setsockopt(fd: RawFd, level: i32, option: i32, value: &[u8]) -> i32 {
    // SAFETY: pointer and length describe the borrowed bytes, read during the call only.
    result(unsafe {
        libc::setsockopt(
            fd,
            level,
            option,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    })
}

/// Sets an option from a null pointer and a length (`setsockopt(level, option, None, optlen)` in Python).
pub(crate) fn setsockopt_null(fd: RawFd, level: i32, option: i32, len: u32) -> i32 {
    // SAFETY: the kernel reads nothing through a null pointer: it answers EFAULT or takes it as "none".
    result(unsafe { libc::setsockopt(fd, level, option, std::ptr::null(), len) })
}

/// Sets or clears `O_NONBLOCK` with one call.
pub(crate) fn set_nonblocking(fd: RawFd, nonblocking: bool) -> i32 {
    simulated!(fd, SetNonblocking(nonblocking));
    let mut value = libc::c_int::from(nonblocking);
    // SAFETY: FIONBIO reads one int, which lives through the call.
    result(unsafe { libc::ioctl(fd, libc::FIONBIO, &mut value) })
}

/// Whether a stream's next byte stands behind the mark of urgent data (sockatmark(3)).
pub(crate) fn is_at_mark(fd: RawFd) -> bool {
    // The libc crate does not have it. The number is that of x86_64 and aarch64.
    const SIOCATMARK: libc::c_ulong = 0x8905;
    let mut answer: libc::c_int = 0;
    // SAFETY: the kernel writes one int to `answer`.
    let code = result(unsafe { libc::ioctl(fd, SIOCATMARK as _, &mut answer) });
    code == 0 && answer != 0
}

/// The descriptor's file status flags (`F_GETFL`).
pub(crate) fn status_flags(fd: RawFd) -> i32 {
    simulated!(fd, StatusFlags);
    // SAFETY: no memory is passed.
    result(unsafe { libc::fcntl(fd, libc::F_GETFL) })
}

/// Puts an `O_PATH` descriptor over the number `fd`: the number stays taken, and every later use of it as a socket, by call
/// or by ring, answers EBADF.
pub(crate) fn bury(fd: RawFd, tombstone: RawFd) -> i32 {
    simulated!(fd, Bury);
    loop {
        // SAFETY: no memory is passed; the caller owns the number `fd`.
        match result(unsafe { libc::dup3(tombstone, fd, libc::O_CLOEXEC) }) {
            // EBUSY: another thread's open is about to use the number it was promised; EINTR: the old file's flush.
            error if error == -libc::EBUSY || error == -libc::EINTR => std::thread::yield_now(),
            other => return other,
        }
    }
}

/// The process's `O_PATH` descriptor for [`bury`], opened with the first socket so that closing needs no free descriptor.
pub(crate) fn tombstone() -> Result<RawFd> {
    static TOMBSTONE: OnceLock<RawFd> = OnceLock::new();
    if let Some(fd) = TOMBSTONE.get() {
        return Ok(*fd);
    }
    // SAFETY: the path is a NUL-terminated literal.
    let fd = check(result(unsafe {
        libc::open(c"/".as_ptr(), libc::O_PATH | libc::O_CLOEXEC)
    }))?;
    let kept = *TOMBSTONE.get_or_init(|| fd);
    if kept != fd {
        close(fd);
    }
    Ok(kept)
}

/// A new eventfd with counter 0, in non-blocking mode so that a ring never hands its poll to a worker thread.
pub(crate) fn eventfd() -> Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = check(result(unsafe {
        libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)
    }))?;
    Ok(own(fd))
}

/// Adds one to an eventfd. EAGAIN means its counter is full, so its reader is awake anyway.
pub(crate) fn ring_eventfd(fd: RawFd) {
    let one = 1u64.to_ne_bytes();
    // A ring that is lost is a sleeper that nobody wakes.
    // SAFETY: eight bytes are read from the array during the call.
    while unsafe { libc::write(fd, one.as_ptr().cast(), one.len()) } < 0 && errno() == libc::EINTR {
    }
}

/// An epoll instance.
pub(crate) fn epoll() -> Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = check(result(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }))?;
    Ok(own(fd))
}

/// Has the epoll instance report once, with `token`, that `fd` can be written or has an error.
pub(crate) fn epoll_add(epoll: RawFd, fd: RawFd, token: usize) -> i32 {
    let mut event = libc::epoll_event {
        events: (libc::EPOLLOUT | libc::EPOLLONESHOT) as u32,
        u64: token as u64,
    };
    // SAFETY: the event is read during the call.
    result(unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &mut event) })
}

/// The token of a descriptor that the epoll instance has to report, if there is one. It does not wait.
pub(crate) fn epoll_next(epoll: RawFd) -> Option<usize> {
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    // SAFETY: there is room for the one event that is asked for.
    let count = unsafe { libc::epoll_wait(epoll, &mut event, 1, 0) };
    (count == 1).then_some(event.u64 as usize)
}

/// epoll_ctl(2), with `data` for the events.
pub(crate) fn epoll_ctl(epoll: RawFd, operation: i32, fd: RawFd, events: u32, data: u64) -> i32 {
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: the event is read during the call.
    result(unsafe { libc::epoll_ctl(epoll, operation, fd, &mut event) })
}

/// epoll_wait(2), for `timeout_ms` (-1: for ever): how many events there are now.
pub(crate) fn epoll_wait(epoll: RawFd, events: &mut [libc::epoll_event], timeout_ms: i32) -> i32 {
    let room = events.len().min(i32::MAX as usize) as i32;
    // SAFETY: the kernel writes at most `room` events into the exclusively borrowed slice, during the call only.
    result(unsafe { libc::epoll_wait(epoll, events.as_mut_ptr(), room, timeout_ms) })
}

/// epoll_pwait2(2) (Linux 5.11) without a signal mask, for `timeout_ns`: how many events there are now.
pub(crate) fn epoll_wait_ns(
    epoll: RawFd,
    events: &mut [libc::epoll_event],
    timeout_ns: i64,
) -> i32 {
    // `struct __kernel_timespec`: 64-bit seconds and nanoseconds, whatever the C library's are.
    let timeout: [i64; 2] = [timeout_ns / 1_000_000_000, timeout_ns % 1_000_000_000];
    // SAFETY: the kernel writes at most `len` events into the exclusively borrowed slice and reads the timeout, during the
    // call only; no mask is passed.
    let count = unsafe {
        libc::syscall(
            libc::SYS_epoll_pwait2,
            epoll,
            events.as_mut_ptr(),
            events.len() as libc::c_int,
            &raw const timeout,
            std::ptr::null::<libc::sigset_t>(),
            8usize,
        )
    };
    result(count as i32)
}

/// The monotonic clock in nanoseconds.
pub(crate) fn monotonic_ns() -> i64 {
    let mut time = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: CLOCK_MONOTONIC always exists, so the call fills the whole struct.
    let time = unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC, time.as_mut_ptr());
        time.assume_init()
    };
    time.tv_sec as i64 * 1_000_000_000 + time.tv_nsec as i64
}

/// The resources whose limits are looked at. Their numbers have a type of their own in each C library.
#[derive(Clone, Copy)]
pub(crate) enum Resource {
    OpenFiles,
    LockedMemory,
}

/// A resource limit as (soft, hard).
pub(crate) fn rlimit(resource: Resource) -> Option<(u64, u64)> {
    let resource = match resource {
        Resource::OpenFiles => libc::RLIMIT_NOFILE,
        Resource::LockedMemory => libc::RLIMIT_MEMLOCK,
    };
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the kernel fills the struct, which lives through the call.
    (unsafe { libc::getrlimit(resource, &mut limit) } == 0)
        .then_some((limit.rlim_cur, limit.rlim_max))
}

/// Raises the soft limit of open descriptors to the hard one: (before, after).
pub(crate) fn raise_nofile() -> Option<(u64, u64)> {
    let (soft, hard) = rlimit(Resource::OpenFiles)?;
    let limit = libc::rlimit {
        rlim_cur: hard,
        rlim_max: hard,
    };
    // SAFETY: the kernel reads the struct, which lives through the call.
    (unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } == 0).then_some((soft, hard))
}

/// A page that reads 1 in the process that made it and 0 in its forked children (until they take an epoch of their own) (`MADV_WIPEONFORK`, Linux 4.14), so one load
/// tells a child that the rings it sees belong to its parent.
///
/// Where the page cannot be had the mark reads 1 always, and forked children are not told apart.
pub(crate) fn fork_mark() -> &'static AtomicU32 {
    static MARK: OnceLock<&'static AtomicU32> = OnceLock::new();
    static NO_MARK: AtomicU32 = AtomicU32::new(FIRST_EPOCH);
    MARK.get_or_init(|| {
        let len = page_size();
        // SAFETY: an anonymous private mapping of one page, at an address the kernel picks; checked before use.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return &NO_MARK;
        }
        // SAFETY: the mapping above is `len` bytes.
        if unsafe { libc::madvise(page, len, libc::MADV_WIPEONFORK) } != 0 {
            // SAFETY: the mapping above, which nobody else has seen.
            unsafe { libc::munmap(page, len) };
            return &NO_MARK;
        }
        // SAFETY: the page is aligned, zeroed (a valid AtomicU32), and never unmapped.
        let mark: &'static AtomicU32 = unsafe { &*page.cast::<AtomicU32>() };
        mark.store(FIRST_EPOCH, Ordering::Relaxed);
        mark
    })
}

/// The epoch of a process that was not forked since it first asked.
const FIRST_EPOCH: u32 = 1;

/// The number [`fork_mark`] shows to this process; a forked child gets another one, never its parent's. A ring remembers the
/// epoch it was made in and belongs to whoever still reads it.
pub(crate) fn fork_epoch() -> u32 {
    static LAST: AtomicU32 = AtomicU32::new(FIRST_EPOCH);
    let mark = fork_mark();
    match mark.load(Ordering::Relaxed) {
        0 => {
            // A child that has not asked before, perhaps with several threads by now. LAST came along with the fork.
            let epoch = LAST.fetch_add(1, Ordering::Relaxed) + 1;
            match mark.compare_exchange(0, epoch, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => epoch,
                Err(first) => first,
            }
        }
        epoch => epoch,
    }
}

/// The lock, unless this is a forked child whose parent had it taken just then: nobody will give it back here.
pub(crate) fn lock_after_fork<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    /// For so long a thread of this process may have it.
    const PATIENCE_NS: i64 = 100_000_000;

    if fork_epoch() == FIRST_EPOCH {
        return Some(mutex.lock().unwrap_or_else(PoisonError::into_inner));
    }
    let start_ns = monotonic_ns();
    loop {
        match mutex.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(guard)) => return Some(guard.into_inner()),
            Err(TryLockError::WouldBlock) => std::thread::yield_now(),
        }
        if monotonic_ns() - start_ns > PATIENCE_NS {
            return None;
        }
    }
}

/// The size of a page of memory in bytes.
pub(crate) fn page_size() -> usize {
    // SAFETY: no memory is passed.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All threads of a forked child find the same epoch, another one than its parent's, also if they ask for the first time at once.
    #[test]
    fn a_forked_child_has_one_epoch() {
        const THREADS: u32 = 4;
        let parents = fork_epoch();
        for _ in 0..100 {
            // SAFETY: no memory is passed. The child starts threads, as forked servers do, and ends without running anything else.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let gate = AtomicU32::new(0);
                let ask = || {
                    gate.fetch_add(1, Ordering::SeqCst);
                    while gate.load(Ordering::SeqCst) < THREADS {
                        std::thread::yield_now();
                    }
                    fork_epoch()
                };
                let epochs = std::thread::scope(|scope| {
                    let asking = [(); THREADS as usize].map(|()| scope.spawn(ask));
                    asking.map(|thread| thread.join().unwrap_or(parents))
                });
                let is_one = epochs.iter().all(|epoch| *epoch == fork_epoch());
                let code = i32::from(!is_one || epochs[0] == parents);
                // SAFETY: no memory is passed.
                unsafe { libc::_exit(code) };
            }
            let mut status = -1;
            // SAFETY: the kernel writes the status, which lives through the call.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            assert_eq!(status, 0);
        }
    }

    #[test]
    fn a_buried_number_stays_taken_and_answers_ebadf() {
        let (left, right) = socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0).unwrap();
        use std::os::fd::AsRawFd;
        let fd = left.as_raw_fd();
        assert_eq!(bury(fd, tombstone().unwrap()), fd);
        assert_eq!(send(fd, b"x", 0), -libc::EBADF);
        let mut buffer = [MaybeUninit::uninit(); 1];
        assert_eq!(
            recv(right.as_raw_fd(), &mut buffer, 0),
            0,
            "the peer sees the end"
        );
        assert_ne!(
            socket(libc::AF_INET, libc::SOCK_STREAM, 0)
                .unwrap()
                .as_raw_fd(),
            fd
        );
    }

    #[test]
    fn a_socket_filter_stays_within_the_bytes_there_are() {
        let fd = socket(libc::AF_INET, libc::SOCK_DGRAM, 0).unwrap();
        use std::os::fd::AsRawFd;
        let fd = fd.as_raw_fd();
        let get = |value: &mut [u8]| getsockopt(fd, libc::SOL_SOCKET, libc::SO_GET_FILTER, value);
        assert_eq!(get(&mut [0; 4]), 0, "there is none");
        // BPF_RET | BPF_K, twice: "accept 65,535 bytes".
        let filter = [[6u8, 0, 0, 0, 0xff, 0xff, 0, 0]; 2];
        let program = [2, filter.as_ptr() as usize];
        let program = program.map(usize::to_ne_bytes);
        let option = libc::SO_ATTACH_FILTER;
        let attached = setsockopt(fd, libc::SOL_SOCKET, option, program.as_flattened());
        assert_eq!(attached, 0);
        for room in 0..24 {
            let mut memory = [0xaa; 64];
            let len = get(&mut memory[..room]);
            assert!(memory[room..].iter().all(|byte| *byte == 0xaa), "{room}");
            if room < 16 {
                assert_eq!(len, -libc::EINVAL, "{room}");
            } else {
                assert_eq!(len, 16);
                assert_eq!(memory[..16], *filter.as_flattened());
            }
        }
    }

    #[test]
    fn a_forked_child_sees_the_mark_wiped() {
        let mark = fork_mark();
        assert_eq!(mark.load(Ordering::Relaxed), 1);
        // SAFETY: the child only loads an atomic and leaves by _exit, both async-signal-safe.
        let child = unsafe {
            match libc::fork() {
                0 => libc::_exit(mark.load(Ordering::Relaxed) as i32),
                child => child,
            }
        };
        let mut status = 0;
        // SAFETY: `status` lives through the call; the child is ours.
        unsafe { libc::waitpid(child, &mut status, 0) };
        assert!(libc::WIFEXITED(status));
        assert_eq!(libc::WEXITSTATUS(status), 0);
    }

    #[test]
    fn a_forked_child_has_an_epoch_of_its_own() {
        let mine = fork_epoch();
        // SAFETY: the child only works on atomics and leaves by _exit, both async-signal-safe.
        let child = unsafe {
            match libc::fork() {
                0 => libc::_exit(i32::from(
                    fork_epoch() != mine && fork_epoch() == fork_epoch(),
                )),
                child => child,
            }
        };
        let mut status = 0;
        // SAFETY: `status` lives through the call; the child is ours.
        unsafe { libc::waitpid(child, &mut status, 0) };
        assert_eq!(libc::WEXITSTATUS(status), 1);
        assert_eq!(fork_epoch(), mine);
    }
}
