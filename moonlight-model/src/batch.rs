//! What goes into a forward pass.

use std::sync::Arc;

use burn::tensor::{Int, Tensor};

/// A batch of a language-modelling step; every field is `[batch, sequence]`.
#[derive(Debug, Clone)]
pub struct LmBatch {
    /// Token ids.
    pub tokens: Tensor<2, Int>,
    /// The token that follows each, or anything where the mask is zero.
    pub targets: Tensor<2, Int>,
    /// Weight of each prediction in the loss; 0 for padding and for the last token of a document.
    pub loss_mask: Tensor<2>,
    /// The documents that the sequences are packed from; `None` where each sequence is one document without padding.
    pub segments: Option<Segments>,
}

/// The documents of packed sequences.
///
/// Attention stays inside a document, positions restart with each, and padding takes no part in router statistics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments {
    pub(crate) batch: usize,
    pub(crate) sequence: usize,
    /// Position of each token in its document.
    pub(crate) positions: Arc<Vec<u32>>,
    /// Index in the sequence of the first token of each token's document.
    pub(crate) starts: Arc<Vec<u32>>,
    /// Whether each token is padding.
    pub(crate) padding: Arc<Vec<bool>>,
}

impl Segments {
    /// Reads `batch * sequence` document numbers, sequence by sequence: a new number starts a new document, a negative
    /// number is padding (which sees only itself and other padding of its run).
    ///
    /// # Panics
    ///
    /// When `documents` is not `batch * sequence` long.
    pub fn new(documents: &[i32], batch: usize, sequence: usize) -> Self {
        assert_eq!(documents.len(), batch * sequence, "one document number a token");
        let mut positions = Vec::with_capacity(documents.len());
        let mut starts = Vec::with_capacity(documents.len());
        for row in documents.chunks(sequence.max(1)) {
            let mut start = 0;
            for (index, document) in row.iter().enumerate() {
                if index > 0 && row[index - 1] != *document {
                    start = index;
                }
                starts.push(start as u32);
                positions.push((index - start) as u32);
            }
        }
        let padding = documents.iter().map(|&document| document < 0).collect();
        Self { batch, sequence, positions: positions.into(), starts: starts.into(), padding: Arc::new(padding) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_restart_with_each_document() {
        let segments = Segments::new(&[0, 0, 1, 1, 1, -1, 7, 7, 7, 8, -1, -1], 2, 6);
        assert_eq!(*segments.positions, [0, 1, 0, 1, 2, 0, 0, 1, 2, 0, 0, 1]);
        assert_eq!(*segments.starts, [0, 0, 2, 2, 2, 5, 0, 0, 0, 3, 4, 4]);
        assert_eq!(segments.padding.iter().filter(|&&padding| padding).count(), 3);
    }
}
