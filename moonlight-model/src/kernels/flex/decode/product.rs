//! Products of few rows and the weights of a phase, divided into chunks.
//!
//! Their cost is reading the weights once from memory. A weight `[input, output]` in f32 or bf16 is divided by inputs, so that a chunk
//! is one stretch of memory, which is read faster than strips of outputs. Its chunks therefore compute partial sums, which are added in
//! order when they are read ([`Sums::read`]). A quantized weight is stored by tiles of outputs, and its chunks compute whole outputs.

use std::ops::Range;

use moonlight_simd::by_level;
use moonlight_simd::quant::{QuantizedRows, TILE};

use super::super::dtype::Element;
use super::team::Team;
use super::weights::View;
use crate::disjoint::DisjointMut;

/// Bytes of a chunk of a weight in f32 or bf16.
const PLAIN_BYTES: Range<usize> = 64 << 10..1 << 20;
/// Chunks of a phase of such weights, within [`PLAIN_BYTES`]. More would make more partial sums. Their number changes how results are
/// rounded, so it must not depend on the threads.
const PLAIN_CHUNKS: usize = 12;
/// Bytes of a chunk of a quantized weight.
const QUANTIZED_BYTES: Range<usize> = 16 << 10..256 << 10;
/// Chunks of a phase of quantized weights for each thread, within [`QUANTIZED_BYTES`]. They change no result.
const QUANTIZED_CHUNKS: usize = 4;
/// The most outputs of a chunk of such a weight. Narrower strips would keep sums in the L1 cache, but memory is read slower.
const MAX_COLUMNS: usize = 8192;

/// Rows of activations, in f32 and if a weight needs it in 8 bits.
#[derive(Debug, Default)]
pub(super) struct Rows {
    pub(super) width: usize,
    /// `[rows, width]`.
    pub(super) values: Vec<f32>,
    quantized: QuantizedRows,
}

impl Rows {
    /// Rows of `width` values.
    pub(super) fn new(values: Vec<f32>, width: usize) -> Self {
        Self { width, values, quantized: QuantizedRows::default() }
    }

    /// Zeros, `[rows, width]`.
    pub(super) fn resize(&mut self, rows: usize, width: usize) {
        self.width = width;
        self.values.clear();
        self.values.resize(rows * width, 0.0);
    }

    pub(super) fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..][..self.width]
    }

    pub(super) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.values[row * self.width..][..self.width]
    }

    /// Quantizes the rows for products by quantized weights.
    pub(super) fn quantize(&mut self) {
        self.quantized.set(&self.values, self.width);
    }
}

/// The product of some rows and one weight.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub(super) weight: View<'a>,
    /// Width of the weight's input and output.
    pub(super) shape: [usize; 2],
    pub(super) x: &'a Rows,
    /// Indices of rows of `x`.
    pub(super) rows: &'a [u32],
}

/// The results of the products of a phase, as partial sums.
#[derive(Debug, Default)]
pub(super) struct Sums {
    splits: Vec<Split>,
    values: Vec<f32>,
}

/// How one product is divided. A chunk has some inputs and some outputs, and its sums `[rows, outputs of the chunk]` are consecutive.
/// Chunks are ordered by inputs, then outputs.
#[derive(Debug, Clone, Copy)]
struct Split {
    /// The first of its values in [`Sums::values`].
    first: usize,
    first_chunk: usize,
    rows: usize,
    output: usize,
    /// Outputs of a chunk; fewer in the last.
    columns: usize,
    /// Inputs of a chunk; fewer in the last.
    depth: usize,
    /// Chunks that share outputs.
    parts: usize,
}

impl Split {
    fn blocks(&self) -> usize {
        self.output.div_ceil(self.columns)
    }

    /// The outputs of block `block` of a part.
    fn block(&self, block: usize) -> Range<usize> {
        block * self.columns..self.output.min((block + 1) * self.columns)
    }

    /// The place of the sums of a chunk.
    fn sums(&self, part: usize, block: usize) -> Range<usize> {
        let columns = self.block(block);
        let start = self.first + (part * self.output + columns.start) * self.rows;
        start..start + columns.len() * self.rows
    }
}

/// Divides `total` into equal steps of about `step`, each a multiple of `unit` but the last.
fn even_step(total: usize, step: usize, unit: usize) -> usize {
    let count = (total as f64 / step.max(1) as f64).round().max(1.0) as usize;
    total.div_ceil(count).next_multiple_of(unit)
}

/// Bytes of a chunk, for a phase that reads `bytes`.
fn chunk_bytes(bytes: usize, chunks: usize, limits: &Range<usize>) -> usize {
    (bytes / chunks).clamp(limits.start, limits.end)
}

/// Computes products. All weights of a phase should be given together.
pub(super) fn multiply(team: &mut Team, products: &[Product<'_>], sums: &mut Sums) {
    let bytes = products.iter().map(|product| product.weight.bytes(product.shape[0], product.shape[1])).sum();
    sums.splits.clear();
    let (mut values, mut chunks) = (0, 0);
    for product in products {
        let [input, output] = product.shape;
        let (columns, depth) = match product.weight {
            View::Quantized(_) => {
                let share = chunk_bytes(bytes, QUANTIZED_CHUNKS * rayon::current_num_threads(), &QUANTIZED_BYTES);
                (even_step(output, share * TILE / product.weight.bytes(input, TILE), TILE), input)
            }
            View::F32(_) | View::Bf16(_) => {
                let share = chunk_bytes(bytes, PLAIN_CHUNKS, &PLAIN_BYTES);
                let columns = even_step(output, MAX_COLUMNS.min(output), TILE);
                // If many chunks have the same inputs anyway, whole columns need no partial sums.
                let blocks = output.div_ceil(columns);
                let inputs = if blocks >= 2 * PLAIN_CHUNKS { input } else { share / product.weight.bytes(1, columns) };
                (columns, even_step(input, inputs.min(input), STREAMS))
            }
        };
        let split = Split {
            first: values,
            first_chunk: chunks,
            rows: product.rows.len(),
            output,
            columns,
            depth,
            parts: input.div_ceil(depth),
        };
        values += split.parts * output * split.rows;
        chunks += split.parts * split.blocks();
        sums.splits.push(split);
    }
    if sums.values.len() < values {
        sums.values.resize(values, 0.0);
    }
    let splits = &sums.splits;
    let target = DisjointMut::new(&mut sums.values[..values]);
    team.run(chunks, &|chunk| {
        let index = splits.partition_point(|split| split.first_chunk <= chunk) - 1;
        let (split, product) = (&splits[index], &products[index]);
        let (part, block) =
            ((chunk - split.first_chunk) / split.blocks(), (chunk - split.first_chunk) % split.blocks());
        // SAFETY: each chunk has its own sums.
        let sums = unsafe { target.row(split.sums(part, block)) };
        let depth = part * split.depth..product.shape[0].min((part + 1) * split.depth);
        product.compute(depth, split.block(block), sums);
    });
    target.finish();
}

impl Product<'_> {
    fn compute(&self, depth: Range<usize>, columns: Range<usize>, sums: &mut [f32]) {
        match self.weight {
            View::F32(weight) => self.compute_plain(weight, depth, columns, sums),
            View::Bf16(weight) => self.compute_plain(weight, depth, columns, sums),
            View::Quantized(matrix) => {
                let tiles = columns.start / TILE..columns.end.div_ceil(TILE);
                // Consecutive rows are computed together.
                let mut start = 0;
                for end in 1..=self.rows.len() {
                    if end == self.rows.len() || self.rows[end] != self.rows[end - 1] + 1 {
                        let range = self.rows[start] as usize..self.rows[end - 1] as usize + 1;
                        let out = &mut sums[start * columns.len()..end * columns.len()];
                        matrix.multiply(&self.x.quantized, range, tiles.clone(), out, columns.len());
                        start = end;
                    }
                }
            }
        }
    }

    fn compute_plain<E: Element>(&self, weight: &[E], depth: Range<usize>, columns: Range<usize>, sums: &mut [f32]) {
        let stride = self.shape[1];
        let lines = &weight[depth.start * stride + columns.start..(depth.end - 1) * stride + columns.end];
        let (rows, step) = (self.rows.len(), depth.len().div_ceil(STREAMS));
        let mut factors = vec![[0.0; STREAMS]; rows * step];
        for (index, &row) in self.rows.iter().enumerate() {
            for (stream, values) in self.x.row(row as usize)[depth.clone()].chunks(step).enumerate() {
                values.iter().enumerate().for_each(|(at, &value)| factors[at * rows + index][stream] = value);
            }
        }
        add_lines(sums, &factors, rows, lines, stride);
    }
}

impl Sums {
    /// Outputs `range` of one row of a product.
    pub(super) fn read(&self, product: usize, row: usize, range: Range<usize>, out: &mut [f32]) {
        out.fill(0.0);
        self.add(product, row, range, 1.0, out);
    }

    /// Adds `factor` times the outputs `range` of one row of a product to `out`.
    pub(super) fn add(&self, product: usize, row: usize, range: Range<usize>, factor: f32, out: &mut [f32]) {
        let split = &self.splits[product];
        assert!(range.end <= split.output && row < split.rows, "row and outputs must exist");
        let mut place = range.start;
        while place < range.end {
            let block = place / split.columns;
            let columns = split.block(block);
            let end = columns.end.min(range.end);
            let out = &mut out[place - range.start..end - range.start];
            for part in 0..split.parts {
                let sums = &self.values[split.sums(part, block)][row * columns.len()..][..columns.len()];
                add_scaled(out, factor, &sums[place - columns.start..end - columns.start]);
            }
            place = end;
        }
    }

    /// The number of values that are read for each output of a product.
    pub(super) fn parts(&self, product: usize) -> usize {
        self.splits[product].parts
    }
}

by_level! {
    fn add_scaled[](sums: &mut [f32], factor: f32, values: &[f32]) {
        sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += factor * value);
    }
}

/// Lines that are read together.
///
/// They are far apart: a processor that reads several stretches of memory does not wait at the end of each page, up to which it reads
/// ahead. On one machine (Zen 4, bf16) two threads read 52 GB a second in four stretches, and 38 in one, even when it was prefetched. Eight
/// are as fast, and their sums are read and written half as often.
const STREAMS: usize = 8;

by_level! {
    /// Writes to `sums`, `[rows, width]`, the sums of `lines`, each times its factor. Lines are `stride` values apart.
    ///
    /// `factors` is `[step, rows]` with the factors of the lines `at`, `at + step` and so on. Beyond the last line they are 0.
    fn add_lines[E: Element](sums: &mut [f32], factors: &[[f32; STREAMS]], rows: usize, lines: &[E], stride: usize) {
        /// Values that are computed together: 64 bytes of bf16.
        const LANES: usize = 32;
        let (width, step) = (sums.len() / rows, factors.len() / rows);
        let last = (lines.len() - width) / stride;
        sums.fill(0.0);
        for (at, factors) in factors.chunks_exact(rows).enumerate() {
            let line = |stream: usize| &lines[(at + stream * step).min(last) * stride..][..width];
            let streams = [line(0), line(1), line(2), line(3), line(4), line(5), line(6), line(7)];
            let [a, b, c, d, e, f, g, h] = streams.map(|line| line.as_chunks::<LANES>().0);
            for (sums, [p, q, r, s, t, u, v, w]) in sums.chunks_exact_mut(width).zip(factors) {
                let first = a.iter().zip(b).zip(c.iter().zip(d));
                let second = e.iter().zip(f).zip(g.iter().zip(h));
                for (sums, (((a, b), (c, d)), ((e, f), (g, h)))) in sums.as_chunks_mut::<LANES>().0.iter_mut().zip(first.zip(second)) {
                    for lane in 0..LANES {
                        let first = (p * a[lane].wide() + q * b[lane].wide()) + (r * c[lane].wide() + s * d[lane].wide());
                        let second = (t * e[lane].wide() + u * f[lane].wide()) + (v * g[lane].wide() + w * h[lane].wide());
                        sums[lane] += first + second;
                    }
                }
            }
            let whole = width / LANES * LANES;
            for (row, factors) in factors.iter().enumerate() {
                for column in whole..width {
                    for (line, factor) in streams.iter().zip(factors) {
                        sums[row * width + column] += factor * line[column].wide();
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::bf16;
    use proptest::prelude::*;

    use super::*;

    /// Values whose products and sums are exact.
    fn integers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|index| ((index * 7 + seed * 13 + index / 11) % 17) as f32 - 8.0).collect()
    }

    fn check(shapes: &[[usize; 2]], rows: usize) {
        let inputs: Vec<Rows> =
            shapes.iter().map(|&[input, _]| Rows::new(integers((rows + 1) * input, 3), input)).collect();
        let weights: Vec<Vec<f32>> = shapes.iter().map(|[input, output]| integers(input * output, 5)).collect();
        let half: Vec<Vec<bf16>> = weights.iter().map(|w| w.iter().map(|&w| bf16::from_f32(w)).collect()).collect();
        let list: Vec<u32> = (0..rows as u32).map(|row| row + 1).rev().collect();
        for is_half in [false, true] {
            let products: Vec<Product<'_>> = (0..shapes.len())
                .map(|index| Product {
                    weight: if is_half { View::Bf16(&half[index]) } else { View::F32(&weights[index]) },
                    shape: shapes[index],
                    x: &inputs[index],
                    rows: &list,
                })
                .collect();
            let mut sums = Sums::default();
            multiply(&mut Team::new(), &products, &mut sums);
            for (index, &[input, output]) in shapes.iter().enumerate() {
                for (place, &row) in list.iter().enumerate() {
                    let mut out = vec![f32::NAN; output];
                    sums.read(index, place, 0..output, &mut out);
                    for (column, out) in out.iter().enumerate() {
                        let x = inputs[index].row(row as usize);
                        let expected: f32 = (0..input).map(|k| x[k] * weights[index][k * output + column]).sum();
                        assert_eq!(*out, expected, "product {index}, row {row}, column {column}");
                    }
                    let middle = output / 3..output - output / 4;
                    let mut part = vec![1.0; middle.len()];
                    sums.add(index, place, middle.clone(), 2.0, &mut part);
                    assert!(part.iter().zip(&out[middle]).all(|(part, out)| *part == 1.0 + 2.0 * out));
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn products_are_those_of_plain_loops(
            shapes in prop::collection::vec([1_usize..90, 1_usize..200], 1..4),
            rows in 1_usize..9,
        ) {
            moonlight_simd::testing::at_each_level("decoding: products", |_| check(&shapes, rows));
        }
    }

    #[test]
    fn wide_and_deep_products_are_those_of_plain_loops() {
        // Several parts, several blocks, and more blocks than chunks are wanted.
        for (shape, rows) in [([700, 300], 1), ([33, 5000], 2), ([3, 2048 * 50 + 5], 1), ([700, 129], 5)] {
            check(&[shape], rows);
        }
    }
}
