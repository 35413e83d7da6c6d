//! Text from a model.

mod sampler;

use burn::tensor::{DType, Int, Tensor, TensorData};
use moonlight_model::{CausalLm, KvCache};
use serde::Serialize;

use crate::error::TrainError;

pub use sampler::{Sampler, Sampling};

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stop {
    /// The model ended its text.
    Eos,
    /// The text is as long as was asked for, or as the model can make it.
    Length,
}

/// What a model wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens, without the one that ended the text.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: Stop,
}

/// Goes on from `prompt`, handing each new token to `each` as it comes.
///
/// Ends behind `max_new_tokens`, at a token of `eos`, or where the model's context is full.
///
/// # Errors
///
/// A prompt without a token, longer than the model's context, or with a token that the model does not have.
pub fn generate(
    model: &CausalLm,
    prompt: &[u32],
    max_new_tokens: usize,
    sampling: Sampling,
    eos: &[u32],
    mut each: impl FnMut(u32),
) -> Result<Generated, TrainError> {
    let config = model.config();
    check_tokens(prompt, config.vocab_size)?;
    let context = config.max_position_embeddings;
    if prompt.is_empty() || prompt.len() > context {
        let problem = match prompt.len() {
            0 => "the prompt has no tokens".into(),
            length => format!("the prompt has {length} tokens, more than the model's context of {context}"),
        };
        return Err(TrainError::Request { problem, hint: None });
    }
    let device = model.embed_tokens.weight.val().device();
    let capacity = context.min(prompt.len() + max_new_tokens);
    let mut cache = KvCache::new(config, 1, capacity, &device, model.dtype());
    let mut sampler = Sampler::new(sampling);
    let mut tokens = Vec::new();
    let mut input: Vec<u32> = prompt.to_vec();
    while tokens.len() < max_new_tokens && cache.len() + input.len() <= capacity {
        let values: Vec<i32> = input.iter().map(|&token| token as i32).collect();
        let length = values.len();
        let logits =
            model.decode(Tensor::<2, Int>::from_data(TensorData::new(values, [1, length]), &device), &mut cache);
        let next = sampler.choose(&last_row(logits));
        if eos.contains(&next) {
            return Ok(Generated { tokens, stop: Stop::Eos });
        }
        tokens.push(next);
        each(next);
        input = vec![next];
    }
    Ok(Generated { tokens, stop: Stop::Length })
}

fn last_row(logits: Tensor<3>) -> Vec<f32> {
    let last = logits.dims()[1] - 1;
    let row = logits.slice_dim(1, last..last + 1).cast(DType::F32).into_data();
    row.try_into_vec().expect("the row was cast to f32")
}

/// Every token must have a row in the embedding.
pub(crate) fn check_tokens(tokens: &[u32], vocab_size: usize) -> Result<(), TrainError> {
    match tokens.iter().find(|&&token| token as usize >= vocab_size) {
        None => Ok(()),
        Some(token) => Err(TrainError::Request {
            problem: format!("there is no token {token}: the model has {vocab_size}"),
            hint: None,
        }),
    }
}
