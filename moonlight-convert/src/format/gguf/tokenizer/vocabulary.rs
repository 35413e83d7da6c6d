//! The tokens of a `tokenizer.json` by id, and its merges.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use serde::Deserialize;
use serde_json::Value;

use crate::printable::printable;
use crate::tokenizer::{AddedToken, SpecialNames};

/// The most token ids, many times the largest vocabulary.
pub(super) const MOST_TOKENS: usize = 1 << 22;
/// The length limit in bytes of a token that is compared with all its parts, whose time grows with the square.
pub(super) const LONGEST_TOKEN: usize = 512;

/// The limit of the sum of the squares of all lengths in bytes, for the time that it takes to compare tokens with their parts.
/// Those of a vocabulary of 256,000 tokens add up to some 20 million.
const MOST_COMPARED: u64 = 1 << 31;

/// Refuses tokens that would take too long to be compared with all their parts.
///
/// # Errors
///
/// The rest of a sentence that begins with the tokenizer.
pub(super) fn check_lengths<'a>(mut tokens: impl Iterator<Item = &'a str>) -> Result<(), String> {
    let square = |token: &str| (token.len().min(LONGEST_TOKEN) as u64).pow(2);
    match tokens.try_fold(0u64, |sum, token| Some(sum + square(token)).filter(|sum| *sum <= MOST_COMPARED)) {
        Some(_) => Ok(()),
        None => Err("has more and longer tokens than any vocabulary".into()),
    }
}

/// `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum TokenType {
    Normal = 1,
    Unknown = 2,
    /// A special token.
    Control = 3,
    /// An added token that is not special.
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

impl TokenType {
    pub(super) fn from_number(number: i64) -> Option<Self> {
        use TokenType as T;
        [T::Normal, T::Unknown, T::Control, T::UserDefined, T::Unused, T::Byte]
            .into_iter()
            .find(|kind| *kind as i64 == number)
    }
}

/// The sections of a `tokenizer.json`.
#[derive(Debug, Deserialize)]
pub(super) struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<AddedEntry>,
    #[serde(default)]
    pub(super) normalizer: Value,
    #[serde(default)]
    pub(super) pre_tokenizer: Value,
    #[serde(default)]
    pub(super) post_processor: Value,
    model: Value,
}

#[derive(Debug, Deserialize)]
struct AddedEntry {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    special: bool,
}

/// A model of the type BPE.
#[derive(Debug, Deserialize)]
struct Bpe {
    vocab: HashMap<String, u32>,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    unk_token: Option<String>,
    #[serde(default)]
    dropout: Option<f32>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
}

/// A pair in either of the two spellings.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Merge {
    Text(String),
    Pair(String, String),
}

impl Merge {
    fn parts(&self) -> Option<(&str, &str)> {
        match self {
            Self::Text(text) => text.split_once(' '),
            Self::Pair(left, right) => Some((left, right)),
        }
    }
}

/// A vocabulary with its merges.
#[derive(Debug)]
pub(super) struct Vocabulary {
    /// Tokens of the model by id, spelled as in the file. An added token may be among them.
    pub(super) tokens: BTreeMap<u32, String>,
    /// Added tokens by id, with the properties that the files next to the tokenizer give them.
    pub(super) added: BTreeMap<u32, AddedToken>,
    /// Pairs of tokens by id, and the token that each forms, in order of precedence.
    pub(super) merges: Vec<[u32; 3]>,
    pub(super) ignore_merges: bool,
    pub(super) byte_fallback: bool,
    pub(super) unknown: Option<u32>,
}

impl Vocabulary {
    /// Reads the model and the added tokens; `names` are the tokens that the files next to it name.
    ///
    /// # Errors
    ///
    /// The rest of a sentence that begins with the tokenizer.
    pub(super) fn read(json: &mut TokenizerJson, names: &SpecialNames) -> Result<Self, String> {
        let kind = json.model["type"].as_str().unwrap_or("BPE");
        if kind != "BPE" {
            return Err(format!("is of the type `{}`; llama.cpp's are BPE for these models", printable(kind)));
        }
        let bpe: Bpe = serde_json::from_value(json.model.take())
            .map_err(|error| format!("has a model that is not BPE: {error}"))?;
        if bpe.dropout.is_some_and(|dropout| dropout > 0.0) {
            return Err("drops merges at random (`dropout`)".into());
        }
        for (key, text) in [
            ("continuing_subword_prefix", &bpe.continuing_subword_prefix),
            ("end_of_word_suffix", &bpe.end_of_word_suffix),
        ] {
            if text.as_ref().is_some_and(|text| !text.is_empty()) {
                return Err(format!("has a `{key}`, which llama.cpp does not"));
            }
        }
        if bpe.vocab.len() > MOST_TOKENS {
            return Err(format!("has more than {MOST_TOKENS} tokens"));
        }
        let mut merges = Vec::with_capacity(bpe.merges.len());
        let mut joined = String::new();
        for merge in &bpe.merges {
            joined.clear();
            let parts = merge.parts().ok_or("has a merge that is not a pair")?;
            write!(joined, "{}{}", parts.0, parts.1).expect("a String can be written to");
            let id = |text: &str| bpe.vocab.get(text).copied();
            match (id(parts.0), id(parts.1), id(&joined)) {
                (Some(left), Some(right), Some(whole)) => merges.push([left, right, whole]),
                _ => {
                    return Err(format!(
                        "has a merge that forms `{}`, with a part that is no token",
                        printable(&joined)
                    ));
                }
            }
        }
        let added = added_tokens(&json.added_tokens, &bpe.vocab, names);
        let unknown = bpe.unk_token.as_ref().and_then(|text| bpe.vocab.get(text).copied());
        let count = bpe.vocab.len();
        let tokens: BTreeMap<u32, String> = bpe.vocab.into_iter().map(|(token, id)| (id, token)).collect();
        if tokens.len() != count {
            return Err("has two tokens with the same id".into());
        }
        check_lengths(tokens.values().map(String::as_str))?;
        let Bpe { ignore_merges, byte_fallback, .. } = bpe;
        Ok(Self { tokens, added, merges, ignore_merges, byte_fallback, unknown })
    }

    /// The text of a token, an added one or one of the model.
    pub(super) fn text(&self, id: u32) -> Option<&str> {
        self.added.get(&id).map(|token| token.content.as_str()).or_else(|| self.tokens.get(&id).map(String::as_str))
    }

    /// The id of a text.
    pub(super) fn id(&self, text: &str) -> Option<u32> {
        let added = self.added.iter().find(|(_, token)| token.content == text).map(|(&id, _)| id);
        added.or_else(|| self.tokens.iter().find(|(_, token)| *token == text).map(|(&id, _)| id))
    }

    /// The tokens of the model that its merges do not form from single characters, so that only a piece that is not merged
    /// can become one.
    pub(super) fn not_formed(&self) -> Vec<u32> {
        let by_text: HashMap<&str, u32> = self.tokens.iter().map(|(&id, token)| (token.as_str(), id)).collect();
        let mut ranks: HashMap<(u32, u32), (usize, u32)> = HashMap::with_capacity(self.merges.len());
        for (rank, &[left, right, whole]) in self.merges.iter().enumerate() {
            ranks.entry((left, right)).or_insert((rank, whole));
        }
        let formed = |token: &str, id: u32| {
            if token.len() > LONGEST_TOKEN {
                return false;
            }
            let characters = token.char_indices().map(|(at, character)| &token[at..at + character.len_utf8()]);
            let Some(mut parts) = characters.map(|part| by_text.get(part).copied()).collect::<Option<Vec<u32>>>()
            else {
                return false;
            };
            loop {
                let pairs = parts.windows(2).enumerate();
                let best = pairs.filter_map(|(at, pair)| Some((ranks.get(&(pair[0], pair[1]))?, at))).min();
                let Some((&(_, whole), at)) = best else { break };
                parts[at] = whole;
                parts.remove(at + 1);
            }
            parts == [id]
        };
        let tokens = self.tokens.iter().filter(|(id, _)| !self.added.contains_key(id));
        tokens.filter(|(id, token)| !formed(token, **id)).map(|(&id, _)| id).collect()
    }
}

/// The added tokens of a `tokenizer.json` and of the files next to it, with the ids that `tokenizers` assigns: that of the
/// same text in the model's vocabulary, else the next one after all others.
fn added_tokens(
    listed: &[AddedEntry],
    vocab: &HashMap<String, u32>,
    names: &SpecialNames,
) -> BTreeMap<u32, AddedToken> {
    let listed = listed.iter().map(|entry| AddedToken {
        content: entry.content.clone(),
        special: entry.special || names.named.contains(&entry.content),
        single_word: entry.single_word,
        lstrip: entry.lstrip,
        rstrip: entry.rstrip,
        normalized: entry.normalized,
    });
    let mut ids: HashMap<String, u32> = HashMap::new();
    let mut tokens: BTreeMap<u32, AddedToken> = BTreeMap::new();
    let count = vocab.len() as u32;
    for token in listed.chain(names.added.values().cloned()).filter(|token| !token.content.is_empty()) {
        let id = match ids.get(&token.content).or_else(|| vocab.get(&token.content)) {
            Some(&id) => id,
            None => tokens.last_key_value().map_or(count, |(&last, _)| count.max(last.saturating_add(1))),
        };
        ids.insert(token.content.clone(), id);
        // A token that was special once remains special.
        let special = token.special || tokens.get(&id).is_some_and(|known| known.special);
        tokens.insert(id, AddedToken { special, ..token });
    }
    tokens
}

/// The ids at which the file lists added tokens, where `tokenizers` assigns others.
pub(super) fn moved_ids(json: &TokenizerJson, added: &BTreeMap<u32, AddedToken>) -> Option<String> {
    let moved = json.added_tokens.iter().find(|entry| {
        !entry.content.is_empty() && added.get(&entry.id).is_none_or(|token| token.content != entry.content)
    })?;
    let assigned = added.iter().find(|(_, token)| token.content == moved.content)?.0;
    let content = printable(&moved.content);
    Some(format!("the added token `{content}` has the id {assigned}, as `tokenizers` assigns it, and not {}", moved.id))
}
