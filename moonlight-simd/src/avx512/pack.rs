//! Copies of operands in the order in which a tile reads them, by lanes of 32 bits: one f32, or two bf16 that are neighbors along the
//! inner index.

use std::arch::x86_64::{
    __m512i, _mm512_castpd_si512, _mm512_castps_pd, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_maskz_loadu_epi16,
    _mm512_maskz_loadu_epi32, _mm512_permutex2var_epi16, _mm512_set_epi16, _mm512_setzero_si512, _mm512_shuffle_f32x4,
    _mm512_store_si512, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};

use super::tile::LANES;

/// 16 lanes, aligned as a register.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u32; LANES]);

impl Line {
    pub(super) const ZERO: Self = Self([0; LANES]);
}

/// A strided matrix of values: element `(outer, inner)` is at `outer * outer_stride + inner * inner_stride`.
pub(super) struct Source<T> {
    pub(super) values: *const T,
    pub(super) outer_stride: usize,
    pub(super) inner_stride: usize,
    /// Rows of a left, columns of a right operand.
    pub(super) outer: usize,
    pub(super) inner: usize,
}

impl<T> Clone for Source<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Source<T> {}

impl<T> Source<T> {
    /// A pointer to an element.
    ///
    /// # Safety
    ///
    /// The element must be in the matrix.
    pub(super) unsafe fn at(&self, outer: usize, inner: usize) -> *const T {
        // SAFETY: as the caller ensures.
        unsafe { self.values.add(outer * self.outer_stride + inner * self.inner_stride) }
    }
}

/// Packs one value after the other, of any strides: 16 columns of outer indices at `out`, a line for every `step` lines, for each
/// inner lane.
///
/// # Safety
///
/// The matrix must be valid for reads, have at most 16 outer indices, and `out` have a line for every `step` of each inner lane.
pub(super) unsafe fn pack_any<T: Copy, const PER_LANE: usize>(
    source: Source<T>,
    out: *mut Line,
    step: usize,
    lane: fn(T, Option<T>) -> u32,
) {
    for index in 0..source.inner.div_ceil(PER_LANE) {
        let mut line = Line::ZERO;
        for (outer, place) in line.0.iter_mut().enumerate().take(source.outer) {
            let inner = index * PER_LANE;
            // SAFETY: the elements are in the matrix.
            unsafe {
                let second =
                    (inner + 1 < source.inner && PER_LANE == 2).then(|| source.at(outer, inner + 1).read_unaligned());
                *place = lane(source.at(outer, inner).read_unaligned(), second);
            }
        }
        // SAFETY: `out` has the line.
        unsafe { out.add(index * step).write(line) };
    }
}

/// As [`pack_any`], of f32 whose outer indices are neighbors.
///
/// # Safety
///
/// As there; and the processor must have AVX512.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn pack_f32_lines(source: Source<f32>, out: *mut Line, step: usize) {
    let mask = u16::MAX >> (LANES - source.outer);
    for inner in 0..source.inner {
        // SAFETY: the mask selects outer indices of the matrix.
        unsafe {
            let values = _mm512_maskz_loadu_epi32(mask, source.at(0, inner).cast());
            _mm512_store_si512(out.add(inner * step).cast(), values);
        }
    }
}

/// As [`pack_any`], of at most 32 columns of bf16 whose outer indices are neighbors: two lines side by side for each pair of inner
/// indices, or one if `step` is 1.
///
/// # Safety
///
/// As there; and the processor must have AVX512BW.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn pack_bf16_lines(source: Source<u16>, out: *mut Line, step: usize) {
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

/// Packs whole lanes that are neighbors along the inner index, by transposing blocks of 16 by 16: lane `(outer, index)` of the source
/// is lane `outer` of line `index * step`.
///
/// # Safety
///
/// The `lanes` lanes of each outer index must be valid for reads, `outer` at most 16, and `out` have a line for every `step` of
/// each lane. The processor must have AVX512.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn pack_transposed(
    source: *const u8,
    outer_bytes: usize,
    outer: usize,
    lanes: usize,
    out: *mut Line,
    step: usize,
) {
    for first in (0..lanes).step_by(LANES) {
        let count = LANES.min(lanes - first);
        let mask = u16::MAX >> (LANES - count);
        let mut block = [_mm512_setzero_si512(); LANES];
        for (index, register) in block.iter_mut().enumerate().take(outer) {
            // SAFETY: the mask selects lanes of the source.
            *register = unsafe { _mm512_maskz_loadu_epi32(mask, source.add(index * outer_bytes + 4 * first).cast()) };
        }
        let block = transposed(block);
        for (index, register) in block.into_iter().enumerate().take(count) {
            // SAFETY: `out` has the line.
            unsafe { _mm512_store_si512(out.add((first + index) * step).cast(), register) };
        }
    }
}

/// The transposed 16 by 16 block.
#[target_feature(enable = "avx512f")]
#[inline]
fn transposed(block: [__m512i; LANES]) -> [__m512i; LANES] {
    let block = block.map(|register| _mm512_castsi512_ps(register));
    // In each group of four lanes, a 4 by 4 block of rows 4i.. becomes transposed.
    let mut quarters = [_mm512_castsi512_ps(_mm512_setzero_si512()); LANES];
    for group in 0..4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|index| block[4 * group + index]);
        let (ab_low, ab_high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let (cd_low, cd_high) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        let pairs = [(ab_low, cd_low), (ab_high, cd_high)];
        for (half, (ab, cd)) in pairs.into_iter().enumerate() {
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            quarters[4 * group + 2 * half] = _mm512_castsi512_ps(_mm512_castpd_si512(_mm512_unpacklo_pd(ab, cd)));
            quarters[4 * group + 2 * half + 1] = _mm512_castsi512_ps(_mm512_castpd_si512(_mm512_unpackhi_pd(ab, cd)));
        }
    }
    // `quarters[4 * group + column]` has that column of the rows of the group, for columns `column + 4 * part` in each part.
    let mut out = [_mm512_setzero_si512(); LANES];
    for column in 0..4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|group| quarters[4 * group + column]);
        let (ab_even, ab_odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        let (cd_even, cd_odd) = (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
        out[column] = _mm512_castps_si512(_mm512_shuffle_f32x4::<0x88>(ab_even, cd_even));
        out[column + 8] = _mm512_castps_si512(_mm512_shuffle_f32x4::<0xdd>(ab_even, cd_even));
        out[column + 4] = _mm512_castps_si512(_mm512_shuffle_f32x4::<0x88>(ab_odd, cd_odd));
        out[column + 12] = _mm512_castps_si512(_mm512_shuffle_f32x4::<0xdd>(ab_odd, cd_odd));
    }
    out
}
