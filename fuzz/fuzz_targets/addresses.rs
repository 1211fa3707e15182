//! Addresses: those the kernel leaves, and those that people write, which mean what they mean to the C library.
//!
//! The first byte chooses, the rest is the address.
#![no_main]

use std::ffi::CString;

use libfuzzer_sys::fuzz_target;
use ringsock::prelude::{AF_INET, AF_INET6};
use ringsock::{inet_aton, inet_ntoa, inet_ntop, inet_pton};

fuzz_target!(|data: &[u8]| {
    let Some((choice, rest)) = data.split_first() else {
        return;
    };
    if choice % 3 == 0 {
        return ringsock::fuzzing::kernel_address(rest);
    }
    let Ok(text) = std::str::from_utf8(rest) else {
        return;
    };
    let Ok(c_text) = CString::new(text) else {
        assert!(inet_pton(AF_INET, text).is_err() && inet_pton(AF_INET6, text).is_err());
        return;
    };
    if choice % 3 == 1 {
        let mut expected = libc::in_addr { s_addr: 0 };
        // SAFETY: a string that ends with a zero, and room for one address; both live through the call.
        let understood = unsafe { inet_aton_of_c(c_text.as_ptr(), &mut expected) } != 0;
        let expected = expected.s_addr.to_ne_bytes();
        let ours = inet_aton(text);
        assert_eq!(ours.is_ok(), understood, "inet_aton of {text:?}: {ours:?}");
        if let Ok(ours) = ours {
            assert_eq!(ours, expected, "inet_aton of {text:?}");
            let shown = inet_ntoa(&ours).expect("four bytes are an address");
            assert_eq!(inet_aton(&shown), Ok(ours));
        }
        return;
    }
    for family in [AF_INET, AF_INET6] {
        let mut expected = [0; 16];
        // SAFETY: a string that ends with a zero, and 16 bytes, which hold an address of either family.
        let understood =
            unsafe { inet_pton_of_c(family.bits(), c_text.as_ptr(), expected.as_mut_ptr().cast()) }
                == 1;
        let ours = inet_pton(family, text);
        assert_eq!(ours.is_ok(), understood, "inet_pton of {text:?}: {ours:?}");
        if let Ok(ours) = ours {
            assert_eq!(ours[..], expected[..ours.len()], "inet_pton of {text:?}");
            let shown = inet_ntop(family, &ours).expect("an address");
            assert_eq!(inet_pton(family, &shown), Ok(ours));
        }
    }
});

unsafe extern "C" {
    #[link_name = "inet_aton"]
    fn inet_aton_of_c(text: *const libc::c_char, address: *mut libc::in_addr) -> libc::c_int;
    #[link_name = "inet_pton"]
    fn inet_pton_of_c(
        family: libc::c_int,
        text: *const libc::c_char,
        address: *mut libc::c_void,
    ) -> libc::c_int;
}
