//! Tensor names of GGUF for the three architectures, and how the values of a GGUF tensor follow from a parameter's.
//!
//! A GGUF tensor consists of rows of `shape[0]` values, and so does a Hugging Face tensor; nearly every GGUF tensor has the
//! rows of one parameter, in the same order or permuted ([`RowOrder`]). There are two exceptions: the keys' half of `kv_b_proj` is
//! transposed head by head, and the factors of Llama 3.1's frequencies are computed.
//!
//! | GGUF, after `blk.N.` | parameter, after `layers.N.` | order of rows |
//! |---|---|---|
//! | `attn_q`, `attn_k` (Llama) | `self_attn.q_proj`, `k_proj` | rotated pairs become adjacent, also in their biases |
//! | `attn_k_b`, `{nope, rank, heads}` | `self_attn.kv_b_proj` | of each head the first `nope` rows, transposed |
//! | `attn_v_b`, `{rank, value, heads}` | `self_attn.kv_b_proj` | of each head the other rows |
//! | `ffn_{gate,up,down}_exps`, `{in, out, experts}` | `mlp.experts.…` | one expert after the other |
//! | `exp_probs_b.bias` | `mlp.router.e_score_correction_bias` | the same |
//!
//! The pairs that the rotary embedding rotates are adjacent in `deepseek2` and `llama`, and half a head apart in `qwen2`. In a
//! Hugging Face file they are as `rope_interleave` says.

use moonlight_model::ModelConfig;
use moonlight_model::config::{
    AttentionRole, AttentionShape, MlaShape, ModelType, ParameterKind, ParameterShape, ProjectionRole, RopeScaling,
};

/// The factors of Llama 3.1's frequencies.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";
/// The end of the name of a router.
pub(crate) const ROUTER: &str = ".ffn_gate_inp.weight";
/// The end of the name of a correction bias.
pub(crate) const CORRECTION: &str = ".exp_probs_b.bias";

/// An architecture of llama.cpp, by the value of `general.architecture`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Architecture {
    Deepseek2,
    Llama,
    Qwen2,
}

impl Architecture {
    pub(crate) const ALL: [Self; 3] = [Self::Deepseek2, Self::Llama, Self::Qwen2];

    pub(crate) fn of(model_type: ModelType) -> Self {
        match model_type {
            ModelType::DeepseekV3 | ModelType::DeepseekV2 | ModelType::KimiK2 => Self::Deepseek2,
            ModelType::Llama => Self::Llama,
            ModelType::Qwen2 => Self::Qwen2,
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|architecture| architecture.as_str() == name)
    }

    /// The value of `general.architecture`, which is also the prefix of the keys of the model.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Deepseek2 => "deepseek2",
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
        }
    }

    /// Whether llama.cpp rotates adjacent pairs (`LLAMA_ROPE_TYPE_NORM`), and not pairs that are half a head apart.
    fn rotates_adjacent_pairs(self) -> bool {
        match self {
            Self::Deepseek2 | Self::Llama => true,
            Self::Qwen2 => false,
        }
    }
}

/// A tensor of a GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GgufTensor {
    pub(crate) name: String,
    /// The shape as in the file: the innermost dimension first, so that `shape[0]` is the length of a row.
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Values,
}

/// Where the values of a GGUF tensor come from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Values {
    /// A parameter, by its index in [`ModelConfig::parameter_shapes`]; its Hugging Face tensors one after the other.
    Parameter { index: usize, order: RowOrder },
    /// The divisors of Llama 3.1's frequencies, f32.
    RopeFactors(Vec<f32>),
}

/// The rows of a GGUF tensor in terms of those of the Hugging Face tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowOrder {
    /// The same rows.
    Same,
    /// The same rows, with the rotated ones of each head in another order.
    Rotated(RotatedRows),
    /// The transpose of the first rows of each head.
    KeyUp(HeadRows),
    /// The last rows of each head.
    ValueUp(HeadRows),
}

/// The rows of a projection to rotated heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RotatedRows {
    /// Rows at the start of each head that are not rotated.
    pub(crate) plain: usize,
    /// Rotated rows of each head; even.
    pub(crate) rotated: usize,
    /// Whether a pair is adjacent in the GGUF file and half of `rotated` apart in the Hugging Face file; otherwise it is the
    /// other way round.
    pub(crate) adjacent_in_gguf: bool,
}

impl RotatedRows {
    /// Rows of a head.
    pub(crate) fn head(&self) -> usize {
        self.plain + self.rotated
    }

    /// The row of the Hugging Face tensor that is row `row` of the GGUF tensor.
    pub(crate) fn hugging_face_row(&self, row: usize) -> usize {
        let (head, within) = (row / self.head(), row % self.head());
        let first = head * self.head() + self.plain;
        match within.checked_sub(self.plain) {
            None => row,
            Some(at) => {
                first + if self.adjacent_in_gguf { apart(at, self.rotated) } else { adjacent(at, self.rotated) }
            }
        }
    }

    /// The row of the GGUF tensor that is row `row` of the Hugging Face tensor.
    pub(crate) fn gguf_row(&self, row: usize) -> usize {
        Self { adjacent_in_gguf: !self.adjacent_in_gguf, ..*self }.hugging_face_row(row)
    }
}

/// The position among pairs half of `rotated` apart, of what is at `at` among adjacent pairs.
fn apart(at: usize, rotated: usize) -> usize {
    at % 2 * (rotated / 2) + at / 2
}

/// The inverse of [`apart`].
fn adjacent(at: usize, rotated: usize) -> usize {
    let half = rotated / 2;
    at % half * 2 + at / half
}

/// The rows of `kv_b_proj`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HeadRows {
    pub(crate) heads: usize,
    /// Rows of the key of a head.
    pub(crate) key: usize,
    /// Rows of the value of a head.
    pub(crate) value: usize,
    /// Width of the latent: values in a row.
    pub(crate) rank: usize,
}

/// All tensors of a model's GGUF file, in the order of the parameters.
///
/// # Errors
///
/// A sentence about what the architecture of llama.cpp cannot express. [`metadata`](super::metadata) has more such checks, so
/// that a file is written only if both succeed.
pub(crate) fn tensors(config: &ModelConfig) -> Result<Vec<GgufTensor>, String> {
    let mut tensors = Vec::new();
    for (index, parameter) in config.parameter_shapes().into_iter().enumerate() {
        tensors.extend(tensors_of(config, index, &parameter)?);
        if parameter.kind == ParameterKind::Embedding {
            tensors.extend(rope_factors(config)?);
        }
    }
    Ok(tensors)
}

/// The tensors of one parameter.
pub(crate) fn tensors_of(
    config: &ModelConfig,
    index: usize,
    parameter: &ParameterShape,
) -> Result<Vec<GgufTensor>, String> {
    let tensor = |name: String, order: RowOrder, shape: Vec<usize>| GgufTensor {
        name,
        shape,
        values: Values::Parameter { index, order },
    };
    if let (AttentionShape::Mla(mla), Some(layer)) = (&config.attention, parameter.layer)
        && parameter.role == Some(ProjectionRole::Attention(AttentionRole::KeyValueUp))
    {
        let rows = head_rows(config, mla);
        let HeadRows { heads, key, value, rank } = rows;
        return Ok(vec![
            tensor(format!("blk.{layer}.attn_k_b.weight"), RowOrder::KeyUp(rows), vec![key, rank, heads]),
            tensor(format!("blk.{layer}.attn_v_b.weight"), RowOrder::ValueUp(rows), vec![rank, value, heads]),
        ]);
    }
    Ok(vec![tensor(name(config, parameter)?, order(config, parameter), shape(parameter))])
}

/// The rows of `kv_b_proj`.
pub(crate) fn head_rows(config: &ModelConfig, mla: &MlaShape) -> HeadRows {
    HeadRows {
        heads: config.num_attention_heads,
        key: mla.qk_nope_head_dim,
        value: mla.v_head_dim,
        rank: mla.kv_lora_rank,
    }
}

/// The shape in the file, the innermost dimension first. A projection is `[in, out]` in Burn's layout, a stack of experts
/// `[experts, in, out]`.
fn shape(parameter: &ParameterShape) -> Vec<usize> {
    match (parameter.kind, parameter.shape.as_slice()) {
        (ParameterKind::Experts, &[experts, input, output]) => vec![input, output, experts],
        (ParameterKind::Embedding, &[vocabulary, hidden]) => vec![hidden, vocabulary],
        (_, shape) => shape.to_vec(),
    }
}

/// The stems of names in a layer: the path in the layer without `.weight` or `.bias`, and GGUF's name.
const LAYER_NAMES: [(&str, &str); 18] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.q_a_proj", "attn_q_a"),
    ("self_attn.q_a_layernorm", "attn_q_a_norm"),
    ("self_attn.q_b_proj", "attn_q_b"),
    ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.router", "ffn_gate_inp"),
    ("mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
    ("mlp.shared_experts.up_proj", "ffn_up_shexp"),
    ("mlp.shared_experts.down_proj", "ffn_down_shexp"),
];

/// GGUF's name of a parameter that is one tensor.
fn name(config: &ModelConfig, parameter: &ParameterShape) -> Result<String, String> {
    let Some(layer) = parameter.layer else {
        return Ok(match parameter.kind {
            ParameterKind::Embedding => "token_embd.weight".into(),
            ParameterKind::Head => "output.weight".into(),
            _ => "output_norm.weight".into(),
        });
    };
    let path = parameter.path_in_layer();
    match parameter.kind {
        ParameterKind::Experts => {
            let (_, projection) = path.rsplit_once('.').unwrap_or(("", path));
            return Ok(format!("blk.{layer}.ffn_{}_exps.weight", projection.trim_end_matches("_proj")));
        }
        // Not `.weight`: llama.cpp looks for this suffix.
        ParameterKind::CorrectionBias => return Ok(format!("blk.{layer}.exp_probs_b.bias")),
        ParameterKind::Bias if Architecture::of(config.model_type) == Architecture::Deepseek2 => {
            return Err(format!("the bias `{}` has no place in the architecture `deepseek2`", parameter.path));
        }
        _ => {}
    }
    let (stem, suffix) = path.rsplit_once('.').unwrap_or((path, "weight"));
    let found = LAYER_NAMES.iter().find(|(ours, _)| *ours == stem);
    let (_, theirs) = found.ok_or_else(|| format!("the parameter `{}` has no name in GGUF", parameter.path))?;
    Ok(format!("blk.{layer}.{theirs}.{suffix}"))
}

/// The order of a parameter's rows.
fn order(config: &ModelConfig, parameter: &ParameterShape) -> RowOrder {
    let Some(ProjectionRole::Attention(role)) = parameter.role else { return RowOrder::Same };
    let adjacent_in_gguf = Architecture::of(config.model_type).rotates_adjacent_pairs();
    if config.rope.interleave == adjacent_in_gguf {
        return RowOrder::Same;
    }
    let (plain, rotated) = match (&config.attention, role) {
        (AttentionShape::Mla(mla), AttentionRole::Query | AttentionRole::QueryUp) => {
            (mla.qk_nope_head_dim, mla.qk_rope_head_dim)
        }
        // The latent, then the one rotated key of all heads.
        (AttentionShape::Mla(mla), AttentionRole::KeyValueDown) => (mla.kv_lora_rank, mla.qk_rope_head_dim),
        (AttentionShape::Gqa(gqa), AttentionRole::Query | AttentionRole::Key) => (0, gqa.head_dim),
        _ => return RowOrder::Same,
    };
    RowOrder::Rotated(RotatedRows { plain, rotated, adjacent_in_gguf })
}

/// The tensor with the divisors of Llama 3.1's frequencies, if the model scales them so.
fn rope_factors(config: &ModelConfig) -> Result<Option<GgufTensor>, String> {
    let Some(RopeScaling::Llama3(llama)) = &config.rope.scaling else { return Ok(None) };
    let architecture = Architecture::of(config.model_type);
    if architecture != Architecture::Llama {
        let name = architecture.as_str();
        return Err(format!("the scaling `llama3` of `rope_scaling` has no place in the architecture `{name}`"));
    }
    let factors = llama3_factors(config.rope.theta, config.rope_dim(), llama);
    Ok(Some(GgufTensor { name: ROPE_FACTORS.into(), shape: vec![factors.len()], values: Values::RopeFactors(factors) }))
}

/// The divisors of the frequencies `theta^(-2i / dim)`, by the formula of Llama 3.1.
pub(crate) fn llama3_factors(theta: f64, dim: usize, llama: &moonlight_model::config::Llama3Config) -> Vec<f32> {
    let context = llama.original_max_position_embeddings as f64;
    (0..dim / 2)
        .map(|i| {
            let frequency = theta.powf(-2.0 * i as f64 / dim as f64);
            let rotations = context * frequency / (2.0 * std::f64::consts::PI);
            let kept = (rotations - llama.low_freq_factor) / (llama.high_freq_factor - llama.low_freq_factor);
            let kept = kept.clamp(0.0, 1.0);
            (1.0 / ((1.0 - kept) / llama.factor + kept)) as f32
        })
        .collect()
}

/// The tensor that other files have for the parameter at `path` in a layer. It is read and never written: `attn_kv_b` (files
/// from before April 2025, the rows of `kv_b_proj`) or `ffn_gate_up_exps` (of each expert the rows of gate, then those of up).
pub(crate) fn alternative(path: &str, layer: usize) -> Option<String> {
    let stem = match path {
        "self_attn.kv_b_proj.weight" => "attn_kv_b",
        "mlp.experts.gate_proj" | "mlp.experts.up_proj" => "ffn_gate_up_exps",
        _ => return None,
    };
    Some(format!("blk.{layer}.{stem}.weight"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_of(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
        tensors(config).unwrap().into_iter().map(|tensor| (tensor.name, tensor.shape)).collect()
    }

    /// The number of tensors of a published GGUF of Moonlight, and shapes of each kind.
    #[test]
    fn moonlight_has_430_tensors() {
        let config = ModelConfig::preset("moonlight-16b-a3b").unwrap();
        let tensors = names_of(&config);
        assert_eq!(tensors.len(), 430);
        for (name, shape) in [
            ("token_embd.weight", vec![2048, 163_840]),
            ("output.weight", vec![2048, 163_840]),
            ("output_norm.weight", vec![2048]),
            ("blk.0.ffn_down.weight", vec![11_264, 2048]),
            ("blk.1.attn_q.weight", vec![2048, 3072]),
            ("blk.1.attn_kv_a_mqa.weight", vec![2048, 576]),
            ("blk.1.attn_k_b.weight", vec![128, 512, 16]),
            ("blk.1.attn_v_b.weight", vec![512, 128, 16]),
            ("blk.1.attn_output.weight", vec![2048, 2048]),
            ("blk.26.ffn_gate_inp.weight", vec![2048, 64]),
            ("blk.26.exp_probs_b.bias", vec![64]),
            ("blk.26.ffn_down_exps.weight", vec![1408, 2048, 64]),
            ("blk.26.ffn_up_shexp.weight", vec![2048, 2816]),
        ] {
            assert!(tensors.contains(&(name.into(), shape)), "{name}");
        }
    }

    #[test]
    fn names_are_unique_and_every_value_is_written_once() {
        for preset in ["moonlight-16b-a3b", "deepseek-v3", "deepseek-v2-lite", "muon-report-400m", "bench-small"] {
            let config = ModelConfig::preset(preset).unwrap();
            let tensors = tensors(&config).unwrap();
            let values: usize = tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
            assert_eq!(values as u64, config.parameter_count().total, "{preset}");
            let mut names: Vec<_> = tensors.iter().map(|tensor| &tensor.name).collect();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), tensors.len(), "{preset}");
        }
    }

    /// The permutation of llama.cpp's converter: `reshape(heads, 2, dim / 2).swapaxes(1, 2)`.
    #[test]
    fn pairs_half_a_head_apart_become_adjacent() {
        let rows = RotatedRows { plain: 0, rotated: 8, adjacent_in_gguf: true };
        let order: Vec<usize> = (0..16).map(|row| rows.hugging_face_row(row)).collect();
        assert_eq!(order, [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]);
        let rows = RotatedRows { plain: 3, rotated: 4, adjacent_in_gguf: true };
        let order: Vec<usize> = (0..14).map(|row| rows.hugging_face_row(row)).collect();
        assert_eq!(order, [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 12, 11, 13]);
        for rows in [rows, RotatedRows { adjacent_in_gguf: false, ..rows }] {
            assert!((0..14).all(|row| rows.gguf_row(rows.hugging_face_row(row)) == row));
        }
    }

    #[test]
    fn rows_are_permuted_only_where_the_orders_differ() {
        let rotated = |preset: &str, interleave: Option<bool>| {
            let mut config = ModelConfig::preset(preset).unwrap();
            config.rope.interleave = interleave.unwrap_or(config.rope.interleave);
            let tensors = tensors(&config).unwrap();
            let is_rotated =
                |tensor: &&GgufTensor| matches!(tensor.values, Values::Parameter { order: RowOrder::Rotated(_), .. });
            let mut names: Vec<String> = tensors.iter().filter(is_rotated).map(|tensor| tensor.name.clone()).collect();
            names.retain(|name| name.starts_with("blk.0."));
            names
        };
        assert!(rotated("moonlight-16b-a3b", None).is_empty());
        assert_eq!(rotated("moonlight-16b-a3b", Some(false)), ["blk.0.attn_q.weight", "blk.0.attn_kv_a_mqa.weight"]);
        assert_eq!(rotated("deepseek-v3", Some(false)), ["blk.0.attn_q_b.weight", "blk.0.attn_kv_a_mqa.weight"]);
        assert_eq!(rotated("muon-report-400m", None), ["blk.0.attn_q.weight", "blk.0.attn_k.weight"]);
        assert!(rotated("muon-report-400m", Some(true)).is_empty());
    }

    #[test]
    fn a_bias_that_deepseek2_does_not_have_is_refused() {
        let mut config = ModelConfig::preset("moonlight-16b-a3b").unwrap();
        let AttentionShape::Mla(mla) = &mut config.attention else { unreachable!() };
        mla.attention_bias = true;
        assert_eq!(
            tensors(&config).unwrap_err(),
            "the bias `layers.0.self_attn.kv_a_proj_with_mqa.bias` has no place in the architecture `deepseek2`"
        );
    }
}
