//! Holds the kernels against the reference, which runs on the CPU in f32.
//!
//! These tests need a device, so they run when they are asked for: `-- --ignored cube`. Without a device they fail.

use burn::backend::cubecl::Device;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Cube, Flex, TensorMetadata, read_sync};
use burn::tensor::TensorData;

use super::super::ExpertPlan;
use super::super::backend::Kernels;
use super::super::reference;

/// What the largest value of a result allows its values to be off.
const TOLERANCE: f32 = 1e-5;

/// The first device that the build's runtimes have.
fn device() -> Device {
    Device::enumerate_all().into_iter().next().expect("these tests need a device that CubeCL knows; there is none")
}

/// Numbers that differ from place to place and from tensor to tensor, between -1 and 1.
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

fn on<B: Backend>(data: &TensorData, device: &burn::backend::tensor::Device<B>) -> FloatTensor<B> {
    B::float_from_data(data.clone(), device)
}

fn values<B: Backend>(tensor: FloatTensor<B>) -> (Vec<usize>, Vec<f32>) {
    let shape = tensor.shape().to_vec();
    let data = read_sync(B::float_into_data(tensor)).expect("the device answers");
    (shape, data.convert::<f32>().try_into_vec().expect("the data was converted to f32"))
}

/// How far the results are apart, of the largest value.
#[track_caller]
fn close(name: &str, fast: FloatTensor<Cube>, expected: FloatTensor<Flex>) {
    let ((shape, fast), (expected_shape, expected)) = (values::<Cube>(fast), values::<Flex>(expected));
    assert_eq!(shape, expected_shape, "{name}");
    let largest = expected.iter().fold(f32::MIN_POSITIVE, |most, value| most.max(value.abs()));
    let worst = fast.iter().zip(&expected).map(|(fast, value)| (fast - value).abs());
    // A NaN must not pass for small.
    let worst = worst.fold(0.0, |most: f32, off| if off.is_nan() { f32::INFINITY } else { most.max(off) }) / largest;
    println!("{name} {shape:?}: {worst:.1e} of the largest");
    assert!(worst < TOLERANCE, "{name} {shape:?}: {worst:.1e} of the largest value");
}

/// Expert 0 has half of all rows, the last none, and of the others each some.
fn plan(tokens: usize, experts: usize) -> ExpertPlan {
    let choices: Vec<u32> = (0..tokens).flat_map(|token| [0, 1 + (token * 7 % (experts - 2)) as u32]).collect();
    ExpertPlan::new(&choices, 2, experts)
}

#[test]
#[ignore = "needs a CubeCL device"]
fn grouped_products() {
    let (cube, flex) = (device(), Default::default());
    // Less than a tile, sizes that no tile divides, tiles exactly, and an expert with many tiles.
    for (tokens, experts, input, output) in
        [(1, 3, 1, 1), (3, 9, 5, 4), (75, 5, 33, 70), (64, 4, 64, 128), (300, 6, 130, 65)]
    {
        let plan = plan(tokens, experts);
        let rows = numbers([2 * tokens, input], 1);
        let weight = numbers([experts, input, output], 2);
        let grad = numbers([2 * tokens, output], 3);
        close(
            "product",
            Cube::grouped_matmul_forward(on::<Cube>(&rows, &cube), on::<Cube>(&weight, &cube), &plan),
            reference::grouped_matmul_forward::<Flex>(on::<Flex>(&rows, &flex), on::<Flex>(&weight, &flex), &plan),
        );
        close(
            "product's gradient for rows",
            Cube::grouped_matmul_rows_grad(on::<Cube>(&grad, &cube), on::<Cube>(&weight, &cube), &plan),
            reference::grouped_matmul_rows_grad::<Flex>(on::<Flex>(&grad, &flex), on::<Flex>(&weight, &flex), &plan),
        );
        close(
            "product's gradient for weights",
            Cube::grouped_matmul_weight_grad(on::<Cube>(&rows, &cube), on::<Cube>(&grad, &cube), &plan),
            reference::grouped_matmul_weight_grad::<Flex>(on::<Flex>(&rows, &flex), on::<Flex>(&grad, &flex), &plan),
        );
    }
}

#[test]
#[ignore = "needs a CubeCL device"]
fn a_grouped_product_reads_tensors_as_they_lie() {
    let (cube, flex) = (device(), Default::default());
    let plan = plan(20, 4);
    let (rows, weight) = (numbers([7, 40], 1), numbers([4, 9, 7], 2));
    // Both factors turned round, so that their lines lie across.
    let turned = |rows, weight| (Cube::float_transpose(rows), Cube::float_transpose(weight));
    let (fast_rows, fast_weight) = turned(on::<Cube>(&rows, &cube), on::<Cube>(&weight, &cube));
    let rows = Flex::float_transpose(on::<Flex>(&rows, &flex));
    let weight = Flex::float_transpose(on::<Flex>(&weight, &flex));
    close(
        "product of turned factors",
        Cube::grouped_matmul_forward(fast_rows, fast_weight, &plan),
        reference::grouped_matmul_forward::<Flex>(rows, weight, &plan),
    );
}
