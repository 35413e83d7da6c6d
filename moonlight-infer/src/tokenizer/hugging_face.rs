//! `tokenizer.json`, by Hugging Face's own crate.

use tokenizers::Tokenizer as Inner;

/// A tokenizer as `tokenizers` runs it, special tokens in a text being text.
pub(super) struct HuggingFace {
    inner: Inner,
    vocab_size: usize,
}

impl HuggingFace {
    /// Reads the file's bytes.
    pub(super) fn parse(contents: &[u8]) -> Result<Self, String> {
        let mut inner = Inner::from_bytes(contents).map_err(|error| error.to_string())?;
        inner.set_encode_special_tokens(true);
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| error.to_string())?;
        // A model that has neither bytes nor an unknown token fails on a character that it has not seen. Say so now,
        // not in the middle of the data.
        inner
            .encode_fast("\u{0}\u{E000}\u{F8FF}\u{10FFFD}", false)
            .map_err(|error| format!("it has no token for a character that it does not know: {error}"))?;
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        Ok(Self { inner, vocab_size })
    }

    pub(super) fn encode(&self, text: &str) -> Vec<u32> {
        // `parse` has seen that unknown characters do not fail, and nothing else can.
        self.inner.encode_fast(text, false).map(|encoding| encoding.get_ids().to_vec()).unwrap_or_default()
    }

    pub(super) fn decode(&self, tokens: &[u32]) -> String {
        self.inner.decode(tokens, true).unwrap_or_default()
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    /// The id of an added token that is marked special.
    pub(super) fn special(&self, text: &str) -> Option<u32> {
        let id = self.id(text)?;
        self.inner.get_added_tokens_decoder().get(&id).filter(|token| token.special).map(|_| id)
    }

    pub(super) fn specials(&self) -> Vec<(String, u32)> {
        let added = self.inner.get_added_tokens_decoder();
        let mut specials: Vec<(String, u32)> =
            added.into_iter().filter(|(_, token)| token.special).map(|(id, token)| (token.content, id)).collect();
        specials.sort_by_key(|(_, id)| *id);
        specials
    }
}
