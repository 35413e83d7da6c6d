//! GGUF files as checkpoints: opened, checked, loaded, converted.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device};
use common::{FAMILIES, Tensors, fixture, parameters, read_tensors};
use moonlight_convert::gguf::{BlockType, GgufHeader, GgufOptions, Metadata, TensorInfo, Value, write_header};
use moonlight_convert::report::{CheckpointState, TensorDifference};
use moonlight_convert::{Checkpoint, Format, LoadQuantization, SaveOptions, WeightDtype, load, save};
use moonlight_model::{ModelConfig, QuantBits};
use safetensors::Dtype;

/// A file in memory: tensors with their bytes.
struct File {
    metadata: Metadata,
    tensors: Vec<(TensorInfo, Vec<u8>)>,
}

impl File {
    fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let header = GgufHeader::parse(bytes.as_slice(), bytes.len() as u64).unwrap();
        let tensors = header.tensors.iter().map(|tensor| {
            let start = (header.data_start + tensor.offset) as usize;
            (tensor.clone(), bytes[start..start + tensor.bytes().unwrap() as usize].to_vec())
        });
        Self { tensors: tensors.collect(), metadata: header.metadata }
    }

    fn write(&self, path: &Path) {
        let infos = self.tensors.iter().map(|(info, _)| info.clone()).collect();
        let header = GgufHeader::lay_out(self.metadata.clone(), infos).unwrap();
        let mut bytes = write_header(&header);
        for (info, (_, values)) in header.tensors.iter().zip(&self.tensors) {
            bytes.resize((header.data_start + info.offset) as usize, 0);
            bytes.extend(values);
        }
        fs::write(path, bytes).unwrap();
    }

    fn add(&mut self, name: &str, shape: &[u64], block_type: BlockType, bytes: Vec<u8>) {
        let info = TensorInfo { name: name.into(), shape: shape.to_vec(), block_type, offset: 0 };
        self.tensors.push((info, bytes));
    }

    fn take(&mut self, name: &str) -> (TensorInfo, Vec<u8>) {
        let at = self.tensors.iter().position(|(info, _)| info.name == name).unwrap();
        self.tensors.remove(at)
    }

    fn without_keys(&mut self, ends: &[&str]) {
        let kept = self.metadata.iter().filter(|(key, _)| !ends.iter().any(|end| key.ends_with(end)));
        self.metadata = kept.map(|(key, value)| (key.to_owned(), value.clone())).collect();
    }
}

fn written(family: &str, dir: &Path, block_type: Option<BlockType>) -> PathBuf {
    let path = dir.join(format!("{family}.gguf"));
    let options = GgufOptions { block_type, overwrite: true };
    Checkpoint::open(fixture(family)).unwrap().write_gguf(&path, &options, &()).unwrap();
    path
}

fn without_frequencies(mut tensors: Tensors) -> Tensors {
    tensors.retain(|name, _| !name.ends_with("inv_freq"));
    for (name, raw) in &mut tensors {
        if name.ends_with("e_score_correction_bias") && raw.dtype == Dtype::BF16 {
            raw.data = raw.data.chunks(2).flat_map(|half| [0, 0, half[0], half[1]]).collect();
            raw.dtype = Dtype::F32;
        }
    }
    tensors
}

#[test]
fn a_round_trip_through_the_stored_dtype_preserves_every_family() {
    let device = Device::default();
    for family in FAMILIES {
        let home = tempfile::tempdir().unwrap();
        let path = written(family, home.path(), None);
        let source = load(&fixture(family), &device, None).unwrap();
        let opened = Checkpoint::open(&path).unwrap();
        assert_eq!(opened.problems(), [], "{family}");
        assert!(opened.is_gguf() && opened.dir() == path);
        let loaded = opened.load(&device, None).unwrap();
        assert_eq!(parameters(&loaded.model), parameters(&source.model), "{family}");
        let directory = home.path().join("hf");
        opened.convert(&directory, &SaveOptions::default()).unwrap();
        assert_eq!(read_tensors(&directory), without_frequencies(read_tensors(&fixture(family))), "{family}");
        // The reverse: a directory whose only weights are the file.
        let folder = home.path().join("folder");
        fs::create_dir(&folder).unwrap();
        fs::copy(&path, folder.join("model.gguf")).unwrap();
        fs::write(folder.join("notes.txt"), "").unwrap();
        let summary = Checkpoint::open(&folder).unwrap().summary().unwrap();
        assert_eq!((summary.format, summary.state), ("gguf", CheckpointState::Complete), "{family}");
        assert_eq!(summary.ignored_files, ["notes.txt"]);
        // Comparing finds no difference with the source, and takes the file apart in both layouts.
        let source = Checkpoint::open(fixture(family)).unwrap();
        let comparison = source.compare(&opened, 0.0, &()).unwrap();
        assert!(comparison.differences.is_empty(), "{family}: {:?}", comparison.differences);
        let burnpack = home.path().join("burnpack");
        let options = SaveOptions { format: Format::Burnpack, ..SaveOptions::default() };
        opened.convert(&burnpack, &options).unwrap();
        let from_burnpack = load(&burnpack, &device, None).unwrap().model;
        assert_eq!(parameters(&from_burnpack), parameters(&loaded.model), "{family}");
    }
}

/// In every type, the values in memory are those that a conversion writes, in any layout.
#[test]
fn every_type_is_loaded_and_converted_alike() {
    let device = Device::default();
    let types = [BlockType::F32, BlockType::F16, BlockType::Bf16, BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4K];
    for family in FAMILIES {
        for block_type in types {
            let home = tempfile::tempdir().unwrap();
            let path = written(family, home.path(), Some(block_type));
            let opened = Checkpoint::open(&path).unwrap();
            let loaded = opened.load(&device, Some(DType::F32)).unwrap();
            let options = SaveOptions { dtype: Some(DType::F32), ..SaveOptions::default() };
            opened.convert(&home.path().join("hf"), &options).unwrap();
            let again = load(&home.path().join("hf"), &device, None).unwrap();
            assert_eq!(parameters(&again.model), parameters(&loaded.model), "{family} {block_type}");
            let source = Checkpoint::open(fixture(family)).unwrap();
            for difference in source.compare(&opened, 0.0, &()).unwrap().differences {
                let TensorDifference::Values { tensor, distance } = difference else {
                    panic!("{family} {block_type}: {difference}");
                };
                // Random weights in 4 bits.
                assert!(distance.cosine > 0.99, "{family} {block_type} {tensor}: {distance:?}");
            }
            opened.load_with(&device, Some(DType::F32), LoadQuantization::To(QuantBits::Eight)).unwrap();
        }
    }
}

#[test]
fn a_split_file_is_opened_by_its_first_part() {
    let home = tempfile::tempdir().unwrap();
    let mut whole = File::read(&written("moonlight-like", home.path(), None));
    let part = |number: usize| home.path().join(format!("m-0000{number}-of-00003.gguf"));
    let third = whole.tensors.len() / 3;
    let mut metadata = whole.metadata.clone();
    for number in 1..=3 {
        metadata.insert("split.no", Value::U16(number as u16 - 1));
        metadata.insert("split.count", Value::U16(3));
        let tensors = whole.tensors.drain(..if number == 3 { whole.tensors.len() } else { third }).collect();
        File { metadata, tensors }.write(&part(number));
        metadata = Metadata::default();
    }
    let device = Device::default();
    let expected = parameters(&load(&fixture("moonlight-like"), &device, None).unwrap().model);
    fs::remove_file(home.path().join("moonlight-like.gguf")).unwrap();
    for path in [part(1), home.path().to_path_buf()] {
        let opened = Checkpoint::open(&path).unwrap();
        assert_eq!(opened.files().len(), 3);
        assert_eq!(parameters(&opened.load(&device, None).unwrap().model), expected);
    }
    let error = Checkpoint::open(part(2)).unwrap_err().to_string();
    assert!(error.ends_with("is part 2 of 3; the model is opened by the first, `m-00001-of-00003.gguf`"), "{error}");
    fs::copy(part(2), part(3)).unwrap();
    let error = Checkpoint::open(part(1)).unwrap().load(&device, None).unwrap_err().to_string();
    assert!(error.contains("does not say in its metadata that it is part 3 of 3"), "{error}");
    fs::remove_file(part(3)).unwrap();
    let error = Checkpoint::open(part(1)).unwrap().load(&device, None).unwrap_err().to_string();
    assert!(error.contains("m-00003-of-00003.gguf"), "{error}");
}

/// `attn_kv_b`, from before latent attention was absorbed, and `ffn_gate_up_exps`, the fused experts.
#[test]
fn older_and_fused_forms_are_read() {
    let home = tempfile::tempdir().unwrap();
    let path = written("moonlight-like", home.path(), None);
    let mut file = File::read(&path);
    let config = Checkpoint::open(&path).unwrap().config().clone();
    let source = read_tensors(&fixture("moonlight-like"));
    let experts = config.moe.as_ref().unwrap().n_routed_experts;
    for layer in 0..config.num_hidden_layers {
        file.take(&format!("blk.{layer}.attn_k_b.weight"));
        file.take(&format!("blk.{layer}.attn_v_b.weight"));
        let raw = &source[&format!("model.layers.{layer}.self_attn.kv_b_proj.weight")];
        let shape: Vec<u64> = raw.shape.iter().rev().map(|size| *size as u64).collect();
        file.add(&format!("blk.{layer}.attn_kv_b.weight"), &shape, BlockType::Bf16, raw.data.clone());
        if config.moe_of_layer(layer).is_some() {
            let (info, _) = file.take(&format!("blk.{layer}.ffn_gate_exps.weight"));
            file.take(&format!("blk.{layer}.ffn_up_exps.weight"));
            let name = |expert: usize, projection: &str| {
                format!("model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight")
            };
            let rows = (0..experts).flat_map(|expert| ["gate", "up"].map(|projection| name(expert, projection)));
            let data = rows.flat_map(|name| source[&name].data.clone()).collect();
            let shape = [info.shape[0], 2 * info.shape[1], info.shape[2]];
            file.add(&format!("blk.{layer}.ffn_gate_up_exps.weight"), &shape, BlockType::Bf16, data);
        }
    }
    file.write(&path);
    let device = Device::default();
    let opened = Checkpoint::open(&path).unwrap();
    let expected = parameters(&load(&fixture("moonlight-like"), &device, None).unwrap().model);
    assert_eq!(parameters(&opened.load(&device, None).unwrap().model), expected);
}

#[test]
fn wrong_tensors_and_metadata_are_named() {
    let home = tempfile::tempdir().unwrap();
    let path = written("moonlight-like", home.path(), None);
    let refused = |change: &dyn Fn(&mut File), expected: &str| {
        let mut file = File::read(&path);
        change(&mut file);
        let changed = home.path().join("changed.gguf");
        file.write(&changed);
        let error = match Checkpoint::open(&changed) {
            Ok(opened) => opened.load(&Device::default(), None).unwrap_err(),
            Err(error) => error,
        };
        let text = error.to_string();
        assert!(text.contains(&format!("`{}`", changed.display())), "{text}");
        assert!(text.contains(expected), "{text}\n{expected}");
    };
    refused(&|file| drop(file.take("blk.0.attn_q.weight")), "1 tensor is missing: `blk.0.attn_q.weight`");
    refused(
        &|file| {
            file.take("blk.1.attn_v_b.weight");
            file.take("blk.1.ffn_up_exps.weight");
        },
        "2 tensors are missing: `blk.1.attn_v_b.weight`, `blk.1.ffn_up_exps.weight`",
    );
    refused(
        &|file| {
            let (info, bytes) = file.take("blk.0.attn_kv_a_mqa.weight");
            let shape: Vec<u64> = info.shape.iter().rev().copied().collect();
            assert_ne!(shape, info.shape);
            file.add(&info.name, &shape, info.block_type, bytes);
        },
        "1 tensor has the wrong shape: `blk.0.attn_kv_a_mqa.weight`",
    );
    refused(
        &|file| file.add("blk.0.attn_sinks.weight", &[4], BlockType::F32, vec![0; 16]),
        "1 tensor is unexpected: `blk.0.attn_sinks.weight`",
    );
    refused(
        &|file| file.add("blk.99.attn_norm.weight", &[4], BlockType::F32, vec![0; 16]),
        "1 tensor is unexpected: `blk.99.attn_norm.weight`",
    );
    refused(
        &|file| {
            let (info, mut bytes) = file.take("output_norm.weight");
            bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
            file.add(&info.name, &info.shape, info.block_type, bytes);
        },
        "the tensor `output_norm.weight` in",
    );
    for (key, value, expected) in [
        ("general.type", Value::from("adapter"), "is an adapter, and not a model"),
        ("general.type", "mmproj".into(), "has the `general.type` `mmproj`, which is not supported"),
        ("general.architecture", "gemma3".into(), "is a model of the architecture `gemma3`, which is not supported"),
        ("deepseek2.rope.scaling.type", "longrope".into(), "`deepseek2.rope.scaling.type`, which is neither"),
        ("deepseek2.attention.scale", 0.5f32.into(), "`deepseek2.attention.scale`, which is not supported"),
        ("deepseek2.expert_gating_func", 3u32.into(), "`deepseek2.expert_gating_func`, which is neither 1 (softmax)"),
        ("deepseek2.block_count", u32::MAX.into(), "`num_hidden_layers` is 4294967295"),
        ("deepseek2.expert_count", u32::MAX.into(), "`n_routed_experts` is 4294967295"),
        ("deepseek2.block_count", 9_999u32.into(), "the metadata is implausible: `num_hidden_layers` is 9999"),
    ] {
        refused(&|file| file.metadata.insert(key, value.clone()), expected);
    }
    refused(&|file| file.without_keys(&["general.architecture"]), "lacks the metadata key `general.architecture`");
}

#[test]
fn an_absent_gating_function_is_softmax_and_noted() {
    let home = tempfile::tempdir().unwrap();
    let path = written("moonlight-like", home.path(), None);
    assert_eq!(Checkpoint::open(&path).unwrap().notes(), Vec::<String>::new());
    let mut file = File::read(&path);
    file.without_keys(&["expert_gating_func", "moonlight.config"]);
    file.metadata.insert("general.url", "https://example.org");
    file.write(&path);
    let opened = Checkpoint::open(&path).unwrap();
    assert_eq!(opened.config().moe.as_ref().unwrap().scoring, moonlight_model::config::ScoringFunc::Softmax);
    let summary = opened.summary().unwrap();
    assert!(summary.notes[0].starts_with("the metadata has no `expert_gating_func`: experts are chosen by softmax"));
    assert!(summary.ignored_keys.values().flatten().any(|key| key == "general.url"), "{:?}", summary.ignored_keys);
}

#[test]
fn one_of_several_files_has_to_be_named() {
    let home = tempfile::tempdir().unwrap();
    let first = written("llama", home.path(), None);
    fs::copy(&first, home.path().join("other.gguf")).unwrap();
    for config in [false, true] {
        if config {
            fs::copy(fixture("llama").join("config.json"), home.path().join("config.json")).unwrap();
        }
        let error = Checkpoint::open(home.path()).unwrap_err();
        assert_eq!(error.hint().unwrap(), "name one GGUF file, for example `llama.gguf`");
    }
    let bytes = fs::read(&first).unwrap();
    fs::write(home.path().join("cut.gguf"), &bytes[..bytes.len() - 100]).unwrap();
    let error = Checkpoint::open(home.path().join("cut.gguf")).unwrap_err();
    assert!(error.hint().unwrap().starts_with("download the file again"), "{error}");
    // A file without the extension is recognized by its first bytes.
    let blob = home.path().join("sha256-0123");
    fs::rename(&first, &blob).unwrap();
    assert!(Checkpoint::open(&blob).unwrap().is_gguf());
}

/// A small model whose rows are made of complete blocks of every type.
fn in_blocks(architecture: &str) -> ModelConfig {
    let mut config = serde_json::json!({
        "vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "initializer_range": 0.1, "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2,
    });
    let more = match architecture {
        "deepseek_v3" => serde_json::json!({
            "q_lora_rank": null, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
            "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "n_shared_experts": 1,
            "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
            "norm_topk_prob": true, "routed_scaling_factor": 2.5, "num_key_value_heads": 4,
        }),
        _ => serde_json::json!({"head_dim": 64}),
    };
    let map = config.as_object_mut().unwrap();
    map.insert("model_type".into(), architecture.into());
    map.extend(more.as_object().unwrap().clone());
    ModelConfig::from_value(config).unwrap()
}

/// Quantized tensors are in the right places: heads, rotated rows, experts, in both layouts.
#[test]
fn quantized_tensors_are_where_they_belong() {
    let device = Device::default();
    device.seed(3);
    for architecture in ["deepseek_v3", "llama", "qwen2"] {
        let home = tempfile::tempdir().unwrap();
        let path = |name: &str| home.path().join(name);
        save(&in_blocks(architecture).init(&device), &path("source"), &SaveOptions::default()).unwrap();
        let source = Checkpoint::open(path("source")).unwrap();
        for (block_type, least) in [(BlockType::Q8_0, 0.9999), (BlockType::Q4_0, 0.98), (BlockType::Q4K, 0.98)] {
            let options = GgufOptions { block_type: Some(block_type), overwrite: true };
            source.write_gguf(&path("x.gguf"), &options, &()).unwrap();
            let opened = Checkpoint::open(path("x.gguf")).unwrap();
            let forms = opened.summary().unwrap().quantized_forms;
            assert!(forms.iter().any(|form| form.form.starts_with(&format!("{block_type},"))), "{forms:?}");
            let comparison = source.compare(&opened, 0.0, &()).unwrap();
            assert!(!comparison.differences.is_empty());
            for difference in comparison.differences {
                let TensorDifference::Values { tensor, distance } = difference else { panic!("{difference}") };
                assert!(distance.cosine > least, "{architecture} {block_type} {tensor}: {distance:?}");
            }
            // Straight into memory, by a directory, and by Burn's layout: the same bits.
            let loaded = parameters(&opened.load(&device, Some(DType::F32)).unwrap().model);
            for format in [Format::HuggingFace, Format::Burnpack] {
                let options =
                    SaveOptions { dtype: Some(DType::F32), format, overwrite: true, ..SaveOptions::default() };
                opened.convert(&path("converted"), &options).unwrap();
                let converted = parameters(&load(&path("converted"), &device, None).unwrap().model);
                assert_eq!(converted, loaded, "{architecture} {block_type}");
            }
            opened.load_with(&device, Some(DType::F32), LoadQuantization::To(QuantBits::Eight)).unwrap();
            // A file of blocks is bf16 unless its norms are wider.
            assert_eq!(opened.load(&device, None).unwrap().report.dtype, WeightDtype::Bf16);
        }
    }
}
