//! Records of files as people have them: JSON Lines, JSON arrays, CSV, parquet, compressed or not.
//!
//! Training, `score` and `eval` read through here, so that a file means the same everywhere. What a file is its first
//! bytes say, then the ending of its name; what cannot be read is refused by what it is.
//!
//! * `source.rs`: the bytes of a file, decompressed, without a byte order mark.
//! * `sniff.rs`: which kind of file the bytes are.
//! * `lines.rs`, `values.rs`, `delimited.rs`: a file cut into records, in memory for one record.
//! * `nesting.rs`: brackets, counted.
//! * `reader.rs`: one reader of them all.
//! * `parse.rs`: a record to JSON.

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
pub use json::{
    JsonError, MAX_VALUES, ParsedJson, TokensRecord, large_integer_digits, lone_surrogates, non_finite_from_json, non_finite_to_json, parse,
    parse_tokens,
};
pub use reader::{Record, RecordReader};
pub use file_kind::{FileKind, extension};
pub use source::Source;

/// The longest record in bytes: a line, an element of an array, a row.
pub const MAX_RECORD_BYTES: usize = 256 << 20;

#[cfg(test)]
mod tests;
