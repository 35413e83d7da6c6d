//! The assistant mask: which parts of a rendered conversation the assistant said, and are learned.
//!
//! A template is a program, and does not say which of its output came from which message. Three methods are tried in turn:
//!
//! 1. `{% generation %}` blocks say it themselves. What they hold is learned, to the letter, as in transformers'
//!    `apply_chat_template(return_assistant_tokens_mask=True)`.
//! 2. The conversation before a turn, with the prompt for the assistant, is what the model will be given; where the whole
//!    text begins with it, what follows is what the model must say. It ends with the last special token of the turn
//!    (`<|im_end|>`); white space that the template puts after it is not learned.
//! 3. A template may rewrite earlier turns when others follow, so that no text begins with another. Then the words of the
//!    turn are written between two marks of a private plane, and the marks are looked for. A special token that follows
//!    is the end, where it also follows when the turn is the last one.
//!
//! Whether a method applies is decided by comparing texts, never guessed.
//!
//! The second and third render the conversation up to a turn, for each turn: of a long conversation that is too much. There
//! ([`EXACT`]) all turns are marked in one rendering, some of them go through the methods, and the others must look the same:
//! the same text before the part that is learned, the same between its ends and the words ([`Pattern`]). Where one does
//! not it goes through the methods itself, and where many do not all do, up to a limit.

use std::ops::Range;

use super::encoder::{DIGITS, MARKS};
use super::error::MOST_RENDERED;
use super::{ChatEncoder, ChatError, Message};

/// The assistant's turns of a conversation that all go through the methods.
pub(super) const EXACT: usize = 32;
/// Turns of a longer one that do, beside the first and the last.
const SAMPLES: usize = 8;
/// Turns that may look unlike the samples.
const ODD: usize = 16;
/// Bytes before the part that is learned that must be the same in all turns, at most.
const CONTEXT: usize = 256;

impl ChatEncoder {
    /// The text of a conversation and, for each message of the assistant's in order, the part of it that is learned.
    ///
    /// The words must be disguised: whatever looks like a special token is the template's.
    pub(super) fn spans(&self, messages: &[Message]) -> Result<(String, Vec<Range<usize>>), ChatError> {
        let turns: Vec<usize> = (0..messages.len()).filter(|&index| messages[index].role == "assistant").collect();
        if self.template().has_generation_blocks() {
            return self.generation_blocks(messages, &turns);
        }
        let text = self.template().render(messages, false)?;
        let spans = match turns.len() > EXACT {
            true => self.spans_by_pattern(messages, &turns, &text)?,
            false => None,
        };
        let spans = match spans {
            Some(spans) => spans,
            None => self.spans_one_by_one(messages, &turns, &text)?,
        };
        for (index, turn) in turns.iter().enumerate().skip(1) {
            if spans[index].start < spans[index - 1].end {
                return Err(no_span(*turn, "they overlap those of an earlier message"));
            }
        }
        Ok((text, spans))
    }

    /// Each turn by the second method, or else the third.
    pub(super) fn spans_one_by_one(
        &self,
        messages: &[Message],
        turns: &[usize],
        text: &str,
    ) -> Result<Vec<Range<usize>>, ChatError> {
        if turns.len().saturating_mul(messages.len()) > MOST_RENDERED {
            return Err(ChatError::TooManyTurns { turns: turns.len(), messages: messages.len() });
        }
        turns.iter().map(|&turn| Ok(self.exact_span(messages, turn, text)?.0)).collect()
    }

    /// The part of a turn by the second method, or else the third; and whether it was the second.
    fn exact_span(&self, messages: &[Message], turn: usize, text: &str) -> Result<(Range<usize>, bool), ChatError> {
        match self.after_prompt(messages, turn, text)? {
            Some(span) => Ok((span, true)),
            None => Ok((self.between_marks(messages, turn, text)?, false)),
        }
    }

    /// The parts of all turns from those of some; `None` where the template does not make all turns alike.
    pub(super) fn spans_by_pattern(
        &self,
        messages: &[Message],
        turns: &[usize],
        text: &str,
    ) -> Result<Option<Vec<Range<usize>>>, ChatError> {
        let Some(words) = self.all_marked(messages, turns, text) else { return Ok(None) };
        let mut spans: Vec<Option<Range<usize>>> = vec![None; turns.len()];
        let last = turns.len() - 1;
        // A template may treat the first and the last in a way of their own.
        for index in [0, last] {
            spans[index] = Some(self.exact_span(messages, turns[index], text)?.0);
        }
        let mut pattern: Option<Pattern> = None;
        let mut learn = |index: usize| -> Result<Option<Range<usize>>, ChatError> {
            let (span, by_prompt) = self.exact_span(messages, turns[index], text)?;
            let seen = Pattern::of(text, &span, &words[index], by_prompt);
            pattern = match (pattern.take(), seen) {
                (None, seen) => seen,
                (Some(known), Some(seen)) => known.and(seen),
                (Some(_), None) => None,
            };
            Ok(pattern.is_some().then_some(span))
        };
        for sample in 1..=SAMPLES {
            let from = sample * last / (SAMPLES + 1);
            let Some(index) = (from..last).find(|&index| !words[index].is_blank()) else { continue };
            if spans[index].is_none() {
                let Some(span) = learn(index)? else { return Ok(None) };
                spans[index] = Some(span);
            }
        }
        let Some(mut pattern) = pattern else { return Ok(None) };
        let mut odd = 0;
        for index in 0..turns.len() {
            if spans[index].is_some() {
                continue;
            }
            spans[index] = pattern.find(text, &words[index]);
            if spans[index].is_none() {
                odd += 1;
                if odd > ODD {
                    return Ok(None);
                }
                let (span, by_prompt) = self.exact_span(messages, turns[index], text)?;
                // What it shows of white space at the ends of words is worth knowing.
                let seen = Pattern::of(text, &span, &words[index], by_prompt);
                if let Some(closer) = seen.and_then(|seen| pattern.clone().and(seen)) {
                    pattern = closer;
                }
                spans[index] = Some(span);
            }
        }
        Ok(spans.into_iter().collect())
    }

    /// Where the words of all turns are in the text, by one rendering with numbered marks around them; `None` where the
    /// template does not keep the marks, or makes another text of marked words.
    fn all_marked(&self, messages: &[Message], turns: &[usize], text: &str) -> Option<Vec<Words>> {
        let mut messages = messages.to_owned();
        let mut words: Vec<Words> = Vec::with_capacity(turns.len());
        for (number, &turn) in turns.iter().enumerate() {
            let content = &mut messages[turn].content;
            let (before, inner, after) = trimmed(content);
            words.push(Words { place: 0..0, before: before.into(), after: after.into() });
            *content = format!("{before}{}{}{inner}{}{after}", MARKS[0], in_digits(number), MARKS[1]);
        }
        let marked = self.template().render(&messages, false).ok()?;
        let mut plain = String::with_capacity(text.len());
        let mut open = None;
        let mut next = 0;
        let mut characters = marked.chars().peekable();
        while let Some(character) = characters.next() {
            if character == MARKS[0] {
                let mut number = String::new();
                while let Some(digit) = characters.next_if(|&digit| DIGITS.contains(&digit)) {
                    number.push(digit);
                }
                if open.is_some() || number != in_digits(next) {
                    return None;
                }
                open = Some(plain.len());
            } else if character == MARKS[1] {
                words.get_mut(next)?.place = open.take()?..plain.len();
                next += 1;
            } else {
                plain.push(character);
            }
        }
        (plain == text && next == turns.len() && open.is_none()).then_some(words)
    }

    fn generation_blocks(
        &self,
        messages: &[Message],
        turns: &[usize],
    ) -> Result<(String, Vec<Range<usize>>), ChatError> {
        let marked =
            self.template().render_marked(messages, false, MARKS.map(String::from).each_ref().map(String::as_str))?;
        let mut text = String::with_capacity(marked.len());
        let mut ends = [Vec::new(), Vec::new()];
        for character in marked.chars() {
            match MARKS.iter().position(|&mark| mark == character) {
                Some(mark) => ends[mark].push(text.len()),
                None => text.push(character),
            }
        }
        let [begins, ends] = ends;
        if begins.len() != turns.len() || ends.len() != turns.len() {
            let problem = format!(
                "it has {} `{{% generation %}}` blocks for {} messages of the assistant's",
                begins.len(),
                turns.len()
            );
            return Err(no_span(turns.first().copied().unwrap_or(0), &problem));
        }
        Ok((text, begins.into_iter().zip(ends).map(|(begin, end)| begin..end).collect()))
    }

    /// The second method; `None` where the whole text does not begin with that of the conversation up to the turn.
    fn after_prompt(&self, messages: &[Message], turn: usize, text: &str) -> Result<Option<Range<usize>>, ChatError> {
        // A template may refuse a conversation without a user; that is no fault of the conversation.
        let Ok(prompt) = self.template().render(&messages[..turn], true) else { return Ok(None) };
        let last = turn + 1 == messages.len();
        let upto = if last { None } else { self.template().render(&messages[..=turn], false).ok() };
        let upto = if last { text } else { upto.as_deref().unwrap_or_default() };
        if !text.starts_with(upto) || !upto.starts_with(&prompt) || upto.len() == prompt.len() {
            return Ok(None);
        }
        let mut start = prompt.len();
        if !self.template().prompts() {
            // The header of the turn is the template's, even where the template cannot be asked for it.
            let Some(words) = self.marked(messages, turn, text)? else { return Ok(None) };
            if !text[start..words.start.max(start)].trim().is_empty() {
                start = words.start;
            }
        }
        let said = &upto[start..];
        let length = self.end_of_last_special(said).unwrap_or(said.trim_end().len());
        Ok(Some(start..start + length))
    }

    /// The third method.
    fn between_marks(&self, messages: &[Message], turn: usize, text: &str) -> Result<Range<usize>, ChatError> {
        let Some(words) = self.marked(messages, turn, text)? else {
            return Err(no_span(turn, "it rewrites the conversation, and does not keep the words together"));
        };
        let Some(special) = self.special_at_start(&text[words.end..]) else { return Ok(words) };
        let end = words.end + special;
        let marker = &text[words.end..end];
        let last = turn + 1 == messages.len();
        let ends = last
            || self.template().render(&messages[..=turn], false).is_ok_and(|upto| {
                let words = self.marked(&messages[..=turn], turn, &upto).ok().flatten();
                words.is_some_and(|words| upto[words.end..].starts_with(marker))
            });
        Ok(words.start..if ends { end } else { words.end })
    }

    /// Where the words of a message are in the text, found by marks around them; `None` where the template does not
    /// keep the marks, or makes another text of marked words.
    fn marked(&self, messages: &[Message], turn: usize, text: &str) -> Result<Option<Range<usize>>, ChatError> {
        let mut messages = messages.to_owned();
        let content = &mut messages[turn].content;
        let (before, inner, after) = trimmed(content);
        let (before, inner, after) = (before.to_owned(), inner.to_owned(), after.to_owned());
        *content = format!("{before}{}{inner}{}{after}", MARKS[0], MARKS[1]);
        // A template that fails at marked words has not kept them.
        let Ok(marked) = self.template().render(&messages, false) else { return Ok(None) };
        let mut places = Vec::new();
        for mark in MARKS {
            let mut found = marked.match_indices(mark);
            let (Some((place, _)), None) = (found.next(), found.next()) else { return Ok(None) };
            places.push(place);
        }
        let (start, end) = (places[0], places[1].wrapping_sub(MARKS[0].len_utf8()));
        if places[0] > places[1] || marked.replace(MARKS, "") != text {
            return Ok(None);
        }
        let start = if text[..start].ends_with(&before) { start - before.len() } else { start };
        let end = if text[end..].starts_with(&after) { end + after.len() } else { end };
        Ok(Some(start..end))
    }
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
