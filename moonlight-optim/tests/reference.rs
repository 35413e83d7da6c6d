//! Steps through Burn's layers, compared with the report's rule in PyTorch and with `torch.optim.Muon`.
//!
//! `scripts/fixtures/make_muon_reference.py` makes the fixture, which records the versions that it was made with.

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use moonlight_optim::{AdamWConfig, MuonConfig, ParameterRules, update_rms};
use serde::Deserialize;

#[derive(Deserialize)]
struct Fixture {
    learning_rate: f64,
    weight_decay: f64,
    batch: usize,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    /// The number of stacked matrices; 0 for a plain layer.
    stack: usize,
    inputs: usize,
    outputs: usize,
    /// `[batch, inputs]`
    x: Vec<f32>,
    /// `[batch, outputs]` for each matrix
    targets: Vec<Vec<f32>>,
    /// `[inputs, outputs]` for each matrix
    weight: Vec<f32>,
    /// `[outputs]` for each matrix
    bias: Vec<f32>,
    /// After each step.
    weight_after: Vec<Vec<f32>>,
    bias_after: Vec<Vec<f32>>,
    torch_weight_after: Option<Vec<Vec<f32>>>,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("fixtures/muon_reference.json")).expect("the fixture is well-formed")
}

fn tensor<const D: usize>(values: &[f32], shape: [usize; D]) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), &Device::default().autodiff())
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// The norm of the difference relative to the norm of `expected`.
fn distance(actual: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference = norm(&mut actual.iter().zip(expected).map(|(x, y)| f64::from(*x) - f64::from(*y)));
    difference / norm(&mut expected.iter().map(|value| f64::from(*value)))
}

fn rules(fixture: &Fixture) -> ParameterRules {
    ParameterRules::muon_except(
        Vec::<String>::new(),
        MuonConfig::new().with_weight_decay(fixture.weight_decay),
        AdamWConfig::new().with_weight_decay(fixture.weight_decay),
    )
}

/// Weights and biases after each step, `[inputs, outputs]` as Burn's layer stores them.
fn train_layer(fixture: &Fixture, case: &Case) -> Vec<(Vec<f32>, Vec<f32>)> {
    let device = Device::default().autodiff();
    let mut layer: Linear = LinearConfig::new(case.inputs, case.outputs).init(&device);
    layer.weight = Param::from_tensor(tensor(&case.weight, [case.inputs, case.outputs]));
    layer.bias = Some(Param::from_tensor(tensor(&case.bias, [case.outputs])));
    let assignment = rules(fixture).assign(&layer).unwrap();
    let mut optimizer = assignment.to_module_optimizer();
    let x = tensor(&case.x, [fixture.batch, case.inputs]);
    let target = tensor(&case.targets[0], [fixture.batch, case.outputs]);
    let mut history = Vec::new();
    for _ in &case.weight_after {
        let loss = layer.forward(x.clone()).sub(target.clone()).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &layer);
        let before = layer.clone();
        layer = optimizer.step(fixture.learning_rate, layer, grads);
        let rms = update_rms(&before, &layer, &assignment, fixture.learning_rate);
        // 0.2 for Muon at full rank, times the singular values of 0.7 to 1.2 that Newton-Schulz gives.
        let full_rank = case.inputs.min(case.outputs) > 1;
        assert_eq!(rms[0].0, "muon");
        assert!((0.13..0.25).contains(&rms[0].1) || !full_rank, "{}: {rms:?}", case.name);
        assert_eq!(rms[1].0, "adamw");
        history.push((values(layer.weight.val()), values(layer.bias.as_ref().unwrap().val())));
    }
    history
}

#[derive(Module, Debug)]
struct Experts {
    weight: Param<Tensor<3>>,
    bias: Param<Tensor<1>>,
}

/// The same for a stack, `[stack, inputs, outputs]`. The biases are concatenated, which makes no difference to AdamW.
fn train_stack(fixture: &Fixture, case: &Case) -> Vec<(Vec<f32>, Vec<f32>)> {
    let Case { stack, inputs, outputs, .. } = *case;
    let mut experts = Experts {
        weight: Param::from_tensor(tensor(&case.weight, [stack, inputs, outputs])),
        bias: Param::from_tensor(tensor(&case.bias, [stack * outputs])),
    };
    let mut optimizer = rules(fixture).assign(&experts).unwrap().to_module_optimizer();
    let x = tensor(&case.x, [1, fixture.batch, inputs]);
    let target = tensor(&case.targets.concat(), [stack, fixture.batch, outputs]);
    let mut history = Vec::new();
    for _ in &case.weight_after {
        let bias = experts.bias.val().reshape([stack, 1, outputs]);
        let product = x.clone().repeat_dim(0, stack).matmul(experts.weight.val()).add(bias);
        // The mean of each layer, summed over the layers.
        let loss = product.sub(target.clone()).square().mean().mul_scalar(stack as f64);
        let grads = GradientsParams::from_grads(loss.backward(), &experts);
        experts = optimizer.step(fixture.learning_rate, experts, grads);
        history.push((values(experts.weight.val()), values(experts.bias.val())));
    }
    history
}

#[test]
fn steps_through_a_layer_agree_with_the_report_and_torch() {
    let fixture = fixture();
    assert!(!fixture.cases.is_empty());
    for case in &fixture.cases {
        let history = if case.stack == 0 { train_layer(&fixture, case) } else { train_stack(&fixture, case) };
        for (step, (weight, bias)) in history.iter().enumerate() {
            let weight_error = distance(weight, &case.weight_after[step]);
            let bias_error = distance(bias, &case.bias_after[step]);
            let torch_error = case.torch_weight_after.as_ref().map(|after| distance(weight, &after[step]));
            println!(
                "{:8} step {step}: {weight_error:.1e} {bias_error:.1e} torch.optim.Muon {torch_error:?}",
                case.name
            );
            assert!(weight_error < 1e-5, "{} step {step}: weight {weight_error}", case.name);
            assert!(bias_error < 1e-5, "{} step {step}: bias {bias_error}", case.name);
            assert!(torch_error.is_none_or(|error| error < 1e-5), "{} step {step}: {torch_error:?}", case.name);
        }
    }
}
