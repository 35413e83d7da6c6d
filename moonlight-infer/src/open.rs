//! Opens a model with everything that is needed to run it: weights, tokenizer, and the tokens that end a text.

use std::path::{Path, PathBuf};

use moonlight_convert::LoadQuantization;
use moonlight_model::CausalLm;
use serde_json::Value;

use crate::chat::{ChatEncoder, ChatTemplate};
use crate::device::{self, ComputeDevice};
use crate::error::InferError;
use crate::load_model::{LoadedModel, load_model};
use crate::model_dir::{ModelDir, resolve_model, resolve_weights};
use crate::model_files::{MAX_SETTINGS_BYTES, ModelFiles};
use crate::tokenizer::Tokenizer;

/// Options for opening a model.
///
/// | option | default |
/// |---|---|
/// | [`with_device`](Self::with_device) | `auto`: the first of CUDA, Metal, Vulkan, WGPU and CPU that is compiled in |
/// | [`with_dtype`](Self::with_dtype) | `auto`: f32 on the CPU, the dtype of the checkpoint on other devices |
/// | [`with_adapter`](Self::with_adapter) | none; the directory of an adapter can also be opened as a model |
/// | [`with_quantization`](Self::with_quantization) | on the CPU as stored: quantized weights stay quantized; on other devices they are dequantized |
#[derive(Debug, Clone)]
pub struct OpenOptions {
    device: String,
    dtype: String,
    adapter: Option<PathBuf>,
    quantization: Option<LoadQuantization>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { device: "auto".into(), dtype: "auto".into(), adapter: None, quantization: None }
    }
}

impl OpenOptions {
    /// The default options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the device: `cpu`, `cuda[:N]`, `wgpu[:N]`, `vulkan[:N]`, `metal` or `auto`.
    pub fn with_device(self, device: impl Into<String>) -> Self {
        Self { device: device.into(), ..self }
    }

    /// Sets the dtype of the weights: `f32`, `bf16`, `f16` or `auto`.
    pub fn with_dtype(self, dtype: impl Into<String>) -> Self {
        Self { dtype: dtype.into(), ..self }
    }

    /// Applies an adapter to the model: its directory, or the folder of a LoRA run.
    pub fn with_adapter(self, adapter: impl Into<PathBuf>) -> Self {
        Self { adapter: Some(adapter.into()), ..self }
    }

    /// Sets which weights are quantized in memory, with a scale for each block of 32 weights.
    pub fn with_quantization(self, quantization: LoadQuantization) -> Self {
        Self { quantization: Some(quantization), ..self }
    }

    /// Opens a model by any name that [`resolve_model`] accepts.
    ///
    /// # Errors
    ///
    /// [`InferError`]: an unknown or unavailable device, an unknown dtype; weights, an adapter or a tokenizer that cannot be
    /// read.
    pub fn open(&self, model: impl AsRef<Path>) -> Result<OpenedModel, InferError> {
        let target = ComputeDevice::open(&self.device)?;
        let dtype = device::parse_dtype(&self.dtype, &target)?;
        let dir = resolve_model(model)?;
        let adapter = self.adapter.as_deref().map(resolve_weights).transpose()?;
        // The kernels for integers are those of the CPU.
        let default = if target.is_cpu { LoadQuantization::AsStored } else { LoadQuantization::Dequantize };
        let quantization = self.quantization.unwrap_or(default);
        let LoadedModel { model, dir } = load_model(&dir, adapter.as_deref(), &target.device, dtype, quantization)?;
        let tokenizer = Tokenizer::from_model_dir(&dir)?;
        let mut eos = generation_eos(&dir)?.unwrap_or_else(|| model.config().eos_token_id.clone());
        if eos.is_empty() {
            eos.extend(tokenizer.as_ref().and_then(Tokenizer::eos));
        }
        Ok(OpenedModel { dir, model, tokenizer, eos })
    }
}

/// A model with its tokenizer.
#[derive(Debug)]
pub struct OpenedModel {
    /// The directory of the checkpoint; for an adapter, that of its base model.
    pub dir: ModelDir,
    /// The model, with its adapter if there is one.
    pub model: CausalLm,
    /// The tokenizer in `dir`, if there is one.
    pub tokenizer: Option<Tokenizer>,
    /// The tokens that end a text: those of `generation_config.json`, else those of `config.json`, else the tokenizer's EOS.
    pub eos: Vec<u32>,
}

impl OpenedModel {
    /// The tokenizer, or an error if there is none.
    ///
    /// # Errors
    ///
    /// [`InferError::NoTokenizer`].
    pub fn tokenizer(&self) -> Result<&Tokenizer, InferError> {
        self.tokenizer.as_ref().ok_or_else(|| InferError::NoTokenizer(self.dir.to_path_buf()))
    }

    /// An encoder for conversations, with the chat template of the model.
    ///
    /// # Errors
    ///
    /// [`InferError::NoTokenizer`], and [`InferError::Chat`] for a missing or invalid template.
    pub fn chat_encoder(&self) -> Result<ChatEncoder, InferError> {
        let tokenizer = self.tokenizer()?;
        Ok(ChatEncoder::new(ChatTemplate::from_model_dir(&self.dir, tokenizer)?, tokenizer.clone()))
    }

    /// The tokens that end an answer in a chat: [`eos`](Self::eos), the tokenizer's EOS, and the token with which the chat
    /// template ends a turn ([`ChatEncoder::end_token`]). The files of a base model do not list the last of these, but a model
    /// that was fine-tuned from it with the template writes it.
    pub fn end_of_turn(&self, chat: &ChatEncoder) -> Vec<u32> {
        let tokenizer = self.tokenizer.as_ref().and_then(Tokenizer::eos);
        let mut tokens = self.eos.clone();
        for token in tokenizer.into_iter().chain(chat.end_token()) {
            if !tokens.contains(&token) {
                tokens.push(token);
            }
        }
        tokens
    }
}

const GENERATION: &str = "generation_config.json";

/// The `eos_token_id` of `generation_config.json`, which is a token or a list; `None` if it is not set.
fn generation_eos(dir: &Path) -> Result<Option<Vec<u32>>, InferError> {
    let read = ModelFiles::new(dir).read(GENERATION, MAX_SETTINGS_BYTES);
    let Some(text) = read.map_err(|(path, problem)| InferError::ModelFile { path, problem })? else { return Ok(None) };
    let invalid = |problem: String| InferError::ModelFile { path: dir.join(GENERATION), problem };
    let value: Value = serde_json::from_slice(&text).map_err(|error| invalid(format!("it is not JSON: {error}")))?;
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    // -1 means none, as in `config.json`.
    let none = |value: &Value| value.as_i64() == Some(-1);
    let ids: Option<Vec<u32>> = match &value["eos_token_id"] {
        Value::Null => return Ok(None),
        Value::Array(ids) => ids.iter().filter(|value| !none(value)).map(id).collect(),
        one if none(one) => return Ok(None),
        one => id(one).map(|id| vec![id]),
    };
    ids.map(Some).ok_or_else(|| invalid("its `eos_token_id` is neither a token nor a list of tokens".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_generation_config_is_an_error() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path();
        let path = dir.join(GENERATION);
        assert_eq!(generation_eos(dir).unwrap(), None);
        for (text, expected) in [
            ("{}", None),
            (r#"{"eos_token_id": -1}"#, None),
            (r#"{"eos_token_id": 3}"#, Some(vec![3])),
            (r#"{"eos_token_id": [3, -1, 4]}"#, Some(vec![3, 4])),
        ] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(generation_eos(dir).unwrap(), expected);
        }
        for (text, expected) in [("{", "it is not JSON"), (r#"{"eos_token_id": [-2]}"#, "neither a token nor a list")] {
            std::fs::write(&path, text).unwrap();
            let error = generation_eos(dir).unwrap_err().to_string();
            assert!(error.contains("generation_config.json` cannot be read: ") && error.contains(expected), "{error}");
        }
    }
}
