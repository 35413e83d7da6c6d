//! The program `moonlight-convert` as its users run it.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moonlight-convert")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A checkpoint that transformers saved.
fn fixture() -> String {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fixtures/moonlight-like").display().to_string()
}

#[test]
fn inspect_names_architecture_files_and_problems() {
    let output = run(&["inspect", &fixture()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    for expected in ["DeepseekV3ForCausalLM", "BF16", "model.safetensors"] {
        assert!(shown.contains(expected), "{shown}");
    }
    let home = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(PathBuf::from(fixture()).join(file), home.path().join(file)).unwrap();
    }
    let config = home.path().join("config.json");
    let smaller = fs::read_to_string(&config).unwrap().replace("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4");
    fs::write(&config, smaller).unwrap();
    let output = run(&["inspect", &home.path().display().to_string()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("problem: "), "{}", text(&output.stderr));
}

#[test]
fn convert_and_back_is_equal_and_verify_says_so() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name).display().to_string();
    let (half, again, wide) = (path("half"), path("again"), path("wide"));
    assert!(run(&["convert", &fixture(), &half, "--dtype", "bf16"]).status.success());
    assert!(run(&["convert", &half, &wide, "--dtype", "f32", "--max-shard-size", "30KB"]).status.success());
    assert!(run(&["convert", &wide, &again, "--dtype", "bf16"]).status.success());
    assert!(fs::read_dir(&wide).unwrap().count() > 4, "it was to be in shards");
    for (a, b) in [(&half, &again), (&half, &wide)] {
        let output = run(&["verify", a, b]);
        assert!(output.status.success(), "{}", text(&output.stdout));
        assert!(text(&output.stdout).starts_with("equal: "));
    }
    let weights = home.path().join("again").join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 0x10;
    fs::write(&weights, bytes).unwrap();
    let output = run(&["verify", &half, &again]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("largest difference"));
    let output = run(&["convert", &fixture(), &half]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).starts_with("error: "), "{}", text(&output.stderr));
    assert!(run(&["convert", &fixture(), &half, "--force"]).status.success());
    assert!(run(&["verify", &fixture(), &half]).status.success());
}

#[test]
fn errors_are_one_line_and_exit_code_one_or_two() {
    let output = run(&["inspect", "nowhere"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).starts_with("error: "), "{}", text(&output.stderr));
    assert_eq!(run(&["convert", "a"]).status.code(), Some(2));
    assert_eq!(run(&["convert", "a", "b", "--max-shard-size", "5XB"]).status.code(), Some(2));
}
