//! [`KvCache`]: keys and values (for latent attention the latents) of earlier tokens, for all layers.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};

use crate::attention::LayerCache;
use crate::config::ModelConfig;
use crate::kernels::CacheSpan;
#[cfg(feature = "cpu")]
use crate::kernels::few_tokens::Decoder;

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
    /// See [`PreparedWeights::decoder`].
    #[cfg(feature = "cpu")]
    pub(crate) decoder: Option<Option<Arc<Decoder>>>,
}

/// Weights of one model in the layout that decoding reads (for latent attention the halves of `kv_b_proj`), which a cache makes
/// when they are first needed.
#[derive(Debug, Default)]
pub struct PreparedWeights {
    /// For each layer what [`LayerCache::prepared`] is; empty if there are none yet.
    layers: Vec<Option<Vec<Tensor<3>>>>,
    /// The model as the kernel that decodes few tokens reads it, which is `None` if it cannot; `None` before its first use.
    #[cfg(feature = "cpu")]
    decoder: Option<Option<Arc<Decoder>>>,
}

impl KvCache {
    /// An empty cache with room for `capacity` tokens in each of `batch` sequences.
    ///
    /// `dtype` is the dtype of the model, or a narrower one ([`CausalLm::cache_dtype`](crate::CausalLm::cache_dtype) chooses): bf16 takes
    /// half the memory of f32, and half the time to read it in long contexts. In small models with random f32 weights a cache in bf16
    /// changed logits by 1 % of the largest at most (`a_cache_in_bf16_serves_a_model_in_f32`).
    pub fn new(config: &ModelConfig, batch: usize, capacity: usize, device: &Device, dtype: DType) -> Self {
        let shape = config.attention_widths().cache;
        let layer = |_| LayerCache::new(batch, shape, capacity, device, dtype);
        let layers = (0..config.num_hidden_layers).map(layer).collect();
        Self {
            layers,
            lengths: vec![0; batch],
            capacity,
            #[cfg(feature = "cpu")]
            decoder: None,
        }
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

    /// Copies the first `length` tokens of sequence `from` to sequence `to`, which then has these tokens and no others: a text that
    /// begins alike needs no second prefill. The copies have the same bits.
    ///
    /// # Panics
    ///
    /// If `from` has fewer tokens, if a sequence does not exist, or if both are the same.
    pub fn copy_prefix(&mut self, from: usize, to: usize, length: usize) {
        let tokens = self.lengths[from];
        assert!(length <= tokens, "the cache has {tokens} tokens of sequence {from}, not {length}");
        assert!(to < self.batch(), "the cache has no sequence {to}");
        assert!(from != to, "sequence {from} is copied to itself");
        if length > 0 {
            self.layers.iter_mut().for_each(|layer| layer.copy_prefix(from, to, length));
        }
        self.lengths[to] = length;
    }

    /// Exchanges the weights that this cache has prepared for decoding with `prepared`. Models that take turns with one cache need
    /// this before and after each turn, because a cache otherwise keeps what it prepared for the first of them.
    ///
    /// ```
    /// use burn::tensor::Device;
    /// use moonlight_model::{CausalLm, KvCache, ModelConfig, PreparedWeights};
    ///
    /// let mut config = ModelConfig::preset("bench-small")?;
    /// config.num_hidden_layers = 1;
    /// let device = Device::default();
    /// let models = [config.init(&device), config.init(&device)];
    /// let mut cache = KvCache::new(&config, 2, 16, &device, models[0].dtype());
    /// let mut prepared = [PreparedWeights::default(), PreparedWeights::default()];
    /// for _ in 0..2 {
    ///     // Sequence 0 belongs to the first model, sequence 1 to the second.
    ///     for (index, tokens) in [[&[1, 2][..], &[]], [&[], &[3, 4][..]]].iter().enumerate() {
    ///         cache.swap_prepared(&mut prepared[index]);
    ///         models[index].extend(tokens, &mut cache);
    ///         cache.swap_prepared(&mut prepared[index]);
    ///     }
    /// }
    /// assert_eq!(cache.lengths(), [4, 4]);
    /// # Ok::<(), moonlight_model::ConfigError>(())
    /// ```
    pub fn swap_prepared(&mut self, prepared: &mut PreparedWeights) {
        prepared.layers.resize_with(self.layers.len(), || None);
        for (layer, prepared) in self.layers.iter_mut().zip(&mut prepared.layers) {
            std::mem::swap(&mut layer.prepared, prepared);
        }
        #[cfg(feature = "cpu")]
        std::mem::swap(&mut self.decoder, &mut prepared.decoder);
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

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::CausalLm;

    fn configs() -> [ModelConfig; 2] {
        let llama = serde_json::json!({
            "model_type": "llama", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
            "initializer_range": 0.3,
        });
        let mut latent = ModelConfig::preset("bench-small").unwrap();
        latent.num_hidden_layers = 2;
        [ModelConfig::from_value(llama).unwrap(), latent]
    }

    fn bits(tensor: Tensor<2>) -> TensorData {
        tensor.into_data()
    }

    fn model(config: &ModelConfig, device: &Device) -> CausalLm {
        config.init(device)
    }

    #[test]
    fn a_copied_prefix_continues_with_the_same_bits() {
        let device = Device::default();
        for config in configs() {
            let model = model(&config, &device);
            let mut cache = KvCache::new(&config, 3, 20, &device, model.dtype());
            model.extend(&[&[1, 2, 3, 4, 5], &[7, 8, 9, 10, 11, 12, 13], &[6]], &mut cache);
            cache.copy_prefix(0, 1, 4);
            assert_eq!(cache.lengths(), [5, 4, 1]);
            cache.truncate(0, 4);
            let rows = |cache: &KvCache, sequence: usize| -> Vec<TensorData> {
                let row = |layer: &LayerCache| {
                    layer.rows().slice_dim(0, sequence..sequence + 1).slice_dim(2, 0..4).into_data()
                };
                cache.layers.iter().map(row).collect()
            };
            assert_eq!(rows(&cache, 0), rows(&cache, 1));
            let other = rows(&cache, 2);
            // The same token after the original and after the copy, alone and together.
            let original = bits(model.extend(&[&[30], &[], &[]], &mut cache));
            let copy = bits(model.extend(&[&[], &[30], &[]], &mut cache));
            assert_eq!(original, copy);
            cache.truncate(0, 4);
            cache.truncate(1, 4);
            let both = model.extend(&[&[30], &[30], &[]], &mut cache);
            assert_eq!(bits(both.clone().slice_dim(0, 0..1)), bits(both.slice_dim(0, 1..2)));
            assert_eq!(rows(&cache, 2), other, "other sequences do not change");
            // Nothing is copied: the sequence is then empty.
            cache.copy_prefix(0, 2, 0);
            assert_eq!(cache.lengths(), [5, 5, 0]);
        }
    }

    #[test]
    fn a_prefix_longer_than_the_sequence_is_not_copied() {
        let device = Device::default();
        let [config, _] = configs();
        let model = model(&config, &device);
        let mut cache = KvCache::new(&config, 2, 8, &device, model.dtype());
        model.extend(&[&[1, 2, 3], &[]], &mut cache);
        let copies = |from, to, length| {
            let copy = std::panic::AssertUnwindSafe(|| {
                KvCache::new(&config, 2, 8, &device, model.dtype()).copy_prefix(from, to, length)
            });
            std::panic::catch_unwind(copy).is_ok()
        };
        assert!(copies(0, 1, 0) && !copies(0, 1, 1) && !copies(0, 2, 0) && !copies(1, 1, 0));
    }

    /// The weights of one model do not serve another: without the exchange a cache of latent attention would.
    #[test]
    fn models_take_turns_with_one_cache() {
        let device = Device::default();
        for config in configs() {
            let models = [model(&config, &device), model(&config, &device)];
            let alone = |index: usize| -> Vec<TensorData> {
                let mut cache = KvCache::new(&config, 1, 20, &device, models[index].dtype());
                (0..6).map(|token| bits(models[index].extend(&[&[token]], &mut cache))).collect()
            };
            let expected = [alone(0), alone(1)];
            let mut cache = KvCache::new(&config, 2, 20, &device, models[0].dtype());
            let mut prepared = [PreparedWeights::default(), PreparedWeights::default()];
            for token in 0..6 {
                for index in [0, 1] {
                    cache.swap_prepared(&mut prepared[index]);
                    let mut input: [&[u32]; 2] = [&[], &[]];
                    let new = [token];
                    input[index] = &new;
                    let logits = bits(models[index].extend(&input, &mut cache));
                    assert_eq!(logits, expected[index][token as usize], "model {index}, token {token}");
                    cache.swap_prepared(&mut prepared[index]);
                }
            }
        }
    }

    #[test]
    fn the_bytes_are_those_of_the_tensors() {
        let device = Device::default();
        for config in configs() {
            let cache = KvCache::new(&config, 3, 20, &device, DType::F32);
            let values: usize = cache.layers.iter().map(|layer| layer.rows().shape().num_elements()).sum();
            assert_eq!(KvCache::bytes(&config, 3, 20, DType::F32), 4 * values as u64);
            assert_eq!(KvCache::bytes(&config, usize::MAX, usize::MAX, DType::F32), u64::MAX);
        }
    }
}
