//! Matrix products in tiles of 8 rows by 32 columns, on processors with AVX512.
//!
//! A general product (`gemm`) copies both operands into panels first. It also takes so many rows at a time that a symmetric
//! result of [64, 64] has no half to skip. Here matrices are transposed to be tall and padded with zeros to whole tiles. The left
//! operand is then read in place, as is the right operand of a small matrix, and little more than the lower half of a
//! symmetric result is computed.

use std::arch::x86_64::{
    __m512, _mm512_castpd_ps, _mm512_castps_pd, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_blend_ps,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_shuffle_f32x4, _mm512_storeu_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd,
    _mm512_unpacklo_ps,
};

use moonlight_simd::Level;
use rayon::prelude::*;

/// Rows of a tile. With two registers a row there are 16 independent sums, enough to hide the latency of a fused multiply-add.
const ROWS: usize = 8;
/// f32 values in a register.
const LANES: usize = 16;

/// Panels of the right operand are copied if its rows are at least this long; see [`panel`].
const COPIED_PANELS_FROM: usize = 128;

/// Rows of a result that a thread takes at a time, if there are several threads.
const CHUNK_ROWS: usize = 16 * ROWS;

/// Whether this processor has AVX512, and `MOONLIGHT_SIMD` allows it.
pub(super) fn is_available() -> bool {
    moonlight_simd::level() >= Level::Avx512F
}

/// The shape of a matrix in this layout: tall or square, in whole tiles.
pub(super) fn padded(rows: usize, columns: usize) -> [usize; 2] {
    let short = rows.min(columns).next_multiple_of(LANES);
    [rows.max(columns).next_multiple_of(ROWS).max(short), short]
}

/// Writes a row-major `[rows, columns]` matrix into this layout: transposed if it is wide, and padded with zeros, which stay
/// zeros in every product.
pub(super) fn pack(out: &mut [f32], matrix: &[f32], rows: usize, columns: usize) {
    let [long, stride] = padded(rows, columns);
    assert!(out.len() == long * stride && matrix.len() == rows * columns, "a matrix has rows * columns elements");
    out.fill(0.0);
    if rows > columns {
        out.chunks_mut(stride).zip(matrix.chunks(columns)).for_each(|(out, row)| out[..columns].copy_from_slice(row));
    } else {
        transpose(out, stride, matrix, columns, rows, columns);
    }
}

/// Reads a matrix that [`pack`] wrote, into row-major `[rows, columns]`.
pub(super) fn unpack(out: &mut [f32], packed: &[f32], rows: usize, columns: usize) {
    let [long, stride] = padded(rows, columns);
    assert!(packed.len() == long * stride && out.len() == rows * columns, "a matrix has rows * columns elements");
    if rows > columns {
        out.chunks_mut(columns).zip(packed.chunks(stride)).for_each(|(out, row)| out.copy_from_slice(&row[..columns]));
    } else {
        // `[columns, stride]`, whose rows begin with `rows` values of the matrix.
        transpose(out, columns, packed, stride, columns, rows);
    }
}

/// `out = keep * start + factor * left^T right` `[size, size]`, of operands `[depth, size]`. The result must be symmetric: the
/// lower half is computed and mirrored.
pub(super) fn symmetric(
    out: &mut [f32],
    left: &[f32],
    right: &[f32],
    size: usize,
    start: Option<(&[f32], f32)>,
    factor: f32,
    parallel: bool,
) {
    assert!(is_available(), "this processor has no AVX512");
    assert!(
        size.is_multiple_of(LANES) && left.len() == right.len() && left.len().is_multiple_of(size),
        "operands are whole tiles"
    );
    assert!(
        out.len() == size * size && start.is_none_or(|(start, _)| start.len() == out.len()),
        "result and start are square"
    );
    let task = |(index, out): (usize, &mut [f32])| {
        // SAFETY: by the three assertions above, the processor has AVX512, `size` is whole registers, the operands are whole
        // rows of one length, and result and start are square. A chunk of the result is whole tiles, since `CHUNK_ROWS` and
        // `size` are multiples of `ROWS`, and it begins at row `index * CHUNK_ROWS`.
        unsafe { symmetric_tiles(out, index * CHUNK_ROWS, left, right, size, start, factor) };
    };
    if parallel {
        out.par_chunks_mut(CHUNK_ROWS * size).enumerate().for_each(task);
    } else {
        task((0, out));
    }
    // SAFETY: by the first and the third assertion above.
    unsafe { mirror(out, size) };
}

/// `out = x * polynomial` `[rows, size]`, of `x` `[rows, size]` and `polynomial` `[size, size]`.
pub(super) fn product(out: &mut [f32], x: &[f32], polynomial: &[f32], size: usize, parallel: bool) {
    assert!(is_available(), "this processor has no AVX512");
    assert!(size.is_multiple_of(LANES) && x.len().is_multiple_of(ROWS * size), "operands are whole tiles");
    assert!(out.len() == x.len() && polynomial.len() == size * size, "result and operands agree in shape");
    let task = |(out, x): (&mut [f32], &[f32])| {
        // SAFETY: by the three assertions above, the processor has AVX512, `size` is whole registers, result and left operand
        // are whole tiles of rows of one length (so are their chunks of `CHUNK_ROWS` rows, and the rest), and the right operand
        // is square.
        unsafe { product_tiles(out, x, polynomial, size) };
    };
    if parallel {
        out.par_chunks_mut(CHUNK_ROWS * size).zip(x.par_chunks(CHUNK_ROWS * size)).for_each(task);
    } else {
        task((out, x));
    }
}

/// `out[column][row] = matrix[row][column]` for the first `rows` rows and `columns` columns of matrices with strides.
fn transpose(out: &mut [f32], out_stride: usize, matrix: &[f32], stride: usize, rows: usize, columns: usize) {
    assert!(is_available(), "this processor has no AVX512");
    assert!(rows > 0 && columns > 0 && columns <= stride && rows <= out_stride, "rows do not overlap");
    assert!((rows - 1) * stride + columns <= matrix.len(), "the operand is within its slice");
    assert!((columns - 1) * out_stride + rows <= out.len(), "the result is within its slice");
    // SAFETY: by the four assertions above, the processor has AVX512, and the last element that is read or written is in its
    // slice.
    unsafe { transpose_blocks(out, out_stride, matrix, stride, rows, columns) };
}

/// [`transpose`] in blocks of 16 by 16.
///
/// # Safety
///
/// The processor must have AVX512, and the slices the elements that sizes and strides reach.
#[target_feature(enable = "avx512f")]
unsafe fn transpose_blocks(
    out: &mut [f32],
    out_stride: usize,
    matrix: &[f32],
    stride: usize,
    rows: usize,
    columns: usize,
) {
    let mask = |count: usize| u16::MAX >> (LANES - count);
    for row in (0..rows).step_by(LANES) {
        let height = LANES.min(rows - row);
        for column in (0..columns).step_by(LANES) {
            let width = LANES.min(columns - column);
            let mut block = [_mm512_setzero_ps(); LANES];
            for (index, register) in block.iter_mut().enumerate().take(height) {
                // SAFETY: the mask selects lanes below `columns` of a row below `rows`; these exist, as the caller asserted, and
                // no others are read.
                *register =
                    unsafe { _mm512_maskz_loadu_ps(mask(width), matrix.as_ptr().add((row + index) * stride + column)) };
            }
            let block = transposed(block);
            for (index, register) in block.into_iter().enumerate().take(width) {
                // SAFETY: likewise, for lanes below `rows` of a row of the result below `columns`.
                unsafe {
                    let place = out.as_mut_ptr().add((column + index) * out_stride + row);
                    _mm512_mask_storeu_ps(place, mask(height), register);
                }
            }
        }
    }
}

/// Computes the lower half of rows `first..` of the result, as many as `out` has.
///
/// # Safety
///
/// The processor must have AVX512; the result and `start` must be `[size, size]`, `left` and `right` of one length in whole
/// rows of `size`, and `size` whole registers.
#[target_feature(enable = "avx512f")]
unsafe fn symmetric_tiles(
    out: &mut [f32],
    first: usize,
    left: &[f32],
    right: &[f32],
    size: usize,
    start: Option<(&[f32], f32)>,
    factor: f32,
) {
    let depth = left.len() / size;
    let start = start.map(|(start, keep)| (&start[first * size..], keep));
    let end = first + out.len() / size;
    let mut copied = Vec::new();
    for column in (0..end).step_by(2 * LANES) {
        // SAFETY: `column` and `row` are below `end`, which is at most `size`, in steps of whole registers and tiles; the second
        // register is left out where it would begin at `size`. So tiles are within operands of `depth` rows and a result of
        // `end - first` rows, which the caller has.
        unsafe {
            let (right, stride) = panel(&mut copied, right, column, size);
            for row in (column.max(first)..end).step_by(ROWS) {
                let (left, offset) = (left.as_ptr().add(row), (row - first) * size + column);
                // One register if the second would have nothing below the diagonal, or would begin past the last column.
                if row < column + LANES || column + LANES == size {
                    let sums = tile::<1>(left, 1, size, right, stride, depth);
                    store(out, offset, size, sums, start, factor);
                } else {
                    let sums = tile::<2>(left, 1, size, right, stride, depth);
                    store(out, offset, size, sums, start, factor);
                }
            }
        }
    }
}

/// Copies the lower half of `[size, size]` to the upper one.
///
/// # Safety
///
/// The processor must have AVX512, the matrix its elements, and `size` must be whole registers.
#[target_feature(enable = "avx512f")]
unsafe fn mirror(out: &mut [f32], size: usize) {
    for row in (0..size).step_by(LANES) {
        for column in (0..=row).step_by(LANES) {
            let mut block = [_mm512_setzero_ps(); LANES];
            // SAFETY: `row` and `column` are multiples of a register's length below `size`, which is one too, so blocks are
            // within the matrix.
            unsafe {
                for (index, register) in block.iter_mut().enumerate() {
                    *register = _mm512_loadu_ps(out.as_ptr().add((row + index) * size + column));
                }
                for (index, (own, mirrored)) in block.into_iter().zip(transposed(block)).enumerate() {
                    // In a block on the diagonal, only what is right of the diagonal is replaced.
                    let above = if row == column { u16::MAX << index } else { u16::MAX };
                    let register = _mm512_mask_blend_ps(above, own, mirrored);
                    _mm512_storeu_ps(out.as_mut_ptr().add((column + index) * size + row), register);
                }
            }
        }
    }
}

/// [`product`] of some rows.
///
/// # Safety
///
/// The processor must have AVX512; `out` and `x` must be of one length in whole tiles of rows of `size`, `polynomial`
/// `[size, size]`, and `size` whole registers.
#[target_feature(enable = "avx512f")]
unsafe fn product_tiles(out: &mut [f32], x: &[f32], polynomial: &[f32], size: usize) {
    let mut copied = Vec::new();
    for column in (0..size).step_by(2 * LANES) {
        // SAFETY: columns are in steps of whole registers below `size`, the second register is left out where it would begin at
        // `size`, and rows are whole tiles. So tiles are within matrices of the shapes that the caller has.
        unsafe {
            let (right, stride) = panel(&mut copied, polynomial, column, size);
            for row in (0..x.len() / size).step_by(ROWS) {
                let (left, offset) = (x.as_ptr().add(row * size), row * size + column);
                if column + LANES == size {
                    let sums = tile::<1>(left, size, 1, right, stride, size);
                    store(out, offset, size, sums, None, 1.0);
                } else {
                    let sums = tile::<2>(left, size, 1, right, stride, size);
                    store(out, offset, size, sums, None, 1.0);
                }
            }
        }
    }
}

/// A panel of the right operand, as wide as two registers, and the distance between its rows. In a small matrix it is read in
/// place. In one with long rows it is copied first: there, rows are so far apart that few of the panel's lines fit in the L1
/// cache.
fn panel(copied: &mut Vec<f32>, matrix: &[f32], column: usize, size: usize) -> (*const f32, usize) {
    if size < COPIED_PANELS_FROM {
        return (matrix[column..].as_ptr(), size);
    }
    let width = (2 * LANES).min(size - column);
    copied.clear();
    for row in matrix.chunks_exact(size) {
        copied.extend_from_slice(&row[column..column + width]);
    }
    (copied.as_ptr(), width)
}

/// A tile of sums over `depth` of `left[row * across + inner * along] * right[inner * stride + column]`. The two strides let it
/// read the left operand as stored or transposed.
///
/// # Safety
///
/// The processor must have AVX512, and the elements that are read must exist.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn tile<const REGISTERS: usize>(
    left: *const f32,
    across: usize,
    along: usize,
    right: *const f32,
    stride: usize,
    depth: usize,
) -> [[__m512; REGISTERS]; ROWS] {
    let mut sums = [[_mm512_setzero_ps(); REGISTERS]; ROWS];
    let (mut left, mut right) = (left, right);
    for _ in 0..depth {
        // SAFETY: the caller ensures that all elements below `depth` exist. The pointers end one step past them, unread.
        unsafe {
            let mut columns = [_mm512_setzero_ps(); REGISTERS];
            for (index, column) in columns.iter_mut().enumerate() {
                *column = _mm512_loadu_ps(right.add(index * LANES));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let value = _mm512_set1_ps(*left.add(row * across));
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = _mm512_fmadd_ps(value, column, *sum);
                }
            }
            left = left.wrapping_add(along);
            right = right.wrapping_add(stride);
        }
    }
    sums
}

/// Writes a tile, `keep * start + factor * sums`, to `out` from element `offset` on.
///
/// # Safety
///
/// The processor must have AVX512, and the tile must be within `out` and `start`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const REGISTERS: usize>(
    out: &mut [f32],
    offset: usize,
    size: usize,
    sums: [[__m512; REGISTERS]; ROWS],
    start: Option<(&[f32], f32)>,
    factor: f32,
) {
    for (row, sums) in sums.into_iter().enumerate() {
        for (index, sum) in sums.into_iter().enumerate() {
            let place = offset + row * size + index * LANES;
            // SAFETY: the caller ensures that the tile is within result and start.
            unsafe {
                let value = match start {
                    None if factor == 1.0 => sum,
                    None => _mm512_mul_ps(_mm512_set1_ps(factor), sum),
                    Some((start, keep)) => {
                        let kept = _mm512_mul_ps(_mm512_set1_ps(keep), _mm512_loadu_ps(start.as_ptr().add(place)));
                        _mm512_fmadd_ps(_mm512_set1_ps(factor), sum, kept)
                    }
                };
                _mm512_storeu_ps(out.as_mut_ptr().add(place), value);
            }
        }
    }
}

/// Transposes a block of 16 by 16, by interleaving pairs of values, then fours, then quarters of registers.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(rows: [__m512; LANES]) -> [__m512; LANES] {
    let mut pairs = rows;
    for (pair, rows) in pairs.chunks_exact_mut(2).zip(rows.chunks_exact(2)) {
        pair[0] = _mm512_unpacklo_ps(rows[0], rows[1]);
        pair[1] = _mm512_unpackhi_ps(rows[0], rows[1]);
    }
    let mut fours = pairs;
    for (four, pairs) in fours.chunks_exact_mut(4).zip(pairs.chunks_exact(4)) {
        let wide = [0, 1, 2, 3].map(|index| _mm512_castps_pd(pairs[index]));
        four[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(wide[0], wide[2]));
        four[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(wide[0], wide[2]));
        four[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(wide[1], wide[3]));
        four[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(wide[1], wide[3]));
    }
    // Now register `4 i + j` has, in its quarter `q`, column `4 q + j` of rows `4 i` to `4 i + 3`.
    let mut out = fours;
    for column in 0..4 {
        let [a, b, c, d] = [0, 4, 8, 12].map(|row| fours[row + column]);
        let (low, high) = (_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0x44>(c, d));
        out[column] = _mm512_shuffle_f32x4::<0x88>(low, high);
        out[column + 4] = _mm512_shuffle_f32x4::<0xdd>(low, high);
        let (low, high) = (_mm512_shuffle_f32x4::<0xee>(a, b), _mm512_shuffle_f32x4::<0xee>(c, d));
        out[column + 8] = _mm512_shuffle_f32x4::<0x88>(low, high);
        out[column + 12] = _mm512_shuffle_f32x4::<0xdd>(low, high);
    }
    out
}

#[cfg(test)]
mod tests {
    use moonlight_simd::testing;

    use super::*;

    fn noise(length: usize, seed: usize) -> Vec<f32> {
        (0..length).map(|index| ((index * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    /// Runs a test at each level of vector instructions that has these kernels.
    fn at_each_level(mut test: impl FnMut() + Send) {
        testing::at_each_level("the products in tiles", |_| {
            if is_available() {
                test();
            }
        });
    }

    #[test]
    fn any_shape_is_packed_tall_and_unpacked_again() {
        at_each_level(any_shape_is_restored);
    }

    fn any_shape_is_restored() {
        for (rows, columns) in [(1, 1), (3, 5), (5, 3), (16, 16), (17, 40), (40, 17), (64, 128), (33, 33)] {
            let matrix = noise(rows * columns, rows);
            let [long, short] = padded(rows, columns);
            let mut packed = vec![f32::NAN; long * short];
            pack(&mut packed, &matrix, rows, columns);
            for (index, value) in packed.iter().enumerate() {
                let (row, column) = (index / short, index % short);
                let (row, column) = if rows > columns { (row, column) } else { (column, row) };
                let expected = if row < rows && column < columns { matrix[row * columns + column] } else { 0.0 };
                assert_eq!(*value, expected, "[{rows}, {columns}]");
            }
            let mut back = vec![f32::NAN; rows * columns];
            unpack(&mut back, &packed, rows, columns);
            assert_eq!(back, matrix);
        }
    }

    #[test]
    fn products_agree_with_f64() {
        at_each_level(compare_products_with_f64);
    }

    fn compare_products_with_f64() {
        for (rows, size) in [(8, 16), (24, 48), (128, 64), (40, 32), (16, 144), (200, 176)] {
            let (x, y) = (noise(rows * size, 1), noise(rows * size, 2));
            // A symmetric result of two operands: x^T y + y^T x.
            let both: Vec<f32> = [&x[..], &y[..]].concat();
            let turned: Vec<f32> = [&y[..], &x[..]].concat();
            let start: Vec<f32> = (0..size * size).map(|index| (index / size + index % size) as f32).collect();
            let mut out = vec![f32::NAN; size * size];
            symmetric(&mut out, &both, &turned, size, Some((&start, 0.5)), 2.0, false);
            let mut gram = vec![f32::NAN; size * size];
            symmetric(&mut gram, &x, &x, size, None, 1.0, true);
            for row in 0..size {
                for column in 0..size {
                    let sum = |left: &[f32], right: &[f32]| -> f64 {
                        let terms = left.chunks(size).zip(right.chunks(size));
                        terms.map(|(left, right)| f64::from(left[row]) * f64::from(right[column])).sum()
                    };
                    let place = row * size + column;
                    let expected = 0.5 * f64::from(start[place]) + 2.0 * sum(&both, &turned);
                    assert!((f64::from(out[place]) - expected).abs() < 1e-3, "[{rows}, {size}]");
                    assert!((f64::from(gram[place]) - sum(&x, &x)).abs() < 1e-4, "[{rows}, {size}]");
                    assert_eq!(out[place], out[column * size + row]);
                }
            }
            let polynomial = noise(size * size, 3);
            let mut moved = vec![f32::NAN; rows * size];
            product(&mut moved, &x, &polynomial, size, false);
            let mut shared = vec![f32::NAN; rows * size];
            product(&mut shared, &x, &polynomial, size, true);
            assert_eq!(moved, shared, "the number of threads changes no bit");
            for row in 0..rows {
                for column in 0..size {
                    let term =
                        |inner: usize| f64::from(x[row * size + inner]) * f64::from(polynomial[inner * size + column]);
                    let expected: f64 = (0..size).map(term).sum();
                    assert!((f64::from(moved[row * size + column]) - expected).abs() < 1e-4, "[{rows}, {size}]");
                }
            }
        }
    }
}
