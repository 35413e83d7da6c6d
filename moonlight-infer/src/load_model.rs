//! Loads a model from the directory of a checkpoint, or of an adapter together with its base model.

use std::path::Path;

use burn::tensor::{DType, Device};
use moonlight_convert::adapter::{base_of, is_adapter, load_adapter_with_head};
use moonlight_convert::{Checkpoint, CheckpointError, LoadQuantization};
use moonlight_model::CausalLm;

use crate::error::InferError;
use crate::model_dir::{ModelDir, resolve_weights};

/// A model, and the directory that it was loaded from.
#[derive(Debug)]
pub struct LoadedModel {
    /// The model, with the adapter as separate LoRA weights if there is one.
    pub model: CausalLm,
    /// The directory of the checkpoint; for an adapter, that of its base model.
    pub dir: ModelDir,
}

/// Loads a checkpoint, and `adapter` if there is one. If `dir` is itself the directory of an adapter, loads the base model
/// that its `adapter_config.json` names, and that adapter.
///
/// The weights are loaded as `dtype`; `None` keeps the dtype of the checkpoint. Projections that are quantized in memory are so as
/// they are read: the complete unquantized model is never in memory.
///
/// # Errors
///
/// [`InferError::Checkpoint`] or [`InferError::Adapter`] for files that cannot be loaded, [`InferError::AdapterOnAdapter`] if
/// both `dir` and `adapter` are adapters.
pub fn load_model(
    dir: &Path,
    adapter: Option<&Path>,
    device: &Device,
    dtype: Option<DType>,
    quantization: LoadQuantization,
) -> Result<LoadedModel, InferError> {
    let (base, adapter) = match (is_adapter(dir), adapter) {
        (true, Some(_)) => return Err(InferError::AdapterOnAdapter(dir.to_owned())),
        (true, None) => (base_of(dir)?, Some(dir)),
        (false, adapter) => (dir.to_owned(), adapter),
    };
    // The base model of an adapter may be the folder of a run. Its checkpoint is locked as long as the returned `dir` exists.
    let base = resolve_weights(&base)?;
    let checkpoint = Checkpoint::open(&base)?;
    let model = load_opened(&checkpoint, device, dtype, quantization)?;
    let model = match adapter {
        Some(adapter) => load_adapter_with_head(model, checkpoint.tied_head(), adapter)?,
        None => model,
    };
    Ok(LoadedModel { model, dir: base })
}

/// Loads a checkpoint without an adapter; `dtype` and `quantization` as in [`load_model`].
///
/// # Errors
///
/// [`CheckpointError`] for files that cannot be loaded.
pub fn load_base(
    dir: &Path,
    device: &Device,
    dtype: Option<DType>,
    quantization: LoadQuantization,
) -> Result<CausalLm, CheckpointError> {
    load_opened(&Checkpoint::open(dir)?, device, dtype, quantization)
}

fn load_opened(
    checkpoint: &Checkpoint,
    device: &Device,
    dtype: Option<DType>,
    quantization: LoadQuantization,
) -> Result<CausalLm, CheckpointError> {
    Ok(checkpoint.load_with(device, dtype, quantization)?.model)
}
