//! Many datagrams a call: batches (recvmmsg, sendmmsg), and buffers that the kernel fills with, or cuts into, the datagrams of one
//! flow (UDP_GRO, UDP_SEGMENT).
//!
//! A datagram of 64 bytes costs as much as one of 1,400: what it costs is the way through the kernel. So datagrams go that way
//! together where they can:
//!
//! ```text
//!  UDP_GRO      ┌──────┬──────┬──────┬───┐   one receive: the datagrams of one sender, all of one size but the last, which may
//!               │ 1200 │ 1200 │ 1200 │ 7 │   be shorter. `Segments` has the boundaries.
//!               └──────┴──────┴──────┴───┘
//!  UDP_SEGMENT   the same on the way out: one send, cut as late as possible (by the network card where that can)
//!
//!  recvmmsg     [ A ][ B ][ B ][ A A A A ]    one call: several receives, each from a sender of its own. `Datagrams` is a batch.
//!  sendmmsg     [ A ][ B B ][ A A A A ]       one call; datagrams that follow each other to one address leave as one segmented
//!                                             send, also where they were received one by one
//! ```
//!
//! # Where the kernel cannot
//!
//! What a socket cannot do (a kernel without UDP_SEGMENT, a route through IPsec, a segment above the path's MTU, a socket without
//! checksums, AF_UNIX) is done datagram by datagram, and remembered ([`Segmentation`]), so that it is not tried in vain each time.
//!
//! # Waiting
//!
//! By readiness: a poll on the ring, then the calls, which never wait. Measured against multishot receives into provided buffers
//! with sends on the ring: see `benches/GAINS.md`.

use std::io::IoSlice;
use std::sync::atomic::{AtomicU32, Ordering};

use super::message::Items;
use super::{BLOCKING, BY_OPTION, NON_BLOCKING, Socket};
use crate::address::{Address, SockAddr, ToAddress};
use crate::constants::{AF_INET, AF_INET6, MsgFlags, SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM};
use crate::driver::Op;
use crate::error::{Error, Result};
use crate::fiber::inflight::Direction;
use crate::fiber::{self, error_from_outcome, outcome};
use crate::sys;
use crate::sys::messages::{Arrival, Departure, MESSAGES_MAX, Rooms};

/// The most segments of one send: what every kernel takes (`UDP_MAX_SEGMENTS`, 128 since Linux 6.9).
const SEGMENTS_MAX: usize = 64;
/// The most bytes of one send over IPv4, and over IPv6: 64 KiB less the headers.
const SEND_BYTES_MAX_V4: usize = 65_507;
const SEND_BYTES_MAX_V6: usize = 65_487;
/// The most pieces of memory in one call that sends.
const PIECES_MAX: usize = 64;
/// The most receives of a batch.
const BATCH_MAX: usize = 1024;
const _: () = assert!(PIECES_MAX >= MESSAGES_MAX && SEND_BYTES_MAX_V4 <= u16::MAX as usize);

/// The datagrams of one receive: all of one sender and one size, but the last, which may be shorter.
///
/// Without [`set_udp_gro`](Socket::set_udp_gro) that is one datagram. There is always at least one; one of 0 bytes is an empty
/// datagram.
///
/// # Source
///
/// `udp(7)` (`UDP_GRO`, Linux 5.0).
///
/// ```
/// use ringsock::prelude::*;
/// let receiver = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
/// receiver.bind(("127.0.0.1", 0))?;
/// let has_gro = receiver.set_udp_gro(true)?;
/// let sender = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
/// sender.sendto_segmented(b"onetwosix!", 3, receiver.getsockname()?)?;
///
/// let mut datagrams: Vec<Vec<u8>> = Vec::new();
/// let mut buffer = vec![0; 65_535];
/// while datagrams.len() < 4 {
///     let segments = receiver.recv_segments(&mut buffer)?;
///     datagrams.extend(segments.iter().map(|datagram| datagram.to_vec()));
/// }
/// assert_eq!(datagrams, [&b"one"[..], b"two", b"six", b"!"]);
/// # let _ = has_gro; Ok::<(), ringsock::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments<'a> {
    bytes: &'a [u8],
    segment_bytes: usize,
    is_truncated: bool,
}

impl<'a> Segments<'a> {
    /// All bytes, one datagram behind the other.
    pub fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Bytes of each datagram but the last; of the only one, its own.
    pub fn segment_bytes(&self) -> usize {
        self.segment_bytes
    }

    /// How many datagrams.
    #[allow(clippy::len_without_is_empty, reason = "there is always one")]
    pub fn len(&self) -> usize {
        count_segments(self.bytes.len(), self.segment_bytes)
    }

    /// Whether there was more than the buffer had room for: the last datagram is cut, and those behind it are lost.
    pub fn is_truncated(&self) -> bool {
        self.is_truncated
    }

    /// The datagrams, in the order of their arrival.
    pub fn iter(&self) -> SegmentsIter<'a> {
        SegmentsIter {
            rest: Some(self.bytes),
            segment_bytes: self.segment_bytes,
        }
    }
}

impl<'a> IntoIterator for Segments<'a> {
    type Item = &'a [u8];
    type IntoIter = SegmentsIter<'a>;

    fn into_iter(self) -> SegmentsIter<'a> {
        self.iter()
    }
}

impl<'a> IntoIterator for &Segments<'a> {
    type Item = &'a [u8];
    type IntoIter = SegmentsIter<'a>;

    fn into_iter(self) -> SegmentsIter<'a> {
        self.iter()
    }
}

/// The datagrams of [`Segments`].
#[derive(Clone, Debug)]
pub struct SegmentsIter<'a> {
    /// `None` once the last is gone; an empty datagram is a last one, too.
    rest: Option<&'a [u8]>,
    segment_bytes: usize,
}

impl<'a> Iterator for SegmentsIter<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let rest = self.rest.take()?;
        if rest.len() <= self.segment_bytes {
            return Some(rest);
        }
        let (datagram, rest) = rest.split_at(self.segment_bytes);
        self.rest = Some(rest);
        Some(datagram)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let count = self
            .rest
            .map_or(0, |rest| count_segments(rest.len(), self.segment_bytes));
        (count, Some(count))
    }
}

impl ExactSizeIterator for SegmentsIter<'_> {}

impl std::iter::FusedIterator for SegmentsIter<'_> {}

fn count_segments(bytes: usize, segment_bytes: usize) -> usize {
    if bytes <= segment_bytes {
        return 1;
    }
    bytes.div_ceil(segment_bytes)
}

/// A batch of datagrams with their addresses, and the memory for them: [`recv_many`](Socket::recv_many) fills it,
/// [`send_many`](Socket::send_many) sends it.
///
/// A batch that was received is sent back as it is: each datagram goes to who sent it. To send others, fill one by
/// [`push`](Datagrams::push).
///
/// ```
/// use ringsock::prelude::*;
/// use ringsock::Datagrams;
/// let server = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
/// server.bind(("127.0.0.1", 0))?;
/// let client = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
/// client.connect(server.getsockname()?)?;
/// client.send(b"one")?;
/// client.send(b"two")?;
///
/// let mut batch = Datagrams::new(32, 2048);
/// let mut echoed = 0;
/// while echoed < 2 {
///     server.recv_many(&mut batch)?;
///     echoed += server.send_many(&batch)?;
/// }
/// assert_eq!((client.recv(16)?, client.recv(16)?), (b"one"[..].into(), b"two"[..].into()));
/// # Ok::<(), ringsock::Error>(())
/// ```
pub struct Datagrams {
    memory: Box<[u8]>,
    /// Bytes for each entry.
    room: usize,
    /// From one entry's bytes to the next's. Odd in cache lines: at 64 KiB, say, all entries would begin in one set of the cache.
    pitch: usize,
    entries: Box<[Arrival]>,
    filled: usize,
    /// The last receive found fewer than there was room for.
    was_drained: bool,
}

const LINE_BYTES: usize = 64;

impl Datagrams {
    /// Room for `count` receives (or sends) of at most `bytes` bytes each. The memory is committed as it is used.
    ///
    /// For a socket with [`set_udp_gro`](Socket::set_udp_gro), `bytes` should be 65,535: one receive may bring that much.
    ///
    /// # Panics
    ///
    /// If either is 0, `count` is above 1,024, or there is not so much memory.
    ///
    /// ```
    /// let batch = ringsock::Datagrams::new(32, 65_535);
    /// assert_eq!((batch.len(), batch.capacity()), (0, 32));
    /// ```
    pub fn new(count: usize, bytes: usize) -> Datagrams {
        assert!(bytes > 0, "datagrams need room");
        assert!(
            (1..=BATCH_MAX).contains(&count),
            "a batch has 1 to {BATCH_MAX} entries"
        );
        let lines = bytes.div_ceil(LINE_BYTES) | 1;
        let pitch = lines.checked_mul(LINE_BYTES);
        let (pitch, memory_bytes) = pitch
            .and_then(|pitch| Some((pitch, pitch.checked_mul(count)?)))
            .expect("less memory than the address space has");
        Datagrams {
            memory: vec![0; memory_bytes].into(),
            room: bytes,
            pitch,
            entries: std::iter::repeat_with(Arrival::none).take(count).collect(),
            filled: 0,
            was_drained: false,
        }
    }

    /// How many receives it holds, each of one datagram or, with [`set_udp_gro`](Socket::set_udp_gro), of several.
    pub fn len(&self) -> usize {
        self.filled
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// How many it has room for.
    pub fn capacity(&self) -> usize {
        self.entries.len()
    }

    /// Forgets what it holds.
    pub fn clear(&mut self) {
        self.filled = 0;
    }

    /// The receives, in order, each with its sender's address; `None` where the kernel gives none.
    ///
    /// ```
    /// use ringsock::Datagrams;
    /// let mut batch = Datagrams::new(2, 64);
    /// let address = (std::net::Ipv4Addr::LOCALHOST, 9).into();
    /// batch.push(b"hello", &address)?;
    /// for (segments, peer) in batch.iter() {
    ///     assert_eq!(segments.as_bytes(), b"hello");
    ///     assert_eq!(peer.as_ref(), Some(&address));
    /// }
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Segments<'_>, Option<Address>)> {
        (0..self.filled).map(|index| (self.segments(index), self.entries[index].address.decode()))
    }

    /// Adds a datagram to send.
    ///
    /// # Errors
    ///
    /// `Value`: the batch is full, or the datagram longer than it has room for. Those of [`ToAddress`].
    ///
    /// ```
    /// use ringsock::{AF_INET, Datagrams, ToAddress};
    /// let mut batch = Datagrams::new(1, 64);
    /// let address = ("127.0.0.1", 9).to_address(AF_INET)?;
    /// batch.push(b"hello", &address)?;
    /// assert!(batch.push(b"one too many", &address).is_err());
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn push(&mut self, bytes: &[u8], address: &Address) -> Result<()> {
        self.push_entry(bytes, usize::MAX, address)
    }

    /// Adds bytes to send as datagrams of `segment_bytes` each, the last of what is left.
    ///
    /// # Errors
    ///
    /// Those of [`push`](Datagrams::push); `Value`: `segment_bytes` is 0.
    ///
    /// ```
    /// use ringsock::Datagrams;
    /// let mut batch = Datagrams::new(1, 64);
    /// batch.push_segmented(b"onetwosix!", 3, &(std::net::Ipv4Addr::LOCALHOST, 9).into())?;
    /// assert_eq!(batch.iter().map(|(segments, _)| segments.len()).sum::<usize>(), 4);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn push_segmented(
        &mut self,
        bytes: &[u8],
        segment_bytes: usize,
        address: &Address,
    ) -> Result<()> {
        check_segment_bytes(segment_bytes)?;
        self.push_entry(bytes, segment_bytes, address)
    }

    fn push_entry(&mut self, bytes: &[u8], segment_bytes: usize, address: &Address) -> Result<()> {
        if self.filled == self.entries.len() {
            return Err(Error::Value("the batch is full".into()));
        }
        if bytes.len() > self.room {
            return Err(Error::Value(
                "the batch has no room for so long a datagram".into(),
            ));
        }
        let address = address.encode()?;
        let start = self.filled * self.pitch;
        self.memory[start..][..bytes.len()].copy_from_slice(bytes);
        let entry = &mut self.entries[self.filled];
        entry.address = address;
        entry.len = bytes.len();
        entry.flags = 0;
        entry.segment_bytes = segment_bytes;
        self.filled += 1;
        Ok(())
    }

    fn bytes(&self, index: usize) -> &[u8] {
        let len = self.entries[index].len;
        &self.memory[index * self.pitch..][..len]
    }

    fn segments(&self, index: usize) -> Segments<'_> {
        let entry = &self.entries[index];
        segments_of(self.bytes(index), entry.segment_bytes, entry.flags)
    }

    /// Receives until there is nothing more, or no more room: how many receives, or why not even one.
    fn receive(&mut self, socket: &Socket) -> i32 {
        self.filled = 0;
        while self.filled < self.entries.len() {
            let end = self.entries.len().min(self.filled + MESSAGES_MAX);
            let asked = end - self.filled;
            let received = self.receive_into(socket, self.filled..end);
            self.was_drained = received < asked as i32;
            if received < 0 && self.filled == 0 {
                return received;
            }
            self.filled += received.max(0) as usize;
            if self.was_drained {
                break;
            }
        }
        self.filled as i32
    }

    fn receive_into(&mut self, socket: &Socket, range: std::ops::Range<usize>) -> i32 {
        let entries = &mut self.entries[range.clone()];
        let rooms = Rooms {
            memory: &mut self.memory[range.start * self.pitch..],
            pitch: self.pitch,
            room: self.room,
        };
        let with_control = socket.is_ip_datagram();
        let received = sys::messages::recvmmsg(socket.0.fd, rooms, with_control, entries);
        for entry in &mut entries[..received.max(0) as usize] {
            entry.segment_bytes = received_segment_bytes(entry);
        }
        received
    }
}

impl std::fmt::Debug for Datagrams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

fn segments_of(bytes: &[u8], segment_bytes: usize, flags: i32) -> Segments<'_> {
    Segments {
        bytes,
        segment_bytes: segment_bytes.min(bytes.len()),
        is_truncated: flags & libc::MSG_TRUNC != 0,
    }
}

/// The size of the datagrams that were received as one; `usize::MAX` where it is one datagram.
#[inline]
fn received_segment_bytes(arrival: &Arrival) -> usize {
    let mut items = Items(arrival.control());
    let size = items.find_map(|item| {
        if (item.level, item.kind) != (libc::SOL_UDP, libc::UDP_GRO) {
            return None;
        }
        let bytes = item.data.first_chunk()?;
        usize::try_from(i32::from_ne_bytes(*bytes)).ok()
    });
    size.filter(|size| *size > 0).unwrap_or(usize::MAX)
}

fn check_segment_bytes(segment_bytes: usize) -> Result<()> {
    if segment_bytes == 0 {
        return Err(Error::Value("a segment has at least one byte".into()));
    }
    Ok(())
}

/// What is known of a socket's `UDP_SEGMENT`: segments of this size and longer are not left to the kernel.
pub(super) struct Segmentation(AtomicU32);

/// Nobody has asked yet.
const UNKNOWN: u32 = u32::MAX;
/// Segments of every size.
const EVERY: u32 = u32::MAX - 1;

impl Segmentation {
    pub(super) fn new() -> Segmentation {
        Segmentation(AtomicU32::new(UNKNOWN))
    }

    /// The size from which on the kernel is not to cut.
    #[inline]
    fn limit(&self, socket: &Socket) -> usize {
        match self.0.load(Ordering::Relaxed) {
            UNKNOWN => self.ask(socket),
            limit => limit as usize,
        }
    }

    /// Whether the socket has the option at all. (The control message is no test: who does not know it ignores it, and sends all as
    /// one datagram.)
    #[cold]
    fn ask(&self, socket: &Socket) -> usize {
        let mut value = [0; size_of::<i32>()];
        let asked = sys::getsockopt(socket.0.fd, libc::SOL_UDP, libc::UDP_SEGMENT, &mut value);
        let limit = if asked < 0 { 0 } else { EVERY };
        self.0.store(limit, Ordering::Relaxed);
        limit as usize
    }

    /// After the kernel has refused, for this reason, segments that went one by one.
    #[cold]
    fn refused(&self, errno: i32, segment_bytes: u16) {
        let limit = match errno {
            // Too long for the path, or for this socket: shorter ones may do.
            libc::EINVAL | libc::EMSGSIZE => u32::from(segment_bytes),
            _ => 0,
        };
        self.0.fetch_min(limit, Ordering::Relaxed);
    }
}

/// Whether a send may have failed because it was segmented.
fn may_refuse_segments(errno: i32) -> bool {
    matches!(
        errno,
        libc::EINVAL | libc::EMSGSIZE | libc::EIO | libc::ENOPROTOOPT | libc::EOPNOTSUPP
    )
}

/// Messages for one call, being put together.
struct Burst<'a> {
    departures: [Departure<'a>; MESSAGES_MAX],
    count: usize,
    pieces: [IoSlice<'a>; PIECES_MAX],
    pieces_count: usize,
    /// Of the last message: bytes of each datagram, datagrams, bytes; whether another datagram may follow.
    last: Last,
    segmentation_limit: usize,
    bytes_max: usize,
}

#[derive(Default)]
struct Last {
    unit: usize,
    segments: usize,
    bytes: usize,
    is_open: bool,
}

impl<'a> Burst<'a> {
    fn new(segmentation_limit: usize, bytes_max: usize) -> Burst<'a> {
        let none = Departure {
            address: None,
            first_piece: 0,
            pieces: 0,
            segment_bytes: 0,
        };
        Burst {
            departures: [none; MESSAGES_MAX],
            count: 0,
            pieces: [IoSlice::new(&[]); PIECES_MAX],
            pieces_count: 0,
            last: Last::default(),
            segmentation_limit,
            bytes_max,
        }
    }

    fn clear(&mut self, segmentation_limit: usize) {
        self.count = 0;
        self.pieces_count = 0;
        self.last = Last::default();
        self.segmentation_limit = segmentation_limit;
    }

    fn departures(&self) -> &[Departure<'a>] {
        &self.departures[..self.count]
    }

    fn pieces(&self) -> &[IoSlice<'a>] {
        &self.pieces[..self.pieces_count]
    }

    /// How many of `bytes` may go into one message as datagrams of `unit` bytes.
    fn whole_bytes(&self, bytes: usize, unit: usize) -> usize {
        if bytes <= unit {
            return bytes;
        }
        let segments = if unit < self.segmentation_limit {
            SEGMENTS_MAX.min(self.bytes_max / unit).max(1)
        } else {
            1
        };
        bytes.min(segments * unit)
    }

    /// Adds datagrams of `unit` bytes, few enough for one message; false if there is no room.
    fn add(&mut self, to: Option<&'a SockAddr>, bytes: &'a [u8], unit: usize) -> bool {
        if self.pieces_count == PIECES_MAX {
            return false;
        }
        let segments = count_segments(bytes.len(), unit);
        let unit = unit.min(bytes.len());
        if self.joins(to, bytes.len(), unit, segments) {
            let departure = &mut self.departures[self.count - 1];
            departure.pieces += 1;
            departure.segment_bytes = self.last.unit as u16;
            self.last.segments += segments;
            self.last.bytes += bytes.len();
        } else {
            if self.count == MESSAGES_MAX {
                return false;
            }
            self.departures[self.count] = Departure {
                address: to,
                first_piece: self.pieces_count,
                pieces: 1,
                segment_bytes: if segments > 1 { unit as u16 } else { 0 },
            };
            self.count += 1;
            self.last = Last {
                unit,
                segments,
                bytes: bytes.len(),
                is_open: false,
            };
        }
        // Behind a shorter datagram none can follow.
        self.last.is_open = self.last.unit > 0
            && self.last.unit < self.segmentation_limit
            && self.last.bytes == self.last.unit * self.last.segments;
        self.pieces[self.pieces_count] = IoSlice::new(bytes);
        self.pieces_count += 1;
        true
    }

    /// Whether the datagrams can be the next ones of the last message.
    fn joins(&self, to: Option<&SockAddr>, bytes: usize, unit: usize, segments: usize) -> bool {
        let last = &self.last;
        if !last.is_open
            || last.segments + segments > SEGMENTS_MAX
            || last.bytes + bytes > self.bytes_max
        {
            return false;
        }
        let fits = unit == last.unit || (segments == 1 && bytes > 0 && bytes < last.unit);
        let same = match (self.departures[self.count - 1].address, to) {
            (None, None) => true,
            (Some(one), Some(other)) => one.is_same(other),
            _ => false,
        };
        fits && same
    }

    /// The datagrams of one message.
    fn datagrams(&self, departure: &Departure<'a>) -> impl Iterator<Item = &[u8]> {
        let unit = match departure.segment_bytes {
            0 => usize::MAX,
            unit => unit.into(),
        };
        // Each piece but the last is whole datagrams.
        self.pieces[departure.first_piece..][..departure.pieces]
            .iter()
            .flat_map(move |piece| segments_of(piece, unit, 0))
    }

    /// Datagrams and bytes of the first `count` messages from `first` on.
    fn amount(&self, first: usize, count: usize) -> (usize, usize) {
        let mut amount = (0, 0);
        for departure in &self.departures[first..first + count] {
            let pieces = &self.pieces[departure.first_piece..][..departure.pieces];
            let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
            amount.0 += match departure.segment_bytes {
                0 => 1,
                unit => bytes.div_ceil(unit.into()),
            };
            amount.1 += bytes;
        }
        amount
    }
}

/// What has become of the datagrams of one call.
struct Tally {
    datagrams: usize,
    bytes: usize,
    /// Why the first one that was not sent was not.
    error: Option<Error>,
    /// Whether that is the end of it.
    ends_at_error: bool,
    limit: Option<Limit>,
}

impl Tally {
    fn new(ends_at_error: bool) -> Tally {
        Tally {
            datagrams: 0,
            bytes: 0,
            error: None,
            ends_at_error,
            limit: None,
        }
    }

    fn sent(&mut self, datagrams: usize, bytes: usize) {
        self.datagrams += datagrams;
        self.bytes += bytes;
    }

    /// A datagram that could not be sent; an error if none of the others will be.
    #[cold]
    fn refused(&mut self, error: Error) -> std::result::Result<(), End> {
        let closed = error.errno() == Some(libc::EBADF);
        self.error.get_or_insert(error);
        if self.ends_at_error || closed {
            Err(End)
        } else {
            Ok(())
        }
    }

    /// `pick` of what was sent, or why nothing was.
    fn result(self, pick: fn(&Tally) -> usize) -> Result<usize> {
        let sent = pick(&self);
        match self.error {
            Some(error) if self.datagrams == 0 => Err(error),
            _ => Ok(sent),
        }
    }
}

/// Nothing more is sent; the [`Tally`] has the reason.
struct End;

/// How long a call may still wait.
pub(super) struct Limit {
    /// Below 0: for ever.
    limit_ns: i64,
    deadline_ns: i64,
    is_by_option: bool,
    /// It has been waited for to the end.
    is_spent: bool,
}

impl Limit {
    /// As the socket's mode says, from now on. The mode is not the non-blocking one.
    pub(super) fn new(socket: &Socket, timeout_ns: i64, direction: Direction) -> Result<Limit> {
        let option = match direction {
            Direction::In => libc::SO_RCVTIMEO,
            Direction::Out => libc::SO_SNDTIMEO,
        };
        let is_by_option = timeout_ns == BY_OPTION;
        let limit_ns = if is_by_option {
            sys::option_timeout_ns(socket.0.fd, option)
                .map_err(Error::from_errno)?
                .unwrap_or(BLOCKING)
        } else {
            timeout_ns
        };
        let deadline_ns = match limit_ns {
            BLOCKING => i64::MAX,
            limit_ns => fiber::now_ns().saturating_add(limit_ns),
        };
        Ok(Limit {
            limit_ns,
            deadline_ns,
            is_by_option,
            is_spent: false,
        })
    }

    /// What is left; below 0: for ever.
    pub(super) fn left_ns(&self) -> i64 {
        match self.limit_ns {
            BLOCKING => BLOCKING,
            _ => (self.deadline_ns - fiber::now_ns()).max(0),
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.limit_ns != BLOCKING && fiber::now_ns() >= self.deadline_ns
    }

    /// The error that its end is.
    pub(super) fn expired(&self) -> Error {
        if self.is_by_option {
            Error::from_errno(libc::EAGAIN)
        } else {
            Error::Timeout
        }
    }
}

impl Socket {
    /// Lets one receive bring several datagrams of one sender (`UDP_GRO`), for [`recv_segments`](Socket::recv_segments) and
    /// [`recv_many`](Socket::recv_many): whether it does from now on.
    ///
    /// It costs nothing where senders and network cards do not batch, and saves most of the work where they do. False: this kernel,
    /// or this kind of socket, has no such option; those calls then bring one datagram a receive. The other receives (`recv`,
    /// `recvfrom`, `recvmsg`) show **one long datagram** where several came together, so a socket that uses them should not have it.
    ///
    /// # Errors
    ///
    /// `EBADF`: closed.
    ///
    /// # Source
    ///
    /// `udp(7)` (`UDP_GRO`, Linux 5.0).
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let udp = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// assert!(udp.set_udp_gro(true)?); // on any Linux that has a ring
    /// let unix = Socket::new(AF_UNIX, SOCK_DGRAM, 0)?;
    /// assert!(!unix.set_udp_gro(true)?);
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn set_udp_gro(&self, on: bool) -> Result<bool> {
        self.check_open()?;
        let value = i32::from(on).to_ne_bytes();
        match -sys::setsockopt(self.0.fd, libc::SOL_UDP, libc::UDP_GRO, &value) {
            ..=0 => Ok(on),
            libc::ENOPROTOOPT | libc::EOPNOTSUPP | libc::EINVAL => Ok(false),
            errno => Err(Error::from_errno(errno)),
        }
    }

    /// Receives into `buffer`: the datagrams of one receive. See [`recvfrom_segments`](Socket::recvfrom_segments).
    ///
    /// # Errors
    ///
    /// Those of [`recvfrom_segments`](Socket::recvfrom_segments).
    ///
    /// # Source
    ///
    /// `recvmsg(2)`, `udp(7)` (`UDP_GRO`).
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let (left, right) = ringsock::socketpair_with(AF_UNIX, SOCK_DGRAM, 0)?;
    /// left.send(b"hello")?;
    /// let mut buffer = [0; 16];
    /// let segments = right.recv_segments(&mut buffer)?; // here always one
    /// assert_eq!((segments.len(), segments.as_bytes()), (1, &b"hello"[..]));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recv_segments<'b>(&self, buffer: &'b mut [u8]) -> Result<Segments<'b>> {
        self.recvfrom_segments(buffer).map(|(segments, _)| segments)
    }

    /// Receives into `buffer`: the datagrams of one receive, and their sender's address as in [`recvfrom`](Socket::recvfrom).
    ///
    /// With [`set_udp_gro`](Socket::set_udp_gro) these may be many, of 65,535 bytes together at the most; a shorter buffer may lose
    /// some ([`is_truncated`](Segments::is_truncated)). Without, it is one. No bytes and no address: the socket was shut down for
    /// receiving.
    ///
    /// # Errors
    ///
    /// `Timeout`; `EAGAIN` in non-blocking mode. `ECONNREFUSED`: an earlier datagram of a connected socket was refused. `EOPNOTSUPP`:
    /// not a datagram socket (`SOCK_STREAM`, `SOCK_SEQPACKET`).
    ///
    /// # Source
    ///
    /// `recvmsg(2)`, `udp(7)` (`UDP_GRO`, Linux 5.0).
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let receiver = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// receiver.bind(("127.0.0.1", 0))?;
    /// receiver.set_udp_gro(true)?;
    /// let sender = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// sender.bind(("127.0.0.1", 0))?;
    /// sender.sendto(b"hello", receiver.getsockname()?)?;
    /// let mut buffer = vec![0; 65_535];
    /// let (segments, from) = receiver.recvfrom_segments(&mut buffer)?;
    /// assert_eq!(segments.iter().collect::<Vec<_>>(), [b"hello"]);
    /// assert_eq!(from, Some(sender.getsockname()?));
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recvfrom_segments<'b>(
        &self,
        buffer: &'b mut [u8],
    ) -> Result<(Segments<'b>, Option<Address>)> {
        self.check_datagrams()?;
        let mut arrival = Arrival::none();
        let with_control = self.is_ip_datagram();
        let receive = || {
            let room = buffer.len();
            let rooms = Rooms {
                memory: buffer,
                pitch: room,
                room,
            };
            let arrivals = std::slice::from_mut(&mut arrival);
            sys::messages::recvmmsg(self.0.fd, rooms, with_control, arrivals)
        };
        if self.receive_when_ready(false, receive)? == 0 {
            return Ok((segments_of(&[], usize::MAX, 0), None));
        }
        let unit = received_segment_bytes(&arrival);
        let bytes = &buffer[..arrival.len];
        Ok((
            segments_of(bytes, unit, arrival.flags),
            arrival.address.decode(),
        ))
    }

    /// Sends `bytes` to the connected peer as datagrams of `segment_bytes` each. See
    /// [`sendto_segmented`](Socket::sendto_segmented).
    ///
    /// # Errors
    ///
    /// Those of [`sendto_segmented`](Socket::sendto_segmented); `EDESTADDRREQ`, `ENOTCONN`: not connected.
    ///
    /// # Source
    ///
    /// `sendmsg(2)`, `udp(7)` (`UDP_SEGMENT`).
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let (left, right) = ringsock::socketpair_with(AF_UNIX, SOCK_DGRAM, 0)?;
    /// assert_eq!(left.send_segmented(b"onetwo!", 3)?, 7);
    /// assert_eq!(right.recv(16)?, b"one");
    /// assert_eq!(right.recv(16)?, b"two");
    /// assert_eq!(right.recv(16)?, b"!");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn send_segmented(&self, bytes: &[u8], segment_bytes: usize) -> Result<usize> {
        self.send_segments(bytes, segment_bytes, None)
    }

    /// Sends `bytes` to an address as datagrams of `segment_bytes` each, the last of what is left: how many bytes the kernel took.
    /// No bytes are one empty datagram.
    ///
    /// It is one send for up to 64 datagrams, or 64 KiB (`UDP_SEGMENT`); more than that are several. Where the kernel or the route
    /// cannot cut, or the segments are longer than the path's MTU, each datagram is sent by itself, and the socket remembers. The
    /// timeout bounds the whole call. Fewer bytes than given: the datagram behind them could not be sent.
    ///
    /// # Errors
    ///
    /// Those of [`sendto`](Socket::sendto), if not even the first datagram was sent. `Value`: `segment_bytes` is 0. `EOPNOTSUPP`: not
    /// a datagram socket.
    ///
    /// # Source
    ///
    /// `sendmsg(2)`, `udp(7)` (`UDP_SEGMENT`, Linux 4.18).
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// let receiver = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// receiver.bind(("127.0.0.1", 0))?;
    /// let sender = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// let bytes = [7; 3000];
    /// assert_eq!(sender.sendto_segmented(&bytes, 1200, receiver.getsockname()?)?, 3000);
    /// for expected in [1200, 1200, 600] {
    ///     assert_eq!(receiver.recv(2048)?.len(), expected);
    /// }
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn sendto_segmented(
        &self,
        bytes: &[u8],
        segment_bytes: usize,
        address: impl ToAddress,
    ) -> Result<usize> {
        let address = address.to_address(self.0.family)?.encode()?;
        self.send_segments(bytes, segment_bytes, Some(&address))
    }

    fn send_segments(
        &self,
        bytes: &[u8],
        segment_bytes: usize,
        to: Option<&SockAddr>,
    ) -> Result<usize> {
        check_segment_bytes(segment_bytes)?;
        let items = std::iter::once((to, bytes, segment_bytes));
        self.send_items(items, Tally::new(true))?
            .result(|tally| tally.bytes)
    }

    /// Receives as many datagrams as there are, and the batch has room for: how many. It waits for the first, not for more.
    ///
    /// The batch's former content is gone, also after an error. 0: the socket was shut down for receiving.
    ///
    /// # Errors
    ///
    /// Those of [`recvfrom_segments`](Socket::recvfrom_segments).
    ///
    /// # Source
    ///
    /// `recvmmsg(2)`, `udp(7)` (`UDP_GRO`).
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// use ringsock::Datagrams;
    /// let receiver = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// receiver.bind(("127.0.0.1", 0))?;
    /// let sender = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// sender.sendto(b"hello", receiver.getsockname()?)?;
    /// let mut batch = Datagrams::new(32, 2048);
    /// assert_eq!(receiver.recv_many(&mut batch)?, 1);
    /// for (segments, _from) in batch.iter() {
    ///     for datagram in segments {
    ///         assert_eq!(datagram, b"hello");
    ///     }
    /// }
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn recv_many(&self, datagrams: &mut Datagrams) -> Result<usize> {
        datagrams.clear();
        self.check_datagrams()?;
        let hardly_any = datagrams.was_drained;
        self.receive_when_ready(hardly_any, || datagrams.receive(self))?;
        let counts = (0..datagrams.filled).map(|index| datagrams.segments(index).len());
        Ok(counts.sum())
    }

    /// Sends every datagram of the batch to its address, in order: how many the kernel took.
    ///
    /// One that it refuses (its peer cannot be reached, it is too long) holds up none behind it; it is lost, as datagrams may be. The
    /// timeout bounds the whole call. Datagrams of one size that follow each other to one address leave as one segmented send where
    /// the kernel can ([`sendto_segmented`](Socket::sendto_segmented)): their receivers see no difference.
    ///
    /// # Errors
    ///
    /// Those of [`sendto`](Socket::sendto), if none was sent. `EOPNOTSUPP`: not a datagram socket.
    ///
    /// # Source
    ///
    /// `sendmmsg(2)`, `udp(7)` (`UDP_SEGMENT`).
    ///
    /// ```
    /// use ringsock::prelude::*;
    /// use ringsock::Datagrams;
    /// let receiver = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// receiver.bind(("127.0.0.1", 0))?;
    /// let to = receiver.getsockname()?;
    /// let mut batch = Datagrams::new(32, 2048);
    /// batch.push(b"one", &to)?;
    /// batch.push(b"two", &to)?;
    /// let sender = Socket::new(AF_INET, SOCK_DGRAM, 0)?;
    /// assert_eq!(sender.send_many(&batch)?, 2);
    /// assert_eq!(receiver.recv(16)?, b"one");
    /// assert_eq!(receiver.recv(16)?, b"two");
    /// # Ok::<(), ringsock::Error>(())
    /// ```
    pub fn send_many(&self, datagrams: &Datagrams) -> Result<usize> {
        let items = (0..datagrams.filled).map(|index| {
            let entry = &datagrams.entries[index];
            let address = &entry.address;
            let to = (address.len() > 0).then_some(address);
            (to, datagrams.bytes(index), entry.segment_bytes)
        });
        self.send_items(items, Tally::new(false))?
            .result(|tally| tally.datagrams)
    }

    /// Whether it is a socket of the kind that may know segments.
    #[inline]
    fn is_ip_datagram(&self) -> bool {
        self.0.kind == SOCK_DGRAM && matches!(self.0.family, AF_INET | AF_INET6)
    }

    /// A stream has no datagrams, and its end would be taken for empty ones without end.
    fn check_datagrams(&self) -> Result<()> {
        if matches!(self.0.kind, SOCK_STREAM | SOCK_SEQPACKET) {
            return Err(Error::from_errno(libc::EOPNOTSUPP));
        }
        Ok(())
    }

    /// What `receive`, which does not wait, brings once there is something; 0 at the end. If there is `hardly_any` thing it is waited
    /// for first.
    fn receive_when_ready(
        &self,
        hardly_any: bool,
        mut receive: impl FnMut() -> i32,
    ) -> Result<usize> {
        let timeout_ns = self.timeout_ns();
        let waits = timeout_ns != NON_BLOCKING;
        if waits && let Some(code) = fiber::outcome_so_far() {
            return Err(error_from_outcome(code));
        }
        let mut limit = None;
        let mut looks = !waits || !hardly_any;
        let mut has_ended = false;
        loop {
            if looks {
                // There may be no end of datagrams: the other fibers go first.
                if waits && limit.is_none() {
                    let code = fiber::give_way();
                    if code < 0 {
                        return Err(error_from_outcome(code));
                    }
                }
                match receive() {
                    code if code >= 0 => return Ok(code as usize),
                    code if code == -libc::EINTR => continue,
                    code if code != -libc::EAGAIN || !waits => {
                        return Err(Error::from_errno(-code));
                    }
                    _ if has_ended => return Ok(0),
                    _ => {}
                }
            }
            let events = libc::POLLIN | libc::POLLRDHUP;
            let ready = self.wait_for(events, Direction::In, timeout_ns, &mut limit)?;
            has_ended = ready & i32::from(libc::POLLRDHUP | libc::POLLHUP) != 0;
            looks = true;
        }
    }

    /// Waits for one of the events: which there are.
    fn wait_for(
        &self,
        events: i16,
        direction: Direction,
        timeout_ns: i64,
        limit: &mut Option<Limit>,
    ) -> Result<i32> {
        let limit = match limit {
            Some(limit) => limit,
            None => limit.insert(Limit::new(self, timeout_ns, direction)?),
        };
        // Readiness need not mean success, so an end of time must be seen here, too.
        if limit.is_spent {
            return Err(limit.expired());
        }
        let left_ns = limit.left_ns();
        limit.is_spent = left_ns == 0;
        let fd = self.0.fd;
        let target = Some((&self.0.inflight, direction));
        match fiber::suspend(&mut Op::Poll { fd, events }, left_ns, target) {
            outcome::TIMED_OUT if limit.is_over() => Err(limit.expired()),
            code if code < 0 => Err(error_from_outcome(code)),
            ready => Ok(ready),
        }
    }

    /// Sends datagrams: for each address, the bytes, and the size of each datagram in them.
    fn send_items<'a>(
        &self,
        items: impl Iterator<Item = (Option<&'a SockAddr>, &'a [u8], usize)>,
        mut tally: Tally,
    ) -> Result<Tally> {
        self.check_datagrams()?;
        self.send_behind_queue(0)?;
        if self.timeout_ns() != NON_BLOCKING
            && let Some(code) = fiber::outcome_so_far()
        {
            return Err(error_from_outcome(code));
        }
        let _ended = if self.is_ip_datagram() {
            self.send_in_bursts(items, &mut tally)
        } else {
            self.send_one_by_one(items, &mut tally)
        };
        Ok(tally)
    }

    fn send_in_bursts<'a>(
        &self,
        items: impl Iterator<Item = (Option<&'a SockAddr>, &'a [u8], usize)>,
        tally: &mut Tally,
    ) -> std::result::Result<(), End> {
        let limit = || self.0.segmentation.limit(self);
        let bytes_max = if self.0.family == AF_INET {
            SEND_BYTES_MAX_V4
        } else {
            SEND_BYTES_MAX_V6
        };
        let mut burst = Burst::new(limit(), bytes_max);
        for (to, bytes, unit) in items {
            let mut rest = bytes;
            loop {
                let (whole, behind) = rest.split_at(burst.whole_bytes(rest.len(), unit));
                if !burst.add(to, whole, unit) {
                    self.send_burst(&burst, tally)?;
                    burst.clear(limit());
                    // What may go into one message may have changed.
                    continue;
                }
                rest = behind;
                if rest.is_empty() {
                    break;
                }
            }
        }
        self.send_burst(&burst, tally)
    }

    fn send_burst(&self, burst: &Burst<'_>, tally: &mut Tally) -> std::result::Result<(), End> {
        let departures = burst.departures();
        let mut next = 0;
        while next < departures.len() {
            fiber::count_unwaited_call();
            let sent = sys::messages::sendmmsg(self.0.fd, &departures[next..], burst.pieces());
            if sent > 0 {
                let (datagrams, bytes) = burst.amount(next, sent as usize);
                tally.sent(datagrams, bytes);
                next += sent as usize;
                continue;
            }
            let departure = &departures[next];
            match -sent {
                libc::EINTR => {}
                libc::EAGAIN => self.wait_for_room_to_send(tally)?,
                errno if departure.segment_bytes > 0 && may_refuse_segments(errno) => {
                    self.send_apart(burst, departure, errno, tally)?;
                    next += 1;
                }
                errno => {
                    tally.refused(Error::from_errno(errno))?;
                    next += 1;
                }
            }
        }
        Ok(())
    }

    /// Sends one by one the datagrams that the kernel would not cut.
    #[cold]
    fn send_apart(
        &self,
        burst: &Burst<'_>,
        departure: &Departure<'_>,
        refusal: i32,
        tally: &mut Tally,
    ) -> std::result::Result<(), End> {
        let mut is_refusal_of_segments = false;
        for datagram in burst.datagrams(departure) {
            let alone = Departure {
                first_piece: 0,
                pieces: 1,
                segment_bytes: 0,
                ..*departure
            };
            let piece = [IoSlice::new(datagram)];
            loop {
                match sys::messages::sendmmsg(self.0.fd, &[alone], &piece) {
                    code if code > 0 => {
                        tally.sent(1, datagram.len());
                        is_refusal_of_segments = true;
                    }
                    code if code == -libc::EINTR => continue,
                    code if code == -libc::EAGAIN => {
                        self.wait_for_room_to_send(tally)?;
                        continue;
                    }
                    code => tally.refused(Error::from_errno(-code))?,
                }
                break;
            }
        }
        // What was refused alone, too, was not refused for its segments.
        if is_refusal_of_segments {
            self.0
                .segmentation
                .refused(refusal, departure.segment_bytes);
        }
        Ok(())
    }

    /// Waits until the socket has room for what is to be sent.
    #[cold]
    fn wait_for_room_to_send(&self, tally: &mut Tally) -> std::result::Result<(), End> {
        let timeout_ns = self.timeout_ns();
        let waited = if timeout_ns == NON_BLOCKING {
            Err(Error::from_errno(libc::EAGAIN))
        } else {
            self.wait_for(libc::POLLOUT, Direction::Out, timeout_ns, &mut tally.limit)
        };
        waited.map(drop).map_err(|error| {
            tally.error.get_or_insert(error);
            End
        })
    }

    /// For sockets of other families, each of which has its own way of waiting for room.
    fn send_one_by_one<'a>(
        &self,
        items: impl Iterator<Item = (Option<&'a SockAddr>, &'a [u8], usize)>,
        tally: &mut Tally,
    ) -> std::result::Result<(), End> {
        let timeout_ns = self.timeout_ns();
        let deadline = (timeout_ns > 0)
            .then(|| Limit::new(self, timeout_ns, Direction::Out))
            .transpose()
            .map_err(|error| {
                tally.error.get_or_insert(error);
                End
            })?;
        for (to, bytes, unit) in items {
            for datagram in segments_of(bytes, unit, 0) {
                let send = || self.send_raw(datagram, MsgFlags::default().bits(), to);
                let sent = match &deadline {
                    None => send(),
                    Some(deadline) => {
                        let left = std::time::Duration::from_nanos(deadline.left_ns() as u64);
                        crate::timeout(left, send)
                    }
                };
                match sent {
                    Ok(bytes) => tally.sent(1, bytes),
                    Err(error) => {
                        let ends =
                            matches!(error, Error::Timeout | Error::Cancelled | Error::Shutdown)
                                || error.is_would_block();
                        tally.refused(error)?;
                        if ends {
                            return Err(End);
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::constants::AF_UNIX;
    use std::net::Ipv4Addr;

    /// xorshift64*, for data that is random and the same every time.
    struct Random(u64);

    impl Random {
        fn below(&mut self, limit: usize) -> usize {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
        }
    }

    fn address(port: u16) -> SockAddr {
        Address::from((Ipv4Addr::LOCALHOST, port)).encode().unwrap()
    }

    #[test]
    fn messages_put_together_are_the_same_datagrams_in_the_same_order_within_the_limits() {
        let addresses = [address(1), address(2)];
        let bytes: Vec<u8> = (0..70_000).map(|index| index as u8).collect();
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut merged = 0;
        for round in 0..20_000 {
            let limit = [0, 100, 1_000, EVERY as usize][round % 4];
            let mut burst = Burst::new(limit, SEND_BYTES_MAX_V4);
            let mut expected: Vec<(usize, &[u8])> = Vec::new();
            let mut is_full = false;
            while !is_full {
                let to = random.below(2) & random.below(2);
                let unit = [1, 64, 64, 64, 500, 1_200, 40_000][random.below(7)];
                let len = [0, 1, unit, unit, 3 * unit, unit + 1][random.below(6)].min(65_507);
                let mut rest = &bytes[random.below(1_000)..][..len];
                loop {
                    let (whole, behind) = rest.split_at(burst.whole_bytes(rest.len(), unit));
                    if !burst.add(Some(&addresses[to]), whole, unit) {
                        is_full = true;
                        break;
                    }
                    expected.extend(segments_of(whole, unit, 0).iter().map(|each| (to, each)));
                    rest = behind;
                    if rest.is_empty() {
                        break;
                    }
                }
            }
            let mut found: Vec<(usize, &[u8])> = Vec::new();
            for (index, departure) in burst.departures().iter().enumerate() {
                let to = departure.address.unwrap();
                let to = usize::from(to.is_same(&addresses[1]));
                let datagrams: Vec<&[u8]> = burst.datagrams(departure).collect();
                let len: usize = datagrams.iter().map(|datagram| datagram.len()).sum();
                assert_eq!(burst.amount(index, 1), (datagrams.len(), len));
                if let Some((last, before)) = datagrams.split_last()
                    && !before.is_empty()
                {
                    merged += 1;
                    // What the kernel makes of it: pieces of one size, the last one not longer and not empty.
                    let unit = usize::from(departure.segment_bytes);
                    assert!(before.iter().all(|datagram| datagram.len() == unit));
                    assert!((1..=unit).contains(&last.len()) && unit < limit);
                    assert!(datagrams.len() <= SEGMENTS_MAX && len <= SEND_BYTES_MAX_V4);
                } else {
                    assert_eq!(departure.segment_bytes, 0);
                }
                found.extend(datagrams.into_iter().map(|datagram| (to, datagram)));
            }
            assert!(found == expected, "round {round}");
        }
        assert!(merged > 10_000, "{merged} segmented messages only");
    }

    #[test]
    fn a_refusal_is_remembered_by_what_it_says() {
        let socket = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
        let segmentation = &socket.0.segmentation;
        assert_eq!(segmentation.limit(&socket), EVERY as usize);
        // Too long, for some path: shorter segments are still cut by the kernel, and longer ones do not raise the limit again.
        segmentation.refused(libc::EINVAL, 1_400);
        segmentation.refused(libc::EMSGSIZE, 1_472);
        assert_eq!(segmentation.limit(&socket), 1_400);
        // Not at all.
        segmentation.refused(libc::EIO, 64);
        assert_eq!(segmentation.limit(&socket), 0);
    }

    #[test]
    fn a_socket_that_never_heard_of_segments_is_not_tried() {
        let socket = Socket::new(AF_UNIX, SOCK_DGRAM, 0).unwrap();
        assert_eq!(socket.0.segmentation.limit(&socket), 0);
    }

    #[test]
    fn the_kernels_refusal_is_remembered_and_another_reason_is_not() {
        const SO_NO_CHECK: i32 = 11;
        let receiver = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
        receiver.bind(("127.0.0.1", 0)).unwrap();
        let to = receiver.getsockname().unwrap();
        let sender = Socket::new(AF_INET, SOCK_DGRAM, 0).unwrap();
        let limit = || sender.0.segmentation.limit(&sender);
        // Port 0 is EINVAL with segments and without.
        sender
            .sendto_segmented(b"abcd", 2, ("127.0.0.1", 0))
            .unwrap_err();
        assert_eq!(limit(), EVERY as usize);
        sender.setsockopt(libc::SOL_SOCKET, SO_NO_CHECK, 1).unwrap();
        assert_eq!(sender.sendto_segmented(b"abcd", 2, &to).unwrap(), 4);
        assert!(limit() <= 2, "{}", limit());
        assert_eq!(receiver.recv(16).unwrap(), b"ab");
        assert_eq!(receiver.recv(16).unwrap(), b"cd");
    }

    #[test]
    fn segments_are_counted_as_they_are_iterated() {
        for len in 0..40 {
            for unit in 1..20 {
                let bytes = vec![7; len];
                let segments = segments_of(&bytes, unit, 0);
                let mut iter = segments.iter();
                for left in (1..=segments.len()).rev() {
                    assert_eq!(iter.len(), left);
                    assert!(iter.next().is_some_and(|each| each.len() <= unit));
                }
                assert_eq!((iter.len(), iter.next()), (0, None));
                assert_eq!(segments.iter().flatten().count(), len);
            }
        }
    }
}
