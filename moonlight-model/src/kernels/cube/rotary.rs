//! Rotary embedding, in one pass.

use burn::backend::Cube;
use burn::backend::tensor::FloatTensor;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::{launch, unit_per_value};
use super::tensor::{assert_dtype, assert_shape, buffers, elem_type, empty, to_float_tensor};
#[cfg(all(test, feature = "kernel-text"))]
use super::text::Dialect;
use crate::kernels::{RotaryKernel, RotationSpec, reference};

impl RotaryKernel for Cube {
    fn rotate_forward(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        spec: &RotationSpec,
    ) -> FloatTensor<Self> {
        match buffers([&x, &cos, &sin]) {
            Some([x, cos, sin]) if cos.dtype == sin.dtype => to_float_tensor(forward(x, cos, sin, spec)),
            _ => reference::rotate_forward::<Self>(x, cos, sin, spec),
        }
    }
}

/// The compile-time sizes of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct HeadRotation {
    heads: usize,
    width: usize,
    start: usize,
    interleave: bool,
}

/// See `reference::rotate_forward`.
fn forward(x: CubeTensor, cos: CubeTensor, sin: CubeTensor, spec: &RotationSpec) -> CubeTensor {
    let (x, cos, sin) = (into_contiguous(x), into_contiguous(cos), into_contiguous(sin));
    let shape: [usize; 4] = x.meta.shape().dims();
    let rotation = HeadRotation { heads: shape[2], width: shape[3], start: spec.start, interleave: spec.interleave };
    let [batch, sequence, _, width] = shape;
    assert!(
        spec.start < width && (width - spec.start).is_multiple_of(2),
        "the rotated part of a head must be a number of pairs"
    );
    assert_shape(&x, shape);
    for angles in [&cos, &sin] {
        assert_shape(angles, [batch * sequence, (width - spec.start) / 2]);
        assert_dtype(angles, cos.dtype);
    }
    let out = empty(&x, shape, x.dtype);
    let count = shape.iter().product();
    let dtypes = [elem_type(&x), elem_type(&cos)];
    // SAFETY: a unit with an index below `count` indexes `x` and the result by it, and by the index of the other value of its pair,
    // which is in the same head; cos and sin by token and pair. The contiguous tensors have these shapes, as asserted.
    unsafe { launch!(forward_kernel, unit_per_value(&x, count), [x, cos, sin, out], count, rotation, dtypes) };
    out
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn forward_kernel<F: Float, G: Float>(
    x: &[F],
    cos: &[G],
    sin: &[G],
    out: &mut [F],
    count: usize,
    #[comptime] rotation: HeadRotation,
    #[define(F, G)] _dtypes: [ElemType; 2],
) {
    let pairs = comptime!((rotation.width - rotation.start) / 2);
    if ABSOLUTE_POS < count {
        let place = ABSOLUTE_POS % rotation.width;
        if place < rotation.start {
            out[ABSOLUTE_POS] = x[ABSOLUTE_POS];
        } else {
            let member = place - rotation.start;
            let (pair, second) = if comptime!(rotation.interleave) {
                (member / 2, member % 2)
            } else {
                (member % pairs, member / pairs)
            };
            let apart = comptime!(if rotation.interleave { 1 } else { pairs });
            let angle = ABSOLUTE_POS / comptime!(rotation.width * rotation.heads) * pairs + pair;
            // Cos and sin are rounded to the dtype of x before the products, as in transformers.
            let (cos, sin) = (F::cast_from(cos[angle]), F::cast_from(sin[angle]));
            let own = x[ABSOLUTE_POS] * cos;
            if second == 0 {
                out[ABSOLUTE_POS] = own - x[ABSOLUTE_POS + apart] * sin;
            } else {
                out[ABSOLUTE_POS] = own + x[ABSOLUTE_POS - apart] * sin;
            }
        }
    }
}

/// The kernels of this file as text.
#[cfg(all(test, feature = "kernel-text"))]
pub(super) fn kernels(on: &Dialect) -> Vec<Box<dyn CubeKernel>> {
    use super::text::{buffer, kernel};
    let heads = |interleave| HeadRotation { heads: 16, width: 192, start: 128, interleave };
    let dtypes = [on.float; 2];
    [false, true]
        .map(|interleave| {
            kernel!(
                on,
                256,
                forward_kernel::ForwardKernel,
                buffer(),
                buffer(),
                buffer(),
                buffer(),
                (),
                heads(interleave),
                dtypes
            )
        })
        .into()
}
