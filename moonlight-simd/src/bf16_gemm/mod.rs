//! Matrix products of bf16, with sums in f32.
//!
//! With AVX512-BF16 (`vdpbf16ps`) operands are never widened: an instruction multiplies 32 pairs of bf16, exactly, and adds each two
//! neighbors along the inner index to one of 16 sums. It treats denormal operands as zeros and flushes denormal sums to zero, whatever
//! the mode of the processor. Elsewhere blocks of the operands are widened to f32 and multiplied by [`crate::gemm`].
//!
//! Both round each addition. [`relative_error`] bounds the difference from the exact product.

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod few_rows;
#[cfg(target_arch = "x86_64")]
mod pack;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tile;

use std::cell::RefCell;
use std::mem::MaybeUninit;

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
/// with it, if [`is_native`]. If not, `factor` may be applied to an operand first, whose
/// product with it may then overflow or be denormal.
///
/// # Safety
///
/// Every element of the operands within these shapes must be valid for reads, and every element of `out` for writes and, unless `keep`
/// is 0, for reads. `out` must not overlap an operand.
pub unsafe fn multiply(shape: [usize; 3], out: Output, stride: usize, lhs: Operand<bf16>, rhs: Operand<bf16>) {
    #[cfg(target_arch = "x86_64")]
    if is_native() {
        // SAFETY: the processor has the instructions; the rest is as the caller ensures.
        return unsafe { avx512::multiply(shape, out, stride, lhs, rhs) };
    }
    // SAFETY: as the caller ensures.
    unsafe { multiply_widened(shape, out, stride, lhs, rhs) };
}

/// The most rows of [`add_few_rows`].
pub const MAX_FEW_ROWS: usize = 8;

/// Adds to `sums`, `[rows, width]`, the product of up to [`MAX_FEW_ROWS`] rows and `weight`, `[length of a row, width]`, which is read
/// once, in the order of memory.
///
/// # Panics
///
/// If there are more rows, rows differ in length, or `sums` or `weight` have another size.
pub fn add_few_rows(sums: &mut [f32], rows: &[&[bf16]], weight: &[bf16], width: usize) {
    let Some(first) = rows.first() else { return assert!(sums.is_empty(), "without rows there are no sums") };
    assert!(rows.len() <= MAX_FEW_ROWS, "{} rows are too many", rows.len());
    assert!(rows.iter().all(|row| row.len() == first.len()), "rows have one length");
    assert_eq!(sums.len(), rows.len() * width, "each row has `width` sums");
    assert_eq!(weight.len(), first.len() * width, "the weight has `width` values for each value of a row");
    if width == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if is_native() {
        // SAFETY: the processor has the instructions, and the assertions are the other requirements.
        return unsafe { few_rows::add(sums, rows, weight, width) };
    }
    for (index, line) in weight.chunks_exact(width).enumerate() {
        for (sums, row) in sums.chunks_exact_mut(width).zip(rows) {
            add_line(sums, row[index], line);
        }
    }
}

crate::by_level! {
    fn add_line[](sums: &mut [f32], factor: bf16, line: &[bf16]) {
        let wide = |value: bf16| f32::from_bits(u32::from(value.to_bits()) << 16);
        for (sum, &value) in sums.iter_mut().zip(line) {
            *sum += wide(factor) * wide(value);
        }
    }
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
                        round_rows(wide, values.add(place), [height, width], stride);
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

/// Rounds rows of `columns` values that follow one another into rows `stride` values apart.
///
/// # Safety
///
/// `out` must be valid for writes of the rows.
unsafe fn round_rows(wide: &[f32], out: *mut bf16, [rows, columns]: [usize; 2], stride: usize) {
    for (row, wide) in wide.chunks_exact(columns).take(rows).enumerate() {
        // SAFETY: `MaybeUninit` has the layout of its value, and the row is valid for writes, as the caller ensures.
        round(wide, unsafe { std::slice::from_raw_parts_mut(out.add(row * stride).cast(), columns) });
    }
}

crate::by_level! {
    fn round[](wide: &[f32], values: &mut [MaybeUninit<bf16>]) {
        for (value, &wide) in values.iter_mut().zip(wide) {
            value.write(narrow(wide));
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
