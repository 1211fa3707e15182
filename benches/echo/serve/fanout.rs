//! Fan-out: the first connection that sends is the publisher, and each of its messages goes to all others.

/// The publisher and what has been received of its next message.
pub struct Fanout {
    publisher: Option<u32>,
    message: Box<[u8]>,
    filled: usize,
}

impl Fanout {
    /// For messages of `size` bytes.
    pub fn new(size: u32) -> Self {
        Self {
            publisher: None,
            message: vec![0; size as usize].into_boxed_slice(),
            filled: 0,
        }
    }

    /// Whether this connection, which has sent something, is the publisher.
    pub fn is_publisher(&mut self, index: u32) -> bool {
        *self.publisher.get_or_insert(index) == index
    }

    /// Takes what the publisher has sent and calls `publish` with each message that it completes.
    pub fn take<E>(
        &mut self,
        mut bytes: &[u8],
        mut publish: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while !bytes.is_empty() {
            let count = bytes.len().min(self.message.len() - self.filled);
            self.message[self.filled..self.filled + count].copy_from_slice(&bytes[..count]);
            self.filled += count;
            bytes = &bytes[count..];
            if self.filled == self.message.len() {
                self.filled = 0;
                publish(&self.message)?;
            }
        }
        Ok(())
    }
}
