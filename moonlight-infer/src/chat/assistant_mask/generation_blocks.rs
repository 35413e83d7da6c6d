//! Method 1: the `{% generation %}` blocks of a template are the learned spans.

use std::ops::Range;

use super::{SpanFinder, span_not_found};
use crate::chat::ChatError;
use crate::chat::special_tokens::MARKS;
use crate::chat::template_input::TemplateInput;

impl SpanFinder<'_> {
    /// The text of a conversation, and the span of each `{% generation %}` block in it.
    pub(super) fn generation_blocks(
        &self,
        input: &TemplateInput,
        turns: &[usize],
    ) -> Result<(String, Vec<Range<usize>>), ChatError> {
        let marks = MARKS.map(String::from);
        let marked = self.template.render_input(input, &input.values, false, marks.each_ref().map(String::as_str))?;
        let mut text = String::with_capacity(marked.len());
        let mut blocks: Vec<Range<usize>> = Vec::new();
        let mut open = Vec::new();
        for character in marked.chars() {
            match MARKS.iter().position(|&mark| mark == character) {
                Some(0) => open.push(text.len()),
                Some(_) => {
                    let start = open.pop().unwrap_or(text.len());
                    // A block within another belongs to the outer one.
                    if open.is_empty() {
                        blocks.push(start..text.len());
                    }
                }
                None => text.push(character),
            }
        }
        if blocks.is_empty() {
            let problem =
                format!("the template writes no `{{% generation %}}` block for {} assistant messages", turns.len());
            return Err(span_not_found(turns.first().copied().unwrap_or(0), &problem));
        }
        Ok((text, blocks))
    }
}
