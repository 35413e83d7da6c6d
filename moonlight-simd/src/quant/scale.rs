//! The scale of a block.

use super::{BLOCK, Bits, ScaleType};

/// The magnitudes, in steps, that the largest weight of a block of 4 bits is tried at: this many eighths, and the 31 that follow (6 to 9.9).
/// Above 8 it is clipped.
const EIGHTHS: u8 = 48;

/// Quantizes a block of up to 32 weights: writes the stored values and returns the scale, rounded to `scale_type`.
///
/// 8 bits: the scale is the largest magnitude divided by 127, as in `Q8_0`. 4 bits: of several scales, the one with the least squared
/// error; `Q4_0` takes an eighth of the largest weight, whose value then is -8.
///
/// # Panics
///
/// If there are more than 32 weights, or fewer values than weights.
pub fn quantize_block(weights: &[f32], bits: Bits, scale_type: ScaleType, values: &mut [u8]) -> u16 {
    let mut whole = [0.0; BLOCK];
    whole[..weights.len()].copy_from_slice(weights);
    let scale = match bits {
        Bits::Eight => whole.iter().fold(0.0_f32, |most, weight| most.max(weight.abs())) / 127.0,
        Bits::Four => best_scale(&whole),
    };
    // The sum turns -0 into 0.
    let stored = scale_type.narrow(scale + 0.0);
    let scale = scale_type.widen(stored);
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let (zero, least, most) = match bits {
        Bits::Eight => (128.0, 1.0, 255.0),
        Bits::Four => (8.0, 0.0, 15.0),
    };
    let mut codes = [0; BLOCK];
    round_codes(&whole, inverse, [zero, least, most], &mut codes);
    values[..weights.len()].copy_from_slice(&codes[..weights.len()]);
    stored
}

crate::by_level! {
    fn round_codes[](weights: &[f32; BLOCK], inverse: f32, limits: [f32; 3], codes: &mut [u8; BLOCK]) {
        let [zero, least, most] = limits;
        for (code, weight) in codes.iter_mut().zip(weights) {
            *code = ((weight * inverse).round_ties_even() + zero).clamp(least, most) as u8;
        }
    }
}

/// Numbers of steps that are tried side by side.
const LANES: usize = 16;

crate::by_level! {
    /// The scale of integers from -8 to 7 with the least squared error among those of [`EIGHTHS`].
    ///
    /// For given integers `q` the best scale is `s = (x . q) / (q . q)`, with the error `x . x - (x . q)^2 / (q . q)`.
    fn best_scale[](weights: &[f32; BLOCK]) -> f32 {
        let mut largest = 0.0_f32;
        for &weight in weights {
            largest = if weight.abs() > largest.abs() { weight } else { largest };
        }
        let (mut best, mut most) = (largest / -8.0, 0.0);
        // A lane has a number of steps: sums over the block then need no sums over lanes.
        for first in [EIGHTHS, EIGHTHS + LANES as u8] {
            let mut inverses = [0.0_f32; LANES];
            for (lane, inverse) in inverses.iter_mut().enumerate() {
                *inverse = (f32::from(first) + lane as f32) / -8.0 / largest;
            }
            let (mut products, mut squares) = ([0.0_f32; LANES], [0.0_f32; LANES]);
            for weight in weights {
                for ((product, square), inverse) in products.iter_mut().zip(&mut squares).zip(&inverses) {
                    let steps = (weight * inverse).round_ties_even();
                    // Not `clamp`, whose rules for NaN take more instructions.
                    let integer = if steps > 7.0 { 7.0 } else { steps };
                    let integer = if integer < -8.0 { -8.0 } else { integer };
                    *product += weight * integer;
                    *square += integer * integer;
                }
            }
            for (product, square) in products.into_iter().zip(squares) {
                let gain = product * product / square;
                // False for NaN, so a block of zeros, or with a value that is not finite, keeps its first scale.
                if gain > most {
                    (best, most) = (product / square, gain);
                }
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(weights: &[f32], stored: u16, codes: &[u8]) -> f32 {
        let scale = ScaleType::F16.widen(stored);
        weights.iter().zip(codes).map(|(weight, &code)| (weight - (f32::from(code) - 8.0) * scale).powi(2)).sum()
    }

    #[test]
    fn the_error_is_at_most_that_of_q4_0() {
        crate::testing::at_each_level("scales of 4 bits", |_| {
            let (mut ours, mut theirs) = (0.0, 0.0);
            for block in 0..200 {
                let weights: Vec<f32> = (0..BLOCK)
                    .map(|index| {
                        let angle = (block * BLOCK + index) as f32 * 0.7;
                        angle.sin() * (angle * 1.3).cos().powi(3)
                    })
                    .collect();
                let mut codes = [0; BLOCK];
                let stored = quantize_block(&weights, Bits::Four, ScaleType::F16, &mut codes);
                ours += error(&weights, stored, &codes);
                let largest =
                    weights.iter().fold(0.0_f32, |most, &weight| if weight.abs() > most.abs() { weight } else { most });
                let stored = ScaleType::F16.narrow(largest / -8.0);
                let inverse = 1.0 / (largest / -8.0);
                let codes: Vec<u8> =
                    weights.iter().map(|weight| (weight * inverse + 8.5).clamp(0.0, 15.0) as u8).collect();
                theirs += error(&weights, stored, &codes);
            }
            assert!(ours < 0.9 * theirs, "{ours} {theirs}");
        });
    }

    #[test]
    fn blocks_of_zeros_and_of_extreme_values() {
        crate::testing::at_each_level("scales of extreme blocks", |_| {
            for bits in [Bits::Eight, Bits::Four] {
                let mut codes = [1; BLOCK];
                assert_eq!(quantize_block(&[0.0; BLOCK], bits, ScaleType::Bf16, &mut codes) & 0x7fff, 0);
                assert_eq!(codes, [bits.zero(); BLOCK]);
                let stored = quantize_block(&[1e-42, -1e-42], bits, ScaleType::F16, &mut codes);
                assert_eq!(stored & 0x7fff, 0, "below the range of f16");
                quantize_block(&[f32::MAX, f32::MIN], bits, ScaleType::Bf16, &mut codes);
            }
        });
    }

    #[test]
    fn values_on_a_grid_are_exact() {
        for scale_type in [ScaleType::F16, ScaleType::Bf16] {
            let weights: Vec<f32> = (0..16).map(|value| (value as f32 - 8.0) * 0.25).collect();
            let mut codes = [0; 16];
            let scale = scale_type.widen(quantize_block(&weights, Bits::Four, scale_type, &mut codes));
            let back: Vec<f32> = codes.iter().map(|&code| (f32::from(code) - 8.0) * scale).collect();
            assert_eq!(back, weights);
        }
    }
}
