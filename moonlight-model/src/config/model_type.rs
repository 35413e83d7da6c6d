//! The published model classes.

/// The published model class of a config (`model_type` in `config.json`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(rename_all = "snake_case"))]
pub enum ModelType {
    /// DeepSeek-V3, Moonlight, Kimi-VL's language model.
    DeepseekV3,
    /// DeepSeek-V2 and V2-Lite.
    DeepseekV2,
    /// Kimi-K2: DeepSeek-V3 under its own name.
    KimiK2,
    /// Llama: grouped-query attention, by default without biases.
    Llama,
    /// Qwen2: grouped-query attention, biases on query, key and value.
    Qwen2,
}

/// The names that are supported, wrappers included.
pub(super) const KNOWN_MODEL_TYPES: &str = "deepseek_v3, deepseek_v2, kimi_k2, kimi_k25, kimi_vl, llama, qwen2";

/// Each class with its `model_type` and the class name by which transformers and vLLM find the implementation.
const CLASSES: [(ModelType, &str, &str); 5] = [
    (ModelType::DeepseekV3, "deepseek_v3", "DeepseekV3ForCausalLM"),
    (ModelType::DeepseekV2, "deepseek_v2", "DeepseekV2ForCausalLM"),
    (ModelType::KimiK2, "kimi_k2", "DeepseekV3ForCausalLM"),
    (ModelType::Llama, "llama", "LlamaForCausalLM"),
    (ModelType::Qwen2, "qwen2", "Qwen2ForCausalLM"),
];

impl ModelType {
    /// The class with this `model_type`; `None` if it is not supported.
    pub fn from_name(name: &str) -> Option<Self> {
        CLASSES.iter().find(|(_, known, _)| *known == name).map(|(class, ..)| *class)
    }

    /// The name in `config.json`.
    pub fn as_str(self) -> &'static str {
        self.names().0
    }

    /// The class name in transformers and vLLM (`architectures` in `config.json`).
    pub fn architecture(self) -> &'static str {
        self.names().1
    }

    /// Whether models of the class may have experts.
    pub(crate) fn may_have_experts(self) -> bool {
        matches!(self, Self::DeepseekV3 | Self::DeepseekV2 | Self::KimiK2)
    }

    fn names(self) -> (&'static str, &'static str) {
        let class = CLASSES.iter().find(|(class, ..)| *class == self);
        let (_, name, architecture) = class.expect("every class is in the table");
        (name, architecture)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_is_read_and_written_by_the_same_name() {
        for (class, name, architecture) in CLASSES {
            assert_eq!((class.as_str(), class.architecture()), (name, architecture));
            assert_eq!(ModelType::from_name(name), Some(class));
            assert!(KNOWN_MODEL_TYPES.split(", ").any(|known| known == name), "{name}");
        }
        assert_eq!(ModelType::from_name("gpt2"), None);
    }
}
