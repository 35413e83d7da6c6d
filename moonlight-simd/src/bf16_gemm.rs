//! Matrix products of bf16, with sums in f32.
//!
//! With AVX512-BF16 (`vdpbf16ps`) operands are never widened: an instruction multiplies 32 pairs of bf16, exactly, and adds each two
//! neighbors along the inner index to one of 16 sums. It treats denormal operands as zeros and flushes denormal sums to zero, whatever
//! the mode of the processor. Elsewhere blocks of the operands are widened to f32 and multiplied by [`gemm`](crate::gemm).
//!
//! Both round each addition. [`relative_error`] bounds the difference from the exact product.

use std::cell::RefCell;

use half::bf16;

use crate::gemm::{self, Operand};
use crate::{Level, level};

/// Where a product goes.
#[derive(Debug, Clone, Copy)]
pub enum Output {
    /// `out = keep * out + factor * lhs * rhs`. If `keep` is 0, `out` is not read, so it may be uninitialized.
    F32 {
        /// The first element.
        values: *mut f32,
        /// The factor of the values before.
        keep: f32,
        /// The factor of the product.
        factor: f32,
    },
    /// `out = factor * lhs * rhs`, rounded once, to nearest even.
    Bf16 {
        /// The first element, which may be uninitialized.
        values: *mut bf16,
        /// The factor of the product.
        factor: f32,
    },
}

/// Whether products are computed in bf16: the processor has AVX512-BF16, and the current level allows AVX-512.
#[inline]
pub fn is_native() -> bool {
    #[cfg(target_arch = "x86_64")]
    return level() >= Level::Avx512F
        && std::arch::is_x86_feature_detected!("avx512bw")
        && std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// The error of a sum of `depth` products, relative to the sum of their magnitudes. Products of two bf16 are exact in f32; each of the
/// `depth` additions, the factor and the addition to a kept value round once, by 2^-24 at most, in whichever order the sum is taken
/// (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1).
///
/// A result in bf16 is rounded once more, by 2^-8 at most. Denormal operands and sums may count as zeros.
pub fn relative_error(depth: usize) -> f64 {
    let rounding = (depth + 3) as f64 * 2f64.powi(-24);
    rounding / (1.0 - rounding)
}

/// Writes the product of `lhs`, `[rows, depth]`, and `rhs`, `[depth, columns]`, to `out`, `[rows, columns]` with rows `stride` values
/// apart and contiguous columns. It runs on the calling thread. Each element has the same bits whichever rows and columns are computed
/// with it, if [`is_native`]. If not, `factor` may be applied to an operand, which overflows if their product does.
///
/// # Safety
///
/// Every element of the operands within these shapes must be valid for reads, and every element of `out` for writes and, unless `keep`
/// is 0, for reads. `out` must not overlap an operand.
pub unsafe fn multiply(shape: [usize; 3], out: Output, stride: usize, lhs: Operand<bf16>, rhs: Operand<bf16>) {
    #[cfg(target_arch = "x86_64")]
    if is_native() {
        // SAFETY: the processor has the instructions; the rest is as the caller ensures.
        return unsafe { crate::avx512::multiply_bf16(shape, out, stride, lhs, rhs) };
    }
    // SAFETY: as the caller ensures.
    unsafe { multiply_widened(shape, out, stride, lhs, rhs) };
}

/// Rows, columns and inner indices of a block whose operands are widened together.
const BLOCK_ROWS: usize = 256;
const BLOCK_COLUMNS: usize = 128;
const BLOCK_DEPTH: usize = 2048;

/// Copies in f32 of a block, which a thread reuses.
#[derive(Default)]
struct Scratch {
    lhs: Vec<f32>,
    rhs: Vec<f32>,
    out: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// [`multiply`] by products in f32.
///
/// # Safety
///
/// As there.
unsafe fn multiply_widened(
    [rows, depth, columns]: [usize; 3],
    out: Output,
    stride: usize,
    lhs: Operand<bf16>,
    rhs: Operand<bf16>,
) {
    SCRATCH.with_borrow_mut(|Scratch { lhs: left, rhs: right, out: wide }| {
        for first_column in (0..columns).step_by(BLOCK_COLUMNS) {
            let width = BLOCK_COLUMNS.min(columns - first_column);
            for first_row in (0..rows).step_by(BLOCK_ROWS) {
                let height = BLOCK_ROWS.min(rows - first_row);
                let place = first_row * stride + first_column;
                // SAFETY: the blocks are within the operands and the result, and `wide` has as many values as a block.
                unsafe {
                    let (sums, sums_stride, keep, factor) = match out {
                        Output::F32 { values, keep, factor } => (values.add(place), stride, keep, factor),
                        Output::Bf16 { factor, .. } => {
                            wide.resize(wide.len().max(height * width), 0.0);
                            (wide.as_mut_ptr(), width, 0.0, factor)
                        }
                    };
                    // One block even if the inner dimension is 0, which makes the result 0.
                    for inner in (0..depth.max(1)).step_by(BLOCK_DEPTH) {
                        let count = BLOCK_DEPTH.min(depth - inner);
                        let keep = if inner == 0 { keep } else { 1.0 };
                        let right = widened(right, rhs.at(inner, first_column), [count, width]);
                        let left = widened(left, lhs.at(first_row, inner), [height, count]);
                        gemm::multiply([height, count, width], sums, sums_stride, left, right, keep, factor);
                    }
                    if let Output::Bf16 { values, .. } = out {
                        for (row, wide) in wide.chunks_exact(width).take(height).enumerate() {
                            let out = values.add(place + row * stride);
                            wide.iter().enumerate().for_each(|(column, &wide)| out.add(column).write(narrow(wide)));
                        }
                    }
                }
            }
        }
    });
}

/// A contiguous copy in f32 of a matrix, whose faster index is that of the matrix.
///
/// # Safety
///
/// The matrix must be valid for reads.
unsafe fn widened(scratch: &mut Vec<f32>, matrix: Operand<bf16>, [rows, columns]: [usize; 2]) -> Operand {
    scratch.resize(scratch.len().max(rows * columns), 0.0);
    let is_transposed = matrix.row_stride < matrix.column_stride;
    let (outer, inner) = if is_transposed { (columns, rows) } else { (rows, columns) };
    for (index, wide) in scratch.chunks_exact_mut(inner.max(1)).take(outer).enumerate() {
        // SAFETY: the elements are those of a row or column of the matrix.
        unsafe {
            let line = if is_transposed { matrix.at(0, index) } else { matrix.at(index, 0) };
            let step = if is_transposed { line.row_stride } else { line.column_stride };
            if step == 1 {
                widen(std::slice::from_raw_parts(line.values, inner), wide);
            } else {
                wide.iter_mut().enumerate().for_each(|(index, wide)| *wide = (*line.values.add(index * step)).to_f32());
            }
        }
    }
    let (row_stride, column_stride) = if is_transposed { (1, inner) } else { (inner, 1) };
    Operand { values: scratch.as_ptr(), row_stride, column_stride }
}

crate::by_level! {
    fn widen[](values: &[bf16], wide: &mut [f32]) {
        for (wide, value) in wide.iter_mut().zip(values) {
            // Not `bf16::to_f32`, whose branch for NaN keeps loops from being vectorized.
            *wide = f32::from_bits(u32::from(value.to_bits()) << 16);
        }
    }
}

/// The nearest bf16, ties to even; without a branch, so that loops are vectorized. NaN stays NaN.
#[inline(always)]
fn narrow(wide: f32) -> bf16 {
    let bits = wide.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    bf16::from_bits(if wide.is_nan() { 0x7fc0 } else { rounded })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::testing::{at_each_level, skipped};

    use super::*;

    /// Whether the elements of a matrix that are neighbors in memory are in one row or one column, or there are none.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Order {
        Rows,
        Columns,
        Neither,
    }

    /// A matrix with elements between its rows that no product may read: they are NaN.
    struct Matrix {
        values: Vec<bf16>,
        rows: usize,
        columns: usize,
        row_stride: usize,
        column_stride: usize,
    }

    impl Matrix {
        fn new(rows: usize, columns: usize, order: Order, gap: usize, mut value: impl FnMut() -> bf16) -> Self {
            let (row_stride, column_stride) = match order {
                Order::Rows => (columns + gap, 1),
                Order::Columns => (1, rows + gap),
                Order::Neither => (3 * columns + gap, 3),
            };
            let length = rows * row_stride + columns * column_stride;
            let mut matrix = Self { values: vec![bf16::NAN; length], rows, columns, row_stride, column_stride };
            for row in 0..rows {
                for column in 0..columns {
                    matrix.values[row * row_stride + column * column_stride] = value();
                }
            }
            // No slack at the end either, so that a read beyond it is a read beyond the allocation.
            let end = if rows * columns == 0 { 0 } else { (rows - 1) * row_stride + (columns - 1) * column_stride + 1 };
            matrix.values.truncate(end);
            matrix.values.shrink_to_fit();
            matrix
        }

        fn operand(&self) -> Operand<bf16> {
            Operand { values: self.values.as_ptr(), row_stride: self.row_stride, column_stride: self.column_stride }
        }

        fn at(&self, row: usize, column: usize) -> f64 {
            f64::from(self.values[row * self.row_stride + column * self.column_stride].to_f32())
        }
    }

    /// What is known about an element of a product.
    struct Expected {
        sum: f64,
        /// The sum of the magnitudes of its terms.
        magnitude: f64,
        /// The part of it with a denormal operand, which may count as zero.
        denormal: f64,
        /// Whether such a term has an infinity too, so that it may be an infinity or NaN.
        is_open: bool,
        /// The largest finite operand.
        largest: f64,
    }

    fn expected(lhs: &Matrix, rhs: &Matrix, row: usize, column: usize) -> Expected {
        let mut expected = Expected { sum: 0.0, magnitude: 0.0, denormal: 0.0, is_open: false, largest: 0.0 };
        for inner in 0..lhs.columns {
            let (a, b) = (lhs.at(row, inner), rhs.at(inner, column));
            expected.sum += a * b;
            let finite = [a, b].map(f64::abs).into_iter().filter(|x| x.is_finite());
            expected.largest = finite.fold(expected.largest, f64::max);
            expected.magnitude += (a * b).abs();
            let is_denormal = |x: f64| x != 0.0 && x.abs() < f64::from(f32::MIN_POSITIVE);
            if is_denormal(a) || is_denormal(b) {
                expected.denormal += (a * b).abs();
                expected.is_open |= a.is_infinite() || b.is_infinite();
            }
        }
        expected
    }

    /// Compares a product with that in f64, within the proven bound, and returns its bits.
    fn check(lhs: &Matrix, rhs: &Matrix, keep: f32, factor: f32) -> (Vec<u32>, Vec<u16>) {
        let (shape, stride) = ([lhs.rows, lhs.columns, rhs.columns], rhs.columns + 3);
        const UNTOUCHED: f32 = -7.5;
        let start = |row: usize, column: usize| (row * 31 + column) as f32 / 64.0 - 3.0;
        let mut wide = vec![UNTOUCHED; lhs.rows * stride];
        let mut half = vec![bf16::from_f32(UNTOUCHED); lhs.rows * stride];
        for row in 0..lhs.rows {
            for column in 0..rhs.columns {
                wide[row * stride + column] = if keep == 0.0 { f32::NAN } else { start(row, column) };
            }
        }
        let output = Output::F32 { values: wide.as_mut_ptr(), keep, factor };
        // SAFETY: the matrices have the elements of their shapes, and the results overlap no operand.
        unsafe { multiply(shape, output, stride, lhs.operand(), rhs.operand()) };
        let output = Output::Bf16 { values: half.as_mut_ptr(), factor };
        // SAFETY: likewise.
        unsafe { multiply(shape, output, stride, lhs.operand(), rhs.operand()) };
        for (place, (&wide, &half)) in wide.iter().zip(&half).enumerate() {
            let (row, column) = (place / stride, place % stride);
            if column >= rhs.columns {
                assert!(wide == UNTOUCHED && half.to_f32() == UNTOUCHED, "a value between rows was written");
                continue;
            }
            let Expected { sum, magnitude, denormal, is_open, largest } = expected(lhs, rhs, row, column);
            let kept = if keep == 0.0 { 0.0 } else { f64::from(keep) * f64::from(start(row, column)) };
            for (found, kept, narrowing) in [(wide, kept, 0.0), (half.to_f32(), 0.0, 2f64.powi(-8))] {
                let (found, exact) = (f64::from(found), kept + f64::from(factor) * sum);
                let about = || format!("{shape:?} at [{row}, {column}]: {found:e}, not {exact:e}");
                let size = kept.abs() + f64::from(factor).abs() * magnitude;
                if is_open {
                    assert!(!found.is_finite(), "{}", about());
                } else if sum.is_nan() {
                    assert!(found.is_nan(), "{}", about());
                } else if sum.is_infinite() {
                    // Finite terms may overflow to the other infinity first, which makes NaN.
                    assert!(found == exact || found.is_nan(), "{}", about());
                } else if magnitude.max(size).max(largest * f64::from(factor).abs()) < f64::from(f32::MAX) / 2.0 {
                    let depth = lhs.columns as f64;
                    let flushed = denormal + (depth + 4.0) * f64::from(f32::MIN_POSITIVE);
                    let bound = relative_error(lhs.columns) * size
                        + flushed * f64::from(factor).abs().max(1.0)
                        + narrowing * (exact.abs() + size * relative_error(lhs.columns));
                    assert!((found - exact).abs() <= bound, "{} within {bound:e}", about());
                }
            }
        }
        let wide = wide.iter().map(|value| value.to_bits()).collect();
        (wide, half.iter().map(|value| value.to_bits()).collect())
    }

    /// Values for every place of the exponent: ordinary, huge, tiny and denormal ones, zeros, infinities and NaN.
    fn value(seed: &mut u64, extreme: bool) -> bf16 {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let bits = (*seed >> 40) as u16;
        let ordinary = bf16::from_f32(f32::from(bits) / 32768.0 - 1.0);
        if !extreme {
            return ordinary;
        }
        match (*seed >> 20) % 64 {
            0 => bf16::NAN,
            1 => bf16::INFINITY,
            2 => bf16::NEG_INFINITY,
            3..6 => bf16::MAX,
            6..9 => bf16::from_bits(bits & 0x807f),
            9..12 => bf16::MIN_POSITIVE,
            12..16 => bf16::NEG_ZERO,
            16..24 => bf16::from_bits(bits & 0xbfff),
            _ => ordinary,
        }
    }

    fn order() -> impl Strategy<Value = Order> {
        prop_oneof![4 => Just(Order::Rows), 4 => Just(Order::Columns), 1 => Just(Order::Neither)]
    }

    /// An extent: often 0, 1 or near the size of a tile.
    fn extent(most: usize) -> impl Strategy<Value = usize> {
        prop_oneof![1 => Just(0), 1 => Just(1), 4 => 1..most.min(36), 4 => 1..most]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn products_are_within_the_bound(
            (rows, depth, columns) in (extent(70), extent(300), extent(100)),
            (left, right) in (order(), order()),
            gap in 0_usize..3,
            (keep, factor) in (prop_oneof![Just(0.0_f32), Just(1.0), Just(-0.5)], prop_oneof![Just(1.0_f32), Just(0.3), Just(-2.0)]),
            extreme in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let mut seed = seed;
            let lhs = Matrix::new(rows, depth, left, gap, || value(&mut seed, extreme));
            let rhs = Matrix::new(depth, columns, right, gap, || value(&mut seed, extreme));
            at_each_level("products in bf16", |_| { check(&lhs, &rhs, keep, factor); });
        }
    }

    #[test]
    fn long_sums_and_aligned_rows_are_within_the_bound() {
        at_each_level("products in bf16", |_| {
            let mut seed = 5;
            // More inner indices than a block has; rows a multiple of 1 KiB apart; more columns than are packed at once.
            for [rows, depth, columns] in [[3, 4097, 40], [15, 9001, 33], [29, 512, 64], [1, 1024, 700], [2, 4096, 200]]
            {
                for order in [Order::Rows, Order::Columns] {
                    let lhs = Matrix::new(rows, depth, order, 0, || value(&mut seed, false));
                    let rhs = Matrix::new(depth, columns, order, 0, || value(&mut seed, false));
                    check(&lhs, &rhs, 0.5, 2.0);
                }
            }
        });
    }

    #[test]
    fn a_part_of_a_product_has_the_bits_of_the_product() {
        if !is_native() {
            return skipped("equal bits of products in bf16", "this processor has no AVX512-BF16");
        }
        let mut seed = 6;
        let (rows, depth, columns) = (40, 4200, 100);
        let lhs = Matrix::new(rows, depth, Order::Rows, 0, || value(&mut seed, false));
        let rhs = Matrix::new(depth, columns, Order::Rows, 0, || value(&mut seed, false));
        let (whole, _) = check(&lhs, &rhs, 0.0, 1.0);
        let part = Matrix { values: lhs.values[7 * depth..12 * depth].to_vec(), rows: 5, ..lhs };
        let narrow = Matrix { values: rhs.values[50..].to_vec(), columns: 37, ..rhs };
        let (found, _) = check(&part, &narrow, 0.0, 1.0);
        for row in 0..5 {
            assert_eq!(found[row * 40..][..37], whole[(7 + row) * 103 + 50..][..37]);
        }
    }

    #[test]
    fn native_products_flush_denormals_and_others_do_not() {
        let tiny = bf16::from_bits(1);
        at_each_level("denormals in bf16", |_| {
            let one = Matrix::new(1, 1, Order::Rows, 0, || tiny);
            let large = Matrix::new(1, 1, Order::Rows, 0, || bf16::MAX);
            let mut out = f32::NAN;
            let output = Output::F32 { values: &raw mut out, keep: 0.0, factor: 1.0 };
            // SAFETY: all three matrices have one element.
            unsafe { multiply([1, 1, 1], output, 1, one.operand(), large.operand()) };
            assert_eq!(out, if is_native() { 0.0 } else { tiny.to_f32() * bf16::MAX.to_f32() });
        });
    }
}
