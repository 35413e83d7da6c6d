//! Errors of opening and running a model.

use std::path::{Path, PathBuf};

use moonlight_convert::adapter::AdapterError;
use moonlight_convert::{CheckpointError, FileError, Printable};

use crate::chat::ChatError;
use crate::device::DeviceError;
use crate::records::{FilePosition, JsonError, RecordError};
use crate::tokenizer::TokenizerError;

/// Why a model cannot be opened or run. Every message is one sentence.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InferError {
    /// A checkpoint that cannot be loaded.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// An adapter that cannot be loaded, or does not fit the model.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// A tokenizer that cannot be read, or a text that it cannot encode.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A conversation that cannot be encoded, or an invalid chat template.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// A file of records that cannot be read.
    #[error(transparent)]
    Records(#[from] RecordError),
    /// An unknown or unavailable device or dtype.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// An adapter that was passed in place of the model for another adapter.
    #[error("`{}` is an adapter, not a model", Printable(.0.display()))]
    AdapterOnAdapter(PathBuf),
    /// Text for a model whose directory has no tokenizer.
    #[error("`{}` has no tokenizer", Printable(.0.display()))]
    NoTokenizer(PathBuf),
    /// A prompt without tokens.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// A prompt that does not fit into the context or the KV cache.
    #[error("the prompt has {tokens} tokens, more than the model's context of {context}")]
    PromptTooLong {
        /// The number of tokens in the prompt.
        tokens: usize,
        /// The number of tokens that fit.
        context: usize,
    },
    /// More tokens to score than the context has.
    #[error("{tokens} tokens are more than the model's context of {context}")]
    TooManyTokens {
        /// The number of tokens to score.
        tokens: usize,
        /// The number of tokens that fit.
        context: usize,
    },
    /// A token without a row in the embedding.
    #[error("there is no token {token}: the vocabulary has {vocab_size}")]
    UnknownToken {
        /// The token.
        token: u32,
        /// The number of rows in the embedding.
        vocab_size: usize,
    },
    /// A task file without rows.
    #[error("`{}` has no rows", Printable(.0.display()))]
    NoRows(PathBuf),
    /// Shots for a format that is not multiple choice.
    #[error("few-shot examples are not supported for rows of `{format}`")]
    ShotsWithoutChoices {
        /// The [format](crate::eval::TaskFormat) of the rows.
        format: String,
    },
    /// Fewer examples than shots.
    #[error("there are {examples} examples for {shots} shots")]
    TooFewExamples {
        /// The number of examples that may precede the question.
        examples: usize,
        /// The number of examples that were requested.
        shots: usize,
    },
    /// An empty context, and a tokenizer without a token that could replace it.
    #[error("the context is empty, and the tokenizer has neither BOS nor EOS to replace it")]
    NoFirstToken,
    /// A logit that is NaN or infinite.
    #[error("the model's logits are non-finite: that of token {token} is {value}")]
    NonFinite {
        /// The first token with such a logit.
        token: usize,
        /// The logit.
        value: f32,
    },
    /// A log-probability that is NaN or infinite.
    #[error("the log-probability of token {position} of the sequence is non-finite")]
    NonFiniteScore {
        /// The position in the sequence, from 1.
        position: usize,
    },
    /// A file of settings in the model's directory that cannot be read.
    #[error("`{}` cannot be read: {}", Printable(path.display()), Printable(problem))]
    ModelFile {
        /// The file.
        path: PathBuf,
        /// The rest of the sentence.
        problem: String,
    },
    /// A record that is invalid.
    #[error("{}:{place}: {}", Printable(path.display()), Printable(problem))]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, or in a parquet file the row; with a column if it is known.
        place: FilePosition,
        /// The sentence.
        problem: String,
        /// What to do, if it is known.
        hint: Option<String>,
    },
    /// A file that cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
}

impl InferError {
    /// What to do, if it is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Checkpoint(error) => error.hint(),
            Self::Adapter(error) => error.hint(),
            Self::Tokenizer(error) => error.hint(),
            Self::Chat(error) => error.hint(),
            Self::Records(error) => error.hint(),
            Self::Device(error) => error.hint(),
            Self::AdapterOnAdapter(_) => Some("pass the model that the adapter was trained on".into()),
            Self::NoTokenizer(_) => Some("add its tokenizer.json or tiktoken.model to the directory".into()),
            Self::TooFewExamples { .. } => Some("use fewer shots, or a file with more examples".into()),
            Self::NonFinite { .. } | Self::NonFiniteScore { .. } => {
                Some("check the weights, config and adapter: some value is damaged or far too large".into())
            }
            Self::Line { hint, .. } => hint.clone(),
            Self::File(error) if error.is_full() => Some("free some space and run it again".into()),
            Self::File(_)
            | Self::EmptyPrompt
            | Self::PromptTooLong { .. }
            | Self::TooManyTokens { .. }
            | Self::UnknownToken { .. }
            | Self::NoRows(_)
            | Self::ShotsWithoutChoices { .. }
            | Self::NoFirstToken
            | Self::ModelFile { .. } => None,
        }
    }

    /// Adds the file and line of a record to an error about its tokens. Any other error (such as a full disk) is unchanged.
    pub fn with_position(self, path: &Path, position: FilePosition) -> Self {
        match self {
            Self::EmptyPrompt | Self::PromptTooLong { .. } | Self::TooManyTokens { .. } | Self::UnknownToken { .. } => {
                Self::at(path, position, &self, self.hint())
            }
            error => error,
        }
    }

    pub(crate) fn line(path: &Path, line: usize, problem: impl std::fmt::Display, hint: Option<String>) -> Self {
        Self::at(path, FilePosition::line(line), problem, hint)
    }

    pub(crate) fn at(path: &Path, place: FilePosition, problem: impl std::fmt::Display, hint: Option<String>) -> Self {
        Self::Line { path: path.to_owned(), place, problem: problem.to_string(), hint }
    }

    /// The error for a record at `position` that is not JSON. `hint` is used if `error` has no hint.
    pub(crate) fn json(path: &Path, position: FilePosition, error: &JsonError, hint: Option<String>) -> Self {
        let position = error.at().map_or(position, |at| position.within(at));
        Self::at(path, position, error, error.hint().or(hint))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io;

    use insta::assert_snapshot;

    use super::*;

    /// Messages and hints as the programs print them, for snapshots.
    pub(crate) fn render(errors: impl Iterator<Item = (String, Option<String>)>) -> String {
        let blocks = errors.map(|(message, hint)| match hint {
            Some(hint) => format!("error: {message}\nhint: {hint}\n"),
            None => format!("error: {message}\n"),
        });
        blocks.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn messages_of_infer_errors() {
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let errors = [
            InferError::Checkpoint(CheckpointError::File(FileError::read::<FileError>("model/config.json")(gone()))),
            InferError::Adapter(AdapterError::Checkpoint(CheckpointError::File(FileError::read::<FileError>(
                "adapter/adapter_config.json",
            )(gone())))),
            InferError::Tokenizer(TokenizerError::NotFound("nowhere".into())),
            InferError::Chat(ChatError::NoTemplate { dir: "models/base".into() }),
            InferError::Records(RecordError::File {
                path: "tasks/mmlu.jsonl".into(),
                problem: "it is a zip archive".into(),
                hint: None,
            }),
            InferError::Device(DeviceError::Unknown("gpu".into())),
            InferError::AdapterOnAdapter("runs/lora".into()),
            InferError::NoTokenizer("models/tiny".into()),
            InferError::EmptyPrompt,
            InferError::PromptTooLong { tokens: 9000, context: 8192 },
            InferError::TooManyTokens { tokens: 9000, context: 8192 },
            InferError::UnknownToken { token: 999, vocab_size: 128 },
            InferError::NoRows("tasks/empty.jsonl".into()),
            InferError::ShotsWithoutChoices { format: "perplexity".into() },
            InferError::TooFewExamples { examples: 3, shots: 5 },
            InferError::NoFirstToken,
            InferError::NonFinite { token: 17, value: f32::NAN },
            InferError::NonFiniteScore { position: 2 },
            InferError::ModelFile { path: "model/generation_config.json".into(), problem: "it is not JSON".into() },
            InferError::Line {
                path: "prompts.jsonl".into(),
                place: FilePosition { line: 3, column: 17 },
                problem: "the record is not JSON: expected `,` or `}`".into(),
                hint: Some("a record is `{\"tokens\": [1, 2, 3]}` or `{\"text\": \"...\"}`".into()),
            },
            FileError::write("out.jsonl")(gone()),
            FileError::write("out.jsonl")(full()),
        ];
        // A new variant does not compile here: add an example of it above.
        let is_covered = |error: &InferError| match error {
            InferError::Checkpoint(_)
            | InferError::Adapter(_)
            | InferError::Tokenizer(_)
            | InferError::Chat(_)
            | InferError::Records(_)
            | InferError::Device(_)
            | InferError::AdapterOnAdapter(_)
            | InferError::NoTokenizer(_)
            | InferError::EmptyPrompt
            | InferError::PromptTooLong { .. }
            | InferError::TooManyTokens { .. }
            | InferError::UnknownToken { .. }
            | InferError::NoRows(_)
            | InferError::ShotsWithoutChoices { .. }
            | InferError::TooFewExamples { .. }
            | InferError::NoFirstToken
            | InferError::NonFinite { .. }
            | InferError::NonFiniteScore { .. }
            | InferError::ModelFile { .. }
            | InferError::Line { .. }
            | InferError::File(_) => true,
        };
        assert!(errors.iter().all(is_covered));
        assert_snapshot!(render(errors.iter().map(|error| (error.to_string(), error.hint()))));
    }
}
