//! Records of texts or tokens, read; JSONL, written.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use moonlight_convert::Printable;
use serde_json::Value;

use crate::error::InferError;
use crate::records::{FilePosition, Record, RecordReader, parse};
use crate::tokenizer::Tokenizer;

/// A file of records `{"tokens": [...]}` or `{"text": "..."}`, of any [kind](crate::records). Other fields are not read.
pub struct TokenReader {
    records: RecordReader,
    /// Where the record was that was read last.
    place: FilePosition,
}

impl TokenReader {
    /// Opens a file.
    ///
    /// # Errors
    ///
    /// [`InferError::Records`].
    pub fn open(path: &Path) -> Result<Self, InferError> {
        Ok(Self { records: RecordReader::open(path, &[], None)?, place: FilePosition::default() })
    }

    /// The tokens of the next record; `None` after the last. A record of text needs a tokenizer, which gives those of its
    /// [`encode_text`](Tokenizer::encode_text).
    ///
    /// # Errors
    ///
    /// [`InferError::Line`] for a record that is neither, and for text without a tokenizer; [`InferError::Records`] for a file
    /// that cannot be read on.
    pub fn next_tokens(&mut self, tokenizer: Option<&Tokenizer>) -> Result<Option<Vec<u32>>, InferError> {
        let Some(Record { json, place }) = self.records.next_record()? else { return Ok(None) };
        self.place = place;
        let path = self.records.path();
        let value = parse(&json).map_err(|error| InferError::json(path, place, &error, shape()))?.value;
        let wrong = |(problem, hint)| InferError::at(path, place, problem, hint);
        tokens_of(value, tokenizer).map(Some).map_err(wrong)
    }

    /// Hands the tokens of every record to `each`. What is wrong with the tokens of a record is said with file and line; see
    /// [`InferError::with_position`].
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
            each(tokens).map_err(|error| error.with_position(self.records.path(), self.place))?;
        }
        Ok(())
    }
}

/// Reads one record of `score` or `generate`, for tests that feed it anything.
///
/// # Errors
///
/// What is wrong with it.
#[doc(hidden)]
pub fn parse_record(json: &[u8], tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>, String> {
    let value = parse(json).map_err(|error| error.to_string())?.value;
    tokens_of(value, tokenizer).map_err(|(problem, _)| problem)
}

fn shape() -> Option<String> {
    Some("a record is `{\"tokens\": [1, 2, 3]}` or `{\"text\": \"...\"}`".into())
}

fn tokens_of(record: Value, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>, (String, Option<String>)> {
    let Value::Object(record) = record else { return Err(("the record is not a JSON object".into(), shape())) };
    // A column of parquet or CSV that this record does not use is null or empty.
    let field = |name: &str| record.get(name).filter(|value| !value.is_null());
    match (field("tokens"), field("text"), tokenizer) {
        (Some(Value::Array(tokens)), None, _) => {
            let token = |value: &Value| value.as_u64().and_then(|token| u32::try_from(token).ok());
            let wrong = || ("`tokens` is not a list of tokens, whole numbers from 0".into(), shape());
            tokens.iter().map(token).collect::<Option<_>>().ok_or_else(wrong)
        }
        (None, Some(Value::String(text)), Some(tokenizer)) => {
            tokenizer.encode_text(text).map_err(|error| (error.to_string(), error.hint()))
        }
        (None, Some(Value::String(_)), None) => {
            Err(("the model's directory has no tokenizer".into(), Some("give `tokens` in place of `text`".into())))
        }
        (Some(_), None, _) => Err(("`tokens` is not a list".into(), shape())),
        (None, Some(_), _) => Err(("`text` is not a text".into(), shape())),
        (Some(_), Some(_), _) => {
            Err(("the record has to have either `tokens` or `text`, and has both".into(), shape()))
        }
        (None, None, _) => {
            let named = |name: &String| match name.as_str() {
                "" => "a field without a name".into(),
                name => format!("`{}`", Printable(name)),
            };
            let names: Vec<String> = record.keys().take(6).map(named).collect();
            let has = if names.is_empty() { "nothing".into() } else { names.join(", ") };
            Err((format!("the record has to have either `tokens` or `text`; it has {has}"), shape()))
        }
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
            let result = TokenReader::open(&path)?.for_each(tokenizer, |tokens| {
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
        assert!(
            error.ends_with("x.jsonl:2: the record has to have either `tokens` or `text`, and has both"),
            "{error}"
        );
        std::fs::write(&path, "[{\"tokens\": [1], \"id\": NaN}, {\"token\": [1]}]").unwrap();
        let error = read(None).unwrap_err().to_string();
        assert!(
            error.ends_with("x.jsonl:1:30: the record has to have either `tokens` or `text`; it has `token`"),
            "{error}"
        );
        std::fs::write(&path, "{\"tokens\": [1, -1]}").unwrap();
        assert!(
            read(None)
                .unwrap_err()
                .to_string()
                .ends_with("x.jsonl:1: `tokens` is not a list of tokens, whole numbers from 0")
        );
    }

    #[test]
    fn files_of_every_kind_are_read() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("a.csv", "text,id\nab,7\nc,8\n"),
            ("a.json", "[\n{\"text\": \"ab\", \"tokens\": null},\n{\"tokens\": [99]}\n]"),
            ("a.jsonl", "\u{feff}{\"text\": \"ab\"}\r\n{\"text\": \"c\"}\r\n"),
        ] {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            let mut found = Vec::new();
            TokenReader::open(&path)
                .unwrap()
                .for_each(Some(&Tokenizer::bytes()), |tokens| {
                    found.push(tokens);
                    Ok(())
                })
                .unwrap();
            assert_eq!(found, [vec![97, 98], vec![99]], "{name}");
        }
    }

    #[test]
    fn errors_of_a_line_are_placed_and_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        std::fs::write(&path, "{\"tokens\": []}\n").unwrap();
        let with = |error: fn() -> InferError| {
            let result = TokenReader::open(&path).unwrap().for_each(None, |_| Err(error()));
            result.unwrap_err().to_string()
        };
        assert!(with(|| InferError::EmptyPrompt).ends_with("x.jsonl:1: the prompt has no tokens"));
        let full = || InferError::write("out")(std::io::Error::other("full"));
        assert_eq!(with(full), "`out` cannot be written: full");
    }
}
