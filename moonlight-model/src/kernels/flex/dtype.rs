//! [`Element`]: the dtypes of the kernels, f32 and bf16. Products of bf16 are computed in bf16 where the processor can
//! ([`moonlight_simd::bf16_gemm`]); elsewhere bf16 is converted to f32 where it is read and rounded where it is written.

use std::mem::MaybeUninit;

use burn::tensor::bf16;
use moonlight_simd::bf16_gemm::{self, Output};
use moonlight_simd::gemm::{self, Operand};
use moonlight_simd::{by_level, round_to_bf16};

use super::gemv;

/// A dtype of the kernels. All sums are in f32 and rounded once.
pub(super) trait Element: burn::tensor::Element + bytemuck::Pod {
    /// Rounds each value.
    fn rounded(values: Vec<f32>) -> Vec<Self>;

    /// The operand of a product with these values: each is rounded into `scratch`, f32 is not copied.
    fn operand<'a>(values: &'a [f32], scratch: &'a mut Vec<Self>) -> &'a [Self];

    /// `out = keep * out + factor * lhs * rhs` in f32, on the calling thread. `lhs` is `[rows, depth]`, `rhs` `[depth, columns]`, and
    /// `out` `[rows, columns]` with rows `stride` values apart.
    ///
    /// # Safety
    ///
    /// As for [`gemm::multiply`].
    unsafe fn multiply(
        shape: [usize; 3],
        out: *mut f32,
        stride: usize,
        lhs: Operand<Self>,
        rhs: Operand<Self>,
        keep: f32,
        factor: f32,
    );

    /// `out = lhs * rhs`, rounded; `out` may be uninitialized.
    ///
    /// # Safety
    ///
    /// As for [`gemm::multiply`].
    unsafe fn multiply_into(shape: [usize; 3], out: *mut Self, stride: usize, lhs: Operand<Self>, rhs: Operand<Self>);

    /// Adds to `sums`, `[rows, width]`, the product of few `rows` and `weight`, `[length of a row, width]`, which is read once, in the
    /// order of memory.
    fn add_product(sums: &mut [f32], rows: &[&[Self]], weight: &[Self], width: usize);

    /// The value in f32, exactly.
    fn wide(self) -> f32;

    /// The nearest value, ties to even. NaN stays NaN.
    fn narrow(wide: f32) -> Self;
}

impl Element for f32 {
    fn rounded(values: Vec<f32>) -> Vec<f32> {
        values
    }

    fn operand<'a>(values: &'a [f32], _scratch: &'a mut Vec<f32>) -> &'a [f32] {
        values
    }

    unsafe fn multiply(
        shape: [usize; 3],
        out: *mut f32,
        stride: usize,
        lhs: Operand<f32>,
        rhs: Operand<f32>,
        keep: f32,
        factor: f32,
    ) {
        // SAFETY: as the caller ensures.
        unsafe { gemm::multiply(shape, out, stride, lhs, rhs, keep, factor) };
    }

    unsafe fn multiply_into(shape: [usize; 3], out: *mut f32, stride: usize, lhs: Operand<f32>, rhs: Operand<f32>) {
        // SAFETY: as the caller ensures; with a `keep` of 0 the result is not read.
        unsafe { gemm::multiply(shape, out, stride, lhs, rhs, 0.0, 1.0) };
    }

    fn add_product(sums: &mut [f32], rows: &[&[f32]], weight: &[f32], width: usize) {
        gemv::add_product(sums, rows, weight, width);
    }

    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(wide: f32) -> f32 {
        wide
    }
}

impl Element for bf16 {
    fn rounded(values: Vec<f32>) -> Vec<bf16> {
        let mut rounded = Vec::with_capacity(values.len());
        round_into(&values, &mut rounded.spare_capacity_mut()[..values.len()]);
        // SAFETY: the vector has this capacity, and `round_into` wrote every element of a slice of this length.
        unsafe { rounded.set_len(values.len()) };
        rounded
    }

    fn operand<'a>(values: &'a [f32], scratch: &'a mut Vec<bf16>) -> &'a [bf16] {
        scratch.resize(scratch.len().max(values.len()), bf16::ZERO);
        let rounded = &mut scratch[..values.len()];
        round(values, rounded);
        rounded
    }

    unsafe fn multiply(
        shape: [usize; 3],
        out: *mut f32,
        stride: usize,
        lhs: Operand<bf16>,
        rhs: Operand<bf16>,
        keep: f32,
        factor: f32,
    ) {
        // SAFETY: as the caller ensures.
        unsafe { bf16_gemm::multiply(shape, Output::F32 { values: out, keep, factor }, stride, lhs, rhs) };
    }

    unsafe fn multiply_into(shape: [usize; 3], out: *mut bf16, stride: usize, lhs: Operand<bf16>, rhs: Operand<bf16>) {
        // SAFETY: as the caller ensures.
        unsafe { bf16_gemm::multiply(shape, Output::Bf16 { values: out, factor: 1.0 }, stride, lhs, rhs) };
    }

    fn add_product(sums: &mut [f32], rows: &[&[bf16]], weight: &[bf16], width: usize) {
        if bf16_gemm::is_native() {
            bf16_gemm::add_few_rows(sums, rows, weight, width);
        } else {
            gemv::add_product(sums, rows, weight, width);
        }
    }

    // Not `bf16::to_f32`, whose branch for NaN keeps loops from being vectorized. A bf16 is the upper half of an f32.
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(wide: f32) -> bf16 {
        round_to_bf16(wide)
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
