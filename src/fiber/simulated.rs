//! A worker over the scripted driver, from its first fiber to its end.

use std::cell::{Cell, RefCell};
use std::fmt::Display;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::join::start_first;
use super::scheduler::{Limits, Worker};
use super::stack::StackPool;
use crate::driver::Driver;
use crate::driver::scripted::{Scripted, World};
use crate::metrics::Counts;

/// Receive buffers that the worker lends, and bytes of each.
pub(super) const BUFFERS: (usize, usize) = (3, 24);

const STACK_BYTES: usize = 64 * 1024;

thread_local! {
    /// The stacks of the last story, for the next one: fresh ones would cost more than a short story does.
    static STACKS: Cell<Option<StackPool>> = const { Cell::new(None) };
}

/// Runs `main` as the first fiber of a worker in this world, to the end of the worker: its result, and how many operations there
/// were. No fiber and no operation may be left, and no completion have found nobody; `story` names what is played if so.
pub(super) fn run<T: 'static>(
    world: &Rc<RefCell<World>>,
    story: impl Display,
    main: impl FnOnce(Rc<RefCell<World>>) -> T + 'static,
) -> (T, u64) {
    let driver = Driver::scripted(Scripted::new(world.clone()));
    let limits = Limits {
        stack_bytes: STACK_BYTES,
        fibers_max: 64,
        spawns_max: 4,
        grace: Duration::from_secs(1),
        spin: Duration::ZERO,
        buffers: BUFFERS,
        zero_copy: Default::default(),
    };
    let counts = Arc::new(Counts::default());
    let worker = Worker::new(driver, limits, counts.clone()).unwrap();
    if let Some(stacks) = STACKS.take() {
        worker.replace_stacks(stacks);
    }
    let for_main = world.clone();
    let main = start_first(&worker, move || {
        struct Stop;
        impl Drop for Stop {
            fn drop(&mut self) {
                super::worker().unwrap().stop();
            }
        }
        let _stop = Stop;
        main(for_main)
    })
    .unwrap();
    worker.run();
    let metrics = counts.snapshot();
    assert_eq!(metrics.fibers_live, 0, "{story}: fibers left");
    assert_eq!(metrics.in_flight, 0, "{story}: operations left");
    assert_eq!(
        metrics.cqes_unknown, 0,
        "{story}: a completion found nobody"
    );
    STACKS.set(Some(worker.replace_stacks(StackPool::new(STACK_BYTES))));
    let result = main
        .join()
        .unwrap_or_else(|error| panic!("{story}: {error}"));
    (result, metrics.operations)
}
