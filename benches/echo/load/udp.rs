//! Datagrams: every flow keeps a window in flight; what does not come back in time is lost, is counted and makes room.
//!
//! Sent with one sendmmsg for many, or, by a peer that segments, with one sendmsg that the kernel cuts (UDP_SEGMENT); such a peer
//! also receives what is put together (UDP_GRO).
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::mem::zeroed;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{IntoRawFd, RawFd};
use std::time::{Duration, Instant};

use clap::Args;
use hdrhistogram::Histogram;

use super::{Pattern, Report, WindowArgs, latencies};
use crate::sys::{
    EVENTS, SegmentControl, epoll_open, epoll_set, epoll_wait, errno, other, segment_bytes,
    set_option, widen_buffers,
};

/// Options of this load.
#[derive(Args)]
pub struct UdpArgs {
    /// UDP address to send to.
    #[arg(long, value_name = "HOST:PORT")]
    connect: SocketAddr,
    #[command(flatten)]
    window: WindowArgs,
    /// Sockets to send from.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=4096))]
    flows: u32,
    /// Datagrams in flight on each flow.
    #[arg(long = "window", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    in_flight: u32,
    /// Bytes in a datagram, of which eight are its number.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(16..=16_384))]
    size: u32,
    /// Send and receive many as one, as a peer with segmentation offload does.
    #[arg(long)]
    segmented: bool,
    /// Datagrams to measure, over all flows, the lost ones among them.
    #[arg(long, default_value_t = 400_000, value_parser = clap::value_parser!(u64).range(1..))]
    messages: u64,
    /// Datagrams before the measurement [default: a tenth of --messages].
    #[arg(long)]
    warmup: Option<u64>,
    /// After how long a datagram is lost.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    loss_after: u64,
}

/// Datagrams sent or received with one call at most.
const BATCH: usize = 64;
/// The most bytes of one send that is cut: 64 KiB less the headers of IPv6.
const SEGMENTED_BYTES: usize = 65_487;
/// The number in front of the pattern.
const NUMBER_BYTES: usize = 8;

struct Flow {
    fd: RawFd,
    /// The number of the oldest datagram in `sent`, and of the next one.
    oldest: u64,
    next: u64,
    /// When each was sent, zero once it is echoed or lost.
    sent: VecDeque<u64>,
    flying: u32,
}

/// Datagrams for one call; the pointers are into memory that stays where it is.
struct Batch {
    headers: Vec<libc::mmsghdr>,
    _vectors: Vec<libc::iovec>,
    buffers: Vec<Box<[u8]>>,
}

impl Batch {
    fn new(size: usize) -> Self {
        let mut buffers: Vec<Box<[u8]>> = (0..BATCH).map(|_| vec![0; size].into()).collect();
        let mut vectors: Vec<libc::iovec> = buffers
            .iter_mut()
            .map(|buffer| libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            })
            .collect();
        let headers = vectors
            .iter_mut()
            .map(|vector| {
                // SAFETY: all-zero is a valid value.
                let mut header: libc::mmsghdr = unsafe { zeroed() };
                header.msg_hdr.msg_iov = vector;
                header.msg_hdr.msg_iovlen = 1;
                header
            })
            .collect();
        Self {
            headers,
            _vectors: vectors,
            buffers,
        }
    }

    fn receive(&mut self, fd: RawFd) -> io::Result<usize> {
        let headers = self.headers.as_mut_ptr();
        // SAFETY: the headers are valid, and point to buffers of the lengths they say.
        let count = unsafe {
            libc::recvmmsg(
                fd,
                headers,
                BATCH as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        counted(count)
    }

    fn send(&mut self, fd: RawFd, from: usize, to: usize) -> io::Result<usize> {
        let headers = self.headers[from..to].as_mut_ptr();
        // SAFETY: as above.
        let count = unsafe { libc::sendmmsg(fd, headers, (to - from) as u32, libc::MSG_DONTWAIT) };
        counted(count)
    }
}

/// How many datagrams a call took; that there were none, or no room for any, is no failure.
fn counted(count: i32) -> io::Result<usize> {
    if count >= 0 {
        return Ok(count as usize);
    }
    match errno() as i32 {
        libc::EAGAIN | libc::EINTR | libc::ENOBUFS => Ok(0),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Datagrams in one piece of memory, which the kernel cuts on the way out and puts together on the way in.
struct Whole {
    bytes: Vec<u8>,
    /// Of the datagrams of one send.
    most: usize,
}

impl Whole {
    fn new(size: usize) -> Self {
        Self {
            // One receive brings no more.
            bytes: vec![0; 65_536],
            most: BATCH.min(SEGMENTED_BYTES / size),
        }
    }

    /// Receives: how many bytes, and the bytes of each datagram in them.
    fn receive(&mut self, fd: RawFd) -> io::Result<(usize, usize)> {
        let mut vector = libc::iovec {
            iov_base: self.bytes.as_mut_ptr().cast(),
            iov_len: self.bytes.len(),
        };
        let mut control = SegmentControl::default();
        // SAFETY: all-zero is a valid value.
        let mut header: libc::msghdr = unsafe { zeroed() };
        header.msg_iov = &raw mut vector;
        header.msg_iovlen = 1;
        control.lend(&mut header);
        // SAFETY: the header points to memory of the lengths it says.
        let count = unsafe { libc::recvmsg(fd, &raw mut header, libc::MSG_DONTWAIT) };
        let count = counted(count as i32)?;
        Ok((count, segment_bytes(&header).unwrap_or(count)))
    }

    /// Sends so many datagrams of `size` bytes: whether there was room.
    fn send(&mut self, fd: RawFd, count: usize, size: usize) -> io::Result<bool> {
        let mut vector = libc::iovec {
            iov_base: self.bytes.as_mut_ptr().cast(),
            iov_len: count * size,
        };
        let mut control = SegmentControl::cutting(size as u16);
        // SAFETY: as above.
        let mut header: libc::msghdr = unsafe { zeroed() };
        header.msg_iov = &raw mut vector;
        header.msg_iovlen = 1;
        if count > 1 {
            control.lend(&mut header);
        }
        // SAFETY: as above.
        let sent = unsafe { libc::sendmsg(fd, &raw const header, libc::MSG_DONTWAIT) };
        Ok(counted(sent as i32)? > 0)
    }
}

struct Load {
    poll: RawFd,
    flows: Vec<Flow>,
    outgoing: Batch,
    incoming: Batch,
    /// For a peer that segments.
    whole: Option<Whole>,
    pattern: Pattern,
    size: usize,
    in_flight: u32,
    loss_after: u64,
    unissued: u64,
    unsettled: u64,
    lost: u64,
    start: Instant,
    latencies: Histogram<u64>,
}

/// Runs the load.
pub fn load(args: &UdpArgs) -> io::Result<()> {
    let warmup = args.warmup.unwrap_or(args.messages / 10);
    let size = args.size as usize;
    let poll = epoll_open()?;
    let mut flows = Vec::with_capacity(args.flows as usize);
    for index in 0..u64::from(args.flows) {
        let own = SocketAddr::new(
            if args.connect.is_ipv4() {
                [0; 4].into()
            } else {
                [0u16; 8].into()
            },
            0,
        );
        let socket = UdpSocket::bind(own)?;
        socket.connect(args.connect)?;
        let fd = socket.into_raw_fd();
        widen_buffers(fd);
        if args.segmented {
            set_option(fd, libc::SOL_UDP, libc::UDP_GRO, 1)?;
        }
        epoll_set(poll, libc::EPOLL_CTL_ADD, fd, libc::EPOLLIN as u32, index)?;
        flows.push(Flow {
            fd,
            oldest: 0,
            next: 0,
            sent: VecDeque::new(),
            flying: 0,
        });
    }
    let mut load = Load {
        poll,
        flows,
        outgoing: Batch::new(size),
        // One byte more shows a datagram that has grown.
        incoming: Batch::new(size + 1),
        whole: args.segmented.then(|| Whole::new(size)),
        pattern: Pattern::new(size, size),
        size,
        in_flight: args.in_flight,
        loss_after: Duration::from_millis(args.loss_after).as_nanos() as u64,
        unissued: 0,
        unsettled: 0,
        lost: 0,
        start: Instant::now(),
        latencies: latencies(),
    };
    load.run(warmup)?;
    load.latencies.reset();
    load.lost = 0;
    let measured = args
        .window
        .measure(args.messages, |messages| load.run(messages))?;
    if load.lost >= args.messages {
        return Err(other("every datagram was lost"));
    }
    Report {
        kind: "udp",
        messages: args.messages.saturating_sub(load.lost),
        warmup,
        measured,
        latencies: load.latencies,
        more: vec![("lost", load.lost.into())],
    }
    .print(&args.window)
}

impl Load {
    fn now(&self) -> u64 {
        // Never zero, which stands for a datagram that is settled.
        self.start.elapsed().as_nanos() as u64 + 1
    }

    /// Sends so many datagrams and waits until each is echoed or lost.
    fn run(&mut self, messages: u64) -> io::Result<()> {
        self.unissued = messages;
        self.unsettled = messages;
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        for index in 0..self.flows.len() {
            self.fill(index)?;
        }
        // Losses are looked for at a tenth of the time after which a datagram is one.
        let every = self.loss_after / 10;
        let wait = (every / 1_000_000).max(1) as i32;
        let mut looked = self.now();
        while self.unsettled > 0 {
            let count = epoll_wait(self.poll, &mut events, wait)?;
            for event in &events[..count] {
                self.receive(event.u64 as usize)?;
            }
            let now = self.now();
            if now - looked > every {
                looked = now;
                for index in 0..self.flows.len() {
                    self.give_up(index, now);
                    self.fill(index)?;
                }
            }
        }
        Ok(())
    }

    /// Sends until the window is full.
    #[inline(always)]
    fn fill(&mut self, index: usize) -> io::Result<()> {
        loop {
            let flow = &mut self.flows[index];
            let room = u64::from(self.in_flight - flow.flying);
            let most = self.whole.as_ref().map_or(BATCH, |whole| whole.most);
            let count = room.min(self.unissued).min(most as u64) as usize;
            if count == 0 {
                return Ok(());
            }
            let write = |number: u64, buffer: &mut [u8]| {
                buffer[..NUMBER_BYTES].copy_from_slice(&number.to_le_bytes());
                let rest = expected(&self.pattern, index, number, self.size);
                buffer[NUMBER_BYTES..].copy_from_slice(rest);
            };
            let now;
            let sent = match &mut self.whole {
                None => {
                    let buffers = &mut self.outgoing.buffers[..count];
                    (flow.next..)
                        .zip(buffers)
                        .for_each(|(number, buffer)| write(number, buffer));
                    now = self.start.elapsed().as_nanos() as u64 + 1;
                    self.outgoing.send(flow.fd, 0, count)?
                }
                Some(whole) => {
                    let buffers = whole.bytes.chunks_exact_mut(self.size).take(count);
                    (flow.next..)
                        .zip(buffers)
                        .for_each(|(number, buffer)| write(number, buffer));
                    now = self.start.elapsed().as_nanos() as u64 + 1;
                    count * usize::from(whole.send(flow.fd, count, self.size)?)
                }
            };
            flow.next += sent as u64;
            flow.flying += sent as u32;
            flow.sent.extend(std::iter::repeat_n(now, sent));
            self.unissued -= sent as u64;
            if sent < count {
                // No room now: more is sent when something comes back or is given up.
                return Ok(());
            }
        }
    }

    #[inline(always)]
    fn receive(&mut self, index: usize) -> io::Result<()> {
        let flow = &mut self.flows[index];
        let mut echoes = Echoes {
            index,
            size: self.size,
            pattern: &self.pattern,
            latencies: &mut self.latencies,
            unsettled: &mut self.unsettled,
        };
        match &mut self.whole {
            None => {
                let count = self.incoming.receive(flow.fd)?;
                let now = self.start.elapsed().as_nanos() as u64 + 1;
                let headers = &self.incoming.headers[..count];
                for (header, buffer) in headers.iter().zip(&self.incoming.buffers) {
                    echoes.settle(flow, &buffer[..header.msg_len as usize], now)?;
                }
            }
            Some(whole) => {
                let (count, each) = whole.receive(flow.fd)?;
                let now = self.start.elapsed().as_nanos() as u64 + 1;
                for bytes in whole.bytes[..count].chunks(each.max(1)) {
                    echoes.settle(flow, bytes, now)?;
                }
            }
        }
        while flow.sent.front() == Some(&0) {
            flow.sent.pop_front();
            flow.oldest += 1;
        }
        self.fill(index)
    }

    /// Counts what was sent too long ago as lost.
    fn give_up(&mut self, index: usize, now: u64) {
        let flow = &mut self.flows[index];
        for sent in &mut flow.sent {
            if *sent > 0 && now - *sent > self.loss_after {
                *sent = 0;
                flow.flying -= 1;
                self.unsettled -= 1;
                self.lost += 1;
            }
        }
        while flow.sent.front() == Some(&0) {
            flow.sent.pop_front();
            flow.oldest += 1;
        }
    }
}

/// What came back on a flow.
struct Echoes<'a> {
    index: usize,
    size: usize,
    pattern: &'a Pattern,
    latencies: &'a mut Histogram<u64>,
    unsettled: &'a mut u64,
}

impl Echoes<'_> {
    /// Verifies one datagram and counts it.
    #[inline(always)]
    fn settle(&mut self, flow: &mut Flow, bytes: &[u8], now: u64) -> io::Result<()> {
        let (index, size) = (self.index, self.size);
        if bytes.len() != size {
            return Err(other(format!(
                "flow {index} echoed {} bytes of {size}",
                bytes.len(),
            )));
        }
        let (number, rest) = bytes.split_at(NUMBER_BYTES);
        let number = u64::from_le_bytes(number.try_into().expect("eight bytes"));
        if number >= flow.next || rest != expected(self.pattern, index, number, size) {
            return Err(other(format!("flow {index} echoed wrong bytes")));
        }
        // One that was given up may still come; it has been counted already.
        let Some(place) = number.checked_sub(flow.oldest) else {
            return Ok(());
        };
        let sent = std::mem::take(&mut flow.sent[place as usize]);
        if sent > 0 {
            self.latencies.saturating_record(now - sent);
            flow.flying -= 1;
            *self.unsettled -= 1;
        }
        Ok(())
    }
}

/// What follows the number in a datagram: a piece of the pattern that is the flow's and the datagram's own.
#[inline(always)]
fn expected(pattern: &Pattern, index: usize, number: u64, size: usize) -> &[u8] {
    let place = pattern.after(pattern.start(index), (number % 1_000_000) as usize * 61);
    pattern.at(place, size - NUMBER_BYTES)
}
