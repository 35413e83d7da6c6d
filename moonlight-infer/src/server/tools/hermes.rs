//! The tool calls of Hermes and Qwen: `<tool_call>{"name": "...", "arguments": {...}}</tool_call>`.

use rand::RngExt;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::super::stop::StopStrings;
use super::{Output, search};

pub(super) const CALL: &str = "<tool_call>";
const CALL_END: &str = "</tool_call>";
pub(super) const MARKERS: [&str; 2] = [CALL, CALL_END];

#[derive(Debug)]
pub(super) struct Hermes {
    /// The text of a call so far, within one.
    call: Option<String>,
    markers: StopStrings,
}

/// A call as the model writes it; the text of its arguments is kept as it is.
#[derive(Deserialize)]
struct Call<'a> {
    name: String,
    #[serde(borrow, alias = "parameters")]
    arguments: Option<&'a RawValue>,
}

impl Hermes {
    pub(super) fn new() -> Self {
        Self { call: None, markers: search(&MARKERS) }
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
        match &mut self.call {
            None => output.content(text),
            Some(call) => call.push_str(text),
        }
    }

    fn marker(&mut self, marker: &str, output: &mut Output) {
        match (self.call.take(), marker) {
            (Some(call), CALL_END) => {
                if !write_call(&call, output) {
                    output.content(&format!("{CALL}{call}{CALL_END}"));
                }
            }
            // The call before has no end.
            (Some(call), _) => {
                self.unfinished(&call, output);
                self.call = Some(String::new());
            }
            (None, CALL) => self.call = Some(String::new()),
            (None, _) => output.content(marker),
        }
    }

    fn unfinished(&self, call: &str, output: &mut Output) {
        if !write_call(call, output) {
            output.content(&format!("{CALL}{call}"));
        }
    }

    pub(super) fn finish(&mut self, output: &mut Output) {
        let held = self.markers.finish();
        self.text(&held, output);
        if let Some(call) = self.call.take() {
            self.unfinished(&call, output);
        }
    }
}

/// Writes a call; returns false if the text is not one.
fn write_call(text: &str, output: &mut Output) -> bool {
    let Ok(Call { name, arguments }) = serde_json::from_str(text.trim()) else { return false };
    output.start(name, |_| random_id());
    let arguments = arguments.map_or("{}", RawValue::get);
    // Some models write the arguments as a string of JSON, as the API does.
    match serde_json::from_str::<String>(arguments) {
        Ok(inner) => output.arguments(&inner),
        Err(_) => output.arguments(arguments),
    }
    true
}

/// An id like those of OpenAI. The format has none, and the template does not read it.
fn random_id() -> String {
    const CHARACTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
    let mut random = rand::rng();
    let characters = (0..24).map(|_| char::from(CHARACTERS[random.random_range(0..CHARACTERS.len())]));
    format!("call_{}", characters.collect::<String>())
}
