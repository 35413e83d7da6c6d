//! Cross-entropy of rows of logits, and its gradient.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::{FloatTensor, IntTensor};
use rayon::prelude::*;

use super::dtype::{Element, round, widen};
use super::math::{exp_in_place, largest};
use super::tensor::{by_dtype, dims, tensor, tensor_of, values, values_of, zeros};
use crate::kernels::{CrossEntropyKernel, reference};

impl CrossEntropyKernel for Flex {
    fn cross_entropy_forward(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        let indices = indices(&targets, dims::<2>(&logits)[1]);
        by_dtype!(
            [logits],
            E => forward::<E>(&logits, &indices),
            reference::cross_entropy_forward::<Self>(logits, targets)
        )
    }

    fn cross_entropy_grad(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        loss_grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let indices = indices(&targets, dims::<2>(&logits)[1]);
        by_dtype!(
            [logits] f32: [loss_grad],
            E => grad::<E>(&logits, &indices, &loss_grad),
            reference::cross_entropy_grad::<Self>(logits, targets, loss_grad)
        )
    }
}

/// Targets of any integer type as indices.
///
/// # Panics
///
/// If a target is outside the vocabulary.
fn indices(targets: &FlexTensor, vocab: usize) -> Vec<usize> {
    let index = |target: i64| match usize::try_from(target) {
        Ok(index) if index < vocab => index,
        _ => panic!("cross_entropy: the target {target} is not in a vocabulary of {vocab}"),
    };
    targets.clone().into_data().iter::<i64>().map(index).collect()
}

fn forward<E: Element>(logits: &FlexTensor, targets: &[usize]) -> FlexTensor {
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
                // The difference first: in a confident model the logit is close to the largest, and the small logarithm would
                // lose its digits if it were added to a large offset.
                sum.ln() + (offset - row[target].wide())
            },
        )
        .collect();
    tensor(losses, [rows])
}

fn grad<E: Element>(logits: &FlexTensor, targets: &[usize], grad: &FlexTensor) -> FlexTensor {
    let [rows, vocab] = dims(logits);
    let logits = values_of::<E>(logits);
    let mut out = zeros::<E>(rows * vocab);
    out.par_chunks_mut(vocab)
        .zip(logits.par_chunks(vocab))
        .zip(targets.par_iter().zip(values(grad)))
        .filter(|(_, (_, grad))| **grad != 0.0) // a masked token, whose row stays zero
        .for_each_init(
            || vec![0.0; vocab],
            |scratch, ((out, row), (&target, &grad))| {
                widen(row, scratch);
                let offset = largest(scratch);
                let scale = grad / exp_in_place(scratch, offset);
                for value in scratch.iter_mut() {
                    *value *= scale;
                }
                scratch[target] -= grad; // g (softmax - onehot), before the one rounding
                round(scratch, out);
            },
        );
    tensor_of(out, [rows, vocab])
}
