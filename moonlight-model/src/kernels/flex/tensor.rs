//! Conversion between Burn's tensors and slices of values.

use burn::backend::Flex;
use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Shape};

use super::dtype::Element;
use crate::kernels::{Kernels, RoutingKernel};

impl Kernels for Flex {}
// Scores are in the host's memory, where the reference chooses.
impl RoutingKernel for Flex {}

/// Runs a kernel on contiguous inputs if they share the dtype f32 or bf16, and the reference otherwise. Inputs after `f32:` must be f32
/// in both cases.
macro_rules! by_dtype {
    ([$($input:ident),+] $(f32: [$($wide:ident),+])?, $element:ident => $kernel:expr, $fallback:expr) => {{
        let wide = true $($(&& $wide.dtype() == burn::tensor::DType::F32)+)?;
        match $crate::kernels::flex::tensor::shared_dtype(&[$($input.dtype()),+]) {
            Some(burn::tensor::DType::F32) if wide => {
                type $element = f32;
                $(let $input = $input.to_contiguous();)+
                $($(let $wide = $wide.to_contiguous();)+)?
                $kernel
            }
            Some(burn::tensor::DType::BF16) if wide => {
                type $element = burn::tensor::bf16;
                $(let $input = $input.to_contiguous();)+
                $($(let $wide = $wide.to_contiguous();)+)?
                $kernel
            }
            _ => $fallback,
        }
    }};
}
pub(super) use by_dtype;

/// The dtype that all inputs have; `None` if they differ.
pub(super) fn shared_dtype(dtypes: &[DType]) -> Option<DType> {
    let (&first, rest) = dtypes.split_first()?;
    rest.iter().all(|&dtype| dtype == first).then_some(first)
}

/// The values of a contiguous f32 tensor.
pub(super) fn values(tensor: &FlexTensor) -> &[f32] {
    values_of(tensor)
}

/// The values of a contiguous tensor whose dtype is `E`'s.
pub(super) fn values_of<E: Element>(tensor: &FlexTensor) -> &[E] {
    tensor.as_slice().expect("`by_dtype` checks the dtype and makes the tensor contiguous")
}

/// The dimensions of a tensor of known rank.
pub(super) fn dims<const D: usize>(tensor: &FlexTensor) -> [usize; D] {
    tensor.layout().shape().dims()
}

/// Zeros. The system provides large allocations as cleared pages, so they are not written here.
pub(super) fn zeros<E: Element>(count: usize) -> Vec<E> {
    bytemuck::allocation::zeroed_vec(count)
}

/// An f32 tensor that owns `values`.
pub(super) fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    tensor_of(values, shape)
}

/// A tensor that owns `values`.
pub(super) fn tensor_of<E: Element, const D: usize>(values: Vec<E>, shape: [usize; D]) -> FlexTensor {
    assert_eq!(values.len(), shape.iter().product::<usize>());
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(Shape::new(shape)), E::dtype())
}
