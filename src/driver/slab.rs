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
//! # A result first, the memory later
//!
//! The waiter of a zero-copy send gets the result, and goes on, while the kernel still reads the memory. Such an operation is
//! *detached*; its memory is kept by the layer above, under its key, until [`take_released`](Slots::take_released) names that. Whether a
//! notification will come is said by the result's F_MORE and by nothing else: after errors and cancels it mostly does, too.
//!
//! ```text
//!              detach           result, F_MORE set                    notification
//!   waiting ──────────▶ Awaited ──────────────────▶ Draining ─────────────────────────▶ released
//!                        │   │                      (slot idle, its waiter runs)
//!                        │   │ result, F_MORE clear (the ordinary way): attach ──▶ forgotten, nothing will come
//!                        │   ▼
//!                        │  idle
//!                        │ notification before the result: kept as Notified; the result then goes without F_MORE
//!                        └──▶ Notified
//! ```
//!
//! It stores an opaque waiter and knows neither fibers nor rings.

use std::num::NonZeroUsize;

use slab::Slab;

use super::watch::WATCH_FIRST;

/// `IORING_CQE_F_MORE`: more CQEs of the same operation will come.
pub(crate) const CQE_F_MORE: u32 = 1 << 1;

/// `IORING_CQE_F_NOTIF`: the last CQE of a zero-copy send, which says only that the memory is free again.
const CQE_F_NOTIF: u32 = 1 << 3;

/// What became of the memory of a detached operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Detached {
    Awaited,
    /// The notification came first.
    Notified,
    /// The result was delivered, the notification will come.
    Draining,
}

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
/// It is time for a look at the waits for events.
pub(crate) const TAG_LOOK: u64 = TAG_FIRST as u64 + 7;
/// It is time to end waits for events whose time is over.
pub(crate) const TAG_CHECK: u64 = TAG_FIRST as u64 + 8;
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
    /// Operations whose memory the kernel may keep beyond their result. Mostly empty.
    detached: Vec<(Key, Detached)>,
    /// Of these, those whose memory is free again, with their notification's `res`.
    released: Vec<(Key, i32)>,
}

impl Slots {
    pub(crate) fn new() -> Slots {
        Slots {
            slab: Slab::new(),
            generation: GENERATION_ONE,
            waiting: 0,
            unknown: 0,
            draining: Vec::new(),
            detached: Vec::new(),
            released: Vec::new(),
        }
    }

    /// Says that the operation, which is under way, is a zero-copy send: its result is delivered while its memory is still the kernel's.
    pub(crate) fn detach(&mut self, key: Key) {
        debug_assert!(self.is_waiting(key));
        self.detached.push((key, Detached::Awaited));
    }

    /// Forgets a [`detach`](Slots::detach) whose result came without F_MORE.
    pub(crate) fn attach(&mut self, key: Key) {
        self.detached.retain(|(other, _)| *other != key);
    }

    /// An operation whose memory is free again, and its notification's `res`.
    #[inline]
    pub(crate) fn take_released(&mut self) -> Option<(Key, i32)> {
        self.released.pop()
    }

    /// Gives `waiter` a slot for as long as it lives.
    pub(crate) fn register(&mut self, waiter: Waiter) -> u32 {
        let index = self.slab.insert(Slot {
            waiter,
            key: Key::NONE,
        });
        u32::try_from(index)
            .ok()
            .filter(|index| *index < WATCH_FIRST)
            .expect("fewer than 2^31 waiters")
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
        let waiter = self.end_wait(key);
        debug_assert!(waiter.is_some(), "an operation that never began");
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

    /// Ends the wait `key`, unless it has ended otherwise: its waiter.
    #[inline(always)]
    pub(crate) fn end_wait(&mut self, key: Key) -> Option<Waiter> {
        let slot = self.slab.get_mut(key.index())?;
        if slot.key != key {
            return None;
        }
        slot.key = Key::NONE;
        self.waiting -= 1;
        Some(slot.waiter)
    }

    /// CQEs of operations with several, and those nobody waits for.
    #[cold]
    #[inline(never)]
    fn complete_rest(&mut self, key: Key, completion: Completion) -> Option<(Waiter, Completion)> {
        if let Some(place) = self.detached.iter().position(|(other, _)| *other == key) {
            return self.complete_detached(place, completion);
        }
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

    /// A CQE of a detached operation, other than a result that is its only one.
    fn complete_detached(
        &mut self,
        place: usize,
        mut completion: Completion,
    ) -> Option<(Waiter, Completion)> {
        let (key, state) = self.detached[place];
        let is_notification = completion.flags & CQE_F_NOTIF != 0;
        match (state, is_notification) {
            (Detached::Draining, true) => {
                self.detached.swap_remove(place);
                self.released.push((key, completion.res));
                None
            }
            (Detached::Awaited, true) => {
                self.detached[place].1 = Detached::Notified;
                None
            }
            (Detached::Awaited | Detached::Notified, false) => {
                if state == Detached::Notified {
                    completion.flags &= !CQE_F_MORE;
                } else {
                    self.detached[place].1 = Detached::Draining;
                }
                let slot = &mut self.slab[key.index()];
                slot.key = Key::NONE;
                self.waiting -= 1;
                Some((slot.waiter, completion))
            }
            (Detached::Notified, true) | (Detached::Draining, false) => {
                self.unknown += 1;
                None
            }
        }
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
                            0 => TAG_TIMER + next() % 8,
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

    /// A zero-copy send: `(res, flags)` of its CQEs in order, what its waiter gets at which of them, and whether its memory is released.
    fn zero_copy(cqes: &[(i32, u32)]) -> (Option<(usize, Completion)>, Option<i32>, u64) {
        let mut slots = Slots::new();
        let slot = slots.register(waiter(7));
        let key = slots.begin(slot);
        slots.detach(key);
        let mut delivered = None;
        for (n, &(res, flags)) in cqes.iter().enumerate() {
            if let Some((_, completion)) = slots.complete(key.0, Completion { res, flags }) {
                assert_eq!(delivered, None, "once");
                delivered = Some((n, completion));
                if completion.flags & CQE_F_MORE == 0 {
                    slots.attach(key);
                }
            }
        }
        let released = slots.take_released();
        assert!(released.is_none_or(|(other, _)| other == key));
        assert_eq!(slots.take_released(), None, "once");
        assert!(slots.detached.is_empty() || released.is_none());
        (delivered, released.map(|(_, res)| res), slots.unknown())
    }

    #[test]
    fn the_waiter_of_a_zero_copy_send_goes_on_before_its_memory_is_released() {
        let flags = |res, flags| Some((0, Completion { res, flags }));
        let (more, notif) = (CQE_F_MORE, CQE_F_NOTIF);
        // The ordinary way, then an error and a cancel that are notified.
        assert_eq!(
            zero_copy(&[(5, more), (0, notif)]),
            (flags(5, more), Some(0), 0)
        );
        assert_eq!(
            zero_copy(&[(5, more), (i32::MIN, notif)]),
            (flags(5, more), Some(i32::MIN), 0)
        );
        assert_eq!(
            zero_copy(&[(-libc::ECANCELED, more), (0, notif)]),
            (flags(-libc::ECANCELED, more), Some(0), 0)
        );
        // The notification is still to come.
        assert_eq!(zero_copy(&[(5, more)]), (flags(5, more), None, 0));
        // None will come.
        assert_eq!(
            zero_copy(&[(-libc::EPIPE, 0)]),
            (flags(-libc::EPIPE, 0), None, 0)
        );
    }

    #[test]
    fn zero_copy_cqes_out_of_order_or_twice_release_no_memory_twice() {
        let (more, notif) = (CQE_F_MORE, CQE_F_NOTIF);
        // First the notification, then the result: as if none were to come.
        assert_eq!(
            zero_copy(&[(0, notif), (5, more)]),
            (Some((1, Completion { res: 5, flags: 0 })), None, 0)
        );
        assert_eq!(zero_copy(&[(0, notif), (5, more), (0, notif)]).2, 1);
        assert_eq!(zero_copy(&[(0, notif), (0, notif), (5, more)]).2, 1);
        assert_eq!(
            zero_copy(&[(5, more), (5, more), (0, notif), (0, notif)]),
            (
                Some((
                    0,
                    Completion {
                        res: 5,
                        flags: more
                    }
                )),
                Some(0),
                2
            )
        );
    }

    #[test]
    fn a_notification_is_not_the_slots_next_operations() {
        let mut slots = Slots::new();
        let slot = slots.register(waiter(7));
        let send = slots.begin(slot);
        slots.detach(send);
        let sent = Completion {
            res: 5,
            flags: CQE_F_MORE,
        };
        assert!(slots.complete(send.0, sent).is_some());
        let next = slots.begin(slot);
        let notification = Completion {
            res: 0,
            flags: CQE_F_NOTIF,
        };
        assert_eq!(slots.complete(send.0, notification), None);
        assert!(slots.is_waiting(next));
        assert_eq!(slots.take_released(), Some((send, 0)));
    }
}
