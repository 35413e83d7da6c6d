//! What attention to a KV cache needs to know of the new tokens.

use std::ops::Range;
use std::sync::Arc;

/// New tokens of one sequence, which lie beside each other among all new tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSpan {
    /// The sequence: the first index of the cache.
    pub sequence: usize,
    /// Position of the first new token: how many tokens of the sequence the cache had before it.
    pub start: usize,
    /// Number of new tokens, at least 1.
    pub count: usize,
}

impl CacheSpan {
    /// Tokens of the sequence, the new ones included.
    pub fn end(&self) -> usize {
        self.start + self.count
    }
}

/// What [`cached_attention`](super::cached_attention) needs to know beside its tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct CachedAttentionSpec {
    /// Factor on the scores.
    pub scale: f32,
    /// Which values of a row of the cache are the key.
    pub keys: Range<usize>,
    /// Which are the value; they may be a part of the key.
    pub values: Range<usize>,
    /// How many of the last keys a query sees, its own among them, at least 1; `None` for all.
    pub window: Option<usize>,
    /// The new tokens in order: at most one span of a sequence, by increasing sequence.
    pub spans: Arc<Vec<CacheSpan>>,
}

impl CachedAttentionSpec {
    /// The first key that a query at a position sees.
    pub(crate) fn first_key(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// The first span, if every one of the `batch` sequences has one, in order, and all are of one length at one position.
pub(crate) fn uniform_span(spans: &[CacheSpan], batch: usize) -> Option<CacheSpan> {
    let first = *spans.first()?;
    let same = |(index, span): (usize, &CacheSpan)| *span == CacheSpan { sequence: index, ..first };
    (spans.len() == batch && spans.iter().enumerate().all(same)).then_some(first)
}
