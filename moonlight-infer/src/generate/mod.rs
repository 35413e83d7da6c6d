//! Text from a model.

mod batch;
mod sampler;

use std::ops::ControlFlow;

use burn::tensor::{DType, Tensor};
use moonlight_model::{CausalLm, KvCache};
use serde::Serialize;

use crate::error::InferError;

pub use batch::generate_many;
pub use sampler::{Sampler, Sampling};

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StopReason {
    /// The model wrote a token that ends a text.
    Eos,
    /// `max_new_tokens`, or the end of the model's context, was reached.
    Length,
    /// The caller stopped it.
    Interrupted,
}

/// What a model wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens, without the one that ended the text.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: StopReason,
    /// The token that ended the text, where one did ([`StopReason::Eos`]).
    pub stop_token: Option<u32>,
}

/// A model with a KV cache, and the tokens that are in it.
#[derive(Debug)]
pub struct Session<'m> {
    model: &'m CausalLm,
    cache: KvCache,
    /// Tokens that the cache may grow to.
    room: usize,
    read: Vec<u32>,
}

impl<'m> Session<'m> {
    /// An empty session, with room for `capacity` tokens, the model's context at most. Memory is taken as tokens come.
    pub fn new(model: &'m CausalLm, capacity: usize) -> Self {
        let room = capacity.min(model.config().max_position_embeddings);
        Self { model, cache: cache(model, 1, room.min(INITIAL_CACHE_TOKENS)), room, read: Vec::new() }
    }

    /// Continues `prompt` and hands each new token to `each` as it comes. The prefix that the prompt shares with what is in
    /// the cache is not computed again.
    ///
    /// Stops after `max_new_tokens`, at a token of `eos`, when the cache is full, or when `each` breaks.
    ///
    /// # Errors
    ///
    /// A prompt without a token, longer than the room, or with a token that the model does not have; logits that are
    /// non-finite.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        max_new_tokens: usize,
        sampler: &mut Sampler,
        eos: &[u32],
        mut each: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generated, InferError> {
        let capacity = self.room;
        check_prompt(prompt, self.model.config().vocab_size, capacity)?;
        // The last token is always read: its logits are wanted.
        let known = self.read.iter().zip(&prompt[..prompt.len() - 1]).take_while(|(a, b)| a == b).count();
        self.cache.truncate(0, known);
        self.read.truncate(known);
        let mut tokens = Vec::new();
        let mut input: Vec<u32> = prompt[known..].to_vec();
        while tokens.len() < max_new_tokens && self.read.len() + input.len() <= capacity {
            let next = sampler.choose(&self.read(&input))?;
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

    /// Runs the model over tokens and returns the logits of the next one.
    fn read(&mut self, tokens: &[u32]) -> Vec<f32> {
        self.read.extend(tokens);
        grow_cache(&mut self.cache, self.read.len(), self.room);
        logit_rows(self.model.extend(&[tokens], &mut self.cache)).remove(0)
    }
}

/// Continues `prompt` and hands each new token to `each` as it comes; see [`Session::generate`].
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
    // The session's cache must not be larger than the context; it refuses a longer prompt.
    let mut session = Session::new(model, prompt.len().saturating_add(max_new_tokens).min(context));
    session.generate(prompt, max_new_tokens, &mut Sampler::new(sampling), eos, |token| {
        each(token);
        ControlFlow::Continue(())
    })
}

/// Tokens that a cache has room for at first.
const INITIAL_CACHE_TOKENS: usize = 512;

/// Lets a cache grow to what is needed, twice what it had if that is more, but never past `most`.
fn grow_cache(cache: &mut KvCache, needed: usize, most: usize) {
    if needed > cache.capacity() {
        cache.grow(needed.max(2 * cache.capacity()).min(most));
    }
}

/// Room for `capacity` tokens of each of `batch` texts, the model's context at most.
fn cache(model: &CausalLm, batch: usize, capacity: usize) -> KvCache {
    let config = model.config();
    let device = model.embed_tokens.weight.val().device();
    KvCache::new(config, batch, capacity.min(config.max_position_embeddings), &device, model.dtype())
}

/// Logits on the host, row by row.
fn logit_rows(logits: Tensor<2>) -> Vec<Vec<f32>> {
    let width = logits.dims()[1];
    let values: Vec<f32> = logits.cast(DType::F32).into_data().try_into_vec().expect("the logits were cast to f32");
    values.chunks(width).map(<[f32]>::to_vec).collect()
}

/// Checks a prompt before a model reads it: it must have tokens, all of them in the vocabulary, and no more than there is
/// room for.
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

/// Every token must have a row in the embedding.
pub(crate) fn check_tokens(tokens: &[u32], vocab_size: usize) -> Result<(), InferError> {
    match tokens.iter().find(|&&token| token as usize >= vocab_size) {
        None => Ok(()),
        Some(&token) => Err(InferError::UnknownToken { token, vocab_size }),
    }
}
