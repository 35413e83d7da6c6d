//! RMSNorm and its gradients, one cube for each row.

use burn::backend::Cube;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, FloatDType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::launch;
use super::reduce::{UNITS, cube_per_row, row_of_cube, sum_of_units};
use super::tensor::{assert_dtype, assert_shape, buffers, elem_type, empty, to_float_tensor};
#[cfg(all(test, feature = "kernel-text"))]
use super::text::Dialect;
use crate::kernels::{RmsNormKernel, reference};

impl RmsNormKernel for Cube {
    fn rms_norm_forward(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
        match buffers([&x, &gain]) {
            Some([x, gain]) => to_float_tensor(forward(x, gain, epsilon)),
            None => reference::rms_norm_forward::<Self>(x, gain, epsilon),
        }
    }

    fn rms_norm_grad(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        output_grad: FloatTensor<Self>,
        epsilon: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        match buffers([&x, &gain, &output_grad]) {
            Some([x, gain, output_grad]) if output_grad.dtype == x.dtype => {
                let (width, dtype) = (gain.meta.shape()[0], FloatDType::from(gain.dtype));
                let (x, parts) = grad(x, gain, output_grad, epsilon);
                let gain = Self::float_reshape(Self::float_sum_dim(to_float_tensor(parts), 0), Shape::new([width]));
                (to_float_tensor(x), Self::float_cast(gain, dtype))
            }
            _ => reference::rms_norm_grad::<Self>(x, gain, output_grad, epsilon),
        }
    }
}

/// Rows over which one unit sums the gradient of the gain. Burn adds the partial sums: with atomic additions the order of the sum
/// would change from run to run.
const CHUNK: usize = 64;

fn forward(x: CubeTensor, gain: CubeTensor, epsilon: f32) -> CubeTensor {
    let (x, gain) = (into_contiguous(x), into_contiguous(gain));
    let [rows, width] = x.meta.shape().dims();
    assert_shape(&x, [rows, width]);
    assert_shape(&gain, [width]);
    let out = empty(&x, [rows, width], x.dtype);
    let dtypes = [elem_type(&x), elem_type(&gain)];
    // SAFETY: `row_of_cube` keeps the row of a cube below `rows`, and the loops keep columns below `width`; the contiguous tensors
    // have these shapes, as asserted, and are read as the dtypes that they have.
    unsafe { launch!(forward_kernel, cube_per_row(rows), [x, gain, out], rows, width, epsilon, dtypes) };
    out
}

/// The gradient for `x`, and partial sums of the gradient for the gain, f32 `[parts, width]`.
fn grad(x: CubeTensor, gain: CubeTensor, grad: CubeTensor, epsilon: f32) -> (CubeTensor, CubeTensor) {
    let (x, gain, grad) = (into_contiguous(x), into_contiguous(gain), into_contiguous(grad));
    let [rows, width] = x.meta.shape().dims();
    assert_shape(&x, [rows, width]);
    assert_shape(&gain, [width]);
    assert_shape(&grad, [rows, width]);
    assert_dtype(&grad, x.dtype);
    let parts = rows.div_ceil(CHUNK);
    let grad_x = empty(&x, [rows, width], x.dtype);
    let inverse = empty(&x, [rows], DType::F32);
    let grad_gain = empty(&x, [parts, width], DType::F32);
    let dtypes = [elem_type(&x), elem_type(&gain)];
    let columns = CubeCount::Static(width.div_ceil(UNITS) as u32, parts as u32, 1);
    let over = (columns, CubeDim::new_1d(UNITS as u32));
    // SAFETY: as in `forward`; the second kernel keeps the column of a unit below `width`, and its rows below `rows`.
    unsafe {
        launch!(grad_kernel, cube_per_row(rows), [x, gain, grad, grad_x, inverse], rows, width, epsilon, dtypes);
        launch!(gain_grad_kernel, over, [x, grad, inverse, grad_gain], rows, width, dtypes[0]);
    }
    (grad_x, grad_gain)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn forward_kernel<F: Float, G: Float>(
    x: &[F],
    gain: &[G],
    out: &mut [F],
    rows: usize,
    width: usize,
    epsilon: f32,
    #[define(F, G)] _dtypes: [ElemType; 2],
) {
    let line = row_of_cube(rows) * width;
    let mut scratch = Shared::<[f32]>::new_slice(UNITS);
    let mut square = 0f32;
    let mut at = UNIT_POS as usize;
    while at < width {
        let value = f32::cast_from(x[line + at]);
        square += value * value;
        at += UNITS;
    }
    let inverse = 1f32 / (sum_of_units(&mut scratch, square) / f32::cast_from(width) + epsilon).sqrt();
    let mut at = UNIT_POS as usize;
    while at < width {
        // Rounded before it is multiplied by the gain, as in transformers.
        let normalized = F::cast_from(f32::cast_from(x[line + at]) * inverse);
        out[line + at] = normalized * F::cast_from(gain[at]);
        at += UNITS;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn grad_kernel<F: Float, G: Float>(
    x: &[F],
    gain: &[G],
    grad: &[F],
    grad_x: &mut [F],
    inverses: &mut [f32],
    rows: usize,
    width: usize,
    epsilon: f32,
    #[define(F, G)] _dtypes: [ElemType; 2],
) {
    let row = row_of_cube(rows);
    let line = row * width;
    let mut scratch = Shared::<[f32]>::new_slice(UNITS);
    let mut square = 0f32;
    let mut dot = 0f32;
    let mut at = UNIT_POS as usize;
    while at < width {
        let value = f32::cast_from(x[line + at]);
        square += value * value;
        dot += value * f32::cast_from(grad[line + at]) * f32::cast_from(gain[at]);
        at += UNITS;
    }
    let count = f32::cast_from(width);
    let inverse = 1f32 / (sum_of_units(&mut scratch, square) / count + epsilon).sqrt();
    let mean = sum_of_units(&mut scratch, dot) * inverse / count;
    let mut at = UNIT_POS as usize;
    while at < width {
        let normalized = f32::cast_from(x[line + at]) * inverse;
        let scaled = f32::cast_from(grad[line + at]) * f32::cast_from(gain[at]);
        grad_x[line + at] = F::cast_from((scaled - normalized * mean) * inverse);
        at += UNITS;
    }
    if UNIT_POS == 0 {
        inverses[row] = inverse;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn gain_grad_kernel<F: Float>(
    x: &[F],
    grad: &[F],
    inverses: &[f32],
    grad_gain: &mut [f32],
    rows: usize,
    width: usize,
    #[define(F)] _dtype: ElemType,
) {
    let part = CUBE_POS_Y as usize;
    let column = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    if column < width {
        let mut sum = 0f32;
        let mut row = part * CHUNK;
        let end = min(row + CHUNK, rows);
        while row < end {
            let at = row * width + column;
            sum += f32::cast_from(grad[at]) * f32::cast_from(x[at]) * inverses[row];
            row += 1;
        }
        grad_gain[part * width + column] = sum;
    }
}

/// The kernels of this file as text.
#[cfg(all(test, feature = "kernel-text"))]
pub(super) fn kernels(on: &Dialect) -> Vec<Box<dyn CubeKernel>> {
    use super::text::{buffer, kernel};
    let dtypes = [on.float; 2];
    vec![
        kernel!(on, 256, forward_kernel::ForwardKernel, buffer(), buffer(), buffer(), (), (), (), dtypes),
        kernel!(on, 256, grad_kernel::GradKernel, buffer(), buffer(), buffer(), buffer(), buffer(), (), (), (), dtypes),
        kernel!(on, 256, gain_grad_kernel::GainGradKernel, buffer(), buffer(), buffer(), buffer(), (), (), on.float),
    ]
}
