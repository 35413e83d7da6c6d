//! Compares the kernels with the reference, which runs on the CPU in f32.
//!
//! The tests need a device, so they are ignored by default; run them with `-- --ignored cube`. Without a device they fail.

use burn::backend::cubecl::Device;
use burn::backend::ops::{FloatTensorOps, IntTensorOps};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{
    Backend, BackendTensor, Cube, DispatchTensor, DispatchTensorKind, Flex, TensorMetadata, read_sync,
};
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{DType, FloatDType, TensorData};

use super::super::reference::{self, AttentionSaved};
use super::super::*;
use super::attention::{Units, try_forward, try_grad};
use super::grouped_mma::has_matrix_units;
use super::tensor::{buffers, int_buffer};

/// The largest allowed error, relative to the largest value of a result.
const TOLERANCE: f32 = 1e-5;

/// The first device of the runtimes in this build.
fn device() -> Device {
    Device::enumerate_all().into_iter().next().expect("these tests need a CubeCL device")
}

/// Values in -1..1 that depend on index and seed.
fn numbers<const D: usize>(shape: [usize; D], seed: usize) -> TensorData {
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count)
        .map(|index| {
            let mixed = (index as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15 ^ ((seed as u64) << 32));
            let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            (mixed >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    TensorData::new(values, shape)
}

/// If the kernels refused these dtypes, the other tests would compare the reference with itself.
#[test]
#[ignore = "needs a CubeCL device"]
fn the_kernels_take_f32_and_the_devices_integers() {
    let device = device();
    assert!(buffers([&on::<Cube>(&numbers([2, 3], 1), &device)]).is_some());
    assert!(int_buffer(&whole_numbers::<Cube>(&[1, 2], &device)).is_some());
}

fn whole_numbers<B: Backend>(values: &[i32], device: &burn::backend::tensor::Device<B>) -> IntTensor<B> {
    B::int_from_data(TensorData::new(values.to_vec(), [values.len()]), device)
}

fn on<B: Backend>(data: &TensorData, device: &burn::backend::tensor::Device<B>) -> FloatTensor<B> {
    B::float_from_data(data.clone(), device)
}

fn values<B: Backend>(tensor: FloatTensor<B>) -> (Vec<usize>, Vec<f32>) {
    let shape = tensor.shape().to_vec();
    let data = read_sync(B::float_into_data(tensor)).expect("the device answers");
    (shape, data.convert::<f32>().try_into_vec().expect("the data was converted to f32"))
}

/// Asserts that results differ by less than [`TOLERANCE`] of the largest value.
#[track_caller]
fn close(name: &str, fast: FloatTensor<Cube>, expected: FloatTensor<Flex>) {
    within(TOLERANCE, name, fast, expected);
}

/// Asserts that results differ by less than `tolerance` of the largest value.
#[track_caller]
fn within(tolerance: f32, name: &str, fast: FloatTensor<Cube>, expected: FloatTensor<Flex>) {
    let ((shape, fast), (expected_shape, expected)) = (values::<Cube>(fast), values::<Flex>(expected));
    assert_eq!(shape, expected_shape, "{name}");
    // A gradient that is zero up to rounding has no magnitude to compare with, hence the minimum of 0.1.
    let largest = expected.iter().fold(0.1_f32, |most, value| most.max(value.abs()));
    let worst = fast.iter().zip(&expected).map(|(fast, value)| (fast - value).abs());
    // `f32::max` ignores NaN, which would let a NaN pass.
    let worst = worst.fold(0.0, |most: f32, off| if off.is_nan() { f32::INFINITY } else { most.max(off) }) / largest;
    println!("{name} {shape:?}: {worst:.1e} of the largest");
    assert!(worst < tolerance, "{name} {shape:?}: {worst:.1e} of the largest value");
}

/// A layout with half of all rows for expert 0, none for the last expert, and some for each of the others.
fn layout(tokens: usize, experts: usize) -> GroupLayout {
    // f32 stays f32 where the device has matrix units; the products on those have a test of their own.
    GroupLayout::from_choices(&choices(tokens, experts), 2, experts).exact()
}

fn choices(tokens: usize, experts: usize) -> Vec<u32> {
    (0..tokens).flat_map(|token| [0, 1 + (token * 7 % (experts - 2)) as u32]).collect()
}

/// Products and gradients on matrix units, where the device has them: in bf16 and f16, and in f32 rounded to TF32. The factors are
/// exact in each type, so that only the order of the sums and the rounding of the result differ.
#[test]
#[ignore = "needs a CubeCL device"]
fn grouped_products_on_matrix_units() {
    let (cube, flex) = (device(), Default::default());
    // Less than a fragment, widths that can be read one by one only, several strips and tiles, and an expert with many tiles.
    for (tokens, experts, input, output) in [(1, 3, 8, 8), (75, 5, 33, 70), (64, 4, 64, 256), (300, 6, 136, 72)] {
        for dtype in [FloatDType::BF16, FloatDType::F16, FloatDType::F32] {
            let layout = GroupLayout::from_choices(&choices(tokens, experts), 2, experts);
            let exact = |shape: &[usize], seed| {
                let wide = numbers([shape.iter().product()], seed);
                let values: Vec<f32> = wide.iter::<f32>().map(|value| (value * 32.0).round() / 32.0).collect();
                TensorData::new(values, shape.to_vec())
            };
            let rows = exact(&[2 * tokens, input], 1);
            let weight = exact(&[experts, input, output], 2);
            let grad = exact(&[2 * tokens, output], 3);
            let fast = |data: &TensorData| Cube::float_cast(on::<Cube>(data, &cube), dtype);
            let slow = |data: &TensorData| on::<Flex>(data, &flex);
            let Some([probe]) = buffers([&fast(&rows)]) else { continue };
            if !has_matrix_units(&probe) {
                println!("no matrix units for {dtype:?}");
                continue;
            }
            let check = |name: &str, fast: FloatTensor<Cube>, expected: FloatTensor<Flex>| {
                let ((shape, fast), (expected_shape, expected)) = (values::<Cube>(fast), values::<Flex>(expected));
                assert_eq!(shape, expected_shape, "{name}");
                let unit = match dtype {
                    FloatDType::BF16 => 1.0 / 256.0,
                    FloatDType::F16 => 1.0 / 2048.0,
                    _ => 1e-6,
                };
                for (fast, expected) in fast.iter().zip(&expected) {
                    let off = (fast - expected).abs();
                    assert!(off <= expected.abs() * unit + 2e-5, "{name} in {dtype:?}: {fast} for {expected}");
                }
            };
            check(
                "product",
                Cube::grouped_matmul_forward(fast(&rows), fast(&weight), &layout),
                reference::grouped_matmul_forward::<Flex>(slow(&rows), slow(&weight), &layout),
            );
            check(
                "product's gradient for rows",
                Cube::grouped_matmul_rows_grad(fast(&grad), fast(&weight), &layout),
                reference::grouped_matmul_rows_grad::<Flex>(slow(&grad), slow(&weight), &layout),
            );
            check(
                "product's gradient for weights",
                Cube::grouped_matmul_weight_grad(fast(&rows), fast(&grad), &layout),
                reference::grouped_matmul_weight_grad::<Flex>(slow(&rows), slow(&grad), &layout),
            );
        }
    }
}

#[test]
#[ignore = "needs a CubeCL device"]
fn quantized_products() {
    let (cube, flex) = (device(), Default::default());
    // Few rows, and so many that weights are dequantized first where there are matrix units.
    for (tokens, bits) in [(7, QuantBits::Eight), (7, QuantBits::Four), (200, QuantBits::Eight), (200, QuantBits::Four)]
    {
        let (experts, input, output) = (5, 53, 37);
        let layout = layout(tokens, experts);
        let spec = QuantizedShape { bits, input, output };
        let bytes = spec.value_bytes();
        let packed: Vec<u8> = (0..experts * bytes).map(|at| (at * 37 + at / 5) as u8).collect();
        let packed = TensorData::new(packed, [experts, bytes]);
        let scales = numbers([experts, spec.scales()], 2);
        let (rows, grad) = (numbers([2 * tokens, input], 1), numbers([2 * tokens, output], 3));
        // As `QuantizedWeight` stores them: WGSL has no type of 8 bits.
        let dtype = if Cube::supports_dtype(&cube, DType::U8) { DType::U8 } else { DType::I32 };
        let stored = Cube::int_from_data(packed.clone().convert_dtype(dtype), &cube);
        close(
            "quantized product",
            Cube::quantized_matmul_forward(
                on::<Cube>(&rows, &cube),
                stored.clone(),
                on::<Cube>(&scales, &cube),
                spec,
                &layout,
            ),
            reference::quantized_matmul_forward::<Flex>(
                on::<Flex>(&rows, &flex),
                Flex::int_from_data(packed.clone(), &flex),
                on::<Flex>(&scales, &flex),
                spec,
                &layout,
            ),
        );
        close(
            "quantized product's gradient",
            Cube::quantized_matmul_rows_grad(
                on::<Cube>(&grad, &cube),
                stored,
                on::<Cube>(&scales, &cube),
                spec,
                &layout,
            ),
            reference::quantized_matmul_rows_grad::<Flex>(
                on::<Flex>(&grad, &flex),
                Flex::int_from_data(packed, &flex),
                on::<Flex>(&scales, &flex),
                spec,
                &layout,
            ),
        );
    }
}

#[test]
#[ignore = "needs a CubeCL device"]
fn grouped_products() {
    let (cube, flex) = (device(), Default::default());
    // Less than a tile, sizes that are not multiples of a tile, exact tiles, and an expert with many tiles.
    for (tokens, experts, input, output) in
        [(1, 3, 1, 1), (3, 9, 5, 4), (75, 5, 33, 70), (64, 4, 64, 128), (300, 6, 130, 65)]
    {
        let layout = layout(tokens, experts);
        let rows = numbers([2 * tokens, input], 1);
        let weight = numbers([experts, input, output], 2);
        let grad = numbers([2 * tokens, output], 3);
        close(
            "product",
            Cube::grouped_matmul_forward(on::<Cube>(&rows, &cube), on::<Cube>(&weight, &cube), &layout),
            reference::grouped_matmul_forward::<Flex>(on::<Flex>(&rows, &flex), on::<Flex>(&weight, &flex), &layout),
        );
        close(
            "product's gradient for rows",
            Cube::grouped_matmul_rows_grad(on::<Cube>(&grad, &cube), on::<Cube>(&weight, &cube), &layout),
            reference::grouped_matmul_rows_grad::<Flex>(on::<Flex>(&grad, &flex), on::<Flex>(&weight, &flex), &layout),
        );
        close(
            "product's gradient for weights",
            Cube::grouped_matmul_weight_grad(on::<Cube>(&rows, &cube), on::<Cube>(&grad, &cube), &layout),
            reference::grouped_matmul_weight_grad::<Flex>(on::<Flex>(&rows, &flex), on::<Flex>(&grad, &flex), &layout),
        );
    }
}

#[test]
#[ignore = "needs a CubeCL device that stores f16"]
fn half_types_are_summed_in_f32_and_rounded_once() {
    let (cube, flex) = (device(), Default::default());
    let layout = layout(75, 5);
    // Inputs are exact in f16, so that only the results are rounded.
    let exact = |shape: &[usize], seed| {
        let wide = numbers([shape.iter().product()], seed);
        let values: Vec<f32> = wide.iter::<f32>().map(|value| (value * 64.0).round() / 64.0).collect();
        TensorData::new(values, shape.to_vec())
    };
    let half = |data| Cube::float_cast(on::<Cube>(data, &cube), FloatDType::F16);
    let check = |name, fast: FloatTensor<Cube>, expected: FloatTensor<Flex>| {
        assert_eq!(fast.dtype(), DType::F16, "{name}");
        let ((_, fast), (_, expected)) = (values::<Cube>(fast), values::<Flex>(expected));
        for (fast, expected) in fast.iter().zip(&expected) {
            let off = (fast - expected).abs();
            // Half a unit in the last place of the 11 bits of an f16, and the rounding of the f32 sum.
            assert!(off <= expected.abs() / 2048.0 + 1e-5, "{name}: {fast} for {expected}");
        }
    };
    let (rows, weight) = (exact(&[150, 40], 1), exact(&[5, 40, 70], 2));
    assert!(buffers([&half(&rows)]).is_some(), "this device does not store f16");
    check(
        "product",
        Cube::grouped_matmul_forward(half(&rows), half(&weight), &layout),
        reference::grouped_matmul_forward::<Flex>(on::<Flex>(&rows, &flex), on::<Flex>(&weight, &flex), &layout),
    );
    let spec = AttentionSpec { scale: 0.3, starts: None };
    let (query, keys) = (exact(&[1, 40, 2, 8], 3), exact(&[1, 40, 2, 14], 4));
    check(
        "attention",
        // Matrix units round the probabilities as well.
        try_forward(&half(&query), &half(&keys), None, &spec, Units::Scalar).expect("the kernels run").0,
        reference::attention_forward::<Flex>(on::<Flex>(&query, &flex), on::<Flex>(&keys, &flex), None, &spec).0,
    );
    check(
        "SwiGLU",
        Cube::swiglu_forward(half(&rows), half(&rows)),
        reference::swiglu_forward::<Flex>(on::<Flex>(&rows, &flex), on::<Flex>(&rows, &flex)),
    );
}

#[test]
#[ignore = "needs a CubeCL device"]
fn a_grouped_product_reads_strided_tensors() {
    let (cube, flex) = (device(), Default::default());
    let layout = layout(20, 4);
    let (rows, weight) = (numbers([7, 40], 1), numbers([4, 9, 7], 2));
    // Both factors transposed, so that their rows are strided.
    let transposed = |rows, weight| (Cube::float_transpose(rows), Cube::float_transpose(weight));
    let (fast_rows, fast_weight) = transposed(on::<Cube>(&rows, &cube), on::<Cube>(&weight, &cube));
    let rows = Flex::float_transpose(on::<Flex>(&rows, &flex));
    let weight = Flex::float_transpose(on::<Flex>(&weight, &flex));
    close(
        "product of transposed factors",
        Cube::grouped_matmul_forward(fast_rows, fast_weight, &layout),
        reference::grouped_matmul_forward::<Flex>(rows, weight, &layout),
    );
}

/// Scores with ties, negative ones, both zeros, NaN and infinities.
fn scores(tokens: usize, experts: usize) -> TensorData {
    let mut values: Vec<f32> = numbers([tokens, experts], 5).iter::<f32>().map(|value| (value * 8.0).round()).collect();
    let special = [f32::NAN, f32::NEG_INFINITY, -0.0, f32::INFINITY, -f32::NAN];
    values.iter_mut().enumerate().filter(|(at, _)| at % 29 < 5 && at / 29 % 3 == 0).for_each(|(at, value)| {
        *value = special[at % 29];
    });
    // A token whose scores are all NaN.
    values[..experts].fill(f32::NAN);
    TensorData::new(values, [tokens, experts])
}

#[test]
#[ignore = "needs a CubeCL device"]
fn routing() {
    use crate::moe::shape::{ScoringFunc, TopkMethod};
    let (cube, flex) = (device(), Default::default());
    let ints = |tensor| -> Vec<u32> {
        read_sync(Cube::int_into_data(tensor)).expect("the device answers").iter::<u32>().collect()
    };
    for (tokens, experts, k, groups, groups_per_token, method) in [
        (1, 2, 1, 1, 1, TopkMethod::Greedy),
        (7, 64, 6, 1, 1, TopkMethod::NoauxTc),
        (200, 64, 6, 8, 3, TopkMethod::NoauxTc),
        (33, 160, 6, 8, 3, TopkMethod::GroupLimitedGreedy),
        (5, 1024, 8, 4, 2, TopkMethod::NoauxTc),
        (300, 3, 2, 1, 1, TopkMethod::Greedy),
    ] {
        let (scoring, normalize, scale) = (ScoringFunc::Sigmoid, true, 1.0);
        let rule = RoutingRule { experts, k, groups, groups_per_token, scoring, method, normalize, scale };
        let (scores, bias) = (scores(tokens, experts), numbers([experts], 6));
        for bias in [None, Some(bias)] {
            let fast_bias = bias.as_ref().map(|bias| on::<Cube>(bias, &cube));
            let slow_bias = bias.as_ref().map(|bias| on::<Flex>(bias, &flex));
            let chosen = Cube::choose_experts_forward(on::<Cube>(&scores, &cube), fast_bias, &rule);
            let expected = reference::choose_experts_forward::<Flex>(on::<Flex>(&scores, &flex), slow_bias, &rule);
            let expected: Vec<u32> =
                read_sync(Flex::int_into_data(expected)).expect("the CPU answers").iter::<u32>().collect();
            assert_eq!(ints(chosen.clone()), expected, "{rule:?}");

            let layout = GroupLayout::from_choices(&expected, k, experts);
            let counts = Cube::count_choices_forward(chosen.clone(), None, experts, 1);
            let rows: Vec<u32> = (0..experts).map(|group| layout.group(group).len() as u32).collect();
            assert_eq!(ints(counts.clone()), rows, "{rule:?}");
            assert_eq!(ints(Cube::sort_choices_forward(chosen.clone(), counts)), layout.packed(), "{rule:?}");

            // Every third token is padding.
            let counted: Vec<i32> = (0..tokens).map(|token| i32::from(token % 3 != 0)).collect();
            let fast_counted = Some(whole_numbers::<Cube>(&counted, &cube));
            let slow_counted = Some(whole_numbers::<Flex>(&counted, &flex));
            let sections = if tokens % 5 == 0 { 5 } else { 1 };
            let slow = Flex::int_from_data(TensorData::new(expected, [tokens, k]), &flex);
            let slow = reference::count_choices_forward::<Flex>(slow, slow_counted, experts, sections);
            let slow: Vec<u32> = read_sync(Flex::int_into_data(slow)).expect("the CPU answers").iter::<u32>().collect();
            let fast = Cube::count_choices_forward(chosen, fast_counted, experts, sections);
            assert_eq!(ints(fast), slow, "{rule:?}");
        }
    }
}

/// The layout of a router stays on the device.
#[test]
#[ignore = "needs a CubeCL device"]
fn products_and_rows_by_a_layout_on_the_device() {
    let (cube, flex) = (device(), Default::default());
    let (tokens, experts, width) = (300, 6, 70);
    let expected = layout(tokens, experts);
    let choices: Vec<i32> = choices(tokens, experts).into_iter().map(|choice| choice as i32).collect();
    let choices = Cube::int_from_data(TensorData::new(choices, [tokens, 2]), &cube);
    let counts = Cube::count_choices_forward(choices.clone(), None, experts, 1);
    let tensor =
        |int| DispatchTensor { kind: DispatchTensorKind::Cube(BackendTensor::Int(int)), autodiff: Default::default() };
    let layout =
        GroupLayout::from_choice_tensor(Tensor::from_dispatch(tensor(choices)), Tensor::from_dispatch(tensor(counts)))
            .exact();
    let (x, rows, weight) =
        (numbers([tokens, width], 1), numbers([2 * tokens, width], 2), numbers([experts, width, 9], 3));
    let (grad, weights) = (numbers([2 * tokens, 9], 4), numbers([tokens, 2], 5));
    close(
        "dispatch",
        Cube::dispatch_rows_forward(on::<Cube>(&x, &cube), &layout),
        reference::dispatch_rows_forward::<Flex>(on::<Flex>(&x, &flex), &expected),
    );
    close(
        "combination",
        Cube::combine_rows_forward(on::<Cube>(&rows, &cube), on::<Cube>(&weights, &cube), &layout),
        reference::combine_rows_forward::<Flex>(on::<Flex>(&rows, &flex), on::<Flex>(&weights, &flex), &expected),
    );
    let fast =
        Cube::combine_rows_grad(on::<Cube>(&rows, &cube), on::<Cube>(&weights, &cube), on::<Cube>(&x, &cube), &layout);
    let slow = reference::combine_rows_grad::<Flex>(
        on::<Flex>(&rows, &flex),
        on::<Flex>(&weights, &flex),
        on::<Flex>(&x, &flex),
        &expected,
    );
    close("combination's gradient for rows", fast.0, slow.0);
    close("combination's gradient for weights", fast.1, slow.1);
    close(
        "product",
        Cube::grouped_matmul_forward(on::<Cube>(&rows, &cube), on::<Cube>(&weight, &cube), &layout),
        reference::grouped_matmul_forward::<Flex>(on::<Flex>(&rows, &flex), on::<Flex>(&weight, &flex), &expected),
    );
    close(
        "product's gradient for weights",
        Cube::grouped_matmul_weight_grad(on::<Cube>(&rows, &cube), on::<Cube>(&grad, &cube), &layout),
        reference::grouped_matmul_weight_grad::<Flex>(on::<Flex>(&rows, &flex), on::<Flex>(&grad, &flex), &expected),
    );
    // The host has read nothing yet; now it does, and has the same layout.
    assert_eq!(layout, expected);
}

/// Attention without documents, with a sliding window, and with documents of another length in each sequence.
fn specs(batch: usize, sequence: usize) -> [AttentionSpec; 3] {
    let starts: Vec<u32> = (0..batch)
        .flat_map(|row| {
            let length = 7 + 40 * row;
            (0..sequence).map(move |index| (index / length * length) as u32)
        })
        .collect();
    // A sliding window of 5 tokens, cut short where a document starts.
    let windows = starts.iter().enumerate().map(|(at, &start)| start.max((at % sequence).saturating_sub(4) as u32));
    let windows = Some(Arc::new(windows.collect()));
    let spec = |starts| AttentionSpec { scale: 0.3, starts };
    [spec(None), spec(windows), spec(Some(Arc::new(starts)))]
}

/// Compares attention and its gradients with the reference. The factors are rounded to `dtype` for both, so that what is left is the rounding
/// of products: with matrix units probabilities are rounded to `dtype`, or f32 to TF32.
fn attention_agrees(
    [query, key_value, shared]: [Option<&TensorData>; 3],
    spec: &AttentionSpec,
    dtype: FloatDType,
    units: Units,
) {
    let (cube, flex) = (device(), Default::default());
    let fast = |data: &TensorData| Cube::float_cast(on::<Cube>(data, &cube), dtype);
    let slow = |data: &TensorData| Flex::float_cast(Flex::float_cast(on::<Flex>(data, &flex), dtype), FloatDType::F32);
    let (query, key_value) = (query.expect("a query is given"), key_value.expect("keys are given"));
    if buffers([&fast(query)]).is_none() {
        println!("the device does not store {dtype:?}");
        return;
    }
    let tolerance = match (dtype, units) {
        (FloatDType::BF16, _) => 1.5e-2,
        (FloatDType::F16, _) => 2e-3,
        (_, Units::Fastest) if has_matrix_units(&buffers([&fast(query)]).expect("it is stored")[0]) => 2e-3,
        _ => TOLERANCE,
    };
    let near = |name: &str, fast: FloatTensor<Cube>, expected: FloatTensor<Flex>| {
        within(tolerance, &format!("{name} in {dtype:?} ({units:?})"), fast, expected);
    };
    let (output, log_sum) =
        try_forward(&fast(query), &fast(key_value), shared.map(fast).as_ref(), spec, units).expect("the kernels run");
    let (slow_output, slow_log_sum) =
        reference::attention_forward::<Flex>(slow(query), slow(key_value), shared.map(slow), spec);
    near("attention", output.clone(), slow_output.clone());
    near("attention's sums", log_sum.clone(), slow_log_sum.clone());
    let grad = numbers::<4>(output.shape().dims(), 9);
    let saved = AttentionSaved::<Cube> {
        query: fast(query),
        key_value: fast(key_value),
        shared_key: shared.map(fast),
        output,
        log_sum,
    };
    let slow_saved = AttentionSaved::<Flex> {
        query: slow(query),
        key_value: slow(key_value),
        shared_key: shared.map(slow),
        output: slow_output,
        log_sum: slow_log_sum,
    };
    let grads = try_grad(&saved, &fast(&grad), spec, units).expect("the kernels run");
    let slow_grads = reference::attention_grad::<Flex>(slow_saved, slow(&grad), spec);
    near("attention's gradient for queries", grads.0, slow_grads.0);
    near("attention's gradient for keys and values", grads.1, slow_grads.1);
    assert_eq!(grads.2.is_some(), slow_grads.2.is_some());
    if let (Some(shared), Some(slow)) = (grads.2, slow_grads.2) {
        near("attention's gradient for the shared key", shared, slow);
    }
}

/// One token, exact blocks, and more; heads narrower and wider than a block of columns, and with whole chunks of 16 bytes.
const HEADS: [(usize, usize, usize, usize, usize); 4] =
    [(2, 1, 6, 4, 7), (2, 64, 5, 2, 4), (3, 131, 40, 24, 33), (2, 96, 24, 8, 40)];

#[test]
#[ignore = "needs a CubeCL device"]
fn attention() {
    attention_in(&HEADS, FloatDType::F32, Units::Scalar);
}

#[test]
#[ignore = "needs a CubeCL device"]
fn attention_on_matrix_units() {
    // Each is a kernel of its own, which takes a device in software seconds to compile.
    attention_in(&HEADS[..1], FloatDType::F32, Units::Fastest);
    attention_in(&HEADS[2..], FloatDType::F32, Units::Fastest);
    attention_in(&HEADS[3..], FloatDType::BF16, Units::Fastest);
    attention_in(&HEADS[3..], FloatDType::F16, Units::Fastest);
}

fn attention_in(heads: &[(usize, usize, usize, usize, usize)], dtype: FloatDType, units: Units) {
    for &(batch, sequence, own, shared, value) in heads {
        for spec in specs(batch, sequence) {
            let query = numbers([batch, sequence, 4, own + shared], 1);
            let shared_key = numbers([batch, sequence, shared], 2);
            let keys = numbers([batch, sequence, 4, own + value], 3);
            attention_agrees([Some(&query), Some(&keys), Some(&shared_key)], &spec, dtype, units);
            let keys = numbers([batch, sequence, 2, own + shared + value], 4);
            attention_agrees([Some(&query), Some(&keys), None], &spec, dtype, units);
        }
    }
}

#[test]
#[ignore = "needs a CubeCL device, and a minute on one in software"]
fn attention_with_moonlights_heads() {
    let (query, keys) = (numbers([1, 72, 2, 128 + 64], 1), numbers([1, 72, 2, 128 + 128], 2));
    let spec = AttentionSpec { scale: 192_f32.powf(-0.5), starts: None };
    let inputs = [Some(&query), Some(&keys), Some(&numbers([1, 72, 64], 3))];
    attention_agrees(inputs, &spec, FloatDType::F32, Units::Scalar);
    for dtype in [FloatDType::F32, FloatDType::BF16] {
        attention_agrees(inputs, &spec, dtype, Units::Fastest);
    }
}

#[test]
#[ignore = "needs a CubeCL device"]
fn rows() {
    let (cube, flex) = (device(), Default::default());
    for (tokens, width) in [(1, 1), (70, 9), (33, 300)] {
        let layout = layout(tokens, 6);
        let (x, rows) = (numbers([tokens, width], 1), numbers([2 * tokens, width], 2));
        let (weights, grad) = (numbers([tokens, 2], 3), numbers([tokens, width], 4));
        close(
            "rows of tokens",
            Cube::dispatch_rows_forward(on::<Cube>(&x, &cube), &layout),
            reference::dispatch_rows_forward::<Flex>(on::<Flex>(&x, &flex), &layout),
        );
        close(
            "rows' gradient for tokens",
            Cube::dispatch_rows_grad(on::<Cube>(&rows, &cube), &layout),
            reference::dispatch_rows_grad::<Flex>(on::<Flex>(&rows, &flex), &layout),
        );
        close(
            "sum of rows",
            Cube::combine_rows_forward(on::<Cube>(&rows, &cube), on::<Cube>(&weights, &cube), &layout),
            reference::combine_rows_forward::<Flex>(on::<Flex>(&rows, &flex), on::<Flex>(&weights, &flex), &layout),
        );
        let fast = Cube::combine_rows_grad(
            on::<Cube>(&rows, &cube),
            on::<Cube>(&weights, &cube),
            on::<Cube>(&grad, &cube),
            &layout,
        );
        let slow = reference::combine_rows_grad::<Flex>(
            on::<Flex>(&rows, &flex),
            on::<Flex>(&weights, &flex),
            on::<Flex>(&grad, &flex),
            &layout,
        );
        close("sum's gradient for rows", fast.0, slow.0);
        close("sum's gradient for weights", fast.1, slow.1);
    }
}

#[test]
#[ignore = "needs a CubeCL device"]
fn swiglu() {
    let (cube, flex) = (device(), Default::default());
    for shape in [[1, 1], [70, 333]] {
        let data = [1, 2, 3].map(|seed| numbers(shape, seed));
        let [gate, up, grad] = data.each_ref().map(|data| on::<Cube>(data, &cube));
        let [slow_gate, slow_up, slow_grad] = data.each_ref().map(|data| on::<Flex>(data, &flex));
        close(
            "SwiGLU",
            Cube::swiglu_forward(gate.clone(), up.clone()),
            reference::swiglu_forward::<Flex>(slow_gate.clone(), slow_up.clone()),
        );
        let fast = Cube::swiglu_grad(gate, up, grad);
        let slow = reference::swiglu_grad::<Flex>(slow_gate, slow_up, slow_grad);
        close("SwiGLU's gradient for the gate", fast.0, slow.0);
        close("SwiGLU's gradient for up", fast.1, slow.1);
    }
}

#[test]
#[ignore = "needs a CubeCL device"]
fn rms_norm() {
    let (cube, flex) = (device(), Default::default());
    for (rows, width) in [(1, 1), (131, 67), (5, 512)] {
        let (x, gain, grad) = (numbers([rows, width], 1), numbers([width], 2), numbers([rows, width], 3));
        close(
            "RMSNorm",
            Cube::rms_norm_forward(on::<Cube>(&x, &cube), on::<Cube>(&gain, &cube), 1e-5),
            reference::rms_norm_forward::<Flex>(on::<Flex>(&x, &flex), on::<Flex>(&gain, &flex), 1e-5),
        );
        let fast = Cube::rms_norm_grad(on::<Cube>(&x, &cube), on::<Cube>(&gain, &cube), on::<Cube>(&grad, &cube), 1e-5);
        let slow = reference::rms_norm_grad::<Flex>(
            on::<Flex>(&x, &flex),
            on::<Flex>(&gain, &flex),
            on::<Flex>(&grad, &flex),
            1e-5,
        );
        close("RMSNorm's gradient for x", fast.0, slow.0);
        close("RMSNorm's gradient for the gain", fast.1, slow.1);
    }
}

#[test]
#[ignore = "needs a CubeCL device"]
fn rotate() {
    let (cube, flex) = (device(), Default::default());
    let (batch, sequence, heads, width) = (2, 5, 3, 14);
    for (start, interleave) in [(0, true), (0, false), (6, true), (4, false)] {
        let pairs = (width - start) / 2;
        let x = numbers([batch, sequence, heads, width], 1);
        let (cos, sin) = (numbers([batch * sequence, pairs], 2), numbers([batch * sequence, pairs], 3));
        let spec = RotationSpec { start, interleave };
        close(
            "rotation",
            Cube::rotate_forward(on::<Cube>(&x, &cube), on::<Cube>(&cos, &cube), on::<Cube>(&sin, &cube), &spec),
            reference::rotate_forward::<Flex>(
                on::<Flex>(&x, &flex),
                on::<Flex>(&cos, &flex),
                on::<Flex>(&sin, &flex),
                &spec,
            ),
        );
    }
}

#[test]
#[ignore = "needs a CubeCL device"]
fn cross_entropy() {
    let (cube, flex) = (device(), Default::default());
    for (rows, vocab) in [(1, 2), (21, 50), (37, 1001)] {
        let (logits, grad) = (numbers([rows, vocab], 1), numbers([rows], 2));
        let targets: Vec<i32> = (0..rows).map(|row| (row * 13 % vocab) as i32).collect();
        let fast_targets = whole_numbers::<Cube>(&targets, &cube);
        let slow_targets = whole_numbers::<Flex>(&targets, &flex);
        close(
            "loss",
            Cube::cross_entropy_forward(on::<Cube>(&logits, &cube), fast_targets.clone()),
            reference::cross_entropy_forward::<Flex>(on::<Flex>(&logits, &flex), slow_targets.clone()),
        );
        close(
            "loss's gradient",
            Cube::cross_entropy_grad(on::<Cube>(&logits, &cube), fast_targets, on::<Cube>(&grad, &cube)),
            reference::cross_entropy_grad::<Flex>(on::<Flex>(&logits, &flex), slow_targets, on::<Flex>(&grad, &flex)),
        );
    }
}

/// The seconds of the first run, which compiles the kernels, and of the fastest of three more.
fn seconds(device: &Device, run: impl Fn()) -> (f64, f64) {
    let once = || {
        let began = Instant::now();
        run();
        Cube::sync(device).expect("the device answers");
        began.elapsed().as_secs_f64()
    };
    let first = once();
    (first, (0..3).map(|_| once()).fold(f64::INFINITY, f64::min))
}

/// Prints the time of each kernel and of the reference on the same device. Asserts nothing about the first four: they use blocks in
/// shared memory, which are not expected to be faster on a software device.
#[test]
#[ignore = "needs a CubeCL device, and minutes on one in software"]
fn kernels_of_one_pass_are_faster_than_the_reference() {
    let device = device();
    // A layer of the small benchmark model, 512 tokens.
    let (tokens, hidden, width, experts, vocab) = (512, 512, 352, 32, 8192);
    let choices: Vec<u32> = (0..4 * tokens).map(|slot| ((slot / 4 * 7 + slot % 4 * 8) % experts) as u32).collect();
    let layout = &GroupLayout::from_choices(&choices, 4, experts);
    let of = |shape: &[usize], seed| {
        let data = numbers([shape.iter().product()], seed);
        on::<Cube>(&TensorData::from_bytes(data.into_bytes(), shape.to_vec(), DType::F32), &device)
    };
    let rows = of(&[4 * tokens, hidden], 1);
    let weight = of(&[experts, hidden, width], 2);
    let wide = of(&[4 * tokens, width], 3);
    let (query, shared) = (of(&[1, tokens, 8, 96], 4), of(&[1, tokens, 32], 5));
    let (key_value, value) = (of(&[1, tokens, 8, 128], 6), of(&[1, tokens, 8, 64], 7));
    let spec = &AttentionSpec { scale: 0.1, starts: None };
    let (x, gain) = (of(&[tokens, hidden], 8), of(&[hidden], 9));
    let weights = of(&[tokens, 4], 10);
    let (logits, loss) = (of(&[tokens, vocab], 11), of(&[tokens], 12));
    let targets = whole_numbers::<Cube>(&vec![5; tokens], &device);
    let (cos, sin) = (of(&[tokens, 16], 13), of(&[tokens, 16], 14));
    let turn = &RotationSpec { start: 64, interleave: true };

    /// Runs the same calls as methods of the backend and as functions of the reference.
    macro_rules! both {
        ($name:literal: $($operation:ident($($argument:expr),*)),+) => {{
            let ours = seconds(&device, || { $(let _ = Cube::$operation($($argument.clone()),*);)+ });
            let plain = seconds(&device, || { $(let _ = reference::$operation::<Cube>($($argument.clone()),*);)+ });
            ($name, ours, plain)
        }};
    }
    let attention = |grad: bool, ours: bool| {
        let (query, key_value, shared_key) = (query.clone(), key_value.clone(), Some(shared.clone()));
        let inputs = (query.clone(), key_value.clone(), shared_key.clone());
        let (output, log_sum) = if ours {
            Cube::attention_forward(inputs.0, inputs.1, inputs.2, spec)
        } else {
            reference::attention_forward::<Cube>(inputs.0, inputs.1, inputs.2, spec)
        };
        let saved = AttentionSaved::<Cube> { query, key_value, shared_key, output, log_sum };
        if grad && ours {
            let _ = Cube::attention_grad(saved, value.clone(), spec);
        } else if grad {
            let _ = reference::attention_grad::<Cube>(saved, value.clone(), spec);
        }
    };
    let results = [
        both!("grouped product": grouped_matmul_forward(rows, weight, &layout)),
        both!("its gradients":
            grouped_matmul_rows_grad(wide, weight, &layout), grouped_matmul_weight_grad(rows, wide, &layout)),
        ("attention", seconds(&device, || attention(false, true)), seconds(&device, || attention(false, false))),
        ("with gradients", seconds(&device, || attention(true, true)), seconds(&device, || attention(true, false))),
        both!("rows": dispatch_rows_forward(x, &layout), dispatch_rows_grad(rows, &layout),
            combine_rows_forward(rows, weights, &layout), combine_rows_grad(rows, weights, x, &layout)),
        both!("SwiGLU": swiglu_forward(wide, wide), swiglu_grad(wide, wide, wide)),
        both!("RMSNorm": rms_norm_forward(x, gain, 1e-5_f32), rms_norm_grad(x, gain, x, 1e-5_f32)),
        both!("rotation": rotate_forward(query, cos, sin, &turn)),
        both!("loss": cross_entropy_forward(logits, targets), cross_entropy_grad(logits, targets, loss)),
    ];
    println!("{:16} {:>10} {:>10} {:>10} {:>10}   (ms, on {device:?})", "", "ours", "reference", "first", "first");
    const IN_BLOCKS: usize = 4;
    let (mut total, mut total_plain) = (0.0, 0.0);
    for (at, (name, (first, best), (plain_first, plain_best))) in results.into_iter().enumerate() {
        let [best_ms, plain_ms, first_ms, plain_first_ms] =
            [best, plain_best, first, plain_first].map(|seconds| seconds * 1e3);
        println!("{name:16} {best_ms:10.2} {plain_ms:10.2} {first_ms:10.0} {plain_first_ms:10.0}");
        if at >= IN_BLOCKS {
            total += best;
            total_plain += plain_best;
        }
    }
    assert!(total < total_plain, "ours take {total:.3} s, the reference {total_plain:.3} s");
}
