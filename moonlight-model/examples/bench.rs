//! Times forward and backward of a preset and prints one JSON line; `scripts/bench_transformers.py` runs it beside
//! transformers.
//!
//! `cargo run --release -p moonlight-model --example bench -- [repeats] [batch] [sequence] [preset]`

use std::time::Instant;

use burn::tensor::{Device, Int, Tensor, TensorData};
use moonlight_model::{CausalLm, LmBatch, ModelConfig, Probe};
use serde_json::json;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    moonlight_model::keep_freed_memory();
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse::<usize>());
    let (repeats, batch, sequence) = (number(5)?, number(4)?, number(512)?);
    let preset = arguments.next().unwrap_or_else(|| "bench-small".to_owned());

    let device = Device::default().autodiff();
    let config = ModelConfig::preset(&preset)?;
    let model = config.init(&device);
    let input = input(&config, batch, sequence, &device);
    step(&model, &input, &device)?; // draws the parameters
    let mut seconds = Vec::new();
    for _ in 0..repeats {
        let start = Instant::now();
        step(&model, &input, &device)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let result = json!({
        "preset": preset,
        "batch": batch,
        "sequence": sequence,
        "seconds": seconds,
        "tokens_per_second": (batch * sequence) as f64 / median,
        "peak_rss_mib": peak_rss_mib(),
    });
    println!("{result}");
    Ok(())
}

fn input(config: &ModelConfig, batch: usize, sequence: usize, device: &Device) -> LmBatch {
    let vocab = config.vocab_size as u64;
    // A linear congruential generator: the same tokens on every run.
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab) as i32
    };
    let mut tokens = || {
        let values: Vec<i32> = (0..batch * sequence).map(|_| next()).collect();
        Tensor::<2, Int>::from_data(TensorData::new(values, [batch, sequence]), device)
    };
    LmBatch { tokens: tokens(), targets: tokens(), loss_mask: Tensor::ones([batch, sequence], device), segments: None }
}

fn step(model: &CausalLm, input: &LmBatch, device: &Device) -> Result<(), Box<dyn std::error::Error>> {
    let loss = model.loss(input, 0.0, Probe::default()).loss_sum;
    let gradients = loss.backward();
    device.sync()?;
    drop(gradients);
    Ok(())
}

/// The most memory that the process ever held, in MiB; `None` where `/proc` does not say.
fn peak_rss_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib / 1024)
}
