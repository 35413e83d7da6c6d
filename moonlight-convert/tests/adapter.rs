//! Round trips of adapters, and everything that can be wrong with one.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Distribution, Int, Tensor, TensorData, Tolerance};
use moonlight_convert::adapter::{AdapterError, base_of, is_adapter, load_adapter, read_adapter, write_adapter};
use moonlight_convert::{LoadQuantization, SaveOptions, load, save};
use moonlight_model::CausalLm;
use moonlight_model::lora::{Adapter, LoraConfig};
use safetensors::SafeTensors;
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name)
}

fn base(name: &str) -> CausalLm {
    load(&fixture(name), &Device::default(), Some(burn::tensor::DType::F32)).unwrap().model
}

/// The fixture with nonzero adapters.
fn adapted(name: &str, targets: &[&str], rslora: bool) -> CausalLm {
    let config = LoraConfig {
        rank: 3,
        alpha: 5.0,
        dropout: 0.1,
        rslora,
        targets: targets.iter().map(|&target| target.to_owned()).collect(),
    };
    let model = base(name).with_lora(&config, 7).unwrap();
    let mut adapters = model.adapters();
    for Adapter { b, .. } in &mut adapters {
        let drawn = Tensor::<1>::random([b.num_elements()], Distribution::Normal(0.0, 0.3), &Device::default());
        *b = TensorData::new(drawn.into_data().iter::<f32>().collect::<Vec<_>>(), b.shape().clone());
    }
    model.with_adapters(adapters).unwrap()
}

fn written(model: &CausalLm, name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_adapter(model, dir.path(), &fixture(name), None).unwrap();
    dir
}

fn logits(model: &CausalLm) -> TensorData {
    let tokens: Vec<i32> = (0..24).map(|token| token * 5 % 60).collect();
    let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, [2, 12]), &Device::default());
    model.logits(tokens, None).into_data()
}

fn json(dir: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(dir.join("adapter_config.json")).unwrap()).unwrap()
}

fn edit(dir: &Path, change: impl FnOnce(&mut Value)) {
    let mut config = json(dir);
    change(&mut config);
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
}

#[test]
fn a_round_trip_changes_no_bit() {
    for name in ["moonlight-like", "deepseek-v3-like", "deepseek-v2-lite-like", "llama", "qwen2"] {
        for (targets, rslora) in
            [(&["attention"][..], false), (&["all"], true), (&["up_proj", "layers.1.self_attn.o_proj"], false)]
        {
            let model = adapted(name, targets, rslora);
            let dir = written(&model, name);
            let back = load_adapter(base(name), dir.path()).unwrap();
            let sorted = |model: &CausalLm| {
                let mut adapters = model.adapters();
                adapters.sort_by(|a, b| a.path.cmp(&b.path));
                adapters
            };
            assert_eq!(sorted(&back), sorted(&model), "{name} {targets:?}");
            let again = written(&back, name);
            for file in ["adapter_config.json", "adapter_model.safetensors"] {
                assert_eq!(fs::read(again.path().join(file)).unwrap(), fs::read(dir.path().join(file)).unwrap());
            }
        }
    }
}

/// The names and shapes that peft 0.21 writes for this model with transformers 5.
#[test]
fn the_layout_is_that_of_peft() {
    let dir = written(&adapted("moonlight-like", &["all"], false), "moonlight-like");
    let config = json(dir.path());
    assert_eq!(config["target_modules"], serde_json::json!(["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_proj"]));
    let parameters = config["target_parameters"].as_array().unwrap();
    assert!(
        parameters.contains(&"mlp.experts.gate_up_proj".into()) && parameters.contains(&"mlp.up_proj.weight".into())
    );
    assert_eq!(config["rank_pattern"], serde_json::json!({"mlp\\.experts\\.gate_up_proj": 6}));
    assert_eq!(config["alpha_pattern"], serde_json::json!({"mlp\\.experts\\.gate_up_proj": 10}));
    assert_eq!((&config["r"], &config["lora_alpha"], &config["lora_dropout"]), (&3.into(), &5.into(), &0.0.into()));
    let bytes = fs::read(dir.path().join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let shape = |name: &str| {
        let name = format!("base_model.model.model.layers.{name}.weight");
        file.tensor(&name).unwrap_or_else(|_| panic!("{name} is there")).shape().to_vec()
    };
    assert_eq!(shape("0.self_attn.q_proj.lora_A"), [3, 40]);
    assert_eq!(shape("0.mlp.gate_proj.lora_B"), [51, 3]);
    assert_eq!(shape("1.mlp.experts.base_layer.lora_A"), [60, 40]);
    assert_eq!(shape("1.mlp.experts.base_layer.lora_B"), [22, 60]);
    assert_eq!(shape("1.mlp.experts.lora_A"), [30, 11]);
    assert_eq!(shape("1.mlp.experts.lora_B"), [40, 30]);
    assert_eq!(shape("2.mlp.shared_experts.down_proj.lora_A"), [3, 22]);
    assert!(is_adapter(dir.path()) && !is_adapter(&fixture("moonlight-like")));
    assert_eq!(base_of(dir.path()).unwrap(), fixture("moonlight-like"));
}

/// Without this project's note, gate and up are read in peft's form: with one `A` for both.
#[test]
fn a_file_without_the_note_has_the_same_effect() {
    for rslora in [false, true] {
        let model = adapted("moonlight-like", &["experts"], rslora);
        let dir = written(&model, "moonlight-like");
        let path = dir.path().join("adapter_model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let tensors: Vec<_> = SafeTensors::deserialize(&bytes).unwrap().tensors();
        safetensors::serialize_to_file(tensors, None, &path).unwrap();
        let back = load_adapter(base("moonlight-like"), dir.path()).unwrap();
        assert_eq!(back.adapters()[0].a.shape().as_slice(), [10, 40, 6]);
        logits(&back).assert_approx_eq(&logits(&model), Tolerance::<f32>::rel_abs(1e-4, 1e-4));
    }
}

/// One tensor per expert, with the names of transformers 4 and vLLM.
#[test]
fn one_tensor_per_expert_is_read() {
    let model = adapted("moonlight-like", &["experts"], false);
    let dir = written(&model, "moonlight-like");
    let mut tensors = Vec::new();
    for Adapter { path, a, b, .. } in model.adapters() {
        let (stack, projection) = path.rsplit_once('.').unwrap();
        for (part, data) in [("A", &a), ("B", &b)] {
            let &[experts, rows, columns] = data.shape().as_slice() else { panic!("a stack has three dimensions") };
            let values: Vec<f32> = data.iter::<f32>().collect();
            for expert in 0..experts {
                let matrix = &values[expert * rows * columns..][..rows * columns];
                let transposed: Vec<u8> = (0..columns)
                    .flat_map(|column| (0..rows).map(move |row| matrix[row * columns + column]))
                    .flat_map(f32::to_le_bytes)
                    .collect();
                let name = format!("base_model.model.model.{stack}.{expert}.{projection}.lora_{part}.weight");
                tensors.push((name, vec![columns, rows], transposed));
            }
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.clone(), safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir.path().join("adapter_model.safetensors")).unwrap();
    edit(dir.path(), |config| {
        config["rank_pattern"] = Value::Null;
        config["alpha_pattern"] = serde_json::json!({});
    });
    let back = load_adapter(base("moonlight-like"), dir.path()).unwrap();
    assert_eq!(logits(&back), logits(&model));
}

#[test]
fn a_model_is_saved_with_its_adapters_merged() {
    let model = adapted("moonlight-like", &["all"], false);
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("merged");
    save(&model, &dir, &SaveOptions::default()).unwrap();
    let merged = load(&dir, &Device::default(), None).unwrap().model;
    logits(&merged).assert_approx_eq(&logits(&model), Tolerance::<f32>::rel_abs(1e-4, 1e-4));
}

#[test]
fn errors_name_what_is_wrong() {
    let model = adapted("moonlight-like", &["q_proj"], false);
    let dir = written(&model, "moonlight-like");
    let dir = dir.path();
    let opened = |on: &str| load_adapter(base(on), dir).unwrap_err();
    let config = fs::read(dir.join("adapter_config.json")).unwrap();
    let restore = || fs::write(dir.join("adapter_config.json"), &config).unwrap();

    edit(dir, |config| config["r"] = 4.into());
    let error = opened("moonlight-like");
    assert!(matches!(&error, AdapterError::Rank { found: 3, expected: 4, .. }), "{error}");
    assert!(error.to_string().contains("of rank 3 for `layers.0.self_attn.q_proj`"), "{error}");
    for (key, value, expected) in [
        ("peft_type", "LOHA".into(), "has the `peft_type` `LOHA`"),
        ("use_dora", true.into(), "DoRA"),
        ("modules_to_save", serde_json::json!(["lm_head"]), "lacks `lm_head.weight`"),
        ("rank_pattern", serde_json::json!({"(q|k)_proj": 2}), "has the pattern `(q|k)_proj`"),
        ("lora_alpha", "much".into(), "cannot be read"),
        ("r", 0.into(), "has the rank 0"),
        ("r", 100_000.into(), "has the rank 100000"),
        ("rank_pattern", serde_json::json!({"q_proj": 1e30}), "has the rank 1e30"),
        ("rank_pattern", serde_json::json!({"q_proj": 2.5}), "has the rank 2.5"),
        ("rank_pattern", serde_json::json!({"q_proj": "2"}), "invalid type"),
        ("lora_alpha", serde_json::json!(1e308), "has the alpha 1e308 for the rank 3"),
        ("alpha_pattern", serde_json::json!({".*q_proj": 1e20}), "has the alpha 1e20 for the rank 3"),
        ("lora_dropout", serde_json::json!(1.5), "has the dropout 1.5"),
    ] {
        restore();
        edit(dir, |config| config[key] = value);
        let error = opened("moonlight-like").to_string();
        assert!(error.contains(expected), "{error}");
    }
    restore();
    // A model without such a projection, and one with another width.
    let error = load_adapter(base("deepseek-v3-like"), dir).unwrap_err().to_string();
    assert!(error.contains("`layers.0.self_attn.q_proj`, which is not a projection of the model"), "{error}");
    let error = opened("llama");
    assert!(matches!(&error, AdapterError::Mismatch { .. }) && error.hint().is_some(), "{error}");

    edit(dir, |config| config["base_model_name_or_path"] = "/no/such/model".into());
    let error = base_of(dir).unwrap_err();
    assert!(error.to_string().ends_with("was trained on `/no/such/model`, which does not exist"), "{error}");
    assert!(error.hint().unwrap().contains("name the base model"));
    edit(dir, |config| config["base_model_name_or_path"] = Value::Null);
    assert!(base_of(dir).unwrap_err().to_string().contains("does not say"));

    let weights = dir.join("adapter_model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 9]).unwrap();
    assert!(opened("moonlight-like").to_string().contains("is truncated: its header claims"));
    fs::remove_file(&weights).unwrap();
    assert!(matches!(opened("moonlight-like"), AdapterError::NoWeights { .. }));
    fs::remove_file(dir.join("adapter_config.json")).unwrap();
    assert!(matches!(opened("moonlight-like"), AdapterError::NoConfig { .. }));
}

/// Writes a file with tensors of zeros.
fn write_zeros(dir: &Path, tensors: &[(&str, &str, [u64; 2])]) {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, dtype, shape) in tensors {
        let bytes = shape[0].saturating_mul(shape[1]) * if *dtype == "F32" { 4 } else { 2 };
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [end, end + bytes]});
        header.insert(format!("base_model.model.model.layers.{name}.weight"), entry);
        end += bytes;
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    let path = dir.join("adapter_model.safetensors");
    fs::write(&path, &bytes).unwrap();
    let file = fs::File::options().write(true).open(path).unwrap();
    // A sparse file, which takes no disk space.
    file.set_len(bytes.len() as u64 + end).unwrap();
}

/// Shapes are checked against the model and the rank before memory is allocated.
#[test]
fn empty_and_huge_matrices_are_refused() {
    let dir = written(&adapted("moonlight-like", &["all"], false), "moonlight-like");
    let dir = dir.path();
    edit(dir, |config| config["rank_pattern"] = serde_json::json!({"down_proj": 60_000, "up_proj": 60_000}));
    const HUGE: u64 = 1 << 34;
    let expert = |part: &'static str| match part {
        "A" => "1.mlp.experts.0.gate_proj.lora_A",
        _ => "1.mlp.experts.0.gate_proj.lora_B",
    };
    for (what, tensors, problem) in [
        ("an expert's rank of nothing", vec![(expert("A"), "F32", [HUGE, 0]), (expert("B"), "F32", [0, HUGE])], "rank"),
        (
            "an expert's width",
            vec![(expert("A"), "F32", [3, HUGE]), (expert("B"), "F32", [HUGE, 3])],
            "the expert has 40 inputs and 11 outputs",
        ),
        (
            "a plain width",
            vec![("0.self_attn.q_proj.lora_A", "BF16", [3, HUGE]), ("0.self_attn.q_proj.lora_B", "BF16", [HUGE, 3])],
            "does not match the model",
        ),
        (
            "a plain width of nothing",
            vec![("0.self_attn.q_proj.lora_A", "F32", [3, 0]), ("0.self_attn.q_proj.lora_B", "F32", [0, 3])],
            "does not match the model",
        ),
        (
            "a stack",
            vec![("1.mlp.experts.lora_A", "F32", [HUGE, 11]), ("1.mlp.experts.lora_B", "F32", [40, HUGE])],
            "which do not match",
        ),
        (
            "one expert of each stack, with ranks beyond all widths",
            vec![
                ("1.mlp.experts.0.down_proj.lora_A", "F32", [60_000, 11]),
                ("1.mlp.experts.0.down_proj.lora_B", "F32", [40, 60_000]),
                ("2.mlp.experts.0.down_proj.lora_A", "F32", [60_000, 11]),
                ("2.mlp.experts.0.down_proj.lora_B", "F32", [40, 60_000]),
                ("1.mlp.experts.0.up_proj.lora_A", "F32", [60_000, 40]),
                ("1.mlp.experts.0.up_proj.lora_B", "F32", [11, 60_000]),
            ],
            "too many values",
        ),
    ] {
        write_zeros(dir, &tensors);
        let model = load(&fixture("moonlight-like"), &Device::default(), None).unwrap().model;
        let error = read_adapter(model.config(), dir).unwrap_err().to_string();
        assert!(error.contains(problem), "{what}: {error}");
    }
    // The same matrix under two names.
    let name = "0.self_attn.q_proj.lora_A";
    write_zeros(dir, &[(name, "F32", [3, 40]), ("0.self_attn.q_proj.lora_A.default", "F32", [3, 40])]);
    let error = load_adapter(base("moonlight-like"), dir).unwrap_err().to_string();
    assert!(error.contains("twice, under two names"), "{error}");
}

/// A modified note, or one of another file.
#[test]
fn inconsistent_notes_are_refused() {
    let dir = written(&adapted("moonlight-like", &["q_proj"], false), "moonlight-like");
    let path = dir.path().join("adapter_model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let text = String::from_utf8(bytes[8..header].to_vec()).unwrap();
    let (alpha, no_alpha) = (r#"\"alpha\":5.0"#, r#"\"alpha\":1e99"#);
    assert!(text.contains(alpha), "{text}");
    for (from, to, problem) in [
        (alpha, no_alpha, "has the alpha 1e99 for the rank 3"),
        (r#"\"dropout\":0.1"#, r#"\"dropout\":7.0"#, "with an invalid rank, alpha or dropout"),
        (r#"\"rank\":3"#, r#"\"rank\":0"#, "with an invalid rank, alpha or dropout"),
        (r#"[{\"path"#, r#"[[\"path"#, "an invalid note on its adapters"),
    ] {
        let changed = text.replace(from, to);
        assert!(changed != text, "{from}");
        let mut file = (changed.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(changed.as_bytes());
        file.extend_from_slice(&bytes[header..]);
        fs::write(&path, file).unwrap();
        let error = load_adapter(base("moonlight-like"), dir.path()).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}");
    }
}

/// Pipes and links out of the directory are errors, without waiting.
#[cfg(unix)]
#[test]
fn adapters_must_be_plain_files_of_the_directory() {
    let dir = written(&adapted("moonlight-like", &["q_proj"], false), "moonlight-like");
    let dir = dir.path();
    for name in ["adapter_model.safetensors", "adapter_config.json"] {
        let bytes = fs::read(dir.join(name)).unwrap();
        fs::remove_file(dir.join(name)).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(dir.join(name)).status().unwrap().success());
        assert_eq!(is_adapter(dir), name != "adapter_config.json");
        let error = load_adapter(base("moonlight-like"), dir).unwrap_err().to_string();
        assert!(error.contains("not a plain file"), "{error}");
        assert!(base_of(dir).is_ok() || name == "adapter_config.json");
        for target in ["/dev/zero", "/etc/hostname"] {
            fs::remove_file(dir.join(name)).unwrap();
            std::os::unix::fs::symlink(target, dir.join(name)).unwrap();
            let error = load_adapter(base("moonlight-like"), dir).unwrap_err().to_string();
            assert!(error.contains("leads out of the directory"), "{error}");
        }
        fs::remove_file(dir.join(name)).unwrap();
        fs::write(dir.join(name), bytes).unwrap();
    }
    load_adapter(base("moonlight-like"), dir).unwrap();
}

/// Quantizing layer by layer while loading equals quantizing the whole model.
#[test]
fn quantizing_while_loading_equals_quantizing_afterwards() {
    use moonlight_model::QuantBits;
    for name in ["moonlight-like", "qwen2"] {
        let checkpoint = moonlight_convert::Checkpoint::open(fixture(name)).unwrap();
        let device = Device::default();
        for bits in [QuantBits::Eight, QuantBits::Four] {
            let quantized = checkpoint
                .load_with(&device, Some(burn::tensor::DType::F32), LoadQuantization::To(bits))
                .unwrap()
                .model;
            assert!(quantized.is_quantized());
            assert_eq!(logits(&quantized), logits(&base(name).quantized(bits)));
            // What is saved is dequantized.
            let home = tempfile::tempdir().unwrap();
            save(&quantized, &home.path().join("saved"), &SaveOptions::default()).unwrap();
            let saved = load(&home.path().join("saved"), &device, None).unwrap().model;
            // Of a quantized model the activations are rounded, too.
            logits(&saved).assert_approx_eq(&logits(&quantized.dequantized()), Tolerance::<f32>::rel_abs(1e-4, 1e-4));
        }
    }
}
