//! Cross-entropy of rows of logits.

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::element::{Element, round, widen};
use super::math::{exp_in_place, largest};
use super::{dims, tensor, tensor_of, values, values_of, zeros};

pub(super) fn forward<E: Element>(logits: &FlexTensor, targets: &[usize]) -> FlexTensor {
    let [rows, vocab] = dims(logits);
    let losses: Vec<f32> = values_of::<E>(logits)
        .par_chunks(vocab)
        .zip(targets)
        .map_init(
            || vec![0.0; vocab],
            |scratch, (row, &target)| {
                widen(row, scratch);
                let offset = largest(scratch);
                let sum = exp_in_place(scratch, offset);
                // The difference first: both terms are near each other for a confident model.
                sum.ln() + (offset - row[target].wide())
            },
        )
        .collect();
    tensor(losses, [rows])
}

pub(super) fn grad<E: Element>(logits: &FlexTensor, targets: &[usize], grad: &FlexTensor) -> FlexTensor {
    let [rows, vocab] = dims(logits);
    let logits = values_of::<E>(logits);
    let mut out = zeros::<E>(rows * vocab);
    out.par_chunks_mut(vocab)
        .zip(logits.par_chunks(vocab))
        .zip(targets.par_iter().zip(values(grad)))
        .filter(|(_, (_, grad))| **grad != 0.0) // a masked token
        .for_each_init(
            || vec![0.0; vocab],
            |scratch, ((out, row), (&target, &grad))| {
                widen(row, scratch);
                let offset = largest(scratch);
                let scale = grad / exp_in_place(scratch, offset);
                for value in scratch.iter_mut() {
                    *value *= scale;
                }
                scratch[target] -= grad;
                round(scratch, out);
            },
        );
    tensor_of(out, [rows, vocab])
}
