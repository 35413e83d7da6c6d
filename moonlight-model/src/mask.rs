//! The softmax of decoding.

use burn::tensor::activation::softmax;
use burn::tensor::{DType, Tensor, TensorData};

/// Softmax, in f32, of the scores of `sequence` new tokens against `length + sequence` tokens.
///
/// `scores` is `[batch, rows * sequence, length + sequence]`, unscaled, the new token being the fastest part of the
/// middle dimension; new token `i` sees the first `length + i + 1` keys. The result has the dtype of the scores.
pub(crate) fn softmax_over_past(scores: Tensor<3>, scale: f64, sequence: usize, length: usize) -> Tensor<3> {
    let dtype = scores.dtype();
    let mut scores = scores.cast(DType::F32) * scale;
    if sequence > 1 {
        let [batch, rows, past] = scores.dims();
        let hidden: Vec<bool> =
            (0..rows).flat_map(|row| (0..past).map(move |key| key > length + row % sequence)).collect();
        let hidden =
            Tensor::<3, burn::tensor::Bool>::from_data(TensorData::new(hidden, [1, rows, past]), &scores.device());
        scores = scores.mask_fill(hidden.expand([batch, rows, past]), f32::NEG_INFINITY);
    }
    softmax(scores, 2).cast(dtype)
}
