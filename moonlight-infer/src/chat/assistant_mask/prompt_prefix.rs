//! Method 2: what follows the generation prompt is learned, if the conversation starts with the prompt for the turn.

use std::ops::Range;

use super::{Fields, SpanFinder};
use crate::chat::special_tokens::MARKS;
use crate::chat::template_input::TemplateInput;

impl SpanFinder<'_> {
    /// The conversation before a turn with the generation prompt. If the template does not use `add_generation_prompt`, the
    /// header that it writes before a plain answer takes the place of the generation prompt.
    pub(super) fn prompt(&self, input: &TemplateInput, turn: usize) -> Option<String> {
        if self.template.has_generation_prompt() {
            return self.render(input, turn, true).ok();
        }
        let with_header = self.up_to_plain_answer(input, turn)?;
        // White space alone is not a header. At inference the prompt does not contain it, so the model has to write it
        // (Llama 2: a space between `[/INST]` and the answer).
        let before = self.render(input, turn, false).ok();
        let has_no_header =
            |before: &String| with_header.strip_prefix(before.as_str()).is_some_and(|header| header.trim().is_empty());
        Some(before.filter(has_no_header).unwrap_or(with_header))
    }

    /// The conversation before a turn, and the header that the template writes before the text of a plain answer.
    pub(super) fn up_to_plain_answer(&self, input: &TemplateInput, turn: usize) -> Option<String> {
        let content = format!("{}x{}", MARKS[0], MARKS[1]);
        let plain = Fields::from_iter([("role".into(), "assistant".into()), ("content".into(), content.into())]);
        let mut values = input.values[..turn].to_vec();
        values.push(input.value(&plain));
        let marked = self.template.render_input(input, &values, false, ["", ""]).ok()?;
        Some(marked[..marked.find(MARKS[0])?].to_owned())
    }

    /// The span of a turn. `None` if the whole text does not start with the conversation up to the turn, or if this part
    /// does not start with the prompt.
    ///
    /// The span ends with the last special token of the turn (`<|im_end|>`). White space after it separates messages, and
    /// is written by the template at inference.
    pub(super) fn span_after_prompt(&self, text: &str, prompt: &str, up_to_turn: &str) -> Option<Range<usize>> {
        if !text.starts_with(up_to_turn) || up_to_turn.len() == prompt.len() {
            return None;
        }
        let turn = up_to_turn.strip_prefix(prompt)?;
        let length = self.specials.end_of_last_special(turn).unwrap_or(turn.trim_end().len());
        Some(prompt.len()..prompt.len() + length)
    }
}
