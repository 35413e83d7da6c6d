//! `moonlight-convert convert`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use crate::gguf::{BlockType, GgufOptions};
use crate::{Checkpoint, Format, QuantizeReport, SaveOptions};
use burn::tensor::DType;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, ValueEnum};
use indicatif::DecimalBytes;
use moonlight_model::QuantBits;

use super::Failure;
use super::adapter::{self, AdapterLayout};
use super::output::note;
use super::progress::Bar;
use super::units::plural;

/// Arguments of `convert`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The checkpoint to read
    src: PathBuf,
    /// The directory to write, or the file `*.gguf`
    dst: PathBuf,
    /// The dtype of the weights [default: as stored; quantized weights are dequantized]
    #[arg(long)]
    dtype: Option<Dtype>,
    /// The file format of the weights [default: gguf if DST ends in `.gguf`, else hf]
    #[arg(long)]
    format: Option<FormatName>,
    /// The type of the matrices in a GGUF file, which gives some tensors more bits as `llama-quantize` does [default: as
    /// stored; bf16 for quantized weights]
    #[arg(long = "type", value_name = "TYPE", ignore_case = true)]
    block_type: Option<TypeName>,
    /// Quantize the projections of all layers, in groups of 32 values with one scale each, in the layout `pack-quantized` of
    /// compressed-tensors, which vLLM, SGLang and transformers open
    #[arg(long, alias = "quantise", value_enum)]
    quantize: Option<QuantizeName>,
    /// The largest weight file, for example 5GB or 500MB [default: 5GB]
    #[arg(long, value_parser = bytes)]
    max_shard_size: Option<u64>,
    /// Write one file per layer, as Moonlight was published
    #[arg(long, conflicts_with = "max_shard_size")]
    shard_by_layer: bool,
    /// Convert what exists of SRC, if files are missing
    #[arg(long)]
    partial: bool,
    /// The base model of an adapter, which is converted between peft's layout and GGUF [default: the one that its
    /// `adapter_config.json` names]
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
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
    /// One file with tokenizer and template, for llama.cpp, Ollama and LM Studio
    Gguf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum QuantizeName {
    /// 8 bits and a scale of 16 bits for each 32 values
    Int8,
    /// 4 bits and a scale of 16 bits for each 32 values
    Int4,
}

impl From<QuantizeName> for QuantBits {
    fn from(name: QuantizeName) -> Self {
        match name {
            QuantizeName::Int8 => Self::Eight,
            QuantizeName::Int4 => Self::Four,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum TypeName {
    F32,
    F16,
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
    /// The mixture that llama.cpp calls Q4_K_M
    #[value(name = "q4_k")]
    Q4K,
}

impl From<TypeName> for BlockType {
    fn from(name: TypeName) -> Self {
        match name {
            TypeName::F32 => Self::F32,
            TypeName::F16 => Self::F16,
            TypeName::Bf16 => Self::Bf16,
            TypeName::Q8_0 => Self::Q8_0,
            TypeName::Q4_0 => Self::Q4_0,
            TypeName::Q4K => Self::Q4K,
        }
    }
}

/// Size of a safetensors file, as in `huggingface_hub`.
const MAX_SHARD_SIZE: u64 = 5_000_000_000;

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
    let is_gguf = arguments.dst.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    if let Some(layout) = AdapterLayout::of(&arguments.src) {
        return convert_adapter(layout, &arguments, is_gguf);
    }
    if arguments.base.is_some() {
        conflict("`--base` applies to adapters only, and SRC is a model");
    }
    match arguments.format {
        Some(FormatName::Gguf) => write_gguf(&arguments),
        None if is_gguf => write_gguf(&arguments),
        Some(FormatName::Burnpack) => write_directory(arguments, Format::Burnpack),
        Some(FormatName::Hf) | None => write_directory(arguments, Format::HuggingFace),
    }
}

fn convert_adapter(layout: AdapterLayout, arguments: &Arguments, is_gguf: bool) -> Result<ExitCode, Failure> {
    let Arguments {
        src,
        dst,
        dtype,
        format,
        block_type,
        quantize,
        max_shard_size,
        shard_by_layer,
        partial,
        base,
        force,
    } = arguments;
    for (given, option) in [
        (dtype.is_some(), "--dtype"),
        (block_type.is_some(), "--type"),
        (quantize.is_some(), "--quantize"),
        (max_shard_size.is_some(), "--max-shard-size"),
        (*shard_by_layer, "--shard-by-layer"),
        (*partial, "--partial"),
    ] {
        if given {
            conflict(&format!("`{option}` does not apply to an adapter"));
        }
    }
    let to_gguf = matches!(format, Some(FormatName::Gguf)) || format.is_none() && is_gguf;
    match (layout, to_gguf) {
        (AdapterLayout::Peft, false) => conflict(
            "an adapter in peft's layout is converted to GGUF only: let DST end in `.gguf`, or add `--format gguf`",
        ),
        (AdapterLayout::Gguf, true) => {
            conflict("an adapter in GGUF is converted to peft's layout only: DST is a directory")
        }
        (AdapterLayout::Gguf, false) if matches!(format, Some(FormatName::Burnpack)) => {
            conflict("`--format burnpack` does not apply to an adapter")
        }
        _ => adapter::convert(layout, src, dst, base.as_deref(), *force),
    }
}

/// Ends the program with a usage error.
fn conflict(message: &str) -> ! {
    super::Arguments::command().error(ErrorKind::ArgumentConflict, message).exit()
}

fn write_gguf(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let Arguments { src, dst, dtype, block_type, quantize, max_shard_size, shard_by_layer, partial, force, .. } =
        arguments;
    for (given, option, problem) in [
        (dtype.is_some(), "--dtype", "the types of a GGUF file are set by `--type`"),
        (quantize.is_some(), "--quantize", "the types of a GGUF file are set by `--type`"),
        (max_shard_size.is_some(), "--max-shard-size", "a GGUF is one file"),
        (*shard_by_layer, "--shard-by-layer", "a GGUF is one file"),
        (*partial, "--partial", "llama.cpp opens complete files only"),
    ] {
        if given {
            conflict(&format!("`{option}` does not apply to GGUF: {problem}"));
        }
    }
    let options = GgufOptions { block_type: block_type.map(Into::into), overwrite: *force };
    let start = Instant::now();
    let source = Checkpoint::open(src)?;
    let report = source.write_gguf(dst, &options, &Bar::new())?;
    let seconds = start.elapsed().as_secs_f64();
    // The header is validated as that of any other file.
    Checkpoint::open(dst)?;
    note(format_args!(
        "wrote {} to `{}` in {seconds:.1} s ({:.0} MB/s)",
        DecimalBytes(report.bytes),
        dst.display(),
        report.bytes as f64 / 1e6 / seconds
    ));
    let types: Vec<String> = report.types.iter().map(|(block_type, count)| format!("{count} {block_type}")).collect();
    note(format_args!("tensors: {}", types.join(", ")));
    report_source(&source);
    report.notes.iter().for_each(|text| note(format_args!("{text}")));
    Ok(ExitCode::SUCCESS)
}

fn write_directory(arguments: Arguments, format: Format) -> Result<ExitCode, Failure> {
    let Arguments { src, dst, dtype, block_type, quantize, max_shard_size, shard_by_layer, partial, force, .. } =
        arguments;
    if block_type.is_some() {
        conflict("`--type` applies to GGUF only: the dtype of other formats is set by `--dtype`");
    }
    if quantize.is_some() && format == Format::Burnpack {
        conflict("`--quantize` does not apply to burnpack: the layout of quantized weights is one of safetensors");
    }
    let options = SaveOptions {
        dtype: dtype.map(Into::into),
        format,
        max_shard_size: max_shard_size.unwrap_or(MAX_SHARD_SIZE),
        shard_by_layer,
        sidecars_from: None,
        overwrite: force,
        partial,
    };
    let start = Instant::now();
    let source = Checkpoint::open(src)?;
    let quantized = match quantize {
        Some(bits) => Some(source.convert_quantized(&dst, bits.into(), &options, &Bar::new())?),
        None => {
            source.convert_with(&dst, &options, &Bar::new())?;
            None
        }
    };
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
    if let Some(report) = &quantized {
        report_quantized(report);
    }
    report_source(&source);
    for skipped in source.skipped_notes() {
        note(format_args!("{skipped}"));
    }
    Ok(ExitCode::SUCCESS)
}

fn report_quantized(report: &QuantizeReport) {
    let QuantizeReport { quantized, copied, unquantized } = report;
    let copied = match copied {
        0 => String::new(),
        copied => format!("; {copied} of them had this form and were copied"),
    };
    let matrices = if *quantized == 1 { "matrix" } else { "matrices" };
    note(format_args!("quantized {quantized} {matrices} with one scale per group of 32{copied}"));
    if let Some(first) = unquantized.first() {
        let more = match unquantized.len() - 1 {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        note(format_args!("not quantized: `{first}`{more}, whose rows are not a multiple of 32 values"));
    }
}

/// Reports what is unusual about the source's weights.
fn report_source(source: &Checkpoint) {
    if let Some(head) = source.tied_head().describe() {
        note(format_args!("{head}"));
    }
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
