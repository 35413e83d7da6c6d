//! Grouped products by quantized weights: forward in integers, the gradient of the rows by panels of the dequantized matrix.

use std::cell::RefCell;
use std::ops::Range;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, bf16, f16};
use moonlight_simd::bf16_gemm;
use moonlight_simd::quant::{QuantizedMatrix, QuantizedRows, ScaleType};
use rayon::prelude::*;

use super::dtype::{Element, round_into, widen};
use super::matrix::{Matrix, MatrixMut, Write, multiply};
use super::tensor::{by_dtype, dims, tensor_of, values_of};
use crate::disjoint::DisjointVec;
use crate::kernels::{GroupLayout, QUANT_BLOCK, QUANT_TILE, QuantizedMatmulKernel, QuantizedShape, reference};

impl QuantizedMatmulKernel for Flex {
    fn quantized_matmul_forward(
        rows: FloatTensor<Self>,
        values: IntTensor<Self>,
        scales: FloatTensor<Self>,
        spec: QuantizedShape,
        layout: &GroupLayout,
    ) -> FloatTensor<Self> {
        let Some(scale_type) = scale_type(&scales) else {
            return reference::quantized_matmul_forward::<Self>(rows, values, scales, spec, layout);
        };
        let weights = Weights::new(&values, &scales, spec, scale_type);
        by_dtype!(
            [rows],
            E => forward::<E>(&rows, weights.view(), layout),
            reference::quantized_matmul_forward::<Self>(rows, values, scales, spec, layout)
        )
    }

    fn quantized_matmul_rows_grad(
        grad: FloatTensor<Self>,
        values: IntTensor<Self>,
        scales: FloatTensor<Self>,
        spec: QuantizedShape,
        layout: &GroupLayout,
    ) -> FloatTensor<Self> {
        let Some(scale_type) = scale_type(&scales) else {
            return reference::quantized_matmul_rows_grad::<Self>(grad, values, scales, spec, layout);
        };
        let weights = Weights::new(&values, &scales, spec, scale_type);
        by_dtype!(
            [grad],
            E => rows_grad::<E>(&grad, weights.view(), layout),
            reference::quantized_matmul_rows_grad::<Self>(grad, values, scales, spec, layout)
        )
    }
}

fn scale_type(scales: &FlexTensor) -> Option<ScaleType> {
    match scales.dtype() {
        DType::F16 => Some(ScaleType::F16),
        DType::BF16 => Some(ScaleType::Bf16),
        _ => None,
    }
}

/// Contiguous tensors of a stack of quantized matrices.
struct Weights {
    values: FlexTensor,
    scales: FlexTensor,
    spec: QuantizedShape,
    scale_type: ScaleType,
}

impl Weights {
    fn new(values: &FlexTensor, scales: &FlexTensor, spec: QuantizedShape, scale_type: ScaleType) -> Self {
        Self { values: values.to_contiguous(), scales: scales.to_contiguous(), spec, scale_type }
    }

    fn view(&self) -> QuantizedStack<'_> {
        let scales: &[u16] = match self.scale_type {
            ScaleType::F16 => {
                bytemuck::cast_slice(self.scales.as_slice::<f16>().expect("scales are f16 and contiguous"))
            }
            ScaleType::Bf16 => {
                bytemuck::cast_slice(self.scales.as_slice::<bf16>().expect("scales are bf16 and contiguous"))
            }
        };
        QuantizedStack {
            values: self.values.as_slice().expect("quantized values are u8 and contiguous"),
            scales,
            spec: self.spec,
            scale_type: self.scale_type,
        }
    }
}

/// The quantized matrices of all groups.
#[derive(Clone, Copy)]
pub(super) struct QuantizedStack<'a> {
    pub(super) values: &'a [u8],
    pub(super) scales: &'a [u16],
    pub(super) spec: QuantizedShape,
    pub(super) scale_type: ScaleType,
}

impl<'a> QuantizedStack<'a> {
    /// The matrix of a group.
    pub(super) fn matrix(self, group: usize) -> QuantizedMatrix<'a> {
        let (bytes, scales) = (self.spec.value_bytes(), self.spec.scales());
        QuantizedMatrix::new(
            self.spec,
            self.scale_type,
            &self.values[group * bytes..][..bytes],
            &self.scales[group * scales..][..scales],
        )
    }
}

/// Bytes of values that a task reads at least, so that a task lasts microseconds.
const BYTES_PER_TASK: usize = 1 << 17;
/// Rows of a task. Its quantized rows then stay in the L2 cache.
const ROWS_PER_TASK: usize = 192;
/// Rows that are quantized together by a thread.
const ROWS_PER_QUANTIZING: usize = 8;

/// `out[r] = rows[r] x weight[group of r]`.
fn forward<E: Element>(rows: &FlexTensor, weights: QuantizedStack<'_>, layout: &GroupLayout) -> FlexTensor {
    let [count, width] = dims(rows);
    let spec = weights.spec;
    assert_eq!(width, spec.input, "the width of the rows must be the input width of the weight");
    let rows = quantized_rows(values_of::<E>(rows), width);
    let bytes = (spec.blocks() * spec.bits.tile_bytes()).max(1);
    let tiles = BYTES_PER_TASK.div_ceil(bytes).next_multiple_of(2);
    let mut tasks = Vec::new();
    for group in 0..layout.groups() {
        let range = layout.group(group);
        for start in range.clone().step_by(ROWS_PER_TASK) {
            let end = range.end.min(start + ROWS_PER_TASK);
            // Many rows make a tile expensive.
            let tiles = if end - start > 16 { tiles.min(4) } else { tiles };
            let blocks = (0..spec.tiles()).step_by(tiles);
            tasks.extend(blocks.map(|first| (group, start..end, first..spec.tiles().min(first + tiles))));
        }
    }
    let out = DisjointVec::<E>::new(count * spec.output);
    tasks.into_par_iter().with_max_len(1).for_each(|(group, range, tiles)| {
        let columns = tiles.start * QUANT_TILE..spec.output.min(tiles.end * QUANT_TILE);
        let width = columns.len();
        // SAFETY: groups share no rows (`GroupLayout`'s constructors), and the tasks of a group share no rows or no columns.
        let mut target = unsafe { out.block(spec.output, range.clone(), columns) };
        SCRATCH.with_borrow_mut(|Scratch { sums, .. }| {
            sums.resize(sums.len().max(range.len() * width), 0.0);
            let sums = &mut sums[..range.len() * width];
            weights.matrix(group).multiply(&rows, range.clone(), tiles.clone(), sums, width);
            for (row, sums) in sums.chunks_exact(width).enumerate() {
                round_into(sums, target.row(row));
            }
        });
    });
    // SAFETY: each task wrote all of its block, and blocks cover all rows and columns.
    tensor_of(unsafe { out.finish() }, [count, spec.output])
}

/// Quantizes all rows, on all threads.
fn quantized_rows<E: Element>(rows: &[E], width: usize) -> QuantizedRows {
    let parts: Vec<QuantizedRows> = rows
        .par_chunks(ROWS_PER_QUANTIZING * width)
        .map(|rows| {
            let mut wide = vec![0.0; rows.len()];
            widen(rows, &mut wide);
            QuantizedRows::new(&wide, width)
        })
        .collect();
    QuantizedRows::joined(parts)
}

/// Inputs and outputs of a panel of the dequantized matrix: 256 KiB in f32, which stay in the L2 cache.
const PANEL: usize = 256;

#[derive(Default)]
struct Scratch {
    sums: Vec<f32>,
    panel: Vec<f32>,
    rounded_panel: Vec<bf16>,
}

thread_local! {
    /// While it is borrowed, nothing waits for rayon: a stolen task would borrow it a second time and panic.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `out[r] = grad[r] x weight[group of r]^T`, computed in bf16 if the processor does.
fn rows_grad<E: Element>(grad: &FlexTensor, weights: QuantizedStack<'_>, layout: &GroupLayout) -> FlexTensor {
    let [count, width] = dims(grad);
    let spec = weights.spec;
    assert_eq!(width, spec.output, "the width of the gradient must be the output width of the weight");
    let grad = values_of::<E>(grad);
    let grad = if bf16_gemm::is_native() { Grad::Rounded(converted(grad)) } else { Grad::Wide(converted(grad)) };
    let mut tasks: Vec<(usize, Range<usize>, Range<usize>)> = Vec::new();
    for group in 0..layout.groups() {
        let range = layout.group(group);
        for start in range.clone().step_by(ROWS_PER_TASK) {
            let rows = start..range.end.min(start + ROWS_PER_TASK);
            let inputs = (0..spec.input).step_by(PANEL);
            tasks.extend(inputs.map(|first| (group, rows.clone(), first..spec.input.min(first + PANEL))));
        }
    }
    let out = DisjointVec::<E>::new(count * spec.input);
    tasks.into_par_iter().with_max_len(1).for_each(|(group, range, inputs)| {
        // SAFETY: groups share no rows (`GroupLayout`'s constructors), and the tasks of a group share no rows or no columns.
        let mut target = unsafe { out.block(spec.input, range.clone(), inputs.clone()) };
        SCRATCH.with_borrow_mut(|scratch| {
            let width = inputs.len();
            let sums = scratch.by_panels(&grad, weights.matrix(group), range, inputs);
            for (row, sums) in sums.chunks_exact(width).enumerate() {
                round_into(sums, target.row(row));
            }
        });
    });
    // SAFETY: each task wrote all of its block, and blocks cover all rows and columns.
    tensor_of(unsafe { out.finish() }, [count, spec.input])
}

/// A gradient in the type of the product.
enum Grad {
    Wide(Vec<f32>),
    Rounded(Vec<bf16>),
}

/// Values in another type, on all threads.
fn converted<E: Element, T: Element>(values: &[E]) -> Vec<T> {
    const CHUNK: usize = 1 << 14;
    let convert = |values: &[E]| {
        let mut wide = vec![0.0; values.len()];
        widen(values, &mut wide);
        T::rounded(wide)
    };
    values.par_chunks(CHUNK).map(convert).collect::<Vec<_>>().concat()
}

impl Scratch {
    /// The gradient of some rows for some inputs, whose first is that of a block: `[rows, inputs]`.
    fn by_panels(
        &mut self,
        grad: &Grad,
        matrix: QuantizedMatrix<'_>,
        rows: Range<usize>,
        inputs: Range<usize>,
    ) -> &[f32] {
        let Self { sums, panel, rounded_panel } = self;
        let QuantizedShape { output, .. } = matrix.shape();
        sums.resize(sums.len().max(rows.len() * inputs.len()), 0.0);
        let sums = &mut sums[..rows.len() * inputs.len()];
        let blocks = inputs.start / QUANT_BLOCK..inputs.end.div_ceil(QUANT_BLOCK);
        for first in (0..output).step_by(PANEL) {
            let columns = first..output.min(first + PANEL);
            let tiles = first / QUANT_TILE..columns.end.div_ceil(QUANT_TILE);
            let width = tiles.len() * QUANT_TILE; // of the panel, [inputs, width]
            let size = blocks.len() * QUANT_BLOCK * width;
            let start = rows.start * output + first;
            let write = if first == 0 { Write::Set } else { Write::Add };
            let mut out = MatrixMut::strided(sums, rows.len(), inputs.len(), inputs.len());
            match grad {
                Grad::Wide(grad) => {
                    panel.resize(panel.len().max(size), 0.0);
                    matrix.dequantize(tiles, blocks.clone(), panel);
                    let grad = Matrix::strided(&grad[start..], rows.len(), columns.len(), output);
                    let weight = Matrix::strided(panel, inputs.len(), columns.len(), width).transposed();
                    multiply(&mut out, grad, weight, 1.0, write);
                }
                Grad::Rounded(grad) => {
                    rounded_panel.resize(rounded_panel.len().max(size), bf16::ZERO);
                    matrix.dequantize(tiles, blocks.clone(), rounded_panel);
                    let grad = Matrix::strided(&grad[start..], rows.len(), columns.len(), output);
                    let weight = Matrix::strided(rounded_panel, inputs.len(), columns.len(), width).transposed();
                    multiply(&mut out, grad, weight, 1.0, write);
                }
            }
        }
        sums
    }
}
