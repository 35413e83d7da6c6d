//! Adapters of every kind that peft makes, compared with peft's results (`scripts/parity/check_lora.py --write
//! fixtures/lora`); and files that do not match their config.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use moonlight_convert::adapter::{
    AdapterError, base_of, load_adapter, load_adapter_with_head, read_adapter, write_adapter,
};
use moonlight_convert::{Checkpoint, LoadQuantization, SaveOptions, TiedHead, load, save};
use moonlight_model::lora::LoraConfig;
use moonlight_model::{CausalLm, QuantBits};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Expected {
    tokens: Vec<u32>,
    kinds: BTreeMap<String, Kind>,
}

#[derive(Deserialize)]
struct Kind {
    base: String,
    logprobs: Vec<f32>,
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name)
}

fn kind(name: &str) -> PathBuf {
    fixture("lora/kinds").join(name)
}

fn expected() -> Expected {
    serde_json::from_str(&fs::read_to_string(kind("expected.json")).unwrap()).unwrap()
}

fn base(name: &str) -> CausalLm {
    load(&fixture(name), &Device::default(), Some(DType::F32)).unwrap().model
}

/// The log-probability of each token except the first.
fn logprobs(model: &CausalLm, tokens: &[u32]) -> Vec<f32> {
    let count = tokens.len();
    let ids: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, count]), &Device::default());
    let logits = model.logits(ids, None);
    let vocab = logits.dims()[2];
    let logs: Vec<f32> = log_softmax(logits, 2).into_data().iter::<f32>().collect();
    (1..count).map(|at| logs[(at - 1) * vocab + tokens[at] as usize]).collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn each_kind_has_the_same_effect_as_in_peft() {
    let Expected { tokens, kinds } = expected();
    for (name, Kind { base: family, logprobs: theirs }) in &kinds {
        if name == "alora" {
            continue; // refused, below
        }
        let model = load_adapter(base(family), &kind(name)).unwrap();
        let distance = largest_difference(&logprobs(&model, &tokens), theirs);
        println!("{name}: {distance:.1e}");
        assert!(distance < 1e-4, "{name}: {distance:.1e}");
        assert!(largest_difference(&logprobs(&base(family), &tokens), theirs) > 1e-2, "{name} does something");
        // Merged into its model.
        let home = tempfile::tempdir().unwrap();
        let merged = home.path().join("merged");
        save(&model.merge(), &merged, &SaveOptions::default()).unwrap();
        let merged = load(&merged, &Device::default(), None).unwrap().model;
        let distance = largest_difference(&logprobs(&merged, &tokens), theirs);
        assert!(distance < 1e-4, "{name}, merged: {distance:.1e}");
        assert_eq!(base_of(&kind(name)).unwrap().canonicalize().unwrap(), fixture(family).canonicalize().unwrap());
    }
}

#[test]
fn an_activated_adapter_is_refused_by_name() {
    let error = load_adapter(base("llama"), &kind("alora")).unwrap_err();
    assert!(error.to_string().contains("`alora_invocation_tokens`: it enables activated LoRA"), "{error}");
    assert!(error.hint().unwrap().contains("run this one in peft"));
}

/// An adapter that changes weights can be used and merged, but not trained further: it would be saved as plain LoRA,
/// without those changes.
#[test]
fn adapters_that_change_weights_are_not_trained_further() {
    for (family, name, what) in [
        ("llama", "dora", "is DoRA"),
        ("llama", "olora", "is OLoRA, which changes the base's weights"),
        ("qwen2", "pissa-rslora", "is PiSSA, which changes the base's weights"),
        ("llama", "embedding", "has an adapter of `embed_tokens.weight`"),
        ("qwen2", "bias-all", "replaces `layers.0.self_attn.k_proj.bias`"),
        ("llama", "tokens", "replaces `embed_tokens.weight`"),
    ] {
        let error = read_adapter(base(family).config(), &kind(name)).unwrap_err();
        let AdapterError::NotTrainable { what: found, .. } = &error else { panic!("{name}: {error}") };
        assert_eq!(found, what, "{name}");
        assert!(error.hint().unwrap().contains("merge it into its model first"));
    }
    for name in ["mica", "patterns", "layers"] {
        assert!(!read_adapter(base("llama").config(), &kind(name)).unwrap().is_empty());
    }
}

#[test]
fn quantized_weights_are_not_changed() {
    let checkpoint = Checkpoint::open(fixture("llama")).unwrap();
    let quantized = || {
        checkpoint
            .load_with(&Device::default(), Some(DType::F32), LoadQuantization::To(QuantBits::Eight))
            .unwrap()
            .model
    };
    let error = load_adapter(quantized(), &kind("dora")).unwrap_err();
    assert!(matches!(error, AdapterError::Quantized { .. }), "{error}");
    assert!(error.hint().unwrap().contains("merge the adapter into the unquantized model first"));
    // Plain LoRA leaves quantized weights unchanged, and embeddings are never quantized.
    load_adapter(quantized(), &kind("layers")).unwrap();
    load_adapter(quantized(), &kind("tokens")).unwrap();
}

/// A router's adapter is saved under peft's names.
#[test]
fn a_round_trip_preserves_a_routers_adapter() {
    let config = LoraConfig { rank: 2, targets: vec!["router".into(), "q_proj".into()], ..LoraConfig::default() };
    let model = base("moonlight-like").with_lora(&config, 1).unwrap();
    let adapters = model.adapters();
    let routers = adapters.iter().filter(|adapter| adapter.path.ends_with(".mlp.router")).count();
    assert_eq!((routers, adapters.len()), (2, 5));
    let dir = tempfile::tempdir().unwrap();
    write_adapter(&model, dir.path(), &fixture("moonlight-like"), None).unwrap();
    let written: Value =
        serde_json::from_str(&fs::read_to_string(dir.path().join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(written["target_parameters"], json!(["mlp.gate.weight"]));
    let bytes = fs::read(dir.path().join("adapter_model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("base_model.model.model.layers.1.mlp.gate.lora_A.weight").unwrap().shape(), [2, 40]);
    assert_eq!(file.tensor("base_model.model.model.layers.1.mlp.gate.lora_B.weight").unwrap().shape(), [10, 2]);
    let back = load_adapter(base("moonlight-like"), dir.path()).unwrap();
    assert_eq!(back.adapters(), adapters);
    // `all` means the projections; a router has to be named.
    let config = LoraConfig { targets: vec!["all".into()], ..config };
    let all = base("moonlight-like").with_lora(&config, 1).unwrap().adapters();
    assert!(all.iter().all(|adapter| !adapter.path.ends_with("router")));
}

/// A copy of one of the kinds with a changed config and changed tensors.
fn altered(name: &str, config: impl FnOnce(&mut Value), keep: impl Fn(&str) -> Option<String>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut value: Value =
        serde_json::from_str(&fs::read_to_string(kind(name).join("adapter_config.json")).unwrap()).unwrap();
    config(&mut value);
    fs::write(dir.path().join("adapter_config.json"), value.to_string()).unwrap();
    let bytes = fs::read(kind(name).join("adapter_model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<_> = file.tensors().into_iter().filter_map(|(name, view)| Some((keep(&name)?, view))).collect();
    safetensors::serialize_to_file(tensors, None, &dir.path().join("adapter_model.safetensors")).unwrap();
    dir
}

fn all(name: &str) -> Option<String> {
    Some(name.to_owned())
}

#[test]
fn files_that_do_not_match_their_config_are_refused() {
    let refused = |family: &str, dir: tempfile::TempDir, expected: &str| {
        let error = load_adapter(base(family), dir.path()).unwrap_err();
        assert!(error.to_string().contains(expected), "{expected}: {error}");
        assert!(error.hint().is_some(), "{error}");
    };
    let without = |part: &'static str| move |name: &str| (!name.contains(part)).then(|| name.to_owned());
    refused("llama", altered("layers", |_| {}, |_| None), "contains no tensors");
    refused(
        "llama",
        altered("mica", |_| {}, without("layers.1.self_attn.o_proj")),
        "lacks the adapter of `layers.1.self_attn.o_proj`, which `adapter_config.json` lists",
    );
    refused("llama", altered("mica", |_| {}, without("o_proj")), "`layers.0.self_attn.o_proj` (and 2 more)");
    refused(
        "llama",
        altered("mica", |config| config["target_modules"] = json!(["q_proj"]), all),
        "an adapter of `layers.0.self_attn.o_proj`, which `adapter_config.json` does not target",
    );
    refused(
        "llama",
        altered("layers", |config| config["layers_to_transform"] = json!([0]), all),
        "`layers.1.self_attn.o_proj`, which `adapter_config.json` does not target",
    );
    refused(
        "llama",
        altered("mica", |config| config["exclude_modules"] = json!(["layers.2.self_attn.q_proj"]), all),
        "`layers.2.self_attn.q_proj`, which `adapter_config.json` does not target",
    );
    refused(
        "llama",
        altered("modules-to-save", |config| config["modules_to_save"] = json!(["embed_tokens", "lm_head"]), all),
        "`base_model.model.model.layers.0.input_layernorm.weight`, which `adapter_config.json` does not list",
    );
    refused(
        "llama",
        altered("modules-to-save", |_| {}, without("model.norm.weight")),
        "lacks `model.norm.weight`, which `adapter_config.json` lists",
    );
    refused(
        "qwen2",
        altered("bias-all", |config| config["bias"] = json!("none"), all),
        "k_proj.bias`, which `adapter_config.json` does not list",
    );
    refused(
        "qwen2",
        altered("bias-all", |config| config["bias"] = json!("lora_only"), all),
        "`base_model.model.model.layers.0.self_attn.k_proj.bias`",
    );
    refused(
        "qwen2",
        altered("bias-all", |_| {}, without("layers.1.self_attn.v_proj.bias")),
        "layers.1.self_attn.v_proj.bias",
    );
    refused("llama", altered("dora", |_| {}, without("magnitude")), "lacks the DoRA magnitudes of");
    refused(
        "llama",
        altered("tokens", |config| config["trainable_token_indices"] = json!(null), all),
        "contains trained tokens of `embed_tokens`, which `adapter_config.json` does not list",
    );
    refused("llama", altered("tokens", |_| {}, without("tokens_delta")), "lacks the trained tokens of `embed_tokens`");
    refused(
        "moonlight-like",
        altered("router", |_| {}, without("layers.2")),
        "lacks the adapter of `layers.2.mlp.router`",
    );
    refused(
        "moonlight-like",
        altered("all-linear-moonlight", |_| {}, without("layers.1.mlp.experts")),
        "lacks the adapter of `layers.1.mlp.experts.gate_up_proj`",
    );
    refused(
        "moonlight-like",
        altered("all-linear-moonlight", |_| {}, without("layers.2.mlp.experts.base_layer")),
        "lacks the adapter of `layers.2.mlp.experts.gate_up_proj`",
    );
    refused(
        "moonlight-like",
        altered(
            "all-linear-moonlight",
            |config| config["target_parameters"] = json!(["gate.weight", "down_proj"]),
            all,
        ),
        "`layers.1.mlp.experts.base_layer`, which `adapter_config.json` does not target",
    );
    refused(
        "llama",
        altered("mica", |config| config["target_modules"] = json!("(q|o_proj"), all),
        "an invalid or unsupported expression",
    );
    refused("llama", altered("mica", |config| config["use_something_new"] = json!(true), all), "`use_something_new`");

    // Magnitudes that the config does not list.
    let dir = altered("dora", |config| config["use_dora"] = json!(false), all);
    let error = load_adapter(base("llama"), dir.path()).unwrap_err().to_string();
    assert!(error.contains("does not set `use_dora`"), "{error}");
    // An unknown tensor.
    let dir = altered("layers", |_| {}, |name| Some(name.replace("q_proj.lora_A.weight", "q_proj.lora_C.weight")));
    let error = load_adapter(base("llama"), dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("lora_C.weight` of shape") || error.contains("lora_C.weight`, which is neither part"),
        "{error}"
    );
    // A file in pickle format.
    let dir = altered("layers", |_| {}, all);
    fs::rename(dir.path().join("adapter_model.safetensors"), dir.path().join("adapter_model.bin")).unwrap();
    let error = load_adapter(base("llama"), dir.path()).unwrap_err();
    assert!(error.hint().unwrap().contains("safe_serialization"), "{error}");
}

/// Equivalent ways to name the targets in peft.
#[test]
fn equivalent_ways_to_name_the_targets_are_read() {
    let expected = expected();
    let same = |name: &str, change: &dyn Fn(&mut Value)| {
        let dir = altered(name, change, all);
        let Kind { base: family, logprobs: theirs } = &expected.kinds[name];
        let model = load_adapter(base(family), dir.path()).unwrap();
        assert!(largest_difference(&logprobs(&model, &expected.tokens), theirs) < 1e-4, "{name}");
    };
    same("mica", &|config| config["target_modules"] = json!(r".*\.self_attn\.(q|o)_proj"));
    same("mica", &|config| config["target_modules"] = json!(r"^(?!.*vision).*(?:q_proj|o_proj)$"));
    same("layers", &|config| config["layers_pattern"] = Value::Null);
    same("layers", &|config| {
        config["layers_to_transform"] = Value::Null;
        config["target_modules"] = json!(["layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]);
    });
    same("all-linear-moonlight", &|config| {
        // As with transformers 4.
        config["target_modules"] =
            json!(["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate", "gate_proj", "up_proj", "down_proj"]);
        config["target_parameters"] = Value::Null;
    });
    same("all-linear-moonlight", &|config| {
        config["target_modules"] = json!("all-linear");
        config["target_parameters"] = Value::Null;
    });
}

/// The rows of a matrix by its path, `[vocab, hidden]`; for a head, its columns.
fn rows(model: &CausalLm, path: &str) -> Vec<Vec<f32>> {
    struct Find<'a>(&'a str, Vec<String>, Vec<Vec<f32>>);
    impl ModuleVisitor for Find<'_> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.1.push(name.to_owned());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.1.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if self.1.join(".") == self.0 {
                let [first, second] = [param.val().dims()[0], param.val().dims()[D - 1]];
                let values: Vec<f32> = param.val().into_data().iter::<f32>().collect();
                self.2 = match self.0.starts_with("lm_head") {
                    true => {
                        (0..second).map(|token| (0..first).map(|at| values[at * second + token]).collect()).collect()
                    }
                    false => values.chunks(second).map(<[f32]>::to_vec).collect(),
                };
            }
        }
    }
    let mut find = Find(path, Vec::new(), Vec::new());
    model.visit(&mut find);
    assert!(!find.2.is_empty(), "{path}");
    find.2
}

/// peft 0.21.0 on the fixture `llama` with `tie_word_embeddings: true` (transformers 5.24 keeps the two matrices apart):
/// `merge_and_unload` changes rows 12 and 44 of both, to the same values; by module, each has its own.
#[test]
fn trained_tokens_belong_to_both_matrices_where_the_configuration_ties_them() {
    let plain = base("llama");
    let changed = |head: TiedHead, adapter: &str| {
        let model = load_adapter_with_head(base("llama"), head, &kind(adapter)).unwrap();
        ["embed_tokens.weight", "lm_head.weight"].map(|path| {
            let [old, new] = [&plain, &model].map(|model| rows(model, path));
            let changed = (0..old.len()).filter(|&row| old[row] != new[row]);
            changed.map(|row| (row, new[row].clone())).collect::<Vec<_>>()
        })
    };
    let numbers = |rows: &[(usize, Vec<f32>)]| rows.iter().map(|(row, _)| *row).collect::<Vec<_>>();
    let [embedding, head] = changed(TiedHead::Separate, "tokens");
    assert_eq!(numbers(&embedding), [12, 44]);
    assert_eq!(head, embedding);
    let [embedding, head] = changed(TiedHead::Absent, "tokens");
    assert_eq!((numbers(&embedding).len(), head.len()), (2, 0));
    let [embedding, head] = changed(TiedHead::Separate, "tokens-by-module");
    assert_eq!((numbers(&embedding), numbers(&head)), (vec![3, 12], vec![5]));
}

/// `save_pretrained(..., save_embedding_layers=True)` of peft 0.21.0 with a tied model: two names, one matrix.
#[test]
fn copies_of_a_tied_embedding_are_one_weight() {
    let adapter = |embedding: f32, head: Option<f32>, change: fn(&mut Value)| {
        let dir = altered("bias-all", change, all);
        let path = dir.path().join("adapter_model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let source = fs::read(fixture("qwen2").join("model.safetensors")).unwrap();
        let source = safetensors::SafeTensors::deserialize(&source).unwrap();
        let shape = source.tensor("model.embed_tokens.weight").unwrap().shape().to_vec();
        let copy = |value: f32| value.to_le_bytes().repeat(shape.iter().product());
        let copies = [
            ("base_model.model.model.embed_tokens.weight", Some(copy(embedding))),
            ("base_model.model.lm_head.weight", head.map(copy)),
        ];
        let view = |bytes| safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap();
        let copies = copies.iter().filter_map(|(name, bytes)| Some(((*name).to_owned(), view(bytes.as_ref()?))));
        let tensors: Vec<_> = file.tensors().into_iter().chain(copies).collect();
        safetensors::serialize_to_file(tensors, None, &path).unwrap();
        dir
    };
    for head in [None, Some(0.25)] {
        let dir = adapter(0.25, head, |_| {});
        let model = load_adapter(base("qwen2"), dir.path()).unwrap();
        assert!(rows(&model, "embed_tokens.weight").concat().iter().all(|value| *value == 0.25));
    }
    let error = load_adapter(base("qwen2"), adapter(0.25, Some(0.5), |_| {}).path()).unwrap_err();
    assert!(error.to_string().contains("and a different `base_model.model.lm_head.weight`"), "{error}");
    // A module in `modules_to_save` is a separate weight in peft.
    let own: fn(&mut Value) = |config| config["modules_to_save"] = json!(["embed_tokens"]);
    let error = load_adapter(base("qwen2"), adapter(0.25, None, own).path()).unwrap_err();
    assert!(error.to_string().contains("the model's head is its embedding"), "{error}");
}

#[test]
fn hints_match_the_problem() {
    let dir = altered("modules-to-save", |config| config["modules_to_save"] = json!(null), all);
    let error = load_adapter(base(&expected().kinds["modules-to-save"].base), dir.path()).unwrap_err();
    assert!(error.to_string().contains("which `adapter_config.json` does not list"), "{error}");
    assert!(error.hint().unwrap().starts_with("remove the tensor from the file, or list what was trained"), "{error}");
    // Fully trained experts have three dimensions.
    let dir = altered("router", |config| config["modules_to_save"] = json!(["experts"]), all);
    let path = dir.path().join("adapter_model.safetensors");
    let bytes = [0; 2 * 3 * 4 * 4];
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2, 3, 4], &bytes).unwrap();
    let name = "base_model.model.model.layers.1.mlp.experts.gate_up_proj";
    safetensors::serialize_to_file([(name.to_owned(), view)], None, &path).unwrap();
    let error = load_adapter(base("moonlight-like"), dir.path()).unwrap_err();
    assert!(error.to_string().contains("fully trained experts are not supported"), "{error}");
    assert!(error.hint().unwrap().contains("target_parameters"), "{error}");
}
