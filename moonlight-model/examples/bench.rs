//! Benchmark: forward and backward pass of a preset, or the forward pass only. Prints a line of JSON.
//! `scripts/bench/bench_transformers.py` runs it against transformers, `scripts/bench/bench_scaling.py` for several
//! numbers of experts and sequence lengths.
//!
//! `cargo run --release -p moonlight-model --example bench -- --batch 4 --sequence 512`

mod measure;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use clap::Parser;
use measure::{Failure, cast, median, peak_rss_mib, seconds};
use moonlight_model::{CausalLm, LmBatch, ModelConfig, Probe};
use serde_json::json;

#[derive(Parser)]
struct Options {
    /// Number of timed steps.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Sequences in a step.
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens in a sequence.
    #[arg(long, default_value_t = 512)]
    sequence: usize,
    /// Name of a preset.
    #[arg(long, default_value = "bench-small")]
    preset: String,
    /// Number of routed experts, instead of the preset's.
    #[arg(long)]
    experts: Option<usize>,
    /// f32 or bf16.
    #[arg(long, default_value = "f32", value_parser = measure::dtype)]
    dtype: DType,
    /// Only the forward pass to the logits of every token, without autodiff.
    #[arg(long)]
    infer: bool,
}

/// A linear congruential generator: the same tokens in every run.
struct Numbers(u64);

impl Numbers {
    fn new() -> Self {
        Self(1)
    }

    /// A number below `end`.
    fn below(&mut self, end: usize) -> i32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % end as u64) as i32
    }
}

fn main() -> Result<(), Failure> {
    moonlight_model::keep_freed_memory();
    let options = Options::parse();
    let Options { batch, sequence, .. } = options;
    let device = if options.infer { Device::default() } else { Device::default().autodiff() };
    let mut config = ModelConfig::preset(&options.preset)?;
    if let Some(experts) = options.experts {
        let moe = config.moe.as_mut().ok_or(format!("`{}` has no experts", options.preset))?;
        moe.n_routed_experts = experts;
    }
    let model = cast(config.init(&device), options.dtype);
    let input = input(&config, batch, sequence, &device);
    let seconds = seconds(options.repeats, || step(&model, &input, options.infer, &device))?;
    let result = json!({
        "preset": options.preset,
        "dtype": options.dtype.name(),
        "infer": options.infer,
        "experts": config.moe.as_ref().map(|moe| moe.n_routed_experts),
        "batch": batch,
        "sequence": sequence,
        "parameters": config.parameter_count().total,
        "seconds": seconds,
        "tokens_per_second": (batch * sequence) as f64 / median(&seconds),
        "peak_rss_mib": peak_rss_mib(),
    });
    println!("{result}");
    Ok(())
}

fn input(config: &ModelConfig, batch: usize, sequence: usize, device: &Device) -> LmBatch {
    let mut numbers = Numbers::new();
    let mut tokens = || {
        let values: Vec<i32> = (0..batch * sequence).map(|_| numbers.below(config.vocab_size)).collect();
        Tensor::<2, Int>::from_data(TensorData::new(values, [batch, sequence]), device)
    };
    LmBatch { tokens: tokens(), targets: tokens(), loss_mask: Tensor::ones([batch, sequence], device), segments: None }
}

fn step(model: &CausalLm, input: &LmBatch, infer: bool, device: &Device) -> Result<(), Failure> {
    if infer {
        model.logits(input.tokens.clone(), None).into_data();
        return Ok(());
    }
    let loss = model.loss(input, 0.0, Probe::default()).loss_sum;
    let gradients = loss.backward();
    device.sync()?;
    drop(gradients);
    Ok(())
}
