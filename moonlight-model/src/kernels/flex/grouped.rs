//! The grouped expert product and its gradients.

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::matrix::{Matrix, MatrixMut, Write, multiply};
use super::{ExpertPlan, dims, tensor, values};

/// Rows of one task: enough to pay for packing the expert's matrix, few enough that one busy expert is shared out.
const ROWS_PER_TASK: usize = 256;

/// `out[r] = rows[r] x weight[expert of r]`, or with the transposed weight. `[rows, in]`, `[experts, in, out]`.
pub(super) fn forward(rows: &FlexTensor, weight: &FlexTensor, plan: &ExpertPlan, transpose: bool) -> FlexTensor {
    let [count, width] = dims(rows);
    let [_, input, output] = dims(weight);
    let (from, to) = if transpose { (output, input) } else { (input, output) };
    assert_eq!(width, from, "the rows are as wide as the experts' input");
    let (rows, weight) = (values(rows), values(weight));
    let mut out = vec![0.0; count * to];

    let mut tasks = Vec::new();
    let mut rest = out.as_mut_slice();
    for expert in 0..plan.experts() {
        let mut start = plan.offsets[expert];
        while start < plan.offsets[expert + 1] {
            let end = plan.offsets[expert + 1].min(start + ROWS_PER_TASK);
            let (piece, tail) = rest.split_at_mut((end - start) * to);
            tasks.push((expert, start, end, piece));
            rest = tail;
            start = end;
        }
    }
    tasks.into_par_iter().for_each(|(expert, start, end, piece)| {
        let rows = Matrix::new(&rows[start * from..end * from], end - start, from);
        let weight = Matrix::new(&weight[expert * input * output..][..input * output], input, output);
        let weight = if transpose { weight.transposed() } else { weight };
        multiply(MatrixMut::strided(piece, end - start, to, to), rows, weight, 1.0, Write::Set);
    });
    tensor(out, [count, to])
}

/// `out[e] = rows of e^T x grad of e`, zero for an expert without rows. Result `[experts, in, out]`.
pub(super) fn weight_grad(rows: &FlexTensor, grad: &FlexTensor, plan: &ExpertPlan) -> FlexTensor {
    let [_, input] = dims(rows);
    let [_, output] = dims(grad);
    let (rows, grad) = (values(rows), values(grad));
    let mut out = vec![0.0; plan.experts() * input * output];
    // A task is a block of rows of one expert's gradient: the busiest expert is shared out as well.
    let block = input.div_ceil(2).max(64).min(input);
    let tasks: Vec<_> = out
        .chunks_mut(input * output)
        .enumerate()
        .flat_map(|(expert, matrix)| {
            matrix.chunks_mut(block * output).enumerate().map(move |(index, piece)| (expert, index * block, piece))
        })
        .collect();
    tasks.into_par_iter().for_each(|(expert, first, piece)| {
        let (start, end) = (plan.offsets[expert], plan.offsets[expert + 1]);
        if start == end {
            return;
        }
        let height = piece.len() / output;
        let rows = Matrix::strided(&rows[start * input + first..end * input], end - start, height, input);
        let grad = Matrix::new(&grad[start * output..end * output], end - start, output);
        multiply(MatrixMut::strided(piece, height, output, output), rows.transposed(), grad, 1.0, Write::Set);
    });
    tensor(out, [plan.experts(), input, output])
}
