//! The product by weights of few bits: one expert's matrix at a time is unpacked, by all threads, and multiplied.

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::super::{BLOCK, Bits, PackedSpec};
use super::element::Element;
use super::matrix::{Matrix, Write, multiply};
use super::{ExpertPlan, dims, tensor_of, values, values_of, zeros};

/// Blocks of one task of unpacking.
const BLOCKS_PER_TASK: usize = 64;
/// Rows of one task of multiplying.
const ROWS_PER_TASK: usize = 64;

/// `out[r] = rows[r] x weight[expert of r]`, or with the transposed weight.
pub(super) fn product<E: Element>(
    rows: &FlexTensor,
    packed: &FlexTensor,
    scales: &FlexTensor,
    spec: PackedSpec,
    plan: &ExpertPlan,
    transpose: bool,
) -> FlexTensor {
    let [count, width] = dims(rows);
    let [_, bytes] = dims(packed);
    let [_, blocks] = dims(scales);
    let PackedSpec { bits, input, output } = spec;
    let (from, to) = if transpose { (output, input) } else { (input, output) };
    assert_eq!(width, from, "the rows are as wide as the weight's input");
    let packed: &[u8] = packed.as_slice().expect("packed values are bytes, and were made contiguous");
    let (rows, scales) = (values_of::<E>(rows), values(scales));
    let mut out = zeros::<E>(count * to);
    let mut weight = vec![0.0; input * output];
    for expert in 0..plan.experts() {
        let (start, end) = (plan.offsets[expert], plan.offsets[expert + 1]);
        if start == end {
            continue;
        }
        unpack(&packed[expert * bytes..][..bytes], &scales[expert * blocks..][..blocks], bits, &mut weight);
        let pieces = out[start * to..end * to].par_chunks_mut(ROWS_PER_TASK * to);
        let inputs = rows[start * from..end * from].par_chunks(ROWS_PER_TASK * from);
        pieces.zip(inputs).for_each_init(Default::default, |(lhs, wide), (piece, inputs)| {
            let height = inputs.len() / from;
            let matrix = Matrix::new(&weight, input, output);
            let matrix = if transpose { matrix.transposed() } else { matrix };
            let inputs = E::view(inputs, height, from, from, lhs);
            // SAFETY: the view is the whole piece, which is this task's alone.
            unsafe {
                E::write(piece.as_mut_ptr(), height, to, to, wide, |out| {
                    multiply(out, inputs, matrix, 1.0, Write::Set);
                });
            }
        });
    }
    tensor_of(out, [count, to])
}

fn unpack(packed: &[u8], scales: &[f32], bits: Bits, weight: &mut [f32]) {
    let size = bits.bytes(BLOCK);
    weight.par_chunks_mut(BLOCKS_PER_TASK * BLOCK).enumerate().for_each(|(task, weight)| {
        for (index, weight) in weight.chunks_mut(BLOCK).enumerate() {
            let block = task * BLOCKS_PER_TASK + index;
            let (packed, scale) = (&packed[block * size..][..size], scales[block]);
            let value = |number: u8| f32::from(i16::from(number) - i16::from(bits.zero())) * scale;
            match bits {
                Bits::Eight => weight.iter_mut().zip(packed).for_each(|(weight, &byte)| *weight = value(byte)),
                Bits::Four => {
                    // The last block may be cut short.
                    let (low, high) = weight.split_at_mut(weight.len().min(size));
                    low.iter_mut().zip(packed).for_each(|(weight, byte)| *weight = value(byte & 15));
                    high.iter_mut().zip(packed).for_each(|(weight, byte)| *weight = value(byte >> 4));
                }
            }
        }
    });
}
