//! What an attention to a cache needs to know of the new tokens.

use std::ops::Range;
use std::sync::Arc;

/// New tokens of one sequence, which lie beside each other among all new tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The sequence: the first index of the cache.
    pub sequence: usize,
    /// Position of the first: how many tokens of the sequence the cache had.
    pub start: usize,
    /// How many.
    pub count: usize,
}

impl Run {
    /// Tokens of the sequence with the new ones.
    pub fn end(&self) -> usize {
        self.start + self.count
    }
}

/// What [`attend_past`](super::attend_past) needs to know beside its tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct PastSpec {
    /// Factor on the scores.
    pub scale: f32,
    /// Which values of a row of the cache are the key.
    pub keys: Range<usize>,
    /// Which are the value; they may be a part of the key.
    pub values: Range<usize>,
    /// The new tokens, in order, at most one run of a sequence.
    pub runs: Arc<Vec<Run>>,
}

/// The runs, if every one of the `batch` sequences has one, in order, and all are of one length at one position.
pub(crate) fn in_step(runs: &[Run], batch: usize) -> Option<Run> {
    let first = *runs.first()?;
    let same = |(index, run): (usize, &Run)| *run == Run { sequence: index, ..first };
    (runs.len() == batch && runs.iter().enumerate().all(same)).then_some(first)
}
