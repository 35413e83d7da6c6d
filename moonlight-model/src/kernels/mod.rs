//! Fused operations as Burn backend extensions. A training step spends most of its time in them.
//!
//! The public functions take and return Burn tensors and run on every backend. Each operation has up to three implementations:
//! `reference` uses Burn's own operations and runs everywhere; `flex` has fast kernels for CPUs, in f32 and bf16; `cube` has
//! kernels for GPUs. Tests compare both with the reference. Gradients are written by hand in `autodiff`.
//!
//! | operation | shapes | why not Burn's operations |
//! |---|---|---|
//! | [`project`] | `[rows, in] x [in, out]` | slow in the backward pass and for a single row |
//! | [`grouped_matmul`] | `[rows, in] x [groups, in, out]` | Burn has none, and the gradient of each slice of a stack has the size of the stack |
//! | [`quantized_matmul`] | the same, with weights of 8 or 4 bits | the backward pass would keep the whole dequantized weight |
//! | [`dispatch_rows`], [`combine_rows`] | tokens to rows of experts and back | the gradient of a gather is a scatter; here it is another gather |
//! | [`latent_attention`], [`grouped_attention`] | causal, within documents | autodiff keeps several `[sequence, sequence]` tensors; these keep none |
//! | [`cached_attention`](fn@cached_attention) | new tokens to a KV cache | sequences of different lengths in one call, read in place |
//! | [`swiglu`], [`rms_norm`], [`rotate`], [`cross_entropy`] | elementwise or by row | five to ten passes over memory instead of one |
//!
//! # What is checked
//!
//! Every function asserts shapes, dtypes and the ranges of all indices before it dispatches, because the `unsafe` code of the
//! backends relies on them. No tensor may be empty, and all tensors of an operation must be on one device. Indices in a tensor
//! on a GPU are not checked, because reading them back would wait for the device; the kernel of [`cross_entropy`] checks its
//! targets itself.
//!
//! # Adding an operation
//!
//! 1. Declare its kernels and the operation in `ops!` below, and add the public function with its checks.
//! 2. Write it with Burn's operations in `reference`.
//! 3. Write `flex/NAME.rs` and `cube/NAME.rs`. A backend with an empty `impl` runs the reference.
//! 4. Write its gradient in `autodiff`.
//! 5. Test it in `tests.rs`, `cube/tests.rs` and `tests/hostile_kernels.rs`. `CONTRIBUTING.md` has what to add to each.

mod autodiff;
mod cached_attention;
mod check;
mod f32_matmul;
mod group_layout;
mod ops;
mod reference;
mod spec;
#[cfg(test)]
mod tests;

#[cfg(feature = "cpu")]
mod flex {
    //! CPU kernels for f32 and bf16: one pass over memory, vectorized, on all threads. Other dtypes run the reference.
    //!
    //! Work is divided into tasks that write disjoint memory. The size of a task, and so the order of every sum, does not depend
    //! on the number of threads: the same input gives the same bits.

    mod attention;
    mod cached_attention;
    mod cross_entropy;
    pub(crate) mod decode;
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
    //! GPU kernels in CubeCL, which compiles them at their first use: for CUDA, WGPU (Vulkan, Metal, DirectX, WebGPU) and any
    //! other CubeCL runtime.
    //!
    //! The kernels do not depend on the runtime: cube sizes and shared memory stay within the limits that WebGPU guarantees
    //! everywhere. They take f32 and the half types that the device can store; sums are in f32. Projections run
    //! Burn's product, which uses matrix units (tensor cores); cached attention has no kernel yet.
    //!
    //! A *cube* is a workgroup (WebGPU) or thread block (CUDA), a *unit* one of its threads.
    //!
    //! # Where the host waits for the device
    //!
    //! All work of a forward and backward pass is queued without waiting: experts are chosen, counted and sorted on the device, and
    //! products are launched for as many tiles as rows could need (`rows / TILE` and one for each expert; those without rows end at
    //! once). A training step then reads its loss, its gradient norm and the loads of the experts.

    mod attention;
    mod cross_entropy;
    mod dispatch;
    mod grouped_gemm;
    mod grouped_mma;
    mod launch;
    mod norm;
    mod project;
    mod quantized;
    mod reduce;
    mod rotary;
    mod routing;
    mod swiglu;
    mod tensor;
    #[cfg(all(test, feature = "cpu"))]
    mod tests;
    #[cfg(all(test, feature = "kernel-text"))]
    mod text;
}

use std::sync::Arc;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{DType, Int, Tensor};

use crate::moe::RoutingRule;
pub(crate) use cached_attention::uniform_span;
pub use cached_attention::{CacheSpan, CachedAttentionSpec};
use check::Check;
pub use f32_matmul::{F32Matmul, f32_matmul, set_f32_matmul};
#[cfg(feature = "cpu")]
pub(crate) use flex::decode as few_tokens;
pub use group_layout::{GroupLayout, GroupLayoutError};
pub use moonlight_simd::quant::{BLOCK as QUANT_BLOCK, Bits as QuantBits, Shape as QuantizedShape, TILE as QUANT_TILE};
use ops::ops;
use reference::AttentionSaved;
pub use spec::{AttentionSpec, RotationSpec};

ops! {
    kernels {
        /// The kernels of [`project`].
        trait ProjectKernel {
            fn project_forward(rows: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;
            fn project_rows_grad(grad: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;
            fn project_weight_grad(rows: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self>;
        }

        /// The kernels of [`grouped_matmul`].
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

        /// The kernels of [`quantized_matmul`]. There is no gradient for the weight.
        trait QuantizedMatmulKernel {
            fn quantized_matmul_forward(
                rows: FloatTensor<Self>,
                values: IntTensor<Self>,
                scales: FloatTensor<Self>,
                spec: QuantizedShape,
                layout: &GroupLayout,
            ) -> FloatTensor<Self>;
            fn quantized_matmul_rows_grad(
                grad: FloatTensor<Self>,
                values: IntTensor<Self>,
                scales: FloatTensor<Self>,
                spec: QuantizedShape,
                layout: &GroupLayout,
            ) -> FloatTensor<Self>;
        }

        /// The kernels of [`choose_experts`], [`count_choices`] and [`sort_choices`], which have no gradient.
        trait RoutingKernel {
            fn choose_experts_forward(
                scores: FloatTensor<Self>,
                bias: Option<FloatTensor<Self>>,
                rule: &RoutingRule,
            ) -> IntTensor<Self>;
            fn count_choices_forward(
                choices: IntTensor<Self>,
                counted: Option<IntTensor<Self>>,
                groups: usize,
                sections: usize,
            ) -> IntTensor<Self>;
            fn sort_choices_forward(choices: IntTensor<Self>, counts: IntTensor<Self>) -> IntTensor<Self>;
        }

        /// The kernels of [`dispatch_rows`] and [`combine_rows`].
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

        /// The kernels of [`swiglu`].
        trait SwigluKernel {
            fn swiglu_forward(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
            fn swiglu_grad(
                gate: FloatTensor<Self>,
                up: FloatTensor<Self>,
                grad: FloatTensor<Self>,
            ) -> (FloatTensor<Self>, FloatTensor<Self>);
        }

        /// The kernels of [`rms_norm`].
        trait RmsNormKernel {
            fn rms_norm_forward(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self>;
            fn rms_norm_grad(
                x: FloatTensor<Self>,
                gain: FloatTensor<Self>,
                grad: FloatTensor<Self>,
                epsilon: f32,
            ) -> (FloatTensor<Self>, FloatTensor<Self>);
        }

        /// The kernel of [`rotate`]. Its gradient is the rotation by the negative angles.
        trait RotaryKernel {
            fn rotate_forward(
                x: FloatTensor<Self>,
                cos: FloatTensor<Self>,
                sin: FloatTensor<Self>,
                spec: &RotationSpec,
            ) -> FloatTensor<Self>;
        }

        /// The kernels of [`latent_attention`] and, without a shared key, of [`grouped_attention`].
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

        /// The kernel of [`cached_attention`](fn@cached_attention), which has no gradient.
        trait CachedAttentionKernel {
            fn cached_attention_forward(
                query: FloatTensor<Self>,
                cache: FloatTensor<Self>,
                spec: &CachedAttentionSpec,
            ) -> FloatTensor<Self>;
        }

        /// The kernels of [`cross_entropy`].
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
        fn project(rows: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> =
            B::project_forward(rows, weight);
        fn grouped_matmul(
            rows: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            layout: Arc<GroupLayout>,
        ) -> FloatTensor<Self> = B::grouped_matmul_forward(rows, weight, &layout);
        fn quantized_matmul(
            rows: FloatTensor<Self>,
            values: IntTensor<Self>,
            scales: FloatTensor<Self>,
            spec: QuantizedShape,
            layout: Arc<GroupLayout>,
        ) -> FloatTensor<Self> = B::quantized_matmul_forward(rows, values, scales, spec, &layout);
        fn dispatch_rows(tokens: FloatTensor<Self>, layout: Arc<GroupLayout>) -> FloatTensor<Self> =
            B::dispatch_rows_forward(tokens, &layout);
        fn combine_rows(
            rows: FloatTensor<Self>,
            weights: FloatTensor<Self>,
            layout: Arc<GroupLayout>,
        ) -> FloatTensor<Self> = B::combine_rows_forward(rows, weights, &layout);
        fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> = B::swiglu_forward(gate, up);
        fn rms_norm(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> =
            B::rms_norm_forward(x, gain, epsilon);
        fn rotate(
            x: FloatTensor<Self>,
            cos: FloatTensor<Self>,
            sin: FloatTensor<Self>,
            spec: RotationSpec,
        ) -> FloatTensor<Self> = B::rotate_forward(x, cos, sin, &spec);
        fn latent_attention(
            query: FloatTensor<Self>,
            key_value: FloatTensor<Self>,
            shared_key: FloatTensor<Self>,
            spec: AttentionSpec,
        ) -> FloatTensor<Self> = B::attention_forward(query, key_value, Some(shared_key), &spec).0;
        fn grouped_attention(
            query: FloatTensor<Self>,
            key_value: FloatTensor<Self>,
            spec: AttentionSpec,
        ) -> FloatTensor<Self> = B::attention_forward(query, key_value, None, &spec).0;
        fn cached_attention(
            query: FloatTensor<Self>,
            cache: FloatTensor<Self>,
            spec: CachedAttentionSpec,
        ) -> FloatTensor<Self> = B::cached_attention_forward(query, cache, &spec);
        fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> =
            B::cross_entropy_forward(logits, targets);
        fn choose_experts(
            scores: FloatTensor<Self>,
            bias: FloatTensor<Self>,
            has_bias: bool,
            rule: RoutingRule,
        ) -> IntTensor<Self> = B::choose_experts_forward(scores, has_bias.then_some(bias), &rule);
        fn count_choices(
            choices: IntTensor<Self>,
            counted: IntTensor<Self>,
            has_counted: bool,
            groups: usize,
            sections: usize,
        ) -> IntTensor<Self> =
            B::count_choices_forward(choices, has_counted.then_some(counted), groups, sections);
        fn sort_choices(choices: IntTensor<Self>, counts: IntTensor<Self>) -> IntTensor<Self> =
            B::sort_choices_forward(choices, counts);
    }
}

/// The matrix product `rows x weight`.
///
/// # Shapes
///
/// - rows: `[rows, in]`
/// - weight: `[in, out]`, of the same dtype
/// - output: `[rows, out]`
///
/// # Panics
///
/// If shapes or dtypes do not match.
#[track_caller]
pub fn project(rows: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let check = Check("project");
    let ([_, input], [depth, output]) = (check.float("rows", &rows), check.float("weight", &weight));
    check.shape("weight", [depth, output], [input, output]);
    check.dtype("weight", weight.dtype(), rows.dtype());
    Tensor::from_dispatch(<Dispatch as ModelOps>::project(rows.into_dispatch(), weight.into_dispatch()))
}

/// The grouped product: the rows of each group times the matrix of the group. The matrix of a group without rows is not read.
///
/// # Shapes
///
/// - rows: `[rows, in]`, sorted by group as in `layout`
/// - weight: `[groups, in, out]`, of the same dtype
/// - output: `[rows, out]`
///
/// # Panics
///
/// If shapes or dtypes do not match.
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

/// The experts of each token, best first: see [`RoutingRule::choose`]. On a GPU it is not waited for.
///
/// # Shapes
///
/// - scores: f32 `[tokens, experts]`
/// - bias: f32 `[experts]`
/// - output: `[tokens, k]`
///
/// # Panics
///
/// If shapes or dtypes do not match.
#[track_caller]
pub(crate) fn choose_experts(scores: Tensor<2>, bias: Option<Tensor<1>>, rule: &RoutingRule) -> Tensor<2, Int> {
    let check = Check("choose_experts");
    let [tokens, experts] = check.float("scores", &scores);
    check.shape("scores", [tokens, experts], [tokens, rule.experts]);
    check.dtype("scores", scores.dtype(), DType::F32);
    if let Some(bias) = &bias {
        check.shape("bias", bias.dims(), [experts]);
        check.dtype("bias", bias.dtype(), DType::F32);
    }
    // Burn dispatches no `Option`: without a bias the scores take its place, and are not read as one.
    let (scores, has_bias) = (scores.into_dispatch(), bias.is_some());
    let bias = bias.map_or_else(|| scores.clone(), Tensor::into_dispatch);
    Tensor::from_dispatch(<Dispatch as ModelOps>::choose_experts(scores, bias, has_bias, rule.clone()))
}

/// How often each group was chosen, in each of `sections` equal parts of the tokens, first part first.
///
/// # Shapes
///
/// - choices: `[tokens, k]`, below `groups`
/// - counted: `[tokens]`; a token with 0 does not count
/// - output: `[sections, groups]`
///
/// # Panics
///
/// If shapes do not match, or `sections` does not divide the tokens.
#[track_caller]
pub(crate) fn count_choices(
    choices: Tensor<2, Int>,
    counted: Option<Tensor<1, Int>>,
    groups: usize,
    sections: usize,
) -> Tensor<2, Int> {
    let check = Check("count_choices");
    let [tokens, _] = choices.dims();
    check.rule(sections > 0 && tokens.is_multiple_of(sections), "the sections do not divide the tokens");
    if let Some(counted) = &counted {
        check.shape("counted", counted.dims(), [tokens]);
    }
    // As in `choose_experts`.
    let (choices, has_counted) = (choices.into_dispatch(), counted.is_some());
    let counted = counted.map_or_else(|| choices.clone(), Tensor::into_dispatch);
    Tensor::from_dispatch(<Dispatch as ModelOps>::count_choices(choices, counted, has_counted, groups, sections))
}

/// The buffer of a [`GroupLayout`] on the device of the choices, `[tokens, k]`, from the rows of each group, `[1, groups]`.
fn sort_choices(choices: Tensor<2, Int>, counts: Tensor<2, Int>) -> Tensor<1, Int> {
    Tensor::from_dispatch(<Dispatch as ModelOps>::sort_choices(choices.into_dispatch(), counts.into_dispatch()))
}

/// [`grouped_matmul`] by frozen quantized weights, `w = (value - zero) * scale`, in the order of [`moonlight_simd::quant`].
///
/// On the CPU rows are quantized to 8 bits in the blocks of the weights and multiplied in integers, as llama.cpp does; the error
/// of a row's value is at most 1/254 of the largest in its block. On other devices one group is dequantized at a time.
///
/// Only the rows have a gradient: that of the dequantized weights, as if rows had not been rounded. On CPUs with AVX512-BF16 its
/// operands are rounded to bf16.
///
/// # Shapes
///
/// - rows: `[rows, in]`, sorted by group as in `layout`
/// - values: u8 `[groups, bytes]`
/// - scales: f16 or bf16 `[groups, scales]`; f32 on devices without these types
/// - output: `[rows, out]`
///
/// # Panics
///
/// If shapes or dtypes do not match. On a GPU `values` may have any integer type.
#[track_caller]
pub fn quantized_matmul(
    rows: Tensor<2>,
    values: Tensor<2, Int>,
    scales: Tensor<2>,
    spec: QuantizedShape,
    layout: &Arc<GroupLayout>,
) -> Tensor<2> {
    let check = Check("quantized_matmul");
    check.quantized(spec);
    check.shape("rows", check.float("rows", &rows), [layout.rows(), spec.input]);
    check.shape("values", values.dims(), [layout.groups(), spec.value_bytes()]);
    check.shape("scales", check.float("scales", &scales), [layout.groups(), spec.scales()]);
    Tensor::from_dispatch(<Dispatch as ModelOps>::quantized_matmul(
        rows.into_dispatch(),
        values.into_dispatch(),
        scales.into_dispatch(),
        spec,
        layout.clone(),
    ))
}

/// Copies each token to one row of each expert that it is routed to.
///
/// # Shapes
///
/// - tokens: `[tokens, hidden]`
/// - output: `[tokens * k, hidden]`, sorted by expert
///
/// # Panics
///
/// If `layout` has another number of tokens.
#[track_caller]
pub fn dispatch_rows(tokens: Tensor<2>, layout: &Arc<GroupLayout>) -> Tensor<2> {
    let check = Check("dispatch_rows");
    let [count, width] = check.float("tokens", &tokens);
    check.shape("tokens", [count, width], [layout.tokens(), width]);
    Tensor::from_dispatch(<Dispatch as ModelOps>::dispatch_rows(tokens.into_dispatch(), layout.clone()))
}

/// The weighted sum of the rows of each token: `out[t] = sum_k weights[t, k] * rows[row of (t, k)]`. The sum is taken in f32 and
/// rounded once to the dtype of `rows`.
///
/// # Shapes
///
/// - rows: `[tokens * k, hidden]`, sorted by expert
/// - weights: f32 `[tokens, k]`
/// - output: `[tokens, hidden]`
///
/// # Panics
///
/// If shapes or dtypes do not match.
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

/// `silu(gate) * up`, elementwise (arXiv 2002.05202).
///
/// # Shapes
///
/// - gate, up, output: `[rows, width]`, of one dtype
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

/// `gain * x / sqrt(mean(x^2) + epsilon)` over the last dimension (RMSNorm, arXiv 1910.07467).
///
/// Statistics are in f32. The normalized value is rounded to the dtype of `x` *before* it is multiplied by the gain, as in
/// transformers.
///
/// # Shapes
///
/// - x, output: `[rows, width]`
/// - gain: `[width]`
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

/// Rotary embedding (RoPE, arXiv 2104.09864): rotates dimensions `start..` of each head by the angles of its position.
///
/// A pair `(a, b)` becomes `(a cos - b sin, b cos + a sin)` and stays in its place. transformers also permutes the dimensions of
/// queries and keys, which does not change their products.
///
/// # Shapes
///
/// - x, output: `[batch, sequence, heads, width]`
/// - cos, sin: f32 `[batch * sequence, (width - start) / 2]`
///
/// # Panics
///
/// If shapes or dtypes do not match, or `width - start` is not an even number above 0.
#[track_caller]
pub fn rotate(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>, spec: RotationSpec) -> Tensor<4> {
    let check = Check("rotate");
    let [batch, sequence, _, width] = check.float("x", &x);
    let is_paired = spec.start < width && (width - spec.start).is_multiple_of(2);
    check.rule(is_paired, "the rotated part of a head is not a number of pairs");
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

/// Causal multi-head latent attention (arXiv 2405.04434) with expanded keys and values. The key of a head is its own part
/// followed by the part that all heads share.
///
/// # Shapes
///
/// - query: `[batch, sequence, heads, nope + rope]`
/// - key_value: `[batch, sequence, heads, nope + value]`, keys first
/// - shared_key: `[batch, sequence, rope]`
/// - output: `[batch, sequence, heads, value]`; all of one dtype
///
/// # Panics
///
/// If shapes or dtypes do not match, or `spec.starts` breaks a rule of [`AttentionSpec`].
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
    check.rule(width - rope < pair, "`key_value` has no room for a value after the key");
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
/// # Shapes
///
/// - query: `[batch, sequence, heads, width]`
/// - key_value: `[batch, sequence, key heads, width + value]`, keys first; key heads divide heads
/// - output: `[batch, sequence, heads, value]`; all of one dtype
///
/// # Panics
///
/// If shapes or dtypes do not match, or `spec.starts` breaks a rule of [`AttentionSpec`].
#[track_caller]
pub fn grouped_attention(query: Tensor<4>, key_value: Tensor<4>, spec: AttentionSpec) -> Tensor<4> {
    let check = Check("grouped_attention");
    let [batch, sequence, heads, width] = check.float("query", &query);
    let [_, _, key_heads, pair] = check.float("key_value", &key_value);
    check.shape("key_value", key_value.dims(), [batch, sequence, key_heads, pair]);
    check.rule(heads.is_multiple_of(key_heads), "key heads do not divide heads");
    check.rule(width < pair, "`key_value` has no room for a value after the key");
    check.dtype("key_value", key_value.dtype(), query.dtype());
    check.document_starts(&spec, batch, sequence);
    Tensor::from_dispatch(<Dispatch as ModelOps>::grouped_attention(
        query.into_dispatch(),
        key_value.into_dispatch(),
        spec,
    ))
}

/// Causal attention of new tokens to a KV cache, to which their keys and values have been written. There is no gradient.
///
/// `spec` gives the columns of a cache row that are the key and the value, and the sequence of each token.
///
/// # Shapes
///
/// - query: `[tokens, heads, key width]`
/// - cache: `[batch, key heads, capacity, row]`, of the same dtype; key heads divide heads
/// - output: `[tokens, heads, value width]`
///
/// # Panics
///
/// If shapes or dtypes do not match, or `spec` breaks a rule of [`CachedAttentionSpec`]: keys and values within a row;
/// spans within the cache, in order, and for all tokens.
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

/// `-log softmax(logits)[target]` of each row, computed in f32.
///
/// A target outside `0..vocab` panics on the CPU. On a GPU, where checking would wait for the device, the loss of the row and
/// its gradients are NaN.
///
/// # Shapes
///
/// - logits: `[rows, vocab]`
/// - targets: `[rows]`
/// - output: f32 `[rows]`
///
/// # Panics
///
/// If shapes do not match; on the CPU, if a target is outside the vocabulary.
#[track_caller]
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let check = Check("cross_entropy");
    let [rows, _] = check.float("logits", &logits);
    check.shape("targets", targets.dims(), [rows]);
    Tensor::from_dispatch(<Dispatch as ModelOps>::cross_entropy(logits.into_dispatch(), targets.into_dispatch()))
}
