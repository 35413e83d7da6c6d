//! Marks: numbered private-use characters around the texts of a message, which show their positions in a template's output.
//!
//! A marked text is [`MARKS`]`[0]`, the digits of a number, the text, and `MARKS[1]`. Templates compare or measure some
//! fields and split others. This module decides which fields are not marked, and where a text is cut.

use std::ops::Range;

use serde_json::Value;

use super::Fields;
use crate::chat::special_tokens::{MARK_DIGITS, MARKS};

/// Fields of a message, at any depth, that templates compare but do not write.
const COMPARED_FIELDS: [&str; 3] = ["role", "type", "index"];
/// Fields that some templates write and others compare or measure (Mistral's check the length of ids).
const ID_FIELDS: [&str; 2] = ["id", "tool_call_id"];

/// Which texts of a message are marked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum MarkedFields<'a> {
    All,
    /// All but [`ID_FIELDS`].
    NoIds,
    /// All but [`ID_FIELDS`] and the content.
    NoContent,
    Only(&'a str),
    /// No text; an empty mark is put at the end of the content.
    ContentEnd,
}

/// Marks each text of a message with a different number.
pub(super) struct Marker<'a> {
    /// The number of the next text. Texts that are not marked also take a number, so that the number of a text does not
    /// depend on `fields`.
    pub(super) next: usize,
    pub(super) fields: MarkedFields<'a>,
    /// The strings at which the template splits texts: [`split_markers`](crate::chat::ChatTemplate::split_markers).
    pub(super) split_markers: &'a [String],
}

impl Marker<'_> {
    pub(super) fn mark(&mut self, message: &mut Fields) {
        // The content comes last, because blank content is marked only if there is no other text.
        let first = self.next;
        for (name, value) in message.iter_mut().filter(|(name, _)| name.as_str() != "content") {
            let wanted = match self.fields {
                MarkedFields::All | MarkedFields::NoIds | MarkedFields::NoContent => true,
                MarkedFields::Only(field) => field == name,
                MarkedFields::ContentEnd => false,
            };
            self.mark_field(name, value, wanted);
        }
        let wanted = matches!(self.fields, MarkedFields::All | MarkedFields::NoIds | MarkedFields::Only("content"));
        match message.get_mut("content") {
            Some(Value::String(text)) if self.fields == MarkedFields::ContentEnd => {
                let end = text.len()..text.len();
                *text = with_marks(text, std::slice::from_ref(&end), |_| encode_number(self.next));
                self.next += 1;
            }
            // Templates test whether content is blank, and a mark would change the answer.
            Some(Value::String(text)) if self.next == first || !text.trim().is_empty() => self.mark_text(text, wanted),
            Some(parts @ Value::Array(_)) => self.mark_value(parts, wanted),
            _ => {}
        }
    }

    fn mark_field(&mut self, name: &str, value: &mut Value, wanted: bool) {
        if !COMPARED_FIELDS.contains(&name) {
            self.mark_value(value, wanted && (self.fields == MarkedFields::All || !ID_FIELDS.contains(&name)));
        }
    }

    fn mark_value(&mut self, value: &mut Value, wanted: bool) {
        match value {
            Value::String(text) if !text.trim().is_empty() => self.mark_text(text, wanted),
            Value::Array(items) => items.iter_mut().for_each(|item| self.mark_value(item, wanted)),
            Value::Object(map) => map.iter_mut().for_each(|(name, value)| self.mark_field(name, value, wanted)),
            _ => {}
        }
    }

    fn mark_text(&mut self, text: &mut String, wanted: bool) {
        let pieces = split_pieces(text, self.split_markers);
        if wanted {
            *text = with_marks(text, &pieces, |index| encode_number(self.next + index));
        }
        self.next += pieces.len();
    }
}

/// Marks the content of a message, or all its other texts if the content is blank, with the same `number`. Returns the white
/// space before and after the content, which templates may trim.
pub(super) fn mark_message(
    message: &mut Fields,
    number: &str,
    ids: bool,
    split_markers: &[String],
) -> (String, String) {
    match message.get_mut("content") {
        Some(Value::String(text)) if !text.trim().is_empty() => mark_text(text, number, split_markers),
        _ => {
            let before = message.clone();
            for (name, value) in message.iter_mut().filter(|(name, _)| name.as_str() != "content") {
                mark_field(name, value, number, ids, split_markers);
            }
            if *message == before
                && let Some(Value::String(text)) = message.get_mut("content")
            {
                return mark_text(text, number, split_markers);
            }
            (String::new(), String::new())
        }
    }
}

fn mark_field(name: &str, value: &mut Value, number: &str, ids: bool, split_markers: &[String]) {
    if !COMPARED_FIELDS.contains(&name) && (ids || !ID_FIELDS.contains(&name)) {
        mark_value(value, number, ids, split_markers);
    }
}

fn mark_value(value: &mut Value, number: &str, ids: bool, split_markers: &[String]) {
    match value {
        Value::String(text) if !text.trim().is_empty() => drop(mark_text(text, number, split_markers)),
        Value::Array(items) => items.iter_mut().for_each(|item| mark_value(item, number, ids, split_markers)),
        Value::Object(map) => {
            map.iter_mut().for_each(|(name, value)| mark_field(name, value, number, ids, split_markers));
        }
        _ => {}
    }
}

/// Marks the pieces of a text, and returns the parts before the first and after the last.
fn mark_text(text: &mut String, number: &str, split_markers: &[String]) -> (String, String) {
    let pieces = split_pieces(text, split_markers);
    let around = (text[..pieces[0].start].to_owned(), text[pieces[pieces.len() - 1].end..].to_owned());
    *text = with_marks(text, &pieces, |_| number.to_owned());
    around
}

/// A copy of a text with a mark around each of `pieces`.
fn with_marks(text: &str, pieces: &[Range<usize>], number: impl Fn(usize) -> String) -> String {
    let mut marked = String::with_capacity(text.len() + 16 * pieces.len());
    let mut end = 0;
    for (index, piece) in pieces.iter().enumerate() {
        marked.push_str(&text[end..piece.start]);
        marked.push(MARKS[0]);
        marked.push_str(&number(index));
        marked.push_str(&text[piece.clone()]);
        marked.push(MARKS[1]);
        end = piece.end;
    }
    marked.push_str(&text[end..]);
    marked
}

/// The parts of a text between `split_markers`, without the white space around them, which templates trim. A text of nothing
/// but white space and markers has one empty piece, at its end.
pub(super) fn split_pieces(text: &str, split_markers: &[String]) -> Vec<Range<usize>> {
    let mut pieces = Vec::new();
    let mut start = 0;
    while start <= text.len() {
        let next =
            split_markers.iter().filter_map(|marker| Some((text[start..].find(marker.as_str())?, marker.len()))).min();
        let end = next.map_or(text.len(), |(at, _)| start + at);
        let part = &text[start..end];
        if !part.trim().is_empty() {
            let inner = start + part.len() - part.trim_start().len();
            pieces.push(inner..inner + part.trim().len());
        }
        let Some((_, length)) = next else { break };
        start = end + length;
    }
    if pieces.is_empty() {
        pieces.push(text.len()..text.len());
    }
    pieces
}

/// A number in base 8, in the private-use characters [`MARK_DIGITS`], which mean nothing to a template.
pub(super) fn encode_number(mut number: usize) -> String {
    let mut digits = vec![MARK_DIGITS[number % MARK_DIGITS.len()]];
    while number >= MARK_DIGITS.len() {
        number /= MARK_DIGITS.len();
        digits.push(MARK_DIGITS[number % MARK_DIGITS.len()]);
    }
    digits.iter().rev().collect()
}
