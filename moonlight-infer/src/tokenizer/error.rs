//! What can be wrong with a tokenizer.

use std::path::PathBuf;

use moonlight_convert::Printable;

/// A tokenizer that cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// There is no such file or folder, or nothing in it is a tokenizer.
    #[error("there is no tokenizer at `{}`", Printable(.0.display()))]
    NotFound(PathBuf),
    /// The file is not what its name says.
    #[error("the tokenizer `{}` cannot be read: {}", Printable(path.display()), Printable(problem))]
    Read {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A text that it has no tokens for.
    #[error("the tokenizer `{}` cannot encode a text: {}", Printable(tokenizer), Printable(problem))]
    Encode {
        /// Its [name](super::Tokenizer::name).
        tokenizer: String,
        /// Why.
        problem: String,
    },
    /// BOS before each text, for a tokenizer without one.
    #[error("the tokenizer `{}` has no token that begins a text (BOS)", Printable(.0))]
    NoBos(String),
    /// A file cannot be written.
    #[error("the tokenizer file `{}` cannot be written: {problem}", Printable(path.display()))]
    Write {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        problem: String,
    },
}

impl TokenizerError {
    /// What to do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound(_) => Some(
                "a tokenizer is `bytes`, `bytes-chat`, a tokenizer.json, a tiktoken.model, or a folder with one of \
                     them"
                    .into(),
            ),
            Self::NoBos(_) => Some("name it as `bos_token` in its tokenizer_config.json, or add none".into()),
            Self::Read { .. } | Self::Encode { .. } | Self::Write { .. } => None,
        }
    }
}
