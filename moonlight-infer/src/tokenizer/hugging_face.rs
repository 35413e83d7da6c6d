//! `tokenizer.json`, by Hugging Face's `tokenizers` crate.

use std::sync::OnceLock;

#[cfg(feature = "server")]
use moonlight_convert::tokenizer::byte_to_char;
use moonlight_convert::tokenizer::{AddedToken, SpecialNames};
use serde::Deserialize;
use tokenizers::Tokenizer as Inner;
use tokenizers::tokenizer::{NormalizedString, Normalizer};
use tokenizers::{NormalizerWrapper, normalizers};

use super::added_tokens::AddedTokens;
use super::limits;
use super::post_processor::AffixTokens;
use crate::catch_panic::catch_panic;

/// The message for a panic in the crate, which does not validate everything in a file.
const LIBRARY_FAILED: &str = "the `tokenizers` library failed: the tokenizer.json is damaged, or has an unknown layout";

/// The number of bytes of a text that are normalized as a trial, if the normalizer may expand the text.
const TRIAL_BYTES: usize = 4096;

/// A tokenizer of the `tokenizers` crate, with variants that are created when they are first needed.
pub(super) struct HuggingFace {
    inner: Inner,
    vocab_size: usize,
    /// Whether the normalizer may expand a text so much that it is tried step by step first.
    may_expand: bool,
    affixes: AffixTokens,
    added: AddedTokens,
    /// The variant of `inner` that parses special tokens: a second copy of it in memory.
    parsing: OnceLock<Box<Inner>>,
    /// Whether the start of a text is encoded differently from the same words after others.
    prepends_first_only: bool,
    /// `inner` with [`ANCHOR`] as an added token, if `prepends_first_only`.
    anchored: OnceLock<Box<Inner>>,
}

/// A token that is put before a text, so that the text does not start the input. It is a noncharacter, which texts do not
/// contain.
const ANCHOR: char = '\u{10FFFF}';

impl HuggingFace {
    /// Parses the bytes of a file; `names` are the tokens that the files next to it name. Contradictions between the files
    /// that are not errors are added to `notes`.
    pub(super) fn parse(contents: &[u8], names: &SpecialNames, notes: &mut Vec<String>) -> Result<Self, String> {
        // The limits are checked before the crate parses the file: a huge allocation or a stack overflow aborts the process,
        // which cannot be caught.
        let limits::CheckedFile { json, may_expand, prepends_first_only, affixes } = limits::checked(contents)?;
        let parsed = catch_panic(|| Self::parse_checked(&json, may_expand, affixes, names, notes));
        parsed.unwrap_or_else(|| Err(LIBRARY_FAILED.into())).map(|tokenizer| Self { prepends_first_only, ..tokenizer })
    }

    fn parse_checked(
        json: &[u8],
        may_expand: bool,
        affixes: AffixTokens,
        names: &SpecialNames,
        notes: &mut Vec<String>,
    ) -> Result<Self, String> {
        let listed: JsonParts = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        if let Some(normalizer) = listed.normalizer.as_ref().filter(|_| may_expand) {
            // The crate normalizes added tokens while it parses the file, however long they become.
            let listed = listed.added_tokens.iter().filter(|token| token.normalized).map(|token| &token.content);
            let named = names.added.values().filter(|token| token.normalized).map(|token| &token.content);
            for text in listed.chain(named) {
                check_growth(normalizer, &mut NormalizedString::from(text.as_str()), limits::GROWTH_SLACK)?;
            }
        }
        let mut inner = Inner::from_bytes(json).map_err(|error| error.to_string())?;
        add_named_tokens(&mut inner, &listed, names, notes)?;
        // Special tokens in a text are encoded as text; `parsing` is the variant that parses them.
        inner.set_encode_special_tokens(true);
        // Padding and truncation are settings of a training pipeline, and would change the tokens of a text.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| error.to_string())?;
        let vocab = inner.get_vocab(true);
        if let Some(token) = vocab.keys().find(|token| token.len() > limits::MAX_TOKEN_BYTES) {
            let (bytes, limit) = (token.len(), limits::MAX_TOKEN_BYTES);
            return Err(format!("it has a token of {bytes} bytes, more than the limit of {limit}"));
        }
        let vocab_size = vocab.into_values().max().map_or(0, |id| id as usize + 1);
        let added = inner.get_added_tokens_decoder().into_iter().map(|(id, token)| {
            // As in the crate, a token that was added as special once remains special.
            let special = inner.get_added_vocabulary().is_special_token(&token.content);
            (
                id,
                AddedToken {
                    content: token.content,
                    special,
                    single_word: token.single_word,
                    lstrip: token.lstrip,
                    rstrip: token.rstrip,
                    normalized: token.normalized,
                },
            )
        });
        let added = AddedTokens::new(added.collect())?;
        let (parsing, anchored) = (OnceLock::new(), OnceLock::new());
        let tokenizer =
            Self { inner, vocab_size, may_expand, affixes, added, parsing, prepends_first_only: false, anchored };
        // A model without byte fallback and unknown token fails at a character that is not in its vocabulary, and a damaged
        // table of characters at those that it maps. Fail here, rather than in the middle of a data set.
        let ordinary: String = (' '..='~').chain('\u{A0}'..='\u{17F}').collect();
        for text in ["\u{0}\u{E000}\u{F8FF}\u{10FFFD}", &ordinary] {
            let trial = tokenizer.tokens(&tokenizer.inner, text);
            trial.map_err(|error| format!("it has no token for unknown characters: {error}"))?;
        }
        Ok(tokenizer)
    }

    /// The tokens of a text, with special tokens parsed if `parse_special`. The error is the rest of a sentence about the
    /// text.
    pub(super) fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>, String> {
        let inner = if parse_special { self.parsing() } else { &self.inner };
        catch_panic(|| self.tokens(inner, text)).unwrap_or_else(|| Err(LIBRARY_FAILED.into()))
    }

    /// The tokens of a text that continues another.
    pub(super) fn encode_continuation(&self, text: &str) -> Result<Vec<u32>, String> {
        if !self.prepends_first_only || text.contains(ANCHOR) {
            return self.encode(text, false);
        }
        let anchored = self.anchored.get_or_init(|| {
            let mut anchored = Box::new(self.inner.clone());
            let token = tokenizers::AddedToken::from(ANCHOR, false).normalized(false);
            // If it fails, the check below falls back to `encode`.
            let _ = anchored.add_tokens([token]);
            anchored
        });
        let tokens = catch_panic(|| self.tokens(anchored, &format!("{ANCHOR}{text}")));
        let mut tokens = tokens.unwrap_or_else(|| Err(LIBRARY_FAILED.into()))?;
        match tokens.first() == anchored.token_to_id(&ANCHOR.to_string()).as_ref() {
            true => tokens.remove(0),
            false => return self.encode(text, false),
        };
        Ok(tokens)
    }

    /// The bytes that a token spells: in GPT-2's alphabet, or as `<0xHH>` with byte fallback.
    #[cfg(feature = "server")]
    pub(super) fn raw_bytes(&self, token: u32) -> Option<Vec<u8>> {
        let spelled = self.inner.id_to_token(token)?;
        let fallback = spelled.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        if let Some(byte) = fallback.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            return Some(vec![byte]);
        }
        let byte = |character| (0..=u8::MAX).find(|&byte| byte_to_char(byte) == character);
        spelled.chars().map(byte).collect()
    }

    fn parsing(&self) -> &Inner {
        self.parsing.get_or_init(|| {
            let mut parsing = Box::new(self.inner.clone());
            parsing.set_encode_special_tokens(false);
            parsing
        })
    }

    fn tokens(&self, inner: &Inner, text: &str) -> Result<Vec<u32>, String> {
        if self.may_expand
            && let Some(normalizer) = self.inner.get_normalizer()
        {
            // Try the start of the text first: a normalizer that expands without bound exceeds the limit there with little
            // memory.
            for length in [TRIAL_BYTES.min(text.len()), text.len()] {
                let tried = &text[..text.floor_char_boundary(length)];
                let limit = limits::MAX_GROWTH.saturating_mul(tried.len()).saturating_add(limits::GROWTH_SLACK);
                check_growth(normalizer, &mut NormalizedString::from(tried), limit)?;
            }
        }
        let encoding = inner.encode_fast(text, false).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens, with special tokens if `with_special`; U+FFFD if the crate fails.
    pub(super) fn decode(&self, tokens: &[u32], with_special: bool) -> String {
        let decoded = catch_panic(|| self.inner.decode(tokens, !with_special).ok());
        decoded.flatten().unwrap_or_else(|| char::REPLACEMENT_CHARACTER.into())
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The prefix and suffix of a text.
    pub(super) fn affixes(&self) -> &AffixTokens {
        &self.affixes
    }

    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    pub(super) fn added(&self) -> &AddedTokens {
        &self.added
    }
}

/// The sections of a `tokenizer.json` that are needed before the crate parses the file.
#[derive(Deserialize)]
struct JsonParts {
    #[serde(default)]
    added_tokens: Vec<AddedTokenEntry>,
    #[serde(default)]
    normalizer: Option<NormalizerWrapper>,
}

#[derive(Deserialize)]
struct AddedTokenEntry {
    id: u32,
    content: String,
    #[serde(default)]
    normalized: bool,
}

/// Adds the tokens that the files next to a `tokenizer.json` name, as transformers does: those of `added_tokens_decoder` get
/// their properties, and `eos_token` and the like become special. The crate may assign an id that differs from the one in the
/// file, as it does in transformers; this is reported in `notes`.
fn add_named_tokens(
    inner: &mut Inner,
    listed: &JsonParts,
    names: &SpecialNames,
    notes: &mut Vec<String>,
) -> Result<(), String> {
    let as_named = |token: &AddedToken| {
        tokenizers::AddedToken::from(token.content.clone(), token.special)
            .single_word(token.single_word)
            .lstrip(token.lstrip)
            .rstrip(token.rstrip)
            .normalized(token.normalized)
    };
    let known = inner.get_added_tokens_decoder();
    let becomes_special = known.values().filter(|token| !token.special && names.named.contains(&token.content));
    let special = becomes_special.map(|token| token.clone().special(true));
    let tokens: Vec<_> = special.chain(names.added.values().map(as_named)).collect();
    inner.add_tokens(tokens).map_err(|error| error.to_string())?;
    let expected = listed.added_tokens.iter().map(|token| (token.id, &token.content));
    for (id, content) in expected.chain(names.added.iter().map(|(&id, token)| (id, &token.content))) {
        if let Some(assigned) = inner.token_to_id(content).filter(|&assigned| assigned != id) {
            let content = content.escape_debug();
            notes.push(format!(
                "the added token `{content}` has the id {assigned}, as in transformers, and not {id} as in the file: there is \
                 a gap before it, or the vocabulary of the model has the token"
            ));
        }
    }
    Ok(())
}

/// Normalizes a text step by step, and checks after each step that it has at most `limit` bytes, so that a chain of steps
/// stops at the first one that expands the text too much.
fn check_growth(normalizer: &NormalizerWrapper, text: &mut NormalizedString, limit: usize) -> Result<(), String> {
    if let NormalizerWrapper::Sequence(steps) = normalizer {
        let steps: &normalizers::Sequence = steps;
        return steps.as_ref().iter().try_for_each(|step| check_growth(step, text, limit));
    }
    normalizer.normalize(text).map_err(|error| error.to_string())?;
    match text.len() > limit {
        true => Err(format!("its normalizer makes {} bytes of {}, past the limit", text.len(), text.len_original())),
        false => Ok(()),
    }
}
