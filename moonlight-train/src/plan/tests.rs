//! Compares the manual's tables of memory with what the code computes.

use std::fs;
use std::path::{Path, PathBuf};

use super::activation_memory::{head_activations, layer_activations};
use super::*;

const PAGE: &str = "docs/src/concepts/memory.md";
const TABLE: &str = "docs/src/guides/what-fits.md";
const MODEL: &str = "path = \"moonshotai/Moonlight-16B-A3B\"";

/// A way to fine-tune Moonlight-16B: its name in the table, the recipe, and the keys to set.
type Way = (&'static str, &'static str, &'static [&'static str]);

const WAYS: [Way; 6] = [
    (
        "all parameters, masters",
        "moonlight-16b-sft.toml",
        &["train.activation_checkpointing=block", "train.loss_chunk_tokens=1024"],
    ),
    ("all parameters, fused", "moonlight-16b-sft-80gb.toml", &[]),
    ("LoRA on everything, bf16", "moonlight-16b-lora-80gb.toml", &[]),
    ("LoRA on everything, 8 bits", "moonlight-16b-lora-80gb.toml", &["model.quantize=int8"]),
    ("LoRA on everything, 4 bits", "moonlight-16b-lora-80gb.toml", &["model.quantize=int4"]),
    ("LoRA on attention, 4 bits", "moonlight-16b-lora-24gb.toml", &[]),
];
const LENGTHS: [usize; 2] = [4096, 8192];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The plan of a way on a GPU.
fn plan((_, file, sets): Way, sequence: usize) -> MemoryPlan {
    let config = ModelConfig::preset("moonlight-16b-a3b").unwrap();
    let model = tempfile::tempdir().unwrap();
    fs::write(model.path().join("config.json"), config.to_json()).unwrap();
    let path = root().join("configs").join(file);
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(MODEL));
    let text = text.replace(MODEL, &format!("path = {:?}", model.path().display().to_string()));
    let mut sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    sets.push(format!("data.sequence_length={sequence}"));
    let recipe = Recipe::parse(&text, &path, &sets).unwrap();
    let settings = MemorySettings::for_recipe(&recipe, &config, false, Threads(1)).unwrap();
    MemoryPlan::new(config, settings)
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.3}", bytes as f64 / 1e9)
}

/// 15,960,110,208.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = (0..digits.len().div_ceil(3))
        .rev()
        .map(|group| {
            let end = digits.len() - 3 * group;
            &digits[end.saturating_sub(3)..end]
        })
        .collect();
    groups.join(",")
}

#[test]
fn the_tables_of_the_pages_are_what_the_code_computes() {
    let page = fs::read_to_string(root().join(PAGE)).unwrap();
    let table = fs::read_to_string(root().join(TABLE)).unwrap();
    let mut missing = Vec::new();
    for way in WAYS {
        let mut both = Vec::new();
        for sequence in LENGTHS {
            let plan = plan(way, sequence);
            let moment = plan.largest_phase();
            let parts: Vec<String> = MemoryPart::ALL.iter().map(|&part| gigabytes(moment.bytes(part))).collect();
            let (name, tokens, total) = (way.0, grouped(sequence as u64), gigabytes(moment.total()));
            let row = format!("| {name} | {tokens} | {} | {} | **{total}** |", moment.name, parts.join(" | "));
            if !page.contains(&row) {
                missing.push(format!("`{PAGE}` lacks {row}"));
            }
            both.push(format!("{:.1}", plan.peak() as f64 / 1e9));
        }
        // This table has one decimal, and some of its lines contain two ways.
        let line =
            |text: &str| table.lines().any(|line| both.iter().all(|of| line.contains(of)) && line.contains(text));
        if !line("GB |") {
            missing.push(format!("`{TABLE}` lacks {both:?} of {}", way.0));
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

#[test]
fn the_numbers_in_the_text_of_the_page_are_what_the_code_computes() {
    let page = fs::read_to_string(root().join(PAGE)).unwrap();
    let mut numbers = Vec::new();
    let mut values = |number: u64| numbers.push(number);
    for sequence in LENGTHS {
        let all = plan(WAYS[0], sequence);
        let moe = layer_activations(&all.config, 1, &all.settings, &[]);
        let dense = layer_activations(&all.config, 0, &all.settings, &[]);
        [moe.kept, moe.transient, dense.kept, dense.transient].into_iter().for_each(&mut values);
        values(sequence as u64 * all.config.hidden_size as u64);
        for way in [WAYS[2], WAYS[4], WAYS[5]] {
            let lora = plan(way, sequence);
            let adapters = lora.settings.lora.as_ref().unwrap().adapter_shapes(&lora.config);
            values(layer_activations(&lora.config, 1, &lora.settings, &adapters).kept);
            let count = |shape: &[usize]| shape.iter().product::<usize>() as u64;
            values(adapters.iter().map(|adapter| count(&adapter.a) + count(&adapter.b)).sum());
        }
    }
    let config = &plan(WAYS[0], 4096).config;
    let (kept, logits) = head_activations(config, 1024, false);
    [config.parameter_count().total, kept, logits].into_iter().for_each(&mut values);
    let missing: Vec<String> = numbers.into_iter().map(grouped).filter(|number| !page.contains(number)).collect();
    assert!(missing.is_empty(), "`{PAGE}` lacks {missing:?}");
}

#[test]
fn adamuon_has_a_second_moment_for_each_value() {
    let text = "[model]\npreset = \"bench-small\"\n[data]\ntrain = [\"x\"]\n[optimizer]\nlearning_rate = 1e-3\n[train]\nsteps = 1\n";
    let state = |variant: &str| {
        let sets = [format!("optimizer.adaptive={variant}")];
        let recipe = Recipe::parse(text, std::path::Path::new("recipe.toml"), &sets).unwrap();
        let config = recipe.model.config(0).unwrap();
        let setting = MemorySettings::for_recipe(&recipe, &config, false, Threads(1)).unwrap();
        MemoryPlan::new(config, setting).largest_phase().bytes(MemoryPart::OptimizerState)
    };
    let (plain, ada) = (state("off"), state("ada_muon"));
    assert_eq!(state("nor_muon"), plain);
    // Twice the state of Muon's matrices; the two moments of AdamW's parameters do not change.
    assert!(ada > plain && ada < 2 * plain, "{plain} {ada}");
}
