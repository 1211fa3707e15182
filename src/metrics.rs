//! Counters of the workers, copied out cheaply.
//!
//! A worker counts in plain numbers and copies them here before it waits, and now and then while it is too busy to wait. Reading
//! them takes no lock and slows nobody.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::driver::Counters;
use crate::fiber::pin::PinCounts;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A snapshot of one worker's counters, from [`Handle::metrics`](crate::Handle::metrics). All but `in_flight`,
        /// `fibers_live`, `fibers_lost`, `watches` and `buffers_pinned` only grow.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Metrics {
            $($(#[$doc])* pub $name: u64,)*
        }

        /// Where the worker puts its counters for others to read.
        #[derive(Default)]
        pub(crate) struct Counts {
            $($name: AtomicU64,)*
        }

        impl Counts {
            pub(crate) fn snapshot(&self) -> Metrics {
                Metrics {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                }
            }
        }
    };
}

counters! {
    /// Operations given to the driver.
    operations,
    /// Calls of io_uring_enter(2), or of epoll_wait(2).
    enters,
    /// Of these, interrupted by a signal and repeated.
    enters_interrupted,
    /// Of these, refused by the kernel for want of memory or of room, and repeated.
    enters_refused,
    /// Submission queue entries written. Per enter: the batch size. On epoll: how often a descriptor was armed (epoll_ctl(2)).
    sqes,
    /// Completion queue entries read. Per enter: how much one wait brought. On epoll: operations completed.
    cqes,
    /// Times the submission queue was full and had to be submitted early.
    sq_full,
    /// Times the completion queue was seen to overflow (nothing is lost then, but it costs).
    cq_overflows,
    /// Completions that nobody waited for.
    cqes_unknown,
    /// Messages to other rings that were refused and replaced by an eventfd.
    messages_failed,
    /// Times a fiber was switched in.
    switches,
    /// Fibers ever made.
    fibers_spawned,
    /// Fibers that have not ended.
    fibers_live,
    /// Fibers that could not be ended at shutdown.
    fibers_lost,
    /// Operations and waits under way.
    in_flight,
    /// Sockets with a standing poll.
    watches,
    /// Sends without a copy that were tried.
    zero_copy_sends,
    /// Of these, reported as copied by the kernel all the same.
    zero_copy_copied,
    /// Buffers of such sends that are still the kernel's.
    buffers_pinned,
    /// Buffers of such sends that were still the kernel's when the worker ended, and stay until the process does.
    buffers_leaked,
}

impl Counts {
    pub(crate) fn publish(
        &self,
        counters: &Counters,
        switches: u64,
        spawned: u64,
        live: usize,
        [in_flight, watches, unknown]: [u64; 3],
    ) {
        let put = |place: &AtomicU64, value: u64| place.store(value, Ordering::Relaxed);
        put(&self.operations, counters.operations);
        put(&self.enters, counters.enters);
        put(&self.enters_interrupted, counters.enters_interrupted);
        put(&self.enters_refused, counters.enters_refused);
        put(&self.sqes, counters.sqes);
        put(&self.cqes, counters.cqes);
        put(&self.sq_full, counters.sq_full);
        put(&self.cq_overflows, counters.cq_overflows);
        put(&self.cqes_unknown, unknown);
        put(&self.messages_failed, counters.messages_failed);
        put(&self.switches, switches);
        put(&self.fibers_spawned, spawned);
        put(&self.fibers_live, live as u64);
        put(&self.in_flight, in_flight);
        put(&self.watches, watches);
    }

    pub(crate) fn publish_pins(&self, counts: &PinCounts) {
        let put = |place: &AtomicU64, value: u64| place.store(value, Ordering::Relaxed);
        put(&self.zero_copy_sends, counts.sends);
        put(&self.zero_copy_copied, counts.copied);
        put(&self.buffers_pinned, counts.pinned);
        put(&self.buffers_leaked, counts.leaked);
    }

    pub(crate) fn lost(&self, fibers: usize) {
        self.fibers_lost.store(fibers as u64, Ordering::Relaxed);
    }
}
