//! Tool calls in the text that a model writes.
//!
//! | format | a call |
//! |---|---|
//! | [`Kimi`](ToolFormat::Kimi) | `<\|tool_call_begin\|>functions.NAME:0<\|tool_call_argument_begin\|>{...}<\|tool_call_end\|>`, in a section |
//! | [`Hermes`](ToolFormat::Hermes) | `<tool_call>{"name": "...", "arguments": {...}}</tool_call>` |
//!
//! The text arrives in pieces of any size, and the parts of the answer do not depend on how it is divided. So a complete answer
//! and a streamed one are the same.

mod hermes;
mod kimi;
#[cfg(test)]
mod tests;

use super::stop::StopStrings;

/// How a model writes the calls of tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ToolFormat {
    /// Kimi K2's.
    Kimi,
    /// That of Hermes, Qwen2.5 and Qwen3.
    Hermes,
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Delta {
    /// Text for the user.
    Content(String),
    /// The start of a call.
    CallStart { index: usize, id: String, name: String },
    /// A part of the arguments of the call that was started last.
    CallArguments { index: usize, text: String },
}

impl ToolFormat {
    /// The format that a chat template writes earlier calls in, which is the one that the model was trained on. `None` for a
    /// format that is not known here.
    pub(super) fn of_template(template: &str) -> Option<Self> {
        if template.contains(kimi::CALL) && template.contains(kimi::ARGUMENTS) {
            return Some(Self::Kimi);
        }
        // Qwen3-Coder's calls have the same tag with XML in it.
        let is_hermes = template.contains(hermes::CALL) && !template.contains("<function=");
        is_hermes.then_some(Self::Hermes)
    }

    /// The texts that mark calls. Tokenizers may have them as special tokens, whose text is otherwise left out.
    pub(super) fn markers(self) -> &'static [&'static str] {
        match self {
            Self::Kimi => &kimi::MARKERS,
            Self::Hermes => &hermes::MARKERS,
        }
    }
}

/// Divides a text into content and tool calls.
#[derive(Debug)]
pub(super) struct ToolParser {
    format: Format,
    /// What is being read, and the search for the markers that may end it.
    output: Output,
}

#[derive(Debug)]
enum Format {
    Kimi(kimi::Kimi),
    Hermes(hermes::Hermes),
}

impl ToolParser {
    pub(super) fn new(format: ToolFormat) -> Self {
        let format = match format {
            ToolFormat::Kimi => Format::Kimi(kimi::Kimi::new()),
            ToolFormat::Hermes => Format::Hermes(hermes::Hermes::new()),
        };
        Self { format, output: Output::default() }
    }

    /// The parts that are complete with this text.
    pub(super) fn push(&mut self, text: &str) -> Vec<Delta> {
        match &mut self.format {
            Format::Kimi(kimi) => kimi.push(text, &mut self.output),
            Format::Hermes(hermes) => hermes.push(text, &mut self.output),
        }
        std::mem::take(&mut self.output.deltas)
    }

    /// The parts that remain at the end of the text. A call that was not completed is content.
    pub(super) fn finish(&mut self) -> Vec<Delta> {
        match &mut self.format {
            Format::Kimi(kimi) => kimi.finish(&mut self.output),
            Format::Hermes(hermes) => hermes.finish(&mut self.output),
        }
        self.output.finish();
        std::mem::take(&mut self.output.deltas)
    }

    /// The number of calls.
    pub(super) fn calls(&self) -> usize {
        self.output.calls
    }
}

/// The parts that were found. White space next to a call is not content: models put each call on a line of its own.
#[derive(Debug, Default)]
struct Output {
    deltas: Vec<Delta>,
    calls: usize,
    /// White space at the end of the content so far.
    white: String,
}

impl Output {
    fn content(&mut self, text: &str) {
        let trimmed = text.trim_end();
        if trimmed.is_empty() {
            self.white.push_str(text);
            return;
        }
        let mut content = std::mem::take(&mut self.white);
        content.push_str(trimmed);
        self.white.push_str(&text[trimmed.len()..]);
        match self.deltas.last_mut() {
            Some(Delta::Content(last)) => last.push_str(&content),
            _ => self.deltas.push(Delta::Content(content)),
        }
    }

    fn start(&mut self, name: String, id: impl FnOnce(usize) -> String) {
        self.white.clear();
        let index = self.calls;
        self.calls += 1;
        self.deltas.push(Delta::CallStart { index, id: id(index), name });
    }

    fn arguments(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        let index = self.calls - 1;
        match self.deltas.last_mut() {
            Some(Delta::CallArguments { text: last, .. }) => last.push_str(text),
            _ => self.deltas.push(Delta::CallArguments { index, text: text.to_owned() }),
        }
    }

    fn finish(&mut self) {
        let white = std::mem::take(&mut self.white);
        // After a call it is only the end of the line.
        if self.calls == 0 && !white.is_empty() {
            self.deltas.push(Delta::Content(white));
        }
    }
}

/// A search for markers in text that arrives in pieces.
fn search(markers: &[&str]) -> StopStrings {
    StopStrings::new(markers.iter().map(ToString::to_string).collect())
}
