//! A checkpoint's tensors into a model.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Bytes, DType, Device, Tensor, TensorData};
use moonlight_model::CausalLm;
use rayon::prelude::*;
use safetensors::Dtype;

use crate::checkpoint::Checkpoint;
use crate::error::CheckpointError;
use crate::names::Skip;
use crate::plan::{Filling, Plan};
use crate::values::convert;

/// A model with a checkpoint's weights.
#[derive(Debug)]
pub struct Loaded {
    /// The model.
    pub model: CausalLm,
    /// What was passed over, by reason.
    pub skipped: BTreeMap<Skip, Vec<String>>,
}

/// Opens a directory and loads its model; see [`Checkpoint::open`] and [`Checkpoint::load`].
///
/// # Errors
///
/// [`CheckpointError`].
pub fn load(dir: &Path, device: &Device, dtype: Option<DType>) -> Result<Loaded, CheckpointError> {
    Checkpoint::open(dir)?.load(device, dtype)
}

impl Checkpoint {
    /// What the model has and the checkpoint lacks, and the reverse, without copying anything.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Mismatch`], which names it all.
    pub fn check(&self) -> Result<BTreeMap<Skip, Vec<String>>, CheckpointError> {
        Plan::new(self).map(|plan| plan.skipped)
    }

    /// Loads the model onto a device, in `dtype` or as stored.
    ///
    /// Every name, shape and dtype is checked before the first byte is copied. The router's correction bias is f32
    /// whatever the dtype.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Mismatch`] where tensors are missing, unexpected or misshapen, and
    /// [`CheckpointError::NotFinite`] for weights that are NaN or infinite in the dtype asked for.
    pub fn load(&self, device: &Device, dtype: Option<DType>) -> Result<Loaded, CheckpointError> {
        let plan = Plan::new(self)?;
        let mut loader = Loader { plan: &plan, checkpoint: self, dtype, path: Vec::new(), error: None };
        let model = self.config().init(device).map(&mut loader);
        match loader.error {
            Some(error) => Err(error),
            None => Ok(Loaded { model, skipped: plan.skipped }),
        }
    }
}

/// Replaces each parameter, not yet drawn, by the checkpoint's.
struct Loader<'a> {
    plan: &'a Plan<'a>,
    checkpoint: &'a Checkpoint,
    dtype: Option<DType>,
    path: Vec<String>,
    error: Option<CheckpointError>,
}

impl ModuleMapper for Loader<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.error.is_some() {
            return param;
        }
        let path = self.path.join(".");
        let filling = self.plan.parameters.get(&path).expect("the configuration lists every parameter of its model");
        match self.data(filling) {
            Ok(data) => {
                let dtype = data.dtype();
                let tensor = Tensor::from_data(data, (&param.lazy_device(), dtype));
                let id = param.id;
                param.transform_for_load(tensor, id)
            }
            Err(error) => {
                self.error = Some(error);
                param
            }
        }
    }
}

impl Loader<'_> {
    fn data(&self, filling: &Filling<'_>) -> Result<TensorData, CheckpointError> {
        let stored = filling.parts[0].tensor.dtype;
        let dtype = if filling.keeps_f32() { DType::F32 } else { self.dtype.unwrap_or_else(|| tensor_dtype(stored)) };
        let target = file_dtype(dtype);
        let size = target.bitsize() / 8;
        let mut bytes = vec![0; filling.parameter.count() as usize * size];
        let part_size = bytes.len() / filling.parts.len();
        bytes.par_chunks_mut(part_size.max(1)).zip(&filling.parts).try_for_each(|(target_bytes, part)| {
            if convert(part.data, part.tensor.dtype, target_bytes, target, part.transpose) {
                Ok(())
            } else {
                let path = self.checkpoint.file(part.tensor).to_owned();
                Err(CheckpointError::NotFinite { tensor: part.name.clone(), path })
            }
        })?;
        Ok(TensorData::from_bytes(Bytes::from_bytes_vec(bytes), filling.parameter.shape.clone(), dtype))
    }
}

fn tensor_dtype(dtype: Dtype) -> DType {
    match dtype {
        Dtype::BF16 => DType::BF16,
        Dtype::F16 => DType::F16,
        Dtype::F32 => DType::F32,
        other => unreachable!("the plan refuses {other:?}"),
    }
}

/// The dtype of the files for a tensor's.
///
/// # Panics
///
/// For dtypes that weights cannot have; the programs offer none of them.
pub(crate) fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::F32 => Dtype::F32,
        other => panic!("weights are f32, bf16 or f16, not {other:?}"),
    }
}
