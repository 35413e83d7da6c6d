//! Log-probabilities of given tokens.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Int, Tensor, TensorData};
use moonlight_model::CausalLm;

use crate::error::TrainError;
use crate::generate::check_tokens;

/// The natural logarithm of each token's probability given those before it, in f32; `None` for the first.
///
/// # Errors
///
/// Tokens that the model does not have, and more of them than its context.
pub fn score(model: &CausalLm, tokens: &[u32]) -> Result<Vec<Option<f32>>, TrainError> {
    let config = model.config();
    check_tokens(tokens, config.vocab_size)?;
    let (length, context) = (tokens.len(), config.max_position_embeddings);
    if length > context {
        return Err(TrainError::Request {
            problem: format!("{length} tokens are more than the model's context of {context}"),
            hint: None,
        });
    }
    let mut scores = vec![None; length];
    if length < 2 {
        return Ok(scores);
    }
    let device = model.embed_tokens.weight.val().device();
    let integers = |tokens: &[u32]| tokens.iter().map(|&token| token as i32).collect::<Vec<_>>();
    let input = Tensor::<2, Int>::from_data(TensorData::new(integers(&tokens[..length - 1]), [1, length - 1]), &device);
    let targets = TensorData::new(integers(&tokens[1..]), [1, length - 1, 1]);
    let targets = Tensor::<3, Int>::from_data(targets, &device);
    let log_probabilities = log_softmax(model.logits(input, None).cast(DType::F32), 2).gather(2, targets);
    let values: Vec<f32> = log_probabilities.into_data().try_into_vec().expect("the logits were cast to f32");
    for (score, value) in scores[1..].iter_mut().zip(values) {
        *score = Some(value);
    }
    Ok(scores)
}
