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

mod delimited;
mod error;
mod lines;
mod nesting;
mod parse;
mod reader;
mod sniff;
mod source;
mod values;

pub use error::{Place, RecordError};
pub use parse::{
    JsonError, MOST_VALUES, Parsed, TokensRecord, large_integer, lone_surrogates, non_finite, not_finite, parse,
    parse_tokens,
};
pub use reader::{Record, RecordReader};
pub use sniff::{FileKind, ending};
pub use source::Source;

/// The longest record in bytes: a line, an element of an array, a row.
pub const LONGEST_RECORD: usize = 256 << 20;

#[cfg(test)]
mod tests;
