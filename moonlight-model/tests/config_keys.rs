//! Every published `config.json` is read: keys that change nothing are ignored, and every other key is used or refused by name.

#![recursion_limit = "512"] // long `json!`

use moonlight_model::config::{
    AttentionShape, RopeScaling, ScoringFunc, SlidingWindow, TopkMethod, WindowLayers, shape_keys,
};
use moonlight_model::{AttentionConfig, ConfigError, ModelConfig};
use serde_json::{Value, json};

/// `base` with some values replaced.
fn with(base: &Value, over: Value) -> Value {
    let mut map = base.clone();
    for (key, value) in over.as_object().unwrap() {
        map[key] = value.clone();
    }
    map
}

fn llama() -> Value {
    json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 97, "hidden_size": 48,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64})
}

fn qwen2() -> Value {
    with(&llama(), json!({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
}

/// moonshotai/Moonlight-16B-A3B-Instruct, with exactly the published keys and values.
fn moonlight() -> Value {
    json!({"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModel": "modeling_deepseek.DeepseekV3Model",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
        "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163586, "ep_size": 1,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 11264, "kv_lora_rank": 512, "max_position_embeddings": 8192, "model_type": "deepseek_v3",
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "norm_topk_prob": true, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
        "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": null,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "seq_aux": true, "tie_word_embeddings": false,
        "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.46.3",
        "use_cache": true, "v_head_dim": 128, "vocab_size": 163840})
}

/// Every key that transformers 4 wrote for every class (`PretrainedConfig.to_dict`, 4.57), with its default.
fn transformers_4() -> Value {
    json!({"_name_or_path": "", "add_cross_attention": false, "architectures": null, "bad_words_ids": null,
        "begin_suppress_tokens": null, "bos_token_id": null, "chunk_size_feed_forward": 0,
        "cross_attention_hidden_size": null, "decoder_start_token_id": null, "diversity_penalty": 0.0, "do_sample": false,
        "early_stopping": false, "encoder_no_repeat_ngram_size": 0, "eos_token_id": null,
        "exponential_decay_length_penalty": null, "finetuning_task": null, "forced_bos_token_id": null,
        "forced_eos_token_id": null, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": false,
        "is_encoder_decoder": false, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20,
        "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
        "output_attentions": false, "output_hidden_states": false, "output_scores": false, "pad_token_id": null,
        "prefix": null, "problem_type": null, "pruned_heads": {}, "remove_invalid_values": false,
        "repetition_penalty": 1.0, "return_dict": true, "return_dict_in_generate": false, "sep_token_id": null,
        "suppress_tokens": null, "task_specific_params": null, "temperature": 1.0, "tf_legacy_loss": false,
        "tie_encoder_decoder": false, "tie_word_embeddings": false, "tokenizer_class": null, "top_k": 50, "top_p": 1.0,
        "torch_dtype": "bfloat16", "torchscript": false, "transformers_version": "4.57.6", "typical_p": 1.0,
        "use_bfloat16": false, "use_cache": true})
}

const YARN: &str = r#"{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn"}"#;

/// The keys of published checkpoints, with the published values of those that decide how they are read.
fn published() -> Vec<(&'static str, Value)> {
    let yarn: Value = serde_json::from_str(YARN).unwrap();
    let fp8 = json!({"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128]});
    let deepseek_v3 = with(
        &moonlight(),
        json!({"num_nextn_predict_layers": 1, "n_group": 8, "topk_group": 4,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "q_lora_rank": 1536, "rope_scaling": yarn,
        "quantization_config": fp8, "max_position_embeddings": 163840}),
    );
    let mut deepseek_v2_lite = with(
        &moonlight(),
        json!({"model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"], "scoring_func": "softmax", "topk_method": "greedy",
        "norm_topk_prob": false, "routed_scaling_factor": 1.0, "rope_scaling": yarn}),
    );
    deepseek_v2_lite.as_object_mut().unwrap().remove("num_nextn_predict_layers");
    let kimi_k2 = with(
        &moonlight(),
        json!({"model_type": "kimi_k2", "n_routed_experts": 384, "num_experts_per_tok": 8,
        "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn"}, "quantization_config": fp8}),
    );
    let kimi_vl = json!({"architectures": ["KimiVLForConditionalGeneration"], "auto_map": {}, "model_type": "kimi_vl",
        "vision_config": {"model_type": "moonvit", "patch_size": 14}, "text_config": with(&transformers_4(), with(&moonlight(),
            json!({"rope_theta": 800000.0, "rope_scaling": null, "max_position_embeddings": 131072}))),
        "ignore_index": -100, "media_placeholder_token_id": 163605, "torch_dtype": "bfloat16",
        "transformers_version": "4.50.3", "tie_word_embeddings": false, "vocab_size": 163840});
    let kimi_k25 = json!({"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25",
        "bos_token_id": 163584, "dtype": "bfloat16", "eos_token_id": 163585, "ignore_index": -100,
        "media_placeholder_token_id": 163605, "pad_token_id": 163839, "text_config": with(&transformers_4(), kimi_k2.clone()),
        "tie_word_embeddings": false, "use_unified_vision_chunk": true, "vision_config": {"patch_size": 14}});
    let llama_2 = with(
        &llama(),
        json!({"_name_or_path": "meta-llama/Llama-2-7b-hf", "_model_name_or_path": "x", "_auto_class": null, "hidden_act": "silu",
        "initializer_range": 0.02, "num_key_value_heads": 4, "pretraining_tp": 2, "rms_norm_eps": 1e-05,
        "rope_scaling": null, "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "float16",
        "transformers_version": "4.31.0", "use_cache": true, "max_sequence_length": 64}),
    );
    let llama_3 = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"});
    let llama_3_1 = with(
        &llama_2,
        json!({"attention_bias": false, "attention_dropout": 0.0, "mlp_bias": false,
        "pretraining_tp": 1, "rope_scaling": llama_3, "eos_token_id": [3, 4, 5], "rope_theta": 500000.0}),
    );
    let llama_3_2 = with(&llama_3_1, json!({"head_dim": 64, "tie_word_embeddings": true, "num_key_value_heads": 2}));
    let smollm2 = with(
        &llama_2,
        json!({"attention_bias": false, "attention_dropout": 0.0, "is_llama_config": true,
        "mlp_bias": false, "pad_token_id": 2, "rope_interleaved": false, "tie_word_embeddings": true,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}),
    );
    let qwen25 = with(
        &qwen2(),
        json!({"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
        "max_window_layers": 1, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 16, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
        "use_cache": true, "use_mrope": false, "use_sliding_window": false}),
    );
    let transformers_5 = |rope: Value| {
        json!({"rope_parameters": rope, "dtype": "bfloat16", "transformers_version": "5.24.0",
        "pad_token_id": null, "output_router_logits": false, "use_cache": true})
    };
    vec![
        ("Moonlight", moonlight()),
        ("DeepSeek-V3, R1, V3.1", deepseek_v3),
        ("DeepSeek-V2-Lite", deepseek_v2_lite.clone()),
        ("Kimi-K2", kimi_k2),
        ("Kimi-VL", kimi_vl),
        ("Kimi-K2.5", kimi_k25),
        ("Llama 2, TinyLlama, Vicuna", llama_2.clone()),
        ("Llama 3.1", llama_3_1),
        ("Llama 3.2", llama_3_2),
        ("SmolLM2", smollm2),
        ("deepseek-coder", with(&llama_2, json!({"rope_scaling": {"factor": 4.0, "type": "linear"}}))),
        (
            "Yarn-Llama-2",
            with(
                &llama_2,
                json!({"rope_scaling": {"factor": 16.0, "finetuned": true,
            "original_max_position_embeddings": 4096, "type": "yarn"}}),
            ),
        ),
        ("Qwen2.5", qwen25.clone()),
        (
            "Qwen2.5 with YaRN as its card says",
            with(
                &qwen25,
                json!({"rope_scaling": {"factor": 4.0,
            "original_max_position_embeddings": 32768, "type": "yarn"}}),
            ),
        ),
        ("an old full dump", with(&transformers_4(), llama_2)),
        ("unsloth's", with(&qwen25, json!({"unsloth_fixed": true, "unsloth_version": "2026.3", "pad_token_id": 5}))),
        (
            "transformers 5, Qwen2",
            with(
                &with(
                    &qwen25,
                    json!({"rope_theta": null, "sliding_window": null,
            "layer_types": ["full_attention", "full_attention"]}),
                ),
                transformers_5(json!({"rope_type": "default", "rope_theta": 1e6})),
            ),
        ),
        (
            "transformers 5, DeepSeek-V2",
            with(
                &deepseek_v2_lite,
                with(
                    &json!({"head_dim": 64, "qk_head_dim": 192,
            "mlp_bias": false, "rope_scaling": null, "rope_theta": null}),
                    transformers_5(json!({"rope_type": "yarn",
            "type": "yarn", "rope_theta": 1e4, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32,
            "beta_slow": 1, "original_max_position_embeddings": 4096})),
                ),
            ),
        ),
        (
            "transformers 5, DeepSeek-V3",
            with(
                &moonlight(),
                with(
                    &json!({"head_dim": 64, "qk_head_dim": 192,
            "rope_interleave": true, "rope_theta": null}),
                    transformers_5(json!({"rope_type": "default",
            "rope_theta": 5e4, "partial_rotary_factor": 1.0})),
                ),
            ),
        ),
    ]
}

#[test]
fn the_published_configs_are_read_and_written_back() {
    for (name, value) in published() {
        let config = ModelConfig::from_value(value.clone()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let again = ModelConfig::from_json(&config.to_json()).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(again, config, "{name}");
        // Nothing is lost: keys that are not read are kept. (`rope_interleave` is not written if it is the default.)
        let source = value.get("text_config").unwrap_or(&value);
        let written = config.to_value();
        for (key, value) in source.as_object().unwrap().iter().filter(|(_, value)| !value.is_null()) {
            let renamed = ["dtype", "rope_interleave", "rope_parameters"].contains(&key.as_str());
            assert!(written.get(key).is_some() || renamed, "{name}: `{key}`: {value}");
        }
    }
}

fn refusal(value: Value) -> ConfigError {
    ModelConfig::from_value(value.clone()).expect_err(&value.to_string())
}

#[test]
fn unsupported_keys_that_shape_the_computation_are_refused_by_name() {
    let cases = [
        (qwen2(), "mlp_bias", json!(true)),
        (moonlight(), "mlp_bias", json!(true)),
        (llama(), "use_bias", json!(true)),
        (llama(), "hidden_act", json!("gelu")),
        (llama(), "hidden_activation", json!("gelu_pytorch_tanh")),
        (llama(), "partial_rotary_factor", json!(0.5)),
        (llama(), "rotary_pct", json!(0.25)),
        (llama(), "use_qk_norm", json!(true)),
        (llama(), "attn_logit_softcapping", json!(50.0)),
        (llama(), "final_logit_softcapping", json!(30.0)),
        (llama(), "logits_soft_cap", json!(30.0)),
        (llama(), "embedding_multiplier", json!(12.0)),
        (llama(), "residual_multiplier", json!(0.22)),
        (llama(), "logits_scaling", json!(8.0)),
        (llama(), "logit_scale", json!(0.0625)),
        (llama(), "attention_multiplier", json!(0.0078)),
        (llama(), "query_pre_attn_scalar", json!(256)),
        (llama(), "attention_chunk_size", json!(8192)),
        (llama(), "no_rope_layers", json!([1, 0])),
        (llama(), "no_rope_layer_interval", json!(4)),
        (llama(), "attn_temperature_tuning", json!(4)),
        (llama(), "is_causal", json!(false)),
        (llama(), "is_encoder_decoder", json!(true)),
        (llama(), "pruned_heads", json!({"1": [0]})),
        (llama(), "num_local_experts", json!(8)),
        (llama(), "n_routed_experts", json!(8)),
        (llama(), "kv_lora_rank", json!(512)),
        (llama(), "layer_types", json!(["full_attention", "linear_attention"])),
        (llama(), "sliding_window", json!(16)),
        (llama(), "architectures", json!(["LlamaForSequenceClassification"])),
        (llama(), "rope_interleaved", json!(true)),
        (qwen2(), "dual_chunk_attention_config", json!({"chunk_size": 262144})),
        (qwen2(), "use_mrope", json!(true)),
        (moonlight(), "num_key_value_heads", json!(4)),
        (moonlight(), "head_dim", json!(80)),
        (moonlight(), "qk_head_dim", json!(128)),
        (moonlight(), "num_experts", json!(32)),
        (moonlight(), "mla_use_nope", json!(true)),
        (moonlight(), "quantization", json!({"bits": 4, "group_size": 64})),
    ];
    for (base, key, value) in cases {
        let error = refusal(with(&base, json!({key: value})));
        assert!(matches!(&error, ConfigError::Unsupported { key: named, .. } if named == key), "{key}: {error:?}");
        assert!(error.to_string().contains(&format!("`{key}` ")), "{error}");
    }
    // Values that turn the same keys off.
    for (base, over) in [
        (
            llama(),
            json!({"mlp_bias": false, "hidden_act": "silu", "hidden_activation": "silu", "use_qk_norm": false,
            "partial_rotary_factor": 1.0, "final_logit_softcapping": null, "embedding_multiplier": 1.0, "logits_scaling": 1,
            "query_pre_attn_scalar": 12, "attention_chunk_size": null, "no_rope_layers": [1, 1], "is_causal": true,
            "num_local_experts": 0, "n_routed_experts": null, "layer_types": ["full_attention"], "pruned_heads": {}}),
        ),
        (llama(), json!({"sliding_window": 64})),
        (moonlight(), json!({"head_dim": 192, "num_experts": 64, "mla_use_nope": false})),
        // In a dense DeepSeek the other keys about experts have no effect.
        (moonlight(), json!({"n_routed_experts": null})),
    ] {
        ModelConfig::from_value(with(&base, over)).unwrap();
    }
}

#[test]
fn unknown_keys_are_refused_together() {
    let error = refusal(with(&llama(), json!({"depth_attention": 3, "mixer": "mamba", "unset": null})));
    assert_eq!(error, ConfigError::Unknown { keys: vec!["depth_attention".into(), "mixer".into()] });
    assert_eq!(error.to_string(), "the model config has the unknown keys `depth_attention`, `mixer`");
    assert!(error.hint().unwrap().contains("remove it from config.json"));
    // Endless names do not make endless messages.
    let many: serde_json::Map<String, Value> =
        (0..5000).map(|at| ("k".repeat(9000) + &at.to_string(), json!(1))).collect();
    let error = refusal(with(&llama(), Value::Object(many))).to_string();
    assert!(error.len() < 1000 && error.ends_with("and 4992 more"), "{error}");
}

/// As in transformers 5.24 (`Qwen2Config.__post_init__`): the layers from `max_window_layers` on if `use_sliding_window` is true, or
/// those in `layer_types`.
#[test]
fn a_sliding_window_belongs_to_the_same_layers_as_in_transformers() {
    let windows = |over: &Value| {
        let config =
            ModelConfig::from_value(with(&qwen2(), over.clone())).unwrap_or_else(|error| panic!("{over}: {error}"));
        assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config, "{over}");
        [0, 1].map(|layer| match config.layer(layer).attention {
            AttentionConfig::Gqa(attention) => attention.sliding_window,
            AttentionConfig::Mla(_) => unreachable!("Qwen2 has grouped-query attention"),
        })
    };
    let sliding = |window: Value, first: i32| json!({"use_sliding_window": true, "sliding_window": window, "max_window_layers": first});
    let types = json!({"use_sliding_window": true, "sliding_window": 3, "max_window_layers": 28,
        "layer_types": ["sliding_attention", "full_attention"]});
    assert_eq!(windows(&sliding(json!(3), 0)), [Some(3); 2]);
    assert_eq!(windows(&sliding(json!(63), 1)), [None, Some(63)]);
    assert_eq!(windows(&types), [Some(3), None]);
    for none in [
        sliding(json!(null), 0),
        sliding(json!(3), 2), // both layers are before the first with a window
        json!({"use_sliding_window": true, "sliding_window": 3}), // 28 by default
        json!({"sliding_window": 3, "max_window_layers": 0}), // not used by default
        with(&types, json!({"layer_types": ["full_attention", "full_attention"], "max_window_layers": 0})),
    ] {
        assert_eq!(windows(&none), [None; 2], "{none}");
    }
    let refused = refusal(with(&qwen2(), json!({"layer_types": ["sliding_attention", "full_attention"]}))).to_string();
    assert!(
        refused.contains("`layer_types` has `sliding_attention` layers, but no `sliding_window` is in use"),
        "{refused}"
    );
    let refused = refusal(with(&qwen2(), json!({"layer_types": ["chunked_attention"]}))).to_string();
    assert!(refused.contains("`layer_types` must be a list of `full_attention` and `sliding_attention`"), "{refused}");
    // A window that is set in Rust is written, and one that is removed is not.
    let mut config = ModelConfig::from_value(with(&qwen2(), sliding(json!(3), 1))).unwrap();
    let AttentionShape::Gqa(shape) = &mut config.attention else { unreachable!("Qwen2 has grouped-query attention") };
    shape.sliding_window = None;
    assert_eq!(config.to_value().get("sliding_window"), None);
    let AttentionShape::Gqa(shape) = &mut config.attention else { unreachable!("Qwen2 has grouped-query attention") };
    shape.sliding_window = Some(SlidingWindow { tokens: 5, layers: WindowLayers::Listed(vec![true, false]) });
    let again = ModelConfig::from_json(&config.to_json()).unwrap();
    assert_eq!(again.attention, config.attention);
}

/// The other classes have no window: one shorter than the context is refused, with a hint on how to open the model.
#[test]
fn a_sliding_window_of_another_class_is_refused_if_it_has_an_effect() {
    let error = refusal(with(&llama(), json!({"sliding_window": 63})));
    assert!(error.to_string().contains("`sliding_window` is 63, shorter than the 64 tokens"), "{error}");
    assert!(error.hint().unwrap().contains("`max_position_embeddings`"));
    for harmless in [
        json!({"sliding_window": 64}), // no sequence is longer than 64
        json!({"sliding_window": 3, "use_sliding_window": false}),
        json!({"sliding_window": 3, "layer_types": ["full_attention", "full_attention"]}),
    ] {
        ModelConfig::from_value(with(&llama(), harmless.clone())).unwrap_or_else(|error| panic!("{harmless}: {error}"));
    }
}

#[test]
fn rope_scaling_is_used_or_refused_by_its_keys() {
    let read = |rope: Value| ModelConfig::from_value(with(&llama(), json!({"rope_scaling": rope})));
    assert_eq!(
        read(json!({"type": "linear", "factor": 4})).unwrap().rope.scaling,
        Some(RopeScaling::Linear { factor: 4.0 })
    );
    let dynamic = read(json!({"rope_type": "dynamic", "factor": 2.0})).unwrap();
    assert_eq!(dynamic.rope.scaling, Some(RopeScaling::Dynamic { factor: 2.0 }));
    assert_eq!(read(json!({})).unwrap().rope.scaling, None);
    // As in transformers, the original length may be outside the scaling, and defaults to the context length.
    let yarn = with(&llama(), json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}));
    let outside = with(&yarn, json!({"original_max_position_embeddings": 16}));
    for (value, original) in [(yarn, 64), (outside, 16)] {
        let config = ModelConfig::from_value(value).unwrap();
        assert_eq!(config.rope.yarn().unwrap().original_max_position_embeddings, original);
        assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config);
    }
    for (rope, named) in [
        (json!({"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}), "`longrope`"),
        (json!({"type": "mrope", "mrope_section": [16, 24, 24]}), "`mrope`"),
        (json!({"type": "default", "mrope_section": [16, 24, 24]}), "rope_scaling.mrope_section"),
        (json!({"type": "yarn", "factor": 4.0, "alpha": 1000}), "rope_scaling.alpha"),
        (json!({"type": "yarn", "factor": 4.0, "extrapolation_factor": 0.5}), "rope_scaling.extrapolation_factor"),
        (json!({"type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5}), "rope_scaling.partial_rotary_factor"),
        (json!({"type": "linear"}), "rope_scaling.factor"),
        (json!({"factor": 4.0}), "rope_scaling.factor"),
        (json!({"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}), "rope_scaling.high_freq_factor"),
        (json!({"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}), "high_freq_factor"),
        (
            json!({"type": "yarn", "rope_type": "linear", "factor": 4.0}),
            "has the `rope_type` `linear` and the `type` `yarn`",
        ),
        (json!([4]), "must be an object"),
    ] {
        let error = read(rope).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    let both = json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0}});
    assert!(refusal(with(&llama(), both)).to_string().contains("`rope_scaling` contradicts `rope_parameters`"));
}

/// Qwen2 ignores `attention_bias`, the other classes use it; a dropout that training does not have is reported.
#[test]
fn biases_follow_the_class_and_dropout_is_reported() {
    let biased = |base: Value| {
        let config = ModelConfig::from_value(with(&base, json!({"attention_bias": true}))).unwrap();
        config
            .parameter_shapes()
            .iter()
            .filter(|shape| shape.path.contains("layers.0") && shape.path.ends_with(".bias"))
            .count()
    };
    assert_eq!([biased(llama()), biased(qwen2()), biased(moonlight())], [4, 3, 2]);
    let config = ModelConfig::from_value(with(&llama(), json!({"attention_dropout": 0.1}))).unwrap();
    assert_eq!(
        config.training_notes(),
        ["`attention_dropout` is 0.1 in config.json, but training has no such dropout"]
    );
    assert!(ModelConfig::from_value(moonlight()).unwrap().training_notes().is_empty());
}

#[test]
fn a_wrapper_may_have_some_keys_of_the_text_model() {
    let wrapped = |outer: Value| {
        let value = with(&json!({"model_type": "kimi_vl", "text_config": llama(), "vision_config": {}}), outer);
        ModelConfig::from_value(value).unwrap()
    };
    assert!(wrapped(json!({"tie_word_embeddings": true})).tie_word_embeddings);
    assert_eq!(wrapped(json!({"eos_token_id": [7], "bos_token_id": 3})).eos_token_id, [7]);
    assert!(
        refusal(json!({"model_type": "kimi_vl", "text_config": with(&llama(), json!({"use_bias": true}))}))
            .to_string()
            .contains("use_bias")
    );
}

/// A text model in an unknown wrapper may be computed differently, and keys inside and outside may contradict each other.
#[test]
fn unknown_wrappers_and_contradicting_keys_are_refused() {
    let wrapped = |outer: Value| {
        ModelConfig::from_value(with(
            &json!({"model_type": "kimi_vl", "text_config": llama(), "vision_config": {}}),
            outer,
        ))
    };
    for name in [json!("llava"), json!("llama4"), json!(null)] {
        let error = wrapped(json!({"model_type": name})).unwrap_err();
        assert!(error.to_string().contains("`text_config` is in a model of the type"), "{error}");
        assert!(error.hint().is_some());
    }
    for (key, value) in [
        ("rope_scaling", json!({"type": "linear", "factor": 4.0})),
        ("rope_theta", json!(5e5)),
        ("vocab_size", json!(98)),
        ("num_hidden_layers", json!(3)),
        ("routed_scaling_factor", json!(2.5)),
        ("original_max_position_embeddings", json!(16)),
        ("final_logit_softcapping", json!(30.0)),
    ] {
        let error = wrapped(json!({key: value})).unwrap_err();
        assert!(matches!(&error, ConfigError::Unsupported { key: named, .. } if named == key), "{error}");
    }
    for outer in [
        json!({"vocab_size": 97, "hidden_size": 48.0}), // as the text model has them
        json!({"rope_scaling": null, "final_logit_softcapping": null, "is_encoder_decoder": false}),
        json!({"ignore_index": -100, "projector_hidden_act": "gelu"}),
    ] {
        wrapped(outer.clone()).unwrap_or_else(|error| panic!("{outer}: {error}"));
    }
}

/// transformers 5.24: the defaults of `DeepseekV3Config`, `DeepseekV2Config`, `LlamaConfig` and `Qwen2Config`, as
/// `C().to_json_string(use_diff=False)` prints them.
#[test]
fn a_key_that_config_json_lacks_has_the_default_of_its_class() {
    let read = |value: &Value| ModelConfig::from_json(&value.to_string()).unwrap();
    let without = |base: Value, keys: &[&str]| {
        let mut value = base;
        value.as_object_mut().unwrap().retain(|key, _| !keys.contains(&key.as_str()));
        value
    };
    let keys = [
        "routed_scaling_factor",
        "n_group",
        "topk_group",
        "first_k_dense_replace",
        "n_shared_experts",
        "norm_topk_prob",
        "scoring_func",
        "topk_method",
        "moe_layer_freq",
        "q_lora_rank",
        "rms_norm_eps",
        "rope_theta",
    ];
    let of = |class: &str| {
        let config = read(&with(&without(moonlight(), &keys), json!({"model_type": class})));
        let AttentionShape::Mla(mla) = &config.attention else { unreachable!("DeepSeek has latent attention") };
        let moe = config.moe.as_ref().unwrap();
        let routing = (moe.scoring, moe.topk_method, moe.norm_topk_prob, moe.routed_scaling_factor);
        let layers = [moe.n_group, moe.topk_group, moe.first_k_dense_replace, moe.n_shared_experts, moe.moe_layer_freq];
        (routing, layers, mla.q_lora_rank, config.rms_norm_eps, config.rope.theta)
    };
    let v3 = ((ScoringFunc::Sigmoid, TopkMethod::NoauxTc, true, 2.5), [8, 4, 3, 1, 1], Some(1536), 1e-6, 1e4);
    assert_eq!([of("deepseek_v3"), of("kimi_k2")], [v3, v3]);
    let v2 = ((ScoringFunc::Softmax, TopkMethod::Greedy, false, 1.0), [1, 1, 0, 2, 1], Some(1536), 1e-6, 1e4);
    assert_eq!(of("deepseek_v2"), v2);
    // A null is not replaced by a default, and a wrapper's text model has the same defaults.
    let null = read(&with(&moonlight(), json!({"q_lora_rank": null, "n_group": null, "topk_group": null})));
    assert_eq!(null.moe.as_ref().map(|moe| (moe.n_group, moe.topk_group)), Some((1, 1)));
    let text = without(moonlight(), &["routed_scaling_factor", "model_type"]);
    let wrapped = read(&json!({"model_type": "kimi_vl", "text_config": text}));
    assert_eq!(wrapped.moe.unwrap().routed_scaling_factor, 2.5);
    // Grouped-query attention: as many key heads as heads in Llama, 32 in Qwen2.
    let heads = |base: &Value| match read(&with(base, json!({"num_attention_heads": 64, "hidden_size": 256}))).attention
    {
        AttentionShape::Gqa(gqa) => (gqa.num_key_value_heads, gqa.head_dim),
        AttentionShape::Mla(_) => unreachable!("these have grouped-query attention"),
    };
    assert_eq!([heads(&llama()), heads(&qwen2())], [(64, 4), (32, 4)]);
    assert_eq!(heads(&with(&qwen2(), json!({"num_key_value_heads": null}))), (64, 4));
    for config in [read(&llama()), read(&with(&qwen2(), json!({"num_key_value_heads": 2})))] {
        assert_eq!((config.rms_norm_eps, config.rope.theta, config.initializer_range), (1e-6, 1e4, 0.02));
        assert!(!config.tie_word_embeddings && !config.mlp_bias);
    }
    // `[model]` in a recipe has the documented defaults of this crate.
    let recipe = ModelConfig::from_value(without(moonlight(), &keys)).unwrap().moe.unwrap();
    assert_eq!((recipe.routed_scaling_factor, recipe.n_group, recipe.first_k_dense_replace), (1.0, 1, 0));
}

#[test]
fn a_token_id_of_minus_one_is_none() {
    let config = ModelConfig::from_value(with(&llama(), json!({"eos_token_id": -1, "bos_token_id": -1}))).unwrap();
    assert_eq!((config.eos_token_id, config.bos_token_id), (vec![], None));
    let config = ModelConfig::from_value(with(&llama(), json!({"eos_token_id": [-1, 3]}))).unwrap();
    assert_eq!(config.eos_token_id, [3]);
    assert!(refusal(with(&llama(), json!({"eos_token_id": -2}))).to_string().contains("`eos_token_id` must be"));
}

#[test]
fn no_key_is_both_read_and_ignored() {
    for key in shape_keys() {
        assert_eq!(moonlight_model::config::ignore_reason(key), None, "{key}");
    }
}
