//! Saving in the Hugging Face layout or in Burn's: tensor by tensor into a hidden directory, which is renamed at the
//! end.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor, TensorData};
use moonlight_model::CausalLm;
use moonlight_model::config::{ParameterKind, ParameterShape};

use crate::checkpoint::{CONFIG, Checkpoint};
use crate::dtype::conversion::{self, Outcome, PlainRows, Weight, WeightDtype, with_weight};
use crate::dtype::dequantize::Layout;
use crate::dtype::transpose::transpose;
use crate::error::CheckpointError;
use crate::format::sidecars::{self, SavedConfig};
use crate::io::atomic_dir::replace_directory;
use crate::io::disk_space;
use crate::io::parallel_copy::{self, CopyTask, RowChunk, copy_tensors, in_order, row_chunks};
use crate::io::writer::{OutTensor, Output, Sharding};
use crate::load::{stored_dtype, weight_dtype};
use crate::mapping::load_plan::{LoadPlan, Scope};
use crate::mapping::names::{self, HfTensor};
use crate::module_path::ModulePath;
use crate::progress::Progress;

/// The file format of saved weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Safetensors with the names of Hugging Face.
    #[default]
    HuggingFace,
    /// One burnpack file, `model.bpk`, with the module's paths as names, as burn-store's `BurnpackStore` reads it.
    Burnpack,
}

/// Options for saving a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveOptions {
    /// The dtype of the weights; `None` keeps that of each parameter. The router's correction bias is always f32.
    pub dtype: Option<DType>,
    /// The file format of the weights.
    pub format: Format,
    /// The most bytes of weights in one safetensors file (a single larger tensor gets a file of its own). Default: 5
    /// GB, as in `huggingface_hub`.
    pub max_shard_size: u64,
    /// Write one safetensors file for each layer, as Moonlight was published, whatever its size.
    pub shard_by_layer: bool,
    /// A directory from which the tokenizer, chat template and generation config are copied.
    pub sidecars_from: Option<PathBuf>,
    /// Whether an existing checkpoint is replaced (the default) or is an error. A directory that contains anything that
    /// is not part of a checkpoint is never replaced.
    pub overwrite: bool,
    /// Convert a checkpoint that lacks files or tensors instead of refusing it; the result lacks the same parameters.
    /// This allows a checkpoint to be converted in parts on a disk that cannot hold it twice.
    pub partial: bool,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self {
            dtype: None,
            format: Format::HuggingFace,
            max_shard_size: 5_000_000_000,
            shard_by_layer: false,
            sidecars_from: None,
            overwrite: true,
            partial: false,
        }
    }
}

/// Saves a model as a checkpoint directory: `config.json`, `generation_config.json`, the weights in `model.safetensors`
/// or in shards with an index, and the requested sidecars. With [`Format::Burnpack`] the weights are in `model.bpk`
/// instead.
///
/// The directory appears complete or not at all, and an existing one is replaced in one step: the new files are written
/// to a hidden sibling, flushed to the disk and renamed. After a crash at any moment the old or the new checkpoint is
/// complete. (Linux and macOS exchange the names of the two directories atomically. Where a file system cannot, three
/// renames do it; after a crash between them [`Checkpoint::open`] finds the new one, and the next save finishes.) An
/// error, such as a full disk, removes what was written and leaves the old checkpoint unchanged.
///
/// Quantized weights are dequantized and adapters are merged; [`write_adapter`](crate::adapter::write_adapter) writes
/// the adapters alone.
///
/// Memory: one parameter on the host at a time, plus less than 100 MB.
///
/// # Errors
///
/// [`CheckpointError`], also for a weight that is NaN or infinite, or becomes so in the requested dtype.
pub fn save(model: &CausalLm, dir: &Path, options: &SaveOptions) -> Result<(), CheckpointError> {
    check_target(dir, options.overwrite)?;
    replace_directory(dir, |new| write_files(model, new, dir, options))
}

/// Writes the files of a checkpoint into an existing directory, for callers that rename it themselves, for example with
/// [`replace_directory`]. Nothing is flushed to the disk, and `overwrite` has no effect.
///
/// # Errors
///
/// Those of [`save`].
pub fn write_into(model: &CausalLm, dir: &Path, options: &SaveOptions) -> Result<(), CheckpointError> {
    write_files(model, dir, dir, options)
}

fn write_files(model: &CausalLm, dir: &Path, shown: &Path, options: &SaveOptions) -> Result<(), CheckpointError> {
    let merged;
    let model = if model.has_adapters() || model.is_quantized() {
        // Cloning shares the tensors; only changed weights are copied.
        merged = model.clone().dequantized().merge();
        &merged
    } else {
        model
    };
    let dtype = options.dtype.map(weight_dtype).transpose()?;
    let mut collector = DtypeCollector {
        parameters: model.config().parameter_shapes(),
        path: ModulePath::default(),
        dtypes: Vec::new(),
        failure: None,
    };
    model.visit(&mut collector);
    if let Some(failure) = collector.failure {
        return Err(failure);
    }
    let DtypeCollector { parameters, dtypes, .. } = collector;
    let dtype_of = |index: usize| match (parameters[index].kind, dtype) {
        (ParameterKind::CorrectionBias, _) => WeightDtype::F32,
        (_, Some(dtype)) => dtype,
        (_, None) => dtypes[index],
    };
    let mut tensors = Vec::new();
    let mut starts = Vec::with_capacity(parameters.len());
    for (index, parameter) in parameters.iter().enumerate() {
        starts.push(tensors.len());
        let dtype = dtype_of(index);
        if options.format == Format::Burnpack {
            tensors.push(OutTensor {
                name: parameter.path.clone(),
                dtype: dtype.into(),
                shape: parameter.shape.clone(),
            });
            continue;
        }
        let hugging_face = names::hugging_face_tensors(parameter);
        tensors.extend(hugging_face.into_iter().map(|tensor| OutTensor {
            name: tensor.name,
            dtype: dtype.into(),
            shape: tensor.shape,
        }));
    }
    // The embedding comes first, and the model computes in its dtype.
    let config_dtype = dtype_of(0);
    fill(&SavedConfig::plain(model.config(), config_dtype), &tensors, dir, shown, options, |output| {
        let mut saving = WeightSaver {
            parameters: &parameters,
            tensors: &tensors,
            starts: &starts,
            dtypes: parameters.iter().enumerate().map(|(index, _)| dtype_of(index)).collect(),
            format: options.format,
            output,
            at: 0,
            failure: None,
        };
        model.visit(&mut saving);
        saving.failure.map_or(Ok(()), Err)
    })
}

impl Checkpoint {
    /// Rewrites this checkpoint: in another dtype or file format, without the tensors that loading ignores, with one
    /// tensor for each expert where they were stacked, and with plain values where they were quantized. Weights are
    /// copied from file to file without building a model, and memory stays small (about 100 MB, plus the largest tensor
    /// if it has to be transposed).
    ///
    /// The sidecars are copied from this checkpoint unless `options` name another directory.
    ///
    /// # Errors
    ///
    /// Those of [`save`] and of [`load`](fn@crate::load); [`CheckpointError::NoRoom`] before anything is written.
    pub fn convert(&self, dir: &Path, options: &SaveOptions) -> Result<(), CheckpointError> {
        self.convert_with(dir, options, &())
    }

    /// [`convert`](Checkpoint::convert) with a progress callback, in bytes written.
    ///
    /// # Errors
    ///
    /// Those of [`convert`](Checkpoint::convert), and [`CheckpointError::Interrupted`] if `progress` stops the work.
    pub fn convert_with(
        &self,
        dir: &Path,
        options: &SaveOptions,
        progress: &dyn Progress,
    ) -> Result<(), CheckpointError> {
        let dtype = options.dtype.map(weight_dtype).transpose()?;
        let plan = self.checked_plan(if options.partial { Scope::Present } else { Scope::All })?;
        let (tensors, tasks) = tasks(&plan, dtype, options.format);
        let config_dtype = dtype.unwrap_or_else(|| stored_dtype(&plan));
        let mut options = options.clone();
        options.sidecars_from.get_or_insert_with(|| self.dir().to_path_buf());
        check_target(dir, options.overwrite)?;
        replace_directory(dir, |new| {
            fill(&SavedConfig::plain(self.config(), config_dtype), &tensors, new, dir, &options, |output| {
                progress.begin(output.total());
                copy_tensors(self, &tasks, output, progress)
            })
        })
    }
}

/// The tensors to write, and the copies that fill them.
fn tasks(plan: &LoadPlan, dtype: Option<WeightDtype>, format: Format) -> (Vec<OutTensor>, Vec<CopyTask<'_>>) {
    let (mut tensors, mut tasks) = (Vec::new(), Vec::new());
    for planned in &plan.parameters {
        let parameter = &planned.parameter;
        let dtype = match (parameter.kind, dtype) {
            (ParameterKind::CorrectionBias, _) => WeightDtype::F32,
            (_, Some(dtype)) => dtype,
            (_, None) => planned.stored(),
        };
        match format {
            Format::HuggingFace => {
                for source in &planned.sources {
                    let HfTensor { name, shape } = &source.tensor;
                    let tensor = tensors.len();
                    tensors.push(OutTensor { name: name.clone(), dtype: dtype.into(), shape: shape.clone() });
                    tasks.push(CopyTask { source, tensor, at: 0, layout: Layout::HuggingFace, dtype });
                }
            }
            Format::Burnpack => {
                let tensor = tensors.len();
                tensors.push(OutTensor {
                    name: parameter.path.clone(),
                    dtype: dtype.into(),
                    shape: parameter.shape.clone(),
                });
                let mut at = 0;
                for source in &planned.sources {
                    tasks.push(CopyTask { source, tensor, at, layout: Layout::Burn, dtype });
                    at += (source.count() * dtype.size()) as u64;
                }
            }
        }
    }
    (tensors, tasks)
}

/// Fills the temporary directory `dir`: writes sidecars and configs itself, and the weights by `write`. Messages name it
/// `shown`, the path that the user passed.
pub(crate) fn fill(
    config: &SavedConfig<'_>,
    tensors: &[OutTensor],
    dir: &Path,
    shown: &Path,
    options: &SaveOptions,
    write: impl FnOnce(&Output) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let output = match options.format {
        Format::HuggingFace if options.shard_by_layer => Output::safetensors(dir, shown, tensors, Sharding::Layer),
        Format::HuggingFace => Output::safetensors(dir, shown, tensors, Sharding::Size(options.max_shard_size)),
        Format::Burnpack => Output::burnpack(dir, shown, tensors),
    }?;
    let needed = output.total();
    if let Some(free) = disk_space::free(dir)
        && free < needed
    {
        return Err(CheckpointError::NoRoom { dir: shown.to_path_buf(), needed, free });
    }
    sidecars::write(config, options.sidecars_from.as_deref(), dir, shown, needed)?;
    write(&output)?;
    output.finish()
}

/// Refuses a target that must not be replaced.
pub(crate) fn check_target(dir: &Path, overwrite: bool) -> Result<(), CheckpointError> {
    // A file at the path is refused by `replace_directory`.
    if !dir.is_dir() {
        return Ok(());
    }
    let entries = fs::read_dir(dir).map_err(CheckpointError::read(dir))?;
    let names: Vec<String> = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    if names.is_empty() {
        return Ok(());
    }
    if !overwrite {
        return Err(CheckpointError::Exists { dir: dir.to_path_buf() });
    }
    let foreign = |name: &&String| !sidecars::belongs_to_checkpoint(name) || dir.join(name).is_dir();
    // Without a `config.json` the directory is not a checkpoint, even if all its files could belong to one.
    let foreign = names.iter().find(foreign).or_else(|| names.first().filter(|_| !dir.join(CONFIG).exists()));
    match foreign {
        Some(entry) => Err(CheckpointError::Foreign { dir: dir.to_path_buf(), entry: entry.clone() }),
        None => Ok(()),
    }
}

/// Collects the dtypes of all parameters, in the module's order. The layout of the files must be known before the first
/// value is written, and the headers contain the dtypes.
struct DtypeCollector {
    parameters: Vec<ParameterShape>,
    path: ModulePath,
    dtypes: Vec<WeightDtype>,
    failure: Option<CheckpointError>,
}

impl ModuleVisitor for DtypeCollector {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.dotted();
        let expected = self.parameters.get(self.dtypes.len()).map(|parameter| parameter.path.as_str());
        assert_eq!(expected, Some(path.as_str()), "`parameter_shapes` lists the parameters in the module's order");
        match weight_dtype(param.val().dtype()) {
            Ok(dtype) => self.dtypes.push(dtype),
            Err(failure) => {
                // A placeholder: the position in `dtypes` is that in `parameters`.
                self.dtypes.push(WeightDtype::F32);
                self.failure.get_or_insert(failure);
            }
        }
    }
}

/// Writes one parameter after the other.
struct WeightSaver<'a> {
    parameters: &'a [ParameterShape],
    tensors: &'a [OutTensor],
    /// For each parameter, the index of its first tensor.
    starts: &'a [usize],
    /// The dtype in which each parameter is written.
    dtypes: Vec<WeightDtype>,
    format: Format,
    output: &'a Output,
    at: usize,
    failure: Option<CheckpointError>,
}

impl ModuleVisitor for WeightSaver<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.failure.is_some() {
            return;
        }
        let (parameter, first, dtype) = (&self.parameters[self.at], self.starts[self.at], self.dtypes[self.at]);
        self.at += 1;
        let device = |error: String| CheckpointError::Device { parameter: parameter.path.clone(), problem: error };
        let written = match param.val().try_into_data() {
            Ok(data) => self.write(parameter, first, dtype, &data),
            Err(error) => Err(device(error.to_string())),
        };
        self.failure = written.err();
    }
}

impl WeightSaver<'_> {
    fn write(
        &mut self,
        parameter: &ParameterShape,
        first: usize,
        dtype: WeightDtype,
        data: &TensorData,
    ) -> Result<(), CheckpointError> {
        with_weight!(weight_dtype(data.dtype())?, S => {
            let values = data.as_slice::<S>().map_err(|error| CheckpointError::Device {
                parameter: parameter.path.clone(),
                problem: error.to_string(),
            })?;
            with_weight!(dtype, T => self.write_values::<S, T>(parameter, first, values))
        })
    }

    fn write_values<S: Weight, T: Weight>(
        &mut self,
        parameter: &ParameterShape,
        first: usize,
        values: &[S],
    ) -> Result<(), CheckpointError> {
        // A closure, because it takes a second pass over the values, which only a failed conversion needs.
        let tensors = self.tensors;
        let value_error = |tensor: usize| move || value_error::<S, T>(&tensors[tensor].name, values);
        match parameter.shape.as_slice() {
            &[.., input, output] if names::transposed(parameter.kind) && self.format == Format::HuggingFace => {
                for (expert, matrix) in values.chunks_exact(input * output).enumerate() {
                    let tensor = first + expert;
                    write_transposed::<S, T>(self.output, tensor, matrix, input, output, value_error(tensor))?;
                }
                Ok(())
            }
            _ => write_converted::<S, T>(self.output, first, values, value_error(first)),
        }
    }
}

/// The error for values that are non-finite after a conversion from `S` to `T`.
fn value_error<S: Weight, T: Weight>(tensor: &str, source: &[S]) -> CheckpointError {
    let tensor = tensor.to_owned();
    match WeightDtype::try_from(T::dtype()) {
        Ok(dtype) if source.iter().all(|value| value.finite()) => {
            CheckpointError::Overflow { tensor, file: None, dtype }
        }
        _ => CheckpointError::NonFinite { tensor, file: None },
    }
}

/// Writes a matrix `[input, output]` as `[output, input]`, a chunk of rows at a time.
fn write_transposed<S: Weight, T: Weight>(
    output: &Output,
    tensor: usize,
    matrix: &[S],
    rows: usize,
    columns: usize,
    value_error: impl FnOnce() -> CheckpointError,
) -> Result<(), CheckpointError> {
    let source = PlainRows::<S>::new(bytemuck::cast_slice(matrix), columns); // [in, out]
    let chunks = row_chunks(std::iter::once((columns, rows * size_of::<T>())));
    in_chunks(output, tensor, &chunks, rows, value_error, |first, chunk: &mut [T]| {
        transpose(&source, rows, first, chunk)
    })
}

/// Writes values in their order, a chunk at a time.
fn write_converted<S: Weight, T: Weight>(
    output: &Output,
    tensor: usize,
    values: &[S],
    value_error: impl FnOnce() -> CheckpointError,
) -> Result<(), CheckpointError> {
    let chunks = row_chunks(std::iter::once((values.len(), size_of::<T>())));
    in_chunks(output, tensor, &chunks, 1, value_error, |first, chunk: &mut [T]| {
        let values = &values[first..first + chunk.len()];
        Outcome::from_finite(conversion::convert_bytes::<S, T>(bytemuck::cast_slice(values), chunk))
    })
}

/// Fills chunks of rows of `width` values with `convert` on all threads, and writes them.
fn in_chunks<T: Weight>(
    output: &Output,
    tensor: usize,
    chunks: &[RowChunk],
    width: usize,
    value_error: impl FnOnce() -> CheckpointError,
    convert: impl Fn(usize, &mut [T]) -> Outcome + Sync,
) -> Result<(), CheckpointError> {
    let non_finite = AtomicBool::new(false);
    in_order(chunks, |_, chunk, buffer| {
        let target = parallel_copy::values::<T>(buffer, chunk.rows.len() * width);
        if convert(chunk.rows.start, target) == Outcome::NonFinite {
            non_finite.store(true, Ordering::Relaxed);
            return Ok(());
        }
        output.write(tensor, (chunk.rows.start * width * size_of::<T>()) as u64, bytemuck::cast_slice(target))
    })?;
    if non_finite.into_inner() { Err(value_error()) } else { Ok(()) }
}
