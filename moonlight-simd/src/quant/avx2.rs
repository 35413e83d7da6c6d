//! Kernels with AVX2: `vpmaddubsw` multiplies unsigned by signed bytes and adds pairs to 16 bits, `vpmaddwd` adds these to 32 bits.
//!
//! The sum of a pair must fit into 16 bits. Stored values of 4 bits do: `2 * 15 * 127`. Those of 8 bits do not, so the magnitude of a
//! weight, up to 127, is multiplied by the activation with the weight's sign: `2 * 127 * 127`.

use std::arch::is_x86_feature_detected;
use std::arch::x86_64::{
    __m256, __m256i, _mm_loadu_si128, _mm256_abs_epi8, _mm256_add_epi32, _mm256_and_si256, _mm256_castsi256_ps,
    _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_loadu_si256, _mm256_madd_epi16,
    _mm256_maddubs_epi16, _mm256_mul_ps, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setzero_ps, _mm256_sign_epi8, _mm256_slli_epi32, _mm256_srli_epi16, _mm256_storeu_ps, _mm256_xor_si256,
};
use std::sync::OnceLock;

use super::kernel::Part;
use super::{BLOCK, Bits, ScaleType, TILE};

/// Rows whose sums are in registers at once: each has 2 integer and 2 floating-point sums of 8 outputs.
pub(super) const MAX_ROWS: usize = 2;

/// Whether the processor has the instructions.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    })
}

/// The product of up to [`MAX_ROWS`] rows and one tile, into `out`, `[rows, 16]`.
///
/// # Safety
///
/// [`is_available`] must be true, and `part` must describe valid memory for one tile and 1 or 2 `rows`.
pub(super) unsafe fn multiply(part: &Part<'_>, rows: usize, out: &mut [f32]) {
    assert!(out.len() == rows * TILE, "the output has all sums");
    // SAFETY: the caller's promises.
    unsafe {
        match (rows, part.bits) {
            (1, Bits::Eight) => sums::<1, false>(part, out),
            (1, Bits::Four) => sums::<1, true>(part, out),
            (2, Bits::Eight) => sums::<2, false>(part, out),
            (2, Bits::Four) => sums::<2, true>(part, out),
            _ => unreachable!("1 or 2 rows"),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn sums<const R: usize, const FOUR: bool>(part: &Part<'_>, out: &mut [f32]) {
    let Part { blocks, .. } = *part;
    let size = if FOUR { TILE * BLOCK / 2 } else { TILE * BLOCK };
    let (mask, sign, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi8(-128), _mm256_set1_epi16(1));
    let mut totals = [[_mm256_setzero_ps(); 2]; R];
    for block in 0..blocks {
        // SAFETY: `part` has `blocks` blocks for each row, by the caller.
        let values = unsafe { part.values.add(block * size) };
        let x: [*const i8; R] = std::array::from_fn(|row| unsafe { part.x.add((row * blocks + block) * BLOCK) });
        let mut sums: [[__m256i; 2]; R] = std::array::from_fn(|row| {
            // SAFETY: as above.
            let sum = unsafe { *part.x_sums.add(row * blocks + block) };
            // Values of 8 bits are multiplied without their zero point.
            [_mm256_set1_epi32(if FOUR { -8 * sum } else { 0 }); 2]
        });
        let mut add = |quad: usize, half: usize, weights: __m256i| {
            for (sums, x) in sums.iter_mut().zip(x) {
                // SAFETY: a block of a row has 8 quads of bytes; `read_unaligned` needs no alignment.
                let x = _mm256_set1_epi32(unsafe { x.add(quad * 4).cast::<i32>().read_unaligned() });
                let pairs = if FOUR {
                    _mm256_maddubs_epi16(weights, x)
                } else {
                    _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights))
                };
                sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs, ones));
            }
        };
        for index in 0..size / 32 {
            let (quad, half) = (index / 2, index % 2);
            // SAFETY: a tile and block has `size` bytes.
            let stored = unsafe { _mm256_loadu_si256(values.add(index * 32).cast()) };
            if FOUR {
                add(quad, half, _mm256_and_si256(stored, mask));
                add(quad + 4, half, _mm256_and_si256(_mm256_srli_epi16::<4>(stored), mask));
            } else {
                add(quad, half, _mm256_xor_si256(stored, sign));
            }
        }
        let scales: [__m256; 2] = std::array::from_fn(|half| {
            // SAFETY: a tile and block has 16 scales.
            let bits = unsafe { _mm_loadu_si128(part.scales.add(block * TILE + half * 8).cast()) };
            match part.scale_type {
                ScaleType::F16 => _mm256_cvtph_ps(bits),
                ScaleType::Bf16 => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits))),
            }
        });
        for (row, (totals, sums)) in totals.iter_mut().zip(sums).enumerate() {
            // SAFETY: as above.
            let x_scale = _mm256_set1_ps(unsafe { *part.x_scales.add(row * blocks + block) });
            for ((total, sum), scale) in totals.iter_mut().zip(sums).zip(scales) {
                *total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(scale, x_scale), *total);
            }
        }
    }
    for (out, total) in out.as_chunks_mut::<8>().0.iter_mut().zip(totals.as_flattened()) {
        // SAFETY: 8 values.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), *total) };
    }
}
