//! Output on stdout and stderr. It never panics: if the reader has closed the pipe, the output ends quietly; a full disk
//! is an error at the end; and lines that cannot be written to stderr are lost.

use std::fmt;
use std::io::{self, BufWriter, StdoutLock, Write};

use crate::Printable;

/// Buffered standard output.
pub(crate) struct Output {
    stdout: BufWriter<StdoutLock<'static>>,
    /// The first error; nothing is written after it.
    failure: Option<io::Error>,
}

impl Output {
    pub(crate) fn new() -> Self {
        Self { stdout: BufWriter::new(io::stdout().lock()), failure: None }
    }

    /// Writes a line, with text from files and servers escaped.
    pub(crate) fn line(&mut self, line: fmt::Arguments<'_>) {
        self.write(format_args!("{}\n", Printable(line)));
    }

    /// Writes indented JSON, with control characters escaped as in JSON.
    pub(crate) fn json(&mut self, value: &impl serde::Serialize) {
        let text = serde_json::to_string_pretty(value).expect("the printed types are plain data");
        let mut escaped = String::with_capacity(text.len() + 1);
        for character in text.chars() {
            // serde_json escapes only ASCII control characters. `printable` escapes the others, too, each to more than
            // the 4 bytes of a plain character. They occur only in strings.
            match character != '\n' && crate::printable(character.encode_utf8(&mut [0; 4])).len() > 4 {
                true => escaped.push_str(&format!("\\u{:04x}", u32::from(character))),
                false => escaped.push(character),
            }
        }
        self.write(format_args!("{escaped}\n"));
    }

    fn write(&mut self, text: fmt::Arguments<'_>) {
        if self.failure.is_none() {
            self.failure = self.stdout.write_fmt(text).err();
        }
    }

    /// Flushes the buffer.
    ///
    /// # Errors
    ///
    /// The first error of writing, unless the reader has closed the pipe.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        let failure = match self.failure.take() {
            Some(failure) => Some(failure),
            None => self.stdout.flush().err(),
        };
        // Dropping the writer would try to write the rest again.
        drop(self.stdout.into_parts());
        match failure {
            Some(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
            _ => Ok(()),
        }
    }
}

/// Writes a line to stderr. A failure is ignored: there is no place left to report it.
pub(crate) fn note(line: fmt::Arguments<'_>) {
    let mut stderr = io::stderr().lock();
    let _ = stderr.write_all(format!("{}\n", Printable(line)).as_bytes());
}

/// Prints an error on one line, and the hint, if any, on another.
pub(crate) fn fail(error: &dyn std::error::Error, hint: Option<String>) {
    note(format_args!("error: {error}"));
    if let Some(hint) = hint {
        note(format_args!("hint: {hint}"));
    }
}
