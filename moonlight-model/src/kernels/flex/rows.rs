//! Tokens to experts' rows and back.

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::{ExpertPlan, dims, tensor, values};

/// Rows of one task.
const ROWS: usize = 64;

/// `out[row] = tokens[token of row]`.
pub(super) fn dispatch(tokens: &FlexTensor, plan: &ExpertPlan) -> FlexTensor {
    let [_, width] = dims(tokens);
    let tokens = values(tokens);
    let mut out = vec![0.0; plan.rows() * width];
    out.par_chunks_mut(ROWS * width).zip(plan.token_of_row.par_chunks(ROWS)).for_each(|(out, sources)| {
        for (row, &token) in out.chunks_exact_mut(width).zip(sources) {
            row.copy_from_slice(&tokens[token as usize * width..][..width]);
        }
    });
    tensor(out, [plan.rows(), width])
}

/// `out[token] = sum of grad over the token's rows`.
pub(super) fn dispatch_grad(grad: &FlexTensor, plan: &ExpertPlan) -> FlexTensor {
    let [_, width] = dims(grad);
    let grad = values(grad);
    let mut out = vec![0.0; plan.tokens() * width];
    out.par_chunks_mut(ROWS * width).zip(plan.row_of_slot.par_chunks(ROWS * plan.k)).for_each(|(out, slots)| {
        for (sum, slots) in out.chunks_exact_mut(width).zip(slots.chunks_exact(plan.k)) {
            for &row in slots {
                add_scaled(sum, &grad[row as usize * width..][..width], 1.0);
            }
        }
    });
    tensor(out, [plan.tokens(), width])
}

/// `out[token] = sum_k weights[token, k] * rows[row of (token, k)]`.
pub(super) fn combine(rows: &FlexTensor, weights: &FlexTensor, plan: &ExpertPlan) -> FlexTensor {
    let [_, width] = dims(rows);
    let (rows, weights) = (values(rows), values(weights));
    let mut out = vec![0.0; plan.tokens() * width];
    let slots = plan.row_of_slot.par_chunks(ROWS * plan.k).zip(weights.par_chunks(ROWS * plan.k));
    out.par_chunks_mut(ROWS * width).zip(slots).for_each(|(out, (slots, weights))| {
        let of_token = slots.chunks_exact(plan.k).zip(weights.chunks_exact(plan.k));
        for (sum, (slots, weights)) in out.chunks_exact_mut(width).zip(of_token) {
            for (&row, &weight) in slots.iter().zip(weights) {
                add_scaled(sum, &rows[row as usize * width..][..width], weight);
            }
        }
    });
    tensor(out, [plan.tokens(), width])
}

/// Gradients of [`combine`]: `d rows[r] = weight of r * grad[token of r]`, `d weights[t, k] = rows[r] . grad[t]`.
pub(super) fn combine_grad(
    rows: &FlexTensor,
    weights: &FlexTensor,
    grad: &FlexTensor,
    plan: &ExpertPlan,
) -> (FlexTensor, FlexTensor) {
    let [_, width] = dims(rows);
    let (rows, weights, grad) = (values(rows), values(weights), values(grad));
    let mut weight_of_row = vec![0.0; plan.rows()];
    for (&row, &weight) in plan.row_of_slot.iter().zip(weights) {
        weight_of_row[row as usize] = weight;
    }
    let mut grad_rows = vec![0.0; plan.rows() * width];
    let mut dots = vec![0.0; plan.rows()];
    grad_rows
        .par_chunks_mut(ROWS * width)
        .zip(dots.par_chunks_mut(ROWS))
        .zip(plan.token_of_row.par_chunks(ROWS).zip(weight_of_row.par_chunks(ROWS)).zip(rows.par_chunks(ROWS * width)))
        .for_each(|((grad_rows, dots), ((tokens, weights), rows))| {
            let inputs = tokens.iter().zip(weights).zip(rows.chunks_exact(width));
            for ((grad_row, dot), ((&token, &weight), row)) in grad_rows.chunks_exact_mut(width).zip(dots).zip(inputs) {
                let grad = &grad[token as usize * width..][..width];
                for (out, &g) in grad_row.iter_mut().zip(grad) {
                    *out = weight * g;
                }
                *dot = super::math::dot(row, grad);
            }
        });
    let grad_weights: Vec<f32> = plan.row_of_slot.iter().map(|&row| dots[row as usize]).collect();
    (tensor(grad_rows, [plan.rows(), width]), tensor(grad_weights, [plan.tokens(), plan.k]))
}

fn add_scaled(sum: &mut [f32], row: &[f32], weight: f32) {
    for (sum, &value) in sum.iter_mut().zip(row) {
        *sum += weight * value;
    }
}
