//! Control data as the kernel might leave it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringsock::fuzzing::control_messages(data));
