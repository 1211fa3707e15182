//! Sends without a copy: the buffers that the kernel still reads after the send has returned, and their registration.
//!
//! A borrowed slice must not be sent this way: the caller may write into it as soon as the call returns. So the buffer is given away, and
//! its worker keeps a part of it, a [`Pin`], under the operation's key:
//!
//! ```text
//!   send ──▶ within the caps? ──no──▶ (the caller sends it by copying)
//!              │ yes: Pin in the worker's table, operation on the ring
//!              ▼
//!           result ──F_MORE clear──▶ Pin dropped, the buffer goes home
//!              │ F_MORE set: the fiber goes on, with the result; the Pin stays
//!              ▼
//!           notification: Pin dropped, the buffer goes home; copied? ──▶ the route learns
//!              ▲
//!   shutdown ──┴─ waits for it as long as its grace; what is left is leaked, counted and logged, never freed
//! ```
//!
//! - The memory of a Pin is the kernel's until the notification. Nothing takes it out before: not a cancel, a deadline, a close, the end of
//!   the fiber, the socket or the pool. Whether there will be a notification is said by F_MORE of the result, whatever the result is.
//! - A notification comes when the network is done with the memory, and a peer that does not read can put that off for ever. So Pins are
//!   bounded: by connection, by worker, by size of a pool. Above, sends copy, which needs room in the socket's own queue instead.
//! - The table is the worker's and is touched by its thread only; the counts that others see are atomic.
#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use super::inflight::{Direction, InFlight};
use super::route::{Route, ZeroCopy};
use super::scheduler::Worker;
use super::{
    AbortOnUnwind, FiberRef, current, failed_in_fiber, interrupt, interrupted, sooner, submit_later,
};
use crate::buf::Buf;
use crate::buf::pool::{Class, Reservation};
use crate::driver::op::timespec_from_ns;
use crate::driver::{Full, Key, Op, Timespec};
use crate::log::log;

/// `IORING_NOTIF_USAGE_ZC_COPIED`: the notification's `res` says that the kernel copied after all.
pub(super) const NOTIF_USAGE_COPIED: i32 = i32::MIN;

/// What one worker pins at most.
const WORKER_PINS_MAX: usize = 64;
const WORKER_BYTES_MAX: usize = 8 << 20;
/// What one connection pins at most.
const CONNECTION_PINS_MAX: usize = 8;
const CONNECTION_BYTES_MAX: usize = 1 << 20;
/// The most registrations of a worker, in force or refused.
const REGISTRATIONS_MAX: usize = 32;

/// What a connection's zero-copy sends have in common.
pub(crate) struct Connection {
    route: Arc<Route>,
    pins: AtomicUsize,
    bytes: AtomicUsize,
}

impl Connection {
    pub(crate) fn new(route: Arc<Route>) -> Connection {
        Connection {
            route,
            pins: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
        }
    }
}

/// A buffer that the kernel reads, or may read. Dropped, it goes home.
struct Pin {
    key: Key,
    _memory: Buf,
    bytes: usize,
    class: Option<Arc<Class>>,
    connection: Arc<Connection>,
}

impl Pin {
    /// Counts the pin, unless that would be one too many.
    fn new(connection: &Arc<Connection>, buf: &mut Buf) -> Option<Pin> {
        let class = buf.class().cloned();
        let bytes = buf.len();
        let memory = buf.hold()?;
        let mut of_connection = CONNECTION_PINS_MAX;
        if let Some(class) = &class {
            let (of_all, of_one) = class.pins_max();
            of_connection = of_connection.min(of_one);
            if class.pins().fetch_add(1, Ordering::AcqRel) >= of_all {
                class.pins().fetch_sub(1, Ordering::AcqRel);
                return None;
            }
        }
        let pins = connection.pins.fetch_add(1, Ordering::AcqRel);
        let pinned = connection.bytes.fetch_add(bytes, Ordering::AcqRel);
        // From here on its drop takes the counts back.
        let pin = Pin {
            key: Key::NONE,
            _memory: memory,
            bytes,
            class,
            connection: connection.clone(),
        };
        // One buffer may be as long as it likes.
        let fits = pins < of_connection && (pins == 0 || pinned + bytes <= CONNECTION_BYTES_MAX);
        fits.then_some(pin)
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if let Some(class) = &self.class {
            class.pins().fetch_sub(1, Ordering::AcqRel);
        }
        self.connection.pins.fetch_sub(1, Ordering::AcqRel);
        self.connection
            .bytes
            .fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// One size of a pool, and what this worker's ring knows of it.
struct Registration {
    class: Weak<Class>,
    /// `None`: it was refused, or is not wanted.
    held: Option<Held>,
}

/// A registration in force.
struct Held {
    index: u16,
    _reservation: Reservation,
}

/// What zero-copy sends leave with a worker.
pub(super) struct Pins {
    mode: ZeroCopy,
    pins: RefCell<Vec<Pin>>,
    bytes: Cell<usize>,
    registrations: RefCell<Vec<Registration>>,
    sends: Cell<u64>,
    copied: Cell<u64>,
    leaked: Cell<u64>,
}

/// Numbers for the metrics.
pub(crate) struct PinCounts {
    pub(crate) sends: u64,
    pub(crate) copied: u64,
    pub(crate) pinned: u64,
    pub(crate) leaked: u64,
}

impl Pins {
    pub(super) fn new(mode: ZeroCopy) -> Pins {
        Pins {
            mode,
            pins: RefCell::default(),
            bytes: Cell::new(0),
            registrations: RefCell::default(),
            sends: Cell::new(0),
            copied: Cell::new(0),
            leaked: Cell::new(0),
        }
    }

    pub(super) fn counts(&self) -> PinCounts {
        PinCounts {
            sends: self.sends.get(),
            copied: self.copied.get(),
            pinned: self.pins.borrow().len() as u64,
            leaked: self.leaked.get(),
        }
    }

    fn has_room(&self, bytes: usize) -> bool {
        let pins = self.pins.borrow().len();
        pins < WORKER_PINS_MAX && (pins == 0 || self.bytes.get() + bytes <= WORKER_BYTES_MAX)
    }

    fn put(&self, pin: Pin) {
        self.bytes.set(self.bytes.get() + pin.bytes);
        self.pins.borrow_mut().push(pin);
    }

    fn take(&self, key: Key) -> Option<Pin> {
        let mut pins = self.pins.borrow_mut();
        let place = pins.iter().position(|pin| pin.key == key)?;
        let pin = pins.swap_remove(place);
        self.bytes.set(self.bytes.get() - pin.bytes);
        Some(pin)
    }
}

impl Worker {
    /// Lets go of what the kernel is done with.
    #[inline]
    pub(super) fn release_pins(&self) {
        if self.pins.bytes.get() > 0 {
            self.release_pins_cold();
        }
    }

    #[cold]
    #[inline(never)]
    fn release_pins_cold(&self) {
        while let Some((key, res)) = self.driver.with(|driver| driver.slots().take_released()) {
            let copied = res == NOTIF_USAGE_COPIED;
            self.pins
                .copied
                .set(self.pins.copied.get() + u64::from(copied));
            // Dropped with nothing borrowed: somebody may be woken who waits for the buffer.
            if let Some(pin) = self.pins.take(key)
                && self.pins.mode != ZeroCopy::Always
            {
                pin.connection.route.learn(copied);
            }
        }
    }

    /// No fiber runs any more: waits for the notifications, and gives up what has none when the grace is over.
    pub(super) fn drain_pins(&self, grace_ns: i64) {
        let give_up_at_ns = self.now_ns().saturating_add(grace_ns);
        let mut ticking = false;
        loop {
            self.release_pins();
            if self.pins.bytes.get() == 0 {
                break;
            }
            let left_ns = give_up_at_ns - self.now_ns();
            if left_ns <= 0 {
                break;
            }
            self.driver.with(|driver| {
                if !ticking {
                    driver.tick(left_ns);
                }
                driver.enter(true);
                // A result for a fiber that was given up finds nobody: its stack and its pin stay.
                while driver.next().is_some() {}
            });
            ticking = true;
        }
        let left = std::mem::take(&mut *self.pins.pins.borrow_mut());
        if !left.is_empty() {
            self.pins.leaked.set(left.len() as u64);
            log(format_args!(
                "{} buffers of zero-copy sends were still the kernel's at shutdown; they stay until the process ends",
                left.len()
            ));
            // Their memory is the kernel's for good.
            left.into_iter().for_each(std::mem::forget);
        }
        self.pins.bytes.set(0);
    }

    /// The index by which this worker's ring knows the buffer's pool.
    fn registered(&self, buf: &Buf) -> Option<u16> {
        let class = buf.class()?;
        let registrations = self.pins.registrations.borrow();
        let known = registrations
            .iter()
            .find(|known| std::ptr::eq(known.class.as_ptr(), Arc::as_ptr(class)));
        if let Some(known) = known {
            return known.held.as_ref().map(|held| held.index);
        }
        drop(registrations);
        self.register_class(class)
    }

    #[cold]
    #[inline(never)]
    fn register_class(&self, class: &Arc<Class>) -> Option<u16> {
        let mut registrations = self.pins.registrations.borrow_mut();
        // Of pools that have gone since.
        registrations.retain(|known| {
            let lives = known.class.strong_count() > 0;
            if !lives && let Some(held) = &known.held {
                self.driver
                    .with(|driver| driver.unregister_buffer(held.index));
            }
            lives
        });
        if registrations.len() >= REGISTRATIONS_MAX {
            return None;
        }
        let held = class.reserve().and_then(|reservation| {
            let (start, bytes) = class.region();
            // SAFETY: the index is used for buffers of this class only, each of which keeps the class and so its mapping. (The entry is
            // found by the class's address, which its `Weak` keeps from being used again.)
            let index = self
                .driver
                .with(|driver| unsafe { driver.register_buffer(start.as_ptr(), bytes) });
            match index {
                Ok(index) => Some(Held {
                    index,
                    _reservation: reservation,
                }),
                Err(errno) => {
                    class.refuse_registration(refusal(errno, bytes));
                    None
                }
            }
        });
        let index = held.as_ref().map(|held| held.index);
        registrations.push(Registration {
            class: Arc::downgrade(class),
            held,
        });
        index
    }
}

/// Why the kernel did not register so many bytes.
fn refusal(errno: i32, bytes: usize) -> String {
    let limit = crate::sys::rlimit(crate::sys::Resource::LockedMemory).map_or(0, |(soft, _)| soft);
    match errno {
        libc::ENOMEM => format!(
            "no locked memory for {} KiB more: the limit (RLIMIT_MEMLOCK) is {} KiB, and rings count too; raise it with `ulimit -l`, \
             LimitMEMLOCK= in the systemd unit, or `docker run --ulimit memlock=BYTES`",
            bytes / 1024,
            limit / 1024
        ),
        libc::EOPNOTSUPP => "this driver has no ring to register buffers with".to_owned(),
        errno => format!("the kernel refused to register {bytes} bytes with errno {errno}"),
    }
}

/// Whether this thread's worker sends without a copy, and in which manner.
pub(crate) fn zero_copy_mode() -> Option<ZeroCopy> {
    let (worker, _) = current()?;
    let mode = worker.pins.mode;
    let possible = mode != ZeroCopy::Never && worker.driver.with(|driver| driver.has_zero_copy());
    possible.then_some(mode)
}

/// In a fiber: sends from `buf`, which is a lease or a pool's, without a copy, and returns once the kernel has taken what it takes: a result as
/// of [`suspend`](super::suspend). The buffer goes home, when all parts of it are dropped, with the notification at the earliest. `None`,
/// and nothing was sent: not this way, not now; then the caller sends it by copying.
pub(crate) fn send_zero_copy(
    fd: RawFd,
    buf: &mut Buf,
    flags: i32,
    timeout_ns: i64,
    target: (&InFlight, Direction),
    connection: &Arc<Connection>,
) -> Option<i32> {
    let (worker, fiber) = current()?;
    if std::thread::panicking() {
        return None;
    }
    if worker.pins.mode != ZeroCopy::Always && !connection.route.wants(buf.len()) {
        return None;
    }
    if !worker.pins.has_room(buf.len()) {
        return None;
    }
    let mut timeout_ns = timeout_ns;
    if fiber.interrupt.get() != 0 {
        if let Some(code) = interrupted(worker, fiber) {
            return Some(code);
        }
        if fiber.interrupt.get() & interrupt::DEADLINE != 0 {
            let left_ns = fiber.deadline_ns.get() - worker.now_ns();
            if left_ns <= 0 {
                // The ordinary way has the answer to that.
                return None;
            }
            timeout_ns = sooner(timeout_ns, left_ns);
        }
    }
    let pin = Pin::new(connection, buf)?;
    let fixed = worker.registered(buf);
    let res = run(
        worker, fiber, fd, buf, fixed, flags, timeout_ns, target, pin,
    );
    match -res {
        ..=0 => Some(res),
        // Not this socket, not this kernel.
        libc::EOPNOTSUPP | libc::EINVAL => {
            connection.route.turn_off();
            None
        }
        // No memory to pin pages with: not now.
        libc::ENOMEM | libc::ENOBUFS => None,
        // The operation that goes on from here, if any does, copies.
        _ => {
            let mut op = Op::Send {
                fd,
                buffer: buf,
                flags,
            };
            Some(failed_in_fiber(
                worker,
                fiber,
                &mut op,
                res,
                timeout_ns,
                Some(target),
            ))
        }
    }
}

/// The operation's own result.
#[allow(clippy::too_many_arguments)]
fn run(
    worker: &Worker,
    fiber: FiberRef,
    fd: RawFd,
    buffer: &[u8],
    fixed: Option<u16>,
    flags: i32,
    timeout_ns: i64,
    (inflight, direction): (&InFlight, Direction),
    mut pin: Pin,
) -> i32 {
    let mut op = Op::SendZeroCopy {
        fd,
        buffer,
        flags,
        fixed,
    };
    let timer: Timespec;
    let timeout = if timeout_ns >= 0 {
        timer = timespec_from_ns(timeout_ns);
        Some(&timer)
    } else {
        None
    };
    // SAFETY: `timer` stays in this frame until the result has resumed the fiber, and is the linked timer's, which ends with it.
    // The memory is a part of the buffer that `pin` holds: from here on in the worker's table until the notification, or the result where
    // none will come, and never freed where neither comes. Nobody writes there meanwhile: the caller gave the buffer away, and whoever
    // holds the other parts of it (`&mut Buf`, up to `sendall_buf`) only reads, and drops them.
    if let Err(Full) = unsafe { worker.submit(fiber, &mut op, timeout) } {
        // SAFETY: as above.
        if let Some(code) = unsafe { submit_later(worker, fiber, &mut op, timeout) } {
            return code;
        }
    }
    let abort = AbortOnUnwind;
    let key = fiber.key.get();
    pin.key = key;
    worker.driver.with(|driver| driver.slots().detach(key));
    worker.pins.put(pin);
    worker.pins.sends.set(worker.pins.sends.get() + 1);
    let place = inflight.enter(worker, key, direction);
    fiber.switch_out();
    inflight.leave(worker, place, key, direction);
    let completion = fiber.completion.get();
    if completion.flags & crate::driver::slab::CQE_F_MORE == 0 {
        worker.driver.with(|driver| driver.slots().attach(key));
        drop(worker.pins.take(key));
    }
    std::mem::forget(abort);
    completion.res
}
