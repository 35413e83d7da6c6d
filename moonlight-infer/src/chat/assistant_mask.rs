//! The assistant mask: which parts of a rendered conversation the assistant said, and are learned.
//!
//! A template is a program, and does not say which of its output came from which message. Three methods are tried in turn:
//!
//! 1. `{% generation %}` blocks say it themselves. What they hold is learned, to the letter, as in transformers'
//!    `apply_chat_template(return_assistant_tokens_mask=True)`.
//! 2. The conversation before a turn, with the prompt for the assistant, is what the model will be given; where the whole
//!    text begins with it, what follows is what the model must say, tool calls and reasoning included. It ends with the last
//!    special token of the turn (`<|im_end|>`); white space that the template puts after it is not learned.
//! 3. A template may rewrite earlier turns when others follow (most drop what was thought), so that no text begins with
//!    another. Then the texts of all messages (content, reasoning, names and arguments of calls) are written between
//!    numbered marks of a private plane ([`Regions`]), so that it is known where those of the turn are, and where those of
//!    the messages around it end and begin. The turn begins where what stands before its words is no longer what the prompt
//!    for it has behind the words of the message before. It ends as the same turn does when it is the last one.
//!
//! A text that a template cuts, as it does thoughts within the content (`<think>...</think>`), is marked on either side of
//! the cut: what the template writes of a turn is learned, and what it drops is not.
//!
//! No method is trusted with the words of others: where those of another message lie within a part that would be learned,
//! the conversation is refused.
//!
//! Whether a method applies is decided by comparing texts, never guessed.
//!
//! The second and third render the conversation up to a turn, for each turn: of a long conversation that is too much. There
//! ([`EXACT`]) all turns are marked in one rendering, some of them go through the methods, and the others must look the same:
//! the same text before the part that is learned, the same between its ends and the words ([`Pattern`]), among turns that
//! hold the same fields. Where one does not it goes through the methods itself, and where many do not all do, up to a limit.

use std::collections::HashMap;
use std::ops::Range;

use serde_json::{Map, Value};

use super::ChatError;
use super::encoder::{MARK_DIGITS, SpanFinder, MARKS};
use super::error::MAX_RENDERED_MESSAGES;
use super::template_input::TemplateInput;

/// The assistant's turns of a conversation that all go through the methods.
pub(super) const EXACT: usize = 32;
/// Turns of a longer one that do, beside the first and the last.
const SAMPLES: usize = 8;
/// Turns that may look unlike the samples.
const ODD: usize = 16;
/// Bytes before the part that is learned that must be the same in all turns, at most.
const CONTEXT: usize = 256;
/// Fields of a message, at any depth, that templates compare rather than write.
const COMPARED: [&str; 3] = ["role", "type", "index"];
/// Those that some write, and some compare or measure.
const IDS: [&str; 2] = ["id", "tool_call_id"];

/// A message as JSON.
type Fields = Map<String, Value>;

impl SpanFinder<'_> {
    /// The text of a conversation and, for each message of the assistant's in order, the part of it that is learned; for
    /// each `{% generation %}` block where the template has such.
    ///
    /// The words must be disguised: whatever looks like a special token is the template's.
    pub(super) fn spans(&self, given: &TemplateInput) -> Result<(String, Vec<Range<usize>>), ChatError> {
        let turns = turns_of(given);
        if self.template.has_generation_blocks() {
            return self.generation_blocks(given, &turns);
        }
        let text = self.render(given, given.messages.len(), false)?;
        let regions = self.regions(given, given.messages.len(), &text);
        let spans = match turns.len() > EXACT {
            true => self.spans_by_pattern(given, &turns, &text, &regions)?,
            false => None,
        };
        let spans = match spans {
            Some(spans) => spans,
            None => self.spans_one_by_one(given, &turns, &text, &regions)?,
        };
        for (index, &turn) in turns.iter().enumerate() {
            if index > 0 && spans[index].start < spans[index - 1].end {
                return Err(no_span(turn, "they overlap those of an earlier message"));
            }
            if let Some(other) = regions.others_within(turn, &spans[index]) {
                return Err(no_span(turn, &format!("the words of message {} lie among them", other + 1)));
            }
        }
        Ok((text, spans))
    }

    /// The text of the first messages.
    fn render(&self, given: &TemplateInput, messages: usize, add_generation_prompt: bool) -> Result<String, ChatError> {
        self.template.render_input(given, &given.values[..messages], add_generation_prompt, ["", ""])
    }

    /// The text of the first messages with some of them changed.
    fn render_changed(
        &self,
        given: &TemplateInput,
        messages: usize,
        changed: impl IntoIterator<Item = (usize, Fields)>,
    ) -> Result<String, ChatError> {
        let mut values = given.values[..messages].to_vec();
        for (index, message) in changed {
            values[index] = given.value(&message);
        }
        self.template.render_input(given, &values, false, ["", ""])
    }

    /// Each turn by the second method, or else the third.
    pub(super) fn spans_one_by_one(
        &self,
        given: &TemplateInput,
        turns: &[usize],
        text: &str,
        regions: &Regions,
    ) -> Result<Vec<Range<usize>>, ChatError> {
        let messages = given.messages.len();
        if turns.len().saturating_mul(messages) > MAX_RENDERED_MESSAGES {
            return Err(ChatError::TooManyTurns { turns: turns.len(), messages });
        }
        turns.iter().map(|&turn| Ok(self.exact_span(given, turn, text, regions)?.0)).collect()
    }

    /// The part of a turn by the second method, or else the third; and whether it was the second.
    fn exact_span(
        &self,
        given: &TemplateInput,
        turn: usize,
        text: &str,
        regions: &Regions,
    ) -> Result<(Range<usize>, bool), ChatError> {
        // A template may refuse a conversation without a user; that is no fault of the conversation.
        let prompt = self.prompt(given, turn);
        let last = turn + 1 == given.messages.len();
        let upto = if last { Some(text.to_owned()) } else { self.render(given, turn + 1, false).ok() };
        if let (Some(prompt), Some(upto)) = (&prompt, &upto)
            && let Some(span) = self.after_prompt(text, prompt, upto)
        {
            return Ok((span, true));
        }
        let span = self.between_marks(given, turn, text, [prompt.as_deref(), upto.as_deref()], regions)?;
        Ok((span, false))
    }

    /// The conversation before a turn and what asks for it: where the template cannot be asked, the header that it writes
    /// before a plain answer.
    fn prompt(&self, given: &TemplateInput, turn: usize) -> Option<String> {
        if self.template.has_generation_prompt() {
            return self.render(given, turn, true).ok();
        }
        let header = self.plain_header(given, turn)?;
        // White space before the answer is no header: the model must write it.
        let before = self.render(given, turn, false).ok();
        let white =
            |before: &String| header.strip_prefix(before.as_str()).is_some_and(|header| header.trim().is_empty());
        Some(before.filter(white).unwrap_or(header))
    }

    /// The conversation before a turn, and what is written before the words of a plain answer.
    fn plain_header(&self, given: &TemplateInput, turn: usize) -> Option<String> {
        let words = format!("{}x{}", MARKS[0], MARKS[1]);
        let plain = Fields::from_iter([("role".into(), "assistant".into()), ("content".into(), words.into())]);
        let mut values = given.values[..turn].to_vec();
        values.push(given.value(&plain));
        let marked = self.template.render_input(given, &values, false, ["", ""]).ok()?;
        Some(marked[..marked.find(MARKS[0])?].to_owned())
    }

    /// The parts of all turns from those of some; `None` where the template does not make all turns alike.
    pub(super) fn spans_by_pattern(
        &self,
        given: &TemplateInput,
        turns: &[usize],
        text: &str,
        regions: &Regions,
    ) -> Result<Option<Vec<Range<usize>>>, ChatError> {
        let words = self.all_marked(given, turns, text, true).or_else(|| self.all_marked(given, turns, text, false));
        let Some(words) = words else { return Ok(None) };
        let mut spans: Vec<Option<Range<usize>>> = vec![None; turns.len()];
        let last = turns.len() - 1;
        // A template may treat the first and the last in a way of their own.
        for index in [0, last] {
            spans[index] = Some(self.exact_span(given, turns[index], text, regions)?.0);
        }
        let mut kinds: HashMap<Vec<&str>, Vec<usize>> = HashMap::new();
        for index in 1..last {
            if !words[index].is_blank() {
                kinds.entry(kind_of(&given.messages[turns[index]])).or_default().push(index);
            }
        }
        let mut patterns: HashMap<Vec<&str>, Vec<Pattern>> = HashMap::new();
        for (kind, indices) in kinds {
            let known = patterns.entry(kind).or_default();
            let samples = SAMPLES.min(indices.len());
            for index in (0..samples).map(|sample| indices[sample * indices.len() / samples]) {
                let (span, by_prompt) = self.exact_span(given, turns[index], text, regions)?;
                learn(known, Pattern::of(text, &span, &words[index], by_prompt));
                spans[index] = Some(span);
            }
        }
        let mut odd = 0;
        for index in 0..turns.len() {
            if spans[index].is_some() {
                continue;
            }
            let known = patterns.entry(kind_of(&given.messages[turns[index]])).or_default();
            spans[index] = found(known, text, &words[index]);
            if spans[index].is_none() {
                odd += 1;
                if odd > ODD {
                    return Ok(None);
                }
                let (span, by_prompt) = self.exact_span(given, turns[index], text, regions)?;
                // What it shows of white space at the ends of words is worth knowing.
                learn(known, Pattern::of(text, &span, &words[index], by_prompt));
                spans[index] = Some(span);
            }
        }
        Ok(spans.into_iter().collect())
    }

    /// Where the words of all turns are in the text, by one rendering with numbered marks around them; `None` where the
    /// template does not keep the marks, or makes another text of marked words.
    fn all_marked(&self, given: &TemplateInput, turns: &[usize], text: &str, ids: bool) -> Option<Vec<Words>> {
        let mut words: Vec<Words> = Vec::with_capacity(turns.len());
        let mut changed = Vec::with_capacity(turns.len());
        let split_markers = self.template.split_markers();
        for (number, &turn) in turns.iter().enumerate() {
            let mut message = given.messages[turn].clone();
            let (before, after) = mark_words(&mut message, &in_digits(number), ids, &split_markers);
            words.push(Words { place: 0..0, before, after });
            changed.push((turn, message));
        }
        let marked = self.render_changed(given, given.messages.len(), changed).ok()?;
        let mut plain = String::with_capacity(text.len());
        let mut open: Option<usize> = None;
        let mut next = 0;
        let mut characters = marked.chars().peekable();
        while let Some(character) = characters.next() {
            if character == MARKS[0] {
                let mut number = String::new();
                while let Some(digit) = characters.next_if(|&digit| MARK_DIGITS.contains(&digit)) {
                    number.push(digit);
                }
                // The next turn, or another text of the last one.
                if open.is_some() || (number != in_digits(next) && (next == 0 || number != in_digits(next - 1))) {
                    return None;
                }
                if number == in_digits(next) {
                    words.get_mut(next)?.place.start = plain.len();
                    next += 1;
                }
                open = Some(next - 1);
            } else if character == MARKS[1] {
                words.get_mut(open.take()?)?.place.end = plain.len();
            } else {
                plain.push(character);
            }
        }
        (plain == text && next == turns.len() && open.is_none()).then_some(words)
    }

    fn generation_blocks(&self, given: &TemplateInput, turns: &[usize]) -> Result<(String, Vec<Range<usize>>), ChatError> {
        let marks = MARKS.map(String::from);
        let marked = self.template.render_input(given, &given.values, false, marks.each_ref().map(String::as_str))?;
        let mut text = String::with_capacity(marked.len());
        let mut blocks: Vec<Range<usize>> = Vec::new();
        let mut open = Vec::new();
        for character in marked.chars() {
            match MARKS.iter().position(|&mark| mark == character) {
                Some(0) => open.push(text.len()),
                Some(_) => {
                    let begin = open.pop().unwrap_or(text.len());
                    // A block within another is a part of it.
                    if open.is_empty() {
                        blocks.push(begin..text.len());
                    }
                }
                None => text.push(character),
            }
        }
        if blocks.is_empty() {
            let problem =
                format!("it has no `{{% generation %}}` blocks for {} messages of the assistant's", turns.len());
            return Err(no_span(turns.first().copied().unwrap_or(0), &problem));
        }
        Ok((text, blocks))
    }

    /// The second method; `None` where the whole text does not begin with that of the conversation up to the turn.
    fn after_prompt(&self, text: &str, prompt: &str, upto: &str) -> Option<Range<usize>> {
        if !text.starts_with(upto) || upto.len() == prompt.len() {
            return None;
        }
        let said = upto.strip_prefix(prompt)?;
        let length = self.end_of_last_special(said).unwrap_or(said.trim_end().len());
        Some(prompt.len()..prompt.len() + length)
    }

    /// The third method.
    fn between_marks(
        &self,
        given: &TemplateInput,
        turn: usize,
        text: &str,
        [prompt, upto]: [Option<&str>; 2],
        regions: &Regions,
    ) -> Result<Range<usize>, ChatError> {
        if let Some(other) = regions.unknown.iter().find(|other| **other != turn) {
            let problem =
                format!("it rewrites the conversation, and does not keep the words of message {} together", other + 1);
            return Err(no_span(turn, &problem));
        }
        let last = turn + 1 == given.messages.len();
        // The same turn where it is the last one. What is written once more behind it is another message's: the header of a
        // tool's answer may name the function that was called.
        let here: Vec<Region> = regions.found.iter().filter(|region| region.message == turn).cloned().collect();
        let unwritten = here.is_empty();
        let here = match unwritten {
            true => self.end_of(given, given.messages.len(), text, turn).unwrap_or_default(),
            false => here,
        };
        let alone = upto.filter(|_| !last).and_then(|upto| match unwritten {
            true => self.end_of(given, turn + 1, upto, turn),
            false => self.regions_of_one(given, turn + 1, upto, turn),
        });
        let mut times: HashMap<usize, usize> = HashMap::new();
        let mut own: Vec<(&Region, usize)> = Vec::new();
        for region in &here {
            let time = times.entry(region.text).or_default();
            *time += 1;
            let is_here = |alone: &Vec<Region>| alone.iter().filter(|other| other.text == region.text).count() >= *time;
            if alone.as_ref().is_none_or(is_here) {
                own.push((region, *time));
            }
        }
        let (Some((first, _)), Some(&(end, time))) = (own.first(), own.last()) else {
            return Err(no_span(turn, "it rewrites the conversation, and does not keep the words together"));
        };
        let words = first.place.start..end.place.end;
        if let Some(other) = regions.others_within(turn, &words) {
            return Err(no_span(turn, &format!("the words of message {} lie among them", other + 1)));
        }
        let previous = regions.end_before(turn, words.start);
        let before = self.render(given, turn, false).ok();
        let before = before.as_deref();
        let lead = self.lead(&given.messages[turn]);
        let mut start = words.start;
        if let Some(place) = self.start_in(given, turn, text, [before, prompt], previous..words.start) {
            start = place;
        } else if text[previous..words.start].ends_with(lead) && !lead.trim().is_empty() {
            // A tag that the content itself begins with.
            start -= lead.len();
        }
        let rest = &text[words.end..regions.start_behind(turn, words.end).unwrap_or(text.len())];
        let tail = match &alone {
            _ if last => Some(rest),
            Some(alone) => {
                let mut same = alone.iter().filter(|other| other.text == end.text);
                same.nth(time - 1).and_then(|same| Some(&upto?[same.place.end..]))
            }
            None => None,
        };
        Ok(start..words.end + tail.map_or(0, |tail| self.end_in(tail, rest, prompt.zip(before))))
    }

    /// Where a turn begins whose first words end the `gap` behind those of the message before: where it is no longer what the
    /// prompt for it is.
    fn start_in(
        &self,
        given: &TemplateInput,
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
        let asks = prompt.strip_prefix(before)?;
        if text.starts_with(before) && before.len() >= gap.start {
            let length = self.common(prompt, &text[..gap.end]);
            if length > before.len() {
                return Some(length);
            }
        }
        // The same of what follows the words before it.
        let words = self.regions(given, turn, before).found.iter().map(|region| region.place.end).max().unwrap_or(0);
        let gap_text = &text[gap.clone()];
        let length = self.common(&prompt[words..], gap_text);
        let known = before.len() - words;
        if length > known || length == prompt.len() - words {
            return Some(gap.start + length);
        }
        // The message before may end in another way where it is the last one.
        let starts = gap_text.char_indices().map(|(at, _)| (self.common(asks, &gap_text[at..]), at));
        let header = starts.max().filter(|&(length, _)| {
            let is_header =
                length == asks.len() || self.first_special(asks).is_some_and(|special| special.end <= length);
            is_header && !asks.trim().is_empty()
        });
        if let Some((length, at)) = header {
            return Some(gap.start + at + length);
        }
        // The turn has no header, or one of its own: that of a plain answer.
        let header = self.plain_header(given, turn)?;
        let length = self.common(header.strip_prefix(before).map(|_| &header[words..])?, gap_text);
        let begins = length > 0 && (length >= known || asks.trim().is_empty());
        begins.then_some(gap.start + length)
    }

    /// Where a turn ends in the `rest` behind its words, which has `tail` behind them where it is the last one.
    fn end_in(&self, tail: &str, rest: &str, prompt: Option<(&str, &str)>) -> usize {
        let tail = &tail[..self.end_of_last_special(tail).unwrap_or(tail.trim_end().len())];
        if rest.starts_with(tail) {
            return tail.len();
        }
        if let Some(end) = self.special_at_start(rest) {
            if tail.starts_with(&rest[..end]) {
                return end;
            }
            // Another token than that of the last turn, if a header follows it.
            let asks = prompt.and_then(|(prompt, before)| prompt.strip_prefix(before)).unwrap_or_default().trim_start();
            let header = self.first_special(asks).filter(|special| special.start == 0).map(|special| &asks[special]);
            let is_header = |text: &str| header.is_some_and(|header| text.trim_start().starts_with(header));
            if self.special_at_start(tail).is_some() && is_header(&rest[end..]) && !is_header(rest) {
                return end;
            }
        }
        let length = self.common(tail, rest);
        tail[..length].trim_end().len()
    }

    /// The length of what two texts begin with, without the beginning of a tag or a word that goes on differently.
    fn common(&self, one: &str, other: &str) -> usize {
        let same = one.chars().zip(other.chars()).take_while(|(one, other)| one == other);
        let mut length: usize = same.map(|(character, _)| character.len_utf8()).sum();
        if length == one.len() || length == other.len() {
            return length;
        }
        for text in [one, other] {
            if let Some(start) = self.start_of_special_at(text, length) {
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

    /// What stands in the content before the first text that is marked.
    fn lead<'a>(&self, message: &'a Fields) -> &'a str {
        let content = message.get("content").and_then(Value::as_str).unwrap_or_default();
        &content[..pieces(content, &self.template.split_markers())[0].start]
    }

    /// Where the texts of the first messages are in their text.
    pub(super) fn regions(&self, given: &TemplateInput, messages: usize, text: &str) -> Regions {
        let all: Vec<usize> = (0..messages).collect();
        for texts in [Texts::All, Texts::NoIds] {
            if let Some(found) = self.regions_of(given, messages, text, &all, texts) {
                return Regions { found, unknown: Vec::new() };
            }
        }
        // A template that looks into one of the messages may take the marks amiss there.
        if messages.saturating_mul(messages) > MAX_RENDERED_MESSAGES / 8 {
            return Regions { found: Vec::new(), unknown: all };
        }
        let mut regions = Regions { found: Vec::new(), unknown: Vec::new() };
        for index in all {
            match self.regions_of_one(given, messages, text, index) {
                Some(found) => regions.found.extend(found),
                None => regions.unknown.push(index),
            }
        }
        regions.found.sort_by_key(|region| (region.place.start, region.place.end));
        regions
    }

    /// Where the texts of a message are in the text of the first messages; `None` where the template does not keep the
    /// marks, or makes another text of marked words.
    fn regions_of_one(&self, given: &TemplateInput, messages: usize, text: &str, index: usize) -> Option<Vec<Region>> {
        let fields = given.messages[index].keys().map(|name| Texts::Field(name));
        let sets = [Texts::All, Texts::NoIds, Texts::Field("content"), Texts::Others].into_iter().chain(fields);
        let mut kept = None;
        for texts in sets {
            if let Some(found) = self.regions_of(given, messages, text, &[index], texts) {
                if !found.is_empty() {
                    return Some(found);
                }
                kept = Some(found);
            }
        }
        kept
    }

    /// Where the content of a message ends of which nothing is written.
    fn end_of(&self, given: &TemplateInput, messages: usize, text: &str, index: usize) -> Option<Vec<Region>> {
        self.regions_of(given, messages, text, &[index], Texts::End)
    }

    /// The same of several messages, of some of their texts.
    fn regions_of(
        &self,
        given: &TemplateInput,
        messages: usize,
        text: &str,
        marked: &[usize],
        texts: Texts<'_>,
    ) -> Option<Vec<Region>> {
        let split_markers = self.template.split_markers();
        let mut values = given.values[..messages].to_vec();
        let mut numbers: Vec<(usize, usize)> = Vec::new();
        for &index in marked {
            let mut message = given.messages[index].clone();
            let mut marker = Marker { next: numbers.len(), texts, split_markers: &split_markers };
            marker.mark(&mut message);
            numbers.extend((0..marker.next - numbers.len()).map(|number| (index, number)));
            values[index] = given.value(&message);
        }
        // A template that fails at marked words has not kept them.
        let marked = self.template.render_input(given, &values, false, ["", ""]).ok()?;
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
                if open.replace(Region { message, text, place: plain.len()..plain.len() }).is_some() {
                    return None;
                }
            } else if character == MARKS[1] {
                let mut region = open.take()?;
                region.place.end = plain.len();
                found.push(region);
            } else {
                plain.push(character);
            }
        }
        (plain == text && open.is_none()).then_some(found)
    }
}

/// Where a text of a message is in a text of the conversation.
#[derive(Debug, Clone)]
struct Region {
    message: usize,
    /// Its number among the texts of the message.
    text: usize,
    place: Range<usize>,
}

/// Where the texts of messages are in the text of the conversation, in its order.
#[derive(Debug)]
pub(super) struct Regions {
    found: Vec<Region>,
    /// Messages that the template makes another text of where they are marked.
    unknown: Vec<usize>,
}

impl Regions {
    /// Another message whose words lie in a part.
    fn others_within(&self, turn: usize, part: &Range<usize>) -> Option<usize> {
        let first = self.found.partition_point(|region| region.place.end <= part.start);
        let within = self.found[first..].iter().take_while(|region| region.place.start < part.end);
        within.filter(|region| !region.place.is_empty()).map(|region| region.message).find(|&message| message != turn)
    }

    /// Where the words of other messages end that stand before a place.
    fn end_before(&self, turn: usize, place: usize) -> usize {
        let before = self.found.partition_point(|region| region.place.end <= place);
        let other = self.found[..before].iter().rfind(|region| region.message != turn);
        other.map_or(0, |region| region.place.end)
    }

    /// Where the words of other messages begin that stand behind a place.
    fn start_behind(&self, turn: usize, place: usize) -> Option<usize> {
        let behind = self.found.partition_point(|region| region.place.start < place);
        self.found[behind..].iter().find(|region| region.message != turn).map(|region| region.place.start)
    }
}

/// Which texts of a message are marked.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Texts<'a> {
    All,
    /// All but what some templates compare or measure.
    NoIds,
    /// All but the content and those.
    Others,
    Field(&'a str),
    /// None but the place where the content ends.
    End,
}

/// Puts marks with numbers around texts.
struct Marker<'a> {
    /// The number of the next text; one that is not wanted has a number, too.
    next: usize,
    texts: Texts<'a>,
    split_markers: &'a [String],
}

impl Marker<'_> {
    fn mark(&mut self, message: &mut Fields) {
        let first = self.next;
        for (name, value) in message.iter_mut().filter(|(name, _)| name.as_str() != "content") {
            let wanted = match self.texts {
                Texts::All | Texts::NoIds | Texts::Others => true,
                Texts::Field(field) => field == name,
                Texts::End => false,
            };
            self.mark_field(name, value, wanted);
        }
        let wanted = matches!(self.texts, Texts::All | Texts::NoIds | Texts::Field("content"));
        match message.get_mut("content") {
            Some(Value::String(text)) if self.texts == Texts::End => {
                let end = text.len()..text.len();
                *text = with_marks(text, std::slice::from_ref(&end), |_| in_digits(self.next));
                self.next += 1;
            }
            // An empty one is marked if it is all there is.
            Some(Value::String(text)) if self.next == first || !text.trim().is_empty() => self.mark_text(text, wanted),
            Some(parts @ Value::Array(_)) => self.mark_value(parts, wanted),
            _ => {}
        }
    }

    fn mark_field(&mut self, name: &str, value: &mut Value, wanted: bool) {
        if !COMPARED.contains(&name) {
            self.mark_value(value, wanted && (self.texts == Texts::All || !IDS.contains(&name)));
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
        let pieces = pieces(text, self.split_markers);
        if wanted {
            *text = with_marks(text, &pieces, |index| in_digits(self.next + index));
        }
        self.next += pieces.len();
    }
}

/// The assistant's messages.
pub(super) fn turns_of(given: &TemplateInput) -> Vec<usize> {
    let is_assistant = |&index: &usize| given.messages[index].get("role").is_some_and(|role| role == "assistant");
    (0..given.messages.len()).filter(is_assistant).collect()
}

/// The fields of a message that hold something, and whether its content does.
fn kind_of(message: &Fields) -> Vec<&str> {
    let holds = |(name, value): (&String, &Value)| {
        name != "content" || value.as_str().is_none_or(|text| !text.trim().is_empty())
    };
    message.iter().filter(|(name, value)| holds((name, value))).map(|(name, _)| name.as_str()).collect()
}

/// Marks the words of a message: its content, or else what it has in place of it. Gives the white space around the content.
fn mark_words(message: &mut Fields, number: &str, ids: bool, split_markers: &[String]) -> (String, String) {
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
    if !COMPARED.contains(&name) && (ids || !IDS.contains(&name)) {
        mark_value(value, number, ids, split_markers);
    }
}

/// Marks the texts in a value.
fn mark_value(value: &mut Value, number: &str, ids: bool, split_markers: &[String]) {
    match value {
        Value::String(text) if !text.trim().is_empty() => drop(mark_text(text, number, split_markers)),
        Value::Array(items) => items.iter_mut().for_each(|item| mark_value(item, number, ids, split_markers)),
        Value::Object(map) => map.iter_mut().for_each(|(name, value)| mark_field(name, value, number, ids, split_markers)),
        _ => {}
    }
}

/// Puts marks around a text, within its white space and on either side of cuts; gives what stands before and behind them.
fn mark_text(text: &mut String, number: &str, split_markers: &[String]) -> (String, String) {
    let pieces = pieces(text, split_markers);
    let around = (text[..pieces[0].start].to_owned(), text[pieces[pieces.len() - 1].end..].to_owned());
    *text = with_marks(text, &pieces, |_| number.to_owned());
    around
}

/// A text with marks around its pieces, each with a number.
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

/// The parts of a text between the cuts, each within its white space, which templates trim; one that may be empty where all
/// is white.
fn pieces(text: &str, split_markers: &[String]) -> Vec<Range<usize>> {
    let mut pieces = Vec::new();
    let mut start = 0;
    while start <= text.len() {
        let next = split_markers.iter().filter_map(|cut| Some((text[start..].find(cut.as_str())?, cut.len()))).min();
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
        let end = if text.trim().is_empty() { text.len() - text.trim_start().len() } else { text.len() };
        pieces.push(end..end);
    }
    pieces
}

/// A number in characters that no template makes anything of.
fn in_digits(mut number: usize) -> String {
    let mut digits = vec![MARK_DIGITS[number % MARK_DIGITS.len()]];
    while number >= MARK_DIGITS.len() {
        number /= MARK_DIGITS.len();
        digits.push(MARK_DIGITS[number % MARK_DIGITS.len()]);
    }
    digits.iter().rev().collect()
}

/// Words in the text of a conversation, and the white space that the message has around them, kept or not.
struct Words {
    place: Range<usize>,
    before: String,
    after: String,
}

impl Words {
    /// Nothing but white space: whether it is learned depends on what follows.
    fn is_blank(&self) -> bool {
        self.place.is_empty() && !self.before.is_empty()
    }
}

/// How the part that is learned lies in a text, seen from the words.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pattern {
    by_prompt: bool,
    /// What stands before the part.
    context: String,
    /// From the part's beginning to the words, and whether the message's own white space follows it: what fits so far.
    leads: Vec<(String, bool)>,
    /// From the words, or the message's own white space behind them, to the part's end: what fits so far.
    tails: Vec<(String, bool)>,
}

impl Pattern {
    /// What one turn shows; `None` where the words are not in the part.
    fn of(text: &str, span: &Range<usize>, words: &Words, by_prompt: bool) -> Option<Self> {
        let lead = text.get(span.start..words.place.start)?;
        let tail = text.get(words.place.end..span.end)?;
        let own = |kept: Option<&str>, whole: &str| {
            let kept = kept.map(|rest| (rest.to_owned(), true));
            kept.into_iter().chain([(whole.to_owned(), false)]).collect()
        };
        let context = text.ceil_char_boundary(span.start.saturating_sub(CONTEXT));
        Some(Self {
            by_prompt,
            context: text[context..span.start].into(),
            leads: own(lead.strip_suffix(words.before.as_str()), lead),
            tails: own(tail.strip_prefix(words.after.as_str()), tail),
        })
    }

    /// What fits both.
    fn and(self, other: Self) -> Option<Self> {
        let common = self.context.chars().rev().zip(other.context.chars().rev()).take_while(|(a, b)| a == b);
        let length: usize = common.map(|(character, _)| character.len_utf8()).sum();
        let context = self.context[self.context.len() - length..].to_owned();
        let both = |ours: Vec<(String, bool)>, theirs: &[(String, bool)]| -> Vec<(String, bool)> {
            ours.into_iter().filter(|one| theirs.contains(one)).collect()
        };
        let leads = both(self.leads, &other.leads);
        let tails = both(self.tails, &other.tails);
        let fits = self.by_prompt == other.by_prompt && !context.is_empty() && !leads.is_empty() && !tails.is_empty();
        fits.then_some(Self { by_prompt: self.by_prompt, context, leads, tails })
    }

    /// The part around the words, where exactly one fits.
    fn find(&self, text: &str, words: &Words) -> Option<Range<usize>> {
        if words.is_blank() {
            return None;
        }
        let starts = self.leads.iter().filter_map(|(lead, kept)| {
            let before = text[..words.place.start].strip_suffix(if *kept { &words.before } else { "" })?;
            let before = before.strip_suffix(lead.as_str())?;
            before.ends_with(&self.context).then_some(before.len())
        });
        let ends = self.tails.iter().filter_map(|(tail, kept)| {
            let after = text[words.place.end..].strip_prefix(if *kept { &words.after } else { "" })?;
            Some(text.len() - after.strip_prefix(tail.as_str())?.len())
        });
        Some(only(starts)?..only(ends)?)
    }
}

/// Patterns that a template may make of turns of a kind, at most: what stands before them may differ.
const PATTERNS: usize = 8;

/// What another turn shows, with the pattern that it fits or as one more.
fn learn(patterns: &mut Vec<Pattern>, seen: Option<Pattern>) {
    let Some(seen) = seen else { return };
    for pattern in patterns.iter_mut() {
        if let Some(closer) = pattern.clone().and(seen.clone()) {
            *pattern = closer;
            return;
        }
    }
    if patterns.len() < PATTERNS {
        patterns.push(seen);
    }
}

/// The part around the words, where all patterns that fit say the same.
fn found(patterns: &[Pattern], text: &str, words: &Words) -> Option<Range<usize>> {
    let mut found = patterns.iter().filter_map(|pattern| pattern.find(text, words));
    let first = found.next()?;
    found.all(|other| other == first).then_some(first)
}

/// The one value that all are.
fn only(mut values: impl Iterator<Item = usize>) -> Option<usize> {
    let first = values.next()?;
    values.all(|value| value == first).then_some(first)
}

fn no_span(turn: usize, problem: &str) -> ChatError {
    ChatError::AssistantSpanNotFound { message: turn + 1, problem: problem.into() }
}
