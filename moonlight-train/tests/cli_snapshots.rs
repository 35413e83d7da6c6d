//! What `moonlight` prints: help, plans, recipes, errors with their hints. The expected output is in `tests/cmd`.
//!
//! After an intended change, `TRYCMD=overwrite INSTA_UPDATE=always cargo test -p moonlight-train --test cli_snapshots` updates
//! it; read the diff.

use std::process::Command;

use serde_json::Value;

/// A folder that does not exist, so that no test depends on the models of this machine.
const NO_CACHE: &str = "/nonexistent/hub";

// Messages of the operating system and separators of paths are part of the output.
#[cfg(unix)]
#[test]
fn commands_print_what_is_expected() {
    let cases = trycmd::TestCases::new();
    for (name, value) in [("HF_HUB_CACHE", NO_CACHE), ("HF_HOME", NO_CACHE), ("NO_COLOR", "1"), ("COLUMNS", "100")] {
        cases.env(name, value);
    }
    cases.register_bin("moonlight", std::path::Path::new(env!("CARGO_BIN_EXE_moonlight")));
    cases.case("tests/cmd/*.trycmd");
    cases.run();
}

#[test]
fn doctor_reports_every_key() {
    let mut doctor = Command::new(env!("CARGO_BIN_EXE_moonlight"));
    doctor.args(["doctor", "--json"]).env("HF_HUB_CACHE", NO_CACHE).env("HF_TOKEN", "hf_secret");
    let output = doctor.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains("hf_secret"), "a secret is printed");
    let mut report: Value = serde_json::from_str(&text).unwrap();
    for environment in report["environment"].as_array_mut().unwrap() {
        environment["value"] = Value::Null;
    }
    // What depends on the machine and on the features of the build.
    for key in
        ["/version", "/build", "/processor", "/memory", "/devices", "/problems", "/disk_free_bytes", "/kernel_cache"]
    {
        redact(report.pointer_mut(key).unwrap());
    }
    insta::assert_snapshot!("doctor", serde_json::to_string_pretty(&report).unwrap());
}

/// Replaces values by their types.
fn redact(value: &mut Value) {
    match value {
        Value::Object(object) => object.values_mut().for_each(redact),
        Value::Array(_) => *value = "[list]".into(),
        Value::Number(_) => *value = "[number]".into(),
        Value::String(_) | Value::Null => *value = "[text or null]".into(),
        Value::Bool(_) => *value = "[bool]".into(),
    }
}

#[test]
fn a_wrong_vector_level_is_an_error_of_doctor() {
    let mut doctor = Command::new(env!("CARGO_BIN_EXE_moonlight"));
    let output = doctor.arg("doctor").env("MOONLIGHT_SIMD", "avx9000").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    if cfg!(feature = "cpu") {
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("avx9000") && text.contains("hint: unset `MOONLIGHT_SIMD`"), "{text}");
    }
}

#[test]
fn init_writes_a_recipe_that_plan_reads_and_does_not_overwrite_it() {
    let dir = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_moonlight")).args(arguments).current_dir(&dir).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let init = ["init", "--task", "pretrain", "--preset", "bench-small", "--data", "*.txt", "--device", "cpu"];
    let (code, log) = run(&init);
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("warning: `*.txt` matches no file yet") && log.contains("wrote `recipe.toml`"), "{log}");
    assert_eq!(run(&["plan", "recipe.toml"]).0, Some(0));
    let (code, log) = run(&init);
    assert_eq!(code, Some(1));
    assert!(log.starts_with("error: `recipe.toml` exists\nhint: "), "{log}");
    let (code, log) = run(&[&["--quiet", "init", "other.toml"], &init[1..]].concat());
    assert_eq!((code, log.lines().count()), (Some(0), 1), "only the warning: {log}");
}
