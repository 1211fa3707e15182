//! Starting fibers and learning how they ended.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::fellow::Fellow;
use super::park::{Parking, Waker};
use super::remote::{Control, Remote};
use super::scheduler::{Worker, no_room};
use super::{FiberRef, FiberUnwind, current};
use crate::error::{Error, Result};
use crate::log::log;

/// Why a fiber has no result.
#[non_exhaustive]
pub enum JoinError {
    /// It panicked: the payload, as from [`std::thread::JoinHandle::join`].
    Panic(Box<dyn Any + Send + 'static>),
    /// The runtime ended it (or never started it) at shutdown.
    Shutdown,
    /// It could not be started on its worker: `ENOMEM`, no memory for its stack.
    NotStarted(Error),
    /// It was not the fiber but the waiting that ended: the joining fiber was interrupted, or a deadline passed. The fiber
    /// goes on, detached.
    Interrupted(Error),
}

impl JoinError {
    /// The payload of the panic, if that is what happened.
    ///
    /// ```
    /// let error = ringsock::run(|| ringsock::spawn(|| panic!("lost")).join().unwrap_err());
    /// assert_eq!(error.into_panic().unwrap().downcast_ref(), Some(&"lost"));
    /// ```
    pub fn into_panic(self) -> Option<Box<dyn Any + Send + 'static>> {
        match self {
            JoinError::Panic(payload) => Some(payload),
            _ => None,
        }
    }
}

impl fmt::Debug for JoinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            JoinError::Panic(payload) => f
                .debug_tuple("Panic")
                .field(&panic_text(&**payload))
                .finish(),
            JoinError::Shutdown => f.write_str("Shutdown"),
            JoinError::NotStarted(error) => f.debug_tuple("NotStarted").field(error).finish(),
            JoinError::Interrupted(error) => f.debug_tuple("Interrupted").field(error).finish(),
        }
    }
}

impl fmt::Display for JoinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            JoinError::Panic(payload) => {
                write!(f, "what was joined panicked: {}", panic_text(&**payload))
            }
            JoinError::Shutdown => f.write_str("the runtime ended before the fiber did"),
            JoinError::NotStarted(error) => write!(f, "the fiber could not be started: {error}"),
            JoinError::Interrupted(error) => {
                write!(f, "waiting for the fiber was interrupted: {error}")
            }
        }
    }
}

impl std::error::Error for JoinError {}

impl From<JoinError> for Error {
    /// So that `?` takes it: a panic becomes a message with its text, the others what they are.
    ///
    /// ```
    /// fn sum() -> ringsock::Result<i32> {
    ///     let fiber = ringsock::spawn(|| 1 + 2);
    ///     Ok(fiber.join()?)
    /// }
    /// assert_eq!(ringsock::run(sum)?, 3);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    fn from(error: JoinError) -> Error {
        match error {
            JoinError::Panic(_) => Error::Message(error.to_string().into()),
            JoinError::Shutdown => Error::Shutdown,
            JoinError::NotStarted(error) | JoinError::Interrupted(error) => error,
        }
    }
}

pub(super) fn panic_text(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(a payload that is no text)")
}

/// A fiber's result on its way to the handle.
struct Packet<T> {
    state: Mutex<PacketState<T>>,
    /// The fiber's id and slot, once it exists; the id is 0 before. `cancelled` is set before the id is read, and read after
    /// the id is set: whichever of `cancel` and `start` comes second finds what the first left.
    id: AtomicU64,
    slot: AtomicU32,
    cancelled: AtomicBool,
}

struct PacketState<T> {
    outcome: Outcome<T>,
    joiner: Option<Waker>,
}

enum Outcome<T> {
    Pending,
    Ended(std::result::Result<T, JoinError>),
    /// Taken by `join`.
    Taken,
    /// The handle is gone: nobody wants the result.
    Detached,
}

/// Told about a fiber that will never end.
pub(super) trait Abandon {
    fn abandon(&self);
}

impl<T> Packet<T> {
    fn new() -> Packet<T> {
        Packet {
            state: Mutex::new(PacketState {
                outcome: Outcome::Pending,
                joiner: None,
            }),
            id: AtomicU64::new(0),
            slot: AtomicU32::new(0),
            cancelled: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, PacketState<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores the result for the handle; without a handle it is dropped here, on the fiber's stack, and a panic logged.
    fn end(&self, result: std::result::Result<T, JoinError>) {
        let mut state = self.lock();
        match state.outcome {
            Outcome::Detached => {
                drop(state);
                if let Err(JoinError::Panic(payload)) = &result {
                    let fiber = current().map(|(_, fiber)| fiber);
                    let name = fiber.as_ref().and_then(|fiber| fiber.name());
                    log(format_args!(
                        "a fiber that nobody joins ('{}') panicked: {}",
                        name.unwrap_or("unnamed"),
                        panic_text(&**payload)
                    ));
                }
            }
            _ => {
                state.outcome = Outcome::Ended(result);
                let joiner = state.joiner.take();
                drop(state);
                if let Some(joiner) = joiner {
                    joiner.wake();
                }
            }
        }
    }
}

impl<T> Abandon for Packet<T> {
    fn abandon(&self) {
        let mut state = self.lock();
        if matches!(state.outcome, Outcome::Pending) {
            state.outcome = Outcome::Ended(Err(JoinError::Shutdown));
            let joiner = state.joiner.take();
            drop(state);
            if let Some(joiner) = joiner {
                joiner.wake();
            }
        }
    }
}

/// The handle of a fiber. Dropping it detaches the fiber: it goes on, and its result is dropped when it ends.
///
/// A handle works in any fiber and on any thread.
pub struct JoinHandle<T> {
    packet: Arc<Packet<T>>,
    remote: Arc<Remote>,
}

impl<T> JoinHandle<T> {
    /// Waits for the fiber to end: its result. The caller, fiber or thread, blocks meanwhile.
    ///
    /// # Errors
    ///
    /// - [`JoinError::Panic`]: the fiber panicked.
    /// - [`JoinError::Shutdown`]: the runtime ended first and with it the fiber.
    /// - [`JoinError::NotStarted`]: no memory for the fiber's stack on another worker.
    /// - [`JoinError::Interrupted`]: the *joining* fiber was cancelled, its runtime is ending, or the deadline of an
    ///   enclosing [`timeout`](crate::timeout) passed. The fiber goes on, detached.
    ///
    /// # Source
    ///
    /// [`std::thread::JoinHandle::join`]; Python `threading.Thread.join`.
    ///
    /// ```
    /// let sum = ringsock::run(|| {
    ///     let fibers: Vec<_> = (1..=10).map(|n| ringsock::spawn(move || n)).collect();
    ///     fibers.into_iter().map(|fiber| fiber.join().unwrap()).sum::<i32>()
    /// });
    /// assert_eq!(sum, 55);
    /// ```
    pub fn join(self) -> std::result::Result<T, JoinError> {
        loop {
            {
                let mut state = self.packet.lock();
                if let Outcome::Ended(_) = state.outcome {
                    let outcome = std::mem::replace(&mut state.outcome, Outcome::Taken);
                    drop(state);
                    let Outcome::Ended(result) = outcome else {
                        unreachable!("checked under the same lock");
                    };
                    return result;
                }
            }
            let parking = Parking::new();
            {
                let mut state = self.packet.lock();
                if matches!(state.outcome, Outcome::Ended(_)) {
                    continue;
                }
                state.joiner = Some(parking.waker());
            }
            if let Err(error) = parking.park() {
                if matches!(self.packet.lock().outcome, Outcome::Ended(_)) {
                    continue;
                }
                return Err(JoinError::Interrupted(error));
            }
        }
    }

    /// Interrupts the fiber: the call it waits in, and every later call of it that may wait (all but those of sockets in
    /// non-blocking mode), fails with [`Error::Cancelled`]. What the interrupted call has already transferred is reported as
    /// always. It is for good: the fiber can clean up, but no longer wait for anything.
    ///
    /// ```
    /// let waited = ringsock::run(|| {
    ///     let fiber = ringsock::spawn(|| ringsock::sleep(None));
    ///     ringsock::yield_now();
    ///     fiber.cancel();
    ///     fiber.join().unwrap()
    /// });
    /// assert_eq!(waited, Err(ringsock::Error::Cancelled));
    /// ```
    pub fn cancel(&self) {
        self.packet.cancelled.store(true, Ordering::SeqCst);
        let id = self.packet.id.load(Ordering::SeqCst);
        // A fiber that does not exist yet finds `cancelled` when it starts.
        if id != 0 {
            let slot = self.packet.slot.load(Ordering::Relaxed);
            match super::worker() {
                Some(worker) if worker.id() == self.remote.id() => worker.cancel_fiber(slot, id),
                // A worker that has ended has no fibers.
                _ => drop(self.remote.send(Control::CancelFiber { slot, id })),
            }
        }
    }

    /// The fiber's name for the others of its worker. It was made on the calling fiber's worker.
    pub(crate) fn fellow(&self) -> Fellow {
        Fellow {
            slot: self.packet.slot.load(Ordering::Relaxed),
            id: self.packet.id.load(Ordering::Relaxed),
        }
    }

    /// Whether the fiber has ended.
    ///
    /// ```
    /// ringsock::run(|| {
    ///     let fiber = ringsock::spawn(|| ());
    ///     assert!(!fiber.is_finished());
    ///     ringsock::yield_now();
    ///     assert!(fiber.is_finished());
    /// });
    /// ```
    pub fn is_finished(&self) -> bool {
        matches!(self.packet.lock().outcome, Outcome::Ended(_))
    }
}

impl<T> Drop for JoinHandle<T> {
    fn drop(&mut self) {
        let mut state = self.packet.lock();
        let outcome = std::mem::replace(&mut state.outcome, Outcome::Detached);
        state.joiner = None;
        drop(state);
        if let Outcome::Ended(Err(JoinError::Panic(payload))) = &outcome {
            log(format_args!(
                "a fiber that nobody joins panicked: {}",
                panic_text(&**payload)
            ));
        }
    }
}

impl<T> fmt::Debug for JoinHandle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinHandle")
            .field("finished", &self.is_finished())
            .finish_non_exhaustive()
    }
}

/// Runs a fiber's closure to its end and delivers the result: the root of every fiber. The closure, its captures and, if
/// nobody waits, its result are dropped here, on the fiber's own stack.
fn root<F, T>(main: F, packet: &Packet<T>)
where
    F: FnOnce() -> T,
{
    let result = catch_unwind(AssertUnwindSafe(main)).map_err(|payload| {
        if payload.is::<FiberUnwind>() {
            JoinError::Shutdown
        } else {
            JoinError::Panic(payload)
        }
    });
    // Dropping a result nobody wants may panic as well; that must not reach the root.
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| packet.end(result)))
        && !payload.is::<FiberUnwind>()
    {
        log(format_args!(
            "dropping the result of a fiber panicked: {}",
            panic_text(&*payload)
        ));
    }
}

/// Makes a fiber on this worker, whose thread this is.
fn start<F, T>(
    worker: &Worker,
    name: Option<Box<str>>,
    main: F,
    packet: &Arc<Packet<T>>,
) -> Result<()>
where
    F: FnOnce() -> T + 'static,
    T: 'static,
{
    let for_root = packet.clone();
    let abandon: Arc<dyn Abandon> = packet.clone();
    let fiber: FiberRef =
        super::create(worker, name, Some(abandon), move || root(main, &for_root))?;
    packet.slot.store(fiber.slot, Ordering::Relaxed);
    packet.id.store(fiber.id, Ordering::SeqCst);
    worker.make_ready(fiber);
    if packet.cancelled.load(Ordering::SeqCst) {
        worker.cancel_fiber(fiber.slot, fiber.id);
    }
    Ok(())
}

/// Settings of a fiber to be made.
///
/// ```
/// ringsock::run(|| {
///     let fiber = ringsock::Builder::new().name("greeter").spawn(|| "hello")?;
///     assert_eq!(fiber.join().unwrap(), "hello");
///     Ok::<(), ringsock::Error>(())
/// })?;
/// # Ok::<(), ringsock::Error>(())
/// ```
#[derive(Debug, Default)]
#[must_use = "a builder makes no fiber before `spawn`"]
pub struct Builder {
    name: Option<Box<str>>,
}

impl Builder {
    /// The defaults: no name.
    pub fn new() -> Builder {
        Builder::default()
    }

    /// Names the fiber, for messages about it (a stack overflow, a panic nobody joins).
    pub fn name(mut self, name: impl Into<String>) -> Builder {
        self.name = Some(name.into().into_boxed_str());
        self
    }

    /// Starts the fiber on the calling fiber's worker.
    ///
    /// # Errors
    ///
    /// - `EAGAIN`: the worker has as many fibers as it may
    ///   ([`max_fibers`](crate::RuntimeBuilder::max_fibers)).
    /// - `ENOMEM`: no memory for its stack.
    ///
    /// # Panics
    ///
    /// Outside a fiber.
    pub fn spawn<F, T>(self, main: F) -> Result<JoinHandle<T>>
    where
        F: FnOnce() -> T + 'static,
        T: 'static,
    {
        if let Some((worker, _)) = current()
            && !worker.has_room()
        {
            return Err(no_room(worker.fibers_max()));
        }
        self.spawn_anyway(main)
    }

    /// Starts the fiber whether there is room or not.
    fn spawn_anyway<F, T>(self, main: F) -> Result<JoinHandle<T>>
    where
        F: FnOnce() -> T + 'static,
        T: 'static,
    {
        let Some((worker, _)) = current() else {
            panic!(
                "spawn works in a fiber only: enter one with ringsock::run, or use Handle::spawn"
            );
        };
        let packet = Arc::new(Packet::new());
        start(worker, self.name, main, &packet)?;
        Ok(JoinHandle {
            packet,
            remote: worker.remote().clone(),
        })
    }
}

/// Starts a fiber on the calling fiber's worker. Neither the closure nor its result need be `Send`: it stays on this thread.
///
/// It runs when the caller next waits or yields. Dropping the handle detaches it. While the worker has as many fibers as it
/// may, the caller waits for one to end.
///
/// # Panics
///
/// Outside a fiber, and where there is no memory for its stack ([`Builder::spawn`] returns that as an error).
///
/// ```
/// ringsock::run(|| {
///     let shared = std::rc::Rc::new(std::cell::Cell::new(0));
///     let theirs = shared.clone();
///     ringsock::spawn(move || theirs.set(42)).join().unwrap();
///     assert_eq!(shared.get(), 42);
/// });
/// ```
pub fn spawn<F, T>(main: F) -> JoinHandle<T>
where
    F: FnOnce() -> T + 'static,
    T: 'static,
{
    match spawn_with_room(main) {
        Ok(handle) => handle,
        Err(error) => panic!("no fiber could be made: {error}"),
    }
}

/// [`spawn`] of a fiber that nobody joins, with its failure (ENOMEM) as an error.
pub(crate) fn spawn_when_possible(main: impl FnOnce() + 'static) -> Result<()> {
    spawn_with_room(main).map(drop)
}

/// Waits for room, then starts the fiber.
fn spawn_with_room<F, T>(main: F) -> Result<JoinHandle<T>>
where
    F: FnOnce() -> T + 'static,
    T: 'static,
{
    while let Some((worker, _)) = current()
        && !worker.has_room()
    {
        let parking = Parking::new();
        worker.wait_for_room(parking.waker());
        if parking.park().is_err() {
            // Interrupted, or panicking: one fiber more than asked for does less harm than waiting on.
            break;
        }
    }
    Builder::new().spawn_anyway(main)
}

/// Makes the first fiber of a worker that does not run yet.
pub(crate) fn start_first<F, T>(worker: &Worker, main: F) -> Result<JoinHandle<T>>
where
    F: FnOnce() -> T + 'static,
    T: 'static,
{
    let packet = Arc::new(Packet::new());
    start(worker, Some("main".into()), main, &packet)?;
    Ok(JoinHandle {
        packet,
        remote: worker.remote().clone(),
    })
}

/// Starts a fiber on another worker: it is made there.
pub(crate) fn spawn_remote<F, T>(remote: &Arc<Remote>, main: F) -> Result<JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    /// Tells the handle when the request is dropped unread, or no stack could be had.
    struct Undelivered<T>(Option<Arc<Packet<T>>>);
    impl<T> Drop for Undelivered<T> {
        fn drop(&mut self) {
            if let Some(packet) = &self.0 {
                packet.abandon();
            }
        }
    }

    let packet = Arc::new(Packet::new());
    let mut undelivered = Undelivered(Some(packet.clone()));
    remote.spawn(Box::new(move |worker: &Worker| {
        if let Some(packet) = undelivered.0.take()
            && let Err(error) = start(worker, None, main, &packet)
        {
            log(format_args!("no fiber could be made: {error}"));
            packet.end(Err(JoinError::NotStarted(error)));
        }
    }))?;
    // Put into a mailbox that nobody reads any more: whatever becomes of the closure, the handle is told.
    if remote.has_ended() {
        packet.abandon();
    }
    Ok(JoinHandle {
        packet,
        remote: remote.clone(),
    })
}
