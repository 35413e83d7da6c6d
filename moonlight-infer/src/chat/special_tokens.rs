//! Special tokens in rendered conversations: those that the template writes are tokens, those that a message spells are text.
//!
//! Messages are *escaped* before a template renders them: each special token that they spell is replaced by a placeholder, a
//! private-use character. The template may then cut and trim the message, and whatever looks like a special token in the
//! output was written by the template. [`encode`](SpecialTokens::encode) restores the texts.
//!
//! | characters | meaning |
//! |---|---|
//! | U+100000 to U+10FFEF | placeholders: the `n`th stands for the `n`th special token |
//! | U+10FFF0 to U+10FFF7, U+10FFFA, U+10FFFB | the digits and ends of [marks](super::assistant_mask) |
//! | U+F8000 to U+FFEFF, U+FFF00 to U+FFFFF | escapes of characters of the first two rows in a message |
//!
//! A message that already contains one of these escapes could not be restored, and is refused. No known font assigns anything
//! to them, whereas characters of the first row do occur in messages: Apple's font has symbols from U+100000.

use std::borrow::Cow;
use std::ops::Range;

use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::{Map, Value};

use super::{ChatError, ConversationError};
use crate::tokenizer::{Piece, Tokenizer};

const FIRST_PLACEHOLDER: u32 = 0x10_0000;
const MAX_PLACEHOLDERS: usize = 0xFFF0;

/// The escape of the first placeholder in a message; only the first [`ESCAPED_COUNT`] placeholders have one.
const FIRST_ESCAPED: u32 = 0xF_8000;
const ESCAPED_COUNT: u32 = 0x7F00;
/// The escape of the first mark in a message.
const FIRST_ESCAPED_MARK: u32 = 0xF_FF00;

/// The start and the end of a marked text.
pub(super) const MARKS: [char; 2] = ['\u{10FFFA}', '\u{10FFFB}'];
/// The digits of a mark's number.
pub(super) const MARK_DIGITS: [char; 8] =
    ['\u{10FFF0}', '\u{10FFF1}', '\u{10FFF2}', '\u{10FFF3}', '\u{10FFF4}', '\u{10FFF5}', '\u{10FFF6}', '\u{10FFF7}'];

/// The special tokens of a tokenizer, searched for in texts.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    names: Vec<(String, u32)>,
    special: AhoCorasick,
    /// All added tokens, special or not.
    added: AhoCorasick,
}

impl SpecialTokens {
    pub(super) fn new(tokenizer: &Tokenizer) -> Self {
        let mut names = tokenizer.specials();
        // A token without text would match everywhere.
        names.retain(|(name, _)| !name.is_empty());
        names.truncate(MAX_PLACEHOLDERS);
        let finder = |names: Vec<&str>| {
            // As in Hugging Face's tokenizers: of two tokens that start at the same position, the longer one is found.
            let finder = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(names);
            finder.expect("the names of added tokens fit into the automaton")
        };
        let added = finder(tokenizer.added_texts().take(MAX_PLACEHOLDERS).collect());
        Self { special: finder(names.iter().map(|(name, _)| name.as_str()).collect()), added, names }
    }

    /// The end of the last special token of a text, if only white space follows it.
    pub(super) fn end_of_last_special(&self, text: &str) -> Option<usize> {
        let end = self.special.find_iter(text).last()?.end();
        text[end..].trim().is_empty().then_some(end)
    }

    /// The length of the added token at the start of a text, special or not, including white space before it.
    pub(super) fn special_at_start(&self, text: &str) -> Option<usize> {
        let white = text.len() - text.trim_start().len();
        let found = self.added.find(&text[white..])?;
        (found.start() == 0).then_some(white + found.end())
    }

    /// The first special token of a text.
    pub(super) fn first_special(&self, text: &str) -> Option<Range<usize>> {
        Some(self.special.find(text)?.range())
    }

    /// The start of the added token that `position` is inside of; `None` if a token starts exactly at `position`.
    pub(super) fn start_of_special_at(&self, text: &str, position: usize) -> Option<usize> {
        let mut found = self.added.find_iter(text).take_while(|found| found.start() < position);
        found.find(|found| position < found.end()).map(|found| found.start())
    }

    /// Escapes all texts of a map, including keys, at any depth.
    pub(super) fn escape_map(&self, map: Map<String, Value>) -> Result<Map<String, Value>, ConversationError> {
        map.into_iter().map(|(name, value)| Ok((self.escape(&name)?, self.escape_value(value)?))).collect()
    }

    fn escape_value(&self, value: Value) -> Result<Value, ConversationError> {
        Ok(match value {
            Value::String(text) => self.escape(&text)?.into(),
            Value::Array(items) => items.into_iter().map(|item| self.escape_value(item)).collect::<Result<_, _>>()?,
            Value::Object(map) => Value::Object(self.escape_map(map)?),
            value => value,
        })
    }

    /// Whether a character is a placeholder, a mark or a digit of one.
    fn is_reserved(&self, character: char) -> bool {
        self.placeholder_index(character).is_some() || MARKS.contains(&character) || MARK_DIGITS.contains(&character)
    }

    /// The escape of a reserved character of a message; `None` for a placeholder that has none.
    fn escape_reserved(&self, character: char) -> Option<char> {
        match self.placeholder_index(character) {
            Some(index) => {
                u32::try_from(index).ok().filter(|&index| index < ESCAPED_COUNT).map(|index| FIRST_ESCAPED + index)
            }
            None => Some(FIRST_ESCAPED_MARK + (u32::from(character) & 0xFF)),
        }
        .and_then(char::from_u32)
    }

    /// The inverse of [`escape_reserved`](Self::escape_reserved); `None` for all other characters.
    fn unescape_reserved(&self, character: char) -> Option<char> {
        let number = u32::from(character);
        let reserved = match number {
            FIRST_ESCAPED..FIRST_ESCAPED_MARK => FIRST_PLACEHOLDER + (number - FIRST_ESCAPED),
            FIRST_ESCAPED_MARK..FIRST_PLACEHOLDER => 0x10_FF00 + (number - FIRST_ESCAPED_MARK),
            _ => return None,
        };
        char::from_u32(reserved).filter(|&reserved| self.is_reserved(reserved))
    }

    fn escape(&self, text: &str) -> Result<String, ConversationError> {
        // The message's own reserved characters come first, so that they differ from the placeholders that are added below.
        // Nearly all texts have none, and are not copied.
        let is_private = |character: char| u32::from(character) >= FIRST_ESCAPED;
        let text = match text.contains(is_private) {
            false => Cow::Borrowed(text),
            true => {
                let escaped = |character: char| match self.is_reserved(character) {
                    true => self.escape_reserved(character).ok_or(character),
                    false if self.unescape_reserved(character).is_some() => Err(character),
                    false => Ok(character),
                };
                let escaped: Result<String, char> = text.chars().map(escaped).collect();
                Cow::Owned(escaped.map_err(|character| ConversationError::ReservedCharacter { character })?)
            }
        };
        let text = text.as_ref();
        let mut escaped = String::with_capacity(text.len());
        let mut end = 0;
        for found in self.special.find_iter(text) {
            escaped.push_str(&text[end..found.start()]);
            escaped.extend(char::from_u32(FIRST_PLACEHOLDER + found.pattern().as_u32()));
            end = found.end();
        }
        escaped.push_str(&text[end..]);
        Ok(escaped)
    }

    fn placeholder_index(&self, character: char) -> Option<usize> {
        let index = u32::from(character).checked_sub(FIRST_PLACEHOLDER)? as usize;
        (index < self.names.len()).then_some(index)
    }

    /// Appends the tokens of an escaped text to `tokens`.
    pub(super) fn encode(&self, tokenizer: &Tokenizer, text: &str, tokens: &mut Vec<u32>) -> Result<(), ChatError> {
        let ordinary = |text: &str, tokens: &mut Vec<u32>| -> Result<(), ChatError> {
            if !text.is_empty() {
                let text = self.unescape(text);
                // A SentencePiece tokenizer adds a space at the start of a text, which is only before the first piece.
                let first = tokens.is_empty();
                tokens.extend(if first { tokenizer.encode(&text)? } else { tokenizer.encode_continuation(&text)? });
            }
            Ok(())
        };
        for piece in tokenizer.split_special(text) {
            match piece {
                Piece::Text(text) => ordinary(text, tokens)?,
                Piece::Token(token) => tokens.push(token),
            }
        }
        Ok(())
    }

    fn unescape(&self, text: &str) -> String {
        let mut plain = String::with_capacity(text.len());
        for character in text.chars() {
            match self.placeholder_index(character) {
                Some(index) => plain.push_str(&self.names[index].0),
                None => plain.push(self.unescape_reserved(character).unwrap_or(character)),
            }
        }
        plain
    }
}
