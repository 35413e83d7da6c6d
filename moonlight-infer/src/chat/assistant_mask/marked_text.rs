//! Method 3: the span around the marked texts of a turn, for templates that rewrite earlier turns.
//!
//! The positions of the turn's texts are known ([`Regions`]). The template also writes something before the first and after
//! the last of them. How much of it belongs to the turn is found by comparison with two renderings that end with the turn:
//! the prompt for it, and the conversation up to it.

use std::collections::HashMap;
use std::ops::Range;

use serde_json::Value;

use super::marks::split_pieces;
use super::regions::{Region, Regions};
use super::{Fields, SpanFinder, span_not_found};
use crate::chat::ChatError;
use crate::chat::template_input::TemplateInput;

impl SpanFinder<'_> {
    /// The span of a turn. `prompt` is the conversation before the turn with the generation prompt, and `up_to_turn` the
    /// conversation up to and including the turn; each is `None` if the template does not render it.
    pub(super) fn span_by_marks(
        &self,
        input: &TemplateInput,
        turn: usize,
        text: &str,
        [prompt, up_to_turn]: [Option<&str>; 2],
        regions: &Regions,
    ) -> Result<Range<usize>, ChatError> {
        if let Some(other) = regions.unmarkable.iter().find(|other| **other != turn) {
            let problem = format!(
                "the template rewrites the conversation, and changes or splits the text of message {}",
                other + 1
            );
            return Err(span_not_found(turn, &problem));
        }
        let last = turn + 1 == input.messages.len();
        let turn_regions: Vec<Region> = regions.found.iter().filter(|region| region.message == turn).cloned().collect();
        let unwritten = turn_regions.is_empty();
        let turn_regions = match unwritten {
            true => self.content_end(input, input.messages.len(), text, turn).unwrap_or_default(),
            false => turn_regions,
        };
        let as_last = up_to_turn.filter(|_| !last).and_then(|up_to_turn| match unwritten {
            true => self.content_end(input, turn + 1, up_to_turn, turn),
            false => self.message_regions(input, turn + 1, up_to_turn, turn),
        });
        // A text of the turn may be written again in a later message: the header of a tool's answer may name the function
        // that was called. Only as many occurrences as there are when the turn is the last belong to the turn.
        let mut occurrences: HashMap<usize, usize> = HashMap::new();
        let mut own: Vec<(&Region, usize)> = Vec::new();
        for region in &turn_regions {
            let occurrence = occurrences.entry(region.text).or_default();
            *occurrence += 1;
            let is_own =
                |as_last: &Vec<Region>| as_last.iter().filter(|other| other.text == region.text).count() >= *occurrence;
            if as_last.as_ref().is_none_or(is_own) {
                own.push((region, *occurrence));
            }
        }
        let (Some((first, _)), Some(&(end, occurrence))) = (own.first(), own.last()) else {
            return Err(span_not_found(turn, "the template rewrites the conversation, and changes or splits the text"));
        };
        let texts = first.range.start..end.range.end;
        if let Some(other) = regions.other_message_within(turn, &texts) {
            return Err(span_not_found(turn, &format!("the text of message {} is within it", other + 1)));
        }
        let previous = regions.end_before(turn, texts.start);
        let before = self.render(input, turn, false).ok();
        let before = before.as_deref();
        let lead = self.unmarked_lead(&input.messages[turn]);
        let mut start = texts.start;
        if let Some(found) = self.span_start(input, turn, text, [before, prompt], previous..texts.start) {
            start = found;
        } else if text[previous..texts.start].ends_with(lead) && !lead.trim().is_empty() {
            // The content starts with a tag, which is not marked.
            start -= lead.len();
        }
        let rest = &text[texts.end..regions.start_after(turn, texts.end).unwrap_or(text.len())];
        let tail = match &as_last {
            _ if last => Some(rest),
            Some(as_last) => {
                let mut same = as_last.iter().filter(|other| other.text == end.text);
                same.nth(occurrence - 1).and_then(|same| Some(&up_to_turn?[same.range.end..]))
            }
            None => None,
        };
        Ok(start..texts.end + tail.map_or(0, |tail| self.tail_length(tail, rest, prompt.zip(before))))
    }

    /// The start of a turn's span: the position where the output stops matching the prompt for the turn. `gap` is the output
    /// between the last text of the message before and the first of the turn. The attempts that assume least come first.
    fn span_start(
        &self,
        input: &TemplateInput,
        turn: usize,
        text: &str,
        [before, prompt]: [Option<&str>; 2],
        gap: Range<usize>,
    ) -> Option<usize> {
        let prompt = prompt?;
        if prompt.len() <= gap.end && text.starts_with(prompt) {
            return Some(prompt.len());
        }
        let before = before?;
        let generation_prompt = prompt.strip_prefix(before)?;
        if text.starts_with(before) && before.len() >= gap.start {
            let length = self.common_prefix(prompt, &text[..gap.end]);
            if length > before.len() {
                return Some(length);
            }
        }
        // Earlier turns are rewritten, so compare only what follows the last text before the turn.
        let last_text =
            self.regions(input, turn, before).found.iter().map(|region| region.range.end).max().unwrap_or(0);
        let gap_text = &text[gap.clone()];
        let length = self.common_prefix(&prompt[last_text..], gap_text);
        let end_of_before = before.len() - last_text;
        if length > end_of_before || length == prompt.len() - last_text {
            return Some(gap.start + length);
        }
        // The message before may end differently when it is the last, so look for the generation prompt anywhere in the gap.
        let matches =
            gap_text.char_indices().map(|(at, _)| (self.common_prefix(generation_prompt, &gap_text[at..]), at));
        let header = matches.max().filter(|&(length, _)| {
            let is_header = length == generation_prompt.len()
                || self.specials.first_special(generation_prompt).is_some_and(|special| special.end <= length);
            is_header && !generation_prompt.trim().is_empty()
        });
        if let Some((length, at)) = header {
            return Some(gap.start + at + length);
        }
        // The turn has no header, or one that differs from the generation prompt: compare with the header of a plain answer.
        let header = self.up_to_plain_answer(input, turn)?;
        let length = self.common_prefix(header.strip_prefix(before).map(|_| &header[last_text..])?, gap_text);
        let starts = length > 0 && (length >= end_of_before || generation_prompt.trim().is_empty());
        starts.then_some(gap.start + length)
    }

    /// The number of bytes of `rest`, the output after the texts of a turn, that belong to the turn. `tail` is the output
    /// after these texts when the turn is the last; `prompt` is the prompt for the turn and the conversation before it.
    fn tail_length(&self, tail: &str, rest: &str, prompt: Option<(&str, &str)>) -> usize {
        let tail = &tail[..self.specials.end_of_last_special(tail).unwrap_or(tail.trim_end().len())];
        if rest.starts_with(tail) {
            return tail.len();
        }
        if let Some(end) = self.specials.special_at_start(rest) {
            if tail.starts_with(&rest[..end]) {
                return end;
            }
            // The last turn may end with a different token (gpt-oss writes `<|return|>` there, and `<|end|>` elsewhere). The
            // token belongs to the turn if the header of a message follows it.
            let generation_prompt =
                prompt.and_then(|(prompt, before)| prompt.strip_prefix(before)).unwrap_or_default().trim_start();
            let header = self.specials.first_special(generation_prompt).filter(|special| special.start == 0);
            let header = header.map(|special| &generation_prompt[special]);
            let is_header = |text: &str| header.is_some_and(|header| text.trim_start().starts_with(header));
            if self.specials.special_at_start(tail).is_some() && is_header(&rest[end..]) && !is_header(rest) {
                return end;
            }
        }
        let length = self.common_prefix(tail, rest);
        tail[..length].trim_end().len()
    }

    /// The length of the common prefix of two texts. A tag, a special token or a word that is only partly the same does not
    /// belong to it.
    fn common_prefix(&self, one: &str, other: &str) -> usize {
        let same = one.chars().zip(other.chars()).take_while(|(one, other)| one == other);
        let mut length: usize = same.map(|(character, _)| character.len_utf8()).sum();
        if length == one.len() || length == other.len() {
            return length;
        }
        for text in [one, other] {
            if let Some(start) = self.specials.start_of_special_at(text, length) {
                length = start;
            }
        }
        for [begin, end] in [['<', '>'], ['[', ']']] {
            let open = one[..length].rfind(begin).filter(|&open| !one[open..length].contains(end));
            length = open.unwrap_or(length);
        }
        let in_word = |text: &str| text[length..].starts_with(char::is_alphanumeric);
        if in_word(one) || in_word(other) {
            length = one[..length].trim_end_matches(char::is_alphanumeric).len();
        }
        length
    }

    /// The part of the content before the first marked piece.
    fn unmarked_lead<'a>(&self, message: &'a Fields) -> &'a str {
        let content = message.get("content").and_then(Value::as_str).unwrap_or_default();
        &content[..split_pieces(content, &self.template.split_markers())[0].start]
    }
}
