//! The operations that a training step spends its time in, as backend extensions.
//!
//! The functions of this module take and give Burn tensors and name no backend. Each is written at least twice:
//! `reference` composes Burn's own operations and runs everywhere; `flex` is the fast form for the CPU, in f32 and bf16,
//! `cube` the one for GPUs, and tests hold both to the reference. Gradients are written by hand in `autodiff`.
//!
//! | operation | shapes | why not Burn's |
//! |---|---|---|
//! | [`project`] | `[rows, in] x [in, out]` | Burn's product is slow for the gradients, and for a single row |
//! | [`grouped_matmul`] | `[rows, in] x [groups, in, out]` | Burn has no grouped product; slicing a stack is ruinous in autodiff |
//! | [`quantized_matmul`] | the same by weights of 8 or 4 bits | Burn keeps the whole dequantized weight for the backward pass |
//! | [`dispatch_rows`], [`combine_rows`] | tokens to experts' rows and back | the gradient of a gather is a gather, not a scatter |
//! | [`latent_attention`], [`grouped_attention`] | causal, within documents | autodiff keeps several `[sequence, sequence]` tensors; these keep none |
//! | [`cached_attention`] | new tokens to a KV cache | several sequences of different lengths at once, read in place |
//! | [`swiglu`], [`rms_norm`], [`rotate`], [`cross_entropy`] | elementwise or row by row | one pass instead of five to ten |
//!
//! # What is checked
//!
//! Every function asserts shapes, dtypes and the ranges of what it indexes by before it dispatches, so that no arguments
//! reach the `unsafe` code of a backend that were not looked at. No tensor may be empty. Tensors of an operation lie on one
//! device. What lies in a tensor on a GPU is not read back to be checked: [`cross_entropy`] is bounded inside of its kernel.
//!
//! # Adding an operation
//!
//! Five files: declare its kernels and the operation in `ops!` below, with its public function and the modules of its
//! backends; compose it in `reference`; write `flex/NAME.rs` and `cube/NAME.rs` (or an empty `impl`, which runs the
//! reference); write its gradient in `autodiff`. Its tests go to `tests.rs`, `cube/tests.rs` and `tests/hostile_kernels.rs`.

mod autodiff;
mod cached_attention;
mod check;
mod group_layout;
mod ops;
mod reference;
mod spec;
#[cfg(test)]
mod tests;

#[cfg(feature = "cpu")]
mod flex {
    //! The operations on the CPU: one pass over memory, vectorised, on all threads, for f32 and bf16.
    //!
    //! Work is divided into parts that write disjoint memory, and every sum is taken in an order that does not depend on the
    //! number of threads: the same input gives the same bits. Other dtypes run the reference.

    mod attention;
    mod cached_attention;
    mod cross_entropy;
    mod dispatch;
    mod dtype;
    mod gemv;
    mod grouped_gemm;
    mod math;
    mod matrix;
    mod norm;
    mod quantized;
    mod rotary;
    mod swiglu;
    mod tensor;
}

#[cfg(feature = "cube")]
mod cube {
    //! Kernels for the CubeCL runtimes: CUDA, WGPU (Vulkan, Metal, DirectX, WebGPU) and whatever else CubeCL compiles for.
    //!
    //! Written once in CubeCL, which compiles them for the device when they are first used. Nothing here depends on
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
    mod dispatch;
    mod grouped_gemm;
    mod launch;
    mod norm;
    mod reduce;
    mod rotary;
    mod swiglu;
    mod tensor;
    #[cfg(all(test, feature = "cpu"))]
    mod tests;
}

use std::sync::Arc;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{DType, Int, Tensor};

pub(crate) use cached_attention::uniform_span;
pub use cached_attention::{CacheSpan, CachedAttentionSpec};
use check::Check;
pub use group_layout::{GroupLayout, GroupLayoutError};
use ops::ops;
use reference::AttentionSaved;
pub use spec::{AttentionSpec, QUANT_BLOCK, QuantBits, QuantizedSpec, RotationSpec};

ops! {
    kernels {
        /// Of [`project`].
        trait ProjectKernel {
            fn project_forward(rows: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;
            fn project_rows_grad(grad: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;
            fn project_weight_grad(rows: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self>;
        }

        /// Of [`grouped_matmul`].
        trait GroupedMatmulKernel {
            fn grouped_matmul_forward(
                rows: FloatTensor<Self>,
                weight: FloatTensor<Self>,
                layout: &GroupLayout,
            ) -> FloatTensor<Self>;
            fn grouped_matmul_rows_grad(
                grad: FloatTensor<Self>,
                weight: FloatTensor<Self>,
                layout: &GroupLayout,
            ) -> FloatTensor<Self>;
            fn grouped_matmul_weight_grad(
                rows: FloatTensor<Self>,
                grad: FloatTensor<Self>,
                layout: &GroupLayout,
            ) -> FloatTensor<Self>;
        }

        /// Of [`quantized_matmul`].
        trait QuantizedMatmulKernel {
            fn quantized_matmul_forward(
                rows: FloatTensor<Self>,
                values: IntTensor<Self>,
                scales: FloatTensor<Self>,
                spec: QuantizedSpec,
                layout: &GroupLayout,
            ) -> FloatTensor<Self>;
            fn quantized_matmul_rows_grad(
                grad: FloatTensor<Self>,
                values: IntTensor<Self>,
                scales: FloatTensor<Self>,
                spec: QuantizedSpec,
                layout: &GroupLayout,
            ) -> FloatTensor<Self>;
        }

        /// Of [`dispatch_rows`] and [`combine_rows`].
        trait DispatchKernel {
            fn dispatch_rows_forward(tokens: FloatTensor<Self>, layout: &GroupLayout) -> FloatTensor<Self>;
            fn dispatch_rows_grad(grad: FloatTensor<Self>, layout: &GroupLayout) -> FloatTensor<Self>;
            fn combine_rows_forward(
                rows: FloatTensor<Self>,
                weights: FloatTensor<Self>,
                layout: &GroupLayout,
            ) -> FloatTensor<Self>;
            fn combine_rows_grad(
                rows: FloatTensor<Self>,
                weights: FloatTensor<Self>,
                grad: FloatTensor<Self>,
                layout: &GroupLayout,
            ) -> (FloatTensor<Self>, FloatTensor<Self>);
        }

        /// Of [`swiglu`].
        trait SwigluKernel {
            fn swiglu_forward(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
            fn swiglu_grad(
                gate: FloatTensor<Self>,
                up: FloatTensor<Self>,
                grad: FloatTensor<Self>,
            ) -> (FloatTensor<Self>, FloatTensor<Self>);
        }

        /// Of [`rms_norm`].
        trait RmsNormKernel {
            fn rms_norm_forward(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self>;
            fn rms_norm_grad(
                x: FloatTensor<Self>,
                gain: FloatTensor<Self>,
                grad: FloatTensor<Self>,
                epsilon: f32,
            ) -> (FloatTensor<Self>, FloatTensor<Self>);
        }

        /// Of [`rotate`], whose gradient is the rotation by the negative angles.
        trait RotaryKernel {
            fn rotate_forward(
                x: FloatTensor<Self>,
                cos: FloatTensor<Self>,
                sin: FloatTensor<Self>,
                spec: &RotationSpec,
            ) -> FloatTensor<Self>;
        }

        /// Of [`latent_attention`] and, without a shared key, [`grouped_attention`].
        trait AttentionKernel {
            fn attention_forward(
                query: FloatTensor<Self>,
                key_value: FloatTensor<Self>,
                shared_key: Option<FloatTensor<Self>>,
                spec: &AttentionSpec,
            ) -> (FloatTensor<Self>, FloatTensor<Self>);
            fn attention_grad(
                saved: AttentionSaved<Self>,
                grad: FloatTensor<Self>,
                spec: &AttentionSpec,
            ) -> (FloatTensor<Self>, FloatTensor<Self>, Option<FloatTensor<Self>>);
        }

        /// Of [`cached_attention`], which has no gradient.
        trait CachedAttentionKernel {
            fn cached_attention_forward(
                query: FloatTensor<Self>,
                cache: FloatTensor<Self>,
                spec: &CachedAttentionSpec,
            ) -> FloatTensor<Self>;
        }

        /// Of [`cross_entropy`].
        trait CrossEntropyKernel {
            fn cross_entropy_forward(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self>;
            fn cross_entropy_grad(
                logits: FloatTensor<Self>,
                targets: IntTensor<Self>,
                grad: FloatTensor<Self>,
            ) -> FloatTensor<Self>;
        }
    }

    operations {
        fn project(rows: FloatTensor<Self>, weight: FloatTensor<Self>) = B::project_forward(rows, weight);
        fn grouped_matmul(rows: FloatTensor<Self>, weight: FloatTensor<Self>, layout: Arc<GroupLayout>) =
            B::grouped_matmul_forward(rows, weight, &layout);
        fn quantized_matmul(
            rows: FloatTensor<Self>,
            values: IntTensor<Self>,
            scales: FloatTensor<Self>,
            spec: QuantizedSpec,
            layout: Arc<GroupLayout>,
        ) = B::quantized_matmul_forward(rows, values, scales, spec, &layout);
        fn dispatch_rows(tokens: FloatTensor<Self>, layout: Arc<GroupLayout>) =
            B::dispatch_rows_forward(tokens, &layout);
        fn combine_rows(rows: FloatTensor<Self>, weights: FloatTensor<Self>, layout: Arc<GroupLayout>) =
            B::combine_rows_forward(rows, weights, &layout);
        fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) = B::swiglu_forward(gate, up);
        fn rms_norm(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f32) =
            B::rms_norm_forward(x, gain, epsilon);
        fn rotate(x: FloatTensor<Self>, cos: FloatTensor<Self>, sin: FloatTensor<Self>, spec: RotationSpec) =
            B::rotate_forward(x, cos, sin, &spec);
        fn latent_attention(
            query: FloatTensor<Self>,
            key_value: FloatTensor<Self>,
            shared_key: FloatTensor<Self>,
            spec: AttentionSpec,
        ) = B::attention_forward(query, key_value, Some(shared_key), &spec).0;
        fn grouped_attention(query: FloatTensor<Self>, key_value: FloatTensor<Self>, spec: AttentionSpec) =
            B::attention_forward(query, key_value, None, &spec).0;
        fn cached_attention(query: FloatTensor<Self>, cache: FloatTensor<Self>, spec: CachedAttentionSpec) =
            B::cached_attention_forward(query, cache, &spec);
        fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) =
            B::cross_entropy_forward(logits, targets);
    }
}

/// Multiplies all rows by one matrix: `[rows, in]` and `[in, out]` to `[rows, out]`, of one dtype.
///
/// # Panics
///
/// If shapes or dtypes are others.
#[track_caller]
pub fn project(rows: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let check = Check("project");
    let ([_, input], [depth, output]) = (check.float("rows", &rows), check.float("weight", &weight));
    check.shape("weight", [depth, output], [input, output]);
    check.dtype("weight", weight.dtype(), rows.dtype());
    Tensor::from_dispatch(<Dispatch as ModelOps>::project(rows.into_dispatch(), weight.into_dispatch()))
}

/// Multiplies each group's rows by the group's own matrix.
///
/// `rows` is `[rows, in]`, sorted as `layout` says; `weight` is `[groups, in, out]`, of the same dtype; the result is
/// `[rows, out]`. The matrix of a group without rows is not read.
///
/// # Panics
///
/// If shapes or dtypes are others.
#[track_caller]
pub fn grouped_matmul(rows: Tensor<2>, weight: Tensor<3>, layout: &Arc<GroupLayout>) -> Tensor<2> {
    let check = Check("grouped_matmul");
    let ([count, input], [groups, depth, output]) = (check.float("rows", &rows), check.float("weight", &weight));
    check.shape("rows", [count, input], [layout.rows(), input]);
    check.shape("weight", [groups, depth, output], [layout.groups(), input, output]);
    check.dtype("weight", weight.dtype(), rows.dtype());
    Tensor::from_dispatch(<Dispatch as ModelOps>::grouped_matmul(
        rows.into_dispatch(),
        weight.into_dispatch(),
        layout.clone(),
    ))
}

/// Like [`grouped_matmul`] by frozen quantized weights, of which one group's at a time is dequantized.
///
/// `rows` is `[rows, in]`; `values` u8 `[groups, bytes]` and `scales` f32 `[groups, blocks]` hold each matrix in
/// `blocks = ceil(in * out / 64)` blocks of [`QUANT_BLOCK`] values, `w = (value - zero) * scale`, the last one filled up.
/// There is a gradient for the rows alone, and the weights are dequantized again for it.
///
/// # Panics
///
/// If shapes or dtypes are others; on a GPU `values` may be integers of any type.
#[track_caller]
pub fn quantized_matmul(
    rows: Tensor<2>,
    values: Tensor<2, Int>,
    scales: Tensor<2>,
    spec: QuantizedSpec,
    layout: &Arc<GroupLayout>,
) -> Tensor<2> {
    let check = Check("quantized_matmul");
    let [bytes, blocks] = check.quantized(spec);
    check.shape("rows", check.float("rows", &rows), [layout.rows(), spec.input]);
    check.shape("values", values.dims(), [layout.groups(), bytes]);
    check.shape("scales", check.float("scales", &scales), [layout.groups(), blocks]);
    check.dtype("scales", scales.dtype(), DType::F32);
    Tensor::from_dispatch(<Dispatch as ModelOps>::quantized_matmul(
        rows.into_dispatch(),
        values.into_dispatch(),
        scales.into_dispatch(),
        spec,
        layout.clone(),
    ))
}

/// Copies each token to the rows of the experts that it chose: `[tokens, hidden]` to `[tokens * k, hidden]`.
///
/// # Panics
///
/// If there are not as many tokens as `layout` has.
#[track_caller]
pub fn dispatch_rows(tokens: Tensor<2>, layout: &Arc<GroupLayout>) -> Tensor<2> {
    let check = Check("dispatch_rows");
    let [count, width] = check.float("tokens", &tokens);
    check.shape("tokens", [count, width], [layout.tokens(), width]);
    Tensor::from_dispatch(<Dispatch as ModelOps>::dispatch_rows(tokens.into_dispatch(), layout.clone()))
}

/// Adds up each token's rows, weighted: `out[t] = sum_k weights[t, k] * rows[row of (t, k)]`.
///
/// `rows` is `[tokens * k, hidden]`, `weights` `[tokens, k]` in f32; the sum is in f32 and rounded once to the dtype
/// of `rows`; the result is `[tokens, hidden]`.
///
/// # Panics
///
/// If shapes or dtypes are others.
#[track_caller]
pub fn combine_rows(rows: Tensor<2>, weights: Tensor<2>, layout: &Arc<GroupLayout>) -> Tensor<2> {
    let check = Check("combine_rows");
    let [count, width] = check.float("rows", &rows);
    check.shape("rows", [count, width], [layout.rows(), width]);
    check.shape("weights", check.float("weights", &weights), [layout.tokens(), layout.k()]);
    check.dtype("weights", weights.dtype(), DType::F32);
    Tensor::from_dispatch(<Dispatch as ModelOps>::combine_rows(
        rows.into_dispatch(),
        weights.into_dispatch(),
        layout.clone(),
    ))
}

/// `silu(gate) * up`, elementwise, for two tensors of one shape `[rows, width]` and one dtype.
///
/// # Panics
///
/// If shapes or dtypes differ.
#[track_caller]
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    let check = Check("swiglu");
    check.shape("up", check.float("up", &up), check.float("gate", &gate));
    check.dtype("up", up.dtype(), gate.dtype());
    Tensor::from_dispatch(<Dispatch as ModelOps>::swiglu(gate.into_dispatch(), up.into_dispatch()))
}

/// `gain * x / sqrt(mean(x^2) + epsilon)` (arXiv 1910.07467) over the last dimension of `[rows, width]`; `gain` is
/// `[width]`.
///
/// The statistics are in f32; the normalised value is rounded to the dtype of `x` *before* the product with the gain,
/// as the published code does.
///
/// # Panics
///
/// If the gain has another width.
#[track_caller]
pub fn rms_norm(x: Tensor<2>, gain: Tensor<1>, epsilon: f64) -> Tensor<2> {
    let check = Check("rms_norm");
    let [_, width] = check.float("x", &x);
    check.shape("gain", check.float("gain", &gain), [width]);
    Tensor::from_dispatch(<Dispatch as ModelOps>::rms_norm(x.into_dispatch(), gain.into_dispatch(), epsilon as f32))
}

/// Rotates the tail of each head by its position's angles (RoPE, arXiv 2104.09864).
///
/// `x` is `[batch, sequence, heads, width]`; `cos` and `sin` are `[batch * sequence, (width - start) / 2]` in f32. Each
/// pair `(a, b)` becomes `(a cos - b sin, b cos + a sin)` in place, so queries and keys keep their order and so
/// their products.
///
/// # Panics
///
/// If shapes or dtypes are others, or the tail has no dimension or an odd number of them.
#[track_caller]
pub fn rotate(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>, spec: RotationSpec) -> Tensor<4> {
    let check = Check("rotate");
    let [batch, sequence, _, width] = check.float("x", &x);
    let whole = spec.start < width && (width - spec.start).is_multiple_of(2);
    check.rule(whole, "what is rotated of a head is not a number of pairs");
    for (name, angles) in [("cos", &cos), ("sin", &sin)] {
        check.shape(name, check.float(name, angles), [batch * sequence, (width - spec.start) / 2]);
        check.dtype(name, angles.dtype(), DType::F32);
    }
    Tensor::from_dispatch(<Dispatch as ModelOps>::rotate(
        x.into_dispatch(),
        cos.into_dispatch(),
        sin.into_dispatch(),
        spec,
    ))
}

/// Causal attention of MLA (arXiv 2405.04434): a key is a part of each head's own and a part that all heads share.
///
/// `query` is `[batch, sequence, heads, nope + rope]`, `key_value` `[batch, sequence, heads, nope + value]` (keys
/// first), `shared_key` `[batch, sequence, rope]`, all of one dtype; the result is `[batch, sequence, heads, value]`.
///
/// # Panics
///
/// If shapes or dtypes are others, or a document start is not where [`AttentionSpec`] wants it.
#[track_caller]
pub fn latent_attention(
    query: Tensor<4>,
    key_value: Tensor<4>,
    shared_key: Tensor<3>,
    spec: AttentionSpec,
) -> Tensor<4> {
    let check = Check("latent_attention");
    let [batch, sequence, heads, width] = check.float("query", &query);
    let ([_, _, _, pair], [_, _, rope]) =
        (check.float("key_value", &key_value), check.float("shared_key", &shared_key));
    check.shape("key_value", key_value.dims(), [batch, sequence, heads, pair]);
    check.shape("shared_key", shared_key.dims(), [batch, sequence, rope]);
    check.rule(rope < width, "the shared key is as wide as the query or wider");
    check.rule(width - rope < pair, "`key_value` has no value beside the key");
    check.dtype("key_value", key_value.dtype(), query.dtype());
    check.dtype("shared_key", shared_key.dtype(), query.dtype());
    check.document_starts(&spec, batch, sequence);
    Tensor::from_dispatch(<Dispatch as ModelOps>::latent_attention(
        query.into_dispatch(),
        key_value.into_dispatch(),
        shared_key.into_dispatch(),
        spec,
    ))
}

/// Causal grouped-query attention (arXiv 2305.13245).
///
/// `query` is `[batch, sequence, heads, width]`, `key_value` `[batch, sequence, key heads, width + value]` (keys
/// first), of one dtype, with key heads dividing heads; the result is `[batch, sequence, heads, value]`.
///
/// # Panics
///
/// If shapes or dtypes are others, or a document start is not where [`AttentionSpec`] wants it.
#[track_caller]
pub fn grouped_attention(query: Tensor<4>, key_value: Tensor<4>, spec: AttentionSpec) -> Tensor<4> {
    let check = Check("grouped_attention");
    let [batch, sequence, heads, width] = check.float("query", &query);
    let [_, _, key_heads, pair] = check.float("key_value", &key_value);
    check.shape("key_value", key_value.dims(), [batch, sequence, key_heads, pair]);
    check.rule(heads.is_multiple_of(key_heads), "key heads do not divide heads");
    check.rule(width < pair, "`key_value` has no value beside the key");
    check.dtype("key_value", key_value.dtype(), query.dtype());
    check.document_starts(&spec, batch, sequence);
    Tensor::from_dispatch(<Dispatch as ModelOps>::grouped_attention(
        query.into_dispatch(),
        key_value.into_dispatch(),
        spec,
    ))
}

/// Attention of new tokens to a KV cache that holds their own keys and values already: each sees what lies before it in its
/// sequence, and itself. There is no gradient.
///
/// `query` is `[tokens, heads, key width]`, `cache` `[batch, key heads, capacity, row]`, of one dtype, with key heads
/// dividing heads; `spec` says which part of a row is the key and which the value, and whose the tokens are; the result is
/// `[tokens, heads, value width]`.
///
/// # Panics
///
/// If shapes or dtypes are others, keys or values are no part of a row, or spans are not as [`CachedAttentionSpec`] wants
/// them: inside the cache, in order, and of all tokens.
#[track_caller]
pub fn cached_attention(query: Tensor<3>, cache: Tensor<4>, spec: CachedAttentionSpec) -> Tensor<3> {
    let check = Check("cached_attention");
    let ([tokens, heads, width], shape) = (check.float("query", &query), check.float("cache", &cache));
    check.rule(heads.is_multiple_of(shape[1]), "key heads do not divide heads");
    check.cache_spans(&spec, tokens, shape);
    check.shape("query", [tokens, heads, width], [tokens, heads, spec.keys.len()]);
    check.dtype("cache", cache.dtype(), query.dtype());
    Tensor::from_dispatch(<Dispatch as ModelOps>::cached_attention(query.into_dispatch(), cache.into_dispatch(), spec))
}

/// `-log softmax(logits)[target]` of each row, in f32: `[rows, vocab]` and `[rows]` to `[rows]`.
///
/// A target outside `0..vocab` panics on the CPU. On a GPU, which is not waited for, the row's loss and its gradients are
/// NaN.
///
/// # Panics
///
/// If shapes are others; on the CPU, if a target is none of the vocabulary.
#[track_caller]
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let check = Check("cross_entropy");
    let [rows, _] = check.float("logits", &logits);
    check.shape("targets", targets.dims(), [rows]);
    Tensor::from_dispatch(<Dispatch as ModelOps>::cross_entropy(logits.into_dispatch(), targets.into_dispatch()))
}
