//! The keys of `config.json` that are not fields of [`ModelConfig`]. A key is ignored if it is known to change nothing, accepted if its
//! value turns it off, and otherwise refused by name: an unknown key may change the computation, and an error is better than a model
//! that silently computes something else.

use serde_json::Value;

use super::error::ConfigError;
use super::json::shape_keys;
use super::{AttentionShape, ModelConfig, ModelType};

/// Keys that do not change what the model computes from tokens, grouped by reason.
const IGNORED_KEYS: &[(&str, &[&str])] = &[
    (
        "generation settings of transformers",
        &[
            "assistant_confidence_threshold",
            "assistant_lookbehind",
            "bad_words_ids",
            "begin_suppress_tokens",
            "cache_implementation",
            "diversity_penalty",
            "do_sample",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "encoder_repetition_penalty",
            "epsilon_cutoff",
            "eta_cutoff",
            "exponential_decay_length_penalty",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "generation_config",
            "length_penalty",
            "max_length",
            "max_new_tokens",
            "min_length",
            "min_new_tokens",
            "min_p",
            "no_repeat_ngram_size",
            "num_assistant_tokens",
            "num_assistant_tokens_schedule",
            "num_beam_groups",
            "num_beams",
            "num_return_sequences",
            "prefix",
            "remove_invalid_values",
            "renormalize_logits",
            "repetition_penalty",
            "suppress_tokens",
            "target_lookbehind",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
        ],
    ),
    (
        "training settings of other programs",
        &[
            "attention_dropout",
            "attention_probs_dropout_prob",
            "attn_dropout",
            "attn_pdrop",
            "aux_loss_alpha",
            "classifier_dropout",
            "dropout",
            "embd_pdrop",
            "gradient_checkpointing",
            "hidden_dropout",
            "hidden_dropout_prob",
            "initializer_factor",
            "output_router_logits",
            "resid_pdrop",
            "router_aux_loss_coef",
            "router_jitter_noise",
            "router_z_loss_coef",
            "seq_aux",
            "unsloth_fixed",
            "unsloth_training",
            "unsloth_version",
        ],
    ),
    (
        "metadata of the file and of the program that saved it",
        &[
            "_attn_implementation",
            "_attn_implementation_autoset",
            "_attn_implementation_internal",
            "_auto_class",
            "_commit_hash",
            "_diffusers_version",
            "_experts_implementation",
            "_experts_implementation_internal",
            "_flash_attn_2_enabled",
            "_from_auto",
            "_from_model_config",
            "_model_name_or_path",
            "_name_or_path",
            "_output_attentions",
            "_pre_quantization_dtype",
            "auto_map",
            "chunk_size_feed_forward",
            "custom_pipelines",
            "dtype",
            "is_decoder",
            "license",
            "max_seq_len",
            "max_seq_length",
            "max_sequence_length",
            "model_max_length",
            "model_name",
            "name_or_path",
            "output_attentions",
            "output_hidden_states",
            "output_scores",
            "return_dict",
            "return_dict_in_generate",
            "seq_length",
            "tf_legacy_loss",
            "tokenizer_class",
            "torch_dtype",
            "torchscript",
            "transformers.js_config",
            "transformers_version",
            "use_bfloat16",
            "use_cache",
        ],
    ),
    (
        "how other programs run the same computation",
        &[
            "attn_implementation",
            "base_model_ep_plan",
            "base_model_fsdp_plan",
            "base_model_pp_plan",
            "base_model_tp_plan",
            "ep_size",
            "experts_implementation",
            "fsdp",
            "pretraining_tp",
            "tensor_parallel",
            "tp_size",
            "use_flash_attention",
            "use_flash_attention_2",
            "use_flash_attn",
        ],
    ),
    (
        "heads and tasks other than language modeling",
        &["finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params"],
    ),
    (
        "ids of tokens that the model treats like any other",
        &[
            "audio_token_id",
            "boi_token_id",
            "cls_token_id",
            "decoder_start_token_id",
            "eoi_token_id",
            "image_token_id",
            "image_token_index",
            "mask_token_id",
            "media_placeholder_token_id",
            "pad_token_id",
            "sep_token_id",
            "unk_token_id",
            "video_token_id",
            "vision_end_token_id",
            "vision_start_token_id",
            "vision_token_id",
        ],
    ),
    (
        "multi-token-prediction layers, which are not supported and not needed for the other layers",
        &["mtp_layer_types", "mtp_loss_factor", "num_mtp_layers", "num_nextn_predict_layers"],
    ),
    ("storage of the weights, which is read with them", &["compression_config", "quantization_config"]),
];

/// The values of a key that turn it off.
#[derive(Debug, Clone, Copy)]
enum Neutral {
    /// Null, false, zero, or empty.
    Off,
    /// Null or true.
    On,
    /// Null or one.
    One,
    /// Null or one of these supported names.
    Named(&'static [&'static str]),
    /// A list of only 1 or true, with an entry for each layer.
    AllOnes,
}

impl Neutral {
    fn matches(self, value: &Value) -> bool {
        match self {
            Self::Off => match value {
                Value::Bool(value) => !value,
                Value::Number(number) => number.as_f64() == Some(0.0),
                Value::String(text) => text.is_empty(),
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                Value::Null => true,
            },
            Self::On => value == &Value::Bool(true),
            Self::One => value.as_f64() == Some(1.0),
            Self::Named(names) => value.as_str().is_some_and(|name| names.contains(&name)),
            Self::AllOnes => value.as_array().is_some_and(|list| {
                list.iter().all(|layer| layer == &Value::Bool(true) || layer.as_f64() == Some(1.0))
            }),
        }
    }
}

/// Keys that change the computation of other models, grouped by what they turn on, with the values that leave it off.
const UNSUPPORTED_KEYS: &[(&str, Neutral, &[&str])] = &[
    (
        "norms of queries and keys are not supported",
        Neutral::Off,
        &["attention_qk_norm", "qk_layernorm", "qk_norm", "use_qk_norm", "use_query_key_norm"],
    ),
    (
        "soft caps and clipping of scores or logits are not supported",
        Neutral::Off,
        &[
            "attn_logit_softcap",
            "attn_logit_softcapping",
            "clip_qkv",
            "final_logit_softcap",
            "final_logit_softcapping",
            "logit_soft_cap",
            "logits_soft_cap",
        ],
    ),
    (
        "factors on embeddings, residuals, scores or logits are not supported",
        Neutral::One,
        &[
            "embedding_multiplier",
            "embedding_scale",
            "logit_scale",
            "logits_scaling",
            "lm_head_multiplier",
            "mup_scale",
            "mup_width_multiplier",
            "residual_multiplier",
            "scale_emb",
        ],
    ),
    (
        "factors on scores and residuals are not supported",
        Neutral::Off,
        &[
            "attention_multiplier",
            "attn_scale",
            "attn_temperature_tuning",
            "dim_model_base",
            "floor_scale",
            "scale_depth",
        ],
    ),
    (
        "attention to a part of the context is not supported",
        Neutral::Off,
        &[
            "attention_chunk_size",
            "attention_sink",
            "attention_window_size",
            "dual_chunk_attention_config",
            "index_head_dim",
            "index_n_heads",
            "index_topk",
            "linear_attn_config",
            "local_attention_window",
            "sliding_window_pattern",
            "sliding_window_size",
            "sparse_attention_config",
            "use_attention_sinks",
        ],
    ),
    ("attention to later tokens is not supported", Neutral::On, &["causal", "is_causal", "use_causal_mask"]),
    ("a model that is not a Llama is not supported in its class", Neutral::On, &["is_llama_config"]),
    (
        "encoders and cross-attention are not supported",
        Neutral::Off,
        &[
            "add_cross_attention",
            "cross_attention_hidden_size",
            "is_encoder_decoder",
            "pruned_heads",
            "tie_encoder_decoder",
            "use_bidirectional_attention",
        ],
    ),
    ("layers without positions are not supported", Neutral::AllOnes, &["no_rope_layers"]),
    (
        "layers without positions are not supported",
        Neutral::Off,
        &["mla_use_nope", "no_rope_layer_interval", "nope_layer_interval"],
    ),
    ("rotary embedding of a part of a head is not supported", Neutral::One, &["partial_rotary_factor", "rotary_pct"]),
    (
        "positions other than the rotary embedding are not supported",
        Neutral::Named(&["rope", "rotary"]),
        &["position_embedding_type"],
    ),
    (
        "positions other than the rotary embedding are not supported",
        Neutral::Off,
        &["alibi", "mrope_section", "rope_local_base_freq", "use_alibi", "use_mrope"],
    ),
    (
        "activations other than `silu` are not supported",
        Neutral::Named(&["silu", "swish", "swiglu"]),
        &["activation", "activation_function", "hidden_activation"],
    ),
    (
        "these biases are not supported",
        Neutral::Off,
        &["add_bias_linear", "bias", "ffn_bias", "lm_head_bias", "use_bias", "use_mlp_bias"],
    ),
    (
        "layers of different shapes are not supported",
        Neutral::Off,
        &["block_configs", "mlp_only_layers", "per_layer_config"],
    ),
    (
        "these experts are not supported in this class",
        Neutral::Off,
        &["moe_num_experts", "num_experts", "num_local_experts", "zero_expert_num"],
    ),
    ("weights quantized by MLX are not supported", Neutral::Off, &["quantization"]),
    ("draft models are not supported", Neutral::Off, &["draft_vocab_size", "eagle_config"]),
];

/// The hint for a key that may turn out not to matter.
pub(super) const REMOVE_HINT: &str = "if the key does not change what the model computes, remove it from config.json";

/// Why a key of `config.json` is ignored whatever its value; `None` for keys that are not ignored.
pub fn ignore_reason(key: &str) -> Option<&'static str> {
    IGNORED_KEYS.iter().find(|(_, keys)| keys.contains(&key)).map(|(reason, _)| *reason)
}

/// Whether a key with this value turns on something that is not supported.
pub(super) fn is_unsupported(key: &str, value: &Value) -> bool {
    UNSUPPORTED_KEYS.iter().any(|(_, neutral, keys)| keys.contains(&key) && !neutral.matches(value))
}

/// Refuses the keys that [`ModelConfig`] did not read and that may change the computation.
pub(super) fn check(config: &ModelConfig) -> Result<(), ConfigError> {
    let mut unknown = Vec::new();
    let shapes = shape_keys();
    for (key, value) in config.extra.iter().filter(|(_, value)| !value.is_null()) {
        if ignore_reason(key).is_some() {
            continue;
        }
        match check_class_key(config, &shapes, key, value) {
            Some(Ok(())) => continue,
            Some(Err(error)) => return Err(error),
            None => {}
        }
        match UNSUPPORTED_KEYS.iter().find(|(_, _, keys)| keys.contains(&key.as_str())) {
            Some((_, neutral, _)) if neutral.matches(value) => {}
            Some((what, ..)) => {
                return Err(ConfigError::Unsupported {
                    key: key.clone(),
                    problem: format!("is {}: {what}", quote(value)),
                    hint: Some(REMOVE_HINT),
                });
            }
            None => unknown.push(key.clone()),
        }
    }
    if unknown.is_empty() { Ok(()) } else { Err(ConfigError::Unknown { keys: unknown }) }
}

/// Checks a key whose meaning depends on other keys; `None` for any other key.
fn check_class_key(config: &ModelConfig, shapes: &[&str], key: &str, value: &Value) -> Option<Result<(), ConfigError>> {
    let accept_if = |supported: bool, problem: &str, hint: Option<&'static str>| {
        let problem = format!("is {}: {problem}", quote(value));
        if supported { Ok(()) } else { Err(ConfigError::Unsupported { key: key.to_owned(), problem, hint }) }
    };
    let is = |number: usize| value.as_u64() == Some(number as u64);
    Some(match (key, &config.attention) {
        // Depending on its version, transformers writes one of these as `head_dim`. The widths themselves have separate keys.
        ("head_dim", AttentionShape::Mla(mla)) => accept_if(
            [mla.qk_rope_head_dim, mla.qk_nope_head_dim, mla.qk_nope_head_dim + mla.qk_rope_head_dim]
                .into_iter()
                .chain(config.hidden_size.checked_div(config.num_attention_heads))
                .any(is),
            "the widths of heads in this class are `qk_rope_head_dim`, `qk_nope_head_dim` and `v_head_dim`",
            Some(REMOVE_HINT),
        ),
        ("qk_head_dim", AttentionShape::Mla(mla)) => accept_if(
            is(mla.qk_nope_head_dim + mla.qk_rope_head_dim),
            "it must be the sum of `qk_nope_head_dim` and `qk_rope_head_dim`",
            Some(REMOVE_HINT),
        ),
        ("num_key_value_heads", AttentionShape::Mla(_)) => {
            accept_if(is(config.num_attention_heads), "in latent attention it must equal `num_attention_heads`", None)
        }
        // Qwen2 always has biases on query, key and value.
        ("attention_bias", AttentionShape::Gqa(_)) if config.model_type == ModelType::Qwen2 => Ok(()),
        // `num_experts` and `num_local_experts` are other names of `n_routed_experts` in transformers.
        ("num_experts" | "num_local_experts", _) if config.moe.is_some() => accept_if(
            config.moe.as_ref().is_some_and(|moe| is(moe.n_routed_experts)),
            "it must equal `n_routed_experts`",
            None,
        ),
        ("query_pre_attn_scalar", _) => accept_if(
            is(config.qk_head_dim()),
            "a scale of the scores by another value than the width of a head is not supported",
            None,
        ),
        ("rope_interleaved" | "rope_traditional", _) => accept_if(
            value.as_bool() == Some(config.rope.interleave),
            "the rotary embedding of this class pairs dimensions the other way",
            Some("set `rope_interleave` instead, which is the key that is read"),
        ),
        // Read with the attention, which leaves them in `extra` to be written back.
        ("layer_types" | "sliding_window", AttentionShape::Gqa(_)) if config.model_type == ModelType::Qwen2 => Ok(()),
        ("use_sliding_window" | "max_window_layers", _) => Ok(()),
        ("sliding_window" | "layer_types", _) => check_sliding_window(config),
        ("original_max_position_embeddings", _) => Ok(()),
        ("architectures", _) => check_architectures(value),
        _ if shapes.contains(&key) => {
            // The key belongs to another class. In a dense model of a class that may have experts, keys about experts have no effect.
            let dense = config.moe.is_none() && config.model_type.may_have_experts();
            if dense && super::MoeShape::KEYS.contains(&key) {
                return Some(Ok(()));
            }
            let class = config.model_type.as_str();
            accept_if(
                Neutral::Off.matches(value),
                &format!("it is not supported in models of the type `{class}`"),
                Some("correct `model_type`, or remove the key if it does not belong to this model"),
            )
        }
        _ => return None,
    })
}

/// Sliding windows are supported in Qwen2 only. In other classes, refuses a window that is shorter than the longest sequence.
fn check_sliding_window(config: &ModelConfig) -> Result<(), ConfigError> {
    let refuse = |key: &str, problem: String, hint| Err(ConfigError::Unsupported { key: key.into(), problem, hint });
    let used = config.extra.get("use_sliding_window").and_then(Value::as_bool).unwrap_or(true);
    let window = config.extra.get("sliding_window").and_then(Value::as_f64);
    let window = window.filter(|window| used && *window != 0.0);
    let context = config.max_position_embeddings;
    if let Some(types) = config.extra.get("layer_types").filter(|types| !types.is_null()) {
        let is = |kind: &str| types.as_array().is_some_and(|types| types.iter().any(|layer| layer == kind));
        let known = |kind: &Value| matches!(kind.as_str(), Some("full_attention" | "sliding_attention"));
        if !types.as_array().is_some_and(|types| types.iter().all(known)) {
            let problem = format!("is {}: layers other than `full_attention` are not supported", quote(types));
            return refuse("layer_types", problem, None);
        }
        if !is("sliding_attention") {
            return Ok(());
        }
        if window.is_none() {
            let problem = "has `sliding_attention` layers, but no `sliding_window` is in use".into();
            return refuse("layer_types", problem, None);
        }
    }
    match window {
        Some(window) if window < context as f64 => refuse(
            "sliding_window",
            format!(
                "is {window}, shorter than the {context} tokens of `max_position_embeddings`: sliding windows are supported in \
                 Qwen2 only"
            ),
            Some("set `max_position_embeddings` to the window: it has no effect in sequences up to that length"),
        ),
        _ => Ok(()),
    }
}

/// Refuses classes with another head, such as classifiers: they compute something else.
fn check_architectures(value: &Value) -> Result<(), ConfigError> {
    let named = |class: &Value| class.as_str().is_some_and(|class| class.ends_with("ForCausalLM"));
    let is_language_model = value.as_array().is_some_and(|classes| classes.is_empty() || classes.iter().any(named));
    if is_language_model {
        return Ok(());
    }
    Err(ConfigError::Unsupported {
        key: "architectures".into(),
        problem: format!("is {}: only language models (`…ForCausalLM`) are supported", quote(value)),
        hint: Some("if the checkpoint is a language model, correct the name in config.json"),
    })
}

/// A value as shown in a message.
pub(super) fn quote(value: &Value) -> String {
    match value {
        Value::Object(_) => "an object".to_owned(),
        Value::Array(list) if list.len() > 4 => format!("a list of {}", list.len()),
        value => truncate(&value.to_string()),
    }
}

/// A text as shown in a message, cut after 80 characters: keys and values in a file may have any length.
pub(super) fn truncate(text: &str) -> String {
    const MAX_CHARS: usize = 80;
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

impl ModelConfig {
    /// The keys of the file that are ignored, each with the reason, sorted by name.
    pub fn ignored_keys(&self) -> Vec<(&str, &'static str)> {
        let mut keys: Vec<_> = self.extra.keys().filter_map(|key| Some((key.as_str(), ignore_reason(key)?))).collect();
        keys.sort_unstable();
        keys
    }

    /// Sentences for a log about training settings of the file that this project's training does not have.
    pub fn training_notes(&self) -> Vec<String> {
        const DROPOUTS: [&str; 9] = [
            "attention_dropout",
            "attention_probs_dropout_prob",
            "attn_dropout",
            "attn_pdrop",
            "dropout",
            "embd_pdrop",
            "hidden_dropout",
            "hidden_dropout_prob",
            "resid_pdrop",
        ];
        DROPOUTS
            .iter()
            .filter_map(|key| Some((key, self.extra.get(*key).filter(|value| !Neutral::Off.matches(value))?)))
            .map(|(key, value)| format!("`{key}` is {} in config.json, but training has no such dropout", quote(value)))
            .collect()
    }
}
