//! Impossible combinations, each refused by the name of its field.

use super::{AttentionShape, ConfigError, ModelConfig, MoeShape, TopkMethod};

/// More layers than any decoder has. Lists by layer are no longer than this, whatever a file says.
const MOST_LAYERS: usize = 10_000;
/// More heads, or dimensions of a head, or shared experts, than any decoder has.
const MOST_HEADS: usize = 1 << 14;
/// Wider than any matrix is. The products of an expert's two sides, or of heads, their dimensions and a width, and the
/// number of routed experts fit 64 bits.
const WIDEST: usize = 1 << 21;
/// More routed experts than any router has.
const MOST_EXPERTS: usize = 1 << 16;
/// Token ids have 32 bits.
const LARGEST_VOCABULARY: usize = u32::MAX as usize;
/// Longer than any text.
const LONGEST: usize = u32::MAX as usize;

/// Fails with [`ConfigError::Invalid`] for `field` where `condition` does not hold.
fn require(condition: bool, field: &'static str, problem: impl FnOnce() -> String) -> Result<(), ConfigError> {
    if condition { Ok(()) } else { Err(ConfigError::Invalid { field, problem: problem() }) }
}

fn positive(value: usize, field: &'static str) -> Result<(), ConfigError> {
    require(value > 0, field, || "must be at least 1".into())
}

/// At least 1 and at most `most`.
fn size(value: usize, field: &'static str, most: usize) -> Result<(), ConfigError> {
    positive(value, field)?;
    at_most(value, field, most)
}

fn at_most(value: usize, field: &'static str, most: usize) -> Result<(), ConfigError> {
    require(value <= most, field, || format!("is {value}, more than any model of the family has ({most} at most)"))
}

fn positive_number(value: f64, field: &'static str) -> Result<(), ConfigError> {
    require(value.is_finite() && value > 0.0, field, || format!("must be a positive number, not {value}"))
}

impl ModelConfig {
    /// Checks that the numbers can be a model.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Invalid`] for the first field that cannot.
    pub fn validate(&self) -> Result<(), ConfigError> {
        size(self.vocab_size, "vocab_size", LARGEST_VOCABULARY)?;
        size(self.hidden_size, "hidden_size", WIDEST)?;
        size(self.intermediate_size, "intermediate_size", WIDEST)?;
        size(self.num_hidden_layers, "num_hidden_layers", MOST_LAYERS)?;
        size(self.num_attention_heads, "num_attention_heads", MOST_HEADS)?;
        size(self.max_position_embeddings, "max_position_embeddings", LONGEST)?;
        positive_number(self.rms_norm_eps, "rms_norm_eps")?;
        positive_number(self.rope.theta, "rope_theta")?;
        require(self.initializer_range.is_finite() && self.initializer_range >= 0.0, "initializer_range", || {
            format!("must not be negative, but is {}", self.initializer_range)
        })?;
        for &id in &self.eos_token_id {
            require((id as usize) < self.vocab_size, "eos_token_id", || {
                format!("is {id}, outside the vocabulary of {}", self.vocab_size)
            })?;
        }
        self.validate_attention()?;
        self.validate_rope()?;
        self.moe.as_ref().map_or(Ok(()), |moe| self.validate_moe(moe))
    }

    fn validate_attention(&self) -> Result<(), ConfigError> {
        match &self.attention {
            AttentionShape::Mla(mla) => {
                if let Some(rank) = mla.q_lora_rank {
                    size(rank, "q_lora_rank", WIDEST)?;
                }
                size(mla.kv_lora_rank, "kv_lora_rank", WIDEST)?;
                size(mla.qk_nope_head_dim, "qk_nope_head_dim", MOST_HEADS)?;
                size(mla.qk_rope_head_dim, "qk_rope_head_dim", MOST_HEADS)?;
                size(mla.v_head_dim, "v_head_dim", MOST_HEADS)?;
                positive_number(mla.latent_norm_eps, "kv_norm_eps")?;
                require(mla.qk_rope_head_dim.is_multiple_of(2), "qk_rope_head_dim", || {
                    format!("is {}, but the rotary embedding turns pairs: it must be even", mla.qk_rope_head_dim)
                })
            }
            AttentionShape::Gqa(gqa) => {
                size(gqa.num_key_value_heads, "num_key_value_heads", MOST_HEADS)?;
                size(gqa.head_dim, "head_dim", MOST_HEADS)?;
                require(
                    self.num_attention_heads.is_multiple_of(gqa.num_key_value_heads),
                    "num_key_value_heads",
                    || {
                        format!(
                            "is {}, which does not divide the {} heads",
                            gqa.num_key_value_heads, self.num_attention_heads
                        )
                    },
                )?;
                require(gqa.head_dim.is_multiple_of(2), "head_dim", || {
                    format!("is {}, but the rotary embedding turns pairs: it must be even", gqa.head_dim)
                })
            }
        }
    }

    fn validate_rope(&self) -> Result<(), ConfigError> {
        let Some(yarn) = &self.rope.yarn else { return Ok(()) };
        size(yarn.original_max_position_embeddings, "rope_scaling.original_max_position_embeddings", LONGEST)?;
        positive_number(yarn.factor, "rope_scaling.factor")?;
        positive_number(yarn.beta_fast, "rope_scaling.beta_fast")?;
        positive_number(yarn.beta_slow, "rope_scaling.beta_slow")?;
        require(yarn.beta_fast >= yarn.beta_slow, "rope_scaling.beta_fast", || {
            format!("is {}, below beta_slow ({})", yarn.beta_fast, yarn.beta_slow)
        })
    }

    fn validate_moe(&self, moe: &MoeShape) -> Result<(), ConfigError> {
        size(moe.n_routed_experts, "n_routed_experts", MOST_EXPERTS)?;
        positive(moe.num_experts_per_tok, "num_experts_per_tok")?;
        size(moe.moe_intermediate_size, "moe_intermediate_size", WIDEST)?;
        at_most(moe.n_shared_experts, "n_shared_experts", MOST_HEADS)?;
        positive(moe.moe_layer_freq, "moe_layer_freq")?;
        positive(moe.n_group, "n_group")?;
        positive_number(moe.routed_scaling_factor, "routed_scaling_factor")?;
        let experts = moe.n_routed_experts;
        require(moe.num_experts_per_tok <= experts, "num_experts_per_tok", || {
            format!("is {}, more than the {experts} routed experts", moe.num_experts_per_tok)
        })?;
        require(experts.is_multiple_of(moe.n_group), "n_group", || {
            format!("is {}, which does not divide the {experts} routed experts", moe.n_group)
        })?;
        require((1..=moe.n_group).contains(&moe.topk_group), "topk_group", || {
            format!("is {}, outside 1..={}", moe.topk_group, moe.n_group)
        })?;
        let per_group = experts / moe.n_group;
        require(moe.num_experts_per_tok <= moe.topk_group * per_group, "num_experts_per_tok", || {
            format!(
                "is {}, but the {} groups that a token may choose from hold {} experts",
                moe.num_experts_per_tok,
                moe.topk_group,
                moe.topk_group * per_group
            )
        })?;
        // A group's worth is the sum of its two best experts under `noaux_tc`.
        let needs_two = moe.topk_method == TopkMethod::NoauxTc && moe.n_group > 1;
        require(!needs_two || per_group >= 2, "n_group", || {
            format!(
                "is {}, which leaves {per_group} expert in a group; `noaux_tc` ranks groups by their two best",
                moe.n_group
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Moonlight with one thing changed, and the field that the error must name.
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
        let mla = |config: &mut ModelConfig, change: fn(&mut super::super::MlaShape)| match &mut config.attention {
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
        // The largest of everything is still counted without overflow.
        let mut largest = ModelConfig::preset("moonlight-16b-a3b").unwrap();
        (largest.hidden_size, largest.intermediate_size, largest.vocab_size) = (WIDEST, WIDEST, LARGEST_VOCABULARY);
        (largest.num_attention_heads, largest.num_hidden_layers) = (MOST_HEADS, MOST_LAYERS);
        mla(&mut largest, |mla| {
            (mla.qk_nope_head_dim, mla.v_head_dim, mla.kv_lora_rank) = (MOST_HEADS, MOST_HEADS, WIDEST)
        });
        (moe(&mut largest).n_routed_experts, moe(&mut largest).moe_intermediate_size) = (MOST_EXPERTS, WIDEST);
        moe(&mut largest).n_shared_experts = MOST_HEADS;
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
