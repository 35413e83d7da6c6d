//! Whole runs in this process, to compare the model that they leave with the one they started from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Int, Tensor};
use moonlight_convert::{LoadQuantization, SaveOptions, save};
use moonlight_model::{CausalLm, ModelConfig};
use serde_json::json;

use moonlight_infer::device::ComputeDevice;
use moonlight_infer::load_base;
use moonlight_optim::distributed::Communicator;

use super::setup::{ResumePoint, Setup};
use crate::recipe::{Quantize, Recipe};

const RECIPE: &str = r#"
[run]
name = "NAME"
dir = "HOME/runs"
device = "cpu"
[model]
path = "HOME/model"
[data]
train = ["HOME/tokens.jsonl"]
format = "tokens"
tokenizer = "none"
sequence_length = 16
cache_dir = "HOME/cache"
[optimizer]
learning_rate = 0.1
weight_decay = 0.5
[train]
steps = 5
batch_size = 2
probe_every = 2
plots = false
"#;

/// A folder with a base model in bf16 and training data.
fn home() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    let mut config = ModelConfig::preset("bench-small").unwrap();
    (config.vocab_size, config.num_hidden_layers, config.hidden_size) = (50, 3, 32);
    config.dtype = Some("bfloat16".into());
    let model = config.init(&burn::tensor::Device::default());
    save(&model, &home.path().join("model"), &SaveOptions::default()).unwrap();
    let lines: String = (0..20)
        .map(|line| {
            let tokens: Vec<usize> = (0..40).map(|index| (index * 7 + line * 3) % 50).collect();
            format!("{}\n", json!({"tokens": tokens}))
        })
        .collect();
    std::fs::write(home.path().join("tokens.jsonl"), lines).unwrap();
    home
}

/// The model that a run leaves in memory.
fn trained(home: &Path, name: &str, sets: &[&str]) -> CausalLm {
    let text = RECIPE.replace("HOME", &home.display().to_string()).replace("NAME", name);
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    let recipe = Recipe::parse(&text, &home.join("recipe.toml"), &sets).unwrap();
    let target = ComputeDevice::open("cpu").unwrap();
    let mut setup = Setup::open(&recipe, &target, ResumePoint::Start).unwrap();
    setup.begin(false).unwrap();
    let (mut trainers, _) = setup.into_trainers(&[(Communicator::single_rank(), target)], false).unwrap();
    for _ in 0..5 {
        trainers[0].step().unwrap();
    }
    trainers.remove(0).model.into_inner()
}

/// The bytes of each tensor of a model by its path, without adapters.
fn bits(model: &CausalLm) -> BTreeMap<String, Vec<u8>> {
    #[derive(Default)]
    struct Kept {
        path: Vec<String>,
        bits: BTreeMap<String, Vec<u8>>,
    }
    impl Kept {
        fn keep(&mut self, bytes: &[u8]) {
            if !self.path.iter().any(|name| name.ends_with("lora")) {
                self.bits.insert(self.path.join("."), bytes.to_vec());
            }
        }
    }
    impl ModuleVisitor for Kept {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.keep(param.val().inner().into_data().as_bytes());
        }
        fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
            self.keep(param.val().inner().into_data().as_bytes());
        }
    }
    let mut kept = Kept::default();
    model.visit(&mut kept);
    kept.bits
}

fn tokens() -> Tensor<2, Int> {
    Tensor::from_ints([[3, 1, 4, 1, 5]], &ComputeDevice::open("cpu").unwrap().device)
}

/// The files of a checkpoint.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

#[test]
fn training_adapters_leaves_every_bit_of_the_base_model_unchanged() {
    let home = home();
    let model = home.path().join("model");
    let before = files(&model);
    let device = ComputeDevice::open("cpu").unwrap().device.autodiff();
    for quantize in [Quantize::None, Quantize::Int8, Quantize::Int4] {
        let base = load_base(&model, &device, Some(DType::F32), quantize.on_load()).unwrap();
        let quantize = format!("{quantize:?}").to_lowercase();
        let of_files = bits(&base);
        for optimizer in ["muon", "adamw"] {
            let name = format!("{quantize}-{optimizer}");
            let (quantize, optimizer) = (format!("model.quantize={quantize}"), format!("optimizer.name={optimizer}"));
            let model_of_run = trained(home.path(), &name, &[&quantize, &optimizer, "lora.targets=[\"all\"]"]);
            let of_run = bits(&model_of_run);
            assert!(of_run.len() > 20 && of_run.keys().eq(of_files.keys()), "{name}");
            for (path, bits) in &of_files {
                assert!(of_run[path] == *bits, "{name}: {path}");
            }
            // The adapters were trained: without that, an unchanged base would prove nothing.
            let logits = |model: &CausalLm| model.valid().logits(tokens(), None).into_data();
            assert!(logits(&model_of_run) != logits(&base));
        }
    }
    assert!(files(&model) == before);
}

#[test]
fn frozen_parameters_keep_every_bit_of_the_files() {
    let home = home();
    let model = home.path().join("model");
    let device = ComputeDevice::open("cpu").unwrap().device.autodiff();
    let of_files = bits(&load_base(&model, &device, Some(DType::F32), LoadQuantization::Dequantize).unwrap());
    for optimizer in ["muon", "adamw"] {
        let name = format!("optimizer.name={optimizer}");
        let sets =
            [name.as_str(), "train.freeze=[\"model.layers.1.**\", \"model.embed_tokens.*\"]", "moe.bias_update_rate=0"];
        let of_run = bits(&trained(home.path(), optimizer, &sets));
        assert!(of_run.keys().eq(of_files.keys()));
        for (path, bits) in &of_files {
            let frozen = path.starts_with("layers.1.") || path.starts_with("embed_tokens.");
            let stays = frozen || path.ends_with("correction_bias");
            assert_eq!(of_run[path] == *bits, stays, "{optimizer}: {path}");
        }
    }
}

/// Only ratios of loss weights matter: multiplied by a power of two a run is the same bit for bit, and with weights at the
/// limits of f32 it still trains.
#[test]
fn loss_weights_of_any_size_train() {
    let home = home();
    let mut config = ModelConfig::preset("bench-small").unwrap();
    (config.vocab_size, config.num_hidden_layers, config.hidden_size) = (270, 2, 32);
    let model = config.init(&burn::tensor::Device::default());
    save(&model, &home.path().join("model"), &SaveOptions::default()).unwrap();
    let run = |name: &str, weight: f64, last: f64| {
        let record = |index: usize| {
            let weight = if index == 0 { last } else { weight };
            json!({"messages": [{"role": "user", "content": "ab"},
                {"role": "assistant", "content": format!("c{index}"), "weight": weight}]})
        };
        let lines: String = (0..12).map(|index| format!("{}\n", record(index))).collect();
        std::fs::write(home.path().join(format!("{name}.jsonl")), lines).unwrap();
        let text = RECIPE.replace("HOME", &home.path().display().to_string()).replace("NAME", name);
        let text = text.replace("tokens.jsonl", &format!("{name}.jsonl")).replace("\"tokens\"", "\"chat\"");
        let text = text.replace("\"none\"", "\"bytes-chat\"").replace("0.1", "1e-2");
        let valid = format!("data.valid=[\"{}\"]", home.path().join(format!("{name}.jsonl")).display());
        let text = text.replace("sequence_length = 16", "sequence_length = 64");
        std::fs::copy(home.path().join(format!("{name}.jsonl")), home.path().join("valid.jsonl")).unwrap();
        let valid = valid.replace(&format!("{name}.jsonl"), "valid.jsonl");
        let recipe = Recipe::parse(&text, &home.path().join("recipe.toml"), &[valid]).unwrap();
        let target = ComputeDevice::open("cpu").unwrap();
        let mut setup = Setup::open(&recipe, &target, ResumePoint::Start).unwrap();
        setup.begin(false).unwrap();
        let (mut trainers, _) = setup.into_trainers(&[(Communicator::single_rank(), target)], false).unwrap();
        let mut losses: Vec<f64> = (0..5).map(|_| trainers[0].step().unwrap().loss.unwrap()).collect();
        losses.push(trainers[0].validate().unwrap().unwrap().loss.unwrap());
        assert!(losses.iter().all(|loss| loss.is_finite() && *loss > 0.0), "{name}: {losses:?}");
        (losses, bits(&trainers.remove(0).model.into_inner()))
    };
    let (losses, model) = run("one", 1.0, 1.0);
    for power in [-120, 120] {
        let weight = 2f64.powi(power);
        let (scaled, scaled_model) = run(&format!("power{power}"), weight, weight);
        assert_eq!(scaled, losses);
        assert!(scaled_model == model, "2^{power}");
    }
    for (name, weight, last) in [("least", 1e-40, 1e-40), ("most", 3e38, 3e38), ("both", 1e-40, 3e38)] {
        run(name, weight, last);
    }
}

#[test]
fn the_dashboard_needs_a_terminal_that_can_draw() {
    let draws = |term: Option<&str>, no_color: Option<&str>| {
        super::can_draw(|name| match name {
            "TERM" => term.map(Into::into),
            _ => no_color.map(Into::into),
        })
    };
    assert!(draws(Some("xterm-256color"), None) && draws(Some("screen"), Some("")));
    assert!(!draws(Some("dumb"), None) && !draws(Some(""), None) && !draws(Some("xterm"), Some("1")));
    assert_eq!(draws(None, None), cfg!(not(unix)));
}
