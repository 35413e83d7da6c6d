//! Configs for the tests of complete models.

use moonlight_model::ModelConfig;
use serde_json::{Value, json};

/// A small Moonlight with a hidden size of 40, one dense layer and two layers of experts, and with some keys replaced.
pub(crate) fn moonlight(changes: Value) -> ModelConfig {
    let mut value = json!({
        "model_type": "deepseek_v3", "vocab_size": 61, "hidden_size": 40, "intermediate_size": 56,
        "num_hidden_layers": 3, "num_attention_heads": 3, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "initializer_range": 0.2, "q_lora_rank": null, "kv_lora_rank": 20, "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6, "v_head_dim": 7, "n_routed_experts": 9, "num_experts_per_tok": 2,
        "moe_intermediate_size": 12, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": true, "routed_scaling_factor": 2.446, "rope_theta": 50000.0,
    });
    value.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    ModelConfig::from_value(value).unwrap()
}
