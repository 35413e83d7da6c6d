//! Grouped-query attention's part of the configuration.

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
    /// Layers that see a part of the context (Qwen2).
    #[cfg_attr(feature = "schema", schemars(skip))]
    pub sliding_window: Option<SlidingWindow>,
}

/// Layers whose tokens see the last tokens alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlidingWindow {
    /// How many tokens a token sees, itself among them.
    pub tokens: usize,
    /// Which layers have the window.
    pub layers: WindowLayers,
}

/// Which layers have a sliding window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum WindowLayers {
    /// This one and all after it (`max_window_layers`).
    From(usize),
    /// Those that are true, layer by layer (`layer_types`).
    Listed(Vec<bool>),
}

impl SlidingWindow {
    /// The keys that say it.
    const KEYS: [&str; 4] = ["layer_types", "max_window_layers", "sliding_window", "use_sliding_window"];

    /// Whether layer `layer` has the window.
    pub fn is_in_layer(&self, layer: usize) -> bool {
        match &self.layers {
            WindowLayers::From(first) => layer >= *first,
            WindowLayers::Listed(layers) => layers.get(layer).copied().unwrap_or(false),
        }
    }

    /// By transformers' rule (`Qwen2Config`): the layers of `layer_types` that are `sliding_attention`, or those from
    /// `max_window_layers` on, where `use_sliding_window` is true. The keys stay in `map`, for a file to have them again.
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
                problem: "has layers of `sliding_attention`, and no `sliding_window` is in use".into(),
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
    /// The keys of `config.json` that it is read from.
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
            sliding_window: match model_type {
                ModelType::Qwen2 => SlidingWindow::read(&keys.map)?,
                _ => None,
            },
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
        // What the file said stands there already, unless the window is another one now.
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
