//! Decodes tokens as they are generated.

use super::Tokenizer;

/// The number of tokens that are decoded again with each new one. A decoder whose output depends on earlier tokens (a space
/// before a word) then yields the same text as for all tokens at once.
const CONTEXT: usize = 6;
/// The number of tokens after which a character that is still incomplete is emitted as U+FFFD.
const MAX_INCOMPLETE_TOKENS: usize = 16;

/// Decodes tokens one at a time, and holds back incomplete characters.
#[derive(Debug)]
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The bytes of an incomplete character.
    bytes: Vec<u8>,
    /// For tokenizers whose tokens are not bytes: up to [`CONTEXT`] tokens whose text was emitted, then those whose text was
    /// not.
    tokens: Vec<u32>,
    /// The number of `tokens` whose text was emitted.
    emitted: usize,
}

impl<'a> TokenStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, bytes: Vec::new(), tokens: Vec::new(), emitted: 0 }
    }

    /// The text that this token completes; empty while a character is incomplete.
    pub fn push(&mut self, token: u32) -> String {
        if let Some(bytes) = self.tokenizer.token_bytes(&[token]) {
            self.bytes.extend(bytes);
            return self.complete_characters();
        }
        self.tokens.push(token);
        let text = self.new_text();
        if text.ends_with(char::REPLACEMENT_CHARACTER) && self.tokens.len() - self.emitted < MAX_INCOMPLETE_TOKENS {
            return String::new();
        }
        self.mark_emitted();
        text
    }

    /// The rest of the text, with U+FFFD for an incomplete character.
    pub fn finish(&mut self) -> String {
        let mut text = String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned();
        text.push_str(&self.new_text());
        self.mark_emitted();
        text
    }

    /// Removes all complete characters from the bytes, with U+FFFD for invalid ones.
    fn complete_characters(&mut self) -> String {
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.bytes) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.bytes.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.bytes[..valid]));
                    let Some(invalid) = error.error_len() else {
                        // The rest may be the start of a character.
                        self.bytes.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.bytes.drain(..valid + invalid);
                }
            }
        }
    }

    /// The text that the tokens after the emitted ones add. It is found by comparison, because the decoder may change the
    /// end of the earlier text.
    fn new_text(&self) -> String {
        if self.emitted == self.tokens.len() {
            return String::new();
        }
        let before = self.tokenizer.decode(&self.tokens[..self.emitted]);
        let all = self.tokenizer.decode(&self.tokens);
        let common = before.char_indices().zip(all.char_indices()).find(|(a, b)| a.1 != b.1).map(|(a, _)| a.0);
        all.get(common.unwrap_or(before.len())..).unwrap_or_default().to_owned()
    }

    fn mark_emitted(&mut self) {
        let surplus = self.tokens.len().saturating_sub(CONTEXT);
        self.tokens.drain(..surplus);
        self.emitted = self.tokens.len();
    }
}
