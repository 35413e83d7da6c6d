//! Conversations: messages, the chat template of a model, their tokens, and which of those are learned.
//!
//! * `conversation.rs`: records of JSON to messages; [`ConversationFormat`] lists what is read.
//! * `template.rs`: messages to text, by the model's Jinja template; `template_input.rs`: what the template gets, as
//!   transformers' `apply_chat_template` passes it; `tracked_message.rs`: which fields of the messages it reads.
//! * `python.rs`: values, filters and methods as in Python and transformers.
//! * `sandbox.rs`: limits for templates, which are programs that come with a model.
//! * `assistant_mask/`: which spans of the text the assistant wrote.
//! * `special_tokens.rs`: messages that spell a special token, kept apart from the template's own.
//! * `encoder.rs`: the text to tokens, and a weight for each.

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
pub use encoder::{ChatEncoder, WeightedTokens};
pub use error::{ChatError, ConversationError};
pub use template::{ChatTemplate, TemplateSource};

/// One message of a conversation: a role, its content, and whatever else its record has (`tool_calls`, `tool_call_id`, `name`,
/// `reasoning_content`), which the template gets unchanged.
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

    /// A message of all fields of a record; `None` where `role` is missing or not a string. Null fields are left out, as
    /// transformers does: tables have a null where another row has a value.
    pub fn from_fields(mut fields: Map<String, Value>) -> Option<Self> {
        fields.retain(|_, value| !value.is_null());
        fields.get("role").is_some_and(Value::is_string).then_some(Self(fields))
    }

    /// `system`, `user`, `assistant` or `tool`, or another that the template knows.
    pub fn role(&self) -> &str {
        self.0.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// The content where it is a string; `None` where it is missing or a list of parts.
    pub fn text(&self) -> Option<&str> {
        self.0.get("content").and_then(Value::as_str)
    }

    /// All fields, with `role` and `content`, in the order of the record.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.0
    }
}
