//! Grouped products by quantized weights. All threads dequantize the matrix of one group, then all multiply by it, so there is only
//! one dequantized matrix in memory.

use crate::disjoint::DisjointVec;
use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::{FloatTensor, IntTensor};
use rayon::prelude::*;

use super::dtype::Element;
use super::matrix::{Matrix, Write, multiply};
use super::tensor::{by_dtype, dims, tensor_of, values, values_of};
use crate::kernels::{GroupLayout, QUANT_BLOCK, QuantBits, QuantizedMatmulKernel, QuantizedSpec, reference};

impl QuantizedMatmulKernel for Flex {
    fn quantized_matmul_forward(
        rows: FloatTensor<Self>,
        values: IntTensor<Self>,
        scales: FloatTensor<Self>,
        spec: QuantizedSpec,
        layout: &GroupLayout,
    ) -> FloatTensor<Self> {
        by_dtype!(
            [rows] f32: [scales],
            E => product::<E>(&rows, &values.to_contiguous(), &scales, spec, layout, false),
            reference::quantized_matmul_forward::<Self>(rows, values, scales, spec, layout)
        )
    }

    fn quantized_matmul_rows_grad(
        grad: FloatTensor<Self>,
        values: IntTensor<Self>,
        scales: FloatTensor<Self>,
        spec: QuantizedSpec,
        layout: &GroupLayout,
    ) -> FloatTensor<Self> {
        by_dtype!(
            [grad] f32: [scales],
            E => product::<E>(&grad, &values.to_contiguous(), &scales, spec, layout, true),
            reference::quantized_matmul_rows_grad::<Self>(grad, values, scales, spec, layout)
        )
    }
}

/// Quantization blocks of a dequantizing task.
const BLOCKS_PER_TASK: usize = 64;
/// Rows of a multiplying task.
const ROWS_PER_TASK: usize = 64;

/// `out[r] = rows[r] x weight[group of r]`, or with each matrix transposed.
fn product<E: Element>(
    rows: &FlexTensor,
    quantized: &FlexTensor,
    scales: &FlexTensor,
    spec: QuantizedSpec,
    layout: &GroupLayout,
    transpose: bool,
) -> FlexTensor {
    let [count, width] = dims(rows);
    let ([_, bytes], [_, blocks]) = (dims(quantized), dims(scales));
    let QuantizedSpec { bits, input, output } = spec;
    let (from, to) = if transpose { (output, input) } else { (input, output) };
    assert_eq!(width, from, "the width of the rows must be the input width of the weight");
    let quantized: &[u8] = quantized.as_slice().expect("quantized values are u8 and contiguous");
    let (rows, scales) = (values_of::<E>(rows), values(scales));
    let out = DisjointVec::<E>::new(count * to);
    let mut weight = vec![0.0; input * output]; // [in, out] of one group after the other
    for group in 0..layout.groups() {
        let range = layout.group(group);
        if range.is_empty() {
            continue;
        }
        dequantize(&quantized[group * bytes..][..bytes], &scales[group * blocks..][..blocks], bits, &mut weight);
        let inputs = rows[range.start * from..range.end * from].par_chunks(ROWS_PER_TASK * from).enumerate();
        inputs.for_each_init(Default::default, |(lhs, wide), (task, inputs)| {
            let height = inputs.len() / from;
            let first = range.start + task * ROWS_PER_TASK;
            let matrix = Matrix::new(&weight, input, output);
            let matrix = if transpose { matrix.transposed() } else { matrix };
            let inputs = E::view(inputs, height, from, from, lhs);
            // SAFETY: a task writes the rows of its chunk of the inputs, and groups share no rows (`GroupLayout`'s constructors).
            let target = unsafe { out.block(to, first..first + height, 0..to) };
            E::write(target, wide, |out| multiply(out, inputs, matrix, 1.0, Write::Set));
        });
    }
    // SAFETY: `E::write` wrote all of each task's block.
    tensor_of(unsafe { out.finish() }, [count, to])
}

/// Writes the f32 values of one matrix to `weight`.
fn dequantize(quantized: &[u8], scales: &[f32], bits: QuantBits, weight: &mut [f32]) {
    let size = bits.bytes(QUANT_BLOCK);
    weight.par_chunks_mut(BLOCKS_PER_TASK * QUANT_BLOCK).enumerate().for_each(|(task, weight)| {
        for (index, weight) in weight.chunks_mut(QUANT_BLOCK).enumerate() {
            let block = task * BLOCKS_PER_TASK + index;
            let (quantized, scale) = (&quantized[block * size..][..size], scales[block]);
            let value = |number: u8| f32::from(i16::from(number) - i16::from(bits.zero())) * scale;
            match bits {
                QuantBits::Eight => weight.iter_mut().zip(quantized).for_each(|(weight, &byte)| *weight = value(byte)),
                QuantBits::Four => {
                    // The last block of a matrix may be shorter.
                    let (low, high) = weight.split_at_mut(weight.len().min(size));
                    low.iter_mut().zip(quantized).for_each(|(weight, byte)| *weight = value(byte & 15));
                    high.iter_mut().zip(quantized).for_each(|(weight, byte)| *weight = value(byte >> 4));
                }
            }
        }
    });
}
