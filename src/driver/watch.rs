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
//!                      ├── last CQE (the CQ overflowed, no memory, …) ──▶ Ended ──── end, or what it told is taken ──▶ (none)
//!                      └── end, or unheard: a cancel by key ──▶ Ending ──── last CQE ──────────────────▶ (none)
//! ```
//!
//! # Nobody listens
//!
//! A socket may go on without its watch: on a plain thread, on another worker, beside a deadline; or its fiber has something else to
//! do. Each arrival would still wake the worker. So a watch of which nobody has wanted to know for [`UNHEARD_MAX`] events is ended, and
//! begins as the first did where receives wait for it again.
//!
//! # What an event means
//!
//! The kernel posts an event at each wake-up of the file, with what the file is ready for at that moment, so events tell of
//! changes (like those of an edge-triggered epoll): what was there before an event was taken, and is still there afterwards, is
//! told by no other. Events that come together are one, which shows all that is there.
//!
//! # Limits
//!
//! There is no operation that a timer could be linked to. But waits mostly end long before their time, and then a linked timer is
//! set and taken back for nothing: 550 ns of the kernel's each. So one timer serves all waits of a driver. It is set for the
//! soonest end of a wait that ever began, whether or not that wait is still under way when it fires; then those whose time has
//! come are ended, and it is set for the soonest of the others. A wait costs a look at the clock and a comparison. Ends
//! that are close together (1 ms) share one.
//!
//! # The second look
//!
//! A wait that begins although nobody has seen that there is nothing left (a short receive suggests it, no more) relies on the
//! next change. In case that is not to come, such a wait ends after one to two *looks*, 100 ms each, with [`SECOND_LOOK`] for
//! an event; whoever then finds nothing has seen it, and the next wait is for an event alone. Looks are there while such waits are.

use slab::Slab;

use super::slab::{CQE_F_MORE, Completion, Key, TAG_FIRST};
use crate::sys;

/// From here up to the tags, the lower half of a `user_data` is a watch's index, not a slot's.
pub(super) const WATCH_FIRST: u32 = 1 << 31;

/// Watches that a driver has memory for from the first on, so that they are begun without more of it.
const RESERVED: usize = 1024;

/// What ends a wait for want of an event: no event of poll(2) has this bit.
pub(crate) const SECOND_LOOK: u32 = 1 << 30;

/// So many events in a row that nobody asks for, and the watch is ended.
const UNHEARD_MAX: u8 = 64;

/// The least time between two checks for waits whose time is over.
const CHECK_PAUSE_NS: i64 = 1_000_000;

/// How long the waits of one call may take, all together.
pub(crate) struct Limit {
    timeout_ns: i64,
    /// 0 before the first wait. Most calls do not wait.
    end_ns: i64,
}

impl Limit {
    /// As long as it takes.
    #[inline(always)]
    pub(crate) fn none() -> Limit {
        Limit::of(-1)
    }

    /// So many nanoseconds from the first wait on; below 0: as long as it takes.
    #[inline(always)]
    pub(crate) fn of(timeout_ns: i64) -> Limit {
        Limit {
            timeout_ns,
            end_ns: 0,
        }
    }

    #[inline(always)]
    fn end_ns(&mut self) -> i64 {
        if self.timeout_ns < 0 {
            return i64::MAX;
        }
        if self.end_ns == 0 {
            self.end_ns = sys::monotonic_ns().saturating_add(self.timeout_ns);
        }
        self.end_ns
    }

    /// What is left, as a timeout: below 0 as long as it takes, 1 at the least.
    pub(crate) fn left_ns(&self) -> i64 {
        if self.end_ns == 0 {
            return self.timeout_ns;
        }
        (self.end_ns - sys::monotonic_ns()).max(1)
    }
}

/// What somebody learns who wants to wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Told {
    /// This has been told already.
    Events(u32),
    /// The wait that the next event ends, with the events as its result.
    Waits(Key),
    /// The watch has ended, or another one waits.
    Unwatched,
}

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
    /// Events since then that found others there already.
    unheard: u8,
    /// There has been no event since somebody saw that there was nothing.
    seen_empty: bool,
    /// The look in which the wait began.
    look: u32,
    /// When the wait is to end.
    end_ns: i64,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Armed,
    /// The last CQE has come unasked.
    Ended,
    Ending,
}

impl Watch {
    /// Gives the events to who waits for them.
    #[inline(always)]
    fn hand_over(&mut self) -> Option<(Key, u32)> {
        if self.waiting == Key::NONE {
            return None;
        }
        let waiting = std::mem::replace(&mut self.waiting, Key::NONE);
        Some((waiting, std::mem::take(&mut self.events)))
    }
}

/// The watches of one driver.
pub(super) struct Watches {
    slab: Slab<Watch>,
    generation: u32,
    look: u32,
    /// Waits have begun that want a second look.
    wants_look: bool,
    /// No wait is to end before.
    soonest_ns: i64,
}

impl Watches {
    /// With memory for [`RESERVED`] of them, where there will be any: a receive may begin one at any time.
    pub(super) fn new(is_used: bool) -> Watches {
        Watches {
            slab: Slab::with_capacity(if is_used { RESERVED } else { 0 }),
            generation: 0,
            look: 0,
            wants_look: false,
            soonest_ns: i64::MAX,
        }
    }

    /// A watch that is about to be armed.
    pub(super) fn begin(&mut self) -> Option<WatchId> {
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
            unheard: 0,
            // Arming looks.
            seen_empty: true,
            look: 0,
            end_ns: i64::MAX,
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

    /// There are these events still.
    #[inline]
    pub(super) fn keep_events(&mut self, id: WatchId, events: u32) {
        if let Some(watch) = self.get(id) {
            watch.events |= events;
        }
    }

    /// What has been told, or else a wait, which `begin` names, for the next event or the end of `limit`.
    #[inline(always)]
    pub(super) fn events_or_wait(
        &mut self,
        id: WatchId,
        limit: &mut Limit,
        begin: impl FnOnce() -> Key,
    ) -> Told {
        let look = self.look;
        let Some(watch) = self.get(id) else {
            return Told::Unwatched;
        };
        if watch.events != 0 {
            watch.unheard = 0;
            return Told::Events(std::mem::take(&mut watch.events));
        }
        if watch.phase != Phase::Armed || watch.waiting != Key::NONE {
            return Told::Unwatched;
        }
        let key = begin();
        watch.waiting = key;
        watch.look = look;
        let end_ns = limit.end_ns();
        watch.end_ns = end_ns;
        self.wants_look |= !watch.seen_empty;
        self.soonest_ns = self.soonest_ns.min(end_ns);
        Told::Waits(key)
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
                due.push(std::mem::replace(&mut watch.waiting, Key::NONE));
            }
        }
        due
    }

    /// When to check for waits whose time is over; `i64::MAX` for never.
    #[inline(always)]
    pub(super) fn soonest_ns(&self) -> i64 {
        self.soonest_ns
    }

    /// The waits whose time is over, and whether somebody has seen that there is nothing.
    pub(super) fn check(&mut self, now_ns: i64) -> Vec<(Key, bool)> {
        self.soonest_ns = i64::MAX;
        let mut over = Vec::new();
        for (_, watch) in &mut self.slab {
            if watch.waiting == Key::NONE {
                continue;
            }
            if watch.end_ns <= now_ns {
                let key = std::mem::replace(&mut watch.waiting, Key::NONE);
                over.push((key, watch.seen_empty));
            } else {
                self.soonest_ns = self.soonest_ns.min(watch.end_ns);
            }
        }
        // Then so are those whose time is over soon.
        self.soonest_ns = self.soonest_ns.max(now_ns + CHECK_PAUSE_NS);
        over
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

    /// Whether the kernel has ended it, and all that it told has been taken: nothing more comes of it. Then it is no more.
    pub(super) fn forget_if_over(&mut self, id: WatchId) -> bool {
        match self.get(id) {
            Some(watch) if watch.phase == Phase::Ended && watch.events == 0 => {
                self.slab.remove(id.index());
                true
            }
            watch => watch.is_none(),
        }
    }

    /// Whether it is no more.
    pub(super) fn is_gone(&mut self, id: WatchId) -> bool {
        self.get(id).is_none()
    }

    /// Takes a CQE of a watch: the wait that it ends, and what it tells. (A CQE of a watch that is gone says nothing.)
    #[inline(always)]
    pub(super) fn complete(
        &mut self,
        user_data: u64,
        completion: Completion,
    ) -> Option<(Key, u32)> {
        let watch = self.get(WatchId(user_data))?;
        if completion.flags & CQE_F_MORE == 0 {
            return self.ended(WatchId(user_data), completion);
        }
        watch.seen_empty = false;
        if watch.events != 0 {
            watch.unheard = watch.unheard.saturating_add(1);
        }
        watch.events |= completion.res as u32;
        watch.hand_over()
    }

    /// Whether nobody has wanted to know for long what the watch tells. Then it is about to be ended.
    #[inline(always)]
    pub(super) fn begin_end_if_unheard(&mut self, id: WatchId) -> bool {
        match self.get(id) {
            Some(watch) if watch.unheard >= UNHEARD_MAX && watch.phase == Phase::Armed => {
                watch.phase = Phase::Ending;
                true
            }
            _ => false,
        }
    }

    /// It could not be ended: at its next event again.
    #[cold]
    pub(super) fn go_on(&mut self, id: WatchId) {
        if let Some(watch) = self.get(id) {
            watch.phase = Phase::Armed;
        }
    }

    /// The wait that the watch's next event ends, if there is one.
    #[inline(always)]
    pub(super) fn waiting(&mut self, id: WatchId) -> Option<Key> {
        let waiting = self.get(id)?.waiting;
        (waiting != Key::NONE).then_some(waiting)
    }

    #[cold]
    fn ended(&mut self, id: WatchId, completion: Completion) -> Option<(Key, u32)> {
        let watch = self.get(id)?;
        // What else it would have told is not known: whoever looks looks at everything.
        let told = u32::try_from(completion.res).unwrap_or(0);
        watch.events |= told | libc::POLLIN as u32 | libc::POLLERR as u32;
        let waiting = watch.hand_over();
        if watch.phase == Phase::Ending {
            self.slab.remove(id.index());
        } else {
            watch.phase = Phase::Ended;
        }
        waiting
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

    fn wait(watches: &mut Watches, id: WatchId, n: u64) -> Told {
        watches.events_or_wait(id, &mut Limit::none(), || Key(n << 32))
    }

    fn take_events(watches: &mut Watches, id: WatchId) -> u32 {
        match wait(watches, id, 99) {
            Told::Events(events) => events,
            Told::Waits(key) => {
                watches.detach(id, key);
                0
            }
            Told::Unwatched => 0,
        }
    }

    #[test]
    fn an_event_goes_to_who_waits_or_is_kept_for_the_next_look() {
        let mut watches = Watches::new(true);
        let id = watches.begin().unwrap();
        assert_eq!(watches.complete(id.0, event(libc::POLLIN)), None);
        assert_eq!(wait(&mut watches, id, 1), Told::Events(IN));
        let key = Key(1 << 32);
        assert_eq!(wait(&mut watches, id, 1), Told::Waits(key));
        assert_eq!(wait(&mut watches, id, 2), Told::Unwatched, "one waits");
        assert_eq!(watches.complete(id.0, event(libc::POLLIN)), Some((key, IN)));
        assert_eq!(watches.complete(id.0, event(libc::POLLRDHUP)), None);
        watches.keep_events(id, IN);
        assert_eq!(take_events(&mut watches, id), IN | libc::POLLRDHUP as u32);
        assert_eq!(wait(&mut watches, id, 3), Told::Waits(Key(3 << 32)));
        watches.detach(id, Key(3 << 32));
        assert_eq!(wait(&mut watches, id, 4), Told::Waits(Key(4 << 32)));
    }

    #[test]
    fn a_watch_that_ends_by_itself_has_everything_looked_at() {
        let mut watches = Watches::new(true);
        let id = watches.begin().unwrap();
        let Told::Waits(key) = wait(&mut watches, id, 1) else {
            panic!("it does not wait");
        };
        let everything = IN | libc::POLLERR as u32;
        let ended = last(-libc::ENOMEM);
        assert_eq!(watches.complete(id.0, ended), Some((key, everything)));
        assert_eq!(wait(&mut watches, id, 2), Told::Unwatched);
        assert!(!watches.begin_end(id), "no last CQE is to come");
        assert!(watches.is_gone(id));
    }

    #[test]
    fn a_watch_that_ended_by_itself_is_forgotten_once_its_last_events_are_taken() {
        let mut watches = Watches::new(true);
        let id = watches.begin().unwrap();
        assert!(!watches.forget_if_over(id), "it is armed");
        // The queue was full: the event bears no F_MORE.
        assert_eq!(watches.complete(id.0, last(i32::from(libc::POLLIN))), None);
        assert!(!watches.forget_if_over(id), "somebody has to look");
        assert_eq!(take_events(&mut watches, id), IN | libc::POLLERR as u32);
        assert!(watches.forget_if_over(id));
        assert!(watches.is_gone(id) && watches.forget_if_over(id));
        let next = watches.begin().unwrap();
        assert!(!watches.forget_if_over(next) && watches.forget_if_over(id));
        assert!(watches.begin_end(next));
        assert!(!watches.forget_if_over(next), "its last CQE is to come");
    }

    #[test]
    fn a_wait_that_nobody_saw_a_need_for_ends_at_the_second_look() {
        let mut watches = Watches::new(true);
        let id = watches.begin().unwrap();
        let key = |n: u64| Key(n << 32);
        assert_eq!(wait(&mut watches, id, 1), Told::Waits(key(1)));
        assert!(!watches.wants_look(), "arming has looked");
        let told = watches.complete(id.0, event(libc::POLLIN));
        assert_eq!(told, Some((key(1), IN)));
        // A short receive, and on.
        assert_eq!(wait(&mut watches, id, 2), Told::Waits(key(2)));
        assert!(watches.wants_look());
        assert_eq!(watches.look(), []);
        assert!(watches.wants_look(), "it has not waited for a whole look");
        assert_eq!(watches.look(), [key(2)]);
        watches.found_nothing(id);
        assert_eq!(wait(&mut watches, id, 3), Told::Waits(key(3)));
        assert!(!watches.wants_look());
        assert_eq!((watches.look(), watches.look()), (vec![], vec![]));
        let told = watches.complete(id.0, event(libc::POLLIN));
        assert_eq!(told, Some((key(3), IN)));
    }

    #[test]
    fn a_check_ends_the_waits_whose_time_is_over_and_says_when_to_check_again() {
        let mut watches = Watches::new(true);
        let ids = [(); 3].map(|()| watches.begin().unwrap());
        let key = |n: u64| Key(n << 32);
        let start_ns = sys::monotonic_ns();
        assert_eq!(watches.soonest_ns(), i64::MAX);
        let far_ns = 60_000_000_000;
        for (n, timeout_ns) in [(0, far_ns), (1, far_ns / 2), (2, -1)] {
            let mut limit = Limit::of(timeout_ns);
            let told = watches.events_or_wait(ids[n], &mut limit, || key(n as u64));
            assert_eq!(told, Told::Waits(key(n as u64)));
        }
        let soonest_ns = watches.soonest_ns();
        assert!((start_ns + far_ns / 2..start_ns + far_ns).contains(&soonest_ns));
        assert_eq!(watches.check(soonest_ns), [(key(1), true)]);
        assert!(watches.soonest_ns() >= start_ns + far_ns);
        // That one's wait ends by an event, and what is left has no limit.
        assert!(watches.complete(ids[0].0, event(libc::POLLIN)).is_some());
        assert_eq!(watches.check(watches.soonest_ns()), []);
        assert_eq!(watches.soonest_ns(), i64::MAX);
        // The waits of one call end together, and one that relies on a short receive has another look.
        let mut limit = Limit::of(1_000_000);
        let told = watches.events_or_wait(ids[0], &mut limit, || key(4));
        assert_eq!(told, Told::Waits(key(4)));
        let end_ns = watches.soonest_ns();
        assert_eq!(watches.check(end_ns), [(key(4), false)]);
        watches.found_nothing(ids[0]);
        let told = watches.events_or_wait(ids[0], &mut limit, || key(5));
        assert_eq!(told, Told::Waits(key(5)));
        assert_eq!(watches.soonest_ns(), end_ns);
    }

    #[test]
    fn a_watch_nobody_listens_to_is_ended() {
        let mut watches = Watches::new(true);
        let id = watches.begin().unwrap();
        for _ in 0..2 {
            for _ in 0..UNHEARD_MAX {
                assert_eq!(watches.complete(id.0, event(libc::POLLIN)), None);
                assert!(!watches.begin_end_if_unheard(id));
            }
            assert_eq!(take_events(&mut watches, id), IN, "somebody listens");
        }
        for _ in 0..=UNHEARD_MAX {
            assert_eq!(watches.complete(id.0, event(libc::POLLIN)), None);
        }
        assert!(watches.begin_end_if_unheard(id));
        watches.go_on(id);
        assert!(watches.begin_end_if_unheard(id), "it was put off");
        assert_eq!(take_events(&mut watches, id), IN);
        assert_eq!(wait(&mut watches, id, 1), Told::Unwatched);
        assert_eq!(watches.complete(id.0, last(-libc::ECANCELED)), None);
        assert!(watches.is_gone(id));
    }

    #[test]
    fn what_comes_late_never_hits_the_next_watch() {
        let mut watches = Watches::new(true);
        let old = watches.begin().unwrap();
        assert!(watches.begin_end(old));
        assert_eq!(watches.complete(old.0, event(libc::POLLIN)), None);
        assert!(!watches.is_gone(old) && watches.any());
        assert_eq!(watches.complete(old.0, last(-libc::ECANCELED)), None);
        assert!(watches.is_gone(old) && !watches.any());
        let new = watches.begin().unwrap();
        assert_eq!(new.index(), old.index(), "the slab reuses the index");
        assert_eq!(watches.complete(old.0, event(libc::POLLIN)), None);
        assert_eq!(take_events(&mut watches, old), 0);
        assert_eq!(wait(&mut watches, old, 1), Told::Unwatched);
        watches.detach(old, Key::NONE);
        assert_eq!(take_events(&mut watches, new), 0);
        assert_eq!(watches.count(), 1);
        watches.abandon(new);
        assert!(watches.is_gone(new));
    }
}
