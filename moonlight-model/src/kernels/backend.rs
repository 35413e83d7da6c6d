//! What a backend must be able to do: forward and gradient of each operation.

use burn::backend::Backend;
use burn::backend::tensor::{FloatTensor, IntTensor};

use super::reference::{self, AttentionSaved};
use super::{AttentionSpec, ExpertPlan, PackedSpec, PastSpec, RotationSpec};

/// Forward and gradient of the model's operations. The defaults are the reference; a backend overrides what it can do
/// faster.
pub(crate) trait Kernels: Backend {
    /// See `reference::project_forward`.
    fn project_forward(rows: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        reference::project_forward::<Self>(rows, weight)
    }

    /// See `reference::project_rows_grad`.
    fn project_rows_grad(grad: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        reference::project_rows_grad::<Self>(grad, weight)
    }

    /// See `reference::project_weight_grad`.
    fn project_weight_grad(rows: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        reference::project_weight_grad::<Self>(rows, grad)
    }

    /// See `reference::grouped_matmul_forward`.
    fn grouped_matmul_forward(
        rows: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        reference::grouped_matmul_forward::<Self>(rows, weight, plan)
    }

    /// See `reference::grouped_matmul_rows_grad`.
    fn grouped_matmul_rows_grad(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        reference::grouped_matmul_rows_grad::<Self>(grad, weight, plan)
    }

    /// See `reference::grouped_matmul_weight_grad`.
    fn grouped_matmul_weight_grad(
        rows: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        reference::grouped_matmul_weight_grad::<Self>(rows, grad, plan)
    }

    /// See `reference::packed_matmul_forward`.
    fn packed_matmul_forward(
        rows: FloatTensor<Self>,
        values: IntTensor<Self>,
        scales: FloatTensor<Self>,
        spec: PackedSpec,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        reference::packed_matmul_forward::<Self>(rows, values, scales, spec, plan)
    }

    /// See `reference::packed_matmul_rows_grad`.
    fn packed_matmul_rows_grad(
        grad: FloatTensor<Self>,
        values: IntTensor<Self>,
        scales: FloatTensor<Self>,
        spec: PackedSpec,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        reference::packed_matmul_rows_grad::<Self>(grad, values, scales, spec, plan)
    }

    /// See `reference::dispatch_rows_forward`.
    fn dispatch_rows_forward(tokens: FloatTensor<Self>, plan: &ExpertPlan) -> FloatTensor<Self> {
        reference::dispatch_rows_forward::<Self>(tokens, plan)
    }

    /// See `reference::dispatch_rows_grad`.
    fn dispatch_rows_grad(grad: FloatTensor<Self>, plan: &ExpertPlan) -> FloatTensor<Self> {
        reference::dispatch_rows_grad::<Self>(grad, plan)
    }

    /// See `reference::combine_rows_forward`.
    fn combine_rows_forward(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        reference::combine_rows_forward::<Self>(rows, weights, plan)
    }

    /// See `reference::combine_rows_grad`.
    fn combine_rows_grad(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        reference::combine_rows_grad::<Self>(rows, weights, grad, plan)
    }

    /// See `reference::swiglu_forward`.
    fn swiglu_forward(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        reference::swiglu_forward::<Self>(gate, up)
    }

    /// See `reference::swiglu_grad`.
    fn swiglu_grad(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        reference::swiglu_grad::<Self>(gate, up, grad)
    }

    /// See `reference::rms_norm_forward`.
    fn rms_norm_forward(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
        reference::rms_norm_forward::<Self>(x, gain, epsilon)
    }

    /// See `reference::rms_norm_grad`.
    fn rms_norm_grad(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        epsilon: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        reference::rms_norm_grad::<Self>(x, gain, grad, epsilon)
    }

    /// See `reference::rotate_forward`.
    fn rotate_forward(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        spec: &RotationSpec,
    ) -> FloatTensor<Self> {
        reference::rotate_forward::<Self>(x, cos, sin, spec)
    }

    /// See `reference::attention_forward`.
    fn attention_forward(
        query: FloatTensor<Self>,
        key_value: FloatTensor<Self>,
        shared_key: Option<FloatTensor<Self>>,
        spec: &AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        reference::attention_forward::<Self>(query, key_value, shared_key, spec)
    }

    /// See `reference::attention_grad`.
    fn attention_grad(
        saved: AttentionSaved<Self>,
        grad: FloatTensor<Self>,
        spec: &AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, Option<FloatTensor<Self>>) {
        reference::attention_grad::<Self>(saved, grad, spec)
    }

    /// See `reference::attend_past`.
    fn attend_past(query: FloatTensor<Self>, past: FloatTensor<Self>, spec: &PastSpec) -> FloatTensor<Self> {
        reference::attend_past::<Self>(query, past, spec)
    }

    /// See `reference::cross_entropy_forward`.
    fn cross_entropy_forward(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        reference::cross_entropy_forward::<Self>(logits, targets)
    }

    /// See `reference::cross_entropy_grad`.
    fn cross_entropy_grad(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        reference::cross_entropy_grad::<Self>(logits, targets, grad)
    }
}
