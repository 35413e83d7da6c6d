//! What a template is given for a conversation: the messages, `tools`, `documents` and other variables, as transformers'
//! `apply_chat_template` gives them (5.24), made once for all renderings of the conversation.

use std::sync::Arc;

use minijinja::value::Value;
use serde_json::Map;

use super::Message;
use super::tracked_message::{FieldUsage, TrackedMessage, to_template_value};
use super::sandbox::Budget;

/// The fields that hold what the assistant thinks, in the order in which they are looked at. transformers gives templates
/// the first that is there as `reasoning_content` and `thinking`, too.
pub(super) const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A conversation in the engine's values.
#[derive(Debug, Clone)]
pub(super) struct TemplateInput {
    /// The messages as JSON, of which marked copies are made.
    pub(super) messages: Vec<Map<String, serde_json::Value>>,
    /// The same as templates see them.
    pub(super) values: Vec<Value>,
    /// Beside them.
    pub(super) variables: Vec<(String, Value)>,
    pub(super) names: Arc<FieldUsage>,
    pub(super) budget: Budget,
}

impl TemplateInput {
    /// Of messages and variables that have been prepared.
    pub(super) fn new(
        messages: Vec<Map<String, serde_json::Value>>,
        variables: Map<String, serde_json::Value>,
    ) -> Self {
        let bytes: usize = messages.iter().chain([&variables]).map(bytes_of_map).sum();
        let names = FieldUsage::of(&messages);
        let values = messages.iter().map(|message| TrackedMessage::value(&names, message)).collect();
        let mut variables: Vec<(String, Value)> =
            variables.into_iter().map(|(name, value)| (name, to_template_value(&value))).collect();
        for name in ["tools", "documents"] {
            // Templates ask whether they are none, not whether they are defined.
            if !variables.iter().any(|(known, _)| known == name) {
                variables.push((name.into(), Value::from(())));
            }
        }
        let budget = Budget::of(messages.len(), bytes);
        Self { messages, values, variables, names, budget }
    }

    /// Of messages as they are.
    pub(super) fn of_messages(messages: &[Message]) -> Self {
        Self::new(messages.iter().map(|message| with_reasoning(message.fields().clone())).collect(), Map::new())
    }

    /// A message in place of another, for a rendering of its own.
    pub(super) fn value(&self, message: &Map<String, serde_json::Value>) -> Value {
        TrackedMessage::value(&self.names, message)
    }
}

/// A message with its reasoning under the names that templates read.
pub(super) fn with_reasoning(message: Map<String, serde_json::Value>) -> Map<String, serde_json::Value> {
    let Some(reasoning) = REASONING_FIELDS.iter().find_map(|name| message.get(*name)).cloned() else { return message };
    let mut given = Map::new();
    given.insert("thinking".into(), reasoning.clone());
    given.extend(message);
    given.insert("reasoning_content".into(), reasoning);
    given
}

/// Bytes of text in JSON, and some for each value.
fn bytes_of(value: &serde_json::Value) -> usize {
    4 + match value {
        serde_json::Value::String(text) => text.len(),
        serde_json::Value::Array(items) => items.iter().map(bytes_of).sum(),
        serde_json::Value::Object(map) => bytes_of_map(map),
        _ => 4,
    }
}

fn bytes_of_map(map: &Map<String, serde_json::Value>) -> usize {
    map.iter().map(|(name, value)| name.len() + bytes_of(value)).sum()
}
