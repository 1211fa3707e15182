//! A proxy with epoll, as one would write it by hand: level-triggered, one receive buffer (or one pipe) for all connections.
//!
//! What a receiver has no room for is kept for its way alone, which then waits for room and receives nothing: so at most one buffer
//! (or pipe) for each way.
#![allow(unsafe_code)]

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{IntoRawFd, RawFd};

use clap::Args;

use super::{ListenArgs, Listening, accept_again, put};
use crate::sys::{EVENTS, check, close, epoll_open, epoll_set, epoll_wait, errno, recv, send};

/// Options of this server.
#[derive(Args)]
pub struct EpollProxyArgs {
    #[command(flatten)]
    listen: ListenArgs,
    /// Where connections go.
    #[arg(long, value_name = "HOST:PORT")]
    upstream: SocketAddr,
    /// By splice(2) through pipes, rather than recv(2) and send(2).
    #[arg(long)]
    splice: bool,
}

/// Data of the listener; anything less is a connection's index, doubled, and the side.
const LISTENER: u64 = u64::MAX;

/// The two ends of a pipe.
type Pipe = [RawFd; 2];

/// What a way received and its receiver has no room for.
enum Kept {
    Nothing,
    /// From the index on.
    Bytes(Vec<u8>, usize),
    /// So many are in the pipe.
    Piped(Pipe, usize),
}

/// Way 0 leads from side 0, the client, to side 1.
struct Pair {
    fds: [RawFd; 2],
    kept: [Kept; 2],
    /// The way's sender has ended its stream.
    ended: [bool; 2],
    interest: [u32; 2],
}

struct Proxy {
    poll: RawFd,
    listening: Listening,
    upstream: SocketAddr,
    splice: bool,
    pairs: Vec<Pair>,
    free: Vec<u32>,
    /// Closed in this batch of events, of which later ones may still name them.
    closed: Vec<u32>,
    buffer: Box<[u8]>,
    /// Empty pipes; the last was used last.
    pipes: Vec<Pipe>,
}

/// What became of a way.
#[derive(PartialEq)]
enum Way {
    Goes,
    /// A side is broken, and so is the pair.
    Broken,
}

pub fn serve(args: &EpollProxyArgs) -> io::Result<()> {
    args.listen.streams_only()?;
    let listening = Listening::open(&args.listen)?;
    // SAFETY: plain system call on a descriptor just opened.
    check(unsafe { libc::fcntl(listening.fd, libc::F_SETFL, libc::O_NONBLOCK) })?;
    let poll = epoll_open()?;
    let input = libc::EPOLLIN as u32;
    epoll_set(poll, libc::EPOLL_CTL_ADD, listening.fd, input, LISTENER)?;
    let mut proxy = Proxy {
        poll,
        listening,
        upstream: args.upstream,
        splice: args.splice,
        pairs: Vec::new(),
        free: Vec::new(),
        closed: Vec::new(),
        buffer: vec![0u8; args.listen.buffer as usize].into_boxed_slice(),
        pipes: Vec::new(),
    };
    proxy.listening.announce()?;
    proxy.run()
}

impl Proxy {
    #[inline(never)]
    fn run(&mut self) -> io::Result<()> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        loop {
            let count = epoll_wait(self.poll, &mut events, -1)?;
            for event in &events[..count] {
                match event.u64 {
                    LISTENER => self.accept()?,
                    data => self.ready((data / 2) as usize, (data % 2) as usize, event.events)?,
                }
            }
            self.free.append(&mut self.closed);
        }
    }

    #[cold]
    fn accept(&mut self) -> io::Result<()> {
        loop {
            let (address, length) = (std::ptr::null_mut(), std::ptr::null_mut());
            let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            // SAFETY: the peer's address is not asked for.
            let fd = unsafe { libc::accept4(self.listening.fd, address, length, flags) };
            if fd < 0 {
                let error = errno() as i32;
                return match error {
                    libc::EAGAIN => Ok(()),
                    _ if accept_again(error) => continue,
                    _ => Err(io::Error::from_raw_os_error(error)),
                };
            }
            // Connecting is not measured, and on one machine it does not wait.
            let upstream = TcpStream::connect(self.upstream)?;
            upstream.set_nodelay(true)?;
            upstream.set_nonblocking(true)?;
            let input = libc::EPOLLIN as u32;
            let pair = Pair {
                fds: [fd, upstream.into_raw_fd()],
                kept: [Kept::Nothing, Kept::Nothing],
                ended: [false; 2],
                interest: [input; 2],
            };
            let fds = pair.fds;
            let index = put(&mut self.pairs, &mut self.free, pair);
            for (side, fd) in fds.into_iter().enumerate() {
                let data = u64::from(index) * 2 + side as u64;
                epoll_set(self.poll, libc::EPOLL_CTL_ADD, fd, input, data)?;
            }
        }
    }

    #[inline(always)]
    fn ready(&mut self, index: usize, side: usize, events: u32) -> io::Result<()> {
        if self.pairs[index].fds[0] < 0 {
            return Ok(());
        }
        let mut way = Way::Goes;
        if events & libc::EPOLLIN as u32 != 0 {
            way = if self.splice {
                self.carry_by_pipe(index, side)?
            } else {
                self.carry(index, side)?
            };
        }
        if way == Way::Goes && events != libc::EPOLLIN as u32 {
            way = self.unusual(index, side, events)?;
        }
        if way == Way::Broken {
            self.close(index);
        }
        Ok(())
    }

    /// Receives once from a side and sends it on.
    #[inline(always)]
    fn carry(&mut self, index: usize, way: usize) -> io::Result<Way> {
        let [from, to] = self.pairs[index].ends(way);
        let received = recv(from, &mut self.buffer);
        if received <= 0 {
            return self.received_none(index, way, received);
        }
        let received = received as usize;
        let sent = send(to, &self.buffer[..received]);
        if sent == received as isize {
            return Ok(Way::Goes);
        }
        if sent < 0 && -sent as i32 != libc::EAGAIN {
            return Ok(Way::Broken);
        }
        let rest = self.buffer[sent.max(0) as usize..received].to_vec();
        self.keep(index, way, Kept::Bytes(rest, 0))
    }

    /// The same by splice(2).
    #[inline(always)]
    fn carry_by_pipe(&mut self, index: usize, way: usize) -> io::Result<Way> {
        let [from, to] = self.pairs[index].ends(way);
        let pipe = match self.pipes.pop() {
            Some(pipe) => pipe,
            None => self.new_pipe()?,
        };
        let received = splice(from, pipe[1], self.buffer.len());
        if received <= 0 {
            self.pipes.push(pipe);
            return self.received_none(index, way, received);
        }
        let sent = splice(pipe[0], to, received as usize);
        if sent == received {
            self.pipes.push(pipe);
            return Ok(Way::Goes);
        }
        if sent < 0 && -sent as i32 != libc::EAGAIN {
            pipe.into_iter().for_each(close);
            return Ok(Way::Broken);
        }
        let rest = (received - sent.max(0)) as usize;
        self.keep(index, way, Kept::Piped(pipe, rest))
    }

    #[cold]
    fn new_pipe(&self) -> io::Result<Pipe> {
        let mut pipe: Pipe = [-1; 2];
        // SAFETY: the array has room for both descriptors.
        check(unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_NONBLOCK | libc::O_CLOEXEC) })?;
        // A pipe counts pieces, each a page at the most: what arrives in smaller ones finds room as well.
        let bytes = 4 * self.buffer.len() as libc::c_int;
        // SAFETY: plain system call; a pipe that stays as it was carries less at a time.
        unsafe { libc::fcntl(pipe[1], libc::F_SETPIPE_SZ, bytes) };
        Ok(pipe)
    }

    #[cold]
    fn received_none(&mut self, index: usize, way: usize, result: isize) -> io::Result<Way> {
        match -result as i32 {
            libc::EAGAIN | libc::EINTR => Ok(Way::Goes),
            0 => {
                let pair = &mut self.pairs[index];
                pair.ended[way] = true;
                // SAFETY: plain system call on a descriptor of this connection; one that is gone is found out by its event.
                unsafe { libc::shutdown(pair.fds[1 - way], libc::SHUT_WR) };
                if pair.ended == [true; 2] {
                    return Ok(Way::Broken);
                }
                self.watch(index)?;
                Ok(Way::Goes)
            }
            _ => Ok(Way::Broken),
        }
    }

    #[cold]
    fn keep(&mut self, index: usize, way: usize, kept: Kept) -> io::Result<Way> {
        self.pairs[index].kept[way] = kept;
        self.watch(index)?;
        Ok(Way::Goes)
    }

    /// There is room to send, or something is wrong.
    #[cold]
    fn unusual(&mut self, index: usize, side: usize, events: u32) -> io::Result<Way> {
        if events & libc::EPOLLOUT as u32 != 0 && self.flush(index, 1 - side)? == Way::Broken {
            return Ok(Way::Broken);
        }
        let gone = (libc::EPOLLERR | libc::EPOLLHUP) as u32;
        // What such a side has sent is received first.
        let unread = libc::EPOLLIN as u32 | self.pairs[index].interest[side];
        if events & gone != 0 && events & unread & libc::EPOLLIN as u32 == 0 {
            return Ok(Way::Broken);
        }
        Ok(Way::Goes)
    }

    /// Sends what was kept.
    fn flush(&mut self, index: usize, way: usize) -> io::Result<Way> {
        let pair = &mut self.pairs[index];
        let [_, to] = pair.ends(way);
        let (sent, left) = match &mut pair.kept[way] {
            Kept::Nothing => return Ok(Way::Goes),
            Kept::Bytes(bytes, start) => {
                let sent = send(to, &bytes[*start..]);
                *start += sent.max(0) as usize;
                (sent, bytes.len() - *start)
            }
            Kept::Piped(pipe, left) => {
                let sent = splice(pipe[0], to, *left);
                *left -= sent.max(0) as usize;
                (sent, *left)
            }
        };
        if sent < 0 && !matches!(-sent as i32, libc::EAGAIN | libc::EINTR) {
            return Ok(Way::Broken);
        }
        if left == 0 {
            if let Kept::Piped(pipe, _) = std::mem::replace(&mut pair.kept[way], Kept::Nothing) {
                self.pipes.push(pipe);
            }
            self.watch(index)?;
        }
        Ok(Way::Goes)
    }

    /// Waits for what each side is to do next.
    fn watch(&mut self, index: usize) -> io::Result<()> {
        let pair = &mut self.pairs[index];
        let holds = |way: usize| !matches!(pair.kept[way], Kept::Nothing);
        for side in 0..2 {
            let mut events = 0;
            if !pair.ended[side] && !holds(side) {
                events |= libc::EPOLLIN as u32;
            }
            if holds(1 - side) {
                events |= libc::EPOLLOUT as u32;
            }
            if events != pair.interest[side] {
                pair.interest[side] = events;
                let data = (index * 2 + side) as u64;
                epoll_set(self.poll, libc::EPOLL_CTL_MOD, pair.fds[side], events, data)?;
            }
        }
        Ok(())
    }

    #[cold]
    fn close(&mut self, index: usize) {
        let pair = &mut self.pairs[index];
        std::mem::replace(&mut pair.fds, [-1; 2])
            .into_iter()
            .for_each(close);
        for kept in &mut pair.kept {
            if let Kept::Piped(pipe, _) = std::mem::replace(kept, Kept::Nothing) {
                pipe.into_iter().for_each(close);
            }
        }
        self.closed.push(index as u32);
    }
}

impl Pair {
    /// Where a way comes from and leads to.
    #[inline(always)]
    fn ends(&self, way: usize) -> [RawFd; 2] {
        [self.fds[way], self.fds[1 - way]]
    }
}

/// splice(2) that does not wait, a negative error number on failure.
#[inline(always)]
fn splice(from: RawFd, to: RawFd, bytes: usize) -> isize {
    let (from_at, to_at) = (std::ptr::null_mut(), std::ptr::null_mut());
    let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    // SAFETY: neither end has an offset.
    let result = unsafe { libc::splice(from, from_at, to, to_at, bytes, flags) };
    if result < 0 { -errno() } else { result }
}
