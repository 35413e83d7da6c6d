//! The log-probabilities of given tokens.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Int, Tensor, TensorData};
use moonlight_model::CausalLm;

use crate::error::InferError;
use crate::generate::check_tokens;

/// The probability that a model gives to one token of a sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// The natural logarithm of the probability, given all tokens before.
    pub logprob: f32,
    /// Whether no other token has a higher probability.
    pub greedy: bool,
}

/// The natural logarithm of the probability of each token given all tokens before it, in f32. `None` for the first token.
///
/// # Errors
///
/// [`InferError::UnknownToken`], [`InferError::TooManyTokens`] beyond the model's context, and
/// [`InferError::NonFiniteScore`].
pub fn score(model: &CausalLm, tokens: &[u32]) -> Result<Vec<Option<f32>>, InferError> {
    let context = model.config().max_position_embeddings;
    if tokens.len() > context {
        return Err(InferError::TooManyTokens { tokens: tokens.len(), context });
    }
    let scores = score_batch(model, &[tokens])?.into_iter().flatten();
    let first = tokens.first().map(|_| None);
    Ok(first.into_iter().chain(scores.map(|score| Some(score.logprob))).collect())
}

/// Scores all tokens of each sequence except the first, in one batch that is padded on the right. The last token of a sequence
/// is predicted but not read, so a sequence may be one token longer than the model's context.
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
    let (batch, width) = (sequences.len(), longest - 1);
    // Attention is causal, so padding after a sequence does not change its scores.
    let padded = |from: usize| -> Vec<i32> {
        let row = |tokens: &&[u32]| {
            let tokens: Vec<i32> = tokens.iter().skip(from).take(width).map(|&token| token as i32).collect();
            tokens.into_iter().chain(std::iter::repeat(0)).take(width).collect::<Vec<i32>>()
        };
        sequences.iter().flat_map(row).collect()
    };
    // The target of a token is the next one.
    let input = Tensor::<2, Int>::from_data(TensorData::new(padded(0), [batch, width]), &device);
    let targets = Tensor::<3, Int>::from_data(TensorData::new(padded(1), [batch, width, 1]), &device);
    let log_probabilities = log_softmax(model.logits(input, None).cast(DType::F32), 2); // [batch, width, vocab]
    let target_scores = log_probabilities.clone().gather(2, targets); // [batch, width, 1]
    let best = log_probabilities.max_dim(2); // [batch, width, 1]
    let values =
        |tensor: Tensor<3>| -> Vec<f32> { tensor.into_data().try_into_vec().expect("the logits were cast to f32") };
    let scores: Vec<TokenScore> = values(target_scores)
        .into_iter()
        .zip(values(best))
        .map(|(logprob, best)| TokenScore { logprob, greedy: logprob >= best })
        .collect();
    let rows = scores.chunks(width).zip(sequences);
    let rows: Vec<Vec<TokenScore>> = rows.map(|(row, tokens)| row[..tokens.len().saturating_sub(1)].to_vec()).collect();
    for row in &rows {
        if let Some(index) = row.iter().position(|score| !score.logprob.is_finite()) {
            // The first score belongs to the second token, and positions count from 1.
            return Err(InferError::NonFiniteScore { position: index + 2 });
        }
    }
    Ok(rows)
}
