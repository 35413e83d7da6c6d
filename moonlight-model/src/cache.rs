//! What decoding remembers of the tokens so far.

use burn::tensor::{DType, Device, Tensor};

use crate::config::{AttentionConfig, ModelConfig};

/// The cache of a model for a batch of sequences of one length, allocated once.
///
/// MLA keeps 576 values a token and layer for Moonlight (the latent and the shared key); grouped-query attention keeps
/// keys and values.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) layers: Vec<LayerCache>,
    batch: usize,
    length: usize,
    capacity: usize,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there are a few dozen, one a layer")]
pub(crate) enum LayerCache {
    Latent(LatentCache),
    KeyValue(KeyValueCache),
}

/// `[batch, capacity, latent + rope]`, and the weights that its products want.
#[derive(Debug)]
pub(crate) struct LatentCache {
    store: Option<Tensor<3>>,
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

/// `[batch, key heads, capacity, 2 width]`: keys, then values.
#[derive(Debug)]
pub(crate) struct KeyValueCache {
    store: Option<Tensor<4>>,
}

impl KvCache {
    /// Room for `capacity` tokens of `batch` sequences; `dtype` is that of the model's weights.
    pub fn new(config: &ModelConfig, batch: usize, capacity: usize, device: &Device, dtype: DType) -> Self {
        let layer = || match &config.attention {
            AttentionConfig::Mla(mla) => {
                let width = mla.kv_lora_rank + mla.qk_rope_head_dim;
                let store = Tensor::zeros([batch, capacity, width], (device, dtype));
                LayerCache::Latent(LatentCache { store: Some(store), absorbed: None })
            }
            AttentionConfig::Gqa(gqa) => {
                let shape = [batch, gqa.num_key_value_heads, capacity, 2 * gqa.head_dim];
                LayerCache::KeyValue(KeyValueCache { store: Some(Tensor::zeros(shape, (device, dtype))) })
            }
        };
        let layers = (0..config.num_hidden_layers).map(|_| layer()).collect();
        Self { layers, batch, length: 0, capacity }
    }

    /// Tokens of each sequence so far.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing was decoded yet.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Sequences side by side.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens of each sequence that there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all but the first `length` tokens, for a text that goes on differently from there.
    ///
    /// # Panics
    ///
    /// When there are fewer.
    pub fn truncate(&mut self, length: usize) {
        assert!(length <= self.length, "the cache has {} tokens, not {length}", self.length);
        self.length = length;
    }

    pub(crate) fn advance(&mut self, tokens: usize) {
        self.length += tokens;
    }
}

impl LayerCache {
    pub(crate) fn latent(&mut self) -> &mut LatentCache {
        match self {
            Self::Latent(cache) => cache,
            Self::KeyValue(_) => panic!("the cache was made for a model with grouped-query attention"),
        }
    }

    pub(crate) fn key_value(&mut self) -> &mut KeyValueCache {
        match self {
            Self::KeyValue(cache) => cache,
            Self::Latent(_) => panic!("the cache was made for a model with latent attention"),
        }
    }
}

// A store is taken out while it is written, so that the backend sees its only owner and writes in place.

impl LatentCache {
    /// Writes `[batch, tokens, latent + rope]` behind the first `length` tokens.
    pub(crate) fn append(&mut self, new: Tensor<3>, length: usize) {
        let [batch, tokens, width] = new.dims();
        let store = self.store.take().expect("the store is always put back");
        self.store = Some(store.slice_assign([0..batch, length..length + tokens, 0..width], new));
    }

    /// The first `length` tokens, `[batch, length, latent + rope]`.
    pub(crate) fn filled(&self, length: usize) -> Tensor<3> {
        self.store.clone().expect("the store is always put back").slice_dim(1, 0..length)
    }
}

impl KeyValueCache {
    /// Writes `[batch, tokens, key heads, 2 width]` behind the first `length` tokens.
    pub(crate) fn append(&mut self, new: Tensor<4>, length: usize) {
        let [batch, tokens, heads, width] = new.dims();
        let store = self.store.take().expect("the store is always put back");
        let place = [0..batch, 0..heads, length..length + tokens, 0..width];
        self.store = Some(store.slice_assign(place, new.swap_dims(1, 2)));
    }

    /// The first `length` tokens, `[batch, key heads, length, 2 width]`.
    pub(crate) fn filled(&self, length: usize) -> Tensor<4> {
        self.store.clone().expect("the store is always put back").slice_dim(2, 0..length)
    }
}
