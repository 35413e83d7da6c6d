//! Loading: from the files straight into the model's parameters.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use moonlight_model::config::ParameterKind;
use moonlight_model::disjoint::DisjointMut;
use moonlight_model::{CausalLm, QuantBits};

use crate::checkpoint::Checkpoint;
use crate::dtype::conversion::{Outcome, Weight, WeightDtype, all_finite, with_weight};
use crate::dtype::dequantize::{Layout, SourceTensor};
use crate::dtype::transpose::HEIGHT;
use crate::error::CheckpointError;
use crate::io::huge_pages;
use crate::io::parallel_copy::{self, RowChunk, in_order};
use crate::io::prefetch::PrefetchReader;
use crate::mapping::load_plan::{LoadPlan, PlannedParameter, Scope};
use crate::mapping::names::SkipReason;

/// Bytes that a thread reads at a time, about.
const CHUNK: usize = 1 << 20;
/// Rows of a matrix that is transposed, at least: fewer would write to more cache lines than they fill.
const MIN_ROWS: usize = 64;

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
    /// Parameters of the model that were loaded.
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
        let plan = self.checked_plan(Scope::All)?;
        self.warn(&plan);
        let (model, report) = self.fill(self.config().init(device), "", &plan, device, dtype)?;
        Ok(Loaded { model, report })
    }

    /// [`load`](Checkpoint::load) with the projections of all layers in few bits and frozen. Each layer is packed as soon as
    /// it is there, so that no more than one is in memory in full.
    ///
    /// # Errors
    ///
    /// Those of [`load`](crate::load).
    pub fn load_quantized(
        &self,
        device: &Device,
        dtype: Option<DType>,
        bits: QuantBits,
    ) -> Result<CausalLm, CheckpointError> {
        self.warn(&self.checked_plan(Scope::All)?);
        let mut model = self.config().init(device);
        model.embed_tokens = self.load_part(model.embed_tokens, "embed_tokens", device, dtype)?.0;
        model.norm = self.load_part(model.norm, "norm", device, dtype)?.0;
        if let Some(head) = model.lm_head.take() {
            model.lm_head = Some(self.load_part(head, "lm_head", device, dtype)?.0);
        }
        model.layers = (0..self.config().num_hidden_layers)
            .map(|layer| {
                let fresh = self.config().init_layer(layer, device);
                let (loaded, _) = self.load_part(fresh, &format!("layers.{layer}"), device, dtype)?;
                Ok(loaded.quantized(bits))
            })
            .collect::<Result<_, CheckpointError>>()?;
        Ok(model)
    }

    /// Loads a part of the model: `module` is what stands at `path` in it, such as a decoder layer at `layers.3`, the
    /// embedding at `embed_tokens`, or with an empty path the model itself. Only what the part needs is checked and read:
    /// other files may be absent, and none of their weights is touched. The report says how many bytes were read.
    ///
    /// ```
    /// # use moonlight_convert::{Checkpoint, SaveOptions, save};
    /// # use moonlight_model::ModelConfig;
    /// # use burn::tensor::Device;
    /// # let directory = tempfile::tempdir()?;
    /// # let path = directory.path().join("model");
    /// # let mut config = ModelConfig::preset("bench-small")?;
    /// # (config.vocab_size, config.num_hidden_layers, config.hidden_size) = (64, 2, 32);
    /// # let device = Device::default();
    /// # save(&config.init(&device), &path, &SaveOptions::default())?;
    /// let checkpoint = Checkpoint::open(&path)?;
    /// let layer = checkpoint.config().init_layer(1, &device);
    /// let (layer, report) = checkpoint.load_part(layer, "layers.1", &device, None)?;
    /// println!("{} bytes were read", report.bytes);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`load`](crate::load), and [`CheckpointError::NoSuchPart`].
    ///
    /// # Panics
    ///
    /// When `module` is not what stands at `path`.
    pub fn load_part<M: Module>(
        &self,
        module: M,
        path: &str,
        device: &Device,
        dtype: Option<DType>,
    ) -> Result<(M, LoadReport), CheckpointError> {
        let plan = self.checked_plan(Scope::Below(path))?;
        if plan.parameters.is_empty() {
            return Err(CheckpointError::NoSuchPart { path: path.to_owned() });
        }
        self.fill(module, path, &plan, device, dtype)
    }

    /// Logs what the configuration does not lead one to expect.
    fn warn(&self, plan: &LoadPlan) {
        if let Some(head) = self.tied_head().describe() {
            tracing::warn!("{head}");
        }
        if let Some(names) = plan.skipped.get(&SkipReason::UndeclaredPrediction) {
            tracing::warn!("{} tensors are left out: {}", names.len(), SkipReason::UndeclaredPrediction.describe());
        }
    }

    fn fill<M: Module>(
        &self,
        module: M,
        path: &str,
        plan: &LoadPlan,
        device: &Device,
        dtype: Option<DType>,
    ) -> Result<(M, LoadReport), CheckpointError> {
        let dtype = dtype.map(weight_dtype).transpose()?;
        let common = dtype.unwrap_or_else(|| stored_dtype(plan));
        for needed in [common, WeightDtype::F32] {
            if !device.supports_dtype(DType::from(needed)) {
                return Err(CheckpointError::DeviceDtype { dtype: needed });
            }
        }
        let path = path.split('.').filter(|name| !name.is_empty()).map(str::to_owned).collect();
        let module = PrefetchReader::open(self, plan, |reader| {
            let mut loader =
                WeightLoader { checkpoint: self, plan, reader, device, dtype, common, path, loaded: 0, failure: None };
            let module = module.map(&mut loader);
            if let Some(failure) = loader.failure {
                return Err(failure);
            }
            assert_eq!(loader.loaded, plan.parameters.len(), "the list of parameters is that of the module");
            Ok(module)
        })?;
        let sources = || plan.parameters.iter().flat_map(|planned| &planned.sources);
        let report = LoadReport {
            dtype: common,
            parameters: plan.parameters.len(),
            tensors: sources().count(),
            bytes: sources().map(SourceTensor::bytes).sum(),
            skipped: plan.skipped.clone(),
        };
        Ok((module, report))
    }

    /// The values of a parameter in Burn's layout. All threads take rows as they lie in the files, in order, so that the
    /// disk is read from front to back, and put each where it belongs.
    fn read<T: Weight>(
        &self,
        planned: &PlannedParameter,
        reader: &PrefetchReader<'_>,
    ) -> Result<Vec<T>, CheckpointError> {
        let PlannedParameter { parameter, sources } = planned;
        let length: usize = parameter.shape.iter().product();
        let mut values = huge_pages::zeros::<T>(length);
        let target = DisjointMut::new(&mut values);
        in_order(&row_chunks(sources), |_, RowChunk { source, rows }, buffer: &mut Vec<u64>| {
            let at = source * (length / sources.len());
            let source = &sources[*source];
            let part = source.stored_rows(rows);
            let outcome = if source.verbatim(Layout::Burn, dtype_of::<T>(), rows).is_some() {
                let (_, columns) = source.dims(Layout::Burn);
                // SAFETY: `in_order` takes each chunk once, and `row_chunks` divides the rows of a source.
                let target = unsafe { target.row(at + rows.start * columns..at + rows.end * columns) };
                reader.read(&part, bytemuck::cast_slice_mut(target))?;
                all_finite::<T>(bytemuck::cast_slice(target))
            } else {
                let bytes = parallel_copy::values::<u8>(buffer, part.range.len());
                reader.read(&part, bytes)?;
                // SAFETY: as above.
                unsafe { self.place(source, Layout::Burn, rows.clone(), bytes, &target, at) }?
            };
            match outcome {
                Outcome::Finite => Ok(()),
                Outcome::NonFinite => Err(self.value_error(source, dtype_of::<T>())),
            }
        })?;
        target.finish();
        Ok(values)
    }
}

/// Divides sources into rows as they lie in the files.
fn row_chunks(sources: &[SourceTensor]) -> Vec<RowChunk> {
    let mut chunks = Vec::new();
    for (number, source) in sources.iter().enumerate() {
        let (rows, _) = source.dims(source.stored());
        let usual = CHUNK / (source.part.range.len() / rows.max(1)).max(1);
        let height = match usual / HEIGHT * HEIGHT {
            0 if source.transposed_in(Layout::Burn) => MIN_ROWS,
            0 => usual.max(1),
            height => height,
        };
        chunks.extend(
            (0..rows).step_by(height).map(|first| RowChunk { source: number, rows: first..rows.min(first + height) }),
        );
    }
    chunks
}

fn dtype_of<T: Weight>() -> WeightDtype {
    WeightDtype::try_from(T::dtype()).expect("a weight has a dtype of weights")
}

pub(crate) fn weight_dtype(dtype: DType) -> Result<WeightDtype, CheckpointError> {
    WeightDtype::try_from(dtype).map_err(|dtype| CheckpointError::Dtype { dtype: format!("{dtype:?}").to_lowercase() })
}

/// The widest dtype of the weights; routers do not count.
pub(crate) fn stored_dtype(plan: &LoadPlan) -> WeightDtype {
    let counts = |kind| !matches!(kind, ParameterKind::Router | ParameterKind::CorrectionBias);
    plan.parameters
        .iter()
        .filter(|planned| counts(planned.parameter.kind))
        .map(PlannedParameter::stored)
        .reduce(WeightDtype::widest)
        .unwrap_or(WeightDtype::F32)
}

/// Replaces the parameters of a fresh model. They are lazy: none of them is ever drawn.
struct WeightLoader<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a LoadPlan,
    reader: &'a PrefetchReader<'a>,
    device: &'a Device,
    dtype: Option<WeightDtype>,
    common: WeightDtype,
    path: Vec<String>,
    /// How many have been replaced: the plan has them in the module's order.
    loaded: usize,
    failure: Option<CheckpointError>,
}

impl ModuleMapper for WeightLoader<'_> {
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
            self.plan.parameters.get(self.loaded).filter(|planned| planned.parameter.path == self.path.join("."));
        let planned = planned.unwrap_or_else(|| panic!("{} is in the list of parameters", self.path.join(".")));
        self.loaded += 1;
        let dtype = match (planned.parameter.kind, self.dtype) {
            (ParameterKind::CorrectionBias, _) => WeightDtype::F32,
            (ParameterKind::Router, None) => planned.stored(),
            _ => self.common,
        };
        let shape = planned.parameter.shape.clone();
        let data = with_weight!(dtype, T => {
            self.checkpoint.read::<T>(planned, self.reader).map(|values| TensorData::new(values, shape))
        });
        match data {
            Ok(data) => {
                let tensor = Tensor::from_data(data, (self.device, DType::from(dtype)));
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
