//! Long conversations: the spans of all turns, derived from those of a sample.
//!
//! One rendering marks all turns. Methods 2 and 3 find the spans of a sample of turns. From these the position of a span
//! relative to the marked text is known ([`Pattern`]): the context before the span, and the text between the marks and the
//! ends of the span. A turn with the same fields gets the span that a pattern yields. For a turn that fits no pattern the
//! methods are applied, and add another pattern. If too many turns fit none, the template does not treat turns alike, and
//! the methods are applied to all of them.

use std::collections::HashMap;
use std::ops::Range;

use serde_json::Value;

use super::marks::{encode_number, mark_message};
use super::regions::Regions;
use super::{Fields, SpanFinder, TurnSpan};
use crate::chat::ChatError;
use crate::chat::special_tokens::{MARK_DIGITS, MARKS};
use crate::chat::template_input::TemplateInput;

/// The size of a sample, for each set of turns with the same fields; the first and the last turn are extra.
const SAMPLES: usize = 8;
/// The number of turns that may fit no pattern.
const MAX_UNMATCHED: usize = 16;
/// How much output before a span is compared, in bytes.
const CONTEXT_BYTES: usize = 256;
/// The limit of patterns for turns with the same fields.
const MAX_PATTERNS: usize = 8;

impl SpanFinder<'_> {
    /// The spans of all turns; `None` if the template does not treat turns alike.
    pub(in crate::chat) fn spans_by_pattern(
        &self,
        input: &TemplateInput,
        turns: &[usize],
        text: &str,
        regions: &Regions,
    ) -> Result<Option<Vec<Range<usize>>>, ChatError> {
        // Ids are marked if possible; some templates compare or measure them.
        let marked = self.mark_turns(input, turns, text, true).or_else(|| self.mark_turns(input, turns, text, false));
        let Some(marked) = marked else { return Ok(None) };
        let mut spans: Vec<Option<Range<usize>>> = vec![None; turns.len()];
        let last = turns.len() - 1;
        // Templates often treat the first and the last turn differently from the others.
        for index in [0, last] {
            spans[index] = Some(self.exact_span(input, turns[index], text, regions)?.span);
        }
        let mut kinds: HashMap<Vec<&str>, Vec<usize>> = HashMap::new();
        for index in 1..last {
            if !marked[index].is_blank() {
                kinds.entry(fields_present(&input.messages[turns[index]])).or_default().push(index);
            }
        }
        let mut patterns: HashMap<Vec<&str>, Vec<Pattern>> = HashMap::new();
        for (kind, indices) in kinds {
            let known = patterns.entry(kind).or_default();
            let samples = SAMPLES.min(indices.len());
            for index in (0..samples).map(|sample| indices[sample * indices.len() / samples]) {
                let TurnSpan { span, by_prompt } = self.exact_span(input, turns[index], text, regions)?;
                add_pattern(known, Pattern::from_turn(text, &span, &marked[index], by_prompt));
                spans[index] = Some(span);
            }
        }
        let mut unmatched = 0;
        for index in 0..turns.len() {
            if spans[index].is_some() {
                continue;
            }
            let known = patterns.entry(fields_present(&input.messages[turns[index]])).or_default();
            spans[index] = match_patterns(known, text, &marked[index]);
            if spans[index].is_none() {
                unmatched += 1;
                if unmatched > MAX_UNMATCHED {
                    return Ok(None);
                }
                let TurnSpan { span, by_prompt } = self.exact_span(input, turns[index], text, regions)?;
                // The turn may have white space that no turn of the sample has, and show how the template treats it.
                add_pattern(known, Pattern::from_turn(text, &span, &marked[index], by_prompt));
                spans[index] = Some(span);
            }
        }
        Ok(spans.into_iter().collect())
    }

    /// The text of each turn, from one rendering in which all are marked; `None` if the template does not keep the marks, or
    /// if its output without them is not `text`.
    fn mark_turns(&self, input: &TemplateInput, turns: &[usize], text: &str, ids: bool) -> Option<Vec<MarkedText>> {
        let mut texts: Vec<MarkedText> = Vec::with_capacity(turns.len());
        let mut values = input.values.clone();
        let split_markers = self.template.split_markers();
        for (number, &turn) in turns.iter().enumerate() {
            let mut message = input.messages[turn].clone();
            let (before, after) = mark_message(&mut message, &encode_number(number), ids, &split_markers);
            texts.push(MarkedText { range: 0..0, before, after });
            values[turn] = input.value(&message);
        }
        let marked = self.template.render_input(input, &values, false, ["", ""]).ok()?;
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
                // A mark is of the next turn, or of another text of the same turn.
                if open.is_some() || (number != encode_number(next) && (next == 0 || number != encode_number(next - 1)))
                {
                    return None;
                }
                if number == encode_number(next) {
                    texts.get_mut(next)?.range.start = plain.len();
                    next += 1;
                }
                open = Some(next - 1);
            } else if character == MARKS[1] {
                texts.get_mut(open.take()?)?.range.end = plain.len();
            } else {
                plain.push(character);
            }
        }
        (plain == text && next == turns.len() && open.is_none()).then_some(texts)
    }
}

/// The names of a message's fields, without `content` if it is blank. Only turns with the same names share patterns.
fn fields_present(message: &Fields) -> Vec<&str> {
    let is_present = |(name, value): (&String, &Value)| {
        name != "content" || value.as_str().is_none_or(|text| !text.trim().is_empty())
    };
    message.iter().filter(|(name, value)| is_present((name, value))).map(|(name, _)| name.as_str()).collect()
}

/// The text of a turn in the output, and the white space around it in the message, which the template writes or trims.
struct MarkedText {
    range: Range<usize>,
    before: String,
    after: String,
}

impl MarkedText {
    /// Whether the text is only white space. Whether it is learned depends on what follows, so no pattern applies.
    fn is_blank(&self) -> bool {
        self.range.is_empty() && !self.before.is_empty()
    }
}

/// The position of the span relative to the marked text, for turns that are alike.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pattern {
    by_prompt: bool,
    /// The end of the output before the span that all turns seen so far have in common.
    context: String,
    /// The candidates that fit all turns seen so far: the output between the start of the span and the text, and whether the
    /// message's own white space comes between the two.
    leads: Vec<(String, bool)>,
    /// The same at the end of the span: the output after the text, and whether the message's white space comes first.
    tails: Vec<(String, bool)>,
}

impl Pattern {
    /// The pattern of one turn; `None` if the text is not within the span.
    fn from_turn(text: &str, span: &Range<usize>, marked: &MarkedText, by_prompt: bool) -> Option<Self> {
        let lead = text.get(span.start..marked.range.start)?;
        let tail = text.get(marked.range.end..span.end)?;
        let candidates = |kept: Option<&str>, whole: &str| {
            let kept = kept.map(|rest| (rest.to_owned(), true));
            kept.into_iter().chain([(whole.to_owned(), false)]).collect()
        };
        let context = text.ceil_char_boundary(span.start.saturating_sub(CONTEXT_BYTES));
        Some(Self {
            by_prompt,
            context: text[context..span.start].into(),
            leads: candidates(lead.strip_suffix(marked.before.as_str()), lead),
            tails: candidates(tail.strip_prefix(marked.after.as_str()), tail),
        })
    }

    /// The pattern that fits the turns of both; `None` if there is none.
    fn intersect(self, other: Self) -> Option<Self> {
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

    /// The span around a marked text; `None` if the pattern does not fit, or allows more than one.
    fn find(&self, text: &str, marked: &MarkedText) -> Option<Range<usize>> {
        if marked.is_blank() {
            return None;
        }
        let starts = self.leads.iter().filter_map(|(lead, kept)| {
            let before = text[..marked.range.start].strip_suffix(if *kept { &marked.before } else { "" })?;
            let before = before.strip_suffix(lead.as_str())?;
            before.ends_with(&self.context).then_some(before.len())
        });
        let ends = self.tails.iter().filter_map(|(tail, kept)| {
            let after = text[marked.range.end..].strip_prefix(if *kept { &marked.after } else { "" })?;
            Some(text.len() - after.strip_prefix(tail.as_str())?.len())
        });
        Some(single_value(starts)?..single_value(ends)?)
    }
}

/// Merges the pattern of another turn into the first one that is compatible, or adds it.
fn add_pattern(patterns: &mut Vec<Pattern>, seen: Option<Pattern>) {
    let Some(seen) = seen else { return };
    for pattern in patterns.iter_mut() {
        if let Some(merged) = pattern.clone().intersect(seen.clone()) {
            *pattern = merged;
            return;
        }
    }
    if patterns.len() < MAX_PATTERNS {
        patterns.push(seen);
    }
}

/// The span around a marked text; `None` if no pattern fits, or if those that fit disagree.
fn match_patterns(patterns: &[Pattern], text: &str, marked: &MarkedText) -> Option<Range<usize>> {
    let mut found = patterns.iter().filter_map(|pattern| pattern.find(text, marked));
    let first = found.next()?;
    found.all(|other| other == first).then_some(first)
}

/// The common value; `None` if the values differ or there are none.
fn single_value(mut values: impl Iterator<Item = usize>) -> Option<usize> {
    let first = values.next()?;
    values.all(|value| value == first).then_some(first)
}
