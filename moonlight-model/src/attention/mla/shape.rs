//! [`MlaShape`]: the keys of `config.json` for multi-head latent attention.

use burn::config::Config;
use serde_json::{Map, Value, json};

use super::MultiHeadLatentAttentionConfig;
use crate::attention::kind::{AttentionKind, AttentionWidths, ModelWidths};
use crate::config::error::ConfigError;
use crate::config::keys::Keys;
use crate::config::limits::{MAX_HEADS, MAX_WIDTH, check_positive_number, check_size, require};
use crate::config::model_type::ModelType;
use crate::config::rope::{RopeConfig, yarn_mscale};

/// The epsilon that transformers gives the latent norms, whatever `rms_norm_eps` is.
const DEFAULT_LATENT_NORM_EPS: f64 = 1e-6;

/// The keys of `config.json` for multi-head latent attention.
#[derive(Config, Debug, PartialEq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct MlaShape {
    /// Width of the query latent; null to project queries directly (Moonlight).
    pub q_lora_rank: Option<usize>,
    /// Width of the latent that is cached and that keys and values are expanded from.
    pub kv_lora_rank: usize,
    /// Width of the part of a head's query and key without position.
    pub qk_nope_head_dim: usize,
    /// Width of the part with position, of a head's query and of the one key that all heads share; must be even.
    pub qk_rope_head_dim: usize,
    /// Width of the value of a head.
    pub v_head_dim: usize,
    /// Epsilon of the norms of the latents. transformers and the published remote code use 1e-6 whatever `rms_norm_eps` is;
    /// vLLM and SGLang use `rms_norm_eps`. The default follows transformers. The key `kv_norm_eps` exists only in this
    /// project.
    #[config(default = "DEFAULT_LATENT_NORM_EPS")]
    #[cfg_attr(feature = "schema", schemars(rename = "kv_norm_eps"))]
    pub latent_norm_eps: f64,
    /// Whether `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` have biases.
    #[config(default = false)]
    pub attention_bias: bool,
}

impl MlaShape {
    /// The keys that are read.
    pub(in crate::attention) const KEYS: &[&str] = &[
        "attention_bias",
        "kv_lora_rank",
        "kv_norm_eps",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    ];

    pub(in crate::attention) fn read(keys: &mut Keys) -> Result<Self, ConfigError> {
        Ok(Self {
            q_lora_rank: keys.optional_size("q_lora_rank")?,
            kv_lora_rank: keys.size("kv_lora_rank")?,
            qk_nope_head_dim: keys.size("qk_nope_head_dim")?,
            qk_rope_head_dim: keys.size("qk_rope_head_dim")?,
            v_head_dim: keys.size("v_head_dim")?,
            latent_norm_eps: keys.number("kv_norm_eps")?.unwrap_or(DEFAULT_LATENT_NORM_EPS),
            attention_bias: keys.boolean("attention_bias")?.unwrap_or(false),
        })
    }

    /// The config of the attention of one layer.
    pub(in crate::attention) fn config(&self, model: &ModelWidths<'_>) -> MultiHeadLatentAttentionConfig {
        MultiHeadLatentAttentionConfig {
            hidden_size: model.hidden_size,
            num_attention_heads: model.num_attention_heads,
            kv_lora_rank: self.kv_lora_rank,
            qk_nope_head_dim: self.qk_nope_head_dim,
            qk_rope_head_dim: self.qk_rope_head_dim,
            v_head_dim: self.v_head_dim,
            q_lora_rank: self.q_lora_rank,
            softmax_scale: Some(self.softmax_scale(model.rope)),
            latent_norm_eps: self.latent_norm_eps,
            attention_bias: self.attention_bias,
            initializer_range: model.initializer_range,
        }
    }
}

impl AttentionKind for MlaShape {
    fn write(&self, _model_type: ModelType, heads: usize, map: &mut Map<String, Value>) {
        let mut put = |key: &str, value: Value| {
            map.insert(key.to_owned(), value);
        };
        put("q_lora_rank", json!(self.q_lora_rank));
        put("kv_lora_rank", json!(self.kv_lora_rank));
        put("qk_nope_head_dim", json!(self.qk_nope_head_dim));
        put("qk_rope_head_dim", json!(self.qk_rope_head_dim));
        put("v_head_dim", json!(self.v_head_dim));
        put("attention_bias", json!(self.attention_bias));
        if self.latent_norm_eps != DEFAULT_LATENT_NORM_EPS {
            put("kv_norm_eps", json!(self.latent_norm_eps));
        }
        // Published files have this key, though latent attention does not use it.
        map.entry("num_key_value_heads").or_insert_with(|| json!(heads));
    }

    fn validate(&self, _heads: usize) -> Result<(), ConfigError> {
        if let Some(rank) = self.q_lora_rank {
            check_size(rank, "q_lora_rank", MAX_WIDTH)?;
        }
        check_size(self.kv_lora_rank, "kv_lora_rank", MAX_WIDTH)?;
        check_size(self.qk_nope_head_dim, "qk_nope_head_dim", MAX_HEADS)?;
        check_size(self.qk_rope_head_dim, "qk_rope_head_dim", MAX_HEADS)?;
        check_size(self.v_head_dim, "v_head_dim", MAX_HEADS)?;
        check_positive_number(self.latent_norm_eps, "kv_norm_eps")?;
        require(self.qk_rope_head_dim.is_multiple_of(2), "qk_rope_head_dim", || {
            format!("is {}, but must be even: the rotary embedding rotates pairs", self.qk_rope_head_dim)
        })
    }

    fn widths(&self, heads: usize) -> AttentionWidths {
        let (nope, rope, value) = (self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim);
        AttentionWidths {
            query: heads * (nope + rope),
            key_value: heads * (nope + value),
            output: heads * value,
            // Twice each: latents before and after their norms, the shared key before and after its rotation.
            latent: 2 * (self.kv_lora_rank + rope) + 2 * self.q_lora_rank.unwrap_or(0),
            cache: [1, self.kv_lora_rank + rope],
            head: nope + rope,
            rotated: rope,
        }
    }

    fn interleaves(&self) -> bool {
        true
    }

    fn softmax_scale(&self, rope: &RopeConfig) -> f64 {
        let scale = ((self.qk_nope_head_dim + self.qk_rope_head_dim) as f64).powf(-0.5);
        // Squared, as in DeepSeek's remote code: `softmax_scale * mscale * mscale`.
        match rope.yarn().and_then(|yarn| Some((yarn.factor, yarn.mscale_all_dim?))) {
            Some((factor, all_dim)) if all_dim != 0.0 => scale * yarn_mscale(factor, all_dim).powi(2),
            _ => scale,
        }
    }
}
