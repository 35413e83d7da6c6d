//! From Burn's tensors to the buffers that a kernel reads, and back; and what makes a launch safe.

use std::any::Any;

use burn::backend::Cube;
use burn::backend::TensorMetadata;
use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, FloatDType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::kernels::{CachedAttentionKernel, Kernels, ProjectKernel, QuantizedMatmulKernel};

impl Kernels for Cube {}
// The reference is Burn's own product, which is the right one here.
impl ProjectKernel for Cube {}
// These have no kernels here yet, and run the reference.
impl QuantizedMatmulKernel for Cube {}
impl CachedAttentionKernel for Cube {}

/// The buffers behind tensors that the kernels can read: f32, or a half type that the runtime stores.
///
/// `None` where one is of another type, and where a program turns on Burn's fusion: its tensors are promises of a
/// result whose buffer does not exist yet.
///
/// # Panics
///
/// When the tensors lie on different devices.
pub(super) fn buffers<const N: usize>(tensors: [&FloatTensor<Cube>; N]) -> Option<[CubeTensor; N]> {
    let buffers = tensors.map(|tensor| (tensor as &dyn Any).downcast_ref::<CubeTensor>());
    if buffers.iter().any(|buffer| buffer.is_none_or(|buffer| !is_readable(buffer))) {
        return None;
    }
    let buffers = buffers.map(|buffer| buffer.expect("each was looked at").clone());
    for buffer in &buffers {
        same_device(buffer, &buffers[0]);
    }
    Some(buffers)
}

/// # Panics
///
/// When the buffers lie on different devices.
pub(super) fn same_device(buffer: &CubeTensor, other: &CubeTensor) {
    assert!(buffer.device == other.device, "the tensors of an operation lie on different devices");
}

/// # Panics
///
/// When a tensor that a kernel is about to index by `shape` has another, or an empty dimension. The kernels compute their
/// indices from these shapes alone, so this is what every launch relies on.
#[track_caller]
pub(super) fn assert_shape<const D: usize>(tensor: &CubeTensor, shape: [usize; D]) {
    assert!(tensor.meta.shape()[..] == shape[..], "a kernel's tensor is {:?}, not {shape:?}", tensor.meta.shape());
    assert!(!shape.contains(&0), "a kernel's tensor has an empty dimension: {shape:?}");
}

/// # Panics
///
/// When a tensor has another dtype than the one that a kernel reads it as.
#[track_caller]
pub(super) fn assert_dtype(tensor: &CubeTensor, dtype: DType) {
    assert!(tensor.dtype == dtype, "a kernel's tensor is {:?}, not {dtype:?}", tensor.dtype);
}

pub(super) fn to_f32(tensor: FloatTensor<Cube>) -> FloatTensor<Cube> {
    if tensor.dtype() == DType::F32 { tensor } else { Cube::float_cast(tensor, FloatDType::F32) }
}

/// The buffer behind integers that the kernels can read.
pub(super) fn int_buffer(tensor: &IntTensor<Cube>) -> Option<CubeTensor> {
    let buffer = (tensor as &dyn Any).downcast_ref::<CubeTensor>().cloned()?;
    let is_readable = matches!(buffer.dtype, DType::I32 | DType::I64 | DType::U32);
    (is_readable && buffer.client.properties().supports_type(elem_type(&buffer))).then_some(buffer)
}

fn is_readable(tensor: &CubeTensor) -> bool {
    matches!(tensor.dtype, DType::F32 | DType::F16 | DType::BF16)
        && tensor.client.properties().supports_type(elem_type(tensor))
        && tensor.qparams.is_none()
}

/// The tensor of a buffer, where [`buffers`] gave some.
pub(super) fn to_float_tensor(buffer: CubeTensor) -> FloatTensor<Cube> {
    let tensor: Box<dyn Any> = Box::new(buffer);
    *tensor.downcast().expect("buffers come from tensors of this type")
}

/// How CubeCL calls the type of a tensor's numbers.
pub(super) fn elem_type(tensor: &CubeTensor) -> ElemType {
    dtype_to_storage_type(tensor.dtype)
}

/// The same tensor, with the numbers of its last dimension side by side.
pub(super) fn with_contiguous_rows(tensor: CubeTensor) -> CubeTensor {
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
pub(super) fn address_type_of(tensors: &[&CubeTensor]) -> AddressType {
    tensors.iter().map(|tensor| tensor.required_address_type()).max().unwrap_or_default()
}
