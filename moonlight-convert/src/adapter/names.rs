//! Names of peft's, and which of them an adapter of ours goes by. No other file spells one.
//!
//! | adapter of | file, each with `.lora_A.weight` and `.lora_B.weight` behind it |
//! |---|---|
//! | `layers.L.self_attn.q_proj`, dense and shared MLPs | `base_model.model.model.layers.L.self_attn.q_proj` |
//! | `layers.L.mlp.experts.gate_proj` and `up_proj` | `….mlp.experts.base_layer`, or `….mlp.experts` without the next |
//! | `layers.L.mlp.experts.down_proj` | `….mlp.experts` |
//! | the same three, as transformers 4 and vLLM name them (read only) | `….mlp.experts.E.gate_proj` and so on |
//!
//! transformers 5 keeps a layer's experts in two parameters, `gate_up_proj` and `down_proj`, and peft wraps one around the
//! other; the inner one is the `base_layer`.

/// What stands before every module.
const PREFIX: &str = "base_model.model.";
const MODEL: &str = "model.";
pub(super) const GATE_UP: &str = "gate_up_proj";

/// Which of an adapter's two matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    A,
    B,
}

/// A tensor's module below the decoder (`layers.3.mlp.experts.base_layer`), and which matrix it is; `None` for any other
/// tensor.
pub(super) fn parse(tensor: &str) -> Option<(&str, Part)> {
    let name = tensor.strip_prefix(PREFIX).unwrap_or(tensor);
    let name = name.strip_suffix(".weight")?;
    let name = name.strip_suffix(".default").unwrap_or(name);
    let (module, part) = match name.strip_suffix(".lora_A") {
        Some(module) => (module, Part::A),
        None => (name.strip_suffix(".lora_B")?, Part::B),
    };
    Some((crate::mapping::names::key(module), part))
}

/// The two tensors of a module below the decoder.
pub(super) fn tensors(module: &str) -> [String; 2] {
    ["A", "B"].map(|part| format!("{PREFIX}{MODEL}{module}.lora_{part}.weight"))
}

/// The module as transformers names it.
pub(super) fn full(module: &str) -> String {
    format!("{MODEL}{module}")
}

/// The names under which peft's configuration may know a projection: the module, and its weight as a parameter.
pub(super) fn names_of(path: &str) -> Vec<String> {
    vec![full(path), format!("{}.weight", full(path))]
}

/// `layers.3.mlp.experts` and `7`, `gate_proj` of `layers.3.mlp.experts.7.gate_proj`.
pub(super) fn single_expert(module: &str) -> Option<(&str, usize, &str)> {
    let (front, projection) = module.rsplit_once('.')?;
    let (stack, expert) = front.rsplit_once('.')?;
    stack.ends_with(".experts").then_some(())?;
    Some((stack, expert.parse().ok()?, projection))
}

/// `layers.3.mlp.experts` and whether it is the inner of two, of the names that a stack may have.
pub(super) fn whole_stack(module: &str) -> Option<(&str, bool)> {
    if module.ends_with(".experts") {
        return Some((module, false));
    }
    module.strip_suffix(".base_layer").filter(|stack| stack.ends_with(".experts")).map(|stack| (stack, true))
}
