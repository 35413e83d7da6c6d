//! Loading: from the files straight into the model's parameters, in Burn's layout.

pub(crate) mod quantized;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use moonlight_model::config::ParameterKind;
use moonlight_model::disjoint::DisjointMut;
use moonlight_model::{CausalLm, QuantBits, QuantizedWeight, huge_pages};

use crate::checkpoint::Checkpoint;
use crate::dtype::conversion::{Outcome, Weight, WeightDtype, all_finite, with_weight};
use crate::dtype::dequantize::{Layout, SourceTensor};
use crate::dtype::transpose::HEIGHT;
use crate::error::CheckpointError;
use crate::io::parallel_copy::{self, RowChunk, in_order};
use crate::io::prefetch::PrefetchReader;
use crate::load::quantized::LoadQuantization;
use crate::mapping::load_plan::{LoadPlan, PlannedParameter, Scope};
use crate::mapping::names::SkipReason;
use crate::module_path::ModulePath;
use crate::printable::Printable;

/// Approximate number of bytes that a thread reads at a time.
const CHUNK: usize = 1 << 20;
/// The fewest rows of a chunk that is transposed. They become columns of the target: fewer of them would fill only parts
/// of the cache lines that they touch.
const MIN_ROWS: usize = 64;

/// A model with the weights of a checkpoint, and a report.
#[derive(Debug)]
pub struct Loaded {
    /// The model, with every parameter loaded.
    pub model: CausalLm,
    /// What was read and what was ignored.
    pub report: LoadReport,
}

/// What loading read and what it ignored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadReport {
    /// The dtype of the model's weights, except routers and correction biases, which may have another.
    pub dtype: WeightDtype,
    /// Number of the model's parameters (tensors) that were loaded.
    pub parameters: usize,
    /// Number of tensors read from the files; a stack of experts is one parameter and many tensors.
    pub tensors: usize,
    /// Bytes read from the files.
    pub bytes: u64,
    /// The names of tensors that the model does not use, by reason.
    pub skipped: BTreeMap<SkipReason, Vec<String>>,
}

impl fmt::Display for LoadReport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = crate::error::Bytes(self.bytes);
        write!(formatter, "{} tensors, {bytes}, as {}", self.tensors, self.dtype)?;
        for (reason, names) in &self.skipped {
            write!(formatter, "; ignored {}: {}", names.len(), reason.describe())?;
        }
        Ok(())
    }
}

/// Loads a checkpoint directory onto `device`.
///
/// `dtype` is the dtype of the weights in memory. `None` keeps the stored one, or the widest if the files mix dtypes,
/// so that nothing is lost. Two parameters are exceptions: the router's correction bias is always f32, and with `None`
/// the router's matrix keeps its own dtype.
///
/// Every name, shape and dtype is checked before the first byte is copied, and every value while it is copied.
///
/// # Errors
///
/// [`CheckpointError`]: those of [`Checkpoint::open`]; one error with everything that does not match the model; a value
/// that is NaN or infinite; a dtype that the device does not support.
pub fn load(dir: &Path, device: &Device, dtype: Option<DType>) -> Result<Loaded, CheckpointError> {
    Checkpoint::open(dir)?.load(device, dtype)
}

impl Checkpoint {
    /// [`load`](fn@crate::load) for a checkpoint that is already open.
    ///
    /// # Errors
    ///
    /// Those of [`load`](fn@crate::load).
    pub fn load(&self, device: &Device, dtype: Option<DType>) -> Result<Loaded, CheckpointError> {
        self.load_with(device, dtype, LoadQuantization::Dequantize)
    }

    /// [`load`](Checkpoint::load) with a choice of the weights that are quantized in memory. Quantized weights are frozen.
    ///
    /// Weights that are quantized are never in memory as floats, except for a chunk of rows of each thread (and, for a burnpack
    /// file, one layer).
    ///
    /// # Errors
    ///
    /// Those of [`load`](fn@crate::load).
    pub fn load_with(
        &self,
        device: &Device,
        dtype: Option<DType>,
        quantization: LoadQuantization,
    ) -> Result<Loaded, CheckpointError> {
        let plan = self.checked_plan(Scope::All)?;
        self.warn();
        if let (LoadQuantization::To(bits), true) = (quantization, self.is_burnpack()) {
            return self.load_by_layer(&plan, device, dtype, bits);
        }
        let (model, report, quantized) =
            self.fill_quantized(self.config().init(device), "", &plan, device, dtype, quantization)?;
        let mut model = model;
        let (head, projections): (Vec<_>, Vec<_>) = quantized.into_iter().partition(|weight| weight.is_head);
        model =
            model.with_quantized(projections.into_iter().map(|QuantizedParameter { path, weight, .. }| (path, weight)));
        if let Some(head) = head.into_iter().next() {
            model.head_quantized = Some(head.weight);
        }
        if model.is_quantized() {
            // A head that is stored in bf16, or tied to the embedding: in 4 bits it would be a third of the bytes of a token.
            model = model.quantize_head();
        }
        Ok(Loaded { model, report })
    }

    /// The bits in which [`LoadQuantization::AsStored`] loads projections; the fewest, if there are several. `None` if it loads all
    /// of them as floats.
    pub fn stored_bits(&self) -> Option<QuantBits> {
        let plan = self.plan(Scope::Present).ok()?;
        let bits = plan.parameters.iter().filter(|planned| planned.parameter.kind != ParameterKind::Head);
        bits.filter_map(|planned| quantized::bits_of(planned, LoadQuantization::AsStored)).min_by_key(|bits| match bits
        {
            QuantBits::Four => 4,
            QuantBits::Eight => 8,
        })
    }

    /// Loads a burnpack file and quantizes each layer as soon as it is loaded: the rows of its matrices are the inputs,
    /// so that a block of a scale is scattered over the file.
    fn load_by_layer(
        &self,
        plan: &LoadPlan,
        device: &Device,
        dtype: Option<DType>,
        bits: QuantBits,
    ) -> Result<Loaded, CheckpointError> {
        let mut model = self.config().init(device);
        // Only projections of layers are quantized, and the head.
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
        let common = dtype.map(weight_dtype).transpose()?.unwrap_or_else(|| stored_dtype(plan));
        Ok(Loaded { model: model.quantize_head(), report: report(plan, common) })
    }

    /// Loads a part of the model: `module` is the part at `path`, such as a decoder layer at `layers.3`, the embedding
    /// at `embed_tokens`, or with an empty path the whole model. Only what the part needs is checked and read: other
    /// files may be missing, and none of their weights is read. The report has the number of bytes read.
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
    /// Those of [`load`](fn@crate::load), and [`CheckpointError::NoSuchPart`].
    ///
    /// # Panics
    ///
    /// If `module` is not the part at `path`.
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

    /// Warns if the weights in use are not those that `config.json` suggests, or if the metadata of a GGUF file lacks a key
    /// that matters.
    fn warn(&self) {
        if let Some(head) = self.tied_head().describe() {
            tracing::warn!("{head}");
        }
        for note in self.gguf_notes() {
            tracing::warn!("`{}`: {note}", Printable(self.dir().display()));
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
        let (module, report, _) =
            self.fill_quantized(module, path, plan, device, dtype, LoadQuantization::Dequantize)?;
        Ok((module, report))
    }

    /// Fills a module. Where a weight is quantized, the module has a placeholder, and the list the weight.
    fn fill_quantized<M: Module>(
        &self,
        module: M,
        path: &str,
        plan: &LoadPlan,
        device: &Device,
        dtype: Option<DType>,
        quantization: LoadQuantization,
    ) -> Result<(M, LoadReport, Vec<QuantizedParameter>), CheckpointError> {
        let dtype = dtype.map(weight_dtype).transpose()?;
        let common = dtype.unwrap_or_else(|| stored_dtype(plan));
        // Correction biases are f32, whatever the dtype of the weights.
        for needed in [common, WeightDtype::F32] {
            if !device.supports_dtype(DType::from(needed)) {
                return Err(CheckpointError::DeviceDtype { dtype: needed });
            }
        }
        let (module, quantized) = PrefetchReader::open(self, plan, |reader| {
            let mut loader = WeightLoader {
                checkpoint: self,
                plan,
                reader,
                device,
                dtype,
                common,
                quantization,
                path: ModulePath::new(path),
                loaded: 0,
                quantized: Vec::new(),
                failure: None,
            };
            let module = module.map(&mut loader);
            if let Some(failure) = loader.failure {
                return Err(failure);
            }
            assert_eq!(loader.loaded, plan.parameters.len(), "the plan lists every parameter of the module");
            Ok((module, loader.quantized))
        })?;
        Ok((module, report(plan, common), quantized))
    }

    /// Reads the values of a parameter in Burn's layout. All threads take chunks of rows in the order of the files, so
    /// that the disk is read sequentially, and write each to its place.
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
            let at = source * (length / sources.len()); // a parameter with several sources is [experts, in, out]
            let source = &sources[*source];
            let part = source.stored_rows(rows);
            // Bytes that already have the requested layout and dtype are read straight into the target.
            let outcome = if source.verbatim(Layout::Burn, dtype_of::<T>(), rows).is_some() {
                let (_, columns) = source.dims(Layout::Burn);
                // SAFETY: `in_order` takes each chunk once, and the chunks of `row_chunks` partition the rows of a
                // source.
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

fn report(plan: &LoadPlan, dtype: WeightDtype) -> LoadReport {
    let sources = || plan.parameters.iter().flat_map(|planned| &planned.sources);
    LoadReport {
        dtype,
        parameters: plan.parameters.len(),
        tensors: sources().count(),
        bytes: sources().map(SourceTensor::bytes).sum(),
        skipped: plan.skipped.clone(),
    }
}

/// A weight that is quantized.
struct QuantizedParameter {
    /// The path of its projection, such as `layers.3.self_attn.q_proj`.
    path: String,
    is_head: bool,
    weight: QuantizedWeight,
}

/// Divides sources into chunks of rows in the order of the files.
fn row_chunks(sources: &[SourceTensor]) -> Vec<RowChunk> {
    let mut chunks = Vec::new();
    for (number, source) in sources.iter().enumerate() {
        let (rows, _) = source.dims(source.stored());
        let usual = CHUNK / (source.part.range.len() / rows.max(1)).max(1);
        // A multiple of a tile's height, so that no tile is cut.
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
    WeightDtype::try_from(T::dtype()).expect("`Weight` is implemented for the dtypes of weights")
}

pub(crate) fn weight_dtype(dtype: DType) -> Result<WeightDtype, CheckpointError> {
    WeightDtype::try_from(dtype).map_err(|dtype| CheckpointError::Dtype { dtype: format!("{dtype:?}").to_lowercase() })
}

/// The widest dtype of the weights. Routers and correction biases do not count: they are often f32 in a bf16
/// checkpoint, and would make the whole model f32.
pub(crate) fn stored_dtype(plan: &LoadPlan) -> WeightDtype {
    let counts = |kind| !matches!(kind, ParameterKind::Router | ParameterKind::CorrectionBias);
    plan.parameters
        .iter()
        .filter(|planned| counts(planned.parameter.kind))
        .map(PlannedParameter::stored)
        .reduce(WeightDtype::widest)
        .unwrap_or(WeightDtype::F32)
}

/// Replaces the parameters of a fresh model. They are lazy, so that no random weights are drawn.
struct WeightLoader<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a LoadPlan,
    reader: &'a PrefetchReader<'a>,
    device: &'a Device,
    dtype: Option<WeightDtype>,
    common: WeightDtype,
    quantization: LoadQuantization,
    path: ModulePath,
    /// How many parameters have been replaced. The plan lists them in the module's order.
    loaded: usize,
    quantized: Vec<QuantizedParameter>,
    failure: Option<CheckpointError>,
}

impl ModuleMapper for WeightLoader<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        // A mapper cannot stop: after an error the remaining parameters stay lazy.
        if self.failure.is_some() {
            return param;
        }
        let path = self.path.dotted();
        let planned = self.plan.parameters.get(self.loaded).filter(|planned| planned.parameter.path == path);
        let planned = planned.unwrap_or_else(|| panic!("the plan lists `{path}` next"));
        self.loaded += 1;
        if let Some(bits) = quantized::bits_of(planned, self.quantization) {
            return self.quantized(param, planned, bits);
        }
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
                // Keeps the parameter's id, by which Burn's optimizers find their state.
                param.transform_for_load(tensor, id)
            }
            Err(failure) => {
                self.failure = Some(failure);
                param
            }
        }
    }
}

impl WeightLoader<'_> {
    /// Reads a parameter as a quantized weight, and returns a placeholder with the dtype that dequantizing gives it.
    fn quantized<const D: usize>(
        &mut self,
        param: Param<Tensor<D>>,
        planned: &PlannedParameter,
        bits: QuantBits,
    ) -> Param<Tensor<D>> {
        match self.checkpoint.read_quantized(planned, bits, self.reader, self.device) {
            Ok(weight) => {
                let path = planned.parameter.path.trim_end_matches(".weight").to_owned();
                let is_head = planned.parameter.kind == ParameterKind::Head;
                self.quantized.push(QuantizedParameter { path, is_head, weight });
                let placeholder = Tensor::zeros([1; D], (self.device, DType::from(self.common)));
                let id = param.id;
                param.transform_for_load(placeholder, id).set_require_grad(false)
            }
            Err(failure) => {
                self.failure = Some(failure);
                param
            }
        }
    }
}
