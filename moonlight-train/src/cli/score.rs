//! `moonlight score`.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::PathBuf;

use clap::Args;
use serde::Deserialize;
use serde_json::json;

use super::model::{ModelArguments, Opened};
use crate::error::TrainError;
use crate::score::score;
use crate::tokenizer::Tokenizer;

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

/// A line of the data.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    tokens: Option<Vec<u32>>,
    text: Option<String>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), TrainError> {
    let data = File::open(&arguments.data).map_err(TrainError::read(&arguments.data))?;
    let Opened { model, tokenizer, .. } = arguments.model.open()?;
    let (name, mut output): (PathBuf, Box<dyn Write>) = match &arguments.output {
        Some(path) => (path.clone(), Box::new(BufWriter::new(File::create(path).map_err(TrainError::write(path))?))),
        None => ("stdout".into(), Box::new(std::io::stdout().lock())),
    };
    for (index, line) in BufReader::new(data).lines().enumerate() {
        let line = line.map_err(TrainError::read(&arguments.data))?;
        if line.trim().is_empty() {
            continue;
        }
        let here = |problem: String, hint: Option<String>| TrainError::Request {
            problem: format!("{}:{}: {problem}", arguments.data.display(), index + 1),
            hint,
        };
        let tokens = tokens_of(&line, tokenizer.as_ref()).map_err(|(problem, hint)| here(problem, hint))?;
        let logprobs = score(&model, &tokens).map_err(|error| here(error.to_string(), error.hint()))?;
        writeln!(output, "{}", json!({"tokens": tokens, "logprobs": logprobs})).map_err(TrainError::write(&name))?;
    }
    output.flush().map_err(TrainError::write(&name))
}

fn tokens_of(line: &str, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>, (String, Option<String>)> {
    let shape = || Some("a line is `{\"tokens\": [1, 2, 3]}` or `{\"text\": \"...\"}`".to_owned());
    let line: Line = serde_json::from_str(line).map_err(|error| (error.to_string(), shape()))?;
    match (line.tokens, line.text, tokenizer) {
        (Some(tokens), None, _) => Ok(tokens),
        (None, Some(text), Some(tokenizer)) => Ok(tokenizer.encode(&text)),
        (None, Some(_), None) => {
            Err(("the model's directory has no tokenizer".into(), Some("give `tokens` in place of `text`".into())))
        }
        _ => Err(("the line has to have either `tokens` or `text`".into(), shape())),
    }
}
