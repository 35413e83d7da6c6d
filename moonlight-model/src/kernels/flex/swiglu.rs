//! `silu(gate) * up` in one pass.

use burn::backend::flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::math::sigmoid;
use super::{dims, tensor, values};

/// Values of one task.
const VALUES: usize = 16 * 1024;

pub(super) fn forward(gate: &FlexTensor, up: &FlexTensor) -> FlexTensor {
    let shape: [usize; 2] = dims(gate);
    let (gate, up) = (values(gate), values(up));
    let mut out = vec![0.0; gate.len()];
    out.par_chunks_mut(VALUES)
        .zip(gate.par_chunks(VALUES).zip(up.par_chunks(VALUES)))
        .for_each(|(out, (gate, up))| forward_piece(out, gate, up));
    tensor(out, shape)
}

pub(super) fn grad(gate: &FlexTensor, up: &FlexTensor, grad: &FlexTensor) -> (FlexTensor, FlexTensor) {
    let shape: [usize; 2] = dims(gate);
    let (gate, up, grad) = (values(gate), values(up), values(grad));
    let mut grad_gate = vec![0.0; gate.len()];
    let mut grad_up = vec![0.0; gate.len()];
    grad_gate
        .par_chunks_mut(VALUES)
        .zip(grad_up.par_chunks_mut(VALUES))
        .zip(gate.par_chunks(VALUES).zip(up.par_chunks(VALUES)).zip(grad.par_chunks(VALUES)))
        .for_each(|((grad_gate, grad_up), ((gate, up), grad))| grad_piece(grad_gate, grad_up, gate, up, grad));
    (tensor(grad_gate, shape), tensor(grad_up, shape))
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2", "aarch64+neon"))]
fn forward_piece(out: &mut [f32], gate: &[f32], up: &[f32]) {
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate * sigmoid(gate) * up;
    }
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2", "aarch64+neon"))]
fn grad_piece(grad_gate: &mut [f32], grad_up: &mut [f32], gate: &[f32], up: &[f32], grad: &[f32]) {
    let inputs = gate.iter().zip(up).zip(grad);
    for ((grad_gate, grad_up), ((&gate, &up), &grad)) in grad_gate.iter_mut().zip(grad_up).zip(inputs) {
        let sigmoid = sigmoid(gate);
        *grad_up = grad * gate * sigmoid;
        *grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid));
    }
}
