//! Kernels for the CubeCL runtimes: CUDA, WGPU (Vulkan, Metal, DirectX, WebGPU) and whatever else CubeCL compiles for.
//!
//! Written once in CubeCL and compiled by it for the device at hand when they are first used. Nothing here depends on
//! the runtime: the sizes of cubes and of shared memory stay within what WebGPU promises everywhere. f32, and the half
//! types that a device stores; sums are in f32. What is not here runs as `reference` composes it of Burn's operations: the
//! projections, where Burn's product is the right one, and products of packed weights.
//!
//! # Where the host is waited for
//!
//! Everything is put in the device's queue without waiting, but for two things. The router reads its scores in every
//! layer of experts, `[tokens, experts]` numbers, because it chooses on the host: the plan of a layer must be known
//! there for the list of tiles, and the load of each expert for the bias rule and the balance loss. And a training step
//! reads its loss and the gradient's norm. To be rid of the first takes a kernel for the choice (the best `k` of each
//! token's scores, within groups), one that counts and sorts the choices, tiles for the worst case (`rows / TILE` and
//! one for each expert, of which the empty ones end at once), and loads that stay on the device until the step is over.
//! Decoding would gain most, where a layer is short beside the way to the host and back.

mod attention;
mod cross_entropy;
mod grouped;
mod launch;
mod norm;
mod reduce;
mod rotary;
mod rows;
mod swiglu;
mod tensor;
#[cfg(all(test, feature = "cpu"))]
mod tests;

use burn::backend::Cube;
use burn::backend::TensorMetadata;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, FloatDType, Shape};

use super::backend::Kernels;
use super::reference::{self, AttentionSaved};
use super::{AttentionSpec, ExpertPlan, RotationSpec};
use tensor::{buffers, integers, wrapped};

impl Kernels for Cube {
    fn grouped_matmul_forward(
        rows: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        match buffers([&rows, &weight]) {
            Some([rows, weight]) if grouped::pays(&rows, plan) && rows.dtype == weight.dtype => {
                wrapped(grouped::by_expert(rows, weight, plan, false))
            }
            _ => reference::grouped_matmul_forward::<Self>(rows, weight, plan),
        }
    }

    fn grouped_matmul_rows_grad(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        match buffers([&grad, &weight]) {
            Some([grad, weight]) if grouped::pays(&grad, plan) && grad.dtype == weight.dtype => {
                wrapped(grouped::by_expert(grad, weight, plan, true))
            }
            _ => reference::grouped_matmul_rows_grad::<Self>(grad, weight, plan),
        }
    }

    fn grouped_matmul_weight_grad(
        rows: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        match buffers([&rows, &grad]) {
            Some([rows, grad]) if grouped::pays(&rows, plan) && rows.dtype == grad.dtype => {
                wrapped(grouped::weight_grad(rows, grad, plan))
            }
            _ => reference::grouped_matmul_weight_grad::<Self>(rows, grad, plan),
        }
    }

    fn dispatch_rows_forward(tokens: FloatTensor<Self>, plan: &ExpertPlan) -> FloatTensor<Self> {
        match buffers([&tokens]) {
            Some([tokens]) => wrapped(rows::dispatch(tokens, plan)),
            None => reference::dispatch_rows_forward::<Self>(tokens, plan),
        }
    }

    fn dispatch_rows_grad(grad: FloatTensor<Self>, plan: &ExpertPlan) -> FloatTensor<Self> {
        match buffers([&grad]) {
            Some([grad]) => wrapped(rows::combine(grad, None, plan)),
            None => reference::dispatch_rows_grad::<Self>(grad, plan),
        }
    }

    fn combine_rows_forward(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        match buffers([&rows, &weights]) {
            Some([rows, weights]) if weights.dtype == DType::F32 => wrapped(rows::combine(rows, Some(weights), plan)),
            _ => reference::combine_rows_forward::<Self>(rows, weights, plan),
        }
    }

    fn combine_rows_grad(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        match buffers([&rows, &weights, &grad]) {
            Some([rows, weights, grad]) if weights.dtype == DType::F32 && grad.dtype == rows.dtype => {
                let (rows, weights) = rows::combine_grad(rows, weights, grad, plan);
                (wrapped(rows), wrapped(weights))
            }
            _ => reference::combine_rows_grad::<Self>(rows, weights, grad, plan),
        }
    }

    fn swiglu_forward(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        match buffers([&gate, &up]) {
            Some([gate, up]) if gate.dtype == up.dtype => wrapped(swiglu::forward(gate, up)),
            _ => reference::swiglu_forward::<Self>(gate, up),
        }
    }

    fn swiglu_grad(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        match buffers([&gate, &up, &grad]) {
            Some([gate, up, grad]) if gate.dtype == up.dtype && grad.dtype == up.dtype => {
                let (gate, up) = swiglu::grad(gate, up, grad);
                (wrapped(gate), wrapped(up))
            }
            _ => reference::swiglu_grad::<Self>(gate, up, grad),
        }
    }

    fn rms_norm_forward(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
        match buffers([&x, &gain]) {
            Some([x, gain]) => wrapped(norm::forward(x, gain, epsilon)),
            None => reference::rms_norm_forward::<Self>(x, gain, epsilon),
        }
    }

    fn rms_norm_grad(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        epsilon: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        match buffers([&x, &gain, &grad]) {
            Some([x, gain, grad]) if grad.dtype == x.dtype => {
                let (width, dtype) = (gain.meta.shape()[0], FloatDType::from(gain.dtype));
                let (x, parts) = norm::grad(x, gain, grad, epsilon);
                let gain = Self::float_reshape(Self::float_sum_dim(wrapped(parts), 0), Shape::new([width]));
                (wrapped(x), Self::float_cast(gain, dtype))
            }
            _ => reference::rms_norm_grad::<Self>(x, gain, grad, epsilon),
        }
    }

    fn rotate_forward(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        spec: &RotationSpec,
    ) -> FloatTensor<Self> {
        match buffers([&x, &cos, &sin]) {
            Some([x, cos, sin]) if cos.dtype == sin.dtype => wrapped(rotary::forward(x, cos, sin, spec)),
            _ => reference::rotate_forward::<Self>(x, cos, sin, spec),
        }
    }

    fn cross_entropy_forward(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        match (buffers([&logits]), integers(&targets)) {
            (Some([logits]), Some(targets)) => wrapped(cross_entropy::forward(logits, targets)),
            _ => reference::cross_entropy_forward::<Self>(logits, targets),
        }
    }

    fn cross_entropy_grad(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        match (buffers([&logits, &grad]), integers(&targets)) {
            (Some([logits, grad]), Some(targets)) if grad.dtype == DType::F32 => {
                wrapped(cross_entropy::grad(logits, targets, grad))
            }
            _ => reference::cross_entropy_grad::<Self>(logits, targets, grad),
        }
    }

    fn attention_forward(
        query: FloatTensor<Self>,
        key_value: FloatTensor<Self>,
        shared_key: Option<FloatTensor<Self>>,
        spec: &AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let shared = shared_key.as_ref().unwrap_or(&query);
        let Some([query, key_value, shared]) = buffers([&query, &key_value, shared]) else {
            return reference::attention_forward::<Self>(query, key_value, shared_key, spec);
        };
        debug_assert!(key_value.dtype == query.dtype && shared.dtype == query.dtype, "an attention has one dtype");
        let (output, log_sum) = attention::forward(query, key_value, shared_key.map(|_| shared), spec);
        (wrapped(output), wrapped(log_sum))
    }

    fn attention_grad(
        saved: AttentionSaved<Self>,
        grad: FloatTensor<Self>,
        spec: &AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, Option<FloatTensor<Self>>) {
        let AttentionSaved { query, key_value, shared_key, output, log_sum } = &saved;
        let delta = Self::float_sum_dim(Self::float_mul(in_f32(grad.clone()), in_f32(output.clone())), 3);
        let shared = shared_key.as_ref().unwrap_or(query);
        let Some([query, key_value, shared_key, log_sum, grad, delta]) =
            buffers([query, key_value, shared, log_sum, &grad, &delta])
        else {
            return reference::attention_grad::<Self>(saved, grad, spec);
        };
        let shared_key = saved.shared_key.as_ref().map(|_| shared_key);
        let dtype = query.dtype;
        let saved = attention::Saved { query, key_value, shared_key, log_sum, grad, delta };
        let (query, key_value, shared) = attention::grad(saved, spec);
        // All heads add up to the gradient of the key that they share.
        let shared = shared.map(|parts| {
            let [batch, _, sequence, width] = parts.meta.shape().dims();
            let sum = Self::float_sum_dim(wrapped(parts), 1);
            Self::float_cast(Self::float_reshape(sum, Shape::new([batch, sequence, width])), FloatDType::from(dtype))
        });
        (wrapped(query), wrapped(key_value), shared)
    }
}

fn in_f32(tensor: FloatTensor<Cube>) -> FloatTensor<Cube> {
    if tensor.dtype() == DType::F32 { tensor } else { Cube::float_cast(tensor, FloatDType::F32) }
}
