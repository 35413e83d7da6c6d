//! Defaults for keys that a `config.json` lacks: those of the class in transformers that its `model_type` names.

use serde_json::{Map, Value, json};

use super::model_type::ModelType;

/// Adds keys that a `config.json` lacks and whose default in transformers (5.24) is not that of
/// [`ModelConfig::from_value`](super::ModelConfig::from_value). A null is kept. Keys about experts are added only if the file
/// has `n_routed_experts`; in a wrapper, keys are added to its `text_config`.
///
/// [`ModelConfig::from_json`](super::ModelConfig::from_json) calls it.
pub fn fill_class_defaults(config: &mut Map<String, Value>) {
    if let Some(Value::Object(text)) = config.get_mut("text_config") {
        // In transformers a text model without `model_type` is a DeepSeek-V3.
        text.entry("model_type").or_insert_with(|| json!("deepseek_v3"));
        return fill(text);
    }
    fill(config);
}

fn fill(config: &mut Map<String, Value>) {
    let class = config.get("model_type").and_then(Value::as_str).and_then(ModelType::from_name);
    let Some(class) = class else { return };
    let has_experts = config.get("n_routed_experts").is_some_and(|experts| !experts.is_null());
    let [defaults, experts] = defaults(class);
    let experts = if has_experts { experts } else { &[] };
    for (key, value) in defaults.iter().chain(experts) {
        config.entry(*key).or_insert_with(|| if value.fract() == 0.0 { json!(*value as u64) } else { json!(value) });
    }
}

/// The defaults of the class that differ from this crate's: those of every model, and those of models with experts.
fn defaults(class: ModelType) -> [&'static [(&'static str, f64)]; 2] {
    match class {
        ModelType::DeepseekV3 | ModelType::KimiK2 => [
            &[("q_lora_rank", 1536.0)],
            &[
                ("first_k_dense_replace", 3.0),
                ("n_group", 8.0),
                ("n_shared_experts", 1.0),
                ("routed_scaling_factor", 2.5),
                ("topk_group", 4.0),
            ],
        ],
        ModelType::DeepseekV2 => [&[("q_lora_rank", 1536.0)], &[("n_shared_experts", 2.0)]],
        ModelType::Llama => [&[], &[]],
        ModelType::Qwen2 => [&[("num_key_value_heads", 32.0)], &[]],
    }
}
