//! The loss of each row of logits and its gradient: a cube for each row, which keeps no probabilities.

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::launch;
use super::reduce::{UNITS, each_row, largest_of_units, row_of, sum_of_units};
use super::tensor::{elem, empty};

pub(super) fn forward(logits: CubeTensor, targets: CubeTensor) -> CubeTensor {
    let (logits, targets) = (into_contiguous(logits), into_contiguous(targets));
    let [rows, vocab] = logits.meta.shape().dims();
    let out = empty(&logits, [rows], DType::F32);
    let dtypes = [elem(&logits), elem(&targets)];
    // SAFETY: the kernel keeps within its tensors.
    unsafe { launch!(forward_kernel, each_row(rows), [logits, targets, out], rows, vocab, dtypes) };
    out
}

/// `g (softmax(logits) - onehot(target))`; `grad` is f32.
pub(super) fn grad(logits: CubeTensor, targets: CubeTensor, grad: CubeTensor) -> CubeTensor {
    let (logits, targets, grad) = (into_contiguous(logits), into_contiguous(targets), into_contiguous(grad));
    let [rows, vocab] = logits.meta.shape().dims();
    let out = empty(&logits, [rows, vocab], logits.dtype);
    let dtypes = [elem(&logits), elem(&targets)];
    // SAFETY: the kernel keeps within its tensors.
    unsafe { launch!(grad_kernel, each_row(rows), [logits, targets, grad, out], rows, vocab, dtypes) };
    out
}

/// The largest logit of a row, and the sum of all exponentials relative to it.
#[cube]
fn softmax_of<F: Float>(logits: &[F], line: usize, vocab: usize) -> (f32, f32) {
    let mut scratch = Shared::<[f32]>::new_slice(UNITS);
    let mut largest = f32::cast_from(logits[line]);
    let mut at = UNIT_POS as usize;
    while at < vocab {
        largest = max(largest, f32::cast_from(logits[line + at]));
        at += UNITS;
    }
    let largest = largest_of_units(&mut scratch, largest);
    let mut sum = 0f32;
    let mut at = UNIT_POS as usize;
    while at < vocab {
        sum += (f32::cast_from(logits[line + at]) - largest).exp();
        at += UNITS;
    }
    (largest, sum_of_units(&mut scratch, sum))
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn forward_kernel<F: Float, I: Int>(
    logits: &[F],
    targets: &[I],
    out: &mut [f32],
    rows: usize,
    vocab: usize,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let row = row_of(rows);
    let (largest, sum) = softmax_of::<F>(logits, row * vocab, vocab);
    if UNIT_POS == 0 {
        let target = usize::cast_from(targets[row]);
        out[row] = sum.ln() + largest - f32::cast_from(logits[row * vocab + target]);
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn grad_kernel<F: Float, I: Int>(
    logits: &[F],
    targets: &[I],
    grad: &[f32],
    out: &mut [F],
    rows: usize,
    vocab: usize,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let row = row_of(rows);
    let line = row * vocab;
    let (largest, sum) = softmax_of::<F>(logits, line, vocab);
    let target = usize::cast_from(targets[row]);
    let grad = grad[row];
    let mut at = UNIT_POS as usize;
    while at < vocab {
        let mut slope = (f32::cast_from(logits[line + at]) - largest).exp() / sum;
        if at == target {
            slope -= 1f32;
        }
        out[line + at] = F::cast_from(grad * slope);
        at += UNITS;
    }
}
