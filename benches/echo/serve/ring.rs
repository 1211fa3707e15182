//! An io_uring ring without an abstraction: both queues, and how to enter it.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use clap::Args;
use io_uring::{opcode, squeue, types};

use crate::sys::{check, other};

#[derive(Args)]
pub struct RingArgs {
    /// Entries of the submission queue; the completion queue has four times as many.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(4..=8192))]
    entries: u32,
}

pub const SETUP_CQSIZE: u32 = 1 << 3;
pub const SETUP_SUBMIT_ALL: u32 = 1 << 7;
pub const SETUP_COOP_TASKRUN: u32 = 1 << 8;
pub const SETUP_SINGLE_ISSUER: u32 = 1 << 12;
pub const SETUP_DEFER_TASKRUN: u32 = 1 << 13;
pub const SETUP_NO_SQARRAY: u32 = 1 << 16;
pub const FEAT_SINGLE_MMAP: u32 = 1 << 0;
pub const OFF_SQES: libc::off_t = 0x1000_0000;
pub const ENTER_GETEVENTS: u32 = 1 << 0;
const ENTER_EXT_ARG: u32 = 1 << 3;
pub const ENTER_REGISTERED_RING: u32 = 1 << 4;
const REGISTER_SPARSE: u32 = 1;
const REGISTER_FILES2: u32 = 13;
pub const REGISTER_RING_FDS: u32 = 20;
pub const REGISTER_PBUF_RING: u32 = 22;
pub const RECVSEND_POLL_FIRST: u16 = 1 << 0;

/// The setups to try, best first.
pub const LADDER: [u32; 5] = [
    SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN | SETUP_SUBMIT_ALL | SETUP_NO_SQARRAY,
    SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN | SETUP_SUBMIT_ALL,
    SETUP_SINGLE_ISSUER | SETUP_COOP_TASKRUN | SETUP_SUBMIT_ALL,
    SETUP_COOP_TASKRUN | SETUP_SUBMIT_ALL,
    0,
];

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Default)]
pub struct Params {
    pub sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    features: u32,
    wq_fd: u32,
    resv: [u32; 3],
    sq: SqOffsets,
    cq: CqOffsets,
}

#[repr(C)]
#[derive(Default)]
pub struct SqOffsets {
    pub head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    flags: u32,
    dropped: u32,
    array: u32,
    resv: u32,
    user_addr: u64,
}

#[repr(C)]
#[derive(Default)]
pub struct CqOffsets {
    pub head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    overflow: u32,
    cqes: u32,
    flags: u32,
    resv: u32,
    user_addr: u64,
}

/// `struct io_uring_cqe`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Cqe {
    pub user_data: u64,
    pub result: i32,
    pub flags: u32,
}

/// Both queues of a ring, mapped for the life of the process, and how to enter it.
pub struct Ring {
    sqes: *mut squeue::Entry,
    cqes: *const Cqe,
    sq_mask: u32,
    cq_mask: u32,
    /// Our end of the submission queue, and as much of it as the kernel has taken.
    sq_tail: u32,
    sq_taken: u32,
    /// Our end of the completion queue, and the kernel's as of the last entry.
    cq_head: u32,
    cq_tail: u32,
    shared_sq_head: &'static AtomicU32,
    shared_sq_tail: &'static AtomicU32,
    shared_cq_head: &'static AtomicU32,
    shared_cq_tail: &'static AtomicU32,
    pub fd: RawFd,
    enter_fd: RawFd,
    enter_flags: u32,
}

/// Maps memory that is never unmapped: anonymous for the descriptor -1.
pub fn map(bytes: usize, fd: RawFd, offset: libc::off_t) -> io::Result<*mut u8> {
    let kind = if fd < 0 {
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS
    } else {
        libc::MAP_SHARED
    };
    map_with(bytes, kind | libc::MAP_POPULATE, fd, offset)
}

/// Maps anonymous memory, a page of which is there when it is first used.
pub fn map_lazily(bytes: usize) -> io::Result<*mut u8> {
    map_with(bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
}

fn map_with(bytes: usize, flags: i32, fd: RawFd, offset: libc::off_t) -> io::Result<*mut u8> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a mapping at a place of the kernel's choice disturbs nothing.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, fd, offset) };
    if address == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(address.cast())
    }
}

impl Ring {
    /// Opens the best ring the kernel grants.
    pub fn open(args: &RingArgs) -> io::Result<Self> {
        let (fd, params) = Self::setup(args.entries)?;
        if params.features & FEAT_SINGLE_MMAP == 0 {
            return Err(other("the kernel is too old"));
        }
        let sq_end = params.sq.array as usize + params.sq_entries as usize * size_of::<u32>();
        let cq_end = params.cq.cqes as usize + params.cq_entries as usize * size_of::<Cqe>();
        let rings = map(sq_end.max(cq_end), fd, 0)?;
        let sqes = map(
            params.sq_entries as usize * size_of::<squeue::Entry>(),
            fd,
            OFF_SQES,
        )?;
        if params.flags & SETUP_NO_SQARRAY == 0 {
            for index in 0..params.sq_entries {
                // SAFETY: the array lies in the mapping, as the kernel said.
                unsafe {
                    let array = rings.add(params.sq.array as usize).cast::<u32>();
                    array.add(index as usize).write(index);
                }
            }
        }
        // SAFETY: the offsets are the kernel's, of aligned words in the mapping,
        // which is never unmapped.
        let shared =
            |offset: u32| unsafe { AtomicU32::from_ptr(rings.add(offset as usize).cast()) };

        #[repr(C)]
        struct RingFd {
            offset: u32,
            resv: u32,
            data: u64,
        }
        let mut update = RingFd {
            offset: u32::MAX,
            resv: 0,
            data: fd as u64,
        };
        let (enter_fd, enter_flags) = match register(fd, REGISTER_RING_FDS, &mut update) {
            Ok(()) => (
                update.offset as RawFd,
                ENTER_GETEVENTS | ENTER_REGISTERED_RING,
            ),
            Err(error) => {
                eprintln!("echo: ring descriptor not registered: {error}");
                (fd, ENTER_GETEVENTS)
            }
        };
        Ok(Self {
            sqes: sqes.cast(),
            // SAFETY: within the mapping, as above.
            cqes: unsafe { rings.add(params.cq.cqes as usize).cast() },
            sq_mask: params.sq_entries - 1,
            cq_mask: params.cq_entries - 1,
            sq_tail: 0,
            sq_taken: 0,
            cq_head: 0,
            cq_tail: 0,
            shared_sq_head: shared(params.sq.head),
            shared_sq_tail: shared(params.sq.tail),
            shared_cq_head: shared(params.cq.head),
            shared_cq_tail: shared(params.cq.tail),
            fd,
            enter_fd,
            enter_flags,
        })
    }

    pub fn setup(entries: u32) -> io::Result<(RawFd, Params)> {
        let mut last = None;
        for (rung, flags) in LADDER.into_iter().enumerate() {
            let mut params = Params {
                cq_entries: entries * 4,
                flags: flags | SETUP_CQSIZE,
                ..Params::default()
            };
            // SAFETY: the parameters are valid for reads and writes.
            let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, entries, &raw mut params) };
            if fd >= 0 {
                if rung > 0 {
                    eprintln!("echo: ring set up with the flags of rung {rung}");
                }
                return Ok((fd as RawFd, params));
            }
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EINVAL) {
                return Err(error);
            }
            last = Some(error);
        }
        Err(last.unwrap_or_else(|| other("no ring")))
    }

    /// Submits everything queued and waits for `want` completions.
    #[inline(always)]
    pub fn enter(&mut self, want: u32) -> io::Result<()> {
        self.enter_with(want, self.enter_flags, std::ptr::null(), 0)
    }

    /// As [`enter`](Ring::enter), waiting no longer than so many nanoseconds.
    #[inline(always)]
    pub fn enter_for(&mut self, want: u32, timeout_ns: u64) -> io::Result<()> {
        let timeout = types::Timespec::new()
            .sec(timeout_ns / 1_000_000_000)
            .nsec((timeout_ns % 1_000_000_000) as u32);
        let argument = types::SubmitArgs::new().timespec(&timeout);
        self.enter_with(
            want,
            self.enter_flags | ENTER_EXT_ARG,
            (&raw const argument).cast(),
            size_of::<types::SubmitArgs<'_, '_>>(),
        )
    }

    #[inline(always)]
    fn enter_with(
        &mut self,
        want: u32,
        flags: u32,
        argument: *const libc::c_void,
        size: usize,
    ) -> io::Result<()> {
        self.shared_cq_head.store(self.cq_head, Ordering::Release);
        self.shared_sq_tail.store(self.sq_tail, Ordering::Release);
        let submit = self.sq_tail.wrapping_sub(self.sq_taken);
        // SAFETY: every queued entry points to memory that outlives its operation, and the argument outlives the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.enter_fd,
                submit,
                want,
                flags,
                argument,
                size,
            )
        };
        self.sq_taken = self.shared_sq_head.load(Ordering::Acquire);
        self.cq_tail = self.shared_cq_tail.load(Ordering::Acquire);
        if result < 0 {
            return enter_failed();
        }
        Ok(())
    }

    /// How many completions wait to be taken, as of the last `enter`.
    #[inline(always)]
    pub fn ready(&self) -> u32 {
        self.cq_tail.wrapping_sub(self.cq_head)
    }

    /// Gives the ring a table of so many descriptors of its own.
    pub fn table(&self, count: u32) -> io::Result<()> {
        /// `struct io_uring_rsrc_register`.
        #[repr(C)]
        struct Table {
            count: u32,
            flags: u32,
            resv: u64,
            data: u64,
            tags: u64,
        }
        let mut table = Table {
            count,
            flags: REGISTER_SPARSE,
            resv: 0,
            data: 0,
            tags: 0,
        };
        let size = size_of::<Table>() as u32;
        register_of(self.fd, REGISTER_FILES2, &mut table, size)
    }

    /// The next completion, if one has come by the last `enter`.
    #[inline(always)]
    pub fn next(&mut self) -> Option<Cqe> {
        if self.cq_head == self.cq_tail {
            return None;
        }
        // SAFETY: the kernel has filled the entries between head and tail.
        let cqe = unsafe { *self.cqes.add((self.cq_head & self.cq_mask) as usize) };
        self.cq_head = self.cq_head.wrapping_add(1);
        Some(cqe)
    }

    /// How many entries can be queued before some must be submitted.
    #[inline(always)]
    pub fn room(&self) -> u32 {
        (self.sq_mask + 1).wrapping_sub(self.sq_tail.wrapping_sub(self.sq_taken))
    }

    /// Queues an accept that goes on by itself, into descriptors of the ring's own if `direct`.
    pub fn accept(&mut self, listener: RawFd, direct: bool) -> io::Result<()> {
        let flags = if direct { 0 } else { libc::SOCK_CLOEXEC };
        let entry = opcode::AcceptMulti::new(types::Fd(listener))
            .allocate_file_index(direct)
            .flags(flags)
            .build()
            .user_data(ACCEPT);
        self.push(entry)
    }

    /// Queues one entry, making room first if there is none.
    #[inline(always)]
    pub fn push(&mut self, entry: squeue::Entry) -> io::Result<()> {
        if self.room() == 0 {
            self.make_room(1)?;
        }
        // SAFETY: there is room, so the kernel does not read the entry at the tail.
        unsafe {
            self.sqes
                .add((self.sq_tail & self.sq_mask) as usize)
                .write(entry);
        }
        self.sq_tail = self.sq_tail.wrapping_add(1);
        Ok(())
    }

    /// Sees to it that a chain of `count` entries goes into one submission.
    #[cold]
    #[inline(never)]
    pub fn make_room(&mut self, count: u32) -> io::Result<()> {
        for _ in 0..1000 {
            if self.room() >= count {
                return Ok(());
            }
            self.enter(0)?;
        }
        Err(other("the submission queue stays full"))
    }
}

/// io_uring_register(2) with one argument; its success may be 0 or 1.
pub fn register<T>(fd: RawFd, operation: u32, argument: &mut T) -> io::Result<()> {
    register_of(fd, operation, argument, 1)
}

fn register_of<T>(fd: RawFd, operation: u32, argument: &mut T, count: u32) -> io::Result<()> {
    let argument = std::ptr::from_mut(argument);
    // SAFETY: the callers pass the structure that the operation takes.
    let result =
        unsafe { libc::syscall(libc::SYS_io_uring_register, fd, operation, argument, count) };
    check(result as libc::c_int).map(drop)
}

#[cold]
fn enter_failed() -> io::Result<()> {
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // Interrupted, or completions must be taken before more can be done.
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME) => Ok(()),
        _ => Err(error),
    }
}

/// Descriptors of a ring's own.
pub const DIRECT_FILES: u32 = 16_384;

/// When a plain call or an option takes the place of what the ring does otherwise.
#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
pub enum When {
    /// Not at all.
    Never,
    /// If nothing else is ready, so that there is nothing to batch with.
    Lone,
    /// Every time.
    Always,
}

impl When {
    /// Whether it does with so many completions at hand.
    #[inline(always)]
    pub fn applies(self, ready: u32) -> bool {
        match self {
            Self::Never => false,
            Self::Lone => ready <= 1,
            Self::Always => true,
        }
    }

    /// From which length on a SEND is a plain call with so many completions at hand: a long one is, unless none is, since what
    /// the call itself costs is little beside the copy, and the bytes are still in the processor's cache.
    #[inline(always)]
    pub fn plain_from(self, ready: u32) -> i32 {
        match self {
            Self::Never => i32::MAX,
            _ if self.applies(ready) => 0,
            _ => LONG_BYTES,
        }
    }
}

/// A send is long from here on.
const LONG_BYTES: i32 = 32 * 1024;

// What a completion is about: the low bits of its user data. The rest is the index of the connection.
pub const RECV: u64 = 0;
pub const SEND: u64 = 1;
pub const ACCEPT: u64 = 2;
pub const TIMER: u64 = 3;
pub const KIND: u64 = 3;

pub const SEND_FLAGS: i32 = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
