//! Reads sequences of tokens from files whose records have texts or tokens.

use std::path::Path;

use moonlight_convert::Printable;
use serde_json::Value;

use crate::error::InferError;
use crate::records::{FilePosition, Record, RecordReader, parse};
use crate::tokenizer::Tokenizer;

/// Reads records `{"tokens": [...]}` or `{"text": "..."}` from a file of any [kind](crate::records). Other fields are ignored.
pub struct TokenReader {
    records: RecordReader,
    /// The position of the record that was read last.
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

    /// The tokens of the next record; `None` after the last. Text is encoded by the tokenizer's
    /// [`encode_text`](Tokenizer::encode_text).
    ///
    /// # Errors
    ///
    /// [`InferError::Line`] for a record that has neither, and for text without a tokenizer; [`InferError::Records`] for a
    /// file whose next record cannot be read.
    pub fn next_tokens(&mut self, tokenizer: Option<&Tokenizer>) -> Result<Option<Vec<u32>>, InferError> {
        let Some(Record { json, place }) = self.records.next_record()? else { return Ok(None) };
        self.place = place;
        let path = self.records.path();
        let value = parse(&json).map_err(|error| InferError::json(path, place, &error, record_hint()))?.value;
        let invalid = |(problem, hint)| InferError::at(path, place, problem, hint);
        tokens_of(value, tokenizer).map(Some).map_err(invalid)
    }

    /// Calls `each` with the tokens of every record.
    ///
    /// # Errors
    ///
    /// Those of [`next_tokens`](Self::next_tokens), and those of `each`. Errors of `each` about the tokens get the file and
    /// line of the record ([`InferError::with_position`]).
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

/// Parses one record, for fuzzing.
///
/// # Errors
///
/// What is wrong with the record.
#[doc(hidden)]
pub fn parse_record(json: &[u8], tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>, String> {
    let value = parse(json).map_err(|error| error.to_string())?.value;
    tokens_of(value, tokenizer).map_err(|(problem, _)| problem)
}

fn record_hint() -> Option<String> {
    Some("a record is `{\"tokens\": [1, 2, 3]}` or `{\"text\": \"...\"}`".into())
}

fn tokens_of(record: Value, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>, (String, Option<String>)> {
    let Value::Object(record) = record else { return Err(("the record is not a JSON object".into(), record_hint())) };
    // A parquet file has null in a column that the record does not use.
    let field = |name: &str| record.get(name).filter(|value| !value.is_null());
    match (field("tokens"), field("text"), tokenizer) {
        (Some(Value::Array(tokens)), None, _) => {
            let token = |value: &Value| value.as_u64().and_then(|token| u32::try_from(token).ok());
            let invalid =
                || ("`tokens` is not a list of tokens, which are non-negative integers".into(), record_hint());
            tokens.iter().map(token).collect::<Option<_>>().ok_or_else(invalid)
        }
        (None, Some(Value::String(text)), Some(tokenizer)) => {
            tokenizer.encode_text(text).map_err(|error| (error.to_string(), error.hint()))
        }
        (None, Some(Value::String(_)), None) => {
            Err(("the model's directory has no tokenizer".into(), Some("write `tokens` instead of `text`".into())))
        }
        (Some(_), None, _) => Err(("`tokens` is not a list".into(), record_hint())),
        (None, Some(_), _) => Err(("`text` is not a string".into(), record_hint())),
        (Some(_), Some(_), _) => Err(("the record has both `tokens` and `text`".into(), record_hint())),
        (None, None, _) => {
            let named = |name: &String| match name.as_str() {
                "" => "a field without a name".into(),
                name => format!("`{}`", Printable(name)),
            };
            let names: Vec<String> = record.keys().take(6).map(named).collect();
            let has = if names.is_empty() { "nothing".into() } else { names.join(", ") };
            Err((format!("the record has neither `tokens` nor `text`; it has {has}"), record_hint()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_and_texts_are_read_and_invalid_records_are_errors_with_their_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        std::fs::write(&path, "{\"tokens\": [1, 2]}\n{\"text\": \"ab\"}\n").unwrap();
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
        assert_eq!(error.hint().unwrap(), "write `tokens` instead of `text`");

        std::fs::write(&path, "\n{\"tokens\": [1], \"text\": \"a\"}\n").unwrap();
        let error = read(None).unwrap_err().to_string();
        assert!(error.ends_with("x.jsonl:2: the record has both `tokens` and `text`"), "{error}");
        std::fs::write(&path, "[{\"tokens\": [1], \"id\": NaN}, {\"token\": [1]}]").unwrap();
        let error = read(None).unwrap_err().to_string();
        assert!(error.ends_with("x.jsonl:1:30: the record has neither `tokens` nor `text`; it has `token`"), "{error}");
        std::fs::write(&path, "{\"tokens\": [1, -1]}").unwrap();
        assert!(
            read(None)
                .unwrap_err()
                .to_string()
                .ends_with("x.jsonl:1: `tokens` is not a list of tokens, which are non-negative integers")
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
    fn errors_about_the_tokens_have_the_line_and_others_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        std::fs::write(&path, "{\"tokens\": []}\n").unwrap();
        let with = |error: fn() -> InferError| {
            let result = TokenReader::open(&path).unwrap().for_each(None, |_| Err(error()));
            result.unwrap_err().to_string()
        };
        assert!(with(|| InferError::EmptyPrompt).ends_with("x.jsonl:1: the prompt has no tokens"));
        let full = || moonlight_convert::FileError::write::<InferError>("out")(std::io::Error::other("full"));
        assert_eq!(with(full), "`out` cannot be written: full");
    }
}
