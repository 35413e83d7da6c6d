//! A hash that is the same on every machine and in every version, which the standard library's is not: checkpoints and file
//! names contain it.

/// FNV-1a, 64 bits, with a final mix, because FNV's high bits depend on few bits of the input.
pub(super) struct Hash(u64);

impl Hash {
    /// Different seeds give independent hashes.
    pub(super) fn new(seed: u64) -> Self {
        Self(0xcbf2_9ce4_8422_2325 ^ mix(seed))
    }

    /// Adds bytes.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    /// Adds a number.
    pub(super) fn number(&mut self, number: u64) {
        self.0 = mix(self.0 ^ number).wrapping_add(0x9e37_79b9_7f4a_7c15);
    }

    /// The hash of everything added so far.
    pub(super) fn finish(&self) -> u64 {
        mix(self.0)
    }
}

/// The finalizer of SplitMix64: each bit of the input changes half of the output's bits on average.
pub(super) fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
