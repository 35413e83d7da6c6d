//! Generation: a [`Session`] with a KV cache for one conversation, or [`generate_many`] for a batch of prompts.

mod batch;
mod sampler;

use std::ops::ControlFlow;

use burn::tensor::{DType, Tensor};
use moonlight_model::{CausalLm, KvCache};
use serde::Serialize;

use crate::error::InferError;

pub use batch::generate_many;
pub use sampler::{Sampler, Sampling};

/// Why a generation ended; called `finish_reason` in other programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StopReason {
    /// The model wrote one of the `eos` tokens.
    Eos,
    /// `max_new_tokens` or the end of the model's context was reached.
    Length,
    /// The callback returned [`ControlFlow::Break`].
    Interrupted,
}

/// The result of a generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens, without the one that ended the text.
    pub tokens: Vec<u32>,
    /// Why the generation ended.
    pub stop: StopReason,
    /// The token that ended the text; `Some` for [`StopReason::Eos`].
    pub stop_token: Option<u32>,
}

/// A model with a KV cache that is kept from one prompt to the next.
#[derive(Debug)]
pub struct Session<'m> {
    model: &'m CausalLm,
    cache: KvCache,
    /// The limit of the cache in tokens.
    max_tokens: usize,
    /// The tokens whose keys and values are in the cache.
    cached: Vec<u32>,
}

impl<'m> Session<'m> {
    /// An empty session for up to `capacity` tokens, or the model's context if that is shorter. The cache grows with the
    /// tokens.
    pub fn new(model: &'m CausalLm, capacity: usize) -> Self {
        let max_tokens = capacity.min(model.config().max_position_embeddings);
        let cache = new_cache(model, 1, max_tokens.min(INITIAL_CACHE_TOKENS));
        Self { model, cache, max_tokens, cached: Vec::new() }
    }

    /// Continues `prompt`, and calls `each` with every new token. Tokens that the prompt shares with the start of the cache
    /// are not computed again.
    ///
    /// Stops after `max_new_tokens`, at a token of `eos`, when the cache is full, or when `each` breaks.
    ///
    /// # Errors
    ///
    /// Those of [`check_prompt`], and [`InferError::NonFinite`].
    pub fn generate(
        &mut self,
        prompt: &[u32],
        max_new_tokens: usize,
        sampler: &mut Sampler,
        eos: &[u32],
        mut each: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generated, InferError> {
        let capacity = self.max_tokens;
        check_prompt(prompt, self.model.config().vocab_size, capacity)?;
        // The last token of the prompt is computed even if it is cached, because its logits are needed.
        let known = self.cached.iter().zip(&prompt[..prompt.len() - 1]).take_while(|(a, b)| a == b).count();
        self.cache.truncate(0, known);
        self.cached.truncate(known);
        let mut tokens = Vec::new();
        let mut input: Vec<u32> = prompt[known..].to_vec();
        while tokens.len() < max_new_tokens && self.cached.len() + input.len() <= capacity {
            let next = sampler.choose(&self.next_logits(&input))?;
            if eos.contains(&next) {
                return Ok(Generated { tokens, stop: StopReason::Eos, stop_token: Some(next) });
            }
            tokens.push(next);
            if each(next).is_break() {
                return Ok(Generated { tokens, stop: StopReason::Interrupted, stop_token: None });
            }
            input = vec![next];
        }
        Ok(Generated { tokens, stop: StopReason::Length, stop_token: None })
    }

    /// Appends tokens to the cache, and returns the logits of the next one: `[vocab]`.
    fn next_logits(&mut self, tokens: &[u32]) -> Vec<f32> {
        self.cached.extend(tokens);
        grow_cache(&mut self.cache, self.cached.len(), self.max_tokens);
        logit_rows(self.model.extend(&[tokens], &mut self.cache)).remove(0)
    }
}

/// Continues `prompt`, and calls `each` with every new token; see [`Session::generate`].
///
/// # Errors
///
/// Those of [`Session::generate`].
pub fn generate(
    model: &CausalLm,
    prompt: &[u32],
    max_new_tokens: usize,
    sampling: Sampling,
    eos: &[u32],
    mut each: impl FnMut(u32),
) -> Result<Generated, InferError> {
    let context = model.config().max_position_embeddings;
    // Limited to the context, so that the session refuses a prompt that is longer.
    let mut session = Session::new(model, prompt.len().saturating_add(max_new_tokens).min(context));
    session.generate(prompt, max_new_tokens, &mut Sampler::new(sampling), eos, |token| {
        each(token);
        ControlFlow::Continue(())
    })
}

/// The number of tokens for which a cache is allocated at first, because a context may be far longer than the generated text.
const INITIAL_CACHE_TOKENS: usize = 512;

/// Grows a cache to at least `needed` tokens, but never beyond `max_tokens`. It doubles, because each growth copies it.
fn grow_cache(cache: &mut KvCache, needed: usize, max_tokens: usize) {
    if needed > cache.capacity() {
        cache.grow(needed.max(2 * cache.capacity()).min(max_tokens));
    }
}

/// An empty cache for `batch` sequences of up to `capacity` tokens each, but not more than the model's context.
fn new_cache(model: &CausalLm, batch: usize, capacity: usize) -> KvCache {
    let config = model.config();
    let device = model.embed_tokens.weight.val().device();
    KvCache::new(config, batch, capacity.min(config.max_position_embeddings), &device, model.cache_dtype())
}

/// The rows of logits `[batch, vocab]`, on the host in f32.
fn logit_rows(logits: Tensor<2>) -> Vec<Vec<f32>> {
    let width = logits.dims()[1];
    let values: Vec<f32> = logits.cast(DType::F32).into_data().try_into_vec().expect("the logits were cast to f32");
    values.chunks(width).map(<[f32]>::to_vec).collect()
}

/// Checks that a prompt has tokens, all of them in the vocabulary, and no more than `capacity`.
///
/// # Errors
///
/// [`InferError::EmptyPrompt`], [`InferError::PromptTooLong`], [`InferError::UnknownToken`].
pub fn check_prompt(prompt: &[u32], vocab_size: usize, capacity: usize) -> Result<(), InferError> {
    check_tokens(prompt, vocab_size)?;
    match prompt.len() {
        0 => Err(InferError::EmptyPrompt),
        tokens if tokens > capacity => Err(InferError::PromptTooLong { tokens, context: capacity }),
        _ => Ok(()),
    }
}

/// Checks that every token has a row in the embedding.
pub(crate) fn check_tokens(tokens: &[u32], vocab_size: usize) -> Result<(), InferError> {
    match tokens.iter().find(|&&token| token as usize >= vocab_size) {
        None => Ok(()),
        Some(&token) => Err(InferError::UnknownToken { token, vocab_size }),
    }
}
