//! What can be wrong with files of records.

use std::fmt;
use std::path::{Path, PathBuf};

use moonlight_convert::Printable;

use crate::parquet::ParquetError;

/// Where in a file something is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FilePosition {
    /// The line, from 1; in a parquet file the row.
    pub line: usize,
    /// The character in the line, from 1; 0 where the line says enough.
    pub column: usize,
}

impl FilePosition {
    /// A whole line.
    pub fn line(line: usize) -> Self {
        Self { line, column: 0 }
    }

    /// The place in the file of what is at `(line, column)` of a record that begins here, both from 1.
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

/// A file of records that cannot be read, whatever is done about single broken records.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The file.
    #[error("cannot read `{}`: {}", Printable(path.display()), Printable(problem))]
    File {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do, where we know.
        hint: Option<String>,
    },
    /// A place in the file, behind which the records cannot be told apart.
    #[error("{}:{place}: {}", Printable(path.display()), Printable(problem))]
    Record {
        /// The file.
        path: PathBuf,
        /// The place.
        place: FilePosition,
        /// What is wrong there.
        problem: String,
        /// What to do, where we know.
        hint: Option<String>,
    },
    /// A parquet file.
    #[error(transparent)]
    Parquet(#[from] ParquetError),
}

impl RecordError {
    /// What to do about it, where we know.
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
