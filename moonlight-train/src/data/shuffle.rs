//! The order of an epoch: a permutation that needs no memory and gives any of its elements directly, so that a run can resume
//! anywhere in an epoch of billions of sequences.
//!
//! A Feistel network permutes the numbers below a power of four. A number outside the range is permuted again until it is
//! inside ("cycle walking", Black and Rogaway 2002), which gives a permutation of the range. The power is less than 4 times the
//! range, so fewer than 4 attempts are needed on average.

use super::hash::mix;

const ROUNDS: u64 = 6;

/// A permutation of `0..length` that follows from a seed and an epoch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shuffle {
    length: u64,
    half_bits: u32,
    key: u64,
}

impl Shuffle {
    pub(super) fn new(length: u64, seed: u64, epoch: u64) -> Self {
        let bits = u64::BITS - length.saturating_sub(1).leading_zeros();
        Self { length, half_bits: bits.div_ceil(2).max(1), key: mix(mix(seed ^ 0x6d6f_6f6e) ^ epoch) }
    }

    /// The element at `index`, which must be below the length.
    pub(super) fn at(&self, index: u64) -> u64 {
        debug_assert!(index < self.length);
        let mut value = index;
        loop {
            value = self.permute(value);
            if value < self.length {
                return value;
            }
        }
    }

    fn permute(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..ROUNDS {
            // `right` is below 2^32, so the number of the round in the top byte gives each round a different function.
            let mixed = mix(self.key ^ mix(right ^ (round << 56))) & mask;
            (left, right) = (right, left ^ mixed);
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_occurs_once() {
        for length in [1, 2, 3, 4, 5, 16, 17, 1000] {
            for epoch in 0..3 {
                let order = Shuffle::new(length, 7, epoch);
                let mut seen: Vec<u64> = (0..length).map(|index| order.at(index)).collect();
                seen.sort_unstable();
                assert!(seen.into_iter().eq(0..length));
            }
        }
    }

    #[test]
    fn seeds_and_epochs_give_different_orders() {
        let order = |seed, epoch| -> Vec<u64> { (0..1000).map(|at| Shuffle::new(1000, seed, epoch).at(at)).collect() };
        assert_eq!(order(1, 1), order(1, 1));
        let fixed = |a: Vec<u64>, b: Vec<u64>| a.iter().zip(&b).filter(|(a, b)| a == b).count();
        assert!(fixed(order(1, 1), order(1, 2)) < 10);
        assert!(fixed(order(1, 1), order(2, 1)) < 10);
        assert!(fixed(order(1, 1), (0..1000).collect()) < 10);
    }

    /// Over many seeds, each of 8 numbers is at each of 8 positions about equally often.
    #[test]
    fn positions_are_uniform() {
        let mut counts = [[0u32; 8]; 8];
        for seed in 0..8000 {
            let order = Shuffle::new(8, seed, 0);
            for index in 0..8 {
                counts[index as usize][order.at(index) as usize] += 1;
            }
        }
        // 1000 each, standard deviation about 30.
        assert!(counts.iter().flatten().all(|&count| (850..1150).contains(&count)), "{counts:?}");
    }
}
