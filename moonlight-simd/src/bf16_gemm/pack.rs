//! Copies of operands in the order in which a tile reads them, by lanes of 32 bits: two bf16 that are neighbors along the inner index.

use std::arch::x86_64::{
    _mm512_maskz_loadu_epi16, _mm512_permutex2var_epi16, _mm512_set_epi16, _mm512_setzero_si512, _mm512_store_si512,
};

use half::bf16;

use crate::transpose::{LANES, Line};

/// A strided matrix: element `(outer, inner)` is at `outer * outer_stride + inner * inner_stride`.
#[derive(Clone, Copy)]
pub(super) struct Source {
    pub(super) values: *const bf16,
    pub(super) outer_stride: usize,
    pub(super) inner_stride: usize,
    /// Rows of a left, columns of a right operand.
    pub(super) outer: usize,
    pub(super) inner: usize,
}

impl Source {
    /// A pointer to an element.
    ///
    /// # Safety
    ///
    /// The element must be in the matrix.
    pub(super) unsafe fn at(&self, outer: usize, inner: usize) -> *const bf16 {
        // SAFETY: as the caller ensures.
        unsafe { self.values.add(outer * self.outer_stride + inner * self.inner_stride) }
    }
}

/// Packs a matrix of any strides: lane `(outer, pair)` becomes lane `outer` of line `pair * step`. The last pair of an odd number of
/// inner indices is filled with 0, as are the lanes of the line after the last outer index.
///
/// # Safety
///
/// The matrix must be valid for reads, have at most 16 outer indices, and `out` have the lines.
pub(super) unsafe fn pack_any(source: Source, out: *mut Line, step: usize) {
    for pair in 0..source.inner.div_ceil(2) {
        let mut line = Line::ZERO;
        for (outer, lane) in line.0.iter_mut().enumerate().take(source.outer) {
            // SAFETY: the elements are in the matrix.
            let bits = |inner| unsafe { u32::from((*source.at(outer, inner)).to_bits()) };
            let second = if 2 * pair + 1 < source.inner { bits(2 * pair + 1) } else { 0 };
            *lane = bits(2 * pair) | second << 16;
        }
        // SAFETY: `out` has the line.
        unsafe { out.add(pair * step).write(line) };
    }
}

/// As [`pack_any`], of outer indices that are neighbors. With a `step` of 2 there may be 32: those from 16 on go to the line after.
///
/// # Safety
///
/// As there; and the processor must have AVX512BW.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn pack_lines(source: Source, out: *mut Line, step: usize) {
    let mask = u32::MAX >> (2 * LANES - source.outer);
    // The values of two inner indices in turns: lane i gets value i of the first and value i of the second.
    let low = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1,
        32, 0,
    );
    let high = _mm512_set_epi16(
        63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54, 22, 53, 21, 52, 20, 51, 19, 50, 18,
        49, 17, 48, 16,
    );
    for pair in 0..source.inner.div_ceil(2) {
        // SAFETY: the mask selects outer indices of the matrix; the second row is read only if there is one. `out` has the lines.
        unsafe {
            let first = _mm512_maskz_loadu_epi16(mask, source.at(0, 2 * pair).cast());
            let second = if 2 * pair + 1 < source.inner {
                _mm512_maskz_loadu_epi16(mask, source.at(0, 2 * pair + 1).cast())
            } else {
                _mm512_setzero_si512()
            };
            let place = out.add(pair * step);
            _mm512_store_si512(place.cast(), _mm512_permutex2var_epi16(first, low, second));
            if step == 2 {
                _mm512_store_si512(place.add(1).cast(), _mm512_permutex2var_epi16(first, high, second));
            }
        }
    }
}
