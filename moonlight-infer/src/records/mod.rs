//! Records from data set files: JSON Lines, JSON arrays, CSV and parquet, compressed or not.
//!
//! Training, `score` and `eval` all read through this module, so that a file means the same everywhere. The kind of a file is
//! detected from its first bytes, then from the extension of its name. For a file that is not a data set, the error names what
//! it is.
//!
//! * `source.rs`: the bytes of a file, decompressed and without a byte order mark.
//! * `file_kind.rs`: detects the kind of a file.
//! * `lines.rs`, `json_values.rs`, `csv.rs`: split a file into records, with one record in memory at a time.
//! * `json_nesting.rs`: tracks the nesting of brackets in JSON.
//! * `reader.rs`: one reader for all kinds.
//! * `json.rs`: parses a record as Python's `json` does.

mod csv;
mod error;
mod file_kind;
mod json;
mod json_nesting;
mod json_values;
mod lines;
mod reader;
mod source;

pub use error::{FilePosition, RecordError};
pub use file_kind::{FileKind, extension};
pub use json::{
    JsonError, MAX_VALUES, ParsedJson, TokensRecord, large_integer_digits, lone_surrogates, non_finite_from_json,
    non_finite_to_json, parse, parse_tokens,
};
pub use reader::{Record, RecordReader};
pub use source::Source;

/// The limit of a record in bytes: of a line, an element of an array, or a row as JSON.
pub const MAX_RECORD_BYTES: usize = 256 << 20;

#[cfg(test)]
mod tests;
