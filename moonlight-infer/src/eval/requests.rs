//! Texts as the tokens that a model scores: a context with its continuation, and a long text in windows.

use super::python_str;
use crate::error::InferError;
use crate::tokenizer::{AddBos, Tokenizer, TokenizerError};

/// Tokens of which those from `from` on are scored, given all before.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Request {
    pub(super) tokens: Vec<u32>,
    pub(super) from: usize,
}

impl Request {
    /// How many tokens are scored.
    pub(super) fn scored(&self) -> usize {
        self.tokens.len() - self.from
    }

    /// Truncated from the left to what fits into a context; the last token is predicted and not read.
    pub(super) fn within(mut self, context: usize) -> Self {
        let dropped = self.tokens.len().saturating_sub(context + 1);
        self.tokens.drain(..dropped);
        Self { tokens: self.tokens, from: self.from.saturating_sub(dropped).max(1) }
    }
}

/// A choice after its context.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct EncodedChoice {
    pub(super) request: Request,
    /// Whether context and choice as one text do not begin with the tokens of the context.
    pub(super) crosses_boundary: bool,
}

/// A tokenizer as lm-evaluation-harness uses one (`HFLM.tok_encode`, 0.4.13).
pub(super) struct TextEncoder {
    /// Begins and ends a text as it is told, and reads special tokens out of it.
    with_affixes: Tokenizer,
    /// Adds nothing.
    bare: Tokenizer,
    first_token: Option<u32>,
    /// How the beginning is spelt.
    first_token_text: Option<String>,
}

impl TextEncoder {
    pub(super) fn new(tokenizer: &Tokenizer) -> Result<Self, TokenizerError> {
        let with_affixes = tokenizer.clone().with_parse_special(true);
        let bare = with_affixes.clone().with_bos(AddBos::Never)?.for_prompts();
        let first_token = tokenizer.bos().or(tokenizer.eos());
        let first_token_text = first_token.map(|token| tokenizer.decode_with_special(&[token]));
        Ok(Self { with_affixes, bare, first_token, first_token_text: first_token_text.filter(|first_token_text| !first_token_text.is_empty()) })
    }

    /// The token that is put before a text without a context: the one that begins a text, else the one that ends it
    /// (`prefix_token_id`).
    pub(super) fn first_token(&self) -> Option<u32> {
        self.first_token
    }

    /// The tokens of a text by itself; one that spells its beginning out has no second.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let spelt = self.first_token_text.as_ref().is_some_and(|first_token_text| text.starts_with(first_token_text.as_str()));
        if spelt { self.bare.encode_text(text) } else { self.with_affixes.encode_text(text) }
    }

    /// A context and its choices by the harness's `loglikelihood` and `_encode_pair`: spaces that end the context belong to
    /// what follows, and a choice has the tokens of the whole behind as many as the context has. Where these are none, it
    /// has the log-likelihood 0.
    pub(super) fn choices_as_harness(
        &self,
        context: &str,
        choices: &[String],
    ) -> Result<Vec<EncodedChoice>, InferError> {
        let alone = self.encode(python_str::rstrip(context))?;
        let encode = |choice: &String| {
            if context.is_empty() {
                return Ok(EncodedChoice { request: self.without_context(choice)?, crosses_boundary: false });
            }
            let with_affixes = self.encode(&format!("{context}{choice}"))?;
            let crosses_boundary = !with_affixes.starts_with(&alone);
            let mut tokens = alone.clone();
            if tokens.is_empty() {
                tokens.push(self.first_token.ok_or(InferError::NoFirstToken)?);
            }
            let from = tokens.len();
            tokens.extend(with_affixes.iter().skip(alone.len()));
            Ok(EncodedChoice { request: Request { tokens, from }, crosses_boundary })
        };
        choices.iter().map(encode).collect()
    }

    /// A context and its choices as whole texts, all scored from the first token that any of them has otherwise than the
    /// context by itself, so that each is charged for the same characters.
    pub(super) fn choices(&self, context: &str, choices: &[String]) -> Result<Vec<EncodedChoice>, InferError> {
        if context.is_empty() {
            return self.choices_as_harness(context, choices);
        }
        let alone = self.encode(python_str::rstrip(context))?;
        let wholes = choices.iter().map(|choice| self.encode(&format!("{context}{choice}")));
        let wholes = wholes.collect::<Result<Vec<_>, _>>()?;
        let common = |with_affixes: &Vec<u32>| with_affixes.iter().zip(&alone).take_while(|(a, b)| a == b).count();
        let from = wholes.iter().map(common).min().unwrap_or_default();
        let request = |with_affixes: Vec<u32>| {
            let crosses_boundary = !with_affixes.starts_with(&alone);
            let mut request = Request { tokens: with_affixes, from };
            if from == 0 {
                request.tokens.insert(0, self.first_token.ok_or(InferError::NoFirstToken)?);
                request.from = 1;
            }
            Ok(EncodedChoice { request, crosses_boundary })
        };
        wholes.into_iter().map(request).collect()
    }

    /// A text after nothing: its own beginning, or one that is put before it.
    fn without_context(&self, text: &str) -> Result<Request, InferError> {
        let first_token = self.first_token.ok_or(InferError::NoFirstToken)?;
        let mut tokens = self.bare.encode_text(text)?;
        if tokens.first() != Some(&first_token) {
            tokens.insert(0, first_token);
        }
        Ok(Request { tokens, from: 1 })
    }
}

/// A text in windows of the model's context, each token in one of them (the harness's `get_rolling_token_windows` with
/// `context_len = 1`): the first begins with `first`, each other with the token before it, and the last is as long as the
/// context, so that its tokens are predicted from as much as there is.
pub(super) fn windows(tokens: &[u32], first: Option<u32>, context: usize) -> Vec<Request> {
    let mut windows = Vec::new();
    // Without a token to begin with, the text's own first token is given.
    let mut at = tokens.len().min(context + usize::from(first.is_none()));
    let begins: Vec<u32> = first.into_iter().chain(tokens[..at].iter().copied()).collect();
    if begins.len() > 1 {
        windows.push(Request { tokens: begins, from: 1 });
    }
    while at < tokens.len() {
        let end = tokens.len().min(at + context);
        let start = end - context - 1;
        windows.push(Request { tokens: tokens[start..end].to_vec(), from: at - start });
        at = end;
    }
    windows
}
