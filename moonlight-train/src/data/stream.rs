//! Batches without end, from any position.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::cuts::even_cuts;
use super::sequences::Sequences;
use super::shuffle::Shuffle;
use super::{DataError, HostBatch};

/// The most tokens of a step, which are all laid out before it: some 16 bytes each.
pub(crate) const MAX_STEP_TOKENS: u64 = 1 << 32;

/// The position of a stream of batches; kept in checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataPosition {
    /// Epochs that are done.
    pub epoch: u64,
    /// Sequences of this epoch that are done.
    pub sequence: u64,
    /// A hash of the tokens, the sequence length and the seed: what the position is a position in.
    pub data: u64,
}

/// The training batches, epoch after epoch. A batch that one epoch does not fill is completed from the next.
#[derive(Clone)]
pub struct TrainStream {
    sequences: Sequences,
    seed: Option<u64>,
    batch_size: usize,
    position: DataPosition,
}

impl TrainStream {
    /// `seed` shuffles; without one the order is the files'. `sequences` must not be empty.
    pub(super) fn new(sequences: Sequences, seed: Option<u64>, batch_size: usize, data: u64) -> Self {
        Self { sequences, seed, batch_size, position: DataPosition { epoch: 0, sequence: 0, data } }
    }

    /// The next batch, of `batch_size` sequences.
    ///
    /// # Errors
    ///
    /// [`DataError`] where the tokens cannot be read any more, or are more than a step can hold.
    pub fn next_batch(&mut self) -> Result<HostBatch, DataError> {
        let indices = self.next_indices(self.batch_size)?;
        self.sequences.batch(&indices)
    }

    /// The part `share` of the next `sequences` sequences, cut into `batches` batches as even as can be. All of them are
    /// done then, so that workers with a share each stay in step.
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

    /// Where the next batch begins.
    pub fn position(&self) -> DataPosition {
        self.position
    }

    /// Moves to `position`: the batches that follow are those that followed there.
    ///
    /// # Errors
    ///
    /// [`DataError::Changed`] where it is a position in other data: other tokens, another seed or sequence length.
    pub fn seek(&mut self, position: DataPosition) -> Result<(), DataError> {
        if position.data != self.position.data || position.sequence >= self.sequences.count() {
            return Err(DataError::Changed);
        }
        self.position = position;
        Ok(())
    }
}
