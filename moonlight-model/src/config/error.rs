//! [`ConfigError`]: why a config is refused.

use std::fmt;

use super::model_type::KNOWN_MODEL_TYPES;

/// The names of [`ModelConfig::preset`](super::ModelConfig::preset).
pub const PRESETS: &[&str] = &[
    "moonlight-16b-a3b",
    "moonlight-16b-a3b-instruct",
    "deepseek-v3",
    "deepseek-v2-lite",
    "muon-report-400m",
    "bench-small",
];

/// A config cannot be read, is impossible or is not supported.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The text is not a JSON object.
    #[error("the model config cannot be read: {0}")]
    Json(String),
    /// A required key is absent.
    #[error("the model config lacks `{field}`")]
    Missing {
        /// The key's name in `config.json`.
        field: &'static str,
    },
    /// A value has the wrong type, or is impossible by itself or with another.
    #[error("the model config's `{field}` {problem}")]
    Invalid {
        /// The key's name in `config.json`.
        field: &'static str,
        /// What is wrong, as the rest of a sentence.
        problem: String,
    },
    /// A key changes what the model computes in a way that is not supported.
    #[error("the model config's `{key}` {problem}")]
    Unsupported {
        /// The key's name in `config.json`.
        key: String,
        /// What is wrong, as the rest of a sentence.
        problem: String,
        /// What to do, if there is a way.
        hint: Option<&'static str>,
    },
    /// Keys are unknown, and so may change what the model computes.
    #[error("the model config has {}", Unknown(keys))]
    Unknown {
        /// Their names.
        keys: Vec<String>,
    },
    /// The `model_type` is not supported.
    #[error("the `model_type` `{0}` is not supported (supported: {KNOWN_MODEL_TYPES})")]
    UnknownModelType(String),
    /// The preset does not exist.
    #[error("there is no model preset `{0}` (presets: {known})", known = PRESETS.join(", "))]
    UnknownPreset(String),
    /// A file cannot be read or written.
    #[error("the model config `{path}` cannot be {action}: {problem}")]
    File {
        /// The file.
        path: String,
        /// `read` or `written`.
        action: &'static str,
        /// The system's error.
        problem: String,
    },
}

/// `the unknown key `a``, or `the unknown keys `a`, `b` and 3 more`.
struct Unknown<'a>(&'a [String]);

impl fmt::Display for Unknown<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MAX_NAMES: usize = 8;
        const MAX_CHARS: usize = 64;
        let name = |key: &String| format!("`{}`", key.chars().take(MAX_CHARS).collect::<String>());
        let names: Vec<String> = self.0.iter().take(MAX_NAMES).map(name).collect();
        let keys = if self.0.len() == 1 { "key" } else { "keys" };
        write!(formatter, "the unknown {keys} {}", names.join(", "))?;
        match self.0.len().saturating_sub(MAX_NAMES) {
            0 => Ok(()),
            more => write!(formatter, " and {more} more"),
        }
    }
}

impl ConfigError {
    /// What to do about it, if that is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Unsupported { hint, .. } => *hint,
            Self::Unknown { .. } => {
                Some("an unknown key may change what the model computes; if it does not, remove it from config.json")
            }
            _ => None,
        }
    }

    pub(super) fn file(path: &std::path::Path, action: &'static str, error: &std::io::Error) -> Self {
        Self::File { path: path.display().to_string(), action, problem: error.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An example of every variant; the `match` makes the compiler ask for the next one.
    fn examples() -> Vec<ConfigError> {
        let invalid = |field, problem: &str| ConfigError::Invalid { field, problem: problem.into() };
        let unsupported = |key: &str, problem: &str, hint| ConfigError::Unsupported {
            key: key.into(),
            problem: problem.into(),
            hint,
        };
        let examples = vec![
            ConfigError::Json("not a JSON object".into()),
            ConfigError::Missing { field: "kv_lora_rank" },
            invalid("hidden_size", "must be a whole number, not \"wide\""),
            unsupported("hidden_act", "is `gelu`, but only `silu` is supported", None),
            unsupported(
                "use_qk_norm",
                "is true: norms of queries and keys are not supported",
                Some(super::super::other_keys::REMOVE_HINT),
            ),
            ConfigError::Unknown { keys: vec!["mixer".into()] },
            ConfigError::Unknown { keys: (0..10).map(|at| format!("key_{at}")).collect() },
            ConfigError::UnknownModelType("gpt2".into()),
            ConfigError::UnknownPreset("moonlight".into()),
            ConfigError::file(std::path::Path::new("config.json"), "read", &std::io::Error::other("permission denied")),
        ];
        for example in &examples {
            match example {
                ConfigError::Json(_)
                | ConfigError::Missing { .. }
                | ConfigError::Invalid { .. }
                | ConfigError::Unsupported { .. }
                | ConfigError::Unknown { .. }
                | ConfigError::UnknownModelType(_)
                | ConfigError::UnknownPreset(_)
                | ConfigError::File { .. } => {}
            }
        }
        examples
    }

    #[test]
    fn messages() {
        let lines = examples().into_iter().map(|error| {
            let hint = error.hint().map_or(String::new(), |hint| format!("hint: {hint}\n"));
            format!("error: {error}\n{hint}")
        });
        insta::assert_snapshot!(lines.collect::<Vec<_>>().join("\n"));
    }

    /// Errors of the variants `Invalid` and `Unsupported`, whose problems are phrased where they are found.
    #[test]
    fn messages_of_refused_files() {
        use serde_json::json;

        let base = crate::ModelConfig::preset("bench-small").unwrap().to_value();
        let llama = json!({"model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64});
        let qwen2 = json!({"model_type": "qwen2", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64});
        let cases = [
            (&base, json!({"qk_rope_head_dim": 63})),
            (&base, json!({"num_experts_per_tok": 40})),
            (&base, json!({"n_group": 5})),
            (&base, json!({"topk_method": "random"})),
            (&base, json!({"num_key_value_heads": 2})),
            (&base, json!({"head_dim": 80})),
            (&base, json!({"num_hidden_layers": 1_000_000})),
            (&llama, json!({"rope_scaling": {"type": "longrope"}})),
            (&llama, json!({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 3}})),
            (&llama, json!({"sliding_window": 16})),
            (&llama, json!({"kv_lora_rank": 512})),
            (&llama, json!({"architectures": ["LlamaForSequenceClassification"]})),
            (&llama, json!({"rope_interleaved": true})),
            (&llama, json!({"eos_token_id": 97})),
            (&qwen2, json!({"layer_types": ["sliding_attention", "full_attention"]})),
            (&json!({"model_type": "llava"}), json!({"text_config": llama})),
            (&json!({"model_type": "kimi_vl", "vocab_size": 98}), json!({"text_config": llama})),
        ];
        let lines = cases.map(|(base, change)| {
            let mut value = base.clone();
            value.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            let error = crate::ModelConfig::from_value(value).unwrap_err();
            let hint = error.hint().map_or(String::new(), |hint| format!("hint: {hint}\n"));
            format!("error: {error}\n{hint}")
        });
        insta::assert_snapshot!(lines.join("\n"));
    }
}
