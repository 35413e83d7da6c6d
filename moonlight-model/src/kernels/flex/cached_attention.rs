//! Attention of new tokens to a KV cache, which is read in place.
//!
//! A task is a block of queries of one key head with all keys that they see. If there are few queries, it has a segment of those
//! keys, as in flash-decoding: in decoding a sequence has one query, so only its keys can be divided among threads. The partial
//! results of segments are combined in order (FlashAttention-2, arXiv 2307.08691), so the result does not depend on the number
//! of threads. Scores, softmax denominators and sums are in f32; in bf16 the weights of the values are rounded before they are
//! multiplied.

use std::ops::Range;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use rayon::prelude::*;

use super::dtype::Element;
use super::math::{exp_in_place, largest};
use super::matrix::{Matrix, MatrixMut, Write, multiply};
use super::tensor::{by_dtype, dims, tensor_of, values_of};
use crate::kernels::{CacheSpan, CachedAttentionKernel, CachedAttentionSpec, reference};

impl CachedAttentionKernel for Flex {
    fn cached_attention_forward(
        query: FloatTensor<Self>,
        cache: FloatTensor<Self>,
        spec: &CachedAttentionSpec,
    ) -> FloatTensor<Self> {
        by_dtype!(
            [query, cache],
            E => forward::<E>(&query, &cache, spec),
            reference::cached_attention_forward::<Self>(query, cache, spec)
        )
    }
}

/// Queries of a task.
const QUERY_BLOCK: usize = 64;
/// Keys whose scores are computed at a time, and keys of a segment.
const KEY_BLOCK: usize = 256;

/// Shapes and inputs of a cached attention.
struct CachedAttentionInputs<'a, E> {
    heads: usize,
    key_heads: usize,
    capacity: usize,
    /// Width of a cache row.
    row: usize,
    query: &'a [E], // [tokens, heads, key width]
    cache: &'a [E], // [batch, key heads, capacity, row]
    spec: &'a CachedAttentionSpec,
}

/// Some queries of one span and key head, with some of the keys that they see.
struct Task {
    span: CacheSpan,
    /// Index of the span's first token among all new tokens.
    token: usize,
    key_head: usize,
    /// Queries of the span, numbered by token and within a token by the heads that share the key head.
    rows: Range<usize>,
    /// Positions in the sequence.
    keys: Range<usize>,
    /// Whether the task has the same queries as the task before it, and the next keys.
    continues: bool,
}

/// An attention over some of the keys, not yet divided by the softmax denominator. Two of them can be combined.
struct PartialSoftmax {
    /// The largest score of each query.
    largest: Vec<f32>,
    /// The softmax denominator of each query, relative to its largest score.
    sum: Vec<f32>,
    /// `[queries, value]`: the sum of values weighted by exponentials, relative to the largest score.
    weighted: Vec<f32>,
}

/// See `reference::cached_attention_forward`.
fn forward<E: Element>(query: &FlexTensor, cache: &FlexTensor, spec: &CachedAttentionSpec) -> FlexTensor {
    let [tokens, heads, _] = dims(query);
    let [_, key_heads, capacity, row] = dims(cache);
    let inputs = CachedAttentionInputs {
        heads,
        key_heads,
        capacity,
        row,
        query: values_of::<E>(query),
        cache: values_of::<E>(cache),
        spec,
    };
    let width = spec.values.len();
    let tasks = inputs.tasks();
    // `with_max_len(1)` splits down to single tasks, so that threads share tasks of unequal length evenly.
    let partials: Vec<PartialSoftmax> = tasks.par_iter().with_max_len(1).map(|task| inputs.partial(task)).collect();

    let mut output = vec![0.0; tokens * heads * width]; // [tokens, heads, value]
    let mut parts = tasks.iter().zip(partials).peekable();
    while let Some((task, mut combined)) = parts.next() {
        // The segments of the same queries, in the order of their keys.
        while let Some((_, part)) = parts.next_if(|(next, _)| next.continues) {
            combined.add(part, width);
        }
        for (index, row) in task.rows.clone().enumerate() {
            let output = &mut output[inputs.query_row(task, row) * width..][..width];
            let weighted = &combined.weighted[index * width..][..width];
            output.iter_mut().zip(weighted).for_each(|(output, weighted)| *output = weighted / combined.sum[index]);
        }
    }
    tensor_of(E::rounded(output), [tokens, heads, width])
}

impl<E: Element> CachedAttentionInputs<'_, E> {
    /// All tasks, ordered by span, key head, queries and keys.
    fn tasks(&self) -> Vec<Task> {
        let mut tasks = Vec::new();
        let mut token = 0;
        for &span in self.spec.spans.iter() {
            let rows = span.count * self.group();
            for key_head in 0..self.key_heads {
                for first in (0..rows).step_by(QUERY_BLOCK) {
                    let block = first..rows.min(first + QUERY_BLOCK);
                    // A window moves with the query, so the first query sees the earliest key and the last the latest.
                    let from = self.visible(span, block.start).start;
                    let end = self.visible(span, block.end - 1).end;
                    // With many queries one segment has all keys: a step of `end` is at least as long as their range.
                    let segment = if rows <= QUERY_BLOCK { KEY_BLOCK } else { end };
                    tasks.extend((from..end).step_by(segment).map(|start| Task {
                        span,
                        token,
                        key_head,
                        rows: block.clone(),
                        keys: start..end.min(start + segment),
                        continues: start > from,
                    }));
                }
            }
            token += span.count;
        }
        tasks
    }

    /// The number of heads that share a key head.
    fn group(&self) -> usize {
        self.heads / self.key_heads
    }

    /// The positions of the keys that query `row` of a span sees.
    fn visible(&self, span: CacheSpan, row: usize) -> Range<usize> {
        let position = span.start + row / self.group();
        self.spec.first_key(position)..position + 1
    }

    /// The index of query `row` of a task in `[tokens * heads]`.
    fn query_row(&self, task: &Task, row: usize) -> usize {
        (task.token + row / self.group()) * self.heads + task.key_head * self.group() + row % self.group()
    }

    /// Computes a task, [`KEY_BLOCK`] keys at a time.
    fn partial(&self, task: &Task) -> PartialSoftmax {
        let CachedAttentionSpec { scale, keys, values, .. } = self.spec;
        let (rows, key_width, value_width) = (task.rows.len(), keys.len(), values.len());
        let queries: Vec<E> = task
            .rows
            .clone()
            .flat_map(|row| self.query[self.query_row(task, row) * key_width..][..key_width].iter().copied())
            .collect();
        let queries = Matrix::new(&queries, rows, key_width);
        let first = (task.span.sequence * self.key_heads + task.key_head) * self.capacity;
        let mut partial = PartialSoftmax {
            largest: vec![f32::NEG_INFINITY; rows],
            sum: vec![0.0; rows],
            weighted: vec![0.0; rows * value_width],
        };
        let (mut scratch, mut rounded) = (vec![0.0; rows * KEY_BLOCK.min(task.keys.len())], Vec::new());
        for start in task.keys.clone().step_by(KEY_BLOCK) {
            let count = KEY_BLOCK.min(task.keys.end - start);
            let cached = &self.cache[(first + start) * self.row..][..count * self.row];
            let scores = &mut scratch[..rows * count]; // [queries, keys]
            let view = Matrix::strided(&cached[keys.start..], count, key_width, self.row);
            multiply(
                &mut MatrixMut::strided(scores, rows, count, count),
                queries,
                view.transposed(),
                *scale,
                Write::Set,
            );
            for (index, scores) in scores.chunks_exact_mut(count).enumerate() {
                let visible = self.visible(task.span, task.rows.start + index);
                let last = visible.end.saturating_sub(start).min(count);
                let first = visible.start.saturating_sub(start).min(last);
                scores[..first].fill(0.0);
                scores[last..].fill(0.0);
                // A query may see none of these keys; its weights are then all 0.
                let seen = &mut scores[first..last];
                if seen.is_empty() {
                    continue;
                }
                partial.rescale(index, largest(seen).max(partial.largest[index]), value_width);
                partial.sum[index] += exp_in_place(seen, partial.largest[index]);
            }
            let view = Matrix::strided(&cached[values.start..], count, value_width, self.row);
            let mut out = MatrixMut::strided(&mut partial.weighted, rows, value_width, value_width);
            let weights = Matrix::new(E::operand(scores, &mut rounded), rows, count);
            multiply(&mut out, weights, view, 1.0, Write::Add);
        }
        partial
    }
}

impl PartialSoftmax {
    /// Makes the sums of a query relative to `largest`, if it exceeds the query's largest score so far.
    fn rescale(&mut self, index: usize, largest: f32, width: usize) {
        if largest > self.largest[index] {
            let factor = (self.largest[index] - largest).exp();
            self.sum[index] *= factor;
            self.weighted[index * width..][..width].iter_mut().for_each(|weighted| *weighted *= factor);
            self.largest[index] = largest;
        }
    }

    /// Adds the sums over the keys that follow.
    fn add(&mut self, other: Self, width: usize) {
        for index in 0..self.sum.len() {
            if other.sum[index] == 0.0 {
                continue; // a query that sees none of these keys
            }
            self.rescale(index, other.largest[index], width);
            let factor = (other.largest[index] - self.largest[index]).exp();
            self.sum[index] += factor * other.sum[index];
            let weighted = self.weighted[index * width..][..width].iter_mut();
            weighted.zip(&other.weighted[index * width..]).for_each(|(weighted, other)| *weighted += factor * other);
        }
    }
}
