//! LoRA adapters in a model: initialization, gradients, merging, decoding, dropout.

mod common;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Distribution, Gradients, Int, Tensor, TensorData, Tolerance};
use common::moonlight;
use moonlight_model::lora::{Adapter, LoraConfig, LoraError, LowRankSettings};
use moonlight_model::{CausalLm, KvCache, LmBatch, ModelConfig, Probe};
use serde_json::json;

/// The device has one random generator: tests that draw from it must not run at the same time.
fn lock_generator() -> MutexGuard<'static, ()> {
    static GENERATOR: Mutex<()> = Mutex::new(());
    GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
}

fn family() -> Vec<(&'static str, ModelConfig)> {
    let dense = json!({
        "model_type": "qwen2", "vocab_size": 61, "hidden_size": 42, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "head_dim": 8, "tie_word_embeddings": true,
    });
    vec![
        ("moonlight", moonlight(json!({}))),
        ("deepseek v3", moonlight(json!({"q_lora_rank": 14, "attention_bias": true}))),
        ("qwen2", ModelConfig::from_value(dense).unwrap()),
    ]
}

fn lora(targets: &[&str]) -> LoraConfig {
    LoraConfig {
        rank: 3,
        alpha: 5.0,
        targets: targets.iter().map(|&target| target.to_owned()).collect(),
        ..LoraConfig::default()
    }
}

fn tokens(batch: usize, sequence: usize, device: &Device) -> Tensor<2, Int> {
    let values: Vec<i32> = (0..batch * sequence).map(|index| (index * 37 + index / 3) as i32 % 61).collect();
    Tensor::from_data(TensorData::new(values, [batch, sequence]), device)
}

fn batch(device: &Device) -> LmBatch {
    let tokens = tokens(4, 32, device);
    LmBatch { targets: tokens.clone().flip([1]), tokens, loss_mask: Tensor::ones([4, 32], device), segments: None }
}

/// The model with random `B` in its adapters, as after training.
fn with_random_b(model: CausalLm, dropout: f64) -> CausalLm {
    let device = Device::default();
    let mut adapters = model.adapters();
    for Adapter { b, settings, .. } in &mut adapters {
        let drawn = Tensor::<1>::random([b.num_elements()], Distribution::Normal(0.0, 0.1), &device);
        *b = TensorData::new(drawn.into_data().iter::<f32>().collect::<Vec<_>>(), b.shape().clone());
        settings.dropout = dropout;
    }
    // Merging the old ones first changes nothing: their B is zero.
    model.with_adapters(adapters).unwrap()
}

fn adapted(config: &ModelConfig, targets: &[&str], device: &Device) -> CausalLm {
    with_random_b(config.init(device).with_lora(&lora(targets), 3).unwrap(), 0.0)
}

fn close(actual: Tensor<3>, expected: Tensor<3>) {
    actual.into_data().assert_approx_eq(&expected.into_data(), Tolerance::<f32>::rel_abs(1e-4, 1e-4));
}

/// Collects data of each parameter by its path.
struct ByPath<F> {
    stack: Vec<String>,
    of: F,
    found: BTreeMap<String, TensorData>,
}

trait ReadParam {
    fn read<const D: usize>(&self, param: &Param<Tensor<D>>) -> Option<TensorData>;
}

struct Values;
struct Grads<'a>(&'a Gradients);

impl ReadParam for Values {
    fn read<const D: usize>(&self, param: &Param<Tensor<D>>) -> Option<TensorData> {
        Some(param.val().into_data())
    }
}

impl ReadParam for Grads<'_> {
    fn read<const D: usize>(&self, param: &Param<Tensor<D>>) -> Option<TensorData> {
        param.val().grad(self.0).map(Tensor::into_data)
    }
}

impl<F: ReadParam> ModuleVisitor for ByPath<F> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.stack.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.stack.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(data) = self.of.read(param) {
            self.found.insert(self.stack.join("."), data);
        }
    }
}

fn by_path(model: &CausalLm, of: impl ReadParam) -> BTreeMap<String, TensorData> {
    let mut visitor = ByPath { stack: Vec::new(), of, found: BTreeMap::new() };
    model.visit(&mut visitor);
    visitor.found
}

#[test]
fn a_new_adapter_changes_no_logit_and_depends_on_its_seed_only() {
    let _guard = lock_generator();
    let device = Device::default();
    for (name, config) in family() {
        let base = config.init(&device);
        let model = base.clone().with_lora(&lora(&["all"]), 3).unwrap();
        assert_eq!(
            model.logits(tokens(2, 9, &device), None).into_data(),
            base.logits(tokens(2, 9, &device), None).into_data()
        );
        let again = base.clone().with_lora(&lora(&["all"]), 3).unwrap();
        assert_eq!(by_path(&model, Values), by_path(&again, Values), "{name}");
        let other = base.with_lora(&lora(&["all"]), 4).unwrap();
        assert_ne!(model.adapters(), other.adapters());
        let bound = (config.hidden_size as f32).sqrt().recip();
        let a: Vec<f32> = model.adapters()[0].a.iter::<f32>().collect();
        assert!(a.iter().all(|value| value.abs() <= bound) && a.iter().any(|value| value.abs() > 0.8 * bound));
    }
}

#[test]
fn merged_equals_unmerged_and_decoding_sees_the_adapters() {
    let _guard = lock_generator();
    let device = Device::default();
    for (name, config) in family() {
        let model = adapted(&config, &["all"], &device);
        let base = config.init(&device);
        let tokens = tokens(2, 14, &device);
        let whole = model.logits(tokens.clone(), None);
        let merged = model.clone().merge();
        assert!(!merged.has_adapters() && model.has_adapters(), "{name}");
        assert_eq!(by_path(&merged, Values).len(), by_path(&base, Values).len());
        close(merged.logits(tokens.clone(), None), whole.clone());
        let mut cache = KvCache::new(&config, 2, 14, &device, model.dtype());
        let parts = [(0, 6), (6, 7), (7, 8), (8, 14)]
            .map(|(start, end)| model.decode(tokens.clone().slice_dim(1, start..end), &mut cache));
        close(Tensor::cat(parts.to_vec(), 1), whole);
    }
}

/// Makes every parameter require a gradient.
struct Thaw;

impl ModuleMapper for Thaw {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.set_require_grad(true)
    }
}

/// The gradients of adapters follow by the chain rule from that of the merged weight: `dA = s dW B^T`, `dB = s A^T dW`.
#[test]
fn adapters_have_the_gradients_of_the_merged_weight_and_nothing_else_has_any() {
    let _guard = lock_generator();
    let device = Device::default().autodiff();
    for (name, config) in family() {
        let model = adapted(&config, &["all"], &device);
        let gradients = model.loss(&batch(&device), 0.0, Probe::default()).loss_sum.backward();
        let ours = by_path(&model, Grads(&gradients));
        assert!(ours.keys().all(|path| path.contains("lora")), "{name}: {:?}", ours.keys());
        assert_eq!(ours.len(), 2 * model.adapters().len(), "{name}");

        let merged = model.clone().merge().map(&mut Thaw);
        let gradients = merged.loss(&batch(&device), 0.0, Probe::default()).loss_sum.backward();
        let theirs = by_path(&merged, Grads(&gradients));
        let plain = Device::default();
        for Adapter { path, a, b, settings } in model.adapters() {
            let experts = path.contains(".experts.");
            let (weight, own) = match experts {
                true => (path.clone(), path.replace("_proj", "_lora")),
                false => (format!("{path}.weight"), format!("{path}.lora")),
            };
            // A matrix becomes a stack of one.
            let stack = |data: &TensorData| {
                let tensor = Tensor::<1>::from_data(
                    TensorData::new(data.iter::<f32>().collect::<Vec<_>>(), [data.num_elements()]),
                    &plain,
                );
                let shape = data.shape().to_vec();
                let [height, width] = [shape[shape.len() - 2], shape[shape.len() - 1]];
                tensor.reshape([data.num_elements() / (height * width), height, width])
            };
            let scale = settings.alpha / 3.0;
            let change = stack(&theirs[&weight]);
            let expected_a = change.clone().matmul(stack(&b).swap_dims(1, 2)) * scale;
            let expected_b = stack(&a).swap_dims(1, 2).matmul(change) * scale;
            for (part, expected) in [("a", expected_a), ("b", expected_b)] {
                let actual = stack(&ours[&format!("{own}.{part}")]);
                let size = expected.clone().abs().max().into_scalar::<f32>();
                let difference = (actual - expected).abs().max().into_scalar::<f32>();
                assert!(size > 0.0 && difference < 1e-4 * size, "{name}: {path}.{part}: {difference} of {size}");
            }
        }
    }
}

#[test]
fn rslora_scales_by_the_root_of_the_rank() {
    let settings = LowRankSettings { alpha: 8.0, rslora: false, dropout: 0.0 };
    assert_eq!(settings.scale(16), 0.5);
    assert_eq!(LowRankSettings { rslora: true, ..settings }.scale(16), 2.0);
}

#[test]
fn dropout_follows_its_seed_and_is_off_without_one() {
    let _guard = lock_generator();
    let device = Device::default();
    let model = with_random_b(moonlight(json!({})).init(&device).with_lora(&lora(&["all"]), 3).unwrap(), 0.5);
    let logits = |seed: Option<u64>| {
        model.set_dropout_seed(seed);
        model.logits(tokens(2, 9, &device), None).into_data()
    };
    let (off, one, two) = (logits(None), logits(Some(1)), logits(Some(2)));
    assert_eq!(logits(Some(1)), one);
    assert_ne!(one, two);
    assert_ne!(one, off);
    assert_eq!(logits(None), off);
    close(model.clone().merge().logits(tokens(2, 9, &device), None), model.logits(tokens(2, 9, &device), None));
}

/// A resumed run loads its adapters, and must draw the masks that the uninterrupted run would have drawn.
#[test]
fn loaded_adapters_have_the_same_dropout_masks() {
    struct MoveB(bool);
    impl ModuleMapper for MoveB {
        fn enter_module(&mut self, name: &str, _container_type: &str) {
            self.0 = name == "b";
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if self.0 { param.map(|b| b + 0.1) } else { param }
        }
    }
    let _guard = lock_generator();
    let device = Device::default();
    let base = moonlight(json!({})).init(&device);
    for targets in [&["all"][..], &["experts", "self_attn.o_proj"]] {
        let mut config = lora(targets);
        config.dropout = 0.5;
        let fresh = base.clone().with_lora(&config, 3).unwrap().map(&mut MoveB(false));
        let read = base.clone().with_adapters(fresh.adapters()).unwrap();
        let logits = |model: &CausalLm| {
            model.set_dropout_seed(Some(7));
            model.logits(tokens(2, 9, &device), None).into_data()
        };
        assert_eq!(logits(&read), logits(&fresh), "{targets:?}");
        fresh.set_dropout_seed(None);
        assert_ne!(fresh.logits(tokens(2, 9, &device), None).into_data(), logits(&read), "{targets:?}");
    }
}

/// For a linear layer, the mean of outputs over many masks is the output without dropout.
#[test]
fn dropout_keeps_the_mean() {
    let _guard = lock_generator();
    let device = Device::default();
    let model = with_random_b(
        moonlight(json!({})).init(&device).with_lora(&lora(&["layers.0.self_attn.o_proj"]), 3).unwrap(),
        0.3,
    );
    let projection = match &model.layers[0].self_attn {
        moonlight_model::attention::Attention::Mla(attention) => attention.o_proj.clone(),
        moonlight_model::attention::Attention::Gqa(_) => panic!("Moonlight has latent attention"),
    };
    let x = Tensor::<2>::random([1, 21], Distribution::Normal(0.0, 1.0), &device);
    let expected = projection.forward(x.clone());
    let mut mean = expected.zeros_like();
    let draws = 4000;
    for seed in 0..draws {
        model.set_dropout_seed(Some(seed));
        mean = mean + projection.forward(x.clone()) / f64::from(draws as u32);
    }
    let size = expected.clone().abs().mean().into_scalar::<f32>();
    let difference = (mean - expected).abs().mean().into_scalar::<f32>();
    assert!(difference < 0.03 * size, "{difference} of {size}");
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let _guard = lock_generator();
    let device = Device::default();
    let base = moonlight(json!({})).init(&device);
    let error = base.clone().with_lora(&lora(&["q_proj", "qproj"]), 0).unwrap_err();
    assert_eq!(error.to_string(), "the target `qproj` matches no projection of the model");
    assert!(error.hint().unwrap().contains("kv_a_proj_with_mqa"));
    assert!(matches!(base.clone().with_lora(&lora(&["q[0"]), 0), Err(LoraError::Target { .. })));
    let mut adapters = base.clone().with_lora(&lora(&["experts"]), 0).unwrap().adapters();
    adapters.truncate(1);
    let mut elsewhere = adapters.clone();
    elsewhere[0].path = "layers.0.mlp.experts.gate_proj".into();
    assert!(matches!(base.clone().with_adapters(elsewhere), Err(LoraError::NoSuchProjection { .. })));
    adapters[0].b = TensorData::zeros::<f32, _>([9, 2, 12]);
    let error = base.with_adapters(adapters).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the adapter of `layers.1.mlp.experts.gate_proj` has A [9, 40, 3] and B [9, 2, 12], which do not fit a weight \
         of [9, 40, 12]"
    );
}
