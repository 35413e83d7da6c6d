//! What can be wrong with data.

use std::path::{Path, PathBuf};

use moonlight_infer::expand_env;
use moonlight_infer::records::{FilePosition, RecordError};

/// Data that cannot be read, or that does not fit the recipe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A glob that matches no file.
    #[error("`data.{key}` has the glob `{glob}`, which matches no file")]
    EmptyGlob {
        /// `train` or `valid`.
        key: &'static str,
        /// The glob as the recipe has it.
        glob: String,
    },
    /// A glob that cannot be read.
    #[error("`data.{key}` has the glob `{glob}`, which cannot be searched: {problem}")]
    Glob {
        /// `train` or `valid`.
        key: &'static str,
        /// The glob as the recipe has it.
        glob: String,
        /// What is wrong.
        problem: String,
    },
    /// A file that cannot be read or written.
    #[error("cannot {action} `{}`: {problem}", path.display())]
    Io {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        problem: String,
    },
    /// Tokens on disk that another program cut or changed after they were opened.
    #[error("the token cache `{}` was changed by another program while it was read", path.display())]
    CacheChanged {
        /// The file.
        path: PathBuf,
    },
    /// More sequences in a step than can be laid out.
    #[error("a step of {sequences} sequences of {length} tokens is more than a step can hold (2^32 tokens)")]
    StepTooLarge {
        /// Sequences of the step.
        sequences: usize,
        /// Tokens of each.
        length: usize,
    },
    /// A file that cannot be read, or not on.
    #[error(transparent)]
    Records(#[from] RecordError),
    /// A record that is wrong.
    #[error("{}:{place}: {problem}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Its line, in a parquet file its row, and perhaps its column.
        place: FilePosition,
        /// What is wrong.
        problem: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// Files, but nothing in them to predict.
    #[error("the files of `data.{key}` hold nothing to learn from: {problem}")]
    Nothing {
        /// `train` or `valid`.
        key: &'static str,
        /// What was found.
        problem: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// Text without a tokenizer.
    #[error("`data.format` is text or chat, but there is no tokenizer")]
    NoTokenizer,
    /// Conversations without a template that can be used.
    #[error("{problem}")]
    Template {
        /// What is wrong with it.
        problem: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// A position that belongs to other data.
    #[error("the data are not those that the checkpoint was written with")]
    Changed,
}

impl DataError {
    /// What the operating system says of a file.
    pub(super) fn io(action: &'static str, path: &std::path::Path, error: &std::io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), problem: error.to_string() }
    }

    /// What to do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::EmptyGlob { glob, .. } if expand_env(glob).is_ok_and(|folder| Path::new(&folder).is_dir()) => {
                Some(format!("it is a folder; its files are `{}/**/*.jsonl`, for example", glob.trim_end_matches('/')))
            }
            Self::EmptyGlob { .. } => {
                Some("globs are relative to the working directory; `**` matches any depth".into())
            }
            Self::Record { hint, .. } | Self::Template { hint, .. } | Self::Nothing { hint, .. } => hint.clone(),
            Self::Records(error) => error.hint(),
            Self::NoTokenizer => Some("write data.tokenizer = \"bytes\", or the path of one".into()),
            Self::CacheChanged { .. } => {
                Some("start again (a run: with `--resume`): the cache is made anew if it is damaged".into())
            }
            Self::StepTooLarge { .. } => {
                Some("lower train.batch_size, train.gradient_accumulation or data.sequence_length".into())
            }
            Self::Changed => Some("put the files back as they were, or start a new run".into()),
            _ => None,
        }
    }
}
