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

use std::ops::Range;

use super::encoder::MARKS;
use super::{ChatEncoder, ChatError, Message};

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
        let mut spans: Vec<Range<usize>> = Vec::with_capacity(turns.len());
        for turn in turns {
            let span = match self.after_prompt(messages, turn, &text)? {
                Some(span) => span,
                None => self.between_marks(messages, turn, &text)?,
            };
            if spans.last().is_some_and(|last| span.start < last.end) {
                return Err(no_span(turn, "they overlap those of an earlier message"));
            }
            spans.push(span);
        }
        Ok((text, spans))
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
        // Templates trim; what is trimmed must lie outside.
        let inner = content.trim();
        let before = content.len() - content.trim_start().len();
        let (before, after) = (content[..before].to_owned(), content[before + inner.len()..].to_owned());
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

fn no_span(turn: usize, problem: &str) -> ChatError {
    ChatError::NoSpan { message: turn + 1, problem: problem.into() }
}
