//! From the text of a template to tokens: what the template spells is special, what people say is not.

use aho_corasick::{AhoCorasick, MatchKind};

use super::{ChatError, ChatTemplate, Conversation, Message, Turn};
use crate::tokenizer::{Piece, Tokenizer};

/// Characters of a private-use plane. The `n`th replaces the `n`th special token where a message spells it, so that the
/// template may cut and trim the message as it likes, and the text is still distinguished from the template's own tokens.
const FIRST_STAND_IN: u32 = 0x10_0000;
const STAND_INS: usize = 0xFFF0;

/// The last characters of the same plane mark the ends of the assistant's words.
pub(super) const MARKS: [char; 2] = ['\u{10FFFA}', '\u{10FFFB}'];
/// And these number them.
pub(super) const DIGITS: [char; 8] =
    ['\u{10FFF0}', '\u{10FFF1}', '\u{10FFF2}', '\u{10FFF3}', '\u{10FFF4}', '\u{10FFF5}', '\u{10FFF6}', '\u{10FFF7}'];

/// A template and a tokenizer that turn conversations into tokens.
#[derive(Debug)]
pub struct ChatEncoder {
    template: ChatTemplate,
    tokenizer: Tokenizer,
    specials: Specials,
}

/// Tokens, and how much each counts in the loss when it is predicted.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightedTokens {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// A weight for each; 0 for what is given and not learned.
    pub weights: Vec<f32>,
}

impl ChatEncoder {
    /// Prepares the search for special tokens, which is kept.
    pub fn new(template: ChatTemplate, tokenizer: Tokenizer) -> Self {
        let specials = Specials::new(&tokenizer);
        Self { template, tokenizer, specials }
    }

    /// The template.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// The tokens of a conversation; with `add_generation_prompt` they end where the assistant begins to speak.
    ///
    /// Words of a message that spell a special token are encoded as the text that they are.
    ///
    /// # Errors
    ///
    /// Those of [`ChatTemplate::render`], and [`ChatError::Tokenizer`] for a text without tokens.
    pub fn tokens(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>, ChatError> {
        let text = self.template.render(&self.disguised(messages), add_generation_prompt)?;
        let mut tokens = Vec::new();
        self.specials.encode(&self.tokenizer, &text, &mut tokens)?;
        Ok(tokens)
    }

    /// Reads a line of JSONL in any of the shapes that [`Conversation`] knows.
    ///
    /// # Errors
    ///
    /// Those of [`Conversation::parse`].
    pub fn parse(&self, line: &[u8]) -> Result<Conversation, ChatError> {
        Ok(Conversation::parse(line, |role| self.template.knows_role(role))?)
    }

    /// The tokens of a conversation with a weight for each: the turn's for the assistant's words and the special token
    /// that ends them, 0 for everything else.
    ///
    /// Where the assistant begins to speak the text is cut before it is encoded, so that the tokens before are those
    /// that the model is given when it speaks itself; a token that would cross the cut (two line breaks that would be
    /// one token) never does.
    ///
    /// # Errors
    ///
    /// [`ChatError::Refused`] where the template fails, [`ChatError::NoSpan`] and [`ChatError::TooManyTurns`] where the
    /// assistant's words cannot be found in what it makes, [`ChatError::Tokenizer`] for a text without tokens.
    pub fn weighted(&self, turns: &[Turn]) -> Result<WeightedTokens, ChatError> {
        let messages: Vec<Message> = turns.iter().map(|turn| turn.message.clone()).collect();
        let (text, spans) = self.spans(&self.disguised(&messages))?;
        let of_assistant = turns.iter().filter(|turn| turn.message.role == "assistant");
        let mut result = WeightedTokens { tokens: Vec::new(), weights: Vec::new() };
        let mut add = |text: &str, weight: f32| -> Result<(), ChatError> {
            self.specials.encode(&self.tokenizer, text, &mut result.tokens)?;
            result.weights.resize(result.tokens.len(), weight);
            Ok(())
        };
        let mut end = 0;
        for (span, turn) in spans.into_iter().zip(of_assistant) {
            add(&text[end..span.start], 0.0)?;
            add(&text[span.clone()], turn.weight)?;
            end = span.end;
        }
        add(&text[end..], 0.0)?;
        Ok(result)
    }

    /// The token that ends what the assistant says, where the template writes an added one there (`<|im_end|>`,
    /// `<|eot_id|>`, `<end_of_turn>`), be it special or not: a model that was taught by it should stop there.
    pub fn end_token(&self) -> Option<u32> {
        let turn = |role: &str, weight| Turn { message: Message::new(role, "x"), weight };
        let WeightedTokens { tokens, weights } = self.weighted(&[turn("user", 0.0), turn("assistant", 1.0)]).ok()?;
        let last = weights.iter().rposition(|&weight| weight > 0.0)?;
        Some(tokens[last]).filter(|&token| self.tokenizer.is_added(token))
    }

    /// Where the last special token of a text ends, if only white space follows it.
    pub(super) fn end_of_last_special(&self, text: &str) -> Option<usize> {
        let end = self.specials.finder.find_iter(text).last()?.end();
        text[end..].trim().is_empty().then_some(end)
    }

    /// The length of the added token that a text begins with, special or not, white space before it included.
    pub(super) fn special_at_start(&self, text: &str) -> Option<usize> {
        let white = text.len() - text.trim_start().len();
        let found = self.specials.added.find(&text[white..])?;
        (found.start() == 0).then_some(white + found.end())
    }

    pub(super) fn disguised(&self, messages: &[Message]) -> Vec<Message> {
        let disguise = |message: &Message| Message::new(message.role.clone(), self.specials.disguise(&message.content));
        messages.iter().map(disguise).collect()
    }
}

/// The special tokens of a tokenizer, to be found in texts.
#[derive(Debug)]
struct Specials {
    names: Vec<(String, u32)>,
    finder: AhoCorasick,
    /// Those that are not special as well.
    added: AhoCorasick,
}

impl Specials {
    fn new(tokenizer: &Tokenizer) -> Self {
        let mut names = tokenizer.specials();
        // One without a text would be found everywhere.
        names.retain(|(name, _)| !name.is_empty());
        names.truncate(STAND_INS);
        let finder = |names: Vec<&str>| {
            let finder = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(names);
            finder.expect("a few hundred short names are no load for the automaton")
        };
        let added = finder(tokenizer.added_texts().take(STAND_INS).collect());
        Self { finder: finder(names.iter().map(|(name, _)| name.as_str()).collect()), added, names }
    }

    /// Words with a stand-in for each special token that they spell. A stand-in or a mark that somebody wrote is
    /// dropped: it is no character of any script.
    fn disguise(&self, words: &str) -> String {
        let ours = |character: char| {
            self.index_of(character).is_some() || MARKS.contains(&character) || DIGITS.contains(&character)
        };
        let words: String = words.chars().filter(|&character| !ours(character)).collect();
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

    fn encode(&self, tokenizer: &Tokenizer, text: &str, tokens: &mut Vec<u32>) -> Result<(), ChatError> {
        let ordinary = |text: &str, tokens: &mut Vec<u32>| -> Result<(), ChatError> {
            if !text.is_empty() {
                let words = self.reveal(text);
                let first = tokens.is_empty();
                tokens.extend(if first { tokenizer.encode(&words)? } else { tokenizer.encode_behind(&words)? });
            }
            Ok(())
        };
        for piece in tokenizer.split_special(text) {
            match piece {
                Piece::Text(text) => ordinary(text, tokens)?,
                Piece::Token(token) => tokens.push(token),
            }
        }
        Ok(())
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
