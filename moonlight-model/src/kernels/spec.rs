//! Parameters of operations that are not tensors.

use std::sync::Arc;

/// Parameters of attention over whole sequences, which is always causal.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Factor on the products of queries and keys.
    pub scale: f32,
    /// `[batch * sequence]`: for each query the first key that it sees, as an index in its sequence: the start of its document or
    /// of a sliding window. It must not be after the query and must not decrease along a sequence. `None` if every query sees its
    /// sequence from the start.
    pub starts: Option<Arc<Vec<u32>>>,
}

/// Parameters of the rotary embedding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RotationSpec {
    /// The first dimension of a head that is rotated; those before it are copied.
    pub start: usize,
    /// Whether the dimensions of a pair are adjacent (DeepSeek), or half the rotated part apart (Llama).
    pub interleave: bool,
}

/// The number of consecutive values that share a scale, as in QLoRA (arXiv 2305.14314).
pub const QUANT_BLOCK: usize = 64;

/// The number of bits of a quantized value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantBits {
    /// Integers from -127 to 127, stored with a zero point of 128.
    Eight,
    /// Integers from -7 to 7, stored with a zero point of 8. The first 32 values of a block are in the low halves of its bytes, the
    /// others in the high halves.
    Four,
}

impl QuantBits {
    /// The largest integer; the range is symmetric, so that 0 is exact.
    pub fn largest(self) -> u8 {
        match self {
            Self::Eight => 127,
            Self::Four => 7,
        }
    }

    /// The zero point: the stored value of 0.
    pub fn zero(self) -> u8 {
        self.largest() + 1
    }

    /// The number of bytes that an even number of values takes.
    pub fn bytes(self, values: usize) -> usize {
        match self {
            Self::Eight => values,
            Self::Four => values / 2,
        }
    }
}

/// The shape of a quantized matrix, or of each matrix in a stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantizedSpec {
    /// The number of bits of a value.
    pub bits: QuantBits,
    /// Rows of the matrix: the width of the input.
    pub input: usize,
    /// Columns of the matrix: the width of the output.
    pub output: usize,
}
