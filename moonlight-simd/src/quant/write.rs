//! Writing a quantized matrix.

mod codes;

pub use codes::CodeOrder;

use super::{BLOCK, Bits, ScaleType, Shape, TILE, quantize_block};

/// A quantized matrix while it is written. A writer may be given some tiles only, so that threads can share a matrix.
#[derive(Debug)]
pub struct MatrixWriter<'a> {
    pub(super) shape: Shape,
    pub(super) first_tile: usize,
    pub(super) values: &'a mut [u8],
    pub(super) scales: &'a mut [u16],
}

impl<'a> MatrixWriter<'a> {
    /// A writer of the tiles from `first_tile` on whose values and scales the slices have. The slices may be uninitialized before in
    /// the sense that every output of these tiles must be written by [`write`](Self::write) or [`fill`](Self::fill).
    ///
    /// # Panics
    ///
    /// If the slices are not those of a number of whole tiles.
    pub fn new(shape: Shape, first_tile: usize, values: &'a mut [u8], scales: &'a mut [u16]) -> Self {
        let tiles = scales.len() / (shape.blocks() * TILE);
        assert_eq!(scales.len(), tiles * shape.blocks() * TILE, "scales are those of whole tiles");
        assert_eq!(
            values.len(),
            tiles * shape.blocks() * shape.bits.tile_bytes(),
            "values are those of the same tiles"
        );
        Self { shape, first_tile, values, scales }
    }

    /// Sets all outputs to 0.
    pub fn fill(&mut self) {
        let zero = match self.shape.bits {
            Bits::Eight => 128,
            Bits::Four => 0x88,
        };
        self.values.fill(zero);
        self.scales.fill(0);
    }

    /// Writes one output: its stored values (with the zero point, 1 a byte), one for each input, and the bits of its scales, one a block.
    ///
    /// # Panics
    ///
    /// If the output is not one of the writer's tiles, or the numbers are not those of the shape.
    pub fn write(&mut self, output: usize, values: &[u8], scales: &[u16]) {
        let Shape { bits, input, .. } = self.shape;
        assert!(values.len() == input && scales.len() == self.shape.blocks(), "one value an input, one scale a block");
        let local = output - self.first_tile * TILE;
        for (block, (values, &scale)) in values.chunks(BLOCK).zip(scales).enumerate() {
            self.scales[self.shape.scale_at(local, block)] = scale;
            let (start, _) = self.shape.value_at(local, block * BLOCK);
            let mut whole = [bits.zero(); BLOCK];
            whole[..values.len()].copy_from_slice(values);
            match bits {
                Bits::Eight => {
                    for (quad, values) in whole.chunks_exact(4).enumerate() {
                        self.values[start + quad * 4 * TILE..][..4].copy_from_slice(values);
                    }
                }
                Bits::Four => {
                    let (low, high) = whole.split_at(BLOCK / 2);
                    for (quad, (low, high)) in low.chunks_exact(4).zip(high.chunks_exact(4)).enumerate() {
                        let target = &mut self.values[start + quad * 4 * TILE..][..4];
                        for ((target, low), high) in target.iter_mut().zip(low).zip(high) {
                            *target = low | high << 4;
                        }
                    }
                }
            }
        }
    }
}

/// Quantizes the tiles from `first_tile` on whose values and scales the slices have, from a matrix `[input, output]`. The slices may
/// be those of some tiles, so that threads can share a matrix.
///
/// # Panics
///
/// If the slices are not those of whole tiles, or the matrix is not that of the shape.
pub fn quantize_tiles(
    weights: &[f32],
    shape: Shape,
    scale_type: ScaleType,
    first_tile: usize,
    values: &mut [u8],
    scales: &mut [u16],
) {
    let Shape { bits, input, output } = shape;
    assert_eq!(weights.len(), input * output, "the matrix must have the shape");
    let mut writer = MatrixWriter::new(shape, first_tile, values, scales);
    writer.fill();
    let tiles = writer.scales.len() / (shape.blocks() * TILE);
    let outputs = first_tile * TILE..output.min((first_tile + tiles) * TILE);
    let mut columns = vec![0.0; TILE * input];
    let (mut codes, mut stored) = (vec![0; input], vec![0; shape.blocks()]);
    for first in outputs.clone().step_by(TILE) {
        let count = TILE.min(outputs.end - first);
        for (index, row) in weights.chunks_exact(output).enumerate() {
            for (lane, &weight) in row[first..first + count].iter().enumerate() {
                columns[lane * input + index] = weight;
            }
        }
        for (lane, column) in columns.chunks_exact(input).take(count).enumerate() {
            let blocks = column.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)).zip(&mut stored);
            for ((weights, codes), stored) in blocks {
                *stored = quantize_block(weights, bits, scale_type, codes);
            }
            writer.write(first + lane, &codes, &stored);
        }
    }
}
