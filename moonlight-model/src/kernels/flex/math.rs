//! Elementary functions and reductions that the compiler vectorizes.

use moonlight_simd::by_level;

use super::dtype::Element;

/// `e^x` in f32, by range reduction and a polynomial of degree six: within 2 units in the last place over the range of normal
/// results, 0 below it, infinity above it. NaN stays NaN. It is branchless, so that loops over it are vectorized.
#[inline(always)]
#[expect(clippy::excessive_precision, reason = "the constants are the splitting of ln 2 and Cephes' coefficients")]
pub(super) fn exp(x: f32) -> f32 {
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer: the sum has no bits for a fraction.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 as a sum of two parts. The first has few bits, so that its product with a small integer is exact.
    const LN_2_HIGH: f32 = 0.693_359_375;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-88.0, 88.73);
    // e^x = 2^exponent * e^r with |r| <= ln 2 / 2
    let exponent = (clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = clamped - exponent * LN_2_HIGH - exponent * LN_2_LOW;
    // The polynomial of Cephes' expf.
    let mut p = 1.987_569_15e-4;
    p = p * r + 1.398_199_950_7e-3;
    p = p * r + 8.333_451_907_3e-3;
    p = p * r + 4.166_579_589_4e-2;
    p = p * r + 1.666_666_545_9e-1;
    p = p * r + 5.000_000_120_1e-1;
    let p = p * r * r + r + 1.0;
    // 2^exponent as a product of two powers: it may be 2^128, and the largest power of an f32 is 2^127.
    let half = (exponent * 0.5) as i32;
    let rest = exponent as i32 - half;
    let scale = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    let result = p * scale(half) * scale(rest);
    let result = if x > 88.72 { f32::INFINITY } else { result }; // ln(f32::MAX) is 88.723
    if x < -87.4 { 0.0 } else { result } // ln(f32::MIN_POSITIVE) is -87.337
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

by_level! {
    /// Replaces each value by `e^(value - offset)` and returns the sum.
    pub(super) fn exp_in_place[](values: &mut [f32], offset: f32) -> f32 {
        // Sixteen running sums, so that the additions are vectorized. Their number does not depend on the vector width, so every
        // level of instructions gives the same bits.
        let mut sums = [0.0f32; 16];
        let mut chunks = values.chunks_exact_mut(16);
        for chunk in &mut chunks {
            for (sum, value) in sums.iter_mut().zip(chunk) {
                *value = exp(*value - offset);
                *sum += *value;
            }
        }
        let mut total: f32 = sums.iter().sum();
        for value in chunks.into_remainder() {
            *value = exp(*value - offset);
            total += *value;
        }
        total
    }
}

by_level! {
    /// The largest value, `-inf` for an empty slice; NaN if any value is NaN, so that non-finite scores are not hidden.
    pub(super) fn largest[](values: &[f32]) -> f32 {
        let pick = |a: f32, b: f32| if b > a || b.is_nan() { b } else { a };
        let mut lanes = [f32::NEG_INFINITY; 16];
        let chunks = values.chunks_exact(16);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (lane, &value) in lanes.iter_mut().zip(chunk) {
                *lane = pick(*lane, value);
            }
        }
        lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if a.is_nan() { a } else { pick(a, b) })
    }
}

by_level! {
    /// The dot product, in sixteen running sums as in [`exp_in_place`].
    pub(super) fn dot[A: Element, B: Element](a: &[A], b: &[B]) -> f32 {
        let mut sums = [0.0f32; 16];
        let (chunks_a, chunks_b) = (a.chunks_exact(16), b.chunks_exact(16));
        let (rest_a, rest_b) = (chunks_a.remainder(), chunks_b.remainder());
        for (chunk_a, chunk_b) in chunks_a.zip(chunks_b) {
            for ((sum, a), b) in sums.iter_mut().zip(chunk_a).zip(chunk_b) {
                *sum += a.wide() * b.wide();
            }
        }
        let rest: f32 = rest_a.iter().zip(rest_b).map(|(a, b)| a.wide() * b.wide()).sum();
        sums.iter().sum::<f32>() + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for step in -870_000..=887_000 {
            let x = step as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
    }

    #[test]
    fn exp_has_the_right_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(200.0), f32::INFINITY);
        assert_eq!(exp(-200.0), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_agree_with_plain_loops() {
        moonlight_simd::testing::at_each_level("kernels: reductions", |_| reductions());
    }

    fn reductions() {
        for count in [0, 1, 15, 16, 17, 100] {
            let a: Vec<f32> = (0..count).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..count).map(|i| (i as f32 * 0.3).cos()).collect();
            let plain: f64 = a.iter().zip(&b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            assert!((f64::from(dot(&a, &b)) - plain).abs() < 1e-5);
            assert_eq!(largest(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut exponentials = a.clone();
            let sum = exp_in_place(&mut exponentials, 0.5);
            let plain: f64 = a.iter().map(|&a| (f64::from(a) - 0.5).exp()).sum();
            assert!((f64::from(sum) - plain).abs() < 1e-4);
        }
        assert!(largest(&[1.0, f32::NAN, 2.0]).is_nan());
    }
}
