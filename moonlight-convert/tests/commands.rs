//! The program's output, held by `tests/cmd/*.trycmd`. After an intended change, update these files with
//! `TRYCMD=overwrite cargo test -p moonlight-convert --test commands`, and read the diff.

#![cfg(feature = "download")]

use std::fs;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

/// Copies the checkpoint of a fixture to the directory `name`.
fn copy(fixture: &str, name: &str) {
    fs::create_dir_all(name).unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(fixture);
    for entry in fs::read_dir(fixture).unwrap().map(Result::unwrap) {
        let file = entry.file_name().into_string().unwrap();
        // The rest are expected results, which would clutter the output.
        if file.starts_with("model") || ["config.json", "generation_config.json"].contains(&file.as_str()) {
            fs::copy(entry.path(), Path::new(name).join(file)).unwrap();
        }
    }
}

/// Fills the current directory with what the commands read.
fn prepare() {
    copy("moonlight-like", "model");
    copy("quantized/fp8", "fp8");
    copy("quantized/int4", "int4");
    copy("moonlight-like", "mixed");
    for name in ["pytorch_model.bin", "consolidated.00.pth", "LICENSE", "optimizer.safetensors", ".gitattributes"] {
        fs::write(format!("mixed/{name}"), "").unwrap();
    }
    fs::create_dir("mixed/figures").unwrap();

    copy("deepseek-v3-like", "incomplete");
    fs::remove_file("incomplete/model-00002-of-00004.safetensors").unwrap();
    copy("moonlight-like", "truncated");
    let weights = fs::read("truncated/model.safetensors").unwrap();
    fs::write("truncated/model.safetensors", &weights[..weights.len() / 2]).unwrap();

    copy("moonlight-like", "changed");
    let mut changed = weights;
    let last = changed.len() - 1;
    changed[last] ^= 0x80;
    fs::write("changed/model.safetensors", changed).unwrap();

    copy("moonlight-like", "pickle");
    fs::rename("pickle/model.safetensors", "pickle/pytorch_model.bin").unwrap();
    copy("moonlight-like", "user");
    fs::write("user/thesis.txt", "important").unwrap();
    fs::create_dir("empty").unwrap();

    fs::create_dir("tokenizer").unwrap();
    let ranks: String = (0..=u8::MAX).map(|byte| format!("{} {byte}\n", STANDARD.encode([byte]))).collect();
    fs::write("tokenizer/tiktoken.model", ranks).unwrap();
    let digest = |name: &str| format!("{:x}", Sha256::digest(fs::read(format!("model/{name}")).unwrap()));
    fs::write("SHA256SUMS", format!("{}  config.json\n", digest("config.json"))).unwrap();
    fs::write("WRONG", format!("{}  model.safetensors\n", digest("config.json"))).unwrap();
}

#[test]
fn the_output_is_that_of_the_snapshots() {
    let home = tempfile::tempdir().unwrap();
    // The commands run in the current directory of this program, which has no other test.
    std::env::set_current_dir(&home).unwrap();
    prepare();
    trycmd::TestCases::new()
        .env("HF_HUB_CACHE", "hub")
        .env("HF_HUB_OFFLINE", "1")
        .case(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cmd/*.trycmd"))
        .run();
    std::env::set_current_dir(env!("CARGO_MANIFEST_DIR")).unwrap();
}
