//! The program `moonlight-convert`: one subcommand per file, and hints in terms of its options.

mod adapter;
mod convert;
#[cfg(feature = "download")]
mod download;
mod hint;
mod inspect;
mod output;
mod progress;
#[cfg(all(test, feature = "download"))]
mod reference;
mod signals;
mod tokenizer;
mod units;
mod verify;

use std::io;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::CheckpointError;
use crate::adapter::AdapterError;
#[cfg(feature = "download")]
use crate::hub::DownloadError;

/// Inspect, convert, compare and download checkpoints of the Moonlight family
#[derive(Debug, Parser)]
#[command(name = "moonlight-convert", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the contents of a checkpoint, and every problem that it has
    Inspect(inspect::Arguments),
    /// Rewrite a checkpoint in another dtype or file format, without the tensors that no model uses
    Convert(convert::Arguments),
    /// Compare two checkpoints tensor by tensor, or files with their digests; exit code 1 if they differ
    Verify(verify::Arguments),
    /// Download a model from the Hub into its cache, and check it; resumes partial files
    #[cfg(feature = "download")]
    Download(download::Arguments),
    /// Write a `tokenizer.json` that is equivalent to a directory's `tiktoken.model`
    Tokenizer(tokenizer::Arguments),
}

/// The hint for an adapter without its base.
const NAME_BASE: &str = "name the base model with `--base`";

/// Why a command failed.
enum Failure {
    Checkpoint(CheckpointError),
    Adapter(AdapterError),
    #[cfg(feature = "download")]
    Download(DownloadError),
    /// Standard output could not be written.
    Output(io::Error),
}

impl From<CheckpointError> for Failure {
    fn from(error: CheckpointError) -> Self {
        Self::Checkpoint(error)
    }
}

impl From<AdapterError> for Failure {
    fn from(error: AdapterError) -> Self {
        match error {
            AdapterError::Checkpoint(error) => Self::Checkpoint(error),
            error => Self::Adapter(error),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

/// The program: reads its command line and runs the command. Usage errors exit with 2, as clap does.
pub fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => return code,
        Err(Failure::Checkpoint(error)) => {
            output::fail(&error, hint::checkpoint(&error));
            if matches!(error, CheckpointError::Interrupted) {
                return ExitCode::from(signals::INTERRUPTED);
            }
        }
        Err(Failure::Adapter(error)) => {
            let hint = match error {
                AdapterError::NoBase { .. } => Some(NAME_BASE.to_owned()),
                _ => error.hint(),
            };
            output::fail(&error, hint);
        }
        #[cfg(feature = "download")]
        Err(Failure::Download(error)) => output::fail(&error, hint::download(&error)),
        Err(Failure::Output(error)) => {
            output::note(format_args!("error: standard output cannot be written: {error}"));
        }
    }
    ExitCode::FAILURE
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Convert(arguments) => convert::run(arguments),
        Command::Verify(arguments) => verify::run(arguments),
        #[cfg(feature = "download")]
        Command::Download(arguments) => download::run(arguments),
        Command::Tokenizer(arguments) => tokenizer::run(&arguments),
    }
}
