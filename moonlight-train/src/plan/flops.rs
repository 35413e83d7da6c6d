//! Floating-point operations of a token, and of Muon's update, which costs the same however many tokens a step has.

use moonlight_model::ModelConfig;
use moonlight_model::config::{ParameterKind, ParameterShape};
use moonlight_optim::NewtonSchulz;
use serde::Serialize;

/// Floating-point operations of one token. A multiplication and an addition count as two.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct TokenFlops {
    /// Products with weights: two for each activated parameter, without the embedding, which is a lookup. Those of norms
    /// and biases are included, although they are in no product of matrices.
    pub weights: u64,
    /// Attention scores and weighted sums, averaged over the positions of a causal sequence.
    pub attention: u64,
}

impl TokenFlops {
    /// Counts the forward pass over sequences of `sequence` tokens.
    pub fn for_sequence(config: &ModelConfig, sequence: usize) -> Self {
        let count = config.parameter_count();
        let embedding = (config.vocab_size * config.hidden_size) as u64;
        // A tied embedding is counted once, and the head multiplies by it.
        let looked_up = if config.tie_word_embeddings { 0 } else { embedding };
        let per_pair = config.attention_widths().products_per_pair() as u64;
        // A query attends to (sequence + 1) / 2 keys on average; a multiplication and an addition count as two, which cancels the half.
        let attention = config.num_hidden_layers as u64 * per_pair * (sequence as u64 + 1);
        Self { weights: 2 * (count.activated - looked_up), attention }
    }

    /// One forward pass.
    pub fn forward(self) -> u64 {
        self.weights + self.attention
    }

    /// Forward and backward; the backward pass costs two forward passes, activation checkpointing one more.
    pub fn training(self, recompute: bool) -> u64 {
        self.forward() * if recompute { 4 } else { 3 }
    }
}

/// Whether Muon updates a parameter: every matrix except embedding and head.
pub(super) fn is_muon_parameter(shape: &ParameterShape) -> bool {
    matches!(shape.kind, ParameterKind::Matrix | ParameterKind::Experts | ParameterKind::Router)
}

/// Floating-point operations of Newton-Schulz in one update of all Muon matrices. With `symmetric` only half of each symmetric
/// product is computed, as the CPU kernel does; Burn's operations on GPUs compute all of it.
pub fn newton_schulz_flops(config: &ModelConfig, iteration: &NewtonSchulz, symmetric: bool) -> f64 {
    let shapes = config.parameter_shapes();
    let of = |shape: &ParameterShape| match shape.shape.as_slice() {
        [stack @ .., rows, columns] => {
            stack.iter().product::<usize>() as f64 * iteration.flops(*rows, *columns, symmetric)
        }
        _ => 0.0,
    };
    shapes.iter().filter(|shape| is_muon_parameter(shape)).map(of).sum()
}

/// The fewest tokens per step for which the optimizer is at most `share` of all operations. `optimizer` is its operations in a step,
/// `token` those of a token's forward and backward pass.
pub fn tokens_for_share(share: f64, optimizer: f64, token: f64) -> u64 {
    (optimizer * (1.0 - share) / (share * token)).ceil() as u64
}

#[cfg(test)]
mod tests {
    use moonlight_optim::{Coefficients, NewtonSchulzForm};

    use super::*;

    fn five_steps() -> NewtonSchulz {
        NewtonSchulz::new(&Coefficients::Report, 5)
    }

    fn flops(preset: &str, sequence: usize) -> (f64, f64) {
        let config = ModelConfig::preset(preset).unwrap();
        let token = TokenFlops::for_sequence(&config, sequence).training(false) as f64;
        (newton_schulz_flops(&config, &five_steps(), false), token)
    }

    #[test]
    fn newton_schulz_flops_are_the_sum_over_the_matrices() {
        let config = ModelConfig::preset("bench-small").unwrap();
        let iteration = five_steps();
        let of = |count: f64, rows, columns| count * iteration.flops(rows, columns, true);
        // q, kv_a, kv_b, o; gate, up, down of the dense layer, of the shared experts (2 in one) and of 32 experts; router.
        let attention = of(1.0, 512, 768) + of(1.0, 512, 160) + of(1.0, 128, 1024) + of(1.0, 512, 512);
        let mixture = of(32.0 * 3.0, 512, 352) + of(3.0, 512, 704) + of(1.0, 32, 512);
        let expected = 8.0 * attention + of(3.0, 512, 1408) + 7.0 * mixture;
        let found = newton_schulz_flops(&config, &iteration, true);
        assert!((found / expected - 1.0).abs() < 1e-12, "{found}, {expected}");
        let direct = NewtonSchulz { form: NewtonSchulzForm::Direct, ..iteration };
        assert!(newton_schulz_flops(&config, &direct, true) > found);
    }

    #[test]
    fn fewer_tokens_exceed_the_share() {
        for preset in ["bench-small", "moonlight-16b-a3b"] {
            let (optimizer, token) = flops(preset, 512);
            let tokens = tokens_for_share(0.1, optimizer, token) as f64;
            let share = |tokens: f64| optimizer / (optimizer + tokens * token);
            assert!(share(tokens) <= 0.1 && share(tokens - 1.0) > 0.1, "{preset}");
        }
    }
}
