//! A batch on the host, before it goes to a device.

use burn::tensor::{Device, Int, Tensor, TensorData};
use moonlight_model::{LmBatch, Segments};

/// The factor on loss masks that sum to `predicted`, so that neither the sum of losses nor 1 over the sum of weights overflows
/// or underflows f32. It is 1 for ordinary sums, and otherwise a power of two, which changes no digit of the mean.
pub(crate) fn mask_scale(predicted: f64) -> f64 {
    // From 1e-10 to 1e12, which includes a step of 2^32 tokens with weights of some hundreds.
    const ORDINARY: std::ops::RangeInclusive<f64> = 1.0 / (1u64 << 33) as f64..=(1u64 << 40) as f64;
    match predicted > 0.0 && predicted.is_finite() && !ORDINARY.contains(&predicted) {
        true => predicted.log2().floor().exp2().recip(),
        false => 1.0,
    }
}

/// A micro-batch in host memory. Each list has the shape `[batch, sequence]`, row by row.
#[derive(Debug, Clone, PartialEq)]
pub struct HostBatch {
    /// Token ids; 0 in padding.
    pub tokens: Vec<i32>,
    /// The next token of each; 0 in padding and for the last token of a document.
    pub targets: Vec<i32>,
    /// The weight of the target in the loss: 1, or in conversations the weight of its message; 0 in padding, for the last
    /// token of a document, and for messages of anyone but the assistant.
    pub loss_mask: Vec<f32>,
    /// The number of each token's document within its row, negative for padding; `None` if every row is one document without
    /// padding.
    pub documents: Option<Vec<i32>>,
    /// Sequences in the batch.
    pub batch: usize,
    /// Tokens in each sequence, padding included.
    pub sequence: usize,
}

impl HostBatch {
    /// Copies the batch to a device.
    pub fn to_device(&self, device: &Device) -> LmBatch {
        self.to_device_scaled(device, 1.0)
    }

    /// Copies the batch to a device, with the loss mask times `scale`; see [`mask_scale`].
    pub(crate) fn to_device_scaled(&self, device: &Device, scale: f64) -> LmBatch {
        let mask = self.loss_mask.iter().map(|&weight| (f64::from(weight) * scale) as f32).collect();
        let shape = [self.batch, self.sequence];
        let integers = |values: &[i32]| Tensor::<2, Int>::from_data(TensorData::new(values.to_vec(), shape), device);
        LmBatch {
            tokens: integers(&self.tokens),
            targets: integers(&self.targets),
            loss_mask: Tensor::<2>::from_data(TensorData::new::<f32, _>(mask, shape), device),
            segments: self.documents.as_ref().map(|documents| Segments::new(documents, self.batch, self.sequence)),
        }
    }

    /// The sum of the loss mask, by which the sum of weighted losses is divided for their mean.
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

#[cfg(test)]
mod tests {
    use super::mask_scale;

    #[test]
    fn only_extreme_sums_of_weights_are_scaled_and_by_powers_of_two() {
        for ordinary in [1e-9, 0.3, 1.0, 4096.0, 1e12] {
            assert_eq!(mask_scale(ordinary), 1.0);
        }
        for total in [1e-40, 1.4e-45, 1e-11, 1e13, 3.4e38, 3.4e38 * 1e9] {
            let scale = mask_scale(total);
            assert_eq!(scale.log2().fract(), 0.0);
            assert!((1.0..2.0).contains(&(total * scale)), "{total}: {}", total * scale);
        }
        assert_eq!(mask_scale(0.0), 1.0);
    }
}
