//! `tokenizer.json`, by Hugging Face's own crate.

use std::sync::OnceLock;

use moonlight_convert::tokenizer::{AddedToken, SpecialNames};
use serde::Deserialize;
use tokenizers::Tokenizer as Inner;
use tokenizers::tokenizer::{NormalizedString, Normalizer};
use tokenizers::{NormalizerWrapper, normalizers};

use super::added_tokens::AddedTokens;
use super::limits;
use super::post_processor::AffixTokens;
use crate::catch_panic::catch_panic;

/// What is said of a panic: the crate takes a file's word for much.
const LIBRARY_FAILED: &str =
    "the `tokenizers` library failed at it: its tokenizer.json is damaged, or of a form that is not known";

/// So much of a text is normalized first where the normalizer is watched.
const TRIAL_BYTES: usize = 4096;

/// A tokenizer as `tokenizers` runs it, special tokens in a text being text.
pub(super) struct HuggingFace {
    inner: Inner,
    vocab_size: usize,
    /// Whether a text could grow so much while it is normalized that each is tried step by step first.
    may_expand: bool,
    affixes: AffixTokens,
    added: AddedTokens,
    /// The same with special text being special: as large as the first, and made for those who ask for it.
    parsing: OnceLock<Box<Inner>>,
    /// Whether the beginning of a text is encoded in another way than the same words behind others.
    prepends_first_only: bool,
    /// The same with [`ANCHOR`] as a token, where that is so.
    anchored: OnceLock<Box<Inner>>,
}

/// No character: a token before a text, so that the text is not at the beginning.
const ANCHOR: char = '\u{10FFFF}';

impl HuggingFace {
    /// Reads the file's bytes; `names` are the tokens that the files beside it name. What was wrong with them and is no
    /// reason not to go on is a sentence of `notes`.
    pub(super) fn parse(contents: &[u8], names: &SpecialNames, notes: &mut Vec<String>) -> Result<Self, String> {
        // Before the crate sees them: what aborts cannot be caught.
        let limits::Checked { json, may_expand, prepends_first_only, affixes } = limits::checked(contents)?;
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
            // The crate normalizes them, however long they become.
            let listed = listed.added_tokens.iter().filter(|token| token.normalized).map(|token| &token.content);
            let named = names.added.values().filter(|token| token.normalized).map(|token| &token.content);
            for text in listed.chain(named) {
                check_growth(normalizer, &mut NormalizedString::from(text.as_str()), limits::GROWTH_SLACK)?;
            }
        }
        let mut inner = Inner::from_bytes(json).map_err(|error| error.to_string())?;
        add(&mut inner, &listed, names, notes)?;
        inner.set_encode_special_tokens(true);
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| error.to_string())?;
        let vocab = inner.get_vocab(true);
        if let Some(token) = vocab.keys().find(|token| token.len() > limits::MAX_TOKEN_BYTES) {
            let (bytes, most) = (token.len(), limits::MAX_TOKEN_BYTES);
            return Err(format!("it has a token of {bytes} bytes, more than the limit of {most}"));
        }
        let vocab_size = vocab.into_values().max().map_or(0, |id| id as usize + 1);
        let added = inner.get_added_tokens_decoder().into_iter().map(|(id, token)| {
            // What was once special is not text again, as in the crate.
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
        // A model that has neither bytes nor an unknown token fails on a character that it has not seen, and a table of
        // characters that is damaged at those that are in it. Say so now, not in the middle of the data.
        let ordinary: String = (' '..='~').chain('\u{A0}'..='\u{17F}').collect();
        for text in ["\u{0}\u{E000}\u{F8FF}\u{10FFFD}", &ordinary] {
            let known = tokenizer.tokens(&tokenizer.inner, text);
            known.map_err(|error| format!("it has no token for a character that it does not know: {error}"))?;
        }
        Ok(tokenizer)
    }

    /// The tokens of a text, its special ones where `parse_special` says so; the error is why it has none.
    pub(super) fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>, String> {
        let inner = if parse_special { self.parsing() } else { &self.inner };
        catch_panic(|| self.tokens(inner, text)).unwrap_or_else(|| Err(LIBRARY_FAILED.into()))
    }

    /// The tokens of a text that follows others.
    pub(super) fn encode_continuation(&self, text: &str) -> Result<Vec<u32>, String> {
        if !self.prepends_first_only || text.contains(ANCHOR) {
            return self.encode(text, false);
        }
        let anchored = self.anchored.get_or_init(|| {
            let mut anchored = Box::new(self.inner.clone());
            let token = tokenizers::AddedToken::from(ANCHOR, false).normalized(false);
            // Without it the text is encoded as a beginning.
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
            // A beginning first: a text that runs away does so there, in little memory.
            for length in [TRIAL_BYTES.min(text.len()), text.len()] {
                let tried = &text[..text.floor_char_boundary(length)];
                let most = limits::MAX_GROWTH.saturating_mul(tried.len()).saturating_add(limits::GROWTH_SLACK);
                check_growth(normalizer, &mut NormalizedString::from(tried), most)?;
            }
        }
        let encoding = inner.encode_fast(text, false).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens, special ones `with_special` only; U+FFFD where the crate fails at them.
    pub(super) fn decode(&self, tokens: &[u32], with_special: bool) -> String {
        let decoded = catch_panic(|| self.inner.decode(tokens, !with_special).ok());
        decoded.flatten().unwrap_or_else(|| char::REPLACEMENT_CHARACTER.into())
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// What the file puts around a text.
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

/// Tokens of a `tokenizer.json`, as far as they are wanted.
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

/// Adds what the files beside a `tokenizer.json` name, as transformers does: tokens of their `added_tokens_decoder` with the
/// properties that it gives them, and that `eos_token` and the like are special. Where the crate gives a token another id
/// than a file says, transformers has that id, too; it is said.
fn add(inner: &mut Inner, listed: &JsonParts, names: &SpecialNames, notes: &mut Vec<String>) -> Result<(), String> {
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
        if let Some(given) = inner.token_to_id(content).filter(|&given| given != id) {
            let content = content.escape_debug();
            notes.push(format!(
                "the added token `{content}` has the id {given}, as in transformers; the file says {id}, but there is a gap \
                 before it, or the model's own vocabulary has the token"
            ));
        }
    }
    Ok(())
}

/// Normalizes a text step by step; each may make it larger only so much, so that no chain of them runs away.
fn check_growth(normalizer: &NormalizerWrapper, text: &mut NormalizedString, most: usize) -> Result<(), String> {
    if let NormalizerWrapper::Sequence(steps) = normalizer {
        let steps: &normalizers::Sequence = steps;
        return steps.as_ref().iter().try_for_each(|step| check_growth(step, text, most));
    }
    normalizer.normalize(text).map_err(|error| error.to_string())?;
    match text.len() > most {
        true => Err(format!("its normalizer makes {} bytes of {}, past the limit", text.len(), text.len_original())),
        false => Ok(()),
    }
}
