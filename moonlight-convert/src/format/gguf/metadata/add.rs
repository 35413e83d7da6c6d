//! From a config to metadata.

use moonlight_model::ModelConfig;
use moonlight_model::config::{AttentionShape, ParameterKind, ScoringFunc};

use super::scaling::add_scaling;
use super::{General, SIGMOID, SOFTMAX, add_own, groups};
use crate::format::gguf::block::BlockType;
use crate::format::gguf::names::Architecture;
use crate::format::gguf::value::{Metadata, Value};

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

/// Writes the keys of an architecture.
pub(super) struct Keys<'a> {
    pub(super) metadata: &'a mut Metadata,
    pub(super) architecture: Architecture,
}

impl Keys<'_> {
    pub(super) fn put(&mut self, key: &str, value: impl Into<Value>) {
        self.metadata.insert(format!("{}.{key}", self.architecture.as_str()), value);
    }

    pub(super) fn size(&mut self, key: &str, value: usize) -> Result<(), String> {
        let value = u32::try_from(value).map_err(|_| format!("`{key}` would be {value}, and has 32 bits"))?;
        self.put(key, value);
        Ok(())
    }

    pub(super) fn number(&mut self, key: &str, value: f64) {
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
            (ParameterKind::Experts, Some(&count)) => {
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
