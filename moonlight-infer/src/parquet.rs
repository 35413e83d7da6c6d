//! Rows of parquet files as JSON.
//!
//! The Hub stores data sets as parquet, with a column for each key of a record, and lists of structs for `messages`. A row
//! becomes the JSON of a [record](crate::records), whose line number is that of the row, from 1.
//!
//! Reading requires the cargo feature `parquet`.

use std::path::{Path, PathBuf};

use moonlight_convert::Printable;

/// A parquet file or row that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParquetError {
    /// A file that cannot be opened, or does not have the columns.
    #[error("cannot read `{}`: {}", Printable(path.display()), Printable(problem))]
    File {
        /// The file.
        path: PathBuf,
        /// The rest of the sentence.
        problem: String,
        /// What to do, if it is known.
        hint: Option<String>,
    },
    /// A row that cannot be decoded.
    #[error("{}:{row}: the row cannot be read: {}", Printable(path.display()), Printable(problem))]
    Row {
        /// The file.
        path: PathBuf,
        /// The row, from 1.
        row: usize,
        /// The rest of the sentence.
        problem: String,
    },
}

impl ParquetError {
    /// A [`File`](Self::File) error.
    pub fn file(path: &Path, problem: impl Into<String>, hint: Option<&str>) -> Self {
        Self::File { path: path.to_owned(), problem: problem.into(), hint: hint.map(Into::into) }
    }

    /// What to do, if it is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::File { hint, .. } => hint.clone(),
            Self::Row { .. } => None,
        }
    }
}

/// A file must have at least one of these columns; an empty list requires none. All columns of the file are read, whatever the
/// list: the parser of the records decides which of them it uses.
pub type RequiredColumns = &'static [&'static str];

/// The columns of conversations, one for each [format](crate::chat::ConversationFormat).
pub const CONVERSATION_COLUMNS: RequiredColumns = &["messages", "conversations", "prompt", "instruction"];
/// The columns that `format = "tokens"` reads.
pub const TOKEN_COLUMNS: RequiredColumns = &["tokens", "input_ids"];
/// The columns that `format = "text"` reads.
pub const TEXT_COLUMNS: RequiredColumns = &["text", "content"];

/// The reader of a build without the feature `parquet`.
///
/// # Errors
///
/// Always.
#[cfg(not(feature = "parquet"))]
pub fn rows(
    path: &Path,
    _required: RequiredColumns,
) -> Result<impl Iterator<Item = Result<String, ParquetError>> + use<>, ParquetError> {
    let hint = "build with `--features parquet`, or write the rows as JSON Lines";
    Err::<std::iter::Empty<_>, _>(ParquetError::file(path, "this build does not read parquet files", Some(hint)))
}

#[cfg(feature = "parquet")]
pub use reader::rows;

#[cfg(feature = "parquet")]
mod reader {
    use std::fs::File;

    use parquet::errors::ParquetError as ReaderError;
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::reader::{ReaderIter, TreeBuilder};
    use parquet::record::{Field, Row};
    use parquet::schema::types::SchemaDescPtr;
    use serde_json::{Map, Value};

    use super::*;
    use crate::catch_panic::catch_panic;
    use crate::records::non_finite_to_json;

    /// The rows of a file, each as a JSON object. The iterator ends after the first row that cannot be read.
    ///
    /// # Errors
    ///
    /// A file that is not a complete parquet file, or that has none of the columns. The iterator yields an error in place of a
    /// row that cannot be decoded.
    pub fn rows(
        path: &Path,
        required: RequiredColumns,
    ) -> Result<impl Iterator<Item = Result<String, ParquetError>> + use<>, ParquetError> {
        let file = File::open(path).map_err(|error| ParquetError::file(path, error.to_string(), None))?;
        let file = without_panic(|| SerializedFileReader::new(file))
            .map_err(|problem| ParquetError::file(path, problem, None))?;
        let schema = file.metadata().file_metadata().schema_descr_ptr();
        check_columns(path, &schema, required)?;
        Ok(Rows { path: path.to_owned(), file, schema, group: 0, rows: None, row: 0, failed: false })
    }

    /// The message of the parquet crate without its prefix, up to the first line break.
    fn message(error: ReaderError) -> String {
        let text = match error {
            ReaderError::General(text) | ReaderError::EOF(text) | ReaderError::NYI(text) => text,
            error => error.to_string(),
        };
        text.lines().next().unwrap_or_default().to_owned()
    }

    fn check_columns(path: &Path, schema: &SchemaDescPtr, required: RequiredColumns) -> Result<(), ParquetError> {
        let columns = schema.root_schema().get_fields();
        if required.is_empty() || columns.iter().any(|column| required.contains(&column.name())) {
            return Ok(());
        }
        let quoted = |names: &mut dyn Iterator<Item = &str>| {
            names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
        };
        let missing = quoted(&mut required.iter().copied());
        let present = quoted(&mut columns.iter().map(|column| column.name()));
        Err(ParquetError::file(path, format!("it has none of the columns {missing}; it has {present}"), None))
    }

    /// Calls the parquet crate, whose record reader does not validate all of a file's metadata and panics if it is wrong.
    fn without_panic<T>(read: impl FnOnce() -> Result<T, ReaderError>) -> Result<T, String> {
        match catch_panic(read) {
            Some(read) => read.map_err(message),
            None => Err("the file is damaged or has an unknown layout".into()),
        }
    }

    struct Rows {
        path: std::path::PathBuf,
        file: SerializedFileReader<File>,
        schema: SchemaDescPtr,
        /// The index of the next row group.
        group: usize,
        /// The remaining rows of the current row group.
        rows: Option<ReaderIter>,
        /// The number of rows that were read.
        row: usize,
        failed: bool,
    }

    impl Rows {
        fn advance(&mut self) -> Option<Result<Row, ReaderError>> {
            loop {
                if let Some(row) = self.rows.as_mut().and_then(Iterator::next) {
                    return Some(row);
                }
                if self.group == self.file.num_row_groups() {
                    return None;
                }
                let group = self.file.get_row_group(self.group);
                let rows = group.and_then(|group| TreeBuilder::new().as_iter(self.schema.clone(), &*group));
                self.group += 1;
                match rows {
                    Ok(rows) => self.rows = Some(rows),
                    Err(error) => return Some(Err(error)),
                }
            }
        }
    }

    impl Iterator for Rows {
        type Item = Result<String, ParquetError>;

        fn next(&mut self) -> Option<Self::Item> {
            // The reader may be in any state after a panic, so it is not used again after an error.
            if self.failed {
                return None;
            }
            let row = without_panic(|| self.advance().transpose()).transpose()?;
            self.row += 1;
            let object = row.and_then(|row| Ok(Value::Object(object(row)?).to_string()));
            self.failed = object.is_err();
            let (path, row) = (&self.path, self.row);
            Some(object.map_err(|problem| ParquetError::Row { path: path.clone(), row, problem }))
        }
    }

    fn object(row: Row) -> Result<Map<String, Value>, String> {
        row.into_columns().into_iter().map(|(name, field)| Ok((name, value(field)?))).collect()
    }

    fn number(value: f64) -> Value {
        if value.is_finite() { value.into() } else { non_finite_to_json(value) }
    }

    /// A field as JSON. Bytes must be UTF-8 text, times become the numbers that the file stores, and a decimal becomes the
    /// string of its digits.
    fn value(field: Field) -> Result<Value, String> {
        Ok(match field {
            Field::Null => Value::Null,
            field @ Field::Decimal(_) => field.to_string().into(),
            Field::Bool(value) => value.into(),
            Field::Byte(value) => value.into(),
            Field::Short(value) => value.into(),
            Field::Int(value) | Field::Date(value) | Field::TimeMillis(value) => value.into(),
            Field::Long(value)
            | Field::TimeMicros(value)
            | Field::TimestampMillis(value)
            | Field::TimestampMicros(value) => value.into(),
            Field::UByte(value) => value.into(),
            Field::UShort(value) => value.into(),
            Field::UInt(value) => value.into(),
            Field::ULong(value) => value.into(),
            Field::Float16(value) => number(value.to_f64()),
            // An f32 is not converted to f64, so that JSON has its shortest digits (0.1, not 0.10000000149011612).
            Field::Float(value) if value.is_finite() => value.into(),
            Field::Float(value) => number(value.into()),
            Field::Double(value) => number(value),
            Field::Str(text) => text.into(),
            Field::Bytes(bytes) => {
                let text = std::str::from_utf8(bytes.data());
                text.map_err(|error| format!("its text is not UTF-8: byte {} is invalid", error.valid_up_to() + 1))?
                    .into()
            }
            Field::Group(row) => Value::Object(object(row)?),
            Field::ListInternal(list) => {
                Value::Array(list.elements().iter().cloned().map(value).collect::<Result<_, _>>()?)
            }
            Field::MapInternal(map) => {
                let entry = |(key, item): &(Field, Field)| {
                    let key = match value(key.clone())? {
                        Value::String(key) => key,
                        key => key.to_string(),
                    };
                    Ok((key, value(item.clone())?))
                };
                Value::Object(map.entries().iter().map(entry).collect::<Result<_, String>>()?)
            }
        })
    }
}

#[cfg(all(test, feature = "parquet"))]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use serde_json::Value;

    use super::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/parquet").join(name)
    }

    fn read(path: &Path, required: RequiredColumns) -> Result<Vec<Value>, ParquetError> {
        rows(path, required)?.map(|row| Ok(serde_json::from_str(&row?).unwrap())).collect()
    }

    /// The rows that pyarrow reads, with the `selected` columns or all.
    fn expected(name: &str, selected: &[&str]) -> Vec<Value> {
        let lines = fs::read_to_string(fixture(name).with_extension("jsonl")).unwrap();
        let row = |line| {
            let mut row: Value = serde_json::from_str(line).unwrap();
            row.as_object_mut().unwrap().retain(|key, _| selected.is_empty() || selected.contains(&key.as_str()));
            row
        };
        lines.lines().map(row).collect()
    }

    #[test]
    fn rows_are_equal_to_those_of_pyarrow() {
        for name in ["awkward", "messages-snappy", "sharegpt-zstd", "alpaca-gzip", "bad-records", "text"] {
            let name = format!("{name}.parquet");
            let rows = read(&fixture(&name), &[]).unwrap();
            let expected = expected(&name, &[]);
            assert_eq!(rows.len(), expected.len(), "{name}");
            for (number, (row, expected)) in rows.iter().zip(&expected).enumerate() {
                assert_eq!(row, expected, "{name}: row {}", number + 1);
            }
        }
    }

    #[test]
    fn all_columns_of_a_file_with_a_required_one_are_read() {
        for name in ["messages-snappy.parquet", "sharegpt-zstd.parquet", "alpaca-gzip.parquet"] {
            assert_eq!(read(&fixture(name), CONVERSATION_COLUMNS).unwrap(), expected(name, &[]), "{name}");
        }
        assert_eq!(read(&fixture("text.parquet"), TEXT_COLUMNS).unwrap(), expected("text.parquet", &[]));
        let error = read(&fixture("text.parquet"), CONVERSATION_COLUMNS).unwrap_err().to_string();
        let lacks =
            "it has none of the columns `messages`, `conversations`, `prompt`, `instruction`; it has `id`, `text`";
        assert!(error.ends_with(lacks), "{error}");
        let error = read(&fixture("text.parquet"), TOKEN_COLUMNS).unwrap_err().to_string();
        assert!(error.ends_with("it has none of the columns `tokens`, `input_ids`; it has `id`, `text`"), "{error}");
    }

    /// A truncated file, or one with a changed byte, is an error or has different rows. It never ends the program.
    #[test]
    fn damaged_files_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("damaged.parquet");
        for name in ["messages-snappy.parquet", "sharegpt-zstd.parquet", "bad-records.parquet"] {
            let intact = fs::read(fixture(name)).unwrap();
            for length in [0, 3, 8, intact.len() / 2, intact.len() - 1] {
                fs::write(&path, &intact[..length]).unwrap();
                let error = read(&path, CONVERSATION_COLUMNS).unwrap_err();
                assert!(matches!(error, ParquetError::File { .. }), "{length}: {error}");
                assert!(!error.to_string().contains('\n'), "{error}");
            }
            let mut errors = 0;
            let positions = (0..intact.len()).step_by(3);
            for (at, flip) in positions.clone().zip([0x01, 0x80, 0xFF].into_iter().cycle()) {
                let mut bytes = intact.clone();
                bytes[at] ^= flip;
                fs::write(&path, &bytes).unwrap();
                errors += usize::from(read(&path, CONVERSATION_COLUMNS).is_err());
            }
            assert!(errors > positions.len() / 10, "{name}: {errors} of {} were noticed", positions.len());
        }
    }
}
