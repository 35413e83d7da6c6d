//! Writing a quantized checkpoint in the layout of [`format::pack_quantized`](crate::format::pack_quantized), from file to file.

use std::ops::ControlFlow;
use std::path::Path;

use moonlight_model::config::ParameterKind;
use moonlight_simd::quant::{BLOCK, Bits, ScaleType};

use crate::checkpoint::Checkpoint;
use crate::dtype::conversion::{Outcome, WeightDtype, all_finite};
use crate::dtype::dequantize::{Encoding, Layout, SourceTensor};
use crate::dtype::quantize::{packed_bytes, quantize, scales_are_finite};
use crate::error::CheckpointError;
use crate::format::pack_quantized;
use crate::format::shard::FileRange;
use crate::format::sidecars::SavedConfig;
use crate::io::atomic_dir::replace_directory;
use crate::io::parallel_copy::{self, Buffers, ChunkReader, CopyTask, RowChunk, copy_tensors, in_order, row_chunks};
use crate::io::writer::{OutTensor, Output};
use crate::load::{stored_dtype, weight_dtype};
use crate::mapping::load_plan::{LoadPlan, Scope};
use crate::progress::Progress;
use crate::save::{Format, SaveOptions, check_target, fill};

/// What was quantized.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantizeReport {
    /// Number of matrices that were quantized; each expert's counts.
    pub quantized: usize,
    /// Those of them whose stored values and scales were copied, because they already had this form.
    pub copied: usize,
    /// The modules whose rows are not a multiple of 32 values. They were written as they are.
    pub unquantized: Vec<String>,
}

/// A matrix to quantize, and the indices of its tensors in the output.
struct QuantizeTask<'a> {
    source: &'a SourceTensor,
    values: usize,
    scale: usize,
    shape: usize,
}

/// The target form of the matrices.
#[derive(Clone, Copy)]
struct Form {
    bits: Bits,
    scale_type: ScaleType,
}

/// The tensors to write, and the work that fills them.
struct Tasks<'a> {
    tensors: Vec<OutTensor>,
    copies: Vec<CopyTask<'a>>,
    matrices: Vec<QuantizeTask<'a>>,
    unquantized: Vec<String>,
}

impl Checkpoint {
    /// Rewrites this checkpoint with the projections of all layers quantized: attention, dense MLPs, routed and shared experts,
    /// in groups of 32 values of a row with one scale each, in the layout `pack-quantized` of compressed-tensors. Embedding,
    /// head, routers and norms keep their dtype, or get that of `options`. The scales are f16 in an f16 model, else bf16.
    ///
    /// Weights are read, quantized and written a chunk of rows at a time. Matrices that already have this form are copied as
    /// they are.
    ///
    /// # Errors
    ///
    /// Those of [`convert`](Checkpoint::convert); [`CheckpointError::NothingToQuantize`];
    /// [`CheckpointError::Interrupted`] if `progress` stops the work.
    ///
    /// # Panics
    ///
    /// If the format of `options` is not [`Format::HuggingFace`].
    pub fn convert_quantized(
        &self,
        dir: &Path,
        bits: Bits,
        options: &SaveOptions,
        progress: &dyn Progress,
    ) -> Result<QuantizeReport, CheckpointError> {
        assert_eq!(options.format, Format::HuggingFace, "the layout is one of safetensors");
        let dtype = options.dtype.map(weight_dtype).transpose()?;
        let plan = self.checked_plan(if options.partial { Scope::Present } else { Scope::All })?;
        let config_dtype = dtype.unwrap_or_else(|| stored_dtype(&plan));
        let scale_type = match pack_quantized::scale_dtype(config_dtype) {
            WeightDtype::F16 => ScaleType::F16,
            WeightDtype::Bf16 | WeightDtype::F32 => ScaleType::Bf16,
        };
        let form = Form { bits, scale_type };
        let Tasks { tensors, copies, matrices, unquantized } = tasks(&plan, dtype, config_dtype, form.bits);
        if matrices.is_empty() {
            return Err(CheckpointError::NothingToQuantize { dir: self.dir().to_path_buf() });
        }
        let mut options = options.clone();
        options.sidecars_from.get_or_insert_with(|| self.dir().to_path_buf());
        check_target(dir, options.overwrite)?;
        let quantization = Some(pack_quantized::quantization_config(form.bits, &unquantized));
        let config = SavedConfig { model: self.config(), dtype: config_dtype, quantization };
        replace_directory(dir, |new| {
            fill(&config, &tensors, new, dir, &options, |output| {
                progress.begin(output.total());
                copy_tensors(self, &copies, output, progress)?;
                quantize_tensors(self, &matrices, form, output, progress)
            })
        })?;
        let copied = matrices.iter().filter(|task| is_stored_as(task.source, form)).count();
        Ok(QuantizeReport { quantized: matrices.len(), copied, unquantized })
    }
}

fn tasks(plan: &LoadPlan, dtype: Option<WeightDtype>, config_dtype: WeightDtype, bits: Bits) -> Tasks<'_> {
    let mut tasks = Tasks { tensors: Vec::new(), copies: Vec::new(), matrices: Vec::new(), unquantized: Vec::new() };
    for planned in &plan.parameters {
        let quantized = pack_quantized::is_quantized(&planned.parameter);
        let dtype = match (planned.parameter.kind, dtype) {
            (ParameterKind::CorrectionBias, _) => WeightDtype::F32,
            (_, Some(dtype)) => dtype,
            (_, None) => planned.stored(),
        };
        for source in &planned.sources {
            let tensor = tasks.tensors.len();
            if quantized && pack_quantized::has_whole_groups(&source.tensor.shape) {
                let scale = pack_quantized::scale_dtype(config_dtype);
                tasks.tensors.extend(pack_quantized::tensors(&source.tensor, bits, scale));
                tasks.matrices.push(QuantizeTask { source, values: tensor, scale: tensor + 1, shape: tensor + 2 });
                continue;
            }
            if quantized {
                tasks.unquantized.push(pack_quantized::module_of(&source.tensor.name).to_owned());
            }
            let (name, shape) = (source.tensor.name.clone(), source.tensor.shape.clone());
            tasks.tensors.push(OutTensor { name, dtype: dtype.into(), shape });
            tasks.copies.push(CopyTask { source, tensor, at: 0, layout: Layout::HuggingFace, dtype });
        }
    }
    tasks
}

/// Whether a matrix is stored in the requested form, so that its bytes are copied. Scales of another dtype are not: rounding
/// them would move all values of their group.
fn is_stored_as(source: &SourceTensor, form: Form) -> bool {
    let scale_dtype = match form.scale_type {
        ScaleType::F16 => WeightDtype::F16,
        ScaleType::Bf16 => WeightDtype::Bf16,
    };
    matches!(&source.encoding, Encoding::Packed { bits, scale, group } if *bits == form.bits && *group == BLOCK && scale.1 == scale_dtype)
}

fn quantize_tensors(
    checkpoint: &Checkpoint,
    tasks: &[QuantizeTask<'_>],
    form: Form,
    output: &Output,
    progress: &dyn Progress,
) -> Result<(), CheckpointError> {
    let layout = Layout::HuggingFace;
    let chunks = row_chunks(tasks.iter().map(|task| {
        let (rows, columns) = task.source.dims(layout);
        (rows, columns * size_of::<f32>())
    }));
    let reading = ChunkReader::new(checkpoint, tasks.iter().map(|task| (task.source, layout)).collect(), &chunks);
    in_order(&chunks, |at, chunk, buffers: &mut QuantizeBuffers| {
        reading.begin(&chunks, at);
        let task = &tasks[chunk.source];
        let (_, columns) = task.source.dims(layout);
        let count = chunk.rows.len() * columns;
        let values = parallel_copy::values::<u8>(&mut buffers.values, packed_bytes(form.bits, count));
        let scales = parallel_copy::values::<u16>(&mut buffers.scales, count / BLOCK);
        if is_stored_as(task.source, form) {
            read_stored(checkpoint, task.source, chunk, values, bytemuck::cast_slice_mut(scales), form.scale_type)?;
        } else {
            let (bytes, outcome) = reading.rows::<f32>(chunk, &mut buffers.read)?;
            if outcome.unwrap_or_else(|| all_finite::<f32>(bytes)) == Outcome::NonFinite {
                return Err(checkpoint.value_error(task.source, WeightDtype::F32));
            }
            if !quantize(bytemuck::cast_slice(bytes), form.bits, form.scale_type, values, scales) {
                return Err(checkpoint.value_error(task.source, pack_quantized::scale_dtype(WeightDtype::F16)));
            }
        }
        let first = chunk.rows.start * columns;
        let scales: &[u8] = bytemuck::cast_slice(scales);
        output.write(task.values, packed_bytes(form.bits, first) as u64, values)?;
        output.write(task.scale, (first / BLOCK * size_of::<u16>()) as u64, scales)?;
        let mut written = (values.len() + scales.len()) as u64;
        if chunk.rows.start == 0 {
            let shape: Vec<u8> =
                task.source.tensor.shape.iter().flat_map(|side| (*side as i64).to_le_bytes()).collect();
            output.write(task.shape, 0, &shape)?;
            written += shape.len() as u64;
        }
        reading.end(chunk);
        match progress.advance(written) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(CheckpointError::Interrupted),
        }
    })
}

/// The buffers of one thread.
#[derive(Default)]
struct QuantizeBuffers {
    read: Buffers,
    values: Vec<u64>,
    scales: Vec<u64>,
}

/// Reads the values and scales of some rows of a matrix that is stored in the requested form.
fn read_stored(
    checkpoint: &Checkpoint,
    source: &SourceTensor,
    chunk: &RowChunk,
    values: &mut [u8],
    scales: &mut [u8],
    scale_type: ScaleType,
) -> Result<(), CheckpointError> {
    let Encoding::Packed { scale: (scale, _), .. } = &source.encoding else { panic!("the matrix is packed") };
    checkpoint.read_part(&source.stored_rows(&chunk.rows), values)?;
    let start = scale.range.start + chunk.rows.start * (scales.len() / chunk.rows.len());
    checkpoint.read_part(&FileRange { shard: scale.shard, range: start..start + scales.len() }, scales)?;
    if scales_are_finite(scales, scale_type) { Ok(()) } else { Err(checkpoint.value_error(source, WeightDtype::F32)) }
}
