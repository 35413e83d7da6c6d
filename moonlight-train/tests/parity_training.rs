//! Training with the report's settings compared with torch (`make_training_reference.py`): forty steps of the program,
//! and one step of the optimizers through the layers.
//!
//! `cargo test -p moonlight-train --test parity_training -- --nocapture` prints the largest differences.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor};
use common::{Step, checkpoint, follows, follows_within, moonlight, text};
use moonlight_convert::{Checkpoint, SaveOptions, load, save};
use moonlight_model::CausalLm;
use moonlight_optim::{AdamWConfig, MuonConfig, ParameterRules};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::Deserialize;

/// The largest difference allowed in a parameter after one step, relative to its largest element.
const STEP_BUDGET: f64 = 1e-5;
/// The same, relative to the largest change. An expert with few tokens has a gradient of low rank, and Newton-Schulz multiplies
/// the rounding errors outside that rank by up to 3.4445^5: torch in f32 differs from torch in f64 by 1.6e-5 here.
const CHANGE_BUDGET: f64 = 5e-5;

/// The largest difference of losses allowed in forty steps in bf16 from those of torch in f32.
const BF16_LOSS_BUDGET: f64 = 0.05;
/// The largest relative difference of gradient norms.
const BF16_NORM_BUDGET: f64 = 0.2;

#[derive(Deserialize)]
struct Reference {
    batch_size: usize,
    rules: Rules,
    steps: Vec<Step>,
    router_bias: Vec<Vec<f64>>,
}

#[derive(Deserialize)]
struct Rules {
    learning_rate: f64,
    final_learning_rate: f64,
    warmup_steps: u64,
    weight_decay: f64,
    momentum: f64,
    betas: [f64; 2],
    epsilon: f64,
    gradient_clip: f64,
    bias_update_rate: f64,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures")
}

impl Reference {
    fn read() -> Self {
        let text = std::fs::read_to_string(fixtures().join("training/reference.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    fn rules(&self) -> ParameterRules {
        let Rules { weight_decay, momentum, betas, epsilon, .. } = self.rules;
        ParameterRules::moonlight(
            MuonConfig::new().with_momentum(momentum).with_weight_decay(weight_decay),
            AdamWConfig::new().with_betas(betas[0], betas[1]).with_epsilon(epsilon).with_weight_decay(weight_decay),
        )
    }
}

/// Runs the program over the fixture's sequences in their order, four a step, in one or several micro-batches.
fn train(home: &Path, name: &str, dtype: &str, batch_size: usize, passes: usize) -> PathBuf {
    let reference = Reference::read();
    let Rules { learning_rate, final_learning_rate, warmup_steps, weight_decay, momentum, betas, epsilon, .. } =
        reference.rules;
    let Rules { gradient_clip, bias_update_rate, .. } = reference.rules;
    let fixture = fixtures().join("training");
    let recipe = format!(
        r#"
[run]
name = "{name}"
dir = {:?}
device = "cpu"
[model]
path = {:?}
dtype = "{dtype}"
[data]
train = [{:?}]
format = "tokens"
tokenizer = "none"
sequence_length = 64
pack = false
shuffle = false
cache_dir = {:?}
[optimizer]
name = "muon"
learning_rate = {learning_rate:?}
weight_decay = {weight_decay:?}
momentum = {momentum:?}
betas = {betas:?}
epsilon = {epsilon:?}
[schedule]
name = "cosine"
warmup_steps = {warmup_steps}
final_fraction = {:?}
[train]
steps = {}
batch_size = {batch_size}
gradient_accumulation = {passes}
gradient_clip = {gradient_clip:?}
plots = false
[moe]
bias_update_rate = {bias_update_rate:?}
sequence_balance_weight = 0.0
"#,
        home.join("runs"),
        fixture.join("init"),
        fixture.join("tokens.jsonl"),
        home.join("cache"),
        final_learning_rate / learning_rate,
        reference.steps.len(),
    );
    let path = home.join(format!("{name}.toml"));
    std::fs::write(&path, recipe).unwrap();
    let output = moonlight(&["train"]).arg(&path).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    home.join("runs").join(name)
}

#[test]
fn forty_steps_of_the_program_match_torch() {
    let reference = Reference::read();
    let home = tempfile::tempdir().unwrap();
    for (name, batch_size, passes) in [("whole", reference.batch_size, 1), ("accumulated", 1, reference.batch_size)] {
        let run = train(home.path(), name, "f32", batch_size, passes);
        let (worst, worst_norm) = follows(&run, &reference.steps);
        println!("40 steps, {name}: loss differs by at most {worst:.1e}, gradient norm by {worst_norm:.1e}");

        // The bias is a sum of steps of fixed size, so it is equal unless the load of an expert differed.
        let end = read(&Checkpoint::open(checkpoint(&run, reference.steps.len() as u64)).unwrap());
        let biases: Vec<_> = end.iter().filter(|(name, _)| name.ends_with("e_score_correction_bias")).collect();
        assert_eq!(biases.len(), reference.router_bias.len());
        for ((name, bias), expected) in biases.into_iter().zip(&reference.router_bias) {
            let distance = bias.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
            assert!(distance < 1e-6, "{name} differs by {distance}");
        }
    }
}

/// Weights, activations and products in bf16 against torch in f32: what bf16 costs.
#[test]
fn forty_steps_in_bf16_stay_near_torch_in_f32() {
    let reference = Reference::read();
    let home = tempfile::tempdir().unwrap();
    let run = train(home.path(), "half", "bf16", reference.batch_size, 1);
    let (worst, worst_norm) = follows_within(&run, &reference.steps, BF16_LOSS_BUDGET, BF16_NORM_BUDGET);
    println!("40 steps in bf16: loss differs by at most {worst:.1e}, gradient norm by {worst_norm:.1e}");
}

/// The weights of a model by their names in a checkpoint, in f32.
fn weights(model: &CausalLm, directory: &Path) -> BTreeMap<String, Vec<f32>> {
    save(model, directory, &SaveOptions { dtype: Some(DType::F32), ..SaveOptions::default() }).unwrap();
    read(&Checkpoint::open(directory).unwrap())
}

fn read(checkpoint: &Checkpoint) -> BTreeMap<String, Vec<f32>> {
    let tensors = checkpoint.tensors();
    tensors
        .map(|(name, tensor)| {
            let dtype = tensor.dtype.safetensors().unwrap();
            (name.to_owned(), floats(dtype, &checkpoint.data(tensor).unwrap()))
        })
        .collect()
}

fn floats(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::BF16 => bytes.chunks_exact(2).map(|b| f32::from_le_bytes([0, 0, b[0], b[1]])).collect(),
        other => panic!("unexpected dtype {other:?}"),
    }
}

/// The gradients of torch, loaded as the weights of a model. The biases, which have no gradient, are added.
fn as_model(gradients: &Path, weights: &Path, device: &Device) -> CausalLm {
    let directory = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(weights).unwrap();
    let bytes = std::fs::read(gradients).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<(&str, TensorView<'_>)> = file.iter().collect();
    let biases = checkpoint.tensors().filter(|(name, _)| name.ends_with("e_score_correction_bias"));
    let biases: Vec<_> = biases.map(|(name, tensor)| (name, tensor, checkpoint.data(tensor).unwrap())).collect();
    for (name, tensor, data) in &biases {
        all.push((name, TensorView::new(tensor.dtype.safetensors().unwrap(), tensor.shape.clone(), data).unwrap()));
    }
    safetensors::serialize_to_file(all, None, &directory.path().join("model.safetensors")).unwrap();
    std::fs::copy(weights.join("config.json"), directory.path().join("config.json")).unwrap();
    load(directory.path(), device, Some(DType::F32)).unwrap().model
}

/// Visits the model and then its gradients, which are loaded as a model too, and pairs them by path.
#[derive(Default)]
struct ByPath {
    stack: Vec<String>,
    ids: HashMap<String, ParamId>,
    gradients: Option<GradientsParams>,
}

impl ModuleVisitor for ByPath {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.stack.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.stack.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.stack.join(".");
        match &mut self.gradients {
            None => {
                self.ids.insert(path, param.id);
            }
            Some(_) if path.ends_with("e_score_correction_bias") => {}
            Some(gradients) => gradients.register(self.ids[&path], param.val().inner()),
        }
    }
}

/// One step from torch's own gradients. It tests the orientation of weights, the scale, the decay, and that each expert is
/// orthogonalized as a separate matrix.
#[test]
fn one_step_of_the_optimizers_matches_torch() {
    let reference = Reference::read();
    let device = Device::default().autodiff();
    let source = fixtures().join("moonlight-like");
    let model = load(&source, &device, Some(DType::F32)).unwrap().model;
    let mut by_path = ByPath::default();
    model.visit(&mut by_path);
    by_path.gradients = Some(GradientsParams::new());
    as_model(&source.join("gradients.safetensors"), &source, &device).visit(&mut by_path);

    let assignment = reference.rules().assign(&model).unwrap();
    let model = assignment.to_module_optimizer().step(0.02, model, by_path.gradients.unwrap());
    let saved = tempfile::tempdir().unwrap();
    let actual = weights(&model, &saved.path().join("stepped"));

    let before = read(&Checkpoint::open(&source).unwrap());
    let bytes = std::fs::read(fixtures().join("training/one_step.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut worst = [(0.0, String::new()), (0.0, String::new())];
    for (name, view) in file.iter() {
        let (before, actual, expected) = (&before[name], &actual[name], floats(view.dtype(), view.data()));
        let largest = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
        assert!(actual.iter().all(|value| value.is_finite()), "{name}");
        let (change, distance) = (largest(&expected, before), largest(&expected, actual));
        let size = largest(&expected, &vec![0.0; expected.len()]);
        assert!(change > 0.0, "{name} does not move in the reference; decay at least should move it");
        // Without a token an expert only decays, which is so little that the rounding of the weight itself matters.
        let past_rounding = (distance - size * f64::from(f32::EPSILON)).max(0.0);
        for (worst, relative) in worst.iter_mut().zip([distance / size, past_rounding / change]) {
            if relative > worst.0 {
                *worst = (relative, name.to_owned());
            }
        }
    }
    let [(weight, weight_name), (change, change_name)] = worst;
    println!(
        "one step: weights differ by at most {weight:.1e} ({weight_name}), changes by {change:.1e} ({change_name})"
    );
    assert!(weight <= STEP_BUDGET, "{weight_name} differs by {weight}");
    assert!(change <= CHANGE_BUDGET, "the change of {change_name} differs by {change}");
}
