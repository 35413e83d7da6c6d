//! Gradients in bf16 compared with those in f32 of the same weights.
//!
//! `cargo test -p moonlight-model --test bf16 -- --nocapture` prints the differences.

mod common;

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use common::moonlight;
use moonlight_model::{CausalLm, LmBatch, ModelConfig, Probe};
use serde_json::json;

/// The distance of a parameter's gradient in bf16 from that in f32, relative to the norm of the latter: for the parameter in the middle,
/// and for the worst. Every activation and every gradient of one is rounded to 8 bits.
const MEDIAN_BUDGET: f64 = 0.05;
const WORST_BUDGET: f64 = 0.2;

/// Converts the parameters that have gradients.
struct Cast(DType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if param.is_require_grad() { param.map(|tensor| tensor.cast(self.0).detach().require_grad()) } else { param }
    }
}

/// Collects the gradients of parameters by path, in f32.
struct Collect<'a> {
    gradients: &'a burn::tensor::Gradients,
    path: Vec<String>,
    found: BTreeMap<String, Vec<f32>>,
}

impl ModuleVisitor for Collect<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad(self.gradients) {
            self.found.insert(self.path.join("."), gradient.into_data().iter::<f32>().collect());
        }
    }
}

fn gradients(model: &CausalLm, device: &Device) -> BTreeMap<String, Vec<f32>> {
    let (batch, sequence) = (4, 96);
    let numbers = |seed: usize| -> Tensor<2, Int> {
        let values: Vec<i32> =
            (0..batch * sequence).map(|index| ((index * 37 + index / 3 + seed) % 61) as i32).collect();
        Tensor::from_data(TensorData::new(values, [batch, sequence]), device)
    };
    let loss_mask = Tensor::ones([batch, sequence], device);
    let input = LmBatch { tokens: numbers(0), targets: numbers(5), loss_mask, segments: None };
    let gradients = model.loss(&input, 0.0, Probe::default()).loss_sum.backward();
    let mut collect = Collect { gradients: &gradients, path: Vec::new(), found: BTreeMap::new() };
    model.visit(&mut collect);
    collect.found
}

#[test]
fn gradients_in_bf16_are_near_those_in_f32() {
    let device = Device::default().autodiff();
    let dense = ModelConfig::from_value(json!({
        "model_type": "llama", "vocab_size": 61, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "head_dim": 16, "tie_word_embeddings": false,
    }))
    .unwrap();
    // Every expert is chosen, so that rounding cannot send a token to another.
    let all = moonlight(json!({"n_routed_experts": 6, "num_experts_per_tok": 6}));
    for (name, config) in [("moonlight", all), ("llama", dense)] {
        let half = config.init(&device).map(&mut Cast(DType::BF16));
        let found = gradients(&half, &device);
        let expected = gradients(&half.map(&mut Cast(DType::F32)), &device);
        assert_eq!(found.len(), expected.len());
        let mut distances: Vec<(f64, &str)> = Vec::new();
        for ((path, found), expected) in found.iter().zip(expected.values()) {
            let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let difference = norm(&mut found.iter().zip(expected).map(|(found, expected)| found - expected));
            distances.push((difference / norm(&mut expected.iter().copied()), path));
        }
        distances.sort_by(|a, b| a.0.total_cmp(&b.0));
        let ((median, _), (worst, path)) = (distances[distances.len() / 2], distances[distances.len() - 1]);
        println!("{name}: gradients in bf16 differ by {median:.1e} in the median, {worst:.1e} at worst ({path})");
        assert!(median < MEDIAN_BUDGET, "{name}: the median is {median}");
        assert!(worst < WORST_BUDGET, "{name}: {path} differs by {worst}");
    }
}
