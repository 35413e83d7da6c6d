//! `moonlight-convert`: what is in a checkpoint, the same weights in another dtype or other files, and how far two
//! checkpoints are apart.

mod cli {
    #[cfg(feature = "download")]
    pub(crate) mod download;
    pub(crate) mod tokenizer;
}
mod inspect;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use burn::tensor::DType;
use clap::{Parser, Subcommand, ValueEnum};
use moonlight_convert::{Checkpoint, CheckpointError, SaveOptions};

/// Hugging Face checkpoints of the Moonlight family.
#[derive(Debug, Parser)]
#[command(name = "moonlight-convert", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what is in a checkpoint, and everything that is wrong with it.
    Inspect {
        /// The directory.
        dir: PathBuf,
    },
    /// Write a checkpoint anew: in another dtype, in other shards, without what a model does not need.
    Convert {
        /// The checkpoint to read.
        src: PathBuf,
        /// The directory to write.
        dst: PathBuf,
        /// The dtype of the weights; as stored where it is not given.
        #[arg(long)]
        dtype: Option<Dtype>,
        /// The largest file of weights, e.g. 5GB or 500MB.
        #[arg(long, default_value = "5GB", value_parser = bytes)]
        max_shard_size: u64,
        /// Replace a checkpoint that stands at DST.
        #[arg(long)]
        force: bool,
    },
    /// Fetch a model from the Hub into its cache; what is there already is checked and kept.
    #[cfg(feature = "download")]
    Download(cli::download::Arguments),
    /// Write the `tokenizer.json` that means the same as a directory's `tiktoken.model`.
    Tokenizer(cli::tokenizer::Arguments),
    /// Compare two checkpoints tensor by tensor: exit code 0 where they are equal, 1 where they are not.
    Verify {
        /// One checkpoint.
        a: PathBuf,
        /// The other.
        b: PathBuf,
    },
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

fn main() -> ExitCode {
    run(Arguments::parse().command).unwrap_or_else(|error| fail(&error, error.hint()))
}

/// One line for what went wrong, and one for the mend where there is one.
fn fail(error: &dyn std::error::Error, hint: Option<String>) -> ExitCode {
    eprintln!("error: {error}");
    if let Some(hint) = hint {
        eprintln!("hint: {hint}");
    }
    ExitCode::FAILURE
}

fn run(command: Command) -> Result<ExitCode, CheckpointError> {
    match command {
        Command::Inspect { dir } => Ok(inspect::inspect(&Checkpoint::open(dir)?)),
        Command::Convert { src, dst, dtype, max_shard_size, force } => {
            let options =
                SaveOptions { dtype: dtype.map(Into::into), max_shard_size, companions_from: None, overwrite: force };
            Checkpoint::open(src)?.convert(&dst, &options)?;
            let written = Checkpoint::open(&dst)?;
            let bytes: u64 = written.files().iter().map(|file| file.bytes).sum();
            eprintln!("{}: {bytes} bytes in {} file(s)", dst.display(), written.files().len());
            Ok(ExitCode::SUCCESS)
        }
        #[cfg(feature = "download")]
        Command::Download(arguments) => Ok(cli::download::run(arguments)),
        Command::Tokenizer(arguments) => cli::tokenizer::run(&arguments),
        Command::Verify { a, b } => Ok(verify::verify(&Checkpoint::open(a)?, &Checkpoint::open(b)?)),
    }
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
