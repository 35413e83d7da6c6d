//! The operations on the CPU: one pass over memory, vectorised, on all threads, for f32 and bf16.
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

/// Runs a kernel in the dtype that its inputs share, and hands them to the reference where that is none of its own. Inputs
/// behind `f32:` are in f32 whatever the others are.
macro_rules! by_dtype {
    ([$($input:ident),+] $(f32: [$($wide:ident),+])?, $element:ident => $kernel:expr, $fallback:expr) => {{
        let wide = true $($(&& $wide.dtype() == DType::F32)+)?;
        match shared_dtype(&[$($input.dtype()),+]) {
            Some(DType::F32) if wide => {
                type $element = f32;
                $(let $input = $input.to_contiguous();)+
                $($(let $wide = $wide.to_contiguous();)+)?
                $kernel
            }
            Some(DType::BF16) if wide => {
                type $element = bf16;
                $(let $input = $input.to_contiguous();)+
                $($(let $wide = $wide.to_contiguous();)+)?
                $kernel
            }
            _ => $fallback,
        }
    }};
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
        by_dtype!(
            [rows] f32: [scales],
            E => packed::product::<E>(&rows, &values.to_contiguous(), &scales, spec, plan, false),
            reference::packed_matmul_forward::<Self>(rows, values, scales, spec, plan)
        )
    }

    fn packed_matmul_rows_grad(
        grad: FloatTensor<Self>,
        values: IntTensor<Self>,
        scales: FloatTensor<Self>,
        spec: PackedSpec,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        by_dtype!(
            [grad] f32: [scales],
            E => packed::product::<E>(&grad, &values.to_contiguous(), &scales, spec, plan, true),
            reference::packed_matmul_rows_grad::<Self>(grad, values, scales, spec, plan)
        )
    }

    fn dispatch_rows_forward(tokens: FloatTensor<Self>, plan: &ExpertPlan) -> FloatTensor<Self> {
        by_dtype!(
            [tokens],
            E => rows::dispatch::<E>(&tokens, plan),
            reference::dispatch_rows_forward::<Self>(tokens, plan)
        )
    }

    fn dispatch_rows_grad(grad: FloatTensor<Self>, plan: &ExpertPlan) -> FloatTensor<Self> {
        by_dtype!([grad], E => rows::dispatch_grad::<E>(&grad, plan), reference::dispatch_rows_grad::<Self>(grad, plan))
    }

    fn combine_rows_forward(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> FloatTensor<Self> {
        by_dtype!(
            [rows] f32: [weights],
            E => rows::combine::<E>(&rows, &weights, plan),
            reference::combine_rows_forward::<Self>(rows, weights, plan)
        )
    }

    fn combine_rows_grad(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        plan: &ExpertPlan,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        by_dtype!(
            [rows, grad] f32: [weights],
            E => rows::combine_grad::<E>(&rows, &weights, &grad, plan),
            reference::combine_rows_grad::<Self>(rows, weights, grad, plan)
        )
    }

    fn swiglu_forward(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        by_dtype!([gate, up], E => swiglu::forward::<E>(&gate, &up), reference::swiglu_forward::<Self>(gate, up))
    }

    fn swiglu_grad(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        by_dtype!(
            [gate, up, grad],
            E => swiglu::grad::<E>(&gate, &up, &grad),
            reference::swiglu_grad::<Self>(gate, up, grad)
        )
    }

    fn rms_norm_forward(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
        by_dtype!(
            [x, gain],
            E => norm::forward::<E>(&x, &gain, epsilon),
            reference::rms_norm_forward::<Self>(x, gain, epsilon)
        )
    }

    fn rms_norm_grad(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        epsilon: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        by_dtype!(
            [x, gain, grad],
            E => norm::grad::<E>(&x, &gain, &grad, epsilon),
            reference::rms_norm_grad::<Self>(x, gain, grad, epsilon)
        )
    }

    fn rotate_forward(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        spec: &RotationSpec,
    ) -> FloatTensor<Self> {
        by_dtype!(
            [x] f32: [cos, sin],
            E => rotary::forward::<E>(&x, &cos, &sin, spec),
            reference::rotate_forward::<Self>(x, cos, sin, spec)
        )
    }

    fn attention_forward(
        query: FloatTensor<Self>,
        key_value: FloatTensor<Self>,
        shared_key: Option<FloatTensor<Self>>,
        spec: &AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        by_dtype!(
            [query, key_value],
            E => {
                let shared_key = shared_key.map(|shared| shared.to_contiguous());
                attention::forward::<E>(&query, &key_value, shared_key.as_ref(), spec)
            },
            reference::attention_forward::<Self>(query, key_value, shared_key, spec)
        )
    }

    fn attention_grad(
        saved: AttentionSaved<Self>,
        grad: FloatTensor<Self>,
        spec: &AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, Option<FloatTensor<Self>>) {
        match shared_dtype(&[saved.query.dtype(), saved.key_value.dtype(), grad.dtype()]) {
            Some(DType::F32) => attention::grad::<f32>(saved, &grad.to_contiguous(), spec),
            Some(DType::BF16) => attention::grad::<bf16>(saved, &grad.to_contiguous(), spec),
            _ => reference::attention_grad::<Self>(saved, grad, spec),
        }
    }

    fn attend_past(query: FloatTensor<Self>, past: FloatTensor<Self>, spec: &PastSpec) -> FloatTensor<Self> {
        by_dtype!(
            [query, past],
            E => past::forward::<E>(&query, &past, spec),
            reference::attend_past::<Self>(query, past, spec)
        )
    }

    fn cross_entropy_forward(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        by_dtype!(
            [logits],
            E => cross_entropy::forward::<E>(&logits, &integers(targets)),
            reference::cross_entropy_forward::<Self>(logits, targets)
        )
    }

    fn cross_entropy_grad(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        by_dtype!(
            [logits] f32: [grad],
            E => cross_entropy::grad::<E>(&logits, &integers(targets), &grad),
            reference::cross_entropy_grad::<Self>(logits, targets, grad)
        )
    }
}

/// The dtype that all have.
fn shared_dtype(dtypes: &[DType]) -> Option<DType> {
    let (&first, rest) = dtypes.split_first()?;
    rest.iter().all(|&dtype| dtype == first).then_some(first)
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

/// As many zeros, in memory that the system hands out cleared where it can.
fn zeros<E: Element>(count: usize) -> Vec<E> {
    bytemuck::allocation::zeroed_vec(count)
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
