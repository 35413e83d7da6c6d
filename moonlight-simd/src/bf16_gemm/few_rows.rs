//! Products of few rows, as in decoding. Their cost is reading the right operand, which is read once, in the order of memory, and not
//! packed.

use std::arch::x86_64::{
    _MM_HINT_T1, _mm_prefetch, _mm512_dpbf16_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_epi16,
    _mm512_maskz_loadu_ps, _mm512_permutex2var_epi16, _mm512_set1_epi32, _mm512_setzero_si512,
};

use half::bf16;

use super::MAX_FEW_ROWS;
use super::pack::interleaving;
use super::tile::{WIDTH, pairs};
use crate::transpose::LANES;

/// Pairs of rows of the right operand whose products are added together, so that sums are read and written an eighth as often.
const PAIRS: usize = 4;
const LINES: usize = 2 * PAIRS;

/// [`add_few_rows`](super::add_few_rows) on a processor with AVX512-BF16.
///
/// # Safety
///
/// The processor must have AVX512BW and AVX512-BF16. `sums` must have `width` values for each row, there must be from 1 to
/// [`MAX_FEW_ROWS`] rows, and `weight` must have `width` values for each value of a row.
pub(super) unsafe fn add(sums: &mut [f32], rows: &[&[bf16]], weight: &[bf16], width: usize) {
    let depth = rows[0].len();
    for first in (0..depth).step_by(LINES) {
        let count = LINES.min(depth - first);
        // Each row's pairs of values; those beyond the last are 0.
        let mut factors = [[0_u32; PAIRS]; MAX_FEW_ROWS];
        for (factors, row) in factors.iter_mut().zip(rows) {
            for (index, value) in row[first..first + count].iter().enumerate() {
                factors[index / 2] |= u32::from(value.to_bits()) << (16 * (index % 2));
            }
        }
        let lines = &weight[first * width..(first + count) * width];
        // SAFETY: as the caller ensures.
        unsafe {
            match rows.len() {
                1 => add_lines::<1>(sums, &factors, lines, width),
                2 => add_lines::<2>(sums, &factors, lines, width),
                3 => add_lines::<3>(sums, &factors, lines, width),
                4 => add_lines::<4>(sums, &factors, lines, width),
                5 => add_lines::<5>(sums, &factors, lines, width),
                6 => add_lines::<6>(sums, &factors, lines, width),
                7 => add_lines::<7>(sums, &factors, lines, width),
                _ => add_lines::<8>(sums, &factors, lines, width),
            }
        }
    }
}

/// Adds the products of up to 8 rows of the right operand.
///
/// # Safety
///
/// As for [`add`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn add_lines<const ROWS: usize>(
    sums: &mut [f32],
    factors: &[[u32; PAIRS]; MAX_FEW_ROWS],
    lines: &[bf16],
    width: usize,
) {
    let count = lines.len() / width;
    let [low, high] = interleaving();
    for column in (0..width).step_by(WIDTH) {
        let mask = u32::MAX >> (WIDTH - WIDTH.min(width - column));
        let (low_mask, high_mask) = (mask as u16, (mask >> LANES) as u16);
        // The lines are narrow streams side by side, which the processor does not prefetch well. The next lines are one stream.
        let next = lines.as_ptr().wrapping_add(lines.len() + column * LINES);
        for line in 0..LINES {
            _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(line * WIDTH).cast());
        }
        // SAFETY: the masks select columns below `width` of the lines that exist, and of the sums.
        unsafe {
            let mut registers: [_; ROWS] = std::array::from_fn(|row| {
                let place = sums.as_ptr().add(row * width + column);
                [_mm512_maskz_loadu_ps(low_mask, place), _mm512_maskz_loadu_ps(high_mask, place.wrapping_add(LANES))]
            });
            for pair in 0..count.div_ceil(2) {
                let line =
                    |line: usize| _mm512_maskz_loadu_epi16(mask, lines.as_ptr().add(line * width + column).cast());
                let first = line(2 * pair);
                let second = if 2 * pair + 1 < count { line(2 * pair + 1) } else { _mm512_setzero_si512() };
                let columns = [
                    pairs(_mm512_permutex2var_epi16(first, low, second)),
                    pairs(_mm512_permutex2var_epi16(first, high, second)),
                ];
                for (sums, factors) in registers.iter_mut().zip(factors) {
                    let factor = pairs(_mm512_set1_epi32(factors[pair].cast_signed()));
                    for (sum, columns) in sums.iter_mut().zip(columns) {
                        *sum = _mm512_dpbf16_ps(*sum, factor, columns);
                    }
                }
            }
            for (row, [low, high]) in registers.into_iter().enumerate() {
                let place = sums.as_mut_ptr().add(row * width + column);
                _mm512_mask_storeu_ps(place, low_mask, low);
                _mm512_mask_storeu_ps(place.wrapping_add(LANES), high_mask, high);
            }
        }
    }
}
