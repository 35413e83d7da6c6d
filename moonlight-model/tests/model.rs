//! The complete model: parameter paths, decoding, packing, padding, load balancing.

mod common;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData, Tolerance};
use common::moonlight;
use moonlight_model::{CausalLm, KvCache, LmBatch, ModelConfig, Probe, Segments};
use serde_json::json;

/// A small config of each supported class and its variants.
fn family() -> Vec<(&'static str, ModelConfig)> {
    let dense = |model_type: &str, tie: bool| {
        ModelConfig::from_value(json!({
            "model_type": model_type, "vocab_size": 61, "hidden_size": 42, "intermediate_size": 56,
            "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.2,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "head_dim": 8, "tie_word_embeddings": tie,
        }))
        .unwrap()
    };
    vec![
        ("moonlight", moonlight(json!({}))),
        (
            "deepseek v3",
            moonlight(json!({"q_lora_rank": 14, "n_routed_experts": 12, "n_group": 4, "topk_group": 2,
                "attention_bias": true, "rope_scaling": {"type": "yarn", "factor": 4,
                "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                "mscale_all_dim": 1.0}})),
        ),
        (
            "deepseek v2",
            moonlight(json!({"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy",
                "norm_topk_prob": false, "routed_scaling_factor": 1.0, "n_shared_experts": 1})),
        ),
        ("llama", dense("llama", false)),
        ("llama with biases", {
            let mut value = dense("llama", false).to_value();
            (value["attention_bias"], value["mlp_bias"]) = (true.into(), true.into());
            ModelConfig::from_value(value).unwrap()
        }),
        ("qwen2", dense("qwen2", true)),
        ("qwen2 with a window", {
            let mut value = dense("qwen2", true).to_value();
            (value["use_sliding_window"], value["sliding_window"]) = (true.into(), 4.into());
            value["max_window_layers"] = 1.into();
            ModelConfig::from_value(value).unwrap()
        }),
    ]
}

fn tokens(batch: usize, sequence: usize, device: &Device) -> Tensor<2, Int> {
    let values: Vec<i32> = (0..batch * sequence).map(|index| (index * 37 + index / 3) as i32 % 61).collect();
    Tensor::from_data(TensorData::new(values, [batch, sequence]), device)
}

fn close<const D: usize>(actual: Tensor<D>, expected: Tensor<D>) {
    actual.into_data().assert_approx_eq(&expected.into_data(), Tolerance::<f32>::rel_abs(1e-4, 1e-4));
}

/// Collects `(path, shape)` of every parameter.
#[derive(Default)]
struct Paths {
    stack: Vec<String>,
    found: Vec<(String, Vec<usize>)>,
}

impl ModuleVisitor for Paths {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.stack.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.stack.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.found.push((self.stack.join("."), param.lazy_shape().to_vec()));
    }
}

#[test]
fn the_module_has_exactly_the_parameters_that_the_config_lists() {
    for (name, config) in family() {
        let mut paths = Paths::default();
        config.init(&Device::default()).visit(&mut paths);
        let mut listed: Vec<_> =
            config.parameter_shapes().into_iter().map(|parameter| (parameter.path, parameter.shape)).collect();
        listed.sort();
        paths.found.sort();
        assert_eq!(paths.found, listed, "{name}");
    }
}

#[test]
fn initial_parameters_have_the_configured_standard_deviation() {
    let config = moonlight(json!({"vocab_size": 6000, "initializer_range": 0.02}));
    let model = config.init(&Device::default());
    let deviation = |tensor: Tensor<1>| tensor.clone().powi_scalar(2).mean().sqrt().into_scalar::<f32>();
    let embedding = deviation(model.embed_tokens.weight.val().flatten(0, 1));
    assert!((embedding - 0.02).abs() < 2e-4, "{embedding}");
    assert_eq!(model.norm.weight.val().into_data(), TensorData::new(vec![1.0f32; 40], [40]));
}

#[test]
fn decoding_in_chunks_equals_one_forward_pass() {
    let device = Device::default();
    for (name, config) in family() {
        let model = config.init(&device);
        let tokens = tokens(2, 23, &device);
        let whole = model.logits(tokens.clone(), None);
        // A prompt, then single tokens, then several tokens after cached ones.
        let mut cache = KvCache::new(&config, 2, 23, &device, model.dtype());
        let mut parts = Vec::new();
        for (start, end) in [(0, 9), (9, 10), (10, 11), (11, 18), (18, 23)] {
            parts.push(model.decode(tokens.clone().slice_dim(1, start..end), &mut cache));
        }
        assert_eq!(cache.len(), 23, "{name}");
        close(Tensor::cat(parts, 1), whole);
        // Token by token from the first one.
        let mut cache = KvCache::new(&config, 2, 3, &device, model.dtype());
        let parts = (0..3).map(|at| model.decode(tokens.clone().slice_dim(1, at..at + 1), &mut cache)).collect();
        close(Tensor::cat(parts, 1), model.logits(tokens.slice_dim(1, 0..3), None));
    }
}

#[test]
fn sequences_of_different_lengths_are_extended_together() {
    let device = Device::default();
    for (name, config) in family() {
        let model = config.init(&device);
        // A text longer than a chunk of `extend`, and short ones.
        let lengths = [3, 530, 1];
        let texts: Vec<Vec<u32>> =
            lengths.iter().map(|&n| (0..n + 4).map(|i| (i * 37 + n) % config.vocab_size as u32).collect()).collect();
        let expected = |text: &[u32]| {
            let count = text.len();
            let text = Tensor::<2, Int>::from_data(TensorData::new(text.to_vec(), [1, count]), &device);
            model.logits(text, None).slice_dim(1, count - 1..count).reshape([1, config.vocab_size])
        };
        let mut cache = KvCache::new(&config, 3, 540, &device, model.dtype());
        let mut known = [0; 3];
        let mut step = |cache: &mut KvCache, ends: [usize; 3]| {
            let new: Vec<&[u32]> = (0..3).map(|i| &texts[i][known[i]..ends[i]]).collect();
            let logits = model.extend(&new, cache);
            let asked = (0..3).filter(|&i| ends[i] > known[i]).map(|i| expected(&texts[i][..ends[i]])).collect();
            close(logits, Tensor::cat(asked, 0));
            known = ends;
        };
        // Two prompts; a token for each and a prompt of one token; one sequence without new tokens.
        step(&mut cache, [3, 530, 0]);
        step(&mut cache, [4, 531, 1]);
        step(&mut cache, [4, 532, 4]);
        assert_eq!(cache.lengths(), [4, 532, 4], "{name}");
        // The second sequence is replaced by another text.
        cache.truncate(1, 0);
        let logits = model.extend(&[&texts[0][4..5], &texts[2][..2], &[]], &mut cache);
        close(logits, Tensor::cat(vec![expected(&texts[0][..5]), expected(&texts[2][..2])], 0));
    }
}

#[test]
fn hidden_states_are_returned_for_the_wanted_tokens_only() {
    let device = Device::default();
    for (name, config) in family() {
        let model = config.init(&device);
        let (lengths, wanted) = ([3, 530, 5], [2, 20, 0]); // the second is longer than a chunk
        let texts: Vec<Vec<u32>> =
            lengths.iter().map(|&n| (0..n).map(|i| (i * 37 + n) % config.vocab_size as u32).collect()).collect();
        let mut cache = KvCache::new(&config, 3, 540, &device, model.dtype());
        let new: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        let hidden = model.extend_hidden(&new, &wanted, &mut cache).unwrap();
        assert_eq!(hidden.dims(), [22, config.hidden_size], "{name}");
        let expected = texts.iter().zip(wanted).filter(|(_, wanted)| *wanted > 0).map(|(text, wanted)| {
            let count = text.len();
            let text = Tensor::<2, Int>::from_data(TensorData::new(text.clone(), [1, count]), &device);
            model.logits(text, None).slice_dim(1, count - wanted..count).reshape([wanted, config.vocab_size])
        });
        close(model.decode_head(hidden), Tensor::cat(expected.collect(), 0));
        assert!(model.extend_hidden(&[&[1], &[], &[2]], &[0, 0, 0], &mut cache).is_none());
        assert_eq!(cache.lengths(), [4, 530, 6]);
    }
}

#[test]
fn packed_documents_do_not_see_each_other() {
    let device = Device::default();
    for (_, config) in family() {
        let model = config.init(&device);
        let tokens = tokens(1, 20, &device);
        let documents: Vec<i32> = [0; 7].into_iter().chain([1; 9]).chain([-1; 4]).collect();
        let packed = model.logits(tokens.clone(), Some(&Segments::new(&documents, 1, 20)));
        for (start, end) in [(0, 7), (7, 16)] {
            let alone = model.logits(tokens.clone().slice_dim(1, start..end), None);
            close(packed.clone().slice_dim(1, start..end), alone);
        }
    }
}

fn batch(documents: Option<&[i32]>, batch: usize, sequence: usize, device: &Device) -> LmBatch {
    let mask: Vec<f32> = (0..batch * sequence)
        .map(|index| if documents.is_some_and(|documents| documents[index] < 0) { 0.0 } else { 1.0 })
        .collect();
    LmBatch {
        tokens: tokens(batch, sequence, device),
        targets: tokens(batch, sequence, device).flip([1]),
        loss_mask: Tensor::from_data(TensorData::new(mask, [batch, sequence]), device),
        segments: documents.map(|documents| Segments::new(documents, batch, sequence)),
    }
}

#[test]
fn padding_does_not_count() {
    let device = Device::default().autodiff();
    let config = moonlight(json!({}));
    let model = config.init(&device);
    let short = batch(None, 1, 6, &device);
    let documents = [0, 0, 0, 0, 0, 0, -1, -1, -1];
    let long = LmBatch {
        tokens: Tensor::cat(vec![short.tokens.clone(), Tensor::zeros([1, 3], &device)], 1),
        targets: Tensor::cat(vec![short.targets.clone(), Tensor::zeros([1, 3], &device)], 1),
        ..batch(Some(&documents), 1, 9, &device)
    };
    let (short, long) = (model.loss(&short, 0.01, Probe::default()), model.loss(&long, 0.01, Probe::default()));
    let value = |tensor: &Tensor<1>| tensor.clone().into_scalar::<f32>();
    assert!((value(&short.loss_sum) - value(&long.loss_sum)).abs() < 1e-4);
    let balance = |loss: &Option<Tensor<1>>| value(loss.as_ref().expect("the weight is not zero"));
    assert!((balance(&short.balance_loss) - balance(&long.balance_loss)).abs() < 1e-6);
    assert_eq!(short.stats.expert_loads(), long.stats.expert_loads());
    let load = short.stats.expert_loads()[1].clone().expect("layer 1 has experts");
    assert_eq!(load.iter().sum::<u64>(), 6 * 2);
    assert!(short.stats.layers[0].expert_load.is_none());
}

#[test]
fn with_equal_scores_the_balance_loss_is_its_weight() {
    // With equal scores, f_i P_i sums to 1 whichever experts are chosen, so each of the two layers of experts adds the weight.
    let device = Device::default();
    let model = zero_routers(moonlight(json!({})).init(&device));
    let output = model.loss(&batch(None, 2, 8, &device), 0.5, Probe::default());
    let loss = output.balance_loss.expect("the weight is not zero").into_scalar::<f32>();
    assert!((loss - 2.0 * 0.5).abs() < 1e-5, "{loss}");
}

fn zero_routers(model: CausalLm) -> CausalLm {
    struct Zero(Vec<String>);
    impl ModuleMapper for Zero {
        fn enter_module(&mut self, name: &str, _container_type: &str) {
            self.0.push(name.to_owned());
        }
        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.0.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let router = self.0.iter().any(|name| name == "router");
            if router { param.map(|tensor| tensor.zeros_like()) } else { param }
        }
    }
    model.map(&mut Zero(Vec::new()))
}

#[test]
fn the_correction_bias_balances_the_load() {
    let device = Device::default();
    let model = moonlight(json!({})).init(&device);
    let input = batch(None, 2, 16, &device);
    // A new router can be balanced by chance. An update with a load of 0 for expert 0 makes it send every token there.
    let idle: Vec<u64> = (0..9).map(|expert| u64::from(expert > 0)).collect();
    let mut model = model.update_router_bias(&[None, Some(idle.clone()), Some(idle)], 1.0);
    let before = model.loss(&input, 0.0, Probe::default()).stats.expert_loads();
    for rate in [0.01; 200].into_iter().chain([0.001; 100]) {
        let loads = model.loss(&input, 0.0, Probe::default()).stats.expert_loads();
        model = model.update_router_bias(&loads, rate);
    }
    let after = model.loss(&input, 0.0, Probe::default()).stats.expert_loads();
    let imbalance = |load: &Vec<u64>| *load.iter().max().unwrap() as f64 * 9.0 / load.iter().sum::<u64>() as f64;
    for layer in 1..3 {
        let (before, after) = (before[layer].as_ref().unwrap(), after[layer].as_ref().unwrap());
        assert!(imbalance(after) < imbalance(before).min(1.6), "{before:?} {after:?}");
    }
}

#[test]
fn all_parameters_but_the_correction_bias_have_a_gradient() {
    let device = Device::default().autodiff();
    for (name, config) in family() {
        // Enough tokens for every expert to be chosen.
        let model = config.init(&device);
        let output = model.loss(&batch(None, 4, 64, &device), 0.01, Probe::default());
        let loss = match output.balance_loss {
            Some(balance) => output.loss_sum + balance,
            None => output.loss_sum,
        };
        let gradients = loss.backward();
        struct Check<'a>(&'a burn::tensor::Gradients, Vec<String>, &'static str);
        impl ModuleVisitor for Check<'_> {
            fn enter_module(&mut self, name: &str, _container_type: &str) {
                self.1.push(name.to_owned());
            }
            fn exit_module(&mut self, _name: &str, _container_type: &str) {
                self.1.pop();
            }
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                let path = self.1.join(".");
                let gradient = param.val().grad(self.0);
                assert_eq!(gradient.is_none(), path.ends_with("e_score_correction_bias"), "{}: {path}", self.2);
                if let Some(gradient) = gradient {
                    assert!(gradient.abs().max().into_scalar::<f32>() > 0.0, "{}: {path} has no gradient", self.2);
                }
            }
        }
        model.visit(&mut Check(&gradients, Vec::new(), name));
    }
}

#[test]
fn the_probe_finds_the_largest_logit() {
    let device = Device::default();
    for (name, config) in family() {
        let model = config.init(&device);
        let quiet = model.loss(&batch(None, 2, 7, &device), 0.0, Probe::default());
        assert!(quiet.stats.layers.iter().all(|layer| layer.max_attention_logit.is_none()), "{name}");
        let probed = model.loss(&batch(None, 2, 7, &device), 0.0, Probe { attention_logits: true });
        for layer in probed.stats.layers {
            let largest = layer.max_attention_logit.expect("it was asked for");
            assert_eq!(largest.dims(), [config.num_attention_heads], "{name}");
            assert!(largest.clone().is_finite().all().into_scalar::<bool>(), "{name}");
            assert_eq!(layer.share_above_100.expect("it was asked for").into_scalar::<f32>(), 0.0, "{name}");
        }
    }
}

#[test]
fn bf16_runs_near_f32() {
    let device = Device::default();
    for (name, config) in family() {
        let model = config.init(&device);
        let tokens = tokens(2, 12, &device);
        let full = model.logits(tokens.clone(), None);
        let half = cast(model, DType::BF16);
        let logits = half.logits(tokens.clone(), None);
        assert_eq!(logits.dtype(), DType::BF16, "{name}");
        // The median and not the mean: a token whose scores are nearly equal may be routed to another expert in bf16, and its
        // logits then differ a lot.
        let differences = (logits.cast(DType::F32) - full.clone()).abs().into_data();
        let mut differences = differences.try_into_vec::<f32>().unwrap();
        differences.sort_by(f32::total_cmp);
        let difference = differences[differences.len() / 2];
        let size = full.abs().mean().into_scalar::<f32>();
        assert!(difference < 0.05 * size, "{name}: {difference} of {size}");
        let mut cache = KvCache::new(&config, 2, 12, &device, half.dtype());
        half.decode(tokens.clone().slice_dim(1, 0..5), &mut cache);
        half.decode(tokens.slice_dim(1, 5..6), &mut cache);
    }
}

fn cast(model: CausalLm, dtype: DType) -> CausalLm {
    struct Cast(DType, Vec<String>);
    impl ModuleMapper for Cast {
        fn enter_module(&mut self, name: &str, _container_type: &str) {
            self.1.push(name.to_owned());
        }
        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.1.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let bias = self.1.last().is_some_and(|name| name == "e_score_correction_bias");
            if bias { param } else { param.map(|tensor| tensor.cast(self.0)) }
        }
    }
    model.map(&mut Cast(dtype, Vec::new()))
}

#[test]
fn a_sequence_may_have_one_token() {
    let device = Device::default().autodiff();
    for (_, config) in family() {
        let model = config.init(&device);
        let output = model.loss(&batch(None, 1, 1, &device), 0.01, Probe { attention_logits: true });
        assert!(output.loss_sum.clone().into_scalar::<f32>().is_finite());
        output.loss_sum.backward();
    }
}

#[test]
fn the_same_input_gives_the_same_bits() {
    let device = Device::default();
    let model = moonlight(json!({})).init(&device);
    let tokens = Tensor::<2>::random([4, 300], Distribution::Uniform(0.0, 60.9), &device).int();
    let first = model.logits(tokens.clone(), None).into_data();
    for _ in 0..3 {
        assert_eq!(model.logits(tokens.clone(), None).into_data(), first);
    }
}
