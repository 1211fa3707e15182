//! The operations in flight through one socket object, and how closing ends them.
//!
//! Almost always one worker works on a socket, with at most one receive and one send at a time. So the first worker to use it
//! owns two fields, one per direction, which only its thread writes: registering an operation costs one plain store, no
//! atomic read-modify-write. Everybody else (other workers, plain threads, a second receive) registers in a list behind a
//! lock.
//!
//! # The life of a closing socket
//!
//! ```text
//!  closer                                    owner worker                         others (threads, workers)
//!  1. closed = true (the first one goes on)
//!  2. dup3(O_PATH, fd): later uses of the
//!     number answer EBADF, at submission too
//!  3. lock; cancel each listed operation ───────────────────────────────────────▶ ASYNC_CANCEL by key,
//!     and, if there is an owner, send ──────▶ cancels the keys in its two fields,   wait for its own CQE,
//!                                             or says at once: nothing in flight    unregister, tell closers
//!  4. park until the list is empty    ◀────── its waiter, after its CQE, clears
//!     and the owner is done                   the field and tells the closers
//!  5. return: the last reference to the file is gone, the peer has its FIN
//! ```
//!
//! A standing poll of the socket (`fiber/watch.rs`) is the owner's too: it ends in step 3, and step 4 is over once it has.
//!
//! An operation registered after step 3 was submitted after step 2, so the kernel answers it with EBADF. Cancelling is by key,
//! never by descriptor: duplicates and forked children share the open file.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::park::{Parking, Waker};
use super::remote::{Control, Remote};
use super::scheduler::Worker;
use crate::driver::{Key, WatchId};
use crate::sys;

/// Which of the owner's two fields an operation goes into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    /// recv, accept.
    In = 0,
    /// send, connect.
    Out = 1,
}

/// Where an operation was registered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    Owner,
    Others,
}

/// See the module's documentation.
#[repr(C)]
pub(crate) struct InFlight {
    /// The owner's id, 0 while there is none.
    owner: AtomicU32,
    closed: AtomicBool,
    /// The socket is not to be watched.
    unwatchable: AtomicBool,
    /// Without a watch, receives of the owner's that waited; with one, how many may come at a bad time for it.
    waits: AtomicU8,
    /// Keys of the owner's operations, by direction, or NONE. Written by the owner's thread only.
    keys: [AtomicU64; 2],
    /// The owner's watch of the socket, or 0. Written by the owner's thread only.
    watch: AtomicU64,
    owner_remote: OnceLock<Arc<Remote>>,
    rest: Mutex<Rest>,
}

#[derive(Default)]
struct Rest {
    others: Vec<(Arc<Remote>, Key)>,
    /// The owner has not yet said that nothing of its is in flight.
    owner_pending: bool,
    closers: Vec<Waker>,
}

impl InFlight {
    pub(crate) const fn new() -> InFlight {
        InFlight {
            closed: AtomicBool::new(false),
            owner: AtomicU32::new(0),
            keys: [AtomicU64::new(Key::NONE.0), AtomicU64::new(Key::NONE.0)],
            watch: AtomicU64::new(0),
            waits: AtomicU8::new(0),
            unwatchable: AtomicBool::new(false),
            owner_remote: OnceLock::new(),
            rest: Mutex::new(Rest {
                others: Vec::new(),
                owner_pending: false,
                closers: Vec::new(),
            }),
        }
    }

    fn rest(&self) -> MutexGuard<'_, Rest> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rest_after_fork(&self) -> Option<MutexGuard<'_, Rest>> {
        sys::lock_after_fork(&self.rest)
    }

    /// Runs a short call that needs the descriptor's flags to stay what they are, or changes them, while no other such call runs.
    pub(crate) fn exclusively<R>(&self, call: impl FnOnce() -> R) -> R {
        let _rest = self.rest_after_fork();
        call()
    }

    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Whether the worker owns the two fields, and the watch.
    #[inline(always)]
    pub(crate) fn is_owned_by(&self, worker: &Worker) -> bool {
        self.owner.load(Ordering::Relaxed) == worker.id()
    }

    /// The owner, once there is one.
    pub(crate) fn owner_remote(&self) -> Option<&Arc<Remote>> {
        self.owner_remote.get()
    }

    /// The owner's watch of the socket.
    #[inline(always)]
    pub(crate) fn watch(&self) -> Option<WatchId> {
        match self.watch.load(Ordering::Relaxed) {
            0 => None,
            id => Some(WatchId(id)),
        }
    }

    /// On the owner's thread.
    pub(crate) fn set_watch(&self, id: Option<WatchId>) {
        self.watch.store(id.map_or(0, |id| id.0), Ordering::Relaxed);
    }

    /// On the owner's thread: a receive waits. How many have.
    pub(crate) fn count_wait(&self) -> u8 {
        let waits = self.waits.load(Ordering::Relaxed).saturating_add(1);
        self.waits.store(waits, Ordering::Relaxed);
        waits
    }

    /// On the owner's thread: a receive comes at a bad time for the watch. How many may still do so.
    pub(crate) fn count_busy(&self) -> u8 {
        let left = self.waits.load(Ordering::Relaxed).saturating_sub(1);
        self.waits.store(left, Ordering::Relaxed);
        left
    }

    /// On the owner's thread: receives count from here on.
    pub(crate) fn set_waits(&self, waits: u8) {
        self.waits.store(waits, Ordering::Relaxed);
    }

    /// From now on events do not tell enough of the socket: no watch begins, and one there is is not used any more.
    #[cold]
    pub(crate) fn never_watch(&self) {
        self.unwatchable.store(true, Ordering::Relaxed);
    }

    /// Whether events tell all there is to know of the socket.
    #[inline(always)]
    pub(crate) fn is_watchable(&self) -> bool {
        !self.unwatchable.load(Ordering::Relaxed)
    }

    /// Registers a worker's operation, before its submission.
    #[inline(always)]
    pub(crate) fn enter(&self, worker: &Worker, key: Key, direction: Direction) -> Place {
        let field = &self.keys[direction as usize];
        if self.owner.load(Ordering::Relaxed) == worker.id()
            && field.load(Ordering::Relaxed) == Key::NONE.0
        {
            field.store(key.0, Ordering::Relaxed);
            return Place::Owner;
        }
        self.enter_rest(worker, key, direction)
    }

    #[cold]
    #[inline(never)]
    fn enter_rest(&self, worker: &Worker, key: Key, direction: Direction) -> Place {
        {
            // Under the lock, so that a closer either finds the owner or has buried the descriptor before this submission.
            let _rest = self.rest();
            if self.owner.load(Ordering::Relaxed) == 0 {
                let _ = self.owner_remote.set(worker.remote().clone());
                self.owner.store(worker.id(), Ordering::Relaxed);
                self.keys[direction as usize].store(key.0, Ordering::Relaxed);
                return Place::Owner;
            }
        }
        self.enter_other(worker.remote(), key);
        Place::Others
    }

    /// Registers an operation of a thread that cannot own the socket, before its submission.
    pub(crate) fn enter_other(&self, remote: &Arc<Remote>, key: Key) {
        self.rest().others.push((remote.clone(), key));
    }

    /// The operation has completed.
    #[inline(always)]
    pub(crate) fn leave(&self, worker: &Worker, place: Place, key: Key, direction: Direction) {
        if place == Place::Owner {
            self.keys[direction as usize].store(Key::NONE.0, Ordering::Relaxed);
            if self.is_closed() {
                self.owner_left();
            }
        } else {
            self.leave_other(worker.remote(), key);
        }
    }

    /// The operation of [`enter_other`](InFlight::enter_other) has completed.
    #[cold]
    #[inline(never)]
    pub(crate) fn leave_other(&self, remote: &Arc<Remote>, key: Key) {
        let mut rest = self.rest();
        // Keys are unique to a ring only.
        let entry = rest
            .others
            .iter()
            .position(|(other, other_key)| other.id() == remote.id() && *other_key == key);
        if let Some(index) = entry {
            rest.others.swap_remove(index);
        }
        self.tell_closers(rest);
    }

    /// On the owner's thread, after a close: done once both fields are empty and the watch has ended.
    #[cold]
    #[inline(never)]
    fn owner_left(&self) {
        if self
            .keys
            .iter()
            .all(|key| key.load(Ordering::Relaxed) == Key::NONE.0)
            && self.watch().is_none()
        {
            let mut rest = self.rest();
            rest.owner_pending = false;
            self.tell_closers(rest);
        }
    }

    fn tell_closers(&self, mut rest: MutexGuard<'_, Rest>) {
        if rest.others.is_empty() && !rest.owner_pending {
            let closers = std::mem::take(&mut rest.closers);
            drop(rest);
            closers.into_iter().for_each(Waker::wake);
        }
    }
}

/// On the owner's thread: cancels what is in flight there.
fn cancel_own<S>(socket: &Arc<S>, worker: &Worker)
where
    S: AsRef<InFlight> + 'static,
{
    let inflight: &InFlight = (**socket).as_ref();
    worker.settle();
    for key in &inflight.keys {
        worker.cancel(Key(key.load(Ordering::Relaxed)));
    }
    if let Some(id) = inflight.watch() {
        if worker.end_watch(id) {
            inflight.set_watch(None);
        } else {
            let socket = socket.clone();
            worker.when_watch_gone(id, move || {
                let inflight: &InFlight = (*socket).as_ref();
                inflight.set_watch(None);
                inflight.owner_left();
            });
        }
    }
    inflight.owner_left();
}

/// Says that the owner has nothing in flight, if it never came to look.
struct TellWhenDropped<S: AsRef<InFlight>>(Arc<S>, bool);

impl<S: AsRef<InFlight>> TellWhenDropped<S> {
    /// The owner looked.
    fn read(mut self) {
        self.1 = true;
    }
}

impl<S: AsRef<InFlight>> Drop for TellWhenDropped<S> {
    fn drop(&mut self) {
        if self.1 {
            return;
        }
        let inflight: &InFlight = (*self.0).as_ref();
        let mut rest = inflight.rest();
        rest.owner_pending = false;
        inflight.tell_closers(rest);
    }
}

/// Closes a socket object: marks it, lets `bury` put something else under its descriptor, ends the operations in flight
/// through it and waits for them. False if it was closed before.
///
/// A fiber that is interrupted, or panicking, does not wait; the operations end all the same.
pub(crate) fn close<S>(socket: &Arc<S>, bury: impl FnOnce()) -> bool
where
    S: AsRef<InFlight> + Send + Sync + 'static,
{
    let inflight: &InFlight = (**socket).as_ref();
    if inflight.closed.swap(true, Ordering::SeqCst) {
        return false;
    }
    bury();
    let Some(mut rest) = inflight.rest_after_fork() else {
        return true;
    };
    // What a forked child finds here of its parent's is not the child's to cancel.
    rest.others.retain(|(remote, _)| remote.is_ours());
    let owner = inflight.owner_remote.get().filter(|owner| owner.is_ours());
    rest.owner_pending = owner.is_some();
    let others: Vec<(Arc<Remote>, Key)> = rest.others.clone();
    drop(rest);
    for (remote, key) in others {
        if remote.send(Control::CancelOperation(key)).is_err() {
            // A thread that has ended has reaped its operations, or leaked them with their fibers.
            inflight.leave_other(&remote, key);
        }
    }
    if let Some(owner) = owner {
        match super::worker() {
            Some(worker) if worker.id() == owner.id() => cancel_own(socket, worker),
            _ => {
                let unread = TellWhenDropped(socket.clone(), false);
                // Read or dropped unread (then the owner has ended, and nothing of its is in flight): the closers hear of it.
                let _ = owner.send(Control::Run(Box::new(move |worker| {
                    cancel_own(&unread.0, worker);
                    unread.read();
                })));
            }
        }
    }
    loop {
        let parking = {
            let rest = inflight.rest();
            if rest.others.is_empty() && !rest.owner_pending {
                return true;
            }
            drop(rest);
            Parking::new()
        };
        let mut rest = inflight.rest();
        if rest.others.is_empty() && !rest.owner_pending {
            return true;
        }
        rest.closers.push(parking.waker());
        drop(rest);
        if parking.park().is_err() {
            return true;
        }
    }
}
