//! Transposing matrices: Hugging Face stores a projection as `[out, in]`, Burn as `[in, out]`, so that nearly every
//! byte of a checkpoint passes through here.
//!
//! Rows of the source are gathered in a tile that fits into the L1 cache. The tile is written out in squares of
//! [`SIDE`], transposed in registers, one column of the tile after the other. Reads and writes both need this, as
//! measured: rows of either matrix are often a multiple of 4 KiB apart, so that they compete for the few cache lines of
//! one set. The tile takes two complete cache lines from each row of the source, and writes four to each row of the
//! target before it moves to the next.

use std::ops::Range;

use moonlight_model::disjoint::BlockMut;

use crate::dtype::conversion::{Outcome, RowSource, Weight};

/// Columns of the source in a tile.
pub(crate) const WIDTH: usize = 64;
/// Rows of the source in a tile of 2-byte values; half as many for 4-byte values.
pub(crate) const HEIGHT: usize = 128;
/// Rows and columns of a square that is transposed in registers.
const SIDE: usize = 8;

/// Transposes columns of a matrix with `rows` rows, beginning with column `first`, into the rows of `target`.
pub(crate) fn transpose<T: Weight>(source: &impl RowSource<T>, rows: usize, first: usize, target: &mut [T]) -> Outcome {
    assert!(target.len().is_multiple_of(rows.max(1)));
    let columns = first..first + target.len() / rows.max(1);
    let target = BlockMut::new(target, columns.len(), rows, rows);
    transpose_into(source, 0..rows, columns, target)
}

/// Transposes a part of a matrix: its columns become the rows of `target`.
///
/// # Panics
///
/// If `target` does not have the shape of the transposed part.
pub(crate) fn transpose_into<T: Weight>(
    source: &impl RowSource<T>,
    rows: Range<usize>,
    columns: Range<usize>,
    mut target: BlockMut<'_, T>,
) -> Outcome {
    assert!(
        target.rows() == columns.len() && target.columns() == rows.len(),
        "the target is [{}, {}], not [{}, {}]",
        target.rows(),
        target.columns(),
        columns.len(),
        rows.len()
    );
    // A tile has 16 KiB for values of either size.
    let tall = if size_of::<T>() > 2 { HEIGHT / 2 } else { HEIGHT };
    let mut finite = true;
    let mut tile = [T::default(); WIDTH * HEIGHT];
    for left in columns.clone().step_by(WIDTH) {
        let width = WIDTH.min(columns.end - left);
        for top in rows.clone().step_by(tall) {
            let height = tall.min(rows.end - top);
            for (row, line) in tile.chunks_exact_mut(WIDTH).take(height).enumerate() {
                finite &= source.read_row(top + row, left, &mut line[..width]);
            }
            transpose_tile(&tile, width, height, &mut target, left - columns.start, top - rows.start);
        }
    }
    Outcome::from_finite(finite)
}

/// Writes the transpose of a tile's first `width` columns and `height` rows to `target`, beginning at row `first_row` and
/// column `first_column`.
///
/// # Panics
///
/// If the part is empty, or exceeds the tile or the target.
fn transpose_tile<T: Weight>(
    tile: &[T; WIDTH * HEIGHT],
    width: usize,
    height: usize,
    target: &mut BlockMut<'_, T>,
    first_row: usize,
    first_column: usize,
) {
    assert!((1..=WIDTH).contains(&width) && (1..=HEIGHT).contains(&height), "the part is inside the tile");
    assert!(
        first_row + width <= target.rows() && first_column + height <= target.columns(),
        "the part is inside the target"
    );
    let stride = target.row_stride();
    // SAFETY: by both assertions, the target has this row and this column.
    let target = unsafe { target.as_mut_ptr().add(first_row * stride + first_column) };
    let (right, bottom) = (width / SIDE * SIDE, height / SIDE * SIDE);
    for column in (0..right).step_by(SIDE) {
        for row in (0..bottom).step_by(SIDE) {
            // SAFETY: by the two assertions, the square is inside the tile, and its transpose inside the target.
            unsafe {
                transpose_square(tile.as_ptr().add(row * WIDTH + column), target.add(column * stride + row), stride)
            };
        }
    }
    // The edges that do not fill a square.
    for column in 0..width {
        for row in if column < right { bottom } else { 0 }..height {
            // SAFETY: by the second assertion, the place is inside the target.
            unsafe { target.add(column * stride + row).write(tile[row * WIDTH + column]) };
        }
    }
}

/// Transposes a square of [`SIDE`] by [`SIDE`] values.
///
/// # Safety
///
/// `square` can be read at `row * WIDTH + column`, and `target` written at `column * stride + row`, for rows and columns
/// below [`SIDE`].
#[inline(always)]
unsafe fn transpose_square<T: Weight>(square: *const T, target: *mut T, stride: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promises; both handle plain bits.
    unsafe {
        match size_of::<T>() {
            2 => return sse2::transpose_square_16(square.cast(), target.cast(), stride),
            4 => return sse2::transpose_square_32(square.cast(), target.cast(), stride),
            _ => {}
        }
    }
    for column in 0..SIDE {
        for row in 0..SIDE {
            // SAFETY: the caller's promises.
            unsafe { target.add(column * stride + row).write(square.add(row * WIDTH + column).read()) };
        }
    }
}

/// SSE2, which every x86-64 processor has.
#[cfg(target_arch = "x86_64")]
mod sse2 {
    use std::arch::x86_64::*;
    use std::array::from_fn;

    use super::{SIDE, WIDTH};

    /// # Safety
    ///
    /// That of [`transpose_square`](super::transpose_square).
    #[inline(always)]
    pub(super) unsafe fn transpose_square_16(square: *const u16, target: *mut u16, stride: usize) {
        // SAFETY: the caller's promises; neither side need be aligned.
        unsafe {
            let rows: [__m128i; SIDE] = from_fn(|row| _mm_loadu_si128(square.add(row * WIDTH).cast()));
            // Pairs of values from rows 2 i and 2 i + 1, for the left and the right half of the columns.
            let left: [__m128i; 4] = from_fn(|i| _mm_unpacklo_epi16(rows[2 * i], rows[2 * i + 1]));
            let right: [__m128i; 4] = from_fn(|i| _mm_unpackhi_epi16(rows[2 * i], rows[2 * i + 1]));
            for (half, pairs) in [left, right].into_iter().enumerate() {
                // Groups of four values from rows 0 to 3 and 4 to 7, for two columns each.
                let fours = [
                    [_mm_unpacklo_epi32(pairs[0], pairs[1]), _mm_unpacklo_epi32(pairs[2], pairs[3])],
                    [_mm_unpackhi_epi32(pairs[0], pairs[1]), _mm_unpackhi_epi32(pairs[2], pairs[3])],
                ];
                for (quarter, [upper, lower]) in fours.into_iter().enumerate() {
                    let target = target.add((4 * half + 2 * quarter) * stride);
                    _mm_storeu_si128(target.cast(), _mm_unpacklo_epi64(upper, lower));
                    _mm_storeu_si128(target.add(stride).cast(), _mm_unpackhi_epi64(upper, lower));
                }
            }
        }
    }

    /// # Safety
    ///
    /// That of [`transpose_square`](super::transpose_square).
    #[inline(always)]
    pub(super) unsafe fn transpose_square_32(square: *const u32, target: *mut u32, stride: usize) {
        for column in [0, 4] {
            for row in [0, 4] {
                // SAFETY: the caller's promises; neither side need be aligned.
                unsafe {
                    let [a, b, c, d]: [__m128i; 4] =
                        from_fn(|i| _mm_loadu_si128(square.add((row + i) * WIDTH + column).cast()));
                    let upper = [_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b)];
                    let lower = [_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d)];
                    for half in [0, 1] {
                        let target = target.add((column + 2 * half) * stride + row);
                        _mm_storeu_si128(target.cast(), _mm_unpacklo_epi64(upper[half], lower[half]));
                        _mm_storeu_si128(target.add(stride).cast(), _mm_unpackhi_epi64(upper[half], lower[half]));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use moonlight_model::disjoint::DisjointMut;

    use super::*;
    use crate::dtype::conversion::PlainRows;

    fn check<T: Weight>(value: impl Fn(usize) -> T) {
        for (rows, columns) in [(1, 1), (3, 130), (65, 64), (129, 67), (8, 8), (128, 64), (300, 9), (7, 7)] {
            let source: Vec<T> = (0..rows * columns).map(&value).collect();
            let mut target = vec![T::default(); rows * columns];
            // In two parts, as in saving.
            let split = columns / 2;
            let (a, b) = target.split_at_mut(split * rows);
            let lines = PlainRows::<T>::new(bytemuck::cast_slice(&source), columns);
            assert_eq!(transpose(&lines, rows, 0, a), Outcome::Finite);
            assert_eq!(transpose(&lines, rows, split, b), Outcome::Finite);
            let check_transposed = |target: &[T]| {
                for row in 0..rows {
                    for column in 0..columns {
                        let (got, put) = (target[column * rows + row], source[row * columns + column]);
                        assert_eq!(bytemuck::bytes_of(&got), bytemuck::bytes_of(&put), "{rows} x {columns}");
                    }
                }
            };
            check_transposed(&target);
            // In bands of rows, as in loading.
            target.fill(T::default());
            let shared = DisjointMut::new(&mut target);
            for first in (0..rows).step_by(50) {
                let last = rows.min(first + 50);
                // SAFETY: no two bands share an element.
                let band = unsafe { shared.block(rows, 0..columns, first..last) };
                assert_eq!(transpose_into(&lines, first..last, 0..columns, band), Outcome::Finite);
            }
            shared.finish();
            check_transposed(&target);
        }
    }

    #[test]
    fn odd_shapes_are_transposed_in_parts() {
        check(|i| i as f32);
        check(|i| bf16::from_bits(i as u16 % 0x7f80));
        check(|i| f16::from_bits(i as u16 % 0x7c00));
    }

    #[test]
    #[should_panic(expected = "exceed a buffer of 11")]
    fn nothing_is_written_past_the_end() {
        let source = [1.0f32; 12];
        let mut target = [0.0f32; 11];
        let shared = DisjointMut::new(&mut target);
        // SAFETY: it is the only claim.
        let target = unsafe { shared.block(3, 0..4, 0..3) };
        let _ = transpose_into(&PlainRows::<f32>::new(bytemuck::cast_slice(&source), 4), 0..3, 0..4, target);
    }

    #[test]
    #[should_panic(expected = "the target is [4, 2], not [4, 3]")]
    fn a_target_of_another_shape_is_refused() {
        let source = [1.0f32; 12];
        let mut target = [0.0f32; 11];
        let target = BlockMut::new(&mut target, 4, 2, 3);
        let _ = transpose_into(&PlainRows::<f32>::new(bytemuck::cast_slice(&source), 4), 0..3, 0..4, target);
    }
}
