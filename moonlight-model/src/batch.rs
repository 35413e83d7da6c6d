//! The input of a training step: token batches, and the documents that were packed into them.

use std::sync::Arc;

use burn::tensor::{Int, Tensor};

/// A micro-batch of a language-modeling step. Every tensor is `[batch, sequence]`.
#[derive(Debug, Clone)]
pub struct LmBatch {
    /// Token ids.
    pub tokens: Tensor<2, Int>,
    /// The token that follows each token; any valid id where the mask is 0.
    pub targets: Tensor<2, Int>,
    /// Weight of each prediction in the loss: 0 for padding, for the last token of a document, and for prompts in fine-tuning.
    pub loss_mask: Tensor<2>,
    /// The documents that the sequences are packed from; `None` if each sequence is one document without padding.
    pub segments: Option<Segments>,
}

/// The document boundaries of packed sequences.
///
/// Attention stays within a document, positions restart with each, and padding does not count in router statistics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments {
    pub(crate) batch: usize,
    pub(crate) sequence: usize,
    /// `[batch * sequence]`: position of each token in its document.
    pub(crate) positions: Arc<Vec<u32>>,
    /// `[batch * sequence]`: index in the sequence of the first token of each token's document.
    pub(crate) starts: Arc<Vec<u32>>,
    /// `[batch * sequence]`.
    pub(crate) padding: Arc<Vec<bool>>,
}

impl Segments {
    /// Reads a document id for each token, sequence by sequence. A document ends where the id changes. Negative ids mark padding,
    /// which attends to the padding before it and to nothing else.
    ///
    /// ```
    /// use burn::tensor::Device;
    /// use moonlight_model::rope::RotaryEmbedding;
    /// use moonlight_model::{ForwardContext, RopeConfig, Segments};
    ///
    /// // Two sequences of four tokens: documents of 3 + 1 tokens, then one of 2 tokens and padding.
    /// let segments = Segments::new(&[0, 0, 0, 1, 2, 2, -1, -1], 2, 4);
    /// let rotary = RotaryEmbedding::new(&RopeConfig::new(), 8);
    /// let context = ForwardContext::packed(&rotary, &segments, &Device::default());
    /// assert_eq!((context.batch(), context.sequence()), (2, 4));
    /// ```
    ///
    /// # Panics
    ///
    /// If `documents` does not have `batch * sequence` entries.
    pub fn new(documents: &[i32], batch: usize, sequence: usize) -> Self {
        assert_eq!(documents.len(), batch * sequence, "there must be one document id for each token");
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
