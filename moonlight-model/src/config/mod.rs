//! The shape of a model: what the published `config.json` says, checked.
//!
//! * [`ModelConfig`] holds the numbers, grouped by the part of the model that they shape.
//! * `json.rs` reads and writes the published spelling(s).
//! * `validate.rs` refuses impossible combinations and names the field.
//! * `parameters.rs` lists every parameter with its shape, without allocating one.

mod json;
mod parameters;
mod presets;
mod validate;

pub use parameters::{ParameterCount, ParameterKind, ParameterShape};
pub use presets::PRESETS;

/// Which published model class a configuration belongs to (`model_type` in `config.json`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelType {
    /// DeepSeek-V3, Moonlight, Kimi-VL's language model.
    DeepseekV3,
    /// DeepSeek-V2 and V2-Lite.
    DeepseekV2,
    /// Kimi-K2: DeepSeek-V3 under its own name.
    KimiK2,
    /// Llama: grouped-query attention, no biases.
    Llama,
    /// Qwen2: grouped-query attention, biases on query, key and value.
    Qwen2,
}

/// The shape of a decoder-only language model of the Moonlight family.
///
/// Field names are those of the published `config.json`, grouped: [`AttentionShape`], [`RopeConfig`],
/// [`MoeShape`]. Build one with [`ModelConfig::from_json`] or [`ModelConfig::preset`].
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The model class.
    pub model_type: ModelType,
    /// Rows of the embedding and columns of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of a dense layer's MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers (multi-token-prediction layers do not count).
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// The longest sequence that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Epsilon of the layer norms and the final norm.
    pub rms_norm_eps: f64,
    /// Standard deviation of freshly initialised matrices and embeddings.
    pub initializer_range: f64,
    /// Whether the head is the embedding, transposed.
    pub tie_word_embeddings: bool,
    /// Multi-head latent attention, or grouped-query attention.
    pub attention: AttentionShape,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Experts; `None` for a dense model.
    pub moe: Option<MoeShape>,
    /// First token of a text, where the tokenizer adds one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation.
    pub eos_token_id: Vec<u32>,
    /// The dtype that the weights were published in (`torch_dtype` or `dtype`), as spelled there.
    pub dtype: Option<String>,
    /// Every other key of the file, kept so that saving loses nothing.
    pub extra: serde_json::Map<String, serde_json::Value>,
}

/// How a layer attends.
#[derive(Debug, Clone, PartialEq)]
pub enum AttentionShape {
    /// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).
    Mla(MlaShape),
    /// Grouped-query attention (Llama, Qwen2).
    Gqa(GqaShape),
}

/// Multi-head latent attention.
#[derive(Debug, Clone, PartialEq)]
pub struct MlaShape {
    /// Width of the query latent; `None` projects queries directly (Moonlight).
    pub q_lora_rank: Option<usize>,
    /// Width of the latent that keys and values are expanded from, and that the cache holds.
    pub kv_lora_rank: usize,
    /// Width of a head's query and key without position.
    pub qk_nope_head_dim: usize,
    /// Width of a head's query, and of the one shared key, that carry the position.
    pub qk_rope_head_dim: usize,
    /// Width of a head's value.
    pub v_head_dim: usize,
    /// Epsilon of the two latent norms. transformers and the published remote code leave it at 1e-6 whatever
    /// `rms_norm_eps` says; vLLM and SGLang use `rms_norm_eps`. The default follows transformers; the JSON key
    /// is `kv_norm_eps`, ours alone.
    pub latent_norm_eps: f64,
    /// Biases on `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj`.
    pub attention_bias: bool,
}

/// Grouped-query attention.
#[derive(Debug, Clone, PartialEq)]
pub struct GqaShape {
    /// Number of key and value heads; divides the number of query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Biases on query, key and value.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub o_bias: bool,
}

/// Rotary position embedding (arXiv 2104.09864).
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Whether dimension pairs lie beside each other, `(x0, x1), (x2, x3)`, as in the DeepSeek family, or half
    /// a head apart, `(x0, x_{d/2})`, as in Llama.
    pub interleave: bool,
    /// Context extension by YaRN (arXiv 2309.00071).
    pub yarn: Option<YarnConfig>,
}

/// YaRN: interpolate slow frequencies, keep fast ones, sharpen attention.
#[derive(Debug, Clone, PartialEq)]
pub struct YarnConfig {
    /// How many times longer the context is than the original.
    pub factor: f64,
    /// Context length before the extension.
    pub original_max_position_embeddings: usize,
    /// Rotations over the original context above which a frequency is kept.
    pub beta_fast: f64,
    /// Rotations below which a frequency is interpolated.
    pub beta_slow: f64,
    /// Numerator of the scale of cos and sin.
    pub mscale: Option<f64>,
    /// Denominator of the scale of cos and sin, and the scale (squared) of the attention scores.
    pub mscale_all_dim: Option<f64>,
    /// Given scale of cos and sin, in place of the one derived from the factor.
    pub attention_factor: Option<f64>,
    /// Whether the ramp's ends are rounded to whole dimensions.
    pub truncate: bool,
}

/// Routed and shared experts.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeShape {
    /// Number of routed experts.
    pub n_routed_experts: usize,
    /// Routed experts that each token visits.
    pub num_experts_per_tok: usize,
    /// Width of one expert's MLP.
    pub moe_intermediate_size: usize,
    /// Number of shared experts, built as one MLP of this many times the width; 0 for none.
    pub n_shared_experts: usize,
    /// The first layers that are dense.
    pub first_k_dense_replace: usize,
    /// Every how many layers (after the dense ones) experts stand.
    pub moe_layer_freq: usize,
    /// Groups that the experts are divided into.
    pub n_group: usize,
    /// Groups that a token may choose from.
    pub topk_group: usize,
    /// How router logits become scores.
    pub scoring: Scoring,
    /// How experts are chosen from the scores.
    pub topk_method: TopkMethod,
    /// Whether the chosen scores are normalised to a sum of one.
    pub norm_topk_prob: bool,
    /// Factor on the weights of the chosen experts.
    pub routed_scaling_factor: f64,
}

/// How router logits become scores (`scoring_func`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Each expert for itself (DeepSeek-V3).
    Sigmoid,
    /// Over all experts (DeepSeek-V2).
    Softmax,
}

/// How experts are chosen from the scores (`topk_method`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TopkMethod {
    /// Auxiliary-loss-free balancing: a correction bias joins in the choice, not in the weight; a group is worth the
    /// sum of its two best.
    NoauxTc,
    /// The best scores.
    Greedy,
    /// The best scores within the groups with the best maximum.
    GroupLimitedGreedy,
}

/// A configuration that cannot be a model, or text that is not a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The text is not JSON, or a value has the wrong type.
    #[error("the model configuration cannot be read: {0}")]
    Json(String),
    /// A key that the model cannot do without is absent.
    #[error("the model configuration lacks `{field}`")]
    Missing {
        /// The key's name in `config.json`.
        field: &'static str,
    },
    /// A value is impossible, by itself or beside another.
    #[error("the model configuration's `{field}` {problem}")]
    Invalid {
        /// The key's name in `config.json`.
        field: &'static str,
        /// What is wrong, as the rest of a sentence.
        problem: String,
    },
    /// The `model_type` is not one of the family.
    #[error("`model_type` `{0}` is not supported (known: {KNOWN_MODEL_TYPES})")]
    UnknownModelType(String),
    /// A preset that does not exist.
    #[error("there is no model preset `{0}` (known: {known})", known = PRESETS.join(", "))]
    UnknownPreset(String),
}

const KNOWN_MODEL_TYPES: &str = "deepseek_v3, deepseek_v2, kimi_k2, kimi_k25, kimi_vl, llama, qwen2";

impl ModelConfig {
    /// The experts' configuration of layer `layer`, or `None` where the layer is dense.
    pub fn moe_of_layer(&self, layer: usize) -> Option<&MoeShape> {
        self.moe.as_ref().filter(|moe| layer >= moe.first_k_dense_replace && layer.is_multiple_of(moe.moe_layer_freq))
    }

    /// Width of one head's query and key.
    pub fn qk_head_dim(&self) -> usize {
        match &self.attention {
            AttentionShape::Mla(mla) => mla.qk_nope_head_dim + mla.qk_rope_head_dim,
            AttentionShape::Gqa(gqa) => gqa.head_dim,
        }
    }

    /// Dimensions of a head that the rotary embedding turns.
    pub fn rope_dim(&self) -> usize {
        match &self.attention {
            AttentionShape::Mla(mla) => mla.qk_rope_head_dim,
            AttentionShape::Gqa(gqa) => gqa.head_dim,
        }
    }

    /// Values that the cache keeps for each token and layer: 576 for Moonlight.
    pub fn cache_values_per_token(&self) -> usize {
        match &self.attention {
            AttentionShape::Mla(mla) => mla.kv_lora_rank + mla.qk_rope_head_dim,
            AttentionShape::Gqa(gqa) => 2 * gqa.num_key_value_heads * gqa.head_dim,
        }
    }

    /// The factor on the attention scores: `head_dim^-1/2`, times YaRN's `mscale(factor, mscale_all_dim)^2` in the
    /// DeepSeek family.
    pub fn softmax_scale(&self) -> f64 {
        let scale = (self.qk_head_dim() as f64).powf(-0.5);
        match (&self.attention, &self.rope.yarn) {
            (AttentionShape::Mla(_), Some(yarn)) => match yarn.mscale_all_dim {
                Some(all_dim) if all_dim != 0.0 => scale * yarn_mscale(yarn.factor, all_dim).powi(2),
                _ => scale,
            },
            _ => scale,
        }
    }
}

/// YaRN's `mscale(s, m) = 0.1 m ln(s) + 1` for `s > 1`, else 1.
pub(crate) fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}
