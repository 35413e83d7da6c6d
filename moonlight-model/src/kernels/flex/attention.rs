//! Causal attention by blocks of queries, without a `[sequence, sequence]` tensor in the forward or backward pass.
//!
//! For each block of queries, the scores against all keys that it sees are computed into a scratch block; the backward pass
//! computes them again from the logarithms of the softmax denominators. This is FlashAttention-2 (arXiv 2307.08691) without
//! tiling of keys, which is not needed because a block of scores fits into the cache.
//!
//! Scores, softmax and sums are in f32. The operands of products have the dtype of the inputs: in bf16 the probabilities, and in the
//! backward pass the gradients of the scores, are rounded before they are multiplied.
//!
//! A forward task is one query head of one sequence, a backward task one key head of one sequence: the gradients of a key
//! head are sums over its query heads, taken by one task in a fixed order.

use std::ops::Range;

use crate::disjoint::DisjointVec;
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, bf16};
use rayon::prelude::*;

use super::dtype::{Element, round_into};
use super::math::{dot, exp_in_place, largest};
use super::matrix::{Matrix, MatrixMut, Write, multiply, multiply_into};
use super::tensor::{by_dtype, dims, shared_dtype, tensor, tensor_of, values, values_of, zeros};
use crate::kernels::reference::{self, AttentionSaved};
use crate::kernels::{AttentionKernel, AttentionSpec};

impl AttentionKernel for Flex {
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
                forward::<E>(&query, &key_value, shared_key.as_ref(), spec)
            },
            reference::attention_forward::<Self>(query, key_value, shared_key, spec)
        )
    }

    fn attention_grad(
        saved: AttentionSaved<Self>,
        output_grad: FloatTensor<Self>,
        spec: &AttentionSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, Option<FloatTensor<Self>>) {
        match shared_dtype(&[saved.query.dtype(), saved.key_value.dtype(), output_grad.dtype()]) {
            Some(DType::F32) => grad::<f32>(saved, &output_grad.to_contiguous(), spec),
            Some(DType::BF16) => grad::<bf16>(saved, &output_grad.to_contiguous(), spec),
            _ => reference::attention_grad::<Self>(saved, output_grad, spec),
        }
    }
}

/// Queries of a block.
const QUERY_BLOCK: usize = 64;

/// Shapes and inputs of an attention.
struct AttentionInputs<'a, E> {
    batch: usize,
    sequence: usize,
    heads: usize,
    key_heads: usize,
    /// Width of a query and a complete key, `own + shared`.
    width: usize,
    /// Width of the part of a key that belongs to one key head.
    own: usize,
    /// Width of the part of a key that all heads share; 0 without a shared key.
    shared: usize,
    /// Width of a value.
    value: usize,
    query: &'a [E],      // [batch, sequence, heads, width]
    key_value: &'a [E],  // [batch, sequence, key heads, own + value]
    shared_key: &'a [E], // [batch, sequence, shared]
    spec: &'a AttentionSpec,
}

impl<'a, E: Element> AttentionInputs<'a, E> {
    fn new(
        query: &'a FlexTensor,
        key_value: &'a FlexTensor,
        shared_key: Option<&'a FlexTensor>,
        spec: &'a AttentionSpec,
    ) -> Self {
        let [batch, sequence, heads, width] = dims(query);
        let [_, _, key_heads, pair] = dims(key_value);
        let shared = shared_key.map_or(0, |shared| dims::<3>(shared)[2]);
        let own = width - shared;
        Self {
            batch,
            sequence,
            heads,
            key_heads,
            width,
            own,
            shared,
            value: pair - own,
            query: values_of(query),
            key_value: values_of(key_value),
            shared_key: shared_key.map_or(&[], values_of),
            spec,
        }
    }

    fn pair(&self) -> usize {
        self.own + self.value
    }

    /// The rows in `[batch * sequence, ..]` of some positions of a sequence.
    fn rows(&self, batch: usize, positions: &Range<usize>) -> Range<usize> {
        batch * self.sequence + positions.start..batch * self.sequence + positions.end
    }

    /// The first key that a query sees.
    fn start(&self, batch: usize, query: usize) -> usize {
        self.spec.starts.as_ref().map_or(0, |starts| starts[batch * self.sequence + query] as usize)
    }

    /// The rows `rows` of one query head in `tensor`, `[batch, sequence, heads, width]`.
    fn head<'b>(
        &self,
        tensor: &'b [E],
        (batch, head): (usize, usize),
        width: usize,
        rows: &Range<usize>,
    ) -> Matrix<'b, E> {
        let first = ((batch * self.sequence + rows.start) * self.heads + head) * width;
        Matrix::strided(&tensor[first..], rows.len(), width, self.heads * width)
    }

    /// The blocks of queries of a sequence, each with the range of keys that any of its queries sees.
    fn blocks(&self, batch: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + '_ {
        (0..self.sequence).step_by(QUERY_BLOCK).map(move |first| {
            let end = self.sequence.min(first + QUERY_BLOCK);
            // Starts never decrease along a sequence, so the first query of the block sees the earliest key.
            (first..end, self.start(batch, first)..end)
        })
    }
}

/// Keys and values of one key head of one sequence, copied to contiguous memory. In the inputs, heads alternate within each token; the
/// copy pays off because every block of queries reads the keys and values before it.
struct KeyHead<E> {
    sequence: usize,
    width: usize,
    value: usize,
    /// `[sequence, width]`: the head's own part, then the shared part.
    keys: Vec<E>,
    /// `[width, sequence]`: the right operand of `queries x keys^T`.
    transposed_keys: Vec<E>,
    /// `[sequence, value]`.
    values: Vec<E>,
}

impl<E: Element> KeyHead<E> {
    fn new(inputs: &AttentionInputs<'_, E>, batch: usize, key_head: usize) -> Self {
        let AttentionInputs { sequence, key_heads, own, shared, width, value, .. } = *inputs;
        let (mut keys, mut values) = (Vec::with_capacity(sequence * width), Vec::with_capacity(sequence * value));
        for position in batch * sequence..(batch + 1) * sequence {
            let pair = &inputs.key_value[(position * key_heads + key_head) * inputs.pair()..][..inputs.pair()];
            let shared_key = &inputs.shared_key[position * shared..][..shared];
            keys.extend_from_slice(&pair[..own]);
            keys.extend_from_slice(shared_key);
            values.extend_from_slice(&pair[own..]);
        }
        let transposed_keys = transposed(&keys, sequence, width);
        Self { sequence, width, value, keys, transposed_keys, values }
    }

    fn keys(&self, range: &Range<usize>) -> Matrix<'_, E> {
        Matrix::new(&self.keys[range.start * self.width..][..range.len() * self.width], range.len(), self.width)
    }

    /// `[width, range]`.
    fn transposed_keys(&self, range: &Range<usize>) -> Matrix<'_, E> {
        Matrix::strided(&self.transposed_keys[range.start..], self.width, range.len(), self.sequence)
    }

    fn values(&self, range: &Range<usize>) -> Matrix<'_, E> {
        Matrix::new(&self.values[range.start * self.value..][..range.len() * self.value], range.len(), self.value)
    }
}

/// `[rows, columns]` to `[columns, rows]`.
fn transposed<E: Element>(values: &[E], rows: usize, columns: usize) -> Vec<E> {
    /// Rows and columns of a tile, so that the cache lines of both sides stay in the cache.
    const TILE: usize = 16;
    let mut out = zeros::<E>(rows * columns);
    for first in (0..rows).step_by(TILE) {
        for second in (0..columns).step_by(TILE) {
            for column in second..columns.min(second + TILE) {
                for row in first..rows.min(first + TILE) {
                    out[column * rows + row] = values[row * columns + column];
                }
            }
        }
    }
    out
}

fn forward<E: Element>(
    query: &FlexTensor,
    key_value: &FlexTensor,
    shared_key: Option<&FlexTensor>,
    spec: &AttentionSpec,
) -> (FlexTensor, FlexTensor) {
    let inputs = AttentionInputs::<E>::new(query, key_value, shared_key, spec);
    let AttentionInputs { batch, sequence, heads, width, value, .. } = inputs;
    let output = DisjointVec::<E>::new(batch * sequence * heads * value); // [batch, sequence, heads, value]
    let mut log_sums = vec![0.0; batch * heads * sequence]; // [batch, heads, sequence]
    // A task for each query head, made from the rows of `log_sums` so that each task owns the row that it writes.
    log_sums.par_chunks_mut(sequence).enumerate().for_each(|(task, log_sums)| {
        let (batch, head) = (task / heads, task % heads);
        let key_head = head / (heads / inputs.key_heads);
        let head_kv = KeyHead::new(&inputs, batch, key_head);
        let mut scratch = vec![0.0; QUERY_BLOCK.min(sequence) * sequence];
        let mut rounded = Vec::new();
        for (rows, keys) in inputs.blocks(batch) {
            let scores = &mut scratch[..rows.len() * keys.len()]; // [rows, keys]
            let mut out = MatrixMut::strided(scores, rows.len(), keys.len(), keys.len());
            let queries = inputs.head(inputs.query, (batch, head), width, &rows);
            multiply(&mut out, queries, head_kv.transposed_keys(&keys), spec.scale, Write::Set);
            for (row, scores) in rows.clone().zip(scores.chunks_exact_mut(keys.len())) {
                log_sums[row] = softmax(scores, inputs.start(batch, row) - keys.start, row - keys.start);
            }
            // SAFETY: a task writes the columns of one head in the rows of one sequence, and `blocks` yields each row once.
            let target = unsafe { output.block(heads * value, inputs.rows(batch, &rows), head_columns(head, value)) };
            let probabilities = E::operand(scores, &mut rounded);
            multiply_into(target, Matrix::new(probabilities, rows.len(), keys.len()), head_kv.values(&keys));
        }
    });
    // SAFETY: `multiply_into` wrote all of each block.
    let output = unsafe { output.finish() };
    (tensor_of(output, [batch, sequence, heads, value]), tensor(log_sums, [batch, heads, sequence]))
}

/// The columns of head `head` in rows of concatenated heads.
fn head_columns(head: usize, width: usize) -> Range<usize> {
    head * width..(head + 1) * width
}

/// Replaces the scores `first..=last` of a query by probabilities and all others by zero; returns the logarithm of the softmax
/// denominator.
fn softmax(scores: &mut [f32], first: usize, last: usize) -> f32 {
    scores[..first].fill(0.0);
    scores[last + 1..].fill(0.0);
    let seen = &mut scores[first..=last];
    let offset = largest(seen);
    let sum = exp_in_place(seen, offset);
    let inverse = 1.0 / sum;
    for value in seen.iter_mut() {
        *value *= inverse;
    }
    offset + sum.ln()
}

fn grad<E: Element>(
    saved: AttentionSaved<Flex>,
    grad: &FlexTensor,
    spec: &AttentionSpec,
) -> (FlexTensor, FlexTensor, Option<FlexTensor>) {
    let query = saved.query.to_contiguous();
    let key_value = saved.key_value.to_contiguous();
    let shared_key = saved.shared_key.map(|shared| shared.to_contiguous());
    let inputs = AttentionInputs::<E>::new(&query, &key_value, shared_key.as_ref(), spec);
    let AttentionInputs { batch, sequence, heads, key_heads, width, own, shared, value, .. } = inputs;
    let output = saved.output.to_contiguous();
    let (output, log_sums, grad) = (values_of::<E>(&output), values(&saved.log_sum), values_of::<E>(grad));

    let grad_query = DisjointVec::<E>::new(batch * sequence * heads * width); // [batch, sequence, heads, width]
    let grad_key_value = DisjointVec::<E>::new(batch * sequence * key_heads * (own + value)); // [.., key heads, own + value]
    // All key heads contribute to the gradient of the shared key. Each writes a separate part, and the parts are summed below in
    // the order of heads, so that the result does not depend on which task ends first.
    let grad_shared = DisjointVec::<f32>::new(batch * key_heads * sequence * shared); // [batch, key heads, sequence, shared]
    let pair = own + value;
    (0..batch * key_heads).into_par_iter().for_each(|task| {
        let (batch, key_head) = (task / key_heads, task % key_heads);
        let head_kv = KeyHead::new(&inputs, batch, key_head);
        let transposed_values = transposed(&head_kv.values, sequence, value);
        let mut probabilities = vec![0.0; QUERY_BLOCK.min(sequence) * sequence];
        let mut grad_scores = vec![0.0; QUERY_BLOCK.min(sequence) * sequence];
        // In f32 until the end: a bf16 sum over blocks and heads would be rounded at every addition.
        let mut grad_keys = vec![0.0; sequence * width];
        let mut grad_values = vec![0.0; sequence * value];
        let (mut rounded_probabilities, mut rounded_scores) = (Vec::new(), Vec::new());
        let group = heads / key_heads;
        for head in key_head * group..(key_head + 1) * group {
            for (rows, keys) in inputs.blocks(batch) {
                let (height, count) = (rows.len(), keys.len()); // the blocks below are [height, count]
                let probabilities = &mut probabilities[..height * count];
                let grad_scores = &mut grad_scores[..height * count];
                let queries = inputs.head(inputs.query, (batch, head), width, &rows);
                let mut out = MatrixMut::strided(probabilities, height, count, count);
                multiply(&mut out, queries, head_kv.transposed_keys(&keys), spec.scale, Write::Set);
                let grad_matrix = inputs.head(grad, (batch, head), value, &rows);
                let mut out = MatrixMut::strided(grad_scores, height, count, count);
                let seen = Matrix::strided(&transposed_values[keys.start..], value, count, sequence);
                multiply(&mut out, grad_matrix, seen, 1.0, Write::Set);
                for (index, row) in rows.clone().enumerate() {
                    let (first, last) = (inputs.start(batch, row) - keys.start, row - keys.start);
                    let token = ((batch * sequence + row) * heads + head) * value;
                    let delta = dot(&grad[token..token + value], &output[token..token + value]);
                    let probabilities = &mut probabilities[index * count..][..count];
                    let grad_scores = &mut grad_scores[index * count..][..count];
                    probabilities[..first].fill(0.0);
                    probabilities[last + 1..].fill(0.0);
                    // exp(score - log of the denominator) is the probability, without a division.
                    exp_in_place(&mut probabilities[first..=last], log_sums[(batch * heads + head) * sequence + row]);
                    // dS = P o (dO V^T - D), see `reference::attention_grad`.
                    for (grad_score, &probability) in grad_scores.iter_mut().zip(probabilities.iter()) {
                        *grad_score = probability * (*grad_score - delta) * spec.scale;
                    }
                }
                let probabilities = Matrix::new(E::operand(probabilities, &mut rounded_probabilities), height, count);
                let grad_scores = Matrix::new(E::operand(grad_scores, &mut rounded_scores), height, count);
                let rows = inputs.rows(batch, &rows);
                // SAFETY: a task writes the columns of its heads in the rows of its sequence, and `blocks` yields each row once
                // for a head.
                let target = unsafe { grad_query.block(heads * width, rows, head_columns(head, width)) };
                multiply_into(target, grad_scores, head_kv.keys(&keys));
                let mut out = MatrixMut::strided(&mut grad_keys[keys.start * width..], count, width, width);
                multiply(&mut out, grad_scores.transposed(), queries, 1.0, Write::Add);
                let mut out = MatrixMut::strided(&mut grad_values[keys.start * value..], count, value, value);
                multiply(&mut out, probabilities.transposed(), grad_matrix, 1.0, Write::Add);
            }
        }
        // SAFETY: a task claims the columns of its key head in the rows of its sequence, and one part of the shared key's gradient.
        let (mut pairs, parts) = unsafe {
            let rows = inputs.rows(batch, &(0..sequence));
            let part = head_columns(batch * key_heads + key_head, sequence * shared);
            (grad_key_value.block(key_heads * pair, rows, head_columns(key_head, pair)), grad_shared.row(part))
        };
        for position in 0..sequence {
            let (key, value_grad) =
                (&grad_keys[position * width..][..width], &grad_values[position * value..][..value]);
            let (key_place, value_place) = pairs.row(position).split_at_mut(own);
            round_into(&key[..own], key_place);
            round_into(value_grad, value_place);
            parts[position * shared..][..shared].write_copy_of_slice(&key[own..]);
        }
    });
    // SAFETY: `multiply_into` wrote all of each block of the query gradient. The loop over positions wrote key and value of each row of
    // the block, and each row of the part, by functions that assert equal lengths.
    let (grad_query, grad_key_value, grad_shared) =
        unsafe { (grad_query.finish(), grad_key_value.finish(), grad_shared.finish()) };
    let grad_shared = (shared > 0)
        .then(|| tensor_of(E::rounded(sum_heads(&grad_shared, batch, key_heads)), [batch, sequence, shared]));
    (
        tensor_of(grad_query, [batch, sequence, heads, width]),
        tensor_of(grad_key_value, [batch, sequence, key_heads, pair]),
        grad_shared,
    )
}

/// Sums `[batch, heads, rest]` over heads, in their order.
fn sum_heads(parts: &[f32], batch: usize, heads: usize) -> Vec<f32> {
    let rest = parts.len() / (batch * heads);
    let mut sums = vec![0.0; batch * rest];
    for (sum, parts) in sums.chunks_exact_mut(rest).zip(parts.chunks_exact(heads * rest)) {
        for part in parts.chunks_exact(rest) {
            for (sum, &value) in sum.iter_mut().zip(part) {
                *sum += value;
            }
        }
    }
    sums
}
