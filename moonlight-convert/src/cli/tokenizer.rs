//! `moonlight-convert tokenizer`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use moonlight_convert::CheckpointError;
use moonlight_convert::tokenizer::write_tokenizer_json;

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
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode, CheckpointError> {
    println!("{}", write_tokenizer_json(&arguments.dir, arguments.force)?.display());
    Ok(ExitCode::SUCCESS)
}
