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

#[test]
fn inspect_speaks_json_and_tells_a_download_from_a_broken_checkpoint() {
    let json = |dir: &str| -> (Option<i32>, serde_json::Value) {
        let output = run(&["inspect", dir, "--json"]);
        (output.status.code(), serde_json::from_slice(&output.stdout).unwrap())
    };
    let (code, whole) = json(&fixture());
    assert_eq!(code, Some(0));
    assert_eq!(whole["state"], "complete");
    assert_eq!(whole["architecture"], "DeepseekV3ForCausalLM");
    assert_eq!(whole["tokenizer"], serde_json::Value::Null);
    assert_eq!(whole["files"][0]["name"], "model.safetensors");
    assert_eq!(whole["dtypes"][0]["dtype"], "BF16");
    assert!(whole["parameters"]["total"].as_u64() > whole["parameters"]["activated"].as_u64());
    assert_eq!(whole["skipped"][0]["tensors"].as_array().unwrap().len(), 3, "{}", whole["skipped"]);

    // Shards, one of them still on its way.
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("shards");
    let shards = path.display().to_string();
    assert!(run(&["convert", &fixture(), &shards, "--shard-by-layer"]).status.success());
    fs::write(path.join("tokenizer.json"), "{}").unwrap();
    let last = path.join("model-00003-of-00003.safetensors");
    fs::rename(&last, path.join("model-00003-of-00003.safetensors.incomplete")).unwrap();
    let (code, coming) = json(&shards);
    assert_eq!((code, &coming["state"]), (Some(1), &"downloading".into()));
    assert_eq!(coming["tokenizer"], "tokenizer.json");
    assert_eq!(coming["files"][2]["bytes"], serde_json::Value::Null);
    assert_eq!(coming["unfinished"][0], "model-00003-of-00003.safetensors.incomplete");
    assert_eq!(coming["problems"][0]["file"], "model-00003-of-00003.safetensors");
    let said = run(&["inspect", &shards]);
    assert!(text(&said.stdout).contains("state          still downloading"), "{}", text(&said.stdout));
    fs::remove_file(path.join("model-00003-of-00003.safetensors.incomplete")).unwrap();
    let (code, broken) = json(&shards);
    assert_eq!((code, &broken["state"]), (Some(1), &"broken".into()));

    // Not even a configuration yet.
    let early = home.path().join("early");
    fs::create_dir(&early).unwrap();
    fs::write(early.join("config.json.part"), "").unwrap();
    let (code, early) = json(&early.display().to_string());
    assert_eq!((code, &early["state"]), (Some(1), &"downloading".into()));
}

#[test]
fn burnpack_and_back_through_the_program() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name).display().to_string();
    let (pack, back) = (path("pack"), path("back"));
    let output = run(&["convert", &fixture(), &pack, "--format", "burnpack"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("in 1 file(s)"), "{}", text(&output.stderr));
    assert!(text(&run(&["inspect", &pack]).stdout).contains("format         burnpack"));
    assert!(run(&["convert", &pack, &back, "--shard-by-layer"]).status.success());
    for (a, b) in [(&fixture(), &pack), (&pack, &back), (&fixture(), &back)] {
        let output = run(&["verify", a, b]);
        assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
        assert!(text(&output.stdout).starts_with("equal: "));
    }
    // A file that stands in the way of the other format's is not left to be taken for the weights.
    assert!(run(&["convert", &fixture(), &pack, "--force"]).status.success());
    assert!(!home.path().join("pack/model.bpk").exists());
}

#[test]
fn verify_says_how_far_apart_and_what_is_missing() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name).display().to_string();
    let (wide, narrow, part) = (path("wide"), path("narrow"), path("part"));
    let llama = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fixtures/llama").display().to_string();
    assert!(run(&["convert", &llama, &wide]).status.success());
    // The smallest values are not exact in f16.
    assert!(run(&["convert", &llama, &narrow, "--dtype", "f16"]).status.success());
    let output = run(&["verify", &wide, &narrow]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains(": largest difference "), "{}", text(&output.stdout));
    assert!(text(&output.stdout).contains(", cosine 1.0000"), "{}", text(&output.stdout));
    assert!(text(&output.stderr).contains("tensors differ"), "{}", text(&output.stderr));
    assert!(run(&["verify", &wide, &narrow, "--tolerance", "0.01"]).status.success());

    assert!(run(&["convert", &fixture(), &part, "--shard-by-layer"]).status.success());
    fs::remove_file(home.path().join("part/model-00002-of-00003.safetensors")).unwrap();
    let output = run(&["verify", &part, &part]);
    assert_eq!(output.status.code(), Some(1), "what is missing on both sides is no success");
    assert!(text(&output.stderr).contains("does not exist"), "{}", text(&output.stderr));
    assert!(run(&["verify", &part, &part, "--partial"]).status.success());
    assert_eq!(run(&["verify", &fixture(), &part, "--partial"]).status.code(), Some(1));
    assert_eq!(run(&["verify", &fixture()]).status.code(), Some(2));
}

#[test]
fn digests_are_checked() {
    use sha2::{Digest, Sha256};
    let home = tempfile::tempdir().unwrap();
    let list = home.path().join("SHA256SUMS");
    let digest = |name: &str| -> String {
        let bytes = fs::read(PathBuf::from(fixture()).join(name)).unwrap();
        Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    };
    let lines: String =
        ["config.json", "model.safetensors"].iter().map(|name| format!("{}  {name}\n", digest(name))).collect();
    fs::write(&list, &lines).unwrap();
    let list = list.display().to_string();
    let output = run(&["verify", &fixture(), "--sha256", &list]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "as listed: 2 files\n");
    fs::write(&list, lines.replace("config.json", "generation_config.json")).unwrap();
    let output = run(&["verify", &fixture(), "--sha256", &list]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("generation_config.json: has the digest"), "{}", text(&output.stdout));
}
