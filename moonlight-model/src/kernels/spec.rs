//! What operations need to know beside their tensors.

use std::sync::Arc;

/// What an attention over whole sequences needs to know. It is always causal.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Factor on the scores.
    pub scale: f32,
    /// For each query, `batch * sequence` entries, the first key that it may see: where its document starts in its
    /// sequence, or a sliding window. Never after the query, and never decreasing along a sequence. `None` where each sequence is one document without a
    /// window.
    pub starts: Option<Arc<Vec<u32>>>,
}

/// What a rotary embedding needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RotationSpec {
    /// The first dimension of a head that is rotated: all before it pass unchanged, all from it on are rotated.
    pub start: usize,
    /// Whether pairs lie beside each other (DeepSeek) or half the rotated part apart (Llama).
    pub interleave: bool,
}

/// Values that share a scale: the block of QLoRA (arXiv 2305.14314).
pub const QUANT_BLOCK: usize = 64;

/// How many bits a quantized value has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantBits {
    /// Integers from -127 to 127, stored with 128 added.
    Eight,
    /// Integers from -7 to 7, stored with 8 added; the first half of a block in the low half of its bytes.
    Four,
}

impl QuantBits {
    /// The largest integer.
    pub fn largest(self) -> u8 {
        match self {
            Self::Eight => 127,
            Self::Four => 7,
        }
    }

    /// What 0 is stored as.
    pub fn zero(self) -> u8 {
        self.largest() + 1
    }

    /// Bytes of an even number of values.
    pub fn bytes(self, values: usize) -> usize {
        match self {
            Self::Eight => values,
            Self::Four => values / 2,
        }
    }
}

/// The shape of a quantized matrix, or of each of a stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantizedSpec {
    /// Bits of a value.
    pub bits: QuantBits,
    /// Rows: the width of what is multiplied by it.
    pub input: usize,
    /// Columns: the width of the product.
    pub output: usize,
}
