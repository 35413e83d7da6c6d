//! Loading matrices as [`QuantizedWeight`]s: integers of the files in the order of the kernels, without widening them to floats,
//! and other values rounded a chunk of rows at a time.

use std::ops::Range;

use burn::tensor::Device;
use half::{bf16, f16};
use moonlight_model::config::ParameterKind;
use moonlight_model::disjoint::DisjointMut;
use moonlight_model::{QuantBits, QuantizedShape, QuantizedWeight, ScaleType, huge_pages};
use moonlight_simd::quant::{BLOCK, Bits, CodeOrder, MatrixWriter, TILE, quantize_block};

use crate::checkpoint::Checkpoint;
use crate::dtype::conversion::{Outcome, WeightDtype};
use crate::dtype::dequantize::{Encoding, Layout, SourceTensor};
use crate::dtype::gguf_rows::{GgufRows, StoredOrder};
use crate::error::CheckpointError;
use crate::format::gguf::BlockType;
use crate::format::shard::FileRange;
use crate::io::parallel_copy::{self, RowChunk, in_order};
use crate::io::prefetch::PrefetchReader;
use crate::mapping::load_plan::PlannedParameter;

/// Approximate number of bytes that a thread reads at a time.
const CHUNK: usize = 1 << 20;

/// What becomes of quantized weights when a checkpoint is loaded, and which weights are quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadQuantization {
    /// Every weight is loaded as a float; quantized ones are dequantized.
    #[default]
    Dequantize,
    /// Projections and head stay quantized where the files have them in a form of the kernels: blocks of 32 consecutive inputs
    /// with a scale of 16 bits, that is, `pack-quantized` with groups of 32 and without zero points, and GGUF's `Q8_0` and
    /// `Q4_0`. Other forms are dequantized.
    AsStored,
    /// The projections of all layers are loaded in this many bits, and the head in 8: values that are stored like this as they are,
    /// others rounded.
    To(QuantBits),
}

/// How the rows of a source become blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// They are blocks of this many bits.
    Stored { bits: Bits, scale_type: ScaleType },
    /// They are read as f32 and quantized.
    Rounded,
}

fn form(source: &SourceTensor) -> Form {
    let (_, columns) = source.dims(Layout::HuggingFace);
    match &source.encoding {
        Encoding::Packed { bits, scale: (_, dtype), group: BLOCK } if columns.is_multiple_of(BLOCK) => match dtype {
            WeightDtype::F16 => Form::Stored { bits: *bits, scale_type: ScaleType::F16 },
            WeightDtype::Bf16 => Form::Stored { bits: *bits, scale_type: ScaleType::Bf16 },
            WeightDtype::F32 => Form::Rounded,
        },
        // The keys of `kv_b_proj` are stored transposed, so that their blocks are along the outputs.
        Encoding::Gguf(GgufRows { order: StoredOrder::ValueUp { .. }, .. }) => Form::Rounded,
        Encoding::Gguf(GgufRows { block_type: BlockType::Q8_0, .. }) => {
            Form::Stored { bits: Bits::Eight, scale_type: ScaleType::F16 }
        }
        Encoding::Gguf(GgufRows { block_type: BlockType::Q4_0, .. }) => {
            Form::Stored { bits: Bits::Four, scale_type: ScaleType::F16 }
        }
        _ => Form::Rounded,
    }
}

/// Whether the form of a GGUF matrix is quantized in one of the forms of the kernels, except for the order of its rows.
fn is_split_in_blocks(source: &SourceTensor) -> bool {
    matches!(
        &source.encoding,
        Encoding::Gguf(GgufRows {
            block_type: BlockType::Q8_0 | BlockType::Q4_0,
            order: StoredOrder::ValueUp { keys: (_, BlockType::Q8_0 | BlockType::Q4_0), .. },
        })
    )
}

/// The bits in which a parameter is loaded, `None` as floats. Embeddings, routers, norms and biases always are floats.
pub(crate) fn bits_of(planned: &PlannedParameter, quantization: LoadQuantization) -> Option<Bits> {
    let sources = &planned.sources;
    let head = match planned.parameter.kind {
        ParameterKind::Matrix | ParameterKind::Experts => false,
        ParameterKind::Head => true,
        _ => return None,
    };
    // The rows of a burnpack file are the inputs.
    if sources.iter().any(|source| source.stored() != Layout::HuggingFace) {
        return None;
    }
    match quantization {
        LoadQuantization::Dequantize => None,
        LoadQuantization::To(bits) => Some(if head { Bits::Eight } else { bits }),
        // The two halves of `kv_b_proj` are quantized along different dimensions. In 8 bits, rounding the first one again loses
        // little, whatever its own bits.
        LoadQuantization::AsStored if sources.iter().all(is_split_in_blocks) => Some(Bits::Eight),
        LoadQuantization::AsStored => {
            let mut forms = sources.iter().map(form);
            match forms.next()? {
                first @ Form::Stored { bits, .. } if forms.all(|form| form == first) => Some(bits),
                _ => None,
            }
        }
    }
}

/// The buffers of one thread.
#[derive(Default)]
struct Buffers {
    bytes: Vec<u64>,
    floats: Vec<u64>,
    scales: Vec<u64>,
}

impl Checkpoint {
    /// Reads a matrix, or the stack of all experts' matrices, as a quantized weight.
    pub(super) fn read_quantized(
        &self,
        planned: &PlannedParameter,
        bits: Bits,
        reader: &PrefetchReader<'_>,
        device: &Device,
    ) -> Result<QuantizedWeight, CheckpointError> {
        let sources = &planned.sources;
        let experts = sources.len();
        let &[.., input, output] = planned.parameter.shape.as_slice() else {
            panic!("`{}` is a matrix", planned.parameter.path)
        };
        let shape = QuantizedShape { bits, input, output };
        let forms: Vec<Form> = sources.iter().map(form).collect();
        let stored_type = |form: &Form| match form {
            Form::Stored { bits: found, scale_type } if *found == bits => Some(*scale_type),
            _ => None,
        };
        // One type for all. Where the files have several, only those sources are copied that have the first.
        let scale_type = forms.iter().find_map(stored_type).unwrap_or(ScaleType::F16);
        let mut values = huge_pages::zeros::<u8>(experts * shape.value_bytes());
        let mut scales = huge_pages::zeros::<u16>(experts * shape.scales());
        let (all_values, all_scales) = (DisjointMut::new(&mut values), DisjointMut::new(&mut scales));
        in_order(&tile_chunks(sources), |_, RowChunk { source: expert, rows }, buffers: &mut Buffers| {
            let source = &sources[*expert];
            let tiles = rows.start / TILE..rows.end.div_ceil(TILE);
            let part = |start: usize, tile: usize| start + tiles.start * tile..start + tiles.end * tile;
            let values = part(expert * shape.value_bytes(), shape.blocks() * bits.tile_bytes());
            let scales = part(expert * shape.scales(), shape.blocks() * TILE);
            // SAFETY: `in_order` takes each chunk once, and the chunks of `tile_chunks` partition the tiles of a source.
            let (values, scales) = unsafe { (all_values.row(values), all_scales.row(scales)) };
            let mut writer = MatrixWriter::new(shape, tiles.start, values, scales);
            if !rows.end.is_multiple_of(TILE) {
                writer.fill();
            }
            if forms[*expert] == (Form::Stored { bits, scale_type }) {
                self.copy_codes(source, rows, reader, &mut writer, buffers)
            } else {
                self.round_rows(source, rows, bits, scale_type, reader, &mut writer, buffers)
            }
        })?;
        all_values.finish();
        all_scales.finish();
        Ok(QuantizedWeight::from_parts(values, scales, scale_type, experts, shape, device))
    }

    /// Copies the integers and scales of some rows.
    fn copy_codes(
        &self,
        source: &SourceTensor,
        rows: &Range<usize>,
        reader: &PrefetchReader<'_>,
        writer: &mut MatrixWriter<'_>,
        buffers: &mut Buffers,
    ) -> Result<(), CheckpointError> {
        let part = source.stored_rows(rows);
        let bytes = parallel_copy::values::<u8>(&mut buffers.bytes, part.range.len());
        reader.read(&part, bytes)?;
        let (_, columns) = source.dims(Layout::HuggingFace);
        let blocks = columns / BLOCK;
        let mut finite = true;
        match &source.encoding {
            Encoding::Packed { bits, scale: (scale, dtype), .. } => {
                let is_finite: fn(u16) -> bool = match dtype {
                    WeightDtype::F16 => |bits| f16::from_bits(bits).is_finite(),
                    _ => |bits| bf16::from_bits(bits).is_finite(),
                };
                let stored = parallel_copy::values::<u16>(&mut buffers.scales, rows.len() * blocks);
                let start = scale.range.start + rows.start * blocks * size_of::<u16>();
                let range = start..start + size_of_val(stored);
                self.read_part(&FileRange { shard: scale.shard, range }, bytemuck::cast_slice_mut(stored))?;
                let codes = bytes.chunks_exact(blocks * bits.block_bytes());
                for ((row, codes), scales) in rows.clone().zip(codes).zip(stored.chunks_exact(blocks)) {
                    let codes = codes.chunks_exact(bits.block_bytes());
                    for (block, (codes, &scale)) in codes.zip(scales).enumerate() {
                        finite &= is_finite(scale);
                        writer.write_codes(row, block, codes, CodeOrder::Sequential, scale);
                    }
                }
            }
            Encoding::Gguf(stored @ GgufRows { block_type, order }) => {
                let first = rows.start / stored.unit() * stored.unit();
                for row in rows.clone() {
                    let at = match order {
                        StoredOrder::Rotated(rotated) => rotated.gguf_row(row) - first,
                        _ => row - first,
                    };
                    let bytes = &bytes[at * blocks * block_type.bytes()..][..blocks * block_type.bytes()];
                    for (block, bytes) in bytes.chunks_exact(block_type.bytes()).enumerate() {
                        // A block is its scale and its integers.
                        let (scale, codes) = bytes.split_at(size_of::<f16>());
                        let scale = f16::from_le_bytes([scale[0], scale[1]]);
                        finite &= scale.is_finite();
                        writer.write_codes(row, block, codes, CodeOrder::Ggml, scale.to_bits());
                    }
                }
            }
            encoding => unreachable!("{encoding:?} has no blocks of 32"),
        }
        if finite { Ok(()) } else { Err(self.value_error(source, WeightDtype::F32)) }
    }

    /// Reads some rows as f32 and quantizes them.
    #[expect(clippy::too_many_arguments, reason = "one call")]
    fn round_rows(
        &self,
        source: &SourceTensor,
        rows: &Range<usize>,
        bits: Bits,
        scale_type: ScaleType,
        reader: &PrefetchReader<'_>,
        writer: &mut MatrixWriter<'_>,
        buffers: &mut Buffers,
    ) -> Result<(), CheckpointError> {
        let (_, columns) = source.dims(Layout::HuggingFace);
        let part = source.stored_rows(rows);
        let bytes = parallel_copy::values::<u8>(&mut buffers.bytes, part.range.len());
        reader.read(&part, bytes)?;
        let floats = parallel_copy::values::<f32>(&mut buffers.floats, rows.len() * columns);
        if source.decode(rows.start, bytes, &self.scales(source, rows)?, floats) == Outcome::NonFinite {
            return Err(self.value_error(source, WeightDtype::F32));
        }
        let blocks = columns.div_ceil(BLOCK);
        let (mut codes, mut scales) = (vec![0; columns], vec![0; blocks]);
        for (row, weights) in rows.clone().zip(floats.chunks_exact(columns)) {
            let parts = weights.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)).zip(&mut scales);
            for ((weights, codes), scale) in parts {
                *scale = quantize_block(weights, bits, scale_type, codes);
            }
            if !scales.iter().all(|scale| scale_type.widen(*scale).is_finite()) {
                return Err(self.value_error(source, WeightDtype::F16));
            }
            writer.write(row, &codes, &scales);
        }
        Ok(())
    }
}

/// Divides sources into chunks of rows in the order of the files, each of whole tiles.
fn tile_chunks(sources: &[SourceTensor]) -> Vec<RowChunk> {
    let mut chunks = Vec::new();
    for (number, source) in sources.iter().enumerate() {
        let (rows, _) = source.dims(Layout::HuggingFace);
        let usual = CHUNK / (source.part.range.len() / rows.max(1)).max(1);
        // Rows that are mixed in the file are read together.
        let step = match &source.encoding {
            Encoding::Gguf(stored) if stored.unit().is_multiple_of(TILE) => stored.unit(),
            _ => TILE,
        };
        let height = (usual / step * step).max(step);
        chunks.extend(
            (0..rows).step_by(height).map(|first| RowChunk { source: number, rows: first..rows.min(first + height) }),
        );
    }
    chunks
}
