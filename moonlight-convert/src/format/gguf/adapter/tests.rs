//! Adapters from peft's layout to GGUF and back.

use super::*;
use crate::format::gguf::Array;

fn fixture(name: &str) -> ModelConfig {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name).join("config.json");
    ModelConfig::from_json(&fs::read_to_string(path).unwrap()).unwrap()
}

/// An adapter with a different value in every place.
fn adapter(config: &ModelConfig, path: &str, rank: usize, alpha: f64, rslora: bool) -> Adapter {
    let parameters = config.parameter_shapes();
    let is_it = |found: &str| found.strip_suffix(".weight").unwrap_or(found) == path;
    let shape = &parameters.iter().find(|parameter| is_it(&parameter.path)).unwrap().shape;
    let (stack, [input, output]) = shape.split_at(shape.len() - 2) else { panic!("a matrix") };
    let fill = |first: f32, rows: usize, columns: usize| {
        let dims: Vec<usize> = stack.iter().copied().chain([rows, columns]).collect();
        let count = dims.iter().product::<usize>();
        TensorData::new((0..count).map(|at| first + at as f32 / 1024.0).collect::<Vec<f32>>(), dims)
    };
    let settings = LowRankSettings { alpha, rslora, dropout: 0.0 };
    Adapter { path: path.into(), a: fill(1.0, *input, rank), b: fill(-1.0, rank, *output), settings }
}

/// Writes adapters in peft's layout and as GGUF; returns the folder with both.
fn written(config: &ModelConfig, adapters: &[Adapter]) -> Result<tempfile::TempDir, AdapterError> {
    let home = tempfile::tempdir().unwrap();
    write_adapters(adapters, config, home.path(), Path::new("base"))?;
    write_gguf_adapter(config, home.path(), &home.path().join("adapter.gguf"), false)?;
    Ok(home)
}

fn header(path: &Path) -> GgufHeader {
    let file = fs::File::open(path).unwrap();
    let length = file.metadata().unwrap().len();
    GgufHeader::parse(file, length).unwrap()
}

fn floats(data: &TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

#[test]
fn adapters_are_the_same_after_a_round_trip() {
    for (name, paths) in [
        ("llama", vec!["layers.0.self_attn.q_proj", "layers.1.self_attn.k_proj", "layers.2.mlp.down_proj"]),
        ("qwen2", vec!["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.0.mlp.gate_proj"]),
        (
            "moonlight-like",
            vec![
                "layers.0.self_attn.o_proj",
                "layers.0.mlp.up_proj",
                "layers.1.mlp.experts.down_proj",
                "layers.1.mlp.experts.gate_proj",
                "layers.1.mlp.experts.up_proj",
                "layers.1.mlp.router",
                "layers.1.mlp.shared_experts.gate_proj",
            ],
        ),
    ] {
        let config = fixture(name);
        let adapters: Vec<Adapter> = paths.iter().map(|path| adapter(&config, path, 3, 6.0, false)).collect();
        let home = written(&config, &adapters).unwrap();
        let file = home.path().join("adapter.gguf");
        assert!(is_gguf_adapter(&header(&file)));
        assert_eq!(header(&file).metadata.get(ALPHA), Some(&Value::F32(6.0)));
        let mut read = read_gguf_adapter(&config, &file).unwrap();
        read.sort_by(|a, b| a.path.cmp(&b.path));
        let mut expected = adapters.clone();
        expected.sort_by(|a, b| a.path.cmp(&b.path));
        assert_eq!(read.len(), expected.len(), "{name}");
        for (read, expected) in read.iter().zip(&expected) {
            assert_eq!((&read.path, &read.settings), (&expected.path, &expected.settings));
            assert_eq!((read.a.shape(), read.b.shape()), (expected.a.shape(), expected.b.shape()));
            assert_eq!((floats(&read.a), floats(&read.b)), (floats(&expected.a), floats(&expected.b)), "{}", read.path);
        }
        let peft = home.path().join("peft");
        write_peft_adapter(&config, &file, Path::new("base"), &peft).unwrap();
        let mut again = low_rank_only(&config, &peft, "").unwrap();
        again.sort_by(|a, b| a.path.cmp(&b.path));
        let values = |adapters: &[Adapter]| {
            adapters.iter().map(|one| (one.path.clone(), floats(&one.a), floats(&one.b))).collect::<Vec<_>>()
        };
        assert_eq!(values(&again), values(&expected), "{name}");
    }
}

#[test]
fn rows_of_queries_and_keys_follow_those_of_the_model() {
    let config = fixture("llama");
    let one = adapter(&config, "layers.0.self_attn.q_proj", 1, 1.0, false);
    let home = written(&config, std::slice::from_ref(&one)).unwrap();
    let header = header(&home.path().join("adapter.gguf"));
    let b = header.tensors.iter().find(|tensor| tensor.name == "blk.0.attn_q.weight.lora_b").unwrap();
    assert_eq!(b.shape, [1, one.b.shape()[1] as u64]);
    let bytes = fs::read(home.path().join("adapter.gguf")).unwrap();
    let values: &[u8] = &bytes[(header.data_start + b.offset) as usize..];
    let first: Vec<f32> =
        values.chunks_exact(4).take(6).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
    // Heads of 6: the rows 0, 3, 1, 4, 2, 5 of the Hugging Face projection.
    let own = floats(&one.b);
    assert_eq!(first, [own[0], own[3], own[1], own[4], own[2], own[5]]);
}

#[test]
fn one_alpha_expresses_every_scale() {
    let config = fixture("llama");
    let adapters = [
        adapter(&config, "layers.0.self_attn.q_proj", 4, 8.0, true),
        adapter(&config, "layers.0.self_attn.v_proj", 4, 8.0, true),
        adapter(&config, "layers.0.self_attn.o_proj", 16, 8.0, true),
    ];
    let home = written(&config, &adapters).unwrap();
    let file = home.path().join("adapter.gguf");
    // 8 / sqrt(4) * 4
    assert_eq!(header(&file).metadata.get(ALPHA), Some(&Value::F32(16.0)));
    for read in read_gguf_adapter(&config, &file).unwrap() {
        let own = adapters.iter().find(|adapter| adapter.path == read.path).unwrap();
        let rank = read.a.shape()[1];
        let (scale, expected) = (read.settings.scale(rank), own.settings.scale(rank));
        for (value, own) in floats(&read.b).iter().zip(floats(&own.b)) {
            assert!((f64::from(*value) * scale - f64::from(own) * expected).abs() < 1e-6, "{}", read.path);
        }
    }
}

#[test]
fn what_llama_cpp_does_not_apply_is_refused_by_name() {
    let config = fixture("moonlight-like");
    for projection in ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj"] {
        let path = format!("layers.0.self_attn.{projection}");
        let error = written(&config, &[adapter(&config, &path, 2, 4.0, false)]).unwrap_err();
        assert!(error.to_string().contains(&format!("adapts `{path}`, and llama.cpp ignores")), "{error}");
        assert_eq!(error.hint().as_deref(), Some(MERGE_FIRST));
    }
    let config = fixture("llama");
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/lora/kinds");
    let home = tempfile::tempdir().unwrap();
    for kind in ["dora", "modules-to-save"] {
        let adapter = dir.join(kind);
        assert!(adapter.is_dir(), "{}", adapter.display());
        let error = write_gguf_adapter(&config, &adapter, &home.path().join("x.gguf"), false).unwrap_err();
        assert!(error.to_string().contains("by more than LoRA of a projection"), "{error}");
    }
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0, "nothing is left");
}

#[test]
fn an_existing_file_is_replaced_only_if_asked_to() {
    let config = fixture("llama");
    let home = written(&config, &[adapter(&config, "layers.0.self_attn.q_proj", 2, 4.0, false)]).unwrap();
    let file = home.path().join("adapter.gguf");
    let again = |overwrite| write_gguf_adapter(&config, home.path(), &file, overwrite);
    assert!(matches!(again(false), Err(AdapterError::Checkpoint(CheckpointError::Exists { .. }))));
    again(true).unwrap();
}

#[test]
fn files_that_are_no_adapter_of_the_model_are_refused() {
    let config = fixture("llama");
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("adapter.gguf");
    let (input, output) = (config.hidden_size as u64, config.intermediate_size as u64);
    let pair = |name: &str, rank: u64| {
        let tensor = |suffix: &str, shape: Vec<u64>| (format!("{name}{suffix}"), shape);
        vec![tensor(".lora_a", vec![input, rank]), tensor(".lora_b", vec![rank, output])]
    };
    let read = |change: &[(&str, Value)], tensors: Vec<(String, Vec<u64>)>, fill: f32| {
        let mut metadata = Metadata::default();
        metadata.insert(ARCHITECTURE, "llama");
        metadata.insert(TYPE, ADAPTER);
        metadata.insert(ADAPTER_TYPE, LORA);
        metadata.extend(change.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        let infos = tensors.iter().map(|(name, shape)| TensorInfo {
            name: name.clone(),
            shape: shape.clone(),
            block_type: BlockType::F32,
            offset: 0,
        });
        let header = GgufHeader::lay_out(metadata, infos.collect()).unwrap();
        let values: Vec<Vec<f32>> =
            tensors.iter().map(|(_, shape)| vec![fill; shape.iter().product::<u64>() as usize]).collect();
        write_file(&path, &header, &values).unwrap();
        read_gguf_adapter(&config, &path)
    };
    let gate = || pair("blk.0.ffn_gate.weight", 2);
    // Without an alpha llama.cpp uses the scale 1.
    let plain = read(&[], gate(), 1.0).unwrap();
    assert_eq!((plain[0].settings.alpha, plain[0].path.as_str()), (2.0, "layers.0.mlp.gate_proj"));
    let cases = [
        (read(&[(TYPE, "model".into())], gate(), 1.0), "is a model and not an adapter"),
        (read(&[(ADAPTER_TYPE, "cvec".into())], gate(), 1.0), "of the kind `cvec`; only `lora`"),
        (
            read(&[(ARCHITECTURE, "deepseek2".into())], gate(), 1.0),
            "of the architecture `deepseek2`, and the model is `llama`",
        ),
        (read(&[(INVOCATION, Value::Array(Array::U32(vec![1])))], gate(), 1.0), "activated LoRA"),
        (read(&[(ALPHA, f32::NAN.into())], gate(), 1.0), "a non-finite `adapter.lora.alpha`"),
        (read(&[], Vec::new(), 1.0), "contains no tensors"),
        (read(&[], vec![("blk.0.attn_norm.weight".into(), vec![input])], 1.0), "neither `lora_a` nor `lora_b`"),
        (read(&[], gate()[..1].to_vec(), 1.0), "only one of the two matrices of `blk.0.ffn_gate.weight`"),
        (read(&[], pair("blk.9.ffn_gate.weight", 2), 1.0), "`blk.9.ffn_gate.weight`, which the model does not have"),
        (read(&[], pair("token_embd.weight", 2), 1.0), "cannot be expressed as LoRA of a projection"),
        (read(&[], pair("blk.0.ffn_down.weight", 2), 1.0), "contains `blk.0.ffn_down.weight.lora_a` of shape"),
        (read(&[], gate(), f32::INFINITY), "contains NaN or infinity"),
    ];
    for (result, expected) in cases {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
