//! Matrix products in f32 at the current level.
//!
//! The crate `gemm` always uses the best kernel of the processor. At the highest level this module calls `gemm`; at a lower level it
//! calls the kernel of that level directly.

use std::cell::RefCell;
use std::ops::RangeInclusive;

use gemm_common::gemm::gemm_basic_generic;
use gemm_common::simd::MixedSimd;
use gemm_f32::microkernel;

use crate::{Level, level};

/// A read-only matrix: element `(i, j)` is at `i * row_stride + j * column_stride`.
#[derive(Debug, Clone, Copy)]
pub struct Operand<T = f32> {
    /// A pointer to element `(0, 0)`.
    pub values: *const T,
    /// The distance between rows, in values.
    pub row_stride: usize,
    /// The distance between columns, in values.
    pub column_stride: usize,
}

impl<T> Operand<T> {
    /// The part from element `(row, column)` on.
    ///
    /// # Safety
    ///
    /// The element must be in the allocation of the matrix, or one past its end.
    pub(crate) unsafe fn at(self, row: usize, column: usize) -> Self {
        // SAFETY: as the caller ensures.
        Self { values: unsafe { self.values.add(row * self.row_stride + column * self.column_stride) }, ..self }
    }
}

/// Whether the processor has the features of the kernels of the level `avx2`, FMA among them.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_fused_kernels() -> bool {
    <gemm_common::simd::V3 as MixedSimd<f32, f32, f32, f32>>::try_new().is_some()
}

/// `out = keep * out + factor * lhs * rhs`, on the calling thread.
///
/// `lhs` is `[rows, depth]`, `rhs` `[depth, columns]`, and `out` `[rows, columns]` with rows `stride` values apart and contiguous columns.
/// If `keep` is 0, `out` is not read, so it may be uninitialized.
///
/// # Safety
///
/// Every element of the operands within these shapes must be valid for reads, and every element of `out` for writes and, unless
/// `keep` is 0, for reads. `out` must not overlap an operand.
pub unsafe fn multiply(
    [rows, depth, columns]: [usize; 3],
    out: *mut f32,
    stride: usize,
    lhs: Operand,
    rhs: Operand,
    keep: f32,
    factor: f32,
) {
    let level = level();
    if COPIED_ROWS.contains(&rows)
        && rhs.row_stride == 1
        && rhs.column_stride > 1
        && rhs.column_stride.is_multiple_of(CONFLICTING_STRIDE)
    {
        return COPY.with_borrow_mut(|copy| {
            // SAFETY: the operand is valid for reads, and the copy has its elements.
            unsafe {
                let rhs = copied(copy, depth, columns, rhs);
                product(level, [rows, depth, columns], out, stride, lhs, rhs, keep, factor);
            }
        });
    }
    // SAFETY: the requirements of this function are those of `product`.
    unsafe { product(level, [rows, depth, columns], out, stride, lhs, rhs, keep, factor) }
}

/// Columns of a right operand that are contiguous and a multiple of 1 KiB apart are in few sets of the L1 cache. `gemm` reads several
/// side by side while it packs the operand, and so every value from the next cache.
const CONFLICTING_STRIDE: usize = 256;
/// With so many rows it is faster to copy such an operand first. With more, packing is a small part of the work; with fewer, `gemm` does
/// not pack.
const COPIED_ROWS: RangeInclusive<usize> = 16..=1024;

thread_local! {
    /// The copied operand of a product, which a thread reuses.
    static COPY: RefCell<Vec<f32>> = RefCell::default();
}

/// A copy of an operand `[depth, columns]` whose columns are contiguous, with columns an odd number of cache lines apart.
///
/// # Safety
///
/// The operand must be valid for reads.
unsafe fn copied(copy: &mut Vec<f32>, depth: usize, columns: usize, operand: Operand) -> Operand {
    const LINE: usize = 16;
    let column_stride = (depth.div_ceil(LINE) | 1) * LINE;
    copy.resize(copy.len().max(column_stride * columns), 0.0);
    for (column, copy) in copy.chunks_exact_mut(column_stride).take(columns).enumerate() {
        // SAFETY: the column is one of the operand.
        let values = unsafe { std::slice::from_raw_parts(operand.values.add(column * operand.column_stride), depth) };
        copy[..depth].copy_from_slice(values);
    }
    Operand { values: copy.as_ptr(), row_stride: 1, column_stride }
}

/// [`multiply`] by the kernel of a level.
///
/// # Safety
///
/// As there, and the processor must have the level.
#[expect(clippy::too_many_arguments, reason = "those of `multiply`, with the level")]
unsafe fn product(
    level: Level,
    [rows, depth, columns]: [usize; 3],
    out: *mut f32,
    stride: usize,
    lhs: Operand,
    rhs: Operand,
    keep: f32,
    factor: f32,
) {
    if level == Level::best() {
        // `gemm` takes the stride of columns before that of rows.
        // SAFETY: the requirements of this function are those of `gemm`.
        unsafe {
            gemm::gemm(
                rows,
                columns,
                depth,
                out,
                1,
                stride as isize,
                keep != 0.0,
                lhs.values,
                lhs.column_stride as isize,
                lhs.row_stride as isize,
                rhs.values,
                rhs.column_stride as isize,
                rhs.row_stride as isize,
                keep,
                factor,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
        return;
    }
    /// Calls the kernel `$kernels` with the arguments that `gemm` passes to the kernel it chooses.
    macro_rules! call {
        ($kernels:ident, $width:literal, $simd:ty) => {{
            use microkernel::$kernels::f32::{H_M, H_N, H_UKR, MR_DIV_N, NR, UKR};
            let simd =
                <$simd as MixedSimd<f32, f32, f32, f32>>::try_new().expect("the processor has the current level");
            // SAFETY: as above; and the processor has the instructions, because `try_new` succeeded.
            unsafe {
                gemm_basic_generic::<_, f32, $width, { MR_DIV_N * $width }, NR, MR_DIV_N, H_M, H_N>(
                    simd,
                    rows,
                    columns,
                    depth,
                    out,
                    1,
                    stride as isize,
                    keep != 0.0,
                    lhs.values,
                    lhs.column_stride as isize,
                    lhs.row_stride as isize,
                    rhs.values,
                    rhs.column_stride as isize,
                    rhs.row_stride as isize,
                    keep,
                    factor,
                    false,
                    false,
                    false,
                    |a, b, c| a * b + c,
                    &UKR,
                    &H_UKR,
                    false,
                    gemm_common::Parallelism::None,
                );
            }
        }};
    }
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512F | Level::Avx512 => call!(avx512f, 16, gemm_common::simd::V4),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => call!(fma, 8, gemm_common::simd::V3),
        _ => call!(scalar, 1, gemm_common::simd::Scalar),
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::at_each_level;

    use super::*;

    #[test]
    fn products_agree_with_f64_at_each_level() {
        at_each_level("products of matrices", |_| {
            for [rows, depth, columns] in
                [[1, 1, 1], [3, 5, 7], [17, 40, 33], [130, 65, 100], [16, 1, 17], [40, 0, 5], [20, 256, 30]]
            {
                let noise = |length: usize, seed: usize| -> Vec<f32> {
                    (0..length).map(|index| ((index * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect()
                };
                let (lhs, rhs, start) = (noise(rows * depth, 1), noise(depth * columns, 2), noise(rows * columns, 3));
                let columns_first: Vec<f32> =
                    (0..columns * depth).map(|place| rhs[place % depth * columns + place / depth]).collect();
                for (keep, is_transposed) in [(0.0, false), (0.5, false), (0.0, true), (0.5, true)] {
                    let mut out = if keep == 0.0 { vec![f32::NAN; rows * columns] } else { start.clone() };
                    let left = Operand { values: lhs.as_ptr(), row_stride: depth, column_stride: 1 };
                    let right = if is_transposed {
                        Operand { values: columns_first.as_ptr(), row_stride: 1, column_stride: depth }
                    } else {
                        Operand { values: rhs.as_ptr(), row_stride: columns, column_stride: 1 }
                    };
                    // SAFETY: the three matrices have the elements of their shapes, and `out` overlaps no other.
                    unsafe { multiply([rows, depth, columns], out.as_mut_ptr(), columns, left, right, keep, 2.0) };
                    for (place, found) in out.iter().enumerate() {
                        let (row, column) = (place / columns, place % columns);
                        let term = |inner: usize| {
                            f64::from(lhs[row * depth + inner]) * f64::from(rhs[inner * columns + column])
                        };
                        let expected =
                            f64::from(keep) * f64::from(start[place]) + 2.0 * (0..depth).map(term).sum::<f64>();
                        assert!((f64::from(*found) - expected).abs() < 1e-4, "[{rows}, {depth}, {columns}] at {place}");
                    }
                }
            }
        });
    }
}
