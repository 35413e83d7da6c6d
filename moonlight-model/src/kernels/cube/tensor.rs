//! Conversion between Burn's tensors and the buffers of kernels, and the assertions that make a launch safe.

use std::any::Any;

use burn::backend::TensorMetadata;
use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Cube, DispatchTensorKind};
use burn::tensor::{DType, FloatDType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use crate::kernels::group_layout::Section;
use crate::kernels::{CachedAttentionKernel, GroupLayout, Kernels};

impl Kernels for Cube {}
// No kernel yet: this runs the reference.
impl CachedAttentionKernel for Cube {}

/// The buffers of tensors whose dtype the kernels read: f32, or a half type that the device can store.
///
/// `None` if a tensor has another dtype, or if the program uses Burn's fusion, whose tensors are results not computed yet, without
/// a buffer.
///
/// # Panics
///
/// If the tensors are on different devices.
pub(super) fn buffers<const N: usize>(tensors: [&FloatTensor<Cube>; N]) -> Option<[CubeTensor; N]> {
    let buffers = tensors.map(|tensor| (tensor as &dyn Any).downcast_ref::<CubeTensor>());
    if buffers.iter().any(|buffer| buffer.is_none_or(|buffer| !is_readable(buffer))) {
        return None;
    }
    let buffers = buffers.map(|buffer| buffer.expect("every buffer was found to be readable").clone());
    for buffer in &buffers {
        same_device(buffer, &buffers[0]);
    }
    Some(buffers)
}

/// # Panics
///
/// If the buffers are on different devices.
pub(super) fn same_device(buffer: &CubeTensor, other: &CubeTensor) {
    assert!(buffer.device == other.device, "the tensors of an operation are on different devices");
}

/// # Panics
///
/// If a tensor does not have the shape, or the shape has an empty dimension. Every launch relies on this, because kernels compute
/// their indices from these shapes.
#[track_caller]
pub(super) fn assert_shape<const D: usize>(tensor: &CubeTensor, shape: [usize; D]) {
    assert!(tensor.meta.shape()[..] == shape[..], "a kernel's tensor is {:?}, not {shape:?}", tensor.meta.shape());
    assert!(!shape.contains(&0), "a kernel's tensor has an empty dimension: {shape:?}");
}

/// # Panics
///
/// If a tensor does not have the dtype that a kernel reads it as.
#[track_caller]
pub(super) fn assert_dtype(tensor: &CubeTensor, dtype: DType) {
    assert!(tensor.dtype == dtype, "a kernel's tensor is {:?}, not {dtype:?}", tensor.dtype);
}

pub(super) fn to_f32(tensor: FloatTensor<Cube>) -> FloatTensor<Cube> {
    if tensor.dtype() == DType::F32 { tensor } else { Cube::float_cast(tensor, FloatDType::F32) }
}

/// The buffer of an integer tensor whose dtype the kernels read; `None` for another dtype.
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

/// Converts a buffer to the backend's tensor. Call it only where [`buffers`] returned buffers, which shows that both are the same
/// type.
pub(super) fn to_float_tensor(buffer: CubeTensor) -> FloatTensor<Cube> {
    let tensor: Box<dyn Any> = Box::new(buffer);
    *tensor.downcast().expect("`buffers` downcast tensors of this type")
}

/// [`to_float_tensor`] for integers.
pub(super) fn to_int_tensor(buffer: CubeTensor) -> IntTensor<Cube> {
    let tensor: Box<dyn Any> = Box::new(buffer);
    *tensor.downcast().expect("`int_buffer` downcast tensors of this type")
}

/// The dtype as CubeCL's element type.
pub(super) fn elem_type(tensor: &CubeTensor) -> ElemType {
    dtype_to_storage_type(tensor.dtype)
}

/// The tensor with a contiguous last dimension, copied only if necessary.
pub(super) fn with_contiguous_rows(tensor: CubeTensor) -> CubeTensor {
    let last = tensor.meta.num_dims() - 1;
    let plain = !tensor.meta.is_tiled();
    let contiguous = tensor.meta.strides()[last] == 1 || tensor.meta.shape()[last] == 1;
    if plain && contiguous { tensor } else { into_contiguous(tensor) }
}

/// An uninitialized buffer on the device of `like`.
pub(super) fn empty<const D: usize>(like: &CubeTensor, shape: [usize; D], dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), Shape::new(shape), dtype)
}

/// Sends integers to the device of `like`.
pub(super) fn upload(like: &CubeTensor, numbers: &[u32]) -> BufferArg {
    let handle = like.client.create_from_slice(u32::as_bytes(numbers));
    // SAFETY: the buffer was made from exactly these values.
    unsafe { BufferArg::from_raw_parts(handle, numbers.len()) }
}

/// A section of a layout on the device of `like`: a buffer, and where the section starts in it.
pub(super) fn layout_section(like: &CubeTensor, layout: &GroupLayout, section: Section) -> (BufferArg, usize) {
    match on_same_device(like, layout) {
        Some(packed) => (packed.into_buffer_arg(), section.start(layout.groups(), layout.rows())),
        None => (upload(like, &layout.section(section)), 0),
    }
}

/// The buffer of a layout that was sorted on the device of `like`.
fn on_same_device(like: &CubeTensor, layout: &GroupLayout) -> Option<CubeTensor> {
    match layout.on_device()?.clone().into_dispatch().kind {
        DispatchTensorKind::Cube(tensor) => int_buffer(&tensor.int()).filter(|packed| packed.device == like.device),
        #[allow(unreachable_patterns, reason = "Cube may be the only backend")]
        _ => None,
    }
}

/// The smallest integer type that can index every value of the tensors.
pub(super) fn address_type_of(tensors: &[&CubeTensor]) -> AddressType {
    tensors.iter().map(|tensor| tensor.required_address_type()).max().unwrap_or_default()
}
