//! What the program says. Nothing that can happen to a terminal, a pipe or a disk behind stdout or stderr is a panic: a pipe
//! that nobody reads any more ends the output quietly, a disk that is full is an error at the end, and what stderr cannot
//! take is lost.

use std::fmt;
use std::io::{self, BufWriter, StdoutLock, Write};

use moonlight_convert::Printable;

/// Standard output, line by line.
pub(crate) struct Output {
    stdout: BufWriter<StdoutLock<'static>>,
    /// The first failure; nothing is written behind it.
    failure: Option<io::Error>,
}

impl Output {
    pub(crate) fn new() -> Self {
        Self { stdout: BufWriter::new(io::stdout().lock()), failure: None }
    }

    /// One line, with what files or servers put into it made printable.
    pub(crate) fn line(&mut self, line: fmt::Arguments<'_>) {
        self.write(format_args!("{}\n", Printable(line)));
    }

    /// JSON of many lines. Its control characters are escaped in JSON's own way.
    pub(crate) fn json(&mut self, value: &impl serde::Serialize) {
        let text = serde_json::to_string_pretty(value).expect("what is printed is plain data");
        let mut escaped = String::with_capacity(text.len() + 1);
        for character in text.chars() {
            // serde_json leaves those beyond ASCII as they are; they stand inside of strings only.
            match character != '\n' && moonlight_convert::printable(character.encode_utf8(&mut [0; 4])).len() > 4 {
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

    /// Hands over what is still held.
    ///
    /// # Errors
    ///
    /// What kept anything from being written, unless nobody wants to read it.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        let failure = match self.failure.take() {
            Some(failure) => Some(failure),
            None => self.stdout.flush().err(),
        };
        // What could not be written is not tried once more.
        drop(self.stdout.into_parts());
        match failure {
            Some(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
            _ => Ok(()),
        }
    }
}

/// A line on stderr. Where that cannot take it, there is nobody to tell.
pub(crate) fn note(line: fmt::Arguments<'_>) {
    let mut stderr = io::stderr().lock();
    let _ = stderr.write_all(format!("{}\n", Printable(line)).as_bytes());
}

/// The error in one line, and in another what helps, where there is a hint.
pub(crate) fn fail(error: &dyn std::error::Error, hint: Option<String>) {
    note(format_args!("error: {error}"));
    if let Some(hint) = hint {
        note(format_args!("hint: {hint}"));
    }
}
