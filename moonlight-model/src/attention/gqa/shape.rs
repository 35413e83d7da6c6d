//! Grouped-query attention's part of the configuration.

use burn::config::Config;
use serde_json::{Map, Value, json};

use super::GroupedQueryAttentionConfig;
use crate::attention::kind::{AttentionKind, AttentionWidths, ModelWidths};
use crate::config::error::ConfigError;
use crate::config::keys::Keys;
use crate::config::limits::{MOST_HEADS, require, size};
use crate::config::model_type::ModelType;
use crate::config::rope::RopeConfig;

/// Grouped-query attention, by its keys in `config.json`.
#[derive(Config, Debug, PartialEq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct GqaShape {
    /// Number of key and value heads; divides the number of query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Biases on query, key and value.
    #[config(default = false)]
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub qkv_bias: bool,
    /// Bias on the output projection.
    #[config(default = false)]
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub o_bias: bool,
}

impl GqaShape {
    /// The keys of `config.json` that it is read from.
    pub(in crate::attention) const KEYS: &[&str] = &["attention_bias", "head_dim", "num_key_value_heads"];

    pub(in crate::attention) fn read(
        keys: &mut Keys,
        model_type: ModelType,
        hidden_size: usize,
        num_attention_heads: usize,
    ) -> Result<Self, ConfigError> {
        // Qwen2 has biases on query, key and value whatever its file says.
        let bias = model_type != ModelType::Qwen2 && keys.boolean("attention_bias")?.unwrap_or(false);
        Ok(Self {
            num_key_value_heads: keys.optional_size("num_key_value_heads")?.unwrap_or(num_attention_heads),
            head_dim: match keys.optional_size("head_dim")? {
                Some(head_dim) => head_dim,
                None if num_attention_heads > 0 => hidden_size / num_attention_heads,
                None => 0,
            },
            qkv_bias: model_type == ModelType::Qwen2 || bias,
            o_bias: bias,
        })
    }

    /// The attention of a model's layers.
    pub(in crate::attention) fn config(&self, model: &ModelWidths<'_>) -> GroupedQueryAttentionConfig {
        GroupedQueryAttentionConfig {
            hidden_size: model.hidden_size,
            num_attention_heads: model.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            softmax_scale: Some(self.softmax_scale(model.rope)),
            qkv_bias: self.qkv_bias,
            o_bias: self.o_bias,
            initializer_range: model.initializer_range,
        }
    }
}

impl AttentionKind for GqaShape {
    fn write(&self, model_type: ModelType, _heads: usize, map: &mut Map<String, Value>) {
        let mut put = |key: &str, value: Value| {
            map.insert(key.to_owned(), value);
        };
        put("num_key_value_heads", json!(self.num_key_value_heads));
        put("head_dim", json!(self.head_dim));
        if model_type == ModelType::Llama {
            put("attention_bias", json!(self.o_bias));
        }
    }

    fn validate(&self, heads: usize) -> Result<(), ConfigError> {
        size(self.num_key_value_heads, "num_key_value_heads", MOST_HEADS)?;
        size(self.head_dim, "head_dim", MOST_HEADS)?;
        require(heads.is_multiple_of(self.num_key_value_heads), "num_key_value_heads", || {
            format!("is {}, which does not divide the {} heads", self.num_key_value_heads, heads)
        })?;
        require(self.head_dim.is_multiple_of(2), "head_dim", || {
            format!("is {}, but the rotary embedding turns pairs: it must be even", self.head_dim)
        })
    }

    fn widths(&self, heads: usize) -> AttentionWidths {
        AttentionWidths {
            query: heads * self.head_dim,
            key_value: 2 * self.num_key_value_heads * self.head_dim,
            output: heads * self.head_dim,
            latent: 0,
            cache: [self.num_key_value_heads, 2 * self.head_dim],
            head: self.head_dim,
            rotated: self.head_dim,
        }
    }

    fn interleaves(&self) -> bool {
        false
    }

    fn softmax_scale(&self, _rope: &RopeConfig) -> f64 {
        (self.head_dim as f64).powf(-0.5)
    }
}
