//! A stored tensor as values in the layout and dtype that are asked for.

use std::ops::Range;

use moonlight_model::disjoint::DisjointMut;

use crate::checkpoint::Checkpoint;
use crate::dtype::conversion::{self, Outcome, PlainRows, Weight, WeightDtype, with_weight};
use crate::dtype::quant::{Fp8, Int4, scales};
use crate::dtype::transpose::{transpose, transpose_into};
use crate::error::CheckpointError;
use crate::format::shard::FileRange;
use crate::mapping::names::HfTensor;

/// Which way round a matrix lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// A projection is `[out, in]`.
    HuggingFace,
    /// A projection is `[in, out]`.
    Burn,
}

/// One tensor as Hugging Face names it, wherever in the files it is and however it is kept.
#[derive(Debug)]
pub(crate) struct SourceTensor {
    /// The name and shape that it is saved by.
    pub(crate) tensor: HfTensor,
    /// Which of the checkpoint's tensors holds it.
    pub(crate) stored_index: usize,
    /// The dtype of its values: the narrowest that loses nothing, or for FP8 the one that its users compute in.
    pub(crate) dtype: WeightDtype,
    /// Where it lies.
    pub(crate) part: FileRange,
    pub(crate) encoding: Encoding,
    /// Whether Burn keeps the transpose of what Hugging Face does.
    pub(crate) transposed: bool,
}

/// How a tensor is kept.
#[derive(Debug)]
pub(crate) enum Encoding {
    Plain(Layout),
    Fp8 { scale: (FileRange, WeightDtype), block: [usize; 2] },
    Int4 { scale: (FileRange, WeightDtype), group: usize },
}

impl SourceTensor {
    /// Rows and columns in a layout; a vector is one column.
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

    /// Where the file holds some of its own rows.
    pub(crate) fn stored_rows(&self, rows: &Range<usize>) -> FileRange {
        let (height, _) = self.dims(self.stored());
        let row = self.part.range.len() / height.max(1);
        let start = self.part.range.start;
        FileRange { shard: self.part.shard, range: start + rows.start * row..start + rows.end * row }
    }

    /// Every part of a file that has to be read for it.
    pub(crate) fn parts(&self) -> impl Iterator<Item = &FileRange> {
        let scale = match &self.encoding {
            Encoding::Plain(_) => None,
            Encoding::Fp8 { scale, .. } | Encoding::Int4 { scale, .. } => Some(&scale.0),
        };
        std::iter::once(&self.part).chain(scale)
    }

    /// Bytes of these parts.
    pub(crate) fn bytes(&self) -> u64 {
        self.parts().map(|part| part.range.len() as u64).sum()
    }

    /// The layout that the file has.
    pub(crate) fn stored(&self) -> Layout {
        match self.encoding {
            Encoding::Plain(layout) => layout,
            Encoding::Fp8 { .. } | Encoding::Int4 { .. } => Layout::HuggingFace,
        }
    }

    /// Whether the file holds the transpose of what the layout asks for, so that each row of it is spread over the file.
    pub(crate) fn transposed_in(&self, layout: Layout) -> bool {
        self.transposed && self.stored() != layout
    }

    /// Where the file holds some rows exactly as the layout and the dtype ask for them.
    pub(crate) fn verbatim(&self, layout: Layout, dtype: WeightDtype, rows: &Range<usize>) -> Option<FileRange> {
        if self.transposed_in(layout) || dtype != self.dtype || !matches!(self.encoding, Encoding::Plain(_)) {
            return None;
        }
        let row = self.dims(layout).1 * dtype.size();
        let start = self.part.range.start;
        Some(FileRange { shard: self.part.shard, range: start + rows.start * row..start + rows.end * row })
    }
}

/// Runs `$body` with a tensor as a [`RowSource`](conversion::RowSource), whatever its encoding. `$bytes` begin with its row `$first`.
macro_rules! with_rows {
    ($checkpoint:expr, $source:expr, $first:expr, $bytes:expr, $lines:ident => $body:expr) => {{
        let (first, bytes, (_, columns)) = ($first, $bytes, $source.dims($source.stored()));
        match &$source.encoding {
            Encoding::Plain(_) => with_weight!($source.dtype, S => {
                let $lines = &PlainRows::<S>::from_row(first, bytes, columns);
                $body
            }),
            Encoding::Fp8 { scale, block } => {
                let scales = scales($checkpoint.part(&scale.0), scale.1);
                let $lines = &Fp8 { bytes, first, columns, block: *block, scales };
                $body
            }
            Encoding::Int4 { scale, group } => {
                let scales = scales($checkpoint.part(&scale.0), scale.1);
                let $lines = &Int4 { bytes, first, columns, group: *group, scales };
                $body
            }
        }
    }};
}

impl Checkpoint {
    /// Rows of a tensor from row `first` on, as many as `target` holds, in a layout.
    pub(crate) fn decode<T: Weight>(
        &self,
        source: &SourceTensor,
        layout: Layout,
        first: usize,
        target: &mut [T],
    ) -> Outcome {
        let (rows, columns) = source.dims(source.stored());
        with_rows!(self, source, 0, self.part(&source.part), lines => match source.transposed_in(layout) {
            true => transpose(lines, rows, first, target),
            false => conversion::copy(lines, columns, first, target),
        })
    }

    /// Some rows of a tensor as it is stored, `bytes`, to their places in `target`: the whole tensor in a layout, from `at`
    /// on.
    ///
    /// # Safety
    ///
    /// The places of these rows are claimed nowhere else.
    pub(crate) unsafe fn place<T: Weight>(
        &self,
        source: &SourceTensor,
        layout: Layout,
        rows: Range<usize>,
        bytes: &[u8],
        target: &DisjointMut<'_, T>,
        at: usize,
    ) -> Outcome {
        let (height, columns) = source.dims(source.stored());
        let first = rows.start;
        with_rows!(self, source, first, bytes, lines => if source.transposed_in(layout) {
            assert!(at.is_multiple_of(height), "a source begins with a row");
            let top = at / height;
            // SAFETY: the caller's promise: the columns of these rows are their places.
            let target = unsafe { target.block(height, top..top + columns, rows.clone()) };
            transpose_into(lines, rows, 0..columns, target)
        } else {
            // SAFETY: the caller's promise.
            let target = unsafe { target.row(at + first * columns..at + rows.end * columns) };
            conversion::copy(lines, columns, first, target)
        })
    }

    /// Whose fault it is that a value is not finite in a dtype.
    pub(crate) fn blame(&self, source: &SourceTensor, dtype: WeightDtype) -> CheckpointError {
        let found = &self.tensor_list()[source.stored_index];
        let (tensor, file) = (found.name.clone(), Some(self.dir().join(&found.file)));
        let (rows, columns) = source.dims(source.stored());
        let mut row = vec![0.0f32; columns];
        let finite = (0..rows).all(|at| self.decode(source, source.stored(), at, &mut row) == Outcome::Finite);
        if finite {
            CheckpointError::Overflow { tensor, file, dtype }
        } else {
            CheckpointError::NotFinite { tensor, file }
        }
    }
}
