//! A worker's receive buffers, and the leases that users hold of them.
//!
//! The buffers lie in one mapping, whose pages appear as they are touched. The worker hands out the one that came back last, so
//! that a few hot ones do all the work and stay in the cache, however many there are. A buffer is filled by plain calls only:
//! the kernel never holds one between two calls, so there is nothing to cancel before one goes home, and an idle connection
//! holds none.
//!
//! ```text
//!              take                                  dropped on the worker's thread
//!   free list ──────▶ Lease (split: several of them) ──────────────────────────────────▶ free list
//!       ▲                                │ dropped on another thread
//!       │ when the free list is empty    ▼
//!       └───────────────────────── returned list ── the pool has ended ──▶ counted; the last one frees the mapping
//! ```
//!
//! Neither way takes a lock or allocates, so a lease may also be dropped in a forked child or while a thread is torn down.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use super::count_part;

/// The end of a list.
const NONE: u32 = u32::MAX;
/// What the returned list is once the pool has ended.
const ENDED: u32 = u32::MAX - 1;
/// The most buffers of a pool.
const BUFFERS_MAX: usize = 1 << 20;
/// The most bytes of a buffer.
const BUFFER_BYTES_MAX: usize = 1 << 30;

/// Buffers are so much further apart than they are long: with equal low address bits their first bytes, which are all that short
/// messages touch, would compete for one set of the cache.
const COLOUR_BYTES: usize = 64;

/// What tests fill free buffers with, to see that nobody writes into them.
#[cfg(test)]
const POISON: u8 = 0xdb;

thread_local! {
    /// The pool whose free list is this thread's; null on a thread that runs no worker.
    static OWN: Cell<*const Shared> = const { Cell::new(ptr::null()) };
}

/// What is known of one buffer.
struct Slot {
    /// The one behind it in the free list or in the returned list.
    next: AtomicU32,
    /// How many leases share the buffer, less one.
    others: AtomicU32,
}

struct Shared {
    /// Null before the first lease. Written by the owner's thread, before there is a lease to read it.
    memory: Cell<*mut u8>,
    buffer_bytes: usize,
    /// From the start of one to the start of the next.
    pitch: usize,
    slots: Box<[Slot]>,
    /// The head of the list of those at home, the hottest first. Touched by the owner's thread only.
    free: Cell<u32>,
    /// The head of the list of those that other threads gave back.
    returned: AtomicU32,
    /// Once the pool has ended: how many have not come back.
    away: AtomicUsize,
    /// Goes when this is freed.
    #[cfg(test)]
    life: std::sync::Arc<()>,
}

impl Shared {
    fn mapping_bytes(&self) -> usize {
        self.slots.len() * self.pitch
    }

    /// Takes the first of the free list.
    #[inline(always)]
    fn pop(&self) -> Option<u32> {
        let index = self.free.get();
        // NONE is no slot's.
        let next = self.slots.get(index as usize)?.next.load(Ordering::Relaxed);
        self.free.set(next);
        Some(index)
    }

    #[inline(always)]
    fn push(&self, index: u32) {
        let next = self.free.replace(index);
        self.slots[index as usize]
            .next
            .store(next, Ordering::Relaxed);
    }

    /// Frees the pool.
    ///
    /// # Safety
    ///
    /// Called once, when the pool has ended and every buffer has come back.
    #[cold]
    unsafe fn free(shared: NonNull<Shared>) {
        // SAFETY: `Pool::new` made it from a box, and nobody reads it any more.
        let shared = unsafe { Box::from_raw(shared.as_ptr()) };
        if !shared.memory.get().is_null() {
            // SAFETY: mapped by `refill` with this length, and no lease points into it any more.
            unsafe { libc::munmap(shared.memory.get().cast(), shared.mapping_bytes()) };
        }
    }

    /// Puts a buffer into the returned list, or counts it as back.
    ///
    /// # Safety
    ///
    /// The buffer is away, and no lease of it is left.
    #[cold]
    #[inline(never)]
    unsafe fn give_back(shared: NonNull<Shared>, index: u32) {
        // SAFETY: the pool is not freed while a buffer, this one, is away.
        let pool = unsafe { shared.as_ref() };
        let mut head = pool.returned.load(Ordering::Acquire);
        loop {
            if head == ENDED {
                if pool.away.fetch_sub(1, Ordering::AcqRel) == 1 {
                    // SAFETY: the owner has added all that were away, and this was the last of them.
                    unsafe { Shared::free(shared) };
                }
                return;
            }
            pool.slots[index as usize]
                .next
                .store(head, Ordering::Relaxed);
            // Whoever takes from this list takes all of it, so a head that is what it was leads where it led.
            match pool.returned.compare_exchange_weak(
                head,
                index,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }
}

/// The owner's end of the buffers of one worker. Dropping it ends the pool; the memory goes with the last lease.
pub(crate) struct Pool(NonNull<Shared>);

impl Pool {
    /// `count` buffers of `buffer_bytes` bytes each, at most. Nothing is mapped yet.
    pub(crate) fn new(count: usize, buffer_bytes: usize) -> Pool {
        let count = count.min(BUFFERS_MAX);
        let slot = || Slot {
            next: AtomicU32::new(NONE),
            others: AtomicU32::new(0),
        };
        let buffer_bytes = if count == 0 {
            0
        } else {
            buffer_bytes.min(BUFFER_BYTES_MAX)
        };
        let shared = Box::new(Shared {
            memory: Cell::new(ptr::null_mut()),
            buffer_bytes,
            pitch: buffer_bytes.next_multiple_of(COLOUR_BYTES) + COLOUR_BYTES,
            slots: std::iter::repeat_with(slot).take(count).collect(),
            free: Cell::new(NONE),
            returned: AtomicU32::new(NONE),
            away: AtomicUsize::new(0),
            #[cfg(test)]
            life: std::sync::Arc::default(),
        });
        Pool(NonNull::from(Box::leak(shared)))
    }

    #[inline(always)]
    fn shared(&self) -> &Shared {
        // SAFETY: it is freed by our `drop` at the earliest.
        unsafe { self.0.as_ref() }
    }

    /// Bytes of each buffer; 0 where there are none.
    #[inline(always)]
    pub(crate) fn buffer_bytes(&self) -> usize {
        self.shared().buffer_bytes
    }

    /// Makes the pool the calling thread's own until the guard goes, so that leases dropped there go straight to the free list.
    pub(crate) fn enter(&self) -> impl Drop + use<> {
        struct Leave(*const Shared);
        impl Drop for Leave {
            fn drop(&mut self) {
                OWN.set(self.0);
            }
        }
        Leave(OWN.replace(self.0.as_ptr()))
    }

    /// The buffer that was used last; `None` if all are away.
    #[inline(always)]
    pub(crate) fn take(&self) -> Option<Lease> {
        let shared = self.shared();
        let index = match shared.pop() {
            Some(index) => index,
            None => self.refill()?,
        };
        // SAFETY: the index is below the number of buffers, which all lie inside the mapping: there is one, since a buffer was
        // in a list, and it is not at address 0.
        let start = unsafe {
            let start = shared.memory.get().add(index as usize * shared.pitch);
            NonNull::new_unchecked(start)
        };
        let lease = Lease {
            pool: self.0,
            start,
            len: shared.buffer_bytes as u32,
            index,
        };
        #[cfg(test)]
        assert!(
            lease.iter().all(|byte| *byte == POISON),
            "somebody wrote into a free buffer"
        );
        Some(lease)
    }

    /// Maps the buffers, or takes in what other threads gave back: one of them.
    #[cold]
    #[inline(never)]
    fn refill(&self) -> Option<u32> {
        let shared = self.shared();
        if shared.memory.get().is_null() {
            if shared.buffer_bytes == 0 {
                return None;
            }
            // SAFETY: an anonymous private mapping at an address the kernel picks; checked below.
            let memory = unsafe {
                libc::mmap(
                    ptr::null_mut(),
                    shared.mapping_bytes(),
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                    -1,
                    0,
                )
            };
            if memory == libc::MAP_FAILED {
                return None;
            }
            #[cfg(test)]
            // SAFETY: the mapping above, which nobody else knows yet.
            unsafe {
                memory
                    .cast::<u8>()
                    .write_bytes(POISON, shared.mapping_bytes());
            }
            shared.memory.set(memory.cast());
            (0..shared.slots.len() as u32)
                .rev()
                .for_each(|index| shared.push(index));
        } else {
            shared.drain_returned(NONE, |index| shared.push(index));
        }
        shared.pop()
    }
}

impl Shared {
    /// Leaves `replacement` as the returned list and hands over what was in it.
    fn drain_returned(&self, replacement: u32, mut take: impl FnMut(u32)) {
        // Acquire: what was written into a buffer before it was given back comes before what is written into it next.
        let mut index = self.returned.swap(replacement, Ordering::AcqRel);
        while index != NONE {
            let next = self.slots[index as usize].next.load(Ordering::Relaxed);
            take(index);
            index = next;
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        debug_assert!(!ptr::eq(OWN.get(), self.0.as_ptr()), "still entered");
        let shared = self.shared();
        let mut away = 0;
        if !shared.memory.get().is_null() {
            away = shared.slots.len() - std::iter::from_fn(|| shared.pop()).count();
        }
        shared.drain_returned(ENDED, |_| away -= 1);
        // Those that came back since were subtracted before this is added.
        if shared
            .away
            .fetch_add(away, Ordering::AcqRel)
            .wrapping_add(away)
            == 0
        {
            // SAFETY: the pool has ended, and all buffers are back.
            unsafe { Shared::free(self.0) };
        }
    }
}

/// A part of a pool's buffer that nobody else reads or writes.
pub(crate) struct Lease {
    pool: NonNull<Shared>,
    start: NonNull<u8>,
    len: u32,
    index: u32,
}

// SAFETY: a lease is the only access to its bytes (`split_to` divides them), and what it touches of the pool from another thread
// than the owner's is atomic or constant.
unsafe impl Send for Lease {}
// SAFETY: as above; by shared reference the bytes are only read.
unsafe impl Sync for Lease {}

impl Lease {
    fn slot(&self) -> &Slot {
        // SAFETY: the pool is not freed while this buffer is away.
        unsafe { &self.pool.as_ref().slots[self.index as usize] }
    }

    #[inline]
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len.min(u32::MAX as usize) as u32);
    }

    pub(crate) fn advance(&mut self, count: usize) {
        assert!(count <= self.len(), "past the end");
        // SAFETY: inside the part, as just checked.
        self.start = unsafe { self.start.add(count) };
        self.len -= count as u32;
    }

    /// Divides the part: the first `at` bytes are the new lease's.
    pub(crate) fn split_to(&mut self, at: usize) -> Lease {
        assert!(at <= self.len(), "past the end");
        count_part(&self.slot().others);
        let head = Lease {
            pool: self.pool,
            start: self.start,
            len: at as u32,
            index: self.index,
        };
        self.advance(at);
        head
    }
}

impl Deref for Lease {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: the part lies in the mapping, which lives while the buffer is away; its bytes were zeroed by the kernel, so they
        // are initialised; nobody writes them while a lease of them is borrowed (see Send).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len as usize) }
    }
}

impl DerefMut for Lease {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; the lease is borrowed exclusively, and nothing else reaches its bytes.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len as usize) }
    }
}

impl Drop for Lease {
    #[inline]
    fn drop(&mut self) {
        let others = &self.slot().others;
        // With no others there is nobody who could make more. The one who finds none left to subtract is the last.
        if others.load(Ordering::Acquire) != 0 && others.fetch_sub(1, Ordering::AcqRel) != 0 {
            return;
        }
        others.store(0, Ordering::Relaxed);
        #[cfg(test)]
        // SAFETY: no lease of the buffer is left, and it is not in a list yet.
        unsafe {
            let pool = self.pool.as_ref();
            let buffer = pool.memory.get().add(self.index as usize * pool.pitch);
            buffer.write_bytes(POISON, pool.buffer_bytes);
        }
        if ptr::eq(OWN.get(), self.pool.as_ptr()) {
            // SAFETY: the pool is not freed while this buffer is away. This is the owner's thread.
            unsafe { self.pool.as_ref() }.push(self.index);
        } else {
            // SAFETY: this was the buffer's last lease.
            unsafe { Shared::give_back(self.pool, self.index) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;

    #[test]
    fn the_buffer_that_came_back_last_is_lent_first() {
        let pool = Pool::new(4, 100);
        let _own = pool.enter();
        let first = pool.take().unwrap();
        let second = pool.take().unwrap();
        let (first_at, second_at) = (first.as_ptr(), second.as_ptr());
        assert_eq!((first.len(), second.len()), (100, 100));
        drop(second);
        drop(first);
        let again = [pool.take().unwrap(), pool.take().unwrap()];
        assert_eq!(
            again.each_ref().map(|lease| lease.as_ptr()),
            [first_at, second_at]
        );
    }

    #[test]
    fn buffers_do_not_overlap_and_end() {
        let pool = Pool::new(5, 1000);
        let _own = pool.enter();
        let mut leases: Vec<Lease> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(leases.len(), 5);
        for (n, lease) in leases.iter_mut().enumerate() {
            lease.fill(n as u8);
        }
        for (n, lease) in leases.iter().enumerate() {
            assert!(lease.iter().all(|byte| *byte == n as u8));
        }
        drop(leases.pop());
        let last = pool.take();
        assert!(last.is_some() && pool.take().is_none());
        assert!(Pool::new(0, 1000).take().is_none());
        assert_eq!(Pool::new(0, 1000).buffer_bytes(), 0);
    }

    #[test]
    fn a_buffer_goes_home_with_its_last_part() {
        let pool = Pool::new(1, 8);
        let _own = pool.enter();
        let mut tail = pool.take().unwrap();
        tail.copy_from_slice(b"abcdefgh");
        let mut head = tail.split_to(5);
        let middle = head.split_to(2);
        assert_eq!(
            (&*middle, &*head, &*tail),
            (&b"ab"[..], &b"cde"[..], &b"fgh"[..])
        );
        tail.advance(1);
        tail.truncate(1);
        assert_eq!(&*tail, b"g");
        drop(head);
        assert!(pool.take().is_none());
        thread::spawn(move || drop(tail)).join().unwrap();
        assert!(pool.take().is_none());
        drop(middle);
        assert!(pool.take().is_some());
    }

    /// Leases go to other threads, are divided there and dropped there in any order, while the owner goes on and then ends: every
    /// buffer comes back once, and none is written while it is free (`take` looks).
    #[test]
    fn leases_come_home_from_any_thread_until_and_after_the_end() {
        for round in 0..200 {
            let pool = Pool::new(8, 64);
            let own = pool.enter();
            let (senders, threads): (Vec<_>, Vec<_>) = (0..3)
                .map(|thread| {
                    let (sender, receiver) = mpsc::channel::<(u8, Lease)>();
                    let run = move || {
                        for (n, (mark, mut lease)) in receiver.into_iter().enumerate() {
                            assert!(lease.iter().all(|byte| *byte == mark));
                            if n % 3 == thread {
                                drop(lease.split_to(n % 64));
                            }
                            lease.fill(0xff);
                        }
                    };
                    (sender, thread::spawn(run))
                })
                .unzip();
            let mut lent = 0;
            let mut tries = 0u32;
            while lent < 100 {
                tries += 1;
                assert!(tries < 10_000_000, "buffers do not come back");
                let Some(mut lease) = pool.take() else {
                    thread::yield_now();
                    continue;
                };
                lease.fill(lent);
                if lent % 5 == 0 {
                    drop(lease);
                } else {
                    senders[lent as usize % 3].send((lent, lease)).unwrap();
                }
                lent += 1;
            }
            if round % 2 == 0 {
                // All are back before the end.
                drop(senders);
                threads
                    .into_iter()
                    .for_each(|thread| thread.join().unwrap());
                let all: Vec<Lease> = std::iter::from_fn(|| pool.take()).collect();
                assert_eq!(all.len(), 8);
                drop(all);
                drop(own);
                drop(pool);
            } else {
                // The end comes in between.
                drop(own);
                drop(pool);
                drop(senders);
                threads
                    .into_iter()
                    .for_each(|thread| thread.join().unwrap());
            }
        }
    }

    #[test]
    fn memory_lives_as_long_as_its_last_lease() {
        let pool = Pool::new(2, 4096);
        let mut kept = pool.take().unwrap();
        let life = pool.shared().life.clone();
        drop(pool.take());
        drop(pool);
        kept.fill(7);
        drop(kept.split_to(1));
        assert_eq!(std::sync::Arc::strong_count(&life), 2);
        thread::spawn(move || {
            assert!(kept.iter().all(|byte| *byte == 7));
            drop(kept);
        })
        .join()
        .unwrap();
        assert_eq!(std::sync::Arc::strong_count(&life), 1, "it is freed");
        let unused = Pool::new(2, 4096);
        let life = unused.shared().life.clone();
        drop(unused);
        assert_eq!(std::sync::Arc::strong_count(&life), 1);
    }
}
