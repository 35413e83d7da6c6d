//! A product of very few rows, as decoding has them: it costs the reading of the weights, and reads them once, in order.
//!
//! A task is a run of a matrix's rows, so that each thread reads memory straight on; the tasks' sums are added in order.

use std::ops::Range;

use burn::backend::flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::element::Element;
use super::tensor_of;

/// Rows up to which this is quicker than packing the weight for a matrix product.
const ROWS: usize = 8;
/// Rows of weight of one task.
const DEPTH: usize = 128;
/// Rows of weight that are taken together, which saves reading and writing the sums.
const TOGETHER: usize = 4;

/// Whether each group has few rows.
pub(super) fn suits(offsets: &[usize]) -> bool {
    offsets.windows(2).all(|bounds| bounds[1] - bounds[0] <= ROWS)
}

/// As `product::forward`, untransposed: `rows` is `[rows, input]`, `weight` a matrix `[input, output]` for each group.
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
            let depths = (0..input).step_by(DEPTH);
            depths.map(move |first| (group, bounds[0]..bounds[1], first..input.min(first + DEPTH)))
        })
        .collect();
    let sum = |(group, places, depth): (usize, Range<usize>, Range<usize>)| {
        let weight = &weight[(group * input + depth.start) * output..][..depth.len() * output];
        let mut sums = vec![0.0; places.len() * output];
        let mut row = [0.0; DEPTH];
        let rows: Vec<Vec<f32>> =
            places.clone().map(|place| E::row(&rows[place * input..][depth.clone()], &mut row).to_vec()).collect();
        add_product(&mut sums, &rows, weight, output);
        (places, sums)
    };
    let parts: Vec<_> = tasks.into_par_iter().with_max_len(1).map(sum).collect();
    let mut wide = vec![0.0; count * output];
    for (places, sums) in parts {
        let wide = &mut wide[places.start * output..places.end * output];
        wide.iter_mut().zip(sums).for_each(|(wide, sum)| *wide += sum);
    }
    tensor_of(E::rounded(wide), [count, output])
}

/// Adds the product of `rows` and the rows of `weight`, each `width` wide.
fn add_product<E: Element>(sums: &mut [f32], rows: &[Vec<f32>], weight: &[E], width: usize) {
    let mut scratch = vec![0.0; E::SCRATCH * TOGETHER * width];
    let lines = weight.chunks_exact(width).collect::<Vec<_>>();
    for (index, lines) in lines.chunks(TOGETHER).enumerate() {
        let mut parts = scratch.chunks_mut(width.max(1));
        let wide: Vec<&[f32]> = lines.iter().map(|line| E::row(line, parts.next().unwrap_or_default())).collect();
        for (sums, row) in sums.chunks_exact_mut(width).zip(rows) {
            let factors = &row[index * TOGETHER..][..lines.len()];
            match (wide.as_slice(), factors) {
                (&[a, b, c, d], &[p, q, r, s]) => add(sums, [p, q, r, s], [a, b, c, d]),
                _ => wide.iter().zip(factors).for_each(|(line, &factor)| {
                    add(sums, [factor, 0.0, 0.0, 0.0], [line, line, line, line]);
                }),
            }
        }
    }
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2", "aarch64+neon"))]
fn add(sums: &mut [f32], factors: [f32; TOGETHER], lines: [&[f32]; TOGETHER]) {
    let [a, b, c, d] = factors;
    let [line_a, line_b, line_c, line_d] = lines;
    let lines = line_a.iter().zip(line_b).zip(line_c).zip(line_d);
    for (sum, (((&p, &q), &r), &s)) in sums.iter_mut().zip(lines) {
        *sum += (a * p + b * q) + (c * r + d * s);
    }
}
