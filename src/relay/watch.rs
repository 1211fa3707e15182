//! What the relays of one worker share: the vessels, and a fiber that keeps their times.
//!
//! A timer on each wait would cost more than the wait itself. Instead each relay is looked at now and then: an idle one has moved
//! nothing since the last looks. The fiber is there while there are relays with a limit.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use slab::Slab;

use super::vessel::Vessels;
use super::{Pair, RelayEnd};
use crate::driver::Op;
use crate::driver::op::timespec_from_ns;
use crate::error::Result;
use crate::fiber::fellow::Fellow;
use crate::fiber::join::Builder;
use crate::fiber::{self};

/// An idle relay is looked at so many times before it is ended, so it is ended by one part late at most.
const LOOKS: i64 = 8;

/// The shortest time between two looks.
const PAUSE_NS: i64 = 1_000_000;

/// See the module's documentation.
pub(super) struct Bench {
    worker: u32,
    pub(super) vessels: Vessels,
    watched: RefCell<Slab<Watched>>,
    /// The fiber that keeps the times, and when it will look next.
    watcher: Cell<Option<Fellow>>,
    next_ns: Cell<i64>,
}

struct Watched {
    pair: Rc<Pair>,
    /// When to look at it.
    look_ns: i64,
    /// What it had moved when it was last seen to move, and when that was.
    moved: u64,
    moved_ns: i64,
}

thread_local! {
    /// The bench of this thread's worker, while there are relays.
    static BENCH: RefCell<Weak<Bench>> = const { RefCell::new(Weak::new()) };
}

impl Bench {
    /// The one that the relays of the calling fiber's worker have together.
    pub(super) fn of_this_worker() -> Rc<Bench> {
        let worker = fiber::worker().map_or(0, |worker| worker.id());
        BENCH.with_borrow_mut(|last| {
            // An earlier worker of this thread may have left one, in fibers that were given up or in a forked child.
            if let Some(bench) = last.upgrade()
                && bench.worker == worker
            {
                return bench;
            }
            let bench = Rc::new(Bench {
                worker,
                vessels: Vessels::default(),
                watched: RefCell::new(Slab::new()),
                watcher: Cell::new(None),
                next_ns: Cell::new(i64::MAX),
            });
            *last = Rc::downgrade(&bench);
            bench
        })
    }

    /// Ends what is due: when to look next, `None` if there is nothing to look at any more.
    fn look(&self) -> Option<i64> {
        let now_ns = fiber::now_ns();
        let mut next_ns = i64::MAX;
        let mut watched = self.watched.borrow_mut();
        for (_, watched) in &mut *watched {
            if watched.look_ns <= now_ns {
                watched.look(now_ns);
            }
            next_ns = next_ns.min(watched.look_ns);
        }
        (!watched.is_empty()).then(|| next_ns.max(now_ns + PAUSE_NS))
    }

    fn keep_watch(&self) {
        while let Some(next_ns) = self.look() {
            self.next_ns.set(next_ns);
            // The ring adds the timer to its own clock: far times must not overflow it.
            let wait_ns = (next_ns - fiber::now_ns()).clamp(0, i64::MAX / 4);
            let duration = timespec_from_ns(wait_ns);
            let code = fiber::suspend(&mut Op::Sleep { duration }, -1, None);
            // Roused, or the time has come; anything else is the runtime's end, of which the relays hear themselves.
            if !matches!(-code, libc::ECANCELED | libc::EINTR | libc::ETIME) {
                break;
            }
        }
        self.watcher.set(None);
    }
}

impl Watched {
    fn new(pair: &Rc<Pair>) -> Watched {
        let now_ns = fiber::now_ns();
        let mut watched = Watched {
            pair: pair.clone(),
            look_ns: i64::MAX,
            moved: 0,
            moved_ns: now_ns,
        };
        watched.look(now_ns);
        watched
    }

    fn look(&mut self, now_ns: i64) {
        let limits = &self.pair.limits;
        if now_ns >= limits.deadline_ns {
            self.pair.stop(RelayEnd::Deadline);
            self.look_ns = i64::MAX;
            return;
        }
        self.look_ns = limits.deadline_ns;
        if let Some(idle_ns) = limits.idle_ns {
            let moved = self.pair.bytes_moved();
            if moved != self.moved {
                self.moved = moved;
                self.moved_ns = now_ns;
            }
            let due_ns = self.moved_ns.saturating_add(idle_ns);
            if now_ns >= due_ns {
                self.pair.stop(RelayEnd::IdleTimeout);
                self.look_ns = i64::MAX;
                return;
            }
            let soon_ns = now_ns.saturating_add(idle_ns / LOOKS);
            self.look_ns = self.look_ns.min(soon_ns).min(due_ns);
        }
    }
}

/// Has the limits of a relay kept, until the guard goes.
pub(super) fn watch(pair: &Rc<Pair>) -> Result<impl Drop> {
    struct Unwatch(Option<(Rc<Bench>, usize)>);
    impl Drop for Unwatch {
        fn drop(&mut self) {
            let Some((bench, index)) = self.0.take() else {
                return;
            };
            let mut watched = bench.watched.borrow_mut();
            watched.remove(index);
            if watched.is_empty()
                && let Some(watcher) = bench.watcher.get()
            {
                watcher.end_wait();
            }
        }
    }
    if pair.limits.idle_ns.is_none() && pair.limits.deadline_ns == i64::MAX {
        return Ok(Unwatch(None));
    }
    let bench = &pair.bench;
    let watched = Watched::new(pair);
    let look_ns = watched.look_ns;
    let index = bench.watched.borrow_mut().insert(watched);
    let unwatch = Unwatch(Some((bench.clone(), index)));
    match bench.watcher.get() {
        Some(watcher) if look_ns < bench.next_ns.get() => watcher.end_wait(),
        Some(_) => {}
        None => {
            let theirs = bench.clone();
            let watcher = Builder::new().spawn(move || theirs.keep_watch())?;
            bench.watcher.set(Some(watcher.fellow()));
        }
    }
    Ok(unwatch)
}
