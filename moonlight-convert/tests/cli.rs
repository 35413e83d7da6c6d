//! The program `moonlight-convert` as its users run it.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moonlight-convert")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A checkpoint saved by transformers.
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
fn a_round_trip_is_equal_and_verify_reports_it() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name).display().to_string();
    let (half, again, wide) = (path("half"), path("again"), path("wide"));
    assert!(run(&["convert", &fixture(), &half, "--dtype", "bf16"]).status.success());
    assert!(run(&["convert", &half, &wide, "--dtype", "f32", "--max-shard-size", "30KB"]).status.success());
    assert!(run(&["convert", &wide, &again, "--dtype", "bf16"]).status.success());
    assert!(fs::read_dir(&wide).unwrap().count() > 4, "the result has several shards");
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
fn inspect_prints_json_and_distinguishes_a_download_from_a_broken_checkpoint() {
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

    // Shards, one of them still downloading.
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("shards");
    let shards = path.display().to_string();
    assert!(run(&["convert", &fixture(), &shards, "--shard-by-layer"]).status.success());
    fs::write(path.join("tokenizer.json"), "{}").unwrap();
    let last = path.join("model-00003-of-00003.safetensors");
    fs::rename(&last, path.join("model-00003-of-00003.safetensors.incomplete")).unwrap();
    let (code, unfinished) = json(&shards);
    assert_eq!((code, &unfinished["state"]), (Some(1), &"downloading".into()));
    assert_eq!(unfinished["tokenizer"], "tokenizer.json");
    assert_eq!(unfinished["files"][2]["bytes"], serde_json::Value::Null);
    assert_eq!(unfinished["unfinished"][0], "model-00003-of-00003.safetensors.incomplete");
    assert_eq!(unfinished["problems"][0]["file"], "model-00003-of-00003.safetensors");
    let output = run(&["inspect", &shards]);
    assert!(text(&output.stdout).contains("state          still downloading"), "{}", text(&output.stdout));
    fs::remove_file(path.join("model-00003-of-00003.safetensors.incomplete")).unwrap();
    let (code, broken) = json(&shards);
    assert_eq!((code, &broken["state"]), (Some(1), &"broken".into()));

    // Not even a config yet.
    let early = home.path().join("early");
    fs::create_dir(&early).unwrap();
    fs::write(early.join("config.json.part"), "").unwrap();
    let (code, early) = json(&early.display().to_string());
    assert_eq!((code, &early["state"]), (Some(1), &"downloading".into()));
}

#[test]
fn the_program_converts_to_burnpack_and_back() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name).display().to_string();
    let (pack, back) = (path("pack"), path("back"));
    let output = run(&["convert", &fixture(), &pack, "--format", "burnpack"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("in 1 file to"), "{}", text(&output.stderr));
    assert!(text(&run(&["inspect", &pack]).stdout).contains("format         burnpack"));
    assert!(run(&["convert", &pack, &back, "--shard-by-layer"]).status.success());
    for (a, b) in [(&fixture(), &pack), (&pack, &back), (&fixture(), &back)] {
        let output = run(&["verify", a, b]);
        assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
        assert!(text(&output.stdout).starts_with("equal: "));
    }
    // The file of the other format is removed: it could be taken for the weights.
    assert!(run(&["convert", &fixture(), &pack, "--force"]).status.success());
    assert!(!home.path().join("pack/model.bpk").exists());
}

#[test]
fn verify_reports_distances_and_missing_files() {
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
    assert_eq!(output.status.code(), Some(1), "a file that both lack is a problem");
    assert!(text(&output.stderr).contains("does not exist"), "{}", text(&output.stderr));
    assert!(run(&["verify", &part, &part, "--partial"]).status.success());
    assert_eq!(run(&["verify", &fixture(), &part, "--partial"]).status.code(), Some(1));
    assert_eq!(run(&["verify"]).status.code(), Some(2));
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

#[test]
fn a_checkpoint_is_compared_with_its_manifest() {
    use moonlight_convert::manifest::Manifest;
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().display().to_string();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(PathBuf::from(fixture()).join(file), home.path().join(file)).unwrap();
    }
    let output = run(&["verify", &dir]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("has no `manifest.json`"), "{}", text(&output.stderr));
    Manifest::compute(home.path()).unwrap().write(home.path()).unwrap();
    let output = run(&["verify", &dir]);
    assert!(output.status.success() && text(&output.stdout).starts_with("complete: "), "{}", text(&output.stdout));
    let weights = home.path().join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let output = run(&["verify", &dir]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("`model.safetensors` is not what was written"), "{}", text(&output.stdout));
}

/// The fixture with thousands of file names that contain terminal commands.
fn noisy(home: &std::path::Path) -> PathBuf {
    let dir = home.join("noisy");
    fs::create_dir(&dir).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::write(dir.join(file), fs::read(PathBuf::from(fixture()).join(file)).unwrap()).unwrap();
    }
    for number in 0..5_000 {
        fs::write(dir.join(format!("tokenization_{number}\u{1b}[2J\u{9b}31m.py")), "").unwrap();
    }
    dir
}

#[cfg(unix)]
#[test]
fn file_names_are_escaped_on_the_terminal() {
    let home = tempfile::tempdir().unwrap();
    let dir = noisy(home.path());
    for arguments in [vec!["inspect"], vec!["inspect", "--json"]] {
        let output = run(&[arguments.clone(), vec![&dir.display().to_string()]].concat());
        assert!(output.status.success());
        let shown = text(&output.stdout);
        assert!(!shown.chars().any(|character| character.is_control() && character != '\n'), "{arguments:?}");
        let escaped = if arguments.len() == 1 { "_7\\u{1b}[2J\\u{9b}31m.py" } else { "_7\\u001b[2J\\u009b31m.py" };
        assert!(shown.contains(escaped), "{arguments:?}");
    }
    let output = run(&["inspect", &home.path().join("a\u{1b}[2J\nb").display().to_string()]);
    assert_eq!(text(&output.stderr).lines().count(), 1, "{}", text(&output.stderr));
    assert!(!output.stderr.contains(&0x1b));
}

/// A closed pipe is not an error, but a full disk is. Lines for a full stderr are lost.
#[cfg(target_os = "linux")]
#[test]
fn failed_output_is_not_a_panic() {
    let home = tempfile::tempdir().unwrap();
    let dir = noisy(home.path()).display().to_string();
    let program = || Command::new(env!("CARGO_BIN_EXE_moonlight-convert"));
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    for arguments in [vec!["inspect", &dir], vec!["inspect", "--json", &dir]] {
        let mut child = program().args(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdout.take().unwrap().read_exact(&mut [0; 10]).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""), "{arguments:?}");
    }
    let (pack, tokenizer) = (home.path().join("pack").display().to_string(), home.path().join("tokenizer"));
    fs::create_dir(&tokenizer).unwrap();
    fs::write(tokenizer.join("tiktoken.model"), ranks()).unwrap();
    let tokenizer = tokenizer.display().to_string();
    for arguments in [vec!["inspect", &dir], vec!["verify", &dir, &dir], vec!["tokenizer", &tokenizer]] {
        let output = program().args(&arguments).stdout(full()).output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
        assert!(stderr.starts_with("error: standard output cannot be written"), "{stderr}");
    }
    // The work is done even without a usable stderr.
    for stderr in [Stdio::from(full()), Stdio::null()] {
        let status = program().args(["convert", &dir, &pack, "--force"]).stderr(stderr).status().unwrap();
        assert!(status.success());
        assert!(run(&["verify", &dir, &pack]).status.success());
    }
    let (read, write) = std::io::pipe().unwrap();
    drop(read);
    let status = program().args(["inspect", "nowhere"]).stderr(write).status().unwrap();
    assert_eq!(status.code(), Some(1));
}

/// A `tiktoken.model` of the 256 single bytes.
fn ranks() -> String {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    (0..=u8::MAX).map(|byte| format!("{} {byte}\n", STANDARD.encode([byte]))).collect()
}

/// A checkpoint of a few hundred megabytes in a sparse file.
fn large(dir: &std::path::Path) {
    fs::create_dir(dir).unwrap();
    let config = fs::read_to_string(PathBuf::from(fixture()).join("../llama/config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    (config["vocab_size"], config["hidden_size"]) = (200_000.into(), 512.into());
    (config["intermediate_size"], config["num_hidden_layers"]) = (1024.into(), 1.into());
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let config = moonlight_model::ModelConfig::from_json(&config.to_string()).unwrap();
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for tensor in config.parameter_shapes().iter().flat_map(moonlight_convert::hugging_face_tensors) {
        let bytes = 2 * tensor.shape.iter().product::<usize>();
        let entry = serde_json::json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [end, end + bytes]});
        header.insert(tensor.name, entry);
        end += bytes;
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    fs::write(dir.join("model.safetensors"), &bytes).unwrap();
    let file = fs::File::options().write(true).open(dir.join("model.safetensors")).unwrap();
    file.set_len((bytes.len() + end) as u64).unwrap();
}

/// Waits until the child has begun to write.
#[cfg(unix)]
fn wait_for(saving: impl Fn() -> bool, child: &mut std::process::Child) {
    let begun = Instant::now();
    while !saving() && child.try_wait().unwrap().is_none() && begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Each signal ends a conversion within seconds and leaves no files.
#[cfg(unix)]
#[test]
fn signals_end_a_conversion_and_leave_no_files() {
    let home = tempfile::tempdir().unwrap();
    let source = home.path().join("source");
    large(&source);
    let names = || {
        let mut names: Vec<_> = fs::read_dir(home.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let mut interrupted = 0;
    for signal in ["INT", "TERM", "HUP"] {
        if signal == "HUP" && moonlight_convert::hangup_is_ignored() {
            println!("SKIPPED: SIGHUP, which was ignored when the tests were started");
            continue;
        }
        let mut child = Command::new(env!("CARGO_BIN_EXE_moonlight-convert"))
            .args(["convert", "--dtype", "f32"])
            .args([&source, &home.path().join("out")])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_for(|| names().len() > 1, &mut child);
        let kill = Command::new("kill").arg(format!("-{signal}")).arg(child.id().to_string()).status().unwrap();
        let begun = Instant::now();
        let output = child.wait_with_output().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(8), "{signal}");
        if output.status.success() {
            // The conversion was faster than the signal.
            fs::remove_dir_all(home.path().join("out")).unwrap();
            continue;
        }
        interrupted += 1;
        assert!(kill.success());
        assert_eq!(output.status.code(), Some(130), "{signal}: {}", text(&output.stderr));
        assert_eq!(names(), ["source"], "{signal}");
    }
    assert!(interrupted > 0, "no signal arrived during a conversion");
}

/// A file that is truncated while it is read is an error and does not kill the program.
#[cfg(unix)]
#[test]
fn a_truncated_file_is_an_error() {
    let home = tempfile::tempdir().unwrap();
    let source = home.path().join("source");
    let out = home.path().join("out");
    large(&source);
    let weights = source.join("model.safetensors");
    let mut child = Command::new(env!("CARGO_BIN_EXE_moonlight-convert"))
        .args(["convert", "--dtype", "f32"])
        .args([&source, &out])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for(|| fs::read_dir(home.path()).unwrap().count() > 1, &mut child);
    fs::File::options().write(true).open(&weights).unwrap().set_len(1_000_000).unwrap();
    let output = child.wait_with_output().unwrap();
    if !output.status.success() {
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("it is shorter than when it was opened"), "{}", text(&output.stderr));
        assert!(!out.exists() && fs::read_dir(home.path()).unwrap().count() == 1);
    }
}
