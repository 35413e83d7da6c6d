//! JSON Lines: a record in each line.

use std::io::{self, BufRead};

use super::source::Limited;

/// The result of [`read_line`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// The file has no more lines.
    End,
    /// A line with a line break.
    Complete,
    /// The last line, without a line break.
    Last,
    /// A line that exceeds the limit.
    TooLong,
}

/// Reads the next line into `line`, without its line break. `line` never has more than `max_bytes`, however long the line is.
pub(super) fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>, max_bytes: usize) -> io::Result<Line> {
    line.clear();
    let mut any = false;
    loop {
        let bytes = match reader.fill_buf() {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if bytes.is_empty() {
            return Ok(if any { Line::Last } else { Line::End });
        }
        any = true;
        let end = memchr::memchr(b'\n', bytes);
        let part = &bytes[..end.unwrap_or(bytes.len())];
        if !append(line, part, max_bytes) {
            return Ok(Line::TooLong);
        }
        let read = part.len() + usize::from(end.is_some());
        reader.consume(read);
        if end.is_some() {
            return Ok(Line::Complete);
        }
    }
}

/// Appends `part` to a record. Returns false, and appends nothing, if the record would exceed `max_bytes`.
pub(super) fn append(record: &mut Vec<u8>, part: &[u8], max_bytes: usize) -> bool {
    if record.len() + part.len() > max_bytes {
        return false;
    }
    if record.capacity() - record.len() < part.len() {
        // Double the capacity as `Vec` does, but not past the limit.
        let capacity = (2 * record.capacity()).max(record.len() + part.len()).min(max_bytes);
        record.reserve_exact(capacity - record.len());
    }
    record.extend_from_slice(part);
    true
}

/// The lines of a file.
pub(super) struct Lines {
    reader: Limited,
    /// The number of the line that was read last, from 1.
    line: usize,
}

/// A line that exceeds the limit of a record.
pub(super) struct TooLong;

impl Lines {
    pub(super) fn new(reader: Limited) -> Self {
        Self { reader, line: 0 }
    }

    /// The number of the line that was read last, from 1.
    pub(super) fn line(&self) -> usize {
        self.line
    }

    /// Reads the next line that is not blank; false at the end. A line that the limit of the reader truncates is dropped.
    pub(super) fn next(&mut self, record: &mut Vec<u8>, max_bytes: usize) -> io::Result<Result<bool, TooLong>> {
        loop {
            self.line += 1;
            match read_line(&mut self.reader, record, max_bytes)? {
                Line::End => return Ok(Ok(false)),
                // The line may have more bytes after the limit.
                Line::Last if self.reader.reached_limit() => return Ok(Ok(false)),
                Line::TooLong => return Ok(Err(TooLong)),
                Line::Complete | Line::Last => {}
            }
            // A concatenation of several files has byte order marks in the middle.
            if record.starts_with(b"\xef\xbb\xbf") {
                record.drain(..3);
            }
            if !record.trim_ascii().is_empty() {
                return Ok(Ok(true));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;

    #[test]
    fn an_endless_line_takes_no_more_memory_than_the_limit() {
        let mut line = Vec::new();
        let mut endless = BufReader::new(io::repeat(b' '));
        assert_eq!(read_line(&mut endless, &mut line, 1_000_000).unwrap(), Line::TooLong);
        assert!(line.capacity() <= 1_000_000, "{}", line.capacity());
        let mut file = &b"abc\n\nabcd\nabc"[..];
        let mut lines = Vec::new();
        while let Line::Complete | Line::Last = read_line(&mut file, &mut line, 4).unwrap() {
            lines.push(String::from_utf8(line.clone()).unwrap());
        }
        assert_eq!(lines, ["abc", "", "abcd", "abc"]);
        assert_eq!(read_line(&mut &b"abcde"[..], &mut line, 4).unwrap(), Line::TooLong);
    }
}
