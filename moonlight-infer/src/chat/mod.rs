//! Conversations: from records to messages, to text by the model's chat template, and to tokens with a weight in the loss.
//!
//! * `conversation.rs`: parses JSON records into messages; [`ConversationFormat`] lists the formats.
//! * `template.rs`: renders messages as text with the model's Jinja template.
//! * `template_input.rs`: the variables of the template, as transformers' `apply_chat_template` passes them.
//! * `tracked_message.rs`: records which fields of the messages the template reads.
//! * `python/`: values, filters and methods as in Python and transformers.
//! * `sandbox.rs`: limits for templates, which are untrusted programs that come with a model.
//! * `assistant_mask/`: finds the spans of the text that the assistant wrote.
//! * `special_tokens.rs`: distinguishes special tokens that the template writes from those that a message spells.
//! * `encoder.rs`: encodes the text as tokens, with a weight for each.

mod assistant_mask;
mod conversation;
mod encoder;
mod error;
mod python;
mod sandbox;
mod special_tokens;
mod template;
mod template_input;
#[cfg(test)]
mod tests;
mod tracked_message;

use serde::Serialize;
use serde_json::{Map, Value};

pub use crate::moonlight_template::MOONLIGHT_TEMPLATE;
pub use conversation::{Conversation, ConversationFormat, Turn};
pub use encoder::{ChatEncoder, ChatPrompt, WeightedTokens};
pub use error::{ChatError, ConversationError};
pub use template::{ChatTemplate, TemplateSource};

/// One message of a conversation: a role, its content, and any other fields of the record (`tool_calls`, `tool_call_id`,
/// `name`, `reasoning_content`), which the template gets unchanged.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Message(Map<String, Value>);

impl Message {
    /// A message with text and no further fields.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let mut fields = Map::new();
        fields.insert("role".into(), Value::String(role.into()));
        fields.insert("content".into(), Value::String(content.into()));
        Self(fields)
    }

    /// A message with all fields of a record; `None` if `role` is missing or not a string. Null fields are left out, as in
    /// transformers: a row of a table has a null for each column that only other rows use.
    pub fn from_fields(mut fields: Map<String, Value>) -> Option<Self> {
        fields.retain(|_, value| !value.is_null());
        fields.get("role").is_some_and(Value::is_string).then_some(Self(fields))
    }

    /// `system`, `user`, `assistant` or `tool`, or another that the template knows.
    pub fn role(&self) -> &str {
        self.0.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// The content if it is a string; `None` if it is missing or a list of parts.
    pub fn text(&self) -> Option<&str> {
        self.0.get("content").and_then(Value::as_str)
    }

    /// All fields, including `role` and `content`, in the order of the record.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.0
    }
}
