//! Tokens to experts' rows and back.

use burn::backend::flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::element::{Element, round};
use super::{ExpertPlan, dims, tensor, tensor_of, values, values_of, zeros};

/// Rows of one task.
const ROWS: usize = 64;

/// `out[row] = tokens[token of row]`.
pub(super) fn dispatch<E: Element>(tokens: &FlexTensor, plan: &ExpertPlan) -> FlexTensor {
    let [_, width] = dims(tokens);
    let tokens = values_of::<E>(tokens);
    let mut out = zeros::<E>(plan.rows() * width);
    out.par_chunks_mut(ROWS * width).zip(plan.token_of_row.par_chunks(ROWS)).for_each(|(out, sources)| {
        for (row, &token) in out.chunks_exact_mut(width).zip(sources) {
            row.copy_from_slice(&tokens[token as usize * width..][..width]);
        }
    });
    tensor_of(out, [plan.rows(), width])
}

/// `out[token] = sum of grad over the token's rows`.
pub(super) fn dispatch_grad<E: Element>(grad: &FlexTensor, plan: &ExpertPlan) -> FlexTensor {
    let [_, width] = dims(grad);
    let grad = values_of::<E>(grad);
    let mut out = zeros::<E>(plan.tokens() * width);
    out.par_chunks_mut(ROWS * width).zip(plan.row_of_slot.par_chunks(ROWS * plan.k)).for_each(|(out, slots)| {
        let mut sum = vec![0.0; width];
        for (out, slots) in out.chunks_exact_mut(width).zip(slots.chunks_exact(plan.k)) {
            sum.fill(0.0);
            for &row in slots {
                add_scaled(&mut sum, &grad[row as usize * width..][..width], 1.0);
            }
            round(&sum, out);
        }
    });
    tensor_of(out, [plan.tokens(), width])
}

/// `out[token] = sum_k weights[token, k] * rows[row of (token, k)]`.
pub(super) fn combine<E: Element>(rows: &FlexTensor, weights: &FlexTensor, plan: &ExpertPlan) -> FlexTensor {
    let [_, width] = dims(rows);
    let (rows, weights) = (values_of::<E>(rows), values(weights));
    let mut out = zeros::<E>(plan.tokens() * width);
    let slots = plan.row_of_slot.par_chunks(ROWS * plan.k).zip(weights.par_chunks(ROWS * plan.k));
    out.par_chunks_mut(ROWS * width).zip(slots).for_each(|(out, (slots, weights))| {
        let mut sum = vec![0.0; width];
        let of_token = slots.chunks_exact(plan.k).zip(weights.chunks_exact(plan.k));
        for (out, (slots, weights)) in out.chunks_exact_mut(width).zip(of_token) {
            sum.fill(0.0);
            for (&row, &weight) in slots.iter().zip(weights) {
                add_scaled(&mut sum, &rows[row as usize * width..][..width], weight);
            }
            round(&sum, out);
        }
    });
    tensor_of(out, [plan.tokens(), width])
}

/// Gradients of [`combine`]: `d rows[r] = weight of r * grad[token of r]`, `d weights[t, k] = rows[r] . grad[t]`.
pub(super) fn combine_grad<E: Element>(
    rows: &FlexTensor,
    weights: &FlexTensor,
    grad: &FlexTensor,
    plan: &ExpertPlan,
) -> (FlexTensor, FlexTensor) {
    let [_, width] = dims(rows);
    let (rows, weights, grad) = (values_of::<E>(rows), values(weights), values_of::<E>(grad));
    let mut weight_of_row = vec![0.0; plan.rows()];
    for (&row, &weight) in plan.row_of_slot.iter().zip(weights) {
        weight_of_row[row as usize] = weight;
    }
    let mut grad_rows = zeros::<E>(plan.rows() * width);
    let mut dots = vec![0.0; plan.rows()];
    grad_rows
        .par_chunks_mut(ROWS * width)
        .zip(dots.par_chunks_mut(ROWS))
        .zip(plan.token_of_row.par_chunks(ROWS).zip(weight_of_row.par_chunks(ROWS)).zip(rows.par_chunks(ROWS * width)))
        .for_each(|((grad_rows, dots), ((tokens, weights), rows))| {
            let inputs = tokens.iter().zip(weights).zip(rows.chunks_exact(width));
            for ((grad_row, dot), ((&token, &weight), row)) in grad_rows.chunks_exact_mut(width).zip(dots).zip(inputs) {
                let grad = &grad[token as usize * width..][..width];
                for (out, g) in grad_row.iter_mut().zip(grad) {
                    *out = E::narrow(weight * g.wide());
                }
                *dot = super::math::dot(row, grad);
            }
        });
    let grad_weights: Vec<f32> = plan.row_of_slot.iter().map(|&row| dots[row as usize]).collect();
    (tensor_of(grad_rows, [plan.rows(), width]), tensor(grad_weights, [plan.tokens(), plan.k]))
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2", "aarch64+neon"))]
fn add_scaled<E: Element>(sum: &mut [f32], row: &[E], weight: f32) {
    for (sum, value) in sum.iter_mut().zip(row) {
        *sum += weight * value.wide();
    }
}
