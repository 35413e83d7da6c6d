//! Kernels with NEON: `smull` multiplies signed bytes to 16 bits, `sadalp` adds pairs of these to sums of 32 bits.

use std::arch::aarch64::{
    float32x4_t, int8x16_t, int32x4_t, vandq_u8, vcvtq_f32_s32, vdupq_n_f32, vdupq_n_s32, vdupq_n_u8, vfmaq_f32,
    vget_low_s8, vld1q_f32, vld1q_u8, vmull_high_s8, vmull_s8, vmulq_f32, vpadalq_s16, vpaddq_s32,
    vreinterpretq_s8_s32, vreinterpretq_s8_u8, vshrq_n_u8, vst1q_f32, vsubq_u8,
};

use super::kernel::Part;
use super::{BLOCK, Bits, TILE};

/// Rows whose sums are in registers at once.
pub(super) const MAX_ROWS: usize = 2;

/// The product of up to [`MAX_ROWS`] rows and one tile, into `out`, `[rows, 16]`.
///
/// # Safety
///
/// `part` must describe valid memory for one tile and 1 or 2 `rows`.
pub(super) unsafe fn multiply(part: &Part<'_>, rows: usize, out: &mut [f32]) {
    assert!(out.len() == rows * TILE, "the output has all sums");
    // SAFETY: the caller's promises; NEON is a part of every AArch64 processor that Rust's targets with `std` support.
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

#[target_feature(enable = "neon")]
unsafe fn sums<const R: usize, const FOUR: bool>(part: &Part<'_>, out: &mut [f32]) {
    let Part { blocks, .. } = *part;
    let size = if FOUR { TILE * BLOCK / 2 } else { TILE * BLOCK };
    let (mask, zero) = (vdupq_n_u8(15), vdupq_n_u8(if FOUR { 8 } else { 128 }));
    // Values without their zero point fit signed bytes.
    let signed = |values| vreinterpretq_s8_u8(vsubq_u8(values, zero));
    let mut totals = [[vdupq_n_f32(0.0); 4]; R];
    for block in 0..blocks {
        // SAFETY: `part` has `blocks` blocks for each row, by the caller.
        let values = unsafe { part.values.add(block * size) };
        let x: [*const i8; R] = std::array::from_fn(|row| unsafe { part.x.add((row * blocks + block) * BLOCK) });
        // For each 4 outputs the sums of the lower and of the upper two, each in two parts.
        let mut sums = [[[vdupq_n_s32(0); 2]; 4]; R];
        let mut add = |quad: usize, four: usize, weights: int8x16_t| {
            for (sums, x) in sums.iter_mut().zip(x) {
                // SAFETY: a block of a row has 8 quads of bytes; `read_unaligned` needs no alignment.
                let x = vreinterpretq_s8_s32(vdupq_n_s32(unsafe { x.add(quad * 4).cast::<i32>().read_unaligned() }));
                let [low, high] = &mut sums[four];
                *low = vpadalq_s16(*low, vmull_s8(vget_low_s8(weights), vget_low_s8(x)));
                *high = vpadalq_s16(*high, vmull_high_s8(weights, x));
            }
        };
        for index in 0..size / 16 {
            let (quad, four) = (index / 4, index % 4);
            // SAFETY: a tile and block has `size` bytes.
            let stored = unsafe { vld1q_u8(values.add(index * 16)) };
            if FOUR {
                add(quad, four, signed(vandq_u8(stored, mask)));
                add(quad + 4, four, signed(vshrq_n_u8::<4>(stored)));
            } else {
                add(quad, four, signed(stored));
            }
        }
        let mut scales = [0.0; TILE];
        for (lane, scale) in scales.iter_mut().enumerate() {
            // SAFETY: a tile and block has 16 scales.
            *scale = part.scale_type.widen(unsafe { *part.scales.add(block * TILE + lane) });
        }
        for (row, (totals, sums)) in totals.iter_mut().zip(sums).enumerate() {
            // SAFETY: as above.
            let x_scale = vdupq_n_f32(unsafe { *part.x_scales.add(row * blocks + block) });
            for ((total, [low, high]), scales) in totals.iter_mut().zip(sums).zip(scales.as_chunks::<4>().0) {
                let sum: int32x4_t = vpaddq_s32(low, high);
                // SAFETY: 4 values.
                let scale: float32x4_t = unsafe { vld1q_f32(scales.as_ptr()) };
                *total = vfmaq_f32(*total, vcvtq_f32_s32(sum), vmulq_f32(scale, x_scale));
            }
        }
    }
    for (out, total) in out.as_chunks_mut::<4>().0.iter_mut().zip(totals.as_flattened()) {
        // SAFETY: 4 values.
        unsafe { vst1q_f32(out.as_mut_ptr(), *total) };
    }
}
