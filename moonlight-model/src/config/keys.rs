//! [`Keys`]: typed reading of the keys of `config.json`, with errors that name the key.

use serde_json::{Map, Value};

use super::error::ConfigError;

/// The keys of a file. Reading a key removes it, so the keys left at the end are those that were not read.
pub(crate) struct Keys {
    pub(crate) map: Map<String, Value>,
}

impl Keys {
    /// Removes a key and returns its value; `None` if it is absent or null.
    pub(crate) fn take(&mut self, field: &'static str) -> Option<Value> {
        self.map.remove(field).filter(|value| !value.is_null())
    }

    pub(crate) fn optional<T>(
        &mut self,
        field: &'static str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        self.take(field)
            .map(|value| {
                read(&value)
                    .ok_or_else(|| ConfigError::Invalid { field, problem: format!("must be {expected}, not {value}") })
            })
            .transpose()
    }

    pub(crate) fn optional_size(&mut self, field: &'static str) -> Result<Option<usize>, ConfigError> {
        self.optional(field, "a whole number", |value| value.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    /// A whole number, which may be written as a float (`8192.0`).
    pub(crate) fn optional_length(&mut self, field: &'static str) -> Result<Option<usize>, ConfigError> {
        self.optional(field, "a whole number", |value| {
            let whole = |number: &f64| number.fract() == 0.0 && (0.0..1e15).contains(number);
            value.as_u64().or_else(|| value.as_f64().filter(whole).map(|number| number as u64))?.try_into().ok()
        })
    }

    pub(crate) fn size(&mut self, field: &'static str) -> Result<usize, ConfigError> {
        self.optional_size(field)?.ok_or(ConfigError::Missing { field })
    }

    pub(crate) fn number(&mut self, field: &'static str) -> Result<Option<f64>, ConfigError> {
        self.optional(field, "a number", Value::as_f64)
    }

    pub(crate) fn boolean(&mut self, field: &'static str) -> Result<Option<bool>, ConfigError> {
        self.optional(field, "true or false", Value::as_bool)
    }

    pub(crate) fn string(&mut self, field: &'static str) -> Result<Option<String>, ConfigError> {
        self.optional(field, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub(crate) fn token_ids(&mut self, field: &'static str) -> Result<Vec<u32>, ConfigError> {
        // Some programs write -1 for "none".
        let none = |value: &&Value| value.as_i64() == Some(-1);
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = self.optional(field, "a token id or a list of them", |value| match value {
            Value::Array(ids) => ids.iter().filter(|value| !none(value)).map(id).collect(),
            one if none(&one) => Some(Vec::new()),
            one => id(one).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }
}
