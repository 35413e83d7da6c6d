//! `moonlight-convert convert`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::DType;
use clap::{Args, ValueEnum};
use moonlight_convert::{Checkpoint, Format, SaveOptions};

use super::output::note;
use super::progress::Bar;
use crate::Failure;

/// What to convert, and into what.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The checkpoint to read.
    src: PathBuf,
    /// The directory to write.
    dst: PathBuf,
    /// The dtype of the weights; as stored where it is not given (quantized ones as what they stand for).
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Hugging Face's files, or Burn's.
    #[arg(long, default_value = "hf")]
    format: FormatName,
    /// The largest file of weights, e.g. 5GB or 500MB.
    #[arg(long, default_value = "5GB", value_parser = bytes)]
    max_shard_size: u64,
    /// One file a layer, as Moonlight was published.
    #[arg(long, conflicts_with = "max_shard_size")]
    shard_by_layer: bool,
    /// Arguments what is there of SRC, where files of it are absent.
    #[arg(long)]
    partial: bool,
    /// Replace a checkpoint that stands at DST.
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
    /// Safetensors, as transformers, vLLM and SGLang read them.
    Hf,
    /// One burnpack file, as burn-store reads it.
    Burnpack,
}

/// `5GB`, `500MB`, `10KB` or a plain number of bytes; decimal, as the Hub counts.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        unit => return Err(format!("`{unit}` is not B, KB, MB or GB")),
    };
    let number: u64 = digits.parse().map_err(|_| "it is not a whole number with B, KB, MB or GB".to_owned())?;
    number.checked_mul(factor).filter(|&bytes| bytes > 0).ok_or_else(|| "it is not a size of files".to_owned())
}

/// Converts, and says what was written.
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
        "{}: {bytes} bytes in {} file(s), {seconds:.1} s, {:.0} MB/s",
        dst.display(),
        written.files().len(),
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
    fn sizes_of_files() {
        assert_eq!(bytes("5GB"), Ok(5_000_000_000));
        assert_eq!(bytes("200kb"), Ok(200_000));
        assert_eq!(bytes("7"), Ok(7));
        for wrong in ["", "GB", "5TB", "-1", "0", "99999999999999999999GB"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}
