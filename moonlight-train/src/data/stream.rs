//! An endless stream of batches, from any position.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::cuts::even_cuts;
use super::sequences::Sequences;
use super::shuffle::Shuffle;
use super::{DataError, HostBatch};

/// The largest number of tokens in a step. All of them are in memory before the step starts, at about 16 bytes each.
pub(crate) const MAX_STEP_TOKENS: u64 = 1 << 32;

/// The position in the training data, as checkpoints store it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataPosition {
    /// Complete epochs before the position.
    pub epoch: u64,
    /// Sequences of the current epoch before the position.
    pub sequence: u64,
    /// A hash of the tokens, the sequence length and the seed, which identifies the data.
    pub data: u64,
}

/// The training batches, epoch after epoch. A batch at the end of an epoch is filled up from the next one.
#[derive(Clone)]
pub struct TrainStream {
    sequences: Sequences,
    seed: Option<u64>,
    batch_size: usize,
    position: DataPosition,
}

impl TrainStream {
    /// A stream that starts with the first sequence, shuffled by `seed` or, with `None`, in the order of the files. `sequences`
    /// must not be empty.
    pub(super) fn new(sequences: Sequences, seed: Option<u64>, batch_size: usize, data: u64) -> Self {
        Self { sequences, seed, batch_size, position: DataPosition { epoch: 0, sequence: 0, data } }
    }

    /// The next batch, of `batch_size` sequences.
    ///
    /// # Errors
    ///
    /// [`DataError`] if the token cache can no longer be read, or if a step has more than 2^32 tokens.
    pub fn next_batch(&mut self) -> Result<HostBatch, DataError> {
        let indices = self.next_indices(self.batch_size)?;
        self.sequences.batch(&indices)
    }

    /// The part `share` of the next `sequences` sequences, divided into `batches` batches whose sizes differ by at most 1. The
    /// position moves past all `sequences`, so that all ranks stay at the same position, each with its own share.
    ///
    /// # Errors
    ///
    /// As [`next_batch`](Self::next_batch).
    pub fn next_share(
        &mut self,
        sequences: usize,
        share: Range<usize>,
        batches: usize,
    ) -> Result<Vec<HostBatch>, DataError> {
        let indices = self.next_indices(sequences)?;
        let cuts = even_cuts(share.len(), batches);
        let batch = |cut: &[usize]| self.sequences.batch(&indices[share.start + cut[0]..share.start + cut[1]]);
        cuts.windows(2).map(batch).collect()
    }

    fn next_indices(&mut self, wanted: usize) -> Result<Vec<u64>, DataError> {
        let length = self.sequences.length();
        if wanted.checked_mul(length).is_none_or(|tokens| tokens as u64 > MAX_STEP_TOKENS) {
            return Err(DataError::StepTooLarge { sequences: wanted, length });
        }
        let count = self.sequences.count();
        let mut order = self.order();
        let mut indices = Vec::with_capacity(wanted);
        while indices.len() < wanted {
            let index = self.position.sequence;
            indices.push(order.map_or(index, |order| order.at(index)));
            self.position.sequence += 1;
            if self.position.sequence == count {
                self.position.epoch += 1;
                self.position.sequence = 0;
                order = self.order();
            }
        }
        Ok(indices)
    }

    fn order(&self) -> Option<Shuffle> {
        self.seed.map(|seed| Shuffle::new(self.sequences.count(), seed, self.position.epoch))
    }

    /// The position of the next batch.
    pub fn position(&self) -> DataPosition {
        self.position
    }

    /// Moves to `position`: the next batches are those that followed it.
    ///
    /// # Errors
    ///
    /// [`DataError::Changed`] for a position in other data: other tokens, another seed or sequence length.
    pub fn seek(&mut self, position: DataPosition) -> Result<(), DataError> {
        if position.data != self.position.data || position.sequence >= self.sequences.count() {
            return Err(DataError::Changed);
        }
        self.position = position;
        Ok(())
    }
}
