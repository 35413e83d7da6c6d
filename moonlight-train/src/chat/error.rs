//! What can be wrong with a conversation or its template.

use std::path::PathBuf;

/// Why a conversation has no tokens.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// Neither the folder nor the tokenizer knows how to talk.
    #[error("`{}` has no chat template", dir.display())]
    NoTemplate {
        /// The model's folder.
        dir: PathBuf,
    },
    /// A template that cannot be read or is none.
    #[error("the chat template of `{}` is broken: {problem}", path.display())]
    Broken {
        /// The file that holds it.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A template that refuses a conversation, or fails at it.
    #[error("the chat template does not take this conversation: {problem}")]
    Refused {
        /// What it says.
        problem: String,
    },
}

impl ChatError {
    /// What to do about it, where we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoTemplate { .. } => Some(
                "a model that was never taught to chat goes on from a text: `moonlight generate --prompt`; else put its \
                 `chat_template.jinja` into the folder"
                    .into(),
            ),
            Self::Broken { .. } | Self::Refused { .. } => None,
        }
    }
}
