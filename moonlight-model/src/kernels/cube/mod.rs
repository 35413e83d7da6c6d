//! Kernels for the CubeCL runtimes: CUDA, WGPU (Vulkan, Metal, DirectX, WebGPU) and whatever else CubeCL compiles for.
//!
//! Written once in CubeCL and compiled by it for the device at hand when they are first used. Nothing here depends on
//! the runtime: the sizes of cubes and of shared memory stay within what WebGPU promises everywhere.

mod grouped;
mod tensor;
#[cfg(all(test, feature = "cpu"))]
mod tests;

use burn::backend::Cube;
use burn::backend::tensor::FloatTensor;

use super::backend::Kernels;
use super::{ExpertPlan, reference};
use tensor::{buffers, wrapped};

impl Kernels for Cube {
    fn grouped_matmul_forward(
        rows: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        match buffers([&rows, &weight]) {
            Some([rows, weight]) => wrapped(grouped::by_expert(rows, weight, plan, false)),
            None => reference::grouped_matmul_forward::<Self>(rows, weight, plan),
        }
    }

    fn grouped_matmul_rows_grad(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        match buffers([&grad, &weight]) {
            Some([grad, weight]) => wrapped(grouped::by_expert(grad, weight, plan, true)),
            None => reference::grouped_matmul_rows_grad::<Self>(grad, weight, plan),
        }
    }

    fn grouped_matmul_weight_grad(
        rows: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        match buffers([&rows, &grad]) {
            Some([rows, grad]) => wrapped(grouped::weight_grad(rows, grad, plan)),
            None => reference::grouped_matmul_weight_grad::<Self>(rows, grad, plan),
        }
    }
}
