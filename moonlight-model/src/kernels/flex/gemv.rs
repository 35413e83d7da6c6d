//! Matrix products with few rows (GEMV and skinny GEMM), as in decoding. Their cost is reading the weights, so the weights are
//! read once, in the order of memory.
//!
//! A task is a range of rows of one weight matrix and computes a partial sum over them. The partial sums are added in the
//! order of tasks, so that the result does not depend on the number of threads.

use std::ops::Range;

use burn::backend::flex::FlexTensor;
use moonlight_simd::{bf16_gemm, by_level};
use rayon::prelude::*;

use super::dtype::Element;
use super::tensor::tensor_of;

/// Up to this number of rows, reading the weight once is faster than packing it for a matrix product.
const MAX_ROWS: usize = bf16_gemm::MAX_FEW_ROWS;
/// Rows of the weight in a task.
const DEPTH_PER_TASK: usize = 128;
/// Rows of a wide weight that are added to the sums together, which reads and writes the sums a quarter as often.
const UNROLL: usize = 4;
/// Up to this width the sums stay in the L1 cache, and rows are added one at a time: one stream of memory is then read twice as fast
/// as four.
const MAX_NARROW_WIDTH: usize = 2048;

/// Whether every group has few rows.
pub(super) fn applies(offsets: &[usize]) -> bool {
    offsets.windows(2).all(|bounds| bounds[1] - bounds[0] <= MAX_ROWS)
}

/// `grouped_gemm::forward` without transposition: `rows` is `[rows, input]`, `weight` `[groups, input, output]`.
pub(super) fn forward<E: Element>(
    rows: &[E],
    weight: &[E],
    offsets: &[usize],
    (input, output): (usize, usize),
) -> FlexTensor {
    let count = rows.len() / input;
    let tasks: Vec<_> = offsets
        .windows(2)
        .enumerate()
        .filter(|(_, bounds)| bounds[0] < bounds[1])
        .flat_map(|(group, bounds)| {
            let depths = (0..input).step_by(DEPTH_PER_TASK);
            depths.map(move |first| (group, bounds[0]..bounds[1], first..input.min(first + DEPTH_PER_TASK)))
        })
        .collect();
    let sum = |(group, range, depth): (usize, Range<usize>, Range<usize>)| {
        let weight = &weight[(group * input + depth.start) * output..][..depth.len() * output];
        let mut sums = vec![0.0; range.len() * output]; // [rows of the group, output]
        let rows: Vec<&[E]> = range.clone().map(|row| &rows[row * input..][depth.clone()]).collect();
        E::add_product(&mut sums, &rows, weight, output);
        (range, sums)
    };
    let parts: Vec<_> = tasks.into_par_iter().with_max_len(1).map(sum).collect();
    let mut wide = vec![0.0; count * output]; // [rows, output]
    // In the order of tasks, whichever thread computed them.
    for (range, sums) in parts {
        let wide = &mut wide[range.start * output..range.end * output];
        wide.iter_mut().zip(sums).for_each(|(wide, sum)| *wide += sum);
    }
    tensor_of(E::rounded(wide), [count, output])
}

/// Adds to `sums`, `[rows, width]`, the product of `rows` and `weight`, whose rows have `width` columns. bf16 is widened where it is
/// read.
pub(super) fn add_product<E: Element>(sums: &mut [f32], rows: &[&[E]], weight: &[E], width: usize) {
    let unroll = if width <= MAX_NARROW_WIDTH { 1 } else { UNROLL };
    for (index, lines) in weight.chunks(unroll * width).enumerate() {
        for (sums, row) in sums.chunks_exact_mut(width).zip(rows) {
            let factors = &row[index * unroll..];
            match factors {
                &[a, b, c, d, ..] if lines.len() == UNROLL * width => add_four(sums, [a, b, c, d], lines),
                _ => lines.chunks_exact(width).zip(factors).for_each(|(line, &factor)| add(sums, factor, line)),
            }
        }
    }
}

by_level! {
    fn add[E: Element](sums: &mut [f32], factor: E, line: &[E]) {
        let factor = factor.wide();
        sums.iter_mut().zip(line).for_each(|(sum, value)| *sum += factor * value.wide());
    }
}

by_level! {
    fn add_four[E: Element](sums: &mut [f32], factors: [E; UNROLL], lines: &[E]) {
        let [a, b, c, d] = factors.map(E::wide);
        let (first, second) = lines.split_at(2 * sums.len());
        let ((line_a, line_b), (line_c, line_d)) = (first.split_at(sums.len()), second.split_at(sums.len()));
        let lines = line_a.iter().zip(line_b).zip(line_c).zip(line_d);
        for (sum, (((p, q), r), s)) in sums.iter_mut().zip(lines) {
            // The parentheses fix the order of additions, so every level of vector instructions gives the same bits.
            *sum += (a * p.wide() + b * q.wide()) + (c * r.wide() + d * s.wide());
        }
    }
}
