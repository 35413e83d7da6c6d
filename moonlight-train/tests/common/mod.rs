//! Small runs of `moonlight train` in temporary folders, and helpers for the tests.

#![allow(dead_code, reason = "each test program uses its part")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use moonlight_convert::Checkpoint;
use tempfile::TempDir;

/// A folder with text to train on and a recipe for a tiny Moonlight.
pub(crate) struct Home {
    dir: TempDir,
}

/// The shape of a tiny Moonlight, without vocabulary and context.
pub(crate) const SHAPE: &str = "\
hidden_size = 24
intermediate_size = 40
num_hidden_layers = 2
num_attention_heads = 2
rms_norm_eps = 1e-5
kv_lora_rank = 8
qk_nope_head_dim = 8
qk_rope_head_dim = 4
v_head_dim = 8
n_routed_experts = 6
num_experts_per_tok = 2
moe_intermediate_size = 12
n_shared_experts = 1
first_k_dense_replace = 1
n_group = 1
topk_group = 1
routed_scaling_factor = 1.0
norm_topk_prob = true
";

const RECIPE: &str = r#"
[run]
name = "tiny"
dir = "RUNS"
seed = 7

[model]
vocab_size = 262
max_position_embeddings = 64
SHAPE
[data]
train = ["TEXT/*.txt"]
valid_fraction = 0.2
tokenizer = "bytes"
sequence_length = 32
cache_dir = "CACHE"

[optimizer]
learning_rate = 2e-3

[schedule]
name = "cosine"
warmup_steps = 1

[train]
steps = 12
batch_size = 2
gradient_accumulation = 2
validate_every = 6
validate_batches = 2
checkpoint_every = 4
probe_every = 5
keep = 2
plots = false
"#;

impl Home {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let home = Self { dir };
        let text = home.path("text");
        fs::create_dir(&text).unwrap();
        for file in 0..12 {
            let sentences: Vec<String> = (0..20)
                .map(|line| format!("File {file} says {} and {} of {line}.", (file * 31 + line) % 17, line * file % 7))
                .collect();
            fs::write(text.join(format!("{file}.txt")), sentences.join("\n")).unwrap();
        }
        let place = |name: &str| home.path(name).display().to_string();
        let recipe = RECIPE
            .replace("SHAPE", SHAPE)
            .replace("RUNS", &place("runs"))
            .replace("TEXT", &place("text"))
            .replace("CACHE", &place("cache"));
        fs::write(home.path("recipe.toml"), recipe).unwrap();
        home
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The folder of a run.
    pub(crate) fn run(&self, name: &str) -> PathBuf {
        self.path("runs").join(name)
    }

    /// `moonlight train recipe.toml --set run.name=NAME ARGUMENTS`.
    pub(crate) fn train(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = moonlight(&["train"]);
        command.arg(self.path("recipe.toml")).args(["--set", &format!("run.name={name}")]).args(arguments);
        command
    }

    /// Trains to the end.
    pub(crate) fn trained(&self, name: &str, arguments: &[&str]) -> PathBuf {
        let output = self.train(name, arguments).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        self.run(name)
    }
}

/// A home with a trained base model and a LoRA recipe for it.
pub(crate) struct Tuned {
    pub(crate) home: Home,
    /// The checkpoint of the base model.
    pub(crate) base: PathBuf,
}

impl Tuned {
    pub(crate) fn new() -> Self {
        let home = Home::new();
        let base =
            checkpoint(&home.trained("base", &["--set", "train.steps=6", "--set", "schedule.warmup_steps=1"]), 6);
        let recipe = fs::read_to_string(home.path("recipe.toml")).unwrap();
        let (head, rest) = recipe.split_once("[model]").unwrap();
        let (_, rest) = rest.split_once("[data]").unwrap();
        let recipe =
            format!("{head}[model]\npath = {base:?}\n[lora]\nrank = 4\nalpha = 8\ntargets = [\"all\"]\n[data]{rest}");
        fs::write(home.path("recipe.toml"), recipe.replace("learning_rate = 2e-3", "learning_rate = 2e-2")).unwrap();
        Self { home, base }
    }

    pub(crate) fn train(&self, name: &str, arguments: &[&str]) -> Output {
        self.home.train(name, arguments).output().unwrap()
    }
}

pub(crate) fn moonlight(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moonlight"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Whether SIGHUP ends a program that a test starts; prints a note if not. It does not if the tests run under `nohup`.
pub(crate) fn hangup_ends_programs() -> bool {
    let ignored = moonlight_convert::hangup_is_ignored();
    if ignored {
        println!("SKIPPED: SIGHUP, which whoever started the tests has ignored");
    }
    !ignored
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The lines of `metrics.jsonl` without the metrics that depend on the clock or the machine.
pub(crate) fn metrics(run: &Path) -> Vec<serde_json::Value> {
    let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    lines
        .lines()
        .map(|line| {
            let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
            let object = line.as_object_mut().unwrap();
            object.remove("tokens_per_second");
            object.remove("memory_mib");
            line
        })
        .collect()
}

/// The largest difference allowed in the loss of any step.
const LOSS_BUDGET: f64 = 2e-3;
/// The largest relative difference allowed in the gradient norm of any step.
const NORM_BUDGET: f64 = 1e-2;

/// A step of the reference implementation.
#[derive(serde::Deserialize)]
pub(crate) struct Step {
    loss: f64,
    grad_norm: f64,
    lr: f64,
}

/// Asserts that the run took these steps, and returns the largest difference of losses and relative difference of norms.
pub(crate) fn follows(run: &Path, steps: &[Step]) -> (f64, f64) {
    follows_within(run, steps, LOSS_BUDGET, NORM_BUDGET)
}

/// [`follows`] with budgets for the difference of losses and the relative difference of norms.
pub(crate) fn follows_within(run: &Path, steps: &[Step], loss_budget: f64, norm_budget: f64) -> (f64, f64) {
    let metrics = metrics(run);
    let ours: Vec<_> = metrics.iter().filter(|line| line["split"] == "train").collect();
    assert_eq!(ours.len(), steps.len());
    let (mut worst, mut worst_norm) = (0.0, 0.0);
    for (step, (ours, expected)) in ours.into_iter().zip(steps).enumerate() {
        let of = |key: &str| ours[key].as_f64().unwrap();
        assert!((of("lr") / expected.lr - 1.0).abs() < 1e-12, "step {step}: {} and {}", of("lr"), expected.lr);
        let difference = (of("loss") - expected.loss).abs();
        assert!(difference <= loss_budget, "step {step}: the loss differs by {difference}");
        worst = f64::max(worst, difference);
        let relative = (of("grad_norm") / expected.grad_norm - 1.0).abs();
        assert!(relative <= norm_budget, "step {step}: the gradient norm differs by {relative}");
        worst_norm = f64::max(worst_norm, relative);
    }
    (worst, worst_norm)
}

/// The checkpoint of a step.
pub(crate) fn checkpoint(run: &Path, step: u64) -> PathBuf {
    run.join("checkpoints").join(format!("step-{step:08}"))
}

/// The names of a run's checkpoints, sorted.
pub(crate) fn checkpoints(run: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(run.join("checkpoints")) else { return Vec::new() };
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Asserts that every tensor and the trainer's state are equal bit for bit.
pub(crate) fn assert_same_checkpoint(a: &Path, b: &Path) {
    let (left, right) = (Checkpoint::open(a).unwrap(), Checkpoint::open(b).unwrap());
    let of = |checkpoint: &Checkpoint| -> Vec<(String, Vec<u8>)> {
        checkpoint.tensors().map(|(name, tensor)| (name.to_owned(), checkpoint.data(tensor).unwrap())).collect()
    };
    let (left, right) = (of(&left), of(&right));
    assert_eq!(left.len(), right.len());
    for ((name, left), (other, right)) in left.iter().zip(&right) {
        assert_eq!(name, other);
        assert!(left == right, "{name} differs");
    }
    assert_eq!(state(a), state(b));
}

/// The trainer's state without the recipe, because the runs have different names.
pub(crate) fn state(dir: &Path) -> serde_json::Value {
    let text = fs::read_to_string(dir.join("trainer.json")).unwrap();
    let mut state: serde_json::Value = serde_json::from_str(&text).unwrap();
    state["identity"]["recipe"].take();
    state
}

/// Asserts that the adapters and the trainer's state of two checkpoints are equal byte for byte.
pub(crate) fn assert_same_adapter(a: &Path, b: &Path) {
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        assert!(fs::read(a.join(file)).unwrap() == fs::read(b.join(file)).unwrap(), "{file} differs");
    }
    assert_eq!(state(a), state(b));
}

/// Asserts that the program failed as documented: exit code 1, one `error:` line that contains `expected`, and after it at
/// most a `hint:` line.
pub(crate) fn assert_fails(output: &Output, expected: &str) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{stderr}");
    assert!(errors[0].contains(expected), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    let after: Vec<&str> = stderr.lines().skip_while(|line| !line.starts_with("error: ")).skip(1).collect();
    assert!(after.len() <= 1 && after.iter().all(|line| line.starts_with("hint: ")), "{stderr}");
}

/// Asserts that a run with an absurd learning rate ends with one error that names its second step and keeps the checkpoint of
/// its first.
pub(crate) fn assert_ends_at_non_finite_loss(more: &[&str]) {
    let home = Home::new();
    let mut arguments = vec![
        "--set",
        "optimizer.learning_rate=1e30",
        "--set",
        "schedule.warmup_steps=0",
        "--set",
        "train.checkpoint_every=1",
    ];
    arguments.extend(more);
    let output = home.train("broken", &arguments).output().unwrap();
    assert_fails(&output, "step 2: the ");
    assert!(text(&output.stderr).contains("step-00000001"));
    assert_eq!(checkpoints(&home.run("broken")), ["step-00000001"]);
}
