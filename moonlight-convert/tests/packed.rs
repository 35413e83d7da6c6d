//! Packed integers: written in the layout of compressed-tensors, and loaded without being widened.

mod common;

use std::fs;
use std::path::Path;

use burn::module::Module;
use burn::tensor::{DType, Device};
use common::{Raw, Tensors, fixture, parameters, read_tensors, write_dir};
use moonlight_convert::gguf::{BlockType, GgufOptions};
use moonlight_convert::{
    Checkpoint, CheckpointError, Format, LoadQuantization, QuantizeReport, SaveOptions, load, save, written_config,
    written_tensors,
};
use moonlight_model::config::AttentionShape;
use moonlight_model::{CausalLm, ModelConfig, QuantBits};
use moonlight_simd::quant::{BLOCK, ScaleType, quantize_block};
use safetensors::Dtype;
use serde_json::{Value, json};

const BITS: [QuantBits; 2] = [QuantBits::Eight, QuantBits::Four];

/// A mixture of experts with latent attention, all of whose rows are whole groups.
fn mixture() -> ModelConfig {
    let mut config = ModelConfig::preset("bench-small").unwrap();
    (config.vocab_size, config.num_hidden_layers, config.hidden_size) = (64, 2, 64);
    (config.intermediate_size, config.num_attention_heads) = (96, 2);
    let moe = config.moe.as_mut().unwrap();
    (moe.moe_intermediate_size, moe.n_routed_experts, moe.num_experts_per_tok) = (32, 4, 2);
    let AttentionShape::Mla(mla) = &mut config.attention else { panic!("latent attention") };
    (mla.kv_lora_rank, mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim) = (32, 32, 16, 32);
    config
}

/// A dense model of another architecture: the widths of SmolLM2, whose keys have fewer heads than its queries.
fn dense() -> ModelConfig {
    let mut config =
        serde_json::from_str::<Value>(&fs::read_to_string(fixture("llama").join("config.json")).unwrap()).unwrap();
    for (key, value) in [
        ("hidden_size", 96),
        ("intermediate_size", 160),
        ("num_attention_heads", 3),
        ("num_key_value_heads", 1),
        ("head_dim", 32),
        ("vocab_size", 70),
    ] {
        config[key] = value.into();
    }
    ModelConfig::from_json(&config.to_string()).unwrap()
}

/// Saves a model with random weights.
fn saved(config: &ModelConfig, dir: &Path, dtype: DType) -> Checkpoint {
    let device = Device::default();
    device.seed(5);
    let options = SaveOptions { dtype: Some(dtype), ..SaveOptions::default() };
    save(&config.init(&device), dir, &options).unwrap();
    Checkpoint::open(dir).unwrap()
}

fn quantized(source: &Checkpoint, dir: &Path, bits: QuantBits) -> (Checkpoint, QuantizeReport) {
    let report = source.convert_quantized(dir, bits, &SaveOptions::default(), &()).unwrap();
    (Checkpoint::open(dir).unwrap(), report)
}

fn loaded(checkpoint: &Checkpoint, quantization: LoadQuantization) -> CausalLm {
    checkpoint.load_with(&Device::default(), Some(DType::F32), quantization).unwrap().model
}

fn config_of(dir: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(dir.join("config.json")).unwrap()).unwrap()
}

#[test]
fn a_packed_checkpoint_has_the_published_layout() {
    let home = tempfile::tempdir().unwrap();
    for (name, config) in [("mixture", mixture()), ("dense", dense())] {
        let source = saved(&config, &home.path().join(name), DType::BF16);
        for bits in BITS {
            let dir = home.path().join(format!("{name}-{bits:?}"));
            let (checkpoint, report) = quantized(&source, &dir, bits);
            assert_eq!(checkpoint.problems(), []);
            let tensors = read_tensors(&dir);
            let mut expected = 0;
            for parameter in config.parameter_shapes() {
                for tensor in written_tensors(&parameter, bits) {
                    let found = &tensors[&tensor.name];
                    assert_eq!((found.dtype, &found.shape), (tensor.dtype, &tensor.shape), "{}", tensor.name);
                    expected += 1;
                }
            }
            assert_eq!(tensors.len(), expected);
            assert_eq!(report.quantized, tensors.keys().filter(|name| name.ends_with("_packed")).count());
            assert_eq!((report.copied, report.unquantized.len()), (0, 0));
            assert_eq!(config_of(&dir)["quantization_config"], written_config(bits));
            assert!(tensors.keys().all(|name| {
                let float = ["embed", "lm_head", "norm", "mlp.gate.", "bias"].iter().any(|part| name.contains(part));
                float
                    != (name.contains("weight_packed")
                        || name.contains("weight_scale")
                        || name.contains("weight_shape"))
            }));
            assert_eq!(checkpoint.stored_bits(), Some(bits));
            // Written again, the bytes are the same; quantized again, they are copied.
            let again = home.path().join("again");
            let (_, report) = quantized(&checkpoint, &again, bits);
            assert_eq!(report.copied, report.quantized);
            assert!(read_tensors(&again) == tensors);
            fs::remove_dir_all(&again).unwrap();
            quantized(&source, &again, bits);
            assert!(read_tensors(&again) == tensors);
            fs::remove_dir_all(&again).unwrap();
        }
    }
}

/// The integers of a row, unpacked by the definition of the format.
fn unpacked(packed: &Raw, bits: QuantBits, row: usize) -> Vec<i32> {
    let words = packed.shape[1];
    let width = if bits == QuantBits::Four { 4 } else { 8 };
    packed.data[row * words * 4..][..words * 4]
        .chunks_exact(4)
        .flat_map(|word| {
            let word = u32::from_le_bytes(word.try_into().unwrap());
            (0..32 / width).map(move |at| (word >> (at * width) & ((1 << width) - 1)) as i32 - (1 << (width - 1)))
        })
        .collect()
}

#[test]
fn the_integers_are_relative_to_the_rounded_scale() {
    let home = tempfile::tempdir().unwrap();
    let name = "model.layers.1.mlp.experts.3.down_proj.weight";
    for (dtype, scale_type) in [(DType::F32, ScaleType::Bf16), (DType::F16, ScaleType::F16)] {
        let source = saved(&mixture(), &home.path().join(format!("{dtype:?}")), dtype);
        let all = read_tensors(source.dir());
        let raw = &all[name];
        let weights: Vec<f32> = match raw.dtype {
            Dtype::F32 => raw.data.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect(),
            _ => raw
                .data
                .chunks_exact(2)
                .map(|bytes| ScaleType::F16.widen(u16::from_le_bytes([bytes[0], bytes[1]])))
                .collect(),
        };
        for bits in BITS {
            let dir = home.path().join(format!("{dtype:?}-{bits:?}"));
            quantized(&source, &dir, bits);
            let tensors = read_tensors(&dir);
            let (packed, scales) = (&tensors[&format!("{name}_packed")], &tensors[&format!("{name}_scale")]);
            let shape: Vec<u8> = raw.shape.iter().flat_map(|side| (*side as i64).to_le_bytes()).collect();
            assert_eq!(tensors[&format!("{name}_shape")].data, shape);
            let columns = raw.shape[1];
            for (row, weights) in weights.chunks_exact(columns).enumerate() {
                let integers = unpacked(packed, bits, row);
                for (block, weights) in weights.chunks_exact(BLOCK).enumerate() {
                    let mut codes = [0; BLOCK];
                    let scale = quantize_block(weights, bits, scale_type, &mut codes);
                    let at = (row * (columns / BLOCK) + block) * 2;
                    assert_eq!(u16::from_le_bytes([scales.data[at], scales.data[at + 1]]), scale);
                    let zero = i32::from(bits.zero());
                    let codes: Vec<i32> = codes.iter().map(|code| i32::from(*code) - zero).collect();
                    assert_eq!(integers[block * BLOCK..][..BLOCK], codes);
                }
            }
        }
    }
}

/// The dequantized model with the head of another: of a quantized model it is always in 8 bits.
fn but_for_its_head(model: CausalLm, floats: &CausalLm) -> CausalLm {
    let mut model = model.dequantized();
    model.lm_head = floats.lm_head.clone();
    model
}

#[test]
fn what_is_stored_quantized_is_loaded_as_it_is() {
    let home = tempfile::tempdir().unwrap();
    for (name, config) in [("mixture", mixture()), ("dense", dense())] {
        let source = saved(&config, &home.path().join(name), DType::BF16);
        for bits in BITS {
            let (checkpoint, _) = quantized(&source, &home.path().join(format!("{name}-{bits:?}")), bits);
            let floats = loaded(&checkpoint, LoadQuantization::Dequantize);
            assert!(!floats.is_quantized());
            for quantization in [LoadQuantization::AsStored, LoadQuantization::To(bits)] {
                let model = loaded(&checkpoint, quantization);
                assert!(model.head_quantized.is_some(), "the head is stored as floats and rounded");
                let count = model.quantized_bytes();
                let projections: usize = read_tensors(checkpoint.dir())
                    .iter()
                    .filter(|(name, _)| name.ends_with("_packed") || name.ends_with("weight_scale"))
                    .map(|(_, raw)| raw.data.len())
                    .sum();
                assert!(count > projections, "{count} {projections}");
                let back = but_for_its_head(model, &floats);
                assert!(parameters(&back) == parameters(&floats), "{name} {bits:?} {quantization:?}");
            }
            // Other bits are rounded anew, a chunk of rows at a time, as the loaded model would be.
            let other = if bits == QuantBits::Four { QuantBits::Eight } else { QuantBits::Four };
            let rounded = loaded(&checkpoint, LoadQuantization::To(other)).dequantized();
            assert!(parameters(&rounded) == parameters(&floats.quantized(other).dequantized()));
        }
        // From plain values.
        for bits in BITS {
            let rounded = loaded(&source, LoadQuantization::To(bits)).dequantized();
            let expected = loaded(&source, LoadQuantization::Dequantize).quantized(bits).dequantized();
            assert!(parameters(&rounded) == parameters(&expected), "{name} {bits:?}");
            let pack = home.path().join("pack");
            source.convert(&pack, &SaveOptions { format: Format::Burnpack, ..SaveOptions::default() }).unwrap();
            let rounded = loaded(&Checkpoint::open(&pack).unwrap(), LoadQuantization::To(bits)).dequantized();
            assert!(parameters(&rounded) == parameters(&expected), "{name} {bits:?} burnpack");
        }
    }
}

#[test]
fn blocks_of_gguf_are_loaded_as_they_are() {
    let home = tempfile::tempdir().unwrap();
    for (name, config) in [("mixture", mixture()), ("dense", dense())] {
        let source = saved(&config, &home.path().join(name), DType::BF16);
        for (block_type, bits) in [(BlockType::Q8_0, QuantBits::Eight), (BlockType::Q4_0, QuantBits::Four)] {
            let path = home.path().join(format!("{name}-{block_type}.gguf"));
            source.write_gguf(&path, &GgufOptions { block_type: Some(block_type), overwrite: false }, &()).unwrap();
            let checkpoint = Checkpoint::open(&path).unwrap();
            assert_eq!(checkpoint.stored_bits(), Some(bits));
            let whole = loaded(&checkpoint, LoadQuantization::Dequantize);
            let floats = parameters(&whole);
            let model = loaded(&checkpoint, LoadQuantization::AsStored);
            assert!(model.is_quantized());
            let (mut same, mut near) = (0, 0);
            for ((path, _, found), (_, _, expected)) in parameters(&model.dequantized()).into_iter().zip(floats) {
                if found == expected {
                    same += 1;
                    continue;
                }
                // The half of `kv_b_proj` that is stored transposed is rounded again.
                assert!(path.ends_with("kv_b_proj.weight"), "{path}");
                near += 1;
                let values = |bytes: &[u8]| bytemuck::pod_collect_to_vec::<u8, f32>(bytes);
                let (found, expected) = (values(&found), values(&expected));
                let largest = expected.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
                let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(off <= 0.51 * largest / 127.0, "{off} {largest}");
            }
            assert!(same > 10 && near == if name == "mixture" { config.num_hidden_layers } else { 0 }, "{same} {near}");
        }
    }
}

#[test]
fn rows_of_other_lengths_stay_as_they_are() {
    let home = tempfile::tempdir().unwrap();
    let mut config = mixture();
    config.moe.as_mut().unwrap().moe_intermediate_size = 40;
    let source = saved(&config, &home.path().join("source"), DType::BF16);
    let dir = home.path().join("packed");
    let (checkpoint, report) = quantized(&source, &dir, QuantBits::Four);
    assert_eq!(checkpoint.problems(), []);
    let first = "model.layers.1.mlp.experts.0.down_proj".to_owned();
    assert!(report.unquantized.contains(&first) && report.unquantized.len() == 5, "{:?}", report.unquantized);
    let ignored = config_of(&dir)["quantization_config"]["ignore"].as_array().unwrap().clone();
    assert!(ignored.contains(&first.into()) && ignored.len() == 7, "{ignored:?}");
    let floats = loaded(&checkpoint, LoadQuantization::Dequantize);
    let back = but_for_its_head(loaded(&checkpoint, LoadQuantization::AsStored), &floats);
    assert!(parameters(&back) == parameters(&floats));
    // No row of this model is a multiple of 32.
    let odd = Checkpoint::open(fixture("moonlight-like")).unwrap();
    let error =
        odd.convert_quantized(&home.path().join("odd"), QuantBits::Four, &SaveOptions::default(), &()).unwrap_err();
    assert!(matches!(error, CheckpointError::NothingToQuantize { .. }), "{error}");
    assert!(!home.path().join("odd").exists());
}

/// A packed model with one change.
fn changed(change: impl FnOnce(&mut Tensors, &mut Value)) -> (tempfile::TempDir, Checkpoint) {
    let home = tempfile::tempdir().unwrap();
    let source = saved(&mixture(), &home.path().join("source"), DType::BF16);
    let dir = home.path().join("packed");
    quantized(&source, &dir, QuantBits::Four);
    let (mut tensors, mut config) = (read_tensors(&dir), config_of(&dir));
    change(&mut tensors, &mut config);
    let changed = home.path().join("changed");
    write_dir(&changed, &config, &tensors);
    let checkpoint = Checkpoint::open(&changed).unwrap();
    (home, checkpoint)
}

const Q: &str = "model.layers.0.self_attn.q_proj.weight";

#[test]
fn forms_without_a_kernel_are_dequantized() {
    // Groups of 64, and scales in f32.
    let groups = |tensors: &mut Tensors, config: &mut Value| {
        let weights = &mut config["quantization_config"]["config_groups"]["group_0"]["weights"];
        *weights = json!({"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group"});
        let scale = tensors.get_mut(&format!("{Q}_scale")).unwrap();
        scale.shape[1] /= 2;
        scale.data.truncate(scale.data.len() / 2);
    };
    let wide = |tensors: &mut Tensors, _: &mut Value| {
        let scale = tensors.get_mut(&format!("{Q}_scale")).unwrap();
        scale.dtype = Dtype::F32;
        scale.data = scale.data.chunks(2).flat_map(|half| [0, 0, half[0], half[1]]).collect();
    };
    for change in [&groups as &dyn Fn(&mut Tensors, &mut Value), &wide] {
        let (_home, checkpoint) = changed(change);
        assert_eq!(checkpoint.problems(), []);
        let model = loaded(&checkpoint, LoadQuantization::AsStored);
        let first = &model.layers[0];
        let mut quantized = 0;
        let whole = loaded(&checkpoint, LoadQuantization::Dequantize);
        let floats = parameters(&whole);
        for (path, _, bytes) in parameters(&model) {
            if path == "layers.0.self_attn.q_proj.weight" {
                let expected = floats.iter().find(|(other, _, _)| *other == path).unwrap();
                assert!(bytes == expected.2);
            }
            quantized += usize::from(bytes.len() == 4);
        }
        assert!(first.num_params() > 0 && quantized >= 10, "{quantized} placeholders");
        assert!(parameters(&but_for_its_head(model, &whole)) == floats);
        // On request it is rounded.
        assert!(loaded(&checkpoint, LoadQuantization::To(QuantBits::Four)).is_quantized());
    }
}

/// Routers and embeddings are never quantized in memory.
#[test]
fn a_packed_router_is_dequantized() {
    let (_home, checkpoint) = changed(|tensors, _| {
        let name = "model.layers.1.mlp.gate.weight";
        let [rows, columns] = tensors.remove(name).unwrap().shape[..] else { panic!("a matrix") };
        let raw = |dtype, shape: Vec<usize>, data| Raw { dtype, shape, data };
        let scales = rows * columns / BLOCK;
        tensors
            .insert(format!("{name}_packed"), raw(Dtype::I32, vec![rows, columns / 8], vec![0x9a; rows * columns / 2]));
        tensors.insert(
            format!("{name}_scale"),
            raw(Dtype::BF16, vec![rows, columns / BLOCK], [0x80, 0x3f].repeat(scales)),
        );
        let shape = [rows, columns].iter().flat_map(|side| (*side as i64).to_le_bytes()).collect();
        tensors.insert(format!("{name}_shape"), raw(Dtype::I64, vec![2], shape));
    });
    assert_eq!(checkpoint.problems(), []);
    for quantization in [LoadQuantization::AsStored, LoadQuantization::To(QuantBits::Eight)] {
        let model = loaded(&checkpoint, quantization);
        let all = parameters(&model);
        let (_, _, router) =
            all.iter().find(|(path, _, _)| path.ends_with("router.weight") || path.contains("gate.weight")).unwrap();
        let values = bytemuck::pod_collect_to_vec::<u8, f32>(router);
        assert!(values.len() == 4 * 64 && values.iter().all(|value| [1.0, 2.0].contains(value)), "{values:?}");
    }
}

#[test]
fn damaged_packed_weights_are_errors_that_name_them() {
    let scale = format!("{Q}_scale");
    for value in [[0xc0, 0x7f], [0x80, 0x7f], [0x80, 0xff]] {
        let (_home, checkpoint) =
            changed(|tensors, _| tensors.get_mut(&scale).unwrap().data[6..8].copy_from_slice(&value));
        for quantization in
            [LoadQuantization::AsStored, LoadQuantization::To(QuantBits::Eight), LoadQuantization::Dequantize]
        {
            let error = checkpoint.load_with(&Device::default(), None, quantization).unwrap_err();
            let named = matches!(&error, CheckpointError::NonFinite { tensor, .. } if tensor.starts_with(Q));
            assert!(named, "{quantization:?}: {error}");
        }
        let copy = checkpoint.convert_quantized(
            &checkpoint.dir().with_extension("copy"),
            QuantBits::Four,
            &SaveOptions::default(),
            &(),
        );
        assert!(matches!(copy.unwrap_err(), CheckpointError::NonFinite { .. }));
    }
    // Shapes are checked before anything is read.
    for (change, named) in [
        (
            &(|tensors: &mut Tensors, _: &mut Value| {
                let packed = tensors.get_mut(&format!("{Q}_packed")).unwrap();
                packed.shape[1] -= 1;
                packed.data.truncate(packed.shape[0] * packed.shape[1] * 4);
            }) as &dyn Fn(&mut Tensors, &mut Value),
            "weight_packed",
        ),
        (
            &|tensors: &mut Tensors, _: &mut Value| {
                let scale = tensors.get_mut(&format!("{Q}_scale")).unwrap();
                scale.shape[0] -= 1;
                scale.data.truncate(scale.shape[0] * scale.shape[1] * 2);
            },
            "weight_scale",
        ),
        (
            &|tensors: &mut Tensors, _: &mut Value| {
                let scale = tensors.get_mut(&format!("{Q}_scale")).unwrap();
                scale.shape[1] += 1;
                scale.data = vec![0; scale.shape[0] * scale.shape[1] * 2];
            },
            "weight_scale",
        ),
        (&|tensors: &mut Tensors, _: &mut Value| drop(tensors.remove(&format!("{Q}_scale"))), "weight_scale"),
        (
            &|tensors: &mut Tensors, _: &mut Value| tensors.get_mut(&format!("{Q}_packed")).unwrap().dtype = Dtype::U32,
            "U32",
        ),
        (
            &|_: &mut Tensors, config: &mut Value| {
                config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64.into();
            },
            "`group_size` 64",
        ),
        (
            &|_: &mut Tensors, config: &mut Value| {
                config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8.into();
            },
            "`num_bits` 8",
        ),
    ] {
        let (_home, checkpoint) = changed(change);
        let error = checkpoint.load_with(&Device::default(), None, LoadQuantization::AsStored).unwrap_err();
        assert!(
            matches!(error, CheckpointError::Mismatch { .. }) && error.to_string().contains(named),
            "{named}: {error}"
        );
    }
    // A file that is cut off after it was opened.
    let (_home, checkpoint) = changed(|_, _| {});
    let file = fs::File::options().write(true).open(checkpoint.dir().join("model.safetensors")).unwrap();
    file.set_len(file.metadata().unwrap().len() / 3).unwrap();
    let error = checkpoint.load_with(&Device::default(), None, LoadQuantization::AsStored).unwrap_err();
    assert!(matches!(error, CheckpointError::File(_)), "{error}");
    let error = load(checkpoint.dir(), &Device::default(), None).unwrap_err();
    assert!(matches!(error, CheckpointError::Mismatch { .. }), "{error}");
}
