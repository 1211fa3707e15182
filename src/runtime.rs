//! Runtimes: worker threads, where fibers go, serving, shutdown.
//!
//! ```text
//!   build() or run() ──▶ n workers, each a thread with its driver, its fibers, its mailbox
//!                              │ `run`'s closure returned, or the Runtime was dropped
//!                              ▼
//!   operations cancelled, calls answer Shutdown ──▶ fibers end ──▶ (grace over: they are unwound) ──▶ threads joined
//! ```
//!
//! It knows workers as mailboxes (`fiber/remote.rs`); what a worker does is in `fiber/scheduler.rs`.

use std::cell::RefCell;
use std::fmt;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use crossbeam_channel::bounded;

use crate::address::{Address, ToAddress};
use crate::constants::{
    AF_INET, AF_INET6, AF_UNIX, IPPROTO_TCP, SO_REUSEADDR, SO_REUSEPORT, SOCK_STREAM, SOL_SOCKET,
    TCP_NODELAY,
};
use crate::driver::features::{self, Features};
use crate::driver::{Config, Driver, DriverKind};
use crate::error::{Error, Result};
use crate::fiber::join::{JoinError, JoinHandle, spawn_remote};
use crate::fiber::overflow::SignalStack;
use crate::fiber::remote::{Control, Remote};
use crate::fiber::route::ZeroCopy;
use crate::fiber::scheduler::{Limits, Worker};
use crate::fiber::{self, Forecast, sleep, yield_now};
use crate::log::log;
use crate::metrics::{Counts, Metrics};
use crate::socket::Socket;
use crate::socket::back_off::BackOff;

/// How many connections may wait for `serve` to accept them.
const SERVE_BACKLOG: i32 = 1024;

thread_local! {
    /// The runtime of this thread, if it is a worker.
    static CURRENT: RefCell<Option<Handle>> = const { RefCell::new(None) };
}

struct WorkerEntry {
    remote: Arc<Remote>,
    counts: Arc<Counts>,
    features: Features,
}

struct Shared {
    workers: Vec<WorkerEntry>,
    next: AtomicUsize,
    stopping: AtomicBool,
}

impl Shared {
    fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        for worker in &self.workers {
            // A worker that has ended needs no telling.
            let _ = worker.remote.send(Control::Stop);
        }
    }
}

/// Runs `main` in a fiber, with the calling thread as the only worker: its result.
///
/// When `main` returns, the runtime ends: the calls of other fibers fail with [`Error::Shutdown`], and `run` returns once they
/// have ended. A fiber that goes on all the same is unwound after a grace period of one second
/// ([`shutdown_grace`](RuntimeBuilder::shutdown_grace) has the details). A panic in `main` goes on in the caller.
///
/// # Panics
///
/// In a fiber: a runtime does not fit into a runtime. And where the kernel gives neither a ring nor epoll, or not what was asked
/// for, with a sentence that says what to change ([`RuntimeBuilder::run`] returns it as an error).
///
/// # Fork
///
/// A child forked from a fiber or a thread (`fork(2)` without exec) has none of its parent's fibers and workers. Its calls block,
/// as on a plain thread, also on the sockets it inherited; it may call `run` for fibers of its own. It has to end by itself
/// (`std::process::exit`) rather than return from the fiber that forked it.
///
/// ```
/// let answer = ringsock::run(|| {
///     ringsock::sleep(0.001)?;
///     Ok::<i32, ringsock::Error>(42)
/// })?;
/// assert_eq!(answer, 42);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub fn run<T, F>(main: F) -> T
where
    F: FnOnce() -> T + 'static,
    T: 'static,
{
    match Runtime::builder().run(main) {
        Ok(result) => result,
        Err(error) => panic!("{error}"),
    }
}

/// Worker threads that run fibers. Dropping it ends them as at the end of [`run`], and waits for that (in one of its own fibers
/// it does not wait).
///
/// ```
/// use ringsock::Runtime;
///
/// let runtime = Runtime::builder().workers(2).build()?;
/// let fiber = runtime.handle().spawn(|| 6 * 7)?;
/// assert_eq!(fiber.join().unwrap(), 42);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub struct Runtime {
    handle: Handle,
    threads: Vec<WorkerThread>,
}

struct WorkerThread {
    thread: thread::JoinHandle<()>,
    /// Says when the worker has ended how many fibers it gave up.
    lost: crossbeam_channel::Receiver<usize>,
}

impl Runtime {
    /// Settings of a runtime to be made.
    pub fn builder() -> RuntimeBuilder {
        RuntimeBuilder::default()
    }

    /// A handle to reach the runtime from anywhere.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// What drives its workers.
    ///
    /// ```
    /// let runtime = ringsock::Runtime::builder().build()?;
    /// println!("running on {}", runtime.driver());
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn driver(&self) -> DriverKind {
        self.handle.driver()
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        self.handle.0.stop();
        let inside = CURRENT.with_borrow(|current| {
            current
                .as_ref()
                .is_some_and(|current| Arc::ptr_eq(&current.0, &self.handle.0))
        });
        if inside {
            return;
        }
        for WorkerThread { thread, lost } in self.threads.drain(..) {
            // A thread with fibers that were given up stays, as they do.
            if lost.recv().unwrap_or(0) == 0 {
                join_thread(thread);
            }
        }
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime")
            .field("workers", &self.handle.workers())
            .finish_non_exhaustive()
    }
}

fn join_thread(thread: thread::JoinHandle<()>) {
    if thread.join().is_err() {
        log(format_args!("a worker thread panicked"));
    }
}

/// Settings of a [`Runtime`].
#[derive(Clone, Debug)]
#[must_use = "a builder makes no runtime before `build` or `run`"]
pub struct RuntimeBuilder {
    workers: usize,
    config: Config,
    driver: Option<DriverKind>,
    limits: Limits,
}

impl Default for RuntimeBuilder {
    fn default() -> RuntimeBuilder {
        RuntimeBuilder {
            workers: 1,
            config: Config::worker(),
            driver: None,
            limits: Limits {
                stack_bytes: 256 * 1024,
                fibers_max: 1 << 20,
                spawns_max: 1024,
                grace: Duration::from_secs(1),
                spin: Duration::ZERO,
                buffers: (64, 64 * 1024),
                zero_copy: ZeroCopy::Adaptive,
            },
        }
    }
}

impl RuntimeBuilder {
    /// How many worker threads, at least 1 (the default). One a core is the most that helps.
    ///
    /// ```
    /// let runtime = ringsock::Runtime::builder().workers(2).build()?;
    /// assert_eq!(runtime.handle().workers(), 2);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn workers(mut self, workers: usize) -> RuntimeBuilder {
        self.workers = workers.max(1);
        self
    }

    /// Bytes of a fiber's stack: 256 KiB if not said, at least 16 KiB, at most 1 GiB. Only what a fiber touches takes memory, but
    /// each stack takes as much address space, which a worker keeps for later fibers. A fiber that overflows its stack ends
    /// the process, with a message that names the fiber.
    ///
    /// ```
    /// fn depth(levels: u32) -> u32 {
    ///     let frame = std::hint::black_box([1; 64]);
    ///     if levels == 0 { 0 } else { frame[0] + depth(levels - 1) }
    /// }
    /// let levels = ringsock::Runtime::builder()
    ///     .stack_size(16 << 20)
    ///     .run(|| depth(10_000))?;
    /// assert_eq!(levels, 10_000);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn stack_size(mut self, bytes: usize) -> RuntimeBuilder {
        self.limits.stack_bytes = bytes.min(1 << 30);
        self
    }

    /// How many fibers each worker may have, at least 1: 1,048,576 if not said. [`spawn`](crate::spawn) waits while there is no
    /// room, so fibers that all wait to spawn on a full worker wait for ever: leave room for those that others wait for.
    ///
    /// ```
    /// let refused = ringsock::Runtime::builder().max_fibers(2).run(|| {
    ///     let _second = ringsock::spawn(|| ());
    ///     ringsock::Builder::new().spawn(|| ()).unwrap_err().is_would_block()
    /// })?;
    /// assert!(refused);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn max_fibers(mut self, fibers: usize) -> RuntimeBuilder {
        self.limits.fibers_max = fibers.max(1);
        self
    }

    /// How many spawns from outside may wait for each worker, at least 1: 1,024 if not said. [`Handle::spawn`] waits while
    /// there is no room.
    ///
    /// ```
    /// let runtime = ringsock::Runtime::builder().inbox(16).build()?;
    /// let fiber = runtime.handle().spawn(|| 42)?;
    /// assert_eq!(fiber.join().unwrap(), 42);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn inbox(mut self, spawns: usize) -> RuntimeBuilder {
        self.limits.spawns_max = spawns.max(1);
        self
    }

    /// Entries of each worker's submission queue (256 if not said; a power of two from 2 to 32,768) and of its completion queue
    /// for each of them (8 if not said, 2 to 32). Where memory is short the kernel gets what it accepts.
    ///
    /// ```
    /// let answer = ringsock::Runtime::builder().ring_entries(64, 4).run(|| 42)?;
    /// assert_eq!(answer, 42);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn ring_entries(
        mut self,
        submission: u32,
        completion_per_submission: u32,
    ) -> RuntimeBuilder {
        self.config = Config {
            sq_entries: submission.clamp(2, 32_768).next_power_of_two(),
            cq_per_sq: completion_per_submission.clamp(2, 32),
            ..Config::worker()
        };
        self
    }

    /// What drives the workers. If not said, the environment variable `RINGSOCK_DRIVER` says it (`uring` or `epoll`); without that
    /// it is io_uring or, where that is forbidden or the kernel is older than 6.1, epoll.
    ///
    /// ```
    /// use ringsock::{DriverKind, Runtime};
    ///
    /// let runtime = Runtime::builder().driver(DriverKind::Epoll).workers(2).build()?;
    /// assert_eq!(runtime.driver(), DriverKind::Epoll);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn driver(mut self, driver: DriverKind) -> RuntimeBuilder {
        self.driver = Some(driver);
        self
    }

    /// How long a worker with nothing to do looks for completions before it sleeps: not at all if not said.
    ///
    /// Falling asleep and being woken can take longer than a short exchange with a peer on the same machine or in the same rack;
    /// spinning for 50 to 200 microseconds spares it, at the price of the core: a waiting worker that spins looks busy and keeps
    /// the core from others, so it is for workers with a core of their own. It adapts: after a spin in vain 1, 3, 7 … 63 waits go
    /// straight to sleep, so an idle worker spins hardly ever.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// let answer = ringsock::Runtime::builder()
    ///     .spin(Duration::from_micros(50))
    ///     .run(|| ringsock::spawn(|| 42).join().unwrap())?;
    /// assert_eq!(answer, 42);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn spin(mut self, at_most: Duration) -> RuntimeBuilder {
        self.limits.spin = at_most;
        self
    }

    /// Receive buffers of each worker: how many, and bytes of each. 64 of 64 KiB if not said; only what is touched takes memory.
    ///
    /// [`Socket::recv`] of a stream, in a fiber, lends one where the result cannot be longer, so a server whose messages are longer than 64 KiB
    /// wants longer ones, and one that holds many [`Buf`](crate::Buf)s at once wants more: while all are out, receives allocate. With
    /// none of them they always do.
    ///
    /// ```
    /// use ringsock::Runtime;
    ///
    /// let lent = |buffers| {
    ///     Runtime::builder().buffers(buffers, 4096).run(|| {
    ///         let (left, right) = ringsock::socketpair()?;
    ///         left.sendall(b"hello")?;
    ///         Ok::<bool, ringsock::Error>(right.recv(4096)?.is_lease())
    ///     })
    /// };
    /// assert_eq!((lent(16)?, lent(0)?), (Ok(true), Ok(false)));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn buffers(mut self, count: usize, bytes: usize) -> RuntimeBuilder {
        self.limits.buffers = (count, bytes);
        self
    }

    /// When [`Socket::sendall_buf`] sends large buffers without a copy: where it pays, if not said.
    ///
    /// Only leases and pool buffers, of which it is known when they are used again, of at least 16 KiB, on connected IPv4 and IPv6 sockets,
    /// in fibers. On a route where the kernel reports that it copied all the same the least size doubles, and above 512 KiB such sends
    /// end (one in 4,096 looks whether that has changed); where it reports no copies, the size comes down again.
    /// Addresses of this machine, among which everything is copied, are never tried. It needs Linux 6.3.
    ///
    /// The kernel keeps such a buffer until the network is done with it: a peer that does not read keeps it as well. So a connection has at
    /// most 8 and 1 MiB of them under way, a worker 64 and 8 MiB, and a pool half of its buffers of a size; what would be more is copied. At
    /// shutdown a worker waits for its buffers as long as for its fibers ([`shutdown_grace`](RuntimeBuilder::shutdown_grace)); those that
    /// do not come back are leaked and counted ([`buffers_leaked`](crate::Metrics::buffers_leaked)).
    ///
    /// # Source
    ///
    /// `io_uring_enter(2)` (`IORING_OP_SEND_ZC`, `IORING_SEND_ZC_REPORT_USAGE`).
    ///
    /// ```
    /// use ringsock::{Runtime, ZeroCopy};
    ///
    /// let answer = Runtime::builder().zero_copy(ZeroCopy::Never).run(|| 42)?;
    /// assert_eq!(answer, 42);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn zero_copy(mut self, when: ZeroCopy) -> RuntimeBuilder {
        self.limits.zero_copy = when;
        self
    }

    /// How long fibers may go on at shutdown before they are unwound: one second if not said.
    ///
    /// From then on each call that would wait, and [`yield_now`](crate::yield_now), unwinds the fiber, at most three times if it
    /// catches that. After as long again (at least a second), or at once where panics abort, fibers that are left are given
    /// up: their destructors never run, their stacks and their thread stay, they are counted
    /// ([`fibers_lost`](crate::Metrics::fibers_lost)) and logged. A fiber that computes without ever waiting cannot be ended;
    /// the shutdown waits for it.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// ringsock::Runtime::builder()
    ///     .shutdown_grace(Duration::from_millis(10))
    ///     .run(|| {
    ///         // It goes on although its calls fail, so it is unwound when the time is over.
    ///         ringsock::spawn(|| loop {
    ///             let _ = ringsock::sleep(1);
    ///         });
    ///         ringsock::yield_now();
    ///     })?;
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn shutdown_grace(mut self, grace: Duration) -> RuntimeBuilder {
        self.limits.grace = grace;
        self
    }

    /// Starts the workers, each on a thread of its own.
    ///
    /// # Errors
    ///
    /// Where neither driver can be had, or not the one that was asked for: see [`Features::probe`]. `EAGAIN`, `ENOMEM`: no thread.
    /// `EMFILE`: no free descriptor. `Value`: the environment asks for a driver that there is not.
    ///
    /// ```
    /// let runtime = ringsock::Runtime::builder().build()?;
    /// assert_eq!(runtime.handle().spawn(|| 42)?.join().unwrap(), 42);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn build(mut self) -> Result<Runtime> {
        let mut pending = Vec::new();
        for index in 0..self.workers {
            let started = self.start(index)?;
            // What the first has, all have.
            self.driver = Some(started.0.features.driver());
            pending.push(started);
        }
        let (entries, threads): (Vec<_>, Vec<_>) = pending.into_iter().unzip();
        let handle = share(entries);
        Ok(Runtime {
            handle: handle.clone(),
            threads: threads
                .into_iter()
                .map(|pending| pending.go(&handle))
                .collect(),
        })
    }

    /// As [`run`](crate::run), with these settings: the calling thread is the first worker.
    ///
    /// # Errors
    ///
    /// Those of [`build`](RuntimeBuilder::build).
    ///
    /// # Panics
    ///
    /// In a fiber: a runtime does not fit into a runtime.
    ///
    /// ```
    /// let sum = ringsock::Runtime::builder().workers(2).run(|| {
    ///     let handle = ringsock::Handle::current().unwrap();
    ///     let fibers = [0, 1].map(|worker| handle.spawn_on(worker, move || worker + 1).unwrap());
    ///     fibers.into_iter().map(|fiber| fiber.join().unwrap()).sum::<usize>()
    /// })?;
    /// assert_eq!(sum, 3);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn run<T, F>(mut self, main: F) -> Result<T>
    where
        F: FnOnce() -> T + 'static,
        T: 'static,
    {
        assert!(
            !fiber::in_fiber(),
            "ringsock::run was called in a fiber: the runtime is there already, use ringsock::spawn"
        );
        let counts = Arc::new(Counts::default());
        let worker = self.worker(counts.clone())?;
        let mut entries = vec![entry(&worker, counts)];
        // What the first has, all have.
        self.driver = Some(entries[0].features.driver());
        let mut pending = Vec::new();
        for index in 1..self.workers {
            let (entry, thread) = self.start(index)?;
            entries.push(entry);
            pending.push(thread);
        }
        let handle = share(entries);
        let runtime = Runtime {
            handle: handle.clone(),
            threads: pending
                .into_iter()
                .map(|pending| pending.go(&handle))
                .collect(),
        };
        let _signal_stack = SignalStack::install();
        let _current = CurrentHandle::enter(handle);
        let stop = StopWhenDropped(runtime.handle.0.clone());
        let main = fiber::join::start_first(&worker, move || {
            let _stop = stop;
            main()
        })?;
        worker.run();
        drop(worker);
        drop(_current);
        drop(runtime);
        match main.join() {
            Ok(result) => Ok(result),
            Err(JoinError::Panic(payload)) => resume_unwind(payload),
            Err(error) => panic!("the main fiber did not end: {error}"),
        }
    }

    fn worker(&self, counts: Arc<Counts>) -> Result<Worker> {
        let config = features::share_locked_memory(self.config, self.workers);
        Worker::new(Driver::new(config, self.driver)?, self.limits, counts)
    }

    /// Starts a worker thread as far as its driver; it waits for the others.
    fn start(&self, index: usize) -> Result<(WorkerEntry, PendingThread)> {
        let (report, reported) = bounded::<Result<WorkerEntry>>(1);
        let (go, went) = bounded::<Handle>(1);
        let (report_lost, lost) = bounded::<usize>(1);
        let builder = self.clone();
        let thread = thread::Builder::new()
            .name(format!("ringsock-{index}"))
            .spawn(move || {
                let counts = Arc::new(Counts::default());
                let worker = match builder.worker(counts.clone()) {
                    Ok(worker) => worker,
                    Err(error) => {
                        let _ = report.send(Err(error));
                        return;
                    }
                };
                let _ = report.send(Ok(entry(&worker, counts)));
                // Without a handle another worker could not be started: this one ends as well.
                let Ok(handle) = went.recv() else {
                    return;
                };
                let _signal_stack = SignalStack::install();
                let _current = CurrentHandle::enter(handle);
                worker.run();
                let _ = report_lost.send(worker.lost());
            })
            .map_err(Error::from)?;
        match reported.recv() {
            Ok(Ok(entry)) => Ok((
                entry,
                PendingThread {
                    thread: Some(WorkerThread { thread, lost }),
                    go: Some(go),
                },
            )),
            Ok(Err(error)) => {
                join_thread(thread);
                Err(error)
            }
            Err(_) => Err(Error::Message("a worker thread ended at its start".into())),
        }
    }
}

fn entry(worker: &Worker, counts: Arc<Counts>) -> WorkerEntry {
    WorkerEntry {
        remote: worker.remote().clone(),
        counts,
        features: worker.features(),
    }
}

fn share(workers: Vec<WorkerEntry>) -> Handle {
    Handle(Arc::new(Shared {
        workers,
        next: AtomicUsize::new(0),
        stopping: AtomicBool::new(false),
    }))
}

/// A worker thread that waits for its runtime. Dropped, because another could not be started, it ends.
struct PendingThread {
    thread: Option<WorkerThread>,
    go: Option<crossbeam_channel::Sender<Handle>>,
}

impl PendingThread {
    fn go(mut self, handle: &Handle) -> WorkerThread {
        if let Some(go) = self.go.take() {
            // It waits in recv, so it is there to receive.
            let _ = go.send(handle.clone());
        }
        self.thread.take().expect("a thread goes once")
    }
}

impl Drop for PendingThread {
    fn drop(&mut self) {
        drop(self.go.take());
        if let Some(WorkerThread { thread, .. }) = self.thread.take() {
            join_thread(thread);
        }
    }
}

struct StopWhenDropped(Arc<Shared>);

impl Drop for StopWhenDropped {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Makes a handle the thread's own for a while.
struct CurrentHandle(Option<Handle>);

impl CurrentHandle {
    fn enter(handle: Handle) -> CurrentHandle {
        CurrentHandle(CURRENT.replace(Some(handle)))
    }
}

impl Drop for CurrentHandle {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

/// Reaches a runtime from anywhere: any thread, any fiber, also of another runtime. Cloning is cheap.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// The runtime of the calling fiber; `None` on a plain thread.
    ///
    /// ```
    /// assert!(ringsock::Handle::current().is_none());
    /// ringsock::run(|| assert_eq!(ringsock::Handle::current().unwrap().workers(), 1));
    /// ```
    pub fn current() -> Option<Handle> {
        let handle = CURRENT.with_borrow(Clone::clone)?;
        // A child that a fiber forked has none of its parent's workers.
        let is_ours = handle
            .0
            .workers
            .iter()
            .all(|worker| worker.remote.is_ours());
        is_ours.then_some(handle)
    }

    /// What drives its workers: the same for all.
    ///
    /// ```
    /// ringsock::run(|| {
    ///     let handle = ringsock::Handle::current().unwrap();
    ///     println!("running on {}", handle.driver());
    /// });
    /// ```
    pub fn driver(&self) -> DriverKind {
        self.0.workers[0].features.driver()
    }

    /// How many workers the runtime has.
    pub fn workers(&self) -> usize {
        self.0.workers.len()
    }

    /// Starts a fiber on one of the workers, each in turn. Its closure and result cross threads, so they are `Send`.
    ///
    /// While that worker's inbox is full, the caller waits.
    ///
    /// # Errors
    ///
    /// `Shutdown`: the runtime is ending. `Cancelled`: the calling fiber was cancelled while it waited.
    ///
    /// ```
    /// let runtime = ringsock::Runtime::builder().workers(2).build()?;
    /// let fiber = runtime.handle().spawn(|| "from a plain thread")?;
    /// assert_eq!(fiber.join().unwrap(), "from a plain thread");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn spawn<F, T>(&self, main: F) -> Result<JoinHandle<T>>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let worker = self.0.next.fetch_add(1, Ordering::Relaxed) % self.workers();
        self.spawn_on(worker, main)
    }

    /// Starts a fiber on the worker with this number, from 0 on.
    ///
    /// # Errors
    ///
    /// Those of [`spawn`](Handle::spawn); `Value`: no such worker.
    ///
    /// ```
    /// let runtime = ringsock::Runtime::builder().workers(2).build()?;
    /// let name = runtime.handle().spawn_on(1, || std::thread::current().name().map(str::to_owned))?;
    /// assert_eq!(name.join().unwrap().as_deref(), Some("ringsock-1"));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn spawn_on<F, T>(&self, worker: usize, main: F) -> Result<JoinHandle<T>>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        if self.0.stopping.load(Ordering::Relaxed) {
            return Err(Error::Shutdown);
        }
        let Some(worker) = self.0.workers.get(worker) else {
            return Err(Error::Value(format!("no worker {worker}").into()));
        };
        spawn_remote(&worker.remote, main)
    }

    /// The counters of each worker, by number. It is cheap, and up to date whenever a worker waits.
    ///
    /// ```
    /// let handle = ringsock::run(|| ringsock::Handle::current().unwrap());
    /// assert!(handle.metrics()[0].switches >= 1);
    /// ```
    pub fn metrics(&self) -> Vec<Metrics> {
        self.0
            .workers
            .iter()
            .map(|worker| worker.counts.snapshot())
            .collect()
    }

    /// What each worker's driver found the kernel to offer, by number.
    ///
    /// ```
    /// let runtime = ringsock::Runtime::builder().build()?;
    /// println!("{}", runtime.handle().features()[0]);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn features(&self) -> Vec<Features> {
        self.0
            .workers
            .iter()
            .map(|worker| worker.features.clone())
            .collect()
    }

    /// Serves stream connections: on every worker a fiber accepts, and runs `handler` with each connection and its peer's address
    /// in a fiber of its own. What the handler returns is dropped (a connection that breaks is no news); a panic in it is
    /// logged.
    ///
    /// The address is tried as AF_INET, AF_INET6 and AF_UNIX, in this order. `SO_REUSEADDR` is set. With several workers each has a
    /// listener of its own (`SO_REUSEPORT`); an AF_UNIX path has one that they share. Out of descriptors or memory, accepting
    /// pauses for 10 to 500 ms and connections wait in the backlog.
    ///
    /// # Errors
    ///
    /// Those of [`Socket::bind`] and [`Socket::listen`]; `Shutdown`: the runtime is ending.
    ///
    /// ```
    /// use ringsock::prelude::*;
    ///
    /// let runtime = ringsock::Runtime::builder().workers(2).build()?;
    /// let server = runtime.handle().serve(("127.0.0.1", 0), |conn, _peer| {
    ///     conn.sendall(b"Hello, world")
    /// })?;
    /// let client = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    /// client.connect(server.address())?;
    /// assert_eq!(client.recv(1024)?, b"Hello, world");
    /// server.stop();
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn serve<H, R>(&self, address: impl ToAddress, handler: H) -> Result<Server>
    where
        H: Fn(Socket, Address) -> R + Send + Sync + 'static,
        R: 'static,
    {
        self.serve_with(address, ServeOptions::default(), handler)
    }

    /// [`serve`](Handle::serve) with options.
    ///
    /// # Errors
    ///
    /// Those of [`serve`](Handle::serve).
    ///
    /// ```
    /// use ringsock::ServeOptions;
    /// use ringsock::prelude::*;
    ///
    /// let runtime = ringsock::Runtime::builder().build()?;
    /// let options = ServeOptions { nodelay: true, ..Default::default() };
    /// let server = runtime.handle().serve_with(("127.0.0.1", 0), options, |conn, _peer| {
    ///     assert_eq!(conn.getsockopt(IPPROTO_TCP, TCP_NODELAY)?, 1);
    ///     conn.sendall(b"Hello, world")
    /// })?;
    /// let client = ringsock::create_connection(server.address())?;
    /// assert_eq!(client.recv(1024)?, b"Hello, world");
    /// server.stop();
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn serve_with<H, R>(
        &self,
        address: impl ToAddress,
        options: ServeOptions,
        handler: H,
    ) -> Result<Server>
    where
        H: Fn(Socket, Address) -> R + Send + Sync + 'static,
        R: 'static,
    {
        let listeners = self.listeners(address, options)?;
        let address = listeners[0].getsockname()?;
        let is_shared = address.family() == AF_UNIX && listeners.len() > 1;
        let handler = Arc::new(handler);
        let mut fibers = Vec::new();
        for (index, listener) in listeners.into_iter().enumerate() {
            let handler = handler.clone();
            match self.spawn_on(index, move || {
                accept_all(&listener, is_shared, options.backlog, &handler)
            }) {
                Ok(fiber) => fibers.push(fiber),
                Err(error) => {
                    fibers.iter().for_each(JoinHandle::cancel);
                    return Err(error);
                }
            }
        }
        Ok(Server { address, fibers })
    }

    /// One listener for each worker.
    fn listeners(&self, address: impl ToAddress, options: ServeOptions) -> Result<Vec<Socket>> {
        let mut refused = None;
        let found = AF_FAMILIES
            .iter()
            .find_map(|family| match address.to_address(*family) {
                Ok(address) => Some((*family, address)),
                Err(error) => {
                    // That of the family that the address has the form of, or else the first one.
                    let has_its_form = !matches!(error, Error::Type(_));
                    if refused.is_none() || has_its_form && matches!(refused, Some(Error::Type(_)))
                    {
                        refused = Some(error);
                    }
                    None
                }
            });
        let (family, mut address) = found.ok_or_else(|| refused.expect("there are families"))?;
        let shared = family == AF_UNIX || self.workers() == 1;
        let mut listeners: Vec<Socket> = Vec::new();
        for _ in 0..self.workers() {
            if shared && let Some(first) = listeners.first() {
                let again = first.clone();
                listeners.push(again);
                continue;
            }
            let listener = Socket::new(family, SOCK_STREAM, 0)?;
            if family != AF_UNIX {
                listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)?;
                if options.nodelay {
                    listener.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)?;
                }
            }
            // The first binds without SO_REUSEPORT, so that a port of another server is not shared with it unnoticed; it takes
            // the option before the others bind.
            let first = listeners.is_empty();
            if !shared && !first {
                listener.setsockopt(SOL_SOCKET, SO_REUSEPORT, 1)?;
            }
            // So that plain calls do not wait. Operations on the ring do all the same.
            listener.force_nonblocking();
            listener.bind(&address)?;
            if !shared && first {
                listener.setsockopt(SOL_SOCKET, SO_REUSEPORT, 1)?;
            }
            listener.listen(options.backlog)?;
            // The others share the port that the first was given.
            address = listener.getsockname()?;
            listeners.push(listener);
        }
        Ok(listeners)
    }
}

const AF_FAMILIES: [crate::constants::Family; 3] = [AF_INET, AF_INET6, AF_UNIX];

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle")
            .field("workers", &self.workers())
            .finish_non_exhaustive()
    }
}

/// What [`serve_with`] may be told.
///
/// ```
/// assert_eq!(ringsock::ServeOptions::default().backlog, 1024);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ServeOptions {
    /// Connections that may wait to be accepted, on each listener; at most `net.core.somaxconn`. Default: 1,024.
    pub backlog: i32,
    /// Sets `TCP_NODELAY`: small messages are sent at once. It is set on the listeners, from which connections inherit it, so it costs
    /// no call for each. AF_UNIX has no such option. Default: false.
    pub nodelay: bool,
}

impl Default for ServeOptions {
    fn default() -> ServeOptions {
        ServeOptions {
            backlog: SERVE_BACKLOG,
            nodelay: false,
        }
    }
}

/// [`Handle::serve_with`] on the runtime of the calling fiber.
///
/// # Errors
///
/// Those of [`Handle::serve`].
///
/// # Panics
///
/// Outside a fiber.
pub fn serve_with<H, R>(
    address: impl ToAddress,
    options: ServeOptions,
    handler: H,
) -> Result<Server>
where
    H: Fn(Socket, Address) -> R + Send + Sync + 'static,
    R: 'static,
{
    match Handle::current() {
        Some(handle) => handle.serve_with(address, options, handler),
        None => panic!(
            "serve works in a fiber only: enter one with ringsock::run, or use Handle::serve"
        ),
    }
}

/// [`Handle::serve`] on the runtime of the calling fiber.
///
/// # Errors
///
/// Those of [`Handle::serve`].
///
/// # Panics
///
/// Outside a fiber.
pub fn serve<H, R>(address: impl ToAddress, handler: H) -> Result<Server>
where
    H: Fn(Socket, Address) -> R + Send + Sync + 'static,
    R: 'static,
{
    serve_with(address, ServeOptions::default(), handler)
}

/// What [`serve`] started. Dropping it lets the server go on for as long as its runtime.
#[derive(Debug)]
pub struct Server {
    address: Address,
    fibers: Vec<JoinHandle<()>>,
}

impl Server {
    /// The address it listens on, with the port that the kernel gave for port 0.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Stops accepting, once the connections that wait in the backlog have been taken. Connections go on; the caller waits
    /// for the accepting fibers to end only.
    ///
    /// ```
    /// use ringsock::prelude::*;
    ///
    /// ringsock::run(|| {
    ///     let server = ringsock::serve(("127.0.0.1", 0), |conn, _peer| conn.sendall(b"hello"))?;
    ///     let address = server.address().clone();
    ///     let client = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    ///     client.connect(&address)?;
    ///     assert_eq!(client.recv(16)?, b"hello");
    ///     server.stop();
    ///     let late = Socket::new(AF_INET, SOCK_STREAM, 0)?;
    ///     assert!(late.connect(&address).is_err());
    ///     Ok::<(), Error>(())
    /// })?;
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn stop(self) {
        self.fibers.iter().for_each(JoinHandle::cancel);
        self.wait();
    }

    /// Waits until the server has ended, which it does with its runtime (or when its listener fails for good).
    ///
    /// ```
    /// ringsock::run(|| {
    ///     let server = ringsock::serve(("127.0.0.1", 0), |conn, _peer| conn.sendall(b"hello"))?;
    ///     // For as long as the runtime lives: here, until this deadline.
    ///     ringsock::timeout(0.01, || Ok(server.wait()))
    /// })?;
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn wait(self) {
        for fiber in self.fibers {
            if let Err(JoinError::Interrupted(_)) = fiber.join() {
                return;
            }
        }
    }
}

/// So many connections are accepted by plain calls before the fibers get their turn.
const ACCEPTS_MAX: usize = 16;

/// Accepts until cancelled, or until the runtime ends, and then takes what is left in the backlog.
///
/// The ring is entered for each connection that it accepts. Where many come at a time, plain calls take those that are there
/// already; but not from workers with whom a listener is shared.
fn accept_all<H, R>(listener: &Socket, is_shared: bool, backlog: i32, handler: &Arc<H>)
where
    H: Fn(Socket, Address) -> R + Send + Sync + 'static,
    R: 'static,
{
    let start = |(conn, peer): (Socket, Address)| {
        let handler = handler.clone();
        fiber::join::spawn_when_possible(move || drop(handler(conn, peer)))
    };
    let more = Forecast::new();
    let accept_more = || {
        for accepted in 0..ACCEPTS_MAX {
            // Of an error the next call with time to wait hears, too, if it is to last.
            if listener.accept_by_flag().and_then(&start).is_err() {
                if accepted == 0 {
                    more.found_nothing();
                }
                return;
            }
            more.found();
        }
    };
    let mut back_off = BackOff::default();
    loop {
        let error = match listener.accept().and_then(&start) {
            Ok(()) => {
                back_off = BackOff::default();
                if !is_shared && more.is_good() {
                    accept_more();
                }
                continue;
            }
            Err(error) => error,
        };
        match (&error, error.errno()) {
            (Error::Cancelled | Error::Shutdown, _) => break,
            (_, Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP)) => return,
            // The connection broke before it was accepted: accept(2)'s list.
            (_, Some(libc::ECONNABORTED | libc::EPROTO | libc::ENETDOWN | libc::ENETUNREACH)) => {
                continue;
            }
            (_, Some(libc::EHOSTDOWN | libc::EHOSTUNREACH | libc::ENONET | libc::ENOPROTOOPT)) => {
                continue;
            }
            // Out of descriptors, out of memory, or something that only time can help.
            _ => {}
        }
        if back_off.wait().is_zero() {
            report_shortage(&error);
        }
        back_off.grow();
        if sleep(back_off.wait()).is_err() {
            break;
        }
    }
    // As many as the backlog can hold: of those who still come, some are too late.
    for accepted in 1..=backlog.max(1) {
        match listener.accept_now().and_then(&start) {
            Ok(()) => {}
            Err(error) if error.errno() == Some(libc::ECONNABORTED) => {}
            // EAGAIN: the backlog is empty. Anything else (no descriptor, no memory) is not waited for any more.
            Err(_) => break,
        }
        if accepted % 16 == 0 {
            yield_now();
        }
    }
}

/// Says once per process that connections have to wait.
fn report_shortage(error: &Error) {
    static REPORTED: OnceLock<()> = OnceLock::new();
    REPORTED.get_or_init(|| {
        log(format_args!(
            "connections wait in the backlog: {error} (raise the limit of open files with `ulimit -n`, or serve fewer)"
        ));
    });
}

/// Raises this process's limit of open descriptors from the soft to the hard one: (before, after), `None` where that failed.
///
/// Programs with many connections call it once at their start; the library itself never changes a limit.
///
/// # Source
///
/// `setrlimit(2)` (`RLIMIT_NOFILE`).
///
/// ```
/// let (before, after) = ringsock::raise_descriptor_limit().expect("a process may raise its soft limit");
/// assert!(after >= before);
/// ```
pub fn raise_descriptor_limit() -> Option<(u64, u64)> {
    crate::sys::raise_nofile()
}
