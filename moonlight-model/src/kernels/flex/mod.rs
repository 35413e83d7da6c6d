//! The operations on the CPU: one pass over memory, vectorised, on all threads. All are for f32, and those that
//! decoding reads its weights and its cache by for bf16 as well.
//!
//! Work is split into pieces that write disjoint memory, and every sum is taken in an order that does not depend on
//! the number of threads: the same input gives the same bits. Other dtypes run the reference.

mod attention;
mod cross_entropy;
mod element;
mod few_rows;
mod math;
mod matrix;
mod norm;
mod packed;
mod past;
mod product;
mod rotary;
mod rows;
mod swiglu;

use burn::backend::Flex;
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{Bytes, DType, Shape, bf16};

use super::backend::Kernels;
use super::reference::{self, AttentionSaved};
use super::{AttentionSpec, ExpertPlan, PackedSpec, PastSpec, RotationSpec};
use element::Element;

/// Hands inputs that are not f32 to the reference.
macro_rules! unless_f32 {
    ([$($tensor:expr),+], $fallback:expr) => {
        if [$($tensor.dtype()),+].iter().any(|&dtype| dtype != DType::F32) {
            return $fallback;
        }
    };
}

/// Runs a kernel in the dtype that its inputs share, and hands them to the reference where that is none of its own.
macro_rules! by_dtype {
    ([$a:ident, $b:ident], $element:ident => $kernel:expr, $fallback:expr) => {
        match ($a.dtype(), $b.dtype()) {
            (DType::F32, DType::F32) => {
                type $element = f32;
                let ($a, $b) = ($a.to_contiguous(), $b.to_contiguous());
                $kernel
            }
            (DType::BF16, DType::BF16) => {
                type $element = bf16;
                let ($a, $b) = ($a.to_contiguous(), $b.to_contiguous());
                $kernel
            }
            _ => $fallback,
        }
    };
}

impl Kernels for Flex {
    fn project_forward(rows: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let offsets = [0, dims::<2>(&rows)[0]];
        by_dtype!(
            [rows, weight],
            E => product::forward::<E>(&rows, &weight, &offsets, false),
            reference::project_forward::<Self>(rows, weight)
        )
    }

    fn project_rows_grad(grad: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let offsets = [0, dims::<2>(&grad)[0]];
        by_dtype!(
            [grad, weight],
            E => product::forward::<E>(&grad, &weight, &offsets, true),
            reference::project_rows_grad::<Self>(grad, weight)
        )
    }

    fn project_weight_grad(rows: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let offsets = [0, dims::<2>(&rows)[0]];
        by_dtype!(
            [rows, grad],
            E => product::weight_grad::<E>(&rows, &grad, &offsets, None),
            reference::project_weight_grad::<Self>(rows, grad)
        )
    }

    fn grouped_matmul_forward(
        rows: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        by_dtype!(
            [rows, weight],
            E => product::forward::<E>(&rows, &weight, &plan.offsets, false),
            reference::grouped_matmul_forward::<Self>(rows, weight, plan)
        )
    }

    fn grouped_matmul_rows_grad(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        by_dtype!(
            [grad, weight],
            E => product::forward::<E>(&grad, &weight, &plan.offsets, true),
            reference::grouped_matmul_rows_grad::<Self>(grad, weight, plan)
        )
    }

    fn grouped_matmul_weight_grad(
        rows: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        by_dtype!(
            [rows, grad],
            E => product::weight_grad::<E>(&rows, &grad, &plan.offsets, Some(plan.experts())),
            reference::grouped_matmul_weight_grad::<Self>(rows, grad, plan)
        )
    }

    fn packed_matmul_forward(
        rows: FloatTensor<Self>,
        values: IntTensor<Self>,
        scales: FloatTensor<Self>,
        spec: PackedSpec,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        unless_f32!([rows], reference::packed_matmul_forward::<Self>(rows, values, scales, spec, plan));
        packed::product(&rows.to_contiguous(), &values.to_contiguous(), &scales.to_contiguous(), spec, plan, false)
    }

    fn packed_matmul_rows_grad(
        grad: FloatTensor<Self>,
        values: IntTensor<Self>,
        scales: FloatTensor<Self>,
        spec: PackedSpec,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        unless_f32!([grad], reference::packed_matmul_rows_grad::<Self>(grad, values, scales, spec, plan));
        packed::product(&grad.to_contiguous(), &values.to_contiguous(), &scales.to_contiguous(), spec, plan, true)
    }

    fn dispatch_rows_forward(tokens: FloatTensor<Self>, plan: &ExpertPlan) -> FloatTensor<Self> {
        unless_f32!([tokens], reference::dispatch_rows_forward::<Self>(tokens, plan));
        rows::dispatch(&tokens.to_contiguous(), plan)
    }

    fn dispatch_rows_grad(grad: FloatTensor<Self>, plan: &ExpertPlan) -> FloatTensor<Self> {
        unless_f32!([grad], reference::dispatch_rows_grad::<Self>(grad, plan));
        rows::dispatch_grad(&grad.to_contiguous(), plan)
    }

    fn combine_rows_forward(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        unless_f32!([rows, weights], reference::combine_rows_forward::<Self>(rows, weights, plan));
        rows::combine(&rows.to_contiguous(), &weights.to_contiguous(), plan)
    }

    fn combine_rows_grad(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unless_f32!([rows, weights, grad], reference::combine_rows_grad::<Self>(rows, weights, grad, plan));
        rows::combine_grad(&rows.to_contiguous(), &weights.to_contiguous(), &grad.to_contiguous(), plan)
    }

    fn swiglu_forward(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        unless_f32!([gate, up], reference::swiglu_forward::<Self>(gate, up));
        swiglu::forward(&gate.to_contiguous(), &up.to_contiguous())
    }

    fn swiglu_grad(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unless_f32!([gate, up, grad], reference::swiglu_grad::<Self>(gate, up, grad));
        swiglu::grad(&gate.to_contiguous(), &up.to_contiguous(), &grad.to_contiguous())
    }

    fn rms_norm_forward(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
        unless_f32!([x, gain], reference::rms_norm_forward::<Self>(x, gain, epsilon));
        norm::forward(&x.to_contiguous(), &gain.to_contiguous(), epsilon)
    }

    fn rms_norm_grad(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        epsilon: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unless_f32!([x, gain, grad], reference::rms_norm_grad::<Self>(x, gain, grad, epsilon));
        norm::grad(&x.to_contiguous(), &gain.to_contiguous(), &grad.to_contiguous(), epsilon)
    }

    fn rotate_forward(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        spec: &RotationSpec,
    ) -> FloatTensor<Self> {
        unless_f32!([x, cos, sin], reference::rotate_forward::<Self>(x, cos, sin, spec));
        rotary::forward(&x.to_contiguous(), &cos.to_contiguous(), &sin.to_contiguous(), spec)
    }

    fn attention_forward(
        query: FloatTensor<Self>,
        key_value: FloatTensor<Self>,
        shared_key: Option<FloatTensor<Self>>,
        spec: &AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        unless_f32!([query, key_value], reference::attention_forward::<Self>(query, key_value, shared_key, spec));
        let shared_key = shared_key.map(|shared| shared.to_contiguous());
        attention::forward(&query.to_contiguous(), &key_value.to_contiguous(), shared_key.as_ref(), spec)
    }

    fn attention_grad(
        saved: AttentionSaved<Self>,
        grad: FloatTensor<Self>,
        spec: &AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, Option<FloatTensor<Self>>) {
        unless_f32!([saved.query, saved.key_value, grad], reference::attention_grad::<Self>(saved, grad, spec));
        attention::grad(saved, &grad.to_contiguous(), spec)
    }

    fn attend_past(query: FloatTensor<Self>, past: FloatTensor<Self>, spec: &PastSpec) -> FloatTensor<Self> {
        by_dtype!([query, past], E => past::forward::<E>(&query, &past, spec), reference::attend_past::<Self>(query, past, spec))
    }

    fn cross_entropy_forward(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        unless_f32!([logits], reference::cross_entropy_forward::<Self>(logits, targets));
        cross_entropy::forward(&logits.to_contiguous(), &integers(targets))
    }

    fn cross_entropy_grad(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        unless_f32!([logits, grad], reference::cross_entropy_grad::<Self>(logits, targets, grad));
        cross_entropy::grad(&logits.to_contiguous(), &integers(targets), &grad.to_contiguous())
    }
}

/// The values of a contiguous f32 tensor.
fn values(tensor: &FlexTensor) -> &[f32] {
    values_of(tensor)
}

/// The values of a contiguous tensor, whose dtype the caller has looked at.
fn values_of<E: Element>(tensor: &FlexTensor) -> &[E] {
    tensor.as_slice().expect("the tensor was made contiguous and is of this dtype")
}

/// The dimensions of a tensor of known rank.
fn dims<const D: usize>(tensor: &FlexTensor) -> [usize; D] {
    tensor.layout().shape().dims()
}

/// An f32 tensor that owns `values`.
fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    tensor_of(values, shape)
}

/// A tensor that owns `values`.
fn tensor_of<E: Element, const D: usize>(values: Vec<E>, shape: [usize; D]) -> FlexTensor {
    debug_assert_eq!(values.len(), shape.iter().product::<usize>());
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(Shape::new(shape)), E::dtype())
}

/// The values of an integer tensor of any width.
fn integers(tensor: IntTensor<Flex>) -> Vec<usize> {
    tensor.into_data().iter::<i64>().map(|value| value as usize).collect()
}
