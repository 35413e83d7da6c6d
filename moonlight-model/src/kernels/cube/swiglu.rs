//! `silu(gate) * up` and its gradients, each in one pass.

use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use super::tensor::{addresses, elem, empty};

pub(super) fn forward(gate: CubeTensor, up: CubeTensor) -> CubeTensor {
    let (gate, up) = (into_contiguous(gate), into_contiguous(up));
    let shape: [usize; 2] = gate.meta.shape().dims();
    let out = empty(&gate, shape, gate.dtype);
    let (client, dtype, address) = (gate.client.clone(), elem(&gate), addresses(&[&gate]));
    let count = shape[0] * shape[1];
    let dim = CubeDim::new(&client, count);
    // SAFETY: the kernel keeps within its tensors.
    unsafe {
        forward_kernel::launch_unchecked(
            &client,
            calculate_cube_count_elemwise(&client, count, dim),
            dim,
            address,
            gate.into_buffer_arg(),
            up.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            count,
            dtype,
        );
    }
    out
}

/// Gradients for gate and up, see `reference::swiglu_grad`.
pub(super) fn grad(gate: CubeTensor, up: CubeTensor, grad: CubeTensor) -> (CubeTensor, CubeTensor) {
    let (gate, up, grad) = (into_contiguous(gate), into_contiguous(up), into_contiguous(grad));
    let shape: [usize; 2] = gate.meta.shape().dims();
    let (grad_gate, grad_up) = (empty(&gate, shape, gate.dtype), empty(&gate, shape, gate.dtype));
    let (client, dtype, address) = (gate.client.clone(), elem(&gate), addresses(&[&gate]));
    let count = shape[0] * shape[1];
    let dim = CubeDim::new(&client, count);
    // SAFETY: the kernel keeps within its tensors.
    unsafe {
        grad_kernel::launch_unchecked(
            &client,
            calculate_cube_count_elemwise(&client, count, dim),
            dim,
            address,
            gate.into_buffer_arg(),
            up.into_buffer_arg(),
            grad.into_buffer_arg(),
            grad_gate.clone().into_buffer_arg(),
            grad_up.clone().into_buffer_arg(),
            count,
            dtype,
        );
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
