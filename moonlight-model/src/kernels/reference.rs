//! The reference: each operation and its gradient, composed of Burn's tensor operations.
//!
//! It defines what the fast kernels must compute, and runs on every backend and dtype that has no kernel. Clarity comes before
//! speed here.

use std::ops::Range;

use burn::backend::tensor::{Device, FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata, read_sync};
use burn::tensor::{DType, FloatDType, IntDType, Shape, Slice, TensorData};

use super::{
    AttentionSpec, CacheSpan, CachedAttentionSpec, GroupLayout, QUANT_BLOCK, QUANT_TILE, QuantBits, QuantizedShape,
    RotationSpec, uniform_span,
};
use crate::moe::RoutingRule;

/// See [`super::project`].
pub(super) fn project_forward<B: Backend>(rows: FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
    B::float_matmul(rows, weight)
}

/// Gradient of [`super::project`] for the rows: `grad x weight^T`.
pub(super) fn project_rows_grad<B: Backend>(grad: FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
    B::float_matmul(grad, B::float_transpose(weight))
}

/// Gradient of [`super::project`] for the weight: `rows^T x grad`.
pub(super) fn project_weight_grad<B: Backend>(rows: FloatTensor<B>, grad: FloatTensor<B>) -> FloatTensor<B> {
    B::float_matmul(B::float_transpose(rows), grad)
}

/// See [`super::grouped_matmul`].
pub(super) fn grouped_matmul_forward<B: Backend>(
    rows: FloatTensor<B>,
    weight: FloatTensor<B>,
    layout: &GroupLayout,
) -> FloatTensor<B> {
    grouped_product::<B>(rows, weight, layout, false)
}

/// Gradient of [`super::grouped_matmul`] for the rows: `grad x weight^T`.
pub(super) fn grouped_matmul_rows_grad<B: Backend>(
    grad: FloatTensor<B>,
    weight: FloatTensor<B>,
    layout: &GroupLayout,
) -> FloatTensor<B> {
    grouped_product::<B>(grad, weight, layout, true)
}

/// Gradient of [`super::grouped_matmul`] for the weight: `rows^T x grad` of each group, zero for a group without rows.
pub(super) fn grouped_matmul_weight_grad<B: Backend>(
    rows: FloatTensor<B>,
    grad: FloatTensor<B>,
    layout: &GroupLayout,
) -> FloatTensor<B> {
    let (input, output) = (rows.shape()[1], grad.shape()[1]);
    let (device, dtype) = (rows.device(), FloatDType::from(rows.dtype()));
    let parts = (0..layout.groups())
        .map(|group| {
            let Range { start, end } = layout.group(group);
            let product = if start == end {
                B::float_zeros(Shape::new([input, output]), &device, dtype)
            } else {
                let rows = slice::<B>(rows.clone(), 0, start, end);
                B::float_matmul(B::float_transpose(rows), slice::<B>(grad.clone(), 0, start, end))
            };
            B::float_reshape(product, Shape::new([1, input, output]))
        })
        .collect();
    B::float_cat(parts, 0)
}

/// See [`super::quantized_matmul`].
pub(super) fn quantized_matmul_forward<B: Backend>(
    rows: FloatTensor<B>,
    values: IntTensor<B>,
    scales: FloatTensor<B>,
    spec: QuantizedShape,
    layout: &GroupLayout,
) -> FloatTensor<B> {
    let dtype = FloatDType::from(rows.dtype());
    matmul_by_group::<B>(rows, layout, |group| dequantized::<B>(values.clone(), scales.clone(), spec, group, dtype))
}

/// Gradient of [`super::quantized_matmul`] for the rows: `grad x weight^T`.
pub(super) fn quantized_matmul_rows_grad<B: Backend>(
    grad: FloatTensor<B>,
    values: IntTensor<B>,
    scales: FloatTensor<B>,
    spec: QuantizedShape,
    layout: &GroupLayout,
) -> FloatTensor<B> {
    let dtype = FloatDType::from(grad.dtype());
    matmul_by_group::<B>(grad, layout, |group| {
        B::float_transpose(dequantized::<B>(values.clone(), scales.clone(), spec, group, dtype))
    })
}

/// The matrix of one group, `[in, out]`; [`moonlight_simd::quant`] has the order of its values and scales.
fn dequantized<B: Backend>(
    values: IntTensor<B>,
    scales: FloatTensor<B>,
    spec: QuantizedShape,
    group: usize,
    dtype: FloatDType,
) -> FloatTensor<B> {
    let (tiles, blocks, bytes) = (spec.tiles(), spec.blocks(), spec.value_bytes());
    let values = B::int_slice(values, &[(group..group + 1).into(), (0..bytes).into()]);
    let quads = spec.bits.tile_bytes() / (4 * QUANT_TILE);
    let bytes =
        B::float_reshape(B::int_into_float(values, FloatDType::F32), Shape::new([tiles, blocks, quads, QUANT_TILE, 4]));
    let integers = match spec.bits {
        QuantBits::Eight => bytes,
        // Halves by division, because not every backend has bit operations on integers. In f32 this is exact: a byte is below 256.
        QuantBits::Four => {
            let high = B::float_floor(B::float_div_scalar(bytes.clone(), 16_f32.into()));
            let low = B::float_sub(bytes, B::float_mul_scalar(high.clone(), 16_f32.into()));
            B::float_cat(vec![low, high], 2)
        }
    };
    let integers = B::float_sub_scalar(integers, f32::from(spec.bits.zero()).into());
    let integers = B::float_permute(integers, &[1, 2, 4, 0, 3]); // [blocks, quads, 4, tiles, 16]
    let integers = B::float_reshape(integers, Shape::new([blocks, QUANT_BLOCK, tiles * QUANT_TILE]));
    let scales = B::float_cast(slice::<B>(scales, 0, group, group + 1), FloatDType::F32);
    let scales = B::float_permute(B::float_reshape(scales, Shape::new([tiles, blocks, QUANT_TILE])), &[1, 0, 2]);
    let scales = B::float_reshape(scales, Shape::new([blocks, 1, tiles * QUANT_TILE]));
    let weight = B::float_mul(integers, scales);
    let weight = B::float_reshape(weight, Shape::new([blocks * QUANT_BLOCK, tiles * QUANT_TILE]));
    let weight = slice::<B>(slice::<B>(weight, 0, 0, spec.input), 1, 0, spec.output);
    B::float_cast(weight, dtype)
}

/// See [`super::choose_experts`]. Chosen on the host, so this waits for the device.
pub(super) fn choose_experts_forward<B: Backend>(
    scores: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
    rule: &RoutingRule,
) -> IntTensor<B> {
    let (device, tokens) = (scores.device(), scores.shape()[0]);
    let to_host = |tensor| -> Vec<f32> {
        read_sync(B::float_into_data(tensor)).expect("the device answers").iter::<f32>().collect()
    };
    let choices = rule.choose(&to_host(scores), bias.map(to_host).as_deref());
    B::int_reshape(int_tensor::<B>(&choices, &device), Shape::new([tokens, rule.k]))
}

/// See [`super::count_choices`]. Counted on the host, so this waits for the device.
pub(super) fn count_choices_forward<B: Backend>(
    choices: IntTensor<B>,
    counted: Option<IntTensor<B>>,
    groups: usize,
    sections: usize,
) -> IntTensor<B> {
    let (device, [tokens, k]) = (choices.device(), choices.shape().dims());
    let choices = int_to_host::<B>(choices);
    let counted = counted.map(int_to_host::<B>);
    let mut counts = vec![0u32; sections * groups];
    for (token, choices) in choices.chunks_exact(k).enumerate() {
        if counted.as_ref().is_none_or(|counted| counted[token] != 0) {
            let section = token / (tokens / sections);
            choices.iter().for_each(|&group| counts[section * groups + group as usize] += 1);
        }
    }
    B::int_reshape(int_tensor::<B>(&counts, &device), Shape::new([sections, groups]))
}

/// The buffer of a [`GroupLayout`] on a device. Sorted on the host, so this waits for the device.
pub(super) fn sort_choices_forward<B: Backend>(choices: IntTensor<B>, counts: IntTensor<B>) -> IntTensor<B> {
    let (device, [_, k], [_, groups]) = (choices.device(), choices.shape().dims(), counts.shape().dims());
    let layout = GroupLayout::from_choices(&int_to_host::<B>(choices), k, groups);
    int_tensor::<B>(&layout.packed(), &device)
}

fn int_to_host<B: Backend>(tensor: IntTensor<B>) -> Vec<u32> {
    read_sync(B::int_into_data(tensor)).expect("the device answers").iter::<u32>().collect()
}

/// See [`super::dispatch_rows`].
pub(super) fn dispatch_rows_forward<B: Backend>(tokens: FloatTensor<B>, layout: &GroupLayout) -> FloatTensor<B> {
    let device = tokens.device();
    B::float_select(tokens, 0, int_tensor::<B>(layout.token_of_row(), &device))
}

/// Gradient of [`super::dispatch_rows`]: the sum of each token's rows.
pub(super) fn dispatch_rows_grad<B: Backend>(grad: FloatTensor<B>, layout: &GroupLayout) -> FloatTensor<B> {
    let dtype = FloatDType::from(grad.dtype());
    let slots = rows_by_slot::<B>(grad, layout); // [tokens, k, width]
    let [tokens, _, width] = slots.shape().dims();
    B::float_cast(B::float_reshape(B::float_sum_dim(slots, 1), Shape::new([tokens, width])), dtype)
}

/// See [`super::combine_rows`].
pub(super) fn combine_rows_forward<B: Backend>(
    rows: FloatTensor<B>,
    weights: FloatTensor<B>,
    layout: &GroupLayout,
) -> FloatTensor<B> {
    let dtype = FloatDType::from(rows.dtype());
    let slots = rows_by_slot::<B>(rows, layout); // [tokens, k, width]
    let [tokens, k, width] = slots.shape().dims();
    let weights = B::float_reshape(weights, Shape::new([tokens, k, 1]));
    let sum = B::float_sum_dim(B::float_mul(slots, weights), 1);
    B::float_cast(B::float_reshape(sum, Shape::new([tokens, width])), dtype)
}

/// Gradients of [`super::combine_rows`] for the rows and for the weights.
pub(super) fn combine_rows_grad<B: Backend>(
    rows: FloatTensor<B>,
    weights: FloatTensor<B>,
    grad: FloatTensor<B>,
    layout: &GroupLayout,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (device, dtype) = (rows.device(), FloatDType::from(rows.dtype()));
    let (count, k) = (layout.rows(), layout.k());
    let grad_of_row = B::float_select(to_f32::<B>(grad), 0, int_tensor::<B>(layout.token_of_row(), &device));
    let dots = B::float_sum_dim(B::float_mul(to_f32::<B>(rows), grad_of_row.clone()), 1); // [rows, 1]
    let grad_weights = B::float_select(dots, 0, int_tensor::<B>(layout.row_of_slot(), &device)); // by slot
    let mut slot_of_row = vec![0; count];
    for (slot, &row) in layout.row_of_slot().iter().enumerate() {
        slot_of_row[row as usize] = slot as u32;
    }
    let weights = B::float_reshape(weights, Shape::new([count, 1])); // by slot
    let weight_of_row = B::float_select(weights, 0, int_tensor::<B>(&slot_of_row, &device));
    (
        B::float_cast(B::float_mul(grad_of_row, weight_of_row), dtype),
        B::float_reshape(grad_weights, Shape::new([count / k, k])),
    )
}

/// See [`super::swiglu`].
pub(super) fn swiglu_forward<B: Backend>(gate: FloatTensor<B>, up: FloatTensor<B>) -> FloatTensor<B> {
    let silu = B::float_mul(gate.clone(), B::sigmoid(gate));
    B::float_mul(silu, up)
}

/// Gradients of [`super::swiglu`] for gate and up.
///
/// With `s = sigmoid(gate)`: `d up = g gate s`, `d gate = g up s (1 + gate (1 - s))`.
pub(super) fn swiglu_grad<B: Backend>(
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let sigmoid = B::sigmoid(gate.clone());
    let silu = B::float_mul(gate.clone(), sigmoid.clone());
    let grad_up = B::float_mul(grad.clone(), silu.clone());
    // s (1 + gate (1 - s)) = s + silu - silu s, which needs no constant tensor
    let slope = B::float_sub(B::float_add(sigmoid.clone(), silu.clone()), B::float_mul(silu, sigmoid));
    (B::float_mul(B::float_mul(grad, up), slope), grad_up)
}

/// See [`super::rms_norm`].
pub(super) fn rms_norm_forward<B: Backend>(x: FloatTensor<B>, gain: FloatTensor<B>, epsilon: f32) -> FloatTensor<B> {
    let dtype = FloatDType::from(x.dtype());
    let x = to_f32::<B>(x);
    let normalized = B::float_mul(x.clone(), inverse_rms::<B>(x, epsilon));
    let width = gain.shape()[0];
    let gain = B::float_reshape(gain, Shape::new([1, width]));
    // Rounded before the product with the gain, as in transformers.
    B::float_mul(B::float_cast(normalized, dtype), B::float_cast(gain, dtype))
}

/// Gradients of [`super::rms_norm`] for `x` and for the gain.
///
/// With `r = 1 / rms(x)` and `n = x r`: `d gain = sum_rows g n`, `d x = r (g gain - n mean(g gain n))`.
pub(super) fn rms_norm_grad<B: Backend>(
    x: FloatTensor<B>,
    gain: FloatTensor<B>,
    grad: FloatTensor<B>,
    epsilon: f32,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (x_dtype, gain_dtype) = (FloatDType::from(x.dtype()), FloatDType::from(gain.dtype()));
    let width = gain.shape()[0];
    let (x, grad) = (to_f32::<B>(x), to_f32::<B>(grad));
    let gain = B::float_reshape(to_f32::<B>(gain), Shape::new([1, width]));
    let inverse = inverse_rms::<B>(x.clone(), epsilon);
    let normalized = B::float_mul(x, inverse.clone());
    let grad_gain = B::float_sum_dim(B::float_mul(grad.clone(), normalized.clone()), 0);
    let grad_gain = B::float_reshape(grad_gain, Shape::new([width]));
    let scaled = B::float_mul(grad, gain);
    let mean = B::float_mean_dim(B::float_mul(scaled.clone(), normalized.clone()), 1);
    let grad_x = B::float_mul(B::float_sub(scaled, B::float_mul(normalized, mean)), inverse);
    (B::float_cast(grad_x, x_dtype), B::float_cast(grad_gain, gain_dtype))
}

/// See [`super::rotate`]. Its gradient is the rotation by the negative angles.
pub(super) fn rotate_forward<B: Backend>(
    x: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    spec: &RotationSpec,
) -> FloatTensor<B> {
    let dtype = FloatDType::from(x.dtype());
    let [batch, sequence, heads, width] = x.shape().dims();
    let pairs = (width - spec.start) / 2;
    // Cos and sin are rounded to the dtype of x before the products, as in transformers.
    let angle = |t| B::float_cast(B::float_reshape(t, Shape::new([batch, sequence, 1, pairs, 1])), dtype);
    let (cos, sin) = (angle(cos), angle(sin));
    let tail = slice::<B>(x.clone(), 3, spec.start, width);
    let (pair_shape, pair_dim) =
        if spec.interleave { ([batch, sequence, heads, pairs, 2], 4) } else { ([batch, sequence, heads, 2, pairs], 3) };
    let paired = B::float_reshape(tail, Shape::new(pair_shape));
    let member = |index| {
        let part = slice::<B>(paired.clone(), pair_dim, index, index + 1);
        B::float_reshape(part, Shape::new([batch, sequence, heads, pairs, 1]))
    };
    let (a, b) = (member(0), member(1)); // each [batch, sequence, heads, pairs, 1]
    let rotated_a = B::float_sub(B::float_mul(a.clone(), cos.clone()), B::float_mul(b.clone(), sin.clone()));
    let rotated_b = B::float_add(B::float_mul(b, cos), B::float_mul(a, sin));
    let rotated = if spec.interleave {
        B::float_cat(vec![rotated_a, rotated_b], 4)
    } else {
        let half = |t| B::float_reshape(t, Shape::new([batch, sequence, heads, 1, pairs]));
        B::float_cat(vec![half(rotated_a), half(rotated_b)], 3)
    };
    let rotated = B::float_reshape(rotated, Shape::new([batch, sequence, heads, 2 * pairs]));
    if spec.start == 0 { rotated } else { B::float_cat(vec![slice::<B>(x, 3, 0, spec.start), rotated], 3) }
}

/// See [`super::latent_attention`] and, without a shared key, [`super::grouped_attention`].
///
/// Returns the output, and for the gradient the logarithm of the softmax denominator of each query, `[batch, heads, sequence]`.
pub(super) fn attention_forward<B: Backend>(
    query: FloatTensor<B>,
    key_value: FloatTensor<B>,
    shared_key: Option<FloatTensor<B>>,
    spec: &AttentionSpec,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dtype = FloatDType::from(query.dtype());
    let heads = AttentionHeads::<B>::new(query, key_value, shared_key);
    let [batch, count, sequence, _] = heads.query.shape().dims();
    let scores = heads.scores(spec); // [batch, heads, queries, keys]
    let largest = B::float_max_dim(scores.clone(), 3); // finite: every query sees at least its own key
    let exponentials = B::float_exp(B::float_sub(scores, largest.clone()));
    let sum = B::float_sum_dim(exponentials.clone(), 3);
    let probabilities = B::float_cast(B::float_div(exponentials, sum.clone()), dtype);
    let output = B::float_matmul(probabilities, heads.value);
    let log_sum = B::float_add(largest, B::float_log(sum)); // [batch, heads, sequence, 1]
    (B::float_swap_dims(output, 1, 2), B::float_reshape(log_sum, Shape::new([batch, count, sequence])))
}

/// Gradients of attention for the query, for keys and values, and for the shared key.
///
/// With probabilities `P`, scores `S` and `D = sum(dO o O)` for each query: `dV = P^T dO`, `dS = P o (dO V^T - D)`,
/// `dQ = scale dS K`, `dK = scale dS^T Q` (FlashAttention-2, arXiv 2307.08691, section 2.2).
pub(super) fn attention_grad<B: Backend>(
    saved: AttentionSaved<B>,
    grad: FloatTensor<B>,
    spec: &AttentionSpec,
) -> (FloatTensor<B>, FloatTensor<B>, Option<FloatTensor<B>>) {
    let AttentionSaved { query, key_value, shared_key, output, log_sum } = saved;
    let dtype = FloatDType::from(query.dtype());
    let [batch, sequence, key_heads, pair] = key_value.shape().dims();
    let heads = AttentionHeads::<B>::new(query, key_value, shared_key);
    let [_, count, _, width] = heads.query.shape().dims();
    let own = heads.own_key_width;
    let log_sum = B::float_reshape(log_sum, Shape::new([batch, count, sequence, 1]));
    // Computed again: the forward pass saves a value for each query instead of one for each query and key.
    let probabilities = B::float_exp(B::float_sub(heads.scores(spec), log_sum));
    let grad = B::float_swap_dims(grad, 1, 2); // [batch, heads, sequence, value]
    let output = B::float_swap_dims(output, 1, 2);
    let delta = B::float_sum_dim(B::float_mul(to_f32::<B>(grad.clone()), to_f32::<B>(output)), 3);
    let grad_probabilities = to_f32::<B>(B::float_matmul(grad.clone(), B::float_transpose(heads.value)));
    let grad_scores = B::float_mul(probabilities.clone(), B::float_sub(grad_probabilities, delta));
    let grad_scores = B::float_cast(B::float_mul_scalar(grad_scores, spec.scale.into()), dtype);
    let probabilities = B::float_cast(probabilities, dtype);
    let grad_value = B::float_matmul(B::float_transpose(probabilities), grad);
    let grad_query = B::float_matmul(grad_scores.clone(), heads.key);
    let grad_key = B::float_matmul(B::float_transpose(grad_scores), heads.query);
    // The gradient of a key head sums over the heads of its group; the gradient of the shared key sums over all heads.
    let grad_key_value = B::float_cat(vec![slice::<B>(grad_key.clone(), 3, 0, own), grad_value], 3);
    let group = count / key_heads;
    let grad_key_value = B::float_reshape(grad_key_value, Shape::new([batch, key_heads, group, sequence, pair]));
    let grad_key_value =
        B::float_reshape(B::float_sum_dim(grad_key_value, 2), Shape::new([batch, key_heads, sequence, pair]));
    let grad_shared = (width > own).then(|| {
        let shared = B::float_sum_dim(slice::<B>(grad_key, 3, own, width), 1);
        B::float_reshape(shared, Shape::new([batch, sequence, width - own]))
    });
    (B::float_swap_dims(grad_query, 1, 2), B::float_swap_dims(grad_key_value, 1, 2), grad_shared)
}

/// See [`super::cached_attention`](fn@super::cached_attention).
pub(super) fn cached_attention_forward<B: Backend>(
    query: FloatTensor<B>,
    cache: FloatTensor<B>,
    spec: &CachedAttentionSpec,
) -> FloatTensor<B> {
    let batch = cache.shape()[0];
    if let Some(span) = uniform_span(&spec.spans, batch) {
        return attend_span::<B>(query, cache, span, spec);
    }
    let mut token = 0;
    let parts = spec.spans.iter().map(|span| {
        let query = slice::<B>(query.clone(), 0, token, token + span.count);
        token += span.count;
        attend_span::<B>(query, slice::<B>(cache.clone(), 0, span.sequence, span.sequence + 1), *span, spec)
    });
    let parts = parts.collect();
    B::float_cat(parts, 0)
}

/// [`cached_attention_forward`] for a `cache` in which `span` applies to every sequence.
fn attend_span<B: Backend>(
    query: FloatTensor<B>,
    cache: FloatTensor<B>,
    span: CacheSpan,
    spec: &CachedAttentionSpec,
) -> FloatTensor<B> {
    let dtype = FloatDType::from(query.dtype());
    let [tokens, heads, width] = query.shape().dims();
    let [batch, key_heads, _, _] = cache.shape().dims();
    let (count, group) = (span.count, heads / key_heads);
    let cache = slice::<B>(cache, 2, 0, span.end());
    let key = slice::<B>(cache.clone(), 3, spec.keys.start, spec.keys.end);
    let value = slice::<B>(cache, 3, spec.values.start, spec.values.end);
    // [batch, tokens, key heads, group, width] to [batch, key heads, tokens * group, width]
    let query = B::float_reshape(query, Shape::new([batch, count, key_heads, group * width]));
    let query = B::float_reshape(B::float_swap_dims(query, 1, 2), Shape::new([batch, key_heads, count * group, width]));
    let scores = to_f32::<B>(B::float_matmul(query, B::float_transpose(key))); // [batch, key heads, tokens * group, keys]
    let mut scores = B::float_mul_scalar(scores, spec.scale.into());
    // A single query without a window sees every key up to its own, so there is nothing to mask.
    if count > 1 || spec.first_key(span.start) > 0 {
        let mask: Vec<f32> = (0..count * group)
            .flat_map(|row| {
                let last = span.start + row / group;
                let seen = spec.first_key(last)..=last;
                (0..span.end()).map(move |key| if seen.contains(&key) { 0.0 } else { f32::NEG_INFINITY })
            })
            .collect();
        let mask = TensorData::new(mask, [1, 1, count * group, span.end()]);
        let mask = B::float_from_data(mask, &scores.device());
        let shape = scores.shape();
        scores = B::float_add(scores, B::float_expand(mask, shape));
    }
    let probabilities = B::float_cast(B::softmax(scores, 3), dtype);
    let output = B::float_matmul(probabilities, value); // [batch, key heads, tokens * group, value]
    let output = B::float_reshape(output, Shape::new([batch, key_heads, count, group * spec.values.len()]));
    B::float_reshape(B::float_swap_dims(output, 1, 2), Shape::new([tokens, heads, spec.values.len()]))
}

/// See [`super::cross_entropy`].
pub(super) fn cross_entropy_forward<B: Backend>(logits: FloatTensor<B>, targets: IntTensor<B>) -> FloatTensor<B> {
    let [rows, vocab] = logits.shape().dims();
    let log_probabilities = B::log_softmax(to_f32::<B>(logits), 1);
    let (targets, penalty) = clamp_targets::<B>(targets, vocab);
    let picked = B::float_gather(1, log_probabilities, B::int_reshape(targets, Shape::new([rows, 1])));
    B::float_sub(penalty, B::float_reshape(picked, Shape::new([rows])))
}

/// Gradient of [`super::cross_entropy`] for the logits: `g (softmax(logits) - onehot(target))`.
pub(super) fn cross_entropy_grad<B: Backend>(
    logits: FloatTensor<B>,
    targets: IntTensor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    let dtype = FloatDType::from(logits.dtype());
    let [rows, vocab] = logits.shape().dims();
    let (targets, penalty) = clamp_targets::<B>(targets, vocab);
    let grad = B::float_reshape(B::float_add(to_f32::<B>(grad), penalty), Shape::new([rows, 1]));
    let probabilities = B::float_mul(B::softmax(to_f32::<B>(logits), 1), grad.clone());
    let targets = B::int_reshape(targets, Shape::new([rows, 1]));
    let update = burn::tensor::IndexingUpdateOp::Add;
    B::float_cast(B::float_scatter(1, probabilities, targets, B::float_neg(grad), update), dtype)
}

/// Targets clamped to `0..vocab`, because a gather must stay in bounds, and a penalty, f32 `[rows]`: 0 for a target that was in
/// range, NaN for one that was not.
///
/// The NaN is computed as the root of a negative number, because not every shading language allows a NaN constant. Boolean masks
/// are avoided, because backends store them differently.
fn clamp_targets<B: Backend>(targets: IntTensor<B>, vocab: usize) -> (IntTensor<B>, FloatTensor<B>) {
    // Narrower types could not represent the bounds of the clamp.
    let is_wide = matches!(targets.dtype(), DType::I32 | DType::I64 | DType::U32 | DType::U64);
    let targets = if is_wide { targets } else { B::int_cast(targets, IntDType::I32) };
    let last = i32::try_from(vocab - 1).unwrap_or(i32::MAX);
    let inside = B::int_clamp(targets.clone(), 0.into(), last.into());
    let distance = B::int_into_float(B::int_sub(targets, inside.clone()), FloatDType::F32);
    (inside, B::float_sqrt(B::float_neg(B::float_abs(distance))))
}

/// What attention saves in the forward pass for its gradient.
#[derive(Debug, Clone)]
pub(crate) struct AttentionSaved<B: Backend> {
    pub(crate) query: FloatTensor<B>,
    pub(crate) key_value: FloatTensor<B>,
    pub(crate) shared_key: Option<FloatTensor<B>>,
    pub(crate) output: FloatTensor<B>,
    pub(crate) log_sum: FloatTensor<B>,
}

/// Query, complete key and value of every head, `[batch, heads, sequence, width]`.
struct AttentionHeads<B: Backend> {
    query: FloatTensor<B>,
    key: FloatTensor<B>,
    value: FloatTensor<B>,
    /// Width of the part of the key that belongs to the head; the rest is shared by all heads.
    own_key_width: usize,
}

impl<B: Backend> AttentionHeads<B> {
    fn new(query: FloatTensor<B>, key_value: FloatTensor<B>, shared_key: Option<FloatTensor<B>>) -> Self {
        let [batch, sequence, count, width] = query.shape().dims();
        let [_, _, key_heads, pair] = key_value.shape().dims();
        let shared_width = shared_key.as_ref().map_or(0, |shared| shared.shape()[2]);
        let own_key_width = width - shared_width;
        // Each query head gets a copy of its key head, which leaves ordinary multi-head attention.
        let repeated = B::float_expand(
            B::float_reshape(key_value, Shape::new([batch, sequence, key_heads, 1, pair])),
            Shape::new([batch, sequence, key_heads, count / key_heads, pair]),
        );
        let key_value =
            B::float_swap_dims(B::float_reshape(repeated, Shape::new([batch, sequence, count, pair])), 1, 2);
        let own_key = slice::<B>(key_value.clone(), 3, 0, own_key_width);
        let key = match shared_key {
            None => own_key,
            Some(shared) => {
                let shared = B::float_reshape(shared, Shape::new([batch, 1, sequence, shared_width]));
                let shared = B::float_expand(shared, Shape::new([batch, count, sequence, shared_width]));
                B::float_cat(vec![own_key, shared], 3)
            }
        };
        let value = slice::<B>(key_value, 3, own_key_width, pair);
        Self { query: B::float_swap_dims(query, 1, 2), key, value, own_key_width }
    }

    /// Scaled scores in f32, `-inf` where a query does not see a key.
    fn scores(&self, spec: &AttentionSpec) -> FloatTensor<B> {
        let product = B::float_matmul(self.query.clone(), B::float_transpose(self.key.clone()));
        let scores = B::float_mul_scalar(to_f32::<B>(product), spec.scale.into());
        let [batch, count, sequence, _] = scores.shape().dims();
        let causal_mask = causal_mask::<B>(batch, sequence, spec, &scores.device());
        B::float_add(scores, B::float_expand(causal_mask, Shape::new([batch, count, sequence, sequence])))
    }
}

/// `[batch, 1, sequence, sequence]`: `-inf` where query `i` does not see key `j`, because the key is after it or before its document;
/// 0 elsewhere. It is added to the scores instead of masking them by booleans, which backends store differently.
fn causal_mask<B: Backend>(batch: usize, sequence: usize, spec: &AttentionSpec, device: &Device<B>) -> FloatTensor<B> {
    let mut causal_mask = vec![0.0f32; batch * sequence * sequence];
    for (query, row) in causal_mask.chunks_mut(sequence).enumerate() {
        let start = spec.starts.as_ref().map_or(0, |starts| starts[query] as usize);
        for (key, value) in row.iter_mut().enumerate() {
            if key < start || key > query % sequence {
                *value = f32::NEG_INFINITY;
            }
        }
    }
    B::float_from_data(TensorData::new(causal_mask, [batch, 1, sequence, sequence]), device)
}

fn grouped_product<B: Backend>(
    rows: FloatTensor<B>,
    weight: FloatTensor<B>,
    layout: &GroupLayout,
    transpose: bool,
) -> FloatTensor<B> {
    let [_, input, output] = weight.shape().dims();
    matmul_by_group::<B>(rows, layout, |group| {
        let weight = slice::<B>(weight.clone(), 0, group, group + 1);
        let weight = B::float_reshape(weight, Shape::new([input, output]));
        if transpose { B::float_transpose(weight) } else { weight }
    })
}

/// Multiplies the rows of each group by the matrix `weight(group)`, which is not called for groups without rows.
fn matmul_by_group<B: Backend>(
    rows: FloatTensor<B>,
    layout: &GroupLayout,
    weight: impl Fn(usize) -> FloatTensor<B>,
) -> FloatTensor<B> {
    let parts = (0..layout.groups())
        .filter(|&group| !layout.group(group).is_empty())
        .map(|group| {
            let Range { start, end } = layout.group(group);
            B::float_matmul(slice::<B>(rows.clone(), 0, start, end), weight(group))
        })
        .collect();
    B::float_cat(parts, 0)
}

/// Rows reordered by slot, in f32: `[tokens, k, width]`.
fn rows_by_slot<B: Backend>(rows: FloatTensor<B>, layout: &GroupLayout) -> FloatTensor<B> {
    let (device, width) = (rows.device(), rows.shape()[1]);
    let slots = B::float_select(rows, 0, int_tensor::<B>(layout.row_of_slot(), &device));
    B::float_reshape(to_f32::<B>(slots), Shape::new([layout.tokens(), layout.k(), width]))
}

fn inverse_rms<B: Backend>(x: FloatTensor<B>, epsilon: f32) -> FloatTensor<B> {
    let square = B::float_mean_dim(B::float_mul(x.clone(), x), 1);
    B::float_recip(B::float_sqrt(B::float_add_scalar(square, epsilon.into())))
}

fn int_tensor<B: Backend>(values: &[u32], device: &Device<B>) -> IntTensor<B> {
    let values: Vec<i32> = values.iter().map(|&value| value as i32).collect();
    let count = values.len();
    B::int_from_data(TensorData::new(values, [count]), device)
}

fn slice<B: Backend>(tensor: FloatTensor<B>, dim: usize, start: usize, end: usize) -> FloatTensor<B> {
    let slices: Vec<Slice> = tensor
        .shape()
        .iter()
        .enumerate()
        .map(|(d, &size)| if d == dim { start..end } else { 0..size }.into())
        .collect();
    B::float_slice(tensor, &slices)
}

fn to_f32<B: Backend>(tensor: FloatTensor<B>) -> FloatTensor<B> {
    if tensor.dtype() == DType::F32 { tensor } else { B::float_cast(tensor, FloatDType::F32) }
}
