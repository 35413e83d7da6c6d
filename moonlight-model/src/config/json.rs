//! Reads and writes `config.json`, as it was published and as transformers 5 writes it.

use serde_json::{Map, Value, json};

use super::class_defaults::fill_class_defaults;
use super::error::ConfigError;
use super::keys::Keys;
use super::model_type::ModelType;
use super::other_keys::{self, is_unsupported, truncate};
use super::rope::RopeConfig;
use super::{AttentionShape, ModelConfig, MoeShape};

impl ModelConfig {
    /// Reads a `config.json` and checks it.
    ///
    /// Both spellings are read: `rope_theta` and `rope_scaling`, or `rope_parameters`; `torch_dtype` or `dtype`; one
    /// `eos_token_id` or a list. In a `kimi_vl` or `kimi_k25` file, `text_config` is read; the keys outside it are about images,
    /// except a few that transformers accepts on both levels. Keys that do not change the computation are kept in
    /// [`extra`](ModelConfig::extra) and written by [`to_json`](ModelConfig::to_json).
    ///
    /// A key that the file lacks gets the default of the model class in transformers ([`fill_class_defaults`]).
    ///
    /// All other keys are refused: a key that changes the computation in a way that is not supported, unless its value turns it
    /// off ([`ConfigError::Unsupported`]), and an unknown key ([`ConfigError::Unknown`]).
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the key.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let mut value: Value = serde_json::from_str(text).map_err(|error| ConfigError::Json(error.to_string()))?;
        if let Value::Object(map) = &mut value {
            fill_class_defaults(map);
        }
        Self::from_value(value)
    }

    /// [`from_json`](ModelConfig::from_json) for a JSON value that is not a published file, such as the `[model]` section of a
    /// recipe. Absent keys have this crate's defaults instead of the model class's: one group of experts, no shared expert,
    /// no dense layer at the start, `routed_scaling_factor` 1.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the key.
    pub fn from_value(value: Value) -> Result<Self, ConfigError> {
        let Value::Object(mut map) = value else {
            return Err(ConfigError::Json("not a JSON object".into()));
        };
        if let Some(text) = map.remove("text_config") {
            // Kimi-VL and Kimi-K2.5 nest the language model's config next to that of the vision tower. Some of its keys may be
            // outside. As in transformers, a text model without `model_type` is a DeepSeek-V3.
            let Value::Object(mut text) = text else {
                return Err(ConfigError::Json("`text_config` is not an object".into()));
            };
            check_wrapper(&map, &text)?;
            for key in WRAPPER_KEYS {
                let Some(value) = map.remove(*key).filter(|value| !value.is_null()) else { continue };
                // The wrapper's `tie_word_embeddings` wins, because the head belongs to the wrapper in transformers.
                if *key == "tie_word_embeddings" || text.get(*key).is_none_or(Value::is_null) {
                    text.insert((*key).into(), value);
                }
            }
            text.entry("model_type").or_insert_with(|| json!("deepseek_v3"));
            return Self::from_value(Value::Object(text));
        }
        let config = read(Keys { map })?;
        config.validate()?;
        other_keys::check(&config)?;
        Ok(config)
    }

    /// The text of a `config.json` as published files spell it, indented, with a final newline.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(&self.to_value()).expect("a map of plain values is always JSON");
        text.push('\n');
        text
    }

    /// [`to_json`](ModelConfig::to_json) as a JSON object with sorted keys.
    pub fn to_value(&self) -> Value {
        let mut map = self.extra.clone();
        write(self, &mut map);
        map.sort_keys();
        Value::Object(map)
    }
}

/// Keys about the text model that a wrapper may have outside `text_config`.
const WRAPPER_KEYS: &[&str] = &[
    "bos_token_id",
    "compression_config",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
];

/// Refuses unknown wrappers, and keys outside `text_config` that contradict those inside, because either could be meant.
fn check_wrapper(outside: &Map<String, Value>, text: &Map<String, Value>) -> Result<(), ConfigError> {
    let name = outside.get("model_type").and_then(Value::as_str).unwrap_or_default();
    if !WRAPPER_TYPES.contains(&name) {
        return Err(ConfigError::Unsupported {
            key: "text_config".into(),
            problem: format!(
                "is in a model of the type `{}`, but only `kimi_vl` and `kimi_k25` have one",
                truncate(name)
            ),
            hint: Some("if the checkpoint is a language model only, replace `text_config` by its keys"),
        });
    }
    let shapes = shape_keys();
    let is_shape = |key: &str| {
        key != "model_type"
            && !WRAPPER_KEYS.contains(&key)
            && (shapes.contains(&key) || key == "original_max_position_embeddings")
    };
    let differs = |value: &Value, inner: Option<&Value>| match inner {
        Some(inner) if inner.is_number() && value.is_number() => inner.as_f64() != value.as_f64(),
        inner => inner != Some(value),
    };
    let other = outside.iter().find(|(key, value)| {
        !value.is_null() && (is_shape(key) || is_unsupported(key, value)) && differs(value, text.get(key.as_str()))
    });
    match other {
        None => Ok(()),
        Some((key, _)) => Err(ConfigError::Unsupported {
            key: key.clone(),
            problem: "is outside `text_config` with a value that is not the one inside".into(),
            hint: Some("move the key into `text_config`, or remove it"),
        }),
    }
}

/// The values of `model_type` that have a `text_config`.
const WRAPPER_TYPES: [&str; 2] = ["kimi_k25", "kimi_vl"];

/// The keys of `config.json` for the model as a whole. Each part lists its own keys.
const KEYS: &[&str] = &[
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "tie_word_embeddings",
    "vocab_size",
];

/// All keys of `config.json` that shape a model, sorted. Recipes accept these keys in `[model]`.
pub fn shape_keys() -> Vec<&'static str> {
    let mut keys = [KEYS, RopeConfig::KEYS, MoeShape::KEYS].concat();
    keys.extend(AttentionShape::keys());
    keys.sort_unstable();
    keys.dedup();
    keys
}

fn read(mut keys: Keys) -> Result<ModelConfig, ConfigError> {
    let name = keys.string("model_type")?.ok_or(ConfigError::Missing { field: "model_type" })?;
    let model_type = ModelType::from_name(&name).ok_or(ConfigError::UnknownModelType(name))?;
    if let Some(activation) = keys.string("hidden_act")?
        && !["silu", "swish"].contains(&activation.as_str())
    {
        return Err(ConfigError::Unsupported {
            key: "hidden_act".into(),
            problem: format!("is `{activation}`, but only `silu` is supported"),
            hint: None,
        });
    }
    let hidden_size = keys.size("hidden_size")?;
    let num_attention_heads = keys.size("num_attention_heads")?;
    let max_position_embeddings = keys.size("max_position_embeddings")?;
    let attention = AttentionShape::read(&mut keys, model_type, hidden_size, num_attention_heads)?;
    let rope = RopeConfig::read(&mut keys, attention.interleaves(), max_position_embeddings)?;
    let moe = if model_type.may_have_experts() { MoeShape::read(&mut keys, model_type)? } else { None };
    let llama = model_type == ModelType::Llama;
    let mlp_bias = keys.boolean("mlp_bias")?;
    if let Some(other) = mlp_bias.filter(|bias| !(*bias && llama)) {
        // In other classes the key is put back: `other_keys` ignores false and refuses true.
        keys.map.insert("mlp_bias".into(), json!(other));
    }
    let mlp_bias = llama && mlp_bias == Some(true);
    let dtype = match keys.string("dtype")? {
        Some(dtype) => {
            keys.take("torch_dtype");
            Some(dtype)
        }
        None => keys.string("torch_dtype")?,
    };
    // Keys that `write` derives are not kept in `extra`: they could contradict a config that was changed after reading.
    for (key, derived) in
        [("architectures", json!([model_type.architecture()])), ("num_key_value_heads", json!(num_attention_heads))]
    {
        if keys.map.get(key) == Some(&derived) {
            keys.map.remove(key);
        }
    }
    Ok(ModelConfig {
        model_type,
        vocab_size: keys.size("vocab_size")?,
        hidden_size,
        intermediate_size: keys.size("intermediate_size")?,
        num_hidden_layers: keys.size("num_hidden_layers")?,
        num_attention_heads,
        max_position_embeddings,
        rms_norm_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6),
        initializer_range: keys.number("initializer_range")?.unwrap_or(0.02),
        tie_word_embeddings: keys.boolean("tie_word_embeddings")?.unwrap_or(false),
        mlp_bias,
        attention,
        rope,
        moe,
        bos_token_id: keys.token_ids("bos_token_id")?.first().copied(),
        eos_token_id: keys.token_ids("eos_token_id")?,
        dtype,
        extra: keys.map,
    })
}

fn write(config: &ModelConfig, map: &mut Map<String, Value>) {
    let mut put = |key: &str, value: Value| {
        map.insert(key.to_owned(), value);
    };
    put("model_type", json!(config.model_type.as_str()));
    put("hidden_act", json!("silu"));
    put("vocab_size", json!(config.vocab_size));
    put("hidden_size", json!(config.hidden_size));
    put("intermediate_size", json!(config.intermediate_size));
    put("num_hidden_layers", json!(config.num_hidden_layers));
    put("num_attention_heads", json!(config.num_attention_heads));
    put("max_position_embeddings", json!(config.max_position_embeddings));
    put("rms_norm_eps", json!(config.rms_norm_eps));
    put("initializer_range", json!(config.initializer_range));
    put("tie_word_embeddings", json!(config.tie_word_embeddings));
    if config.mlp_bias {
        put("mlp_bias", json!(true));
    }
    // Another name in the file was kept in `extra`.
    if !config.extra.contains_key("architectures") {
        put("architectures", json!([config.model_type.architecture()]));
    }
    if let Some(bos) = config.bos_token_id {
        put("bos_token_id", json!(bos));
    }
    match config.eos_token_id.as_slice() {
        [] => {}
        [eos] => put("eos_token_id", json!(eos)),
        several => put("eos_token_id", json!(several)),
    }
    if let Some(dtype) = &config.dtype {
        put("torch_dtype", json!(dtype));
    }
    config.attention.write(config.model_type, config.num_attention_heads, map);
    config.rope.write(map, config.attention.interleaves());
    if let Some(moe) = &config.moe {
        moe.write(map);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moonlight() -> Value {
        ModelConfig::preset("moonlight-16b-a3b").unwrap().to_value()
    }

    #[test]
    fn both_spellings_give_the_same_model() {
        let published = moonlight();
        let mut rewritten = published.clone();
        let map = rewritten.as_object_mut().unwrap();
        let theta = map.remove("rope_theta").unwrap();
        map.insert("rope_parameters".into(), json!({"rope_type": "default", "rope_theta": theta}));
        let dtype = map.remove("torch_dtype").unwrap();
        map.insert("dtype".into(), dtype);
        let eos = map.remove("eos_token_id").unwrap();
        map.insert("eos_token_id".into(), json!([eos]));
        assert_eq!(ModelConfig::from_value(published).unwrap(), ModelConfig::from_value(rewritten).unwrap());
    }

    #[test]
    fn writing_then_reading_changes_nothing() {
        for preset in super::super::PRESETS {
            let config = ModelConfig::preset(preset).unwrap();
            assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config, "{preset}");
        }
    }

    #[test]
    fn a_text_model_is_read_from_its_wrapper() {
        let mut text = moonlight();
        let plain = ModelConfig::from_value(text.clone()).unwrap();
        text.as_object_mut().unwrap().remove("model_type");
        let dtype = text.as_object_mut().unwrap().remove("torch_dtype").unwrap();
        let wrapped = json!({"model_type": "kimi_k25", "torch_dtype": dtype, "text_config": text, "vision_config": {}});
        assert_eq!(ModelConfig::from_value(wrapped.clone()).unwrap(), plain);
        let mut quantized = wrapped;
        quantized["quantization_config"] = json!({"quant_method": "fp8"});
        assert_eq!(
            ModelConfig::from_value(quantized.clone()).unwrap().extra["quantization_config"]["quant_method"],
            "fp8"
        );
        quantized["text_config"] = json!(7);
        assert!(ModelConfig::from_value(quantized).unwrap_err().to_string().contains("`text_config` is not an object"));
    }

    #[test]
    fn ignored_keys_are_written_back() {
        let mut value = moonlight();
        value["aux_loss_alpha"] = json!(0.001);
        let config = ModelConfig::from_value(value).unwrap();
        assert_eq!(config.to_value()["aux_loss_alpha"], json!(0.001));
    }

    #[test]
    fn yarn_is_read_in_both_spellings() {
        let scaling = json!({"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
            "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707});
        let mut published = moonlight();
        published["rope_scaling"] = scaling.clone();
        let mut rewritten = moonlight();
        rewritten["rope_parameters"] = scaling;
        rewritten["rope_parameters"]["rope_theta"] = json!(50000.0);
        rewritten.as_object_mut().unwrap().remove("rope_theta");
        let published = ModelConfig::from_value(published).unwrap();
        assert_eq!(published, ModelConfig::from_value(rewritten).unwrap());
        let expected = 192f64.powf(-0.5) * (0.1 * 0.707 * 40f64.ln() + 1.0).powi(2);
        assert!((published.softmax_scale() - expected).abs() < 1e-12);
    }

    /// Recipes read the keys of `[model]` from this list.
    #[test]
    fn every_key_that_is_written_is_in_the_list() {
        let known = shape_keys();
        // These do not shape the model.
        let others = ["architectures", "torch_dtype", "num_nextn_predict_layers"];
        for preset in super::super::PRESETS {
            let Value::Object(map) = ModelConfig::preset(preset).unwrap().to_value() else { unreachable!() };
            for key in map.keys() {
                assert!(known.contains(&key.as_str()) != others.contains(&key.as_str()), "{key}");
            }
        }
        assert_eq!(known.len(), 43);
    }

    #[test]
    fn a_saved_file_is_loaded_and_a_missing_file_is_named() {
        let path = std::env::temp_dir().join(format!("moonlight-config-{}.json", std::process::id()));
        let config = ModelConfig::preset("deepseek-v3").unwrap();
        config.save(&path).unwrap();
        assert_eq!(ModelConfig::load(&path).unwrap(), config);
        std::fs::remove_file(&path).unwrap();
        let error = ModelConfig::load(&path).unwrap_err().to_string();
        assert!(error.contains("moonlight-config") && error.contains("cannot be read"), "{error}");
    }

    #[test]
    fn errors_name_the_key() {
        let mut missing = moonlight();
        missing.as_object_mut().unwrap().remove("kv_lora_rank");
        assert_eq!(ModelConfig::from_value(missing).unwrap_err().to_string(), "the model config lacks `kv_lora_rank`");
        let mut wrong = moonlight();
        wrong["hidden_size"] = json!("wide");
        assert_eq!(
            ModelConfig::from_value(wrong).unwrap_err().to_string(),
            "the model config's `hidden_size` must be a whole number, not \"wide\""
        );
        let mut unknown = moonlight();
        unknown["model_type"] = json!("gpt2");
        assert!(ModelConfig::from_value(unknown).unwrap_err().to_string().contains("gpt2"));
    }
}
