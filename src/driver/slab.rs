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

use slab::Slab;

/// `IORING_CQE_F_MORE`: more CQEs of the same operation will come.
pub(crate) const CQE_F_MORE: u32 = 1 << 1;

/// Slot indices from here up are not slots: they tag CQEs nobody waits for.
pub(crate) const TAG_FIRST: u32 = u32::MAX - 15;

/// A linked or bare timer whose verdict nobody reads.
pub(crate) const TAG_TIMER: u64 = TAG_FIRST as u64;
/// A cancel request's own CQE.
pub(crate) const TAG_CANCEL: u64 = TAG_FIRST as u64 + 1;
/// Somebody rang: by the eventfd, or by a message from another ring.
pub(crate) const TAG_WAKE: u64 = TAG_FIRST as u64 + 2;
/// What became of a message to another ring; the upper half says which.
pub(crate) const TAG_MESSAGE: u64 = TAG_FIRST as u64 + 3;
/// The poll of the wake-up eventfd.
pub(crate) const TAG_EVENTFD: u64 = TAG_FIRST as u64 + 4;

/// Names one operation of one slot. Zero is no key.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub(crate) struct Key(pub(crate) u64);

impl Key {
    /// The key no operation has.
    pub(crate) const NONE: Key = Key(0);

    fn new(index: usize, generation: u32) -> Key {
        Key(u64::from(generation) << 32 | index as u64)
    }

    fn index(self) -> usize {
        (self.0 & 0xffff_ffff) as usize
    }

    fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// What one operation came to: `res` as in the CQE (0 or more, or a negative errno) and the CQE's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Completion {
    pub(crate) res: i32,
    pub(crate) flags: u32,
}

/// What the layer above stores in a slot to find its waiter again.
pub(crate) type Waiter = usize;

struct Slot {
    waiter: Waiter,
    generation: u32,
    state: SlotState,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum SlotState {
    Idle,
    Waiting,
    /// The first CQE came and announced more: its result is the operation's.
    Draining(i32),
}

/// The slots of one driver.
pub(crate) struct Slots {
    slab: Slab<Slot>,
    generation: u32,
    waiting: usize,
    unknown: u64,
}

impl Slots {
    pub(crate) fn new() -> Slots {
        Slots {
            slab: Slab::new(),
            generation: 0,
            waiting: 0,
            unknown: 0,
        }
    }

    /// Gives `waiter` a slot for as long as it lives.
    pub(crate) fn register(&mut self, waiter: Waiter) -> u32 {
        let index = self.slab.insert(Slot {
            waiter,
            generation: 0,
            state: SlotState::Idle,
        });
        u32::try_from(index)
            .ok()
            .filter(|index| *index < TAG_FIRST)
            .expect("fewer than 2^32 - 16 waiters")
    }

    /// Takes the slot back. The waiter must have no operation in flight: the kernel would complete into nothing.
    pub(crate) fn unregister(&mut self, slot: u32) {
        let slot = self.slab.remove(slot as usize);
        assert_eq!(slot.state, SlotState::Idle, "an operation is still in flight");
    }

    /// Starts an operation (or a wait for a wake) on the slot and names it.
    #[inline]
    pub(crate) fn begin(&mut self, slot: u32) -> Key {
        // Generation 0 would make slot 0's key the NONE key.
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        let generation = self.generation;
        let entry = &mut self.slab[slot as usize];
        debug_assert_eq!(entry.state, SlotState::Idle, "one operation at a time");
        entry.generation = generation;
        entry.state = SlotState::Waiting;
        self.waiting += 1;
        Key::new(slot as usize, generation)
    }

    /// Takes back a [`begin`](Slots::begin) nothing was submitted for.
    pub(crate) fn abandon(&mut self, key: Key) {
        let finished = self.complete(key.0, Completion { res: 0, flags: 0 });
        debug_assert!(finished.is_some(), "an operation that never began");
    }

    /// Whether the operation is still awaited.
    pub(crate) fn is_waiting(&self, key: Key) -> bool {
        self.slab.get(key.index()).is_some_and(|slot| {
            slot.generation == key.generation() && slot.state != SlotState::Idle
        })
    }

    /// Delivers a CQE: the waiter and its result at the last CQE of the operation, `None` before that and for a CQE that
    /// nobody waits for.
    #[inline]
    pub(crate) fn complete(
        &mut self,
        user_data: u64,
        completion: Completion,
    ) -> Option<(Waiter, Completion)> {
        let key = Key(user_data);
        match self.slab.get_mut(key.index()) {
            Some(slot) if slot.generation == key.generation() && slot.state == SlotState::Waiting => {
                if completion.flags & CQE_F_MORE != 0 {
                    slot.state = SlotState::Draining(completion.res);
                    return None;
                }
                slot.state = SlotState::Idle;
                self.waiting -= 1;
                Some((slot.waiter, completion))
            }
            _ => self.complete_rest(key, completion),
        }
    }

    #[cold]
    fn complete_rest(&mut self, key: Key, completion: Completion) -> Option<(Waiter, Completion)> {
        if let Some(slot) = self.slab.get_mut(key.index())
            && slot.generation == key.generation()
            && let SlotState::Draining(res) = slot.state
        {
            if completion.flags & CQE_F_MORE != 0 {
                return None;
            }
            slot.state = SlotState::Idle;
            self.waiting -= 1;
            return Some((
                slot.waiter,
                Completion {
                    res,
                    flags: completion.flags,
                },
            ));
        }
        self.unknown += 1;
        None
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
        self.is_waiting(key)
            .then(|| self.slab[key.index()].waiter)
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

    fn completion(res: i32) -> Completion {
        Completion { res, flags: 0 }
    }

    #[test]
    fn a_completion_reaches_its_waiter_once() {
        let mut slots = Slots::new();
        let slot = slots.register(7);
        let key = slots.begin(slot);
        assert!(slots.is_waiting(key));
        assert_eq!(slots.complete(key.0, completion(5)), Some((7, completion(5))));
        assert_eq!(slots.complete(key.0, completion(5)), None, "a duplicate CQE");
        assert_eq!(slots.unknown(), 1);
        assert_eq!(slots.waiting(), 0);
    }

    #[test]
    fn a_late_cqe_never_hits_the_slots_next_operation() {
        let mut slots = Slots::new();
        let slot = slots.register(7);
        let old = slots.begin(slot);
        assert!(slots.complete(old.0, completion(1)).is_some());
        let new = slots.begin(slot);
        assert_eq!(slots.complete(old.0, completion(99)), None);
        assert_eq!(slots.complete(new.0, completion(2)), Some((7, completion(2))));
        assert_eq!(slots.unknown(), 1);
    }

    #[test]
    fn a_late_cqe_never_hits_a_slots_next_owner() {
        let mut slots = Slots::new();
        let slot = slots.register(7);
        let old = slots.begin(slot);
        assert!(slots.complete(old.0, completion(1)).is_some());
        slots.unregister(slot);
        assert_eq!(slots.register(8), slot, "the slab reuses the index");
        assert_eq!(slots.complete(old.0, completion(99)), None);
        let new = slots.begin(slot);
        assert_ne!(new, old);
        assert_eq!(slots.complete(new.0, completion(3)), Some((8, completion(3))));
    }

    #[test]
    fn a_multi_cqe_operation_keeps_its_slot_and_its_first_result() {
        let mut slots = Slots::new();
        let slot = slots.register(7);
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
            Some((7, Completion { res: 4096, flags: 8 }))
        );
        assert_eq!(slots.waiting(), 0);
    }

    #[test]
    #[should_panic(expected = "still in flight")]
    fn a_slot_with_an_operation_in_flight_is_not_given_back() {
        let mut slots = Slots::new();
        let slot = slots.register(7);
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
            let owned: Vec<u32> = (0..8).map(|waiter| slots.register(waiter)).collect();
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
                            0 => TAG_TIMER + next() % 5,
                            1 => next(),
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
                                let more = Completion { res, flags: CQE_F_MORE };
                                assert_eq!(slots.complete(key.0, more), None);
                                live[which] = Some((key, first.or(Some(res))));
                            } else {
                                let (waiter, got) =
                                    slots.complete(key.0, completion(res)).expect("the last CQE");
                                assert_eq!(waiter, which, "seed {seed}");
                                assert_eq!(got.res, first.unwrap_or(res), "seed {seed}");
                                live[which] = None;
                            }
                        }
                    }
                }
                assert_eq!(slots.waiting(), live.iter().flatten().count(), "seed {seed}");
            }
        }
    }
}
