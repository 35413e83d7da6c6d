//! The KV cache of a model.

use std::sync::Arc;

use burn::tensor::{DType, Device};

use crate::attention::LayerCache;
use crate::config::ModelConfig;
use crate::kernels::CacheSpan;

/// The cache of a model for a batch of sequences, each of a length of its own; it grows only when it is
/// [asked to](Self::grow).
///
/// MLA keeps 576 values a token and layer for Moonlight (the latent and the shared key); grouped-query attention keeps
/// keys and values.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) layers: Vec<LayerCache>,
    lengths: Vec<usize>,
    capacity: usize,
}

impl KvCache {
    /// Room for `capacity` tokens in each of `batch` sequences; `dtype` is that of the model's weights.
    pub fn new(config: &ModelConfig, batch: usize, capacity: usize, device: &Device, dtype: DType) -> Self {
        let shape = config.attention_widths().cache;
        let layer = |_| LayerCache::new(batch, shape, capacity, device, dtype);
        let layers = (0..config.num_hidden_layers).map(layer).collect();
        Self { layers, lengths: vec![0; batch], capacity }
    }

    /// Tokens of each sequence so far.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Tokens of the longest sequence so far.
    pub fn len(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// Whether nothing was decoded yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sequences side by side.
    pub fn batch(&self) -> usize {
        self.lengths.len()
    }

    /// Tokens of each sequence that there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Makes room for `capacity` tokens in each sequence, where there is less, and keeps what is there: a cache for a
    /// context that may be long begins small.
    pub fn grow(&mut self, capacity: usize) {
        if capacity > self.capacity {
            self.layers.iter_mut().for_each(|layer| layer.grow(capacity));
            self.capacity = capacity;
        }
    }

    /// Keeps the first `length` tokens of a sequence and drops the rest, to continue the text differently from there; 0
    /// empties the sequence.
    ///
    /// # Panics
    ///
    /// When there are fewer, or there is no such sequence.
    pub fn truncate(&mut self, sequence: usize, length: usize) {
        let tokens = &mut self.lengths[sequence];
        assert!(length <= *tokens, "the cache has {tokens} tokens of sequence {sequence}, not {length}");
        *tokens = length;
    }

    /// Makes room for `counts` new tokens of each sequence, and says where they go.
    ///
    /// # Panics
    ///
    /// When there is no room, or `counts` are of another batch.
    pub(crate) fn append(&mut self, counts: &[usize]) -> Arc<Vec<CacheSpan>> {
        assert_eq!(counts.len(), self.batch(), "the cache was made for another batch");
        let mut spans = Vec::with_capacity(counts.len());
        for (sequence, (length, &count)) in self.lengths.iter_mut().zip(counts).enumerate() {
            let start = *length;
            assert!(start + count <= self.capacity, "the cache is full: {start} + {count} > {}", self.capacity);
            if count > 0 {
                spans.push(CacheSpan { sequence, start, count });
            }
            *length += count;
        }
        Arc::new(spans)
    }
}
