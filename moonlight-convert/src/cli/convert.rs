//! `moonlight-convert convert`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use crate::{Checkpoint, Format, SaveOptions};
use burn::tensor::DType;
use clap::{Args, ValueEnum};
use indicatif::DecimalBytes;

use super::Failure;
use super::output::note;
use super::progress::Bar;
use super::units::plural;

/// Arguments of `convert`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The checkpoint to read
    src: PathBuf,
    /// The directory to write
    dst: PathBuf,
    /// The dtype of the weights [default: as stored; quantized weights are dequantized]
    #[arg(long)]
    dtype: Option<Dtype>,
    /// The file format of the weights
    #[arg(long, default_value = "hf")]
    format: FormatName,
    /// The largest weight file, for example 5GB or 500MB
    #[arg(long, default_value = "5GB", value_parser = bytes)]
    max_shard_size: u64,
    /// Write one file per layer, as Moonlight was published
    #[arg(long, conflicts_with = "max_shard_size")]
    shard_by_layer: bool,
    /// Convert what exists of SRC, if files are missing
    #[arg(long)]
    partial: bool,
    /// Replace an existing checkpoint at DST
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    Bf16,
    F16,
}

impl From<Dtype> for DType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::BF16,
            Dtype::F16 => Self::F16,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum FormatName {
    /// Safetensors, for transformers, vLLM and SGLang
    Hf,
    /// One burnpack file, for burn-store
    Burnpack,
}

/// Parses `5GB`, `500MB`, `10KB` or a plain number of bytes; decimal, as on the Hub.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        unit => return Err(format!("`{unit}` is not B, KB, MB or GB")),
    };
    let number: u64 = digits.parse().map_err(|_| "expected an integer with B, KB, MB or GB".to_owned())?;
    number.checked_mul(factor).filter(|&bytes| bytes > 0).ok_or_else(|| "expected a size above 0".to_owned())
}

/// Converts, and reports what was written.
pub(crate) fn run(arguments: Arguments) -> Result<ExitCode, Failure> {
    let Arguments { src, dst, dtype, format, max_shard_size, shard_by_layer, partial, force } = arguments;
    let options = SaveOptions {
        dtype: dtype.map(Into::into),
        format: match format {
            FormatName::Hf => Format::HuggingFace,
            FormatName::Burnpack => Format::Burnpack,
        },
        max_shard_size,
        shard_by_layer,
        sidecars_from: None,
        overwrite: force,
        partial,
    };
    let start = Instant::now();
    let source = Checkpoint::open(src)?;
    source.convert_with(&dst, &options, &Bar::new())?;
    let seconds = start.elapsed().as_secs_f64();
    let written = Checkpoint::open(&dst)?;
    let bytes: u64 = written.files().iter().map(|file| file.bytes).sum();
    note(format_args!(
        "wrote {} in {} to `{}` in {seconds:.1} s ({:.0} MB/s)",
        DecimalBytes(bytes),
        plural(written.files().len(), "file"),
        dst.display(),
        bytes as f64 / 1e6 / seconds
    ));
    if let Some(head) = source.tied_head().describe() {
        note(format_args!("{head}"));
    }
    for skipped in source.skipped_notes() {
        note(format_args!("{skipped}"));
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_sizes_are_parsed() {
        assert_eq!(bytes("5GB"), Ok(5_000_000_000));
        assert_eq!(bytes("200kb"), Ok(200_000));
        assert_eq!(bytes("7"), Ok(7));
        for wrong in ["", "GB", "5TB", "-1", "0", "99999999999999999999GB"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}
