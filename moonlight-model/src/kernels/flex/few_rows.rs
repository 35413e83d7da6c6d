//! A product of very few rows, as decoding has them: it costs the reading of the weight, and reads it once, in order.

use multiversion::multiversion;

use super::element::Element;
use super::matrix::MatrixMut;

/// Rows up to which this is quicker than packing the weight for a matrix product.
const ROWS: usize = 8;
/// Columns of one task: whole pages of weight in a row, and sums that stay in the first cache.
pub(super) const COLUMNS: usize = 1024;
/// Rows of weight that are taken together, which saves reading and writing the sums.
const TOGETHER: usize = 4;

pub(super) fn suits(rows: usize) -> bool {
    rows <= ROWS
}

/// `out = rows x weight`: `rows` is `[count, depth]`, `weight` begins at the first of `columns` columns of a matrix whose
/// rows lie `stride` apart.
pub(super) fn multiply<E: Element>(
    mut out: MatrixMut<'_>,
    rows: &[E],
    weight: &[E],
    count: usize,
    depth: usize,
    columns: usize,
    stride: usize,
) {
    let mut wide_rows = vec![0.0; count * depth];
    let wide_rows = E::row(&rows[..count * depth], &mut wide_rows);
    let mut scratch = [[0.0; COLUMNS]; TOGETHER];
    let mut sums = vec![0.0; count * columns];
    let mut first = 0;
    while first < depth {
        let together = TOGETHER.min(depth - first);
        // What is left at the end is filled up with zero times the last row.
        let lines = {
            let mut parts = scratch.iter_mut();
            std::array::from_fn::<&[f32], TOGETHER, _>(|index| {
                let row = first + index.min(together - 1);
                E::row(&weight[row * stride..][..columns], parts.next().expect("one for each"))
            })
        };
        for (sums, row) in sums.chunks_exact_mut(columns).zip(wide_rows.chunks_exact(depth)) {
            let factors = std::array::from_fn(|index| if index < together { row[first + index] } else { 0.0 });
            add(sums, factors, lines);
        }
        first += together;
    }
    for (index, sums) in sums.chunks_exact(columns).enumerate() {
        out.row_mut(index).copy_from_slice(sums);
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
