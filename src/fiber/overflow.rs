//! Stack overflow of a fiber: a message that names the fiber, instead of a bare SIGSEGV.
//!
//! A fault inside the running fiber's guard is reported on standard error and ends the process by SIGABRT. Every other fault
//! goes to the handler that was there before, so Rust's own report for thread stacks, and crash reporters, keep working.
//! The handler runs on the thread's alternate signal stack and calls only async-signal-safe functions.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;

use super::stack::GUARD_BYTES;

/// Bytes of an alternate signal stack, where a thread has none: room for any vector state the kernel saves (AVX-512, AMX).
const SIGNAL_STACK_BYTES: usize = 64 * 1024;

const SIGNALS: [libc::c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

static PREVIOUS: [OnceLock<libc::sigaction>; 2] = [OnceLock::new(), OnceLock::new()];

/// Gives the calling thread an alternate signal stack until dropped, if it has none.
pub(crate) struct SignalStack(Option<*mut libc::c_void>);

impl SignalStack {
    /// Installs the process's handler, once, and this thread's stack for it.
    pub(crate) fn install() -> SignalStack {
        install_handlers();
        let mut now = MaybeUninit::<libc::stack_t>::zeroed();
        // SAFETY: the kernel fills the struct; zeroed is valid for it anyway.
        let now = unsafe {
            libc::sigaltstack(ptr::null(), now.as_mut_ptr());
            now.assume_init()
        };
        if now.ss_flags & libc::SS_DISABLE == 0 {
            return SignalStack(None);
        }
        // SAFETY: a private anonymous mapping at an address the kernel picks; checked below.
        let memory = unsafe {
            libc::mmap(
                ptr::null_mut(),
                SIGNAL_STACK_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            // An overflow then ends the process without the message.
            return SignalStack(None);
        }
        let stack = libc::stack_t {
            ss_sp: memory,
            ss_flags: 0,
            ss_size: SIGNAL_STACK_BYTES,
        };
        // SAFETY: the mapping lives until `drop`, which takes it away from the kernel first.
        unsafe { libc::sigaltstack(&stack, ptr::null_mut()) };
        SignalStack(Some(memory))
    }
}

impl Drop for SignalStack {
    fn drop(&mut self) {
        if let Some(memory) = self.0 {
            let none = libc::stack_t {
                ss_sp: ptr::null_mut(),
                ss_flags: libc::SS_DISABLE,
                ss_size: 0,
            };
            // SAFETY: made in `install` for this thread, which no longer uses it after the first call.
            unsafe {
                libc::sigaltstack(&none, ptr::null_mut());
                libc::munmap(memory, SIGNAL_STACK_BYTES);
            }
        }
    }
}

fn install_handlers() {
    for (signal, previous) in SIGNALS.into_iter().zip(&PREVIOUS) {
        previous.get_or_init(|| {
            let mut action = MaybeUninit::<libc::sigaction>::zeroed();
            let mut old = MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: zeroed is a valid sigaction; the handler has the signature SA_SIGINFO asks for and is async-signal-safe.
            unsafe {
                let action = &mut *action.as_mut_ptr();
                let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    handle;
                action.sa_sigaction = handler as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigemptyset(&mut action.sa_mask);
                // What was there must be known before a fault can reach the new handler.
                libc::sigaction(signal, ptr::null(), old.as_mut_ptr());
                libc::sigaction(signal, action, ptr::null_mut());
                old.assume_init()
            }
        });
    }
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo. Where kill(2) sent the signal, the address field holds other numbers, which lie
    // in no guard.
    let address = unsafe { (*info).si_addr() } as usize;
    if let Some(worker) = super::worker()
        && let Some(fiber) = worker.current()
        && (fiber.limit..fiber.limit + GUARD_BYTES).contains(&address)
    {
        write_error(&[
            b"ringsock: fiber '",
            fiber.name().unwrap_or("unnamed").as_bytes(),
            b"' overflowed its stack of ",
            decimal((fiber.stack_bytes / 1024) as u64, &mut [0; 20]),
            b" KiB: use less stack, or ask for more with RuntimeBuilder::stack_size\n",
        ]);
        // SAFETY: abort is async-signal-safe.
        unsafe { libc::abort() };
    }
    chain(signal, info, context);
}

/// What would have happened without our handler.
fn chain(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let index = usize::from(signal == libc::SIGBUS);
    let previous = PREVIOUS[index].get();
    match previous.map(|action| (action.sa_sigaction, action.sa_flags)) {
        None | Some((libc::SIG_DFL | libc::SIG_IGN, _)) => {
            // SAFETY: both are async-signal-safe. The signal, sent again, ends the process when this handler returns, whether
            // a fault or kill(2) brought it.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
                libc::raise(signal);
            }
        }
        Some((handler, flags)) if flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: the previous handler was installed with SA_SIGINFO, so it has this signature.
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        Some((handler, _)) => {
            // SAFETY: the previous handler was installed without SA_SIGINFO, so it has this signature.
            let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}

fn write_error(parts: &[&[u8]]) {
    for part in parts {
        // SAFETY: write is async-signal-safe and reads the slice.
        unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
}

/// The number in decimal digits, without allocating.
fn decimal(mut number: u64, digits: &mut [u8; 20]) -> &[u8] {
    let mut start = digits.len();
    loop {
        start -= 1;
        digits[start] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &digits[start..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimal_writes_what_format_writes() {
        for number in [0, 7, 10, 256, u64::MAX] {
            assert_eq!(decimal(number, &mut [0; 20]), number.to_string().as_bytes());
        }
    }
}
