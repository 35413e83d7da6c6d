//! Which documents share a sequence, if none may be cut.
//!
//! Best-fit decreasing: starting with the longest, each document goes into the sequence in which it leaves the least space,
//! or into a new one. The result has at most 11/9 of the smallest possible number of sequences (Johnson 1973). Conversations
//! are mostly short, and fill their sequences almost completely ("Fewer Truncations Improve Language Modeling",
//! arXiv 2404.10830).

use std::collections::BTreeMap;
use std::ops::Range;

/// Documents by sequence.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Bins {
    /// The indices of the documents, sequence by sequence.
    documents: Vec<u32>,
    /// The end of each sequence in `documents`.
    ends: Vec<u32>,
}

impl Bins {
    /// Packs documents of these lengths, none above `capacity`, into sequences. Within a sequence they keep their order, and
    /// sequences are in the order of their first documents. The same lengths always give the same sequences, which a resumed
    /// run relies on.
    pub(super) fn best_fit(lengths: &[u64], capacity: u64) -> Self {
        let mut order: Vec<u32> = (0..lengths.len() as u32).collect();
        // A stable sort: documents of equal length are placed in their order.
        order.sort_by_key(|&document| std::cmp::Reverse(lengths[document as usize]));
        let mut bins: Vec<Vec<u32>> = Vec::new();
        let mut by_space: BTreeMap<u64, Vec<u32>> = BTreeMap::new(); // open sequences by the tokens that still fit
        for document in order {
            let length = lengths[document as usize];
            let fit = by_space.range_mut(length..).next().and_then(|(&space, open)| Some((space, open.pop()?)));
            let (space, bin) = fit.unwrap_or_else(|| {
                bins.push(Vec::new());
                (capacity, bins.len() as u32 - 1)
            });
            if by_space.get(&space).is_some_and(Vec::is_empty) {
                by_space.remove(&space);
            }
            bins[bin as usize].push(document);
            by_space.entry(space.saturating_sub(length)).or_default().push(bin);
        }
        bins.iter_mut().for_each(|bin| bin.sort_unstable());
        bins.sort_unstable_by_key(|bin| bin[0]);
        let mut result = Self { documents: Vec::with_capacity(lengths.len()), ends: Vec::with_capacity(bins.len()) };
        for bin in bins {
            result.documents.extend(bin);
            result.ends.push(result.documents.len() as u32);
        }
        result
    }

    /// Number of sequences.
    pub(super) fn count(&self) -> u64 {
        self.ends.len() as u64
    }

    /// The documents of a sequence.
    pub(super) fn documents(&self, sequence: u64) -> &[u32] {
        let end = |sequence: usize| self.ends[sequence] as usize;
        let sequence = sequence as usize;
        let span: Range<usize> = if sequence == 0 { 0 } else { end(sequence - 1) }..end(sequence);
        &self.documents[span]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::hash::mix;

    #[test]
    fn every_document_is_in_exactly_one_sequence() {
        for (count, capacity) in [(0, 8), (1, 8), (500, 16), (3000, 100)] {
            let lengths: Vec<u64> = (0..count).map(|n| 1 + mix(n) % capacity).collect();
            let bins = Bins::best_fit(&lengths, capacity);
            let mut seen: Vec<u32> = Vec::new();
            for sequence in 0..bins.count() {
                let documents = bins.documents(sequence);
                assert!(!documents.is_empty() && documents.is_sorted());
                assert!(documents.iter().map(|&document| lengths[document as usize]).sum::<u64>() <= capacity);
                seen.extend(documents);
            }
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..count as u32));
            let fewest = lengths.iter().sum::<u64>().div_ceil(capacity);
            assert!(bins.count() <= fewest * 11 / 9 + 1, "{} sequences for {fewest}", bins.count());
        }
    }

    #[test]
    fn a_document_goes_where_it_fits_best() {
        // Longest first: 6 and 5 start sequences, 4 fits after 6, 3 after 5, and 2 with them.
        let bins = Bins::best_fit(&[2, 4, 5, 3, 6], 10);
        assert_eq!(bins.count(), 2);
        assert_eq!((bins.documents(0), bins.documents(1)), (&[0, 2, 3][..], &[1, 4][..]));
    }

    #[test]
    fn short_conversations_leave_little_padding() {
        let lengths: Vec<u64> = (0..5000).map(|n| 20 + mix(n) % 700).collect();
        let bins = Bins::best_fit(&lengths, 1024);
        let full = lengths.iter().sum::<u64>() as f64 / (bins.count() * 1024) as f64;
        assert!(full > 0.97, "{full}");
    }
}
