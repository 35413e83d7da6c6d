//! The kernel for few tokens against the composition of Burn's operations, for every kind of layer.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::MAX_TOKENS;
use crate::{CausalLm, KvCache, ModelConfig, QuantBits};

/// A small model with latent attention, one dense layer and two layers of experts; some keys are replaced.
fn latent(changes: Value) -> ModelConfig {
    let base = json!({
        "model_type": "deepseek_v3", "vocab_size": 61, "hidden_size": 40, "intermediate_size": 56,
        "num_hidden_layers": 3, "num_attention_heads": 3, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "initializer_range": 0.2, "q_lora_rank": null, "kv_lora_rank": 20, "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6, "v_head_dim": 7, "n_routed_experts": 12, "num_experts_per_tok": 3,
        "moe_intermediate_size": 12, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": true, "routed_scaling_factor": 2.446, "rope_theta": 50000.0,
    });
    with(base, changes)
}

/// A small model with grouped-query attention; some keys are replaced.
fn grouped(changes: Value) -> ModelConfig {
    let base = json!({
        "model_type": "llama", "vocab_size": 61, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,
    });
    with(base, changes)
}

fn with(mut base: Value, changes: Value) -> ModelConfig {
    base.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    ModelConfig::from_value(base).unwrap()
}

/// A config of every kind.
fn families() -> Vec<(&'static str, ModelConfig)> {
    let groups = json!({ "n_group": 4, "topk_group": 2 });
    let softmax = json!({
        "model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": false,
        "routed_scaling_factor": 1.0, "n_shared_experts": null,
    });
    let limited = json!({
        "model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "group_limited_greedy", "n_group": 3,
        "topk_group": 1, "norm_topk_prob": false,
    });
    let window = json!({
        "model_type": "qwen2", "use_sliding_window": true, "sliding_window": 5, "max_window_layers": 1,
        "rope_theta": 1e6,
    });
    vec![
        ("latent", latent(json!({}))),
        ("query latent and biases", latent(json!({ "q_lora_rank": 24, "attention_bias": true }))),
        ("groups of experts", latent(groups)),
        ("softmax", latent(softmax)),
        ("best group", latent(limited)),
        ("tied", latent(json!({ "tie_word_embeddings": true }))),
        (
            "wide",
            latent(json!({ "hidden_size": 192, "kv_lora_rank": 130, "v_head_dim": 64, "num_attention_heads": 9 })),
        ),
        ("more heads than a vector has lanes", latent(json!({ "num_attention_heads": 18 }))),
        ("llama", grouped(json!({}))),
        ("llama with biases, a key head for each query head", {
            grouped(json!({ "attention_bias": true, "mlp_bias": true, "num_key_value_heads": 6 }))
        }),
        ("one key head", grouped(json!({ "num_key_value_heads": 1, "head_dim": 64, "tie_word_embeddings": true }))),
        ("qwen", grouped(json!({ "model_type": "qwen2" }))),
        ("window", grouped(window)),
    ]
}

/// Replaces every parameter, so that norms and biases are not 1 and 0, and casts it.
struct Randomized(DType);

impl ModuleMapper for Randomized {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| {
            let offset = if D == 1 { 0.05 } else { 0.0 };
            let noise = tensor.clone().ones_like().reshape([-1]).cumsum(0).mul_scalar(1.7).sin().mul_scalar(offset);
            (tensor.clone() + noise.reshape(tensor.shape())).cast(self.0)
        })
    }
}

fn model(config: &ModelConfig, dtype: DType) -> CausalLm {
    let device = Device::default();
    device.seed(7);
    config.init(&device).map(&mut Randomized(dtype))
}

/// Which implementation computes.
#[derive(Clone, Copy, PartialEq)]
enum By {
    Kernel,
    Operations,
}

fn cache(model: &CausalLm, dtype: DType, by: By) -> KvCache {
    let mut cache = KvCache::new(model.config(), 3, 600, &Device::default(), dtype);
    if by == By::Operations {
        cache.decoder = Some(None);
    }
    cache
}

/// The logits of calls that mix sequences, positions, prompts and single tokens.
fn logits(model: &CausalLm, dtype: DType, by: By, long: bool) -> Vec<Vec<f32>> {
    let mut cache = cache(model, dtype, by);
    let tokens: Vec<u32> = (0..700).map(|index| (index * 37 + index / 5) % 61).collect();
    if long {
        // Several segments of keys.
        model.extend_hidden(&[&tokens[..530], &tokens[100..120], &[]], &[0, 0, 0], &mut cache);
    }
    let calls: [[&[u32]; 3]; 7] = [
        [&tokens[..1], &[], &[]],
        [&tokens[1..6], &tokens[7..8], &[]],
        [&tokens[6..7], &tokens[9..10], &tokens[3..9]],
        [&[], &[], &tokens[9..10]],
        [&tokens[8..9], &tokens[9..10], &tokens[10..11]],
        [&[], &tokens[20..28], &[]],
        [&tokens[30..33], &tokens[31..33], &tokens[32..35]],
    ];
    let values = |tensor: Tensor<2>| tensor.into_data().iter::<f32>().collect::<Vec<f32>>();
    let mut all: Vec<_> = calls.iter().map(|call| values(model.extend(call, &mut cache))).collect();
    let hidden = model.extend_hidden(&[&tokens[40..44], &[], &tokens[50..52]], &[2, 0, 1], &mut cache).unwrap();
    assert_eq!(hidden.dims()[0], 3);
    all.push(values(model.decode_head(hidden.clone())));
    all.push(values(hidden));
    let tokens = Tensor::from_data([[5, 6], [7, 8], [9, 10]], &Device::default());
    all.push(values(model.decode(tokens, &mut cache).reshape([6, -1])));
    assert_eq!(by == By::Kernel, cache.decoder.is_some_and(|decoder| decoder.is_some()), "the other one computed");
    all
}

/// The largest distance, relative to the largest value of a call.
fn distance(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let of_call = |(a, b): (&Vec<f32>, &Vec<f32>)| {
        assert_eq!(a.len(), b.len());
        assert!(a.iter().chain(b).all(|value| value.is_finite()));
        let largest = a.iter().fold(0.0, |most: f32, value| most.max(value.abs()));
        a.iter().zip(b).fold(0.0, |most: f32, (a, b)| most.max((a - b).abs())) / largest
    };
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(of_call).fold(0.0, f32::max)
}

#[test]
fn the_kernel_computes_what_the_operations_compute() {
    for (name, config) in families() {
        let model = model(&config, DType::F32);
        for long in [false, true] {
            let [ours, expected] = [By::Kernel, By::Operations].map(|by| logits(&model, DType::F32, by, long));
            let distance = distance(&ours, &expected);
            // Layers enlarge the rounding of the first, in some random models more than in others.
            assert!(distance < 2e-4, "{name}: {distance:e}");
        }
    }
}

#[test]
fn with_bf16_weights_the_kernel_is_as_near_to_f32_as_the_operations() {
    // Every token goes to all experts: rounding sends some tokens to other ones, which would hide everything else.
    let all = json!({ "num_experts_per_tok": 12 });
    let wide = json!({
        "num_experts_per_tok": 12, "hidden_size": 192, "kv_lora_rank": 130, "v_head_dim": 64, "num_attention_heads": 9,
    });
    let mut configs = vec![("all experts", latent(all)), ("wide, all experts", latent(wide))];
    let dense = ["llama", "llama with biases, a key head for each query head", "one key head", "qwen", "window"];
    configs.extend(families().into_iter().filter(|(name, _)| dense.contains(name)));
    assert_eq!(configs.len(), 7);
    for (name, config) in configs {
        let half = model(&config, DType::BF16);
        // The same weights, without rounding of activations.
        let exact = half.clone().map(&mut Cast(DType::F32));
        let exact = logits(&exact, DType::F32, By::Operations, false);
        let [ours, operations] = [By::Kernel, By::Operations].map(|by| logits(&half, DType::BF16, by, false));
        let (ours, operations) = (distance(&ours, &exact), distance(&operations, &exact));
        println!("{name}: {ours:e}, operations {operations:e}");
        // The output and the cache are rounded to bf16; the operations also round every intermediate result.
        assert!(ours < 0.1_f32.min(1.5 * operations), "{name}: {ours:e}, operations {operations:e}");
    }
}

struct Cast(DType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(self.0))
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let configs = families();
    for (name, config) in
        configs.iter().filter(|(name, _)| ["wide", "window", "query latent and biases"].contains(name))
    {
        for dtype in [DType::F32, DType::BF16] {
            let model = model(config, dtype);
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| logits(&model, dtype, By::Kernel, true))
            };
            let one = run(1);
            assert_eq!(one, run(2), "{name}");
            assert_eq!(one, run(5), "{name}");
        }
    }
}

#[test]
fn every_level_of_instructions_computes_the_same_within_rounding() {
    let config = latent(json!({}));
    let model = model(&config, DType::F32);
    let expected = logits(&model, DType::F32, By::Operations, true);
    moonlight_simd::testing::at_each_level("decoding of few tokens", |level| {
        let distance = distance(&logits(&model, DType::F32, By::Kernel, true), &expected);
        assert!(distance < 2e-5, "{level}: {distance:e}");
    });
}

#[test]
fn more_tokens_and_models_with_adapters_run_by_the_operations() {
    let config = grouped(json!({}));
    let plain = model(&config, DType::F32);
    let mut cache = cache(&plain, DType::F32, By::Kernel);
    plain.extend(&[&[1; MAX_TOKENS + 1], &[], &[]], &mut cache);
    assert!(cache.decoder.is_none(), "too many tokens");
    let adapted = plain.with_lora(&crate::lora::LoraConfig::new(), 1).unwrap();
    let mut cache = KvCache::new(&config, 1, 8, &Device::default(), DType::F32);
    adapted.extend(&[&[1]], &mut cache);
    assert!(cache.decoder.is_some_and(|decoder| decoder.is_none()));
}

#[test]
fn quantized_models_agree_with_the_operations() {
    // Every token goes to all experts: the choice of a router among near ones would hide everything else.
    let all = json!({ "num_experts_per_tok": 12 });
    let latent_query = json!({ "num_experts_per_tok": 12, "q_lora_rank": 24, "attention_bias": true });
    let configs = [
        ("latent", latent(all)),
        ("query latent and biases", latent(latent_query)),
        ("llama", grouped(json!({ "attention_bias": true, "mlp_bias": true }))),
        ("tied", grouped(json!({ "tie_word_embeddings": true }))),
    ];
    for (name, config) in configs {
        for bits in [QuantBits::Eight, QuantBits::Four] {
            let quantized = model(&config, DType::F32).quantized(bits);
            // The same weights, without rounding of rows.
            let exact = logits(&quantized.clone().dequantized(), DType::F32, By::Operations, true);
            let [ours, operations] = [By::Kernel, By::Operations].map(|by| logits(&quantized, DType::F32, by, true));
            let between = distance(&ours, &operations);
            let (ours, operations) = (distance(&ours, &exact), distance(&operations, &exact));
            println!("{name}, {bits:?}: {ours:e}, operations {operations:e}, between them {between:e}");
            // Both quantize the same rows, so grouped-query attention agrees. Of latent attention the kernel also quantizes the
            // absorbed halves of `kv_b_proj`, and other rows than the operations.
            // Where values differ in their last bit, a row may be rounded to another of 127 steps.
            let bound = if name.contains("latent") { 4.0 * operations } else { 1.5 * operations };
            let off = if name.contains("latent") { ours } else { between };
            assert!(off < bound, "{name}, {bits:?}: {off:e}, bound {bound:e}");
        }
    }
}

#[test]
fn a_cache_in_bf16_serves_a_model_in_f32() {
    for config in [latent(json!({ "num_experts_per_tok": 12 })), grouped(json!({}))] {
        let model = model(&config, DType::F32);
        let exact = logits(&model, DType::F32, By::Operations, true);
        // The operations also round the query.
        for (by, bound) in [(By::Kernel, 0.08), (By::Operations, 0.2)] {
            let distance = distance(&logits(&model, DType::BF16, by, true), &exact);
            println!("{distance:e}");
            assert!(distance < bound, "{distance:e}");
        }
    }
}
