//! The program `moonlight-convert`: inspects, converts, compares and downloads checkpoints.

mod cli;

use std::io;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use moonlight_convert::CheckpointError;
use moonlight_convert::adapter::AdapterError;
#[cfg(feature = "download")]
use moonlight_convert::hub::DownloadError;

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
    Inspect(cli::inspect::Arguments),
    /// Rewrite a checkpoint in another dtype or file format, without the tensors that no model uses
    Convert(cli::convert::Arguments),
    /// Compare two checkpoints tensor by tensor, or files with their digests; exit code 1 if they differ
    Verify(cli::verify::Arguments),
    /// Download a model from the Hub into its cache, and check it; resumes partial files
    #[cfg(feature = "download")]
    Download(cli::download::Arguments),
    /// Write a `tokenizer.json` that is equivalent to a directory's `tiktoken.model`
    Tokenizer(cli::tokenizer::Arguments),
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

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => return code,
        Err(Failure::Checkpoint(error)) => {
            cli::output::fail(&error, cli::hint::checkpoint(&error));
            if matches!(error, CheckpointError::Interrupted) {
                return ExitCode::from(cli::signals::INTERRUPTED);
            }
        }
        Err(Failure::Adapter(error)) => {
            let hint = match error {
                AdapterError::NoBase { .. } => Some(NAME_BASE.to_owned()),
                _ => error.hint(),
            };
            cli::output::fail(&error, hint);
        }
        #[cfg(feature = "download")]
        Err(Failure::Download(error)) => cli::output::fail(&error, cli::hint::download(&error)),
        Err(Failure::Output(error)) => {
            cli::output::note(format_args!("error: standard output cannot be written: {error}"));
        }
    }
    ExitCode::FAILURE
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Inspect(arguments) => cli::inspect::run(&arguments),
        Command::Convert(arguments) => cli::convert::run(arguments),
        Command::Verify(arguments) => cli::verify::run(arguments),
        #[cfg(feature = "download")]
        Command::Download(arguments) => cli::download::run(arguments),
        Command::Tokenizer(arguments) => cli::tokenizer::run(&arguments),
    }
}
