//! Messages as template values: maps that record which of their fields a template reads.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use minijinja::value::{Enumerator, Object, Serde, Value};
use minijinja::{Error, ErrorKind};
use serde_json::Map;

use crate::records::{large_integer_digits, non_finite_from_json};

/// JSON as a value of the template engine. The objects by which records represent non-finite numbers and large integers
/// become numbers. An integer that does not fit into the engine's 128 bits becomes an error when a template reads it.
pub(super) fn to_template_value(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Array(items) => items.iter().map(to_template_value).collect(),
        serde_json::Value::Object(map) => match (non_finite_from_json(value), large_integer_digits(value)) {
            (Some(number), _) => Value::from(number),
            (None, Some(digits)) => integer(digits),
            (None, None) => {
                Value::from_pairs(map.iter().map(|(name, value)| (name.as_str(), to_template_value(value))))
            }
        },
        value => Value::from(Serde(value)),
    }
}

fn integer(digits: &str) -> Value {
    match (digits.parse::<i128>(), digits.parse::<u128>()) {
        (Ok(number), _) => Value::from(number),
        (_, Ok(number)) => Value::from(number),
        _ => {
            let problem = format!("an integer has {} digits, more than the limit of 38", digits.len());
            Value::from(Error::new(ErrorKind::InvalidOperation, problem))
        }
    }
}

/// The field names of a conversation's messages, and whether a template has read each.
#[derive(Debug, Default)]
pub(super) struct FieldUsage {
    names: HashMap<String, usize>,
    read: Vec<AtomicBool>,
}

impl FieldUsage {
    /// The field names of all messages, none of them read.
    pub(super) fn for_messages<'a>(
        messages: impl IntoIterator<Item = &'a Map<String, serde_json::Value>>,
    ) -> Arc<Self> {
        let mut all = Self::default();
        for name in messages.into_iter().flat_map(Map::keys) {
            if !all.names.contains_key(name) {
                all.names.insert(name.clone(), all.read.len());
                all.read.push(AtomicBool::new(false));
            }
        }
        Arc::new(all)
    }

    fn mark_read(&self, index: usize) {
        if let Some(read) = self.read.get(index) {
            // The flags are read after the rendering thread has sent its result, which synchronizes them.
            read.store(true, Ordering::Relaxed);
        }
    }

    /// Whether a template has read the field in any message.
    pub(super) fn is_read(&self, name: &str) -> bool {
        self.names.get(name).is_some_and(|&index| self.read[index].load(Ordering::Relaxed))
    }
}

/// A message as an object of the template engine.
#[derive(Debug)]
pub(super) struct TrackedMessage {
    usage: Arc<FieldUsage>,
    entries: Vec<(Value, Value)>,
    /// For each field name, its indices in `usage` and in `entries`.
    indices: HashMap<String, (usize, usize)>,
}

impl TrackedMessage {
    /// A message as a value of the template engine.
    pub(super) fn value(usage: &Arc<FieldUsage>, message: &Map<String, serde_json::Value>) -> Value {
        let mut entries = Vec::with_capacity(message.len());
        let mut indices = HashMap::with_capacity(message.len());
        for (index, (name, value)) in message.iter().enumerate() {
            entries.push((Value::from(name.as_str()), to_template_value(value)));
            // A name that the original messages do not have is not tracked: `usize::MAX` is no index of `usage`.
            indices.insert(name.clone(), (usage.names.get(name).copied().unwrap_or(usize::MAX), index));
        }
        Value::from_object(Self { usage: usage.clone(), entries, indices })
    }

    /// The fields, without recording that they are read.
    pub(super) fn entries(&self) -> &[(Value, Value)] {
        &self.entries
    }
}

impl Object for TrackedMessage {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        let &(name, entry) = self.indices.get(key)?;
        self.usage.mark_read(name);
        Some(self.entries[entry].1.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.entries.iter().map(|(name, _)| name.clone()).collect())
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.entries.len())
    }
}
