//! Rotary positions, in one pass.

use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::super::RotationSpec;
use super::launch::{each_number, launch};
use super::tensor::{elem, empty};

/// How a head turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Turn {
    heads: usize,
    width: usize,
    start: usize,
    interleave: bool,
}

/// See `reference::rotate_forward`.
pub(super) fn forward(x: CubeTensor, cos: CubeTensor, sin: CubeTensor, spec: &RotationSpec) -> CubeTensor {
    let (x, cos, sin) = (into_contiguous(x), into_contiguous(cos), into_contiguous(sin));
    let shape: [usize; 4] = x.meta.shape().dims();
    let turn = Turn { heads: shape[2], width: shape[3], start: spec.start, interleave: spec.interleave };
    let out = empty(&x, shape, x.dtype);
    let count = shape.iter().product();
    let dtypes = [elem(&x), elem(&cos)];
    // SAFETY: the kernel keeps within its tensors.
    unsafe { launch!(forward_kernel, each_number(&x, count), [x, cos, sin, out], count, turn, dtypes) };
    out
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn forward_kernel<F: Float, G: Float>(
    x: &[F],
    cos: &[G],
    sin: &[G],
    out: &mut [F],
    count: usize,
    #[comptime] turn: Turn,
    #[define(F, G)] _dtypes: [ElemType; 2],
) {
    let pairs = comptime!((turn.width - turn.start) / 2);
    if ABSOLUTE_POS < count {
        let place = ABSOLUTE_POS % turn.width;
        if place < turn.start {
            out[ABSOLUTE_POS] = x[ABSOLUTE_POS];
        } else {
            let member = place - turn.start;
            let (pair, second) =
                if comptime!(turn.interleave) { (member / 2, member % 2) } else { (member % pairs, member / pairs) };
            let apart = comptime!(if turn.interleave { 1 } else { pairs });
            let angle = ABSOLUTE_POS / comptime!(turn.width * turn.heads) * pairs + pair;
            // The angles are rounded to the dtype of x before the products, as the published code does.
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
