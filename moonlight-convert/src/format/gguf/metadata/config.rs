//! From metadata to a config.

use moonlight_model::ModelConfig;
use moonlight_model::config::ModelType;
use serde_json::{Map, Value as Json, json};

use super::scaling::{llama3, read_scaling};
use super::{NOT_COMPARED, OWN, SIGMOID, SOFTMAX};
use crate::format::gguf::header::TensorInfo;
use crate::format::gguf::names::{self, Architecture};
use crate::format::gguf::value::{Metadata, Value};

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
pub(super) struct Reader<'a> {
    pub(super) metadata: &'a Metadata,
    pub(super) architecture: Architecture,
    read: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn get(&mut self, key: &str) -> Option<&'a Value> {
        let key = format!("{}.{key}", self.architecture.as_str());
        let value = self.metadata.get(&key);
        self.read.push(key);
        value
    }

    pub(super) fn typed<T>(
        &mut self,
        key: &str,
        kind: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, String> {
        let architecture = self.architecture.as_str();
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| {
            format!("has invalid metadata: `{architecture}.{key}` is of type {}, not {kind}", value.kind())
        })
    }

    pub(super) fn size(&mut self, key: &str) -> Result<Option<u64>, String> {
        self.typed(key, "a non-negative integer", Value::as_u64)
    }

    pub(super) fn required(&mut self, key: &str) -> Result<u64, String> {
        self.size(key)?.ok_or_else(|| format!("lacks the metadata key `{}.{key}`", self.architecture.as_str()))
    }

    /// The decimal number that a value was rounded from: 1e-5, where the exact value of the f32 is 9.99999974e-6.
    pub(super) fn number(&mut self, key: &str) -> Result<Option<f64>, String> {
        let number = |value: &Value| match value {
            Value::F32(value) => value.to_string().parse().ok(),
            other => other.as_f64(),
        };
        self.typed(key, "a finite floating-point number", |value| number(value).filter(|number| number.is_finite()))
    }

    pub(super) fn boolean(&mut self, key: &str) -> Result<Option<bool>, String> {
        self.typed(key, "a boolean", Value::as_bool)
    }

    pub(super) fn string(&mut self, key: &str) -> Result<Option<&'a str>, String> {
        let architecture = self.architecture.as_str();
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| {
            format!("has invalid metadata: `{architecture}.{key}` is of type {}, not string", value.kind())
        })
    }

    /// The error for a value that is not supported.
    pub(super) fn unsupported(&self, key: &str, problem: &str) -> String {
        format!("has the metadata key `{}.{key}`, which {problem}", self.architecture.as_str())
    }

    /// Refuses the keys of the architecture that have not been read: they may change the computation.
    pub(super) fn finish(self) -> Result<(), String> {
        let prefix = format!("{}.", self.architecture.as_str());
        let unknown = self.metadata.iter().map(|(key, _)| key).find(|key| {
            let Some(rest) = key.strip_prefix(&prefix) else { return false };
            !self.read.iter().any(|read| read == key) && !IGNORED.contains(&rest)
        });
        unknown.map_or(Ok(()), |key| Err(format!("has the metadata key `{key}`, which is not supported")))
    }
}

/// Keys of an architecture without effect on the model.
pub(in crate::format::gguf) const IGNORED: [&str; 4] =
    ["tensor_data_layout", "rope.scaling.finetuned", "pooling_type", "attention.causal"];

/// The keys of `config.json` that follow from the standard keys and the tensors.
pub(super) fn standard(
    metadata: &Metadata,
    tensors: &[TensorInfo],
    rope_factors: Option<&[f32]>,
) -> Result<Json, String> {
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
        (None, Some(factors), Some(dim)) => put("rope_scaling", llama3(theta, dim, factors)?),
        (Some(_), Some(_), _) => {
            return Err(keys.unsupported("rope.scaling.type", "is set in addition to `rope_freqs.weight`"));
        }
        (None, Some(_), None) => {
            return Err(format!(
                "has a tensor `{}`, which the architecture `{name}` does not have",
                names::ROPE_FACTORS
            ));
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
                .zip([rank.saturating_add(rope), rank])
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
