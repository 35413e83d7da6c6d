//! Messages as templates see them: maps that notice which of their fields are read.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use minijinja::value::{Enumerator, Object, Serde, Value};
use minijinja::{Error, ErrorKind};
use serde_json::Map;

use crate::records::{large_integer_digits, non_finite_from_json};

/// JSON as a value of the template engine; what stands for a number is that number. An integer of more digits than the engine
/// has is an error where a template reads it.
pub(super) fn to_template_value(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Array(items) => items.iter().map(to_template_value).collect(),
        serde_json::Value::Object(map) => match (non_finite_from_json(value), large_integer_digits(value)) {
            (Some(number), _) => Value::from(number),
            (None, Some(digits)) => integer(digits),
            (None, None) => Value::from_pairs(map.iter().map(|(name, value)| (name.as_str(), to_template_value(value)))),
        },
        value => Value::from(Serde(value)),
    }
}

fn integer(digits: &str) -> Value {
    match (digits.parse::<i128>(), digits.parse::<u128>()) {
        (Ok(number), _) => Value::from(number),
        (_, Ok(number)) => Value::from(number),
        _ => {
            let problem = format!("an integer of {} digits; templates are given 38 at most", digits.len());
            Value::from(Error::new(ErrorKind::InvalidOperation, problem))
        }
    }
}

/// Names of fields, and whether a template has read them; shared by the messages of a conversation.
#[derive(Debug, Default)]
pub(super) struct FieldUsage {
    names: HashMap<String, usize>,
    read: Vec<AtomicBool>,
}

impl FieldUsage {
    /// The names that any of the messages has.
    pub(super) fn of<'a>(messages: impl IntoIterator<Item = &'a Map<String, serde_json::Value>>) -> Arc<Self> {
        let mut all = Self::default();
        for name in messages.into_iter().flat_map(Map::keys) {
            if !all.names.contains_key(name) {
                all.names.insert(name.clone(), all.read.len());
                all.read.push(AtomicBool::new(false));
            }
        }
        Arc::new(all)
    }

    fn note(&self, index: usize) {
        if let Some(read) = self.read.get(index) {
            read.store(true, Ordering::Relaxed);
        }
    }

    /// Whether a template has asked for the field, of any message.
    pub(super) fn is_read(&self, name: &str) -> bool {
        self.names.get(name).is_some_and(|&index| self.read[index].load(Ordering::Relaxed))
    }
}

/// A message.
#[derive(Debug)]
pub(super) struct TrackedMessage {
    names: Arc<FieldUsage>,
    entries: Vec<(Value, Value)>,
    /// Index of the name among all, and of the entry.
    places: HashMap<String, (usize, usize)>,
}

impl TrackedMessage {
    /// A message as a value of the template engine.
    pub(super) fn value(names: &Arc<FieldUsage>, message: &Map<String, serde_json::Value>) -> Value {
        let mut entries = Vec::with_capacity(message.len());
        let mut places = HashMap::with_capacity(message.len());
        for (index, (name, value)) in message.iter().enumerate() {
            entries.push((Value::from(name.as_str()), to_template_value(value)));
            places.insert(name.clone(), (names.names.get(name).copied().unwrap_or(usize::MAX), index));
        }
        Value::from_object(Self { names: names.clone(), entries, places })
    }

    /// What the message holds, without a note that it was read.
    pub(super) fn entries(&self) -> &[(Value, Value)] {
        &self.entries
    }
}

impl Object for TrackedMessage {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        let &(name, entry) = self.places.get(key)?;
        self.names.note(name);
        Some(self.entries[entry].1.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.entries.iter().map(|(name, _)| name.clone()).collect())
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.entries.len())
    }
}
