//! Statistics and samples of the data, to look at before a run.

use std::path::PathBuf;

use super::sequences::{DocumentSpan, Sequences};
use super::{DataError, Dataset};

/// Statistics of a dataset, and some of its documents.
#[derive(Debug, Clone, PartialEq)]
pub struct Inspection {
    /// Statistics of the training data.
    pub train: SplitStats,
    /// Statistics of the validation data, if there are any.
    pub valid: Option<SplitStats>,
    /// Documents of the training data, evenly spaced.
    pub samples: Vec<Sample>,
}

/// Statistics of the training or the validation data.
#[derive(Debug, Clone, PartialEq)]
pub struct SplitStats {
    /// Documents or conversations.
    pub documents: usize,
    /// Tokens of the documents, without padding.
    pub tokens: u64,
    /// Tokens that are predicted with a weight above 0.
    pub learned: u64,
    /// Sequences of an epoch.
    pub sequences: u64,
    /// The share of the sequences that is not padding; `None` without packing, where padding depends on the batch.
    pub fill: Option<f64>,
    /// Tokens of the shortest, the median and the longest document.
    pub lengths: [u64; 3],
    /// A histogram of lengths: `(n, count)` for documents with more than `n / 2` and at most `n` tokens.
    pub histogram: Vec<(u64, u64)>,
}

/// A document as the model reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The file that contains it.
    pub path: PathBuf,
    /// The line it starts in, from 1; 0 if the document is the whole file.
    pub line: u32,
    /// The column it starts in, from 1; 0 if a line has only one document.
    pub column: u32,
    /// The tokens, each with its weight in the loss.
    pub tokens: Vec<(u32, f32)>,
}

impl Dataset {
    /// Statistics of the data, and up to `samples` documents.
    ///
    /// # Errors
    ///
    /// [`DataError`] if the token cache can no longer be read.
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
        // Ranges without a document between two others are listed too.
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
