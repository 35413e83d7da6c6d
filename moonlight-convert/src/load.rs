//! Loading: from the mapped files straight into the model's parameters.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use moonlight_model::CausalLm;
use moonlight_model::config::ParameterKind;
use rayon::prelude::*;

use crate::check::{Piece, Plan, Planned};
use crate::checkpoint::Checkpoint;
use crate::elements::{self, Outcome, Weight, WeightDtype, with_weight};
use crate::error::CheckpointError;
use crate::names::{self, SkipReason};

/// A model with the weights of a checkpoint.
#[derive(Debug)]
pub struct Loaded {
    /// The model.
    pub model: CausalLm,
    /// What was read and what was passed over.
    pub report: LoadReport,
}

/// What loading read and passed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadReport {
    /// The dtype of the model's weights (the router's own and its correction bias apart).
    pub dtype: WeightDtype,
    /// Parameters of the model that were filled.
    pub parameters: usize,
    /// Tensors of the files that they were made of.
    pub tensors: usize,
    /// Bytes that were read from the files.
    pub bytes: u64,
    /// The names of tensors that have no place in the model, and need not have one.
    pub skipped: BTreeMap<SkipReason, Vec<String>>,
}

impl fmt::Display for LoadReport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = crate::error::Bytes(self.bytes);
        write!(formatter, "{} tensors, {bytes}, as {}", self.tensors, self.dtype)?;
        for (reason, names) in &self.skipped {
            write!(formatter, "; skipped {}: {}", names.len(), reason.describe())?;
        }
        Ok(())
    }
}

/// Loads a Hugging Face directory onto `device`.
///
/// `dtype` is that of the weights in memory; `None` keeps them as they are stored, or where the files mix dtypes, in the
/// widest of them, which loses nothing. Two tensors go their own way: the router's correction bias is always f32, and
/// with `None` the router's matrix keeps its own dtype.
///
/// Every name, shape and dtype is checked before the first byte is copied, and every value on its way.
///
/// # Errors
///
/// [`CheckpointError`]: what [`Checkpoint::open`] refuses, all that does not fit the model in one error, a value that is
/// infinite or NaN, or a dtype that the device does not have.
pub fn load(dir: &Path, device: &Device, dtype: Option<DType>) -> Result<Loaded, CheckpointError> {
    Checkpoint::open(dir)?.load(device, dtype)
}

impl Checkpoint {
    /// [`load`](crate::load) of a checkpoint that is open already.
    ///
    /// # Errors
    ///
    /// Those of [`load`](crate::load).
    pub fn load(&self, device: &Device, dtype: Option<DType>) -> Result<Loaded, CheckpointError> {
        let dtype = dtype.map(weight_dtype).transpose()?;
        let plan = self.checked_plan()?;
        let common = dtype.unwrap_or_else(|| stored_dtype(&plan));
        for needed in [common, WeightDtype::F32] {
            if !device.supports_dtype(DType::from(needed)) {
                return Err(CheckpointError::DeviceDtype { dtype: needed });
            }
        }
        let mut filling = Filling {
            checkpoint: self,
            plan: &plan,
            device,
            dtype,
            common,
            path: Vec::new(),
            filled: 0,
            failure: None,
        };
        let model = self.config().init(device).map(&mut filling);
        if let Some(failure) = filling.failure {
            return Err(failure);
        }
        assert_eq!(filling.filled, plan.parameters.len(), "the list of parameters is that of the module");
        let pieces = || plan.parameters.iter().flat_map(|planned| &planned.pieces);
        let report = LoadReport {
            dtype: common,
            parameters: plan.parameters.len(),
            tensors: pieces().count(),
            bytes: pieces().map(|piece| piece.range.len() as u64).sum(),
            skipped: plan.skipped,
        };
        Ok(Loaded { model, report })
    }

    /// The values of a parameter in Burn's layout.
    fn read<T: Weight>(&self, planned: &Planned) -> Result<Vec<T>, CheckpointError> {
        let Planned { parameter, pieces } = planned;
        for piece in pieces {
            self.prefetch(self.tensor_list()[piece.source].shard, &piece.range);
        }
        let length: usize = parameter.shape.iter().product();
        let mut target = vec![T::default(); length];
        target.par_chunks_mut((length / pieces.len().max(1)).max(1)).zip(pieces).try_for_each(|(target, piece)| {
            with_weight!(piece.dtype, S => {
                let source = self.values::<S>(piece);
                let outcome = match piece.tensor.shape.as_slice() {
                    &[rows, columns] if names::transposed(parameter.kind) => {
                        elements::transpose(&source, rows, columns, 0, target)
                    }
                    _ => elements::convert(&source, target),
                };
                match outcome {
                    Outcome::Finite => Ok(()),
                    Outcome::NotFinite => Err(self.blame::<S, T>(piece, &source)),
                }
            })
        })?;
        Ok(target)
    }

    /// A piece's values as they are stored.
    pub(crate) fn values<S: Weight>(&self, piece: &Piece) -> std::borrow::Cow<'_, [S]> {
        elements::values(self.bytes(self.tensor_list()[piece.source].shard, piece.range.clone()))
    }

    /// Whose fault it is that a converted value is not finite.
    pub(crate) fn blame<S: Weight, T: Weight>(&self, piece: &Piece, source: &[S]) -> CheckpointError {
        let found = &self.tensor_list()[piece.source];
        let (tensor, file) = (found.name.clone(), Some(self.dir().join(&found.file)));
        match WeightDtype::try_from(T::dtype()) {
            Ok(dtype) if source.iter().all(|value| value.finite()) => CheckpointError::Overflow { tensor, file, dtype },
            _ => CheckpointError::NotFinite { tensor, file },
        }
    }
}

pub(crate) fn weight_dtype(dtype: DType) -> Result<WeightDtype, CheckpointError> {
    WeightDtype::try_from(dtype).map_err(|dtype| CheckpointError::Dtype { dtype: format!("{dtype:?}").to_lowercase() })
}

/// The widest dtype of the weights; routers do not count.
pub(crate) fn stored_dtype(plan: &Plan) -> WeightDtype {
    let counts = |kind| !matches!(kind, ParameterKind::Router | ParameterKind::CorrectionBias);
    plan.parameters
        .iter()
        .filter(|planned| counts(planned.parameter.kind))
        .map(Planned::stored)
        .reduce(WeightDtype::widest)
        .unwrap_or(WeightDtype::F32)
}

/// Replaces the parameters of a fresh model, which have not been drawn yet and never are.
struct Filling<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a Plan,
    device: &'a Device,
    dtype: Option<WeightDtype>,
    common: WeightDtype,
    path: Vec<String>,
    /// How many have been replaced: the plan has them in the module's order.
    filled: usize,
    failure: Option<CheckpointError>,
}

impl Filling<'_> {
    fn data(&self, planned: &Planned) -> Result<TensorData, CheckpointError> {
        let dtype = match (planned.parameter.kind, self.dtype) {
            (ParameterKind::CorrectionBias, _) => WeightDtype::F32,
            (ParameterKind::Router, None) => planned.stored(),
            _ => self.common,
        };
        let shape = planned.parameter.shape.clone();
        with_weight!(dtype, T => Ok(TensorData::new(self.checkpoint.read::<T>(planned)?, shape)))
    }
}

impl ModuleMapper for Filling<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.failure.is_some() {
            return param;
        }
        let planned =
            self.plan.parameters.get(self.filled).filter(|planned| planned.parameter.path == self.path.join("."));
        let planned = planned.unwrap_or_else(|| panic!("{} is in the list of parameters", self.path.join(".")));
        self.filled += 1;
        match self.data(planned) {
            Ok(data) => {
                let dtype = data.dtype();
                let tensor = Tensor::from_data(data, (self.device, dtype));
                let id = param.id;
                param.transform_for_load(tensor, id)
            }
            Err(failure) => {
                self.failure = Some(failure);
                param
            }
        }
    }
}
