//! Writes a checkpoint with the names, shapes, dtypes and file sizes of Moonlight-16B-A3B-Instruct, and random weights.
//!
//! ```text
//! cargo run --release -p moonlight-convert --example synthetic_checkpoint -- DIR
//!     [--shards A..B]   only these of the 27 files, both ends included (the index lists them all)
//!     [--layers N]      a model of the first N layers, in N files
//!     [--scale K]       every width divided by K
//!     [--quantize int8|int4]
//!     [--seed S]
//! ```
//!
//! The complete checkpoint has 32 GB. Weights are bf16 with magnitudes from 2^-11 to 2^-7 and random signs, norms from
//! 1/2 to 1; equal seeds give equal files.
//!
//! With `--quantize int4` it has 10 GB: the tensors and the `config.json` of `moonlight-convert convert --quantize int4`,
//! with random integers, and scales so that the largest weights are about 2^-7.

mod published;

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::{Parser, ValueEnum};
use moonlight_convert::{WrittenTensor, written_config};
use moonlight_model::config::AttentionShape;
use moonlight_model::{ModelConfig, QuantBits};
use published::{PublishedFile, bytes, published_files, quantized_files};
use safetensors::Dtype;
use serde_json::json;

/// Bytes generated at a time; each chunk has its own random sequence.
const CHUNK: usize = 4 << 20;

/// Write a checkpoint of Moonlight's shape with random weights
#[derive(Debug, Parser)]
struct Arguments {
    /// The directory to create
    dir: PathBuf,
    /// Only these files, `A..B`, both ends included
    #[arg(long, value_parser = range)]
    shards: Option<(usize, usize)>,
    /// Only the first layers
    #[arg(long)]
    layers: Option<usize>,
    /// Divide every width by this
    #[arg(long, default_value_t = 1)]
    scale: usize,
    /// Write the projections quantized
    #[arg(long, value_enum)]
    quantize: Option<Quantize>,
    /// The seed of the random numbers
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Quantize {
    Int8,
    Int4,
}

impl Quantize {
    fn bits(self) -> QuantBits {
        match self {
            Self::Int8 => QuantBits::Eight,
            Self::Int4 => QuantBits::Four,
        }
    }
}

fn range(text: &str) -> Result<(usize, usize), String> {
    let ends = text.split_once("..").and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    ends.filter(|(a, b)| 0 < *a && a <= b).ok_or_else(|| "expected A..B".to_owned())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let mut config = config(&arguments)?;
    let files = match arguments.quantize {
        None => published_files(&config)?,
        Some(quantize) => {
            let bits = quantize.bits();
            config.extra.insert("quantization_config".into(), written_config(bits));
            quantized_files(&config, bits)?
        }
    };
    fs::create_dir_all(&arguments.dir)?;
    fs::write(arguments.dir.join("config.json"), config.to_json())?;
    fs::write(
        arguments.dir.join("generation_config.json"),
        format!("{:#}\n", json!({"max_length": config.max_position_embeddings, "eos_token_id": config.eos_token_id})),
    )?;
    fs::write(arguments.dir.join("model.safetensors.index.json"), index(&files))?;
    let (first, last) = arguments.shards.unwrap_or((1, files.len()));
    let wanted: Vec<(usize, &PublishedFile)> = files.iter().enumerate().take(last).skip(first - 1).collect();
    let next = AtomicUsize::new(0);
    let write = || -> Result<(), std::io::Error> {
        let mut chunk = vec![0u8; CHUNK];
        while let Some((number, file)) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut out = File::create(arguments.dir.join(&file.name))?;
            out.write_all(&file.header)?;
            for (place, tensor) in file.tensors.iter().enumerate() {
                if tensor.dtype == Dtype::I64 {
                    out.write_all(&matrix_shape(tensor, &file.tensors))?;
                    continue;
                }
                let base = base(tensor, arguments.quantize);
                let mut left = bytes(tensor);
                let mut seed = arguments.seed << 48 ^ (*number as u64) << 32 ^ (place as u64) << 16;
                while left > 0 {
                    let part = &mut chunk[..left.min(CHUNK)];
                    fill(part, seed, base);
                    out.write_all(part)?;
                    left -= part.len();
                    seed += 1;
                }
            }
        }
        Ok(())
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(write)).collect();
        handles.into_iter().try_for_each(|handle| handle.join().expect("writing does not panic"))
    })?;
    let bytes: u64 = wanted.iter().map(|(_, file)| file.bytes()).sum();
    println!("{}: {bytes} bytes in {} files", arguments.dir.display(), wanted.len());
    Ok(())
}

fn config(arguments: &Arguments) -> Result<ModelConfig, Box<dyn Error>> {
    let mut config = ModelConfig::preset("moonlight-16b-a3b")?;
    config.eos_token_id = vec![163_586];
    config.dtype = Some("bfloat16".into());
    if let Some(layers) = arguments.layers {
        config.num_hidden_layers = layers;
    }
    let scale = |width: &mut usize| *width = (*width / arguments.scale.max(1)).max(2);
    scale(&mut config.hidden_size);
    scale(&mut config.intermediate_size);
    if let Some(moe) = &mut config.moe {
        scale(&mut moe.moe_intermediate_size);
    }
    if let AttentionShape::Mla(mla) = &mut config.attention {
        for width in [&mut mla.kv_lora_rank, &mut mla.qk_nope_head_dim, &mut mla.qk_rope_head_dim, &mut mla.v_head_dim]
        {
            scale(width);
        }
    }
    if arguments.scale > 1 {
        config.vocab_size /= arguments.scale;
        config.bos_token_id = Some(0);
        config.eos_token_id = vec![1];
    }
    Ok(config)
}

fn index(files: &[PublishedFile]) -> String {
    let map: serde_json::Map<String, serde_json::Value> = files
        .iter()
        .flat_map(|file| file.tensors.iter().map(|tensor| (tensor.name.clone(), json!(file.name))))
        .collect();
    let bytes: u64 = files.iter().map(|file| file.bytes() - file.header.len() as u64).sum();
    format!("{:#}\n", json!({"metadata": {"total_size": bytes}, "weight_map": map}))
}

/// The contents of a `weight_shape`: output and input width, as the number of rows and of groups of the matrix's scales has it.
fn matrix_shape(tensor: &WrittenTensor, all: &[WrittenTensor]) -> Vec<u8> {
    let name = tensor.name.replace("weight_shape", "weight_scale");
    let scale = all.iter().find(|tensor| tensor.name == name).expect("a packed matrix has scales");
    [scale.shape[0], 32 * scale.shape[1]].iter().flat_map(|side| (*side as i64).to_le_bytes()).collect()
}

/// The fixed bits of a tensor's values, and a mask of their random bits.
fn base(tensor: &WrittenTensor, quantize: Option<Quantize>) -> (u64, u64) {
    match (tensor.dtype, quantize) {
        (Dtype::I32, Some(Quantize::Int8)) => CODES_8,
        (Dtype::I32, _) => CODES_4,
        (Dtype::F32, _) => BIAS,
        _ if tensor.name.ends_with("weight_scale") => match quantize {
            Some(Quantize::Int8) => SCALE_8,
            _ => SCALE_4,
        },
        _ if tensor.name.ends_with("norm.weight") => NORM,
        _ => WEIGHT,
    }
}

/// Any nibble. Of bytes, all but 0, which `convert --quantize int8` does not write: odd ones.
const CODES_4: (u64, u64) = (0, u64::MAX);
const CODES_8: (u64, u64) = (0x0101_0101_0101_0101, u64::MAX);
/// Scales from 2^-11 to 2^-10 with 4 bits, from 2^-15 to 2^-14 with 8, so that weights are at most 2^-7.
const SCALE_4: (u64, u64) = (0x3a00_3a00_3a00_3a00, 0x007f_007f_007f_007f);
const SCALE_8: (u64, u64) = (0x3800_3800_3800_3800, 0x007f_007f_007f_007f);
/// Correction biases in f32, from 2^-7 to 2^-6.
const BIAS: (u64, u64) = (0x3c00_0000_3c00_0000, 0x007f_ffff_007f_ffff);

/// The fixed bits of four bf16 values, and a mask of their random bits. Weights have the exponent of 2^-11 with two
/// random bits added, norms that of 1/2.
const WEIGHT: (u64, u64) = (0x3a00_3a00_3a00_3a00, 0x81ff_81ff_81ff_81ff);
const NORM: (u64, u64) = (0x3f00_3f00_3f00_3f00, 0x007f_007f_007f_007f);

/// xorshift64* (Vigna 2014), four values per step.
fn fill(bytes: &mut [u8], seed: u64, (base, random): (u64, u64)) {
    let mut state = (seed ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1;
    for bytes in bytes.chunks_mut(8) {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let values = (state.wrapping_mul(0x2545_f491_4f6c_dd1d) & random | base).to_le_bytes();
        bytes.copy_from_slice(&values[..bytes.len()]);
    }
}
