//! `moonlight-convert tokenizer`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use moonlight_convert::tokenizer::write_tokenizer_json;

use super::output::Output;
use crate::Failure;

/// Where the ranks are.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// A directory with `tiktoken.model`, or a model in the Hub's cache.
    dir: PathBuf,
    /// Replace a `tokenizer.json` that stands there.
    #[arg(long)]
    force: bool,
}

/// Writes, and prints the file's path.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    // It is written in a moment, or not at all: nothing has to be asked to end.
    let _asked = super::signals::listen();
    let path = write_tokenizer_json(&arguments.dir, arguments.force)?;
    let mut output = Output::new();
    output.line(format_args!("{}", path.display()));
    output.finish()?;
    Ok(ExitCode::SUCCESS)
}
