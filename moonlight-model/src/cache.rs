//! What decoding remembers of the tokens so far.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};

use crate::config::{AttentionShape, ModelConfig};
use crate::kernels::{CacheSpan, uniform_span};

/// The cache of a model for a batch of sequences, each of a length of its own, allocated once.
///
/// MLA keeps 576 values a token and layer for Moonlight (the latent and the shared key); grouped-query attention keeps
/// keys and values.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) layers: Vec<LayerCache>,
    lengths: Vec<usize>,
    capacity: usize,
}

/// `[batch, key heads, capacity, row]`: for MLA one key head, and in a row the latent and the shared key; for grouped-query
/// attention in a row the key and the value.
#[derive(Debug)]
pub(crate) struct LayerCache {
    store: Option<Tensor<4>>,
    /// The weights that MLA's products want, made when they are first wanted.
    pub(crate) absorbed: Option<Absorbed>,
}

/// `kv_b_proj`, split and laid out for decoding.
#[derive(Debug, Clone)]
pub(crate) struct Absorbed {
    /// `[heads, nope, latent]`.
    pub(crate) key: Tensor<3>,
    /// `[heads, latent, value]`.
    pub(crate) value: Tensor<3>,
}

impl KvCache {
    /// Room for `capacity` tokens in each of `batch` sequences; `dtype` is that of the model's weights.
    pub fn new(config: &ModelConfig, batch: usize, capacity: usize, device: &Device, dtype: DType) -> Self {
        let (key_heads, row) = match &config.attention {
            AttentionShape::Mla(mla) => (1, mla.kv_lora_rank + mla.qk_rope_head_dim),
            AttentionShape::Gqa(gqa) => (gqa.num_key_value_heads, 2 * gqa.head_dim),
        };
        let layer = || {
            let store = Tensor::zeros([batch, key_heads, capacity, row], (device, dtype));
            LayerCache { store: Some(store), absorbed: None }
        };
        let layers = (0..config.num_hidden_layers).map(|_| layer()).collect();
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

    /// Forgets all but the first `length` tokens of a sequence, for a text that goes on differently from there; 0 makes
    /// room for another text.
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
    pub(crate) fn take_in(&mut self, counts: &[usize]) -> Arc<Vec<CacheSpan>> {
        assert_eq!(counts.len(), self.batch(), "the cache was made for another batch");
        let mut runs = Vec::with_capacity(counts.len());
        for (sequence, (length, &count)) in self.lengths.iter_mut().zip(counts).enumerate() {
            let start = *length;
            assert!(start + count <= self.capacity, "the cache is full: {start} + {count} > {}", self.capacity);
            if count > 0 {
                runs.push(CacheSpan { sequence, start, count });
            }
            *length += count;
        }
        Arc::new(runs)
    }
}

impl LayerCache {
    /// Writes `[tokens, key heads, row]` where `runs` says.
    pub(crate) fn write(&mut self, new: Tensor<3>, runs: &[CacheSpan]) {
        // The store is taken out while it is written, so that the backend sees its only owner and writes in place.
        let mut store = self.store.take().expect("the store is always put back");
        let [batch, heads, _, row] = store.dims();
        if let Some(run) = uniform_span(runs, batch) {
            let new = new.reshape([batch, run.count, heads, row]).swap_dims(1, 2);
            store = store.slice_assign([0..batch, 0..heads, run.start..run.end(), 0..row], new);
        } else {
            let mut token = 0;
            for &CacheSpan { sequence, start, count } in runs {
                let new = new.clone().slice_dim(0, token..token + count).unsqueeze::<4>().swap_dims(1, 2);
                let place = [sequence..sequence + 1, 0..heads, start..start + count, 0..row];
                store = store.slice_assign(place, new);
                token += count;
            }
        }
        self.store = Some(store);
    }

    /// `[batch, key heads, capacity, row]`.
    pub(crate) fn past(&self) -> Tensor<4> {
        self.store.clone().expect("the store is always put back")
    }
}
