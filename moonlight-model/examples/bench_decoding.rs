//! Benchmark: decoding token by token, compared with the bound by memory bandwidth. Prints a line of JSON.
//! `scripts/bench/bench_decoding.py` runs it against transformers.
//!
//! Decoding a token reads every activated weight once, so it takes at least their bytes divided by the memory bandwidth.
//! The bandwidth is measured between tokens: all threads sum an array that is larger than the caches. Both results are
//! medians, because the bandwidth of a shared machine changes from second to second.
//!
//! `cargo run --release -p moonlight-model --example bench_decoding -- [tokens] [batch] [dtype] [shape]`, where the
//! shape is a preset, or `moonlight-block`: the first dense layer and the first layer of experts of Moonlight-16B-A3B
//! with a small vocabulary.

use std::time::Instant;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use moonlight_model::{CausalLm, KvCache, ModelConfig};
use rayon::prelude::*;
use serde_json::json;

/// Tokens in the prompt, which is not timed.
const PROMPT: usize = 16;
/// Values in the array for measuring the bandwidth: 256 MiB.
const VALUES: usize = 1 << 26;
/// Tokens between two measurements of the bandwidth.
const TOKENS_PER_READING: usize = 4;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    moonlight_model::keep_freed_memory();
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse::<usize>());
    let (tokens, batch) = (number(48)?, number(1)?);
    let dtype = match arguments.next().as_deref() {
        None | Some("f32") => DType::F32,
        Some("bf16") => DType::BF16,
        Some(other) => return Err(format!("unknown dtype `{other}`").into()),
    };
    let shape = arguments.next().unwrap_or_else(|| "bench-small".to_owned());
    let config = match shape.as_str() {
        "moonlight-block" => {
            let whole = ModelConfig::preset("moonlight-16b-a3b")?;
            ModelConfig { num_hidden_layers: 2, vocab_size: 8192, ..whole }
        }
        preset => ModelConfig::preset(preset)?,
    };

    let device = Device::default();
    let model = config.init(&device);
    let model = if dtype == DType::F32 { model } else { model.map(&mut Cast(dtype)) };
    let Timings { seconds, bandwidth } = decode(&model, &config, tokens, batch, &device);
    // A token reads only one row of the embedding.
    let count = config.parameter_count();
    let bytes = (count.activated - config.vocab_size as u64 * config.hidden_size as u64) * dtype.size() as u64;
    let bound = bandwidth / bytes as f64;
    let result = json!({
        "shape": shape,
        "batch": batch,
        "dtype": if dtype == DType::F32 { "f32" } else { "bf16" },
        "milliseconds_per_step": seconds * 1e3,
        "tokens_per_second": batch as f64 / seconds,
        "bytes_per_token": bytes,
        "bandwidth_gb_per_second": bandwidth / 1e9,
        "share_of_bound": (1.0 / seconds) / bound,
    });
    println!("{result}");
    Ok(())
}

struct Cast(DType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(self.0))
    }
}

/// Medians over the measurements.
struct Timings {
    /// Seconds of a step.
    seconds: f64,
    /// Bytes a second.
    bandwidth: f64,
}

fn decode(model: &CausalLm, config: &ModelConfig, count: usize, batch: usize, device: &Device) -> Timings {
    let mut cache = KvCache::new(config, batch, PROMPT + count, device, model.dtype());
    let input = |length: usize, first: usize| {
        let tokens = (0..batch * length).map(|index| ((first + index) * 31 % config.vocab_size) as i32).collect();
        Tensor::<2, Int>::from_data(TensorData::new::<i32, _>(tokens, [batch, length]), device)
    };
    let mut step = |length, first| {
        let start = Instant::now();
        model.decode(input(length, first), &mut cache).into_data();
        start.elapsed().as_secs_f64()
    };
    step(PROMPT, 0);
    step(1, PROMPT); // prepares the weights for decoding
    let values = vec![1.0f32; VALUES];
    let (mut seconds, mut bandwidths) = (Vec::new(), Vec::new());
    for index in 1..count {
        if index % TOKENS_PER_READING == 1 {
            bandwidths.push(bandwidth(&values));
        }
        seconds.push(step(1, PROMPT + index));
    }
    Timings { seconds: median(seconds), bandwidth: median(bandwidths) }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Bytes a second that all threads read together.
fn bandwidth(values: &[f32]) -> f64 {
    let start = Instant::now();
    let sum: f32 = values
        .par_chunks(1 << 16)
        .map(|piece| {
            let mut sums = [0.0f32; 64];
            for chunk in piece.as_chunks::<64>().0 {
                sums.iter_mut().zip(chunk).for_each(|(sum, value)| *sum += value);
            }
            sums.iter().sum::<f32>()
        })
        .sum();
    assert!(sum > 0.0, "the sum is used");
    size_of_val(values) as f64 / start.elapsed().as_secs_f64()
}
