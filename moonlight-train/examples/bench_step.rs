//! Times a training step of a preset (forward, backward and the report's optimizer), and prints one JSON line. `bench_step.py`
//! compares it with transformers and `torch.optim.Muon`.
//!
//! `cargo run --release -p moonlight-train --example bench_step -- [repeats] [batch] [sequence] [micro-batches] [f32|bf16] [preset]`
//!
//! The step is that of the trainer: the model with its loss, gradients summed over micro-batches, the optimizer rules
//! `moonlight`, which orthogonalize matrices of equal shape in batches, and the update of the router bias. `f32|bf16` is the
//! dtype of Newton-Schulz's products; everything else is f32.

use std::time::Instant;

use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Device, Int, Tensor, TensorData};
use moonlight_model::{CausalLm, LmBatch, ModelConfig, Probe};
use moonlight_optim::{AdamWConfig, MuonAdamW, MuonConfig, OptimizerOptions, ParameterRules, Precision};
use serde_json::json;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    moonlight_model::keep_freed_memory();
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse::<usize>());
    let (repeats, batch, sequence, micro_batches) = (number(5)?, number(4)?, number(512)?, number(1)?);
    let precision = match arguments.next().as_deref() {
        None | Some("f32") => Precision::F32,
        Some("bf16") => Precision::Bf16,
        Some(other) => return Err(format!("Newton-Schulz in `{other}`: it is f32 or bf16").into()),
    };
    let preset = arguments.next().unwrap_or_else(|| "bench-small".to_owned());

    let device = Device::default().autodiff();
    let config = ModelConfig::preset(&preset)?;
    let mut model = config.init(&device);
    let muon = MuonConfig::new().with_precision(precision);
    let assignment = ParameterRules::moonlight(muon, AdamWConfig::new()).assign(&model)?;
    let mut optimizer = assignment.build(OptimizerOptions::new())?;
    let batches = batches(&config, [micro_batches, batch, sequence], &device);
    let mut times = Vec::new();
    // The first step also initializes parameters and momentum, so it is not measured.
    for index in 0..=repeats {
        let took;
        (model, took) = step(model, &mut optimizer, &batches, &device)?;
        if index > 0 {
            times.push(took);
        }
    }
    times.sort_by(|one, other| one.whole.total_cmp(&other.whole));
    let median = times[times.len() / 2];
    let mut shares: Vec<f64> = times.iter().map(|times| times.optimizer / times.whole).collect();
    shares.sort_by(f64::total_cmp);
    let result = json!({
        "preset": preset,
        "batch": batch,
        "sequence": sequence,
        "micro_batches": micro_batches,
        "seconds": times.iter().map(|times| times.whole).collect::<Vec<_>>(),
        "optimizer_seconds": times.iter().map(|times| times.optimizer).collect::<Vec<_>>(),
        "optimizer_share": shares[shares.len() / 2],
        "tokens_per_second": (micro_batches * batch * sequence) as f64 / median.whole,
        "peak_rss_mib": peak_rss_mib(),
    });
    println!("{result}");
    Ok(())
}

/// The duration of a step and its parts, in seconds.
#[derive(Clone, Copy)]
struct Times {
    whole: f64,
    optimizer: f64,
}

/// Micro-batches of random tokens, the same in every run.
fn batches(config: &ModelConfig, [count, batch, sequence]: [usize; 3], device: &Device) -> Vec<LmBatch> {
    let vocab = config.vocab_size as u64;
    // A linear congruential generator.
    let mut state = 1u64;
    let mut tokens = || {
        let values = (0..batch * sequence).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % vocab) as i32
        });
        Tensor::<2, Int>::from_data(TensorData::new(values.collect::<Vec<i32>>(), [batch, sequence]), device)
    };
    let batches = (0..count).map(|_| LmBatch {
        tokens: tokens(),
        targets: tokens(),
        loss_mask: Tensor::ones([batch, sequence], device),
        segments: None,
    });
    batches.collect()
}

fn step(
    model: CausalLm,
    optimizer: &mut MuonAdamW,
    batches: &[LmBatch],
    device: &Device,
) -> Result<(CausalLm, Times), Box<dyn std::error::Error>> {
    let start = Instant::now();
    let predicted: usize = batches.iter().map(|batch| batch.tokens.dims().iter().product::<usize>()).sum();
    let mut sum = GradientsAccumulator::<CausalLm>::new();
    let mut only = None;
    let mut loads: Vec<Option<Vec<u64>>> = Vec::new();
    for batch in batches {
        let output = model.loss(batch, 0.0, Probe::default());
        let _ = output.loss_sum.clone().into_scalar::<f32>(); // waits for the device, as the trainer does
        let gradients = (output.loss_sum / predicted as f64).backward();
        let gradients = GradientsParams::from_grads(gradients, &model);
        let more = output.stats.expert_loads();
        if loads.is_empty() {
            loads = more;
        } else {
            for (load, more) in loads.iter_mut().zip(more) {
                if let (Some(load), Some(more)) = (load, more) {
                    load.iter_mut().zip(more).for_each(|(load, more)| *load += more);
                }
            }
        }
        if batches.len() == 1 {
            only = Some(gradients);
        } else {
            sum.accumulate(&model, gradients);
        }
    }
    let gradients: GradientsParams = only.unwrap_or_else(|| sum.grads());
    device.sync()?;
    let backward_done = start.elapsed().as_secs_f64();
    let model = optimizer.step(3e-4, model, gradients)?.update_router_bias(&loads, 1e-3);
    device.sync()?;
    let whole = start.elapsed().as_secs_f64();
    Ok((model, Times { whole, optimizer: whole - backward_done }))
}

/// Peak resident memory of the process, in MiB; `None` on systems without `/proc`.
fn peak_rss_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib / 1024)
}
