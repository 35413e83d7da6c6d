//! Errors of files of records.

use std::fmt;
use std::path::{Path, PathBuf};

use moonlight_convert::Printable;

use crate::parquet::ParquetError;

/// A line and column of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FilePosition {
    /// The line, from 1; in a parquet file the row.
    pub line: usize,
    /// The column in characters, from 1; 0 for the whole line.
    pub column: usize,
}

impl FilePosition {
    /// The position of a whole line.
    pub fn line(line: usize) -> Self {
        Self { line, column: 0 }
    }

    /// The position in the file that is `(line, column)` within a record that starts at `self`; both count from 1.
    pub fn within(self, (line, column): (usize, usize)) -> Self {
        match line {
            0 | 1 => Self { line: self.line, column: self.column.max(1) + column.max(1) - 1 },
            _ => Self { line: self.line + line - 1, column },
        }
    }
}

/// `3`, or `3:17` with a column.
impl fmt::Display for FilePosition {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.column {
            0 => write!(formatter, "{}", self.line),
            column => write!(formatter, "{}:{column}", self.line),
        }
    }
}

/// Why the records of a file cannot be read. A single broken record is a [`JsonError`](super::JsonError) of its parser
/// instead, and may be skipped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// A file that cannot be opened or read, or is not a file of records.
    #[error("cannot read `{}`: {}", Printable(path.display()), Printable(problem))]
    File {
        /// The file.
        path: PathBuf,
        /// The rest of the sentence.
        problem: String,
        /// What to do, if it is known.
        hint: Option<String>,
    },
    /// A position after which the file cannot be split into records.
    #[error("{}:{place}: {}", Printable(path.display()), Printable(problem))]
    Record {
        /// The file.
        path: PathBuf,
        /// The position.
        place: FilePosition,
        /// The sentence.
        problem: String,
        /// What to do, if it is known.
        hint: Option<String>,
    },
    /// A parquet file or row.
    #[error(transparent)]
    Parquet(#[from] ParquetError),
}

impl RecordError {
    /// What to do, if it is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::File { hint, .. } | Self::Record { hint, .. } => hint.clone(),
            Self::Parquet(error) => error.hint(),
        }
    }

    pub(super) fn io(path: &Path, error: &std::io::Error) -> Self {
        Self::File { path: path.to_owned(), problem: error.to_string(), hint: None }
    }

    pub(super) fn file(path: &Path, problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), problem: problem.into(), hint: Some(hint.into()) }
    }

    pub(super) fn at(path: &Path, place: FilePosition, problem: impl Into<String>, hint: Option<&str>) -> Self {
        Self::Record { path: path.to_owned(), place, problem: problem.into(), hint: hint.map(Into::into) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::tests::render;
    use crate::records::JsonError;

    #[test]
    fn messages_of_record_errors() {
        let errors = [
            RecordError::File {
                path: "data.jsonl".into(),
                problem: "it is a zip archive (like xlsx, npz and torch files)".into(),
                hint: Some("unpack it, and name the files in it".into()),
            },
            RecordError::Record {
                path: "data.json".into(),
                place: FilePosition { line: 3, column: 1 },
                problem: "the array is not closed: the file ends too early".into(),
                hint: None,
            },
            RecordError::Parquet(ParquetError::file(
                Path::new("data.parquet"),
                "it has none of the columns `text`, `content`; it has `id`",
                None,
            )),
            RecordError::Parquet(ParquetError::Row {
                path: "data.parquet".into(),
                row: 2,
                problem: "its text is not UTF-8: byte 4 is invalid".into(),
            }),
        ];
        // A new variant does not compile here: add an example of it above.
        let is_covered = |error: &RecordError| match error {
            RecordError::File { .. } | RecordError::Record { .. } => true,
            RecordError::Parquet(ParquetError::File { .. } | ParquetError::Row { .. }) => true,
        };
        assert!(errors.iter().all(is_covered));
        insta::assert_snapshot!(render(errors.iter().map(|error| (error.to_string(), error.hint()))));
    }

    #[test]
    fn messages_of_json_errors() {
        let errors = [
            JsonError::NotUtf8 { byte: 15, at: (1, 15) },
            JsonError::NotJson { problem: "expected `,` or `}`".into(), at: (1, 42) },
            JsonError::Shape { problem: "missing field `tokens`".into(), at: None },
            JsonError::TooManyValues,
        ];
        let is_covered = |error: &JsonError| match error {
            JsonError::NotUtf8 { .. }
            | JsonError::NotJson { .. }
            | JsonError::Shape { .. }
            | JsonError::TooManyValues => true,
        };
        assert!(errors.iter().all(is_covered));
        insta::assert_snapshot!(render(errors.iter().map(|error| (error.to_string(), error.hint()))));
    }
}
