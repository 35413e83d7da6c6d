//! Parameters of attention to a KV cache: which new tokens belong to which sequence.

use std::ops::Range;
use std::sync::Arc;

/// The new tokens of one sequence, which are consecutive among all new tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSpan {
    /// The index of the sequence in the cache.
    pub sequence: usize,
    /// The position of the first new token, which is the number of tokens that the sequence had before it.
    pub start: usize,
    /// The number of new tokens, at least 1.
    pub count: usize,
}

impl CacheSpan {
    /// The number of tokens of the sequence, the new ones included.
    pub fn end(&self) -> usize {
        self.start + self.count
    }
}

/// Parameters of [`cached_attention`](fn@super::cached_attention) that are not tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct CachedAttentionSpec {
    /// Factor on the products of queries and keys.
    pub scale: f32,
    /// The part of a cache row that is the key.
    pub keys: Range<usize>,
    /// The part of a cache row that is the value. In latent attention it is a part of the key.
    pub values: Range<usize>,
    /// The number of keys that a query sees, its own included, at least 1; `None` for all keys up to its own.
    pub window: Option<usize>,
    /// The new tokens in order: at most one span for each sequence, by increasing sequence.
    pub spans: Arc<Vec<CacheSpan>>,
}

impl CachedAttentionSpec {
    /// The position of the first key that a query at `position` sees.
    pub(crate) fn first_key(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// The span of the first sequence, if all `batch` sequences have new tokens, equally many and at the same position: one operation
/// over the batch can then replace one for each sequence. `None` otherwise.
pub(crate) fn uniform_span(spans: &[CacheSpan], batch: usize) -> Option<CacheSpan> {
    let first = *spans.first()?;
    let same = |(index, span): (usize, &CacheSpan)| *span == CacheSpan { sequence: index, ..first };
    (spans.len() == batch && spans.iter().enumerate().all(same)).then_some(first)
}
