//! The variables that a template gets for a conversation: the messages, `tools`, `documents` and others, as
//! `apply_chat_template` of transformers 5.24 passes them. They are converted once for all renderings of the conversation.

use std::sync::Arc;

use minijinja::value::Value;
use serde_json::Map;

use super::Message;
use super::sandbox::Budget;
use super::tracked_message::{FieldUsage, TrackedMessage, to_template_value};

/// The fields that hold the assistant's reasoning, by precedence. transformers passes the first one that is present also as
/// `reasoning_content` and `thinking`.
pub(super) const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A conversation in values of the template engine.
#[derive(Debug, Clone)]
pub(super) struct TemplateInput {
    /// The messages as JSON, from which marked copies are made.
    pub(super) messages: Vec<Map<String, serde_json::Value>>,
    /// The same messages as values.
    pub(super) values: Vec<Value>,
    pub(super) variables: Vec<(String, Value)>,
    /// Which fields of the messages were read, by any rendering.
    pub(super) usage: Arc<FieldUsage>,
    pub(super) budget: Budget,
}

impl TemplateInput {
    /// `messages` come from [`with_reasoning`]; both they and the variables are already escaped.
    pub(super) fn new(
        messages: Vec<Map<String, serde_json::Value>>,
        variables: Map<String, serde_json::Value>,
    ) -> Self {
        let bytes: usize = messages.iter().chain([&variables]).map(map_bytes).sum();
        let usage = FieldUsage::for_messages(&messages);
        let values = messages.iter().map(|message| TrackedMessage::value(&usage, message)).collect();
        let mut variables: Vec<(String, Value)> =
            variables.into_iter().map(|(name, value)| (name, to_template_value(&value))).collect();
        for name in ["tools", "documents"] {
            // transformers always passes both: templates test `tools is none`, not `tools is defined`.
            if !variables.iter().any(|(known, _)| known == name) {
                variables.push((name.into(), Value::from(())));
            }
        }
        let budget = Budget::for_conversation(messages.len(), bytes);
        Self { messages, values, variables, usage, budget }
    }

    /// An input of messages only, which are not escaped.
    pub(super) fn from_messages(messages: &[Message]) -> Self {
        Self::new(messages.iter().map(|message| with_reasoning(message.fields().clone())).collect(), Map::new())
    }

    /// A changed message as a value, to be rendered in place of another.
    pub(super) fn value(&self, message: &Map<String, serde_json::Value>) -> Value {
        TrackedMessage::value(&self.usage, message)
    }
}

/// A message with its reasoning under the names that templates read.
pub(super) fn with_reasoning(message: Map<String, serde_json::Value>) -> Map<String, serde_json::Value> {
    let Some(reasoning) = REASONING_FIELDS.iter().find_map(|name| message.get(*name)).cloned() else { return message };
    let mut extended = Map::new();
    extended.insert("thinking".into(), reasoning.clone());
    extended.extend(message);
    extended.insert("reasoning_content".into(), reasoning);
    extended
}

/// The bytes of text in a value, plus a few for each value in it, which approximates its length as JSON.
fn value_bytes(value: &serde_json::Value) -> usize {
    4 + match value {
        serde_json::Value::String(text) => text.len(),
        serde_json::Value::Array(items) => items.iter().map(value_bytes).sum(),
        serde_json::Value::Object(map) => map_bytes(map),
        _ => 4,
    }
}

fn map_bytes(map: &Map<String, serde_json::Value>) -> usize {
    map.iter().map(|(name, value)| name.len() + value_bytes(value)).sum()
}
