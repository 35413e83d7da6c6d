//! The assistant mask: which spans of a rendered conversation are learned.
//!
//! A chat template is a program, and its output does not record which message a character came from. Three methods are
//! tried in this order:
//!
//! 1. `generation_blocks.rs`: `{% generation %}` blocks mark the spans in the template itself. Their output is learned
//!    verbatim, as in transformers' `apply_chat_template(return_assistant_tokens_mask=True)`.
//! 2. `prompt_prefix.rs`: at inference the model is given the conversation before a turn, rendered with the generation
//!    prompt. If the whole text starts with that prompt, the rest of the turn is what the model has to write, including tool
//!    calls and reasoning.
//! 3. `marked_text.rs`: a template may rewrite earlier turns once others follow (most drop the reasoning), so that no
//!    rendering is a prefix of another. Then the texts of all messages (content, reasoning, names and arguments of tool
//!    calls) are rendered between numbered private-use characters ([`Regions`]), which shows where the texts of the turn
//!    and of its neighbors are. The span starts where the output before the turn's first text stops matching the generation
//!    prompt. It ends in the same way as when the turn is the last of the conversation.
//!
//! A text that a template splits, for example content with `<think>...</think>` in it, is marked on both sides of the
//! split: the parts that the template writes are learned, those that it drops are not.
//!
//! Comparing renderings decides whether a method applies; nothing is guessed. With every method, a span that contains the
//! text of another message is an error: nothing that the user or a tool wrote may be learned.
//!
//! Methods 2 and 3 render the conversation once for each turn, which is quadratic in its length. Beyond [`MAX_EXACT_TURNS`]
//! turns, `patterns.rs` applies them to a sample of the turns, and derives the spans of the others from it.

mod generation_blocks;
mod marked_text;
mod marks;
mod patterns;
mod prompt_prefix;
mod regions;

use std::ops::Range;

use serde_json::{Map, Value};

use super::error::MAX_RENDERED_MESSAGES;
use super::special_tokens::SpecialTokens;
use super::template_input::TemplateInput;
use super::{ChatError, ChatTemplate};
use regions::Regions;

/// The number of assistant turns up to which methods 2 and 3 are applied to every turn.
pub(super) const MAX_EXACT_TURNS: usize = 32;

/// A message as JSON.
type Fields = Map<String, Value>;

/// Finds the learned spans in the output of one template.
#[derive(Debug, Clone, Copy)]
pub(super) struct SpanFinder<'a> {
    pub(super) template: &'a ChatTemplate,
    pub(super) specials: &'a SpecialTokens,
}

/// The span of a turn.
struct TurnSpan {
    span: Range<usize>,
    /// Whether method 2 found it, rather than method 3.
    by_prompt: bool,
}

impl SpanFinder<'_> {
    /// The text of a conversation and its learned spans, in order: one for each assistant message, or with
    /// `{% generation %}` blocks one for each block.
    ///
    /// The input must be [escaped](SpecialTokens::escape_map), so that whatever looks like a special token in the output was
    /// written by the template.
    pub(super) fn spans(&self, input: &TemplateInput) -> Result<(String, Vec<Range<usize>>), ChatError> {
        let turns = assistant_turns(input);
        if self.template.has_generation_blocks() {
            return self.generation_blocks(input, &turns);
        }
        let text = self.render(input, input.messages.len(), false)?;
        let regions = self.regions(input, input.messages.len(), &text);
        let spans = match turns.len() > MAX_EXACT_TURNS {
            true => self.spans_by_pattern(input, &turns, &text, &regions)?,
            false => None,
        };
        let spans = match spans {
            Some(spans) => spans,
            None => self.exact_spans(input, &turns, &text, &regions)?,
        };
        for (index, &turn) in turns.iter().enumerate() {
            if index > 0 && spans[index].start < spans[index - 1].end {
                return Err(span_not_found(turn, "it overlaps that of an earlier message"));
            }
            if let Some(other) = regions.other_message_within(turn, &spans[index]) {
                return Err(span_not_found(turn, &format!("the text of message {} is within it", other + 1)));
            }
        }
        Ok((text, spans))
    }

    /// Renders the first `messages` messages.
    fn render(&self, input: &TemplateInput, messages: usize, add_generation_prompt: bool) -> Result<String, ChatError> {
        self.template.render_input(input, &input.values[..messages], add_generation_prompt, ["", ""])
    }

    /// The span of each turn, by method 2 if it applies, otherwise by method 3.
    pub(super) fn exact_spans(
        &self,
        input: &TemplateInput,
        turns: &[usize],
        text: &str,
        regions: &Regions,
    ) -> Result<Vec<Range<usize>>, ChatError> {
        let messages = input.messages.len();
        if turns.len().saturating_mul(messages) > MAX_RENDERED_MESSAGES {
            return Err(ChatError::TooManyTurns { turns: turns.len(), messages });
        }
        turns.iter().map(|&turn| Ok(self.exact_span(input, turn, text, regions)?.span)).collect()
    }

    fn exact_span(
        &self,
        input: &TemplateInput,
        turn: usize,
        text: &str,
        regions: &Regions,
    ) -> Result<TurnSpan, ChatError> {
        // A template may refuse the beginning of a conversation (without a user message, for example) and still render the
        // whole. Such errors are not reported.
        let prompt = self.prompt(input, turn);
        let last = turn + 1 == input.messages.len();
        let up_to_turn = if last { Some(text.to_owned()) } else { self.render(input, turn + 1, false).ok() };
        if let (Some(prompt), Some(up_to_turn)) = (&prompt, &up_to_turn)
            && let Some(span) = self.span_after_prompt(text, prompt, up_to_turn)
        {
            return Ok(TurnSpan { span, by_prompt: true });
        }
        let span = self.span_by_marks(input, turn, text, [prompt.as_deref(), up_to_turn.as_deref()], regions)?;
        Ok(TurnSpan { span, by_prompt: false })
    }
}

/// The indices of the assistant's messages.
pub(super) fn assistant_turns(input: &TemplateInput) -> Vec<usize> {
    let is_assistant = |&index: &usize| input.messages[index].get("role").is_some_and(|role| role == "assistant");
    (0..input.messages.len()).filter(is_assistant).collect()
}

fn span_not_found(turn: usize, problem: &str) -> ChatError {
    ChatError::AssistantSpanNotFound { message: turn + 1, problem: problem.into() }
}
