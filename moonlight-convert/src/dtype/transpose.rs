//! Turning matrices: Hugging Face stores a projection as `[out, in]`, Burn as `[in, out]`, so nearly every byte of a
//! checkpoint comes through here.
//!
//! Lines of the source are gathered in a tile that stays in the first-level cache, and leave it in squares of [`SIDE`] that
//! are turned in registers, the columns of the tile one after the other. Both sides of the way have been found to matter:
//! rows of either matrix are often a multiple of 4 KiB apart, and a cache keeps only a few lines that are. The tile takes
//! two whole cache lines of each row of the source, and hands four to each row of the target, before it goes on.

use std::marker::PhantomData;
use std::ops::Range;

use crate::dtype::conversion::{Outcome, RowSource, Weight};

/// Columns of a tile.
pub(crate) const WIDTH: usize = 64;
/// Rows of a tile of values of two bytes. There are half as many of four.
pub(crate) const HEIGHT: usize = 128;
/// Rows and columns of what is turned in registers.
const SIDE: usize = 8;

/// Columns of a matrix of `rows` rows, from column `first` on, as the rows of `target`, as many as it holds.
pub(crate) fn transpose<T: Weight>(source: &impl RowSource<T>, rows: usize, first: usize, target: &mut [T]) -> Outcome {
    assert!(target.len().is_multiple_of(rows.max(1)));
    let columns = first..first + target.len() / rows.max(1);
    let target = Shared::new(target);
    // SAFETY: nobody else has the target.
    unsafe { target.turn(source, 0..rows, columns, 0, rows) }
}

/// Values that several threads write, each to places of its own.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    length: usize,
    values: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]`, and whoever writes through it promises that nobody else writes there.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T: Weight> Shared<'a, T> {
    pub(crate) fn new(values: &'a mut [T]) -> Self {
        Self { start: values.as_mut_ptr(), length: values.len(), values: PhantomData }
    }

    /// Some of the values.
    ///
    /// # Safety
    ///
    /// Nobody else has any of them meanwhile.
    #[expect(clippy::mut_from_ref, reason = "what it stands for is exclusive, and the caller divides it")]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.length);
        // SAFETY: the range lies inside, and the caller promises that it is theirs.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// A part of a matrix, transposed: the first column's first value goes to `at`, the one below it after it, the
    /// one beside it `stride` further.
    ///
    /// # Safety
    ///
    /// Nobody else reads or writes these places meanwhile.
    pub(crate) unsafe fn turn(
        &self,
        source: &impl RowSource<T>,
        rows: Range<usize>,
        columns: Range<usize>,
        at: usize,
        stride: usize,
    ) -> Outcome {
        if rows.is_empty() || columns.is_empty() {
            return Outcome::Finite;
        }
        assert!(rows.len() <= stride && at + (columns.len() - 1) * stride + rows.len() <= self.length);
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
                // SAFETY: the last of the places that the tile goes to lies inside by the assertion above, and the caller
                // promises that they are theirs.
                unsafe {
                    let target = self.start.add(at + (left - columns.start) * stride + (top - rows.start));
                    turn_tile(&tile, width, height, target, stride);
                }
            }
        }
        Outcome::of(finite)
    }
}

/// # Safety
///
/// `target` can be written at `column * stride + row` for each of the tile's values.
unsafe fn turn_tile<T: Weight>(tile: &[T; WIDTH * HEIGHT], width: usize, height: usize, target: *mut T, stride: usize) {
    assert!(width <= WIDTH && height <= HEIGHT);
    let (right, bottom) = (width / SIDE * SIDE, height / SIDE * SIDE);
    for column in (0..right).step_by(SIDE) {
        for row in (0..bottom).step_by(SIDE) {
            // SAFETY: the square lies inside the tile, and what it is turned into where the caller says.
            unsafe { turn_square(tile.as_ptr().add(row * WIDTH + column), target.add(column * stride + row), stride) };
        }
    }
    for column in 0..width {
        for row in if column < right { bottom } else { 0 }..height {
            // SAFETY: as above.
            unsafe { target.add(column * stride + row).write(tile[row * WIDTH + column]) };
        }
    }
}

/// # Safety
///
/// `square` can be read at `row * WIDTH + column`, and `target` written at `column * stride + row`, for rows and columns
/// below [`SIDE`].
#[inline(always)]
unsafe fn turn_square<T: Weight>(square: *const T, target: *mut T, stride: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promises; both handle plain bits.
    unsafe {
        match size_of::<T>() {
            2 => return sse2::turn_square_of_2(square.cast(), target.cast(), stride),
            4 => return sse2::turn_square_of_4(square.cast(), target.cast(), stride),
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

/// What every x86-64 has.
#[cfg(target_arch = "x86_64")]
mod sse2 {
    use std::arch::x86_64::*;
    use std::array::from_fn;

    use super::{SIDE, WIDTH};

    /// # Safety
    ///
    /// That of [`turn_square`](super::turn_square).
    #[inline(always)]
    pub(super) unsafe fn turn_square_of_2(square: *const u16, target: *mut u16, stride: usize) {
        // SAFETY: the caller's promises; neither side need be aligned.
        unsafe {
            let rows: [__m128i; SIDE] = from_fn(|row| _mm_loadu_si128(square.add(row * WIDTH).cast()));
            // Pairs of values of rows 2 i and 2 i + 1, of the left and of the right half of the columns.
            let left: [__m128i; 4] = from_fn(|i| _mm_unpacklo_epi16(rows[2 * i], rows[2 * i + 1]));
            let right: [__m128i; 4] = from_fn(|i| _mm_unpackhi_epi16(rows[2 * i], rows[2 * i + 1]));
            for (half, pairs) in [left, right].into_iter().enumerate() {
                // Fours of rows 0 to 3 and 4 to 7, of two columns each.
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
    /// That of [`turn_square`](super::turn_square).
    #[inline(always)]
    pub(super) unsafe fn turn_square_of_4(square: *const u32, target: *mut u32, stride: usize) {
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

    use super::*;
    use crate::dtype::conversion::PlainRows;

    fn check<T: Weight>(value: impl Fn(usize) -> T) {
        for (rows, columns) in [(1, 1), (3, 130), (65, 64), (129, 67), (8, 8), (128, 64), (300, 9), (7, 7)] {
            let source: Vec<T> = (0..rows * columns).map(&value).collect();
            let mut target = vec![T::default(); rows * columns];
            // In two parts, as saving does.
            let split = columns / 2;
            let (a, b) = target.split_at_mut(split * rows);
            let lines = PlainRows::<T>::new(bytemuck::cast_slice(&source), columns);
            assert_eq!(transpose(&lines, rows, 0, a), Outcome::Finite);
            assert_eq!(transpose(&lines, rows, split, b), Outcome::Finite);
            let turned = |target: &[T]| {
                for row in 0..rows {
                    for column in 0..columns {
                        let (got, put) = (target[column * rows + row], source[row * columns + column]);
                        assert_eq!(bytemuck::bytes_of(&got), bytemuck::bytes_of(&put), "{rows} x {columns}");
                    }
                }
            };
            turned(&target);
            // In bands of rows, as loading does.
            target.fill(T::default());
            let shared = Shared::new(&mut target);
            for first in (0..rows).step_by(50) {
                let last = rows.min(first + 50);
                // SAFETY: there is one thread.
                let outcome = unsafe { shared.turn(&lines, first..last, 0..columns, first, rows) };
                assert_eq!(outcome, Outcome::Finite);
            }
            turned(&target);
        }
    }

    #[test]
    fn awkward_shapes_in_parts() {
        check(|i| i as f32);
        check(|i| bf16::from_bits(i as u16 % 0x7f80));
        check(|i| f16::from_bits(i as u16 % 0x7c00));
    }

    #[test]
    #[should_panic(expected = "self.length")]
    fn nothing_is_written_behind_the_end() {
        let source = [1.0f32; 12];
        let mut target = [0.0f32; 11];
        let shared = Shared::new(&mut target);
        // SAFETY: there is one thread.
        let _ = unsafe { shared.turn(&PlainRows::<f32>::new(bytemuck::cast_slice(&source), 4), 0..3, 0..4, 0, 3) };
    }
}
