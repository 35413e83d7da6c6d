//! Tokens to experts' rows and back: a cube for each row that is written, which reads the rows that make it.

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::super::ExpertPlan;
use super::launch::launch;
use super::reduce::{UNITS, each_row, row_of, sum_of_units};
use super::tensor::{elem, empty, upload};

/// `out[r] = tokens[token of r]`.
pub(super) fn dispatch(tokens: CubeTensor, plan: &ExpertPlan) -> CubeTensor {
    let tokens = into_contiguous(tokens);
    let (rows, width) = (plan.rows(), tokens.meta.shape()[1]);
    let out = empty(&tokens, [rows, width], tokens.dtype);
    let (sources, dtype) = (upload(&tokens, &plan.token_of_row), elem(&tokens));
    // SAFETY: the kernel keeps within its tensors: a plan's numbers are those of its rows and tokens.
    unsafe { launch!(dispatch_kernel, each_row(rows), [tokens, out], sources, rows, width, dtype) };
    out
}

/// The sum of each token's rows, weighted where there are weights: f32 `[tokens, k]`.
pub(super) fn combine(rows: CubeTensor, weights: Option<CubeTensor>, plan: &ExpertPlan) -> CubeTensor {
    let rows = into_contiguous(rows);
    let (tokens, width) = (plan.tokens(), rows.meta.shape()[1]);
    let out = empty(&rows, [tokens, width], rows.dtype);
    let weighted = weights.is_some();
    // A kernel has all its arguments: without weights it does not read them.
    let weights = weights.map_or_else(|| empty(&rows, [1], DType::F32), into_contiguous);
    let (sources, dtype) = (upload(&rows, &plan.row_of_slot), elem(&rows));
    let over = each_row(tokens);
    // SAFETY: the kernel keeps within its tensors: a plan's numbers are those of its rows and tokens.
    unsafe { launch!(combine_kernel, over, [rows, weights, out], sources, tokens, width, plan.k, weighted, dtype) };
    out
}

/// Gradients of the weighted sum for the rows and for the weights.
pub(super) fn combine_grad(
    rows: CubeTensor,
    weights: CubeTensor,
    grad: CubeTensor,
    plan: &ExpertPlan,
) -> (CubeTensor, CubeTensor) {
    let (rows, weights, grad) = (into_contiguous(rows), into_contiguous(weights), into_contiguous(grad));
    let width = rows.meta.shape()[1];
    let grad_rows = empty(&rows, [plan.rows(), width], rows.dtype);
    let grad_weights = empty(&rows, [plan.tokens(), plan.k], DType::F32);
    let (sources, dtype) = (upload(&rows, &plan.row_of_slot), elem(&rows));
    let (over, slots) = (each_row(plan.rows()), plan.rows());
    // SAFETY: the kernel keeps within its tensors: a plan's numbers are those of its rows and tokens.
    unsafe {
        launch!(
            combine_grad_kernel,
            over,
            [rows, weights, grad, grad_rows, grad_weights],
            sources,
            slots,
            width,
            plan.k,
            dtype
        );
    }
    (grad_rows, grad_weights)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn dispatch_kernel<F: Float>(
    tokens: &[F],
    out: &mut [F],
    sources: &[u32],
    rows: usize,
    width: usize,
    #[define(F)] _dtype: ElemType,
) {
    let row = row_of(rows);
    let source = sources[row] as usize * width;
    let mut at = UNIT_POS as usize;
    while at < width {
        out[row * width + at] = tokens[source + at];
        at += UNITS;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn combine_kernel<F: Float>(
    rows: &[F],
    weights: &[f32],
    out: &mut [F],
    sources: &[u32],
    tokens: usize,
    width: usize,
    k: usize,
    #[comptime] weighted: bool,
    #[define(F)] _dtype: ElemType,
) {
    let token = row_of(tokens);
    let mut at = UNIT_POS as usize;
    while at < width {
        let mut sum = 0f32;
        for choice in 0..k {
            let slot = token * k + choice;
            let value = f32::cast_from(rows[sources[slot] as usize * width + at]);
            if comptime!(weighted) {
                sum += value * weights[slot];
            } else {
                sum += value;
            }
        }
        out[token * width + at] = F::cast_from(sum);
        at += UNITS;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn combine_grad_kernel<F: Float>(
    rows: &[F],
    weights: &[f32],
    grad: &[F],
    grad_rows: &mut [F],
    grad_weights: &mut [f32],
    sources: &[u32],
    slots: usize,
    width: usize,
    k: usize,
    #[define(F)] _dtype: ElemType,
) {
    let slot = row_of(slots);
    let (row, token) = (sources[slot] as usize * width, slot / k * width);
    let weight = weights[slot];
    let mut scratch = Shared::<[f32]>::new_slice(UNITS);
    let mut dot = 0f32;
    let mut at = UNIT_POS as usize;
    while at < width {
        let grad = f32::cast_from(grad[token + at]);
        dot += grad * f32::cast_from(rows[row + at]);
        grad_rows[row + at] = F::cast_from(grad * weight);
        at += UNITS;
    }
    let dot = sum_of_units(&mut scratch, dot);
    if UNIT_POS == 0 {
        grad_weights[slot] = dot;
    }
}
