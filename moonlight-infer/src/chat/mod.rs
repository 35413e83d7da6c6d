//! Conversations: messages, the chat template that a model was trained with, their tokens, and which of those are learned.
//!
//! * `conversation.rs`: records of JSON to messages.
//! * `template.rs`: messages to the text that the model was trained with.
//! * `sandbox.rs`: limits for templates, which are programs of others.
//! * `assistant_mask.rs`: which parts of that text the assistant says.
//! * `encoder.rs`: the text to tokens, and a weight for each.

mod assistant_mask;
mod conversation;
mod encoder;
mod error;
mod sandbox;
mod template;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use crate::moonlight_template::MOONLIGHT_TEMPLATE;
pub use conversation::{Conversation, Shape, Turn};
pub use encoder::{ChatEncoder, WeightedTokens};
pub use error::{ChatError, ConversationError};
pub use template::{ChatTemplate, TemplateSource};

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
