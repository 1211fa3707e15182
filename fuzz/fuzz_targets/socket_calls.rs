//! Socket calls of several fibers over a simulated kernel. (`socket_calls_live` has the real one.)
#![no_main]

#[path = "../asan_options.rs"]
mod asan_options;

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringsock::fuzzing::socket_calls(data));
