//! Kimi K2's tool calls:
//!
//! ```text
//! <|tool_calls_section_begin|>
//! <|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{"city": "Turin"}<|tool_call_end|>
//! <|tool_calls_section_end|>
//! ```
//!
//! The id of a call is the text before its arguments, which the template writes again with the result.

use super::super::stop::StopStrings;
use super::{Output, search};

pub(super) const CALL: &str = "<|tool_call_begin|>";
pub(super) const ARGUMENTS: &str = "<|tool_call_argument_begin|>";
const CALL_END: &str = "<|tool_call_end|>";
const SECTION: &str = "<|tool_calls_section_begin|>";
const SECTION_END: &str = "<|tool_calls_section_end|>";
pub(super) const MARKERS: [&str; 5] = [SECTION, SECTION_END, CALL, ARGUMENTS, CALL_END];

#[derive(Debug)]
pub(super) struct Kimi {
    state: State,
    markers: StopStrings,
}

#[derive(Debug)]
enum State {
    /// Outside of a call.
    Text,
    /// The id of a call, so far.
    Id(String),
    Arguments,
}

impl Kimi {
    pub(super) fn new() -> Self {
        Self { state: State::Text, markers: search(&MARKERS) }
    }

    pub(super) fn push(&mut self, text: &str, output: &mut Output) {
        let mut rest = Some(text.to_owned());
        while let Some(text) = rest {
            let found = self.markers.push(&text);
            self.text(&found.text, output);
            rest = found.stop.map(|(marker, rest)| {
                self.marker(MARKERS[marker], output);
                rest
            });
        }
    }

    fn text(&mut self, text: &str, output: &mut Output) {
        match &mut self.state {
            State::Text => output.content(text),
            State::Id(id) => id.push_str(text),
            State::Arguments => output.arguments(text),
        }
    }

    fn marker(&mut self, marker: &str, output: &mut Output) {
        match (&mut self.state, marker) {
            (State::Id(id), ARGUMENTS) if !id.trim().is_empty() => {
                let id = id.trim();
                let (name, is_complete) = name_of(id);
                output.start(name.to_owned(), |index| match is_complete {
                    true => id.to_owned(),
                    false => format!("functions.{name}:{index}"),
                });
                self.state = State::Arguments;
            }
            // A call without arguments is not one.
            (State::Id(_), _) => {
                self.abandon(output);
                self.between(marker);
            }
            (State::Text, ARGUMENTS) => output.content(ARGUMENTS),
            (State::Text | State::Arguments, _) => self.between(marker),
        }
    }

    /// The state after a marker that is not that of arguments.
    fn between(&mut self, marker: &str) {
        self.state = if marker == CALL { State::Id(String::new()) } else { State::Text };
    }

    /// Writes a call that is not one as content.
    fn abandon(&mut self, output: &mut Output) {
        if let State::Id(id) = std::mem::replace(&mut self.state, State::Text) {
            output.content(CALL);
            output.content(&id);
        }
    }

    pub(super) fn finish(&mut self, output: &mut Output) {
        let held = self.markers.finish();
        self.text(&held, output);
        self.abandon(output);
    }
}

/// The name in an id `functions.NAME:0`, and whether the id has this form.
fn name_of(id: &str) -> (&str, bool) {
    let plain = id.strip_prefix("functions.").unwrap_or(id);
    match plain.rsplit_once(':') {
        Some((name, number)) if !name.is_empty() && number.parse::<u32>().is_ok() => (name, plain.len() < id.len()),
        _ => (plain, false),
    }
}
