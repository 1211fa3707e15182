//! An echo that flips one bit, once: what it is put under must notice.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use clap::Args;

use super::{ListenArgs, threads};

/// Options of this server.
#[derive(Args)]
pub struct CorruptArgs {
    #[command(flatten)]
    listen: ListenArgs,
    /// Which receive to corrupt, over all connections, from 1.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    nth: u64,
}

/// Serves until a signal ends the process.
pub fn serve(args: &CorruptArgs) -> io::Result<()> {
    let nth = args.nth;
    let received = AtomicU64::new(0);
    let change = move |bytes: &mut [u8]| {
        if received.fetch_add(1, Ordering::Relaxed) + 1 == nth {
            // In the middle: neither the first byte nor the last is special.
            bytes[bytes.len() / 2] ^= 1;
        }
    };
    threads::serve_changed(&args.listen, Arc::new(change))
}
