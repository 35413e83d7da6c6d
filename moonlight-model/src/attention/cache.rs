//! What one attention layer remembers of the tokens so far.

use burn::tensor::{DType, Device, Tensor};

use crate::kernels::{CacheSpan, uniform_span};

/// `[batch, key heads, capacity, row]`: for MLA one key head, and in a row the latent and the shared key; for grouped-query
/// attention in a row the key and the value.
#[derive(Debug)]
pub(crate) struct LayerCache {
    store: Option<Tensor<4>>,
    /// Weights laid out for decoding, made at the first use; each kind of attention decides which.
    pub(crate) prepared: Option<Vec<Tensor<3>>>,
}

impl LayerCache {
    pub(crate) fn new(
        batch: usize,
        [key_heads, row]: [usize; 2],
        capacity: usize,
        device: &Device,
        dtype: DType,
    ) -> Self {
        let store = Tensor::zeros([batch, key_heads, capacity, row], (device, dtype));
        Self { store: Some(store), prepared: None }
    }

    /// Makes room for `capacity` tokens of each sequence, and keeps what is there.
    pub(crate) fn grow(&mut self, capacity: usize) {
        let store = self.store.take().expect("the store is always put back");
        let [batch, heads, old, row] = store.dims();
        let larger = Tensor::zeros([batch, heads, capacity, row], (&store.device(), store.dtype()));
        self.store = Some(larger.slice_assign([0..batch, 0..heads, 0..old, 0..row], store));
    }

    /// Writes `[tokens, key heads, row]` where `spans` says.
    pub(crate) fn write(&mut self, new: Tensor<3>, spans: &[CacheSpan]) {
        // The store is taken out while it is written, so that the backend sees its only owner and writes in place.
        let mut store = self.store.take().expect("the store is always put back");
        let [batch, heads, _, row] = store.dims();
        if let Some(span) = uniform_span(spans, batch) {
            let new = new.reshape([batch, span.count, heads, row]).swap_dims(1, 2);
            store = store.slice_assign([0..batch, 0..heads, span.start..span.end(), 0..row], new);
        } else {
            let mut token = 0;
            for &CacheSpan { sequence, start, count } in spans {
                let new = new.clone().slice_dim(0, token..token + count).unsqueeze::<4>().swap_dims(1, 2);
                let place = [sequence..sequence + 1, 0..heads, start..start + count, 0..row];
                store = store.slice_assign(place, new);
                token += count;
            }
        }
        self.store = Some(store);
    }

    /// `[batch, key heads, capacity, row]`.
    pub(crate) fn rows(&self) -> Tensor<4> {
        self.store.clone().expect("the store is always put back")
    }
}
