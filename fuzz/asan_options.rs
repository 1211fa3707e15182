//! For targets that run fibers: what AddressSanitizer is told unless ASAN_OPTIONS says otherwise.

/// Returned frames kept elsewhere would be kept for each fiber anew, until there is no memory left. A short story needs few freed blocks
/// to be remembered, and few frames of who made them.
#[unsafe(no_mangle)]
extern "C" fn __asan_default_options() -> *const std::ffi::c_char {
    c"detect_stack_use_after_return=0:quarantine_size_mb=16:malloc_context_size=6".as_ptr()
}
