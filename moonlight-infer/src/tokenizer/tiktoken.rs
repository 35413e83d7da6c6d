//! Moonlight's `tiktoken.model`, by the `tiktoken-rs` crate.
//!
//! The same as the published `tokenization_moonshot.py`, except that text which spells a special token stays text.

use std::collections::BTreeMap;

use moonlight_convert::tokenizer::{AddedToken, Ranks, SPECIALS, pattern, special_tokens};
use rustc_hash::FxHashMap;
use tiktoken_rs::CoreBPE;

/// Characters that are encoded at a time.
const CHUNK: usize = 400_000;
/// The longest run of white space, or of anything else, that is encoded at a time.
const RUN: usize = 25_000;

/// The byte-pair encoding and the special tokens.
pub(super) struct Tiktoken {
    inner: CoreBPE,
    ranks: u32,
    special: BTreeMap<String, u32>,
}

impl Tiktoken {
    /// Reads the file's bytes; `added` are the special tokens that `tokenizer_config.json` names.
    pub(super) fn parse(contents: &[u8], added: &BTreeMap<u32, AddedToken>) -> Result<Self, String> {
        let ranks = Ranks::parse(contents).map_err(|error| error.to_string())?;
        let special = special_tokens(ranks.count(), added).into_iter().map(|(id, token)| (token.content, id));
        // A token without a text stands for none.
        let special = special.filter(|(name, _)| !name.is_empty()).collect();
        let encoder = ranks.tokens().iter().cloned().zip(0..).collect();
        let inner = CoreBPE::new(encoder, FxHashMap::default(), &pattern()).map_err(|error| error.to_string())?;
        Ok(Self { inner, ranks: ranks.count(), special })
    }

    pub(super) fn encode(&self, text: &str) -> Vec<u32> {
        pieces(text).flat_map(|piece| self.inner.encode_ordinary(piece)).collect()
    }

    /// The bytes of the tokens; specials have none.
    pub(super) fn bytes(&self, tokens: &[u32]) -> Vec<u8> {
        let ordinary: Vec<u32> = tokens.iter().copied().filter(|&token| token < self.ranks).collect();
        // Every rank has a token, as `parse` has seen.
        self.inner.decode_bytes(&ordinary).unwrap_or_default()
    }

    pub(super) fn vocab_size(&self) -> usize {
        (self.ranks + SPECIALS) as usize
    }

    pub(super) fn special(&self, text: &str) -> Option<u32> {
        self.special.get(text).copied()
    }

    pub(super) fn specials(&self) -> Vec<(String, u32)> {
        self.special.iter().map(|(name, &id)| (name.clone(), id)).collect()
    }
}

/// The text in pieces of at most [`CHUNK`] characters without runs longer than [`RUN`], as the published code cuts it:
/// the regular expression would go too far back in longer ones.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut cuts = vec![0];
    let (mut in_chunk, mut run, mut run_is_space) = (0, 0, false);
    for (index, character) in text.char_indices() {
        if in_chunk == CHUNK {
            cuts.push(index);
            (in_chunk, run) = (0, 0);
        }
        let is_space = is_python_space(character);
        if run > 0 && is_space == run_is_space {
            run += 1;
            if run > RUN {
                cuts.push(index);
                run = 1;
            }
        } else {
            (run, run_is_space) = (1, is_space);
        }
        in_chunk += 1;
    }
    cuts.push(text.len());
    (1..cuts.len()).filter_map(move |end| text.get(cuts[end - 1]..cuts[end])).filter(|piece| !piece.is_empty())
}

/// Python's `str.isspace`: white space, and the four separators of ASCII.
fn is_python_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1C}'..='\u{1F}').contains(&character)
}

#[cfg(test)]
mod tests;
