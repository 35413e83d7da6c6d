//! Products compared with those in f64, at each level.

use proptest::prelude::*;

use crate::testing::{at_each_level, skipped};

use super::*;

/// Whether the elements of a matrix that are neighbors in memory are in one row or one column, or there are none.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Order {
    Rows,
    Columns,
    Neither,
}

/// A matrix with elements between its rows that no product may read: they are NaN.
struct Matrix {
    values: Vec<bf16>,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl Matrix {
    fn new(rows: usize, columns: usize, order: Order, gap: usize, mut value: impl FnMut() -> bf16) -> Self {
        let (row_stride, column_stride) = match order {
            Order::Rows => (columns + gap, 1),
            Order::Columns => (1, rows + gap),
            Order::Neither => (3 * columns + gap, 3),
        };
        let length = rows * row_stride + columns * column_stride;
        let mut matrix = Self { values: vec![bf16::NAN; length], rows, columns, row_stride, column_stride };
        for row in 0..rows {
            for column in 0..columns {
                matrix.values[row * row_stride + column * column_stride] = value();
            }
        }
        // No slack at the end either, so that a read beyond it is a read beyond the allocation.
        let end = if rows * columns == 0 { 0 } else { (rows - 1) * row_stride + (columns - 1) * column_stride + 1 };
        matrix.values.truncate(end);
        matrix.values.shrink_to_fit();
        matrix
    }

    fn operand(&self) -> Operand<bf16> {
        Operand { values: self.values.as_ptr(), row_stride: self.row_stride, column_stride: self.column_stride }
    }

    fn at(&self, row: usize, column: usize) -> f64 {
        f64::from(self.values[row * self.row_stride + column * self.column_stride].to_f32())
    }
}

/// What is known about an element of a product.
struct Expected {
    sum: f64,
    /// The sum of the magnitudes of its terms.
    magnitude: f64,
    /// The part of it with a denormal operand, which may count as zero.
    denormal: f64,
    /// Whether such a term has an infinity too, so that it may be an infinity or NaN.
    is_open: bool,
    /// The largest finite operand.
    largest: f64,
}

fn expected(lhs: &Matrix, rhs: &Matrix, row: usize, column: usize) -> Expected {
    let mut expected = Expected { sum: 0.0, magnitude: 0.0, denormal: 0.0, is_open: false, largest: 0.0 };
    for inner in 0..lhs.columns {
        let (a, b) = (lhs.at(row, inner), rhs.at(inner, column));
        expected.sum += a * b;
        let finite = [a, b].map(f64::abs).into_iter().filter(|x| x.is_finite());
        expected.largest = finite.fold(expected.largest, f64::max);
        expected.magnitude += (a * b).abs();
        let is_denormal = |x: f64| x != 0.0 && x.abs() < f64::from(f32::MIN_POSITIVE);
        if is_denormal(a) || is_denormal(b) {
            expected.denormal += (a * b).abs();
            expected.is_open |= a.is_infinite() || b.is_infinite();
        }
    }
    expected
}

/// Compares a product with that in f64, within the proven bound, and returns its bits.
fn check(lhs: &Matrix, rhs: &Matrix, keep: f32, factor: f32) -> (Vec<u32>, Vec<u16>) {
    let (shape, stride) = ([lhs.rows, lhs.columns, rhs.columns], rhs.columns + 3);
    const UNTOUCHED: f32 = -7.5;
    let start = |row: usize, column: usize| (row * 31 + column) as f32 / 64.0 - 3.0;
    let mut wide = vec![UNTOUCHED; lhs.rows * stride];
    let mut half = vec![bf16::from_f32(UNTOUCHED); lhs.rows * stride];
    for row in 0..lhs.rows {
        for column in 0..rhs.columns {
            wide[row * stride + column] = if keep == 0.0 { f32::NAN } else { start(row, column) };
        }
    }
    let output = Output::F32 { values: wide.as_mut_ptr(), keep, factor };
    // SAFETY: the matrices have the elements of their shapes, and the results overlap no operand.
    unsafe { multiply(shape, output, stride, lhs.operand(), rhs.operand()) };
    let output = Output::Bf16 { values: half.as_mut_ptr(), factor };
    // SAFETY: likewise.
    unsafe { multiply(shape, output, stride, lhs.operand(), rhs.operand()) };
    for (place, (&wide, &half)) in wide.iter().zip(&half).enumerate() {
        let (row, column) = (place / stride, place % stride);
        if column >= rhs.columns {
            assert!(wide == UNTOUCHED && half.to_f32() == UNTOUCHED, "a value between rows was written");
            continue;
        }
        let Expected { sum, magnitude, denormal, is_open, largest } = expected(lhs, rhs, row, column);
        let kept = if keep == 0.0 { 0.0 } else { f64::from(keep) * f64::from(start(row, column)) };
        for (found, kept, narrowing) in [(wide, kept, 0.0), (half.to_f32(), 0.0, 2f64.powi(-8))] {
            let (found, exact) = (f64::from(found), kept + f64::from(factor) * sum);
            let about = || format!("{shape:?} at [{row}, {column}]: {found:e}, not {exact:e}");
            let size = kept.abs() + f64::from(factor).abs() * magnitude;
            if is_open {
                assert!(!found.is_finite(), "{}", about());
            } else if sum.is_nan() {
                assert!(found.is_nan(), "{}", about());
            } else if sum.is_infinite() {
                // Finite terms may overflow to the other infinity first, which makes NaN.
                assert!(found == exact || found.is_nan(), "{}", about());
            } else if magnitude.max(size).max(largest * f64::from(factor).abs()) < f64::from(f32::MAX) / 2.0 {
                let depth = lhs.columns as f64;
                // An operand that is so small that its product with the factor is denormal loses digits.
                let scaled = if is_native() { 0.0 } else { depth * largest * 2f64.powi(-149) };
                let flushed = denormal + (depth + 4.0) * f64::from(f32::MIN_POSITIVE) + scaled;
                let bound = relative_error(lhs.columns) * size
                    + flushed * f64::from(factor).abs().max(1.0)
                    + narrowing * (exact.abs() + size * relative_error(lhs.columns));
                assert!((found - exact).abs() <= bound, "{} within {bound:e}", about());
            }
        }
    }
    let wide = wide.iter().map(|value| value.to_bits()).collect();
    (wide, half.iter().map(|value| value.to_bits()).collect())
}

/// Values for every place of the exponent: ordinary, huge, tiny and denormal ones, zeros, infinities and NaN.
fn value(seed: &mut u64, extreme: bool) -> bf16 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    let bits = (*seed >> 40) as u16;
    let ordinary = bf16::from_f32(f32::from(bits) / 32768.0 - 1.0);
    if !extreme {
        return ordinary;
    }
    match (*seed >> 20) % 64 {
        0 => bf16::NAN,
        1 => bf16::INFINITY,
        2 => bf16::NEG_INFINITY,
        3..6 => bf16::MAX,
        6..9 => bf16::from_bits(bits & 0x807f),
        9..12 => bf16::MIN_POSITIVE,
        12..16 => bf16::NEG_ZERO,
        16..24 => bf16::from_bits(bits & 0xbfff),
        _ => ordinary,
    }
}

fn order() -> impl Strategy<Value = Order> {
    prop_oneof![4 => Just(Order::Rows), 4 => Just(Order::Columns), 1 => Just(Order::Neither)]
}

/// An extent: often 0, 1 or near the size of a tile.
fn extent(most: usize) -> impl Strategy<Value = usize> {
    prop_oneof![1 => Just(0), 1 => Just(1), 4 => 1..most.min(36), 4 => 1..most]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn products_are_within_the_bound(
        (rows, depth, columns) in (extent(70), extent(300), extent(100)),
        (left, right) in (order(), order()),
        gap in 0_usize..3,
        (keep, factor) in (prop_oneof![Just(0.0_f32), Just(1.0), Just(-0.5)], prop_oneof![Just(1.0_f32), Just(0.3), Just(-2.0)]),
        extreme in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut seed = seed;
        let lhs = Matrix::new(rows, depth, left, gap, || value(&mut seed, extreme));
        let rhs = Matrix::new(depth, columns, right, gap, || value(&mut seed, extreme));
        at_each_level("products in bf16", |_| { check(&lhs, &rhs, keep, factor); });
    }
}

#[test]
fn long_sums_and_aligned_rows_are_within_the_bound() {
    at_each_level("products in bf16", |_| {
        let mut seed = 5;
        // More inner indices than a block has; rows a multiple of 1 KiB apart; more columns than are packed at once.
        for [rows, depth, columns] in [[3, 4097, 40], [15, 9001, 33], [29, 512, 64], [1, 1024, 700], [2, 4096, 200]] {
            for order in [Order::Rows, Order::Columns] {
                let lhs = Matrix::new(rows, depth, order, 0, || value(&mut seed, false));
                let rhs = Matrix::new(depth, columns, order, 0, || value(&mut seed, false));
                check(&lhs, &rhs, 0.5, 2.0);
            }
        }
    });
}

#[test]
fn a_part_of_a_product_has_the_bits_of_the_product() {
    if !is_native() {
        return skipped("equal bits of products in bf16", "this processor has no AVX512-BF16");
    }
    let mut seed = 6;
    let (rows, depth, columns) = (40, 4200, 100);
    let lhs = Matrix::new(rows, depth, Order::Rows, 0, || value(&mut seed, false));
    let rhs = Matrix::new(depth, columns, Order::Rows, 0, || value(&mut seed, false));
    let (whole, _) = check(&lhs, &rhs, 0.0, 1.0);
    let part = Matrix { values: lhs.values[7 * depth..12 * depth].to_vec(), rows: 5, ..lhs };
    let narrow = Matrix { values: rhs.values[50..].to_vec(), columns: 37, ..rhs };
    let (found, _) = check(&part, &narrow, 0.0, 1.0);
    for row in 0..5 {
        assert_eq!(found[row * 40..][..37], whole[(7 + row) * 103 + 50..][..37]);
    }
}

#[test]
fn native_products_flush_denormals_and_others_do_not() {
    let tiny = bf16::from_bits(1);
    at_each_level("denormals in bf16", |_| {
        let one = Matrix::new(1, 1, Order::Rows, 0, || tiny);
        let large = Matrix::new(1, 1, Order::Rows, 0, || bf16::MAX);
        let mut out = f32::NAN;
        let output = Output::F32 { values: &raw mut out, keep: 0.0, factor: 1.0 };
        // SAFETY: all three matrices have one element.
        unsafe { multiply([1, 1, 1], output, 1, one.operand(), large.operand()) };
        assert_eq!(out, if is_native() { 0.0 } else { tiny.to_f32() * bf16::MAX.to_f32() });
    });
}
