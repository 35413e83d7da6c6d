//! Why data cannot be used.

use std::path::{Path, PathBuf};

use moonlight_infer::expand_env;
use moonlight_infer::records::{FilePosition, RecordError};

/// Data that cannot be read or do not fit the recipe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A glob that matches no file.
    #[error("`data.{key}` has the glob `{glob}`, which matches no file")]
    EmptyGlob {
        /// `train` or `valid`.
        key: &'static str,
        /// The glob as the recipe contains it.
        glob: String,
    },
    /// A glob with an error, or a folder that cannot be searched.
    #[error("`data.{key}` has the glob `{glob}`, which cannot be searched: {problem}")]
    Glob {
        /// `train` or `valid`.
        key: &'static str,
        /// The glob as the recipe contains it.
        glob: String,
        /// Why it cannot be searched.
        problem: String,
    },
    /// A file that cannot be read or written.
    #[error("cannot {action} `{}`: {problem}", path.display())]
    Io {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's message.
        problem: String,
    },
    /// A token cache that another process cut or changed after it was opened.
    #[error("the token cache `{}` was changed by another program while it was read", path.display())]
    CacheChanged {
        /// The cache file.
        path: PathBuf,
    },
    /// A step with more than 2^32 tokens.
    #[error("a step of {sequences} sequences of {length} tokens exceeds the limit of 2^32 tokens")]
    StepTooLarge {
        /// Sequences of the step.
        sequences: usize,
        /// Tokens of each.
        length: usize,
    },
    /// A file of records that cannot be opened, or not read to its end.
    #[error(transparent)]
    Records(#[from] RecordError),
    /// A broken or too long record.
    #[error("{}:{place}: {problem}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The line of the record, in a parquet file its row; and its column if the line is not enough.
        place: FilePosition,
        /// What is wrong.
        problem: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// Files without a token to predict.
    #[error("the files of `data.{key}` contain nothing to learn from: {problem}")]
    Nothing {
        /// `train`, `valid` or `valid_fraction`.
        key: &'static str,
        /// What was left out, and why.
        problem: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// Texts or conversations without a tokenizer.
    #[error("`data.format` is `text` or `chat`, but there is no tokenizer")]
    NoTokenizer,
    /// A chat template that is absent or cannot be used.
    #[error("{problem}")]
    Template {
        /// The whole message.
        problem: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// A position in other data.
    #[error("the data differ from those that the checkpoint was written with")]
    Changed,
}

impl DataError {
    /// An error of the operating system. `action` is `read` or `write`.
    pub(super) fn io(action: &'static str, path: &std::path::Path, error: &std::io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), problem: error.to_string() }
    }

    /// What to do about the error, if that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::EmptyGlob { glob, .. } if expand_env(glob).is_ok_and(|folder| Path::new(&folder).is_dir()) => {
                Some(format!("name the files in this folder, for example `{}/**/*.jsonl`", glob.trim_end_matches('/')))
            }
            Self::EmptyGlob { .. } => {
                Some("write a glob relative to the working directory; `**` matches any number of folders".into())
            }
            Self::Record { hint, .. } | Self::Template { hint, .. } | Self::Nothing { hint, .. } => hint.clone(),
            Self::Records(error) => error.hint(),
            Self::NoTokenizer => Some("set `data.tokenizer` to `bytes` or to the path of a tokenizer".into()),
            Self::CacheChanged { .. } => {
                Some("start again, a run with `--resume`; a damaged cache is written again".into())
            }
            Self::StepTooLarge { .. } => {
                Some("lower `train.batch_size`, `train.gradient_accumulation` or `data.sequence_length`".into())
            }
            Self::Changed => Some("restore the files, or start a new run".into()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::rendered;

    /// The compiler demands an arm for each variant, and so an example in the test.
    fn name(error: &DataError) -> &'static str {
        match error {
            DataError::EmptyGlob { .. } => "EmptyGlob",
            DataError::Glob { .. } => "Glob",
            DataError::Io { .. } => "Io",
            DataError::CacheChanged { .. } => "CacheChanged",
            DataError::StepTooLarge { .. } => "StepTooLarge",
            DataError::Records(_) => "Records",
            DataError::Record { .. } => "Record",
            DataError::Nothing { .. } => "Nothing",
            DataError::NoTokenizer => "NoTokenizer",
            DataError::Template { .. } => "Template",
            DataError::Changed => "Changed",
        }
    }

    #[test]
    fn messages_and_hints() {
        let errors = [
            DataError::EmptyGlob { key: "train", glob: "data/*.txt".into() },
            DataError::EmptyGlob { key: "valid", glob: "/".into() },
            DataError::Glob { key: "train", glob: "a**".into(), problem: "`**` must be a whole component".into() },
            DataError::io("write", Path::new("cache/x.tokens"), &std::io::ErrorKind::StorageFull.into()),
            DataError::CacheChanged { path: "cache/x.tokens".into() },
            DataError::StepTooLarge { sequences: 1 << 30, length: 1024 },
            DataError::Record {
                path: "a.jsonl".into(),
                place: FilePosition { line: 3, column: 0 },
                problem: "the record has 9 tokens, but `data.sequence_length` is 8".into(),
                hint: Some("raise `data.sequence_length`".into()),
            },
            DataError::Nothing {
                key: "train",
                problem: "2 records were broken and left out: a.jsonl:1, a.jsonl:2".into(),
                hint: Some("set `data.broken = \"error\"` to stop at the first broken record".into()),
            },
            DataError::NoTokenizer,
            DataError::Template { problem: "`bytes` has no chat template".into(), hint: None },
            DataError::Changed,
        ];
        let text: Vec<String> =
            errors.iter().map(|error| format!("{}\n{}", name(error), rendered(error, error.hint()))).collect();
        insta::assert_snapshot!(text.join("\n"));
    }
}
