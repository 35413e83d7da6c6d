//! `[model]`.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use moonlight_convert::Checkpoint;
use moonlight_infer::tokenizer::Tokenizer;
use moonlight_infer::{ModelDir, resolve_model};
use moonlight_model::config::{AttentionShape, MoeShape, RopeConfig, fill_class_defaults, ignore_reason, shape_keys};
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

/// Where the model comes from: the `path` of weights, or a shape to be initialised from scratch.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ModelRecipe {
    /// The dtype of the weights.
    pub dtype: ModelDtype,
    /// The bits of frozen weights.
    pub quantize: Quantize,
    /// The folder of weights to start from, with their `config.json`; `None` for a shape.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// A shape by name; `None` once it is spelled out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// Keys of `config.json`: the shape, or what differs from the preset.
    #[serde(flatten)]
    pub shape: Map<String, Value>,
    /// Where the recipe says so.
    #[serde(skip)]
    place: String,
    /// Keeps the folder at `path` from being removed, where it is a checkpoint of a run.
    #[serde(skip)]
    held: Option<ModelDir>,
}

/// The keys of `[model]` that are not those of `config.json`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
struct Keys {
    /// The dtype of the weights while they are trained.
    dtype: ModelDtype,
    /// The bits of the frozen projections beside which `[lora]` trains; embedding, head, norms and routers stay in `dtype`.
    #[serde(alias = "quantise")]
    quantize: Quantize,
    /// Weights to start from: a folder with their `config.json`, the folder of a run (its newest checkpoint), or `org/name` in the Hub's
    /// cache (its snapshot).
    #[serde(deserialize_with = "optional_path")]
    path: Option<PathBuf>,
    /// A shape by name, or a TOML or JSON file of `config.json`'s keys, or another recipe, relative to the recipe. Any key of
    /// `config.json` may be laid over it; those keys alone are a shape, too. With `path`, the shape that `moonlight plan` assumes while the weights are absent.
    preset: Option<String>,
}

/// The dtype of weights while they are trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ModelDtype {
    /// f32 on the CPU, elsewhere as stored.
    #[default]
    Auto,
    /// 32 bits.
    F32,
    /// 16 bits, of which 8 are significant.
    Bf16,
    /// 16 bits, of which 11 are significant.
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

/// The bits of frozen weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Quantize {
    /// As many as the dtype has.
    #[default]
    None,
    /// 8 bits, with a scale for each block.
    Int8,
    /// 4 bits, with a scale for each block.
    Int4,
}

impl Quantize {
    /// The model's own form of this setting; `None` for weights in full.
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
        let (Keys { dtype, quantize, path, preset }, shape) = read_flattened(deserializer)?;
        Ok(Self { dtype, quantize, path, preset, shape, place: String::new(), held: None })
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
            .map(|&key| (key.to_owned(), json!({"description": "As in the published `config.json`."})))
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
            "Where the model comes from: the `path` of weights, a `preset`, or a shape in the words of `config.json`.",
            [Keys::json_schema(generator), shape],
        )
    }
}

impl PartialEq for ModelRecipe {
    /// Where it was written makes no difference.
    fn eq(&self, other: &Self) -> bool {
        let parts = |it: &Self| (it.dtype, it.quantize, it.path.clone(), it.preset.clone(), it.shape.clone());
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
            check.missing("model.path", "`path` of weights to start from, `preset`, or the keys of a config.json");
        }
        if !frozen && self.quantize != Quantize::None {
            let problem = "is for weights that stand still, and without `[lora]` they are what is trained";
            let hint = "add a `[lora]` section, or train in `dtype = \"bf16\"`";
            check.invalid("model.quantize", problem, Some(hint.into()));
        }
    }

    /// Finds the weights at `path`, or spells out the shape with every default of `config.json`; a preset that is a file is looked for in
    /// `folder` first. The model's configuration, of any vocabulary where neither shape nor weights say one.
    pub(super) fn resolve(&mut self, folder: Option<&Path>, check: &mut Check<'_>) -> Option<ModelConfig> {
        self.place = check.place(if self.path.is_some() { "model.path" } else { "model" });
        if let Some(path) = &mut self.path {
            match resolve_model(&path) {
                Ok(found) => {
                    *path = found.to_path_buf();
                    self.held = Some(found);
                }
                Err(error) => check.invalid("model.path", format!("is wrong: {error}"), checkpoint_hint(&error)),
            }
        }
        // Next to weights a preset only says what to plan with while they are absent.
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

    /// The model's configuration for a plan, and where it is from if that is not the recipe's own shape or the weights at `path`, which
    /// need not be there.
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
        let found = found.and_then(Result::ok).filter(|dir| dir.join("config.json").exists());
        if let (None, Some(dir)) = (named, found) {
            // Weights that are there say themselves what they are.
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
                // As if the model were to be initialized, except for the dtype, which weights have and a shape has not.
                let config = self.own_shape(folder, tokenizer, check);
                self.shape = Map::new();
                let dtype = ModelConfig::preset(&preset).ok().and_then(|config| config.dtype);
                let absent = format!("`{}` is not there; the shape is that of the preset `{preset}`", path.display());
                self.path = Some(path);
                config.map(|config| (ModelConfig { dtype: dtype.or(config.dtype), ..config }, Some(absent)))
            }
            (None, Some(path), None) => {
                let hint = "name the shape as `model.preset` or with `--model-config`: a preset, or a config.json";
                check.invalid("model.path", format!("is `{}`, which is not there", path.display()), Some(hint.into()));
                None
            }
            (None, None, _) => self.own_shape(folder, tokenizer, check).map(|config| (config, None)),
        }
    }

    /// The shape that the recipe itself gives, with the vocabulary of the tokenizer unless it has a `vocab_size`.
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
                    let hint = "set `model.vocab_size`, which no tokenizer is needed for";
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

    /// The model's configuration: the shape's own `vocab_size`, or else the tokenizer's, `vocab_size` (0 for unknown).
    ///
    /// # Errors
    ///
    /// [`RecipeError`] for a shape that is not one, for a folder without a `config.json`, and for a model whose
    /// vocabulary is smaller than the tokenizer's.
    pub fn config(&self, vocab_size: usize) -> Result<ModelConfig, RecipeError> {
        let model = |source: ConfigError| RecipeError::Model { place: self.place.clone(), source };
        let config = match &self.path {
            Some(folder) => {
                let file = folder.join("config.json");
                let text = std::fs::read_to_string(&file).map_err(|error| RecipeError::Invalid {
                    place: self.place.clone(),
                    key: "model.path".into(),
                    problem: format!("is `{}`, but `{}` cannot be read: {error}", folder.display(), file.display()),
                    hint: Some("it must be a folder with config.json and safetensors files".into()),
                })?;
                let config = ModelConfig::from_json(&text).map_err(model)?;
                // Whether a head is tied is also the files' to say; what is wrong with them is said where they are loaded.
                let opened = config.tie_word_embeddings.then(|| Checkpoint::open(folder).ok()).flatten();
                opened.map_or(config, |checkpoint| checkpoint.config().clone())
            }
            None => {
                let mut shape = self.shape.clone();
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

    /// Replaces the shape by what it means, every default of `config.json` spelled out.
    fn spell_out(&mut self, config: &ModelConfig) {
        if self.path.is_some() {
            return;
        }
        let vocab_size = self.shape.remove("vocab_size");
        self.shape = shape_of(config, &["vocab_size"]);
        self.shape.extend(vocab_size.map(|size| ("vocab_size".to_owned(), size)));
    }
}

/// The keys of `config.json` that shape a model, but for some.
fn shape_of(config: &ModelConfig, without: &[&str]) -> Map<String, Value> {
    let Value::Object(mut shape) = config.to_value() else { return Map::new() };
    let keys = shape_keys();
    shape.retain(|key, value| keys.contains(&key.as_str()) && !without.contains(&key.as_str()) && !value.is_null());
    shape
}

/// The configuration that `name` stands for: a preset, a `config.json`, a TOML file of its keys, or a model's directory. Of a
/// directory only the `config.json` is read.
///
/// # Errors
///
/// The rest of a sentence that begins with the name.
pub fn named_config(name: &str) -> Result<ModelConfig, String> {
    let dir = resolve_model(name).map(ModelDir::into_path).unwrap_or_else(|_| name.into());
    let file = dir.join("config.json");
    let file = if file.is_file() { file } else { PathBuf::from(name) };
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("json") => {
            let text = std::fs::read_to_string(&file).map_err(|error| format!("cannot be read: {error}"))?;
            ModelConfig::from_json(&text).map_err(|error| format!("is not a model's configuration: {error}"))
        }
        Some("toml") => {
            let mut shape = preset_shape(&file.to_string_lossy(), None)?;
            shape.entry("model_type").or_insert_with(|| "deepseek_v3".into());
            ModelConfig::from_value(Value::Object(shape))
                .map_err(|error| format!("is not a model's configuration: {error}"))
        }
        _ if dir.is_dir() => Err("is a directory without `config.json`".into()),
        _ => ModelConfig::preset(name).map_err(|error| format!("is unknown: {error}")),
    }
}

/// The shape that a preset names: one of the model crate's, or a TOML or JSON file of `config.json`'s keys.
fn preset_shape(name: &str, folder: Option<&Path>) -> Result<Map<String, Value>, String> {
    let is_toml = name.ends_with(".toml");
    if !is_toml && !name.ends_with(".json") {
        let config = ModelConfig::preset(name).map_err(|error| format!("is unknown: {error}"))?;
        // Which tokens begin and end a text is the tokenizer's to say.
        return Ok(shape_of(&config, &["bos_token_id", "eos_token_id"]));
    }
    let beside = folder.map(|folder| folder.join(name)).filter(|path| path.exists());
    let file = beside.unwrap_or_else(|| PathBuf::from(name));
    let text =
        std::fs::read_to_string(&file).map_err(|error| format!("`{}` cannot be read: {error}", file.display()))?;
    let mut shape: Map<String, Value> = if is_toml {
        toml::from_str(&text).map_err(|error| format!("`{name}`: {}", error.message()))?
    } else {
        serde_json::from_str(&text).map_err(|error| format!("`{name}`: {error}"))?
    };
    // A recipe, whose model is meant.
    if is_toml && let Some(Value::Object(model)) = shape.remove("model") {
        let other = ["path", "preset", "dtype", "quantize"];
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
        // The file is a model's `config.json`.
        fill_class_defaults(&mut shape);
    }
    if shape.contains_key("text_config") {
        let config = ModelConfig::from_value(Value::Object(shape)).map_err(|error| format!("`{name}`: {error}"))?;
        return Ok(shape_of(&config, &[]));
    }
    // Keys that are not known are kept, for the configuration to refuse. The name of the class follows from `model_type`.
    shape.retain(|key, value| key != "architectures" && ignore_reason(key).is_none() && !value.is_null());
    Ok(shape)
}
