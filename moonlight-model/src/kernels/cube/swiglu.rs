//! `silu(gate) * up` and its gradients, each in one pass.

use burn::backend::Cube;
use burn::backend::tensor::FloatTensor;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::{launch, unit_per_value};
use super::tensor::{assert_dtype, assert_shape, buffers, elem_type, empty, to_float_tensor};
#[cfg(all(test, feature = "kernel-text"))]
use super::text::Dialect;
use crate::kernels::{SwigluKernel, reference};

impl SwigluKernel for Cube {
    fn swiglu_forward(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        match buffers([&gate, &up]) {
            Some([gate, up]) if gate.dtype == up.dtype => to_float_tensor(forward(gate, up)),
            _ => reference::swiglu_forward::<Self>(gate, up),
        }
    }

    fn swiglu_grad(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        output_grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        match buffers([&gate, &up, &output_grad]) {
            Some([gate, up, output_grad]) if gate.dtype == up.dtype && output_grad.dtype == up.dtype => {
                let (gate, up) = grad(gate, up, output_grad);
                (to_float_tensor(gate), to_float_tensor(up))
            }
            _ => reference::swiglu_grad::<Self>(gate, up, output_grad),
        }
    }
}

fn forward(gate: CubeTensor, up: CubeTensor) -> CubeTensor {
    let (gate, up) = (into_contiguous(gate), into_contiguous(up));
    let [rows, width] = gate.meta.shape().dims();
    assert_shape(&gate, [rows, width]);
    assert_shape(&up, [rows, width]);
    assert_dtype(&up, gate.dtype);
    let out = empty(&gate, [rows, width], gate.dtype);
    let count = rows * width;
    // SAFETY: a unit with an index below `count` uses it to index contiguous tensors of `count` values and one dtype, as asserted;
    // other units do nothing.
    unsafe { launch!(forward_kernel, unit_per_value(&gate, count), [gate, up, out], count, elem_type(&gate)) };
    out
}

/// Gradients for gate and up; see `reference::swiglu_grad`.
fn grad(gate: CubeTensor, up: CubeTensor, grad: CubeTensor) -> (CubeTensor, CubeTensor) {
    let (gate, up, grad) = (into_contiguous(gate), into_contiguous(up), into_contiguous(grad));
    let [rows, width] = gate.meta.shape().dims();
    for tensor in [&gate, &up, &grad] {
        assert_shape(tensor, [rows, width]);
        assert_dtype(tensor, gate.dtype);
    }
    let [grad_gate, grad_up] = [(); 2].map(|()| empty(&gate, [rows, width], gate.dtype));
    let count = rows * width;
    // SAFETY: as in `forward`.
    unsafe {
        launch!(
            grad_kernel,
            unit_per_value(&gate, count),
            [gate, up, grad, grad_gate, grad_up],
            count,
            elem_type(&gate)
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

/// The kernels of this file as text.
#[cfg(all(test, feature = "kernel-text"))]
pub(super) fn kernels(on: &Dialect) -> Vec<Box<dyn CubeKernel>> {
    use super::text::{buffer, kernel};
    let float = on.float;
    vec![
        kernel!(on, 256, forward_kernel::ForwardKernel, buffer(), buffer(), buffer(), (), float),
        kernel!(on, 256, grad_kernel::GradKernel, buffer(), buffer(), buffer(), buffer(), buffer(), (), float),
    ]
}
