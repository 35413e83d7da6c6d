//! [`ModelVersion`]: a model of an engine. Replacing a model under a name makes a new version.

use std::sync::Mutex;

use burn::tensor::{DType, Device};
use moonlight_model::{CausalLm, PreparedWeights};

use super::error::EngineError;

/// A model that requests hold, so that it is freed with the last of them.
#[derive(Debug)]
pub(super) struct ModelVersion {
    /// Unique in an engine: keys and values are used again only within one version.
    pub(super) id: u64,
    pub(super) model: CausalLm,
    /// What the cache prepares for this model. Only the engine's thread locks it.
    pub(super) prepared: Mutex<PreparedWeights>,
}

impl ModelVersion {
    pub(super) fn new(id: u64, model: CausalLm) -> Self {
        Self { id, model, prepared: Mutex::default() }
    }
}

/// What models over one cache have in common.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct CacheShape {
    layers: usize,
    /// `[key heads, values of each head]`.
    row: [usize; 2],
    pub(super) dtype: DType,
    pub(super) device: Device,
}

impl CacheShape {
    pub(super) fn of(model: &CausalLm) -> Self {
        let config = model.config();
        Self {
            layers: config.num_hidden_layers,
            row: config.attention_widths().cache,
            dtype: model.cache_dtype(),
            device: model.embed_tokens.weight.val().device(),
        }
    }

    /// # Errors
    ///
    /// [`EngineError::OtherModel`] if `other`, the shape of the model `name`, differs.
    pub(super) fn check(&self, name: &str, other: &Self) -> Result<(), EngineError> {
        let problem = if other.layers != self.layers {
            format!("it has {} layers, not {}", other.layers, self.layers)
        } else if other.row != self.row {
            let row = |[heads, width]: [usize; 2]| format!("{heads} x {width} values");
            format!("it caches {} for each token and layer, not {}", row(other.row), row(self.row))
        } else if other.dtype != self.dtype {
            format!("its KV cache is {:?}, not {:?}", other.dtype, self.dtype)
        } else if other.device != self.device {
            "it is on another device".into()
        } else {
            return Ok(());
        };
        Err(EngineError::OtherModel { name: name.into(), problem })
    }
}
