//! Every published layout of the family, and Burn's: FP8, INT4, burnpack; complete, partial, layer by layer.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use burn::store::{BurnpackStore, ModuleSnapshot};
use burn::tensor::{DType, Device, Tensor};
use common::{FAMILIES, Raw, config_of, fixture, parameters, read_tensors, write_dir, write_sharded};
use moonlight_convert::report::{Problem, TensorDifference};
use moonlight_convert::{
    Checkpoint, CheckpointError, Format, Progress, SaveOptions, SkipReason, hugging_face_tensors, load, save,
};
use moonlight_model::{ForwardContext, ModelConfig};
use safetensors::Dtype;
use serde::Deserialize;
use sha2::{Digest, Sha256};

fn burnpack() -> SaveOptions {
    SaveOptions { format: Format::Burnpack, ..SaveOptions::default() }
}

fn quantized(layout: &str) -> PathBuf {
    fixture("quantized").join(layout)
}

/// The results of torch and compressed-tensors for each weight, as digests (written by the fixtures' script).
#[derive(Deserialize)]
struct Expected {
    bf16: String,
    f32: String,
}

fn expected(layout: &str) -> BTreeMap<String, Expected> {
    serde_json::from_str(&fs::read_to_string(quantized(layout).join("expected.json")).unwrap()).unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn quantized_weights_equal_those_of_torch_bit_for_bit() {
    let home = tempfile::tempdir().unwrap();
    for layout in ["fp8", "int4"] {
        let expected = expected(layout);
        for dtype in [None, Some(DType::BF16), Some(DType::F32)] {
            let target = home.path().join(format!("{layout}-{dtype:?}"));
            let checkpoint = Checkpoint::open(quantized(layout)).unwrap();
            assert_eq!(checkpoint.problems(), []);
            checkpoint.convert(&target, &SaveOptions { dtype, ..SaveOptions::default() }).unwrap();
            let written = read_tensors(&target);
            assert!(written.keys().eq(expected.keys()), "{layout}");
            for (name, raw) in &written {
                let digest = match raw.dtype {
                    Dtype::BF16 => &expected[name].bf16,
                    Dtype::F32 => &expected[name].f32,
                    other => panic!("{name} is {other:?}"),
                };
                assert_eq!(&sha256(&raw.data), digest, "{layout} {dtype:?} {name}");
                let wide = dtype == Some(DType::F32) || name.ends_with("correction_bias");
                assert_eq!(raw.dtype == Dtype::F32, wide, "{name}");
            }
            let config = fs::read_to_string(target.join("config.json")).unwrap();
            assert!(!config.contains("quantization_config"), "the weights are plain now");
            assert!(config.contains("\"deepseek_v3\""), "transformers has no `kimi_k2` without remote code");
        }
    }
}

/// Loading equals converting and loading, in each dtype.
#[test]
fn quantized_weights_load_as_they_convert() {
    let home = tempfile::tempdir().unwrap();
    let device = Device::default();
    for (layout, skipped) in [("fp8", SkipReason::MultiTokenPrediction), ("int4", SkipReason::Vision)] {
        for dtype in [DType::BF16, DType::F32] {
            let target = home.path().join(format!("{layout}-{dtype:?}"));
            let options = SaveOptions { dtype: Some(dtype), ..SaveOptions::default() };
            Checkpoint::open(quantized(layout)).unwrap().convert(&target, &options).unwrap();
            let loaded = load(&quantized(layout), &device, Some(dtype)).unwrap();
            assert_eq!(parameters(&loaded.model), parameters(&load(&target, &device, None).unwrap().model));
            assert!(loaded.report.skipped.keys().eq([&skipped]), "{:?}", loaded.report.skipped);
        }
        assert_eq!(load(&quantized(layout), &device, None).unwrap().model.dtype(), DType::BF16, "as stored");
    }
}

/// The problems of a quantized fixture after a change.
fn problems(layout: &str, change: impl FnOnce(&mut common::Tensors, &mut serde_json::Value)) -> Vec<Problem> {
    let directory = tempfile::tempdir().unwrap();
    let mut tensors = read_tensors(&quantized(layout));
    let mut config = serde_json::from_str(&fs::read_to_string(quantized(layout).join("config.json")).unwrap()).unwrap();
    change(&mut tensors, &mut config);
    write_dir(directory.path(), &config, &tensors);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    assert!(load(directory.path(), &Device::default(), None).is_err());
    checkpoint.problems()
}

#[test]
fn problems_of_quantized_weights_are_named() {
    let up = "model.layers.1.mlp.experts.0.up_proj.weight";
    let scale = format!("{up}_scale_inv");
    let found = problems("fp8", |tensors, _| drop(tensors.remove(&scale)));
    assert_eq!(found, [Problem::Missing { tensor: scale.clone() }]);
    let found = problems("fp8", |tensors, _| {
        let wrong = tensors.get_mut(&scale).unwrap();
        wrong.shape.reverse();
        wrong.shape.push(1);
    });
    assert!(matches!(&found[..], [Problem::WrongShape { tensor, .. }] if *tensor == scale), "{found:?}");
    // The config's block determines the right shape.
    let found = problems("fp8", |_, config| config["quantization_config"]["weight_block_size"] = vec![64, 64].into());
    assert!(found.len() > 5 && found.iter().all(|problem| matches!(problem, Problem::WrongShape { .. })), "{found:?}");

    let packed = "language_model.model.layers.1.mlp.experts.0.up_proj.weight";
    let found = problems("int4", |tensors, _| drop(tensors.remove(&format!("{packed}_shape"))));
    assert!(
        matches!(&found[..], [Problem::Missing { tensor }] if tensor.ends_with("0.up_proj.weight_shape")),
        "{found:?}"
    );
    let found = problems("int4", |tensors, _| {
        tensors.get_mut(&format!("{packed}_shape")).unwrap().data[0] ^= 1;
    });
    let expected = Problem::WrongShape {
        tensor: format!("{packed}_shape"),
        file: "model.safetensors".into(),
        found: vec![97, 64],
        expected: vec![96, 64],
    };
    assert_eq!(found, [expected]);
    let found = problems("int4", |_, config| {
        config["text_config"]["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = false.into();
    });
    assert_eq!(found.len(), 9, "each expert's matrix");
    assert!(found[0].to_string().contains("has weights with zero points"), "{}", found[0]);
    // A NaN in FP8.
    let directory = tempfile::tempdir().unwrap();
    let mut tensors = read_tensors(&quantized("fp8"));
    tensors.get_mut(up).unwrap().data[7] = 0x7f;
    let config = serde_json::from_str(&fs::read_to_string(quantized("fp8").join("config.json")).unwrap()).unwrap();
    write_dir(directory.path(), &config, &tensors);
    let error = load(directory.path(), &Device::default(), None).unwrap_err();
    assert!(matches!(&error, CheckpointError::NonFinite { tensor, .. } if tensor == up), "{error}");
}

#[test]
fn a_round_trip_through_burnpack_changes_nothing() {
    let home = tempfile::tempdir().unwrap();
    let device = Device::default();
    for family in FAMILIES {
        let (pack, back) = (home.path().join(family).join("pack"), home.path().join(family).join("back"));
        let original = Checkpoint::open(fixture(family)).unwrap();
        original.convert(&pack, &burnpack()).unwrap();
        let packed = Checkpoint::open(&pack).unwrap();
        assert!(packed.is_burnpack() && packed.problems().is_empty());
        let comparison = original.compare(&packed, 0.0, &()).unwrap();
        assert_eq!(comparison.differences, [], "{family}");
        assert!(comparison.tensors > 20);
        assert_eq!(
            parameters(&load(&pack, &device, None).unwrap().model),
            parameters(&load(&fixture(family), &device, None).unwrap().model),
            "{family}"
        );
        packed.convert(&back, &SaveOptions { max_shard_size: 30_000, ..SaveOptions::default() }).unwrap();
        let plain = home.path().join(family).join("plain");
        original.convert(&plain, &SaveOptions::default()).unwrap();
        assert_eq!(read_tensors(&back), read_tensors(&plain), "{family}");
        assert!(back.join("generation_config.json").exists());
    }
}

/// burn-store opens what this crate writes and vice versa, with equal tensors byte for byte.
#[test]
fn burn_store_and_this_crate_read_each_others_files() {
    let home = tempfile::tempdir().unwrap();
    let device = Device::default();
    for family in FAMILIES {
        let pack = home.path().join(family);
        let loaded = load(&fixture(family), &device, None).unwrap().model;
        Checkpoint::open(fixture(family)).unwrap().convert(&pack, &burnpack()).unwrap();
        let mut model = loaded.config().clone().init(&device);
        let applied = model.load_from(&mut BurnpackStore::from_file(pack.join("model.bpk"))).unwrap();
        assert!(applied.is_success() && applied.missing.is_empty() && applied.unused.is_empty(), "{applied:?}");
        assert_eq!(parameters(&model), parameters(&loaded), "{family}");

        let theirs = home.path().join(format!("{family}-theirs"));
        fs::create_dir(&theirs).unwrap();
        fs::copy(pack.join("config.json"), theirs.join("config.json")).unwrap();
        loaded.save_into(&mut BurnpackStore::from_file(theirs.join("model.bpk"))).unwrap();
        assert_eq!(parameters(&load(&theirs, &device, None).unwrap().model), parameters(&loaded), "{family}");

        let saved = home.path().join(format!("{family}-saved"));
        save(&loaded, &saved, &burnpack()).unwrap();
        assert_eq!(fs::read(saved.join("model.bpk")).unwrap(), fs::read(pack.join("model.bpk")).unwrap(), "{family}");
    }
}

/// A layer is loaded from the only file that contains it, with all others missing.
#[test]
fn one_layer_is_loaded_and_run_without_the_other_files() {
    let home = tempfile::tempdir().unwrap();
    let device = Device::default();
    let by_layer = home.path().join("by-layer");
    let options = SaveOptions { shard_by_layer: true, ..SaveOptions::default() };
    let original = Checkpoint::open(fixture("moonlight-like")).unwrap();
    original.convert(&by_layer, &options).unwrap();
    let config = original.config().clone();
    assert_eq!(Checkpoint::open(&by_layer).unwrap().files().len(), config.num_hidden_layers);
    for absent in [1, 3] {
        fs::remove_file(by_layer.join(format!("model-{absent:05}-of-00003.safetensors"))).unwrap();
    }
    let checkpoint = Checkpoint::open(&by_layer).unwrap();
    assert!(matches!(checkpoint.load(&device, None), Err(CheckpointError::Mismatch { .. })));
    let dtype = Some(DType::F32);
    let (layer, report) = checkpoint.load_part(config.init_layer(1, &device), "layers.1", &device, dtype).unwrap();
    assert_eq!(report.bytes, checkpoint.files()[1].bytes, "all of the one file, and nothing else");
    let whole = load(&fixture("moonlight-like"), &device, dtype).unwrap().model;
    let hidden = || Tensor::<3>::ones([2, 5, config.hidden_size], &device) * 0.5;
    let context = ForwardContext::new(&config.rotary(), [2, 5], &device);
    let alone = layer.forward(hidden(), &context).hidden.into_data();
    assert_eq!(alone, whole.layers[1].forward(hidden(), &context).hidden.into_data());
    assert!(alone.iter::<f32>().all(f32::is_finite));

    for path in ["layers.0", "layers.2.mlp", "embed_tokens"] {
        let refused = checkpoint.load_part(config.init_layer(0, &device), path, &device, None);
        assert!(matches!(refused, Err(CheckpointError::Mismatch { .. })), "{path} is in a file that is absent");
    }
    let refused = checkpoint.load_part(config.init_layer(0, &device), "layers.7", &device, None);
    assert!(matches!(refused, Err(CheckpointError::NoSuchPart { .. })));
    // Any part can be loaded, also from a burnpack file.
    let pack = home.path().join("pack");
    original.convert(&pack, &burnpack()).unwrap();
    let (embedding, _) = Checkpoint::open(&pack)
        .unwrap()
        .load_part(config.init(&device).embed_tokens, "embed_tokens", &device, dtype)
        .unwrap();
    assert_eq!(embedding.weight.val().into_data(), whole.embed_tokens.weight.val().into_data());
}

/// A partial checkpoint is converted to burnpack and back, and compares as equal.
#[test]
fn a_part_of_a_checkpoint_converts_when_asked_to() {
    let home = tempfile::tempdir().unwrap();
    let source = home.path().join("source");
    let files = write_sharded(&source, &config_of("moonlight-like"), &read_tensors(&fixture("moonlight-like")));
    fs::remove_file(source.join(&files[1])).unwrap();
    let part = Checkpoint::open(&source).unwrap();
    let (pack, back) = (home.path().join("pack"), home.path().join("back"));
    assert!(matches!(part.convert(&pack, &burnpack()), Err(CheckpointError::Mismatch { .. })));
    assert!(!pack.exists());
    part.convert(&pack, &SaveOptions { partial: true, ..burnpack() }).unwrap();
    let packed = Checkpoint::open(&pack).unwrap();
    assert!(!packed.problems().is_empty());
    packed.convert(&back, &SaveOptions { partial: true, ..SaveOptions::default() }).unwrap();
    let back = Checkpoint::open(&back).unwrap();
    let whole = Checkpoint::open(fixture("moonlight-like")).unwrap();
    let comparison = whole.compare(&back, 0.0, &()).unwrap();
    assert!(comparison.tensors > 10, "{}", comparison.tensors);
    assert!(!comparison.differences.is_empty());
    assert!(comparison.differences.iter().all(|difference| matches!(difference, TensorDifference::OnlyInFirst { .. })));
    assert_eq!(part.compare(&back, 0.0, &()).unwrap().differences, []);
}

#[test]
fn comparing_finds_each_kind_of_difference() {
    let home = tempfile::tempdir().unwrap();
    let original = Checkpoint::open(fixture("moonlight-like")).unwrap();
    let narrow = home.path().join("f16");
    let wide = home.path().join("f32");
    for (path, dtype) in [(&narrow, DType::F16), (&wide, DType::F32)] {
        original.convert(path, &SaveOptions { dtype: Some(dtype), ..SaveOptions::default() }).unwrap();
    }
    let wide = Checkpoint::open(&wide).unwrap();
    let comparison = original.compare(&wide, 0.0, &()).unwrap();
    assert_eq!(comparison.differences, [], "bf16 is exact in f32");
    assert!(comparison.dtypes_differ > 20);
    let changed = home.path().join("changed");
    let mut tensors = read_tensors(&fixture("moonlight-like"));
    let norm: &mut Raw = tensors.get_mut("model.norm.weight").unwrap();
    norm.data[1] ^= 0x80; // the first value's sign
    write_dir(&changed, &config_of("moonlight-like"), &tensors);
    let changed = Checkpoint::open(&changed).unwrap();
    let first = f32::from_le_bytes([0, 0, norm_bytes()[0], norm_bytes()[1]]);
    for other in [&original, &wide] {
        let comparison = changed.compare(other, 0.0, &()).unwrap();
        let [TensorDifference::Values { tensor, distance }] = &comparison.differences[..] else {
            panic!("{comparison:?}")
        };
        assert_eq!(tensor, "model.norm.weight");
        assert_eq!(distance.largest, 2.0 * f64::from(first.abs()));
        assert!(distance.mean < distance.largest && distance.cosine < 1.0);
        assert_eq!(changed.compare(other, distance.largest, &()).unwrap().differences, []);
    }
}

fn norm_bytes() -> Vec<u8> {
    read_tensors(&fixture("moonlight-like"))["model.norm.weight"].data.clone()
}

/// Counts bytes, and stops after `at`.
struct Stop {
    at: u64,
    done: AtomicU64,
    total: AtomicU64,
}

impl Progress for Stop {
    fn begin(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    fn advance(&self, bytes: u64) -> ControlFlow<()> {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if done > self.at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

#[test]
fn an_interrupted_conversion_leaves_no_files() {
    let home = tempfile::tempdir().unwrap();
    let original = Checkpoint::open(fixture("moonlight-like")).unwrap();
    let target = home.path().join("target");
    let entries = |dir: &Path| fs::read_dir(dir).unwrap().count();
    for options in [SaveOptions::default(), burnpack()] {
        let stop = Stop { at: 20_000, done: AtomicU64::new(0), total: AtomicU64::new(0) };
        let stopped = original.convert_with(&target, &options, &stop);
        assert!(matches!(stopped, Err(CheckpointError::Interrupted)), "{stopped:?}");
        assert_eq!(entries(home.path()), 0);
        let count = Stop { at: u64::MAX, ..stop };
        count.done.store(0, Ordering::Relaxed);
        original.convert_with(&target, &options, &count).unwrap();
        assert_eq!(count.done.into_inner(), count.total.into_inner(), "all of it is counted");
        fs::remove_dir_all(&target).unwrap();
    }
}

#[test]
fn a_checkpoint_larger_than_the_disk_is_refused_before_anything_is_written() {
    // The config has an embedding of more than a TB; the sparse file claims to contain it.
    let home = tempfile::tempdir().unwrap();
    let mut config = config_of("llama");
    (config["vocab_size"], config["hidden_size"]) = ((1u64 << 20).into(), (1u64 << 18).into());
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for tensor in
        ModelConfig::from_value(config.clone()).unwrap().parameter_shapes().iter().flat_map(hugging_face_tensors)
    {
        let start = end;
        end += 4 * tensor.shape.iter().product::<usize>();
        let entry = serde_json::json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name, entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    let source = home.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("config.json"), config.to_string()).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    let length = (file.len() + end) as u64;
    fs::write(source.join("model.safetensors"), &file).unwrap();
    let sparse = fs::File::options().write(true).open(source.join("model.safetensors")).unwrap();
    sparse.set_len(length).unwrap();
    let refused = Checkpoint::open(&source).unwrap().convert(&home.path().join("target"), &SaveOptions::default());
    assert!(matches!(refused, Err(CheckpointError::NoRoom { .. })), "{refused:?}");
    assert!(!home.path().join("target").exists());
}

/// Files of every layout that are truncated between opening and reading: every reader reports it.
#[test]
fn weights_truncated_after_opening_are_an_error() {
    let home = tempfile::tempdir().unwrap();
    let copy = |from: &Path, name: &str| {
        let to = home.path().join(name);
        fs::create_dir(&to).unwrap();
        for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
            fs::write(to.join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
        }
        to
    };
    let pack = home.path().join("burnpack");
    Checkpoint::open(fixture("moonlight-like")).unwrap().convert(&pack, &burnpack()).unwrap();
    let sources = [fixture("moonlight-like"), quantized("fp8"), quantized("int4"), pack];
    for (number, from) in sources.iter().enumerate() {
        let dir = copy(from, &format!("cut-{number}"));
        let whole = Checkpoint::open(from).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        assert_eq!(checkpoint.problems(), []);
        let file = dir.join(&checkpoint.files()[0].name);
        let length = fs::metadata(&file).unwrap().len();
        // The last tensors of a file may be ignored ones, so that a small cut might not be noticed.
        for left in [length / 2, 10, 0] {
            fs::File::options().write(true).open(&file).unwrap().set_len(left).unwrap();
            let shorter = |error: CheckpointError| {
                assert!(error.to_string().contains("it is shorter than when it was opened"), "{dir:?}: {error}");
            };
            for options in [SaveOptions::default(), burnpack(), SaveOptions { dtype: Some(DType::F32), ..burnpack() }] {
                // `problems` reads the shapes of INT4 matrices again, and reports them.
                if checkpoint.problems().is_empty() {
                    shorter(checkpoint.convert(&home.path().join("out"), &options).unwrap_err());
                    shorter(checkpoint.compare(&whole, 0.0, &()).unwrap_err());
                    shorter(whole.compare(&checkpoint, 0.0, &()).unwrap_err());
                    shorter(checkpoint.load(&Device::default(), None).unwrap_err());
                }
            }
            let read: Result<Vec<_>, _> = checkpoint.tensors().map(|(_, tensor)| checkpoint.data(tensor)).collect();
            shorter(read.unwrap_err());
        }
        assert!(!home.path().join("out").exists());
    }
}

/// Open files can be read to their end after the directory has been replaced or removed, as a training run does with its
/// oldest checkpoint.
#[cfg(unix)]
#[test]
fn a_checkpoint_that_is_removed_can_be_read_to_its_end() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("checkpoint");
    let options = SaveOptions { max_shard_size: 30_000, ..SaveOptions::default() };
    Checkpoint::open(fixture("moonlight-like")).unwrap().convert(&dir, &options).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert!(checkpoint.files().len() > 4);
    fs::remove_dir_all(&dir).unwrap();
    let model = checkpoint.load(&Device::default(), None).unwrap().model;
    let expected = load(&fixture("moonlight-like"), &Device::default(), None).unwrap().model;
    assert!(parameters(&model) == parameters(&expected));
}

/// The time to open an index is linear in its length.
#[test]
fn an_index_of_many_missing_files_is_read_quickly() {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("config.json"), config_of("moonlight-like").to_string()).unwrap();
    let map: BTreeMap<String, String> =
        (0..60_000).map(|number| (format!("model.t{number}"), format!("f{number}.safetensors"))).collect();
    common::write_index(home.path(), &map);
    let begun = std::time::Instant::now();
    let checkpoint = Checkpoint::open(home.path()).unwrap();
    let problems = checkpoint.problems();
    // Quadratic time took about ten seconds.
    assert!(begun.elapsed() < std::time::Duration::from_secs(6), "{:?}", begun.elapsed());
    let absent = |problem: &&Problem| matches!(problem, Problem::MissingFile { tensors: 1, .. });
    assert_eq!(problems.iter().filter(absent).count(), 60_000);
}
