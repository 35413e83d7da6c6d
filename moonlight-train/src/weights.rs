//! A model from a folder: a checkpoint, an adapter with the model that it belongs to, or both by name.

use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device};
use moonlight_convert::adapter::{base_of, is_adapter, load_adapter};
use moonlight_convert::{Checkpoint, CheckpointError, load};
use moonlight_model::{CausalLm, QuantBits};

use crate::error::TrainError;

/// A model, and where it came from.
#[derive(Debug)]
pub struct Weights {
    /// The model, with the adapter beside its weights where there is one.
    pub model: CausalLm,
    /// The folder of the model; that of an adapter's base where an adapter was opened.
    pub base: PathBuf,
}

impl Weights {
    /// Opens the folder of a model, or of an adapter, whose configuration names its base; and puts `adapter` beside it.
    /// `dtype` is that of the model's weights; `None` keeps them as stored. With `bits` its projections are packed.
    ///
    /// # Errors
    ///
    /// [`TrainError`] for what cannot be opened, and for two adapters.
    pub fn open(
        dir: &Path,
        adapter: Option<&Path>,
        device: &Device,
        dtype: Option<DType>,
        bits: Option<QuantBits>,
    ) -> Result<Self, TrainError> {
        let (base, adapter) = match (is_adapter(dir), adapter) {
            (true, Some(_)) => {
                return Err(TrainError::Request {
                    problem: format!("`{}` is itself an adapter", dir.display()),
                    hint: Some("`--model` beside `--adapter` is the model that the adapter belongs to".into()),
                });
            }
            (true, None) => (base_of(dir)?, Some(dir)),
            (false, adapter) => (dir.to_owned(), adapter),
        };
        let model = load_base(&base, device, dtype, bits)?;
        let model = match adapter {
            Some(adapter) => load_adapter(model, adapter)?,
            None => model,
        };
        Ok(Self { model, base })
    }
}

/// A model in full or, with `bits`, with packed projections.
pub(crate) fn load_base(
    dir: &Path,
    device: &Device,
    dtype: Option<DType>,
    bits: Option<QuantBits>,
) -> Result<CausalLm, CheckpointError> {
    match bits {
        None => Ok(load(dir, device, dtype)?.model),
        Some(bits) => Checkpoint::open(dir)?.load_packed(device, dtype, bits),
    }
}
