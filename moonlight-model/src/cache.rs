//! [`KvCache`]: keys and values (for latent attention the latents) of earlier tokens, for all layers.

use std::sync::Arc;

use burn::tensor::{DType, Device};

use crate::attention::LayerCache;
use crate::config::ModelConfig;
use crate::kernels::CacheSpan;

/// Keys and values of earlier tokens, for a batch of sequences that may differ in length.
///
/// Latent attention caches the latent and the shared key, 576 values for each token and layer of Moonlight; grouped-query
/// attention caches keys and values. The memory for `capacity` tokens is allocated at once; only [`grow`](Self::grow) changes the
/// capacity.
///
/// See [`CausalLm::decode`](crate::CausalLm::decode) for an example.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) layers: Vec<LayerCache>,
    lengths: Vec<usize>,
    capacity: usize,
}

impl KvCache {
    /// An empty cache with room for `capacity` tokens in each of `batch` sequences. `dtype` must be the dtype of the model's
    /// weights ([`CausalLm::dtype`](crate::CausalLm::dtype)).
    pub fn new(config: &ModelConfig, batch: usize, capacity: usize, device: &Device, dtype: DType) -> Self {
        let shape = config.attention_widths().cache;
        let layer = |_| LayerCache::new(batch, shape, capacity, device, dtype);
        let layers = (0..config.num_hidden_layers).map(layer).collect();
        Self { layers, lengths: vec![0; batch], capacity }
    }

    /// Bytes of a cache of this size. Saturates, so that no size is taken for a small one.
    pub fn bytes(config: &ModelConfig, batch: usize, capacity: usize, dtype: DType) -> u64 {
        let [key_heads, row] = config.attention_widths().cache;
        let factors = [config.num_hidden_layers, batch, key_heads, capacity, row, dtype.size()];
        factors.into_iter().fold(1, |bytes: u64, factor| bytes.saturating_mul(factor as u64))
    }

    /// The number of cached tokens of each sequence.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// The number of cached tokens of the longest sequence.
    pub fn len(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// Whether no sequence has a cached token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of sequences.
    pub fn batch(&self) -> usize {
        self.lengths.len()
    }

    /// The largest number of tokens that each sequence can have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Raises the capacity to at least `capacity` tokens a sequence and keeps what is cached. This copies the cache, so grow it in
    /// large steps.
    pub fn grow(&mut self, capacity: usize) {
        if capacity > self.capacity {
            self.layers.iter_mut().for_each(|layer| layer.grow(capacity));
            self.capacity = capacity;
        }
    }

    /// Keeps the first `length` tokens of a sequence and drops the rest, to continue the text differently; 0 empties the sequence.
    ///
    /// # Panics
    ///
    /// If the sequence has fewer tokens, or does not exist.
    pub fn truncate(&mut self, sequence: usize, length: usize) {
        // The rows stay in memory; the next tokens of the sequence overwrite them.
        let tokens = &mut self.lengths[sequence];
        assert!(length <= *tokens, "the cache has {tokens} tokens of sequence {sequence}, not {length}");
        *tokens = length;
    }

    /// Reserves rows for `counts[i]` new tokens of sequence `i`, and returns their positions.
    ///
    /// # Panics
    ///
    /// If there is no room, or `counts` has another batch size.
    pub(crate) fn append(&mut self, counts: &[usize]) -> Arc<Vec<CacheSpan>> {
        assert_eq!(counts.len(), self.batch(), "the cache was made for another batch size");
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
