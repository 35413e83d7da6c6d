//! Moonlight's `tiktoken.model`, by the `tiktoken-rs` crate.
//!
//! The same as the published `tokenization_moonshot.py`, except that text which spells a special token stays text where
//! nobody asks for more, and that added tokens are matched as `tokenizers` matches them: by word, with the white space beside
//! them, where `tokenizer_config.json` says so.

use moonlight_convert::tokenizer::{BosEos, Ranks, SpecialNames, pattern, special_tokens};
use rustc_hash::FxHashMap;
use tiktoken_rs::CoreBPE;

use super::added_tokens::{AddedTokens, Piece};
use super::post_processor::AffixTokens;

/// Characters that are encoded at a time.
const CHUNK: usize = 400_000;
/// The longest run of white space, or of anything else, that is encoded at a time.
const RUN: usize = 25_000;

/// The byte-pair encoding and the added tokens.
pub(super) struct Tiktoken {
    inner: CoreBPE,
    ranks: u32,
    added: AddedTokens,
    affixes: AffixTokens,
    vocab_size: usize,
}

impl Tiktoken {
    /// Reads the file's bytes; `names` are the added tokens that the files beside it name.
    pub(super) fn parse(contents: &[u8], names: &SpecialNames) -> Result<Self, String> {
        let ranks = Ranks::parse(contents).map_err(|error| error.to_string())?;
        let tokens = special_tokens(ranks.count(), &names.added)?;
        let BosEos { bos, eos } = BosEos::new(names, &tokens)?;
        let affixes = AffixTokens { prefix: bos.into_iter().collect(), suffix: eos.into_iter().collect() };
        let vocab_size = tokens.last_key_value().map_or(ranks.count(), |(&id, _)| id + 1) as usize;
        let encoder = ranks.tokens().iter().cloned().zip(0..).collect();
        let inner = CoreBPE::new(encoder, FxHashMap::default(), &pattern()).map_err(|error| error.to_string())?;
        Ok(Self { inner, ranks: ranks.count(), added: AddedTokens::new(tokens)?, affixes, vocab_size })
    }

    /// The tokens of a text, its special ones where `parse_special` says so.
    pub(super) fn encode(&self, text: &str, parse_special: bool) -> Vec<u32> {
        let mut tokens = Vec::new();
        for piece in self.added.split(text, |token| parse_special || !token.special) {
            match piece {
                Piece::Token(id) => tokens.push(id),
                Piece::Text(text) => {
                    tokens.extend(pieces(text).flat_map(|piece| self.inner.encode_ordinary(piece)));
                }
            }
        }
        tokens
    }

    /// The bytes of the tokens; special ones have theirs `with_special` only.
    pub(super) fn bytes(&self, tokens: &[u32], with_special: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        for run in tokens.chunk_by(|a, b| (*a < self.ranks) == (*b < self.ranks)) {
            if run[0] < self.ranks {
                // Every rank has a token, as `parse` has seen.
                bytes.extend(self.inner.decode_bytes(run).unwrap_or_default());
                continue;
            }
            let added = run.iter().filter_map(|&id| self.added.get(id));
            for token in added.filter(|token| with_special || !token.special) {
                bytes.extend_from_slice(token.content.as_bytes());
            }
        }
        bytes
    }

    /// What begins and ends a text.
    pub(super) fn affixes(&self) -> &AffixTokens {
        &self.affixes
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    pub(super) fn added(&self) -> &AddedTokens {
        &self.added
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
