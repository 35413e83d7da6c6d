//! `moonlight score`.

use std::path::PathBuf;

use clap::Args;
use moonlight_infer::score::score;
use moonlight_infer::token_reader::TokenReader;
use serde_json::json;

use super::model::{ModelArguments, ParseArguments, TextArguments};
use super::output::JsonLines;
use crate::error::TrainError;

/// Compute log-probabilities of texts or tokens
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    text: TextArguments,
    #[command(flatten)]
    parse: ParseArguments,
    /// JSONL, a JSON array, CSV or parquet with a record `{"tokens": [...]}` or `{"text": "..."}` for each sequence; other fields are
    /// ignored
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// The file for the results, a line `{"tokens": [...], "logprobs": [null, -1.2, ...]}` each [default: stdout]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    let data = TokenReader::open(&arguments.data)?;
    let mut output = JsonLines::create(arguments.output.as_deref(), [&arguments.data])?;
    let opened = arguments.model.open()?;
    let tokenizer = opened.tokenizer.as_ref().map(|tokenizer| arguments.text.tokenizer(tokenizer)).transpose()?;
    let tokenizer = tokenizer.map(|tokenizer| tokenizer.with_parse_special(arguments.parse.parse_special));
    data.for_each(tokenizer.as_ref(), |tokens| {
        let logprobs = score(&opened.model, &tokens)?;
        output.line(&json!({"tokens": tokens, "logprobs": logprobs}))
    })?;
    output.finish()
}
