//! Loads one decoder layer of a checkpoint and runs it; prints how much was read from the disk and how much memory it
//! took.
//!
//! ```text
//! cargo run --release -p moonlight-convert --example one_layer -- DIR LAYER
//! ```

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use burn::tensor::{DType, Device, Tensor};
use clap::Parser;
use moonlight_convert::Checkpoint;
use moonlight_model::ForwardContext;

/// Load one decoder layer and run it over 16 tokens, in f32 on the default device
#[derive(Debug, Parser)]
struct Arguments {
    /// The checkpoint; files that do not contain the layer may be missing
    dir: PathBuf,
    /// The layer, counted from 0
    layer: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    let Arguments { dir, layer } = Arguments::parse();
    let device = Device::default();
    let checkpoint = Checkpoint::open(dir)?;
    let config = checkpoint.config().clone();
    let start = Instant::now();
    let fresh = config.init_layer(layer, &device);
    let path = format!("layers.{layer}");
    let (block, report) = checkpoint.load_part(fresh, &path, &device, Some(DType::F32))?;
    println!("{path}: {} parameters from {} tensors, {} bytes", report.parameters, report.tensors, report.bytes);
    println!("loaded in {:.1} s", start.elapsed().as_secs_f64());
    let start = Instant::now();
    let hidden = Tensor::<3>::ones([1, 16, config.hidden_size], &device);
    let context = ForwardContext::new(&config.rotary(), [1, 16], &device);
    let values = block.forward(hidden, &context).hidden.into_data();
    let finite = values.iter::<f32>().all(f32::is_finite);
    println!("ran over 16 tokens in {:.1} s; all values finite: {finite}", start.elapsed().as_secs_f64());
    // Linux's counts: bytes that this process read from the disk (none if they were cached), and its memory.
    for (file, keys) in [("/proc/self/io", ["read_bytes", "rchar"]), ("/proc/self/status", ["VmHWM", "VmRSS"])] {
        for line in std::fs::read_to_string(file).unwrap_or_default().lines() {
            if keys.iter().any(|key| line.starts_with(key)) {
                println!("{line}");
            }
        }
    }
    Ok(())
}
