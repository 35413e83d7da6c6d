//! `tokenizer.json`, by Hugging Face's own crate.

use tokenizers::Tokenizer as Inner;
use tokenizers::tokenizer::{NormalizedString, Normalizer};
use tokenizers::{NormalizerWrapper, normalizers};

use super::limits;
use super::post_processor::Around;
use crate::guard::unpanicked;

/// What is said of a panic: the crate takes a file's word for much.
const FAILED: &str =
    "the `tokenizers` library failed at it: its tokenizer.json is damaged, or of a form that is not known";

/// So much of a text is normalized first where the normalizer is watched.
const PREFIX: usize = 4096;

/// A tokenizer as `tokenizers` runs it, special tokens in a text being text.
pub(super) struct HuggingFace {
    inner: Inner,
    vocab_size: usize,
    /// Whether a text could grow so much while it is normalized that each is tried step by step first.
    watched: bool,
    around: Around,
}

impl HuggingFace {
    /// Reads the file's bytes.
    pub(super) fn parse(contents: &[u8]) -> Result<Self, String> {
        // Before the crate sees them: what aborts cannot be caught.
        let limits::Checked { json, watched, around } = limits::checked(contents)?;
        let parse = || Self::parse_checked(&json, watched, around);
        unpanicked(parse).unwrap_or_else(|| Err(FAILED.into()))
    }

    fn parse_checked(json: &[u8], watched: bool, around: Around) -> Result<Self, String> {
        let mut inner = Inner::from_bytes(json).map_err(|error| error.to_string())?;
        inner.set_encode_special_tokens(true);
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| error.to_string())?;
        let vocab = inner.get_vocab(true);
        if let Some(token) = vocab.keys().find(|token| token.len() > limits::LONGEST_TOKEN) {
            let (bytes, most) = (token.len(), limits::LONGEST_TOKEN);
            return Err(format!("it has a token of {bytes} bytes, more than the limit of {most}"));
        }
        let vocab_size = vocab.into_values().max().map_or(0, |id| id as usize + 1);
        let tokenizer = Self { inner, vocab_size, watched, around };
        // A model that has neither bytes nor an unknown token fails on a character that it has not seen, and a table of
        // characters that is damaged at those that are in it. Say so now, not in the middle of the data.
        let ordinary: String = (' '..='~').chain('\u{A0}'..='\u{17F}').collect();
        for text in ["\u{0}\u{E000}\u{F8FF}\u{10FFFD}", &ordinary] {
            let known = tokenizer.tokens(text);
            known.map_err(|error| format!("it has no token for a character that it does not know: {error}"))?;
        }
        Ok(tokenizer)
    }

    /// The tokens of a text; the error is why it has none.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        unpanicked(|| self.tokens(text)).unwrap_or_else(|| Err(FAILED.into()))
    }

    fn tokens(&self, text: &str) -> Result<Vec<u32>, String> {
        if self.watched
            && let Some(normalizer) = self.inner.get_normalizer()
        {
            // A beginning first: a text that runs away does so there, in little memory.
            for length in [PREFIX.min(text.len()), text.len()] {
                let tried = &text[..text.floor_char_boundary(length)];
                let most = limits::GROWTH.saturating_mul(tried.len()).saturating_add(limits::SLACK);
                grown(normalizer, &mut NormalizedString::from(tried), most)?;
            }
        }
        let encoding = self.inner.encode_fast(text, false).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens; U+FFFD where the crate fails at them.
    pub(super) fn decode(&self, tokens: &[u32]) -> String {
        let decoded = unpanicked(|| self.inner.decode(tokens, true).ok());
        decoded.flatten().unwrap_or_else(|| char::REPLACEMENT_CHARACTER.into())
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// What the file puts around a text.
    pub(super) fn around(&self) -> &Around {
        &self.around
    }

    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    /// The id of an added token that is marked special.
    pub(super) fn special(&self, text: &str) -> Option<u32> {
        let id = self.id(text)?;
        self.inner
            .get_added_tokens_decoder()
            .get(&id)
            .filter(|token| token.special && !token.content.is_empty())
            .map(|_| id)
    }

    pub(super) fn specials(&self) -> Vec<(String, u32)> {
        let added = self.inner.get_added_tokens_decoder();
        // A token without a text stands for none.
        let special = added.into_iter().filter(|(_, token)| token.special && !token.content.is_empty());
        let mut specials: Vec<(String, u32)> = special.map(|(id, token)| (token.content, id)).collect();
        specials.sort_by_key(|(_, id)| *id);
        specials
    }
}

/// Normalizes a text step by step; each may make it larger only so much, so that no chain of them runs away.
fn grown(normalizer: &NormalizerWrapper, text: &mut NormalizedString, most: usize) -> Result<(), String> {
    if let NormalizerWrapper::Sequence(steps) = normalizer {
        let steps: &normalizers::Sequence = steps;
        return steps.as_ref().iter().try_for_each(|step| grown(step, text, most));
    }
    normalizer.normalize(text).map_err(|error| error.to_string())?;
    match text.len() > most {
        true => Err(format!("its normalizer makes {} bytes of {}, past the limit", text.len(), text.len_original())),
        false => Ok(()),
    }
}
