//! Tensor names of Hugging Face checkpoints, in both directions. No other file spells one.
//!
//! | module path | name in the file |
//! |---|---|
//! | `embed_tokens.weight`, `norm.weight`, `layers.L.…` | the same after `model.` |
//! | `lm_head.weight` | `lm_head.weight` |
//! | `layers.L.mlp.router.…` | `model.layers.L.mlp.gate.…` |
//! | `layers.L.mlp.experts.gate_proj`, `[experts, in, out]` | `model.layers.L.mlp.experts.E.gate_proj.weight`, each `[out, in]` |
//! | the same | or, in transformers 5, `….experts.gate_up_proj`, `[experts, 2 out, in]`: rows of gate, then rows of up |
//! | the same, `down_proj` | or `….experts.down_proj`, `[experts, out, in]` |
//! | a projection in FP8 | `….weight` in F8_E4M3 with `….weight_scale_inv` (compressed-tensors: `….weight_scale`) |
//! | a projection in INT4 or INT8 | `….weight_packed`, `….weight_scale`, `….weight_shape` instead of `….weight` |
//!
//! A burnpack file names tensors by the module path.
//!
//! The prefix `language_model.` (Kimi-VL, Kimi-K2.5) is dropped, with or without a following `model.`, and a lone
//! `model.` may be missing.

use std::collections::BTreeSet;
use std::ops::Range;

use moonlight_model::ModelConfig;
use moonlight_model::config::{ParameterKind, ParameterShape};

use crate::dtype::quant::is_quantized;

/// The prefix of every tensor of the decoder.
const MODEL: &str = "model.";
const LANGUAGE_MODEL: [&str; 2] = ["language_model.", "model.language_model."];
pub(crate) const HEAD: &str = "lm_head.weight";
/// The key of the embedding's tensor.
pub(crate) const EMBEDDING: &str = "embed_tokens.weight";
const VISION: [&str; 3] = ["vision_tower.", "multi_modal_projector.", "mm_projector."];
const INV_FREQ: &str = "rotary_emb.inv_freq";
/// The suffix of a tensor that only multi-token-prediction (MTP) layers have.
const MTP_SUFFIX: &str = ".eh_proj.weight";
/// Suffixes of the scales of quantized activations and caches.
const ACTIVATION_SCALES: [&str; 13] = [
    ".activation_scale",
    ".down_proj_activation_scale",
    ".gate_up_proj_activation_scale",
    ".input_scale",
    ".input_scale_ub",
    ".input_zero_point",
    ".output_scale",
    ".output_zero_point",
    ".kv_scale",
    ".q_scale",
    ".k_scale",
    ".v_scale",
    ".prob_output_scale",
];

/// Suffixes that differ between the module path and the file, in this order.
const RENAMED: [(&str, &str); 2] = [
    (".mlp.router.weight", ".mlp.gate.weight"),
    (".mlp.router.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
];

/// Why a tensor of the file is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SkipReason {
    /// `*.rotary_emb.inv_freq`: a buffer of older model code; the model computes its frequencies.
    InverseFrequencies,
    /// Part of an MTP layer that the config declares. These layers follow the last decoder layer.
    MultiTokenPrediction,
    /// Part of an MTP layer that the config does not declare.
    UndeclaredPrediction,
    /// Part of a vision tower or its projector.
    Vision,
    /// An `lm_head.weight` equal to the embedding, to which the config ties it.
    TiedHead,
    /// A scale for quantized activations or KV caches, which are not quantized here.
    ActivationScales,
}

impl SkipReason {
    /// A description of such tensors, for messages.
    pub fn describe(self) -> &'static str {
        match self {
            Self::InverseFrequencies => "rotary frequencies of older model code (computed instead)",
            Self::MultiTokenPrediction => "multi-token-prediction layers (not computed)",
            Self::UndeclaredPrediction => {
                "multi-token-prediction layers that `config.json` does not declare (not computed)"
            }
            Self::Vision => "vision tower and projector (not computed)",
            Self::TiedHead => "output head (equal to the embedding, to which it is tied)",
            Self::ActivationScales => "scales of quantized activations (not quantized here)",
        }
    }

    /// Whether nothing is lost without such tensors: they are computed, or equal to another tensor.
    pub fn is_redundant(self) -> bool {
        match self {
            Self::InverseFrequencies | Self::TiedHead => true,
            Self::MultiTokenPrediction | Self::UndeclaredPrediction | Self::Vision | Self::ActivationScales => false,
        }
    }
}

/// A tensor of a Hugging Face checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HfTensor {
    /// Its name in the file.
    pub name: String,
    /// Its shape in the file, `[out, in]` for a projection.
    pub shape: Vec<usize>,
}

/// A stack of experts as transformers 5 stores it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stacked {
    pub(crate) tensor: HfTensor,
    /// The rows of each expert's matrix that belong to the parameter.
    pub(crate) rows: Range<usize>,
}

/// The possible names of an FP8 matrix's scales: DeepSeek's (despite `_inv` a factor, not a divisor), and that of
/// compressed-tensors.
pub(crate) fn fp8_scales(weight: &str) -> [String; 2] {
    [format!("{weight}_scale_inv"), format!("{weight}_scale")]
}

/// The three tensors of an INT4 or INT8 matrix in the layout of compressed-tensors (`pack-quantized`).
pub(crate) struct PackedNames {
    pub(crate) values: String,
    pub(crate) scale: String,
    pub(crate) shape: String,
}

/// The names for the matrix that would be called `weight`.
pub(crate) fn packed_names(weight: &str) -> PackedNames {
    PackedNames {
        values: format!("{weight}_packed"),
        scale: format!("{weight}_scale"),
        shape: format!("{weight}_shape"),
    }
}

/// The layer of a tensor, `None` if it belongs to none.
pub(crate) fn layer_of_tensor(name: &str) -> Option<usize> {
    layer_of(key(name))
}

/// Whether the file contains the transpose of the parameter (of each expert's matrix in a stack). PyTorch stores a
/// linear layer as `[out, in]`, Burn as `[in, out]`.
pub(crate) fn transposed(kind: ParameterKind) -> bool {
    match kind {
        ParameterKind::Head | ParameterKind::Matrix | ParameterKind::Experts | ParameterKind::Router => true,
        ParameterKind::Embedding | ParameterKind::Norm | ParameterKind::Bias | ParameterKind::CorrectionBias => false,
    }
}

/// The tensors that a parameter is saved as: one, or one for each expert of a stack.
pub fn hugging_face_tensors(parameter: &ParameterShape) -> Vec<HfTensor> {
    match (parameter.kind, parameter.shape.as_slice()) {
        (ParameterKind::Experts, &[experts, input, output]) => {
            let (stack, projection) = experts_of(&parameter.path);
            (0..experts)
                .map(|expert| HfTensor {
                    name: format!("{MODEL}{stack}.{expert}.{projection}.weight"),
                    shape: vec![output, input], // [in, out] in the stack
                })
                .collect()
        }
        (ParameterKind::Head, &[input, output]) => vec![HfTensor { name: HEAD.into(), shape: vec![output, input] }],
        (kind, shape) => {
            let mut shape = shape.to_vec();
            if transposed(kind) {
                shape.reverse();
            }
            let renamed = RENAMED.iter().find_map(|(ours, theirs)| {
                parameter.path.strip_suffix(ours).map(|stem| format!("{MODEL}{stem}{theirs}"))
            });
            vec![HfTensor { name: renamed.unwrap_or_else(|| format!("{MODEL}{}", parameter.path)), shape }]
        }
    }
}

/// The single tensor in which transformers 5 may store a stack of experts.
pub(crate) fn stacked(parameter: &ParameterShape) -> Option<Stacked> {
    let (ParameterKind::Experts, &[experts, input, output]) = (parameter.kind, parameter.shape.as_slice()) else {
        return None;
    };
    let (stack, projection) = experts_of(&parameter.path);
    let (name, height, rows) = match projection {
        // In each expert's matrix, the rows of gate are above those of up.
        "gate_proj" => ("gate_up_proj", 2 * output, 0..output),
        "up_proj" => ("gate_up_proj", 2 * output, output..2 * output),
        other => (other, output, 0..output),
    };
    let tensor = HfTensor { name: format!("{MODEL}{stack}.{name}"), shape: vec![experts, height, input] };
    Some(Stacked { tensor, rows })
}

/// Splits `layers.3.mlp.experts.gate_proj` into `layers.3.mlp.experts` and `gate_proj`.
fn experts_of(path: &str) -> (&str, &str) {
    path.rsplit_once('.').expect("the path of a stack of experts has several parts")
}

/// The name without the prefixes that differ between checkpoints, by which tensors are matched.
pub(crate) fn key(name: &str) -> &str {
    let name = LANGUAGE_MODEL.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name);
    name.strip_prefix(MODEL).unwrap_or(name)
}

/// Why a tensor that the model does not use is ignored; `None` if it is unexpected.
pub(crate) fn skip_reason(name: &str, config: &ModelConfig) -> Option<SkipReason> {
    let key = key(name);
    if VISION.iter().any(|prefix| key.starts_with(prefix)) {
        return Some(SkipReason::Vision);
    }
    if let Some(layer) = layer_of(key) {
        let layers = config.num_hidden_layers;
        let mtp_layers = declared_mtp_layers(config);
        if (layers..layers.saturating_add(mtp_layers)).contains(&layer) {
            return Some(SkipReason::MultiTokenPrediction);
        }
        if layer < layers && key.ends_with(INV_FREQ) {
            return Some(SkipReason::InverseFrequencies);
        }
    }
    if key == INV_FREQ {
        return Some(SkipReason::InverseFrequencies);
    }
    if is_quantized(config) && ACTIVATION_SCALES.iter().any(|end| key.ends_with(end)) {
        return Some(SkipReason::ActivationScales);
    }
    (config.tie_word_embeddings && key == HEAD).then_some(SkipReason::TiedHead)
}

/// The MTP layers among tensor names, recognized by their tensors, whether or not the config declares them.
pub(crate) fn mtp_layers_of<'a>(names: impl Iterator<Item = &'a str>, config: &ModelConfig) -> BTreeSet<usize> {
    names
        .map(key)
        .filter(|key| key.ends_with(MTP_SUFFIX))
        .filter_map(layer_of)
        .filter(|layer| *layer >= config.num_hidden_layers)
        .collect()
}

/// The number of MTP layers that the config declares.
pub(crate) fn declared_mtp_layers(config: &ModelConfig) -> usize {
    MTP_LAYER_KEYS
        .iter()
        .find_map(|key| config.extra.get(*key)?.as_u64())
        .and_then(|layers| usize::try_from(layers).ok())
        .unwrap_or(0)
}

/// The config's keys for [`declared_mtp_layers`]: as published, and as in transformers 5.
pub(crate) const MTP_LAYER_KEYS: [&str; 2] = ["num_nextn_predict_layers", "num_mtp_layers"];

fn layer_of(key: &str) -> Option<usize> {
    key.strip_prefix("layers.")?.split_once('.')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FNV-1a with 64 bits, to pin a list of names without copying it.
    fn fnv1a(text: &str) -> u64 {
        text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    }

    /// The published index of Moonlight-16B-A3B has 5,344 tensors, 27 of them `inv_freq` buffers, with 31,920,223,872
    /// bytes in bf16. The digest is that of its sorted lines `name<tab>[shape]`.
    #[test]
    fn moonlight_has_the_published_names_and_shapes() {
        let config = ModelConfig::preset("moonlight-16b-a3b").unwrap();
        let mut tensors: Vec<HfTensor> = config.parameter_shapes().iter().flat_map(hugging_face_tensors).collect();
        assert_eq!(tensors.len(), 5_344 - 27);
        for layer in 0..27 {
            let name = format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq");
            assert_eq!(skip_reason(&name, &config), Some(SkipReason::InverseFrequencies));
            tensors.push(HfTensor { name, shape: vec![64] });
        }
        let bytes: usize = tensors.iter().map(|tensor| 2 * tensor.shape.iter().product::<usize>()).sum();
        assert_eq!(bytes, 31_920_223_872);
        let mut lines: Vec<String> = tensors
            .iter()
            .map(|HfTensor { name, shape }| {
                let shape: Vec<String> = shape.iter().map(usize::to_string).collect();
                format!("{name}\t[{}]", shape.join(","))
            })
            .collect();
        lines.sort();
        for line in [
            "model.embed_tokens.weight\t[163840,2048]",
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight\t[576,2048]",
            "model.layers.26.mlp.experts.63.down_proj.weight\t[2048,1408]",
            "model.layers.1.mlp.gate.e_score_correction_bias\t[64]",
        ] {
            assert!(lines.binary_search(&line.to_owned()).is_ok(), "{line}");
        }
        assert_eq!(fnv1a(&lines.join("\n")), DIGEST_OF_MOONLIGHT);
    }

    const DIGEST_OF_MOONLIGHT: u64 = 0xa4ee_9c75_e5ec_259f;

    #[test]
    fn names_with_different_prefixes_have_one_key() {
        for name in [
            "model.layers.0.input_layernorm.weight",
            "layers.0.input_layernorm.weight",
            "language_model.model.layers.0.input_layernorm.weight",
            "language_model.layers.0.input_layernorm.weight",
            "model.language_model.layers.0.input_layernorm.weight",
        ] {
            assert_eq!(key(name), "layers.0.input_layernorm.weight");
        }
        assert_eq!(key("language_model.lm_head.weight"), "lm_head.weight");
    }

    #[test]
    fn only_tensors_that_the_config_explains_are_ignored() {
        let mut config = ModelConfig::preset("deepseek-v3").unwrap();
        let layer_61 = "model.layers.61.eh_proj.weight";
        assert_eq!(skip_reason(layer_61, &config), None, "the preset has no prediction layer");
        config.extra.insert("num_nextn_predict_layers".into(), 1.into());
        assert_eq!(skip_reason(layer_61, &config), Some(SkipReason::MultiTokenPrediction));
        assert_eq!(skip_reason("model.layers.62.eh_proj.weight", &config), None);
        assert_eq!(skip_reason("model.layers.60.eh_proj.weight", &config), None);
        assert_eq!(skip_reason("lm_head.weight", &config), None);
        config.tie_word_embeddings = true;
        assert_eq!(skip_reason("lm_head.weight", &config), Some(SkipReason::TiedHead));
        for name in ["vision_tower.patch_embed.proj.weight", "multi_modal_projector.linear_1.weight", "mm_projector.x"]
        {
            assert_eq!(skip_reason(name, &config), Some(SkipReason::Vision));
        }
    }

    #[test]
    fn transformers_5_stacks_gate_over_up() {
        let config = ModelConfig::preset("moonlight-16b-a3b").unwrap();
        let shapes = config.parameter_shapes();
        let find = |path: &str| stacked(shapes.iter().find(|parameter| parameter.path == path).unwrap());
        let up = find("layers.1.mlp.experts.up_proj").unwrap();
        assert_eq!(up.tensor.name, "model.layers.1.mlp.experts.gate_up_proj");
        assert_eq!((up.tensor.shape, up.rows), (vec![64, 2816, 2048], 1408..2816));
        let down = find("layers.1.mlp.experts.down_proj").unwrap();
        assert_eq!((down.tensor.shape, down.rows), (vec![64, 2048, 1408], 0..2048));
        assert_eq!(find("norm.weight"), None);
    }
}
