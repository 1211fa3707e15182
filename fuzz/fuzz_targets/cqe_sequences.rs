//! Sequences of operations and completions on the slab that says who waits for what.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringsock::fuzzing::cqe_sequence(data));
