//! Transposed copies of matrices of 32-bit values, on processors with AVX-512.

use std::arch::x86_64::{
    __m512i, _mm512_castpd_si512, _mm512_castps_pd, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_maskz_loadu_epi32,
    _mm512_setzero_si512, _mm512_shuffle_f32x4, _mm512_store_si512, _mm512_unpackhi_pd, _mm512_unpackhi_ps,
    _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};

/// 32-bit lanes of a register.
pub(crate) const LANES: usize = 16;

/// 16 lanes, aligned as a register.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u32; LANES]);

impl Line {
    pub(crate) const ZERO: Self = Self([0; LANES]);
}

/// Transposes rows of lanes, in blocks of 16 by 16: lane `(outer, index)` of the source becomes lane `outer` of line `index * step`. The
/// lanes of a line after the last outer index become 0.
///
/// # Safety
///
/// The `lanes` lanes of each outer index must be valid for reads, `outer` at most 16, and `out` have a line for every `step` of
/// each lane. The processor must have AVX512.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn transpose(
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
