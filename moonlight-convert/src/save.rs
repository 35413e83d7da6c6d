//! Saving: Hugging Face's layout or Burn's, written part by part, put in place by renaming.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor, TensorData};
use moonlight_model::config::{ParameterKind, ParameterShape};
use moonlight_model::{CausalLm, ModelConfig};

use crate::checkpoint::{CONFIG, Checkpoint};
use crate::dtype::conversion::{self, Outcome, PlainRows, Weight, WeightDtype, with_weight};
use crate::dtype::dequantize::Layout;
use crate::dtype::transpose::transpose;
use crate::error::CheckpointError;
use crate::format::sidecars;
use crate::io::atomic_dir::replace_directory;
use crate::io::disk_space;
use crate::io::parallel_copy::{self, CopyTask, RowChunk, copy_tensors, in_order, row_chunks};
use crate::io::writer::{OutTensor, Output, Sharding};
use crate::load::{stored_dtype, weight_dtype};
use crate::mapping::load_plan::{LoadPlan, Scope};
use crate::mapping::names::{self, HfTensor};
use crate::progress::Progress;

/// The files that weights are saved in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Safetensors under Hugging Face's names.
    #[default]
    HuggingFace,
    /// One burnpack file, `model.bpk`, under the module's paths: what burn-store's `BurnpackStore` opens.
    Burnpack,
}

/// How a checkpoint is saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveOptions {
    /// The dtype of the weights; `None` keeps each parameter's own. The router's correction bias is always f32.
    pub dtype: Option<DType>,
    /// The files that weights are saved in.
    pub format: Format,
    /// Most bytes of weights in one safetensors file (a single tensor may be larger). The default is 5 GB, as the Hub
    /// likes it.
    pub max_shard_size: u64,
    /// One safetensors file a layer, as Moonlight was published, whatever its size.
    pub shard_by_layer: bool,
    /// A directory whose tokenizer, chat template and generation configuration are copied along.
    pub sidecars_from: Option<PathBuf>,
    /// Whether a checkpoint that stands there is replaced (the default) or an error. A directory that holds anything
    /// that is not part of a checkpoint is never replaced.
    pub overwrite: bool,
    /// Convert what is there of a checkpoint that lacks files or tensors, instead of refusing it. What is written lacks
    /// the same parameters. For going through a checkpoint in parts where the disk does not hold it twice.
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

/// Saves a model as a Hugging Face directory: `config.json`, `generation_config.json`, the weights in
/// `model.safetensors` or in shards with an index, and the sidecars asked for. With [`Format::Burnpack`] the weights
/// are `model.bpk` instead.
///
/// The directory appears whole or not at all, and one that stood there before is replaced in one step: it is written
/// beside, flushed to the disk and renamed. After a crash at any moment the old or the new checkpoint is whole. (Linux and
/// macOS exchange the two directories' names in one step; where a file system cannot, three renamings do it, and the
/// next [`Checkpoint::open`] of the directory finishes what a crash between them left.) An error, a full disk for one,
/// removes what was written and leaves the old checkpoint alone.
///
/// Weights in few bits are unpacked and adapters merged into what is written; [`write_adapter`](crate::adapter::write_adapter) writes them by themselves.
///
/// Memory: one parameter on the host at a time, and less than 100 MB.
///
/// # Errors
///
/// [`CheckpointError`], also for a weight that is infinite or NaN, or becomes so in the dtype asked for.
pub fn save(model: &CausalLm, dir: &Path, options: &SaveOptions) -> Result<(), CheckpointError> {
    check_target(dir, options.overwrite)?;
    replace_directory(dir, |new| write_files(model, new, dir, options))
}

/// Writes the files of a checkpoint into a directory that exists, for callers who put it in its place themselves, say by
/// [`replace_directory`]. Nothing is flushed to the disk, and `overwrite` means nothing here.
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
        merged = model.clone().dequantized().merge();
        &merged
    } else {
        model
    };
    let dtype = options.dtype.map(weight_dtype).transpose()?;
    let mut collector = DtypeCollector {
        parameters: model.config().parameter_shapes(),
        path: Vec::new(),
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
            tensors.push(OutTensor { name: parameter.path.clone(), dtype, shape: parameter.shape.clone() });
            continue;
        }
        let hugging_face = names::hugging_face_tensors(parameter);
        tensors.extend(hugging_face.into_iter().map(|tensor| OutTensor {
            name: tensor.name,
            dtype,
            shape: tensor.shape,
        }));
    }
    // The embedding comes first, and has the dtype that the model computes in.
    let main = dtype_of(0);
    fill(model.config(), main, &tensors, dir, shown, options, |output| {
        let mut saving = WeightSaver {
            parameters: &parameters,
            tensors: &tensors,
            starts: &starts,
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
    /// Writes this checkpoint anew: in another dtype, in other files, without what loading skips, with its experts one by
    /// one where they were stacked, and with plain values where they were quantized. Weights go from file to file; no
    /// model is built, and memory stays small (about 100 MB, and the largest tensor where it has to be transposed).
    ///
    /// The sidecar files are this checkpoint's own unless `options` name others.
    ///
    /// # Errors
    ///
    /// Those of [`save`] and of [`load`](crate::load); [`CheckpointError::NoRoom`] before anything is written.
    pub fn convert(&self, dir: &Path, options: &SaveOptions) -> Result<(), CheckpointError> {
        self.convert_with(dir, options, &())
    }

    /// [`convert`](Checkpoint::convert), which tells `progress` how far it has come in bytes of what it writes.
    ///
    /// # Errors
    ///
    /// Those of [`convert`](Checkpoint::convert), and [`CheckpointError::Interrupted`] where `progress` ends the work.
    pub fn convert_with(
        &self,
        dir: &Path,
        options: &SaveOptions,
        progress: &dyn Progress,
    ) -> Result<(), CheckpointError> {
        let dtype = options.dtype.map(weight_dtype).transpose()?;
        let plan = self.checked_plan(if options.partial { Scope::Present } else { Scope::All })?;
        let (tensors, tasks) = tasks(&plan, dtype, options.format);
        let main = dtype.unwrap_or_else(|| stored_dtype(&plan));
        let mut options = options.clone();
        options.sidecars_from.get_or_insert_with(|| self.dir().to_path_buf());
        check_target(dir, options.overwrite)?;
        replace_directory(dir, |new| {
            fill(self.config(), main, &tensors, new, dir, &options, |output| {
                copy_tensors(self, &tasks, output, progress)
            })
        })
    }
}

/// What is written, and where each of its values comes from.
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
                    tensors.push(OutTensor { name: name.clone(), dtype, shape: shape.clone() });
                    tasks.push(CopyTask { source, tensor, at: 0, layout: Layout::HuggingFace, dtype });
                }
            }
            Format::Burnpack => {
                let tensor = tensors.len();
                tensors.push(OutTensor { name: parameter.path.clone(), dtype, shape: parameter.shape.clone() });
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

/// Fills a directory with everything but the weights, which `write` writes. Messages call it `shown`.
fn fill(
    config: &ModelConfig,
    dtype: WeightDtype,
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
    sidecars::write(config, dtype, options.sidecars_from.as_deref(), dir, shown, needed)?;
    write(&output)?;
    output.finish()
}

/// Refuses to replace what must not be replaced.
fn check_target(dir: &Path, overwrite: bool) -> Result<(), CheckpointError> {
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
    let foreign = names.iter().find(foreign).or_else(|| names.first().filter(|_| !dir.join(CONFIG).exists()));
    match foreign {
        Some(entry) => Err(CheckpointError::Foreign { dir: dir.to_path_buf(), entry: entry.clone() }),
        None => Ok(()),
    }
}

/// Collects the dtypes of all parameters, in order.
struct DtypeCollector {
    parameters: Vec<ParameterShape>,
    path: Vec<String>,
    dtypes: Vec<WeightDtype>,
    failure: Option<CheckpointError>,
}

impl ModuleVisitor for DtypeCollector {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        let expected = self.parameters.get(self.dtypes.len()).map(|parameter| parameter.path.as_str());
        assert_eq!(expected, Some(path.as_str()), "the list of parameters is that of the module");
        match weight_dtype(param.val().dtype()) {
            Ok(dtype) => self.dtypes.push(dtype),
            Err(failure) => {
                self.dtypes.push(WeightDtype::F32);
                self.failure.get_or_insert(failure);
            }
        }
    }
}

/// Writes parameter after parameter.
struct WeightSaver<'a> {
    parameters: &'a [ParameterShape],
    tensors: &'a [OutTensor],
    /// For each parameter, the first of its tensors.
    starts: &'a [usize],
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
        let (parameter, first) = (&self.parameters[self.at], self.starts[self.at]);
        self.at += 1;
        let device = |error: String| CheckpointError::Device { parameter: parameter.path.clone(), problem: error };
        let written = match param.val().try_into_data() {
            Ok(data) => self.write(parameter, first, &data),
            Err(error) => Err(device(error.to_string())),
        };
        self.failure = written.err();
    }
}

impl WeightSaver<'_> {
    fn write(&mut self, parameter: &ParameterShape, first: usize, data: &TensorData) -> Result<(), CheckpointError> {
        with_weight!(weight_dtype(data.dtype())?, S => {
            let values = data.as_slice::<S>().map_err(|error| CheckpointError::Device {
                parameter: parameter.path.clone(),
                problem: error.to_string(),
            })?;
            with_weight!(self.tensors[first].dtype, T => self.write_values::<S, T>(parameter, first, values))
        })
    }

    fn write_values<S: Weight, T: Weight>(
        &mut self,
        parameter: &ParameterShape,
        first: usize,
        values: &[S],
    ) -> Result<(), CheckpointError> {
        let tensors = self.tensors;
        let blame = |tensor: usize| move || blame::<S, T>(&tensors[tensor].name, values);
        match parameter.shape.as_slice() {
            &[.., input, output] if names::transposed(parameter.kind) && self.format == Format::HuggingFace => {
                for (expert, matrix) in values.chunks_exact(input * output).enumerate() {
                    let tensor = first + expert;
                    write_transposed::<S, T>(self.output, tensor, matrix, input, output, blame(tensor))?;
                }
                Ok(())
            }
            _ => write_converted::<S, T>(self.output, first, values, blame(first)),
        }
    }
}

fn blame<S: Weight, T: Weight>(tensor: &str, source: &[S]) -> CheckpointError {
    let tensor = tensor.to_owned();
    match WeightDtype::try_from(T::dtype()) {
        Ok(dtype) if source.iter().all(|value| value.finite()) => {
            CheckpointError::Overflow { tensor, file: None, dtype }
        }
        _ => CheckpointError::NonFinite { tensor, file: None },
    }
}

/// Writes a matrix `[input, output]` as `[output, input]`, some rows at a time.
fn write_transposed<S: Weight, T: Weight>(
    output: &Output,
    tensor: usize,
    matrix: &[S],
    rows: usize,
    columns: usize,
    blame: impl FnOnce() -> CheckpointError,
) -> Result<(), CheckpointError> {
    let source = PlainRows::<S>::new(bytemuck::cast_slice(matrix), columns);
    let chunks = row_chunks(std::iter::once((columns, rows * size_of::<T>())));
    in_chunks(output, tensor, &chunks, rows, blame, |first, chunk: &mut [T]| transpose(&source, rows, first, chunk))
}

/// Writes values as they lie, some at a time.
fn write_converted<S: Weight, T: Weight>(
    output: &Output,
    tensor: usize,
    values: &[S],
    blame: impl FnOnce() -> CheckpointError,
) -> Result<(), CheckpointError> {
    let chunks = row_chunks(std::iter::once((values.len(), size_of::<T>())));
    in_chunks(output, tensor, &chunks, 1, blame, |first, chunk: &mut [T]| {
        let values = &values[first..first + chunk.len()];
        Outcome::of(conversion::convert_bytes::<S, T>(bytemuck::cast_slice(values), chunk))
    })
}

/// Has all threads make chunks of rows of `width` values, and writes them.
fn in_chunks<T: Weight>(
    output: &Output,
    tensor: usize,
    chunks: &[RowChunk],
    width: usize,
    blame: impl FnOnce() -> CheckpointError,
    make: impl Fn(usize, &mut [T]) -> Outcome + Sync,
) -> Result<(), CheckpointError> {
    let spoilt = AtomicBool::new(false);
    in_order(chunks, |_, chunk, buffer| {
        let target = parallel_copy::values::<T>(buffer, chunk.rows.len() * width);
        if make(chunk.rows.start, target) == Outcome::NonFinite {
            spoilt.store(true, Ordering::Relaxed);
            return Ok(());
        }
        output.write(tensor, (chunk.rows.start * width * size_of::<T>()) as u64, bytemuck::cast_slice(target))
    })?;
    if spoilt.into_inner() { Err(blame()) } else { Ok(()) }
}
