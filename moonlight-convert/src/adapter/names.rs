//! Tensor and module names of peft. No other file spells one.
//!
//! | what | name in the file, after `base_model.model.model.` |
//! |---|---|
//! | adapter of `layers.L.self_attn.q_proj`, dense and shared MLPs | `layers.L.self_attn.q_proj.lora_A.weight` and `.lora_B.weight` |
//! | of `layers.L.mlp.router` | `layers.L.mlp.gate`, both |
//! | of `layers.L.mlp.experts.gate_proj` and `up_proj` | `….mlp.experts.base_layer`, or `….mlp.experts` without an adapter of `down_proj`, both |
//! | of `layers.L.mlp.experts.down_proj` | `….mlp.experts`, both |
//! | of the same three, as named by transformers 4 and vLLM (read only) | `….mlp.experts.E.gate_proj` and so on, both |
//! | of the head | `lm_head` (after `base_model.model.`), both |
//! | of the embedding | `embed_tokens.lora_embedding_A` and `.lora_embedding_B` |
//! | DoRA's magnitudes | `….lora_magnitude_vector` |
//! | single trained rows of the embedding | `embed_tokens.token_adapter.trainable_tokens_delta` |
//! | fully trained weights, norms and biases | their own names, without `.base_layer` |
//!
//! transformers 5 stores a layer's experts in two parameters, `gate_up_proj` and `down_proj`, and peft wraps one around
//! the other; the inner one is the `base_layer`.

use crate::mapping::names::key;

/// The prefix of every module.
const PREFIX: &str = "base_model.model.";
const MODEL: &str = "model.";
pub(super) const GATE_UP: &str = "gate_up_proj";
pub(super) const EMBEDDING: &str = "embed_tokens";
pub(super) const HEAD: &str = "lm_head";
/// The router: in the module, and in checkpoints.
const ROUTER: (&str, &str) = (".mlp.router", ".mlp.gate");

/// The role of a tensor in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TensorRole {
    /// `[rank, in]`.
    A,
    /// `[out, rank]`.
    B,
    /// `[rank, vocab]`.
    EmbeddingA,
    /// `[hidden, rank]`.
    EmbeddingB,
    /// DoRA's magnitudes, `[out]`.
    Magnitude,
    /// `[tokens, hidden]`.
    TrainedTokens,
    /// A tensor of the model itself, fully trained.
    FullWeight,
}

/// A tensor's module below the decoder (`layers.3.mlp.experts.base_layer`) and its role. For
/// [`TensorRole::FullWeight`], the name of the checkpoint's tensor instead of the module.
pub(super) fn parse(tensor: &str) -> (String, TensorRole) {
    let name = tensor.strip_prefix(PREFIX).unwrap_or(tensor);
    let bare = name.strip_suffix(".weight").unwrap_or(name);
    // peft's names in memory contain that of the adapter, `default`; most saved files do not.
    let bare = bare.strip_suffix(".default").unwrap_or(bare);
    let suffixes = [
        (".lora_A", TensorRole::A),
        (".lora_B", TensorRole::B),
        (".lora_embedding_A", TensorRole::EmbeddingA),
        (".lora_embedding_B", TensorRole::EmbeddingB),
        (".lora_magnitude_vector", TensorRole::Magnitude),
        (".token_adapter.trainable_tokens_delta", TensorRole::TrainedTokens),
        (".trainable_tokens_delta", TensorRole::TrainedTokens),
    ];
    match suffixes.iter().find_map(|(suffix, role)| Some((bare.strip_suffix(suffix)?, *role))) {
        Some((module, role)) => (module_path(key(module)), role),
        None => {
            // peft's wrappers, which are not in the names of a checkpoint.
            let name = [".base_layer", ".token_adapter", ".modules_to_save.default", ".original_module"]
                .iter()
                .fold(name.to_owned(), |name, wrapper| name.replace(&format!("{wrapper}."), "."));
            (key(&name).to_owned(), TensorRole::FullWeight)
        }
    }
}

/// The module path for a name in the file.
fn module_path(module: &str) -> String {
    match module.strip_suffix(ROUTER.1) {
        Some(layer) => format!("{layer}{}", ROUTER.0),
        None => module.to_owned(),
    }
}

/// The name in the file for a module path.
pub(super) fn peft_module(module: &str) -> String {
    match module.strip_suffix(ROUTER.0) {
        Some(layer) => format!("{layer}{}", ROUTER.1),
        None => module.to_owned(),
    }
}

/// The names of `A` and `B` of a module below the decoder.
pub(super) fn tensor_names(module: &str) -> [String; 2] {
    let module = peft_module(module);
    ["A", "B"].map(|matrix| format!("{PREFIX}{MODEL}{module}.lora_{matrix}.weight"))
}

/// The name of a module in transformers.
pub(super) fn transformers_name(module: &str) -> String {
    if module == HEAD { HEAD.into() } else { format!("{MODEL}{}", peft_module(module)) }
}

/// The name of a module's weight in peft's lists of parameters, without `model.`.
pub(super) fn as_parameter(module: &str) -> String {
    format!("{}.weight", peft_module(module))
}

/// The possible names of a projection in peft's config: the module, and its weight as a parameter.
pub(super) fn names_of(path: &str) -> Vec<String> {
    vec![transformers_name(path), format!("{}.weight", transformers_name(path))]
}

/// Splits `layers.3.mlp.experts.7.gate_proj` into `layers.3.mlp.experts`, 7 and `gate_proj`.
pub(super) fn parse_expert(module: &str) -> Option<(&str, usize, &str)> {
    let (front, projection) = module.rsplit_once('.')?;
    let (stack, expert) = front.rsplit_once('.')?;
    stack.ends_with(".experts").then_some(())?;
    Some((stack, expert.parse().ok()?, projection))
}

/// Splits the name of a stack's adapter into `layers.3.mlp.experts` and whether it is the inner of two.
pub(super) fn parse_stack(module: &str) -> Option<(&str, bool)> {
    if module.ends_with(".experts") {
        return Some((module, false));
    }
    module.strip_suffix(".base_layer").filter(|stack| stack.ends_with(".experts")).map(|stack| (stack, true))
}
