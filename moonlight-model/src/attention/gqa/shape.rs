//! [`GqaShape`]: the keys of `config.json` for grouped-query attention.

use burn::config::Config;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::GroupedQueryAttentionConfig;
use crate::attention::kind::{AttentionKind, AttentionWidths, ModelWidths};
use crate::config::error::ConfigError;
use crate::config::keys::Keys;
use crate::config::limits::{MAX_HEADS, MAX_LENGTH, check_size, require};
use crate::config::model_type::ModelType;
use crate::config::rope::RopeConfig;

/// The keys of `config.json` for grouped-query attention.
#[derive(Config, Debug, PartialEq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct GqaShape {
    /// Number of key and value heads; must divide the number of query heads.
    pub num_key_value_heads: usize,
    /// Width of a head; must be even.
    pub head_dim: usize,
    /// Whether query, key and value projections have biases.
    #[config(default = false)]
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    #[config(default = false)]
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub o_bias: bool,
    /// The sliding window of some layers (Qwen2).
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub sliding_window: Option<SlidingWindow>,
}

/// A sliding window: in some layers a token sees the last `tokens` tokens only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlidingWindow {
    /// Number of tokens that a token sees, itself included.
    pub tokens: usize,
    /// Which layers have the window.
    pub layers: WindowLayers,
}

/// Which layers have a sliding window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum WindowLayers {
    /// All layers from this index on (`max_window_layers`).
    From(usize),
    /// The layers with `true`, one entry for each layer (`layer_types`).
    Listed(Vec<bool>),
}

impl SlidingWindow {
    /// The keys that describe the window.
    const KEYS: [&str; 4] = ["layer_types", "max_window_layers", "sliding_window", "use_sliding_window"];

    /// Whether the layer has the window.
    pub fn is_in_layer(&self, layer: usize) -> bool {
        match &self.layers {
            WindowLayers::From(first) => layer >= *first,
            WindowLayers::Listed(layers) => layers.get(layer).copied().unwrap_or(false),
        }
    }

    /// Follows transformers' `Qwen2Config`: if `use_sliding_window` is true, the layers that `layer_types` lists as
    /// `sliding_attention` have the window; without `layer_types`, all layers from `max_window_layers` on. The keys stay in `map`,
    /// so that writing the config restores them.
    fn read(map: &Map<String, Value>) -> Result<Option<Self>, ConfigError> {
        let mut keys = Keys { map: Map::new() };
        for key in Self::KEYS {
            keys.map.extend(map.get(key).map(|value| (key.to_owned(), value.clone())));
        }
        let used = keys.boolean("use_sliding_window")?.unwrap_or(false);
        let tokens = keys.optional_size("sliding_window")?.filter(|tokens| used && *tokens > 0);
        let first = keys.optional_size("max_window_layers")?.unwrap_or(DEFAULT_WINDOW_LAYERS);
        let kinds = keys.optional("layer_types", "a list of `full_attention` and `sliding_attention`", |value| {
            value
                .as_array()?
                .iter()
                .map(|kind| match kind.as_str()? {
                    "full_attention" => Some(false),
                    "sliding_attention" => Some(true),
                    _ => None,
                })
                .collect::<Option<Vec<bool>>>()
        })?;
        if tokens.is_none() && kinds.as_ref().is_some_and(|kinds| kinds.contains(&true)) {
            return Err(ConfigError::Unsupported {
                key: "layer_types".into(),
                problem: "has `sliding_attention` layers, but no `sliding_window` is in use".into(),
                hint: None,
            });
        }
        let layers = kinds.map_or(WindowLayers::From(first), WindowLayers::Listed);
        Ok(tokens.map(|tokens| Self { tokens, layers }))
    }

    fn write(&self, map: &mut Map<String, Value>) {
        map.insert("use_sliding_window".into(), json!(true));
        map.insert("sliding_window".into(), json!(self.tokens));
        match &self.layers {
            WindowLayers::From(first) => {
                map.remove("layer_types");
                map.insert("max_window_layers".into(), json!(first));
            }
            WindowLayers::Listed(layers) => {
                let kind = |window: &bool| if *window { "sliding_attention" } else { "full_attention" };
                map.insert("layer_types".into(), layers.iter().map(kind).collect());
            }
        }
    }
}

/// transformers' default of `max_window_layers`.
const DEFAULT_WINDOW_LAYERS: usize = 28;

impl GqaShape {
    /// The keys that are read.
    pub(in crate::attention) const KEYS: &[&str] = &[
        "attention_bias",
        "head_dim",
        "layer_types",
        "max_window_layers",
        "num_key_value_heads",
        "sliding_window",
        "use_sliding_window",
    ];

    pub(in crate::attention) fn read(
        keys: &mut Keys,
        model_type: ModelType,
        hidden_size: usize,
        num_attention_heads: usize,
    ) -> Result<Self, ConfigError> {
        // Qwen2 always has biases on query, key and value, and none on the output; `attention_bias` has no effect.
        let bias = model_type != ModelType::Qwen2 && keys.boolean("attention_bias")?.unwrap_or(false);
        Ok(Self {
            num_key_value_heads: keys.optional_size("num_key_value_heads")?.unwrap_or(num_attention_heads),
            head_dim: match keys.optional_size("head_dim")? {
                Some(head_dim) => head_dim,
                None if num_attention_heads > 0 => hidden_size / num_attention_heads,
                None => 0, // `validate` refuses it by name
            },
            qkv_bias: model_type == ModelType::Qwen2 || bias,
            o_bias: bias,
            sliding_window: match model_type {
                ModelType::Qwen2 => SlidingWindow::read(&keys.map)?,
                _ => None,
            },
        })
    }

    /// The config of the attention of one layer.
    pub(in crate::attention) fn config(&self, model: &ModelWidths<'_>) -> GroupedQueryAttentionConfig {
        GroupedQueryAttentionConfig {
            hidden_size: model.hidden_size,
            num_attention_heads: model.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            softmax_scale: Some(self.softmax_scale(model.rope)),
            qkv_bias: self.qkv_bias,
            o_bias: self.o_bias,
            sliding_window: self
                .sliding_window
                .as_ref()
                .filter(|window| window.is_in_layer(model.layer))
                .map(|window| window.tokens),
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
        // `map` still has the keys of the file. Replace them only if the window was changed after reading.
        if !SlidingWindow::read(map).is_ok_and(|window| window == self.sliding_window) {
            match &self.sliding_window {
                Some(window) => window.write(map),
                None => SlidingWindow::KEYS.iter().for_each(|key| drop(map.remove(*key))),
            }
        }
    }

    fn validate(&self, heads: usize) -> Result<(), ConfigError> {
        check_size(self.num_key_value_heads, "num_key_value_heads", MAX_HEADS)?;
        check_size(self.head_dim, "head_dim", MAX_HEADS)?;
        require(heads.is_multiple_of(self.num_key_value_heads), "num_key_value_heads", || {
            format!("is {}, which does not divide the {} heads", self.num_key_value_heads, heads)
        })?;
        if let Some(window) = &self.sliding_window {
            check_size(window.tokens, "sliding_window", MAX_LENGTH)?;
        }
        require(self.head_dim.is_multiple_of(2), "head_dim", || {
            format!("is {}, but must be even: the rotary embedding rotates pairs", self.head_dim)
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
