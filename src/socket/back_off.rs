//! How long to wait before accepting again when descriptors or memory ran out.

use std::time::Duration;

/// The wait after the first failure, and the longest.
const WAITS: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// Twice as long after each failure in a row.
#[derive(Default)]
pub(crate) struct BackOff(Duration);

impl BackOff {
    /// How long to wait now; zero if the last accept did not fail so.
    pub(crate) fn wait(&self) -> Duration {
        self.0
    }

    /// It failed again.
    pub(crate) fn grow(&mut self) {
        self.0 = (self.0 * 2).clamp(WAITS.0, WAITS.1);
    }
}
