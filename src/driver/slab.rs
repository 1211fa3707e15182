//! Who waits for which completion.
//!
//! Every fiber (and every plain thread's ring) registers once and keeps its slot for life: an operation costs no allocation,
//! it only stamps the slot with a new generation. A CQE's `user_data` is a [`Key`], slot index and generation, so a late or
//! foreign completion finds a slot whose generation differs and is counted, never delivered.
//!
//! ```text
//!            begin                 complete, F_MORE clear
//!   idle ─────────────▶ waiting ───────────────────────────▶ idle
//!    ▲                     │ ▲
//!    │ register            │ │ complete, F_MORE set (a multi-CQE operation: the first result is kept,
//!    │                     └─┘                       the slot stays until the last CQE)
//!   free ◀── unregister (idle only)
//! ```
//!
//! It stores an opaque waiter and knows neither fibers nor rings.

use std::num::NonZeroUsize;

use slab::Slab;

/// `IORING_CQE_F_MORE`: more CQEs of the same operation will come.
pub(crate) const CQE_F_MORE: u32 = 1 << 1;

/// `IORING_CQE_F_NOTIF`: the last CQE of a zero-copy send, which says only that the memory is free again.
const CQE_F_NOTIF: u32 = 1 << 3;

/// Slot indices from here up are not slots: they tag CQEs nobody waits for.
pub(crate) const TAG_FIRST: u32 = u32::MAX - 15;

/// A linked or bare timer whose verdict nobody reads.
pub(crate) const TAG_TIMER: u64 = TAG_FIRST as u64;
/// A cancel request's own CQE (or a connect's timer's); the upper half says which.
pub(crate) const TAG_CANCEL: u64 = TAG_FIRST as u64 + 1;
/// Somebody rang: by the eventfd, or by a message from another ring.
pub(crate) const TAG_WAKE: u64 = TAG_FIRST as u64 + 2;
/// What became of a message to another ring; the upper half says which.
pub(crate) const TAG_MESSAGE: u64 = TAG_FIRST as u64 + 3;
/// The timer linked to an operation, on a driver that waits for its end too.
pub(crate) const TAG_LINKED: u64 = TAG_FIRST as u64 + 6;
/// It is time to repeat the cancels that missed.
pub(crate) const TAG_RETRY: u64 = TAG_FIRST as u64 + 5;
/// The poll of the wake-up eventfd.
pub(crate) const TAG_EVENTFD: u64 = TAG_FIRST as u64 + 4;

/// Names one operation of one slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub(crate) struct Key(pub(crate) u64);

impl Key {
    /// The key no operation has: its index is a tag's, so no CQE that bears it finds a slot either.
    pub(crate) const NONE: Key = Key(u64::MAX);

    /// Its slot.
    pub(super) fn index(self) -> usize {
        (self.0 & 0xffff_ffff) as usize
    }
}

/// What one operation came to: `res` as in the CQE (0 or more, or a negative errno) and the CQE's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Completion {
    pub(crate) res: i32,
    pub(crate) flags: u32,
}

/// What the layer above stores in a slot to find its waiter again.
pub(crate) type Waiter = NonZeroUsize;

struct Slot {
    // Never 0, which leaves `slab` a value to mark vacant entries with: 16 bytes an entry instead of 24.
    waiter: NonZeroUsize,
    /// The operation under way, or NONE.
    key: Key,
}

const GENERATION_ONE: u64 = 1 << 32;

/// The slots of one driver.
pub(crate) struct Slots {
    slab: Slab<Slot>,
    /// The generation of the next operation, in the upper half.
    generation: u64,
    waiting: usize,
    unknown: u64,
    /// Operations that announced more CQEs, with the result of their first one. Mostly empty.
    draining: Vec<(Key, i32)>,
}

impl Slots {
    pub(crate) fn new() -> Slots {
        Slots {
            slab: Slab::new(),
            generation: GENERATION_ONE,
            waiting: 0,
            unknown: 0,
            draining: Vec::new(),
        }
    }

    /// Gives `waiter` a slot for as long as it lives.
    pub(crate) fn register(&mut self, waiter: Waiter) -> u32 {
        let index = self.slab.insert(Slot {
            waiter,
            key: Key::NONE,
        });
        u32::try_from(index)
            .ok()
            .filter(|index| *index < TAG_FIRST)
            .expect("fewer than 2^32 - 16 waiters")
    }

    /// Takes the slot back. The waiter must have no operation in flight: the kernel would complete into nothing.
    pub(crate) fn unregister(&mut self, slot: u32) {
        let slot = self.slab.remove(slot as usize);
        assert_eq!(slot.key, Key::NONE, "an operation is still in flight");
    }

    /// Starts an operation (or a wait for a wake) on the slot and names it.
    #[inline(always)]
    pub(crate) fn begin(&mut self, slot: u32) -> Key {
        let key = Key(self.generation | u64::from(slot));
        self.generation = self.generation.wrapping_add(GENERATION_ONE);
        let entry = &mut self.slab[slot as usize];
        debug_assert_eq!(entry.key, Key::NONE, "one operation at a time");
        entry.key = key;
        self.waiting += 1;
        key
    }

    /// Takes back a [`begin`](Slots::begin) nothing was submitted for.
    pub(crate) fn abandon(&mut self, key: Key) {
        let finished = self.complete(key.0, Completion { res: 0, flags: 0 });
        debug_assert!(finished.is_some(), "an operation that never began");
    }

    /// Whether the operation is still awaited.
    pub(crate) fn is_waiting(&self, key: Key) -> bool {
        self.slab
            .get(key.index())
            .is_some_and(|slot| slot.key == key)
    }

    /// Delivers a CQE: the waiter and its result at the last CQE of the operation, `None` before that and for a CQE that
    /// nobody waits for.
    #[inline(always)]
    pub(crate) fn complete(
        &mut self,
        user_data: u64,
        completion: Completion,
    ) -> Option<(Waiter, Completion)> {
        let key = Key(user_data);
        match self.slab.get_mut(key.index()) {
            Some(slot) if slot.key == key && completion.flags & (CQE_F_MORE | CQE_F_NOTIF) == 0 => {
                slot.key = Key::NONE;
                self.waiting -= 1;
                Some((slot.waiter, completion))
            }
            _ => self.complete_rest(key, completion),
        }
    }

    /// CQEs of operations with several, and those nobody waits for.
    #[cold]
    #[inline(never)]
    fn complete_rest(&mut self, key: Key, completion: Completion) -> Option<(Waiter, Completion)> {
        if !self.is_waiting(key) {
            self.unknown += u64::from((key.0 as u32) < TAG_FIRST);
            return None;
        }
        let first = self.draining.iter().position(|(other, _)| *other == key);
        if completion.flags & CQE_F_MORE != 0 {
            if first.is_none() {
                self.draining.push((key, completion.res));
            }
            return None;
        }
        let res = first.map_or(completion.res, |index| self.draining.swap_remove(index).1);
        let slot = &mut self.slab[key.index()];
        slot.key = Key::NONE;
        self.waiting -= 1;
        Some((
            slot.waiter,
            Completion {
                res,
                flags: completion.flags,
            },
        ))
    }

    /// Every registered waiter.
    pub(crate) fn waiters(&self) -> impl Iterator<Item = Waiter> + '_ {
        self.slab.iter().map(|(_, slot)| slot.waiter)
    }

    /// The waiter in a slot, if the slot is taken.
    pub(crate) fn waiter(&self, slot: u32) -> Option<Waiter> {
        self.slab.get(slot as usize).map(|slot| slot.waiter)
    }

    /// The waiter that `key` names, if the key is still awaited.
    pub(crate) fn waiter_of(&self, key: Key) -> Option<Waiter> {
        self.is_waiting(key).then(|| self.slab[key.index()].waiter)
    }

    /// How many operations and waits are under way.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    /// How many CQEs found nobody waiting.
    pub(crate) fn unknown(&self) -> u64 {
        self.unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiter(n: usize) -> Waiter {
        Waiter::new(n).expect("not 0")
    }

    fn completion(res: i32) -> Completion {
        Completion { res, flags: 0 }
    }

    #[test]
    fn a_completion_reaches_its_waiter_once() {
        let mut slots = Slots::new();
        let slot = slots.register(waiter(7));
        let key = slots.begin(slot);
        assert!(slots.is_waiting(key));
        assert_eq!(
            slots.complete(key.0, completion(5)),
            Some((waiter(7), completion(5)))
        );
        assert_eq!(
            slots.complete(key.0, completion(5)),
            None,
            "a duplicate CQE"
        );
        assert_eq!(slots.unknown(), 1);
        assert_eq!(slots.waiting(), 0);
    }

    #[test]
    fn a_late_cqe_never_hits_the_slots_next_operation() {
        let mut slots = Slots::new();
        let slot = slots.register(waiter(7));
        let old = slots.begin(slot);
        assert!(slots.complete(old.0, completion(1)).is_some());
        let new = slots.begin(slot);
        assert_eq!(slots.complete(old.0, completion(99)), None);
        assert_eq!(
            slots.complete(new.0, completion(2)),
            Some((waiter(7), completion(2)))
        );
        assert_eq!(slots.unknown(), 1);
    }

    #[test]
    fn a_late_cqe_never_hits_a_slots_next_owner() {
        let mut slots = Slots::new();
        let slot = slots.register(waiter(7));
        let old = slots.begin(slot);
        assert!(slots.complete(old.0, completion(1)).is_some());
        slots.unregister(slot);
        assert_eq!(slots.register(waiter(8)), slot, "the slab reuses the index");
        assert_eq!(slots.complete(old.0, completion(99)), None);
        let new = slots.begin(slot);
        assert_ne!(new, old);
        assert_eq!(
            slots.complete(new.0, completion(3)),
            Some((waiter(8), completion(3)))
        );
    }

    #[test]
    fn a_multi_cqe_operation_keeps_its_slot_and_its_first_result() {
        let mut slots = Slots::new();
        let slot = slots.register(waiter(7));
        let key = slots.begin(slot);
        let more = Completion {
            res: 4096,
            flags: CQE_F_MORE,
        };
        assert_eq!(slots.complete(key.0, more), None);
        assert_eq!(slots.waiting(), 1);
        let notification = Completion { res: 0, flags: 8 };
        assert_eq!(
            slots.complete(key.0, notification),
            Some((
                waiter(7),
                Completion {
                    res: 4096,
                    flags: 8
                }
            ))
        );
        assert_eq!(slots.waiting(), 0);
    }

    #[test]
    #[should_panic(expected = "still in flight")]
    fn a_slot_with_an_operation_in_flight_is_not_given_back() {
        let mut slots = Slots::new();
        let slot = slots.register(waiter(7));
        slots.begin(slot);
        slots.unregister(slot);
    }

    /// Random CQE sequences (duplicates, strangers, tags, late ones): nothing is delivered twice or to the wrong waiter, and
    /// nothing panics.
    #[test]
    fn random_cqe_sequences_never_misdeliver() {
        for seed in 1..=200u64 {
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut next = move || {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random
            };
            let mut slots = Slots::new();
            let owned: Vec<u32> = (0..8).map(|n| slots.register(waiter(n + 1))).collect();
            let mut live: Vec<Option<(Key, Option<i32>)>> = vec![None; 8];
            let mut history: Vec<Key> = Vec::new();
            for _ in 0..1_000 {
                let which = (next() % 8) as usize;
                match next() % 4 {
                    0 if live[which].is_none() => {
                        let key = slots.begin(owned[which]);
                        assert!(!history.contains(&key), "seed {seed}: a key was reused");
                        history.push(key);
                        live[which] = Some((key, None));
                    }
                    1 => {
                        // A stranger: an old key, a tag, or noise.
                        let stray = match next() % 3 {
                            0 => TAG_TIMER + next() % 7,
                            1 => [next(), 0, u64::MAX][(next() % 3) as usize],
                            _ => history.get(which).map_or(0, |key| key.0),
                        };
                        if !live.iter().flatten().any(|(key, _)| key.0 == stray) {
                            assert_eq!(slots.complete(stray, completion(-1)), None, "seed {seed}");
                        }
                    }
                    _ => {
                        if let Some((key, first)) = live[which] {
                            let res = (next() % 1_000) as i32;
                            if next() % 3 == 0 {
                                let more = Completion {
                                    res,
                                    flags: CQE_F_MORE,
                                };
                                assert_eq!(slots.complete(key.0, more), None);
                                live[which] = Some((key, first.or(Some(res))));
                            } else {
                                let last = Completion {
                                    res,
                                    flags: if first.is_some() { CQE_F_NOTIF } else { 0 },
                                };
                                let (delivered, got) =
                                    slots.complete(key.0, last).expect("the last CQE");
                                assert_eq!(delivered, waiter(which + 1), "seed {seed}");
                                assert_eq!(got.res, first.unwrap_or(res), "seed {seed}");
                                live[which] = None;
                            }
                        }
                    }
                }
                assert_eq!(
                    slots.waiting(),
                    live.iter().flatten().count(),
                    "seed {seed}"
                );
            }
        }
    }
}
