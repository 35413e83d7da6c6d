use proptest::prelude::*;

use super::*;
use crate::testing::at_each_level;

/// A quantized matrix that owns its memory.
struct Owned {
    shape: Shape,
    scale_type: ScaleType,
    values: Vec<u8>,
    scales: Vec<u16>,
}

impl Owned {
    /// Quantizes `[output, input]`.
    fn new(shape: Shape, scale_type: ScaleType, weights: &[f32]) -> Self {
        let (mut values, mut scales) = (vec![0; shape.value_bytes()], vec![0; shape.scales()]);
        let mut writer = MatrixWriter::new(shape, 0, &mut values, &mut scales);
        writer.fill();
        for (output, weights) in weights.chunks_exact(shape.input).enumerate() {
            let mut codes = vec![0; shape.input];
            let blocks = weights.chunks(BLOCK).zip(codes.chunks_mut(BLOCK));
            let scales: Vec<u16> =
                blocks.map(|(weights, codes)| quantize_block(weights, shape.bits, scale_type, codes)).collect();
            writer.write(output, &codes, &scales);
        }
        Self { shape, scale_type, values, scales }
    }

    fn view(&self) -> QuantizedMatrix<'_> {
        QuantizedMatrix::new(self.shape, self.scale_type, &self.values, &self.scales)
    }
}

/// Numbers that look random, in -1..1.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

const KINDS: [(Bits, ScaleType); 4] = [
    (Bits::Eight, ScaleType::F16),
    (Bits::Eight, ScaleType::Bf16),
    (Bits::Four, ScaleType::F16),
    (Bits::Four, ScaleType::Bf16),
];

#[test]
fn every_weight_is_off_by_at_most_its_bound() {
    for (bits, scale_type) in KINDS {
        let shape = Shape { bits, input: 77, output: 21 };
        let weights = noise(77 * 21, 3);
        let owned = Owned::new(shape, scale_type, &weights);
        for (output, weights) in weights.chunks(77).enumerate() {
            for (block, weights) in weights.chunks(BLOCK).enumerate() {
                let most = weights.iter().fold(0.0_f32, |most, weight| most.max(weight.abs()));
                // Half a step; with 4 bits the side that has 7 steps may lose up to one; rounding the scale moves the largest by its
                // relative error.
                let bound = match bits {
                    Bits::Eight => most * (0.51 / 127.0 + 0.004),
                    Bits::Four => most * (1.01 / 8.0 + 0.004),
                };
                for (index, weight) in weights.iter().enumerate() {
                    let got = owned.view().get(block * BLOCK + index, output);
                    assert!((got - weight).abs() <= bound, "{weight} became {got}");
                }
            }
        }
    }
}

/// The product in f64 of the dequantized operands, and the sum of magnitudes that bounds its rounding.
fn exact(matrix: QuantizedMatrix<'_>, rows: &QuantizedRows, row: usize, output: usize) -> (f64, f64) {
    let products =
        (0..matrix.shape().input).map(|input| f64::from(matrix.get(input, output)) * f64::from(rows.get(row, input)));
    products.fold((0.0, 0.0), |(sum, size), product| (sum + product, size + product.abs()))
}

fn check(shape: Shape, scale_type: ScaleType, weights: &[f32], x: &[f32]) {
    let owned = Owned::new(shape, scale_type, weights);
    let matrix = owned.view();
    let rows = QuantizedRows::new(x, shape.input);
    let (count, stride) = (rows.len(), shape.output + 3);
    let mut out = vec![f32::NAN; count * stride];
    matrix.multiply(&rows, 0..count, 0..shape.tiles(), &mut out, stride);
    for row in 0..count {
        for output in 0..shape.output {
            let (expected, size) = exact(matrix, &rows, row, output);
            let got = out[row * stride + output];
            // A product of scales, a product and a sum are rounded for each block, and cancellation within a block is exact.
            let bound = size * (shape.blocks() as f64 + 4.0) * f64::from(f32::EPSILON) + 1e-38 * shape.input as f64;
            assert!((f64::from(got) - expected).abs() <= bound, "{row} {output}: {got}, {expected}, {bound}");
        }
        assert!(
            out[row * stride + shape.output..(row + 1) * stride].iter().all(|x| x.is_nan()),
            "nothing else is written"
        );
    }
    // A part has the bits of the whole.
    let (last, middle) = (count - 1, shape.tiles() / 2);
    let mut part = vec![f32::NAN; TILE];
    matrix.multiply(&rows, last..count, middle..middle + 1, &mut part, TILE);
    let width = TILE.min(shape.output - middle * TILE);
    assert_eq!(part[..width], out[last * stride + middle * TILE..][..width]);
}

#[test]
fn products_are_exact_up_to_rounding_at_each_level() {
    at_each_level("quantized products", |_| {
        for (bits, scale_type) in KINDS {
            for (input, output, rows) in [(1, 1, 1), (32, 16, 1), (33, 17, 2), (64, 48, 7), (100, 70, 13), (352, 33, 5)]
            {
                let shape = Shape { bits, input, output };
                check(shape, scale_type, &noise(input * output, 5), &noise(input * rows, 7));
            }
        }
    });
}

#[test]
fn the_largest_integers_do_not_overflow() {
    at_each_level("quantized products of the largest integers", |_| {
        for (bits, scale_type) in KINDS {
            for sign in [1.0, -1.0] {
                let shape = Shape { bits, input: 64, output: 16 };
                check(shape, scale_type, &vec![sign; 64 * 16], &[1.0; 64 * 3]);
                check(shape, scale_type, &vec![sign; 64 * 16], &[-1.0; 64 * 3]);
            }
        }
    });
}

#[test]
fn panels_have_the_weights() {
    at_each_level("panels of quantized weights", |_| {
        for (bits, scale_type) in KINDS {
            let shape = Shape { bits, input: 100, output: 40 };
            let owned = Owned::new(shape, scale_type, &noise(100 * 40, 9));
            let (tiles, blocks) = (1..3, 1..4);
            let (mut panel, mut rounded) = (vec![f32::NAN; 96 * 32], vec![half::bf16::NAN; 96 * 32]);
            owned.view().dequantize(tiles.clone(), blocks.clone(), &mut panel);
            owned.view().dequantize(tiles, blocks, &mut rounded);
            for input in 0..96 {
                for output in 0..32 {
                    let inside = input + 32 < 100 && output + 16 < 40;
                    let expected = if inside { owned.view().get(input + 32, output + 16) } else { 0.0 };
                    assert_eq!(panel[input * 32 + output], expected);
                    assert_eq!(rounded[input * 32 + output], half::bf16::from_f32(expected));
                }
            }
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_shape_and_size(
        input in 1_usize..150, output in 1_usize..60, rows in 1_usize..16, kind in 0_usize..4, seed in 0_u64..1000,
        weight_size in prop::sample::select(vec![0.0_f32, 1e-30, 1e-3, 1.0, 3e4]),
        x_size in prop::sample::select(vec![0.0_f32, 1e-42, 1e-38, 1e-4, 1.0, 1e30]),
    ) {
        let (bits, scale_type) = KINDS[kind];
        let weights: Vec<f32> = noise(input * output, seed).iter().map(|weight| weight * weight_size).collect();
        let x: Vec<f32> = noise(input * rows, seed + 1).iter().map(|x| x * x_size).collect();
        at_each_level("quantized products of any shape", |_| check(Shape { bits, input, output }, scale_type, &weights, &x));
    }
}

#[test]
fn values_that_are_not_finite_reach_every_output() {
    at_each_level("quantized products of NaN", |_| {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let shape = Shape { bits: Bits::Four, input: 64, output: 20 };
            let owned = Owned::new(shape, ScaleType::F16, &noise(64 * 20, 3));
            let mut x = noise(128, 4);
            x[40] = bad;
            let mut out = [0.0; 40];
            owned.view().multiply(&QuantizedRows::new(&x, 64), 0..2, 0..2, &mut out, 20);
            assert!(out[..20].iter().all(|x| x.is_nan()) && out[20..].iter().all(|x| x.is_finite()), "{out:?}");
        }
    });
}
