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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::rendered;

    /// The compiler demands an arm for each variant, and so an example in the test.
    fn name(error: &RecipeError) -> &'static str {
        match error {
            RecipeError::Read { .. } => "Read",
            RecipeError::Syntax { .. } => "Syntax",
            RecipeError::UnknownKey { .. } => "UnknownKey",
            RecipeError::Missing { .. } => "Missing",
            RecipeError::Invalid { .. } => "Invalid",
            RecipeError::Model { .. } => "Model",
        }
    }

    #[test]
    fn messages_and_hints() {
        let errors = [
            RecipeError::Read { path: "run.toml".into(), problem: "No such file or directory (os error 2)".into() },
            RecipeError::Syntax { place: "run.toml:3".into(), problem: "unquoted string".into() },
            RecipeError::UnknownKey {
                place: "run.toml:3".into(),
                key: "train.step".into(),
                nearest: Some("train.steps".into()),
                known: vec!["steps".into(), "epochs".into()],
            },
            RecipeError::Missing {
                place: "run.toml".into(),
                key: "train.steps".into(),
                hint: "write the number of optimizer steps, `steps = 1000`, or `epochs = 2`".into(),
            },
            RecipeError::Invalid {
                place: "--set train.steps=many".into(),
                key: "train.steps".into(),
                problem: "must be a whole number from 0, not many".into(),
                hint: None,
            },
            RecipeError::Model {
                place: "run.toml:1".into(),
                source: ConfigError::Invalid { field: "num_hidden_layers", problem: "must be at least 1".into() },
            },
        ];
        let text: Vec<String> =
            errors.iter().map(|error| format!("{}\n{}", name(error), rendered(error, error.hint()))).collect();
        insta::assert_snapshot!(text.join("\n"));
    }
}
