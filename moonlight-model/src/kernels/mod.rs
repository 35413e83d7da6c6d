//! The operations that a training step spends its time in, as backend extensions.
//!
//! Each is written at least twice. `reference` composes Burn's own tensor operations and runs on every backend; `flex` is
//! the fast CPU form, for f32 and bf16, `cube` that for GPUs, and tests hold them to the reference. Gradients are written by
//! hand in `autodiff`.
//! The functions of this module are what the model calls; they take and give Burn tensors and name no backend.
//!
//! | operation | shape | why not Burn's |
//! |---|---|---|
//! | [`project`] | `[rows, in] x [in, out]` | Burn's product is slow for the gradients, and for a single row |
//! | [`grouped_matmul`] | `[rows, in] x [experts, in, out]` | Burn has no grouped product; slicing a stack is ruinous in autodiff |
//! | [`packed_matmul`] | the same by weights of 8 or 4 bits | Burn keeps the weight in full for the backward pass |
//! | [`dispatch_rows`], [`combine_rows`] | tokens to experts' rows and back | the gradient of a gather is a gather, not a scatter |
//! | [`latent_attention`], [`grouped_attention`] | causal, by documents | autodiff keeps several `T x T` tensors; these keep none |
//! | [`attend_past`] | new tokens to a cache | several sequences of different lengths at once, read where they lie |
//! | [`swiglu`], [`rms_norm`], [`rotate`], [`cross_entropy`] | elementwise or row by row | one pass instead of five to ten |

mod autodiff;
mod backend;
#[cfg(feature = "cube")]
mod cube;
#[cfg(feature = "cpu")]
mod flex;
mod past;
mod plan;
mod reference;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{Int, Tensor};

use backend::Kernels;
pub(crate) use past::in_step;
pub use past::{PastSpec, Run};
pub use plan::ExpertPlan;

/// What an attention needs to know beside its tensors. It is always causal.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Factor on the scores.
    pub scale: f32,
    /// For each query (`batch * sequence` numbers) the first key that it may see: the start of its document. `None`
    /// where each sequence is one document.
    pub starts: Option<Arc<Vec<u32>>>,
}

/// What a rotation needs to know beside its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RotationSpec {
    /// The first dimension of a head that turns; everything before it passes unchanged, everything after it turns.
    pub start: usize,
    /// Whether pairs lie beside each other (DeepSeek) or half the turning part apart (Llama).
    pub interleave: bool,
}

/// Values that share a scale: the block of QLoRA (arXiv 2305.14314).
pub const BLOCK: usize = 64;

/// How many bits a packed value has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    /// Whole numbers from -127 to 127, kept 128 higher.
    Eight,
    /// Whole numbers from -7 to 7, kept 8 higher; the first half of a block in the low half of its bytes.
    Four,
}

impl Bits {
    /// The largest number.
    pub fn largest(self) -> u8 {
        match self {
            Self::Eight => 127,
            Self::Four => 7,
        }
    }

    /// What stands for 0.
    pub fn zero(self) -> u8 {
        self.largest() + 1
    }

    /// Bytes of so many values, an even number.
    pub fn bytes(self, values: usize) -> usize {
        match self {
            Self::Eight => values,
            Self::Four => values / 2,
        }
    }
}

/// The shape of a packed matrix, or of each of a stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedSpec {
    /// Bits of a value.
    pub bits: Bits,
    /// Rows.
    pub input: usize,
    /// Columns.
    pub output: usize,
}

/// The operations as Burn dispatches them; see the functions of the same names for shapes.
#[backend_extension(Flex: cfg(feature = "cpu"), Cube: cfg(feature = "cube"), Autodiff)]
pub(crate) trait ModelOps: Backend {
    fn project(rows: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;
    fn grouped_matmul(rows: FloatTensor<Self>, weight: FloatTensor<Self>, plan: Arc<ExpertPlan>) -> FloatTensor<Self>;
    fn packed_matmul(
        rows: FloatTensor<Self>,
        values: IntTensor<Self>,
        scales: FloatTensor<Self>,
        spec: PackedSpec,
        plan: Arc<ExpertPlan>,
    ) -> FloatTensor<Self>;
    fn dispatch_rows(tokens: FloatTensor<Self>, plan: Arc<ExpertPlan>) -> FloatTensor<Self>;
    fn combine_rows(rows: FloatTensor<Self>, weights: FloatTensor<Self>, plan: Arc<ExpertPlan>) -> FloatTensor<Self>;
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
    fn rms_norm(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self>;
    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        spec: RotationSpec,
    ) -> FloatTensor<Self>;
    fn latent_attention(
        query: FloatTensor<Self>,
        key_value: FloatTensor<Self>,
        shared_key: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> FloatTensor<Self>;
    fn grouped_attention(
        query: FloatTensor<Self>,
        key_value: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> FloatTensor<Self>;
    fn attend_past(query: FloatTensor<Self>, past: FloatTensor<Self>, spec: PastSpec) -> FloatTensor<Self>;
    fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self>;
}

/// Every backend with kernels has the operations; `Autodiff` has its own, in `autodiff.rs`.
impl<B: Kernels> ModelOps for B {
    fn project(rows: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        B::project_forward(rows, weight)
    }

    fn grouped_matmul(rows: FloatTensor<Self>, weight: FloatTensor<Self>, plan: Arc<ExpertPlan>) -> FloatTensor<Self> {
        B::grouped_matmul_forward(rows, weight, &plan)
    }

    fn packed_matmul(
        rows: FloatTensor<Self>,
        values: IntTensor<Self>,
        scales: FloatTensor<Self>,
        spec: PackedSpec,
        plan: Arc<ExpertPlan>,
    ) -> FloatTensor<Self> {
        B::packed_matmul_forward(rows, values, scales, spec, &plan)
    }

    fn dispatch_rows(tokens: FloatTensor<Self>, plan: Arc<ExpertPlan>) -> FloatTensor<Self> {
        B::dispatch_rows_forward(tokens, &plan)
    }

    fn combine_rows(rows: FloatTensor<Self>, weights: FloatTensor<Self>, plan: Arc<ExpertPlan>) -> FloatTensor<Self> {
        B::combine_rows_forward(rows, weights, &plan)
    }

    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        B::swiglu_forward(gate, up)
    }

    fn rms_norm(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
        B::rms_norm_forward(x, gain, epsilon)
    }

    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        spec: RotationSpec,
    ) -> FloatTensor<Self> {
        B::rotate_forward(x, cos, sin, &spec)
    }

    fn latent_attention(
        query: FloatTensor<Self>,
        key_value: FloatTensor<Self>,
        shared_key: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> FloatTensor<Self> {
        B::attention_forward(query, key_value, Some(shared_key), &spec).0
    }

    fn grouped_attention(
        query: FloatTensor<Self>,
        key_value: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> FloatTensor<Self> {
        B::attention_forward(query, key_value, None, &spec).0
    }

    fn attend_past(query: FloatTensor<Self>, past: FloatTensor<Self>, spec: PastSpec) -> FloatTensor<Self> {
        B::attend_past(query, past, &spec)
    }

    fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        B::cross_entropy_forward(logits, targets)
    }
}

/// Multiplies all rows by one matrix: `[rows, in]` and `[in, out]` to `[rows, out]`.
pub fn project(rows: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as ModelOps>::project(rows.into_dispatch(), weight.into_dispatch()))
}

/// Multiplies each expert's rows by its own matrix.
///
/// `rows` is `[rows, in]`, sorted as `plan` says; `weight` is `[experts, in, out]`; the result is `[rows, out]`.
/// Experts without rows are not touched.
pub fn grouped_matmul(rows: Tensor<2>, weight: Tensor<3>, plan: &Arc<ExpertPlan>) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as ModelOps>::grouped_matmul(
        rows.into_dispatch(),
        weight.into_dispatch(),
        plan.clone(),
    ))
}

/// Like [`grouped_matmul`] for frozen weights in few bits, of which one expert's at a time is there in full.
///
/// `values` is u8 `[experts, bytes]`, `scales` f32 `[experts, blocks]`: each matrix in blocks of [`BLOCK`] values. There is
/// a gradient for the rows alone, and the weights are unpacked again for it.
pub fn packed_matmul(
    rows: Tensor<2>,
    values: Tensor<2, Int>,
    scales: Tensor<2>,
    spec: PackedSpec,
    plan: &Arc<ExpertPlan>,
) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as ModelOps>::packed_matmul(
        rows.into_dispatch(),
        values.into_dispatch(),
        scales.into_dispatch(),
        spec,
        plan.clone(),
    ))
}

/// Copies each token to the rows of the experts that it chose: `[tokens, hidden]` to `[tokens * k, hidden]`.
pub fn dispatch_rows(tokens: Tensor<2>, plan: &Arc<ExpertPlan>) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as ModelOps>::dispatch_rows(tokens.into_dispatch(), plan.clone()))
}

/// Adds up each token's rows, weighted: `out[t] = sum_k weights[t, k] * rows[row of (t, k)]`.
///
/// `rows` is `[tokens * k, hidden]`, `weights` `[tokens, k]` in f32; the sum is in f32 and rounded once to the dtype
/// of `rows`; the result is `[tokens, hidden]`.
pub fn combine_rows(rows: Tensor<2>, weights: Tensor<2>, plan: &Arc<ExpertPlan>) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as ModelOps>::combine_rows(
        rows.into_dispatch(),
        weights.into_dispatch(),
        plan.clone(),
    ))
}

/// `silu(gate) * up`, elementwise, for two tensors of one shape `[rows, width]`.
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as ModelOps>::swiglu(gate.into_dispatch(), up.into_dispatch()))
}

/// `gain * x / sqrt(mean(x^2) + epsilon)` over the last dimension of `[rows, width]`; `gain` is `[width]`.
///
/// The statistics are in f32; the normalised value is rounded to the dtype of `x` *before* the product with the gain,
/// as the published code does.
pub fn rms_norm(x: Tensor<2>, gain: Tensor<1>, epsilon: f64) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as ModelOps>::rms_norm(x.into_dispatch(), gain.into_dispatch(), epsilon as f32))
}

/// Turns the tail of each head by its position's angles.
///
/// `x` is `[batch, sequence, heads, width]`; `cos` and `sin` are `[batch * sequence, (width - start) / 2]` in f32. Each
/// pair `(a, b)` becomes `(a cos - b sin, b cos + a sin)` in place, so queries and keys keep their order and so
/// their products.
pub fn rotate(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>, spec: RotationSpec) -> Tensor<4> {
    Tensor::from_dispatch(<Dispatch as ModelOps>::rotate(
        x.into_dispatch(),
        cos.into_dispatch(),
        sin.into_dispatch(),
        spec,
    ))
}

/// Causal attention of MLA: keys are a part of each head's own and a part that all heads share.
///
/// `query` is `[batch, sequence, heads, nope + rope]`, `key_value` `[batch, sequence, heads, nope + value]` (keys
/// first), `shared_key` `[batch, sequence, rope]`; the result is `[batch, sequence, heads, value]`.
pub fn latent_attention(
    query: Tensor<4>,
    key_value: Tensor<4>,
    shared_key: Tensor<3>,
    spec: AttentionSpec,
) -> Tensor<4> {
    Tensor::from_dispatch(<Dispatch as ModelOps>::latent_attention(
        query.into_dispatch(),
        key_value.into_dispatch(),
        shared_key.into_dispatch(),
        spec,
    ))
}

/// Causal grouped-query attention.
///
/// `query` is `[batch, sequence, heads, width]`, `key_value` `[batch, sequence, key heads, width + value]` (keys
/// first), with key heads dividing heads; the result is `[batch, sequence, heads, value]`.
pub fn grouped_attention(query: Tensor<4>, key_value: Tensor<4>, spec: AttentionSpec) -> Tensor<4> {
    Tensor::from_dispatch(<Dispatch as ModelOps>::grouped_attention(
        query.into_dispatch(),
        key_value.into_dispatch(),
        spec,
    ))
}

/// Attention of new tokens to a cache that has their own keys and values already; each sees what lies before it in its
/// sequence, and itself. There is no gradient.
///
/// `query` is `[tokens, heads, key width]`, `past` `[batch, key heads, capacity, row]` with key heads dividing heads; `spec`
/// says which part of a row is the key and which the value, and whose the tokens are; the result is
/// `[tokens, heads, value width]`.
pub fn attend_past(query: Tensor<3>, past: Tensor<4>, spec: PastSpec) -> Tensor<3> {
    Tensor::from_dispatch(<Dispatch as ModelOps>::attend_past(query.into_dispatch(), past.into_dispatch(), spec))
}

/// `-log softmax(logits)[target]` of each row, in f32: `[rows, vocab]` and `[rows]` to `[rows]`.
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    Tensor::from_dispatch(<Dispatch as ModelOps>::cross_entropy(logits.into_dispatch(), targets.into_dispatch()))
}
