//! Refuses impossible values, naming the field.

use super::error::ConfigError;
use super::limits::{
    MAX_HEADS, MAX_LAYERS, MAX_LENGTH, MAX_VOCABULARY, MAX_WIDTH, check_positive_number, check_size, require,
};
use super::{ModelConfig, MoeShape};

impl ModelConfig {
    /// Checks every value by itself and against the others.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Invalid`] for the first field that is impossible.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_size(self.vocab_size, "vocab_size", MAX_VOCABULARY)?;
        check_size(self.hidden_size, "hidden_size", MAX_WIDTH)?;
        check_size(self.intermediate_size, "intermediate_size", MAX_WIDTH)?;
        check_size(self.num_hidden_layers, "num_hidden_layers", MAX_LAYERS)?;
        check_size(self.num_attention_heads, "num_attention_heads", MAX_HEADS)?;
        check_size(self.max_position_embeddings, "max_position_embeddings", MAX_LENGTH)?;
        check_positive_number(self.rms_norm_eps, "rms_norm_eps")?;
        check_positive_number(self.rope.theta, "rope_theta")?;
        require(self.initializer_range.is_finite() && self.initializer_range >= 0.0, "initializer_range", || {
            format!("must not be negative, but is {}", self.initializer_range)
        })?;
        for &id in &self.eos_token_id {
            require((id as usize) < self.vocab_size, "eos_token_id", || {
                format!("is {id}, outside the vocabulary of {}", self.vocab_size)
            })?;
        }
        self.attention.validate(self.num_attention_heads)?;
        self.rope.validate()?;
        self.moe.as_ref().map_or(Ok(()), MoeShape::validate)
    }
}

#[cfg(test)]
mod tests {
    use super::super::limits::{MAX_EXPERTS, MAX_WIDTH};
    use super::super::{AttentionShape, MlaShape};
    use super::*;

    /// The field that is refused after a change to Moonlight's config.
    fn refused(change: impl FnOnce(&mut ModelConfig)) -> &'static str {
        let mut config = ModelConfig::preset("moonlight-16b-a3b").unwrap();
        change(&mut config);
        match config.validate() {
            Err(ConfigError::Invalid { field, .. }) => field,
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    fn moe(config: &mut ModelConfig) -> &mut MoeShape {
        config.moe.as_mut().unwrap()
    }

    #[test]
    fn impossible_combinations_name_their_field() {
        assert_eq!(refused(|c| c.vocab_size = 0), "vocab_size");
        assert_eq!(refused(|c| c.rms_norm_eps = f64::NAN), "rms_norm_eps");
        assert_eq!(refused(|c| c.eos_token_id = vec![163_840]), "eos_token_id");
        assert_eq!(refused(|c| moe(c).num_experts_per_tok = 65), "num_experts_per_tok");
        assert_eq!(refused(|c| moe(c).n_group = 7), "n_group");
        assert_eq!(refused(|c| moe(c).topk_group = 2), "topk_group");
        assert_eq!(refused(|c| (moe(c).n_group, moe(c).topk_group) = (64, 8)), "n_group");
        assert_eq!(refused(|c| (moe(c).n_group, moe(c).topk_group) = (16, 1)), "num_experts_per_tok");
        assert_eq!(
            refused(|c| match &mut c.attention {
                AttentionShape::Mla(mla) => mla.qk_rope_head_dim = 63,
                AttentionShape::Gqa(_) => unreachable!("Moonlight has MLA"),
            }),
            "qk_rope_head_dim"
        );
    }

    #[test]
    fn sizes_that_no_model_has_name_their_field() {
        let mla = |config: &mut ModelConfig, change: fn(&mut MlaShape)| match &mut config.attention {
            AttentionShape::Mla(mla) => change(mla),
            AttentionShape::Gqa(_) => unreachable!("Moonlight has MLA"),
        };
        const HUGE: usize = 1_000_000_000_000;
        assert_eq!(refused(|c| c.num_hidden_layers = HUGE), "num_hidden_layers");
        assert_eq!(refused(|c| c.vocab_size = usize::MAX), "vocab_size");
        assert_eq!(refused(|c| c.hidden_size = usize::MAX), "hidden_size");
        assert_eq!(refused(|c| c.num_attention_heads = HUGE), "num_attention_heads");
        assert_eq!(refused(|c| c.max_position_embeddings = usize::MAX), "max_position_embeddings");
        assert_eq!(refused(|c| moe(c).n_routed_experts = HUGE), "n_routed_experts");
        assert_eq!(refused(|c| moe(c).n_shared_experts = usize::MAX), "n_shared_experts");
        assert_eq!(refused(|c| mla(c, |mla| mla.qk_nope_head_dim = usize::MAX)), "qk_nope_head_dim");
        assert_eq!(refused(|c| mla(c, |mla| mla.kv_lora_rank = usize::MAX)), "kv_lora_rank");
        assert_eq!(refused(|c| moe(c).n_routed_experts = MAX_EXPERTS + 64), "n_routed_experts");
        // A model at all limits is counted without overflow.
        let mut largest = ModelConfig::preset("moonlight-16b-a3b").unwrap();
        (largest.hidden_size, largest.intermediate_size, largest.vocab_size) = (MAX_WIDTH, MAX_WIDTH, MAX_VOCABULARY);
        (largest.num_attention_heads, largest.num_hidden_layers) = (MAX_HEADS, MAX_LAYERS);
        mla(&mut largest, |mla| {
            (mla.qk_nope_head_dim, mla.v_head_dim, mla.kv_lora_rank) = (MAX_HEADS, MAX_HEADS, MAX_WIDTH)
        });
        (moe(&mut largest).n_routed_experts, moe(&mut largest).moe_intermediate_size) = (MAX_EXPERTS, MAX_WIDTH);
        moe(&mut largest).n_shared_experts = MAX_HEADS;
        largest.validate().unwrap();
        assert!(largest.parameter_count().total > 1 << 62);
    }

    #[test]
    fn published_shapes_are_accepted() {
        for preset in super::super::PRESETS {
            ModelConfig::preset(preset).unwrap().validate().unwrap();
        }
    }
}
