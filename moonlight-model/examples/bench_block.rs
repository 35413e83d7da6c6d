//! Benchmark: one layer of experts of a preset, with or without the backward pass. Prints a line of JSON.
//! `scripts/bench/bench_block.py` runs it against the layer of transformers.
//!
//! `cargo run --release -p moonlight-model --example bench_block -- --tokens 2048 --train`

mod measure;

use burn::tensor::{DType, Device, Distribution, Tensor};
use clap::Parser;
use measure::{Failure, cast, median, peak_rss_mib, seconds};
use moonlight_model::{DecoderLayer, ForwardContext, ModelConfig};
use serde_json::json;

#[derive(Parser)]
struct Options {
    /// Number of timed steps.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Tokens in the one sequence.
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// Name of a preset, whose last layer is timed.
    #[arg(long, default_value = "moonlight-16b-a3b")]
    preset: String,
    /// f32 or bf16.
    #[arg(long, default_value = "f32", value_parser = measure::dtype)]
    dtype: DType,
    /// With the backward pass, for the input and every weight.
    #[arg(long)]
    train: bool,
}

fn main() -> Result<(), Failure> {
    moonlight_model::keep_freed_memory();
    let options = Options::parse();
    let device = if options.train { Device::default().autodiff() } else { Device::default() };
    let config = ModelConfig::preset(&options.preset)?;
    let layer = cast(config.init_layer(config.num_hidden_layers - 1, &device), options.dtype);
    let shape = [1, options.tokens, config.hidden_size];
    let hidden = Tensor::<3>::random(shape, Distribution::Normal(0.0, 1.0), &device).cast(options.dtype);
    let seconds = seconds(options.repeats, || step(&layer, &config, &hidden, &options, &device))?;
    let result = json!({
        "preset": options.preset,
        "dtype": options.dtype.name(),
        "tokens": options.tokens,
        "train": options.train,
        "seconds": seconds,
        "tokens_per_second": options.tokens as f64 / median(&seconds),
        "peak_rss_mib": peak_rss_mib(),
    });
    println!("{result}");
    Ok(())
}

fn step(
    layer: &DecoderLayer,
    config: &ModelConfig,
    hidden: &Tensor<3>,
    options: &Options,
    device: &Device,
) -> Result<(), Failure> {
    let context = ForwardContext::new(&config.rotary(), [1, options.tokens], device);
    if !options.train {
        layer.forward(hidden.clone(), &context).hidden.into_data();
        return Ok(());
    }
    let output = layer.forward(hidden.clone().detach().require_grad(), &context).hidden;
    let gradients = output.sum().backward();
    device.sync()?;
    drop(gradients);
    Ok(())
}
