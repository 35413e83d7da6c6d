//! Load, save, load: bitwise, for every family, dtype and size of shard.

mod common;

use std::collections::BTreeMap;
use std::fs;

use burn::module::Module;
use burn::tensor::{DType, Device};
use common::{FAMILIES, Raw, Tensors, config_of, fixture, parameters, read_tensors, write_dir};
use moonlight_convert::{Access, Checkpoint, CheckpointError, FileError, Format, SaveOptions, SkipReason, load, save};
use moonlight_model::ModelConfig;
use moonlight_model::config::ParameterKind;
use moonlight_model::moe::Router;
use safetensors::Dtype;

/// The expected tensors after a round trip: the same, without ignored ones, and with correction biases in f32.
fn expected(mut tensors: Tensors) -> Tensors {
    tensors.retain(|name, _| !name.ends_with("inv_freq"));
    for (name, raw) in &mut tensors {
        if name.ends_with("e_score_correction_bias") && raw.dtype == Dtype::BF16 {
            // bf16 is the upper half of an f32.
            raw.data = raw.data.chunks(2).flat_map(|half| [0, 0, half[0], half[1]]).collect();
            raw.dtype = Dtype::F32;
        }
    }
    tensors
}

#[test]
fn a_round_trip_preserves_every_family() {
    let device = Device::default();
    for family in FAMILIES {
        let original = read_tensors(&fixture(family));
        let loaded = load(&fixture(family), &device, None).unwrap();
        let before = parameters(&loaded.model);
        for max_shard_size in [5_000_000_000, 20_000, 1] {
            let directory = tempfile::tempdir().unwrap();
            let saved = directory.path().join("saved");
            let options = SaveOptions { max_shard_size, ..SaveOptions::default() };
            save(&loaded.model, &saved, &options).unwrap();
            assert_eq!(read_tensors(&saved), expected(original.clone()), "{family} {max_shard_size}");
            let again = load(&saved, &device, None).unwrap();
            assert_eq!(parameters(&again.model), before, "{family} {max_shard_size}");
            assert_eq!(again.model.config().dtype, loaded.model.config().dtype);
            assert!(again.report.skipped.is_empty());
        }
    }
}

/// Matrices of many tiles and odd sizes, processed by all threads in several parts.
#[test]
fn a_round_trip_preserves_large_matrices() {
    let mut config = ModelConfig::preset("bench-small").unwrap();
    (config.vocab_size, config.num_hidden_layers) = (5001, 2);
    config.hidden_size = 264;
    let device = Device::default();
    device.seed(7);
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let model = config.init(&device);
    for (dtype, name) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
        save(&model, &path(name), &SaveOptions { dtype: Some(dtype), ..SaveOptions::default() }).unwrap();
        let again = load(&path(name), &device, None).unwrap().model;
        if dtype == DType::F32 {
            assert_eq!(parameters(&again), parameters(&model));
        }
        save(&again, &path("again"), &SaveOptions::default()).unwrap();
        assert_eq!(read_tensors(&path("again")), read_tensors(&path(name)), "{name}");
        // Untransposed rows, another format, and another dtype in between.
        let burnpack = SaveOptions { format: Format::Burnpack, ..SaveOptions::default() };
        Checkpoint::open(path(name)).unwrap().convert(&path("burnpack"), &burnpack).unwrap();
        assert_eq!(parameters(&load(&path("burnpack"), &device, None).unwrap().model), parameters(&again), "{name}");
        let wide = load(&path(name), &device, Some(DType::F32)).unwrap().model;
        save(&wide, &path("again"), &SaveOptions { dtype: Some(dtype), ..SaveOptions::default() }).unwrap();
        assert_eq!(read_tensors(&path("again")), read_tensors(&path(name)), "{name}");
    }
}

/// A model, and the checkpoint at `path` to which it was saved.
#[cfg(unix)]
fn saved_and_opened(path: &std::path::Path) -> (moonlight_model::CausalLm, Checkpoint) {
    let model = load(&fixture("moonlight-like"), &Device::default(), None).unwrap().model;
    save(&model, path, &SaveOptions::default()).unwrap();
    (model, Checkpoint::open(path).unwrap())
}

/// The opened checkpoint is loaded, even after another one has replaced it.
#[cfg(unix)]
#[test]
fn a_checkpoint_replaced_after_opening_is_loaded_as_opened() {
    let device = Device::default();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model");
    let (old, opened) = saved_and_opened(&path);
    save(&old.config().init(&device), &path, &SaveOptions { dtype: Some(DType::BF16), ..SaveOptions::default() })
        .unwrap();
    assert_eq!(parameters(&opened.load(&device, None).unwrap().model), parameters(&old));
    assert_ne!(parameters(&load(&path, &device, None).unwrap().model), parameters(&old));
}

/// A truncated file is an error and does not crash.
#[cfg(unix)]
#[test]
fn a_file_truncated_after_opening_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model");
    let (_, opened) = saved_and_opened(&path);
    let file = fs::File::options().write(true).open(path.join("model.safetensors")).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    let error = opened.load(&Device::default(), None).unwrap_err();
    assert!(matches!(error, CheckpointError::File(FileError { access: Access::Read, .. })), "{error}");
}

#[test]
fn converting_files_preserves_every_family() {
    for family in FAMILIES {
        let original = read_tensors(&fixture(family));
        let directory = tempfile::tempdir().unwrap();
        let saved = directory.path().join("saved");
        let options = SaveOptions { max_shard_size: 30_000, ..SaveOptions::default() };
        Checkpoint::open(fixture(family)).unwrap().convert(&saved, &options).unwrap();
        assert_eq!(read_tensors(&saved), expected(original), "{family}");
    }
}

/// bf16 to f32 and back is exact; saving a model and converting files write the same bytes.
#[test]
fn saving_and_converting_change_dtypes_in_the_same_way() {
    let device = Device::default();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    for family in FAMILIES {
        for (dtype, name) in [(DType::F32, "f32"), (DType::BF16, "bf16"), (DType::F16, "f16")] {
            let options = SaveOptions { dtype: Some(dtype), ..SaveOptions::default() };
            save(&load(&fixture(family), &device, None).unwrap().model, &path(name), &options).unwrap();
            Checkpoint::open(fixture(family)).unwrap().convert(&path("files"), &options).unwrap();
            assert_eq!(read_tensors(&path(name)), read_tensors(&path("files")), "{family} {name}");
            // Converting while loading equals loading the converted files.
            let converted = load(&fixture(family), &device, Some(dtype)).unwrap();
            assert_eq!(
                parameters(&converted.model),
                parameters(&load(&path(name), &device, None).unwrap().model),
                "{family} {name}"
            );
        }
        let from_f32 = load(&path("f32"), &device, Some(DType::BF16)).unwrap();
        assert_eq!(parameters(&from_f32.model), parameters(&load(&path("bf16"), &device, None).unwrap().model));
    }
}

#[test]
fn the_correction_bias_is_f32_and_is_not_trained() {
    let loaded = load(&fixture("moonlight-like"), &Device::default().autodiff(), None).unwrap();
    let model = &loaded.model;
    for (path, dtype, _) in parameters(model) {
        let bias = path.ends_with("e_score_correction_bias");
        assert_eq!(dtype, if bias { DType::F32 } else { DType::BF16 }, "{path}");
    }
    let moonlight_model::FeedForward::Moe(moe) = &model.layers[1].mlp else { panic!("layer 1 has experts") };
    let Router { weight, e_score_correction_bias, .. } = &moe.router;
    assert!(weight.val().is_require_grad());
    assert!(!e_score_correction_bias.as_ref().unwrap().val().is_require_grad());
    // The bias stays frozen after `valid`, `train`, and saving.
    let model = model.valid().train();
    let moonlight_model::FeedForward::Moe(moe) = &model.layers[1].mlp else { panic!("layer 1 has experts") };
    assert!(!moe.router.e_score_correction_bias.as_ref().unwrap().val().is_require_grad());
    assert!(moe.router.weight.val().is_require_grad());
    let directory = tempfile::tempdir().unwrap();
    save(&model, &directory.path().join("m"), &SaveOptions::default()).unwrap();
    let again = load(&directory.path().join("m"), &Device::default(), None).unwrap();
    assert_eq!(parameters(&again.model), parameters(&model));
}

#[test]
fn a_router_in_another_dtype_keeps_it() {
    let directory = tempfile::tempdir().unwrap();
    let mut tensors = read_tensors(&fixture("moonlight-like"));
    let router = tensors.get_mut("model.layers.1.mlp.gate.weight").unwrap();
    *router = widened(router);
    write_dir(directory.path(), &config_of("moonlight-like"), &tensors);
    let device = Device::default();
    let loaded = load(directory.path(), &device, None).unwrap();
    for (path, dtype, _) in parameters(&loaded.model) {
        let f32 = path == "layers.1.mlp.router.weight" || path.ends_with("e_score_correction_bias");
        assert_eq!(dtype, if f32 { DType::F32 } else { DType::BF16 }, "{path}");
    }
    // Any other tensor in f32 makes the model f32, so that nothing is lost.
    let down = tensors.get_mut("model.layers.1.mlp.experts.3.down_proj.weight").unwrap();
    *down = widened(down);
    write_dir(directory.path(), &config_of("moonlight-like"), &tensors);
    let mixed = load(directory.path(), &device, None).unwrap();
    assert_eq!(mixed.model.dtype(), DType::F32);
    let plain = load(&fixture("moonlight-like"), &device, Some(DType::F32)).unwrap();
    let routers_apart = |model| parameters(model).into_iter().filter(|(path, ..)| !path.ends_with("router.weight"));
    assert!(routers_apart(&mixed.model).eq(routers_apart(&plain.model)));
}

/// The number of ignored tensors for each reason.
fn counts(skipped: &BTreeMap<SkipReason, Vec<String>>) -> Vec<(SkipReason, usize)> {
    skipped.iter().map(|(reason, names)| (*reason, names.len())).collect()
}

fn widened(raw: &Raw) -> Raw {
    let data = raw.data.chunks(2).flat_map(|half| [0, 0, half[0], half[1]]).collect();
    Raw { dtype: Dtype::F32, shape: raw.shape.clone(), data }
}

/// The same weights under other names: Kimi-VL's prefixes with a vision tower, an MTP layer, a stored head that is
/// tied, and transformers 5's stacked experts.
#[test]
fn other_tensor_names_load_the_same_model() {
    let device = Device::default();
    let family = "deepseek-v3-like";
    let plain = parameters(&load(&fixture(family), &device, None).unwrap().model);
    let tensors = read_tensors(&fixture(family));
    let some = tensors["model.norm.weight"].clone();
    let directory = tempfile::tempdir().unwrap();

    for (model, head) in [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("language_model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
    ] {
        let mut renamed: Tensors = tensors
            .iter()
            .map(|(name, raw)| match name.strip_prefix("model.") {
                Some(rest) => (format!("{model}{rest}"), raw.clone()),
                None => (head.to_owned(), raw.clone()),
            })
            .collect();
        renamed.insert("vision_tower.encoder.blocks.0.wqkv.weight".into(), some.clone());
        renamed.insert("multi_modal_projector.linear_1.bias".into(), some.clone());
        renamed.insert(format!("{model}layers.3.eh_proj.weight"), some.clone());
        let mut config = config_of(family);
        config["num_nextn_predict_layers"] = 1.into();
        write_dir(directory.path(), &serde_json::json!({"model_type": "kimi_vl", "text_config": config}), &renamed);
        let loaded = load(directory.path(), &device, None).unwrap();
        assert_eq!(parameters(&loaded.model), plain, "{model}");
        assert_eq!(
            counts(&loaded.report.skipped),
            [(SkipReason::MultiTokenPrediction, 1), (SkipReason::Vision, 2)],
            "{model}"
        );
        // The saved config does not declare what was ignored.
        let saved = directory.path().join("saved");
        save(&loaded.model, &saved, &SaveOptions::default()).unwrap();
        assert_eq!(Checkpoint::open(&saved).unwrap().config().extra["num_nextn_predict_layers"], 0);
    }

    let config = load(&fixture(family), &device, None).unwrap().model.config().clone();
    let mut stacked = tensors.clone();
    for parameter in config.parameter_shapes().iter().filter(|parameter| parameter.kind == ParameterKind::Experts) {
        let (stem, projection) = parameter.path.rsplit_once('.').unwrap();
        let [experts, input, output] = parameter.shape[..] else { panic!("experts are stacked") };
        let mut take = |projection: &str| -> Vec<Vec<u8>> {
            (0..experts)
                .map(|expert| stacked.remove(&format!("model.{stem}.{expert}.{projection}.weight")).unwrap().data)
                .collect()
        };
        let (name, data, height) = match projection {
            "gate_proj" => {
                let both = take("gate_proj").into_iter().zip(take("up_proj"));
                ("gate_up_proj", both.flat_map(|(gate, up)| [gate, up].concat()).collect(), 2 * output)
            }
            "down_proj" => ("down_proj", take("down_proj").concat(), output),
            _ => continue,
        };
        let raw = Raw { dtype: Dtype::BF16, shape: vec![experts, height, input], data };
        stacked.insert(format!("model.{stem}.{name}"), raw);
    }
    write_dir(directory.path(), &config_of(family), &stacked);
    assert_eq!(parameters(&load(directory.path(), &device, None).unwrap().model), plain);
    // Converted, each expert has its own tensors.
    let saved = directory.path().join("one-by-one");
    Checkpoint::open(directory.path()).unwrap().convert(&saved, &SaveOptions::default()).unwrap();
    assert_eq!(read_tensors(&saved), expected(tensors));

    let mut tied = read_tensors(&fixture("qwen2"));
    tied.insert("lm_head.weight".into(), tied["model.embed_tokens.weight"].clone());
    write_dir(directory.path(), &config_of("qwen2"), &tied);
    let loaded = load(directory.path(), &device, None).unwrap();
    assert_eq!(counts(&loaded.report.skipped), [(SkipReason::TiedHead, 1)]);
}

/// The files other than weights.
#[test]
fn sidecars_and_configs_are_written() {
    let directory = tempfile::tempdir().unwrap();
    let (source, saved) = (directory.path().join("source"), directory.path().join("a/b/saved"));
    let mut config = config_of("moonlight-like");
    config["auto_map"] = serde_json::json!({"AutoConfig": "configuration_deepseek.DeepseekV3Config"});
    config["quantization_config"] = serde_json::json!({"quant_method": "fp8"});
    write_dir(&source, &config, &read_tensors(&fixture("moonlight-like")));
    for name in
        ["tiktoken.model", "tokenization_moonshot.py", "tokenizer_config.json", "chat_template.jinja", "README.md"]
    {
        fs::write(source.join(name), name).unwrap();
    }
    let device = Device::default();
    let model = load(&source, &device, None).unwrap().model;
    let json = |name: &str| -> serde_json::Value {
        serde_json::from_str(&fs::read_to_string(saved.join(name)).unwrap()).unwrap()
    };

    save(&model, &saved, &SaveOptions { dtype: Some(DType::F32), ..SaveOptions::default() }).unwrap();
    assert_eq!(json("config.json")["torch_dtype"], "float32");
    assert_eq!(json("config.json").get("auto_map"), None, "the code that it points to is not there");
    assert_eq!(json("config.json").get("quantization_config"), None);
    assert_eq!(json("generation_config.json")["eos_token_id"], serde_json::json!([96]));

    fs::write(source.join("configuration_deepseek.py"), "").unwrap();
    fs::write(source.join("generation_config.json"), r#"{"max_length": 7}"#).unwrap();
    save(&model, &saved, &SaveOptions { sidecars_from: Some(source.clone()), ..SaveOptions::default() }).unwrap();
    assert_eq!(json("config.json")["auto_map"]["AutoConfig"], "configuration_deepseek.DeepseekV3Config");
    assert_eq!(json("config.json")["torch_dtype"], "bfloat16");
    assert_eq!(json("generation_config.json")["max_length"], 7);
    let names: Vec<String> = moonlight_convert::sidecars_in(&saved).unwrap();
    assert_eq!(
        names,
        [
            "chat_template.jinja",
            "configuration_deepseek.py",
            "generation_config.json",
            "tiktoken.model",
            "tokenization_moonshot.py",
            "tokenizer_config.json"
        ]
    );
    assert!(!saved.join("README.md").exists());
}
