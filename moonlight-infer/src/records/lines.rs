//! A record in each line.

use std::io::{self, BufRead};

use super::source::Limited;

/// What a line came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// There is none.
    End,
    /// With its line break.
    Whole,
    /// The last one, without a line break.
    Unended,
    /// More bytes than a record may have.
    TooLong,
}

/// Reads the next line without its line break into `line`, which never holds more than `longest` bytes.
pub(super) fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>, longest: usize) -> io::Result<Line> {
    line.clear();
    let mut any = false;
    loop {
        let bytes = match reader.fill_buf() {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if bytes.is_empty() {
            return Ok(if any { Line::Unended } else { Line::End });
        }
        any = true;
        let end = memchr::memchr(b'\n', bytes);
        let part = &bytes[..end.unwrap_or(bytes.len())];
        if !append(line, part, longest) {
            return Ok(Line::TooLong);
        }
        let read = part.len() + usize::from(end.is_some());
        reader.consume(read);
        if end.is_some() {
            return Ok(Line::Whole);
        }
    }
}

/// Appends to a record, unless it would be longer than `longest`.
pub(super) fn append(record: &mut Vec<u8>, part: &[u8], longest: usize) -> bool {
    if record.len() + part.len() > longest {
        return false;
    }
    if record.capacity() - record.len() < part.len() {
        // Doubled as usual, but not past the limit.
        let wanted = (2 * record.capacity()).max(record.len() + part.len()).min(longest);
        record.reserve_exact(wanted - record.len());
    }
    record.extend_from_slice(part);
    true
}

/// The lines of a file.
pub(super) struct Lines {
    reader: Limited,
    /// The line that was read last, from 1.
    line: usize,
}

/// A line that is longer than a record may be.
pub(super) struct TooLong;

impl Lines {
    pub(super) fn new(reader: Limited) -> Self {
        Self { reader, line: 0 }
    }

    /// The line that was read last.
    pub(super) fn line(&self) -> usize {
        self.line
    }

    /// The next line that is not blank; a line that the limit cuts is none.
    pub(super) fn next(&mut self, record: &mut Vec<u8>, longest: usize) -> io::Result<Result<bool, TooLong>> {
        loop {
            self.line += 1;
            match read_line(&mut self.reader, record, longest)? {
                Line::End => return Ok(Ok(false)),
                // Whether there is more of it nobody has looked.
                Line::Unended if self.reader.reached_limit() => return Ok(Ok(false)),
                Line::TooLong => return Ok(Err(TooLong)),
                Line::Whole | Line::Unended => {}
            }
            // Where files were put together, the mark of the next is in the middle.
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
    fn a_line_without_end_takes_no_more_than_its_limit() {
        let mut line = Vec::new();
        let mut endless = BufReader::new(io::repeat(b' '));
        assert_eq!(read_line(&mut endless, &mut line, 1_000_000).unwrap(), Line::TooLong);
        assert!(line.capacity() <= 1_000_000, "{}", line.capacity());
        let mut file = &b"abc\n\nabcd\nabc"[..];
        let mut lines = Vec::new();
        while let Line::Whole | Line::Unended = read_line(&mut file, &mut line, 4).unwrap() {
            lines.push(String::from_utf8(line.clone()).unwrap());
        }
        assert_eq!(lines, ["abc", "", "abcd", "abc"]);
        assert_eq!(read_line(&mut &b"abcde"[..], &mut line, 4).unwrap(), Line::TooLong);
    }
}
