//! Looking for work for a while before the worker sleeps in the kernel, for who asked for it
//! ([`RuntimeBuilder::spin`](crate::RuntimeBuilder::spin)).
//!
//! Falling asleep and being woken takes longer than a short exchange itself. Whether the next wait will be short is forecast
//! from the last ones: after a spin in vain 1, 3, 7 … 63 waits go straight to sleep, so an idle worker hardly spins.

use std::time::Duration;

use super::Forecast;
use crate::sys;

pub(super) struct Spin {
    /// The longest spin; 0 for none.
    at_most_ns: i64,
    forecast: Forecast,
}

impl Spin {
    pub(super) fn new(at_most: Duration) -> Spin {
        Spin {
            at_most_ns: i64::try_from(at_most.as_nanos()).unwrap_or(i64::MAX),
            forecast: Forecast::new(),
        }
    }

    /// Whether to spin before this wait.
    #[inline]
    pub(super) fn is_due(&self) -> bool {
        self.at_most_ns > 0 && self.forecast.is_good()
    }

    /// Spins until there is work: whether some came in time.
    pub(super) fn until(&self, mut has_work: impl FnMut() -> bool) -> bool {
        let start_ns = sys::monotonic_ns();
        while !has_work() {
            if sys::monotonic_ns() - start_ns >= self.at_most_ns {
                self.forecast.found_nothing();
                return false;
            }
            std::hint::spin_loop();
        }
        self.forecast.found();
        true
    }
}
