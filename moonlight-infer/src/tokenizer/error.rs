//! Errors of tokenizers.

use std::path::PathBuf;

use moonlight_convert::Printable;

/// A tokenizer that cannot be opened or saved, or a text that it cannot encode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A path that does not exist, or a directory without a tokenizer.
    #[error("there is no tokenizer at `{}`", Printable(.0.display()))]
    NotFound(PathBuf),
    /// A file that cannot be read, is not a tokenizer, or exceeds a limit.
    #[error("the tokenizer `{}` cannot be read: {}", Printable(path.display()), Printable(problem))]
    Read {
        /// The file.
        path: PathBuf,
        /// The rest of the sentence.
        problem: String,
    },
    /// A text that the tokenizer cannot encode.
    #[error("the tokenizer `{}` cannot encode a text: {}", Printable(tokenizer), Printable(problem))]
    Encode {
        /// The [name](super::Tokenizer::name) of the tokenizer.
        tokenizer: String,
        /// The rest of the sentence.
        problem: String,
    },
    /// [`AddBos::Always`](super::AddBos::Always) for a tokenizer without BOS.
    #[error("the tokenizer `{}` has no BOS token", Printable(.0))]
    NoBos(String),
    /// A file that cannot be written.
    #[error("the tokenizer file `{}` cannot be written: {problem}", Printable(path.display()))]
    Write {
        /// The file.
        path: PathBuf,
        /// The message of the operating system.
        problem: String,
    },
}

impl TokenizerError {
    /// What to do, if it is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound(_) => Some(
                "a tokenizer is `bytes`, `bytes-chat`, a tokenizer.json, a tiktoken.model, or a directory with one of them"
                    .into(),
            ),
            Self::NoBos(_) => Some("set `bos_token` in its tokenizer_config.json, or do not add BOS".into()),
            Self::Read { .. } | Self::Encode { .. } | Self::Write { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::tests::render;

    #[test]
    fn messages_of_tokenizer_errors() {
        let errors = [
            TokenizerError::NotFound("models/tiny".into()),
            TokenizerError::Read {
                path: "models/tiny/tokenizer.json".into(),
                problem: "it is not a plain file".into(),
            },
            TokenizerError::Encode {
                tokenizer: "models/tiny".into(),
                problem: "its normalizer makes 5000000 bytes of 1000, past the limit".into(),
            },
            TokenizerError::NoBos("models/tiny".into()),
            TokenizerError::Write { path: "out/tokenizer.json".into(), problem: "no storage space".into() },
        ];
        // A new variant does not compile here: add an example of it above.
        let is_covered = |error: &TokenizerError| match error {
            TokenizerError::NotFound(_)
            | TokenizerError::Read { .. }
            | TokenizerError::Encode { .. }
            | TokenizerError::NoBos(_)
            | TokenizerError::Write { .. } => true,
        };
        assert!(errors.iter().all(is_covered));
        insta::assert_snapshot!(render(errors.iter().map(|error| (error.to_string(), error.hint()))));
    }
}
