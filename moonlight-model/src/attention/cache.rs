//! [`LayerCache`]: the KV cache of one attention layer.

use burn::tensor::{DType, Device, Int, Tensor};

use crate::kernels::{CacheSpan, uniform_span};

/// A tensor `[batch, key heads, capacity, row]`. For latent attention there is one key head, and a row is the latent followed by
/// the shared key; for grouped-query attention a row is the key followed by the value.
#[derive(Debug)]
pub(crate) struct LayerCache {
    /// `None` only inside functions that replace it.
    store: Option<Tensor<4>>,
    /// Weights in a layout for decoding, made at the first use by the kinds of attention that need one.
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

    /// Copies the rows into a larger tensor.
    pub(crate) fn grow(&mut self, capacity: usize) {
        let store = self.store.take().expect("the store is always put back");
        let [batch, heads, old, row] = store.dims();
        let larger = Tensor::zeros([batch, heads, capacity, row], (&store.device(), store.dtype()));
        self.store = Some(larger.slice_assign([0..batch, 0..heads, 0..old, 0..row], store));
    }

    /// Writes the rows of new tokens, `[tokens, key heads, row]`, to the positions in `spans`.
    pub(crate) fn write(&mut self, new: Tensor<3>, spans: &[CacheSpan]) {
        // The tensor is moved out while it is written: the backend writes in place only if there is no other owner. A clone left in
        // `self` would make every write copy the whole cache.
        let mut store = self.store.take().expect("the store is always put back");
        let [batch, heads, _, row] = store.dims();
        let new = new.cast(store.dtype());
        if let Some(span) = uniform_span(spans, batch) {
            // All sequences are at the same position, so one assignment writes them all.
            let new = new.reshape([batch, span.count, heads, row]).swap_dims(1, 2); // [batch, heads, count, row]
            store = store.slice_assign([0..batch, 0..heads, span.start..span.end(), 0..row], new);
        } else {
            let mut token = 0;
            for &CacheSpan { sequence, start, count } in spans {
                let new = new.clone().slice_dim(0, token..token + count).unsqueeze::<4>().swap_dims(1, 2); // [1, heads, count, row]
                let place = [sequence..sequence + 1, 0..heads, start..start + count, 0..row];
                store = store.slice_assign(place, new);
                token += count;
            }
        }
        self.store = Some(store);
    }

    /// Lets the kernel that decodes few tokens read and write the store, which [`put_back`](Self::put_back) must follow.
    #[cfg(feature = "cpu")]
    pub(crate) fn take(&mut self) -> Tensor<4> {
        self.store.take().expect("the store is always put back")
    }

    #[cfg(feature = "cpu")]
    pub(crate) fn put_back(&mut self, store: Tensor<4>) {
        self.store = Some(store);
    }

    /// Copies the rows of the first `length` tokens of sequence `from` to sequence `to`.
    pub(crate) fn copy_prefix(&mut self, from: usize, to: usize, length: usize) {
        let store = self.store.take().expect("the store is always put back");
        let [_, heads, _, row] = store.dims();
        let rows = store.clone().slice([from..from + 1, 0..heads, 0..length, 0..row]);
        // A slice may be a view that owns the whole store with it, and then the assignment would copy the store. `select` copies the
        // rows, so that the store has one owner again.
        let rows = rows.select(2, Tensor::<1, Int>::arange(0..length as i64, &store.device()));
        self.store = Some(store.slice_assign([to..to + 1, 0..heads, 0..length, 0..row], rows));
    }

    /// The dtype of the rows. It may be narrower than that of activations.
    pub(crate) fn dtype(&self) -> DType {
        self.store.as_ref().expect("the store is always put back").dtype()
    }

    /// All rows, `[batch, key heads, capacity, row]`. Those beyond a sequence's length are unspecified.
    pub(crate) fn rows(&self) -> Tensor<4> {
        self.store.clone().expect("the store is always put back")
    }
}
