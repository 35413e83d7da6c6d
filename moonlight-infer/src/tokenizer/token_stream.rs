//! Decoding while the tokens are still coming.

use super::Tokenizer;

/// Tokens that are decoded again with each new one, so that a decoder which looks back (a space before a word) gives
/// what it would have given for the whole.
const CONTEXT: usize = 6;
/// After so many tokens that end in half a character there is no hope for it.
const MAX_INCOMPLETE_TOKENS: usize = 16;

/// Decodes tokens one at a time and never gives half a character.
#[derive(Debug)]
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Bytes of a character that is not whole yet.
    bytes: Vec<u8>,
    /// For tokenizers whose tokens are not bytes: the last tokens that have been given, and those that have not.
    tokens: Vec<u32>,
    /// How many of `tokens` have been given.
    emitted: usize,
}

impl<'a> TokenStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, bytes: Vec::new(), tokens: Vec::new(), emitted: 0 }
    }

    /// The text that is whole with this token; empty while a character is still incomplete.
    pub fn push(&mut self, token: u32) -> String {
        if let Some(bytes) = self.tokenizer.token_bytes(&[token]) {
            self.bytes.extend(bytes);
            return self.whole_characters();
        }
        self.tokens.push(token);
        let text = self.new_text();
        if text.ends_with(char::REPLACEMENT_CHARACTER) && self.tokens.len() - self.emitted < MAX_INCOMPLETE_TOKENS {
            return String::new();
        }
        self.settle();
        text
    }

    /// What is left: a character that never became whole is U+FFFD.
    pub fn finish(&mut self) -> String {
        let mut text = String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned();
        text.push_str(&self.new_text());
        self.settle();
        text
    }

    /// Takes every whole character, and what can never be one as U+FFFD, from the bytes.
    fn whole_characters(&mut self) -> String {
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.bytes) {
                Ok(whole) => {
                    text.push_str(whole);
                    self.bytes.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.bytes[..valid]));
                    let Some(invalid) = error.error_len() else {
                        // The rest may still become a character.
                        self.bytes.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.bytes.drain(..valid + invalid);
                }
            }
        }
    }

    /// What the tokens that have not been given add to the text of those that have.
    fn new_text(&self) -> String {
        if self.emitted == self.tokens.len() {
            return String::new();
        }
        let before = self.tokenizer.decode(&self.tokens[..self.emitted]);
        let whole = self.tokenizer.decode(&self.tokens);
        let common = before.char_indices().zip(whole.char_indices()).find(|(a, b)| a.1 != b.1).map(|(a, _)| a.0);
        whole.get(common.unwrap_or(before.len())..).unwrap_or_default().to_owned()
    }

    fn settle(&mut self) {
        let surplus = self.tokens.len().saturating_sub(CONTEXT);
        self.tokens.drain(..surplus);
        self.emitted = self.tokens.len();
    }
}
