//! Decoding a stored tensor into a requested layout and dtype.

use std::ops::Range;

use moonlight_model::disjoint::DisjointMut;
use moonlight_simd::quant::Bits;

use crate::checkpoint::Checkpoint;
use crate::dtype::conversion::{self, Outcome, PlainRows, RowPieces, Weight, WeightDtype, with_weight};
use crate::dtype::gguf_rows::{GgufMatrix, GgufRows, StoredOrder, key_rows};
use crate::dtype::quant::{Fp8, PackedIntegers, Scales, bit_count, scales};
use crate::dtype::transpose::{transpose, transpose_into};
use crate::error::CheckpointError;
use crate::format::shard::FileRange;
use crate::mapping::names::HfTensor;

/// The orientation of matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// A projection is `[out, in]`.
    HuggingFace,
    /// A projection is `[in, out]`.
    Burn,
}

/// A tensor with its name in the Hugging Face layout, and where and how it is stored.
#[derive(Debug)]
pub(crate) struct SourceTensor {
    /// Its name and shape in the Hugging Face layout.
    pub(crate) tensor: HfTensor,
    /// Index of the checkpoint's tensor that contains it.
    pub(crate) stored_index: usize,
    /// The dtype of its values: the narrowest that represents them exactly. FP8 and the blocks of GGUF count as bf16, in
    /// which such models compute.
    pub(crate) dtype: WeightDtype,
    /// Where its bytes are.
    pub(crate) part: FileRange,
    pub(crate) encoding: Encoding,
    /// Whether Burn's layout is the transpose of Hugging Face's.
    pub(crate) transposed: bool,
}

/// How a tensor is encoded.
#[derive(Debug)]
pub(crate) enum Encoding {
    Plain(Layout),
    Fp8 {
        scale: (FileRange, WeightDtype),
        block: [usize; 2],
    },
    /// Integers of 4 or 8 bits, packed into words.
    Packed {
        bits: Bits,
        scale: (FileRange, WeightDtype),
        group: usize,
    },
    Gguf(GgufRows),
}

impl SourceTensor {
    /// Rows and columns in a layout; a vector is a single column.
    pub(crate) fn dims(&self, layout: Layout) -> (usize, usize) {
        match *self.tensor.shape.as_slice() {
            [rows, columns] if self.transposed && layout == Layout::Burn => (columns, rows),
            [rows, columns] => (rows, columns),
            ref shape => (shape.iter().product(), 1),
        }
    }

    /// Number of values.
    pub(crate) fn count(&self) -> usize {
        self.tensor.shape.iter().product()
    }

    /// The byte range of some rows of the stored tensor; in a GGUF file also of those with which they are mixed.
    pub(crate) fn stored_rows(&self, rows: &Range<usize>) -> FileRange {
        let (height, _) = self.dims(self.stored());
        let unit = self.unit();
        let bytes = self.part.range.len() / (height / unit).max(1);
        let (start, units) = (self.part.range.start, rows.start / unit..rows.end.div_ceil(unit));
        FileRange { shard: self.part.shard, range: start + units.start * bytes..start + units.end * bytes }
    }

    /// The rows that are read together.
    fn unit(&self) -> usize {
        if let Encoding::Gguf(rows) = &self.encoding { rows.unit() } else { 1 }
    }

    /// The quantized form in words; `None` for unquantized values.
    pub(crate) fn quantized_form(&self) -> Option<String> {
        let &[rows, columns] = self.tensor.shape.as_slice() else { return None };
        Some(match self.encoding {
            Encoding::Plain(_) => return None,
            Encoding::Gguf(GgufRows { block_type, .. }) if !block_type.is_quantized() => return None,
            Encoding::Gguf(GgufRows { block_type, .. }) => {
                format!("{block_type}, in blocks of {} values", block_type.values())
            }
            Encoding::Fp8 { block, .. } if block == [rows, columns] => "FP8, one scale per tensor".into(),
            Encoding::Fp8 { block: [1, width], .. } if width == columns => "FP8, one scale per row".into(),
            Encoding::Fp8 { block: [height, width], .. } => format!("FP8, one scale per block of {height} x {width}"),
            Encoding::Packed { bits, group, .. } => format!("INT{}, one scale per group of {group}", bit_count(bits)),
        })
    }

    /// Every part of a file that is read for this tensor.
    pub(crate) fn parts(&self) -> impl Iterator<Item = &FileRange> {
        let second = match &self.encoding {
            Encoding::Plain(_) => None,
            Encoding::Fp8 { scale, .. } | Encoding::Packed { scale, .. } => Some(&scale.0),
            Encoding::Gguf(GgufRows { order: StoredOrder::ValueUp { keys, .. }, .. }) => Some(&keys.0),
            Encoding::Gguf(_) => None,
        };
        std::iter::once(&self.part).chain(second)
    }

    /// Size of these parts together, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.parts().map(|part| part.range.len() as u64).sum()
    }

    /// The layout in the file.
    pub(crate) fn stored(&self) -> Layout {
        match self.encoding {
            Encoding::Plain(layout) => layout,
            Encoding::Fp8 { .. } | Encoding::Packed { .. } | Encoding::Gguf(_) => Layout::HuggingFace,
        }
    }

    /// Whether the file contains the transpose of the requested layout, so that each requested row is scattered over
    /// the file.
    pub(crate) fn transposed_in(&self, layout: Layout) -> bool {
        self.transposed && self.stored() != layout
    }

    /// The byte range of some rows, if the file contains them in exactly the requested layout and dtype.
    pub(crate) fn verbatim(&self, layout: Layout, dtype: WeightDtype, rows: &Range<usize>) -> Option<FileRange> {
        if self.transposed_in(layout) || dtype != self.dtype || !matches!(self.encoding, Encoding::Plain(_)) {
            return None;
        }
        let row = self.dims(layout).1 * dtype.size();
        let start = self.part.range.start;
        Some(FileRange { shard: self.part.shard, range: start + rows.start * row..start + rows.end * row })
    }
}

/// Runs `$body` with a [`RowSource`](conversion::RowSource) named `$lines`, whatever the encoding. The expression `$rows`
/// makes it by calling `$part`, a function from the first row and the bytes of a part to a `RowSource`.
macro_rules! with_rows {
    ($source:expr, $scales:expr, $part:ident => $rows:expr, $lines:ident => $body:expr) => {{
        let (_, columns) = $source.dims($source.stored());
        let scales: &Scales = $scales;
        match &$source.encoding {
            Encoding::Plain(_) => with_weight!($source.dtype, S => {
                let $part = |first, bytes| PlainRows::<S>::from_row(first, bytes, columns);
                let $lines = &$rows;
                $body
            }),
            &Encoding::Fp8 { block, .. } => {
                let $part = |first, bytes| Fp8 { bytes, first, columns, block, scales };
                let $lines = &$rows;
                $body
            }
            &Encoding::Packed { bits, group, .. } => {
                let $part = |first, bytes| PackedIntegers { bits, bytes, first, columns, group, scales };
                let $lines = &$rows;
                $body
            }
            Encoding::Gguf(rows) => {
                let $part = |first: usize, bytes| {
                    GgufMatrix { rows, bytes, first: first / rows.unit() * rows.unit(), columns, keys: scales }
                };
                let $lines = &$rows;
                $body
            }
        }
    }};
}

impl SourceTensor {
    /// Decodes rows of the stored tensor, given as `bytes` and beginning with row `first`.
    pub(crate) fn decode<T: Weight>(&self, first: usize, bytes: &[u8], scales: &Scales, target: &mut [T]) -> Outcome {
        let (_, columns) = self.dims(self.stored());
        with_rows!(self, scales, part => part(first, bytes), lines => conversion::copy(lines, columns, first, target))
    }

    /// Decodes columns of the stored tensor, beginning with column `first`, as rows of `target`. Each of `pieces` has 2
    /// to the power of `shift` rows.
    pub(crate) fn decode_columns<T: Weight>(
        &self,
        first: usize,
        pieces: &[&[u8]],
        shift: u32,
        scales: &Scales,
        target: &mut [T],
    ) -> Outcome {
        let (rows, _) = self.dims(self.stored());
        let pieces = || pieces.iter().enumerate().map(|(at, bytes)| (at << shift, *bytes));
        with_rows!(
            self, scales,
            part => RowPieces { shift, pieces: pieces().map(|(first, bytes)| part(first, bytes)).collect() },
            lines => transpose(lines, rows, first, target)
        )
    }
}

impl Checkpoint {
    /// Reads the scales for some rows of the stored tensor; none if it has none. Of a `kv_b_proj` in a GGUF file, the rows of
    /// keys.
    pub(crate) fn scales(&self, source: &SourceTensor, rows: &Range<usize>) -> Result<Scales, CheckpointError> {
        let ((scale, dtype), height) = match &source.encoding {
            Encoding::Plain(_) => return Ok(Scales::default()),
            Encoding::Fp8 { scale, block } => (scale, block[0]),
            Encoding::Packed { scale, .. } => (scale, 1),
            Encoding::Gguf(GgufRows { order: StoredOrder::ValueUp { rows: head, keys }, .. }) => {
                let (part, block_type) = keys;
                let bytes = part.range.len() / head.heads.max(1);
                let unit = head.key + head.value;
                let (first, last) = (rows.start / unit, rows.end.div_ceil(unit));
                let range = part.range.start + first * bytes..part.range.start + last * bytes;
                let mut stored = vec![0; range.len()];
                self.read_part(&FileRange { shard: part.shard, range }, &mut stored)?;
                return Ok(Scales { first: first * head.key, values: key_rows(*block_type, &stored, head) });
            }
            Encoding::Gguf(_) => return Ok(Scales::default()),
        };
        let (all, _) = source.dims(source.stored());
        let row = scale.range.len() / all.div_ceil(height).max(1); // bytes per row of scales
        let (first, last) = (rows.start / height, rows.end.div_ceil(height)); // rows of scales
        let range = scale.range.start + first * row..scale.range.start + last * row;
        let mut bytes = vec![0; range.len()];
        self.read_part(&FileRange { shard: scale.shard, range }, &mut bytes)?;
        Ok(Scales { first, values: scales(&bytes, *dtype) })
    }

    /// Decodes rows of the stored tensor, given as `bytes`, into `target`, in which the whole tensor begins at index
    /// `at`, in the requested layout.
    ///
    /// # Safety
    ///
    /// No other claim on `target` may overlap the elements to which these rows decode.
    pub(crate) unsafe fn place<T: Weight>(
        &self,
        source: &SourceTensor,
        layout: Layout,
        rows: Range<usize>,
        bytes: &[u8],
        target: &DisjointMut<'_, T>,
        at: usize,
    ) -> Result<Outcome, CheckpointError> {
        let (height, columns) = source.dims(source.stored());
        let first = rows.start;
        let scales = self.scales(source, &rows)?;
        Ok(with_rows!(source, &scales, part => part(first, bytes), lines => if source.transposed_in(layout) {
            assert!(at.is_multiple_of(height), "a source begins at a row of the target");
            let top = at / height;
            // A band of rows of `[out, in]` becomes a block of columns of `[in, out]`.
            // SAFETY: the caller's promise, for the elements of these columns.
            let target = unsafe { target.block(height, top..top + columns, rows.clone()) };
            transpose_into(lines, rows, 0..columns, target)
        } else {
            // SAFETY: the caller's promise.
            let target = unsafe { target.row(at + first * columns..at + rows.end * columns) };
            conversion::copy(lines, columns, first, target)
        }))
    }

    /// The error for a tensor with a value that is non-finite in a dtype. Reads the tensor again to find out whether the
    /// stored value is NaN or infinite itself, or only out of range.
    pub(crate) fn value_error(&self, source: &SourceTensor, dtype: WeightDtype) -> CheckpointError {
        let found = &self.tensor_list()[source.stored_index];
        let (tensor, file) = (found.name.clone(), Some(self.shard(found.shard).path().to_path_buf()));
        match self.all_finite(source) {
            Ok(true) => CheckpointError::Overflow { tensor, file, dtype },
            Ok(false) => CheckpointError::NonFinite { tensor, file },
            Err(error) => error,
        }
    }

    /// Whether all values of a stored tensor are finite in f32.
    fn all_finite(&self, source: &SourceTensor) -> Result<bool, CheckpointError> {
        /// Bytes read at a time.
        const CHUNK: usize = 1 << 20;
        let (rows, columns) = source.dims(source.stored());
        let height = (CHUNK / (source.part.range.len() / rows.max(1)).max(1)).max(1);
        let (mut bytes, mut values) = (Vec::new(), Vec::new());
        for first in (0..rows).step_by(height) {
            let rows = first..rows.min(first + height);
            let part = source.stored_rows(&rows);
            bytes.resize(part.range.len(), 0);
            self.read_part(&part, &mut bytes)?;
            values.resize(rows.len() * columns, 0.0f32);
            if source.decode(first, &bytes, &self.scales(source, &rows)?, &mut values) == Outcome::NonFinite {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
