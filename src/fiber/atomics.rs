//! What `wake.rs`, `wait_queue.rs` and `raw_mutex.rs` are built from. `tests/loom.rs` includes those files as they are and puts
//! loom's types here, whose every interleaving it then tries.

pub(crate) use std::sync::Mutex;
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU8, Ordering, fence};
