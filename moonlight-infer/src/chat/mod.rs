//! Conversations: messages, the chat template that a model was trained with, their tokens, and which of those are learned.
//!
//! * `conversation.rs`: records of JSON to messages, with all that they hold.
//! * `template.rs`: messages to the text that the model was trained with; `given.rs`: what templates are given, as
//!   transformers' `apply_chat_template` gives it; `fields.rs`: which fields of the messages they read.
//! * `python.rs`: values, filters and methods as Python and transformers have them.
//! * `sandbox.rs`: limits for templates, which are programs of others.
//! * `assistant_mask.rs`: which parts of that text the assistant says.
//! * `encoder.rs`: the text to tokens, and a weight for each.

mod assistant_mask;
mod conversation;
mod encoder;
mod error;
mod python;
mod sandbox;
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

/// One turn of a conversation: a role, what was said, and whatever else its record holds (`tool_calls`, `tool_call_id`,
/// `name`, `reasoning_content`), which templates are given as it is.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Message(Map<String, Value>);

impl Message {
    /// A message of a role and a text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let mut fields = Map::new();
        fields.insert("role".into(), Value::String(role.into()));
        fields.insert("content".into(), Value::String(content.into()));
        Self(fields)
    }

    /// A message of all fields of a record; `None` where there is no `role`, or it is not a text. Fields that are null are
    /// left out, as transformers leaves them out: tables have a null where another row has a field.
    pub fn from_fields(mut fields: Map<String, Value>) -> Option<Self> {
        fields.retain(|_, value| !value.is_null());
        fields.get("role").is_some_and(Value::is_string).then_some(Self(fields))
    }

    /// `system`, `user`, `assistant` or `tool`; a template may know more.
    pub fn role(&self) -> &str {
        self.0.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// What was said, where it is a text and no list of parts.
    pub fn text(&self) -> Option<&str> {
        self.0.get("content").and_then(Value::as_str)
    }

    /// All fields, `role` and `content` among them, in the order of the record.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.0
    }
}
