//! Escaping text from files and servers before it is printed on a terminal.

use std::borrow::Cow;
use std::fmt::{self, Write};

/// A text on one line, with everything escaped that would move a terminal's cursor, color it, ring it or forge a line
/// of a message: `\u{1b}`, `\n`. Text without such characters is returned unchanged.
///
/// Escaped are control characters and those that reorder or break the displayed text (such as U+202E and U+2028).
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(text, is_command)
}

/// [`printable`] for a text of several lines, such as one that a model generated: line breaks and tabs are kept.
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    escaped(text, |character| !matches!(character, '\n' | '\t') && is_command(character))
}

fn escaped(text: &str, wrong: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.chars().any(&wrong) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match wrong(character) {
            true => shown.extend(character.escape_default()),
            false => shown.push(character),
        }
    }
    Cow::Owned(shown)
}

/// Whether a terminal may act on the character instead of showing it.
pub(crate) fn is_command(character: char) -> bool {
    // Bidirectional controls, and the two separators that are line breaks.
    let reorders =
        matches!(character, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{061c}');
    character.is_control() || reorders
}

/// Wraps a value so that its display is [`printable`]: ``format!("`{}`", Printable(path.display()))``.
#[derive(Debug, Clone, Copy)]
pub struct Printable<T>(pub T);

impl<T: fmt::Display> fmt::Display for Printable<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        write!(text, "{}", self.0)?;
        formatter.write_str(&printable(&text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_commands_are_escaped_and_other_text_is_not() {
        for text in ["", "plain", "Grüße, 月之暗面 \u{1f600}", "a\\b"] {
            assert!(matches!(printable(text), Cow::Borrowed(same) if same == text), "{text}");
        }
        assert_eq!(printable("\x1b[2J\u{9b}1m\x07\x7f"), "\\u{1b}[2J\\u{9b}1m\\u{7}\\u{7f}");
        assert_eq!(printable("a\nb\r\tc"), "a\\nb\\r\\tc");
        assert_eq!(printable("gpj.\u{202e}exe\u{2028}"), "gpj.\\u{202e}exe\\u{2028}");
        assert_eq!(printable_lines("a\n\tb\r\x1b["), "a\n\tb\\r\\u{1b}[");
        assert_eq!(Printable(std::path::Path::new("x\x1by").display()).to_string(), "x\\u{1b}y");
    }
}
