//! The times at which slots want to be looked at, soonest first.
//!
//! A binary heap that knows where each slot's entry lies, so that a timer is taken out when its operation ends: with lazily
//! deleted entries a connection that receives with a timeout of a minute would leave a minute's worth of them behind. Setting a
//! time later than most, as a timeout is as a rule, moves nothing. It allocates only to grow.

/// No place in the heap.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Entry {
    at_ns: i64,
    slot: u32,
}

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Timers {
    heap: Vec<Entry>,
    /// For each slot where its entry is, or NONE.
    places: Vec<u32>,
}

impl Timers {
    /// Makes room for so many slots.
    pub(super) fn reserve(&mut self, slots: usize) {
        self.places.resize(slots.max(self.places.len()), NONE);
        self.heap.reserve(slots - self.heap.len());
    }

    /// The soonest time; `i64::MAX` where there is none.
    #[inline]
    pub(super) fn first_ns(&self) -> i64 {
        self.heap.first().map_or(i64::MAX, |entry| entry.at_ns)
    }

    /// The slot whose time is the soonest, if that is not after `now_ns`. Its entry stays.
    pub(super) fn due(&self, now_ns: i64) -> Option<u32> {
        let first = self.heap.first()?;
        (first.at_ns <= now_ns).then_some(first.slot)
    }

    /// Gives the slot this time instead of the one it had; `i64::MAX` for none.
    pub(super) fn set(&mut self, slot: u32, at_ns: i64) {
        if at_ns == i64::MAX {
            return self.remove(slot);
        }
        let slot_index = slot as usize;
        if slot_index >= self.places.len() {
            self.reserve(slot_index + 1);
        }
        let entry = Entry { at_ns, slot };
        let place = match self.places[slot_index] {
            NONE => {
                self.heap.push(entry);
                self.heap.len() - 1
            }
            place => place as usize,
        };
        self.settle(place, entry);
    }

    /// Takes the slot's time away, if it has one.
    #[inline]
    pub(super) fn remove(&mut self, slot: u32) {
        let Some(place) = self.places.get_mut(slot as usize) else {
            return;
        };
        let place = std::mem::replace(place, NONE);
        if place == NONE {
            return;
        }
        let last = self.heap.pop().expect("a place in the heap");
        if last.slot != slot {
            self.settle(place as usize, last);
        }
    }

    /// Puts the entry at `place`, or as far from there as the order asks for.
    fn settle(&mut self, mut place: usize, entry: Entry) {
        while place > 0 {
            let parent = (place - 1) / 2;
            if self.heap[parent].at_ns <= entry.at_ns {
                break;
            }
            self.put(place, self.heap[parent]);
            place = parent;
        }
        loop {
            let mut child = place * 2 + 1;
            if child >= self.heap.len() {
                break;
            }
            if child + 1 < self.heap.len() && self.heap[child + 1].at_ns < self.heap[child].at_ns {
                child += 1;
            }
            if self.heap[child].at_ns >= entry.at_ns {
                break;
            }
            self.put(place, self.heap[child]);
            place = child;
        }
        self.put(place, entry);
    }

    fn put(&mut self, place: usize, entry: Entry) {
        self.heap[place] = entry;
        self.places[entry.slot as usize] = place as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Against a map: random times are set, moved and taken away, and the soonest is always the map's.
    #[test]
    fn the_soonest_comes_first_whatever_is_set_and_removed() {
        for seed in 1..=50u64 {
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut next = move || {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random
            };
            let mut timers = Timers::default();
            let mut expected = BTreeMap::new();
            for _ in 0..2_000 {
                let slot = (next() % 64) as u32;
                match next() % 4 {
                    0 => {
                        timers.remove(slot);
                        expected.remove(&slot);
                    }
                    1 => {
                        let now_ns = (next() % 1_000) as i64;
                        while let Some(slot) = timers.due(now_ns) {
                            let at_ns = expected.remove(&slot).expect("a slot with a time");
                            assert!(at_ns <= now_ns, "seed {seed}");
                            timers.remove(slot);
                        }
                    }
                    _ => {
                        let at_ns = (next() % 1_000) as i64;
                        timers.set(slot, at_ns);
                        expected.insert(slot, at_ns);
                    }
                }
                let soonest = expected.values().min().copied().unwrap_or(i64::MAX);
                assert_eq!(timers.first_ns(), soonest, "seed {seed}");
            }
        }
    }
}
