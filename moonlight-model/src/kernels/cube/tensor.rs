//! From Burn's tensors to the buffers that a kernel reads, and back.

use std::any::Any;

use burn::backend::Cube;
use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

/// The buffers behind tensors that the kernels can read: f32, or a half type that the runtime stores.
///
/// `None` where one is of another type, and where a program turns on Burn's fusion: its tensors are promises of a
/// result whose buffer does not exist yet.
pub(super) fn buffers<const N: usize>(tensors: [&FloatTensor<Cube>; N]) -> Option<[CubeTensor; N]> {
    let buffers = tensors.map(|tensor| (tensor as &dyn Any).downcast_ref::<CubeTensor>());
    if buffers.iter().any(|buffer| buffer.is_none_or(|buffer| !readable(buffer))) {
        return None;
    }
    Some(buffers.map(|buffer| buffer.expect("each was looked at").clone()))
}

/// The buffer behind whole numbers that the kernels can read.
pub(super) fn integers(tensor: &IntTensor<Cube>) -> Option<CubeTensor> {
    let buffer = (tensor as &dyn Any).downcast_ref::<CubeTensor>().cloned()?;
    let readable = matches!(buffer.dtype, DType::I32 | DType::I64 | DType::U32);
    (readable && buffer.client.properties().supports_type(elem(&buffer))).then_some(buffer)
}

fn readable(tensor: &CubeTensor) -> bool {
    matches!(tensor.dtype, DType::F32 | DType::F16 | DType::BF16)
        && tensor.client.properties().supports_type(elem(tensor))
        && tensor.qparams.is_none()
}

/// The tensor of a buffer, where [`buffers`] gave some.
pub(super) fn wrapped(buffer: CubeTensor) -> FloatTensor<Cube> {
    let tensor: Box<dyn Any> = Box::new(buffer);
    *tensor.downcast().expect("buffers come from tensors of this type")
}

/// How CubeCL calls the type of a tensor's numbers.
pub(super) fn elem(tensor: &CubeTensor) -> ElemType {
    dtype_to_storage_type(tensor.dtype)
}

/// The same tensor, with the numbers of its last dimension side by side.
pub(super) fn rows_of(tensor: CubeTensor) -> CubeTensor {
    let last = tensor.meta.num_dims() - 1;
    let plain = !tensor.meta.is_tiled();
    let beside = tensor.meta.strides()[last] == 1 || tensor.meta.shape()[last] == 1;
    if plain && beside { tensor } else { into_contiguous(tensor) }
}

/// A new buffer on the device of `like`, of nothing in particular.
pub(super) fn empty<const D: usize>(like: &CubeTensor, shape: [usize; D], dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), Shape::new(shape), dtype)
}

/// Numbers sent to the device of `like`.
pub(super) fn upload(like: &CubeTensor, numbers: &[u32]) -> BufferArg {
    let handle = like.client.create_from_slice(u32::as_bytes(numbers));
    // SAFETY: the buffer was made of exactly these numbers.
    unsafe { BufferArg::from_raw_parts(handle, numbers.len()) }
}

/// What a kernel needs to count with to reach every number of the tensors.
pub(super) fn addresses(tensors: &[&CubeTensor]) -> AddressType {
    tensors.iter().map(|tensor| tensor.required_address_type()).max().unwrap_or_default()
}
