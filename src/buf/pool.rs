//! Buffers that a program takes, fills, gives away and gets back: [`BufferPool`] and its [`PoolBuf`]s.
//!
//! A pool has one class for each size asked for, and each class one mapping. A buffer belongs to whoever holds its `PoolBuf` (or the
//! [`Buf`](crate::Buf) made of it), and to the kernel as long as a zero-copy send of it is not over: such a send holds a part of the
//! buffer in the worker's table (`fiber/pin.rs`), so the buffer comes home with the last part.
//!
//! ```text
//!              take                               the last part is dropped, on any thread
//!   free list ──────▶ PoolBuf, Buf, parts of it ─────────────────────────────────────────▶ somebody waits? ──yes──▶ given to it
//!       ▲                                                                                        │ no
//!       └────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! The free list is a stack, so the buffer used last, which is still in the cache, is used next. It is taken from and given back to
//! without a lock; its head carries a count of changes, so that a head which is what it was leads where it led. Who finds it empty and
//! wants to wait queues behind a lock, and then looks again; who gives back looks at the queue afterwards. One of the two sees the other.
//!
//! # What registration is for
//!
//! READ_FIXED and WRITE_FIXED of registered memory are no faster than plain calls for receiving and sending
//! (`benches/GAINS.md` has the figures of `cargo bench --bench fixed`), so `recv_into`, `recvfrom_into`, `sendall` and `sendto` treat the
//! memory of a `PoolBuf` like any other. Zero-copy sends use the registration: the kernel need not look up and pin the pages of each.
//! A worker registers a class, as one buffer, when it first sends from it without a copy (`fiber/pin.rs`). What locked memory that
//! may take is bounded for the whole process ([`LOCKED_BYTES_MAX`] if not said).
#![allow(unsafe_code)]

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::count_part;
use crate::error::{Error, Result};
use crate::fiber::count_unwaited_call;
use crate::fiber::park::{Parking, Waker};
use crate::fiber::wait_queue::{Ticket, WaitQueue};
use crate::sys;

/// The end of the free list.
const NONE: u32 = u32::MAX;
/// The most classes of a pool.
const CLASSES_MAX: usize = 8;
/// The most buffers of a class.
const BUFFERS_MAX: usize = 1 << 20;
/// The most bytes of a buffer.
const BUFFER_BYTES_MAX: usize = 1 << 30;
/// The most bytes of a class, which is registered as one buffer: io_uring takes no longer ones.
const CLASS_BYTES_MAX: usize = 1 << 30;
/// The largest alignment, and what a mapping with huge pages is aligned to.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// The least alignment. Buffers that ask for no more are so much further apart than they are long: see `buf/lease.rs`.
const COLOUR_BYTES: usize = 64;

/// Locked memory that the registrations of a process may take if not said. An unprivileged process mostly may have 8 MiB, and its rings
/// count too.
pub(crate) const LOCKED_BYTES_MAX: usize = 4 << 20;

/// What all registrations of this process take.
static LOCKED_BYTES: AtomicUsize = AtomicUsize::new(0);

/// What tests fill free buffers with, to see that nobody writes into them, and that nobody reads them.
#[cfg(test)]
pub(crate) const POISON: u8 = 0xdb;

/// Settings of a [`BufferPool`].
///
/// ```
/// let pool = ringsock::BufferPool::builder().buffers(16, 4096).buffers(4, 65_536).build()?;
/// assert_eq!(pool.take(5000)?.len(), 65_536);
/// # Ok::<(), ringsock::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "a builder makes no pool before `build`"]
pub struct BufferPoolBuilder {
    /// Count and bytes of each.
    classes: Vec<(usize, usize)>,
    align: usize,
    huge_pages: bool,
    register: bool,
    locked_bytes_max: usize,
}

impl BufferPoolBuilder {
    /// Adds `count` buffers of `bytes` bytes each; of the same size once more, it adds to those. A pool without any gets 64 of 4 KiB and
    /// 24 of 64 KiB, 1.8 MiB together. Only what is touched (or registered) takes memory.
    pub fn buffers(mut self, count: usize, bytes: usize) -> BufferPoolBuilder {
        match self.classes.iter_mut().find(|(_, other)| *other == bytes) {
            Some((others, _)) => *others = others.saturating_add(count),
            None => self.classes.push((count, bytes)),
        }
        self
    }

    /// Where buffers start: at a multiple of so many bytes, a power of two up to 2 MiB. 64 if not said, and then never at the same place
    /// of a page one after the other, which spares the cache.
    pub fn align(mut self, bytes: usize) -> BufferPoolBuilder {
        self.align = bytes;
        self
    }

    /// Asks for pages of 2 MiB; not if not said. A kernel that has none gives small ones:
    /// [`huge_pages_refused`](BufferPool::huge_pages_refused) says why.
    pub fn huge_pages(mut self, wanted: bool) -> BufferPoolBuilder {
        self.huge_pages = wanted;
        self
    }

    /// Whether workers register the pool with their rings for zero-copy sends, which locks its memory; they do if not said. See
    /// [`unregistered`](BufferPool::unregistered).
    pub fn register(mut self, wanted: bool) -> BufferPoolBuilder {
        self.register = wanted;
        self
    }

    /// Bytes of locked memory that all registrations of the process together may take before this pool goes without: 4 MiB if not said.
    /// Each worker's registration counts by itself.
    pub fn locked_bytes_max(mut self, bytes: usize) -> BufferPoolBuilder {
        self.locked_bytes_max = bytes;
        self
    }

    /// Makes the pool. Its memory appears as it is touched.
    ///
    /// # Errors
    ///
    /// `Value`: no buffers or no bytes, more than 8 sizes, more than 1,048,576 buffers or 1 GiB of a size, an alignment that is no power
    /// of two or above 2 MiB. `ENOMEM`: no address space.
    ///
    /// # Source
    ///
    /// `mmap(2)`, `madvise(2)` (`MADV_HUGEPAGE`).
    ///
    /// ```
    /// use ringsock::BufferPool;
    /// let pool = BufferPool::builder().buffers(4, 16_384).align(4096).build()?;
    /// assert_eq!(pool.take(1)?.as_ptr() as usize % 4096, 0);
    /// assert!(BufferPool::builder().buffers(4, 0).build().is_err());
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn build(mut self) -> Result<BufferPool> {
        let refuse = |what: &'static str| Err(Error::Value(what.into()));
        if self.classes.is_empty() {
            self.classes = vec![(64, 4096), (24, 65_536)];
        }
        if self.classes.len() > CLASSES_MAX {
            return refuse("a pool has at most 8 sizes");
        }
        if !self.align.is_power_of_two() || self.align > HUGE_PAGE_BYTES {
            return refuse("an alignment is a power of two, at most 2 MiB");
        }
        self.classes.sort_unstable_by_key(|(_, bytes)| *bytes);
        let options = Arc::new(Options {
            register: self.register,
            locked_bytes_max: self.locked_bytes_max,
            registrations: AtomicUsize::new(0),
            reasons: Mutex::default(),
        });
        let mut classes = Vec::new();
        for (count, bytes) in self.classes {
            if !(1..=BUFFERS_MAX).contains(&count) {
                return refuse("a size has 1 to 1,048,576 buffers");
            }
            if !(1..=BUFFER_BYTES_MAX).contains(&bytes) {
                return refuse("a buffer has 1 byte to 1 GiB");
            }
            let class = Class::new(count, bytes, self.align, self.huge_pages, &options)?;
            classes.push(Arc::new(class));
        }
        Ok(BufferPool(Arc::new(Pool { classes, options })))
    }
}

/// A bounded pool of buffers to receive into, to send from, and to give away.
///
/// A handle: clones share the pool, and it may be used in any fiber and on any thread. A buffer goes home when its [`PoolBuf`] is
/// dropped, wherever that is, also after the runtime has ended; the memory stays as long as the pool or any of its buffers. The one that
/// came home last is taken first.
///
/// All buffers out is a state to plan for, not an error: [`try_take`](BufferPool::try_take) says so, [`take`](BufferPool::take) waits.
///
/// Large buffers that are sent by [`sendall_buf`](crate::Socket::sendall_buf) may be sent without a copy. Then they come home when the
/// kernel has let go of them, which can be when the peer has read them: [`RuntimeBuilder::zero_copy`](crate::RuntimeBuilder::zero_copy) has
/// when that happens. At most half of the buffers of a size, and an eighth by one connection, are ever held up that way.
///
/// After fork(2) a child has a pool of its own with whatever was free then; nobody there brings home what the parent had out.
///
/// ```
/// use ringsock::prelude::*;
///
/// ringsock::run(|| {
///     let pool = ringsock::BufferPool::new()?;
///     let (left, right) = ringsock::socketpair()?;
///     left.sendall(b"hello")?;
///     let mut buf = pool.take(4096)?;
///     let n = right.recv_into(&mut buf)?;
///     buf.truncate(n);
///     right.sendall_buf(buf.into())?; // given away: it goes home by itself
///     assert_eq!(left.recv(16)?, b"hello");
///     assert_eq!(pool.available(4096), 64);
///     Ok::<(), ringsock::Error>(())
/// })?;
/// # Ok::<(), ringsock::Error>(())
/// ```
#[derive(Clone)]
pub struct BufferPool(Arc<Pool>);

struct Pool {
    /// By size.
    classes: Vec<Arc<Class>>,
    options: Arc<Options>,
}

/// What a pool's classes share.
struct Options {
    register: bool,
    locked_bytes_max: usize,
    /// How many are in force, of all classes and workers.
    registrations: AtomicUsize,
    reasons: Mutex<Reasons>,
}

/// Why something asked for was not to be had.
#[derive(Default)]
struct Reasons {
    unregistered: Option<String>,
    huge_pages: Option<String>,
}

impl Options {
    fn reasons(&self) -> MutexGuard<'_, Reasons> {
        self.reasons.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BufferPool {
    /// A pool of 64 buffers of 4 KiB and 24 of 64 KiB.
    ///
    /// # Errors
    ///
    /// `ENOMEM`: no address space.
    ///
    /// ```
    /// let pool = ringsock::BufferPool::new()?;
    /// assert_eq!(pool.try_take(1000).unwrap().len(), 4096);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn new() -> Result<BufferPool> {
        BufferPool::builder().build()
    }

    /// Settings for a pool of one's own.
    ///
    /// ```
    /// let pool = ringsock::BufferPool::builder().buffers(2, 1 << 20).build()?;
    /// assert_eq!(pool.available(1), 2);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn builder() -> BufferPoolBuilder {
        BufferPoolBuilder {
            classes: Vec::new(),
            align: COLOUR_BYTES,
            huge_pages: false,
            register: true,
            locked_bytes_max: LOCKED_BYTES_MAX,
        }
    }

    /// The smallest size that has so many bytes.
    fn class(&self, bytes: usize) -> Option<&Arc<Class>> {
        let mut classes = self.0.classes.iter();
        classes.find(|class| class.buffer_bytes >= bytes)
    }

    /// A buffer of at least `bytes` bytes, of the smallest size that has them; `None` while all of that size are out, and where no size
    /// is as long. It is as long as its size says, and holds whatever was in it.
    ///
    /// ```
    /// let pool = ringsock::BufferPool::builder().buffers(1, 4096).build()?;
    /// let only = pool.try_take(100).unwrap();
    /// assert!(pool.try_take(100).is_none());
    /// drop(only);
    /// assert!(pool.try_take(100).is_some());
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn try_take(&self, bytes: usize) -> Option<PoolBuf> {
        let class = self.class(bytes)?;
        Some(PoolBuf::new(class, class.pop()?))
    }

    /// A buffer of at least `bytes` bytes, of the smallest size that has them. While all of that size are out, it waits for one to come
    /// home; those who wait are served in the order they came. A fiber that takes many without waiting lets the others go first.
    ///
    /// # Errors
    ///
    /// - `Value`: no size is as long.
    /// - Only where it has to wait: `Timeout` (of an enclosing [`timeout`](crate::timeout)), `Cancelled`, `Shutdown`; `EAGAIN` in a
    ///   destructor that runs because the fiber panics.
    ///
    /// ```
    /// use ringsock::{BufferPool, Error};
    ///
    /// ringsock::run(|| {
    ///     let pool = BufferPool::builder().buffers(1, 4096).build()?;
    ///     let only = pool.take(4096)?;
    ///     assert_eq!(ringsock::timeout(0.01, || pool.take(4096).map(drop)), Err(Error::Timeout));
    ///     let waiting = ringsock::spawn({
    ///         let pool = pool.clone();
    ///         move || pool.take(4096).map(drop)
    ///     });
    ///     ringsock::yield_now();
    ///     drop(only);
    ///     waiting.join().unwrap()
    /// })?;
    /// # Ok::<(), Error>(())
    /// ```
    pub fn take(&self, bytes: usize) -> Result<PoolBuf> {
        let Some(class) = self.class(bytes) else {
            return Err(Error::Value("no buffer of the pool is as long".into()));
        };
        let index = match class.pop() {
            Some(index) => {
                count_unwaited_call();
                index
            }
            None => class.wait()?,
        };
        Ok(PoolBuf::new(class, index))
    }

    /// How many buffers are at home of the size that `bytes` would be taken from; 0 where there is none. Others may take and give back
    /// meanwhile.
    ///
    /// ```
    /// let pool = ringsock::BufferPool::builder().buffers(3, 4096).build()?;
    /// let _one = pool.take(1)?;
    /// assert_eq!(pool.available(1), 2);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn available(&self, bytes: usize) -> usize {
        self.class(bytes)
            .map_or(0, |class| class.count - class.out.load(Ordering::Acquire))
    }

    /// Why a worker, the last one that was refused, does without the pool's registration: a sentence that says what to change. `None`
    /// while none was refused; workers register a size when they first send a buffer of it without a copy.
    ///
    /// ```
    /// let pool = ringsock::BufferPool::builder().register(false).build()?;
    /// assert!(pool.unregistered().unwrap().contains("register"));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn unregistered(&self) -> Option<String> {
        if !self.0.options.register {
            return Some("the pool was built with register(false)".to_owned());
        }
        self.0.options.reasons().unregistered.clone()
    }

    /// How many registrations of the pool are in force: one for each size and worker that has one.
    ///
    /// ```
    /// assert_eq!(ringsock::BufferPool::new()?.registrations(), 0);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn registrations(&self) -> usize {
        self.0.options.registrations.load(Ordering::Acquire)
    }

    /// Why the pages are small though large ones were asked for; `None` where they were not, or the kernel agreed to them.
    ///
    /// ```
    /// assert_eq!(ringsock::BufferPool::new()?.huge_pages_refused(), None);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn huge_pages_refused(&self) -> Option<String> {
        self.0.options.reasons().huge_pages.clone()
    }
}

/// For each size, how many buffers are at home of how many.
impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut list = f.debug_map();
        for class in &self.0.classes {
            let home = class.count - class.out.load(Ordering::Relaxed);
            list.entry(&class.buffer_bytes, &(home, class.count));
        }
        list.finish()
    }
}

/// What is known of one buffer.
struct Slot {
    /// The one behind it in the free list.
    next: AtomicU32,
    /// How many parts of the buffer there are, less one.
    others: AtomicU32,
}

/// The buffers of one size.
pub(crate) struct Class {
    memory: NonNull<u8>,
    mapping_bytes: usize,
    buffer_bytes: usize,
    pitch: usize,
    count: usize,
    slots: Box<[Slot]>,
    /// The free list: its first buffer in the lower half, a count of changes in the upper.
    free: AtomicU64,
    out: AtomicUsize,
    /// Somebody is in the queue.
    has_waiting: AtomicBool,
    queue: Mutex<Queue>,
    /// The process that made it.
    epoch: u32,
    /// Zero-copy sends that hold parts of these buffers.
    pins: AtomicUsize,
    options: Arc<Options>,
}

// SAFETY: `memory` is the mapping's address and is itself only read; the buffers in it are reached through `PoolBuf`s, each of which is
// the only access to its bytes. All the rest is atomic, constant, or behind a lock.
unsafe impl Send for Class {}
// SAFETY: as above.
unsafe impl Sync for Class {}

/// Those who wait for a buffer. Who finds its ticket gone has been given one, and finds it in `given`.
struct Queue {
    waiting: WaitQueue<Waker>,
    given: Vec<(Ticket, u32)>,
    /// The process of those.
    epoch: u32,
}

impl Class {
    fn new(
        count: usize,
        buffer_bytes: usize,
        align: usize,
        huge_pages: bool,
        options: &Arc<Options>,
    ) -> Result<Class> {
        let pitch = if align <= COLOUR_BYTES {
            buffer_bytes.next_multiple_of(COLOUR_BYTES) + COLOUR_BYTES
        } else {
            buffer_bytes.next_multiple_of(align)
        };
        let mut mapping_bytes = (count * pitch).next_multiple_of(sys::page_size());
        let mut mapping_align = align;
        if huge_pages {
            mapping_bytes = mapping_bytes.next_multiple_of(HUGE_PAGE_BYTES);
            mapping_align = HUGE_PAGE_BYTES;
        }
        if mapping_bytes > CLASS_BYTES_MAX {
            return Err(Error::Value(
                "the buffers of a size have at most 1 GiB together".into(),
            ));
        }
        let memory = map_aligned(mapping_bytes, mapping_align)?;
        // From here on it is unmapped by the class's end.
        let class = Class {
            memory,
            mapping_bytes,
            buffer_bytes,
            pitch,
            count,
            slots: (0..count as u32)
                .map(|index| Slot {
                    next: AtomicU32::new(if index + 1 == count as u32 {
                        NONE
                    } else {
                        index + 1
                    }),
                    others: AtomicU32::new(0),
                })
                .collect(),
            free: AtomicU64::new(0),
            out: AtomicUsize::new(0),
            has_waiting: AtomicBool::new(false),
            queue: Mutex::new(Queue {
                waiting: WaitQueue::new(),
                given: Vec::new(),
                epoch: sys::fork_epoch(),
            }),
            epoch: sys::fork_epoch(),
            pins: AtomicUsize::new(0),
            options: options.clone(),
        };
        if huge_pages {
            // SAFETY: the mapping above; advice changes no byte of it.
            let refused = unsafe {
                libc::madvise(memory.as_ptr().cast(), mapping_bytes, libc::MADV_HUGEPAGE) != 0
            };
            if refused {
                options.reasons().huge_pages = Some(format!(
                    "the kernel has no huge pages for it (madvise: errno {}): see \
                     /sys/kernel/mm/transparent_hugepage/enabled",
                    sys::errno()
                ));
            }
        }
        #[cfg(test)]
        // SAFETY: the mapping above, which nobody else knows yet.
        unsafe {
            memory.as_ptr().write_bytes(POISON, mapping_bytes);
        }
        Ok(class)
    }

    /// Those who wait; `None` in a forked child whose parent had the lock taken just then. A child has nothing to do with those who
    /// wait in its parent.
    fn queue(&self) -> Option<MutexGuard<'_, Queue>> {
        let epoch = sys::fork_epoch();
        if epoch == self.epoch {
            return Some(self.queue.lock().unwrap_or_else(PoisonError::into_inner));
        }
        let mut queue = sys::lock_after_fork(&self.queue)?;
        if queue.epoch != epoch {
            queue.epoch = epoch;
            drop(queue.waiting.take());
            for (_, index) in std::mem::take(&mut queue.given) {
                self.push(index);
            }
        }
        Some(queue)
    }

    /// The buffer that came home last.
    fn pop(&self) -> Option<u32> {
        let mut head = self.free.load(Ordering::Acquire);
        loop {
            let index = head as u32;
            let slot = self.slots.get(index as usize)?;
            // If another takes it meanwhile, the count of changes differs below.
            let next = slot.next.load(Ordering::Relaxed);
            let changed = ((head >> 32).wrapping_add(1) << 32) | u64::from(next);
            // Acquire: what was done to the buffer before it came home comes before what is done to it next.
            match self.free.compare_exchange_weak(
                head,
                changed,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => {
                    self.out.fetch_add(1, Ordering::AcqRel);
                    return Some(index);
                }
                Err(now) => head = now,
            }
        }
    }

    fn push(&self, index: u32) {
        // First, so that the count is never below what is out.
        self.out.fetch_sub(1, Ordering::AcqRel);
        let mut head = self.free.load(Ordering::Acquire);
        loop {
            self.slots[index as usize]
                .next
                .store(head as u32, Ordering::Relaxed);
            let changed = ((head >> 32).wrapping_add(1) << 32) | u64::from(index);
            match self.free.compare_exchange_weak(
                head,
                changed,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Takes a buffer in whose last part is gone.
    fn give_back(&self, index: u32) {
        #[cfg(test)]
        // SAFETY: no part of the buffer is left, and it is not in the list yet.
        unsafe {
            self.start(index)
                .as_ptr()
                .write_bytes(POISON, self.buffer_bytes);
        }
        self.push(index);
        // Pairs with the one in `wait`: either the waiter finds what was just pushed, or the flag is seen here.
        fence(Ordering::SeqCst);
        if self.has_waiting.load(Ordering::Relaxed) {
            self.serve();
        }
    }

    /// Gives what is at home to those who wait.
    #[cold]
    #[inline(never)]
    fn serve(&self) {
        let Some(mut queue) = self.queue() else {
            return;
        };
        let mut served = Vec::new();
        while !queue.waiting.is_empty()
            && let Some(index) = self.pop()
            && let Some((ticket, waker)) = queue.waiting.pop()
        {
            queue.given.push((ticket, index));
            served.push(waker);
        }
        self.has_waiting
            .store(!queue.waiting.is_empty(), Ordering::Relaxed);
        drop(queue);
        served.into_iter().for_each(Waker::wake);
    }

    /// Waits for a buffer.
    #[cold]
    #[inline(never)]
    fn wait(&self) -> Result<u32> {
        // Nobody will ever give the lock back.
        let lost = || Error::from_errno(libc::EAGAIN);
        let parking = Parking::new();
        let ticket = {
            let mut queue = self.queue().ok_or_else(lost)?;
            let ticket = queue.waiting.push(parking.waker());
            self.has_waiting.store(true, Ordering::Relaxed);
            ticket
        };
        fence(Ordering::SeqCst);
        // One may have come home before anybody could see that it is waited for. Then this wakes whoever is first, perhaps this one.
        self.serve();
        let ended = parking.wait();
        let mut queue = self.queue().ok_or_else(lost)?;
        let given = queue.given.iter().position(|(other, _)| *other == ticket);
        if let Some(place) = given {
            // Whatever ended the wait.
            return Ok(queue.given.swap_remove(place).1);
        }
        queue.waiting.remove(ticket);
        self.has_waiting
            .store(!queue.waiting.is_empty(), Ordering::Relaxed);
        drop(queue);
        Err(ended.error())
    }

    fn start(&self, index: u32) -> NonNull<u8> {
        assert!((index as usize) < self.count);
        // SAFETY: the index is below the number of buffers, which all lie inside the mapping.
        unsafe { self.memory.add(index as usize * self.pitch) }
    }

    /// All of its memory, for a registration.
    pub(crate) fn region(&self) -> (NonNull<u8>, usize) {
        (self.memory, self.mapping_bytes)
    }

    /// Counts a registration, if one is wanted and the process may lock so much more.
    pub(crate) fn reserve(&self) -> Option<Reservation> {
        if !self.options.register {
            return None;
        }
        let most = self.options.locked_bytes_max;
        let reserved = LOCKED_BYTES.fetch_update(Ordering::AcqRel, Ordering::Acquire, |locked| {
            let locked = locked.checked_add(self.mapping_bytes)?;
            (locked <= most).then_some(locked)
        });
        match reserved {
            Ok(_) => {
                self.options.registrations.fetch_add(1, Ordering::AcqRel);
                Some(Reservation {
                    bytes: self.mapping_bytes,
                    options: self.options.clone(),
                })
            }
            Err(locked) => {
                self.refuse_registration(format!(
                    "{} KiB more would lock more than {} KiB, of which {} KiB are taken by all registrations of the process: allow more \
                     with BufferPoolBuilder::locked_bytes_max, or use fewer buffers",
                    self.mapping_bytes / 1024,
                    most / 1024,
                    locked / 1024
                ));
                None
            }
        }
    }

    /// Records why a worker did not register it.
    pub(crate) fn refuse_registration(&self, why: String) {
        self.options.reasons().unregistered = Some(why);
    }

    /// How many zero-copy sends may hold buffers of this size at once: half of them; and how many of one connection.
    pub(crate) fn pins_max(&self) -> (usize, usize) {
        (self.count / 2, self.count.div_ceil(8))
    }

    /// The number of zero-copy sends that hold buffers of this size.
    pub(crate) fn pins(&self) -> &AtomicUsize {
        &self.pins
    }
}

/// Locked memory that a registration takes, from before it is made until its pages are let go.
pub(crate) struct Reservation {
    bytes: usize,
    options: Arc<Options>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.options.registrations.fetch_sub(1, Ordering::AcqRel);
        LOCKED_BYTES.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

impl Drop for Class {
    fn drop(&mut self) {
        // SAFETY: mapped by `map_aligned` with this length; every `PoolBuf` holds the class, so none points into it any more.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.mapping_bytes) };
    }
}

/// A mapping whose address is a multiple of `align`.
fn map_aligned(bytes: usize, align: usize) -> Result<NonNull<u8>> {
    let spare = if align > sys::page_size() { align } else { 0 };
    // SAFETY: an anonymous private mapping at an address the kernel picks; checked below.
    let mapping = unsafe {
        libc::mmap(
            ptr::null_mut(),
            bytes + spare,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if mapping == libc::MAP_FAILED {
        return Err(Error::from_errno(sys::errno()));
    }
    let mapping: *mut u8 = mapping.cast();
    let before = mapping.align_offset(align.max(1)).min(spare);
    let memory = mapping.wrapping_add(before);
    // SAFETY: the pages before and behind the aligned part, which nobody knows. (Both lengths are whole pages.)
    unsafe {
        if before > 0 {
            libc::munmap(mapping.cast(), before);
        }
        if spare > before {
            libc::munmap(memory.wrapping_add(bytes).cast(), spare - before);
        }
    }
    Ok(NonNull::new(memory).expect("a mapping is not at address 0"))
}

/// A buffer of a [`BufferPool`], for its holder alone. It reads and writes like a `[u8]`, may be sent to another thread, and goes home when
/// it is dropped, wherever that is.
///
/// A new one is as long as its size says and holds whatever was in it. As a [`Buf`](crate::Buf) (`buf.into()`) it can be given to
/// [`sendall_buf`](crate::Socket::sendall_buf).
///
/// ```
/// let pool = ringsock::BufferPool::builder().buffers(1, 4096).build()?;
/// let mut buf = pool.take(4096)?;
/// buf[..5].copy_from_slice(b"hello");
/// buf.truncate(5);
/// let other_thread = std::thread::spawn(move || buf.to_ascii_uppercase());
/// assert_eq!(other_thread.join().unwrap(), b"HELLO");
/// assert_eq!(pool.available(4096), 1);
/// # Ok::<(), ringsock::Error>(())
/// ```
pub struct PoolBuf {
    class: Arc<Class>,
    start: NonNull<u8>,
    len: u32,
    index: u32,
}

// SAFETY: a `PoolBuf` is the only access to its bytes (`split_to` divides them), and what it touches of the class is Sync.
unsafe impl Send for PoolBuf {}
// SAFETY: as above; by shared reference the bytes are only read.
unsafe impl Sync for PoolBuf {}

impl PoolBuf {
    fn new(class: &Arc<Class>, index: u32) -> PoolBuf {
        let buf = PoolBuf {
            class: class.clone(),
            start: class.start(index),
            len: class.buffer_bytes as u32,
            index,
        };
        #[cfg(test)]
        assert!(
            buf.iter().all(|byte| *byte == POISON),
            "somebody wrote into a free buffer"
        );
        buf
    }

    /// Keeps the first `len` bytes only; nothing happens if there are no more. The buffer is as long as ever when it is taken next.
    ///
    /// ```
    /// let mut buf = ringsock::BufferPool::new()?.take(4096)?;
    /// buf.truncate(10);
    /// assert_eq!(buf.len(), 10);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len.min(u32::MAX as usize) as u32);
    }

    /// Makes it as long as its size says again, for the next receive.
    ///
    /// ```
    /// let mut buf = ringsock::BufferPool::new()?.take(4096)?;
    /// buf.truncate(10);
    /// buf.restore();
    /// assert_eq!(buf.len(), 4096);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn restore(&mut self) {
        // What a program holds as a PoolBuf is never a part of a buffer: only a `Buf` is divided.
        debug_assert_eq!(self.start, self.class.start(self.index));
        self.len = self.class.buffer_bytes as u32;
    }

    pub(crate) fn advance(&mut self, count: usize) {
        assert!(count <= self.len(), "past the end");
        // SAFETY: inside the part, as just checked.
        self.start = unsafe { self.start.add(count) };
        self.len -= count as u32;
    }

    /// Divides the part: the first `at` bytes are the new one's.
    pub(crate) fn split_to(&mut self, at: usize) -> PoolBuf {
        assert!(at <= self.len(), "past the end");
        count_part(&self.slot().others);
        let head = PoolBuf {
            class: self.class.clone(),
            start: self.start,
            len: at as u32,
            index: self.index,
        };
        self.advance(at);
        head
    }

    pub(crate) fn class(&self) -> &Arc<Class> {
        &self.class
    }

    fn slot(&self) -> &Slot {
        &self.class.slots[self.index as usize]
    }
}

impl Deref for PoolBuf {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: the part lies in the mapping, which lives as long as the class, which this holds; its bytes were zeroed by the kernel,
        // so they are initialised; nobody writes them while the part is borrowed (see Send).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len as usize) }
    }
}

impl DerefMut for PoolBuf {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; the part is borrowed exclusively, and nothing else reaches its bytes.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len as usize) }
    }
}

impl AsRef<[u8]> for PoolBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for PoolBuf {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl Drop for PoolBuf {
    #[inline]
    fn drop(&mut self) {
        let others = &self.slot().others;
        // With no others there is nobody who could make more. The one who finds none left to subtract is the last.
        if others.load(Ordering::Acquire) != 0 && others.fetch_sub(1, Ordering::AcqRel) != 0 {
            return;
        }
        others.store(0, Ordering::Relaxed);
        self.class.give_back(self.index);
    }
}

/// Its length, and of how many.
impl fmt::Debug for PoolBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "PoolBuf({} of {} bytes)",
            self.len, self.class.buffer_bytes
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;

    fn pool(count: usize, bytes: usize) -> BufferPool {
        let builder = BufferPool::builder().buffers(count, bytes);
        builder.build().unwrap()
    }

    fn life(pool: &BufferPool) -> std::sync::Weak<Class> {
        Arc::downgrade(&pool.0.classes[0])
    }

    #[test]
    fn the_buffer_that_came_home_last_is_taken_first() {
        let pool = pool(4, 100);
        let (first, second) = (pool.take(1).unwrap(), pool.take(1).unwrap());
        let (first_at, second_at) = (first.as_ptr(), second.as_ptr());
        drop(second);
        drop(first);
        let again = [pool.take(1).unwrap(), pool.take(1).unwrap()];
        assert_eq!(
            again.each_ref().map(|buf| buf.as_ptr()),
            [first_at, second_at]
        );
    }

    #[test]
    fn a_size_is_the_smallest_that_is_long_enough_and_never_another() {
        let pool = BufferPool::builder()
            .buffers(1, 1000)
            .buffers(1, 10)
            .buffers(1, 1000)
            .build()
            .unwrap();
        assert_eq!(format!("{pool:?}"), "{10: (1, 1), 1000: (2, 2)}");
        let small = pool.take(10).unwrap();
        assert_eq!(small.len(), 10);
        assert!(pool.try_take(0).is_none(), "the small ones are out");
        assert_eq!(pool.take(11).unwrap().len(), 1000);
        assert!(pool.try_take(1001).is_none());
        assert!(matches!(pool.take(1001), Err(Error::Value(_))));
        assert_eq!((pool.available(5), pool.available(500)), (0, 2));
        assert_eq!(pool.available(1001), 0);
    }

    #[test]
    fn buffers_do_not_overlap_and_start_where_asked() {
        for align in [1, 64, 4096, 2 << 20] {
            let builder = BufferPool::builder().buffers(5, 1000).align(align);
            let pool = builder.build().unwrap();
            let mut bufs: Vec<PoolBuf> = std::iter::from_fn(|| pool.try_take(1)).collect();
            assert_eq!(bufs.len(), 5);
            for (n, buf) in bufs.iter_mut().enumerate() {
                assert_eq!(buf.as_ptr() as usize % align.max(64), 0);
                buf.fill(n as u8);
            }
            for (n, buf) in bufs.iter().enumerate() {
                assert!(buf.iter().all(|byte| *byte == n as u8));
            }
        }
    }

    #[test]
    fn huge_pages_are_had_or_their_refusal_is_told() {
        let builder = BufferPool::builder().buffers(2, 4096).huge_pages(true);
        let pool = builder.build().unwrap();
        assert_eq!(pool.take(1).unwrap().as_ptr() as usize % (2 << 20), 0);
        if let Some(why) = pool.huge_pages_refused() {
            assert!(why.contains("transparent_hugepage"), "{why}");
        }
    }

    #[test]
    fn what_a_pool_cannot_be_is_refused() {
        let refused = |builder: BufferPoolBuilder| {
            assert!(matches!(builder.build(), Err(Error::Value(_))));
        };
        let builder = BufferPool::builder;
        refused(builder().buffers(0, 100));
        refused(builder().buffers(1, 0));
        refused(builder().buffers((1 << 20) + 1, 1));
        refused(builder().buffers(usize::MAX, 1));
        refused(builder().buffers(1, (1 << 30) + 1));
        refused(builder().buffers(3, 1 << 29));
        refused(builder().align(0));
        refused(builder().align(48));
        refused(builder().align(4 << 20));
        refused((1..=9).fold(builder(), |builder, bytes| builder.buffers(1, bytes)));
    }

    #[test]
    fn a_part_without_bytes_keeps_the_buffer() {
        let pool = pool(1, 100);
        let mut buf = crate::Buf::from(pool.take(1).unwrap());
        let held = buf.hold().unwrap();
        drop(buf);
        assert!(held.is_empty() && pool.try_take(1).is_none());
        drop(held);
        assert!(pool.try_take(1).is_some());
    }

    /// Takers wait for a few buffers, of which a third is given to a thread that divides and drops them: each has one holder, comes home
    /// once, and none is written while it is free (`take` looks).
    #[test]
    fn buffers_come_home_from_any_thread_to_any_taker() {
        const TAKERS: u8 = 4;
        let pool = pool(3, 64);
        let (sender, receiver) = mpsc::channel::<(u8, PoolBuf)>();
        let takers: Vec<_> = (0..TAKERS)
            .map(|mark| {
                let (pool, sender) = (pool.clone(), sender.clone());
                thread::spawn(move || {
                    for round in 0..500 {
                        // Waits: there are fewer buffers than takers.
                        let mut buf = pool.take(64).unwrap();
                        buf.fill(mark);
                        if round % 3 == 0 {
                            sender.send((mark, buf)).unwrap();
                        } else {
                            thread::yield_now();
                            assert!(buf.iter().all(|byte| *byte == mark));
                        }
                    }
                })
            })
            .collect();
        drop(sender);
        for (n, (mark, mut buf)) in receiver.into_iter().enumerate() {
            assert!(buf.iter().all(|byte| *byte == mark));
            drop(buf.split_to(n % 64));
            buf.fill(0xff);
        }
        takers.into_iter().for_each(|taker| taker.join().unwrap());
        assert_eq!(pool.available(64), 3);
    }

    #[test]
    fn who_waits_is_served_in_order_and_an_interrupted_wait_loses_no_buffer() {
        crate::run(|| {
            let pool = pool(1, 64);
            let order = Arc::new(Mutex::new(Vec::new()));
            let only = pool.take(1).unwrap();
            let fibers: Vec<_> = (0..5)
                .map(|number| {
                    let (pool, order) = (pool.clone(), order.clone());
                    crate::spawn(move || {
                        let buf = pool.take(1)?;
                        order.lock().unwrap().push(number);
                        crate::yield_now();
                        drop(buf);
                        Ok::<(), Error>(())
                    })
                })
                .collect();
            crate::yield_now();
            // Both while it waits, and after it was given one.
            fibers[1].cancel();
            drop(only);
            fibers[0].cancel();
            let results: Vec<_> = fibers
                .into_iter()
                .map(|fiber| fiber.join().unwrap())
                .collect();
            assert_eq!(results[1], Err(Error::Cancelled));
            assert_eq!(results.iter().filter(|result| result.is_err()).count(), 1);
            assert_eq!(*order.lock().unwrap(), [0, 2, 3, 4]);
            assert_eq!(pool.available(1), 1);
            let held = pool.take(1).unwrap();
            let timed_out = crate::timeout(0.01, || pool.take(1).map(drop));
            assert_eq!(timed_out, Err(Error::Timeout));
            drop(held);
            assert!(pool.try_take(1).is_some());
        });
        // A plain thread waits, too.
        let pool = pool(1, 64);
        let held = pool.take(1).unwrap();
        let timed_out = crate::timeout(0.01, || pool.take(1).map(drop));
        assert_eq!(timed_out, Err(Error::Timeout));
        let taker = pool.clone();
        let taker = thread::spawn(move || taker.take(1).map(drop));
        drop(held);
        taker.join().unwrap().unwrap();
        assert_eq!(pool.available(1), 1);
    }

    #[test]
    fn memory_lives_as_long_as_its_last_part() {
        let pool = pool(2, 4096);
        let life = life(&pool);
        let mut kept = crate::Buf::from(pool.take(1).unwrap());
        drop(pool.take(1));
        drop(pool);
        kept.fill(7);
        drop(kept.split_to(1));
        assert!(life.strong_count() > 0);
        thread::spawn(move || {
            assert!(kept.iter().all(|byte| *byte == 7));
        })
        .join()
        .unwrap();
        assert_eq!(life.strong_count(), 0, "it is unmapped");
    }

    #[test]
    fn buffers_outlive_the_socket_and_the_runtime() {
        let pool = pool(2, 4096);
        let received = crate::run({
            let pool = pool.clone();
            move || {
                let (left, right) = crate::socketpair()?;
                left.sendall(b"hello")?;
                let mut buf = pool.take(4096)?;
                let n = right.recv_into(&mut buf)?;
                buf.truncate(n);
                Ok::<PoolBuf, Error>(buf)
            }
        });
        let received = received.unwrap();
        assert_eq!(pool.available(1), 1);
        assert_eq!(*received, *b"hello");
        drop(received);
        assert_eq!(pool.available(1), 2);
        // As long as ever.
        assert_eq!(pool.take(1).unwrap().len(), 4096);
    }

    #[test]
    fn a_registration_is_bounded_for_the_process_and_told() {
        let bound = 64 << 10;
        let builder = BufferPool::builder().buffers(40, 4096);
        let pool = builder.locked_bytes_max(bound).build().unwrap();
        assert!(pool.0.classes[0].reserve().is_none());
        let why = pool.unregistered().unwrap();
        assert!(
            why.contains("64 KiB") && why.contains("locked_bytes_max"),
            "{why}"
        );
        let pool = BufferPool::new().unwrap();
        assert!(pool.unregistered().is_none());
        let reservation = pool.0.classes[0].reserve().unwrap();
        assert_eq!(pool.registrations(), 1);
        assert!(LOCKED_BYTES.load(Ordering::Relaxed) >= 256 << 10);
        drop(reservation);
        assert_eq!(pool.registrations(), 0);
        let all: usize = pool.0.classes.iter().map(|class| class.region().1).sum();
        assert!(2 * all <= LOCKED_BYTES_MAX, "the default fits two workers");
    }
}
