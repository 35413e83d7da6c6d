//! What can be wrong with a configuration.

use std::fmt;

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
    /// A key that shapes what a model computes, with a value that is not followed here.
    #[error("the model configuration's `{key}` {problem}")]
    Unsupported {
        /// The key's name in `config.json`.
        key: String,
        /// What is wrong, as the rest of a sentence.
        problem: String,
        /// How to go on, where there is a way.
        hint: Option<&'static str>,
    },
    /// Keys that are not known, and so may shape what the model computes.
    #[error("the model configuration has {}", Unknown(keys))]
    Unknown {
        /// Their names.
        keys: Vec<String>,
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
    /// What to do about it, where we know.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Unsupported { hint, .. } => *hint,
            Self::Unknown { .. } => Some(
                "a key that is not known may shape what the model computes; if it changes nothing, remove it from config.json",
            ),
            _ => None,
        }
    }

    pub(super) fn file(path: &std::path::Path, action: &'static str, error: &std::io::Error) -> Self {
        Self::File { path: path.display().to_string(), action, problem: error.to_string() }
    }
}
