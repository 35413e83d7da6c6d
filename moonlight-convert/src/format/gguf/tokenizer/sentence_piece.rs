//! Tokenizers of SentencePiece's kind with byte fallback (Llama 2), which llama.cpp stores with scores instead of merges.
//!
//! llama.cpp joins the neighbors that form the token with the highest score, the leftmost first. `tokenizer.json` has a list
//! of all pairs that form a token, in the order of the scores. Each follows from the other.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::vocabulary::{LONGEST_TOKEN, TokenType, Vocabulary};
use crate::printable::printable;

/// Stands for a space.
const SPACE: char = '\u{2581}';
/// The score of added and unused tokens, which pairs never form.
const NOT_FORMED: f32 = -1000.0;

/// Where a space is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SpacePrefix {
    /// Before each text between added tokens, as llama.cpp does.
    Always,
    /// Before a text that does not begin with one.
    Missing,
    /// Before the first text only, if it does not begin with one.
    First,
    Never,
}

impl SpacePrefix {
    /// Reads the normalizer and the pre-tokenizer of a `tokenizer.json`; `split_words` is whether it never joins pieces over a
    /// space.
    ///
    /// # Errors
    ///
    /// The rest of a sentence that begins with the tokenizer.
    pub(super) fn read(normalizer: &Value, pre_tokenizer: &Value) -> Result<(Self, bool), String> {
        let mut prefix = Self::Never;
        let mut replaced = false;
        let steps = match normalizer["type"].as_str() {
            Some("Sequence") => normalizer["normalizers"].as_array().cloned().unwrap_or_default(),
            _ if normalizer.is_null() => Vec::new(),
            _ => vec![normalizer.clone()],
        };
        let space = SPACE.to_string();
        for step in &steps {
            match step["type"].as_str().unwrap_or_default() {
                "Prepend" if step["prepend"] == space.as_str() => prefix = Self::Always,
                "Replace" if step["pattern"]["String"] == " " && step["content"] == space.as_str() => replaced = true,
                other => {
                    let other = printable(other);
                    return Err(format!("has the normalizer `{other}`, which llama.cpp does not have"));
                }
            }
        }
        let kind = pre_tokenizer["type"].as_str().unwrap_or("null");
        if pre_tokenizer.is_null() && replaced {
            return Ok((prefix, false));
        }
        if kind != "Metaspace" || pre_tokenizer["replacement"] != space.as_str() || prefix != Self::Never {
            return Err(format!("has the pre-tokenizer `{}`, which llama.cpp does not have", printable(kind)));
        }
        let scheme = match (&pre_tokenizer["prepend_scheme"], &pre_tokenizer["add_prefix_space"]) {
            // As written before `prepend_scheme` existed.
            (Value::Null, add) => {
                if *add == false {
                    "never"
                } else {
                    "always"
                }
            }
            (scheme, _) => scheme.as_str().unwrap_or_default(),
        };
        let prefix = match scheme {
            "always" => Self::Missing,
            "first" => Self::First,
            "never" => Self::Never,
            other => return Err(format!("has the `prepend_scheme` `{}`, which is not known", printable(other))),
        };
        Ok((prefix, pre_tokenizer["split"] != false))
    }

    /// Where llama.cpp's tokens differ.
    pub(super) fn difference(self) -> Option<&'static str> {
        match self {
            Self::Always | Self::Never => None,
            Self::Missing => Some(
                "llama.cpp adds a space also before a text that begins with one, which the model's tokenizer does not",
            ),
            Self::First => Some(
                "llama.cpp adds a space also before a text that begins with one, and after each special token, which the \
                 model's tokenizer does not",
            ),
        }
    }
}

/// The scores of the tokens, by id, and whether pairs and scores are equivalent: every pair of tokens that forms a token is
/// a merge, and all pairs of one token are in a row.
pub(super) fn scores(vocabulary: &Vocabulary) -> (HashMap<u32, f32>, bool) {
    let mut scores = HashMap::new();
    let mut last = None;
    let mut in_a_row = true;
    for &[_, _, whole] in &vocabulary.merges {
        if last != Some(whole) {
            let next = 0.0 - scores.len() as f32;
            in_a_row &= scores.insert(whole, next).is_none();
            last = Some(whole);
        }
    }
    let formed = scores.len();
    // Characters are given, not formed; their scores only continue the order.
    let normal = vocabulary.tokens.iter().filter(|(id, text)| is_formed(vocabulary, **id, text));
    let rest: Vec<u32> = normal.map(|(&id, _)| id).filter(|id| !scores.contains_key(id)).collect();
    scores.extend(rest.into_iter().zip(0..).map(|(id, place)| (id, 0.0 - (formed + place) as f32)));
    let texts: HashMap<&str, u32> = vocabulary
        .tokens
        .iter()
        .filter(|(id, text)| is_formed(vocabulary, **id, text))
        .map(|(&id, text)| (text.as_str(), id))
        .collect();
    let pairs: usize = texts.keys().map(|text| pairs(text, &texts).len()).sum();
    (scores, in_a_row && pairs == vocabulary.merges.len())
}

/// Whether a token of the model is neither an added one nor a byte.
fn is_formed(vocabulary: &Vocabulary, id: u32, text: &str) -> bool {
    !vocabulary.added.contains_key(&id) && byte_of(text).is_none() && vocabulary.unknown != Some(id)
}

/// The score of a token without one in [`scores`].
pub(super) fn other_score(kind: TokenType) -> f32 {
    match kind {
        TokenType::Byte | TokenType::Unknown => 0.0,
        _ => NOT_FORMED,
    }
}

/// The byte that a token such as `<0x0A>` stands for.
pub(super) fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The pairs of tokens that form a token. None for a token that is too long to be compared with all its parts.
pub(super) fn pairs(token: &str, by_text: &HashMap<&str, u32>) -> Vec<(u32, u32)> {
    if token.len() > LONGEST_TOKEN {
        return Vec::new();
    }
    let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
    let mut pairs: Vec<(u32, u32)> =
        cuts.filter_map(|(left, right)| Some((*by_text.get(left)?, *by_text.get(right)?))).collect();
    // As in transformers: pairs of one token by the ids of their parts.
    pairs.sort_unstable();
    pairs
}

/// Whether no token has a space after another character, so that it does not matter whether words are split before pairs
/// are joined.
pub(super) fn no_token_crosses_words(vocabulary: &Vocabulary) -> bool {
    let mut tokens = vocabulary.tokens.iter().filter(|(id, text)| is_formed(vocabulary, **id, text));
    tokens.all(|(_, text)| !text.chars().skip(1).any(|character| character == SPACE))
}

/// Normalizer and decoder of a `tokenizer.json`.
pub(super) fn sections(adds_space: bool) -> (Value, Value) {
    let space = SPACE.to_string();
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": space});
    let back = json!({"type": "Replace", "pattern": {"String": space}, "content": " "});
    let bytes = [json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    match adds_space {
        true => {
            let prepend = json!({"type": "Prepend", "prepend": space});
            let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
            (
                json!({"type": "Sequence", "normalizers": [prepend, replace]}),
                json!({"type": "Sequence", "decoders": [back, bytes[0], bytes[1], strip]}),
            )
        }
        false => (replace, json!({"type": "Sequence", "decoders": [back, bytes[0], bytes[1]]})),
    }
}

/// An added token's text with spaces instead of the characters that stand for them.
pub(super) fn with_spaces(text: &str) -> String {
    text.replace(SPACE, " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_of_the_space_prefix_are_read() {
        let read = |normalizer: Value, pre_tokenizer: Value| SpacePrefix::read(&normalizer, &pre_tokenizer);
        assert_eq!(read(sections(true).0, Value::Null), Ok((SpacePrefix::Always, false)));
        assert_eq!(read(sections(false).0, Value::Null), Ok((SpacePrefix::Never, false)));
        let metaspace = |scheme: &str, split: bool| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
        assert_eq!(read(Value::Null, metaspace("always", true)), Ok((SpacePrefix::Missing, true)));
        assert_eq!(read(Value::Null, metaspace("first", false)), Ok((SpacePrefix::First, false)));
        assert_eq!(read(Value::Null, metaspace("never", false)), Ok((SpacePrefix::Never, false)));
        let old = json!({"type": "Metaspace", "replacement": "▁", "add_prefix_space": true});
        assert_eq!(read(Value::Null, old), Ok((SpacePrefix::Missing, true)));
        for (normalizer, pre_tokenizer, expected) in [
            (json!({"type": "NFKC"}), Value::Null, "the normalizer `NFKC`"),
            (Value::Null, json!({"type": "Whitespace"}), "the pre-tokenizer `Whitespace`"),
            (Value::Null, Value::Null, "the pre-tokenizer `null`"),
            (Value::Null, metaspace("last", false), "the `prepend_scheme` `last`"),
        ] {
            let error = read(normalizer, pre_tokenizer).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn bytes_have_two_digits() {
        assert_eq!(
            (byte_of("<0x0A>"), byte_of("<0xff>"), byte_of("<0x1>"), byte_of("0x0A")),
            (Some(10), Some(255), None, None)
        );
        // `from_str_radix` accepts a sign.
        assert_eq!(byte_of("<0x+1>"), None);
    }
}
