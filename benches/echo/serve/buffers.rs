//! A provided buffer ring, and what it is filled with.
//!
//! The kernel takes buffers from the ring in the order they were put there. Those given back are therefore kept on a stack, and
//! the ring is only topped up to what the connections have been seen to need at once, so that the same few buffers, still in the
//! processor's cache, are used over and over.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types;

use super::ring::{REGISTER_PBUF_RING, map, map_lazily, register};

/// The only buffer group.
pub const GROUP: u16 = 0;
/// How many buffers the ring has at first; each time it runs out they double.
const FILL: u16 = 2;

/// The ring shared with the kernel, and the memory of its buffers.
pub struct Buffers {
    entries: *mut types::BufRingEntry,
    memory: *mut u8,
    size: u32,
    mask: u16,
    tail: u16,
    published: u16,
    /// Buffers in the ring, and how many there should be.
    inside: u16,
    fill: u16,
    /// The ring ran out since it was topped up last.
    short: bool,
    /// Buffers not in the ring and not in use; the last one is the warmest.
    free: Vec<u16>,
}

impl Buffers {
    /// Registers `count` (a power of two) buffers of `size` bytes with a ring.
    pub fn new(count: u16, size: u32, ring_fd: RawFd) -> io::Result<Self> {
        /// `struct io_uring_buf_reg`.
        #[repr(C)]
        struct BufReg {
            ring_addr: u64,
            ring_entries: u32,
            bgid: u16,
            flags: u16,
            resv: [u64; 3],
        }
        let entries = map(usize::from(count) * size_of::<types::BufRingEntry>(), -1, 0)?;
        let mut registration = BufReg {
            ring_addr: entries as u64,
            ring_entries: u32::from(count),
            bgid: GROUP,
            flags: 0,
            resv: [0; 3],
        };
        register(ring_fd, REGISTER_PBUF_RING, &mut registration)?;
        let mut buffers = Self {
            entries: entries.cast(),
            memory: map_lazily(usize::from(count) * size as usize)?,
            size,
            mask: count - 1,
            tail: 0,
            published: 0,
            inside: 0,
            fill: FILL.min(count),
            short: false,
            free: (0..count).rev().collect(),
        };
        buffers.publish();
        Ok(buffers)
    }

    /// Where a buffer is.
    #[inline(always)]
    pub fn address(&self, id: u16) -> *mut u8 {
        // SAFETY: ids are below the count, for which the memory was mapped.
        unsafe { self.memory.add(usize::from(id) * self.size as usize) }
    }

    /// Notes that the kernel has taken a buffer out of the ring.
    #[inline(always)]
    pub fn taken(&mut self) {
        self.inside = self.inside.wrapping_sub(1);
    }

    /// Notes that the ring ran out.
    #[cold]
    pub fn ran_out(&mut self) {
        self.short = true;
    }

    /// Takes back a buffer that is not in use any more.
    #[inline(always)]
    pub fn give_back(&mut self, id: u16) {
        self.free.push(id);
    }

    /// Tops up the ring.
    #[inline(always)]
    pub fn publish(&mut self) {
        if self.short {
            self.short = false;
            self.fill = self.fill.saturating_mul(2).min(self.mask + 1);
        }
        while self.inside < self.fill {
            let Some(id) = self.free.pop() else {
                break;
            };
            let address = self.address(id);
            // SAFETY: the masked tail is within the ring, and the kernel does not read entries past the published tail.
            let entry = unsafe { &mut *self.entries.add(usize::from(self.tail & self.mask)) };
            entry.set_addr(address as u64);
            entry.set_len(self.size);
            entry.set_bid(id);
            self.tail = self.tail.wrapping_add(1);
            self.inside += 1;
        }
        if self.tail != self.published {
            self.published = self.tail;
            // SAFETY: the tail is a live, aligned u16 that the kernel only reads.
            unsafe {
                let tail = types::BufRingEntry::tail(self.entries).cast::<AtomicU16>();
                (*tail).store(self.tail, Ordering::Release);
            }
        }
    }

    /// How many buffers the kernel can take.
    pub fn available(&self) -> usize {
        usize::from(self.inside)
    }
}
