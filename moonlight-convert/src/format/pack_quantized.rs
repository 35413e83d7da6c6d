//! The layout `pack-quantized` of compressed-tensors, in which Kimi-K2-Thinking is published: for a projection `weight`
//! `[out, in]` the tensors `weight_packed` (integers without sign in 32-bit words, the lowest bits first), `weight_scale` (one
//! for each group of a row) and `weight_shape`. vLLM, SGLang and transformers open it.

use moonlight_model::config::{ParameterKind, ParameterShape};
use moonlight_simd::quant::{BLOCK, Bits};
use serde_json::{Value, json};

use crate::dtype::conversion::WeightDtype;
use crate::dtype::quant::{bit_count, values_per_word};
use crate::io::writer::{OutDtype, OutTensor};
use crate::mapping::names::{self, HfTensor};

/// The version of compressed-tensors whose layout this is.
const VERSION: &str = "0.12.2";

/// Whether a parameter is quantized: a projection of a layer, also of its experts. Embedding, head, router and norms are not.
pub(crate) fn is_quantized(parameter: &ParameterShape) -> bool {
    matches!(parameter.kind, ParameterKind::Matrix | ParameterKind::Experts)
}

/// Whether the groups fill the rows of a matrix `[out, in]`. compressed-tensors and vLLM require it.
pub(crate) fn has_whole_groups(shape: &[usize]) -> bool {
    matches!(*shape, [_, columns] if columns > 0 && columns % BLOCK == 0)
}

/// The dtype of the scales of a model with this dtype. bf16 for f32, too: vLLM and transformers convert them to the dtype in
/// which they compute.
pub(crate) fn scale_dtype(dtype: WeightDtype) -> WeightDtype {
    match dtype {
        WeightDtype::F16 => WeightDtype::F16,
        WeightDtype::Bf16 | WeightDtype::F32 => WeightDtype::Bf16,
    }
}

/// The tensors of a matrix `[out, in]` with [whole groups](has_whole_groups): values, scales, shape.
pub(crate) fn tensors(tensor: &HfTensor, bits: Bits, scale: WeightDtype) -> [OutTensor; 3] {
    let &[rows, columns] = tensor.shape.as_slice() else { panic!("`{}` is not a matrix", tensor.name) };
    let names = names::packed_names(&tensor.name);
    let words = columns.div_ceil(values_per_word(bits));
    [
        OutTensor { name: names.values, dtype: OutDtype::I32, shape: vec![rows, words] },
        OutTensor { name: names.scale, dtype: scale.into(), shape: vec![rows, columns / BLOCK] },
        OutTensor { name: names.shape, dtype: OutDtype::I64, shape: vec![2] },
    ]
}

/// The name of the module that has a weight.
pub(crate) fn module_of(weight: &str) -> &str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

/// The `quantization_config`. `unquantized` are modules of the layers that are not quantized, routers excepted.
///
/// `targets` are the linear modules, so that embedding and norms are not among them. The head is one. So is the router in the
/// published code of the family, while in transformers and vLLM it has a class of its own, or is never quantized.
pub(crate) fn quantization_config(bits: Bits, unquantized: &[String]) -> Value {
    let mut ignore = vec!["lm_head".to_owned(), "re:.*mlp\\.gate$".to_owned()];
    ignore.extend_from_slice(unquantized);
    json!({
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "input_activations": null,
                "output_activations": null,
                "targets": ["Linear"],
                "weights": {
                    "actorder": null,
                    "block_structure": null,
                    "dynamic": false,
                    "group_size": BLOCK,
                    "num_bits": bit_count(bits),
                    "observer": "minmax",
                    "observer_kwargs": {},
                    "strategy": "group",
                    "symmetric": true,
                    "type": "int",
                },
            },
        },
        "format": "pack-quantized",
        "global_compression_ratio": null,
        "ignore": ignore,
        "kv_cache_scheme": null,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    })
}

/// A tensor of a checkpoint as [`convert_quantized`](crate::Checkpoint::convert_quantized) writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenTensor {
    /// Its name in the file.
    pub name: String,
    /// Its dtype in the file.
    pub dtype: safetensors::Dtype,
    /// Its shape in the file.
    pub shape: Vec<usize>,
}

/// The tensors of a parameter, and the `quantization_config` of a model, as
/// [`convert_quantized`](crate::Checkpoint::convert_quantized) writes them for a bf16 model all of whose matrices have whole
/// groups. For programs that write such files themselves.
///
/// # Panics
///
/// If rows of a matrix are not a multiple of 32 values.
pub fn written_tensors(parameter: &ParameterShape, bits: Bits) -> Vec<WrittenTensor> {
    let written =
        |OutTensor { name, dtype, shape }| WrittenTensor { name, dtype: OutDtype::to_safetensors(dtype), shape };
    let plain = |tensor: HfTensor| OutTensor {
        name: tensor.name,
        dtype: match parameter.kind {
            ParameterKind::CorrectionBias => WeightDtype::F32.into(),
            _ => WeightDtype::Bf16.into(),
        },
        shape: tensor.shape,
    };
    let tensors = names::hugging_face_tensors(parameter);
    if !is_quantized(parameter) {
        return tensors.into_iter().map(|tensor| written(plain(tensor))).collect();
    }
    let packed = |tensor: &HfTensor| {
        assert!(has_whole_groups(&tensor.shape), "`{}` has rows of whole groups", tensor.name);
        self::tensors(tensor, bits, WeightDtype::Bf16).map(written)
    };
    tensors.iter().flat_map(packed).collect()
}

/// The `quantization_config` of a model all of whose matrices are quantized; see [`written_tensors`].
pub fn written_config(bits: Bits) -> Value {
    quantization_config(bits, &[])
}
