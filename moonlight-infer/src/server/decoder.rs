//! The text of one sequence: tokens become characters, stop strings are cut off, and each log-probability is sent with the text
//! of its token.

use std::collections::VecDeque;

use super::stop::StopStrings;
use crate::engine::TokenLogprobs;
use crate::tokenizer::{TokenStream, Tokenizer};

/// Text that can be sent, and the log-probabilities of the tokens that it contains.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) logprobs: Vec<PlacedLogprobs>,
}

/// The log-probabilities of a token, and where its text begins, in characters of the text of the sequence.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PlacedLogprobs {
    pub(super) offset: usize,
    pub(super) logprobs: TokenLogprobs,
}

/// Decodes the tokens of one sequence.
#[derive(Debug)]
pub(super) struct Decoder<'t> {
    stream: TokenStream<'t>,
    /// Special tokens whose text is kept, because it marks tool calls.
    kept: &'t [(u32, String)],
    stops: StopStrings,
    /// Bytes and characters of the text so far, released or not.
    bytes: usize,
    characters: usize,
    /// Bytes that were released.
    released: usize,
    /// Log-probabilities that were not released, with the start and the end of the text of their token in bytes.
    pending: VecDeque<(usize, usize, PlacedLogprobs)>,
}

impl<'t> Decoder<'t> {
    /// A decoder that stops at any of `stops`.
    pub(super) fn new(tokenizer: &'t Tokenizer, kept: &'t [(u32, String)], stops: Vec<String>) -> Self {
        Self {
            stream: tokenizer.stream(),
            kept,
            stops: StopStrings::new(stops),
            bytes: 0,
            characters: 0,
            released: 0,
            pending: VecDeque::new(),
        }
    }

    /// Adds a token. Returns what can be sent, and whether a stop string ended the text.
    pub(super) fn push(&mut self, token: u32, logprobs: Option<TokenLogprobs>) -> (Piece, bool) {
        let (start, offset) = (self.bytes, self.characters);
        let text = match self.kept.iter().find(|(kept, _)| *kept == token) {
            None => self.stream.push(token),
            Some((_, text)) => self.stream.finish() + text,
        };
        self.bytes += text.len();
        self.characters += text.chars().count();
        if let Some(logprobs) = logprobs {
            self.pending.push_back((start, self.bytes, PlacedLogprobs { offset, logprobs }));
        }
        self.release(&text)
    }

    /// The rest of the text, at the end of the sequence. `stop` is the log-probability of the token that ended it, which has no
    /// text. Clients that sum the log-probabilities of a prompt expect one more, that of the token after it, whichever it is.
    pub(super) fn finish(&mut self, stop: Option<TokenLogprobs>) -> (Piece, bool) {
        let rest = self.stream.finish();
        self.bytes += rest.len();
        let (mut piece, stopped) = self.release(&rest);
        if !stopped {
            let held = self.stops.finish();
            self.released += held.len();
            piece.text.push_str(&held);
            piece.logprobs.extend(self.pending.drain(..).map(|(.., logprobs)| logprobs));
            piece.logprobs.extend(stop.map(|logprobs| PlacedLogprobs { offset: self.characters, logprobs }));
        }
        (piece, stopped)
    }

    fn release(&mut self, text: &str) -> (Piece, bool) {
        let released = self.stops.push(text);
        self.released += released.text.len();
        let stopped = released.stop.is_some();
        let mut piece = Piece { text: released.text, logprobs: Vec::new() };
        // After a stop string, a token that begins before it is part of the text, even if it ends within it. A token without text
        // is the start of a character, or special, and is sent with the text after it.
        let is_sent = |start: usize, end: usize| match stopped || start == end {
            true => start < self.released,
            false => end <= self.released,
        };
        while let Some((.., logprobs)) = self.pending.pop_front_if(|(start, end, _)| is_sent(*start, *end)) {
            piece.logprobs.push(logprobs);
        }
        (piece, stopped)
    }
}

/// The texts of single tokens, for log-probabilities.
#[derive(Debug)]
pub(super) struct TokenTexts<'t> {
    tokenizer: &'t Tokenizer,
    /// The tokens of a letter, and its text. Some decoders remove a space at the start of a text, so that a token is decoded
    /// after these.
    anchor: (Vec<u32>, String),
}

impl<'t> TokenTexts<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer) -> Self {
        let tokens = tokenizer.encode("a").unwrap_or_default();
        let text = tokenizer.decode_with_special(&tokens);
        Self { tokenizer, anchor: (tokens, text) }
    }

    /// The bytes of a token whose text is `text`: those of the text, except where the token is a part of a character.
    pub(super) fn bytes(&self, token: u32, text: &str) -> Option<Vec<u8>> {
        match text.contains(char::REPLACEMENT_CHARACTER) {
            true => self.tokenizer.raw_bytes(token),
            false => Some(text.as_bytes().to_vec()),
        }
    }

    /// The text of a token, including that of a special token; U+FFFD for a part of a character.
    pub(super) fn text(&self, token: u32) -> String {
        let (anchor, before) = &self.anchor;
        let mut tokens = anchor.clone();
        tokens.push(token);
        let text = self.tokenizer.decode_with_special(&tokens);
        match text.strip_prefix(before.as_str()) {
            Some(text) => text.to_owned(),
            None => self.tokenizer.decode_with_special(&[token]),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn logprobs(token: u32) -> Option<TokenLogprobs> {
        Some(TokenLogprobs { token, logprob: -1.0, top: Vec::new() })
    }

    /// The text and the tokens with log-probabilities, whether a stop string was found, and every piece.
    fn decode(text: &str, stops: &[&str]) -> (String, Vec<(u32, usize)>, bool, Vec<String>) {
        let tokenizer = Tokenizer::bytes();
        let mut decoder = Decoder::new(&tokenizer, &[], stops.iter().map(ToString::to_string).collect());
        let (mut all, mut tokens, mut stopped, mut pieces) = (String::new(), Vec::new(), false, Vec::new());
        let mut take = |(piece, stop): (Piece, bool)| {
            all.push_str(&piece.text);
            pieces.push(piece.text);
            tokens.extend(piece.logprobs.iter().map(|placed| (placed.logprobs.token, placed.offset)));
            stopped |= stop;
            stop
        };
        let ended = tokenizer.encode(text).unwrap().into_iter().any(|token| take(decoder.push(token, logprobs(token))));
        if !ended {
            take(decoder.finish(None));
        }
        (all, tokens, stopped, pieces)
    }

    #[test]
    fn log_probabilities_come_with_the_text_of_their_token() {
        let (text, tokens, stopped, pieces) = decode("aé!", &[]);
        assert_eq!((text.as_str(), stopped), ("aé!", false));
        // The two bytes of é are a token each, and begin at the same character.
        assert_eq!(tokens, [(97, 0), (0xC3, 1), (0xA9, 1), (33, 2)]);
        assert_eq!(pieces, ["a", "", "é", "!", ""]);
    }

    #[test]
    fn nothing_of_a_stop_string_is_sent() {
        let (text, tokens, stopped, pieces) = decode("xENDy", &["END"]);
        assert_eq!((text.as_str(), stopped), ("x", true));
        assert_eq!(tokens, [(120, 0)]);
        assert_eq!(pieces, ["x", "", "", ""]);
        let (text, tokens, stopped, _) = decode("xEN", &["END"]);
        assert_eq!((text.as_str(), stopped, tokens.len()), ("xEN", false, 3));
    }

    #[test]
    fn a_kept_token_is_text() {
        let tokenizer = Tokenizer::bytes_chat();
        let kept = vec![(0xF5, "<|im_end|>".to_owned())];
        let mut decoder = Decoder::new(&tokenizer, &kept, Vec::new());
        assert_eq!(decoder.push(0xF5, None).0.text, "<|im_end|>");
        assert_eq!(decoder.push(0xF6, None).0.text, "");
        assert_eq!(TokenTexts::new(&tokenizer).text(0xF6), "<|im_user|>");
    }

    proptest! {
        #[test]
        fn the_pieces_are_the_text(text in "[abé<]{0,20}", stop in "[abé<]{1,3}") {
            let (all, tokens, stopped, _) = decode(&text, &[stop.as_str()]);
            let expected = text.split(stop.as_str()).next().unwrap();
            prop_assert_eq!(&all, expected);
            prop_assert_eq!(stopped, text.contains(stop.as_str()));
            prop_assert_eq!(tokens.len(), expected.len());
        }
    }
}
