//! A batch on the host, before it goes to a device.

use burn::tensor::{Device, Int, Tensor, TensorData};
use moonlight_model::{LmBatch, Segments};

/// A batch of a language-modelling step in plain memory; each list is `[batch, sequence]`, row by row.
#[derive(Debug, Clone, PartialEq)]
pub struct HostBatch {
    /// Token ids; 0 in padding.
    pub tokens: Vec<i32>,
    /// The token that follows each; 0 in padding and for the last token of a document.
    pub targets: Vec<i32>,
    /// How much the target counts in the loss: 1 where it is predicted, in conversations the weight of its message; 0 in
    /// padding, for the last token of a document and for what the assistant did not say.
    pub loss_mask: Vec<f32>,
    /// The document of each token, negative for padding; `None` where each sequence is one document without padding.
    pub documents: Option<Vec<i32>>,
    /// Number of sequences.
    pub batch: usize,
    /// Tokens in each.
    pub sequence: usize,
}

impl HostBatch {
    /// The batch as tensors.
    pub fn to_device(&self, device: &Device) -> LmBatch {
        let shape = [self.batch, self.sequence];
        let integers = |values: &[i32]| Tensor::<2, Int>::from_data(TensorData::new(values.to_vec(), shape), device);
        LmBatch {
            tokens: integers(&self.tokens),
            targets: integers(&self.targets),
            loss_mask: Tensor::<2>::from_data(TensorData::new(self.loss_mask.clone(), shape), device),
            segments: self.documents.as_ref().map(|documents| Segments::new(documents, self.batch, self.sequence)),
        }
    }

    /// Predicted tokens, each as much as it counts: the sum of the mask, by which a sum of losses becomes their mean.
    pub fn predicted(&self) -> f64 {
        self.loss_mask.iter().map(|&weight| f64::from(weight)).sum()
    }

    /// Tokens that are not padding.
    pub fn token_count(&self) -> u64 {
        match &self.documents {
            Some(documents) => documents.iter().filter(|&&document| document >= 0).count() as u64,
            None => self.tokens.len() as u64,
        }
    }
}
