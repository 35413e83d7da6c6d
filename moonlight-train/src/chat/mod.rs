//! Conversations: messages, the template that a model was taught them in, their tokens, and which of those are learned.
//!
//! * `conversation.rs`: records of JSON to messages.
//! * `template.rs`: messages to the text that the model was taught them in.
//! * `spans.rs`: where in that text the assistant speaks.
//! * `tokens.rs`: the text to tokens, and a weight for each.

mod conversation;
mod error;
mod spans;
mod template;
#[cfg(test)]
mod tests;
mod tokens;

use serde::{Deserialize, Serialize};

pub use conversation::{Conversation, Shape, Turn};
pub use error::{ChatError, ConversationError};
pub use template::{ChatTemplate, MOONLIGHT_TEMPLATE, TemplateSource};
pub use tokens::{ChatEncoder, WeightedTokens};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`; a template may know more.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}
