//! `moonlight-convert`: what is in a checkpoint, the same weights in another dtype or other files, and how far two
//! checkpoints are apart.

mod cli;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use moonlight_convert::CheckpointError;

/// Checkpoints of the Moonlight family, Hugging Face's and Burn's.
#[derive(Debug, Parser)]
#[command(name = "moonlight-convert", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what is in a checkpoint, and everything that is wrong with it.
    Inspect(cli::inspect::Inspect),
    /// Write a checkpoint anew: in another dtype, in other files, without what a model does not need.
    Convert(cli::convert::Convert),
    /// Compare two checkpoints tensor by tensor, or files with their digests: exit code 1 where they differ.
    Verify(cli::verify::Verify),
    /// Fetch a model from the Hub into its cache; what is there already is checked and kept.
    #[cfg(feature = "download")]
    Download(cli::download::Arguments),
    /// Write the `tokenizer.json` that means the same as a directory's `tiktoken.model`.
    Tokenizer(cli::tokenizer::Arguments),
}

fn main() -> ExitCode {
    run(Arguments::parse().command).unwrap_or_else(|error| fail(&error, cli::hint::checkpoint(&error)))
}

/// Prints the error in one line, and in another what helps, where there is a hint.
fn fail(error: &dyn std::error::Error, hint: Option<String>) -> ExitCode {
    eprintln!("error: {error}");
    if let Some(hint) = hint {
        eprintln!("hint: {hint}");
    }
    ExitCode::FAILURE
}

fn run(command: Command) -> Result<ExitCode, CheckpointError> {
    match command {
        Command::Inspect(arguments) => cli::inspect::run(&arguments),
        Command::Convert(arguments) => cli::convert::run(arguments),
        Command::Verify(arguments) => cli::verify::run(arguments),
        #[cfg(feature = "download")]
        Command::Download(arguments) => Ok(cli::download::run(arguments)),
        Command::Tokenizer(arguments) => cli::tokenizer::run(&arguments),
    }
}
