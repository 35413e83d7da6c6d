//! Cross-entropy of rows of logits and its gradient, one cube for each row, without a tensor of probabilities.
//!
//! Targets are on the device, and reading them back would wait for it: a target outside the vocabulary gives NaN instead of an error.
//! The NaN is an argument of the kernels, because not every shading language has a constant for it.

use burn::backend::Cube;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::launch;
use super::reduce::{UNITS, cube_per_row, largest_of_units, row_of_cube, sum_of_units};
use super::tensor::{assert_dtype, assert_shape, buffers, elem_type, empty, int_buffer, same_device, to_float_tensor};
#[cfg(all(test, feature = "kernel-text"))]
use super::text::Dialect;
use crate::kernels::{CrossEntropyKernel, reference};

impl CrossEntropyKernel for Cube {
    fn cross_entropy_forward(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        match (buffers([&logits]), int_buffer(&targets)) {
            (Some([logits]), Some(targets)) => to_float_tensor(forward(logits, targets)),
            _ => reference::cross_entropy_forward::<Self>(logits, targets),
        }
    }

    fn cross_entropy_grad(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        loss_grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        match (buffers([&logits, &loss_grad]), int_buffer(&targets)) {
            (Some([logits, loss_grad]), Some(targets)) if loss_grad.dtype == DType::F32 => {
                to_float_tensor(grad(logits, targets, loss_grad))
            }
            _ => reference::cross_entropy_grad::<Self>(logits, targets, loss_grad),
        }
    }
}

fn forward(logits: CubeTensor, targets: CubeTensor) -> CubeTensor {
    let (logits, targets) = (into_contiguous(logits), into_contiguous(targets));
    let [rows, vocab] = logits.meta.shape().dims();
    assert_shape(&logits, [rows, vocab]);
    assert_shape(&targets, [rows]);
    same_device(&targets, &logits);
    let out = empty(&logits, [rows], DType::F32);
    let dtypes = [elem_type(&logits), elem_type(&targets)];
    // SAFETY: `row_of_cube` keeps the row of a cube below `rows`, the loops keep columns below `vocab`, and the kernel checks a target
    // before it indexes by it. The contiguous tensors have these shapes, as asserted, and are read as their dtypes.
    unsafe { launch!(forward_kernel, cube_per_row(rows), [logits, targets, out], rows, vocab, f32::NAN, dtypes) };
    out
}

/// `g (softmax(logits) - onehot(target))`; `grad` is f32.
fn grad(logits: CubeTensor, targets: CubeTensor, grad: CubeTensor) -> CubeTensor {
    let (logits, targets, grad) = (into_contiguous(logits), into_contiguous(targets), into_contiguous(grad));
    let [rows, vocab] = logits.meta.shape().dims();
    assert_shape(&logits, [rows, vocab]);
    assert_shape(&targets, [rows]);
    assert_shape(&grad, [rows]);
    assert_dtype(&grad, DType::F32);
    same_device(&targets, &logits);
    let out = empty(&logits, [rows, vocab], logits.dtype);
    let dtypes = [elem_type(&logits), elem_type(&targets)];
    // SAFETY: as in `forward`; this kernel compares columns with the target and does not index by it.
    unsafe { launch!(grad_kernel, cube_per_row(rows), [logits, targets, grad, out], rows, vocab, f32::NAN, dtypes) };
    out
}

/// The largest logit of a row, and the sum of the exponentials relative to it.
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
    nan: f32,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let row = row_of_cube(rows);
    let (largest, sum) = softmax_of::<F>(logits, row * vocab, vocab);
    if UNIT_POS == 0 {
        let target = usize::cast_from(targets[row]);
        // The cast may wrap a negative or 64-bit target into the vocabulary, so the target is also compared in its own type.
        let inside = target < vocab && targets[row] >= I::from_int(0) && targets[row] < I::cast_from(vocab);
        let logit = f32::cast_from(logits[row * vocab + select(inside, target, 0usize)]);
        // The difference first, as in the CPU kernel: with a confident model the small logarithm would be lost in `sum.ln() + largest`.
        out[row] = select(inside, sum.ln() + (largest - logit), nan);
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
    nan: f32,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let row = row_of_cube(rows);
    let line = row * vocab;
    let (largest, sum) = softmax_of::<F>(logits, line, vocab);
    let target = usize::cast_from(targets[row]);
    let inside = target < vocab && targets[row] >= I::from_int(0) && targets[row] < I::cast_from(vocab);
    let grad = select(inside, grad[row], nan);
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

/// The kernels of this file as text.
#[cfg(all(test, feature = "kernel-text"))]
pub(super) fn kernels(on: &Dialect) -> Vec<Box<dyn CubeKernel>> {
    use super::text::{buffer, kernel};
    let dtypes = [on.float, on.int];
    vec![
        kernel!(on, 256, forward_kernel::ForwardKernel, buffer(), buffer(), buffer(), (), (), (), dtypes),
        kernel!(on, 256, grad_kernel::GradKernel, buffer(), buffer(), buffer(), buffer(), (), (), (), dtypes),
    ]
}
