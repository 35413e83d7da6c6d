//! Log-probabilities in the two forms of OpenAI's API.

use serde::ser::{Serialize, SerializeMap, Serializer};

use super::decoder::{PlacedLogprobs, TokenTexts};
use crate::engine::TokenLogprobs;

/// The value for a probability of zero, whose logarithm JSON cannot represent; OpenAI's.
const IMPOSSIBLE: f32 = -9999.0;

/// `logprobs` of a chat's choice.
#[derive(Debug, Default, serde::Serialize)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Option<()>,
}

#[derive(Debug, serde::Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: Likely,
    top_logprobs: Vec<Likely>,
}

#[derive(Debug, serde::Serialize)]
struct Likely {
    token: String,
    logprob: f32,
    /// The bytes of the token, which may be a part of a character: those of all tokens together are the text. Null where the
    /// tokenizer does not have them.
    bytes: Option<Vec<u8>>,
}

impl ChatLogprobs {
    pub(super) fn new(placed: &[PlacedLogprobs], texts: &TokenTexts<'_>) -> Self {
        let likely = |token: u32, logprob: f32| {
            let text = texts.text(token);
            let bytes = texts.bytes(token, &text);
            Likely { token: text, logprob: finite(logprob), bytes }
        };
        let content = placed.iter().map(|PlacedLogprobs { logprobs, .. }| ChatToken {
            token: likely(logprobs.token, logprobs.logprob),
            top_logprobs: logprobs.top.iter().map(|&(token, logprob)| likely(token, logprob)).collect(),
        });
        Self { content: content.collect(), refusal: None }
    }

    pub(super) fn append(&mut self, more: Self) {
        self.content.extend(more.content);
    }
}

/// `logprobs` of a completion's choice: a list for each kind of value, with an item for each token.
#[derive(Debug, Default, serde::Serialize)]
pub(super) struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<TopLogprobs>>,
}

/// An object of texts with log-probabilities. Of tokens with the same text the most likely one is kept.
#[derive(Debug)]
struct TopLogprobs(Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

impl CompletionLogprobs {
    /// Adds a token. The first token of a prompt has no log-probability.
    pub(super) fn push(&mut self, token: u32, logprobs: Option<&TokenLogprobs>, offset: usize, texts: &TokenTexts<'_>) {
        self.text_offset.push(offset);
        self.tokens.push(texts.text(token));
        self.token_logprobs.push(logprobs.map(|logprobs| finite(logprobs.logprob)));
        self.top_logprobs.push(logprobs.map(|logprobs| {
            let mut top: Vec<(String, f32)> = Vec::with_capacity(logprobs.top.len());
            for &(token, logprob) in &logprobs.top {
                let text = texts.text(token);
                if !top.iter().any(|(known, _)| *known == text) {
                    top.push((text, finite(logprob)));
                }
            }
            TopLogprobs(top)
        }));
    }

    /// Adds the tokens of a piece, whose offsets are relative to `start`.
    pub(super) fn extend(&mut self, placed: &[PlacedLogprobs], start: usize, texts: &TokenTexts<'_>) {
        for PlacedLogprobs { offset, logprobs } in placed {
            self.push(logprobs.token, Some(logprobs), start + offset, texts);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { IMPOSSIBLE }
}
