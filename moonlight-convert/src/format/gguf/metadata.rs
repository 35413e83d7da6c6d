//! The keys of the metadata that describe a model, in both directions.
//!
//! `config.json` has more than GGUF's keys can express: how groups of experts are ranked, the epsilon of the latent norms, the
//! name of the model class. What reading the standard keys would not restore is written as JSON under [`OWN`], which other
//! programs ignore. Standard keys win where they exist: only keys of `config.json` that they do not restore are in it.
//!
//! Differences between this project's model and llama.cpp that no key expresses:
//!
//! * llama.cpp uses `rms_norm_eps` for the norms of latents, too. transformers uses 1e-6 there; Moonlight has 1e-5 elsewhere. Without
//!   effect unless latents are tiny, and noted only where an epsilon is above 1e-5.
//! * llama.cpp ranks groups of experts by their two best experts, as DeepSeek-V3 does; DeepSeek-V2 ranks by the best. Noted.

use moonlight_model::ModelConfig;
use moonlight_model::config::{
    AttentionShape, Llama3Config, ModelType, MoeShape, RopeScaling, ScoringFunc, TopkMethod, YarnConfig,
};
use serde_json::{Map, Value as Json, json};

use super::block::BlockType;
use super::header::TensorInfo;
use super::names::{self, Architecture};
use super::value::{Metadata, Value};

/// The key for what the standard keys do not express.
pub(super) const OWN: &str = "moonlight.config";
/// Below this, an epsilon has no effect on a norm of values of usual size.
const SMALL_EPSILON: f64 = 1e-5;
/// Keys of `config.json` that are not compared: they are restored from elsewhere, or describe the files.
const NOT_COMPARED: [&str; 7] =
    ["architectures", "bos_token_id", "dtype", "eos_token_id", "quantization_config", "torch_dtype", "vocab_size"];

/// What a file says about itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct General {
    /// `general.name`.
    pub(crate) name: Option<String>,
    /// `general.license`: an identifier such as `mit`.
    pub(crate) license: Option<String>,
}

/// Adds the keys that describe the model. To be called last: the keys of the tokenizer are read, too.
///
/// # Errors
///
/// A sentence about what GGUF cannot express.
pub(crate) fn add(
    metadata: &mut Metadata,
    config: &ModelConfig,
    general: &General,
    file_type: BlockType,
) -> Result<(), String> {
    let architecture = Architecture::of(config.model_type);
    metadata.insert("general.architecture", architecture.as_str());
    metadata.insert("general.type", "model");
    if let Some(name) = &general.name {
        metadata.insert("general.name", name.as_str());
    }
    metadata.insert("general.size_label", size_label(config));
    if let Some(license) = &general.license {
        metadata.insert("general.license", license.as_str());
    }
    metadata.insert("general.file_type", file_type_code(file_type));
    metadata.insert("general.quantization_version", 2u32);
    let mut keys = Keys { metadata, architecture };
    keys.size("vocab_size", config.vocab_size)?;
    keys.size("context_length", config.max_position_embeddings)?;
    keys.size("embedding_length", config.hidden_size)?;
    keys.size("block_count", config.num_hidden_layers)?;
    keys.size("feed_forward_length", config.intermediate_size)?;
    keys.size("attention.head_count", config.num_attention_heads)?;
    keys.number("attention.layer_norm_rms_epsilon", config.rms_norm_eps);
    match &config.attention {
        AttentionShape::Mla(mla) => {
            // Latent attention runs with one head for keys and values, as wide as a row of the cache.
            keys.size("attention.head_count_kv", 1)?;
            keys.size("attention.key_length", mla.kv_lora_rank + mla.qk_rope_head_dim)?;
            keys.size("attention.value_length", mla.kv_lora_rank)?;
            keys.size("attention.key_length_mla", mla.qk_nope_head_dim + mla.qk_rope_head_dim)?;
            keys.size("attention.value_length_mla", mla.v_head_dim)?;
            keys.size("attention.kv_lora_rank", mla.kv_lora_rank)?;
            // llama.cpp requires the key unless the model has the depth of DeepSeek-V2-Lite; 0 means none.
            keys.size("attention.q_lora_rank", mla.q_lora_rank.unwrap_or(0))?;
        }
        AttentionShape::Gqa(gqa) => {
            keys.size("attention.head_count_kv", gqa.num_key_value_heads)?;
            keys.size("attention.key_length", gqa.head_dim)?;
            keys.size("attention.value_length", gqa.head_dim)?;
            if architecture == Architecture::Qwen2 && gqa.head_dim * config.num_attention_heads != config.hidden_size {
                return Err(format!(
                    "the architecture `qwen2` has heads of `hidden_size / num_attention_heads` values, not of {}",
                    gqa.head_dim
                ));
            }
            let tokens = gqa.sliding_window.as_ref().map(|window| window.tokens);
            if let Some(tokens) = tokens.filter(|tokens| *tokens < config.max_position_embeddings) {
                return Err(format!(
                    "the architecture `{}` has no sliding window, and the model has one of {tokens} tokens",
                    architecture.as_str()
                ));
            }
        }
    }
    keys.size("rope.dimension_count", config.rope_dim())?;
    keys.number("rope.freq_base", config.rope.theta);
    add_scaling(&mut keys, config)?;
    if architecture == Architecture::Deepseek2 {
        add_experts(&mut keys, config)?;
    }
    add_own(metadata, config)
}

/// What llama.cpp computes differently from this project, as sentences for the user.
pub(crate) fn notes(config: &ModelConfig) -> Vec<String> {
    let mut notes = Vec::new();
    if let AttentionShape::Mla(mla) = &config.attention {
        let (latent, all) = (mla.latent_norm_eps, config.rms_norm_eps);
        if latent != all && latent.max(all) > SMALL_EPSILON {
            notes.push(format!(
                "llama.cpp uses `rms_norm_eps` ({all:e}) in the norms of latents, too, where the model has {latent:e}"
            ));
        }
    }
    if let Some(moe) = &config.moe
        && moe.topk_method == TopkMethod::GroupLimitedGreedy
        && groups(moe).0 > 1
    {
        notes.push(
            "llama.cpp ranks groups of experts by their two best experts, this model by the best one: some tokens are routed \
             to other experts there"
                .into(),
        );
    }
    notes
}

/// Writes the keys of an architecture.
struct Keys<'a> {
    metadata: &'a mut Metadata,
    architecture: Architecture,
}

impl Keys<'_> {
    fn put(&mut self, key: &str, value: impl Into<Value>) {
        self.metadata.insert(format!("{}.{key}", self.architecture.as_str()), value);
    }

    fn size(&mut self, key: &str, value: usize) -> Result<(), String> {
        let value = u32::try_from(value).map_err(|_| format!("`{key}` would be {value}, and has 32 bits"))?;
        self.put(key, value);
        Ok(())
    }

    fn number(&mut self, key: &str, value: f64) {
        self.put(key, value as f32);
    }
}

fn add_experts(keys: &mut Keys<'_>, config: &ModelConfig) -> Result<(), String> {
    let layers = config.num_hidden_layers;
    let Some(moe) = &config.moe else {
        // Both are required, and have no effect if all layers are dense.
        keys.size("leading_dense_block_count", layers)?;
        keys.size("expert_feed_forward_length", config.intermediate_size)?;
        return keys.size("expert_shared_count", 0);
    };
    let dense = (0..layers).take_while(|&layer| config.moe_of_layer(layer).is_none()).count();
    if let Some(layer) = (dense..layers).find(|&layer| config.moe_of_layer(layer).is_none()) {
        return Err(format!(
            "the architecture `deepseek2` has dense layers only at the start, and layer {layer} is dense (`moe_layer_freq`)"
        ));
    }
    if moe.n_shared_experts == 0 && dense < layers {
        return Err("the architecture `deepseek2` has shared experts, and the model has none".into());
    }
    keys.size("leading_dense_block_count", dense)?;
    keys.size("expert_feed_forward_length", moe.moe_intermediate_size)?;
    keys.size("expert_count", moe.n_routed_experts)?;
    keys.size("expert_used_count", moe.num_experts_per_tok)?;
    keys.size("expert_shared_count", moe.n_shared_experts)?;
    keys.number("expert_weights_scale", moe.routed_scaling_factor);
    keys.put("expert_weights_norm", moe.norm_topk_prob);
    // Always written: without it llama.cpp takes softmax.
    keys.put(
        "expert_gating_func",
        match moe.scoring {
            ScoringFunc::Softmax => SOFTMAX,
            ScoringFunc::Sigmoid => SIGMOID,
        },
    );
    let (count, used) = groups(moe);
    if count < moe.n_routed_experts {
        keys.size("expert_group_count", count)?;
        keys.size("expert_group_used_count", used)?;
    }
    Ok(())
}

const SOFTMAX: u32 = 1;
const SIGMOID: u32 = 2;

/// The number of groups that limit the choice of experts, and how many of them a token uses. llama.cpp requires fewer.
fn groups(moe: &MoeShape) -> (usize, usize) {
    match moe.topk_method {
        TopkMethod::NoauxTc | TopkMethod::GroupLimitedGreedy if moe.topk_group < moe.n_group => {
            (moe.n_group, moe.topk_group)
        }
        _ => (1, 1),
    }
}

/// YaRN's `mscale(s, m) = 0.1 m ln(s) + 1` for `s > 1`, else 1.
fn mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// The factor of a model on cos and sin, by the precedence of transformers, and that on the attention scores, whose square it is.
fn attention_factors(yarn: &YarnConfig) -> (f64, f64) {
    let all_dim = yarn.mscale_all_dim.filter(|all_dim| *all_dim != 0.0);
    let on_rotation = match (yarn.attention_factor, yarn.mscale.filter(|mscale| *mscale != 0.0), all_dim) {
        (Some(factor), _, _) => factor,
        (None, Some(numerator), Some(all_dim)) => mscale(yarn.factor, numerator) / mscale(yarn.factor, all_dim),
        _ => mscale(yarn.factor, 1.0),
    };
    (on_rotation, all_dim.map_or(1.0, |all_dim| mscale(yarn.factor, all_dim)))
}

/// Writes the scaling of the rotary embedding.
///
/// In `deepseek2`, llama.cpp multiplies cos and sin by `attn_factor` `a`, and attention scores by the square of
/// `a (1 + 0.1 m ln(factor))`, where `m` is ten times `yarn_log_multiplier` (a quirk of its converter that its loader undoes), and with a
/// linear scaling by `(1 + 0.1 ln(factor))^2` in addition. Solved for both, this expresses every YaRN scaling.
fn add_scaling(keys: &mut Keys<'_>, config: &ModelConfig) -> Result<(), String> {
    let latent = keys.architecture == Architecture::Deepseek2;
    let log_multiplier = |factor: f64, on_scores: f64| {
        // At exactly 0 llama.cpp takes another formula.
        let multiplier = (on_scores - 1.0) / (0.1 * factor.ln());
        0.1 * if multiplier.abs() < 1e-9 { 1e-9 } else { multiplier }
    };
    match &config.rope.scaling {
        // Dynamic scaling has no effect up to `max_position_embeddings`; the factors of Llama 3.1 are a tensor.
        None | Some(RopeScaling::Dynamic { .. } | RopeScaling::Llama3(_)) => {}
        Some(RopeScaling::Linear { factor }) => {
            keys.put("rope.scaling.type", "linear");
            keys.number("rope.scaling.factor", *factor);
            if latent && *factor != 1.0 {
                let undone = 1.0 / (1.0 + 0.1 * factor.ln());
                keys.number("rope.scaling.yarn_log_multiplier", log_multiplier(*factor, undone));
            }
        }
        Some(RopeScaling::Yarn(yarn)) => {
            if !yarn.truncate {
                return Err(
                    "llama.cpp rounds the ends of YaRN's ramp, and the model does not (`truncate` is false)".into()
                );
            }
            keys.put("rope.scaling.type", "yarn");
            keys.number("rope.scaling.factor", yarn.factor);
            keys.size("rope.scaling.original_context_length", yarn.original_max_position_embeddings)?;
            keys.number("rope.scaling.yarn_beta_fast", yarn.beta_fast);
            keys.number("rope.scaling.yarn_beta_slow", yarn.beta_slow);
            let (on_rotation, on_scores) = attention_factors(yarn);
            if latent {
                if yarn.factor > 1.0 {
                    let multiplier = match yarn.mscale_all_dim {
                        // As the model has it, without a rounding error.
                        Some(all_dim) if on_rotation == 1.0 && all_dim != 0.0 => 0.1 * all_dim,
                        _ => log_multiplier(yarn.factor, on_scores / on_rotation),
                    };
                    keys.number("rope.scaling.yarn_log_multiplier", multiplier);
                } else if on_rotation != 1.0 {
                    return Err(
                        "an `attention_factor` has no place in the architecture `deepseek2` with a `factor` of 1"
                            .into(),
                    );
                }
                if on_rotation != 1.0 {
                    keys.number("rope.scaling.attn_factor", on_rotation);
                }
            } else {
                let default = mscale(yarn.factor, 1.0);
                if on_rotation != default {
                    keys.number("rope.scaling.attn_factor", on_rotation / default);
                }
            }
        }
    }
    Ok(())
}

/// Adds what the other keys would not restore.
fn add_own(metadata: &mut Metadata, config: &ModelConfig) -> Result<(), String> {
    // Only the names matter: biases, the correction bias and an untied head follow from the tensors that exist.
    let tensors: Vec<TensorInfo> = names::tensors(config)?
        .into_iter()
        .map(|tensor| TensorInfo {
            name: tensor.name,
            shape: tensor.shape.iter().map(|&size| size as u64).collect(),
            block_type: BlockType::F32,
            offset: 0,
        })
        .collect();
    let factors = match &config.rope.scaling {
        Some(RopeScaling::Llama3(llama)) => Some(names::llama3_factors(config.rope.theta, config.rope_dim(), llama)),
        _ => None,
    };
    let restored = match standard(metadata, &tensors, factors.as_deref()) {
        Ok(Json::Object(map)) => ModelConfig::from_value(Json::Object(map)).map_err(|error| error.to_string()),
        Ok(_) => Err("the metadata is no config".into()),
        Err(problem) => Err(problem),
    };
    // Without the keys that are ignored: they describe other files and programs.
    let plain = ModelConfig { extra: Map::new(), ..config.clone() };
    let Json::Object(mut wanted) = plain.to_value() else { return Ok(()) };
    let restored = match restored {
        Ok(restored) => ModelConfig { extra: Map::new(), ..restored }.to_value(),
        // For example factors that no known Llama has: then all keys are written.
        Err(_) => Json::Object(Map::new()),
    };
    wanted.retain(|key, value| !NOT_COMPARED.contains(&key.as_str()) && restored.get(key) != Some(value));
    // A key that would be restored and that the config does not have.
    for (key, _) in restored.as_object().into_iter().flatten() {
        if !NOT_COMPARED.contains(&key.as_str()) && plain.to_value().get(key).is_none() {
            wanted.insert(key.clone(), Json::Null);
        }
    }
    if !wanted.is_empty() {
        metadata.insert(OWN, Json::Object(wanted).to_string());
    }
    Ok(())
}

/// The config of a file. `rope_factors` are the values of [`names::ROPE_FACTORS`], if the file has that tensor.
///
/// # Errors
///
/// The rest of a sentence that begins with the file's name, about a key that is missing, invalid, or unknown.
pub(crate) fn config(
    metadata: &Metadata,
    tensors: &[TensorInfo],
    rope_factors: Option<&[f32]>,
) -> Result<ModelConfig, String> {
    let own = match metadata.get(OWN) {
        None => Map::new(),
        Some(Value::String(text)) => serde_json::from_str(text)
            .map_err(|error| format!("has invalid metadata: `{OWN}` is not a JSON object: {error}"))?,
        Some(other) => return Err(format!("has invalid metadata: `{OWN}` is of type {}, not string", other.kind())),
    };
    let rope_factors = rope_factors.filter(|_| !own.contains_key("rope_scaling"));
    let Json::Object(mut map) = standard(metadata, tensors, rope_factors)? else {
        return Err("has invalid metadata".into());
    };
    for (key, value) in own {
        if NOT_COMPARED.contains(&key.as_str()) {
            return Err(format!("has invalid metadata: `{OWN}` sets `{key}`, which has a key of its own"));
        }
        match value {
            Json::Null => map.remove(&key),
            value => map.insert(key, value),
        };
    }
    ModelConfig::from_value(Json::Object(map)).map_err(|error| format!("does not describe a supported model: {error}"))
}

/// Reads keys of an architecture, and records which were read.
struct Reader<'a> {
    metadata: &'a Metadata,
    architecture: Architecture,
    read: Vec<String>,
}

impl<'a> Reader<'a> {
    fn get(&mut self, key: &str) -> Option<&'a Value> {
        let key = format!("{}.{key}", self.architecture.as_str());
        let value = self.metadata.get(&key);
        self.read.push(key);
        value
    }

    fn typed<T>(&mut self, key: &str, kind: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, String> {
        let architecture = self.architecture.as_str();
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| {
            format!("has invalid metadata: `{architecture}.{key}` is of type {}, not {kind}", value.kind())
        })
    }

    fn size(&mut self, key: &str) -> Result<Option<u64>, String> {
        self.typed(key, "a non-negative integer", Value::as_u64)
    }

    fn required(&mut self, key: &str) -> Result<u64, String> {
        self.size(key)?.ok_or_else(|| format!("lacks the metadata key `{}.{key}`", self.architecture.as_str()))
    }

    /// The decimal number that a value was rounded from: 1e-5, where the exact value of the f32 is 9.99999974e-6.
    fn number(&mut self, key: &str) -> Result<Option<f64>, String> {
        self.typed(key, "a floating-point number", |value| match value {
            Value::F32(value) => value.to_string().parse().ok(),
            other => other.as_f64(),
        })
    }

    fn boolean(&mut self, key: &str) -> Result<Option<bool>, String> {
        self.typed(key, "a boolean", Value::as_bool)
    }

    fn string(&mut self, key: &str) -> Result<Option<&'a str>, String> {
        let architecture = self.architecture.as_str();
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| {
            format!("has invalid metadata: `{architecture}.{key}` is of type {}, not string", value.kind())
        })
    }

    /// The error for a value that is not supported.
    fn unsupported(&self, key: &str, problem: &str) -> String {
        format!("has the metadata key `{}.{key}`, which {problem}", self.architecture.as_str())
    }

    /// Refuses the keys of the architecture that have not been read: they may change the computation.
    fn finish(self) -> Result<(), String> {
        let prefix = format!("{}.", self.architecture.as_str());
        let unknown = self.metadata.iter().map(|(key, _)| key).find(|key| {
            let Some(rest) = key.strip_prefix(&prefix) else { return false };
            !self.read.iter().any(|read| read == key) && !IGNORED.contains(&rest)
        });
        unknown.map_or(Ok(()), |key| Err(format!("has the metadata key `{key}`, which is not supported")))
    }
}

/// Keys of an architecture without effect on the model.
pub(super) const IGNORED: [&str; 4] =
    ["tensor_data_layout", "rope.scaling.finetuned", "pooling_type", "attention.causal"];

/// The keys of `config.json` that follow from the standard keys and the tensors.
fn standard(metadata: &Metadata, tensors: &[TensorInfo], rope_factors: Option<&[f32]>) -> Result<Json, String> {
    let name = match metadata.get("general.architecture") {
        Some(Value::String(name)) => name,
        Some(other) => {
            return Err(format!(
                "has invalid metadata: `general.architecture` is of type {}, not string",
                other.kind()
            ));
        }
        None => return Err("lacks the metadata key `general.architecture`".into()),
    };
    let Some(architecture) = Architecture::from_name(name) else {
        let known = Architecture::ALL.map(|known| format!("`{}`", known.as_str())).join(", ");
        let name = crate::printable::printable(name);
        return Err(format!("is a model of the architecture `{name}`, which is not supported; {known} are"));
    };
    let find = |name: &str| tensors.iter().find(|tensor| tensor.name == name);
    let mut keys = Reader { metadata, architecture, read: Vec::new() };
    let mut map = Map::new();
    let mut put = |key: &str, value: Json| {
        map.insert(key.to_owned(), value);
    };
    let Some(&[_, vocabulary]) = find("token_embd.weight").map(|tensor| tensor.shape.as_slice()) else {
        return Err("has no tensor `token_embd.weight` with two dimensions".into());
    };
    if let Some(other) = keys.size("vocab_size")?.filter(|size| *size != vocabulary) {
        return Err(format!(
            "has the vocabulary size {other} in its metadata, and {vocabulary} rows in `token_embd.weight`"
        ));
    }
    put("vocab_size", json!(vocabulary));
    let layers = keys.required("block_count")?;
    // llama.cpp counts multi-token-prediction layers, which are the last ones.
    let prediction = keys.size("nextn_predict_layers")?.unwrap_or(0);
    let Some(layers) = layers.checked_sub(prediction) else {
        return Err(keys.unsupported("nextn_predict_layers", "is larger than `block_count`"));
    };
    if prediction > 0 {
        put("num_nextn_predict_layers", json!(prediction));
    }
    put("num_hidden_layers", json!(layers));
    let heads = keys.required("attention.head_count")?;
    let hidden = keys.required("embedding_length")?;
    put("num_attention_heads", json!(heads));
    put("hidden_size", json!(hidden));
    put("max_position_embeddings", json!(keys.required("context_length")?));
    let intermediate = keys.size("feed_forward_length")?;
    let Some(epsilon) = keys.number("attention.layer_norm_rms_epsilon")? else {
        return Err(format!("lacks the metadata key `{name}.attention.layer_norm_rms_epsilon`"));
    };
    put("rms_norm_eps", json!(epsilon));
    put("rope_theta", json!(keys.number("rope.freq_base")?.unwrap_or(10_000.0)));
    put("tie_word_embeddings", json!(find("output.weight").is_none()));
    put("torch_dtype", json!(torch_dtype(metadata)));
    for (theirs, ours) in [("bos", "bos_token_id"), ("eos", "eos_token_id")] {
        if let Some(id) = metadata.u64(&format!("tokenizer.ggml.{theirs}_token_id"))? {
            put(ours, json!(id));
        }
    }
    let rotated = keys.size("rope.dimension_count")?;
    let mut rotated_by_default = None;
    match architecture {
        Architecture::Deepseek2 => {
            read_latent(&mut keys, rotated, &mut put)?;
            read_experts(&mut keys, tensors, intermediate.unwrap_or(0), &mut put)?;
        }
        Architecture::Llama | Architecture::Qwen2 => {
            let head = match keys.size("attention.key_length")? {
                Some(length) => length,
                None => hidden.checked_div(heads).unwrap_or(0),
            };
            let value = keys.size("attention.value_length")?.unwrap_or(head);
            if value != head || rotated.is_some_and(|rotated| rotated != head) {
                return Err(keys.unsupported("attention.key_length", "is not the width of values and of the rotation"));
            }
            rotated_by_default = Some(head);
            put("num_key_value_heads", json!(keys.size("attention.head_count_kv")?.unwrap_or(heads)));
            put("head_dim", json!(head));
            if keys.size("expert_count")?.is_some_and(|experts| experts > 0) {
                return Err(keys.unsupported("expert_count", "is not supported in this architecture"));
            }
            keys.size("expert_used_count")?;
            if architecture == Architecture::Llama {
                put("model_type", json!("llama"));
                let [query, output] =
                    ["attn_q", "attn_output"].map(|name| find(&format!("blk.0.{name}.bias")).is_some());
                if query != output {
                    return Err(
                        "has biases for only some of the projections of attention, which is not supported".into()
                    );
                }
                put("attention_bias", json!(query));
                if find("blk.0.ffn_gate.bias").is_some() {
                    put("mlp_bias", json!(true));
                }
            } else {
                put("model_type", json!("qwen2"));
            }
        }
    }
    put(
        "intermediate_size",
        json!(intermediate.ok_or_else(|| format!("lacks the metadata key `{name}.feed_forward_length`"))?),
    );
    let theta = keys.number("rope.freq_base")?.unwrap_or(10_000.0);
    let scaling = read_scaling(&mut keys)?;
    match (scaling, rope_factors, rotated_by_default) {
        (None, Some(factors), Some(dim)) => put("rope_scaling", llama3(theta, dim as usize, factors)?),
        (Some(_), Some(_), _) => {
            return Err(keys.unsupported("rope.scaling.type", "is set in addition to `rope_freqs.weight`"));
        }
        (Some(scaling), None, _) => put("rope_scaling", scaling),
        _ => {}
    }
    keys.finish()?;
    Ok(Json::Object(map))
}

/// The dtype that the values had, by the label of the file's type.
fn torch_dtype(metadata: &Metadata) -> &'static str {
    match metadata.get("general.file_type").and_then(Value::as_u64) {
        Some(0) => "float32",
        Some(1) => "float16",
        _ => "bfloat16",
    }
}

fn read_latent(keys: &mut Reader<'_>, rotated: Option<u64>, put: &mut impl FnMut(&str, Json)) -> Result<(), String> {
    let rank = keys.required("attention.kv_lora_rank")?;
    let Some(rope) = rotated else {
        return Err(format!("lacks the metadata key `{}.rope.dimension_count`", keys.architecture.as_str()));
    };
    // Files from before April 2025 have the widths of heads under the names of the widths of the cache.
    let absorbed = [keys.size("attention.key_length_mla")?, keys.size("attention.value_length_mla")?];
    let cached = [keys.size("attention.key_length")?, keys.size("attention.value_length")?];
    let kv_heads = keys.size("attention.head_count_kv")?;
    let (key, value) = match (absorbed, cached) {
        ([Some(key), Some(value)], cached) => {
            if cached
                .iter()
                .zip([rank + rope, rank])
                .any(|(found, expected)| found.is_some_and(|found| found != expected))
            {
                return Err(keys.unsupported("attention.key_length", "is not the width of a row of the cache"));
            }
            if kv_heads.is_some_and(|heads| heads != 1) {
                return Err(keys.unsupported("attention.head_count_kv", "is not 1"));
            }
            (key, value)
        }
        ([None, None], [Some(key), Some(value)]) => (key, value),
        _ => {
            return Err(
                keys.unsupported("attention.kv_lora_rank", "needs `attention.key_length_mla` and `value_length_mla`")
            );
        }
    };
    let Some(nope) = key.checked_sub(rope) else {
        return Err(keys.unsupported("rope.dimension_count", "is larger than a head"));
    };
    put("q_lora_rank", json!(keys.size("attention.q_lora_rank")?.filter(|rank| *rank > 0)));
    put("kv_lora_rank", json!(rank));
    put("qk_nope_head_dim", json!(nope));
    put("qk_rope_head_dim", json!(rope));
    put("v_head_dim", json!(value));
    Ok(())
}

fn read_experts(
    keys: &mut Reader<'_>,
    tensors: &[TensorInfo],
    intermediate: u64,
    put: &mut impl FnMut(&str, Json),
) -> Result<(), String> {
    let dense = keys.size("leading_dense_block_count")?.unwrap_or(0);
    let width = keys.size("expert_feed_forward_length")?.unwrap_or(intermediate);
    let shared = keys.size("expert_shared_count")?.unwrap_or(0);
    let (count, used) = (keys.size("expert_count")?.unwrap_or(0), keys.size("expert_used_count")?);
    let scale = keys.number("expert_weights_scale")?.filter(|scale| *scale != 0.0).unwrap_or(1.0);
    let normalized = keys.boolean("expert_weights_norm")?.unwrap_or(false);
    let groups = keys.size("expert_group_count")?.filter(|groups| *groups > 0).unwrap_or(1);
    let groups_used = keys.size("expert_group_used_count")?.filter(|groups| *groups > 0).unwrap_or(1);
    // llama.cpp's default, for files from before the key.
    let scoring = match keys.size("expert_gating_func")? {
        None | Some(0) => SOFTMAX,
        Some(scoring) if scoring == u64::from(SOFTMAX) => SOFTMAX,
        Some(scoring) if scoring == u64::from(SIGMOID) => SIGMOID,
        Some(_) => return Err(keys.unsupported("expert_gating_func", "is neither 1 (softmax) nor 2 (sigmoid)")),
    };
    let class = if count > 0 && scoring == SOFTMAX { ModelType::DeepseekV2 } else { ModelType::DeepseekV3 };
    put("model_type", json!(class.as_str()));
    if count == 0 {
        return Ok(());
    }
    let corrected = tensors.iter().any(|tensor| tensor.name.ends_with(".exp_probs_b.bias"));
    put("first_k_dense_replace", json!(dense));
    put("moe_intermediate_size", json!(width));
    put("n_shared_experts", json!(shared));
    put("n_routed_experts", json!(count));
    put(
        "num_experts_per_tok",
        json!(used.ok_or_else(|| keys.unsupported("expert_count", "needs `expert_used_count`"))?),
    );
    put("routed_scaling_factor", json!(scale));
    put("norm_topk_prob", json!(normalized));
    put("scoring_func", json!(if scoring == SIGMOID { "sigmoid" } else { "softmax" }));
    put("n_group", json!(groups));
    put("topk_group", json!(groups_used));
    let method = match (corrected, groups) {
        (true, _) => "noaux_tc",
        (false, 1) => "greedy",
        (false, _) => "group_limited_greedy",
    };
    put("topk_method", json!(method));
    Ok(())
}

/// Reads what [`add_scaling`] writes.
fn read_scaling(keys: &mut Reader<'_>) -> Result<Option<Json>, String> {
    let kind = keys.string("rope.scaling.type")?;
    let factor = keys.number("rope.scaling.factor")?;
    let context = keys.size("rope.scaling.original_context_length")?;
    let fast = keys.number("rope.scaling.yarn_beta_fast")?;
    let slow = keys.number("rope.scaling.yarn_beta_slow")?;
    let multiplier = keys.number("rope.scaling.yarn_log_multiplier")?;
    let rotation = keys.number("rope.scaling.attn_factor")?;
    let intended = keys.number("rope.scaling.yarn_attn_factor")?.filter(|factor| *factor != 1.0);
    if keys.number("rope.scaling.yarn_ext_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(keys.unsupported("rope.scaling.yarn_ext_factor", "is supported only with the value 1"));
    }
    let latent = keys.architecture == Architecture::Deepseek2;
    // Where llama.cpp finds a factor and no type, it takes the linear one.
    let (kind, factor) = match (kind, factor) {
        (Some("none"), _) | (None | Some("linear"), None | Some(0.0 | 1.0)) => return Ok(None),
        (None | Some("linear"), Some(factor)) => ("linear", factor),
        (Some("yarn"), Some(factor)) if factor > 0.0 => ("yarn", factor),
        _ => return Err(keys.unsupported("rope.scaling.type", "is neither `none`, `linear` nor `yarn` with a factor")),
    };
    if kind == "linear" {
        return Ok(Some(json!({"type": "linear", "factor": factor})));
    }
    let mut scaling = json!({
        "type": "yarn",
        "factor": factor,
        "beta_fast": fast.unwrap_or(32.0),
        "beta_slow": slow.unwrap_or(1.0),
    });
    if let Some(context) = context {
        scaling["original_max_position_embeddings"] = json!(context);
    }
    let default = mscale(factor, 1.0);
    if latent {
        // The decimal number that a tenth was taken of.
        let multiplier = multiplier.map(|multiplier| (multiplier * 1e8).round() / 1e7).filter(|found| *found != 0.0);
        match (multiplier, rotation) {
            (Some(all_dim), None) => {
                scaling["mscale"] = json!(all_dim);
                scaling["mscale_all_dim"] = json!(all_dim);
            }
            (multiplier, rotation) => {
                let without = if multiplier.is_none() { default } else { 1.0 };
                let rotation = rotation.unwrap_or(1.0) * without;
                let scores = rotation * mscale(factor, multiplier.unwrap_or(0.0));
                scaling["attention_factor"] = json!(rotation);
                if factor > 1.0 {
                    scaling["mscale_all_dim"] = json!((scores - 1.0) / (0.1 * factor.ln()));
                }
            }
        }
    } else {
        if multiplier.is_some() {
            return Err(keys.unsupported("rope.scaling.yarn_log_multiplier", "is not supported in this architecture"));
        }
        match (rotation, intended) {
            (Some(rotation), _) => scaling["attention_factor"] = json!(rotation * default),
            (None, Some(intended)) => scaling["attention_factor"] = json!(intended),
            (None, None) => {}
        }
    }
    Ok(Some(scaling))
}

/// The `rope_scaling` of the Llama whose factors these are. A file has no other record of it.
fn llama3(theta: f64, dim: usize, factors: &[f32]) -> Result<Json, String> {
    const CONTEXTS: [usize; 4] = [8192, 4096, 2048, 16_384];
    let largest = factors.iter().copied().fold(1.0f32, f32::max);
    if factors.len() == dim / 2 && largest == 1.0 {
        return Ok(Json::Null);
    }
    for original_max_position_embeddings in CONTEXTS {
        let llama = Llama3Config {
            factor: f64::from(largest),
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings,
        };
        let expected = names::llama3_factors(theta, dim, &llama);
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * b.abs();
        if expected.len() == factors.len() && factors.iter().zip(&expected).all(close) {
            return Ok(json!({
                "rope_type": "llama3",
                "factor": llama.factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original_max_position_embeddings,
            }));
        }
    }
    Err("has frequencies in `rope_freqs.weight` that are not those of Llama 3.1 and its successors".into())
}

/// The label of a file's type, an `enum llama_ftype`.
fn file_type_code(file_type: BlockType) -> u32 {
    match file_type {
        BlockType::F32 => 0,
        BlockType::F16 => 1,
        BlockType::Q4_0 => 2,
        BlockType::Q4_1 => 3,
        BlockType::Q5_1 => 9,
        BlockType::Q8_0 => 7,
        BlockType::Q5_0 => 8,
        BlockType::Q4K => 15, // Q4_K_M
        BlockType::Q5K => 17, // Q5_K_M
        BlockType::Q6K => 18,
        BlockType::Bf16 => 32,
    }
}

/// The size in the name of a file, as llama.cpp's converter spells it: `1.5B`, or `64x1.1B` for 64 experts.
fn size_label(config: &ModelConfig) -> String {
    let mut shared = 0u64;
    let (mut of_experts, mut experts) = (0u64, 0u64);
    for parameter in config.parameter_shapes() {
        match (parameter.kind, parameter.shape.first()) {
            (moonlight_model::config::ParameterKind::Experts, Some(&count)) => {
                experts = count as u64;
                of_experts += parameter.count() / experts;
            }
            _ => shared += parameter.count(),
        }
    }
    let count = (shared + of_experts) as f64;
    let (scaled, unit) = match count {
        _ if count > 1e12 => (count / 1e12, "T"),
        _ if count > 1e9 => (count / 1e9, "B"),
        _ if count > 1e6 => (count / 1e6, "M"),
        _ => (count / 1e3, "K"),
    };
    let digits = usize::from(scaled.round() < 10.0) + usize::from(scaled.round() < 1.0);
    let size = format!("{scaled:.digits$}{unit}");
    if experts > 0 { format!("{experts}x{size}") } else { size }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn infos(config: &ModelConfig) -> Vec<TensorInfo> {
        let info = |tensor: names::GgufTensor| TensorInfo {
            name: tensor.name,
            shape: tensor.shape.iter().map(|&size| size as u64).collect(),
            block_type: BlockType::F32,
            offset: 0,
        };
        names::tensors(config).unwrap().into_iter().map(info).collect()
    }

    fn factors(config: &ModelConfig) -> Option<Vec<f32>> {
        names::tensors(config).unwrap().into_iter().find_map(|tensor| match tensor.values {
            names::Values::RopeFactors(factors) => Some(factors),
            names::Values::Parameter { .. } => None,
        })
    }

    fn written(config: &ModelConfig) -> Metadata {
        let mut metadata = Metadata::default();
        for (key, id) in [("bos", config.bos_token_id), ("eos", config.eos_token_id.first().copied())] {
            if let Some(id) = id {
                metadata.insert(format!("tokenizer.ggml.{key}_token_id"), id);
            }
        }
        add(&mut metadata, config, &General::default(), BlockType::Bf16).unwrap();
        metadata
    }

    /// Without the keys that have no effect.
    fn essential(config: &ModelConfig) -> ModelConfig {
        ModelConfig { extra: Map::new(), dtype: None, ..config.clone() }
    }

    fn restored(config: &ModelConfig, metadata: &Metadata) -> ModelConfig {
        essential(&super::config(metadata, &infos(config), factors(config).as_deref()).unwrap())
    }

    fn configs() -> Vec<(String, ModelConfig)> {
        let presets = ["moonlight-16b-a3b", "deepseek-v3", "deepseek-v2-lite", "muon-report-400m", "bench-small"];
        let presets = presets.into_iter().map(|name| (name.to_owned(), ModelConfig::preset(name).unwrap()));
        let fixtures =
            ["moonlight-like", "deepseek-v3-like", "deepseek-v2-like", "deepseek-v2-lite-like", "llama", "qwen2"];
        let fixtures = fixtures.into_iter().map(|name| {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name).join("config.json");
            let mut config = ModelConfig::load(path).unwrap();
            if let AttentionShape::Mla(mla) = &mut config.attention {
                // `deepseek2` has no biases.
                mla.attention_bias = false;
            }
            (name.to_owned(), config)
        });
        presets.chain(fixtures).collect()
    }

    #[test]
    fn the_config_is_restored() {
        for (name, config) in configs() {
            assert_eq!(restored(&config, &written(&config)), essential(&config), "{name}");
        }
    }

    /// The keys and values of a published GGUF of Moonlight, and the explicit `q_lora_rank`.
    #[test]
    fn the_keys_of_moonlight_are_those_of_the_published_file() {
        let mut text = String::new();
        for (key, value) in written(&ModelConfig::preset("moonlight-16b-a3b").unwrap()).iter() {
            text += &format!("{key} = {value:?}\n");
        }
        insta::assert_snapshot!(text);
    }

    #[test]
    fn standard_keys_alone_restore_published_models() {
        for (name, config) in configs() {
            let mut metadata = written(&config);
            let own = metadata.get(OWN).and_then(Value::as_str).unwrap_or_default().to_owned();
            metadata = metadata.iter().filter(|(key, _)| *key != OWN).map(|(k, v)| (k.to_owned(), v.clone())).collect();
            let restored = restored(&config, &metadata);
            // Equal in what the model computes, up to the rounding of f32 and the spelling of the scaling.
            let (a, b) = (restored.softmax_scale(), config.softmax_scale());
            assert!((a - b).abs() < 1e-6 * b, "{name}: {a} {b} {own}");
            assert_eq!(restored.parameter_shapes(), config.parameter_shapes(), "{name}");
        }
    }

    /// The formulas of llama.cpp's `deepseek2` for its keys give the model's factors.
    #[test]
    fn every_yarn_scaling_is_expressed_for_latent_attention() {
        let cases = [
            (Some(1.0), Some(1.0), None),
            (Some(0.707), Some(0.707), None),
            (Some(1.0), Some(0.7), None),
            (None, None, None),
            (None, Some(1.0), None),
            (None, Some(1.3), Some(1.1)),
            (Some(1.0), None, Some(1.0)),
        ];
        for (numerator, all_dim, attention_factor) in cases {
            let mut config = ModelConfig::preset("deepseek-v3").unwrap();
            let Some(RopeScaling::Yarn(yarn)) = &mut config.rope.scaling else { unreachable!() };
            yarn.factor = 32.0;
            (yarn.mscale, yarn.mscale_all_dim, yarn.attention_factor) = (numerator, all_dim, attention_factor);
            let expected = attention_factors(yarn);
            let metadata = written(&config);
            let get = |key: &str| metadata.get(&format!("deepseek2.rope.scaling.{key}")).and_then(Value::as_f64);
            let log = 32f64.ln();
            let multiplier = get("yarn_log_multiplier").unwrap() / 0.1;
            assert_ne!(multiplier, 0.0, "at 0 another formula holds");
            let attention = get("attn_factor").unwrap_or(1.0);
            assert!((attention - expected.0).abs() < 1e-6);
            assert!((attention * (1.0 + 0.1 * multiplier * log) - expected.1).abs() < 1e-6, "{expected:?}");
            assert_eq!(restored(&config, &metadata), essential(&config));
        }
    }

    #[test]
    fn the_scaling_of_llama_3_is_recognized_by_its_factors() {
        let mut config = ModelConfig::preset("muon-report-400m").unwrap();
        for (factor, low, context) in [(8.0, 1.0, 8192), (32.0, 1.0, 8192), (8.0, 1.5, 5000)] {
            config.rope.scaling = Some(RopeScaling::Llama3(Llama3Config {
                factor,
                low_freq_factor: low,
                high_freq_factor: 4.0,
                original_max_position_embeddings: context,
            }));
            let metadata = written(&config);
            assert_eq!(metadata.get(OWN).is_some(), low != 1.0);
            assert_eq!(restored(&config, &metadata), essential(&config));
        }
    }

    #[test]
    fn what_cannot_be_expressed_is_refused() {
        let refused = |name: &str, change: fn(&mut ModelConfig)| {
            let mut config = ModelConfig::preset(name).unwrap();
            change(&mut config);
            add(&mut Metadata::default(), &config, &General::default(), BlockType::F32).unwrap_err()
        };
        let text = [
            refused("moonlight-16b-a3b", |config| config.moe.as_mut().unwrap().moe_layer_freq = 2),
            refused("moonlight-16b-a3b", |config| config.moe.as_mut().unwrap().n_shared_experts = 0),
            refused("deepseek-v3", |config| {
                let Some(RopeScaling::Yarn(yarn)) = &mut config.rope.scaling else { unreachable!() };
                yarn.truncate = false;
            }),
            refused("deepseek-v3", |config| {
                config.rope.scaling = Some(RopeScaling::Llama3(Llama3Config {
                    factor: 8.0,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_max_position_embeddings: 8192,
                }));
            }),
        ];
        insta::assert_snapshot!(text.join("\n"));
    }

    #[test]
    fn keys_that_are_missing_unknown_or_invalid_are_named() {
        let config = ModelConfig::preset("bench-small").unwrap();
        let refused = |change: &dyn Fn(&mut Metadata)| {
            let mut metadata = written(&config);
            change(&mut metadata);
            super::config(&metadata, &infos(&config), None).unwrap_err()
        };
        let without = |key: &'static str| {
            refused(&move |metadata| {
                let kept = metadata.iter().filter(|(other, _)| *other != key);
                *metadata = kept.map(|(key, value)| (key.to_owned(), value.clone())).collect();
            })
        };
        let text = [
            without("general.architecture"),
            without("deepseek2.block_count"),
            without("deepseek2.rope.dimension_count"),
            refused(&|metadata| metadata.insert("general.architecture", "gemma4")),
            refused(&|metadata| metadata.insert("general.architecture", 7u32)),
            refused(&|metadata| metadata.insert("deepseek2.block_count", "eight")),
            refused(&|metadata| metadata.insert("deepseek2.vocab_size", 7u32)),
            refused(&|metadata| metadata.insert("deepseek2.nextn_predict_layers", 9u32)),
            refused(&|metadata| metadata.insert("deepseek2.attention.head_count", 0u32)),
            refused(&|metadata| metadata.insert("deepseek2.attention.temperature_scale", 0.1f32)),
            refused(&|metadata| metadata.insert("deepseek2.attention.head_count_kv", 8u32)),
            refused(&|metadata| metadata.insert("deepseek2.expert_gating_func", 4u32)),
            refused(&|metadata| metadata.insert("deepseek2.rope.scaling.type", "longrope")),
            refused(&|metadata| metadata.insert("deepseek2.rope.dimension_count", 4096u32)),
            refused(&|metadata| metadata.insert(OWN, "[]")),
            refused(&|metadata| metadata.insert(OWN, "{\"vocab_size\": 1}")),
            refused(&|metadata| metadata.insert(OWN, "{\"num_layers\": 1}")),
        ];
        insta::assert_snapshot!(text.join("\n"));
    }
}
