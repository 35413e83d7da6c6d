//! A model from a folder: a checkpoint, an adapter with the model that it belongs to, or both by name.

use std::path::Path;

use burn::tensor::{DType, Device};
use moonlight_convert::adapter::{base_of, is_adapter, load_adapter_with_head};
use moonlight_convert::{Checkpoint, CheckpointError};
use moonlight_model::{CausalLm, QuantBits};

use crate::error::InferError;
use crate::model_dir::{ModelDir, resolve_weights};

/// A model, and where it came from.
#[derive(Debug)]
pub struct LoadedModel {
    /// The model, with the adapter beside its weights where there is one.
    pub model: CausalLm,
    /// The folder of the model; that of an adapter's base where an adapter was opened.
    pub dir: ModelDir,
}

/// Loads the model of a folder or, for the folder of an adapter, the base that its configuration names with the adapter;
/// and puts `adapter` beside it.
///
/// `dtype` is that of the model's weights; `None` keeps them as stored. With `bits` its projections are quantized while
/// they are read, so that the whole model is never in memory.
///
/// # Errors
///
/// [`InferError::Checkpoint`] and [`InferError::Adapter`] for what cannot be opened, [`InferError::AdapterOnAdapter`] for
/// two adapters.
pub fn load_model(
    dir: &Path,
    adapter: Option<&Path>,
    device: &Device,
    dtype: Option<DType>,
    bits: Option<QuantBits>,
) -> Result<LoadedModel, InferError> {
    let (base, adapter) = match (is_adapter(dir), adapter) {
        (true, Some(_)) => return Err(InferError::AdapterOnAdapter(dir.to_owned())),
        (true, None) => (base_of(dir)?, Some(dir)),
        (false, adapter) => (dir.to_owned(), adapter),
    };
    let base = resolve_weights(&base)?;
    let checkpoint = Checkpoint::open(&base)?;
    let model = load_opened(&checkpoint, device, dtype, bits)?;
    let model = match adapter {
        Some(adapter) => load_adapter_with_head(model, checkpoint.tied_head(), adapter)?,
        None => model,
    };
    Ok(LoadedModel { model, dir: base })
}

/// The model of a checkpoint's folder, without an adapter; `dtype` and `bits` are those of [`load_model`].
///
/// # Errors
///
/// [`CheckpointError`] for what cannot be opened.
pub fn load_base(
    dir: &Path,
    device: &Device,
    dtype: Option<DType>,
    bits: Option<QuantBits>,
) -> Result<CausalLm, CheckpointError> {
    load_opened(&Checkpoint::open(dir)?, device, dtype, bits)
}

fn load_opened(
    checkpoint: &Checkpoint,
    device: &Device,
    dtype: Option<DType>,
    bits: Option<QuantBits>,
) -> Result<CausalLm, CheckpointError> {
    match bits {
        None => Ok(checkpoint.load(device, dtype)?.model),
        Some(bits) => checkpoint.load_quantized(device, dtype, bits),
    }
}
