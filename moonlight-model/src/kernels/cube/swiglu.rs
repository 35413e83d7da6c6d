//! `silu(gate) * up` and its gradients, each in one pass.

use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::{each_number, launch};
use super::tensor::{elem, empty};

pub(super) fn forward(gate: CubeTensor, up: CubeTensor) -> CubeTensor {
    let (gate, up) = (into_contiguous(gate), into_contiguous(up));
    let [rows, width] = gate.meta.shape().dims();
    let out = empty(&gate, [rows, width], gate.dtype);
    let count = rows * width;
    // SAFETY: the kernel keeps within its tensors.
    unsafe { launch!(forward_kernel, each_number(&gate, count), [gate, up, out], count, elem(&gate)) };
    out
}

/// Gradients for gate and up, see `reference::swiglu_grad`.
pub(super) fn grad(gate: CubeTensor, up: CubeTensor, grad: CubeTensor) -> (CubeTensor, CubeTensor) {
    let (gate, up, grad) = (into_contiguous(gate), into_contiguous(up), into_contiguous(grad));
    let [rows, width] = gate.meta.shape().dims();
    let [grad_gate, grad_up] = [(); 2].map(|()| empty(&gate, [rows, width], gate.dtype));
    let count = rows * width;
    // SAFETY: the kernel keeps within its tensors.
    unsafe {
        launch!(grad_kernel, each_number(&gate, count), [gate, up, grad, grad_gate, grad_up], count, elem(&gate));
    }
    (grad_gate, grad_up)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn forward_kernel<F: Float>(gate: &[F], up: &[F], out: &mut [F], count: usize, #[define(F)] _dtype: ElemType) {
    if ABSOLUTE_POS < count {
        let gate = f32::cast_from(gate[ABSOLUTE_POS]);
        let up = f32::cast_from(up[ABSOLUTE_POS]);
        out[ABSOLUTE_POS] = F::cast_from(gate / (1f32 + (-gate).exp()) * up);
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn grad_kernel<F: Float>(
    gate: &[F],
    up: &[F],
    grad: &[F],
    grad_gate: &mut [F],
    grad_up: &mut [F],
    count: usize,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS < count {
        let gate = f32::cast_from(gate[ABSOLUTE_POS]);
        let up = f32::cast_from(up[ABSOLUTE_POS]);
        let grad = f32::cast_from(grad[ABSOLUTE_POS]);
        let sigmoid = 1f32 / (1f32 + (-gate).exp());
        grad_up[ABSOLUTE_POS] = F::cast_from(grad * gate * sigmoid);
        grad_gate[ABSOLUTE_POS] = F::cast_from(grad * up * sigmoid * (1f32 + gate * (1f32 - sigmoid)));
    }
}
