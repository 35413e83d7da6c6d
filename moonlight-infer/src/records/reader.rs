//! The reader of records for files of all kinds.

use std::path::{Path, PathBuf};

use moonlight_convert::Printable;
use serde_json::{Map, Value};

use super::csv::{self, CsvRows};
use super::json_values::{self, JsonValues};
use super::lines::{Lines, TooLong};
use super::source::Limited;
use super::{FileKind, FilePosition, MAX_RECORD_BYTES, RecordError, Source, parse};
use crate::parquet::{self, ParquetError, RequiredColumns};

/// A record of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The JSON of the record. A line or an element is unchanged; the JSON of a row is built from its fields.
    pub json: Vec<u8>,
    /// The start of the record in the file.
    pub place: FilePosition,
}

/// Reads the records of a file one by one.
pub struct RecordReader {
    path: PathBuf,
    kind: FileKind,
    rows: Rows,
    /// The first record, until it is returned.
    peeked: Option<Record>,
    /// The number of blank rows, which is kept when `rows` is dropped at the end.
    blank: u64,
}

enum Rows {
    Lines(Lines),
    JsonValues(Box<JsonValues<Limited>>),
    Delimited(Box<CsvRows<Limited>>),
    Parquet { rows: Box<dyn Iterator<Item = Result<String, ParquetError>>>, row: usize, left: u64 },
    End,
}

impl RecordReader {
    /// Opens a file of any kind and reads its first record. A parquet file must have one of the columns `required`. With a
    /// `limit`, only records within the first `limit` bytes are read. These are counted after decompression, and for parquet
    /// in the JSON of the records.
    ///
    /// # Errors
    ///
    /// [`RecordError`]: a file that cannot be read, or is not a file of records.
    pub fn open(path: &Path, required: RequiredColumns, limit: Option<u64>) -> Result<Self, RecordError> {
        Self::from_source(Source::open(path)?, required, limit)
    }

    /// Like [`open`](Self::open), from an opened file.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn from_source(source: Source, required: RequiredColumns, limit: Option<u64>) -> Result<Self, RecordError> {
        let kind = source.kind()?;
        let path = source.path().to_owned();
        let rows = match kind {
            FileKind::JsonLines => Rows::Lines(Lines::new(source.into_reader(limit))),
            FileKind::JsonArray => Rows::JsonValues(Box::new(JsonValues::new(source.into_reader(limit), true))),
            FileKind::JsonObjects => Rows::JsonValues(Box::new(JsonValues::new(source.into_reader(limit), false))),
            FileKind::Delimited(delimiter) => {
                let file = CsvRows::new(source.into_reader(limit), delimiter);
                Rows::Delimited(Box::new(file.map_err(|error| csv_error(&path, kind, error))?))
            }
            FileKind::Parquet => {
                let rows = Box::new(parquet::rows(&path, required)?);
                Rows::Parquet { rows, row: 0, left: limit.unwrap_or(u64::MAX) }
            }
        };
        let mut reader = Self { path, kind, rows, peeked: None, blank: 0 };
        reader.peeked = reader.advance()?;
        let is_json = matches!(kind, FileKind::JsonLines | FileKind::JsonArray | FileKind::JsonObjects);
        match reader.peeked.as_ref().filter(|_| is_json).and_then(|record| detect_wrapped_records(&record.json)) {
            Some((problem, hint)) => Err(RecordError::file(&reader.path, problem, hint)),
            None => Ok(reader),
        }
    }

    /// How the file stores its records.
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of rows of a CSV file that were skipped so far because all their fields are empty.
    pub fn blank_rows(&self) -> u64 {
        self.blank + if let Rows::Delimited(file) = &self.rows { file.blank() } else { 0 }
    }

    /// The first record, until [`next_record`](Self::next_record) returns it.
    pub fn first(&self) -> Option<&Record> {
        self.peeked.as_ref()
    }

    /// The next record; `None` after the last one and after an error.
    ///
    /// # Errors
    ///
    /// [`RecordError`]: the next record cannot be read. Errors within a record are found when it is parsed.
    pub fn next_record(&mut self) -> Result<Option<Record>, RecordError> {
        match self.peeked.take() {
            Some(record) => Ok(Some(record)),
            None => self.advance(),
        }
    }

    fn advance(&mut self) -> Result<Option<Record>, RecordError> {
        let result = self.read();
        // Nothing is read after the end or an error, so the file is closed.
        if !matches!(result, Ok(Some(_))) {
            self.blank = self.blank_rows();
            self.rows = Rows::End;
        }
        result
    }

    fn read(&mut self) -> Result<Option<Record>, RecordError> {
        let (path, kind) = (&self.path, self.kind);
        let mut json = Vec::new();
        let place = match &mut self.rows {
            Rows::End => None,
            Rows::Lines(lines) => {
                let read = lines.next(&mut json, MAX_RECORD_BYTES).map_err(|error| RecordError::io(path, &error))?;
                let found = read.map_err(|TooLong| too_long(path, kind, FilePosition::line(lines.line())))?;
                found.then(|| FilePosition::line(lines.line()))
            }
            Rows::JsonValues(values) => values.next(&mut json, MAX_RECORD_BYTES).map_err(|error| match error {
                json_values::JsonSplitError::Io(error) => RecordError::io(path, &error),
                json_values::JsonSplitError::TooLong(place) => too_long(path, kind, place),
                json_values::JsonSplitError::Syntax(place, problem) => RecordError::at(path, place, problem, None),
            })?,
            Rows::Delimited(file) => {
                let row = file.next(&mut json, MAX_RECORD_BYTES).map_err(|error| csv_error(path, kind, error))?;
                row.map(FilePosition::line)
            }
            Rows::Parquet { rows, row, left } => {
                *row += 1;
                match rows.next().transpose()? {
                    Some(text) if text.len() as u64 <= *left => {
                        *left -= text.len() as u64;
                        if text.len() > MAX_RECORD_BYTES {
                            return Err(too_long(path, kind, FilePosition::line(*row)));
                        }
                        json = text.into_bytes();
                        Some(FilePosition::line(*row))
                    }
                    // The end of the file, or a row beyond the limit.
                    _ => None,
                }
            }
        };
        Ok(place.map(|place| Record { json, place }))
    }
}

fn too_long(path: &Path, kind: FileKind, place: FilePosition) -> RecordError {
    let problem = format!("the record is longer than {} MiB", MAX_RECORD_BYTES >> 20);
    let hint = match kind {
        FileKind::JsonLines => Some("write each record on a line of its own (JSONL)"),
        FileKind::JsonArray | FileKind::JsonObjects => {
            Some("write records as elements of an array or as lines of JSONL, not within another object")
        }
        FileKind::Delimited(_) => Some("check that every quotation mark is closed"),
        FileKind::Parquet => None,
    };
    RecordError::at(path, place, problem, hint)
}

fn csv_error(path: &Path, kind: FileKind, error: csv::CsvError) -> RecordError {
    match error {
        csv::CsvError::Io(error) => RecordError::io(path, &error),
        csv::CsvError::TooLong(line) => too_long(path, kind, FilePosition::line(line)),
        csv::CsvError::Row(line, problem, hint) => RecordError::at(path, FilePosition::line(line), problem, hint),
    }
}

/// Fields of records. If the first object has one of them, it is a record and not a wrapper around all records.
const RECORD_FIELDS: &[&str] = &[
    "messages",
    "conversations",
    "instruction",
    "text",
    "content",
    "page",
    "tokens",
    "input_ids",
    "prompt",
    "question",
    "choices",
    "endings",
];
/// Names under which some files wrap the list of their records in an object.
const LIST_FIELDS: &[&str] = &[
    "data",
    "rows",
    "train",
    "validation",
    "valid",
    "test",
    "dataset",
    "examples",
    "instances",
    "items",
    "records",
    "samples",
    "entries",
];

/// The problem and the hint for a file whose first object wraps all records.
fn detect_wrapped_records(json: &[u8]) -> Option<(String, String)> {
    let Value::Object(record) = parse(json).ok()?.value else { return None };
    if let Some(problem) = detect_columns(&record) {
        return Some((problem, "write it with `to_json(path, orient=\"records\", lines=True)`".into()));
    }
    if record.keys().any(|key| RECORD_FIELDS.contains(&key.as_str())) {
        return None;
    }
    let (name, first) = record.iter().find_map(|(name, value)| match value {
        Value::Array(list) if LIST_FIELDS.contains(&name.as_str()) => Some((name, list.first()?.as_object()?)),
        _ => None,
    })?;
    // The API of the Hub's data set viewer wraps each row in another object.
    let within = if first.contains_key("row") && first.contains_key("row_idx") { ".row" } else { "" };
    let problem = format!("its records are a list within an object, under `{}`", Printable(name));
    Some((problem, format!("extract the list: `jq -c '.{name}[]{within}' FILE > records.jsonl`")))
}

/// The problem if the file is one object of columns, as pandas' `to_json` writes: `{"text": {"0": "...", "1": "..."}}`.
fn detect_columns(record: &Map<String, Value>) -> Option<String> {
    let is_column = |value: &Value| {
        value.as_object().is_some_and(|rows| !rows.is_empty() && rows.keys().all(|key| key.parse::<u64>().is_ok()))
    };
    let all = !record.is_empty() && record.values().all(is_column);
    all.then(|| "it has columns, not records: each value is an object keyed by row numbers".into())
}
