//! Values of the sampling that a request does not set.

use std::path::Path;

use serde_json::Value;

use crate::error::InferError;
use crate::model_files::{MAX_SETTINGS_BYTES, ModelFiles};

/// Values of the sampling that a request does not set: those of the model's `generation_config.json`, which are what its
/// authors recommend, else OpenAI's (temperature 1, everything else off). vLLM does the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingDefaults {
    /// Divides the logits; 0 for greedy decoding.
    pub temperature: f64,
    /// See [`Sampling::top_p`](crate::Sampling::top_p).
    pub top_p: f64,
    /// See [`Sampling::top_k`](crate::Sampling::top_k).
    pub top_k: usize,
    /// See [`Penalties::repetition`](crate::engine::Penalties::repetition).
    pub repetition_penalty: f64,
}

impl Default for SamplingDefaults {
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0 }
    }
}

const FILE: &str = "generation_config.json";

impl SamplingDefaults {
    /// Those of the directory of a model. `top_k` counts only if the file sets it: transformers' own default of 50 is not the
    /// model's.
    ///
    /// # Errors
    ///
    /// [`InferError::ModelFile`] for a file that cannot be read, or a value out of range.
    pub fn from_model_dir(dir: &Path) -> Result<Self, InferError> {
        let read = ModelFiles::new(dir).read(FILE, MAX_SETTINGS_BYTES);
        let text = read.map_err(|(path, problem)| InferError::ModelFile { path, problem })?;
        let parsed = text.map_or(Ok(Self::default()), |text| Self::parse(&text));
        parsed.map_err(|problem| InferError::ModelFile { path: dir.join(FILE), problem })
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        let value: Value = serde_json::from_slice(text).map_err(|error| format!("it is not JSON: {error}"))?;
        let number = |name: &str, default: f64, accepts: fn(f64) -> bool| match &value[name] {
            Value::Null => Ok(default),
            set => set.as_f64().filter(|&set| accepts(set)).ok_or_else(|| format!("its `{name}` is {set}")),
        };
        let standard = Self::default();
        Ok(Self {
            temperature: number("temperature", standard.temperature, |value| value >= 0.0)?,
            top_p: number("top_p", standard.top_p, |value| (0.0..=1.0).contains(&value))?,
            top_k: number("top_k", 0.0, |value| value >= 0.0 && value.fract() == 0.0 && value < 1e9)? as usize,
            repetition_penalty: number("repetition_penalty", standard.repetition_penalty, |value| value > 0.0)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_models_own_settings_are_the_defaults() {
        let home = tempfile::tempdir().unwrap();
        assert_eq!(SamplingDefaults::from_model_dir(home.path()).unwrap(), SamplingDefaults::default());
        let write = |text: &str| std::fs::write(home.path().join(FILE), text).unwrap();
        write(r#"{"temperature": 0.6, "top_p": 0.95, "eos_token_id": 3}"#);
        let expected = SamplingDefaults { temperature: 0.6, top_p: 0.95, ..SamplingDefaults::default() };
        assert_eq!(SamplingDefaults::from_model_dir(home.path()).unwrap(), expected);
        write(r#"{"top_p": 7}"#);
        let error = SamplingDefaults::from_model_dir(home.path()).unwrap_err().to_string();
        assert!(error.ends_with("cannot be read: its `top_p` is 7"), "{error}");
    }
}
