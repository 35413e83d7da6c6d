//! Published configs by name, each with its source.

use serde_json::{Value, json};

use super::ModelConfig;
use super::error::ConfigError;

impl ModelConfig {
    /// The config with this name; [`PRESETS`](super::PRESETS) lists the names.
    ///
    /// # Errors
    ///
    /// [`ConfigError::UnknownPreset`] if there is no such preset.
    pub fn preset(name: &str) -> Result<Self, ConfigError> {
        let value = match name {
            "moonlight-16b-a3b" => moonlight(163_585),
            "moonlight-16b-a3b-instruct" => moonlight(163_586),
            "deepseek-v3" => deepseek_v3(),
            "deepseek-v2-lite" => deepseek_v2_lite(),
            "muon-report-400m" => muon_report_400m(),
            "bench-small" => bench_small(),
            other => return Err(ConfigError::UnknownPreset(other.to_owned())),
        };
        Self::from_value(value)
    }
}

/// moonshotai/Moonlight-16B-A3B, `config.json`.
fn moonlight(eos_token_id: u32) -> Value {
    json!({
        "model_type": "deepseek_v3", "vocab_size": 163_840, "hidden_size": 2048, "intermediate_size": 11_264,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "initializer_range": 0.02,
        "tie_word_embeddings": false, "attention_bias": false, "torch_dtype": "bfloat16",
        "bos_token_id": 163_584, "eos_token_id": eos_token_id, "rope_theta": 50_000.0,
        "q_lora_rank": null, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
        "n_shared_experts": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": true,
        "routed_scaling_factor": 2.446, "num_nextn_predict_layers": 0,
    })
}

/// deepseek-ai/DeepSeek-V3, `config.json`, without its multi-token-prediction layer.
fn deepseek_v3() -> Value {
    json!({
        "model_type": "deepseek_v3", "vocab_size": 129_280, "hidden_size": 7168, "intermediate_size": 18_432,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
        "max_position_embeddings": 163_840, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
        "tie_word_embeddings": false, "attention_bias": false, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 1, "rope_theta": 10_000.0,
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
            "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
        "n_shared_experts": 1, "first_k_dense_replace": 3, "moe_layer_freq": 1, "n_group": 8, "topk_group": 4,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": true,
        "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0,
    })
}

/// deepseek-ai/DeepSeek-V2-Lite, `config.json`.
fn deepseek_v2_lite() -> Value {
    json!({
        "model_type": "deepseek_v2", "vocab_size": 102_400, "hidden_size": 2048, "intermediate_size": 10_944,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "max_position_embeddings": 163_840, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
        "tie_word_embeddings": false, "attention_bias": false, "torch_dtype": "bfloat16",
        "bos_token_id": 100_000, "eos_token_id": 100_001, "rope_theta": 10_000.0,
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
            "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
        "q_lora_rank": null, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
        "n_shared_experts": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1,
        "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": false, "routed_scaling_factor": 1.0,
    })
}

/// The smallest model of the Muon report's scaling law (arXiv 2502.16982, table 2): Llama, MLP width 2.6 times the hidden size,
/// 8K context.
fn muon_report_400m() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 163_840, "hidden_size": 1536, "intermediate_size": 3994,
        "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "initializer_range": 0.02,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "rope_theta": 50_000.0,
        "bos_token_id": 163_584, "eos_token_id": 163_585,
    })
}

/// The model of this project's benchmarks: 4 of 32 experts for each token, small enough for the CPU of a laptop.
fn bench_small() -> Value {
    json!({
        "model_type": "deepseek_v3", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "initializer_range": 0.02,
        "tie_word_embeddings": false, "attention_bias": false, "torch_dtype": "float32",
        "rope_theta": 50_000.0, "q_lora_rank": null, "kv_lora_rank": 128, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": 352, "n_shared_experts": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "norm_topk_prob": true, "routed_scaling_factor": 2.446,
    })
}
