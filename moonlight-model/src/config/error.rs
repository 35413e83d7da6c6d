//! What can be wrong with a configuration.

use super::model_type::KNOWN_MODEL_TYPES;

/// The names that [`ModelConfig::preset`](super::ModelConfig::preset) knows.
pub const PRESETS: &[&str] = &[
    "moonlight-16b-a3b",
    "moonlight-16b-a3b-instruct",
    "deepseek-v3",
    "deepseek-v2-lite",
    "muon-report-400m",
    "bench-small",
];

/// A configuration that cannot be a model, or text that is not a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The text is not JSON, or a value has the wrong type.
    #[error("the model configuration cannot be read: {0}")]
    Json(String),
    /// A key that the model cannot do without is absent.
    #[error("the model configuration lacks `{field}`")]
    Missing {
        /// The key's name in `config.json`.
        field: &'static str,
    },
    /// A value is impossible, by itself or beside another.
    #[error("the model configuration's `{field}` {problem}")]
    Invalid {
        /// The key's name in `config.json`.
        field: &'static str,
        /// What is wrong, as the rest of a sentence.
        problem: String,
    },
    /// The `model_type` is not one of the family.
    #[error("`model_type` `{0}` is not supported (known: {KNOWN_MODEL_TYPES})")]
    UnknownModelType(String),
    /// A preset that does not exist.
    #[error("there is no model preset `{0}` (known: {known})", known = PRESETS.join(", "))]
    UnknownPreset(String),
    /// A file that cannot be read or written.
    #[error("the model configuration `{path}` cannot be {action}: {problem}")]
    File {
        /// The file.
        path: String,
        /// `read` or `written`.
        action: &'static str,
        /// What the system says.
        problem: String,
    },
}

impl ConfigError {
    pub(super) fn file(path: &std::path::Path, action: &'static str, error: &std::io::Error) -> Self {
        Self::File { path: path.display().to_string(), action, problem: error.to_string() }
    }
}
