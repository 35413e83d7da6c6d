//! [`ClaimBitmap`]: one bit for each element of a buffer, set by the thread that claims the element.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

const BITS: usize = u64::BITS as usize;

#[derive(Default)]
pub(crate) struct ClaimBitmap(Vec<AtomicU64>);

impl ClaimBitmap {
    pub(crate) fn new(length: usize) -> Self {
        Self((0..length.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Sets the bits of a range.
    ///
    /// # Panics
    ///
    /// If one was set before.
    pub(crate) fn claim(&self, range: Range<usize>) {
        let mut first = range.start;
        while first < range.end {
            let (word, bit) = (first / BITS, first % BITS);
            let count = (BITS - bit).min(range.end - first);
            let mask = (u64::MAX >> (BITS - count)) << bit;
            // Relaxed is enough: the read-modify-writes of one word have a total order, so one of two overlapping claims sees the
            // other.
            let overlap = self.0[word].fetch_or(mask, Ordering::Relaxed) & mask;
            assert!(
                overlap == 0,
                "an overlap: element {} was claimed twice",
                word * BITS + overlap.trailing_zeros() as usize
            );
            first += count;
        }
    }

    /// The first of `length` elements whose bit is not set.
    pub(crate) fn first_gap(&self, length: usize) -> Option<usize> {
        (0..length).find(|element| self.0[element / BITS].load(Ordering::Relaxed) >> (element % BITS) & 1 == 0)
    }
}
