//! Quantizing rows of a matrix: f32 values to packed integers and their scales.

use half::{bf16, f16};
use moonlight_simd::quant::{BLOCK, Bits, ScaleType, quantize_block};

/// Bytes of the packed values of `count` values, a multiple of [`BLOCK`].
pub(crate) const fn packed_bytes(bits: Bits, count: usize) -> usize {
    match bits {
        Bits::Eight => count,
        Bits::Four => count / 2,
    }
}

/// Quantizes values, whose number is a multiple of [`BLOCK`], to words as in `pack-quantized` and the bits of the scales.
/// Returns whether all scales are finite.
pub(crate) fn quantize(
    weights: &[f32],
    bits: Bits,
    scale_type: ScaleType,
    values: &mut [u8],
    scales: &mut [u16],
) -> bool {
    let mut finite = true;
    let (blocks, _) = weights.as_chunks::<BLOCK>();
    let packed = values.chunks_exact_mut(bits.block_bytes());
    assert!(blocks.len() == scales.len() && packed.len() == scales.len(), "one scale and one block of values a block");
    for ((block, packed), scale) in blocks.iter().zip(packed).zip(scales) {
        let mut codes = [0u8; BLOCK];
        *scale = quantize_block(block, bits, scale_type, &mut codes);
        finite &= scale_type.widen(*scale).is_finite();
        match bits {
            Bits::Eight => packed.copy_from_slice(&codes),
            Bits::Four => {
                let (pairs, _) = codes.as_chunks::<2>();
                packed.iter_mut().zip(pairs).for_each(|(byte, [low, high])| *byte = low | high << 4);
            }
        }
    }
    finite
}

/// Whether stored scales are finite.
pub(crate) fn scales_are_finite(bytes: &[u8], scale_type: ScaleType) -> bool {
    let (pairs, _) = bytes.as_chunks::<2>();
    match scale_type {
        ScaleType::F16 => pairs.iter().all(|pair| f16::from_le_bytes(*pair).is_finite()),
        ScaleType::Bf16 => pairs.iter().all(|pair| bf16::from_le_bytes(*pair).is_finite()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dtype::conversion::RowSource;
    use crate::dtype::quant::{PackedIntegers, Scales};

    proptest! {
        /// What is written is read back as multiples of the scales, off by at most half a scale (two at the ends of the
        /// range of 4 bits).
        #[test]
        fn read_back_values_are_near(
            blocks in prop::collection::vec((prop::collection::vec(-1.0f32..1.0, BLOCK), -30i32..30), 1..5),
            eight: bool,
            f16: bool,
        ) {
            let bits = if eight { Bits::Eight } else { Bits::Four };
            let scale_type = if f16 { ScaleType::F16 } else { ScaleType::Bf16 };
            let range = |exponent: i32| 2f32.powi(if f16 { exponent.clamp(-6, 12) } else { exponent });
            let weights: Vec<f32> =
                blocks.iter().flat_map(|(block, exponent)| block.iter().map(|value| value * range(*exponent))).collect();
            let mut values = vec![0; packed_bytes(bits, weights.len())];
            let mut scales = vec![0; weights.len() / BLOCK];
            prop_assert!(quantize(&weights, bits, scale_type, &mut values, &mut scales));
            let scales: Vec<f32> = scales.iter().map(|scale| scale_type.widen(*scale)).collect();
            let columns = weights.len();
            let read = Scales { first: 0, values: scales.clone() };
            let matrix = PackedIntegers { bits, bytes: &values, first: 0, columns, group: BLOCK, scales: &read };
            let mut back = vec![0.0f32; columns];
            prop_assert!(matrix.read_row(0, 0, &mut back));
            for (at, (back, weight)) in back.iter().zip(&weights).enumerate() {
                let scale = scales[at / BLOCK].abs();
                let most = if eight { 0.51 } else { 2.01 };
                prop_assert!((back - weight).abs() <= most * scale, "{back} {weight} {scale}");
            }
        }
    }

    #[test]
    fn scales_out_of_range_are_found() {
        let (mut values, mut scales) = ([0; BLOCK], [0; 1]);
        let weights = [f32::MAX; BLOCK];
        assert!(!quantize(&weights, Bits::Eight, ScaleType::F16, &mut values, &mut scales));
        assert!(!scales_are_finite(bytemuck::cast_slice(&scales), ScaleType::F16));
        assert!(quantize(&weights, Bits::Eight, ScaleType::Bf16, &mut values, &mut scales));
        assert!(scales_are_finite(bytemuck::cast_slice(&scales), ScaleType::Bf16));
        assert!(quantize(&[0.0; BLOCK], Bits::Four, ScaleType::F16, &mut values[..BLOCK / 2], &mut scales));
        assert_eq!((scales, &values[..BLOCK / 2]), ([0], [0x88; BLOCK / 2].as_slice()));
    }
}
