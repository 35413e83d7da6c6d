//! The parity table: this Muon against published definitions, through Burn's `Linear`.
//!
//! `scripts/fixtures/make_muon_parity.py` makes the fixture and has each definition with its source. The fixture records the
//! versions that it was made with. `cargo test -p moonlight-optim --test parity -- --nocapture` prints the table.

use burn::module::Param;
use burn::nn::{Linear, LinearConfig};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use moonlight_optim::MuonConfig;
use serde::Deserialize;

/// The largest difference allowed after all steps: its norm relative to the norm of the weights' change.
const BUDGET: f64 = 1e-5;

/// CANS is so steep at both ends that PyTorch's own f32 has an error of 4e-6 to 6e-6 against f64 here. Where the fixture has
/// weights in f64, the error may be this many times that of PyTorch's f32: rounding errors depend on the order of the sums.
const TORCH_ERROR_FACTOR: f64 = 5.0;

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
    /// The same in f64, where the error of f32 itself is near the budget.
    exact: Option<Vec<f64>>,
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

fn distance<X: Copy + Into<f64>, Y: Copy + Into<f64>>(one: &[X], other: &[Y]) -> f64 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(x, y)| ((*x).into() - (*y).into()).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn every_scale_table_and_variant_agrees_with_its_source() {
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
        let (mut row, mut budgets) = (Vec::new(), Vec::new());
        for case in fixture.cases.iter().skip(index).step_by(count) {
            let problem = &fixture.problems[case.problem];
            let after = train(&fixture, problem, &case.config);
            let change = distance(&case.weight_after, &problem.weight);
            let (error, budget) = match &case.exact {
                None => (distance(&after, &case.weight_after) / change, BUDGET),
                Some(exact) => {
                    let theirs = distance(&case.weight_after, exact) / change;
                    (distance(&after, exact) / change, TORCH_ERROR_FACTOR * theirs)
                }
            };
            budgets.push(budget);
            row.push(format!("{error:.1e}"));
            if error.is_nan() || error >= budget {
                over.push(format!("{} {} {}: {error:.1e}", case.source, case.what, problem.name));
            }
        }
        let Case { source, what, exact, .. } = &fixture.cases[index];
        let budget = match exact {
            None => format!("{BUDGET:.0e}"),
            Some(_) => {
                let theirs = budgets.iter().map(|budget| format!("{:.1e}", budget / TORCH_ERROR_FACTOR));
                format!("from f64: {TORCH_ERROR_FACTOR} times PyTorch's {}", theirs.collect::<Vec<_>>().join(", "))
            }
        };
        println!("| {source} | {what} | {} | {budget} |", row.join(" | "));
    }
    assert!(over.is_empty(), "over budget: {over:#?}");
}
