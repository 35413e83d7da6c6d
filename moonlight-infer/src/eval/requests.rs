//! Encodes texts as token sequences to score (a context with its continuation, a long text in windows), and scores them.

use moonlight_model::CausalLm;

use super::python_str;
use crate::error::InferError;
use crate::score::{TokenScore, score_batch};
use crate::tokenizer::{AddBos, Tokenizer, TokenizerError};

/// The limit of logits in a batch, 256 MiB in f32. A single sequence may exceed it.
const MAX_LOGITS: usize = 64 << 20;
/// The limit of sequences in a batch.
const MAX_BATCH: usize = 32;

/// A sequence of tokens. Those from index `from` are scored, each given all tokens before it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Request {
    pub(super) tokens: Vec<u32>,
    pub(super) from: usize,
}

impl Request {
    /// The number of scored tokens.
    pub(super) fn scored(&self) -> usize {
        self.tokens.len() - self.from
    }

    /// Truncates the sequence on the left to `context` tokens plus the last one, which is predicted but not read.
    pub(super) fn within(mut self, context: usize) -> Self {
        let dropped = self.tokens.len().saturating_sub(context + 1);
        self.tokens.drain(..dropped);
        // The first token cannot be scored, because no token precedes it.
        Self { tokens: self.tokens, from: self.from.saturating_sub(dropped).max(1) }
    }
}

/// A choice after its context.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct EncodedChoice {
    pub(super) request: Request,
    /// Whether a token crosses the boundary: the tokens of context and choice as one text do not start with those of the
    /// context.
    pub(super) crosses_boundary: bool,
}

/// Encodes texts as lm-evaluation-harness does (`HFLM.tok_encode`, 0.4.13). Special tokens in texts are parsed.
pub(super) struct TextEncoder {
    /// Adds the tokenizer's prefix and suffix to a text.
    with_affixes: Tokenizer,
    /// Adds nothing to a text.
    bare: Tokenizer,
    /// BOS, or EOS without a BOS.
    first_token: Option<u32>,
    first_token_text: Option<String>,
}

impl TextEncoder {
    pub(super) fn new(tokenizer: &Tokenizer) -> Result<Self, TokenizerError> {
        let with_affixes = tokenizer.clone().with_parse_special(true);
        let bare = with_affixes.clone().with_bos(AddBos::Never)?.for_prompts();
        let first_token = tokenizer.bos().or(tokenizer.eos());
        let first_token_text = first_token.map(|token| tokenizer.decode_with_special(&[token]));
        Ok(Self { with_affixes, bare, first_token, first_token_text: first_token_text.filter(|text| !text.is_empty()) })
    }

    /// The token that replaces an empty context: BOS, or EOS without a BOS (`prefix_token_id` of the harness).
    pub(super) fn first_token(&self) -> Option<u32> {
        self.first_token
    }

    /// The tokens of a text. If the text itself starts with BOS, no second one is added.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let has_first = self.first_token_text.as_ref().is_some_and(|first| text.starts_with(first.as_str()));
        if has_first { self.bare.encode_text(text) } else { self.with_affixes.encode_text(text) }
    }

    /// Encodes a context and its choices as the harness's `loglikelihood` and `_encode_pair` do: spaces at the end of the
    /// context are moved to the choice, and as many tokens as the context alone has are cut from the tokens of the whole text.
    /// The rest are the tokens of the choice. If there are none, its log-likelihood is 0.
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
            let whole = self.encode(&format!("{context}{choice}"))?;
            let crosses_boundary = !whole.starts_with(&alone);
            let mut tokens = alone.clone();
            if tokens.is_empty() {
                tokens.push(self.first_token.ok_or(InferError::NoFirstToken)?);
            }
            let from = tokens.len();
            tokens.extend(whole.iter().skip(alone.len()));
            Ok(EncodedChoice { request: Request { tokens, from }, crosses_boundary })
        };
        choices.iter().map(encode).collect()
    }

    /// Encodes a context with each of its choices as one text. All are scored from the first token in which any of them
    /// differs from the context, so that the scored part starts at the same character for every choice.
    pub(super) fn choices(&self, context: &str, choices: &[String]) -> Result<Vec<EncodedChoice>, InferError> {
        if context.is_empty() {
            return self.choices_as_harness(context, choices);
        }
        let alone = self.encode(python_str::rstrip(context))?;
        let wholes = choices.iter().map(|choice| self.encode(&format!("{context}{choice}")));
        let wholes = wholes.collect::<Result<Vec<_>, _>>()?;
        let common = |whole: &Vec<u32>| whole.iter().zip(&alone).take_while(|(a, b)| a == b).count();
        let from = wholes.iter().map(common).min().unwrap_or_default();
        let request = |whole: Vec<u32>| {
            let crosses_boundary = !whole.starts_with(&alone);
            let mut request = Request { tokens: whole, from };
            if from == 0 {
                request.tokens.insert(0, self.first_token.ok_or(InferError::NoFirstToken)?);
                request.from = 1;
            }
            Ok(EncodedChoice { request, crosses_boundary })
        };
        wholes.into_iter().map(request).collect()
    }

    /// A text after BOS, in place of an empty context. No BOS is added if the text already starts with it.
    fn without_context(&self, text: &str) -> Result<Request, InferError> {
        let first_token = self.first_token.ok_or(InferError::NoFirstToken)?;
        let mut tokens = self.bare.encode_text(text)?;
        if tokens.first() != Some(&first_token) {
            tokens.insert(0, first_token);
        }
        Ok(Request { tokens, from: 1 })
    }
}

/// Splits a text into windows of the model's context, so that each token is scored once (the harness's
/// `get_rolling_token_windows` with `context_len = 1`). The first window starts with `first`, and each other window with the
/// last token of the window before. The last window is extended to the left to a full context, so that its tokens are
/// predicted from as many tokens as possible.
pub(super) fn windows(tokens: &[u32], first: Option<u32>, context: usize) -> Vec<Request> {
    let mut windows = Vec::new();
    // Without `first`, the window starts with the first token of the text, which is then not scored.
    let mut at = tokens.len().min(context + usize::from(first.is_none()));
    let head: Vec<u32> = first.into_iter().chain(tokens[..at].iter().copied()).collect();
    if head.len() > 1 {
        windows.push(Request { tokens: head, from: 1 });
    }
    while at < tokens.len() {
        let end = tokens.len().min(at + context);
        let start = end - context - 1;
        windows.push(Request { tokens: tokens[start..end].to_vec(), from: at - start });
        at = end;
    }
    windows
}

/// The log-likelihood of scored tokens: the sum of their log-probabilities.
pub(super) fn log_likelihood(scored: &[TokenScore]) -> f64 {
    // `Iterator::sum` of no floats is -0.0, which would be written as such.
    scored.iter().fold(0.0, |sum, scored| sum + f64::from(scored.logprob))
}

/// Scores requests in batches of similar length, which need little padding. The result is in the order of the requests.
pub(super) fn score_requests(model: &CausalLm, requests: &[Request]) -> Result<Vec<Vec<TokenScore>>, InferError> {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(requests[index].tokens.len()));
    let vocab = model.config().vocab_size;
    let mut scores = vec![Vec::new(); requests.len()];
    let mut at = 0;
    while at < order.len() {
        let longest = requests[order[at]].tokens.len().max(1);
        let rows = (MAX_LOGITS / (longest * vocab)).clamp(1, MAX_BATCH).min(order.len() - at);
        let batch = &order[at..at + rows];
        let sequences: Vec<&[u32]> = batch.iter().map(|&index| requests[index].tokens.as_slice()).collect();
        for (&index, scored) in batch.iter().zip(score_batch(model, &sequences)?) {
            // The first score belongs to the second token.
            scores[index] = scored[(requests[index].from - 1).min(scored.len())..].to_vec();
        }
        at += rows;
    }
    Ok(scores)
}
