//! The peak memory that `moonlight plan` predicts, compared with what training allocates, over a grid of shapes and settings.
//! The test's own allocator counts the bytes.
//!
//! `cargo test --release -p moonlight-train --test plan_memory -- --nocapture` prints the table.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::train::Interrupter;
use moonlight_infer::device::ComputeDevice;
use moonlight_train::plan::{MemoryPlan, Threads};
use moonlight_train::recipe::Recipe;
use moonlight_train::trainer::train;

/// The system's allocator, with counters.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn count(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(live, Ordering::Relaxed);
}

// SAFETY: every call is passed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`, and the layout is passed on unchanged.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the pointer is from `alloc` with this layout, which got it from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const RECIPE: &str = r#"
[run]
name = "NAME"
dir = "HOME/runs"
device = "cpu"
[model]
vocab_size = 1000
hidden_size = 128
intermediate_size = 512
num_hidden_layers = 4
num_attention_heads = 4
max_position_embeddings = 4096
rms_norm_eps = 1e-5
kv_lora_rank = 64
qk_nope_head_dim = 32
qk_rope_head_dim = 16
v_head_dim = 32
n_routed_experts = 8
num_experts_per_tok = 2
moe_intermediate_size = 96
n_shared_experts = 1
first_k_dense_replace = 1
n_group = 1
topk_group = 1
routed_scaling_factor = 1.0
norm_topk_prob = true
[data]
train = ["HOME/tokens.jsonl"]
format = "tokens"
tokenizer = "none"
sequence_length = 256
cache_dir = "HOME/cache"
[optimizer]
learning_rate = 1e-3
[train]
steps = 3
batch_size = 4
gradient_clip = 0.0
validate_every = 0
checkpoint_every = 0
probe_every = 0
plots = false
"#;

/// What a case changes in the recipe.
type Sets = &'static [&'static str];

/// The peak of bytes that training allocates in addition to those before it, and the plan with the predicted peak.
fn measured_and_predicted(home: &Path, name: &str, sets: &[&str]) -> (usize, MemoryPlan) {
    let path = home.join(format!("{name}.toml"));
    let mut text = RECIPE.replace("HOME", &home.display().to_string()).replace("NAME", name);
    if name.starts_with("lora") {
        text = on_weights(home, &text);
    }
    std::fs::write(&path, text).unwrap();
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    let recipe = Recipe::load(&path, &sets).unwrap();
    let plan = MemoryPlan::for_recipe(&recipe, Threads::available()).unwrap();
    let target = ComputeDevice::open("cpu").unwrap();
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    train(&recipe, &target, false, &Interrupter::new()).unwrap();
    (PEAK.load(Ordering::Relaxed) - before, plan)
}

/// The recipe, but starting from weights of its shape with twice the layers.
fn on_weights(home: &Path, text: &str) -> String {
    let (start, end) = (text.find("[model]").unwrap(), text.find("[data]").unwrap());
    let model = home.join("model");
    if !model.exists() {
        let mut shape: toml::Table = toml::from_str(&text[start..end]).unwrap();
        let shape = shape.remove("model").unwrap();
        let mut shape = serde_json::to_value(shape).unwrap();
        shape["model_type"] = "deepseek_v3".into();
        shape["num_hidden_layers"] = 8.into();
        let config = moonlight_model::ModelConfig::from_value(shape).unwrap();
        let model_of = config.init(&burn::tensor::Device::default());
        moonlight_convert::save(&model_of, &model, &moonlight_convert::SaveOptions::default()).unwrap();
    }
    format!("{}[model]\npath = \"{}\"\n[lora]\nrank = 8\n{}", &text[..start], model.display(), &text[end..])
}

const DEEP: Sets = &["model.num_hidden_layers=10", "train.batch_size=8"];
const WIDE_HEAD: Sets = &["model.vocab_size=16384", "train.batch_size=8"];

/// The name of each case, its base, and the changes to it.
const GRID: &[(&str, Sets, Sets)] = &[
    ("activations", DEEP, &[]),
    ("activations-block", DEEP, &["train.activation_checkpointing=\"block\""]),
    ("activations-adamw", DEEP, &["optimizer.name=\"adamw\""]),
    ("activations-long", DEEP, &["data.sequence_length=1024", "train.batch_size=2"]),
    ("activations-bf16", DEEP, &["model.dtype=\"bf16\""]),
    ("activations-bf16-block", DEEP, &["model.dtype=\"bf16\"", "train.activation_checkpointing=\"block\""]),
    ("activations-experts", DEEP, &["model.num_experts_per_tok=6", "model.moe_intermediate_size=256"]),
    (
        "activations-experts-block",
        DEEP,
        &["model.num_experts_per_tok=6", "model.moe_intermediate_size=256", "train.activation_checkpointing=\"block\""],
    ),
    ("lora-attention", &["train.batch_size=8"], &[]),
    ("lora-all", &["train.batch_size=8"], &["lora.targets=[\"all\"]"]),
    ("lora-block", &["train.batch_size=8"], &["train.activation_checkpointing=\"block\""]),
    ("lora-bf16", &["train.batch_size=8"], &["model.dtype=\"bf16\""]),
    ("lora-int8", &["train.batch_size=8"], &["model.quantize=\"int8\""]),
    (
        "lora-int4-block",
        &["train.batch_size=1"],
        &["model.quantize=\"int4\"", "train.activation_checkpointing=\"block\""],
    ),
    ("head", WIDE_HEAD, &[]),
    ("head-chunks", WIDE_HEAD, &["train.loss_chunk_tokens=128"]),
    ("head-chunks-block", WIDE_HEAD, &["train.loss_chunk_tokens=128", "train.activation_checkpointing=\"block\""]),
    ("head-tied", WIDE_HEAD, &["model.tie_word_embeddings=true"]),
    ("weights", &["model.n_routed_experts=64", "model.num_hidden_layers=8"], &["train.batch_size=1"]),
    (
        "weights-accumulated",
        &["model.n_routed_experts=64", "model.num_hidden_layers=8"],
        &["train.batch_size=1", "train.gradient_accumulation=2"],
    ),
    (
        "weights-fused",
        &["model.n_routed_experts=64", "model.num_hidden_layers=8"],
        &["train.batch_size=1", "train.fuse_update=true", "train.activation_checkpointing=\"block\""],
    ),
    (
        "weights-bf16-stochastic",
        &["model.n_routed_experts=64", "model.num_hidden_layers=8"],
        &["train.batch_size=1", "model.dtype=\"bf16\"", "optimizer.rounding=\"stochastic\""],
    ),
    (
        "weights-bf16-master",
        &["model.n_routed_experts=64", "model.num_hidden_layers=8"],
        &["train.batch_size=1", "model.dtype=\"bf16\""],
    ),
    (
        "weights-adamw",
        &["model.n_routed_experts=64", "model.num_hidden_layers=8"],
        &["train.batch_size=1", "optimizer.name=\"adamw\""],
    ),
    (
        "weights-probed",
        &["model.n_routed_experts=64", "model.num_hidden_layers=8"],
        &["train.batch_size=1", "train.probe_every=2"],
    ),
    (
        "weights-probed-adamw",
        &["model.n_routed_experts=64", "model.num_hidden_layers=8"],
        &["train.batch_size=1", "train.probe_every=2", "optimizer.name=\"adamw\""],
    ),
    (
        "weights-probed-fused",
        &["model.n_routed_experts=64", "model.num_hidden_layers=8"],
        &[
            "train.batch_size=1",
            "train.fuse_update=true",
            "train.activation_checkpointing=\"block\"",
            "train.probe_every=2",
        ],
    ),
    (
        "weights-probed-bf16",
        &["model.n_routed_experts=64", "model.num_hidden_layers=8"],
        &["train.batch_size=1", "train.probe_every=2", "model.dtype=\"bf16\""],
    ),
    ("activations-probed", DEEP, &["train.probe_every=2"]),
    ("lora-probed", &["train.batch_size=8"], &["lora.targets=[\"all\"]", "train.probe_every=2"]),
    (
        "weights-bf16-momentum",
        &["model.n_routed_experts=64", "model.num_hidden_layers=8"],
        &["train.batch_size=1", "optimizer.momentum_dtype=\"bf16\""],
    ),
];

#[test]
fn the_predicted_peak_memory_is_within_a_tenth_of_the_measured_one() {
    let home = tempfile::tempdir().unwrap();
    let mut lines = String::new();
    for line in 0..64 {
        let tokens: Vec<usize> = (0..1200).map(|index| (index * 31 + line * 17) % 1000).collect();
        writeln!(lines, "{{\"tokens\": {tokens:?}}}").unwrap();
    }
    std::fs::write(home.path().join("tokens.jsonl"), lines).unwrap();
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let mut table =
        String::from("| case | measured, MiB | predicted, MiB | ratio | largest phase |\n|---|---|---|---|---|\n");
    let mut wrong = Vec::new();
    for (name, base, changes) in GRID {
        let (measured, plan) = measured_and_predicted(home.path(), name, &[*base, *changes].concat());
        let (phase, predicted) = (&plan.largest_phase().name, plan.peak());
        let ratio = predicted as f64 / measured as f64;
        let (measured, predicted) = (mib(measured as f64), mib(predicted as f64));
        writeln!(table, "| {name} | {measured:.1} | {predicted:.1} | {ratio:.3} | {phase} |").unwrap();
        if (ratio - 1.0).abs() > 0.1 {
            wrong.push(*name);
        }
    }
    println!("{table}");
    assert!(wrong.is_empty(), "predictions off by more than a tenth: {wrong:?}");
}
