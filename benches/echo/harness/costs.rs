//! What the fibers' own tools cost, in nanoseconds of wall time: the minimum over rounds that take turns.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use ringsock::{Handle, Mutex, Runtime, spawn, yield_now};

/// One figure: its name, and a round of it in nanoseconds per unit.
type Figure = (&'static str, fn() -> f64);

const FIGURES: [Figure; 9] = [
    ("mutex lock + unlock, uncontended, in a fiber", mutex),
    ("  std::sync::Mutex, for comparison", std_mutex),
    ("channel send + recv, one fiber, nobody waits", channel),
    (
        "spawn + finish of an empty fiber, stack from the pool",
        spawn_and_finish,
    ),
    ("  the same, and its result joined", spawn_and_join),
    ("yield_now switch, 512 fibers in rotation", switch),
    ("spawn_on worker 0 -> 1 + finish, pipelined", remote_spawn),
    (
        "spawn_on worker 0 -> 1 + join, latency, both awake",
        latency_awake,
    ),
    (
        "spawn_on worker 0 -> 1 + join, latency, both asleep",
        latency_asleep,
    ),
];

/// Every figure's name and the minimum over `rounds` in nanoseconds. For two free cores; on fewer the lines of two workers measure
/// the kernel's scheduler.
pub fn figures(rounds: usize) -> Vec<(&'static str, f64)> {
    let mut best = [f64::INFINITY; FIGURES.len()];
    for _ in 0..rounds {
        for ((_, round), best) in FIGURES.iter().zip(&mut best) {
            *best = best.min(round());
        }
    }
    (FIGURES.iter().zip(best))
        .map(|((name, _), best)| (*name, best))
        .collect()
}

/// Nanoseconds per unit of `work`, which does `units` of them.
fn per_unit(units: usize, work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_nanos() as f64 / units as f64
}

fn in_fiber(round: fn() -> f64) -> f64 {
    ringsock::run(round)
}

fn on_two_workers(round: fn() -> f64) -> f64 {
    let runtime = Runtime::builder().workers(2);
    runtime.run(round).expect("two rings")
}

fn mutex() -> f64 {
    in_fiber(|| {
        const UNITS: usize = 1_000_000;
        let mutex = Mutex::new(0usize);
        per_unit(UNITS, || {
            for _ in 0..UNITS {
                *black_box(&mutex).lock().expect("free") += 1;
            }
        })
    })
}

fn std_mutex() -> f64 {
    in_fiber(|| {
        const UNITS: usize = 1_000_000;
        let mutex = std::sync::Mutex::new(0usize);
        per_unit(UNITS, || {
            for _ in 0..UNITS {
                *black_box(&mutex).lock().expect("free") += 1;
            }
        })
    })
}

fn channel() -> f64 {
    in_fiber(|| {
        const UNITS: usize = 500_000;
        let (sender, receiver) = ringsock::channel(1);
        per_unit(UNITS, || {
            for unit in 0..UNITS {
                sender.send(unit).expect("room");
                black_box(receiver.recv().expect("a value"));
            }
        })
    })
}

fn spawn_and_finish() -> f64 {
    in_fiber(|| {
        const UNITS: usize = 100_000;
        per_unit(UNITS, || {
            for _ in 0..UNITS {
                drop(spawn(|| ()));
                yield_now();
            }
        })
    })
}

fn spawn_and_join() -> f64 {
    in_fiber(|| {
        const UNITS: usize = 100_000;
        spawn(|| ()).join().expect("it ends");
        per_unit(UNITS, || {
            for _ in 0..UNITS {
                spawn(|| ()).join().expect("it ends");
            }
        })
    })
}

fn switch() -> f64 {
    in_fiber(|| {
        const FIBERS: usize = 512;
        const YIELDS: usize = 1000;
        let fibers: Vec<_> = (0..FIBERS)
            .map(|_| spawn(|| (0..YIELDS).for_each(|_| yield_now())))
            .collect();
        per_unit(FIBERS * YIELDS, || {
            for fiber in fibers {
                fiber.join().expect("it ends");
            }
        })
    })
}

fn remote_spawn() -> f64 {
    on_two_workers(|| {
        const UNITS: usize = 50_000;
        let handle = Handle::current().expect("in a runtime");
        let spawn_on_other = || handle.spawn_on(1, || ()).expect("a running worker");
        spawn_on_other().join().expect("it ends");
        per_unit(UNITS, || {
            for _ in 1..UNITS {
                drop(spawn_on_other());
            }
            // The inbox keeps the order.
            spawn_on_other().join().expect("it ends");
        })
    })
}

fn latency_awake() -> f64 {
    on_two_workers(|| {
        const UNITS: usize = 5_000;
        let handle = Handle::current().expect("in a runtime");
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let keep_awake = move || {
            while !seen.load(Ordering::Relaxed) {
                yield_now();
            }
        };
        let awake = handle.spawn_on(1, keep_awake).expect("a running worker");
        let result = per_unit(UNITS, || {
            for _ in 0..UNITS {
                let fiber = handle.spawn_on(1, || ()).expect("a running worker");
                while !fiber.is_finished() {
                    yield_now();
                }
            }
        });
        stop.store(true, Ordering::Relaxed);
        awake.join().expect("it ends");
        result
    })
}

fn latency_asleep() -> f64 {
    on_two_workers(|| {
        const UNITS: usize = 2_000;
        let handle = Handle::current().expect("in a runtime");
        per_unit(UNITS, || {
            for _ in 0..UNITS {
                let fiber = handle.spawn_on(1, || ()).expect("a running worker");
                fiber.join().expect("it ends");
            }
        })
    })
}
