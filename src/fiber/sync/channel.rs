//! The channel: a bounded queue of values, with those who wait for room and those who wait for a value.
//!
//! Values are given, not announced. A receiver that waits is given its value by the sender, under the lock, into `given`; a sender
//! that waits has its value in `senders` until a receiver takes it from there or moves it into the buffer. So:
//!
//! - a value is in exactly one place, and in the order it was sent: `given`, then `values`, then `senders`;
//! - somebody in `receivers` means `values` and `senders` are empty; somebody in `senders` means `values` is full;
//! - what an interrupted waiter finds under its ticket decides: a receiver takes what it was given after all, a sender takes its
//!   value back.
//!
//! Values are dropped outside the lock: their destructors may use the channel.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Error;
use crate::fiber;
use crate::fiber::park::{Parking, Waker};
use crate::fiber::wait_queue::{Ticket, WaitQueue};

/// Makes a channel that holds up to `capacity` values; with 0 each [`send`](Sender::send) waits for its receiver.
///
/// Both ends can be cloned and work in any fiber and on any thread; each value goes to one receiver. Values are received in the
/// order they were sent, and those who wait are served in the order they came. A call that need not wait succeeds at once, also in
/// a fiber that was cancelled; after 128 of them in a row a fiber lets the others go first.
///
/// In a forked child the fibers and threads that waited in the parent are not there, though the channel still counts them: use
/// channels made in the child.
///
/// It is disconnected when all senders are gone: receivers get what is left and then an error. And when all receivers are
/// gone: what is left is dropped, and senders get their value back.
///
/// The buffer grows with what it holds.
///
/// # Source
///
/// [`std::sync::mpsc::sync_channel`]; Python `queue.Queue`.
///
/// ```
/// let (sender, receiver) = ringsock::channel(16);
/// let sum: i32 = ringsock::run(move || {
///     ringsock::spawn(move || (1..=100).try_for_each(|n| sender.send(n)).unwrap());
///     receiver.iter().sum()
/// });
/// assert_eq!(sum, 5050);
/// ```
pub fn channel<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        capacity,
        state: Mutex::new(State {
            values: VecDeque::new(),
            given: VecDeque::new(),
            senders: WaitQueue::new(),
            receivers: WaitQueue::new(),
            senders_live: 1,
            receivers_live: 1,
        }),
    });
    (Sender(shared.clone()), Receiver(shared))
}

struct Shared<T> {
    capacity: usize,
    state: Mutex<State<T>>,
}

/// See the module's documentation.
struct State<T> {
    values: VecDeque<T>,
    /// To whom, and what: in the order of the tickets, since receivers are served in it.
    given: VecDeque<(Ticket, T)>,
    senders: WaitQueue<(Waker, T)>,
    receivers: WaitQueue<Waker>,
    senders_live: usize,
    receivers_live: usize,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_send(&self, value: T) -> Result<(), TrySendError<T>> {
        let mut state = self.lock();
        if state.receivers_live == 0 {
            return Err(TrySendError::Disconnected(value));
        }
        if let Some((ticket, receiver)) = state.receivers.pop() {
            state.given.push_back((ticket, value));
            drop(state);
            receiver.wake();
            return Ok(());
        }
        if state.values.len() >= self.capacity {
            return Err(TrySendError::Full(value));
        }
        state.values.push_back(value);
        Ok(())
    }

    fn try_recv(&self) -> Result<T, TryRecvError> {
        let mut state = self.lock();
        let first = state.values.pop_front();
        let sender = state.senders.pop();
        let disconnected = state.senders_live == 0;
        let (first, waker) = match (first, sender) {
            (Some(first), Some((_, (waker, value)))) => {
                state.values.push_back(value);
                (first, waker)
            }
            (None, Some((_, (waker, value)))) => (value, waker),
            (Some(first), None) => return Ok(first),
            (None, None) if disconnected => return Err(TryRecvError::Disconnected),
            (None, None) => return Err(TryRecvError::Empty),
        };
        drop(state);
        waker.wake();
        Ok(first)
    }
}

/// The sending end of a [`channel`]. Clones send into the same channel.
pub struct Sender<T>(Arc<Shared<T>>);

/// The receiving end of a [`channel`]. Clones take from the same channel, each value goes to one of them.
pub struct Receiver<T>(Arc<Shared<T>>);

impl<T> Sender<T> {
    /// Puts a value into the channel. While it is full, the caller waits.
    ///
    /// # Errors
    ///
    /// Both give the value back.
    /// - [`SendError::Disconnected`]: all receivers are gone.
    /// - [`SendError::Interrupted`], only where it would have to wait: with `Cancelled`, `Shutdown`, `Timeout` (of an enclosing
    ///   [`timeout`](crate::timeout)), or `EAGAIN` in a destructor that runs because the fiber panics.
    ///
    /// ```
    /// let (sender, receiver) = ringsock::channel(1);
    /// sender.send("hello")?;
    /// assert_eq!(receiver.recv()?, "hello");
    /// drop(receiver);
    /// assert_eq!(sender.send("lost").unwrap_err().into_inner(), "lost");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn send(&self, value: T) -> Result<(), SendError<T>> {
        let mut value = value;
        loop {
            value = match self.0.try_send(value) {
                Ok(()) => {
                    fiber::count_unwaited_call();
                    return Ok(());
                }
                Err(TrySendError::Disconnected(value)) => {
                    return Err(SendError::Disconnected(value));
                }
                Err(TrySendError::Full(value)) => value,
            };
            let parking = Parking::new();
            let mut state = self.0.lock();
            let room = state.values.len() < self.0.capacity || !state.receivers.is_empty();
            if room || state.receivers_live == 0 {
                continue;
            }
            let ticket = state.senders.push((parking.waker(), value));
            drop(state);
            let ended = parking.wait();
            let Some((_, unsent)) = self.0.lock().senders.remove(ticket) else {
                return Ok(());
            };
            value = unsent;
            // Woken with the value still there: disconnected, which the next try tells.
            if let Err(error) = ended.check() {
                return Err(SendError::Interrupted(value, error));
            }
        }
    }

    /// Puts a value into the channel if there is room. It never waits.
    ///
    /// # Errors
    ///
    /// [`TrySendError::Full`] and [`TrySendError::Disconnected`] give the value back.
    ///
    /// ```
    /// let (sender, _receiver) = ringsock::channel(1);
    /// sender.try_send(1)?;
    /// assert_eq!(sender.try_send(2).unwrap_err().into_inner(), 2);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn try_send(&self, value: T) -> Result<(), TrySendError<T>> {
        self.0.try_send(value)
    }
}

impl<T> Receiver<T> {
    /// Takes the next value out of the channel. While there is none, the caller waits.
    ///
    /// # Errors
    ///
    /// - [`RecvError::Disconnected`]: nothing is left and all senders are gone.
    /// - [`RecvError::Interrupted`], only where it would have to wait: with `Cancelled`, `Shutdown`, `Timeout` (of an enclosing
    ///   [`timeout`](crate::timeout)), or `EAGAIN` in a destructor that runs because the fiber panics. No value is lost by it.
    ///
    /// ```
    /// let (_sender, receiver) = ringsock::channel::<()>(1);
    /// let result = ringsock::timeout(0.01, || Ok(receiver.recv()?));
    /// assert_eq!(result, Err(ringsock::Error::Timeout));
    /// ```
    pub fn recv(&self) -> Result<T, RecvError> {
        loop {
            match self.0.try_recv() {
                Ok(value) => {
                    fiber::count_unwaited_call();
                    return Ok(value);
                }
                Err(TryRecvError::Disconnected) => return Err(RecvError::Disconnected),
                Err(TryRecvError::Empty) => {}
            }
            let parking = Parking::new();
            let mut state = self.0.lock();
            if !state.values.is_empty() || !state.senders.is_empty() || state.senders_live == 0 {
                continue;
            }
            let ticket = state.receivers.push(parking.waker());
            drop(state);
            let ended = parking.wait();
            let mut state = self.0.lock();
            let given = state
                .given
                .binary_search_by_key(&ticket, |(ticket, _)| *ticket);
            if let Ok(index) = given
                && let Some((_, value)) = state.given.remove(index)
            {
                return Ok(value);
            }
            state.receivers.remove(ticket);
            drop(state);
            // Woken with nothing given: disconnected, which the next try tells.
            ended.check().map_err(RecvError::Interrupted)?;
        }
    }

    /// Takes the next value out of the channel if there is one. It never waits.
    ///
    /// # Errors
    ///
    /// [`TryRecvError::Empty`]; [`TryRecvError::Disconnected`]: nothing is left and all senders are gone.
    ///
    /// ```
    /// let (sender, receiver) = ringsock::channel(1);
    /// assert_eq!(receiver.try_recv(), Err(ringsock::TryRecvError::Empty));
    /// sender.send(7)?;
    /// assert_eq!(receiver.try_recv(), Ok(7));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn try_recv(&self) -> Result<T, TryRecvError> {
        self.0.try_recv()
    }

    /// The values as they come, to the end: until the channel is disconnected, or [`recv`](Receiver::recv) is interrupted.
    ///
    /// ```
    /// let (sender, receiver) = ringsock::channel(3);
    /// (1..=3).try_for_each(|n| sender.send(n))?;
    /// drop(sender);
    /// assert_eq!(receiver.iter().collect::<Vec<_>>(), [1, 2, 3]);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn iter(&self) -> Iter<'_, T> {
        Iter(self)
    }

    /// Whether a value may still come, and none is there.
    pub(crate) fn is_pending(&self) -> bool {
        let state = self.0.lock();
        state.values.is_empty() && state.senders_live > 0
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Sender<T> {
        self.0.lock().senders_live += 1;
        Sender(self.0.clone())
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Receiver<T> {
        self.0.lock().receivers_live += 1;
        Receiver(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.senders_live -= 1;
        if state.senders_live > 0 {
            return;
        }
        let receivers = state.receivers.take();
        drop(state);
        receivers.for_each(Waker::wake);
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.receivers_live -= 1;
        if state.receivers_live > 0 {
            return;
        }
        let values = std::mem::take(&mut state.values);
        // Their values stay where they are: each takes its own back.
        let senders: Vec<Waker> = state
            .senders
            .iter()
            .map(|(waker, _)| waker.clone())
            .collect();
        drop(state);
        senders.into_iter().for_each(Waker::wake);
        drop(values);
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").finish_non_exhaustive()
    }
}

/// The values of a [`Receiver`] that is borrowed; see [`Receiver::iter`].
#[derive(Debug)]
pub struct Iter<'a, T>(&'a Receiver<T>);

/// The values of a [`Receiver`]; see [`Receiver::iter`].
#[derive(Debug)]
pub struct IntoIter<T>(Receiver<T>);

impl<T> Iterator for Iter<'_, T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        self.0.recv().ok()
    }
}

impl<T> Iterator for IntoIter<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        self.0.recv().ok()
    }
}

impl<'a, T> IntoIterator for &'a Receiver<T> {
    type Item = T;
    type IntoIter = Iter<'a, T>;

    fn into_iter(self) -> Iter<'a, T> {
        self.iter()
    }
}

impl<T> IntoIterator for Receiver<T> {
    type Item = T;
    type IntoIter = IntoIter<T>;

    fn into_iter(self) -> IntoIter<T> {
        IntoIter(self)
    }
}

/// Why [`Sender::send`] failed, with the value. As an [`Error`], `Disconnected` is EPIPE.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SendError<T> {
    /// All receivers are gone.
    Disconnected(T),
    /// The wait for room was interrupted.
    Interrupted(T, Error),
}

/// Why [`Sender::try_send`] failed, with the value. As an [`Error`], `Full` is EAGAIN and `Disconnected` is EPIPE.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrySendError<T> {
    /// There is no room just now.
    Full(T),
    /// All receivers are gone.
    Disconnected(T),
}

/// Why [`Receiver::recv`] failed. As an [`Error`], `Disconnected` is EPIPE.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum RecvError {
    /// Nothing is left and all senders are gone.
    Disconnected,
    /// The wait for a value was interrupted.
    Interrupted(Error),
}

/// Why [`Receiver::try_recv`] failed. As an [`Error`], `Empty` is EAGAIN and `Disconnected` is EPIPE.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum TryRecvError {
    /// There is no value just now.
    Empty,
    /// Nothing is left and all senders are gone.
    Disconnected,
}

impl<T> SendError<T> {
    /// The value that was not sent.
    pub fn into_inner(self) -> T {
        match self {
            SendError::Disconnected(value) | SendError::Interrupted(value, _) => value,
        }
    }
}

impl<T> TrySendError<T> {
    /// The value that was not sent.
    pub fn into_inner(self) -> T {
        match self {
            TrySendError::Full(value) | TrySendError::Disconnected(value) => value,
        }
    }
}

const DISCONNECTED: &str = "the other end of the channel is gone";

impl<T> fmt::Display for SendError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SendError::Disconnected(_) => f.write_str(DISCONNECTED),
            SendError::Interrupted(_, error) => error.fmt(f),
        }
    }
}

impl<T> fmt::Display for TrySendError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TrySendError::Full(_) => "the channel is full",
            TrySendError::Disconnected(_) => DISCONNECTED,
        })
    }
}

impl fmt::Display for RecvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecvError::Disconnected => f.write_str(DISCONNECTED),
            RecvError::Interrupted(error) => error.fmt(f),
        }
    }
}

impl fmt::Display for TryRecvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TryRecvError::Empty => "the channel is empty",
            TryRecvError::Disconnected => DISCONNECTED,
        })
    }
}

// The value may have no Debug of its own.
impl<T> fmt::Debug for SendError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SendError::Disconnected(_) => f.write_str("Disconnected(..)"),
            SendError::Interrupted(_, error) => write!(f, "Interrupted(.., {error:?})"),
        }
    }
}

impl<T> fmt::Debug for TrySendError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TrySendError::Full(_) => "Full(..)",
            TrySendError::Disconnected(_) => "Disconnected(..)",
        })
    }
}

impl<T> std::error::Error for SendError<T> {}
impl<T> std::error::Error for TrySendError<T> {}
impl std::error::Error for RecvError {}
impl std::error::Error for TryRecvError {}

impl<T> From<SendError<T>> for Error {
    fn from(error: SendError<T>) -> Error {
        match error {
            SendError::Disconnected(_) => Error::from_errno(libc::EPIPE),
            SendError::Interrupted(_, error) => error,
        }
    }
}

impl<T> From<TrySendError<T>> for Error {
    fn from(error: TrySendError<T>) -> Error {
        Error::from_errno(match error {
            TrySendError::Full(_) => libc::EAGAIN,
            TrySendError::Disconnected(_) => libc::EPIPE,
        })
    }
}

impl From<RecvError> for Error {
    fn from(error: RecvError) -> Error {
        match error {
            RecvError::Disconnected => Error::from_errno(libc::EPIPE),
            RecvError::Interrupted(error) => error,
        }
    }
}

impl From<TryRecvError> for Error {
    fn from(error: TryRecvError) -> Error {
        Error::from_errno(match error {
            TryRecvError::Empty => libc::EAGAIN,
            TryRecvError::Disconnected => libc::EPIPE,
        })
    }
}
