//! The rows of a Hugging Face tensor in a GGUF file: in blocks, and in another order where llama.cpp wants one.

use crate::dtype::conversion::{RowSource, Weight};
use crate::dtype::quant::Scales;
use crate::format::gguf::BlockType;
use crate::format::gguf::dequantize::dequantize;
use crate::format::gguf::names::{HeadRows, RotatedRows};
use crate::format::shard::FileRange;

/// How the rows of a tensor are stored.
#[derive(Debug)]
pub(crate) struct GgufRows {
    pub(crate) block_type: BlockType,
    pub(crate) order: StoredOrder,
}

/// Where the rows of a Hugging Face tensor are.
#[derive(Debug)]
pub(crate) enum StoredOrder {
    /// In the same order.
    Same,
    /// In another order in each head.
    Rotated(RotatedRows),
    /// `kv_b_proj`: the last rows of each head are stored like this, the first ones are those of `keys`, transposed.
    ValueUp { rows: HeadRows, keys: (FileRange, BlockType) },
}

impl GgufRows {
    /// The rows that have to be read together, because their order in the file is another one.
    pub(crate) fn unit(&self) -> usize {
        match &self.order {
            StoredOrder::Same => 1,
            StoredOrder::Rotated(rows) => rows.head(),
            StoredOrder::ValueUp { rows, .. } => rows.key + rows.value,
        }
    }
}

/// The bytes of some rows.
pub(crate) struct GgufMatrix<'a> {
    pub(crate) rows: &'a GgufRows,
    pub(crate) bytes: &'a [u8],
    /// The row of the matrix with which `bytes` begins, a multiple of [`unit`](GgufRows::unit).
    pub(crate) first: usize,
    pub(crate) columns: usize,
    /// The rows of the keys, decoded by [`key_rows`], if the order is that of `kv_b_proj`.
    pub(crate) keys: &'a Scales,
}

impl<T: Weight> RowSource<T> for GgufMatrix<'_> {
    fn read_row(&self, row: usize, first: usize, target: &mut [T]) -> bool {
        let row = match &self.rows.order {
            StoredOrder::Same => row - self.first,
            StoredOrder::Rotated(rows) => rows.gguf_row(row) - self.first,
            StoredOrder::ValueUp { rows: HeadRows { key, value, .. }, .. } => {
                let (head, within) = (row / (key + value), row % (key + value));
                match within.checked_sub(*key) {
                    Some(at) => (head - self.first / (key + value)) * value + at,
                    None => {
                        let row = head * key + within - self.keys.first;
                        let values = &self.keys.values[row * self.columns + first..][..target.len()];
                        let mut marks = T::Mark::default();
                        for (target, value) in target.iter_mut().zip(values) {
                            *target = T::narrow(*value);
                            marks = marks | target.mark();
                        }
                        return T::unmarked(marks);
                    }
                }
            }
        };
        let block_type = self.rows.block_type;
        let bytes = self.columns / block_type.values() * block_type.bytes();
        dequantize(block_type, &self.bytes[row * bytes..][..bytes], first, target)
    }
}

/// Decodes the keys of some heads, `[heads, rank, key]`, and transposes them: `[heads * key, rank]`.
pub(crate) fn key_rows(block_type: BlockType, bytes: &[u8], &HeadRows { key, rank, .. }: &HeadRows) -> Vec<f32> {
    let row = key / block_type.values() * block_type.bytes();
    let mut values = vec![0.0; bytes.len() / row.max(1) * key];
    let mut latent = vec![0.0f32; key];
    for (at, bytes) in bytes.chunks_exact(row.max(1)).enumerate() {
        // Non-finite values are found when they are converted to the requested dtype.
        dequantize(block_type, bytes, 0, &mut latent);
        let (head, column) = (at / rank, at % rank);
        for (within, value) in latent.iter().enumerate() {
            values[(head * key + within) * rank + column] = *value;
        }
    }
    values
}
