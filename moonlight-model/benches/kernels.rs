//! Benchmarks of every kernel, forward and backward, with the shapes of `bench-small` for 4 sequences of 512 tokens.
//!
//! `cargo bench -p moonlight-model` runs all, `cargo bench -p moonlight-model -- grouped_matmul` one. For products, "elem/s" is
//! floating-point operations a second (for attention, those of the causal half); for other kernels the rate counts the bytes that must
//! be read and written. "backward" is the backward pass alone, for every input that has a gradient.

use std::sync::Arc;
use std::time::Duration;

use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use moonlight_model::kernels::{
    AttentionSpec, GroupLayout, QuantBits, QuantizedShape, RotationSpec, combine_rows, cross_entropy, dispatch_rows,
    grouped_attention, grouped_matmul, latent_attention, project, quantized_matmul, rms_norm, rotate, swiglu,
};

const BATCH: usize = 4;
const SEQUENCE: usize = 512;
const TOKENS: usize = BATCH * SEQUENCE;
const HIDDEN: usize = 512;
const HEADS: usize = 8;
const NOPE: usize = 64;
const ROPE: usize = 32;
const VALUE: usize = 64;
const EXPERTS: usize = 32;
const CHOSEN: usize = 4;
const ROWS: usize = TOKENS * CHOSEN;
/// Width of the MLP of an expert.
const WIDTH: usize = 352;
const VOCAB: usize = 8192;

/// An operation with its inputs.
type Operation<const D: usize> = Box<dyn Fn() -> Tensor<D>>;

/// The work of a kernel by formula.
#[derive(Clone, Copy)]
enum Work {
    /// Floating-point operations.
    Operations(usize),
    /// Values of four bytes that are read or written.
    Values(usize),
}

impl Work {
    fn throughput(self) -> Throughput {
        match self {
            Self::Operations(count) => Throughput::Elements(count as u64),
            Self::Values(count) => Throughput::Bytes((count * size_of::<f32>()) as u64),
        }
    }
}

/// Times an operation without autodiff, and the backward pass of its sum. `prepare` draws the inputs.
fn bench<const D: usize>(
    criterion: &mut Criterion,
    name: &str,
    [forward, backward]: [Work; 2],
    prepare: impl Fn(&Device) -> Operation<D>,
) {
    let mut group = criterion.benchmark_group(name);
    group.throughput(forward.throughput());
    let device = Device::default();
    let operation = prepare(&device);
    group.bench_function("forward", |bencher| bencher.iter_with_large_drop(&operation));
    group.throughput(backward.throughput());
    let operation = prepare(&device.autodiff());
    group.bench_function("backward", |bencher| {
        bencher.iter_batched(|| operation().sum(), |sum| sum.backward(), BatchSize::PerIteration);
    });
    group.finish();
}

/// A random input, which requires a gradient on an autodiff device.
fn input<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    let tensor = Tensor::random(shape, Distribution::Normal(0.0, 1.0), device);
    if device.is_autodiff() { tensor.require_grad() } else { tensor }
}

/// A layout in which every expert has the same number of rows.
fn layout() -> Arc<GroupLayout> {
    let choices: Vec<u32> = (0..ROWS).map(|slot| ((slot + slot / EXPERTS) % EXPERTS) as u32).collect();
    Arc::new(GroupLayout::from_choices(&choices, CHOSEN, EXPERTS))
}

fn products(criterion: &mut Criterion) {
    let operations = 2 * TOKENS * HIDDEN * VOCAB;
    bench(criterion, "project", [operations, 2 * operations].map(Work::Operations), |device| {
        let (rows, weight) = (input([TOKENS, HIDDEN], device), input([HIDDEN, VOCAB], device));
        Box::new(move || project(rows.clone(), weight.clone()))
    });
    let operations = 2 * ROWS * HIDDEN * WIDTH;
    bench(criterion, "grouped_matmul", [operations, 2 * operations].map(Work::Operations), |device| {
        let (rows, weight, layout) = (input([ROWS, HIDDEN], device), input([EXPERTS, HIDDEN, WIDTH], device), layout());
        Box::new(move || grouped_matmul(rows.clone(), weight.clone(), &layout))
    });
    for bits in [QuantBits::Eight, QuantBits::Four] {
        let name = format!("quantized_matmul {bits:?}");
        // The weight is frozen, so the backward pass has one product.
        bench(criterion, &name, [operations, operations].map(Work::Operations), |device| {
            let spec = QuantizedShape { bits, input: HIDDEN, output: WIDTH };
            let bytes = spec.value_bytes();
            let values = TensorData::new(vec![bits.zero() + 1; EXPERTS * bytes], [EXPERTS, bytes]);
            let values = Tensor::<2, Int>::from_data(values, (device, DType::U8));
            let scales = Tensor::full([EXPERTS, spec.scales()], 0.01, (device, DType::F16));
            let (rows, layout) = (input([ROWS, HIDDEN], device), layout());
            Box::new(move || quantized_matmul(rows.clone(), values.clone(), scales.clone(), spec, &layout))
        });
    }
}

fn attention(criterion: &mut Criterion) {
    let spec = AttentionSpec { scale: 0.1, starts: None };
    let pairs = BATCH * HEADS * SEQUENCE * (SEQUENCE + 1) / 2;
    let operations = 2 * pairs * (NOPE + ROPE + VALUE);
    bench(criterion, "latent_attention", [operations, 2 * operations].map(Work::Operations), |device| {
        let query = input([BATCH, SEQUENCE, HEADS, NOPE + ROPE], device);
        let key_value = input([BATCH, SEQUENCE, HEADS, NOPE + VALUE], device);
        let (shared, spec) = (input([BATCH, SEQUENCE, ROPE], device), spec.clone());
        Box::new(move || latent_attention(query.clone(), key_value.clone(), shared.clone(), spec.clone()))
    });
    let operations = 2 * pairs * (NOPE + VALUE);
    bench(criterion, "grouped_attention", [operations, 2 * operations].map(Work::Operations), |device| {
        let query = input([BATCH, SEQUENCE, HEADS, NOPE], device);
        let (key_value, spec) = (input([BATCH, SEQUENCE, HEADS / 4, NOPE + VALUE], device), spec.clone());
        Box::new(move || grouped_attention(query.clone(), key_value.clone(), spec.clone()))
    });
}

fn memory(criterion: &mut Criterion) {
    let work = (TOKENS + ROWS) * HIDDEN;
    bench(criterion, "dispatch_rows", [work, work].map(Work::Values), |device| {
        let (tokens, layout) = (input([TOKENS, HIDDEN], device), layout());
        Box::new(move || dispatch_rows(tokens.clone(), &layout))
    });
    bench(criterion, "combine_rows", [work, work + ROWS * HIDDEN].map(Work::Values), |device| {
        let (rows, weights, layout) = (input([ROWS, HIDDEN], device), input([TOKENS, CHOSEN], device), layout());
        Box::new(move || combine_rows(rows.clone(), weights.clone(), &layout))
    });
    bench(criterion, "swiglu", [3 * ROWS * WIDTH, 5 * ROWS * WIDTH].map(Work::Values), |device| {
        let (gate, up) = (input([ROWS, WIDTH], device), input([ROWS, WIDTH], device));
        Box::new(move || swiglu(gate.clone(), up.clone()))
    });
    bench(criterion, "rms_norm", [2 * TOKENS * HIDDEN, 3 * TOKENS * HIDDEN].map(Work::Values), |device| {
        let (x, gain) = (input([TOKENS, HIDDEN], device), input([HIDDEN], device));
        Box::new(move || rms_norm(x.clone(), gain.clone(), 1e-5))
    });
    let work = 2 * TOKENS * HEADS * (NOPE + ROPE);
    bench(criterion, "rotate", [work, work].map(Work::Values), |device| {
        let x = input([BATCH, SEQUENCE, HEADS, NOPE + ROPE], device);
        let angles = Tensor::<2>::random([TOKENS, ROPE / 2], Distribution::Uniform(0.0, 6.0), device);
        let (cos, sin) = (angles.clone().cos(), angles.sin());
        let spec = RotationSpec { start: NOPE, interleave: true };
        Box::new(move || rotate(x.clone(), cos.clone(), sin.clone(), spec.clone()))
    });
    bench(criterion, "cross_entropy", [TOKENS * VOCAB, 2 * TOKENS * VOCAB].map(Work::Values), |device| {
        let logits = input([TOKENS, VOCAB], device);
        let targets: Vec<i32> = (0..TOKENS).map(|token| (token * 31 % VOCAB) as i32).collect();
        let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [TOKENS]), device);
        Box::new(move || cross_entropy(logits.clone(), targets.clone()))
    });
}

fn settings() -> Criterion {
    moonlight_model::keep_freed_memory();
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(1))
}

criterion_group!(name = kernels; config = settings(); targets = products, attention, memory);
criterion_main!(kernels);
