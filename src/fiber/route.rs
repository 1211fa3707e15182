//! Whether sends without a copy pay on a route, learned from what the kernel reports of them.
//!
//! A zero-copy send costs a notification and the pinning of pages, and saves a copy. Where something on the way copies after all (a
//! virtual device, a packet capture, a card without scatter-gather) it only costs. Each notification says which it was. So a route has a
//! threshold, below which sends copy:
//!
//! ```text
//!    16 KiB ◀── 16 sends in a row that were not copied: half ── threshold ── one that was: double ──▶ above 512 KiB: off
//!                                                                                                        │
//!                       a send not copied: 512 KiB ◀── one in 4,096 that would have gone this way tries ─┘
//! ```
//!
//! A route is known by its local address, which stands for the device. Loopback and Unix sockets have none: their sends are always
//! copied, which needs no learning.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The least that is sent without a copy.
pub(crate) const THRESHOLD_MIN: usize = 16 << 10;
/// The largest threshold of a route that is not off.
const THRESHOLD_MAX: usize = 512 << 10;
/// The threshold of a route that is off.
const OFF: usize = usize::MAX;
/// After so many sends in a row without a copy the threshold is halved.
const GENUINE_RUN: u32 = 16;
/// While a route is off, one send in so many that would have gone without a copy does.
const TRIES_APART: u32 = 4096;
/// The most routes that are remembered; sockets of others learn for themselves.
const ROUTES_MAX: usize = 64;

/// When large buffers that are given away by [`sendall_buf`](crate::Socket::sendall_buf) are sent without a copy: see
/// [`RuntimeBuilder::zero_copy`](crate::RuntimeBuilder::zero_copy).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ZeroCopy {
    /// Where it pays: not on this machine's own addresses, and not on routes where the kernel reports that it copied all the same.
    #[default]
    Adaptive,
    /// Like `Adaptive`, but this machine's own addresses are tried and learned about like any other. For tests.
    AlsoLocal,
    /// On every route whatever the kernel reports. For tests and measurements.
    Always,
    /// Nowhere.
    Never,
}

/// What is known of one route.
pub(crate) struct Route {
    threshold: AtomicUsize,
    /// How many were sent without a copy since the threshold changed.
    genuine: AtomicU32,
    /// How many were not tried since it is off.
    untried: AtomicU32,
}

impl Route {
    pub(crate) fn new() -> Route {
        Route {
            threshold: AtomicUsize::new(THRESHOLD_MIN),
            genuine: AtomicU32::new(0),
            untried: AtomicU32::new(0),
        }
    }

    /// The route from a local address, which all sockets of the process share.
    pub(crate) fn from(local: IpAddr) -> Arc<Route> {
        static ROUTES: Mutex<Vec<(IpAddr, Arc<Route>)>> = Mutex::new(Vec::new());
        let mut routes = ROUTES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, route)) = routes.iter().find(|(other, _)| *other == local) {
            return route.clone();
        }
        let route = Arc::new(Route::new());
        if routes.len() < ROUTES_MAX {
            routes.push((local, route.clone()));
        }
        route
    }

    /// Whether to send so many bytes without a copy.
    pub(crate) fn wants(&self, bytes: usize) -> bool {
        let threshold = self.threshold.load(Ordering::Relaxed);
        if threshold != OFF || bytes < THRESHOLD_MIN {
            return bytes >= threshold;
        }
        if self.untried.fetch_add(1, Ordering::Relaxed) + 1 < TRIES_APART {
            return false;
        }
        self.untried.store(0, Ordering::Relaxed);
        true
    }

    /// What the kernel reports of a send. (Reports that race may count as one: it is a guess either way.)
    pub(crate) fn learn(&self, copied: bool) {
        let threshold = self.threshold.load(Ordering::Relaxed);
        if copied {
            self.genuine.store(0, Ordering::Relaxed);
            let doubled = threshold.saturating_mul(2);
            let next = if doubled > THRESHOLD_MAX {
                OFF
            } else {
                doubled
            };
            self.threshold.store(next, Ordering::Relaxed);
        } else if threshold == OFF {
            self.threshold.store(THRESHOLD_MAX, Ordering::Relaxed);
        } else if self.genuine.fetch_add(1, Ordering::Relaxed) + 1 >= GENUINE_RUN {
            self.genuine.store(0, Ordering::Relaxed);
            let halved = (threshold / 2).max(THRESHOLD_MIN);
            self.threshold.store(halved, Ordering::Relaxed);
        }
    }

    /// The socket or the kernel refuses such sends altogether.
    pub(crate) fn turn_off(&self) {
        self.threshold.store(OFF, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_raise_the_threshold_until_the_route_is_off() {
        let route = Route::new();
        assert!(route.wants(16 << 10) && !route.wants((16 << 10) - 1));
        route.learn(true);
        assert!(!route.wants(16 << 10) && route.wants(32 << 10));
        for _ in 0..4 {
            route.learn(true);
        }
        assert!(route.wants(512 << 10) && !route.wants((512 << 10) - 1));
        route.learn(true);
        assert!(!route.wants(1 << 30));
    }

    #[test]
    fn sends_without_a_copy_lower_the_threshold_again() {
        let route = Route::new();
        (0..2).for_each(|_| route.learn(true));
        (0..15).for_each(|_| route.learn(false));
        assert!(!route.wants(32 << 10));
        route.learn(false);
        assert!(route.wants(32 << 10) && !route.wants(16 << 10));
        (0..100).for_each(|_| route.learn(false));
        assert!(route.wants(16 << 10) && !route.wants((16 << 10) - 1));
        // A copy now and then does not turn it off for good.
        for n in 0..10_000 {
            route.learn(n % 40 == 0);
        }
        assert!(route.wants(64 << 10));
    }

    #[test]
    fn a_route_that_is_off_is_tried_now_and_then() {
        let route = Route::new();
        route.turn_off();
        let mut tried = 0;
        for _ in 0..3 * TRIES_APART {
            assert!(!route.wants(1000));
            if route.wants(1 << 20) {
                tried += 1;
                route.learn(true);
            }
        }
        assert_eq!(tried, 3);
        route.learn(false);
        assert!(route.wants(512 << 10) && !route.wants(256 << 10));
    }

    #[test]
    fn sockets_of_one_address_share_a_route() {
        let address = IpAddr::from([192, 0, 2, 77]);
        assert!(Arc::ptr_eq(&Route::from(address), &Route::from(address)));
        let other = IpAddr::from([192, 0, 2, 78]);
        assert!(!Arc::ptr_eq(&Route::from(address), &Route::from(other)));
    }
}
