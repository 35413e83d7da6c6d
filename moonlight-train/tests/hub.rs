//! A model in the Hub's cache, run and fine-tuned by its name.

#![cfg(unix)]

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Home, assert_fails, moonlight, text};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A cache in the layout of `huggingface_hub`: a snapshot of links to blobs.
fn cache(home: &Home) -> PathBuf {
    let model = home.path("hf").join("hub").join("models--moonshotai--tiny");
    let snapshot = model.join("snapshots").join(COMMIT);
    for folder in [model.join("blobs"), model.join("refs"), snapshot.clone()] {
        fs::create_dir_all(folder).unwrap();
    }
    fs::write(model.join("refs").join("main"), COMMIT).unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/moonlight-like");
    for (name, blob) in [("config.json", "aa"), ("generation_config.json", "bb"), ("model.safetensors", "cc")] {
        fs::copy(fixture.join(name), model.join("blobs").join(blob)).unwrap();
        symlink(Path::new("../../blobs").join(blob), snapshot.join(name)).unwrap();
    }
    snapshot
}

fn with_cache(mut command: Command, home: &Home) -> Command {
    for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"] {
        command.env_remove(name);
    }
    // Nothing listens at this address, so any access to the network would fail.
    command.env("HF_HOME", home.path("hf")).env("HF_ENDPOINT", "http://127.0.0.1:9");
    command
}

#[test]
fn a_cached_model_runs_by_its_name() {
    let home = Home::new();
    let snapshot = cache(&home);
    let generate = |model: &str| {
        let arguments = ["generate", "--model", model, "--prompt-tokens", "1,2,3", "--max-new-tokens", "3", "--json"];
        with_cache(moonlight(&arguments), &home).output().unwrap()
    };
    let expected = generate(&snapshot.display().to_string());
    assert!(expected.status.success(), "{}", text(&expected.stderr));
    for model in ["moonshotai/tiny", "moonshotai/tiny@main", &format!("moonshotai/tiny@{COMMIT}")] {
        let output = generate(model);
        assert!(output.status.success(), "{model}: {}", text(&output.stderr));
        assert_eq!(output.stdout, expected.stdout);
    }
    let absent = generate("moonshotai/absent");
    assert_fails(&absent, "`moonshotai/absent` is neither a directory nor a model in the Hub's cache");
    assert!(text(&absent.stderr).contains("hint: download it with `moonlight-convert download moonshotai/absent`"));
}

#[test]
fn a_cached_model_is_fine_tuned_by_its_name() {
    let home = Home::new();
    let snapshot = cache(&home);
    let recipe = fs::read_to_string(home.path("recipe.toml")).unwrap();
    let (before, rest) = recipe.split_once("[model]").unwrap();
    let (_, after) = rest.split_once("[data]").unwrap();
    let train = |model: &str, name: &str| {
        let data = home.path("data.jsonl");
        let tokens: Vec<u32> = (0..16).collect();
        fs::write(&data, format!("{{\"tokens\": {tokens:?}}}\n").repeat(8)).unwrap();
        let recipe = format!("{before}[model]\npath = \"{model}\"\n\n[data]{after}");
        let path = home.path("tune.toml");
        fs::write(&path, recipe).unwrap();
        let (path, name) = (path.display().to_string(), format!("run.name={name}"));
        let arguments = [
            &name,
            "train.steps=1",
            "data.format=tokens",
            "data.tokenizer=none",
            "data.pack=false",
            "data.valid_fraction=0",
            &format!("data.train=[\"{}\"]", data.display()),
        ];
        let mut command = moonlight(&["train", &path]);
        command.args(arguments.iter().flat_map(|set| ["--set", set]));
        with_cache(command, &home).output().unwrap()
    };
    let output = train("moonshotai/tiny", "tuned");
    assert!(output.status.success(), "{}", text(&output.stderr));
    // The recipe of the run names the commit.
    let resolved = fs::read_to_string(home.run("tuned").join("recipe.toml")).unwrap();
    assert!(resolved.contains(&snapshot.display().to_string()), "{resolved}");
    let absent = train("moonshotai/absent", "absent");
    assert_fails(&absent, "`moonshotai/absent` is neither a directory nor a model in the Hub's cache");
    assert!(text(&absent.stderr).contains("moonlight-convert download moonshotai/absent"));
}
