//! Moonlight's `tiktoken.model`, by the `tiktoken-rs` crate.
//!
//! It differs from the published `tokenization_moonshot.py` in two ways. Special tokens in a text are parsed only on request.
//! Added tokens are matched as by `tokenizers`: as a whole word or with the white space around them, if
//! `tokenizer_config.json` asks for it.

use moonlight_convert::tokenizer::{BosEos, Ranks, SpecialNames, pattern, special_tokens};
use rustc_hash::FxHashMap;
use tiktoken_rs::CoreBPE;

use super::added_tokens::{AddedTokens, Piece};
use super::post_processor::AffixTokens;

/// The number of characters that are encoded at a time, as in the published code.
const CHUNK: usize = 400_000;
/// The limit of a run of white space, or of other characters, that is encoded at a time, as in the published code.
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
    /// Parses the bytes of a file; `names` are the added tokens that the files next to it name.
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

    /// The tokens of a text, with special tokens parsed if `parse_special`.
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

    /// The bytes of tokens, including the names of special tokens if `with_special`.
    pub(super) fn bytes(&self, tokens: &[u32], with_special: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        for run in tokens.chunk_by(|a, b| (*a < self.ranks) == (*b < self.ranks)) {
            if run[0] < self.ranks {
                // `parse` has checked that every rank has a token.
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

    /// The prefix and suffix of a text.
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

/// Splits a text into pieces of at most [`CHUNK`] characters without runs longer than [`RUN`], at the same positions as the
/// published code. In longer runs the regular expression would backtrack too far.
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

/// Python's `str.isspace` for one character: Unicode's white space and the four ASCII separators.
fn is_python_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1C}'..='\u{1F}').contains(&character)
}

#[cfg(test)]
mod tests;
