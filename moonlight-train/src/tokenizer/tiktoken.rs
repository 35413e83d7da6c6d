//! Moonlight's `tiktoken.model`: a line `base64(token) rank` for each token.
//!
//! The same as the published `tokenization_moonshot.py`, except that text which spells a special token stays text.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustc_hash::FxHashMap;
use tiktoken_rs::CoreBPE;

/// Special ids that follow the ranks. The published code names 258, of which the last two have no row in the embedding
/// of 163,840; nobody needs those.
const SPECIALS: u32 = 256;

/// The names that the published tokenizer gives to the first specials, by their distance from the last rank; all
/// others are `<|reserved_token_ID|>`. `tokenizer_config.json` has the last word.
const NAMES: [(u32, &str); 7] = [
    (0, "[BOS]"),
    (1, "[EOS]"),
    (2, "<|im_end|>"),
    (3, "<|im_user|>"),
    (4, "<|im_assistant|>"),
    (10, "<|im_system|>"),
    (17, "<|im_middle|>"),
];

/// How text falls into pieces before pairs are merged, joined by `|`.
const PATTERN: [&str; 8] = [
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
];

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
    /// Reads the file's bytes; `added` are the names of special tokens that `tokenizer_config.json` gives.
    pub(super) fn parse(contents: &[u8], added: BTreeMap<u32, String>) -> Result<Self, String> {
        let mut encoder = FxHashMap::default();
        let lines = contents.split(|&byte| byte == b'\n').enumerate();
        for (number, line) in lines.filter(|(_, line)| !line.trim_ascii().is_empty()) {
            let (token, rank) = parse_line(line)
                .ok_or_else(|| format!("line {} is not a token in base64, a space and its rank", number + 1))?;
            if encoder.insert(token, rank).is_some() {
                return Err(format!("line {} has a token that an earlier line has", number + 1));
            }
        }
        if let Some(byte) = (0..=u8::MAX).find(|byte| !encoder.contains_key([*byte].as_slice())) {
            return Err(format!("there is no token for the byte {byte}"));
        }
        let ranks = u32::try_from(encoder.len()).map_err(|_| "there are more tokens than 32 bits count".to_owned())?;
        let mut seen = vec![false; encoder.len()];
        for &rank in encoder.values() {
            match seen.get_mut(rank as usize) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(format!("the ranks are not 0 to {}, each once: look at {rank}", ranks - 1)),
            }
        }
        let special = special_tokens(ranks, added);
        let inner = CoreBPE::new(encoder, FxHashMap::default(), &PATTERN.join("|")).map_err(|e| e.to_string())?;
        Ok(Self { inner, ranks, special })
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

fn parse_line(line: &[u8]) -> Option<(Vec<u8>, u32)> {
    let text = std::str::from_utf8(line).ok()?;
    let (token, rank) = text.trim().split_once(' ')?;
    Some((STANDARD.decode(token).ok().filter(|token| !token.is_empty())?, rank.trim().parse().ok()?))
}

fn special_tokens(ranks: u32, added: BTreeMap<u32, String>) -> BTreeMap<String, u32> {
    let mut names: BTreeMap<u32, String> =
        (ranks..ranks + SPECIALS).map(|id| (id, format!("<|reserved_token_{id}|>"))).collect();
    names.extend(NAMES.iter().map(|&(distance, name)| (ranks + distance, name.to_owned())));
    names.extend(added.into_iter().filter(|(id, _)| (ranks..ranks + SPECIALS).contains(id)));
    names.into_iter().map(|(id, name)| (name, id)).collect()
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
