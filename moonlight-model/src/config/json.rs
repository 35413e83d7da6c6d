//! `config.json`, in the spelling that was published and in the one that transformers 5 writes.

use serde_json::{Map, Value, json};

use super::{
    AttentionShape, ConfigError, GqaShape, MlaShape, ModelConfig, ModelType, MoeShape, RopeConfig, Scoring, TopkMethod,
    YarnConfig,
};

/// transformers' default of `rope_theta` for every class of the family.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;
/// What transformers builds the latent norms with, whatever `rms_norm_eps` says.
const DEFAULT_LATENT_NORM_EPS: f64 = 1e-6;

impl ModelConfig {
    /// Reads a `config.json` and checks it.
    ///
    /// Both spellings are understood: `rope_theta` and `rope_scaling`, or `rope_parameters`; `torch_dtype` or `dtype`;
    /// one `eos_token_id` or a list. A `kimi_vl` or `kimi_k25` file gives its `text_config`. Keys that do not shape the model are
    /// kept in [`extra`](ModelConfig::extra) and written back by [`to_json`](ModelConfig::to_json).
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the key.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let value: Value = serde_json::from_str(text).map_err(|error| ConfigError::Json(error.to_string()))?;
        Self::from_value(value)
    }

    /// Like [`from_json`](ModelConfig::from_json), from a JSON value.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the key.
    pub fn from_value(value: Value) -> Result<Self, ConfigError> {
        let Value::Object(mut map) = value else {
            return Err(ConfigError::Json("it is not a JSON object".into()));
        };
        if let Some(text) = map.remove("text_config") {
            // Kimi-VL and Kimi-K2.5 wrap the language model's configuration beside the vision tower's. How the weights are
            // kept may be said on the outside, and transformers reads a text model without a type as a DeepSeek-V3.
            let Value::Object(mut text) = text else {
                return Err(ConfigError::Json("its `text_config` is not an object".into()));
            };
            for key in ["quantization_config", "torch_dtype", "dtype"] {
                if let Some(value) = map.remove(key)
                    && !text.contains_key(key)
                {
                    text.insert(key.into(), value);
                }
            }
            text.entry("model_type").or_insert_with(|| json!("deepseek_v3"));
            return Self::from_value(Value::Object(text));
        }
        let config = read(Keys { map })?;
        config.validate()?;
        Ok(config)
    }

    /// Writes the published spelling, pretty-printed, with a final newline.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(&self.to_value()).expect("a map of plain values is always JSON");
        text.push('\n');
        text
    }

    /// The published spelling as a JSON object with sorted keys.
    pub fn to_value(&self) -> Value {
        let mut map = self.extra.clone();
        write(self, &mut map);
        map.sort_keys();
        Value::Object(map)
    }
}

/// The keys of the file that have not been read yet.
struct Keys {
    map: Map<String, Value>,
}

impl Keys {
    /// The value of a key, `None` where it is absent or null.
    fn take(&mut self, field: &'static str) -> Option<Value> {
        self.map.remove(field).filter(|value| !value.is_null())
    }

    fn optional<T>(
        &mut self,
        field: &'static str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        self.take(field)
            .map(|value| {
                read(&value)
                    .ok_or_else(|| ConfigError::Invalid { field, problem: format!("must be {expected}, not {value}") })
            })
            .transpose()
    }

    fn optional_size(&mut self, field: &'static str) -> Result<Option<usize>, ConfigError> {
        self.optional(field, "a whole number", |value| value.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    fn size(&mut self, field: &'static str) -> Result<usize, ConfigError> {
        self.optional_size(field)?.ok_or(ConfigError::Missing { field })
    }

    fn number(&mut self, field: &'static str) -> Result<Option<f64>, ConfigError> {
        self.optional(field, "a number", Value::as_f64)
    }

    fn boolean(&mut self, field: &'static str) -> Result<Option<bool>, ConfigError> {
        self.optional(field, "true or false", Value::as_bool)
    }

    fn string(&mut self, field: &'static str) -> Result<Option<String>, ConfigError> {
        self.optional(field, "a string", |value| value.as_str().map(str::to_owned))
    }

    fn token_ids(&mut self, field: &'static str) -> Result<Vec<u32>, ConfigError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = self.optional(field, "a token id or a list of them", |value| match value {
            Value::Array(ids) => ids.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }
}

fn read(mut keys: Keys) -> Result<ModelConfig, ConfigError> {
    let model_type = match keys.string("model_type")?.ok_or(ConfigError::Missing { field: "model_type" })?.as_str() {
        "deepseek_v3" => ModelType::DeepseekV3,
        "deepseek_v2" => ModelType::DeepseekV2,
        "kimi_k2" => ModelType::KimiK2,
        "llama" => ModelType::Llama,
        "qwen2" => ModelType::Qwen2,
        other => return Err(ConfigError::UnknownModelType(other.to_owned())),
    };
    let deepseek = matches!(model_type, ModelType::DeepseekV3 | ModelType::DeepseekV2 | ModelType::KimiK2);
    if let Some(activation) = keys.string("hidden_act")?
        && activation != "silu"
    {
        return Err(ConfigError::Invalid {
            field: "hidden_act",
            problem: format!("is `{activation}`; the family has `silu`"),
        });
    }
    let hidden_size = keys.size("hidden_size")?;
    let num_attention_heads = keys.size("num_attention_heads")?;
    let max_position_embeddings = keys.size("max_position_embeddings")?;
    let attention = if deepseek {
        AttentionShape::Mla(read_mla(&mut keys)?)
    } else {
        AttentionShape::Gqa(read_gqa(&mut keys, model_type, hidden_size, num_attention_heads)?)
    };
    let rope = read_rope(&mut keys, deepseek)?;
    let moe = if deepseek { read_moe(&mut keys, model_type)? } else { None };
    let dtype = match keys.string("dtype")? {
        Some(dtype) => {
            keys.take("torch_dtype");
            Some(dtype)
        }
        None => keys.string("torch_dtype")?,
    };
    // What `write` derives from other keys is not kept twice.
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
        attention,
        rope,
        moe,
        bos_token_id: keys.token_ids("bos_token_id")?.first().copied(),
        eos_token_id: keys.token_ids("eos_token_id")?,
        dtype,
        extra: keys.map,
    })
}

fn read_mla(keys: &mut Keys) -> Result<MlaShape, ConfigError> {
    Ok(MlaShape {
        q_lora_rank: keys.optional_size("q_lora_rank")?,
        kv_lora_rank: keys.size("kv_lora_rank")?,
        qk_nope_head_dim: keys.size("qk_nope_head_dim")?,
        qk_rope_head_dim: keys.size("qk_rope_head_dim")?,
        v_head_dim: keys.size("v_head_dim")?,
        latent_norm_eps: keys.number("kv_norm_eps")?.unwrap_or(DEFAULT_LATENT_NORM_EPS),
        attention_bias: keys.boolean("attention_bias")?.unwrap_or(false),
    })
}

fn read_gqa(
    keys: &mut Keys,
    model_type: ModelType,
    hidden_size: usize,
    num_attention_heads: usize,
) -> Result<GqaShape, ConfigError> {
    let bias = keys.boolean("attention_bias")?.unwrap_or(false);
    Ok(GqaShape {
        num_key_value_heads: keys.optional_size("num_key_value_heads")?.unwrap_or(num_attention_heads),
        head_dim: match keys.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if num_attention_heads > 0 => hidden_size / num_attention_heads,
            None => 0,
        },
        qkv_bias: model_type == ModelType::Qwen2 || bias,
        o_bias: model_type == ModelType::Llama && bias,
    })
}

/// Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (as published).
fn read_rope(keys: &mut Keys, deepseek: bool) -> Result<RopeConfig, ConfigError> {
    const FIELD: &str = "rope_parameters";
    let object = |field: &'static str, value: Value| match value {
        Value::Object(map) => Ok(Keys { map }),
        other => Err(ConfigError::Invalid { field, problem: format!("must be an object, not {other}") }),
    };
    let interleave = keys.boolean("rope_interleave")?.unwrap_or(deepseek);
    let theta = keys.number("rope_theta")?;
    let mut parameters = match (keys.take(FIELD), keys.take("rope_scaling")) {
        (Some(parameters), _) => object(FIELD, parameters)?,
        (None, Some(scaling)) => object("rope_scaling", scaling)?,
        (None, None) => Keys { map: Map::new() },
    };
    let theta = parameters.number("rope_theta")?.or(theta).unwrap_or(DEFAULT_ROPE_THETA);
    let kind = match parameters.string("rope_type")? {
        Some(kind) => Some(kind),
        None => parameters.string("type")?,
    };
    let yarn = match kind.as_deref() {
        None | Some("default") => None,
        Some("yarn") => Some(read_yarn(&mut parameters)?),
        Some(other) => {
            return Err(ConfigError::Invalid {
                field: "rope_scaling",
                problem: format!("has the type `{other}`; known are `default` and `yarn`"),
            });
        }
    };
    Ok(RopeConfig { theta, interleave, yarn })
}

fn read_yarn(keys: &mut Keys) -> Result<YarnConfig, ConfigError> {
    Ok(YarnConfig {
        factor: keys.number("factor")?.ok_or(ConfigError::Missing { field: "rope_scaling.factor" })?,
        original_max_position_embeddings: keys
            .optional_size("original_max_position_embeddings")?
            .ok_or(ConfigError::Missing { field: "rope_scaling.original_max_position_embeddings" })?,
        beta_fast: keys.number("beta_fast")?.unwrap_or(32.0),
        beta_slow: keys.number("beta_slow")?.unwrap_or(1.0),
        mscale: keys.number("mscale")?,
        mscale_all_dim: keys.number("mscale_all_dim")?,
        attention_factor: keys.number("attention_factor")?,
        truncate: keys.boolean("truncate")?.unwrap_or(true),
    })
}

fn read_moe(keys: &mut Keys, model_type: ModelType) -> Result<Option<MoeShape>, ConfigError> {
    // DeepSeek-V2's own class reads an absent `n_routed_experts` as "dense"; the family's files always have it.
    let Some(n_routed_experts) = keys.optional_size("n_routed_experts")? else {
        return Ok(None);
    };
    let v2 = model_type == ModelType::DeepseekV2;
    let scoring = match keys.string("scoring_func")?.as_deref() {
        None if v2 => Scoring::Softmax,
        None | Some("sigmoid") => Scoring::Sigmoid,
        Some("softmax") => Scoring::Softmax,
        Some(other) => {
            return Err(ConfigError::Invalid {
                field: "scoring_func",
                problem: format!("is `{other}`; known are `sigmoid` and `softmax`"),
            });
        }
    };
    let topk_method = match keys.string("topk_method")?.as_deref() {
        None if v2 => TopkMethod::Greedy,
        None | Some("noaux_tc") => TopkMethod::NoauxTc,
        Some("greedy" | "gready") => TopkMethod::Greedy, // the second as V2-Lite's remote code spells it
        Some("group_limited_greedy") => TopkMethod::GroupLimitedGreedy,
        Some(other) => {
            return Err(ConfigError::Invalid {
                field: "topk_method",
                problem: format!("is `{other}`; known are `noaux_tc`, `greedy` and `group_limited_greedy`"),
            });
        }
    };
    Ok(Some(MoeShape {
        n_routed_experts,
        num_experts_per_tok: keys.size("num_experts_per_tok")?,
        moe_intermediate_size: keys.size("moe_intermediate_size")?,
        n_shared_experts: keys.optional_size("n_shared_experts")?.unwrap_or(0),
        first_k_dense_replace: keys.optional_size("first_k_dense_replace")?.unwrap_or(0),
        moe_layer_freq: keys.optional_size("moe_layer_freq")?.unwrap_or(1),
        n_group: keys.optional_size("n_group")?.unwrap_or(1),
        topk_group: keys.optional_size("topk_group")?.unwrap_or(1),
        scoring,
        topk_method,
        norm_topk_prob: keys.boolean("norm_topk_prob")?.unwrap_or(!v2),
        routed_scaling_factor: keys.number("routed_scaling_factor")?.unwrap_or(1.0),
    }))
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
    match &config.attention {
        AttentionShape::Mla(mla) => {
            put("q_lora_rank", json!(mla.q_lora_rank));
            put("kv_lora_rank", json!(mla.kv_lora_rank));
            put("qk_nope_head_dim", json!(mla.qk_nope_head_dim));
            put("qk_rope_head_dim", json!(mla.qk_rope_head_dim));
            put("v_head_dim", json!(mla.v_head_dim));
            put("attention_bias", json!(mla.attention_bias));
            if mla.latent_norm_eps != DEFAULT_LATENT_NORM_EPS {
                put("kv_norm_eps", json!(mla.latent_norm_eps));
            }
            if !config.extra.contains_key("num_key_value_heads") {
                put("num_key_value_heads", json!(config.num_attention_heads));
            }
        }
        AttentionShape::Gqa(gqa) => {
            put("num_key_value_heads", json!(gqa.num_key_value_heads));
            put("head_dim", json!(gqa.head_dim));
            if config.model_type == ModelType::Llama {
                put("attention_bias", json!(gqa.o_bias));
            }
        }
    }
    put("rope_theta", json!(config.rope.theta));
    if config.rope.interleave != matches!(config.attention, AttentionShape::Mla(_)) {
        put("rope_interleave", json!(config.rope.interleave));
    }
    if let Some(yarn) = &config.rope.yarn {
        put("rope_scaling", write_yarn(yarn));
    }
    if let Some(moe) = &config.moe {
        put("n_routed_experts", json!(moe.n_routed_experts));
        put("num_experts_per_tok", json!(moe.num_experts_per_tok));
        put("moe_intermediate_size", json!(moe.moe_intermediate_size));
        put("n_shared_experts", json!(moe.n_shared_experts));
        put("first_k_dense_replace", json!(moe.first_k_dense_replace));
        put("moe_layer_freq", json!(moe.moe_layer_freq));
        put("n_group", json!(moe.n_group));
        put("topk_group", json!(moe.topk_group));
        put("scoring_func", json!(moe.scoring.as_str()));
        put("topk_method", json!(moe.topk_method.as_str()));
        put("norm_topk_prob", json!(moe.norm_topk_prob));
        put("routed_scaling_factor", json!(moe.routed_scaling_factor));
    }
}

fn write_yarn(yarn: &YarnConfig) -> Value {
    // `type` for the remote code and older releases, `rope_type` for newer ones.
    let mut map = json!({
        "type": "yarn",
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    });
    for (key, value) in
        [("mscale", yarn.mscale), ("mscale_all_dim", yarn.mscale_all_dim), ("attention_factor", yarn.attention_factor)]
    {
        if let Some(value) = value {
            map[key] = json!(value);
        }
    }
    if !yarn.truncate {
        map["truncate"] = json!(false);
    }
    map
}

impl ModelType {
    /// The spelling in `config.json`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::DeepseekV3 => "deepseek_v3",
            Self::DeepseekV2 => "deepseek_v2",
            Self::KimiK2 => "kimi_k2",
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
        }
    }

    /// The class name that transformers and vLLM look up.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::DeepseekV3 | Self::KimiK2 => "DeepseekV3ForCausalLM",
            Self::DeepseekV2 => "DeepseekV2ForCausalLM",
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
        }
    }
}

impl Scoring {
    fn as_str(self) -> &'static str {
        match self {
            Self::Sigmoid => "sigmoid",
            Self::Softmax => "softmax",
        }
    }
}

impl TopkMethod {
    fn as_str(self) -> &'static str {
        match self {
            Self::NoauxTc => "noaux_tc",
            Self::Greedy => "greedy",
            Self::GroupLimitedGreedy => "group_limited_greedy",
        }
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
    fn a_text_model_is_taken_out_of_its_wrapping() {
        let mut text = moonlight();
        let plain = ModelConfig::from_value(text.clone()).unwrap();
        text.as_object_mut().unwrap().remove("model_type");
        let dtype = text.as_object_mut().unwrap().remove("torch_dtype").unwrap();
        let wrapped = json!({"model_type": "kimi_k25", "torch_dtype": dtype, "text_config": text, "vision_config": {}});
        assert_eq!(ModelConfig::from_value(wrapped.clone()).unwrap(), plain);
        let mut quantised = wrapped;
        quantised["quantization_config"] = json!({"quant_method": "fp8"});
        assert_eq!(
            ModelConfig::from_value(quantised.clone()).unwrap().extra["quantization_config"]["quant_method"],
            "fp8"
        );
        quantised["text_config"] = json!(7);
        assert!(ModelConfig::from_value(quantised).unwrap_err().to_string().contains("`text_config` is not an object"));
    }

    #[test]
    fn unknown_keys_survive() {
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

    #[test]
    fn errors_name_the_key() {
        let mut missing = moonlight();
        missing.as_object_mut().unwrap().remove("kv_lora_rank");
        assert_eq!(
            ModelConfig::from_value(missing).unwrap_err().to_string(),
            "the model configuration lacks `kv_lora_rank`"
        );
        let mut wrong = moonlight();
        wrong["hidden_size"] = json!("wide");
        assert_eq!(
            ModelConfig::from_value(wrong).unwrap_err().to_string(),
            "the model configuration's `hidden_size` must be a whole number, not \"wide\""
        );
        let mut unknown = moonlight();
        unknown["model_type"] = json!("gpt2");
        assert!(ModelConfig::from_value(unknown).unwrap_err().to_string().contains("gpt2"));
    }
}
