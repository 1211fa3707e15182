//! Yardsticks for the echo path: raw servers and a load generator.
//!
//! Nothing here uses the crate under test. The servers are what one would
//! write by hand for exactly this job, without any abstraction, so that their
//! cost per echo is a floor to compare against:
//!
//! * `raw-single`: io_uring, one RECV and then one SEND at a time per connection;
//! * `raw-multi`: io_uring, multishot RECV into a provided buffer ring;
//! * `epoll`: epoll, level-triggered or (`--edge`) edge-triggered;
//! * `load`: the epoll load generator, which verifies every echoed byte.
//!
//! Run as `cargo bench --bench yardstick -- SUBCOMMAND …`. The scripts
//! `benches/compare.sh` and `benches/instructions.sh` drive whole comparisons.
//!
//! Each server is one thread, prints `listening on ADDRESS` once it listens,
//! and runs until a signal ends it.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{IntoRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use clap::{Args, CommandFactory, Parser, Subcommand};
use io_uring::{cqueue, opcode, squeue, types};

// --------------------------------------------------------------- command line

/// Raw echo servers and the load generator that judges them.
#[derive(Parser)]
#[command(name = "yardstick")]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Echo with single-shot io_uring operations.
    RawSingle(SingleArgs),
    /// Echo with multishot io_uring operations and a provided buffer ring.
    RawMulti(MultiArgs),
    /// Echo with epoll.
    Epoll(EpollArgs),
    /// Drive an echo server and measure it.
    Load(LoadArgs),
}

#[derive(Args)]
struct ServerArgs {
    /// TCP address to listen on; port 0 takes a free one.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    bind: String,
    /// Unix socket to listen on instead; an existing file there is removed.
    #[arg(long, value_name = "PATH", conflicts_with = "bind")]
    unix: Option<PathBuf>,
    /// Size of a receive buffer.
    #[arg(long, value_name = "BYTES", default_value_t = 4096,
          value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    size: u32,
    /// Close a connection that sends nothing for this long.
    #[arg(long, value_name = "SECONDS", value_parser = positive_seconds)]
    timeout: Option<Duration>,
}

#[derive(Args)]
struct RingArgs {
    /// Entries of the submission queue; the completion queue has four times as many.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(4..=8192))]
    entries: u32,
}

#[derive(Args)]
struct SingleArgs {
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    ring: RingArgs,
    /// Submit each SEND linked to the RECV that follows it, without a completion of its own.
    #[arg(long)]
    linked: bool,
    /// Have RECV wait for readiness first, as it mostly has to in the end.
    #[arg(long)]
    poll_first: bool,
}

#[derive(Args)]
struct MultiArgs {
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    ring: RingArgs,
    /// Buffers in the provided buffer ring, a power of two.
    #[arg(long, default_value_t = 256, value_parser = buffer_count)]
    buffers: u16,
}

#[derive(Args)]
struct EpollArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Edge-triggered rather than level-triggered.
    #[arg(long)]
    edge: bool,
}

#[derive(Args)]
#[command(group = clap::ArgGroup::new("target").required(true).args(["connect", "unix"]))]
struct LoadArgs {
    /// TCP address to connect to.
    #[arg(long, value_name = "HOST:PORT")]
    connect: Option<String>,
    /// Unix socket to connect to.
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
    /// Connections.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    connections: u32,
    /// Bytes in a message.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    size: u32,
    /// Messages in flight on each connection.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    depth: u32,
    /// Messages to measure, over all connections.
    #[arg(long, default_value_t = 400_000, value_parser = clap::value_parser!(u64).range(1..))]
    messages: u64,
    /// Messages to echo before the measurement [default: a tenth of --messages].
    #[arg(long)]
    warmup: Option<u64>,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

fn positive_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if !(0.001..=1e9).contains(&seconds) {
        return Err("must be between 0.001 and 1e9".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

fn buffer_count(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(count) if count.is_power_of_two() && count <= 1 << 15 => Ok(count),
        _ => Err("must be a power of two up to 32768".to_owned()),
    }
}

fn main() -> ExitCode {
    // `cargo bench` adds `--bench` to the arguments of every benchmark.
    let cli = Cli::parse_from(std::env::args_os().filter(|argument| argument != "--bench"));
    raise_file_limit();
    let outcome = match cli.command {
        None => {
            // A bare `cargo bench` comes here: there is nothing to run unasked.
            let _ = Cli::command().print_help();
            return ExitCode::SUCCESS;
        }
        Some(Command::RawSingle(args)) => raw_single(&args),
        Some(Command::RawMulti(args)) => raw_multi(&args),
        Some(Command::Epoll(args)) => epoll_server(&args),
        Some(Command::Load(args)) => load(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("yardstick: {error}");
            ExitCode::FAILURE
        }
    }
}

// -------------------------------------------------------------------- sockets

/// Turns the -1 of a system call into the error it stands for.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn other(message: impl Into<String>) -> io::Error {
    io::Error::other(message.into())
}

fn raise_file_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: both calls are given a valid rlimit.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

/// A listening socket, kept for the life of the process.
struct Listening {
    fd: RawFd,
    tcp: bool,
    announcement: String,
}

impl Listening {
    fn open(args: &ServerArgs) -> io::Result<Self> {
        // The standard library sets SO_REUSEADDR on TCP listeners and chooses a
        // backlog of its own; a second listen() replaces the backlog.
        let (fd, tcp, address) = if let Some(path) = &args.unix {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            (listener.into_raw_fd(), false, path.display().to_string())
        } else {
            let listener = TcpListener::bind(&args.bind)?;
            let address = listener.local_addr()?.to_string();
            (listener.into_raw_fd(), true, address)
        };
        // SAFETY: plain system call on a descriptor just opened.
        check(unsafe { libc::listen(fd, 1024) })?;
        Ok(Self {
            fd,
            tcp,
            announcement: format!("listening on {address}\n"),
        })
    }

    /// Says where clients can connect, once the server is ready for them.
    fn announce(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(self.announcement.as_bytes())?;
        out.flush()
    }

    /// Sets the options every server sets on an accepted connection.
    fn prepare(&self, fd: RawFd) {
        if self.tcp {
            let on: libc::c_int = 1;
            // SAFETY: the option value is a live c_int of the length given. A failure
            // (the peer is gone already) shows at the first receive.
            unsafe {
                libc::setsockopt(
                    fd,
                    libc::IPPROTO_TCP,
                    libc::TCP_NODELAY,
                    (&raw const on).cast(),
                    size_of::<libc::c_int>() as libc::socklen_t,
                );
            }
        }
    }
}

fn close(fd: RawFd) {
    // SAFETY: the callers own the descriptor and forget it here.
    unsafe {
        libc::close(fd);
    }
}

/// recv(2), a negative error number on failure.
#[inline(always)]
fn recv(fd: RawFd, buffer: &mut [u8]) -> isize {
    // SAFETY: the buffer is valid for writes of its length.
    let result = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    if result < 0 { -errno() } else { result }
}

/// send(2) without SIGPIPE, a negative error number on failure.
#[inline(always)]
fn send(fd: RawFd, buffer: &[u8]) -> isize {
    // SAFETY: the buffer is valid for reads of its length.
    let result =
        unsafe { libc::send(fd, buffer.as_ptr().cast(), buffer.len(), libc::MSG_NOSIGNAL) };
    if result < 0 { -errno() } else { result }
}

fn errno() -> isize {
    // SAFETY: the location is always valid for the calling thread.
    unsafe { *libc::__errno_location() as isize }
}

/// Whether accepting can be tried again at once after this error (a positive
/// error number), rather than only when a descriptor has been given back.
fn accept_again(error: i32) -> bool {
    matches!(
        error,
        libc::ECONNABORTED | libc::EINTR | libc::EAGAIN | libc::EPROTO | libc::EPERM
    )
}

/// Whether accepting failed for want of something a closed connection gives back.
fn accept_exhausted(error: i32) -> bool {
    matches!(
        error,
        libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM
    )
}

/// Coarse time for idle connections: this many ticks make the timeout.
const TICKS: u32 = 8;

// ------------------------------------------------------------------- the ring

const SETUP_CQSIZE: u32 = 1 << 3;
const SETUP_SUBMIT_ALL: u32 = 1 << 7;
const SETUP_COOP_TASKRUN: u32 = 1 << 8;
const SETUP_SINGLE_ISSUER: u32 = 1 << 12;
const SETUP_DEFER_TASKRUN: u32 = 1 << 13;
const SETUP_NO_SQARRAY: u32 = 1 << 16;
const FEAT_SINGLE_MMAP: u32 = 1 << 0;
const OFF_SQES: libc::off_t = 0x1000_0000;
const ENTER_GETEVENTS: u32 = 1 << 0;
const ENTER_REGISTERED_RING: u32 = 1 << 4;
const REGISTER_RING_FDS: u32 = 20;
const REGISTER_PBUF_RING: u32 = 22;
const RECVSEND_POLL_FIRST: u16 = 1 << 0;

/// The setups to try, best first.
const LADDER: [u32; 5] = [
    SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN | SETUP_SUBMIT_ALL | SETUP_NO_SQARRAY,
    SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN | SETUP_SUBMIT_ALL,
    SETUP_SINGLE_ISSUER | SETUP_COOP_TASKRUN | SETUP_SUBMIT_ALL,
    SETUP_COOP_TASKRUN | SETUP_SUBMIT_ALL,
    0,
];

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    features: u32,
    wq_fd: u32,
    resv: [u32; 3],
    sq: SqOffsets,
    cq: CqOffsets,
}

#[repr(C)]
#[derive(Default)]
struct SqOffsets {
    head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    flags: u32,
    dropped: u32,
    array: u32,
    resv: u32,
    user_addr: u64,
}

#[repr(C)]
#[derive(Default)]
struct CqOffsets {
    head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    overflow: u32,
    cqes: u32,
    flags: u32,
    resv: u32,
    user_addr: u64,
}

/// `struct io_uring_cqe`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Cqe {
    user_data: u64,
    result: i32,
    flags: u32,
}

/// Both queues of a ring, mapped for the life of the process, and how to enter it.
struct Ring {
    sqes: *mut squeue::Entry,
    cqes: *const Cqe,
    sq_mask: u32,
    cq_mask: u32,
    /// Our end of the submission queue, and as much of it as the kernel has taken.
    sq_tail: u32,
    sq_taken: u32,
    /// Our end of the completion queue, and the kernel's as of the last entry.
    cq_head: u32,
    cq_tail: u32,
    shared_sq_head: &'static AtomicU32,
    shared_sq_tail: &'static AtomicU32,
    shared_cq_head: &'static AtomicU32,
    shared_cq_tail: &'static AtomicU32,
    fd: RawFd,
    enter_fd: RawFd,
    enter_flags: u32,
}

/// Maps memory that is never unmapped: anonymous for the descriptor -1.
fn map(bytes: usize, fd: RawFd, offset: libc::off_t) -> io::Result<*mut u8> {
    let kind = if fd < 0 {
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS
    } else {
        libc::MAP_SHARED
    };
    // SAFETY: a mapping at a place of the kernel's choice disturbs nothing.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            kind | libc::MAP_POPULATE,
            fd,
            offset,
        )
    };
    if address == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(address.cast())
    }
}

impl Ring {
    /// Opens the best ring the kernel grants.
    fn open(args: &RingArgs) -> io::Result<Self> {
        let (fd, params) = Self::setup(args.entries)?;
        if params.features & FEAT_SINGLE_MMAP == 0 {
            return Err(other("the kernel is too old"));
        }
        let sq_end = params.sq.array as usize + params.sq_entries as usize * size_of::<u32>();
        let cq_end = params.cq.cqes as usize + params.cq_entries as usize * size_of::<Cqe>();
        let rings = map(sq_end.max(cq_end), fd, 0)?;
        let sqes = map(
            params.sq_entries as usize * size_of::<squeue::Entry>(),
            fd,
            OFF_SQES,
        )?;
        if params.flags & SETUP_NO_SQARRAY == 0 {
            for index in 0..params.sq_entries {
                // SAFETY: the array lies in the mapping, as the kernel said.
                unsafe {
                    let array = rings.add(params.sq.array as usize).cast::<u32>();
                    array.add(index as usize).write(index);
                }
            }
        }
        // SAFETY: the offsets are the kernel's, of aligned words in the mapping,
        // which is never unmapped.
        let shared =
            |offset: u32| unsafe { AtomicU32::from_ptr(rings.add(offset as usize).cast()) };

        #[repr(C)]
        struct RingFd {
            offset: u32,
            resv: u32,
            data: u64,
        }
        let mut update = RingFd {
            offset: u32::MAX,
            resv: 0,
            data: fd as u64,
        };
        let (enter_fd, enter_flags) = match register(fd, REGISTER_RING_FDS, &mut update) {
            Ok(()) => (
                update.offset as RawFd,
                ENTER_GETEVENTS | ENTER_REGISTERED_RING,
            ),
            Err(error) => {
                eprintln!("yardstick: ring descriptor not registered: {error}");
                (fd, ENTER_GETEVENTS)
            }
        };
        Ok(Self {
            sqes: sqes.cast(),
            // SAFETY: within the mapping, as above.
            cqes: unsafe { rings.add(params.cq.cqes as usize).cast() },
            sq_mask: params.sq_entries - 1,
            cq_mask: params.cq_entries - 1,
            sq_tail: 0,
            sq_taken: 0,
            cq_head: 0,
            cq_tail: 0,
            shared_sq_head: shared(params.sq.head),
            shared_sq_tail: shared(params.sq.tail),
            shared_cq_head: shared(params.cq.head),
            shared_cq_tail: shared(params.cq.tail),
            fd,
            enter_fd,
            enter_flags,
        })
    }

    fn setup(entries: u32) -> io::Result<(RawFd, Params)> {
        let mut last = None;
        for (rung, flags) in LADDER.into_iter().enumerate() {
            let mut params = Params {
                cq_entries: entries * 4,
                flags: flags | SETUP_CQSIZE,
                ..Params::default()
            };
            // SAFETY: the parameters are valid for reads and writes.
            let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, entries, &raw mut params) };
            if fd >= 0 {
                if rung > 0 {
                    eprintln!("yardstick: ring set up with the flags of rung {rung}");
                }
                return Ok((fd as RawFd, params));
            }
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EINVAL) {
                return Err(error);
            }
            last = Some(error);
        }
        Err(last.unwrap_or_else(|| other("no ring")))
    }

    /// Submits everything queued and waits for `want` completions.
    #[inline(always)]
    fn enter(&mut self, want: u32) -> io::Result<()> {
        self.shared_cq_head.store(self.cq_head, Ordering::Release);
        self.shared_sq_tail.store(self.sq_tail, Ordering::Release);
        // SAFETY: every queued entry points to memory that outlives its operation.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.enter_fd,
                self.sq_tail.wrapping_sub(self.sq_taken),
                want,
                self.enter_flags,
                std::ptr::null::<libc::c_void>(),
                0usize,
            )
        };
        self.sq_taken = self.shared_sq_head.load(Ordering::Acquire);
        self.cq_tail = self.shared_cq_tail.load(Ordering::Acquire);
        if result < 0 {
            return enter_failed();
        }
        Ok(())
    }

    /// The next completion, if one has come by the last `enter`.
    #[inline(always)]
    fn next(&mut self) -> Option<Cqe> {
        if self.cq_head == self.cq_tail {
            return None;
        }
        // SAFETY: the kernel has filled the entries between head and tail.
        let cqe = unsafe { *self.cqes.add((self.cq_head & self.cq_mask) as usize) };
        self.cq_head = self.cq_head.wrapping_add(1);
        Some(cqe)
    }

    /// How many entries can be queued before some must be submitted.
    #[inline(always)]
    fn room(&self) -> u32 {
        (self.sq_mask + 1).wrapping_sub(self.sq_tail.wrapping_sub(self.sq_taken))
    }

    /// Queues one entry, making room first if there is none.
    #[inline(always)]
    fn push(&mut self, entry: squeue::Entry) -> io::Result<()> {
        if self.room() == 0 {
            self.make_room(1)?;
        }
        // SAFETY: there is room, so the kernel does not read the entry at the tail.
        unsafe {
            self.sqes
                .add((self.sq_tail & self.sq_mask) as usize)
                .write(entry);
        }
        self.sq_tail = self.sq_tail.wrapping_add(1);
        Ok(())
    }

    /// Sees to it that a chain of `count` entries goes into one submission.
    #[cold]
    #[inline(never)]
    fn make_room(&mut self, count: u32) -> io::Result<()> {
        for _ in 0..1000 {
            if self.room() >= count {
                return Ok(());
            }
            self.enter(0)?;
        }
        Err(other("the submission queue stays full"))
    }
}

/// io_uring_register(2) with one argument; its success may be 0 or 1.
fn register<T>(fd: RawFd, operation: u32, argument: &mut T) -> io::Result<()> {
    // SAFETY: the callers pass the structure that the operation takes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            fd,
            operation,
            std::ptr::from_mut(argument),
            1u32,
        )
    };
    check(result as libc::c_int).map(drop)
}

#[cold]
fn enter_failed() -> io::Result<()> {
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // Interrupted, or completions must be taken before more can be done.
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME) => Ok(()),
        _ => Err(error),
    }
}

// What a completion is about: the low bits of its user data. The rest is the
// index of the connection.
const RECV: u64 = 0;
const SEND: u64 = 1;
const ACCEPT: u64 = 2;
const TIMER: u64 = 3;
const KIND: u64 = 3;

const SEND_FLAGS: i32 = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;

// ----------------------------------------------------------------- raw-single

struct SingleConn {
    buffer: *mut u8,
    fd: RawFd,
    /// How many bytes the buffer holds, and how many of them have been sent.
    length: u32,
    sent: u32,
}

/// What the options choose is fixed when compiled, to cost nothing per echo.
struct Single<const LINKED: bool, const TIMED: bool> {
    ring: Ring,
    listening: Listening,
    connections: Vec<SingleConn>,
    free: Vec<u32>,
    accepting: bool,
    size: u32,
    recv_ioprio: u16,
    timeout: &'static types::Timespec,
}

fn raw_single(args: &SingleArgs) -> io::Result<()> {
    match (args.linked, args.server.timeout.is_some()) {
        (false, false) => Single::<false, false>::serve(args),
        (false, true) => Single::<false, true>::serve(args),
        (true, false) => Single::<true, false>::serve(args),
        (true, true) => Single::<true, true>::serve(args),
    }
}

/// The single-shot server: what each connection does next is always exactly
/// one operation (or one linked chain), so a closed slot has nothing in flight.
impl<const LINKED: bool, const TIMED: bool> Single<LINKED, TIMED> {
    fn serve(args: &SingleArgs) -> io::Result<()> {
        let listening = Listening::open(&args.server)?;
        let ring = Ring::open(&args.ring)?;
        let timeout = types::Timespec::from(args.server.timeout.unwrap_or_default());
        let mut server = Self {
            ring,
            listening,
            connections: Vec::new(),
            free: Vec::new(),
            accepting: false,
            size: args.server.size,
            recv_ioprio: if args.poll_first {
                RECVSEND_POLL_FIRST
            } else {
                0
            },
            timeout: Box::leak(Box::new(timeout)),
        };
        server.accept()?;
        server.listening.announce()?;
        server.run()
    }

    #[inline(never)]
    fn run(&mut self) -> io::Result<()> {
        loop {
            self.ring.enter(1)?;
            while let Some(cqe) = self.ring.next() {
                let (kind, index) = (cqe.user_data & KIND, (cqe.user_data >> 2) as u32);
                if kind == RECV {
                    self.received(index, cqe.result, cqe.flags)?;
                } else if kind == SEND {
                    self.sent(index, cqe.result)?;
                } else if kind == ACCEPT {
                    self.accepted(cqe.result)?;
                }
            }
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        self.accepting = true;
        let fd = types::Fd(self.listening.fd);
        let entry = opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut())
            .flags(libc::SOCK_CLOEXEC)
            .build()
            .user_data(ACCEPT);
        self.ring.push(entry)
    }

    #[cold]
    fn accepted(&mut self, result: i32) -> io::Result<()> {
        if result < 0 {
            self.accepting = false;
            return if accept_again(-result) {
                self.accept()
            } else if accept_exhausted(-result) {
                Ok(()) // accepting goes on when a connection closes
            } else {
                Err(io::Error::from_raw_os_error(-result))
            };
        }
        self.listening.prepare(result);
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let buffer = vec![0u8; self.size as usize].into_boxed_slice();
                self.connections.push(SingleConn {
                    buffer: Box::leak(buffer).as_mut_ptr(),
                    fd: -1,
                    length: 0,
                    sent: 0,
                });
                self.connections.len() as u32 - 1
            }
        };
        self.connections[index as usize].fd = result;
        self.receive_again(index)?;
        self.accept()
    }

    /// Queues a RECV, for which there is room if it is part of a chain.
    #[inline(always)]
    fn receive(&mut self, index: u32, fd: RawFd, buffer: *mut u8, ioprio: u16) -> io::Result<()> {
        if TIMED && !LINKED {
            self.room_for(2)?;
        }
        let entry = opcode::Recv::new(types::Fd(fd), buffer, self.size)
            .ioprio(ioprio)
            .build()
            .user_data(u64::from(index) << 2 | RECV);
        if !TIMED {
            return self.ring.push(entry);
        }
        self.ring.push(entry.flags(squeue::Flags::IO_LINK))?;
        let timer = opcode::LinkTimeout::new(self.timeout)
            .build()
            .flags(squeue::Flags::SKIP_SUCCESS)
            .user_data(TIMER);
        self.ring.push(timer)
    }

    #[cold]
    fn receive_again(&mut self, index: u32) -> io::Result<()> {
        self.room_for(2)?;
        let connection = &self.connections[index as usize];
        self.receive(index, connection.fd, connection.buffer, 0)
    }

    #[inline(always)]
    fn room_for(&mut self, count: u32) -> io::Result<()> {
        if self.ring.room() < count {
            self.ring.make_room(count)?;
        }
        Ok(())
    }

    #[inline(always)]
    fn received(&mut self, index: u32, result: i32, flags: u32) -> io::Result<()> {
        if result <= 0 {
            return self.receive_failed(index, result);
        }
        let connection = &mut self.connections[index as usize];
        let (fd, buffer) = (connection.fd, connection.buffer);
        connection.length = result as u32;
        connection.sent = 0;
        let start: *const u8 = buffer;
        self.send(index, fd, buffer, start, result as u32, flags)
    }

    #[cold]
    fn receive_failed(&mut self, index: u32, result: i32) -> io::Result<()> {
        if matches!(-result, libc::EINTR | libc::EAGAIN) {
            self.receive_again(index)
        } else {
            // The end of the stream, the timeout (ECANCELED) or an error.
            self.close(index)
        }
    }

    /// Queues a SEND of what the buffer holds from `start` on, and in linked
    /// mode the RECV thereafter; `flags` are those of the last RECV's completion.
    #[inline(always)]
    fn send(
        &mut self,
        index: u32,
        fd: RawFd,
        buffer: *mut u8,
        start: *const u8,
        length: u32,
        flags: u32,
    ) -> io::Result<()> {
        if LINKED {
            self.room_for(3)?;
        }
        let entry = opcode::Send::new(types::Fd(fd), start, length)
            .flags(SEND_FLAGS)
            .build()
            .user_data(u64::from(index) << 2 | SEND);
        if !LINKED {
            return self.ring.push(entry);
        }
        // A SEND that fails or falls short breaks the chain and only then
        // completes visibly; the RECV behind it is then cancelled silently.
        let chained = squeue::Flags::IO_LINK | squeue::Flags::SKIP_SUCCESS;
        self.ring.push(entry.flags(chained))?;
        let ioprio = if cqueue::sock_nonempty(flags) {
            0
        } else {
            self.recv_ioprio
        };
        self.receive(index, fd, buffer, ioprio)
    }

    #[inline(always)]
    fn sent(&mut self, index: u32, result: i32) -> io::Result<()> {
        let connection = &self.connections[index as usize];
        if LINKED || result as u32 != connection.length - connection.sent {
            return self.sent_short(index, result);
        }
        let (fd, buffer) = (connection.fd, connection.buffer);
        self.receive(index, fd, buffer, self.recv_ioprio)
    }

    #[cold]
    fn sent_short(&mut self, index: u32, result: i32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        if result > 0 {
            connection.sent += result as u32;
            if connection.sent == connection.length {
                return self.receive_again(index);
            }
        } else if !matches!(-result, libc::EINTR | libc::EAGAIN) {
            return self.close(index);
        }
        let (fd, buffer) = (connection.fd, connection.buffer);
        let length = connection.length - connection.sent;
        // SAFETY: `sent` never exceeds the length of what the buffer holds.
        let start = unsafe { buffer.add(connection.sent as usize) };
        self.send(index, fd, buffer, start, length, 0)
    }

    #[cold]
    fn close(&mut self, index: u32) -> io::Result<()> {
        close(std::mem::replace(
            &mut self.connections[index as usize].fd,
            -1,
        ));
        self.free.push(index);
        if !self.accepting {
            self.accept()?;
        }
        Ok(())
    }
}

// ------------------------------------------------------------------ raw-multi

const NO_BUFFER: u16 = u16::MAX;
const GROUP: u16 = 0;

/// The provided buffers: the ring shared with the kernel, and for each buffer
/// what it holds and which one is to be sent after it.
struct Buffers {
    entries: *mut types::BufRingEntry,
    memory: *mut u8,
    size: u32,
    mask: u16,
    tail: u16,
    published: u16,
    /// Buffers the kernel has filled and not got back.
    taken: u16,
    held: Box<[Held]>,
}

#[derive(Clone, Copy)]
struct Held {
    length: u32,
    next: u16,
}

impl Buffers {
    fn new(count: u16, size: u32, ring_fd: RawFd) -> io::Result<Self> {
        /// `struct io_uring_buf_reg`.
        #[repr(C)]
        struct BufReg {
            ring_addr: u64,
            ring_entries: u32,
            bgid: u16,
            flags: u16,
            resv: [u64; 3],
        }
        let bytes = usize::from(count) * size_of::<types::BufRingEntry>();
        let entries = map(bytes, -1, 0)?;
        let memory = map(usize::from(count) * size as usize, -1, 0)?;
        let mut registration = BufReg {
            ring_addr: entries as u64,
            ring_entries: u32::from(count),
            bgid: GROUP,
            flags: 0,
            resv: [0; 3],
        };
        register(ring_fd, REGISTER_PBUF_RING, &mut registration)?;
        let mut buffers = Self {
            entries: entries.cast(),
            memory,
            size,
            mask: count - 1,
            tail: 0,
            published: 0,
            taken: count,
            held: vec![
                Held {
                    length: 0,
                    next: NO_BUFFER
                };
                usize::from(count)
            ]
            .into_boxed_slice(),
        };
        for id in 0..count {
            buffers.give_back(id);
        }
        buffers.publish();
        Ok(buffers)
    }

    #[inline(always)]
    fn address(&self, id: u16) -> *mut u8 {
        // SAFETY: ids are below the count, for which the memory was mapped.
        unsafe { self.memory.add(usize::from(id) * self.size as usize) }
    }

    /// Puts a buffer back; the kernel sees it when it is published.
    #[inline(always)]
    fn give_back(&mut self, id: u16) {
        let address = self.address(id);
        // SAFETY: the masked tail is within the ring, and the kernel does not read
        // entries past the published tail.
        let entry = unsafe { &mut *self.entries.add(usize::from(self.tail & self.mask)) };
        entry.set_addr(address as u64);
        entry.set_len(self.size);
        entry.set_bid(id);
        self.tail = self.tail.wrapping_add(1);
    }

    /// Hands the kernel the buffers put back.
    #[inline(always)]
    fn publish(&mut self) {
        let count = self.tail.wrapping_sub(self.published);
        if count > 0 {
            self.published = self.tail;
            self.taken = self.taken.wrapping_sub(count);
            // SAFETY: the tail is a live, aligned u16 that the kernel only reads.
            unsafe {
                let tail = types::BufRingEntry::tail(self.entries).cast::<AtomicU16>();
                (*tail).store(self.tail, Ordering::Release);
            }
        }
    }

    fn available(&self) -> usize {
        self.held.len() - usize::from(self.taken)
    }
}

struct MultiConn {
    fd: RawFd,
    /// How much of the first buffer has been sent.
    sent: u32,
    /// The tick of the last receive.
    seen: u32,
    /// Buffers to send, in order; a SEND of the first one is always in flight.
    first: u16,
    last: u16,
    /// A multishot RECV is in flight.
    receiving: bool,
    /// Listed as waiting for a buffer.
    starved: bool,
    /// Nothing more is received, and the connection closes when all is sent.
    ending: bool,
}

struct Multi {
    ring: Ring,
    listening: Listening,
    buffers: Buffers,
    connections: Vec<MultiConn>,
    free: Vec<u32>,
    starved: VecDeque<u32>,
    accepting: bool,
    tick: u32,
    timer: Option<&'static types::Timespec>,
}

/// The multishot server. SENDs of one connection follow one another, since two
/// in flight could be reordered; the buffers waiting form a list per connection.
fn raw_multi(args: &MultiArgs) -> io::Result<()> {
    let listening = Listening::open(&args.server)?;
    let ring = Ring::open(&args.ring)?;
    let buffers = Buffers::new(args.buffers, args.server.size, ring.fd)?;
    let mut server = Multi {
        ring,
        listening,
        buffers,
        connections: Vec::new(),
        free: Vec::new(),
        starved: VecDeque::new(),
        accepting: false,
        tick: 0,
        timer: args
            .server
            .timeout
            .map(|timeout| &*Box::leak(Box::new(types::Timespec::from(timeout / TICKS)))),
    };
    server.accept()?;
    server.start_timer()?;
    server.listening.announce()?;
    server.run()
}

impl Multi {
    #[inline(never)]
    fn run(&mut self) -> io::Result<()> {
        let mut want = 1;
        loop {
            self.ring.enter(want)?;
            want = 1;
            while let Some(cqe) = self.ring.next() {
                let (kind, index) = (cqe.user_data & KIND, (cqe.user_data >> 2) as u32);
                if kind == RECV {
                    self.received(index, cqe.result, cqe.flags)?;
                } else if kind == SEND {
                    self.sent(index, cqe.result)?;
                } else if kind == ACCEPT {
                    self.accepted(cqe.result, cqueue::more(cqe.flags))?;
                } else {
                    self.ticked()?;
                }
            }
            self.buffers.publish();
            if !self.starved.is_empty() && self.buffers.available() > 0 {
                want = self.feed()?;
            }
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        self.accepting = true;
        let entry = opcode::AcceptMulti::new(types::Fd(self.listening.fd))
            .flags(libc::SOCK_CLOEXEC)
            .build()
            .user_data(ACCEPT);
        self.ring.push(entry)
    }

    #[cold]
    fn accepted(&mut self, result: i32, more: bool) -> io::Result<()> {
        self.accepting = more;
        if result < 0 {
            return if more || accept_exhausted(-result) {
                Ok(()) // accepting goes on when a connection closes
            } else if accept_again(-result) {
                self.accept()
            } else {
                Err(io::Error::from_raw_os_error(-result))
            };
        }
        self.listening.prepare(result);
        let index = self.free.pop().unwrap_or(self.connections.len() as u32);
        let connection = MultiConn {
            fd: result,
            sent: 0,
            seen: self.tick,
            first: NO_BUFFER,
            last: NO_BUFFER,
            receiving: false,
            starved: false,
            ending: false,
        };
        if index as usize == self.connections.len() {
            self.connections.push(connection);
        } else {
            self.connections[index as usize] = connection;
        }
        self.receive(index)?;
        if !more {
            self.accept()?;
        }
        Ok(())
    }

    fn receive(&mut self, index: u32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        connection.receiving = true;
        let entry = opcode::RecvMulti::new(types::Fd(connection.fd), GROUP)
            .build()
            .user_data(u64::from(index) << 2 | RECV);
        self.ring.push(entry)
    }

    #[inline(always)]
    fn received(&mut self, index: u32, result: i32, flags: u32) -> io::Result<()> {
        let (Some(id), true) = (cqueue::buffer_select(flags), result > 0) else {
            return self.receive_failed(index, result, flags);
        };
        let connection = &mut self.connections[index as usize];
        connection.seen = self.tick;
        self.buffers.taken = self.buffers.taken.wrapping_add(1);
        let held = &mut self.buffers.held[usize::from(id)];
        held.length = result as u32;
        held.next = NO_BUFFER;
        let idle = connection.first == NO_BUFFER;
        if idle {
            connection.first = id;
            connection.last = id;
            connection.sent = 0;
        } else {
            self.buffers.held[usize::from(connection.last)].next = id;
            connection.last = id;
        }
        let more = cqueue::more(flags);
        if idle {
            let fd = connection.fd;
            self.send(index, fd, id, 0, result as u32)?;
        }
        if more {
            Ok(())
        } else {
            self.receive_ended(index)
        }
    }

    /// A multishot RECV ended after a receive that succeeded: start another.
    #[cold]
    fn receive_ended(&mut self, index: u32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        connection.receiving = false;
        if connection.ending {
            return self.close_if_done(index);
        }
        self.receive(index)
    }

    #[cold]
    fn receive_failed(&mut self, index: u32, result: i32, flags: u32) -> io::Result<()> {
        if let Some(id) = cqueue::buffer_select(flags) {
            self.buffers.taken = self.buffers.taken.wrapping_add(1);
            self.buffers.give_back(id);
        }
        if cqueue::more(flags) {
            return Ok(());
        }
        let connection = &mut self.connections[index as usize];
        connection.receiving = false;
        match -result {
            _ if connection.ending => {}
            libc::ENOBUFS => {
                connection.starved = true;
                self.starved.push_back(index);
                return Ok(());
            }
            libc::EINTR | libc::EAGAIN => return self.receive(index),
            _ => connection.ending = true,
        }
        self.close_if_done(index)
    }

    /// Receives again on connections that found no buffer, one for each that is
    /// back. A connection takes a buffer only if its data is there, so those
    /// left over must be tried without waiting; returns how much to wait for.
    #[cold]
    fn feed(&mut self) -> io::Result<u32> {
        for _ in 0..self.buffers.available() {
            let Some(index) = self.starved.pop_front() else {
                break;
            };
            let connection = &mut self.connections[index as usize];
            connection.starved = false;
            if connection.ending {
                self.close_if_done(index)?;
            } else {
                self.receive(index)?;
            }
        }
        Ok(u32::from(self.starved.is_empty()))
    }

    /// Queues a SEND of a buffer's bytes from `sent` to `length`.
    #[inline(always)]
    fn send(&mut self, index: u32, fd: RawFd, id: u16, sent: u32, length: u32) -> io::Result<()> {
        // SAFETY: `sent` never exceeds the length of what the buffer holds.
        let start = unsafe { self.buffers.address(id).add(sent as usize) };
        let entry = opcode::Send::new(types::Fd(fd), start, length - sent)
            .flags(SEND_FLAGS)
            .build()
            .user_data(u64::from(index) << 2 | SEND);
        self.ring.push(entry)
    }

    #[inline(always)]
    fn sent(&mut self, index: u32, result: i32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        let id = connection.first;
        let Held { length, next } = self.buffers.held[usize::from(id)];
        if result as u32 != length - connection.sent {
            return self.sent_short(index, result);
        }
        connection.first = next;
        connection.sent = 0;
        let (fd, ending) = (connection.fd, connection.ending);
        self.buffers.give_back(id);
        if next != NO_BUFFER {
            let length = self.buffers.held[usize::from(next)].length;
            self.send(index, fd, next, 0, length)
        } else if ending {
            self.close_if_done(index)
        } else {
            Ok(())
        }
    }

    #[cold]
    fn sent_short(&mut self, index: u32, result: i32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        if result > 0 || matches!(-result, libc::EINTR | libc::EAGAIN) {
            connection.sent += result.max(0) as u32;
            let (fd, id, sent) = (connection.fd, connection.first, connection.sent);
            let length = self.buffers.held[usize::from(id)].length;
            return self.send(index, fd, id, sent, length);
        }
        while connection.first != NO_BUFFER {
            let id = connection.first;
            connection.first = self.buffers.held[usize::from(id)].next;
            self.buffers.give_back(id);
        }
        self.end(index);
        self.close_if_done(index)
    }

    /// Makes the operations in flight on a connection come to their end.
    #[cold]
    fn end(&mut self, index: u32) {
        let connection = &mut self.connections[index as usize];
        connection.ending = true;
        // SAFETY: plain system call on a descriptor the connection owns.
        unsafe {
            libc::shutdown(connection.fd, libc::SHUT_RDWR);
        }
    }

    #[cold]
    fn close_if_done(&mut self, index: u32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        let done = connection.ending
            && !connection.receiving
            && !connection.starved
            && connection.first == NO_BUFFER;
        if done && connection.fd >= 0 {
            close(std::mem::replace(&mut connection.fd, -1));
            self.free.push(index);
            if !self.accepting {
                self.accept()?;
            }
        }
        Ok(())
    }

    fn start_timer(&mut self) -> io::Result<()> {
        let Some(period) = self.timer else {
            return Ok(());
        };
        let entry = opcode::Timeout::new(period).build().user_data(TIMER);
        self.ring.push(entry)
    }

    #[cold]
    fn ticked(&mut self) -> io::Result<()> {
        self.tick = self.tick.wrapping_add(1);
        for index in 0..self.connections.len() {
            let connection = &self.connections[index];
            if connection.fd >= 0
                && !connection.ending
                && self.tick.wrapping_sub(connection.seen) > TICKS
            {
                self.end(index as u32);
                self.close_if_done(index as u32)?;
            }
        }
        self.start_timer()
    }
}

// ---------------------------------------------------------------------- epoll

/// Data of the listener and the timer; anything less is a connection's index.
const LISTENER: u64 = u64::MAX;
const CLOCK: u64 = u64::MAX - 1;
const EVENTS: usize = 256;

fn epoll_open() -> io::Result<RawFd> {
    // SAFETY: plain system call.
    check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })
}

fn epoll_set(poll: RawFd, operation: i32, fd: RawFd, events: u32, data: u64) -> io::Result<()> {
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: the event is valid for the call.
    check(unsafe { libc::epoll_ctl(poll, operation, fd, &mut event) }).map(drop)
}

/// epoll_wait(2); an interruption counts as no events.
#[inline(always)]
fn epoll_wait(
    poll: RawFd,
    events: &mut [libc::epoll_event; EVENTS],
    timeout: i32,
) -> io::Result<usize> {
    // SAFETY: the array is valid for as many events as are asked for.
    let count = unsafe { libc::epoll_wait(poll, events.as_mut_ptr(), EVENTS as i32, timeout) };
    if count < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::Interrupted => Ok(0),
            _ => Err(error),
        };
    }
    Ok(count as usize)
}

struct EpollConn {
    fd: RawFd,
    seen: u32,
    /// What a partial send left over, from `sent` on; while there is any, the
    /// connection waits for EPOLLOUT alone.
    pending: Vec<u8>,
    sent: usize,
}

struct Epoll {
    poll: RawFd,
    clock: RawFd,
    listening: Listening,
    connections: Vec<EpollConn>,
    free: Vec<u32>,
    buffer: Box<[u8]>,
    interest: u32,
    edge: bool,
    accepting: bool,
    tick: u32,
}

fn epoll_server(args: &EpollArgs) -> io::Result<()> {
    let listening = Listening::open(&args.server)?;
    // SAFETY: plain system call on a descriptor just opened.
    check(unsafe { libc::fcntl(listening.fd, libc::F_SETFL, libc::O_NONBLOCK) })?;
    let poll = epoll_open()?;
    let clock = match args.server.timeout {
        Some(timeout) => start_clock(poll, timeout / TICKS)?,
        None => -1,
    };
    let edge = if args.edge {
        (libc::EPOLLET | libc::EPOLLRDHUP) as u32
    } else {
        0
    };
    let mut server = Epoll {
        poll,
        clock,
        listening,
        connections: Vec::new(),
        free: Vec::new(),
        buffer: vec![0u8; args.server.size as usize].into_boxed_slice(),
        interest: libc::EPOLLIN as u32 | edge,
        edge: args.edge,
        accepting: false,
        tick: 0,
    };
    server.listen(true)?;
    server.listening.announce()?;
    server.run()
}

/// Has a periodic timer report to the epoll set.
fn start_clock(poll: RawFd, period: Duration) -> io::Result<RawFd> {
    let flags = libc::TFD_NONBLOCK | libc::TFD_CLOEXEC;
    // SAFETY: plain system call.
    let clock = check(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) })?;
    let period = libc::timespec {
        tv_sec: period.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(period.subsec_nanos() as i32),
    };
    let setting = libc::itimerspec {
        it_interval: period,
        it_value: period,
    };
    // SAFETY: the setting is valid, and the old one is not asked for.
    check(unsafe { libc::timerfd_settime(clock, 0, &setting, std::ptr::null_mut()) })?;
    epoll_set(
        poll,
        libc::EPOLL_CTL_ADD,
        clock,
        libc::EPOLLIN as u32,
        CLOCK,
    )?;
    Ok(clock)
}

impl Epoll {
    #[inline(never)]
    fn run(&mut self) -> io::Result<()> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        loop {
            let count = epoll_wait(self.poll, &mut events, -1)?;
            for event in &events[..count] {
                match event.u64 {
                    LISTENER => self.accept()?,
                    CLOCK => self.ticked()?,
                    index => self.ready(index as u32, event.events)?,
                }
            }
        }
    }

    /// Starts or stops watching for new connections.
    fn listen(&mut self, on: bool) -> io::Result<()> {
        if self.accepting == on {
            return Ok(());
        }
        self.accepting = on;
        let (operation, events) = if on {
            (libc::EPOLL_CTL_ADD, libc::EPOLLIN as u32)
        } else {
            (libc::EPOLL_CTL_DEL, 0)
        };
        epoll_set(self.poll, operation, self.listening.fd, events, LISTENER)
    }

    #[cold]
    fn accept(&mut self) -> io::Result<()> {
        loop {
            // SAFETY: the peer's address is not asked for.
            let fd = unsafe {
                libc::accept4(
                    self.listening.fd,
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                    libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
                )
            };
            if fd < 0 {
                let error = errno() as i32;
                return match error {
                    libc::EAGAIN => Ok(()),
                    _ if accept_again(error) => continue,
                    // Watching goes on when a connection closes.
                    _ if accept_exhausted(error) => self.listen(false),
                    _ => Err(io::Error::from_raw_os_error(error)),
                };
            }
            self.listening.prepare(fd);
            let index = self.free.pop().unwrap_or(self.connections.len() as u32);
            let connection = EpollConn {
                fd,
                seen: self.tick,
                pending: Vec::new(),
                sent: 0,
            };
            if index as usize == self.connections.len() {
                self.connections.push(connection);
            } else {
                self.connections[index as usize] = connection;
            }
            self.watch(libc::EPOLL_CTL_ADD, index, self.interest)?;
        }
    }

    fn watch(&self, operation: i32, index: u32, events: u32) -> io::Result<()> {
        let fd = self.connections[index as usize].fd;
        epoll_set(self.poll, operation, fd, events, u64::from(index))
    }

    #[inline(always)]
    fn ready(&mut self, index: u32, events: u32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        if !connection.pending.is_empty() {
            return self.flush(index);
        }
        connection.seen = self.tick;
        let fd = connection.fd;
        // An edge is consumed only when nothing is left to receive: a short
        // receive shows that, except of the end that the event has announced.
        let ending = events & (libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) as u32 != 0;
        loop {
            let received = recv(fd, &mut self.buffer);
            if received <= 0 {
                return self.receive_failed(index, received);
            }
            let received = received as usize;
            let sent = send(fd, &self.buffer[..received]);
            if sent != received as isize {
                return self.sent_short(index, received, sent);
            }
            if !self.edge || (received < self.buffer.len() && !ending) {
                return Ok(());
            }
        }
    }

    #[cold]
    fn receive_failed(&mut self, index: u32, result: isize) -> io::Result<()> {
        match -result as i32 {
            libc::EAGAIN => Ok(()),
            // Rearming brings the event again where it is edge-triggered.
            libc::EINTR => self.watch(libc::EPOLL_CTL_MOD, index, self.interest),
            _ => self.close(index),
        }
    }

    #[cold]
    fn sent_short(&mut self, index: u32, received: usize, sent: isize) -> io::Result<()> {
        let sent = match -sent as i32 {
            libc::EAGAIN | libc::EINTR => 0,
            _ if sent < 0 => return self.close(index),
            _ => sent as usize,
        };
        let connection = &mut self.connections[index as usize];
        connection
            .pending
            .extend_from_slice(&self.buffer[sent..received]);
        connection.sent = 0;
        let edge = self.interest & libc::EPOLLET as u32;
        self.watch(libc::EPOLL_CTL_MOD, index, libc::EPOLLOUT as u32 | edge)
    }

    #[cold]
    fn flush(&mut self, index: u32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        // Edge-triggered, only EAGAIN brings another event.
        loop {
            let sent = send(connection.fd, &connection.pending[connection.sent..]);
            match -sent as i32 {
                libc::EAGAIN => return Ok(()),
                libc::EINTR => continue,
                _ if sent < 0 => return self.close(index),
                _ => connection.sent += sent as usize,
            }
            if connection.sent == connection.pending.len() {
                connection.pending.clear();
                connection.sent = 0;
                return self.watch(libc::EPOLL_CTL_MOD, index, self.interest);
            }
        }
    }

    #[cold]
    fn close(&mut self, index: u32) -> io::Result<()> {
        let connection = &mut self.connections[index as usize];
        close(std::mem::replace(&mut connection.fd, -1));
        connection.pending = Vec::new();
        self.free.push(index);
        self.listen(true)
    }

    #[cold]
    fn ticked(&mut self) -> io::Result<()> {
        let mut expirations = 0u64;
        // SAFETY: the count is valid for writes of its eight bytes.
        unsafe {
            libc::read(self.clock, (&raw mut expirations).cast(), 8);
        }
        self.tick = self.tick.wrapping_add(1);
        for index in 0..self.connections.len() {
            let connection = &self.connections[index];
            if connection.fd >= 0 && self.tick.wrapping_sub(connection.seen) > TICKS {
                // The end shows as an event, in its turn: another event for this
                // connection may be in the batch at hand.
                // SAFETY: plain system call on a descriptor the connection owns.
                unsafe {
                    libc::shutdown(connection.fd, libc::SHUT_RDWR);
                }
            }
        }
        Ok(())
    }
}

// ----------------------------------------------------------------------- load

/// The pattern repeats after so many bytes, a prime, so that no message size
/// makes two messages near one another alike.
const PERIOD: usize = 65_521;
/// The most that is sent or received with one call.
const CHUNK: usize = 256 * 1024;
const STALL: Duration = Duration::from_secs(10);

struct LoadConn {
    fd: RawFd,
    /// Where in the pattern the next byte to send and to receive are.
    send_at: usize,
    receive_at: usize,
    /// Bytes allowed out and not sent yet.
    unsent: usize,
    /// Messages issued and not echoed yet, and bytes received of the first.
    flying: u32,
    partial: usize,
    /// When the messages in flight were issued: a circle of `depth` times.
    times: Box<[u64]>,
    oldest: u32,
    waiting: bool,
}

struct Load {
    poll: RawFd,
    connections: Vec<LoadConn>,
    pattern: Box<[u8]>,
    buffer: Box<[u8]>,
    size: usize,
    depth: u32,
    /// Messages still to be issued.
    budget: u64,
    done: u64,
    warmup: u64,
    start: Instant,
    started: u64,
    started_cpu: f64,
    histogram: Histogram,
}

fn load(args: &LoadArgs) -> io::Result<()> {
    let warmup = args.warmup.unwrap_or(args.messages / 10);
    let total = args.messages.saturating_add(warmup);
    let size = args.size as usize;
    let poll = epoll_open()?;
    let mut connections = Vec::with_capacity(args.connections as usize);
    for index in 0..u64::from(args.connections) {
        let fd = connect(args)?;
        epoll_set(poll, libc::EPOLL_CTL_ADD, fd, libc::EPOLLIN as u32, index)?;
        let offset = (index * 7919 % PERIOD as u64) as usize;
        connections.push(LoadConn {
            fd,
            send_at: offset,
            receive_at: offset,
            unsent: 0,
            flying: 0,
            partial: 0,
            times: vec![0; args.depth as usize].into_boxed_slice(),
            oldest: 0,
            waiting: false,
        });
    }
    let mut load = Load {
        poll,
        connections,
        pattern: pattern(),
        buffer: vec![0; CHUNK].into_boxed_slice(),
        size,
        depth: args.depth,
        budget: total,
        done: 0,
        warmup,
        start: Instant::now(),
        started: 0,
        started_cpu: cpu_seconds(),
        histogram: Histogram::new(),
    };
    load.run(total)?;
    let seconds = (load.now() - load.started) as f64 / 1e9;
    let cpu = cpu_seconds() - load.started_cpu;
    let rate = args.messages as f64 / seconds;
    let p50 = load.histogram.quantile(0.50) / 1e3;
    let p99 = load.histogram.quantile(0.99) / 1e3;
    let messages = args.messages;
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(
            out,
            "{{\"messages\":{messages},\"warmup\":{warmup},\"seconds\":{seconds:.6},\
             \"messages_per_second\":{rate:.1},\"p50_us\":{p50:.2},\"p99_us\":{p99:.2},\
             \"load_cpu_seconds\":{cpu:.6}}}"
        )?;
    } else {
        writeln!(
            out,
            "{messages} messages in {seconds:.3} s: {rate:.0} messages/s, \
             p50 {p50:.1} us, p99 {p99:.1} us, load busy {:.0} %",
            100.0 * cpu / seconds
        )?;
    }
    out.flush()
}

fn connect(args: &LoadArgs) -> io::Result<RawFd> {
    if let Some(path) = &args.unix {
        let stream = UnixStream::connect(path)?;
        stream.set_nonblocking(true)?;
        return Ok(stream.into_raw_fd());
    }
    let name = args.connect.as_deref().unwrap_or_default();
    let address = name
        .to_socket_addrs()?
        .next()
        .ok_or_else(|| other(format!("{name} has no address")))?;
    let stream = TcpStream::connect_timeout(&address, STALL)?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(stream.into_raw_fd())
}

/// One period of random-looking bytes and a chunk more, so that what follows
/// any place in the period is contiguous.
fn pattern() -> Box<[u8]> {
    let mut bytes = Vec::with_capacity(PERIOD + CHUNK);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..PERIOD {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.push((state >> 32) as u8);
    }
    while bytes.len() < PERIOD + CHUNK {
        let more = (PERIOD + CHUNK - bytes.len()).min(PERIOD);
        bytes.extend_from_within(..more);
    }
    bytes.into_boxed_slice()
}

/// Processor time of this process so far.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the timespec is valid for writes.
    unsafe {
        libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time);
    }
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

impl Load {
    #[inline(always)]
    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    fn run(&mut self, total: u64) -> io::Result<()> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        self.start = Instant::now();
        self.started_cpu = cpu_seconds();
        for index in 0..self.connections.len() {
            let now = self.now();
            self.issue(index, self.depth, now)?;
        }
        let mut progress = self.now();
        while self.done < total {
            let count = epoll_wait(self.poll, &mut events, 1000)?;
            if count == 0 {
                if self.now() - progress > STALL.as_nanos() as u64 {
                    return Err(other(format!(
                        "stalled: {} of {total} messages echoed",
                        self.done
                    )));
                }
                continue;
            }
            for event in &events[..count] {
                let index = event.u64 as usize;
                if event.events & libc::EPOLLOUT as u32 != 0 {
                    self.flush(index)?;
                }
                if event.events & !(libc::EPOLLOUT as u32) != 0 {
                    self.receive(index)?;
                }
            }
            progress = self.now();
        }
        Ok(())
    }

    /// Issues up to `count` messages on a connection and sends what it can.
    #[inline(always)]
    fn issue(&mut self, index: usize, count: u32, now: u64) -> io::Result<()> {
        let count = u64::from(count).min(self.budget) as u32;
        if count == 0 {
            return Ok(());
        }
        self.budget -= u64::from(count);
        let connection = &mut self.connections[index];
        let mut slot = connection.oldest + connection.flying;
        for _ in 0..count {
            if slot >= self.depth {
                slot -= self.depth;
            }
            connection.times[slot as usize] = now;
            slot += 1;
        }
        connection.flying += count;
        connection.unsent += self.size * count as usize;
        if connection.waiting {
            return Ok(());
        }
        self.flush(index)
    }

    #[inline(always)]
    fn flush(&mut self, index: usize) -> io::Result<()> {
        let connection = &mut self.connections[index];
        while connection.unsent > 0 {
            let length = connection.unsent.min(CHUNK);
            let from = connection.send_at;
            let sent = send(connection.fd, &self.pattern[from..from + length]);
            if sent < 0 {
                match -sent as i32 {
                    libc::EAGAIN => return self.wait_for_room(index, true),
                    libc::EINTR => continue,
                    error => return Err(io::Error::from_raw_os_error(error)),
                }
            }
            connection.unsent -= sent as usize;
            connection.send_at = (from + sent as usize) % PERIOD;
        }
        if connection.waiting {
            return self.wait_for_room(index, false);
        }
        Ok(())
    }

    #[cold]
    fn wait_for_room(&mut self, index: usize, on: bool) -> io::Result<()> {
        let connection = &mut self.connections[index];
        if connection.waiting == on {
            return Ok(());
        }
        connection.waiting = on;
        let out = if on { libc::EPOLLOUT } else { 0 };
        epoll_set(
            self.poll,
            libc::EPOLL_CTL_MOD,
            connection.fd,
            (libc::EPOLLIN | out) as u32,
            index as u64,
        )
    }

    #[inline(always)]
    fn receive(&mut self, index: usize) -> io::Result<()> {
        let connection = &mut self.connections[index];
        let received = recv(connection.fd, &mut self.buffer);
        if received <= 0 {
            return match -received as i32 {
                libc::EAGAIN | libc::EINTR => Ok(()),
                0 => Err(other(format!("connection {index} was closed"))),
                error => Err(io::Error::from_raw_os_error(error)),
            };
        }
        let received = received as usize;
        let from = connection.receive_at;
        if self.buffer[..received] != self.pattern[from..from + received] {
            return Err(other(format!("connection {index} echoed wrong bytes")));
        }
        connection.receive_at = (from + received) % PERIOD;
        connection.partial += received;
        if connection.partial < self.size {
            return Ok(());
        }
        let count = (connection.partial / self.size) as u32;
        connection.partial %= self.size;
        if count > connection.flying {
            return Err(other(format!("connection {index} echoed too much")));
        }
        let now = self.start.elapsed().as_nanos() as u64;
        for _ in 0..count {
            let latency = now - connection.times[connection.oldest as usize];
            connection.oldest += 1;
            if connection.oldest == self.depth {
                connection.oldest = 0;
            }
            self.done += 1;
            if self.done > self.warmup {
                self.histogram.add(latency);
            } else if self.done == self.warmup {
                self.started = now;
                self.started_cpu = cpu_seconds();
            }
        }
        connection.flying -= count;
        self.issue(index, count, now)
    }
}

/// Counts by value, 32 buckets to each doubling: within about 3 %.
struct Histogram {
    buckets: Box<[u64]>,
    count: u64,
}

impl Histogram {
    fn new() -> Self {
        Self {
            buckets: vec![0; 64 * 32].into_boxed_slice(),
            count: 0,
        }
    }

    #[inline(always)]
    fn add(&mut self, value: u64) {
        let value = value.max(32);
        let octave = value.ilog2();
        let step = value >> (octave - 5) & 31;
        self.buckets[(octave as usize) << 5 | step as usize] += 1;
        self.count += 1;
    }

    /// The middle of the bucket that the quantile falls into.
    fn quantile(&self, quantile: f64) -> f64 {
        let rank = (self.count as f64 * quantile).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                let scale = 2f64.powi((bucket >> 5) as i32 - 5);
                return (32.0 + (bucket & 31) as f64 + 0.5) * scale;
            }
        }
        0.0
    }
}
