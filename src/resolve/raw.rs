//! The C library's lookups, each on the calling thread, with results copied into values of our own.
//!
//! Only functions that may run on several threads at once: the `_r` forms where the plain ones answer in static memory. This module
//! knows no fibers and no pool: its callers decide where it runs.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ptr;

use super::{AddrInfo, HostEntry};
use crate::address::SockAddr;
use crate::constants::{EAI_SYSTEM, Family, Kind, NI_MAXHOST, NI_MAXSERV};
use crate::error::{Error, Result};
use crate::sys;

// netdb.h and arpa/inet.h; the libc crate lacks them.
unsafe extern "C" {
    fn gethostbyname_r(
        name: *const c_char,
        entry: *mut libc::hostent,
        buffer: *mut c_char,
        buffer_len: usize,
        result: *mut *mut libc::hostent,
        h_errno: *mut c_int,
    ) -> c_int;
    fn gethostbyaddr_r(
        address: *const c_void,
        address_len: libc::socklen_t,
        family: c_int,
        entry: *mut libc::hostent,
        buffer: *mut c_char,
        buffer_len: usize,
        result: *mut *mut libc::hostent,
        h_errno: *mut c_int,
    ) -> c_int;
    fn getservbyname_r(
        name: *const c_char,
        proto: *const c_char,
        entry: *mut libc::servent,
        buffer: *mut c_char,
        buffer_len: usize,
        result: *mut *mut libc::servent,
    ) -> c_int;
    fn getservbyport_r(
        port: c_int,
        proto: *const c_char,
        entry: *mut libc::servent,
        buffer: *mut c_char,
        buffer_len: usize,
        result: *mut *mut libc::servent,
    ) -> c_int;
    #[cfg(target_env = "gnu")]
    fn getprotobyname_r(
        name: *const c_char,
        entry: *mut libc::protoent,
        buffer: *mut c_char,
        buffer_len: usize,
        result: *mut *mut libc::protoent,
    ) -> c_int;
    fn inet_aton(text: *const c_char, address: *mut libc::in_addr) -> c_int;
    fn inet_pton(family: c_int, text: *const c_char, address: *mut c_void) -> c_int;
    fn inet_ntop(
        family: c_int,
        address: *const c_void,
        text: *mut c_char,
        text_len: libc::socklen_t,
    ) -> *const c_char;
}

/// What `getaddrinfo` is asked for besides the names.
#[derive(Clone, Copy)]
pub(super) struct Hints {
    pub(super) family: Family,
    pub(super) kind: Kind,
    pub(super) proto: i32,
    pub(super) flags: i32,
}

/// Room for most answers; larger ones are asked for again, with more room.
const BUFFER_BYTES: usize = 1024;
const BUFFER_BYTES_MAX: usize = 1024 * 1024;

/// The result of a `_r` function, which gets ever more room as long as it says ERANGE.
fn with_room<T>(
    mut call: impl FnMut(&mut [c_char]) -> std::result::Result<T, i32>,
) -> std::result::Result<T, i32> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match call(&mut buffer) {
            Err(libc::ERANGE) if buffer.len() < BUFFER_BYTES_MAX => {
                let len = buffer.len() * 4;
                buffer.resize(len, 0);
            }
            result => return result,
        }
    }
}

fn pointer(text: Option<&CStr>) -> *const c_char {
    text.map_or(ptr::null(), CStr::as_ptr)
}

/// # Safety
///
/// `text` is null or a NUL-terminated string.
unsafe fn owned(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}

/// The error of an `EAI_*` code; errno says which it was for EAI_SYSTEM.
fn gai_error(code: c_int) -> Error {
    if code == EAI_SYSTEM {
        return Error::from_errno(sys::errno());
    }
    Error::Gaierror { code }
}

pub(super) fn getaddrinfo(
    host: Option<&CStr>,
    service: Option<&CStr>,
    hints: Hints,
) -> Result<Vec<AddrInfo>> {
    // SAFETY: all zeros is a valid addrinfo: numbers and null pointers.
    let mut wanted: libc::addrinfo = unsafe { std::mem::zeroed() };
    wanted.ai_family = hints.family.bits();
    wanted.ai_socktype = hints.kind.bits();
    wanted.ai_protocol = hints.proto;
    wanted.ai_flags = hints.flags;
    let mut list = ptr::null_mut();
    // SAFETY: the strings are null or NUL-terminated and, like `wanted` and `list`, outlive the call.
    let code = unsafe { libc::getaddrinfo(pointer(host), pointer(service), &wanted, &mut list) };
    if code != 0 {
        return Err(gai_error(code));
    }
    let mut found = Vec::new();
    let mut next = list;
    // SAFETY: each entry of the list is valid until freeaddrinfo below, the last one's ai_next is null.
    while let Some(entry) = unsafe { next.as_ref() } {
        next = entry.ai_next;
        let mut sockaddr = SockAddr::empty();
        let (to, len) = sockaddr.as_mut_parts();
        // SAFETY: `to` has room for `*len` bytes, ai_addr points at ai_addrlen bytes of an address with its family in front; the
        // smaller count is copied, and the length set to what was: the promise of SockAddr.
        unsafe {
            *len = entry.ai_addrlen.min(*len);
            let from = entry.ai_addr.cast::<u8>();
            from.copy_to_nonoverlapping(to.cast(), *len as usize);
        }
        let family = Family::new(entry.ai_family);
        found.push(AddrInfo {
            family,
            kind: Kind::new(entry.ai_socktype),
            proto: entry.ai_protocol,
            // SAFETY: null or a string of the list.
            canonname: unsafe { owned(entry.ai_canonname) },
            sockaddr: sockaddr
                .decode()
                .unwrap_or_else(|| crate::Address::unspecified(family)),
        });
    }
    // SAFETY: the list came from getaddrinfo, and nothing of it is used any more.
    unsafe { libc::freeaddrinfo(list) };
    Ok(found)
}

pub(super) fn getnameinfo(address: &SockAddr, flags: i32) -> Result<(String, String)> {
    let mut host = [0; NI_MAXHOST as usize];
    let mut service = [0; NI_MAXSERV as usize];
    // SAFETY: the address and both arrays outlive the call and have the lengths that are given.
    let code = unsafe {
        libc::getnameinfo(
            address.as_ptr(),
            address.len(),
            host.as_mut_ptr(),
            host.len() as libc::socklen_t,
            service.as_mut_ptr(),
            service.len() as libc::socklen_t,
            flags,
        )
    };
    if code != 0 {
        return Err(gai_error(code));
    }
    // SAFETY: getnameinfo has written NUL-terminated strings into both.
    Ok(unsafe { (owned(host.as_ptr()), owned(service.as_ptr())) })
}

/// # Safety
///
/// A valid entry, whose lists end with null.
unsafe fn host_entry(entry: &libc::hostent) -> HostEntry {
    let list = |start: *mut *mut c_char| {
        (0..).map_while(move |index| {
            // SAFETY: the list is not null and ends with null, where this stops.
            let item = unsafe { *start.add(index) };
            (!item.is_null()).then_some(item)
        })
    };
    let ip = |item: *mut c_char| {
        // SAFETY: each address is of the entry's family and has its size; the bytes need no alignment.
        let ip: IpAddr = unsafe {
            if entry.h_addrtype == libc::AF_INET6 {
                Ipv6Addr::from(item.cast::<[u8; 16]>().read_unaligned()).into()
            } else {
                Ipv4Addr::from(item.cast::<[u8; 4]>().read_unaligned()).into()
            }
        };
        presentation(ip)
    };
    // SAFETY: the names are NUL-terminated.
    let name = |item: *mut c_char| unsafe { owned(item) };
    (
        name(entry.h_name),
        list(entry.h_aliases).map(name).collect(),
        list(entry.h_addr_list).map(ip).collect(),
    )
}

/// Makes a hostent of what `call` (a `_r` function) says.
fn host(
    call: impl Fn(*mut libc::hostent, &mut [c_char], *mut *mut libc::hostent, *mut c_int) -> c_int,
) -> Result<HostEntry> {
    let mut h_errno = 0;
    let found = with_room(|buffer| {
        // SAFETY: all zeros is a valid hostent: numbers and null pointers.
        let mut entry: libc::hostent = unsafe { std::mem::zeroed() };
        let mut result = ptr::null_mut();
        let code = call(&mut entry, buffer, &mut result, &mut h_errno);
        // SAFETY: where the call found something, it points at `entry`, whose strings lie in `buffer`.
        match unsafe { result.as_ref() } {
            // SAFETY: as the call has filled it.
            Some(entry) => Ok(unsafe { host_entry(entry) }),
            None => Err(code),
        }
    });
    found.map_err(|_| Error::Herror { code: h_errno })
}

pub(super) fn gethostbyname(name: &CStr) -> Result<HostEntry> {
    host(|entry, buffer, result, h_errno| {
        // SAFETY: the name is NUL-terminated; the buffer has the length given; all outlive the call.
        unsafe {
            gethostbyname_r(
                name.as_ptr(),
                entry,
                buffer.as_mut_ptr(),
                buffer.len(),
                result,
                h_errno,
            )
        }
    })
}

pub(super) fn gethostbyaddr(ip: IpAddr) -> Result<HostEntry> {
    let (family, octets) = match ip {
        IpAddr::V4(ip) => (libc::AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().to_vec()),
    };
    host(|entry, buffer, result, h_errno| {
        // SAFETY: the octets are an address of the family; the buffer has the length given; all outlive the call.
        unsafe {
            gethostbyaddr_r(
                octets.as_ptr().cast(),
                octets.len() as libc::socklen_t,
                family,
                entry,
                buffer.as_mut_ptr(),
                buffer.len(),
                result,
                h_errno,
            )
        }
    })
}

/// What a `_r` function of the databases finds, read by `read` while its memory is there.
fn database<E, T>(
    call: impl Fn(*mut E, &mut [c_char], *mut *mut E) -> c_int,
    read: impl Fn(&E) -> T,
) -> Option<T> {
    let found = with_room(|buffer| {
        let mut entry = std::mem::MaybeUninit::<E>::uninit();
        let mut result = ptr::null_mut();
        let code = call(entry.as_mut_ptr(), buffer, &mut result);
        // SAFETY: where the call found something, it points at `entry`, filled, whose strings lie in `buffer`.
        unsafe { result.as_ref() }.map(&read).ok_or(code)
    });
    found.ok()
}

pub(super) fn getservbyname(name: &CStr, proto: Option<&CStr>) -> Option<u16> {
    database(
        |entry, buffer, result| {
            let (start, len) = (buffer.as_mut_ptr(), buffer.len());
            // SAFETY: the strings are null or NUL-terminated; the buffer has the length given; all outlive the call.
            unsafe { getservbyname_r(name.as_ptr(), pointer(proto), entry, start, len, result) }
        },
        |entry: &libc::servent| u16::from_be(entry.s_port as u16),
    )
}

pub(super) fn getservbyport(port: u16, proto: Option<&CStr>) -> Option<String> {
    let port = c_int::from(port.to_be());
    database(
        |entry, buffer, result| {
            let (start, len) = (buffer.as_mut_ptr(), buffer.len());
            // SAFETY: the string is null or NUL-terminated; the buffer has the length given; all outlive the call.
            unsafe { getservbyport_r(port, pointer(proto), entry, start, len, result) }
        },
        // SAFETY: the name is NUL-terminated.
        |entry: &libc::servent| unsafe { owned(entry.s_name) },
    )
}

#[cfg(target_env = "gnu")]
pub(super) fn getprotobyname(name: &CStr) -> Option<i32> {
    database(
        |entry, buffer, result| {
            let (start, len) = (buffer.as_mut_ptr(), buffer.len());
            // SAFETY: the name is NUL-terminated; the buffer has the length given; all outlive the call.
            unsafe { getprotobyname_r(name.as_ptr(), entry, start, len, result) }
        },
        |entry: &libc::protoent| entry.p_proto,
    )
}

/// musl has no `_r` form; its table is built in, and only the place in it is shared.
#[cfg(not(target_env = "gnu"))]
pub(super) fn getprotobyname(name: &CStr) -> Option<i32> {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _turn = TURN
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    // SAFETY: the name is NUL-terminated; the static entry that is returned stays as it is while the lock is held.
    unsafe { libc::getprotobyname(name.as_ptr()).as_ref() }.map(|entry| entry.p_proto)
}

pub(super) fn gethostname() -> Result<String> {
    // Longer than Linux lets a name be (64), and with room for the NUL.
    let mut name: [c_char; 256] = [0; 256];
    // SAFETY: the array has one byte more than the length given, so that a NUL ends it in any case.
    let code = unsafe { libc::gethostname(name.as_mut_ptr(), name.len() - 1) };
    if code < 0 {
        return Err(Error::from_errno(sys::errno()));
    }
    // SAFETY: NUL-terminated, as said.
    Ok(unsafe { owned(name.as_ptr()) })
}

pub(super) fn sethostname(name: &[u8]) -> Result<()> {
    // SAFETY: the call reads as many bytes as there are.
    let code = unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) };
    if code < 0 {
        return Err(Error::from_errno(sys::errno()));
    }
    Ok(())
}

pub(super) fn aton(text: &CStr) -> Option<Ipv4Addr> {
    let mut address = libc::in_addr { s_addr: 0 };
    // SAFETY: the text is NUL-terminated, the address outlives the call.
    let valid = unsafe { inet_aton(text.as_ptr(), &mut address) } != 0;
    valid.then(|| Ipv4Addr::from(address.s_addr.to_ne_bytes()))
}

/// The bytes of an address of the family AF_INET (the first 4) or AF_INET6.
pub(super) fn pton(family: Family, text: &CStr) -> Result<Option<[u8; 16]>> {
    let mut bytes = [0; 16];
    // SAFETY: the text is NUL-terminated; no family that is known has addresses above 16 bytes.
    match unsafe { inet_pton(family.bits(), text.as_ptr(), bytes.as_mut_ptr().cast()) } {
        1.. => Ok(Some(bytes)),
        0 => Ok(None),
        _ => Err(Error::from_errno(sys::errno())),
    }
}

/// As the C library writes it, which is not always as Rust does (`::1.2.3.4`).
pub(super) fn presentation(ip: IpAddr) -> String {
    let mut text = [0; 64];
    let len = text.len() as libc::socklen_t;
    let mut write = |family, bytes: *const c_void| {
        // SAFETY: the caller below gives an address of the family; the text has the length given and room for any address.
        unsafe { inet_ntop(family, bytes, text.as_mut_ptr(), len) };
    };
    match ip {
        IpAddr::V4(ip) => write(libc::AF_INET, ip.octets().as_ptr().cast()),
        IpAddr::V6(ip) => write(libc::AF_INET6, ip.octets().as_ptr().cast()),
    }
    // SAFETY: NUL-terminated by inet_ntop, which cannot fail with this family and this room.
    unsafe { owned(text.as_ptr()) }
}

pub(super) fn interfaces() -> Result<Vec<(u32, String)>> {
    // SAFETY: no arguments; the result is null or a list to free.
    let list = unsafe { libc::if_nameindex() };
    if list.is_null() {
        return Err(Error::from_errno(sys::errno()));
    }
    let entries = (0..).map_while(|index| {
        // SAFETY: the list ends with an entry whose index is 0, where this stops.
        let entry = unsafe { &*list.add(index) };
        // SAFETY: the names of the others are NUL-terminated.
        (entry.if_index != 0).then(|| (entry.if_index, unsafe { owned(entry.if_name) }))
    });
    let entries = entries.collect();
    // SAFETY: from if_nameindex, and not used any more.
    unsafe { libc::if_freenameindex(list) };
    Ok(entries)
}

/// 0 if there is none of this name.
pub(super) fn interface_index(name: &CString) -> u32 {
    // SAFETY: the name is NUL-terminated and outlives the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

pub(super) fn interface_name(index: u32) -> Result<String> {
    let mut name = [0; libc::IF_NAMESIZE];
    // SAFETY: the array has the size that the call asks for.
    let found = unsafe { libc::if_indextoname(index, name.as_mut_ptr()) };
    if found.is_null() {
        return Err(Error::from_errno(sys::errno()));
    }
    // SAFETY: NUL-terminated by the call.
    Ok(unsafe { owned(name.as_ptr()) })
}
