//! Forty steps of a LoRA run compared with torch and peft (`check_lora.py --write fixtures/lora`), from an adapter that peft
//! initialized and saved.
//!
//! `cargo test -p moonlight-train --test parity_lora -- --nocapture` prints the largest differences.

mod common;

use std::path::Path;

use common::{Step, follows, moonlight, text};
use serde::Deserialize;

#[derive(Deserialize)]
struct Reference {
    batch_size: usize,
    rules: Rules,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Rules {
    learning_rate: f64,
    final_learning_rate: f64,
    warmup_steps: u64,
    weight_decay: f64,
    betas: [f64; 2],
    epsilon: f64,
    gradient_clip: f64,
}

#[test]
fn forty_steps_of_a_lora_run_match_peft() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
    let reference = std::fs::read_to_string(fixtures.join("lora/reference.json")).unwrap();
    let Reference { batch_size, rules, steps } = serde_json::from_str(&reference).unwrap();
    let home = tempfile::tempdir().unwrap();
    let recipe = format!(
        r#"
[run]
name = "lora"
dir = {:?}
device = "cpu"
[model]
path = {:?}
dtype = "f32"
[lora]
path = {:?}
[data]
train = [{:?}]
format = "tokens"
tokenizer = "none"
sequence_length = 64
pack = false
shuffle = false
cache_dir = {:?}
[optimizer]
name = "adamw"
learning_rate = {:?}
weight_decay = {:?}
betas = {:?}
epsilon = {:?}
[schedule]
name = "cosine"
warmup_steps = {}
final_fraction = {:?}
[train]
steps = {}
batch_size = {batch_size}
gradient_clip = {:?}
plots = false
[moe]
sequence_balance_weight = 0.0
"#,
        home.path().join("runs"),
        fixtures.join("training/init"),
        fixtures.join("lora/init"),
        fixtures.join("training/tokens.jsonl"),
        home.path().join("cache"),
        rules.learning_rate,
        rules.weight_decay,
        rules.betas,
        rules.epsilon,
        rules.warmup_steps,
        rules.final_learning_rate / rules.learning_rate,
        steps.len(),
        rules.gradient_clip,
    );
    let path = home.path().join("lora.toml");
    std::fs::write(&path, recipe).unwrap();
    let output = moonlight(&["train"]).arg(&path).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let (worst, worst_norm) = follows(&home.path().join("runs/lora"), &steps);
    println!("40 steps of adapters: loss differs by at most {worst:.1e}, gradient norm by {worst_norm:.1e}");
}
