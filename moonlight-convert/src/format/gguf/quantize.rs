//! Quantizing rows into blocks, bit for bit as the reference quantizers of llama.cpp (`ggml/src/ggml-quants.c`,
//! `quantize_row_*_ref`), which `llama-quantize` uses for a model without an importance matrix.
//!
//! This file has the types with one scale for 32 values; `quantize_k.rs` has those with blocks of 256.

use half::f16;

use super::block::BlockType;
use super::quantize_k;

/// Values of a block with one scale.
const BLOCK: usize = 32;

/// Quantizes complete blocks into their bytes. Returns whether every scale is finite in f16: if not, values are outside the range
/// of the type.
///
/// # Panics
///
/// If the lengths do not fit, or the type is not quantized.
pub(crate) fn quantize(block_type: BlockType, values: &[f32], target: &mut [u8]) -> bool {
    assert_eq!(
        values.len() / block_type.values() * block_type.bytes(),
        target.len(),
        "the target has the blocks' size"
    );
    assert!(values.len().is_multiple_of(block_type.values()), "rows have complete blocks");
    match block_type {
        BlockType::Q4_0 => blocks::<18>(values, target, q4_0),
        BlockType::Q5_0 => blocks::<22>(values, target, q5_0),
        BlockType::Q5_1 => blocks::<24>(values, target, q5_1),
        BlockType::Q8_0 => blocks::<34>(values, target, q8_0),
        BlockType::Q4K | BlockType::Q5K | BlockType::Q6K => quantize_k::quantize(block_type, values, target),
        other => panic!("{other} is not written"),
    }
}

fn blocks<const BYTES: usize>(
    values: &[f32],
    target: &mut [u8],
    quantize: impl Fn(&[f32; BLOCK], &mut [u8; BYTES]) -> bool,
) -> bool {
    let (values, _) = values.as_chunks::<BLOCK>();
    let (blocks, _) = target.as_chunks_mut::<BYTES>();
    values.iter().zip(blocks).fold(true, |finite, (values, block)| quantize(values, block) && finite)
}

/// Writes a scale as f16; returns whether it is finite.
pub(super) fn put_scale(scale: f32, target: &mut [u8]) -> bool {
    let scale = f16::from_f32(scale);
    target.copy_from_slice(&scale.to_le_bytes());
    scale.is_finite()
}

/// The inverse of a scale; 0 for 0.
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// Half a unit less than one half. Added before truncation, it rounds halves away from zero as C's `roundf` does, without a
/// branch; with one half itself, the sum with the number before it would round up to 1.
const BEFORE_HALF: f32 = 0.499_999_97;

/// f16 `max |x| / 127`, then 32 integers `x / scale`.
fn q8_0(values: &[f32; BLOCK], block: &mut [u8; 34]) -> bool {
    let largest = largest_magnitude(values);
    let scale = largest / 127.0;
    // An infinite inverse of a scale that is 0 in f16 gives zeros, as C's conversion of an infinity does on x86.
    let inverse = if inverse(scale).is_finite() { inverse(scale) } else { 0.0 };
    let (head, quants) = block.split_at_mut(2);
    for (quant, value) in quants.iter_mut().zip(values) {
        let scaled = value * inverse;
        *quant = (scaled + BEFORE_HALF.copysign(scaled)) as i32 as i8 as u8;
    }
    put_scale(scale, head)
}

/// f16 scale `x / -8` of the value with the largest magnitude, which becomes -8; then 16 bytes with two values each.
fn q4_0(values: &[f32; BLOCK], block: &mut [u8; 18]) -> bool {
    let scale = of_largest_magnitude(values) / -8.0;
    let inverse = inverse(scale);
    let (head, quants) = block.split_at_mut(2);
    let (low, high) = values.split_at(BLOCK / 2);
    let quantize = |value: f32| (value * inverse + 8.5) as i32 as u8;
    for ((quant, low), high) in quants.iter_mut().zip(low).zip(high) {
        *quant = quantize(*low).min(15) | quantize(*high).min(15) << 4;
    }
    put_scale(scale, head)
}

/// As [`q4_0`] with 5 bits: f16 scale, 32 highest bits, 16 bytes with the low bits of two values each.
fn q5_0(values: &[f32; BLOCK], block: &mut [u8; 22]) -> bool {
    let scale = of_largest_magnitude(values) / -16.0;
    let inverse = inverse(scale);
    let mut quants = [0u8; BLOCK];
    for (quant, value) in quants.iter_mut().zip(values) {
        *quant = ((value * inverse + 16.5) as i32 as u8).min(31);
    }
    put_5_bits(&quants, &mut block[2..]);
    put_scale(scale, &mut block[..2])
}

/// As [`q5_0`], with the minimum in a second f16.
fn q5_1(values: &[f32; BLOCK], block: &mut [u8; 24]) -> bool {
    let (mut low, mut high) = (f32::MAX, f32::MIN);
    for &value in values {
        low = if value < low { value } else { low };
        high = if value > high { value } else { high };
    }
    let scale = (high - low) / 31.0;
    let inverse = inverse(scale);
    let mut quants = [0u8; BLOCK];
    for (quant, value) in quants.iter_mut().zip(values) {
        *quant = ((value - low) * inverse + 0.5) as i32 as u8;
    }
    put_5_bits(&quants, &mut block[4..]);
    put_scale(scale, &mut block[..2]) & put_scale(low, &mut block[2..4])
}

/// The 32 highest bits, then 16 bytes with the low bits of two values each.
fn put_5_bits(quants: &[u8; BLOCK], target: &mut [u8]) {
    let high = quants.iter().enumerate().fold(0u32, |bits, (at, quant)| bits | u32::from(quant >> 4 & 1) << at);
    target[..4].copy_from_slice(&high.to_le_bytes());
    let (first, second) = quants.split_at(BLOCK / 2);
    for ((target, low), high) in target[4..].iter_mut().zip(first).zip(second) {
        *target = low & 15 | (high & 15) << 4;
    }
}

/// In lanes, so that the compiler vectorizes it: the maximum does not depend on the order.
fn largest_magnitude(values: &[f32; BLOCK]) -> f32 {
    let mut lanes = [0.0f32; 8];
    for chunk in values.as_chunks::<8>().0 {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            let magnitude = value.abs();
            *lane = if magnitude > *lane { magnitude } else { *lane };
        }
    }
    lanes.into_iter().fold(0.0, f32::max)
}

/// The first value with the largest magnitude; 0 if all are.
fn of_largest_magnitude(values: &[f32; BLOCK]) -> f32 {
    let largest = largest_magnitude(values);
    values.iter().copied().find(|value| value.abs() == largest).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::num::f32::{NORMAL, SUBNORMAL, ZERO};

    use super::*;
    use crate::format::gguf::dequantize::dequantize;

    fn quantized(block_type: BlockType, values: &[f32]) -> (Vec<u8>, bool) {
        let mut target = vec![0; values.len() / block_type.values() * block_type.bytes()];
        let finite = quantize(block_type, values, &mut target);
        (target, finite)
    }

    const QUANTIZED: [BlockType; 7] = [
        BlockType::Q4_0,
        BlockType::Q5_0,
        BlockType::Q5_1,
        BlockType::Q8_0,
        BlockType::Q4K,
        BlockType::Q5K,
        BlockType::Q6K,
    ];

    /// Usual and extreme rows, quantized by llama.cpp (`scripts/fixtures/make_llama_cpp_fixtures.py`).
    #[test]
    fn the_bytes_are_those_of_llama_cpp() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/gguf/blocks.safetensors");
        let file = std::fs::read(path).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        let values: Vec<f32> = bytemuck::pod_collect_to_vec(tensors.tensor("values").unwrap().data());
        for block_type in QUANTIZED {
            let expected = tensors.tensor(&block_type.to_string()).unwrap().data();
            for (row, values) in values.chunks_exact(256).enumerate() {
                let (found, _) = quantized(block_type, values);
                assert_eq!(found, expected[row * found.len()..][..found.len()], "{block_type} row {row}");
            }
        }
    }

    #[test]
    fn the_blocks_are_those_of_the_reference_by_hand() {
        let mut values = [0.0f32; 32];
        (values[0], values[1], values[17], values[31]) = (-2.0, 1.0, 0.9, 2.0);
        // The scale is -2 / -8; 1.0 is 4 quarters, 0.9 the integer part of 3.6 + 8.5.
        let (block, finite) = quantized(BlockType::Q4_0, &values);
        assert!(finite);
        assert_eq!(block[..2], f16::from_f32(0.25).to_le_bytes());
        assert_eq!((block[2], block[3], block[17]), (8 << 4, 12 | 12 << 4, 8 | 15 << 4));
        let (block, _) = quantized(BlockType::Q8_0, &values);
        assert_eq!(block[..2], f16::from_f32(2.0 / 127.0).to_le_bytes());
        assert_eq!([block[2], block[3], block[19], block[33]], [-127i8 as u8, 64, 57, 127]);
    }

    #[test]
    fn halves_are_rounded_away_from_zero() {
        for value in
            [0.0f32, 0.499_999_97, 0.5, 0.500_000_06, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.499_99, 1.499_999_9]
        {
            assert_eq!((value + BEFORE_HALF.copysign(value)) as i32, value.round() as i32, "{value}");
        }
        let mut value = 0.0f32;
        while value < 130.0 {
            value = f32::from_bits(value.to_bits() + 9_973);
            assert_eq!((value + BEFORE_HALF) as i32, value.round() as i32, "{value}");
        }
    }

    #[test]
    fn extreme_values_are_quantized_or_reported() {
        for block_type in QUANTIZED {
            let all = |value: f32| vec![value; 256];
            let (zero, finite) = quantized(block_type, &all(0.0));
            assert!(finite);
            let mut back = vec![1.0; 256];
            assert!(dequantize(block_type, &zero, 0, &mut back));
            assert_eq!(back, [0.0; 256], "{block_type}");
            for value in [1e-40f32, -1e-40, f32::MIN_POSITIVE, 1e-7, -1e-7, 65_504.0, -65_504.0] {
                assert!(quantized(block_type, &all(value)).1, "{block_type} {value}");
            }
            for value in [1e38f32, -1e38, f32::MAX, f32::MIN] {
                assert!(!quantized(block_type, &all(value)).1, "{block_type} {value}");
            }
            // One value outside the range among usual ones.
            let mut values: Vec<f32> = (0..256).map(|at| (at as f32 - 128.0) / 64.0).collect();
            values[200] = 1e9;
            assert!(!quantized(block_type, &values).1, "{block_type}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_finite_values_are_quantized_or_reported(values in vec(NORMAL | SUBNORMAL | ZERO, 256)) {
            for block_type in QUANTIZED {
                let (bytes, finite) = quantized(block_type, &values);
                let mut back = vec![0.0; 256];
                let readable = dequantize(block_type, &bytes, 0, &mut back);
                proptest::prop_assert!(readable || !finite, "{block_type}");
            }
        }

        /// Errors as shares of the largest magnitude: half a step of 127, a step of 8 and so on. In the types with quantized scales, the
        /// error of a scale comes in addition.
        #[test]
        fn errors_are_bounded(values in vec(-8.0f32..8.0, 256), shift in -4.0f32..4.0) {
            let values: Vec<f32> = values.into_iter().map(|value| value + shift).collect();
            let largest = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            for (block_type, share) in QUANTIZED.into_iter().zip([0.127, 0.064, 0.04, 0.005, 0.2, 0.12, 0.04]) {
                let (bytes, finite) = quantized(block_type, &values);
                let mut back = vec![0.0; 256];
                proptest::prop_assert!(finite && dequantize(block_type, &bytes, 0, &mut back));
                for (value, back) in values.iter().zip(back) {
                    proptest::prop_assert!((value - back).abs() <= share * largest, "{block_type}: {value} {back}");
                }
            }
        }
    }
}
