//! CSV and TSV: a header with the names of the columns, then a record in each row.

use std::io;

use csv_core::ReadRecordResult;
use serde_json::{Value, json};

use super::MAX_RECORD_BYTES;
use super::json_values::Truncated;

/// Columns in which a value that starts with `[` or `{` is JSON.
const JSON_COLUMNS: &[&str] = &[
    "messages",
    "conversations",
    "conversation",
    "tools",
    "functions",
    "documents",
    "history",
    "tokens",
    "input_ids",
    "attention_mask",
    "choices",
    "endings",
    "chat_template_kwargs",
];
/// Columns with numbers or booleans.
const NUMBER_COLUMNS: &[&str] = &["weight", "loss_mask", "train", "training", "loss"];
/// Columns in which `true` and `false` label an answer as good or bad; other values are text.
const LABEL_COLUMNS: &[&str] = &["label", "kto_tag"];
/// The limit of columns in a row.
const MAX_COLUMNS: usize = 1 << 14;

/// Why the rest of a file cannot be split into rows.
#[derive(Debug)]
pub(super) enum CsvError {
    Io(io::Error),
    /// The row that starts in this line exceeds the limit of a record.
    TooLong(usize),
    /// The line in which a row starts, what is wrong with the row, and a hint.
    Row(usize, String, Option<&'static str>),
}

impl From<io::Error> for CsvError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The rows of a file.
pub(super) struct CsvRows<R> {
    reader: R,
    core: csv_core::Reader,
    names: Vec<String>,
    /// The number of the next line, from 1.
    line: usize,
    /// Rows that were skipped because all their fields are empty.
    blank: u64,
    /// The concatenated fields of a row.
    texts: Vec<u8>,
    /// The end of each field in `texts`.
    ends: Vec<usize>,
}

impl<R: Truncated> CsvRows<R> {
    /// Reads the header.
    pub(super) fn new(reader: R, delimiter: u8) -> Result<Self, CsvError> {
        let core = csv_core::ReaderBuilder::new().delimiter(delimiter).build();
        let (texts, ends) = (vec![0; 1 << 12], vec![0; 64]);
        let mut file = Self { reader, core, names: Vec::new(), line: 1, blank: 0, texts, ends };
        let Some((mut line, mut columns)) = file.row(MAX_RECORD_BYTES)? else { return Ok(file) };
        // Excel may write a line above the header that names the separator.
        if columns == 2 && file.text(line, 0)?.eq_ignore_ascii_case("sep=") && file.text(line, 1)?.is_empty() {
            let Some(row) = file.row(MAX_RECORD_BYTES)? else { return Ok(file) };
            (line, columns) = row;
        }
        for column in 0..columns {
            let name = file.text(line, column)?.to_owned();
            if file.names.contains(&name) {
                return Err(CsvError::Row(
                    line,
                    match name.as_str() {
                        "" => "two columns have no name".to_owned(),
                        name => format!("two columns have the name `{name}`"),
                    },
                    None,
                ));
            }
            file.names.push(name);
        }
        Ok(file)
    }

    /// The number of rows that were skipped because all their fields are empty.
    pub(super) fn blank(&self) -> u64 {
        self.blank
    }

    /// Writes the next row as JSON into `record`, and returns the line in which it starts. Rows whose fields are all empty are
    /// skipped like blank lines, because spreadsheets write such rows below a table.
    pub(super) fn next(&mut self, record: &mut Vec<u8>, max_bytes: usize) -> Result<Option<usize>, CsvError> {
        let (line, columns) = loop {
            let Some((line, columns)) = self.row(max_bytes)? else { return Ok(None) };
            // The fields are concatenated, so the end of the last one is the length of all.
            if columns > 0 && self.ends[columns - 1] > 0 {
                break (line, columns);
            }
            self.blank += 1;
        };
        if columns != self.names.len() {
            let problem = format!("the row has {columns} columns, and the header has {}", self.names.len());
            let hint = "put fields with a separator, a quotation mark or a line break into quotation marks";
            return Err(CsvError::Row(line, problem, Some(hint)));
        }
        record.clear();
        for column in 0..columns {
            let text = self.text(line, column)?;
            let name = &self.names[column];
            let value = value(name, text).map_err(|(problem, hint)| CsvError::Row(line, problem, hint))?;
            let (separator, name) = (if column == 0 { '{' } else { ',' }, Value::from(name.as_str()));
            record.extend_from_slice(format!("{separator}{name}:").as_bytes());
            record.extend_from_slice(value.as_bytes());
            if record.len() > max_bytes {
                return Err(CsvError::TooLong(line));
            }
        }
        record.push(b'}');
        Ok(Some(line))
    }

    fn text(&self, line: usize, column: usize) -> Result<&str, CsvError> {
        let start = column.checked_sub(1).map_or(0, |before| self.ends[before]);
        let text = &self.texts[start..self.ends[column]];
        std::str::from_utf8(text).map_err(|_| {
            let name = match self.names.get(column).map(String::as_str) {
                None => "the header".into(),
                Some("") => format!("column {}", column + 1),
                Some(name) => format!("column `{name}`"),
            };
            let problem = format!("{name} is not UTF-8");
            CsvError::Row(line, problem, Some("convert it to UTF-8 (for example `iconv -f WINDOWS-1252 -t UTF-8`)"))
        })
    }

    /// Reads a row into `texts` and `ends`. Returns the line in which it starts, and the number of its columns.
    fn row(&mut self, max_bytes: usize) -> Result<Option<(usize, usize)>, CsvError> {
        // Blank lines are skipped here rather than in `csv_core`, so that the line number of the row is known.
        while let Some(byte @ (b'\n' | b'\r')) = self.peek()? {
            self.line += usize::from(byte == b'\n');
            self.reader.consume(1);
        }
        let start = self.line;
        let (mut length, mut columns) = (0, 0);
        loop {
            let (result, consumed, written, ended) = {
                let bytes = match self.reader.fill_buf() {
                    Ok(bytes) => bytes,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(error.into()),
                };
                let end = bytes.is_empty();
                // A line break is appended to the file to end the last row. If a quotation mark is open, the line break is
                // part of a field, and the row remains incomplete.
                let bytes = if end { &b"\n"[..] } else { bytes };
                let (result, consumed, written, ended) =
                    self.core.read_record(bytes, &mut self.texts[length..], &mut self.ends[columns..]);
                if end && matches!(result, ReadRecordResult::InputEmpty) {
                    if self.reader.reached_limit() || length + columns + written == 0 {
                        return Ok(None);
                    }
                    let problem = "a quotation mark in this row is not closed before the end of the file";
                    return Err(CsvError::Row(start, problem.into(), None));
                }
                match end {
                    false => self.line += memchr::memchr_iter(b'\n', &bytes[..consumed]).count(),
                    true if self.reader.reached_limit() => return Ok(None),
                    true => {}
                }
                (result, if end { 0 } else { consumed }, written, ended)
            };
            self.reader.consume(consumed);
            length += written;
            columns += ended;
            match result {
                ReadRecordResult::InputEmpty => {}
                ReadRecordResult::OutputFull if self.texts.len() >= max_bytes => return Err(CsvError::TooLong(start)),
                ReadRecordResult::OutputFull => self.texts.resize((2 * self.texts.len()).min(max_bytes), 0),
                ReadRecordResult::OutputEndsFull if columns >= MAX_COLUMNS => {
                    return Err(CsvError::Row(start, format!("the row has more than {MAX_COLUMNS} columns"), None));
                }
                ReadRecordResult::OutputEndsFull => self.ends.resize(2 * self.ends.len(), 0),
                ReadRecordResult::Record => return Ok(Some((start, columns))),
                ReadRecordResult::End => return Ok(None),
            }
        }
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        loop {
            match self.reader.fill_buf() {
                Ok(bytes) => return Ok(bytes.first().copied()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The JSON of a field in the column `name`.
fn value(name: &str, text: &str) -> Result<String, (String, Option<&'static str>)> {
    let bare = text.trim();
    if LABEL_COLUMNS.contains(&name) && ["true", "false"].contains(&bare.to_ascii_lowercase().as_str()) {
        return Ok(bare.to_ascii_lowercase());
    }
    if NUMBER_COLUMNS.contains(&name) {
        return Ok(match bare {
            "" => "null".into(),
            // Python's spelling as well as JSON's: pandas writes `True`.
            "True" | "true" => "true".into(),
            "False" | "false" => "false".into(),
            _ => bare.parse::<f64>().map_or_else(|_| json!(text).to_string(), |number| json!(number).to_string()),
        });
    }
    if JSON_COLUMNS.contains(&name) {
        if bare.is_empty() {
            return Ok("null".into());
        }
        if bare.starts_with(['[', '{']) {
            return match super::json::parse(bare.as_bytes()) {
                Ok(_) => Ok(bare.into()),
                Err(error) => {
                    let hint = "write lists with `json.dumps`, not with Python's `str()`; or save the data as JSON Lines or \
                                parquet";
                    Err((format!("column `{name}` is not JSON: {}", error.problem()), Some(hint)))
                }
            };
        }
    }
    Ok(json!(text).to_string())
}

#[cfg(test)]
mod tests {
    use std::io::{BufReader, Cursor};

    use proptest::prelude::*;

    use super::*;

    fn rows_of(bytes: &[u8], delimiter: u8, buffer: usize) -> Result<Vec<(usize, Value)>, String> {
        let message = |error| match error {
            CsvError::Row(line, problem, _) => format!("{line}: {problem}"),
            CsvError::TooLong(line) => format!("{line}: too long"),
            CsvError::Io(error) => error.to_string(),
        };
        let reader = BufReader::with_capacity(buffer, Cursor::new(bytes.to_owned()));
        let mut file = CsvRows::new(reader, delimiter).map_err(message)?;
        let (mut rows, mut record) = (Vec::new(), Vec::new());
        while let Some(line) = file.next(&mut record, 1 << 16).map_err(message)? {
            rows.push((line, serde_json::from_slice(&record).unwrap()));
        }
        Ok(rows)
    }

    #[test]
    fn rows_are_records() {
        let text = "text,id\r\n\r\n\"two\r\nlines, \"\"quoted\"\"\",7\r\n,\nlast,8";
        for buffer in [1, 2, 3, 7, 100] {
            assert_eq!(
                rows_of(text.as_bytes(), b',', buffer).unwrap(),
                [(3, json!({"text": "two\r\nlines, \"quoted\"", "id": "7"})), (6, json!({"text": "last", "id": "8"})),],
                "{buffer}"
            );
        }
        assert!(rows_of(b"", b',', 9).unwrap().is_empty() && rows_of(b"text\n", b',', 9).unwrap().is_empty());
        let rows = rows_of(b"label,kto_tag\nTrue,FALSE\n1,\n", b',', 9).unwrap();
        assert_eq!(rows[0].1, json!({"label": true, "kto_tag": false}));
        assert_eq!(rows[1].1, json!({"label": "1", "kto_tag": ""}));
        let text = "messages\tweight\tname\n\"[{\"\"role\"\": \"\"user\"\"}]\"\t0.5\t[x\n\t\tx\n[]\tTrue\tnull\n";
        let rows: Vec<Value> = rows_of(text.as_bytes(), b'\t', 9).unwrap().into_iter().map(|row| row.1).collect();
        assert_eq!(
            rows,
            [
                json!({"messages": [{"role": "user"}], "weight": 0.5, "name": "[x"}),
                json!({"messages": null, "weight": null, "name": "x"}),
                json!({"messages": [], "weight": true, "name": "null"}),
            ]
        );
    }

    /// As Excel writes them: empty rows below the table, and a line above it that names the separator.
    #[test]
    fn rows_of_empty_fields_are_skipped() {
        for text in [
            "sep=;\r\na;b\r\n1;2\r\n;\r\n;;;\r\n\"\";\"\"\r\n3;\r\n;\r\n",
            "\nSEP=;\na;b\n1;2\n;\n;;;\n\"\";\"\"\n3;\n;",
        ] {
            for buffer in [1, 5, 100] {
                let reader = BufReader::with_capacity(buffer, Cursor::new(text.as_bytes().to_owned()));
                let mut file = CsvRows::new(reader, b';').unwrap_or_else(|_| panic!("{text}"));
                let (mut record, mut found) = (Vec::new(), Vec::new());
                while let Ok(Some(_)) = file.next(&mut record, 1 << 16) {
                    found.push(serde_json::from_slice::<Value>(&record).unwrap());
                }
                assert_eq!(found, [json!({"a": "1", "b": "2"}), json!({"a": "3", "b": ""})], "{text}");
                assert_eq!(file.blank(), 4);
            }
        }
    }

    #[test]
    fn errors_have_the_line_of_their_row() {
        for (text, expected) in [
            ("a,b\n1,2\n\n3\n", "4: the row has 1 columns, and the header has 2"),
            ("a,b\n1,2,3\n", "2: the row has 3 columns, and the header has 2"),
            ("a,b\n1,\"2\n3,4\n5,6\n", "2: a quotation mark in this row is not closed before the end of the file"),
            ("a\n\"", "2: a quotation mark in this row is not closed before the end of the file"),
            ("a,a\n", "1: two columns have the name `a`"),
            (",a,\n", "1: two columns have no name"),
            ("messages\n\"[{'role': 'user'}]\"\n", "2: column `messages` is not JSON: key must be a string"),
        ] {
            for buffer in [1, 5, 100] {
                assert_eq!(rows_of(text.as_bytes(), b',', buffer).unwrap_err(), expected, "{text}");
            }
        }
        assert_eq!(rows_of(b"a,b\n1,caf\xe9\n", b',', 9).unwrap_err(), "2: column `b` is not UTF-8");
        assert_eq!(rows_of(b"a,\n1,caf\xe9\n", b',', 9).unwrap_err(), "2: column 2 is not UTF-8");
        let long = format!("a\n{}\n", "x".repeat(1 << 17));
        assert_eq!(rows_of(long.as_bytes(), b',', 9).unwrap_err(), "2: too long");
    }

    proptest! {
        /// Any bytes are split or refused, whatever the size of the buffer.
        #[test]
        fn any_bytes_are_split_or_refused(text in r#"[",;\r\nab\[{é]{0,60}"#, buffer in 1usize..9) {
            prop_assert_eq!(rows_of(text.as_bytes(), b',', buffer), rows_of(text.as_bytes(), b',', 1000));
        }
    }
}
