//! What the tests share. Each test program uses a part of it.
#![allow(dead_code, unused_imports)]

mod net;
mod process;
mod random;
mod sandbox;
mod settings;
mod turn;

pub use net::*;
pub use process::*;
pub use random::*;
pub use sandbox::*;
pub use settings::*;
pub use turn::*;
