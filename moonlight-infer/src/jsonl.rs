//! JSONL of texts or tokens, one sequence in each line, read and written.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::error::InferError;
use crate::tokenizer::Tokenizer;

/// The longest record: a line of JSONL, in bytes. A file in one line, such as an array of all records, is no JSONL.
pub const LONGEST_RECORD: usize = 256 << 20;
/// Values in a record, at most: each takes many times its length when it is read.
pub const MOST_VALUES: usize = 4 << 20;

/// Reads the next line without its end into `line`, which never holds more than `longest` bytes; `false` where there is
/// none.
///
/// # Errors
///
/// Those of the reader; [`io::ErrorKind::InvalidData`] for a line that is longer.
pub fn read_record(reader: &mut impl BufRead, line: &mut Vec<u8>, longest: usize) -> io::Result<bool> {
    line.clear();
    let mut any = false;
    loop {
        let bytes = match reader.fill_buf() {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if bytes.is_empty() {
            return Ok(any);
        }
        any = true;
        let end = bytes.iter().position(|&byte| byte == b'\n');
        let part = &bytes[..end.unwrap_or(bytes.len())];
        if line.len() + part.len() > longest {
            let problem = format!("the line has more than {longest} bytes, the limit of a record");
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        if line.capacity() - line.len() < part.len() {
            // Doubled as usual, but not past the limit.
            let wanted = (2 * line.capacity()).max(line.len() + part.len()).min(longest);
            line.reserve_exact(wanted - line.len());
        }
        line.extend_from_slice(part);
        let read = part.len() + usize::from(end.is_some());
        reader.consume(read);
        if end.is_some() {
            return Ok(true);
        }
    }
}

/// Whether JSON has more than [`MOST_VALUES`] values. It need not be sound.
pub fn has_too_many_values(json: &[u8]) -> bool {
    // A value has a byte and something behind it.
    if json.len() / 2 < MOST_VALUES {
        return false;
    }
    let (mut values, mut quoted, mut escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b',' | b':' | b'[' | b'{' if !quoted => values += 1,
            _ => {}
        }
    }
    values > MOST_VALUES
}

/// A line.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    tokens: Option<Vec<u32>>,
    text: Option<String>,
}

/// A file of lines `{"tokens": [...]}` or `{"text": "..."}`. Empty lines are passed over.
#[derive(Debug)]
pub struct JsonlReader {
    path: PathBuf,
    file: BufReader<File>,
    buffer: Vec<u8>,
    /// The line that was read last, from 1.
    line: usize,
}

impl JsonlReader {
    /// Opens a file.
    ///
    /// # Errors
    ///
    /// [`InferError::File`].
    pub fn open(path: &Path) -> Result<Self, InferError> {
        let file = File::open(path).map_err(InferError::read(path))?;
        Ok(Self { path: path.to_owned(), file: BufReader::new(file), buffer: Vec::new(), line: 0 })
    }

    /// The tokens of the next line; `None` after the last. A line of text needs a tokenizer, which gives those of its
    /// [`encode_text`](Tokenizer::encode_text).
    ///
    /// # Errors
    ///
    /// [`InferError::Line`] for a line that is neither, for one of more than [`LONGEST_RECORD`] bytes, and for text without
    /// a tokenizer.
    pub fn next_tokens(&mut self, tokenizer: Option<&Tokenizer>) -> Result<Option<Vec<u32>>, InferError> {
        loop {
            let Some(line) = next_line(&self.path, &mut self.file, &mut self.buffer, &mut self.line)? else {
                return Ok(None);
            };
            if !line.trim().is_empty() {
                let wrong = |(problem, hint)| InferError::line(&self.path, self.line, problem, hint);
                return tokens_of(line, tokenizer).map(Some).map_err(wrong);
            }
        }
    }

    /// Hands the tokens of every line to `each`. What is wrong with the tokens of a line is said with file and line; see
    /// [`InferError::at_line`].
    ///
    /// # Errors
    ///
    /// Those of [`next_tokens`](Self::next_tokens) and of `each`.
    pub fn for_each(
        mut self,
        tokenizer: Option<&Tokenizer>,
        mut each: impl FnMut(Vec<u32>) -> Result<(), InferError>,
    ) -> Result<(), InferError> {
        while let Some(tokens) = self.next_tokens(tokenizer)? {
            each(tokens).map_err(|error| error.at_line(&self.path, self.line))?;
        }
        Ok(())
    }
}

/// The next line of a file, whose number `number` becomes.
pub(crate) fn next_line<'a>(
    path: &Path,
    file: &mut impl BufRead,
    buffer: &'a mut Vec<u8>,
    number: &mut usize,
) -> Result<Option<&'a str>, InferError> {
    *number += 1;
    match read_record(file, buffer, LONGEST_RECORD) {
        Ok(true) => {}
        Ok(false) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData && buffer.len() > LONGEST_RECORD / 2 => {
            return Err(InferError::line(path, *number, error, Some("JSONL has a record in each line".into())));
        }
        Err(error) => return Err(InferError::read(path)(error)),
    }
    let utf8 = |error: std::str::Utf8Error| {
        let problem = format!("the line is not UTF-8: its byte {} is wrong", error.valid_up_to() + 1);
        InferError::line(path, *number, problem, None)
    };
    std::str::from_utf8(buffer).map(Some).map_err(utf8)
}

/// Reads one record of `score` or `generate`, for tests that feed it anything.
///
/// # Errors
///
/// What is wrong with it.
#[doc(hidden)]
pub fn parse_record(line: &[u8], tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>, String> {
    let line = std::str::from_utf8(line).map_err(|error| error.to_string())?;
    tokens_of(line, tokenizer).map_err(|(problem, _)| problem)
}

fn tokens_of(line: &str, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>, (String, Option<String>)> {
    let shape = || Some("a line is `{\"tokens\": [1, 2, 3]}` or `{\"text\": \"...\"}`".to_owned());
    let line: Line = serde_json::from_str(line).map_err(|error| (error.to_string(), shape()))?;
    match (line.tokens, line.text, tokenizer) {
        (Some(tokens), None, _) => Ok(tokens),
        (None, Some(text), Some(tokenizer)) => {
            tokenizer.encode_text(&text).map_err(|error| (error.to_string(), error.hint()))
        }
        (None, Some(_), None) => {
            Err(("the model's directory has no tokenizer".into(), Some("give `tokens` in place of `text`".into())))
        }
        _ => Err(("the line has to have either `tokens` or `text`".into(), shape())),
    }
}

/// JSONL that is written, to a file or to stdout.
pub struct JsonlWriter {
    path: PathBuf,
    to: Box<dyn Write>,
}

impl JsonlWriter {
    /// Creates a file, or writes to stdout where none is given.
    ///
    /// # Errors
    ///
    /// [`InferError::File`].
    pub fn create(path: Option<&Path>) -> Result<Self, InferError> {
        Ok(match path {
            Some(path) => {
                let file = File::create(path).map_err(InferError::write(path))?;
                Self { path: path.to_owned(), to: Box::new(BufWriter::new(file)) }
            }
            None => Self { path: "stdout".into(), to: Box::new(std::io::stdout().lock()) },
        })
    }

    /// Writes a line.
    ///
    /// # Errors
    ///
    /// [`InferError::File`].
    pub fn line(&mut self, value: &Value) -> Result<(), InferError> {
        writeln!(self.to, "{value}").map_err(InferError::write(&self.path))
    }

    /// Flushes what is still in memory; a writer that is dropped without it cannot say that the disk was full.
    ///
    /// # Errors
    ///
    /// [`InferError::File`].
    pub fn finish(mut self) -> Result<(), InferError> {
        self.to.flush().map_err(InferError::write(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_written_is_read_and_wrong_lines_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        let mut writer = JsonlWriter::create(Some(&path)).unwrap();
        writer.line(&json!({"tokens": [1, 2]})).unwrap();
        writer.line(&json!({"text": "ab"})).unwrap();
        writer.finish().unwrap();
        let read = |tokenizer: Option<&Tokenizer>| {
            let mut found = Vec::new();
            let result = JsonlReader::open(&path)?.for_each(tokenizer, |tokens| {
                found.push(tokens);
                Ok(())
            });
            result.map(|()| found)
        };
        assert_eq!(read(Some(&Tokenizer::bytes())).unwrap(), [vec![1, 2], vec![97, 98]]);
        let error = read(None).unwrap_err();
        assert!(error.to_string().ends_with("x.jsonl:2: the model's directory has no tokenizer"), "{error}");
        assert_eq!(error.hint().unwrap(), "give `tokens` in place of `text`");

        std::fs::write(&path, "\n{\"tokens\": [1], \"text\": \"a\"}\n").unwrap();
        let error = read(None).unwrap_err().to_string();
        assert!(error.ends_with("x.jsonl:2: the line has to have either `tokens` or `text`"), "{error}");
    }

    #[test]
    fn a_line_without_end_is_an_error_and_takes_no_more_than_its_limit() {
        let mut line = Vec::new();
        let mut endless = BufReader::new(io::repeat(b' '));
        let error = read_record(&mut endless, &mut line, 1_000_000).unwrap_err();
        assert_eq!(error.to_string(), "the line has more than 1000000 bytes, the limit of a record");
        assert!(line.capacity() <= 1_000_000, "{}", line.capacity());
        let mut file = &b"abc\n\nabcd\nabc"[..];
        let mut lines = Vec::new();
        while read_record(&mut file, &mut line, 4).unwrap() {
            lines.push(String::from_utf8(line.clone()).unwrap());
        }
        assert_eq!(lines, ["abc", "", "abcd", "abc"]);
        assert!(read_record(&mut &b"abcde"[..], &mut line, 4).is_err());
    }

    /// As sparse as the disk allows: nothing is written but its length.
    #[cfg(unix)]
    #[test]
    fn a_file_in_one_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        let file = File::create(&path).unwrap();
        file.set_len(4 * LONGEST_RECORD as u64).unwrap();
        let error = JsonlReader::open(&path).unwrap().next_tokens(None).unwrap_err();
        assert!(
            error.to_string().ends_with("x.jsonl:1: the line has more than 268435456 bytes, the limit of a record"),
            "{error}"
        );
        assert!(error.hint().is_some());
    }

    #[test]
    fn values_are_counted() {
        let many = format!("[{}1]", "1,".repeat(MOST_VALUES));
        assert!(has_too_many_values(many.as_bytes()));
        let text = format!("[\"\\\"{}\"]", "1,".repeat(MOST_VALUES));
        assert!(!has_too_many_values(text.as_bytes()));
        assert!(!has_too_many_values(b"[1, 2]"));
    }

    #[test]
    fn errors_of_a_line_are_placed_and_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        std::fs::write(&path, "{\"tokens\": []}\n").unwrap();
        let with = |error: fn() -> InferError| {
            let result = JsonlReader::open(&path).unwrap().for_each(None, |_| Err(error()));
            result.unwrap_err().to_string()
        };
        assert!(with(|| InferError::EmptyPrompt).ends_with("x.jsonl:1: the prompt has no tokens"));
        let full = || InferError::write("out")(std::io::Error::other("full"));
        assert_eq!(with(full), "`out` cannot be written: full");
    }
}
