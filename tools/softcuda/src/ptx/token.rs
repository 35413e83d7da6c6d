//! Splits PTX into tokens.

use super::Error;

/// A token and its line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) line: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A name, a directive or an opcode with its modifiers.
    Word(String),
    /// A number, as written.
    Number(String),
    /// A string, without its quotes.
    Text(String),
    Sign(char),
    End,
}

pub(super) fn tokens(text: &str) -> Result<Vec<Token>, Error> {
    let bytes = text.as_bytes();
    let mut out = Vec::new();
    let (mut at, mut line) = (0, 1);
    while at < bytes.len() {
        let byte = bytes[at];
        match byte {
            b'\n' => {
                line += 1;
                at += 1;
            }
            0 => break,
            b if b.is_ascii_whitespace() => at += 1,
            b'/' if bytes.get(at + 1) == Some(&b'/') => {
                while at < bytes.len() && bytes[at] != b'\n' {
                    at += 1;
                }
            }
            b'/' if bytes.get(at + 1) == Some(&b'*') => {
                let end = text[at..].find("*/").ok_or_else(|| Error::new(line, "a comment has no end"))? + at + 2;
                line += text[at..end].matches('\n').count() as u32;
                at = end;
            }
            b'"' => {
                let end = text[at + 1..].find('"').ok_or_else(|| Error::new(line, "a string has no end"))? + at + 1;
                out.push(Token { kind: Kind::Text(text[at + 1..end].to_owned()), line });
                at = end + 1;
            }
            b if b.is_ascii_digit() => {
                let end = span(bytes, at, |b| b.is_ascii_alphanumeric() || b == b'.');
                out.push(Token { kind: Kind::Number(text[at..end].to_owned()), line });
                at = end;
            }
            b if b.is_ascii_alphabetic() || b"_$%.".contains(&b) => {
                let mut end = span(bytes, at + 1, word);
                // `shared::cluster` is one name; a single colon ends a label.
                while bytes[end..].starts_with(b"::") && bytes.get(end + 2).is_some_and(u8::is_ascii_alphanumeric) {
                    end = span(bytes, end + 2, word);
                }
                out.push(Token { kind: Kind::Word(text[at..end].to_owned()), line });
                at = end;
            }
            b if b",;:{}[]()@!|+-=<>".contains(&b) => {
                out.push(Token { kind: Kind::Sign(b as char), line });
                at += 1;
            }
            _ => {
                return Err(Error::new(
                    line,
                    format!("unexpected character `{}`", text[at..].chars().next().unwrap_or(' ')),
                ));
            }
        }
    }
    out.push(Token { kind: Kind::End, line });
    Ok(out)
}

fn word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_$%.".contains(&byte)
}

fn span(bytes: &[u8], mut at: usize, belongs: impl Fn(u8) -> bool) -> usize {
    while at < bytes.len() && belongs(bytes[at]) {
        at += 1;
    }
    at
}
