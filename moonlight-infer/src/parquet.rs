//! Rows of parquet files as lines of JSON.
//!
//! Hugging Face keeps data sets in parquet: a column for each key of a record, lists of structs for `messages`. A row
//! becomes the JSON of that record and goes the way of all [records](crate::records); where a line has a number a row has its
//! own, from 1.
//! Built in by the cargo feature `parquet`.

use std::path::{Path, PathBuf};

use moonlight_convert::Printable;

/// A parquet file, or a row of one, that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParquetError {
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
    /// A row.
    #[error("{}:{row}: the row cannot be read: {}", Printable(path.display()), Printable(problem))]
    Row {
        /// The file.
        path: PathBuf,
        /// The row, counted from 1.
        row: usize,
        /// What is wrong with it.
        problem: String,
    },
}

impl ParquetError {
    /// A file and what is wrong with it.
    pub fn file(path: &Path, problem: impl Into<String>, hint: Option<&str>) -> Self {
        Self::File { path: path.to_owned(), problem: problem.into(), hint: hint.map(Into::into) }
    }

    /// What to do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::File { hint, .. } => hint.clone(),
            Self::Row { .. } => None,
        }
    }
}

/// The file must have one of these columns; any will do if there are no names. All columns are read: what is of use among
/// them is known where records are.
pub type RequiredColumns = &'static [&'static str];

/// What a conversation is kept in, in each of its shapes.
pub const CONVERSATION_COLUMNS: RequiredColumns = &["messages", "conversations", "prompt", "instruction"];
/// What `format = "tokens"` reads.
pub const TOKEN_COLUMNS: RequiredColumns = &["tokens", "input_ids"];
/// What `format = "text"` reads.
pub const TEXT_COLUMNS: RequiredColumns = &["text", "content"];

/// Says that this build has no reader.
///
/// # Errors
///
/// Always.
#[cfg(not(feature = "parquet"))]
pub fn rows(
    path: &Path,
    _wanted: RequiredColumns,
) -> Result<impl Iterator<Item = Result<String, ParquetError>> + use<>, ParquetError> {
    let hint = "build with `--features parquet`, or write the rows as JSONL";
    Err::<std::iter::Empty<_>, _>(ParquetError::file(path, "this build reads no parquet files", Some(hint)))
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

    /// The rows of a file, each as a JSON object. Behind the first that cannot be read there is none.
    ///
    /// # Errors
    ///
    /// A file that is no whole parquet file, or has none of the columns; for a row, what the reader says of it.
    pub fn rows(
        path: &Path,
        wanted: RequiredColumns,
    ) -> Result<impl Iterator<Item = Result<String, ParquetError>> + use<>, ParquetError> {
        let file = File::open(path).map_err(|error| ParquetError::file(path, error.to_string(), None))?;
        let file =
            guarded(|| SerializedFileReader::new(file)).map_err(|problem| ParquetError::file(path, problem, None))?;
        let schema = file.metadata().file_metadata().schema_descr_ptr();
        check(path, &schema, wanted)?;
        Ok(Rows { path: path.to_owned(), file, schema, group: 0, rows: None, row: 0, broken: false })
    }

    /// What the parquet crate says, without what it says before it.
    fn said(error: ReaderError) -> String {
        let text = match error {
            ReaderError::General(text) | ReaderError::EOF(text) | ReaderError::NYI(text) => text,
            error => error.to_string(),
        };
        text.lines().next().unwrap_or_default().to_owned()
    }

    /// Whether a file has one of the columns.
    fn check(path: &Path, schema: &SchemaDescPtr, wanted: RequiredColumns) -> Result<(), ParquetError> {
        let columns = schema.root_schema().get_fields();
        if wanted.is_empty() || columns.iter().any(|column| wanted.contains(&column.name())) {
            return Ok(());
        }
        let quoted = |names: &mut dyn Iterator<Item = &str>| {
            names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
        };
        let missing = quoted(&mut wanted.iter().copied());
        let present = quoted(&mut columns.iter().map(|column| column.name()));
        Err(ParquetError::file(path, format!("it has none of the columns {missing}; it has {present}"), None))
    }

    /// What a read comes to. The parquet crate's record reader takes a file's word for much and panics where it was broken:
    /// that is an error of the file here, and nothing that is shown.
    fn guarded<T>(read: impl FnOnce() -> Result<T, ReaderError>) -> Result<T, String> {
        match catch_panic(read) {
            Some(read) => read.map_err(said),
            None => Err("the file is damaged, or of a form that is not known".into()),
        }
    }

    struct Rows {
        path: std::path::PathBuf,
        file: SerializedFileReader<File>,
        schema: SchemaDescPtr,
        /// The next group of rows.
        group: usize,
        /// What is left of the last one.
        rows: Option<ReaderIter>,
        /// Rows so far.
        row: usize,
        broken: bool,
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
            if self.broken {
                return None;
            }
            let row = guarded(|| self.advance().transpose()).transpose()?;
            self.row += 1;
            let object = row.and_then(|row| Ok(Value::Object(object(row)?).to_string()));
            self.broken = object.is_err();
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

    /// A field as JSON: bytes are text, times the numbers that they are kept as; a decimal is the text of its digits.
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
            // As JSON writes it: with as few digits as tell it from other numbers of 32 bits.
            Field::Float(value) if value.is_finite() => value.into(),
            Field::Float(value) => number(value.into()),
            Field::Double(value) => number(value),
            Field::Str(text) => text.into(),
            Field::Bytes(bytes) => {
                let text = std::str::from_utf8(bytes.data());
                text.map_err(|error| format!("its text is not UTF-8: byte {} is wrong", error.valid_up_to() + 1))?
                    .into()
            }
            Field::Group(row) => Value::Object(object(row)?),
            Field::ListInternal(list) => {
                Value::Array(list.elements().iter().cloned().map(value).collect::<Result<_, _>>()?)
            }
            Field::MapInternal(map) => {
                let entry = |(key, of_key): &(Field, Field)| {
                    let key = match value(key.clone())? {
                        Value::String(key) => key,
                        key => key.to_string(),
                    };
                    Ok((key, value(of_key.clone())?))
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

    fn read(path: &Path, wanted: RequiredColumns) -> Result<Vec<Value>, ParquetError> {
        rows(path, wanted)?.map(|row| Ok(serde_json::from_str(&row?).unwrap())).collect()
    }

    /// What pyarrow reads, as far as the columns are `wanted`.
    fn expected(name: &str, wanted: &[&str]) -> Vec<Value> {
        let lines = fs::read_to_string(fixture(name).with_extension("jsonl")).unwrap();
        let row = |line| {
            let mut row: Value = serde_json::from_str(line).unwrap();
            row.as_object_mut().unwrap().retain(|key, _| wanted.is_empty() || wanted.contains(&key.as_str()));
            row
        };
        lines.lines().map(row).collect()
    }

    #[test]
    fn rows_are_those_of_pyarrow() {
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
    fn all_columns_are_read_of_a_file_that_has_one_of_those_wanted() {
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

    /// A file with any of its bytes wrong, or without its end, is an error or other rows, and never the end of the program.
    #[test]
    fn damaged_files_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("damaged.parquet");
        for name in ["messages-snappy.parquet", "sharegpt-zstd.parquet", "bad-records.parquet"] {
            let whole = fs::read(fixture(name)).unwrap();
            for length in [0, 3, 8, whole.len() / 2, whole.len() - 1] {
                fs::write(&path, &whole[..length]).unwrap();
                let error = read(&path, CONVERSATION_COLUMNS).unwrap_err();
                assert!(matches!(error, ParquetError::File { .. }), "{length}: {error}");
                assert!(!error.to_string().contains('\n'), "{error}");
            }
            let mut wrong = 0;
            let places = (0..whole.len()).step_by(3);
            for (at, flip) in places.clone().zip([0x01, 0x80, 0xFF].into_iter().cycle()) {
                let mut bytes = whole.clone();
                bytes[at] ^= flip;
                fs::write(&path, &bytes).unwrap();
                wrong += usize::from(read(&path, CONVERSATION_COLUMNS).is_err());
            }
            assert!(wrong > places.len() / 10, "{name}: {wrong} of {} were noticed", places.len());
        }
    }
}
