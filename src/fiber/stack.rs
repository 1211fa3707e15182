//! Stacks for fibers: pooled, guarded, committed as touched.
//!
//! ```text
//!  low                                                                            high
//!  ┌──────────── guard ───────────┬────────────────── usable ──────────────┬────────┐
//!  │ never accessible, 64 KiB     │ grows down, pages appear as touched    │ colour │
//!  └──────────────────────────────┴────────────────────────────────────────┴────────┘
//!  limit                                                                top         end of the slot
//! ```
//!
//! - The guard is 64 KiB because C code is not stack-probed: a deep C frame may step over one page, hardly over sixteen.
//!   Guards are markers in the page tables where the kernel has MADV_GUARD_INSTALL (Linux 6.13), set in batches; elsewhere
//!   `mprotect`, which costs two mappings a stack.
//! - The slot's size in pages is odd and tops are shifted by cache lines: with equal low address bits, all fibers' hottest
//!   lines would compete for one set of the cache (512 fibers switch three times slower then).
//! - Slots are reused last in, first out: the last fiber's pages are still in the cache.
//!
//! It knows nothing of what runs on a stack.
#![allow(unsafe_code)]

use std::num::NonZeroUsize;

use corosensei::stack::{Stack, StackPointer};

use crate::error::{Error, Result};
use crate::sys;

/// Bytes below each stack that fault when touched.
pub(crate) const GUARD_BYTES: usize = 64 * 1024;

/// The smallest stack that can be asked for: room for a frame or two of user code.
pub(crate) const STACK_BYTES_MIN: usize = 16 * 1024;

/// Stacks whose guards are installed at a time, which is also the most entries process_madvise(2) takes.
const BATCH: usize = 1024;

/// Stacks reserved with the first mapping; each further mapping doubles, up to the maximum.
const RESERVE_FIRST: usize = 16;
const RESERVE_MAX: usize = 65_536;

/// Stack tops are shifted by this many cache lines at most.
const COLOURS: usize = 24;
const CACHE_LINE: usize = 64;

const MADV_GUARD_INSTALL: libc::c_int = 102;

/// One stack, from its pool and back to it.
#[derive(Debug)]
pub(crate) struct FiberStack {
    /// The highest address, a multiple of 64.
    top: NonZeroUsize,
    /// The lowest address, guard included.
    limit: NonZeroUsize,
}

impl FiberStack {
    #[cfg(test)]
    fn top(&self) -> usize {
        self.top.get()
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit.get()
    }

    /// Keeps the upper `bytes` (rounded up to a cache line) for the caller and shortens the stack by them: their address.
    pub(crate) fn reserve(&mut self, bytes: usize) -> usize {
        let kept = bytes.next_multiple_of(CACHE_LINE);
        assert!(kept < STACK_BYTES_MIN / 4, "a stack is for frames");
        let address = self.top.get() - kept;
        self.top = NonZeroUsize::new(address).expect("stacks are not at address 0");
        address
    }

    /// Undoes [`reserve`](FiberStack::reserve).
    pub(crate) fn restore(&mut self, bytes: usize) {
        let address = self.top.get() + bytes.next_multiple_of(CACHE_LINE);
        self.top = NonZeroUsize::new(address).expect("stacks are not at address 0");
    }
}

// SAFETY: `StackPool::take` hands out each slot once until it is given back; below `limit + GUARD_BYTES` the guard faults; the
// usable part is at least STACK_BYTES_MIN less what `reserve` keeps, which is more than corosensei's minimum of 4 KiB; both
// ends are multiples of 64.
unsafe impl Stack for FiberStack {
    #[inline]
    fn base(&self) -> StackPointer {
        self.top
    }

    #[inline]
    fn limit(&self) -> StackPointer {
        self.limit
    }
}

/// A reservation of address space for many stacks.
struct Chunk {
    base: usize,
    stacks: usize,
    /// Stacks from here on have no guard yet.
    guarded: usize,
    /// Stacks from here on were never handed out.
    used: usize,
}

/// One worker's stacks.
pub(crate) struct StackPool {
    /// Distance between two stacks.
    pitch: usize,
    free: Vec<FiberStack>,
    chunks: Vec<Chunk>,
    taken: usize,
}

impl StackPool {
    /// A pool of stacks with at least `stack_bytes` usable bytes each. Nothing is mapped yet.
    pub(crate) fn new(stack_bytes: usize) -> StackPool {
        let page = sys::page_size();
        let usable = stack_bytes.max(STACK_BYTES_MIN).next_multiple_of(page);
        let colours = (COLOURS * CACHE_LINE).next_multiple_of(page);
        let mut pages = (GUARD_BYTES.next_multiple_of(page) + usable + colours) / page;
        // Odd, so that neighbours differ in the address bits that pick a cache set.
        pages |= 1;
        StackPool {
            pitch: pages * page,
            free: Vec::new(),
            chunks: Vec::new(),
            taken: 0,
        }
    }

    /// A stack nobody else has.
    ///
    /// # Errors
    ///
    /// ENOMEM: no address space, or no memory for the guard.
    pub(crate) fn take(&mut self) -> Result<FiberStack> {
        let stack = match self.free.pop() {
            Some(stack) => stack,
            None => self.fresh()?,
        };
        self.taken += 1;
        Ok(stack)
    }

    /// Takes a stack back, its frames all gone.
    pub(crate) fn give(&mut self, stack: FiberStack) {
        self.taken -= 1;
        self.free.push(stack);
    }

    #[cold]
    fn fresh(&mut self) -> Result<FiberStack> {
        if self
            .chunks
            .last()
            .is_none_or(|chunk| chunk.used == chunk.stacks)
        {
            let stacks = self
                .chunks
                .last()
                .map_or(RESERVE_FIRST, |chunk| (chunk.stacks * 2).min(RESERVE_MAX));
            let chunk = reserve(stacks, self.pitch)?;
            self.chunks.push(chunk);
        }
        let pitch = self.pitch;
        let chunk = self.chunks.last_mut().expect("reserved above");
        if chunk.used == chunk.guarded {
            let count = BATCH.min(chunk.stacks - chunk.guarded);
            guard(chunk.base + chunk.guarded * pitch, count, pitch)?;
            chunk.guarded += count;
        }
        let index = chunk.used;
        chunk.used += 1;
        let limit = chunk.base + index * pitch;
        let top = limit + pitch - (index % COLOURS) * CACHE_LINE;
        Ok(FiberStack {
            top: NonZeroUsize::new(top).expect("not at address 0"),
            limit: NonZeroUsize::new(limit).expect("not at address 0"),
        })
    }
}

impl Drop for StackPool {
    fn drop(&mut self) {
        if self.taken > 0 {
            // Fibers that could not be ended keep their stacks, and the kernel may still write into them.
            return;
        }
        for chunk in &self.chunks {
            // SAFETY: mapped by `reserve` with this length; no stack of it is in use.
            unsafe { libc::munmap(chunk.base as *mut _, chunk.stacks * self.pitch) };
        }
    }
}

fn reserve(stacks: usize, pitch: usize) -> Result<Chunk> {
    let len = stacks * pitch;
    // SAFETY: a private anonymous mapping at an address the kernel picks; checked below.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_STACK,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(Error::from_errno(sys::errno()));
    }
    // One touched byte must cost one page, not two megabytes. A kernel without huge pages refuses, and has none.
    // SAFETY: the mapping above.
    unsafe { libc::madvise(base, len, libc::MADV_NOHUGEPAGE) };
    Ok(Chunk {
        base: base as usize,
        stacks,
        guarded: 0,
        used: 0,
    })
}

/// Makes the lowest GUARD_BYTES of `count` stacks from `base` on inaccessible.
fn guard(base: usize, count: usize, pitch: usize) -> Result<()> {
    let guards: Vec<libc::iovec> = (0..count)
        .map(|index| libc::iovec {
            iov_base: (base + index * pitch) as *mut _,
            iov_len: GUARD_BYTES,
        })
        .collect();
    let mut done = guard_batch(&guards);
    for guard in &guards[done..] {
        // SAFETY: inside a mapping of ours whose stacks nobody uses yet.
        if unsafe { libc::madvise(guard.iov_base, guard.iov_len, MADV_GUARD_INSTALL) } != 0 {
            break;
        }
        done += 1;
    }
    for guard in &guards[done..] {
        // SAFETY: as above.
        if unsafe { libc::mprotect(guard.iov_base, guard.iov_len, libc::PROT_NONE) } != 0 {
            return Err(Error::from_errno(sys::errno()));
        }
    }
    Ok(())
}

/// Installs guards with one process_madvise(2): how many it did, from the first on. Kernels before 6.13 do none.
fn guard_batch(guards: &[libc::iovec]) -> usize {
    // SAFETY: no memory is passed.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) } as i32;
    if pidfd < 0 {
        return 0;
    }
    // SAFETY: the vector lives through the call; the ranges lie in a mapping of ours whose stacks nobody uses yet.
    let advised = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            pidfd,
            guards.as_ptr(),
            guards.len(),
            MADV_GUARD_INSTALL,
            0,
        )
    };
    sys::close(pidfd);
    usize::try_from(advised).unwrap_or(0) / GUARD_BYTES
}

/// Has the cache fetch so many lines from an address on. Any address does: it is a hint, which the processor may drop.
#[inline(always)]
pub(super) fn prefetch<const LINES: usize>(address: *const u8) {
    for line in 0..LINES {
        let address = address.wrapping_add(line * 64);
        // SAFETY: the instruction reads nothing and never faults.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(address.cast());
        }
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        unsafe {
            std::arch::asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stacks_are_apart_guarded_and_reused_last_in_first_out() {
        let mut pool = StackPool::new(64 * 1024);
        let stacks: Vec<FiberStack> = (0..100).map(|_| pool.take().unwrap()).collect();
        for stack in &stacks {
            assert_eq!(stack.top() % 64, 0);
            assert!(stack.top() - stack.limit() >= GUARD_BYTES + 64 * 1024);
            for other in &stacks {
                assert!(
                    stack.limit() == other.limit()
                        || stack.limit() >= other.top()
                        || other.limit() >= stack.top()
                );
            }
        }
        let tops: std::collections::HashSet<usize> =
            stacks.iter().map(|stack| stack.top() % 4096).collect();
        assert!(tops.len() >= COLOURS, "tops spread over the cache sets");
        let mut last = 0;
        for stack in stacks {
            last = stack.top();
            pool.give(stack);
        }
        assert_eq!(pool.take().unwrap().top(), last);
        pool.taken = 0;
    }

    #[test]
    fn the_guard_faults_and_the_stack_does_not() {
        let mut pool = StackPool::new(64 * 1024);
        let stack = pool.take().unwrap();
        let usable = stack.limit() + GUARD_BYTES;
        // SAFETY: the pool's memory, used by nobody.
        unsafe { (usable as *mut u8).write_volatile(1) };
        for guarded in [stack.limit(), usable - 1] {
            // SAFETY: the child touches one byte and dies of it, or leaves by _exit; both are async-signal-safe.
            let child = unsafe {
                match libc::fork() {
                    0 => {
                        libc::signal(libc::SIGSEGV, libc::SIG_DFL);
                        (guarded as *mut u8).write_volatile(1);
                        libc::_exit(0);
                    }
                    child => child,
                }
            };
            let mut status = 0;
            // SAFETY: `status` lives through the call; the child is ours.
            unsafe { libc::waitpid(child, &mut status, 0) };
            assert!(libc::WIFSIGNALED(status), "byte {guarded:#x} is writable");
        }
        pool.give(stack);
    }
}
