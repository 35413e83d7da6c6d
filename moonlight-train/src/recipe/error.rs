//! What can be wrong with a recipe.

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
        /// What the operating system said.
        problem: String,
    },
    /// The file, or the value of a `--set`, is not TOML.
    #[error("{place}: {problem}")]
    Syntax {
        /// File and line, or the `--set`.
        place: String,
        /// What the parser said.
        problem: String,
    },
    /// A key that nothing reads.
    #[error("{place}: unknown key `{key}`{}", nearest.as_ref().map(|key| format!(" (the nearest known key is `{key}`)")).unwrap_or_default())]
    UnknownKey {
        /// File and line, or the `--set`.
        place: String,
        /// The key with its section.
        key: String,
        /// The known key that is spelled most like it.
        nearest: Option<String>,
        /// Every key that the section knows.
        known: Vec<String>,
    },
    /// A key without which there is no run.
    #[error("{place}: the recipe lacks `{key}`")]
    Missing {
        /// The file.
        place: String,
        /// The key with its section.
        key: String,
        /// What it is for; may be empty.
        hint: String,
    },
    /// A value of the wrong type, or an impossible one.
    #[error("{place}: `{key}` {problem}")]
    Invalid {
        /// File and line, or the `--set`.
        place: String,
        /// The key with its section.
        key: String,
        /// What is wrong, as the rest of a sentence.
        problem: String,
        /// How to correct it.
        hint: Option<String>,
    },
    /// The shape under `[model]` is not one.
    #[error("{place}: [model]: {source}")]
    Model {
        /// File and line of the section.
        place: String,
        /// What the model's configuration said.
        source: ConfigError,
    },
}

impl RecipeError {
    /// How to correct it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownKey { known, .. } if !known.is_empty() => Some(format!("known here: {}", known.join(", "))),
            Self::Missing { hint, .. } => Some(hint.clone()).filter(|hint| !hint.is_empty()),
            Self::Invalid { hint, .. } => hint.clone(),
            Self::Model { source, .. } => source.hint().map(str::to_owned),
            Self::Read { .. } => Some("the recipes that come with the source are in configs/".into()),
            _ => None,
        }
    }
}
