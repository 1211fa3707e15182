//! What a worker's relays carry bytes in: buffers and pipes, last in, first out, so that the one that is hot is used again.

use std::cell::{Cell, RefCell, RefMut};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::sys;

/// The most buffers that lie idle, and the most pipes.
const SPARE_MAX: usize = 8;

/// The most pipes in use or idle on one worker: twice as many descriptors.
const PIPES_MAX: usize = 64;

/// An empty pipe; or, while a way has it, one that holds what that way received and has not sent.
pub(super) struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
    bytes: usize,
}

impl Pipe {
    pub(super) fn reader(&self) -> RawFd {
        self.reader.as_raw_fd()
    }

    pub(super) fn writer(&self) -> RawFd {
        self.writer.as_raw_fd()
    }
}

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Vessels {
    /// The buffer that was used last, for whoever needs it only until it lets others run. It may have no room.
    hot: RefCell<Vec<u8>>,
    /// Empty vectors; what they own is the room behind their end.
    buffers: RefCell<Vec<Vec<u8>>>,
    pipes: RefCell<Vec<Pipe>>,
    /// Pipes there are, idle or not.
    pipes_made: Cell<usize>,
}

impl Vessels {
    /// The hot buffer, with room for `bytes`; `None` if there is no memory. It is given back before another fiber runs, or
    /// [kept](Vessels::give_buffer) by taking what is in it.
    #[inline]
    pub(super) fn hot_buffer(&self, bytes: usize) -> Option<RefMut<'_, Vec<u8>>> {
        let mut hot = self.hot.borrow_mut();
        if hot.capacity() < bytes && !self.heat(&mut hot, bytes) {
            return None;
        }
        Some(hot)
    }

    /// Makes a spare buffer the hot one, or a new one; false if there is no memory.
    #[cold]
    fn heat(&self, hot: &mut Vec<u8>, bytes: usize) -> bool {
        *hot = self.buffers.borrow_mut().pop().unwrap_or_default();
        hot.capacity() >= bytes || hot.try_reserve_exact(bytes).is_ok()
    }

    /// Takes back a buffer that a way had kept, and emptied.
    #[cold]
    pub(super) fn give_buffer(&self, buffer: Vec<u8>) {
        let mut hot = self.hot.borrow_mut();
        if hot.capacity() == 0 {
            *hot = buffer;
            return;
        }
        let mut buffers = self.buffers.borrow_mut();
        if buffers.len() < SPARE_MAX {
            buffers.push(buffer);
        }
    }

    /// An empty pipe for `bytes` or more; `None` if there are too many of them, or no descriptors.
    pub(super) fn take_pipe(&self, bytes: usize) -> Option<Pipe> {
        if let Some(pipe) = self.pipes.borrow_mut().pop() {
            if pipe.bytes >= bytes {
                return Some(pipe);
            }
            self.pipes_made.set(self.pipes_made.get() - 1);
        }
        if self.pipes_made.get() >= PIPES_MAX {
            return None;
        }
        // A pipe counts pieces, each a page at the most: what arrives in smaller ones finds room as well.
        let (reader, writer) = sys::pipe(4 * bytes).ok()?;
        self.pipes_made.set(self.pipes_made.get() + 1);
        Some(Pipe {
            reader,
            writer,
            bytes,
        })
    }

    /// Takes back a pipe that is empty.
    pub(super) fn give_pipe(&self, pipe: Pipe) {
        let mut pipes = self.pipes.borrow_mut();
        if pipes.len() < SPARE_MAX {
            pipes.push(pipe);
        } else {
            drop(pipes);
            self.lose_pipe(pipe);
        }
    }

    /// Closes a pipe with what is in it.
    #[cold]
    pub(super) fn lose_pipe(&self, pipe: Pipe) {
        self.pipes_made.set(self.pipes_made.get() - 1);
        drop(pipe);
    }
}
