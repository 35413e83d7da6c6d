//! The positions of messages' texts in the output of a template.

use std::ops::Range;

use super::SpanFinder;
use super::marks::{MarkedFields, Marker};
use crate::chat::error::MAX_RENDERED_MESSAGES;
use crate::chat::special_tokens::{MARK_DIGITS, MARKS};
use crate::chat::template_input::TemplateInput;

/// The position of a message's text in the output.
#[derive(Debug, Clone)]
pub(super) struct Region {
    pub(super) message: usize,
    /// The number of the text among those of all marked messages.
    pub(super) text: usize,
    /// In bytes of the unmarked output.
    pub(super) range: Range<usize>,
}

/// The regions of a conversation, in the order of the output.
#[derive(Debug)]
pub(in crate::chat) struct Regions {
    pub(super) found: Vec<Region>,
    /// Messages whose regions are not known, because the template writes them differently when they are marked.
    pub(super) unmarkable: Vec<usize>,
}

impl Regions {
    /// A message other than `turn` that has text in `span`.
    pub(super) fn other_message_within(&self, turn: usize, span: &Range<usize>) -> Option<usize> {
        let first = self.found.partition_point(|region| region.range.end <= span.start);
        let within = self.found[first..].iter().take_while(|region| region.range.start < span.end);
        within.filter(|region| !region.range.is_empty()).map(|region| region.message).find(|&message| message != turn)
    }

    /// The end of the last text of another message before a position; 0 if there is none.
    pub(super) fn end_before(&self, turn: usize, position: usize) -> usize {
        let before = self.found.partition_point(|region| region.range.end <= position);
        let other = self.found[..before].iter().rfind(|region| region.message != turn);
        other.map_or(0, |region| region.range.end)
    }

    /// The start of the first text of another message after a position.
    pub(super) fn start_after(&self, turn: usize, position: usize) -> Option<usize> {
        let after = self.found.partition_point(|region| region.range.start < position);
        self.found[after..].iter().find(|region| region.message != turn).map(|region| region.range.start)
    }
}

impl SpanFinder<'_> {
    /// The regions of the first `messages` messages in their rendering `text`.
    pub(in crate::chat) fn regions(&self, input: &TemplateInput, messages: usize, text: &str) -> Regions {
        let all: Vec<usize> = (0..messages).collect();
        for fields in [MarkedFields::All, MarkedFields::NoIds] {
            if let Some(found) = self.marked_regions(input, messages, text, &all, fields) {
                return Regions { found, unmarkable: Vec::new() };
            }
        }
        // Some message cannot be marked, because the template inspects its text. The others are marked one at a time, unless
        // that takes too many renderings. Each message takes several, one for each set of fields that is tried.
        if messages.saturating_mul(messages) > MAX_RENDERED_MESSAGES / 8 {
            return Regions { found: Vec::new(), unmarkable: all };
        }
        let mut regions = Regions { found: Vec::new(), unmarkable: Vec::new() };
        for index in all {
            match self.message_regions(input, messages, text, index) {
                Some(found) => regions.found.extend(found),
                None => regions.unmarkable.push(index),
            }
        }
        regions.found.sort_by_key(|region| (region.range.start, region.range.end));
        regions
    }

    /// The regions of one message, with as many of its fields marked as the template allows; `None` if it allows none.
    pub(super) fn message_regions(
        &self,
        input: &TemplateInput,
        messages: usize,
        text: &str,
        index: usize,
    ) -> Option<Vec<Region>> {
        let fields = input.messages[index].keys().map(|name| MarkedFields::Only(name));
        let large = [MarkedFields::All, MarkedFields::NoIds, MarkedFields::Only("content"), MarkedFields::NoContent];
        let mut kept = None;
        for fields in large.into_iter().chain(fields) {
            if let Some(found) = self.marked_regions(input, messages, text, &[index], fields) {
                if !found.is_empty() {
                    return Some(found);
                }
                kept = Some(found);
            }
        }
        kept
    }

    /// The empty region at the end of a message's content, for a message whose text the template does not write.
    pub(super) fn content_end(
        &self,
        input: &TemplateInput,
        messages: usize,
        text: &str,
        index: usize,
    ) -> Option<Vec<Region>> {
        self.marked_regions(input, messages, text, &[index], MarkedFields::ContentEnd)
    }

    /// The regions of the `marked` messages; `None` if the template does not keep the marks, or if its output without them
    /// is not `text`.
    fn marked_regions(
        &self,
        input: &TemplateInput,
        messages: usize,
        text: &str,
        marked: &[usize],
        fields: MarkedFields<'_>,
    ) -> Option<Vec<Region>> {
        let split_markers = self.template.split_markers();
        let mut values = input.values[..messages].to_vec();
        // For each number, the message and the index of the text in it.
        let mut numbers: Vec<(usize, usize)> = Vec::new();
        for &index in marked {
            let mut message = input.messages[index].clone();
            let mut marker = Marker { next: numbers.len(), fields, split_markers: &split_markers };
            marker.mark(&mut message);
            numbers.extend((0..marker.next - numbers.len()).map(|number| (index, number)));
            values[index] = input.value(&message);
        }
        // A template that fails at a marked text does not keep the marks.
        let marked = self.template.render_input(input, &values, false, ["", ""]).ok()?;
        let mut plain = String::with_capacity(text.len());
        let mut open: Option<Region> = None;
        let mut found = Vec::new();
        let mut characters = marked.chars().peekable();
        while let Some(character) = characters.next() {
            if character == MARKS[0] {
                let mut number = 0usize;
                while let Some(digit) = characters.next_if(|digit| MARK_DIGITS.contains(digit)) {
                    let digit = MARK_DIGITS.iter().position(|&other| other == digit)?;
                    number = number.checked_mul(MARK_DIGITS.len())?.checked_add(digit)?;
                }
                let &(message, text) = numbers.get(number)?;
                if open.replace(Region { message, text, range: plain.len()..plain.len() }).is_some() {
                    return None;
                }
            } else if character == MARKS[1] {
                let mut region = open.take()?;
                region.range.end = plain.len();
                found.push(region);
            } else {
                plain.push(character);
            }
        }
        (plain == text && open.is_none()).then_some(found)
    }
}
