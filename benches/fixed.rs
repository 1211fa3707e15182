//! Whether registered buffers pay for ordinary receives and sends: plain calls, RECV and SEND on a ring, and READ_FIXED and
//! WRITE_FIXED of a registered buffer, each moving a message that need not wait, by one thread.
//!
//! `cargo bench --bench fixed [ROUNDS]` (9 rounds if not said, at least 5). One figure a line: nanoseconds of the thread's CPU time for
//! one message sent and received, the minimum over rounds that take turns, and the ratio to the plain calls. Every ring operation
//! costs an enter of its own here, the worst case for a ring; so RECV and SEND beside READ_FIXED and WRITE_FIXED are the comparison
//! that tells what the registration is worth.
#![allow(unsafe_code)]

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use io_uring::{IoUring, opcode, types};

const WAYS: [&str; 3] = ["plain", "RECV/SEND", "READ/WRITE_FIXED"];
const SIZES: [(usize, u32); 3] = [(64, 20_000), (16 << 10, 10_000), (64 << 10, 3_000)];

struct Bench {
    ring: IoUring,
    /// Both are registered: the first with index 0.
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
}

impl Bench {
    fn new() -> Bench {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(8)
            .expect("a ring");
        let mut outgoing = vec![7; 64 << 10];
        let mut incoming = vec![0; 64 << 10];
        let buffers = [&mut outgoing, &mut incoming].map(|buffer| libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        });
        // SAFETY: both vectors live, unmoved on the heap, as long as the ring.
        unsafe { ring.submitter().register_buffers(&buffers) }.expect("128 KiB of locked memory");
        Bench {
            ring,
            outgoing,
            incoming,
        }
    }

    fn run(&mut self, entry: io_uring::squeue::Entry) -> usize {
        // SAFETY: the entry names the bench's buffers, and this waits for its completion.
        unsafe { self.ring.submission().push(&entry) }.expect("room for one");
        self.ring.submit_and_wait(1).expect("an enter");
        let res = self
            .ring
            .completion()
            .next()
            .expect("a completion")
            .result();
        usize::try_from(res).unwrap_or_else(|_| panic!("{}", io::Error::from_raw_os_error(-res)))
    }

    fn send(&mut self, way: usize, fd: RawFd, len: usize) -> usize {
        let at = self.outgoing.as_ptr();
        match way {
            // SAFETY: `len` bytes of the buffer.
            0 => usize::try_from(unsafe { libc::send(fd, at.cast(), len, libc::MSG_DONTWAIT) })
                .expect("a send"),
            1 => self.run(opcode::Send::new(types::Fd(fd), at, len as u32).build()),
            _ => self.run(opcode::WriteFixed::new(types::Fd(fd), at, len as u32, 0).build()),
        }
    }

    fn receive(&mut self, way: usize, fd: RawFd, len: usize) -> usize {
        let at = self.incoming.as_mut_ptr();
        match way {
            // SAFETY: `len` bytes of the buffer.
            0 => usize::try_from(unsafe { libc::recv(fd, at.cast(), len, libc::MSG_DONTWAIT) })
                .expect("a receive"),
            1 => self.run(opcode::Recv::new(types::Fd(fd), at, len as u32).build()),
            _ => self.run(opcode::ReadFixed::new(types::Fd(fd), at, len as u32, 1).build()),
        }
    }

    /// Nanoseconds of CPU time for one message.
    fn time(&mut self, way: usize, pair: &(OwnedFd, OwnedFd), len: usize, messages: u32) -> f64 {
        let (left, right) = (pair.0.as_raw_fd(), pair.1.as_raw_fd());
        let before = cpu_ns();
        for _ in 0..messages {
            let (mut sent, mut received) = (0, 0);
            while received < len {
                if sent < len {
                    sent += self.send(way, left, len - sent);
                }
                received += self.receive(way, right, len - received);
            }
        }
        (cpu_ns() - before) as f64 / f64::from(messages)
    }
}

fn cpu_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: it writes the one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn tcp_pair() -> (OwnedFd, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let left = TcpStream::connect(listener.local_addr().expect("an address")).expect("a peer");
    let (right, _) = listener.accept().expect("a connection");
    left.set_nodelay(true).expect("TCP_NODELAY");
    (left.into(), right.into())
}

fn main() {
    // Cargo passes `--bench`.
    let rounds = std::env::args().find_map(|argument| argument.parse().ok());
    let rounds: u32 = rounds.unwrap_or(9).max(5);
    let mut bench = Bench::new();
    let unix = UnixStream::pair().expect("a pair");
    for (name, pair) in [
        ("tcp", tcp_pair()),
        ("unix", (unix.0.into(), unix.1.into())),
    ] {
        for (len, messages) in SIZES {
            let mut least = [f64::MAX; WAYS.len()];
            for _ in 0..rounds {
                for (way, least) in least.iter_mut().enumerate() {
                    *least = least.min(bench.time(way, &pair, len, messages));
                }
            }
            for (way, ns) in WAYS.iter().zip(least) {
                println!(
                    "{name:4} {len:6} B {ns:10.0} ns {:5.2}  {way}",
                    ns / least[0]
                );
            }
        }
    }
}
