//! The dtypes of tensors that the kernels take: f32, and bf16, which is widened where it is read and rounded where it is
//! written.

use std::mem::MaybeUninit;

use crate::disjoint::BlockMut;
use burn::tensor::bf16;
use moonlight_simd::by_level;

use super::matrix::{Matrix, MatrixMut};

/// A type of values that the kernels take. Sums are carried in f32 and rounded once.
pub(super) trait Element: burn::tensor::Element + bytemuck::Pod {
    /// Rows that a task takes at a time, which bounds its scratch memory.
    const ROWS_PER_TASK: usize;
    /// Columns that a task takes at a time at most, for the same reason.
    const MAX_COLUMNS: usize;

    /// The values, each rounded once.
    fn rounded(values: Vec<f32>) -> Vec<Self>;

    /// The view of `rows x columns` that begins at the start of `values`, whose rows lie `row_stride` apart; `scratch` is
    /// there for a copy.
    fn view<'a>(
        values: &'a [Self],
        rows: usize,
        columns: usize,
        row_stride: usize,
        scratch: &'a mut Vec<f32>,
    ) -> Matrix<'a>;

    /// The value in f32.
    fn wide(self) -> f32;

    /// The nearest value, ties to even; NaN stays NaN.
    fn narrow(wide: f32) -> Self;

    /// Writes to `target` what `fill` puts into an f32 view of its shape.
    ///
    /// # Panics
    ///
    /// When `fill` leaves the view unwritten, so every element of `target` holds a value afterwards.
    fn write(target: BlockMut<'_, MaybeUninit<Self>>, scratch: &mut Vec<f32>, fill: impl FnOnce(&mut MatrixMut<'_>));
}

impl Element for f32 {
    const ROWS_PER_TASK: usize = 2048;
    const MAX_COLUMNS: usize = 512;

    fn rounded(values: Vec<f32>) -> Vec<f32> {
        values
    }

    fn view<'a>(
        values: &'a [f32],
        rows: usize,
        columns: usize,
        row_stride: usize,
        _scratch: &'a mut Vec<f32>,
    ) -> Matrix<'a> {
        Matrix::strided(values, rows, columns, row_stride)
    }

    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(wide: f32) -> f32 {
        wide
    }

    fn write(target: BlockMut<'_, MaybeUninit<f32>>, _scratch: &mut Vec<f32>, fill: impl FnOnce(&mut MatrixMut<'_>)) {
        let mut out = MatrixMut::unwritten(target);
        fill(&mut out);
        assert!(out.is_written(), "the view was not filled");
    }
}

impl Element for bf16 {
    const ROWS_PER_TASK: usize = 256;
    const MAX_COLUMNS: usize = 128;

    fn rounded(values: Vec<f32>) -> Vec<bf16> {
        let mut rounded = Vec::with_capacity(values.len());
        round_into(&values, &mut rounded.spare_capacity_mut()[..values.len()]);
        // SAFETY: there is the capacity, and `round_into` wrote a value to each place of a slice of this length.
        unsafe { rounded.set_len(values.len()) };
        rounded
    }

    fn view<'a>(
        values: &'a [bf16],
        rows: usize,
        columns: usize,
        row_stride: usize,
        scratch: &'a mut Vec<f32>,
    ) -> Matrix<'a> {
        scratch.resize(scratch.len().max(rows * columns), 0.0);
        for (row, wide) in scratch.chunks_exact_mut(columns).take(rows).enumerate() {
            widen(&values[row * row_stride..][..columns], wide);
        }
        Matrix::new(scratch, rows, columns)
    }

    // `bf16::to_f32` looks for NaN, which keeps a loop from being vectorised.
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    // Without a branch, for the same reason.
    #[inline(always)]
    fn narrow(wide: f32) -> bf16 {
        let bits = wide.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
        bf16::from_bits(if wide.is_nan() { 0x7fc0 } else { rounded })
    }

    fn write(
        mut target: BlockMut<'_, MaybeUninit<bf16>>,
        scratch: &mut Vec<f32>,
        fill: impl FnOnce(&mut MatrixMut<'_>),
    ) {
        let (rows, columns) = (target.rows(), target.columns());
        scratch.resize(scratch.len().max(rows * columns), 0.0);
        let tile = &mut scratch[..rows * columns];
        fill(&mut MatrixMut::strided(tile, rows, columns, columns));
        for (row, wide) in tile.chunks_exact(columns).enumerate() {
            round_into(wide, target.row(row));
        }
    }
}

by_level! {
    /// Writes the values in f32.
    pub(super) fn widen[E: Element](values: &[E], wide: &mut [f32]) {
        for (wide, value) in wide.iter_mut().zip(values) {
            *wide = value.wide();
        }
    }
}

/// Writes the values, each rounded once.
///
/// # Panics
///
/// When the slices differ in length.
pub(super) fn round<E: Element>(wide: &[f32], values: &mut [E]) {
    let values: *mut [E] = values;
    // SAFETY: the slice is borrowed for writing, and `round_into` writes values alone, which `MaybeUninit` has the layout of.
    round_into(wide, unsafe { &mut *(values as *mut [MaybeUninit<E>]) });
}

/// As [`round`], into memory that need not hold values yet: afterwards all of it does.
pub(super) fn round_into<E: Element>(wide: &[f32], values: &mut [MaybeUninit<E>]) {
    assert_eq!(wide.len(), values.len(), "each value has a place");
    round_each(wide, values);
}

by_level! {
    fn round_each[E: Element](wide: &[f32], values: &mut [MaybeUninit<E>]) {
        for (value, &wide) in values.iter_mut().zip(wide) {
            value.write(E::narrow(wide));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_type() {
        moonlight_simd::testing::at_each_level("kernels: rounding", |_| rounding());
    }

    fn rounding() {
        let wide = [0.0, -0.0, 1.0, 1.003_906_2, 1.011_718_8, -3.4e38, f32::MAX, f32::INFINITY, 1e-40, f32::NAN];
        let values = bf16::rounded(wide.to_vec());
        for (&wide, &value) in wide.iter().zip(&values) {
            let expected = bf16::from_f32(wide);
            assert!(value == expected || (value.is_nan() && expected.is_nan()), "{wide}: {value} and not {expected}");
        }
        let mut back = [0.0; 10];
        widen(&values, &mut back);
        assert_eq!(back[..9].iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>(), values[..9]);
    }
}
