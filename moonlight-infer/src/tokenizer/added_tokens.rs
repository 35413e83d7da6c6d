//! Finds added tokens in texts, as Hugging Face's `tokenizers` does.
//!
//! The `AddedVocabulary` of that crate is not used, because it takes quadratic time: for each token with `single_word` or
//! `lstrip` it scans the whole text before the token.

use std::collections::{BTreeMap, HashMap};

use aho_corasick::{AhoCorasick, MatchKind};
use moonlight_convert::tokenizer::AddedToken;
use regex::Regex;

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'t> {
    /// Text without added tokens.
    Text(&'t str),
    /// An added token.
    Token(u32),
}

/// The added tokens of a tokenizer.
#[derive(Debug)]
pub(super) struct AddedTokens {
    tokens: BTreeMap<u32, AddedToken>,
    ids: HashMap<String, u32>,
    /// For the tokens that are matched before the text is normalized, and for those that are matched afterwards.
    finders: [Finder; 2],
    /// Matches a character of a word.
    word: Regex,
}

#[derive(Debug)]
struct Finder {
    finder: Option<AhoCorasick>,
    ids: Vec<u32>,
}

impl Finder {
    fn new<'a>(tokens: impl Iterator<Item = (u32, &'a AddedToken)>) -> Result<Self, String> {
        let (ids, texts): (Vec<u32>, Vec<&str>) = tokens.map(|(id, token)| (id, token.content.as_str())).unzip();
        // The match kind of `tokenizers`: of two tokens that start at the same position, the longer one is found.
        let build = || AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&texts);
        let finder = (!ids.is_empty()).then(build).transpose().map_err(|error| error.to_string())?;
        Ok(Self { finder, ids })
    }
}

impl AddedTokens {
    /// `tokens` by id. A token without text is dropped, because it would match everywhere.
    pub(super) fn new(mut tokens: BTreeMap<u32, AddedToken>) -> Result<Self, String> {
        tokens.retain(|_, token| !token.content.is_empty());
        let finder = |normalized: bool| {
            Finder::new(
                tokens.iter().filter(|(_, token)| token.normalized == normalized).map(|(&id, token)| (id, token)),
            )
        };
        let finders = [finder(false)?, finder(true)?];
        let ids = tokens.iter().map(|(&id, token)| (token.content.clone(), id)).collect();
        let word = Regex::new(r"\w").map_err(|error| error.to_string())?;
        Ok(Self { tokens, ids, finders, word })
    }

    /// The id of an added token.
    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    pub(super) fn get(&self, id: u32) -> Option<&AddedToken> {
        self.tokens.get(&id)
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        self.get(id).is_some_and(|token| token.special)
    }

    /// The special tokens, by id.
    pub(super) fn specials(&self) -> impl Iterator<Item = (u32, &str)> {
        let special = self.tokens.iter().filter(|(_, token)| token.special);
        special.map(|(&id, token)| (id, token.content.as_str()))
    }

    /// All added tokens, by id.
    pub(super) fn all(&self) -> impl Iterator<Item = (u32, &AddedToken)> {
        self.tokens.iter().map(|(&id, token)| (id, token))
    }

    /// Splits a text into the added tokens for which `wanted` is true and the text between them. White space that belongs to a
    /// token is in neither.
    pub(super) fn split<'t>(&self, text: &'t str, wanted: impl Fn(&AddedToken) -> bool + Copy) -> Vec<Piece<'t>> {
        let [first, normalized] = &self.finders;
        let mut pieces = Vec::new();
        self.split_by(first, text, wanted, &mut |piece| match piece {
            Piece::Text(text) => self.split_by(normalized, text, wanted, &mut |piece| pieces.push(piece)),
            token => pieces.push(token),
        });
        pieces
    }

    fn split_by<'t>(
        &self,
        Finder { finder, ids }: &Finder,
        text: &'t str,
        wanted: impl Fn(&AddedToken) -> bool,
        each: &mut impl FnMut(Piece<'t>),
    ) {
        let mut end = 0;
        for found in finder.iter().flat_map(|finder| finder.find_iter(text)) {
            let id = ids[found.pattern().as_usize()];
            // As in `tokenizers`, a token that is not wanted is text, even if a shorter one that is wanted is part of it.
            let Some(token) = self.tokens.get(&id).filter(|token| wanted(token)) else { continue };
            let (before, after) = (&text[..found.start()], &text[found.end()..]);
            if token.single_word && (self.is_word(before.chars().next_back()) || self.is_word(after.chars().next())) {
                continue;
            }
            // White space that already belongs to the token before is left out.
            let start = if token.lstrip { before.trim_end().len().max(end) } else { found.start() };
            if end < start {
                each(Piece::Text(&text[end..start]));
            }
            each(Piece::Token(id));
            end = if token.rstrip { text.len() - after.trim_start().len() } else { found.end() };
        }
        if end < text.len() {
            each(Piece::Text(&text[end..]));
        }
    }

    fn is_word(&self, character: Option<char>) -> bool {
        let mut buffer = [0; 4];
        character.is_some_and(|character| self.word.is_match(character.encode_utf8(&mut buffer)))
    }
}
