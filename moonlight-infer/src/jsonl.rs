//! JSONL of texts or tokens, one sequence in each line, read and written.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Lines, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::error::InferError;
use crate::tokenizer::Tokenizer;

/// A line.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    tokens: Option<Vec<u32>>,
    text: Option<String>,
}

/// A file of lines `{"tokens": [...]}` or `{"text": "..."}`. Empty lines are passed over.
#[derive(Debug)]
pub struct JsonlReader {
    path: PathBuf,
    lines: Lines<BufReader<File>>,
    /// The line that was read last, from 1.
    line: usize,
}

impl JsonlReader {
    /// Opens a file.
    ///
    /// # Errors
    ///
    /// [`InferError::File`].
    pub fn open(path: &Path) -> Result<Self, InferError> {
        let file = File::open(path).map_err(InferError::read(path))?;
        Ok(Self { path: path.to_owned(), lines: BufReader::new(file).lines(), line: 0 })
    }

    /// The tokens of the next line; `None` after the last. A line of text needs a tokenizer.
    ///
    /// # Errors
    ///
    /// [`InferError::Line`] for a line that is neither, and for text without a tokenizer.
    pub fn next_tokens(&mut self, tokenizer: Option<&Tokenizer>) -> Result<Option<Vec<u32>>, InferError> {
        loop {
            let Some(line) = self.lines.next() else { return Ok(None) };
            let line = line.map_err(InferError::read(&self.path))?;
            self.line += 1;
            if !line.trim().is_empty() {
                let wrong = |(problem, hint)| InferError::line(&self.path, self.line, problem, hint);
                return tokens_of(&line, tokenizer).map(Some).map_err(wrong);
            }
        }
    }

    /// Hands the tokens of every line to `each`. What is wrong with the tokens of a line is said with file and line; see
    /// [`InferError::at_line`].
    ///
    /// # Errors
    ///
    /// Those of [`next_tokens`](Self::next_tokens) and of `each`.
    pub fn for_each(
        mut self,
        tokenizer: Option<&Tokenizer>,
        mut each: impl FnMut(Vec<u32>) -> Result<(), InferError>,
    ) -> Result<(), InferError> {
        while let Some(tokens) = self.next_tokens(tokenizer)? {
            each(tokens).map_err(|error| error.at_line(&self.path, self.line))?;
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
pub struct JsonlWriter {
    path: PathBuf,
    to: Box<dyn Write>,
}

impl JsonlWriter {
    /// Creates a file, or writes to stdout where none is given.
    ///
    /// # Errors
    ///
    /// [`InferError::File`].
    pub fn create(path: Option<&Path>) -> Result<Self, InferError> {
        Ok(match path {
            Some(path) => {
                let file = File::create(path).map_err(InferError::write(path))?;
                Self { path: path.to_owned(), to: Box::new(BufWriter::new(file)) }
            }
            None => Self { path: "stdout".into(), to: Box::new(std::io::stdout().lock()) },
        })
    }

    /// Writes a line.
    ///
    /// # Errors
    ///
    /// [`InferError::File`].
    pub fn line(&mut self, value: &Value) -> Result<(), InferError> {
        writeln!(self.to, "{value}").map_err(InferError::write(&self.path))
    }

    /// Flushes what is still in memory; a writer that is dropped without it cannot say that the disk was full.
    ///
    /// # Errors
    ///
    /// [`InferError::File`].
    pub fn finish(mut self) -> Result<(), InferError> {
        self.to.flush().map_err(InferError::write(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_written_is_read_and_wrong_lines_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        let mut writer = JsonlWriter::create(Some(&path)).unwrap();
        writer.line(&json!({"tokens": [1, 2]})).unwrap();
        writer.line(&json!({"text": "ab"})).unwrap();
        writer.finish().unwrap();
        let read = |tokenizer: Option<&Tokenizer>| {
            let mut found = Vec::new();
            let result = JsonlReader::open(&path)?.for_each(tokenizer, |tokens| {
                found.push(tokens);
                Ok(())
            });
            result.map(|()| found)
        };
        assert_eq!(read(Some(&Tokenizer::bytes())).unwrap(), [vec![1, 2], vec![97, 98]]);
        let error = read(None).unwrap_err();
        assert!(error.to_string().ends_with("x.jsonl:2: the model's directory has no tokenizer"), "{error}");
        assert_eq!(error.hint().unwrap(), "give `tokens` in place of `text`");

        std::fs::write(&path, "\n{\"tokens\": [1], \"text\": \"a\"}\n").unwrap();
        let error = read(None).unwrap_err().to_string();
        assert!(error.ends_with("x.jsonl:2: the line has to have either `tokens` or `text`"), "{error}");
    }

    #[test]
    fn errors_of_a_line_are_placed_and_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        std::fs::write(&path, "{\"tokens\": []}\n").unwrap();
        let with = |error: fn() -> InferError| {
            let result = JsonlReader::open(&path).unwrap().for_each(None, |_| Err(error()));
            result.unwrap_err().to_string()
        };
        assert!(with(|| InferError::EmptyPrompt).ends_with("x.jsonl:1: the prompt has no tokens"));
        let full = || InferError::write("out")(std::io::Error::other("full"));
        assert_eq!(with(full), "`out` cannot be written: full");
    }
}
