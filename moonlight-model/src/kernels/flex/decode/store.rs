//! [`Store`]: the cache of a layer while tokens are decoded.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Device, Tensor, bf16};

use super::super::dtype::{Element, round};
use super::attention::CacheView;
use crate::kernels::CacheSpan;

/// The tensor `[batch, key heads, capacity, row]` of a layer's cache, in f32 or bf16.
#[derive(Debug)]
pub(crate) struct Store {
    tensor: FlexTensor,
    pub(super) key_heads: usize,
    pub(super) capacity: usize,
    pub(super) row: usize,
}

impl Store {
    /// Whether the tensor is on the CPU and of a dtype that decoding reads.
    pub(crate) fn accepts(tensor: &Tensor<4>) -> bool {
        matches!(tensor.dtype(), DType::F32 | DType::BF16) && tensor.device() == Device::flex()
    }

    /// The tensor should have no other owner: writing to a shared one copies it.
    ///
    /// # Panics
    ///
    /// If it is not [accepted](Self::accepts).
    pub(crate) fn new(tensor: Tensor<4>) -> Self {
        let [_, key_heads, capacity, row] = tensor.dims();
        let tensor = tensor.try_into_primitive::<Flex>().expect("the cache is on the CPU");
        let is_whole = tensor.is_contiguous() && tensor.layout().start_offset() == 0;
        let tensor = if is_whole { tensor } else { tensor.to_contiguous() };
        Self { tensor, key_heads, capacity, row }
    }

    pub(crate) fn into_tensor(self) -> Tensor<4> {
        Tensor::from_primitive::<Flex>(self.tensor)
    }

    /// Writes the rows of new tokens, `[tokens, key heads * row]`.
    pub(super) fn write(&mut self, spans: &[CacheSpan], rows: &[f32]) {
        match self.tensor.dtype() {
            DType::F32 => self.write_as::<f32>(spans, rows),
            _ => self.write_as::<bf16>(spans, rows),
        }
    }

    fn write_as<E: Element>(&mut self, spans: &[CacheSpan], rows: &[f32]) {
        let Self { key_heads, capacity, row, .. } = *self;
        let values = self.tensor.storage_mut::<E>();
        let mut rows = rows.chunks_exact(row);
        for span in spans {
            for position in span.start..span.end() {
                for head in 0..key_heads {
                    let place = ((span.sequence * key_heads + head) * capacity + position) * row;
                    round(
                        rows.next().expect("there is a row for each token and key head"),
                        &mut values[place..place + row],
                    );
                }
            }
        }
    }

    pub(super) fn view(&self) -> CacheView<'_> {
        match self.tensor.dtype() {
            DType::F32 => CacheView::F32(self.tensor.storage()),
            _ => CacheView::Bf16(self.tensor.storage()),
        }
    }
}
