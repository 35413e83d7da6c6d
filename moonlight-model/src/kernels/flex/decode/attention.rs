//! Attention of new tokens to the cache, for both kinds of attention: heads that share a key head read its rows together.
//!
//! A chunk has a segment of the keys of one sequence and key head, and all queries that see them (flash-decoding). Its results are
//! relative to its largest scores, and are combined in the order of keys.

use std::ops::Range;

use burn::tensor::bf16;
use moonlight_simd::by_level;

use super::super::dtype::Element;
use super::super::math::exp;
use super::product::Rows;
use super::team::Team;
use crate::disjoint::DisjointMut;
use crate::kernels::CacheSpan;

/// Keys of a chunk, for a context of `keys`: of a short one every thread should have some. It must not depend on the number of threads,
/// with which rounding would change.
fn segment(keys: usize) -> usize {
    (keys / 8).next_multiple_of(32).clamp(32, 256)
}
/// The most queries whose scores are computed together.
const MAX_LANES: usize = 16;
/// Keys whose scores are computed at a time.
const BLOCK: usize = 64;

/// The cache of a layer, `[batch, key heads, capacity, row]`.
#[derive(Clone, Copy)]
pub(super) enum CacheView<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

/// Shapes of an attention.
#[derive(Debug, Clone)]
pub(super) struct AttentionShape {
    pub(super) heads: usize,
    pub(super) key_heads: usize,
    pub(super) capacity: usize,
    /// Values of a row of the cache.
    pub(super) row: usize,
    /// The part of a row that is the key.
    pub(super) keys: Range<usize>,
    /// The part of a row that is the value.
    pub(super) values: Range<usize>,
    pub(super) window: Option<usize>,
    pub(super) scale: f32,
}

impl AttentionShape {
    fn group(&self) -> usize {
        self.heads / self.key_heads
    }

    /// The positions that a token at `position` sees.
    fn visible(&self, position: usize) -> Range<usize> {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))..position + 1
    }

    /// Values of the partial result of a token, key head and segment: for each head the largest score, the sum of weights, and the
    /// weighted sum of values.
    fn partial(&self) -> usize {
        self.group() * (2 + self.values.len())
    }
}

/// A chunk.
struct Task {
    span: CacheSpan,
    /// The index of the first token of the span.
    token: usize,
    key_head: usize,
    keys: Range<usize>,
    /// Where its results are: one for each token of the span.
    place: usize,
}

/// Attends to the cache: queries `[tokens * heads, key width]` to `output`, `[heads * tokens, value width]`: all tokens of the first
/// head, then those of the second.
pub(super) fn attend(
    team: &mut Team,
    shape: &AttentionShape,
    spans: &[CacheSpan],
    queries: &Rows,
    cache: CacheView<'_>,
    output: &mut Rows,
) {
    let (mut tasks, mut token, mut size) = (Vec::new(), 0, 0);
    // Of each token the results of the first key head, and for how many segments; those of the other key heads follow.
    let mut places = Vec::new();
    for &span in spans {
        // A window moves with the token: the first token sees the earliest key, the last the latest.
        let (from, end) = (shape.visible(span.start).start, span.end());
        let segment = segment(end - from);
        let segments = (end - from).div_ceil(segment);
        for key_head in 0..shape.key_heads {
            for start in (from..end).step_by(segment) {
                tasks.push(Task { span, token, key_head, keys: start..end.min(start + segment), place: size });
                size += span.count * shape.partial();
            }
        }
        let first = size - shape.key_heads * segments * span.count * shape.partial();
        places.extend((0..span.count).map(|index| (first + index * shape.partial(), span.count, segments)));
        token += span.count;
    }
    let mut partials = vec![0.0; size];
    let target = DisjointMut::new(&mut partials);
    team.run(tasks.len(), &|index| {
        let task = &tasks[index];
        // SAFETY: each task has its own results.
        let out = unsafe { target.row(task.place..task.place + task.span.count * shape.partial()) };
        match cache {
            CacheView::F32(cache) => task.compute(shape, queries, cache, out),
            CacheView::Bf16(cache) => task.compute(shape, queries, cache, out),
        }
    });
    target.finish();

    let (tokens, group, width) = (token, shape.group(), shape.values.len());
    output.resize(shape.heads * tokens, width);
    let combine = |head: usize, token: usize, out: &mut [f32]| {
        let (key_head, within) = (head / group, head % group);
        let (first, count, segments) = places[token];
        let stride = count * shape.partial();
        let part = |segment: usize| &partials[first + (key_head * segments + segment) * stride..][..shape.partial()];
        let largest = (0..segments).map(|segment| part(segment)[within]).fold(f32::NEG_INFINITY, f32::max);
        let mut total = 0.0;
        for segment in 0..segments {
            let part = part(segment);
            let sum = part[group + within];
            if sum == 0.0 {
                continue; // the token sees none of these keys
            }
            let factor = exp(part[within] - largest);
            total += factor * sum;
            let weighted = &part[2 * group + within * width..][..width];
            out.iter_mut().zip(weighted).for_each(|(out, weighted)| *out += factor * weighted);
        }
        out.iter_mut().for_each(|out| *out /= total);
    };
    let target = DisjointMut::new(&mut output.values);
    let run = |head: usize| {
        for token in 0..tokens {
            let row = head * tokens + token;
            // SAFETY: each head and token has its own row.
            combine(head, token, unsafe { target.row(row * width..(row + 1) * width) });
        }
    };
    if partials.len() > 1 << 14 {
        team.run(shape.heads, &run)
    } else {
        (0..shape.heads).for_each(run)
    }
    target.finish();
}

impl Task {
    fn compute<E: Element>(&self, shape: &AttentionShape, queries: &Rows, cache: &[E], out: &mut [f32]) {
        let group = shape.group();
        // As many queries as a vector has values, or half: then the scores of one key are a vector.
        let lanes = if group <= 4 {
            4
        } else if group <= 8 {
            8
        } else {
            group.next_multiple_of(MAX_LANES)
        };
        let base = (self.span.sequence * shape.key_heads + self.key_head) * shape.capacity * shape.row;
        let cache = &cache[base..base + self.keys.end * shape.row];
        let width = shape.keys.len();
        let together = lanes.min(MAX_LANES);
        let mut transposed = vec![0.0; self.span.count * width * lanes]; // [tokens, lanes / together, key width, together]
        for index in 0..self.span.count {
            for head in 0..group {
                let query = queries.row((self.token + index) * shape.heads + self.key_head * group + head);
                let place = index * width * lanes + head / together * width * together + head % together;
                let transposed = transposed[place..].iter_mut().step_by(together);
                transposed.zip(query).for_each(|(place, value)| *place = shape.scale * value);
            }
        }
        out.fill(0.0);
        let mut largest = vec![f32::NEG_INFINITY; self.span.count * lanes];
        let mut sums = vec![0.0; self.span.count * lanes];
        let mut scores = vec![0.0; BLOCK * lanes];
        let mut factors = vec![0.0; lanes];
        for start in self.keys.clone().step_by(BLOCK) {
            let block = start..self.keys.end.min(start + BLOCK);
            for index in 0..self.span.count {
                let visible = shape.visible(self.span.start + index);
                let keys = block.start.max(visible.start)..block.end.min(visible.end);
                if keys.is_empty() {
                    continue;
                }
                let rows = &cache[keys.start * shape.row..keys.end * shape.row];
                let scores = &mut scores[..keys.len() * lanes];
                let query = &transposed[index * width * lanes..][..width * lanes];
                let largest = &mut largest[index * lanes..][..lanes];
                let sums = &mut sums[index * lanes..][..lanes];
                let state = [largest, sums, &mut factors[..]];
                let place = [shape.row, shape.keys.start];
                match lanes {
                    4 => weights_4(scores, state, query, rows, place),
                    8 => weights_8(scores, state, query, rows, place),
                    _ => weights_16(scores, state, query, rows, place),
                }
                let weighted = &mut out[index * shape.partial() + 2 * group..][..group * shape.values.len()];
                for (weighted, factor) in weighted.chunks_exact_mut(shape.values.len()).zip(&factors) {
                    if *factor != 1.0 {
                        weighted.iter_mut().for_each(|weighted| *weighted *= factor);
                    }
                }
                weigh(weighted, scores, lanes, rows, shape.row, shape.values.clone());
            }
        }
        for index in 0..self.span.count {
            let out = &mut out[index * shape.partial()..];
            out[..group].copy_from_slice(&largest[index * lanes..][..group]);
            out[group..2 * group].copy_from_slice(&sums[index * lanes..][..group]);
        }
    }
}

/// Defines a function that attends to some keys, for some number of lanes, some at a time. It writes the weights
/// `[keys, lanes]` of the queries `[lanes / LANES, key width, LANES]`, relative to the largest score so far, adds them to `sums`, and writes the
/// factors by which earlier results become relative to the new largest score. Cache rows are `row` values apart, and the key starts at
/// `first`.
macro_rules! weights {
    ($name:ident, $lanes:literal) => {
        by_level! {
            fn $name[E: Element](
                weights: &mut [f32],
                state: [&mut [f32]; 3],
                query: &[f32],
                cache: &[E],
                place: [usize; 2],
            ) {
                const LANES: usize = $lanes;
                let ([largest, sums, factors], [row, first]) = (state, place);
                /// Keys at a time, whose sums stay in registers.
                const KEYS: usize = 8;
                let keys = cache.len() / row;
                let lanes = weights.len() / keys;
                let width = query.len() / lanes;
                for (group, query) in (0..lanes).step_by(LANES).zip(query.chunks_exact(width * LANES)) {
                    let query = query.as_chunks::<LANES>().0;
                    let mut most = [0.0_f32; LANES];
                    most.copy_from_slice(&largest[group..group + LANES]);
                    let old = most;
                    for key in (0..keys).step_by(KEYS) {
                        let count = KEYS.min(keys - key);
                        // Beyond the last key it is computed again.
                        let lines: [&[E]; KEYS] =
                            std::array::from_fn(|index| &cache[(key + index.min(count - 1)) * row + first..][..width]);
                        let mut scores = [[0.0_f32; LANES]; KEYS];
                        // A plain loop over the width: with blocks of it, the compiler gathers single values, twenty times as slow.
                        for (place, query) in query.iter().enumerate() {
                            for (scores, line) in scores.iter_mut().zip(&lines) {
                                let value = line[place].wide();
                                for (score, query) in scores.iter_mut().zip(query) {
                                    *score += value * query;
                                }
                            }
                        }
                        for (index, scores) in scores.iter().enumerate().take(count) {
                            weights[(key + index) * lanes + group..][..LANES].copy_from_slice(scores);
                            for (most, &score) in most.iter_mut().zip(scores) {
                                *most = if score > *most { score } else { *most };
                            }
                        }
                    }
                    let mut total = [0.0_f32; LANES];
                    total.copy_from_slice(&sums[group..group + LANES]);
                    for lane in 0..LANES {
                        // Nothing was added yet if the largest score was minus infinity.
                        let factor = if old[lane] == most[lane] { 1.0 } else { exp(old[lane] - most[lane]) };
                        total[lane] *= factor;
                        factors[group + lane] = factor;
                    }
                    for weights in weights.chunks_exact_mut(lanes) {
                        let weights: &mut [f32; LANES] =
                            (&mut weights[group..group + LANES]).try_into().expect("the slice has this length");
                        for lane in 0..LANES {
                            weights[lane] = exp(weights[lane] - most[lane]);
                            total[lane] += weights[lane];
                        }
                    }
                    sums[group..group + LANES].copy_from_slice(&total);
                    largest[group..group + LANES].copy_from_slice(&most);
                }
            }
        }
    };
}

weights!(weights_4, 4);
weights!(weights_8, 8);
weights!(weights_16, 16);

by_level! {
    /// Adds to `out`, `[heads, value width]`, the values times their weights `[keys, lanes]`.
    fn weigh[E: Element](
        out: &mut [f32],
        weights: &[f32],
        lanes: usize,
        cache: &[E],
        row: usize,
        values: Range<usize>,
    ) {
        /// Heads and values at a time, whose sums stay in registers.
        const HEADS: usize = 4;
        const VALUES: usize = 64;
        let width = values.len();
        let heads = out.len() / width;
        let mut place = 0;
        while place + VALUES <= width {
            for head in (0..heads).step_by(HEADS) {
                let count = HEADS.min(heads - head);
                let mut sums = [[0.0_f32; VALUES]; HEADS];
                for (sums, out) in sums.iter_mut().zip(out[head * width..].chunks(width)).take(count) {
                    sums.copy_from_slice(&out[place..place + VALUES]);
                }
                for (line, weights) in cache.chunks_exact(row).zip(weights.chunks_exact(lanes)) {
                    let line: &[E; VALUES] =
                        line[values.start + place..][..VALUES].try_into().expect("the slice has this length");
                    // The lanes are a multiple of four.
                    let weights: &[f32; HEADS] =
                        weights[head..head + HEADS].try_into().expect("the slice has this length");
                    for (sums, weight) in sums.iter_mut().zip(weights) {
                        for (sum, value) in sums.iter_mut().zip(line) {
                            *sum += weight * value.wide();
                        }
                    }
                }
                for (sums, out) in sums.iter().zip(out[head * width..].chunks_mut(width)).take(count) {
                    out[place..place + VALUES].copy_from_slice(sums);
                }
            }
            place += VALUES;
        }
        if place < width {
            for (line, weights) in cache.chunks_exact(row).zip(weights.chunks_exact(lanes)) {
                let line = &line[values.start + place..values.end];
                for (out, weight) in out.chunks_exact_mut(width).zip(weights) {
                    for (out, value) in out[place..].iter_mut().zip(line) {
                        *out += weight * value.wide();
                    }
                }
            }
        }
    }
}
