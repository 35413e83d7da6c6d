//! Cross-entropy of rows of logits.

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::math::{exp_in_place, largest};
use super::{dims, tensor, values};

pub(super) fn forward(logits: &FlexTensor, targets: &[usize]) -> FlexTensor {
    let [rows, vocab] = dims(logits);
    let losses: Vec<f32> = values(logits)
        .par_chunks(vocab)
        .zip(targets)
        .map_init(
            || vec![0.0; vocab],
            |scratch, (row, &target)| {
                scratch.copy_from_slice(row);
                let offset = largest(row);
                let sum = exp_in_place(scratch, offset);
                // The difference first: both terms are near each other for a confident model.
                sum.ln() + (offset - row[target])
            },
        )
        .collect();
    tensor(losses, [rows])
}

pub(super) fn grad(logits: &FlexTensor, targets: &[usize], grad: &FlexTensor) -> FlexTensor {
    let [rows, vocab] = dims(logits);
    let mut out = values(logits).to_vec();
    out.par_chunks_mut(vocab).zip(targets.par_iter().zip(values(grad))).for_each(|(row, (&target, &grad))| {
        if grad == 0.0 {
            row.fill(0.0); // a masked token
            return;
        }
        let offset = largest(row);
        let scale = grad / exp_in_place(row, offset);
        for value in row.iter_mut() {
            *value *= scale;
        }
        row[target] -= grad;
    });
    tensor(out, [rows, vocab])
}
