//! Watches: readiness of a descriptor, told for as long as the watch lives.
//!
//! An operation that has to wait costs the kernel an arming and a disarming each time. A watch is one multishot POLL_ADD that
//! outlives calls: each event is one CQE, and whoever waits attaches to the watch rather than to an operation of its own. It
//! borrows no memory, but it holds the file: a descriptor that is closed while it is watched is not closed (its peer hears
//! nothing) until the watch has ended. Whoever begins a watch ends it before.
//!
//! ```text
//!            begin                  event (F_MORE): ends the wait that is attached, or is kept
//!  (none) ─────────▶ Armed ◀───────────────────────────────────────────┐
//!                      │ └─────────────────────────────────────────────┘
//!                      ├── last CQE (the CQ overflowed, no memory, …) ──▶ Ended ──── end ──▶ (none)
//!                      └── end: a cancel by key ──▶ Ending ──── last CQE ──────────────────▶ (none)
//! ```
//!
//! # What an event means
//!
//! The kernel posts an event at each wake-up of the file, with what the file is ready for at that moment, so events tell of
//! changes (like those of an edge-triggered epoll): what was there before an event was taken, and is still there afterwards, is
//! told by no other. Events that come together are one, which shows all that is there.

//!
//! # The second look
//!
//! A wait that begins although nobody has seen that there is nothing left (a short receive suggests it, no more) relies on the
//! next change. In case that is not to come, such a wait ends after one to two *looks*, 100 ms each, with [`SECOND_LOOK`] for
//! an event; whoever then finds nothing has seen it, and the next wait is for an event alone. Looks are there while such waits are.

use slab::Slab;

use super::slab::{CQE_F_MORE, Completion, Key, TAG_FIRST};

/// From here up to the tags, the lower half of a `user_data` is a watch's index, not a slot's.
pub(super) const WATCH_FIRST: u32 = 1 << 31;

/// Watches that a driver has memory for from the first on, so that they are begun without more of it.
const RESERVED: usize = 1024;

/// What ends a wait for want of an event: no event of poll(2) has this bit.
pub(crate) const SECOND_LOOK: u32 = 1 << 31;

/// Names a watch of one driver: its `user_data`. 0 names none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct WatchId(pub(crate) u64);

impl WatchId {
    fn index(self) -> usize {
        (self.0 as u32 & !WATCH_FIRST) as usize
    }
}

struct Watch {
    id: WatchId,
    /// The wait that the next event ends, or NONE.
    waiting: Key,
    /// What has been told since somebody took it, as poll(2) names it.
    events: u32,
    /// There has been no event since somebody saw that there was nothing.
    seen_empty: bool,
    /// The look in which the wait began.
    look: u32,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Armed,
    /// The last CQE has come unasked.
    Ended,
    Ending,
}

/// The watches of one driver.
#[derive(Default)]
pub(super) struct Watches {
    slab: Slab<Watch>,
    generation: u32,
    look: u32,
    /// Waits have begun that want a second look.
    wants_look: bool,
}

impl Watches {
    /// A watch that is about to be armed.
    pub(super) fn begin(&mut self) -> Option<WatchId> {
        if self.slab.capacity() == 0 {
            self.slab.reserve(RESERVED);
        }
        // Never 0 all in all: the lower half is not.
        self.generation = self.generation.wrapping_add(1);
        let index = self.slab.vacant_key();
        let low = u32::try_from(index).ok()?.checked_add(WATCH_FIRST)?;
        if low >= TAG_FIRST {
            return None;
        }
        let id = WatchId(u64::from(self.generation) << 32 | u64::from(low));
        self.slab.insert(Watch {
            id,
            waiting: Key::NONE,
            events: 0,
            // Arming looks.
            seen_empty: true,
            look: 0,
            phase: Phase::Armed,
        });
        Some(id)
    }

    #[inline(always)]
    fn get(&mut self, id: WatchId) -> Option<&mut Watch> {
        self.slab.get_mut(id.index()).filter(|watch| watch.id == id)
    }

    /// Nothing was submitted for it.
    pub(super) fn abandon(&mut self, id: WatchId) {
        if self.get(id).is_some() {
            self.slab.remove(id.index());
        }
    }

    /// Whether events still come.
    #[inline(always)]
    pub(super) fn is_armed(&mut self, id: WatchId) -> bool {
        self.get(id)
            .is_some_and(|watch| watch.phase == Phase::Armed)
    }

    /// What has been told since the last time.
    #[inline(always)]
    pub(super) fn take_events(&mut self, id: WatchId) -> u32 {
        self.get(id)
            .map_or(0, |watch| std::mem::take(&mut watch.events))
    }

    /// There are these events still.
    #[inline(always)]
    pub(super) fn keep_events(&mut self, id: WatchId, events: u32) {
        if let Some(watch) = self.get(id) {
            watch.events |= events;
        }
    }

    /// Lets the next event end the wait `key`. False if another one is attached.
    #[inline(always)]
    pub(super) fn attach(&mut self, id: WatchId, key: Key) -> bool {
        let look = self.look;
        match self.get(id) {
            Some(watch) if watch.waiting == Key::NONE => {
                watch.waiting = key;
                watch.look = look;
                if !watch.seen_empty {
                    self.wants_look = true;
                }
                true
            }
            _ => false,
        }
    }

    /// Somebody has seen that there is nothing.
    #[inline]
    pub(super) fn found_nothing(&mut self, id: WatchId) {
        if let Some(watch) = self.get(id) {
            watch.seen_empty = watch.events == 0;
        }
    }

    /// Whether a look is to come.
    #[inline(always)]
    pub(super) fn wants_look(&self) -> bool {
        self.wants_look
    }

    /// A look: the waits that are to end, having begun before the last one.
    pub(super) fn look(&mut self) -> Vec<Key> {
        let this = self.look;
        self.look = this.wrapping_add(1);
        self.wants_look = false;
        let mut due = Vec::new();
        for (_, watch) in &mut self.slab {
            if watch.waiting == Key::NONE || watch.seen_empty {
                continue;
            }
            if watch.look == this {
                self.wants_look = true;
            } else {
                watch.events |= SECOND_LOOK;
                due.push(std::mem::replace(&mut watch.waiting, Key::NONE));
            }
        }
        due
    }

    /// The wait has ended otherwise.
    pub(super) fn detach(&mut self, id: WatchId, key: Key) {
        if let Some(watch) = self.get(id)
            && watch.waiting == key
        {
            watch.waiting = Key::NONE;
        }
    }

    /// Whether a last CQE is to come.
    pub(super) fn begin_end(&mut self, id: WatchId) -> bool {
        match self.get(id) {
            Some(watch) if watch.phase == Phase::Armed => {
                watch.phase = Phase::Ending;
                true
            }
            Some(watch) if watch.phase == Phase::Ended => {
                self.slab.remove(id.index());
                false
            }
            Some(_) => true,
            None => false,
        }
    }

    /// Whether it is no more.
    pub(super) fn is_gone(&mut self, id: WatchId) -> bool {
        self.get(id).is_none()
    }

    /// Takes a CQE of a watch: the wait that it ends. (A CQE of a watch that is gone says nothing.)
    #[inline(always)]
    pub(super) fn complete(&mut self, user_data: u64, completion: Completion) -> Option<Key> {
        let watch = self.get(WatchId(user_data))?;
        if completion.flags & CQE_F_MORE == 0 {
            return self.ended(WatchId(user_data), completion);
        }
        let waiting = std::mem::replace(&mut watch.waiting, Key::NONE);
        watch.events |= completion.res as u32;
        watch.seen_empty = false;
        (waiting != Key::NONE).then_some(waiting)
    }

    #[cold]
    fn ended(&mut self, id: WatchId, completion: Completion) -> Option<Key> {
        let watch = self.get(id)?;
        let waiting = std::mem::replace(&mut watch.waiting, Key::NONE);
        if watch.phase == Phase::Ending {
            self.slab.remove(id.index());
        } else {
            watch.phase = Phase::Ended;
            // What else it would have told is not known: whoever looks looks at everything.
            let told = u32::try_from(completion.res).unwrap_or(0);
            watch.events |= told | libc::POLLIN as u32 | libc::POLLERR as u32;
        }
        (waiting != Key::NONE).then_some(waiting)
    }

    /// Those that are armed.
    pub(super) fn armed(&self) -> Vec<WatchId> {
        self.slab
            .iter()
            .filter(|(_, watch)| watch.phase == Phase::Armed)
            .map(|(_, watch)| watch.id)
            .collect()
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.slab.len()
    }

    /// Whether the kernel still has one.
    pub(super) fn any(&self) -> bool {
        self.slab
            .iter()
            .any(|(_, watch)| watch.phase != Phase::Ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(events: i16) -> Completion {
        Completion {
            res: i32::from(events),
            flags: CQE_F_MORE,
        }
    }

    fn last(res: i32) -> Completion {
        Completion { res, flags: 0 }
    }

    const IN: u32 = libc::POLLIN as u32;

    #[test]
    fn an_event_ends_the_wait_that_is_attached_and_is_kept_for_the_next_look() {
        let mut watches = Watches::default();
        let id = watches.begin().unwrap();
        assert_eq!(watches.complete(id.0, event(libc::POLLIN)), None);
        assert_eq!((watches.take_events(id), watches.take_events(id)), (IN, 0));
        let key = Key(1 << 32);
        assert!(watches.attach(id, key));
        assert!(!watches.attach(id, Key(2 << 32)), "one waits already");
        assert_eq!(watches.complete(id.0, event(libc::POLLIN)), Some(key));
        assert_eq!(watches.complete(id.0, event(libc::POLLRDHUP)), None);
        assert_eq!(watches.take_events(id), IN | libc::POLLRDHUP as u32);
    }

    #[test]
    fn a_watch_that_ends_by_itself_has_everything_looked_at() {
        let mut watches = Watches::default();
        let id = watches.begin().unwrap();
        let key = Key(1 << 32);
        assert!(watches.attach(id, key));
        assert_eq!(watches.complete(id.0, last(-libc::ENOMEM)), Some(key));
        assert!(!watches.is_armed(id));
        assert_eq!(watches.take_events(id), IN | libc::POLLERR as u32);
        assert!(!watches.begin_end(id), "no last CQE is to come");
        assert!(watches.is_gone(id));
    }

    #[test]
    fn a_wait_that_nobody_saw_a_need_for_ends_at_the_second_look() {
        let mut watches = Watches::default();
        let id = watches.begin().unwrap();
        let key = |n: u64| Key(n << 32);
        assert!(watches.attach(id, key(1)));
        assert!(!watches.wants_look(), "arming has looked");
        assert_eq!(watches.complete(id.0, event(libc::POLLIN)), Some(key(1)));
        assert_eq!(watches.take_events(id), IN);
        // A short receive, and on.
        assert!(watches.attach(id, key(2)) && watches.wants_look());
        assert_eq!(watches.look(), []);
        assert!(watches.wants_look(), "it has not waited for a whole look");
        assert_eq!(watches.look(), [key(2)]);
        assert_eq!(watches.take_events(id), SECOND_LOOK);
        watches.found_nothing(id);
        assert!(watches.attach(id, key(3)) && !watches.wants_look());
        assert_eq!((watches.look(), watches.look()), (vec![], vec![]));
        assert_eq!(watches.complete(id.0, event(libc::POLLIN)), Some(key(3)));
    }

    #[test]
    fn what_comes_late_never_hits_the_next_watch() {
        let mut watches = Watches::default();
        let old = watches.begin().unwrap();
        assert!(watches.begin_end(old));
        assert_eq!(watches.complete(old.0, event(libc::POLLIN)), None);
        assert!(!watches.is_gone(old) && watches.any());
        assert_eq!(watches.complete(old.0, last(-libc::ECANCELED)), None);
        assert!(watches.is_gone(old) && !watches.any());
        let new = watches.begin().unwrap();
        assert_eq!(new.index(), old.index(), "the slab reuses the index");
        assert_eq!(watches.complete(old.0, event(libc::POLLIN)), None);
        assert_eq!(watches.take_events(old), 0);
        assert!(!watches.attach(old, Key(1 << 32)));
        watches.detach(old, Key::NONE);
        assert!(watches.is_armed(new) && !watches.is_armed(old));
        assert_eq!(watches.take_events(new), 0);
        watches.abandon(new);
        assert!(watches.is_gone(new));
    }
}
