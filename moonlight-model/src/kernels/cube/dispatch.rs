//! Dispatch of tokens to rows of experts, and their combination. One cube writes one row and reads all rows that it depends on.
//! Atomic additions, whose order changes from run to run, are not needed.

use burn::backend::Cube;
use burn::backend::tensor::FloatTensor;
use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::launch;
use super::reduce::{UNITS, cube_per_row, row_of_cube, sum_of_units};
use super::tensor::{assert_dtype, assert_shape, buffers, elem_type, empty, layout_section, to_float_tensor};
#[cfg(all(test, feature = "kernel-text"))]
use super::text::Dialect;
use crate::kernels::group_layout::Section;
use crate::kernels::{DispatchKernel, GroupLayout, reference};

impl DispatchKernel for Cube {
    fn dispatch_rows_forward(tokens: FloatTensor<Self>, layout: &GroupLayout) -> FloatTensor<Self> {
        match buffers([&tokens]) {
            Some([tokens]) => to_float_tensor(dispatch(tokens, layout)),
            None => reference::dispatch_rows_forward::<Self>(tokens, layout),
        }
    }

    fn dispatch_rows_grad(grad: FloatTensor<Self>, layout: &GroupLayout) -> FloatTensor<Self> {
        match buffers([&grad]) {
            Some([grad]) => to_float_tensor(combine(grad, None, layout)),
            None => reference::dispatch_rows_grad::<Self>(grad, layout),
        }
    }

    fn combine_rows_forward(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        layout: &GroupLayout,
    ) -> FloatTensor<Self> {
        match buffers([&rows, &weights]) {
            Some([rows, weights]) if weights.dtype == DType::F32 => {
                to_float_tensor(combine(rows, Some(weights), layout))
            }
            _ => reference::combine_rows_forward::<Self>(rows, weights, layout),
        }
    }

    fn combine_rows_grad(
        rows: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        layout: &GroupLayout,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        match buffers([&rows, &weights, &grad]) {
            Some([rows, weights, grad]) if weights.dtype == DType::F32 && grad.dtype == rows.dtype => {
                let (rows, weights) = combine_grad(rows, weights, grad, layout);
                (to_float_tensor(rows), to_float_tensor(weights))
            }
            _ => reference::combine_rows_grad::<Self>(rows, weights, grad, layout),
        }
    }
}

/// `out[r] = tokens[token of r]`.
fn dispatch(tokens: CubeTensor, layout: &GroupLayout) -> CubeTensor {
    let tokens = into_contiguous(tokens);
    let (rows, width) = (layout.rows(), tokens.meta.shape()[1]);
    assert_shape(&tokens, [layout.tokens(), width]);
    let out = empty(&tokens, [rows, width], tokens.dtype);
    let ((sources, start), dtype) = (layout_section(&tokens, layout, Section::TokenOfRow), elem_type(&tokens));
    // SAFETY: the kernel uses indices of rows, and of tokens from `token_of_row`, which a layout keeps below `tokens`. Both tensors
    // have the shapes of the layout, as asserted, and are contiguous.
    unsafe { launch!(dispatch_kernel, cube_per_row(rows), [tokens, out], sources, start, rows, width, dtype) };
    out
}

/// The sum of the rows of each token, weighted if there are weights, f32 `[tokens, k]`.
fn combine(rows: CubeTensor, weights: Option<CubeTensor>, layout: &GroupLayout) -> CubeTensor {
    let rows = into_contiguous(rows);
    let (tokens, width) = (layout.tokens(), rows.meta.shape()[1]);
    assert_shape(&rows, [layout.rows(), width]);
    if let Some(weights) = &weights {
        assert_shape(weights, [tokens, layout.k()]);
        assert_dtype(weights, DType::F32);
    }
    let out = empty(&rows, [tokens, width], rows.dtype);
    let weighted = weights.is_some();
    // A kernel needs a buffer for each argument; without weights this one is not read.
    let weights = weights.map_or_else(|| empty(&rows, [1], DType::F32), into_contiguous);
    let ((sources, start), dtype) = (layout_section(&rows, layout, Section::RowOfSlot), elem_type(&rows));
    let over = cube_per_row(tokens);
    // SAFETY: the kernel indexes slots by `token * k + choice` and rows by `row_of_slot`, which a layout keeps below `rows`; rows,
    // and weights if they are read, have the shapes of the layout, as asserted, and all are contiguous.
    unsafe {
        launch!(combine_kernel, over, [rows, weights, out], sources, start, tokens, width, layout.k(), weighted, dtype);
    }
    out
}

/// Gradients of the weighted sum, for the rows and for the weights.
fn combine_grad(
    rows: CubeTensor,
    weights: CubeTensor,
    grad: CubeTensor,
    layout: &GroupLayout,
) -> (CubeTensor, CubeTensor) {
    let (rows, weights, grad) = (into_contiguous(rows), into_contiguous(weights), into_contiguous(grad));
    let width = rows.meta.shape()[1];
    assert_shape(&rows, [layout.rows(), width]);
    assert_shape(&weights, [layout.tokens(), layout.k()]);
    assert_shape(&grad, [layout.tokens(), width]);
    assert_dtype(&weights, DType::F32);
    assert_dtype(&grad, rows.dtype);
    let grad_rows = empty(&rows, [layout.rows(), width], rows.dtype);
    let grad_weights = empty(&rows, [layout.tokens(), layout.k()], DType::F32);
    let ((sources, start), dtype) = (layout_section(&rows, layout, Section::RowOfSlot), elem_type(&rows));
    let (over, slots) = (cube_per_row(layout.rows()), layout.rows());
    // SAFETY: the kernel indexes slots by their index, tokens by `slot / k` and rows by `row_of_slot`, a permutation in every layout,
    // so each row is written by one cube (or by several that write the same values). Shapes and dtypes are as asserted, and all
    // tensors are contiguous.
    unsafe {
        launch!(
            combine_grad_kernel,
            over,
            [rows, weights, grad, grad_rows, grad_weights],
            sources,
            start,
            slots,
            width,
            layout.k(),
            dtype
        );
    }
    (grad_rows, grad_weights)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn dispatch_kernel<F: Float>(
    tokens: &[F],
    out: &mut [F],
    sources: &[u32],
    start: usize,
    rows: usize,
    width: usize,
    #[define(F)] _dtype: ElemType,
) {
    let row = row_of_cube(rows);
    let source = sources[start + row] as usize * width;
    let mut at = UNIT_POS as usize;
    while at < width {
        out[row * width + at] = tokens[source + at];
        at += UNITS;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn combine_kernel<F: Float>(
    rows: &[F],
    weights: &[f32],
    out: &mut [F],
    sources: &[u32],
    start: usize,
    tokens: usize,
    width: usize,
    k: usize,
    #[comptime] weighted: bool,
    #[define(F)] _dtype: ElemType,
) {
    let token = row_of_cube(tokens);
    let mut at = UNIT_POS as usize;
    while at < width {
        let mut sum = 0f32;
        for choice in 0..k {
            let slot = token * k + choice;
            let value = f32::cast_from(rows[sources[start + slot] as usize * width + at]);
            if comptime!(weighted) {
                sum += value * weights[slot];
            } else {
                sum += value;
            }
        }
        out[token * width + at] = F::cast_from(sum);
        at += UNITS;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn combine_grad_kernel<F: Float>(
    rows: &[F],
    weights: &[f32],
    grad: &[F],
    grad_rows: &mut [F],
    grad_weights: &mut [f32],
    sources: &[u32],
    start: usize,
    slots: usize,
    width: usize,
    k: usize,
    #[define(F)] _dtype: ElemType,
) {
    let slot = row_of_cube(slots);
    let (row, token) = (sources[start + slot] as usize * width, slot / k * width);
    let weight = weights[slot];
    let mut scratch = Shared::<[f32]>::new_slice(UNITS);
    let mut dot = 0f32;
    let mut at = UNIT_POS as usize;
    while at < width {
        let grad = f32::cast_from(grad[token + at]);
        dot += grad * f32::cast_from(rows[row + at]);
        grad_rows[row + at] = F::cast_from(grad * weight);
        at += UNITS;
    }
    let dot = sum_of_units(&mut scratch, dot);
    if UNIT_POS == 0 {
        grad_weights[slot] = dot;
    }
}

/// The kernels of this file as text.
#[cfg(all(test, feature = "kernel-text"))]
pub(super) fn kernels(on: &Dialect) -> Vec<Box<dyn CubeKernel>> {
    use super::text::{buffer, kernel};
    let float = on.float;
    let mut list = vec![
        kernel!(on, 256, dispatch_kernel::DispatchKernel, buffer(), buffer(), buffer(), (), (), (), float),
        kernel!(
            on,
            256,
            combine_grad_kernel::CombineGradKernel,
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            (),
            (),
            (),
            (),
            float
        ),
    ];
    for weighted in [false, true] {
        list.push(kernel!(
            on,
            256,
            combine_kernel::CombineKernel,
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            (),
            (),
            (),
            (),
            weighted,
            float
        ));
    }
    list
}
