//! The parity table: other people's definitions of Muon against this one, through Burn's `Linear`.
//!
//! The fixture is made by `scripts/muon_parity.py`, where each definition stands with its source; the versions it was made
//! with stand in it. `cargo test -p moonlight-optim --test parity -- --nocapture` prints the table.

use burn::module::Param;
use burn::nn::{Linear, LinearConfig};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use moonlight_optim::MuonConfig;
use serde::Deserialize;

/// The norm of the difference of the weights over that of the weights' change, after all steps.
const BUDGET: f64 = 1e-5;

/// CANS is so steep at both ends that f32 itself is 4e-6 to 1.4e-4 from f64 with it, in PyTorch as here.
const BUDGET_OF_CANS: f64 = 1e-4;

#[derive(Deserialize)]
struct Fixture {
    learning_rate: f64,
    steps: usize,
    batch: usize,
    problems: Vec<Problem>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Problem {
    name: String,
    inputs: usize,
    outputs: usize,
    /// `[batch, inputs]`
    x: Vec<f32>,
    /// `[batch, outputs]`
    target: Vec<f32>,
    /// `[inputs, outputs]`
    weight: Vec<f32>,
}

#[derive(Deserialize)]
struct Case {
    problem: usize,
    source: String,
    what: String,
    config: MuonConfig,
    /// `[inputs, outputs]`
    weight_after: Vec<f32>,
}

fn tensor(values: &[f32], shape: [usize; 2]) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), &Device::default().autodiff())
}

/// The weight after the steps, `[inputs, outputs]`.
fn train(fixture: &Fixture, problem: &Problem, config: &MuonConfig) -> Vec<f32> {
    let Problem { inputs, outputs, .. } = *problem;
    let device = Device::default().autodiff();
    let mut layer: Linear = LinearConfig::new(inputs, outputs).with_bias(false).init(&device);
    layer.weight = Param::from_tensor(tensor(&problem.weight, [inputs, outputs]));
    let x = tensor(&problem.x, [fixture.batch, inputs]);
    let target = tensor(&problem.target, [fixture.batch, outputs]);
    let mut optimizer = config.init();
    for _ in 0..fixture.steps {
        let loss = layer.forward(x.clone()).sub(target.clone()).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &layer);
        layer = optimizer.step(fixture.learning_rate, layer, grads);
    }
    layer.weight.val().into_data().iter::<f32>().collect()
}

fn distance(one: &[f32], other: &[f32]) -> f64 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum::<f64>().sqrt()
}

fn budget(what: &str) -> f64 {
    if what == "cans" { BUDGET_OF_CANS } else { BUDGET }
}

#[test]
fn every_scale_table_and_variant_is_what_its_source_says() {
    let fixture: Fixture =
        serde_json::from_str(include_str!("fixtures/muon_parity.json")).expect("the fixture is well-formed");
    assert!(fixture.cases.len() >= 3 * 20);
    println!(
        "| source | what | {} | budget |",
        fixture.problems.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(" | ")
    );
    println!("|---|---|---|---|---|---|");
    let count = fixture.cases.len() / fixture.problems.len();
    let mut over = Vec::new();
    for index in 0..count {
        let mut row = Vec::new();
        for case in fixture.cases.iter().skip(index).step_by(count) {
            let problem = &fixture.problems[case.problem];
            let after = train(&fixture, problem, &case.config);
            let error = distance(&after, &case.weight_after) / distance(&case.weight_after, &problem.weight);
            row.push(format!("{error:.1e}"));
            if error.is_nan() || error >= budget(&case.what) {
                over.push(format!("{} {} {}: {error:.1e}", case.source, case.what, problem.name));
            }
        }
        let Case { source, what, .. } = &fixture.cases[index];
        println!("| {source} | {what} | {} | {:.0e} |", row.join(" | "), budget(what));
    }
    assert!(over.is_empty(), "over budget: {over:#?}");
}
