//! Kernels with AVX-512 VNNI: `vpdpbusd` multiplies 64 unsigned by 64 signed bytes and adds groups of 4 to 16 integers.
//!
//! The stored values of the weights, with their zero point, are the unsigned bytes. `(value - zero) . x = value . x - zero * sum(x)`, so the
//! integer sums begin at `-zero * sum(x)`.

use std::arch::is_x86_feature_detected;
use std::arch::x86_64::{
    __m256i, __m512, __m512i, _mm256_loadu_si256, _mm512_and_si512, _mm512_castsi512_ps, _mm512_cvtepi32_ps,
    _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_mul_ps,
    _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_srli_epi16,
    _mm512_storeu_ps,
};
use std::sync::OnceLock;

use super::kernel::Part;
use super::{BLOCK, Bits, ScaleType, TILE};

/// Rows whose sums are in registers at once.
pub(super) const MAX_ROWS: usize = 6;
/// Whether the processor has the instructions.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni")
    })
}

/// The product of up to [`MAX_ROWS`] rows and up to 2 tiles, into `out`, `[rows, 16 * tiles]`.
///
/// # Safety
///
/// [`is_available`] must be true, and `part` must describe valid memory for 1 to 6 `rows` and 1 to 2 `tiles`.
pub(super) unsafe fn multiply(part: &Part<'_>, rows: usize, tiles: usize, out: &mut [f32]) {
    assert!(out.len() == rows * tiles * TILE, "the output has all sums");
    macro_rules! run {
        ($($rows:literal)*) => {
            // SAFETY: the caller's promises.
            unsafe {
                match (rows, tiles, part.bits, part.scale_type) {
                    $(
                        ($rows, 1, Bits::Eight, ScaleType::F16) => sums::<$rows, 1, false, false>(part, out),
                        ($rows, 1, Bits::Eight, ScaleType::Bf16) => sums::<$rows, 1, false, true>(part, out),
                        ($rows, 1, Bits::Four, ScaleType::F16) => sums::<$rows, 1, true, false>(part, out),
                        ($rows, 1, Bits::Four, ScaleType::Bf16) => sums::<$rows, 1, true, true>(part, out),
                        ($rows, 2, Bits::Eight, ScaleType::F16) => sums::<$rows, 2, false, false>(part, out),
                        ($rows, 2, Bits::Eight, ScaleType::Bf16) => sums::<$rows, 2, false, true>(part, out),
                        ($rows, 2, Bits::Four, ScaleType::F16) => sums::<$rows, 2, true, false>(part, out),
                        ($rows, 2, Bits::Four, ScaleType::Bf16) => sums::<$rows, 2, true, true>(part, out),
                    )*
                    _ => unreachable!("1 to 6 rows and 1 to 2 tiles"),
                }
            }
        };
    }
    run!(1 2 3 4 5 6);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn sums<const R: usize, const T: usize, const FOUR: bool, const BF16: bool>(part: &Part<'_>, out: &mut [f32]) {
    let Part { blocks, tile_step, .. } = *part;
    let size = if FOUR { TILE * BLOCK / 2 } else { TILE * BLOCK };
    let zero = if FOUR { 8 } else { 128 };
    let mask = _mm512_set1_epi8(15);
    let mut totals = [[_mm512_setzero_ps(); T]; R];
    for block in 0..blocks {
        // SAFETY: `part` has `blocks` blocks for each row and tile, by the caller.
        let values: [*const u8; T] =
            std::array::from_fn(|tile| unsafe { part.values.add((tile * tile_step + block) * size) });
        let x: [*const i8; R] = std::array::from_fn(|row| unsafe { part.x.add((row * blocks + block) * BLOCK) });
        let mut sums: [[__m512i; T]; R] = std::array::from_fn(|row| {
            // SAFETY: as above.
            let sum = unsafe { *part.x_sums.add(row * blocks + block) };
            [_mm512_set1_epi32(-zero * sum); T]
        });
        let mut add = |quad: usize, weights: [__m512i; T]| {
            for (sums, x) in sums.iter_mut().zip(x) {
                // SAFETY: a block of a row has 8 quads of bytes; `read_unaligned` needs no alignment.
                let x = _mm512_set1_epi32(unsafe { x.add(quad * 4).cast::<i32>().read_unaligned() });
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = _mm512_dpbusd_epi32(*sum, weights, x);
                }
            }
        };
        // SAFETY: a tile and block has `size` bytes.
        let load = |quad: usize| values.map(|values| unsafe { _mm512_loadu_si512(values.add(quad * 64).cast()) });
        if FOUR {
            for quad in 0..4 {
                let both = load(quad);
                add(quad, both.map(|both| _mm512_and_si512(both, mask)));
                add(quad + 4, both.map(|both| _mm512_and_si512(_mm512_srli_epi16::<4>(both), mask)));
            }
        } else {
            for quad in 0..8 {
                add(quad, load(quad));
            }
        }
        let scales: [__m512; T] = std::array::from_fn(|tile| {
            // SAFETY: a tile and block has 16 scales.
            let bits =
                unsafe { _mm256_loadu_si256(part.scales.add((tile * tile_step + block) * TILE).cast::<__m256i>()) };
            if BF16 {
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
            } else {
                _mm512_cvtph_ps(bits)
            }
        });
        for (row, (totals, sums)) in totals.iter_mut().zip(sums).enumerate() {
            // SAFETY: as above.
            let x_scale = _mm512_set1_ps(unsafe { *part.x_scales.add(row * blocks + block) });
            for ((total, sum), scale) in totals.iter_mut().zip(sums).zip(scales) {
                *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, x_scale), *total);
            }
        }
    }
    for (out, total) in out.as_chunks_mut::<TILE>().0.iter_mut().zip(totals.as_flattened()) {
        // SAFETY: 16 values.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), *total) };
    }
}
