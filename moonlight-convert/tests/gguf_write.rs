//! Writing GGUF: every tensor and key against llama.cpp's converter, sources of every kind, and what goes wrong.

mod common;

use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{config_of, fixture, read_tensors, write_dir};
use moonlight_convert::gguf::{Array, BlockType, GgufHeader, GgufOptions, Value, read_header};
use moonlight_convert::storage::{Call, observe};
use moonlight_convert::{Checkpoint, CheckpointError, Format, Progress, SaveOptions, WeightDtype};
use serde_json::Value as Json;
use sha2::{Digest, Sha256};

fn options(block_type: BlockType) -> GgufOptions {
    GgufOptions { block_type: Some(block_type), overwrite: false }
}

fn write(source: &Path, target: &Path, block_type: BlockType) -> Result<(), CheckpointError> {
    Checkpoint::open(source)?.write_gguf(target, &options(block_type), &()).map(drop)
}

/// The bytes of each tensor.
fn tensors(path: &Path) -> Vec<(String, Vec<u64>, BlockType, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let GgufHeader { tensors, data_start, .. } = read_header(path).unwrap();
    let tensor = |info: moonlight_convert::gguf::TensorInfo| {
        let start = (data_start + info.offset) as usize;
        let data = bytes[start..start + info.bytes().unwrap() as usize].to_vec();
        (info.name, info.shape, info.block_type, data)
    };
    tensors.into_iter().map(tensor).collect()
}

/// The files in a directory.
fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Keys whose values differ from those of llama.cpp's converter, with the reason.
const DIFFERENT: [(&str, &str); 3] = [
    ("general.name", "of the directory, as it is spelled"),
    ("deepseek2.attention.q_lora_rank", "without it llama.cpp does not open models of other depths than Moonlight's"),
    ("deepseek2.rope.scaling.yarn_log_multiplier", "the converter assumes that `mscale` is `mscale_all_dim`"),
];

/// The converter writes these only where `config.json` has the key.
const ADDED: [&str; 4] = [
    "deepseek2.rope.scaling.attn_factor",
    "deepseek2.expert_weights_norm",
    "llama.attention.key_length",
    "moonlight.config",
];

#[test]
fn every_tensor_and_key_is_that_of_llama_cpps_converter() {
    let home = tempfile::tempdir().unwrap();
    let expected = fs::read_to_string(fixture("gguf").join("converted.json")).unwrap();
    let expected: Json = serde_json::from_str(&expected).unwrap();
    for (family, expected) in expected.as_object().unwrap() {
        let path = home.path().join(format!("{family}.gguf"));
        write(&fixture(family), &path, BlockType::F32).unwrap();
        let found = tensors(&path);
        let wanted = expected["tensors"].as_object().unwrap();
        assert_eq!(found.len(), wanted.len(), "{family}");
        for (name, shape, block_type, data) in &found {
            let digest = format!("{:x}", Sha256::digest(data));
            assert_eq!(*block_type, BlockType::F32);
            assert_eq!(serde_json::json!([shape, &digest[..32]]), wanted[name], "{family} {name}");
        }
        let metadata = read_header(&path).unwrap().metadata;
        for (key, expected) in expected["metadata"].as_object().unwrap() {
            if DIFFERENT.iter().any(|(different, _)| different == key) {
                continue;
            }
            let found = match metadata.get(key).unwrap_or_else(|| panic!("{family} {key}")) {
                Value::U32(value) => serde_json::json!(value),
                Value::F32(value) => serde_json::json!(f64::from(*value)),
                Value::Bool(value) => serde_json::json!(value),
                Value::String(value) => serde_json::json!(value),
                other => panic!("{family} {key} {other:?}"),
            };
            assert_eq!(&found, expected, "{family} {key}");
        }
        let known = expected["metadata"].as_object().unwrap();
        let more: Vec<&str> = metadata.iter().map(|(key, _)| key).filter(|key| !known.contains_key(*key)).collect();
        for key in more {
            let explained = ADDED.contains(&key) || DIFFERENT.iter().any(|(different, _)| *different == key);
            assert!(
                explained
                    || key.starts_with("qwen2.attention")
                    || key.ends_with("vocab_size")
                    || key.ends_with("dimension_count"),
                "{family} {key}"
            );
        }
    }
}

#[test]
fn every_type_has_the_values_of_the_f32_file() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(format!("{name}.gguf"));
    write(&fixture("moonlight-like"), &path("f32"), BlockType::F32).unwrap();
    let values = |data: &[u8]| -> Vec<f32> { bytemuck::pod_collect_to_vec(data) };
    for (block_type, tolerance) in [
        (BlockType::F16, 1e-3),
        (BlockType::Bf16, 4e-3),
        (BlockType::Q8_0, 1e-2),
        (BlockType::Q4_0, 0.2),
        (BlockType::Q4K, 0.2),
    ] {
        let target = path(&block_type.to_string());
        write(&fixture("moonlight-like"), &target, block_type).unwrap();
        // Read again as f32 by the other direction.
        let back = path(&format!("{block_type}-back"));
        write(&target, &back, BlockType::F32).unwrap();
        for ((name, shape, _, exact), (other, other_shape, _, found)) in
            tensors(&path("f32")).iter().zip(&tensors(&back))
        {
            assert_eq!((name, shape), (other, other_shape));
            let (exact, found) = (values(exact), values(found));
            let largest = exact.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            for (exact, found) in exact.iter().zip(&found) {
                assert!((exact - found).abs() <= tolerance * largest, "{block_type} {name}: {exact} {found}");
            }
        }
    }
}

#[test]
fn a_file_is_copied_unchanged() {
    let home = tempfile::tempdir().unwrap();
    for family in ["moonlight-like", "deepseek-v3-like", "llama", "qwen2"] {
        for block_type in [BlockType::F32, BlockType::Bf16, BlockType::Q8_0, BlockType::Q4_0] {
            let [first, second] =
                ["first", "second"].map(|name| home.path().join(format!("{family}-{block_type}-{name}.gguf")));
            write(&fixture(family), &first, block_type).unwrap();
            write(&first, &second, block_type).unwrap();
            let (first, second) = (fs::read(first).unwrap(), fs::read(second).unwrap());
            assert!(first == second, "{family} {block_type}");
        }
    }
}

#[test]
fn sources_of_every_kind_give_the_same_file() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name);
    for (name, source) in [
        ("fp8", fixture("quantized/fp8")),
        ("int4", fixture("quantized/int4")),
        ("moonlight", fixture("moonlight-like")),
    ] {
        let checkpoint = Checkpoint::open(&source).unwrap();
        for (form, format) in [("plain", Format::HuggingFace), ("burnpack", Format::Burnpack)] {
            let options = SaveOptions { format, ..SaveOptions::default() };
            checkpoint.convert(&at(&format!("{name}-{form}")), &options).unwrap();
        }
        // Quantized weights are not rounded to bf16 on the way to another quantized type.
        let types = if name == "moonlight" { &[BlockType::Bf16, BlockType::Q8_0][..] } else { &[BlockType::Bf16] };
        for &block_type in types {
            let file = |form: &str| at(&format!("{name}-{form}-{block_type}.gguf"));
            write(&source, &file("direct"), block_type).unwrap();
            let direct = tensors(&file("direct"));
            for form in ["plain", "burnpack"] {
                write(&at(&format!("{name}-{form}")), &file(form), block_type).unwrap();
                assert!(tensors(&file(form)) == direct, "{name} {form} {block_type}");
            }
        }
    }
}

/// A model whose rotated pairs are half a head apart has them adjacent in the file, as llama.cpp rotates them.
#[test]
fn rotated_pairs_are_adjacent_in_the_file() {
    let home = tempfile::tempdir().unwrap();
    let mut config = config_of("moonlight-like");
    let raw = read_tensors(&fixture("moonlight-like"));
    let (adjacent, apart) = (home.path().join("adjacent"), home.path().join("apart"));
    write_dir(&adjacent, &config, &raw);
    config["rope_interleave"] = false.into();
    let size = |key: &str| config[key].as_u64().unwrap() as usize;
    let (nope, rope, rank) = (size("qk_nope_head_dim"), size("qk_rope_head_dim"), size("kv_lora_rank"));
    let mut moved = raw;
    for (name, tensor) in &mut moved {
        let plain = match name {
            _ if name.ends_with("q_proj.weight") => nope,
            _ if name.ends_with("kv_a_proj_with_mqa.weight") => rank,
            _ => continue,
        };
        let row = tensor.data.len() / tensor.shape[0];
        let rows: Vec<&[u8]> = tensor.data.chunks_exact(row).collect();
        let mut data = Vec::new();
        for head in rows.chunks_exact(plain + rope) {
            let (kept, rotated) = head.split_at(plain);
            let halves = (0..2).flat_map(|second| rotated.iter().skip(second).step_by(2));
            data.extend(kept.iter().chain(halves).flat_map(|row| row.iter().copied()));
        }
        tensor.data = data;
    }
    write_dir(&apart, &config, &moved);
    let file = |name: &str| home.path().join(format!("{name}.gguf"));
    write(&adjacent, &file("adjacent"), BlockType::F32).unwrap();
    write(&apart, &file("apart"), BlockType::F32).unwrap();
    assert!(tensors(&file("adjacent")) == tensors(&file("apart")));
    let back = home.path().join("back");
    Checkpoint::open(file("apart")).unwrap().convert(&back, &SaveOptions::default()).unwrap();
    let restored = read_tensors(&back);
    for (name, tensor) in moved.iter().filter(|(name, _)| name.ends_with("q_proj.weight")) {
        let widened: Vec<f32> = match tensor.dtype {
            safetensors::Dtype::BF16 => tensor
                .data
                .as_chunks::<2>()
                .0
                .iter()
                .map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16))
                .collect(),
            _ => bytemuck::pod_collect_to_vec(&tensor.data),
        };
        let found: Vec<f32> = bytemuck::pod_collect_to_vec(&restored[name].data);
        assert!(widened == found, "{name}");
    }
}

/// A checkpoint whose head has one other value, in f32.
fn with_value(dir: &Path, value: f32) -> PathBuf {
    let mut raw = read_tensors(&fixture("moonlight-like"));
    let head = raw.get_mut("lm_head.weight").unwrap();
    let count: usize = head.shape.iter().product();
    let mut values = vec![0.5f32; count];
    values[count / 2] = value;
    (head.dtype, head.data) = (safetensors::Dtype::F32, bytemuck::cast_slice(&values).to_vec());
    let path = dir.join(format!("model-{value}"));
    write_dir(&path, &config_of("moonlight-like"), &raw);
    path
}

#[test]
fn values_that_a_type_cannot_represent_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("out");
    fs::create_dir(&out).unwrap();
    let refused = |value: f32, block_type: BlockType| {
        write(&with_value(home.path(), value), &out.join("model.gguf"), block_type).unwrap_err()
    };
    for block_type in
        [BlockType::F32, BlockType::F16, BlockType::Bf16, BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4K]
    {
        for value in [f32::NAN, f32::INFINITY] {
            let error = refused(value, block_type);
            assert!(matches!(error, CheckpointError::NonFinite { .. }), "{block_type} {error}");
        }
    }
    assert!(matches!(refused(7e4, BlockType::F16), CheckpointError::Overflow { dtype: WeightDtype::F16, .. }));
    assert_eq!(names_in(&out), [""; 0], "nothing is left of a file that was not completed");
    // Rows of this fixture are no multiple of 32: F16 takes the place of blocks.
    assert!(matches!(
        refused(7e4, BlockType::Q8_0),
        CheckpointError::Overflow { .. } | CheckpointError::BlockOverflow { .. }
    ));
    write(&with_value(home.path(), 7e4), &out.join("model.gguf"), BlockType::Bf16).unwrap();
}

#[test]
fn a_target_is_replaced_only_on_request_and_only_if_it_is_gguf() {
    let home = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(fixture("llama")).unwrap();
    let force = GgufOptions { block_type: None, overwrite: true };
    let target = home.path().join("model.gguf");
    source.write_gguf(&target, &options(BlockType::F32), &()).unwrap();
    let error = source.write_gguf(&target, &options(BlockType::F32), &()).unwrap_err();
    assert!(matches!(error, CheckpointError::Exists { .. }));
    let before = fs::read(&target).unwrap();
    source.write_gguf(&target, &GgufOptions { block_type: Some(BlockType::F16), ..force.clone() }, &()).unwrap();
    assert_ne!(fs::read(&target).unwrap(), before);
    // Also onto itself.
    Checkpoint::open(&target).unwrap().write_gguf(&target, &force, &()).unwrap();
    let other = home.path().join("notes.txt");
    fs::write(&other, "important").unwrap();
    for (path, text) in
        [(&other, "is not a GGUF file, and is not replaced"), (&home.path().to_path_buf(), "is a directory")]
    {
        let error = source.write_gguf(path, &force, &()).unwrap_err();
        assert!(matches!(error, CheckpointError::Target { .. }), "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
    assert_eq!(fs::read_to_string(&other).unwrap(), "important");
    let missing = home.path().join("missing/model.gguf");
    assert!(source.write_gguf(&missing, &force, &()).unwrap_err().to_string().contains("missing/model.gguf"));
    assert_eq!(names_in(home.path()), ["model.gguf", "notes.txt"]);
}

#[test]
fn work_that_stops_leaves_nothing() {
    struct Stop(AtomicU64);
    impl Progress for Stop {
        fn begin(&self, _bytes: u64) {}
        fn advance(&self, _bytes: u64) -> ControlFlow<()> {
            if self.0.fetch_add(1, Ordering::Relaxed) == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("model.gguf");
    let source = Checkpoint::open(fixture("llama")).unwrap();
    let error = source.write_gguf(&target, &options(BlockType::F32), &Stop(AtomicU64::new(0))).unwrap_err();
    assert!(matches!(error, CheckpointError::Interrupted));
    assert_eq!(names_in(home.path()), [""; 0]);
    // Each call to the file system fails once.
    for fail in 0..4 {
        let calls = AtomicU64::new(0);
        let _observation = observe(
            home.path(),
            Arc::new(move |_: Call<'_>| match calls.fetch_add(1, Ordering::Relaxed) == fail {
                true => Err(io::ErrorKind::StorageFull.into()),
                false => Ok(()),
            }),
        );
        let error = source.write_gguf(&target, &options(BlockType::F32), &()).unwrap_err();
        assert!(matches!(error, CheckpointError::Full { .. }), "{fail}: {error}");
        // The last call flushes the directory, after the file has its name.
        assert_eq!(names_in(home.path()).len(), usize::from(fail == 3));
        let _ = fs::remove_file(&target);
    }
}

#[test]
fn progress_counts_every_byte_of_the_tensors() {
    struct Count(AtomicU64);
    impl Progress for Count {
        fn begin(&self, _bytes: u64) {}
        fn advance(&self, bytes: u64) -> ControlFlow<()> {
            self.0.fetch_add(bytes, Ordering::Relaxed);
            ControlFlow::Continue(())
        }
    }
    let home = tempfile::tempdir().unwrap();
    let target = home.path().join("model.gguf");
    let count = Count(AtomicU64::new(0));
    let source = Checkpoint::open(fixture("moonlight-like")).unwrap();
    source.write_gguf(&target, &options(BlockType::Bf16), &count).unwrap();
    let bytes: usize = tensors(&target).iter().map(|(_, _, _, data)| data.len()).sum();
    assert_eq!(count.0.into_inner(), bytes as u64);
}

#[test]
fn what_llama_cpp_cannot_express_is_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    // Its query latent has a bias.
    let error = write(&fixture("deepseek-v2-like"), &home.path().join("model.gguf"), BlockType::F32).unwrap_err();
    assert!(error.to_string().contains("`layers.0.self_attn.q_a_proj.bias` has no place"), "{error}");
    assert_eq!(names_in(home.path()), [""; 0]);
}

#[test]
fn other_metadata_of_a_gguf_file_is_kept() {
    let home = tempfile::tempdir().unwrap();
    let [first, second] = ["first.gguf", "second.gguf"].map(|name| home.path().join(name));
    write(&fixture("llama"), &first, BlockType::F32).unwrap();
    let bytes = fs::read(&first).unwrap();
    let GgufHeader { mut metadata, tensors: infos, data_start, .. } = read_header(&first).unwrap();
    metadata.insert("general.author", "someone");
    metadata.insert("general.tags", Value::Array(Array::String(vec!["a".into()])));
    metadata.insert("tokenizer.ggml.precompiled_charsmap", "x");
    let header = GgufHeader::lay_out(metadata, infos).unwrap();
    let mut changed = moonlight_convert::gguf::write_header(&header);
    changed.extend(&bytes[data_start as usize..]);
    fs::write(&first, changed).unwrap();
    write(&first, &second, BlockType::Q8_0).unwrap();
    let metadata = read_header(&second).unwrap().metadata;
    assert_eq!(metadata.get("general.author"), Some(&Value::from("someone")));
    assert!(metadata.get("general.tags").is_some());
    assert_eq!(metadata.get("tokenizer.ggml.precompiled_charsmap"), Some(&Value::from("x")));
    assert_eq!(metadata.get("general.file_type"), Some(&Value::U32(7)));
}
