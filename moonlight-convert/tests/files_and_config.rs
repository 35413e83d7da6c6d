//! Where the files and `config.json` say different things, or more than the model needs: a head beside one that is tied,
//! quantized forms, prediction layers that are not announced. What is used is what transformers 5 uses; what is left out is
//! named.

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

/// transformers 5.24 (`tie_weights` after `from_pretrained`): two tensors that differ are not tied, with a warning.
#[test]
fn a_head_that_differs_from_the_embedding_is_used_and_kept_although_the_configuration_ties_it() {
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
    let (equal, said, _) = program(&[Path::new("verify"), &tied, &converted]);
    assert!(equal && said.starts_with("equal: "), "{said}");
    let (_, said, _) = program(&[Path::new("inspect"), &tied]);
    assert!(said.contains("the head is used, as transformers 5 does"), "{said}");
    // One that lost its head is another checkpoint, whichever way round they are compared.
    tensors.remove(HEAD);
    write_dir(&lost, &config, &tensors);
    for (a, b, side) in [(&tied, &lost, "only in the first"), (&lost, &tied, "only in the second")] {
        let (equal, said, error) = program(&[Path::new("verify"), a, b]);
        assert!(!equal && said.contains(&format!("{HEAD}: {side}")), "{said}{error}");
    }
}

#[test]
fn a_head_that_repeats_the_embedding_is_named_and_left_out() {
    let home = tempfile::tempdir().unwrap();
    let [tied, converted, alone] = ["tied", "converted", "alone"].map(|name| home.path().join(name));
    let plain = read_tensors(&fixture("qwen2"));
    let mut tensors = plain.clone();
    tensors.insert(HEAD.into(), plain[EMBEDDING].clone());
    write_dir(&tied, &config_of("qwen2"), &tensors);
    assert_eq!(Checkpoint::open(&tied).unwrap().tied_head(), TiedHead::Repeated);
    convert(&tied, &converted);
    assert_eq!(read_tensors(&converted), plain);
    let (equal, said, _) = program(&[Path::new("verify"), &tied, &converted]);
    let named = "not counted: 1 tensor only in the first: output head (repeats the embedding, to which it is tied)";
    assert!(equal && said.contains(named), "{said}");
    // In another dtype it is still the same.
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
    // A head alone is the embedding, too, as in transformers 5.
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

/// Values of E4M3 by their bits.
const E4M3: [(u8, f32); 6] =
    [(0x38, 1.0), (0xb8, -1.0), (0x40, 2.0), (0x30, 0.5), (0x7e, 448.0), (0x01, 0.001_953_125)];

/// The matrices of a family in FP8, each value one of [`E4M3`] and each row of scales another; and what they stand for.
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

/// The shape of a matrix's scales, by its rows.
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
fn fp8_with_a_scale_a_tensor_or_a_row_is_its_value_times_its_scale() {
    let home = tempfile::tempdir().unwrap();
    let family = "moonlight-like";
    let shapes: [(&str, &str, ScaleShape); 5] = [
        ("tensor", "one scale a tensor", |_| vec![1]),
        ("tensor", "one scale a tensor", |_| vec![]),
        ("tensor", "one scale a tensor", |_| vec![1, 1]),
        ("channel", "one scale a row", |rows| vec![rows, 1]),
        ("channel", "one scale a row", |rows| vec![rows]),
    ];
    for (at, (strategy, form, shape)) in shapes.into_iter().enumerate() {
        let (mut quantized, plain) = in_fp8(family, shape);
        // Scales of activations change no weight.
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
            let (_, said, _) = program(&[Path::new("inspect"), &dir]);
            assert!(said.contains(&format!("FP8, {form}: ")), "{said}");
            assert!(said.contains("not needed     1 tensor: scales of quantized activations"), "{said}");
        }
    }
}

#[test]
fn scales_of_another_strategy_than_the_configuration_names_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let (quantized, _) = in_fp8("moonlight-like", |rows| vec![rows, 1]);
    let mut config = config_of("moonlight-like");
    config["quantization_config"] = compressed(Some("tensor"));
    write_dir(home.path(), &config, &quantized);
    let checkpoint = Checkpoint::open(home.path()).unwrap();
    let problems = checkpoint.problems();
    assert!(problems.iter().all(|problem| matches!(problem, Problem::QuantizedTensor { .. })), "{problems:?}");
    let said = problems[0].to_string();
    assert!(said.ends_with("has a scale a row, and `quantization_config` says `tensor`"), "{said}");
    // A shape that no strategy has is named as such.
    let (quantized, _) = in_fp8("moonlight-like", |rows| vec![rows, 2]);
    config["quantization_config"] = compressed(Some("channel"));
    write_dir(home.path(), &config, &quantized);
    let problems = Checkpoint::open(home.path()).unwrap().problems();
    let wrong_shape =
        |problem: &Problem| matches!(problem, Problem::WrongShape { expected, .. } if expected[1..] == [1]);
    assert!(!problems.is_empty() && problems.iter().all(wrong_shape), "{problems:?}");
    // What is not read is named with what is.
    let int8: Tensors = quantized
        .into_iter()
        .map(|(name, raw)| (name, if raw.dtype == Dtype::F8_E4M3 { Raw { dtype: Dtype::I8, ..raw } } else { raw }))
        .collect();
    write_dir(home.path(), &config, &int8);
    let error = load(home.path(), &Device::default(), None).unwrap_err();
    assert!(matches!(error, CheckpointError::Mismatch { .. }), "{error}");
    let hint = error.hint().unwrap();
    assert!(hint.contains("read are FP8 (E4M3) with a scale a tensor, a row or a block, and INT4 in groups"), "{hint}");
}

/// transformers' FP8 integrations (fbgemm, fine-grained) save these beside the weights.
#[test]
fn scales_of_activations_are_left_out_and_named() {
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
fn a_quantization_that_is_not_followed_is_refused_by_name() {
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
    assert!(error.hint().unwrap().contains("take the weights before they were quantized"), "{error}");
    let error = refused(|config| config["new_key"] = json!(1), &tensors);
    assert!(error.to_string().contains("`quantization_config.new_key` is not known"), "{error}");
    let error = refused(|config| config["config_groups"]["group_0"]["weights"]["type"] = json!("int"), &tensors);
    assert!(
        error.to_string().contains("is kept as FP8, and `quantization_config` has no group of the `type`"),
        "{error}"
    );
    // FP8 that was cast without scales.
    let bare: Tensors = tensors.clone().into_iter().filter(|(name, _)| !name.ends_with("_scale")).collect();
    let error = refused(|config| *config = Value::Null, &bare);
    assert!(error.to_string().contains("weight_scale_inv` "), "{error}");
    assert!(error.hint().unwrap().contains("cast them to bf16"), "{error}");
}

/// Eight bits, floats, or groups of another size under the name of packed weights.
#[test]
fn packed_weights_are_what_the_configuration_says() {
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
    for (found, named) in [
        (packed(columns.div_ceil(4), 9, int(8, 9)), "has weights of 8 bits"),
        (packed(columns.div_ceil(4), 9, int(4, 9)), "has weights of 8 bits"),
        (
            packed(columns.div_ceil(8), 9, int(4, 18)),
            "has a scale for 9 values, and `quantization_config` says `group_size` 18",
        ),
        (packed(columns.div_ceil(8), 9, json!({"num_bits": 4, "type": "float"})), "no group of the `type` `int`"),
    ] {
        let [one @ Problem::QuantizedTensor { .. }] = &found[..] else { panic!("{found:?}") };
        assert!(one.to_string().contains(named), "{one}");
    }
}

/// transformers opens an index that lists what was never saved, where its model has no place for it.
#[test]
fn an_index_may_list_what_the_model_does_not_need() {
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
    // What the model needs is missing as ever.
    index("model.layers.0.self_attn.q_norm.weight");
    assert!(matches!(&Checkpoint::open(home.path()).unwrap().problems()[..], [Problem::NotInFile { .. }]));
}

#[test]
fn a_prediction_layer_that_is_not_announced_is_left_out_and_said() {
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
    let (_, _, said) = program(&[Path::new("convert"), &source, &converted]);
    let named = "left out: 4 tensors: multi-token-prediction layers that config.json does not announce";
    assert!(said.contains(named), "{said}");
    // They are no part of the model, and not in the other: not equal, but for those who ask for the model alone.
    let (equal, said, error) = program(&[Path::new("verify"), &source, &converted]);
    assert!(
        !equal && said.contains("model.layers.3.eh_proj.weight: only in the first: multi-token-prediction"),
        "{said}"
    );
    assert!(error.contains("--model-only"), "{error}");
    let (equal, said, _) = program(&[Path::new("verify"), &source, &converted, Path::new("--model-only")]);
    assert!(equal && said.contains("not counted: 4 tensors only in the first"), "{said}");
    let comparison = checkpoint.compare(&Checkpoint::open(&converted).unwrap(), 0.0, &()).unwrap();
    assert!(comparison.differences.is_empty() && !comparison.is_equal());
    // Where both have them, their bytes count.
    let other = home.path().join("other");
    tensors.get_mut("model.layers.3.enorm.weight").unwrap().data[0] ^= 1;
    write_dir(&other, &config_of(family), &tensors);
    let comparison = checkpoint.compare(&Checkpoint::open(&other).unwrap(), 0.0, &()).unwrap();
    let unused: Vec<_> = comparison.unused.iter().map(|unused| (unused.tensor.as_str(), unused.difference)).collect();
    assert_eq!(unused, [("model.layers.3.enorm.weight", UnusedDifference::Bytes)]);

    // A plain decoder layer after the last one is no prediction layer: the configuration is another model's.
    tensors.retain(|name, _| !name.starts_with("model.layers.3.") || name.ends_with("o_proj.weight"));
    write_dir(&source, &config_of(family), &tensors);
    let error = load(&source, &Device::default(), None).unwrap_err();
    assert!(error.to_string().contains("1 tensor is unexpected: `model.layers.3.self_attn.o_proj.weight`"), "{error}");
    assert!(error.hint().unwrap().contains("has no place for these tensors"), "{:?}", error.hint());
}

#[test]
fn a_key_that_is_not_followed_is_named_with_the_file_and_the_way_out() {
    let home = tempfile::tempdir().unwrap();
    let mut config = config_of("llama");
    config["sliding_window"] = 3.into();
    write_dir(home.path(), &config, &read_tensors(&fixture("llama")));
    let error = Checkpoint::open(home.path()).unwrap_err();
    let said = error.to_string();
    assert!(
        said.contains("config.json") && said.contains("`sliding_window` is 3, shorter than the 64 tokens"),
        "{said}"
    );
    assert!(error.hint().unwrap().contains("`max_position_embeddings`"));
    // The way out is one.
    config["max_position_embeddings"] = 3.into();
    fs::write(home.path().join("config.json"), config.to_string()).unwrap();
    load(home.path(), &Device::default(), None).unwrap();
}

#[test]
fn inspect_says_which_keys_were_passed_over() {
    let (_, said, _) = program(&[Path::new("inspect"), &fixture("moonlight-like")]);
    assert!(
        said.contains("passed over    attention_dropout, aux_loss_alpha, seq_aux (training in other programs)"),
        "{said}"
    );
    let (_, said, _) = program(&[Path::new("inspect"), &fixture("moonlight-like"), Path::new("--json")]);
    let summary: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(summary["ignored_keys"]["how a program computes the same thing"], json!(["ep_size", "pretraining_tp"]));
}
