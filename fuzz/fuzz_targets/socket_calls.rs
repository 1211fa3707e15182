//! Socket calls of several fibers over a simulated kernel. (`socket_calls_live` has the real one.)
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringsock::fuzzing::socket_calls(data));

/// What AddressSanitizer is told unless ASAN_OPTIONS says otherwise. Returned frames kept elsewhere would need as much memory again
/// for each fiber; a short story needs few freed blocks to be remembered, and few frames of who made them.
#[unsafe(no_mangle)]
extern "C" fn __asan_default_options() -> *const std::ffi::c_char {
    c"detect_stack_use_after_return=0:quarantine_size_mb=16:malloc_context_size=6".as_ptr()
}
