//! `[model]`.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use moonlight_convert::hub;
use moonlight_model::{ConfigError, ModelConfig, QuantBits};
use serde::Serialize;
use serde_json::{Map, Value};

use super::RecipeError;
use super::run::path;
use super::section::Section;
use crate::checkpoint::Checkpoints;
use crate::hints::checkpoint_hint;
use crate::tokenizer::Tokenizer;

/// The keys of `config.json` that shape a model of the family.
const SHAPE_KEYS: &[&str] = &[
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "first_k_dense_replace",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "kv_lora_rank",
    "kv_norm_eps",
    "max_position_embeddings",
    "model_type",
    "moe_intermediate_size",
    "moe_layer_freq",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "rms_norm_eps",
    "rope_interleave",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "routed_scaling_factor",
    "scoring_func",
    "tie_word_embeddings",
    "topk_group",
    "topk_method",
    "v_head_dim",
    "vocab_size",
];

/// The dtypes that weights can have while they are trained.
const DTYPES: &[&str] = &["auto", "f32", "bf16", "f16"];

/// Where the model comes from.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelSource {
    /// `path`: weights and their `config.json`, in a folder; a run's folder is resolved to its newest checkpoint, `org/name` of the Hub's cache is resolved to its snapshot.
    Path(PathBuf),
    /// A shape, to be initialised from scratch; a `preset` is resolved to its shape when the recipe is read.
    #[serde(untagged)]
    Shape(Map<String, Value>),
}

/// The bits of frozen weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantise {
    /// As many as the dtype has.
    None,
    /// 8.
    Int8,
    /// 4.
    Int4,
}

impl Quantise {
    /// What the model is told; `None` for weights in full.
    pub fn bits(self) -> Option<QuantBits> {
        match self {
            Self::None => None,
            Self::Int8 => Some(QuantBits::Eight),
            Self::Int4 => Some(QuantBits::Four),
        }
    }
}

impl FromStr for Quantise {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "none" => Ok(Self::None),
            "int8" => Ok(Self::Int8),
            "int4" => Ok(Self::Int4),
            _ => Err(()),
        }
    }
}

/// `[model]`: where the model comes from.
#[derive(Debug, Clone, Serialize)]
pub struct ModelRecipe {
    /// `dtype`: `auto` (f32 on the CPU, elsewhere as stored), `f32`, `bf16` or `f16`. Default: `auto`.
    pub dtype: String,
    /// `quantise`: `none`, `int8` or `int4`, the bits of the frozen projections beside which `[lora]` trains; embedding, head,
    /// norms and routers stay in `dtype`. Default: `none`.
    pub quantise: Quantise,
    /// `path`, or `preset` with any key of `config.json` laid over it, or those keys alone.
    #[serde(flatten)]
    pub source: ModelSource,
    /// Where the recipe says so.
    #[serde(skip)]
    place: String,
}

impl PartialEq for ModelRecipe {
    /// Where it was written makes no difference.
    fn eq(&self, other: &Self) -> bool {
        self.dtype == other.dtype && self.quantise == other.quantise && self.source == other.source
    }
}

impl ModelRecipe {
    pub(super) fn read(section: &mut Section<'_>, folder: Option<&Path>) -> Self {
        let dtype = section.string("dtype").unwrap_or_else(|| "auto".into());
        section.require("dtype", DTYPES.contains(&dtype.as_str()), || {
            format!("is `{dtype}`; it must be one of: {}", DTYPES.join(", "))
        });
        let quantise = section.choice("quantise", &["none", "int8", "int4"]).unwrap_or(Quantise::None);
        let has_path = section.has("path");
        let weights = weights(section);
        let preset = section.string("preset");
        let written = section.rest(SHAPE_KEYS);
        let place = section.place(if has_path { "path" } else { "" });
        if has_path {
            if let Some(key) = written.keys().next() {
                section.invalid(key, "cannot change the shape of the weights at `model.path`", None);
            }
            section.require("preset", preset.is_none(), || "and `model.path` exclude each other".into());
            let recipe = Self { dtype, quantise, source: ModelSource::Path(weights), place };
            if let Err(error) = recipe.config(0) {
                section.problem(error);
            }
            return recipe;
        }
        let mut shape = match &preset {
            None => Map::new(),
            Some(name) => preset_shape(name, folder).unwrap_or_else(|problem| {
                section.invalid("preset", problem, None);
                Map::new()
            }),
        };
        if preset.is_none() && written.is_empty() {
            section.missing("path", "`path` of weights to start from, `preset`, or the keys of a config.json");
            return Self { dtype, quantise, source: ModelSource::Shape(shape), place };
        }
        shape.extend(written.into_iter().map(|(key, value)| (key, to_json(value))));
        shape.entry("model_type").or_insert_with(|| "deepseek_v3".into());
        let mut recipe = Self { dtype, quantise, source: ModelSource::Shape(shape), place };
        match recipe.config(0) {
            Ok(config) => recipe.spell_out(&config),
            Err(error) => section.problem(error),
        }
        recipe
    }

    /// The model's configuration: the shape's own `vocab_size`, or else the tokenizer's, `vocab_size` (0 for unknown).
    ///
    /// # Errors
    ///
    /// [`RecipeError`] for a shape that is not one, for a folder without a `config.json`, and for a model whose
    /// vocabulary is smaller than the tokenizer's.
    pub fn config(&self, vocab_size: usize) -> Result<ModelConfig, RecipeError> {
        let model = |source: ConfigError| RecipeError::Model { place: self.place.clone(), source };
        let config = match &self.source {
            ModelSource::Path(folder) => {
                let file = folder.join("config.json");
                let text = std::fs::read_to_string(&file).map_err(|error| RecipeError::Invalid {
                    place: self.place.clone(),
                    key: "model.path".into(),
                    problem: format!("is `{}`, but `{}` cannot be read: {error}", folder.display(), file.display()),
                    hint: Some("it must be a folder with config.json and safetensors files".into()),
                })?;
                ModelConfig::from_json(&text).map_err(model)?
            }
            ModelSource::Shape(shape) => {
                let mut shape = shape.clone();
                // Any vocabulary will do to look at the rest of the shape.
                let unknown = if vocab_size == 0 { u32::MAX as usize } else { vocab_size };
                shape.entry("vocab_size").or_insert_with(|| unknown.into());
                ModelConfig::from_value(Value::Object(shape)).map_err(model)?
            }
        };
        if config.vocab_size < vocab_size {
            return Err(model(ConfigError::Invalid {
                field: "vocab_size",
                problem: format!("is {}, but the tokenizer has {vocab_size} tokens", config.vocab_size),
            }));
        }
        Ok(config)
    }

    /// The configuration of a model that speaks the tokenizer's tokens: [`config`](ModelRecipe::config), with the
    /// tokenizer's first and last token where a shape names none.
    ///
    /// # Errors
    ///
    /// As [`config`](ModelRecipe::config); and a shape without `vocab_size` where there is no tokenizer.
    pub fn config_for(&self, tokenizer: Option<&Tokenizer>) -> Result<ModelConfig, RecipeError> {
        let vocab_size = tokenizer.map_or(0, Tokenizer::vocab_size);
        if let ModelSource::Shape(shape) = &self.source {
            if vocab_size == 0 && !shape.contains_key("vocab_size") {
                let source = ConfigError::Missing { field: "vocab_size" };
                return Err(RecipeError::Model { place: self.place.clone(), source });
            }
            let mut config = self.config(vocab_size)?;
            if let Some(tokenizer) = tokenizer {
                config.bos_token_id = config.bos_token_id.or(tokenizer.bos());
                if config.eos_token_id.is_empty() {
                    config.eos_token_id.extend(tokenizer.eos());
                }
            }
            return Ok(config);
        }
        self.config(vocab_size)
    }

    /// The longest sequence that the model was made for, where the shape can be read.
    pub(super) fn max_position_embeddings(&self) -> Option<usize> {
        self.config(0).ok().map(|config| config.max_position_embeddings)
    }

    /// Replaces the shape by what it means, every default of `config.json` spelled out.
    fn spell_out(&mut self, config: &ModelConfig) {
        let ModelSource::Shape(shape) = &mut self.source else { return };
        let vocab_size = shape.get("vocab_size").cloned();
        let Value::Object(meaning) = config.to_value() else { return };
        *shape = meaning
            .into_iter()
            .filter(|(key, value)| SHAPE_KEYS.contains(&key.as_str()) && !value.is_null() && key != "vocab_size")
            .collect();
        if let Some(vocab_size) = vocab_size {
            shape.insert("vocab_size".into(), vocab_size);
        }
    }
}

/// `path`: a folder, the folder of a run, whose newest checkpoint is taken, or a model in the Hub's cache, whose snapshot
/// is what the run is made from and names.
fn weights(section: &mut Section<'_>) -> PathBuf {
    let written = path(section, "path", "");
    if !written.as_os_str().is_empty() && !written.join("config.json").exists() {
        let run = Checkpoints::new(written.join("checkpoints"), 0, false, Vec::new(), None);
        if let Some(newest) = run.newest() {
            return newest;
        }
    }
    hub::resolve(&written).unwrap_or_else(|error| {
        section.invalid("path", format!("is wrong: {error}"), checkpoint_hint(&error).as_deref());
        written
    })
}

/// The shape that a preset names: one of the model crate's, or a TOML or JSON file of `config.json`'s keys.
fn preset_shape(name: &str, folder: Option<&Path>) -> Result<Map<String, Value>, String> {
    let is_toml = name.ends_with(".toml");
    if !is_toml && !name.ends_with(".json") {
        let config = ModelConfig::preset(name).map_err(|error| format!("is unknown: {error}"))?;
        let Value::Object(mut shape) = config.to_value() else { return Ok(Map::new()) };
        // Which tokens begin and end a text is the tokenizer's to say.
        let ids = ["bos_token_id", "eos_token_id"];
        shape.retain(|key, value| {
            SHAPE_KEYS.contains(&key.as_str()) && !ids.contains(&key.as_str()) && !value.is_null()
        });
        return Ok(shape);
    }
    let beside = folder.map(|folder| folder.join(name)).filter(|path| path.exists());
    let file = beside.unwrap_or_else(|| PathBuf::from(name));
    let text =
        std::fs::read_to_string(&file).map_err(|error| format!("`{}` cannot be read: {error}", file.display()))?;
    let value = if is_toml {
        to_json(toml::Value::Table(toml::from_str(&text).map_err(|error| format!("`{name}`: {}", error.message()))?))
    } else {
        serde_json::from_str(&text).map_err(|error| format!("`{name}`: {error}"))?
    };
    let Value::Object(mut shape) = value else { return Err(format!("`{name}` does not hold a table")) };
    if let Some(key) = shape.keys().find(|key| is_toml && !SHAPE_KEYS.contains(&key.as_str())) {
        return Err(format!("`{name}` has the unknown key `{key}`"));
    }
    shape.retain(|key, value| SHAPE_KEYS.contains(&key.as_str()) && !value.is_null());
    Ok(shape)
}

/// TOML as JSON; TOML's dates, which no shape has, become strings.
fn to_json(value: toml::Value) -> Value {
    match value {
        toml::Value::String(text) => text.into(),
        toml::Value::Integer(number) => number.into(),
        toml::Value::Float(number) => number.into(),
        toml::Value::Boolean(flag) => flag.into(),
        toml::Value::Datetime(date) => date.to_string().into(),
        toml::Value::Array(items) => items.into_iter().map(to_json).collect(),
        toml::Value::Table(table) => table.into_iter().map(|(key, value)| (key, to_json(value))).collect(),
    }
}
