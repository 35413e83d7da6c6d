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
