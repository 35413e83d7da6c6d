//! Measures the time and memory of loading a checkpoint; `scripts/bench/bench_load.py` compares it with reading the files.
//!
//! ```text
//! cargo run --release -p moonlight-convert --example load_time -- DIR [--dtype f32] [--quantize as-stored|int8|int4|none]
//! ```

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use burn::tensor::{DType, Device};
use clap::Parser;
use moonlight_convert::{Checkpoint, LoadQuantization};
use moonlight_model::QuantBits;
use serde_json::json;

/// Load a checkpoint onto the default device and print a line of JSON
#[derive(Debug, Parser)]
struct Arguments {
    /// The checkpoint to load
    dir: PathBuf,
    /// The dtype in memory [default: as stored]
    #[arg(long)]
    dtype: Option<Choice>,
    /// Which weights are quantized in memory
    #[arg(long, value_enum, default_value = "none")]
    quantize: Quantize,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Choice {
    F32,
    Bf16,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Quantize {
    AsStored,
    Int8,
    Int4,
    None,
}

impl From<Quantize> for LoadQuantization {
    fn from(quantize: Quantize) -> Self {
        match quantize {
            Quantize::AsStored => Self::AsStored,
            Quantize::Int8 => Self::To(QuantBits::Eight),
            Quantize::Int4 => Self::To(QuantBits::Four),
            Quantize::None => Self::Dequantize,
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let Arguments { dir, dtype, quantize } = Arguments::parse();
    let dtype = dtype.map(|dtype| match dtype {
        Choice::F32 => DType::F32,
        Choice::Bf16 => DType::BF16,
    });
    let start = Instant::now();
    let loaded = Checkpoint::open(&dir)?.load_with(&Device::default(), dtype, quantize.into())?;
    let seconds = start.elapsed().as_secs_f64();
    let bytes = loaded.report.bytes;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find(|line| line.starts_with("VmHWM:")).and_then(|line| line.split_whitespace().nth(1));
    let peak_mib = peak.and_then(|kib| kib.parse::<u64>().ok()).map(|kib| kib / 1024);
    let rate = bytes as f64 / seconds / 1e9;
    println!("{}", json!({"seconds": seconds, "bytes": bytes, "gb_per_second": rate, "peak_rss_mib": peak_mib}));
    Ok(())
}
