//! `moonlight-convert tokenizer`.

use std::path::PathBuf;
use std::process::ExitCode;

use crate::tokenizer::write_tokenizer_json;
use clap::Args;

use super::Failure;
use super::output::Output;

/// Arguments of `tokenizer`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// A directory with `tiktoken.model`, or a model in the Hub's cache
    dir: PathBuf,
    /// Replace an existing `tokenizer.json`
    #[arg(long)]
    force: bool,
}

/// Writes the file, and prints its path.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    // Writing normally takes milliseconds, so that nothing polls the flag. If it takes longer, the handler exits.
    let _stop = super::signals::listen();
    let path = write_tokenizer_json(&arguments.dir, arguments.force)?;
    let mut output = Output::new();
    output.line(format_args!("{}", path.display()));
    output.finish()?;
    Ok(ExitCode::SUCCESS)
}
