//! Sending later: what `sendall_later` leaves to a fiber, in order, and how other sends keep behind it.
//!
//! ```text
//!   sendall_later ──▶ nothing before it: a plain send ──all taken──▶ done
//!        │                                  │ the rest
//!        │ something before it              ▼
//!        └─ room? (else waits) ──▶ queue ──▶ a fiber sends it, and ends with the queue ──error──▶ kept for the next send
//!   send, sendall, sendmsg, sendfile, shutdown(SHUT_WR) ──▶ wait until the queue is empty
//! ```
//!
//! A socket that never sent later has no queue, which is all that its other sends look at.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{BLOCKING, NON_BLOCKING, Socket};
use crate::buf::Buf;
use crate::error::{Error, Result};
use crate::fiber::join::Builder;
use crate::fiber::park::{Parking, Waker};
use crate::fiber::route::THRESHOLD_MIN;
use crate::fiber::wait_queue::WaitQueue;
use crate::fiber::{self, error_from_outcome};
use crate::sys;

/// How much may wait: buffers, and bytes (but always one buffer).
const QUEUED_BUFS_MAX: usize = 16;
const QUEUED_BYTES_MAX: usize = 256 * 1024;

/// What one socket sends later.
pub(super) struct SendQueue {
    /// Somebody sends what is queued, or there is an error to report.
    is_busy: AtomicBool,
    /// A forked child has none of the fibers that send what it finds here.
    fork_epoch: u32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bufs: VecDeque<Buf>,
    bytes: usize,
    /// A fiber sends what is queued, or a call is about to start one.
    is_sending: bool,
    error: Option<Error>,
    waiting: WaitQueue<Waker>,
}

impl State {
    fn has_room(&self, len: usize) -> bool {
        self.bufs.is_empty()
            || self.bufs.len() < QUEUED_BUFS_MAX && self.bytes + len <= QUEUED_BYTES_MAX
    }

    fn push(&mut self, buf: Buf) {
        self.bytes += buf.len();
        self.bufs.push_back(buf);
    }
}

impl SendQueue {
    fn new() -> SendQueue {
        SendQueue {
            is_busy: AtomicBool::new(false),
            fork_epoch: sys::fork_epoch(),
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `is_met`: the state, in which it is.
    ///
    /// # Errors
    ///
    /// What became of something queued, once; `Timeout`, `EAGAIN` with a timeout of 0, and those of [`Parking::park`].
    fn wait(
        &self,
        timeout_ns: i64,
        is_met: impl Fn(&State) -> bool,
    ) -> Result<MutexGuard<'_, State>> {
        let deadline_ns = match timeout_ns {
            1.. => Some(fiber::now_ns().saturating_add(timeout_ns)),
            _ => None,
        };
        let mut parking: Option<Parking> = None;
        loop {
            let mut state = self.lock();
            if let Some(error) = state.error.take() {
                self.is_busy.store(false, Ordering::Release);
                return Err(error);
            }
            if is_met(&state) {
                return Ok(state);
            }
            if timeout_ns == NON_BLOCKING {
                return Err(Error::from_errno(libc::EAGAIN));
            }
            let Some(parking) = parking.take() else {
                drop(state);
                parking = Some(Parking::new());
                continue;
            };
            let ticket = state.waiting.push(parking.waker());
            drop(state);
            let parked = match deadline_ns {
                None => parking.park(),
                Some(deadline_ns) => {
                    let left_ns = (deadline_ns - fiber::now_ns()).max(0);
                    fiber::timeout(Duration::from_nanos(left_ns as u64), || parking.park())
                }
            };
            if let Err(error) = parked {
                self.lock().waiting.remove(ticket);
                return Err(error);
            }
        }
    }

    /// Whether another process, this one's parent, sends what is queued here.
    fn is_inherited(&self) -> bool {
        self.fork_epoch != sys::fork_epoch()
    }

    /// Ends the sending, with everything sent or with an error for the next call.
    fn end(&self, mut state: MutexGuard<'_, State>, error: Option<Error>) {
        state.is_sending = false;
        self.is_busy.store(error.is_some(), Ordering::Release);
        state.error = error;
        let dropped = std::mem::take(&mut state.bufs);
        state.bytes = 0;
        let waiting = state.waiting.take();
        drop(state);
        waiting.for_each(Waker::wake);
        drop(dropped);
    }

    /// The next buffer; without one the sending has ended.
    fn next(&self) -> Option<Buf> {
        let mut state = self.lock();
        let Some(buf) = state.bufs.pop_front() else {
            self.end(state, None);
            return None;
        };
        state.bytes -= buf.len();
        let waiting = state.waiting.take();
        drop(state);
        waiting.for_each(Waker::wake);
        Some(buf)
    }
}

/// Sends what is queued, until it is empty or a send fails.
fn send_queued(socket: &Socket, queue: &SendQueue) {
    /// For a fiber that is unwound: whoever waits is told.
    struct EndWhenDropped<'a>(&'a SendQueue);
    impl Drop for EndWhenDropped<'_> {
        fn drop(&mut self) {
            self.0.end(self.0.lock(), Some(Error::Shutdown));
        }
    }
    let unwound = EndWhenDropped(queue);
    while let Some(buf) = queue.next() {
        let timeout_ns = match socket.timeout_ns() {
            NON_BLOCKING => BLOCKING,
            timeout_ns => timeout_ns,
        };
        if let Err(error) = socket.sendall_waiting(&buf, 0, timeout_ns) {
            queue.end(queue.lock(), Some(error));
            break;
        }
    }
    std::mem::forget(unwound);
}

impl Socket {
    /// [`sendall`](Socket::sendall) of a buffer that is given away: a lease, or a [`PoolBuf`](crate::PoolBuf), goes back to its pool when the
    /// kernel is done with it. A large one is sent without any copy, in a fiber and where the route allows it
    /// ([`RuntimeBuilder::zero_copy`](crate::RuntimeBuilder::zero_copy)); then the buffer can go back some time after the call has returned.
    ///
    /// # Errors
    ///
    /// Those of [`sendall`](Socket::sendall).
    ///
    /// # Source
    ///
    /// `send(2)`; `IORING_OP_SEND` with `MSG_WAITALL`; `IORING_OP_SEND_ZC` (Linux 6.3).
    ///
    /// ```
    /// # ringsock::run(|| {
    /// # let (left, right) = ringsock::socketpair()?;
    /// # left.sendall(b"hello")?;
    /// right.sendall_buf(right.recv(1024)?)?;
    /// assert_eq!(left.recv(1024)?, b"hello");
    /// # Ok::<(), ringsock::Error>(()) })?;
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn sendall_buf(&self, buf: Buf) -> Result<()> {
        if buf.len() >= THRESHOLD_MIN {
            return self.sendall_large(buf);
        }
        self.sendall(&buf)
    }

    /// [`sendall_buf`](Socket::sendall_buf) that does not wait for the peer: what the kernel does not take at once waits in a
    /// queue of the socket's, up to 16 buffers and 256 KiB, and is sent in order by a fiber of its own. While the queue is full it
    /// waits for room.
    ///
    /// Everything sent afterwards, and `shutdown(SHUT_WR)`, waits until the queue is empty; `flush` (of [`std::io::Write`]) does only
    /// that. [`close`](Socket::close) drops what is queued; dropping the last handle does not. Each buffer has the socket's
    /// timeout (in non-blocking mode: none) from when its turn comes. On a plain thread this is `sendall_buf`.
    ///
    /// # Errors
    ///
    /// Those of [`sendall`](Socket::sendall), also of what was queued before: such an error comes once, from the next call that
    /// sends, and what was queued behind it is dropped, so the connection is best closed. `Timeout`, `EAGAIN`: no room in time;
    /// the buffer is dropped.
    ///
    /// # Source
    ///
    /// Python `asyncio.StreamWriter.write` and `drain`; `send(2)`, `IORING_OP_SEND`.
    ///
    /// ```
    /// use std::io::Write;
    ///
    /// # ringsock::run(|| {
    /// # let (left, right) = ringsock::socketpair()?;
    /// let message = vec![7; 100_000];
    /// for _ in 0..3 {
    ///     left.sendall_later(message.clone().into())?; // though nobody receives yet
    /// }
    /// let receiver = ringsock::spawn(move || right.chunks().map(|chunk| chunk.unwrap().len()).sum::<usize>());
    /// (&left).flush()?;
    /// drop(left);
    /// assert_eq!(receiver.join().unwrap(), 300_000);
    /// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
    /// ```
    pub fn sendall_later(&self, mut buf: Buf) -> Result<()> {
        if !fiber::in_fiber() || std::thread::panicking() {
            return self.sendall_buf(buf);
        }
        self.check_open()?;
        if let Some(code) = fiber::outcome_so_far() {
            return Err(error_from_outcome(code));
        }
        let queue = self.0.queue.get_or_init(|| Box::new(SendQueue::new()));
        if queue.is_inherited() {
            return self.sendall_buf(buf);
        }
        let room = |state: &State| !state.is_sending || state.has_room(buf.len());
        let mut state = queue.wait(self.timeout_ns(), room)?;
        if state.is_sending {
            state.push(buf);
            return Ok(());
        }
        // From here on others queue behind this one.
        state.is_sending = true;
        queue.is_busy.store(true, Ordering::Release);
        drop(state);
        let mut op = self.send_op(&buf, 0, None);
        // In a crowd too: a fiber for the rest costs more than the call.
        let is_sent = match fiber::attempt_directly(&mut op, true) {
            Some(code) if code < 0 => {
                queue.end(queue.lock(), None);
                return Err(error_from_outcome(code));
            }
            Some(sent) => {
                buf.advance(sent as usize);
                buf.is_empty()
            }
            // Nor is an empty datagram.
            None => false,
        };
        let mut state = queue.lock();
        if !is_sent {
            state.bytes += buf.len();
            state.bufs.push_front(buf);
        }
        if state.bufs.is_empty() {
            queue.end(state, None);
            return Ok(());
        }
        drop(state);
        let socket = self.clone();
        let sender = move || send_queued(&socket, socket.queue());
        if Builder::new().spawn(sender).is_err() {
            // No room for another fiber: this one does it.
            send_queued(self, queue);
            drop(queue.wait(NON_BLOCKING, |state| !state.is_sending)?);
        }
        Ok(())
    }

    fn queue(&self) -> &SendQueue {
        self.0.queue.get().expect("a socket that sent later")
    }

    /// Waits until nothing is queued, as every send does first.
    #[inline(always)]
    pub(super) fn send_behind_queue(&self, flags: i32) -> Result<()> {
        match self.0.queue.get() {
            None => Ok(()),
            Some(queue) => self.wait_for_queue(queue, flags),
        }
    }

    #[cold]
    #[inline(never)]
    fn wait_for_queue(&self, queue: &SendQueue, flags: i32) -> Result<()> {
        if !queue.is_busy.load(Ordering::Acquire) || queue.is_inherited() {
            return Ok(());
        }
        let timeout_ns = match flags & libc::MSG_DONTWAIT {
            0 => self.timeout_ns(),
            _ => NON_BLOCKING,
        };
        queue.wait(timeout_ns, |state| !state.is_sending).map(drop)
    }
}
