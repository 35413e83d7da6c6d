//! Log-probabilities of given tokens.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Int, Tensor, TensorData};
use moonlight_model::CausalLm;

use crate::error::InferError;
use crate::generate::check_tokens;

/// How likely a model finds a token that it is given.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// The natural logarithm of its probability given those before it.
    pub logprob: f32,
    /// Whether no other token is likelier.
    pub greedy: bool,
}

/// The natural logarithm of each token's probability given those before it, in f32; `None` for the first.
///
/// # Errors
///
/// Tokens that the model does not have, and more of them than its context; logits that are non-finite.
pub fn score(model: &CausalLm, tokens: &[u32]) -> Result<Vec<Option<f32>>, InferError> {
    let context = model.config().max_position_embeddings;
    if tokens.len() > context {
        return Err(InferError::TooManyTokens { tokens: tokens.len(), context });
    }
    let scored = score_batch(model, &[tokens])?.into_iter().flatten();
    let first = tokens.first().map(|_| None);
    Ok(first.into_iter().chain(scored.map(|scored| Some(scored.logprob))).collect())
}

/// Each token of each sequence but the first, given those before it. The sequences are one batch, padded on the right. The
/// last token of a sequence is not read, so it may be one more than the model's context holds.
///
/// # Errors
///
/// As [`score`].
pub fn score_batch(model: &CausalLm, sequences: &[&[u32]]) -> Result<Vec<Vec<TokenScore>>, InferError> {
    let config = model.config();
    let longest = sequences.iter().map(|tokens| tokens.len()).max().unwrap_or(0);
    for tokens in sequences {
        check_tokens(tokens, config.vocab_size)?;
    }
    if longest > config.max_position_embeddings + 1 {
        return Err(InferError::TooManyTokens { tokens: longest, context: config.max_position_embeddings });
    }
    if longest < 2 {
        return Ok(vec![Vec::new(); sequences.len()]);
    }
    let device = model.embed_tokens.weight.val().device();
    let (rows, width) = (sequences.len(), longest - 1);
    // Padding after a shorter sequence does not matter: attention is causal.
    let padded = |from: usize| -> Vec<i32> {
        let row = |tokens: &&[u32]| {
            let tokens: Vec<i32> = tokens.iter().skip(from).take(width).map(|&token| token as i32).collect();
            tokens.into_iter().chain(std::iter::repeat(0)).take(width).collect::<Vec<i32>>()
        };
        sequences.iter().flat_map(row).collect()
    };
    let input = Tensor::<2, Int>::from_data(TensorData::new(padded(0), [rows, width]), &device);
    let targets = Tensor::<3, Int>::from_data(TensorData::new(padded(1), [rows, width, 1]), &device);
    let log_probabilities = log_softmax(model.logits(input, None).cast(DType::F32), 2);
    let given = log_probabilities.clone().gather(2, targets);
    let best = log_probabilities.max_dim(2);
    let values =
        |tensor: Tensor<3>| -> Vec<f32> { tensor.into_data().try_into_vec().expect("the logits were cast to f32") };
    let scored: Vec<TokenScore> = values(given)
        .into_iter()
        .zip(values(best))
        .map(|(logprob, best)| TokenScore { logprob, greedy: logprob >= best })
        .collect();
    let rows = scored.chunks(width).zip(sequences);
    let rows: Vec<Vec<TokenScore>> = rows.map(|(row, tokens)| row[..tokens.len().saturating_sub(1)].to_vec()).collect();
    for row in &rows {
        if let Some(place) = row.iter().position(|scored| !scored.logprob.is_finite()) {
            return Err(InferError::NonFiniteScore { place: place + 2 });
        }
    }
    Ok(rows)
}
