//! Files that differ from `config.json` or contain more than the model needs: a separate head although the config ties
//! it, quantized forms, undeclared MTP layers. They are used as in transformers 5, and ignored tensors are named.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use burn::tensor::Device;
use common::{Raw, Tensors, config_of, fixture, parameters, read_tensors, write_dir, write_index, write_sharded};
use moonlight_convert::report::{Problem, UnusedDifference};
use moonlight_convert::{Checkpoint, CheckpointError, SaveOptions, SkipReason, TiedHead, load};
use safetensors::Dtype;
use serde_json::{Value, json};

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

fn program(arguments: &[&Path]) -> (bool, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_moonlight-convert")).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

fn convert(from: &Path, to: &Path) {
    Checkpoint::open(from).unwrap().convert(to, &SaveOptions::default()).unwrap();
}

fn config_in(dir: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(dir.join("config.json")).unwrap()).unwrap()
}

/// As in transformers 5.24 (`tie_weights` after `from_pretrained`): two tensors that differ are not tied, with a
/// warning.
#[test]
fn a_head_that_differs_from_the_embedding_is_used_although_the_config_ties_it() {
    let home = tempfile::tempdir().unwrap();
    let [tied, converted, lost] = ["tied", "converted", "lost"].map(|name| home.path().join(name));
    let mut config = config_of("llama");
    config["tie_word_embeddings"] = true.into();
    let mut tensors = read_tensors(&fixture("llama"));
    write_dir(&tied, &config, &tensors);
    let device = Device::default();
    let untied = load(&fixture("llama"), &device, None).unwrap().model;
    let opened = Checkpoint::open(&tied).unwrap();
    assert_eq!(opened.tied_head(), TiedHead::Separate);
    assert!(!opened.config().tie_word_embeddings);
    assert_eq!(parameters(&opened.load(&device, None).unwrap().model), parameters(&untied));

    convert(&tied, &converted);
    assert_eq!(read_tensors(&converted), tensors);
    assert_eq!(config_in(&converted)["tie_word_embeddings"], false);
    let (equal, printed, _) = program(&[Path::new("verify"), &tied, &converted]);
    assert!(equal && printed.starts_with("equal: "), "{printed}");
    let (_, printed, _) = program(&[Path::new("inspect"), &tied]);
    assert!(printed.contains("the head is used, as in transformers 5"), "{printed}");
    // Without its head it is a different checkpoint, in either order of the comparison.
    tensors.remove(HEAD);
    write_dir(&lost, &config, &tensors);
    for (a, b, side) in [(&tied, &lost, "only in the first"), (&lost, &tied, "only in the second")] {
        let (equal, printed, error) = program(&[Path::new("verify"), a, b]);
        assert!(!equal && printed.contains(&format!("{HEAD}: {side}")), "{printed}{error}");
    }
}

#[test]
fn a_head_equal_to_the_embedding_is_named_and_ignored() {
    let home = tempfile::tempdir().unwrap();
    let [tied, converted, alone] = ["tied", "converted", "alone"].map(|name| home.path().join(name));
    let plain = read_tensors(&fixture("qwen2"));
    let mut tensors = plain.clone();
    tensors.insert(HEAD.into(), plain[EMBEDDING].clone());
    write_dir(&tied, &config_of("qwen2"), &tensors);
    assert_eq!(Checkpoint::open(&tied).unwrap().tied_head(), TiedHead::Repeated);
    convert(&tied, &converted);
    assert_eq!(read_tensors(&converted), plain);
    let (equal, printed, _) = program(&[Path::new("verify"), &tied, &converted]);
    let named = "ignored: 1 tensor only in the first: output head (equal to the embedding, to which it is tied)";
    assert!(equal && printed.contains(named), "{printed}");
    // The comparison works across dtypes.
    let wide = |raw: &Raw| {
        let data = raw.data.chunks(2).flat_map(|half| [0, 0, half[0], half[1]]).collect();
        Raw { dtype: Dtype::F32, shape: raw.shape.clone(), data }
    };
    tensors.insert(HEAD.into(), wide(&plain[EMBEDDING]));
    write_dir(&tied, &config_of("qwen2"), &tensors);
    assert_eq!(Checkpoint::open(&tied).unwrap().tied_head(), TiedHead::Repeated);
    tensors.get_mut(HEAD).unwrap().data[3] ^= 0x80;
    write_dir(&tied, &config_of("qwen2"), &tensors);
    assert_eq!(Checkpoint::open(&tied).unwrap().tied_head(), TiedHead::Separate);
    // A head without an embedding serves as both, as in transformers 5.
    let mut tensors = plain.clone();
    let embedding = tensors.remove(EMBEDDING).unwrap();
    tensors.insert(HEAD.into(), embedding);
    write_dir(&alone, &config_of("qwen2"), &tensors);
    let device = Device::default();
    let loaded = load(&alone, &device, None).unwrap();
    assert_eq!(parameters(&loaded.model), parameters(&load(&fixture("qwen2"), &device, None).unwrap().model));
    let again = home.path().join("again");
    convert(&alone, &again);
    assert_eq!(read_tensors(&again), plain);
}

/// E4M3 bits and their values.
const E4M3: [(u8, f32); 6] =
    [(0x38, 1.0), (0xb8, -1.0), (0x40, 2.0), (0x30, 0.5), (0x7e, 448.0), (0x01, 0.001_953_125)];

/// The matrices of a family in FP8, with values from [`E4M3`] and a different scale for each row; and the dequantized
/// matrices.
fn in_fp8(family: &str, scale_shape: impl Fn(usize) -> Vec<usize>) -> (Tensors, Tensors) {
    let (mut quantized, mut plain) = (Tensors::new(), Tensors::new());
    for (name, raw) in read_tensors(&fixture(family)) {
        if !name.ends_with("proj.weight") && !name.ends_with("mqa.weight") {
            plain.insert(name.clone(), raw.clone());
            quantized.insert(name, raw);
            continue;
        }
        let [rows, columns] = raw.shape[..] else { panic!("{name} is a matrix") };
        let shape = scale_shape(rows);
        let count: usize = shape.iter().product();
        let scales: Vec<f32> = (0..count).map(|row| 0.1 + row as f32 / 3.0).collect();
        let value = |at: usize| E4M3[(at * 7 + at / columns) % E4M3.len()];
        let meant: Vec<u8> = (0..rows * columns)
            .flat_map(|at| half::bf16::from_f32(value(at).1 * scales[at / columns % count]).to_le_bytes())
            .collect();
        plain.insert(name.clone(), Raw { dtype: Dtype::BF16, shape: raw.shape.clone(), data: meant });
        let bytes = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        quantized.insert(format!("{name}_scale"), Raw { dtype: Dtype::F32, shape, data: bytes });
        let data = (0..rows * columns).map(|at| value(at).0).collect();
        quantized.insert(name, Raw { dtype: Dtype::F8_E4M3, shape: raw.shape, data });
    }
    (quantized, plain)
}

/// The shape of a matrix's scales, given its number of rows.
type ScaleShape = fn(usize) -> Vec<usize>;

fn compressed(strategy: Option<&str>) -> Value {
    let mut config = json!({"quant_method": "compressed-tensors", "format": "float-quantized"});
    if let Some(strategy) = strategy {
        config["config_groups"]["group_0"] = json!({"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float",
            "strategy": strategy, "symmetric": true}, "input_activations": {"num_bits": 8, "dynamic": false}});
    }
    config
}

#[test]
fn fp8_is_dequantized_with_scales_per_tensor_and_per_row() {
    let home = tempfile::tempdir().unwrap();
    let family = "moonlight-like";
    let shapes: [(&str, &str, ScaleShape); 5] = [
        ("tensor", "one scale per tensor", |_| vec![1]),
        ("tensor", "one scale per tensor", |_| vec![]),
        ("tensor", "one scale per tensor", |_| vec![1, 1]),
        ("channel", "one scale per row", |rows| vec![rows, 1]),
        ("channel", "one scale per row", |rows| vec![rows]),
    ];
    for (at, (strategy, form, shape)) in shapes.into_iter().enumerate() {
        let (mut quantized, plain) = in_fp8(family, shape);
        // Scales of activations do not change weights.
        let activations = "model.layers.0.self_attn.q_proj.input_scale";
        quantized.insert(activations.into(), quantized["model.layers.0.self_attn.q_proj.weight_scale"].clone());
        for (key, declared) in [
            ("quantization_config", None),
            ("quantization_config", Some(strategy)),
            ("compression_config", Some(strategy)),
        ] {
            let dir = home.path().join(format!("{at}-{key}-{}", declared.is_some()));
            let mut config = config_of(family);
            config[key] = compressed(declared);
            write_dir(&dir, &config, &quantized);
            let checkpoint = Checkpoint::open(&dir).unwrap();
            assert_eq!(checkpoint.problems(), []);
            assert_eq!(checkpoint.skipped()[&SkipReason::ActivationScales], [activations]);
            let written = dir.join("plain");
            convert(&dir, &written);
            let written_tensors = read_tensors(&written);
            for (name, raw) in &plain {
                if name.ends_with("proj.weight") {
                    assert!(written_tensors[name] == *raw, "{name}, {strategy}");
                }
            }
            assert!(!fs::read_to_string(written.join("config.json")).unwrap().contains("float-quantized"));
            let device = Device::default();
            let loaded = parameters(&load(&dir, &device, None).unwrap().model);
            assert!(loaded == parameters(&load(&written, &device, None).unwrap().model));
            let (_, printed, _) = program(&[Path::new("inspect"), &dir]);
            assert!(printed.contains(&format!("FP8, {form}: ")), "{printed}");
            assert!(printed.contains("ignored        1 tensor: scales of quantized activations"), "{printed}");
        }
    }
}

#[test]
fn scales_of_another_granularity_than_in_the_config_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let (quantized, _) = in_fp8("moonlight-like", |rows| vec![rows, 1]);
    let mut config = config_of("moonlight-like");
    config["quantization_config"] = compressed(Some("tensor"));
    write_dir(home.path(), &config, &quantized);
    let checkpoint = Checkpoint::open(home.path()).unwrap();
    let problems = checkpoint.problems();
    assert!(problems.iter().all(|problem| matches!(problem, Problem::QuantizedTensor { .. })), "{problems:?}");
    let printed = problems[0].to_string();
    assert!(printed.ends_with("has one scale per row; `quantization_config` has the `strategy` `tensor`"), "{printed}");
    // A shape of no granularity is reported as a wrong shape.
    let (quantized, _) = in_fp8("moonlight-like", |rows| vec![rows, 2]);
    config["quantization_config"] = compressed(Some("channel"));
    write_dir(home.path(), &config, &quantized);
    let problems = Checkpoint::open(home.path()).unwrap().problems();
    let wrong_shape =
        |problem: &Problem| matches!(problem, Problem::WrongShape { expected, .. } if expected[1..] == [1]);
    assert!(!problems.is_empty() && problems.iter().all(wrong_shape), "{problems:?}");
    // The hint lists what is supported.
    let int8: Tensors = quantized
        .into_iter()
        .map(|(name, raw)| (name, if raw.dtype == Dtype::F8_E4M3 { Raw { dtype: Dtype::I8, ..raw } } else { raw }))
        .collect();
    write_dir(home.path(), &config, &int8);
    let error = load(home.path(), &Device::default(), None).unwrap_err();
    assert!(matches!(error, CheckpointError::Mismatch { .. }), "{error}");
    let hint = error.hint().unwrap();
    assert!(
        hint.contains("supported are FP8 (E4M3) with one scale per tensor, row or block, and INT4 and INT8"),
        "{hint}"
    );
}

/// transformers' FP8 integrations (fbgemm, fine-grained) save these in addition to the weights.
#[test]
fn scales_of_activations_are_ignored_and_named() {
    let home = tempfile::tempdir().unwrap();
    let (mut tensors, _) = in_fp8("moonlight-like", |rows| vec![rows, 1]);
    let names = [
        "mlp.down_proj.activation_scale",
        "mlp.down_proj.input_scale_ub",
        "mlp.experts.down_proj_activation_scale",
        "mlp.experts.gate_up_proj_activation_scale",
    ];
    let scale = Raw { dtype: Dtype::F32, shape: vec![1], data: 1f32.to_le_bytes().into() };
    let names = names.map(|name| format!("model.layers.0.{name}"));
    names.iter().for_each(|name| drop(tensors.insert(name.clone(), scale.clone())));
    let mut config = config_of("moonlight-like");
    config["quantization_config"] = compressed(Some("channel"));
    write_dir(home.path(), &config, &tensors);
    let checkpoint = Checkpoint::open(home.path()).unwrap();
    assert_eq!(checkpoint.problems(), []);
    assert_eq!(checkpoint.skipped()[&SkipReason::ActivationScales], names);
}

#[test]
fn an_unsupported_quantization_is_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    let (tensors, _) = in_fp8("moonlight-like", |rows| vec![rows, 1]);
    let refused = |change: fn(&mut Value), tensors: &Tensors| {
        let mut config = config_of("moonlight-like");
        config["quantization_config"] = compressed(Some("channel"));
        change(&mut config["quantization_config"]);
        write_dir(home.path(), &config, tensors);
        load(home.path(), &Device::default(), None).unwrap_err()
    };
    let transform: fn(&mut Value) = |config| {
        config["transform_config"] =
            json!({"config_groups": {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"]}]}}});
    };
    let error = refused(transform, &tensors);
    assert!(error.to_string().contains("`quantization_config.transform_config` is {"), "{error}");
    assert!(error.hint().unwrap().contains("use the unquantized weights"), "{error}");
    let error = refused(|config| config["new_key"] = json!(1), &tensors);
    assert!(error.to_string().contains("unknown key `quantization_config.new_key`"), "{error}");
    let error = refused(|config| config["config_groups"]["group_0"]["weights"]["type"] = json!("int"), &tensors);
    assert!(
        error.to_string().contains("is stored as FP8; `quantization_config` has no group of the `type`"),
        "{error}"
    );
    // FP8 that was cast without scales.
    let bare: Tensors = tensors.clone().into_iter().filter(|(name, _)| !name.ends_with("_scale")).collect();
    let error = refused(|config| *config = Value::Null, &bare);
    assert!(error.to_string().contains("weight_scale_inv` "), "{error}");
    assert!(error.hint().unwrap().contains("to bf16 with torch"), "{error}");
}

/// Values of other bits, floats, or groups of another size in the layout of packed integers.
#[test]
fn packed_weights_must_match_the_config() {
    let home = tempfile::tempdir().unwrap();
    let weight = "model.layers.0.mlp.up_proj.weight";
    let mut tensors = read_tensors(&fixture("llama"));
    let [rows, columns] = tensors.remove(weight).unwrap().shape[..] else { panic!("{weight} is a matrix") };
    let mut packed = |words: usize, group: usize, weights: Value| {
        let raw = |dtype, shape: [usize; 2], data| Raw { dtype, shape: shape.into(), data };
        let scales = [rows, columns / group];
        tensors.insert(format!("{weight}_packed"), raw(Dtype::I32, [rows, words], vec![0; rows * words * 4]));
        tensors.insert(format!("{weight}_scale"), raw(Dtype::BF16, scales, vec![0; scales[0] * scales[1] * 2]));
        let shape = [rows, columns].iter().flat_map(|side| (*side as u64).to_le_bytes()).collect();
        tensors.insert(format!("{weight}_shape"), Raw { dtype: Dtype::I64, shape: vec![2], data: shape });
        let mut config = config_of("llama");
        config["quantization_config"] = json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}});
        write_dir(home.path(), &config, &tensors);
        Checkpoint::open(home.path()).unwrap().problems()
    };
    let int = |bits: u8, size: usize| json!({"num_bits": bits, "type": "int", "symmetric": true, "strategy": "group", "group_size": size});
    assert_eq!(packed(columns.div_ceil(8), 9, int(4, 9)), []);
    assert_eq!(packed(columns.div_ceil(4), 9, int(8, 9)), []);
    for (found, named) in [
        (
            packed(columns.div_ceil(8), 9, int(8, 9)),
            "has weights of 4 bits; `quantization_config` has the `num_bits` 8",
        ),
        (
            packed(columns.div_ceil(4), 9, int(4, 9)),
            "has weights of 8 bits; `quantization_config` has the `num_bits` 4",
        ),
        (packed(columns.div_ceil(4), 9, int(6, 9)), "has weights of 6 bits"),
        (
            packed(columns.div_ceil(8), 9, int(4, 18)),
            "has one scale per 9 values; `quantization_config` has the `group_size` 18",
        ),
        (packed(columns.div_ceil(8), 9, json!({"num_bits": 4, "type": "float"})), "no group of the `type` `int`"),
    ] {
        let [one @ Problem::QuantizedTensor { .. }] = &found[..] else { panic!("{found:?}") };
        assert!(one.to_string().contains(named), "{one}");
    }
}

/// transformers opens an index with tensors that were never saved, if its model does not need them.
#[test]
fn an_index_may_list_tensors_that_the_model_does_not_need() {
    let home = tempfile::tempdir().unwrap();
    let tensors = read_tensors(&fixture("qwen2"));
    let [first, _] = write_sharded(home.path(), &config_of("qwen2"), &tensors);
    let index = |extra: &str| {
        let text = fs::read_to_string(home.path().join("model.safetensors.index.json")).unwrap();
        let mut map = serde_json::from_value::<std::collections::BTreeMap<String, String>>(
            serde_json::from_str::<Value>(&text).unwrap()["weight_map"].clone(),
        )
        .unwrap();
        map.insert(extra.into(), first.clone());
        write_index(home.path(), &map);
    };
    index("model.layers.0.self_attn.rotary_emb.inv_freq");
    index(HEAD);
    let checkpoint = Checkpoint::open(home.path()).unwrap();
    assert_eq!(checkpoint.problems(), []);
    let note = checkpoint.skipped_notes().pop().unwrap();
    assert!(note.starts_with("the index lists `lm_head.weight` and 1 more, which"), "{note}");
    assert!(checkpoint.summary().unwrap().notes.contains(&note));
    // Tensors that the model needs are still reported as missing.
    index("model.layers.0.self_attn.q_norm.weight");
    assert!(matches!(&Checkpoint::open(home.path()).unwrap().problems()[..], [Problem::NotInFile { .. }]));
}

#[test]
fn an_undeclared_mtp_layer_is_ignored_and_named() {
    let home = tempfile::tempdir().unwrap();
    let [source, converted] = ["source", "converted"].map(|name| home.path().join(name));
    let family = "moonlight-like";
    let mut tensors = read_tensors(&fixture(family));
    let some = tensors["model.norm.weight"].clone();
    for name in ["eh_proj.weight", "enorm.weight", "shared_head.norm.weight", "self_attn.o_proj.weight"] {
        tensors.insert(format!("model.layers.3.{name}"), some.clone());
    }
    write_dir(&source, &config_of(family), &tensors);
    let checkpoint = Checkpoint::open(&source).unwrap();
    assert_eq!(checkpoint.problems(), []);
    assert_eq!(checkpoint.skipped()[&SkipReason::UndeclaredPrediction].len(), 4);
    let (_, _, printed) = program(&[Path::new("convert"), &source, &converted]);
    let named = "ignored 4 tensors: multi-token-prediction layers that `config.json` does not declare";
    assert!(printed.contains(named), "{printed}");
    // The checkpoints differ, except in what the model uses.
    let (equal, printed, error) = program(&[Path::new("verify"), &source, &converted]);
    assert!(
        !equal && printed.contains("model.layers.3.eh_proj.weight: only in the first: multi-token-prediction"),
        "{printed}"
    );
    assert!(error.contains("--model-only"), "{error}");
    let (equal, printed, _) = program(&[Path::new("verify"), &source, &converted, Path::new("--model-only")]);
    assert!(equal && printed.contains("ignored: 4 tensors only in the first"), "{printed}");
    let comparison = checkpoint.compare(&Checkpoint::open(&converted).unwrap(), 0.0, &()).unwrap();
    assert!(comparison.differences.is_empty() && !comparison.is_equal());
    // If both contain them, their bytes are compared.
    let other = home.path().join("other");
    tensors.get_mut("model.layers.3.enorm.weight").unwrap().data[0] ^= 1;
    write_dir(&other, &config_of(family), &tensors);
    let comparison = checkpoint.compare(&Checkpoint::open(&other).unwrap(), 0.0, &()).unwrap();
    let unused: Vec<_> = comparison.unused.iter().map(|unused| (unused.tensor.as_str(), unused.difference)).collect();
    assert_eq!(unused, [("model.layers.3.enorm.weight", UnusedDifference::Bytes)]);

    // A plain decoder layer after the last one is not an MTP layer: the config belongs to another model.
    tensors.retain(|name, _| !name.starts_with("model.layers.3.") || name.ends_with("o_proj.weight"));
    write_dir(&source, &config_of(family), &tensors);
    let error = load(&source, &Device::default(), None).unwrap_err();
    assert!(error.to_string().contains("1 tensor is unexpected: `model.layers.3.self_attn.o_proj.weight`"), "{error}");
    assert!(error.hint().unwrap().contains("has no parameters for these tensors"), "{:?}", error.hint());
}

#[test]
fn an_unsupported_key_is_named_with_the_file_and_a_hint() {
    let home = tempfile::tempdir().unwrap();
    let mut config = config_of("llama");
    config["sliding_window"] = 3.into();
    write_dir(home.path(), &config, &read_tensors(&fixture("llama")));
    let error = Checkpoint::open(home.path()).unwrap_err();
    let printed = error.to_string();
    assert!(
        printed.contains("config.json") && printed.contains("`sliding_window` is 3, shorter than the 64 tokens"),
        "{printed}"
    );
    assert!(error.hint().unwrap().contains("`max_position_embeddings`"));
    // The hint works.
    config["max_position_embeddings"] = 3.into();
    fs::write(home.path().join("config.json"), config.to_string()).unwrap();
    load(home.path(), &Device::default(), None).unwrap();
}

#[test]
fn inspect_lists_the_ignored_keys() {
    let (_, printed, _) = program(&[Path::new("inspect"), &fixture("moonlight-like")]);
    assert!(printed.contains("ignored        config keys: attention_dropout, aux_loss_alpha, seq_aux ("), "{printed}");
    let (_, printed, _) = program(&[Path::new("inspect"), &fixture("moonlight-like"), Path::new("--json")]);
    let summary: Value = serde_json::from_str(&printed).unwrap();
    let by_reason = summary["keys_passed_over"].as_object().unwrap();
    assert!(by_reason.values().any(|keys| *keys == json!(["ep_size", "pretraining_tp"])), "{by_reason:?}");
}

/// Files of a published repository that are neither read nor copied.
#[test]
fn inspect_lists_the_ignored_files() {
    let home = tempfile::tempdir().unwrap();
    let [first, _] = write_sharded(home.path(), &config_of("qwen2"), &read_tensors(&fixture("qwen2")));
    for name in ["pytorch_model.bin", "consolidated.00.pth", "extra.safetensors", "tokenizer.json", ".gitattributes"] {
        fs::write(home.path().join(name), "{}").unwrap();
    }
    fs::create_dir(home.path().join("figures")).unwrap();
    let summary = Checkpoint::open(home.path()).unwrap().summary().unwrap();
    assert_eq!(summary.ignored_files, ["consolidated.00.pth", "extra.safetensors", "figures/", "pytorch_model.bin"]);
    // With the single file, shards and index are ignored.
    fs::copy(fixture("qwen2").join("model.safetensors"), home.path().join("model.safetensors")).unwrap();
    let summary = Checkpoint::open(home.path()).unwrap().summary().unwrap();
    assert!(summary.ignored_files.contains(&first), "{:?}", summary.ignored_files);
    assert!(summary.ignored_files.contains(&"model.safetensors.index.json".to_owned()), "{:?}", summary.ignored_files);
}
