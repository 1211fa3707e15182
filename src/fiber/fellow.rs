//! Ending what another fiber of this worker waits in, without cancelling that fiber.

use super::{State, current, worker};

/// Names a fiber, for the others of its worker. It may outlive the fiber; only that worker's fibers may use it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Fellow {
    pub(super) slot: u32,
    pub(super) id: u64,
}

impl Fellow {
    /// The calling fiber; `None` on a plain thread.
    pub(crate) fn this() -> Option<Fellow> {
        let (_, fiber) = current()?;
        Some(Fellow {
            slot: fiber.slot,
            id: fiber.id,
        })
    }

    /// Asks for an early end of the operation that the fiber waits in. It comes to `-ECANCELED` (or `TIMED_OUT`, where it has a
    /// deadline), or to a result it had already. So does one that the fiber is about to begin but has no room for. A fiber that is
    /// not about to wait does not notice.
    pub(crate) fn end_wait(self) {
        let Some(worker) = worker() else {
            return;
        };
        let Some(fiber) = worker.fiber(self.slot, self.id) else {
            return;
        };
        match fiber.state.get() {
            State::InOperation | State::Watching => worker.cancel(fiber.key.get()),
            _ => fiber.roused.set(true),
        }
    }
}
