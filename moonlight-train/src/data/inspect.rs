//! SplitStats and samples of the data, to look at before a run.

use std::path::PathBuf;

use super::sequences::{DocumentSpan, Sequences};
use super::{DataError, Dataset};

/// What the data are.
#[derive(Debug, Clone, PartialEq)]
pub struct Inspection {
    /// The training data.
    pub train: SplitStats,
    /// The validation data.
    pub valid: Option<SplitStats>,
    /// Documents of the training data, spread evenly over it.
    pub samples: Vec<Sample>,
}

/// SplitStats of a part of the data.
#[derive(Debug, Clone, PartialEq)]
pub struct SplitStats {
    /// Number of documents or conversations.
    pub documents: usize,
    /// Their tokens.
    pub tokens: u64,
    /// The tokens that are predicted and learned.
    pub learned: u64,
    /// Sequences of an epoch.
    pub sequences: u64,
    /// Share of the room in the sequences that tokens fill; `None` where each document is a row of its own.
    pub fill: Option<f64>,
    /// The shortest, the median and the longest document.
    pub lengths: [u64; 3],
    /// Documents by length: `(n, count)` of those with at most `n` tokens and more than half of that.
    pub histogram: Vec<(u64, u64)>,
}

/// A document as the model sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Its file.
    pub path: PathBuf,
    /// Its line, from 1; 0 where the document is the whole file.
    pub line: u32,
    /// The column that it begins in, from 1, where several documents may stand in a line; else 0.
    pub column: u32,
    /// Its tokens and how much each counts in the loss when it is predicted.
    pub tokens: Vec<(u32, f32)>,
}

impl Dataset {
    /// SplitStats of the data, and up to `samples` documents.
    ///
    /// # Errors
    ///
    /// [`DataError`] where the tokens cannot be read any more.
    pub fn inspect(&self, samples: usize) -> Result<Inspection, DataError> {
        let parts = self.train.parts();
        let count = samples.min(parts.len());
        let chosen = (0..count).map(|index| parts[index * parts.len() / count]);
        Ok(Inspection {
            train: split_stats(&self.train)?,
            valid: self.valid.as_ref().map(split_stats).transpose()?,
            samples: chosen.map(|part| self.sample(part)).collect::<Result<_, _>>()?,
        })
    }

    fn sample(&self, part: DocumentSpan) -> Result<Sample, DataError> {
        let store = self.train.store();
        let origin = store.origin_at(part.start)?;
        let path = self.files.get(origin.file as usize).map(|file| file.path.clone()).unwrap_or_default();
        let tokens = store.reader(0).read(part.start..part.end)?.collect();
        Ok(Sample { path, line: origin.line, column: origin.column, tokens })
    }
}

fn split_stats(sequences: &Sequences) -> Result<SplitStats, DataError> {
    let mut lengths: Vec<u64> = sequences.parts().iter().map(DocumentSpan::len).collect();
    lengths.sort_unstable();
    let at = |index: usize| lengths.get(index).copied().unwrap_or(0);
    let mut histogram: Vec<(u64, u64)> = Vec::new();
    for &length in &lengths {
        let bound = length.max(1).next_power_of_two();
        while histogram.last().is_none_or(|&(last, _)| last < bound) {
            let next = histogram.last().map_or(bound, |&(last, _)| 2 * last);
            histogram.push((next, 0));
        }
        if let Some((_, count)) = histogram.last_mut() {
            *count += 1;
        }
    }
    Ok(SplitStats {
        documents: lengths.len(),
        tokens: sequences.tokens(),
        learned: sequences.predicted()?,
        sequences: sequences.count(),
        fill: sequences.fill(),
        lengths: [at(0), at(lengths.len() / 2), at(lengths.len().saturating_sub(1))],
        histogram,
    })
}
