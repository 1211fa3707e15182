//! Numbers from a seed, and the bytes that the sessions send.

/// xorshift64*.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number from 0 to `bound` - 1.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// The bytes of one session: each depends on the session and on its place, so that a lost, doubled, moved or foreign byte shows.
pub struct Text {
    seed: u64,
    offset: u64,
}

impl Text {
    pub fn new(seed: u64) -> Text {
        Text { seed, offset: 0 }
    }

    fn next(&mut self) -> u8 {
        let word = (self.seed ^ (self.offset >> 3)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let byte = (word ^ (word >> 29)).to_le_bytes()[(self.offset & 7) as usize];
        self.offset += 1;
        byte
    }

    pub fn fill(&mut self, buffer: &mut [u8]) {
        buffer.fill_with(|| self.next());
    }

    /// Whether these are the next bytes.
    pub fn matches(&mut self, bytes: &[u8]) -> bool {
        bytes.iter().all(|byte| *byte == self.next())
    }

    /// How many bytes there were so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }
}
