//! Files over a socket: `makefile`, buffered reading and writing as of a file.
//!
//! # When the socket is closed
//!
//! ```text
//!                    makefile                close() of the socket            the last file closes
//!  open, 0 files ───────────────▶ n files ─────────────────────────▶ marked ──────────────────────▶ closed
//!      ▲                            │                                        (`fileno` is valid till then)
//!      └──── a file closes ─────────┘  closing a file never closes an open socket
//! ```
//!
//! One word counts the files and holds the mark, so of a closing socket and a closing file exactly one is the last.

use std::fmt;
use std::io::{self, BufRead, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use super::Socket;
use crate::error::{Error, Result};
use crate::sys;

/// Python's `io.DEFAULT_BUFFER_SIZE`.
const BUFFER_BYTES: usize = 8192;

/// The files of one socket object.
pub(super) struct Files(AtomicU32);

impl Files {
    /// The bit that `Socket::close` sets.
    const SOCKET_CLOSED: u32 = 1 << 31;

    pub(super) const fn new() -> Files {
        Files(AtomicU32::new(0))
    }

    /// One file more; false if the socket is closed and had none.
    fn open(&self) -> bool {
        let order = Ordering::SeqCst;
        self.0
            .fetch_update(order, order, |word| {
                (word != Files::SOCKET_CLOSED).then(|| word + 1)
            })
            .is_ok()
    }

    /// One file less; true if the socket is now to be closed.
    fn close(&self) -> bool {
        self.0.fetch_sub(1, Ordering::SeqCst) == Files::SOCKET_CLOSED + 1
    }

    /// The socket is closed; true if there is no file to wait for.
    pub(super) fn close_socket(&self) -> bool {
        let before = self.0.fetch_or(Files::SOCKET_CLOSED, Ordering::SeqCst);
        before & !Files::SOCKET_CLOSED == 0
    }

    pub(super) fn is_socket_closed(&self) -> bool {
        self.0.load(Ordering::SeqCst) & Files::SOCKET_CLOSED != 0
    }
}

/// A handle of the socket that counts as an open file of it.
struct FileHandle(Socket);

impl FileHandle {
    fn new(socket: &Socket) -> Result<FileHandle> {
        if !socket.0.files.open() {
            return Err(Error::from_errno(libc::EBADF));
        }
        Ok(FileHandle(socket.clone()))
    }
}

impl Drop for FileHandle {
    fn drop(&mut self) {
        if self.0.0.files.close() {
            self.0.close_object();
        }
    }
}

/// What [`Socket::makefile_with`] may be told. The default is that of [`Socket::makefile`].
///
/// ```
/// use ringsock::MakeFile;
/// let options = MakeFile { buffering: Some(0), ..Default::default() };
/// assert!(!options.line_buffering);
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct MakeFile {
    /// The size of the buffer for reading and of the one for writing, in bytes. `None` and negative numbers mean 8192. 0 means none,
    /// in binary mode only: nothing is read ahead, and each write is one send.
    pub buffering: Option<i32>,
    /// Whether a write that contains a line's end is flushed (Python's `TextIOWrapper.line_buffering`, or 1 for `bufsize` in 2.7).
    pub line_buffering: bool,
}

/// A file over a socket, by [`Socket::makefile`]: reads and writes go through buffers.
///
/// It implements [`Read`], [`BufRead`] and [`Write`], and not [`Seek`](io::Seek): a socket has no positions. Dropping it flushes
/// (which may wait, and whose error is lost: [`flush`](Write::flush) or [`close`](SocketFile::close) tell) and counts as closing it.
///
/// Reads return what the buffer has, or else what one receive brings; `read_exact`, `read_line` and the like take as many as
/// they need. A flush that fails keeps what was not sent, for the next one.
///
/// # Errors
///
/// Those of [`Socket::recv`] and [`Socket::send`], as [`io::Error`]. After a read has timed out every later one that needs the
/// socket fails with "cannot read from timed out object", since some of what a caller wanted may be gone with the failed call; writes
/// go on. `WouldBlock` in non-blocking mode (where Python's raw file returns `None`). `InvalidInput`: the file is closed. `Unsupported`: a
/// read of a file for writing, or the other way round.
///
/// # Source
///
/// Python `socket.makefile()`, `socket.SocketIO`, `io.BufferedReader`, `io.BufferedWriter`, `io.BufferedRWPair`.
///
/// ```
/// use std::io::{BufRead, Write};
/// let (left, right) = ringsock::socketpair()?;
/// let mut writer = left.makefile("wb")?;
/// write!(writer, "one\ntwo\n")?;
/// writer.close()?;
/// left.close()?;
/// let lines: Vec<String> = right.makefile("rb")?.lines().collect::<Result<_, _>>()?;
/// assert_eq!(lines, ["one", "two"]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct SocketFile {
    handle: Option<FileHandle>,
    mode: Mode,
    buffer_bytes: usize,
    line_buffering: bool,
    /// A read timed out.
    poisoned: bool,
    /// Received bytes; those before `read_start` have been read.
    read: Vec<u8>,
    read_start: usize,
    /// Bytes to send.
    write: Vec<u8>,
}

#[derive(Clone, Copy)]
struct Mode {
    reading: bool,
    writing: bool,
    binary: bool,
}

impl Mode {
    fn parse(mode: &str) -> Result<Mode> {
        if mode.chars().any(|letter| !"rwb".contains(letter)) {
            let text = format!("invalid mode '{mode}' (only r, w, b allowed)");
            return Err(Error::Value(text.into()));
        }
        let writing = mode.contains('w');
        Ok(Mode {
            reading: mode.contains('r') || !writing,
            writing,
            binary: mode.contains('b'),
        })
    }
}

impl Socket {
    /// A file over the socket, with buffers of 8 KiB. `mode` is made of `r` (read, the default), `w` (write) and `b` (binary).
    ///
    /// While the file is open, [`close`](Socket::close) only marks the socket: its descriptor is closed with the last file. Closing
    /// the file never closes an open socket. What the file has read ahead is lost to the socket.
    ///
    /// Without `b` it is a text file, which differs in [`readline`](SocketFile::readline) only: that takes a line's end `\r\n` for
    /// `\n`. (In Python text files have strings where binary ones have bytes, an encoding, and take a lone `\r` for a line's end.
    /// Here all reads and writes are of bytes, and what is a [`String`] has to be UTF-8.)
    ///
    /// # Errors
    ///
    /// `Value`: another letter in `mode`. `EBADF`: closed.
    ///
    /// # Source
    ///
    /// Python `socket.makefile(mode)`.
    ///
    /// ```
    /// use std::io::Write;
    /// let (left, right) = ringsock::socketpair()?;
    /// right.sendall(b"HELO\r\n")?;
    /// let mut file = left.makefile("rw")?;
    /// assert_eq!(file.readline()?, "HELO\n");
    /// file.write_all(b"250 ")?;
    /// file.write_all(b"OK\r\n")?;
    /// file.flush()?;
    /// assert_eq!(right.recv(1024)?, b"250 OK\r\n");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn makefile(&self, mode: &str) -> Result<SocketFile> {
        self.makefile_with(mode, MakeFile::default())
    }

    /// [`makefile`](Socket::makefile) with a say in the buffers.
    ///
    /// # Errors
    ///
    /// Those of [`makefile`](Socket::makefile); `Value`: no buffer in text mode.
    ///
    /// # Source
    ///
    /// Python `socket.makefile(mode, buffering)`.
    ///
    /// ```
    /// use ringsock::MakeFile;
    /// use std::io::Read;
    /// let (left, right) = ringsock::socketpair()?;
    /// right.sendall(b"head and the rest")?;
    /// let mut head = [0; 4];
    /// let unbuffered = MakeFile { buffering: Some(0), ..Default::default() };
    /// left.makefile_with("rb", unbuffered)?.read_exact(&mut head)?;
    /// assert_eq!(left.recv(1024)?, b" and the rest"); // nothing was read ahead
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn makefile_with(&self, mode: &str, options: MakeFile) -> Result<SocketFile> {
        let mode = Mode::parse(mode)?;
        let buffer_bytes = match options.buffering {
            None | Some(..0) => BUFFER_BYTES,
            Some(bytes) => bytes as usize,
        };
        if buffer_bytes == 0 && !mode.binary {
            return Err(Error::Value("unbuffered streams must be binary".into()));
        }
        Ok(SocketFile {
            handle: Some(FileHandle::new(self)?),
            mode,
            buffer_bytes,
            line_buffering: options.line_buffering,
            poisoned: false,
            read: Vec::new(),
            read_start: 0,
            write: Vec::new(),
        })
    }
}

impl SocketFile {
    /// One line with its end `\n`; without it at the end of the stream, and empty behind that. In text mode the line's end `\r\n` reads
    /// as `\n`.
    ///
    /// # Errors
    ///
    /// Those of the type; `InvalidData`: not UTF-8 (the line is taken; `read_until` has bytes instead). After another error, what was
    /// read of the line is lost.
    ///
    /// # Source
    ///
    /// Python `io.TextIOBase.readline()`, `io.IOBase.readline()`.
    ///
    /// ```
    /// let (left, right) = ringsock::socketpair()?;
    /// right.sendall(b"one\r\ntwo")?;
    /// drop(right);
    /// let mut file = left.makefile("r")?;
    /// assert_eq!(file.readline()?, "one\n");
    /// assert_eq!(file.readline()?, "two");
    /// assert_eq!(file.readline()?, "");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn readline(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        self.read_until(b'\n', &mut line)?;
        if !self.mode.binary && line.ends_with(b"\r\n") {
            line.truncate(line.len() - 2);
            line.push(b'\n');
        }
        String::from_utf8(line).map_err(|error| {
            let position = error.utf8_error().valid_up_to();
            let text = format!("the line is not UTF-8 at byte {position}");
            io::Error::new(io::ErrorKind::InvalidData, text)
        })
    }

    /// Flushes and closes the file; the socket too, if it was closed before and this was its last file. Closing again does nothing.
    ///
    /// # Errors
    ///
    /// Those of [`flush`](Write::flush); the file is closed all the same, and what was not sent is lost.
    ///
    /// # Source
    ///
    /// Python `io.IOBase.close()`.
    ///
    /// ```
    /// let (left, _right) = ringsock::socketpair()?;
    /// let mut file = left.makefile("r")?;
    /// left.close()?;
    /// assert!(left.fileno() >= 0, "the file is still open");
    /// file.close()?;
    /// assert_eq!(left.fileno(), -1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn close(&mut self) -> io::Result<()> {
        let flushed = self.flush_if_open();
        self.handle = None;
        self.write = Vec::new();
        self.read = Vec::new();
        self.read_start = 0;
        flushed
    }

    /// Whether [`close`](SocketFile::close) was called: Python's attribute `closed`.
    pub fn closed(&self) -> bool {
        self.handle.is_none()
    }

    /// Whether it is a file for reading.
    pub fn readable(&self) -> bool {
        self.mode.reading
    }

    /// Whether it is a file for writing.
    pub fn writable(&self) -> bool {
        self.mode.writing
    }

    /// False: a socket has no positions.
    pub fn seekable(&self) -> bool {
        false
    }

    /// The socket's descriptor; -1 once the file is closed: Python's `fileno()` and attribute `name`.
    pub fn fileno(&self) -> RawFd {
        self.handle.as_ref().map_or(-1, |handle| handle.0.fileno())
    }

    /// The socket of a file that may be read.
    fn reader(&self) -> io::Result<&Socket> {
        let socket = self.socket()?;
        if !self.mode.reading {
            return Err(unsupported("not readable"));
        }
        Ok(socket)
    }

    /// The socket of a file that may be written.
    fn writer(&self) -> io::Result<&Socket> {
        let socket = self.socket()?;
        if !self.mode.writing {
            return Err(unsupported("not writable"));
        }
        Ok(socket)
    }

    fn socket(&self) -> io::Result<&Socket> {
        match &self.handle {
            Some(handle) => Ok(&handle.0),
            None => Err(Error::Value("I/O operation on closed file.".into()).into()),
        }
    }

    /// One receive, straight into `buffer`.
    fn receive(&mut self, buffer: &mut [MaybeUninit<u8>]) -> io::Result<usize> {
        let socket = self.reader()?;
        if self.poisoned {
            return Err(Error::Message("cannot read from timed out object".into()).into());
        }
        let received = socket.recv_uninit(buffer).map(|bytes| bytes.len());
        self.poisoned = matches!(&received, Err(error) if error.is_timeout());
        Ok(received?)
    }

    /// Sends what is buffered, and keeps what could not be sent.
    fn flush_if_open(&mut self) -> io::Result<()> {
        while let Some(handle) = &self.handle
            && !self.write.is_empty()
        {
            // Not sendall, which does not say how far it came.
            let sent = handle.0.send(&self.write)?;
            self.write.drain(..sent);
        }
        Ok(())
    }
}

fn unsupported(text: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, text)
}

impl BufRead for SocketFile {
    /// The bytes that were read ahead; if there are none, what one receive brings. Empty at the end of the stream.
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.reader()?;
        if self.read_start == self.read.len() {
            let mut buffer = std::mem::take(&mut self.read);
            // Without a buffer, one byte: nothing is read ahead.
            buffer.clear();
            let room = self.buffer_bytes.max(1);
            buffer.reserve_exact(room);
            let received = self.receive(&mut buffer.spare_capacity_mut()[..room]);
            sys::set_received(&mut buffer, *received.as_ref().unwrap_or(&0));
            self.read = buffer;
            self.read_start = 0;
            received?;
        }
        Ok(&self.read[self.read_start..])
    }

    fn consume(&mut self, count: usize) {
        self.read_start = (self.read_start + count).min(self.read.len());
    }
}

impl Read for SocketFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return self.reader().map(|_| 0);
        }
        // What is at least as large as our buffer needs no copy.
        if self.read_start == self.read.len() && buffer.len() >= self.buffer_bytes {
            return self.receive(sys::as_uninit(buffer));
        }
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

impl Write for SocketFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer()?;
        if self.write.len() + bytes.len() > self.buffer_bytes {
            self.flush_if_open()?;
        }
        if bytes.len() >= self.buffer_bytes {
            return Ok(self.writer()?.send(bytes)?);
        }
        self.write.extend_from_slice(bytes);
        if self.line_buffering && bytes.contains(&b'\n') {
            // The bytes are taken, so this must not look like a write that failed. They are kept, and the next flush tells.
            let _ = self.flush_if_open();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket()?;
        self.flush_if_open()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Nobody is there to hear of an error. The handle, dropped next, closes in any case.
        let _ = self.flush_if_open();
    }
}

impl fmt::Debug for SocketFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = |is_set, letter| if is_set { letter } else { "" };
        let Mode {
            reading,
            writing,
            binary,
        } = self.mode;
        let (r, w, b) = (mode(reading, "r"), mode(writing, "w"), mode(binary, "b"));
        write!(
            f,
            "<ringsock.SocketFile name={} mode='{r}{w}{b}'>",
            self.fileno()
        )
    }
}
