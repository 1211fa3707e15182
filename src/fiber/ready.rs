//! Waiting for a descriptor of any kind: readiness for those that other code reads and writes.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{error_from_outcome, holds_files, suspend};
use crate::driver::Op;
use crate::error::Result;
use crate::sys;

/// Waits until `fd` can be read without blocking: there are bytes, a connection, an event, or the end of the stream. An error and a
/// hangup (`POLLERR`, `POLLHUP`) count as ready too: the read then reports them.
///
/// It waits for any descriptor poll(2) takes, such as a pipe, an eventfd, an inotify queue or the socket of another library; a
/// regular file is always ready. To bound the wait, put it into a [`timeout`](crate::timeout). Another fiber, thread or
/// process may read first, so a read that must not block has to be a non-blocking one.
///
/// The descriptor is borrowed, so it stays open meanwhile. [`Socket::close`](crate::Socket::close), which works on a shared
/// socket, does **not** end the wait: that goes on for the file that was open when it began, and as long as it goes on the file
/// stays open (the peer sees no end).
///
/// # Errors
///
/// - `Cancelled`, `Shutdown`: the fiber was cancelled, or its runtime is ending.
/// - `Timeout`: the deadline of an enclosing [`timeout`](crate::timeout) passed.
/// - `EBADF`: the descriptor was closed before (a closed [`Socket`](crate::Socket)).
/// - `EAGAIN`: not ready, in a destructor that runs because the fiber panics, where nothing waits.
///
/// # Source
///
/// poll(2); `IORING_OP_POLL_ADD` (Linux 5.1); Python `select.select([fd], [], [])`.
///
/// ```
/// use std::io::{Read, Write};
///
/// let (mut reader, mut writer) = std::io::pipe()?;
/// let bytes = ringsock::run(move || {
///     ringsock::spawn(move || writer.write_all(b"hello"));
///     ringsock::wait_readable(&reader)?;
///     let mut bytes = [0; 5];
///     reader.read_exact(&mut bytes)?;
///     Ok::<_, ringsock::Error>(bytes)
/// })?;
/// assert_eq!(&bytes, b"hello");
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn wait_readable(fd: impl AsFd) -> Result<()> {
    wait(fd, libc::POLLIN)
}

/// Waits until `fd` can be written without blocking: there is room, or an error or a hangup that the write will report.
///
/// Everything else is as for [`wait_readable`].
///
/// # Errors
///
/// Those of [`wait_readable`].
///
/// # Source
///
/// poll(2); `IORING_OP_POLL_ADD` (Linux 5.1); Python `select.select([], [fd], [])`.
///
/// ```
/// let (_reader, writer) = std::io::pipe()?;
/// ringsock::wait_writable(&writer)?;
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn wait_writable(fd: impl AsFd) -> Result<()> {
    wait(fd, libc::POLLOUT)
}

/// On epoll, the waits that [`Socket::close`](crate::Socket::close) does not end, by descriptor: how many there are and, once it
/// was closed, what keeps its file open until they end. (The ring does that by itself. The number is not another file's before:
/// they borrow it.)
static BARE: Mutex<BTreeMap<RawFd, Waits>> = Mutex::new(BTreeMap::new());

/// There was one, ever: without, closing need not look.
static HAS_BEEN_BARE: AtomicBool = AtomicBool::new(false);

#[derive(Default)]
struct Waits {
    count: usize,
    /// A forked child has none of its parent's waits.
    fork_epoch: u32,
    file: Option<OwnedFd>,
}

/// One such wait.
struct Bare(RawFd);

impl Bare {
    fn new(fd: RawFd) -> Bare {
        HAS_BEEN_BARE.store(true, Ordering::SeqCst);
        if let Some(mut bare) = sys::lock_after_fork(&BARE) {
            let fork_epoch = sys::fork_epoch();
            let waits = bare.entry(fd).or_default();
            if waits.fork_epoch != fork_epoch {
                *waits = Waits::default();
                waits.fork_epoch = fork_epoch;
            }
            waits.count += 1;
        }
        Bare(fd)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        if let Some(mut bare) = sys::lock_after_fork(&BARE)
            && let Some(waits) = bare.get_mut(&self.0)
        {
            waits.count -= 1;
            if waits.count == 0 {
                bare.remove(&self.0);
            }
        }
    }
}

/// The descriptor is about to be closed: those who wait for its file still do. (Without a descriptor to keep it by, they wait for
/// nothing but their deadline.)
pub(crate) fn keep_for_waits(fd: RawFd) {
    if HAS_BEEN_BARE.load(Ordering::SeqCst)
        && let Some(mut bare) = sys::lock_after_fork(&BARE)
        && let Some(waits) = bare.get_mut(&fd)
        && waits.fork_epoch == sys::fork_epoch()
    {
        waits.file = sys::duplicate(fd).ok();
    }
}

fn wait(fd: impl AsFd, events: i16) -> Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    let _kept = (!holds_files()).then(|| Bare::new(fd));
    match suspend(&mut Op::Poll { fd, events }, -1, None) {
        code if code < 0 => Err(error_from_outcome(code)),
        _ => Ok(()),
    }
}
