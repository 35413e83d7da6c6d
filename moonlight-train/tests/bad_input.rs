//! Mistakes of users, and the one line by which each is reported.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use common::{Home, assert_fails, checkpoint, checkpoints, moonlight, text};

fn train(home: &Home, set: &str) -> Output {
    home.train("bad", &["--set", set]).output().unwrap()
}

/// The error of a recipe, which must not leave a run's folder.
fn refused(set: &str, expected: &str) {
    let home = Home::new();
    assert_fails(&train(&home, set), expected);
    assert!(!home.run("bad").exists(), "`{set}` left a folder");
}

#[test]
fn an_invalid_recipe_is_refused_before_a_folder_is_created() {
    refused("train.stepss=3", "unknown key `train.stepss` (the nearest known key is `train.steps`)");
    refused("train.steps=many", "`train.steps`");
    refused("train.batch_size=0", "`train.batch_size` is 0");
    refused("optimizer.learning_rate=-1", "`optimizer.learning_rate`");
    refused("data.train=[\"nowhere/*.txt\"]", "nowhere/*.txt");
    refused("data.sequence_length=65", "longer than the model's `max_position_embeddings` of 64");
    refused("data.tokenizer=nowhere", "there is no tokenizer at `nowhere`");
    refused("model.kv_lora_rank=0", "`kv_lora_rank`");
    refused("model.num_experts_per_tok=7", "`num_experts_per_tok`");
    refused("run.device=gpu", "there is no device `gpu`");
    refused("model.dtype=int8", "`model.dtype`");
}

#[test]
fn an_unknown_key_is_an_error_with_its_line() {
    let home = Home::new();
    let path = home.path("recipe.toml");
    let recipe = fs::read_to_string(&path).unwrap().replace("batch_size = 2", "batchsize = 2");
    let line = recipe.lines().position(|line| line.starts_with("batchsize")).unwrap() + 1;
    fs::write(&path, recipe).unwrap();
    let output = home.train("bad", &[]).output().unwrap();
    assert_fails(&output, &format!("recipe.toml:{line}"));
    assert_fails(&output, "the nearest known key is `train.batch_size`");
}

#[test]
fn a_missing_recipe_or_invalid_toml_is_an_error() {
    let home = Home::new();
    assert_fails(&moonlight(&["train", "nowhere.toml"]).output().unwrap(), "nowhere.toml");
    fs::write(home.path("recipe.toml"), "[run\n").unwrap();
    assert_fails(&home.train("bad", &[]).output().unwrap(), "recipe.toml:1");
}

#[test]
fn wrong_usage_is_exit_code_two() {
    for arguments in [&["train"][..], &["fly"], &["generate", "--model", "x"], &["score", "--model", "x"], &[]] {
        assert_eq!(moonlight(arguments).output().unwrap().status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn a_broken_token_file_is_an_error_with_its_line() {
    let home = Home::new();
    let data = home.path("data.jsonl");
    let run = |lines: &str| {
        fs::write(&data, lines).unwrap();
        let glob = format!("data.train=[\"{}\"]", data.display());
        let sets = ["data.format=tokens", "data.pack=false", "data.valid_fraction=0", "data.tokenizer=none", &glob];
        home.train("bad", &sets.map(|set| ["--set", set]).concat()).output().unwrap()
    };
    assert_fails(&run("{\"tokens\": [1, 2]}\n{\"tokens\": [1, x]}\n"), "data.jsonl:2");
    assert_fails(&run("{\"tokens\": [1, 999]}\n"), "data.jsonl:1");
    let long: Vec<u32> = vec![1; 40];
    assert_fails(&run(&format!("{{\"tokens\": {long:?}}}\n")), "data.jsonl:1");
    assert_fails(&run(""), "`data.train` contain nothing to learn from");
}

/// A trained checkpoint that a test damages, and the error of opening it.
struct Spoiled {
    home: Home,
    dir: PathBuf,
}

impl Spoiled {
    fn new(arguments: &[&str]) -> Self {
        let home = Home::new();
        let run = home.trained("good", &[&["--set", "train.steps=1"], arguments].concat());
        Self { dir: checkpoint(&run, 1), home }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn weights(&self) -> PathBuf {
        self.file("model.safetensors")
    }

    fn assert_refused(&self, expected: &str) {
        let dir = self.dir.display().to_string();
        let generate = moonlight(&["generate", "--model", &dir, "--prompt-tokens", "1"]).output().unwrap();
        assert_fails(&generate, expected);
        // Fine-tuning from it is refused for the same reason, before a run starts. The recipe names it instead of a shape.
        let recipe = fs::read_to_string(self.home.path("recipe.toml")).unwrap();
        let (before, rest) = recipe.split_once("[model]").unwrap();
        let (_, after) = rest.split_once("[data]").unwrap();
        let recipe = format!("{before}[model]\npath = \"{dir}\"\n\n[data]{after}");
        let path = self.home.path("tune.toml");
        fs::write(&path, recipe).unwrap();
        let train = moonlight(&["train", &path.display().to_string(), "--set", "run.name=tune"]).output().unwrap();
        assert_fails(&train, expected);
        assert!(!self.home.run("tune").exists());
    }
}

/// The header of a safetensors file and what follows it.
fn split(weights: &Path) -> (serde_json::Value, Vec<u8>) {
    let bytes = fs::read(weights).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), bytes[8 + length..].to_vec())
}

fn join(weights: &Path, header: &serde_json::Value, data: &[u8]) {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    fs::write(weights, bytes).unwrap();
}

#[test]
fn a_truncated_weight_file_is_refused() {
    let spoiled = Spoiled::new(&[]);
    let bytes = fs::read(spoiled.weights()).unwrap();
    for length in [bytes.len() - 1, bytes.len() / 2, 100, 5, 0] {
        fs::write(spoiled.weights(), &bytes[..length]).unwrap();
        spoiled.assert_refused("model.safetensors");
    }
}

#[test]
fn a_header_that_claims_more_than_the_file_contains_is_refused() {
    let spoiled = Spoiled::new(&[]);
    let (mut header, data) = split(&spoiled.weights());
    header["model.norm.weight"]["data_offsets"][1] = serde_json::json!(1u64 << 40);
    join(&spoiled.weights(), &header, &data);
    spoiled.assert_refused("model.safetensors");
    let mut bytes = fs::read(spoiled.weights()).unwrap();
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(spoiled.weights(), bytes).unwrap();
    spoiled.assert_refused("model.safetensors");
}

#[test]
fn a_tensor_with_the_wrong_shape_is_refused() {
    let spoiled = Spoiled::new(&[]);
    let (mut header, data) = split(&spoiled.weights());
    header["model.norm.weight"]["shape"] = serde_json::json!([12, 2]);
    join(&spoiled.weights(), &header, &data);
    spoiled.assert_refused("model.norm.weight");
}

#[test]
fn a_tensor_with_the_wrong_name_is_refused() {
    let spoiled = Spoiled::new(&[]);
    let (mut header, data) = split(&spoiled.weights());
    let tensors = header.as_object_mut().unwrap();
    let norm = tensors.remove("model.norm.weight").unwrap();
    tensors.insert("model.nrom.weight".into(), norm);
    join(&spoiled.weights(), &header, &data);
    // One error names both the missing tensor and the unknown one.
    spoiled.assert_refused("model.norm.weight");
    spoiled.assert_refused("model.nrom.weight");
}

#[test]
fn non_finite_weights_are_refused() {
    let spoiled = Spoiled::new(&[]);
    let (header, mut data) = split(&spoiled.weights());
    let offset = header["model.norm.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    data[offset..offset + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    join(&spoiled.weights(), &header, &data);
    spoiled.assert_refused("model.norm.weight");
}

#[test]
fn a_missing_shard_and_an_index_that_leads_outside_are_refused() {
    let spoiled = Spoiled::new(&[]);
    let (header, _) = split(&spoiled.weights());
    fs::remove_file(spoiled.weights()).unwrap();
    let index = |file: &str| {
        let map: serde_json::Map<String, serde_json::Value> = header
            .as_object()
            .unwrap()
            .keys()
            .filter(|name| *name != "__metadata__")
            .map(|name| (name.clone(), file.into()))
            .collect();
        let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map});
        fs::write(spoiled.file("model.safetensors.index.json"), index.to_string()).unwrap();
    };
    index("model-00001-of-00002.safetensors");
    spoiled.assert_refused("model-00001-of-00002.safetensors");
    index("../../etc/passwd");
    spoiled.assert_refused("../../etc/passwd");
    index("/etc/passwd");
    spoiled.assert_refused("/etc/passwd");
}

#[test]
fn a_directory_without_a_model_is_refused() {
    let home = Home::new();
    fs::create_dir(home.path("empty")).unwrap();
    let dir = home.path("empty").display().to_string();
    assert_fails(&moonlight(&["generate", "--model", &dir, "--prompt", "x"]).output().unwrap(), "config.json");
    let dir = home.path("nowhere").display().to_string();
    assert_fails(&moonlight(&["score", "--model", &dir, "--data", "x"]).output().unwrap(), "`x`");
}

#[test]
fn prompts_and_data_that_the_model_cannot_read_are_refused() {
    let spoiled = Spoiled::new(&[]);
    let dir = spoiled.dir.display().to_string();
    let generate =
        |prompt: &str| moonlight(&["generate", "--model", &dir, "--prompt-tokens", prompt]).output().unwrap();
    assert_fails(&generate("1,999"), "there is no token 999");
    assert_fails(&generate(&vec!["1"; 65].join(",")), "more than the model's context of 64");
    let data = spoiled.home.path("data.jsonl");
    fs::write(&data, "{\"tokens\": [1]}\n{\"token\": [1]}\n").unwrap();
    let score = moonlight(&["score", "--model", &dir, "--data"]).arg(&data).output().unwrap();
    assert_fails(&score, "data.jsonl:2");
    fs::write(&data, "{\"tokens\": [1]}\n{\"tokens\": [999]}\n").unwrap();
    for command in [["score", "--data"], ["generate", "--prompts"]] {
        let [command, file] = command;
        let output = moonlight(&[command, "--model", &dir, file]).arg(&data).output().unwrap();
        assert_fails(&output, "data.jsonl:2: there is no token 999");
    }
}

/// A limit on the size of files acts like a full disk: with both a write fails in the middle.
#[cfg(unix)]
#[test]
fn a_disk_that_fills_up_while_saving_leaves_the_last_checkpoint_complete() {
    let home = Home::new();
    let run = home.trained("full", &["--set", "train.steps=2"]);
    let weights = fs::metadata(checkpoint(&run, 2).join("model.safetensors")).unwrap().len();
    // `ulimit -f` counts blocks of 512 or 1024 bytes; the limit is below the size of the weights either way.
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$@\"", weights / 2048);
    let output = std::process::Command::new("sh")
        .args(["-c", &script, "sh", env!("CARGO_BIN_EXE_moonlight"), "train"])
        .arg(home.path("recipe.toml"))
        .args(["--set", "run.name=full", "--set", "train.steps=4", "--resume"])
        .output()
        .unwrap();
    assert_fails(&output, "cannot be written");
    assert_eq!(checkpoints(&run), ["step-00000002"], "{}", text(&output.stderr));
    // With free space again the run resumes.
    home.trained("full", &["--set", "train.steps=4", "--resume"]);
    assert!(checkpoints(&run).contains(&"step-00000004".to_owned()));
}
