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
//!    another. Then what the turn says is written between marks of a private plane, each text of it (content, reasoning,
//!    names and arguments of calls), and the first and the last mark are looked for. The turn begins behind the prompt for it:
//!    where the conversation before it ends, or where the text that asks the assistant to speak stands last before the
//!    words. It ends as the same turn does when it is the last one.
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
use super::encoder::{DIGITS, Finder, MARKS};
use super::error::MOST_RENDERED;
use super::given::Given;

/// The assistant's turns of a conversation that all go through the methods.
pub(super) const EXACT: usize = 32;
/// Turns of a longer one that do, beside the first and the last.
const SAMPLES: usize = 8;
/// Turns that may look unlike the samples.
const ODD: usize = 16;
/// Bytes before the part that is learned that must be the same in all turns, at most.
const CONTEXT: usize = 256;
/// Fields of a message, at any depth, that templates compare rather than write.
const COMPARED: [&str; 5] = ["role", "type", "id", "index", "tool_call_id"];

/// A message as JSON.
type Fields = Map<String, Value>;

impl Finder<'_> {
    /// The text of a conversation and, for each message of the assistant's in order, the part of it that is learned; for
    /// each `{% generation %}` block where the template has such.
    ///
    /// The words must be disguised: whatever looks like a special token is the template's.
    pub(super) fn spans(&self, given: &Given) -> Result<(String, Vec<Range<usize>>), ChatError> {
        let turns = turns_of(given);
        if self.template.has_generation_blocks() {
            return self.generation_blocks(given, &turns);
        }
        let text = self.render(given, given.messages.len(), false)?;
        let spans = match turns.len() > EXACT {
            true => self.spans_by_pattern(given, &turns, &text)?,
            false => None,
        };
        let spans = match spans {
            Some(spans) => spans,
            None => self.spans_one_by_one(given, &turns, &text)?,
        };
        for (index, turn) in turns.iter().enumerate().skip(1) {
            if spans[index].start < spans[index - 1].end {
                return Err(no_span(*turn, "they overlap those of an earlier message"));
            }
        }
        Ok((text, spans))
    }

    /// The text of the first messages.
    fn render(&self, given: &Given, messages: usize, add_generation_prompt: bool) -> Result<String, ChatError> {
        self.template.render_given(given, &given.values[..messages], add_generation_prompt, ["", ""])
    }

    /// The text of the first messages with some of them changed.
    fn render_changed(
        &self,
        given: &Given,
        messages: usize,
        changed: impl IntoIterator<Item = (usize, Fields)>,
    ) -> Result<String, ChatError> {
        let mut values = given.values[..messages].to_vec();
        for (index, message) in changed {
            values[index] = given.value(&message);
        }
        self.template.render_given(given, &values, false, ["", ""])
    }

    /// Each turn by the second method, or else the third.
    pub(super) fn spans_one_by_one(
        &self,
        given: &Given,
        turns: &[usize],
        text: &str,
    ) -> Result<Vec<Range<usize>>, ChatError> {
        let messages = given.messages.len();
        if turns.len().saturating_mul(messages) > MOST_RENDERED {
            return Err(ChatError::TooManyTurns { turns: turns.len(), messages });
        }
        turns.iter().map(|&turn| Ok(self.exact_span(given, turn, text)?.0)).collect()
    }

    /// The part of a turn by the second method, or else the third; and whether it was the second.
    fn exact_span(&self, given: &Given, turn: usize, text: &str) -> Result<(Range<usize>, bool), ChatError> {
        // A template may refuse a conversation without a user; that is no fault of the conversation.
        let prompt = self.render(given, turn, true).ok();
        match self.after_prompt(given, turn, text, prompt.as_deref())? {
            Some(span) => Ok((span, true)),
            None => Ok((self.between_marks(given, turn, text, prompt.as_deref())?, false)),
        }
    }

    /// The parts of all turns from those of some; `None` where the template does not make all turns alike.
    pub(super) fn spans_by_pattern(
        &self,
        given: &Given,
        turns: &[usize],
        text: &str,
    ) -> Result<Option<Vec<Range<usize>>>, ChatError> {
        let Some(words) = self.all_marked(given, turns, text) else { return Ok(None) };
        let mut spans: Vec<Option<Range<usize>>> = vec![None; turns.len()];
        let last = turns.len() - 1;
        // A template may treat the first and the last in a way of their own.
        for index in [0, last] {
            spans[index] = Some(self.exact_span(given, turns[index], text)?.0);
        }
        let mut kinds: HashMap<Vec<&str>, Vec<usize>> = HashMap::new();
        for index in 1..last {
            if !words[index].is_blank() {
                kinds.entry(kind_of(&given.messages[turns[index]])).or_default().push(index);
            }
        }
        let mut patterns: HashMap<Vec<&str>, Pattern> = HashMap::new();
        for (kind, indices) in kinds {
            let mut pattern: Option<Pattern> = None;
            for sample in 0..SAMPLES.min(indices.len()) {
                let index = indices[sample * indices.len() / SAMPLES.min(indices.len())];
                let (span, by_prompt) = self.exact_span(given, turns[index], text)?;
                let seen = Pattern::of(text, &span, &words[index], by_prompt);
                spans[index] = Some(span);
                pattern = match (pattern, seen) {
                    (None, Some(seen)) if sample == 0 => Some(seen),
                    (Some(known), Some(seen)) => known.and(seen),
                    _ => None,
                };
                if pattern.is_none() {
                    break;
                }
            }
            patterns.extend(pattern.map(|pattern| (kind, pattern)));
        }
        let mut odd = 0;
        for index in 0..turns.len() {
            if spans[index].is_some() {
                continue;
            }
            let kind = kind_of(&given.messages[turns[index]]);
            spans[index] = patterns.get(&kind).and_then(|pattern| pattern.find(text, &words[index]));
            if spans[index].is_none() {
                odd += 1;
                if odd > ODD {
                    return Ok(None);
                }
                let (span, by_prompt) = self.exact_span(given, turns[index], text)?;
                // What it shows of white space at the ends of words is worth knowing.
                let seen = Pattern::of(text, &span, &words[index], by_prompt);
                if let Some(pattern) = patterns.get_mut(&kind)
                    && let Some(closer) = seen.and_then(|seen| pattern.clone().and(seen))
                {
                    *pattern = closer;
                }
                spans[index] = Some(span);
            }
        }
        Ok(spans.into_iter().collect())
    }

    /// Where the words of all turns are in the text, by one rendering with numbered marks around them; `None` where the
    /// template does not keep the marks, or makes another text of marked words.
    fn all_marked(&self, given: &Given, turns: &[usize], text: &str) -> Option<Vec<Words>> {
        let mut words: Vec<Words> = Vec::with_capacity(turns.len());
        let mut changed = Vec::with_capacity(turns.len());
        for (number, &turn) in turns.iter().enumerate() {
            let mut message = given.messages[turn].clone();
            let (before, after) = mark_words(&mut message, &in_digits(number));
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
                while let Some(digit) = characters.next_if(|&digit| DIGITS.contains(&digit)) {
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

    fn generation_blocks(&self, given: &Given, turns: &[usize]) -> Result<(String, Vec<Range<usize>>), ChatError> {
        let marks = MARKS.map(String::from);
        let marked = self.template.render_given(given, &given.values, false, marks.each_ref().map(String::as_str))?;
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
    fn after_prompt(
        &self,
        given: &Given,
        turn: usize,
        text: &str,
        prompt: Option<&str>,
    ) -> Result<Option<Range<usize>>, ChatError> {
        let Some(prompt) = prompt else { return Ok(None) };
        let last = turn + 1 == given.messages.len();
        let upto = if last { None } else { self.render(given, turn + 1, false).ok() };
        let upto = if last { text } else { upto.as_deref().unwrap_or_default() };
        if !text.starts_with(upto) || !upto.starts_with(prompt) || upto.len() == prompt.len() {
            return Ok(None);
        }
        let mut start = prompt.len();
        if !self.template.prompts() {
            // The header of the turn is the template's, even where the template cannot be asked for it.
            let Some(words) = self.marked(given, turn, turn + 1, upto)? else { return Ok(None) };
            let words = words.kept(upto);
            if !text[start..words.start.max(start)].trim().is_empty() {
                start = words.start;
            }
        }
        let said = &upto[start..];
        let length = self.end_of_last_special(said).unwrap_or(said.trim_end().len());
        Ok(Some(start..start + length))
    }

    /// The third method.
    fn between_marks(
        &self,
        given: &Given,
        turn: usize,
        text: &str,
        prompt: Option<&str>,
    ) -> Result<Range<usize>, ChatError> {
        let Some(words) = self.marked(given, turn, given.messages.len(), text)? else {
            return Err(no_span(turn, "it rewrites the conversation, and does not keep the words together"));
        };
        let start = self.start_before(given, turn, text, prompt, words.place.start);
        let kept = words.kept(text);
        let rest = &text[words.place.end..];
        let end = if turn + 1 == given.messages.len() {
            self.end_of_last_special(rest).or_else(|| self.special_at_start(rest)).map(|end| words.place.end + end)
        } else {
            // What follows the words where the turn is the last one.
            let upto = self.render(given, turn + 1, false).ok();
            let tail = upto.and_then(|upto| {
                let words = self.marked(given, turn, turn + 1, &upto).ok().flatten()?;
                Some(upto[words.place.end..].to_owned())
            });
            let whole = tail.as_deref().and_then(|tail| {
                let end = self.end_of_last_special(tail)?;
                rest.starts_with(&tail[..end]).then_some(end)
            });
            let marker = || {
                let end = self.special_at_start(rest)?;
                tail.as_deref()?.starts_with(&rest[..end]).then_some(end)
            };
            whole.or_else(marker).map(|end| words.place.end + end)
        };
        Ok(start.unwrap_or(kept.start)..end.unwrap_or(kept.end))
    }

    /// Where a turn begins whose first words are at `words`: behind the prompt for it.
    fn start_before(
        &self,
        given: &Given,
        turn: usize,
        text: &str,
        prompt: Option<&str>,
        words: usize,
    ) -> Option<usize> {
        if !self.template.prompts() {
            return None;
        }
        let prompt = prompt?;
        if prompt.len() <= words && text.starts_with(prompt) {
            return Some(prompt.len());
        }
        let before = self.render(given, turn, false).ok()?;
        let asks = prompt.strip_prefix(before.as_str()).filter(|asks| !asks.is_empty())?;
        // A prompt may begin what is thought, and the turn not have it: its special tokens from the last are tried, too.
        let ends = [asks.len()].into_iter().chain(self.ends_of_specials(asks));
        ends.filter(|&end| end > 0).find_map(|end| Some(text[..words].rfind(&asks[..end])? + end))
    }

    /// Where the words of a message are in the text of the first messages, found by marks around them; `None` where the
    /// template does not keep the marks, or makes another text of marked words.
    fn marked(&self, given: &Given, turn: usize, messages: usize, text: &str) -> Result<Option<Words>, ChatError> {
        let message = &given.messages[turn];
        let mut sets: Vec<Vec<&str>> = vec![Vec::new()];
        // A template may look into one of the texts, and take the marks amiss.
        let fields: Vec<&str> = message.keys().map(String::as_str).filter(|name| !COMPARED.contains(name)).collect();
        sets.push(vec!["content"]);
        sets.push(fields.iter().copied().filter(|name| *name != "content").collect());
        sets.extend(fields.into_iter().map(|name| vec![name]));
        for set in sets {
            let mut message = message.clone();
            let (before, after) = match set.as_slice() {
                [] => mark_all(&mut message, |_| true),
                set => mark_all(&mut message, |name| set.contains(&name)),
            };
            if message == given.messages[turn] {
                continue;
            }
            // A template that fails at marked words has not kept them.
            let Ok(marked) = self.render_changed(given, messages, [(turn, message)]) else { continue };
            let (Some(first), Some(last)) = (marked.find(MARKS[0]), marked.rfind(MARKS[1])) else { continue };
            if first > last || without_marks(&marked) != text {
                continue;
            }
            let place = without_marks(&marked[..first]).len()..without_marks(&marked[..last]).len();
            return Ok(Some(Words { place, before, after }));
        }
        Ok(None)
    }
}

/// The assistant's messages.
pub(super) fn turns_of(given: &Given) -> Vec<usize> {
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

fn without_marks(text: &str) -> String {
    text.chars().filter(|character| !MARKS.contains(character) && !DIGITS.contains(character)).collect()
}

/// Marks the words of a message: its content, or else what it has in place of it. Gives the white space around the content.
fn mark_words(message: &mut Fields, number: &str) -> (String, String) {
    match message.get_mut("content") {
        Some(Value::String(text)) if !text.trim().is_empty() => mark_text(text, number),
        _ => {
            let before = message.clone();
            mark_fields(message, number, &|name: &str| name != "content");
            if *message == before
                && let Some(Value::String(text)) = message.get_mut("content")
            {
                return mark_text(text, number);
            }
            (String::new(), String::new())
        }
    }
}

/// Marks the texts of a message in the fields that are wanted; its content even where it is empty, if it is all there is.
/// Gives the white space around the content, if nothing else is marked.
fn mark_all(message: &mut Fields, wanted: impl Fn(&str) -> bool) -> (String, String) {
    let before = message.clone();
    mark_fields(message, "", &|name: &str| name != "content" && wanted(name));
    let alone = *message == before;
    match message.get_mut("content") {
        Some(Value::String(text)) if wanted("content") && (alone || !text.trim().is_empty()) => {
            let around = mark_text(text, "");
            if alone { around } else { Default::default() }
        }
        Some(parts @ Value::Array(_)) if wanted("content") => {
            mark_value(parts, "");
            Default::default()
        }
        _ => Default::default(),
    }
}

fn mark_fields(message: &mut Fields, number: &str, wanted: &dyn Fn(&str) -> bool) {
    for (name, value) in message.iter_mut() {
        if !COMPARED.contains(&name.as_str()) && wanted(name) {
            mark_value(value, number);
        }
    }
}

fn mark_value(value: &mut Value, number: &str) {
    match value {
        Value::String(text) if !text.trim().is_empty() => drop(mark_text(text, number)),
        Value::Array(items) => items.iter_mut().for_each(|item| mark_value(item, number)),
        Value::Object(map) => mark_fields(map, number, &|_| true),
        _ => {}
    }
}

/// Puts marks around a text, within its white space, which it gives back.
fn mark_text(text: &mut String, number: &str) -> (String, String) {
    let (before, inner, after) = trimmed(text);
    let marked = format!("{before}{}{number}{inner}{}{after}", MARKS[0], MARKS[1]);
    let around = (before.to_owned(), after.to_owned());
    *text = marked;
    around
}

/// White space, words, white space. Templates trim; what is trimmed must lie outside the marks.
fn trimmed(content: &str) -> (&str, &str, &str) {
    let inner = content.trim();
    let before = content.len() - content.trim_start().len();
    (&content[..before], inner, &content[before + inner.len()..])
}

/// A number in characters that no template makes anything of.
fn in_digits(mut number: usize) -> String {
    let mut digits = vec![DIGITS[number % DIGITS.len()]];
    while number >= DIGITS.len() {
        number /= DIGITS.len();
        digits.push(DIGITS[number % DIGITS.len()]);
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

    /// With the white space around them, as far as the text has it.
    fn kept(&self, text: &str) -> Range<usize> {
        let Range { start, end } = self.place;
        let before = if text[..start].ends_with(&self.before) { self.before.len() } else { 0 };
        let after = if text[end..].starts_with(&self.after) { self.after.len() } else { 0 };
        start - before..end + after
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

/// The one value that all are.
fn only(mut values: impl Iterator<Item = usize>) -> Option<usize> {
    let first = values.next()?;
    values.all(|value| value == first).then_some(first)
}

fn no_span(turn: usize, problem: &str) -> ChatError {
    ChatError::NoSpan { message: turn + 1, problem: problem.into() }
}
