//! The io_uring backend: setup ladder, SQE preparation, entering, reaping.
//!
//! One [`Uring`] belongs to one thread. It owns the ring's queues and knows neither who waits for a CQE (`driver/slab.rs`) nor
//! what a fiber is. It needs Linux 6.1.
//!
//! ```text
//!  prepare ──▶ SQ (user memory) ──enter──▶ kernel ──task work, run inside enter──▶ CQ ──next──▶ caller
//! ```
//!
//! Rules kept here:
//! - an SQE is a promise: once pushed it *will* reach the kernel, so the memory it names belongs to the kernel from then on;
//! - with a deadline the SQE is linked to a LINK_TIMEOUT whose CQE is no verdict: the operation's own CQE is;
//! - EINTR, EAGAIN, EBUSY and ENOMEM of io_uring_enter leave SQEs queued; nothing is lost and each is counted.
#![allow(unsafe_code)]

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::features::{self, Features};
use super::op::{OPS, Op, TRANSFER_BYTES_MAX, Timespec};
use super::queues::{self, Queues};
use super::slab::{Completion, Key, TAG_CHECK, TAG_EVENTFD, TAG_TIMER, TAG_WAKE};
use super::watch::WatchId;
use super::{Config, Counters};
use crate::error::Result;
use crate::sys;

/// `IORING_REGISTER_RING_FDS`. The crate's own call keeps the index to itself, and we enter by hand.
const REGISTER_RING_FDS: libc::c_uint = 20;
/// `IORING_UNREGISTER_RING_FDS`.
const UNREGISTER_RING_FDS: libc::c_uint = 21;
/// `IORING_RECVSEND_POLL_FIRST`, which the crate keeps to itself.
const RECVSEND_POLL_FIRST: u16 = 1 << 0;
/// `IORING_SEND_ZC_REPORT_USAGE` (Linux 6.2), which the crate does not have: the notification says whether the kernel copied after all.
const SEND_ZC_REPORT_USAGE: u16 = 1 << 3;
/// Entries of the table of registered buffers.
const BUFFERS_MAX: usize = 32;
const ENTER_GETEVENTS: u32 = 1 << 0;
const ENTER_REGISTERED_RING: u32 = 1 << 4;
const ENTER_NO_IOWAIT: u32 = 1 << 7;

/// The longest nap between two tries of an enter the kernel has no memory for.
const ENTER_NAP_MAX: Duration = Duration::from_millis(64);

/// One ring and its queues.
pub(crate) struct Uring {
    queues: Queues,
    /// Set up and owned by the crate; dropped only by the process that made it.
    ring: ManuallyDrop<IoUring>,
    /// What enter is given as ring: a registered index, or the descriptor.
    enter_fd: i32,
    enter_flags: u32,
    /// The ring belongs to the process that still reads this epoch from the mark.
    fork_mark: &'static AtomicU32,
    fork_epoch: u32,
    features: Features,
    nap: Duration,
    /// The kernel has zero-copy sends that report.
    has_zero_copy: bool,
    /// Which entries of the table of registered buffers are taken; empty before there is a table.
    buffers: Vec<bool>,
}

/// The submission queue is full and the kernel takes nothing right now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// One rung of the setup ladder: a flag, and what losing it means.
struct Rung {
    name: &'static str,
    what: &'static str,
    since: &'static str,
    set: fn(&mut io_uring::Builder),
}

/// The flags that setup asks for, oldest first. On EINVAL the newest still asked for is dropped.
const LADDER: [Rung; 6] = [
    Rung {
        name: "SUBMIT_ALL",
        what: "a refused SQE does not stop the ones behind it",
        since: "5.18",
        set: |builder| {
            builder.setup_submit_all();
        },
    },
    Rung {
        name: "COOP_TASKRUN",
        what: "completions do not interrupt the thread",
        since: "5.19",
        set: |builder| {
            builder.setup_coop_taskrun();
        },
    },
    Rung {
        name: "TASKRUN_FLAG",
        what: "the ring shows when completions wait to be posted",
        since: "5.19",
        set: |builder| {
            builder.setup_taskrun_flag();
        },
    },
    Rung {
        name: "SINGLE_ISSUER",
        what: "one thread submits, so the kernel takes no lock for others",
        since: "6.0",
        set: |builder| {
            builder.setup_single_issuer();
        },
    },
    Rung {
        name: "DEFER_TASKRUN",
        what: "completions are posted in one batch, when the thread enters",
        since: "6.1",
        set: |builder| {
            builder.setup_defer_taskrun();
        },
    },
    Rung {
        name: "NO_SQARRAY",
        what: "no index array beside the submission queue",
        since: "6.6",
        set: |builder| {
            builder.setup_no_sqarray();
        },
    },
];

/// Climbs down the ladder until `setup` succeeds: fewer flags on EINVAL, smaller queues on ENOMEM.
fn climb<R>(
    config: Config,
    features: &mut Features,
    mut setup: impl FnMut(&io_uring::Builder, u32) -> io::Result<R>,
) -> Result<R> {
    let mut rungs = LADDER.len();
    let mut sq_entries = config.sq_entries;
    loop {
        let mut builder = IoUring::builder();
        // DONTFORK: a forked child must not even see the queues.
        builder
            .dontfork()
            .setup_clamp()
            .setup_cqsize(sq_entries.saturating_mul(config.cq_per_sq).max(2));
        for rung in &LADDER[..rungs] {
            (rung.set)(&mut builder);
        }
        match setup(&builder, sq_entries) {
            Ok(ring) => {
                for rung in &LADDER[..rungs] {
                    features.on(rung.name, rung.what);
                }
                for rung in &LADDER[rungs..] {
                    features.off(
                        rung.name,
                        "refused by this kernel".to_owned(),
                        &format!("Linux {} has it", rung.since),
                    );
                }
                return Ok(ring);
            }
            Err(error) => match error.raw_os_error().unwrap_or(libc::EINVAL) {
                libc::EINVAL if rungs > 0 => rungs -= 1,
                libc::ENOMEM if sq_entries > Config::smallest().sq_entries => sq_entries /= 2,
                errno => return Err(features::setup_error(errno)),
            },
        }
    }
}

impl Uring {
    pub(crate) fn new(config: Config) -> Result<Uring> {
        let mut features = Features::default();
        let ring = climb(config, &mut features, |builder, entries| {
            builder.build(entries)
        })?;
        let params = ring.params();
        features.entries = (params.sq_entries(), params.cq_entries());
        if params.sq_entries() < config.sq_entries {
            features.off(
                "full-size rings",
                format!("no memory for {} entries", config.sq_entries),
                "raise RLIMIT_MEMLOCK (ulimit -l)",
            );
        }
        may_enter(&ring)?;
        let has_zero_copy = probe(&ring, &mut features)?;

        let mut enter_flags = 0;
        if ring.params().is_feature_no_iowait() {
            enter_flags |= ENTER_NO_IOWAIT;
            features.on("NO_IOWAIT", "a waiting ring is not shown as disk wait");
        } else {
            features.off(
                "NO_IOWAIT",
                "a waiting ring looks like 100 % disk wait in top".to_owned(),
                "Linux 6.15 has it",
            );
        }
        let queues = Queues::new(&ring)?;
        let mut enter_fd = ring.as_raw_fd();
        match register_ring_fd(enter_fd) {
            Ok(index) => {
                enter_fd = index;
                enter_flags |= ENTER_REGISTERED_RING;
                features.on("REGISTER_RING_FDS", "entering needs no descriptor look-up");
            }
            Err(errno) => features.off(
                "REGISTER_RING_FDS",
                format!("refused with errno {errno}"),
                "Linux 5.18 has it, for 16 rings a thread",
            ),
        }

        Ok(Uring {
            queues,
            ring: ManuallyDrop::new(ring),
            enter_fd,
            enter_flags,
            fork_mark: sys::fork_mark(),
            fork_epoch: sys::fork_epoch(),
            features,
            nap: Duration::ZERO,
            has_zero_copy,
            buffers: Vec::new(),
        })
    }

    /// Whether zero-copy sends can be had.
    pub(crate) fn has_zero_copy(&self) -> bool {
        self.has_zero_copy
    }

    /// Registers `bytes` bytes from `start` on, at most 1 GiB: the index that names them, or an errno. The kernel then holds the pages
    /// until the index is given back or the ring has gone, also if they are unmapped before.
    ///
    /// # Safety
    ///
    /// An operation that names the index names memory of this region, which is still mapped.
    pub(crate) unsafe fn register_buffer(
        &mut self,
        start: *mut u8,
        bytes: usize,
    ) -> std::result::Result<u16, i32> {
        let errno = |error: io::Error| error.raw_os_error().unwrap_or(libc::EINVAL);
        if self.buffers.is_empty() {
            let submitter = self.ring.submitter();
            let made = submitter.register_buffers_sparse(BUFFERS_MAX as u32);
            made.map_err(errno)?;
            self.buffers = vec![false; BUFFERS_MAX];
        }
        let index = self.buffers.iter().position(|taken| !taken);
        let index = index.ok_or(libc::ENOSPC)?;
        // SAFETY: the caller's promise; the kernel takes its own hold of the pages.
        unsafe { self.update_buffer(index, start, bytes) }.map_err(errno)?;
        self.buffers[index] = true;
        Ok(index as u16)
    }

    /// Gives an index back. Operations under way that name it keep their hold of the pages.
    pub(crate) fn unregister_buffer(&mut self, index: u16) {
        // SAFETY: no memory is named.
        let emptied = unsafe { self.update_buffer(index.into(), std::ptr::null_mut(), 0) };
        // Where that fails the index stays taken.
        self.buffers[usize::from(index)] = emptied.is_err();
    }

    /// # Safety
    ///
    /// As for [`register_buffer`](Uring::register_buffer).
    unsafe fn update_buffer(&self, index: usize, start: *mut u8, bytes: usize) -> io::Result<()> {
        let region = libc::iovec {
            iov_base: start.cast(),
            iov_len: bytes,
        };
        // SAFETY: the caller's promise.
        unsafe {
            let submitter = self.ring.submitter();
            submitter.register_buffers_update(index as u32, &[region], None)
        }
    }

    pub(crate) fn features(&self) -> &Features {
        &self.features
    }

    /// The ring's descriptor, for messages from other rings.
    pub(crate) fn ring_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// Whether this process made the ring, rather than inheriting it by fork(2).
    #[inline]
    pub(crate) fn is_ours(&self) -> bool {
        self.fork_mark.load(Ordering::Relaxed) == self.fork_epoch
    }

    /// Whether an SQE waits to be submitted.
    #[inline]
    pub(crate) fn has_unsubmitted(&self) -> bool {
        self.queues.unsubmitted() > 0
    }

    /// Whether the kernel has completions that the next enter would post.
    #[inline]
    pub(crate) fn has_deferred(&self) -> bool {
        self.queues.has_deferred()
    }

    /// Whether there are completions at hand, or some that the next enter would post.
    #[inline]
    pub(crate) fn has_completions(&self) -> bool {
        self.queues.has_posted() || self.queues.has_deferred()
    }

    /// Puts the operation into the submission queue, with a deadline `timeout` from its submission on if given.
    ///
    /// # Safety
    ///
    /// The memory that `op` borrows and `*timeout` must stay valid and, where the operation writes, unaliased until the final
    /// CQE of `key` has been reaped, whatever happens to the borrowing frame.
    #[inline(always)]
    pub(crate) unsafe fn prepare(
        &mut self,
        op: &mut Op<'_>,
        key: Key,
        timeout: Option<&Timespec>,
        timer_tag: u64,
        counters: &mut Counters,
    ) -> std::result::Result<(), Full> {
        let entry = match op {
            Op::Recv {
                fd,
                buffer,
                flags,
                found_nothing,
            } => opcode::Recv::new(
                types::Fd(*fd),
                buffer.as_mut_ptr().cast(),
                buffer.len().min(TRANSFER_BYTES_MAX) as u32,
            )
            .flags(*flags)
            .ioprio(u16::from(*found_nothing) * RECVSEND_POLL_FIRST)
            .build(),
            Op::Send { fd, buffer, flags } => opcode::Send::new(
                types::Fd(*fd),
                buffer.as_ptr(),
                buffer.len().min(TRANSFER_BYTES_MAX) as u32,
            )
            .flags(*flags | libc::MSG_NOSIGNAL)
            .build(),
            Op::SendZeroCopy {
                fd,
                buffer,
                flags,
                fixed,
            } => opcode::SendZc::new(
                types::Fd(*fd),
                buffer.as_ptr(),
                buffer.len().min(TRANSFER_BYTES_MAX) as u32,
            )
            .flags(*flags | libc::MSG_NOSIGNAL)
            .buf_index(*fixed)
            .zc_flags(SEND_ZC_REPORT_USAGE)
            .build(),
            Op::SendTo {
                fd,
                buffer,
                address,
                flags,
            } => opcode::Send::new(
                types::Fd(*fd),
                buffer.as_ptr(),
                buffer.len().min(TRANSFER_BYTES_MAX) as u32,
            )
            .flags(*flags | libc::MSG_NOSIGNAL)
            .dest_addr(address.as_ptr())
            .dest_addr_len(address.len())
            .build(),
            Op::RecvMsg {
                fd,
                room,
                message,
                flags,
            } => opcode::RecvMsg::new(types::Fd(*fd), message.header(room))
                .flags(*flags as u32)
                .build(),
            Op::SendMsg { fd, message, flags } => {
                opcode::SendMsg::new(types::Fd(*fd), message.header())
                    .flags((*flags | libc::MSG_NOSIGNAL) as u32)
                    .build()
            }
            Op::Accept { fd, address } => {
                let (storage, len) = address.as_mut_parts();
                opcode::Accept::new(types::Fd(*fd), storage, len)
                    .flags(libc::SOCK_CLOEXEC)
                    .build()
            }
            Op::Connect { fd, address } => {
                opcode::Connect::new(types::Fd(*fd), address.as_ptr(), address.len()).build()
            }
            Op::Poll { fd, events } => {
                opcode::PollAdd::new(types::Fd(*fd), *events as u16 as u32).build()
            }
            Op::Sleep { duration } => opcode::Timeout::new(duration).build(),
        };
        let entry = entry.user_data(key.0);
        match timeout {
            None => self.push(entry, counters),
            Some(timeout) => {
                if self.queues.free() < 2 {
                    self.make_room(2, counters)?;
                }
                let mut timer = opcode::LinkTimeout::new(timeout)
                    .build()
                    .user_data(timer_tag);
                if timer_tag == TAG_TIMER {
                    timer = timer.flags(squeue::Flags::SKIP_SUCCESS);
                }
                self.push(entry.flags(squeue::Flags::IO_LINK), counters)?;
                self.push(timer, counters)
            }
        }
    }

    /// Asks the kernel to cancel the operation `key`. Its own CQE, -ECANCELED or a result it already had, still comes.
    /// The request's own CQE bears `tag`.
    pub(crate) fn prepare_cancel(
        &mut self,
        key: Key,
        tag: u64,
        counters: &mut Counters,
    ) -> std::result::Result<(), Full> {
        let entry = opcode::AsyncCancel::new(key.0).build().user_data(tag);
        self.push(entry, counters)
    }

    /// Posts a wake-up CQE in another ring. The message's own CQE bears `tag`.
    pub(crate) fn prepare_message(
        &mut self,
        ring_fd: RawFd,
        tag: u64,
        counters: &mut Counters,
    ) -> std::result::Result<(), Full> {
        let entry = opcode::MsgRingData::new(types::Fd(ring_fd), 0, TAG_WAKE, None)
            .build()
            .user_data(tag);
        self.push(entry, counters)
    }

    /// Watches an eventfd: every write to it posts a wake-up CQE. It needs no memory of ours, unlike a read of the counter.
    pub(crate) fn prepare_eventfd(
        &mut self,
        eventfd: RawFd,
        counters: &mut Counters,
    ) -> std::result::Result<(), Full> {
        let entry = opcode::PollAdd::new(types::Fd(eventfd), libc::POLLIN as u32)
            .multi(true)
            .build()
            .user_data(TAG_EVENTFD);
        self.push(entry, counters)
    }

    /// Watches a descriptor for something to receive, until cancelled: see `driver/watch.rs`.
    pub(crate) fn prepare_watch(
        &mut self,
        fd: RawFd,
        id: WatchId,
        counters: &mut Counters,
    ) -> std::result::Result<(), Full> {
        let events = (libc::POLLIN | libc::POLLRDHUP) as u32;
        let entry = opcode::PollAdd::new(types::Fd(fd), events)
            .multi(true)
            .build()
            .user_data(id.0);
        self.push(entry, counters)
    }

    /// Whether the last CQE of `user_data` is at hand.
    pub(crate) fn has_last(&self, user_data: u64) -> bool {
        self.queues.has_last(user_data)
    }

    /// Wakes a waiting enter after `duration` at the latest, by a CQE that bears `tag`.
    ///
    /// # Safety
    ///
    /// `*duration` must stay valid until the next enter that submits.
    pub(crate) unsafe fn prepare_tick(
        &mut self,
        duration: &Timespec,
        tag: u64,
        counters: &mut Counters,
    ) -> std::result::Result<(), Full> {
        let entry = opcode::Timeout::new(duration).build().user_data(tag);
        self.push(entry, counters)
    }

    /// Sets the timer whose CQE bears [`TAG_CHECK`], or, if it is set, has it fire after `duration` instead.
    ///
    /// # Safety
    ///
    /// As of [`prepare_tick`](Uring::prepare_tick).
    pub(crate) unsafe fn prepare_check(
        &mut self,
        duration: &Timespec,
        is_set: bool,
        counters: &mut Counters,
    ) -> std::result::Result<(), Full> {
        if !is_set {
            // SAFETY: the caller's promise.
            return unsafe { self.prepare_tick(duration, TAG_CHECK, counters) };
        }
        // One that has fired just now is not found; its CQE is there, and it is set again.
        let entry = opcode::TimeoutUpdate::new(TAG_CHECK, duration)
            .build()
            .user_data(TAG_TIMER);
        self.push(entry, counters)
    }

    #[inline(always)]
    fn push(
        &mut self,
        entry: squeue::Entry,
        counters: &mut Counters,
    ) -> std::result::Result<(), Full> {
        if self.queues.free() == 0 {
            self.make_room(1, counters)?;
        }
        // SAFETY: room was made above. The memory the entry names is kept as the caller of `prepare` promised; the other
        // entries name none, or memory their makers keep.
        unsafe { self.queues.push(entry) };
        Ok(())
    }

    /// Submits without waiting, so that `wanted` entries fit.
    #[cold]
    #[inline(never)]
    fn make_room(&mut self, wanted: u32, counters: &mut Counters) -> std::result::Result<(), Full> {
        counters.sq_full += 1;
        self.enter(false, counters);
        if self.queues.free() < wanted {
            Err(Full)
        } else {
            Ok(())
        }
    }

    /// Submits everything and, with `wait`, blocks until there is at least one CQE to reap (or memory is so short that the
    /// caller should look after its other work first).
    pub(crate) fn enter(&mut self, wait: bool, counters: &mut Counters) {
        loop {
            self.queues.publish();
            let to_submit = self.queues.unsubmitted();
            if wait {
                self.collect(counters);
                if self.queues.completed() > 0 && to_submit == 0 && !self.has_deferred() {
                    return;
                }
            }
            counters.enters += 1;
            let min_complete = u32::from(wait);
            // GETEVENTS also without waiting: it posts what the kernel has deferred, and flushes an overflown CQ first.
            let flags = ENTER_GETEVENTS | self.enter_flags;
            // SAFETY: no signal mask is passed; the ring is ours; each submitted SQE names memory kept as `prepare` promises.
            let returned = unsafe {
                libc::syscall(
                    libc::SYS_io_uring_enter,
                    self.enter_fd,
                    to_submit,
                    min_complete,
                    flags,
                    std::ptr::null::<libc::sigset_t>(),
                    8usize,
                )
            };
            let errno = if returned < 0 { sys::errno() } else { 0 };
            self.queues.publish();
            self.collect(counters);
            match errno {
                0 => {
                    counters.sqes += returned as u64;
                    self.nap = Duration::ZERO;
                    // A short submit (the kernel was out of requests) does not wait: come again for the rest.
                    if !wait || self.queues.completed() > 0 {
                        return;
                    }
                }
                libc::EINTR => {
                    counters.enters_interrupted += 1;
                    if !wait || self.queues.completed() > 0 {
                        return;
                    }
                }
                libc::EAGAIN | libc::EBUSY | libc::ENOMEM => {
                    // Out of requests, or the CQ overflowed and wants reaping. What is reapable goes first; with nothing to
                    // reap, only time helps.
                    counters.enters_refused += 1;
                    if self.queues.completed() > 0 {
                        return;
                    }
                    self.nap = (self.nap * 2).clamp(Duration::from_millis(1), ENTER_NAP_MAX);
                    std::thread::sleep(self.nap);
                    return;
                }
                // EBADF, ENXIO, EINVAL, EFAULT, EEXIST: the ring is not what we set up. Going on would lose operations whose
                // memory the kernel may still own, so nothing may unwind.
                _ => {
                    eprintln!(
                        "ringsock: io_uring_enter failed with {}; the ring is unusable, ending the process",
                        io::Error::from_raw_os_error(errno)
                    );
                    std::process::abort();
                }
            }
        }
    }

    fn collect(&mut self, counters: &mut Counters) {
        counters.cq_overflows += u64::from(self.queues.has_overflown());
        counters.cqes += u64::from(self.queues.collect());
    }

    /// See [`Queues::ahead`].
    #[inline(always)]
    pub(crate) fn ahead(&self, behind: u32) -> Option<u64> {
        self.queues.ahead(behind)
    }

    /// The next CQE: its `user_data` and its result.
    #[inline(always)]
    pub(crate) fn next(&mut self, counters: &mut Counters) -> Option<(u64, Completion)> {
        let next = self.queues.next();
        if next.is_some() {
            return next;
        }
        self.collect(counters);
        self.queues.next()
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if self.is_ours() {
            if self.enter_flags & ENTER_REGISTERED_RING != 0 {
                // Or else the thread (this one: a ring, having pointers, is not `Send`) keeps the ring, with its locked memory, as
                // long as it lives.
                let _ =
                    update_ring_fd(self.ring_fd(), UNREGISTER_RING_FDS, self.enter_fd as u32, 0);
            }
            // SAFETY: both are dropped here, once, and not used again.
            unsafe {
                self.queues.unmap();
                ManuallyDrop::drop(&mut self.ring);
            }
        } else {
            // In a forked child the queues are not mapped (DONTFORK): unmapping their addresses could hit something newer.
            // Only the descriptor is ours to close.
            sys::close(self.ring_fd());
        }
    }
}

/// Registers the ring's descriptor with this thread: its index, or an errno.
fn register_ring_fd(fd: RawFd) -> std::result::Result<i32, i32> {
    update_ring_fd(fd, REGISTER_RING_FDS, u32::MAX, fd as u64)
}

/// Changes what rings this thread has registered: the index in question, or an errno.
fn update_ring_fd(
    fd: RawFd,
    call: libc::c_uint,
    index: u32,
    data: u64,
) -> std::result::Result<i32, i32> {
    #[repr(C)]
    struct RsrcUpdate {
        offset: u32,
        resv: u32,
        data: u64,
    }
    let mut update = RsrcUpdate {
        offset: index,
        resv: 0,
        data,
    };
    // SAFETY: one `struct io_uring_rsrc_update` is passed and its count is 1; the kernel may write an index back into it.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            fd,
            call,
            &mut update as *mut RsrcUpdate,
            1u32,
        )
    };
    if returned == 1 {
        Ok(update.offset as i32)
    } else {
        Err(sys::errno())
    }
}

/// Enters the ring for nothing: a filter may allow the setup and forbid this, and later that would be too late.
fn may_enter(ring: &IoUring) -> Result<()> {
    // SAFETY: nothing is submitted, nothing is waited for, and no memory is named.
    let entered = unsafe { ring.submitter().enter::<libc::sigset_t>(0, 0, 0, None) };
    match entered.map_err(|error| error.raw_os_error().unwrap_or(libc::EINVAL)) {
        Err(errno @ (libc::EPERM | libc::EACCES | libc::ENOSYS)) => {
            Err(features::use_error("io_uring_enter", errno))
        }
        _ => Ok(()),
    }
}

/// Asks for every operation this crate submits: whether there are zero-copy sends, which it can do without.
fn probe(ring: &IoUring, features: &mut Features) -> Result<bool> {
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|error| {
            let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
            features::use_error("io_uring_register", errno)
        })?;
    let engine = [
        ("ASYNC_CANCEL", opcode::AsyncCancel::CODE, "5.5"),
        ("LINK_TIMEOUT", opcode::LinkTimeout::CODE, "5.5"),
        ("MSG_RING", opcode::MsgRingData::CODE, "5.18"),
        ("TIMEOUT_REMOVE", opcode::TimeoutUpdate::CODE, "5.5"),
    ];
    let rows = OPS.iter().map(|row| (row.name, row.opcode, row.since));
    for (name, code, since) in rows.chain(engine) {
        if !probe.is_supported(code) {
            return Err(features::too_old(&format!(
                "IORING_OP_{name} (Linux {since})"
            )));
        }
        features.on(name, "operation");
    }
    // Below 6.1 a timed MSG_WAITALL transfer could lose bytes. SENDMSG_ZC came with 6.1 and marks it.
    if !probe.is_supported(opcode::SendMsgZc::CODE) {
        return Err(features::too_old("lossless linked timeouts"));
    }
    let params = ring.params();
    if !params.is_feature_nodrop()
        || !params.is_feature_fast_poll()
        || !params.is_feature_skip_cqe_on_success()
    {
        return Err(features::too_old("NODROP, FAST_POLL or CQE_SKIP"));
    }
    const ZERO_COPY: &str = "SEND_ZC";
    // No kernel answers whether it has the report (6.2). One that has this feature (6.3) has it.
    let has_zero_copy = probe.is_supported(opcode::SendZc::CODE) && queues::has_reg_reg_ring(ring);
    if has_zero_copy {
        features.on(
            ZERO_COPY,
            "large pool buffers are sent without a copy, where the route allows it",
        );
    } else {
        features.off(
            ZERO_COPY,
            "this kernel cannot report what became of a zero-copy send, so all sends copy"
                .to_owned(),
            "Linux 6.3 has it",
        );
    }
    if params.is_feature_resource_tagging() {
        features.on("registered buffers", "zero-copy sends need not pin pages");
    } else {
        features.off(
            "registered buffers",
            "this kernel has no table of buffers that can be changed".to_owned(),
            "Linux 5.13 has it",
        );
    }
    Ok(has_zero_copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Config {
        Config {
            sq_entries: 4,
            cq_per_sq: 2,
            awaits_timers: false,
        }
    }

    #[test]
    fn the_ladder_drops_refused_flags_newest_first() {
        let mut features = Features::default();
        let mut tries = 0;
        let ring = climb(tiny(), &mut features, |builder, entries| {
            tries += 1;
            if tries <= 2 {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            builder.build(entries)
        })
        .unwrap();
        assert!(!ring.params().is_setup_sqpoll());
        assert!(!features.is_on("NO_SQARRAY"));
        assert!(!features.is_on("DEFER_TASKRUN"));
        assert!(features.is_on("SINGLE_ISSUER"));
        assert!(features.to_string().contains("Linux 6.1 has it"));
    }

    #[test]
    fn the_ladder_halves_the_queues_when_memory_is_short() {
        let mut features = Features::default();
        let config = Config {
            sq_entries: 64,
            cq_per_sq: 2,
            awaits_timers: false,
        };
        let ring = climb(config, &mut features, |builder, entries| {
            if entries > 16 {
                return Err(io::Error::from_raw_os_error(libc::ENOMEM));
            }
            builder.build(entries)
        })
        .unwrap();
        assert_eq!(ring.params().sq_entries(), 16);
    }

    /// A thread has 16 places for them, and what it has registered it keeps.
    #[test]
    fn a_ring_that_goes_is_registered_with_its_thread_no_more() {
        for _ in 0..20 {
            let ring = Uring::new(tiny()).unwrap();
            assert!(ring.enter_flags & ENTER_REGISTERED_RING != 0);
        }
    }

    #[test]
    fn a_forbidden_ring_is_a_sentence_not_a_number() {
        let mut features = Features::default();
        let Err(error) = climb::<()>(tiny(), &mut features, |_, _| {
            Err(io::Error::from_raw_os_error(libc::EPERM))
        }) else {
            panic!("a ring where none is allowed");
        };
        assert!(error.to_string().contains("seccomp"), "{error}");
    }

    #[test]
    fn a_ring_without_the_newest_flags_still_works() {
        for dropped in 0..=LADDER.len() {
            let mut features = Features::default();
            let mut tries = 0;
            let ring = climb(tiny(), &mut features, |builder, entries| {
                tries += 1;
                if tries <= dropped {
                    return Err(io::Error::from_raw_os_error(libc::EINVAL));
                }
                builder.build(entries)
            });
            assert!(ring.is_ok(), "with {dropped} flags dropped");
        }
    }

    /// A listening socket tells the two apart: looking at it first fails with ENOTCONN, waiting first does not.
    #[test]
    fn a_receive_that_found_nothing_waits_before_it_looks() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for (found_nothing, expected) in [(false, -libc::ENOTCONN), (true, -libc::ECANCELED)] {
            let mut ring = Uring::new(tiny()).unwrap();
            let mut counters = Counters::default();
            let mut op = Op::Recv {
                fd: listener.as_raw_fd(),
                buffer: &mut [std::mem::MaybeUninit::uninit(); 16],
                flags: 0,
                found_nothing,
            };
            let deadline = Timespec::new().nsec(1_000_000);
            // SAFETY: `op` and `deadline` outlive the loop, which ends with the only completion.
            unsafe { ring.prepare(&mut op, Key(1), Some(&deadline), TAG_TIMER, &mut counters) }
                .unwrap();
            let completion = loop {
                ring.enter(true, &mut counters);
                if let Some((1, completion)) = ring.next(&mut counters) {
                    break completion;
                }
            };
            assert_eq!(completion.res, expected);
        }
    }
}
