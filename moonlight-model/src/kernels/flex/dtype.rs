//! [`Element`]: the dtypes of the kernels, f32 and bf16. bf16 is converted to f32 where it is read and rounded where it is written.

use std::mem::MaybeUninit;

use crate::disjoint::BlockMut;
use burn::tensor::bf16;
use moonlight_simd::by_level;

use super::matrix::{Matrix, MatrixMut};

/// A dtype of the kernels. All sums are in f32 and rounded once.
pub(super) trait Element: burn::tensor::Element + bytemuck::Pod {
    /// Rows of a task of a matrix product, which bounds the scratch memory of a thread.
    const ROWS_PER_TASK: usize;
    /// The most columns of such a task.
    const MAX_COLUMNS: usize;

    /// Rounds each value.
    fn rounded(values: Vec<f32>) -> Vec<Self>;

    /// A view in f32 of `rows x columns` from the start of `values`, whose rows are `row_stride` apart. bf16 is converted into
    /// `scratch`; f32 is not copied.
    fn view<'a>(
        values: &'a [Self],
        rows: usize,
        columns: usize,
        row_stride: usize,
        scratch: &'a mut Vec<f32>,
    ) -> Matrix<'a>;

    /// The value in f32, exactly.
    fn wide(self) -> f32;

    /// The nearest value, ties to even. NaN stays NaN.
    fn narrow(wide: f32) -> Self;

    /// Lets `fill` write an f32 matrix of the shape of `target`, and stores it in `target`, rounded. f32 is written in place.
    ///
    /// # Panics
    ///
    /// If `fill` does not write the matrix, so that all of `target` is initialized afterwards.
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
        assert!(out.is_written(), "the matrix was not written");
    }
}

impl Element for bf16 {
    const ROWS_PER_TASK: usize = 256;
    const MAX_COLUMNS: usize = 128;

    fn rounded(values: Vec<f32>) -> Vec<bf16> {
        let mut rounded = Vec::with_capacity(values.len());
        round_into(&values, &mut rounded.spare_capacity_mut()[..values.len()]);
        // SAFETY: the vector has this capacity, and `round_into` wrote every element of a slice of this length.
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

    // Not `bf16::to_f32`, whose branch for NaN keeps loops from being vectorized. A bf16 is the upper half of an f32.
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    // Branchless for the same reason. Adding 0x7fff and the lowest kept bit carries into the kept bits if the dropped bits are above
    // half, or are half and the lowest kept bit is 1.
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
    /// Converts values to f32.
    pub(super) fn widen[E: Element](values: &[E], wide: &mut [f32]) {
        for (wide, value) in wide.iter_mut().zip(values) {
            *wide = value.wide();
        }
    }
}

/// Rounds values into a slice.
///
/// # Panics
///
/// If the slices differ in length.
pub(super) fn round<E: Element>(wide: &[f32], values: &mut [E]) {
    let values: *mut [E] = values;
    // SAFETY: the slice is borrowed for writing, `MaybeUninit<E>` has the layout of `E`, and `round_into` writes initialized
    // values only.
    round_into(wide, unsafe { &mut *(values as *mut [MaybeUninit<E>]) });
}

/// [`round`] into memory that may be uninitialized; afterwards all of it is initialized.
pub(super) fn round_into<E: Element>(wide: &[f32], values: &mut [MaybeUninit<E>]) {
    assert_eq!(wide.len(), values.len(), "the slices differ in length");
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
    fn rounding_is_that_of_bf16() {
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
