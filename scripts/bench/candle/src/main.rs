//! Times candle's DeepSeek-V2 with random weights, reading a prompt and decoding, and prints one JSON line;
//! `scripts/bench/bench_candle.py` runs it in turns with ours.
//!
//! candle has only softmax routing (greedy, or limited to groups), so our shapes are expressed as DeepSeek-V2: the same products,
//! with experts chosen by another rule. Its cache contains keys and values of every head instead of latents and is copied at every
//! token, and it loops over experts. For a prompt it computes only the last token's logits.

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::deepseek2::{DeepSeekV2, DeepSeekV2Config};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};

#[derive(Parser)]
struct Options {
    /// Which shape.
    #[arg(long, default_value = "bench-small")]
    shape: ShapeName,
    /// Tokens of the timed prompt.
    #[arg(long, default_value_t = 512)]
    tokens: usize,
    /// How often the prompt is timed.
    #[arg(long, default_value_t = 3)]
    repeats: usize,
}

#[derive(Clone, Copy, ValueEnum)]
enum ShapeName {
    /// The preset `bench-small`.
    BenchSmall,
    /// One mixture layer of Moonlight, between an embedding and a head of 64 tokens.
    MoonlightBlock,
}

/// Tokens in the cache before decoding is timed, and tokens that are decoded.
const PROMPT: usize = 16;
const DECODED: usize = 48;

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let options = Options::parse();
    let shape = shape(options.shape);
    let vocab = shape["vocab_size"].as_u64().unwrap_or_default() as usize;
    let config: DeepSeekV2Config = serde_json::from_value(shape)?;
    let device = Device::Cpu;
    let weights = VarMap::new();
    let mut model = DeepSeekV2::new(&config, VarBuilder::from_varmap(&weights, DType::F32, &device))?;
    spread_routers(&weights)?;

    let tokens = |count: usize, first: usize| {
        let tokens: Vec<u32> = (first..first + count).map(|index| (index * 31 % vocab) as u32).collect();
        Tensor::from_vec(tokens, (1, count), &device)
    };
    let mut run = |count: usize, position: usize| -> Result<f64> {
        let input = tokens(count, position)?;
        let start = Instant::now();
        if position == 0 {
            model.clear_kv_cache();
        }
        model.forward(&input, position)?.to_vec2::<f32>()?;
        Ok(start.elapsed().as_secs_f64())
    };
    run(options.tokens, 0)?;
    let prefill = median((0..options.repeats).map(|_| run(options.tokens, 0)).collect::<Result<_>>()?);
    run(PROMPT, 0)?;
    run(1, PROMPT)?;
    let step = median((1..DECODED).map(|index| run(1, PROMPT + index)).collect::<Result<_>>()?);
    let result = json!({
        "tokens_per_second": options.tokens as f64 / prefill,
        "milliseconds_per_step": step * 1e3,
        "peak_rss_mib": peak_rss_mib(),
    });
    println!("{result}");
    Ok(())
}

fn shape(name: ShapeName) -> Value {
    let mut shape = json!({
        "n_group": 1, "topk_group": 1, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": false,
        "routed_scaling_factor": 1.0, "moe_layer_freq": 1, "rms_norm_eps": 1e-5, "rope_theta": 50_000.0, "rope_scaling": null,
        "attention_bias": false, "q_lora_rank": null, "max_position_embeddings": 4096, "n_shared_experts": 2,
    });
    let own = match name {
        ShapeName::BenchSmall => json!({
            "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "moe_intermediate_size": 352,
            "num_hidden_layers": 8, "num_attention_heads": 8, "n_routed_experts": 32, "num_experts_per_tok": 4,
            "first_k_dense_replace": 1, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
        }),
        ShapeName::MoonlightBlock => json!({
            "vocab_size": 64, "hidden_size": 2048, "intermediate_size": 11_264, "moe_intermediate_size": 1408,
            "num_hidden_layers": 1, "num_attention_heads": 16, "n_routed_experts": 64, "num_experts_per_tok": 6,
            "first_k_dense_replace": 0, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        }),
    };
    for (key, value) in own.as_object().into_iter().flatten() {
        shape[key] = value.clone();
    }
    shape
}

/// candle initializes routers with zeros, with which every token would choose the same experts.
fn spread_routers(weights: &VarMap) -> Result<()> {
    let vars = weights.data().lock().expect("no thread panicked with it");
    for (name, var) in vars.iter().filter(|(name, _)| name.ends_with("mlp.gate.weight")) {
        assert_eq!(var.dims().len(), 2, "`{name}` is a matrix");
        var.set(&Tensor::randn(0f32, 0.02, var.shape(), var.device())?)?;
    }
    Ok(())
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// The peak memory of the process in MiB; `None` if `/proc` does not have it.
fn peak_rss_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib / 1024)
}
