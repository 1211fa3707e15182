//! Doors for the fuzz targets in `fuzz/`, which see the crate from outside: what takes bytes or completions apart, each with what
//! must hold. Only `cfg(fuzzing)`, which cargo-fuzz sets, builds this.

use crate::address::SockAddr;
use crate::driver::slab::{Completion, Key, Slots, TAG_FIRST, Waiter};

pub use crate::socket::fuzzing_control_messages as control_messages;

/// How many waiters the completions are for.
const WAITERS: usize = 8;

/// Takes the next number off `data`.
fn take<const N: usize>(data: &mut &[u8]) -> Option<[u8; N]> {
    let (bytes, rest) = data.split_first_chunk()?;
    *data = rest;
    Some(*bytes)
}

fn waiter(index: usize) -> Waiter {
    Waiter::MIN.saturating_add(index)
}

/// Operations that begin, and CQEs that come: in order, late, doubled, with more to come, or for nobody. Each operation's result
/// reaches its own waiter once, at its last CQE, whatever else comes; and nothing panics.
///
/// Each step takes two bytes, what happens and to which waiter; a stray CQE eight more for its `user_data`.
pub fn cqe_sequence(mut data: &[u8]) {
    let mut slots = Slots::new();
    let mut index: Vec<u32> = (0..WAITERS).map(|n| slots.register(waiter(n))).collect();
    // The operation under way for each waiter, with the first result of one that has several CQEs.
    let mut live: [Option<(Key, Option<i32>)>; WAITERS] = [None; WAITERS];
    let mut ended: Vec<Key> = Vec::new();
    let mut unknown = 0;
    while let Some([what, which]) = take::<2>(&mut data) {
        let which = usize::from(which) % WAITERS;
        let res = i32::from(what) - 128;
        match what % 7 {
            0 | 1 if live[which].is_none() => {
                let key = slots.begin(index[which]);
                assert!(!ended.contains(&key), "a key was used again");
                live[which] = Some((key, None));
            }
            2 | 3 => {
                let Some((key, first)) = live[which].take() else {
                    continue;
                };
                // The last CQE; of a zero-copy send, which has announced it, the notification.
                let flags = if first.is_some() { 8 } else { 0 };
                let delivered = slots.complete(key.0, Completion { res, flags });
                let (to, got) = delivered.expect("the last CQE is delivered");
                assert_eq!((to, got.res), (waiter(which), first.unwrap_or(res)));
                ended.push(key);
            }
            4 => {
                let Some((key, first)) = &mut live[which] else {
                    continue;
                };
                // F_MORE: another one will come.
                assert_eq!(slots.complete(key.0, Completion { res, flags: 2 }), None);
                first.get_or_insert(res);
            }
            5 => {
                // One that nobody waits for: an ended operation's, a tag, or anything.
                let user_data = match (what & 1, ended.get(which)) {
                    (0, Some(key)) => key.0,
                    _ => u64::from_le_bytes(take(&mut data).unwrap_or_default()),
                };
                if live.iter().flatten().any(|(key, _)| key.0 == user_data) {
                    continue;
                }
                let flags = u32::from(what >> 4);
                assert_eq!(slots.complete(user_data, Completion { res, flags }), None);
                unknown += u64::from((user_data as u32) < TAG_FIRST);
            }
            _ if live[which].is_none() => {
                // The waiter goes and another one comes.
                slots.unregister(index[which]);
                index[which] = slots.register(waiter(which));
            }
            _ => {}
        }
        assert_eq!(slots.waiting(), live.iter().flatten().count());
        assert_eq!(slots.unknown(), unknown);
        for (key, _) in live.iter().flatten() {
            assert!(slots.is_waiting(*key));
        }
    }
}

/// Socket calls of several fibers over a simulated kernel, all of it chosen by the bytes: see `fiber/story.rs`.
pub fn socket_calls(data: &[u8]) {
    let _ = crate::fiber::story::socket_calls(data);
}

/// An address as the kernel might leave it: it is decoded without a panic, and what it means survives being encoded again.
pub fn kernel_address(data: &[u8]) {
    let data = &data[..data.len().min(128)];
    if data.len() < 2 {
        return;
    }
    let Some(address) = SockAddr::new(data).decode() else {
        return;
    };
    let _ = (
        address.to_string(),
        address.port(),
        address.as_socket_addr(),
    );
    let Ok(encoded) = address.encode() else {
        // A path with a NUL or of 108 bytes is the kernel's to leave and not ours to give.
        return;
    };
    assert_eq!(encoded.decode().as_ref(), Some(&address), "{address:?}");
}
