//! Matrix products of bf16 operands, on processors with AVX512-BF16.
//!
//! Matrices are kept in f32. Operands are rounded to bf16 when they are packed; sums are in f32, and so is what is added to a
//! product (`a X`, `b R`). That is more exact than an iteration whose matrices are bf16 throughout, at the same speed. AMX is
//! not used: Rust has no stable intrinsics for it.

use std::arch::x86_64::{
    __m512, __m512bh, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_storeu_ps,
};

use moonlight_simd::Level;
use rayon::prelude::*;

/// Rows and columns of a tile of the result: 8 by 3 registers of 16 sums. With the operands, 28 of 32 registers are in use.
const ROWS: usize = 8;
const COLUMNS: usize = 48;
/// Pairs of inner indices that are packed at a time: few enough that the cache lines written stay in cache.
const PAIRS: usize = 32;
/// Rows of the result that a thread takes at a time.
const BLOCK_ROWS: usize = 12 * ROWS;

/// Whether this processor has AVX512-BF16, and `MOONLIGHT_SIMD` allows AVX512.
pub(super) fn is_available() -> bool {
    moonlight_simd::level() >= Level::Avx512F
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

/// An operand rounded to bf16, in panels of `width` rows (left operand) or columns (right operand). A panel is `[pairs, width]`
/// values. Each value holds two bf16 that are neighbors along the inner index, since `_mm512_dpbf16_ps` multiplies and adds two
/// at a time. The last panel is filled up with zeros.
#[derive(Default)]
pub(super) struct PackedOperand {
    width: usize,
    /// The number of rows (left) or columns (right).
    outer: usize,
    /// The number of pairs of inner indices, rounded up.
    pairs: usize,
    values: Vec<u32>,
}

/// The direction of an operand's inner index, which is summed over, in its row-major matrix.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Inner {
    /// Along a row.
    Columns,
    /// Along a column.
    Rows,
}

/// The bf16 of an f32, rounded to nearest even. NaN stays NaN; rounding its bits could give infinity.
#[inline(always)]
fn round(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if value.is_nan() { 0x7fc0 } else { rounded }
}

#[inline(always)]
fn pair(first: f32, second: f32) -> u32 {
    round(first) | round(second) << 16
}

impl PackedOperand {
    /// Packs a row-major `[rows, columns]` matrix as the left operand.
    pub(super) fn set_left(&mut self, matrix: &[f32], rows: usize, columns: usize, inner: Inner, parallel: bool) {
        self.set(matrix, rows, columns, inner, ROWS, parallel);
    }

    /// Packs a row-major `[rows, columns]` matrix as the right operand.
    pub(super) fn set_right(&mut self, matrix: &[f32], rows: usize, columns: usize, inner: Inner, parallel: bool) {
        self.set(matrix, rows, columns, inner, COLUMNS, parallel);
    }

    fn set(&mut self, matrix: &[f32], rows: usize, columns: usize, inner: Inner, width: usize, parallel: bool) {
        assert!(is_available(), "this processor has no bf16 products");
        assert_eq!(matrix.len(), rows * columns, "a matrix has rows * columns elements");
        let (outer, depth) = if inner == Inner::Columns { (rows, columns) } else { (columns, rows) };
        let pairs = depth.div_ceil(2);
        (self.width, self.outer, self.pairs) = (width, outer, pairs);
        self.values.clear();
        self.values.resize(outer.div_ceil(width) * width * pairs, 0);
        let task = |(index, panel): (usize, &mut [u32])| {
            let first = index * width;
            let count = width.min(outer - first);
            // SAFETY: the processor has AVX512 by the first assertion. Slices are indexed with bounds checks.
            unsafe {
                match inner {
                    Inner::Columns => pack_rows(panel, width, &matrix[first * columns..][..count * columns], columns),
                    Inner::Rows => pack_columns(panel, width, &matrix[first..], columns, count),
                }
            }
        };
        if parallel {
            self.values.par_chunks_mut(width * pairs).enumerate().for_each(task);
        } else {
            self.values.chunks_mut(width * pairs).enumerate().for_each(task);
        }
    }

    fn panel(&self, index: usize) -> &[u32] {
        let size = self.width * self.pairs;
        &self.values[index * size..][..size]
    }
}

/// Packs rows of `columns` elements, whose inner index runs along the row.
///
/// # Safety
///
/// The processor must have AVX512. The code has no intrinsics: the compiler vectorizes the rounding for it.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn pack_rows(panel: &mut [u32], width: usize, rows: &[f32], columns: usize) {
    let mut values = [0; PAIRS];
    // A few pairs of each row at a time, so that the cache lines of the strided side stay in cache.
    for (block, places) in panel.chunks_mut(PAIRS * width).enumerate() {
        let first = block * 2 * PAIRS;
        for (index, row) in rows.chunks(columns).enumerate() {
            let (whole, rest) = row[first..columns.min(first + 2 * PAIRS)].as_chunks::<2>();
            for (value, &[first, second]) in values.iter_mut().zip(whole) {
                *value = pair(first, second);
            }
            if let Some(&last) = rest.first() {
                values[whole.len()] = pair(last, 0.0);
            }
            for (place, value) in places[index..].iter_mut().step_by(width).zip(&values) {
                *place = *value;
            }
        }
    }
}

/// Packs the first `count` columns of rows of `columns` elements, whose inner index runs down the column.
///
/// # Safety
///
/// As [`pack_rows`].
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn pack_columns(panel: &mut [u32], width: usize, matrix: &[f32], columns: usize, count: usize) {
    let zeros = [0.0; COLUMNS];
    let rows = (matrix.len() - count) / columns + 1;
    for (index, places) in panel.chunks_mut(width).enumerate() {
        let first = &matrix[2 * index * columns..][..count];
        let second = if 2 * index + 1 < rows { &matrix[(2 * index + 1) * columns..][..count] } else { &zeros[..count] };
        for ((place, &first), &second) in places.iter_mut().zip(first).zip(second) {
            *place = pair(first, second);
        }
    }
}

/// `out = keep * out + factor * left * right`, in f32, `out` with as many columns as `right`. With `lower`, only the lower half
/// of a square result is computed, in whole tiles, which extend above the diagonal. With a `keep` of 0, `out` is not read.
///
/// The same input gives the same bits for any number of threads.
///
/// # Panics
///
/// If the operands do not fit, or [`is_available`] is false.
pub(super) fn multiply(
    out: &mut [f32],
    left: &PackedOperand,
    right: &PackedOperand,
    keep: f32,
    factor: f32,
    lower: bool,
    parallel: bool,
) {
    assert!(is_available(), "this processor has no bf16 products");
    assert!(left.pairs == right.pairs, "inner dimensions agree");
    assert!(left.width == ROWS && right.width == COLUMNS, "operands are packed for their side");
    assert_eq!(
        out.len(),
        left.outer * right.outer,
        "the result has the rows of the left and the columns of the right operand"
    );
    let columns = right.outer;
    let task = |(block, out): (usize, &mut [f32])| {
        let first_row = block * BLOCK_ROWS;
        let last_row = first_row + out.len() / columns - 1;
        for panel in 0..columns.div_ceil(COLUMNS) {
            let column = panel * COLUMNS;
            // This panel and all after it are above the diagonal in every row of the block.
            if lower && column > last_row {
                break;
            }
            for (strip, out) in out.chunks_mut(ROWS * columns).enumerate() {
                let row = first_row + strip * ROWS;
                // Above the diagonal in these rows.
                if lower && column > row + ROWS - 1 {
                    continue;
                }
                let mut sums = [0.0; ROWS * COLUMNS];
                // SAFETY: the processor has AVX512-BF16 by the first assertion.
                unsafe { tile(&mut sums, left.panel(row / ROWS), right.panel(panel)) };
                // Columns of padding in the last panel are computed, but not stored.
                let width = COLUMNS.min(columns - column);
                for (out, sums) in out.chunks_mut(columns).zip(sums.chunks(COLUMNS)) {
                    for (out, sum) in out[column..column + width].iter_mut().zip(sums) {
                        // Not `0 * out`: a workspace may hold NaN from the matrix before.
                        *out = if keep == 0.0 { factor * sum } else { keep * *out + factor * sum };
                    }
                }
            }
        }
    };
    if parallel {
        out.par_chunks_mut(BLOCK_ROWS * columns).enumerate().for_each(task);
    } else {
        out.chunks_mut(BLOCK_ROWS * columns).enumerate().for_each(task);
    }
}

/// The product of a panel of rows and a panel of columns.
///
/// # Safety
///
/// The processor must have AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn tile(sums: &mut [f32; ROWS * COLUMNS], left: &[u32], right: &[u32]) {
    assert_eq!(left.len() / ROWS, right.len() / COLUMNS);
    let mut registers = [[_mm512_setzero_ps(); 3]; ROWS];
    for (left, right) in left.chunks_exact(ROWS).zip(right.chunks_exact(COLUMNS)) {
        // SAFETY: `chunks_exact` gives `COLUMNS` values, which are three registers. Both types are 512 bits, valid in any
        // pattern.
        let columns: [__m512bh; 3] = unsafe {
            let base = right.as_ptr();
            [0, 16, 32].map(|start| std::mem::transmute(_mm512_loadu_si512(base.add(start).cast())))
        };
        for row in 0..ROWS {
            // SAFETY: both types are 512 bits, valid in any pattern.
            let value: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi32(left[row].cast_signed())) };
            for (sum, column) in registers[row].iter_mut().zip(columns) {
                *sum = _mm512_dpbf16_ps(*sum, value, column);
            }
        }
    }
    for (sums, registers) in sums.chunks_exact_mut(COLUMNS).zip(&registers) {
        for (sums, register) in sums.chunks_exact_mut(16).zip(registers) {
            let register: __m512 = *register;
            // SAFETY: `chunks_exact_mut` gives 16 values, which are one register.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), register) };
        }
    }
}

#[cfg(test)]
mod tests {
    use moonlight_simd::testing::skipped;

    use super::*;

    /// An f32 rounded to bf16.
    fn rounded(value: f32) -> f64 {
        f64::from(f32::from_bits(round(value) << 16))
    }

    fn noise(length: usize, seed: usize) -> Vec<f32> {
        (0..length).map(|index| ((index * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    #[test]
    fn values_are_rounded_to_nearest_even() {
        for (value, expected) in [
            (1.0, 1.0),
            (-2.5, -2.5),
            (1.0 + 1.0 / 256.0, 1.0),
            (1.0 + 3.0 / 256.0, 1.0 + 1.0 / 64.0),
            (1.0 + 1.01 / 256.0, 1.0 + 1.0 / 128.0),
            (0.0, 0.0),
            (f32::MAX, f64::INFINITY),
            (f32::NEG_INFINITY, f64::NEG_INFINITY),
        ] {
            assert_eq!(rounded(value), expected, "{value}");
        }
        assert!(rounded(f32::NAN).is_nan());
    }

    #[test]
    fn products_of_any_shape_and_layout_equal_those_of_the_rounded_operands() {
        if !is_available() {
            return skipped("the products in bf16", "this processor has no AVX512-BF16");
        }
        for (rows, columns, depth) in [(1, 1, 1), (3, 5, 7), (8, 48, 64), (9, 49, 65), (130, 100, 33), (200, 17, 260)] {
            let (left, right) = (noise(rows * depth, 1), noise(depth * columns, 2));
            let transposed = |matrix: &[f32], rows: usize, columns: usize| -> Vec<f32> {
                (0..columns).flat_map(|column| (0..rows).map(move |row| matrix[row * columns + column])).collect()
            };
            for (transpose, parallel) in [(false, false), (true, false), (false, true), (true, true)] {
                let (mut lhs, mut rhs) = (PackedOperand::default(), PackedOperand::default());
                if transpose {
                    lhs.set_left(&transposed(&left, rows, depth), depth, rows, Inner::Rows, parallel);
                    rhs.set_right(&transposed(&right, depth, columns), columns, depth, Inner::Columns, parallel);
                } else {
                    lhs.set_left(&left, rows, depth, Inner::Columns, parallel);
                    rhs.set_right(&right, depth, columns, Inner::Rows, parallel);
                }
                let start = noise(rows * columns, 3);
                for keep in [0.0, 0.5] {
                    let mut out = if keep == 0.0 { vec![f32::NAN; rows * columns] } else { start.clone() };
                    multiply(&mut out, &lhs, &rhs, keep, 2.0, false, parallel);
                    for row in 0..rows {
                        for column in 0..columns {
                            let product = |inner: usize| {
                                rounded(left[row * depth + inner]) * rounded(right[inner * columns + column])
                            };
                            let sum: f64 = (0..depth).map(product).sum();
                            let expected = f64::from(keep) * f64::from(start[row * columns + column]) + 2.0 * sum;
                            let found = f64::from(out[row * columns + column]);
                            assert!(
                                (found - expected).abs() < 1e-4,
                                "[{rows}, {columns}, {depth}]: {found}, {expected}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_lower_half_equals_that_of_the_full_product() {
        if !is_available() {
            return skipped("the products in bf16", "this processor has no AVX512-BF16");
        }
        let (size, depth) = (217, 40);
        let x = noise(size * depth, 4);
        let (mut lhs, mut rhs) = (PackedOperand::default(), PackedOperand::default());
        lhs.set_left(&x, size, depth, Inner::Columns, false);
        rhs.set_right(&x, size, depth, Inner::Columns, false);
        let (mut whole, mut half) = (vec![0.0; size * size], vec![0.0; size * size]);
        multiply(&mut whole, &lhs, &rhs, 0.0, 1.0, false, true);
        multiply(&mut half, &lhs, &rhs, 0.0, 1.0, true, false);
        for row in 0..size {
            assert_eq!(whole[row * size..][..row + 1], half[row * size..][..row + 1]);
        }
        // Most of the upper half is not computed.
        assert!(half.iter().filter(|value| **value == 0.0).count() > size * size / 3);
    }
}
