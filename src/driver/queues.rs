//! The memory a ring shares with the kernel: the submission and the completion queue.
//!
//! The `io-uring` crate sets the ring up and owns it. Its queue objects keep their pointers to themselves and synchronise on
//! every use, so the hot path has its own view of the same memory: local copies of the positions it owns, and one exchange
//! with the kernel per enter (18 instructions an operation less).
//!
//! ```text
//!  submission queue: we write entries and the tail, the kernel the head       completion queue: the other way round
//!        head ──▶ [ submitted later │ to be submitted ] ◀── tail                    head ──▶ [ to be read ] ◀── tail
//! ```
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

use io_uring::{IoUring, Parameters, squeue};

use super::slab::{CQE_F_MORE, Completion};
use crate::error::{Error, Result};
use crate::sys;

const OFF_SQ_RING: libc::off_t = 0;
const OFF_SQES: libc::off_t = 0x1000_0000;

const SQ_CQ_OVERFLOW: u32 = 1 << 1;
const SQ_TASKRUN: u32 = 1 << 2;

/// `struct io_uring_params` of the kernel, which [`Parameters`] wraps transparently.
#[repr(C)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    features: u32,
    wq_fd: u32,
    resv: [u32; 3],
    sq_off: SqOffsets,
    cq_off: CqOffsets,
}

#[repr(C)]
struct SqOffsets {
    head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    flags: u32,
    dropped: u32,
    array: u32,
    resv1: u32,
    user_addr: u64,
}

#[repr(C)]
struct CqOffsets {
    head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    overflow: u32,
    cqes: u32,
    flags: u32,
    resv1: u32,
    user_addr: u64,
}

const _: () = assert!(size_of::<Params>() == size_of::<Parameters>());
const _: () = assert!(size_of::<squeue::Entry>() == 64);

fn params(ring: &IoUring) -> &Params {
    // SAFETY: the crate documents Parameters as a transparent wrapper of the kernel's struct, whose layout Params repeats.
    unsafe { &*(ring.params() as *const Parameters).cast::<Params>() }
}

/// `IORING_FEAT_REG_REG_RING` (Linux 6.3), about which the crate keeps the answer to itself.
pub(super) fn has_reg_reg_ring(ring: &IoUring) -> bool {
    const FEAT_REG_REG_RING: u32 = 1 << 13;
    params(ring).features & FEAT_REG_REG_RING != 0
}

/// `struct io_uring_cqe`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Cqe {
    user_data: u64,
    res: i32,
    flags: u32,
}

/// A mapping of a ring's memory that forked children do not see.
struct Mapping {
    address: *mut u8,
    len: usize,
}

impl Mapping {
    fn new(fd: RawFd, offset: libc::off_t, len: usize) -> Result<Mapping> {
        // SAFETY: a shared mapping of the ring at an address the kernel picks; checked below.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                fd,
                offset,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(Error::from_errno(sys::errno()));
        }
        // SAFETY: the mapping above. Without it a child would keep the queues alive, which it never touches anyway.
        unsafe { libc::madvise(address, len, libc::MADV_DONTFORK) };
        Ok(Mapping {
            address: address.cast(),
            len,
        })
    }

    /// Gives the memory back.
    ///
    /// # Safety
    ///
    /// Called once, by the process that mapped it; nothing points into it any more.
    unsafe fn unmap(&self) {
        // SAFETY: mapped by `new` with this length; the rest is the caller's promise.
        unsafe { libc::munmap(self.address.cast(), self.len) };
    }

    fn at<T>(&self, offset: u32) -> *mut T {
        assert!(offset as usize + size_of::<T>() <= self.len);
        // SAFETY: inside the mapping, as just checked; the kernel aligns its fields.
        unsafe { self.address.add(offset as usize).cast() }
    }
}

/// Both queues of one ring, for the one thread that uses it.
pub(crate) struct Queues {
    /// Where the queue is full: the kernel's head, as last seen, plus the entries.
    sq_limit: u32,
    sq_tail: u32,
    sq_mask: u32,
    sq_entries: u32,
    sqes: *mut squeue::Entry,
    cq_head: u32,
    cq_tail_seen: u32,
    cq_mask: u32,
    cqes: *const Cqe,
    shared_sq_head: *const AtomicU32,
    shared_sq_tail: *const AtomicU32,
    shared_sq_flags: *const AtomicU32,
    shared_cq_head: *const AtomicU32,
    shared_cq_tail: *const AtomicU32,
    ring: Mapping,
    sqe_memory: Mapping,
}

impl Queues {
    /// The queues of a new ring.
    pub(crate) fn new(ring: &IoUring) -> Result<Queues> {
        let params = params(ring);
        let sq_end = params.sq_off.array as usize + params.sq_entries as usize * size_of::<u32>();
        let cq_end = params.cq_off.cqes as usize + params.cq_entries as usize * size_of::<Cqe>();
        // Both rings lie in one mapping since Linux 5.4.
        let memory = Mapping::new(ring.as_raw_fd(), OFF_SQ_RING, sq_end.max(cq_end))?;
        let sqe_memory = Mapping::new(
            ring.as_raw_fd(),
            OFF_SQES,
            params.sq_entries as usize * size_of::<squeue::Entry>(),
        )
        // SAFETY: mapped just above, and not used yet.
        .inspect_err(|_| unsafe { memory.unmap() })?;
        let shared_sq_head: *const AtomicU32 = memory.at(params.sq_off.head);
        let shared_cq_head: *const AtomicU32 = memory.at(params.cq_off.head);
        // SAFETY: the kernel keeps these counters at these offsets for as long as the mapping lives.
        let (sq_head, cq_head) = unsafe {
            (
                (*shared_sq_head).load(Ordering::Acquire),
                (*shared_cq_head).load(Ordering::Acquire),
            )
        };
        Ok(Queues {
            sq_limit: sq_head.wrapping_add(params.sq_entries),
            sq_tail: sq_head,
            sq_mask: params.sq_entries - 1,
            sq_entries: params.sq_entries,
            sqes: sqe_memory.at(0),
            cq_head,
            cq_tail_seen: cq_head,
            cq_mask: params.cq_entries - 1,
            cqes: memory.at(params.cq_off.cqes),
            shared_sq_head,
            shared_sq_tail: memory.at(params.sq_off.tail),
            shared_sq_flags: memory.at(params.sq_off.flags),
            shared_cq_head,
            shared_cq_tail: memory.at(params.cq_off.tail),
            ring: memory,
            sqe_memory,
        })
    }

    /// How many entries wait to be submitted, as of the last [`publish`](Queues::publish).
    #[inline(always)]
    pub(crate) fn unsubmitted(&self) -> u32 {
        self.sq_entries - self.free()
    }

    /// How many more entries fit.
    #[inline(always)]
    pub(crate) fn free(&self) -> u32 {
        self.sq_limit.wrapping_sub(self.sq_tail)
    }

    /// Writes an entry; the next [`publish`](Queues::publish) shows it to the kernel.
    ///
    /// # Safety
    ///
    /// There is room, and the memory the entry names stays what the kernel takes it for until its completion.
    #[inline(always)]
    pub(crate) unsafe fn push(&mut self, entry: squeue::Entry) {
        debug_assert!(self.free() > 0);
        // SAFETY: the masked index is inside the array; the kernel reads only entries between its head and the published tail.
        unsafe {
            self.sqes
                .add((self.sq_tail & self.sq_mask) as usize)
                .write(entry)
        };
        self.sq_tail = self.sq_tail.wrapping_add(1);
    }

    /// Shows the kernel what was written and learns what it took.
    #[inline]
    pub(crate) fn publish(&mut self) {
        // SAFETY: the counters live as long as the mapping.
        unsafe {
            (*self.shared_sq_tail).store(self.sq_tail, Ordering::Release);
            let head = (*self.shared_sq_head).load(Ordering::Acquire);
            self.sq_limit = head.wrapping_add(self.sq_entries);
        }
    }

    /// How many completions are at hand.
    #[inline(always)]
    pub(crate) fn completed(&self) -> u32 {
        self.cq_tail_seen.wrapping_sub(self.cq_head)
    }

    /// Whether there are completions to read, at hand or posted since.
    #[inline]
    pub(crate) fn has_posted(&self) -> bool {
        // SAFETY: the counter lives as long as the mapping. The entries are read only after `collect` has acquired it.
        self.cq_head != unsafe { (*self.shared_cq_tail).load(Ordering::Relaxed) }
    }

    /// Gives the read completions back and looks for new ones: how many came.
    #[inline]
    pub(crate) fn collect(&mut self) -> u32 {
        let before = self.cq_tail_seen;
        // SAFETY: the counters live as long as the mapping.
        unsafe {
            (*self.shared_cq_head).store(self.cq_head, Ordering::Release);
            self.cq_tail_seen = (*self.shared_cq_tail).load(Ordering::Acquire);
        }
        self.cq_tail_seen.wrapping_sub(before)
    }

    /// The next completion at hand.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> Option<(u64, Completion)> {
        if self.cq_head == self.cq_tail_seen {
            return None;
        }
        // SAFETY: the masked index is inside the array; the kernel wrote the entries below the tail it published, and leaves
        // them alone until the head has passed them.
        let cqe = unsafe { *self.cqes.add((self.cq_head & self.cq_mask) as usize) };
        self.cq_head = self.cq_head.wrapping_add(1);
        let completion = Completion {
            res: cqe.res,
            flags: cqe.flags,
        };
        Some((cqe.user_data, completion))
    }

    /// Of the completions at hand, the `user_data` of the one so many behind the next.
    #[inline(always)]
    pub(crate) fn ahead(&self, behind: u32) -> Option<u64> {
        if self.cq_tail_seen.wrapping_sub(self.cq_head) <= behind {
            return None;
        }
        let index = self.cq_head.wrapping_add(behind) & self.cq_mask;
        // SAFETY: as in `next`.
        Some(unsafe { (*self.cqes.add(index as usize)).user_data })
    }

    /// Whether a completion of `user_data` that no other will follow is at hand.
    pub(crate) fn has_last(&self, user_data: u64) -> bool {
        // SAFETY: the counter lives as long as the mapping.
        let tail = unsafe { (*self.shared_cq_tail).load(Ordering::Acquire) };
        let count = tail.wrapping_sub(self.cq_head);
        (0..count).any(|n| {
            let index = self.cq_head.wrapping_add(n) & self.cq_mask;
            // SAFETY: as in `next`: between the head and the tail just acquired.
            let cqe = unsafe { *self.cqes.add(index as usize) };
            cqe.user_data == user_data && cqe.flags & CQE_F_MORE == 0
        })
    }

    fn flags(&self) -> u32 {
        // SAFETY: the word lives as long as the mapping.
        unsafe { (*self.shared_sq_flags).load(Ordering::Relaxed) }
    }

    /// Whether completions did not fit; the next enter brings them.
    pub(crate) fn has_overflown(&self) -> bool {
        self.flags() & SQ_CQ_OVERFLOW != 0
    }

    /// Whether the kernel has completions that the next enter brings.
    pub(crate) fn has_deferred(&self) -> bool {
        self.flags() & (SQ_TASKRUN | SQ_CQ_OVERFLOW) != 0
    }

    /// Takes the memory out of this process's view.
    ///
    /// # Safety
    ///
    /// Called once, by the process that mapped it; the queues are not used afterwards.
    pub(crate) unsafe fn unmap(&mut self) {
        for mapping in [&self.ring, &self.sqe_memory] {
            // SAFETY: the caller's promise.
            unsafe { mapping.unmap() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use io_uring::opcode;

    #[test]
    fn entries_go_round_both_queues_many_times() {
        let ring = IoUring::new(4).unwrap();
        let mut queues = Queues::new(&ring).unwrap();
        let mut next = 0u64;
        for _ in 0..100 {
            assert_eq!(queues.free(), 4);
            for n in 0..4 {
                let entry = opcode::Nop::new().build().user_data(next + n);
                // SAFETY: there is room; a NOP names no memory.
                unsafe { queues.push(entry) };
            }
            assert_eq!(queues.free(), 0);
            queues.publish();
            // SAFETY: plain submission of the four entries.
            let submitted = unsafe { ring.submitter().enter::<libc::sigset_t>(4, 4, 1, None) };
            assert_eq!(submitted.unwrap(), 4);
            queues.publish();
            assert_eq!(queues.unsubmitted(), 0);
            assert_eq!(queues.collect(), 4);
            for n in 0..4 {
                assert_eq!(queues.next().unwrap().0, next + n);
            }
            assert!(queues.next().is_none());
            next += 4;
        }
        // SAFETY: last use, same process.
        unsafe { queues.unmap() };
    }
}
