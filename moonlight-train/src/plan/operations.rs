//! Floating-point operations of a token.

use moonlight_model::ModelConfig;
use moonlight_model::config::AttentionConfig;
use serde::Serialize;

/// Operations of one token, a multiplication and an addition counting two.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Operations {
    /// Products with weights: twice the activated parameters, the embedding (a lookup) left out.
    pub weights: u64,
    /// Scores and weighted sums of attention, averaged over the positions of a causal sequence.
    pub attention: u64,
}

impl Operations {
    /// Of a forward pass over sequences of `sequence` tokens.
    pub fn of(config: &ModelConfig, sequence: usize) -> Self {
        let count = config.parameter_count();
        let embedding = (config.vocab_size * config.hidden_size) as u64;
        let looked_up = if config.tie_word_embeddings { 0 } else { embedding };
        let heads = config.num_attention_heads as u64;
        let widths = match &config.attention {
            AttentionConfig::Mla(mla) => mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim,
            AttentionConfig::Gqa(gqa) => 2 * gqa.head_dim,
        };
        let attention = config.num_hidden_layers as u64 * heads * widths as u64 * (sequence as u64 + 1);
        Self { weights: 2 * (count.activated - looked_up), attention }
    }

    /// Of a forward pass.
    pub fn forward(self) -> u64 {
        self.weights + self.attention
    }

    /// Of forward and backward, which is twice a forward, and of the second forward where layers run again.
    pub fn training(self, recompute: bool) -> u64 {
        self.forward() * if recompute { 4 } else { 3 }
    }
}
