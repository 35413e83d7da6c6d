//! Why a recipe is refused.

use std::path::PathBuf;

use moonlight_model::ConfigError;

/// A recipe that cannot be read, or that asks for something impossible.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RecipeError {
    /// The file cannot be read.
    #[error("the recipe `{}` cannot be read: {problem}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's message.
        problem: String,
    },
    /// The file, or the value of a `--set`, is not TOML.
    #[error("{place}: {problem}")]
    Syntax {
        /// File and line, or the `--set`.
        place: String,
        /// The parser's message.
        problem: String,
    },
    /// A key that recipes do not have.
    #[error("{place}: unknown key `{key}`{}", nearest.as_ref().map(|key| format!(" (the nearest known key is `{key}`)")).unwrap_or_default())]
    UnknownKey {
        /// File and line, or the `--set`.
        place: String,
        /// The key with its section.
        key: String,
        /// The known key with the most similar spelling.
        nearest: Option<String>,
        /// Every key of the section.
        known: Vec<String>,
    },
    /// A required key that is absent.
    #[error("{place}: the recipe lacks `{key}`")]
    Missing {
        /// The file.
        place: String,
        /// The key with its section.
        key: String,
        /// What to write; may be empty.
        hint: String,
    },
    /// A value of the wrong type, or an impossible one.
    #[error("{place}: `{key}` {problem}")]
    Invalid {
        /// File and line, or the `--set`.
        place: String,
        /// The key with its section.
        key: String,
        /// What is wrong, as the rest of a sentence that starts with the key.
        problem: String,
        /// What to write instead.
        hint: Option<String>,
    },
    /// An invalid shape in `[model]`.
    #[error("{place}: [model]: {source}")]
    Model {
        /// File and line of the section.
        place: String,
        /// What is wrong with it.
        source: ConfigError,
    },
}

impl RecipeError {
    /// What to do about the error, if that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownKey { known, .. } if !known.is_empty() => {
                Some(format!("use one of the known keys: {}", known.join(", ")))
            }
            Self::Missing { hint, .. } => Some(hint.clone()).filter(|hint| !hint.is_empty()),
            Self::Invalid { hint, .. } => hint.clone(),
            Self::Model { source, .. } => source.hint().map(str::to_owned),
            Self::Read { .. } => Some("use one of the recipes in `configs/` of the source, or write one".into()),
            _ => None,
        }
    }
}
