use std::path::Path;

use moonlight_model::config::Llama3Config;

use super::scaling::attention_factors;
use super::*;
use crate::format::gguf::block::BlockType;
use crate::format::gguf::value::Value;

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
