//! One reader of all kinds of files.

use std::path::{Path, PathBuf};

use moonlight_convert::Printable;
use serde_json::{Map, Value};

use super::delimited::{self, Delimited};
use super::lines::{Lines, TooLong};
use super::source::Limited;
use super::values::{self, Values};
use super::{FileKind, LONGEST_RECORD, Place, RecordError, Source, parse};
use crate::parquet::{self, ParquetError, Wanted};

/// A record of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its JSON: of a line or an element as the file has it, of a row made from it.
    pub json: Vec<u8>,
    /// Where it begins.
    pub place: Place,
}

/// The records of a file, one after the other.
pub struct RecordReader {
    path: PathBuf,
    kind: FileKind,
    rows: Rows,
    /// What was read to look at it.
    ahead: Option<Record>,
    /// Blank rows of a file that is read.
    blank: u64,
}

enum Rows {
    Lines(Lines),
    Values(Box<Values<Limited>>),
    Delimited(Box<Delimited<Limited>>),
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
    pub fn open(path: &Path, wanted: Wanted, limit: Option<u64>) -> Result<Self, RecordError> {
        Self::of(Source::open(path)?, wanted, limit)
    }

    /// Like [`open`](Self::open), of a file that was opened already.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn of(source: Source, wanted: Wanted, limit: Option<u64>) -> Result<Self, RecordError> {
        let kind = source.kind()?;
        let path = source.path().to_owned();
        let rows = match kind {
            FileKind::JsonLines => Rows::Lines(Lines::new(source.into_reader(limit))),
            FileKind::JsonArray => Rows::Values(Box::new(Values::new(source.into_reader(limit), true))),
            FileKind::JsonObjects => Rows::Values(Box::new(Values::new(source.into_reader(limit), false))),
            FileKind::Delimited(delimiter) => {
                let file = Delimited::new(source.into_reader(limit), delimiter);
                Rows::Delimited(Box::new(file.map_err(|fault| of_row(&path, kind, fault))?))
            }
            FileKind::Parquet => {
                let rows = Box::new(parquet::rows(&path, wanted)?);
                Rows::Parquet { rows, row: 0, left: limit.unwrap_or(u64::MAX) }
            }
        };
        let mut reader = Self { path, kind, rows, ahead: None, blank: 0 };
        reader.ahead = reader.advance()?;
        let is_json = matches!(kind, FileKind::JsonLines | FileKind::JsonArray | FileKind::JsonObjects);
        match reader.ahead.as_ref().filter(|_| is_json).and_then(|record| wrapped(&record.json)) {
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
        self.ahead.as_ref()
    }

    /// The next record; `None` behind the last, and behind an error.
    ///
    /// # Errors
    ///
    /// [`RecordError`]: what is wrong with the file, so that there is no next record. What is wrong with a record is found when
    /// it is parsed.
    pub fn next_record(&mut self) -> Result<Option<Record>, RecordError> {
        match self.ahead.take() {
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
                let read = lines.next(&mut json, LONGEST_RECORD).map_err(|error| RecordError::io(path, &error))?;
                let found = read.map_err(|TooLong| too_long(path, kind, Place::line(lines.line())))?;
                found.then(|| Place::line(lines.line()))
            }
            Rows::Values(values) => values.next(&mut json, LONGEST_RECORD).map_err(|fault| match fault {
                values::Fault::Io(error) => RecordError::io(path, &error),
                values::Fault::TooLong(place) => too_long(path, kind, place),
                values::Fault::At(place, problem) => RecordError::at(path, place, problem, None),
            })?,
            Rows::Delimited(file) => {
                let row = file.next(&mut json, LONGEST_RECORD).map_err(|fault| of_row(path, kind, fault))?;
                row.map(Place::line)
            }
            Rows::Parquet { rows, row, left } => {
                *row += 1;
                match rows.next().transpose()? {
                    // Whole records only.
                    Some(text) if text.len() as u64 <= *left => {
                        *left -= text.len() as u64;
                        if text.len() > LONGEST_RECORD {
                            return Err(too_long(path, kind, Place::line(*row)));
                        }
                        json = text.into_bytes();
                        Some(Place::line(*row))
                    }
                    _ => None,
                }
            }
        };
        Ok(place.map(|place| Record { json, place }))
    }
}

fn too_long(path: &Path, kind: FileKind, place: Place) -> RecordError {
    let problem = format!("the record is longer than {} MiB", LONGEST_RECORD >> 20);
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

fn of_row(path: &Path, kind: FileKind, fault: delimited::Fault) -> RecordError {
    match fault {
        delimited::Fault::Io(error) => RecordError::io(path, &error),
        delimited::Fault::TooLong(line) => too_long(path, kind, Place::line(line)),
        delimited::Fault::At(line, problem, hint) => RecordError::at(path, Place::line(line), problem, hint),
    }
}

/// Fields that records of all kinds are read by.
const OF_RECORDS: &[&str] = &[
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
const OF_LISTS: &[&str] = &[
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
fn wrapped(json: &[u8]) -> Option<(String, String)> {
    let Value::Object(record) = parse(json).ok()?.value else { return None };
    if let Some(problem) = by_columns(&record) {
        return Some((problem, "write it by `to_json(path, orient=\"records\", lines=True)`".into()));
    }
    if record.keys().any(|key| OF_RECORDS.contains(&key.as_str())) {
        return None;
    }
    let (name, first) = record.iter().find_map(|(name, value)| match value {
        Value::Array(list) if OF_LISTS.contains(&name.as_str()) => Some((name, list.first()?.as_object()?)),
        _ => None,
    })?;
    // The Hub's viewer answers with rows that are wrapped once more.
    let within = if first.contains_key("row") && first.contains_key("row_idx") { ".row" } else { "" };
    let problem = format!("its records are a list within an object, under `{}`", Printable(name));
    Some((problem, format!("write the list alone: `jq -c '.{name}[]{within}' FILE > records.jsonl`")))
}

/// Whether the file is one object of columns, as pandas' `to_json` writes a table: `{"text": {"0": "...", "1": "..."}}`.
fn by_columns(record: &Map<String, Value>) -> Option<String> {
    let of_rows = |value: &Value| {
        value.as_object().is_some_and(|rows| !rows.is_empty() && rows.keys().all(|key| key.parse::<u64>().is_ok()))
    };
    let all = !record.is_empty() && record.values().all(of_rows);
    all.then(|| "it holds columns, not records: each value is an object with the numbers of rows".into())
}
