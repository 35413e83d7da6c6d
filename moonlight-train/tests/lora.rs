//! `[lora]` and `train.freeze`, from the recipe to the merged model.

mod common;

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use common::{Home, Tuned, assert_fails, assert_same_adapter, checkpoint, checkpoints, metrics, moonlight, text};
use moonlight_convert::{Checkpoint, load};
use serde_json::Value;

fn losses(run: &Path, split: &str) -> Vec<f64> {
    let lines = metrics(run).into_iter().filter(|line| line["split"] == split);
    lines.map(|line| line["loss"].as_f64().unwrap()).collect()
}

#[test]
fn adapters_are_trained_and_the_base_model_is_unchanged() {
    let tuned = Tuned::new();
    for optimizer in ["muon", "adamw"] {
        let name = format!("optimizer.name={optimizer}");
        let run = tuned.home.trained(optimizer, &["--set", &name]);
        let (train, valid) = (losses(&run, "train"), losses(&run, "valid"));
        assert!(valid[1] < train[0] && train[11] < train[0], "{optimizer}: {train:?} {valid:?}");
        assert_eq!(checkpoints(&run), ["step-00000008", "step-00000012"]);
        let last = checkpoint(&run, 12);
        for file in
            ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "optimizer-00000-of-00001.bpk"]
        {
            assert!(last.join(file).exists(), "{file}");
        }
        assert!(!last.join("model.safetensors").exists() && !last.join("config.json").exists());
        // The optimizer has adapters only.
        let table = fs::read_to_string(run.join("optimizer.txt")).unwrap();
        let rows: Vec<&str> =
            table.lines().filter(|line| line.starts_with("layers.") || line.contains("embed")).collect();
        assert!(rows.iter().all(|row| row.contains("lora.") != row.contains("buffer")), "{table}");
    }
}

#[test]
fn an_interrupted_run_with_dropout_resumes_bit_for_bit() {
    let tuned = Tuned::new();
    let dropout = ["--set", "lora.dropout=0.2", "--set", "schedule.total_steps=12"];
    let whole = tuned.home.trained("whole", &dropout);
    let parts = tuned.home.trained("parts", &[&dropout[..], &["--set", "train.steps=5"]].concat());
    tuned.home.trained("parts", &[&dropout[..], &["--resume"]].concat());
    assert_same_adapter(&checkpoint(&whole, 12), &checkpoint(&parts, 12));
    assert_eq!(losses(&whole, "train"), losses(&parts, "train"));
    // Recomputed layers drop the same values: the first losses are equal, and later ones almost.
    let again =
        tuned.home.trained("again", &[&dropout[..], &["--set", "train.activation_checkpointing=block"]].concat());
    assert_eq!(losses(&again, "train")[0], losses(&whole, "train")[0]);
    let apart = losses(&again, "train").into_iter().zip(losses(&whole, "train")).map(|(a, b)| (a - b).abs());
    assert!(apart.fold(0.0, f64::max) < 1e-3);
    // Without dropout the losses differ.
    let without = tuned.home.trained("without", &dropout[2..]);
    assert_ne!(losses(&without, "train"), losses(&whole, "train"));

    // A damaged checkpoint is renamed, and the one before is used.
    let weights = checkpoint(&parts, 12).join("adapter_model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let output = tuned.train("parts", &[&dropout[..], &["--resume"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("is damaged: `adapter_model.safetensors` has "));
    assert_same_adapter(&checkpoint(&whole, 12), &checkpoint(&parts, 12));
}

#[test]
fn an_adapter_generates_and_merges() {
    let tuned = Tuned::new();
    let run = tuned.home.trained("speaker", &[]);
    let (run, base) = (run.display().to_string(), tuned.base.display().to_string());
    let merged = tuned.home.path("merged").display().to_string();
    let output = moonlight(&["merge", "--adapter", &run, "--output", &merged]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    // The merged model is a model like any other, with the base's tokenizer.
    let config = |dir: &str| Checkpoint::open(dir).unwrap().config().clone();
    assert_eq!(config(&merged), config(&base));
    load(Path::new(&merged), &Device::default(), None).unwrap();

    let data = tuned.home.path("data.jsonl");
    fs::write(&data, "{\"text\": \"File 3 says 4 and\"}\n").unwrap();
    let score = |model: &[&str]| -> Vec<f64> {
        let output = moonlight(&["score", "--data", data.to_str().unwrap()]).args(model).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let line: Value = serde_json::from_str(text(&output.stdout).trim()).unwrap();
        line["logprobs"].as_array().unwrap()[1..].iter().map(|value| value.as_f64().unwrap()).collect()
    };
    let adapted = score(&["--model", &run]);
    assert_eq!(score(&["--model", &base, "--adapter", &run]), adapted);
    let apart = |other: Vec<f64>| other.iter().zip(&adapted).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(apart(score(&["--model", &merged])) < 1e-4);
    assert!(apart(score(&["--model", &base])) > 1e-3);
    let generate = |model: &[&str]| {
        let prompt = ["generate", "--prompt", "File", "--max-new-tokens", "8"];
        let output = moonlight(&prompt).args(model).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    assert_eq!(generate(&["--model", &merged]), generate(&["--model", &run]));

    // What cannot be merged is an error, and leaves no file.
    let again = moonlight(&["merge", "--adapter", &run, "--output", &merged]).output().unwrap();
    assert_fails(&again, "already exists");
    let elsewhere = tuned.home.path("elsewhere").display().to_string();
    let none = moonlight(&["merge", "--adapter", &base, "--output", &elsewhere]).output().unwrap();
    assert_fails(&none, "has no `adapter_config.json`");
    fs::rename(&tuned.base, tuned.base.with_file_name("moved")).unwrap();
    let lost = moonlight(&["merge", "--adapter", &run, "--output", &elsewhere]).output().unwrap();
    assert_fails(&lost, "which does not exist");
    assert!(!Path::new(&elsewhere).exists());
}

#[test]
fn adapters_are_trained_on_a_quantized_base() {
    let tuned = Tuned::new();
    let whole = losses(&tuned.home.trained("whole", &[]), "valid");
    for (bits, near) in [("int8", 0.02), ("int4", 0.2)] {
        let set = format!("model.quantize={bits}");
        let run = tuned.home.trained(bits, &["--set", &set]);
        let (train, valid) = (losses(&run, "train"), losses(&run, "valid"));
        assert!(valid[1] < train[0] && train[11] < train[0], "{bits}: {train:?} {valid:?}");
        assert!((valid[1] - whole[1]).abs() < near, "{bits}: {valid:?} {whole:?}");
        // A resumed run quantizes the base to the same weights again.
        let schedule = ["--set", &set, "--set", "schedule.total_steps=12"];
        let parts = format!("{bits}-parts");
        tuned.home.trained(&parts, &[&schedule[..], &["--set", "train.steps=7"]].concat());
        let parts = tuned.home.trained(&parts, &[&schedule[..], &["--resume"]].concat());
        assert_same_adapter(&checkpoint(&run, 12), &checkpoint(&parts, 12));
        let model = run.display().to_string();
        let command = ["generate", "--prompt", "File", "--max-new-tokens", "4", "--model", &model, "--quantize", bits];
        let output = moonlight(&command).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
}

#[test]
fn contradicting_keys_of_a_recipe_are_refused() {
    let tuned = Tuned::new();
    for (set, expected) in [
        ("lora.targets=[\"qproj\"]", "`lora.targets`: the target `qproj` matches no projection of the model"),
        ("lora.targets=[]", "`lora.targets` is empty"),
        ("lora.rank=0", "`lora.rank` is 0; it must be from 1 to 4096"),
        ("lora.dropout=1", "`lora.dropout` is 1; it must be at least 0 and below 1"),
        ("optimizer.qk_clip=10", "`optimizer.qk_clip` changes weights that `[lora]` freezes"),
        ("moe.bias_update_rate=0.1", "`moe.bias_update_rate` changes the routers of a model that `[lora]` freezes"),
        ("train.freeze=[\"**.mlp.**\"]", "`train.freeze` has no effect with `[lora]`"),
        ("model.quantize=int3", "`model.quantize` is `int3`; it must be one of: none, int8, int4"),
        ("lora.rnak=3", "unknown key `lora.rnak` (the nearest known key is `lora.rank`)"),
    ] {
        assert_fails(&tuned.train("refused", &["--set", set]), expected);
        assert!(!tuned.home.run("refused").exists(), "{set}");
    }
    let home = Home::new();
    assert_fails(&home.train("shape", &["--set", "lora.rank=4"]).output().unwrap(), "`[lora]` needs the weights");
    let frozen = home.train("bits", &["--set", "model.quantize=int8"]).output().unwrap();
    assert_fails(&frozen, "`model.quantize` is for frozen weights");
}

#[test]
fn frozen_parameters_are_unchanged_bit_for_bit() {
    let home = Home::new();
    let start = home.trained("start", &["--set", "train.steps=1"]);
    let path = format!("model.path={:?}", checkpoint(&start, 1).display().to_string());
    let recipe = fs::read_to_string(home.path("recipe.toml")).unwrap();
    let (head, rest) = recipe.split_once("[model]").unwrap();
    let (_, rest) = rest.split_once("[data]").unwrap();
    fs::write(home.path("recipe.toml"), format!("{head}[data]{rest}")).unwrap();
    let patterns =
        r#"train.freeze=["**.mlp.gate.weight", "model.embed_tokens.*", "model.layers.1.mlp.experts.*.up_proj.weight"]"#;
    let run = home.trained("frozen", &["--set", &path, "--set", patterns]);
    let (before, after) =
        (Checkpoint::open(checkpoint(&start, 1)).unwrap(), Checkpoint::open(checkpoint(&run, 12)).unwrap());
    let mut stayed = Vec::new();
    for ((name, old), (_, new)) in before.tensors().zip(after.tensors()) {
        if before.data(old).unwrap() == after.data(new).unwrap() {
            stayed.push(name.to_owned());
        }
    }
    let mut expected: Vec<String> =
        (0..6).map(|expert| format!("model.layers.1.mlp.experts.{expert}.up_proj.weight")).collect();
    expected.extend(["model.embed_tokens.weight", "model.layers.1.mlp.gate.weight"].map(str::to_owned));
    // The router bias has its own update rule, whose rate is 0 by default when a run starts from weights.
    expected.push("model.layers.1.mlp.gate.e_score_correction_bias".into());
    expected.sort();
    stayed.sort();
    assert_eq!(stayed, expected);

    for (pattern, expected) in [
        ("nothing.*", "`train.freeze`: `nothing.*` matches no parameter of the model"),
        ("model.layers.1.mlp.experts.2.**", "matches 1 of the 6 experts of `layers.1.mlp.experts.gate_proj`"),
        ("**", "`train.freeze`: the whole model is frozen"),
        ("layers.[0", "`train.freeze`: the pattern `layers.[0` is malformed"),
    ] {
        let set = format!("train.freeze=[{pattern:?}]");
        let output = home.train("refused", &["--set", &path, "--set", &set]).output().unwrap();
        assert_fails(&output, expected);
        assert!(text(&output.stderr).contains("hint: "), "{pattern}");
        assert!(!home.run("refused").exists(), "{pattern}");
    }
}

/// peft's `all-linear` adapts routers too; here the recipe has to name them.
#[test]
fn a_router_is_adapted_if_the_recipe_names_it() {
    let tuned = Tuned::new();
    let run = tuned.home.trained("routed", &["--set", "lora.targets=[\"router\", \"attention\"]"]);
    let dir = checkpoint(&run, 12);
    let bytes = fs::read(dir.join("adapter_model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let moved = file.tensor("base_model.model.model.layers.1.mlp.gate.lora_B.weight").unwrap();
    assert!(moved.data().iter().any(|&byte| byte != 0), "B begins as zero");
    let config: Value = serde_json::from_slice(&fs::read(dir.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["target_parameters"], serde_json::json!(["mlp.gate.weight"]));
    // The merged model computes the same.
    let (run, merged) = (run.display().to_string(), tuned.home.path("merged").display().to_string());
    let output = moonlight(&["merge", "--adapter", &run, "--output", &merged, "--dtype", "f32"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let data = tuned.home.path("data.jsonl");
    fs::write(&data, "{\"text\": \"File 3 says 4 and\"}\n").unwrap();
    let score = |model: &str| -> Vec<f64> {
        let output = moonlight(&["score", "--data", data.to_str().unwrap(), "--model", model]).output().unwrap();
        let line: Value = serde_json::from_str(text(&output.stdout).trim()).unwrap();
        line["logprobs"].as_array().unwrap()[1..].iter().map(|value| value.as_f64().unwrap()).collect()
    };
    let apart = score(&run).into_iter().zip(score(&merged)).map(|(a, b)| (a - b).abs());
    assert!(apart.fold(0.0, f64::max) < 1e-4);
    // Another run can start from this adapter.
    let path = format!("lora.path={dir:?}");
    tuned.home.trained("onwards", &["--set", &path, "--set", "train.steps=2", "--set", "schedule.warmup_steps=1"]);
}

/// Every command that reads an adapter reports what is wrong with it.
#[test]
fn every_command_refuses_an_invalid_adapter() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
    let llama = fixtures.join("llama").display().to_string();
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name).display().to_string();
    let (data, empty) = (at("data.jsonl"), home.path().join("empty"));
    fs::write(&data, "{\"tokens\": [5, 9, 31]}\n").unwrap();
    fs::create_dir(&empty).unwrap();
    fs::copy(fixtures.join("lora/kinds/mica/adapter_config.json"), empty.join("adapter_config.json")).unwrap();
    fs::write(empty.join("adapter_model.safetensors"), b"\x02\0\0\0\0\0\0\0{}").unwrap();
    let empty = empty.display().to_string();
    let alora = fixtures.join("lora/kinds/alora").display().to_string();
    for (adapter, expected) in [(&empty, "contains no tensors"), (&alora, "`alora_invocation_tokens`")] {
        let score = moonlight(&["score", "--model", &llama, "--adapter", adapter, "--data", &data]).output().unwrap();
        assert_fails(&score, expected);
        let merge = ["merge", "--model", &llama, "--adapter", adapter, "--output", &at("merged")];
        assert_fails(&moonlight(&merge).output().unwrap(), expected);
        assert!(!home.path().join("merged").exists());
    }
    // DoRA can be merged, but not trained.
    let dora = fixtures.join("lora/kinds/dora").display().to_string();
    let merged =
        moonlight(&["merge", "--model", &llama, "--adapter", &dora, "--output", &at("dora")]).output().unwrap();
    assert!(merged.status.success(), "{}", text(&merged.stderr));
    let recipe = format!(
        "[run]\nname = \"x\"\ndir = {:?}\ndevice = \"cpu\"\n[model]\npath = {llama:?}\ndtype = \"f32\"\n[lora]\npath = \
         {dora:?}\n[data]\ntrain = [{data:?}]\nformat = \"tokens\"\ntokenizer = \"none\"\nsequence_length = 8\npack = \
         false\ncache_dir = {:?}\n[optimizer]\nname = \"adamw\"\nlearning_rate = 1e-3\n[train]\nsteps = 1\nbatch_size = 1\n",
        at("runs"),
        at("cache")
    );
    fs::write(at("recipe.toml"), recipe).unwrap();
    let train = moonlight(&["train", &at("recipe.toml")]).output().unwrap();
    assert_fails(&train, "and cannot be trained further");
    assert!(text(&train.stderr).contains("merge it into its model first"));
}
