//! The names of tensors in Hugging Face checkpoints: the only place where one is spelled.
//!
//! A projection lies in the files as `[out, in]` and in our modules as `[in, out]`; routed experts lie one by one in
//! the files (or stacked, as transformers 5 holds them) and stacked in our modules.

use moonlight_model::ModelConfig;
use moonlight_model::config::{ParameterKind, ParameterShape};

/// Where a parameter's values lie in the files; every shape is that of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// One tensor of the same shape.
    Same(String),
    /// One tensor `[out, in]`.
    Transposed(String),
    /// One tensor `[out, in]` for each expert.
    Experts(Vec<String>),
}

/// Why a tensor of a file is not loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Skip {
    /// `rotary_emb.inv_freq`: computed from the configuration; Moonlight's stored ones are stale.
    RotaryFrequencies,
    /// A multi-token-prediction layer, behind the decoder's last.
    NextTokenPrediction,
    /// A vision tower or its projector.
    Vision,
    /// A head beside a configuration that ties it to the embedding.
    TiedHead,
}

impl Skip {
    /// A few words for a report.
    pub fn reason(self) -> &'static str {
        match self {
            Self::RotaryFrequencies => "rotary frequencies, computed from the configuration",
            Self::NextTokenPrediction => "multi-token prediction",
            Self::Vision => "vision tower",
            Self::TiedHead => "head tied to the embedding",
        }
    }
}

const HEAD: &str = "lm_head.weight";
const VISION: [&str; 4] = ["vision_tower.", "vision_model.", "multi_modal_projector.", "mm_projector."];

/// Where a parameter's values lie in the files.
pub(crate) fn place(parameter: &ParameterShape) -> Place {
    let name = file_name(&parameter.path);
    match parameter.kind {
        ParameterKind::Embedding | ParameterKind::Norm | ParameterKind::Bias | ParameterKind::CorrectionBias => {
            Place::Same(name)
        }
        ParameterKind::Matrix | ParameterKind::Head | ParameterKind::Router => Place::Transposed(name),
        ParameterKind::Experts => {
            let (block, projection) = name.rsplit_once('.').expect("a parameter's path has several parts");
            let experts = 0..parameter.shape[0];
            Place::Experts(experts.map(|expert| format!("{block}.{expert}.{projection}.weight")).collect())
        }
    }
}

/// The stacked tensor of transformers 5 that holds an expert parameter, and the rows of each expert's matrix in it:
/// `experts.gate_up_proj` is `[experts, 2 width, hidden]`, gate first; `experts.down_proj` is `[experts, hidden, width]`.
pub(crate) struct Stacked {
    pub(crate) name: String,
    /// `[experts, rows, columns]`.
    pub(crate) shape: [usize; 3],
    /// The rows that are the parameter's.
    pub(crate) rows: std::ops::Range<usize>,
}

/// See [`Stacked`]; the parameter is one of kind [`ParameterKind::Experts`].
pub(crate) fn stacked(parameter: &ParameterShape) -> Stacked {
    let name = file_name(&parameter.path);
    let (block, projection) = name.rsplit_once('.').expect("a parameter's path has several parts");
    let [experts, input, output] = parameter.shape[..] else { unreachable!("experts are stacked in three dimensions") };
    match projection {
        "gate_proj" | "up_proj" => {
            let first = if projection == "gate_proj" { 0 } else { output };
            Stacked {
                name: format!("{block}.gate_up_proj"),
                shape: [experts, 2 * output, input],
                rows: first..first + output,
            }
        }
        _ => Stacked { name: name.clone(), shape: [experts, output, input], rows: 0..output },
    }
}

/// `layers.1.mlp.router.weight` to `model.layers.1.mlp.gate.weight`.
fn file_name(path: &str) -> String {
    if path == HEAD {
        return HEAD.to_owned();
    }
    format!("model.{}", path.replace(".mlp.router.", ".mlp.gate."))
}

/// A name without the prefixes that wrappers put before it: `language_model.` with or without `model.` behind it.
pub(crate) fn canonical(name: &str) -> String {
    let Some(inner) = name.strip_prefix("language_model.") else { return name.to_owned() };
    if inner.starts_with("model.") || inner == HEAD { inner.to_owned() } else { format!("model.{inner}") }
}

/// Why a tensor that is not the model's may be passed over; `None` where it may not. The name is canonical.
pub(crate) fn skip(name: &str, config: &ModelConfig) -> Option<Skip> {
    if name.ends_with(".rotary_emb.inv_freq") {
        return Some(Skip::RotaryFrequencies);
    }
    if VISION.iter().any(|prefix| name.starts_with(prefix)) {
        return Some(Skip::Vision);
    }
    if name == HEAD && config.tie_word_embeddings {
        return Some(Skip::TiedHead);
    }
    let layer: usize = name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()?;
    (layer >= config.num_hidden_layers).then_some(Skip::NextTokenPrediction)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moonlight_has_the_published_names_shapes_and_bytes() {
        let config = ModelConfig::preset("moonlight-16b-a3b-instruct").unwrap();
        let mut names = Vec::new();
        let mut values = 0;
        for parameter in config.parameter_shapes() {
            values += parameter.count();
            match place(&parameter) {
                Place::Same(name) | Place::Transposed(name) => names.push(name),
                Place::Experts(experts) => names.extend(experts),
            }
        }
        // The files hold 27 stale `inv_freq` of 64 values beside the parameters, everything in BF16.
        assert_eq!(names.len() + 27, 5344);
        assert_eq!(2 * (values + 27 * 64), 31_920_223_872);
        for name in [
            "model.embed_tokens.weight",
            "model.layers.0.mlp.gate_proj.weight",
            "model.layers.13.self_attn.kv_a_proj_with_mqa.weight",
            "model.layers.26.mlp.gate.weight",
            "model.layers.26.mlp.gate.e_score_correction_bias",
            "model.layers.1.mlp.experts.63.down_proj.weight",
            "model.layers.1.mlp.shared_experts.up_proj.weight",
            "model.norm.weight",
            "lm_head.weight",
        ] {
            assert!(names.iter().any(|candidate| candidate == name), "{name}");
        }
    }

    #[test]
    fn wrappers_prefixes_are_taken_off() {
        for (name, expected) in [
            ("model.norm.weight", "model.norm.weight"),
            ("language_model.model.norm.weight", "model.norm.weight"),
            ("language_model.norm.weight", "model.norm.weight"),
            ("language_model.lm_head.weight", "lm_head.weight"),
            ("vision_tower.blocks.0.weight", "vision_tower.blocks.0.weight"),
        ] {
            assert_eq!(canonical(name), expected);
        }
    }

    #[test]
    fn what_may_be_passed_over_says_why() {
        let mut config = ModelConfig::preset("moonlight-16b-a3b").unwrap();
        let why = |name: &str, config: &ModelConfig| skip(name, config);
        assert_eq!(why("model.layers.3.self_attn.rotary_emb.inv_freq", &config), Some(Skip::RotaryFrequencies));
        assert_eq!(why("model.layers.27.enorm.weight", &config), Some(Skip::NextTokenPrediction));
        assert_eq!(why("model.layers.26.enorm.weight", &config), None);
        assert_eq!(why("multi_modal_projector.linear_1.weight", &config), Some(Skip::Vision));
        assert_eq!(why("lm_head.weight", &config), None);
        config.tie_word_embeddings = true;
        assert_eq!(why("lm_head.weight", &config), Some(Skip::TiedHead));
    }
}
