//! Splits a JSON array, or objects that span several lines, into values. One value is in memory at a time.

use std::io::{self, BufRead};

use super::FilePosition;
use super::json_nesting::JsonNesting;
use super::lines::append;
use super::source::Limited;

/// Why the rest of a file cannot be split into values.
#[derive(Debug)]
pub(super) enum JsonSplitError {
    Io(io::Error),
    /// The value that starts here exceeds the limit of a record.
    TooLong(FilePosition),
    /// The position of an error, and what is wrong there.
    Syntax(FilePosition, String),
}

impl From<io::Error> for JsonSplitError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The values of a file.
pub(super) struct JsonValues<R> {
    reader: R,
    is_array: bool,
    state: State,
    line: usize,
    /// The number of characters in the line before the current position.
    column: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// `[` is next.
    Start,
    /// A value or `]` is next.
    AfterOpenBracket,
    /// `,` or `]` is next.
    AfterValue,
    /// In a file without an array: a value or the end of the file is next.
    BetweenValues,
    /// The array is closed: the end of the file is next.
    End,
}

/// A reader with an optional limit, at which the input may end in the middle of a value.
pub(super) trait Truncated: BufRead {
    fn reached_limit(&self) -> bool;
}

impl Truncated for Limited {
    fn reached_limit(&self) -> bool {
        Limited::reached_limit(self)
    }
}

impl<R: Truncated> JsonValues<R> {
    /// Reads the elements of an array if `is_array`, otherwise a sequence of values.
    pub(super) fn new(reader: R, is_array: bool) -> Self {
        let state = if is_array { State::Start } else { State::BetweenValues };
        Self { reader, is_array, state, line: 1, column: 0 }
    }

    /// Reads the next value and returns its start; `None` at the end. A value that the limit of the reader truncates is
    /// dropped.
    pub(super) fn next(
        &mut self,
        record: &mut Vec<u8>,
        max_bytes: usize,
    ) -> Result<Option<FilePosition>, JsonSplitError> {
        record.clear();
        loop {
            let next = self.skip_white_space()?;
            match (self.state, next) {
                (_, None) if self.reader.reached_limit() => return Ok(None),
                (State::BetweenValues | State::End, None) => return Ok(None),
                (State::Start, Some(b'[')) => self.consume_bracket(State::AfterOpenBracket),
                (State::AfterOpenBracket | State::AfterValue, Some(b']')) => self.consume_bracket(State::End),
                (State::AfterValue, Some(b',')) => {
                    self.advance(1, false);
                    self.reader.consume(1);
                    let next = self.skip_white_space()?;
                    return match next {
                        Some(b']' | b',') => Err(self.syntax_error("expected a value after `,`")),
                        None if self.reader.reached_limit() => Ok(None),
                        None => Err(self.unclosed()),
                        Some(byte) => self.value(byte, record, max_bytes),
                    };
                }
                (State::AfterOpenBracket | State::BetweenValues, Some(byte)) => {
                    return self.value(byte, record, max_bytes);
                }
                (State::AfterValue, Some(_)) => {
                    return Err(self.syntax_error("expected `,` or `]` after an element of the array"));
                }
                (State::Start, _) => return Err(self.syntax_error("expected `[`")),
                (State::End, Some(_)) => {
                    return Err(self.syntax_error(
                        "the file continues after the end of the array: a file is one array, or has a record in each line",
                    ));
                }
                (State::AfterOpenBracket | State::AfterValue, None) => return Err(self.unclosed()),
            }
        }
    }

    fn consume_bracket(&mut self, state: State) {
        self.advance(1, false);
        self.reader.consume(1);
        self.state = state;
    }

    /// An error at the next character.
    fn syntax_error(&self, problem: &str) -> JsonSplitError {
        JsonSplitError::Syntax(FilePosition { line: self.line, column: self.column + 1 }, problem.into())
    }

    fn unclosed(&self) -> JsonSplitError {
        self.syntax_error("the array is not closed: the file ends too early")
    }

    fn advance(&mut self, characters: usize, line_break: bool) {
        match line_break {
            true => (self.line, self.column) = (self.line + 1, 0),
            false => self.column += characters,
        }
    }

    /// The next byte that is not white space; it is not consumed.
    fn skip_white_space(&mut self) -> io::Result<Option<u8>> {
        loop {
            let bytes = match self.reader.fill_buf() {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if bytes.is_empty() {
                return Ok(None);
            }
            let white = bytes.iter().position(|byte| !matches!(byte, b' ' | b'\t' | b'\r' | b'\n'));
            let length = white.unwrap_or(bytes.len());
            let found = bytes.get(length).copied();
            let (mut line, mut column) = (self.line, self.column);
            for byte in &bytes[..length] {
                match byte {
                    b'\n' => (line, column) = (line + 1, 0),
                    _ => column += 1,
                }
            }
            (self.line, self.column) = (line, column);
            self.reader.consume(length);
            if found.is_some() {
                return Ok(found);
            }
        }
    }

    /// Reads the value that starts with `first`, the next byte.
    fn value(
        &mut self,
        first: u8,
        record: &mut Vec<u8>,
        max_bytes: usize,
    ) -> Result<Option<FilePosition>, JsonSplitError> {
        let place = FilePosition { line: self.line, column: self.column + 1 };
        if matches!(first, b']' | b'}' | b',' | b':') {
            return Err(self.syntax_error("expected a value"));
        }
        let mut nesting = JsonNesting::default();
        // A number or a literal ends before the next delimiter. Any other value ends with its closing bracket or quotation
        // mark.
        let bare = !matches!(first, b'{' | b'[' | b'"');
        loop {
            let bytes = match self.reader.fill_buf() {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            if bytes.is_empty() {
                if self.reader.reached_limit() {
                    return Ok(None);
                }
                if bare {
                    break;
                }
                let problem = match nesting.quoted {
                    true => "a string in this record is not closed: the file ends too early",
                    false => "the record is not closed: the file ends too early",
                };
                return Err(JsonSplitError::Syntax(place, problem.into()));
            }
            let (mut line, mut column) = (self.line, self.column);
            let mut end = None;
            for (at, &byte) in bytes.iter().enumerate() {
                if bare && matches!(byte, b' ' | b'\t' | b'\r' | b'\n' | b',' | b']' | b'}' | b'{' | b'[' | b'"') {
                    end = Some(at);
                    break;
                }
                match byte {
                    b'\n' => (line, column) = (line + 1, 0),
                    // Columns count characters, so continuation bytes of UTF-8 are not counted.
                    _ => column += usize::from(byte & 0xC0 != 0x80),
                }
                nesting.take(byte);
                if !bare && nesting.depth == 0 && !nesting.quoted {
                    end = Some(at + 1);
                    break;
                }
            }
            let length = end.unwrap_or(bytes.len());
            if !append(record, &bytes[..length], max_bytes) {
                return Err(JsonSplitError::TooLong(place));
            }
            (self.line, self.column) = (line, column);
            self.reader.consume(length);
            if end.is_some() {
                break;
            }
        }
        self.state = if self.is_array { State::AfterValue } else { State::BetweenValues };
        Ok(Some(place))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufReader, Cursor};

    use proptest::prelude::*;

    use super::*;

    impl<R: io::Read> Truncated for BufReader<R> {
        fn reached_limit(&self) -> bool {
            false
        }
    }

    fn values(text: &[u8], array: bool, buffer: usize) -> Result<Vec<(String, String)>, String> {
        let mut values = JsonValues::new(BufReader::with_capacity(buffer, Cursor::new(text.to_owned())), array);
        let (mut found, mut record) = (Vec::new(), Vec::new());
        loop {
            match values.next(&mut record, 100) {
                Ok(Some(place)) => found.push((place.to_string(), String::from_utf8_lossy(&record).into_owned())),
                Ok(None) => return Ok(found),
                Err(JsonSplitError::Syntax(place, problem)) => return Err(format!("{place}: {problem}")),
                Err(JsonSplitError::TooLong(place)) => return Err(format!("{place}: too long")),
                Err(JsonSplitError::Io(error)) => return Err(error.to_string()),
            }
        }
    }

    #[test]
    fn values_have_the_position_where_they_start() {
        for buffer in [1, 2, 3, 5, 1000] {
            let found =
                values("[{\"ü\": \"]\\\"\"}, [1, {}],\r\n 3 ,\"x\"\n,null]\n\n".as_bytes(), true, buffer).unwrap();
            let expected =
                [("1:2", "{\"ü\": \"]\\\"\"}"), ("1:16", "[1, {}]"), ("2:2", "3"), ("2:5", "\"x\""), ("3:2", "null")];
            assert_eq!(found, expected.map(|(place, value)| (place.into(), value.into())));
            assert!(values(b" [ ] ", true, buffer).unwrap().is_empty());
            let found = values(b"{\n  \"a\": 1\n}\n{\n}{}\n7", false, buffer).unwrap();
            let expected = [("1:1", "{\n  \"a\": 1\n}"), ("4:1", "{\n}"), ("5:2", "{}"), ("6:1", "7")];
            assert_eq!(found, expected.map(|(place, value)| (place.into(), value.into())));
        }
    }

    #[test]
    fn errors_have_their_position() {
        for (text, expected) in [
            ("[{} {}]", "1:5: expected `,` or `]` after an element of the array"),
            ("[{},]", "1:5: expected a value after `,`"),
            ("[,{}]", "1:2: expected a value"),
            ("[{}", "1:4: the array is not closed: the file ends too early"),
            ("[{},\n", "2:1: the array is not closed: the file ends too early"),
            ("[\n {\"a\": 1", "2:2: the record is not closed: the file ends too early"),
            ("[\n {\"a\": \"1}]", "2:2: a string in this record is not closed: the file ends too early"),
            (
                "[]\n[]",
                "2:1: the file continues after the end of the array: a file is one array, or has a record in each line",
            ),
            ("[}", "1:2: expected a value"),
        ] {
            assert_eq!(values(text.as_bytes(), true, 4).unwrap_err(), expected, "{text}");
        }
        assert_eq!(values(format!("[1, \"{}\"]", "x".repeat(100)).as_bytes(), true, 64).unwrap_err(), "1:5: too long");
    }

    proptest! {
        /// Any bytes are split or refused, whatever the size of the buffer.
        #[test]
        fn any_bytes_are_split_or_refused(text in r#"[\[\]{}",:\\ \nax1ü]{0,60}"#, array: bool, buffer in 1usize..9) {
            prop_assert_eq!(values(text.as_bytes(), array, buffer), values(text.as_bytes(), array, 1000));
        }

        /// The elements equal those that serde_json parses from the whole array.
        #[test]
        fn elements_are_those_of_the_whole_array(texts in prop::collection::vec(".{0,10}", 0..9), indent: bool, buffer in 1usize..40) {
            let array: Vec<_> = texts.iter().map(|text| serde_json::json!({"text": text, "n": [1, {"b": null}]})).collect();
            let text = if indent { serde_json::to_string_pretty(&array) } else { serde_json::to_string(&array) }.unwrap();
            let mut values = JsonValues::new(BufReader::with_capacity(buffer, Cursor::new(text.into_bytes())), true);
            let (mut found, mut record) = (Vec::new(), Vec::new());
            while values.next(&mut record, 1 << 20).unwrap().is_some() {
                found.push(serde_json::from_slice::<serde_json::Value>(&record).unwrap());
            }
            prop_assert_eq!(found, array);
        }
    }
}
