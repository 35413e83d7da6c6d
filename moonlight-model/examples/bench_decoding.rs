//! Benchmark: decoding token by token, compared with the bound by memory bandwidth. Prints a line of JSON.
//! `scripts/bench/bench_decoding.py` runs it against transformers.
//!
//! Decoding a token reads every activated weight once, and the cache, so it takes at least their bytes divided by the memory
//! bandwidth. The bandwidth is measured between tokens: all threads sum an array that is larger than the caches. Both results are
//! medians, because the bandwidth of a shared machine changes from second to second.
//!
//! `cargo run --release -p moonlight-model --example bench_decoding -- [tokens] [batch] [dtype] [shape] [context] [prompt]`, where
//! the dtype is `f32`, `bf16`, `int8` or `int4`, and the shape is a preset, or `moonlight-block`: the first dense layer and the
//! first layer of experts of Moonlight-16B-A3B with a small vocabulary. Before the measured tokens each sequence has `context`
//! tokens. With `prompt` the time to process a prompt of so many tokens in an empty cache is measured as well.

use std::time::Instant;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Element, Tensor, TensorData, bf16};
use moonlight_model::{CausalLm, KvCache, ModelConfig, QuantBits, huge_pages};
use rayon::prelude::*;
use serde_json::json;

/// Values in the array for measuring the bandwidth: 256 MiB.
const VALUES: usize = 1 << 26;
/// Tokens between two measurements of the bandwidth.
const TOKENS_PER_READING: usize = 4;
/// Prompts that are timed.
const PROMPTS: usize = 3;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    moonlight_model::keep_freed_memory();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize, default: usize| arguments.get(index).map_or(Ok(default), |text| text.parse::<usize>());
    let text = |index: usize, default: &str| arguments.get(index).cloned().unwrap_or_else(|| default.to_owned());
    let (tokens, batch, context, prompt) = (number(0, 48)?, number(1, 1)?, number(4, 16)?, number(5, 0)?);
    let (dtype, shape) = (text(2, "f32"), text(3, "bench-small"));
    let config = match shape.as_str() {
        "moonlight-block" => {
            let whole = ModelConfig::preset("moonlight-16b-a3b")?;
            ModelConfig { num_hidden_layers: 2, vocab_size: 8192, ..whole }
        }
        preset => ModelConfig::preset(preset)?,
    };

    let device = Device::default();
    let model = config.init(&device);
    // Bytes of a weight, and of a value in the cache.
    let (model, bytes_per_weight, cache_dtype) = match dtype.as_str() {
        "f32" => (model.map(&mut Cast(DType::F32)), 4.0, DType::F32),
        "bf16" => (model.map(&mut Cast(DType::BF16)), 2.0, DType::BF16),
        "int8" => (model.quantized(QuantBits::Eight), 34.0 / 32.0, DType::BF16),
        "int4" => (model.quantized(QuantBits::Four), 18.0 / 32.0, DType::BF16),
        other => return Err(format!("unknown dtype `{other}`").into()),
    };
    let mut cache = KvCache::new(&config, batch, (context + tokens).max(prompt), &device, cache_dtype);
    let prefill = if prompt > 0 { Some(prefill(&model, &config, prompt, &mut cache)) } else { None };
    let Timings { seconds, fastest, bandwidth } = decode(&model, &config, tokens, context, &mut cache);
    // A token reads only one row of the embedding. The few parts that are not quantized to the format of the others count as if they
    // were.
    let count = config.parameter_count();
    let weights = count.activated - config.vocab_size as u64 * config.hidden_size as u64;
    let cached = KvCache::bytes(&config, batch, context + tokens / 2, cache_dtype);
    let bytes = weights as f64 * bytes_per_weight + cached as f64;
    let bound = bandwidth / bytes;
    let result = json!({
        "shape": shape,
        "batch": batch,
        "dtype": dtype,
        "context": context,
        "milliseconds_per_step": seconds * 1e3,
        "fastest_milliseconds": fastest * 1e3,
        "tokens_per_second": batch as f64 / seconds,
        "prompt_tokens_per_second": prefill.map(|seconds| prompt as f64 / seconds),
        "bytes_per_token": bytes as u64,
        "bandwidth_gb_per_second": bandwidth / 1e9,
        "share_of_bound": (1.0 / seconds) / bound,
    });
    println!("{result}");
    Ok(())
}

/// Casts parameters, and puts them into huge pages as the loader of checkpoints does.
struct Cast(DType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| {
            let (device, data) = (tensor.device(), tensor.cast(self.0).into_data());
            match self.0 {
                DType::F32 => in_huge_pages::<f32, D>(data, &device),
                _ => in_huge_pages::<bf16, D>(data, &device),
            }
        })
    }
}

fn in_huge_pages<E: Element + bytemuck::Zeroable, const D: usize>(data: TensorData, device: &Device) -> Tensor<D> {
    let values = data.as_slice::<E>().expect("the tensor was cast");
    let mut copy = huge_pages::zeros::<E>(values.len());
    copy.copy_from_slice(values);
    let shape: Vec<usize> = data.shape().iter().copied().collect();
    Tensor::from_data(TensorData::new(copy, shape), (device, E::dtype()))
}

/// Medians over the measurements.
struct Timings {
    /// Seconds of a step.
    seconds: f64,
    /// Seconds of the fastest step.
    fastest: f64,
    /// Bytes a second.
    bandwidth: f64,
}

/// Appends `count` tokens to each sequence; returns the seconds.
fn extend(model: &CausalLm, config: &ModelConfig, count: usize, cache: &mut KvCache) -> f64 {
    let first = cache.len();
    let token = |index: usize| ((first * 37 + index) * 31 % config.vocab_size) as u32;
    let tokens: Vec<u32> = (0..cache.batch() * count).map(token).collect();
    let inputs: Vec<&[u32]> = tokens.chunks(count).collect();
    let start = Instant::now();
    model.extend(&inputs, cache).into_data();
    start.elapsed().as_secs_f64()
}

fn clear(cache: &mut KvCache) {
    (0..cache.batch()).for_each(|sequence| cache.truncate(sequence, 0));
}

/// Seconds of a prompt in every sequence.
fn prefill(model: &CausalLm, config: &ModelConfig, prompt: usize, cache: &mut KvCache) -> f64 {
    let seconds = (0..PROMPTS).map(|_| {
        clear(cache);
        extend(model, config, prompt, cache)
    });
    median(seconds.collect())
}

fn decode(model: &CausalLm, config: &ModelConfig, count: usize, context: usize, cache: &mut KvCache) -> Timings {
    clear(cache);
    extend(model, config, context - 1, cache);
    extend(model, config, 1, cache); // prepares the weights for decoding
    let values = vec![1.0f32; VALUES];
    let (mut seconds, mut bandwidths) = (Vec::new(), Vec::new());
    for index in 0..count {
        if index % TOKENS_PER_READING == 0 {
            bandwidths.push(bandwidth(&values));
        }
        seconds.push(extend(model, config, 1, cache));
    }
    let fastest = seconds.iter().copied().fold(f64::INFINITY, f64::min);
    Timings { seconds: median(seconds), fastest, bandwidth: median(bandwidths) }
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
