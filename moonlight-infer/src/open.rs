//! A model that is ready to run: weights, tokenizer, and the tokens that end a text.

use std::path::{Path, PathBuf};

use moonlight_model::{CausalLm, QuantBits};
use serde_json::Value;

use crate::chat::{ChatEncoder, ChatTemplate};
use crate::device::{self, Target};
use crate::error::InferError;
use crate::load_model::{LoadedModel, load_model};
use crate::model_dir::{ModelDir, resolve_model, weights_in};
use crate::tokenizer::Tokenizer;

/// How to open a model.
///
/// | option | default |
/// |---|---|
/// | [`with_device`](Self::with_device) | `auto`: the first that the build has of CUDA, Metal, Vulkan, WGPU and the CPU |
/// | [`with_dtype`](Self::with_dtype) | `auto`: f32 on the CPU, elsewhere as stored |
/// | [`with_adapter`](Self::with_adapter) | none; an adapter's folder may be opened as the model |
/// | [`with_bits`](Self::with_bits) | none: weights as they are |
#[derive(Debug, Clone)]
pub struct OpenOptions {
    device: String,
    dtype: String,
    adapter: Option<PathBuf>,
    bits: Option<QuantBits>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { device: "auto".into(), dtype: "auto".into(), adapter: None, bits: None }
    }
}

impl OpenOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// `cpu`, `cuda[:N]`, `wgpu[:N]`, `vulkan[:N]`, `metal` or `auto`.
    pub fn with_device(self, device: impl Into<String>) -> Self {
        Self { device: device.into(), ..self }
    }

    /// `f32`, `bf16`, `f16` or `auto`.
    pub fn with_dtype(self, dtype: impl Into<String>) -> Self {
        Self { dtype: dtype.into(), ..self }
    }

    /// The folder of an adapter, or of a training run of adapters, to put beside the model.
    pub fn with_adapter(self, adapter: impl Into<PathBuf>) -> Self {
        Self { adapter: Some(adapter.into()), ..self }
    }

    /// Quantizes the layers' projections to so many bits, with a scale for each 64 weights.
    pub fn with_bits(self, bits: QuantBits) -> Self {
        Self { bits: Some(bits), ..self }
    }

    /// Opens what `model` names in any of the ways of [`resolve_model`].
    ///
    /// # Errors
    ///
    /// [`InferError`]: a device that this build does not have, a dtype that is none, weights, an adapter or a tokenizer
    /// that cannot be read.
    pub fn open(&self, model: impl AsRef<Path>) -> Result<OpenedModel, InferError> {
        let target = Target::open(&self.device)?;
        let dtype = device::dtype(&self.dtype, &target)?;
        let dir = resolve_model(model)?;
        let adapter = self.adapter.as_deref().map(weights_in).transpose()?;
        let LoadedModel { model, dir } = load_model(&dir, adapter.as_deref(), &target.device, dtype, self.bits)?;
        let tokenizer = Tokenizer::from_model_dir(&dir)?;
        let eos = generation_eos(&dir).unwrap_or_else(|| model.config().eos_token_id.clone());
        Ok(OpenedModel { dir, model, tokenizer, eos })
    }
}

/// A model that is ready to run.
#[derive(Debug)]
pub struct OpenedModel {
    /// The folder that it came from; an adapter's base.
    pub dir: ModelDir,
    /// The model.
    pub model: CausalLm,
    /// The tokenizer of its folder, where that has one.
    pub tokenizer: Option<Tokenizer>,
    /// Tokens that end a text: those of `generation_config.json`, else of `config.json`.
    pub eos: Vec<u32>,
}

impl OpenedModel {
    /// The tokenizer.
    ///
    /// # Errors
    ///
    /// [`InferError::NoTokenizer`] where the model's folder has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer, InferError> {
        self.tokenizer.as_ref().ok_or_else(|| InferError::NoTokenizer(self.dir.to_path_buf()))
    }

    /// Turns conversations into tokens, by the chat template of the model's folder.
    ///
    /// # Errors
    ///
    /// [`InferError::NoTokenizer`], and [`InferError::Chat`] for a template that is absent or broken.
    pub fn chat_encoder(&self) -> Result<ChatEncoder, InferError> {
        let tokenizer = self.tokenizer()?;
        Ok(ChatEncoder::new(ChatTemplate::of_model(&self.dir, tokenizer)?, tokenizer.clone()))
    }

    /// The tokens that end an answer: [`eos`](Self::eos) and, since a base model's files do not name it, the token that
    /// ends a turn (`<|im_end|>`).
    pub fn end_of_turn(&self) -> Vec<u32> {
        let turn = self.tokenizer.as_ref().and_then(|tokenizer| tokenizer.special("<|im_end|>"));
        self.eos.iter().copied().chain(turn).collect()
    }
}

/// `eos_token_id` of `generation_config.json`, one or a list.
fn generation_eos(dir: &Path) -> Option<Vec<u32>> {
    let text = std::fs::read_to_string(dir.join("generation_config.json")).ok()?;
    let value: Value = serde_json::from_str(&text).ok()?;
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value.get("eos_token_id")? {
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => id(one).map(|id| vec![id]),
    }
}
