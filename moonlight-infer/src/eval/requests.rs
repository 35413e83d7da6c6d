//! Texts as tokens to score (a context with its continuation, a long text in windows), and their scores.

use moonlight_model::CausalLm;

use super::python_str;
use crate::error::InferError;
use crate::score::{TokenScore, score_batch};
use crate::tokenizer::{AddBos, Tokenizer, TokenizerError};

/// The limit of logits in memory, 256 MiB in f32; one sequence may have more.
const MAX_LOGITS: usize = 64 << 20;
/// The limit of sequences in a batch.
const MAX_BATCH: usize = 32;

/// A sequence whose tokens from `from` on are scored, each given all before it.
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

    /// Truncates the sequence on the left to `context` tokens and the last one, which is predicted and not read.
    pub(super) fn within(mut self, context: usize) -> Self {
        let dropped = self.tokens.len().saturating_sub(context + 1);
        self.tokens.drain(..dropped);
        // The first token has none before it, and is never scored.
        Self { tokens: self.tokens, from: self.from.saturating_sub(dropped).max(1) }
    }
}

/// A choice after its context.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct EncodedChoice {
    pub(super) request: Request,
    /// Whether the tokens of context and choice as one text do not start with those of the context.
    pub(super) crosses_boundary: bool,
}

/// A tokenizer as lm-evaluation-harness uses one (`HFLM.tok_encode`, 0.4.13).
pub(super) struct TextEncoder {
    /// Adds its prefix and suffix to a text. Both parse special tokens.
    with_affixes: Tokenizer,
    /// Adds nothing.
    bare: Tokenizer,
    /// BOS, else EOS.
    first_token: Option<u32>,
    first_token_text: Option<String>,
}

impl TextEncoder {
    pub(super) fn new(tokenizer: &Tokenizer) -> Result<Self, TokenizerError> {
        let with_affixes = tokenizer.clone().with_parse_special(true);
        let bare = with_affixes.clone().with_bos(AddBos::Never)?.for_prompts();
        let first_token = tokenizer.bos().or(tokenizer.eos());
        let first_token_text = first_token.map(|token| tokenizer.decode_with_special(&[token]));
        Ok(Self {
            with_affixes,
            bare,
            first_token,
            first_token_text: first_token_text.filter(|first_token_text| !first_token_text.is_empty()),
        })
    }

    /// The token that replaces an empty context: BOS, else EOS (`prefix_token_id` of the harness).
    pub(super) fn first_token(&self) -> Option<u32> {
        self.first_token
    }

    /// The tokens of a text. If it starts with the text of BOS, no second one is added.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let has_first = self.first_token_text.as_ref().is_some_and(|first| text.starts_with(first.as_str()));
        if has_first { self.bare.encode_text(text) } else { self.with_affixes.encode_text(text) }
    }

    /// A context and its choices by the harness's `loglikelihood` and `_encode_pair`: spaces at the end of the context are
    /// moved to the choice, and the tokens of a choice are those of the whole text after the *number* of tokens of the
    /// context. There may be none; then the log-likelihood is 0.
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

    /// A context and its choices, each tokenized as one text. All are scored from the first token in which any of them differs
    /// from the context, so that every choice is scored on the same characters.
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

    /// A text with an empty context: after BOS, which it may have itself.
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
/// `get_rolling_token_windows` with `context_len = 1`). The first window starts with `first`, and each other one with the last
/// token of the one before. The last window is extended to the left to a full context, so that its tokens are predicted from
/// as much as possible.
pub(super) fn windows(tokens: &[u32], first: Option<u32>, context: usize) -> Vec<Request> {
    let mut windows = Vec::new();
    // Without `first`, the text's own first token is not scored.
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

/// The sum of log-probabilities.
pub(super) fn log_likelihood(scored: &[TokenScore]) -> f64 {
    // `sum` of an empty iterator is -0.0.
    scored.iter().fold(0.0, |sum, scored| sum + f64::from(scored.logprob))
}

/// Scores requests. Batches have requests of similar length, to save padding; the result is in the order of the requests.
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
            // The first score is that of the second token.
            scores[index] = scored[(requests[index].from - 1).min(scored.len())..].to_vec();
        }
        at += rows;
    }
    Ok(scores)
}
