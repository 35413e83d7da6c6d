//! One reader of all kinds of files.

use std::path::{Path, PathBuf};

use moonlight_convert::Printable;
use serde_json::{Map, Value};

use super::csv::{self, CsvRows};
use super::lines::{Lines, TooLong};
use super::source::Limited;
use super::json_values::{self, JsonValues};
use super::{FileKind, MAX_RECORD_BYTES, FilePosition, RecordError, Source, parse};
use crate::parquet::{self, ParquetError, RequiredColumns};

/// A record of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its JSON: of a line or an element as the file has it, of a row made from it.
    pub json: Vec<u8>,
    /// Where it begins.
    pub place: FilePosition,
}

/// The records of a file, one after the other.
pub struct RecordReader {
    path: PathBuf,
    kind: FileKind,
    rows: Rows,
    /// What was read to look at it.
    peeked: Option<Record>,
    /// Blank rows of a file that is read.
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
    /// Opens a file of any kind and reads its first record. Of a parquet file, one of the columns `wanted` must be there.
    /// Records behind the first `limit` bytes are not read, where there is a limit (of a compressed file, unpacked bytes; of a
    /// parquet file, those of the records as JSON).
    ///
    /// # Errors
    ///
    /// [`RecordError`]: a file that cannot be read or is of another kind, which is named.
    pub fn open(path: &Path, wanted: RequiredColumns, limit: Option<u64>) -> Result<Self, RecordError> {
        Self::from_source(Source::open(path)?, wanted, limit)
    }

    /// Like [`open`](Self::open), of a file that was opened already.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn from_source(source: Source, wanted: RequiredColumns, limit: Option<u64>) -> Result<Self, RecordError> {
        let kind = source.kind()?;
        let path = source.path().to_owned();
        let rows = match kind {
            FileKind::JsonLines => Rows::Lines(Lines::new(source.into_reader(limit))),
            FileKind::JsonArray => Rows::JsonValues(Box::new(JsonValues::new(source.into_reader(limit), true))),
            FileKind::JsonObjects => Rows::JsonValues(Box::new(JsonValues::new(source.into_reader(limit), false))),
            FileKind::Delimited(delimiter) => {
                let file = CsvRows::new(source.into_reader(limit), delimiter);
                Rows::Delimited(Box::new(file.map_err(|fault| csv_error(&path, kind, fault))?))
            }
            FileKind::Parquet => {
                let rows = Box::new(parquet::rows(&path, wanted)?);
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

    /// How the records are kept.
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Rows of CSV so far that were left out, as all their fields are empty.
    pub fn blank_rows(&self) -> u64 {
        self.blank + if let Rows::Delimited(file) = &self.rows { file.blank() } else { 0 }
    }

    /// The first record, before any is taken.
    pub fn first(&self) -> Option<&Record> {
        self.peeked.as_ref()
    }

    /// The next record; `None` behind the last, and behind an error.
    ///
    /// # Errors
    ///
    /// [`RecordError`]: what is wrong with the file, so that there is no next record. What is wrong with a record is found when
    /// it is parsed.
    pub fn next_record(&mut self) -> Result<Option<Record>, RecordError> {
        match self.peeked.take() {
            Some(record) => Ok(Some(record)),
            None => self.advance(),
        }
    }

    fn advance(&mut self) -> Result<Option<Record>, RecordError> {
        let result = self.read();
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
            Rows::JsonValues(values) => values.next(&mut json, MAX_RECORD_BYTES).map_err(|fault| match fault {
                json_values::JsonSplitError::Io(error) => RecordError::io(path, &error),
                json_values::JsonSplitError::TooLong(place) => too_long(path, kind, place),
                json_values::JsonSplitError::At(place, problem) => RecordError::at(path, place, problem, None),
            })?,
            Rows::Delimited(file) => {
                let row = file.next(&mut json, MAX_RECORD_BYTES).map_err(|fault| csv_error(path, kind, fault))?;
                row.map(FilePosition::line)
            }
            Rows::Parquet { rows, row, left } => {
                *row += 1;
                match rows.next().transpose()? {
                    // Whole records only.
                    Some(text) if text.len() as u64 <= *left => {
                        *left -= text.len() as u64;
                        if text.len() > MAX_RECORD_BYTES {
                            return Err(too_long(path, kind, FilePosition::line(*row)));
                        }
                        json = text.into_bytes();
                        Some(FilePosition::line(*row))
                    }
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
        FileKind::JsonLines => Some("a record is a line of JSONL"),
        FileKind::JsonArray | FileKind::JsonObjects => {
            Some("records are the elements of an array, or stand one in each line of JSONL, not within another object")
        }
        FileKind::Delimited(_) => Some("perhaps a quotation mark is not closed"),
        FileKind::Parquet => None,
    };
    RecordError::at(path, place, problem, hint)
}

fn csv_error(path: &Path, kind: FileKind, fault: csv::CsvError) -> RecordError {
    match fault {
        csv::CsvError::Io(error) => RecordError::io(path, &error),
        csv::CsvError::TooLong(line) => too_long(path, kind, FilePosition::line(line)),
        csv::CsvError::At(line, problem, hint) => RecordError::at(path, FilePosition::line(line), problem, hint),
    }
}

/// Fields that records of all kinds are read by.
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
/// Names under which files keep the list of their records.
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

/// What is wrong with a file whose first record holds all the others, and what to do.
fn detect_wrapped_records(json: &[u8]) -> Option<(String, String)> {
    let Value::Object(record) = parse(json).ok()?.value else { return None };
    if let Some(problem) = detect_columns(&record) {
        return Some((problem, "write it by `to_json(path, orient=\"records\", lines=True)`".into()));
    }
    if record.keys().any(|key| RECORD_FIELDS.contains(&key.as_str())) {
        return None;
    }
    let (name, first) = record.iter().find_map(|(name, value)| match value {
        Value::Array(list) if LIST_FIELDS.contains(&name.as_str()) => Some((name, list.first()?.as_object()?)),
        _ => None,
    })?;
    // The Hub's viewer answers with rows that are wrapped once more.
    let within = if first.contains_key("row") && first.contains_key("row_idx") { ".row" } else { "" };
    let problem = format!("its records are a list within an object, under `{}`", Printable(name));
    Some((problem, format!("write the list alone: `jq -c '.{name}[]{within}' FILE > records.jsonl`")))
}

/// Whether the file is one object of columns, as pandas' `to_json` writes a table: `{"text": {"0": "...", "1": "..."}}`.
fn detect_columns(record: &Map<String, Value>) -> Option<String> {
    let of_rows = |value: &Value| {
        value.as_object().is_some_and(|rows| !rows.is_empty() && rows.keys().all(|key| key.parse::<u64>().is_ok()))
    };
    let all = !record.is_empty() && record.values().all(of_rows);
    all.then(|| "it holds columns, not records: each value is an object with the numbers of rows".into())
}
