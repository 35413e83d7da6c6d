//! [`EngineError`]: why a request is refused or ends early.

use std::time::Duration;

/// Why an engine refuses a model or a request, or why a request ends without a result. Every message is one sentence.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// Options that leave no room to work.
    #[error("{0}")]
    Options(String),
    /// A thread for the engine could not be started.
    #[error("the engine's thread cannot be started: {0}")]
    Thread(String),
    /// A model that does not fit the engine's cache.
    #[error("model `{name}` does not fit the engine: {problem}")]
    OtherModel {
        /// The name under which it was to be served.
        name: String,
        /// The rest of the sentence.
        problem: String,
    },
    /// A model that the engine does not have.
    #[error("there is no model `{0}`")]
    UnknownModel(String),
    /// Every place in the queue is taken.
    #[error("{waiting} requests are waiting, and no more may")]
    QueueFull {
        /// The limit of the queue.
        waiting: usize,
    },
    /// A prompt without tokens.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// A prompt that does not fit into a slot.
    #[error("the prompt has {tokens} tokens, more than the context of {context}")]
    PromptTooLong {
        /// The number of tokens in the prompt.
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
    /// A value of a request that is out of range.
    #[error("`{key}` is {value}, but must be {range}")]
    OutOfRange {
        /// The name of the value.
        key: &'static str,
        /// The value.
        value: f64,
        /// The values that are allowed.
        range: &'static str,
    },
    /// The engine finishes what runs, and takes nothing new.
    #[error("the engine is shutting down")]
    ShuttingDown,
    /// The thread of the engine has ended.
    #[error("the engine has stopped")]
    Stopped,
    /// A request that took longer than allowed.
    #[error("the request took longer than {} s", limit.as_secs_f64())]
    OutOfTime {
        /// The limit, from submission to end.
        limit: Duration,
    },
    /// A logit that is NaN or infinite.
    #[error("the model's logits are non-finite: that of token {token} is {value}")]
    NonFinite {
        /// The first token with such a logit.
        token: usize,
        /// The logit, as text, so that errors can be compared.
        value: String,
    },
    /// A forward pass that panicked.
    #[error("the forward pass was interrupted: {0}")]
    Panicked(String),
}

impl EngineError {
    /// What to do, if it is known.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Options(_) => "change the number of slots, their context or the chunk of prompts",
            Self::QueueFull { .. } => "send the request again later",
            Self::PromptTooLong { .. } => "send a shorter prompt, or start with a longer context",
            Self::OtherModel { .. } => "start another engine for it",
            Self::OutOfTime { .. } => "ask for fewer tokens, or raise the limit on time",
            Self::NonFinite { .. } => "check the weights, config and adapter: some value is damaged or far too large",
            Self::Panicked(_) => "look at the program's output; if memory ran out, use fewer slots or smaller chunks",
            Self::Thread(_)
            | Self::UnknownModel(_)
            | Self::EmptyPrompt
            | Self::UnknownToken { .. }
            | Self::OutOfRange { .. }
            | Self::ShuttingDown
            | Self::Stopped => return None,
        };
        Some(hint.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::tests::render;

    #[test]
    fn messages_of_engine_errors() {
        let errors = [
            EngineError::Options("there must be at least 1 slot".into()),
            EngineError::Thread("out of memory".into()),
            EngineError::OtherModel { name: "law".into(), problem: "it has 28 layers, not 27".into() },
            EngineError::UnknownModel("law".into()),
            EngineError::QueueFull { waiting: 64 },
            EngineError::EmptyPrompt,
            EngineError::PromptTooLong { tokens: 9000, context: 8192 },
            EngineError::UnknownToken { token: 999, vocab_size: 128 },
            EngineError::OutOfRange { key: "temperature", value: -1.0, range: "at least 0" },
            EngineError::ShuttingDown,
            EngineError::Stopped,
            EngineError::OutOfTime { limit: Duration::from_millis(1500) },
            EngineError::NonFinite { token: 17, value: f32::NAN.to_string() },
            EngineError::Panicked("the cache is full".into()),
        ];
        // A new variant does not compile here: add an example of it above.
        let is_covered = |error: &EngineError| match error {
            EngineError::Options(_)
            | EngineError::Thread(_)
            | EngineError::OtherModel { .. }
            | EngineError::UnknownModel(_)
            | EngineError::QueueFull { .. }
            | EngineError::EmptyPrompt
            | EngineError::PromptTooLong { .. }
            | EngineError::UnknownToken { .. }
            | EngineError::OutOfRange { .. }
            | EngineError::ShuttingDown
            | EngineError::Stopped
            | EngineError::OutOfTime { .. }
            | EngineError::NonFinite { .. }
            | EngineError::Panicked(_) => true,
        };
        assert!(errors.iter().all(is_covered));
        insta::assert_snapshot!(render(errors.iter().map(|error| (error.to_string(), error.hint()))));
    }
}
