//! `moonlight score`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::lines::{Input, Output};
use super::model::{ModelArguments, Opened};
use crate::error::TrainError;
use crate::score::score;

/// Log-probabilities of given texts or tokens.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// JSONL: a line `{"tokens": [...]}` or `{"text": "..."}` for each sequence.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Where the results go, a line `{"tokens": [...], "logprobs": [null, -1.2, ...]}` each; else to stdout.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    let data = Input::open(&arguments.data)?;
    let Opened { model, tokenizer, .. } = arguments.model.open()?;
    let mut output = Output::create(arguments.output.as_deref())?;
    data.for_each(tokenizer.as_ref(), |tokens| {
        let logprobs = score(&model, &tokens)?;
        output.line(&json!({"tokens": tokens, "logprobs": logprobs}))
    })?;
    output.finish()
}
