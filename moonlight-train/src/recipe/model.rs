//! `[model]`.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use moonlight_convert::{Checkpoint, LoadQuantization, gguf};
use moonlight_infer::tokenizer::Tokenizer;
use moonlight_infer::{ModelDir, resolve_model};
use moonlight_model::config::{AttentionShape, MoeShape, RopeConfig, fill_class_defaults, ignore_reason, shape_keys};
use moonlight_model::kernels::F32Matmul;
use moonlight_model::{ConfigError, ModelConfig, QuantBits};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};

use super::check::Check;
use super::reader::read_flattened;
use super::run::optional_path;
use super::schema::merged;
use super::{RecipeError, TokenizerName};
use crate::hints::checkpoint_hint;

/// `[model]`: weights at a `path`, or a shape whose weights are initialized.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ModelRecipe {
    /// The dtype of the weights during training.
    pub dtype: ModelDtype,
    /// How the frozen weights of a LoRA run are quantized.
    pub quantize: Quantize,
    /// How a GPU multiplies f32 matrices.
    #[serde(skip_serializing_if = "is_default")]
    pub matmul: MatmulDtype,
    /// The folder of the weights to start from, with their `config.json`; `None` for a shape.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// The name of a shape; `None` once the recipe is resolved, when `shape` has all its keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// Keys of `config.json`: the shape, or what differs from the preset.
    #[serde(flatten)]
    pub shape: Map<String, Value>,
    /// The place in the recipe that errors about the model refer to.
    #[serde(skip)]
    place: String,
    /// A lock on the folder at `path`: if it is a checkpoint of another run, that run does not remove it.
    #[serde(skip)]
    held: Option<ModelDir>,
}

/// The keys of `[model]` in addition to those of `config.json`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
struct Keys {
    /// The dtype of the weights during training. `--dtype` overrides it.
    dtype: ModelDtype,
    /// How the frozen projections of a LoRA run are quantized, to need less memory; embedding, head, norms and routers stay in
    /// `dtype`. Needs `[lora]`.
    quantize: Quantize,
    /// How a GPU with tensor cores (CUDA) multiplies f32 matrices: rounded to TF32, or in f32. The router, norms, and the loss
    /// are in f32 in either case. No effect on other devices and on bf16 and f16.
    matmul: MatmulDtype,
    /// Weights to start from: a folder with `config.json` and safetensors files, the folder of a run (its newest checkpoint),
    /// or `org/name` in the Hub's cache. Excludes the keys of `config.json`.
    #[serde(deserialize_with = "optional_path")]
    path: Option<PathBuf>,
    /// A shape whose weights are initialized: a name such as `moonlight-16b-a3b`, or a file relative to the recipe, which is TOML or
    /// JSON with keys of `config.json`, or another recipe. Keys of `config.json` in this section override those of the preset;
    /// without a preset they are the shape. With `path`, the shape that `moonlight plan` assumes while the weights are absent.
    preset: Option<String>,
}

/// The dtype of weights during training.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ModelDtype {
    /// f32 on the CPU, and the dtype of the files on a GPU.
    #[default]
    Auto,
    /// 32-bit floating point.
    F32,
    /// bfloat16, 16 bits: the range of f32 with 8 significant bits. Half the memory of f32.
    Bf16,
    /// IEEE half precision, 16 bits: 11 significant bits, but a range of 6e-8 to 65504.
    F16,
}

impl ModelDtype {
    /// The name, as `--dtype` takes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

/// In what a GPU multiplies f32 matrices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MatmulDtype {
    /// TF32 on tensor cores: factors of 11 significant bits, sums in f32.
    #[default]
    Tf32,
    /// f32, several times slower.
    F32,
}

impl MatmulDtype {
    /// The setting as the model's kernels take it.
    pub fn setting(self) -> F32Matmul {
        match self {
            Self::Tf32 => F32Matmul::Tf32,
            Self::F32 => F32Matmul::F32,
        }
    }
}

/// Old checkpoints do not have the key, and resume as with the default.
fn is_default(matmul: &MatmulDtype) -> bool {
    *matmul == MatmulDtype::default()
}

/// How frozen weights are quantized.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Quantize {
    /// Not at all; weights that are stored quantized are dequantized.
    #[default]
    None,
    /// To 8-bit integers with a scale for each block, about half of bf16's memory.
    Int8,
    /// To 4-bit integers with a scale for each block, about a quarter of bf16's memory.
    Int4,
}

impl Quantize {
    /// How the weights are loaded. Those that are stored in this form already are taken as they are.
    pub fn on_load(self) -> LoadQuantization {
        self.bits().map_or(LoadQuantization::Dequantize, LoadQuantization::To)
    }

    /// The setting as the model takes it; `None` for weights that are not quantized.
    pub fn bits(self) -> Option<QuantBits> {
        match self {
            Self::None => None,
            Self::Int8 => Some(QuantBits::Eight),
            Self::Int4 => Some(QuantBits::Four),
        }
    }
}

impl<'de> Deserialize<'de> for ModelRecipe {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (Keys { dtype, quantize, matmul, path, preset }, shape) = read_flattened(deserializer)?;
        Ok(Self { dtype, quantize, matmul, path, preset, shape, place: String::new(), held: None })
    }
}

impl JsonSchema for ModelRecipe {
    fn schema_name() -> Cow<'static, str> {
        "ModelRecipe".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let keys = shape_keys();
        let others: Map<String, Value> = keys
            .iter()
            .map(|&key| (key.to_owned(), json!({"description": "As in a published `config.json`."})))
            .collect();
        let mut shape = merged(
            "",
            [
                ModelConfig::json_schema(generator),
                AttentionShape::json_schema(generator),
                RopeConfig::json_schema(generator),
                MoeShape::json_schema(generator),
                json_schema!({"properties": others}),
            ],
        );
        if let Some(properties) = shape.get_mut("properties").and_then(Value::as_object_mut) {
            properties.retain(|key, _| keys.contains(&key.as_str()));
        }
        merged(
            "The model: the `path` of weights to start from, a `preset`, or a shape by the keys of `config.json`.",
            [Keys::json_schema(generator), shape],
        )
    }
}

impl PartialEq for ModelRecipe {
    /// Compares the values, and neither their place in the recipe nor the lock.
    fn eq(&self, other: &Self) -> bool {
        let parts =
            |it: &Self| (it.dtype, it.quantize, it.matmul, it.path.clone(), it.preset.clone(), it.shape.clone());
        parts(self) == parts(other)
    }
}

impl ModelRecipe {
    pub(super) fn check(&self, frozen: bool, check: &mut Check<'_>) {
        if self.path.is_some() {
            if let Some(key) = self.shape.keys().next() {
                let problem = "cannot change the shape of the weights at `model.path`";
                check.invalid(&format!("model.{key}"), problem, None);
            }
        } else if self.preset.is_none() && self.shape.is_empty() {
            check.missing("model.path", "write the `path` of weights, a `preset`, or the keys of a `config.json`");
        }
        if !frozen && self.quantize != Quantize::None {
            let problem = "is for frozen weights, but without `[lora]` the weights are trained";
            let hint = "add a `[lora]` section, or train in `dtype = \"bf16\"`";
            check.invalid("model.quantize", problem, Some(hint.into()));
        }
    }

    /// Finds the weights at `path`, or completes the shape with the defaults of `config.json`. A preset that is a file is
    /// searched in `folder` first. Returns the model's config; its vocabulary is a placeholder if the shape has none.
    pub(super) fn resolve(&mut self, folder: Option<&Path>, check: &mut Check<'_>) -> Option<ModelConfig> {
        self.place = check.place(if self.path.is_some() { "model.path" } else { "model" });
        if let Some(path) = &mut self.path {
            match resolve_model(&path) {
                Ok(found) => {
                    *path = found.to_path_buf();
                    self.held = Some(found);
                }
                Err(error) => check.invalid("model.path", format!("cannot be used: {error}"), checkpoint_hint(&error)),
            }
        }
        // Next to `path`, the preset is only the shape for `moonlight plan` while the weights are absent.
        if let Some(name) = self.preset.take().filter(|_| self.path.is_none()) {
            match preset_shape(&name, folder) {
                Ok(preset) => {
                    let over = std::mem::replace(&mut self.shape, preset);
                    self.shape.extend(over);
                }
                Err(problem) => {
                    check.invalid("model.preset", problem, None);
                    return None;
                }
            }
        }
        if self.path.is_none() {
            self.shape.entry("model_type").or_insert_with(|| "deepseek_v3".into());
        }
        match self.config(0) {
            Ok(config) => {
                self.spell_out(&config);
                Some(config)
            }
            Err(error) => {
                check.problem(error);
                None
            }
        }
    }

    /// The model's config for a plan, with a sentence on its source unless that is the recipe's own shape or the weights at
    /// `path`. The weights may be absent.
    pub(super) fn resolve_shape(
        &mut self,
        named: Option<&str>,
        folder: Option<&Path>,
        tokenizer: &TokenizerName,
        check: &mut Check<'_>,
    ) -> Option<(ModelConfig, Option<String>)> {
        self.place = check.place(if self.path.is_some() { "model.path" } else { "model" });
        let preset = self.preset.clone().filter(|_| self.path.is_some());
        let found = self.path.as_deref().map(resolve_model);
        let found =
            found.and_then(Result::ok).filter(|dir| dir.join("config.json").exists() || gguf::gguf_file(dir).is_some());
        if let (None, Some(dir)) = (named, found) {
            // Weights that exist determine the shape, whatever preset is named next to them.
            self.path = Some(dir.to_path_buf());
            let config = self.config(0).map_err(|error| check.problem(error)).ok()?;
            return Some((config, None));
        }
        match (named, self.path.take(), preset) {
            (Some(name), path, _) => {
                self.path = path;
                match named_config(name) {
                    Ok(config) => Some((config, Some(format!("the shape of the model is that of `{name}`")))),
                    Err(problem) => {
                        let place = "--model-config".into();
                        check.problem(RecipeError::Invalid { place, key: name.into(), problem, hint: None });
                        None
                    }
                }
            }
            (None, Some(path), Some(preset)) => {
                // As for a model to initialize, except for the dtype: weights have one, a shape does not.
                let config = self.own_shape(folder, tokenizer, check);
                self.shape = Map::new();
                let dtype = ModelConfig::preset(&preset).ok().and_then(|config| config.dtype);
                let absent = format!("`{}` does not exist; the shape is that of the preset `{preset}`", path.display());
                self.path = Some(path);
                config.map(|config| (ModelConfig { dtype: dtype.or(config.dtype), ..config }, Some(absent)))
            }
            (None, Some(path), None) => {
                let hint = "name the shape as `model.preset` or with `--model-config`: a preset, or a config.json";
                check.invalid(
                    "model.path",
                    format!("is `{}`, which does not exist", path.display()),
                    Some(hint.into()),
                );
                None
            }
            (None, None, _) => self.own_shape(folder, tokenizer, check).map(|config| (config, None)),
        }
    }

    /// The shape by the recipe's own keys, with the vocabulary of the tokenizer if it has no `vocab_size`.
    fn own_shape(
        &mut self,
        folder: Option<&Path>,
        tokenizer: &TokenizerName,
        check: &mut Check<'_>,
    ) -> Option<ModelConfig> {
        self.resolve(folder, check)?;
        let vocab_size = match self.shape.contains_key("vocab_size") {
            true => 0,
            false => match tokenizer.open() {
                Ok(tokenizer) => tokenizer.as_ref().map_or(0, Tokenizer::vocab_size),
                Err(error) => {
                    let hint = "set `model.vocab_size`; then no tokenizer is needed";
                    check.invalid("data.tokenizer", format!("cannot be opened: {error}"), Some(hint.into()));
                    return None;
                }
            },
        };
        if vocab_size == 0 && !self.shape.contains_key("vocab_size") {
            let source = ConfigError::Missing { field: "vocab_size" };
            check.problem(RecipeError::Model { place: self.place.clone(), source });
            return None;
        }
        self.config(vocab_size).map_err(|error| check.problem(error)).ok()
    }

    /// The model's config, with the shape's `vocab_size` or else the tokenizer's, `vocab_size` (0 if that is unknown).
    ///
    /// # Errors
    ///
    /// [`RecipeError`] for an invalid shape, for a folder without a `config.json`, and for a model whose vocabulary is smaller
    /// than the tokenizer's.
    pub fn config(&self, vocab_size: usize) -> Result<ModelConfig, RecipeError> {
        let model = |source: ConfigError| RecipeError::Model { place: self.place.clone(), source };
        let config = match &self.path {
            Some(folder) if gguf::gguf_file(folder).is_some() => match Checkpoint::open(folder) {
                Ok(checkpoint) => checkpoint.config().clone(),
                Err(error) => {
                    return Err(RecipeError::Invalid {
                        place: self.place.clone(),
                        key: "model.path".into(),
                        problem: format!("cannot be opened: {error}"),
                        hint: error.hint(),
                    });
                }
            },
            Some(folder) => {
                let file = folder.join("config.json");
                let text = std::fs::read_to_string(&file).map_err(|error| RecipeError::Invalid {
                    place: self.place.clone(),
                    key: "model.path".into(),
                    problem: format!("is `{}`, but `{}` cannot be read: {error}", folder.display(), file.display()),
                    hint: Some("name a folder with `config.json` and safetensors files".into()),
                })?;
                let config = ModelConfig::from_json(&text).map_err(model)?;
                // Whether the head is tied depends on the weight files too: they may lack the head. Errors in them are
                // reported when they are loaded.
                let opened = config.tie_word_embeddings.then(|| Checkpoint::open(folder).ok()).flatten();
                opened.map_or(config, |checkpoint| checkpoint.config().clone())
            }
            None => {
                let mut shape = self.shape.clone();
                // While the vocabulary is unknown, a placeholder stands in, so that the rest of the shape is checked. The largest
                // u32 is never smaller than a tokenizer's vocabulary.
                let placeholder = if vocab_size == 0 { u32::MAX as usize } else { vocab_size };
                shape.entry("vocab_size").or_insert_with(|| placeholder.into());
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

    /// The config of a model for the tokenizer: [`config`](ModelRecipe::config), with the tokenizer's BOS and EOS if the shape
    /// has none.
    ///
    /// # Errors
    ///
    /// As [`config`](ModelRecipe::config), and for a shape without `vocab_size` if there is no tokenizer.
    pub fn config_for(&self, tokenizer: Option<&Tokenizer>) -> Result<ModelConfig, RecipeError> {
        let vocab_size = tokenizer.map_or(0, Tokenizer::vocab_size);
        if self.path.is_some() {
            return self.config(vocab_size);
        }
        if vocab_size == 0 && !self.shape.contains_key("vocab_size") {
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
        Ok(config)
    }

    /// Replaces the shape by that of `config`, in which every default of `config.json` is written out.
    fn spell_out(&mut self, config: &ModelConfig) {
        if self.path.is_some() {
            return;
        }
        let vocab_size = self.shape.remove("vocab_size");
        self.shape = shape_of(config, &["vocab_size"]);
        self.shape.extend(vocab_size.map(|size| ("vocab_size".to_owned(), size)));
    }
}

/// The keys of `config.json` that shape a model, except those in `without`.
fn shape_of(config: &ModelConfig, without: &[&str]) -> Map<String, Value> {
    let Value::Object(mut shape) = config.to_value() else { return Map::new() };
    let keys = shape_keys();
    shape.retain(|key, value| keys.contains(&key.as_str()) && !without.contains(&key.as_str()) && !value.is_null());
    shape
}

/// The config that `name` refers to: a preset, a `config.json`, a TOML file of its keys, or a model's directory. Only the
/// `config.json` of a directory is read.
///
/// # Errors
///
/// The rest of a sentence that starts with the name.
pub fn named_config(name: &str) -> Result<ModelConfig, String> {
    let dir = resolve_model(name).map(ModelDir::into_path).unwrap_or_else(|_| name.into());
    let file = dir.join("config.json");
    let file = if file.is_file() { file } else { PathBuf::from(name) };
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("json") => {
            let text = std::fs::read_to_string(&file).map_err(|error| format!("cannot be read: {error}"))?;
            ModelConfig::from_json(&text).map_err(|error| format!("is not a model config: {error}"))
        }
        Some("toml") => {
            let mut shape = preset_shape(&file.to_string_lossy(), None)?;
            shape.entry("model_type").or_insert_with(|| "deepseek_v3".into());
            ModelConfig::from_value(Value::Object(shape)).map_err(|error| format!("is not a model config: {error}"))
        }
        _ if dir.is_dir() => Err("is a directory without `config.json`".into()),
        _ => ModelConfig::preset(name).map_err(|error| format!("is unknown: {error}")),
    }
}

/// The shape of a preset: one of the model crate's, or a TOML or JSON file with keys of `config.json`.
fn preset_shape(name: &str, folder: Option<&Path>) -> Result<Map<String, Value>, String> {
    let is_toml = name.ends_with(".toml");
    if !is_toml && !name.ends_with(".json") {
        let config = ModelConfig::preset(name).map_err(|error| format!("is unknown: {error}"))?;
        // BOS and EOS are those of the tokenizer that the data use.
        return Ok(shape_of(&config, &["bos_token_id", "eos_token_id"]));
    }
    let next_to_recipe = folder.map(|folder| folder.join(name)).filter(|path| path.exists());
    let file = next_to_recipe.unwrap_or_else(|| PathBuf::from(name));
    let text =
        std::fs::read_to_string(&file).map_err(|error| format!("`{}` cannot be read: {error}", file.display()))?;
    let mut shape: Map<String, Value> = if is_toml {
        toml::from_str(&text).map_err(|error| format!("`{name}`: {}", error.message()))?
    } else {
        serde_json::from_str(&text).map_err(|error| format!("`{name}`: {error}"))?
    };
    // A recipe as preset: its `[model]` is the shape.
    if is_toml && let Some(Value::Object(model)) = shape.remove("model") {
        let other = ["path", "preset", "dtype", "quantize", "matmul"];
        shape = model.into_iter().filter(|(key, _)| !other.contains(&key.as_str())).collect();
        if shape.is_empty() {
            return Err(format!("`{name}` is a recipe whose `[model]` has no shape of its own"));
        }
    }
    let keys = shape_keys();
    if let Some(key) = shape.keys().find(|key| is_toml && !keys.contains(&key.as_str())) {
        return Err(format!("`{name}` has the unknown key `{key}`"));
    }
    if !is_toml {
        // A JSON file is a model's `config.json`, in which absent keys have the defaults of its class in transformers.
        fill_class_defaults(&mut shape);
    }
    if shape.contains_key("text_config") {
        let config = ModelConfig::from_value(Value::Object(shape)).map_err(|error| format!("`{name}`: {error}"))?;
        return Ok(shape_of(&config, &[]));
    }
    // Unknown keys are kept, so that `ModelConfig` refuses them. `architectures` follows from `model_type`.
    shape.retain(|key, value| key != "architectures" && ignore_reason(key).is_none() && !value.is_null());
    Ok(shape)
}
