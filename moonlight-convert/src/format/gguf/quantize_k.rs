//! The types with blocks of 256 values, whose scales are themselves quantized: Q4_K, Q5_K and Q6_K.
//!
//! A block has groups of 32 (Q6_K: 16) values. The reference searches for each group's scale (and minimum) one group after the
//! other; here all groups of a block are searched side by side, one in each lane. Within a lane every sum has the order of the
//! reference, so that the results are equal bit for bit, and the loops over lanes become vector instructions.

use std::array::from_fn;

use half::f16;

use super::block::BlockType;
use super::quantize::put_scale;

/// Values of a block.
const BLOCK: usize = 256;
/// Below this magnitude a group counts as zero (`GROUP_MAX_EPS`).
const ZERO: f32 = 1e-15;

pub(super) fn quantize(block_type: BlockType, values: &[f32], target: &mut [u8]) -> bool {
    let (values, _) = values.as_chunks::<BLOCK>();
    let blocks = values.iter().zip(target.chunks_exact_mut(block_type.bytes()));
    blocks.fold(true, |finite, (values, block)| {
        finite
            & match block_type {
                BlockType::Q4K => q4_k(values, block),
                BlockType::Q5K => q5_k(values, block),
                _ => q6_k(values, block),
            }
    })
}

/// Rounds to the nearest integer, halves to even, for magnitudes below 2^22: the sum's lowest mantissa bits are the integer.
#[inline(always)]
fn nearest(value: f32) -> i32 {
    ((value + 12_582_912.0).to_bits() & 0x007f_ffff) as i32 - 0x0040_0000
}

/// [`nearest`] of a value clamped to a range of integers, as a float: without conversions, a loop needs only basic instructions. The
/// result is that of clamping afterwards, because the ends are integers.
#[inline(always)]
fn nearest_in(value: f32, low: f32, high: f32) -> f32 {
    // Not `clamp`, which preserves NaN with more instructions.
    let value = if value > low { value } else { low };
    let value = if value < high { value } else { high };
    (value + 12_582_912.0) - 12_582_912.0
}

/// One value of each of 8 groups.
type Lanes = [f32; 8];
/// Values of a group with a minimum.
const WIDE: usize = 32;

/// The groups of a block, `[position in the group][group]`.
type Groups = [Lanes; WIDE];

/// Scales, minima, and the integers of all values.
struct Search {
    scales: Lanes,
    /// Magnitudes of the minima.
    minima: Lanes,
    quants: [[u8; 8]; WIDE],
}

/// The 8 groups' scales and minima with the least weighted squared error (`make_qkx2_quants`): integers are at most `largest`, and
/// `steps + 1` scales are tried, whose inverses are proportional to `largest + first + 0.1 step`.
fn search(x: &Groups, largest: f32, first: f32, steps: usize) -> Search {
    let mut squares = [0.0f32; 8];
    for x in x {
        for lane in 0..8 {
            squares[lane] += x[lane] * x[lane];
        }
    }
    let average: Lanes = from_fn(|lane| (squares[lane] / 32.0).sqrt());
    let weights: Groups = from_fn(|at| from_fn(|lane| average[lane] + x[at][lane].abs()));
    let (mut low, mut high) = (x[0], x[0]);
    let mut sum_w = weights[0];
    let mut sum_x: Lanes = from_fn(|lane| sum_w[lane] * x[0][lane]);
    for (x, w) in x.iter().zip(&weights).skip(1) {
        for lane in 0..8 {
            low[lane] = if x[lane] < low[lane] { x[lane] } else { low[lane] };
            high[lane] = if x[lane] > high[lane] { x[lane] } else { high[lane] };
            sum_w[lane] += w[lane];
            sum_x[lane] += w[lane] * x[lane];
        }
    }
    for low in &mut low {
        *low = if *low > 0.0 { 0.0 } else { *low };
    }
    // Groups of zeros have no range. Their lanes compute garbage that is replaced at the end.
    let constant: [bool; 8] = from_fn(|lane| high[lane] == low[lane]);
    let quantize = |inverse: &Lanes, low: &Lanes, x: &Lanes| -> Lanes {
        from_fn(|lane| nearest_in(inverse[lane] * (x[lane] - low[lane]), 0.0, largest))
    };
    // An infinite inverse, of a range of denormal numbers, gives zeros, as the reference's integers do.
    let finite = |inverse: f32| if inverse.abs() < f32::INFINITY { inverse } else { 0.0 };
    let inverse: Lanes = from_fn(|lane| finite(largest / (high[lane] - low[lane])));
    let mut scales: Lanes = from_fn(|lane| if inverse[lane] == 0.0 { 0.0 } else { 1.0 / inverse[lane] });
    let mut minima = low;
    let mut best: Groups = from_fn(|at| quantize(&inverse, &low, &x[at]));
    let mut best_error = error(x, &weights, &best, &scales, &minima);
    for step in 0..=steps {
        // The minimum that was best so far is the origin of the next trial, as in the reference.
        let inverse: Lanes =
            from_fn(|lane| finite((first + 0.1 * step as f32 + largest) / (high[lane] - minima[lane])));
        let (mut sum_l, mut sum_l2, mut sum_xl) = ([0.0f32; 8], [0.0f32; 8], [0.0f32; 8]);
        let mut tried: Groups = [[0.0; 8]; WIDE];
        for ((x, w), tried) in x.iter().zip(&weights).zip(&mut tried) {
            *tried = quantize(&inverse, &minima, x);
            for lane in 0..8 {
                let wl = w[lane] * tried[lane];
                sum_l[lane] += wl;
                sum_l2[lane] += wl * tried[lane];
                sum_xl[lane] += wl * x[lane];
            }
        }
        let determinant: Lanes = from_fn(|lane| sum_w[lane] * sum_l2[lane] - sum_l[lane] * sum_l[lane]);
        let (mut tried_scales, mut tried_minima) = ([0.0f32; 8], [0.0f32; 8]);
        for lane in 0..8 {
            let scale = (sum_w[lane] * sum_xl[lane] - sum_x[lane] * sum_l[lane]) / determinant[lane];
            let minimum = (sum_l2[lane] * sum_x[lane] - sum_l[lane] * sum_xl[lane]) / determinant[lane];
            let positive = minimum > 0.0;
            tried_scales[lane] = if positive { sum_xl[lane] / sum_l2[lane] } else { scale };
            tried_minima[lane] = if positive { 0.0 } else { minimum };
        }
        let tried_error = error(x, &weights, &tried, &tried_scales, &tried_minima);
        let better: [bool; 8] = from_fn(|lane| determinant[lane] > 0.0 && tried_error[lane] < best_error[lane]);
        if better == [false; 8] {
            continue;
        }
        for lane in 0..8 {
            scales[lane] = if better[lane] { tried_scales[lane] } else { scales[lane] };
            minima[lane] = if better[lane] { tried_minima[lane] } else { minima[lane] };
            best_error[lane] = if better[lane] { tried_error[lane] } else { best_error[lane] };
        }
        for (best, tried) in best.iter_mut().zip(&tried) {
            for lane in 0..8 {
                best[lane] = if better[lane] { tried[lane] } else { best[lane] };
            }
        }
    }
    Search {
        scales: from_fn(|lane| if constant[lane] { 0.0 } else { scales[lane] }),
        minima: from_fn(|lane| if constant[lane] { -low[lane] } else { -minima[lane] }),
        quants: best.map(|best| from_fn(|lane| if constant[lane] { 0 } else { best[lane] as u8 })),
    }
}

/// The weighted squared errors of the groups.
#[inline(always)]
fn error(x: &Groups, weights: &Groups, quants: &Groups, scales: &Lanes, minima: &Lanes) -> Lanes {
    let mut errors = [0.0f32; 8];
    for ((x, w), quant) in x.iter().zip(weights).zip(quants) {
        for lane in 0..8 {
            let difference = scales[lane] * quant[lane] + minima[lane] - x[lane];
            errors[lane] += w[lane] * (difference * difference);
        }
    }
    errors
}

/// The bytes of a block: f16 scale of the scales and f16 scale of the minima, 12 bytes with 8 scales and 8 minima of 6 bits, then for
/// Q5_K the highest bits, and the low 4 bits.
fn with_minima(values: &[f32; BLOCK], block: &mut [u8], bits: u32, first: f32, steps: usize) -> (bool, [u8; BLOCK]) {
    let largest = (1 << bits) - 1;
    let x: Groups = from_fn(|at| from_fn(|group| values[group * WIDE + at]));
    let Search { scales, minima, mut quants } = search(&x, largest as f32, first, steps);
    let highest = |values: &Lanes| values.iter().fold(0.0f32, |most, value| if *value > most { *value } else { most });
    let (max_scale, max_minimum) = (highest(&scales), highest(&minima));
    let inverse = |most: f32| if most > 0.0 { 63.0 / most } else { 0.0 };
    let (inverse_scale, inverse_minimum) = (inverse(max_scale), inverse(max_minimum));
    let six_bits = |inverse: f32, value: f32| (nearest(inverse * value) as u8).min(63);
    let six: [[u8; 2]; 8] =
        from_fn(|group| [six_bits(inverse_scale, scales[group]), six_bits(inverse_minimum, minima[group])]);
    let packed = &mut block[4..16];
    for group in 0..4 {
        let ([scale, minimum], [upper_scale, upper_minimum]) = (six[group], six[group + 4]);
        // The upper groups' lower 4 bits share a byte; their upper 2 bits are above those of the lower groups.
        packed[group] = scale | upper_scale >> 4 << 6;
        packed[group + 4] = minimum | upper_minimum >> 4 << 6;
        packed[group + 8] = upper_scale & 15 | (upper_minimum & 15) << 4;
    }
    let (d, d_minimum) = (max_scale / 63.0, max_minimum / 63.0);
    let finite = put_scale(d, &mut block[..2]) & put_scale(d_minimum, &mut block[2..4]);
    // The integers for the scales as they were rounded.
    let (d, d_minimum) = (f16::from_f32(d).to_f32(), f16::from_f32(d_minimum).to_f32());
    let scale: Lanes = from_fn(|group| d * f32::from(six[group][0]));
    let minimum: Lanes = from_fn(|group| d_minimum * f32::from(six[group][1]));
    for (quants, x) in quants.iter_mut().zip(&x) {
        for lane in 0..8 {
            let quant = nearest((x[lane] + minimum[lane]) / scale[lane]).clamp(0, largest) as u8;
            quants[lane] = if scale[lane] == 0.0 { quants[lane] } else { quant };
        }
    }
    (finite, from_fn(|at| quants[at % WIDE][at / WIDE]))
}

fn q4_k(values: &[f32; BLOCK], block: &mut [u8]) -> bool {
    let (finite, quants) = with_minima(values, block, 4, -1.0, 20);
    put_nibbles(&quants, &mut block[16..]);
    finite
}

fn q5_k(values: &[f32; BLOCK], block: &mut [u8]) -> bool {
    let (finite, quants) = with_minima(values, block, 5, -0.5, 15);
    let (high, low) = block[16..].split_at_mut(32);
    // Bit `group` of byte `at` belongs to value `at` of that group.
    for (at, high) in high.iter_mut().enumerate() {
        *high = (0..8).fold(0, |bits, group| bits | (quants[group * WIDE + at] >> 4) << group);
    }
    put_nibbles(&quants.map(|quant| quant & 15), low);
    finite
}

/// Two groups share 32 bytes.
fn put_nibbles(quants: &[u8; BLOCK], target: &mut [u8]) {
    for (quants, target) in quants.chunks_exact(64).zip(target.chunks_exact_mut(32)) {
        let (low, high) = quants.split_at(32);
        for ((target, low), high) in target.iter_mut().zip(low).zip(high) {
            *target = low | high << 4;
        }
    }
}

/// Groups and values of a group of Q6_K.
const NARROW: usize = 16;
type NarrowLanes = [f32; NARROW];

/// 128 bytes with the lower 4 bits, 64 with the upper 2, 16 scales of 8 bits, and the f16 scale of the scales.
fn q6_k(values: &[f32; BLOCK], block: &mut [u8]) -> bool {
    let x: [NarrowLanes; NARROW] = from_fn(|at| from_fn(|group| values[group * NARROW + at]));
    let (scales, mut quants) = search_symmetric(&x);
    // The squares of values far outside the range overflow. The reference would write zeros for such a block.
    if scales.iter().any(|scale| !scale.is_finite()) {
        block.fill(0);
        return false;
    }
    let (mut most, mut magnitude) = (0.0f32, 0.0f32);
    for scale in scales {
        if scale.abs() > magnitude {
            (most, magnitude) = (scale, scale.abs());
        }
    }
    if magnitude < ZERO {
        block.fill(0);
        return true;
    }
    let inverse = -128.0 / most;
    let d = 1.0 / inverse;
    let (packed, rest) = block.split_at_mut(192);
    let finite = put_scale(d, &mut rest[NARROW..]);
    let eight: [i32; NARROW] = from_fn(|group| nearest(inverse * scales[group]).min(127));
    for (target, scale) in rest.iter_mut().zip(eight) {
        *target = scale as i8 as u8;
    }
    let d = f16::from_f32(d).to_f32();
    let scale: NarrowLanes = from_fn(|group| d * f32::from(eight[group] as i8));
    for (quants, x) in quants.iter_mut().zip(&x) {
        for lane in 0..NARROW {
            let quant = nearest(x[lane] / scale[lane]).clamp(-32, 31) + 32;
            quants[lane] = if scale[lane] == 0.0 { quants[lane] } else { quant as f32 };
        }
    }
    let quant = |at: usize| quants[at % NARROW][at / NARROW] as u8;
    let (low, high) = packed.split_at_mut(128);
    for half in 0..2 {
        for at in 0..32 {
            let [a, b, c, d] = from_fn(|quarter| quant(half * 128 + quarter * 32 + at));
            low[half * 64 + at] = a & 15 | (c & 15) << 4;
            low[half * 64 + 32 + at] = b & 15 | (d & 15) << 4;
            high[half * 32 + at] = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6;
        }
    }
    finite
}

/// The 16 groups' scales with the least error, weighted by the squares of the values (`make_qx_quants`), and the integers from 0 to
/// 63 that stand for -32 to 31.
fn search_symmetric(x: &[NarrowLanes; NARROW]) -> (NarrowLanes, [NarrowLanes; NARROW]) {
    let (mut most, mut magnitude) = ([0.0f32; NARROW], [0.0f32; NARROW]);
    for x in x {
        for lane in 0..NARROW {
            let larger = x[lane].abs() > magnitude[lane];
            most[lane] = if larger { x[lane] } else { most[lane] };
            magnitude[lane] = if larger { x[lane].abs() } else { magnitude[lane] };
        }
    }
    // The integers for an inverse scale, and the sums of w x l and w l l.
    let try_scale = |inverse: &NarrowLanes| {
        let (mut sum_lx, mut sum_l2) = ([0.0f32; NARROW], [0.0f32; NARROW]);
        let quants: [NarrowLanes; NARROW] = from_fn(|at| {
            let x = &x[at];
            let quants: NarrowLanes = from_fn(|lane| nearest_in(inverse[lane] * x[lane], -32.0, 31.0));
            for lane in 0..NARROW {
                let w = x[lane] * x[lane];
                sum_lx[lane] += w * x[lane] * quants[lane];
                sum_l2[lane] += w * quants[lane] * quants[lane];
            }
            quants
        });
        (quants, sum_lx, sum_l2)
    };
    let (mut best, sum_lx, sum_l2) = try_scale(&from_fn(|lane| -32.0 / most[lane]));
    let mut scales: NarrowLanes = from_fn(|lane| if sum_l2[lane] == 0.0 { 0.0 } else { sum_lx[lane] / sum_l2[lane] });
    let mut quality: NarrowLanes = from_fn(|lane| scales[lane] * sum_lx[lane]);
    for step in (-9..=9).filter(|step| *step != 0) {
        let (tried, sum_lx, sum_l2) = try_scale(&from_fn(|lane| -(32.0 + 0.1 * step as f32) / most[lane]));
        let better: [bool; NARROW] =
            from_fn(|lane| sum_l2[lane] > 0.0 && sum_lx[lane] * sum_lx[lane] > quality[lane] * sum_l2[lane]);
        if better == [false; NARROW] {
            continue;
        }
        for lane in 0..NARROW {
            let scale = sum_lx[lane] / sum_l2[lane];
            scales[lane] = if better[lane] { scale } else { scales[lane] };
            quality[lane] = if better[lane] { scale * sum_lx[lane] } else { quality[lane] };
        }
        for (best, tried) in best.iter_mut().zip(&tried) {
            for lane in 0..NARROW {
                best[lane] = if better[lane] { tried[lane] } else { best[lane] };
            }
        }
    }
    let zero: [bool; NARROW] = from_fn(|lane| magnitude[lane] < ZERO);
    let scales = from_fn(|lane| if zero[lane] { 0.0 } else { scales[lane] });
    (scales, best.map(|best| from_fn(|lane| if zero[lane] { 0.0 } else { best[lane] + 32.0 })))
}
