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
}

fn main() -> ExitCode {
    run(Arguments::parse().command).unwrap_or_else(|error| {
        eprintln!("error: {error}");
        if let Some(hint) = error.hint() {
            eprintln!("hint: {hint}");
        }
        ExitCode::FAILURE
    })
}

fn run(command: Command) -> Result<ExitCode, CheckpointError> {
    match command {
        Command::Inspect(arguments) => cli::inspect::run(&arguments),
        Command::Convert(arguments) => cli::convert::run(arguments),
        Command::Verify(arguments) => cli::verify::run(arguments),
    }
}
