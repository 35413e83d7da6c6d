//! `moonlight score`.

use std::path::PathBuf;

use clap::Args;
use moonlight_infer::jsonl::JsonlReader;
use moonlight_infer::score::score;
use serde_json::json;

use super::model::ModelArguments;
use super::output::JsonLines;
use crate::error::TrainError;

/// Log-probabilities of given texts or tokens.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// JSONL: a record `{"tokens": [...]}` or `{"text": "..."}` for each sequence; also a JSON array, CSV or parquet. Other fields are not
    /// read.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Where the results go, a line `{"tokens": [...], "logprobs": [null, -1.2, ...]}` each; else to stdout.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    let data = JsonlReader::open(&arguments.data)?;
    let mut output = JsonLines::create(arguments.output.as_deref(), [&arguments.data])?;
    let opened = arguments.model.open()?;
    data.for_each(opened.tokenizer.as_ref(), |tokens| {
        let logprobs = score(&opened.model, &tokens)?;
        output.line(&json!({"tokens": tokens, "logprobs": logprobs}))
    })?;
    output.finish()
}
