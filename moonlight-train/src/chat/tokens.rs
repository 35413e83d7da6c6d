//! From the text of a template to tokens: what the template spells is special, what people say is not.

use aho_corasick::{AhoCorasick, MatchKind};

use super::{ChatError, ChatTemplate, Message};
use crate::tokenizer::Tokenizer;

/// Characters of a private plane. The `n`th stands for the `n`th special token where somebody's words spell it, so that
/// a template may cut and trim the words as it likes, and the token is still told from the template's own.
const FIRST_STAND_IN: u32 = 0x10_0000;
const STAND_INS: usize = 0xFFFD;

impl ChatTemplate {
    /// The tokens of a conversation; with `add_generation_prompt` they end where the assistant begins to speak.
    ///
    /// Words of a message that spell a special token are encoded as the text that they are.
    ///
    /// # Errors
    ///
    /// Those of [`ChatTemplate::render`].
    pub fn tokens(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, ChatError> {
        let specials = Specials::new(tokenizer);
        let disguised: Vec<Message> = messages
            .iter()
            .map(|message| Message::new(message.role.clone(), specials.disguise(&message.content)))
            .collect();
        Ok(specials.encode(tokenizer, &self.render(&disguised, add_generation_prompt)?))
    }
}

/// The special tokens of a tokenizer, to be found in texts.
struct Specials {
    names: Vec<(String, u32)>,
    finder: AhoCorasick,
}

impl Specials {
    fn new(tokenizer: &Tokenizer) -> Self {
        let mut names = tokenizer.specials();
        names.truncate(STAND_INS);
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(names.iter().map(|(name, _)| name))
            .expect("a few hundred short names are no load for the automaton");
        Self { names, finder }
    }

    /// Words with a stand-in for each special token that they spell. A stand-in that somebody wrote is dropped: it is
    /// no character of any script.
    fn disguise(&self, words: &str) -> String {
        let words: String = words.chars().filter(|&character| self.index_of(character).is_none()).collect();
        let mut disguised = String::with_capacity(words.len());
        let mut end = 0;
        for found in self.finder.find_iter(&words) {
            disguised.push_str(&words[end..found.start()]);
            disguised.extend(char::from_u32(FIRST_STAND_IN + found.pattern().as_u32()));
            end = found.end();
        }
        disguised.push_str(&words[end..]);
        disguised
    }

    fn index_of(&self, character: char) -> Option<usize> {
        let index = u32::from(character).checked_sub(FIRST_STAND_IN)? as usize;
        (index < self.names.len()).then_some(index)
    }

    fn encode(&self, tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        let mut tokens = Vec::new();
        let mut end = 0;
        let ordinary = |text: &str, tokens: &mut Vec<u32>| {
            if !text.is_empty() {
                tokens.extend(tokenizer.encode(&self.reveal(text)));
            }
        };
        for found in self.finder.find_iter(text) {
            ordinary(&text[end..found.start()], &mut tokens);
            tokens.push(self.names[found.pattern().as_usize()].1);
            end = found.end();
        }
        ordinary(&text[end..], &mut tokens);
        tokens
    }

    /// The words as they were.
    fn reveal(&self, text: &str) -> String {
        let mut words = String::with_capacity(text.len());
        for character in text.chars() {
            match self.index_of(character) {
                Some(index) => words.push_str(&self.names[index].0),
                None => words.push(character),
            }
        }
        words
    }
}
