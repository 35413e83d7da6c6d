//! The type of each tensor in a file of a given type: the rules of `llama-quantize` (`src/llama-quant.cpp` of llama.cpp) without an
//! importance matrix.
//!
//! | tensor | F32, F16, BF16 | Q8_0 | Q4_0 | Q4_K (`Q4_K_M`) |
//! |---|---|---|---|---|
//! | vectors, norms, router, correction bias | F32 | F32 | F32 | F32 |
//! | `output`, or `token_embd` if the head is tied | the file's | Q8_0 | Q6_K | Q6_K |
//! | `attn_v`, `ffn_down` of every layer type, in the layers with more bits | the file's | Q8_0 | Q4_0 | Q6_K |
//! | every other matrix | the file's | Q8_0 | Q4_0 | Q4_K |
//!
//! The layers with more bits are the first and last eighth, and every third between. Exceptions of models with eight experts, and of
//! Llama's with 80 layers, are those of llama.cpp, too.
//!
//! Rows must have complete blocks. Where they do not, Q4_K becomes Q5_0, Q5_K Q5_1 and Q6_K Q8_0, and rows that are no multiple
//! of 32 become F16. In Moonlight this concerns `attn_k_b` (rows of 128) and `ffn_down_exps` (1408).

use moonlight_model::ModelConfig;
use moonlight_model::config::AttentionShape;

use super::block::BlockType;
use super::names::{Architecture, GgufTensor};

/// The type of a tensor in a file of type `file`. `tied`: the file has no `output.weight`.
pub(crate) fn block_type(file: BlockType, config: &ModelConfig, tensor: &GgufTensor, tied: bool) -> BlockType {
    let name = tensor.name.as_str();
    let is_matrix = tensor.shape.len() > 1 && name.ends_with(".weight") && !name.ends_with("_norm.weight");
    if !is_matrix || name.ends_with("ffn_gate_inp.weight") {
        return BlockType::F32;
    }
    if !file.is_quantized() {
        return file;
    }
    fitting(wanted(file, config, tensor, tied), tensor.shape[0])
}

/// The type before the length of rows is considered.
fn wanted(file: BlockType, config: &ModelConfig, tensor: &GgufTensor, tied: bool) -> BlockType {
    let name = tensor.name.as_str();
    let (layer, stem) = layer_and_stem(name);
    let experts = config.moe.as_ref().map_or(0, |moe| moe.n_routed_experts);
    if name == "output.weight" || tied && name == "token_embd.weight" {
        return match file {
            BlockType::Q8_0 => BlockType::Q8_0,
            _ if !tensor.shape[0].is_multiple_of(file.values()) => BlockType::Q8_0,
            _ => BlockType::Q6K,
        };
    }
    let is_medium = file == BlockType::Q4K;
    let more_bits = is_medium && has_more_bits(layer, config.num_hidden_layers);
    match stem {
        "attn_v" | "attn_k" if experts == 8 => BlockType::Q8_0,
        "attn_v" if more_bits => BlockType::Q6K,
        "attn_v" if is_medium && is_llama_70b(config) => BlockType::Q5K,
        "attn_output" if is_medium && experts == 8 => BlockType::Q5K,
        "ffn_down" | "ffn_down_exps" | "ffn_down_shexp" if more_bits => BlockType::Q6K,
        _ => file,
    }
}

/// `use_more_bits` of llama.cpp.
fn has_more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// Llama's 70 B: few and small value projections, which get more bits.
fn is_llama_70b(config: &ModelConfig) -> bool {
    let grouped = match &config.attention {
        AttentionShape::Gqa(gqa) => gqa.num_key_value_heads != config.num_attention_heads,
        AttentionShape::Mla(_) => false,
    };
    Architecture::of(config.model_type) == Architecture::Llama && config.num_hidden_layers == 80 && grouped
}

/// The layer and the name between it and the suffix: 3 and `attn_v` of `blk.3.attn_v.weight`.
fn layer_and_stem(name: &str) -> (usize, &str) {
    let parts = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let Some((layer, rest)) = parts else { return (0, name) };
    (layer.parse().unwrap_or(0), rest.split('.').next().unwrap_or(rest))
}

/// The type, or the next one whose blocks divide rows of this length.
fn fitting(wanted: BlockType, row: usize) -> BlockType {
    if row.is_multiple_of(wanted.values()) {
        return wanted;
    }
    let smaller = match wanted {
        BlockType::Q4K => BlockType::Q5_0,
        BlockType::Q5K => BlockType::Q5_1,
        BlockType::Q6K => BlockType::Q8_0,
        other => other,
    };
    if row.is_multiple_of(smaller.values()) { smaller } else { BlockType::F16 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::gguf::names;

    fn types(preset: &str, file: BlockType) -> Vec<(String, BlockType)> {
        let config = ModelConfig::preset(preset).unwrap();
        let tensors = names::tensors(&config).unwrap();
        let named = |tensor: &GgufTensor| (tensor.name.clone(), block_type(file, &config, tensor, false));
        tensors.iter().map(named).collect()
    }

    #[test]
    fn every_block_fits_the_rows() {
        for preset in ["moonlight-16b-a3b", "deepseek-v3", "deepseek-v2-lite", "muon-report-400m", "bench-small"] {
            let config = ModelConfig::preset(preset).unwrap();
            for tensor in names::tensors(&config).unwrap() {
                for file in BlockType::ALL {
                    let block_type = block_type(file, &config, &tensor, false);
                    assert!(tensor.shape[0].is_multiple_of(block_type.values()), "{preset} {file} {}", tensor.name);
                    assert!(tensor.shape.len() > 1 || block_type == BlockType::F32);
                }
            }
        }
    }

    /// The types that `llama_model_quantize` chose for some models (`scripts/fixtures/make_llama_cpp_fixtures.py`).
    #[test]
    fn the_types_are_those_of_llama_quantize() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/gguf/types.json");
        let models: Vec<serde_json::Value> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(models.len(), 9);
        for model in models {
            let config = ModelConfig::from_value(model["config"].clone()).unwrap();
            let tensors = names::tensors(&config).unwrap();
            for tensor in &tensors {
                // The file without values has no vectors but norms.
                let Some(expected) = model["types"].get(&tensor.name) else {
                    assert!(tensor.name.ends_with(".bias"), "{}", tensor.name);
                    continue;
                };
                let found = [BlockType::Q4_0, BlockType::Q8_0, BlockType::Q4K]
                    .map(|file| block_type(file, &config, tensor, config.tie_word_embeddings).to_string());
                assert_eq!(&found.join(" "), expected.as_str().unwrap(), "{} {}", model["name"], tensor.name);
            }
        }
    }

    /// As `llama-quantize` chooses for Moonlight: rows of 128 and 1408 have no complete blocks of 256.
    #[test]
    fn moonlight_in_4_bits() {
        let types = types("moonlight-16b-a3b", BlockType::Q4K);
        let find = |name: &str| types.iter().find(|(other, _)| other == name).unwrap().1;
        for (name, expected) in [
            ("token_embd.weight", BlockType::Q4K),
            ("output.weight", BlockType::Q6K),
            ("output_norm.weight", BlockType::F32),
            ("blk.0.ffn_down.weight", BlockType::Q6K),
            ("blk.3.attn_k_b.weight", BlockType::Q5_0),
            ("blk.3.attn_v_b.weight", BlockType::Q4K),
            ("blk.3.ffn_down_exps.weight", BlockType::Q5_0),
            ("blk.1.ffn_down_exps.weight", BlockType::Q8_0),
            ("blk.1.ffn_down_shexp.weight", BlockType::Q6K),
            ("blk.3.ffn_down_shexp.weight", BlockType::Q4K),
            ("blk.3.ffn_gate_inp.weight", BlockType::F32),
            ("blk.3.exp_probs_b.bias", BlockType::F32),
        ] {
            assert_eq!(find(name), expected, "{name}");
        }
    }

    #[test]
    fn rows_that_are_no_multiple_of_32_are_f16() {
        assert_eq!(fitting(BlockType::Q8_0, 80), BlockType::F16);
        assert_eq!(fitting(BlockType::Q4K, 80), BlockType::F16);
        assert_eq!(fitting(BlockType::Q6K, 96), BlockType::Q8_0);
    }
}
