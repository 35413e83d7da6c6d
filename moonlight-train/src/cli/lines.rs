//! Texts or tokens, one in each line of a file.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::error::TrainError;
use crate::tokenizer::Tokenizer;

/// A line.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    tokens: Option<Vec<u32>>,
    text: Option<String>,
}

/// JSONL of `{"tokens": [...]}` or `{"text": "..."}` that is read. Empty lines are passed over.
pub(super) struct Input {
    name: PathBuf,
    from: BufReader<File>,
}

impl Input {
    /// Opens a file.
    pub(super) fn open(path: &Path) -> Result<Self, TrainError> {
        let file = File::open(path).map_err(TrainError::read(path))?;
        Ok(Self { name: path.to_owned(), from: BufReader::new(file) })
    }

    /// Hands the tokens of every line to `each`, whose errors, like those of the lines, name file and line.
    pub(super) fn for_each(
        self,
        tokenizer: Option<&Tokenizer>,
        mut each: impl FnMut(Vec<u32>) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        for (index, line) in self.from.lines().enumerate() {
            let line = line.map_err(TrainError::read(&self.name))?;
            if line.trim().is_empty() {
                continue;
            }
            let here = |problem: String, hint| TrainError::at_line(&self.name, index + 1, problem, hint);
            let tokens = tokens_of(&line, tokenizer).map_err(|(problem, hint)| here(problem, hint))?;
            each(tokens).map_err(|error| match error {
                error @ TrainError::Request { .. } => here(error.to_string(), error.hint()),
                error => error,
            })?;
        }
        Ok(())
    }
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

/// JSONL that is written, to a file or to stdout.
pub(super) struct Output {
    name: PathBuf,
    to: Box<dyn Write>,
}

impl Output {
    /// Opens a file, or stdout where none is given.
    pub(super) fn create(path: Option<&Path>) -> Result<Self, TrainError> {
        Ok(match path {
            Some(path) => {
                let file = File::create(path).map_err(TrainError::write(path))?;
                Self { name: path.to_owned(), to: Box::new(BufWriter::new(file)) }
            }
            None => Self { name: "stdout".into(), to: Box::new(std::io::stdout().lock()) },
        })
    }

    /// Writes a line.
    pub(super) fn line(&mut self, value: &Value) -> Result<(), TrainError> {
        writeln!(self.to, "{value}").map_err(TrainError::write(&self.name))
    }

    /// Sees to it that everything is written.
    pub(super) fn finish(mut self) -> Result<(), TrainError> {
        self.to.flush().map_err(TrainError::write(&self.name))
    }
}
