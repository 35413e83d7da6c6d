//! How a file is read with `format = "text"`: as one document, or, if it contains records, as one document for each record.

use std::path::Path;

use moonlight_infer::parquet::TEXT_COLUMNS;
use moonlight_infer::records::{FileKind, RecordError, RecordReader, Source, extension, parse};
use serde_json::{Map, Value};

use super::DataError;

/// An opened file of texts.
pub(super) enum TextFile {
    /// One document.
    Plain {
        source: Source,
        /// The kind of file, for the notes.
        what: &'static str,
    },
    /// A document in each record.
    Records {
        reader: RecordReader,
        /// The field that contains the document.
        field: &'static str,
    },
}

/// The kind of an ordinary text file, for the notes.
pub(super) const PLAIN: &str = "plain text";

impl TextFile {
    /// Opens a file. Records are read up to the first `limit` bytes.
    pub(super) fn open(path: &Path, limit: Option<u64>) -> Result<Self, DataError> {
        let source = Source::open(path)?;
        let is_parquet = matches!(source.kind(), Ok(FileKind::Parquet));
        if !is_parquet {
            source.refuse_binary()?;
        }
        let extension = extension(path);
        match extension.as_str() {
            _ if is_parquet => Self::records(RecordReader::from_source(source, TEXT_COLUMNS, limit)?),
            "jsonl" | "ndjson" => Self::records(RecordReader::from_source(source, &[], limit)?),
            // Source repositories contain .json files too, which are learned as plain text.
            "json" => {
                let may_be_records = matches!(source.kind(), Ok(FileKind::JsonLines | FileKind::JsonArray));
                Self::records_or_plain(source, limit, may_be_records, "JSON as plain text")
            }
            "csv" | "tsv" => Self::records_or_plain(source, limit, true, "CSV as plain text"),
            _ => {
                let looks = matches!(source.kind(), Ok(FileKind::JsonLines))
                    && source.head().split(|byte| *byte == b'\n').next().is_some_and(is_record_of_text);
                let what =
                    if looks { "plain text that looks like JSON Lines (expected extension: .jsonl)" } else { PLAIN };
                Ok(Self::Plain { source, what })
            }
        }
    }

    /// The records of a file whose records must have texts.
    fn records(reader: RecordReader) -> Result<Self, DataError> {
        let Some(first) = reader.first() else {
            return Ok(Self::Records { reader, field: "text" });
        };
        let fields = match parse(&first.json).map(|parsed| parsed.value) {
            Ok(Value::Object(fields)) => fields,
            Ok(_) => {
                let (path, problem) = (reader.path().to_owned(), "its records are not JSON objects".into());
                let hint = Some("write records as `{\"text\": \"...\"}`".into());
                return Err(RecordError::File { path, problem, hint }.into());
            }
            // A broken first record is handled by `data.broken`, like any other.
            Err(_) => return Ok(Self::Records { reader, field: "text" }),
        };
        match field_of(&fields) {
            Some(field) => Ok(Self::Records { reader, field }),
            None => {
                let has = |name: &str| fields.contains_key(name);
                if let Some(name) = ["text", "content"].into_iter().find(|name| has(name)) {
                    let kind = match &fields[name] {
                        Value::Array(_) => "a list",
                        Value::Object(_) => "an object",
                        Value::Number(_) => "a number",
                        _ => "true or false",
                    };
                    let problem = format!("`{name}` of its first record is {kind}, not a text");
                    let hint = Some("write records as `{\"text\": \"...\"}`".into());
                    return Err(RecordError::File { path: reader.path().to_owned(), problem, hint }.into());
                }
                let hint = if has("messages") || has("conversations") || has("instruction") {
                    "set `data.format = \"chat\"` for conversations"
                } else if has("tokens") || has("input_ids") {
                    "set `data.format = \"tokens\"` for tokens"
                } else {
                    "rename the field with the document to `text`, or give the file the extension .txt to learn it as plain text"
                };
                let shown =
                    |name: &String| if name.is_empty() { "a field without a name".into() } else { format!("`{name}`") };
                let names: Vec<String> = fields.keys().take(8).map(shown).collect();
                let has = if names.is_empty() { "nothing".into() } else { names.join(", ") };
                let problem = format!("its records have neither `text` nor `content`; the first has {has}");
                Err(RecordError::File { path: reader.path().to_owned(), problem, hint: Some(hint.into()) }.into())
            }
        }
    }

    /// The records of a file if its first record has a text; otherwise plain text.
    fn records_or_plain(
        source: Source,
        limit: Option<u64>,
        may_be_records: bool,
        what: &'static str,
    ) -> Result<Self, DataError> {
        let path = source.path().to_owned();
        if !may_be_records {
            return Ok(Self::Plain { source, what });
        }
        match RecordReader::from_source(source, &[], limit) {
            Ok(reader) if reader.first().is_some_and(|first| is_record_of_text(&first.json)) => Self::records(reader),
            _ => Ok(Self::Plain { source: Source::open(&path)?, what }),
        }
    }
}

/// The field of a record that contains its document: `text`, or `content`, as datasets of source code call it.
fn field_of(record: &Map<String, Value>) -> Option<&'static str> {
    let is_text = |name: &str| matches!(record.get(name), Some(Value::String(_) | Value::Null));
    ["text", "content"].into_iter().find(|name| is_text(name))
}

fn is_record_of_text(record: &[u8]) -> bool {
    match parse(record).map(|parsed| parsed.value) {
        Ok(Value::Object(record)) => field_of(&record).is_some(),
        _ => false,
    }
}
