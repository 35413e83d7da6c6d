//! Dispatch of tokens to rows of experts, and their weighted combination, each with its gradient.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use moonlight_simd::by_level;
use rayon::prelude::*;

use super::dtype::{Element, round};
use super::tensor::{by_dtype, dims, tensor, tensor_of, values, values_of, zeros};
use crate::kernels::{DispatchKernel, GroupLayout, reference};

impl DispatchKernel for Flex {
    fn dispatch_rows_forward(tokens: FloatTensor<Self>, layout: &GroupLayout) -> FloatTensor<Self> {
        by_dtype!(
            [tokens],
            E => dispatch::<E>(&tokens, layout),
            reference::dispatch_rows_forward::<Self>(tokens, layout)
        )
    }

    fn dispatch_rows_grad(grad: FloatTensor<Self>, layout: &GroupLayout) -> FloatTensor<Self> {
        by_dtype!([grad], E => dispatch_grad::<E>(&grad, layout), reference::dispatch_rows_grad::<Self>(grad, layout))
    }

    fn combine_rows_forward(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        layout: &GroupLayout,
    ) -> FloatTensor<Self> {
        by_dtype!(
            [rows] f32: [weights],
            E => combine::<E>(&rows, &weights, layout),
            reference::combine_rows_forward::<Self>(rows, weights, layout)
        )
    }

    fn combine_rows_grad(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        layout: &GroupLayout,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        by_dtype!(
            [rows, grad] f32: [weights],
            E => combine_grad::<E>(&rows, &weights, &grad, layout),
            reference::combine_rows_grad::<Self>(rows, weights, grad, layout)
        )
    }
}

/// Rows of a task.
const ROWS_PER_TASK: usize = 64;

/// `out[row] = tokens[token of row]`.
fn dispatch<E: Element>(tokens: &FlexTensor, layout: &GroupLayout) -> FlexTensor {
    let [_, width] = dims(tokens);
    let tokens = values_of::<E>(tokens);
    let mut out = zeros::<E>(layout.rows() * width);
    out.par_chunks_mut(ROWS_PER_TASK * width).zip(layout.token_of_row().par_chunks(ROWS_PER_TASK)).for_each(
        |(out, sources)| {
            for (row, &token) in out.chunks_exact_mut(width).zip(sources) {
                row.copy_from_slice(&tokens[token as usize * width..][..width]);
            }
        },
    );
    tensor_of(out, [layout.rows(), width])
}

/// `out[token] = sum over the rows of the token of grad`, in the order of choices.
fn dispatch_grad<E: Element>(grad: &FlexTensor, layout: &GroupLayout) -> FlexTensor {
    let [_, width] = dims(grad);
    let grad = values_of::<E>(grad);
    let mut out = zeros::<E>(layout.tokens() * width);
    out.par_chunks_mut(ROWS_PER_TASK * width)
        .zip(layout.row_of_slot().par_chunks(ROWS_PER_TASK * layout.k()))
        .for_each(|(out, slots)| {
            let mut sum = vec![0.0; width];
            for (out, slots) in out.chunks_exact_mut(width).zip(slots.chunks_exact(layout.k())) {
                sum.fill(0.0);
                for &row in slots {
                    add_scaled(&mut sum, &grad[row as usize * width..][..width], 1.0);
                }
                round(&sum, out);
            }
        });
    tensor_of(out, [layout.tokens(), width])
}

/// `out[token] = sum_k weights[token, k] * rows[row of (token, k)]`.
fn combine<E: Element>(rows: &FlexTensor, weights: &FlexTensor, layout: &GroupLayout) -> FlexTensor {
    let [_, width] = dims(rows);
    let (rows, weights) = (values_of::<E>(rows), values(weights));
    let mut out = zeros::<E>(layout.tokens() * width);
    let slots =
        layout.row_of_slot().par_chunks(ROWS_PER_TASK * layout.k()).zip(weights.par_chunks(ROWS_PER_TASK * layout.k()));
    out.par_chunks_mut(ROWS_PER_TASK * width).zip(slots).for_each(|(out, (slots, weights))| {
        let mut sum = vec![0.0; width];
        let of_token = slots.chunks_exact(layout.k()).zip(weights.chunks_exact(layout.k()));
        for (out, (slots, weights)) in out.chunks_exact_mut(width).zip(of_token) {
            sum.fill(0.0);
            for (&row, &weight) in slots.iter().zip(weights) {
                add_scaled(&mut sum, &rows[row as usize * width..][..width], weight);
            }
            round(&sum, out);
        }
    });
    tensor_of(out, [layout.tokens(), width])
}

/// Gradients of [`combine`]: `d rows[r] = weight of r * grad[token of r]`, `d weights[t, k] = rows[r] . grad[t]`.
fn combine_grad<E: Element>(
    rows: &FlexTensor,
    weights: &FlexTensor,
    grad: &FlexTensor,
    layout: &GroupLayout,
) -> (FlexTensor, FlexTensor) {
    let [_, width] = dims(rows);
    let (rows, weights, grad) = (values_of::<E>(rows), values(weights), values_of::<E>(grad));
    // By row and not by slot, so that tasks write contiguous rows of the gradient.
    let mut weight_of_row = vec![0.0; layout.rows()];
    for (&row, &weight) in layout.row_of_slot().iter().zip(weights) {
        weight_of_row[row as usize] = weight;
    }
    let mut grad_rows = zeros::<E>(layout.rows() * width);
    let mut dots = vec![0.0; layout.rows()];
    grad_rows
        .par_chunks_mut(ROWS_PER_TASK * width)
        .zip(dots.par_chunks_mut(ROWS_PER_TASK))
        .zip(
            layout
                .token_of_row()
                .par_chunks(ROWS_PER_TASK)
                .zip(weight_of_row.par_chunks(ROWS_PER_TASK))
                .zip(rows.par_chunks(ROWS_PER_TASK * width)),
        )
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
    // From the order of rows, in which tasks computed them, to the order of slots.
    let grad_weights: Vec<f32> = layout.row_of_slot().iter().map(|&row| dots[row as usize]).collect();
    (tensor_of(grad_rows, [layout.rows(), width]), tensor(grad_weights, [layout.tokens(), layout.k()]))
}

by_level! {
    fn add_scaled[E: Element](sum: &mut [f32], row: &[E], weight: f32) {
        for (sum, value) in sum.iter_mut().zip(row) {
            *sum += weight * value.wide();
        }
    }
}
