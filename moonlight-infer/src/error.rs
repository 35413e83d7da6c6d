//! What can go wrong when a model is opened and run.

use std::io;
use std::path::{Path, PathBuf};

use moonlight_convert::adapter::AdapterError;
use moonlight_convert::{CheckpointError, FileError, Printable};

use crate::chat::ChatError;
use crate::device::DeviceError;
use crate::records::{JsonError, FilePosition, RecordError};
use crate::tokenizer::TokenizerError;

/// Why a model cannot be opened, or cannot do what was asked of it. Every message is one sentence for the person who asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InferError {
    /// The weights.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A conversation, or the template for it.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// A file of records.
    #[error(transparent)]
    Records(#[from] RecordError),
    /// A device or a dtype.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// An adapter where the model was wanted that another adapter belongs to.
    #[error("`{}` is itself an adapter", Printable(.0.display()))]
    AdapterOnAdapter(PathBuf),
    /// A model whose folder has no tokenizer, where text is to be read.
    #[error("`{}` has no tokenizer", Printable(.0.display()))]
    NoTokenizer(PathBuf),
    /// A prompt without a token.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// A prompt that does not fit.
    #[error("the prompt has {tokens} tokens, more than the model's context of {context}")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens that there is room for.
        context: usize,
    },
    /// More tokens to score than the model can read.
    #[error("{tokens} tokens are more than the model's context of {context}")]
    TooManyTokens {
        /// Tokens that were given.
        tokens: usize,
        /// Tokens that the model can read.
        context: usize,
    },
    /// A token without a row in the embedding.
    #[error("there is no token {token}: the model has {vocab_size}")]
    UnknownToken {
        /// The token.
        token: u32,
        /// How many there are.
        vocab_size: usize,
    },
    /// A file without a row.
    #[error("`{}` has no rows", Printable(.0.display()))]
    NoRows(PathBuf),
    /// Examples before rows that are no questions.
    #[error("examples do not go with rows of {format}")]
    ShotsWithoutChoices {
        /// What the rows are.
        format: String,
    },
    /// Fewer examples than shots.
    #[error("there are {examples} examples for {shots} shots")]
    TooFewExamples {
        /// Examples that a question may have before it.
        examples: usize,
        /// How many it should have.
        shots: usize,
    },
    /// A question without a context, for a tokenizer that has no token to begin with.
    #[error("a question without a text, and the tokenizer has no token to begin with")]
    NoFirstToken,
    /// Logits of which some are NaN or infinite.
    #[error("the model's logits are non-finite ({token}: {value})")]
    NonFinite {
        /// The first token with such a logit.
        token: usize,
        /// The logit.
        value: f32,
    },
    /// A log-probability that is NaN or infinite.
    #[error("the log-probability of token {place} is non-finite: the model's logits are")]
    NonFiniteScore {
        /// The token's place in its sequence, from 1.
        place: usize,
    },
    /// A file of the model's folder.
    #[error("`{}` cannot be read: {}", Printable(path.display()), Printable(problem))]
    ModelFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A line of a file that is wrong.
    #[error("{}:{place}: {}", Printable(path.display()), Printable(problem))]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, in a parquet file the row, and perhaps the column.
        place: FilePosition,
        /// What is wrong with it.
        problem: String,
        /// What to do, where we know.
        hint: Option<String>,
    },
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
}

impl InferError {
    /// What to do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Checkpoint(error) => error.hint(),
            Self::Adapter(error) => error.hint(),
            Self::Tokenizer(error) => error.hint(),
            Self::Chat(error) => error.hint(),
            Self::Records(error) => error.hint(),
            Self::Device(error) => error.hint(),
            Self::AdapterOnAdapter(_) => Some("an adapter is put beside the model that it belongs to".into()),
            Self::NoTokenizer(_) => Some("put its tokenizer.json or tiktoken.model into the folder".into()),
            Self::TooFewExamples { .. } => Some("take fewer shots, or another file of examples".into()),
            Self::NonFinite { .. } | Self::NonFiniteScore { .. } => Some(
                "its weights are damaged, or its configuration or adapter has a number that is far too large".into(),
            ),
            Self::Line { hint, .. } => hint.clone(),
            Self::File(error) if error.is_full() => Some("free some space and run it again".into()),
            _ => None,
        }
    }

    /// The error of a line of a file: what is wrong with the tokens that the line holds is said with file and line, and
    /// every other error (a full disk, say) stays as it is.
    pub fn with_position(self, path: &Path, place: FilePosition) -> Self {
        match self {
            Self::EmptyPrompt | Self::PromptTooLong { .. } | Self::TooManyTokens { .. } | Self::UnknownToken { .. } => {
                Self::at(path, place, &self, self.hint())
            }
            error => error,
        }
    }

    pub(crate) fn line(path: &Path, line: usize, problem: impl std::fmt::Display, hint: Option<String>) -> Self {
        Self::at(path, FilePosition::line(line), problem, hint)
    }

    /// What is wrong at a place of a file.
    pub(crate) fn at(path: &Path, place: FilePosition, problem: impl std::fmt::Display, hint: Option<String>) -> Self {
        Self::Line { path: path.to_owned(), place, problem: problem.to_string(), hint }
    }

    /// A record at `place` that is not JSON.
    pub(crate) fn json(path: &Path, place: FilePosition, error: &JsonError, hint: Option<String>) -> Self {
        let place = error.at().map_or(place, |at| place.within(at));
        Self::at(path, place, error, error.hint().or(hint))
    }

    pub(crate) fn write(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        FileError::write(path)
    }
}
